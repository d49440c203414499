"""What a run leaves behind: checkpoints that survive a kill at any moment, a log, and its curves.

    runs/mine/config.json      settings                  ckpt.pt, ckpt_prev.pt     the last two checkpoints
              log.jsonl        a line a log step         curves.png                the log as a picture
              tokenizer.json   the vocabulary            results.json, report.html   what evaluate.py measured at the end

    python runs.py RUN [RUN ...] --out curves.png        # the curves of several runs in one picture: an ablation at a glance

A checkpoint holds model, momentum model, queues, optimiser, settings and the step. It holds no generator's state, no position in the data and no
schedule, since all three are functions of the step (batches.py): so it fits any number of processes.
"""
import argparse
import dataclasses
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data

# Settings that may change when a run goes on: they decide how and where it runs, not what it computes (weights files: they are in the checkpoint).
FREE = ("out", "data", "vision", "text", "tokenizer", "device", "compile", "workers", "ram", "log_every", "save_every", "eval_every", "evaluate", "wandb", "change", "preset")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(folder, objective, optimizer, step, cfg, skipped=0):
    """ckpt.pt, and the one before it as ckpt_prev.pt: each appears whole or not at all, also when the power fails."""
    new, old, temp = (Path(folder) / name for name in ("ckpt.pt", "ckpt_prev.pt", "ckpt.pt.tmp"))
    with open(temp, "wb") as f:
        torch.save({"model": objective.model.state_dict(), "memory": objective.memory(), "optimizer": optimizer.state_dict(), "step": step,
                    "skipped": skipped, "config": dataclasses.asdict(cfg)}, f)
        f.flush()
        os.fsync(f.fileno())
    if new.exists():
        os.replace(new, old)
    os.replace(temp, new)


def read_checkpoint(folder, device="cpu"):
    """The newest checkpoint of a run that can be read -> (its contents, its path), or (None, None) where there is none. ValueError where there
    are some and none can be read."""
    broken = []
    for path in (Path(folder) / "ckpt.pt", Path(folder) / "ckpt_prev.pt"):
        if path.exists():
            try:
                state = torch.load(path, map_location=device, weights_only=True)
                state["model"], state["config"]["size"]
                return state, path
            except Exception as e:  # a damaged file raises almost anything
                broken.append(f"{path} cannot be read ({type(e).__name__})")
                print(f"{broken[-1]}; trying the one before it", file=sys.stderr)
    if broken:
        raise ValueError(f"{' and '.join(broken)}: move them away to start anew")
    return None, None


def check_settings(state, path, cfg):
    """Refuse to go on with other settings than a checkpoint's, naming them; with cfg.change they are only named -> a sentence, or ""."""
    was, now = state["config"], dataclasses.asdict(cfg)
    other = ", ".join(f"{k} {was.get(k)} -> {now.get(k)}" for k in was | now if k not in FREE and was.get(k) != now.get(k))
    if other and not cfg.change:
        raise ValueError(f"{path} was trained with other settings ({other}): use them again, or another --out, or --change true to go on with the new ones")
    return other and f"going on with other settings than before: {other}"


# ----------------------------------------------------------------------------------------------------------------------
# The machine

def versions():
    """What a log needs to be reproduced: library versions, machine, commit."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(), "git": commit}


def matmul_rate(device, seconds=0.3):
    """FLOP/s that large matrix products reach here, bf16 on a GPU and fp32 on a CPU: what the FLOPs of a step are compared with (MFU)."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, best, start = torch.rand(n, n, device=device, dtype=dtype), 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        t = time.perf_counter()
        for _ in range(4):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 8 * n ** 3 / (time.perf_counter() - t))
    return best


def memory(device):
    """GB at the most so far: of the GPU's memory, or of this process."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Log and curves

def open_log(folder):
    """log.jsonl, to be appended to; a line that a kill cut off is ended first."""
    path = Path(folder) / "log.jsonl"
    cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    log = open(path, "a")
    log.write("\n" if cut else "")
    return log


def read_log(folder):
    """log.jsonl -> {name: (steps, values)}. Of a step that was done twice, because a kill lost its checkpoint, the last line counts."""
    rows = {}
    for row in data.whole_rows(Path(folder) / "log.jsonl", "step"):
        if "started" not in row:
            rows[row["step"], "val_loss" in row] = row
    series = {}
    for (step, _), row in sorted(rows.items()):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                series.setdefault(name, ([], []))
                series[name][0].append(step)
                series[name][1].append(value)
    return series


COLOURS = ("#1f4e9c", "#c8501e", "#2a8a4a", "#8a3d94", "#8a6d1c", "#4a4a4a")


def draw_curves(folders, out, width=300, height=170, columns=4):
    """A panel for everything a log holds, over the steps, one colour a run; validation as dots beside training. Writes a PNG."""
    logs = [read_log(folder) for folder in folders]
    names = list(dict.fromkeys(n for log in logs for n in log if not n.startswith("val_")))
    names = [n for n in names if any(n in log and len(log[n][0]) > 1 for log in logs)] or names              # what was measured once is no curve
    if not names:
        return
    top, last = 24 + 16 * (len(folders) > 1) * len(folders), max(max(steps) for log in logs for steps, _ in log.values())
    page = Image.new("RGB", (columns * width, top + -(-len(names) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, folder in enumerate(folders if len(folders) > 1 else ()):
        draw.text((10, 6 + 16 * i), str(folder), COLOURS[i % len(COLOURS)], font_size=13)
    for k, name in enumerate(names):
        left, up, right, down = k % columns * width + 52, top + k // columns * height + 20, (k % columns + 1) * width - 14, top + (k // columns + 1) * height - 22
        lines = [(i, log[key], key != name) for i, log in enumerate(logs) for key in (name, f"val_{name}") if key in log]
        y = np.concatenate([v for _, (_, v), _ in lines])
        y = y[np.isfinite(y)] if np.isfinite(y).any() else np.zeros(1)
        low, high = np.quantile(y, 0.01), np.quantile(y, 0.99)                         # one early spike would flatten all the rest
        high = high if high > low else low + max(abs(low), 1e-6)
        draw.rectangle((left, up, right, down), outline="#c0c0c0")
        draw.text((left, up - 17), name.replace("_", " "), "black", font_size=13)
        for value, at in ((high, up), (low, down)):
            draw.text((left - 4, at), f"{value:.3g}", "#606060", font_size=11, anchor="rm")
        draw.text((right, down + 10), f"step {last}", "#606060", font_size=11, anchor="rm")
        for i, (steps, values), dots in lines:
            colour = COLOURS[i % len(COLOURS)]
            points = [(left + (right - left) * s / max(last, 1), down - (down - up) * float(np.clip((v - low) / (high - low), 0, 1))) for s, v in zip(steps, values) if np.isfinite(v)]
            if dots or len(points) < 8:
                for x, at in points:
                    draw.ellipse((x - 3, at - 3, x + 3, at + 3), outline=colour, width=2)
            if not dots and len(points) > 1:
                draw.line(points, colour, width=2)
    data.save_png(page, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", default="curves.png", help="PNG to write")
    args = parser.parse_args()
    for run in args.runs:
        if not read_log(run):
            raise ValueError(f"{run} holds no log.jsonl with log steps: it is not a run folder, or nothing was logged yet")
    draw_curves(args.runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
