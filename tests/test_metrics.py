"""pytest tests/test_metrics.py — golden numbers are scikit-learn's (1.9.1) on the same inputs; the rest is counted by hand."""
import numpy as np
import pytest

import metrics

Y, P = [0, 0, 0, 1, 1, 2, 2, 2, 2, 1], [0, 0, 1, 1, 2, 2, 2, 0, 2, 1]
Q = [[.6, .3, .1], [.5, .25, .25], [.3, .5, .2], [.2, .6, .2], [.1, .4, .5], [.1, .1, .8], [.2, .2, .6], [.5, .2, .3], [.25, .25, .5], [.1, .7, .2]]
GOLDEN = {  # truth, prediction, number of classes, probabilities -> what scikit-learn says
    "ordinary": (Y, P, 3, Q, dict(f1=0.7, macro_f1=0.6944444444444443, balanced=0.6944444444444443, accuracy=0.7, kappa=0.5454545454545454, kappa_quadratic=0.5652173913043479, auroc=0.9398148148148149)),
    "ties": ([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], 2, [[.8, .2], [.5, .5], [.5, .5], [.1, .9], [.5, .5], [.8, .2]],
             dict(f1=0.6666666666666666, macro_f1=0.6666666666666666, balanced=0.6666666666666666, accuracy=0.6666666666666666, kappa=0.33333333333333337, kappa_quadratic=0.33333333333333337, auroc=0.888888888888889)),
    "a class of nobody": ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 4, None, dict(f1=0.6777777777777779, macro_f1=0.6555555555555556, balanced=0.7222222222222222, accuracy=0.6666666666666666, kappa=0.5, kappa_quadratic=0.75)),
    "one class": ([1, 1, 1], [1, 1, 0], 3, None, dict(f1=0.8, macro_f1=0.4, balanced=0.6666666666666666, accuracy=0.6666666666666666, kappa=0.0, kappa_quadratic=0.0)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_equal_to_scikit_learn(case):
    y, p, C, q, golden = GOLDEN[case]
    found = metrics.scores(y, p, C, probability=q)
    assert {k: found[k] for k in golden} == pytest.approx(golden, abs=1e-12) and found["n"] == len(y)


def test_what_is_not_defined_is_nan_and_nothing_is_refused():
    alone = metrics.scores([1, 1], [1, 1], 3, groups=["a", "b"], probability=np.full((2, 3), 1 / 3))
    assert np.isnan(alone["auroc"]) and np.isnan(alone["kappa"]) and np.isnan(alone["interval"]["auroc"]).all() and alone["f1"] == 1
    assert np.isnan(metrics.dice(np.diag([3, 0]))[1])
    assert np.isnan(metrics.scores([0, 1], [0, 1], 2, groups=["a", "a"])["interval"]["f1"]).all()           # one patient tells nothing of others
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.scores([], [], 2)


def test_the_interval_is_that_of_groups_and_not_of_rows():
    """Four patients of fifty identical rows each, one of them wrong: drawn by row the accuracy is sure, drawn by patient it is not."""
    y, p, who = np.zeros(200, int), np.repeat([0, 0, 0, 1], 50), np.repeat(list("abcd"), 50)
    by_group, by_row = (metrics.scores(y, p, 2, g)["interval"]["accuracy"] for g in (who, np.arange(200)))
    assert by_group == (0.25, 1.0) and 0.67 < by_row[0] < by_row[1] < 0.82           # 1 - k/4 wrong patients; .75 +- 2 sqrt(.75 .25 / 200)


def test_weights_of_the_auroc_are_repeated_rows():
    rng = np.random.default_rng(0)
    y, q, w = rng.integers(0, 3, 40), rng.random((40, 3)).round(1), rng.integers(0, 4, (2, 40))
    for weight, found in zip(w, metrics.auroc(y, q, w)):
        rows = np.repeat(np.arange(40), weight)
        assert found == pytest.approx(metrics.auroc(y[rows], q[rows]), abs=1e-12)


def test_recalls_and_dice_by_hand():
    sim, hit = np.array([[.9, .8, .1], [.5, .6, .7], [.1, .2, .3]]), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    assert metrics.recalls(sim, hit, (1, 2, 3)) == {"R@1": 0, "R@2": 1 / 3, "R@3": 2 / 3}      # ranks 2 and 3; the last has no answer
    m = metrics.confusion([0, 0, 0, 1], [0, 0, 1, 1], 2)
    assert metrics.dice(m).tolist() == pytest.approx([2 * 2 / 5, 2 * 1 / 3])
