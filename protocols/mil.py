"""Tell the class of a slide from its patches: pooled by text, or learned by attention MIL.

Not a command: `python -m protocols.slides` with --labels calls it.

Shape letters: P parents (5x) of a slide, N = 85 nodes, M patches of a slide, D width of a feature,
H hidden width, C classes, R slides.
[1] Lu et al. 2023, MI-Zero.   [2] Ilse et al. 2018, gated attention.   [3] Lu et al. 2021, CLAM.
"""

from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
from data import LEVEL
from evaluate import MAG_NAMES
from prepare.slide import bare
from protocols import embed, labelled, metrics


# ---- MI-Zero and attention MIL ------------------------------------------------------------------
def at_level(x, level):
    """Take the patches of a magnification that hold tissue, of [P, N, D] -> [M, D].

    Features made elsewhere have N = 1, and are of level 0.
    """
    patches = x[:, LEVEL[: x.shape[1]] == level].reshape(-1, x.shape[2])
    return patches[~np.isnan(patches[:, 0])]


def pool_slide(s):
    """Average the j best cosines of each class at each magnification [1] -> {j: [4, C]}.

    s [P, N, C]: NaN where there is no tissue. A magnification that a slide has not stays NaN.
    """
    pooled = {j: np.full((4, s.shape[2]), np.nan) for j in evaluate.top_j(s[0])}
    for level in range(4):
        patches = at_level(s, level)
        for j, best in evaluate.top_j(patches).items() if len(patches) else ():
            pooled[j][level] = best
    return pooled


class GatedAttention(nn.Module):
    """Pool a slide's features [M, D] by gated attention [2] -> (logits [C], weights [M])."""

    def __init__(self, width, C, hidden=256, dropout=0.25):
        super().__init__()
        # The sizes of CLAM [3].
        self.embed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.value = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.head = nn.Linear(hidden, C)

    def forward(self, x):
        h = self.embed(x)  # [M, H]
        gated = torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))
        attention = self.score(gated).softmax(0)  # [M, 1]
        return self.head((attention * h).sum(0)), attention[:, 0]


