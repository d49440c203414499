"""pytest tests/test_objective.py — how the losses hang together: ALBEF's arithmetic, the momentum model, what must change nothing, and
one, two and four processes on the same batch."""
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import losses
import model as networks
import train
from batches import Batches
from objective import Objective
from test_losses import cvta_numpy, itc_numpy

ROOT = Path(__file__).resolve().parent.parent
END, VOCAB = 41, 43  # start 40, end 41, mask 42


def small(**vision):
    """A model of a few thousand parameters."""
    torch.manual_seed(0)
    return networks.MRPLIP(VOCAB, END, dict(size=32, patch=16, width=32, depth=1, heads=2) | vision, dict(context=12, width=16, depth=1, heads=2),
                           dict(width=16, depth=2, heads=2, pool=1), 16, (32, 16))


def settings(**other):
    """train.Config of a batch of four bags of 15 nodes, all losses on."""
    return dataclasses.replace(train.Config(), bags=4, children=2, k_o=3, keywords=7, **other)


def a_batch(B=4, N=15, K=7, seed=0):
    """Patches [B, N, 3, 32, 32] and what goes with them, as batches.Batches makes it: captions of unequal length, invalid nodes, missing
    keywords, and one keyword in two bags."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(3, 10, (B, N, 1), generator=g)                              # start and end id included
    at = torch.arange(10)
    ids = torch.randint(0, 40, (B, N, 10), generator=g)
    ids = torch.where(at == 0, 40, torch.where(at < length - 1, ids, torch.where(at == length - 1, END, 0)))
    words = torch.randint(0, 40, (B * K, 4), generator=g)
    words[:, 0], words[:, 3] = 40, END
    words[-K] = words[1]
    valid = torch.rand(B, N, generator=g) < 0.8
    valid[:, 0] = True
    return torch.rand(B, N, 3, 32, 32, generator=g), {
        "lot_mask": torch.rand(2 * B, 3, 12, generator=g), "lot_prefix": torch.rand(2 * B, generator=g), "lot_negative": torch.rand(2 * B, 2, generator=g),
        "valid": valid, "ids": ids, "keywords": words, "bag_of": torch.arange(B * K).view(B, K),
        "word": (words * torch.tensor([1, 41, 1681, 68921])).sum(1).view(B, K),
        "w_valid": torch.rand(B, K, generator=g) < 0.8, "own": torch.rand(B, N, K, generator=g) < 0.4, "free": torch.rand(B, N, generator=g) < 0.5,
        "pairs": (torch.arange(B)[:, None] * N + torch.randint(0, N, (B, 2), generator=g)).flatten(), "bag": torch.arange(B) + 5, "alpha": torch.tensor(0.4)}


def fixed_draws(patch=setattr):
    """MLM's masks and PLM's prefixes as functions of the caption, so that a transcription may be compared row by row."""
    def corrupt(ids, real, mask_id, special, lot):
        chosen = real & (ids < 40) & ((ids * 7 + torch.arange(ids.shape[1]) * 5) % 3 == 0)
        return torch.where(chosen, mask_id, ids), torch.where(chosen, ids, -100)
    patch(losses, "corrupt", corrupt)
    patch(losses, "split_prefix", lambda real, lot: 1 + real.sum(1) // 3)


# ---- ALBEF ------------------------------------------------------------------------------------------------------------

def test_albef_agrees_on_the_same_features_queues_and_alpha():
    """The arithmetic of ALBEF's pre-training step [2], written down again with its errors mended: the soft labels of MLM go over the
    vocabulary (not over the sequence), and a masked mean of nothing is 0."""
    torch.manual_seed(0)
    n, d, Q, tau, alpha, V = 6, 8, 10, 0.07, 0.4, 11
    image, text, image_m, text_m = (F.normalize(torch.randn(n, d), dim=-1) for _ in range(4))
    image_queue, text_queue = (F.normalize(torch.randn(d, Q), dim=0) for _ in range(2))
    # image-text contrast
    image_all, text_all = torch.cat([image_m.t(), image_queue], 1), torch.cat([text_m.t(), text_queue], 1)
    sim_targets = torch.zeros(n, n + Q).fill_diagonal_(1)
    targets_i2t = alpha * F.softmax(image_m @ text_all / tau, 1) + (1 - alpha) * sim_targets
    targets_t2i = alpha * F.softmax(text_m @ image_all / tau, 1) + (1 - alpha) * sim_targets
    loss_i2t = -(F.log_softmax(image @ text_all / tau, 1) * targets_i2t).sum(1).mean()
    loss_t2i = -(F.log_softmax(text @ image_all / tau, 1) * targets_t2i).sum(1).mean()
    got = losses.itc(image, text, torch.arange(n), tau, torch.ones(n), kin=0, slow=(image_m, text_m), queue=(image_queue.t(), text_queue.t(), torch.arange(Q) + 100), alpha=alpha)
    assert got.item() == pytest.approx((loss_i2t + loss_t2i).item() / 2, rel=1e-6)
    # its retrieval variant: every pair with the same id is a positive, all alike
    ids, queue_ids = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([3, 9, 9, 1, 8, 8, 8, 7, 7, 6])
    same = (ids[:, None] == torch.cat([ids, queue_ids])[None]).float()
    sim_targets = same / same.sum(1, keepdim=True)
    expected = sum(-(F.log_softmax(a @ b / tau, 1) * (alpha * F.softmax(m @ b / tau, 1) + (1 - alpha) * sim_targets)).sum(1).mean() / 2
                   for a, b, m in ((image, text_all, image_m), (text, image_all, text_m)))
    got = losses.itc(image, text, ids, tau, torch.ones(n), kin=1, slow=(image_m, text_m), queue=(image_queue.t(), text_queue.t(), queue_ids), alpha=alpha)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    # image-text matching: the odds of the negatives, then one positive and two negatives a sample
    weights = F.softmax(image @ text.t() / tau, 1).fill_diagonal_(0)
    weights = weights / weights.sum(1, keepdim=True)
    drawn = torch.zeros(n, n)
    for seed in range(2000):
        drawn[torch.arange(n), losses.hard_negatives(image, text, torch.arange(n), tau, torch.ones(n), torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)))[1]] += 1
    assert (drawn / 2000 - weights).abs().max() < 4 * 0.5 / 2000 ** 0.5
    logits = torch.randn(3 * n, 2)
    expected = F.cross_entropy(logits, torch.cat([torch.ones(n), torch.zeros(2 * n)]).long())
    assert losses.itm(*logits.chunk(3), torch.ones(n)).item() == pytest.approx(expected.item(), rel=1e-6)
    # masked language modelling with distillation
    scores, scores_m, labels = torch.randn(n, 5, V), torch.randn(n, 5, V), torch.randint(0, V, (n, 5)).masked_fill(torch.rand(n, 5) < 0.6, -100)
    hard = F.cross_entropy(scores.view(-1, V), labels.view(-1))
    soft = -(F.log_softmax(scores, -1) * F.softmax(scores_m, -1)).sum(-1)[labels != -100].mean()
    assert losses.mlm(scores, labels, scores_m, alpha).item() == pytest.approx(((1 - alpha) * hard + alpha * soft).item(), rel=1e-6)
    assert losses.mlm(scores, torch.full_like(labels, -100), scores_m, alpha).item() == 0


# ---- the momentum model -----------------------------------------------------------------------------------------------

def test_every_distilled_module_follows_and_nothing_else_is_copied():
    def copied(**other):
        slow = Objective(small(), settings(**other)).slow
        return slow and {name.split(".")[0] for name, _ in slow.named_parameters() if "scale" not in name}
    every = {name.split(".")[0] for name, _ in small().named_parameters() if "scale" not in name}
    assert copied(alpha=0.4) == every - {"heads", "itm_head", "fuse_keyword"}
    assert copied(alpha=0.4, freeze_vision=True) == every - {"heads", "itm_head", "fuse_keyword", "vision"}
    towers = {"vision", "text", "proj", "kind"}
    assert copied(queue=8) == copied(cvta_select="ema") == towers
    assert copied() is None and copied(alpha=0.4, itc=0.0, mlm=0.0, plm=0.0) is None and copied(queue=8, itc=0.0) is None
    assert copied(cvta_select="ema", cvta=0.0, mrtva=0.0) is None

    objective = Objective(small(), settings(alpha=0.4, half_life=8))
    before = {k: p.clone() for k, p in objective.slow.named_parameters()}
    with torch.no_grad():
        for p in objective.model.parameters():
            p += 1
    objective.follow()  # 4 bags, half-life 8
    for k, p in objective.slow.named_parameters():
        assert torch.allclose(p, before[k] + 1 - 0.5 ** 0.5, atol=1e-6), k
    objective.follow()  # 8 bags: half the way, in whatever steps
    assert all(torch.allclose(p, before[k] + 0.5, atol=1e-6) for k, p in objective.slow.named_parameters())


def test_alpha_and_queue_cost_nothing_when_0():
    patches, batch = a_batch()
    plain, cfg = Objective(small(), settings()), settings()
    assert set(plain.state_dict()) == {f"model.{k}" for k in plain.model.state_dict()} and plain.memory() == {}
    def flops(objective):
        with FlopCounterMode(display=False) as count:
            sum(objective(batch | {"pixels": patches})[0].values()).backward()
        return count.get_total_flops()
    spent = {name: flops(Objective(small(), settings(**other))) for name, other in
             dict(plain={}, queue=dict(queue=8), alpha=dict(alpha=0.4), ema=dict(cvta_select="ema")).items()}
    assert cfg.alpha == cfg.queue == 0 and spent["plain"] < spent["queue"] < spent["alpha"] and spent["plain"] < spent["ema"] < spent["alpha"]


@pytest.mark.parametrize("other", [{}, dict(freeze_vision=True), dict(alpha=0.4, queue=8), dict(cvta_select="ema"), dict(mrtva=0.0), dict(itm=0.0, plm=0.0, cvta=0.0)])
def test_flops_of_a_step_are_what_torch_counts(other):
    patches, batch = a_batch()
    objective = Objective(small(), settings(**other))
    if other.get("freeze_vision"):
        objective.model.vision.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:        # the fused kernel's products are not counted
        sum(objective(batch | {"pixels": patches})[0].values()).backward()
    assert objective.flops(batch | {"pixels": patches}) == pytest.approx(count.get_total_flops(), rel=0.06)   # the losses' own products, z of the monitors
    cached = batch | {"tokens": patches}
    vision, pixels = (60 * objective.model.flops()[k] for k in ("vision", "pixels"))
    assert objective.flops(batch | {"pixels": patches}) - objective.flops(cached) == (vision if other.get("freeze_vision") else vision * (3 + (objective.slow is not None)) - pixels)


def test_nothing_reaches_a_stopped_target():
    patches, batch = a_batch()
    objective = Objective(small(), settings(alpha=0.4, queue=50, cvta_select="ema"))
    for _ in range(2):  # the second time with a filled queue
        parts, _ = objective(batch | {"pixels": patches})
        sum(parts.values()).backward()
    assert all(p.grad is None for p in objective.slow.parameters()) and all(p.grad is not None for p in objective.model.parameters())
    assert not objective.queue_v.requires_grad and (objective.queue_bag >= 0).sum() > 30
    # MRTVA's target: the gradient is that of the prediction alone, half of what both sides would give
    x = torch.randn(4, 15, 16, requires_grad=True)
    ok = torch.ones(4, 15, dtype=torch.bool)
    stopped, = torch.autograd.grad(losses.mrtva(x, x.detach(), ok, 2), x)
    through, = torch.autograd.grad(losses.mrtva(x, x, ok, 2), x)
    assert torch.allclose(2 * stopped, through, atol=1e-7) and stopped.abs().sum() > 0


def test_the_queue_holds_the_last_valid_patches_and_their_kin():
    objective, seen = Objective(small(), settings(queue=100)), []
    for step in range(3):
        patches, batch = a_batch(seed=step)
        batch["bag"] = batch["bag"] + 10 * step
        _, monitor = objective(batch | {"pixels": patches})
        seen.append(batch["bag"][:, None].expand(4, 15)[batch["valid"]])
    seen = torch.cat(seen)
    filled = objective.queue_bag >= 0
    assert sorted(objective.queue_bag[filled].tolist()) == sorted(seen.tolist()[-100:]) and monitor["queue"] == 1
    assert torch.allclose(objective.queue_v[filled].norm(dim=1), torch.ones(int(filled.sum())), atol=1e-5)


# ---- the whole, written down a second time -----------------------------------------------------------------------------

def test_the_objective_term_by_term(monkeypatch):
    """Two steps (the second with a queue of the first) of a model and a momentum model that differ, against the networks called one by one and
    the losses' transcriptions in NumPy; and MRTVA's gradient, which must not see the target."""
    fixed_draws(monkeypatch.setattr)
    monkeypatch.setattr(losses, "hard_negatives", lambda v, t, bag, tau, valid, lot: (torch.arange(len(bag)).roll(2), torch.arange(len(bag)).roll(3), valid))
    cfg = settings(alpha=0.4, queue=40, kin=0.3, cvta_negatives="bag", mrtva_pairs="edges")
    objective = Objective(small(), cfg)
    with torch.no_grad():
        for p in objective.model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        objective.model.cvta_scale.copy_(torch.tensor(2.0))  # ITC's and CVTA's temperatures differ
    m, s, a = objective.model, objective.slow, 0.4
    array, mean = (lambda x: x.detach().double().numpy()), (lambda xs: sum(xs) / len(xs))
    old = ([], [], [])
    for step in range(2):
        patches, b = a_batch(seed=step)
        b["bag"], valid, ids, row = b["bag"] + step, b["valid"].flatten(), b["ids"].flatten(0, 1), b["pairs"]  # bags 6, 7, 8 come again
        got, monitor = objective(b | {"pixels": patches})
        bag, level = b["bag"].repeat_interleave(15), torch.tensor([1.0] + [0.5] * 2 + [0.25] * 4 + [0.125] * 8)
        weight = (b["valid"] * level).flatten()
        images = patches.flatten(0, 1)
        v, t, slow_v, slow_t = m.encode_image(images), m.encode_text(ids), s.project(s.see(images)), F.normalize(s.text(ids)[1], dim=-1)
        tau, tau_cvta = (-m.itc_scale).exp().item(), (-m.cvta_scale).exp().item()
        queue = [array(torch.stack(x[-40:])) for x in old] if step else None
        expected = {"itc": itc_numpy(array(v), array(t), bag.numpy(), tau, array(weight), 0.3, (array(slow_v), array(slow_t)), queue, a)}
        for slots, rows in zip(old, (slow_v, slow_t, bag)):
            slots += list(rows[valid].detach())
        # what the fusion reads: one row at a time, no padding
        visual, slow_visual = m.visual_tokens(m.see(images)), s.visual_tokens(s.see(images))

        def fused(net, image, caption, prefix=None):
            seen = torch.ones(1, len(caption), dtype=torch.bool)
            return net.fuse_with_text(image[None], net.text(caption[None])[0], seen, prefix)[0]
        trimmed = [ids[r][: int((ids[r] == END).nonzero()[0]) + 1] for r in row]
        logp = lambda image, caption, match: -m.itm_head(fused(m, visual[image], caption)[-1]).log_softmax(0)[match].item()
        terms = [logp(row[k], trimmed[k], 1) for k in range(8) if valid[row[k]]]
        terms += [logp(row[(k - 2) % 8], trimmed[k], 0) for k in range(8) if valid[row[k]]]
        terms += [logp(row[k], trimmed[(k - 3) % 8], 0) for k in range(8) if valid[row[k]]]
        expected["itm"] = mean(terms)
        soft = lambda x, y, label: -((1 - a) * x.log_softmax(-1)[label] + a * (y.softmax(-1) * x.log_softmax(-1)).sum()).item()
        hidden, guessed = [], []
        for k in range(8):
            if valid[row[k]]:
                caption, T = trimmed[k], len(trimmed[k])
                asked = (caption < 40) & ((caption * 7 + torch.arange(T) * 5) % 3 == 0)
                masked = torch.where(asked, 42, caption)
                x, y = m.lm_logits(fused(m, visual[row[k]], masked)), s.lm_logits(fused(s, slow_visual[row[k]], masked))
                hidden += [soft(x[i], y[i], caption[i]) for i in range(T) if asked[i]]
                for i in range(1 + T // 3, T):  # a token is predicted by the one before it from nothing that follows, whatever the mask
                    known = torch.tensor([1 + T // 3])
                    x, y = (net.lm_logits(fused(net, picture[row[k]], caption[:i], known))[-1] for net, picture in ((m, visual), (s, slow_visual)))
                    guessed.append(soft(x, y, caption[i]))
        expected["mlm"], expected["plm"] = mean(hidden), mean(guessed)
        w = m.encode_text(b["keywords"])[b["bag_of"]]
        allowed = b["own"] | b["free"][:, :, None]
        expected["cvta"] = cvta_numpy(array(v.view(4, 15, -1)), array(w), 3, tau_cvta, array(weight.view(4, 15)), b["w_valid"].numpy(), allowed.numpy(), losses.NEAR,
                                       bound=(b["own"] & ~b["free"][:, :, None]).numpy())
        z = []
        for i in range(60):
            bag_no, cos = i // 15, w[i // 15] @ v[i]
            best = [k for k in cos.argsort(descending=True, stable=True).tolist() if b["w_valid"][bag_no, k] and allowed[bag_no, i % 15, k]][:3]
            z.append(m.fuse_with_keywords(visual[i][None], w[bag_no, best][None], torch.ones(1, len(best), dtype=torch.bool))[0])
        h, g = m.heads(torch.stack(z), valid)
        own = F.normalize(h, dim=-1), F.normalize(g.detach(), dim=-1)  # the stop-gradient
        pairs = {}
        for i in range(60):
            child, parent = i % 15, i - i % 15 + (i % 15 - 1) // 2
            if child and valid[i] and valid[parent]:
                pairs.setdefault((child + 1).bit_length(), []).append(-(own[0][parent] @ own[1][i] + own[0][i] @ own[1][parent]) / 2)
        mrtva = mean([mean(x) for x in pairs.values()])
        expected["mrtva"] = mrtva.item()
        assert {k: x.item() for k, x in got.items()} == pytest.approx(expected, rel=2e-5, abs=1e-5)
        for p in (m.heads.project[0].weight, m.heads.predict.weight, m.fuse_keyword.weight):
            mine, = torch.autograd.grad(got["mrtva"], p, retain_graph=True)
            theirs, = torch.autograd.grad(mrtva, p, retain_graph=True)
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)
        assert 0 <= monitor["blind"] < 1


# ---- what must change nothing -----------------------------------------------------------------------------------------

def values(batch_and_patches, cfg=None, **other):
    patches, batch = batch_and_patches
    parts, _ = Objective(small(), cfg or settings(alpha=0.4, queue=50, itm=0.0, **other))(batch | {"pixels": patches})  # ITM draws by position
    return {k: x.item() for k, x in parts.items()}


@pytest.mark.parametrize("select", ["cosine", "ema", "own"])
@pytest.mark.parametrize("negatives", ["bag", "batch"])
def test_padding_and_order_change_nothing(monkeypatch, select, negatives):
    fixed_draws(monkeypatch.setattr)
    same = dict(cvta_select=select, cvta_negatives=negatives, mrtva_pairs="ancestors")
    patches, batch = a_batch()
    expected = values((patches, batch), **same)
    close = lambda patches, batch: values((patches, batch), **same) == pytest.approx(expected, rel=2e-5, abs=2e-6)
    # what an invalid node shows and says
    noise, out = torch.rand_like(patches), ~batch["valid"]
    ids = batch["ids"].clone()
    ids[out] = ids[0, 0].clone()
    assert close(torch.where(out[..., None, None, None], noise, patches), batch | {"ids": ids})
    # tokens and keywords that only fill up
    blank = torch.tensor([40, END, 0, 0])
    assert close(patches, batch | {"ids": F.pad(batch["ids"], (0, 2)), "keywords": torch.cat([batch["keywords"], blank.repeat(5, 1)]),
                                   "bag_of": F.pad(batch["bag_of"], (0, 2)), "word": F.pad(batch["word"], (0, 2)),
                                   "w_valid": F.pad(batch["w_valid"], (0, 2)), "own": F.pad(batch["own"], (0, 2), value=True)})
    # the order of a bag's keywords, and of the bags
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert close(patches, batch | {k: batch[k][..., order] for k in ("bag_of", "word", "w_valid", "own")})
    turned = torch.tensor([2, 0, 3, 1])
    back = torch.argsort(turned)
    assert close(patches[turned], batch | {k: batch[k][turned] for k in ("valid", "ids", "bag_of", "word", "w_valid", "own", "free", "bag")}
                 | {"pairs": back[batch["pairs"] // 15] * 15 + batch["pairs"] % 15})
    # a bag without a valid node; it has keywords, which only "batch" would contrast with
    more, extra = a_batch(B=1, seed=9)
    assert close(torch.cat([patches, more]), {k: torch.cat([batch[k], extra[k]]) for k in ("ids", "own", "free")} | {
        "valid": torch.cat([batch["valid"], extra["valid"] & False]), "w_valid": torch.cat([batch["w_valid"], extra["w_valid"] & (negatives == "bag")]),
        "keywords": torch.cat([batch["keywords"], extra["keywords"]]), "bag_of": torch.cat([batch["bag_of"], extra["bag_of"] + 28]),
        "word": torch.cat([batch["word"], extra["word"]]), "bag": torch.cat([batch["bag"], torch.tensor([99])]), "pairs": batch["pairs"], "alpha": batch["alpha"], **{k: batch[k] for k in batch if k.startswith("lot")}})


def test_one_bag_and_no_keywords_still_train():
    patches, batch = a_batch(B=1)
    for other in ({}, {"w_valid": batch["w_valid"] & False}, {"valid": batch["valid"] & False}):
        for pairs in losses.PAIRS:
            objective = Objective(small(), settings(alpha=0.4, queue=7, mrtva_pairs=pairs))
            parts, monitor = objective(batch | other | {"pixels": patches})
            sum(parts.values()).backward()
            assert all(x.isfinite() for x in (*parts.values(), *monitor.values())), (other, pairs)
            assert all(p.grad is None or p.grad.isfinite().all() for p in objective.model.parameters())
            assert parts["itm"].item() == 0 and (parts["cvta"].item() == 0) == ("w_valid" in other or "valid" in other)


def test_nodes_hand_over_one_by_one():
    batches = Batches.__new__(Batches)
    batches.cfg = train.Config(steps=100, warm=0.6, hand=0.2)
    assert [round(batches._passed(step), 6) for step in (0, 59, 60, 65, 70, 80, 99)] == [0, 0, 0, 0.25, 0.5, 1, 1]
    batches.cfg = dataclasses.replace(batches.cfg, hand=0.0)
    assert [batches._passed(step) for step in (59, 60, 61)] == [0, 0, 1]
    batches.cfg = dataclasses.replace(batches.cfg, cvta_select="own")
    assert batches._passed(99) == 0


# ---- many processes ---------------------------------------------------------------------------------------------------

MANY = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import losses, test_objective as t
from objective import Objective
torch.set_num_threads(1)
out, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + out + "/group" + str(world), rank=rank, world_size=world)
for name, other in t.VARIANTS.items():
    objective = Objective(t.small(stem="conv").double(), t.settings(alpha=0.4, queue=97, **other))
    ddp = torch.nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.05)
    seen, n = [], 4 // world
    for step in range(3):
        patches, batch = t.a_batch(seed=step)
        mine = slice(rank * n, (rank + 1) * n)
        part = {{k: x[mine] for k, x in batch.items() if k not in ("alpha", "pairs") and k[:3] != "lot"}} | {{"alpha": batch["alpha"]}}
        part["keywords"], part["bag_of"] = batch["keywords"][part["bag_of"]].flatten(0, 1), torch.arange(n * 7).view(n, 7)
        part |= {{k: x[2 * rank * n : 2 * (rank + 1) * n] for k, x in batch.items() if k[:3] == "lot"}}
        part["pairs"] = batch["pairs"][2 * rank * n : 2 * (rank + 1) * n] - 15 * rank * n
        parts, _ = ddp(part | {{"pixels": patches[mine].double()}})  # double, so that what differs is not rounding
        optimizer.zero_grad()
        sum(parts.values()).backward()
        mean = losses.all_mean(torch.stack([x.detach() for x in parts.values()]))
        seen.append((dict(zip(parts, mean.tolist())), {{k: p.grad.clone() for k, p in objective.model.named_parameters() if p.grad is not None}}))
        optimizer.step()
        objective.follow()
    memory = {{k: x for k, x in objective.state_dict().items() if x.is_floating_point() or "queue" in k}}
    every = losses.gather(torch.cat([x.double().flatten() for x in memory.values()])[None])
    assert (every == every[0]).all(), "ranks differ"
    if rank == 0:
        torch.save((seen, memory), out + f"/{{name}}-{{world}}.pt")
dist.barrier()
dist.destroy_process_group()
"""
FORKS = """
import os, runpy, sys, traceback
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, objective, losses, test_objective
children = []
for world in (1, 2, 4):
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            try:
                sys.argv = ["many.py", sys.argv[1], str(rank), str(world)]
                runpy.run_path(sys.argv[1] + "/many.py")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
VARIANTS = {"batch": dict(cvta_negatives="batch", cvta_select="ema", mrtva_pairs="ancestors"), "bag": dict(cvta_negatives="bag", mrtva_pairs="levels")}


def test_any_number_of_processes_computes_the_same(tmp_path):
    """Losses, every parameter's gradient, momentum model, queues and batch statistics, over three steps of one, two and four processes."""
    (tmp_path / "many.py").write_text(MANY.format(root=str(ROOT)))
    (tmp_path / "forks.py").write_text(FORKS.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, tmp_path / "forks.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in VARIANTS:
        (one, memory), *others = (torch.load(tmp_path / f"{name}-{world}.pt", weights_only=True) for world in (1, 2, 4))
        for many, theirs in others:
            for step, ((expected, grads), (got, other)) in enumerate(zip(one, many)):
                assert got == pytest.approx(expected, rel=1e-7), (name, step)
                assert set(grads) == set(other) and len(grads) > 60
                assert not [k for k, x in grads.items() if (x - other[k]).norm() > 1e-6 * x.norm() + 1e-12], (name, step)
            assert not [k for k, x in memory.items() if not torch.allclose(x.double(), theirs[k].double(), atol=1e-8)], name


def test_two_threads_compute_the_same_bits_every_time():
    """A keyword stands in many bags, so its gradient is a sum over them, which must not depend on which thread comes first."""
    model, (images, batch) = small(), a_batch(B=32, K=150)
    batch = batch | {"pixels": images, "bag_of": torch.randint(0, 9, (32, 150), generator=torch.Generator().manual_seed(0))}
    objective, threads, found = Objective(model, dataclasses.replace(settings(jitter=0.0), bags=32)), torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for _ in range(8):
            model.zero_grad()
            sum(objective(batch)[0].values()).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], x) for x in found)
