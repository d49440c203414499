"""Look at a slide before it is tiled: what it holds in words, or its bags in a picture.

    python -m prepare.preview SLIDES             # levels, and which one each magnification reads
    python -m prepare.preview SLIDE --out PNG    # thumbnail, tissue, parents, and one bag

The picture shows glass dimmed, tissue outlined in green, and the parents numbered. Beside it, the
parent in orange is walked from 5x to 40x: a yellow frame marks the patch whose children follow.
"""

import argparse
import io
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import data
from prepare.slide import Slide, find_slides, mpp_table, thumbnail
from prepare.tile import choose_parents, remarks, tissue_mask

PANEL = 448
GAP = 6
TOP = 22


def describe(slide, fov_px):
    """Print what a slide holds, level by level, and the stored level of each magnification."""
    scale = f"{slide.mpp:g} um/px ({slide.mpp_source})"
    print(slide.path)
    print("  {} x {} pixels, {}, tiles of {} x {}".format(*slide.size, scale, *slide.tile))
    if slide.doubt:
        print(f"  in doubt: {slide.doubt}")
    for i, (d, (w, h)) in enumerate(slide.levels):
        print(f"  level {i}: {w} x {h}, downsample {d:g}, {slide.mpp * d:g} um/px")
    for mag in data.MAGS:
        downsample = data.mpp_of(mag) / slide.mpp
        i = slide.best_level(downsample)
        source = f"from level {i}, reduced {downsample / slide.levels[i][0]:.3g} times"
        if mag not in slide.mags:
            source = "not in this slide, its nodes are masked"
        print(f"  {mag:>2}x, {data.mpp_of(mag):g} um/px: {source}")
    nodes = int(data.valid_nodes(slide.mags, np.ones(data.NODES)).sum())
    print(f"  a bag: {nodes} of {data.NODES} nodes, {fov_px * data.mpp_of(5):g} um wide")


def describe_all(paths, mpps, fov_px):
    """Describe slides, with a scale each or None; one that cannot be read costs a sentence."""
    refused = 0
    for path in paths:
        try:
            with Slide(path, mpps[path.name]) as slide:
                describe(slide, fov_px)
        except ValueError as e:
            if len(paths) == 1:
                raise
            refused += 1
            print(e, file=sys.stderr)
    if refused:
        raise ValueError(f"{refused} of {len(paths)} slides cannot be used, see above")


