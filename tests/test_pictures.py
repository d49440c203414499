"""Labelled pictures: folders, tables, prompts, magnifications, features, protocols, fine-tuning.

pytest tests/test_pictures.py
"""

import csv
import json
import os
import re
import resource
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from test_model import clip_state, timm_state
from test_slides import run  # noqa: F401, a fixture

import data
import evaluate
import model as networks
import text
from protocols import embed, finetune, labelled, metrics, peers, pictures

KINDS = ("lung_n", "lung_aca", "lung_scc")


def draw(path, colour, size=(40, 30)):
    """Save a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


# ---- Folders and tables ----
def test_class_folders_and_their_splits(tmp_path):
    for k, name in enumerate(("a/1.png", "a/2.jpg", "b/sub/3.tif")):
        draw(tmp_path / "flat" / name, (k, k, k))
        draw(tmp_path / "parted" / ("Train" if k else "test") / name, (9, k, k))
    flat = labelled.read_pictures(tmp_path / "flat")
    assert (flat.labels, flat.groups, flat.name) == (["a", "a", "b"], None, "flat")
    assert flat.split.tolist() == ["", "", ""] and flat.held_out().all()
    assert flat.numbers(["b", "a"]).tolist() == [1, 1, 0]
    parted = labelled.read_pictures(tmp_path / "parted")
    assert parted.split.tolist() == ["train", "train", "test"]
    assert parted.labels == ["a", "b", "a"] and parted.held_out().tolist() == [False, False, True]
    both = labelled.read_pictures(tmp_path / "flat", train=tmp_path / "parted")
    assert both.split.tolist() == ["train"] * 3 + ["test"] * 3 and both.name == "flat"
    # Groups of one of two sources are none.
    table = tmp_path / "more.csv"
    table.write_text("file,label,patient\nparted/test/a/1.png,a,p\n")
    both = labelled.read_pictures(table, train=tmp_path / "flat")
    assert both.by is None and both.groups is None and both.labels == ["a", "a", "b", "a"]


def test_what_is_no_class_is_named_and_left_out(tmp_path, capsys):
    parted = "training/a/1.png test/a/2.png __MACOSX/test/a/3.png figures/4.png annotations/a/5.png"
    flat = "a/1.png a/._1.png a/.ipynb_checkpoints/2.png b/3.png .git/4.png 5.png a/notes.txt"
    for name, files in (("parted", parted), ("flat", flat)):
        for k, file in enumerate(files.split()):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(bytes([k]))
    (tmp_path / "flat/empty").mkdir()
    found = labelled.read_pictures(tmp_path / "parted")
    assert (found.labels, found.split.tolist()) == (["a", "a"], ["test", "train"])
    assert "left out 3: __MACOSX, annotations, figures\n" in capsys.readouterr().out
    found = labelled.read_pictures(tmp_path / "flat")
    assert [path.name for path in found.files] == ["1.png", "3.png"] and found.labels == ["a", "b"]
    assert "left out 3: .git, 5.png, empty\n" in capsys.readouterr().out


def test_copies_are_found_by_content(tmp_path, capsys):
    """Files of one size, and of one size and middle, are no copies."""
    contents = {"train/a/1": b"0" * 9000 + b"1", "train/a/2": b"0" * 9001, "train/a/3": b"3" * 9001}
    contents |= {"test/a/4": b"0" * 9001, "test/a/5": b"5", "train/a/6": b"", "train/b/7": b""}
    for name, content in contents.items():
        path = tmp_path / "some" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = labelled.read_pictures(tmp_path / "some")
    assert labelled.describe_split(found, 5) == "the source's own"
    assert "1 of 2 test pictures have copies among those to learn from" in capsys.readouterr().out
    peer = peers.Peer(None, None, "x", "0")
    assert labelled.about_pictures(peer, found)["copies"] == found.copies() == 1
    # Without a split, copies are one group, and no fold parts them.
    table = tmp_path / "index.csv"
    some = tmp_path / "some"
    lines = [f"{file.relative_to(tmp_path)}" for file in found.files]
    table.write_text("file\n" + "\n".join(lines))
    rows = labelled.read_pictures(table)
    assert rows.who().tolist() == [0, 1, 2, 0, 4, 5, 6] and rows.copies() == 0
    # Of two patients they are told; where nothing else is tested, or of two labels, refused.
    table.write_text("file,patient\n" + "\n".join(f"{x},p{k}" for k, x in enumerate(lines)))
    assert labelled.read_pictures(table).copies() == 2
    with pytest.raises(ValueError, match="all test pictures of .*test are also learned from"):
        labelled.read_pictures(some / "test", train=some / "test")
    for other in ("some/train/a/2.png", lines[0]):
        table.write_text(f"file,label\n{other},x\nsome/train/a/2.png,y\n")
        with pytest.raises(ValueError, match="2.png are one picture with the labels x, y: keep"):
            labelled.read_pictures(table)


def test_folders_without_pictures_are_one_sentence(tmp_path):
    draw(tmp_path / "flat/a/1.png", (0, 0, 0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "parted/test").mkdir(parents=True)
    wrong = {"none": "none does not exist", "flat/a": "holds no pictures in class folders"}
    wrong |= {"empty": "empty holds no pictures", "parted": "test holds no pictures"}
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            labelled.read_pictures(tmp_path / name)


def test_a_table_says_what_is_known(tmp_path, capsys):
    for k, name in enumerate(("x.png", "y.png")):
        draw(tmp_path / name, (k, 9, 9))
    table = tmp_path / "annotations.csv"
    # A byte order mark and capitals, as Excel writes them.
    content = "\ufeffFile,Label,split,patient,ward\nx.png,HP,train,p1,w\ny.png,SSA,Test,p2,w\n"
    table.write_text(content, encoding="utf-8")
    found = labelled.read_pictures(table)
    assert (found.labels, found.groups, found.by) == (["HP", "SSA"], ["p1", "p2"], "patient")
    assert found.split.tolist() == ["train", "test"] and found.name == "annotations"
    assert labelled.read_pictures(table, group="Ward").groups == ["w", "w"]
    # The same data as other files: the hash stays, but features of the old files do not count.
    os.utime(tmp_path / "x.png", (1, 1))
    later = labelled.read_pictures(table)
    assert later.hash == found.hash and later.stamp != found.stamp
    capsys.readouterr()
    table.write_text("file,label,group\nx.png,HP,p\ny.png,HP,p\n")
    assert labelled.read_pictures(table).hash != found.hash
    assert "the columns group are not read; --group can" in capsys.readouterr().out
    # CLAM's words; a column that --group names keeps its own.
    table.write_text("file,label,slide_id,case_id\nx.png,HP,s,p\ny.png,HP,t,p\n")
    found = labelled.read_pictures(table)
    assert (found.by, found.groups) == ("patient", ["p", "p"])
    assert labelled.read_pictures(table, group="slide_id").groups == ["s", "t"]
    # A caption may hold a comma and a line break.
    table.write_text('file,caption\nx.png,"glands,\nmucin"\n')
    assert labelled.read_pictures(table).captions == ["glands,\nmucin"]


def test_a_broken_table_is_one_sentence(tmp_path):
    table = tmp_path / "index.csv"
    for name in ("x.png", "y.png"):
        draw(tmp_path / name, (9, 9, 9))
    wrong = {
        "file,label\nw.png,HP\n": "index.csv:2: .*w.png does not exist",
        "file,label\nx.png,\n": "index.csv:2: no label",
        "file,label\nx.png\n": "index.csv:2: no label",
        "file,caption\nx.png,a\ny.png,\n": "index.csv:3: no caption",
        "file,patient\nx.png,\n": "index.csv:2: no patient",
        "file,split\nx.png,training set\n": "index.csv:2: the split training set is none of",
        "file,label\n": "no rows below",
        "file,caption\nx.png,glands, mucin\n": "index.csv:2: more cells than headings",
        "a,b\n1,2\n": "no column file: its first line has a, b",
        "": "no column file",
        "file,mask\nx.png,none.png\n": "index.csv:2: .*none.png does not exist",
    }
    for content, message in wrong.items():
        table.write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            labelled.read_pictures(table)
        assert "\n" not in str(error.value)
    table.write_bytes(b"file\n\xff\xfe\n")
    with pytest.raises(ValueError, match="no table in UTF-8"):
        labelled.read_pictures(table)
    table.write_text("file,label\nx.png,HP\n")
    with pytest.raises(ValueError, match="no column ward: its first line has file, label"):
        labelled.read_pictures(table, group="ward")


# ---- Names of classes ----
# What the data sets themselves call their classes.
LABELS = {
    "nct-crc": "ADI BACK DEB LYM MUC MUS NORM STR TUM",
    "pcam": "0 1",
    "lc25000-lung": "lung_n lung_aca lung_scc",
    "lc25000-colon": "colon_n colon_aca",
    "mhist": "HP SSA",
    "sicapv2": "NC G3 G4 G5",
    "bach": "Normal Benign InSitu Invasive",
    "wsss4luad": "tumor stroma normal",
    "digestpath": "neg pos",
    "camelyon16": "normal tumor",
    "rcc-dhmc": "Benign Chromophobe Clearcell Oncocytoma Papillary",
    "nsclc": "LUAD LUSC",
    "databiox": "1 2 3",
    "unitopatho": "NORM HP TA.LG TA.HG TVA.LG TVA.HG",
    "bracs": "N PB UDH FEA ADH DCIS IC",
}


def test_public_data_sets_have_the_classes_they_are_known_to_have():
    known = data.read_classes(labelled.PROMPTS)
    assert {name: " ".join(classes) for name, classes in known["facts"].items()} == LABELS
    templates = known["templates"]
    assert len(set(templates)) == len(templates) > 10
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("name", LABELS)
def test_names_of_a_data_set(name):
    """No name stands for two classes: it would vote for both."""
    classes, _ = labelled.read_prompts(name)
    names = [x.lower() for own in classes.values() for x in own]
    assert len(set(names)) == len(names)
    assert all(len(own) >= 2 for own in classes.values())
    assert all(x.isascii() and x == x.strip() and not set(x) & set("_{") for x in names)


def test_prompts_are_found_by_labels_and_in_files(tmp_path, capsys):
    found, templates = labelled.read_prompts(None, {"hp", "SSA"})
    assert set(found) == {"hp", "SSA"} and "hyperplastic polyp" in found["hp"]
    assert templates == labelled.read_prompts("mhist")[1]
    assert "taken for those of mhist" in capsys.readouterr().out
    # `normal` and `tumor` belong to two data sets: the smaller one is meant.
    assert len(labelled.read_prompts(None, {"normal", "tumor"})[0]) == 2
    (tmp_path / "own.json").write_text(json.dumps({"A": "gland", "b": ["mucin", "mucus"]}))
    found, _ = labelled.read_prompts(tmp_path / "own.json", ["a"])
    assert found == {"a": ["gland"], "b": ["mucin", "mucus"]}
    assert "own.json that no label names: 1: b" in capsys.readouterr().out
    # A classes.json of shards brings its own templates.
    facts = {"facts": {"tissue": {"a": ["gland"]}}, "templates": ["{}!"]}
    (tmp_path / "classes.json").write_text(json.dumps(facts))
    assert labelled.read_prompts(tmp_path / "classes.json") == ({"a": ["gland"]}, ["{}!"])


def test_classes_come_in_the_order_of_the_data_set():
    for labels, names, expected, order in (
        ({"G4", "nc", "G3", "G5"}, None, ["nc", "G3", "G4", "G5"], "sicapv2"),
        (["10", "9", "6", "9"], None, ["6", "9", "10"], "numbers"),
        ({"low", "high"}, None, ["high", "low"], "alphabet"),
        ({"low", "high"}, {"Low": "", "mid": "", "high": ""}, ["low", "high"], "--classes"),
    ):
        assert labelled.order_classes(labels, names) == (expected, order)
    with pytest.raises(ValueError, match="HP hp differ in case only"):
        labelled.order_classes(["HP", "hp"])


def test_wrong_names_are_one_sentence(tmp_path):
    wrong = dict.fromkeys(("[1]", "{", '{"a": [3]}'), "neither a JSON file")
    wrong |= dict.fromkeys(('{"a": []}', "{}"), "a class has no name")
    wrong['{"facts": {"tissue": {}, "grade": {}}, "templates": []}'] = "has the facts tissue, grade"
    for content, message in wrong.items():
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=f"--classes .*x.json is .*{message}"):
            labelled.read_prompts(tmp_path / "x.json", ["a"])
    for source, labels, message in (
        (None, {"0", "1"}, "no names for 0 1: give --classes"),
        (None, {"moon"}, "no names for moon"),
        ("mhist", {"moon"}, "the class moon has no names in mhist"),
        ("nowhere", {"a"}, "--classes nowhere is neither"),
    ):
        with pytest.raises(ValueError, match=message):
            labelled.read_prompts(source, labels)


# ---- Pixels and features ----
def test_a_picture_at_another_magnification_keeps_its_scale():
    """A black square of 100 um, at 0.5 um per pixel, is 100 / (10 / mag) pixels wide at mag."""
    a = np.full((512, 512, 3), 255, np.uint8)
    a[156:356, 156:356] = 0
    image = Image.fromarray(a)
    for mag, dark in ((5, 50), (10, 100), (20, 200)):
        tiles = embed.at_magnification(image, 0.5, mag, 128 * mag // 5)
        assert len(tiles) == 1 and abs(np.sqrt((tiles < 128).all(-1).sum()) - dark) < 2
    assert embed.at_magnification(image, 0.5, 40, 256).shape == (16, 256, 256, 3)
    # 39 x 128 pixels at 5x: mirrored, not stretched, and no black edge.
    small = embed.at_magnification(image.crop((0, 0, 156, 512)), 0.5, 5, 256)
    assert small.shape == (1, 256, 256, 3) and (small == 255).all()


def test_nothing_outside_the_square_reaches_the_tile(tmp_path):
    """A black square between white margins stays black to its edge."""
    image = Image.new("RGB", (161, 80), "white")
    image.paste("black", (40, 0, 120, 80))
    image.save(tmp_path / "a.png")
    tile, _ = embed.Tiles([tmp_path / "a.png"], 32)[0]
    assert tile.shape == (1, 3, 32, 32) and tile.max() == 0


def bomb(path, n=16000):
    """Write a PNG of n x n black pixels of one bit, which is small as a file."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", n, n, 1, 0, 0, 0, 0), b"IEND": b""}
    parts[b"IDAT"] = zlib.compress(bytes(n * (1 + n // 8)))
    content = b"\x89PNG\r\n\x1a\n"
    for name in (b"IHDR", b"IDAT", b"IEND"):
        part = name + parts[name]
        content += struct.pack(">I", len(parts[name])) + part + struct.pack(">I", zlib.crc32(part))
    path.write_bytes(content)


def test_bombs_dangling_links_and_pipes_cost_themselves(tmp_path, capsys):
    for name in ("a/1.png", "b/2.png"):
        draw(tmp_path / "some" / name, (len(name), ord(name[0]), 9))
    bomb(tmp_path / "some/a/bomb.png")
    (tmp_path / "some/a/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "some/b/pipe.png")
    found = labelled.read_pictures(tmp_path / "some")
    assert [path.name for path in found.files] == ["1.png", "bomb.png", "2.png"]
    assert "left out 2: gone.png, pipe.png\n" in capsys.readouterr().out
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = embed.embed_pictures(mean_colour(16), found, tmp_path / "out")
    assert told["ok"].tolist() == [True, False, True]
    assert "bomb.png cannot be read as a picture" in (said := capsys.readouterr().err)
    assert "decompression bomb" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


class MeanColour(torch.nn.Module):
    """Embed an image as its mean colour, a feature that anyone can check."""

    def __init__(self, size):
        super().__init__()
        self.vision = self
        self.size = size
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.mean((2, 3))[:, None]

    def pool_tokens(self, tokens):
        return tokens

    def to_shared(self, tokens):
        return tokens[:, 0]


def mean_colour(size):
    return peers.Peer(MeanColour(size), None, "colour", "0")


def listed(files):
    return labelled.Pictures("some", None, [{"file": path} for path in files])


def test_features_skip_what_is_broken_and_go_on_where_they_stopped(tmp_path, capsys, monkeypatch):
    files = [draw(tmp_path / f"{k}.png", (50 * k, 0, 0)) for k in range(5)]
    files[1].write_bytes(b"not a picture")
    files[3].write_bytes(files[4].read_bytes()[:60])
    asked = []
    embed_files = embed.embed_files

    def watched(peer, files, *more):
        asked.append([path.name for path in files])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return embed_files(peer, files, *more)

    monkeypatch.setattr(embed, "embed_files", watched)
    some = listed(files)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_pictures(mean_colour(16), some, tmp_path, at_once=2)
    found = embed.embed_pictures(mean_colour(16), some, tmp_path, at_once=2)
    assert asked == [["0.png", "1.png"], *[["2.png", "3.png"]] * 2, ["4.png"]]
    assert found["ok"].tolist() == [True, False, True, False, True]
    red = found["image_embedding"][:, 0, 0]
    assert red.tolist() == pytest.approx([0, 100 / 255, 200 / 255])
    said = capsys.readouterr().err
    assert "1.png" in said and "3.png" in said and "pictures: " not in said
    # Nothing is read again, unless the weights or the files are others.
    again = embed.embed_pictures(mean_colour(16), some, tmp_path, at_once=2)
    assert len(asked) == 4 and (again["image_embedding"] == found["image_embedding"]).all()
    other = mean_colour(16)
    other.fingerprint = "1"
    embed.embed_pictures(other, some, tmp_path, at_once=5)
    os.utime(files[0], (1, 1))
    embed.embed_pictures(mean_colour(16), listed(files), tmp_path, at_once=5)
    assert len(asked) == 6
    with pytest.raises(ValueError, match="no picture of some can be read"):
        embed.embed_pictures(mean_colour(16), listed([files[1]]), tmp_path)


def test_features_at_four_magnifications_are_means_over_tiles(tmp_path):
    a = np.zeros((64, 64, 3), np.uint8)
    a[:, 32:] = 200
    Image.fromarray(a).save(tmp_path / "half.png")
    draw(tmp_path / "white.png", (255, 255, 255), (20, 90))
    files = [tmp_path / "half.png", tmp_path / "white.png"]
    found = embed.embed_files(mean_colour(32), files, mpp=0.25)["image_embedding"]
    assert found.shape == (2, 4, 3)
    assert np.allclose(found[0, 1:], 100 / 255, atol=0.02) and np.allclose(found[1], 1)


# ---- Protocols ----
def test_merging_is_centred_and_leaves_out_what_is_merely_enlarged(monkeypatch):
    """20x and below are in pictures of 0.5 um. 10x always shouts for class 0, 20x knows."""
    monkeypatch.setattr(evaluate, "class_vectors", lambda *a: torch.eye(2))
    rows = [{"file": labelled.PROMPTS, "label": "ab"[k % 2]} for k in range(6)]
    some = labelled.Pictures("some", None, rows)
    y = np.arange(6) % 2
    x = np.zeros((6, 4, 2), np.float32)
    x[:, 1, 0] = 5
    x[np.arange(6), 2, y] = 1
    # 40x would mislead.
    x[np.arange(6), 3, 1 - y] = 9
    peer = SimpleNamespace(model=SimpleNamespace(itc_scale=torch.zeros(())), tokenizer=None)
    classes = {"a": ["a"], "b": ["b"]}
    found = pictures.zeroshot(peer, some, x, evaluate.MAG_NAMES, 0.5, classes, ["{}"])
    rows = found["ensemble"]["picture"]
    assert list(rows) == ["5x", "10x", "20x", "40x", "merged"]
    accuracy = [rows[mag]["accuracy"] for mag in rows]
    assert accuracy == [0.5, 0.5, 1, 0, 1]


def test_prototypes_by_hand():
    x0, y0 = np.array([[0.0, 1], [0, 1], [1, 0], [1, 0]]), np.array([0, 0, 1, 1])
    x1 = np.array([[0.1, 0.9], [0.9, 0.2]])
    assert pictures.prototypes(x0, y0, x1, 2).tolist() == [0, 1]
    # Features with a large common part are told apart as well.
    assert pictures.prototypes(x0 + 50, y0, x1 + 50, 2).tolist() == [0, 1]


def test_few_shot_learns_from_k_rows_of_each_class():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    x = rng.normal(size=(80, 4)) + y[:, None]
    train, test = metrics.splits(y)[0]
    found = pictures.few_shot(x, y, 2, train, test, draws=20)
    assert list(found) == [1, 2, 4, 8, 16]
    assert found[16]["balanced"] > found[1]["balanced"] and found[16]["std"] < found[1]["std"]
    low, high = found[1]["interval"]["balanced"]
    assert low <= found[1]["balanced"] <= high
    # Five rows of a class are not eight.
    rows = np.arange(35, 80)
    assert list(pictures.few_shot(x, y, 2, rows, rows)) == [1, 2, 4]


@pytest.fixture
def patches(tmp_path):
    """Draw 24 pictures of three kinds, stripes of another width each, and index.csv of them."""
    folder = tmp_path / "patches"
    with open(tmp_path / "index.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "patient", "caption"])
        rng = np.random.default_rng(0)
        for i in range(24):
            stripes = np.sin(np.arange(128) * (0.1 + 0.5 * (i % 3)))[:, None, None]
            image = 128 + 80 * stripes + rng.integers(0, 20, (128, 128, 3))
            name = folder / KINDS[i % 3] / f"{i}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(name)
            row = [name.relative_to(tmp_path), KINDS[i % 3], f"p{i // 4}", f"tissue {i // 2}"]
            table.writerow(row)
    return tmp_path


def command(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    module.main()


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_protocol_and_a_broken_picture(run, patches, monkeypatch, capsys):  # noqa: F811
    (run / "keywords.json").write_text(json.dumps(["mucin", "gland", "sheet"]))
    (patches / "patches/lung_n/0.png").write_bytes(b"\x89PNG broken")
    out = patches / "out"
    argv = [run, "--data", patches / "index.csv", "--out", out, "--folds", "3"]
    command(monkeypatch, pictures, *argv, "--features", "backbone,text_guided")
    said = capsys.readouterr()
    assert "0.png cannot be read" in said.err
    assert "1 of 24 pictures have no features, the first" in said.out
    assert "taken for those of lc25000-lung" in said.out
    assert "folds and intervals are by patient\n" in said.out
    # The table of retrieval has a column of chance, and fits a line.
    (head,) = [line for line in said.out.splitlines() if "image_to_text_R@1" in line]
    assert "| chance_R@1 " in head and len(head) <= 100
    found = results(out)
    assert set(found) == {"zeroshot", "probe", "few_shot", "retrieval", "about"}
    (name,) = found["zeroshot"]
    for mode in ("ensemble", "single"):
        row = found["zeroshot"][name][mode]["picture"]["whole"]
        assert (row["n"], row["groups"]) == (23, 6) and len(row["interval"]["f1"]) == 2
    assert set(found["probe"]) == {f"{name}, backbone", f"{name}, text_guided"}
    assert found["probe"][f"{name}, backbone"]["whole"]["n"] == 23
    assert set(found["few_shot"][f"{name}, backbone"]["whole"]) == {"1", "2", "4"}
    assert found["retrieval"]["whole"]["n"] == 23
    for about in found["about"].values():
        assert {"model", "fingerprint", "data", "data_hash", "split", "n", "groups"} <= set(about)
        assert (about["left_out"], about["n"], about["groups"]) == (1, 23, "patient")
    assert found["about"]["probe"]["split"] == "3 folds by patient"
    assert list(found["about"]["zeroshot"]["prompts"]["classes"]) == list(KINDS)
    about = found["about"]["probe"]
    assert (about["classes"], about["order"]) == (list(KINDS), "lc25000-lung")
    assert about["copies"] == 0 and about["unlearned"] == []
    # The stripes are told apart by an untrained network, so the probe finds them.
    assert found["probe"][f"{name}, backbone"]["whole"]["accuracy"] > 0.9

    # A second call reads no picture; classes that nobody has are candidates.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    command(monkeypatch, pictures, *argv, "--features", "backbone,text_guided")
    assert kept == {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    names = {kind: kind for kind in KINDS} | {"ghost": "tissue"}
    (patches / "four.json").write_text(json.dumps(names))
    argv += ["--classes", patches / "four.json"]
    command(monkeypatch, pictures, *argv, "--levels", "--mpp", "0.5")
    assert results(out)["about"]["zeroshot"]["prompts"]["classes"].keys() == names.keys()
    rows = results(out)["zeroshot"][name]["single"]["picture"]
    assert set(rows) == {"5x", "10x", "20x", "40x", "merged"}
    assert set(results(out)["retrieval"]) == {"5x", "10x", "20x", "40x"}


def test_leaks_and_thin_classes_are_told(run, patches, monkeypatch, capsys):  # noqa: F811
    lines = (patches / "index.csv").read_text().splitlines()
    parted = [lines[0] + ",split"]
    parted += [f"{line},{'test' if i < 10 else 'train'}" for i, line in enumerate(lines[1:])]
    (patches / "parted.csv").write_text("\n".join(parted) + "\n")
    command(monkeypatch, pictures, "random", "--data", patches / "parted.csv", "--out", patches)
    said = capsys.readouterr().out
    assert "1 groups (patient) are in training and test" in said
    assert "has 4 rows to learn from: few-shot asks for no more" in said
    found = results(patches)
    assert set(found) == {"probe", "few_shot", "about"}
    assert found["probe"]["parted, backbone"]["whole"]["n"] == 10
    assert found["about"]["probe"]["split"] == "the source's own"
    # Class folders know no patients.
    argv = ["random", "--data", patches / "patches", "--out", patches / "out"]
    command(monkeypatch, pictures, *argv)
    said = capsys.readouterr().out
    assert "patches has no groups" in said and "intervals are over pictures" in said
    assert results(patches / "out")["about"]["probe"]["split"] == "5 folds by row"
    # A class of one patient is not learned where it is tested.
    one = [re.sub(r"(lung_scc),p\d", r"\1,one", line) for line in lines]
    (patches / "one.csv").write_text("\n".join(one))
    for module in (pictures, finetune):
        more = ("--epochs", 1) if module is finetune else ()
        command(monkeypatch, module, "random", "--data", patches / "one.csv", *argv[3:], *more)
        said = capsys.readouterr()
        # A log holds no bar.
        assert "were there to learn it: lung_scc\n" in said.out and " left" not in said.err
    about = results(patches / "out")["about"]
    assert about["probe"]["unlearned"] == about["finetune"]["unlearned"] == ["lung_scc"]


def test_public_weights_go_the_same_way(patches, monkeypatch, capsys):
    words = text.Tokenizer.train(["benign lung tissue", "lung adenocarcinoma"], 300)
    (patches / "words.json").write_text(words.to_json())
    torch.save(clip_state(vocab=words.end + 1), patches / "clip.bin")
    flags = ["--clip", patches / "clip.bin", "--tokenizer", patches / "words.json"]
    argv = ["--data", patches / "index.csv", "--out"]
    command(monkeypatch, pictures, *flags, *argv, patches / "plain")
    command(monkeypatch, pictures, *flags, "--quick-gelu", *argv, patches / "quick")
    plain, quick = results(patches / "plain"), results(patches / "quick")
    assert set(plain) == {"zeroshot", "probe", "few_shot", "retrieval", "about"}
    marks = {found["about"]["zeroshot"]["fingerprint"] for found in (plain, quick)}
    assert len(marks) == 2
    torch.save(timm_state(), patches / "uni.bin")
    vit = ["--vit", patches / "uni.bin", *argv, patches / "vit"]
    command(monkeypatch, pictures, *vit, "--features", "backbone,projected")
    assert set(results(patches / "vit")) == {"probe", "few_shot", "about"}
    assert "uni: a ViT reads no text, so there is no zero-shot" in capsys.readouterr().out


def same_probe(folder, rows):
    (found,) = results(folder)["probe"].values()
    return found["whole"] == rows["whole"]


def test_tables_of_other_corpora_are_read(patches, tmp_path):
    """Quilt-1M says image_path and text, others say Filename."""
    picture = sorted(patches.rglob("*.png"))[0]
    for heading in ("image_path,text", "Filename,caption", "file,text"):
        (tmp_path / "t.csv").write_text(f"{heading}\n{picture},fat\n")
        found = labelled.read_pictures(tmp_path / "t.csv")
        assert found.files == [picture] and found.captions == ["fat"]


def test_features_made_elsewhere_are_measured(run, patches, monkeypatch, capsys):  # noqa: F811
    flags = ["--data", patches / "index.csv", "--out"]
    command(monkeypatch, pictures, run, *flags, patches / "own")
    (rows,) = results(patches / "own")["probe"].values()
    # What we keep carries its names, so it can be measured again.
    (own,) = (patches / "own/features").iterdir()
    command(monkeypatch, pictures, "--features", own, *flags, patches / "again")
    assert same_probe(patches / "again", rows)
    assert set(results(patches / "again")) == {"probe", "few_shot", "about"}
    with np.load(own) as kept:
        x, files = kept["backbone"][:, 0], kept["files"].tolist()
    assert sorted(files) == sorted(f"{KINDS[i % 3]}/{i}.png" for i in range(24))
    # Another order, names without folder and suffix, rows of no picture and pictures of no row.
    order = np.random.default_rng(0).permutation(24)
    names = np.array([os.path.basename(files[i])[:-4] for i in order])
    np.savez(patches / "elsewhere.npz", features=x[order].astype(np.float16), names=names)
    some = patches / "some"
    command(
        monkeypatch, pictures, "features", "--features", patches / "elsewhere.npz", *flags, some
    )
    about = results(some)["about"]["probe"]
    assert (about["model"], about["n"]) == ("elsewhere", 24)
    np.savez(patches / "few.npz", features=x[order], files=[*names[1:], "stranger"])
    command(monkeypatch, pictures, "--features", patches / "few.npz", *flags, some)
    assert "1 of 24 rows of" in (said := capsys.readouterr().out) and "1 of 24 pictures" in said
    assert results(some)["about"]["probe"]["n"] == 23
    # Of a picture that could not be read our own files hold NaN.
    x[0] = np.nan
    np.savez(patches / "gap.npz", backbone=x[:, None], files=files)
    command(monkeypatch, pictures, "--features", patches / "gap.npz", *flags, some)
    assert results(some)["about"]["probe"]["left_out"] == 1
    wrong = {
        "lacks `features`": dict(features=x),
        "a name twice": dict(features=x, files=["a"] * 24),
    }
    wrong["can be read or has features"] = dict(features=x, files=[f"x{i}" for i in range(24)])
    wrong[r"features \[24, 4, .*: give \[R, D\], of one"] = dict(
        features=np.stack([x] * 4, 1), files=files
    )
    bad = [x.copy(), x.copy()]
    bad[0][2, 1], bad[1][3] = np.nan, np.inf
    wrong["no finite numbers: make"] = dict(features=bad[0], files=files)
    wrong["that are no finite numbers"] = dict(features=bad[1], files=files)
    for message, arrays in wrong.items():
        np.savez(patches / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            command(monkeypatch, pictures, "--features", patches / "wrong.npz", *flags, some)


def test_features_of_every_kind_of_file(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.from_numpy(x).bfloat16(), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        assert (embed.read_features(tmp_path / name, ("features",))["features"] == x).all()
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="x.npz cannot be read as features"):
        embed.read_features(tmp_path / "x.npz", ("features",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        for name in ("x.h5", "x.hdf5"):
            with pytest.raises(ValueError, match=f"{name} needs h5py: `pip install h5py`"):
                embed.read_features(tmp_path / name, ("features",))
    h5py = pytest.importorskip("h5py")
    for name in ("x.h5", "x.hdf5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["features"], file["coords"] = x, np.zeros((4, 2), int)
        stored = embed.read_features(tmp_path / name, ("features", "files"))
        assert (stored["features"] == x).all()


def test_bad_input_is_one_sentence(run, patches, monkeypatch):  # noqa: F811
    table, none = patches / "index.csv", patches / "none"
    (patches / "bare.csv").write_text("file\npatches/lung_n/0.png\n")
    draw(patches / "one/single/x.png", (9, 9, 9))
    before = sorted(run.rglob("*"))
    wrong = {
        (run, "--data", none): "none does not exist",
        ("--data", table): "name one model",
        (none, "--data", table): "holds no ckpt.pt",
        (run, "--data", table, "--classes", none): "none is neither a JSON file",
        (run, "--data", table, "--classes", "mhist"): "has no names in mhist",
        (run, "--data", table, "--levels"): "--levels needs --mpp",
        (run, "--data", table, "--mpp", "0.5"): "--levels needs --mpp",
        (run, "--data", table, "--levels", "--mpp", "3"): "--levels needs --mpp",
        (run, "--data", table, "--levels", "--mpp", "nan"): "--levels needs --mpp",
        (run, "--data", table, "--features", "frozen"): "frozen is none of backbone",
        ("--data", table, "--features", none): "none does not exist: give features made",
        ("random", "--data", table, "--features", "text_guided"): "no keywords.json",
        (run, "--data", table, "--folds", "1"): "--folds 1 is too few",
        (run, "--data", table, "--group", "ward"): "no column ward",
        (run, "--data", patches / "bare.csv"): "neither labels of two classes",
        (run, "--data", table, "--train", none): "none does not exist",
    }
    for argv, message in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            command(monkeypatch, pictures, *argv)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ValueError, match="one has 1 classes"):
        command(monkeypatch, finetune, "random", "--data", patches / "one")
    done = script("protocols.pictures", run, "--data", none)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


# ---- Fine-tuning ----
def test_lower_layers_learn_more_slowly_and_vectors_do_not_decay():
    vision = networks.ViT(32, 16, 64, 3, 1, clip=True)
    vision.proj = torch.nn.Parameter(torch.zeros(8, 64))
    head = torch.nn.Linear(64, 2)
    groups = finetune.layer_groups(vision, head, 1.0, decay=0.5)
    place = {}
    for group in groups:
        for p in group["params"]:
            place[id(p)] = group["lr"], group["weight_decay"]
    assert place[id(head.weight)] == (1.0, 0.05) and place[id(head.bias)] == (1.0, 0.0)
    assert place[id(vision.norm.weight)] == (1.0, 0.0)
    assert place[id(vision.blocks[2].attn.qkv.weight)] == (0.5, 0.05)
    assert place[id(vision.blocks[0].mlp.fc1.weight)] == (0.125, 0.05)
    assert place[id(vision.blocks[0].mlp.fc1.bias)] == (0.125, 0.0)
    # The stem, CLIP's first norm, the class token and the positions lie below all blocks.
    assert place[id(vision.patch_embed.proj.weight)] == (0.0625, 0.05)
    for p in (vision.norm_pre.weight, vision.cls_token, vision.pos_embed):
        assert place[id(p)] == (0.0625, 0.0)
    # CLIP's projection comes after what is read.
    assert id(vision.proj) not in place
    assert len(place) == len(list(vision.parameters())) - 1 + 2


def test_the_rows_to_stop_by_are_other_groups_than_those_to_learn_from():
    y, who = np.arange(40) % 2, np.arange(40) // 4
    split = np.array([""] * 40, "U5")
    learn, stop = finetune.choose_validation(y, who, split, np.arange(32))
    assert not set(who[learn]) & set(who[stop]) and len(learn) + len(stop) == 32
    split[:8] = "val"
    learn, stop = finetune.choose_validation(y, who, split, np.arange(32))
    assert stop.tolist() == list(range(8)) and learn.tolist() == list(range(8, 32))
    with pytest.raises(ValueError, match="one group to learn from is too few"):
        finetune.choose_validation(y, who, np.array([""] * 40), np.arange(4))
    with pytest.raises(ValueError, match="all training rows are validation rows"):
        finetune.choose_validation(y, who, split, np.arange(8))


def test_fine_tuning_learns_and_leaves_the_model_alone():
    torch.manual_seed(0)
    vision = networks.MRPLIP(300, 299, **networks.SIZES["synthetic"]).vision
    y = np.arange(48) % 2
    tiles = []
    for label in y:
        stripes = 120 + 80 * torch.sin(torch.arange(64.0) * (0.2 + 0.8 * int(label)))
        tiles.append((stripes.to(torch.uint8).expand(1, 3, 64, 64), None))
    tiles[47] = "a file that cannot be read"
    before = [p.clone() for p in vision.parameters()]
    parts = (y, 2, np.arange(48) // 4, np.array([""] * 48), 2)
    row, epochs = finetune.tune(vision, tiles, *parts, epochs=12, lr=3e-3, batch=4)
    assert row["accuracy"] == 1 and row["n"] == 47 and len(epochs) == 2
    for old, new in zip(before, vision.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_command_of_fine_tuning(run, patches, monkeypatch, capsys):  # noqa: F811
    (patches / "patches/lung_n/0.png").write_bytes(b"\x89PNG broken")
    argv = [run, "--data", patches / "index.csv", "--out", patches, "--folds", "2"]
    command(monkeypatch, finetune, *argv, "--epochs", "1")
    found = results(patches)
    (name,) = found["finetune"]
    row, about = found["finetune"][name]["whole"], found["about"]["finetune"]
    assert row["n"] == about["n"] == 23 and about["left_out"] == 1 and row["interval"]["f1"]
    assert "folds by patient" in about["split"] and about["epochs"] == [1, 1]
    assert {"model", "fingerprint", "data", "data_hash", "groups"} <= set(about)
    with pytest.raises(ValueError, match="--epochs needs 1 or more"):
        command(monkeypatch, finetune, *argv, "--epochs", "0")
