"""pytest tests/test_losses.py — every loss by hand, against a transcription of its formula in NumPy with loops (float64), and its
gradient against finite differences. How the losses hang together is in test_objective.py."""
import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


# ---- CVTA -------------------------------------------------------------------------------------------------------------

def cvta_numpy(v, w, k_o, tau, v_valid, w_valid, own=None, near=None, word=None, bound=None):
    """The equation of section 3.2, with loops; bound: keywords that are no negatives, positives or not."""
    cos = lambda x, y: x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    total, weight = 0.0, 0.0
    for b in range(len(v)):
        listed = [k for k in range(w.shape[1]) if w_valid[b, k]]
        others = [(b, k) for k in listed]
        if word is not None:  # one of each keyword of the batch; of those of this bag this bag's
            seen = {word[b, k] for k in listed}
            for i in range(len(w)):
                for k in range(w.shape[1]):
                    if w_valid[i, k] and word[i, k] not in seen:
                        seen.add(word[i, k])
                        others.append((i, k))
        for a in range(v.shape[1]):
            allowed = [k for k in listed if own is None or own[b, a, k]]
            positives = sorted(allowed, key=lambda k: (-cos(v[b, a], w[b, k]), k))[:k_o]
            if positives and v_valid[b, a]:
                true = positives + [k for k in listed if bound is not None and bound[b, a, k]]
                kept = [(i, k) for i, k in others if i == b and k in positives or not (i == b and k in true)
                        and (near is None or all(cos(w[i, k], w[b, p]) <= near for p in true))]
                norm = np.log(sum(np.exp(cos(v[b, a], w[i, k]) / tau) for i, k in kept))
                total += float(v_valid[b, a]) * -np.mean([cos(v[b, a], w[b, p]) / tau - norm for p in positives])
                weight += float(v_valid[b, a])
    return total / weight if weight else 0.0


@pytest.mark.parametrize("near,batch", [(None, False), (0.5, False), (0.5, True), (None, True)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k_o", [1, 3, 9])
def test_cvta_equals_numpy(k_o, own, near, batch):
    g = torch.Generator().manual_seed(k_o)
    v, w = torch.randn(3, 15, 6, generator=g, dtype=torch.float64), torch.randn(3, 7, 6, generator=g, dtype=torch.float64)
    v_valid, w_valid = torch.rand(3, 15, generator=g, dtype=torch.float64), torch.rand(3, 7, generator=g) < 0.7
    v_valid *= v_valid > 0.3  # weights
    w_valid[1] = False  # a bag without keywords
    word = torch.arange(21).view(3, 7)
    w[2, 1:3], word[2, 1:3] = w[0, 4:6], word[0, 4:6]  # two keywords in two bags
    w_valid[0, 4:6] = w_valid[2, 1:3] = True
    w[0, 0] = w[0, 4] + 0.1 * w[0, 1]  # near-duplicates
    mine = torch.rand(3, 15, 7, generator=g) < 0.4
    selected = losses.select_keywords(v, w, k_o, w_valid, mine if own else None)
    bound = mine & (torch.arange(15) % 2 == 0)[:, None] if own else None                # half of the nodes are bound to their captions
    got = losses.cvta(v, w, k_o, 0.07, v_valid, w_valid, selected, word if batch else None, near, bound)
    assert got.item() == pytest.approx(cvta_numpy(v.numpy(), w.numpy(), k_o, 0.07, v_valid.numpy(), w_valid.numpy(),
                                                  mine.numpy() if own else None, near, word.numpy() if batch else None, bound if bound is None else bound.numpy()), abs=1e-9)
    if near is None and not batch:  # and in the precision that training has
        assert losses.cvta(v.float(), w.float(), k_o, 0.07, v_valid.float(), w_valid, selected, own=bound).item() == pytest.approx(got.item(), rel=1e-6)


def test_near_duplicates_are_no_negatives_but_may_be_positives():
    w = F.normalize(torch.tensor([[[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 0, 1]]]), dim=-1)
    v, ok = torch.tensor([[[1.0, 0, 0]]]), torch.ones(1, 4, dtype=torch.bool)
    s = (v @ w.transpose(1, 2) / 0.5)[0, 0]
    loss = lambda k_o, near: losses.cvta(v, w, k_o, 0.5, torch.ones(1, 1), ok, near=near).item()
    assert loss(1, None) == pytest.approx((s.logsumexp(0) - s[0]).item(), abs=1e-6)
    assert loss(1, 0.95) == pytest.approx((s[[0, 2, 3]].logsumexp(0) - s[0]).item(), abs=1e-6)
    assert loss(2, 0.95) == pytest.approx((s.logsumexp(0) - s[:2].mean()).item(), abs=1e-6)


def test_keywords_of_the_own_caption_are_no_negatives_while_a_node_is_bound_to_it():
    v, w = torch.tensor([[[0.8, 0.6, 0.0]]]).repeat(2, 1, 1), torch.eye(3)[None].repeat(2, 1, 1)
    own, ok = torch.tensor([[[True, True, False]]]).repeat(2, 1, 1), torch.ones(2, 3, dtype=torch.bool)
    selected, s = losses.select_keywords(v, w, 1, ok, own), torch.tensor([0.8, 0.6, 0.0]) / 0.5
    loss = lambda word, own: losses.cvta(v, w, 1, 0.5, torch.ones(2, 1), ok, selected, word, own=own).item()
    for word in (None, torch.tensor([[0, 1, 2], [0, 1, 2]])):                          # those of the other bag are copies
        assert loss(word, own) == pytest.approx((s[[0, 2]].logsumexp(0) - s[0]).item(), abs=1e-6)
        assert loss(word, None) == pytest.approx((s.logsumexp(0) - s[0]).item(), abs=1e-6)


def test_the_same_keyword_of_another_bag_is_no_negative_and_counts_once():
    w = torch.eye(4)[None, :3].repeat(3, 1, 1)
    w[:, 2, 2], w[0, 2, 2], w[:, 2, 3] = 0, 1, 1
    w[0, 2, 3] = 0  # bag 0: axes 0, 1, 2; bags 1 and 2: axes 0, 1, 3
    word = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 3]])
    v, v_valid = torch.tensor([[[0.6, 0.8, 0.0, 0.0]]]).repeat(3, 1, 1), torch.tensor([[1.0], [0.0], [0.0]])
    s = torch.tensor([0.6, 0.8, 0.0, 0.0]) / 0.5  # all four keywords, each once
    got = losses.cvta(v, w, 1, 0.5, v_valid, torch.ones(3, 3, dtype=torch.bool), word=word)
    assert got.item() == pytest.approx((s.logsumexp(0) - s[1]).item(), abs=1e-6)


