"""Train the built-in world with each loss left out, several seeds each, and print one table.

    python -m dev.ablations --out runs/ablations --seeds 3 --steps 450 --jobs 2        # hours

The same command continues and prints. Each run is a process with one thread. Zero-shot numbers are
weighted F1 on held-out slides, per patch; the diagnosis is per bag, magnifications merged.
Retrieval is the mean recall. A cell has the mean over seeds and their range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import train
from prepare.world import make_world

# The name of a row, and the flags of train.py that make it. Add your own.
CHANGES = {"all-six": []} | {f"without-{loss}": [f"--{loss}", "0"] for loss in train.LOSSES}

COLUMNS = (
    "architecture 5x",
    "architecture 10x",
    "cytology 20x",
    "cytology 40x",
    "diagnosis merged",
)


def numbers(folder):
    """Read a number for each column from results.json of a run, [] if it was not measured."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    # Retrieval is written last.
    if "retrieval" not in results:
        return []
    found = []
    for column in COLUMNS:
        fact, mag = column.split()
        unit = "bag" if mag == "merged" else "patch"
        found.append(results["zeroshot"][fact]["ensemble"][unit][mag]["f1"])
    return [*found, statistics.mean(part["mean"] for part in results["retrieval"].values())]


def run(folder, flags):
    """Train one run with these flags of train.py, unless it has its results already."""
    if numbers(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", "--out", str(folder), *flags]
    with open(folder / "output.txt", "w") as out:
        done = subprocess.run(command, env=settings, stdout=out, stderr=out)
    if done.returncode:
        print(f"{folder} failed: see its output.txt", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default="runs/ablations")
    parser.add_argument("--data", default="data/synthetic", help="built-in world, made if missing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES), help="rows")
    args = parser.parse_args()
    if not (Path(args.data) / "classes.json").exists():
        make_world(args.data)
    # Run all rows of a seed before the next seed, so that an early table compares like with like.
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            for name in args.only:
                flags = ["--data", args.data, "--steps", str(args.steps), "--seed", str(seed)]
                pool.submit(run, args.out / f"{name}-{seed}", flags + CHANGES[name])
    rows = []
    for name in args.only:
        found = [numbers(args.out / f"{name}-{seed}") for seed in range(args.seeds)]
        found = list(filter(None, found))
        cells = []
        for values in zip(*found, strict=True):
            mean = statistics.mean(values)
            cells.append(f"{mean:.2f} ({min(values):.2f}-{max(values):.2f})")
        if found:
            rows.append([name, str(len(found)), *cells])
    evaluate.print_table("ablations", ["", "seeds", *COLUMNS, "retrieval"], rows)


if __name__ == "__main__":
    main()
