"""Segmentation: windows, label maps and Dice by hand; pictures whose right answer is known.

pytest tests/test_segment.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import script
from PIL import Image
from test_pictures import bomb
from test_slides import run  # noqa: F401, a fixture

from prepare.slide import resize
from protocols import masks, segment
from protocols.masks import Cells


def test_windows_cover_the_picture_from_inside():
    """A window's number says where it lies: of a picture at 20x, side 40, cells of 10 pixels."""
    for size, down, across, corner in (
        ((100, 40), 1, 7, (0.0, 0.0)),
        # The last hangs over; a low picture gets one, centred.
        ((101, 20), 1, 8, (0.0, -10.0)),
    ):
        spots = []

        def read(x, y, side, out, spots=spots):
            spots.append((x, y, side))
            return np.zeros((out, out, 3), np.uint8)

        picture = SimpleNamespace(name="p", size=size, mpp=0.5, read=read)
        cells = masks.scan(picture, 20, 40, lambda x: x[:, 0, 0, :1], cells=4)
        assert cells.values.shape == (down, across, 1)
        assert (cells.side, cells.corner, cells.size) == (10, corner, size)
        assert spots == [(corner[0] + 10 * x, corner[1], 40) for x in range(across)]


def test_a_label_map_is_each_pixels_own_cell():
    values = np.zeros((2, 4, 2))
    values[0, 1, 1] = values[1, 3, 1] = 1.0
    cells = Cells(values, 10, (0.0, 0.0), (40, 20))
    truth = np.zeros((20, 40), np.uint8)
    truth[:10, 10:20] = truth[10:, 30:] = 1
    found, matrix = masks.label_pixels([cells], truth, 2, band=3)
    assert (found == truth).all() and matrix.tolist() == [[600, 0], [0, 200]]
    # A mask at half the picture's size.
    assert (masks.label_pixels([cells], truth[::2, ::2], 2)[0] == truth[::2, ::2]).all()
    # Scores of two magnifications are added.
    coarse = np.zeros((1, 2, 2))
    coarse[..., 0] = 2.0
    both = [cells, Cells(coarse, 20, (0.0, 0.0), (40, 20))]
    assert (masks.label_pixels(both, truth, 2)[0] == 0).all()
    # Most of a cell's pixels give it its class, and VOID gives none.
    truth[0, 10:19] = 0
    truth[10:, :10] = masks.VOID
    expected = [[0, 1, 0, 0], [-1, 0, 0, 1]]
    assert masks.label_cells(truth, cells, 2).tolist() == expected
    assert masks.label_pixels([cells], truth, 2)[1].sum() == 700
    # Twenty classes: their pairs are more than a byte can count.
    many = Cells(np.eye(20)[None], 1, (0.0, 0.0), (20, 1))
    row = np.arange(20, dtype=np.uint8)[None]
    assert (masks.label_pixels([many], row, 20)[1] == np.eye(20)).all()


@pytest.fixture
def pairs(tmp_path):
    """Draw two pictures of 0.5 um per pixel, red on the left and blue on the right, and masks.

    One column of a mask does not count.
    """
    found = []
    for k, edge in enumerate((128, 192)):
        image = np.zeros((128, 320, 3), np.uint8)
        image[:, :edge, 0] = 220
        image[:, edge:, 2] = 220
        mask = np.ones((128, 320), np.uint8)
        mask[:, :edge] = 0
        mask[:, 0] = masks.VOID
        Image.fromarray(image).save(tmp_path / f"{k}.png")
        Image.fromarray(mask).save(tmp_path / f"{k}.mask.png")
        found.append((tmp_path / f"{k}.png", tmp_path / f"{k}.mask.png"))
    return found