@pytest.mark.parametrize("inputs", ["bf16", "autocast"])
def test_losses_are_computed_in_fp32(inputs):
    torch.manual_seed(0)
    v, w, ok = torch.randn(2, 4, 16).bfloat16(), torch.randn(2, 6, 16).bfloat16(), torch.ones(2, 6, dtype=torch.bool)
    f = {"cvta": lambda v, w: losses.cvta(v, w, 2, 0.07, torch.ones(2, 4), ok),
         "itc": lambda v, w: losses.itc(v.flatten(0, 1), w[:, :4].flatten(0, 1), torch.arange(8), 0.07, torch.ones(8), slow=(w[:, :4].flatten(0, 1), v.flatten(0, 1)), alpha=0.4),
         "mrtva": lambda v, w: losses.mrtva(v, w[:, :4], torch.ones(2, 4, dtype=torch.bool), 1)}
    for name, loss in f.items():
        expected = loss(v.double(), w.double()).item()
        if inputs == "bf16":
            assert loss(v, w).item() == pytest.approx(expected, rel=1e-5), name
        else:
            with torch.autocast("cpu", torch.bfloat16):
                assert loss(v.float(), w.float()).item() == pytest.approx(expected, rel=1e-5), name


def test_cvta_is_log_k_at_equal_logits_and_never_below_log_k_o():
    v = unit(1, 1, 8).expand(2, 5, 8).float()
    w = unit(1, 1, 8, seed=1).expand(2, 12, 8).float()
    ok = torch.ones(2, 12, dtype=torch.bool)
    assert losses.cvta(v, w, 4, 0.07, torch.ones(2, 5), ok).item() == pytest.approx(math.log(12), abs=1e-5)
    w = torch.zeros(1, 12, 8)
    w[0, :4, 0], w[0, 4:, 1] = 1, -1  # four perfect keywords, eight opposite ones
    best = losses.cvta(torch.tensor([[[1.0, 1, 0, 0, 0, 0, 0, 0]]]), w, 4, 0.01, torch.ones(1, 1), ok[:1])
    assert best.item() == pytest.approx(math.log(4), abs=1e-5)


