"""Objectives: six losses, each one equation, each a pure function of tensors; and the monitors that tell when one has failed.

    L = ITC + ITM + MLM + PLM   (L_bl, the baseline of [2, 3])   +   CVTA   +   MRTVA              (MR-PLIP [1], section 3)

Shape letters: B bags, N nodes per bag, M = rows of a pair loss (any patches with their captions), K keywords of a bag,
k_o keywords selected per node, T text tokens, d the shared space, V vocabulary, W processes.

A node that is blank glass, or whose magnification the slide does not have, is not valid; every loss takes that mask (or
non-negative weights: train.py gives each magnification the same total weight). Where nothing is valid a loss is 0, never
NaN. Everything is computed in fp32. Stop-gradients are at the call, where the reader sees them.

References
[1] MR-PLIP, CVPR 2025.   [2] Li et al. 2021, ALBEF (ITC, ITM with hard negatives, MLM).   [3] Li et al. 2022, mPLUG (prefix LM).
[4] Chen & He 2021, SimSiam.   [5] Radford et al. 2021, CLIP.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------------------
# Many processes. DDP averages gradients, so the rule for every loss here is: the *mean over processes* of what each
# returns is the loss of the whole batch, and gathered tensors carry gradients home.

def world_size():
    """Number of processes W; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_offset(n):
    """Where this process's n rows start among those of all processes."""
    return dist.get_rank() * n if world_size() > 1 else 0


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
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[dist.get_rank()]


def gather(x):
    """Concatenate x [M, ...] of every process in rank order -> [W M, ...], with gradients (all ranks must have equal M)."""
    return x if world_size() == 1 else AllGather.apply(x)


def weighted_mean(x, weight):
    """sum(x * weight) / sum(weight), the denominator taken over all processes; 0 where all weights are 0."""
    weight = weight.float()
    total = weight.sum()
    if world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
        total = total / world_size()  # so that the mean over processes of the result is the mean over all rows
    return (x.float() * weight).sum() / total.clamp(min=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The baseline losses

def itc(v, t, bag, tau, valid, kin=0.1):
    """Image-text contrast [2, 5]: v, t [M, d] L2-normalised, bag [M] bag ids, valid [M] mask or weights -> scalar.

        L = 1/2 sum_i  H(q_i, softmax_j v_i t_j / tau) + H(q_i, softmax_j t_i v_j / tau)

    q_i gives 1 - kin to the own caption and spreads `kin` over the patches of the same bag: they show the same tissue, so
    calling them wrong outright would be false. Columns come from all processes. Chance level: ln(number of valid rows)."""
    M = len(v)
    all_v, all_t, all_bag, all_valid = gather(v.float()), gather(t.float()), gather(bag), gather(valid.float())
    own = torch.arange(M, device=v.device) + rank_offset(M)
    same = ((bag[:, None] == all_bag[None, :]) & (all_valid > 0)).float()              # [M, W M] kin, oneself included
    q = kin * same / same.sum(1, keepdim=True).clamp(min=1)
    q = q.scatter_add(1, own[:, None], torch.full((M, 1), 1 - kin, device=v.device))   # [M, W M]
    drop = all_valid == 0                                                              # invalid patches are no negatives
    rows = 0
    for a, b in ((v, all_t), (t, all_v)):
        logits = (a.float() @ b.T / tau).masked_fill(drop, -1e4)                       # [M, W M]
        rows = rows - (q * F.log_softmax(logits, 1)).sum(1) / 2
    return weighted_mean(rows, valid)


@torch.no_grad()
def hard_negatives(v, t, bag, tau, valid, generator=None):
    """For ITM [2]: v, t [M, d] -> (image [M], text [M], ok [M]): for caption i a wrong image, for image i a wrong caption,
    drawn with the probability softmax gives them, never from the same bag: kin would be false negatives. ok is False
    where no other bag offers one (a single bag): those rows must not count."""
    other = (bag[:, None] != bag[None, :]) & valid.bool()[None, :]                     # [M, M]
    ok = other.any(1) & valid.bool()
    sim = v.float() @ t.float().T / tau                                                # [M, M]
    draw = []
    for logits in (sim.T, sim):                                                        # text -> image, image -> text
        p = logits.masked_fill(~other, -1e4).softmax(1) * other + 1e-4 * other         # hard, but never degenerate
        p = p + (~other.any(1, keepdim=True)).float()                                  # multinomial refuses rows of zeros
        draw.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
    return draw[0], draw[1], ok


def itm(positive, negative_image, negative_text, valid):
    """Image-text matching [2]: logits [M, 2] of the true pair, of caption + wrong image, of image + wrong caption
    (column 1 = "they match"), valid [M] -> scalar. Chance level of always guessing "no": ln 3 - 2/3 ln 2 = 0.637."""
    M = len(positive)
    logits = torch.cat([positive, negative_image, negative_text]).float()              # [3M, 2]
    labels = torch.cat([torch.ones(M), torch.zeros(2 * M)]).long().to(logits.device)
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), valid.repeat(3))


