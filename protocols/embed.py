"""Cut labelled pictures into tiles of a magnification, and embed them, or read their features.

Not a command: protocols.pictures, slides and finetune read by it. Features made elsewhere are
.npz, .npy, .pt, .h5 or .hdf5 with an array `features`; those of pictures also have `files` or
`names`.

Every tower gets pictures that are resized bicubically, as CLIP does. UNI's own pre-processing is
bilinear, and so are our training patches: on a picture of 256 px, pixels differed by .0023 of their
range in the mean.

Shape letters: R pictures, L magnifications (1 without mpp), T tiles of S pixels, D width.
"""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
import evaluate
from prepare.slide import read_image
from protocols import labelled, peers

KINDS = (".npz", ".npy", ".pt", ".h5", ".hdf5")


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
            # Crop before resizing: what lies outside must not reach the tile.
            w, h = image.size
            n = min(w, h)
            left, top = (w - n) // 2, (h - n) // 2
            image = image.crop((left, top, left + n, top + n))
            parts = [np.asarray(image.resize((self.S, self.S), Image.BICUBIC))[None]]
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
    bar = data.progress(loader, "pictures", leave=False)
    for batch in bar:
        for i, item in enumerate(batch):
            if isinstance(item, str):
                bar.clear()
                print(f"left out: {item}", file=sys.stderr)
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
    root = os.path.commonpath([path.parent for path in pictures.files])
    found = {}
    for start in range(0, len(pictures), at_once):
        path = Path(folder) / "features" / f"{key}-{start:07d}.npz"
        files = pictures.files[start : start + at_once]
        if not path.exists():
            piece = embed_files(peer, files, mpp, w)
            names = [os.path.relpath(file, root) for file in files]
            data.write_whole(path, partial(np.savez, **piece, files=names))
        with np.load(path) as piece:
            for name in set(piece) - {"files"}:
                found.setdefault(name, []).append(piece[name])
    return keep_known({name: np.concatenate(parts) for name, parts in found.items()}, pictures)


def keep_known(found, pictures):
    """Keep the rows of features [R, L, D] that are known, and add "ok" bool [R], which these are.

    ValueError if there is none.
    """
    ok = ~np.isnan(found["backbone"]).any((1, 2))
    if not ok.any():
        raise ValueError(f"no picture of {pictures.name} can be read or has features: see above")
    return {name: x[ok] for name, x in found.items()} | {"ok": ok}


# ---- Features made elsewhere --------------------------------------------------------------------
def stand_in(path):
    """Stand in for the unknown model of a file or folder of features -> Peer without a model."""
    path = Path(path).resolve()
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path]
    if not files[0].exists():
        raise ValueError(f"--features {path} does not exist: give features made elsewhere")
    told = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return peers.Peer(None, None, path.name.removesuffix(".npz"), labelled.digest(told))


def read_features(path, wanted):
    """Read arrays `wanted` of a file of features, as many as it has -> {name: array}."""
    try:
        if path.suffix in (".h5", ".hdf5"):
            import h5py

            with h5py.File(path) as file:
                return {name: file[name][()] for name in wanted if name in file}
        if path.suffix == ".pt":
            found = torch.load(path, "cpu", weights_only=True)
        else:
            found = np.load(path)
        # An array without a name is the features.
        found = found if hasattr(found, "keys") else {"features": found}
        arrays = {name: found[name] for name in wanted if name in found}
        return {k: x.float().numpy() if torch.is_tensor(x) else x for k, x in arrays.items()}
    except ImportError:
        raise ValueError(f"{path} needs h5py: `pip install h5py`, or save it as .npz") from None
    except Exception as e:  # a damaged file raises almost anything
        raise ValueError(
            f"{path} cannot be read as features ({type(e).__name__}): save it as .npz"
        ) from None


def match_features(path, pictures):
    """Find the features of pictures in a file, by the ends of their paths -> as embed_pictures."""
    stored = read_features(Path(path), ("features", "backbone", "files", "names"))
    x = stored.get("features", stored.get("backbone"))
    names = stored.get("files", stored.get("names"))
    if x is None or names is None or len(x) != len(names):
        form = "`features` [R, D] and `files` or `names` [R]"
        raise ValueError(f"{path} lacks {form}, as many of both: add them")

    def plain(name):
        name = name.decode() if isinstance(name, bytes) else str(name)
        suffix = Path(name).suffix
        return name.removesuffix(suffix) if suffix.lower() in labelled.ENDINGS else name

    number = {plain(name): i for i, name in enumerate(names)}
    rows = []
    for file in pictures.files:
        # A picture a/b/1.png has the row a/b/1, else b/1, else 1.
        parts = plain(file).split("/")
        ends = ["/".join(parts[k:]) for k in range(len(parts))]
        rows.append(next((number[end] for end in ends if end in number), -1))
    rows = np.array(rows)
    used = rows[rows >= 0]
    if len(number) < len(names) or len(set(used)) < len(used):
        raise ValueError(f"{path} has a name twice, or one that fits two pictures: add folders")
    if len(used) < len(names):
        print(f"{len(names) - len(used)} of {len(names)} rows of {path} are of no picture here")
    x = np.asarray(x, np.float32)
    R, D = len(x), x.shape[-1]
    if x.shape not in ((R, D), (R, 1, D)):
        raise ValueError(f"{path} has features {list(x.shape)}: give [R, D], of one magnification")
    x = x.reshape(R, 1, D)[rows]
    # Of a picture that could not be read, our own files hold NaN alone.
    if not np.isfinite(x[~np.isnan(x).all((1, 2))]).all():
        raise ValueError(f"{path} has features that are no finite numbers: make them again")
    x[rows < 0] = np.nan
    return keep_known({"backbone": x, "image_embedding": x}, pictures)
