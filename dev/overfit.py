"""Can the model say what it was shown? Train on the 8 bags of two built-in slides until it knows them by heart, then caption every patch.

    python dev/overfit.py --out runs/overfit --steps 8000

Facts of a caption are what it names of the built-in world, in whatever wording: both captions must name the same set, the ones told wrongly
and none that were left out. Words: both are the same letter for letter. No augmentation: a turned patch is another one to know by heart.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import subjects
import synthetic
import train


def spell(words, tokenizer):
    """Words as the tokenizer spells them, and a model's caption with it: "well - formed glands"."""
    return tokenizer.decode(tokenizer.encode(words))


def facts(caption, tokenizer):
    """The kinds and diagnoses of the built-in world that a caption, spelled by the tokenizer, names."""
    words = {**synthetic.WORDS, **{name: (name,) for name in synthetic.ALL_DIAGNOSES}}
    return {kind for kind, wordings in words.items() if any(spell(w, tokenizer) in caption for w in wordings)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/overfit")
    parser.add_argument("--steps", default="8000")
    args, more = parser.parse_known_args()                                             # the rest goes to train.py
    world = Path(args.out) / "world"
    train.make_world(world, train=2, test=1)
    train.main(["--data", str(world), "--out", args.out, "--steps", args.steps, "--bags", "8", "--pairs", "4", "--jitter", "0", "--turns", "false",
                "--itc", "0", "--itm", "0", "--mlm", "0", "--cvta", "0", "--mrtva", "0", "--evaluate", "false", "--eval_every", "0", *more])   # only what teaches it to speak
    bags, (model, tokenizer) = data.BagDataset(world / "train"), subjects.load_run(args.out)
    right = words = total = 0
    for i in range(len(bags)):
        patches, there = data.pyramid(bags[i]["image"][None])[0], bags[i]["valid"].tolist()
        for node, (said, told) in enumerate(zip(model.caption(patches, tokenizer=tokenizer), bags.captions(i))):
            if told and there[node]:
                told = spell(told, tokenizer)
                same = facts(said, tokenizer) == facts(told, tokenizer)
                right, words, total = right + same, words + (said == told), total + 1
                if not same or total % 60 == 0:
                    print(f"bag {i} node {node}: {'right' if same else 'WRONG'}\n    shown {told}\n    says  {said}")
    print(f"{len(bags)} bags, {total} captions: facts right in {right} ({right / total:.3f}), every word in {words} ({words / total:.3f})")


if __name__ == "__main__":
    main()
