"""Ask whole slides by text, and learn their classes.

    python -m protocols.slides MODEL SLIDE ... --classes NAME|JSON           # which class?
    python -m protocols.slides MODEL SLIDE ... --text "signet ring cells"    # where is it?
    python -m protocols.slides MODEL --data SHARDS --labels CSV [--classes NAME|JSON]
    python -m protocols.slides --features DIR --labels CSV

MODEL as in protocols/peers.py; --classes as in protocols/labelled.py. SLIDE is a file or a folder.

--classes pools the best patches of each class, MI-Zero [1], at each magnification and merged, into
OUT/slides.json. --text lists the places nearest to each text in OUT/places.json. Both draw a
heatmap and outlines for QuPath: OUT/SLIDE.classes.png and .geojson, or .text. A patch belongs to
the class or text whose cosine is furthest above its mean over the slide; the measurements in QuPath
tell how far. One text alone outlines the tenth of the patches that is nearest to it. A slide that
is done is skipped when the command is repeated; one that cannot be read is named and passed over.

--labels is a table slide,label[,patient], or CLAM's slide_id,label,case_id, of slides that
prepare.tile has tiled: MI-Zero, a probe of mean features and attention MIL (protocols/mil.py), in
folds by patient or learned on SHARDS/train and measured on SHARDS/test. Results go to
OUT/results.json, features to OUT/features. --features reads those in place of a model, or what
CLAM, TRIDENT and others wrote: a file a slide, .h5, .hdf5, .npz, .npy or .pt, with `features`
[n, D].

Shape letters: P parents (5x) of a slide, N = 85 nodes, C classes or texts.
[1] Lu et al. 2023, MI-Zero.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
from data import LEVEL
from evaluate import MAG_NAMES
from prepare.slide import Slide, find_slides, mpp_table
from prepare.tile import choose_parents
from protocols import embed, heatmap, labelled, mil, peers

SHOWN_J = 10  # the heatmap shows the merged class of the ten best patches


# ---- Scores of a slide: s [P, N, C] are cosines, NaN where there is no tissue -------------------
def above_mean(s, level):
    """Take off the mean of each class over the nodes of a level -> [P, N, C]."""
    return s - np.nanmean(s[:, LEVEL == level], (0, 1))


def label_nodes(s, level, share=0.1):
    """Choose the class to outline at each node -> int [P, N], -1 for none.

    s: of `above_mean`. Of several classes it is the best one; of a single one, it is the `share` of
    nodes with the highest scores.
    """
    use = ~np.isnan(s[..., 0]) & (LEVEL == level)
    labels = np.full(use.shape, -1)
    if use.any() and s.shape[2] > 1:
        labels[use] = s[use].argmax(-1)
    elif use.any():
        labels[use & (s[..., 0] >= np.quantile(s[use], 1 - share))] = 0
    return labels


def best_places(s, parents, level, texts, most=3):
    """List the patches nearest to each text -> {text: [{"x", "y", "side", "cosine"}]}."""
    places = {}
    for c, text in enumerate(texts):
        rows, nodes = np.nonzero((LEVEL == level) & ~np.isnan(s[..., c]))
        places[text] = []
        for k in np.argsort(-s[rows, nodes, c])[:most]:
            p, n = rows[k], int(nodes[k])
            x, y, side = data.square(n, *parents[p])
            places[text].append(dict(x=x, y=y, side=side, cosine=float(s[p, n, c])))
    return places


def name_scores(pooled, names):
    """Name the scores of mil.pool_slide -> {magnification or "merged": {j: {class: score}}}."""
    found = {}
    for j, x in pooled.items():
        # Without training slides there is nothing to centre the sum on.
        for mag, row in zip((*MAG_NAMES, "merged"), (*x, np.nansum(x, 0)), strict=True):
            if not np.isnan(row).any():
                found.setdefault(mag, {})[j] = dict(zip(names, row.tolist(), strict=True))
    return found


def score_slide(peer, slide, vectors, fov_px, min_tissue=0.1):
    """Compare every 5x square of a slide that has tissue with vectors [C, d] -> (parents, s)."""
    parents = choose_parents(slide, fov_px, 10**6, min_tissue)
    if not parents:
        look = f"look at it with `python -m prepare.preview {slide.path}`"
        raise ValueError(f"{slide.path} has no 5x square with tissue: {look}, or give --fov-px")
    valid = np.stack([data.valid_nodes(slide.mags, tissue) for *_, tissue in parents])  # [P, N]
    waiting, found = [], []
    for p, (x, y, side, _) in enumerate(
        data.progress(parents, slide.name, unit="bag", leave=False)
    ):
        image = torch.from_numpy(slide.read(x, y, side, 8 * peer.model.vision.size))
        patches = data.pyramid(image.permute(2, 0, 1)[None])[0]  # [N, 3, S, S]
        # Embed only nodes with tissue, of many parents at once, so that few batches are not full.
        waiting.append(patches[torch.from_numpy(valid[p])])
        if sum(map(len, waiting)) >= 512 or p == len(parents) - 1:
            v = evaluate.embed_images(peer.model, torch.cat(waiting))["image_embedding"]
            # Keep scores, not features: a slide has thousands of parents.
            found.append(v @ vectors.T)
            waiting = []
    s = np.full((*valid.shape, len(vectors)), np.nan, np.float32)
    s[valid] = torch.cat(found)
    return [parent[:3] for parent in parents], s


# ---- Slide files --------------------------------------------------------------------------------
def ask_slide(peer, path, mpp, vectors, names, args, out):
    """Ask one slide, draw its heatmap and outlines -> its record in slides.json or places.json."""
    level = MAG_NAMES.index(args.level)
    with Slide(path, mpp) as slide:
        if args.text and data.MAGS[level] not in slide.mags:
            raise ValueError(f"{path} holds no {args.level}: give a lower --level")
        parents, s = score_slide(peer, slide, vectors, args.fov_px or peer.model.vision.size)
        if args.text:
            end = "text"
            found = best_places(s, parents, level, names)
            panels = [(f"{x} at {args.level}", level, s[..., c]) for c, x in enumerate(names)]
        else:
            end = "classes"
            # Outline classes at the finest magnification that the slide holds, if not at --level.
            level = min(level, len(slide.mags) - 1)
            pooled = mil.pool_slide(s)
            found = name_scores(pooled, names)
            # Show the class of the merged scores at every magnification that the slide holds.
            best = int(np.nansum(pooled[SHOWN_J], 0).argmax())
            mags = enumerate(MAG_NAMES[: len(slide.mags)])
            panels = [(f"{names[best]} at {mag}", k, s[..., best]) for k, mag in mags]
        picture = heatmap.draw_heatmap(slide, parents, panels)
    # Write the record last, so that a slide that has one is done.
    above = above_mean(s, level)
    shapes = heatmap.geojson(parents, label_nodes(above, level), level, names, above)
    data.write_whole(out / f"{slide.name[:230]}.{end}.geojson", shapes)
    heatmap.save(picture, out / f"{slide.name[:230]}.{end}.png")
    return {"parents": len(parents), "found": found}


def print_slide(name, record, args):
    """Print what was found on a slide."""
    found = record["found"]
    if args.text:
        columns = ["nearest", "x", "y", "side", "cosine"]
        title = f"{name}, {args.level}, pixels of the finest level"
        rows = []
        for text, places in found.items():
            for x, y, side, cosine in map(dict.values, places):
                rows.append([text, str(x), str(y), str(side), f"{cosine:.3f}"])
    else:
        columns = ["", *(f"best {j}" for j in found["merged"])]
        title = f"{name}, {record['parents']} parents"
        rows = []
        for mag, tops in found.items():
            rows.append([mag, *(max(scores, key=scores.get) for scores in tops.values())])
    evaluate.print_table(title, columns, rows)


def ask_slides(peer, names, vectors, about, args, out):
    """Ask slide files one after the other; those that are done are not read again."""
    file = out / ("places.json" if args.text else "slides.json")
    # Read what an earlier call of the same model and settings has left.
    stored = data.read_json(file) if file.exists() else {"about": about}
    if stored["about"] != about:
        print(f"{file} is of another model or other settings: it is written anew")
        stored = {"about": about}
    records = stored.setdefault("slides", {})
    paths = find_slides(args.slides)
    mpps = mpp_table(args.mpp, [path.name for path in paths])
    failed = 0
    bar = data.progress(paths, "slides", unit="slide")
    for path in bar:
        name = path.name
        try:
            # A slide counts as done only while its file is the same.
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, mpps[name]]
            if records.get(name, {}).get("stamp") != stamp:
                record = ask_slide(peer, path, mpps[name], vectors, names, args, out)
                records[name] = {"stamp": stamp} | record
                data.write_whole(file, json.dumps(stored, indent=1))
            print_slide(name, records[name], args)
        except (ValueError, OSError) as e:
            # A bad file costs one slide.
            bar.clear()
            print(f"left out: {e}", file=sys.stderr)
            failed += 1
    print(f"\n{len(paths) - failed} slides: {file}, heatmaps and outlines beside it")
    if failed:
        raise ValueError(f"{failed} of {len(paths)} slides could not be read, see above")


# ---- The command line ---------------------------------------------------------------------------
def parse(argv=None):
    """Parse and check the command line -> namespace."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    peers.add_arguments(parser)
    add = parser.add_argument
    add("slides", nargs="*", metavar="SLIDE", help="slide files or folders of them")
    add("--classes", help="name in prompts.json, or JSON {label: [names]}")
    add("--text", nargs="+", help="texts to look for, each in quotes")
    add("--mpp", help="microns per pixel of the slides, or a CSV of slide,mpp")
    add("--fov-px", type=int, help="pixels a side of a 5x square (the tower's)")
    add("--level", default="20x", choices=MAG_NAMES, help="of outlines, --text")
    add("--data", help="instead of slides: shards that prepare.tile has made")
    add("--features", help="instead of a model and slides: folder with features of each slide")
    add("--labels", help="of --data, --features: CSV of slide,label[,patient]")
    add("--folds", type=int, default=5, help="of --labels (5)")
    add("--out", help="folder to write (RUN/slides or results/MODEL/slides)")
    args = parser.parse_intermixed_args(argv)
    # Of a model named by a flag, the first word is a slide already.
    if args.features:
        args.model = args.model or "features"
    if args.model and (args.clip or args.vit):
        args.slides.insert(0, args.model)
        args.model = None
    ways = [bool(x) for x in (args.slides, args.data, args.features)]
    if sum(ways) != 1 or bool(args.slides) == bool(args.labels):
        raise ValueError("give slide files, or --data SHARDS or --features DIR with --labels CSV")
    if args.slides and bool(args.classes) == bool(args.text):
        raise ValueError("slide files need --classes NAME|JSON (which class?) or --text (where?)")
    if args.text and not args.slides:
        raise ValueError("--text looks for places on slide files, not in shards: give the slides")
    if args.features and (args.classes or args.clip or args.vit or args.model != "features"):
        raise ValueError(
            "--features needs no model, and cannot be asked by --classes: leave it out"
        )
    if args.fov_px is not None and args.fov_px < 16 or args.folds < 2:
        raise ValueError("--fov-px needs 16 or more, --folds 2 or more")
    return args


