"""Segment pictures by text at each magnification and merged, and by a linear decoder of tokens.

    python -m prepare.world DIR --masks      # masks of the built-in world
    python -m protocols.segment MODEL --data DIR/slides/masks.csv --classes DIR/slides/tissue.json

MODEL as in protocols/peers.py. --data is a CSV with columns file,mask and perhaps split and
patient, slide or cluster: pictures or slides, and PNGs whose values are numbers of the classes in
the order of --classes; 255 does not count. Results: OUT/results.json and OUT/segments.png.

By text, windows of the tower's S pixels overlap by three quarters, and a point's score is the mean
over the windows that hold it. That is constant on squares of a quarter window, the cells, so maps
are computed on cells. The decoder is a logistic regression of the tower's patch tokens, whose
cells are the tokens' own squares, in folds by patient.

Shape letters: R pictures, h, w cells, C classes, H, W pixels of a mask, S pixels a side of a
window, D width of a token, d the shared space.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import evaluate
from prepare.slide import thumbnail
from protocols import heatmap, labelled, metrics, peers
from protocols.masks import (
    VOID,
    Cells,
    check_masks,
    confusion,
    label_map,
    open_picture,
    place_pixels,
    read_mask,
    read_windows,
    windows,
)

# ---- By text ------------------------------------------------------------------------------------


def score_cells(encode, vectors, picture, mag, S, cells=4):
    """Average the scores of the windows that hold each cell -> Cells of [h, w, C].

    encode: images [N, 3, S, S] -> unit vectors [N, d]; vectors [C, d] of the classes.
    """
    # Score each window once.
    side = S * data.mpp_of(mag) / picture.mpp
    across, down, (w, h), corner = windows(picture.size, side, cells)
    step = side / cells
    spots = [(corner[0] + x * step, corner[1] + y * step) for y in down for x in across]
    scores = [encode(images) @ vectors.T for images, _ in read_windows(picture, side, spots, S)]
    scores = torch.cat(scores).numpy().reshape(len(down), len(across), -1)
    total = np.zeros((h, w, len(vectors)))
    count = np.zeros((h, w, 1))
    # A window adds its score to each of its cells.
    for v in range(cells):
        for u in range(cells):
            total[v : v + len(down), u : u + len(across)] += scores
            count[v : v + len(down), u : u + len(across)] += 1
    return Cells(total / count, step, corner)


def score_picture(encode, vectors, path, S, mpp, keep):
    """Score a picture at its magnifications, or read the file `keep` -> {"5x": Cells, ...}."""
    if not keep.exists():
        found = {}
        with open_picture(path, mpp) as picture:
            for mag in picture.mags:
                cells = score_cells(encode, vectors, picture, mag, S)
                found[f"{mag}x"] = (torch.from_numpy(cells.values), cells.side, cells.corner)
        data.write_whole(keep, partial(torch.save, found))
    found = torch.load(keep, weights_only=True)
    return {mag: Cells(cells[0].numpy(), *cells[1:]) for mag, cells in found.items()}


def zeroshot(encode, vectors, pairs, S, mpp, folder):
    """Segment pairs [(picture, mask)] by text -> ({magnification: pixels [R, C, C]}, maps).

    pixels: confusion of truth and prediction, of a picture that has not a magnification 0; maps
    {title: label map} of the last picture. Merged sums the magnifications, each minus the mean
    score of a class over all pictures.
    """
    C = len(vectors)
    # Score all pictures; scores of files that have not changed are read again.
    scored = []
    for path, _ in tqdm(pairs, "by text", unit="picture", disable=None):
        stat = path.stat()
        told = [str(path), stat.st_size, stat.st_mtime_ns, mpp, vectors.tolist()]
        keep = Path(folder) / f"{path.stem}-{labelled.digest(told)}.pt"
        scored.append(score_picture(encode, vectors, path, S, mpp, keep))
    # Centre each magnification on all pictures, as evaluate.py merges bags.
    centre = {}
    for mag in evaluate.MAG_NAMES:
        means = [found[mag].values.mean((0, 1)) for found in scored if mag in found]
        if means:
            centre[mag] = np.mean(means, 0)
    pixels = {mag: np.zeros((len(pairs), C, C)) for mag in (*centre, "merged")}
    # Label the pixels of each picture, and compare them with its mask.
    for r, (path, mask) in enumerate(pairs):
        truth = read_mask(mask, C)
        with open_picture(path, mpp) as picture:
            size = picture.size
        layers = {mag: [cells] for mag, cells in scored[r].items()}
        layers["merged"] = [
            cells._replace(values=cells.values - centre[mag]) for mag, cells in scored[r].items()
        ]
        maps = {"truth": truth}
        for mag, several in layers.items():
            maps[mag] = label_map(several, size, truth.shape)
            pixels[mag][r] = confusion(truth, maps[mag], C)
    return pixels, maps


# ---- By a linear decoder ------------------------------------------------------------------------


@torch.no_grad()
def read_tokens(vision, picture, mag):
    """Read the patch tokens of windows side by side -> Cells of [h, w, D]."""
    S = vision.size
    g = vision.grid
    side = S * data.mpp_of(mag) / picture.mpp
    across, down, _, corner = windows(picture.size, side, 1)
    # Windows lie side by side, so each token is read once.
    spots = [(corner[0] + x * side, corner[1] + y * side) for y in down for x in across]
    device = next(vision.parameters(), torch.empty(0)).device
    parts = []
    for images, _ in read_windows(picture, side, spots, S):
        parts.append(vision(images.to(device))[:, 1:].float().cpu())
    # Put the g x g tokens of each window in its place.
    tokens = torch.cat(parts).reshape(len(down), len(across), g, g, -1).permute(0, 2, 1, 3, 4)
    tokens = tokens.reshape(len(down) * g, len(across) * g, -1)
    return Cells(tokens.numpy(), side / g, corner)


def label_cells(mask, size, cells, C):
    """Give each cell the class of most of its pixels -> int [h, w], -1 if none counts."""
    h, w = cells.values.shape[:2]
    rows, columns = place_pixels(mask.shape, size, cells)
    # Count the classes of the pixels in each cell.
    number = rows[:, None] * w + columns
    use = mask != VOID
    count = np.bincount(number[use] * C + mask[use], minlength=h * w * C).reshape(h, w, C)
    return np.where(count.any(-1), count.argmax(-1), -1)


def decode(vision, train, test, C, mag=20, mpp=None, most=20000, seed=0):
    """Learn a linear decoder from pairs `train` -> (pixels [R, C, C] of `test`, its last map).

    Of the training tokens at most `most` are used, as many of each picture.
    """
    # Collect tokens and their classes, so many that they fit into memory.
    rng = np.random.default_rng(seed)
    xs = []
    ys = []
    for path, mask in tqdm(train, f"learn at {mag}x", unit="picture", leave=False, disable=None):
        with open_picture(path, mpp) as picture:
            cells = read_tokens(vision, picture, mag)
            y = label_cells(read_mask(mask, C), picture.size, cells, C)
        rows, columns = rng.permutation(np.argwhere(y >= 0))[: max(1, most // len(train))].T
        xs.append(cells.values[rows, columns])
        ys.append(y[rows, columns])
    # Fit the probe of evaluate.py on them.
    weight, bias = evaluate.fit_logistic(np.concatenate(xs), np.concatenate(ys), C)
    found = []
    # Each token paints its own square.
    for path, mask in tqdm(test, f"decode at {mag}x", unit="picture", leave=False, disable=None):
        truth = read_mask(mask, C)
        with open_picture(path, mpp) as picture:
            cells = read_tokens(vision, picture, mag)
            scores = (torch.from_numpy(cells.values).double() @ weight.T + bias).numpy()
            last = label_map([cells._replace(values=scores)], picture.size, truth.shape)
        found.append(confusion(truth, last, C))
    return np.stack(found), last


def decode_folds(vision, pairs, C, found, args):
    """Run `decode` over metrics.splits -> (pixels [R, C, C], their row numbers [R], a map).

    The map is of the last picture that is measured.
    """
    who = found.who()
    folds = min(args.folds, len(set(who)))
    shown = np.flatnonzero(found.held_out())[-1]
    pixels = []
    order = []
    shown_map = None
    # The folds are dealt as if all pictures had one class.
    for rows in metrics.splits(np.zeros(len(pairs), int), who, found.split, folds):
        learn, held = ([pairs[i] for i in part] for part in rows)
        measured, last = decode(vision, learn, held, C, args.level, args.mpp)
        pixels.append(measured)
        order.append(rows[1])
        if rows[1][-1] == shown:
            shown_map = last
    return np.concatenate(pixels), np.concatenate(order), shown_map


# ---- Results ------------------------------------------------------------------------------------


def summarise(pixels, names, groups):
    """Compute Dice over all pixels of pictures -> scores, with an interval over groups [R].

    pixels [R, C, C]. "dice" is the mean over the classes that occur, "dice NAME" of one class.
    """
    # Draw whole groups: pictures of a patient are not independent.
    group, drawn = evaluate.resamples(groups)
    sums = np.zeros((drawn.shape[1], *pixels.shape[1:]))
    np.add.at(sums, group, pixels)
    row = {"n": int((pixels.sum((1, 2)) > 0).sum()), "groups": drawn.shape[1], "interval": {}}
    each = metrics.dice(pixels.sum(0))  # [C]
    samples = metrics.dice(np.tensordot(drawn, sums, 1))  # [times, C]
    for name, value, drawn_values in (
        ("dice", mean_known(each), mean_known(samples)),
        *zip([f"dice {name}" for name in names], each, samples.T, strict=True),
    ):
        row[name] = float(value)
        row["interval"][name] = evaluate.interval(drawn_values)
    return row


def mean_known(values):
    """Average the last axis without NaN."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)


