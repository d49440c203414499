"""Read any square of a whole slide image at any scale, whatever format its scanner wrote.

x, y, side are pixels of a slide's finest level. Magnification means microns per pixel (mpp),
10 / magnification, never a file's stored level; a scale is read or given, never guessed.
"""

import contextlib
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import MAGS, mpp_of

# Slide files of a folder: tifffile reads the first seven kinds, OpenSlide the others.
SUFFIXES = ".svs .tif .tiff .btf .ndpi .scn .qptiff .mrxs .bif .vms .vmu .dcm .czi .svslide".split()
# A bad file is reported once, by this module.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

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