def fit_mil(slides, y, C, epochs=30, lr=5e-4, seed=0, device="cpu"):
    """Learn from slides, a list of features [M, D] with classes y -> predict(slides) -> [R, C].

    The number of epochs is fixed, so no slide is needed to choose it.
    """
    torch.manual_seed(seed)
    # Standardise features by the training patches: towers differ in scale.
    patches = torch.cat(slides)
    mean = patches.mean(0)
    std = patches.std(0) + 1e-6
    model = GatedAttention(patches.shape[1], C).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(slides))
    y = torch.as_tensor(y).to(device)
    # Train on one slide a step, in random order.
    for _ in range(epochs):
        for i in torch.randperm(len(slides)).tolist():
            logits, _ = model(((slides[i] - mean) / std).to(device))
            loss = F.cross_entropy(logits, y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def predict(others):
        rows = [model(((x - mean) / std).to(device))[0].softmax(0).cpu() for x in others]
        return torch.stack(rows).numpy()

    return predict


def measure_mil(slides, y, C, who, split=(), folds=5, device="cpu"):
    """Measure attention MIL over metrics.splits -> scores; a slide is predicted once at most.

    slides: list of R features [M, D]; y [R]: classes; who [R]: patients, who are never on both
    sides; split [R]: "train", "test" or "".
    """
    rows = []
    found = []
    pairs = metrics.splits(y, who, split, folds)
    for train, test in data.progress(pairs, "MIL", unit="fold", leave=False):
        predict = fit_mil([slides[i] for i in train], y[train], C, device=device)
        found.append(predict([slides[i] for i in test]))
        rows.append(test)
    rows = np.concatenate(rows)
    return metrics.scores(y[rows], np.concatenate(found), C, who[rows])


# ---- Labelled slides of shards ------------------------------------------------------------------
def read_labels(path):
    """Read a table slide,label[,patient] -> {slide without suffix: (label, patient or slide)}."""
    labels = {}
    for number, row in labelled.read_csv(path, ("slide", "label")):
        gaps = [name for name in ("slide", "label", "patient") if not row.get(name, "there")]
        if gaps:
            raise ValueError(f"{path}:{number}: no {gaps[0]}: fill it in or delete the line")
        slide = bare(row["slide"])
        told = (row["label"], row.get("patient", slide))
        if labels.setdefault(slide, told) != told:
            raise ValueError(f"{path}:{number}: {slide} has two labels or patients: keep one")
    return labels


def list_shards(path, mark, folder):
    """List the slides of shards -> [(slide, file of its features in `folder`, (bags, rows))]."""
    bags = data.Bags(path)
    found = []
    for number, shard in enumerate(bags.shards):
        rows = np.flatnonzero(bags.shard_of == number).tolist()
        slide, stat = bags.slides[rows[0]], shard.stat()
        told = [mark, str(shard), stat.st_size, stat.st_mtime_ns]
        # The name of a slide may be as long as that of a file can be.
        name = f"{slide[:200]}-{labelled.digest(told)}.npz"
        found.append((slide, folder / name, (bags, rows)))
    return found


def list_features(path):
    """List the slides of a folder, a file of features each -> as `list_shards`, without bags."""
    found = {}
    files = [file for file in sorted(path.iterdir()) if file.suffix in embed.KINDS]
    if not files:
        deeper = [file for file in sorted(path.rglob("*")) if file.suffix in embed.KINDS]
        where = f"give {deeper[0].parent}" if deeper else "give a folder that does"
        raise ValueError(f"{path} itself holds no features ({', '.join(embed.KINDS)}): {where}")
    for file in files:
        # Ours carry the name of the slide, those of CLAM and TRIDENT are called by it.
        own = embed.read_features(file, ("slide",)) if file.suffix == ".npz" else {}
        slide = str(own.get("slide", bare(file.stem)))
        if bare(slide) in found:
            raise ValueError(
                f"{file} and {found[bare(slide)][1]} are of one slide: keep one of them"
            )
        found[bare(slide)] = (slide, file, None)
    return list(found.values())


class Slides:
    """R labelled slides: .names, .labels, .who (patients), .split, .paths of their features, [R].

    listing: folder -> rows as of `list_shards`; the folder, source, may hold train/ and test/.
    """

    def __init__(self, source, labels, listing):
        parts = [(source / name, name) for name in ("train", "test") if (source / name).is_dir()]
        listed = [(*row, split) for path, split in parts or [(source, "")] for row in listing(path)]
        found = [row for row in listed if bare(row[0]) in labels]
        if not found:
            raise ValueError(f"--labels names none of the slides in {source}: use their file names")
        lost = labels.keys() - {bare(row[0]) for row in found}
        if lost:
            print(f"slides of --labels that are not in {source}, {labelled.few(sorted(lost))}")
        unlabelled = [row[0] for row in listed if bare(row[0]) not in labels]
        if unlabelled:
            print(f"slides without a label, {labelled.few(unlabelled)}")
        names, self.paths, self.bags, split = zip(*found, strict=True)
        self.names, self.split = np.array(names), np.array(split)
        self.labels, self.who = np.array([labels[bare(name)] for name in names]).T
        # A patient on both sides of a split would make every number look better than it is.
        both = set(self.who[self.split == "train"]) & set(self.who[self.split == "test"])
        if both:
            print(f"{len(both)} patients are in both train and test: measured in folds by patient")
            self.split[:] = ""

    def embed(self, model):
        """Embed slide by slide, so that a call that is stopped can go on."""
        jobs = list(zip(self.names, self.paths, self.bags, strict=True))
        for name, path, (bags, rows) in data.progress(jobs, "slides", unit="slide"):
            if not path.exists():
                told = evaluate.embed(model, bags, rows, next(model.parameters()).device)
                wanted = ("image_embedding", "backbone", "valid")
                arrays = {key: told[key].numpy() for key in wanted}
                data.write_whole(path, partial(np.savez, slide=name, **arrays))

    def read(self, name):
        """Yield feature `name` [P, N, D] of each slide, NaN where there is no tissue.

        What was made elsewhere has one feature and is [P, 1, D].
        """
        width = None
        for path in self.paths:
            stored = embed.read_features(path, ("features", name, "valid"))
            if "valid" in stored:
                x = np.where(stored["valid"][..., None], stored[name], np.nan)
            elif "features" in stored:
                x = np.asarray(stored["features"], np.float32)
                x = x.reshape(-1, 1, x.shape[-1])
            else:
                raise ValueError(f"{path} has no array `features` [n, D]: save it under this name")
            width = width or x.shape[2]
            if x.shape[2] != width:
                widths = f"{x.shape[2]} numbers a patch, those before it {width}"
                raise ValueError(f"{path} has {widths}: give features of one model")
            yield x


def measure_pooling(slides, y, vectors):
    """Measure MI-Zero by class vectors [C, d] -> {"best j": {magnification: scores}}.

    Merged is the sum over magnifications, each minus the mean score of the training patches.
    """
    C = len(vectors)
    scored = [v @ vectors.numpy().T for v in slides.read("image_embedding")]  # R x [P, N, C]
    # Measure the test slides, and learn the means of the others; of one kind alone, both of all.
    test = slides.split == "test"
    test = test if test.any() else ~test
    learn = test if test.all() else ~test
    centre = np.zeros((4, C))
    for level in range(4):
        patches = np.concatenate([at_level(scored[i], level) for i in np.flatnonzero(learn)])
        if len(patches):
            centre[level] = patches.mean(0)
    pooled = [pool_slide(s) for s in scored]
    found = {}
    for j in pooled[0]:
        x = np.stack([tops[j] for tops in pooled])  # [R, 4, C]
        units = {mag: x[:, level] for level, mag in enumerate(MAG_NAMES)}
        units["merged"] = np.where(np.isnan(x).all(1), np.nan, np.nansum(x - centre, 1))
        # A slide counts at the magnifications that it has.
        for mag, s in units.items():
            use = test & ~np.isnan(s[:, 0])
            if use.any():
                row = evaluate.scores(y[use], s[use].argmax(1), C, slides.who[use])
                found.setdefault(f"best {j}", {})[mag] = row
    return found


def measure_slides(slides, model, source, classes, vectors, about, folds, out):
    """Measure MI-Zero (if there are classes), mean features and attention MIL -> OUT/results.json.

    model: None if features are there already; vectors [C, d] of the classes, or None.
    """
    names, order = labelled.order_classes(slides.labels.tolist(), classes)
    # Classes that no slide has are candidates for the prompts.
    names = list(classes) or names
    y = np.array([names.index(label) for label in slides.labels])
    # Refuse what cannot be measured before anything is read.
    learn = min(len(set(y)), len(set(slides.who))) > 1
    if not learn:
        count = (
            f"{len(y)} labelled slides of {len(set(y))} classes, {len(set(slides.who))} patients"
        )
        lack = f"{source} has {count}: attention MIL needs two of both"
        if vectors is None:
            raise ValueError(f"{lack}; label more slides, or ask by --classes")
        print(f"{lack} and is left out")
    if model:
        slides.embed(model)
    parted = len(set(slides.split)) > 1
    dealt = f"{min(folds, len(set(slides.who)))} folds by patient"
    split = "learned on train, measured on test" if parted else dealt
    about |= {"data": str(source), "n": len(y), "groups": "patient", "split": split}
    # Hash slides and labels, so that results of other tables can be told apart.
    told = sorted(zip(slides.names.tolist(), slides.labels.tolist(), strict=True))
    about["data_hash"] = labelled.digest(told)
    if vectors is not None:
        pooled = measure_pooling(slides, y, vectors)
        evaluate.save_results(out, "slides", {source.name: pooled}, about)
        for unit, rows in pooled.items():
            title = f"MI-Zero by the {unit} patches of a class"
            labelled.print_rows(title, rows, ["f1", "balanced"])
    if learn:
        pairs = metrics.splits(y, slides.who, slides.split, folds)
        about["unlearned"] = metrics.find_unlearned(pairs, np.eye(len(names))[y] > 0, names)
        about |= {"classes": names, "order": order}
        means, learned = learn_slides(slides, y, len(names), folds)
        for name, title, rows in (
            ("slide_probe", "Linear probe of mean features", means),
            ("mil", "Attention MIL", learned),
        ):
            evaluate.save_results(out, name, {source.name: rows}, about)
            labelled.print_rows(f"{title}, {split}", rows)
    print(f"\nwrote {out}/results.json")


def learn_slides(slides, y, C, folds):
    """Learn classes y [R] by a probe of mean features and by MIL -> two {magnification: scores}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    means, learned = {}, {}
    for level, mag in enumerate(MAG_NAMES):
        # Read one magnification at a time: all four may not fit into memory.
        x = []
        for found in slides.read("backbone"):
            x.append(torch.from_numpy(at_level(found, level)))
            mag = mag if found.shape[1] > 1 else "whole"
        use = [i for i, patches in enumerate(x) if len(patches)]
        x, who, parts = [x[i] for i in use], slides.who[use], slides.split[use]
        if min(len(set(y[use])), len(set(who))) > 1:
            learned[mag] = measure_mil(x, y[use], C, who, parts, folds, device)
            x = torch.stack([patches.mean(0) for patches in x])
            means[mag] = metrics.linear_probe(x, y[use], C, who, parts, folds)
    return means, learned
