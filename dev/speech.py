"""Count the captions of a run: do they follow the picture?

    python -m dev.speech look runs/synthetic --data data/synthetic/test     # half a minute
    python -m dev.speech heart --out runs/heart --steps 8000                # hours: overfit 8 bags

`look` captions held-out tumour patches of the built-in world, one of each magnification of every
sixth bag. It counts the captions that name an architecture (5x, 10x) or a cytology (20x, 40x), and
those that name the right one. It also says how much worse the true caption is predicted from the
picture of another bag. About zero means that the captions do not look.

`heart` trains on the bags of two slides until they are known by heart, then captions every patch.
It counts captions with the right facts, in whatever wording, and those equal in every word.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import evaluate
import model as networks
import text
import train
from prepare.world import ALL_DIAGNOSES, FAMILIES, WORDS, make_world
from protocols.caption import describe

# The node that is read of a bag, one of each magnification, and the fact that can be seen there.
NODES = {0: "architecture", 2: "architecture", 10: "cytology", 40: "cytology"}

# Flags of train.py that teach nothing but speech. No flips: a turned patch is another one to learn.
HEART = """--bags 8 --pairs 4 --jitter 0 --flips false --eval_every 0
--itc 0 --itm 0 --mlm 0 --cvta 0 --mrtva 0 --steps 8000""".split()


def spell(words, tokenizer):
    """Write words as the tokenizer and captions do: "well - formed glands"."""
    return tokenizer.decode(tokenizer.encode(words))


def named(caption, tokenizer):
    """Return the set of facts of the built-in world that a spelled caption names."""
    found = set()
    for fact, options in {**WORDS, **{name: (name,) for name in ALL_DIAGNOSES}}.items():
        if any(spell(option, tokenizer) in caption for option in options):
            found.add(fact)
    return found


@torch.no_grad()
def caption_loss(model, tokenizer, images, captions):
    """Predict captions from images [n, 3, S, S] alone -> mean cross-entropy of a token."""
    ids = text.trim(tokenizer.batch(captions, model.text.context), tokenizer.end)  # [n, T]
    real = networks.real_tokens(ids, tokenizer.end)  # [n, T]
    # Give the start token as prefix, so that every word has to be predicted.
    prefix = torch.ones(len(ids), dtype=torch.long)
    image_tokens = model.to_fusion(model.vision_tokens(images))
    fused = model.fuse_with_text(image_tokens, model.text(ids)[0], real, prefix)  # [n, T, D]
    logits = model.lm_logits(fused[:, :-1])  # [n, T - 1, vocab]
    asked = real[:, 1:]
    return F.cross_entropy(logits[asked], ids[:, 1:][asked]).item()


def collect(bags, node):
    """Gather one node of every sixth bag -> images [n, 3, S, S], captions, truths of the node."""
    stored = text.Captions(bags.folder)
    truth = data.read_truth(bags)
    chosen = [i for i in range(2, len(bags), 6) if bags.valid[i, node]]
    if len(chosen) < 2 or not truth:
        raise ValueError(f"{bags.folder} has too few bags with truth: make them by prepare.world")
    images = [data.pyramid(bags[i]["image"][None])[0, node] for i in chosen]
    captions = [stored[bags.keys[i]][node] for i in chosen]
    return torch.stack(images), captions, [truth[bags.keys[i]][node] for i in chosen]


def look(model, tokenizer, bags):
    """Print a row a magnification, and how often the most frequent caption was said."""
    said = Counter()
    rows = []
    for mag, (node, fact) in zip(data.MAGS, NODES.items(), strict=True):
        images, captions, facts = collect(bags, node)
        patches, naming, right = 0, 0, 0
        for caption, known in zip(describe(model, tokenizer, images), facts, strict=True):
            # Count tumour patches only: elsewhere there is no such fact.
            if known[fact]:
                names = named(caption, tokenizer) & set(FAMILIES[fact])
                said[caption] += 1
                patches += 1
                naming += bool(names)
                right += known[fact] in names
        own = caption_loss(model, tokenizer, images, captions)
        other = caption_loss(model, tokenizer, images.roll(1, 0), captions)
        counts = [str(patches), str(naming), str(right)]
        rows.append([f"{mag}x", *counts, f"{own:.2f}", f"{other - own:+.2f}"])
    columns = ["", "tumour patches", "name the fact", "rightly", "PLM", "with another picture"]
    evaluate.print_table("captions of held-out patches", columns, rows)
    print(f"{len(said)} different captions; the most frequent: {said.most_common(1)}")


def heart(out, flags):
    """Train on the bags of two slides, then print the captions that are wrong and count all."""
    world = Path(out) / "world"
    make_world(world, train=2, test=1)
    train.main(["--data", str(world), "--out", str(out), *HEART, *flags])
    bags = data.Bags(world / "train")
    stored = text.Captions(bags.folder)
    model, tokenizer = evaluate.load_run(out)
    facts_right, words_right, total = 0, 0, 0
    for i, key in enumerate(bags.keys):
        patches = data.pyramid(bags[i]["image"][None])[0]  # [85, 3, S, S]
        told = describe(model, tokenizer, patches)
        for node, shown in enumerate(stored[key]):
            if not shown or not bags.valid[i, node]:
                continue
            shown = spell(shown, tokenizer)
            right = named(told[node], tokenizer) == named(shown, tokenizer)
            total += 1
            facts_right += right
            words_right += told[node] == shown
            if not right:
                print(f"bag {i} node {node}\n    shown {shown}\n    says  {told[node]}")
    print(f"{len(bags)} bags, {total} captions: facts right in {facts_right}, ", end="")
    print(f"every word in {words_right}")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("look", help="caption held-out patches and count")
    watch.add_argument("run", metavar="RUN")
    watch.add_argument("--data", default="data/synthetic/test", help="shards (%(default)s)")
    learn = commands.add_parser("heart", help="overfit 8 bags; other flags go to train.py")
    learn.add_argument("--out", default="runs/heart")
    args, flags = parser.parse_known_args()
    if args.command == "heart":
        heart(args.out, flags)
    elif flags:
        parser.error(f"unknown arguments: {' '.join(flags)}")
    else:
        look(*evaluate.load_run(args.run), data.Bags(args.data))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
