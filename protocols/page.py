"""Show the results of a run as pictures and as one page.

    python -m protocols.page RUN        # or another folder with results.json

Draws levels.png, F1 by prompts at each magnification; of a run whose data are there also
confusion.png, the classes of the bags that were measured, four magnifications merged, and
retrieval.png, texts and the held-out patches nearest to them. report.html holds every table of
results.json, every PNG of the folder, and loss and settings of the run. It is one file without
scripts, which can be sent and opened anywhere.

Shape letters: R bags, N = 85 nodes, C classes, Q query texts, d the shared space.
"""

import argparse
import base64
import contextlib
import html
import json
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import model as networks
from protocols.charts import draw_bars, draw_confusion, draw_sheet
from protocols.heatmap import save, side_by_side

# Headings of the protocols, and the metrics that their tables show.
SHOWN = {
    "zeroshot": ("Zero-shot by prompts", ("f1",)),
    "slides": ("Whole slides by prompts (MI-Zero)", ("f1",)),
    "mil": ("Whole slides by attention MIL", ("f1", "balanced", "auroc")),
    "slide_probe": ("Whole slides by mean features", ("f1", "balanced", "auroc")),
    "probe": ("Linear probe", ("f1", "balanced", "auroc")),
    "few_shot": ("Few-shot", ("balanced",)),
    "finetune": ("Fine-tuning", ("f1", "balanced", "auroc")),
    "retrieval": ("Retrieval", ("image_to_text_R@1", "text_to_image_R@1", "chance_R@1", "mean")),
    "segment": ("Segmentation", ()),
}
CAPTIONS = {
    "levels.png": "Weighted F1 per patch at each magnification, and of the four merged per bag; "
    "whiskers: 95 % over slides.",
    "confusion.png": "Bags by prompts, four magnifications merged: rows are the truth.",
    "retrieval.png": "Texts and the held-out patches nearest to them, each of another slide.",
    "segments.png": "A picture, its mask and what was found.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd } div { overflow-x: auto }
table { border-collapse: collapse; margin: .8em 0; font-size: .9em }
td, th { white-space: nowrap; padding: .15em .7em; text-align: right }
tr { border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left } .about { color: #666; font-size: .85em }
td:first-child, th:first-child { position: sticky; left: 0; background: white }
figure { margin: 1.2em 0; overflow-x: auto } figcaption { color: #444 }
img { max-width: 100%; border: 1px solid #eee } svg { max-width: 640px }
@media (max-width: 700px) {
  img { max-width: none }
  td:first-child, th:first-child { white-space: normal; min-width: 8em; padding-left: 0 }
}
"""


# ---- Pictures -----------------------------------------------------------------------------------
def draw_levels(results):
    """Draw F1 at each magnification from zero-shot results -> PIL image, or None without any."""
    table = {}
    for name, modes in results.get("zeroshot", {}).items():
        units = modes["ensemble"]
        row = units.get("picture") or units.get("patch", {})
        # A patch has one magnification; only bags have a merged one.
        if "merged" in units.get("bag", {}):
            row = row | {"merged": units["bag"]["merged"]}
        table[name] = {mag: (found["f1"], *found["interval"]["f1"]) for mag, found in row.items()}
    return draw_bars(table, "Zero-shot by magnification  (weighted F1)") if table else None


def choose_queries(facts, most=12):
    """Choose texts for the sheet: the first name of each class, of the facts that it can hold."""
    queries = []
    everything = []
    for classes in facts.values():
        names = [own[0] for own in classes.values()]
        everything += names
        if len(queries) + len(names) <= most:
            queries += names
    # If no fact fits, show the first classes.
    return queries or everything[:most]


def draw_run(run, folder, said):
    """Embed the test bags that were measured; draw confusion.png and retrieval.png.

    said: what results.json says about these bags.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = evaluate.load_run(run, device)
    if networks.fingerprint(model) != said["fingerprint"]:
        raise ValueError(f"{run} was trained since: run `python evaluate.py {run}` again")
    inside = (folder / "test").is_dir()
    test = data.Bags(folder / "test" if inside else folder)
    # The same bags as evaluate.py, so that numbers and pictures agree.
    features = evaluate.embed(model, test, evaluate.spread(test, said["n"]), device)
    reference = features
    if inside and (folder / "train").is_dir():
        train = data.Bags(folder / "train")
        most = said.get("centred_on", said["n"] // 2)
        reference = evaluate.embed(model, train, evaluate.spread(train, most), device)
    facts, templates, labels = evaluate.questions(test, features["index"])
    # Draw a matrix of each fact.
    panels = []
    for fact, classes in facts.items():
        vectors = evaluate.class_vectors(model, tokenizer, classes.values(), templates)
        own, others = (evaluate.level_scores(f, vectors) for f in (features, reference))
        y = labels[fact][:, 0]
        merged = evaluate.merged_scores(own, others)
        use = (y >= 0) & ~np.isnan(merged[:, 0])
        matrix = evaluate.confusion(y[use], merged[use].argmax(1), len(classes))
        panels.append((draw_confusion(matrix, list(classes)), f"{fact}, bags, merged"))
    save(side_by_side(panels), run / "confusion.png")
    queries = choose_queries(facts)
    vectors = evaluate.embed_texts(model, tokenizer, queries)
    save(draw_sheet(test, features, queries, vectors), run / "retrieval.png")


# ---- The page -----------------------------------------------------------------------------------
def find_rows(found, path=()):
    """Walk nested results -> yields (names on the way, {column: scores}).

    Scores are dicts with an "interval"; a row is a dict of scores.
    """
    if all("interval" in inside for inside in found.values()):
        yield path, found
        return
    for name, inside in found.items():
        yield from find_rows(inside, (*path, name))


def cell(found, metric):
    """Write a metric with its interval, or nothing where it is not defined."""
    if not found or found.get(metric) is None:
        return ""
    low, high = found["interval"].get(metric) or (None, None)
    return f"{found[metric]:.2f}" + ("" if low is None else f" ({low:.2f}-{high:.2f})")


def write_table(found, metrics):
    """Write the results of a protocol as an HTML table; without metrics, those with intervals."""
    rows = list(find_rows(found))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    # Write a line for each row and metric. If there is one metric, the corner names it.
    one = len(metrics) == 1
    lines = [[metrics[0] if one else "", *columns]]
    for path, row in rows:
        known = dict.fromkeys(name for told in row.values() for name in told["interval"])
        for metric in metrics or known:
            if metric in known:
                cells = [cell(row.get(column), metric) for column in columns]
                lines.append([", ".join(path if one else (*path, metric)), *cells])
    # The first line is the head.
    out = []
    for k, line in enumerate(lines):
        tag = "td" if k else "th"
        out.append("<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in line) + "</tr>")
    return "<div><table>" + "\n".join(out) + "</table></div>"


def draw_loss(rows, width=640, height=160):
    """Draw the loss of log.jsonl, rows {"step", "loss", ...}, as an SVG; "" if there is none."""
    # After a kill some steps are done twice: the later one counts.
    points = {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}
    if len(points) < 2:
        return ""
    steps, values = np.array(sorted(points.items()), float).T
    x = 60 + (width - 70) * (steps - steps[0]) / (steps[-1] - steps[0])
    low, high = values.min(), values.max()
    y = 10 + (height - 40) * (high - values) / max(high - low, 1e-9)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    out = [f"<figure><svg viewBox='0 0 {width} {height}' font-size='12' role='img'>"]
    out.append(f"<polyline points='{line}' fill='none' stroke='#1f4e9c' stroke-width='2'/>")
    out.append(
        f"<text x='0' y='16'>{high:.3g}</text><text x='0' y='{height - 28}'>{low:.3g}</text>"
    )
    out.append(f"<text x='60' y='{height - 4}'>step {steps[0]:.0f} to {steps[-1]:.0f}</text></svg>")
    return "".join([*out, "<figcaption>The training loss.</figcaption></figure>"])


def write_training(folder):
    """Write the section of a run: its loss, its starts and its settings; "" without log.jsonl."""
    file = folder / "log.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        # A kill may have cut a line.
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    starts = [row for row in rows if "started" in row]
    if not starts:
        return ""
    # The last start says it all: date, version of torch, commit if known, settings.
    told = starts[-1] | starts[-1].get("config", {})
    words = "; ".join(f"{key}: {x}" for key, x in told.items() if key != "config")
    loss = "" if (folder / "curves.png").exists() else draw_loss(rows)
    return f"<h2>Training</h2>{loss}<p class='about'>{html.escape(words)}</p>"


def write_sections(results):
    """Write title and sections of the protocols as HTML, in the order in which they are told of."""
    about = results["about"]
    title = html.escape(f"Results of {next(iter(about.values()))['model']}")
    out = [f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    out.append("<p>In brackets: the 95 % interval, of a bootstrap over slides or patients.</p>")
    for name, said in about.items():
        heading, metrics = SHOWN.get(name, (name.replace("_", " ").capitalize(), ("f1",)))
        told = [f"{key.replace('_', ' ')}: {x}" for key, x in said.items() if key != "prompts"]
        out.append(f"<h2>{html.escape(heading)}</h2>{write_table(results[name], metrics)}")
        out.append(f"<p class='about'>{html.escape('; '.join(told))}</p>")
    return "\n".join(out)


def write_page(folder, sections):
    """Write report.html from sections, the log of a run and the PNGs of a folder."""
    out = ["<!doctype html><html lang='en'><meta charset='utf-8'>"]
    # Without it a phone lays the page out as wide as a desk's screen.
    out.append("<meta name='viewport' content='width=device-width'>")
    out += [sections, write_training(folder), "<h2>Pictures</h2>"]
    # Pictures go into the page itself: it is one file.
    for path in sorted(folder.glob("*.png")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        # What is no picture, or lies elsewhere, could be a secret.
        if content.startswith(b"\x89PNG"):
            caption = html.escape(CAPTIONS.get(path.name, path.stem), quote=True)
            code = base64.b64encode(content).decode()
            out.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{code}'>")
            out.append(f"<figcaption>{caption}</figcaption></figure>")
    data.write_whole(folder / "report.html", "\n".join(out))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", metavar="RUN", help="a folder with results.json")
    args = parser.parse_args()
    folder = Path(args.folder)
    file = folder / "results.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: run `python evaluate.py {folder}` first")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        # These bars need the results only; the other pictures need run and data.
        levels = draw_levels(results)
        sections = write_sections(results)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
        raise ValueError(f"{file} is damaged ({e!r}): move it away and measure again") from None
    if levels:
        save(levels, folder / "levels.png")
    if (folder / "ckpt.pt").exists() and "zeroshot" in results:
        source = Path(data.read_json(folder / "config.json")["data"])
        if source.is_dir():
            draw_run(folder, source, results["about"]["zeroshot"])
        else:
            print(f"{source}, the run's data, is not here: no confusion.png, no retrieval.png")
    write_page(folder, sections)
    print(f"wrote {folder}/report.html")


if __name__ == "__main__":
    data.run_script(main, "pictures that were drawn are kept")
