"""pytest tests/test_metrics.py: the AUROC, Dice, folds by group, the linear probe.

Golden numbers are scikit-learn's (1.9.1) on the same inputs; the rest is counted by hand.
"""

import numpy as np
import pytest

import evaluate
from protocols import metrics

# ---- Scores -------------------------------------------------------------------------------------

Y = [0, 0, 0, 1, 1, 2, 2, 2, 2, 1]
Q = [[0.6, 0.3, 0.1], [0.5, 0.25, 0.25], [0.3, 0.5, 0.2], [0.2, 0.6, 0.2], [0.1, 0.4, 0.5]]
Q += [[0.1, 0.1, 0.8], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3], [0.25, 0.25, 0.5], [0.1, 0.7, 0.2]]
TIES = [[0.8, 0.2], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5], [0.8, 0.2]]


def test_golden_auroc():
    assert metrics.auroc(np.array(Y), np.array(Q)) == pytest.approx(0.9398148148148149, abs=1e-12)
    y = np.array([0, 0, 1, 1, 1, 0])
    assert metrics.auroc(y, np.array(TIES)) == pytest.approx(0.888888888888889, abs=1e-12)


def test_random_cases_equal_scikit_learn():
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for C in (2, 3, 5):
        y = rng.integers(0, C, 200)
        q = rng.random((200, C)).round(1) + 0.01
        q /= q.sum(1, keepdims=True)
        found = metrics.scores(y, q, C, np.arange(200))
        many = {} if C == 2 else {"multi_class": "ovo"}
        golden = theirs.roc_auc_score(y, q[:, 1] if C == 2 else q, **many)
        assert found["auroc"] == pytest.approx(golden, abs=1e-12)
        low, high = found["interval"]["auroc"]
        assert low < golden < high and {"f1", "auroc"} < set(found["interval"])


def test_undefined_values_are_nan():
    third = np.full((2, 3), 1 / 3)
    alone = metrics.scores([0, 0], third, 3, ["a", "b"])
    assert np.isnan(alone["auroc"]) and alone["f1"] == 1
    assert np.isnan(alone["interval"]["auroc"]).all()
    assert np.isnan(metrics.dice(np.diag([3, 0]))[1])


def test_weights_of_the_auroc_are_repeated_rows():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 40)
    q = rng.random((40, 3)).round(1)
    weights = rng.integers(0, 4, (2, 40))
    for weight, found in zip(weights, metrics.auroc(y, q, weights), strict=True):
        rows = np.repeat(np.arange(40), weight)
        assert found == pytest.approx(metrics.auroc(y[rows], q[rows]), abs=1e-12)


def test_dice_by_hand():
    matrix = evaluate.confusion([0, 0, 0, 1], [0, 0, 1, 1], 2)
    assert metrics.dice(matrix).tolist() == pytest.approx([2 * 2 / 5, 2 * 1 / 3])


# ---- Folds and the probe ------------------------------------------------------------------------


def test_folds_keep_groups_together_and_classes_even():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 300)
    y = groups % 3  # a patient has one disease
    fold = metrics.folds(y, groups, 5)
    assert all(len(set(fold[groups == g])) == 1 for g in range(40)) and set(fold) == set(range(5))
    share = np.array([np.bincount(y[fold == f], minlength=3) / (fold == f).sum() for f in range(5)])
    assert np.abs(share - share.mean(0)).max() < 0.12
    assert np.bincount(metrics.folds(np.zeros(10, int), None, 5)).tolist() == [2] * 5


def test_no_group_is_on_both_sides_and_every_row_is_predicted_once():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 200)
    y = rng.integers(0, 3, 200)
    pairs = metrics.splits(y, groups)
    assert all(not set(groups[a]) & set(groups[b]) for a, b in pairs)
    assert sorted(np.concatenate([b for _, b in pairs])) == list(range(200))
    ((train, test),) = metrics.splits(y, groups, ["train", "val", "test", ""] * 50)
    assert set(test % 4) == {2} and set(train % 4) == {0, 1}
    # One group has nothing beside it, and a row without a split belongs nowhere.
    for who, split in ((np.zeros(200, int), ()), (groups, ["test"] * 199 + [""])):
        with pytest.raises(ValueError, match="nothing to learn from"):
            metrics.splits(y, who, split)


def test_folds_by_row_would_flatter():
    """Features that say who, and labels that depend on who: only folds by group tell the truth."""
    groups = np.random.default_rng(0).integers(0, 30, 200)
    leaky = np.eye(30)[groups]
    y = groups % 2
    row = metrics.linear_probe(leaky, y, 2, groups)
    assert row["accuracy"] < 0.75 and row["groups"] == 30 and row["n"] == 200
    assert metrics.linear_probe(leaky, y, 2, np.arange(200))["accuracy"] > 0.95
