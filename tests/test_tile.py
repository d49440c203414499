"""Test tissue, parents and tiling: pytest tests/test_tile.py"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import written
from conftest import Script, script
from PIL import Image
from written import SMALL, picture, slides_in, write

import data
from prepare.slide import Slide, find_slides, mpp_table
from prepare.tile import choose_parents, divide, run_jobs, tile, tissue_fraction, tissue_mask


def cli(*args, **more):
    return script("prepare.tile", "--workers", 1, *args, **more)


# ---------------------------------------------------------------- tissue and parents


def tissue_of(tmp_path, image, um=4):
    with Slide(write(tmp_path / "t.svs", image)) as slide:
        return tissue_mask(slide, um)


def test_tissue_is_stain_not_glass(tmp_path):
    glass = np.full((512, 512, 3), 243, np.uint8)
    tissue = picture(512, 512)

    def on(part, left=glass):
        # The right half shows `part`.
        image = left.copy()
        image[:, 256:] = np.broadcast_to(part, image.shape)[:, 256:]
        return image

    cases = {"pale": on(np.uint8([238, 220, 232])), "dark": (on(tissue) * 0.5).astype(np.uint8)}
    cases["faint"] = on(np.uint8([240, 232, 240]))
    # A pale blue counterstain, and brown DAB in it.
    ihc = np.kron(np.eye(16) > 0, np.ones((32, 32)))[..., None] > 0
    cases["ihc"] = on(np.where(ihc, (150, 110, 80), np.uint8([205, 215, 230])))
    pens = dict(black=(30, 30, 35), blue=(45, 70, 160), green=(30, 110, 80), red=(200, 45, 65))
    pens |= dict(violet=(110, 50, 160), purple=(128, 0, 128), dark_purple=(90, 40, 120))
    fillings = dict(grey_filling=(200, 200, 200), black_filling=(0, 0, 0))
    for pen, colour in (pens | fillings).items():
        cases[pen] = on(tissue, np.broadcast_to(np.uint8(colour), glass.shape).copy())
    for name, image in cases.items():
        mask, scale = tissue_of(tmp_path, image)
        assert scale == 16 and mask.shape == (32, 32), name
        assert mask[:, 17:].mean() > 0.98 and mask[:, :15].mean() < 0.02, name
    # All glass, also of a tint, all tissue, and 16 um of tissue.
    shares = {(245,) * 3: 0, (228, 234, 246): 0, (250, 242, 226): 0, (200, 120, 180): 1}
    for colour, share in shares.items():
        mask, _ = tissue_of(tmp_path, np.full((256, 256, 3), colour, np.uint8), um=8)
        assert mask.mean() == share
    tiny = glass.copy()
    tiny[200:264, 300:364] = tissue[:64, :64]
    assert 16 <= tissue_of(tmp_path, tiny)[0].sum() <= 25


def test_tissue_fraction_by_hand():
    # One 10 x 10 px square of tissue in 20 x 20.
    mask = np.array([[1, 0], [0, 0]], bool)
    x = np.array([0, 0, 5, -5, 100, 2])
    y = np.array([0, 0, 5, -5, 100, 3])
    side = np.array([10, 20, 10, 10, 5, 4])
    share = tissue_fraction(mask, 10, x, y, side)
    assert np.allclose(share, [1, 0.25, 0.25, 0.25, 0, 1])


def test_parents(tmp_path):
    path = write(tmp_path / "a.svs", picture(1024, 1300, glass=600))
    with Slide(path) as slide:
        # A parent is 256 px wide, and the grid is centred: columns from x = 10.
        bags = choose_parents(slide, fov_px=32)
        places = {(x, side) for x, _, side, _ in bags}
        assert places == {(522, 256), (778, 256), (1034, 256)} and len(bags) == 12
        for x, _, _, tissue in bags:
            assert abs(tissue[0] - (0.695 if x == 522 else 1)) < 0.1
            # A parent's share is its children's mean.
            assert np.allclose(tissue[0], tissue[21:].mean())
        few = choose_parents(slide, fov_px=32, parents=5)
        again = choose_parents(slide, fov_px=32, parents=5)
        other = choose_parents(slide, fov_px=32, parents=5, seed=1)
        assert [b[:2] for b in few] == [b[:2] for b in again] and len(few) == 5
        assert [b[:2] for b in few] != [b[:2] for b in other]
    fine = write(tmp_path / "fine.svs", picture(1024, 1300, glass=600), tile=(64, 64))
    # Where tiles are small, parents start on their edges: each tile is decoded once.
    with Slide(fine) as slide:
        assert {x for x, *_ in choose_parents(slide, fov_px=32)} == {512, 768, 1024}
    # The true mpp sets the side: 32 * 2 / 0.2525 = 253.5 -> 256.
    with Slide(path, mpp=0.2525) as slide:
        assert choose_parents(slide, fov_px=32)[0][2] == 256
    with Slide(write(tmp_path / "small.svs", picture(200, 230))) as slide:
        # Centred and padded: 200 * 230 of 256^2.
        ((x, y, side, tissue),) = choose_parents(slide, fov_px=32)
        assert (x, y, side) == (-13, -28, 256) and abs(tissue[0] - 0.702) < 0.04
        assert choose_parents(slide, fov_px=64) == []


def test_the_draw_and_the_grid(tmp_path):
    """Bags of published seeds must stay the same: these numbers were drawn in 2026."""
    with Slide(write(tmp_path / "a.svs", picture(1024, 1024))) as slide:
        bags = choose_parents(slide, fov_px=16, parents=4, seed=7)
        places = [(384, 128), (640, 128), (640, 768), (128, 896)]
        assert [b[:3] for b in bags] == [(x, y, 128) for x, y in places]
    # The centred grid would have a quarter of this piece in each of four parents.
    image = np.full((768, 768, 3), 243, np.uint8)
    image[384:640, 128:384] = picture(256, 256)
    for n in (128, 768):
        with Slide(write(tmp_path / "b.svs", image, tile=(n, n))) as slide:
            ((x, y, side, tissue),) = choose_parents(slide, fov_px=32, min_tissue=0.9)
            assert (x, y, side) == (128, 384, 256) and tissue[0] > 0.95


# ---------------------------------------------------------------- tiling


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {row["slide"]: row["reason"] for row in map(json.loads, lines)}


def test_tile_shards(tmp_path):
    out = tmp_path / "out"
    counts = tile(slides_in(tmp_path / "in"), out, patch_px=32, fov_px=32)
    assert counts == dict(slides=3, done=3, bags=12, empty=0, failed=0)
    bags = data.Bags(out)
    item = bags[7]
    assert len(bags) == 12 and bags.S == 32 and bags.folder == out
    assert [s.name for s in bags.shards] == ["bags-s0.tar", "bags-s1.tar", "bags-s2.tar"]
    assert bags.shard_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (item["key"], item["slide"], item["index"]) == ("s1-03", "s1.svs", 7)
    assert (bags.keys[7], bags.slides[7]) == ("s1-03", "s1.svs")
    assert item["image"].dtype == torch.uint8
    assert item["valid"].all() and bags.valid.shape == (12, 85) and bags.valid.dtype == torch.bool
    want = torch.from_numpy(picture(512, 512, seed=1)[256:, 256:]).permute(2, 0, 1).float()
    # Only the noise of JPEG is left.
    assert (item["image"] - want).abs().mean() < 8
    row = bags.meta[7]
    assert [row[k] for k in ("key", "x", "y", "side")] == ["s1-03", 256, 256, 256]
    assert row["mags"] == [5, 10, 20, 40] and len(row["tissue"]) == 85
    # WebDataset groups the members of a tar by their name up to the first dot.
    samples = {}
    with tarfile.open(bags.shards[0]) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
            assert member.mtime == 0 and member.uname == ""
    assert list(samples) == bags.keys[:4] == [f"s0-{i:02d}" for i in range(4)]
    for i, sample in enumerate(samples.values()):
        image = Image.open(io.BytesIO(sample["jpg"]))
        # 4:2:2 halves the colour across and not down.
        assert image.size == (256, 256) and image.layer[0][1:3] == (2, 1)
        assert (np.asarray(image) == bags[i]["image"].permute(1, 2, 0).numpy()).all()
        about = json.loads(sample["json"])
        assert set(about) == {"slide", "x", "y", "side", "crc", "mpp", "mags", "tissue"}
        assert about["crc"] == zlib.crc32(sample["jpg"]) == bags.meta[i]["crc"]
        assert about["slide"] == "s0.svs" and about["mpp"] == 0.25
        assert about["tissue"] == bags.meta[i]["tissue"]


def test_a_bag_that_was_damaged_is_named(tmp_path):
    tile(slides_in(tmp_path / "in", 1), tmp_path / "out", patch_px=32, fov_px=32)
    bags = data.Bags(tmp_path / "out")
    at, n = bags.meta[1]["jpg"]
    shard = bags.shards[0].read_bytes()
    bags.shards[0].write_bytes(shard[: at + n // 2] + bytes(400) + shard[at + n // 2 + 400 :])
    with pytest.raises(
        ValueError, match="bags-s0.tar: bag s0-01 is damaged.*: start again, or delete this file"
    ):
        bags[1]
    # Shards of older versions have no checksums.
    index = tmp_path / "out" / "bags-s0.index.json"
    index.write_text(re.sub(r'"crc": \d+, ', "", index.read_text()))
    assert data.Bags(tmp_path / "out")[1]["image"].shape == bags[0]["image"].shape


def test_tile_resumes_extends_and_is_deterministic(tmp_path):
    slides = slides_in(tmp_path / "in")
    a = tmp_path / "a"
    b = tmp_path / "b"
    (slides / "bad.svs").write_text("x")
    assert tile(slides, a, workers=2, **SMALL)["failed"] == 1
    assert list(failures(a)) == ["bad.svs"]
    (slides / "bad.svs").unlink()
    tile(slides / "s0.svs", b, **SMALL)
    before = (b / "bags-s0.tar").stat().st_mtime_ns
    # A crash before its index leaves a shard that is made anew.
    (b / "bags-s1.tar").write_text("left by a crash")
    assert tile(slides, b, **SMALL)["done"] == 3
    assert (b / "bags-s0.tar").stat().st_mtime_ns == before and not list(b.glob("*.tmp"))
    for name in ("bags-s0.tar", "bags-s1.tar", "bags-s2.tar", "bags-s1.index.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    # A blank slide leaves an index without bags, and no tar.
    write(slides / "blank.svs", np.full((512, 512, 3), 245, np.uint8))
    assert tile(slides, b, **SMALL) == dict(slides=4, done=4, bags=12, empty=1, failed=0)
    assert not (b / "bags-blank.tar").exists() and (b / "bags-blank.index.json").exists()
    assert len(data.Bags(b)) == 12
    for change in (dict(patch_px=16), dict(mpp=0.5)):
        words = "was made with .*'patch_px': 8.*mpp 0.25: repeat those"
        with pytest.raises(ValueError, match=words):
            tile(slides, b, **SMALL | change)
    # A lost shard is made again.
    (b / "bags-s0.tar").unlink()
    with pytest.raises(ValueError, match="bags-s0.tar is missing"):
        data.Bags(b)
    assert tile(slides, b, **SMALL)["bags"] == 12
    assert (b / "bags-s0.tar").read_bytes() == (a / "bags-s0.tar").read_bytes()
    with data.lock(b), pytest.raises(ValueError, match="b is in use by process"):
        tile(slides, b, **SMALL)


def test_keys_have_no_dot_and_do_not_clash(tmp_path):
    (tmp_path / "in").mkdir()
    one = write(tmp_path / "in" / "a.b.svs", picture(256, 256))
    tile(one, tmp_path / "out", **SMALL)
    assert data.Bags(tmp_path / "out").keys == ["a_b-00"]
    two = write(tmp_path / "in" / "a_b.tif", picture(256, 256))
    with pytest.raises(ValueError, match="bags of .* would share a name: rename one"):
        find_slides(tmp_path / "in")
    # The files of a DICOM series are one slide.
    (tmp_path / "dicom").mkdir()
    for name, series in (("1.dcm", 7), ("2.dcm", 8), ("3.dcm", 7), ("4.dcm", 7)):
        head = bytes(128) + b"DICM" + b"\x20\0\x0e\0UI\4\0" + b"1.2.%d" % series
        (tmp_path / "dicom" / name).write_bytes(head)
    assert [path.name for path in find_slides(tmp_path / "dicom")] == ["1.dcm", "2.dcm"]
    # The same if they come in two calls.
    with pytest.raises(ValueError, match="bags-a_b.index.json is of a.b.svs, not of .*a_b.tif"):
        tile(two, tmp_path / "out", **SMALL)


def test_a_bad_slide_costs_one_slide(tmp_path):
    slides = slides_in(tmp_path / "in", 2)
    out = tmp_path / "out"
    good = (slides / "s0.svs").read_bytes()
    (slides / "cut.svs").write_bytes(good[: len(good) // 2])
    (slides / "empty.svs").write_bytes(b"")
    write(slides / "scale.svs", picture(), text="Aperio x")
    # Overwrite a piece of one tile, which decodes nevertheless.
    rotten = write(slides / "rotten.svs", picture(), compression="jpeg").read_bytes()
    with tifffile.TiffFile(slides / "rotten.svs") as tif:
        at = tif.pages[0].dataoffsets[1] + 5000
    (slides / "rotten.svs").write_bytes(rotten[:at] + bytes(200) + rotten[at + 200 :])
    small = ("--out", out, "--patch-px", 8, "--fov-px", 32)
    for _ in range(2):
        # The same command tries them again.
        r = cli(slides, *small)
        assert r.returncode == 1 and "8 bags from 2 of 6 slides" in r.stdout
        assert "error: 4 of 6 slides cannot be used" in r.stderr and "Traceback" not in r.stderr
        assert "slides: " not in r.stderr  # the bar would fill a log
        assert set(failures(out)) == {"cut.svs", "empty.svs", "rotten.svs", "scale.svs"}
    assert "rotten.svs is damaged" in failures(out)["rotten.svs"]
    assert "pass --mpp" in failures(out)["scale.svs"]
    # A repaired slide and a table of scales.
    (slides / "rotten.svs").write_bytes(good)
    (tmp_path / "mpp.csv").write_text("slide,mpp\nscale,5e-1\n")
    r = cli(slides, *small, "--mpp", tmp_path / "mpp.csv")
    assert r.returncode == 1 and "28 bags from 4 of 6 slides" in r.stdout
    assert set(failures(out)) == {"cut.svs", "empty.svs"}


def test_slides_without_parents_are_told(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "blank.svs", picture(512, 512, glass=440))
    small = (tmp_path / "in", "--out", tmp_path / "out", "--patch-px", 8, "--fov-px", 32)
    r = cli(*small)
    assert r.returncode == 1 and r.stdout.startswith("0 bags from 0 of 1 slides")
    words = "blank.svs: no square has 0.5 of tissue, the best has 0.2.: look with prepare.preview, "
    assert re.search(words + "lower --min-tissue or --fov-px", r.stderr)
    assert "error: no slide has a square with enough tissue: lower --min-tissue" in r.stderr
    # One slide with parents is enough.
    write(tmp_path / "in" / "good.svs", picture(512, 512))
    r = cli(*small)
    assert r.returncode == 0 and "4 bags from 1 of 2 slides" in r.stdout


def test_mistakes_at_the_command_line_are_one_sentence(tmp_path):
    slides = slides_in(tmp_path / "in", 1)
    out = ("--out", tmp_path / "out")
    r = cli(slides, *out, "--patch-p", 3)
    assert r.returncode == 2 and "unrecognized arguments: --patch-p" in r.stderr
    for args, words in (
        ((slides, *out, "--min-tissue", 50), "min_tissue is 50.0, not 0 to 1"),
        ((slides, *out, "--parents", 0), "parents is below 1"),
        ((tmp_path / "no", *out), "check the path"),
        ((slides, "--out", slides / "s0.svs"), "s0.svs"),
    ):
        r = cli(*args)
        assert r.returncode == 1 and words in r.stderr
        assert r.stderr.startswith("error: ") and r.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_finished_slides(tmp_path, workers):
    slides = slides_in(tmp_path / "in", 1)
    out = tmp_path / "out"
    # The same pixels under many names: links cost nothing.
    for i in range(400):
        os.link(slides / "s0.svs", slides / f"t{i:03d}.svs")

    def before():
        os.setsid()
        # A shell's background jobs inherit "ignore".
        signal.signal(signal.SIGINT, signal.default_int_handler)

    args = ("--out", out, "--patch-px", 64, "--fov-px", 32, "--workers", workers)
    p = Script("prepare.tile", slides, *args, before=before)
    deadline = time.time() + 30
    while not list(out.glob("*.index.json")) and time.time() < deadline:
        time.sleep(0.01)
    # A terminal signals workers too. Python drops an interrupt in a destructor: press again.
    os.killpg(p.pid, signal.SIGINT)
    again = threading.Timer(10, os.killpg, (p.pid, signal.SIGINT))
    again.start()
    p = p.wait()
    again.cancel()
    assert p.returncode == 130 and "continue" in p.stderr and "Traceback" not in p.stderr
    done = {f.name.removesuffix(".index.json") for f in out.glob("*.index.json")}
    shards = {f.name.removesuffix(".tar") for f in out.glob("*.tar")}
    assert 0 < len(done) < 401 and done <= shards and len(shards - done) <= 1
    assert not list(out.glob(".*.tmp"))


def living(group):
    """List the processes of a group that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its = path.read_text().rpartition(") ")[2].split()[:3]
            found += [path.parent.name] * (int(its) == group and state != "Z")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a process hears of its parent's end on Linux")