def main():
    args = parse()
    # Read the small files first: an error in them should cost no minute.
    labels = mil.read_labels(args.labels) if args.labels else {}
    # A text to look for is a class of its own, without templates.
    classes, templates = {text: [text] for text in args.text or ()}, ["{}"]
    if args.classes:
        wanted = {label for label, _ in labels.values()}
        classes, templates = labelled.read_prompts(args.classes, wanted)
    if args.features:
        peer = embed.stand_in(args.features)
    else:
        peer = peers.load(args, "cuda" if torch.cuda.is_available() else "cpu")
    if classes and not peer.tokenizer:
        raise ValueError(f"{peer.name}: a ViT reads no text: give a run folder or --clip FILE")
    # Results of a run lie in its folder.
    own = args.model and args.model not in ("random", "features")
    folder = Path(args.model if own else f"results/{peer.name}")
    out = Path(args.out or folder / (Path(args.data).resolve().name if args.data else "slides"))
    vectors = None
    if classes:
        names = classes.values()
        vectors = evaluate.class_vectors(peer.model, peer.tokenizer, names, templates)
    about = {"model": peer.name, "fingerprint": peer.fingerprint}
    about["prompts"] = {"classes": classes, "templates": templates}
    if args.labels:
        listing = mil.list_features
        if args.data:
            listing = partial(mil.list_shards, mark=peer.fingerprint, folder=out / "features")
        source = Path(args.data or args.features)
        slides = mil.Slides(source, labels, listing)
        mil.measure_slides(slides, peer.model, source, classes, vectors, about, args.folds, out)
        return
    about |= {"level": args.level, "fov_px": args.fov_px}
    ask_slides(peer, list(classes), vectors, about, args, out)


if __name__ == "__main__":
    data.run_script(main, "slides that are done are kept; repeat the command")
