"""Read labelled pictures, and the names of their classes.

Labelled pictures are a folder of class folders, or of train/, val/ and test/ with class folders in
them, or a CSV with a column `file` (relative to the table) and any of label, caption, mask, split
and patient, slide or cluster. Rows of a patient, slide or cluster stay on one side of a split, and
so do copies of a file where no column says more: on both sides they make every number look better.
Shape letter: R pictures.
"""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

import data
import evaluate
from prepare.slide import CAPTION, FILE
from protocols import peers

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}
GROUPS = ("patient", "slide", "cluster")
KINDS = ("file", "label", "caption", "mask")
# Other tables have other words for these columns.
WORDS = {"file": FILE, "caption": CAPTION, "slide": ("slide_id",), "patient": ("case_id",)}
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
        self.name, self.rows = name, rows
        # Keep a column only if it is complete.
        for kind in (*KINDS, "group"):
            column = [row.get(kind) for row in rows]
            setattr(self, f"{kind}s", column if all(column) else None)
        self.by = by if self.groups else None
        self.split = np.array([row.get("split", "") for row in rows])
        self.originals = np.array([row.get("original", i) for i, row in enumerate(rows)])
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
        """Return the groups that a bootstrap draws [R]: without groups, copies are one."""
        return np.array(self.groups) if self.groups else self.originals

    def held_out(self):
        """Mark the test rows, or all where there are none: bool [R]."""
        test = self.split == "test"
        return test if test.any() else ~test

    def copies(self):
        """Count the rows to test whose file has a copy among those to learn from."""
        test = self.held_out()
        # Without a split, each group is once on the other side.
        sides = self.who() if test.all() else test
        often = Counter(i for i, _ in {*zip(self.originals.tolist(), sides.tolist(), strict=True)})
        return sum(often[i] > 1 for i in self.originals[test].tolist())


def read_pictures(path, train=None, group=None):
    """Read a folder or a CSV (top of the file) -> Pictures.

    train: a second one, whose pictures become the training set and those of `path` the test set.
    group: the column to split by. ValueError names the file, and the line of a table.
    """
    path = Path(path).resolve()
    name = path.parent.name if path.name == "index.csv" else path.name.removesuffix(".csv")
    rows, by = read_rows(path, group)
    if train:
        others, _ = read_rows(Path(train).resolve(), group)
        rows = [row | {"split": "train"} for row in others] + [r | {"split": "test"} for r in rows]
    mark_copies(rows)
    found = Pictures(name, by, rows)
    if found.copies() == found.held_out().sum():
        raise ValueError(f"all test pictures of {path} are also learned from: give others to test")
    return found


