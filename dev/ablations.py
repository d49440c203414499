"""Does a loss help? Train the built-in world with all six losses and with each change below, several seeds each, and print one table.

    python dev/ablations.py --out runs/ablations --seeds 3 --steps 450 --jobs 2         # hours; the same command continues and prints

One process a run, `--jobs` at a time, each with one thread. Table: weighted F1 of the zero-shot protocol on held-out slides (patches; the
diagnosis of whole bags, levels merged), mean recall of retrieval, mean over the seeds and their range.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train

CHANGES = {"all": [], **{f"no_{loss}": [f"--{loss}", "0"] for loss in reversed(train.LOSSES)},
           "random": ["--mrtva_pairs", "random"], "momentum": ["--alpha", "0.4", "--queue", "4096"], "bagneg": ["--cvta_negatives", "bag"],
           "ema": ["--cvta_select", "ema"], "own": ["--cvta_select", "own"]}


def numbers(run):
    """results.json of a run -> {column: number}."""
    r = json.loads((run / "results.json").read_text())
    f1 = lambda task, unit, at: r["zeroshot"][task]["ensemble"][unit][at]["f1"]
    return {"architecture 5x": f1("architecture", "patch", "5x"), "10x": f1("architecture", "patch", "10x"), "cytology 20x": f1("cytology", "patch", "20x"),
            "40x": f1("cytology", "patch", "40x"), "diagnosis merged": f1("diagnosis", "bag", "merged"), "retrieval": statistics.mean(m["mean"] for m in r["retrieval"].values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/ablations")
    parser.add_argument("--data", default=train.Config.data, help="the built-in world (made when it is not there)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", default="450")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default=",".join(CHANGES), help="of these changes (%(default)s)")
    args = parser.parse_args()
    train.make_world(args.data)

    def run(name, seed):
        folder = Path(args.out) / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "results.json").exists():
            with open(folder / "output.txt", "w") as out:
                command = [sys.executable, "train.py", "--data", args.data, "--out", folder, "--steps", args.steps, "--seed", str(seed), *CHANGES[name]]
                if subprocess.run(map(str, command), cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
                    print(f"{folder} failed: see its output.txt", file=sys.stderr)

    names = args.only.split(",")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job), [(name, seed) for seed in range(args.seeds) for name in names]))
    for i, name in enumerate(names):
        runs = [numbers(f) for seed in range(args.seeds) if (f := Path(args.out) / f"{name}-{seed}") and (f / "results.json").exists()]
        if i == 0 and runs:
            print("| | seeds | " + " | ".join(runs[0]) + " |\n|---" + "|---" * (len(runs[0]) + 1) + "|")
        if runs:
            cells = [[r[column] for r in runs] for column in runs[0]]
            print(f"| {name} | {len(runs)} | " + " | ".join(f"{statistics.mean(c):.3f} ({min(c):.2f}-{max(c):.2f})" for c in cells) + " |")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
