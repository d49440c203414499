"""pytest tests/test_evaluate.py — metrics by hand, protocols on features whose right answer is known."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import prompts


def test_scores_by_hand():
    s = evaluate.scores([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 4)  # class 3 never occurs
    # F1: class 0 2*2/(3+2) = .8, class 1 2*1/(2+2) = .5, class 2 2*1/(1+2) = .667
    assert s["f1"] == pytest.approx((3 * 0.8 + 2 * 0.5 + 2 / 3) / 6)
    assert s["balanced"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3) and s["accuracy"] == pytest.approx(4 / 6) and s["n"] == 6


def features(v, valid=None):
    v = F.normalize(v.float(), dim=-1)
    return {"v": v, "backbone": v, "valid": torch.ones(v.shape[:2], dtype=torch.bool) if valid is None else valid, "index": list(range(len(v)))}


def test_level_scores_are_means_over_valid_nodes():
    v = torch.zeros(1, 85, 2)
    v[..., 0] = 1
    v[0, 1:3] = torch.tensor([0.0, 1.0])
    valid = torch.ones(1, 85, dtype=torch.bool)
    valid[0, 1], valid[0, 21:] = False, False  # one 10x node blank, 40x absent
    s = evaluate.level_scores(features(v, valid), torch.eye(2))
    assert s[0, 1].tolist() == pytest.approx([2 / 3, 1 / 3]) and np.isnan(s[0, 3]).all()
    assert not np.isnan(evaluate.merged_scores(s, s)).any()


def test_merging_ignores_a_constant_preference_and_uses_complementary_levels():
    """5x knows the row and 40x the column of a 2 x 2 table of classes; 10x and 20x always shout for class 0."""
    y = np.arange(4)
    s = np.zeros((4, 4, 4))
    for g in y:
        s[g, 0, [c for c in range(4) if c // 2 == g // 2]] = 1
        s[g, 3, [c for c in range(4) if c % 2 == g % 2]] = 1
    s[:, 1:3, 0] += 5
    assert evaluate.merged_scores(s, s).argmax(1).tolist() == y.tolist()
    assert np.nansum(s, 1).argmax(1).tolist() != y.tolist()


class Bags:
    """The two things a protocol asks of a data set."""

    def __init__(self, slides, facts):
        self.slides = slides
        self.facts = facts

    def captions(self, i):
        return [f"patch {i} {n}" for n in range(85)]

    def truth(self, i):
        return [self.facts[i]] * 85


def test_slide_pooling_takes_the_best_patches(monkeypatch):
    """MI-Zero: one glowing patch decides at j = 1; at j = 50 of 64 the many faint ones do."""
    names = list(prompts.BUILT_IN["diagnosis"])
    monkeypatch.setattr(evaluate, "class_weights", lambda *a, **k: torch.eye(20))
    v = torch.zeros(2, 85, 20)
    v[..., 1] = 1
    v[0, 84] = F.one_hot(torch.tensor(0), 20)
    v[:, :, 1] *= 0.5
    v[:, :, 19] = 0.5
    bags = Bags(["a", "b"], [{"diagnosis": names[0]}, {"diagnosis": names[1]}])
    v[0, 84] = F.one_hot(torch.tensor(0), 20)
    feats = features(v)
    out = evaluate.slide_zeroshot(None, None, bags, feats, features(torch.rand(2, 85, 20)), js=(1, 64))
    assert out["40x"][1]["accuracy"] == 1.0 and out["40x"][64]["accuracy"] == 0.5 and out["5x"][1]["n"] == 2


def test_probe_separates_what_is_separable():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    W, b = evaluate.fit_probe(x[:200], y[:200], 4)
    assert ((x[200:] @ W.T + b).argmax(1) == y[200:]).float().mean() > 0.9
    grad = torch.zeros_like(W)  # stationarity of the published objective: softmax - onehot + lambda W = 0
    p = (x[:200] @ W.T + b).softmax(1) - F.one_hot(y[:200], 4)
    grad = p.T @ x[:200] + 100 / (6 * 4) * W
    assert grad.abs().max() < 0.5


def test_slide_retrieval_finds_the_slide():
    torch.manual_seed(0)
    v = torch.randn(3, 1, 8).expand(3, 85, 8)
    gallery = Bags(["a", "b", "c"], [{}] * 3)
    out = evaluate.slide_retrieval(Bags(["c", "a"], [{}] * 2), features(v[[2, 0]]), gallery, features(v))
    assert out["5x"] == out["merged"] == 1.0 and out["chance"] == pytest.approx(1 / 3)


def test_colour_is_monotone_in_brightness():
    rgb = evaluate.colour(np.linspace(0, 1, 9)).astype(float)
    assert (np.diff(rgb @ [0.3, 0.6, 0.1]) > 0).all() and len(evaluate.LEVEL) == data.NODES


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no ckpt.pt"):
        evaluate.load_run(tmp_path)