def test_cvta_gradient_is_softmax_minus_positives():
    """d L / d s = softmax - 1[P] / k_o, with w as unit axes so that s is v / (|v| tau)."""
    v = torch.tensor([[[0.6, 0.8, 0.0]]], requires_grad=True)
    losses.cvta(v, torch.eye(3)[None], 1, 1.0, torch.ones(1, 1), torch.ones(1, 3, dtype=torch.bool)).backward()
    s = torch.tensor([0.6, 0.8, 0.0])
    ds = s.softmax(0) - torch.tensor([0.0, 1.0, 0.0])
    expected = ds - (ds @ s) * s  # through the normalisation of v
    assert torch.allclose(v.grad[0, 0], expected, atol=1e-6)


def test_padding_keywords_changes_nothing_and_no_keywords_is_zero():
    v, w = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    ok = torch.ones(2, 5, dtype=torch.bool)
    padded = torch.cat([w, 100 * torch.randn(2, 3, 6)], 1), F.pad(ok, (0, 3))
    args = (3, 0.07, torch.ones(2, 4))
    assert torch.allclose(losses.cvta(v, w, *args, ok), losses.cvta(v, padded[0], *args, padded[1]), atol=1e-6)
    assert losses.cvta(v, w, *args, ~ok).item() == 0
    assert losses.cvta(v, w, 3, 0.07, torch.zeros(2, 4), ok).item() == 0


def test_own_captions_limit_the_selection():
    v, w = torch.randn(1, 2, 4), torch.randn(1, 6, 4)
    own = torch.zeros(1, 2, 6, dtype=torch.bool)
    own[0, 0, [1, 4]] = True
    index, ok = losses.select_keywords(v, w, 3, torch.ones(1, 6, dtype=torch.bool), own)
    assert set(index[0, 0][ok[0, 0]].tolist()) == {1, 4} and not ok[0, 1].any()


# ---- MRTVA ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b,N", [(1, 4), (2, 15), (4, 85)])
@pytest.mark.parametrize("pairs", ["edges", "ancestors"])
def test_mrtva_equals_loops_over_the_tree(b, N, pairs):
    g = torch.Generator().manual_seed(N)
    h, t = torch.randn(2, N, 5, generator=g), torch.randn(2, N, 5, generator=g)
    valid = torch.rand(2, N, generator=g) < 0.8
    valid[0, 0] = True
    cos = lambda x, y: float(F.cosine_similarity(x.double(), y.double(), dim=0))
    depth = lambda n: 0 if n == 0 else 1 + depth((n - 1) // b)
    groups = {}
    for i in range(2):
        for c in range(1, N):
            p = c
            while p > 0 and (pairs == "ancestors" or p == c):
                p = (p - 1) // b
                if valid[i, p] and valid[i, c]:
                    groups.setdefault((depth(p), depth(c)), []).append(-(cos(h[i, p], t[i, c]) + cos(h[i, c], t[i, p])) / 2)
    expected = np.mean([np.mean(x) for x in groups.values()])
    assert losses.mrtva(h, t, valid, b, pairs).item() == pytest.approx(expected, abs=1e-6)


def test_levels_compare_the_mean_of_each_magnification():
    h, g = torch.randn(1, 7, 5, dtype=torch.float64), torch.randn(1, 7, 5, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True, False, True, True]])
    pool = lambda x: [F.normalize(F.normalize(x[0, [n for n in nodes if valid[0, n]]], dim=-1).sum(0), dim=0) for nodes in ((0,), (1, 2), (3, 4, 5, 6))]
    p, q = pool(h), pool(g)
    expected = np.mean([-(p[i] @ q[j] + p[j] @ q[i]).item() / 2 for i, j in ((0, 1), (0, 2), (1, 2))])
    assert losses.mrtva(h, g, valid, 2, "levels").item() == pytest.approx(expected, abs=1e-9)


