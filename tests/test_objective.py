"""Hold how the losses hang on the networks: term by term, on any number of processes.

    pytest tests/test_objective.py

Also: what must change nothing, precision on a GPU, the batch that data.Batches documents, and a
seventh loss that a patch of a few lines adds.
"""

import ast
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import LOSSES
from test_losses import cvta_numpy, itc_numpy

import data
import losses
import model as networks
import text
import train

ROOT = Path(__file__).resolve().parent.parent
# Start id 40, end 41, [mask] 42.
END, VOCAB = 41, 43


def small(**vision):
    """Build a model of a few thousand parameters."""
    torch.manual_seed(0)
    vision = dict(size=32, patch=16, width=32, depth=1, heads=2) | vision
    tower = dict(context=12, width=16, depth=1, heads=2)
    fusion = dict(width=16, depth=2, heads=2, pool=1)
    return networks.MRPLIP(VOCAB, END, vision, tower, fusion, 16, (32, 16))


def settings(**other):
    """Return the Config of a batch of four bags of 15 nodes, all losses on."""
    sizes = dict(bags=4, children=2, k_o=3, keywords=7)
    return dataclasses.replace(train.Config(), **(sizes | other))


def small_objective(**other):
    """Build the objective of `small`, whose two temperatures differ."""
    objective = losses.Objective(small(), settings(**other))
    with torch.no_grad():
        objective.model.cvta_scale.fill_(2.0)
    return objective


