"""How results are kept and shown: results.json, tables on the screen, and report.html, one page with every table and picture of a folder.

Each protocol's numbers lie under its name with, under "about", what they are of: model and fingerprint, data and hash, split, number of rows, prompts. A protocol that runs again replaces
its own part and nothing else, and the page is drawn anew from the whole.
"""
import base64
import html
import json
import math
from pathlib import Path

import data

MAGS = ("5x", "10x", "20x", "40x", "merged")
HEADINGS = {"zeroshot": "zero-shot", "slide": "slides, zero-shot (MI-Zero)", "mil": "slides, gated-attention MIL", "probe": "frozen features", "few_shot": "few-shot",
            "finetune": "full fine-tuning", "retrieval": "retrieval, image <-> caption", "slide_retrieval": "which slide does a held-out parent come from",
            "diagnosis_retrieval": "patch -> slides of its diagnosis", "segment": "segmentation"}
METRICS = {"f1": "weighted F1", "macro_f1": "macro F1", "balanced": "balanced", "accuracy": "accuracy", "auroc": "AUROC", "kappa": "kappa"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}h1{font-size:1.5em}h2{margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.8em 0}td,th{white-space:nowrap;padding:.15em .8em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
img{max-width:100%;margin:.5em 0;border:1px solid #eee}.about{color:#666;font-size:.85em}figcaption{color:#444}figure{margin:1.2em 0}"""


def keep(out, about, results, images=None):
    """Merge results {protocol: ...} and pictures {file: caption} into out/results.json, whole or not at all, each protocol with what it is `about`; then draw out/report.html anew and print the tables."""
    file = Path(out) / "results.json"
    try:
        old = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise ValueError(f"{file} is not JSON: move it away, and run this again") from None
    old = old if "about" in old else {}                                                # written before results said what they are of
    tell = {k: about | {"n": n} if (n := rows_of(r)) else about for k, r in results.items()}
    new = old | results | {"about": old.get("about", {}) | tell, "pictures": old.get("pictures", {}) | {k: dict(caption=v, of=next(iter(results))) for k, v in (images or {}).items()}}
    data.replace_file(file, json.dumps(json_ready(new), indent=1))
    sections = []
    for key in (k for k in new if k not in ("about", "pictures") and tables_of(k, new[k])):
        said = {k: v for k, v in new["about"].get(key, {}).items() if k != "prompts"}
        drawn = [(Path(out) / p, i["caption"]) for p, i in new["pictures"].items() if i["of"] == key and (Path(out) / p).exists()]
        sections.append((HEADINGS[key], "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in said.items()), tables_of(key, new[key]), drawn))
    write_html(out, f"{about['model']} on {about['data']}", sections)
    for key in results:
        for caption, head, rows in tables_of(key, results[key]):
            print_table(f"{HEADINGS[key]}: {caption}" if caption else HEADINGS[key], head, rows)


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


def shown(s, name="f1"):
    """A score with its 95 % interval, where it has one."""
    value = s.get(name)
    if value is None or math.isnan(value):
        return "-"
    low, high = (s.get("interval") or {}).get(name) or (None, None)
    return f"{value:.3f}" + (f" ({low:.2f}-{high:.2f})" if low is not None and not math.isnan(low) else "")


def tables_of(key, r):
    """A protocol's results -> [(caption, head, rows)], as they are printed and shown in report.html."""
    if key == "zeroshot" and "ensemble" in r:                                          # labelled pictures
        return [("", ["", *METRICS.values(), "n"], [[f"{'prompt ensemble' if mode == 'ensemble' else 'first name alone'}{', ' + column if column != 'all' else ''}",
                 *(shown(s, m) for m in METRICS), str(s["n"])] for mode, row in r.items() for column, s in row.items()])]
    if key == "zeroshot":
        line = lambda fact, modes, unit, m: f"{a['f1']:.3f} ({b['f1']:.3f})" if (a := modes["ensemble"][unit].get(m)) and (b := modes["single"][unit].get(m)) else ""
        count = lambda modes, unit: str(next(iter(modes["ensemble"][unit].values()))["n"] if unit == "patch" else modes["ensemble"]["bag"]["merged"]["n"])
        return [("weighted F1 with the prompt ensemble (first name alone)", ["", *MAGS, "n"],
                 [[f"{fact} per {unit}", *(line(fact, modes, unit, m) for m in MAGS), count(modes, unit)] for fact, modes in r.items() for unit in ("patch", "bag") if modes["ensemble"][unit]])]
    if key == "slide":
        js = list(next(iter(r.values()), {}))
        return [("weighted F1 by the j best patches of a class", ["", *(f"j = {j}" for j in js), "slides"], [[mag, *(shown(row[j]) for j in js), str(row[js[0]]["n"])] for mag, row in r.items()])] if r else []
    if key in ("mil", "probe", "finetune"):
        rows = r if isinstance(r, list) else [{"task": mag, **s} for mag, s in r.items()]
        names = [k for k in ("task", "features", "method") if any(k in row for row in rows)]
        return [("", [*names, *METRICS.values(), "n"], [[*(str(row.get(k, "")) for k in names), *(shown(row, m) for m in METRICS), str(row["n"])] for row in rows])] if rows else []
    if key == "few_shot":
        ks = list(dict.fromkeys(k for row in r for k in row["k"]))
        return [("SimpleShot, balanced accuracy, mean of the draws (worst-best)", ["task", "features", *(f"k = {k}" for k in ks)],
                 [[row["task"], row["features"], *(f"{s['balanced']:.3f} ({s['low']:.2f}-{s['high']:.2f})" if (s := row["k"].get(k)) else "" for k in ks)] for row in r])] if ks else []
    if key == "retrieval":
        out = []
        for name, pick in (("recall at 1 / 5 / 10", lambda row: row), ("the best candidates re-ranked by image-text matching", lambda row: row.get("reranked"))):
            rows = [[mag, *(" / ".join(f"{p[f'{way}_R@{k}']:.3f}" for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")), f"{p['mean']:.3f}", f"{1 / row['n']:.3f}", str(row["n"])]
                    for mag, row in r.items() if (p := pick(row))]
            out += [(name, ["", "image to text", "text to image", "mean", "chance of R@1", "candidates"], rows)] if rows else []
        return out
    if key == "slide_retrieval":
        return [("accuracy of the nearest bag", list(r), [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()]])]
    if key == "diagnosis_retrieval":
        return [("recall", ["", "R@1", "R@5", "R@10", "chance of R@1", "patches"], [[mag, *(f"{row[k]:.3f}" for k in ("R@1", "R@5", "R@10", "chance")), str(row["n"])] for mag, row in r.items()])] if r else []
    if key == "segment":
        return [("Dice over all pixels", ["", *r["classes"], "mean", "pictures"], [[name, *("-" if d is None or math.isnan(d) else f"{d:.3f}" for d in s["dice"]),
                 f"{s['mean']:.3f} ({s['interval'][0]:.2f}-{s['interval'][1]:.2f})", str(s["n"])] for name, s in r["rows"].items()])]
    return []


def print_table(caption, head, rows):
    """A table in columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    print(f"\n{caption}")
    for row in (head, *rows):
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))


def write_html(folder, title, sections):
    """folder/report.html: sections [(heading, paragraph, tables, pictures)], tables [(caption, head [str], rows [[str]])], pictures [(PNG path, caption)]. Pictures go into the page itself, so that
    the one file can be sent and opened anywhere."""
    out = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"]
    for heading, paragraph, tables, images in sections:
        out.append(f"<h2>{html.escape(heading)}</h2><p class='about'>{html.escape(paragraph)}</p>")
        for caption, head, rows in tables:
            line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"
            out.append((f"<p>{html.escape(caption)}</p>" if caption else "") + f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>")
        for path, caption in images:
            code = base64.b64encode(Path(path).read_bytes()).decode()
            out.append(f"<figure><img alt='{html.escape(caption, quote=True)}' src='data:image/png;base64,{code}'><figcaption>{html.escape(caption)}</figcaption></figure>")
    data.replace_file(Path(folder) / "report.html", "\n".join(out))
