"""Train two versions for some steps on the same tiny world and compare their weights.

    git worktree add /tmp/old REVISION
    python -m dev.same /tmp/old .                          # 20 steps, after 2 of prepare.words
    python -m dev.same /tmp/old . --words 0 --steps 50 --flips false --bags 8

Each version makes its own world with its own code, then trains with one thread. All flags but
--words go to train.py of both. Tensors are compared in the order of the state dict, whatever their
names. The table has the largest difference of each part of the model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import evaluate

# A tiny run. Flags on the command line come later and win.
TINY = "--steps 20 --bags 8 --warmup 5 --eval_every 0 --device cpu --workers 1"


def call(folder, *command):
    """Run Python with `command` in `folder`. Raises ValueError with its last lines if it fails."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ValueError(f"python {' '.join(words[1:])} failed in {folder}:\n{said}")


def train_tiny(folder, work, words, flags):
    """Make the world in `work` and train -> the weights, {name: tensor}."""
    world = work / "world"
    call(folder, "-m", "prepare.world", world, "--train", 6, "--test", 2, "--words", words)
    call(folder, "train.py", "--data", world, "--out", work / "run", *TINY.split(), *flags)
    state = torch.load(work / "run" / "ckpt.pt", map_location="cpu", weights_only=True)
    # The heads of MRTVA lie beside the model.
    return state["model"] | {f"heads.{name}": x for name, x in state["heads"].items()}


def compare(old, new):
    """Print the largest difference of each part of the model, and where it is."""
    if [x.shape for x in old.values()] != [x.shape for x in new.values()]:
        raise ValueError("the networks of the two versions differ: compare versions of one shape")
    parts = {}
    for (name, x), y in zip(new.items(), old.values(), strict=True):
        difference = (x.double() - y.double()).abs().max().item()
        parts.setdefault(name.split(".")[0], []).append((difference, name))
    rows = []
    for part, found in parts.items():
        difference, name = max(found)
        rows.append([part, str(len(found)), f"{difference:.1e}", name])
    columns = ["part", "tensors", "largest difference", "where"]
    evaluate.print_table("weights of the two versions", columns, rows)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="folder of the old version")
    parser.add_argument("new", metavar="NEW", help="folder of the new version")
    parser.add_argument("--words", type=int, default=2, help="steps of prepare.words (%(default)s)")
    args, flags = parser.parse_known_args()
    weights = []
    with tempfile.TemporaryDirectory() as work:
        for name, folder in (("old", args.old), ("new", args.new)):
            print(f"training {folder}", flush=True)
            weights.append(train_tiny(folder, Path(work) / name, args.words, flags))
    compare(*weights)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