def corrupt(ids, real, mask_id, special, vocab, rate=0.15, generator=None):
    """MLM's masking [2]: ids [M, T], real [M, T] (not padding) -> (corrupted ids, labels with -100 where nothing is asked).
    `rate` of the real tokens are chosen, special ids (a tuple) never; of those 80% become mask_id, 10% a random id, 10%
    stay."""
    u = torch.empty(3, *ids.shape, device=ids.device).uniform_(generator=generator)    # [3, M, T]
    random_ids = (u[2] * min(special)).long().clamp(max=min(special) - 1)              # the product may round up
    ordinary = real.clone()
    for s in special:
        ordinary = ordinary & (ids != s)
    chosen = ordinary & (u[0] < rate)
    labels = torch.where(chosen, ids, -100)
    ids = torch.where(chosen & (u[1] < 0.8), mask_id, ids)
    return torch.where(chosen & (u[1] >= 0.9), random_ids.clamp(max=vocab - 1), ids), labels


def mlm(logits, labels):
    """Masked language modelling [2]: logits [M, T, V], labels [M, T] (-100: not asked) -> mean cross-entropy over the asked
    tokens. Chance level: ln V."""
    rows = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")  # [M T]
    return weighted_mean(rows, labels.flatten() != -100)


def split_prefix(real, generator=None):
    """Where each caption's prefix ends: real [M, T] (start and end ids included) -> prefix [M] >= 1, uniform, so that the
    start id is always known and at least the end id is always left to predict."""
    n = real.sum(1) - 1                                                                # positions that predict something
    u = torch.rand(len(real), device=real.device, generator=generator)
    return 1 + (u * n).long().clamp(max=(n - 1).clamp(min=0))


