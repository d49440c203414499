"""Do a run's captions follow the picture? On held-out patches of the built-in world: how many name an architecture (5x, 10x) or a cytology (20x, 40x), how
many name the right one, and what the picture is worth: how much worse the true caption is predicted from the picture of another bag.

    python dev/captions.py runs/synthetic data/synthetic/test                       half a minute

One node of each magnification of every sixth bag. Captions are greedy; of facts a patch counts where it is tumour.
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import data
import losses
import model
import subjects
import synthetic
import text
from overfit import facts

FAMILIES = {"architecture": set(synthetic.ARCHITECTURES), "cytology": set(synthetic.CYTOLOGIES)}
NODES = {0: ("5x", "architecture"), 2: ("10x", "architecture"), 10: ("20x", "cytology"), 40: ("40x", "cytology")}


@torch.no_grad()
def plm(net, tokenizer, images, captions):
    """Prefix language modelling without a prefix: images [n, 3, S, S], their captions -> mean cross-entropy of a token."""
    ids = text.trim(tokenizer.batch(captions, len(net.text.pos)), tokenizer.end)                   # [n, T]
    real, start = model.text_valid(ids, tokenizer.end), torch.ones(len(ids), dtype=torch.long)
    fused = net.fuse_with_text(net.visual_tokens(net.see(images)), net.text(ids)[0], real, start)
    return losses.plm(net.lm_logits(fused), ids, start, real, real[:, 0]).item()


def count(net, tokenizer, bags):
    """-> {magnification: [patches, captions that name a fact of the family, captions that name the right one, PLM, PLM from another bag's patch]}, and
    all captions of facts, counted."""
    found, captions, some = {}, Counter(), range(2, len(bags), 6)
    pyramids = [data.pyramid(bags[i]["image"][None])[0] for i in some]                 # of each bag [85, 3, S, S]
    for node, (magnification, fact) in NODES.items():
        shown = [(i, p[node], bags.captions(i, [node])[0]) for i, p in zip(some, pyramids) if bags.valid[i, node]]
        images, told = torch.stack([p for _, p, _ in shown]), [c for *_, c in shown]
        true = [bags.truth(i)[node][fact] for i, *_ in shown]
        patches = [0, 0, 0]
        for said, truth in zip(net.caption(images, tokenizer=tokenizer), true):
            if truth:
                named = facts(said, tokenizer) & FAMILIES[fact]
                captions[said] += 1
                for column, yes in enumerate((True, bool(named), truth in named)):
                    patches[column] += yes
        found[magnification] = [*patches, plm(net, tokenizer, images, told), plm(net, tokenizer, images.roll(1, 0), told)]
    return found, captions


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: captions.py RUN SHARDS: a run of the built-in world, and its test shards")
    try:
        (net, tokenizer), bags = subjects.load_run(sys.argv[1]), subjects.open_bags(sys.argv[2])
        found, captions = count(net, tokenizer, bags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for magnification, (patches, named, right, own, other) in found.items():
        print(f"{magnification:>4}: {patches} tumour patches, {named} captions name the fact, {right} of them rightly; PLM {own:.2f}, with another picture {other - own:+.2f}")
    print(f"{len(captions)} different captions; the most frequent, {captions.most_common(1)[0][1]} times: {captions.most_common(1)[0][0]}")
