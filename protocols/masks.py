"""Lay cells over a picture and its mask: what segmentation reads, in squares.

Not a command: protocols.segment scores cells by text or by a decoder, and labels pixels by them.

Shape letters: R pictures, h, w cells, C classes, D width of a token, H, W pixels of a mask.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import evaluate
from prepare.slide import Slide, read_image, resize

VOID = 255  # pixels of a mask that count for nothing
FLAT = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


# ---- Pictures and masks -------------------------------------------------------------------------
class Flat:
    """A picture of one level, with the members of Slide that are used here."""

    def __init__(self, path, mpp):
        if not mpp:
            raise ValueError(f"{path} does not say its microns per pixel: pass --mpp (0.5 is 20x)")
        self.name = Path(path).name
        self.image = read_image(path)
        self.size = self.image.size
        self.mpp = mpp
        self.mags = tuple(mag for mag in data.MAGS if mpp < 1.2 * data.mpp_of(mag))

    def read(self, x, y, side, out):
        """Read the square (x, y, side) -> uint8 [out, out, 3], white outside the picture."""
        n = max(1, round(side))
        canvas = Image.new("RGB", (n, n), "white")
        canvas.paste(self.image, (-round(x), -round(y)))
        return resize(np.asarray(canvas), out)


def open_picture(path, mpp=None):
    """Open a flat picture or a slide, for a `with` statement."""
    flat = Path(path).suffix.lower() in FLAT
    return nullcontext(Flat(path, mpp)) if flat else Slide(path, mpp)


def read_mask(path, C):
    """Read a mask: one channel or a palette, values 0 to C - 1 or 255 -> uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} cannot be read as a mask ({e}): give a PNG") from None
    if mask.ndim != 2 or mask.dtype not in (np.uint8, bool) or image.format == "JPEG":
        found = f"{image.format}, {mask.dtype} of {mask.shape}"
        raise ValueError(f"{path} is no mask but {found}: give a PNG of one 8-bit channel")
    mask = mask.astype(np.uint8)
    # A value without a class is an error of the table, not of the mask.
    strange = np.setdiff1d(mask, [*range(C), VOID])
    if len(strange):
        known = f"classes are 0 to {C - 1} (255 does not count)"
        raise ValueError(f"{path} holds {strange[0]}, but {known}: complete --classes")
    return mask


def check_masks(pairs, names, mpp=None):
    """Look through all pairs [(picture, mask)] -> bool [R, C], which mask holds which class."""
    C = len(names)
    holds = np.zeros((len(pairs), C + 1), bool)  # the last column is of VOID
    for row, (path, file) in zip(holds, pairs, strict=True):
        mask = read_mask(file, C)
        h, w = mask.shape
        with open_picture(path, mpp) as picture:
            W, H = picture.size
        # A mask may be smaller than its picture, but not of another shape.
        if abs(W * h - H * w) > max(W, H):
            sizes = f"{w} x {h} pixels, its picture {path} {W} x {H}"
            raise ValueError(f"{file} is {sizes}: give the mask of this picture")
        row[np.minimum(np.unique(mask), C)] = True
    # A single class is always found. Masks of 0 and 255 have one, as 255 does not count.
    held = holds.any(0)
    if held[:C].sum() < 2:
        values = " and ".join(str(c if c < C else VOID) for c in np.flatnonzero(held))
        remedy = f"write all classes as 0 to {C - 1}, since {VOID} does not count"
        raise ValueError(f"{file} and all other masks hold only {values}: {remedy}")
    if not held[:C].all():
        print(f"no mask holds {', '.join(np.array(names)[~held[:C]])}")
    return holds[:, :C]


# ---- Cells --------------------------------------------------------------------------------------
class Cells(NamedTuple):
    """What is known of each cell of a picture, and where the cells lie."""

    values: np.ndarray  # [h, w, C or D]
    side: float  # pixels of the picture
    corner: tuple  # (x, y) of the first cell
    size: tuple  # (width, height) of the picture


def scan(picture, mag, S, encode, cells=1, at_once=32):
    """Encode windows of S pixels that begin at every cell -> Cells, of the windows' first cells.

    encode: images [N, 3, S, S] in [0, 1] -> tensor [N, ...]. A window is `cells` cells wide. The
    last one of a row may hang over; a picture smaller than a window has it centred.
    """
    side = S * data.mpp_of(mag) / picture.mpp
    step = side / cells
    # Count the windows across and down; the last may hang over by less than a cell.
    across, down = (max(1, math.ceil(n / step - 1e-9) - cells + 1) for n in picture.size)
    left, top = (min(0.0, (n - side) / 2) for n in picture.size)
    spots = [(left + x * step, top + y * step) for y in range(down) for x in range(across)]
    found = []
    title = f"{picture.name}, {len(spots)} windows"
    for i in data.progress(range(0, len(spots), at_once), title, leave=False):
        tiles = np.stack([picture.read(x, y, side, S) for x, y in spots[i : i + at_once]])
        images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        found.append(encode(images).float().cpu())
    values = torch.cat(found).numpy()
    values = values.reshape(down, across, *values.shape[1:])
    return Cells(values, step, (left, top), tuple(picture.size))


def place_pixels(shape, cells):
    """Find the cell that the centre of each pixel of a mask lies in -> (rows [H], columns [W])."""
    found = []
    for axis in (1, 0):
        n = shape[1 - axis]
        # A mask may be coarser than its picture.
        centres = (np.arange(n) + 0.5) * cells.size[axis] / n
        number = ((centres - cells.corner[axis]) / cells.side).astype(int)
        found.append(number.clip(0, cells.values.shape[1 - axis] - 1))
    return found


def label_pixels(layers, mask, C, band=256):
    """Label pixels by the summed scores of several Cells -> (uint8 [H, W], confusion [C, C]).

    The confusion counts pixels by their class in the mask [H, W] and their label.
    """
    found = np.empty(mask.shape, np.uint8)
    places = [place_pixels(mask.shape, cells) for cells in layers]
    # Scores of all pixels at once would need gigabytes.
    for top in range(0, len(mask), band):
        total = 0
        for cells, (rows, columns) in zip(layers, places, strict=True):
            total = total + cells.values[np.ix_(rows[top : top + band], columns)]
        found[top : top + band] = total.argmax(-1)
    use = mask != VOID
    return found, evaluate.confusion(mask[use].astype(int), found[use], C)


def label_cells(mask, cells, C):
    """Give each cell the class of most of its pixels -> int [h, w], -1 if none counts."""
    h, w = cells.values.shape[:2]
    rows, columns = place_pixels(mask.shape, cells)
    # Count the classes of the pixels in each cell.
    number = rows[:, None] * w + columns
    use = mask != VOID
    count = np.bincount(number[use] * C + mask[use], minlength=h * w * C).reshape(h, w, C)
    return np.where(count.any(-1), count.argmax(-1), -1)
