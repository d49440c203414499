"""Six losses, each a pure function of tensors, and how they hang on the networks.

    L = ITC + ITM + MLM + PLM      the baseline L_bl [2, 3]
      + CVTA                       a patch against the keywords of its bag [1, section 3.2]
      + MRTVA                      text-guided features of parent and child agree [1, section 3.3]

    python losses.py               # the idea alone: CVTA and MRTVA learn on a toy bag, in seconds

A node is not valid if it is blank glass, or if the slide lacks its magnification. Every loss takes
a mask of what counts (ITC and CVTA also weights), and is 0 where nothing is valid, never NaN. It
computes in fp32, also under autocast. MRTVA's stop-gradient stands at its call; selections carry
none. Nothing reads a value back from the device, draws a random number, or loops over the batch.

Shape letters are the README's; here also M patches that the caption losses read, U distinct
keywords of the batch, C candidates of a contrast, R rows, E edges.

[1] MR-PLIP, CVPR 2025. [2] Li et al. 2021, ALBEF. [3] Li et al. 2022, mPLUG.
[4] Chen & He 2021, SimSiam. [5] Radford et al. 2021, CLIP.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import all_sum, full, rank, real_tokens, world_size

# The loop clamps temperatures to this range: near 0 the nearest candidate alone gets a gradient.
TAU = (0.01, 0.5)


# ---- Many processes ------------------------------------------------------------------------------
# DDP averages gradients, so every loss keeps one rule: the mean over processes of what it returns
# is the loss of the whole batch, and gathered tensors carry gradients home.


class AllGather(torch.autograd.Function):
    """Concatenate over processes. A row's gradient is the sum of what every process asks."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x):
    """Concatenate x [M, ...] of all processes in rank order, with its gradient."""
    return AllGather.apply(x) if world_size() > 1 else x


def all_mean(x):
    """Average x over processes, without gradient."""
    return all_sum(x.detach()) / world_size()


def weighted_mean(x, weight):
    """Weigh x: averaged over processes, the weighted mean of all rows, or 0 without weight."""
    x = full(x)
    weight = weight.to(x.dtype)
    return (x * weight).sum() / all_mean(weight.sum()).clamp(min=1e-6)


def unit(x):
    """Scale x [..., d] to length 1 in fp32: dot products are then cosines."""
    return F.normalize(full(x), dim=-1)


def in_fp32(loss):
    """Decorate a loss: autocast would multiply in bf16, which is too coarse for logits / tau."""

    @functools.wraps(loss)
    def run(x, *args, **more):
        with torch.autocast(x.device.type, enabled=False):
            return loss(x, *args, **more)

    return run


# ---- The baseline losses -------------------------------------------------------------------------


@in_fp32
def itc(v, t, bag, tau, weight, kin=0.1):
    """Contrast images with texts [2, 5].

        L = 1/2 mean_i [ H(q_i, softmax_j v_i t_j / tau) + H(q_i, softmax_j t_i v_j / tau) ]

    v, t    [R, d]  embeddings of R patches and of their captions, L2-normalised
    bag     [R]     number of each patch's bag
    weight  [R]     mask or weights
    kin             target mass that q_i spreads over all patches of its own bag, itself included:
                    they show the same tissue, so it would be false to call them wrong. 1 - kin more
                    is on the own caption.
    Candidates are those of all processes. Returns a scalar; chance level ln(valid candidates).
    """
    v, t = full(v), full(t)
    all_v, all_t, all_bag = gather(v), gather(t), gather(bag)  # [C, d], [C, d], [C]
    real = gather(weight.to(v.dtype)) > 0  # [C]
    # Build the targets: the bag's patches share kin, the own caption gets 1 - kin more.
    same = ((bag[:, None] == all_bag[None, :]) & real).to(v.dtype)  # [R, C]
    q = kin * same / same.sum(1, keepdim=True).clamp(min=1)
    column = torch.arange(len(v), device=v.device) + rank() * len(v)
    q = q.scatter_add(1, column[:, None], torch.full_like(q[:, :1], 1 - kin))  # [R, C]
    rows = 0
    for query, candidates in ((v, all_t), (t, all_v)):
        logits = (query @ candidates.T / tau).masked_fill(~real, -1e4)  # [R, C]
        rows = rows - (q * logits.log_softmax(1)).sum(1) / 2
    return weighted_mean(rows, weight)


