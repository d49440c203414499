"""Segment pictures by text at each magnification and merged, and by a linear decoder of tokens.

    python -m prepare.world DIR --masks      # masks of the built-in world
    python -m protocols.segment MODEL --data DIR/slides/masks.csv --classes DIR/slides/tissue.json

MODEL as in protocols/peers.py. --data is a CSV with columns file,mask and perhaps split and
patient, slide or cluster: pictures or slides, and PNGs whose values are numbers of the classes in
the order of --classes; 255 does not count. Results: OUT/results.json and OUT/segments.png.

By text, windows of the tower's S pixels overlap by three quarters, and a point's score is the mean
over the windows that hold it: constant on squares of a quarter window, the cells. The decoder is a
logistic regression of the tower's patch tokens, whose cells are their own squares.

Shape letters: R pictures, h, w cells, C classes, H, W pixels of a mask, D width of a token, d the
shared space.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import evaluate
from prepare.slide import thumbnail
from protocols import heatmap, labelled, masks, metrics, peers
from protocols.masks import Cells


# ---- By text ------------------------------------------------------------------------------------
def score_cells(encode, vectors, picture, mag, S, cells=4):
    """Average the scores of the windows that hold each cell -> Cells of [h, w, C].

    encode: images [N, 3, S, S] -> unit vectors [N, d]; vectors [C, d] of the classes.
    """
    found = masks.scan(picture, mag, S, lambda images: encode(images) @ vectors.T, cells)
    down, across, C = found.values.shape
    total = np.zeros((down + cells - 1, across + cells - 1, C))
    count = np.zeros((*total.shape[:2], 1))
    # A window adds its scores to each of its cells.
    for v in range(cells):
        for u in range(cells):
            total[v : v + down, u : u + across] += found.values
            count[v : v + down, u : u + across] += 1
    return found._replace(values=total / count)


def score_picture(encode, vectors, path, S, mpp, folder):
    """Score a picture at its magnifications -> {"5x": Cells, ...}, or read what `folder` kept."""
    stat = path.stat()
    told = [stat.st_size, stat.st_mtime_ns, str(path), mpp, vectors.tolist()]
    keep = Path(folder) / f"{path.stem}-{labelled.digest(told)}.pt"
    if not keep.exists():
        found = {}
        with masks.open_picture(path, mpp) as picture:
            for mag in picture.mags:
                values, *place = score_cells(encode, vectors, picture, mag, S)
                found[f"{mag}x"] = (torch.from_numpy(values), *place)
        data.write_whole(keep, partial(torch.save, found))
    found = torch.load(keep, weights_only=True)
    return {mag: Cells(values.numpy(), *place) for mag, (values, *place) in found.items()}


def zeroshot(encode, vectors, pairs, S, mpp, folder):
    """Segment pairs [(picture, mask)] by text -> ({magnification: confusion [R, C, C]}, maps).

    A magnification that a picture has not is 0. maps {title: label map} are of the last picture.
    """
    C = len(vectors)
    scored = []
    for path, _ in data.progress(pairs, "by text", unit="picture"):
        scored.append(score_picture(encode, vectors, path, S, mpp, folder))
    # To merge magnifications, centre each on all pictures, as evaluate.py does with bags.
    centre = {}
    for mag in evaluate.MAG_NAMES:
        means = [found[mag].values.mean((0, 1)) for found in scored if mag in found]
        if means:
            centre[mag] = np.mean(means, 0)
    pixels = {mag: np.zeros((len(pairs), C, C)) for mag in (*centre, "merged")}
    # Label the pixels of each picture, and compare them with its mask.
    for r, found in enumerate(scored):
        truth = masks.read_mask(pairs[r][1], C)
        layers = {mag: [cells] for mag, cells in found.items()} | {"merged": []}
        for mag, cells in found.items():
            layers["merged"].append(cells._replace(values=cells.values - centre[mag]))
        maps = {"truth": truth}
        for mag, several in layers.items():
            maps[mag], pixels[mag][r] = masks.label_pixels(several, truth, C)
    return pixels, maps


# ---- By a linear decoder ------------------------------------------------------------------------
@torch.no_grad()
def read_tokens(vision, path, mag, mpp=None):
    """Read the patch tokens of windows side by side -> Cells of [h, w, D]."""
    g = vision.grid
    device = next(vision.parameters(), torch.empty(0)).device
    # Windows lie side by side, so each token is read once.
    with masks.open_picture(path, mpp) as picture:
        found = masks.scan(picture, mag, vision.size, lambda x: vision(x.to(device))[:, 1:])
    # Put the g x g tokens of each window in its place.
    h, w = found.values.shape[:2]
    tokens = found.values.reshape(h, w, g, g, -1).swapaxes(1, 2).reshape(h * g, w * g, -1)
    return found._replace(values=tokens, side=found.side / g)


def decode(vision, pairs, folds, C, mag=20, mpp=None, most=20000, seed=0):
    """Learn a linear decoder in each fold -> (pixels [R, C, C], label map of the last one tested).

    folds: list of (train, test) numbers of pairs [(picture, mask)]; pixels of others are 0. Of the
    training tokens at most `most` are used, as many of each picture.
    """
    pixels = np.zeros((len(pairs), C, C))
    last = max(max(test) for _, test in folds)
    for train, test in folds:
        # Collect tokens and their classes, so many that they fit into memory.
        rng = np.random.default_rng(seed)
        xs, ys = [], []
        for r in data.progress(train, f"learn at {mag}x", unit="picture", leave=False):
            cells = read_tokens(vision, pairs[r][0], mag, mpp)
            y = masks.label_cells(masks.read_mask(pairs[r][1], C), cells, C)
            rows, columns = rng.permutation(np.argwhere(y >= 0))[: max(1, most // len(train))].T
            xs.append(cells.values[rows, columns])
            ys.append(y[rows, columns])
        # Fit the probe of evaluate.py on them; then each token paints its own square.
        weight, bias = evaluate.fit_logistic(np.concatenate(xs), np.concatenate(ys), C)
        for r in data.progress(test, f"decode at {mag}x", unit="picture", leave=False):
            truth = masks.read_mask(pairs[r][1], C)
            cells = read_tokens(vision, pairs[r][0], mag, mpp)
            scores = (torch.from_numpy(cells.values).double() @ weight.T + bias).numpy()
            found, pixels[r] = masks.label_pixels([cells._replace(values=scores)], truth, C)
            if r == last:
                shown = found
    return pixels, shown


# ---- Results ------------------------------------------------------------------------------------
def summarise(pixels, names, groups):
    """Compute Dice over all pixels of pictures -> scores, with an interval over groups [R].

    pixels [R, C, C]. "dice" is the mean over the classes that occur, "dice NAME" of one class.
    """
    # Draw whole groups: pictures of a patient are not independent.
    group, drawn = evaluate.resamples(groups)
    sums = np.zeros((drawn.shape[1], *pixels.shape[1:]))
    np.add.at(sums, group, pixels)
    # The first row is what was measured, the others are of the bootstrap.
    weights = np.concatenate([np.ones_like(drawn[:1]), drawn])
    each = metrics.dice(np.tensordot(weights, sums, 1))  # [1 + times, C]
    mean = np.ma.masked_invalid(each).mean(1).filled(np.nan)
    row = {"n": int((pixels.sum((1, 2)) > 0).sum()), "groups": len(sums), "interval": {}}
    columns = ["dice", *(f"dice {name}" for name in names)]
    for name, values in zip(columns, [mean, *each.T], strict=True):
        row[name] = float(values[0])
        row["interval"][name] = evaluate.interval(values[1:])
    return row


def draw_maps(path, maps, names, mpp=None, width=250):
    """Draw a picture and its label maps {title: [H, W]} beside it -> PIL image; VOID is white."""
    with masks.open_picture(path, mpp) as picture:
        thumb = Image.fromarray(thumbnail(picture, max(1, round(max(picture.size) / width))))
    colours = [heatmap.class_colour(c) for c in range(len(names))]
    palette = np.array([*colours, (255, 255, 255)], np.uint8)
    panels = [(thumb, Path(path).name)]
    for title, labels in maps.items():
        drawn = Image.fromarray(palette[np.minimum(labels, len(names))])
        panels.append((drawn.resize(thumb.size, Image.NEAREST), title))
    page = heatmap.side_by_side(panels)
    # Write the legend below.
    image, draw = heatmap.blank(page.width, page.height + 22)
    image.paste(page, (0, 0))
    left = 4
    for name, fill in zip(names, colours, strict=True):
        draw.rectangle([left, page.height + 6, left + 10, page.height + 16], fill=fill)
        draw.text((left + 14, page.height + 3), data.one_line(name), "black", font_size=12)
        left += 32 + heatmap.text_width(name, 12)
    return image


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    labelled.add_arguments(parser)
    parser.add_argument("--classes", required=True, help="JSON {class: [names]}, in mask order")
    parser.add_argument("--mpp", type=float, help="microns per pixel, where files do not say it")
    parser.add_argument("--level", type=int, default=20, choices=data.MAGS, help="of the decoder")
    args = parser.parse_args()
    found = labelled.read_pictures(args.data, args.train, args.group)
    if not found.masks:
        raise ValueError(f"{args.data} has no masks: give a CSV with columns file,mask")
    classes, templates = labelled.read_prompts(args.classes)
    names = list(classes)
    pairs = list(zip(found.files, found.masks, strict=True))
    # A wrong mask should be told now, not after hours.
    holds = masks.check_masks(pairs, names, args.mpp)
    peer = peers.load(args, "cuda" if torch.cuda.is_available() else "cpu")
    out = labelled.results_folder(args, peer, found)
    who = found.who()
    about = labelled.about_pictures(peer, found)
    about["split"] = labelled.describe_split(found, args.folds)
    test = np.flatnonzero(found.held_out())
    rows, maps = {}, {}
    if peer.tokenizer:

        def encode(images):
            return evaluate.embed_images(peer.model, images)["image_embedding"]

        vectors = evaluate.class_vectors(peer.model, peer.tokenizer, classes.values(), templates)
        place = (peer.model.vision.size, args.mpp, out / "features" / peer.fingerprint)
        pixels, maps = zeroshot(encode, vectors, [pairs[i] for i in test], *place)
        rows["by text"] = {mag: summarise(m, names, who[test]) for mag, m in pixels.items()}
    # The decoder needs others to learn from.
    if len(set(who)) > 1:
        # The folds are dealt as if all pictures had one class.
        folds = metrics.splits(np.zeros(len(pairs), int), who, found.split, args.folds)
        about["unlearned"] = metrics.find_unlearned(folds, holds, names)
        pixels, last = decode(peer.model.vision, pairs, folds, len(names), args.level, args.mpp)
        rows["decoder"] = {f"{args.level}x": summarise(pixels[test], names, who[test])}
        maps[f"decoder, {args.level}x"] = last
    about |= {"n": len(test), "mpp": args.mpp}
    about["prompts"] = {"classes": classes, "templates": templates}
    evaluate.save_results(out, "segment", {found.name: rows}, about)
    heatmap.save(draw_maps(pairs[test[-1]][0], maps, names, args.mpp), out / "segments.png")
    columns = ["dice", *(f"dice {name}" for name in names)]
    for way, several in rows.items():
        labelled.print_rows(f"{found.name}, {way}", several, columns)
    print(f"\nwrote {out}/results.json and segments.png")


if __name__ == "__main__":
    data.run_script(main, "what was read by text is kept; repeat the command")
