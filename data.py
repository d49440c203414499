"""Slides become bags: everything between a slide file and the patches that a network reads.

A bag [1, section 3.1] is one tissue region at four magnifications: a patch at 5x, its 4 children
at 10x, 16 at 20x and 64 at 40x, 85 patches in all. Three ideas carry this file.

1. A bag is one square image; its 2 x 2 average pyramid holds the 85 patches.
2. The patches are a 4-ary heap: children of node n are 4n+1 .. 4n+4, top left to bottom right.
3. Magnification means microns per pixel (mpp), 10 / magnification, never a file's stored level.

    python data.py tile SLIDES --out DIR     # a tar of bags for each slide, an index beside it

x, y, side are pixels of a slide's finest level. Letters: B bags, N nodes, S pixels a side.
References: [1] MR-PLIP, CVPR 2025. [2] Otsu 1979, thresholds. [3] Ruifrok & Johnston 2001, stains.
[4] Tellez et al. 2018, stain augmentation.
"""

import argparse
import contextlib
import fcntl
import functools
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

MAGS = (5, 10, 20, 40)
NODES = 85
# Slide files of a folder: tifffile reads the first seven kinds, OpenSlide the others.
SUFFIXES = ".svs .tif .tiff .btf .ndpi .scn .qptiff .mrxs .bif .vms .vmu .dcm .czi .svslide".split()
# A bad file is reported once, by this module.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


def write_whole(path, content):
    """Write bytes, str, or what a function writes into an open file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target, then rename: within one folder a rename is atomic.
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with open(temp, "wb") as file:
            if callable(content):
                content(file)
                # A checkpoint must outlive a power cut: content before name.
                file.flush()
                os.fsync(file.fileno())
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temp, path)
    except OSError as e:
        raise OSError(f"{path} cannot be written ({e.strerror or e}): make room there") from e
    finally:
        temp.unlink(missing_ok=True)


def read_image(path):
    """Read a patch file (PNG, JPEG, TIFF) -> PIL image, RGB. ValueError names the file."""
    try:
        with Image.open(path) as image:
            # Pillow would clip deeper pixels to white.
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode}, not 8-bit")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} cannot be read as a picture ({e}): give 8-bit RGB") from None


# ---------------------------------------------------------------- the 85 nodes

# Place each node on the 2^level x 2^level grid of its level.
LEVEL = np.repeat(np.arange(4), [1, 4, 16, 64])
ROW = np.zeros(NODES, np.int64)
COL = np.zeros(NODES, np.int64)
for child in range(1, NODES):
    ROW[child] = 2 * ROW[(child - 1) // 4] + (child - 1) % 4 // 2
    COL[child] = 2 * COL[(child - 1) // 4] + (child - 1) % 2


def mpp_of(mag):
    """Return the microns per pixel of a magnification: 2.0 at 5x, 0.25 at 40x."""
    return 10 / mag


def square(n, x, y, side):
    """Place node n of the bag (x, y, side) -> its (x, y, side); exact if 8 divides side."""
    cells = 2 ** LEVEL[n]
    place = (x + COL[n] * side // cells, y + ROW[n] * side // cells, side // cells)
    # JSON takes no integers of numpy.
    return tuple(map(int, place)) if isinstance(n, int) else place


def valid_nodes(mags, tissue, min_node=0.1):
    """Mark nodes of a slide's magnifications with enough tissue, of [..., 85] -> bool [..., 85]."""
    return (np.asarray(tissue) >= min_node) & np.isin(MAGS, mags)[LEVEL]


# ---------------------------------------------------------------- slides

# What a TIFF's description says of its scale: pattern, microns of its unit, name.
SCALES = (
    (r"\bMPP\s*=\s*([\d.]+)", 1, "Aperio MPP"),
    (r'PhysicalSizeX="([\d.]+)"(?!\s+PhysicalSizeXUnit="[nmc]m")', 1, "OME PhysicalSizeX"),
    (r'PhysicalSizeX="([\d.]+)"\s+PhysicalSizeXUnit="nm"', 0.001, "OME PhysicalSizeX"),
    (r'DICOM_PIXEL_SPACING"[^>]*>\D*([\d.]+)', 1000, "Philips DICOM_PIXEL_SPACING"),
)


