"""Tell the class of a tiled slide from its patches: pooled by text, or learned by attention MIL.

Not a command: `python -m protocols.slides MODEL --data SHARDS --labels CSV` calls it.

Shape letters: P parents (5x) of a slide, N = 85 nodes, M patches of a slide, D width of a feature,
H hidden width, C classes, R slides.
[1] Lu et al. 2023, MI-Zero.   [2] Ilse et al. 2018, gated attention.   [3] Lu et al. 2021, CLAM.
"""

import csv
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
from data import LEVEL
from evaluate import MAG_NAMES
from protocols import labelled, metrics

# ---- MI-Zero and attention MIL ------------------------------------------------------------------


def pool_slide(s, centre=0.0):
    """Pool a slide's cosines by the j best patches of each class [1].

    s [P, N, C]: NaN where there is no tissue. Returns {magnification or "merged": {"j": [C]}};
    merged is the sum over magnifications, each minus its centre [4, C].
    """
    centre = np.zeros((4, s.shape[2])) + centre
    pooled = {}
    merged = {}
    for level, mag in enumerate(MAG_NAMES):
        patches = s[:, LEVEL == level].reshape(-1, s.shape[2])
        # Leave out glass; leave out a magnification that the slide has not.
        patches = patches[~np.isnan(patches[:, 0])]
        if len(patches):
            pooled[mag] = {str(j): best for j, best in evaluate.top_j(patches).items()}
            for j, best in pooled[mag].items():
                merged[j] = merged.get(j, 0) + best - centre[level]
    return pooled | {"merged": merged}


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

    One slide a step, AdamW, cosine schedule. Features are standardised by the training patches. The
    number of epochs is fixed, so no slide is needed to choose it.
    """
    torch.manual_seed(seed)
    # Standardise features, which differ in scale between towers.
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


def measure_mil(slides, y, C, who, split=(), folds=5, device="cpu", title="MIL"):
    """Measure attention MIL over metrics.splits -> scores.

    slides: list of R features [M, D]; y [R]: classes; who [R]: patients, who are never on both
    sides; split [R]: "train", "test" or "".
    """
    rows = []
    found = []
    # Learn and predict fold by fold; every slide is predicted once at most.
    pairs = metrics.splits(y, who, split, folds)
    for train, test in tqdm(pairs, title, unit="fold", leave=False, disable=None):
        predict = fit_mil([slides[i] for i in train], y[train], C, device=device)
        found.append(predict([slides[i] for i in test]))
        rows.append(test)
    rows = np.concatenate(rows)
    p = np.concatenate(found)
    return metrics.scores(y[rows], p, C, who[rows])


# ---- Labelled slides of shards ------------------------------------------------------------------


def read_labels(path):
    """Read a table slide,label[,patient] -> {slide: (label, patient)}; a patient else a slide."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"slide", "label"} <= rows[0].keys() or not all(r["label"] for r in rows):
        raise ValueError(f"{path} is no table of slide,label[,patient] with a label each: mend it")
    return {row["slide"]: (row["label"], row.get("patient") or row["slide"]) for row in rows}


class Slides:
    """R labelled slides of shards: .labels, .who (patients), .split, .paths of features, each [R].

    Features are read once into `folder`, a file a slide, which is named by weights and shard.
    """

    def __init__(self, peer, source, labels, folder):
        # Find the labelled slides, and the bags of each.
        parts = [(source / name, name) for name in ("train", "test") if (source / name).is_dir()]
        jobs = []
        found = []
        for path, split in parts or [(source, "")]:
            bags = data.Bags(path)
            names = np.array(bags.slides)
            for slide in np.unique(names):
                if slide in labels:
                    rows = np.flatnonzero(names == slide)
                    shard = bags.shards[bags.shard_of[rows[0]]]
                    stat = shard.stat()
                    told = f"{peer.fingerprint} {shard} {stat.st_size} {stat.st_mtime_ns}"
                    key = hashlib.sha256(told.encode()).hexdigest()[:12]
                    jobs.append((bags, rows.tolist(), folder / f"{slide}-{key}.npz"))
                    found.append((*labels[slide], split))
        if not jobs:
            raise ValueError(f"--labels names none of the slides in {source}: use their file names")
        self.paths = [path for _, _, path in jobs]
        # Part the rows into columns.
        self.labels, self.who, self.split = map(np.array, zip(*found, strict=True))
        # A patient on both sides of a split would make every number look better than it is.
        both = set(self.who[self.split == "train"]) & set(self.who[self.split == "test"])
        if both:
            print(f"{len(both)} patients are in both train and test: measured in folds by patient")
            self.split[:] = ""
        # Embed slide by slide, so that a call that is stopped can go on.
        for bags, rows, path in tqdm(jobs, "slides", unit="slide", disable=None):
            if not path.exists():
                device = next(peer.model.parameters()).device
                told = evaluate.embed(peer.model, bags, rows, device)
                wanted = ("image_embedding", "backbone", "valid")
                arrays = {name: told[name].numpy() for name in wanted}
                data.write_whole(path, partial(np.savez, **arrays))

    def read(self, name):
        """Yield feature `name` [P, N, D] of each slide, NaN where there is no tissue."""
        for path in self.paths:
            with np.load(path) as stored:
                yield np.where(stored["valid"][..., None], stored[name], np.nan)


