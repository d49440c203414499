"""Measure a model on labelled pictures: zero-shot, linear probe, few-shot, retrieval.

    python -m protocols.pictures MODEL --data CRC-VAL-HE-7K --train NCT-CRC-HE-100K
    python -m protocols.pictures MODEL --data index.csv --levels --mpp 0.5 --group patient

MODEL as in protocols/peers.py, --data as in protocols/labelled.py. --levels resamples each picture
to 5x, 10x, 20x and 40x, averages the features of the tiles of a magnification, and merges the four
zero-shot scores. Results: OUT/results.json and OUT/features. Without MODEL, --features FILE.npz
measures features made elsewhere (protocols/embed.py).

Shape letters: R pictures, L magnifications (1 without --levels), C classes, D width of a feature.

[1] Lu et al. 2024, CONCH (probe).   [2] Wang et al. 2019, SimpleShot (few-shot).
"""

import argparse

import numpy as np
import torch

import data
import evaluate
from protocols import embed, labelled, metrics, peers

SHOTS = (1, 2, 4, 8, 16)
FEATURES = {"backbone": "backbone", "projected": "image_embedding", "text_guided": "text_guided"}

# ---- Protocols ----------------------------------------------------------------------------------
# x [R, L, D] are features of pictures that can be read, `mags` the names of the L magnifications.


def zeroshot(peer, pictures, x, mags, mpp, classes, templates):
    """Measure zero-shot with and without ensemble -> {mode: {"picture": {magnification: scores}}}.

    Merged are the magnifications that the pictures have, not those that were merely enlarged,
    centred on the training rows, or on the rows themselves where there are none.
    """
    y, who, use = pictures.numbers(classes), pictures.who(), pictures.held_out()
    centre = use if use.all() else ~use
    scale = float(peer.model.itc_scale.detach().exp())
    found = {}
    for mode in ("ensemble", "single"):
        vectors = evaluate.class_vectors(
            peer.model, peer.tokenizer, classes.values(), templates, mode == "ensemble"
        )
        cosine = x @ vectors.numpy().T  # [R, L, C]
        columns = {mag: cosine[use, k] for k, mag in enumerate(mags)}
        if mpp:
            there = cosine[:, [mpp < 1.2 * data.mpp_of(mag) for mag in data.MAGS]]
            columns["merged"] = evaluate.merged_scores(there[use], there[centre])
        rows = {}
        for mag, s in columns.items():
            p = torch.from_numpy(scale * s).double().softmax(1).numpy()
            rows[mag] = metrics.scores(y[use], p, len(classes), who[use])
        found[mode] = {"picture": rows}
    return found


def prototypes(x0, y0, x1, C):
    """Predict x1 [R, D] by the nearest class mean of x0, centred and of length 1 [2] -> [R]."""
    # Centre both on the rows to learn from: all features share a large common part.
    unit = []
    for x in (x0, x1):
        x = x - x0.mean(0)
        unit.append(x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12))
    means = np.stack([unit[0][y0 == c].mean(0) for c in range(C)])  # [C, D]
    return (2 * unit[1] @ means.T - np.square(means).sum(1)).argmax(1)


def few_shot(x, y, C, train, test, draws=10):
    """Learn prototypes of k rows a class -> {k: mean balanced accuracy of draws, interval}."""
    found = {}
    # Leave out numbers of rows that not every class has.
    for k in SHOTS:
        if np.bincount(y[train], minlength=C).min() < k:
            break
        told = []
        for draw in range(draws):
            rng = np.random.default_rng([draw, k])
            rows = np.concatenate([rng.permutation(train[y[train] == c])[:k] for c in range(C)])
            p = prototypes(x[rows], y[rows], x[test], C)
            told.append(float(evaluate.rates(evaluate.confusion(y[test], p, C))["balanced"]))
        interval = {"balanced": evaluate.interval(told)}
        found[k] = {"balanced": np.mean(told), "std": np.std(told), "interval": interval}
    return found


def probe(pictures, classes, found, features, mags, folds):
    """Learn from labels -> (probe [1], few-shot: {feature: {magnification: ...}}, unlearned)."""
    y, who, C = pictures.numbers(classes), pictures.who(), len(classes)
    pairs = metrics.splits(y, who, pictures.split, folds)
    unlearned = metrics.find_unlearned(pairs, np.eye(C, dtype=bool)[y], classes)
    train, test = pairs[0]
    count = np.bincount(y[train], minlength=C)
    if count.min() < SHOTS[-1]:
        least = f"{classes[count.argmin()]} has {count.min()} rows to learn from"
        print(f"{least}: few-shot asks for no more, where it would for {SHOTS[-1]}")
    rows, few = {}, {}
    for name in features:
        x = found[FEATURES.get(name, "backbone")]
        title = f"{pictures.name}, {name}"
        for k, mag in enumerate(mags):
            row = metrics.linear_probe(x[:, k], y, C, who, pictures.split, folds)
            rows.setdefault(title, {})[mag] = row
            few.setdefault(title, {})[mag] = few_shot(x[:, k], y, C, train, test)
    return rows, few, unlearned


# ---- The command line ---------------------------------------------------------------------------
def find_prompts(peer, pictures, source):
    """Find names and templates of the classes, or None where there are none."""
    if not pictures.labels or not (peer.tokenizer or source):
        return None
    try:
        return labelled.read_prompts(source, set(pictures.labels))
    except ValueError as e:
        if source:
            raise
        print(f"no zero-shot: {e}")