def draw_slide(slide, bags, shown, fov_px):
    """Draw the thumbnail with tissue and parents -> PIL image."""
    scale = max(1, round(max(slide.size) / (2 * PANEL + TOP)))
    pixels = thumbnail(slide, scale)
    mask, step = tissue_mask(slide, min(8, fov_px / 16))
    # Enlarge the mask to the thumbnail.
    rows = np.minimum(np.arange(pixels.shape[0]) * scale // step, mask.shape[0] - 1)
    cols = np.minimum(np.arange(pixels.shape[1]) * scale // step, mask.shape[1] - 1)
    mask = mask[np.ix_(rows, cols)]
    # Dim the glass, and outline the tissue.
    inner = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(5))
    pixels[~mask] = pixels[~mask] * 0.75 + 15
    pixels[mask & (np.asarray(inner) == 0)] = (0, 140, 60)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for i, (x, y, side, _) in enumerate(bags):
        box = [x // scale, y // scale, (x + side) // scale, (y + side) // scale]
        draw.rectangle(box, outline="orange" if i == shown else "mediumblue", width=3)
        draw.text((box[0] + 7, box[1] + 5), str(i), "black", font_size=16)
    return image


def draw_bag(slide, bag, fov_px):
    """Draw one bag at four magnifications, down to where most tissue is -> PIL image."""
    x, y, side, tissue = bag
    image = Image.new("RGB", (2 * PANEL + GAP, 2 * (PANEL + TOP)), "white")
    draw = ImageDraw.Draw(image)
    node = 0
    nodes = [0]
    for level, mag in enumerate(data.MAGS):
        left = level % 2 * (PANEL + GAP)
        top = level // 2 * (PANEL + TOP) + TOP
        mpp = data.mpp_of(mag)
        title = f"{mag}x: {len(nodes)} of {4**level}, {mpp:g} um/px, {fov_px * mpp:g} um wide"
        if mag not in slide.mags:
            title += " - not in this slide"
            nodes = []
        draw.text((left, top - 17), title, "black", font_size=13)
        # 5x, 10x and 20x show the whole parent, 40x the four children of the patch before.
        cells = 2**level if level < 3 else 2
        cell = PANEL // cells
        chosen = max(range(4 * node + 1, 4 * node + 5), key=lambda n: tissue[n % data.NODES])
        for n in nodes:
            u = left + int(data.COL[n]) % cells * cell
            v = top + int(data.ROW[n]) % cells * cell
            patch = slide.read(*data.square(n, x, y, side), cell - 2)
            image.paste(Image.fromarray(patch), (u + 1, v + 1))
            if n == node and level < 3:
                draw.rectangle([u, v, u + cell - 1, v + cell - 1], outline="gold", width=3)
        nodes = np.flatnonzero(data.LEVEL == level + 1).tolist()
        if level == 2:
            nodes = range(4 * node + 1, 4 * node + 5)
        node = chosen
    return image


def draw_page(slide, fov_px, bags):
    """Put the slide and its bag of most tissue side by side -> PIL image."""
    shown = max(range(len(bags)), key=lambda i: bags[i][3][0], default=None)
    left = draw_slide(slide, bags, shown, fov_px)
    right = draw_bag(slide, bags[shown], fov_px) if bags else Image.new("RGB", (0, 0))
    size = (left.width + GAP + right.width, max(left.height, right.height) + TOP)
    page = Image.new("RGB", size, "white")
    page.paste(left, (0, TOP))
    page.paste(right, (left.width + GAP, 0))
    title = f"{slide.name}   {slide.mpp:g} um/px ({slide.mpp_source})   {len(bags)} parents"
    ImageDraw.Draw(page).text((4, 5), title, "black", font_size=13)
    return page


def main():
    parser = argparse.ArgumentParser(description="Look at a slide before it is tiled.")
    add = parser.add_argument
    add("slides", nargs="+", help="slide files or folders; --out draws one")
    add("--out", help="PNG to draw into; default: print what the slides hold")
    add("--mpp", help="microns per pixel, or a CSV of slide,mpp lines; default: what the files say")
    add("--fov-px", type=int, default=512, help="pixels a side of a parent at 5x: field of view")
    add("--parents", type=int, default=20, help="most 5x parents of a slide")
    add("--min-tissue", type=float, default=0.5, help="least tissue share of a parent")
    add("--seed", type=int, default=0, help="which parents are drawn")
    args = parser.parse_args()
    paths = find_slides(args.slides)
    mpps = mpp_table(args.mpp, [path.name for path in paths])
    if args.out is None:
        describe_all(paths, mpps, args.fov_px)
        return
    if len(paths) > 1:
        raise ValueError(f"--out draws one slide, not the {len(paths)} of {args.slides[0]}")
    with Slide(paths[0], mpps[paths[0].name]) as slide:
        shape = (args.fov_px, args.parents, args.min_tissue, args.seed)
        bags = choose_parents(slide, *shape)
        if remark := remarks(slide, bags, args.fov_px, args.min_tissue):
            print(f"{slide.path}: {remark}", file=sys.stderr)
        file = io.BytesIO()
        draw_page(slide, args.fov_px, bags).save(file, "PNG")
    data.write_whole(args.out, file.getvalue())
    print(f"wrote {args.out}: {len(bags)} parents")


if __name__ == "__main__":
    data.run_script(main, "nothing was written")