def plm(logits, ids, prefix, real, valid):
    """Prefix language modelling [3]: logits [M, T, V] from the prefix mask, ids [M, T] -> mean cross-entropy of the tokens
    after the prefix, each predicted from the image, the prefix and what came before it. Chance level: ln V."""
    T = ids.shape[1]
    at = torch.arange(1, T, device=ids.device)
    asked = (at[None, :] >= prefix[:, None]) & real[:, 1:] & valid.bool()[:, None]     # [M, T - 1]
    rows = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return weighted_mean(rows, asked.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Cross-resolution Visual-Textual Alignment [1, section 3.2]

@torch.no_grad()
def select_keywords(v, w, k_o, w_valid, own=None):
    """The positives P(a) of each node: v [B, N, d], w [B, K, d], w_valid [B, K] -> (index [B, N, k_o], ok [B, N, k_o]).

    The k_o keywords of the bag with the highest cosine to the node (ties: the earlier one). With own [B, N, K] only the
    keywords of the node's own caption are candidates: the warm-up. ok is False where there are fewer than k_o."""
    cosine = F.normalize(v.float(), dim=-1) @ F.normalize(w.float(), dim=-1).transpose(1, 2)     # [B, N, K]
    allowed = w_valid[:, None, :].expand_as(cosine) if own is None else own & w_valid[:, None, :]
    k = min(k_o, w.shape[1])
    top = cosine.masked_fill(~allowed, -2.0).sort(dim=-1, descending=True, stable=True)
    index, ok = top.indices[..., :k], top.values[..., :k] > -1.5
    return F.pad(index, (0, k_o - k)), F.pad(ok, (0, k_o - k))


def cvta(v, w, k_o, tau, v_valid, w_valid, selected=None):
    """CVTA [1, equation of section 3.2]: v [B, N, d] patches, w [B, K, d] keywords of the bag -> scalar.

        L = - mean_a  1/|P(a)|  sum_{b in P(a)}  [ s_ab - log sum_{b'} exp s_ab' ],     s_ab = cos(v_a, w_b) / tau

    Each patch is drawn to its own few keywords and away from the rest of the bag's: what a 40x patch shows of a 5x
    caption's words, and the wrong words of a noisy captioner, are sorted out by similarity. The sum over positives stands
    outside the logarithm, so the optimum is log|P|, not 0; equal logits give log K. Negatives never leave the bag.
    selected: (index, ok) of `select_keywords`; None selects by cosine, as the paper does. Nodes without a positive drop out."""
    index, ok = select_keywords(v, w, k_o, w_valid) if selected is None else selected
    s = F.normalize(v.float(), dim=-1) @ F.normalize(w.float(), dim=-1).transpose(1, 2) / tau     # [B, N, K]
    log_p = s.masked_fill(~w_valid[:, None, :], -1e4).log_softmax(-1)                             # [B, N, K]
    picked = log_p.gather(-1, index.clamp(max=w.shape[1] - 1)) * ok                               # [B, N, k_o]
    rows = -picked.sum(-1) / ok.sum(-1).clamp(min=1)                                              # [B, N]
    return weighted_mean(rows, v_valid.float() * ok.any(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Multi-Resolution Text-guided Visual representation Alignment [1, section 3.3]

def level_sizes(N, b):
    """How many of the N nodes of a b-ary heap lie on each level, from 5x to the finest: (85, 4) -> [1, 4, 16, 64]."""
    sizes = []
    while sum(sizes) < N:
        sizes.append(b ** len(sizes))
    return sizes


def mrtva(h, g, valid, b=4, pairs="edges"):
    """MRTVA [1, 4]: h [B, N, d] predictions, g [B, N, d] projections *already detached*, valid [B, N] -> scalar in [-1, 1].

        L = mean over pairs (p, c) of  -1/2 [ cos(h_p, g_c) + cos(h_c, g_p) ]

    p and c are parent and child ("edges"), or any ancestor and its descendant ("ancestors"). The mean is taken inside each
    pair of magnifications first: otherwise the 64 edges between 20x and 40x would be three quarters of the loss."""
    if pairs not in ("edges", "ancestors"):
        raise ValueError(f'pairs must be "edges" or "ancestors", not {pairs!r}')
    h, g, valid = F.normalize(h.float(), dim=-1), F.normalize(g.float(), dim=-1), valid.bool()
    sizes = level_sizes(h.shape[1], b)
    loss, groups = h.new_zeros(()), h.new_zeros(())
    for fine in range(1, len(sizes)):
        c = torch.arange(sum(sizes[:fine]), sum(sizes[: fine + 1]), device=h.device)    # all nodes of this level
        p = c
        for _ in range(1 if pairs == "edges" else fine):
            p = (p - 1) // b                                                            # one level up
            agreement = ((h[:, p] * g[:, c]).sum(-1) + (h[:, c] * g[:, p]).sum(-1)) / 2 # [B, nodes of the level]
            both = (valid[:, p] & valid[:, c]).float()
            loss = loss - weighted_mean(agreement, both)
            groups = groups + (gather(both.sum().view(1)).sum() > 0)                    # 40x may be absent from every bag
    return loss / groups.clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# Monitors: cheap numbers that show a failure long before an evaluation does

@torch.no_grad()
def monitors(g, valid, index, ok, own, w_valid):
    """dict of 0-d tensors.

    std        per-channel deviation of the normalised projector output times sqrt(d): about 1 is healthy, near 0 is
               SimSiam's collapse (MRTVA close to -1 says nothing by itself).
    used       share of a bag's keywords that any of its nodes selects: near k_o / K means all nodes pick the same few.
    own        share of the selected keywords that the node's own caption names: agreement of CVTA with the captioner."""
    g = F.normalize(g.float(), dim=-1)                                                 # [B, N, d]
    m = valid.float().unsqueeze(-1)
    mean = (g * m).sum((0, 1)) / m.sum().clamp(min=1)
    std = (((g - mean) ** 2 * m).sum((0, 1)) / m.sum().clamp(min=1)).sqrt().mean() * g.shape[-1] ** 0.5
    ok = ok & valid[..., None]
    chosen = torch.zeros_like(own, dtype=torch.float).scatter_add(2, index, ok.float()) > 0       # [B, N, K]
    used = (chosen.any(1) & w_valid).sum() / w_valid.sum().clamp(min=1)
    return {"std": std, "used": used, "own": (chosen & own).sum() / chosen.sum().clamp(min=1)}
