"""Check the built-in world: deterministic, real files, truthful, as noisy as told.

pytest tests/test_world.py
"""

import fcntl
import io
import json
import os
import signal
import time

import numpy as np
import pytest
import tifffile
import torch
from conftest import Script, script
from PIL import Image

import data
import text
from prepare import paint, world
from prepare.paint import ARCHITECTURES, CYTOLOGIES, TISSUES

SIZE = 1024


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    out = tmp_path_factory.mktemp("slides")
    return world.make_slides(out, 8, SIZE)[6:]


def level0(path):
    with tifffile.TiffFile(path) as tiff:
        return tiff.series[0].levels[0].asarray()


def blocks(image, k):
    """Average squares of k x k pixels."""
    h, w = image.shape[:2]
    return image.reshape(h // k, k, w // k, k, -1).mean((1, 3))


# ---- Slides --------------------------------------------------------------------------------------


def test_same_seed_same_pixels_other_seed_other_pixels(slides, tmp_path):
    # Other processes.
    again = world.make_slides(tmp_path, 8, SIZE, workers=2)[6:]
    assert [p.name for p in again] == ["slide-0006.svs", "slide-0007.svs"]
    assert slides[1].read_bytes() == again[1].read_bytes()
    other, _ = paint.paint_slide(4, 7, SIZE)
    with tifffile.TiffFile(io.BytesIO(other)) as tiff:
        assert not np.array_equal(level0(slides[1]), tiff.series[0].levels[0].asarray())
    assert not np.array_equal(level0(slides[0]), level0(slides[1]))


def test_slide_is_an_aperio_pyramid(slides):
    with tifffile.TiffFile(slides[0]) as tiff:
        assert tiff.is_svs
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(SIZE // k, SIZE // k, 3) for k in (1, 4, 16)]
        for level in levels:
            page = level.pages[0]
            assert page.is_tiled and page.compression.name == "JPEG"
            assert (page.tilelength, page.tilewidth) == (256, 256)
        about = tiff.pages[0].description
        assert about.startswith("Aperio") and "|MPP = 0.25" in about
        # Aperio puts a stripped thumbnail after the baseline.
        assert not tiff.pages[1].is_tiled
        fine, coarse = (level.asarray().astype(float) for level in levels[:2])
    # The lower level is an area average, up to JPEG.
    difference = blocks(fine, 4) - coarse
    assert np.abs(difference).mean() < 6
    assert abs(difference.mean()) < 0.5


def test_finished_slides_are_kept_and_foreign_ones_refused(slides):
    folder = slides[0].parent
    before = [p.stat().st_mtime_ns for p in slides]
    world.make_slides(folder, 8, SIZE)
    assert [p.stat().st_mtime_ns for p in slides] == before
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    with pytest.raises(ValueError, match="slide-0000.svs is not of size 512"):
        world.make_slides(folder, 8, 512)
    with pytest.raises(ValueError, match="multiple"):
        paint.paint_slide(0, 0, 1000)


def test_truth_maps_agree_with_pixels(slides):
    for path in slides:
        known, tissue, tumour = world.read_slide_truth(path)
        assert known["diagnosis"] == paint.facts(0, known["index"])["diagnosis"]
        assert tissue.shape == tumour.shape == (SIZE // 16, SIZE // 16)
        bright = blocks(level0(path), 16).mean(-1)
        glass, epithelium = np.median(bright[tissue == 3]), np.median(bright[tissue == 0])
        assert glass > 215 > epithelium + 25
        assert tumour.mean() > 0.5 and (tissue[tumour] == 0).mean() > 0.25
        assert not ((tissue == 2) & tumour).mean() > 0.02


def test_every_10x_field_holds_the_amounts_of_the_table_and_a_20x_field_anything():
    def amounts(layers, side, offset):
        # The share of epithelium, lumen, stroma in each field of `side` pixels: [3, fields].
        epithelium = layers[0] > 0
        lumen = ~epithelium & (layers[1] > 0)
        tissues = np.stack([epithelium, lumen, ~epithelium & ~lumen])
        tissues = tissues[:, offset : offset + 96, offset : offset + 96]
        k = side // 8
        return tissues.reshape(3, 96 // k, k, 96 // k, k).mean((2, 4)).reshape(3, -1)

    for name, (shares, _) in paint.ARRANGEMENTS.items():
        assert abs(sum(shares) - 1) < 1e-9
        drawn = [paint.arrange(np.random.default_rng(i), name, 1024) for i in range(8)]
        # Wherever the field lies.
        wide = [amounts(layers, 256, offset) for layers in drawn for offset in (0, 13, 29)]
        close = [amounts(layers, 128, 13) for layers in drawn]
        wide = np.abs(np.concatenate(wide, 1) - np.array(shares)[:, None])
        close = np.abs(np.concatenate(close, 1) - np.array(shares)[:, None])
        assert wide.mean() < 0.025 and wide.max() < 0.11, name
        assert close.mean() > 6 * wide.mean(), name


def spectrum_gap(k, channel):
    """Compare the mean spectra of the cell types after averaging k x k pixels.

    Returns the mean distance to their mean, and the norm of that.
    """
    spectra = []
    for kind in CYTOLOGIES:
        found = []
        for i in range(8):
            cell = paint.sprites(np.random.default_rng(i), kind, 9.5, [0.0], 0.0)[0, ..., channel]
            cell = np.pad(cell, (48 - len(cell)) // 2 + 1)[:48, :48]
            found.append(np.abs(np.fft.fft2(blocks(cell, k)[..., 0])))
        spectra.append(np.mean(found, 0))
    mean = np.mean(spectra, 0)
    return np.mean([np.linalg.norm(s - mean) for s in spectra]), np.linalg.norm(mean)


def test_cells_are_alike_at_10x_and_differ_at_20x():
    # What covers is the same for all.
    gap, norm = spectrum_gap(4, 0)
    assert gap < 0.02 * norm
    # What differs, differs at 20x and is gone at 10x. A norm of a spectrum grows with the pixels.
    gap, norm = spectrum_gap(2, 1)
    assert gap > 0.2 * norm
    assert spectrum_gap(4, 1)[1] / 4 < 0.3 * norm


def test_a_slide_of_one_cytology_has_the_colours_of_another_once_averaged():
    all_tumour = np.zeros((64, 64), np.uint8)
    means = []
    for cytology in CYTOLOGIES:
        # The same random numbers, another cytology.
        truth = dict(paint.facts(0, 0), cytology=cytology)
        image, seen, _ = paint.paint(np.random.default_rng(0), truth, 1024, all_tumour)
        means.append(image[128:-128, 128:-128].mean((0, 1)))
        # A blend that clips is not undone by averaging.
        cells = image[np.kron(seen == 0, np.ones((16, 16), bool))]
        assert ((cells == 0) | (cells == 255)).mean() < 0.01
    assert np.ptp(means, axis=0).max() < 1.0


def test_classes_are_balanced_and_diagnoses_give_no_fact_away():
    for first in (0, 13):
        found = {paint.facts(0, i)["diagnosis"] for i in range(first, first + 20)}
        assert len(found) == 20
    names = [name for row in paint.DIAGNOSES for name in row]
    assert len(set(names)) == 20
    said = set()
    for fact in ARCHITECTURES + CYTOLOGIES:
        for words in (fact, *world.WORDS[fact]):
            said.update(words.lower().split())
    assert not said & {word for name in names for word in name.lower().split()}


# ---- Captions ------------------------------------------------------------------------------------


def test_captions_are_as_noisy_as_told():
    truth = {**paint.facts(0, 5), "tissue": "tumour", "fat": 0.0}
    assert (truth["architecture"], truth["cytology"]) == ("nests", "vesicular")
    rng = np.random.default_rng(0)

    def say(level, miss, wrong):
        texts = [world.say(rng, level, truth, miss, wrong) for _ in range(4000)]
        for t in texts:
            assert t.strip() and t[0].isupper() and t.endswith(".") and len(t.split()) <= 40
        return texts

    def share(texts, facts):
        words = [word for fact in facts for word in world.WORDS[fact]]
        return np.mean([any(word in t for word in words) for t in texts])

    def guessed(texts):
        return np.mean([truth["diagnosis"] in t for t in texts])

    texts = say(1, 0.3, 0.1)
    others = [name for name in ARCHITECTURES if name != "nests"]
    assert abs(share(texts, ["nests"]) - 0.7 * 0.9) < 0.03
    assert abs(share(texts, others) - 0.7 * 0.1) < 0.02
    assert abs(guessed(texts) - 0.7 * 0.9) < 0.03
    texts = say(3, 0.0, 0.0)
    assert share(texts, ["vesicular"]) == guessed(texts) == 1
    assert share(texts, [name for name in CYTOLOGIES if name != "vesicular"]) == 0
    assert share(texts, ARCHITECTURES) == 0
    assert guessed(say(0, 1.0, 0.0)) == 0


def put_shard(folder, slide, places):
    """Write an index and an empty shard with bags of 512 pixels at `places`."""
    rows = []
    for i, (x, y) in enumerate(places):
        where = dict(x=x, y=y, side=512, mags=list(data.MAGS), tissue=[1.0] * 85)
        rows.append(dict(key=f"{slide}-{i:02d}", jpg=[0, 1], **where))
    index = dict(slide=f"{slide}.svs", patch_px=8, settings={}, mpp=0.25, doubt="", bags=rows)
    data.write_whole(folder / f"bags-{slide}.index.json", json.dumps(index))
    data.write_whole(folder / f"bags-{slide}.tar", bytes(1024))
    return [row["key"] for row in rows]


def read_rows(path):
    return [row for _, row in text.read_lines(path)]


def test_every_node_is_described_once_and_the_same_call_continues(slides, tmp_path):
    places = [(256, 256), (SIZE - 256, 0), (SIZE, SIZE)]
    keys = put_shard(tmp_path, "slide-0006", places)
    world.describe(tmp_path, slides[0].parent)
    captions = tmp_path / "bags-slide-0006.captions.jsonl"
    truths = tmp_path / "bags-slide-0006.truth.jsonl"
    for path in (captions, truths):
        found = [(row["key"], row["node"]) for row in read_rows(path)]
        assert found == [(key, node) for key in keys for node in range(85)]
    assert all(row["caption"] for row in read_rows(captions))

    _, _, tumour = world.read_slide_truth(slides[0])
    rows = read_rows(truths)
    for row in rows:
        assert (row["diagnosis"] is not None) == (row["tumour"] >= 0.75)
        if row["diagnosis"]:
            assert row["tissue"] == "tumour"
        # The last bag lies outside the slide.
        if row["key"] == keys[2]:
            assert row["tissue"] == "glass" and row["tumour"] == 0 and row["architecture"] is None
    assert abs(rows[0]["tumour"] - tumour[16:48, 16:48].mean()) < 1e-3
    quarters = [tumour[i : i + 16, j : j + 16] for i in (16, 32) for j in (16, 32)]
    values = [row["tumour"] for row in rows[1:5]]
    for value, quarter in zip(values, quarters, strict=True):
        # The region's share, or 0 where almost none of it is tumour cells.
        assert value == 0 or abs(value - quarter.mean()) < 1e-3
    assert any(values)

    # A shard that has both files is skipped; else both are written anew.
    first = captions.read_bytes()
    captions.write_bytes(b"kept\n")
    world.describe(tmp_path, slides[0].parent)
    assert captions.read_bytes() == b"kept\n"
    truths.unlink()
    world.describe(tmp_path, slides[0].parent)
    assert captions.read_bytes() == first
    with pytest.raises(ValueError, match="no bags"):
        world.describe(slides[0].parent, slides[0].parent)


# ---- The folder ----------------------------------------------------------------------------------


def test_the_world_is_what_a_lab_brings(world):
    train = data.Bags(world / "train")
    test = data.Bags(world / "test")
    assert train.S == test.S == 64
    assert len(set(train.slides)) == 6 and len(set(test.slides)) == 2
    assert not set(train.slides) & set(test.slides)
    # Every caption has a node, every node a caption.
    for bags in (train, test):
        captions = text.Captions(bags.folder)
        assert all(all(captions[key]) for key in bags.keys)
    # The classes of each fact are those that the truth names.
    classes = data.read_classes(world / "classes.json")
    truth = text.read_truth(train.shards)
    for fact, names in classes["facts"].items():
        found = {row[fact] for bag in truth.values() for row in bag if row[fact]}
        assert found and found <= set(names)
    assert [len(names) for names in classes["facts"].values()] == [5, 4, 20]
    assert all("{}" in template for template in classes["templates"])
    # The prompts of a class are keywords that captions hold.
    assert classes["facts"]["cytology"]["spindle"][0] in text.keywords("It shows spindle cells.")


def test_two_commands_at_once_make_one_world(tmp_path):
    """As two trainings do that start with the default data."""
    argv = ["prepare.world", tmp_path / "w", "--train", 3, "--test", 1, "--size", 512]
    argv += ["--words", 1]
    held = data.lock(tmp_path / "w")
    both = [Script(*argv), Script(*argv)]
    # Both wait while another makes it.
    time.sleep(1)
    assert not (tmp_path / "w/slides").exists()
    # They have inherited the open lock, so closing it here would not free it.
    fcntl.flock(held, fcntl.LOCK_UN)
    for command in both:
        done = command.wait()
        assert done.returncode == 0, done.stderr
    assert len(data.Bags(tmp_path / "w/train")) >= 3 and not list(tmp_path.rglob("*.tmp"))
    assert torch.load(tmp_path / "w/words.pt", weights_only=True)["model"]


def test_the_command_continues_and_writes_masks_and_a_picture(tmp_path):
    command = ["prepare.world", tmp_path / "w", "--train", 6, "--test", 2, "--size", 512]
    command += ["--words", 0]
    run = Script(*command)
    # Interrupt it as Ctrl-C does after the first slide.
    while not list(tmp_path.glob("w/slides/*.svs")):
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    stopped = run.wait()
    assert stopped.returncode == 130
    assert stopped.stderr.endswith("finished files are kept; the same command continues\n")
    first = next(tmp_path.glob("w/slides/*.svs"))
    painted = first.stat().st_mtime_ns
    done = script(*command, "--masks", check=True)
    assert done.stdout.startswith("8 masks")
    assert first.stat().st_mtime_ns == painted
    assert len(data.Bags(tmp_path / "w/train")) >= 1 and len(data.Bags(tmp_path / "w/test")) >= 1
    assert not (tmp_path / "w/words.pt").exists()

    folder = tmp_path / "w/slides"
    lines = (folder / "masks.csv").read_text().splitlines()
    assert lines[:2] == ["file,mask", "slide-0000.svs,slide-0000.mask.png"]
    _, tissue, _ = world.read_slide_truth(folder / "slide-0000.svs")
    with Image.open(folder / "slide-0000.mask.png") as mask:
        assert np.array_equal(np.asarray(mask), tissue)
    names = json.loads((folder / "tissue.json").read_text())
    assert tuple(names) == TISSUES and len(names["tumour"]) == 9
    assert names["tumour"][:2] == ["well-formed gland", "solid nest"]
    world.draw_facts(tmp_path / "world.png")
    with Image.open(tmp_path / "world.png") as picture:
        assert picture.size == (8 * 256, 5 * 256)
    refused = script(*command[:-2], "--size", 1024)
    assert refused.returncode == 1 and "choose another folder" in refused.stderr