def test_by_text_the_colours_are_found(pairs, tmp_path):
    """An encoder that sees only how red and how blue a window is errs only near the edge."""

    def encode(images):
        return F.normalize(images.mean((2, 3))[:, [0, 2]], dim=1)

    settings = (torch.eye(2), pairs, 32, 0.5, tmp_path / "kept")
    pixels, maps = segment.zeroshot(encode, *settings)
    # 40x is not in a picture of 20x.
    assert list(pixels) == ["5x", "10x", "20x", "merged"]
    assert pixels["20x"].shape == (2, 2, 2)
    # Pixels that do not count are left out.
    assert pixels["20x"].sum() == 2 * 128 * 319
    rows = {mag: segment.summarise(m, ["red", "blue"], [0, 1]) for mag, m in pixels.items()}
    assert min(rows["20x"]["dice red"], rows["20x"]["dice blue"]) > 0.9
    assert rows["20x"]["dice"] >= rows["5x"]["dice"]
    assert list(maps) == ["truth", "5x", "10x", "20x", "merged"]
    assert maps["20x"].shape == (128, 320)
    # A second call reads what the first one kept.
    again, _ = segment.zeroshot(None, *settings)
    assert all((again[mag] == pixels[mag]).all() for mag in pixels)
    image = segment.draw_maps(pairs[1][0], maps, ["red", "blue"], 0.5)
    assert len(image.getcolors(1 << 20)) > 4 and image.width > 1500


def test_the_decoder_learns_from_one_picture_for_the_other(pairs):
    class Colours(torch.nn.Module):
        """A tower whose patch tokens are their mean colours."""

        size, grid = 32, 4

        def forward(self, x):
            tokens = F.avg_pool2d(x, 8).flatten(2).mT  # [N, 16, 3]
            return torch.cat([tokens[:, :1], tokens], 1)

    pixels, last = segment.decode(Colours(), pairs, [([0], [1])], 2, mag=20, mpp=0.5)
    assert pixels[0].sum() == 0
    found = segment.summarise(pixels[1:], ["red", "blue"], [0])
    assert found["dice red"] == found["dice blue"] == 1
    assert (last[:, :192] == 0).all() and (last[:, 192:] == 1).all()
    # One group says nothing about others.
    assert np.isnan(found["interval"]["dice"]).all()


def test_tokens_lie_where_their_pixels_lie(pairs):
    class Corners(torch.nn.Module):
        """A tower whose tokens are the first pixel of their patches."""

        size, grid = 32, 4

        def forward(self, x):
            tokens = x[:, :, ::8, ::8].flatten(2).mT
            return torch.cat([tokens[:, :1], tokens], 1)

    cells = segment.read_tokens(Corners(), pairs[0][0], 20, 0.5)
    expected = np.asarray(Image.open(pairs[0][0]))[::8, ::8] / 255
    assert (cells.side, cells.corner) == (8, (0.0, 0.0))
    assert np.allclose(cells.values, expected)


def test_dice_of_several_pictures_is_over_all_their_pixels():
    pixels = np.array([[[8, 2], [0, 0]], [[0, 0], [1, 9]]])
    found = segment.summarise(pixels, ["a", "b"], ["p", "q"])
    assert (found["dice a"], found["dice b"]) == pytest.approx((16 / 19, 18 / 21))
    assert found["n"] == found["groups"] == 2
    low, high = found["interval"]["dice"]
    assert low <= found["dice"] <= high
    # A class that nobody has is not defined and leaves the mean as it is.
    wider = segment.summarise(np.pad(pixels, ((0, 0), (0, 1), (0, 1))), "abc", ["p", "q"])
    assert np.isnan(wider["dice c"]) and wider["dice"] == pytest.approx(found["dice"])


