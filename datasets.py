"""Labelled pictures as public data sets come: folders of classes or a table; who belongs to whom; and what a model sees in them.

    NCT-CRC-HE-100K/ADI/*.tif ...          a folder of class folders, or of train/, val/, test/ with class folders in them
    file,label,split,patient               a table (CSV), files relative to it; only `file` must be there. Other names that are understood: COLUMNS

Splits are made by group (patient, slide, cluster of copies), never by file, where a group column is there: two patches of a patient on both
sides of a split make every number look better than it is. Features come in pieces that are kept, so that a stopped pass goes on, several
processes share one, and a protocol that is tried again waits for nothing.

Outline: tables and folders -> Pictures | folds | a picture at a magnification | in_pieces, features.
Shape letters: R rows (pictures), M features, S pixels per side that the tower reads.
"""
import csv
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import model as networks

COLUMNS = {  # what a table's columns are called, in the order they are looked for; upper and lower case are one
    "file": ("file", "filename", "image", "image name", "path", "slide", "patch"),
    "label": ("label", "class", "majority vote label", "diagnosis", "category"),
    "group": ("group", "patient", "patient_id", "case", "case_id", "slide_id", "cluster", "slide"),
    "split": ("split", "partition", "set"),
    "caption": ("caption", "text"),
    "mask": ("mask", "mask_file"),
}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


# ----------------------------------------------------------------------------------------------------------------------
# Tables and folders

class Pictures:
    """R pictures: .files; .labels, .groups, .captions, .masks (lists of R, or None where the source has none); .split, "train", "val", "test" or ""
    each; .name of the source, .by, the column the groups are from; .hash of names, sizes, labels, groups and splits, the same on every machine;
    .stamp, for the cache, of these very files."""

    def __init__(self, name, rows, by=None):
        self.name, self.by, self.files = name, by, [Path(r["file"]) for r in rows]
        self.labels, self.groups, self.captions, self.masks = ([r[k] for r in rows] if rows and all(r.get(k) for r in rows) else None for k in ("label", "group", "caption", "mask"))
        self.split = [r.get("split") or "" for r in rows]
        stats = [f.stat() for f in self.files]
        digest = lambda rows: hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
        self.hash = digest([(f.name, s.st_size, *(r.get(k) for k in ("label", "group", "split", "caption"))) for f, s, r in zip(self.files, stats, rows)])
        self.stamp = digest([(str(f), s.st_size, s.st_mtime_ns) for f, s in zip(self.files, stats)])

    def __len__(self):
        return len(self.files)

    def targets(self, classes):
        """Class numbers [R] in the order of `classes`."""
        number = {c: i for i, c in enumerate(classes)}
        return np.array([number[label] for label in self.labels])


def read_pictures(path, train=None, group=None):
    """A folder or a CSV (top of the file) -> Pictures, in order of name; `train`: a second one, whose pictures are then the training set and those of
    `path` the test set; `group`: the column to split by. ValueError names the file, and the line of a table."""
    if train:
        test, other = read_pictures(path, group=group), read_pictures(train, group=group)
        rows = [dict(file=f, label=p.labels and p.labels[i], group=p.groups and p.groups[i], caption=p.captions and p.captions[i], mask=p.masks and p.masks[i], split=split)
                for p, split in ((other, "train"), (test, "test")) for i, f in enumerate(p.files)]
        return Pictures(test.name, rows, test.by)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder of class folders, a CSV, or a folder of shards")
    rows, by = _read_table(path, group) if path.is_file() else (_read_folders(path), None)
    if not rows:
        table = next((p for p in sorted(path.glob("*.csv"))), None) if path.is_dir() else None
        raise ValueError(f"{path} holds no pictures ({' '.join(ENDINGS)}) in class folders" + (f": there is a table in it, give {table}" if table else ""))
    return Pictures(name_of(path), rows, by)


def name_of(path):
    """What a source is called: its folder, or its table unless that is an index.csv."""
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.parent.name if path.stem == "index" else path.stem


def _read_folders(path):
    """Class folders, or train/, val/, test/ of class folders -> rows."""
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if inside and all(p.name.lower() in SPLITS for p in inside):
        return [dict(row, split=SPLITS[p.name.lower()]) for p in inside for row in _read_folders(p)]
    return [dict(file=f, label=p.name) for p in inside for f in sorted(p.rglob("*")) if f.suffix.lower() in ENDINGS]


