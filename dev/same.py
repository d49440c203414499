"""Compare the weights of two runs, to see whether two versions compute the same.

    git worktree add /tmp/old REVISION
    export OMP_NUM_THREADS=1
    for version in /tmp/old .; do (cd $version
        python -m prepare.world data/same --train 6 --test 2 --words 2
        python train.py --data data/same --out runs/same --steps 20 --bags 8 --warmup 5 \\
            --eval_every 0 --workers 1 --device cpu); done
    python -m dev.same /tmp/old/runs/same runs/same

Tensors are compared in the order of the state dict, whatever their names. The table has the largest
difference of each part of the model.
"""

import sys

import evaluate


def weights(run):
    """Read the weights of a run -> {name: tensor}."""
    state, path = evaluate.read_checkpoint(run)
    if not state:
        raise ValueError(f"{run} holds no checkpoint: train there first")
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
    evaluate.print_table("weights of the two runs", columns, rows)


if __name__ == "__main__":
    try:
        old, new = sys.argv[1:]
        compare(weights(old), weights(new))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
