"""Segmentation without and with masks to learn from: class scores of overlapping windows at each magnification, or a linear decoder of patch tokens.

Zero-shot: windows of the tower's S pixels at a magnification, three quarters overlapping, each scored against the class texts; a point's score is the
mean over the windows that cover it. With windows in steps of a quarter that is constant on squares ("cells") of a quarter window, so the map is
computed on cells and not on pixels. Supervised: the tower's own patch tokens, each labelled with what most of its pixels are, and one logistic
regression.

Shape letters: h, w cells of a picture down and across; K windows per side of a cell (4); P patch tokens of a window, g = sqrt(P); C classes; H, W
pixels of a mask.
"""
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import metrics
import supervised

VOID = 255  # pixels of a mask that count for nothing


def read_mask(path, C):
    """A mask picture: one channel or a palette, pixel value = number of the class, 255 = does not count -> uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a mask ({e}): give a PNG of one channel whose values are class numbers") from None
    if mask.ndim != 2 or mask.dtype not in (np.uint8, bool):
        raise ValueError(f"{path} is no mask of class numbers but {mask.dtype} of {mask.shape}: give a PNG of one 8-bit channel or a palette")
    mask = mask.astype(np.uint8)
    if (strange := np.setdiff1d(np.unique(mask), [*range(C), VOID])).size:
        raise ValueError(f"{path} holds the value {strange[0]}, and there are classes 0 to {C - 1} (255 does not count): give the classes in the order of their numbers with --classes")
    return mask


def windows(size, side, per=4):
    """Windows of `side` level-0 pixels in steps of side / per over a picture of size (W, H) -> (first cell of each across [nx], down [ny], the cells
    (w, h), the corner x, y of cell 0). All lie inside the picture but the last of a row, which ends at the edge or beyond; a picture smaller than a
    window gets one, centred."""
    starts, cells, corner = [], [], []
    for n in size:
        whole = max(per, int(np.ceil(n / side * per - 1e-9)))
        starts.append(np.arange(whole - per + 1))
        cells.append(whole)
        corner.append((n - side) / 2 if n < side else 0.0)
    return *starts, cells, corner


@torch.no_grad()
def window_scores(encode, W, slide, mag, S, device, per=4, at_once=64):
    """Mean score of the windows over each cell: encode: images -> unit vectors [N, d]; W [C, d] -> (scores [h, w, C], level-0 pixels per cell, corner
    of cell 0)."""
    side = S * data.mpp_of(mag) / slide.mpp
    nx, ny, (w, h), corner = windows(slide.size, side, per)
    total, count = np.zeros((h, w, len(W))), np.zeros((h, w, 1))
    spots = [(x, y) for y in ny for x in nx]
    for i in tqdm(range(0, len(spots), at_once), desc=f"{slide.name} at {mag}x", unit="batch", leave=False):
        part = spots[i : i + at_once]
        tiles = np.stack([slide.read(corner[0] + x * side / per, corner[1] + y * side / per, side, S) for x, y in part])
        images = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
        for (x, y), s in zip(part, (encode(images).cpu() @ W.T).numpy()):
            total[y : y + per, x : x + per] += s
            count[y : y + per, x : x + per] += 1
    return total / count, side / per, corner


def label_map(levels, size, shape, band=256):
    """The class of each pixel: levels, a list of (cells [h, w, C], level-0 pixels per cell, corner) whose scores are added -> int [H, W] for a mask
    of `shape` that covers a picture of `size` (W, H). A pixel has the scores of the cell its centre lies in. In bands of rows, because scores of all
    pixels at once would need gigabytes."""
    (H, W), out = shape, np.empty(shape, np.uint8)
    lie = lambda n, length, at, side, whole: (((np.arange(n) + 0.5) * length / n - at) / side).astype(int).clip(0, whole - 1)
    places = [(lie(H, size[1], corner[1], side, len(cells)), lie(W, size[0], corner[0], side, cells.shape[1])) for cells, side, corner in levels]
    for i in range(0, H, band):
        out[i : i + band] = sum(cells[np.ix_(rows[i : i + band], columns)] for (cells, _, _), (rows, columns) in zip(levels, places)).argmax(-1)
    return out


def zeroshot(encode, W, pairs, S, device, mpp=None, mags=data.MAGS):
    """Zero-shot segmentation of pairs [(picture, mask path)] -> {"5x" ..., "merged": confusion of pixels per picture [pictures, C, C]}
    and the last picture's label maps. Merged: at each magnification the mean score of each class over all pictures is taken off, and the rest added
    (as zeroshot.py merges)."""
    C, found = len(W), []
    for path, mask in pairs:
        with data.Slide(path, mpp) as slide:
            found.append((slide.size, {mag: window_scores(encode, W, slide, mag, S, device) for mag in mags if mag in slide.mags}))
    names = [mag for mag in mags if any(mag in f for _, f in found)]
    centre = {mag: np.mean([f[mag][0].mean((0, 1)) for _, f in found if mag in f], 0) for mag in names}
    out, maps = {f"{mag}x": [] for mag in names} | {"merged": []}, {}
    for (size, levels), (_, mask) in zip(found, pairs):
        truth = read_mask(mask, C)
        maps = {"truth": truth} | {f"{mag}x": label_map([level], size, truth.shape) for mag, level in levels.items()}
        maps["merged"] = label_map([(cells - centre[mag], side, corner) for mag, (cells, side, corner) in levels.items()], size, truth.shape)
        for name in maps.keys() - {"truth"}:
            out[name].append(pixels(truth, maps[name], C))
    return {name: np.stack(m) for name, m in out.items() if m}, maps


def check_masks(pairs, C, mpp=None):
    """Look through the masks of pairs [(picture, mask path)] before hours are spent: each may be smaller than its picture, but not of another shape.
    ValueError names it."""
    for path, mask in pairs:
        truth = read_mask(mask, C)
        with data.Slide(path, mpp) as slide:
            (W, H), (h, w) = slide.size, truth.shape
        if abs(W * h - H * w) > max(W, H):
            raise ValueError(f"{mask} is {w} x {h} and its picture {path} {W} x {H} pixels, which is another shape: the mask belongs to another picture")


def pixels(truth, found, C):
    """Confusion [C, C] of a mask's pixels with those of a label map; VOID left out."""
    there = truth != VOID
    return metrics.confusion(truth[there], found[there], C)


