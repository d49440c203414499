"""
Does the built-in world need two magnifications? A small supervised network per magnification and fact answers.

    python synthetic.py data/slides --slides 200 --seed 0
    python data.py tile data/slides --out data/bags --patch-px 64 --fov-px 64
    python -c "import synthetic; synthetic.describe('data/bags', 'data/slides', 0)"
    python dev/leaks.py data/bags                                          a few minutes on two cores

It reads shards and their truth files, trains on the tumour nodes of three quarters of the slides, tests on the rest, and
prints balanced accuracy: architecture should be read at 5x and 10x and stay near chance (.20) at 20x and 40x, cytology
the other way round (chance .25). A supervised network is a stronger reader than any the project trains, so what it cannot
read is not there to be read. Results by date are in dev/LOG.md.
"""

import argparse
import io
import json
import multiprocessing
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

MAGNIFICATIONS = ("5x", "10x", "20x", "40x")
FACTS = ("architecture", "cytology")


def load(folder, level, per_bag, rng):
    """Tumour nodes of one level -> patches uint8 [N, 3, S, S], names of their facts {fact: [N]}, their slides [N]."""
    patches, slides, names = [], [], {fact: [] for fact in FACTS}
    first, k = (4**level - 1) // 3, 2**level
    for shard in sorted(Path(folder).glob("bags-*.tar")):
        truth = {}
        for line in shard.with_suffix(".truth.jsonl").read_text().splitlines():
            line = json.loads(line)
            if first <= line["node"] < 4 * first + 1 and line["cytology"]:
                truth.setdefault(line["key"], []).append(line)
        with tarfile.open(shard) as tar:
            for member in tar:
                nodes = truth.get(Path(member.name).stem) if member.name.endswith(".jpg") else None
                if not nodes:
                    continue
                image = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
                image = np.asarray(Image.fromarray(image).reduce(8 // k)) if k < 8 else image
                side = len(image) // k
                for i in rng.permutation(len(nodes))[:per_bag]:
                    row = col = 0  # the quadrants on the way down to the node are its base-4 digits
                    for digit in range(level - 1, -1, -1):
                        quadrant = (nodes[i]["node"] - first) // 4**digit % 4
                        row, col = 2 * row + quadrant // 2, 2 * col + quadrant % 2
                    patches.append(image[row * side : (row + 1) * side, col * side : (col + 1) * side])
                    slides.append(nodes[i]["slide"])
                    for fact in FACTS:
                        names[fact].append(nodes[i][fact])
    if not patches:
        raise ValueError(f"no tumour nodes with truth in {folder}: run synthetic.describe on it first")
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2), {f: np.array(v) for f, v in names.items()}, np.array(slides)


class Reader(nn.Module):
    """Four convolutions, then the mean and the maximum of each channel: 0.1 M parameters, blind to where things are."""

    def __init__(self, classes):
        super().__init__()
        widths, layers = (3, 24, 48, 64, 96), []
        for i, stride in enumerate((2, 2, 2, 1)):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(2 * widths[-1], classes)

    def forward(self, images):  # uint8 [B, 3, S, S] -> logits [B, classes]
        x = images.float() / 255
        x = (x - x.mean((1, 2, 3), keepdim=True)) / 0.2  # brightness differs per slide and tells nothing
        x = self.body(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def read(job):
    """Train and test one reader -> {steps: balanced accuracy} for some numbers of steps, and the numbers of patches."""
    folder, level, fact, steps, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    patches, names, slides = load(folder, level, 16, np.random.default_rng(seed))
    # any 20 consecutive slides hold each diagnosis once, so the last quarter is balanced where there are 80 or more
    order = np.unique(slides)
    test = torch.from_numpy(np.isin(slides, order[-max(1, len(order) // 4) :]))
    classes, y = np.unique(names[fact], return_inverse=True)
    y = torch.from_numpy(y)
    x_train, y_train, x_test, y_test = patches[~test], y[~test], patches[test], y[test]
    net, curve = Reader(len(classes)), {}
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x_train), (64,))
        x = torch.rot90(x_train[batch], int(torch.randint(4, ())), (2, 3))
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        loss = F.cross_entropy(net(x), y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (100, 200, steps):
            net.eval()
            with torch.no_grad():
                guess = torch.cat([net(part).argmax(1) for part in x_test.split(256)])
            net.train()
            curve[step] = float(np.mean([(guess[y_test == k] == k).float().mean() for k in y_test.unique()]))
    return curve, len(x_train), len(x_test)


def main():
    parser = argparse.ArgumentParser(description="Balanced accuracy of each fact at each magnification.")
    parser.add_argument("folder", help="shards with truth files")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [(args.folder, level, fact, args.steps, args.seed) for fact in FACTS for level in range(4)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        results = pool.map(read, jobs, chunksize=1)
    for part, fact in enumerate(FACTS):
        row = results[4 * part : 4 * part + 4]
        print(f"{fact:<14}" + "".join(f"{m:>8}" for m in MAGNIFICATIONS) + f"    (chance {1 / (5 - part):.2f})")
        for step in row[0][0]:
            print(f"  {step:>4} steps  " + "".join(f"{curve[step]:8.2f}" for curve, _, _ in row))
        print("  train/test  " + "".join(f"{f'{n}/{m}':>12}" for _, n, m in row))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
