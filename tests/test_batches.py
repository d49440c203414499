"""Test what a step sees: pytest tests/test_batches.py"""

import dataclasses
import json

import numpy as np
import pytest
import torch

import data
import text
import train


@pytest.fixture(scope="module")
def parts(world):
    """Bags, captions, tokenizer and corpus of the tiny world."""
    bags, captions = data.Bags(world / "train"), text.Captions(world / "train")
    corpus = data.count_keywords(bags, captions)
    spoken = [c for key in bags.keys for c in captions[key] if c]
    return bags, captions, text.Tokenizer.train(spoken, 600), corpus


def build(parts, *argv, rank=0, world=1):
    return data.Batches(*parts, train.parse(["--bags", "4", *argv]), 64, rank, world)


def test_a_batch_depends_on_its_number_alone_and_an_epoch_covers_all_bags(parts):
    bags = parts[0]
    one, again = build(parts)[3], build(parts)[3]
    assert all(torch.equal(one[k], again[k]) for k in one)
    # Both ranks together see no bag twice in an epoch.
    halves = [build(parts, rank=rank, world=2) for rank in (0, 1)]
    seen = []
    for i in range(len(bags) // 4):
        for half in halves:
            seen += half[i]["bag"].tolist()
    assert len(set(seen)) == len(seen) == len(bags) // 4 * 4
    other = build(parts, "--seed", "1")[3]
    assert not torch.equal(other["stain"], one["stain"])


def test_batch_has_the_documented_shapes(parts):
    cfg = ["--children", "2", "--pairs", "2", "--keywords", "9"]
    batch = build(parts, *cfg)[0]
    B, N, K, M, S = 4, 15, 9, 8, 64
    T, U = batch["ids"].shape[2], len(batch["keywords"])
    shapes = {
        "pixels": (B, 3, 8 * S, 8 * S), "flips": (B,), "stain": (B, 2, 3), "bag": (B,),
        "nodes": (B, N), "valid": (B, N), "told": (B, N), "weight": (B, N), "ids": (B, N, T),
        "caption_rows": (M,),
        "rand_mask": (M, 3, 65), "rand_prefix": (M,), "rand_negative": (M, 2),
        "keywords": (U, batch["keywords"].shape[1]), "keyword_real": (U,),
        "bag_keywords": (B, K), "w_valid": (B, K), "own": (B, N, K), "free": (B, N),
    }  # fmt: skip
    assert {k: tuple(x.shape) for k, x in batch.items()} == shapes
    assert batch["pixels"].dtype == torch.uint8 and U % 64 == 0
    assert all(name in data.Batches.__doc__ for name in shapes)


def test_keywords_are_those_of_the_captions(parts):
    bags, captions, tokenizer, corpus = parts
    batch = build(parts)[1]
    words = []
    for ids in batch["keywords"].tolist():
        words.append(tokenizer.decode(ids[: ids.index(tokenizer.end)]))
    real = batch["keyword_real"]
    assert len(set(words[: int(real.sum())])) == int(real.sum()) and not any(words[real.sum() :])
    for b, i in enumerate(batch["bag"].tolist()):
        bag = text.keyword_bag(captions[bags.keys[i]], 24, corpus)
        listed = [words[u] for u in batch["bag_keywords"][b][batch["w_valid"][b]]]
        assert listed == [" ".join(text.split_words(k)) for k in bag]
        # A keyword that a node owns stands in the node's caption.
        for n, k in batch["own"][b].nonzero().tolist():
            said = captions[bags.keys[i]][batch["nodes"][b, n]]
            assert text.same(bag[k]) in {text.same(found) for found in text.keywords(said)}


def test_weights_give_each_magnification_or_each_node_the_same(parts):
    batch = build(parts, "--children", "2")[0]
    level = torch.from_numpy(data.LEVEL)[batch["nodes"]]
    size = torch.tensor([1.0, 2, 4, 8])[level]
    assert torch.equal(batch["weight"], batch["valid"] / size)
    plain = build(parts, "--children", "2", "--balance", "false")[0]
    assert torch.equal(plain["weight"], plain["valid"].float())


@pytest.mark.parametrize("negatives", ["bag", "batch"])
@pytest.mark.parametrize("children, pairs", [("1", "0.5"), ("2", "4")])
def test_processes_have_together_what_one_would(parts, children, pairs, negatives):
    argv = ["--bags", "8", "--children", children, "--pairs", pairs, "--negatives", negatives]
    argv += ["--own_captions", "0.1", "--steps", "40"]
    whole = build(parts, *argv)[6]
    N = whole["nodes"].shape[1]
    rows = """bag nodes valid weight flips stain pixels free own w_valid rand_mask
    rand_prefix rand_negative""".split()
    assert whole["free"].any() and not whole["free"].all()
    for world in (2, 4):
        shares = [build(parts, *argv, rank=rank, world=world)[6] for rank in range(world)]
        for k in rows:
            assert torch.equal(torch.cat([share[k] for share in shares]), whole[k]), k
        pairs = [share["caption_rows"] + r * 8 // world * N for r, share in enumerate(shares)]
        assert torch.equal(torch.cat(pairs), whole["caption_rows"])
        # Several processes exchange rows, so their captions have one length.
        assert all(share["ids"].shape[2] == 64 for share in shares)
        ids = torch.cat([share["ids"] for share in shares])
        assert torch.equal(ids[..., : whole["ids"].shape[2]], whole["ids"])
        for share in shares if negatives == "batch" else ():
            assert torch.equal(share["keywords"], whole["keywords"])
    level = torch.from_numpy(data.LEVEL)[whole["nodes"].flatten()[whole["caption_rows"]]]
    assert [(level == k).sum().item() for k in range(4)] == [len(level) // 4] * 4


def test_nodes_are_freed_from_their_own_captions_one_by_one(parts):
    shares = build(parts, "--steps", "100", "--own_captions", "0.6")
    found = [round(shares.free_share(step), 6) for step in (0, 59, 60, 65, 70, 99)]
    assert found == [0, 0, 0, 0.5, 1, 1]
    assert build(parts, "--own_captions", "0").free_share(0) == 1
    micro = build(parts, "--steps", "100", "--own_captions", "0.6", "--accumulate", "2")
    assert micro.free_share(130) == pytest.approx(0.5)


def test_bags_in_memory_change_nothing(parts):
    kept, read = build(parts), build(parts)
    read.keep = False
    for i in (0, 1, 0):
        assert all(torch.equal(kept[i][k], read[i][k]) for k in kept[i])
    assert kept.pixels and not read.pixels


def test_augmentation_is_that_of_the_draws(parts):
    batch = build(parts, "--children", "2")[1]
    patches = data.augment(batch, 0.2)
    plain = data.pyramid(batch["pixels"], batch["nodes"])
    expected = data.stain_jitter(data.flip(plain, batch["flips"]), 0.2, batch["stain"])
    assert torch.equal(patches, expected) and patches.dtype == torch.float32
    still = build(parts, "--children", "2", "--flips", "false", "--jitter", "0")[1]
    assert torch.equal(data.augment(still, 0.0), plain)


def test_without_a_gpu_the_loader_augments(parts):
    loaded, raw = build(parts, "--device", "cpu")[1], build(parts)[1]
    assert "pixels" not in loaded
    assert torch.equal(loaded["patches"], data.augment(raw, 0.2))
    assert torch.equal(data.to_device(raw, train.Config(), "cpu")["patches"], loaded["patches"])


def test_augmentation_keeps_its_digits_under_autocast(parts):
    batch = build(parts)[1]
    with torch.autocast("cpu", torch.bfloat16):
        patches = data.augment(batch, 0.2)
    assert torch.equal(patches, data.augment(batch, 0.2))
    assert len(patches[0, 0].unique()) > 1000  # bf16 has 256 values between 1/2 and 1


def test_a_missing_caption_is_named_and_counts_are_kept(parts, tmp_path, world):
    import shutil

    folder = shutil.copytree(world / "train", tmp_path / "train")
    bags = data.Bags(folder)
    counted = data.count_keywords(bags, text.Captions(folder))
    path = folder / "keywords.json"
    before = path.stat().st_mtime_ns
    assert data.count_keywords(bags, text.Captions(folder)) == counted
    assert path.stat().st_mtime_ns == before
    assert counted["captions"] == sum(c is not None for _, cs in text.Captions(folder) for c in cs)
    # A copy that was cut off is named.
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match="keywords.json is damaged .*: delete it"):
        data.count_keywords(bags, text.Captions(folder))
    path.unlink()
    # Take away the caption of one valid node: the file has changed, so it is looked at again.
    file = sorted(folder.glob("*.captions.jsonl"))[0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = rows[0]["key"]
    node = int(np.flatnonzero(bags.valid[bags.keys.index(first)])[3])
    kept = [row for row in rows if (row["key"], row["node"]) != (first, node)]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(
        ValueError, match=f"node {node} of {first} has no caption, as 1 of .*prepare"
    ):
        data.count_keywords(bags, text.Captions(folder))
    # A share may lack one, and is counted.
    counted = data.count_keywords(bags, text.Captions(folder), missing=0.01)
    assert counted["untold"] == 1 and counted["valid"] == int(bags.valid.sum())


class Sparse:
    """The captions of a few nodes alone, as PathGen has them."""

    def __init__(self, captions, nodes):
        self.captions, self.nodes, self.files = captions, nodes, captions.files

    def __getitem__(self, key):
        return [c if n in self.nodes else None for n, c in enumerate(self.captions[key])]


def test_patches_without_a_caption_are_read_by_the_losses_that_need_none(parts):
    bags, captions, tokenizer, corpus = parts
    sparse = Sparse(captions, {0, 7, 30})
    batch = build((bags, sparse, tokenizer, corpus), "--children", "4", "--pairs", "3")[0]
    assert torch.equal(
        batch["told"], batch["valid"] & torch.isin(batch["nodes"], torch.tensor([0, 7, 30]))
    )
    # Whatever magnification has its turn, a patch with a caption is drawn.
    assert batch["told"].flatten()[batch["caption_rows"]].all()
    assert set(batch["nodes"].flatten()[batch["caption_rows"]].tolist()) == {0, 7, 30}
    # The others select among all keywords of the bag, from the first step.
    assert torch.equal(batch["free"], ~batch["told"]) and not batch["own"][~batch["told"]].any()
    assert batch["weight"][batch["valid"]].all()


def test_every_field_of_the_settings_is_a_flag_with_a_reason(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name}" in said
    assert "image-text contrast (1.0)" in said


def test_two_spellings_are_one_keyword_of_the_batch(parts):
    bags, captions, tokenizer, _ = parts
    spellings = ("A tumour nest.", "A tumor nest.", "Tumor nests.")
    said = {key: [spellings[i % 3]] * 85 for i, key in enumerate(bags.keys)}
    corpus = text.count_corpus([c for key in bags.keys for c in said[key]])
    batch = build((bags, said, tokenizer, corpus))[0]
    assert batch["keyword_real"].sum() == 1 and not batch["bag_keywords"].any()
    assert batch["own"][..., 0].all()


def test_no_patch_is_read_twice(parts):
    batch = build(parts, "--children", "2", "--pairs", "15")[0]
    rows = batch["caption_rows"].tolist()
    assert len(set(rows)) == len(rows) == 60


def test_another_extractor_counts_anew(world, tmp_path, monkeypatch):
    import shutil

    folder = shutil.copytree(world / "train", tmp_path / "train")
    bags, captions = data.Bags(folder), text.Captions(folder)
    before = data.count_keywords(bags, captions)
    other = tmp_path / "text.py"
    other.write_text("# another extractor")
    monkeypatch.setattr(text, "__file__", str(other))
    monkeypatch.setattr(text, "keywords", lambda caption: ["x"] if caption else [])
    assert data.count_keywords(bags, captions)["common"] == ["x"] != before["common"]
