"""How results are kept and shown: results.json, tables on the screen, and report.html, one page with every table and picture of a folder.

Each protocol's numbers lie under its name with, under "about", what they are of: model and fingerprint, data and hash, split, number of rows, prompts.
A protocol that runs again replaces its own part and nothing else, and the page is drawn anew from the whole.

Outline: keep | a protocol's tables, one function each | the screen, the page.
"""
import base64
import html
import json
import math
from pathlib import Path

import data

MAGS = ("5x", "10x", "20x", "40x", "merged")
METRICS = {"f1": "weighted F1", "macro_f1": "macro F1", "balanced": "balanced", "accuracy": "accuracy", "auroc": "AUROC", "kappa": "kappa"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
div { overflow-x: auto } table { border-collapse: collapse; margin: .8em 0; font-size: .92em }
td, th { white-space: nowrap; padding: .15em .7em; text-align: right; border-bottom: 1px solid #eee } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; margin: .5em 0; border: 1px solid #eee } figure { margin: 1.2em 0 } figcaption { color: #444 } .about { color: #666; font-size: .85em }
"""


def keep(out, about, results, images=None):
    """Merge results {protocol: ...} and pictures {file: caption} into out/results.json, whole or not at all, each protocol with what it is `about`; then
    draw out/report.html anew and print the new tables."""
    file, out = Path(out) / "results.json", Path(out)
    try:
        old = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise ValueError(f"{file} is not JSON: move it away, and run this again") from None
    mine = lambda key: old["about"].get(key, {}).get("fingerprint") == about["fingerprint"]
    if "about" in old and not all(map(mine, old["about"])):
        print(f"{file} held results of other weights, which give way to these")
    if "about" not in old or not all(map(mine, old["about"])):                         # or was written before results said what they are of
        old = {}
    tell = {k: about | {"n": n} if (n := rows_of(r)) else about for k, r in results.items()}
    shown = {name: dict(caption=caption, of=next(iter(results))) for name, caption in (images or {}).items()}
    new = old | results | {"about": old.get("about", {}) | tell, "pictures": old.get("pictures", {}) | shown}
    data.replace_file(file, json.dumps(json_ready(new), indent=1))
    sections = []
    for key in new:
        if key in TABLES and (tables := TABLES[key][1](new[key])):
            said = "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in new["about"].get(key, {}).items() if k != "prompts")
            drawn = [(out / name, p["caption"]) for name, p in new["pictures"].items() if p["of"] == key and (out / name).exists()]
            sections.append((TABLES[key][0], said, tables, drawn))
    write_html(out, f"{about['model']} on {about['data']}", sections)
    for key in results:
        for caption, head, rows in TABLES[key][1](results[key]):
            print_table(f"{TABLES[key][0]}: {caption}" if caption else TABLES[key][0], head, rows)


def json_ready(x):
    """The same with NaN as null: JSON knows no NaN."""
    if isinstance(x, dict):
        return {str(k): json_ready(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [json_ready(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def rows_of(r):
    """The largest number of rows that some score in a result is of."""
    inside = r.values() if isinstance(r, dict) else r if isinstance(r, list) else ()
    own = r["n"] if isinstance(r, dict) and isinstance(r.get("n"), int) else 0
    return max([own, *map(rows_of, inside)])


# ----------------------------------------------------------------------------------------------------------------------
# A protocol's results -> [(caption, head [str], rows [[str]])]. Keys that were numbers are text when they come from JSON.

def value(x, digits=3):
    """A number, or a dash where there is none."""
    return "-" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def score(s, name="f1"):
    """A score with its 95 % interval, where it has one."""
    low, high = (s.get("interval") or {}).get(name) or (None, None)
    return value(s.get(name)) + ("" if value(low) == "-" or value(s.get(name)) == "-" else f" ({value(low, 2)}-{value(high, 2)})")


def zeroshot_tables(r):
    """Of pictures: {mode: {"all" or magnification: scores}}; of bags: {fact: {mode: {"patch" or "bag": {magnification: scores}}}}."""
    rows = []
    if "ensemble" in r:
        for mode, said in (("ensemble", "prompt ensemble"), ("single", "first name alone")):
            rows += [[said + (f", {column}" if column != "all" else ""), *(score(s, m) for m in METRICS), str(s["n"])] for column, s in r[mode].items()]
        return [("", ["", *METRICS.values(), "n"], rows)]
    for fact, modes in r.items():
        for unit in ("patch", "bag"):
            both = modes["ensemble"][unit], modes["single"][unit]
            n = [s["n"] for s in both[0].values()]
            rows.append([f"{fact} per {unit}", *("{:.3f} ({:.3f})".format(*(b[m]["f1"] for b in both)) if m in both[0] else "" for m in MAGS), str(max(n, default=0))])
    return [("weighted F1 with the prompt ensemble (first name alone)", ["", *MAGS, "n"], rows)]


def slide_tables(r):
    """{magnification: {j: scores}}."""
    js = list(next(iter(r.values()), {}))
    rows = [[mag, *(score(row[j]) for j in js), str(row[js[0]]["n"])] for mag, row in r.items()]
    return [("weighted F1 by the j best patches of a class", ["", *(f"j = {j}" for j in js), "slides"], rows)] if rows else []


def score_tables(r):
    """[{"task", "features", "method", scores}], or {magnification: scores}."""
    r = r if isinstance(r, list) else [{"task": mag, **s} for mag, s in r.items()]
    names = [k for k in ("task", "features", "method") if any(k in row for row in r)]
    rows = [[*(str(row.get(k, "")) for k in names), *(score(row, m) for m in METRICS), str(row["n"])] for row in r]
    return [("", [*names, *METRICS.values(), "n"], rows)] if rows else []


def few_shot_tables(r):
    """[{"task", "features", "k": {k: {"balanced", "low", "high"}}}]."""
    ks, rows = list(dict.fromkeys(k for row in r for k in row["k"])), []
    for row in r:
        cells = ({**{k: "" for k in ks}, **{k: f"{s['balanced']:.3f} ({s['low']:.2f}-{s['high']:.2f})" for k, s in row["k"].items()}}).values()
        rows.append([row["task"], row["features"], *cells])
    return [("SimpleShot, balanced accuracy, mean of the draws (worst-best)", ["task", "features", *(f"k = {k}" for k in ks)], rows)] if ks else []


def retrieval_tables(r):
    """{magnification or "all": {"image_to_text_R@1" ..., "mean", "n", perhaps "reranked"}}."""
    out, head = [], ["", "image to text", "text to image", "mean", "chance of R@1", "candidates"]
    for caption, pick in (("recall at 1 / 5 / 10", lambda row: row), ("the best candidates re-ranked by image-text matching", lambda row: row.get("reranked"))):
        ways = lambda p: [" / ".join(f"{p[f'{way}_R@{k}']:.3f}" for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")]
        rows = [[mag, *ways(p), value(p["mean"]), value(1 / row["n"]), str(row["n"])] for mag, row in r.items() if (p := pick(row))]
        out += [(caption, head, rows)] if rows else []
    return out


def slide_retrieval_tables(r):
    """{magnification: accuracy, "n", "slides", "chance"}."""
    return [("accuracy of the nearest bag", list(r), [[value(v) if isinstance(v, float) else str(v) for v in r.values()]])]


def diagnosis_tables(r):
    """{magnification: {"R@1", "R@5", "R@10", "chance", "n"}}."""
    rows = [[mag, *(value(row[k]) for k in ("R@1", "R@5", "R@10", "chance")), str(row["n"])] for mag, row in r.items()]
    return [("recall", ["", "R@1", "R@5", "R@10", "chance of R@1", "patches"], rows)] if rows else []


def segment_tables(r):
    """{"classes", "rows": {way: {"dice" of each class, "mean", "interval", "n"}}}."""
    rows = [[way, *map(value, s["dice"]), f"{value(s['mean'])} ({value(s['interval'][0], 2)}-{value(s['interval'][1], 2)})", str(s["n"])] for way, s in r["rows"].items()]
    return [("Dice over all pixels", ["", *r["classes"], "mean", "pictures"], rows)]


TABLES = {  # protocol: (heading, function)
    "zeroshot": ("zero-shot", zeroshot_tables), "slide": ("slides, zero-shot (MI-Zero)", slide_tables), "mil": ("slides, gated-attention MIL", score_tables),
    "probe": ("frozen features", score_tables), "few_shot": ("few-shot", few_shot_tables), "finetune": ("full fine-tuning", score_tables),
    "retrieval": ("retrieval, image <-> caption", retrieval_tables), "slide_retrieval": ("which slide does a held-out parent come from", slide_retrieval_tables),
    "diagnosis_retrieval": ("patch -> slides of its diagnosis", diagnosis_tables), "segment": ("segmentation", segment_tables),
}


# ----------------------------------------------------------------------------------------------------------------------
# The screen, the page

def print_table(caption, head, rows):
    """A table in columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    print(f"\n{caption}")
    for row in (head, *rows):
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))


def write_html(folder, title, sections):
    """folder/report.html: sections [(heading, paragraph, tables, pictures)], tables as above, pictures [(PNG path, caption)]. Pictures go into the page
    itself, so that the one file can be sent and opened anywhere."""
    text = html.escape
    out = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{text(title)}</title><style>{STYLE}</style><h1>{text(title)}</h1>"]
    for heading, paragraph, tables, images in sections:
        out.append(f"<h2>{text(heading)}</h2><p class='about'>{text(paragraph)}</p>")
        for caption, head, rows in tables:
            line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{text(c)}</{tag}>" for c in cells) + "</tr>"
            out += [f"<p>{text(caption)}</p>"] * bool(caption) + [f"<div><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"]
        for path, caption in images:
            code = base64.b64encode(Path(path).read_bytes()).decode()
            out.append(f"<figure><img alt='{text(caption, quote=True)}' src='data:image/png;base64,{code}'><figcaption>{text(caption)}</figcaption></figure>")
    data.replace_file(Path(folder) / "report.html", "\n".join(out))