def mark_copies(rows):
    """Give rows the number of the first row whose file has the same bytes, as "original"."""
    # Most files differ in size, and most others in 4 KB from their middle: few are read whole.
    keys = [(row["file"].stat().st_size or -i,) for i, row in enumerate(rows, 1)]
    for most in (4096, -1):
        often = Counter(keys)
        for i, row in enumerate(rows):
            if often[keys[i]] > 1:
                with open(row["file"], "rb") as file:
                    file.seek(keys[i][0] // 2 if most > 0 else 0)
                    keys[i] += (hashlib.sha256(file.read(most)).digest(),)
    first = {}
    for i, row in enumerate(rows):
        row["original"] = first.setdefault(keys[i], i)
        other = rows[row["original"]]
        labels = {row.get("label"), other.get("label")} - {None}
        if len(labels) > 1:
            two = f"{other['file']} and {row['file']} are one picture"
            raise ValueError(f"{two} with the labels {', '.join(sorted(labels))}: keep one")


def read_folders(path):
    """Read class folders, or train/, val/ and test/ of class folders -> rows in order of name."""
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a folder of class folders or a CSV")
    rows = []
    left_out = []
    entries = [p for p in sorted(path.iterdir()) if p.is_dir() or p.suffix.lower() in ENDINGS]
    # Beside train/ and test/ no folder is a class.
    splits = {p: SPLITS.get(p.name.lower()) for p in entries if p.is_dir()}
    parted = {"train", "test"} & set(splits.values())
    for entry in entries:
        if parted and splits.get(entry):
            found = [row | {"split": splits[entry]} for row in read_folders(entry)]
        else:
            files = [] if parted else sorted(p for p in entry.rglob("*") if is_picture(p, path))
            found = [{"file": p, "label": entry.name} for p in files if p.is_file()]
            # A link that points to nothing, or a pipe, is called as a picture is.
            left_out += [p.name for p in files if not p.is_file()]
        rows += found
        if not found:
            left_out.append(entry.name)
    if not rows:
        raise ValueError(f"{path} holds no pictures in class folders: give one that does, or a CSV")
    if left_out:
        print(f"{path}: left out {few(left_out)}")
    return rows


def is_picture(path, folder):
    """Tell a picture from other files, and from what hidden folders and archives of macOS hold."""
    junk = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    return path.suffix.lower() in ENDINGS and not junk


def few(names):
    """Count names and list the first five -> "7: a, b, c, d, e, ..."."""
    shown = [*names[:5], *["..."] * (len(names) > 5)]
    return f"{len(names)}: {', '.join(shown)}"


def read_csv(path, needed):
    """Read a CSV with the headings `needed` -> [(number of the line, {column: cell})]."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            for column, words in WORDS.items():
                other = [name for name in names if name in words and name not in needed]
                if other and column not in names:
                    names[names.index(other[0])] = column
            reader.fieldnames = names
            lines = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is no table in UTF-8 ({e}): save it as CSV") from None
    for name in needed:
        if name not in reader.fieldnames:
            first = ", ".join(reader.fieldnames)
            raise ValueError(f"{path} has no column {name}: its first line has {first}")
    if not lines:
        raise ValueError(f"{path} has no rows below its headings: add some")
    for number, line in lines:
        # A comma without quotes moves all cells after it.
        if None in line:
            raise ValueError(f"{path}:{number}: more cells than headings: put commas in quotes")
    return [(number, {k: cell.strip() for k, cell in line.items()}) for number, line in lines]


def read_rows(path, group):
    """Read a folder or a CSV of pictures -> (rows, the column of groups or None)."""
    if not path.is_file():
        return read_folders(path), None
    lines = read_csv(path, ("file", group.lower()) if group else ("file",))
    head = lines[0][1].keys()
    by = group.lower() if group else next((name for name in GROUPS if name in head), None)
    others = [name for name in head if name not in (*KINDS, "split")]
    if others and not by:
        print(f"{path}: the columns {', '.join(others)} are not read; --group can split by one")
    rows = []
    for number, row in lines:
        # A column that is there must be filled in, except for the split; files must exist.
        for kind in (*KINDS, by):
            if not row.get(kind, "there"):
                raise ValueError(f"{path}:{number}: no {kind}: fill it in or delete the line")
        for kind in {"file", "mask"} & row.keys():
            row[kind] = path.parent / row[kind]
            if not row[kind].is_file():
                raise ValueError(f"{path}:{number}: {row[kind]} does not exist: correct the path")
        said = row.get("split", "")
        if said and said.lower() not in SPLITS:
            raise ValueError(f"{path}:{number}: the split {said} is none of train, val, test")
        rows.append(row | {"group": row.get(by), "split": SPLITS.get(said.lower(), "")})
    return rows, by


def find_data_set(labels):
    """Find the smallest data set of prompts.json that has all labels -> its name and classes."""
    facts = data.read_classes(PROMPTS)["facts"]
    wanted = set(map(str.lower, labels))
    # Numbers as labels belong to several data sets and do not say what they mean.
    if all(map(str.isdigit, wanted)):
        return None, None
    fitting = [name for name in facts if wanted <= set(map(str.lower, facts[name]))]
    name = min(fitting, key=lambda name: len(facts[name]), default=None)
    return name, facts.get(name)


def order_classes(labels, prompts=None):
    """Put labels in order -> (list, whose order it is).

    It is that of prompts {label: names} or of prompts.json, else of numbers, else the alphabet's.
    """
    labels = sorted(set(labels))
    if len({label.lower() for label in labels}) < len(labels):
        raise ValueError(f"two of the labels {' '.join(labels)} differ in case only: make them one")
    name, names = ("--classes", prompts) if prompts else find_data_set(labels)
    if names:
        place = [label.lower() for label in names]
        return sorted(labels, key=lambda label: place.index(label.lower())), name
    try:
        return sorted(labels, key=float), "numbers"
    except ValueError:
        return labels, "alphabet"


def read_prompts(source, labels=()):
    """Find the names of classes -> ({label: [names]}, templates).

    source: a data set of prompts.json, a JSON file {label: [names]}, a classes.json with one fact,
    or None: the smallest data set that has all `labels`. Upper and lower case are one; labels come
    out spelled as in `labels`.
    """
    if source is None:
        source, _ = find_data_set(labels)
        if not source:
            listed = " ".join(sorted(labels)[:6])
            raise ValueError(f"prompts.json has no names for {listed}: give --classes NAME or JSON")
        print(f"the labels are taken for those of {source}; if they are others, give --classes")
    known = data.read_classes(PROMPTS)
    facts = known["facts"]
    try:
        classes = facts.get(str(source)) or json.loads(Path(source).read_text("utf-8"))
        # A classes.json, as it lies beside shards, holds the classes of each fact.
        if isinstance(classes.get("facts"), dict):
            known = classes
            if len(classes["facts"]) != 1:
                raise ValueError(f"it has the facts {', '.join(classes['facts'])}: keep one")
            (classes,) = classes["facts"].values()
        # One name may stand without brackets.
        classes = {k: [x] if isinstance(x, str) else list(x) for k, x in classes.items()}
        if not classes or not all(x and all(map(str.strip, x)) for x in classes.values()):
            raise ValueError("a class has no name")
        templates = known["templates"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as e:
        form = f"neither a JSON file {{label: [names]}} ({e}) nor one of"
        raise ValueError(f"--classes {source} is {form} {' '.join(facts)}") from None
    spelled = {label.lower(): label for label in labels}
    classes = {spelled.get(label.lower(), label): names for label, names in classes.items()}
    for label in labels:
        if label not in classes:
            raise ValueError(f"the class {label} has no names in {source}: add them")
    others = [label for label in classes if label not in labels]
    if labels and others:
        print(f"classes of {source} that no label names: {few(others)}")
    return classes, templates


# ---- Shared by the commands that read labelled pictures -----------------------------------------
def describe_split(pictures, folds):
    """Put the split in words, and say on the screen what it cannot keep apart."""
    test, who = pictures.held_out(), pictures.who()
    if folds < 2:
        raise ValueError(f"--folds {folds} is too few: give 2 or more")
    if pictures.copies():
        share = f"{pictures.copies()} of {test.sum()} test pictures"
        print(f"{share} have copies among those to learn from: numbers will flatter")
    if pictures.groups:
        print(f"{pictures.name}: folds and intervals are by {pictures.by}")
        if both := set(who[test]) & set(who[~test]):
            side = "are in training and test: numbers will flatter"
            print(f"{len(both)} groups ({pictures.by}) {side}")
    else:
        risk = "a patient may be on both sides of a split, and intervals are over pictures"
        print(
            f"{pictures.name} has no groups: {risk}; give a column {', '.join(GROUPS)}, or --group"
        )
    if test.all():
        return f"{min(folds, len(set(who)))} folds by {pictures.by or 'row'}"
    if unused := int((pictures.split == "").sum()):
        print(f"{unused} rows of {pictures.name} have no split: nothing is learned from them")
    return "the source's own"


def about_pictures(peer, pictures):
    """Say what results are about -> dict, for evaluate.save_results."""
    told = {"model": peer.name, "fingerprint": peer.fingerprint, "data": pictures.name}
    told |= {"data_hash": pictures.hash, "groups": pictures.by or "none: each row its own"}
    return told | {"copies": pictures.copies()}


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
