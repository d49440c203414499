"""Compute every loss by hand, against its formula in NumPy with loops, and by finite differences.

    pytest tests/test_losses.py

How the losses hang on the networks is in test_objective.py.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses


def random_unit(*shape, seed=0):
    """Draw vectors of length 1, float64."""
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1)


def draws(*shape, seed=0):
    """Draw uniform numbers."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def cos(x, y):
    """Compute the cosine of two NumPy vectors."""
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


# --------------------------------------------------------------------------------------------------
# CVTA


def bag_columns(w, w_valid, b):
    """List the candidates of bag b: (keyword, vector, count) for each that is no padding."""
    return [(k, w[b, k], 1.0) for k in range(w.shape[1]) if w_valid[b, k]]


def batch_columns(w, w_valid, word):
    """List the keywords of all bags; one that n bags have stands there n times and counts 1/n."""
    numbers = [word[i, k] for i, k in np.argwhere(w_valid)]
    columns = []
    for i, k in np.argwhere(w_valid):
        columns.append((word[i, k], w[i, k], 1 / numbers.count(word[i, k])))
    return columns


def cvta_numpy(v, w, k_o, tau, v_valid, w_valid, own=None, spared=None, near=None, word=None):
    """Sum the equation of section 3.2 with loops; arguments [B, ...] as in losses.cvta.

    own [B, N, K]: keywords a node may select. word [B, K]: numbers of the keywords, equal where
    they are; the contrast then runs over those of all bags, duplicates included.
    """
    if word is None:
        word = np.tile(np.arange(w.shape[1]), (len(w), 1))
        columns = [bag_columns(w, w_valid, b) for b in range(len(w))]
    else:
        columns = [batch_columns(w, w_valid, word)] * len(w)
    total, weight = 0.0, 0.0
    for b, a in np.argwhere(v_valid > 0):
        allowed = [k for k in range(w.shape[1]) if w_valid[b, k] and (own is None or own[b, a, k])]
        positives = sorted(allowed, key=lambda k: (-cos(v[b, a], w[b, k]), k))[:k_o]
        if not positives:
            continue
        best = {word[b, k] for k in positives}
        known = set() if spared is None else {word[b, k] for k in np.flatnonzero(spared[b, a])}
        norm = sum(np.exp(cos(v[b, a], w[b, k]) / tau) for k in positives)
        for number, vector, count in columns[b]:
            alike = near is not None and max(cos(vector, w[b, p]) for p in positives) > near
            if number not in best | known and not alike:
                norm += count * np.exp(cos(v[b, a], vector) / tau)
        terms = [cos(v[b, a], w[b, k]) / tau - np.log(norm) for k in positives]
        total -= v_valid[b, a] * np.mean(terms)
        weight += v_valid[b, a]
    return total / weight if weight else 0.0


