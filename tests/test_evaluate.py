"""pytest tests/test_evaluate.py: scores, zero-shot, retrieval, probe, and a run from end to end.

Golden numbers are scikit-learn's (1.9.1) on the same inputs; the rest is counted by hand.
"""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model as networks
import text

# ---- Metrics ------------------------------------------------------------------------------------

Y = [0, 0, 0, 1, 1, 2, 2, 2, 2, 1]
P = [0, 0, 1, 1, 2, 2, 2, 0, 2, 1]
RATES = ("f1", "macro_f1", "balanced", "accuracy")
T = 2 / 3
GOLDEN = {  # truth, prediction, number of classes, scikit-learn's RATES
    "ordinary": (Y, P, 3, (0.7, 0.6944444444444443, 0.6944444444444443, 0.7)),
    "ties": ([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], 2, (T, T, T, T)),
    "a class of nobody": (
        *([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 4),
        (0.6777777777777779, 0.6555555555555556, 0.7222222222222222, T),
    ),
    "one class": ([1, 1, 1], [1, 1, 0], 3, (0.8, 0.4, T, T)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_rates_are_those_of_scikit_learn(case):
    y, p, C, golden = GOLDEN[case]
    found = evaluate.scores(y, p, C, np.arange(len(y)))
    golden = dict(zip(RATES, golden, strict=True))
    assert {k: found[k] for k in golden} == pytest.approx(golden, abs=1e-12)
    assert found["n"] == found["groups"] == len(y)


def test_random_cases_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for C in (2, 3, 5):
        y = rng.integers(0, C, 200)
        p = rng.integers(0, C, 200)
        found = evaluate.scores(y, p, C, np.arange(200))
        golden = {
            "f1": metrics.f1_score(y, p, average="weighted"),
            "macro_f1": metrics.f1_score(y, p, average="macro"),
            "balanced": metrics.balanced_accuracy_score(y, p),
        }
        assert {k: found[k] for k in golden} == pytest.approx(golden, abs=1e-12)


def test_undefined_values_are_nan_and_an_empty_table_is_refused():
    # One patient says nothing about others.
    single = evaluate.scores([0, 1], [0, 1], 2, ["a", "a"])
    assert single["f1"] == 1 and np.isnan(single["interval"]["f1"]).all()
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate.scores([], [], 2, [])


def test_intervals_are_of_groups_and_not_of_rows():
    """Four patients of fifty identical rows, one of them wrong: by row the accuracy looks sure."""
    y = np.zeros(200, int)
    p = np.repeat([0, 0, 0, 1], 50)
    by_group = evaluate.scores(y, p, 2, np.repeat(list("abcd"), 50))["interval"]["accuracy"]
    low, high = evaluate.scores(y, p, 2, np.arange(200))["interval"]["accuracy"]
    assert by_group == (0.25, 1.0)  # 1 - k / 4 wrong patients
    assert 0.67 < low < 0.71 and 0.79 < high < 0.82  # .75 +- 2 sqrt(.75 .25 / 200)


# ---- Zero-shot ----------------------------------------------------------------------------------


def features_of(v, valid=None, slides=None):
    """Make features as of `embed` from vectors v [R, 85, d]."""
    v = F.normalize(v.float(), dim=-1)
    valid = torch.ones(v.shape[:2], dtype=torch.bool) if valid is None else valid
    slides = np.arange(len(v)).astype(str) if slides is None else np.array(slides)
    index = list(range(len(v)))
    found = {"image_embedding": v, "backbone": v, "valid": valid, "index": index}
    return found | {"slides": slides}


def test_level_scores_are_means_over_valid_nodes():
    v = torch.zeros(1, 85, 2)
    v[..., 0] = 1
    v[0, 1:3] = torch.tensor([0.0, 1.0])
    # One 10x node is blank, 40x is absent.
    valid = torch.ones(1, 85, dtype=torch.bool)
    valid[0, 1] = False
    valid[0, 21:] = False
    s = evaluate.level_scores(features_of(v, valid), torch.eye(2))
    assert s[0, 1].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert np.isnan(s[0, 3]).all()
    assert not np.isnan(evaluate.merged_scores(s, s)).any()
    # A bag without any valid node has no class, not the first one.
    s = evaluate.level_scores(features_of(v, torch.zeros_like(valid)), torch.eye(2))
    assert np.isnan(evaluate.merged_scores(s, np.zeros((1, 4, 2)))).all()


def test_merging_ignores_a_constant_preference():
    """5x knows the row and 40x the column of a 2 x 2 table of classes; others shout for class 0."""
    y = np.arange(4)
    s = np.zeros((4, 4, 4))
    for g in y:
        s[g, 0, [c for c in y if c // 2 == g // 2]] = 1
        s[g, 3, [c for c in y if c % 2 == g % 2]] = 1
    s[:, 1:3, 0] += 5
    assert evaluate.merged_scores(s, s).argmax(1).tolist() == y.tolist()
    assert np.nansum(s, 1).argmax(1).tolist() != y.tolist()


def test_slides_are_pooled_from_their_best_patches():
    """One glowing patch decides at j = 1; the many faint ones decide at j = 50 of 64."""
    v = torch.zeros(2, 85, 20)
    v[..., 1] = 0.5
    v[..., 19] = 0.5
    v[0, 84] = F.one_hot(torch.tensor(0), 20)
    y = np.array([[0], [1]]).repeat(85, 1)
    reference = features_of(torch.rand(2, 85, 20))
    found = evaluate.zeroshot(features_of(v), reference, torch.eye(20), y, times=20)
    assert found["top 1"]["40x"]["accuracy"] == 1.0
    assert found["top 50"]["40x"]["accuracy"] == 0.5
    assert found["top 1"]["5x"]["n"] == 2 and found["patch"]["40x"]["n"] == 128
    assert found["patch"]["40x"]["groups"] == 2 and "merged" not in found["patch"]
    pooled = evaluate.top_j(np.array([[3.0, 0], [1, 2], [2, 4]]), (1, 2, 9))
    assert pooled[2].tolist() == [2.5, 3] and pooled[9].tolist() == [2, 2]


# ---- Retrieval and probe ------------------------------------------------------------------------


def test_shared_captions_are_right_for_each_image():
    v = np.eye(3)
    found = evaluate.retrieval(v, np.roll(v, 1, 0), ["a", "b", "c"], list("xyz"))
    assert found["image_to_text_R@1"] == 0 and found["image_to_text_R@5"] == 1
    assert found["mean"] == pytest.approx(4 / 6) and found["n"] == 3
    assert found["chance_R@1"] == pytest.approx(1 / 3)
    assert found["interval"]["text_to_image_R@1"] == (0, 0)
    # Where all say the same, all is right, and no merit.
    found = evaluate.retrieval(v, np.roll(v, 1, 0), ["a", "a", "a"], list("xyz"))
    assert found["mean"] == found["chance_R@1"] == 1


def predict(x, y, x1, C):
    weight, bias = evaluate.fit_logistic(x, y, C)
    return (torch.as_tensor(x1).double() @ weight.T + bias).softmax(1).numpy()


def test_the_probe_is_that_of_scikit_learn():
    """LogisticRegression(C=width * C / 100), solver newton-cg, tol 1e-12, on the same rows."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60, 5)).round(3)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.3)
    golden = [
        [0.11600583349695791, 0.7701080788410448, 0.11388608766199727],
        [0.34050255211751634, 0.5975013894460959, 0.061996058436387794],
        [0.06831201076195036, 0.800961855039022, 0.13072613419902765],
    ]
    assert np.allclose(predict(x, y, x[:3], 3), golden, atol=1e-6)
    # Far from the origin the optimum is the same.
    assert np.allclose(predict(x + 50, y, x[:3] + 50, 3), golden, atol=1e-5)
    # Two classes share one vector.
    golden = [0.5546945629499618, 0.27895836766011906, 0.6624220179636935]
    found = predict(x, (x[:, 0] > 0).astype(int), x[:3], 2)
    assert np.allclose(found[:, 1], golden, atol=1e-6)


# ---- Files --------------------------------------------------------------------------------------


def test_truth_of_one_magnification_is_enough(run, world, tmp_path):
    """No 5x patch has a class, so bags have none: patches are measured, nothing ends."""
    folder = shutil.copytree(world, tmp_path / "data")
    for path in folder.rglob("*.truth.jsonl"):
        rows = [line for line in path.read_text().splitlines(True) if json.loads(line)["node"] > 20]
        path.write_text("".join(rows))
    evaluate.measure(run, folder, learn=False)
    found = json.loads((run / "data" / "results.json").read_text())["zeroshot"]
    assert set(found["architecture"]["ensemble"]["patch"]) == {"40x"}
    model, tokenizer = evaluate.load_run(run)
    parts = data.Bags(folder / "test"), data.Bags(folder / "train")
    out = evaluate.glance(model, tokenizer, *parts)
    assert "architecture_40x" in out and "architecture_5x" not in out


def test_bytes_count_as_numbers():
    y = np.arange(20, dtype=np.uint8)
    assert (evaluate.confusion(y, y, 20) == np.eye(20)).all()
    assert evaluate.scores(y, y, 20, np.arange(20), times=2)["accuracy"] == 1


def test_a_table_has_a_line_a_row(capsys):
    evaluate.print_table("a\ttitle", ["x", "y\r\n"], [["tumour\nbed", "\x1b[31mred\u2028"]])
    assert capsys.readouterr().out.splitlines()[1:] == [
        *("a title", "", "| x          | y       |"),
        *("| ---------- | ------- |", "| tumour bed | [31mred |"),
    ]


def test_results_of_other_weights_give_way(tmp_path):
    about = {"model": "a", "fingerprint": "1", "n": 3}
    evaluate.save_results(tmp_path, "probe", {"x": np.nan, "k": {5: (1.0, 2.0)}}, about)
    evaluate.save_results(tmp_path, "zeroshot", {"x": 1}, about)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["probe"] == {"x": None, "k": {"5": [1, 2]}} and set(found["about"]) > {"probe"}
    evaluate.save_results(tmp_path, "zeroshot", {"x": 2}, about | {"fingerprint": "2"})
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"zeroshot", "about"} and found["about"]["zeroshot"]["fingerprint"] == "2"


def test_results_that_are_written_at_once_are_all_kept(tmp_path, capsys):
    about = {"model": "a", "fingerprint": "1", "n": 9}
    with ThreadPoolExecutor(8) as pool:
        for i in range(24):
            pool.submit(evaluate.save_results, tmp_path, f"p{i}", {"x": i}, about)
    found = json.loads((tmp_path / "results.json").read_text())
    assert {f"p{i}" for i in range(24)} | {"about"} == set(found) and not capsys.readouterr().err
    # A smaller result takes the place of a larger one, but not without a word.
    evaluate.save_results(tmp_path, "p3", {"x": 0}, about | {"n": 5})
    assert "p3 of 5 replaces that of 9" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{", "[]", '{"probe": {}}'])
def test_damaged_results_are_named(tmp_path, broken):
    (tmp_path / "results.json").write_text(broken)
    with pytest.raises(ValueError, match="results.json is damaged: move it away"):
        evaluate.save_results(tmp_path, "probe", {}, {"fingerprint": "1"})


@pytest.mark.parametrize("broken", ["{", "[]", '{"facts": {"a": {"b": []}}, "templates": ["{}"]}'])
def test_a_broken_classes_json_is_named(tmp_path, broken):
    (tmp_path / "classes.json").write_text(broken)
    with pytest.raises(ValueError, match="classes.json is not in the form"):
        data.read_classes(tmp_path / "classes.json")


# ---- A run, from end to end ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run folder with random weights."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    captions = next(iter(text.Captions(world / "train")))[1]
    tokenizer = text.Tokenizer.train([c for c in captions if c], 400)
    torch.manual_seed(0)
    size = networks.SIZES["synthetic"]
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **size)
    config = {"size": "synthetic", "data": str(world)}
    data.write_whole(run / "config.json", json.dumps(config))
    data.write_whole(run / "tokenizer.json", tokenizer.to_json())
    torch.save(
        {"model": model.state_dict(), "tokenizer": tokenizer.merges, "config": config, "step": 0},
        run / "ckpt.pt",
    )
    return run


def copy_run(run, folder):
    return shutil.copytree(run, folder / run.name)


def test_a_run_is_measured_on_its_own_data(run, world, tmp_path, capsys):
    run = copy_run(run, tmp_path)
    evaluate.measure(run)
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"zeroshot", "probe", "retrieval", "about"}
    mags = {"5x", "10x", "20x", "40x"}
    for fact in ("architecture", "cytology", "diagnosis"):
        for mode in ("ensemble", "single"):
            row = results["zeroshot"][fact][mode]
            assert set(row["patch"]) == mags and set(row["bag"]) == mags | {"merged"}
            assert {"top 1", "top 5", "top 10", "top 50", "top 100"} < set(row)
            assert row["top 10"]["merged"]["n"] == 2 and "balanced" in row["bag"]["5x"]["interval"]
        assert set(results["probe"][fact]) == mags
    assert set(results["retrieval"]) == mags and len(results["retrieval"]["20x"]["interval"]) == 8
    for about in results["about"].values():
        assert {"model", "fingerprint", "data", "data_hash", "n", "split"} <= set(about)
    assert "architecture" in results["about"]["zeroshot"]["prompts"]["facts"]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum(line.startswith("| patch ") for line in lines) == 3


def test_a_glance_has_a_number_for_each_magnification(run, world):
    model, tokenizer = evaluate.load_run(run)
    test, train = data.Bags(world / "test"), data.Bags(world / "train")
    found = evaluate.glance(model, tokenizer, test, train)
    assert {"cytology_5x", "diagnosis_40x", "architecture_merged"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values()) and len(found) == 15


def test_features_are_unit_vectors_and_keywords_guide_them(run, world):
    model, tokenizer = evaluate.load_run(run)
    bags = data.Bags(world / "test")
    w = evaluate.embed_texts(model, tokenizer, ["signet ring cell", "solid nest", "fat"])
    found = evaluate.embed(model, bags, [1, 0], w=w)
    assert found["index"] == [1, 0] and torch.equal(found["valid"], bags.valid[[1, 0]])
    v = found["image_embedding"]
    assert v.shape[:2] == (2, 85) and torch.allclose(
        v.norm(dim=-1), bags.valid[[1, 0]].float(), atol=1e-5
    )
    assert found["text_guided"].shape[:2] == found["backbone"].shape[:2] == (2, 85)
    # Single pictures, in one batch or several and of another size, go the same way.
    images = data.pyramid(bags[1]["image"][None])[0]
    one = evaluate.embed_images(model, images)["image_embedding"]
    assert torch.allclose(one, v[0], atol=1e-5)
    parts = evaluate.embed_images(model, images, at_once=30)["backbone"]
    assert torch.allclose(parts, found["backbone"][0], atol=1e-4)
    assert evaluate.embed_images(model, torch.rand(2, 3, 32, 32))["backbone"].shape[0] == 2
    names = [["a", "b"], ["c"]]
    single = evaluate.class_vectors(model, tokenizer, names, ["{}"], ensemble=False)
    assert torch.allclose(single, evaluate.embed_texts(model, tokenizer, ["a", "c"]), atol=1e-6)
    both = evaluate.class_vectors(model, tokenizer, names, ["{}", "a {}"])
    prompts = evaluate.embed_texts(model, tokenizer, ["a", "a a", "b", "a b"])
    assert torch.allclose(both[0], F.normalize(prompts.mean(0), dim=0), atol=1e-5)


def test_shards_without_truth_or_captions_are_refused_unread(
    run, world, tmp_path, capsys, monkeypatch
):
    """A lab's folder: shards alone, the same slides in train and test, then a truth of its own."""
    run = copy_run(run, tmp_path)
    for part in ("train", "test"):
        (tmp_path / "lab" / part).mkdir(parents=True)
        for path in [*(world / "train").glob("*.tar"), *(world / "train").glob("*.index.json")]:
            shutil.copy(path, tmp_path / "lab" / part)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed", lambda *_: pytest.fail("read for nothing"))
        # Slides that were trained on would look well.
        with pytest.raises(ValueError, match="lab/train and in .*lab/test, as 6 slides are: take"):
            evaluate.measure(run, tmp_path / "lab", most=4)
        shutil.rmtree(tmp_path / "lab/train")
        with pytest.raises(
            ValueError, match="neither captions nor a classes.json with truth: give"
        ):
            evaluate.measure(run, tmp_path / "lab", most=4)

    # Write a fact of one's own, of the 5x parents.
    test = data.Bags(tmp_path / "lab/test")
    facts = {
        "facts": {"grade": {"low": ["low grade"], "high": ["high grade"]}},
        "templates": ["{}"],
    }
    (tmp_path / "lab/classes.json").write_text(json.dumps(facts))
    for shard in test.shards:
        rows = []
        for key in test.keys:
            if key.startswith(shard.stem.removeprefix("bags-")):
                grade = ("low", "high")[test.shards.index(shard) % 2]
                rows.append(json.dumps({"key": key, "node": 0, "grade": grade}) + "\n")
        shard.with_suffix(".truth.jsonl").write_text("".join(rows))
    evaluate.measure(run, tmp_path / "lab", most=12)
    results = json.loads((run / "lab/results.json").read_text())
    assert results["zeroshot"]["grade"]["ensemble"]["bag"]["merged"]["n"] == 12
    assert "no train/: the probe is left out" in capsys.readouterr().out and "probe" not in results

    # A folder of shards by itself, and a class that classes.json does not name.
    evaluate.measure(run, tmp_path / "lab/test", most=12)
    results = json.loads((run / "test/results.json").read_text())
    assert results["about"]["zeroshot"]["split"] == "centred on 12 test bags"
    facts["facts"]["grade"] = {"low": ["low grade"], "middle": ["middle grade"]}
    (tmp_path / "lab/classes.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="classes.json lacks the grade 'high'"):
        evaluate.measure(run, tmp_path / "lab", most=2)


def test_checkpoints_fall_back_to_the_one_before(run, tmp_path, capsys):
    run = copy_run(run, tmp_path)
    shutil.copy(run / "ckpt.pt", run / "ckpt_prev.pt")
    (run / "ckpt.pt").write_bytes(b"damaged")
    state, path = evaluate.read_checkpoint(run)
    assert path.name == "ckpt_prev.pt" and "model" in state
    assert "ckpt.pt cannot be read" in capsys.readouterr().err
    # Whole files of torch that are no checkpoints of ours: words.pt, a tensor, what somebody bent.
    bent = [{"step": -5}, {"step": "7"}, {"config": []}]
    for other in ({"model": {}, "tokenizer": []}, torch.zeros(3), *(state | x for x in bent)):
        torch.save(other, run / "ckpt.pt")
        assert evaluate.read_checkpoint(run)[1].name == "ckpt_prev.pt"
        assert "ckpt.pt cannot be read" in capsys.readouterr().err
    (run / "ckpt_prev.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        evaluate.load_run(run)
    with pytest.raises(ValueError, match="holds no ckpt.pt"):
        evaluate.load_run(tmp_path)


@pytest.mark.parametrize("change", [{"config": {"size": "huge"}}, {"model": {}}])
def test_a_checkpoint_of_another_architecture_is_one_sentence(run, tmp_path, change):
    run = copy_run(run, tmp_path)
    torch.save(torch.load(run / "ckpt.pt") | change, run / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is a checkpoint of another arch") as error:
        evaluate.load_run(run)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_the_command_line_says_what_to_measure(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "measure", lambda *args: asked.append(args))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "RUN", "--data", "SHARDS", "--bags", "2"])
    evaluate.main()
    ((run, folder, _, most),) = asked
    assert (run, folder, most) == ("RUN", "SHARDS", 2)
