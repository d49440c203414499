"""pytest tests/test_evaluate.py — protocols on features whose right answer is known; every command on a tiny run, on public weights, on one process and two;
bad input gets one sentence."""
import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import ROOT, SMALL, launch
from test_weights import clip_states, timm_state

import data
import evaluate
import prompts
import subjects
import supervised
import text
import train
import zeroshot


def features(v, valid=None):
    v = F.normalize(v.float(), dim=-1)
    return {"v": v, "backbone": v, "valid": torch.ones(v.shape[:2], dtype=torch.bool) if valid is None else valid, "index": list(range(len(v)))}


class Bags:
    """The three things a protocol asks of a data set."""

    def __init__(self, slides, facts):
        self.slides = slides
        self.facts = facts

    def captions(self, i):
        return [f"patch {i} {n}" for n in range(85)]

    def truth(self, i):
        return [self.facts[i]] * 85


# ----------------------------------------------------------------------------------------------------------------------
# Without labels

def test_level_scores_are_means_over_valid_nodes():
    v = torch.zeros(1, 85, 2)
    v[..., 0] = 1
    v[0, 1:3] = torch.tensor([0.0, 1.0])
    valid = torch.ones(1, 85, dtype=torch.bool)
    valid[0, 1], valid[0, 21:] = False, False  # one 10x node blank, 40x absent
    s = zeroshot.level_scores(features(v, valid), torch.eye(2))
    assert s[0, 1].tolist() == pytest.approx([2 / 3, 1 / 3]) and np.isnan(s[0, 3]).all()
    assert not np.isnan(zeroshot.merged_scores(s, s)).any()


