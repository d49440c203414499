"""python -m pytest tests/test_data.py -q        (tiny slides made on the spot; NANOMRPLIP_SLIDES=FOLDER adds real ones)"""
import json
import os
import signal
import struct
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import Script, script

import data
from slide import resize


def picture(h=512, w=512, glass=0, seed=0):
    """Pink and purple blobs [h, w, 3]; the left `glass` columns are white."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 2, (h // 16 + 1, w // 16 + 1)), np.ones((16, 16), int))[:h, :w, None]
    image = np.where(coarse, (225, 140, 190), (110, 70, 150)) + rng.integers(-20, 20, (h, w, 1))
    image[:, :glass] = 245
    return image.clip(0, 255).astype(np.uint8)


def write(path, image, downs=(), tile=(256, 256), mpp=0.25, aperio=None, extra=(), **options):
    """A pyramidal TIFF whose levels are exact box averages; lossless unless `options` say otherwise."""
    text = aperio if aperio is not None else f"Aperio Image Library v12\r\n512x512|AppMag = 40|MPP = {mpp}"
    options = dict(dict(photometric="rgb", tile=tile, compression="deflate", description=text, metadata=None), **options)
    if options["tile"] is None:
        del options["tile"]
        options["rowsperstrip"] = 48
    with tifffile.TiffWriter(path) as tif:
        tif.write(image, **options)
        for picture in extra:                             # Aperio's thumbnail follows level 0
            tif.write(picture, photometric="rgb", description="Aperio Image Library v12\n512x512 -> 128x128 - ", metadata=None)
        for d in downs:
            small = image[:len(image) // d * d, :image.shape[1] // d * d].astype(float)
            small = small.reshape(len(small) // d, d, -1, d, 3).mean((1, 3)).round().astype(np.uint8)
            tif.write(small, **dict(options, description=f"{text} -> {len(small)}", subfiletype=1))
    return str(path)


def cli(*args, **kw):
    return script("data.py", *args, **kw)


# ---------------------------------------------------------------- the tree

def test_heap_by_hand():
    assert [data.mpp_of(m) for m in data.MAGS] == [2, 1, 0.5, 0.25]
    assert data.children(0) == [1, 2, 3, 4] and data.children(4) == [17, 18, 19, 20] and data.children(20) == [81, 82, 83, 84]
    assert all(data.parent(c) == n for n in range(21) for c in data.children(n))
    assert all(data.level(n) == lev for lev, span in enumerate(data.LEVELS) for n in range(85)[span])
    assert [data.level(n, 2) for n in range(15)] == [0, 1, 1, 2, 2, 2, 2] + [3] * 8
    assert [data.level(n, 1) for n in range(4)] == [0, 1, 2, 3]


def test_squares_nest_and_cover():
    assert data.square(0, 100, 200, 64) == (100, 200, 64)
    assert [data.square(n, 0, 0, 64) for n in (1, 2, 3, 4)] == [(0, 0, 32), (32, 0, 32), (0, 32, 32), (32, 32, 32)]
    assert data.square(84, 0, 0, 64) == (56, 56, 8) and data.square(7, 0, 0, 64) == (0, 16, 16)
    for span in data.LEVELS:                              # each level paints every pixel of the parent once
        seen = np.zeros((64, 64), int)
        for n in range(85)[span]:
            x, y, s = data.square(n, 0, 0, 64)
            seen[y:y + s, x:x + s] += 1
            px, py, ps = data.square(data.parent(n), 0, 0, 64) if n else (0, 0, 64)
            assert px <= x and py <= y and x + s <= px + ps and y + s <= py + ps
        assert (seen == 1).all()


# ---------------------------------------------------------------- slides

@pytest.mark.parametrize("options", [dict(), dict(tile=(240, 240)), dict(tile=(512, 512)), dict(compression="lzw"), dict(tile=None),
                                     dict(compression=None), dict(compression="jpeg2000", compressionargs=dict(level=0))])
def test_read_is_exact_for_lossless_slides(tmp_path, options):
    image = picture(500, 700)
    with data.Slide(write(tmp_path / "a.svs", image, downs=(4,), **options)) as slide:
        assert slide.size == (700, 500) and slide.mpp == 0.25 and [d for d, _ in slide.levels] == [1, 4]
        assert (slide.read(37, 51, 300, 300) == image[51:351, 37:337]).all()
        edge = slide.read(-20, 400, 200, 200)             # hangs over the left and lower edges
        assert (edge[:100, 20:] == image[400:, :180]).all() and (edge[:, :20] == 255).all() and (edge[100:] == 255).all()
        assert (slide.read(5000, 5000, 64, 64) == 255).all()
        half = slide.read(100, 100, 256, 128).astype(int) # no 2x level is stored: level 0, averaged
        want = image[100:356, 100:356].reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert abs(half - want).max() <= 0.5


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_jpeg_colours(tmp_path, photometric):
    image = np.full((300, 300, 3), (200, 90, 160), np.uint8)
    options = dict(compression="jpeg", photometric="rgb", compressionargs=dict(level=95, outcolorspace=photometric))
    with data.Slide(write(tmp_path / "a.svs", image, tile=(240, 240), **options)) as slide:
        assert abs(slide.read(190, 190, 96, 96).astype(int) - image[:96, :96]).max() <= 4


def test_a_level_is_not_a_magnification(tmp_path):
    """Levels 1, 4, 16 as Aperio stores them: 5x (8 times) and 10x (4) come from level 1, 20x (2) from level 0; what is read
    at a magnification has its true field of view."""
    image = np.zeros((1024, 1024, 3), np.uint8)
    image[..., 0] = np.arange(1024)[None] // 4            # red tells the column
    with data.Slide(write(tmp_path / "a.svs", image, downs=(4, 16), extra=[image[::8, ::8]])) as slide:
        assert [d for d, _ in slide.levels] == [1, 4, 16]  # the thumbnail is none
        assert [slide.best_level(data.mpp_of(m) / slide.mpp) for m in data.MAGS] == [1, 1, 0, 0]
        wide = slide.read(0, 0, 1024, 128).astype(float)  # 5x: 128 px span the whole slide
        assert abs(wide[5, :, 0] - (np.arange(128) * 8 + 3.5) / 4).max() < 1.5


def test_resize():
    a = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (resize(a, 2)[0, 0] == [8, 9, 10]).all()  # mean of 0, 3, 12, 15 is 7.5, rounded up; then 8.5 and 9.5
    assert (resize(resize(a, 12), 4) == a).all()
    flat = resize(np.full((50, 50, 3), 77, np.uint8), 21)
    assert flat.shape == (21, 21, 3) and (flat == 77).all()
    assert (resize(np.full((40, 40, 3), 255, np.uint8), 2) == 255).all()            # 400 * 255 needs more than 16 bits


def test_where_mpp_comes_from(tmp_path):
    image, bare = picture(64, 64), "Aperio x"
    got = lambda name, **kw: (lambda s: (round(s.mpp, 4), s.mpp_source))(data.Slide(*[write(tmp_path / name, image, **kw)]))
    assert got("a.svs", mpp=0.499) == (0.499, "Aperio MPP")
    assert got("b.tif", aperio="", resolution=(40000, 40000), resolutionunit="CENTIMETER") == (0.25, "TIFF XResolution")
    assert got("c.tif", aperio="", resolution=(50800, 50800), resolutionunit="INCH") == (0.5, "TIFF XResolution")
    for kw, hint in ((dict(aperio=bare), "0.25"), (dict(aperio=bare + "|AppMag = 20"), "suggests 0.5"),
                     (dict(aperio="", resolution=(72, 72), resolutionunit="INCH"), "--mpp")):
        with pytest.raises(ValueError, match=f"d.svs.*--mpp.*{hint}|d.svs.*--mpp"):
            data.Slide(write(tmp_path / "d.svs", image, **kw))
    assert data.Slide(tmp_path / "d.svs", mpp=0.3).mpp == 0.3
    with pytest.raises(ValueError, match="0.1-2.4"):
        data.Slide(tmp_path / "d.svs", mpp=40)
    mags = {mpp: data.Slide(tmp_path / "d.svs", mpp=mpp).mags for mpp in (0.12, 0.25, 0.5, 1.0, 2.0)}
    assert mags == {0.12: data.MAGS, 0.25: data.MAGS, 0.5: (5, 10, 20), 1.0: (5, 10), 2.0: (5,)}


def test_bad_files_say_what_to_do(tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    good = write(tmp_path / "good.svs", picture(), compression=None)
    (tmp_path / "cut.svs").write_bytes(Path(good).read_bytes()[:-1000])
    (tmp_path / "half.svs").write_bytes(Path(good).read_bytes()[:len(Path(good).read_bytes()) // 2])
    (tmp_path / "early.svs").write_bytes(struct.pack("<2sHI", b"II", 42, 10 ** 6) + bytes(5000))       # cut before its directory
    with tifffile.TiffWriter(tmp_path / "grey.tif") as tif:
        tif.write(np.zeros((64, 64), np.uint8))
    for name, words in (("missing.svs", "no such file"), ("text.svs", "convert it"), ("cut.svs", "truncated"), ("half.svs", "truncated"), ("early.svs", "truncated .its directory is missing.: copy it again"), ("grey.tif", "not 8-bit RGB but 1 x uint8")):
        with pytest.raises((ValueError, OSError), match=f"{name}.*({words})") as e:
            data.Slide(tmp_path / name, mpp=0.25)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- tissue and parents

def test_tissue_is_stain_not_glass(tmp_path):
    image = picture(512, 512, glass=256)
    image[100:200, 20:120] = (60, 60, 62)                 # a dark smudge is not tissue
    with data.Slide(write(tmp_path / "a.svs", image)) as slide:
        mask, scale = data.tissue_mask(slide, um=4)
        assert scale == 16 and mask.shape == (32, 32) and mask[:, 17:].all() and not mask[:, :15].any()
    pale = np.full((256, 256, 3), 244, np.uint8)
    pale[:, 128:] = (240, 222, 234)
    with data.Slide(write(tmp_path / "pale.svs", pale)) as slide:
        mask, _ = data.tissue_mask(slide, um=4)
        assert mask[:, 9:].all() and not mask[:, :7].any()
    for colour, share in ((245, 0), ((200, 120, 180), 1)):
        with data.Slide(write(tmp_path / "flat.svs", np.full((256, 256, 3), colour, np.uint8))) as slide:
            assert data.tissue_mask(slide)[0].mean() == share


def test_tissue_fraction_by_hand():
    mask = np.array([[1, 0], [0, 0]], bool)               # one 10 x 10 px square of tissue in 20 x 20
    x, y, side = np.array([0, 0, 5, -5, 100, 2]), np.array([0, 0, 5, -5, 100, 3]), np.array([10, 20, 10, 10, 5, 4])
    assert np.allclose(data.tissue_fraction(mask, 10, x, y, side), [1, 0.25, 0.25, 0.25, 0, 1])


def test_parents(tmp_path):
    path = write(tmp_path / "a.svs", picture(1024, 1300, glass=600))
    with data.Slide(path) as slide:
        bags = data.choose_parents(slide, fov_px=32)   # 256 px a parent, the grid centred: columns from x = 10
        assert {(x, s) for x, _, s, _ in bags} == {(522, 256), (778, 256), (1034, 256)} and len(bags) == 12
        assert all(abs(t[0] - (0.695 if x == 522 else 1)) < 0.1 for x, _, _, t in bags)
        assert all(np.allclose(t[0], t[21:].mean()) for *_, t in bags)     # a parent's share is its children's mean
        few, again = (data.choose_parents(slide, fov_px=32, parents=5) for _ in range(2))
        assert [b[:2] for b in few] == [b[:2] for b in again] and len(few) == 5
        assert data.choose_parents(slide, fov_px=32, parents=5, seed=1) != few
    fine = write(tmp_path / "fine.svs", picture(1024, 1300, glass=600), tile=(64, 64))
    with data.Slide(fine) as slide:                       # where tiles are small, on their edges: each is decoded once
        assert {x for x, *_ in data.choose_parents(slide, fov_px=32)} == {512, 768, 1024}
    with data.Slide(path, mpp=0.2525) as slide:           # the true mpp sets the side: 32 * 2 / 0.2525 = 253.5 -> 256
        assert slide.mags == data.MAGS and data.choose_parents(slide, fov_px=32)[0][2] == 256
    small = write(tmp_path / "small.svs", picture(200, 230))
    with data.Slide(small) as slide:
        (x, y, side, tissue), = data.choose_parents(slide, fov_px=32)       # centred and padded: 200 * 230 of 256^2
        assert (x, y, side) == (-13, -28, 256) and abs(tissue[0] - 0.702) < 0.04
        assert data.choose_parents(slide, fov_px=64) == []


# ---------------------------------------------------------------- tiling

def slides_in(folder, n=3):
    folder.mkdir()
    for i in range(n):
        write(folder / f"s{i}.svs", picture(512, 512, seed=i))
    return folder


def test_tile_shards(tmp_path):
    slides, out = slides_in(tmp_path / "in"), tmp_path / "out"
    assert data.tile(slides, out, patch_px=32, fov_px=32) == dict(slides=3, done=3, bags=12, empty=0, failed=0)
    with tarfile.open(out / "bags-000001.tar") as tar:
        names = tar.getnames()
        assert names == [f"s1-{i:02d}.{e}" for i in range(4) for e in ("jpg", "json")]
        meta = json.load(tar.extractfile("s1-03.json"))
    assert {k: v for k, v in meta.items() if k != "tissue"} == dict(slide="s1.svs", x=256, y=256, side=256, mpp=0.25, levels=[5, 10, 20, 40])
    assert len(meta["tissue"]) == 85
    ds = data.BagDataset(out, captions=False)
    item = ds[7]
    assert len(ds) == 12 and ds.S == 32 and item["key"] == "s1-03" and item["slide"] == "s1.svs" and item["index"] == 7
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 256, 256) and item["valid"].all()
    want = torch.from_numpy(picture(512, 512, seed=1)[256:, 256:]).permute(2, 0, 1).float()
    assert (item["image"] - want).abs().mean() < 8        # JPEG noise only


def test_tile_resumes_extends_and_is_deterministic(tmp_path):
    slides = slides_in(tmp_path / "in")
    a, b = tmp_path / "a", tmp_path / "b"
    data.tile(slides, a, patch_px=8, fov_px=32, workers=2)
    data.tile(slides / "s0.svs", b, patch_px=8, fov_px=32)
    (b / "bags-000001.tar.tmp").write_text("left by a crash")
    with open(b / "slides.jsonl", "a") as f:
        f.write('{"slide": "s1.svs", "sha')               # and a row that was cut off
    before = (b / "bags-000000.tar").stat().st_mtime_ns
    assert data.tile(slides, b, patch_px=8, fov_px=32)["done"] == 3
    assert (b / "bags-000000.tar").stat().st_mtime_ns == before and not list(b.glob("*.tmp"))
    shards = sorted(p.name for p in a.glob("*.tar"))
    assert shards == [f"bags-{i:06d}.tar" for i in range(3)]
    assert all((a / s).read_bytes() == (b / s).read_bytes() for s in shards)
    write(slides / "a-new.svs", picture(512, 512, seed=9))
    data.tile(slides, a, patch_px=8, fov_px=32)
    assert (a / "bags-000003.tar").exists() and (a / "bags-000000.tar").read_bytes() == (b / "bags-000000.tar").read_bytes()
    free = tmp_path / "free"                              # a slide without a parent keeps its number
    write(slides / "a-blank.svs", np.full((512, 512, 3), 245, np.uint8))
    assert data.tile([slides / "a-blank.svs", slides / "s0.svs"], free, patch_px=8, fov_px=32)["empty"] == 1
    data.tile(slides, free, patch_px=8, fov_px=32)
    assert data.BagDataset(free, captions=False).slides[0] == "s0.svs" and not (free / "bags-000000.tar").exists()
    for change, words in ((dict(patch_px=16), "patch_px 8 is now 16"), (dict(mpp=0.5), "mpp 0.25 is now 0.5")):
        with pytest.raises(ValueError, match=words):
            data.tile(slides, a, **dict(dict(patch_px=8, fov_px=32), **change))


def test_keys_have_no_dot_and_do_not_collide(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.b.svs", "a_b.svs", "a_b.tif"):
        write(tmp_path / "in" / name, picture(256, 256))
    data.tile(tmp_path / "in", tmp_path / "out", patch_px=8, fov_px=32)
    keys = data.BagDataset(tmp_path / "out", captions=False).keys
    assert len(set(keys)) == 3 and not any("." in k for k in keys) and "a_b-00" in keys
    (tmp_path / "in2").mkdir()
    write(tmp_path / "in2" / "a_b.svs", picture(256, 256))
    with pytest.raises(ValueError, match="share a name"):
        data.tile([tmp_path / "in", tmp_path / "in2"], tmp_path / "out2")


def test_20x_slide_has_21_nodes(tmp_path):
    path = write(tmp_path / "a.svs", picture(256, 256), mpp=0.5)
    data.tile(path, tmp_path / "out", patch_px=32, fov_px=64)
    ds = data.BagDataset(tmp_path / "out", captions=False)
    assert ds.meta(0)["levels"] == [5, 10, 20] and ds[0]["valid"].tolist() == [True] * 21 + [False] * 64


def test_cli(tmp_path):
    slides = slides_in(tmp_path / "in", 2)
    (slides / "bad.svs").write_text("x")
    write(slides / "nompp.tif", picture(), aperio="")
    (tmp_path / "mpp.csv").write_text("slide,mpp\nnompp.tif,0.5\n")
    r = cli("inspect", slides)
    assert r.returncode == 2 and "2 of 4 slides" in r.stderr and r.stdout.count("\n") == 4 and r.stdout.count("refused:") == 2
    assert "s0.svs: 512 x 512 px, 0.25 um/px (Aperio MPP), DEFLATE, levels 1, 85 nodes" in r.stdout
    assert "40x, 0.25 um/px: from level 0" in cli("inspect", slides / "s0.svs").stdout
    r = cli("tile", slides, "--out", tmp_path / "out", "--patch-px", 8, "--fov-px", 32, "--mpp", tmp_path / "mpp.csv", "--workers", 2)
    assert r.returncode == 1 and "bad.svs" in r.stderr and "1 of 4" in r.stderr and "24 bags from 3 of 4 slides" in r.stdout
    r = cli("tile", slides, "--out", tmp_path / "o", "--patch-p", 3)
    assert r.returncode == 2 and "did you mean --patch-px?" in r.stderr
    r = cli("preview", slides / "s0.svs", "--out", tmp_path / "p.png", "--fov-px", 32)
    assert r.returncode == 0 and (tmp_path / "p.png").stat().st_size > 10000
    for args, words in ((("preview", slides, "--out", tmp_path / "p.png"), "one slide into one PNG"), (("preview", slides / "s0.svs", "--out", tmp_path / "p"), "NAME.png"),
                        (("inspect", slides / "s0.svs", "--fov-px", 0), "fov_px is 0"), (("tile", slides, "--out", slides / "s0.svs"), "choose another folder")):
        r = cli(*args)
        assert r.returncode == 1 and words in r.stderr and r.stderr.count("\n") == 1
    r = cli("tile", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert r.returncode == 1 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_finished_slides(tmp_path, workers):
    slides, out = slides_in(tmp_path / "in", 1), tmp_path / "out"
    for i in range(400):                                  # the same pixels under many names: links cost nothing
        os.link(slides / "s0.svs", slides / f"t{i:03d}.svs")
    def before():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    p = Script("data.py", "tile", slides, "--out", out, "--patch-px", 64, "--fov-px", 32, "--workers", workers, before=before)
    deadline = time.time() + 30
    while not list(out.glob("*.tar")) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGINT)                       # a terminal signals workers too
    again = threading.Timer(10, os.killpg, (p.pid, signal.SIGINT))               # Python drops an interrupt that falls into a destructor; people press again
    again.start()
    p = p.wait()
    again.cancel()
    assert p.returncode == 130 and "continue" in p.stderr and "Traceback" not in p.stderr and not list(out.glob("*.tmp"))
    rows = [json.loads(line)["shard"] for line in open(out / "slides.jsonl")]
    assert 0 < len(rows) < 401 and sorted(rows) == sorted(f.name for f in out.glob("*.tar"))


# ---------------------------------------------------------------- faults

def failures(out):
    return {r["slide"]: r["reason"] for _, _, r in data.read_jsonl(out / "failures.jsonl")}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_slide_is_reported_and_the_run_goes_on(tmp_path, workers):
    slides, out = slides_in(tmp_path / "in", 2), tmp_path / "out"
    good = (slides / "s0.svs").read_bytes()
    (slides / "cut.svs").write_bytes(good[:len(good) // 2])
    (slides / "empty.svs").write_bytes(b"")
    with tifffile.TiffFile(slides / "s0.svs") as tif:     # one tile overwritten with zeros
        at, n = tif.pages[0].dataoffsets[1], tif.pages[0].databytecounts[1]
    (slides / "rotten.svs").write_bytes(good[:at] + bytes(n) + good[at + n:])
    r = cli("tile", slides, "--out", out, "--patch-px", 8, "--fov-px", 32, "--workers", workers)
    assert r.returncode == 3 and "8 bags from 2 of 5 slides" in r.stdout and "3 of 5 slides" in r.stderr and "Traceback" not in r.stderr
    assert set(failures(out)) == {"cut.svs", "empty.svs", "rotten.svs"} and all("copy it again" in v for v in failures(out).values())
    assert "rotten.svs: tile 1 of its 512 x 512 level cannot be decoded" in failures(out)["rotten.svs"]
    (slides / "rotten.svs").write_bytes(good)             # copied again: only what failed is done, and its report is gone
    assert data.tile(slides / "rotten.svs", out, patch_px=8, fov_px=32)["bags"] == 4
    assert set(failures(out)) == {"cut.svs", "empty.svs"} and len(data.BagDataset(out, captions=False)) == 12


def test_one_tile_at_a_time(tmp_path):
    """A second run into the same folder would give out the same numbers; shards of other origin are not written over."""
    import fcntl
    slides, out = slides_in(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `data.py tile` is writing to"):
            data.tile(slides, out, patch_px=8, fov_px=32)
    with tarfile.open(out / "bags-000000.tar", "w") as tar:
        tar.add(slides / "s0.svs", "x.jpg")
    with pytest.raises(ValueError, match="bags-000000.tar is in no row of .*slides.jsonl"):
        data.tile(slides, out, patch_px=8, fov_px=32)
    (out / "bags-000000.tar").unlink()
    data.tile(slides, out, patch_px=8, fov_px=32)
    (out / "slides.jsonl").write_text('5\n{"id": 1}\n')   # killed after the shard, before its row (and a file of another kind)
    (out / "bags-000000.tar").rename(out / "bags-000007.tar")
    assert data.tile(slides, out, patch_px=8, fov_px=32)["bags"] == 4 and [f.name for f in out.glob("*.tar")] == ["bags-000000.tar"]


def test_file_names_need_not_be_text(tmp_path):
    slides = slides_in(tmp_path / "in", 1)
    os.link(slides / "s0.svs", os.fsencode(slides) + b"/l\xe9.svs")
    r = cli("tile", slides, "--out", tmp_path / "out", "--patch-px", 8, "--fov-px", 32)
    assert r.returncode == 0 and "8 bags from 2 of 2" in r.stdout
    assert len(data.BagDataset(tmp_path / "out", captions=False)) == 8 and cli("inspect", slides).returncode == 0


def test_mpp_tables(tmp_path):
    path = tmp_path / "m.csv"

    def table(text, encoding="utf-8"):
        path.write_text(text, encoding=encoding)
        return data.mpp_table(str(path), ["a.svs", "b,c.svs"])
    want = {"a.svs": 0.3, "b,c.svs": None}
    assert table("a.svs,0.3\n") == table("slide,mpp\r\na.svs, 0.3\r\n\r\n") == table('"a.svs",0.3', "utf-8-sig") == want
    assert table('x.svs,1\n"b,c.svs",0.5')["b,c.svs"] == 0.5
    for text, words in (("a.svs;0.3\n", "m.csv:1: expected slide,mpp"), ("a.svs,0.3\nb,x\n", "m.csv:2"), ("slide,mpp\nz.svs,1", "names none of the slides .the first is a.svs")):
        with pytest.raises(ValueError, match=words):
            table(text)
    with pytest.raises(ValueError, match="m.csv is not a text file in UTF-8"):
        table("a.svs,0.3", "utf-16")


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """No file may grow beyond 40 kB: the same error, at the same place, as a disk that fills up."""
    import resource
    slides, out = slides_in(tmp_path / "in", 2), tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
    r = cli("tile", slides, "--out", out, "--patch-px", 32, "--fov-px", 32, before=limit)
    assert r.returncode == 2 and "Traceback" not in r.stderr and "cannot be written" in failures(out)["s1.svs"]
    assert not list(out.glob("*.tar")) and not list(out.glob("*.tmp")) and not (out / "slides.jsonl").exists()
    assert data.tile(slides, out, patch_px=32, fov_px=32)["failed"] == 0 and failures(out) == {}


def test_a_lost_shard_is_made_again(tmp_path):
    slides, out = slides_in(tmp_path / "in", 2), tmp_path / "out"
    data.tile(slides, out, patch_px=8, fov_px=32)
    before = (out / "bags-000000.tar").read_bytes()
    (out / "bags-000000.tar").unlink()
    assert data.tile(slides, out, patch_px=8, fov_px=32)["bags"] == 8
    assert (out / "bags-000000.tar").read_bytes() == before and len(data.BagDataset(out, captions=False)) == 8


@pytest.mark.parametrize("keep", [0.3, 0.6, -1024, -10000])
def test_a_truncated_shard_is_named(tmp_path, keep):
    out = tmp_path / "out"
    data.tile(slides_in(tmp_path / "in", 2), out, patch_px=8, fov_px=32)
    shard = out / "bags-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:int(len(whole) * keep) if keep > 0 else keep])
    if keep == -1024 and whole.endswith(bytes(2048)):     # tar pads to 10240 bytes: cutting padding alone does no harm
        assert len(data.BagDataset(out, captions=False)) == 8
    else:
        with pytest.raises(ValueError, match="bags-000001.tar is truncated.*data.py tile"):
            data.BagDataset(out, captions=False)


def test_an_index_follows_its_files(tmp_path):
    slides, out = slides_in(tmp_path / "in", 2), tmp_path / "out"
    data.tile(slides, out, patch_px=8, fov_px=32)

    def say(word):
        for shard in out.glob("*.tar"):
            with tarfile.open(shard) as tar:
                keys = [n[:-4] for n in tar.getnames() if n.endswith(".jpg")]
            rows = [json.dumps(dict(caption=f"{word} \u00e9 {k} {n}", node=n, key=k), ensure_ascii=False) for n in range(84, -1, -1) for k in keys]
            shard.with_suffix(".captions.jsonl").write_text("\n\n".join(rows), encoding="utf-8")   # any order, blank lines, two bytes a letter
    say("one")
    ds = data.BagDataset(out)
    assert ds.captions(5)[17] == f"one \u00e9 {ds.keys[5]} 17" and ds.captions(5, [84, 0]) == [f"one \u00e9 {ds.keys[5]} {n}" for n in (84, 0)]
    stamp = (out / "index.npz").stat().st_mtime_ns
    assert data.BagDataset(out).captions(5) == ds.captions(5) and (out / "index.npz").stat().st_mtime_ns == stamp
    say("other")
    assert data.BagDataset(out).captions(5)[17].startswith("other")
    write(slides / "s9.svs", picture(512, 512, seed=9))
    data.tile(slides, out, patch_px=8, fov_px=32)
    say("third")
    assert len(data.BagDataset(out)) == 12 and data.BagDataset(out).captions(11)[0].startswith("third")
    for damaged in (b"PK", b""):                          # it is made again
        (out / "index.npz").write_bytes(damaged)
        ds = data.BagDataset(out)
    assert ds.keys == data.BagDataset(out, captions=False).keys and ds.meta(11)["slide"] == ds.slides[11] == "s9.svs"


# ---------------------------------------------------------------- captions

def test_captions_are_checked(tmp_path):
    out, fix = tmp_path / "out", "python text.py import"
    data.tile(slides_in(tmp_path / "in", 1), out, patch_px=8, fov_px=32, parents=2)
    with pytest.raises(ValueError, match=f"does not exist.*170 missing in all.*{fix}"):
        data.BagDataset(out)
    keys, path = data.BagDataset(out, captions=False).keys, out / "bags-000000.captions.jsonl"
    lines = [json.dumps(dict(key=k, node=n, caption=f"{k} {n}")) for k in keys for n in range(85)]
    path.write_text("\n".join(lines))
    ds = data.BagDataset(out)
    assert ds.captions(1)[17] == f"{keys[1]} 17" and ds.truth(0) is None
    path.write_text("\n".join(lines[:17] + lines[18:]))
    with pytest.raises(ValueError, match=f"no caption for node 17 of bag {keys[0]} .1 missing"):
        data.BagDataset(out)
    for key, wrong in dict(node=85, caption=5).items():
        path.write_text("\n".join(lines + [json.dumps(dict(dict(key=keys[0], node=-1, caption="x"), **{key: wrong}))]))
        with pytest.raises(ValueError, match="captions.jsonl:171: expected"):
            data.BagDataset(out)
    path.write_text("\n".join(lines[:3] + ["{oops"]))
    with pytest.raises(ValueError, match="captions.jsonl:4: not JSON"):
        data.BagDataset(out)
    (out / "bags-000000.truth.jsonl").write_text("\n".join(json.dumps(dict(key=k, node=n, fat=n)) for k in keys for n in range(85)))
    assert data.BagDataset(out, captions=False).truth(1)[84]["fat"] == 84
    with pytest.raises(ValueError, match="data.py tile"):
        data.BagDataset(tmp_path)


def test_mixed_sizes_are_refused(tmp_path):
    slides, out = slides_in(tmp_path / "in", 1), tmp_path / "out"
    data.tile(slides, out, patch_px=8, fov_px=32)
    data.tile(slides, tmp_path / "other", patch_px=16, fov_px=32)
    (tmp_path / "other" / "bags-000000.tar").rename(out / "bags-000001.tar")
    with pytest.raises(ValueError, match="128 pixels, those before it 64"):
        data.BagDataset(out, captions=False)


# ---------------------------------------------------------------- pyramid and augmentation

def random_bags(B=4, S=4, seed=0):
    return torch.randint(256, (B, 3, 8 * S, 8 * S), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_pyramid_is_the_tree():
    images, S = random_bags(), 4
    patches = data.pyramid(images)
    assert patches.shape == (4, 85, 3, S, S) and patches.dtype == torch.float32
    for n in range(85):                                   # every patch is the mean of the square it stands for
        x, y, side = data.square(n, 0, 0, 8 * S)
        want = torch.nn.functional.avg_pool2d(images[:, :, y:y + side, x:x + side].float(), side // S) / 255
        assert torch.allclose(patches[:, n], want, atol=1e-5)
    for n in range(21):                                   # four children, put together and averaged, are their parent
        a, b, c, d = (patches[:, k] for k in data.children(n))
        mosaic = torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
        assert torch.allclose(torch.nn.functional.avg_pool2d(mosaic, 2), patches[:, n], atol=1e-5)
    assert torch.allclose(data.pyramid(images.float() / 255), patches, atol=1e-6)


@pytest.mark.parametrize("b, N", [(1, 4), (2, 15), (3, 40), (4, 85)])
def test_sampled_nodes(b, N):
    nodes = data.sample_nodes(50, b, torch.Generator().manual_seed(0))
    assert nodes.shape == (50, N) and (nodes[:, 0] == 0).all()
    j = torch.arange(1, N)
    assert (data.parent(nodes[:, 1:]) == nodes[:, data.parent(j, b)]).all()
    assert all(len(set(row)) == N for row in nodes.tolist())
    assert (data.level(nodes) == data.level(torch.arange(N), b)).all()
    if b < 4:
        assert len(set(nodes[:, 1].tolist())) > 1
    images = random_bags(50, 2)
    every = data.pyramid(images)
    assert torch.equal(data.pyramid(images, nodes=nodes), every[torch.arange(50)[:, None], nodes])
    first = data.pyramid(images, b=b)
    assert torch.equal(first[:, 1:1 + b], every[:, 1:1 + b]) and first.shape[1] == N


def test_turning_patches_is_turning_the_bag():
    """Turn 1 mirrors left-right, 2 up-down, 4 transposes: the patch of the turned bag is the turned patch of the node whose
    place it takes, so kinship and captions stay with the patches."""
    images, turns = random_bags(8), torch.arange(8)
    whole, each = data.pyramid(data.turn(images, turns)), data.turn(data.pyramid(images), turns)
    for t in range(8):
        for n in range(85):
            lev, row, col = data.place(n)
            last = 2 ** lev - 1
            row, col = (col, row) if t & 4 else (row, col)
            row, col = last - row if t & 2 else row, last - col if t & 1 else col
            moved = next(m for m in range(85) if data.place(m) == (lev, row, col))
            assert torch.allclose(whole[t, moved], each[t, n], atol=1e-6)
    assert len({bytes(x.numpy()) for x in data.turn(images[:1].expand(8, -1, -1, -1), turns)}) == 8


def test_zoom_by_hand():
    images = random_bags()
    whole = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    assert torch.equal(data.zoom(images, whole), images)
    flat = images.new_zeros(1, 3, 32, 32)
    flat[..., 8:24, 16:32] = 200                          # the square at half the side, a quarter down and half across
    inner = data.zoom(flat, torch.tensor([[0.5, 0.25, 0.5]]))[..., 1:-1, 1:-1]
    assert (inner == 200).all()
    quarter = data.zoom(images, torch.tensor([[0.5, 0.0, 0.5]]).expand(4, 3)).float()
    want = torch.nn.functional.interpolate(images[:, :, :16, 16:].float(), size=(32, 32), mode="bilinear")
    assert (quarter - want).abs()[..., 1:-1, 1:-1].max() <= 0.51    # inside; at its border it may look beyond the square


def test_stain_jitter():
    patches = data.pyramid(random_bags())
    assert torch.allclose(data.stain_jitter(patches, 0.0), patches.clamp(min=1 / 255), atol=1e-4)
    lot = torch.rand(len(patches), 2, 3, generator=torch.Generator().manual_seed(1))
    a = data.stain_jitter(patches, 0.1, lot)
    assert a.shape == patches.shape and 0 <= a.min() and a.max() <= 1 and 0.005 < (a - patches).abs().mean() < 0.2
    alone = data.stain_jitter(patches[:, 3:5], 0.1, lot)    # one stain per bag, for all its patches
    assert torch.allclose(alone, a[:, 3:5], atol=1e-5)
    pure = (-torch.outer(torch.tensor([0.5, 1.0]), data.HED[0])).exp().view(1, 2, 3, 1, 1)  # two depths of haematoxylin
    out = -data.stain_jitter(pure, 0.1, torch.rand(len(pure), 2, 3, generator=torch.Generator().manual_seed(2))).log().view(2, 3)
    deeper = (out[1] - out[0]) / data.HED[0]              # a gain keeps the colour of a stain and scales its depth
    assert torch.allclose(deeper, deeper[:1].expand(3), atol=1e-3) and 0.45 <= deeper[0] <= 0.55


def test_pyramid_compiles_without_graph_breaks():
    def step(images, nodes, turns):
        return data.stain_jitter(data.pyramid(data.turn(images, turns), nodes=nodes), 0.0)
    args = random_bags(), data.sample_nodes(4, 2), torch.tensor([0, 3, 5, 7])
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), step(*args), atol=1e-5)


# ---------------------------------------------------------------- real slides, if there are any

@pytest.mark.skipif("NANOMRPLIP_SLIDES" not in os.environ, reason="set NANOMRPLIP_SLIDES to a folder of slides")
def test_real_slides(tmp_path):
    for path in data.find_slides(os.environ["NANOMRPLIP_SLIDES"]):
        with data.Slide(path, mpp=0.5) as slide:
            W, H = slide.size
            assert slide.read(W // 2 - 100, H // 2 - 100, 200, 100).std() > 2
            mask, _ = data.tissue_mask(slide)
            assert 0.02 < mask.mean() < 0.99
