"""Draw the logs of one or more runs as panels of one picture.

    python -m dev.curves runs/synthetic [RUN ...] --out curves.png

Every number of log.jsonl has a panel, over the steps, in one colour a run. Validation stands as
dots in the panel of its training loss.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import data

COLOURS = ("#1f4e9c", "#c8501e", "#2a8a4a", "#8a3d94", "#8a6d1c", "#4a4a4a")
WIDTH, HEIGHT, COLUMNS = 300, 170, 4  # pixels of a panel, and panels side by side


def read_log(folder):
    """Read log.jsonl of a run -> {name: (steps, values)}, steps ascending.

    After a kill some steps are done twice: the later line counts, and a cut line is passed over.
    """
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} holds no log.jsonl: give the folder of a run of train.py")
    series = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        # The first line of each start describes the machine.
        if "started" not in row:
            step = row.pop("step")
            for name, value in row.items():
                series.setdefault(name, {})[step] = value
    found = {}
    for name, points in series.items():
        steps = sorted(points)
        found[name] = (steps, [points[step] for step in steps])
    return found


def draw_panel(draw, x, y, name, lines, last):
    """Draw one panel at (x, y), up to step `last`. lines: tuples (colour, steps, values, dots)."""
    left, right, top, bottom = x + 52, x + WIDTH - 14, y + 20, y + HEIGHT - 22
    # Draw the middle 98 % of the range, so that one spike flattens nothing.
    values = np.concatenate([values for _, _, values, _ in lines])
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = np.quantile(values, (0.01, 0.99))
    high = max(high, low + 1e-6 * max(abs(low), 1))
    draw.rectangle((left, top, right, bottom), outline="#c0c0c0")
    draw.text((left, top - 17), name.replace("_", " "), "black", font_size=13)
    small = dict(fill="#606060", font_size=11, anchor="rm")
    draw.text((left - 4, top), f"{high:.3g}", **small)
    draw.text((left - 4, bottom), f"{low:.3g}", **small)
    draw.text((right, bottom + 10), f"step {last}", **small)
    for colour, steps, values, dots in lines:
        seen = np.isfinite(values)
        across = left + (right - left) * np.array(steps)[seen] / max(last, 1)
        height = np.clip((np.array(values)[seen] - low) / (high - low), 0, 1)
        points = np.stack([across, bottom - (bottom - top) * height], 1).tolist()
        # A short series is shown by its points, or it could not be seen.
        for across, down in points if dots or len(points) < 8 else ():
            draw.ellipse((across - 3, down - 3, across + 3, down + 3), outline=colour, width=2)
        if not dots:
            draw.line([tuple(point) for point in points], colour, width=2)


def draw_curves(folders, out):
    """Draw the logs of these runs as one PNG."""
    logs = {folder: read_log(folder) for folder in folders}
    # Leave out validation, and what was logged only once.
    names, last = {}, 0
    for log in logs.values():
        for name, (steps, _) in log.items():
            last = max(last, steps[-1])
            if len(steps) > 1 and not name.startswith("val_"):
                names[name] = []
    if not names:
        raise ValueError(f"{folders[0]}/log.jsonl holds fewer than two log steps: train longer")
    head = 24 + 16 * len(logs)
    page = Image.new("RGB", (COLUMNS * WIDTH, head + -(-len(names) // COLUMNS) * HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    for i, (folder, log) in enumerate(logs.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((10, 6 + 16 * i), str(folder), colour, font_size=13)
        for name, points in log.items():
            lines = names.get(name.removeprefix("val_"), [])
            lines.append((colour, *points, name.startswith("val_")))
    for k, (name, lines) in enumerate(names.items()):
        row, column = divmod(k, COLUMNS)
        draw_panel(draw, column * WIDTH, head + row * HEIGHT, name, lines, last)
    data.write_whole(out, lambda file: page.save(file, "PNG"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", default="curves.png", help="PNG to write (%(default)s)")
    args = parser.parse_args()
    draw_curves(args.runs, args.out)


if __name__ == "__main__":
    data.run_script(main)
