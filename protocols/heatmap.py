"""Draw on a slide: maps of scores as a picture, and outlines of regions as QuPath imports them.

Not a command: protocols.slides, segment and page draw with what stands here, with Pillow alone.
Drag a .geojson onto the open slide in QuPath; its polygons are in pixels of the finest level.

Shape letters: P parents (5x squares) of a slide, N = 85 nodes, C classes, h, w cells of a grid.
"""

import functools
import json
import math

import numpy as np
from PIL import Image, ImageDraw

import data
from data import COL, LEVEL, ROW
from prepare.slide import thumbnail

# Viridis: it rises in brightness, so it can be read in grey too.
STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
CLASSES = np.array(
    [[31, 78, 156], [200, 80, 30], [42, 138, 74], [138, 61, 148], [190, 150, 30]]
    + [[90, 90, 90], [40, 160, 170], [205, 60, 110], [120, 80, 50], [130, 170, 60]]
)


def colour(x):
    """Colour values in [0, 1] -> uint8 [..., 3], dark blue over green to yellow."""
    # Mix the two stops that a value lies between.
    at = np.clip(x, 0, 1)[..., None] * (len(STOPS) - 1)
    low = np.minimum(at[..., 0].astype(int), len(STOPS) - 2)
    part = at - low[..., None]
    return (STOPS[low] * (1 - part) + STOPS[low + 1] * part).astype(np.uint8)


