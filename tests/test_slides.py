"""Slides asked by text: pooling by hand, outlines of any shape, attention MIL, both commands.

pytest tests/test_slides.py
"""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from conftest import script
from PIL import Image
from written import picture, write

import data
import evaluate
import model as networks
import text
from prepare.slide import Slide
from protocols import heatmap, mil, peers, slides

# --------------------------------------------------------------------------------------------------
# Pooling and attention


def test_pooling_takes_the_best_patches():
    """MI-Zero: one glowing patch decides at j = 1; at j = 50 of 64 the many faint ones do."""
    s = np.full((1, 85, 2), 0.1)
    s[..., 1] = 0.2
    s[0, 84, 0] = 1
    pooled = mil.pool_slide(s)
    assert pooled[1][3].argmax() == 0 and pooled[50][3].argmax() == 1
    assert pooled[100][0].tolist() == pytest.approx([0.1, 0.2])
    assert slides.name_scores(pooled, ["a", "b"])["merged"][1] == pytest.approx(
        {"a": 1.3, "b": 0.8}
    )
    # A magnification that a slide has not is left out, also of the sum.
    s[:, 21:] = np.nan
    named = slides.name_scores(mil.pool_slide(s), ["a", "b"])
    assert set(named) == {"5x", "10x", "20x", "merged"}
    assert named["merged"][1] == pytest.approx({"a": 0.3, "b": 0.6})


class Scored:
    """Three slides of one parent: cosines of two classes, which stand for features."""

    split = np.array(["train", "test", "test"])
    who = np.arange(3)

    def read(self, name):
        for a, b in ((0.5, 0.1), (0.6, 0.3), (0.4, 0.3)):
            s = np.tile([a, b], (1, 85, 1))
            s[:, 21:] = np.nan
            yield s


def test_slides_are_merged_above_the_mean_of_the_training_slides():
    """The first class is always ahead; above its mean of the training slide it is so nowhere."""
    found = mil.measure_pooling(Scored(), np.array([0, 1, 1]), torch.eye(2))
    assert set(found["best 1"]) == {"5x", "10x", "20x", "merged"}
    assert found["best 5"]["20x"]["accuracy"] == 0
    assert found["best 5"]["merged"]["accuracy"] == 1
    assert found["best 5"]["merged"]["n"] == 2


def test_attention_finds_the_patch_that_matters():
    """One patch of thirty says what a slide is; the mean of them says nearly nothing."""
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    bags = [torch.tensor(rng.normal(size=(30, 8)), dtype=torch.float32) for _ in y]
    for x, c in zip(bags, y, strict=True):
        x[3] = 0
        x[3, c] = 6
    found = mil.measure_mil(bags, y, 2, np.arange(24), folds=2)
    assert found["accuracy"] > 0.9 and found["n"] == 24 and "auroc" in found["interval"]
    logits, attention = mil.GatedAttention(8, 2).eval()(bags[0])
    assert logits.shape == (2,) and len(attention) == 30
    assert attention.sum().item() == pytest.approx(1)


def test_nodes_are_labelled_against_the_mean_of_the_slide():
    s = np.full((1, 85, 2), np.nan)
    s[0, 1:5] = [[0.9, 0.5], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]
    # Another level does not count.
    s[0, 5:21] = [0, 9]
    above = slides.above_mean(s, 1)
    labels = slides.label_nodes(above, 1)
    # The first class is always ahead, but only the second one varies.
    assert labels[0, 1:5].tolist() == [1, 0, 0, 0] and (np.delete(labels[0], range(1, 5)) < 0).all()
    one = slides.label_nodes(above[..., 1:], 1, share=0.25)
    assert one[0, 1:5].tolist() == [0, -1, -1, -1]
    # The measurement that a label is chosen by is the highest one.
    shapes = json.loads(heatmap.geojson([(0, 0, 80)], labels, 1, ["a", "b"], above))["features"]
    assert [shape["properties"]["classification"]["name"] for shape in shapes] == ["a", "b"]
    for shape, told in zip(shapes, ([0, -0.1], [0, 0.3]), strict=True):
        keys = ["a above slide mean", "b above slide mean"]
        assert shape["properties"]["measurements"] == pytest.approx(
            dict(zip(keys, told, strict=True))
        )
    places = slides.best_places(s, [(100, 200, 80)], 1, ["a", "b"], most=9)
    assert len(places["a"]) == 4
    assert places["b"][0] == {"x": 100, "y": 200, "side": 40, "cosine": 0.5}


