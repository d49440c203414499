"""python -m pytest tests/test_data.py -q

Slides of every format are written on the spot. OpenSlide is a second opinion where it is installed.
"""

import fcntl
import importlib
import io
import json
import os
import resource
import signal
import struct
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from conftest import Script, script
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import data

REAL = Path(__file__).resolve().parents[2] / "shared/data/slides"


def picture(h=512, w=512, glass=0, seed=0):
    """Draw pink and purple blobs [h, w, 3]; the left `glass` columns are white."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (h // 16 + 1, w // 16 + 1))
    coarse = np.kron(coarse, np.ones((16, 16), int))[:h, :w, None]
    image = np.where(coarse, (225, 140, 190), (110, 70, 150)) + rng.integers(-20, 20, (h, w, 1))
    image[:, :glass] = 245
    return image.clip(0, 255).astype(np.uint8)


IMAGE = picture(600, 896)
TILES = dict(photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)
APERIO = "Aperio Image Library v12\r\n512x512|AppMag = 40|MPP = "


def half(image, k):
    """Average k x k pixels."""
    image = image[: len(image) // k * k, : image.shape[1] // k * k].astype(float)
    image = image.reshape(len(image) // k, k, -1, k, 3)
    return image.mean((1, 3)).round().astype(np.uint8)


def padded(image, tile=256):
    bottom = -len(image) % tile
    right = -image.shape[1] % tile
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), constant_values=255)


def write(path, image, downs=(), tile=(256, 256), mpp=0.25, text=None, **options):
    """Write a pyramidal TIFF whose levels are exact averages; lossless unless options say else."""
    text = APERIO + str(mpp) if text is None else text
    options = TILES | dict(tile=tile, description=text) | options
    if tile is None:
        del options["tile"]
        options["rowsperstrip"] = 48
    with tifffile.TiffWriter(path) as tif:
        tif.write(image, **options)
        # The thumbnail of Aperio follows its level 0, in strips.
        tif.write(image[::8, ::8], photometric="rgb", description="Aperio - ", metadata=None)
        for d in downs:
            tif.write(half(image, d), **options | dict(description="Aperio", subfiletype=1))
    return path


def cli(*args, **more):
    return script("data.py", *args, **more)


def slides_in(folder, n=3):
    folder.mkdir()
    for i in range(n):
        write(folder / f"s{i}.svs", picture(512, 512, seed=i))
    return folder


SMALL = dict(patch_px=8, fov_px=32)


# ---------------------------------------------------------------- files


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    data.write_whole(path, "one")
    data.write_whole(path, b"two")
    assert path.read_text() == "two"

    def fail(file):
        file.write(b"three")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        data.write_whole(path, fail)
    assert path.read_text() == "two" and len(list(path.parent.iterdir())) == 1
    data.write_whole(path, lambda file: file.write(b"four"))
    assert path.read_text() == "four"


def test_read_image(tmp_path):
    for name in ("a.png", "a.tif"):
        Image.fromarray(IMAGE).save(tmp_path / name)
        assert (np.asarray(data.read_image(tmp_path / name)) == IMAGE).all()
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "grey.png")
    assert data.read_image(tmp_path / "grey.png").mode == "RGB"
    Image.fromarray(IMAGE[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("deep.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            data.read_image(tmp_path / name)


# ---------------------------------------------------------------- the 85 nodes


def test_heap_by_hand():
    assert [data.mpp_of(m) for m in data.MAGS] == [2, 1, 0.5, 0.25]
    assert data.LEVEL.dtype == data.ROW.dtype == data.COL.dtype == np.int64
    assert data.LEVEL.tolist() == [0] + [1] * 4 + [2] * 16 + [3] * 64
    # 84 is the last of the last, 17 the first child of the lower right quarter.
    assert (data.ROW[[1, 2, 3, 17, 84]] == [0, 0, 1, 2, 7]).all()
    assert (data.COL[[1, 2, 3, 17, 84]] == [0, 1, 0, 2, 7]).all()
    quarters = [(0, 0, 32), (32, 0, 32), (0, 32, 32), (32, 32, 32)]
    assert [data.square(n, 0, 0, 64) for n in (1, 2, 3, 4)] == quarters
    assert data.square(84, 0, 0, 64) == (56, 56, 8) and data.square(7, 0, 0, 64) == (0, 16, 16)
    assert json.dumps(data.square(0, 100, 200, 64)) == "[100, 200, 64]"
    assert [row.shape for row in data.square(np.arange(85), 0, 0, 64)] == [(85,)] * 3
    # Each level paints every pixel of the parent once.
    seen = np.zeros((4, 64, 64), int)
    for n in range(85):
        x, y, s = data.square(n, 0, 0, 64)
        seen[data.LEVEL[n], y : y + s, x : x + s] += 1
        px, py, ps = data.square((n - 1) // 4, 0, 0, 64) if n else (0, 0, 64)
        assert px <= x and py <= y and x + s <= px + ps and y + s <= py + ps
    assert (seen == 1).all()
    # A slide of 10x holds five nodes, here one without tissue.
    tissue = np.full((2, 85), 0.5)
    tissue[1, 3] = 0.05
    valid = data.valid_nodes((5, 10), tissue)
    assert valid[0].tolist() == [True] * 5 + [False] * 80 and valid.shape == (2, 85)
    assert valid[1].tolist() == [True, True, True, False, True] + [False] * 80
    assert data.valid_nodes([5, 10, 20, 40], tissue, min_node=0.0).all()


# ---------------------------------------------------------------- formats


def check(path, levels, source, tolerance=0, size=(896, 600)):
    """Open a slide of IMAGE; halves read as averages whatever is stored, glass is outside."""
    with data.Slide(path) as slide:
        assert slide.size == size and [d for d, _ in slide.levels] == levels
        assert slide.mpp_source == source and slide.mpp == pytest.approx(0.25)
        assert slide.mags == data.MAGS and slide.doubt == ""
        for x, y, side, k in ((3, 5, 300, 1), (8, 16, 512, 2), (0, 0, 512, 8)):
            want = half(IMAGE[y : y + side, x : x + side], k).astype(int)
            assert abs(slide.read(x, y, side, side // k) - want).max() <= tolerance + (k > 1)
        assert (slide.read(size[0], 0, 64, 64) == 255).all()


@pytest.mark.parametrize("bigtiff", [False, True])
def test_generic_pyramidal_tiff(tmp_path, bigtiff):
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=bigtiff) as tif:
        for k in (1, 2, 4, 8):
            scale = dict(resolution=(40000 / k, 40000 / k), resolutionunit="CENTIMETER")
            tif.write(half(IMAGE, k), subfiletype=int(k > 1), **scale, **TILES)
    check(tmp_path / "a.tif", [1, 2, 4, 8], "TIFF XResolution")


def test_ome_tiff_with_subifds(tmp_path):
    um = dict(axes="YXS", PhysicalSizeX=250, PhysicalSizeXUnit="nm")
    macro = dict(axes="YXS", Name="macro", PhysicalSizeX=1.9, PhysicalSizeXUnit="\u00b5m")
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", bigtiff=True) as tif:
        tif.write(IMAGE[:64, :64], photometric="rgb", metadata=macro)
        tif.write(IMAGE, subifds=2, **TILES | dict(metadata=um))
        for k in (2, 4):
            tif.write(half(IMAGE, k), subfiletype=1, **TILES)
        tif.write(IMAGE[:300, :200], photometric="rgb", metadata=dict(axes="YXS", Name="label"))
    check(tmp_path / "a.ome.tif", [1, 2, 4], "OME PhysicalSizeX")


def test_philips_tiff(tmp_path):
    """Levels are padded to whole tiles and say so only in the XML, which also holds the microns."""

    one = '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
    one += "&quot;{0}&quot; &quot;{0}&quot;</Attribute></DataObject>"
    levels = "".join(one.format(0.00025 * k) for k in (1, 2, 4))
    xml = f"""<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">
    <Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">
    <Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>
    </DataObject></Array></Attribute></DataObject>"""
    options = TILES | dict(software="Philips DP v1.0")
    with tifffile.TiffWriter(tmp_path / "a.tiff") as tif:
        tif.write(padded(IMAGE), description=xml, **options)
        for k in (2, 4):
            level = padded(half(padded(IMAGE), k))
            tif.write(level, description=f"level={k}", subfiletype=1, **options)
        macro = dict(photometric="rgb", description="Macro", metadata=None)
        tif.write(IMAGE[::4, ::4], software="Philips DP v1.0", **macro)
    check(tmp_path / "a.tiff", [1, 2, 4], "Philips DICOM_PIXEL_SPACING", size=(1024, 768))


def test_leica_scn_takes_the_main_image(tmp_path):
    def pixels(name, *levels):
        rows = ""
        for r, (w, h, ifd) in enumerate(levels):
            rows += f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{ifd}"/>'
        size = f'sizeX="{levels[0][0]}" sizeY="{levels[0][1]}"'
        return f'<image name="{name}"><pixels {size}>{rows}</pixels></image>'

    xmlns = "http://www.leica-microsystems.com/scn/2010/10/01"
    images = pixels("macro", (300, 200, 0)) + pixels("main", (896, 600, 1), (224, 150, 2))
    xml = f'<?xml version="1.0"?><scn xmlns="{xmlns}"><collection name="c">{images}'
    xml += "</collection></scn>"
    pages = ((IMAGE[:200, :300], 10, xml), (IMAGE, 0.25, None), (half(IMAGE, 4), 1, None))
    with tifffile.TiffWriter(tmp_path / "a.scn", bigtiff=True) as tif:
        for image, mpp, text in pages:
            scale = dict(resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER")
            tif.write(image, description=text, **scale, **TILES)
    check(tmp_path / "a.scn", [1, 4], "TIFF XResolution")


def write_ndpi(path, pictures):
    """Write Hamamatsu's dialect: 64-bit offsets in a 32-bit TIFF, each level one JPEG.

    A tag lists the positions of its restart markers, so that pieces can be decoded alone.
    """
    out = bytearray(b"II*\0" + bytes(8))
    link = 4
    for image, mpp, objective in pictures:
        buffer = io.BytesIO()
        options = dict(quality=95, subsampling=0, restart_marker_blocks=28)
        Image.fromarray(image).save(buffer, "JPEG", **options)
        jpg = buffer.getvalue()
        h, w = image.shape[:2]
        at = len(out)
        out += jpg
        more = len(out)
        out += struct.pack("<2I", round(1e7 / mpp), 1000) + b"Hamamatsu\0"
        out += struct.pack("<3H", 8, 8, 8)
        lens = struct.unpack("<I", struct.pack("<f", objective))[0]
        tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, more + 18), (259, 3, 1, 7)]
        tags += [(262, 3, 1, 6), (271, 2, 10, more + 8), (273, 4, 1, at), (277, 3, 1, 3)]
        tags += [(278, 4, 1, h), (279, 4, 1, len(jpg)), (282, 5, 1, more), (283, 5, 1, more)]
        tags += [(296, 3, 1, 3), (65420, 4, 1, 1), (65421, 11, 1, lens)]
        scan = jpg.index(b"\xff\xda")
        starts = [scan + 2 + struct.unpack(">H", jpg[scan + 2 : scan + 4])[0]]
        for i in range(starts[0], len(jpg) - 1):
            if jpg[i] == 0xFF and 0xD0 <= jpg[i + 1] <= 0xD7:
                starts.append(i + 2)
        tags.append((65426, 4, len(starts), len(out)))
        out += struct.pack(f"<{len(starts)}I", *starts)
        out[link : link + 8] = struct.pack("<Q", len(out))
        out += struct.pack("<H", len(tags))
        for tag in tags:
            out += struct.pack("<HHII", *tag)
        link = len(out)
        out += bytes(8 + 4 * len(tags))
    Path(path).write_bytes(out)


def test_hamamatsu_ndpi(tmp_path):
    levels = [(IMAGE, 0.25, 40.0), (half(IMAGE, 4), 1.0, 10.0), (IMAGE[:300, :200], 30.0, -1.0)]
    write_ndpi(tmp_path / "a.ndpi", levels)
    check(tmp_path / "a.ndpi", [1, 4], "TIFF XResolution", tolerance=12)
    assert data.Slide(tmp_path / "a.ndpi").tile == (224, 8)


def test_aperio_jpeg_2000(tmp_path):
    """Kind 33003 stores luminance and chrominance, 33005 colours; neither says so in its tiles."""
    whole = padded(IMAGE)
    r, g, b = np.moveaxis(whole.astype(float), 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycc = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1)
    ycc = np.clip(ycc.round(), 0, 255).astype(np.uint8)
    encode = dict(level=0, codecformat="J2K", mct=False)
    for kind, stored, tolerance in ((33003, ycc, 2), (33005, whole, 0)):
        tiles = []
        for top in range(0, len(whole), 256):
            for left in range(0, whole.shape[1], 256):
                tile = np.ascontiguousarray(stored[top : top + 256, left : left + 256])
                tiles.append(imagecodecs.jpeg2k_encode(tile, **encode))
        options = TILES | dict(compression=kind, description=APERIO + "0.25")
        with tifffile.TiffWriter(tmp_path / f"{kind}.svs") as tif:
            tif.write(iter(tiles), shape=IMAGE.shape, dtype=np.uint8, **options)
        check(tmp_path / f"{kind}.svs", [1], "Aperio MPP", tolerance)


def test_other_formats_need_openslide(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a.mrxs").write_bytes(b"x")
    planes = dict(photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "planes.tif", IMAGE.transpose(2, 0, 1), **planes)
    words = {"a.mrxs": "", "planes.tif": "3 x uint8, RGB"}
    for name in ("SEPARATED", "CIELAB", "YCBCR"):
        pixels = IMAGE[..., [0, 1, 2, 2]] if name == "SEPARATED" else IMAGE
        options = dict(photometric=name, compression="deflate")
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, **options)
        words[f"{name}.tif"] = f"{name}, .*DEFLATE"
    for name, word in words.items():
        with pytest.raises(ValueError, match=f"{name}: .*{word}.*pip install openslide") as e:
            data.Slide(tmp_path / name, 0.25)
        assert "\n" not in str(e.value)
    # The slides that a folder cannot read are refused aloud, not passed over.
    assert len(data.find_slides(tmp_path)) == 5


def test_training_needs_no_codecs(tmp_path, monkeypatch):
    """Without tifffile and imagecodecs, data is imported and bags are read with Pillow."""
    data.tile(slides_in(tmp_path / "in", 1), tmp_path / "out", **SMALL)
    image = data.Bags(tmp_path / "out")[1]["image"]
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "data")
    bare = importlib.import_module("data")
    assert bare is not data and torch.equal(bare.Bags(tmp_path / "out")[1]["image"], image)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ValueError, match="s0.svs: .*imagecodecs"):
        bare.Slide(tmp_path / "in" / "s0.svs")


def test_bad_files_say_what_to_do(tmp_path):
    good = write(tmp_path / "good.svs", picture(), compression=None)
    whole = good.read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[:-30000])
    (tmp_path / "half.svs").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "early.svs").write_bytes(struct.pack("<2sHI", b"II", 42, 10**6) + bytes(5000))
    (tmp_path / "text.svs").write_text("no slide")
    (tmp_path / "empty.svs").write_bytes(b"")
    tifffile.imwrite(tmp_path / "grey.tif", np.zeros((64, 64), np.uint8))
    cases = {"missing.svs": "copy it again", "cut.svs": "truncated", "half.svs": "truncated"}
    cases |= {"early.svs": "truncated", "text.svs": "convert", "empty.svs": "copy it again|convert"}
    cases |= {"grey.tif": "1 x uint8, MINISBLACK"}
    for name, words in cases.items():
        with pytest.raises(ValueError, match=f"{name}.*({words})") as e:
            data.Slide(tmp_path / name, mpp=0.25)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- scale


def test_where_mpp_comes_from(tmp_path):
    def found(name, **options):
        slide = data.Slide(write(tmp_path / name, picture(64, 64), **options))
        return round(slide.mpp, 4), slide.mpp_source

    assert found("a.svs", mpp=0.499) == (0.499, "Aperio MPP")
    cm = dict(text="", resolution=(40000, 40000), resolutionunit="CENTIMETER")
    inch = dict(text="", resolution=(50800, 50800), resolutionunit="INCH")
    assert found("b.tif", **cm) == (0.25, "TIFF XResolution")
    assert found("c.tif", **inch) == (0.5, "TIFF XResolution")
    printer = dict(text="", resolution=(72, 72), resolutionunit="INCH")
    bare = dict(text="Aperio x")
    app = dict(text="Aperio x|AppMag = 20")
    for options, hint in ((bare, "0.25"), (app, "suggests 0.5"), (printer, "--mpp")):
        with pytest.raises(ValueError, match=f"d.svs does not say .*--mpp .*{hint}|pass {hint}"):
            data.Slide(write(tmp_path / "d.svs", picture(64, 64), **options))
    assert data.Slide(tmp_path / "d.svs", mpp=0.3).mpp == 0.3
    for mpp in (0.05, 3, 40):
        with pytest.raises(ValueError, match=f"d.svs: {mpp:g} um/px .--mpp. is not within 0.1-2.4"):
            data.Slide(tmp_path / "d.svs", mpp=mpp)
    mags = [data.Slide(tmp_path / "d.svs", mpp=mpp).mags for mpp in (0.12, 0.25, 0.5, 1.0, 2.0)]
    assert mags == [data.MAGS, data.MAGS, (5, 10, 20), (5, 10), (5,)]
    # A slide of 80x is reduced; its objective of 40x puts that in doubt.
    with data.Slide(write(tmp_path / "e.svs", picture(1024, 1024), mpp=0.125)) as slide:
        assert slide.mags == data.MAGS and data.choose_parents(slide, fov_px=64)[0][2] == 1024
        assert slide.doubt == "0.125 um/px (Aperio MPP) contradicts 0.25 (AppMag 40)"
    assert data.Slide(write(tmp_path / "f.svs", picture(64, 64), mpp=0.26)).doubt == ""


def test_a_level_is_not_a_magnification(tmp_path):
    """Of levels 1, 4, 16, 5x and 10x come from level 1, 20x and 40x from level 0."""
    image = np.zeros((1024, 1024, 3), np.uint8)
    # Red tells the column.
    image[..., 0] = np.arange(1024)[None] // 4
    with data.Slide(write(tmp_path / "a.svs", image, downs=(4, 16))) as slide:
        # The thumbnail is no level.
        assert [d for d, _ in slide.levels] == [1, 4, 16]
        best = [slide.best_level(data.mpp_of(mag) / slide.mpp) for mag in data.MAGS]
        assert best == [1, 1, 0, 0]
        wide = slide.read(0, 0, 1024, 128).astype(float)
        assert abs(wide[5, :, 0] - (np.arange(128) * 8 + 3.5) / 4).max() < 1.5


# ---------------------------------------------------------------- pixels

LOSSLESS = [{}, dict(tile=(240, 240)), dict(tile=(512, 512)), dict(compression="lzw")]
LOSSLESS += [dict(tile=None), dict(compression="jpeg2000", compressionargs=dict(level=0))]


@pytest.mark.parametrize("options", LOSSLESS)
def test_read_is_exact_for_lossless_slides(tmp_path, options):
    image = picture(500, 700)
    with data.Slide(write(tmp_path / "a.svs", image, downs=(4,), **options)) as slide:
        if options.get("tile", 1) is not None:
            assert [d for d, _ in slide.levels] == [1, 4]
        assert slide.size == (700, 500) and slide.mpp == 0.25
        assert (slide.read(37, 51, 300, 300) == image[51:351, 37:337]).all()
        # This one hangs over the left and lower edges.
        edge = slide.read(-20, 400, 200, 200)
        assert (edge[:100, 20:] == image[400:, :180]).all()
        assert (edge[:, :20] == 255).all() and (edge[100:] == 255).all()
        assert (slide.read(5000, 5000, 64, 64) == 255).all()
        # No level of 2 is stored: level 0 is averaged.
        mean = image[100:356, 100:356].reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert abs(slide.read(100, 100, 256, 128) - mean).max() <= 0.5


@pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
def test_jpeg_colours(tmp_path, colours):
    image = np.full((300, 300, 3), (200, 90, 160), np.uint8)
    options = dict(compression="jpeg", compressionargs=dict(level=95, outcolorspace=colours))
    with data.Slide(write(tmp_path / "a.svs", image, tile=(240, 240), **options)) as slide:
        assert abs(slide.read(190, 190, 96, 96).astype(int) - image[:96, :96]).max() <= 4


def test_a_tile_that_was_never_stored_is_white(tmp_path):
    path = write(tmp_path / "a.svs", IMAGE)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        counts = tif.pages[0].tags["TileByteCounts"]
        counts.overwrite([0] + list(counts.value[1:]))
    with data.Slide(path) as slide:
        both = slide.read(0, 0, 512, 512)
        assert (both[:256, :256] == 255).all() and (both[256:] == IMAGE[256:512, :512]).all()


def test_threads_may_share_a_slide(tmp_path):
    path = write(tmp_path / "a.svs", IMAGE, tile=(112, 112))
    spots = np.random.default_rng(0).integers(0, 500, (1500, 2)).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with data.Slide(path, threads=1) as slide, ThreadPoolExecutor(6) as pool:

            def right(spot):
                x, y = spot
                whole = (slide.read(x, y, 24, 24) == IMAGE[y : y + 24, x : x + 24]).all()
                mean = slide.read(x, y, 24, 12).astype(int)
                return whole and abs(mean - half(IMAGE[y : y + 24, x : x + 24], 2)).max() <= 1

            assert all(pool.map(right, spots))
    finally:
        sys.setswitchinterval(interval)


def test_resize():
    a = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    # The mean of 0, 3, 12, 15 is 7.5, rounded up; then 8.5 and 9.5.
    assert (data.resize(a, 2)[0, 0] == [8, 9, 10]).all()
    assert (data.resize(data.resize(a, 12), 4) == a).all()
    flat = data.resize(np.full((50, 50, 3), 77, np.uint8), 21)
    assert flat.shape == (21, 21, 3) and (flat == 77).all()
    rng = np.random.default_rng(0)
    # Beyond 16 x 16 pixels a sum needs more than 16 bits.
    for k, out in ((2, 70), (3, 40), (7, 33), (16, 5), (17, 5), (20, 2)):
        a = rng.integers(0, 256, (k * out, k * out, 3)).astype(np.uint8)
        sums = a.reshape(out, k, out, k, 3).astype(int).sum((1, 3))
        assert (data.resize(a, out) == (sums + k * k // 2) // (k * k)).all()


def test_openslide_and_tifffile_read_the_same(tmp_path, monkeypatch):
    """Compare the two readers of a Slide on files that both can read, pixel by pixel."""
    openslide = pytest.importorskip("openslide")
    jpeg = dict(compression="jpeg", compressionargs=dict(level=85))
    path = write(tmp_path / "a.svs", picture(1000, 900), (4,), (240, 240), **jpeg)
    paths = [path, *sorted(REAL.glob("cmu-1*.svs"))]
    for path in paths:
        with data.Slide(path) as slide, monkeypatch.context() as patch:
            patch.setattr(data, "_Tiff", lambda path: 1 / 0)
            with data.Slide(path) as peer:
                assert isinstance(peer.source.file, openslide.OpenSlide)
                assert peer.size == slide.size and peer.levels == slide.levels
                assert peer.mpp == slide.mpp and peer.tile == slide.tile and not peer.doubt
                squares = [(1, 3, 512, 512), (-40, 700, 400, 400), (64, 64, 512, 128)]
                squares += [(68, 132, 512, 64), (0, 0, 900, 450)]
                for square in squares:
                    assert (peer.read(*square) == slide.read(*square)).all(), (path, square)


# ---------------------------------------------------------------- tissue and parents


def tissue_of(tmp_path, image, um=4):
    with data.Slide(write(tmp_path / "t.svs", image)) as slide:
        return data.tissue_mask(slide, um)


def test_tissue_is_stain_not_glass(tmp_path):
    glass = np.full((512, 512, 3), 243, np.uint8)
    tissue = picture(512, 512)

    def on(part, left=glass):
        # The right half shows `part`.
        image = left.copy()
        image[:, 256:] = np.broadcast_to(part, image.shape)[:, 256:]
        return image

    cases = {"pale": on(np.uint8([238, 220, 232])), "dark": (on(tissue) * 0.5).astype(np.uint8)}
    pens = dict(black=(30, 30, 35), blue=(45, 70, 160), green=(30, 110, 80), red=(200, 45, 65))
    fillings = dict(grey_filling=(200, 200, 200), black_filling=(0, 0, 0))
    for pen, colour in (pens | fillings).items():
        cases[pen] = on(tissue, np.broadcast_to(np.uint8(colour), glass.shape).copy())
    for name, image in cases.items():
        mask, scale = tissue_of(tmp_path, image)
        assert scale == 16 and mask.shape == (32, 32), name
        assert mask[:, 17:].mean() > 0.98 and mask[:, :15].mean() < 0.02, name
    # All glass, all tissue, and 16 um of tissue.
    for colour, share in ((245, 0), ((200, 120, 180), 1)):
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
    share = data.tissue_fraction(mask, 10, x, y, side)
    assert np.allclose(share, [1, 0.25, 0.25, 0.25, 0, 1])


def test_parents(tmp_path):
    path = write(tmp_path / "a.svs", picture(1024, 1300, glass=600))
    with data.Slide(path) as slide:
        # A parent is 256 px wide, and the grid is centred: columns from x = 10.
        bags = data.choose_parents(slide, fov_px=32)
        places = {(x, side) for x, _, side, _ in bags}
        assert places == {(522, 256), (778, 256), (1034, 256)} and len(bags) == 12
        for x, _, _, tissue in bags:
            assert abs(tissue[0] - (0.695 if x == 522 else 1)) < 0.1
            # A parent's share is its children's mean.
            assert np.allclose(tissue[0], tissue[21:].mean())
        few = data.choose_parents(slide, fov_px=32, parents=5)
        again = data.choose_parents(slide, fov_px=32, parents=5)
        other = data.choose_parents(slide, fov_px=32, parents=5, seed=1)
        assert [b[:2] for b in few] == [b[:2] for b in again] and len(few) == 5
        assert [b[:2] for b in few] != [b[:2] for b in other]
    fine = write(tmp_path / "fine.svs", picture(1024, 1300, glass=600), tile=(64, 64))
    # Where tiles are small, parents start on their edges: each tile is decoded once.
    with data.Slide(fine) as slide:
        assert {x for x, *_ in data.choose_parents(slide, fov_px=32)} == {512, 768, 1024}
    # The true mpp sets the side: 32 * 2 / 0.2525 = 253.5 -> 256.
    with data.Slide(path, mpp=0.2525) as slide:
        assert data.choose_parents(slide, fov_px=32)[0][2] == 256
    with data.Slide(write(tmp_path / "small.svs", picture(200, 230))) as slide:
        # Centred and padded: 200 * 230 of 256^2.
        ((x, y, side, tissue),) = data.choose_parents(slide, fov_px=32)
        assert (x, y, side) == (-13, -28, 256) and abs(tissue[0] - 0.702) < 0.04
        assert data.choose_parents(slide, fov_px=64) == []


def test_the_draw_and_the_grid(tmp_path):
    """Bags of published seeds must stay the same: these numbers were drawn in 2026."""
    with data.Slide(write(tmp_path / "a.svs", picture(1024, 1024))) as slide:
        bags = data.choose_parents(slide, fov_px=16, parents=4, seed=7)
        places = [(384, 128), (640, 128), (640, 768), (128, 896)]
        assert [b[:3] for b in bags] == [(x, y, 128) for x, y in places]
    # The centred grid would have a quarter of this piece in each of four parents.
    image = np.full((768, 768, 3), 243, np.uint8)
    image[384:640, 128:384] = picture(256, 256)
    for tile in (128, 768):
        with data.Slide(write(tmp_path / "b.svs", image, tile=(tile, tile))) as slide:
            ((x, y, side, tissue),) = data.choose_parents(slide, fov_px=32, min_tissue=0.9)
            assert (x, y, side) == (128, 384, 256) and tissue[0] > 0.95


# ---------------------------------------------------------------- tiling


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {row["slide"]: row["reason"] for row in map(json.loads, lines)}


def test_tile_shards(tmp_path):
    out = tmp_path / "out"
    counts = data.tile(slides_in(tmp_path / "in"), out, patch_px=32, fov_px=32)
    assert counts == dict(slides=3, done=3, bags=12, empty=0, failed=0)
    bags = data.Bags(out)
    item = bags[7]
    assert len(bags) == 12 and bags.S == 32 and bags.folder == out
    assert [s.name for s in bags.shards] == ["bags-s0.tar", "bags-s1.tar", "bags-s2.tar"]
    assert bags.shard_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (item["key"], item["slide"], item["index"]) == ("s1-03", "s1.svs", 7)
    assert (bags.keys[7], bags.slides[7]) == ("s1-03", "s1.svs")
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 256, 256)
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
        assert set(about) == {"slide", "x", "y", "side", "mpp", "mags", "tissue"}
        assert about["slide"] == "s0.svs" and about["mpp"] == 0.25
        assert about["tissue"] == bags.meta[i]["tissue"]


def test_tile_resumes_extends_and_is_deterministic(tmp_path):
    slides = slides_in(tmp_path / "in")
    a = tmp_path / "a"
    b = tmp_path / "b"
    (slides / "bad.svs").write_text("x")
    assert data.tile(slides, a, workers=2, **SMALL)["failed"] == 1
    assert list(failures(a)) == ["bad.svs"]
    (slides / "bad.svs").unlink()
    data.tile(slides / "s0.svs", b, **SMALL)
    before = (b / "bags-s0.tar").stat().st_mtime_ns
    # A crash before its index leaves a shard that is made anew.
    (b / "bags-s1.tar").write_text("left by a crash")
    assert data.tile(slides, b, **SMALL)["done"] == 3
    assert (b / "bags-s0.tar").stat().st_mtime_ns == before and not list(b.glob("*.tmp"))
    for name in ("bags-s0.tar", "bags-s1.tar", "bags-s2.tar", "bags-s1.index.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    # A blank slide leaves an index without bags, and no tar.
    write(slides / "blank.svs", np.full((512, 512, 3), 245, np.uint8))
    assert data.tile(slides, b, **SMALL) == dict(slides=4, done=4, bags=12, empty=1, failed=0)
    assert not (b / "bags-blank.tar").exists() and (b / "bags-blank.index.json").exists()
    assert len(data.Bags(b)) == 12
    for change in (dict(patch_px=16), dict(mpp=0.5)):
        words = "was made with .*'patch_px': 8.*mpp 0.25: repeat those"
        with pytest.raises(ValueError, match=words):
            data.tile(slides, b, **SMALL | change)
    # A lost shard is made again.
    (b / "bags-s0.tar").unlink()
    with pytest.raises(ValueError, match="bags-s0.tar is missing"):
        data.Bags(b)
    assert data.tile(slides, b, **SMALL)["bags"] == 12
    assert (b / "bags-s0.tar").read_bytes() == (a / "bags-s0.tar").read_bytes()
    with open(b / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another tile command writes to"):
            data.tile(slides, b, **SMALL)


def test_keys_have_no_dot_and_do_not_clash(tmp_path):
    (tmp_path / "in").mkdir()
    one = write(tmp_path / "in" / "a.b.svs", picture(256, 256))
    data.tile(one, tmp_path / "out", **SMALL)
    assert data.Bags(tmp_path / "out").keys == ["a_b-00"]
    two = write(tmp_path / "in" / "a_b.tif", picture(256, 256))
    with pytest.raises(ValueError, match="bags of .* would share a name: rename one"):
        data.find_slides(tmp_path / "in")
    # The same if they come in two calls.
    with pytest.raises(ValueError, match="bags-a_b.index.json is of a.b.svs, not of .*a_b.tif"):
        data.tile(two, tmp_path / "out", **SMALL)


def test_a_bad_slide_costs_one_slide(tmp_path):
    slides = slides_in(tmp_path / "in", 2)
    out = tmp_path / "out"
    good = (slides / "s0.svs").read_bytes()
    (slides / "cut.svs").write_bytes(good[: len(good) // 2])
    (slides / "empty.svs").write_bytes(b"")
    write(slides / "scale.svs", picture(), text="Aperio x")
    # Overwrite one tile with zeros.
    with tifffile.TiffFile(slides / "s0.svs") as tif:
        at = tif.pages[0].dataoffsets[1]
        n = tif.pages[0].databytecounts[1]
    (slides / "rotten.svs").write_bytes(good[:at] + bytes(n) + good[at + n :])
    small = ("--out", out, "--patch-px", 8, "--fov-px", 32)
    for _ in range(2):
        # The same command tries them again.
        r = cli("tile", slides, *small)
        assert r.returncode == 1 and "8 bags from 2 of 6 slides" in r.stdout
        assert "error: 4 of 6 slides cannot be used" in r.stderr and "Traceback" not in r.stderr
        assert set(failures(out)) == {"cut.svs", "empty.svs", "rotten.svs", "scale.svs"}
    assert "rotten.svs is damaged" in failures(out)["rotten.svs"]
    assert "pass --mpp" in failures(out)["scale.svs"]
    # A repaired slide and a table of scales.
    (slides / "rotten.svs").write_bytes(good)
    (tmp_path / "mpp.csv").write_text("slide,mpp\nscale.svs,0.5\n")
    r = cli("tile", slides, *small, "--mpp", tmp_path / "mpp.csv")
    assert r.returncode == 1 and "28 bags from 4 of 6 slides" in r.stdout
    assert set(failures(out)) == {"cut.svs", "empty.svs"}


def test_mistakes_at_the_command_line_are_one_sentence(tmp_path):
    slides = slides_in(tmp_path / "in", 1)
    out = ("--out", tmp_path / "out")
    r = cli("tile", slides, *out, "--patch-p", 3)
    assert r.returncode == 2 and "unrecognized arguments: --patch-p" in r.stderr
    for args, words in (
        ((slides, *out, "--min-tissue", 50), "min_tissue is 50.0, not 0 to 1"),
        ((slides, *out, "--parents", 0), "parents is below 1"),
        ((tmp_path / "no", *out), "check the path"),
        ((slides, "--out", slides / "s0.svs"), "s0.svs"),
    ):
        r = cli("tile", *args)
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
    p = Script("data.py", "tile", slides, *args, before=before)
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


def test_mpp_tables(tmp_path):
    path = tmp_path / "m.csv"

    def table(text, encoding="utf-8"):
        path.write_text(text, encoding=encoding)
        return data.mpp_table(str(path), ["a.svs", "b,c.svs"])

    want = {"a.svs": 0.3, "b,c.svs": None}
    assert table("a.svs,0.3\n") == table('"a.svs",0.3', "utf-8-sig") == want
    assert table("slide,mpp\r\na.svs, 0.3\r\n\r\n") == want
    assert table('x.svs,1\n"b,c.svs",0.5')["b,c.svs"] == 0.5
    for text in ("a.svs;0.3\n", "slide,mpp\nz.svs,1"):
        with pytest.raises(ValueError, match="m.csv names none of the slides"):
            table(text)
    for text in ("a.svs,0.3\nb,x\n", "slide,mpp\na.svs;0.3"):
        with pytest.raises(ValueError, match="m.csv:2: expected slide,mpp"):
            table(text)
    assert data.mpp_table(0.5, ["a"]) == data.mpp_table("0.5", ["a"]) == {"a": 0.5}
    assert data.mpp_table(None, ["a"]) == {"a": None}


def test_a_full_disk_is_one_sentence(tmp_path):
    """No file may grow beyond 40 kB: the same error, at the same place, as a full disk."""
    slides = slides_in(tmp_path / "in", 2)
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))

    args = ("--out", out, "--patch-px", 32, "--fov-px", 32)
    r = cli("tile", slides, *args, before=limit)
    assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith("error: ")
    assert "bags-s0.tar cannot be written (File too large)" in r.stderr
    assert "Traceback" not in r.stderr
    assert not list(out.glob("bags-*")) and not list(out.glob(".bags*"))
    assert data.tile(slides, out, patch_px=32, fov_px=32)["failed"] == 0


# ---------------------------------------------------------------- bags as a dataset


def test_damage_is_named(tmp_path):
    out = tmp_path / "out"
    slides = slides_in(tmp_path / "in", 2)
    data.tile(slides / "s0.svs", out, **SMALL)
    shard = out / "bags-s0.tar"
    whole = shard.read_bytes()
    offset, size = data.Bags(out).meta[2]["jpg"]
    shard.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    bags = data.Bags(out)
    bags[1]
    with pytest.raises(ValueError, match="bags-s0.tar: bag s0-02 is damaged.*tile its slide again"):
        bags[2]
    for keep in (0, 0.3):
        shard.write_bytes(whole[: int(len(whole) * keep)])
        words = "bags-s0.tar is missing or truncated.*tile its slide again"
        with pytest.raises(ValueError, match=words):
            data.Bags(out)
    with pytest.raises(ValueError, match="holds no bags.*data.py tile SLIDES"):
        data.Bags(tmp_path)
    shard.write_bytes(whole)
    data.tile(slides / "s1.svs", tmp_path / "b", patch_px=16, fov_px=32)
    for file in (tmp_path / "b").glob("bags-*"):
        file.rename(out / file.name)
    with pytest.raises(ValueError, match=r"patches of \[8, 16\] pixels"):
        data.Bags(out)


# ---------------------------------------------------------------- pyramid and augmentation


def random_bags(B=4, S=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, 8 * S, 8 * S), generator=g, dtype=torch.uint8)


def test_pyramid_is_the_tree():
    images = random_bags()
    S = 4
    patches = data.pyramid(images)
    assert patches.shape == (4, 85, 3, S, S) and patches.dtype == torch.float32
    for n in range(85):
        # Every patch is the mean of the square it stands for, rounded once.
        x, y, side = data.square(n, 0, 0, 8 * S)
        box = images[:, :, y : y + side, x : x + side].double()
        want = torch.nn.functional.avg_pool2d(box, int(side // S)) / 255
        assert torch.equal(patches[:, n], want.float())
    for n in range(21):
        # Four children, put together and averaged, are their parent.
        a, b, c, d = patches[:, 4 * n + 1 : 4 * n + 5].unbind(1)
        mosaic = torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
        assert torch.allclose(torch.nn.functional.avg_pool2d(mosaic, 2), patches[:, n], atol=1e-6)
    assert (data.pyramid(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)) == 1).all()


FIRST = {1: [0, 3, 15, 63], 2: [0, 3, 4, 15], 3: [0, 1, 3, 4], 4: [0, 1, 2, 3]}


@pytest.mark.parametrize("b, N", [(1, 4), (2, 15), (3, 40), (4, 85)])
def test_sampled_nodes(b, N):
    nodes = data.sample_nodes(50, b, torch.Generator().manual_seed(0))
    assert nodes.shape == (50, N) and nodes.dtype == torch.int64 and (nodes[:, 0] == 0).all()
    j = torch.arange(1, N)
    assert ((nodes[:, 1:] - 1) // 4 == nodes[:, (j - 1) // b]).all()
    assert all(len(set(row)) == N for row in nodes.tolist())
    levels = torch.from_numpy(data.LEVEL)[nodes]
    assert (levels == torch.tensor([0] + [1] * b + [2] * b**2 + [3] * b**3)).all()
    # Batches are functions of (seed, step), so the draws must not change.
    assert nodes[0, :4].tolist() == FIRST[b]
    images = random_bags(50, 2)
    every = data.pyramid(images)
    chosen = every[torch.arange(50)[:, None], nodes]
    assert torch.equal(data.pyramid(images, nodes), chosen)
    assert torch.equal(data.pyramid(images[7:8], nodes[7:8]), chosen[7:8])


def test_flipping_patches_is_flipping_the_bag():
    """A patch of the flipped bag is the flipped patch of the node whose place it takes."""
    images = random_bags(8)
    flips = torch.arange(8)
    whole = data.pyramid(data.flip(images, flips))
    each = data.flip(data.pyramid(images), flips)
    places = list(zip(data.LEVEL.tolist(), data.ROW.tolist(), data.COL.tolist(), strict=True))
    for t in range(8):
        for n, (level, row, col) in enumerate(places):
            last = 2**level - 1
            row, col = (col, row) if t & 4 else (row, col)
            place = (level, last - row if t & 2 else row, last - col if t & 1 else col)
            assert torch.equal(whole[t, places.index(place)], each[t, n])
    one = data.flip(images[:1].expand(8, -1, -1, -1), flips)
    assert len({bytes(x.numpy()) for x in one}) == 8


def test_zoom_by_hand():
    images = random_bags()
    whole = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    assert torch.equal(data.zoom(images, whole), images)
    flat = images.new_zeros(1, 3, 32, 32)
    # The square of half the side, a quarter down and half across.
    flat[..., 8:24, 16:32] = 200
    inner = data.zoom(flat, torch.tensor([[0.5, 0.25, 0.5]]))[..., 1:-1, 1:-1]
    assert (inner == 200).all()
    quarter = data.zoom(images, torch.tensor([[0.5, 0.0, 0.5]]).expand(4, 3)).float()
    box = images[:, :, :16, 16:].float()
    want = torch.nn.functional.interpolate(box, size=(32, 32), mode="bilinear")
    # At its border it may look beyond the square.
    assert (quarter - want).abs()[..., 1:-1, 1:-1].max() <= 0.51


def test_stain_jitter():
    patches = data.pyramid(random_bags())
    rand = torch.rand(len(patches), 2, 3, generator=torch.Generator().manual_seed(1))
    still = data.stain_jitter(patches, 0.0, rand)
    assert torch.allclose(still, patches.clamp(min=1 / 255), atol=1e-4)
    before = patches.clone()
    a = data.stain_jitter(patches, 0.1, rand)
    assert a.shape == patches.shape and 0 <= a.min() and a.max() <= 1
    assert 0.005 < (a - patches).abs().mean() < 0.2 and torch.equal(patches, before)
    # One stain a bag, for all its patches.
    assert torch.allclose(data.stain_jitter(patches[:, 3:5], 0.1, rand), a[:, 3:5], atol=1e-5)
    # A gain keeps the colour of haematoxylin and scales its depth; here the gain is 1.1.
    pure = (-torch.outer(torch.tensor([0.5, 1.0]), data.HED[0])).exp().view(1, 2, 3, 1, 1)
    rand = torch.full((1, 2, 3), 0.5)
    rand[0, 0, 0] = 1.0
    out = -data.stain_jitter(pure, 0.1, rand).log().view(2, 3)
    assert torch.allclose(out, torch.outer(torch.tensor([0.55, 1.1]), data.HED[0]), atol=1e-4)


def make_batch(B=4, b=2):
    g = torch.Generator().manual_seed(2)
    side = 1 - 0.3 * torch.rand(B, 1, generator=g)
    window = torch.cat([side, (1 - side) * torch.rand(B, 2, generator=g)], 1)
    batch = dict(pixels=random_bags(B), nodes=data.sample_nodes(B, b, g), window=window)
    return batch | dict(flips=torch.arange(B) % 8, stain=torch.rand(B, 2, 3, generator=g))


def test_augment_is_its_parts():
    batch = make_batch()
    plain = {k: batch[k] for k in ("pixels", "nodes")}
    patches = data.pyramid(batch["pixels"], batch["nodes"])
    assert torch.equal(data.augment(plain, 0.1), patches)
    cut = data.pyramid(data.zoom(batch["pixels"], batch["window"]), batch["nodes"])
    want = data.stain_jitter(data.flip(cut, batch["flips"]), 0.1, batch["stain"])
    assert torch.equal(data.augment(batch, 0.1), want)
    # Autocast would round the colours to 8 bits.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(data.augment(batch, 0.1), want)


def test_augment_compiles_and_asks_for_no_values():
    torch.compiler.reset()
    batch = make_batch()
    compiled = torch.compile(data.augment, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(batch, 0.1), data.augment(batch, 0.1), atol=1e-5)
    # Fake tensors have shapes and no values: whatever waits for a device fails on them.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in batch.items()}
        assert data.augment(fake, 0.1).shape == (4, 15, 3, 4, 4)


# ---------------------------------------------------------------- real slides


@pytest.mark.skipif(not REAL.is_dir(), reason="no real slides here")
def test_real_slides(tmp_path):
    for path in [p for p in data.find_slides(REAL) if "c" in p.name[:2]]:
        with data.Slide(path, mpp=0.5) as slide:
            W, H = slide.size
            assert slide.read(W // 2 - 100, H // 2 - 100, 200, 100).std() > 2
            mask, _ = data.tissue_mask(slide)
            assert 0.02 < mask.mean() < 0.99
