"""python -m pytest tests/test_slide.py -q        (one file per format, written on the spot; OpenSlide is a second opinion where it is installed)"""
import io
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from test_data import picture, write

IMAGE = picture(600, 896)


def half(image, k):
    """Averages of k x k pixels."""
    image = image[:len(image) // k * k, :image.shape[1] // k * k].astype(float)
    return image.reshape(len(image) // k, k, -1, k, 3).mean((1, 3)).round().astype(np.uint8)


def padded(image, tile=256):
    return np.pad(image, ((0, -len(image) % tile), (0, -image.shape[1] % tile), (0, 0)), constant_values=255)


def check(path, levels, source, tolerance=0, mpp=None, size=(896, 600)):
    """Opens `path`; its pixels are IMAGE at level 0, halves read as the averages whatever is stored, glass is outside."""
    with data.Slide(path, mpp) as slide:
        assert slide.size == size and [d for d, _ in slide.levels] == levels and slide.mpp_source == source
        assert slide.mpp == pytest.approx(0.25) and slide.mags == data.MAGS and not slide.doubt
        assert abs(slide.read(3, 5, 300, 300).astype(int) - IMAGE[5:305, 3:303]).max() <= tolerance
        assert abs(slide.read(8, 16, 512, 256).astype(int) - half(IMAGE[16:528, 8:520], 2)).max() <= tolerance + 1
        assert abs(slide.read(0, 0, 512, 64).astype(int) - half(IMAGE[:512, :512], 8)).max() <= tolerance + 1
        assert (slide.read(size[0], 0, 64, 64) == 255).all()
        return slide


# ---------------------------------------------------------------- formats

TILES = dict(photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_generic_pyramidal_tiff(tmp_path, bigtiff):
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=bigtiff) as tif:
        for k in (1, 2, 4, 8):
            tif.write(half(IMAGE, k), resolution=(40000 / k, 40000 / k), resolutionunit="CENTIMETER", subfiletype=int(k > 1), **TILES)
    check(tmp_path / "a.tif", [1, 2, 4, 8], "TIFF XResolution")


def test_ome_tiff_with_subifds(tmp_path):
    um = dict(axes="YXS", PhysicalSizeX=250, PhysicalSizeXUnit="nm", PhysicalSizeY=250, PhysicalSizeYUnit="nm")
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", bigtiff=True) as tif:
        tif.write(IMAGE[:64, :64], photometric="rgb", metadata=dict(axes="YXS", Name="macro", PhysicalSizeX=1.9, PhysicalSizeXUnit="\u00b5m"))
        tif.write(IMAGE, subifds=2, **dict(TILES, metadata=um))
        for k in (2, 4):
            tif.write(half(IMAGE, k), subfiletype=1, **TILES)
        tif.write(IMAGE[:300, :200], photometric="rgb", metadata=dict(axes="YXS", Name="label"))
    check(tmp_path / "a.ome.tif", [1, 2, 4], "OME PhysicalSizeX")


def test_philips_tiff(tmp_path):
    """Levels are padded to whole tiles and say so only in the XML, which is also where the microns are."""
    one = '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">&quot;{0}&quot; &quot;{0}&quot;</Attribute></DataObject>'
    xml = ('<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject '
           'ObjectType="DPScannedImage"><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>' + "".join(one.format(0.00025 * k) for k in (1, 2, 4))
           + "</Array></Attribute></DataObject></Array></Attribute></DataObject>")
    options = dict(TILES, software="Philips DP v1.0")
    with tifffile.TiffWriter(tmp_path / "a.tiff") as tif:
        tif.write(padded(IMAGE), description=xml, **options)
        for k in (2, 4):
            tif.write(padded(half(padded(IMAGE), k)), description=f"level={k}", subfiletype=1, **options)
        tif.write(IMAGE[::4, ::4], photometric="rgb", description="Macro", metadata=None, software="Philips DP v1.0")
    check(tmp_path / "a.tiff", [1, 2, 4], "Philips DICOM_PIXEL_SPACING", size=(1024, 768))


def test_leica_scn_takes_the_main_image(tmp_path):
    def pixels(name, *levels):
        rows = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{ifd}"/>' for r, (w, h, ifd) in enumerate(levels))
        return f'<image name="{name}"><pixels sizeX="{levels[0][0]}" sizeY="{levels[0][1]}">{rows}</pixels></image>'
    xml = ('<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c">'
           + pixels("macro", (300, 200, 0)) + pixels("main", (896, 600, 1), (224, 150, 2)) + "</collection></scn>")
    with tifffile.TiffWriter(tmp_path / "a.scn", bigtiff=True) as tif:
        for image, mpp, text in ((IMAGE[:200, :300], 10, xml), (IMAGE, 0.25, None), (half(IMAGE, 4), 1, None)):
            tif.write(image, description=text, resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER", **TILES)
    check(tmp_path / "a.scn", [1, 4], "TIFF XResolution")


def write_ndpi(path, pictures, restart=0):
    """Hamamatsu's dialect: 64-bit offsets in a 32-bit TIFF, each level one JPEG; with `restart` MCUs between its markers, whose
    positions a tag lists, so that pieces can be decoded alone. pictures: (image, microns per pixel, objective)."""
    out, link = bytearray(b"II*\0" + bytes(8)), 4
    for image, mpp, objective in pictures:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0, **(dict(restart_marker_blocks=restart) if restart else {}))
        jpg, (h, w), at = buffer.getvalue(), image.shape[:2], len(out)
        out += jpg
        resolution = len(out)
        out += struct.pack("<2I", round(1e7 / mpp), 1000) + b"Hamamatsu\0" + struct.pack("<3H", 8, 8, 8)
        tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, resolution + 18), (259, 3, 1, 7), (262, 3, 1, 6), (271, 2, 10, resolution + 8), (273, 4, 1, at),
                (277, 3, 1, 3), (278, 4, 1, h), (279, 4, 1, len(jpg)), (282, 5, 1, resolution), (283, 5, 1, resolution), (296, 3, 1, 3), (65420, 4, 1, 1),
                (65421, 11, 1, struct.unpack("<I", struct.pack("<f", objective))[0])]
        if restart:
            scan = jpg.index(b"\xff\xda")
            first = scan + 2 + struct.unpack(">H", jpg[scan + 2:scan + 4])[0]
            starts = [first] + [i + 2 for i in range(first, len(jpg) - 1) if jpg[i] == 0xff and 0xd0 <= jpg[i + 1] <= 0xd7]
            tags.append((65426, 4, len(starts), len(out)))
            out += struct.pack(f"<{len(starts)}I", *starts)
        out[link:link + 8] = struct.pack("<Q", len(out))
        out += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        link = len(out)
        out += bytes(8 + 4 * len(tags))
    Path(path).write_bytes(out)