def draw_maps(path, maps, names, mpp=None, width=250):
    """Draw a picture and its label maps {title: [H, W]} beside it -> PIL image; VOID is white."""
    with open_picture(path, mpp) as picture:
        thumb = thumbnail(picture, max(1, round(max(picture.size) / width)))
    # Give numbers their colours; pixels that do not count stay white.
    palette = [heatmap.class_colour(c) for c in range(len(names))]
    palette = np.array([*palette, (255, 255, 255)], np.uint8)
    panels = [(Image.fromarray(thumb), Path(path).name)]
    for title, labels in maps.items():
        drawn = Image.fromarray(palette[np.minimum(labels, len(names))])
        panels.append((drawn.resize(thumb.shape[1::-1], Image.NEAREST), title))
    page = heatmap.side_by_side(panels)
    image, draw = heatmap.blank(page.width, page.height + 22)
    image.paste(page, (0, 0))
    # Write the legend below.
    left = 4
    for c, name in enumerate(names):
        draw.rectangle([left, page.height + 6, left + 10, page.height + 16], fill=tuple(palette[c]))
        draw.text((left + 14, page.height + 3), name, "black", font_size=12)
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
    C = len(classes)
    pairs = list(zip(found.files, found.masks, strict=True))
    # A wrong mask should be told now, not after hours.
    check_masks(pairs, C, args.mpp)
    peer = peers.load(args, "cuda" if torch.cuda.is_available() else "cpu")
    out = labelled.results_folder(args, peer, found)
    who = found.who()
    split = labelled.describe_split(found)
    test = np.flatnonzero(found.held_out())
    rows = {}
    maps = {}
    if peer.tokenizer:

        def encode(images):
            return evaluate.embed_images(peer.model, images)["image_embedding"]

        vectors = evaluate.class_vectors(peer.model, peer.tokenizer, classes.values(), templates)
        held, S = [pairs[i] for i in test], peer.model.vision.size
        folder = out / "features" / peer.fingerprint
        pixels, maps = zeroshot(encode, vectors, held, S, args.mpp, folder)
        rows["by text"] = {mag: summarise(m, names, who[test]) for mag, m in pixels.items()}
    # The decoder needs others to learn from.
    if len(set(who)) > 1:
        pixels, order, last = decode_folds(peer.model.vision, pairs, C, found, args)
        rows["decoder"] = {f"{args.level}x": summarise(pixels, names, who[order])}
        maps[f"decoder, {args.level}x"] = last
    about = labelled.about_pictures(peer, found)
    about |= {"n": len(test), "split": split, "mpp": args.mpp}
    about["prompts"] = {"classes": classes, "templates": templates}
    evaluate.save_results(out, "segment", {found.name: rows}, about)
    heatmap.save(draw_maps(pairs[test[-1]][0], maps, names, args.mpp), out / "segments.png")
    columns = ["dice", *(f"dice {name}" for name in names)]
    for way, several in rows.items():
        labelled.print_rows(f"{found.name}, {way}", several, columns)
    print(f"\nwrote {out}/results.json and segments.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped: what was read by text is kept; repeat the command", file=sys.stderr)
        sys.exit(130)