@torch.no_grad()
@in_fp32
def hard_negatives(v, t, bag, tau, told, rand):
    """Draw a wrong image for each caption and a wrong caption for each image [2].

    v, t [M, d]; bag [M]; told bool [M]; rand [M, 2] uniform in [0, 1).
    The similar ones are likelier (softmax), and none comes from the own bag: its patches would be
    false negatives. Returns (image [M], text [M], ok [M]): row numbers among all processes; ok is
    False if the row has no caption or no other bag is there, and then the row must not count.
    """
    v, t, told = full(v), full(t), told.bool()
    all_v, all_t, all_bag, all_told = gather(v), gather(t), gather(bag), gather(told)
    other = (bag[:, None] != all_bag[None, :]) & all_told[None, :]  # [M, C]
    drawn = []
    for query, candidates, u in ((t, all_v, rand[:, :1]), (v, all_t, rand[:, 1:])):
        p = (query @ candidates.T / tau).masked_fill(~other, -1e4).softmax(1)
        # Leave each candidate a chance, else the same negative would come again and again.
        p = p * other + 1e-4 * other
        # Sample by inverse transform: count the columns whose cumulative sum stays below u.
        cdf = p.cumsum(1)
        below = cdf <= u * (1 - 1e-6) * cdf[:, -1:]
        drawn.append(below.sum(1).clamp(max=len(all_bag) - 1))
    return drawn[0], drawn[1], other.any(1) & told


def itm(positive, wrong_image, wrong_text, ok):
    """Match images with texts [2]: classify true pairs and hard negatives.

        L = mean over pairs of -log softmax(logits)[match],   match = 1 if the pair is true, else 0

    Logits [M, 2] of the true pair, of caption + wrong image, of image + wrong caption; column 1
    means "they match"; ok [M]. Always giving the base rate of one in three costs 0.637.
    """
    logits = full(torch.cat([positive, wrong_image, wrong_text]))  # [3M, 2]
    labels = (torch.arange(len(logits), device=logits.device) < len(positive)).long()
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), ok.repeat(3))


def corrupt(ids, real, mask_id, words, rand, rate=0.15):
    """Mask tokens for MLM [2] -> (corrupted ids, labels), each [M, T]; label -100 asks nothing.

    ids [M, T], of which those below `words` are no special ones; real bool [M, T]; rand
    [M, 3, T or more] uniform in [0, 1). A share `rate` of the real words is chosen. Of those 80 %
    become mask_id, 10 % a random word, and 10 % stay.
    """
    choose, how, which = rand[..., : ids.shape[1]].unbind(1)  # 3 x [M, T]
    random_ids = (which * words).long().clamp(max=words - 1)
    chosen = real & (ids < words) & (choose < rate)
    labels = torch.where(chosen, ids, -100)
    ids = torch.where(chosen & (how < 0.8), mask_id, ids)
    return torch.where(chosen & (how >= 0.9), random_ids, ids), labels


def mlm(logits, labels):
    """Fill in masked words [2]: logits [M, T, vocab], labels [M, T], of which -100 is not asked.

        L = mean over asked tokens of -log p(token | image, the caption with its masks)

    Chance level ln(vocab).
    """
    logits, labels = full(logits).flatten(0, 1), labels.flatten()  # [M T, vocab], [M T]
    rows = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return weighted_mean(rows, labels != -100)