def measure_pooling(slides, y, vectors):
    """Measure MI-Zero by class vectors [C, d] -> {"best j": {magnification: scores}}.

    The sum over magnifications is centred on the training slides, where there are any.
    """
    scored = [v @ vectors.numpy().T for v in slides.read("image_embedding")]
    # Measure the test slides, or all where there is no split.
    test = slides.split == "test"
    learn = ~test
    if not test.any() or test.all():
        test = learn = np.ones_like(test)
    # Find the mean score of each class at each magnification.
    everything = np.concatenate([scored[i] for i in np.flatnonzero(learn)])
    centre = np.zeros((4, len(vectors)))
    for level in range(4):
        patches = everything[:, LEVEL == level]
        if not np.isnan(patches).all():
            centre[level] = np.nanmean(patches, (0, 1))
    pooled = [pool_slide(s, centre) for s in scored]
    found = {}
    # A slide counts at the magnifications that it has.
    for mag in (*MAG_NAMES, "merged"):
        use = [i for i in np.flatnonzero(test) if mag in pooled[i]]
        for j in pooled[use[0]][mag] if use else ():
            p = np.stack([pooled[i][mag][j] for i in use]).argmax(1)
            row = evaluate.scores(y[use], p, len(vectors), slides.who[use])
            found.setdefault(f"best {j}", {})[mag] = row
    return found


def measure_shards(peer, source, labels, classes, vectors, about, folds, out):
    """Measure MI-Zero (if there are classes) and attention MIL -> OUT/results.json, tables."""
    slides = Slides(peer, source, labels, Path(out) / "features")
    names = list(classes or sorted(set(slides.labels)))
    y = np.array([names.index(label) for label in slides.labels])
    parted = (slides.split == "test").any()
    split = "learned on train, measured on test" if parted else f"{folds} folds by patient"
    # Hash slides and labels, so that results of other tables can be told apart.
    told = sorted(zip([p.stem for p in slides.paths], slides.labels.tolist(), strict=True))
    about |= {"data": str(source), "n": len(y), "groups": "patient", "split": split}
    about["data_hash"] = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    if vectors is not None:
        pooled = measure_pooling(slides, y, vectors)
        evaluate.save_results(out, "slides", {source.name: pooled}, about)
        for unit, rows in pooled.items():
            labelled.print_rows(
                f"MI-Zero by the {unit} patches of a class", rows, ["f1", "balanced"]
            )
    learned = {}
    device = next(peer.model.parameters()).device
    for level, mag in enumerate(MAG_NAMES):
        # Read one magnification at a time: all four may not fit into memory.
        x = []
        use = []
        for i, found in enumerate(slides.read("backbone")):
            patches = found[:, LEVEL == level].reshape(-1, found.shape[2])
            patches = patches[~np.isnan(patches[:, 0])]
            if len(patches):
                x.append(torch.from_numpy(patches))
                use.append(i)
        if len(set(y[use])) > 1:
            who, parts, title = slides.who[use], slides.split[use], f"MIL at {mag}"
            learned[mag] = measure_mil(x, y[use], len(names), who, parts, folds, device, title)
    if learned:
        evaluate.save_results(out, "mil", {source.name: learned}, about)
        labelled.print_rows(f"Attention MIL, {split}", learned)
    else:
        print("all slides have one class: attention MIL is left out")
    print(f"\nwrote {out}/results.json")