def test_merging_ignores_a_constant_preference_and_uses_complementary_levels():
    """5x knows the row and 40x the column of a 2 x 2 table of classes; 10x and 20x always shout for class 0."""
    y = np.arange(4)
    s = np.zeros((4, 4, 4))
    for g in y:
        s[g, 0, [c for c in range(4) if c // 2 == g // 2]] = 1
        s[g, 3, [c for c in range(4) if c % 2 == g % 2]] = 1
    s[:, 1:3, 0] += 5
    assert zeroshot.merged_scores(s, s).argmax(1).tolist() == y.tolist()
    assert np.nansum(s, 1).argmax(1).tolist() != y.tolist()


def test_slide_pooling_takes_the_best_patches(monkeypatch):
    """MI-Zero: one glowing patch decides at j = 1; at j = 50 of 64 the many faint ones do."""
    names = list(prompts.BUILT_IN["diagnosis"])
    monkeypatch.setattr(zeroshot, "class_weights", lambda *a, **k: torch.eye(20))
    v = torch.zeros(2, 85, 20)
    v[..., 1], v[..., 19] = 0.5, 0.5
    v[0, 84] = F.one_hot(torch.tensor(0), 20)
    bags = Bags(["a", "b"], [{"diagnosis": names[0]}, {"diagnosis": names[1]}])
    out = zeroshot.of_slides(None, None, bags, features(v), features(torch.rand(2, 85, 20)), js=(1, 64))
    assert out["40x"][1]["accuracy"] == 1.0 and out["40x"][64]["accuracy"] == 0.5 and out["5x"][1]["n"] == 2
    assert zeroshot.top_j(np.array([[3., 0], [1, 2], [2, 4]]), (1, 2, 9))[2].tolist() == [2.5, 3] and zeroshot.top_j(np.ones((2, 1)), (9,))[9] == 1


def test_reranking_orders_the_best_and_leaves_the_others_behind():
    sim = np.array([[.9, .8, .7, .1]])
    finer = zeroshot.rerank(sim, lambda q, best: -np.array([{0: 5., 1: 1., 2: 0.}[k] for k in best]), 3)
    assert np.argsort(-finer[0]).tolist() == [2, 1, 0, 3]
    v = np.eye(3)
    know_all, know_nothing = (lambda i, c: np.where(i == c, 9.0, -9.0)), (lambda i, c: np.zeros(len(i)))
    t = np.roll(v, 1, 0) * 0.6 + v * 0.4                                               # every caption is nearest to its neighbour's image
    hit = np.eye(3, dtype=bool)
    plain = zeroshot.recall_both(v, t, hit)
    assert plain["image_to_text_R@1"] == 0 and zeroshot.recall_both(v, t, hit, know_all, 2)["mean"] == 1
    assert zeroshot.recall_both(v, t, hit, know_nothing, 2) == plain                   # an ITM that has learned nothing changes nothing


def test_which_slide_and_which_diagnosis():
    torch.manual_seed(0)
    v = torch.randn(3, 1, 8).expand(3, 85, 8)
    gallery = Bags(["a", "b", "c"], [{}] * 3)
    out = zeroshot.slide_retrieval(Bags(["c", "a"], [{}] * 2), features(v[[2, 0]]), gallery, features(v))
    assert out["5x"] == out["merged"] == 1.0 and out["chance"] == pytest.approx(1 / 3)
    v = torch.eye(8)[[0, 0, 1, 1, 2]][:, None].expand(5, 85, 8)                        # four slides in two pairs that look alike, and one alone
    out = zeroshot.diagnosis_retrieval(Bags(list("abcde"), [{}] * 5), features(v), dict(zip("abcde", "xxyyz")))
    assert out["20x"]["R@1"] == 1 and out["20x"]["n"] == 4 * 16 and out["20x"]["chance"] == 0.25
    out = zeroshot.diagnosis_retrieval(Bags(list("abcd"), [{}] * 4), features(v[:4]), dict(zip("abcd", "xyxy")))
    assert out["5x"]["R@1"] == 0 and out["5x"]["R@5"] == 1                             # never its own slide, however like it is


# ----------------------------------------------------------------------------------------------------------------------
# With labels

def test_the_probe_is_scikit_learns():
    """LogisticRegression(C = M C / 100) of scikit-learn 1.9.1, solver newton-cg, tol 1e-12, on the same rows."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60, 5)).round(3)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.3)
    golden = [[0.11600583349695791, 0.7701080788410448, 0.11388608766199727], [0.34050255211751634, 0.5975013894460959, 0.061996058436387794], [0.06831201076195036, 0.800961855039022, 0.13072613419902765]]
    assert np.allclose(supervised.logistic(x, y, x[:3], 3), golden, atol=1e-6)
    two = [[0.4453054370500382, 0.5546945629499618], [0.721041632339881, 0.27895836766011906], [0.3375779820363065, 0.6624220179636935]]
    assert np.allclose(supervised.logistic(x, np.minimum(x[:, 0] > 0, 1).astype(int), x[:3], 2), two, atol=1e-6)         # its two classes share one vector
    assert np.allclose(supervised.logistic(x + 50, y, x[:3] + 50, 3), golden, atol=1e-5)         # far from the origin it is as hard to find, and the same


def test_the_keywords_of_a_patch_are_chosen_in_fp32():
    g = torch.Generator().manual_seed(0)
    v, w = (torch.nn.functional.normalize(torch.randn(n, 64, generator=g), dim=-1) for n in (16, 2000))
    with torch.autocast("cpu", torch.bfloat16):
        near = subjects.nearest(v, w, 8)
    assert torch.equal(near, (v @ w.T).topk(8, dim=1).indices)


def test_prototypes_and_neighbours_by_hand():
    x0, y0 = np.array([[0., 1], [0, 1], [1, 0], [1, 0]]), np.array([0, 0, 1, 1])
    x1 = np.array([[0.1, 0.9], [0.9, 0.2]])
    assert supervised.prototypes(x0, y0, x1, 3).argmax(1).tolist() == [0, 1] and (supervised.prototypes(x0, y0, x1, 3)[:, 2] == 0).all()
    assert supervised.nearest(x0, y0, x1, 2, k=2).tolist() == [[1, 0], [0, 1]] and supervised.nearest(x0, y0, x1, 2, k=20).tolist() == [[.5, .5]] * 2


def test_no_group_is_on_both_sides_of_a_split_and_every_row_is_predicted_once():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 200)
    y = rng.integers(0, 3, 200)
    pairs = supervised.splits(y, groups, [""] * 200, 5)
    assert all(not set(groups[a]) & set(groups[b]) for a, b in pairs) and sorted(np.concatenate([b for _, b in pairs])) == list(range(200))
    own = supervised.splits(y, groups, ["train", "val", "test", ""] * 50)
    assert len(own) == 1 and set(own[0][1] % 4) == {2} and set(own[0][0] % 4) == {0, 1}
    for who, split in ((np.zeros(200, int), [""] * 200), (groups, ["test"] * 199 + [""])):       # one group; one row, that belongs nowhere
        with pytest.raises(ValueError, match="nothing to learn from"):
            supervised.splits(y, who, split)
    leaky = np.eye(30)[groups]                                                         # features that say who, and labels that depend on who
    y = groups % 2
    task = supervised.Task("t", {"backbone": leaky}, y, ["a", "b"], groups, [""] * 200)
    row = next(r for r in supervised.probe([task])["probe"] if r["method"] == "probe")
    assert row["accuracy"] < 0.75 and row["groups"] == 30
    rows, p = supervised.cross(supervised.logistic, leaky, y, 2, supervised.splits(y, None, [""] * 200))
    assert (p.argmax(1) == y[rows]).mean() > 0.95                                      # what splitting by file would have claimed


def test_few_shot_learns_from_k_rows_of_each_class():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    x = rng.normal(size=(80, 4)) + y[:, None]
    out = supervised.few_shot(x, y, 2, supervised.splits(y, None, [""] * 80), seeds=20)
    assert list(out) == [1, 2, 4, 8, 16] and out[16]["balanced"] > out[1]["balanced"] and out[16]["std"] < out[1]["std"]
    assert list(supervised.few_shot(x[35:], y[35:], 2, [(np.arange(45), np.arange(45))])) == [1, 2, 4]   # five rows of a class are not eight


def test_attention_finds_the_patch_that_matters():
    """One patch of thirty says what a slide is; the mean of them says nearly nothing."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    slides = [torch.tensor(rng.normal(size=(30, 8)), dtype=torch.float32) for _ in y]
    for x, c in zip(slides, y):
        x[3] = 0
        x[3, c] = 6
    rows, p = supervised.mil(slides, y, 2, supervised.splits(y, None, [""] * 40, 2))
    assert (p.argmax(1) == y[rows]).mean() > 0.9 and len(rows) == 40
    logits, a = supervised.GatedAttention(8, 2).eval()(slides[0])
    assert logits.shape == (2,) and a.sum().item() == pytest.approx(1) and len(a) == 30


def test_fine_tuning_learns_stops_and_lets_lower_layers_move_less():
    from model import SIZES, MRPLIP
    torch.manual_seed(0)
    vision = MRPLIP(300, 299, **SIZES["synthetic"]).vision
    groups = supervised.layer_groups(vision, torch.nn.Linear(vision.width, 2), 1.0, 0.5)
    rates = sorted({g["lr"] for g in groups}, reverse=True)
    assert rates == [0.5 ** k for k in (*range(len(vision.blocks) + 1), len(vision.blocks) + 1)] and {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert sum(len(g["params"]) for g in groups) == len(list(vision.parameters())) + 2
    y = np.arange(48) % 2
    tiles = [((120 + 80 * torch.sin(torch.arange(64.) * (0.2 + 0.8 * int(c)))).to(torch.uint8).expand(1, 3, 64, 64), None) for c in y]
    tiles[47] = "a file that cannot be read"
    before = [p.clone() for p in vision.parameters()]
    task = supervised.Task("broad or narrow stripes", {}, y, ["broad", "narrow"], np.arange(48) // 4, [""] * 48)
    row = supervised.tune(vision, tiles, task, k=2, epochs=15, patience=15, batch=4, lr=3e-3)
    assert row["accuracy"] == 1 and row["n"] == 47 and all(torch.equal(a, b) for a, b in zip(before, vision.parameters()))      # a copy was trained


# ----------------------------------------------------------------------------------------------------------------------
# The commands

@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run of two steps on the built-in world."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([*SMALL, "--data", str(world), "--out", str(folder), "--steps", "2"])
    return folder


@pytest.fixture(scope="module")
def patches(world, tmp_path_factory):
    """24 pictures of 256 px at 0.5 um of three kinds, some lacking a test row's neighbours: index.csv with label, patient, caption and mask."""
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    with open(folder / "index.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["file", "label", "patient", "caption"])
        for i in range(24):
            label = ("lung_n", "lung_aca", "lung_scc")[i % 3]
            image = rng.integers(0, 80, (128, 128, 3)) + 60 * (i % 3)
            (folder / label).mkdir(exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(folder / label / f"{i}.png")
            table.writerow([f"{label}/{i}.png", label, f"p{i // 4}", f"tissue number {i // 2}"])
    return folder


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


def test_report_of_a_run(run, monkeypatch, capsys):
    command(monkeypatch, "report", run, "--bags", "6", "--features", "backbone,text_guided", "--top", "3")
    results, page = json.loads((run / "results.json").read_text()), (run / "report.html").read_text()
    assert {"zeroshot", "slide", "mil", "probe", "few_shot", "retrieval", "about"} <= set(results)
    for key in set(results) - {"about", "pictures"}:
        said = results["about"][key]
        assert {"model", "fingerprint", "data", "data_hash", "split", "n"} <= set(said) and said["n"] > 0, key
    assert results["about"]["zeroshot"]["prompts"]["classes"]["architecture"] and set(results["zeroshot"]["diagnosis"]["ensemble"]["patch"]) == {"5x", "10x", "20x", "40x"}
    assert {row["features"] for row in results["probe"]} == {"backbone", "text_guided"} and "reranked" in results["retrieval"]["20x"]
    shown = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(shown) == 5 and page.count("data:image/png;base64,") == 5 and not re.search(r"(src|href)='?http", page)          # one file, all in it
    for name in ("levels.png", "confusion.png", "projection.png", "retrieval.png", "heatmap.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(1 << 24)) > 5, name
    assert "zero-shot" in capsys.readouterr().out
    kept = {f: f.stat().st_mtime_ns for f in (run / "features").rglob("*.npz")}
    command(monkeypatch, "probe", run, "--bags", "6", "--features", "backbone,text_guided")
    assert kept and kept == {f: f.stat().st_mtime_ns for f in (run / "features").rglob("*.npz")}                                # features are read once
    again = json.loads((run / "results.json").read_text())
    assert again["probe"] == results["probe"] and again["zeroshot"] == results["zeroshot"]


def test_pictures_through_every_protocol_and_a_broken_one_is_counted(run, patches, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for f in patches.rglob("*.*"):
        target = tmp_path / "data" / f.relative_to(patches)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(f.read_bytes())
    (tmp_path / "data/lung_n/0.png").write_bytes(b"\x89PNG broken")
    table, out = tmp_path / "data/index.csv", tmp_path / "out"
    command(monkeypatch, "report", run, "--data", table, "--out", out, "--folds", "3", "--top", "2")
    said = capsys.readouterr()
    assert "0.png cannot be read" in said.out + said.err and "1 of 24 pictures could not be read" in said.out
    command(monkeypatch, "zeroshot", run, "--data", table, "--out", out / "levels", "--levels", "--mpp", "0.5")
    command(monkeypatch, "finetune", run, "--data", table, "--out", out, "--folds", "2", "--epochs", "1")
    r = json.loads((out / "results.json").read_text())
    assert r["zeroshot"]["ensemble"]["all"]["n"] == 23 and r["about"]["zeroshot"]["left_out"] == 1 and r["zeroshot"]["ensemble"]["all"]["groups"] == 6
    assert {row["method"] for row in r["probe"]} == {"probe", "prototypes", "knn20"} and r["about"]["probe"]["groups"] == "patient" and "100 / (M C)" in r["about"]["probe"]["regularisation"]
    assert r["retrieval"]["all"]["n"] == 23 and "reranked" in r["retrieval"]["all"] and r["finetune"][0]["n"] == 23
    levels = json.loads((out / "levels/results.json").read_text())
    assert set(levels["zeroshot"]["single"]) == {"5x", "10x", "20x", "40x", "merged"} and levels["about"]["zeroshot"]["enlarged"] == "40x"


def test_classes_that_nobody_has_are_candidates_and_numbers_need_names(run, patches, tmp_path, monkeypatch):
    names = {"lung_n": "lung", "lung_aca": "gland", "lung_scc": "squame", "ghost": "tissue"}
    (tmp_path / "four.json").write_text(json.dumps(names))
    command(monkeypatch, "zeroshot", run, "--data", patches / "index.csv", "--classes", tmp_path / "four.json", "--out", tmp_path)
    assert set(json.loads((tmp_path / "results.json").read_text())["about"]["zeroshot"]["prompts"]["classes"]) == set(names)
    with pytest.raises(ValueError, match="the labels 0 1 are numbers"):
        prompts.find(None, {"0", "1"})


def test_two_processes_measure_what_one_does(run, patches, tmp_path, monkeypatch):
    argv = ["probe", str(run), "--data", str(patches / "index.csv"), "--folds", "3", "--out"]
    command(monkeypatch, *argv, tmp_path / "1")
    done = subprocess.run([*launch(2), "evaluate.py", *argv, str(tmp_path / "2")], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in "12")
    assert one == two and one["probe"][0]["n"] == 24


@pytest.fixture
def clip(tmp_path):
    """A CLIP of random values in open_clip's layout, and a tokenizer with as many ids."""
    words = text.Tokenizer.train(["benign lung tissue", "lung adenocarcinoma"], 300)
    words.save(tmp_path / "words.json")
    torch.save(clip_states(V=words.end + 1)[0], tmp_path / "clip.bin")
    return "--clip", tmp_path / "clip.bin", "--tokenizer", tmp_path / "words.json"


def test_public_weights_go_the_same_ways(clip, patches, world, tmp_path, monkeypatch):
    for quick in ((), ("--quick-gelu",)):
        for what in ("zeroshot", "probe", "retrieval"):
            command(monkeypatch, what, *clip, *quick, "--data", patches / "index.csv", "--out", tmp_path / f"out{len(quick)}")
    plain, quick = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("out0", "out1"))
    assert set(plain) == {"zeroshot", "probe", "few_shot", "retrieval", "about", "pictures"} and "reranked" not in plain["retrieval"]["all"]
    assert plain["about"]["zeroshot"]["fingerprint"] != quick["about"]["zeroshot"]["fingerprint"]       # the same file, another GELU: other features
    command(monkeypatch, "retrieval", *clip, "--data", world, "--out", tmp_path / "shards", "--bags", "3")          # 64 px resampled to its 32
    assert json.loads((tmp_path / "shards/results.json").read_text())["retrieval"]["40x"]["n"] > 50
    torch.save(timm_state(), tmp_path / "uni.bin")
    command(monkeypatch, "report", "--vit", tmp_path / "uni.bin", "--data", patches / "index.csv", "--out", tmp_path / "vit", "--features", "backbone,projected")
    assert {row["features"] for row in json.loads((tmp_path / "vit/results.json").read_text())["probe"]} == {"backbone", "projected"}
    with pytest.raises(ValueError, match="uni has no text tower, and retrieval compares images with texts"):
        command(monkeypatch, "retrieval", "--vit", tmp_path / "uni.bin", "--data", patches / "index.csv")
    subject = subjects.load_subject(clip=clip[1], tokenizer=clip[3])
    assert torch.allclose(subject.model.encode_image(torch.rand(2, 3, 32, 32)).norm(dim=1), torch.ones(2)) and subject.name == "clip"


def test_a_slide_goes_in_heatmap_and_outlines_come_out(run, world, tmp_path, monkeypatch):
    slide = next((world / "slides").glob("*.svs"))
    command(monkeypatch, "slide", run, slide, "--classes", "built-in-tissue", "--out", tmp_path, "--fov-px", "64")
    found = json.loads((tmp_path / "slides.json").read_text())
    assert set(found["slides"][slide.name]["class"]) == {"5x", "10x", "20x", "40x", "merged"}
    collection = json.loads((tmp_path / f"{slide.stem}.geojson").read_text())
    with data.Slide(slide) as opened:
        size, side, area = opened.size, 64 * data.mpp_of(20) / opened.mpp, 0.0
    for f in collection["features"]:
        assert f["type"] == "Feature" and f["geometry"]["type"] == "Polygon" and f["properties"]["classification"]["name"] in prompts.DATASETS["built-in-tissue"]
        for k, ring in enumerate(f["geometry"]["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 5 and all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in ring)
            turn = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:])) / 2
            assert (turn > 0) == (k == 0)                                              # outer rings one way, holes the other
            area += turn
    parents, feats = zeroshot.read_slide(subjects.load_run(run)[0], slide, "cpu", fov_px=64)
    assert area == pytest.approx(feats["valid"][:, 5:21].sum().item() * side ** 2)     # every 20x patch with tissue is in exactly one outline, and nothing else
    command(monkeypatch, "heatmap", run, slide, "stroma", "fat", "--out", tmp_path / "map.png", "--fov-px", "64", "--level", "10x")
    assert Image.open(tmp_path / "map.png").size[0] > 900 and json.loads((tmp_path / "map.geojson").read_text())["features"]


def test_labels_of_slides_from_a_table(run, world, tmp_path, monkeypatch, capsys):
    """The built-in world without its truth and captions: shards as a lab has just tiled them, with a table of slides and patients."""
    folder = tmp_path / "bags"
    folder.mkdir()
    for f in (world / "train").iterdir():
        if "truth" not in f.name and "captions" not in f.name:
            (folder / f.name).write_bytes(f.read_bytes())
    slides = sorted(set(data.BagDataset(folder, captions=False).slides))
    (tmp_path / "labels.csv").write_text("slide,label,patient\n" + "".join(f"{s},{'ab'[i % 2]},p{i // 2}\n" for i, s in enumerate(slides)))
    (tmp_path / "names.json").write_text('{"a": ["papillary carcinoma"], "b": "signet ring carcinoma"}')
    with pytest.raises(ValueError, match="slide compares with: give --labels CSV"):
        command(monkeypatch, "slide", run, "--data", folder, "--out", tmp_path / "out", "--bags", "12")
    command(monkeypatch, "slide", run, "--data", folder, "--labels", tmp_path / "labels.csv", "--classes", tmp_path / "names.json", "--out", tmp_path / "out", "--bags", "12", "--folds", "3")
    r = json.loads((tmp_path / "out/results.json").read_text())
    assert r["slide"]["20x"]["1"]["n"] == len(slides) and r["slide"]["20x"]["1"]["groups"] == r["mil"]["20x"]["groups"] == len(slides) // 2
    with pytest.raises(ValueError, match="neither captions, nor slides"):
        command(monkeypatch, "retrieval", run, "--data", folder, "--out", tmp_path / "out", "--bags", "4")
    (tmp_path / "other.csv").write_text("slide,label\nother,a\n")
    with pytest.raises(ValueError, match="other.csv names none of the slides"):
        command(monkeypatch, "slide", run, "--data", folder, "--labels", tmp_path / "other.csv", "--classes", tmp_path / "names.json", "--out", tmp_path / "out")
    for name in ("train", "test"):                                                     # the same slides on both sides, and labels by lot
        (tmp_path / "both" / name).mkdir(parents=True)
        for f in folder.glob("*.tar"):
            (tmp_path / "both" / name / f.name).write_bytes(f.read_bytes())
    command(monkeypatch, "slide", run, "--data", tmp_path / "both", "--labels", tmp_path / "labels.csv", "--classes", tmp_path / "names.json", "--out", tmp_path / "leak", "--folds", "2", "--bags", "6")
    assert "slides are in both" in json.loads((tmp_path / "leak/results.json").read_text())["about"]["mil"]["split"] and f"{len(slides)} slides are in" in capsys.readouterr().out
    before = subjects.stamp(subjects.open_bags(tmp_path / "both/test"))
    os.utime(next((tmp_path / "both/test").glob("*.tar")), (1, 1))
    assert subjects.stamp(subjects.open_bags(tmp_path / "both/test")) != before        # tiled anew: what was kept of them does not count


@pytest.mark.parametrize("argv, message", [
    (["zeroshot"], "zeroshot what"), (["zeroshot", "{run}", "x"], "x is left over"), (["zeroshot", "{tmp}"], "holds no ckpt.pt"), (["zeroshot", "random"], "no text tower"),
    (["probe", "pixels"], "no data of its own: give --data"), (["probe", "{run}", "--data", "{tmp}/none"], "none does not exist"), (["probe", "{run}", "--data", "{tmp}"], "holds no pictures"),
    (["zeroshot", "{run}", "--data", "{patches}", "--classes", "{tmp}/none.json"], "none.json is neither a JSON file"), (["zeroshot", "{run}", "--data", "{patches}", "--classes", "mhist"], "has no names in mhist"),
    (["zeroshot", "{run}", "--data", "{patches}", "--levels"], "needs --mpp"), (["zeroshot", "{run}", "--data", "{patches}", "--mpp", "x"], "no number"),
    (["retrieval", "{run}", "--data", "{patches}"], "no captions"), (["segment", "{run}", "--data", "{patches}"], "no masks"), (["segment", "{run}"], "shards, which have no masks"),
    (["slide", "{run}", "{tmp}/none.svs"], "need --classes"), (["slide", "{run}", "--data", "{patches}"], "shards or slide files"), (["heatmap", "{run}", "x.svs"], "needs a slide and at least one text"),
    (["probe", "{run}", "--features", "frozen"], "none of backbone, projected"), (["probe", "random", "--data", "{patches}", "--features", "text_guided"], "no keywords.json"),
    (["finetune", "pixels", "--data", "{patches}"], "nothing to fine-tune"), (["finetune", "{run}", "--level", "7x"], "none of 5x"), (["probe", "--clip", "{tmp}/c.bin"], "needs --tokenizer"),
    (["zeroshot", "{run}", "--data", "{patches}", "--levels", "--mpp", "3"], "below 5x"), (["probe", "{run}", "--group", "x"], "--group is for pictures"),
    (["probe", "{run}", "--train", "{patches}"], "holds no shards"), (["heatmap", "{run}", "x.svs", "fat", "--out", "x.geojson"], "is no NAME.png"), (["probe", "pixels", "--data", "{patches}/lung_n"], "holds no pictures"),
    (["report", "{run}", "--folds", "1"], "--folds 1 is too few"), (["report", "{run}", "--data", "{patches}/index.csv", "--group", "ward"], "no column ward")])
def test_bad_input_is_one_sentence(argv, message, run, patches, tmp_path, monkeypatch):
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=message) as said:
        command(monkeypatch, *(a.format(run=run, tmp=tmp_path, patches=patches) for a in argv))
    assert len(str(said.value)) < 400 and "\n" not in str(said.value) and sorted(run.rglob("*")) == before


def test_a_mistyped_flag_and_an_error_end_without_a_traceback(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "probe", "x", "--epochs", "3")
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err             # finetune has that one
    done = subprocess.run([sys.executable, "evaluate.py", "probe", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and re.match("error: .* holds no ckpt.pt", done.stderr) and "Traceback" not in done.stderr