def split_prefix(real, rand):
    """Draw the length of each caption's prefix, uniformly: real [M, T], rand [M] -> [M].

    The start id always belongs to the prefix, and at least the end id is left to predict.
    """
    n = real.sum(1) - 1  # positions that predict something
    return 1 + (rand * n).long().clamp(max=(n - 1).clamp(min=0))


def plm(logits, ids, prefix, real, told):
    """Continue captions [3].

        L = mean over tokens after the prefix of -log p(token | image, all tokens before it)

    logits [M, T, vocab] under the prefix mask; ids, real [M, T]; prefix, told [M]. Chance level
    ln(vocab).
    """
    at = torch.arange(1, ids.shape[1], device=ids.device)
    asked = (at[None, :] >= prefix[:, None]) & real[:, 1:] & told.bool()[:, None]  # [M, T - 1]
    labels = F.pad(torch.where(asked, ids[:, 1:], -100), (0, 1), value=-100)  # [M, T] next token
    return mlm(logits, labels)


# ---- Cross-resolution Visual-Textual Alignment [1, section 3.2] ----------------------------------


@torch.no_grad()
@in_fp32
def select_keywords(v, w, k_o, w_valid, allowed=None):
    """Select the positives P(a) of each node: the k_o keywords with the highest cosine.

    v        [B, N, d]  patches
    w        [B, K, d]  keywords of the bag
    w_valid  [B, K]     keywords that are no padding
    allowed  [B, N, K]  keywords a node may select; None allows all
    Returns (index [B, N, k_o], chosen bool [B, N, k_o]); chosen is False where there are fewer than
    k_o. The choice carries no gradient. Of equal cosines the earlier keyword wins.
    """
    cosine = unit(v) @ unit(w).transpose(1, 2)  # [B, N, K]
    listed = w_valid[:, None, :].expand_as(cosine)
    allowed = listed if allowed is None else listed & allowed
    k = min(k_o, w.shape[1])
    ranked = cosine.masked_fill(~allowed, -2.0).sort(dim=-1, descending=True, stable=True)
    index, chosen = ranked.indices[..., :k], ranked.values[..., :k] > -1.5
    return F.pad(index, (0, k_o - k)), F.pad(chosen, (0, k_o - k))


@in_fp32
def cvta(v, w, k_o, tau, v_valid, w_valid, selected=None, spared=None, near=None):
    """Draw each patch to its few keywords, away from the other keywords [1].

        L = - mean_a 1/|P(a)| sum_{b in P(a)} [ s_ab - log sum_b' exp s_ab' ]
        s_ab = cos(v_a, w_b) / tau; b' runs over P(a) and what is not padding, spared or near

    v        [B, N, d]       patches
    w        [B or 1, K, d]  keywords of the bag, or of the whole batch for all bags (B = 1)
    v_valid  [B, N]          mask or weights
    w_valid  [B or 1, K]     keywords that are no padding
    selected                 (index, chosen) of select_keywords; None selects by cosine, as in [1]
    spared   [B, N, K]       keywords that are no negatives of a node
    near                     a keyword whose cosine to a positive exceeds this is no negative: it
                             says the same in other words. None keeps all, as in [1]
    Returns a scalar. The sum over positives, k_o or fewer, stands outside the logarithm, so the
    optimum is log |P|, not 0, and equal logits give the log of the number of candidates that are
    left. Nodes without a positive drop out.
    """
    index, chosen = select_keywords(v, w, k_o, w_valid) if selected is None else selected
    v, w = unit(v), unit(w)
    s = v @ w.transpose(1, 2) / tau  # [B, N, K]
    with torch.no_grad():
        positive = torch.zeros_like(s).scatter_add(2, index, chosen.to(s.dtype)) > 0
        ignored = ~w_valid[:, None, :]
        if spared is not None:
            ignored = ignored | spared
        if near is not None:
            alike = (w @ w.transpose(1, 2) > near).to(s.dtype)  # [B or 1, K, K]
            ignored = ignored | (positive.to(s.dtype) @ alike > 0)
        ignored = ignored & ~positive
    log_p = s - s.masked_fill(ignored, -1e4).logsumexp(-1, keepdim=True)  # [B, N, K]
    rows = -(log_p.gather(2, index) * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)  # [B, N]
    return weighted_mean(rows, v_valid.to(rows.dtype) * chosen.any(-1))