def test_random_pairs_are_of_the_right_magnification_and_another_bag():
    level = torch.tensor([0] + [1] * 2 + [2] * 4)
    h = F.one_hot(level + 3 * torch.arange(3)[:, None], 9).double()  # a direction for each magnification of each bag
    g = torch.zeros(3, 7, 9, dtype=torch.double)
    for i in range(3):  # a target that agrees with the parents' magnification in the two other bags, and with nothing else
        for n in range(7):
            if level[n]:
                g[i, n] = sum(F.one_hot(level[n] - 1 + 3 * torch.tensor(j), 9) for j in range(3) if j != i)
    for seed in range(5):
        torch.manual_seed(seed)
        assert losses.mrtva(h, g, torch.ones(3, 7), 2, "random").item() == pytest.approx(-0.5 / math.sqrt(2), abs=1e-9)
    h.requires_grad_()
    losses.mrtva(h[:1], g[:1], torch.ones(1, 7), 2, "random").backward()  # one bag alone pairs with itself
    with pytest.raises(ValueError, match="edges, ancestors, levels, random"):
        losses.mrtva(h, g, torch.ones(3, 7), 2, "cousins")


@pytest.mark.parametrize("pairs", ["edges", "ancestors", "levels"])
def test_parent_and_child_may_change_places(pairs):
    h, g, valid = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4) < 0.8
    turned = [x.flip(1) for x in (h, g, valid)]  # a chain read from its other end has the same edges
    assert losses.mrtva(h, g, valid, 1, pairs).item() == pytest.approx(losses.mrtva(*turned, 1, pairs).item(), abs=1e-6)


def test_mrtva_is_minus_one_when_all_agree_and_ignores_a_missing_level():
    h = torch.randn(1, 1, 8).expand(2, 85, 8)
    valid = torch.ones(2, 85, dtype=torch.bool)
    assert losses.mrtva(h, h, valid).item() == pytest.approx(-1, abs=1e-6)
    valid[:, 21:] = False  # a 20x slide: 21 nodes
    assert losses.mrtva(h, h, valid).item() == pytest.approx(-1, abs=1e-6)
    assert losses.mrtva(h, h, torch.zeros_like(valid)).item() == 0


def test_no_gradient_reaches_the_target():
    h = torch.randn(2, 15, 8, requires_grad=True)
    g = torch.randn(2, 15, 8, requires_grad=True)
    losses.mrtva(h, g.detach(), torch.ones(2, 15, dtype=torch.bool), 2).backward()
    assert h.grad.abs().sum() > 0 and g.grad is None


# ---- ITC, ITM, MLM, PLM -----------------------------------------------------------------------------------------------

def test_itc_without_kin_is_clip():
    v, t = unit(6, 8).float(), unit(6, 8, seed=1).float()
    logits, own = v @ t.T / 0.1, torch.arange(6)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert losses.itc(v, t, own, 0.1, torch.ones(6), kin=0.1).item() == pytest.approx(clip.item(), abs=1e-6)


def itc_numpy(v, t, bag, tau, weight, kin, slow=None, queue=None, alpha=0.0):
    """Soft cross-entropy over the columns, row by row."""
    total = 0.0
    slow_v, slow_t = slow if slow is not None else (v, t)
    for a, b, opinion, old in ((v, slow_t, slow_v, 1), (t, slow_v, slow_t, 0)):
        columns = [(j, b[j], bag[j]) for j in range(len(b)) if weight[j] > 0]
        if queue is not None:
            columns += [(-1, queue[old][j], queue[2][j]) for j in range(len(queue[2])) if queue[2][j] >= 0]
        for i in range(len(a)):
            if weight[i] > 0:
                p = np.exp([a[i] @ c / tau for _, c, _ in columns])
                q = np.exp([opinion[i] @ c / tau for _, c, _ in columns])
                kindred = np.array([k == bag[i] for _, _, k in columns], float)
                target = (1 - kin) * np.array([j == i for j, _, _ in columns], float) + kin * kindred / kindred.sum()
                total += weight[i] / 2 * -(((1 - alpha) * target + alpha * q / q.sum()) * np.log(p / p.sum())).sum()
    return total / weight.sum()


@pytest.mark.parametrize("kin", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("slow", [False, True])
def test_itc_equals_numpy(kin, queued, slow):
    v, t, slow_v, slow_t, old_v, old_t = (unit(9, 6, seed=i) for i in range(6))
    bag, old = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3]), torch.tensor([3, -1, 0, 7, 8, -1, 1, 9, 1])  # kin of an earlier epoch among them
    weight = torch.tensor([1, 0.5, 1, 0, 2, 1, 1, 0, 1], dtype=torch.float64)
    moving, queue = (slow_v, slow_t) if slow else None, (old_v, old_t, old) if queued else None
    alpha = torch.tensor(0.3) if slow else None
    got = losses.itc(v, t, bag, 0.2, weight, kin, moving, queue, alpha)
    array = lambda xs: xs and tuple(x.numpy() for x in xs)
    assert got.item() == pytest.approx(itc_numpy(v.numpy(), t.numpy(), bag.numpy(), 0.2, weight.numpy(), kin, array(moving), array(queue), 0.3 if slow else 0.0), abs=1e-7)


