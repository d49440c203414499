"""Protocols that learn from labels: linear probe, prototypes, k-NN, few-shot; gated-attention MIL for slides; full fine-tuning.

The first four are functions of features: x0 [R0, M], y0 [R0] to learn from and x1 [R1, M] to predict, which give class probabilities [R1, C]. `cross`
runs any of them over folds in which no patient is on both sides, so that every row is predicted once by a model that did not see it.

Outline: tasks and splits | on frozen features | slides (attention MIL) | full fine-tuning.
Shape letters: R rows, M features, C classes, N patches of a slide, H hidden width, S pixels per side.

References: [1] Lu et al. 2024, CONCH (the probe's regularisation).  [2] Chen et al. 2024, UNI (prototypes, k-NN).  [3] Wang et al. 2019, SimpleShot.
[4] Ilse et al. 2018, attention-based MIL.  [5] Lu et al. 2021, CLAM (its sizes).  [6] Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT (layer-wise
decay).
"""
import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import metrics
import prompts
from datasets import folds
from metrics import scores
from pictures import LEVEL, MAG_NAMES
from subjects import by_slide, labels_of


# ----------------------------------------------------------------------------------------------------------------------
# Tasks and splits

@dataclass
class Task:
    """R rows with a class. x: features by name, [R, M] each; y [R] numbers of `classes`; groups [R] (slides, patients) or None; split [R], of "train",
    "val", "test" or ""; places, where rows are patches of shards: (which part, row of its features, node) each."""
    name: str
    x: dict
    y: np.ndarray
    classes: list
    groups: object = None
    split: object = ()
    places: list = ()

    @property
    def who(self):
        """What a bootstrap draws: the groups, else the rows."""
        return np.arange(len(self.y)) if self.groups is None else np.asarray(self.groups)


def tasks_of_bags(parts, facts=tuple(prompts.BUILT_IN), mags=MAG_NAMES, most=3000, seed=0):
    """Tasks of shards, the patches of one magnification that have a fact: parts [(bags, feats, "train" or "test" or "")], at most `most` rows of each
    part, drawn by lot -> yields Task; what a part has none of is left out."""
    rng = np.random.default_rng(seed)
    for fact in facts:
        for mag in mags:
            x, y, slides, split, places = [], [], [], [], []
            for k, (bags, feats, name) in enumerate(parts):
                truth = labels_of(bags, feats["index"], fact)                          # [G, N]
                spots = np.argwhere((truth >= 0) & feats["valid"].numpy() & (LEVEL == MAG_NAMES.index(mag)))
                spots = spots[rng.permutation(len(spots))[:most]]                      # [R, 2]: row of feats, node
                x.append({n: f[tuple(spots.T)].numpy() for n, f in feats.items() if n not in ("valid", "index")})
                y.append(truth[tuple(spots.T)])
                slides += [bags.slides[feats["index"][g]] for g, _ in spots]
                split += [name] * len(spots)
                places += [(k, *spot) for spot in spots.tolist()]
            if all(map(len, y)):
                x = {{"v": "projected"}.get(n, n): np.concatenate([part[n] for part in x]) for n in x[0]}
                yield Task(f"{fact} {mag}", x, np.concatenate(y), list(prompts.BUILT_IN[fact]), np.array(slides), split, places)


def splits(y, groups, split, k=5, seed=0):
    """Which rows to learn from and which to predict: [(index arrays train, test)]. The source's own split where it has one (its validation rows are
    learned from as well), else k folds by group."""
    split = np.asarray(split)
    if (split == "test").any() and (split != "test").any():
        pairs = [(np.flatnonzero((split == "train") | (split == "val")), np.flatnonzero(split == "test"))]
    else:
        fold = folds(y, groups, k, seed)
        pairs = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(k) if (fold == f).any()]
    if not all(map(len, pairs[0])):
        raise ValueError("there is nothing to learn from beside what is to be predicted: give rows of two groups (patients, slides) or more, or a split of train and test")
    return pairs


def cross(method, x, y, C, pairs):
    """A method over `splits` -> (rows that were predicted [R1], their probabilities [R1, C])."""
    out = [(test, method(x[train], y[train], x[test], C)) for train, test in pairs]
    return np.concatenate([rows for rows, _ in out]), np.concatenate([p for _, p in out])


# ----------------------------------------------------------------------------------------------------------------------
# On frozen features

