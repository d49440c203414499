"""Measure how much each magnification tells a small supervised network about the built-in world.

    python -m dev.leaks data/synthetic/train --steps 300       # minutes

One network a fact and magnification learns from clean labels: the tumour patches of three quarters
of the slides. The rest tests it, as balanced accuracy. Architecture should be read at 5x and 10x
and stay below .35 at 20x and 40x (chance .20). Cytology should be read at 20x and 40x and stay
below .40 at 5x and 10x (chance .25). This reader is stronger than any model that the project
trains. So what it cannot read is not there to be read. Results by date are in dev/LOG.md.
"""

import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import text

# Tumour patches of a bag that are used at one magnification.
PER_BAG = 16


def load(folder, level):
    """Cut tumour patches of one node level -> uint8 [R, 3, S, S], their truths, slides [R]."""
    bags, rng = data.Bags(folder), np.random.default_rng(0)
    truth = text.read_truth(bags.shards)
    if not truth:
        raise ValueError(f"{folder} holds no truth: make it by prepare.world")
    patches, truths, slides = [], [], []
    for i, key in enumerate(bags.keys):
        at_level = np.flatnonzero(data.LEVEL == level)
        tumour = [node for node in at_level if truth[key][node]["cytology"]]
        chosen = rng.permutation(tumour)[:PER_BAG].astype(int)
        cut = data.pyramid(bags[i]["image"][None])[0, chosen]  # [n, 3, S, S]
        patches.append((cut * 255).round().to(torch.uint8))
        truths += [truth[key][node] for node in chosen]
        slides += [bags.slides[i]] * len(chosen)
    return torch.cat(patches), truths, np.array(slides)


class Reader(nn.Module):
    """Four convolutions, then the mean and the maximum of each channel: 0.1 M parameters."""

    def __init__(self, classes):
        super().__init__()
        layers, width = [], 3
        for wider, stride in ((24, 2), (48, 2), (64, 2), (96, 1)):
            layers += [nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider)]
            layers += [nn.ReLU()]
            width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        """Map images uint8 [B, 3, S, S] to logits [B, classes]."""
        x = images.float() / 255
        # Remove the brightness, which differs by slide and tells nothing.
        x = self.body((x - x.mean((1, 2, 3), keepdim=True)) / 0.2)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def read(patches, labels, slides, steps):
    """Train and test one reader -> its cell of the table (str)."""
    torch.manual_seed(0)
    # Hold out the last quarter. Any 20 consecutive slides hold each diagnosis once.
    order = np.unique(slides)
    test = torch.from_numpy(np.isin(slides, order[-max(1, len(order) // 4) :]))
    classes, y = np.unique(labels, return_inverse=True)
    y = torch.from_numpy(y)
    x_train, y_train = patches[~test], y[~test]
    net = Reader(len(classes))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x_train), (64,))
        # Turn and mirror the whole batch.
        x = data.flip(x_train[batch], torch.randint(8, (1,)))
        loss = F.cross_entropy(net(x), y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        guess = torch.cat([net(part).argmax(1) for part in patches[test].split(256)])
    right = guess == y[test]
    balanced = np.mean([right[y[test] == k].float().mean() for k in y[test].unique()])
    return f"{balanced:.2f} ({len(x_train)}/{len(right)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="SHARDS", help="shards with truth (prepare.world)")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    table = {"architecture": [], "cytology": []}
    for level in range(4):
        patches, truths, slides = load(args.folder, level)
        for fact, row in table.items():
            row.append(read(patches, [known[fact] for known in truths], slides, args.steps))
    columns = ["fact", *(f"{mag}x" for mag in data.MAGS)]
    rows = [[fact, *row] for fact, row in table.items()]
    evaluate.print_table("balanced accuracy (patches to train/test)", columns, rows)


if __name__ == "__main__":
    data.run_script(main)
