"""Lay cells over a picture and its mask: what segmentation reads, in squares.

Not a command: protocols.segment scores cells by text or by a decoder, and labels pixels by them.

Shape letters: h, w cells, C classes, D width of a token, H, W pixels of a mask, S pixels a side of
a window.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import evaluate
from prepare.slide import Slide, resize

VOID = 255  # pixels of a mask that count for nothing
FLAT = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# ---- Pictures and masks -------------------------------------------------------------------------


class Flat:
    """A picture of one level, with the members of Slide that are used here."""

    def __init__(self, path, mpp):
        if not mpp:
            raise ValueError(f"{path} does not say its microns per pixel: pass --mpp (0.5 is 20x)")
        self.name = Path(path).name
        self.pixels = np.asarray(data.read_image(path))
        self.size = self.pixels.shape[1::-1]
        self.mpp = mpp
        self.mags = tuple(mag for mag in data.MAGS if mpp < 1.2 * data.mpp_of(mag))

    def read(self, x, y, side, out):
        """Read the square (x, y, side) -> uint8 [out, out, 3], white outside the picture."""
        n = max(1, round(side))
        x = round(x)
        y = round(y)
        canvas = np.full((n, n, 3), 255, np.uint8)
        # Paste what lies inside on white.
        part = self.pixels[max(y, 0) : max(y + n, 0), max(x, 0) : max(x + n, 0)]
        top, left = max(-y, 0), max(-x, 0)
        canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
        return resize(canvas, out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def open_picture(path, mpp=None):
    """Open a flat picture or a slide."""
    return Flat(path, mpp) if Path(path).suffix.lower() in FLAT else Slide(path, mpp)


def read_mask(path, C):
    """Read a mask: one channel or a palette, values 0 to C - 1 or 255 -> uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a mask ({e}): give a PNG") from None
    if mask.ndim != 2 or mask.dtype not in (np.uint8, bool):
        found = f"{mask.dtype} of {mask.shape}"
        raise ValueError(f"{path} is no mask but {found}: give a PNG of one 8-bit channel")
    mask = mask.astype(np.uint8)
    # A value without a class is an error of the table, not of the mask.
    strange = np.setdiff1d(mask, [*range(C), VOID])
    if len(strange):
        known = f"classes are 0 to {C - 1} (255 does not count)"
        raise ValueError(f"{path} holds {strange[0]}, but {known}: complete --classes")
    return mask


def check_masks(pairs, C, mpp=None):
    """Look through all pairs [(picture, mask)] before hours are spent on them."""
    for path, mask in pairs:
        h, w = read_mask(mask, C).shape
        with open_picture(path, mpp) as picture:
            W, H = picture.size
        # A mask may be smaller than its picture, but not of another shape.
        if abs(W * h - H * w) > max(W, H):
            sizes = f"{w} x {h} pixels, its picture {path} {W} x {H}"
            raise ValueError(f"{mask} is {sizes}: give the mask of this picture")


# ---- Cells --------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """What is known of each cell of a picture, and where the cells lie."""

    values: np.ndarray  # [h, w, C or D]
    side: float  # pixels of the picture
    corner: tuple  # (x, y) of the first cell


def windows(size, side, cells=4):
    """Lay windows over a picture of size (W, H), in steps of a cell, side / cells.

    Returns first cells of the windows across [n], and down [n]; (w, h) cells in all; (x, y) of the
    first. The last window of a row may hang over; a picture smaller than a window has it centred.
    """
    starts = []
    counts = []
    corner = []
    # Along each axis: the last window may hang over by less than a cell.
    for length in size:
        count = max(cells, int(np.ceil(length / side * cells - 1e-9)))
        starts.append(np.arange(count - cells + 1))
        counts.append(count)
        corner.append(min(0.0, (length - side) / 2))
    return *starts, tuple(counts), tuple(corner)


def place_pixels(shape, size, cells):
    """Find the cell that the centre of each pixel of a mask lies in -> (rows [H], columns [W])."""
    found = []
    for axis in (1, 0):
        n = shape[1 - axis]
        # A mask may be coarser than its picture.
        centres = (np.arange(n) + 0.5) * size[axis] / n
        number = ((centres - cells.corner[axis]) / cells.side).astype(int)
        found.append(number.clip(0, cells.values.shape[1 - axis] - 1))
    return found


def label_map(layers, size, shape, band=256):
    """Label the pixels of a mask by the sum of the scores of several Cells -> uint8 [H, W].

    size (W, H) of the picture that the mask of `shape` covers.
    """
    found = np.empty(shape, np.uint8)
    places = [place_pixels(shape, size, cells) for cells in layers]
    # Scores of all pixels at once would need gigabytes.
    for top in range(0, shape[0], band):
        total = 0
        for cells, (rows, columns) in zip(layers, places, strict=True):
            total = total + cells.values[np.ix_(rows[top : top + band], columns)]
        found[top : top + band] = total.argmax(-1)
    return found


def read_windows(picture, side, spots, S, at_once=32):
    """Yield (images [N, 3, S, S] in [0, 1], their spots) of squares at spots [(x, y)]."""
    title = f"{picture.name}, {len(spots)} windows"
    for i in tqdm(range(0, len(spots), at_once), title, leave=False, disable=None):
        part = spots[i : i + at_once]
        # Read a batch of windows at a time.
        tiles = np.stack([picture.read(x, y, side, S) for x, y in part])
        yield torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255, part


def confusion(truth, found, C):
    """Count the pixels of a mask and of a label map that count -> [C, C]."""
    use = truth != VOID
    return evaluate.confusion(truth[use], found[use], C)
