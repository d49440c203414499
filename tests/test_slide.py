"""Slides of every format are written on the spot. OpenSlide is a second opinion where installed."""

import importlib
import io
import re
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from written import APERIO, IMAGE, SMALL, TILES, half, padded, per_cm, picture, slides_in, write

import data
import prepare.slide
from prepare.slide import Slide, find_slides, read_image, resize, written_scales
from prepare.tile import choose_parents, tile

REAL = Path(__file__).resolve().parents[2] / "shared/data/slides"


# ---------------------------------------------------------------- formats


def check(path, levels, source, tolerance=0, size=(896, 600)):
    """Open a slide of IMAGE; halves read as averages whatever is stored, glass is outside."""
    with Slide(path) as slide:
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
            tif.write(half(IMAGE, k), subfiletype=int(k > 1), **per_cm(40000 / k), **TILES)
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
    xml = f"""<DataObject ObjectType="DPUfsImport"><Attribute><Array><DataObject>
    <Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>
    </DataObject></Array></Attribute></DataObject>"""
    philips = dict(software="Philips DP v1.0", photometric="rgb", metadata=None)
    with tifffile.TiffWriter(tmp_path / "a.tiff") as tif:
        tif.write(padded(IMAGE), description=xml, **TILES | philips)
        for k in (2, 4):
            level = padded(half(padded(IMAGE), k))
            tif.write(level, description=f"level={k}", subfiletype=1, **TILES | philips)
        tif.write(IMAGE[::4, ::4], description="Macro", **philips)
    check(tmp_path / "a.tiff", [1, 2, 4], "Philips DICOM_PIXEL_SPACING", size=(1024, 768))


def write_scn(path, pages):
    """Write Leica's dialect: pages are (picture, mpp, name, or None for a level)."""
    xml = ""
    for i, (image, _, name) in enumerate(pages):
        size = f'sizeX="{image.shape[1]}" sizeY="{image.shape[0]}"'
        xml += f'</pixels></image><image name="{name}"><pixels {size}>' if name else ""
        xml += f'<dimension {size} r="{i}" ifd="{i}"/>'
    xmlns = "http://www.leica-microsystems.com/scn/2010/10/01"
    xml = f'<scn xmlns="{xmlns}"><collection>{xml[17:]}</pixels></image></collection></scn>'
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for i, (image, mpp, _) in enumerate(pages):
            tif.write(image, description=None if i else xml, **per_cm(1e4 / mpp), **TILES)


def test_leica_scn_takes_the_main_image(tmp_path):
    pages = [(IMAGE[:200, :300], 10, "macro"), (IMAGE, 0.25, "main"), (half(IMAGE, 4), 1, None)]
    write_scn(tmp_path / "a.scn", pages)
    check(tmp_path / "a.scn", [1, 4], "TIFF XResolution")


def test_other_regions_are_named(tmp_path):
    """A scanner may put several pieces of tissue into one file, here in three formats."""
    pieces = (IMAGE, IMAGE[:300, :500], IMAGE)
    write_scn(tmp_path / "a.scn", [(image, 0.25, "main") for image in pieces])
    um = dict(metadata=dict(axes="YXS", PhysicalSizeX=0.25))
    for name, options in (("a.ome.tif", um), ("a.tif", per_cm(40000))):
        with tifffile.TiffWriter(tmp_path / name) as tif:
            for image in pieces:
                tif.write(image, **TILES | options)
    for path in tmp_path.iterdir():
        doubt = Slide(path).doubt
        assert doubt.startswith("only 896 x 600 is read, not "), path
        assert "500 x 300" in doubt and doubt.count("896 x 600") == 2, path


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
        more = at + len(jpg)
        out += jpg + struct.pack("<2I10s3H", round(1e7 / mpp), 1000, b"Hamamatsu\0", 8, 8, 8)
        lens = struct.unpack("<I", struct.pack("<f", objective))[0]
        tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, more + 18), (259, 3, 1, 7)]
        tags += [(262, 3, 1, 6), (271, 2, 10, more + 8), (273, 4, 1, at), (277, 3, 1, 3)]
        tags += [(278, 4, 1, h), (279, 4, 1, len(jpg)), (282, 5, 1, more), (283, 5, 1, more)]
        tags += [(296, 3, 1, 3), (65420, 4, 1, 1), (65421, 11, 1, lens)]
        # The first piece begins behind the head, others behind the markers D0 to D7.
        scan = jpg.index(b"\xff\xda")
        starts = [scan + 2 + int.from_bytes(jpg[scan + 2 : scan + 4])]
        starts += [m.end() for m in re.finditer(rb"\xff[\xd0-\xd7]", jpg) if m.end() > starts[0]]
        tags.append((65426, 4, len(starts), len(out)))
        out += struct.pack(f"<{len(starts)}I", *starts)
        out[link : link + 8] = struct.pack("<Q", len(out))
        out += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        link = len(out)
        out += bytes(8 + 4 * len(tags))
    Path(path).write_bytes(out)