def a_batch(B=4, N=15, K=7, seed=0):
    """Build a batch as data.Batches and data.to_device do, with patches [B, N, 3, 32, 32].

    Captions have unequal lengths, some nodes are invalid, some keywords padding, and one keyword is
    in two bags.
    """
    g = torch.Generator().manual_seed(seed)
    length, at = torch.randint(3, 10, (B, N, 1), generator=g), torch.arange(10)
    ids = torch.randint(0, 40, (B, N, 10), generator=g)
    ids = torch.where(at == 0, 40, ids)
    ids = torch.where(at == length - 1, END, ids)
    ids = torch.where(at >= length, 0, ids)
    # Keyword u is written as u in base 40.
    u = torch.arange(B * K + 3)
    keywords = torch.stack([u * 0 + 40, u % 40, u // 40 % 40, u * 0 + END], 1)
    bag_keywords = torch.arange(B * K).view(B, K)
    if B > 1:
        # The first keyword of the last bag is the second of the first bag.
        bag_keywords[-1] -= 1
        bag_keywords[-1, 0] = 1
    valid = torch.rand(B, N, generator=g) < 0.8
    valid[:, 0] = True
    w_valid = torch.rand(B, K, generator=g) < 0.8
    w_valid[-1, 0] = True
    sizes = torch.tensor([1, 2, 4, 8])
    real = torch.zeros(len(keywords), dtype=torch.bool)
    real[bag_keywords[w_valid]] = True
    pairs = torch.arange(B)[:, None] * N + torch.randint(0, N, (B, 2), generator=g)
    told = valid & (torch.arange(N) % 5 != 3)
    return {
        "patches": torch.rand(B, N, 3, 32, 32, generator=g),
        "bag": torch.arange(B) + 5,
        "nodes": data.sample_nodes(B, 2, g),
        "valid": valid,
        "told": told,
        "weight": valid / sizes.repeat_interleave(sizes),
        "ids": ids,
        "caption_rows": pairs.flatten(),
        "rand_mask": torch.rand(2 * B, 3, 13, generator=g),
        "rand_prefix": torch.rand(2 * B, generator=g),
        "rand_negative": torch.rand(2 * B, 2, generator=g),
        "keywords": keywords,
        "keyword_real": real,
        "bag_keywords": bag_keywords,
        "w_valid": w_valid,
        "own": (torch.rand(B, N, K, generator=g) < 0.4) & w_valid[:, None],
        "free": torch.rand(B, N, generator=g) < 0.5,
    }


def fix_draws(monkeypatch):
    """Make MLM's masks and PLM's prefixes functions of the caption, to compare row by row."""

    def corrupt(ids, real, mask_id, words, rand):
        chosen = real & asks(ids)
        return torch.where(chosen, mask_id, ids), torch.where(chosen, ids, -100)

    monkeypatch.setattr(losses, "corrupt", corrupt)
    monkeypatch.setattr(losses, "split_prefix", lambda real, rand: 1 + real.sum(1) // 3)


def asks(ids):
    """Choose a third of the words of ids [..., T] by their value and position."""
    return (ids < 40) & ((ids * 7 + torch.arange(ids.shape[-1]) * 5) % 3 == 0)


# --------------------------------------------------------------------------------------------------
# The whole, written down a second time: the networks one row at a time, the losses in NumPy


def array(x):
    """Turn a tensor into NumPy, in double precision where it holds numbers."""
    x = x.detach()
    return (x.double() if x.is_floating_point() else x).numpy()


def fuse_row(model, image, caption, prefix=None):
    """Run the fusion on one image [V, D] and one caption [T] without padding -> [T, D]."""
    seen = torch.ones(1, len(caption), dtype=torch.bool)
    return model.fuse_with_text(image[None], model.text(caption[None])[0], seen, prefix)[0]


def expected_itm(model, image, rows, captions, valid):
    """Average the log-likelihood of the pairs; wrong ones stand 2 and 3 rows away."""
    terms = []
    for k in range(8):
        cases = ((k, k, 1), (k - 2, k, 0), (k, k - 3, 0))
        for picture, caption, match in cases:
            if valid[rows[k]]:
                fused = fuse_row(model, image[rows[picture % 8]], captions[caption % 8])
                terms.append(-model.itm_head(fused[-1]).log_softmax(0)[match].item())
    return sum(terms) / len(terms)


def expected_words(model, image, rows, captions, valid):
    """Average MLM's and PLM's cross-entropies, token by token."""
    masked_terms, next_terms = [], []
    for row, caption in zip(rows.tolist(), captions, strict=True):
        if not valid[row]:
            continue
        masked = torch.where(asks(caption), 42, caption)
        log_p = model.lm_logits(fuse_row(model, image[row], masked)).log_softmax(-1)
        for i in asks(caption).nonzero()[:, 0]:
            masked_terms.append(-log_p[i, caption[i]].item())
        # A token is predicted from the ones before it, whatever the mask.
        known = torch.tensor([1 + len(caption) // 3])
        for i in range(int(known), len(caption)):
            log_p = model.lm_logits(fuse_row(model, image[row], caption[:i], known)[-1])
            next_terms.append(-log_p.log_softmax(-1)[caption[i]].item())
    return sum(masked_terms) / len(masked_terms), sum(next_terms) / len(next_terms)


def expected_mrtva(objective, b, v, w, image):
    """Compute MRTVA with loops, as a tensor that carries the gradient of the predictions only."""
    model, valid, allowed = objective.model, b["valid"].flatten(), b["own"] | b["free"][..., None]
    z = []
    for i in range(60):
        bag, node = divmod(i, 15)
        order = (w[bag] @ v[i]).argsort(descending=True, stable=True).tolist()
        best = [k for k in order if b["w_valid"][bag, k] and allowed[bag, node, k]][:3]
        ones = torch.ones(1, len(best), dtype=torch.bool)
        z.append(model.fuse_with_keywords(image[i][None], w[bag, best][None], ones)[0])
    h, g = objective.heads(torch.stack(z), valid)
    h, g = F.normalize(h, dim=-1), F.normalize(g.detach(), dim=-1)
    groups = {}
    for i in range(60):
        child, parent = i % 15, i - i % 15 + (i % 15 - 1) // 2
        if child and valid[i] and valid[parent]:
            agreement = (h[parent] @ g[i] + h[i] @ g[parent]) / 2
            groups.setdefault((child + 1).bit_length(), []).append(-agreement)
    return sum(torch.stack(x).mean() for x in groups.values()) / len(groups)


@pytest.mark.parametrize("negatives", ["bag", "batch"])
def test_the_objective_term_by_term(monkeypatch, negatives):
    fix_draws(monkeypatch)

    def shifted(v, t, bag, tau, valid, rand):
        return torch.arange(len(bag)).roll(2), torch.arange(len(bag)).roll(3), valid

    monkeypatch.setattr(losses, "hard_negatives", shifted)
    objective, b = small_objective(kin=0.3, negatives=negatives), a_batch()
    model, ids = objective.model, b["ids"].flatten(0, 1)
    got, _ = objective(b)
    images, bag = b["patches"].flatten(0, 1), b["bag"].repeat_interleave(15)
    v, t, w = model.encode_image(images), model.encode_text(ids), model.encode_text(b["keywords"])
    w = w[b["bag_keywords"]]
    tau, tau_cvta = (-model.itc_scale).exp().item(), (-model.cvta_scale).exp().item()
    # A node weighs 1 / the nodes of its magnification.
    weight = torch.tensor([1.0] + [0.5] * 2 + [0.25] * 4 + [0.125] * 8) * b["valid"]
    told = b["told"].flatten()
    itc_weight = array(weight.flatten() * told)
    expected = {"itc": itc_numpy(array(v), array(t), array(bag), tau, itc_weight, 0.3)}

    # The caption losses read their rows without padding.
    image, rows = model.to_fusion(model.vision_tokens(images)), b["caption_rows"]
    captions = [ids[r][: int((ids[r] == END).nonzero()[0]) + 1] for r in rows]
    expected["itm"] = expected_itm(model, image, rows, captions, told)
    expected["mlm"], expected["plm"] = expected_words(model, image, rows, captions, told)

    allowed, spared = b["own"] | b["free"][..., None], b["own"] & ~b["free"][..., None]
    args = [array(x) for x in (weight, b["w_valid"], allowed, spared)]
    args = [array(v.view(4, 15, -1)), array(w), 3, tau_cvta, *args, objective.cfg.near]
    word = array(b["bag_keywords"]) if negatives == "batch" else None
    expected["cvta"] = cvta_numpy(*args, word)
    mrtva = expected_mrtva(objective, b, v, w, image)
    expected["mrtva"] = mrtva.item()
    values = {name: x.item() for name, x in got.items()}
    assert values == pytest.approx(expected, rel=2e-5, abs=1e-5)
    assert list(values) == list(LOSSES)
    # The gradient of MRTVA does not see the target.
    heads = objective.heads
    for p in (heads.project[0].weight, heads.predict.weight, model.fuse_keyword.weight):
        (mine,) = torch.autograd.grad(got["mrtva"], p, retain_graph=True)
        (theirs,) = torch.autograd.grad(mrtva, p, retain_graph=True)
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_loss_of_weight_zero_is_not_computed(monkeypatch):
    batch = a_batch()
    everything, seen = small_objective()(batch)
    assert seen.keys() == {"tau", "std", "own", "chance"}
    assert not any(x.requires_grad for x in seen.values())
    for name in LOSSES:
        with monkeypatch.context() as patch:
            # plm calls mlm, so watch its masks.
            watched = "corrupt" if name == "mlm" else name
            patch.setattr(losses, watched, lambda *_: pytest.fail("nobody asked for this loss"))
            parts, seen = small_objective(**{name: 0.0})(batch)
        rest = {k: x.item() for k, x in everything.items() if k != name}
        assert {k: x.item() for k, x in parts.items()} == rest
        assert ("std" in seen) == (name != "mrtva")
    # Without the losses that read captions or keywords the fusion is not run.
    only = dict(itm=0.0, mlm=0.0, plm=0.0, mrtva=0.0)
    objective = small_objective(**only)
    monkeypatch.setattr(objective.model, "fuse", lambda *_: pytest.fail("nobody reads this"))
    assert objective(batch)[0].keys() == {"itc", "cvta"}


def test_every_parameter_learns():
    objective = small_objective()
    sum(objective(a_batch())[0].values()).backward()
    still = [name for name, p in objective.named_parameters() if p.grad is None]
    # The first layer of the text tower reads all ids; nothing stands still.
    assert not still


def test_features_of_a_frozen_tower_stand_for_its_pixels():
    objective, batch = small_objective(freeze_vision=True), a_batch()
    train.freeze(objective.model.vision, "cpu")
    assert not objective.train().model.vision.training and objective.model.fusion.training
    with torch.no_grad():
        tokens = objective.model.vision_tokens(batch["patches"].flatten(0, 1))
    cached = {k: x for k, x in batch.items() if k != "patches"}
    cached["tokens"] = tokens.view(4, 15, *tokens.shape[1:])
    (parts, _), (same, _) = objective(batch), objective(cached)
    assert {k: x.item() for k, x in parts.items()} == {k: x.item() for k, x in same.items()}
    sum(parts.values()).backward()
    assert all(p.grad is None for p in objective.model.vision.parameters())
    assert objective.model.proj.weight.grad is not None


# --------------------------------------------------------------------------------------------------
# What must change nothing


def values_of(batch, **other):
    """Return all losses but ITM, whose negatives are drawn by position."""
    parts, _ = small_objective(itm=0.0, **other)(batch)
    return {name: x.item() for name, x in parts.items()}


def without_a_valid_node(batch):
    """Append a bag that has captions and no tissue; the table of keywords is left alone."""
    extra, out = a_batch(B=1, seed=9), dict(batch)
    extra["valid"] = extra["valid"] & False
    extra["told"], extra["weight"] = extra["valid"], extra["weight"] * 0
    extra["bag_keywords"], extra["bag"] = batch["bag_keywords"][:1], torch.tensor([99])
    for name in per_bag(batch):
        out[name] = torch.cat([batch[name], extra[name]])
    return out


def per_bag(batch):
    """List what a batch holds a row a bag of."""
    names = "patches bag nodes valid told weight ids bag_keywords w_valid own free".split()
    return [name for name in names if name in batch]


@pytest.mark.parametrize("negatives", ["bag", "batch"])
def test_padding_and_order_change_nothing(monkeypatch, negatives):
    fix_draws(monkeypatch)
    batch = a_batch()
    expected = pytest.approx(values_of(batch, negatives=negatives), rel=2e-5, abs=2e-6)

    def same(**changed):
        return values_of(batch | changed, negatives=negatives) == expected

    # What an invalid node shows and says.
    out, ids = ~batch["valid"], batch["ids"].clone()
    ids[out] = ids[0, 0].clone()
    noise = torch.rand_like(batch["patches"])
    assert same(patches=torch.where(out[..., None, None, None], noise, batch["patches"]), ids=ids)
    # What a node says that has no caption.
    assert same(ids=torch.where(batch["told"][..., None], batch["ids"], ids[0, 0]))
    # Tokens and keywords that only fill up.
    blank = torch.tensor([40, END, 0, 0]).repeat(5, 1)
    more = {"ids": F.pad(batch["ids"], (0, 2)), "own": F.pad(batch["own"], (0, 2), value=True)}
    more["keywords"] = torch.cat([batch["keywords"], blank])
    more["keyword_real"] = F.pad(batch["keyword_real"], (0, 5))
    for name in ("bag_keywords", "w_valid"):
        more[name] = F.pad(batch[name], (0, 2))
    assert same(**more)
    # The order of a bag's keywords, and of the table.
    g = torch.Generator().manual_seed(1)
    order, table = torch.randperm(7, generator=g), torch.randperm(31, generator=g)
    turned = {name: batch[name][..., order] for name in ("bag_keywords", "w_valid", "own")}
    turned["bag_keywords"] = torch.argsort(table)[turned["bag_keywords"]]
    for name in ("keywords", "keyword_real"):
        turned[name] = batch[name][table]
    assert same(**turned)
    # The order of the bags.
    order = torch.tensor([2, 0, 3, 1])
    turned = {name: batch[name][order] for name in per_bag(batch)}
    bag, node = batch["caption_rows"] // 15, batch["caption_rows"] % 15
    assert same(caption_rows=torch.argsort(order)[bag] * 15 + node, **turned)
    assert same(**without_a_valid_node(batch))


def test_one_bag_and_no_keywords_still_train():
    batch = a_batch(B=1)
    nothing = {"w_valid": batch["w_valid"] & False, "own": batch["own"] & False}
    no = batch["valid"] & False
    no_tissue = {"valid": no, "told": no, "weight": batch["weight"] * 0}
    for other in ({}, nothing, no_tissue):
        objective = small_objective()
        parts, seen = objective(batch | other)
        sum(parts.values()).backward()
        assert all(x.isfinite() for x in (*parts.values(), *seen.values()))
        for p in objective.parameters():
            assert p.grad is None or p.grad.isfinite().all()
        assert parts["itm"].item() == 0 and (parts["cvta"].item() == 0) == bool(other)


# --------------------------------------------------------------------------------------------------
# Precision on a GPU, played by autocast on the CPU


def test_a_frozen_tower_keeps_its_residual_stream_in_fp32():
    objective = small_objective(freeze_vision=True)
    vision = objective.model.vision
    exact = vision(a_batch()["patches"][0])
    train.freeze(vision, "cuda")
    # Matrices are cast once; class token, positions and norms are not.
    for name, p in vision.named_parameters():
        matrix = any(part in name for part in ("patch_embed", "qkv", "proj", "fc1", "fc2"))
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert not p.requires_grad
    streams = []
    for block in vision.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = vision(a_batch()["patches"][0])
    assert set(streams) == {torch.float32} and tokens.dtype == torch.float32
    assert (tokens - exact).norm() < 0.01 * exact.norm()


def test_augmentation_is_exact_under_autocast():
    g = torch.Generator().manual_seed(0)
    batch = {
        "pixels": torch.randint(0, 256, (2, 3, 128, 128), generator=g).to(torch.uint8),
        "nodes": data.sample_nodes(2, 4, g),
        "flips": torch.tensor([3, 6]),
        "stain": torch.rand(2, 2, 3, generator=g),
    }
    exact = data.augment(batch, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.augment(batch, 0.2), exact)
    assert exact.dtype == torch.float32


def test_losses_under_autocast_are_close_and_fp32():
    objective, batch = small_objective(), a_batch()
    exact, _ = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        parts, seen = objective(batch)
    for name, x in (parts | seen).items():
        assert x.dtype == torch.float32, name
    for name, x in parts.items():
        assert x.item() == pytest.approx(exact[name].item(), abs=0.05), name


# --------------------------------------------------------------------------------------------------
# The batch that data.Batches documents


class ToyBags:
    """Stand in for data.Bags: six bags of patches of 32 px."""

    S = 32

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.keys = [f"slide-{i:02d}" for i in range(6)]
        self.valid = torch.rand(6, data.NODES, generator=g) < 0.8
        self.images = torch.randint(0, 256, (6, 3, 256, 256), generator=g).to(torch.uint8)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"image": self.images[i], "valid": self.valid[i]}


def toy_batches(**other):
    """Build data.Batches of ToyBags with captions of few words."""
    words = "mucin,large nuclei,spindle cells,necrosis,sheets of lymphocytes".split(",")
    captions = {}
    for i, key in enumerate(ToyBags().keys):
        said = [f"there are {words[(i + n) % 5]} and {words[(i * n) % 4]}." for n in range(85)]
        captions[key] = said
    tokenizer = text.Tokenizer.train(words * 3, 530)
    corpus = text.count_corpus(captions["slide-00"])
    cfg = settings(jitter=0.2, pairs=2.0, **other)
    return data.Batches(ToyBags(), captions, tokenizer, corpus, cfg, 24)


KINDS = {"uint8": torch.uint8, "float16": torch.float16, "bool": torch.bool}


def documented():
    """Read the table in the docstring of data.Batches -> {name: (dimensions, type or "")}."""
    pattern = r"(\w+)\s+\[([^\]]+)\](?: (uint8|float16|bool)\b)?"
    found = re.findall(pattern, data.Batches.__doc__)
    return {name: (dims.split(", "), kind) for name, dims, kind in found}


def check_documented(batch, sizes):
    """Compare the shapes and types of a batch with the docstring; sizes: letter -> number."""
    table = documented()
    for name, x in batch.items():
        dims, kind = table[name]
        # Captions and keywords have each their own number of tokens T.
        letters = sizes | {"T": x.shape[-1]}
        shape = [eval(dim.replace("8S", "8 * S"), {}, letters) for dim in dims]
        assert list(x.shape) == shape, name
        assert not kind or x.dtype == KINDS[kind], name


def test_the_docstring_of_batches_is_true():
    batches = toy_batches()
    real = batches[0]
    sizes = dict(B=4, N=15, M=8, K=7, S=32, context=24, U=len(real["keywords"]))
    check_documented(real, sizes)
    assert not documented().keys() - real.keys() - {"tokens", "patches"}
    # The batch of these tests is one of them.
    toy = a_batch()
    check_documented(toy, sizes | dict(context=12, U=len(toy["keywords"])))
    assert toy.keys() == (real.keys() | {"patches"}) - {"pixels", "flips", "stain"}
    for name in toy.keys() - {"patches"}:
        assert toy[name].dtype == real[name].dtype, name
    share = torch.tensor([1.0] + [1 / 2] * 2 + [1 / 4] * 4 + [1 / 8] * 8)
    for batch in (real, toy):
        assert torch.equal(batch["weight"], share * batch["valid"])
    # What the loader promises: each keyword once, and none that is not real.
    for batch in (real, toy):
        used = batch["bag_keywords"][batch["w_valid"]]
        assert batch["keyword_real"][used].all()
        distinct = batch["keywords"][batch["keyword_real"]]
        assert len(distinct.unique(dim=0)) == len(distinct)
        assert not (batch["own"] & ~batch["w_valid"][:, None]).any()


def test_a_batch_of_the_loader_goes_through_the_objective():
    batches = toy_batches()
    batch = data.to_device(batches[0], batches.cfg, "cpu")
    assert batch["patches"].shape == (4, 15, 3, 32, 32)
    tokenizer = batches.tokenizer
    model = small()
    torch.manual_seed(0)
    model.text = networks.TextTower(tokenizer.size, tokenizer.end, 24, 16, 1, 2, 16)
    model.lm_head = nn.Linear(16, tokenizer.size)
    parts, seen = losses.Objective(model, batches.cfg)(batch)
    assert list(parts) == list(LOSSES)
    assert all(x.isfinite() for x in (*parts.values(), *seen.values()))


@pytest.mark.parametrize("name", ["flips", "stain"])
def test_each_draw_of_the_augmentation_is_used(name):
    batches = toy_batches()
    batch = batches[0]
    fewer = {k: x for k, x in batch.items() if k != name}
    patches = data.to_device(batch, batches.cfg, "cpu")["patches"]
    assert not torch.equal(data.to_device(fewer, batches.cfg, "cpu")["patches"], patches)


# --------------------------------------------------------------------------------------------------
# Many processes

VARIANTS = {"batch": dict(negatives="batch"), "bag": dict(negatives="bag", balance=False)}


def part_of(batch, rank, world, negatives):
    """Cut out what process `rank` of `world` gets of a batch of four bags."""
    n = 4 // world
    mine, rows = slice(rank * n, rank * n + n), slice(2 * rank * n, 2 * (rank + 1) * n)
    part = dict(batch)
    for name in per_bag(batch):
        part[name] = batch[name][mine]
    for name in ("rand_mask", "rand_prefix", "rand_negative", "caption_rows"):
        part[name] = batch[name][rows]
    part["caption_rows"] = part["caption_rows"] - 15 * rank * n
    if negatives == "bag":
        # The loader then counts only the keywords of its own bags.
        part["keywords"] = batch["keywords"][part["bag_keywords"]].flatten(0, 1)
        part["bag_keywords"] = torch.arange(n * 7).view(n, 7)
        part["keyword_real"] = torch.ones(n * 7, dtype=torch.bool)
    # In double precision what differs is not rounding.
    part["patches"] = part["patches"].double()
    return part


def train_in_a_group(out, rank, world):
    """Train two steps of each variant as one process of several; rank 0 saves what it saw."""
    torch.set_num_threads(1)
    group = dict(init_method=f"file://{out}/group{world}", rank=rank, world_size=world)
    dist.init_process_group("gloo", **group)
    for name, other in VARIANTS.items():
        objective = losses.Objective(small(stem="conv"), settings(**other)).double()
        ddp = nn.parallel.DistributedDataParallel(
            objective,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=True,
            find_unused_parameters=True,
        )
        optimizer, seen = torch.optim.SGD(objective.parameters(), lr=0.05), []
        for step in range(2):
            parts, _ = ddp(part_of(a_batch(seed=step), rank, world, other["negatives"]))
            optimizer.zero_grad()
            sum(parts.values()).backward()
            mean = losses.all_mean(torch.stack([*parts.values()]))
            named = objective.named_parameters()
            grads = {k: p.grad.clone() for k, p in named if p.grad is not None}
            seen.append((dict(zip(parts, mean.tolist(), strict=True)), grads))
            optimizer.step()
        state = {k: x.double() for k, x in objective.state_dict().items()}
        every = losses.gather(torch.cat([x.flatten() for x in state.values()])[None])
        assert (every == every[0]).all(), "ranks differ"
        if rank == 0:
            torch.save((seen, state), f"{out}/{name}-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_any_number_of_processes_computes_the_same(tmp_path):
    """Losses, every parameter's gradient and batch statistics, over two steps of 1, 2 and 4."""
    children = []
    for world, rank in ((1, 0), (2, 0), (2, 1), *((4, rank) for rank in range(4))):
        children.append(os.fork())
        if not children[-1]:
            try:
                train_in_a_group(tmp_path, rank, world)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 7
    for name in VARIANTS:
        seen, state = torch.load(tmp_path / f"{name}-1.pt", weights_only=True)
        for world in (2, 4):
            other, theirs = torch.load(tmp_path / f"{name}-{world}.pt", weights_only=True)
            for (one, grads), (many, same) in zip(seen, other, strict=True):
                assert many == pytest.approx(one, rel=1e-7), (name, world)
                assert grads.keys() == same.keys() and len(grads) > 60
                for key, x in grads.items():
                    assert (x - same[key]).norm() <= 1e-6 * x.norm() + 1e-12, (name, world, key)
            for key, x in state.items():
                assert torch.allclose(x, theirs[key], atol=1e-8), (name, world, key)


def test_two_threads_compute_the_same_bits_every_time():
    """A keyword is in many bags; its gradient must not depend on the order of threads."""
    batch, found = a_batch(B=32, K=150), []
    g = torch.Generator().manual_seed(0)
    batch["bag_keywords"] = torch.randint(0, 9, (32, 150), generator=g)
    batch["keywords"], batch["keyword_real"] = batch["keywords"][:9], torch.ones(9).bool()
    only = dict(itc=0.0, itm=0.0, mlm=0.0, plm=0.0, negatives="bag")
    objective, threads = small_objective(**only), torch.get_num_threads()
    with torch.no_grad():
        tokens = objective.model.vision_tokens(batch.pop("patches").flatten(0, 1))
    batch["tokens"] = tokens.view(32, 15, *tokens.shape[1:])
    try:
        torch.set_num_threads(2)
        for _ in range(5):
            objective.zero_grad()
            sum(objective(batch)[0].values()).backward()
            grads = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
            found.append(torch.cat(grads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], x) for x in found)


# --------------------------------------------------------------------------------------------------
# A seventh loss: what a reader does who wants one more

SEVENTH = """\
--- a/losses.py
+++ b/losses.py
@@ -380,1 +380,14 @@
+@in_fp32
+def uniformity(v, weight, t=2.0):
+    \"\"\"Spread images over the sphere (Wang & Isola 2020).
+
+        L = log mean_ij exp(-t |v_i - v_j|^2)
+
+    v [M, d] embeddings, L2-normalised; weight [M] mask or weights. Returns a scalar <= 0.
+    \"\"\"
+    pair = weight[:, None] * weight[None, :]  # [M, M]
+    kernel = torch.exp(-t * (2 - 2 * v @ v.T))  # [M, M]
+    return ((kernel * pair).sum() / pair.sum().clamp(min=1e-6)).clamp(min=1e-6).log()
+
+
 class Objective(nn.Module):
@@ -430,1 +444,3 @@
+        if cfg.uniformity:
+            out["uniformity"] = uniformity(v, batch["weight"].flatten())
         if cfg.itm or cfg.mlm or cfg.plm or cfg.mrtva:
--- a/train.py
+++ b/train.py
@@ -80,2 +80,3 @@
     mrtva: float = 1.0  # parents and children agree [1]
+    uniformity: float = 0.1  # images spread over the sphere
     k_o: int = 4  # keywords selected per patch
"""


def definitions(path):
    """Map the names of a file's functions, methods and plain classes to their source lines."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        methods = [x for x in getattr(node, "body", ()) if isinstance(x, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef) and methods:
            for method in methods:
                name = f"{node.name}.{method.name}"
                found[name] = ast.get_source_segment(source, method).splitlines()
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = ast.get_source_segment(source, node).splitlines()
    return found


def patched_copy(folder):
    """Copy the chapters into a folder and apply the patch there."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    # Outside of any repository, so that git takes the folder as it is.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--verbose", "-"]
    more = dict(input=SEVENTH, text=True, capture_output=True, env=env)
    done = subprocess.run(command, cwd=folder, **more)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_seventh_loss_is_one_function_one_call_and_one_field(tmp_path, monkeypatch):
    patched_copy(tmp_path)
    # The patch adds lines to two files and takes none away.
    assert not [line for line in SEVENTH.splitlines() if re.match("-(?!--)", line)]
    for path in ROOT.glob("*.py"):
        touched = path.read_text() != (tmp_path / path.name).read_text()
        assert touched == (path.name in ("losses.py", "train.py"))
    before, after = definitions(ROOT / "losses.py"), definitions(tmp_path / "losses.py")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"uniformity", "Objective.forward"}
    assert len(after["Objective.forward"]) == len(before["Objective.forward"]) + 2
    before, after = definitions(ROOT / "train.py"), definitions(tmp_path / "train.py")
    assert {name for name in after if after[name] != before[name]} == {"Config"}
    assert len(after["Config"]) == len(before["Config"]) + 1

    # Import the copies in place of the originals.
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("losses", "train"):
        monkeypatch.delitem(sys.modules, name)
    new_losses, new_train = importlib.import_module("losses"), importlib.import_module("train")
    assert Path(new_losses.__file__).parent == tmp_path == Path(new_train.__file__).parent
    # The field is a flag. All seven losses are returned, and the seventh has a gradient.
    assert new_train.parse(["--uniformity", "0.5"]).uniformity == 0.5
    cfg = dataclasses.replace(new_train.parse([]), bags=4, children=2, k_o=3, keywords=7)
    objective, batch = new_losses.Objective(small(), cfg), a_batch()
    assert set(objective(batch)[0]) == {*LOSSES, "uniformity"}
    # Weight 0 removes a loss: train on the seventh alone.
    for name in LOSSES:
        setattr(cfg, name, 0.0)
    optimizer, history = new_train.make_optimizer(objective, cfg), []
    for _ in range(10):
        parts, _ = objective(batch)
        optimizer.zero_grad()
        sum(getattr(cfg, name) * part for name, part in parts.items()).backward()
        optimizer.step()
        history.append(parts["uniformity"].item())
    assert set(parts) == {"uniformity"} and history[-1] < history[0] - 0.2
    for name in LOSSES:
        setattr(cfg, name, 1.0)
    cfg.uniformity = 0.0
    assert set(objective(batch)[0]) == set(LOSSES)
