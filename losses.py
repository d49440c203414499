"""Objectives: six losses, each one equation, each a pure function of tensors; and the monitors that tell when one has failed. How they
hang on the networks is in objective.py.

    L = ITC + ITM + MLM + PLM   (L_bl, the baseline of [2, 3])   +   CVTA   +   MRTVA              (MR-PLIP [1], section 3)

Shape letters: B bags, N nodes per bag, M = rows of a pair loss (any patches with their captions), K keywords of a bag,
k_o keywords selected per node, L keywords a softmax runs over, Q slots of a queue, C columns (candidates) of a contrast,
T text tokens, d the shared space, V vocabulary, W processes.

A node that is blank glass, or whose magnification the slide does not have, is not valid; every loss takes that mask (or
non-negative weights: `Objective` gives each magnification the same total weight). Where nothing is valid a loss is 0, never
NaN. Everything is computed in fp32, also under autocast (on a GPU with TF32 products, as train.py sets it; in fp64 where a test gives that).
Stop-gradients are at the call, where the reader sees them. Nothing here reads a value back from the device or loops over the batch.

References
[1] MR-PLIP, CVPR 2025.   [2] Li et al. 2021, ALBEF (ITC, ITM with hard negatives, MLM).   [3] Li et al. 2022, mPLUG (prefix LM).
[4] Chen & He 2021, SimSiam.   [5] Radford et al. 2021, CLIP.
"""
import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import full, rank, world_size


# ----------------------------------------------------------------------------------------------------------------------
# Many processes. DDP averages gradients, so the rule for every loss here is: the *mean over processes* of what each
# returns is the loss of the whole batch, and gathered tensors carry gradients home.

def rank_offset(n):
    """Where this process's n rows start among those of all processes."""
    return rank() * n


class AllGather(torch.autograd.Function):
    """The gradient of a row is the sum of what every process's loss asks of it. torch has the same (`distributed.nn`), but not for its compiler."""

    @staticmethod
    def forward(ctx, x):
        """x [M, ...] -> [W M, ...]."""
        out = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        """grad [W M, ...] -> [M, ...]."""
        grad = grad.clone(memory_format=torch.contiguous_format)                       # NCCL takes no other
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x):
    """Concatenate x [M, ...] of every process in rank order -> [W M, ...], with gradients (all ranks must have equal M)."""
    return x if world_size() == 1 else AllGather.apply(x)


def weighted_mean(x, weight):
    """sum(x * weight) / sum(weight), the denominator taken over all processes; 0 where all weights are 0."""
    x = full(x)
    weight = weight.to(x.dtype)
    return (x * weight).sum() / all_mean(weight.sum()).clamp(min=1e-6)