@pytest.mark.parametrize("restart, tile", [(0, (896, 600)), (28, (224, 8))])
def test_hamamatsu_ndpi(tmp_path, restart, tile):
    write_ndpi(tmp_path / "a.ndpi", [(IMAGE, 0.25, 40.0), (half(IMAGE, 4), 1.0, 10.0), (IMAGE[:300, :200], 30.0, -1.0)], restart)
    slide = check(tmp_path / "a.ndpi", [1, 4], "TIFF XResolution", tolerance=12)
    assert (slide.pages[0].tw, slide.pages[0].th) == tile


def test_aperio_jpeg_2000(tmp_path):
    """Kind 33003 stores luminance and chrominance and 33005 colours; neither says so in its tiles."""
    def ycc(a):
        r, g, b = (a[..., i].astype(float) for i in range(3))
        y = 0.299 * r + 0.587 * g + 0.114 * b
        return np.clip(np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1).round(), 0, 255).astype(np.uint8)
    whole = padded(IMAGE)
    for kind, stored, tolerance in ((33003, ycc(whole), 2), (33005, whole, 0)):
        tiles = [imagecodecs.jpeg2k_encode(np.ascontiguousarray(stored[y:y + 256, x:x + 256]), level=0, codecformat="J2K", mct=False)
                 for y in range(0, len(whole), 256) for x in range(0, whole.shape[1], 256)]
        with tifffile.TiffWriter(tmp_path / f"{kind}.svs") as tif:
            tif.write(iter(tiles), shape=IMAGE.shape, dtype=np.uint8, description="Aperio Image Library v12|AppMag = 40|MPP = 0.25",
                      **dict(TILES, compression=kind))
        check(tmp_path / f"{kind}.svs", [1], "Aperio MPP", tolerance)


