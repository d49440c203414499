"""Slide files: reading any square of a whole slide image by microns; where there is tissue; which squares make a bag.

Magnification means microns per pixel, mpp = 10 / magnification; a level's index never stands for one. A square is read from the
coarsest stored level that is fine enough, every stored tile decoded once, then reduced to the size asked for. Coordinates x, y,
side are level-0 pixels. data.py makes bags of what this file reads; `from data import Slide` works too.

Outline: the formats (each becomes a list of Pages) | Slide | resize, thumbnail | tissue | the tree of 85 nodes | which parents | preview, inspect
"""
import io, itertools, logging, math, os, re, sys, threading, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from xml.etree import ElementTree

import imagecodecs, numpy as np, tifffile, torch
from PIL import Image, ImageDraw, ImageFilter

MAGS = (5, 10, 20, 40)
NODES = 85
LEVELS = (slice(0, 1), slice(1, 5), slice(5, 21), slice(21, 85))        # the nodes of each magnification
TIFFS, PICTURES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".btf"), (".png", ".jpg", ".jpeg")
FOREIGN = {".mrxs": "3DHISTECH MIRAX", ".czi": "Zeiss CZI", ".bif": "Ventana BIF", ".vsi": "Olympus VSI", ".dcm": "DICOM", ".isyntax":
           "Philips iSyntax", ".vms": "Hamamatsu VMS", ".zarr": "Zarr", ".lif": "Leica LIF", ".kfb": "KFBio KFB", ".sdpc": "SDPC"}
SUFFIXES = (*TIFFS, ".dzi", *FOREIGN)                    # what a folder is searched for, foreign ones to be refused by name
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)            # a bad file is reported once, by us
Image.MAX_IMAGE_PIXELS = None                            # our own limit on flat pictures follows, with our own words
FLAT_LIMIT = 2 ** 28                                     # pixels of a picture without tiles: 16384 x 16384, 0.8 GB when decoded

def mpp_of(mag):
    """Microns per pixel at a magnification: 2.0 at 5x, 0.25 at 40x."""
    return 10 / mag

# ---------------------------------------------------------------- formats: file -> (what to close, its pages, what it says of its scale)

@dataclass
class Page:
    """One stored picture of a slide: w x h pixels in tiles of tw x th, numbered row by row."""
    w: int
    h: int
    tw: int
    th: int
    kind: str                    # how the tiles are compressed
    load: Callable               # k -> bytes of tile k; b"" where nothing was stored, which means white
    decode: Callable             # (bytes, k) -> uint8 [<= th, <= tw, 3 or more]