def fit_logistic(x, y, C, iterations=1000):
    """Multinomial logistic regression by L-BFGS: x [R, M], y [R] -> (W [C, M], b [C]), float64. Minimises the summed cross-entropy + lambda / 2 |W|^2 with
    lambda = 100 / (M C), the published setting [1]: scikit-learn's C = M C / 100. Features as they are: neither scaled nor normalised. Of two classes
    scikit-learn penalises one vector w and not the pair (w / 2, -w / 2) that a softmax has, so there lambda is twice that: the same optimum."""
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y)
    mean = x.mean(0)                                                                   # b is not penalised, so that centred features have the same optimum;
    x = x - mean                                                                       # it is found in far fewer steps
    W, b = torch.zeros(C, x.shape[1], dtype=x.dtype, requires_grad=True), torch.zeros(C, dtype=x.dtype, requires_grad=True)
    penalty = 100 / (x.shape[1] * C) * (2 if C == 2 else 1)
    optimizer = torch.optim.LBFGS([W, b], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=1e-8, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (F.cross_entropy(x @ W.T + b, y, reduction="sum") + penalty / 2 * W.square().sum()) / len(x)
        loss.backward()
        return loss
    optimizer.step(closure)
    return W.detach(), (b - W @ mean).detach()


def logistic(x0, y0, x1, C):
    """The linear probe -> probabilities [R1, C]."""
    W, b = fit_logistic(x0, y0, C)
    return (torch.as_tensor(x1).double() @ W.T + b).softmax(1).numpy()


def _centred(x0, x1):
    """Both minus the training mean, each row of length 1 [2, 3]."""
    mean = x0.mean(0)
    return [(x - mean) / np.maximum(np.linalg.norm(x - mean, axis=1, keepdims=True), 1e-12) for x in (x0, x1)]


def prototypes(x0, y0, x1, C):
    """The nearest class mean of centred, normalised features [2, 3] -> probabilities [R1, C], a softmax of minus the squared distance; a class
    without a row gets none."""
    x0, x1 = _centred(x0, x1)
    means = np.stack([x0[y0 == c].mean(0) if (y0 == c).any() else np.zeros(x0.shape[1]) for c in range(C)])
    near = 2 * x1 @ means.T - np.square(means).sum(1)                                  # minus the squared distance, but for |x1|^2, which all classes share
    near[:, np.bincount(y0, minlength=C) == 0] = -np.inf
    return torch.from_numpy(near).double().softmax(1).numpy()


def nearest(x0, y0, x1, C, k=20):
    """k nearest neighbours of centred, normalised features [2] -> the share of each class among them [R1, C]; of equal shares the first class wins."""
    x0, x1 = _centred(x0, x1)
    vote = np.eye(C)[y0]
    return np.concatenate([vote[np.argsort(-part @ x0.T, axis=1, kind="stable")[:, :k]].mean(1) for part in np.array_split(x1, -(-len(x1) // 1024))])


METHODS = {"probe": logistic, "prototypes": prototypes, "knn20": nearest}


def few_shot(x, y, C, pairs, shots=(1, 2, 4, 8, 16), seeds=10):
    """SimpleShot [3]: prototypes of k labelled rows per class, drawn `seeds` times from the training rows of the first of `pairs` ->
    {k: {"balanced": mean, "std": over the draws, "low", "high": worst and best draw}}; k that a class has not enough rows for is left out."""
    (train, test), out = pairs[0], {}
    for k in shots:
        if np.bincount(y[train], minlength=C).min() < k:
            break
        found = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, k])
            rows = np.concatenate([rng.permutation(train[y[train] == c])[:k] for c in range(C)])
            found.append(metrics.rates(metrics.confusion(y[test], prototypes(x[rows], y[rows], x[test], C).argmax(1), C))["balanced"])
        out[k] = {"balanced": float(np.mean(found)), "std": float(np.std(found)), "low": float(min(found)), "high": float(max(found))}
    return out


def probe(tasks, features=("backbone",), k=5, seed=0):
    """Every method of METHODS, and few-shot, on every feature of every Task -> {"probe": [row], "few_shot": [row]}."""
    out = {"probe": [], "few_shot": []}
    for task in tasks:
        C, pairs = len(task.classes), splits(task.y, task.groups, task.split, k, seed)
        for feature in (f for f in features if f in task.x):
            about = {"task": task.name, "features": feature}
            for name, method in METHODS.items():
                rows, p = cross(method, task.x[feature], task.y, C, pairs)
                out["probe"].append({**about, "method": name, **scores(task.y[rows], p.argmax(1), C, task.who[rows], p)})
            out["few_shot"].append({**about, "n": len(pairs[0][1]), "k": few_shot(task.x[feature], task.y, C, pairs)})
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Slides: many patches, one label

class GatedAttention(nn.Module):
    """Gated-attention pooling [4] in CLAM's form [5]: a slide's features [N, M] -> (logits [C], weights of the patches [N])."""

    def __init__(self, width, C, hidden=256, dropout=0.25):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.tanh, self.sigmoid, self.score, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, C)

    def forward(self, x):
        """x [N, M] -> (logits [C], attention [N])."""
        h = self.embed(x)                                                              # [N, H]
        a = self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.sigmoid(h))).softmax(0)             # [N, 1]
        return self.head((a * h).sum(0)), a[:, 0]


