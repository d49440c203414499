"""Measure what learns from labels: folds by patient, a linear probe, and the AUROC.

Not a command. Shape letters: R rows (pictures, slides), C classes, D width of a feature.

[1] Hand and Till 2001: the AUROC of several classes, one against one.
"""

from itertools import permutations

import numpy as np
import torch

import evaluate


# ---- Folds --------------------------------------------------------------------------------------
def folds(y, groups=None, k=5, seed=0):
    """Deal rows with classes y [R] to k folds -> [R]; rows of a group stay together, classes even.

    Groups go, the largest first, to the fold that has fewest rows of their most frequent class.
    """
    rng = np.random.default_rng(seed)
    groups = np.arange(len(y)) if groups is None else groups
    names, group = np.unique(groups, return_inverse=True)
    # Count the classes of each group.
    count = np.zeros((len(names), np.max(y) + 1))
    np.add.at(count, (group, y), 1)
    # Deal the groups; chance breaks ties.
    load = np.zeros((k, count.shape[1]))
    fold = np.zeros(len(names), int)
    for g in np.lexsort((rng.random(len(names)), -count.sum(1))):
        fold[g] = np.lexsort((rng.random(k), load.sum(1), load[:, count[g].argmax()]))[0]
        load[fold[g]] += count[g]
    return fold[group]


def splits(y, groups=None, split=(), k=5, seed=0):
    """Choose rows to learn from and rows to predict -> list of pairs (train, test) of row numbers.

    split: "train", "val", "test" or "" of each row; without test rows, k folds by group.
    """
    split = np.asarray(split)
    if (split == "test").any() and (split != "test").any():
        learn = np.isin(split, ("train", "val"))
        pairs = [(np.flatnonzero(learn), np.flatnonzero(split == "test"))]
    else:
        fold = folds(y, groups, k, seed)
        pairs = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]
    if not len(pairs[0][0]):
        raise ValueError("there is nothing to learn from: give rows of two slides or more")
    return pairs


def find_unlearned(pairs, holds, names):
    """Name the classes that are tested where none of their rows was learned -> list of names.

    pairs: (train, test) as of `splits`; holds bool [R, C]: which row is of, or has, which class.
    """
    lost = [holds[test].any(0) & ~holds[train].any(0) for train, test in pairs]
    found = np.array(names)[np.any(lost, 0)].tolist()
    if found:
        print(f"tested where too few patients were there to learn it: {', '.join(found)}")
    return found


# ---- Scores -------------------------------------------------------------------------------------
def auroc(y, probability, weight=None):
    """Average the AUROC over all ordered pairs of classes [1]: y [R], probability [R, C] -> float.

    Ties count half. With weight [times, R], how often each row counts, the result is [times].
    """
    weights = np.ones((1, len(y))) if weight is None else weight
    areas = [np.full(len(weights), np.nan)]
    for a, b in permutations(np.unique(y), 2):
        # Sort the rows of both classes by the score of the first; add up rows of equal score.
        rows = np.flatnonzero((y == a) | (y == b))
        rows = rows[np.argsort(probability[rows, a], kind="stable")]
        first = np.flatnonzero(np.diff(probability[rows, a], prepend=-np.inf))
        ours = np.add.reduceat(weights[:, rows] * (y[rows] == a), first, axis=1)
        others = np.add.reduceat(weights[:, rows] * (y[rows] == b), first, axis=1)
        # Count the pairs of rows in which ours scores higher.
        higher = (ours * (others.cumsum(1) - others / 2)).sum(1)
        with np.errstate(invalid="ignore"):
            areas.append(higher / (ours.sum(1) * others.sum(1)))
    # A resample may lack a class: average the pairs that it has.
    areas = np.ma.masked_invalid(areas).mean(0).filled(np.nan)
    return float(areas[0]) if weight is None else areas


def scores(y, probability, C, groups):
    """Compute evaluate.scores of the likeliest classes, and "auroc", also with an interval.

    y [R]: true classes; probability [R, C]; groups [R]: patients or slides.
    """
    y = np.asarray(y)
    probability = np.asarray(probability)
    found = evaluate.scores(y, probability.argmax(1), C, groups)
    # The AUROC costs far more than the rates: resample it less often.
    group, drawn = evaluate.resamples(groups)
    few = max(20, min(200, 2_000_000 // len(y)))
    samples = auroc(y, probability, drawn[:few, group])
    found["auroc"] = auroc(y, probability)
    found["interval"]["auroc"] = evaluate.interval(samples)
    return found


def linear_probe(x, y, C, groups, split=(), k=5):
    """Predict the test rows of x [R, D] by evaluate.fit_logistic over `splits` -> scores."""
    x = torch.as_tensor(x).double()
    rows = []
    found = []
    for train, test in splits(y, groups, split, k):
        weight, bias = evaluate.fit_logistic(x[train], y[train], C)
        rows.append(test)
        found.append((x[test] @ weight.T + bias).softmax(1).numpy())
    rows = np.concatenate(rows)
    return scores(y[rows], np.concatenate(found), C, np.asarray(groups)[rows])


def dice(matrix):
    """Compute each class's Dice overlap from confusion matrices [..., C, C] -> [..., C]."""
    with np.errstate(invalid="ignore"):
        return 2 * np.diagonal(matrix, 0, -2, -1) / (np.sum(matrix, -1) + np.sum(matrix, -2))