def _tiff(path):
    """Aperio SVS, pyramidal TIFF and BigTIFF, OME-TIFF, Philips TIFF, Leica SCN, Hamamatsu NDPI: all are TIFFs to tifffile."""
    tif = tifffile.TiffFile(path)
    if not len(tif.pages):                               # the directory of a TIFF often stands at its end
        raise EOFError("is truncated (its directory is missing)")
    if tif.pages.first.is_bif:
        raise NotImplementedError(FOREIGN[".bif"])       # its tiles overlap and run in a serpentine: read plainly, it looks torn
    # Aperio tiles its levels and nothing else (thumbnail, label, macro are strips); elsewhere the slide is the largest series
    series = max(tif.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
    stored = [p for p in tif.pages if p.is_tiled] if tif.is_svs else []
    stored = stored or [lev.keyframe for lev in series.levels]
    end = max((o + n for p in stored for o, n in zip(p.dataoffsets, p.databytecounts)), default=0)
    if not 0 < end <= os.path.getsize(path):
        raise EOFError(f"is truncated (tiles to byte {end:,}, file of {os.path.getsize(path):,})")
    file, pages = tif.filehandle, []
    for p in stored:
        jpeg, jpeg2000 = p.compression in (6, 7), p.compression in (33003, 33005, 34712)
        if p.dtype != np.uint8 or p.samplesperpixel not in (3, 4) or p.planarconfig != 1:
            raise NotImplementedError(f"not 8-bit RGB but {p.samplesperpixel} x {p.dtype}" + ", in separate planes" * (p.planarconfig != 1))
        if not (p.photometric == 2 or jpeg2000 or p.photometric == 6 and jpeg):
            raise NotImplementedError(f"colours as {p.photometric.name} in {p.compression.name}")

        def load(k, p=p):                                # pread moves no file position, so threads may share the handle
            return os.pread(file.fileno(), p.databytecounts[k], p.dataoffsets[k])

        def decode(data, k, p=p, jpeg2000=jpeg2000):
            if jpeg2000:                                 # tifffile would leave its colours as they are
                tile = imagecodecs.jpeg2k_decode(data)
                return _rgb_of_ycc(tile) if p.compression == 33003 else tile
            return p.decode(data, k, jpegtables=p.jpegtables, jpegheader=p.jpegheader)[0][0]
        _ = p.decode                                     # tifffile prepares it at first use, which threads must not race for
        tw, th = (p.tilewidth, p.tilelength) if p.is_tiled else (p.imagewidth, p.rowsperstrip)
        pages.append(Page(p.imagewidth, p.imagelength, tw, th, p.compression.name, load, decode))
    return tif, pages, _scale_of(tif, series)

def _scale_of(tif, series):
    """-> ([(microns per pixel, where it is written)], the most trusted first; the objective's magnification or None)."""
    first, says = tif.pages.first, []
    text, unit = first.description or "", {2: 25400, 3: 10000}.get(int(first.tags.valueof("ResolutionUnit", 2)), 0)   # um per inch, cm
    if aperio := re.search(r"\bMPP\s*=\s*([\d.]+)", text):
        says.append((float(aperio[1]), "Aperio MPP"))
    if tif.is_ome:                                       # one <Image> per series; microns where no unit is given, says the schema
        image = (re.findall(r"<Image\b.*?</Image>", text, re.S) or [""])[tif.series.index(series):][:1] or [""]
        size, um = (re.search(rf'PhysicalSizeX{k}="([^"]+)"', image[0]) for k in ("", "Unit"))
        scale = {"nm": 1e-3, "\u00b5m": 1, "\u03bcm": 1, "um": 1, "mm": 1e3, "cm": 1e4}.get(um[1] if um else "um")
        if size and scale:
            says.append((float(size[1]) * scale, "OME PhysicalSizeX"))
    if spacing := re.findall(r'DICOM_PIXEL_SPACING"[^>]*>\D*([\d.]+)', text) if tif.is_philips else ():
        says.append((1000 * min(map(float, spacing)), "Philips DICOM_PIXEL_SPACING"))      # mm; of all levels, the finest
    num, den = series.keyframe.tags.valueof("XResolution", (0, 1))
    if 0.1 <= unit * den / max(num, 1) <= 2.5:           # beyond that it is a printer's 72 dpi, not a microscope's
        says.append((unit * den / num, "TIFF XResolution"))
    app = re.search(r"\bAppMag\s*=\s*([\d.]+)", text)
    app = float(app[1]) if app else first.tags.valueof(65421)           # NDPI keeps its objective there
    return says, app if app and app > 0 else None

def _rgb_of_ycc(tile):
    """Y, Cb, Cr -> R, G, B by JFIF's formula. Aperio's JPEG 2000 kind 33003 holds the former and does not say so inside."""
    y, cb, cr = (tile[..., i].astype(np.float32) - (0, 128, 128)[i] for i in range(3))
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)

