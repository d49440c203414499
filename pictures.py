"""What a person looks at: heatmaps and outlines of a slide, the retrieval sheet, confusion matrices, bars per
magnification, projections.

Drawn with Pillow alone. Outlines are GeoJSON as QuPath imports it (drag the file onto the open slide): polygons in level-0 pixels.

Outline: colours | heatmap | outlines (GeoJSON) | retrieval sheet | confusion, bars, projection, labels over a picture.
Shape letters: Q queries or classes, P parents (5x) of a slide, N = 85 nodes, C classes, R rows, h, w cells of a grid.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data

MAG_NAMES = tuple(f"{m}x" for m in data.MAGS)
LEVEL = np.array([data.level(n) for n in range(data.NODES)])                           # [N] 0..3
CLASSES = ((31, 78, 156), (200, 80, 30), (42, 138, 74), (138, 61, 148), (190, 150, 30), (90, 90, 90), (40, 160, 170), (205, 60, 110), (120, 80, 50), (130, 170, 60))


def colour(x):
    """Values in [0, 1] -> uint8 [..., 3]: dark blue over green to yellow, readable in grey too."""
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
    at = np.clip(x, 0, 1)[..., None] * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    return (stops[low[..., 0]] * (1 - at + low) + stops[low[..., 0] + 1] * (at - low)).astype(np.uint8)


def class_colour(c):
    """A colour per class number; after ten they come again, darker."""
    return tuple(int(v * 0.65 ** (c // len(CLASSES))) for v in CLASSES[c % len(CLASSES)])


def page(width, height):
    """An empty white page and what draws on it."""
    image = Image.new("RGB", (int(width), int(height)), "white")
    return image, ImageDraw.Draw(image)


def short(text, width, size=13):
    """Text cut to a width in pixels."""
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    while len(text) > 4 and measure.textlength(text, font_size=size) > width:
        text = text[:-4] + "..." if not text.endswith("...") else text[:-5] + "..."
    return text


def side_by_side(boxes, foot=0):
    """[(PIL image, title)] of one height -> a page with each below its title, `foot` empty pixels below them, and what draws on it."""
    image, draw = page(sum(box.width + 8 for box, _ in boxes), boxes[0][0].height + 22 + foot)
    at = 0
    for box, title in boxes:
        image.paste(box, (at, 22))
        draw.text((at + 2, 4), short(title, box.width), "black", font_size=13)
        at += box.width + 8
    return image, draw


# ----------------------------------------------------------------------------------------------------------------------
# A slide

def heatmap(slide, parents, panels, out, width=460):
    """Thumbnail and maps beside it. parents: [(x, y, side)] of P bags; panels: [(title, level, values [P, N])], NaN where there is nothing to show;
    each map from its 5th percentile (dark) to its 95th (yellow) on this slide: what is compared is places, not slides."""
    scale = max(1, round(max(slide.size) / width))
    thumb = data.thumbnail(slide, scale)
    boxes = [(Image.fromarray(thumb), slide.name)]
    for title, lev, values in panels:
        m = np.full(thumb.shape[:2], np.nan)
        for (x, y, side), row in zip(parents, values):
            for n in range(data.NODES)[data.LEVELS[lev]]:
                nx, ny, ns = data.square(n, x, y, side)
                top, left, bottom, right = round(ny / scale), round(nx / scale), round((ny + ns) / scale), round((nx + ns) / scale)
                m[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)] = row[n]
        low, high = np.nanpercentile(m, [5, 95]) if not np.isnan(m).all() else (0, 1)
        tint = colour(np.nan_to_num((m - low) / max(high - low, 1e-6)))
        boxes.append((Image.fromarray(np.where(np.isnan(m)[..., None], thumb, (0.35 * thumb + 0.65 * tint).astype(np.uint8))), title))
    data.save_png(side_by_side(boxes)[0], out)


def outlines(mask):
    """Boundaries of the 4-connected regions of a bool grid [h, w] -> [[outer ring, hole, ...], ...], rings as closed lists of corners (x, y) in
    cells; outer rings clockwise on the screen, holes the other way. Regions that touch at a corner stay apart, and no ring meets itself."""
    h, w = mask.shape
    padded = np.pad(mask, 1)
    edges = {}                                                                         # corner -> [(next corner, cell inside)], the inside always on the right hand
    for y, x in np.argwhere(mask):
        for there, a, b in ((padded[y, x + 1], (x, y), (x + 1, y)), (padded[y + 1, x + 2], (x + 1, y), (x + 1, y + 1)),
                            (padded[y + 2, x + 1], (x + 1, y + 1), (x, y + 1)), (padded[y + 1, x], (x, y + 1), (x, y))):
            if not there:
                edges.setdefault(tuple(map(int, a)), []).append((tuple(map(int, b)), (int(y), int(x))))
    label, regions = np.full(mask.shape, -1), 0
    for start in np.argwhere(mask):
        if label[tuple(start)] < 0:
            stack = [tuple(start)]
            label[tuple(start)] = regions
            while stack:
                y, x = stack.pop()
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if 0 <= v < h and 0 <= u < w and mask[v, u] and label[v, u] < 0:
                        label[v, u] = regions
                        stack.append((v, u))
            regions += 1
    shapes = [[] for _ in range(regions)]
    while edges:
        corner = next(iter(edges))
        cell, ring, heading = edges[corner][0][1], [corner], None
        while True:
            choices = edges[corner]                                                    # two where regions touch: the right turn stays with our own cell
            k = 0 if len(choices) == 1 or heading is None else max(range(2), key=lambda k: heading[0] * (choices[k][0][1] - corner[1]) - heading[1] * (choices[k][0][0] - corner[0]))
            following, _ = choices.pop(k)
            if not choices:
                del edges[corner]
            step = (following[0] - corner[0], following[1] - corner[1])
            if step == heading:
                ring.pop()                                                             # straight on: no corner
            ring.append(following)
            corner, heading = following, step
            if corner == ring[0]:
                break
        for loop in _simple(ring):
            area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(loop, loop[1:]))
            shapes[label[cell]].insert(0 if area > 0 else len(shapes[label[cell]]), loop)
    return shapes


def _simple(ring):
    """A closed ring that touches itself at corners -> closed loops that do not: a bay that is shut at a corner is a hole, as GeoJSON wants it."""
    path, loops = [], []
    for corner in ring:
        if corner in path:
            at = path.index(corner)
            loops.append(path[at:] + [corner])
            path = path[:at]
        path.append(corner)
    return loops


def geojson(parents, labels, lev, names, out):
    """Regions of equal label as QuPath annotations: parents [(x, y, side)], labels int [P, N], class number or -1, of nodes of level `lev`; names of
    the classes -> a GeoJSON FeatureCollection of polygons in level-0 pixels, written to `out`; returns their number. All parents of a slide lie on
    one grid, so their nodes do."""
    x0, y0, side = min(x for x, _, _ in parents), min(y for _, y, _ in parents), parents[0][2]
    per = 2 ** lev
    across, down = (max(p[i] for p in parents) - o for i, o in ((0, x0), (1, y0)))
    grid = np.full(((down // side + 1) * per, (across // side + 1) * per), -1)
    for (x, y, _), row in zip(parents, labels):
        for n in range(data.NODES)[data.LEVELS[lev]]:
            _, r, c = data.place(n)
            grid[(y - y0) // side * per + r, (x - x0) // side * per + c] = row[n]
    features, cell = [], side / per
    for c, name in enumerate(names):
        for rings in outlines(grid == c):
            rings = [[[x0 + u * cell, y0 + v * cell] for u, v in ring] for ring in rings]
            features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings},
                             "properties": {"objectType": "annotation", "classification": {"name": name, "color": list(class_colour(c))}}})
    data.replace_file(Path(out), json.dumps({"type": "FeatureCollection", "features": features}))
    return len(features)


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval

def retrieval_sheet(bags, feats, queries, t, out, best=5, px=72, columns=3):
    """For each query text (a block), given as t [Q, d], the `best` patches of each magnification (a row), each from another slide if possible."""
    valid, left = feats["valid"].numpy(), 40
    block_w, block_h = left + best * (px + 3) + 14, 4 * (px + 3) + 26
    image, draw = page(columns * block_w, -(-len(queries) // columns) * block_h)
    for q, query in enumerate(queries):
        x0, y0 = q % columns * block_w, q // columns * block_h
        draw.text((x0 + 4, y0 + 4), short(query, block_w - 8, 14), "black", font_size=14)
        cos = (feats["v"] @ t[q]).numpy()                                              # [G, N]
        for lev, mag in enumerate(MAG_NAMES):
            draw.text((x0 + 6, y0 + 24 + lev * (px + 3) + px // 2 - 8), mag, "black", font_size=13)
            order = np.argsort(np.where(valid & (LEVEL == lev), -cos, np.inf), axis=None)
            seen, shown = set(), 0
            for flat in order[: 400]:
                g, n = divmod(int(flat), data.NODES)
                slide = bags.slides[feats["index"][g]]
                if slide in seen or not (valid[g, n] and LEVEL[n] == lev):
                    continue
                seen.add(slide)
                patch = data.pyramid(bags[feats["index"][g]]["image"][None])[0, n]
                tile = Image.fromarray((patch.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).resize((px, px), Image.BICUBIC)
                image.paste(tile, (x0 + left + shown * (px + 3), y0 + 24 + lev * (px + 3)))
                shown += 1
                if shown == best:
                    break
    data.save_png(image, out)


# ----------------------------------------------------------------------------------------------------------------------
# Charts

def confusion(m, names, out, title=""):
    """Confusion matrix [C, C]: rows are the truth, a cell's colour the share of its row, its number the count."""
    C, cell = len(m), 46 if len(m) <= 12 else 34
    left = 20 + int(max(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(n, font_size=12) for n in names))
    left = min(left, 190)
    image, draw = page(left + C * cell + 16, 48 + C * cell + 16 + 6 * min(18, max(map(len, names))))
    draw.text((6, 6), title, "black", font_size=14)
    draw.text((left, 26), "predicted", "gray", font_size=12)
    share = m / np.maximum(m.sum(1, keepdims=True), 1)
    tint = colour(share)
    for i in range(C):
        draw.text((left - 8, 44 + i * cell + cell // 2), short(names[i], left - 14, 12), "black", font_size=12, anchor="rm")
        for j in range(C):
            x, y = left + j * cell, 44 + i * cell
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=tuple(tint[i, j].tolist()))
            if m[i, j]:
                draw.text((x + cell // 2 - 1, y + cell // 2 - 1), str(int(m[i, j])), "black" if share[i, j] > 0.6 else "white", font_size=12 if cell > 40 else 10, anchor="mm")
        label, place = page(120, 16)
        place.text((119, 8), short(names[i], 116, 12), "black", font_size=12, anchor="rm")
        label = label.rotate(90, expand=True)
        image.paste(label.crop((0, 0, 16, min(120, image.height - 46 - C * cell))), (left + i * cell + cell // 2 - 9, 46 + C * cell))
    data.save_png(image, out)


def bars(table, out, title="", label="weighted F1"):
    """Grouped bars from 0 to 1: table {group: {bar: (value, low or None, high or None)}}, the same bars in every group, whiskers from low to high."""
    names = list(dict.fromkeys(b for row in table.values() for b in row))
    bar, gap, H, top = 26, 26, 190, 44
    width = lambda: len(names) * bar + gap
    image, draw = page(max(60 + len(table) * width(), 60 + 110 * min(5, len(names))), top + H + 60)
    draw.text((6, 6), f"{title}  ({label})", "black", font_size=14)
    for k in range(0, 11, 2):
        y = top + H - H * k / 10
        draw.line([44, y, image.width - 8, y], fill="gainsboro")
        draw.text((38, y), f"{k / 10:.1f}", "gray", font_size=11, anchor="rm")
    for g, (group, row) in enumerate(table.items()):
        x0 = 52 + g * width()
        draw.text((x0 + (width() - gap) / 2, top + H + 8), short(group, width() - 4, 12), "black", font_size=12, anchor="mt")
        for b, name in enumerate(names):
            value, low, high = row.get(name, (math.nan, None, None))
            if math.isnan(value):
                continue
            x, y = x0 + b * bar, top + H - H * min(max(value, 0), 1)
            draw.rectangle([x, y, x + bar - 4, top + H], fill=class_colour(b))
            if low is not None and not math.isnan(low):
                mid = x + (bar - 4) / 2
                draw.line([mid, top + H - H * low, mid, top + H - H * high], fill="black", width=2)
            draw.text((x + (bar - 4) / 2, top + H - 3), f"{value:.2f}".lstrip("0") or "0", "white", font_size=10, anchor="mb")
    for b, name in enumerate(names):
        x = 52 + b % 5 * 110
        y = top + H + 28 + b // 5 * 14
        draw.rectangle([x, y, x + 9, y + 9], fill=class_colour(b))
        draw.text((x + 13, y - 2), short(name, 94, 12), "black", font_size=12)
    data.save_png(image, out)


def projection(x, y, names, out, title="", most=3000, seed=0):
    """The two first principal components of features x [R, M], coloured by class y [R]; at most `most` points, drawn by lot."""
    keep = np.random.default_rng(seed).permutation(len(x))[:most]
    x, y = np.asarray(x, float)[keep], np.asarray(y)[keep]
    x = x - x.mean(0)
    _, s, axes = torch.linalg.svd(torch.from_numpy(x), full_matrices=False)
    s, xy, size = s.numpy(), x @ axes[:2].T.numpy(), 420
    low, high = np.percentile(xy, [1, 99], axis=0)
    at = ((xy - low) / np.maximum(high - low, 1e-9)).clip(-0.04, 1.04) * (size - 60) + 30
    image, draw = page(size + 190, size + 30)
    draw.text((6, 6), f"{title}  ({(s[:2] ** 2).sum() / max((s ** 2).sum(), 1e-12):.0%} of the variation)", "black", font_size=14)
    draw.rectangle([4, 28, size, size + 22], outline="gainsboro")
    for (u, v), c in zip(at, y):
        draw.ellipse([u - 2.5, size + 24 - v - 2.5, u + 2.5, size + 24 - v + 2.5], fill=class_colour(int(c)))
    for c, name in enumerate(names):
        draw.ellipse([size + 14, 34 + 18 * c, size + 22, 42 + 18 * c], fill=class_colour(c))
        draw.text((size + 28, 31 + 18 * c), short(name, 155, 12), "black", font_size=12)
    data.save_png(image, out)


def label_maps(path, maps, names, out, px=250):
    """A picture and, beside it, its label maps {title: int [H, W]}, all in the same colours; 255 stays white."""
    palette = np.array([class_colour(c) for c in range(len(names))] + [(255, 255, 255)], np.uint8)
    with data.Slide(path, mpp=1) as slide:                                             # the scale does not matter for a thumbnail
        thumb = data.thumbnail(slide, max(1, round(max(slide.size) / px)))
    boxes = [(Image.fromarray(thumb), Path(path).name)]
    for title, m in maps.items():
        boxes.append((Image.fromarray(palette[np.minimum(m, len(names))]).resize(thumb.shape[1::-1], Image.NEAREST), title))
    (image, draw), at = side_by_side(boxes, foot=20), 4
    for c, name in enumerate(names):
        draw.rectangle([at, image.height - 16, at + 10, image.height - 6], fill=class_colour(c))
        draw.text((at + 14, image.height - 19), name, "black", font_size=12)
        at += 30 + int(draw.textlength(name, font_size=12))
    data.save_png(image, out)
