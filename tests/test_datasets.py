"""pytest tests/test_datasets.py — labelled pictures: folders and tables, splits by group, magnifications, features that are kept."""
import os

import numpy as np
import pytest
from PIL import Image

import datasets


def draw(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def test_class_folders_and_their_splits(tmp_path):
    for k, name in enumerate(("a/1.png", "a/2.jpg", "b/sub/3.tif")):
        draw(tmp_path / "flat" / name, (k, k, k))
        draw(tmp_path / "parted" / ("Train" if k else "test") / name, (k, k, k))
    (tmp_path / "flat/a/notes.txt").write_text("no picture")
    flat, parted = (datasets.read_pictures(tmp_path / n) for n in ("flat", "parted"))
    assert (flat.labels, flat.groups, flat.split, flat.name) == (["a", "a", "b"], None, [""] * 3, "flat")
    assert list(zip(parted.labels, parted.split)) == [("a", "train"), ("b", "train"), ("a", "test")] and flat.targets(["b", "a"]).tolist() == [1, 1, 0]
    both = datasets.read_pictures(tmp_path / "flat", train=tmp_path / "parted")
    assert both.split == ["train"] * 3 + ["test"] * 3
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path / "flat/a", "holds no pictures")):
        with pytest.raises(ValueError, match=message):
            datasets.read_pictures(path)


def test_a_table_in_the_words_of_its_makers(tmp_path):
    for name in ("x.png", "y.png", "z.png"):
        draw(tmp_path / name, (9, 9, 9))
    table = tmp_path / "annotations.csv"
    table.write_text("\ufeffImage Name,Majority Vote Label,Partition,patient\nx.png,HP,train,p1\ny.png,SSA,Testing,p2\n", encoding="utf-8")   # as Excel writes it
    pics = datasets.read_pictures(table)
    assert (pics.labels, pics.split, pics.groups, pics.by, pics.name) == (["HP", "SSA"], ["train", "test"], ["p1", "p2"], "patient", "annotations")
    before = pics.hash, pics.stamp
    os.utime(tmp_path / "x.png", (1, 1))
    later = datasets.read_pictures(table)
    assert later.hash == before[0] and later.stamp != before[1]                        # the same data, other files: what was cached of them does not count
    table.write_text("file,label\nx.png,HP\ny.png,HP\n")
    assert datasets.read_pictures(table).hash != before[0]
    with pytest.raises(ValueError, match="no column slide: it has file, label"):
        datasets.read_pictures(table, group="slide")
    for text, message in (("file,label\nw.png,HP\n", "annotations.csv:2: .*w.png does not exist"), ("file,label\nx.png,\n", "annotations.csv:2 has no label"), ("file,caption\nx.png,a\ny.png,\n", "annotations.csv:3 has no caption"),
                          ("file,split\nx.png,training set\n", "annotations.csv:2: split training set is none of train, val, test"), ("file,label\n", "no rows"),
                          ("file,label\nx.png,HP\ny.png,hp\n", "label HP in two ways"),
                          ("a,b\n1,2\n", "no column of files.*found a, b"), ("", "found nothing")):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            datasets.read_pictures(table)
    table.write_bytes(b"file\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not a table in UTF-8"):
        datasets.read_pictures(table)


def test_folds_keep_groups_together_and_classes_even():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 300)
    y = groups % 3                                                                     # a patient has one disease
    fold = datasets.folds(y, groups, 5)
    assert all(len(set(fold[groups == g])) == 1 for g in range(40)) and set(fold) == set(range(5))
    share = np.array([[np.mean(y[fold == f] == c) for c in range(3)] for f in range(5)])
    assert np.abs(share - share.mean(0)).max() < 0.12
    assert sorted(np.bincount(datasets.folds(np.zeros(10, int), None, 5))) == [2] * 5


def test_a_picture_at_another_magnification_keeps_its_scale():
    """A black square of 100 um in a white picture of 0.5 um per pixel is 100 / (10 / mag) pixels wide at each."""
    a = np.full((512, 512, 3), 255, np.uint8)
    a[156:356, 156:356] = 0
    image = Image.fromarray(a)
    for mag, dark in ((5, 50), (10, 100), (20, 200)):
        tiles = datasets.at_magnification(image, 0.5, mag, 128 * mag // 5)
        assert len(tiles) == 1 and abs(np.sqrt((tiles < 128).all(-1).sum()) - dark) < 2
    assert datasets.at_magnification(image, 0.5, 40, 256).shape == (16, 256, 256, 3)
    small = datasets.at_magnification(image.crop((0, 0, 156, 512)), 0.5, 5, 256)       # 39 x 128 pixels: mirrored, not stretched, and no black edge
    assert small.shape == (1, 256, 256, 3) and (small == 255).all()


def read(images):
    """The mean colour: a feature anyone can check."""
    return {"projected": images.mean((2, 3))}


def test_features_skip_what_is_broken_and_go_on_where_they_stopped(tmp_path, capsys):
    files = [draw(tmp_path / f"{k}.png", (50 * k, 0, 0)) for k in range(5)]
    files[1].write_bytes(b"not a picture")
    files[3].write_bytes(files[4].read_bytes()[:60])
    kept = tmp_path / "kept"
    found = datasets.features(read, files, 16, "cpu", folder=kept)
    assert found["ok"].tolist() == [True, False, True, False, True] and found["projected"][:, 0].tolist() == pytest.approx([0, 0, 100 / 255, 0, 200 / 255])
    said = capsys.readouterr()
    assert "1.png" in said.out + said.err and "3.png" in said.out + said.err
    assert (datasets.features(None, files, 16, "cpu", folder=kept)["projected"] == found["projected"]).all()     # nothing is read again
    work = lambda rows: {"x": np.array(rows)}
    asked = []
    for stop in (2, 9):                                                                # stopped at the third piece, then asked again
        def some(rows):
            asked.append(rows[0])
            if len(asked) == stop + 1:
                raise KeyboardInterrupt
            return work(rows)
        try:
            out = datasets.in_pieces(7, some, tmp_path / "pieces", size=2)
        except KeyboardInterrupt:
            pass
    assert asked == [0, 2, 4, 4, 6] and out["x"].tolist() == list(range(7))
    next((tmp_path / "pieces").glob("*.npz")).write_bytes(b"PK damaged")               # is made again
    assert datasets.in_pieces(7, work, tmp_path / "pieces", size=2)["x"].tolist() == list(range(7))


def test_features_at_four_magnifications_are_means_over_tiles(tmp_path):
    a = np.zeros((64, 64, 3), np.uint8)
    a[:, 32:] = 200
    Image.fromarray(a).save(tmp_path / "half.png")
    found = datasets.features(read, [tmp_path / "half.png"], 32, "cpu", mpp=0.25)["projected"]
    assert found.shape == (1, 4, 3) and np.allclose(found[0, 1:], 100 / 255, atol=0.02)