def test_hamamatsu_ndpi(tmp_path):
    levels = [(IMAGE, 0.25, 40.0), (half(IMAGE, 4), 1.0, 10.0), (IMAGE[:300, :200], 30.0, -1.0)]
    write_ndpi(tmp_path / "a.ndpi", levels)
    check(tmp_path / "a.ndpi", [1, 4], "TIFF XResolution", tolerance=12)
    assert Slide(tmp_path / "a.ndpi").tile == (224, 8)


def jpeg_2000(planes):
    """Encode planes of one or of several sizes without loss, and without a change of colours."""
    parts = []
    for plane in planes:
        options = dict(level=0, codecformat="J2K", mct=False, resolutions=1)
        code = imagecodecs.jpeg2k_encode(np.ascontiguousarray(plane), **options)
        parts.append(code.partition(b"\xff\x93"))
    (h, w), n = planes[0].shape, len(planes)
    # Put the packets behind each other, below one head that knows the sizes.
    size = struct.pack(">2sHH8IH", b"\xff\x51", 38 + 3 * n, 0, w, h, 0, 0, w, h, 0, 0, n)
    for plane in planes:
        size += bytes([7, w // plane.shape[1], h // plane.shape[0]])
    head = parts[0][0]
    body = b"".join(code[:-2] for _, _, code in parts)
    tile = struct.pack(">2sHHIBB", b"\xff\x90", 10, 0, 14 + len(body), 0, 1)
    coding = head[head.index(b"\xff\x52") : head.index(b"\xff\x64")]
    return b"\xff\x4f" + size + coding + tile + b"\xff\x93" + body + b"\xff\xd9"


def write_tiles(path, tiles, shape, kind, photometric):
    """Write encoded tiles as an SVS that says photometric of them."""
    options = TILES | dict(compression=kind, description=APERIO + "0.25")
    with tifffile.TiffWriter(path) as tif:
        tif.write(iter(tiles), shape=shape, dtype=np.uint8, **options)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["PhotometricInterpretation"].overwrite(photometric)
    return path


def ycbcr(image):
    r, g, b = np.moveaxis(image.astype(float), 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycc = (y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402)
    return [plane.round().clip(0, 255).astype(np.uint8) for plane in ycc]


@pytest.mark.parametrize("kind, photometric, down, across", [
    (33003, 2, 1, 1), (33003, 2, 1, 2), (33003, 6, 2, 2), (33005, 2, 1, 1), (34712, 6, 1, 1),
    (34712, 6, 1, 2), (34712, 2, 1, 1)])  # fmt: skip
def test_jpeg_2000_colours(tmp_path, kind, photometric, down, across):
    """Kind 33003 stores Y, Cb, Cr, whatever the TIFF says; colours may be coarser than Y."""
    whole = padded(IMAGE)
    rgb = photometric == 2 and kind != 33003
    planes = np.moveaxis(whole, 2, 0) if rgb else ycbcr(whole)
    tiles = []
    for top, left in np.ndindex(len(whole) // 256, whole.shape[1] // 256):
        y, b, r = (plane[256 * top :, 256 * left :][:256, :256] for plane in planes)
        tiles.append(jpeg_2000([y, b[::down, ::across], r[::down, ::across]]))
    path = write_tiles(tmp_path / "a.svs", tiles, IMAGE.shape, kind, photometric)
    check(path, [1], "Aperio MPP", 0 if rgb else 3)
    if kind != 34712:
        peer = pytest.importorskip("openslide").OpenSlide(path)
        peer = np.asarray(peer.read_region((0, 0), 0, (512, 512)))[..., :3].astype(int)
        assert abs(Slide(path).read(0, 0, 512, 512) - peer).max() <= 1


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
            Slide(tmp_path / name, 0.25)
        assert "\n" not in str(e.value)
    # The slides that a folder cannot read are refused aloud, not passed over.
    assert len(find_slides(tmp_path)) == 5


def test_training_needs_no_codecs(tmp_path, monkeypatch):
    """Without tifffile and imagecodecs, data is imported and bags are read with Pillow."""
    tile(slides_in(tmp_path / "in", 1), tmp_path / "out", **SMALL)
    image = data.Bags(tmp_path / "out")[1]["image"]
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "data")
    bare = importlib.import_module("data")
    assert bare is not data and torch.equal(bare.Bags(tmp_path / "out")[1]["image"], image)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ValueError, match="s0.svs: .*imagecodecs"):
        Slide(tmp_path / "in" / "s0.svs")


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
            Slide(tmp_path / name, mpp=0.25)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- scale


def test_where_mpp_comes_from(tmp_path):
    def found(name, **options):
        slide = Slide(write(tmp_path / name, picture(64, 64), **options))
        return round(slide.mpp, 4), slide.mpp_source

    assert found("a.svs", mpp=0.499) == (0.499, "Aperio MPP")
    cm = per_cm(40000) | dict(text="")
    inch = dict(text="", resolution=(50800, 50800), resolutionunit="INCH")
    assert found("b.tif", **cm) == (0.25, "TIFF XResolution")
    assert found("c.tif", **inch) == (0.5, "TIFF XResolution")
    printer = dict(text="", resolution=(72, 72), resolutionunit="INCH")
    bare = dict(text="Aperio x")
    app = dict(text="Aperio x|AppMag = 20")
    for options, hint in ((bare, "0.25"), (app, "suggests 0.5"), (printer, "--mpp")):
        with pytest.raises(ValueError, match=f"d.svs .64 x 64 pix.*--mpp .*{hint}|pass {hint}"):
            Slide(write(tmp_path / "d.svs", picture(64, 64), **options))
    assert Slide(tmp_path / "d.svs", mpp=0.3).mpp == 0.3
    for mpp in (0.05, 3, 40):
        with pytest.raises(ValueError, match=f"d.svs: {mpp:g} um/px .--mpp. is not within 0.1-2.4"):
            Slide(tmp_path / "d.svs", mpp=mpp)
    mags = [Slide(tmp_path / "d.svs", mpp=mpp).mags for mpp in (0.12, 0.25, 0.5, 1.0, 2.0)]
    assert mags == [data.MAGS, data.MAGS, (5, 10, 20), (5, 10), (5,)]
    # A slide of 80x is reduced; its objective of 40x puts that in doubt.
    with Slide(write(tmp_path / "e.svs", picture(1024, 1024), mpp=0.125)) as slide:
        assert slide.mags == data.MAGS and choose_parents(slide, fov_px=64)[0][2] == 1024
        assert slide.doubt == "0.125 um/px (Aperio MPP) contradicts 0.25 (AppMag 40)"
    assert Slide(write(tmp_path / "f.svs", picture(64, 64), mpp=0.26)).doubt == ""


@pytest.mark.parametrize("text", [
    "Aperio x|MPP = 2.5e-01", "Aperio x|MPP = 0,2500|A = 1", '<Pixels PhysicalSizeX="0,25"/>',
    '<Pixels PhysicalSizeX="250" PhysicalSizeY="250" PhysicalSizeXUnit="nm"/>',
    '<OME:Pixels PhysicalSizeXUnit="mm" PhysicalSizeX="2.5e-4"/>',
    '<Pixels PhysicalSizeX=".25" PhysicalSizeXUnit="&#181;m"/>',
    '<Pixels PhysicalSizeX=".2" SizeX="9"/><Pixels SizeX="64" SizeY="64" PhysicalSizeX=".25"/>',
])  # fmt: skip
def test_numbers_are_read_as_they_are_meant(tmp_path, text):
    slide = Slide(write(tmp_path / "a.tif", picture(64, 64), text=text))
    assert slide.mpp == pytest.approx(0.25) and slide.doubt == ""


def test_a_long_description_takes_no_time():
    start = time.process_time()
    for text in ("<Pixels ", 'DICOM_PIXEL_SPACING" ', "MPP  "):
        written_scales(text * 40_000, (9, 9))
    assert time.process_time() - start < 2


def test_a_given_scale_wins_and_the_rest_is_told(tmp_path):
    ome = '<Pixels PhysicalSizeX="0.25" PhysicalSize'
    cm = per_cm(40000, 20000) | dict(text="")
    uneven = "its pixels are not square: 0.25 x 0.5 .%s.$"
    for options, doubt in (
        (dict(text=ome + 'Y="0.5"/>'), uneven % "OME PhysicalSizeX"),
        (cm, uneven % "TIFF XResolution"),
        (dict(text="Aperio x|MPP = none"), "this is no scale: Aperio MPP none um$"),
        (dict(text=ome + 'XUnit="pixel"/>'), "this is no scale: OME PhysicalSizeX 0.25 pixel$"),
    ):
        path = write(tmp_path / "a.tif", picture(64, 64), **options)
        given = Slide(path, mpp=0.24)
        assert given.mpp == 0.24 and re.search(doubt, given.doubt)
        if "square" in doubt:
            assert re.search(doubt, Slide(path).doubt)
            continue
        with pytest.raises(ValueError, match="0.5 is 20x; it says (Aper|OME Ph)"):
            Slide(path)


def test_a_level_is_not_a_magnification(tmp_path):
    """Of levels 1, 4, 16, 5x and 10x come from level 1, 20x and 40x from level 0."""
    image = np.zeros((1024, 1024, 3), np.uint8)
    # Red tells the column.
    image[..., 0] = np.arange(1024)[None] // 4
    with Slide(write(tmp_path / "a.svs", image, downs=(4, 16))) as slide:
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
    with Slide(write(tmp_path / "a.svs", image, downs=(4,), **options)) as slide:
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


ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


@pytest.mark.parametrize("colours, photometric, marker", [
    ("rgb", 2, b""), ("rgb", 2, ADOBE + b"\0"), ("ycbcr", 6, b""), ("ycbcr", 2, JFIF),
    ("ycbcr", 2, ADOBE + b"\1"), ("422", 2, b"")], ids=range(6))  # fmt: skip
def test_jpeg_colours(tmp_path, colours, photometric, marker):
    """What the JPEG itself says of its colours counts more than what the TIFF says."""
    image = np.full((256, 256, 3), (200, 90, 160), np.uint8)
    kind = dict(outcolorspace="rgb") if colours == "rgb" else {}
    sampling = "422" if colours == "422" else "444"
    jpg = imagecodecs.jpeg8_encode(image, 95, subsampling=sampling, **kind)
    # Change its marker.
    jpg = jpg[:2] + marker + jpg[jpg.index(b"\xff\xdb") :]
    with Slide(write_tiles(tmp_path / "a.svs", [jpg], image.shape, 7, photometric)) as slide:
        assert abs(slide.read(0, 0, 256, 256).astype(int) - image).max() <= 4


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000", "lzw"])
def test_damage_that_still_decodes_is_named(tmp_path, kind):
    path = write(tmp_path / "a.svs", picture(512, 512), compression=kind)
    with tifffile.TiffFile(path) as tif:
        n = tif.pages[0].databytecounts[2]
        middle = tif.pages[0].dataoffsets[2] + n // 2
    whole = path.read_bytes()
    for zeros in (200, n // 2):
        path.write_bytes(whole[:middle] + bytes(zeros) + whole[middle + zeros :])
        with Slide(path) as slide:
            slide.read(0, 0, 256, 256)
            with pytest.raises(ValueError, match="a.svs is damaged"):
                slide.read(0, 256, 256, 256)


def test_a_jpeg_may_lack_its_end_or_be_all_zeros(tmp_path):
    """Where white is the most frequent colour, the shortest code, of zeros, stands for it."""
    image = picture(256, 256)
    image[:248] = 255
    jpg = imagecodecs.jpeg8_encode(image, 90, optimize=True)
    assert bytes(64) in jpg
    cut = jpg[: len(jpg) * 3 // 4]
    with Slide(write_tiles(tmp_path / "a.svs", [jpg], image.shape, 7, 6)) as slide:
        assert (slide.read(0, 0, 192, 192) == 255).all()
    with Slide(write_tiles(tmp_path / "b.svs", [cut], image.shape, 7, 6)) as slide:
        with pytest.raises(ValueError, match="b.svs is damaged .*tile 0 ends early"):
            slide.read(0, 0, 192, 192)


def test_transparent_is_white(tmp_path):
    """Around tissue, many programs leave pixels that are 0 0 0 0."""
    image = np.dstack([picture(512, 512), np.full((512, 512), 255, np.uint8)])
    image[:, 256:] = 0
    image[0, 0] = (100, 50, 0, 128)
    for kind, corner in (("unassalpha", (177, 152, 127)), ("assocalpha", (227, 177, 127))):
        options = dict(extrasamples=[kind], text=APERIO + "0.25")
        with Slide(write(tmp_path / f"{kind}.svs", image, **options)) as slide:
            read = slide.read(0, 0, 512, 512)
            assert (read[:, 256:] == 255).all() and (read[1:, :256] == image[1:, :256, :3]).all()
            assert abs(read[0, 0].astype(int) - corner).max() <= 1
    for mode in ("RGBA", "LA"):
        Image.fromarray(image).convert(mode).save(tmp_path / f"{mode}.png")
        read = np.asarray(read_image(tmp_path / f"{mode}.png"))
        assert read.shape == (512, 512, 3) and (read[:, 256:] == 255).all(), mode


def test_a_tile_that_was_never_stored_is_white(tmp_path):
    path = write(tmp_path / "a.svs", IMAGE)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        counts = tif.pages[0].tags["TileByteCounts"]
        counts.overwrite([0] + list(counts.value[1:]))
    with Slide(path) as slide:
        both = slide.read(0, 0, 512, 512)
        assert (both[:256, :256] == 255).all() and (both[256:] == IMAGE[256:512, :512]).all()


def test_threads_may_share_a_slide(tmp_path):
    path = write(tmp_path / "a.svs", IMAGE, tile=(112, 112))
    spots = np.random.default_rng(0).integers(0, 500, (1500, 2)).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Slide(path, threads=1) as slide, ThreadPoolExecutor(6) as pool:

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
    assert (resize(a, 2)[0, 0] == [8, 9, 10]).all()
    assert (resize(resize(a, 12), 4) == a).all()
    flat = resize(np.full((50, 50, 3), 77, np.uint8), 21)
    assert flat.shape == (21, 21, 3) and (flat == 77).all()
    rng = np.random.default_rng(0)
    # Beyond 16 x 16 pixels a sum needs more than 16 bits.
    for k, out in ((2, 70), (3, 40), (7, 33), (16, 5), (17, 5), (20, 2)):
        a = rng.integers(0, 256, (k * out, k * out, 3)).astype(np.uint8)
        sums = a.reshape(out, k, out, k, 3).astype(int).sum((1, 3))
        assert (resize(a, out) == (sums + k * k // 2) // (k * k)).all()


def test_openslide_and_tifffile_read_the_same(tmp_path, monkeypatch):
    """Compare the two readers of a Slide on files that both can read, pixel by pixel."""
    openslide = pytest.importorskip("openslide")
    jpeg = dict(compression="jpeg", compressionargs=dict(level=85))
    path = write(tmp_path / "a.svs", picture(1000, 900), (4,), (240, 240), **jpeg)
    paths = [path, *sorted(REAL.glob("cmu-1*.svs"))]
    for path in paths:
        with Slide(path) as slide, monkeypatch.context() as patch:
            patch.setattr(prepare.slide, "_Tiff", lambda path: 1 / 0)
            with Slide(path) as peer:
                assert isinstance(peer.source.file, openslide.OpenSlide)
                assert peer.size == slide.size and peer.levels == slide.levels
                assert peer.mpp == slide.mpp and peer.tile == slide.tile and not peer.doubt
                squares = [(1, 3, 512, 512), (-40, 700, 400, 400), (64, 64, 512, 128)]
                squares += [(68, 132, 512, 64), (0, 0, 900, 450)]
                for square in squares:
                    assert (peer.read(*square) == slide.read(*square)).all(), (path, square)
    path = write(tmp_path / "b.tif", picture(512, 512), text="", **per_cm(40000, 20000))
    monkeypatch.setattr(prepare.slide, "_Tiff", lambda path: 1 / 0)
    assert Slide(path).doubt == "its pixels are not square: 0.25 x 0.5 (OpenSlide mpp-x)"
