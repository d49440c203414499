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
from data import COL, LEVEL, ROW, one_line
from prepare.slide import thumbnail

# Viridis: it rises in brightness, so it can be read in grey too.
STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
CLASSES = np.array(
    [[31, 78, 156], [200, 80, 30], [42, 138, 74], [138, 61, 148], [190, 150, 30]]
    + [[90, 90, 90], [40, 160, 170], [205, 60, 110], [120, 80, 50], [130, 170, 60]]
)


def colour(x):
    """Colour values in [0, 1] -> uint8 [..., 3], dark blue over green to yellow."""
    at = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(x, at, stops) for stops in STOPS.T], -1).astype(np.uint8)


def class_colour(c):
    """Return the colour of class number c -> (r, g, b); after ten they repeat, darker."""
    return tuple(int(x) for x in CLASSES[c % len(CLASSES)] * 0.65 ** (c // len(CLASSES)))


def blank(width, height):
    """Open an empty page -> (PIL image, what draws on it)."""
    image = Image.new("RGB", (math.ceil(width), math.ceil(height)), "white")
    return image, ImageDraw.Draw(image)


def text_width(text, size):
    """Measure a text of a font size in pixels."""
    return blank(1, 1)[1].textlength(one_line(text), font_size=size)


def short(text, width, size=13):
    """Put a text on one line, and cut it so that it fits a width in pixels."""
    text = cut = one_line(text)
    while text and text_width(cut, size) > width:
        text = text[:-1]
        cut = text + "..."
    return cut


def side_by_side(panels, gap=8, top=22):
    """Put panels [(PIL image, title)] of one height on a page, each below its title."""
    width = sum(panel.width + gap for panel, _ in panels) - gap
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
def lay_nodes(parents, values, level, empty):
    """Lay the nodes of a level on one grid -> ([h, w], (x, y, side in pixels) of its first cell).

    parents [(x, y, side)] of P bags lie on one grid too; values [P, N]. Elsewhere is `empty`.
    """
    x0, y0, side = np.min(parents, axis=0)
    across, down, _ = (np.max(parents, axis=0) - (x0, y0, 0)) // side + 1
    cells = 2**level
    grid = np.full((down * cells, across * cells), empty)
    nodes = np.flatnonzero(LEVEL == level)
    for (x, y, _), row in zip(parents, values, strict=True):
        rows = (y - y0) // side * cells + ROW[nodes]
        grid[rows, (x - x0) // side * cells + COL[nodes]] = row[nodes]
    return grid, (x0, y0, side / cells)


def draw_heatmap(slide, parents, panels, width=300):
    """Draw a slide's thumbnail and maps beside it -> PIL image.

    parents [(x, y, side)] of P bags; panels [(title, level 0..3, scores [P, N])], NaN where there
    is nothing to show. Dark is the 5th percentile of a map and yellow the 95th, whose scores stand
    at the ends of the bar below it: places of one slide can be compared, slides cannot.
    """
    scale = max(1, round(max(slide.size) / width))
    thumb = thumbnail(slide, scale)
    shown = [(Image.fromarray(thumb), slide.name)]
    h, w = thumb.shape[:2]
    for title, level, scores in panels:
        # Find the cell at the middle of each pixel; around the grid there is nothing.
        grid, (x0, y0, side) = lay_nodes(parents, scores, level, np.nan)
        grid = np.pad(grid, 1, constant_values=np.nan)
        rows = ((np.arange(h) + 0.5) * scale - y0) // side + 1
        columns = ((np.arange(w) + 0.5) * scale - x0) // side + 1
        rows = rows.clip(0, grid.shape[0] - 1).astype(int)
        pixels = grid[rows[:, None], columns.clip(0, grid.shape[1] - 1).astype(int)]
        # Stretch the colours between the percentiles, and mix them with the slide.
        there = ~np.isnan(pixels)
        low, high = np.percentile(pixels[there], [5, 95]) if there.any() else (0, 1)
        tint = colour((np.where(there, pixels, low) - low) / max(high - low, 1e-6))
        mixed = (0.35 * thumb + 0.65 * tint).astype(np.uint8)
        panel, draw = blank(max(w, 160), h + 26)
        panel.paste(Image.fromarray(np.where(there[..., None], mixed, thumb)), (0, 0))
        # Draw the bar of colours below, with its two numbers.
        bar = colour(np.linspace(0, 1, panel.width))[None].repeat(8, 0)
        panel.paste(Image.fromarray(bar), (0, h + 4))
        draw.text((0, h + 13), f"{low:.3f}", "black", font_size=11)
        draw.text((panel.width, h + 13), f"{high:.3f}", "black", font_size=11, anchor="ra")
        shown.append((panel, title))
    return side_by_side(shown)


# ---- Outlines -----------------------------------------------------------------------------------
def trace(region):
    """Trace the border of a 4-connected set of cells (x, y) -> closed rings [(x, y)] of corners.

    The region lies on the right hand: the outer ring, which is the first, runs clockwise on the
    screen, holes the other way.
    """
    # An edge (x, y, dx, dy) starts at a corner. A cell has one above, right, below and left.
    edges = set()
    for x, y in region:
        sides = {(x, y - 1): (x, y, 1, 0), (x + 1, y): (x + 1, y, 0, 1)}
        sides |= {(x, y + 1): (x + 1, y + 1, -1, 0), (x - 1, y): (x, y + 1, 0, -1)}
        edges |= {edge for neighbour, edge in sides.items() if neighbour not in region}
    rings = []
    passed = set()
    for edge in sorted(edges):
        ring = []
        while edge not in passed:
            passed.add(edge)
            x, y, dx, dy = edge
            x, y = x + dx, y + dy
            # Where the region touches itself at a corner, the left turn leaves it in one piece.
            ways = ((x, y, dy, -dx), (x, y, dx, dy), (x, y, -dy, dx))
            edge = next(way for way in ways if way in edges)
            # Straight on is no corner.
            if edge != ways[1]:
                ring.append((x, y))
        if ring:
            rings.append([ring[-1], *ring])
    return rings


def regions(mask):
    """Yield the 4-connected regions of a bool grid [h, w], each a set of cells (x, y)."""
    free = {(x, y) for y, x in np.argwhere(mask).tolist()}
    while free:
        # Flood a region from one of its cells.
        region = set()
        stack = [free.pop()]
        while stack:
            x, y = stack.pop()
            region.add((x, y))
            found = free & {(x, y - 1), (x, y + 1), (x - 1, y), (x + 1, y)}
            free -= found
            stack += found
        yield region


def geojson(parents, labels, level, names, s):
    """Outline regions of equal label -> a GeoJSON FeatureCollection of QuPath annotations (str).

    parents [(x, y, side)]; labels int [P, N], class or -1, of the nodes of `level`; names of the
    classes; s [P, N, C]: scores above the mean of the slide, which the labels are chosen by. An
    annotation's measurements hold their means over it.
    """
    grid, (x0, y0, side) = lay_nodes(parents, labels, level, -1)
    scores = [lay_nodes(parents, s[..., c], level, np.nan)[0] for c in range(len(names))]
    columns = [f"{one_line(name)} above slide mean" for name in names]
    features = []
    # Outline each class; turn cells into pixels of the finest level.
    for c, name in enumerate(map(one_line, names)):
        kind = {"name": name, "color": list(class_colour(c))}
        for region in regions(grid == c):
            x, y = np.array([*region]).T
            means = [round(float(score[y, x].mean()), 4) for score in scores]
            about = {"objectType": "annotation", "classification": kind}
            about["measurements"] = dict(zip(columns, means, strict=True))
            corners = [(np.array(ring) * side + (x0, y0)).tolist() for ring in trace(region)]
            polygon = {"type": "Polygon", "coordinates": corners}
            features.append({"type": "Feature", "geometry": polygon, "properties": about})
    return json.dumps({"type": "FeatureCollection", "features": features})