def toy_bags(seed):
    """Draw three bags of 15 patches and 7 keywords, two of them in two bags; one bag has none."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(3, 15, 6, generator=g, dtype=torch.float64)
    w = torch.randn(3, 7, 6, generator=g, dtype=torch.float64)
    v_valid = torch.rand(3, 15, generator=g, dtype=torch.float64)
    v_valid = v_valid * (v_valid > 0.3)  # weights
    w_valid = torch.rand(3, 7, generator=g) < 0.7
    own = torch.rand(3, 15, 7, generator=g) < 0.4
    word = torch.arange(21).view(3, 7)
    w[2, 1:3], word[2, 1:3] = w[0, 4:6], word[0, 4:6]
    w_valid[0, 4:6] = w_valid[2, 1:3] = True
    w[0, 0] = w[0, 4] + 0.1 * w[0, 1]  # says the same in other words
    w_valid[1] = False
    return v, w, v_valid, w_valid, own, word


@pytest.mark.parametrize("near", [None, 0.5])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("k_o", [1, 3, 9])
def test_cvta_equals_numpy(k_o, bound, near):
    v, w, v_valid, w_valid, own, _ = toy_bags(k_o)
    allowed = own if bound else None
    # Half of the nodes are bound to their captions.
    spared = own & (torch.arange(15) % 2 == 0)[:, None] if bound else None
    selected = losses.select_keywords(v, w, k_o, w_valid, allowed)
    got = losses.cvta(v, w, k_o, 0.07, v_valid, w_valid, selected, spared, near)
    arrays = [None if x is None else x.numpy() for x in (allowed, spared)]
    args = [x.numpy() for x in (v_valid, w_valid)]
    expected = cvta_numpy(v.numpy(), w.numpy(), k_o, 0.07, *args, *arrays, near)
    assert got.item() == pytest.approx(expected, abs=1e-9)
    # And in the precision that training has.
    single = losses.cvta(
        v.float(), w.float(), k_o, 0.07, v_valid.float(), w_valid, selected, spared, near
    )
    assert single.item() == pytest.approx(got.item(), rel=1e-5)


def table_of(w, w_valid, word):
    """Turn the keywords of all bags into a table of the distinct ones.

    Returns (table [1, U, d], listed [1, U], column [B, K] number of each keyword in the table).
    """
    distinct, column = word.unique(return_inverse=True)
    table = torch.zeros(1, len(distinct), w.shape[-1], dtype=w.dtype)
    listed = torch.zeros(1, len(distinct), dtype=torch.bool)
    table[0, column.flatten()] = w.flatten(0, 1)
    listed[0, column[w_valid]] = True
    return table, listed, column


@pytest.mark.parametrize("near", [None, 0.5])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("k_o", [1, 3, 9])
def test_cvta_against_the_keywords_of_the_batch_equals_numpy_with_duplicates(k_o, bound, near):
    v, w, v_valid, w_valid, own, word = toy_bags(k_o)
    table, listed, column = table_of(w, w_valid, word)
    allowed = own if bound else None
    index, chosen = losses.select_keywords(v, w, k_o, w_valid, allowed)
    number = column[:, None, :].expand_as(own)  # [B, N, K]
    selected = number.gather(2, index), chosen
    spared, theirs = None, None
    if bound:
        theirs = own & w_valid[:, None] & (torch.arange(15) % 2 == 0)[:, None]
        spared = torch.zeros(3, 15, table.shape[1], dtype=torch.int)
        spared = spared.scatter_add(2, number, theirs.int()) > 0
    got = losses.cvta(v, table, k_o, 0.07, v_valid, listed, selected, spared, near)
    arrays = [None if x is None else x.numpy() for x in (allowed, theirs)]
    args = [x.numpy() for x in (v, w)], [x.numpy() for x in (v_valid, w_valid)]
    expected = cvta_numpy(*args[0], k_o, 0.07, *args[1], *arrays, near, word.numpy())
    assert got.item() == pytest.approx(expected, abs=1e-9)


def test_near_duplicates_are_no_negatives_but_may_be_positives():
    w = torch.tensor([[[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 0, 1]]])
    v, valid = torch.tensor([[[1.0, 0, 0]]]), torch.ones(1, 4, dtype=torch.bool)
    s = (v @ F.normalize(w, dim=-1).transpose(1, 2) / 0.5)[0, 0]
    cases = (
        (1, None, s.logsumexp(0) - s[0]),
        (1, 0.95, s[[0, 2, 3]].logsumexp(0) - s[0]),
        (2, 0.95, s.logsumexp(0) - s[:2].mean()),
    )
    for k_o, near, expected in cases:
        got = losses.cvta(v, w, k_o, 0.5, torch.ones(1, 1), valid, near=near)
        assert got.item() == pytest.approx(expected.item(), abs=1e-6)


def test_keywords_of_the_own_caption_are_no_negatives_while_a_node_is_bound_to_it():
    v, w = torch.tensor([[[0.8, 0.6, 0.0]]]), torch.eye(3)[None]
    own, valid = torch.tensor([[[True, True, False]]]), torch.ones(1, 3, dtype=torch.bool)
    # The caption names keywords 0 and 1. Only 0 is chosen, and 1 is true all the same.
    selected = losses.select_keywords(v, w, 1, valid, own)
    s = torch.tensor([0.8, 0.6, 0.0]) / 0.5
    got = losses.cvta(v, w, 1, 0.5, torch.ones(1, 1), valid, selected, own)
    assert got.item() == pytest.approx((s[[0, 2]].logsumexp(0) - s[0]).item(), abs=1e-6)
    free = losses.cvta(v, w, 1, 0.5, torch.ones(1, 1), valid, selected)
    assert free.item() == pytest.approx((s.logsumexp(0) - s[0]).item(), abs=1e-6)
    # A spared keyword that is a positive stays one.
    every = losses.cvta(v, w, 3, 0.5, torch.ones(1, 1), valid, spared=own | True)
    assert every.item() == pytest.approx((s.logsumexp(0) - s.mean()).item(), abs=1e-6)


def test_spared_keywords_get_no_gradient():
    v, w = torch.randn(2, 5, 6), torch.randn(2, 7, 6, requires_grad=True)
    valid, spared = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 5, 7, dtype=torch.bool)
    spared[..., 6] = True
    # Keyword 6 points away from all patches, so none selects it.
    w.data[:, 6] = -10 * v.sum(1)
    selected = losses.select_keywords(v, w, 3, valid, ~spared)
    losses.cvta(v, w, 3, 0.07, torch.ones(2, 5), valid, selected, spared).backward()
    norms = w.grad.norm(dim=-1)
    assert (norms[:, 6] < 1e-8).all() and (norms[:, :6] > 1e-6).all()


def test_cvta_is_log_k_at_equal_logits_and_never_below_log_k_o():
    v = random_unit(1, 1, 8).expand(2, 5, 8).float()
    w = random_unit(1, 1, 8, seed=1).expand(2, 12, 8).float()
    valid = torch.ones(2, 12, dtype=torch.bool)
    chance = losses.cvta(v, w, 4, 0.07, torch.ones(2, 5), valid)
    assert chance.item() == pytest.approx(math.log(12), abs=1e-5)
    # Four perfect keywords, eight opposite ones.
    w = torch.zeros(1, 12, 8)
    w[0, :4, 0], w[0, 4:, 1] = 1, -1
    v = torch.tensor([[[1.0, 1, 0, 0, 0, 0, 0, 0]]])
    best = losses.cvta(v, w, 4, 0.01, torch.ones(1, 1), valid[:1])
    assert best.item() == pytest.approx(math.log(4), abs=1e-5)


def test_cvta_gradient_is_softmax_minus_positives():
    """d L / d s = softmax - 1[P] / k_o; w are unit axes, so that s is v / (|v| tau)."""
    v = torch.tensor([[[0.6, 0.8, 0.0]]], requires_grad=True)
    valid = torch.ones(1, 3, dtype=torch.bool)
    losses.cvta(v, torch.eye(3)[None], 1, 1.0, torch.ones(1, 1), valid).backward()
    s = torch.tensor([0.6, 0.8, 0.0])
    ds = s.softmax(0) - torch.tensor([0.0, 1.0, 0.0])
    # Go back through the normalisation of v.
    assert torch.allclose(v.grad[0, 0], ds - (ds @ s) * s, atol=1e-6)


def test_padding_keywords_changes_nothing_and_no_keywords_is_zero():
    v, w = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    valid, args = torch.ones(2, 5, dtype=torch.bool), (3, 0.07, torch.ones(2, 4))
    more = torch.cat([w, 100 * torch.randn(2, 3, 6)], 1)
    got = losses.cvta(v, more, *args, F.pad(valid, (0, 3)))
    assert torch.allclose(got, losses.cvta(v, w, *args, valid), atol=1e-6)
    assert losses.cvta(v, w, *args, ~valid).item() == 0
    assert losses.cvta(v, w, 3, 0.07, torch.zeros(2, 4), valid).item() == 0


def test_selection_takes_the_best_of_those_allowed():
    v, valid = torch.randn(1, 2, 4), torch.ones(1, 6, dtype=torch.bool)
    w = torch.randn(1, 6, 4, requires_grad=True)
    own = torch.zeros(1, 2, 6, dtype=torch.bool)
    own[0, 0, [1, 4]] = True
    index, chosen = losses.select_keywords(v, w, 3, valid, own)
    assert set(index[0, 0][chosen[0, 0]].tolist()) == {1, 4} and not chosen[0, 1].any()
    # Without that limit: the highest cosines, whatever the lengths; and no gradient.
    index, chosen = losses.select_keywords(v, 5 * w, 3, valid)
    expected = F.cosine_similarity(v[0, :, None], w, dim=-1).topk(3).indices
    assert torch.equal(index[0], expected) and chosen.all()
    # Fewer keywords than k_o leave empty places; of equal cosines the earlier wins.
    index, chosen = losses.select_keywords(v, w[:, :1].expand(1, 2, 4), 4, valid[:, :2])
    assert index[0, 0, :2].tolist() == [0, 1] and chosen[0].sum(1).tolist() == [2, 2]
    assert index.shape == chosen.shape == (1, 2, 4)


# --------------------------------------------------------------------------------------------------
# MRTVA


def ancestors(b, N):
    """Name the pairs of any ancestor and its descendant, grouped by both magnifications."""

    def depth(n):
        return 0 if n == 0 else 1 + depth((n - 1) // b)

    groups = {}
    for child in range(1, N):
        parent = child
        while parent:
            parent = (parent - 1) // b
            groups.setdefault((depth(parent), depth(child)), []).append((parent, child))
    return groups


def mrtva_numpy(h, g, valid, groups):
    """Average the agreement of valid pairs inside each group, then over groups that have any."""
    means = []
    for pairs in groups:
        terms = []
        for i in range(len(h)):
            for p, c in pairs:
                if valid[i, p] and valid[i, c]:
                    terms.append(-(cos(h[i, p], g[i, c]) + cos(h[i, c], g[i, p])) / 2)
        if terms:
            means.append(np.mean(terms))
    return np.mean(means)


@pytest.mark.parametrize("b,N", [(1, 4), (2, 15), (4, 85)])
def test_mrtva_equals_loops_over_the_tree(b, N):
    h, g = random_unit(2, N, 5) * 3, random_unit(2, N, 5, seed=1) * 2
    valid = draws(2, N) < 0.8
    valid[0, 0] = True
    groups = ancestors(b, N)
    edges = [pairs for (coarse, fine), pairs in groups.items() if fine == coarse + 1]
    arrays = h.numpy(), g.numpy(), valid.numpy()
    # The edges of the tree, as the paper has it.
    tensors = losses.tree_edges(N, b)
    assert [set(map(tuple, x.tolist())) for x in tensors] == [set(x) for x in edges]
    expected = mrtva_numpy(*arrays, edges)
    assert losses.mrtva(h, g, valid, tensors).item() == pytest.approx(expected, abs=1e-9)
    if b == 4:
        assert losses.mrtva(h, g, valid).item() == pytest.approx(expected, abs=1e-9)
    # Any other pairs are a list of tensors too.
    every = [torch.tensor(pairs) for pairs in groups.values()]
    expected = mrtva_numpy(*arrays, groups.values())
    assert losses.mrtva(h, g, valid, every).item() == pytest.approx(expected, abs=1e-9)


def test_the_tree_has_4_16_and_64_edges():
    edges = losses.tree_edges()
    assert [len(x) for x in edges] == [4, 16, 64]
    assert edges[1][:5].tolist() == [[1, 5], [1, 6], [1, 7], [1, 8], [2, 9]]


def test_parent_and_child_may_change_places():
    h, g, valid = torch.randn(3, 4, 5), torch.randn(3, 4, 5), draws(3, 4) < 0.8
    # A chain read from its other end has the same edges.
    turned = [x.flip(1) for x in (h, g, valid)]
    edges = losses.tree_edges(4, 1)
    got = losses.mrtva(*turned, edges).item()
    assert got == pytest.approx(losses.mrtva(h, g, valid, edges).item(), abs=1e-6)


def test_mrtva_is_minus_one_when_all_agree_and_ignores_a_missing_magnification():
    h = torch.randn(1, 1, 8).expand(2, 85, 8)
    valid = torch.ones(2, 85, dtype=torch.bool)
    assert losses.mrtva(h, h, valid).item() == pytest.approx(-1, abs=1e-6)
    valid[:, 21:] = False  # 20x slides: 21 nodes
    assert losses.mrtva(h, h, valid).item() == pytest.approx(-1, abs=1e-6)
    assert losses.mrtva(h, h, torch.zeros_like(valid)).item() == 0
    # Independent vectors neither agree nor disagree.
    apart = losses.mrtva(torch.randn(8, 85, 512), torch.randn(8, 85, 512), valid[:1].expand(8, -1))
    assert abs(apart.item()) < 0.02


def test_no_gradient_reaches_the_target():
    h = torch.randn(2, 85, 8, requires_grad=True)
    g = torch.randn(2, 85, 8, requires_grad=True)
    valid = torch.ones(2, 85, dtype=torch.bool)
    losses.mrtva(h, g.detach(), valid).backward()
    assert h.grad.abs().sum() > 0 and g.grad is None
    # The stopped gradient is half of what both sides would give.
    (stopped,) = torch.autograd.grad(losses.mrtva(h, h.detach(), valid), h)
    (through,) = torch.autograd.grad(losses.mrtva(h, h, valid), h)
    assert torch.allclose(2 * stopped, through, atol=1e-7) and stopped.abs().sum() > 0


def test_batch_norm_equals_torch_on_the_valid_rows():
    x, valid = torch.randn(20, 6), draws(20) < 0.7
    ours, theirs = losses.MaskedBatchNorm(6), nn.BatchNorm1d(6)
    ours.weight.data = theirs.weight.data = torch.rand(6)
    ours.bias.data = theirs.bias.data = torch.rand(6)
    assert torch.allclose(ours(x, valid)[valid], theirs(x[valid]), atol=1e-5)
    wild = torch.where(valid[:, None], x, 1e3)
    assert torch.allclose(ours(wild, valid)[valid], ours(x, valid)[valid], atol=1e-5)
    assert ours(x, valid & False).isfinite().all()
    # A large mean does not cancel the variance.
    assert torch.allclose(ours(x + 1e3, valid)[valid], ours(x, valid)[valid], atol=1e-2)


def test_heads_are_simsiams():
    torch.manual_seed(0)
    heads, valid = losses.Heads(12, 16, 8), draws(40) < 0.8
    h, g = heads(torch.randn(40, 12), valid)
    assert h.shape == g.shape == (40, 8)
    assert [tuple(x.weight.shape) for x in heads.project] == [(16, 12), (16, 16), (8, 16)]
    assert heads.squeeze.weight.shape == (2, 8) and heads.predict.weight.shape == (8, 2)
    # The projection ends in a batch norm without gain.
    assert torch.allclose(g[valid].mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(g[valid].var(0, correction=0), torch.ones(8), atol=1e-3)


# --------------------------------------------------------------------------------------------------
# ITC, ITM, MLM, PLM


def test_itc_without_kin_is_clip():
    v, t = random_unit(6, 8).float(), random_unit(6, 8, seed=1).float()
    logits, own = v @ t.T / 0.1, torch.arange(6)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    # Each patch is alone in its bag, so kin's mass is its own.
    for kin in (0, 0.1):
        got = losses.itc(v, t, own, 0.1, torch.ones(6), kin)
        assert got.item() == pytest.approx(clip.item(), abs=1e-6)


def itc_numpy(v, t, bag, tau, weight, kin):
    """Compute the soft cross-entropy row by row."""
    total = 0.0
    columns = [j for j in range(len(v)) if weight[j] > 0]
    for query, candidates in ((v, t), (t, v)):
        for i in columns:
            p = np.exp([query[i] @ candidates[j] / tau for j in columns])
            same = np.array([bag[j] == bag[i] for j in columns], float)
            own = np.array([j == i for j in columns], float)
            target = (1 - kin) * own + kin * same / same.sum()
            total -= weight[i] / 2 * (target * np.log(p / p.sum())).sum()
    return total / weight.sum()


@pytest.mark.parametrize("kin", [0.0, 0.1, 1.0])
def test_itc_equals_numpy(kin):
    v, t = random_unit(9, 6), random_unit(9, 6, seed=1)
    bag = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
    weight = torch.tensor([1, 0.5, 1, 0, 2, 1, 1, 0, 1], dtype=torch.float64)
    got = losses.itc(v, t, bag, 0.2, weight, kin)
    arrays = [x.numpy() for x in (v, t, bag)]
    expected = itc_numpy(*arrays, 0.2, weight.numpy(), kin)
    assert got.item() == pytest.approx(expected, abs=1e-9)


def test_itc_equals_albefs_retrieval_variant():
    """There every pair of the same id is a positive, all alike: kin 1."""
    v, t = random_unit(6, 8), random_unit(6, 8, seed=1)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    same = (ids[:, None] == ids[None]).double()
    target = same / same.sum(1, keepdim=True)
    expected = 0
    for logits in (v @ t.T / 0.07, t @ v.T / 0.07):
        expected = expected - (logits.log_softmax(1) * target).sum(1).mean() / 2
    got = losses.itc(v, t, ids, 0.07, torch.ones(6), kin=1)
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)


def test_itc_by_hand_with_kin_and_a_masked_row():
    v = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0]])
    bag, valid = torch.tensor([0, 0, 1]), torch.tensor([True, True, False])
    # Two valid columns at tau 1: own pair 1, the other 0. The third is no negative.
    p = math.exp(1) / (math.exp(1) + 1)
    expected = -(0.9 + 0.05) * math.log(p) - 0.05 * math.log(1 - p)
    got = losses.itc(v, v, bag, torch.tensor(1.0), valid, kin=0.1)
    assert got.item() == pytest.approx(expected, abs=1e-6)
    assert losses.itc(v, v, bag, 1.0, valid & False).item() == 0


def test_itc_chance_level():
    v = torch.ones(10, 4) / 2
    got = losses.itc(v, v, torch.arange(10), 0.07, torch.ones(10))
    assert got.item() == pytest.approx(math.log(10), abs=1e-5)


def test_hard_negatives_are_never_kin_and_prefer_the_similar():
    bag, rows = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    v = random_unit(6, 4).float()
    # The caption most similar to image i stands two rows further, in another bag.
    t = v.roll(2, 0)
    captions, images = torch.zeros(6, 6), torch.zeros(6, 6)
    for seed in range(200):
        rand = draws(6, 2, seed=seed)
        image, caption, ok = losses.hard_negatives(v, t, bag, 0.05, torch.ones(6), rand)
        assert ok.all() and (bag[image] != bag).all() and (bag[caption] != bag).all()
        captions[rows, caption] += 1
        images[rows, image] += 1
    assert torch.equal(captions.argmax(1), (rows + 2) % 6)
    assert torch.equal(images.argmax(1), (rows - 2) % 6)
    # An invalid patch is never drawn and has no negative of its own.
    valid = torch.tensor([True, False, True, True, True, True])
    for seed in range(50):
        image, caption, ok = losses.hard_negatives(v, t, bag, 0.05, valid, draws(6, 2, seed=seed))
        assert not (image == 1).any() and not (caption == 1).any()
        assert torch.equal(ok, valid)
    # One bag alone has nothing to draw.
    one = torch.zeros(6)
    assert not losses.hard_negatives(v, t, one, 0.05, torch.ones(6), draws(6, 2))[2].any()


def test_hard_negatives_have_albefs_odds():
    n, tau = 6, 0.07
    v, t = random_unit(n, 8).float(), random_unit(n, 8, seed=1).float()
    odds = F.softmax(v @ t.T / tau, 1).fill_diagonal_(0)
    odds = odds / odds.sum(1, keepdim=True)
    drawn, rows = torch.zeros(n, n), torch.arange(n)
    for seed in range(2000):
        rand = draws(n, 2, seed=seed)
        drawn[rows, losses.hard_negatives(v, t, rows, tau, torch.ones(n), rand)[1]] += 1
    assert (drawn / 2000 - odds).abs().max() < 4 * 0.5 / 2000**0.5


def test_itm_by_hand():
    match, differ = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    right, valid = math.log(1 + math.exp(-2)), torch.ones(1, dtype=torch.bool)
    got = losses.itm(match, differ, differ, valid).item()
    assert got == pytest.approx(right, abs=1e-6)
    got = losses.itm(differ, differ, differ, valid).item()
    assert got == pytest.approx((2 * right + right + 2) / 3, abs=1e-6)
    assert losses.itm(match, differ, differ, ~valid).item() == 0
    # Always giving the base rate, odds of 1 to 2.
    base = torch.tensor([[math.log(2), 0.0]]).repeat(5, 1)
    got = losses.itm(base, base, base, torch.ones(5)).item()
    assert got == pytest.approx(0.637, abs=5e-4)


def test_corrupt_frequencies():
    ids = torch.randint(5, 95, (400, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 97, 98
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 40:] = False
    out, labels = losses.corrupt(ids, real, 99, 97, draws(400, 3, 60, seed=1))
    asked = labels != -100
    assert not asked[:, 0].any() and not asked[:, 40:].any()
    assert torch.equal(labels[asked], ids[asked])
    assert asked[:, 1:40].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (out[asked] == 99).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (out[asked] == ids[asked]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(out[~asked], ids[~asked]) and out[asked & (out != 99)].max() < 97


def test_mlm_and_plm_ask_the_right_positions():
    # Start 5, three words, end 6, padding.
    V, ids = 7, torch.tensor([[5, 1, 2, 3, 6, 0]])
    real, valid = torch.tensor([[True] * 5 + [False]]), torch.tensor([True])
    logits = torch.randn(1, 6, V)
    log_p = logits.log_softmax(-1)
    got = losses.plm(logits, ids, torch.tensor([3]), real, valid).item()
    assert got == pytest.approx(-(log_p[0, 2, 3] + log_p[0, 3, 6]).item() / 2, abs=1e-6)
    assert losses.plm(logits, ids, torch.tensor([3]), real, ~valid).item() == 0
    labels = torch.tensor([[-100, 1, -100, -100, -100, -100]])
    assert losses.mlm(logits, labels).item() == pytest.approx(-log_p[0, 1, 1].item(), abs=1e-6)
    assert losses.mlm(logits, torch.full((1, 6), -100)).item() == 0
    assert losses.mlm(torch.zeros(1, 6, V), labels).item() == pytest.approx(math.log(V), abs=1e-6)


def test_mlm_and_plm_equal_numpy():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 7, (3, 5), generator=g)
    real, valid = torch.arange(5) < torch.tensor([[5], [3], [4]]), torch.tensor([1, 1, 0]).bool()
    prefix = torch.tensor([1, 2, 1])
    log_p = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    labels = torch.where(torch.rand(3, 5, generator=g) < 0.5, ids, -100)
    rows = [-log_p[m, t, labels[m, t]] for m, t in np.argwhere(labels.numpy() != -100)]
    assert losses.mlm(logits, labels).item() == pytest.approx(np.mean(rows), abs=1e-9)
    rows = []
    for m in range(3):
        for t in range(int(prefix[m]), 5):
            if valid[m] and real[m, t]:
                rows.append(-log_p[m, t - 1, ids[m, t]])
    got = losses.plm(logits, ids, prefix, real, valid)
    assert got.item() == pytest.approx(np.mean(rows), abs=1e-9)


def test_prefix_always_leaves_something_to_predict():
    length = torch.randint(2, 12, (500, 1), generator=torch.Generator().manual_seed(0))
    real = torch.arange(12)[None, :] < length
    prefix = losses.split_prefix(real, draws(500, seed=1))
    assert (prefix >= 1).all() and (prefix < real.sum(1)).all() and prefix.unique().numel() > 8


# --------------------------------------------------------------------------------------------------
# Precision, gradients, monitors, processes


@pytest.mark.parametrize("inputs", ["bf16", "autocast"])
def test_losses_are_computed_in_fp32(inputs):
    torch.manual_seed(0)
    v, w = torch.randn(2, 4, 16).bfloat16(), torch.randn(2, 6, 16).bfloat16()
    valid, ids = torch.ones(2, 6, dtype=torch.bool), torch.arange(12).view(2, 6)

    def cvta(v, w):
        return losses.cvta(v, w, 2, 0.07, torch.ones(2, 4), valid, near=0.9)

    def itc(v, w):
        return losses.itc(v.flatten(0, 1), w[:, :4].flatten(0, 1), torch.arange(8), 0.07, ones)

    def mrtva(v, w):
        return losses.mrtva(v, w[:, :4], torch.ones(2, 4), losses.tree_edges(4, 1))

    def itm(v, w):
        return losses.itm(v[0, :, :2], v[1, :, :2], w[0, :4, :2], torch.ones(4))

    def mlm(v, w):
        return losses.mlm(w, ids)

    def plm(v, w):
        return losses.plm(w, ids, torch.tensor([1, 2]), valid, torch.ones(2))

    def selection(v, w):
        return losses.select_keywords(v, w, 3, valid)[0].double().mean()

    ones = torch.ones(8)
    for loss in (cvta, itc, mrtva, itm, mlm, plm, selection):
        expected = loss(v.double(), w.double()).item()
        if inputs == "bf16":
            got = loss(v, w)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                got = loss(v.float(), w.float())
        assert got.item() == pytest.approx(expected, rel=1e-5), loss.__name__


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    x, w = torch.randn(2, 7, 5).double(), torch.randn(2, 6, 5).double()
    w_valid, valid = torch.rand(2, 6) < 0.8, torch.rand(2, 7) < 0.8
    ids, real = torch.randint(0, 5, (2, 7)), torch.arange(7) < torch.tensor([[7], [5]])
    selected = losses.select_keywords(x, w, 2, w_valid)
    spared, labels = torch.rand(2, 7, 6) < 0.2, torch.where(torch.rand(2, 7) < 0.5, ids, -100)
    bag, columns = torch.arange(14) // 7, random_unit(14, 5)
    target, edges = columns.view(2, 7, 5), losses.tree_edges(7, 2)

    def cvta(x, tau):
        return losses.cvta(x, w, 2, tau, valid, w_valid, selected, spared, 0.9)

    def cvta_of_keywords(x, tau):
        return losses.cvta(w, x[:, :6], 2, tau, w_valid, valid[:, :6])

    def mrtva(x, tau):
        return losses.mrtva(x, target, valid, edges) * tau

    def itc(x, tau):
        rows = F.normalize(x.flatten(0, 1), dim=-1)
        return losses.itc(rows, columns, bag, tau, valid.flatten())

    def itm(x, tau):
        return losses.itm(*x.flatten(0, 1)[:12, :2].chunk(3), valid.flatten()[:4]) * tau

    def mlm(x, tau):
        return losses.mlm(x, labels) * tau

    def plm(x, tau):
        return losses.plm(x, ids, torch.tensor([1, 2]), real, torch.ones(2)) * tau

    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for loss in (cvta, cvta_of_keywords, mrtva, itc, itm, mlm, plm):
        inputs = x.clone().requires_grad_(), tau
        assert torch.autograd.gradcheck(loss, inputs, atol=1e-7), loss.__name__


def test_deviation_tells_collapse_from_health():
    valid = torch.ones(4, 15, dtype=torch.bool)
    torch.manual_seed(0)
    assert losses.deviation(torch.randn(4, 15, 256), valid) > 0.9
    assert losses.deviation(torch.randn(1, 1, 256).expand(4, 15, 256), valid) < 1e-3


def test_monitors_of_the_selection_by_hand():
    """Two patches, four keywords of which one is padding.

    Patch 0 picks keywords 0 and 1. Patch 1 picks keyword 1; its second place is empty.
    """
    index = torch.tensor([[[0, 1], [1, 0]]])
    chosen = torch.tensor([[[True, True], [True, False]]])
    own = torch.tensor([[[True, False, False, False], [False, True, True, True]]])
    w_valid = torch.tensor([[True, True, True, False]])
    both = losses.agreement(torch.tensor([[True, True]]), index, chosen, own, w_valid)
    assert both["own"].item() == pytest.approx(2 / 3)
    assert both["chance"].item() == pytest.approx((2 * 1 / 3 + 1 * 2 / 3) / 3, abs=1e-6)
    # A node that is not valid selects nothing.
    one = losses.agreement(torch.tensor([[True, False]]), index, chosen, own, w_valid)
    assert one["own"].item() == pytest.approx(1 / 2)
    assert one["chance"].item() == pytest.approx(1 / 3)
    none = losses.agreement(torch.tensor([[False, False]]), index, chosen, own, w_valid)
    assert all(x.isfinite() for x in none.values())


def test_weighted_mean_of_nothing_is_zero():
    x, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])
    assert losses.weighted_mean(x, weight).item() == pytest.approx(13 / 4)
    assert losses.weighted_mean(x, weight > 0).item() == pytest.approx(5 / 2)
    assert losses.weighted_mean(x, weight * 0).item() == 0


def test_rows_of_other_processes_travel_contiguous(monkeypatch):
    """NCCL refuses a tensor with other strides, gloo does not."""
    sent = []

    def all_gather(out, x):
        out.copy_(x)
        sent.append(x)

    monkeypatch.setattr(losses.dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(losses.dist, "all_reduce", sent.append)
    x = torch.rand(4, 3, requires_grad=True)
    # The gradient of a sum is one number that is repeated without being copied.
    losses.AllGather.apply(x.T).sum().backward()
    assert len(sent) == 2 and all(y.is_contiguous() for y in sent)
    assert torch.equal(x.grad, torch.ones(4, 3))


def test_take_is_indexing():
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 4], [4, 4]])
    assert torch.equal(losses.take(x, index), x[index])
    weights = torch.randn(2, 2, 3, 2)
    (ours,) = torch.autograd.grad((losses.take(x, index) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((x[index] * weights).sum(), x)
    assert torch.allclose(ours, theirs)


def test_the_idea_alone_learns(capsys):
    losses.main()
    lines = capsys.readouterr().out.splitlines()
    assert "chance" in lines[0]
    rows = [[float(word) for word in line.split()] for line in lines[1:]]
    assert [int(row[0]) for row in rows] == [0, 50, 100, 150, 200, 250, 300]
    first, last = rows[0], rows[-1]
    # CVTA and MRTVA fall; blind choice would find a third of the true keywords.
    assert last[1] < first[1] - 0.3 and last[2] < first[2] - 0.3
    assert last[3] > max(0.7, first[3])
