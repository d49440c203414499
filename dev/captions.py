"""Do a run's captions follow the picture? On held-out patches of the built-in world: how many name an architecture (5x, 10x) or a cytology (20x, 40x), and
how many name the right one.

    python dev/captions.py runs/synthetic data/synthetic/test                       half a minute

One node of each magnification of every sixth bag, greedy captions; a patch counts where it is tumour.
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import subjects
import synthetic
from overfit import facts

FAMILIES = {"architecture": set(synthetic.ARCHITECTURES), "cytology": set(synthetic.CYTOLOGIES)}
NODES = {0: ("5x", "architecture"), 2: ("10x", "architecture"), 10: ("20x", "cytology"), 40: ("40x", "cytology")}


def count(run, folder):
    """-> {magnification: [patches, captions that name a fact of the family, captions that name the right one]} and all captions, counted."""
    (net, tokenizer), bags = subjects.load_run(run), subjects.open_bags(folder)
    found, captions = {magnification: [0, 0, 0] for magnification, _ in NODES.values()}, Counter()
    for i in range(2, len(bags), 6):
        patches = data.pyramid(bags[i]["image"][None])[0]                              # [85, 3, S, S]
        for node, (magnification, fact) in NODES.items():
            if truth := bags.truth(i)[node][fact]:
                caption = net.caption(patches[node : node + 1], tokenizer=tokenizer)[0]
                named = facts(caption, tokenizer) & FAMILIES[fact]
                captions[caption] += 1
                for column, yes in enumerate((True, bool(named), truth in named)):
                    found[magnification][column] += yes
    return found, captions


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: captions.py RUN SHARDS: a run of the built-in world, and its test shards")
    try:
        found, captions = count(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for magnification, (patches, named, right) in found.items():
        print(f"{magnification:>4}: {patches} patches, {named} captions name the fact, {right} of them rightly")
    print(f"{len(captions)} different captions; the most frequent, {captions.most_common(1)[0][1]} times: {captions.most_common(1)[0][0]}")
