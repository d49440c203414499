"""Charts, and the page of a run: every table and picture of it in one file.

pytest tests/test_page.py
"""

import base64
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from test_slides import run  # noqa: F401, a fixture

import data
import evaluate
from protocols import charts, heatmap, page


def leaf(value, low=0.1, high=0.9, metric="f1"):
    return {metric: value, "n": 5, "interval": {metric: [low, high]}}


def count(image, colour):
    """Count the pixels of a colour."""
    return int((np.asarray(image) == colour).all(-1).sum())


def test_bars_are_as_high_as_their_values():
    table = {"a": {"5x": (1.0, None, None), "10x": (0.5, 0.4, 0.6)}, "b": {"10x": (0.25, 0, 0.5)}}
    image = charts.draw_bars(table, "title")
    first, second = (count(image, heatmap.class_colour(c)) for c in range(2))
    # A bar is 23 x 191 pixels at 1, less its number and whisker; a square of the legend is 100.
    assert first == pytest.approx(23 * 191 + 100, rel=0.05)
    assert second == pytest.approx(23 * (96 + 49) + 200, rel=0.15)
    # A value that is not defined has no bar.
    without = {"a": {"5x": (None, None, None), "10x": (0.5, None, None)}}
    image = charts.draw_bars(without, "title")
    assert count(image, heatmap.class_colour(0)) == 100


def test_a_confusion_matrix_is_coloured_by_row():
    image = charts.draw_confusion(np.array([[90, 0], [0, 9]]), ["many", "few"])
    full = tuple(heatmap.colour(np.ones(1))[0])
    # Both rows are right in all cases: two cells of 45 x 45 pixels, less their numbers.
    assert count(image, full) == pytest.approx(2 * 45 * 45, rel=0.1)


def test_the_nearest_patches_are_of_different_slides():
    v = torch.zeros(3, 85, 2)
    v[0, 1, 0] = v[1, 2, 0] = 1
    v[2, 3, 0] = 0.5
    v[2, 30, 0] = 9
    valid = torch.ones(3, 85, dtype=torch.bool)
    features = {"image_embedding": v, "valid": valid, "slides": np.array(["a", "a", "b"])}
    query = torch.tensor([1.0, 0.0])
    assert charts.nearest(features, query, 1, 5) == [(0, 1), (2, 3)]
    valid[0, 1] = False
    assert charts.nearest(features, query, 1, 1) == [(1, 2)]


def test_texts_are_cut_to_a_width():
    assert heatmap.short("fat", 100) == "fat"
    cut = heatmap.short("dense fibrous stroma" * 9, 100)
    assert cut.endswith("...") and heatmap.text_width(cut, 13) <= 100


def test_tables_hold_every_row():
    found = {"slides": {"best 1": {"5x": leaf(0.5), "20x": leaf(None)}, "all": {"5x": leaf(1.0)}}}
    table = page.write_table(found, ("f1",))
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", table)
    assert cells[:3] == ["f1", "5x", "20x"]
    assert cells[3:6] == ["slides, best 1", "0.50 (0.10-0.90)", ""]
    assert cells[6:] == ["slides, all", "1.00 (0.10-0.90)", ""]
    # Without metrics all that have intervals; names are text, never markup.
    table = page.write_table({"<b>": {"5x": leaf(0.5, None, None, "dice <fat>")}}, ())
    assert "&lt;b&gt;, dice &lt;fat&gt;</td><td>0.50</td>" in table


def test_queries_are_the_first_names_of_small_facts():
    facts = {"kind": {"a": ["x", "y"], "b": ["z"]}, "many": {str(i): [f"n{i}"] for i in range(20)}}
    assert page.choose_queries(facts) == ["x", "z"]
    assert page.choose_queries({"many": facts["many"]}) == [f"n{i}" for i in range(12)]