def fit_mil(bags, y, C, epochs=30, lr=5e-4, seed=0):
    """Train on slides: bags, a list of features [N, M]; y [slides] -> function of a list of bags -> probabilities [slides, C]. One slide a step,
    AdamW, cosine schedule; features are standardised by the training patches. No early stopping: the epochs are fixed, so no slide is needed to
    choose them."""
    torch.manual_seed(seed)
    everything = torch.cat([torch.as_tensor(x) for x in bags])
    mean, std = everything.mean(0), everything.std(0) + 1e-6
    model = GatedAttention(everything.shape[1], C)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(bags))
    for _ in range(epochs):
        for i in torch.randperm(len(bags)).tolist():
            loss = F.cross_entropy(model((torch.as_tensor(bags[i]) - mean) / std)[0], torch.tensor(int(y[i])))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def predict(bags):
        model.eval()
        return torch.stack([model((torch.as_tensor(x) - mean) / std)[0].softmax(0) for x in bags]).numpy()
    return predict


def mil(bags, y, C, pairs):
    """Gated-attention MIL over `splits` of slides -> (slides that were predicted, probabilities)."""
    out = [(test, fit_mil([bags[i] for i in train], y[train], C)([bags[i] for i in test])) for train, test in tqdm(pairs, desc="MIL", unit="fold", leave=False)]
    return np.concatenate([rows for rows, _ in out]), np.concatenate([p for _, p in out])


def mil_of_bags(parts, classes, patients=None, feature="backbone", k=5):
    """Attention MIL per magnification: parts [(bags, feats, {slide: class}, split)], classes, {slide: patient} or None -> {mag: scores}. Learns on the
    training slides and is measured on the test slides where both are there, else in k folds by patient."""
    out = {}
    for lev, mag in enumerate(MAG_NAMES):
        x, y, who, split = [], [], [], []
        for bags, feats, truth, name in parts:
            for slide, rows in by_slide(bags, feats).items():
                use = feats["valid"][rows][:, LEVEL == lev]
                if slide in truth and use.any():
                    x.append(feats[feature][rows][:, LEVEL == lev][use])               # [N, M]
                    y.append(classes.index(truth[slide]))
                    who.append((patients or {}).get(slide, slide))
                    split.append(name)
        y, who = np.array(y), np.array(who)
        if len(set(y)) > 1:
            rows, p = mil(x, y, len(classes), splits(y, who, split, k))
            out[mag] = scores(y[rows], p.argmax(1), len(classes), who[rows], p)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Full fine-tuning

def layer_groups(vision, head, lr, decay, weight_decay=0.05):
    """Parameters of a tower and a head in groups for AdamW: the head learns at lr, each layer below at `decay` times the rate of the one above [6]:
    the last norm with the head, blocks from the top down, the stem and its positions last. Vectors (norms, biases) and tokens are not decayed."""
    depth, groups = len(vision.blocks), {}
    for name, p in [*vision.named_parameters(), *((f"head.{k}", p) for k, p in head.named_parameters())]:
        below = 0 if name.startswith(("head.", "ln.")) else depth - int(name.split(".")[1]) if name.startswith("blocks.") else depth + 1
        if name != "proj":                                                             # CLIP's projection is behind what is read here
            groups.setdefault((below, p.dim() > 1 and name not in ("cls", "pos")), []).append(p)
    return [dict(params=ps, lr=lr * decay ** below, weight_decay=weight_decay * decayed) for (below, decayed), ps in groups.items()]