# --------------------------------------------------------------------------------------------------
# Outlines


def outlines(mask):
    return [heatmap.trace(region) for region in heatmap.regions(mask)]


def ring_area(ring):
    """Measure a closed ring: positive if it runs clockwise on the screen."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:], strict=False)) / 2


def is_inside(shapes, x, y):
    """Tell by a ray to the right whether the centre of a cell lies inside the rings."""
    crossings = 0
    for ring in [ring for shape in shapes for ring in shape]:
        for (x1, y1), (_, y2) in zip(ring, ring[1:], strict=False):
            if x1 > x + 0.5 and min(y1, y2) <= y < max(y1, y2):
                crossings += np.sign(y2 - y1)
    return crossings == 1


def test_outlines_by_hand():
    found = outlines(np.ones((2, 3), bool))
    assert found == [[[(0, 0), (3, 0), (3, 2), (0, 2), (0, 0)]]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    ((outer, hole),) = outlines(ring)
    assert ring_area(outer) == 9 and ring_area(hole) == -1
    # What touches at corners only stays apart.
    assert len(outlines(np.eye(3, dtype=bool))) == 3
    assert outlines(np.zeros((2, 2), bool)) == []


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_outlines_of_random_masks(density):
    mask = np.random.default_rng(0).random((15, 20)) < density
    shapes = outlines(mask)
    assert sum(ring_area(ring) for shape in shapes for ring in shape) == mask.sum()
    for outer, *holes in shapes:
        assert ring_area(outer) > 0 and all(ring_area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            # No corner twice: no ring crosses itself.
            assert ring[0] == ring[-1] and len(set(ring)) == len(ring) - 1
    found = [[is_inside(shapes, x, y) for x in range(20)] for y in range(15)]
    assert (np.array(found) == mask).all()


def test_geojson_lies_where_the_nodes_lie():
    labels = np.full((2, 85), -1)
    labels[0, 1] = 0
    labels[1, 1:5] = 1
    parents = [(1000, 2000, 512), (1512, 2000, 512)]
    s = np.zeros((2, 85, 2))
    s[1, 1:5, 1] = [1, 2, 3, 4]
    a, b = json.loads(heatmap.geojson(parents, labels, 1, ["a", "b"], s))["features"]
    square = [[1000, 2000], [1256, 2000], [1256, 2256], [1000, 2256], [1000, 2000]]
    assert a["geometry"]["coordinates"] == [square]
    square = [[1512, 2000], [2024, 2000], [2024, 2512], [1512, 2512], [1512, 2000]]
    assert b["geometry"]["coordinates"] == [square]
    assert b["properties"]["classification"]["name"] == "b"
    # QuPath shows the mean scores of an annotation as its measurements.
    told = b["properties"]["measurements"]
    assert told == {"a above slide mean": 0, "b above slide mean": 2.5}


def test_colours_rise_in_brightness():
    rgb = heatmap.colour(np.linspace(0, 1, 9)).astype(float)
    assert (np.diff(rgb @ [0.3, 0.6, 0.1]) > 0).all()
    assert heatmap.class_colour(3) != heatmap.class_colour(13)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run folder as train.py leaves it, untrained."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = text.Tokenizer.train(["signet ring cells, stroma only, fat"] * 2, 560)
    torch.manual_seed(0)
    model = networks.MRPLIP(words.size, words.end, **networks.SIZES["synthetic"])
    data.write_whole(folder / "config.json", json.dumps({"size": "synthetic", "k_o": 2}))
    data.write_whole(folder / "tokenizer.json", words.to_json())
    torch.save(
        {"model": model.state_dict(), "tokenizer": words.merges, "step": 0}
        | {"config": {"size": "synthetic"}},
        folder / "ckpt.pt",
    )
    classes = {"cells": ["signet ring cells", "cells"], "stroma": "stroma only", "fat": "fat"}
    data.write_whole(folder / "classes.json", json.dumps(classes))
    return folder


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["slides", *map(str, argv)])
    slides.main()


def test_a_slide_goes_in_and_outlines_come_out(run, world, tmp_path, monkeypatch, capsys):
    path = next((world / "slides").glob("*.svs"))
    argv = (run, path, "--classes", run / "classes.json", "--fov-px", 64, "--out", tmp_path)
    command(monkeypatch, *argv)
    record = json.loads((tmp_path / "slides.json").read_text())["slides"][path.name]
    assert set(record["found"]) == {"5x", "10x", "20x", "40x", "merged"}
    assert set(record["found"]["merged"]["10"]) == {"cells", "stroma", "fat"}
    assert Image.open(tmp_path / f"{path.name}.classes.png").width > 900
    collection = json.loads((tmp_path / f"{path.name}.classes.geojson").read_text())
    peer = peers.load(slides.parse([str(run), "x.svs", "--text", "fat"]))
    with Slide(path) as slide:
        size, side = slide.size, 64 * data.mpp_of(20) / slide.mpp
        _, s = slides.score_slide(peer, slide, torch.eye(128)[:3], 64)
    area = 0.0
    for feature in collection["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert feature["properties"]["classification"]["name"] in ("cells", "stroma", "fat")
        for k, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 5
            assert all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in ring)
            # Outer rings run one way, holes the other.
            assert (ring_area(ring) > 0) == (k == 0)
            area += ring_area(ring)
        told = feature["properties"]["measurements"]
        label = feature["properties"]["classification"]["name"]
        assert max(told.values()) == told[f"{label} above slide mean"]
    # Every 20x patch with tissue is in exactly one outline, and nothing else is.
    patches = (~np.isnan(s[:, data.LEVEL == 2, 0])).sum()
    assert area == pytest.approx(patches * side**2)

    # The same command reads nothing again; other settings do.
    monkeypatch.setattr(slides, "ask_slide", lambda *_: pytest.fail("read again"))
    command(monkeypatch, *argv)
    monkeypatch.setattr(slides, "ask_slide", lambda *_: record)
    command(monkeypatch, *argv, "--level", "10x")
    assert "written anew" in capsys.readouterr().out


def test_a_slide_without_the_level_is_outlined_at_its_finest(run, tmp_path, monkeypatch):
    pink = np.full((512, 512, 3), (200, 120, 180), np.uint8)
    pink[::2, ::3] = (120, 60, 150)
    about = "Aperio Image Library\r\n512x512|MPP = 1.0"
    kind = dict(photometric="rgb", tile=(256, 256), description=about)
    tifffile.imwrite(tmp_path / "coarse.svs", pink, **kind)
    argv = (run, tmp_path / "coarse.svs", "--classes", run / "classes.json", "--fov-px", 64)
    command(monkeypatch, *argv, "--level", "20x", "--out", tmp_path)
    shapes = json.loads((tmp_path / "coarse.svs.classes.geojson").read_text())["features"]
    area = sum(ring_area(ring) for shape in shapes for ring in shape["geometry"]["coordinates"])
    assert area == 512 * 512
    with pytest.raises(ValueError, match="1 of 1 slides"):
        command(monkeypatch, *argv[:2], "--text", "fat", "--out", tmp_path)


def test_where_is_it_and_a_slide_that_cannot_be_read(run, world, tmp_path, monkeypatch):
    path = next((world / "slides").glob("*.svs"))
    (tmp_path / "broken.svs").write_bytes(path.read_bytes()[:5000])
    argv = [run, tmp_path / "broken.svs", path, "--text", "stroma only", "fat"]
    argv += ["--level", "10x", "--fov-px", "64", "--out", tmp_path / "out"]
    done = script("protocols.slides", *argv)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 slides could not be read, see above"
    assert "left out" in done.stderr and "broken.svs is missing or truncated" in done.stderr
    assert "slides: " not in done.stderr  # no bar in a log
    assert "| stroma only |" in done.stdout
    stored = json.loads((tmp_path / "out/places.json").read_text())["slides"]
    assert set(stored) == {path.name}
    best = stored[path.name]["found"]["fat"]
    assert len(best) == 3 and best[0]["cosine"] >= best[1]["cosine"]
    shapes = json.loads((tmp_path / f"out/{path.name}.text.geojson").read_text())
    assert shapes["features"] and (tmp_path / f"out/{path.name}.text.png").exists()


def test_one_bad_slide_costs_itself(run, tmp_path, monkeypatch, capsys):
    """A level that only the thumbnail reads is damaged; a name is long, another is of two lines."""
    folder = tmp_path / "slides"
    folder.mkdir()
    pixels = picture(1024, 1024)
    names = ["a.svs", "b" * 241 + ".svs", "c\nd.svs", "e.svs"]
    for name in names:
        write(folder / name, pixels, downs=(4,), mpp=0.5)
    with tifffile.TiffFile(folder / "e.svs") as tif:
        place, size = tif.pages[2].dataoffsets[0], tif.pages[2].databytecounts[0]
    content = bytearray((folder / "e.svs").read_bytes())
    content[place : place + size] = bytes(size)
    (folder / "e.svs").write_bytes(content)
    argv = (run, folder, "--classes", run / "classes.json", "--fov-px", 64, "--out", tmp_path)
    with pytest.raises(ValueError, match="1 of 4 slides could not be read"):
        command(monkeypatch, *argv)
    assert "e.svs is damaged" in capsys.readouterr().err
    stored = json.loads((tmp_path / "slides.json").read_text())["slides"]
    assert list(stored) == names[:3]
    assert len(list(tmp_path.glob("*.classes.png"))) == 3


def test_few_batches_of_a_slide_are_not_full(run, world, monkeypatch):
    """Every node with tissue is embedded once, in batches that run across the parents."""
    asked = []
    embed_images = evaluate.embed_images
    monkeypatch.setattr(
        evaluate, "embed_images", lambda m, x: asked.append(len(x)) or embed_images(m, x)
    )
    peer = peers.load(slides.parse([str(run), "x.svs", "--text", "fat"]))
    with Slide(next((world / "slides").glob("*.svs"))) as slide:
        parents, s = slides.score_slide(peer, slide, torch.eye(128)[:3], 64)
    assert sum(asked) == (~np.isnan(s[..., 0])).sum()
    assert len(asked) == 1 < len(parents)


def test_too_few_slides_are_refused_before_anything_is_read(run, world, tmp_path, monkeypatch):
    name = data.Bags(world / "train").slides[0]
    (tmp_path / "one.csv").write_text(f"slide,label\n{name},a\n")
    monkeypatch.setattr(evaluate, "embed", lambda *_: pytest.fail("read for nothing"))
    argv = [run, "--data", world / "train", "--labels", tmp_path / "one.csv", "--out", tmp_path]
    with pytest.raises(ValueError, match="1 labelled slides of 1 classes, 1 patients: .* two of"):
        command(monkeypatch, *argv)
    assert not (tmp_path / "results.json").exists()


def test_features_of_slides_made_elsewhere(run, world, tmp_path, monkeypatch, capsys):
    """Ours come back with the same numbers; those of others are a file a slide."""
    monkeypatch.setattr(mil, "fit_mil", partial(mil.fit_mil, epochs=1))
    names = sorted(set(data.Bags(world / "train").slides))
    rows = [f"{name},{'ab'[i % 2]},p{i}\n" for i, name in enumerate(names)]
    # CLAM's headings.
    (tmp_path / "labels.csv").write_text("slide_id,label,case_id\n" + "".join(rows))
    argv = ["--labels", tmp_path / "labels.csv", "--folds", 3, "--out"]
    command(monkeypatch, run, "--data", world / "train", *argv, tmp_path / "own")
    command(monkeypatch, "--features", tmp_path / "own/features", *argv, tmp_path / "again")
    own, again = (json.loads((tmp_path / x / "results.json").read_text()) for x in ("own", "again"))
    for name in ("mil", "slide_probe"):
        assert own[name]["train"] == again[name]["features"] and "5x" in own[name]["train"]

    folder = tmp_path / "theirs"
    folder.mkdir()
    x = torch.arange(40.0).reshape(10, 4)
    for i, name in enumerate(names):
        y = x[i:] * (1 - 2 * (i % 2))
        if i % 3 == 0:
            np.savez(folder / f"{name[:-4]}.npz", features=y.numpy().astype(np.float16))
        elif i % 3 == 1:
            torch.save(y, folder / f"{name[:-4]}.pt")
        else:
            np.save(folder / f"{name}.npy", y.numpy())
    command(monkeypatch, "--features", folder, *argv, tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["mil"]["theirs"]["whole"]["n"] == len(names)
    assert found["slide_probe"]["theirs"]["whole"]["accuracy"] == 1
    assert found["about"]["mil"]["model"] == "theirs"
    assert found["mil"]["theirs"]["whole"]["groups"] == len(names)
    # A folder above them is told where they lie.
    (tmp_path / "empty").mkdir()
    for name, remedy in ((".", "give .*/own/features$"), ("empty", "give a folder that does$")):
        with pytest.raises(ValueError, match=f"itself holds no features .*: {remedy}"):
            mil.list_features(tmp_path / name)
    np.save(folder / f"{names[0]}.npy", x[:, :2])
    with pytest.raises(ValueError, match="are of one slide: keep one"):
        command(monkeypatch, "--features", folder, *argv, tmp_path / "out")
    (folder / f"{names[0][:-4]}.npz").unlink()
    with pytest.raises(ValueError, match="4 numbers a patch, those before it 2: give features of"):
        command(monkeypatch, "--features", folder, *argv, tmp_path / "out")


def test_labels_of_slides_from_a_table(run, world, tmp_path, monkeypatch, capsys):
    """Shards as a lab has just tiled them, with a table of slides and patients."""
    monkeypatch.setattr(mil, "fit_mil", partial(mil.fit_mil, epochs=1))
    shutil.copytree(world / "train", tmp_path / "bags")
    names = sorted(set(data.Bags(tmp_path / "bags").slides))
    # Names may lack their suffix; what matches nothing is told.
    rows = [f"{name[:-4]},{'ab'[i % 2]},p{i // 2}\n" for i, name in enumerate(names)]
    rows.append("none.svs,a,p\n")
    (tmp_path / "labels.csv").write_text("slide,label,patient\n" + "".join(rows))
    (tmp_path / "ab.json").write_text('{"a": ["stroma only"], "b": "fat", "c": "cells"}')
    argv = [run, "--data", tmp_path / "bags", "--labels", tmp_path / "labels.csv"]
    argv += ["--classes", tmp_path / "ab.json", "--folds", 3, "--out", tmp_path / "out"]
    command(monkeypatch, *argv)
    said = capsys.readouterr().out
    assert "slides of --labels that are not in" in said and "bags, 1: none\n" in said
    assert "that no label names: 1: c\n" in said and "without a label" not in said
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["about"]["mil"]["order"] == "--classes"
    pooled, learned = found["slides"]["bags"], found["mil"]["bags"]
    assert set(pooled) == {"best 1", "best 5", "best 10", "best 50", "best 100"}
    assert pooled["best 1"]["merged"]["n"] == learned["20x"]["n"] == len(names)
    assert pooled["best 1"]["20x"]["groups"] == learned["20x"]["groups"] == len(names) // 2
    assert found["about"]["mil"]["split"] == "3 folds by patient"
    kept = list((tmp_path / "out/features").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed", lambda *_: pytest.fail("read again"))
        command(patch, *argv)
    assert len(kept) == len(names)

    # Test slides alone are dealt to folds, and the results say so.
    argv[2] = tmp_path / "alone"
    shutil.copytree(tmp_path / "bags", tmp_path / "alone/test")
    (tmp_path / "labels.csv").write_text("slide,label,patient\n" + "".join(rows[1:]))
    command(monkeypatch, *argv)
    assert f"slides without a label, 1: {names[0]}\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["about"]["mil"]["split"] == "3 folds by patient"

    # Test slides are measured, unless a patient is in train as well.
    argv[2] = world
    test = sorted(set(data.Bags(world / "test").slides))
    for who, n in (("q", len(test)), ("p0", len(names) + len(test))):
        more = [f"{name},{'ab'[i % 2]},{who}{i or ''}\n" for i, name in enumerate(test)]
        (tmp_path / "labels.csv").write_text("slide,label,patient\n" + "".join(rows + more))
        command(monkeypatch, *argv)
        found = json.loads((tmp_path / "out/results.json").read_text())
        assert found["mil"][world.name]["5x"]["n"] == n
        assert found["slides"][world.name]["best 10"]["5x"]["n"] == n
    assert "1 patients are in both train and test" in capsys.readouterr().out


def test_bad_input_is_one_sentence(run, world, tmp_path, monkeypatch):
    path = next((world / "slides").glob("*.svs"))
    classes = run / "classes.json"
    (tmp_path / "other.csv").write_text("slide,label\nother,fat\n")
    (tmp_path / "empty.csv").write_text("slide,class\nother,fat\n")
    for name in ("a.svs", "a.tif"):
        (tmp_path / name).touch()
    shards = (run, "--data", world / "train", "--labels")
    wrong = {
        (run,): "give slide files, or --data",
        (run, path): "need --classes NAME.JSON .* or --text",
        (run, path, "--classes", classes, "--text", "fat"): "need --classes",
        (run, "--data", world): "with --labels CSV",
        (run, path, "--text", "fat", "--fov-px", "3"): "--fov-px needs 16",
        (run, path, "--classes", tmp_path / "none.json"): "none.json is neither a JSON file",
        ("random", path, "--text", "fat"): "random: a ViT reads no text",
        (run, tmp_path / "none.svs", "--text", "fat"): "none.svs is no slide",
        (*shards, tmp_path / "other.csv"): "--labels names none of the slides",
        (*shards, tmp_path / "empty.csv"): "empty.csv has no column label",
        (*shards, tmp_path / "other.csv", "--text", "fat"): "not in shards",
        (run, "--features", tmp_path, "--labels", classes): "--features needs no model",
        (
            "--features",
            tmp_path / "none",
            "--labels",
            tmp_path / "other.csv",
        ): "none does not exist",
        ("--features", tmp_path): "--features DIR with --labels CSV",
        (run, tmp_path / "a.svs", tmp_path / "a.tif", "--text", "fat"): "share a name: rename one",
    }
    for argv, message in wrong.items():
        with pytest.raises(ValueError, match=message) as said:
            command(monkeypatch, *argv, *(() if "--out" in argv else ("--out", tmp_path / "o")))
        assert len(str(said.value)) < 400 and "\n" not in str(said.value)