# ---- Multi-Resolution Text-guided Visual representation Alignment [1, 3.3] -----------------------


def tree_edges(N=85, b=4, device=None):
    """List the edges of a b-ary heap of N nodes: a tensor [E, 2] of (parent, child) per level."""
    edges, first, size = [], 1, b
    while first < N:
        child = torch.arange(first, first + size, device=device)
        edges.append(torch.stack([(child - 1) // b, child], 1))
        first, size = first + size, size * b
    return edges


def mrtva(h, g, valid, edges=None):
    """Let parent and child predict each other [1, 4].

        L = mean over magnifications of mean over their pairs (p, c) of
            -1/2 [ cos(h_p, g_c) + cos(h_c, g_p) ]

    h      [B, N, d]  predictions; d is the output of the heads here
    g      [B, N, d]  projections, already detached by the caller
    valid  [B, N]     nodes that hold tissue
    edges             list of [E, 2] node numbers (p, c), a tensor per pair of magnifications;
                      None takes the edges of the 4-ary tree
    Returns a scalar in [-1, 1]. The mean is taken inside each tensor first: else the 64 edges from
    20x to 40x would be three quarters of the loss.
    """
    h, g, valid = unit(h), unit(g), valid.bool()
    agreement, count = [], []
    for group in tree_edges(h.shape[1], device=h.device) if edges is None else edges:
        parent, child = group.unbind(1)
        # Compare in both directions: each side predicts the other.
        down = (h[:, parent] * g[:, child]).sum(-1)  # [B, E]
        up = (h[:, child] * g[:, parent]).sum(-1)  # [B, E]
        # Count a pair only if both of its ends hold tissue.
        both = (valid[:, parent] & valid[:, child]).to(h.dtype)
        agreement.append(((down + up) / 2 * both).sum())
        count.append(both.sum())
    total = all_mean(torch.stack(count))
    # Leave out a magnification that no slide of the batch has.
    means = torch.stack(agreement) / total.clamp(min=1e-6)
    return -means.sum() / (total > 0).sum().clamp(min=1)


class MaskedBatchNorm(nn.Module):
    """Normalise x [R, D] with the statistics of the valid rows of all processes [4].

    SimSiam learns little without batch norm. Blank nodes must not drag its mean. It has no running
    averages: the heads serve training only.
    """

    def __init__(self, width, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x, valid):
        """Normalise x [R, D], valid [R]."""
        x = full(x)
        w = valid.to(x.dtype).unsqueeze(1)  # [R, 1]
        total = all_sum(torch.cat([(x * w).sum(0), w.sum().view(1)]))  # [D + 1] sum, count
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        # Take the variance in a second pass: a difference of squares would cancel.
        var = all_sum(((x - mean) ** 2 * w).sum(0)) / count
        x = (x - mean) * torch.rsqrt(var + 1e-5)
        return x if self.weight is None else x * self.weight + self.bias


class Heads(nn.Module):
    """SimSiam's heads [4]: a projector of three layers, a predictor with a bottleneck of 1/4."""

    def __init__(self, width, hidden, out):
        super().__init__()
        sizes = ((width, hidden), (hidden, hidden), (hidden, out))
        self.project = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes)
        norms = [MaskedBatchNorm(hidden), MaskedBatchNorm(hidden), MaskedBatchNorm(out, False)]
        self.norms = nn.ModuleList(norms)
        self.squeeze = nn.Linear(out, out // 4, bias=False)
        self.norm = MaskedBatchNorm(out // 4)
        self.predict = nn.Linear(out // 4, out)

    def forward(self, z, valid):
        """Map z [R, D], valid [R] to (h predicted, g projected), each [R, out]."""
        for i, (linear, norm) in enumerate(zip(self.project, self.norms, strict=True)):
            z = norm(linear(z), valid)
            z = F.relu(z) if i < 2 else z
        return self.predict(F.relu(self.norm(self.squeeze(z), valid))), z


@torch.no_grad()
@in_fp32
def deviation(g, valid):
    """Measure the deviation of the projections g [B, N, d], times sqrt(d) -> 1, or 0: collapse."""
    g = unit(g)
    m = valid.to(g.dtype)[..., None]  # [B, N, 1]
    mean = (g * m).sum((0, 1)) / m.sum().clamp(min=1)
    var = ((g - mean).square() * m).sum((0, 1)) / m.sum().clamp(min=1)  # [d]
    return var.sqrt().mean() * g.shape[-1] ** 0.5


@torch.no_grad()
def agreement(valid, index, chosen, own, w_valid):
    """Measure how far a selection agrees with captions -> {"own", "chance"}.

    valid [B, N]; index, chosen [B, N, k_o] of select_keywords; own [B, N, K]; w_valid [B, K].
    own     share of the selected keywords that the node's own caption names
    chance  what `own` would be if nodes selected blindly
    """
    chosen = (chosen & valid[..., None]).float()  # [B, N, k_o]
    picks = chosen.sum().clamp(min=1)
    share = (own & w_valid[:, None]).sum(2) / w_valid.sum(1).clamp(min=1)[:, None]  # [B, N]
    return {
        "own": (own.gather(2, index) * chosen).sum() / picks,
        "chance": (share * chosen.sum(2)).sum() / picks,
    }


def find_faults(mean):
    """List a sentence for each known failure that the means of the monitors show."""
    tests = (
        (mean.get("std", 1) < 0.3, "MRTVA's projections collapse: lower --lr or --mrtva"),
        (mean.get("own", 1) < 1.2 * mean.get("chance", 0),
         "selected keywords agree with captions only by chance: raise --own_captions"),
        (not 1.01 * TAU[0] < mean["tau"] < 0.99 * TAU[1], "ITC's temperature stands at its limit"),
    )  # fmt: skip
    return [sentence for ill, sentence in tests if ill]


# ---- The objective -------------------------------------------------------------------------------


def take(x, index):
    """Index x [U, ...] with index of any shape, like x[index].

    The backward pass of x[index] adds up repeats in any order, and two runs would differ in their
    last bits. That of an embedding keeps one order on a CPU.
    """
    return F.embedding(index, x.flatten(1)).view(*index.shape, *x.shape[1:])


class Objective(nn.Module):
    """Compute all losses of a batch, in the paper's order: batch -> (losses, monitors).

    Both are dicts of scalars. data.Batches documents the batch. A loss whose weight in cfg is 0 is
    not computed. To add one: write it above, call it in forward, weigh it in train.Config.
    """

    def __init__(self, model, cfg):
        super().__init__()
        self.model, self.cfg = model, cfg
        self.heads = Heads(model.fusion_norm.normalized_shape[0], *model.simsiam)

    def train(self, mode=True):
        """Switch as nn.Module does, but leave a frozen tower in eval mode."""
        super().train(mode)
        if self.cfg.freeze_vision:
            self.model.vision.eval()
        return self

    def forward(self, batch):
        """Encode patches, captions and keywords; hang the six losses on them."""
        model, cfg, out = self.model, self.cfg, {}
        B, N = batch["valid"].shape
        # Patches -> v; or start from the cached tokens of a frozen tower.
        if "tokens" in batch:
            tokens = batch["tokens"].flatten(0, 1)  # [BN, V, Dv]
        else:
            with torch.no_grad() if cfg.freeze_vision else contextlib.nullcontext():
                tokens = model.vision_tokens(batch["patches"].flatten(0, 1))
        v = model.to_shared(tokens)  # [BN, d]
        # Captions -> t.
        text_tokens, embedding = model.text(batch["ids"].flatten(0, 1))  # [BN, T, Dt], [BN, d]
        t = unit(embedding)
        weight = (batch["weight"] * batch["told"]).flatten()  # [BN]

        if cfg.itc:
            bag = batch["bag"].repeat_interleave(N)  # [BN]
            tau = (-model.itc_scale).exp()
            out["itc"] = itc(v, t, bag, tau, weight, cfg.kin)
        seen = {"tau": (-model.itc_scale).exp().detach()}

        if cfg.itm or cfg.mlm or cfg.plm or cfg.mrtva:
            image_tokens = model.to_fusion(tokens)  # [BN, V, D]
        if cfg.itm or cfg.mlm or cfg.plm:
            out |= self.caption_losses(batch, v, t, image_tokens, text_tokens)

        if cfg.cvta or cfg.mrtva:
            # One selection of keywords serves both losses.
            v_bags = v.view(B, N, -1)
            all_w = model.encode_text(batch["keywords"])  # [U, d]
            w = take(all_w, batch["bag_keywords"])  # [B, K, d]
            allowed = batch["own"] | batch["free"][..., None]  # [B, N, K]
            selected = select_keywords(v_bags, w, cfg.k_o, batch["w_valid"], allowed)
            seen |= agreement(batch["valid"], *selected, batch["own"], batch["w_valid"])
        if cfg.cvta:
            out["cvta"] = self.cvta_of(batch, v_bags, w, all_w, selected)
        if cfg.mrtva:
            index, chosen = selected
            column = batch["bag_keywords"].gather(1, index.flatten(1))  # [B, N k_o] into U
            picked = take(all_w, column.view(B * N, -1))  # [BN, k_o, d]
            z = model.fuse_with_keywords(image_tokens, picked, chosen.flatten(0, 1))  # [BN, D]
            h, g = self.heads(z, batch["valid"].flatten())
            h, g = h.view(B, N, -1), g.view(B, N, -1)
            edges = tree_edges(N, cfg.children, h.device)
            # Stop the gradient of the target [4].
            out["mrtva"] = mrtva(h, g.detach(), batch["valid"], edges)
            seen["std"] = deviation(g, batch["valid"])
        return out, seen

    def caption_losses(self, batch, v, t, image_tokens, text_tokens):
        """Compute ITM, MLM and PLM on M patches and their captions."""
        model, cfg, out = self.model, self.cfg, {}
        row = batch["caption_rows"]  # [M] numbers into BN
        ids, told = batch["ids"].flatten(0, 1)[row], batch["told"].flatten()[row]
        real = real_tokens(ids, model.text.end)  # [M, T]
        image, text = take(image_tokens, row), take(text_tokens, row)  # [M, V, D], [M, T, Dt]
        if cfg.itm:
            bag = batch["bag"].repeat_interleave(batch["told"].shape[1])[row]
            tau = (-model.itc_scale).exp()
            i, j, ok = hard_negatives(v[row], t[row], bag, tau, told, batch["rand_negative"])
            # Fuse the true pairs, captions with a wrong image, images with a wrong caption.
            images = torch.cat([image, take(gather(image), i), image])  # [3M, V, D]
            texts = torch.cat([text, text, take(gather(text), j)])  # [3M, T, Dt]
            reals = torch.cat([real, real, gather(real)[j]])  # [3M, T]
            fused = model.fuse_with_text(images, texts, reals)  # [3M, T, D]
            # Read the answer at the end id.
            end = fused[torch.arange(len(fused), device=fused.device), reals.sum(1) - 1]
            out["itm"] = itm(*model.itm_head(end).chunk(3), ok)
        if cfg.mlm:
            asked, mask, words = real & told[:, None], model.text.end + 1, model.text.end - 1
            masked, labels = corrupt(ids, asked, mask, words, batch["rand_mask"])
            fused = model.fuse_with_text(image, model.text(masked)[0], real)
            out["mlm"] = mlm(model.lm_logits(fused), labels)
        if cfg.plm:
            prefix = split_prefix(real, batch["rand_prefix"])
            fused = model.fuse_with_text(image, text, real, prefix)
            out["plm"] = plm(model.lm_logits(fused), ids, prefix, real, told)
        return out

    def cvta_of(self, batch, v, w, all_w, selected):
        """Compute CVTA against the keywords of the own bag, or against all of the batch."""
        cfg, w_valid = self.cfg, batch["w_valid"]
        tau = (-self.model.cvta_scale).exp()
        # While a node is bound to its caption, that caption's other keywords are no negatives.
        spared = batch["own"] & w_valid[:, None] & ~batch["free"][..., None]  # [B, N, K]
        if cfg.negatives == "batch":
            # Number keywords by their place in the batch, 0 .. U - 1, in place of that in the bag.
            column = batch["bag_keywords"][:, None, :].expand_as(spared)  # [B, N, K]
            named = spared.new_zeros(*spared.shape[:2], len(all_w), dtype=torch.int)
            spared = named.scatter_add(2, column, spared.int()) > 0  # [B, N, U]
            selected = column.gather(2, selected[0]), selected[1]
            w, w_valid = all_w[None], batch["keyword_real"][None]  # [1, U, d], [1, U]
        more = dict(w_valid=w_valid, selected=selected, spared=spared, near=cfg.near)
        return cvta(v, w, cfg.k_o, tau, v_valid=batch["weight"], **more)


def main():
    """Train CVTA and MRTVA on one toy bag: 85 patches of three tissues, twelve keywords."""
    torch.manual_seed(0)
    d, k_o, noise = 16, 4, 1.0
    # Each 10x patch and all below it show one tissue; four keywords name each tissue.
    tissue = torch.zeros(85, dtype=torch.long)
    for n in range(1, 85):
        tissue[n] = (n - 1) % 3 if n < 5 else tissue[(n - 1) // 4]
    patches = torch.randn(3, 32)[tissue] + noise * torch.randn(85, 32)  # [N, 32]
    true = tissue[:, None] == torch.arange(12)[None, :] // 4  # [N, K] keyword names its tissue
    # A captioner names half of the true keywords, and one wrong keyword in twenty.
    own = (true & (torch.rand(85, 12) < 0.5)) | (torch.rand(85, 12) < 0.05)
    see, keywords = nn.Linear(32, d), nn.Parameter(torch.randn(12, d))
    fuse, heads = nn.Linear(2 * d, 32), Heads(32, 32, d)
    parameters = [*see.parameters(), keywords, *fuse.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    v_valid, w_valid = torch.ones(1, 85, dtype=torch.bool), torch.ones(1, 12, dtype=torch.bool)
    print("step   CVTA  MRTVA   true keywords among the selected (chance .33)")
    for step in range(301):
        v, w = see(patches)[None], keywords[None]  # [1, N, d], [1, K, d]
        # Bind patches to their own captions at first; later let the similarity decide.
        free = step >= 100
        allowed = (own | free)[None]
        index, chosen = select_keywords(v, w, k_o, w_valid, allowed)
        spared = own[None] & (not free)
        align = cvta(v, w, k_o, 0.1, v_valid, w_valid, (index, chosen), spared)
        words = (keywords[index[0]] * chosen[0, ..., None]).mean(1)  # [N, d]
        h, g = heads(fuse(torch.cat([v[0], words], 1)), v_valid[0])
        agree = mrtva(h[None], g[None].detach(), v_valid)
        if step % 50 == 0:
            index, _ = select_keywords(v, w, k_o, w_valid)
            right = true.gather(1, index[0]).float().mean().item()
            print(f"{step:4d} {align.item():6.2f} {agree.item():6.2f} {right:10.2f}")
        optimizer.zero_grad()
        (align + agree).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