def summary(m, groups=None, times=1000, seed=0):
    """Confusions per picture [pictures, C, C] -> dict: Dice of each class over all pixels, their mean, its 95 % interval over groups (else pictures)."""
    each, n = metrics.dice(m.sum(0)), len(m)
    if groups is not None:
        m = np.stack([m[np.asarray(groups) == g].sum(0) for g in dict.fromkeys(groups)])
    drawn = np.random.default_rng(seed).multinomial(len(m), np.full(len(m), 1 / len(m)), times)
    mean = lambda d: np.where(np.isnan(d), 0, d).sum(-1) / (~np.isnan(d)).sum(-1)
    return {"dice": each.tolist(), "mean": float(mean(each)), "interval": metrics.interval(mean(metrics.dice(np.tensordot(drawn, m, 1))) if len(m) > 1 else []), "n": n}


# ----------------------------------------------------------------------------------------------------------------------
# With masks to learn from

@torch.no_grad()
def tokens_of(vision, slide, mask, mag, device, C, at_once=32):
    """Patch tokens of windows side by side -> (x [R, D], y [R] the class of most of a token's pixels or -1, spots [R, 4] the pixels of the mask that
    it covers: top, bottom, left, right)."""
    S, g = vision.size, vision.grid
    side = S * data.mpp_of(mag) / slide.mpp
    nx, ny, _, corner = windows(slide.size, side, per=1)
    H, W = mask.shape
    spots, x, y, boxes = [(a, b) for b in ny for a in nx], [], [], []
    for i in range(0, len(spots), at_once):
        tiles = np.stack([slide.read(corner[0] + a * side, corner[1] + b * side, side, S) for a, b in spots[i : i + at_once]])
        x.append(vision(torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255)[:, 1:].float().cpu().flatten(0, 1).numpy())      # [N P, D]
    for a, b in spots:
        for r in range(g):
            for c in range(g):
                box = [(corner[1] + (b + r / g) * side) * H / slide.size[1], (corner[1] + (b + (r + 1) / g) * side) * H / slide.size[1],
                       (corner[0] + (a + c / g) * side) * W / slide.size[0], (corner[0] + (a + (c + 1) / g) * side) * W / slide.size[0]]
                top, bottom, left, right = (int(round(v)) for v in np.clip(box, 0, [H, H, W, W]))
                inside = mask[top:bottom, left:right]
                count = np.bincount(inside[inside != VOID], minlength=C)
                y.append(count.argmax() if count.sum() else -1)
                boxes.append((top, bottom, left, right))
    return np.concatenate(x), np.array(y), np.array(boxes)


def decoder(vision, train, test, C, device, mag=20, mpp=None, most=20000, seed=0):
    """Linear decoder: logistic regression on the patch tokens of pairs [(picture, mask)] `train`, at most `most` of them, applied to those of `test`
    -> (confusions per test picture [pictures, C, C], the last picture's label map)."""
    def read(pairs):
        for path, mask in tqdm(pairs, desc=f"tokens at {mag}x", unit="picture", leave=False):
            with data.Slide(path, mpp) as slide:
                truth = read_mask(mask, C)
                yield truth, *tokens_of(vision, slide, truth, mag, device, C)
    rng, xs, ys = np.random.default_rng(seed), [], []
    for _, x, y, _ in read(train):                                                     # as many of each picture, so that no more are held than are learned from
        rows = rng.permutation(np.flatnonzero(y >= 0))[: max(1, most // len(train))]
        xs, ys = [*xs, x[rows]], [*ys, y[rows]]
    W, b = supervised.fit_logistic(np.concatenate(xs), np.concatenate(ys), C)
    out, found = [], None
    for truth, x, _, boxes in read(test):
        found = np.zeros(truth.shape, np.int64)
        for p, (top, bottom, left, right) in zip((torch.from_numpy(x).double() @ W.T + b).argmax(1).tolist(), boxes):
            found[top:bottom, left:right] = p
        out.append(pixels(truth, found, C))
    return np.stack(out), found
