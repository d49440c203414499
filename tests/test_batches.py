"""pytest tests/test_batches.py — what a step sees, and what is left of a run."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import data
import losses
import runs
import text
import train
from batches import Batches, augment


@pytest.fixture(scope="module")
def parts(world):
    bags = data.BagDataset(world / "train")
    return bags, text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)


def test_batches_depend_on_the_step_alone_and_cover_an_epoch(world):
    cfg = train.parse(["--bags", "4"])
    bags = data.BagDataset(world / "train")
    tokenizer = text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    one, again = Batches(bags, tokenizer, cfg, 64)[3], Batches(bags, tokenizer, cfg, 64)[3]
    assert all(torch.equal(one[k], again[k]) for k in one)
    halves = [Batches(bags, tokenizer, cfg, 64, rank, 2) for rank in (0, 1)]
    order = [h._at((i * 2 + r) * 2 + j) for i in range(len(bags) // 4) for r, h in enumerate(halves) for j in range(2)]
    assert len(set(order)) == len(order) and len(order) > len(bags) - 4  # both ranks together: no bag twice in an epoch
    assert torch.equal(one["bag"], torch.tensor([Batches(bags, tokenizer, cfg, 64)._at(12 + j) for j in range(4)]))
    shared = {w.item() for w in one["word"][0][one["w_valid"][0]]} & {w.item() for w in one["word"][1][one["w_valid"][1]]}
    said = lambda b: {tuple(one["keywords"][k].tolist()) for k in one["bag_of"][b][one["w_valid"][b]]}
    assert len(shared) == len(said(0) & said(1)) > 0  # equal numbers stand for equal keywords
    ramp = [Batches(bags, tokenizer, train.parse(["--bags", "4", "--alpha", "0.4", "--accumulate", "2"]), 64)[i]["alpha"].item() for i in (0, 1, 2, 1000)]
    assert ramp == pytest.approx([0, 0, 0.4 * 4 / len(bags), 0.4])  # over the first epoch
    own = one["own"]  # a keyword owned by a node stands in its caption
    words = [tokenizer.decode(k.tolist()) for k in one["keywords"]]
    b, n, k = own.nonzero()[0].tolist()
    assert words[one["bag_of"][b, k]].split()[0][:4] in tokenizer.decode(one["ids"][b, n].tolist())


def test_scale_jitter_enlarges_squares_of_a_bag(world):
    bags = data.BagDataset(world / "train")
    tokenizer = text.Tokenizer.train([c for i in range(len(bags)) for c in bags.captions(i) if c], 600)
    still = ["--bags", "4", "--turns", "false", "--jitter", "0"]
    plain, again, zoomed = (Batches(bags, tokenizer, train.parse(still + ["--scale_jitter", s]), 64)[3] for s in ("0", "0", "0.5"))
    assert torch.equal(plain["pixels"], again["pixels"]) and "window" not in plain
    cuda = dataclasses.replace(train.parse(still + ["--scale_jitter", "0.5"]), device="cuda")             # leaves the cutting to the device
    window = Batches(bags, tokenizer, cuda, 64)[3]["window"]
    side, corner = window[:, :1], window[:, 1:]
    assert (side >= 0.5).all() and (side < 1).all() and (corner >= 0).all() and (corner + side <= 1).all()
    assert zoomed["pixels"].shape == plain["pixels"].shape and not torch.equal(zoomed["pixels"], plain["pixels"])
    b = int(side.argmin())  # the enlarged parent is that square of the bag
    i = Batches(bags, tokenizer, train.parse(["--bags", "4"]), 64)._at(3 * 4 + b)
    n, image = 8 * bags.S, bags[i]["image"].float()
    s, y, x = (int(round(v * n)) for v in window[b].tolist())
    want = torch.nn.functional.interpolate(image[None, :, y:y + s, x:x + s], size=(bags.S, bags.S), mode="area")[0] / 255
    assert (zoomed["pixels"][b, 0] - want).abs().mean() < 0.02 < (plain["pixels"][b, 0] - want).abs().mean()
    with pytest.raises(ValueError, match="scale_jitter"):
        train.parse(["--scale_jitter", "1"])


def test_global_batch_of_level_sizes():
    assert losses.level_sizes(85, 4) == [1, 4, 16, 64] and losses.level_sizes(4, 1) == [1, 1, 1, 1]


@pytest.mark.parametrize("children, pairs", [("1", "0.5"), ("2", "4")])
def test_the_processes_of_a_batch_have_together_what_one_would(parts, children, pairs):
    """Rows in rank order, whatever the number of processes: nothing in a batch depends on it."""
    bags, tokenizer = parts
    cfg = train.parse(["--bags", "8", "--children", children, "--pairs", pairs, "--alpha", "0.4", "--warm", "0", "--hand", "1", "--steps", "9", "--scale_jitter", "0.3"])
    whole = Batches(bags, tokenizer, cfg, 64)[5]
    N = whole["nodes"].shape[1]
    for world in (2, 4):
        shares = [Batches(bags, tokenizer, cfg, 64, rank, world)[5] for rank in range(world)]
        for k in ("bag", "nodes", "valid", "turns", "stain", "pixels", "free", "own", "w_valid", "word", "lot_mask", "lot_prefix", "lot_negative"):
            assert torch.equal(torch.cat([s[k] for s in shares]), whole[k]), k
        assert torch.equal(torch.cat([s["pairs"] + r * 8 // world * N for r, s in enumerate(shares)]), whole["pairs"])
        assert all(s["ids"].shape[2] == 64 for s in shares)                            # of one length, for they are exchanged
        assert torch.equal(torch.cat([s["ids"][..., : whole["ids"].shape[2]] for s in shares]), whole["ids"])
    level = data.level(whole["nodes"].flatten()[whole["pairs"]])
    assert [(level == k).sum().item() for k in range(4)] == [len(level) // 4] * 4      # magnifications in turn


def test_augmentation_on_the_device_is_that_of_the_loader(parts):
    bags, tokenizer = parts
    cfg = train.parse(["--bags", "4", "--children", "2"])
    batch = Batches(bags, tokenizer, cfg, 64)[1]
    whole = Batches(bags, tokenizer, dataclasses.replace(cfg, device="cuda"), 64)[1]
    assert whole["pixels"].dtype == torch.uint8 and batch["pixels"].is_floating_point()
    assert torch.allclose(augment(batch, cfg.jitter), augment(whole, cfg.jitter), atol=1e-6)
    plain = Batches(bags, tokenizer, train.parse(["--bags", "4", "--children", "2", "--turns", "false", "--jitter", "0"]), 64)[1]
    assert torch.equal(augment(plain, 0.0), plain["pixels"]) and torch.equal(plain["pixels"], batch["pixels"])


def test_one_bag_is_cut_without_waiting_for_the_device():
    """Read back on the host, its node numbers would stop a GPU at each step; on the meta device there is nothing to read."""
    whole = torch.empty(1, 3, 128, 128, dtype=torch.uint8, device="meta")
    assert data.pyramid(whole, nodes=torch.empty(1, 15, dtype=torch.long, device="meta")).shape == (1, 15, 3, 16, 16)


def test_augmentation_keeps_its_digits_under_autocast(parts):
    bags, tokenizer = parts
    cfg = train.parse(["--bags", "4", "--children", "2", "--scale_jitter", "0.3"])
    whole = Batches(bags, tokenizer, dataclasses.replace(cfg, device="cuda"), 64)[1]
    exact = augment(whole, cfg.jitter)
    with torch.autocast("cpu", torch.bfloat16):
        patches = augment(whole, cfg.jitter)
    assert patches.dtype == torch.float32 and torch.equal(patches, exact)
    assert len(patches[:, 0].unique()) > 5000                                          # bf16 has some 200 numbers for a patch


def test_bags_kept_in_memory_change_nothing(parts):
    bags, tokenizer = parts
    cfg, decoded = train.parse(["--bags", "4", "--children", "2", "--steps", "9"]), []

    class Counted(data.BagDataset):
        def __getitem__(self, i):
            decoded.append(i)
            return super().__getitem__(i)

    counted, size = Counted(bags.folder), sum(x.nbytes for x in data.levels(bags[0]["image"][None]))
    for ram, number in ((2.0, len(bags)), (2.5 * size / 1e9, 2), (0, 0)):              # all bags, two of them, none
        decoded.clear()
        kept = Batches(counted, tokenizer, dataclasses.replace(cfg, ram=ram), 64)
        for i in range(9):
            assert all(torch.equal(x, Batches(bags, tokenizer, dataclasses.replace(cfg, ram=0), 64)[i][k]) for k, x in kept[i].items())
        visits = [kept._at(k) for k in range(36)]
        assert len(kept.kept) == min(number, len(set(visits))) and len(decoded) == 36 - sum(visits.count(i) - 1 for i in kept.kept)
        assert sum(x.nbytes for bag in kept.kept.values() for x in bag) <= ram * 1e9


def test_the_log_of_a_killed_run_reads_as_one(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"started": "x", "step": 0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "val_loss": 9.0}\n{"step": 3, "lo')
    with runs.open_log(tmp_path) as f:
        f.write('{"started": "x", "step": 1}\n{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 1.5}\n')
    assert runs.read_log(tmp_path) == {"loss": ([1, 2, 3], [3.0, 2.5, 1.5]), "val_loss": ([2], [9.0])}
    runs.draw_curves([tmp_path, tmp_path], tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    blue = (np.abs(picture - [0xC8, 0x50, 0x1E]).sum(2) < 30).nonzero()               # the second run's line, drawn over the first's
    assert len(blue[0]) > 100 and blue[1].max() - blue[1].min() > 150                 # across its panel
