"""Check the features of a frozen tower: the right tokens, made once, continued, shared.

pytest tests/test_features.py
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import script

import data
import model as networks
from prepare import features

# A tiny tower in timm's names, so that a file of weights can be read.
TINY = dict(
    vision=dict(size=64, patch=16, width=64, depth=1, heads=1),
    text=dict(context=16, width=8, depth=1, heads=1),
    fusion=dict(width=8, depth=1, heads=1, pool=2),
    embed=8,
    simsiam=(8, 8),
)


def add_tiny():
    networks.SIZES["tiny"] = TINY


@pytest.fixture
def folder(world, tmp_path):
    return shutil.copytree(world, tmp_path / "world")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, as torch saves those of timm."""
    torch.manual_seed(3)
    tower = networks.MRPLIP(2, 1, **TINY).vision
    state = {k: x for k, x in tower.state_dict().items() if k not in ("mean", "std")}
    path = tmp_path_factory.mktemp("weights") / "vit.bin"
    torch.save(state, path)
    return path


def test_the_command_writes_the_tokens_of_every_patch(folder, weights, monkeypatch):
    argv = ("prepare.features", folder, "--vision", weights, "--size", "tiny", "--workers", 1)
    script(*argv, before=add_tiny, check=True)
    monkeypatch.setitem(networks.SIZES, "tiny", TINY)
    model = features.load_tower(weights, "tiny")
    name = networks.features_name(model)
    for split, shards in (("train", 6), ("test", 2)):
        bags = data.Bags(folder / split)
        paths = sorted((folder / split).glob("*.npy"))
        assert paths == [data.features_path(bags, i, name) for i in range(shards)]
        tokens = np.concatenate([np.load(path) for path in paths])
        assert tokens.dtype == np.float16 and tokens.shape == (int(bags.valid.sum()), 5, 64)
        # A reader finds each node of each bag.
        read = data.open_features(bags, name)
        for i in (0, 1, len(bags) - 1):
            nodes = torch.tensor([0, 4, 20, 84, 41])
            with torch.no_grad():
                found = model.vision_tokens(data.pyramid(bags[i]["image"][None])[0])
            found = found[nodes] * bags.valid[i][nodes][:, None, None]
            assert np.allclose(read(i, nodes), found.numpy(), atol=2e-3)


def test_only_valid_patches_are_read(folder):
    """Blank most nodes: they are not sent through the tower, and are zeros."""
    for path in (folder / "test").glob("*.index.json"):
        index = json.loads(path.read_text())
        for k, row in enumerate(index["bags"]):
            row["tissue"] = [float((n + k) % 3 == 0) for n in range(85)]
        path.write_text(json.dumps(index))
    bags, seen = data.Bags(folder / "test"), []

    def see(images):
        seen.append(len(images))
        return images.mean((2, 3))[:, None]  # [at_once, 1, 3]

    features.cache_features(see, bags, "x", at_once=50)
    assert set(seen) == {50} and sum(seen) < 0.5 * 85 * len(bags)
    read = data.open_features(bags, "x")
    for i in range(len(bags)):
        mean = data.pyramid(bags[i]["image"][None])[0].mean((2, 3)).half()
        expected = mean * bags.valid[i][:, None]
        assert torch.allclose(read(i, torch.arange(85))[:, 0], expected, atol=2e-3)


def test_finished_shards_are_skipped_and_changed_ones_made_anew(folder, weights):
    argv = ("prepare.features", folder, "--vision", weights, "--size", "tiny", "--workers", 0)
    script(*argv, before=add_tiny, check=True)
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert len(first) == 8
    # One is lost, the shard of another is exchanged for one of an older time.
    lost, old, *_ = sorted(first)
    lost.unlink()
    index = old.with_name(old.name.split(".")[0] + ".index.json")
    index.write_text(index.read_text() + " ")
    os.utime(index, (0, 0))
    # A time in the future is no reason to make features anew.
    for shard in folder.rglob("*.tar"):
        os.utime(shard, (4e9, 4e9))
    script(*argv, before=add_tiny, check=True)
    assert {path for path, then in first.items() if path.stat().st_mtime_ns != then} == {lost}
    new = set(folder.rglob("*.npy")) - set(first)
    assert [path.name.split(".")[0] for path in new] == [old.name.split(".")[0]]


def test_an_interrupted_pass_leaves_whole_files_and_goes_on(folder, monkeypatch):
    torch.manual_seed(0)
    model = networks.MRPLIP(2, 1, **networks.SIZES["synthetic"]).eval()
    name = networks.features_name(model)
    bags = data.Bags(folder / "train")
    # Die inside the third shard.
    counts = [int(bags.valid[bags.shard_of == i].sum()) for i in range(2)]
    left = [sum(-(-count // 128) for count in counts) + 2]

    def dying(images):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return model.vision_tokens(images)

    with pytest.raises(KeyboardInterrupt):
        features.cache_features(dying, bags, name)
    paths = sorted(bags.folder.glob(f"*.{name}*.npy"))
    assert len(paths) == 2 and not list(bags.folder.glob(".*.tmp"))
    then = [path.stat().st_mtime_ns for path in paths]
    features.cache_features(model.vision_tokens, bags, name)
    assert [path.stat().st_mtime_ns for path in paths] == then
    found = sorted(bags.folder.glob(f"*.{name}*.npy"))
    assert len(found) == 6
    assert np.load(found[0], mmap_mode="r").shape[1:] == (5, 128)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", np.zeros((1, 5, 8), np.float16)])
def test_damaged_features_are_named(folder, content):
    bags = data.Bags(folder / "train")
    path = data.features_path(bags, 0, "x")
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match="x-.*npy is missing or damaged .*: delete it, run"):
        data.open_features(bags, "x")(0, torch.arange(85))


def test_a_second_pass_over_a_folder_is_refused(folder, weights):
    held = data.lock(folder / "test", ".features.lock")
    argv = ("prepare.features", folder, "--vision", weights, "--size", "tiny", "--workers", 0)
    done = script(*argv, before=add_tiny)
    assert done.returncode == 1 and "test is in use by process" in done.stderr.splitlines()[-1]
    # The part before is kept.
    assert len(list(folder.rglob("*.npy"))) == 6
    held.close()
    script(*argv, before=add_tiny, check=True)
    assert len(list(folder.rglob("*.npy"))) == 8


def test_processes_share_the_shards(folder):
    bags = data.Bags(folder / "train")

    def see(images):
        return images.mean((2, 3))[:, None]  # [at_once, 1, 3]

    def done():
        return [i for i in range(6) if data.features_path(bags, i, "x").exists()]

    features.cache_features(see, bags, "x", rank=1, world=4)
    assert done() == [1, 5]
    for rank in (0, 2, 3):
        features.cache_features(see, bags, "x", rank=rank, world=4)
    assert done() == [0, 1, 2, 3, 4, 5]


def test_other_weights_have_another_name_and_wrong_ones_a_sentence(folder, weights, tmp_path):
    names = set()
    for seed in range(2):
        torch.manual_seed(seed)
        names.add(networks.features_name(networks.MRPLIP(2, 1, **TINY)))
    assert len(names) == 2
    argv = ("prepare.features", folder, "--size", "tiny", "--vision")
    missing = script(*argv, tmp_path / "none.bin", before=add_tiny)
    assert missing.returncode == 1 and "none.bin" in missing.stderr

    def add_wide():
        networks.SIZES["tiny"] = dict(TINY, vision=dict(TINY["vision"], size=96))

    wide = script(*argv, weights, before=add_wide)
    assert wide.returncode == 1
    assert wide.stderr.strip().endswith("tile with --patch-px 96")