def class_colour(c):
    """Return the colour of class number c -> (r, g, b); after ten they repeat, darker."""
    return tuple(int(x) for x in CLASSES[c % len(CLASSES)] * 0.65 ** (c // len(CLASSES)))


def blank(width, height):
    """Open an empty page -> (PIL image, what draws on it)."""
    image = Image.new("RGB", (math.ceil(width), math.ceil(height)), "white")
    return image, ImageDraw.Draw(image)


def text_width(text, size):
    """Measure a text of a font size in pixels."""
    return blank(1, 1)[1].textlength(text, font_size=size)


def short(text, width, size=13):
    """Cut a text so that it fits a width in pixels."""
    if text_width(text, size) <= width:
        return text
    # Drop letters until it fits with the dots.
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def side_by_side(panels, gap=8, top=22):
    """Put panels [(PIL image, title)] of one height on a page, each below its title."""
    width = sum(panel.width + gap for panel, _ in panels) - gap
    # Leave room for the titles above the panels.
    image, draw = blank(width, max(panel.height for panel, _ in panels) + top)
    left = 0
    for panel, title in panels:
        image.paste(panel, (left, top))
        draw.text((left + 2, 4), short(title, panel.width), "black", font_size=13)
        left += panel.width + gap
    return image


def save(image, path):
    """Write a PIL image as a PNG."""
    data.write_whole(path, functools.partial(image.save, format="PNG"))


# ---- Maps of scores -----------------------------------------------------------------------------


def draw_heatmap(slide, parents, panels, width=300):
    """Draw a slide's thumbnail and maps beside it -> PIL image.

    parents [(x, y, side)] of P bags; panels [(title, level 0..3, scores [P, N])], NaN where there
    is nothing to show. Dark is the 5th percentile of a map and yellow the 95th: places of one slide
    can be compared, slides cannot.
    """
    scale = max(1, round(max(slide.size) / width))
    thumb = thumbnail(slide, scale)
    shown = [(Image.fromarray(thumb), slide.name)]
    for title, level, scores in panels:
        # Fill the square of each node with its score.
        grid = np.full(thumb.shape[:2], np.nan)
        for parent, row in zip(parents, scores, strict=True):
            for n in np.flatnonzero(LEVEL == level):
                x, y, side = data.square(n, *parent)
                left, right = round(x / scale), round((x + side) / scale)
                upper, lower = round(y / scale), round((y + side) / scale)
                # Nodes smaller than a pixel still get one.
                rows = slice(max(upper, 0), max(lower, upper + 1, 0))
                grid[rows, max(left, 0) : max(right, left + 1, 0)] = row[n]
        # Stretch the colours between the percentiles, and mix them with the slide.
        there = ~np.isnan(grid)
        low, high = np.percentile(grid[there], [5, 95]) if there.any() else (0, 1)
        tint = colour((np.where(there, grid, low) - low) / max(high - low, 1e-6))
        mixed = (0.35 * thumb + 0.65 * tint).astype(np.uint8)
        shown.append((Image.fromarray(np.where(there[..., None], mixed, thumb)), title))
    return side_by_side(shown)


# ---- Outlines -----------------------------------------------------------------------------------


def label_regions(mask):
    """Number the 4-connected regions of a bool grid [h, w] -> int [h, w], -1 outside."""
    h, w = mask.shape
    label = np.where(mask, -2, -1)
    regions = 0
    for start in np.argwhere(mask).tolist():
        if label[tuple(start)] != -2:
            continue
        # Flood the region from its first cell.
        stack = [start]
        while stack:
            y, x = stack.pop()
            if 0 <= y < h and 0 <= x < w and label[y, x] == -2:
                label[y, x] = regions
                stack += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        regions += 1
    return label


def boundary(mask):
    """List the edges between inside and outside of a bool grid [h, w].

    Returns {corner (x, y): [(next corner, cell (y, x))]}, the inside always on the right hand.
    """
    outside = ~np.pad(mask, 1)
    edges = {}
    for y, x in np.argwhere(mask).tolist():
        corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
        # Neighbours above, on the right, below and on the left, in the padded grid.
        beyond = [(y, x + 1), (y + 1, x + 2), (y + 2, x + 1), (y + 1, x)]
        for i, neighbour in enumerate(beyond):
            if outside[neighbour]:
                edges.setdefault(corners[i], []).append((corners[(i + 1) % 4], (y, x)))
    return edges


def next_edge(choices, corner, heading):
    """Choose the way on: where regions touch, the right turn stays with our own cell."""
    if len(choices) == 1 or heading is None:
        return choices.pop(0)

    def turn(choice):
        (x, y), _ = choice
        return heading[0] * (y - corner[1]) - heading[1] * (x - corner[0])

    # A cross product is largest for the sharpest right turn.
    best = max(choices, key=turn)
    choices.remove(best)
    return best


def trace(edges):
    """Follow edges (used up) to closed rings -> yields (ring [(x, y)], one of its cells)."""
    while edges:
        start = corner = next(iter(edges))
        ring = [start]
        heading = None
        while heading is None or corner != start:
            follows, cell = next_edge(edges[corner], corner, heading)
            if not edges[corner]:
                del edges[corner]
            step = (follows[0] - corner[0], follows[1] - corner[1])
            # Straight on is no corner.
            if step == heading:
                ring.pop()
            ring.append(follows)
            corner = follows
            heading = step
        yield ring, cell


def part_ring(ring):
    """Part a closed ring that touches itself at corners -> closed rings that do not."""
    path = []
    at = {}
    for corner in ring:
        # Where the ring comes back to a corner, a loop is closed: cut it off.
        if corner in at:
            first = at[corner]
            yield [*path[first:], corner]
            for passed in path[first:]:
                del at[passed]
            path = path[:first]
        at[corner] = len(path)
        path.append(corner)


def ring_area(ring):
    """Measure a closed ring: positive if it runs clockwise on the screen."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:], strict=False)) / 2


def outlines(mask):
    """Outline the 4-connected regions of a bool grid [h, w] -> [[outer ring, hole, ...], ...].

    Rings are closed lists of corners (x, y) in cells, outer ones clockwise on the screen and holes
    the other way. Regions that touch at a corner stay apart, and no ring meets itself.
    """
    label = label_regions(mask)
    shapes = [[] for _ in range(label.max() + 1)]
    for ring, cell in trace(boundary(mask)):
        for part in part_ring(ring):
            shape = shapes[label[cell]]
            shape.insert(0 if ring_area(part) > 0 else len(shape), part)
    return shapes


def geojson(parents, labels, level, names):
    """Outline regions of equal label -> a GeoJSON FeatureCollection of QuPath annotations (str).

    parents [(x, y, side)], which lie on one grid; labels int [P, N], class or -1, of the nodes of
    `level`; names of the classes.
    """
    # Lay the nodes of all parents on one grid.
    x0, y0, side = np.min(parents, axis=0)
    cells = 2**level
    across, down, _ = (np.max(parents, axis=0) - (x0, y0, 0)) // side + 1
    grid = np.full((down * cells, across * cells), -1)
    nodes = np.flatnonzero(LEVEL == level)
    for (x, y, _), row in zip(parents, labels, strict=True):
        rows = (y - y0) // side * cells + ROW[nodes]
        grid[rows, (x - x0) // side * cells + COL[nodes]] = row[nodes]
    features = []
    # Outline each class; turn cells into pixels of the finest level.
    for c, name in enumerate(names):
        kind = {"name": name, "color": list(class_colour(c))}
        about = {"objectType": "annotation", "classification": kind}
        for shape in outlines(grid == c):
            corners = [(np.array(ring) * side / cells + (x0, y0)).tolist() for ring in shape]
            polygon = {"type": "Polygon", "coordinates": corners}
            features.append({"type": "Feature", "geometry": polygon, "properties": about})
    return json.dumps({"type": "FeatureCollection", "features": features})