def test_the_queue_is_a_ring_of_any_size():
    for size, n in ((7, 3), (4, 4), (5, 12)):
        queue, at, expected = [torch.zeros(size + 1, 2), torch.zeros(size + 1, 2), torch.full((size + 1,), -1)], torch.tensor(0), deque(maxlen=size)
        for step in range(9):
            rows, valid = torch.arange(n) + n * step, torch.rand(n, generator=torch.Generator().manual_seed(step)) < 0.7
            losses.enqueue(queue, at, rows[:, None].expand(n, 2), -rows[:, None].expand(n, 2), rows, valid)
            expected.extend(rows[valid].tolist())
            there = queue[2] >= 0
            assert sorted(queue[2][there].tolist()) == sorted(expected) and not there[size]
            assert (queue[0][there, 1] == queue[2][there]).all() and (queue[1][there, 0] == -queue[2][there]).all()


def test_itc_by_hand_with_kin_and_a_masked_row():
    v = t = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0]])
    bag, valid = torch.tensor([0, 0, 1]), torch.tensor([True, True, False])
    p = math.exp(1) / (math.exp(1) + 1)  # two valid columns, tau 1: own pair 1, the other 0; the third is no negative
    expected = -(0.9 + 0.05) * math.log(p) - 0.05 * math.log(1 - p)
    assert losses.itc(v, t, bag, torch.tensor(1.0), valid, kin=0.1).item() == pytest.approx(expected, abs=1e-6)


def test_itc_chance_level():
    v = torch.ones(10, 4) / 2
    assert losses.itc(v, v, torch.arange(10), 0.07, torch.ones(10)).item() == pytest.approx(math.log(10), abs=1e-5)


def test_hard_negatives_are_never_kin_and_prefer_the_similar():
    bag = torch.tensor([0, 0, 1, 1, 2, 2])
    v = unit(6, 4).float()
    t = v.roll(2, 0)  # the caption most similar to image i stands two rows further, in another bag
    counts, images = torch.zeros(6, 6), torch.zeros(6, 6)
    for seed in range(200):
        image, caption, ok = losses.hard_negatives(v, t, bag, 0.05, torch.ones(6), torch.rand(6, 2, generator=torch.Generator().manual_seed(seed)))
        assert ok.all() and (bag[image] != bag).all() and (bag[caption] != bag).all()
        counts[torch.arange(6), caption] += 1
        images[torch.arange(6), image] += 1
    assert (counts.argmax(1) == torch.arange(6).add(2) % 6).all() and (images.argmax(1) == torch.arange(6).sub(2) % 6).all()
    assert not losses.hard_negatives(v, t, torch.zeros(6), 0.05, torch.ones(6), torch.rand(6, 2))[2].any()  # one bag alone: nothing to draw


def test_itm_by_hand():
    match, differ = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    right = math.log(1 + math.exp(-2))
    valid = torch.ones(1, dtype=torch.bool)
    assert losses.itm(match, differ, differ, valid).item() == pytest.approx(right, abs=1e-6)
    assert losses.itm(differ, differ, differ, valid).item() == pytest.approx((2 * right + right + 2) / 3, abs=1e-6)
    assert losses.itm(match, differ, differ, ~valid).item() == 0