def write_dzi(folder, image, tile=254, overlap=1, kind="png"):
    """NAME.dzi and its tiles, each with `overlap` pixels of its inner neighbours."""
    (h, w), top = image.shape[:2], int(np.ceil(np.log2(max(image.shape))))
    (folder / "a.dzi").write_text(f'<?xml version="1.0"?><Image xmlns="http://schemas.microsoft.com/deepzoom/2008" TileSize="{tile}" Overlap="{overlap}" '
                                  f'Format="{kind}"><Size Width="{w}" Height="{h}"/></Image>')
    for down in range(top + 1):
        small, at = half(image, 2 ** down) if down < 9 else image[:1, :1], folder / "a_files" / str(top - down)
        at.mkdir(parents=True)
        for r in range(0, len(small), tile):
            for c in range(0, small.shape[1], tile):
                part = small[max(0, r - overlap):r + tile + overlap, max(0, c - overlap):c + tile + overlap]
                Image.fromarray(part).save(at / f"{c // tile}_{r // tile}.{kind}")


def test_deep_zoom(tmp_path):
    write_dzi(tmp_path, IMAGE)
    check(tmp_path / "a.dzi", [1, 2], "--mpp", mpp=0.25)          # the rest would fit into one tile
    with pytest.raises(ValueError, match="a.dzi does not say its microns per pixel: pass --mpp"):
        data.Slide(tmp_path / "a.dzi")
    Image.fromarray(IMAGE[:40, :40]).save(tmp_path / "a_files" / "10" / "0_0.png")
    with data.Slide(tmp_path / "a.dzi", 0.25) as slide, pytest.raises(ValueError, match="a.dzi: tile 0 .*it is of .40, 40. pixels, not .254, 254."):
        slide.read(0, 0, 100, 100)
    (tmp_path / "b.dzi").write_text('<Image TileSize="254"><Size Width="10" Height="10"/></Image>')
    with pytest.raises(ValueError, match="b.dzi.*its XML names no Size or no Format"):
        data.Slide(tmp_path / "b.dzi", 0.25)
    (tmp_path / "a_files" / "10" / "1_1.png").unlink()
    with data.Slide(tmp_path / "a.dzi", 0.25) as slide, pytest.raises(ValueError, match="tile 5 of its 896 x 600 level.*1_1.png"):
        slide.read(260, 260, 200, 200)


def test_flat_pictures(tmp_path, monkeypatch):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    Image.fromarray(IMAGE).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    check(tmp_path / "a.png", [1], "--mpp", mpp=0.25)
    check(tmp_path / "a.jpg", [1], "--mpp", tolerance=12, mpp=0.25)
    assert len(data.find_slides(tmp_path)) == 2
    write(tmp_path / "b.svs", IMAGE)                      # beside a slide they are its thumbnails
    assert [p.name for p in data.find_slides(tmp_path)] == ["b.svs"]
    monkeypatch.setattr("slide.FLAT_LIMIT", 1000)
    with pytest.raises(ValueError, match="a picture of 896 x 600 pixels without tiles.*convert"):
        data.Slide(tmp_path / "a.png", 0.25)


def test_what_is_not_supported_says_so_by_name(tmp_path):
    for suffix, name in ((".mrxs", "3DHISTECH MIRAX"), (".czi", "Zeiss CZI"), (".bif", "Ventana BIF")):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
        with pytest.raises(ValueError, match=f"a{suffix}.*not supported .{name}.*pyramidal TIFF"):
            data.Slide(tmp_path / f"a{suffix}", 0.25)
    assert len(data.find_slides(tmp_path)) == 3           # a folder's foreign slides are refused aloud, not passed over
    for name, image in (("SEPARATED", IMAGE[..., [0, 1, 2, 2]]), ("CIELAB", IMAGE), ("YCBCR", IMAGE)):
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric=name, compression="deflate")
        with pytest.raises(ValueError, match=f"{name}.tif.*colours as {name} in .*DEFLATE"):
            data.Slide(tmp_path / f"{name}.tif", 0.25)
    Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png.*more than 8 bits"):
        data.Slide(tmp_path / "deep.png", 0.25)
    tifffile.imwrite(tmp_path / "planes.tif", IMAGE.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match="in separate planes"):
        data.Slide(tmp_path / "planes.tif", 0.25)


