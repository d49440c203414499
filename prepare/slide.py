"""Read any square of a whole slide image at any scale, whatever format its scanner wrote.

x, y, side are pixels of a slide's finest level. Magnification means microns per pixel (mpp),
10 / magnification, never a file's stored level; a scale is read or given, never guessed.
"""

import contextlib
import html
import logging
import os
import re
import sys
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

# Compressions of TIFFs: JPEG; JPEG 2000 in general, with Aperio's YCbCr and with its RGB.
JPEG = (6, 7)
JPEG_2000 = (34712, 33003, 33005)
# In a JPEG's head, Adobe's marker, or a first colour that is finer than the others.
YCBCR = re.compile(rb"\xff\xee\0\x0eAdobe|\xff[\xc0-\xc2]..\x08.{4}\x03.[^\x11]", re.DOTALL)
# Microns of the units that scales are written in.
MICRONS = {"nm": 0.001, "um": 1, "mm": 1000, "cm": 10000, "in": 25400, "inch": 25400}
# Columns in which tables name a picture, and its caption.
FILE = ("file", "filename", "image", "image name", "image_name", "image_path", "path")
CAPTION = ("caption", "text")


def on_white(image):
    """Lay a picture of any mode on white, as glass is -> PIL image, RGB."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def read_image(path):
    """Read a patch file (PNG, JPEG, TIFF) -> PIL image, RGB. ValueError names the file."""
    try:
        # A pipe or a device would be read for ever.
        if not Path(path).is_file():
            raise OSError("it is no file")
        with Image.open(path) as image:
            # Pillow would clip deeper pixels to white.
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode}, not 8-bit")
            return on_white(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} cannot be read as a picture ({e}): give 8-bit RGB") from None


def number(text):
    """Read a number as its writer meant it: 0.25, 0,25 or 2.5e-1 -> float, or None."""
    try:
        return float(str(text).replace(",", "."))
    except ValueError:
        return None


def written_scales(text, size):
    """List what a TIFF's text says of a picture's scale -> [(source, x, y, unit)], all text."""
    found = []
    for value in re.findall(r"\bMPP\s*=\s*([^\s|;]+)", text):
        found.append(("Aperio MPP", value, value, "um"))
    # OME describes several pictures: take those of this size, if one is.
    pictures = re.findall(r"<(?:\w+:)?Pixels\b[^<>]*>", text)
    same = [p for p in pictures if f'SizeX="{size[0]}"' in p and f'SizeY="{size[1]}"' in p]
    for picture in same or pictures:
        its = dict(re.findall(r'(PhysicalSize\w+)\s*=\s*"([^"]*)"', picture))
        if x := its.get("PhysicalSizeX"):
            # The sign of micro is a letter of its own, or the Greek one.
            unit = re.sub("[\u00b5\u03bc]", "u", html.unescape(its.get("PhysicalSizeXUnit", "um")))
            found.append(("OME PhysicalSizeX", x, its.get("PhysicalSizeY", x), unit))
    # Philips quotes the distance of rows, then of columns.
    for spacing in re.findall(r'DICOM_PIXEL_SPACING"[^<>]{0,200}>([^<]*)', text):
        values = html.unescape(spacing).replace('"', " ").split() or [spacing]
        found.append(("Philips DICOM_PIXEL_SPACING", values[-1], values[0], "mm"))
    return found


def reduction(size, level):
    """Return how many times smaller a level of a picture is, or 0 if its shape is another."""
    w, h = level
    d = size[0] / w
    # Odd sizes lose a column when they are halved: 4443 / 2221 is 2.
    if abs(d - round(d)) * w <= round(d):
        d = float(round(d))
    return d if abs(size[1] / d - h) <= 1 + 0.01 * h else 0


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
            # A JPEG knows its colours better than the TIFF around it. RGB is never subsampled.
            if page.compression in JPEG and page.photometric == 2:
                stored = next(k for k, size in enumerate(page.databytecounts) if size)
                if YCBCR.search((page.jpegtables or b"") + self._content(page, stored)[:4096]):
                    page.photometric = tifffile.PHOTOMETRIC.YCBCR
            # JPEGs decode to RGB whatever they store. The tiles of Ventana's BIF overlap.
            channels = page.samplesperpixel
            rgb = page.photometric == 2 and channels in (3, 4)
            rgb |= page.compression in JPEG + JPEG_2000 and channels == 3
            bif = self.file.pages.first.is_bif
            if not rgb or page.dtype != np.uint8 or page.planarconfig != 1 or bif:
                kind = f"{page.photometric.name}, {page.compression.name}"
                raise NotImplementedError(f"{channels} x {page.dtype}, {kind}")
            # Of JPEG 2000 the tile knows, not the TIFF.
            if page.compression in JPEG_2000:
                page.subsampling = (1, 1)
            # tifffile prepares a decoder at first use: now, before threads race for it.
            _ = page.decode
            strip = (page.imagewidth, page.rowsperstrip)
            self.pieces.append((page.tilewidth, page.tilelength) if page.is_tiled else strip)
        self.tile = self.pieces[0]
        self.scales = self._find_scales(series.keyframe)
        self.others = [] if self.file.is_svs else self._find_others(series)
        # Hamamatsu keeps the objective's magnification in tag 65421.
        first = self.file.pages.first
        found = re.findall(r"\bAppMag\s*=\s*([\d.,e+-]+)", first.description or "")
        self.objective = number(found[0] if found else first.tags.valueof(65421)) or 0

    def _find_scales(self, page):
        """List what the file says of a page's scale, the most trusted first -> [(x, y, source)]."""
        text = self.file.pages.first.description or ""
        written = written_scales(text, (page.imagewidth, page.imagelength))
        scales = []
        for source, *values, unit in written:
            x, y = map(number, values)
            if x and y and unit in MICRONS:
                scales.append((x * MICRONS[unit], y * MICRONS[unit], source))
        # Of several levels or pictures the finest is the slide. Keep what cannot be read as it is.
        unread = [(0, 0, " ".join(dict.fromkeys(row))) for row in written]
        scales = sorted(scales)[:1] or unread[:1]
        # The resolution is in pixels an inch (2) or a centimetre (3).
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
            unit = {2: 25400, 3: 10000}.get(page.tags.valueof("ResolutionUnit", 2), 0)
            across = page.tags.valueof("XResolution")
            down = page.tags.valueof("YResolution", across)
            x, y = (unit * per / pixels for pixels, per in (across, down))
            # Other values are a printer's 72 dpi.
            if 0.1 <= x <= 2.5:
                scales.append((x, y, "TIFF XResolution"))
        return scales

    def _find_others(self, series):
        """List the sizes of pictures that are as fine as this one and no levels of it."""
        # Focal planes, too, are pages of one size.
        pages = [s.keyframe for s in self.file.series for _ in range(len(s) - (s is series))]
        pages = [page for page in pages if page.is_tiled == series.keyframe.is_tiled]
        pages = [page for page in pages if self._find_scales(page)[:1] == self.scales[:1] != []]
        sizes = [(page.imagewidth, page.imagelength) for page in pages]
        return [size for size in sizes if reduction(self.sizes[0], size) < 1.5]

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

    def _content(self, page, k):
        # pread moves no file position, so threads may share the file.
        place = (page.databytecounts[k], page.dataoffsets[k])
        return os.pread(self.file.filehandle.fileno(), *place)

    def _decode(self, page, k):
        """Decode tile k of a page -> uint8 [h, w, 3], white if nothing is stored."""
        data = self._content(page, k)
        tables = dict(jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        tile, _, (_, h, w, _) = page.decode(data or None, k, **tables)
        if tile is None:
            return np.full((h, w, 3), 255, np.uint8)
        if tile.shape[1:3] != (h, w):
            raise ValueError(f"tile {k} is of {tile.shape}")
        tile = tile[0]
        # Damage may still decode. libjpeg makes middle grey what is missing at the end.
        jpeg = page.compression in JPEG
        if jpeg and tile[-1, -1, 0] == 128:
            grey = tile == 128
            if grey[-8:, -8:].all() and not grey.all():
                raise ValueError(f"tile {k} ends early")
        # Long zeros are damage, unless they are codes of one flat colour. deflate has a checksum.
        if bytes(64) in data and (jpeg or page.compression in (5, *JPEG_2000)):
            flat = tile.std() < 4
            if jpeg:
                # See what zeros alone become, behind the head of the tile.
                head = data[: data.find(b"\xff\xda") + 14] if page.jpegheader is None else b""
                zeros = page.decode(head + bytes(len(data)), k, **tables)[0][0, :8, :16]
                flat = (zeros == zeros[0, 0]).all()
            if not flat:
                raise ValueError(f"tile {k} holds zeros")
        # Aperio's older JPEG 2000 holds Y, Cb, Cr and does not say so. If its head (SIZ) says that
        # colours are coarser, the decoder has converted them.
        if page.compression == 33003 or (page.compression == 34712 and page.photometric == 6):
            head = data.find(b"\xff\x4f\xff\x51")
            if data[head + 46 : head + 48] == b"\1\1":
                tile = np.asarray(Image.frombytes("YCbCr", (w, h), tile.tobytes()).convert("RGB"))
        # A fourth channel is opacity. Colours are stored times it, or (2) as they are.
        if tile.shape[2] == 4:
            mode = "RGBA" if page.extrasamples == (2,) else "RGBa"
            tile = np.asarray(on_white(Image.frombytes(mode, (w, h), tile.tobytes())))
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
        x = number(found.get("openslide.mpp-x", 0))
        y = number(found.get("openslide.mpp-y", x))
        self.scales = [(x, y or x, "OpenSlide mpp-x")] if x else []
        self.objective = number(found.get("openslide.objective-power", 0)) or 0
        # It shows all pictures of a file as one.
        self.others = []

    def region(self, level, x, y, n, pool):
        # OpenSlide takes the corner in pixels of the finest level.
        d = self.file.level_downsamples[level]
        picture = self.file.read_region((round(x * d), round(y * d)), level, (n, n))
        # What was not scanned is transparent.
        return np.asarray(on_white(picture))


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
    contradicts itself or holds more than this picture, else ""; .mags that it truly holds; .levels
    [(downsample, (w, h))], finest first; .tile (w, h) of the finest. ValueError with the remedy.
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
        for i, size in enumerate(self.source.sizes):
            d = reduction(self.size, size)
            # Leave out what repeats a level or has another shape: label, macro, focus.
            if d and (d, size) not in self.levels:
                self.levels.append((d, size))
                self.stored.append(i)
        self._choose_scale(mpp)
        # Scanners call 0.20-0.28 um/px 40x and 0.45-0.55 um/px 20x: allow 20 %.
        self.mags = tuple(mag for mag in MAGS if self.mpp < 1.2 * mpp_of(mag))
        self.pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))

    def _choose_scale(self, given):
        """Take the given mpp, else the file's most trusted one. Nothing is guessed."""
        scales = [] if given is None else [(given, given, "--mpp")]
        scales += [scale for scale in self.source.scales if scale[0]]
        unread = [source for x, _, source in self.source.scales if not x]
        objective = self.source.objective
        if not scales:
            hint = "0.25 is 40x, 0.5 is 20x"
            if objective > 0:
                hint = f"its objective suggests {10 / objective:g}"
            hint += "".join(f"; it says {source}" for source in unread)
            sizes = ", ".join(f"{w} x {h}" for _, (w, h) in self.levels)
            lack = f"{self.path} ({sizes} pixels) does not say its microns per pixel"
            raise ValueError(f"{lack}: pass --mpp ({hint})")
        self.mpp, _, self.mpp_source = scales[0]
        said = f"{self.mpp:g} um/px ({self.mpp_source})"
        if not 0.1 <= self.mpp < 2.4:
            raise ValueError(f"{self.path}: {said} is not within 0.1-2.4: pass its true --mpp")
        # Doubt it if another source, or the objective, differs by half or more.
        if objective > 0:
            scales.append((10 / objective, 10 / objective, f"AppMag {objective:g}"))
        far = [f"{x:g} ({name})" for x, _, name in scales if not 2 / 3 <= x / self.mpp <= 1.5]
        uneven = [f"{x:g} x {y:g} ({name})" for x, y, name in scales if abs(y / x - 1) > 0.02]
        others = [f"{w} x {h}" for w, h in self.source.others]
        read = "only {} x {} is read, not".format(*self.size)
        doubts = ((f"{said} contradicts", far), ("this is no scale:", unread))
        doubts += (("its pixels are not square:", uneven), (read, others))
        self.doubt = "; ".join(f"{words} {', '.join(those)}" for words, those in doubts if those)

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
        return a.repeat(out // n, 1).repeat(out // n, 0) if out > n else a
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


def _slide_of(path):
    """Tell to which slide a file belongs: of DICOM, all files of a series are one."""
    if path.suffix.lower() != ".dcm":
        return path
    # The number of the series is tag (0020,000E) of the head.
    with open(path, "rb") as file:
        found = re.search(rb"\x20\0\x0e\0UI..([\d.]+)", file.read(2**16), re.DOTALL)
    return found[1] if found else path


def find_slides(paths):
    """List the slides of files and folders, sorted by name. Two of one key are refused."""
    found = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        # Take a file that is named as it is, and of a folder what a slide's name ends in.
        # Search folders in it, too: the GDC's client makes one for each slide.
        files = path.rglob("[!.]*") if path.is_dir() else [path]
        slides = [f for f in files if f == path or f.suffix.lower() in SUFFIXES]
        if not slides or not path.exists():
            raise ValueError(f"{path} is no slide or folder of slides: check the path")
        for file in slides:
            other = found.setdefault(slide_key(file), file)
            if other != file:
                raise ValueError(f"bags of {file} and {other} would share a name: rename one")
    # OpenSlide finds the other files of a DICOM series by any: keep the first.
    paths = sorted(found.values(), key=lambda path: path.name, reverse=True)
    return sorted({_slide_of(path): path for path in paths}.values(), key=lambda path: path.name)


def bare(name):
    """Take the suffix of a slide or a picture off its name; other dots belong to the name."""
    known = (*SUFFIXES, ".png", ".jpg", ".jpeg")
    return Path(name).stem if Path(name).suffix.lower() in known else name


def read_column(path, names, pattern, parse):
    """Read a CSV of slide,value lines -> {name: value} of the slides that it names.

    pattern: of a value; parse: str -> value, or None where it is none. Lines that name no slide are
    told: one may be of a slide that is written in another way.
    """
    slides = {bare(name): name for name in names}
    found, strangers = {}, []
    for i, line in enumerate(Path(path).read_text("utf-8-sig", "replace").splitlines(), 1):
        cells = re.fullmatch(rf'\s*"?(.+?)"?\s*,\s*"?({pattern})"?\s*', line)
        name, value = (bare(cells[1]), parse(cells[2])) if cells else ("", None)
        if name not in slides or value is None:
            # The first line may be a heading.
            if line.strip() and (i > 1 or re.search(r"\d", line)):
                if value is None:
                    raise ValueError(f"{path}:{i}: expected slide,value, found {line!r}: mend it")
                strangers.append(cells[1])
        elif found.setdefault(slides[name], value) != value:
            raise ValueError(f"{path}:{i}: {cells[1]} has two values: delete one")
    few = ", ".join([*strangers[:5], *["..."] * (len(strangers) > 5)])
    if not found:
        raise ValueError(f"{path} names none of the slides ({few}): give their file names")
    if strangers:
        print(f"{path}: {len(strangers)} lines name no slide here: {few}", file=sys.stderr)
    return found


def mpp_table(mpp, names):
    """Read --mpp: None, a number, or a CSV of slide,mpp lines -> {name: mpp or None}."""
    # One number is for all slides; without any they keep what their files say.
    if mpp is None or number(mpp) is not None:
        return dict.fromkeys(names, number(mpp))
    return dict.fromkeys(names) | read_column(mpp, names, r"[-+\d.,eE]+", number)