def _picture(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

def _deepzoom(path):
    """NAME.dzi and NAME_files/LEVEL/COLUMN_ROW.jpeg: level L is 2^L pixels at most, each half the next, every tile `overlap`
    pixels wider on its inner sides."""
    root = ElementTree.parse(path).getroot()
    size, kind = root.find("{*}Size"), root.get("Format")
    if size is None or not kind:
        raise ValueError("its XML names no Size or no Format")
    W, H, side, overlap = (int(e.get(k) or 0) for e, k in ((size, "Width"), (size, "Height"), (root, "TileSize"), (root, "Overlap")))
    if min(W, H, side) < 1:
        raise ValueError("its XML names no Width, Height or TileSize")
    top, pages = math.ceil(math.log2(max(W, H))), []
    for down in range(top + 1):
        w, h, folder = -(-W // 2 ** down), -(-H // 2 ** down), path.with_name(path.stem + "_files") / str(top - down)
        if down and max(w, h) < side:
            break                                        # smaller levels are thumbnails of a single tile
        across = -(-w // side)

        def load(k, folder=folder, across=across):
            return (folder / f"{k % across}_{k // across}.{kind}").read_bytes()

        def decode(data, k, across=across):
            return _picture(data)[overlap * (k >= across):, overlap * (k % across > 0):][:side, :side]
        pages.append(Page(w, h, side, side, kind.upper(), load, decode))
    last = -(-W // side) * -(-H // side) - 1
    try:
        if not pages[0].load(last):
            raise EOFError("is truncated (its last tile is empty)")
    except OSError as e:
        raise EOFError(f"is not whole ({e.filename} cannot be read)") from e
    return None, pages, ([], None)

def _flat(path):
    """A plain picture: one level of one tile."""
    with Image.open(path) as image:
        (w, h), kind = image.size, image.format
        if image.mode[0] in "IF":
            raise NotImplementedError(f"a picture of more than 8 bits, {image.mode}")
    if w * h > FLAT_LIMIT:
        raise NotImplementedError(f"a picture of {w} x {h} pixels without tiles")
    return None, [Page(w, h, w, h, kind, lambda k: path.read_bytes(), lambda data, k: _picture(data))], ([], None)

# ---------------------------------------------------------------- slides

class Slide:
    """A whole slide image: TIFF family (see `_tiff`; JPEG, JPEG 2000, LZW, deflate or raw; tiles or strips; 8-bit RGB), Deep Zoom, or
    a flat PNG or JPEG.

    .name file name; .size (W, H); .mpp level-0 microns per pixel and .mpp_source its origin (`mpp` overrides the file's); .doubt
    a sentence when the file contradicts itself about its scale, else ""; .mags the magnifications truly in it; .levels
    [(downsample, (w, h))], finest first, and .pages what is stored of each. `threads` tiles are decoded at a time (decoders release
    the interpreter lock); up to `keep` bytes of decoded tiles that a square cut are kept for its neighbours.
    Raises ValueError or OSError: one sentence with the file and the remedy."""

    def __init__(self, path, mpp=None, threads=None, keep=2 ** 27):
        path = Path(path)
        self.path, self.name, self.file, suffix = str(path), path.name, None, path.suffix.lower()
        convert = "convert it to a tiled pyramidal TIFF (vips, QuPath and bfconvert do)"
        try:
            if suffix in FOREIGN:
                raise NotImplementedError(FOREIGN[suffix])
            if not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file")
            self.file, pages, (says, app) = {".dzi": _deepzoom, **dict.fromkeys(PICTURES, _flat)}.get(suffix, _tiff)(path)
        except NotImplementedError as e:
            raise ValueError(f"{path} is of a kind that is not supported ({e}): {convert}") from e
        except EOFError as e:
            raise ValueError(f"{path} {e}: copy it again") from e
        except FileNotFoundError:
            raise
        except Exception as e:                           # tifffile has no one class of error for what is not a sound TIFF
            raise ValueError(f"{path} cannot be opened as a slide ({_line(e)}): it is damaged or of another kind; copy it again or {convert}") from e
        if min(min(p.w, p.h, p.tw, p.th) for p in pages) < 1:
            raise ValueError(f"{path} is damaged (a level of no size): copy it again")
        self.size, self.levels, self.pages = (pages[0].w, pages[0].h), [], []
        for p in pages:
            d = pages[0].w / p.w
            if abs(d - round(d)) * p.w <= round(d):      # 4443 / 2221 is a halving that dropped a column, not 2.0005
                d = float(round(d))
            if abs(pages[0].h / d - p.h) <= 1 + 0.01 * p.h and (p.w, p.h) not in dict(self.levels).values():    # else another picture, or focus
                self.levels.append((d, (p.w, p.h)))
                self.pages.append(p)
        self.mpp, self.mpp_source, self.doubt = self._scale(mpp, says, app)
        # 40x needs 0.3 um/px or finer, 20x 0.6, ...: what scanners call 40x spreads over 0.2-0.28, their 20x over 0.45-0.55
        self.mags = tuple(m for m in MAGS if self.mpp < 1.2 * mpp_of(m))
        self.threads, self.pool = threads or min(8, os.cpu_count() or 1), None
        self.keep, self.kept, self.canvas, self.lock = keep, {}, None, threading.Lock()

    def _scale(self, given, says, app):
        """-> mpp, where it comes from, and a doubt. Order: --mpp, the vendor's own field, TIFF resolution; nothing is guessed."""
        if given is None and not says:
            hint = f"its AppMag of {app:g} is no scale, but suggests {10 / app:g}" if app else "about 0.25 if scanned at 40x"
            raise ValueError(f"{self.path} does not say its microns per pixel: pass --mpp ({hint})")
        mpp, source = (float(given), "--mpp") if given is not None else says[0]
        if not 0.1 <= mpp < 2.4:                          # coarser than 2.4 is coarser than 5x
            raise ValueError(f"{self.path}: {mpp:g} um/px ({source}) is not within 0.1-2.4: pass its true --mpp")
        others = [(m, name) for m, name in (*says, *([(10 / app, f"AppMag {app:g}")] if app else ())) if not 1 / 1.5 <= m / mpp <= 1.5]
        return mpp, source, "; ".join(f"{mpp:g} um/px ({source}) contradicts {m:g} ({name})" for m, name in others)

    def best_level(self, downsample):
        """Index of the coarsest stored level at least as fine as `downsample` (1 % slack for odd level sizes)."""
        return max((d, i) for i, (d, _) in enumerate(self.levels) if d <= max(1, downsample) * 1.01)[1]

    def read(self, x, y, side, out):
        """The square (x, y, side) -> uint8 [out, out, 3], each pixel the average of what it covers (see `resize`), white
        outside the slide. Any numbers will do; corners are exact to half a pixel of the level that is read."""
        i = self.best_level(side / out)
        d, page = self.levels[i][0], self.pages[i]
        x, y, n = round(x / d), round(y / d), max(1, round(side / d))
        top, left = max(0, y // page.th), max(0, x // page.tw)
        bottom, right = -(-min(y + n, page.h) // page.th), -(-min(x + n, page.w) // page.tw)
        with self.lock:                                  # last time's canvas, unless a caller still holds it: fresh memory costs a
            canvas, self.canvas = self.canvas, None      # fifth of decoding, and threads wait for each other to get it
        if canvas is None or len(canvas) != n or sys.getrefcount(canvas) > 2:                # this name's and this call's
            canvas = np.empty((n, n, 3), np.uint8)
        if x < 0 or y < 0 or x + n > page.w or y + n > page.h:
            canvas.fill(255)

        def paste(r):                                    # one row of tiles
            for c in range(left, right):
                # the tile lies at (y0, x0)-(y1, x1) of the page, its part inside the square at (v0, u0)-(v1, u1)
                y0, x0, y1, x1 = r * page.th, c * page.tw, min((r + 1) * page.th, page.h), min((c + 1) * page.tw, page.w)
                v0, u0, v1, u1 = max(y, y0), max(x, x0), min(y + n, y1), min(x + n, x1)
                cut, key = (v0, u0, v1, u1) != (y0, x0, y1, x1), (i, r * -(-page.w // page.tw) + c)
                tile = self.kept.get(key) if cut else None
                if tile is None:
                    tile = self._tile(page, key[1], y1 - y0, x1 - x0)
                    if cut:                              # the neighbouring square will want it too
                        self._remember(key, tile)
                canvas[v0 - y:v1 - y, u0 - x:u1 - x] = 255 if tile is None else tile[v0 - y0:v1 - y0, u0 - x0:u1 - x0, :3]
        rows = range(top, bottom) if x < page.w and y < page.h and x + n > 0 and y + n > 0 else ()
        if self.threads > 1 and len(rows) > 1:
            with self.lock:
                self.pool = self.pool or ThreadPoolExecutor(self.threads)
            list(self.pool.map(paste, rows))
        else:
            list(map(paste, rows))
        self.canvas = canvas
        return resize(canvas, out)

    def _remember(self, key, tile):
        page = self.pages[key[0]]
        with self.lock:
            self.kept[key] = tile
            while len(self.kept) > max(1, self.keep // (3 * page.tw * page.th)):
                del self.kept[next(iter(self.kept))]     # the oldest: dicts keep their order

    def _tile(self, page, k, h, w):                      # -> uint8 [>= h, >= w, 3 or more]; None if none was stored
        try:
            data = page.load(k)
            tile = page.decode(data, k) if data else None
            if tile is not None and (tile.ndim != 3 or tile.shape[0] < h or tile.shape[1] < w):
                raise ValueError(f"it is of {tile.shape[:2][::-1]} pixels, not {(w, h)}")
            return tile
        except Exception as e:
            raise ValueError(f"{self.path}: tile {k} of its {page.w} x {page.h} level cannot be decoded ({_line(e)}): the file is "
                             "damaged, copy it again or leave it out") from e

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown()
        if self.file:
            self.file.close()

def _line(e):
    return " ".join(str(e).split())[:150] or type(e).__name__

def resize(a, out):
    """uint8 [n, n, 3] -> [out, out, 3]. Whole factors are exact: the mean of k x k pixels, or each pixel repeated, which
    averaging undoes. Others use the anti-aliased triangle filter, which UNI's own pre-processing applies to 512-pixel patches."""
    n, k = len(a), max(1, len(a) // out)
    if n == out:
        return a
    if n == k * out:
        small = np.empty((out, out, 3), np.uint8)
        for i in range(0, out, 32):                      # in bands that stay in the cache
            rows = a[i * k:(i + 32) * k:k].astype(np.uint32 if k > 16 else np.uint16)
            for j in range(1, k):
                rows += a[i * k + j:(i + 32) * k:k]
            columns, mean = rows.reshape(len(rows), out, k, 3), np.empty((len(rows), out, 3), rows.dtype)
            for c in range(3):                           # channel by channel: long strides are fast, inner loops of 3 are not
                mean[:, :, c] = columns[:, :, 0, c]
                for j in range(1, k):
                    mean[:, :, c] += columns[:, :, j, c]
            mean += k * k // 2
            mean //= k * k
            small[i:i + 32] = mean
        return small
    if out % n == 0:
        return a.repeat(out // n, 0).repeat(out // n, 1)
    x = torch.from_numpy(a).permute(2, 0, 1)[None]       # channels-last uint8: torch's fastest path
    x = torch.nn.functional.interpolate(x, size=(out, out), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).contiguous().numpy()

def thumbnail(slide, scale):
    """The slide at one pixel per scale x scale level-0 pixels, uint8 [h, w, 3]; read in blocks, to need little memory even
    where no coarse level is stored."""
    w, h = (-(-n // scale) for n in slide.size)
    image = np.empty((h, w, 3), np.uint8)
    for y, x in ((y, x) for y in range(0, h, 128) for x in range(0, w, 128)):
        block = slide.read(x * scale, y * scale, 128 * scale, 128)
        image[y:y + 128, x:x + 128] = block[:h - y, :w - x]
    return image

# ---------------------------------------------------------------- tissue

def tissue_mask(slide, um=8.0, low=6, high=12, blue=10, red=100):
    """-> (mask bool [h, w], scale): where tissue is, at about `um` microns (`scale` level-0 pixels) per mask pixel.

    Haematoxylin and eosin both absorb green more than red or blue; glass, fat vacuoles, dust, grey filling and black or green
    pen do not. So stain is (R + B) / 2 - G in grey levels, cut at Otsu's threshold. `low` and `high` bound it: on a slide that
    is all glass Otsu would split noise, on one that is all tissue it would discard the pale half. Blue pen has R more than
    `blue` below G, which haematoxylin has not; red pen has B more than `red` below R, which of tissue only lakes of blood have."""
    scale = max(1, round(um / slide.mpp))
    r, g, b = np.moveaxis(thumbnail(slide, scale).astype(np.int16), 2, 0)
    stain = np.clip((r + b) // 2 - g, 0, 255)
    stain[(g - r > blue) | (r - b > red)] = 0
    count = np.bincount(stain.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), (count * np.arange(256)).cumsum()
    between = (total[-1] * below - total * below[-1]) ** 2 / np.maximum(below * (below[-1] - below), 1)    # Otsu 1979, eq. 18
    votes = np.pad((stain > np.clip(between.argmax(), low, high)).astype(np.int8), 1, mode="edge")
    votes = votes[:-2] + votes[1:-1] + votes[2:]         # the majority of 3 x 3 drops specks and closes pinholes, but a fat
    return votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:] > 4, scale      # cell, 50-100 um wide, stays a hole

def tissue_fraction(mask, scale, x, y, side):
    """Tissue share of squares (int arrays of one shape), exact also where they cut mask pixels; off the slide counts as glass."""
    table = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))             # summed areas

    def area(u, v):                                      # mask left of u and above v: bilinear in the table
        u, v = np.clip(u / scale, 0, mask.shape[1]), np.clip(v / scale, 0, mask.shape[0])
        j, i = np.minimum(u.astype(int), mask.shape[1] - 1), np.minimum(v.astype(int), mask.shape[0] - 1)
        a, b = u - j, v - i
        return (1 - b) * ((1 - a) * table[i, j] + a * table[i, j + 1]) + b * ((1 - a) * table[i + 1, j] + a * table[i + 1, j + 1])
    return (area(x + side, y + side) - area(x, y + side) - area(x + side, y) + area(x, y)) * (scale / side) ** 2

# ---------------------------------------------------------------- the tree (plain arithmetic, on int, numpy or torch)

def parent(n, b=4):
    """The node above n in a b-ary heap; the root, n = 0, has none."""
    return (n - 1) // b

def children(n, b=4):
    """The b nodes below n, in the order TL, TR, BL, BR when b = 4."""
    return [b * n + 1 + q for q in range(b)]

def level(n, b=4):
    """0, 1, 2, 3 for a node at 5x, 10x, 20x, 40x."""
    return (n > 0) * 1 + (n > b) * 1 + (n > b + b * b) * 1

def place(n):
    """Node -> (level, row, column) on its level's 2^level x 2^level grid. The rank of a node within its level is the Z-order
    code of its place, the bits of row and column taken in turns: so the even bits spell the column, the odd ones the row."""
    rank = n - ((n > 0) * 1 + (n > 4) * 4 + (n > 20) * 16)
    return level(n), rank >> 1 & 1 | rank >> 2 & 2 | rank >> 3 & 4, rank & 1 | rank >> 1 & 2 | rank >> 2 & 4

def square(n, x, y, side):
    """(x, y, side) of node n in the bag whose 5x parent is (x, y, side); exact when side is a multiple of 8."""
    lev, row, col = place(n)
    return x + col * side // 2 ** lev, y + row * side // 2 ** lev, side // 2 ** lev

def valid_nodes(levels, tissue, min_node=0.1):
    """Which nodes count: levels bool [..., 4] (5x, 10x, 20x, 40x truly in the slide), tissue float [..., 85] -> bool [..., 85]. Nodes of
    less than `min_node` tissue do not: captioners invent things on blank glass."""
    return (np.asarray(tissue) >= min_node) & np.asarray(levels)[..., level(np.arange(NODES))]

# ---------------------------------------------------------------- which parents

def choose_parents(slide, fov_px=512, parents=20, min_tissue=0.5, seed=0):
    """-> [(x, y, side, tissue float [85])]: at most `parents` 5x parents that do not overlap, in reading order.

    A parent is `fov_px` pixels wide at 5x by the slide's true mpp (not its nominal magnification), rounded to 8 level-0 pixels
    so that all four levels tile it exactly. Candidates are a grid: of 16 positions in steps of a quarter parent, the one with
    the most parents of enough tissue, because a biopsy is narrower than a parent; the centred one where several are equal.
    A slide smaller than one parent gets one, padded with white. The draw depends on slide name and `seed` alone, so adding
    slides changes nothing for the others."""
    side = max(8, 8 * round(fov_px * mpp_of(5) / slide.mpp / 8))
    mask, scale = tissue_mask(slide, um=min(8, fov_px / 16))                # at least four mask pixels across a 40x patch

    def starts(length, tile, quarter):                    # along one axis: the centred grid, moved on by 0 to 3 quarters of a parent
        if length < side:
            return np.array([(length - side) // 2])
        first = (length % side // 2 + quarter * side // 4) % side
        first -= first % tile if tile <= side // 4 else 0                   # a tile on the border of two parents is decoded twice
        return np.arange(first, length - side + 1, side)
    page, grids = slide.pages[0], []
    for down, right in itertools.product(range(4), range(4)):
        x, y = np.meshgrid(starts(slide.size[0], page.tw, right), starts(slide.size[1], page.th, down))
        grids.append((x.reshape(-1, 1), y.reshape(-1, 1)))
    enough = [(tissue_fraction(mask, scale, x, y, np.full_like(x, side)) >= min_tissue).sum() for x, y in grids]
    x, y, sides = square(np.arange(NODES), *grids[int(np.argmax(enough))], side)
    tissue = tissue_fraction(mask, scale, x, y, np.broadcast_to(sides, x.shape))
    rng = np.random.default_rng([seed, zlib.crc32(os.fsencode(slide.name))])
    drawn = rng.permutation(np.flatnonzero(tissue[:, 0] >= min_tissue))[:parents]
    return [(int(x[i, 0]), int(y[i, 0]), side, tissue[i]) for i in sorted(drawn)]

# ---------------------------------------------------------------- to look at

def preview(path, out, mpp=None, fov_px=512, parents=20, min_tissue=0.5, seed=0, px=448):
    """One slide as a PNG: its thumbnail with tissue outlined and parents numbered, and beside it one bag walked from its 5x
    patch down to four 40x patches; the yellow frame in each panel is the patch whose children the walk takes next."""
    with Slide(path, mpp) as slide:
        bags, gap, top = choose_parents(slide, fov_px, parents, min_tissue, seed), 6, 22
        scale = max(1, round(max(slide.size) / (2 * px + top)))
        pixels, (mask, step) = thumbnail(slide, scale), tissue_mask(slide, min(8, fov_px / 16))
        h, w = pixels.shape[:2]
        mask = mask[np.ix_((np.arange(h) * scale // step).clip(max=len(mask) - 1), (np.arange(w) * scale // step).clip(max=mask.shape[1] - 1))]
        edge = mask & ~np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(5))).astype(bool)
        pixels[~mask] = pixels[~mask] * 0.75 + 0.25 * 60                                     # glass is dimmed
        pixels[edge] = 0, 140, 60
        page = Image.new("RGB", (w + bool(bags) * (2 * px + 3 * gap), max(h, 2 * px + top) + top), "white")
        page.paste(Image.fromarray(pixels), (0, top))
        draw = ImageDraw.Draw(page)
        draw.text((4, 5), f"{slide.name}   {slide.mpp:g} um/px ({slide.mpp_source})   {len(bags)} parents", "black", font_size=13)
        shown = max(bags, key=lambda bag: bag[3][0], default=None)
        for i, (x, y, side, _) in enumerate(bags):
            x, y, x1, y1 = x // scale, y // scale + top, (x + side) // scale, (y + side) // scale + top
            draw.rectangle([x, y, x1, y1], outline="orange" if bags[i] is shown else "mediumblue", width=3)
            draw.text((x + 7, y + 5), str(i), "black", font_size=16)
        walk = [0]
        for lev, mag in enumerate(MAGS if shown else ()):
            x, y = w + 2 * gap + lev % 2 * (px + gap), lev // 2 * (px + top) + top
            nodes, tiles = (children(walk[2]), 2) if lev == 3 else (range(NODES)[LEVELS[lev]], 2 ** lev)
            draw.text((x, y - 17), f"{mag}x: {len(nodes)}{' of 64' * (lev == 3)}, {mpp_of(mag):g} um/px, {fov_px * mpp_of(mag):g} um wide"
                      + " - not in this slide" * (mag not in slide.mags), "black", font_size=13)
            for n in nodes if mag in slide.mags else ():
                (_, row, col), cell = place(n), px // tiles
                u, v = x + col % tiles * cell, y + row % tiles * cell
                page.paste(Image.fromarray(slide.read(*square(n, *shown[:3]), cell - 2)), (u + 1, v + 1))
                if lev < 3 and n == walk[lev]:
                    draw.rectangle([u, v, u + cell - 1, v + cell - 1], outline="gold", width=3)
            walk.append(max(children(walk[-1]), key=lambda n: shown[3][n] if n < NODES else 0))    # down where tissue is
    page.save(out)

def inspect(path, mpp=None, fov_px=512, brief=False):
    """Print what a slide holds and which stored level each magnification would be read from; `brief`: on one line."""
    with Slide(path, mpp) as s:
        page, side = s.pages[0], 8 * round(fov_px * mpp_of(5) / s.mpp / 8)
        size = f"{s.size[0]} x {s.size[1]} px, {s.mpp:g} um/px ({s.mpp_source})"
        doubt = f"; in doubt: {s.doubt}" * bool(s.doubt)
        if brief:
            return print(f"{s.name}: {size}, {page.kind}, levels " + " ".join(f"{d:g}" for d, _ in s.levels)
                         + f", {LEVELS[len(s.mags) - 1].stop} nodes{doubt}")
        print(f"{s.path}\n  {size}, {page.kind}, tiles of {page.tw} x {page.th} px{doubt}")
        for i, (d, (w, h)) in enumerate(s.levels):
            print(f"  level {i}: {w} x {h}, downsample {d:g}, {s.mpp * d:g} um/px")
        for mag in MAGS:
            i = s.best_level(mpp_of(mag) / s.mpp)
            print(f"  {mag:>2}x, {mpp_of(mag):g} um/px: " + (f"from level {i}, reduced {mpp_of(mag) / s.mpp / s.levels[i][0]:.3g} times"
                  if mag in s.mags else "not in this slide, its nodes are masked"))
        print(f"  a bag: {LEVELS[len(s.mags) - 1].stop} of {NODES} nodes, {side} px at level 0 ({side * s.mpp:.0f} um) wide")