def all_mean(x):
    """The mean over processes of a tensor without gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def unit(x):
    """x [..., d] -> the same in fp32 at least and of length 1: dot products are cosines."""
    return F.normalize(full(x), dim=-1)


def in_fp32(loss):
    """Decorator: autocast would run the matrix products of a loss in bf16, whose three digits are fewer than a logit / tau needs."""
    @functools.wraps(loss)
    def run(x, *args, **more):
        with torch.autocast(x.device.type, enabled=False):
            return loss(x, *args, **more)
    return run


# ----------------------------------------------------------------------------------------------------------------------
# The baseline losses

@in_fp32
def itc(v, t, bag, tau, valid, kin=0.1, slow=None, queue=None, alpha=None):
    """Image-text contrast [2, 5]: v, t [M, d] L2-normalised, bag [M] bag ids, valid [M] mask or weights -> scalar.

        L = 1/2 mean_i  H(q_i, softmax_j v_i t_j / tau) + H(q_i, softmax_j t_i v_j / tau)

    q_i gives 1 - kin to the own caption and spreads `kin` over the patches of the same bag: they show the same tissue, so
    calling them wrong outright would be false. Columns come from all processes. Chance level: ln(number of valid columns).

    slow (v, t), each [M, d], of the momentum model: the columns are then its features, which move too slowly to run away, and
    with alpha (0-d) its own opinion softens the targets: q_i <- (1 - alpha) q_i + alpha softmax_j slow v_i t_j / tau [2].
    queue (v, t [Q, d], bag [Q]) appends the slow features of earlier batches; bag -1 marks a slot not filled yet."""
    M, v, t = len(v), full(v), full(t)
    all_v, all_t = (gather(full(x).detach()) for x in slow) if slow else (gather(v), gather(t))        # [C, d]
    all_bag, real = gather(bag), gather(valid.to(v.dtype)) > 0                         # [C] invalid patches are no negatives
    if queue:
        all_v, all_t = torch.cat([all_v, queue[0].to(v.dtype)]), torch.cat([all_t, queue[1].to(v.dtype)])
        all_bag, real = torch.cat([all_bag, queue[2]]), torch.cat([real, queue[2] >= 0])
    own = torch.arange(M, device=v.device) + rank_offset(M)
    same = ((bag[:, None] == all_bag[None, :]) & real).to(v.dtype)                     # [M, C] kin, oneself included
    q = kin * same / same.sum(1, keepdim=True).clamp(min=1)
    q = q.scatter_add(1, own[:, None], torch.full_like(q[:, :1], 1 - kin))             # [M, C]
    rows = 0
    for a, b, opinion in ((v, all_t, slow and slow[0]), (t, all_v, slow and slow[1])):
        logits = (a @ b.T / tau).masked_fill(~real, -1e4)                              # [M, C]
        target = q
        if alpha is not None:
            with torch.no_grad():
                target = (1 - alpha) * q + alpha * (full(opinion) @ b.T / tau).masked_fill(~real, -1e4).softmax(1)
        rows = rows - (target * logits.log_softmax(1)).sum(1) / 2
    return weighted_mean(rows, valid)


@torch.no_grad()
def enqueue(queue, at, v, t, bag, valid):
    """Write the valid rows of every process, v and t [M, d], bag [M], into the ring buffers queue (v, t [Q + 1, d], bag [Q + 1]) from slot
    at (0-d) on, all in place. Any Q will do: it wraps around, and of more rows than slots the last are kept. What is not kept
    goes, as zeros, to the last slot, which stays empty (bag -1): a mask without a count known to the host."""
    Q, valid = len(queue[2]) - 1, gather(valid & v.isfinite().all(1) & t.isfinite().all(1))    # what is not finite would stay for an epoch
    n = valid.cumsum(0)                                                                # [W M] how many valid rows up to here
    keep = valid & (n > n[-1] - Q)
    slot = torch.where(keep, (at + n - 1) % Q, Q)
    for slots, rows, empty in zip(queue, (v, t, bag), (0, 0, -1)):
        rows = gather(rows)
        slots.index_copy_(0, slot, rows.masked_fill(~keep.view(-1, *[1] * (rows.dim() - 1)), empty).to(slots.dtype))
    at.copy_((at + n[-1]) % Q)


@torch.no_grad()
@in_fp32
def hard_negatives(v, t, bag, tau, valid, lot):
    """For ITM [2]: v, t [M, d], lot [M, 2] in [0, 1) -> (image [M], text [M], ok [M]): for caption i a wrong image, for image i a wrong
    caption, as numbers of the rows of all processes, drawn with the probability softmax gives them, never from the same bag: kin would be
    false negatives. ok is False for a row that is not valid and where no other bag offers one (a single bag): those rows must not count."""
    all_v, all_t, all_bag, all_valid = (gather(x) for x in (full(v), full(t), bag, valid.bool()))      # [C, d], [C, d], [C], [C]
    other = (bag[:, None] != all_bag[None, :]) & all_valid[None, :]                    # [M, C]
    draw = []
    for a, b, u in ((full(t), all_v, lot[:, :1]), (full(v), all_t, lot[:, 1:])):       # text -> image, image -> text
        p = (a @ b.T / tau).masked_fill(~other, -1e4).softmax(1) * other + 1e-4 * other        # hard, but never degenerate
        reached = p.cumsum(1)
        draw.append((reached <= u * (1 - 1e-6) * reached[:, -1:]).sum(1).clamp(max=len(all_bag) - 1))  # the first column that gets past u
    return draw[0], draw[1], other.any(1) & valid.bool()


def itm(positive, negative_image, negative_text, valid):
    """Image-text matching [2]: logits [M, 2] of the true pair, of caption + wrong image, of image + wrong caption
    (column 1 = "they match"), valid [M] -> scalar. Level of always giving the base rate, one in three: ln 3 - 2/3 ln 2 = 0.637."""
    M = len(positive)
    logits = full(torch.cat([positive, negative_image, negative_text]))                # [3M, 2]
    labels = (torch.arange(3 * M, device=logits.device) < M).long()
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), valid.repeat(3))


def corrupt(ids, real, mask_id, special, lot, rate=0.15):
    """MLM's masking [2]: ids [M, T], real [M, T] (not padding), lot [M, 3, T or more] in [0, 1) -> (corrupted ids, labels with -100 where
    nothing is asked). `rate` of the real tokens are chosen, special ids (a tuple) never; of those 80% become mask_id, 10% a random id
    below them, 10% stay."""
    u = lot[..., : ids.shape[1]].unbind(1)                                             # 3 x [M, T]
    random_ids = (u[2] * min(special)).long().clamp(max=min(special) - 1)              # the product may round up
    ordinary = real.clone()
    for s in special:
        ordinary = ordinary & (ids != s)
    chosen = ordinary & (u[0] < rate)
    labels = torch.where(chosen, ids, -100)
    ids = torch.where(chosen & (u[1] < 0.8), mask_id, ids)
    return torch.where(chosen & (u[1] >= 0.9), random_ids, ids), labels


def mlm(logits, labels, slow=None, alpha=None):
    """Masked language modelling [2]: logits [M, T, V], labels [M, T] (-100: not asked) -> mean cross-entropy over the asked
    tokens. Chance level: ln V. slow [M, T, V]: the momentum model's logits; each label is then (1 - alpha) onehot + alpha softmax(slow)."""
    logits, labels = full(logits).flatten(0, 1), labels.flatten()                      # [M T, V], [M T]
    rows = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    if slow is not None:
        rows = (1 - alpha) * rows - alpha * (full(slow).flatten(0, 1).softmax(-1) * logits.log_softmax(-1)).sum(-1)   # over V, not over T
    return weighted_mean(rows, labels != -100)