def test_the_page_of_a_run(run, world, tmp_path, monkeypatch):  # noqa: F811
    folder = shutil.copytree(run, tmp_path / "tiny")
    done = script("protocols.page", folder)
    assert done.returncode == 1 and "results.json does not exist: run `python eva" in done.stderr
    config = {"size": "synthetic", "k_o": 2, "data": str(world)}
    data.write_whole(folder / "config.json", json.dumps(config))
    rows = [{"started": "2026-01-02 03:04:05", "step": 0, "config": {"bags": 4}}]
    rows += [{"step": step, "loss": 9 - step} for step in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    with monkeypatch.context() as patch:
        # A probe of a few bags takes seconds to converge.
        zero = torch.zeros(20, 128).double()
        patch.setattr(evaluate, "fit_logistic", lambda x, y, C: (zero[: y.max() + 1], zero[0, 0]))
        evaluate.measure(folder, most=3)
    # The pictures are of the bags that were measured.
    matrices = []

    def drawn(matrix, names):
        matrices.append(matrix)
        return charts.draw_confusion(matrix, names)

    monkeypatch.setattr(page, "draw_confusion", drawn)
    monkeypatch.setattr(sys, "argv", ["page", str(folder)])
    page.main()
    found = json.loads((folder / "results.json").read_text())["zeroshot"]
    for matrix, modes in zip(matrices, found.values(), strict=True):
        row = modes["ensemble"]["bag"]["merged"]
        assert matrix.sum() == row["n"] <= 3 and np.trace(matrix) / row["n"] == row["accuracy"]
    html = (folder / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == [
        *("Zero-shot by prompts", "Linear probe", "Retrieval", "Training", "Pictures")
    ]
    # One file: all is in it, and nothing runs or is fetched. A phone can read it.
    assert html.count("data:image/png;base64,") == 3 and "<script" not in html
    assert not re.search(r"(src|href)='?http", html) and "<meta name='viewport'" in html
    assert "architecture, ensemble, bag<" in html and "Results of tiny" in html
    assert "started: 2026-01-02 03:04:05; step: 0; bags: 4" in html
    assert "<polyline points='60.0,10.0 345.0,70.0 630.0,130.0'" in html
    for name in ("levels.png", "confusion.png", "retrieval.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100 and len(image.getcolors(1 << 24)) > 5, name
    # Curves that were drawn by dev.curves stand for the loss; other weights are told.
    heatmap.save(Image.new("RGB", (9, 9)), folder / "curves.png")
    page.main()
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4 and "<polyline" not in html
    results = (folder / "results.json").read_text()
    for fact in re.findall('"fingerprint": "(.*?)"', results)[:1]:
        (folder / "results.json").write_text(results.replace(fact, "other"))
    with pytest.raises(ValueError, match="tiny was trained since: run `python evaluate.py"):
        page.main()


def test_a_foreign_folder_leaks_nothing_and_damage_is_named(tmp_path, monkeypatch):
    """Pictures that are named elsewhere, links, and what is no picture stay out of the page."""
    secret = tmp_path / "secret"
    secret.write_text("SECRET-KEY")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("SECRET-KEY")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    about = {"model": "m", "fingerprint": "x", "pictures": ["../secret.png", str(secret)]}
    results = {"probe": {"set": {"5x": leaf(0.5)}}, "pictures": ["../secret", str(secret)]}
    results["about"] = {"probe": about}
    data.write_whole(folder / "results.json", json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["page", str(folder)])
    page.main()
    html = (folder / "report.html").read_text()
    code = base64.b64encode(b"SECRET-KEY").decode()
    assert "base64" not in html and "SECRET" not in html and code not in html
    # Damage is named with its file.
    for broken in ("{", "[]", '{"about": {}}', '{"about": {"probe": 3}}', '{"zeroshot": 1}'):
        (folder / "results.json").write_text(broken)
        with pytest.raises(ValueError, match="results.json is damaged .*: move it away"):
            page.main()


def test_a_line_break_breaks_no_drawing():
    name = "tumour\nbed\t\x1b"
    charts.draw_bars({name: {name: (0.5, None, None)}}, "title")
    charts.draw_confusion(np.eye(2), [name, "b"])
    heatmap.side_by_side([(Image.new("RGB", (99, 9)), name)])
    assert heatmap.short(name, 100) == "tumour bed"


def test_a_folder_of_other_results(tmp_path):
    about = {"model": "plip", "fingerprint": "x", "data": "<set>", "prompts": {}}
    results = {"zeroshot": {"set": {"ensemble": {"picture": {"whole": leaf(0.5)}}}}}
    results["few_shot"] = {"set": {"whole": {"1": leaf(0.4, metric="balanced")}}}
    results["about"] = dict.fromkeys(results, about)
    data.write_whole(tmp_path / "results.json", json.dumps(results))
    script("protocols.page", tmp_path, check=True)
    html = (tmp_path / "report.html").read_text()
    assert "set, whole<" in html and "data: &lt;set&gt;" in html
    assert (tmp_path / "levels.png").exists() and not (tmp_path / "confusion.png").exists()
    assert "prompts:" not in html
