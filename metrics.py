"""The numbers of a classifier, a ranking and a mask, in NumPy: each small enough to check by eye, all equal to scikit-learn's (tests).

A confusion matrix says all there is to say about predicted classes, so the rates are functions of it; the interval of a rate is that
of 1,000 confusion matrices (20 to 200 for the AUROC), each of patients (slides, clusters ...) drawn with replacement, because patches of one patient are no
independent witnesses. What is not defined (the AUROC of a single class) is NaN, never 0.

Shape letters: R rows (patches, slides), C classes, W groups, T resamples.
"""
import numpy as np

RATES = ("f1", "macro_f1", "balanced", "accuracy", "kappa", "kappa_quadratic")


def confusion(y, p, C):
    """Counts [C, C]: row = truth y [R], column = prediction p [R]."""
    return np.bincount(np.asarray(y) * C + np.asarray(p), minlength=C * C).reshape(C, C)


def rates(m):
    """Confusion matrices [..., C, C] -> dict of name -> [...].

    f1: per-class F1 averaged by support, the paper's metric; macro_f1: averaged over the classes that occur as truth or prediction; balanced: mean
    recall of the classes present; kappa: Cohen's; kappa_quadratic: errors weighted by the squared distance of the classes' numbers (for grades)."""
    m = np.asarray(m, float)
    C, hit, support, predicted = m.shape[-1], np.diagonal(m, axis1=-2, axis2=-1), m.sum(-1), m.sum(-2)
    n, either, present = m.sum((-2, -1)), support + predicted > 0, support > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(either, 2 * hit / (support + predicted), 0)
        expected = support[..., :, None] * predicted[..., None, :] / n[..., None, None]
        kappa = lambda wrong: 1 - (wrong * m).sum((-2, -1)) / (wrong * expected).sum((-2, -1))
        return {"f1": (f1 * support).sum(-1) / n, "macro_f1": f1.sum(-1) / either.sum(-1),
                "balanced": np.where(present, hit / support, 0).sum(-1) / present.sum(-1), "accuracy": hit.sum(-1) / n,
                "kappa": kappa(1 - np.eye(C)), "kappa_quadratic": kappa((np.arange(C)[:, None] - np.arange(C)) ** 2)}


def _area(score, positive, weight):
    """Area under the ROC curve: scores [R], which rows are positive [R], how often each row counts [T, R] -> [T]. It is the chance that a
    positive row scores higher than a negative one, ties counting half: a sum over the distinct scores in rising order."""
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))                     # where a new score begins
    weight, positive = weight[:, order], positive[order]
    a = weight * positive
    b = weight - a
    if len(first) < len(order):                                                        # ties: [T, distinct scores]
        a, b = np.add.reduceat(a, first, axis=1), np.add.reduceat(b, first, axis=1)
    with np.errstate(invalid="ignore"):
        return np.einsum("td,td->t", a, b.cumsum(1) - b / 2) / (a.sum(1) * b.sum(1))


def auroc(y, probability, weight=None):
    """AUROC of truth y [R] and class probabilities [R, C] -> [T] for weights [T, R], or one number. Two classes: that of the second; more: the mean over all
    pairs of classes present of both directions, each on the rows of the pair alone (one-versus-one, macro: Hand & Till 2001)."""
    y, p = np.asarray(y), np.asarray(probability, float)
    w = np.ones((1, len(y))) if weight is None else np.asarray(weight, float)
    present = np.unique(y).tolist()
    if p.shape[1] == 2:
        out = _area(p[:, 1], y == 1, w)
    elif len(present) < 2:
        out = np.full(len(w), np.nan)
    else:
        areas = []
        for i, a in enumerate(present):
            for b in present[i + 1:]:
                rows = (y == a) | (y == b)
                areas += [(_area(p[rows, a], y[rows] == a, w[:, rows]) + _area(p[rows, b], y[rows] == b, w[:, rows])) / 2]
        with np.errstate(invalid="ignore"):
            there = ~np.isnan(areas)                                                   # a resample may lack a class
            out = np.where(there, areas, 0).sum(0) / there.sum(0)
    return out if weight is not None else float(out[0])


def scores(y, p, C, groups=None, probability=None, times=1000, seed=0):
    """Everything about predicted classes p [R] beside the truth y [R]: dict of RATES, of auroc where probability [R, C] is given, of n and, where
    groups [R] (any labels) are, `groups` (their number) and `interval`: rate -> (low, high), the 95 % of a bootstrap over groups (NaN of a single one).
    ValueError where there is no row."""
    y, p = np.asarray(y), np.asarray(p)
    if not len(y):
        raise ValueError("there is nothing to measure: no row has both a picture that can be read and a class")
    out = {k: float(v) for k, v in rates(confusion(y, p, C)).items()} | {"n": len(y)}
    if probability is not None:
        out["auroc"] = auroc(y, probability)
    if groups is not None:
        (names, which), rng = np.unique(np.asarray(groups), return_inverse=True), np.random.default_rng(seed)
        W = len(names)
        draw = lambda T: rng.multinomial(W, np.full(W, 1 / W), T)                      # how often each group: [T, W]
        if W == len(y):                                                                # rows on their own: draw the cells of the matrix, which is the same
            samples = rates(rng.multinomial(W, confusion(y, p, C).ravel() / W, times).reshape(times, C, C))
        else:
            parts = np.bincount(which * C * C + y * C + p, minlength=W * C * C).reshape(W, C * C)
            samples = rates((draw(times).astype(float) @ parts).reshape(times, C, C))
        if probability is not None:                                                    # it costs a hundred times as much as the others
            samples["auroc"] = auroc(y, probability, draw(max(20, min(200, 2_000_000 // len(y))))[:, which])
        out |= {"groups": W, "interval": {k: interval(v if W > 1 else []) for k, v in samples.items()}}
    return out


def interval(samples):
    """Samples [T] -> (low, high) of their middle 95 %, without those that are not defined; NaN where none is."""
    samples = np.asarray(samples, float)
    samples = samples[~np.isnan(samples)]
    return tuple(np.percentile(samples, [2.5, 97.5]).tolist()) if len(samples) else (np.nan, np.nan)


def recalls(similarity, hit, ks=(1, 5, 10)):
    """Retrieval: similarity [R, G] of queries and gallery, hit bool [R, G], which answers are right -> {"R@k": share of queries with a right answer
    among their first k}. Queries without any right answer count as missed."""
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : max(ks)]
    found = np.take_along_axis(hit, order, 1)
    return {f"R@{k}": float(found[:, :k].any(1).mean()) for k in ks}


def dice(m):
    """Dice of each class from confusion matrices of pixels [..., C, C] -> [..., C]: twice the overlap over the sum of both areas; NaN for a class in neither."""
    m = np.asarray(m, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * np.diagonal(m, axis1=-2, axis2=-1) / (m.sum(-1) + m.sum(-2))