def split_prefix(real, lot):
    """Where each caption's prefix ends: real [M, T] (start and end ids included), lot [M] in [0, 1) -> prefix [M] >= 1, uniform, so that
    the start id is always known and at least the end id is always left to predict."""
    n = real.sum(1) - 1                                                                # positions that predict something
    return 1 + (lot * n).long().clamp(max=(n - 1).clamp(min=0))


def plm(logits, ids, prefix, real, valid, slow=None, alpha=None):
    """Prefix language modelling [3]: logits [M, T, V] from the prefix mask, ids [M, T] -> mean cross-entropy of the tokens
    after the prefix, each predicted from the image, the prefix and what came before it. Chance level: ln V. slow, alpha as in `mlm`."""
    T = ids.shape[1]
    at = torch.arange(1, T, device=ids.device)
    asked = (at[None, :] >= prefix[:, None]) & real[:, 1:] & valid.bool()[:, None]     # [M, T - 1]
    labels = F.pad(torch.where(asked, ids[:, 1:], -100), (0, 1), value=-100)           # [M, T] of each position the next token
    return mlm(logits, labels, slow, alpha)


# ----------------------------------------------------------------------------------------------------------------------
# Cross-resolution Visual-Textual Alignment [1, section 3.2]

@torch.no_grad()
@in_fp32
def select_keywords(v, w, k_o, w_valid, own=None):
    """The positives P(a) of each node: v [B, N, d], w [B, K, d], w_valid [B, K] -> (index [B, N, k_o], ok [B, N, k_o]).

    The k_o keywords of the bag with the highest cosine to the node (ties: the earlier one). With own [B, N, K] only the
    keywords of the node's own caption are candidates: the warm-up. ok is False where there are fewer than k_o. Projections that are
    not trained yet, or the momentum model's, may be given instead of those the loss compares: the choice carries no gradient."""
    cosine = unit(v) @ unit(w).transpose(1, 2)                                         # [B, N, K]
    allowed = w_valid[:, None, :].expand_as(cosine) if own is None else own & w_valid[:, None, :]
    k = min(k_o, w.shape[1])
    top = cosine.masked_fill(~allowed, -2.0).sort(dim=-1, descending=True, stable=True)
    index, ok = top.indices[..., :k], top.values[..., :k] > -1.5
    return F.pad(index, (0, k_o - k)), F.pad(ok, (0, k_o - k))