# ---------------------------------------------------------------- which pixels

@pytest.mark.parametrize("downs, tile", [((), 256), ((4,), 256), ((2, 4, 8), 256), ((4, 16), 240), ((2, 4), 512), ((2, 4, 8), 112)])
def test_every_pyramid_gives_the_same_picture(tmp_path, downs, tile):
    """Levels are exact averages here, so which one is read must not matter; nor do tiles that cross the edge."""
    image = picture(880, 1104, seed=3)
    with data.Slide(write(tmp_path / "a.svs", image, downs, (tile, tile))) as slide:
        for side, out in ((256, 256), (256, 128), (256, 64), (256, 32), (512, 192)):
            got = slide.read(32, 48, side, out).astype(int)
            want = half(image[48:48 + side, 32:32 + side], side // out) if side % out == 0 else got
            assert abs(got - want).max() <= 1
            assert abs(got.mean() - image[48:48 + side, 32:32 + side].mean()) < 1


def test_squares_anywhere(tmp_path):
    rng, wide = np.random.default_rng(0), np.pad(IMAGE, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    with data.Slide(write(tmp_path / "a.svs", IMAGE, tile=(112, 112))) as slide:
        for x, y, side in [(0, 650, 64), (1000, 10, 64), (-200, -200, 100)] + rng.integers((-300, -300, 1), (1200, 900, 90), (60, 3)).tolist():
            assert (slide.read(x, y, side, side) == wide[y + 400:y + 400 + side, x + 400:x + 400 + side]).all()


def test_threads_may_share_a_slide(tmp_path):
    with data.Slide(write(tmp_path / "a.svs", IMAGE, tile=(112, 112)), threads=1) as slide, ThreadPoolExecutor(6) as pool:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            spots = np.random.default_rng(0).integers(0, 500, (3000, 2)).tolist()
            right = pool.map(lambda s: (slide.read(*s, 24, 24) == IMAGE[s[1]:s[1] + 24, s[0]:s[0] + 24]).all(), spots)
            assert all(right)
        finally:
            sys.setswitchinterval(interval)


def test_tiles_are_decoded_once(tmp_path):
    """Of a read, and of neighbouring parents that cut the same tiles; with a small `keep` the latter are decoded again."""
    path = write(tmp_path / "a.svs", picture(960, 960), tile=(240, 240))
    for keep, again in ((2 ** 27, 0), (0, 1)):
        for threads in (1, 3):
            with data.Slide(path, threads=threads, keep=keep) as slide:
                page, calls = slide.pages[0], []
                decode, page.decode = page.decode, lambda b, k: calls.append(k) or decode(b, k)
                left = slide.read(0, 0, 512, 512)
                assert sorted(calls) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
                slide.read(512, 0, 448, 448)              # shares column 2, of which 0-2 are cut
                assert sorted(calls[9:]) == ([2, 3, 6, 7] if keep == 0 else [3, 7]) or again
                assert (left == picture(960, 960)[:512, :512]).all()


def test_a_picture_is_not_overwritten_while_it_is_held(tmp_path):
    image = picture(512, 1024)
    with data.Slide(write(tmp_path / "a.svs", image)) as slide:
        left = slide.read(0, 0, 512, 512)
        view = slide.read(512, 0, 512, 512)[100:]
        slide.read(256, 0, 512, 512)
        assert (left == image[:, :512]).all() and (view == image[100:, 512:]).all()
        del view
        at = slide.read(0, 0, 512, 512).ctypes.data       # one that is dropped is painted over: fresh memory is dear
        again = slide.read(0, 0, 512, 512).ctypes.data
        assert at == again != left.ctypes.data


def test_80x_is_reduced_and_scale_in_doubt_is_told(tmp_path):
    with data.Slide(write(tmp_path / "a.svs", picture(1024, 1024), mpp=0.125)) as slide:
        assert slide.mags == data.MAGS and data.choose_parents(slide, fov_px=64)[0][2] == 1024
        assert "0.125 um/px (Aperio MPP) contradicts 0.25 (AppMag 40)" in slide.doubt
    assert data.Slide(write(tmp_path / "b.svs", picture(64, 64), mpp=0.26)).doubt == ""
    for mpp in (0.05, 3):
        with pytest.raises(ValueError, match=f"b.svs: {mpp:g} um/px .--mpp. is not within 0.1-2.4"):
            data.Slide(tmp_path / "b.svs", mpp)


# ---------------------------------------------------------------- tissue

def tissue_of(tmp_path, image):
    with data.Slide(write(tmp_path / "t.svs", image)) as slide:
        return data.tissue_mask(slide, um=4)[0]


def test_tissue_on_awkward_slides(tmp_path):
    glass = np.full((512, 512, 3), 243, np.uint8)
    tissue = picture(512, 512)

    def on(part, left=glass):                             # the right half shows `part`
        image = left.copy()
        image[:, 256:] = np.broadcast_to(part, image.shape)[:, 256:]
        return image
    cases = {"pale": on(np.uint8([238, 220, 232])), "dark": (on(tissue) * 0.5).astype(np.uint8), "grey filling": on(tissue, np.full_like(glass, 200)),
             "black filling": on(tissue, np.zeros_like(glass))}
    for pen, colour in dict(black=(30, 30, 35), blue=(45, 70, 160), green=(30, 110, 80), red=(200, 45, 65)).items():
        cases[f"{pen} pen"] = on(tissue, np.broadcast_to(np.uint8(colour), glass.shape).copy())
    for name, image in cases.items():
        mask = tissue_of(tmp_path, image)
        assert mask[:, 17:].mean() > 0.98 and mask[:, :15].mean() < 0.02, name
    tiny = glass.copy()
    tiny[200:264, 300:364] = tissue[:64, :64]             # 16 um of tissue
    assert 16 <= tissue_of(tmp_path, tiny).sum() <= 25


def test_the_grid_moves_to_a_small_piece_of_tissue(tmp_path):
    """A piece as large as one parent, across the corner of four: the centred grid would have a quarter of it in each."""
    image = np.full((768, 768, 3), 243, np.uint8)
    image[384:640, 128:384] = picture(256, 256)
    with data.Slide(write(tmp_path / "a.svs", image, tile=(128, 128))) as slide:
        (x, y, side, tissue), = data.choose_parents(slide, fov_px=32, min_tissue=0.9)
        assert (x, y, side) == (128, 384, 256) and tissue[0] > 0.95
    Image.fromarray(image).save(tmp_path / "a.png")       # also where the whole slide is one tile
    with data.Slide(tmp_path / "a.png", 0.25) as slide:
        assert [b[:3] for b in data.choose_parents(slide, fov_px=32, min_tissue=0.9)] == [(128, 384, 256)]


# ---------------------------------------------------------------- a second opinion

def test_openslide_sees_the_same(tmp_path):
    openslide = pytest.importorskip("openslide")
    paths = [write(tmp_path / "a.svs", picture(1000, 900), (4,), (240, 240), compression="jpeg", compressionargs=dict(level=85))]
    paths += data.find_slides(os.environ["NANOMRPLIP_SLIDES"]) if "NANOMRPLIP_SLIDES" in os.environ else []
    for path in paths:
        peer = openslide.OpenSlide(path)
        with data.Slide(path, mpp=0.25) as slide:
            side = min(*slide.size, 2048) // 8 * 8
            x, y = ((n - side) // 2 + 1 for n in slide.size)
            bag = slide.read(x, y, side, side)
            want = np.asarray(peer.read_region((x, y), 0, (side, side)).convert("RGB"))
            assert abs(bag.astype(int) - want).max() <= (2 if "JP2000" in slide.pages[0].kind else 0)
            patches = data.pyramid(torch.from_numpy(bag.copy()).permute(2, 0, 1)[None])[0] * 255
            for n in (0, 3, 4, 11, 20):                   # 5x, 10x and 20x nodes are averages of what OpenSlide reads at 40x
                u, v, s = data.square(n, 0, 0, side)
                box = want[v:v + s, u:u + s].astype(float).reshape(side // 8, s * 8 // side, side // 8, -1, 3).mean((1, 3))
                assert abs(patches[n].permute(1, 2, 0).numpy() - box).max() < 0.01 + (2 if "JP2000" in slide.pages[0].kind else 0)