def fine_tune(vision, tiles, y, C, train, val, device="cpu", epochs=30, patience=6, batch=32, lr=1e-3, decay=0.65, jitter=0.05, seed=0):
    """Train a copy of a whole tower with a linear head on its class token -> (function of row numbers -> probabilities, number of the best epoch).

    tiles: Dataset of (uint8 [1, 3, S, S], _) or a sentence for what cannot be read (it is passed over); y [R]; train, val: row numbers, of different
    patients. Turns, mirror images and stain jitter; AdamW with layer-wise decay, one epoch of warm-up, cosine. Stops when `patience` epochs brought
    no better balanced accuracy on val, and the best epoch's weights are what predicts."""
    torch.manual_seed(seed)
    vision, head = copy.deepcopy(vision).float().requires_grad_(True).to(device), nn.Linear(vision.width, C).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(layer_groups(vision, head, lr, decay))
    steps = max(1, len(train) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / steps) * (1 + math.cos(math.pi * min(1, i / (epochs * steps)))) / 2)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def batches(rows, size):
        keep = lambda items: [(i, item[0][0]) for i, item in items if not isinstance(item, str)]
        loader = DataLoader([int(r) for r in rows], batch_size=size, collate_fn=lambda rows: keep([(r, tiles[r]) for r in rows]))
        for items in loader:
            if items:
                yield torch.tensor([i for i, _ in items]), torch.stack([x for _, x in items]).to(device).float() / 255

    @torch.no_grad()
    def predict(rows):
        vision.eval()
        p = torch.zeros(len(rows), C)                                                  # a picture that cannot be read stays at 0
        at = {int(r): i for i, r in enumerate(rows)}
        for which, x in batches(rows, 64):
            with autocast:
                p[[at[r] for r in which.tolist()]] = head(vision(x)[:, 0]).float().softmax(1).cpu()
        return p.numpy()
    best, best_epoch, kept = -1.0, 0, None
    truth, bar = torch.as_tensor(y), tqdm(range(1, epochs + 1), desc="fine-tune", unit="epoch", leave=False)
    for epoch in bar:
        vision.train()
        order = np.random.default_rng([seed, epoch]).permutation(train)
        for which, x in batches(order[: max(batch, len(order) // batch * batch)], batch):
            x = data.turn(x, torch.randint(0, 8, (len(x),), device=device))
            x = data.stain_jitter(x, jitter)
            with autocast:
                loss = F.cross_entropy(head(vision(x)[:, 0]).float(), truth[which].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*vision.parameters(), *head.parameters()], 1.0)
            optimizer.step()
            schedule.step()
        found = metrics.rates(metrics.confusion(y[val], predict(val).argmax(1), C))["balanced"]
        if found > best:
            best, best_epoch = found, epoch
            kept = copy.deepcopy((vision.state_dict(), head.state_dict()))
        bar.set_postfix_str(f"balanced accuracy on validation {found:.3f}, best {best:.3f}")
        if epoch - best_epoch >= patience:
            break
    vision.load_state_dict(kept[0])
    head.load_state_dict(kept[1])
    return predict, best_epoch


def tune(vision, tiles, task, device="cpu", k=5, seed=0, **settings):
    """`fine_tune` over `splits`, each with a fifth of its training groups (or the source's own validation rows) to stop by -> a row of scores."""
    rows, p, best, split = [], [], [], np.asarray(task.split)
    for train, test in splits(task.y, task.groups, task.split, k, seed):
        val = split[train] == "val"
        if not val.any():
            groups = len(set(task.who[train]))
            if groups < 2:
                raise ValueError(f"{task.name} has {groups} group to learn from, and fine-tuning stops by one that it does not learn from: give it more patients")
            val = folds(task.y[train], task.who[train], min(5, groups), seed) == 0
        if val.all():
            raise ValueError(f"{task.name} has only validation rows to learn from: fine-tuning learns from rows of split train")
        predict, epoch = fine_tune(vision, tiles, task.y, len(task.classes), train[~val], train[val], device, seed=seed, **settings)
        found = predict(test)                                                          # [R1, C]
        read = found.sum(1) > 0                                                        # not those that could not be
        rows, p, best = rows + [test[read]], p + [found[read]], best + [epoch]
    rows, p = np.concatenate(rows), np.concatenate(p)
    return {"task": task.name, "method": f"fine-tuned, best epochs {' '.join(map(str, best))}", **scores(task.y[rows], p.argmax(1), len(task.classes), task.who[rows], p)}
