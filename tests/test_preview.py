"""python -m pytest tests/test_preview.py -q"""

import numpy as np
from conftest import script
from PIL import Image
from written import picture, write

from prepare import preview
from prepare.slide import Slide
from prepare.tile import choose_parents


def run(*args):
    return script("prepare.preview", *args)


def test_what_a_slide_holds(tmp_path):
    path = write(tmp_path / "a.svs", picture(512, 512), downs=(4,))
    r = run(path)
    assert r.returncode == 0 and r.stderr == ""
    lines = r.stdout.splitlines()
    assert "512 x 512 pixels, 0.25 um/px (Aperio MPP), tiles of 256 x 256" in lines[1]
    assert lines[2:4] == [
        "  level 0: 512 x 512, downsample 1, 0.25 um/px",
        "  level 1: 128 x 128, downsample 4, 1 um/px",
    ]
    assert lines[4] == "   5x, 2 um/px: from level 1, reduced 2 times"
    assert lines[7] == "  40x, 0.25 um/px: from level 0, reduced 1 times"
    assert lines[8] == "  a bag: 85 of 85 nodes, 1024 um wide"
    coarse = run(path, "--mpp", 0.5, "--fov-px", 64).stdout
    assert "40x, 0.25 um/px: not in this slide" in coarse and "a bag: 21 of 85 nodes" in coarse
    assert "in doubt: 0.5 um/px (--mpp) contradicts 0.25 (Aperio MPP)" in coarse


def test_the_picture_shows_parents_and_one_bag(tmp_path):
    path = write(tmp_path / "a.svs", picture(1024, 1024, glass=300))
    r = run(path, "--out", tmp_path / "new" / "p.png", "--fov-px", 32)
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith("wrote ") and r.stdout.endswith("p.png: 12 parents\n")
    page = np.asarray(Image.open(tmp_path / "new" / "p.png")).astype(int)
    # The slide is on the left, the bag of four panels on the right.
    assert page.shape[1] > 2 * preview.PANEL + 300 and page.shape[0] > 2 * preview.PANEL
    for colour in ((255, 165, 0), (0, 0, 205), (255, 215, 0), (0, 140, 60)):
        assert (page == colour).all(-1).any(), colour
    # One frame a panel at 5x, 10x and 20x, none at 40x.
    yellow = (page == (255, 215, 0)).all(-1)
    assert not yellow[-preview.PANEL // 2 :, -preview.PANEL :].any()


def test_panels_show_what_the_slide_holds(tmp_path):
    """The 5x panel is the parent, read at the panel's size."""
    path = write(tmp_path / "a.svs", picture(512, 512))
    with Slide(path) as slide:
        bag = choose_parents(slide, fov_px=32)[0]
        image = np.asarray(preview.draw_bag(slide, bag, 32))
        inner = slide.read(*bag[:3], preview.PANEL - 2)
        corner = image[preview.TOP + 3 : preview.TOP + 200, 3:200]
        assert (corner == inner[2:199, 2:199]).all()


def test_slides_without_parents_and_mistakes(tmp_path):
    blank = write(tmp_path / "blank.svs", np.full((512, 512, 3), 245, np.uint8))
    r = run(blank, "--out", tmp_path / "p.png", "--fov-px", 32, "--mpp", 0.5)
    assert r.returncode == 0 and "blank.svs: 0.5 um/px (--mpp) contradicts 0.25" in r.stderr
    assert "no square has 0.5 of tissue, the best has 0.00: look" in r.stderr
    assert r.stdout.endswith("p.png: 0 parents\n")
    assert Image.open(tmp_path / "p.png").width > 100
    # Without a scale, its sizes help to guess one.
    r = run(write(tmp_path / "scale.svs", picture(512, 512), downs=(4,), text="Aperio x"))
    assert r.returncode == 1 and "scale.svs (512 x 512, 128 x 128 pixels) does not" in r.stderr
    (tmp_path / "text.svs").write_text("x")
    cases = ((tmp_path / "text.svs", "text.svs"), (tmp_path / "no.svs", "check the path"))
    for path, words in cases:
        r = run(path)
        assert r.returncode == 1 and words in r.stderr
        assert r.stderr.startswith("error: ") and r.stderr.count("\n") == 1


def test_a_folder_is_described_slide_by_slide(tmp_path):
    write(tmp_path / "a.svs", picture(512, 512))
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "b.svs", picture(512, 512), text="Aperio x")
    r = run(tmp_path)
    assert r.returncode == 1 and "a.svs" in r.stdout and "a bag: 85" in r.stdout
    assert "b.svs (512 x 512 pixels) does not" in r.stderr
    assert r.stderr.endswith("error: 1 of 2 slides cannot be used, see above\n")
    (tmp_path / "mpp.csv").write_text("slide,mpp\na,0.25\nb,0.5\n")
    r = run(tmp_path, "--mpp", tmp_path / "mpp.csv")
    assert r.returncode == 0 and r.stdout.count("a bag: ") == 2 and "a bag: 21 of" in r.stdout
    r = run(tmp_path, "--out", tmp_path / "p.png")
    assert r.returncode == 1 and r.stderr.startswith("error: --out draws one slide, not the 2 of")