def read_labels(path):
    """A CSV of slide,label[,patient] -> ({slide: label}, {slide: patient})."""
    rows, _ = _read_table(Path(path), files=False)
    if not all(r.get("label") for r in rows):
        raise ValueError(f"{path} has no column of labels: name its columns slide,label and perhaps patient")
    return {r["file"]: r["label"] for r in rows}, {r["file"]: r["group"] for r in rows if r.get("group")}


def _read_table(path, group=None, files=True):
    """CSV -> (rows, the column that groups are from or None). files: they must exist."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a CSV")
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        lines = [(reader.line_num, {(k or "").strip().lower(): (v or "").strip() if not isinstance(v, list) else "" for k, v in r.items()}) for r in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is not a table in UTF-8 ({e}): save it as plain CSV") from None
    head = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    column = {kind: next((name for name in names if name in head), None) for kind, names in COLUMNS.items()}
    if group:
        column["group"] = group.lower()
        if group.lower() not in head:
            raise ValueError(f"{path} has no column {group}: it has {', '.join(head)}")
    if not column["file"]:
        raise ValueError(f"{path} has no column of files: its first line must name the columns, one of them {' or '.join(COLUMNS['file'][:4])} (found {', '.join(head) or 'nothing'})")
    if column["group"] == column["file"]:
        column["group"] = None
    rows = []
    for number, line in lines:
        row = {kind: line[name] for kind, name in column.items() if name}
        for kind in ("file", "mask"):
            if files and row.get(kind):
                row[kind] = path.parent / row[kind]
                if not row[kind].is_file():
                    raise ValueError(f"{path}:{number}: {row[kind]} does not exist: files are looked for beside the table")
        if (said := row.get("split", "")) and said.lower() not in SPLITS:
            raise ValueError(f"{path}:{number}: {column['split']} {said} is none of train, val, test: write one of them, or leave it empty")
        row["split"] = SPLITS.get(said.lower(), "")
        for kind in ("label", "group", "caption", "mask"):
            if column[kind] and not row[kind]:
                raise ValueError(f"{path}:{number} has no {column[kind]}: fill it in or leave the line out")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has a line of headings and no rows")
    labels = sorted({r.get("label", "") for r in rows}, key=lambda name: (name.lower(), name))
    if clash := next((a for a, b in zip(labels, labels[1:]) if a.lower() == b.lower()), None):
        raise ValueError(f"{path} writes the label {clash} in two ways, of which only the case differs: make them one")
    return rows, column["group"]


def folds(y, groups=None, k=5, seed=0):
    """A fold number 0 .. k - 1 for each of R rows with class y [R]: rows of one group fall together, and each class is spread as evenly as that allows.
    groups None: each row is its own. Groups go, largest first and otherwise by lot, to the fold that has least of their class."""
    y, rng = np.asarray(y), np.random.default_rng(seed)
    _, which = np.unique(np.arange(len(y)) if groups is None else np.asarray(groups), return_inverse=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
    fold, load = np.zeros(len(y), int), np.zeros((k, y.max() + 1))
    for i in sorted(rng.permutation(len(members)), key=lambda i: -len(members[i])):
        count = np.bincount(y[members[i]], minlength=load.shape[1])
        best = np.lexsort((rng.random(k), load.sum(1), load[:, count.argmax()]))[0]
        fold[members[i]], load[best] = best, load[best] + count
    return fold


# ----------------------------------------------------------------------------------------------------------------------
# A picture at a magnification

def at_magnification(image, mpp, mag, S):
    """PIL image of `mpp` microns per pixel -> uint8 [T, S, S, 3] at a magnification: resampled, then cut into as many whole squares as fit, centred.
    A side that is shorter than S is continued by its mirror image: at its true scale, and without an edge that no tissue has."""
    size = [max(1, round(n * mpp / data.mpp_of(mag))) for n in image.size]
    a = np.asarray(image.resize(size, Image.BICUBIC))
    lack = [max(0, S - n) for n in a.shape[:2]]
    a = np.pad(a, [(n // 2, n - n // 2) for n in lack] + [(0, 0)], mode="symmetric")
    rows, cols = a.shape[0] // S, a.shape[1] // S
    top, left = (a.shape[0] - rows * S) // 2, (a.shape[1] - cols * S) // 2
    a = a[top : top + rows * S, left : left + cols * S]
    return a.reshape(rows, S, cols, S, 3).swapaxes(1, 2).reshape(-1, S, S, 3)


class Tiles(Dataset):
    """What a tower reads of each picture: item i -> (tiles uint8 [T, 3, S, S], level of each [T]), or the sentence that says why it cannot be read.
    Without mpp the largest centred square, resampled, as CLIP does (level 0); with it the tiles of all four magnifications, levels 0 to 3."""

    def __init__(self, files, S, mpp=None):
        self.files, self.S, self.mpp = files, S, mpp

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            if not self.mpp:
                return (networks.read_picture(self.files[i], self.S) * 255).round().to(torch.uint8)[None], torch.zeros(1, dtype=torch.long)
            image = networks.open_picture(self.files[i])
            parts = [at_magnification(image, self.mpp, mag, self.S) for mag in data.MAGS]
            return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2), torch.arange(4).repeat_interleave(torch.tensor([len(p) for p in parts]))
        except ValueError as e:
            return str(e)


# ----------------------------------------------------------------------------------------------------------------------
# Features in pieces

def in_pieces(n, work, folder=None, size=256, desc="features"):
    """Rows 0 .. n - 1 through work(list of rows) -> dict of arrays [rows, ...], `size` rows at a time; the pieces are dealt to the processes and kept in
    `folder`, so that the same call goes on where it stopped. -> the dict of all rows for the first process, None for the others."""
    pieces, world, rank = [list(range(i, min(i + size, n))) for i in range(0, n, size)], networks.world_size(), networks.rank()
    found = {}
    for k in tqdm(range(rank, len(pieces), world), desc=desc, unit="piece", leave=False, disable=None if rank == 0 else True):
        path = folder and folder / f"{k:06d}.npz"
        try:
            with np.load(path) as stored:
                found[k] = dict(stored)
        except Exception:                                                              # none there, or a damaged one: NumPy has many words for it
            found[k] = work(pieces[k])
            if path:
                data.save_npz(path, found[k])
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(found, parts)
        if rank:
            return None
        found = {k: x for part in parts for k, x in part.items()}
    return {name: np.concatenate([found[k][name] for k in sorted(found)]) for name in found[0]}


@torch.no_grad()
def features(read, files, S, device, mpp=None, folder=None, at_once=64, workers=None):
    """Pictures -> dict of float32 arrays, one row a picture. read: images [N, 3, S, S] -> dict of name -> [N, M] (`subjects.reader`). Without mpp [R,
    M] each; with it [R, 4, M], the mean over a magnification's tiles. `ok` bool [R]: whether the picture could be read; its row is 0 otherwise, and
    it is named on the screen."""
    workers = (min(8, os.cpu_count() or 1) if device == "cuda" else 0) if workers is None else workers

    def work(rows):
        loader = DataLoader(Tiles([files[i] for i in rows], S, mpp), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
        items, waiting, out, ok = [], 0, {}, np.zeros(len(rows), bool)

        def flush():
            x = torch.cat([tiles for _, tiles, _ in items])
            found = [read(part.to(device).float() / 255) for part in x.split(at_once)]
            found = {name: torch.cat([f[name].float().cpu() for f in found]).numpy() for name in found[0]}
            at = 0
            for i, tiles, level in items:
                for name, f in found.items():
                    if name not in out:
                        out[name] = np.zeros((len(rows), 4, f.shape[1]) if mpp else (len(rows), f.shape[1]), np.float32)
                    part = f[at : at + len(tiles)]
                    out[name][i] = np.stack([part[level.numpy() == lev].mean(0) for lev in range(4)]) if mpp else part[0]
                at, ok[i] = at + len(tiles), True
        for i, item in enumerate(loader):
            if isinstance(item, str):
                tqdm.write(f"left out: {item}")
                continue
            items.append((i, *item))
            waiting += len(item[0])
            if waiting >= at_once:
                flush()
                items, waiting = [], 0
        if items:
            flush()
        if not out:                                                                    # a whole piece of broken files
            empty = read(torch.zeros(1, 3, S, S, device=device))
            out = {name: np.zeros((len(rows), 4, f.shape[1]) if mpp else (len(rows), f.shape[1]), np.float32) for name, f in empty.items()}
        return out | {"ok": ok}
    return in_pieces(len(files), work, folder)
