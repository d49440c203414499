"""Bags and captions of PathGen-1.6M [1]: squares of TCGA slides that a model has described.

    python -m prepare.captions pathgen JSON --slides DIR --out DIR

JSON is PathGen's list [{"wsi_id", "position": [x, y], "caption", "file_id"}, ...], DIR the slides
of it that you have. Bags are placed around the squares, so that each square is a node of a bag.
Most nodes have no caption: train with --missing 1, or ask a model for the others.

Reference: [1] PathGen-1.6M, arXiv 2407.00203.
"""

import json
import math
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

import data
import text
from prepare.slide import Slide, bare, find_slides, mpp_table, slide_key
from prepare.tile import tissue_fraction, tissue_mask, write_bags

# A described square is so many pixels of the finest level wide.
SQUARE = 672


def clean_caption(said):
    """Put a caption on one line, without broken characters."""
    return " ".join(said.encode("utf-8", "replace").decode().split())


def write_lines(path, rows):
    """Write rows as JSON lines into a file that appears whole."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    data.write_whole(path, "".join(lines))


def read_list(path):
    """Read PathGen's list -> {slide without suffix: [(x, y, caption, file_id)]}."""
    try:
        slides = defaultdict(list)
        for _, row in text.read_lines(path):
            x, y = row["position"]
            square = (int(x), int(y), clean_caption(row["caption"]), row.get("file_id"))
            slides[bare(row["wsi_id"])].append(square)
        return slides
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as e:
        form = '[{"wsi_id", "position": [x, y], "caption", "file_id"}, ...]'
        raise ValueError(f"{path} is not PathGen's list {form} ({e!r}): fetch it again") from None


def place_bags(size, mpp, squares, fov_px):
    """Place bags around the squares on a slide -> [(x, y, side)], {(bag, node): caption, ...}.

    size: (width, height) of the slide; fov_px: pixels a side of a 5x parent.
    """
    side = 8 * round(fov_px * data.mpp_of(5) / mpp / 8)
    # Describe the nodes of that magnification whose patch is nearest to a square in width.
    level = min(range(4), key=lambda n: abs(math.log(side / 2**n / SQUARE)))
    cell = side // 2**level
    nodes = np.flatnonzero(data.LEVEL == level).tolist()
    node_at = {(data.COL[node], data.ROW[node]): node for node in nodes}
    # A new bag has its first square as the middle of a node, near the centre of the bag.
    to_corner = 2**level // 2 * cell + cell // 2
    bags = []
    best = {}
    for x, y, caption, file_id in sorted(squares, key=lambda square: square[:2]):
        # Skip a square whose centre lies outside the slide.
        x += SQUARE // 2
        y += SQUARE // 2
        if not (0 <= x < size[0] and 0 <= y < size[1]):
            continue
        # Take the first bag over the centre of the square, or place a new one.
        over = [0 <= x - left < side and 0 <= y - top < side for left, top, _ in bags]
        number = over.index(True) if any(over) else len(bags)
        if number == len(bags):
            bags.append((x - to_corner, y - to_corner, side))
        left, top, _ = bags[number]
        node = node_at[(x - left) // cell, (y - top) // cell]
        # Of several squares in a node, keep the one nearest to its middle.
        off = abs((x - left) % cell - cell // 2) + abs((y - top) % cell - cell // 2)
        if (number, node) not in best or off < best[number, node][0]:
            best[number, node] = (off, dict(node=node, caption=caption, file_id=file_id))
    return bags, {place: row for place, (_, row) in best.items()}


def make_shard(path, squares, out, mpp, settings):
    """Write shard, captions and index of a slide, unless it has them -> number of captions."""
    key = slide_key(path)
    index_path = out / f"bags-{key}.index.json"
    captions_path = out / f"bags-{key}.captions.jsonl"
    # The order of the list says nothing.
    settings = settings | dict(squares=zlib.crc32(repr(sorted(map(repr, squares))).encode()))
    if index_path.exists():
        if data.read_json(index_path)["settings"] != settings:
            made = f"{index_path} was made with other settings or another list"
            raise ValueError(f"{made}: choose another --out")
        # Others may have been asked for since.
        return captions_path.read_bytes().count(b'"source": "pathgen"')
    with Slide(path, mpp) as slide:
        bags, rows = place_bags(slide.size, slide.mpp, squares, settings["fov_px"])
        if not bags:
            raise ValueError(f"{path}: no square of the list lies on it: is it the same slide?")
        mask, scale = tissue_mask(slide, um=min(8, settings["fov_px"] / 16))
        squares = []
        for x, y, side in bags:
            places = np.broadcast_arrays(*data.square(np.arange(data.NODES), x, y, side))
            squares.append((x, y, side, tissue_fraction(mask, scale, *places)))
        index, shard = write_bags(slide, squares, settings)
    data.write_whole(out / f"bags-{key}.tar", shard)
    # A line tells a node of a bag.
    told = [(f"{key}-{number:02d}", rows[number, node]) for number, node in sorted(rows)]
    write_lines(captions_path, [dict(key=key, **row, source="pathgen") for key, row in told])
    # The index comes last: a slide that has one is done.
    data.write_whole(index_path, json.dumps(index))
    return len(rows)


def make_bags(source, slides, out, mpp=None, fov_px=SQUARE, patch_px=224):
    """Make shards and captions of the slides that are there, and print how many.

    With 672 pixels at 5x, a square is exactly a 40x patch of a 0.25 um/px slide.
    """
    wanted = read_list(source)
    paths = [path for path in find_slides(slides) if bare(path.name) in wanted]
    if not paths:
        raise ValueError(f"--slides has none of the {len(wanted)} slides of {source}: fetch some")
    mpps = mpp_table(mpp, [path.name for path in paths])
    settings = dict(fov_px=fov_px, patch_px=patch_px, quality=90, source="pathgen")
    captions = []
    squares = 0
    bar = data.progress(paths, "slides", unit="slide")
    for path in bar:
        its = wanted[bare(path.name)]
        try:
            captions.append(make_shard(path, its, Path(out), mpps[path.name], settings))
            squares += len(its)
        except ValueError as e:
            # One bad slide must not stop the others.
            bar.clear()
            print(e, file=sys.stderr)
    print(f"{sum(captions)} captions of {squares} squares on {len(captions)} slides")
    if len(wanted) > len(paths):
        print(f"{len(wanted) - len(paths)} slides of the list are not there")
    if len(captions) < len(paths):
        raise ValueError(f"{len(paths) - len(captions)} slides could not be used, see above")