def test_masks_that_are_none(tmp_path):
    wrong = {
        "is no mask but": Image.new("RGB", (4, 4)),
        "holds 7, but classes are 0 to 2": Image.fromarray(np.full((4, 4), 7, np.uint8)),
        "is no mask but PNG, u?int": Image.fromarray(np.full((4, 4), 700, np.uint16)),
    }
    for message, image in wrong.items():
        image.save(tmp_path / "m.png")
        with pytest.raises(ValueError, match=f"m.png .*({message})"):
            masks.read_mask(tmp_path / "m.png", 3)
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(tmp_path / "m.png")
    Image.new("RGB", (90, 120)).save(tmp_path / "p.png")
    pair = (tmp_path / "p.png", tmp_path / "m.png")
    with pytest.raises(ValueError, match="m.png is 80 x 40 pixels, its picture .*p.png 90 x 120"):
        masks.check_masks([pair], "abc", 0.5)
    with pytest.raises(ValueError, match="p.png does not say its microns per pixel: pass --mpp"):
        masks.check_masks([pair], "abc")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "m.jpg")
    with pytest.raises(ValueError, match="m.jpg is no mask but JPEG"):
        masks.read_mask(tmp_path / "m.jpg", 3)
    (tmp_path / "m.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="m.png cannot be read as a mask"):
        masks.read_mask(tmp_path / "m.png", 3)
    bomb(tmp_path / "m.png")
    with pytest.raises(ValueError, match="m.png cannot be read as a mask .*bomb"):
        masks.read_mask(tmp_path / "m.png", 3)


def test_masks_that_hold_one_class_are_refused(pairs, capsys):
    """Of masks of 0 and 255 only 0 counts, and whatever is found there is right."""
    held = masks.check_masks(pairs, ["red", "blue", "green"], 0.5)
    assert held.tolist() == [[True, True, False]] * 2
    assert capsys.readouterr().out == "no mask holds green\n"
    for _, path in pairs:
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, mask)).save(path)
    message = (
        "1.mask.png and all other masks hold only 0 and 255: write all classes as 0 to 1, since"
    )
    with pytest.raises(ValueError, match=message):
        masks.check_masks(pairs, ["red", "blue"], 0.5)


def test_a_flat_picture_reads_as_a_slide_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    flat = masks.Flat(tmp_path / "p.png", 0.5)
    assert flat.size == (30, 20) and flat.mags == (5, 10, 20)
    found = flat.read(-4, 14, 12, 12)
    assert (found[:6, 4:] == pixels[14:, :8]).all()
    assert (found[6:] == 255).all() and (found[:, :4] == 255).all()
    assert (flat.read(40, 0, 8, 8) == 255).all() and (flat.read(-90, 0, 8, 8) == 255).all()
    assert (flat.read(2, 4, 8, 4) == resize(pixels[4:12, 2:10], 4)).all()
    # What is transparent is glass, which is white.
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "p.png")
    assert (masks.Flat(tmp_path / "p.png", 0.5).read(0, 0, 8, 8) == 255).all()


def test_the_command(run, pairs, tmp_path):  # noqa: F811
    lines = ["file,mask,patient", "0.png,0.mask.png,p", "1.png,1.mask.png,q"]
    (tmp_path / "masks.csv").write_text("\n".join(lines))
    (tmp_path / "names.json").write_text('{"red": ["stroma only", "stroma"], "b\\nlue": "fat"}')
    argv = [run, "--data", tmp_path / "masks.csv", "--classes", tmp_path / "names.json"]
    argv += ["--mpp", "0.5", "--level", "10", "--out", tmp_path / "out"]
    done = script("protocols.segment", *argv, check=True)
    assert "masks, by text" in done.stdout and "masks, decoder" in done.stdout
    found = json.loads((tmp_path / "out/results.json").read_text())
    rows = found["segment"]["masks"]
    assert set(rows["by text"]) == {"5x", "10x", "20x", "merged"}
    assert rows["decoder"]["10x"]["n"] == 2
    assert {"dice", "dice red", "dice b\nlue"} == set(rows["decoder"]["10x"]["interval"])
    about = found["about"]["segment"]
    assert (about["groups"], about["split"]) == ("patient", "2 folds by patient")
    assert about["unlearned"] == [] and about["copies"] == 0
    assert Image.open(tmp_path / "out/segments.png").width > 1000
    lines = ["file,label", "0.png,a"]
    (tmp_path / "masks.csv").write_text("\n".join(lines))
    done = script("protocols.segment", *argv)
    assert done.returncode == 1 and "has no masks: give a CSV with" in done.stderr
    assert "Traceback" not in done.stderr
