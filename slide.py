"""Slide files: reading any square of a pyramidal TIFF by microns, and where on it there is tissue.

Magnification means microns per pixel, mpp = 10 / magnification; a level's index never stands for one. A square is read from the
coarsest stored level that is fine enough, every stored tile decoded once, then reduced to the size asked for. Coordinates x, y,
side are level-0 pixels. data.py makes bags of what this file reads; `from data import Slide` works too.
"""
import logging, os, re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, tifffile, torch

MAGS = (5, 10, 20, 40)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)                # a bad file is reported once, by us

def mpp_of(mag):
    """Microns per pixel at a magnification: 2.0 at 5x, 0.25 at 40x."""
    return 10 / mag

class Slide:
    """A TIFF-family slide: SVS or pyramidal TIFF; JPEG, JPEG 2000, LZW, deflate or raw; tiles or strips; 8-bit RGB.

    .name file name; .size (W, H); .mpp level-0 microns per pixel and .mpp_source its origin (`mpp` overrides the file's);
    .mags the magnifications truly in it; .levels [(downsample, (w, h))], finest first. `threads` tiles are decoded at a time
    (decoders release the interpreter lock). Raises ValueError or OSError: one sentence with the file and the remedy."""

    def __init__(self, path, mpp=None, threads=None):
        self.path, self.name = str(path), Path(path).name
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        try:
            self.tif = tifffile.TiffFile(path)
            # Aperio tiles its levels and nothing else (thumbnail, label, macro); elsewhere the slide is the largest series
            series = max(self.tif.series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
            tiled = [p for p in self.tif.pages if p.is_tiled] if self.tif.is_svs else []
            pages = tiled or [lev.keyframe for lev in series.levels]
            end = max((o + n for p in pages if p.decode for o, n in zip(p.dataoffsets, p.databytecounts)), default=0)
        except Exception as e:                            # tifffile has no one class of error for what is not a sound TIFF
            raise ValueError(f"{path} cannot be opened as a TIFF-family slide ({_line(e)}): it is damaged or of another kind; "
                             "copy it again or convert it to a tiled pyramidal TIFF") from e
        if not 0 < end <= os.path.getsize(path):
            raise ValueError(f"{path} is truncated (tiles to byte {end:,}, file of {os.path.getsize(path):,}): copy it again")
        self.size = W, H = pages[0].imagewidth, pages[0].imagelength
        self.levels, self.pages = [], []
        for p in pages:
            w, h, d = p.imagewidth, p.imagelength, W / p.imagewidth
            if abs(d - round(d)) * w <= round(d):         # 4443 / 2221 is a halving that dropped a column, not 2.0005
                d = float(round(d))
            if p.dtype != np.uint8 or p.samplesperpixel not in (3, 4) or p.planarconfig != 1:
                raise ValueError(f"{path} is not 8-bit RGB ({p.samplesperpixel} channels of {p.dtype}): convert it first")
            if abs(H / d - h) <= 1 + 0.01 * h and (w, h) not in dict(self.levels).values():     # else another picture, or focus
                self.levels.append((d, (w, h)))
                self.pages.append(p)
        self.mpp, self.mpp_source = self._mpp(mpp)
        if not 0.02 < self.mpp < 2.4:
            raise ValueError(f"{path}: {self.mpp:g} um/px ({self.mpp_source}) is not within 0.02-2.4: pass its true --mpp")
        # 40x needs 0.3 um/px or finer, 20x 0.6, ...: what scanners call 40x spreads over 0.2-0.28, their 20x over 0.45-0.55
        self.mags = tuple(m for m in MAGS if self.mpp < 1.2 * mpp_of(m))
        self.pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))

    def _mpp(self, given):
        tags, text = self.tif.pages[0].tags, self.tif.pages[0].description or ""
        unit = {2: 25400, 3: 10000}.get(int(tags.valueof("ResolutionUnit", 2)), 0)      # microns per inch, per cm
        num, den = tags.valueof("XResolution", (0, 1))
        tiff, aperio, app = unit * den / max(num, 1), *(re.search(rf"\b{k}\s*=\s*([\d.]+)", text) for k in ("MPP", "AppMag"))
        if given is not None:
            return float(given), "--mpp"
        if aperio:
            return float(aperio[1]), "Aperio MPP"
        if 0.1 <= tiff <= 2.5:                            # beyond that it is a printer's 72 dpi, not a microscope's
            return tiff, "TIFF XResolution"
        hint = f"its AppMag of {app[1]} is no scale, but suggests {10 / float(app[1]):g}" if app else "about 0.25 if scanned at 40x"
        raise ValueError(f"{self.path} does not say its microns per pixel: pass --mpp ({hint})")

    def best_level(self, downsample):
        """Index of the coarsest stored level at least as fine as `downsample` (1 % slack for odd level sizes)."""
        return max((d, i) for i, (d, _) in enumerate(self.levels) if d <= max(1, downsample) * 1.01)[1]

    def read(self, x, y, side, out):
        """The square (x, y, side) -> uint8 [out, out, 3], each pixel the average of what it covers (see `resize`), white
        outside the slide. Any numbers will do; corners are exact to half a pixel of the level that is read."""
        i = self.best_level(side / out)
        d, page = self.levels[i][0], self.pages[i]
        x, y, n = round(x / d), round(y / d), max(1, round(side / d))
        th, tw = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        top, left, bottom, right = y // th, x // tw, -(-(y + n) // th), -(-(x + n) // tw)
        down, across = -(-page.imagelength // th), -(-page.imagewidth // tw)
        # the canvas is aligned to the tiles: each is decoded once and lands whole, and the square is a view of the canvas
        canvas = np.full(((bottom - top) * th, (right - left) * tw, 3), 255, np.uint8)

        def paste(rc):
            r, c = rc
            tile = self._tile(page, r * across + c)
            if tile is not None:                          # the last tiles hang over the slide's edge: cut them there
                tile = tile[:page.imagelength - r * th, :page.imagewidth - c * tw]
                canvas[(r - top) * th:, (c - left) * tw:][:len(tile), :tile.shape[1]] = tile
        list(self.pool.map(paste, [(r, c) for r in range(max(0, top), min(down, bottom))
                                   for c in range(max(0, left), min(across, right))]))
        return resize(canvas[y - top * th:, x - left * tw:][:n, :n], out)

    def _tile(self, page, k):                             # tile or strip k -> uint8 [h, w, 3]; None if none was stored
        if not page.databytecounts[k]:
            return None
        try:                                              # pread moves no file position, so threads may share the handle
            data = os.pread(self.tif.filehandle.fileno(), page.databytecounts[k], page.dataoffsets[k])
            return page.decode(data, k, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0][0, :, :, :3]
        except Exception as e:
            raise ValueError(f"{self.path}: tile {k} of its {page.imagewidth} x {page.imagelength} level cannot be decoded "
                             f"({_line(e)}): the file is damaged, copy it again or leave it out") from e

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()
        self.tif.close()

def _line(e):
    return " ".join(str(e).split())[:150] or type(e).__name__

def resize(a, out):
    """uint8 [n, n, 3] -> [out, out, 3]. Whole factors are exact: the mean of k x k pixels, or each pixel repeated, which
    averaging undoes. Others use the anti-aliased triangle filter, which UNI's own pre-processing applies to 512-pixel patches."""
    n, k = len(a), max(1, len(a) // out)
    if n == out:
        return np.ascontiguousarray(a)
    if n == k * out:
        small = np.empty((out, out, 3), np.uint8)
        for i in range(0, out, 16):                       # in bands that stay in the cache
            rows = sum(a[i * k + j:(i + 16) * k:k].astype(np.uint32 if k > 16 else np.uint16) for j in range(k))
            small[i:i + 16] = (sum(rows[:, j::k] for j in range(k)) + k * k // 2) // (k * k)
        return small
    if out % n == 0:
        return a.repeat(out // n, 0).repeat(out // n, 1)
    x = torch.from_numpy(np.ascontiguousarray(a)).permute(2, 0, 1)[None]    # channels-last uint8: torch's fastest path
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

# ---------------------------------------------------------------- tissue and parents

def tissue_mask(slide, um=8.0, low=6, high=12):
    """-> (mask bool [h, w], scale): where tissue is, at about `um` microns (`scale` level-0 pixels) per mask pixel.

    Haematoxylin and eosin both absorb green more than red or blue; glass, fat vacuoles, dust and green pen do not. So stain
    is (R + B) / 2 - G in grey levels, cut at Otsu's threshold. `low` and `high` bound it: on a slide that is all glass Otsu
    would split noise, on one that is all tissue it would discard the pale half."""
    scale = max(1, round(um / slide.mpp))
    r, g, b = np.moveaxis(thumbnail(slide, scale).astype(np.int16), 2, 0)
    stain = np.clip((r + b) // 2 - g, 0, 255)
    count = np.bincount(stain.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), (count * np.arange(256)).cumsum()
    between = (total[-1] * below - total * below[-1]) ** 2 / np.maximum(below * (below[-1] - below), 1)    # Otsu 1979, eq. 18
    votes = np.pad((stain > np.clip(between.argmax(), low, high)).astype(np.int8), 1, mode="edge")
    votes = votes[:-2] + votes[1:-1] + votes[2:]          # the majority of 3 x 3 drops specks and closes pinholes, but a fat
    return votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:] > 4, scale       # cell, 50-100 um wide, stays a hole

def tissue_fraction(mask, scale, x, y, side):
    """Tissue share of squares (int arrays of one shape), exact also where they cut mask pixels; off the slide counts as glass."""
    table = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))             # summed areas
    def area(u, v):                                       # mask left of u and above v: bilinear in the table
        u, v = np.clip(u / scale, 0, mask.shape[1]), np.clip(v / scale, 0, mask.shape[0])
        j, i = np.minimum(u.astype(int), mask.shape[1] - 1), np.minimum(v.astype(int), mask.shape[0] - 1)
        a, b = u - j, v - i
        return (1 - b) * ((1 - a) * table[i, j] + a * table[i, j + 1]) + b * ((1 - a) * table[i + 1, j] + a * table[i + 1, j + 1])
    return (area(x + side, y + side) - area(x, y + side) - area(x + side, y) + area(x, y)) * (scale / side) ** 2
