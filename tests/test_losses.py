"""pytest tests/test_losses.py — hand-computed cases, an independent NumPy transcription of the formulas, and two processes
against one."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses

ROOT = Path(__file__).resolve().parent.parent


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


# ---- CVTA -------------------------------------------------------------------------------------------------------------

def cvta_numpy(v, w, k_o, tau, v_valid, w_valid, own=None):
    """The equation of section 3.2, with loops."""
    total, weight = 0.0, 0.0
    for b in range(len(v)):
        for a in range(v.shape[1]):
            s = np.array([v[b, a] @ w[b, k] / (np.linalg.norm(v[b, a]) * np.linalg.norm(w[b, k])) for k in range(w.shape[1])])
            real = [k for k in range(w.shape[1]) if w_valid[b, k]]
            allowed = [k for k in real if own is None or own[b, a, k]]
            positives = sorted(allowed, key=lambda k: (-s[k], k))[:k_o]
            if positives and v_valid[b, a]:
                norm = np.log(sum(np.exp(s[k] / tau) for k in real))
                total += float(v_valid[b, a]) * -np.mean([s[k] / tau - norm for k in positives])
                weight += float(v_valid[b, a])
    return total / weight if weight else 0.0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k_o", [1, 3, 9])
def test_cvta_equals_numpy(k_o, own):
    g = torch.Generator().manual_seed(k_o)
    v, w = torch.randn(3, 15, 6, generator=g), torch.randn(3, 7, 6, generator=g)
    v_valid, w_valid = torch.rand(3, 15, generator=g) < 0.7, torch.rand(3, 7, generator=g) < 0.7
    w_valid[1] = False  # a bag without keywords
    mine = torch.rand(3, 15, 7, generator=g) < 0.4
    selected = losses.select_keywords(v, w, k_o, w_valid, mine if own else None)
    got = losses.cvta(v, w, k_o, 0.07, v_valid, w_valid, selected)
    assert got.item() == pytest.approx(cvta_numpy(v.double().numpy(), w.double().numpy(), k_o, 0.07, v_valid.numpy(), w_valid.numpy(),
                                                  mine.numpy() if own else None), abs=1e-5)


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
    counts = torch.zeros(6, 6)
    for seed in range(200):
        image, caption, ok = losses.hard_negatives(v, t, bag, 0.05, torch.ones(6), torch.Generator().manual_seed(seed))
        assert ok.all() and (bag[image] != bag).all() and (bag[caption] != bag).all()
        counts[torch.arange(6), caption] += 1
    assert (counts.argmax(1) == torch.arange(6).add(2) % 6).all()
    assert not losses.hard_negatives(v, t, torch.zeros(6), 0.05, torch.ones(6))[2].any()  # one bag alone: nothing to draw


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
    out, labels = losses.corrupt(ids, real, 99, (97, 98, 99), 100, generator=torch.Generator().manual_seed(1))
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


def test_prefix_always_leaves_something_to_predict():
    real = torch.arange(12)[None, :] < torch.randint(2, 12, (500, 1), generator=torch.Generator().manual_seed(0))
    prefix = losses.split_prefix(real, torch.Generator().manual_seed(1))
    assert (prefix >= 1).all() and (prefix < real.sum(1)).all() and prefix.unique().numel() > 8


# ---- gradients, monitors, processes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cvta", "mrtva", "itc"])
def test_gradients_against_finite_differences(name):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    w, ok = torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)
    fixed = losses.select_keywords(x, w, 2, ok)
    f = {"cvta": lambda x: losses.cvta(x, w, 2, 0.5, torch.ones(2, 4), ok, fixed),
         "mrtva": lambda x: losses.mrtva(x, w[:, :4], torch.ones(2, 4, dtype=torch.bool), 1),
         "itc": lambda x: losses.itc(F.normalize(x.flatten(0, 1), dim=-1), F.normalize(w[:, :4].flatten(0, 1), dim=-1), torch.arange(8) // 4, 0.5, torch.ones(8))}[name]
    x.requires_grad_()
    f(x).backward()
    step = torch.zeros_like(x)
    step[1, 2, 3] = 1e-2
    with torch.no_grad():
        numeric = (f(x + step) - f(x - step)) / 2e-2
    assert x.grad[1, 2, 3].item() == pytest.approx(numeric.item(), abs=2e-3)


def test_monitors_tell_collapse_from_health():
    args = (torch.ones(4, 15, dtype=torch.bool), torch.zeros(4, 15, 2, dtype=torch.long), torch.ones(4, 15, 2, dtype=torch.bool),
            torch.zeros(4, 15, 8, dtype=torch.bool), torch.ones(4, 8, dtype=torch.bool))
    assert losses.monitors(torch.randn(4, 15, 256), *args)["std"] > 0.9
    collapsed = losses.monitors(torch.randn(1, 1, 256).expand(4, 15, 256), *args)
    assert collapsed["std"] < 1e-3 and collapsed["used"].item() == pytest.approx(1 / 8) and collapsed["own"] == 0


TWO = """
import sys; sys.path.insert(0, {root!r})
import torch, torch.distributed as dist, torch.nn.functional as F
import losses, model
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
g = torch.Generator().manual_seed(0)
v, t = (F.normalize(torch.randn(8, 6, generator=g), dim=-1) for _ in range(2))
weight = torch.tensor([1, 0, 1, .5, 1, 1, 0, 1.]); bag = torch.arange(8) // 2
h, z = (torch.randn(4, 15, 6, generator=g) for _ in range(2)); valid = torch.rand(4, 15, generator=g) < .7
norm = model.BatchNorm(6, affine=False)
part = lambda x: x.chunk(world)[rank] if world > 1 else x
v, h = part(v).clone().requires_grad_(), part(h).clone().requires_grad_()
n = norm(h.flatten(0, 1), part(valid).flatten()).view_as(h)
loss = losses.itc(v, part(t), part(bag), 0.2, part(weight)) + losses.mrtva(n, part(z), part(valid), 2)
(loss / world).backward()   # what DDP's averaging does
total = loss.detach().clone(); dist.all_reduce(total)
both = torch.cat(list(losses.gather(torch.cat([v.grad.flatten(), h.grad.flatten()])).chunk(world)))
pieces = both.view(world, -1)
if rank == 0:
    import json; json.dump([(total / world).item(), pieces[:, : v.numel()].sum().item(), pieces.square().sum().item()], open({out!r}, "w"))
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    """Loss and gradients of a batch do not depend on how many processes share it: gather, weighted mean and BatchNorm."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(ROOT), out=str(tmp_path / "seen.json")))
    seen = []
    for world in (1, 2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0", "--rdzv_backend=c10d",
                               "--rdzv_endpoint=localhost:0", str(script)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        seen.append(json.loads((tmp_path / "seen.json").read_text()))
    assert seen[0] == pytest.approx(seen[1], rel=1e-4, abs=1e-5)