def test_workers_end_with_the_command(tmp_path):
    """A kill of the command alone must leave none: it would write into the next call's folder."""
    slides = slides_in(tmp_path / "in", 1)
    for i in range(400):
        os.link(slides / "s0.svs", slides / f"t{i:03d}.svs")
    out = tmp_path / "out"
    args = ("--out", out, "--patch-px", 64, "--fov-px", 32, "--workers", 2)
    p = Script("prepare.tile", slides, *args, before=os.setsid)
    until = time.time() + 40
    while not list(out.glob("*.index.json")) and time.time() < until:
        time.sleep(0.01)
    assert len(living(p.pid)) >= 3
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    while living(p.pid) and time.time() < until:
        time.sleep(0.01)
    assert not living(p.pid) and len(list(out.glob("*.index.json"))) < 401


def test_a_job_that_kills_its_process_costs_one_job():
    assert list(run_jobs(written.die_below_zero, [-1, 2], 2, 1)) == [None, 2]


def test_slides_are_divided_by_patient_the_same_way_each_time(tmp_path):
    slides = slides_in(tmp_path / "in", 8)
    deep = slides / "0a1b" / "logs"
    deep.mkdir(parents=True)
    # As the client of the GDC lays them: a folder a slide.
    (slides / "s7.svs").rename(slides / "0a1b" / "s7.svs")
    (slides / "0a1b" / "._s7.svs").write_bytes(b"of macOS")
    table = tmp_path / "patients.csv"
    table.write_text("slide,patient\n" + "".join(f"s{i},p{i // 2}\n" for i in range(8)))
    more = ("--out", tmp_path / "out", "--patch-px", 8, "--fov-px", 32, "--parents", 1)
    r = cli(slides, *more, "--test-share", 0.4, "--patients", table, check=True)
    parts = {}
    for part in ("train", "test"):
        files = (tmp_path / "out" / part).glob("*.index.json")
        parts[part] = {int(path.name[6]) for path in files}
        assert f"{len(parts[part])} bags from {len(parts[part])} of" in r.stdout
    assert parts["train"] | parts["test"] == set(range(8)) and min(map(len, parts.values())) > 0
    assert {i // 2 for i in parts["train"]}.isdisjoint({i // 2 for i in parts["test"]})
    # The same again is done; another share would put a slide on both sides.
    again = cli(slides, *more, "--test-share", 0.4, "--patients", table, check=True)
    assert "lacks" not in again.stderr
    table.write_text("slide,patient\ns0,p0\n")
    r = cli(slides, *more, "--test-share", 0.99, "--patients", table)
    assert "patients.csv lacks 7 of 8 slides, as s1.svs: each is taken for a patient" in r.stderr
    assert re.search(
        r"error: s\d.svs was tiled into .*out/train, and is now of test: repeat", r.stderr
    )
    r = cli(slides, *more, "--patients", table)
    assert r.returncode == 1 and "--patients divides slides for --test-share: give both" in r.stderr
    # A patient of TCGA is in the name; others are alone.
    names = [Path(f"TCGA-a{i % 3}-000{i % 3}-01Z-00-DX{i}.svs") for i in range(9)]
    for seed in ("", "x"):
        divided = divide([*names, Path(f"{seed}b.svs")], 0.5, None, Path("o"))
        sides = [{name.name[:12] for name in slides} for slides in divided.values()]
        assert not sides[0] & sides[1]
    with pytest.raises(ValueError, match="choose another share"):
        divide(names, 1, None, Path("o"))


def test_mpp_tables(tmp_path, capsys):
    path = tmp_path / "m.csv"

    def table(text, encoding="utf-8"):
        path.write_text(text, encoding=encoding)
        return mpp_table(str(path), ["a.svs", "b,c.svs", "d.e.svs"])

    want = {"a.svs": 0.3, "b,c.svs": None, "d.e.svs": None}
    assert table("a.svs,0.3\n") == table('"a.svs",0.3', "utf-8-sig") == want
    assert table("slide,mpp\r\na.svs, 0.3\r\n\r\n") == table("a,3e-1") == table("a,0,3") == want
    assert table('d.e,1\n"b,c.svs",0.5') == {"a.svs": None, "b,c.svs": 0.5, "d.e.svs": 1}
    # A line of another slide may be one that is misspelt: it is told.
    lines = "".join(f"z{i},1\n" for i in range(6))
    assert table(lines + "a,0.3") == want
    told = "m.csv: 6 lines name no slide here: z0, z1, z2, z3, z4, ...\n"
    assert capsys.readouterr().err.endswith(told)
    for text, words in (
        (lines, "m.csv names none of the slides .z0, z1"), ("a,1\na.svs,2", ":2: a.svs has two"),
        ("slide,mpp", "names none"), ("a.svs,0.3\nb,x\n", "m.csv:2: expected slide,value"),
        ("slide,mpp\na.svs;0.3", "m.csv:2: expected"), ("a.svs;0.3\nd.e,1", "m.csv:1: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            table(text)
    assert mpp_table(0.5, ["a"]) == mpp_table("0,5", ["a"]) == {"a": 0.5}
    assert mpp_table(None, ["a"]) == {"a": None}


def test_a_full_disk_is_one_sentence(tmp_path):
    """No file may grow beyond 40 kB: the same error, at the same place, as a full disk."""
    slides = slides_in(tmp_path / "in", 2)
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))

    args = ("--out", out, "--patch-px", 32, "--fov-px", 32)
    r = cli(slides, *args, before=limit)
    assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith("error: ")
    assert "bags-s0.tar cannot be written (File too large)" in r.stderr
    assert "Traceback" not in r.stderr
    assert not list(out.glob("bags-*")) and not list(out.glob(".bags*"))
    assert tile(slides, out, patch_px=32, fov_px=32)["failed"] == 0