def measure(peer, pictures, out, args):
    """Run every protocol that the pictures allow -> results.json in `out`, tables on the screen."""
    mpp = args.mpp if args.levels else None
    mags = evaluate.MAG_NAMES if mpp else ("whole",)
    features = args.features.split(",") if peer.model else ["features"]
    about = labelled.about_pictures(peer, pictures)
    split = labelled.describe_split(pictures, args.folds)
    if not peer.tokenizer:
        who = "a ViT" if peer.model else "a file of features"
        print(f"{peer.name}: {who} reads no text, so there is no zero-shot and no retrieval")
    prompts = find_prompts(peer, pictures, args.classes)
    names = prompts[0] if args.classes and prompts else None
    classes, order = labelled.order_classes(pictures.labels or (), names)
    if not (len(classes) > 1 or peer.tokenizer and (prompts or pictures.captions)):
        readable = f"nor names or captions that {peer.name} reads"
        raise ValueError(f"{pictures.name} has neither labels of two classes {readable}: give some")
    if len(classes) < 2:
        print(f"{pictures.name} has {len(classes)} classes: no linear probe, no few-shot")

    # Read the pictures once for all protocols; go on with those that can be read.
    if not peer.model:
        found = embed.match_features(args.features, pictures)
    else:
        found = embed.embed_pictures(peer, pictures, out, mpp, "text_guided" in features)
    kept = [row for row, ok in zip(pictures.rows, found["ok"], strict=True) if ok]
    about |= {"n": len(kept), "left_out": len(pictures) - len(kept), "mpp": mpp}
    if about["left_out"]:
        first = pictures.files[found["ok"].argmin()]
        print(
            f"{about['left_out']} of {len(pictures)} pictures have no features, the first {first}"
        )
    parted = not pictures.held_out().all()
    pictures = labelled.Pictures(pictures.name, pictures.by, kept)
    if parted and pictures.held_out().all():
        raise ValueError(f"{pictures.name} has no test or no training picture that can be read")
    use = np.flatnonzero(pictures.held_out())
    which = f"{len(use)} rows" if len(use) == len(kept) else f"{len(use)} test rows"
    v = found["image_embedding"]

    # Labels against the names of classes.
    if prompts and peer.tokenizer:
        rows = zeroshot(peer, pictures, v, mags, mpp, *prompts)
        told = {"split": which, "prompts": {"classes": prompts[0], "templates": prompts[1]}}
        evaluate.save_results(out, "zeroshot", {pictures.name: rows}, about | told)
        for mode, row in rows.items():
            labelled.print_rows(f"Zero-shot, {mode}, {which}", row["picture"])
    # Labels to learn from.
    if len(classes) > 1:
        rows, few, unlearned = probe(pictures, classes, found, features, mags, args.folds)
        told = about | {"classes": classes, "order": order, "unlearned": unlearned}
        both = {"split": split, "regularisation": "100 / (width x C)"}
        evaluate.save_results(out, "probe", rows, told | both)
        evaluate.save_results(out, "few_shot", few, told | {"split": f"{split}, the first fold"})
        for name in rows:
            labelled.print_rows(f"Linear probe on {name}, {split}", rows[name])
            for mag, shots in few[name].items():
                labelled.print_rows(f"Few-shot on {name}, {mag}, rows a class", shots, ["balanced"])
    # Pictures against their captions.
    if pictures.captions and peer.tokenizer:
        captions = [pictures.captions[i] for i in use]
        t = evaluate.embed_texts(peer.model, peer.tokenizer, captions).numpy()
        who = pictures.who()[use]
        rows = {m: evaluate.retrieval(v[use, k], t, captions, who) for k, m in enumerate(mags)}
        evaluate.save_results(out, "retrieval", rows, about | {"split": which})
        columns = ["image_to_text_R@1", "text_to_image_R@1", "chance_R@1", "mean"]
        labelled.print_rows(f"Retrieval, {which}", rows, columns)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    labelled.add_arguments(parser)
    parser.add_argument("--classes", help="name in prompts.json, or JSON {label: [names]}")
    parser.add_argument("--levels", action="store_true", help="at 5x, 10x, 20x, 40x and merged")
    parser.add_argument("--mpp", type=float, help="of --levels: microns per pixel of the pictures")
    parser.add_argument(
        "--features", default="backbone", help="{}, or FILE".format(",".join(FEATURES))
    )
    args = parser.parse_args()
    made = not set(args.features.split(",")) <= set(FEATURES)
    if made and (args.levels or args.clip or args.vit or args.model not in (None, "features")):
        state = f"--features {args.features} is none of {', '.join(FEATURES)}"
        raise ValueError(f"{state}; a file of features takes neither a model nor --levels")
    if args.levels != bool(args.mpp) or args.mpp and not 0 < args.mpp < 1.2 * data.mpp_of(5):
        raise ValueError("--levels needs --mpp, um per pixel, 0.25 (40x) to 2 (5x); or neither")
    pictures = labelled.read_pictures(args.data, args.train, args.group)
    if made:
        args.model, peer = None, embed.stand_in(args.features)
    else:
        peer = peers.load(args, "cuda" if torch.cuda.is_available() else "cpu")
    if "text_guided" in args.features.split(",") and not peer.keywords:
        raise ValueError(f"{peer.name} has no keywords.json: only a run has text_guided features")
    out = labelled.results_folder(args, peer, pictures)
    measure(peer, pictures, out, args)
    print(f"\nwrote {out}/results.json")


if __name__ == "__main__":
    data.run_script(main, "the features read so far are kept for the next call")
