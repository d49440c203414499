"""Fine-tune a whole vision tower on labelled pictures, in folds or on the data's own split.

    python -m protocols.finetune MODEL --data index.csv --folds 5
    python -m protocols.finetune MODEL --data CRC-VAL-HE-7K --train NCT-CRC-HE-100K --epochs 10

MODEL and --data as in protocols/peers.py and labelled.py. A copy of the tower gets a linear head on
its class token. Each layer learns at 0.65 times the rate of the one above [1]. A fifth of the
training groups, or the data's own validation rows, say when to stop; the test rows never do.

[1] Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT (layer-wise decay of the rate).
"""

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
from protocols import embed, labelled, metrics, peers

PATIENCE = 6  # epochs without a better validation before training stops


def layer_groups(vision, head, lr, decay=0.65):
    """Group the parameters of a tower and its head for AdamW, by distance from the top [1].

    The head and the last norm learn at lr, each block at `decay` times the rate of the one above,
    the stem and the positions last. Vectors (norms, biases) and tokens get no weight decay.
    """
    depth = len(vision.blocks)
    groups = {}
    for name, p in [*vision.named_parameters(), *head.named_parameters("head")]:
        # CLIP's projection comes after the class token that is read.
        if name == "proj":
            continue
        # Find how many layers lie above.
        below = depth + 1
        if name.startswith(("head.", "norm.")):
            below = 0
        elif name.startswith("blocks."):
            below = depth - int(name.split(".")[1])
        decayed = p.dim() > 1 and name not in ("cls_token", "pos_embed")
        group = dict(params=[], lr=lr * decay**below, weight_decay=0.05 * decayed)
        groups.setdefault((below, decayed), group)["params"].append(p)
    return list(groups.values())


def classify(both, tiles, rows, augment=False):
    """Run [tower, head] on rows -> (numbers of those that can be read [R], logits [R, C])."""
    items = [(row, tiles[row]) for row in rows.tolist()]
    # A picture that cannot be read is the sentence that says why.
    items = [(row, item[0][0]) for row, item in items if not isinstance(item, str)]
    if not items:
        return np.zeros(0, int), torch.zeros(0, both[1].out_features)
    numbers, images = zip(*items, strict=True)
    images = torch.stack(images).float() / 255  # [R, 3, S, S]
    if augment:
        # Turn, mirror and stain each picture in its own way.
        images = data.flip(images, torch.randint(0, 8, (len(images),)))
        images = data.stain_jitter(images, 0.05, torch.rand(len(images), 2, 3))
    device = both[1].weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = both[1](both[0](images.to(device))[:, 0])
    return np.array(numbers), logits.float()


@torch.no_grad()
def predict(both, tiles, rows):
    """Predict rows -> numbers of those that can be read [R], their class probabilities [R, C]."""
    both.eval()
    parts = [classify(both, tiles, rows[i : i + 64]) for i in range(0, len(rows), 64)]
    numbers, logits = zip(*parts, strict=True)
    return np.concatenate(numbers), torch.cat([x.cpu() for x in logits]).softmax(1).numpy()


