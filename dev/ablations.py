"""Print one table of the built-in world with each loss left out, over several seeds.

    for seed in 0 1 2; do for loss in none itc itm mlm plm cvta mrtva; do
        [ $loss = none ] && flag= || flag="--$loss 0"
        echo --out runs/ablations/without-$loss-$seed --seed $seed --steps 450 $flag
    done; done | OMP_NUM_THREADS=1 xargs -L 1 -P 2 python train.py                     # hours
    python -m dev.ablations runs/ablations

-P is the number of runs at a time; data/synthetic must be there. The folders are NAME-SEED, so add
any other changes as you like. Zero-shot numbers are weighted F1 on held-out slides, per patch; the
diagnosis is per bag, magnifications merged. Retrieval is the mean recall. A cell has the mean over
seeds and their range.
"""

import argparse
import json
import statistics
from pathlib import Path

import evaluate

COLUMNS = ("architecture 5x", "architecture 10x", "cytology 20x", "cytology 40x")


def numbers(path):
    """Read a number for each column from results.json of a run."""
    results, found = json.loads(path.read_text()), []
    for column in COLUMNS:
        fact, mag = column.split()
        found.append(results["zeroshot"][fact]["ensemble"]["patch"][mag]["f1"])
    found.append(results["zeroshot"]["diagnosis"]["ensemble"]["bag"]["merged"]["f1"])
    return [*found, statistics.mean(part["mean"] for part in results["retrieval"].values())]


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", metavar="RUNS", type=Path, help="folder of run folders")
    args = parser.parse_args()
    seeds = {}
    for path in sorted(args.folder.glob("*/finished")):
        name = path.parent.name.rpartition("-")[0]
        seeds.setdefault(name, []).append(numbers(path.with_name("results.json")))
    rows = []
    for name, found in seeds.items():
        cells = []
        for x in zip(*found, strict=True):
            cells.append(f"{statistics.mean(x):.2f} ({min(x):.2f}-{max(x):.2f})")
        rows.append([name, str(len(found)), *cells])
    columns = ["", "seeds", *COLUMNS, "diagnosis merged", "retrieval"]
    evaluate.print_table(f"finished runs in {args.folder}", columns, rows)


if __name__ == "__main__":
    main()