class _Tiff:
    """Read TIFFs through tifffile: Aperio SVS, BigTIFF, OME, Philips, Leica SCN, Hamamatsu NDPI."""

    def __init__(self, path):
        # These read slides only: who trains needs neither. tifffile decodes with imagecodecs.
        import imagecodecs  # noqa: F401
        import tifffile

        self.file = tifffile.TiffFile(path)
        # The directory of a TIFF often stands at its end.
        if not len(self.file.pages):
            raise EOFError("its directory is missing")
        # Aperio tiles its levels but not label and thumbnail. Elsewhere take the largest series.
        series = max(self.file.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
        self.pages = [page for page in self.file.pages if page.is_tiled and self.file.is_svs]
        self.pages = self.pages or [level.keyframe for level in series.levels]
        self.sizes = [(page.imagewidth, page.imagelength) for page in self.pages]
        self.pieces = []
        for page in self.pages:
            end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
            if not 0 < end <= os.path.getsize(path):
                raise EOFError(f"its tiles reach to byte {end:,}")
            # JPEGs decode to RGB whatever they store. The tiles of Ventana's BIF overlap.
            channels = page.samplesperpixel
            rgb = page.photometric == 2 and channels in (3, 4)
            rgb |= page.compression in (6, 7, 33003, 33005, 34712) and channels == 3
            bif = self.file.pages.first.is_bif
            if not rgb or page.dtype != np.uint8 or page.planarconfig != 1 or bif:
                kind = f"{page.photometric.name}, {page.compression.name}"
                raise NotImplementedError(f"{channels} x {page.dtype}, {kind}")
            # tifffile prepares a decoder at first use: now, before threads race for it.
            _ = page.decode
            strip = (page.imagewidth, page.rowsperstrip)
            self.pieces.append((page.tilewidth, page.tilelength) if page.is_tiled else strip)
        self.tile = self.pieces[0]
        self._find_scales(series)

    def _find_scales(self, series):
        """Collect what the file says of its scale, the most trusted first."""
        first = self.file.pages.first
        text = first.description or ""
        # Of several levels or pictures the finest is the slide.
        finest = {}
        for pattern, microns, name in SCALES:
            for value in re.findall(pattern, text):
                finest[name] = min(float(value) * microns, finest.get(name, 1e9))
        self.scales = [(mpp, name) for name, mpp in finest.items()]
        # The resolution is in pixels an inch (2) or a centimetre (3).
        unit = {2: 25400, 3: 10000}.get(int(first.tags.valueof("ResolutionUnit", 2)), 0)
        number, per = series.keyframe.tags.valueof("XResolution", (0, 1))
        # Other values are a printer's 72 dpi.
        if 0.1 <= unit * per / max(number, 1) <= 2.5:
            self.scales.append((unit * per / number, "TIFF XResolution"))
        # Hamamatsu keeps the objective's magnification in tag 65421.
        found = re.findall(r"\bAppMag\s*=\s*([\d.]+)", text)
        self.objective = float(found[0] if found else first.tags.valueof(65421, 0))

    def region(self, level, x, y, n, pool):
        """Read the square (x, y, n) of a stored level -> uint8 [n, n, 3], white outside."""
        W, H = self.sizes[level]
        w, h = self.pieces[level]
        canvas = np.full((n, n, 3), 255, np.uint8)
        # Tiles hang over the page, and the page over the canvas.
        inside = canvas[: max(0, H - y), : max(0, W - x)]

        def draw_row(row):
            for col in range(max(0, x // w), -(-min(x + n, W) // w)):
                tile = self._decode(self.pages[level], row * -(-W // w) + col)
                # Its corner lies at (u, v) of the canvas.
                u = col * w - x
                v = row * h - y
                part = tile[max(0, -v) : len(inside) - v, max(0, -u) : inside.shape[1] - u]
                inside[max(0, v) : v + len(tile), max(0, u) : u + tile.shape[1]] = part

        # Decoders release the interpreter lock: rows of tiles run in parallel.
        list(pool.map(draw_row, range(max(0, y // h), -(-min(y + n, H) // h))))
        return canvas

    def _decode(self, page, k):
        """Decode tile k of a page -> uint8 [h, w, 3], white if nothing is stored."""
        # pread moves no file position, so threads may share the file.
        data = os.pread(self.file.filehandle.fileno(), page.databytecounts[k], page.dataoffsets[k])
        tables = dict(jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        tile, _, (_, h, w, _) = page.decode(data or None, k, **tables)
        if tile is None:
            return np.full((h, w, 3), 255, np.uint8)
        if tile.shape[1:3] != (h, w):
            raise ValueError(f"tile {k} is of {tile.shape}")
        tile = tile[0, :, :, :3]
        # Aperio's older JPEG 2000 holds Y, Cb, Cr and does not say so.
        if page.compression == 33003:
            tile = np.asarray(Image.frombytes("YCbCr", (w, h), tile.tobytes()).convert("RGB"))
        return tile


class _OpenSlide:
    """Read what tifffile cannot (MIRAX, DICOM, CZI, BIF, VMS, ...), with the members of _Tiff."""

    def __init__(self, path):
        import openslide

        self.file = openslide.OpenSlide(path)
        found = self.file.properties
        self.sizes = self.file.level_dimensions
        width = int(found.get("openslide.level[0].tile-width", 256))
        self.tile = (width, int(found.get("openslide.level[0].tile-height", 256)))
        mpp = float(found.get("openslide.mpp-x", 0))
        self.scales = [(mpp, "OpenSlide mpp-x")] if mpp else []
        self.objective = float(found.get("openslide.objective-power", 0))

    def region(self, level, x, y, n, pool):
        # OpenSlide takes the corner in pixels of the finest level.
        d = self.file.level_downsamples[level]
        picture = self.file.read_region((round(x * d), round(y * d)), level, (n, n))
        # What was not scanned is transparent: lay it on white.
        white = Image.new("RGBA", (n, n), "white")
        return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def _open(path):
    """Open a slide file with what can read it, or say in one sentence what to do."""
    try:
        return _Tiff(path)
    except (FileNotFoundError, EOFError) as e:
        raise ValueError(f"{path} is missing or truncated ({e}): copy it again") from None
    except Exception as e:
        # tifffile has many classes of errors. A repr has no line breaks.
        reason = repr(e)
    try:
        return _OpenSlide(path)
    except Exception as e:
        both = f"tifffile cannot read it ({reason}), nor OpenSlide ({e!r})"
    install = "`pip install openslide-python openslide-bin`, or convert it to a tiled TIFF"
    raise ValueError(f"{path}: {both}: {install}")


class Slide:
    """A whole slide image, of which any square can be read at any scale.

    mpp is of the finest level, by default what the file says. threads decode rows of tiles.
    .size (w, h); .mpp and .mpp_source, where it is written; .doubt, a sentence if the file
    contradicts itself about its scale, else ""; .mags that it truly holds; .levels [(downsample,
    (w, h))], finest first; .tile (w, h) of the finest. Raises ValueError with file and remedy.
    """

    def __init__(self, path, mpp=None, threads=None):
        self.path = str(path)
        self.name = Path(path).name
        self.source = _open(path)
        self.tile = self.source.tile
        self.size = tuple(self.source.sizes[0])
        # Keep the levels of the picture, and where each is stored.
        self.levels = []
        self.stored = []
        for i, (w, h) in enumerate(self.source.sizes):
            d = self.size[0] / w
            # Odd sizes lose a column when they are halved: 4443 / 2221 is 2.
            if abs(d - round(d)) * w <= round(d):
                d = float(round(d))
            # Leave out what repeats a level or has another shape: label, macro, focus.
            if abs(self.size[1] / d - h) <= 1 + 0.01 * h and (d, (w, h)) not in self.levels:
                self.levels.append((d, (w, h)))
                self.stored.append(i)
        self._choose_scale(mpp)
        # Scanners call 0.20-0.28 um/px 40x and 0.45-0.55 um/px 20x: allow 20 %.
        self.mags = tuple(mag for mag in MAGS if self.mpp < 1.2 * mpp_of(mag))
        self.pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))

    def _choose_scale(self, given):
        """Take the given mpp, else the file's most trusted one. Nothing is guessed."""
        scales = [] if given is None else [(float(given), "--mpp")]
        scales += self.source.scales
        objective = self.source.objective
        if not scales:
            hint = f"its objective suggests {10 / objective:g}" if objective > 0 else "0.25 is 40x"
            raise ValueError(f"{self.path} does not say its microns per pixel: pass --mpp ({hint})")
        self.mpp, self.mpp_source = scales[0]
        said = f"{self.mpp:g} um/px ({self.mpp_source})"
        if not 0.1 <= self.mpp < 2.4:
            raise ValueError(f"{self.path}: {said} is not within 0.1-2.4: pass its true --mpp")
        # Doubt it if another source, or the objective, differs by half or more.
        if objective > 0:
            scales.append((10 / objective, f"AppMag {objective:g}"))
        others = [f"{mpp:g} ({name})" for mpp, name in scales if not 2 / 3 <= mpp / self.mpp <= 1.5]
        self.doubt = f"{said} contradicts {', '.join(others)}" if others else ""

    def best_level(self, downsample):
        """Find the coarsest stored level at least as fine as a downsample -> its index."""
        # Odd sizes need one per cent of slack.
        fine = [i for i, (d, _) in enumerate(self.levels) if d <= max(1, downsample) * 1.01]
        return max(fine, key=lambda i: self.levels[i])

    def read(self, x, y, side, out):
        """Read the square (x, y, side) -> uint8 [out, out, 3], white outside the slide."""
        # Corners are exact to half a pixel of the stored level.
        level = self.best_level(side / out)
        d = self.levels[level][0]
        place = (round(x / d), round(y / d), max(1, round(side / d)))
        try:
            pixels = self.source.region(self.stored[level], *place, self.pool)
        except Exception as e:
            raise ValueError(f"{self.path} is damaged ({e!r}): copy it again") from e
        return resize(pixels, out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()
        self.source.file.close()


def resize(a, out):
    """Resize a square picture uint8 [n, n, 3] -> [out, out, 3]."""
    n = len(a)
    k = n // out
    # Repeat each pixel.
    if out % n == 0:
        return a.repeat(out // n, 0).repeat(out // n, 1) if out > n else a
    # Take the anti-aliased triangle filter, as UNI does for its patches.
    if n % out:
        pixels = torch.from_numpy(a).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, size=(out, out), mode="bilinear", antialias=True)
        return pixels[0].permute(1, 2, 0).contiguous().numpy()
    # Average k x k pixels exactly; 16 bits hold the sum of 16 x 16.
    wide = np.uint32 if k > 16 else np.uint16
    small = np.empty((out, out, 3), np.uint8)
    # Work in bands that stay in the cache: rows first, then columns, one colour at a time.
    for i in range(0, out, 32):
        band = a[i * k : (i + 32) * k]
        rows = sum((band[j::k] for j in range(1, k)), band[::k].astype(wide))
        for c in range(3):
            total = sum(rows[:, j::k, c] for j in range(k))
            small[i : i + 32, :, c] = (total + k * k // 2) // (k * k)
    return small


# ---------------------------------------------------------------- tissue and parents


def thumbnail(slide, scale):
    """Draw a slide at scale x scale pixels a pixel -> uint8 [h, w, 3]."""
    w, h = (-(-length // scale) for length in slide.size)
    image = np.empty((h, w, 3), np.uint8)
    # Read blocks: that needs little memory even if no coarse level is stored.
    for y in range(0, h, 128):
        for x in range(0, w, 128):
            block = slide.read(x * scale, y * scale, 128 * scale, 128)
            image[y : y + 128, x : x + 128] = block[: h - y, : w - x]
    return image


def tissue_mask(slide, um=8.0):
    """Find tissue at about `um` microns a pixel -> (mask bool [h, w], scale in slide pixels)."""
    scale = max(1, round(um / slide.mpp))
    r, g, b = np.moveaxis(thumbnail(slide, scale).astype(np.int16), 2, 0)
    # Both stains absorb green most; glass, fat, dust and black pen absorb all colours alike.
    stain = np.clip((r + b) // 2 - g, 0, 255)
    # Drop blue and green pen, whose red is below green, and red pen, whose blue is far below red.
    stain[(g - r > 10) | (r - b > 100)] = 0
    # Choose the threshold that maximises the variance between the classes [2, equation 18].
    count = np.bincount(stain.ravel(), minlength=256).astype(float)
    below = count.cumsum()
    total = (count * np.arange(256)).cumsum()
    between = (total[-1] * below - total * below[-1]) ** 2
    between /= np.maximum(below * (below[-1] - below), 1)
    # Keep it within 6-12 grey levels, for slides that are all tissue or all glass.
    stained = stain > np.clip(between.argmax(), 6, 12)
    # Let each 3 x 3 vote: specks and pinholes go, fat cells of 50-100 um stay holes.
    votes = np.pad(stained.astype(np.int8), 1, mode="edge")
    votes = votes[:-2] + votes[1:-1] + votes[2:]
    return votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:] > 4, scale


def tissue_fraction(mask, scale, x, y, side):
    """Measure the tissue share of squares (int arrays of one shape); outside is glass."""
    # Entry (i, j) of the table counts the mask above row i and left of column j.
    table = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = mask.shape

    def area(u, v):
        # Between entries the count is bilinear.
        u = np.clip(u / scale, 0, width)
        v = np.clip(v / scale, 0, height)
        j = np.minimum(u.astype(int), width - 1)
        i = np.minimum(v.astype(int), height - 1)
        upper = (1 - (u - j)) * table[i, j] + (u - j) * table[i, j + 1]
        lower = (1 - (u - j)) * table[i + 1, j] + (u - j) * table[i + 1, j + 1]
        return (1 - (v - i)) * upper + (v - i) * lower

    # Four corners give the count within a square.
    inside = area(x + side, y + side) - area(x, y + side) - area(x + side, y) + area(x, y)
    return inside * (scale / side) ** 2


def choose_parents(slide, fov_px=512, parents=20, min_tissue=0.5, seed=0):
    """Choose squares that do not overlap -> [(x, y, side, tissue [85])], in order."""
    # A parent is fov_px pixels of 5x wide, by the true mpp.
    # Four levels tile a multiple of 8 exactly.
    side = max(8, 8 * round(fov_px * mpp_of(5) / slide.mpp / 8))
    # At least four mask pixels lie across a 40x patch.
    mask, scale = tissue_mask(slide, um=min(8, fov_px / 16))

    def starts(axis, quarter):
        length = slide.size[axis]
        # A smaller slide gets one parent, padded with white.
        if length < side:
            return np.array([(length - side) // 2])
        first = (length % side // 2 + quarter * side // 4) % side
        # Start on a tile's edge, because a tile that two parents share is decoded twice.
        if slide.tile[axis] <= side // 4:
            first -= first % slide.tile[axis]
        return np.arange(first, length - side + 1, side)

    # Try 16 grids, a quarter parent apart, because a biopsy is narrower than a parent.
    grids = []
    enough = []
    for down in range(4):
        for right in range(4):
            x, y = np.meshgrid(starts(0, right), starts(1, down))
            grids.append((x.reshape(-1, 1), y.reshape(-1, 1)))
            share = tissue_fraction(mask, scale, x, y, np.full_like(x, side))
            enough.append((share >= min_tissue).sum())
    # Take the one with most parents of enough tissue. The first of equals is the centred one.
    x, y = grids[int(np.argmax(enough))]
    # Measure all 85 nodes of each square.
    node_x, node_y, node_side = square(np.arange(NODES), x, y, side)
    tissue = tissue_fraction(mask, scale, node_x, node_y, np.broadcast_to(node_side, node_x.shape))
    # Draw among those with enough tissue. The draw depends on seed and name alone.
    rng = np.random.default_rng([seed, zlib.crc32(os.fsencode(slide.name))])
    drawn = rng.permutation(np.flatnonzero(tissue[:, 0] >= min_tissue))[:parents]
    return [(int(x[i, 0]), int(y[i, 0]), side, tissue[i]) for i in sorted(drawn)]


# ---------------------------------------------------------------- tiling: slides -> shards


def slide_key(path):
    """Return the name of a slide's shard and bags, which is its stem in plain signs."""
    # Readers of tars end a bag's name at the first dot.
    return re.sub(r"[^\w-]", "_", Path(path).stem)


def find_slides(paths):
    """List the slides of files and folders, sorted by name. Two of one key are refused."""
    found = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        # Take a file that is named as it is, and of a folder what a slide's name ends in.
        files = path.iterdir() if path.is_dir() else [path]
        slides = [f for f in files if f == path or f.suffix.lower() in SUFFIXES]
        if not slides or not path.exists():
            raise ValueError(f"{path} is no slide or folder of slides: check the path")
        for file in slides:
            other = found.setdefault(slide_key(file), file)
            if other != file:
                raise ValueError(f"bags of {file} and {other} would share a name: rename one")
    return sorted(found.values(), key=lambda path: path.name)


def mpp_table(mpp, names):
    """Read --mpp: None, a number, or a CSV of slide,mpp lines -> {name: mpp or None}."""
    if mpp is None:
        return dict.fromkeys(names)
    # One number is for all slides.
    with contextlib.suppress(ValueError):
        return dict.fromkeys(names, float(mpp))
    table = {}
    for i, line in enumerate(Path(mpp).read_text("utf-8-sig", "replace").splitlines(), 1):
        found = re.fullmatch(r'\s*"?(.+?)"?\s*,\s*([\d.]+)\s*', line)
        if found:
            table[found[1]] = float(found[2])
        # The first line may be a heading.
        elif line.strip() and i > 1:
            raise ValueError(f"{mpp}:{i}: expected slide,mpp, found {line!r}")
    if not set(table) & set(names):
        raise ValueError(f"{mpp} names none of the slides: give lines of file name,mpp")
    # The others keep what their files say.
    return {name: table.get(name) for name in names}


def write_bags(slide, squares, settings):
    """Make a shard of the squares [(x, y, side, tissue)] of a slide -> (its index, its bytes)."""
    import imagecodecs

    file = io.BytesIO()
    rows = []
    # Build the tar in memory: a slide's bags are some 60 MB.
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, (x, y, side, tissue) in enumerate(squares):
            pixels = slide.read(x, y, side, 8 * settings["patch_px"])
            # Keep half the colour (4:2:2): it tells nucleus from cytoplasm.
            jpg = imagecodecs.jpeg8_encode(pixels, settings["quality"], subsampling="422")
            row = dict(x=x, y=y, side=side, mags=slide.mags, tissue=tissue.round(4).tolist())
            about = json.dumps(dict(slide=slide.name, mpp=slide.mpp, **row)).encode()
            key = f"{slide_key(slide.path)}-{i:02d}"
            for suffix, content in (("json", about), ("jpg", jpg)):
                # No time, no user: the same slide gives the same bytes.
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                # The content begins behind a head of 512 bytes.
                offset = tar.offset + 512
                tar.addfile(info, io.BytesIO(content))
            rows.append(dict(key=key, jpg=[offset, len(jpg)], **row))
    about = dict(slide=slide.name, patch_px=settings["patch_px"], settings=settings)
    return dict(about, mpp=slide.mpp, doubt=slide.doubt, bags=rows), file.getbuffer()


def _tile_slide(job, out, threads, settings):
    """Write shard and index of a slide -> (number of bags, or None if it failed; a remark)."""
    path, mpp = job
    wanted = {name: settings[name] for name in ("fov_px", "parents", "min_tissue", "seed")}
    try:
        with Slide(path, mpp, threads) as slide:
            index, shard = write_bags(slide, choose_parents(slide, **wanted), settings)
    except Exception as e:
        # One bad slide must not stop the others.
        return None, str(e) if isinstance(e, ValueError) else f"{path} cannot be tiled: {e!r}"
    # A slide without bags leaves an index and no shard.
    count = len(index["bags"])
    if count:
        write_whole(out / f"bags-{slide_key(path)}.tar", shard)
    # The index comes last: a slide that has one is done.
    write_whole(out / f"bags-{slide_key(path)}.index.json", json.dumps(index))
    remark = index["doubt"] or ("" if count else "no square has enough tissue")
    return count, f"{path}: {remark}" if remark else ""


def _finished(path, mpp, out, settings):
    """Look whether a slide was tiled -> its number of bags, or None. Refuse other settings."""
    file = out / f"bags-{slide_key(path)}.index.json"
    if not file.exists():
        return None
    index = json.loads(file.read_bytes())
    if index["slide"] != path.name:
        raise ValueError(f"{file} is of {index['slide']}, not of {path}: rename one of them")
    if index["settings"] != settings or mpp not in (None, index["mpp"]):
        made = f"{file} was made with {index['settings']}, mpp {index['mpp']}"
        raise ValueError(f"{made}: repeat those or choose another --out")
    # A shard that was lost is made again.
    lost = index["bags"] and not (out / f"bags-{slide_key(path)}.tar").exists()
    return None if lost else len(index["bags"])


def _results(work, jobs, workers, threads):
    """Do the jobs, in processes if there are several workers -> results in the order of jobs."""
    if workers < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    # Spawn, because a fork of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (threads,))
    try:
        # Workers inherit the ignored Ctrl-C, and finish the slide in hand.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        results = pool.map(work, jobs)
        signal.signal(signal.SIGINT, handler)
        yield from results
    except BrokenExecutor:
        raise ValueError("a worker was killed, often for lack of memory: use fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def tile(slides, out, patch_px=224, fov_px=512, parents=20, min_tissue=0.5,
         mpp=None, seed=0, workers=1, quality=90):  # fmt: skip
    """Tile slides into one shard each; a call continues one that was stopped.

    slides are files or folders, workers are processes; the others as in main(), below.
    Returns counts: dict(slides, done, bags, empty, failed).
    """
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is {min_tissue}, not 0 to 1: give a share, such as 0.5")
    if min(patch_px, fov_px, parents) < 1:
        raise ValueError("patch_px, fov_px or parents is below 1: choose another value")
    settings = dict(patch_px=patch_px, fov_px=fov_px, parents=parents)
    settings |= dict(min_tissue=min_tissue, seed=seed, quality=quality)
    out = Path(out)
    paths = find_slides(slides)
    mpps = mpp_table(mpp, [path.name for path in paths])
    # Two commands in one folder would do the same slides.
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another tile command writes to {out}: wait for its end") from None

    # Skip what is done.
    jobs = []
    counts = []
    for path in paths:
        count = _finished(path, mpps[path.name], out, settings)
        if count is None:
            jobs.append((path, mpps[path.name]))
        else:
            counts.append(count)

    # Do the rest. A slide that fails is noted, and tried again by the next call.
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    work = functools.partial(_tile_slide, out=out, threads=threads, settings=settings)
    bar = tqdm(total=len(paths), initial=len(counts), unit="slide", disable=None)
    failures = open(out / "failures.jsonl", "w", buffering=1)
    results = contextlib.closing(_results(work, jobs, workers, threads))
    with lock, bar, failures, results as results:
        for (path, _), (count, remark) in zip(jobs, results, strict=True):
            bar.update()
            if remark:
                bar.write(remark, file=sys.stderr)
            if count is None:
                failures.write(json.dumps(dict(slide=path.name, reason=remark)) + "\n")
            else:
                counts.append(count)
    n = dict(slides=len(paths), done=len(counts), bags=sum(counts))
    return n | dict(empty=counts.count(0), failed=len(paths) - len(counts))


# ---------------------------------------------------------------- bags as a dataset


def decode_jpeg(content):
    """Decode a bag's JPEG -> uint8 [h, w, 3]."""
    try:
        import imagecodecs
    except ImportError:
        # Pillow gives the same pixels.
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return imagecodecs.jpeg8_decode(content)


class Bags(torch.utils.data.Dataset):
    """All bags of a folder of shards. ValueError names file and remedy.

    bags[i] -> dict(key, slide, index, image uint8 [3, 8S, 8S], valid bool [85])
    .keys [n], .slides [n] names, .shards paths, .shard_of [n] numbers into them, .S patch side,
    .valid bool [n, 85] (valid_nodes), .meta [n] rows of the index: x, y, side, mags, tissue, ...
    """

    def __init__(self, folder, min_node=0.1):
        self.folder = Path(folder)
        self.keys, self.slides, self.shards = [], [], []
        shard_of, jpg, valid, sizes = [], [], [], set()
        for path in sorted(self.folder.glob("bags-*.index.json")):
            index = json.loads(path.read_bytes())
            rows = index["bags"]
            if not rows:
                continue
            # The last bag must end within the shard.
            shard = path.with_name(path.name.replace(".index.json", ".tar"))
            if not shard.exists() or shard.stat().st_size < sum(rows[-1]["jpg"]):
                state = f"{shard} is missing or truncated"
                raise ValueError(f"{state}: delete it, tile its slide again")
            self.keys += [row["key"] for row in rows]
            self.slides += [index["slide"]] * len(rows)
            shard_of += [len(self.shards)] * len(rows)
            jpg += [row["jpg"] for row in rows]
            valid.append(valid_nodes(rows[0]["mags"], [row["tissue"] for row in rows], min_node))
            self.shards.append(shard)
            sizes.add(index["patch_px"])
        if len(sizes) != 1:
            found = f"patches of {sorted(sizes)} pixels" if sizes else "no bags"
            make = f"`python data.py tile SLIDES --out {folder}`"
            raise ValueError(f"{folder} holds {found}: make those of one size with {make}")
        self.S = sizes.pop()
        # Arrays need less memory than lists, in every worker of a loader.
        self.shard_of = np.array(shard_of)
        self.jpg = np.array(jpg)
        self.valid = torch.from_numpy(np.concatenate(valid))

    @functools.cached_property
    def meta(self):
        # Read these rows only where they are asked for: a training run needs none.
        rows = []
        for shard in self.shards:
            rows += json.loads(shard.with_suffix(".index.json").read_bytes())["bags"]
        return rows

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        shard = self.shards[self.shard_of[i]]
        # Read the JPEG alone: its place is known.
        offset, size = self.jpg[i]
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            image = torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
        except (RuntimeError, ValueError, OSError) as e:
            damage = f"{shard}: bag {self.keys[i]} is damaged ({e!r})"
            raise ValueError(f"{damage}: delete this file, tile its slide again") from None
        about = dict(key=self.keys[i], slide=self.slides[i], index=i)
        return dict(about, image=image, valid=self.valid[i])


# ---------------------------------------------------------------- pyramid and augmentation


def sample_nodes(B, b, generator=None):
    """Draw b of the 4 children at every kept node -> [B, N], N = 1 + b + b^2 + b^3."""
    # A row is a b-ary heap, siblings in rising order: entry j's parent is entry (j - 1) // b.
    device = generator.device if generator else "cpu"
    heap = [torch.zeros(B, 1, dtype=torch.long, device=device)]
    for _ in range(3):
        rand = torch.rand(*heap[-1].shape, 4, generator=generator, device=device)
        chosen = rand.argsort(-1)[..., :b].sort(-1).values  # [B, n, b]
        heap.append((4 * heap[-1][..., None] + 1 + chosen).flatten(1))
    return torch.cat(heap, 1)


def pyramid(images, nodes=None):
    """Cut bags uint8 [B, 3, 8S, 8S] into patches -> float32 [B, N, 3, S, S] in [0, 1].

    nodes [B, N] are from sample_nodes; default: all.
    """
    B, S, device = len(images), images.shape[-1] // 8, images.device
    if nodes is None:
        nodes = torch.arange(NODES, device=device).expand(B, NODES)
    N = nodes.shape[1]
    b = {4: 1, 15: 2, 40: 3, 85: 4}[N]

    # Sum 2 x 2 pixels three times: a parent is exactly the mean of its children. Sums of bytes are
    # exact, and 64 x 255 fits in 16 bits.
    sums = [images]
    for _ in range(3):
        rows = sums[0][..., 0::2, :].to(torch.int16) + sums[0][..., 1::2, :]
        sums.insert(0, rows[..., 0::2] + rows[..., 1::2])

    # Find the place of each node.
    bag = torch.arange(B, device=device)[:, None]
    row = torch.from_numpy(ROW).to(device, non_blocking=True)[nodes]  # [B, N]
    col = torch.from_numpy(COL).to(device, non_blocking=True)[nodes]  # [B, N]
    patches = torch.empty(B, N, 3, S, S, device=device)
    first = 0
    for level in range(4):
        # The nodes of a level follow each other.
        part = slice(first, first + b**level)
        first = part.stop
        # Take the cells of the nodes, and divide their sums once.
        cells = sums[level].unflatten(3, (-1, S)).unflatten(2, (-1, S))  # [B, 3, rows, S, cols, S]
        cells = cells[bag, :, row[:, part], :, col[:, part]]  # [B, b^level, 3, S, S]
        patches[:, part].copy_(cells).div_(255 * 4 ** (3 - level))
    return patches


def flip(patches, flips):
    """Turn or mirror all patches of a bag alike: [B, ..., S, S], flips [B] in 0..7 -> the same."""
    # It equals turning the whole bag and renaming its nodes; no loss uses the names.
    # Of a number's bits, 4 transposes, then 1 mirrors left-right and 2 up-down: 8 symmetries.
    flips = flips.view(-1, *[1] * (patches.dim() - 1))
    patches = torch.where(flips & 4 > 0, patches.transpose(-1, -2), patches)
    patches = torch.where(flips & 1 > 0, patches.flip(-1), patches)
    return torch.where(flips & 2 > 0, patches.flip(-2), patches)


def zoom(images, window):
    """Enlarge a square of each bag to the whole: uint8 [B, 3, n, n] -> the same, bilinear."""
    # window [B, 3] holds side, top and left as shares. A side s makes 5x to 5x / s.
    side, top, left = window.float().unbind(1)
    zero = torch.zeros_like(side)
    # Map output to input coordinates, both from -1 to 1.
    theta = torch.stack([side, zero, 2 * left + side - 1, zero, side, 2 * top + side - 1], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), images.shape, align_corners=False)
    near = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return near.round().clamp(0, 255).to(torch.uint8)


# Optical density of haematoxylin, eosin and a residual in red, green and blue [3]. The inverse is
# taken here, because a GPU would wait for it.
HED = [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]
HED = F.normalize(torch.tensor(HED))
UNMIX = torch.linalg.inv(HED)


def stain_jitter(patches, strength, rand):
    """Vary the staining, alike for all patches of a bag [4]: [B, ..., 3, S, S] in [0, 1]."""
    # Light is absorbed exponentially, so stains add up in optical density. There each gets a gain
    # 1 +- strength and an offset +- strength, from rand [B, 2, 3] in [0, 1).
    hed = HED.to(patches.device, non_blocking=True)
    unmix = UNMIX.to(patches.device, non_blocking=True)
    gain, offset = ((rand * 2 - 1) * strength).unbind(1)  # [B, 3], [B, 3]
    # Density -> stains, times the gain -> density: one matrix a bag.
    matrix = hed.T @ ((1 + gain)[:, :, None] * unmix.T)  # [B, 3, 3]
    ones = [1] * (patches.dim() - 4)
    # The logarithm of light is minus the density.
    light = patches.clamp(1 / 255, 1).log_()
    light = (matrix.view(-1, *ones, 3, 3) @ light.flatten(-2)).view_as(patches)
    return light.sub_((offset @ hed).view(-1, *ones, 3, 1, 1)).exp_().clamp_(max=1)


def augment(batch, jitter):
    """Cut, turn and stain a batch on its device -> patches [B, N, 3, S, S] in [0, 1].

    batch: "pixels" uint8 [B, 3, 8S, 8S], "nodes" [B, N]; optional "window" [B, 3], "flips" [B],
    "stain" [B, 2, 3]. jitter: strength of the stain jitter.
    """
    pixels = batch["pixels"]
    # Colours need float32: bfloat16 is no finer than a byte.
    with torch.autocast(pixels.device.type, enabled=False):
        if "window" in batch:
            pixels = zoom(pixels, batch["window"])
        patches = pyramid(pixels, batch["nodes"])
        if "flips" in batch:
            patches = flip(patches, batch["flips"])
        if "stain" in batch:
            patches = stain_jitter(patches, jitter, batch["stain"])
    return patches


# ---------------------------------------------------------------- the command line


def main():
    parser = argparse.ArgumentParser(description="Slides -> bags of 85 patches.")
    commands = parser.add_subparsers(required=True, metavar="tile")
    command = commands.add_parser("tile", help="write one shard a slide", allow_abbrev=False)
    add = command.add_argument
    add("slides", nargs="+", help="files or folders")
    add("--out", required=True, help="folder of shards")
    add("--patch-px", type=int, default=224, help="stored pixels a side of a patch, S")
    add("--fov-px", type=int, default=512, help="pixels a side of a parent at 5x: field of view")
    add("--parents", type=int, default=20, help="most 5x parents of a slide")
    add("--min-tissue", type=float, default=0.5, help="least tissue share of a parent")
    add("--mpp", help="microns per pixel, or a CSV of slide,mpp lines")
    add("--seed", type=int, default=0, help="which parents are drawn")
    add("--workers", type=int, default=1, help="processes, a slide each")
    add("--quality", type=int, default=90, help="quality of the JPEGs")
    args = parser.parse_args()
    n = tile(**vars(args))
    print(f"{n['bags']} bags from {n['done'] - n['empty']} of {n['slides']} slides in {args.out}")
    if n["failed"]:
        failed = f"{n['failed']} of {n['slides']} slides cannot be used"
        sys.exit(f"error: {failed}, see {args.out}/failures.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped: finished slides are kept, the same command continues", file=sys.stderr)
        sys.exit(130)