@in_fp32
def cvta(v, w, k_o, tau, v_valid, w_valid, selected=None, word=None, near=None, own=None):
    """CVTA [1, equation of section 3.2]: v [B, N, d] patches, w [B, K, d] keywords of the bag -> scalar.

        L = - mean_a  1/|P(a)|  sum_{b in P(a)}  [ s_ab - log sum_{b'} exp s_ab' ],     s_ab = cos(v_a, w_b) / tau

    Each patch is drawn to its own few keywords and away from the rest of the bag's: what a 40x patch shows of a 5x
    caption's words, and the wrong words of a noisy captioner, are sorted out by similarity. The sum over positives stands
    outside the logarithm, so the optimum is log|P|, not 0; equal logits give log K. Nodes without a positive drop out.

    selected: (index, ok) of `select_keywords`; None selects by cosine, as the paper does.
    near: keywords whose cosine to a positive is above it say the same in other words: unless positives themselves, they leave
    the sum over b'. None keeps all.
    own [B, N, K]: keywords that the node's caption names and that it is bound to. Those that are not among its positives are
    true all the same, so they leave the sum over b' like the near ones. None keeps them.
    word [B, K]: ids of the keywords, equal where they are. The sum over b' then runs over those of all bags and processes, each
    counted once; None keeps it inside the bag, as the paper does."""
    index, ok = select_keywords(v, w, k_o, w_valid) if selected is None else selected  # [B, N, k_o]
    v, w = unit(v), unit(w)
    (B, K), at, table, listed = w_valid.shape, index, w, w_valid
    if word is not None:
        table, listed, ids = gather(w).flatten(0, 1)[None], gather(w_valid).view(1, -1), gather(word).flatten()    # [1, L, d], [1, L], [L]
        at = index + K * (rank_offset(B) + torch.arange(B, device=v.device))[:, None, None]
        order = ids.masked_fill(~listed[0], -1).sort().values
        copies = torch.searchsorted(order, ids, right=True) - torch.searchsorted(order, ids)           # [L] times a keyword is there:
        # each of its n equal columns counts 1/n, which is - log n in the logarithm
    s = v @ table.transpose(1, 2) / tau                                                # [B, N, L], L = K inside the bag
    with torch.no_grad():
        chosen = torch.zeros_like(s[..., :K]).scatter_add(2, index, ok.to(s.dtype))    # [B, N, K]
        positive = torch.zeros_like(s).scatter_add(2, at, ok.to(s.dtype)) > 0          # [B, N, L]
        # What is true of a node is no negative, nor are its copies in other bags and what says the same in other words.
        true = chosen if own is None else chosen + (own & w_valid[:, None]).to(s.dtype)   # [B, N, K]
        if word is None:
            alike = torch.eye(K, dtype=torch.bool, device=s.device)[None]              # [1, K, L]
        else:
            alike = word[:, :, None] == ids                                            # [B, K, L]
        if near is not None:
            alike = alike | (w @ table.transpose(1, 2) > near)
        dropped = ~listed[:, None, :] | (true @ alike.to(s.dtype) > 0) & ~positive     # [B, N, L]
    other = s if word is None else torch.where(positive, s, s - copies.clamp(min=1).log())
    picked = (s.gather(2, at) - other.masked_fill(dropped, -1e4).logsumexp(-1, keepdim=True)) * ok     # [B, N, k_o]
    rows = -picked.sum(-1) / ok.sum(-1).clamp(min=1)                                   # [B, N]
    return weighted_mean(rows, v_valid.to(rows.dtype) * ok.any(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Multi-Resolution Text-guided Visual representation Alignment [1, section 3.3]

PAIRS = ("edges", "ancestors", "levels", "random")


def level_sizes(N, b):
    """How many of the N nodes of a b-ary heap lie on each level, from 5x to the finest: (85, 4) -> [1, 4, 16, 64]."""
    sizes = []
    while sum(sizes) < N:
        sizes.append(b ** len(sizes))
    return sizes


def mrtva(h, g, valid, b=4, pairs="edges"):
    """MRTVA [1, 4]: h [B, N, d] predictions, g [B, N, d] projections *already detached*, valid [B, N] -> scalar in [-1, 1].

        L = mean over pairs (p, c) of  -1/2 [ cos(h_p, g_c) + cos(h_c, g_p) ]

    p and c are parent and child ("edges"), any ancestor and its descendant ("ancestors"), or two magnifications of a bag, each
    averaged to one vector ("levels"). "random" is the control: the parent's place is taken by any patch of its magnification in
    another bag. The mean is taken inside each pair of magnifications first: otherwise the 64 edges between 20x and 40x would
    be three quarters of the loss."""
    if pairs not in PAIRS:
        raise ValueError(f"pairs is one of {', '.join(PAIRS)}, not {pairs!r}")
    h, g, valid, sizes = unit(h), unit(g), valid.bool(), level_sizes(h.shape[1], b)
    B, first = len(h), [sum(sizes[:i]) for i in range(len(sizes))]
    if pairs == "levels":  # a chain of one node a level, in which all are ancestors of all below
        m = valid.to(h.dtype)[..., None]
        h, g = (unit(torch.stack([level.sum(1) for level in (x * m).split(sizes, 1)], 1)) for x in (h, g))         # [B, levels, d]
        valid = torch.stack([level.any(1) for level in valid.split(sizes, 1)], 1)
        b, sizes, first = 1, [1] * len(sizes), list(range(len(sizes)))
    agreement, count = [], []                                                          # one entry a pair of magnifications
    for fine in range(1, len(sizes)):
        c = torch.arange(first[fine], first[fine] + sizes[fine], device=h.device)      # all nodes of this level
        p = c
        for coarse in reversed(range(fine)) if pairs in ("ancestors", "levels") else (fine - 1,):
            p = (p - 1) // b                                                           # one level up
            h_p, g_p, valid_p = h[:, p], g[:, p], valid[:, p]                          # [B, nodes of the level, d]
            if pairs == "random":
                bag = (torch.arange(B, device=h.device) + torch.randint(1, max(B, 2), (1,), device=h.device)) % B
                node = first[coarse] + torch.randint(sizes[coarse], p.shape, device=h.device)
                h_p, g_p, valid_p = h[bag][:, node], g[bag][:, node], valid[bag][:, node]
            both = (valid_p & valid[:, c]).to(h.dtype)
            agreement.append((((h_p * g[:, c]).sum(-1) + (h[:, c] * g_p).sum(-1)) / 2 * both).sum())
            count.append(both.sum())
    total = all_mean(torch.stack(count))
    return -(torch.stack(agreement) / total.clamp(min=1e-6)).sum() / (total > 0).sum().clamp(min=1)    # 40x may be absent from every bag


# ----------------------------------------------------------------------------------------------------------------------
# Monitors: cheap numbers that show a failure long before an evaluation does, and what to do about each

@torch.no_grad()
@in_fp32
def monitors(g, valid, index, ok, own, w_valid):
    """g [B, N, d] projections, valid [B, N], (index, ok) [B, N, k_o] as selected, own [B, N, K], w_valid [B, K] -> dict of 0-d tensors.

    std        per-channel deviation of the normalised projector output times sqrt(d): about 1 is healthy, near 0 is
               SimSiam's collapse (MRTVA close to -1 says nothing by itself).
    rank       in how many directions that output varies: (sum of the eigenvalues of its covariance)^2 / sum of their squares.
    used       share of a bag's keywords that any of its nodes selects: near k_o / K means all nodes pick the same few.
    spread     entropy of a bag's selections, 0 if all nodes pick the same k_o keywords, 1 if its keywords are picked evenly.
    own        share of the selected keywords that the node's own caption names: agreement of CVTA with the captioner.
    chance     what `own` would be if nodes selected blindly."""
    g = unit(g)                                                                        # [B, N, d]
    m = valid.to(g.dtype).unsqueeze(-1)
    g = ((g - (g * m).sum((0, 1)) / m.sum().clamp(min=1)) * m).flatten(0, 1)           # [BN, d] centred
    cov = g.T @ g / m.sum().clamp(min=1)                                               # [d, d]
    std = cov.diagonal().clamp(min=0).sqrt().mean() * g.shape[-1] ** 0.5
    ok = ok & valid[..., None]
    times = torch.zeros_like(own, dtype=g.dtype).scatter_add(2, index, ok.to(g.dtype)) # [B, N, K]
    listed, there = w_valid.to(g.dtype), (times.sum((1, 2)) > 0).to(g.dtype)           # [B, K], [B]
    p = times.sum(1) / times.sum((1, 2)).clamp(min=1)[:, None]                         # [B, K]
    K, least = listed.sum(1).clamp(min=1).log(), math.log(index.shape[-1])             # [B]
    entropy = ((-(p * p.clamp(min=1e-9).log()).sum(1) - least) / (K - least).clamp(min=1e-6)).clamp(0, 1)
    there = there * (K > least)                                                        # with k_o keywords or fewer there is no choice
    picks = times.sum().clamp(min=1)
    blind = (own & w_valid[:, None]).to(g.dtype).sum(2) / listed.sum(1).clamp(min=1)[:, None]          # [B, N]
    return {"std": std, "rank": cov.trace() ** 2 / cov.square().sum().clamp(min=1e-12),
            "used": ((p > 0) * listed).sum() / listed.sum().clamp(min=1), "spread": (entropy * there).sum() / there.sum().clamp(min=1),
            "own": (times * own).sum() / picks, "chance": (blind * times.sum(2)).sum() / picks}


@torch.no_grad()
def blindness(z, swapped, valid):
    """The share of z's variation that survives when the images are shuffled: z [n, D] of image i with keywords i, swapped [n, D] of image
    i + 1 with keywords i, valid [n] -> 0-d tensor in [0, 1]. At 1 the text-guided representation is text alone: MRTVA then
    aligns words, which parent and child share anyway, and teaches the images nothing."""
    z, swapped = full(z), full(swapped)
    both = (valid & valid.roll(-1))[:, None].to(z.dtype)
    moved, apart = ((z - swapped).square() * both).sum(), ((z - z.roll(-1, 0)).square() * both).sum()
    return (1 - moved / apart.clamp(min=1e-9)).clamp(0, 1)


NEAR = 0.95        # cosine above which two keywords count as one and the same for CVTA
TAU = (0.01, 0.5)  # temperatures are clamped to this: below, a contrast stops listening to the data

WARNINGS = (  # name of the monitor, what is wrong with a dict of their means, what to do
    ("std", lambda m: m["std"] < 0.3, "the projections collapse (std {std:.2f}, healthy is about 1), so MRTVA agrees with itself: lower --mrtva or --lr, or raise --bags"),
    ("rank", lambda m: m["rank"] < 3, "the projections vary in {rank:.1f} directions only: raise --bags or lower --mrtva"),
    ("spread", lambda m: m["spread"] < 0.05, "all patches of a bag select the same few keywords (evenness {spread:.2f}): raise --warm, or try --cvta_negatives batch"),
    ("own", lambda m: m["own"] < 1.2 * m["chance"], "selected keywords agree with the patches' own captions no better than chance ({own:.2f}, chance {chance:.2f}): raise --warm, or try --cvta_select ema"),
    ("blind", lambda m: m["blind"] > 0.9, "{blind:.0%} of z survives a change of image: MRTVA aligns words, not tissue. Raise --itm and --mlm or lower --k_o"),
    ("tau", lambda m: not 1.01 * TAU[0] < m["tau"] < 0.99 * TAU[1], "ITC's temperature {tau:.3f} stands at its clamp: lower --lr, and look for captions that are all alike"),
    ("tau_cvta", lambda m: not 1.01 * TAU[0] < m["tau_cvta"] < 0.99 * TAU[1], "CVTA's temperature {tau_cvta:.3f} stands at its clamp: lower --lr or --cvta"),
    ("queue", lambda m: m["queue"] < 1 <= m["epoch"], "only {queue:.0%} of the queue is filled after an epoch, so it is larger than the data: lower --queue"),
)


def warnings(m):
    """{name: sentence} for each known failure that a dict of mean monitors (floats; `epoch`: passes over the data so far) shows."""
    return {name: say.format(**m) for name, wrong, say in WARNINGS if name in m and wrong(m)}