def fine_tune(vision, tiles, y, C, train, val, epochs=30, lr=1e-3, seed=0, batch=32):
    """Train a copy of a tower and a linear head -> ([tower, head], number of the best epoch).

    tiles: embed.Tiles; y [R]: classes; train, val: row numbers of different patients. AdamW, one
    epoch of warm-up, then a cosine. The best epoch has the best balanced accuracy on val.
    """
    torch.manual_seed(seed)
    device = next(vision.parameters()).device
    # Train a copy, with a head that starts at zero: all classes are equally likely.
    head = nn.Linear(vision.width, C).to(device)
    for p in head.parameters():
        nn.init.zeros_(p)
    both = nn.ModuleList([copy.deepcopy(vision).float().requires_grad_(True), head])
    optimizer = torch.optim.AdamW(layer_groups(*both, lr))
    steps = max(1, len(train) // batch)

    def rate(step):
        warmup = min(1, (step + 1) / steps)
        return warmup * (1 + math.cos(math.pi * min(1, step / (epochs * steps)))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    best, best_epoch = -1.0, 0
    bar = data.progress(range(1, epochs + 1), "fine-tune", unit="epoch", leave=False)
    for epoch in bar:
        both.train()
        order = np.random.default_rng([seed, epoch]).permutation(train)
        # Leave out a last batch that is smaller than the others.
        for start in range(0, max(1, len(order) // batch * batch), batch):
            numbers, logits = classify(both, tiles, order[start : start + batch], augment=True)
            if not len(numbers):
                continue
            loss = F.cross_entropy(logits, torch.as_tensor(y[numbers]).to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        # Keep the weights of the best epoch, and stop when none has been better for long.
        numbers, p = predict(both, tiles, val)
        found = evaluate.rates(evaluate.confusion(y[numbers], p.argmax(1), C))["balanced"]
        said = f"balanced accuracy on validation {found:.3f}, best {best:.3f}"
        bar.set_postfix_str(said, refresh=False)
        if found > best:
            best, best_epoch = found, epoch
            kept = copy.deepcopy(both.state_dict())
        if epoch - best_epoch >= PATIENCE:
            break
    if not best_epoch:
        raise ValueError("no validation picture can be read: fine-tuning cannot tell when to stop")
    both.load_state_dict(kept)
    return both, best_epoch


def choose_validation(y, who, split, train, seed=0):
    """Part the training rows -> (rows to learn from, rows that tell when to stop)."""
    val = split[train] == "val"
    if not val.any():
        groups = len(np.unique(who[train]))
        if groups < 2:
            raise ValueError("one group to learn from is too few: fine-tuning stops by another one")
        # The data have no validation rows: take a fifth of the groups.
        val = metrics.folds(y[train], who[train], min(5, groups), seed) == 0
    if val.all():
        raise ValueError("all training rows are validation rows: give rows of split train")
    return train[~val], train[val]


def tune(vision, tiles, y, C, who, split, folds=5, seed=0, **settings):
    """Fine-tune over metrics.splits -> (scores, best epoch of each fold).

    y [R]: classes; who [R]: groups; split [R]: "train", "val", "test" or "".
    """
    parts, epochs = [], []
    # Predict each row once, by a tower that has not seen its group.
    for train, test in metrics.splits(y, who, split, folds, seed):
        learn, stop = choose_validation(y, who, split, train, seed)
        both, epoch = fine_tune(vision, tiles, y, C, learn, stop, seed=seed, **settings)
        parts.append(predict(both, tiles, test))
        epochs.append(epoch)
    rows, p = map(np.concatenate, zip(*parts, strict=True))
    return metrics.scores(y[rows], p, C, who[rows]), epochs


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a vision tower on labelled pictures")
    labelled.add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=30, help="at most (30)")
    parser.add_argument("--lr", type=float, default=1e-3, help="rate of the head (1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, order and flips (0)")
    args = parser.parse_args()
    if args.epochs < 1 or args.folds < 2:
        raise ValueError("--epochs needs 1 or more, --folds 2 or more")
    found = labelled.read_pictures(args.data, args.train, args.group)
    classes, order = labelled.order_classes(found.labels or ())
    if len(classes) < 2:
        raise ValueError(f"{args.data} has {len(classes)} classes: fine-tuning tells two or more")
    peer = peers.load(args, "cuda" if torch.cuda.is_available() else "cpu")
    out = labelled.results_folder(args, peer, found)
    split = labelled.describe_split(found, args.folds)

    # Read the pictures anew in each epoch: they may not fit into memory.
    y = found.numbers(classes)
    tiles = embed.Tiles(found.files, peer.model.vision.size)
    parts = (y, len(classes), found.who(), found.split, args.folds, args.seed)
    row, epochs = tune(peer.model.vision, tiles, *parts, epochs=args.epochs, lr=args.lr)
    about = labelled.about_pictures(peer, found) | {"n": row["n"], "lr": args.lr, "seed": args.seed}
    about |= {"split": f"{split}; a fifth of the training groups to stop by", "epochs": epochs}
    about |= {"left_out": len(found) - row["n"], "classes": classes, "order": order}
    folds = metrics.splits(y, *parts[2:])
    about["unlearned"] = metrics.find_unlearned(folds, np.eye(len(classes))[y] > 0, classes)
    evaluate.save_results(out, "finetune", {found.name: {"whole": row}}, about)
    title = f"Fine-tuned on {found.name}, {split}, best epochs {epochs}"
    labelled.print_rows(title, {"whole": row})
    print(f"\nwrote {out}/results.json")


if __name__ == "__main__":
    data.run_script(main, "nothing was written")
