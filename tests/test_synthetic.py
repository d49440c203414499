"""python -m pytest tests/test_synthetic.py -q        the built-in world: deterministic, real files, truthful, as noisy as told"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import synthetic

SIZE = 1024


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    out = tmp_path_factory.mktemp("slides")
    return synthetic.make_slides(out, 2, seed=3, first=6, size=SIZE, workers=1)


def level0(path):
    with tifffile.TiffFile(path) as tiff:
        return tiff.series[0].levels[0].asarray()


def test_same_seed_same_pixels_other_seed_other_pixels(slides, tmp_path):
    again = synthetic.make_slides(tmp_path, 3, seed=3, first=6, size=SIZE, workers=2)  # other processes, other order
    assert [p.name for p in again] == ["slide-0006.svs", "slide-0007.svs", "slide-0008.svs"]
    assert np.array_equal(level0(slides[1]), level0(again[1]))
    assert slides[1].read_bytes() == again[1].read_bytes()
    synthetic.write_slide(tmp_path / "other.svs", 4, 7, SIZE)
    assert not np.array_equal(level0(slides[1]), level0(tmp_path / "other.svs"))
    assert not np.array_equal(level0(slides[0]), level0(slides[1]))


def test_slide_is_an_aperio_pyramid(slides):
    with tifffile.TiffFile(slides[0]) as tiff:
        assert tiff.is_svs
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(SIZE // k, SIZE // k, 3) for k in (1, 4, 16)]
        for level in levels:
            page = level.pages[0]
            assert page.is_tiled and (page.tilelength, page.tilewidth) == (256, 256) and page.compression.name == "JPEG"
        assert tiff.pages[0].description.startswith("Aperio") and "|MPP = 0.25" in tiff.pages[0].description
        assert not tiff.pages[1].is_tiled  # Aperio puts a stripped thumbnail after the baseline
        fine, coarse = (level.asarray().astype(float) for level in levels[:2])
    averaged = fine.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3))
    assert np.abs(averaged - coarse).mean() < 6 and abs((averaged - coarse).mean()) < 0.5  # area averages, up to JPEG


def test_finished_slides_are_kept_and_foreign_ones_refused(slides):
    before = [p.stat().st_mtime_ns for p in slides]
    synthetic.make_slides(slides[0].parent, 2, seed=3, first=6, size=SIZE, workers=1)
    assert [p.stat().st_mtime_ns for p in slides] == before
    assert not [p for p in slides[0].parent.iterdir() if p.name.endswith(".tmp")]
    with pytest.raises(ValueError, match="seed 3"):
        synthetic.make_slides(slides[0].parent, 2, seed=5, first=6, size=SIZE, workers=1)
    with pytest.raises(ValueError, match="multiple"):
        synthetic.write_slide(slides[0].parent / "odd.svs", 0, 0, 1000)


def test_truth_maps_agree_with_pixels(slides):
    for path in slides:
        known, tissue, tumour = synthetic.read_truth(path)
        assert known["diagnosis"] == synthetic.facts(3, known["index"])["diagnosis"]
        assert tissue.shape == tumour.shape == (SIZE // 16, SIZE // 16)
        bright = level0(path).reshape(SIZE // 16, 16, SIZE // 16, 16, 3).mean((1, 3, 4))
        assert np.median(bright[tissue == 3]) > 215 > np.median(bright[tissue == 0]) + 25
        assert tumour.mean() > 0.5 and (tissue[tumour] == 0).mean() > 0.25
        assert not ((tissue == 2) & tumour).mean() > 0.02


def test_every_10x_field_holds_the_amounts_of_the_table_and_a_20x_field_anything():
    def amounts(layers, side, offset):  # of epithelium, lumen, stroma in fields of `side` pixels: [2, 128, 128] squares of 8 px -> [3, fields]
        epithelium, lumen = layers[0] > 0, (layers[0] <= 0) & (layers[1] > 0)
        k, tissues = side // 8, np.stack([epithelium, lumen, ~epithelium & ~lumen])[:, offset : offset + 96, offset : offset + 96]
        return tissues.reshape(3, 96 // k, k, 96 // k, k).mean((2, 4)).reshape(3, -1)

    for name, (shares, _) in synthetic.ARRANGEMENTS.items():
        assert abs(sum(shares) - 1) < 1e-9
        slides = [synthetic.arrange(np.random.default_rng(i), name, 1024) for i in range(8)]
        wide = np.concatenate([amounts(s, 256, offset) for s in slides for offset in (0, 13, 29)], 1)  # wherever the field lies
        close = np.concatenate([amounts(s, 128, 13) for s in slides], 1)
        wide, close = (np.abs(found - np.array(shares)[:, None]) for found in (wide, close))
        assert wide.mean() < 0.025 and wide.max() < 0.11, name
        assert close.mean() > 6 * wide.mean(), name


def test_cells_are_alike_at_10x_and_differ_at_20x():
    def spectrum_gap(reduce, channel):
        pictures = {}
        for kind in synthetic.CYTOLOGIES:
            cells = [synthetic.sprites(np.random.default_rng(i), kind, 9.5, [0.0], 0.0)[0, ..., channel] for i in range(8)]
            cells = [np.pad(c, (48 - len(c)) // 2 + 1)[:48, :48].reshape(48 // reduce, reduce, 48 // reduce, reduce).mean((1, 3)) for c in cells]
            pictures[kind] = np.mean([np.abs(np.fft.fft2(c)) for c in cells], 0)
        mean = np.mean(list(pictures.values()), 0)
        return np.mean([np.linalg.norm(p - mean) for p in pictures.values()]), np.linalg.norm(mean)

    gap, size = spectrum_gap(4, 0)
    assert gap < 0.02 * size  # what covers is the same for all
    gap, size = spectrum_gap(2, 1)
    assert gap > 0.2 * size  # what differs, differs at 20x
    assert spectrum_gap(4, 1)[1] / 4 < 0.3 * size  # and is gone at 10x (the norm of a spectrum grows with the pixels)


def test_a_slide_of_one_cytology_has_the_colours_of_another_once_averaged():
    tumour = np.zeros((64, 64), np.uint8)
    means = []
    for c in range(4):  # the same random numbers, another cytology
        truth = dict(synthetic.facts(0, 0), cytology=synthetic.CYTOLOGIES[c])
        image, seen, _ = synthetic.paint(np.random.default_rng(0), truth, 1024, tumour)
        means.append(image[128:-128, 128:-128].mean((0, 1)))
        cells = image[np.kron(seen == 0, np.ones((16, 16), bool))]
        assert ((cells == 0) | (cells == 255)).mean() < 0.01  # a blend that clips is not undone by averaging
    assert np.ptp(means, axis=0).max() < 1.0  # grey levels


def test_classes_are_balanced_and_diagnoses_give_no_fact_away():
    for first in (0, 13):
        assert len({synthetic.facts(0, i)["diagnosis"] for i in range(first, first + 20)}) == 20
    names = [name for row in synthetic.DIAGNOSES for name in row]
    assert len(set(names)) == 20
    wordings = synthetic.ARCHITECTURES + synthetic.CYTOLOGIES
    said = {word for fact in wordings for text in (fact, *synthetic.WORDS[fact]) for word in text.lower().split()}
    assert not said & {word for name in names for word in name.lower().split()}


def test_captions_are_as_noisy_as_told():
    truth = {**synthetic.facts(0, 5), "tissue": "tumour", "fat": 0.0}  # nests, vesicular
    rng = np.random.default_rng(0)

    def rates(level, own, others, miss, wrong):
        texts = [synthetic.caption(rng, level, truth, miss, wrong) for _ in range(4000)]
        assert all(t.strip() and t[0].isupper() and t.endswith(".") and len(t.split()) <= 40 for t in texts)
        has = lambda names: np.mean([any(w in t for n in names for w in synthetic.WORDS[n]) for t in texts])  # noqa: E731
        return has([own]), has(others), np.mean([truth["diagnosis"] in t for t in texts]), texts

    others = [n for n in synthetic.ARCHITECTURES if n != "nests"]
    right, wrong, guess, _ = rates(1, "nests", others, 0.3, 0.1)
    assert abs(right - 0.7 * 0.9) < 0.03 and abs(wrong - 0.7 * 0.1) < 0.02 and abs(guess - 0.7 * 0.9) < 0.03
    right, wrong, guess, texts = rates(3, "vesicular", [n for n in synthetic.CYTOLOGIES if n != "vesicular"], 0.0, 0.0)
    assert right == 1 and wrong == 0 and guess == 1
    assert not any(w in t for t in texts for n in synthetic.ARCHITECTURES for w in synthetic.WORDS[n])
    _, _, guess, _ = rates(0, "nests", others, 1.0, 0.0)
    assert guess == 0


def write_shard(path, bags):
    with tarfile.open(path, "w") as tar:
        for key, meta in bags.items():
            picture = io.BytesIO()
            Image.new("RGB", (64, 64)).save(picture, "jpeg")
            for name, data in ((f"{key}.jpg", picture.getvalue()), (f"{key}.json", json.dumps(meta).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_describe_every_node_once_and_resume(slides, tmp_path):
    meta = dict(slide="slide-0006.svs", side=512, mpp=0.25, levels=[5, 10, 20, 40], tissue=[1.0] * 85)
    bags = {"a": dict(meta, x=256, y=256), "b": dict(meta, x=SIZE - 256, y=0), "glass": dict(meta, x=SIZE, y=SIZE)}
    write_shard(tmp_path / "bags-000000.tar", bags)
    synthetic.describe(tmp_path, slides[0].parent, seed=0)
    lines = {}
    for kind in ("captions", "truth"):
        path = tmp_path / f"bags-000000.{kind}.jsonl"
        lines[kind] = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(r["key"], r["node"]) for r in lines[kind]] == [(key, n) for key in bags for n in range(85)]
    assert all(r["caption"] for r in lines["captions"])
    _, tissue, tumour = synthetic.read_truth(slides[0])
    for r in lines["truth"]:
        assert (r["tumour"] >= 0.5) == (r["diagnosis"] is not None) == (r["tissue"] == "tumour") or r["diagnosis"] is None
        if r["key"] == "glass":
            assert r["tissue"] == "glass" and r["tumour"] == 0 and r["architecture"] is None
    root = lines["truth"][0]
    assert abs(root["tumour"] - tumour[16:48, 16:48].mean()) < 1e-3
    seen = []
    for node, part in zip(range(1, 5), (tumour[16:32, 16:32], tumour[16:32, 32:48], tumour[32:48, 16:32], tumour[32:48, 32:48])):
        value = lines["truth"][node]["tumour"]  # the region's share, or 0 where almost none of it is tumour cells
        assert value == 0 or abs(value - part.mean()) < 1e-3
        seen.append(value > 0)
    assert any(seen)

    first = (tmp_path / "bags-000000.captions.jsonl").read_bytes()
    (tmp_path / "bags-000000.captions.jsonl").write_bytes(b"kept\n")
    synthetic.describe(tmp_path, slides[0].parent, seed=0)
    assert (tmp_path / "bags-000000.captions.jsonl").read_bytes() == b"kept\n"  # described: skipped
    (tmp_path / "bags-000000.truth.jsonl").unlink()
    synthetic.describe(tmp_path, slides[0].parent, seed=0)
    assert (tmp_path / "bags-000000.captions.jsonl").read_bytes() == first
    with pytest.raises(ValueError, match="no bags"):
        synthetic.describe(slides[0].parent, slides[0].parent, seed=0)
