"""Test bags, pyramids and augmentation: pytest tests/test_data.py"""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from written import IMAGE, SMALL, slides_in

import data
from prepare.slide import read_image
from prepare.tile import tile

REAL = Path(__file__).resolve().parents[2] / "shared/data/slides"

# ---------------------------------------------------------------- files


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    data.write_whole(path, "one")
    data.write_whole(path, b"two")
    assert path.read_text() == "two"

    def fail(file):
        file.write(b"three")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        data.write_whole(path, fail)
    assert path.read_text() == "two" and len(list(path.parent.iterdir())) == 1
    data.write_whole(path, lambda file: file.write(b"four"))
    assert path.read_text() == "four"


def test_a_folder_has_one_owner_where_there_are_locks(tmp_path, monkeypatch):
    held = data.lock(tmp_path)
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "):
        data.lock(tmp_path)
    held.close()
    data.lock(tmp_path).close()

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    # Lustre often has none.
    monkeypatch.setattr(data.fcntl, "flock", flock)
    data.lock(tmp_path).close()
    data.lock(tmp_path, wait=True).close()


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "precious")
    data.write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()


def test_read_image(tmp_path):
    for name in ("a.png", "a.tif"):
        Image.fromarray(IMAGE).save(tmp_path / name)
        assert (np.asarray(read_image(tmp_path / name)) == IMAGE).all()
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").mode == "RGB"
    Image.fromarray(IMAGE[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("deep.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)


# ---------------------------------------------------------------- the 85 nodes


def test_heap_by_hand():
    assert [data.mpp_of(m) for m in data.MAGS] == [2, 1, 0.5, 0.25]
    assert data.LEVEL.dtype == data.ROW.dtype == data.COL.dtype == np.int64
    assert data.LEVEL.tolist() == [0] + [1] * 4 + [2] * 16 + [3] * 64
    # 84 is the last of the last, 17 the first child of the lower right quarter.
    assert (data.ROW[[1, 2, 3, 17, 84]] == [0, 0, 1, 2, 7]).all()
    assert (data.COL[[1, 2, 3, 17, 84]] == [0, 1, 0, 2, 7]).all()
    quarters = [(0, 0, 32), (32, 0, 32), (0, 32, 32), (32, 32, 32)]
    assert [data.square(n, 0, 0, 64) for n in (1, 2, 3, 4)] == quarters
    assert data.square(84, 0, 0, 64) == (56, 56, 8) and data.square(7, 0, 0, 64) == (0, 16, 16)
    assert json.dumps(data.square(0, 100, 200, 64)) == "[100, 200, 64]"
    assert [row.shape for row in data.square(np.arange(85), 0, 0, 64)] == [(85,)] * 3
    # Each level paints every pixel of the parent once.
    seen = np.zeros((4, 64, 64), int)
    for n in range(85):
        x, y, s = data.square(n, 0, 0, 64)
        seen[data.LEVEL[n], y : y + s, x : x + s] += 1
        px, py, ps = data.square((n - 1) // 4, 0, 0, 64) if n else (0, 0, 64)
        assert px <= x and py <= y and x + s <= px + ps and y + s <= py + ps
    assert (seen == 1).all()
    # A slide of 10x holds five nodes, here one without tissue.
    tissue = np.full((2, 85), 0.5)
    tissue[1, 3] = 0.05
    valid = data.valid_nodes((5, 10), tissue)
    assert valid[0].tolist() == [True] * 5 + [False] * 80 and valid.shape == (2, 85)
    assert valid[1].tolist() == [True, True, True, False, True] + [False] * 80
    assert data.valid_nodes([5, 10, 20, 40], tissue, min_node=0.0).all()


# ---------------------------------------------------------------- bags as a dataset


def test_damage_is_named(tmp_path):
    out = tmp_path / "out"
    slides = slides_in(tmp_path / "in", 2)
    tile(slides / "s0.svs", out, **SMALL)
    shard = out / "bags-s0.tar"
    whole = shard.read_bytes()
    offset, size = data.Bags(out).meta[2]["jpg"]
    shard.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    bags = data.Bags(out)
    bags[1]
    with pytest.raises(ValueError, match="bags-s0.tar: bag s0-02 is damaged.*tile its slide again"):
        bags[2]
    for keep in (0, 0.3):
        shard.write_bytes(whole[: int(len(whole) * keep)])
        words = "bags-s0.tar is missing or truncated.*tile its slide again"
        with pytest.raises(ValueError, match=words):
            data.Bags(out)
    with pytest.raises(ValueError, match="holds no bags.*prepare.tile SLIDES"):
        data.Bags(tmp_path)
    shard.write_bytes(whole)
    # An index that was copied in part.
    index = shard.with_suffix(".index.json")
    index.write_bytes(index.read_bytes()[:-9])
    for read in (data.Bags, lambda out: tile(slides / "s0.svs", out, **SMALL)):
        with pytest.raises(ValueError, match="bags-s0.index.json is damaged .*: delete it"):
            read(out)
    index.unlink()
    tile(slides / "s0.svs", out, **SMALL)
    assert len(data.Bags(out)) == len(bags) and shard.read_bytes() == whole
    tile(slides / "s1.svs", tmp_path / "b", patch_px=16, fov_px=32)
    for file in (tmp_path / "b").glob("bags-*"):
        file.rename(out / file.name)
    with pytest.raises(ValueError, match=r"patches of \[8, 16\] pixels"):
        data.Bags(out)


# ---------------------------------------------------------------- pyramid and augmentation


def random_bags(B=4, S=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, 8 * S, 8 * S), generator=g, dtype=torch.uint8)


def test_pyramid_is_the_tree():
    images = random_bags()
    S = 4
    patches = data.pyramid(images)
    assert patches.shape == (4, 85, 3, S, S) and patches.dtype == torch.float32
    for n in range(85):
        # Every patch is the mean of the square it stands for, rounded once.
        x, y, side = data.square(n, 0, 0, 8 * S)
        box = images[:, :, y : y + side, x : x + side].double()
        want = torch.nn.functional.avg_pool2d(box, int(side // S)) / 255
        assert torch.equal(patches[:, n], want.float())
    for n in range(21):
        # Four children, put together and averaged, are their parent.
        a, b, c, d = patches[:, 4 * n + 1 : 4 * n + 5].unbind(1)
        mosaic = torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
        assert torch.allclose(torch.nn.functional.avg_pool2d(mosaic, 2), patches[:, n], atol=1e-6)
    assert (data.pyramid(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)) == 1).all()


FIRST = {1: [0, 3, 15, 63], 2: [0, 3, 4, 15], 3: [0, 1, 3, 4], 4: [0, 1, 2, 3]}


@pytest.mark.parametrize("b, N", [(1, 4), (2, 15), (3, 40), (4, 85)])
def test_sampled_nodes(b, N):
    nodes = data.sample_nodes(50, b, torch.Generator().manual_seed(0))
    assert nodes.shape == (50, N) and nodes.dtype == torch.int64 and (nodes[:, 0] == 0).all()
    j = torch.arange(1, N)
    assert ((nodes[:, 1:] - 1) // 4 == nodes[:, (j - 1) // b]).all()
    assert all(len(set(row)) == N for row in nodes.tolist())
    levels = torch.from_numpy(data.LEVEL)[nodes]
    assert (levels == torch.tensor([0] + [1] * b + [2] * b**2 + [3] * b**3)).all()
    # Batches are functions of (seed, step), so the draws must not change.
    assert nodes[0, :4].tolist() == FIRST[b]
    images = random_bags(50, 2)
    every = data.pyramid(images)
    chosen = every[torch.arange(50)[:, None], nodes]
    assert torch.equal(data.pyramid(images, nodes), chosen)
    assert torch.equal(data.pyramid(images[7:8], nodes[7:8]), chosen[7:8])


def test_flipping_patches_is_flipping_the_bag():
    """A patch of the flipped bag is the flipped patch of the node whose place it takes."""
    images = random_bags(8)
    flips = torch.arange(8)
    whole = data.pyramid(data.flip(images, flips))
    each = data.flip(data.pyramid(images), flips)
    places = list(zip(data.LEVEL.tolist(), data.ROW.tolist(), data.COL.tolist(), strict=True))
    for t in range(8):
        for n, (level, row, col) in enumerate(places):
            last = 2**level - 1
            row, col = (col, row) if t & 4 else (row, col)
            place = (level, last - row if t & 2 else row, last - col if t & 1 else col)
            assert torch.equal(whole[t, places.index(place)], each[t, n])
    one = data.flip(images[:1].expand(8, -1, -1, -1), flips)
    assert len({bytes(x.numpy()) for x in one}) == 8


def test_stain_jitter():
    patches = data.pyramid(random_bags())
    rand = torch.rand(len(patches), 2, 3, generator=torch.Generator().manual_seed(1))
    still = data.stain_jitter(patches, 0.0, rand)
    assert torch.allclose(still, patches.clamp(min=1 / 255), atol=1e-4)
    before = patches.clone()
    a = data.stain_jitter(patches, 0.1, rand)
    assert a.shape == patches.shape and 0 <= a.min() and a.max() <= 1
    assert 0.005 < (a - patches).abs().mean() < 0.2 and torch.equal(patches, before)
    # One stain a bag, for all its patches.
    assert torch.allclose(data.stain_jitter(patches[:, 3:5], 0.1, rand), a[:, 3:5], atol=1e-5)
    # A gain keeps the colour of haematoxylin and scales its depth; here the gain is 1.1.
    pure = (-torch.outer(torch.tensor([0.5, 1.0]), data.HED[0])).exp().view(1, 2, 3, 1, 1)
    rand = torch.full((1, 2, 3), 0.5)
    rand[0, 0, 0] = 1.0
    out = -data.stain_jitter(pure, 0.1, rand).log().view(2, 3)
    assert torch.allclose(out, torch.outer(torch.tensor([0.55, 1.1]), data.HED[0]), atol=1e-4)


def make_batch(B=4, b=2):
    g = torch.Generator().manual_seed(2)
    batch = dict(pixels=random_bags(B), nodes=data.sample_nodes(B, b, g))
    return batch | dict(flips=torch.arange(B) % 8, stain=torch.rand(B, 2, 3, generator=g))


def test_augment_is_its_parts():
    batch = make_batch()
    plain = {k: batch[k] for k in ("pixels", "nodes")}
    patches = data.pyramid(batch["pixels"], batch["nodes"])
    assert torch.equal(data.augment(plain, 0.1), patches)
    want = data.stain_jitter(data.flip(patches, batch["flips"]), 0.1, batch["stain"])
    assert torch.equal(data.augment(batch, 0.1), want)
    # Autocast would round the colours to 8 bits.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.augment(batch, 0.1), want)


def test_augment_compiles_and_asks_for_no_values():
    torch.compiler.reset()
    batch = make_batch()
    compiled = torch.compile(data.augment, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(batch, 0.1), data.augment(batch, 0.1), atol=1e-5)
    # Fake tensors have shapes and no values: whatever waits for a device fails on them.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in batch.items()}
        assert data.augment(fake, 0.1).shape == (4, 15, 3, 4, 4)


def test_a_log_gets_whole_lines_of_progress(capsys):
    bar = data.progress(total=4, desc="slides", unit="slide", initial=1)
    bar.update()
    assert capsys.readouterr().err == ""
    # A minute later.
    bar.start_t -= 61
    bar.last_print_t -= 61
    bar.update()
    bar.close()
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].startswith("slides: 3 of 4, ") and lines[0].endswith(" left")
    assert lines[-1] == "" and all("\r" not in line for line in lines)
