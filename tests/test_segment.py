"""pytest tests/test_segment.py — windows, label maps and Dice by hand; a picture whose right answer is known; outlines of any shape."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import segment


def test_windows_cover_the_picture_from_inside():
    nx, ny, (w, h), corner = segment.windows((100, 40), 40)
    assert (nx.tolist(), ny.tolist(), w, h, corner) == (list(range(7)), [0], 10, 4, [0.0, 0.0])          # cells of 10 pixels, windows of four
    nx, ny, (w, h), corner = segment.windows((101, 20), 40)
    assert (len(nx), w, len(ny), corner) == (8, 11, 1, [0.0, -10.0])                                     # the last hangs over; a low picture gets one, centred


def test_a_label_map_is_each_pixels_own_cell():
    cells = np.zeros((2, 4, 2))
    cells[0, 1, 1] = cells[1, 3, 1] = 1.0
    found = segment.label_map([(cells, 10, (0.0, 0.0))], (40, 20), (20, 40), band=3)
    truth = np.zeros((20, 40), int)
    truth[:10, 10:20] = truth[10:, 30:] = 1
    assert (found == truth).all()
    half = segment.label_map([(cells, 10, (0.0, 0.0))], (40, 20), (10, 20))                              # a mask at half the picture's size
    assert (half == truth[::2, ::2]).all()
    other = np.zeros((1, 2, 2))
    other[..., 0] = 2.0                                                                                  # scores of two magnifications are added
    assert (segment.label_map([(cells, 10, (0.0, 0.0)), (other, 20, (0.0, 0.0))], (40, 20), (20, 40)) == 0).all()


@pytest.fixture
def pairs(tmp_path):
    """Two pictures of 0.5 um per pixel, red on the left and blue on the right, with masks of which one column does not count."""
    out = []
    for k, edge in enumerate((128, 192)):
        image, mask = np.zeros((128, 320, 3), np.uint8), np.ones((128, 320), np.uint8)
        image[:, :edge, 0], image[:, edge:, 2], mask[:, :edge], mask[:, 0] = 220, 220, 0, segment.VOID
        Image.fromarray(image).save(tmp_path / f"{k}.png")
        Image.fromarray(mask).save(tmp_path / f"{k}.mask.png")
        out.append((tmp_path / f"{k}.png", tmp_path / f"{k}.mask.png"))
    return out


def test_zero_shot_finds_the_colours(pairs):
    """An encoder that sees only how red and how blue a window is: wrong no farther from the edge than a window reaches."""
    encode = lambda x: torch.nn.functional.normalize(x.mean((2, 3))[:, [0, 2]], dim=1)
    found, maps = segment.zeroshot(encode, torch.eye(2), pairs, 32, "cpu", mpp=0.5)
    assert set(found) == {"10x", "20x", "5x", "merged"} and found["20x"].shape == (2, 2, 2)            # 40x is not in a picture of 20x
    assert found["20x"].sum() == 2 * 128 * 319                                                            # without the pixels that do not count
    assert min(segment.summary(found["20x"])["dice"]) > 0.9 and segment.summary(found["20x"])["mean"] >= segment.summary(found["5x"])["mean"]
    assert set(maps) == {"truth", "10x", "20x", "5x", "merged"} and maps["20x"].shape == (128, 320)


def test_the_decoder_learns_from_one_picture_for_the_other(pairs):
    class Colours(torch.nn.Module):
        """A tower whose patch tokens are their mean colours."""
        size, grid = 32, 4

        def forward(self, x):
            tokens = torch.nn.functional.avg_pool2d(x, 8).flatten(2).mT                                  # [N, 16, 3]
            return torch.cat([tokens[:, :1], tokens], 1)
    m, last = segment.decoder(Colours(), pairs[:1], pairs[1:], 2, "cpu", mag=20, mpp=0.5)
    assert segment.summary(m)["dice"] == [1.0, 1.0] and (last[:, :192] == 0).all() and (last[:, 192:] == 1).all()


def test_dice_of_several_pictures_is_over_all_their_pixels():
    m = np.array([[[8, 2], [0, 0]], [[0, 0], [1, 9]]])
    found = segment.summary(m)
    assert found["dice"] == pytest.approx([16 / 19, 18 / 21]) and found["n"] == 2 and found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert np.isnan(segment.summary(np.pad(m, ((0, 0), (0, 1), (0, 1))))["dice"][2]) and segment.summary(np.pad(m, ((0, 0), (0, 1), (0, 1))))["mean"] == pytest.approx(found["mean"])


def test_masks_that_are_none(tmp_path):
    for image, message in ((Image.new("RGB", (4, 4)), "no mask of class numbers"), (Image.fromarray(np.full((4, 4), 7, np.uint8)), "holds the value 7, and there are classes 0 to 2"),
                           (Image.fromarray(np.full((4, 4), 700, np.uint16)), "no mask of class numbers")):
        image.save(tmp_path / "m.png")
        with pytest.raises(ValueError, match=f"m.png .*{message}"):
            segment.read_mask(tmp_path / "m.png", 3)
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(tmp_path / "m.png")
    Image.new("RGB", (90, 120)).save(tmp_path / "p.png")
    with pytest.raises(ValueError, match="m.png is 80 x 40 and its picture .*p.png 90 x 120 pixels"):
        segment.check_masks([(tmp_path / "p.png", tmp_path / "m.png")], 3, 0.5)
    (tmp_path / "m.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="m.png cannot be read as a mask"):
        segment.read_mask(tmp_path / "m.png", 3)


def area(ring):
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:])) / 2


def test_outlines_by_hand_and_of_random_masks():
    assert pictures.outlines(np.ones((2, 3), bool)) == [[[(0, 0), (3, 0), (3, 2), (0, 2), (0, 0)]]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    (outer, hole), = pictures.outlines(ring)
    assert area(outer) == 9 and area(hole) == -1
    assert len(pictures.outlines(np.eye(3, dtype=bool))) == 3                                            # touching at corners only
    rng = np.random.default_rng(0)
    for density in (0.2, 0.5, 0.8):
        mask = rng.random((15, 20)) < density
        shapes = pictures.outlines(mask)
        assert sum(area(r) for shape in shapes for r in shape) == mask.sum()
        for shape in shapes:
            assert area(shape[0]) > 0 and all(area(r) < 0 for r in shape[1:])
            for r in shape:
                assert r[0] == r[-1] and len(set(r)) == len(r) - 1                                       # no corner twice: no ring crosses itself
        inside = np.array([[sum((x1 > x + 0.5) * (np.sign(y2 - y1)) * (min(y1, y2) <= y < max(y1, y2)) for s in shapes for r in s for (x1, y1), (x2, y2) in zip(r, r[1:]))
                            for x in range(20)] for y in range(15)])
        assert (inside == mask).all()                                                                    # counted by a ray to the right


def test_geojson_lies_where_the_nodes_lie(tmp_path):
    labels = np.full((2, 85), -1)
    labels[0, 1], labels[1, 1:5] = 0, 1
    assert pictures.geojson([(1000, 2000, 512), (1512, 2000, 512)], labels, 1, ["a", "b"], tmp_path / "x.geojson") == 2
    a, b = json.loads((tmp_path / "x.geojson").read_text())["features"]
    assert a["geometry"]["coordinates"] == [[[1000, 2000], [1256, 2000], [1256, 2256], [1000, 2256], [1000, 2000]]]
    assert b["geometry"]["coordinates"] == [[[1512, 2000], [2024, 2000], [2024, 2512], [1512, 2512], [1512, 2000]]] and b["properties"]["classification"]["name"] == "b"


def test_colours_rise_in_brightness():
    rgb = pictures.colour(np.linspace(0, 1, 9)).astype(float)
    assert (np.diff(rgb @ [0.3, 0.6, 0.1]) > 0).all()
