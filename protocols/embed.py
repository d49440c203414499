"""Cut labelled pictures into tiles of a magnification, and embed them.

Not a command: protocols.pictures and protocols.finetune read pictures by it.
Shape letters: R pictures, L magnifications (1 without mpp), T tiles of S pixels, D width.
"""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import evaluate
from prepare.slide import read_image
from protocols import labelled


def at_magnification(image, mpp, mag, S):
    """Resample a PIL image of `mpp` um per pixel -> tiles uint8 [T, S, S, 3], whole and centred.

    A side shorter than S is continued by its mirror image: it keeps its scale and gets no edge.
    """
    size = [max(1, round(n * mpp / data.mpp_of(mag))) for n in image.size]
    a = np.asarray(image.resize(size, Image.BICUBIC))
    # Continue what is too small.
    lack = [max(0, S - n) for n in a.shape[:2]]
    a = np.pad(a, [(n // 2, n - n // 2) for n in lack] + [(0, 0)], mode="symmetric")
    # Cut as many whole squares as fit.
    rows, cols = (n // S for n in a.shape[:2])
    top, left = (n % S // 2 for n in a.shape[:2])
    a = a[top : top + rows * S, left : left + cols * S]
    return a.reshape(rows, S, cols, S, 3).swapaxes(1, 2).reshape(-1, S, S, 3)


class Tiles(Dataset):
    """Read pictures -> (tiles uint8 [T, 3, S, S], magnification's number [T]), or why not (str).

    Without mpp the one tile is the centred square; with it tiles come at four magnifications.
    """

    def __init__(self, files, S, mpp=None):
        self.files, self.S, self.mpp = files, S, mpp

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = read_image(self.files[i])
        except ValueError as e:
            return str(e)
        if self.mpp:
            parts = [at_magnification(image, self.mpp, mag, self.S) for mag in data.MAGS]
        else:
            parts = [np.asarray(ImageOps.fit(image, (self.S, self.S), Image.BICUBIC))[None]]
        level = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        tiles = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
        return tiles, torch.from_numpy(level)


def embed_files(peer, files, mpp=None, w=None):
    """Embed pictures -> dict of arrays [R, L, D] as of evaluate.embed_images, w too.

    The tiles of a magnification are averaged; a picture that cannot be read is NaN.
    """
    cuda = next(peer.model.parameters()).is_cuda
    workers = min(8, os.cpu_count() or 1) if cuda else 0
    S = peer.model.vision.size
    # With magnifications a picture has hundreds of tiles: read few at once.
    at_once = 4 if mpp else 128
    loader = DataLoader(Tiles(files, S, mpp), at_once, collate_fn=list, num_workers=workers)
    # A tile of no magnification stands for what cannot be read.
    none = torch.zeros(1, 3, S, S, dtype=torch.uint8), torch.tensor([-1])
    found = {}
    for batch in data.progress(loader, "pictures", leave=False):
        for i, item in enumerate(batch):
            if isinstance(item, str):
                tqdm.write(f"left out: {item}", file=sys.stderr)
                batch[i] = none
        images = torch.cat([tiles for tiles, _ in batch]).float() / 255
        for name, x in evaluate.embed_images(peer.model, images, w, peer.k_o).items():
            # Average each picture's tiles by magnification.
            parts = x.split([len(tiles) for tiles, _ in batch])
            for (_, level), part in zip(batch, parts, strict=True):
                means = [part[level == k].mean(0) for k in range(4 if mpp else 1)]
                found.setdefault(name, []).append(torch.stack(means).numpy())
    return {name: np.stack(x) for name, x in found.items()}


def embed_pictures(peer, pictures, folder, mpp=None, guided=False, at_once=2000):
    """Run `embed_files` in pieces that stay in folder/features, so that it can be interrupted.

    Returns what it finds of the pictures that can be read, and "ok" bool [R], which those are. The
    name of a piece tells weights, files, magnifications and keywords: others are not read.
    """
    w = evaluate.embed_texts(peer.model, peer.tokenizer, list(peer.keywords)) if guided else None
    guide = [list(peer.keywords), peer.k_o] if guided else []
    key = labelled.digest([pictures.stamp, peer.fingerprint, mpp, guide])
    found = {}
    for start in range(0, len(pictures), at_once):
        path = Path(folder) / "features" / f"{key}-{start:07d}.npz"
        if not path.exists():
            piece = embed_files(peer, pictures.files[start : start + at_once], mpp, w)
            data.write_whole(path, partial(np.savez, **piece))
        with np.load(path) as piece:
            for name in piece:
                found.setdefault(name, []).append(piece[name])
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    ok = ~np.isnan(found["backbone"]).any((1, 2))
    if not ok.any():
        raise ValueError(f"no picture of {pictures.name} can be read: see above")
    return {name: x[ok] for name, x in found.items()} | {"ok": ok}
