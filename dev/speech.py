"""Count the captions of a run: do they follow the picture?

    python -m dev.speech look runs/synthetic --data data/synthetic/test

    python -m prepare.world data/heart --train 2 --test 1
    python train.py --data data/heart --out runs/heart --bags 8 --pairs 4 --jitter 0 --steps 8000 \\
        --flips false --itc 0 --itm 0 --mlm 0 --cvta 0 --mrtva 0 --eval_every 0         # hours
    python -m dev.speech heart runs/heart --data data/heart/train

`look` captions held-out tumour patches of the built-in world, one of each magnification of every
sixth bag. It counts the captions that name an architecture (5x, 10x) or a cytology (20x, 40x), and
those that name the right one. It also says how much worse the true caption is predicted from the
picture of another bag. About zero means that the captions do not look.

`heart` captions every patch of a run that knows two slides by heart. It counts captions with the
right facts, in whatever wording, and those equal in every word.
"""

import argparse
from collections import Counter

import torch

import data
import evaluate
import losses
import model as networks
import text
from prepare.world import ALL_DIAGNOSES, FAMILIES, WORDS
from protocols.caption import describe

# The node that is read of a bag, one of each magnification, and the fact that can be seen there.
NODES = {0: "architecture", 2: "architecture", 10: "cytology", 40: "cytology"}


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
    asked = torch.ones(len(ids), dtype=torch.bool)
    return losses.plm(model.lm_logits(fused), ids, prefix, real, asked).item()


def look(model, tokenizer, bags):
    """Print a row a magnification, and how often the most frequent caption was said."""
    stored, truth = text.Captions(bags.folder), text.read_truth(bags.shards)
    said, rows = Counter(), []
    for mag, (node, fact) in zip(data.MAGS, NODES.items(), strict=True):
        chosen = [i for i in range(2, len(bags), 6) if bags.valid[i, node]]
        if len(chosen) < 2 or not truth:
            raise ValueError(f"{bags.folder} has few bags or no truth: make them by prepare.world")
        images = torch.stack([data.pyramid(bags[i]["image"][None])[0, node] for i in chosen])
        patches, naming, right = 0, 0, 0
        for i, caption in zip(chosen, describe(model, tokenizer, images), strict=True):
            known = truth[bags.keys[i]][node][fact]
            # Count tumour patches only: elsewhere there is no such fact.
            if known:
                names = named(caption, tokenizer) & set(FAMILIES[fact])
                said[caption] += 1
                patches += 1
                naming += bool(names)
                right += known in names
        captions = [stored[bags.keys[i]][node] for i in chosen]
        own = caption_loss(model, tokenizer, images, captions)
        other = caption_loss(model, tokenizer, images.roll(1, 0), captions)
        counts = [str(patches), str(naming), str(right)]
        rows.append([f"{mag}x", *counts, f"{own:.2f}", f"{other - own:+.2f}"])
    columns = ["", "tumour patches", "name the fact", "rightly", "PLM", "with another picture"]
    evaluate.print_table("captions of held-out patches", columns, rows)
    print(f"{len(said)} different captions; the most frequent: {said.most_common(1)}")


def heart(model, tokenizer, bags):
    """Caption every patch, print the captions that are wrong and count all."""
    stored, count = text.Captions(bags.folder), Counter()
    for i, key in enumerate(bags.keys):
        told = describe(model, tokenizer, data.pyramid(bags[i]["image"][None])[0])
        for node in bags.valid[i].nonzero()[:, 0].tolist():
            shown, says = spell(stored[key][node], tokenizer), told[node]
            right = named(says, tokenizer) == named(shown, tokenizer)
            count.update(captions=1, right=right, equal=says == shown)
            if not right:
                print(f"bag {i} node {node}\n    shown {shown}\n    says  {says}")
    print(
        f"{len(bags)} bags, {count['captions']} captions: facts right in {count['right']}, ", end=""
    )
    print(f"every word in {count['equal']}")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("command", choices=("look", "heart"))
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--data", default="data/synthetic/test", help="shards (%(default)s)")
    args = parser.parse_args()
    count = look if args.command == "look" else heart
    count(*evaluate.load_run(args.run), data.Bags(args.data))


if __name__ == "__main__":
    data.run_script(main)