def test_corrupt_frequencies():
    ids = torch.randint(5, 95, (400, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 97, 98
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 40:] = False
    out, labels = losses.corrupt(ids, real, 99, (97, 98, 99), torch.rand(400, 3, 60, generator=torch.Generator().manual_seed(1)))
    asked = labels != -100
    assert not asked[:, 0].any() and not asked[:, 40:].any() and (labels[asked] == ids[asked]).all()
    assert asked[:, 1:40].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (out[asked] == 99).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (out[asked] == ids[asked]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (out[~asked] == ids[~asked]).all() and out[asked & (out != 99)].max() < 97


def test_mlm_and_plm_ask_the_right_positions():
    V, ids = 7, torch.tensor([[5, 1, 2, 3, 6, 0]])  # start 5, three words, end 6, padding
    real = torch.tensor([[True] * 5 + [False]])
    logits = torch.randn(1, 6, V)
    logp = logits.log_softmax(-1)
    assert losses.plm(logits, ids, torch.tensor([3]), real, torch.tensor([True])).item() == pytest.approx(-(logp[0, 2, 3] + logp[0, 3, 6]).item() / 2, abs=1e-6)
    labels = torch.tensor([[-100, 1, -100, -100, -100, -100]])
    assert losses.mlm(logits, labels).item() == pytest.approx(-logp[0, 1, 1].item(), abs=1e-6)
    assert losses.mlm(logits, torch.full((1, 6), -100)).item() == 0
    assert losses.mlm(torch.zeros(1, 6, V), labels).item() == pytest.approx(math.log(V), abs=1e-6)


def test_soft_labels_equal_numpy():
    g = torch.Generator().manual_seed(0)
    logits, slow = (torch.randn(3, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    ids, real = torch.randint(0, 7, (3, 5), generator=g), torch.arange(5) < torch.tensor([[5], [3], [4]])
    valid, prefix, alpha = torch.tensor([True, True, False]), torch.tensor([1, 2, 1]), 0.4
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    row = lambda m, t, label: -(((1 - alpha) * np.eye(7)[label] + alpha * softmax(slow[m, t].numpy())) * np.log(softmax(logits[m, t].numpy()))).sum()
    labels = torch.where(torch.rand(3, 5, generator=g) < 0.5, ids, -100)
    asked = [(m, t) for m in range(3) for t in range(5) if labels[m, t] != -100]
    assert losses.mlm(logits, labels, slow, alpha).item() == pytest.approx(np.mean([row(m, t, labels[m, t]) for m, t in asked]), abs=1e-9)
    asked = [(m, t) for m in range(3) for t in range(5) if valid[m] and t >= prefix[m] and real[m, t]]
    assert losses.plm(logits, ids, prefix, real, valid, slow, alpha).item() == pytest.approx(np.mean([row(m, t - 1, ids[m, t]) for m, t in asked]), abs=1e-9)


def test_prefix_always_leaves_something_to_predict():
    real = torch.arange(12)[None, :] < torch.randint(2, 12, (500, 1), generator=torch.Generator().manual_seed(0))
    prefix = losses.split_prefix(real, torch.rand(500, generator=torch.Generator().manual_seed(1)))
    assert (prefix >= 1).all() and (prefix < real.sum(1)).all() and prefix.unique().numel() > 8


# ---- gradients, monitors, processes -----------------------------------------------------------------------------------

def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    w, ok, valid = torch.randn(2, 6, 5, dtype=torch.float64), torch.rand(2, 6) < 0.8, torch.rand(2, 7) < 0.8
    ids, real, tau = torch.randint(0, 5, (2, 7)), torch.arange(7) < torch.tensor([[7], [5]]), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    selected, labels, bag = losses.select_keywords(x, w, 2, ok), torch.where(torch.rand(2, 7) < 0.5, ids, -100), torch.arange(14) // 7
    rows, columns, slow = (lambda x: F.normalize(x.flatten(0, 1), dim=-1)), unit(14, 5), x.flip(0)
    for name, f in {
        "cvta": lambda x, tau: losses.cvta(x, w, 2, tau, valid, ok, selected, torch.arange(12).view(2, 6), 0.9),
        "cvta of keywords": lambda x, tau: losses.cvta(w, x[:, :6], 2, tau, ok, valid[:, :6], selected=(torch.randint(0, 6, (2, 6, 2), generator=torch.Generator().manual_seed(1)), ok[..., None].expand(2, 6, 2))),
        **{f"mrtva {pairs}": lambda x, tau, pairs=pairs: losses.mrtva(x, columns.view(2, 7, 5), valid, 2, pairs) * tau for pairs in ("edges", "ancestors", "levels")},
        "itc": lambda x, tau: losses.itc(rows(x), columns, bag, 0.5, valid.flatten(), slow=(columns.flip(0), columns), queue=(columns, columns, bag), alpha=0.3) * tau,  # its targets stand still
        "itc with a queue": lambda x, tau: losses.itc(rows(x), columns, bag, tau, valid.flatten(), slow=(columns.flip(0), columns), queue=(columns, columns, bag)),
        "itc in the batch": lambda x, tau: losses.itc(rows(x), columns, bag, tau, valid.flatten()),
        "itm": lambda x, tau: losses.itm(*(x.flatten(0, 1)[:12, :2].chunk(3)), valid.flatten()[:4]) * tau,
        "mlm": lambda x, tau: losses.mlm(x, labels, slow, 0.4) * tau,
        "plm": lambda x, tau: losses.plm(x, ids, torch.tensor([1, 2]), real, torch.ones(2), slow, 0.4) * tau,
    }.items():
        assert torch.autograd.gradcheck(f, (x.clone().requires_grad_(), tau), atol=1e-7), name


def test_monitors_tell_collapse_from_health():
    args = (torch.ones(4, 15, dtype=torch.bool), torch.zeros(4, 15, 2, dtype=torch.long), torch.ones(4, 15, 2, dtype=torch.bool),
            torch.zeros(4, 15, 8, dtype=torch.bool), torch.ones(4, 8, dtype=torch.bool))
    healthy = losses.monitors(torch.randn(4, 15, 256), *args)
    assert healthy["std"] > 0.9 and healthy["rank"] > 30
    collapsed = losses.monitors(torch.randn(1, 1, 256).expand(4, 15, 256), *args)
    assert collapsed["std"] < 1e-3 and collapsed["used"].item() == pytest.approx(1 / 8) and collapsed["own"] == 0 and collapsed["spread"] == 0
    line = losses.monitors(torch.randn(4, 15, 1) * torch.randn(256), *args)  # two points, v and -v: one direction
    assert line["rank"].item() == pytest.approx(1, abs=1e-3)


def test_monitors_of_the_selection_by_hand():
    """One bag of 2 patches and 4 keywords (one of them padding); patch 0 picks keywords 0 and 1, patch 1 keyword 1 and an empty slot."""
    index, ok = torch.tensor([[[0, 1], [1, 0]]]), torch.tensor([[[True, True], [True, False]]])
    own = torch.tensor([[[True, False, False, False], [False, True, True, True]]])
    m = losses.monitors(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), index, ok, own, torch.tensor([[True, True, True, False]]))
    assert m["used"].item() == pytest.approx(2 / 3) and m["own"].item() == pytest.approx(2 / 3)
    assert m["spread"] == 0  # less even than any two keywords
    index, ok = torch.tensor([[[0, 1], [1, 2]]]), torch.ones(1, 2, 2, dtype=torch.bool)
    even = losses.monitors(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), index, ok, own, torch.tensor([[True, True, True, False]]))["spread"].item()
    assert even == pytest.approx((1.5 * math.log(2) - math.log(2)) / (math.log(3) - math.log(2)), abs=1e-6)  # picked 1/4, 1/2, 1/4
    one = losses.monitors(torch.randn(1, 2, 4), torch.tensor([[True, False]]), index, ok, own, torch.tensor([[True, True, True, False]]))
    assert one["used"].item() == pytest.approx(2 / 3)  # a node that is not valid selects nothing
    assert m["chance"].item() == pytest.approx((2 * 1 / 3 + 1 * 2 / 3) / 3, abs=1e-6)


def test_blindness_is_the_share_of_z_that_words_alone_decide():
    words, images = torch.randn(400, 8), torch.randn(400, 8)
    z = lambda a: (a * words + (1 - a) * images, a * words + (1 - a) * images.roll(-1, 0))
    ok = torch.ones(400, dtype=torch.bool)
    assert losses.blindness(*z(1.0), ok) == 1 and losses.blindness(*z(0.0), ok) == 0
    assert losses.blindness(*z(0.5), ok).item() == pytest.approx(0.5, abs=0.06)


def test_each_known_failure_has_a_warning():
    healthy = dict(std=1.0, rank=20.0, used=0.5, spread=0.9, own=0.8, chance=0.1, blind=0.2, tau=0.07, tau_cvta=0.07, queue=1.0, epoch=2.0)
    assert losses.warnings(healthy) == {} and losses.warnings({"tau": 0.07}) == {}
    for name, value in dict(std=0.1, rank=1.5, spread=0.01, own=0.1, blind=0.95, tau=0.01, tau_cvta=0.5, queue=0.4).items():
        said = losses.warnings({**healthy, name: value})
        assert list(said) == [name] and "{" not in said[name] and "\n" not in said[name]
    assert losses.warnings({**healthy, "queue": 0.4, "epoch": 0.5}) == {}  # it is still filling
