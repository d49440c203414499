"""Read labelled pictures, the names of their classes, their tiles and features.

Labelled pictures are a folder of class folders, or of train/, val/ and test/ with class folders in
them, or a CSV with a column `file` (relative to the table) and any of label, caption, mask, split
and patient, slide or cluster. Rows of a patient, slide or cluster stay on one side of a split:
patches of a patient on both sides make every number look better than it is.

Shape letters: R pictures, L magnifications (1 without mpp), T tiles, S pixels a side of a tile,
D width of a feature.
"""

import csv
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import evaluate
from protocols import peers

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
GROUPS = ("patient", "slide", "cluster")
PROMPTS = Path(__file__).with_name("prompts.json")

# ---- Folders and tables -------------------------------------------------------------------------


def digest(told):
    """Hash what JSON can say to 12 digits."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


class Pictures:
    """R labelled pictures: .files, .labels, .captions, .masks, .groups, of the column .by.

    They are lists of R, or None if not every row has one; .split has "train", "val", "test" or "".
    .hash: names, sizes and columns, the same on every machine; .stamp: these very files.
    """

    def __init__(self, name, by, rows):
        self.name = name
        self.rows = rows
        # Keep a column only if it is complete.
        for kind in ("file", "label", "caption", "mask", "group"):
            column = [row.get(kind) for row in rows]
            setattr(self, f"{kind}s", column if all(column) else None)
        self.by = by if self.groups else None
        self.split = np.array([row.get("split", "") for row in rows])
        # The hash names the data in results; the stamp tells whether kept features are of them.
        stats = [path.stat() for path in self.files]
        told = [[p.name, s.st_size] for p, s in zip(self.files, stats, strict=True)]
        columns = [self.labels, self.captions, self.groups, self.split.tolist()]
        self.hash = digest([told, columns])
        self.stamp = digest([[str(p) for p in self.files], [s.st_mtime_ns for s in stats], told])

    def __len__(self):
        return len(self.rows)

    def numbers(self, classes):
        """Number the labels in the order of `classes` -> int [R]."""
        return np.array([list(classes).index(label) for label in self.labels])

    def who(self):
        """Return the groups that a bootstrap draws [R]: without groups, each row is its own."""
        return np.array(self.groups) if self.groups else np.arange(len(self))

    def held_out(self):
        """Mark the test rows, or all where there are none: bool [R]."""
        test = self.split == "test"
        return test if test.any() else ~test


def read_pictures(path, train=None, group=None):
    """Read a folder or a CSV (top of the file) -> Pictures.

    train: a second one, whose pictures become the training set and those of `path` the test set.
    group: the column to split by. ValueError names the file, and the line of a table.
    """
    path = Path(path).resolve()
    name = path.parent.name if path.name == "index.csv" else path.name.removesuffix(".csv")
    rows, by = read_table(path, group) if path.is_file() else (read_folders(path), None)
    if train:
        others = read_pictures(train, group=group).rows
        if {row["file"] for row in rows} & {row["file"] for row in others}:
            raise ValueError(f"{train} and {path} share pictures: learn from others than you test")
        rows = [row | {"split": "train"} for row in others] + [r | {"split": "test"} for r in rows]
    return Pictures(name, by, rows)


def read_folders(path):
    """Read class folders, or train/, val/ and test/ of class folders -> rows in order of name."""
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a folder of class folders or a CSV")
    rows = []
    # Folders named train, val and test hold class folders; all others are classes.
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    parted = all(folder.name.lower() in SPLITS for folder in folders)
    for folder in folders:
        if parted:
            split = {"split": SPLITS[folder.name.lower()]}
            rows += [row | split for row in read_folders(folder)]
        else:
            files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in ENDINGS]
            rows += [{"file": p, "label": folder.name} for p in files]
    if not rows:
        raise ValueError(f"{path} holds no pictures in class folders: give one that does, or a CSV")
    return rows


def read_table(path, group=None):
    """Read a CSV -> (rows, the column of groups or None)."""
    # Read all lines first, with the numbers that an editor shows.
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            lines = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is no table in UTF-8 ({e}): save it as CSV") from None
    # Find the columns.
    head = reader.fieldnames
    by = group.lower() if group else next((name for name in GROUPS if name in head), None)
    for name in ("file", by or "file"):
        if name not in head:
            raise ValueError(f"{path} has no column {name}: its first line has {', '.join(head)}")
    # A column that is there must be filled in, except for the split; files must exist.
    rows = []
    for number, line in lines:
        row = {kind: (line[kind] or "").strip() for kind in {*head, by} - {None}}
        for kind in {"file", "label", "caption", "mask", by} & row.keys():
            if not row[kind]:
                raise ValueError(f"{path}:{number}: no {kind}: fill it in or delete the line")
        for kind in {"file", "mask"} & row.keys():
            row[kind] = path.parent / row[kind]
            if not row[kind].is_file():
                raise ValueError(f"{path}:{number}: {row[kind]} does not exist: correct the path")
        said = row.get("split", "")
        if said and said.lower() not in SPLITS:
            raise ValueError(f"{path}:{number}: the split {said} is none of train, val, test")
        rows.append(row | {"group": row.get(by), "split": SPLITS.get(said.lower(), "")})
    if not rows:
        raise ValueError(f"{path} has no rows below its headings: add some")
    return rows, by


def read_prompts(source, labels=()):
    """Find the names of classes -> ({label: [names]}, templates).

    source: a data set of prompts.json, a JSON file {label: [names]}, or None: the smallest data set
    that has all `labels`. Upper and lower case are one; labels come out spelled as in `labels`.
    """
    known = json.loads(PROMPTS.read_text(encoding="utf-8"))
    spelled = {label.lower(): label for label in labels}
    if len(spelled) < len(set(labels)):
        raise ValueError(f"two of the labels {' '.join(sorted(labels))} differ in case only")
    if source is None:
        # Numbers as labels belong to several data sets and do not say what they mean.
        fitting = []
        for name, classes in known["facts"].items():
            if spelled.keys() <= {label.lower() for label in classes}:
                fitting.append(name)
        if not fitting or all(label.isdigit() for label in labels):
            listed = " ".join(sorted(labels)[:6])
            raise ValueError(f"prompts.json has no names for {listed}: give --classes NAME or JSON")
        source = min(fitting, key=lambda name: len(known["facts"][name]))
        print(f"the labels are taken for those of {source}; if they are others, give --classes")
    try:
        classes = known["facts"].get(str(source)) or json.loads(Path(source).read_text("utf-8"))
        # One name may stand without brackets.
        classes = {k: [x] if isinstance(x, str) else list(x) for k, x in classes.items()}
        if not classes or not all(x and all(map(str.strip, x)) for x in classes.values()):
            raise ValueError("a class has no name")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        form = f"neither a JSON file {{label: [names]}} ({e}) nor one of"
        raise ValueError(f"--classes {source} is {form} {' '.join(known['facts'])}") from None
    classes = {spelled.get(label.lower(), label): names for label, names in classes.items()}
    for label in labels:
        if label not in classes:
            raise ValueError(f"the class {label} has no names in {source}: add them")
    return classes, known["templates"]


# ---- Pixels and features ------------------------------------------------------------------------


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


def read_square(path, S):
    """Read the largest centred square of a picture, resampled -> uint8 [3, S, S]."""
    image = data.read_image(path)
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((S, S), Image.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


class Tiles(Dataset):
    """Read pictures -> (tiles uint8 [T, 3, S, S], magnification's number [T]), or why not (str).

    Without mpp the one tile is the centred square; with it tiles come at four magnifications.
    """

    def __init__(self, files, S, mpp=None):
        self.files = files
        self.S = S
        self.mpp = mpp

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            if not self.mpp:
                return read_square(self.files[i], self.S)[None], torch.zeros(1, dtype=torch.long)
            image = data.read_image(self.files[i])
        except ValueError as e:
            return str(e)
        parts = [at_magnification(image, self.mpp, mag, self.S) for mag in data.MAGS]
        level = np.repeat(np.arange(4), [len(part) for part in parts])
        tiles = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
        return tiles, torch.from_numpy(level)


def embed_files(peer, files, mpp=None, w=None):
    """Embed pictures -> dict of arrays [readable, L, D] as of evaluate.embed_images, w too.

    The tiles of a magnification are averaged. "ok" bool [R]: the pictures that can be read.
    """
    device = next(peer.model.parameters()).device.type
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    tiles = Tiles(files, peer.model.vision.size, mpp)
    # With magnifications a picture has hundreds of tiles: read few at once.
    loader = DataLoader(tiles, 4 if mpp else 128, collate_fn=list, num_workers=workers)
    ok = []
    rows = {}
    for batch in tqdm(loader, "pictures", leave=False, disable=None):
        # Name the pictures that cannot be read, and go on with the others.
        ok += [not isinstance(item, str) for item in batch]
        for item in batch:
            if isinstance(item, str):
                tqdm.write(f"left out: {item}", file=sys.stderr)
        batch = [item for item in batch if not isinstance(item, str)]
        if not batch:
            continue
        images = torch.cat([tiles for tiles, _ in batch]).float() / 255
        for name, x in evaluate.embed_images(peer.model, images, w, peer.k_o).items():
            # Average each picture's tiles by magnification.
            parts = x.split([len(tiles) for tiles, _ in batch])
            for (_, level), part in zip(batch, parts, strict=True):
                means = [part[level == k].mean(0) for k in range(4 if mpp else 1)]
                rows.setdefault(name, []).append(torch.stack(means).numpy())
    return {name: np.stack(x) for name, x in rows.items()} | {"ok": np.array(ok)}


def embed_pictures(peer, pictures, folder, mpp=None, guided=False, at_once=2000):
    """Run `embed_files` in pieces that stay in folder/features, so that it can be interrupted.

    The name of a piece tells weights, files, magnifications and keywords: others are not read.
    """
    w = evaluate.embed_texts(peer.model, peer.tokenizer, list(peer.keywords)) if guided else None
    guide = [list(peer.keywords), peer.k_o] if guided else []
    key = digest([peer.fingerprint, pictures.stamp, mpp, guide])
    pieces = []
    for start in range(0, len(pictures), at_once):
        path = Path(folder) / "features" / f"{key}-{start:07d}.npz"
        if not path.exists():
            found = embed_files(peer, pictures.files[start : start + at_once], mpp, w)
            data.write_whole(path, partial(np.savez, **found))
        with np.load(path) as stored:
            pieces.append(dict(stored))
    # A piece without a readable picture has no features.
    found = {}
    for name in set().union(*pieces):
        found[name] = np.concatenate([piece[name] for piece in pieces if name in piece])
    if not found["ok"].any():
        raise ValueError(f"no picture of {pictures.name} can be read: see above")
    return found


# ---- Shared by the commands that read labelled pictures -----------------------------------------


def describe_split(pictures):
    """Put the split in words, and say on the screen what it cannot keep apart."""
    test = pictures.held_out()
    both = set(pictures.who()[test]) & set(pictures.who()[~test])
    if not pictures.groups:
        remedy = f"give a column {', '.join(GROUPS)}, or --group"
        print(f"{pictures.name} has no groups: a patient may be on both sides of a split; {remedy}")
    elif both:
        print(f"{len(both)} groups ({pictures.by}) are in training and test: numbers will flatter")
    return f"folds by {pictures.by or 'row'}" if test.all() else "the source's own"


def about_pictures(peer, pictures):
    """Say what results are about -> dict, for evaluate.save_results."""
    told = {"model": peer.name, "fingerprint": peer.fingerprint, "data": pictures.name}
    return told | {"data_hash": pictures.hash, "groups": pictures.by or "none: each row its own"}


def print_rows(title, rows, columns=("f1", "balanced", "auroc")):
    """Print scores with intervals: rows {name: scores}, columns: names of metrics."""
    table = []
    for name, row in rows.items():
        cells = [str(name)]
        for metric in columns:
            low, high = row["interval"].get(metric, (np.nan, np.nan))
            cells.append(f"{row[metric]:.3f} ({low:.2f}-{high:.2f})")
        table.append(cells)
    if table:
        evaluate.print_table(title, ["", *columns], table)


def add_arguments(parser):
    """Add the flags of a model and of labelled pictures to an argument parser."""
    peers.add_arguments(parser)
    parser.add_argument("--data", required=True, help="folder of class folders, or CSV")
    parser.add_argument("--train", help="a second one, to learn from")
    parser.add_argument("--group", help="column of the CSV to split by (patient, slide, cluster)")
    parser.add_argument("--folds", type=int, default=5, help="where the data have no split (5)")
    parser.add_argument("--out", help="folder of the results (RUN/NAME or results/MODEL/NAME)")


def results_folder(args, peer, pictures):
    """Choose the folder of the results: --out, or one in the run folder or in results/."""
    own = args.model and args.model != "random"
    return Path(args.out or Path(args.model if own else f"results/{peer.name}") / pictures.name)
