"""Can the model say what it was shown? Train on the 8 bags of two built-in slides until it knows them by heart, then caption every patch.

    python dev/overfit.py --out runs/overfit --steps 1500

Facts of a caption are its keywords (text.py): both captions must name the same set. Words: both are the same letter for letter.
"""
import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import evaluate
import text
import train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/overfit")
    parser.add_argument("--steps", default="1500")
    args, more = parser.parse_known_args()                                             # the rest goes to train.py
    world = Path(args.out) / "world"
    train.make_world(world, train=2, test=1)
    train.main(["--data", str(world), "--out", args.out, "--steps", args.steps, "--bags", "8", "--children", "4", "--pairs", "16", "--jitter", "0",
                "--evaluate", "false", *more])
    bags, (model, tokenizer) = data.BagDataset(world / "train"), evaluate.load_run(args.out)
    facts = words = total = 0
    for i in range(len(bags)):
        patches, there = data.pyramid(bags[i]["image"][None])[0], bags[i]["valid"].tolist()
        for node, (said, told) in enumerate(zip(model.caption(patches, tokenizer=tokenizer), bags.captions(i))):
            if told and there[node]:
                plain = tokenizer.decode(tokenizer.encode(told))                       # as the tokenizer spells it
                same = {text.same(k) for k in text.keywords(said)} == {text.same(k) for k in text.keywords(plain)}
                facts, words, total = facts + same, words + (said == plain), total + 1
                if not same or total % 60 == 0:
                    print(f"bag {i} node {node}: {'right' if same else 'WRONG'}\n    shown {plain}\n    says  {said}")
    print(f"{len(bags)} bags, {total} captions: facts right in {facts} ({facts / total:.3f}), every word in {words} ({words / total:.3f})")


if __name__ == "__main__":
    main()
