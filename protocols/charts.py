"""Draw the charts of a page: bars with whiskers, a confusion matrix, a sheet of retrieved patches.

Not a command: protocols.page draws with what stands here, with Pillow alone.

Shape letters: R bags, N = 85 nodes, C classes, Q query texts, d the shared space.
"""

import numpy as np
from PIL import Image

import data
from data import LEVEL
from evaluate import MAG_NAMES
from protocols.heatmap import blank, class_colour, colour, short, text_width

NOTE = "A wide fact (architecture) cannot be seen at 40x, and a fine one (a nucleus) not at 5x."


def draw_bars(table, title):
    """Draw grouped bars from 0 to 1 -> PIL image.

    table {group: {bar: (value, low, high)}}: no bar without a value, no whisker without low.
    """
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    left, top, height, bar = 52, 44, 190, 26
    bottom = top + height
    wide = len(names) * bar + 26
    image, draw = blank(60 + max(len(table) * wide, 110 * len(names)), bottom + 60)
    draw.text((6, 6), title, "black", font_size=14)
    # Draw the scale.
    for tenth in range(0, 11, 2):
        y = bottom - height * tenth / 10
        draw.line([44, y, image.width - 8, y], fill="gainsboro")
        draw.text((38, y), f"{tenth / 10:.1f}", "gray", font_size=11, anchor="rm")
    # Draw the bars group by group.
    for g, (group, row) in enumerate(table.items()):
        start = left + g * wide
        name = short(group, wide - 4, 12)
        draw.text((start + wide / 2 - 13, bottom + 8), name, "black", font_size=12, anchor="mt")
        for name, (value, low, high) in row.items():
            if value is None:
                continue
            b = names.index(name)
            x = start + b * bar
            middle = x + (bar - 4) / 2
            draw.rectangle([x, bottom - height * value, x + bar - 4, bottom], class_colour(b))
            if low is not None:
                ends = [middle, bottom - height * low, middle, bottom - height * high]
                draw.line(ends, fill="black", width=2)
            number = f"{value:.2f}".removeprefix("0")
            draw.text((middle, bottom - 3), number, "white", font_size=10, anchor="mb")
    for b, name in enumerate(names):
        x, y = left + b * 110, bottom + 28
        draw.rectangle([x, y, x + 9, y + 9], fill=class_colour(b))
        draw.text((x + 13, y - 2), short(name, 94, 12), "black", font_size=12)
    return image


def draw_confusion(matrix, names):
    """Draw a confusion matrix [C, C], truth by prediction: the colour is the share of its row."""
    C = len(matrix)
    cell = 46 if C <= 12 else 30
    label = min(170, max(text_width(name, 12) for name in names)) + 12
    left, top = label + 4, 20
    image, draw = blank(left + C * cell + 8, top + C * cell + label)
    draw.text((left, 2), "predicted", "gray", font_size=12)
    # Colour by recall, so that rare classes can be seen.
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    for i, name in enumerate(names):
        name = short(name, label - 8, 12)
        y = top + i * cell
        draw.text((left - 6, y + cell / 2), name, "black", font_size=12, anchor="rm")
        # Write the name of a column upwards.
        below, pen = blank(label, 16)
        pen.text((label - 4, 8), name, "black", font_size=12, anchor="rm")
        place = (int(left + i * cell + cell / 2 - 9), top + C * cell)
        image.paste(below.rotate(90, expand=True), place)
        for j in range(C):
            x = left + j * cell
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], tuple(colour(share[i, j]).tolist()))
            if matrix[i, j]:
                ink = "black" if share[i, j] > 0.6 else "white"
                centre = (x + cell / 2 - 1, y + cell / 2 - 1)
                draw.text(centre, str(int(matrix[i, j])), ink, font_size=11, anchor="mm")
    return image


def nearest(features, query, level, most):
    """Find the patches nearest to a query [d] at a magnification, each of another slide.

    features: of evaluate.embed. Returns [(row of the features, node)].
    """
    rows, nodes = np.nonzero(features["valid"].numpy() & (LEVEL == level))
    order = np.argsort(-(features["image_embedding"][rows, nodes] @ query).numpy())
    # The first patch of each slide is its best.
    _, first = np.unique(features["slides"][rows[order]], return_index=True)
    best = order[np.sort(first)[:most]]
    return list(zip(rows[best].tolist(), nodes[best].tolist(), strict=True))


def draw_sheet(bags, features, queries, vectors, most=5, px=72, columns=3):
    """Draw the patches nearest to queries with vectors [Q, d]: a block each, a row each mag."""
    left, step = 40, px + 3
    wide, high = left + most * step + 14, 4 * step + 26
    image, draw = blank(columns * wide, -(-len(queries) // columns) * high + 24)
    for q, query in enumerate(queries):
        x0, y0 = q % columns * wide, q // columns * high
        draw.text((x0 + 4, y0 + 4), short(query, wide - 8, 14), "black", font_size=14)
        for level, mag in enumerate(MAG_NAMES):
            top = y0 + 24 + level * step
            draw.text((x0 + 6, top + px // 2 - 8), mag, "black", font_size=13)
            for k, (r, n) in enumerate(nearest(features, vectors[q], level, most)):
                # A patch is a square of its bag's image.
                x, y, side = data.square(n, 0, 0, 8 * bags.S)
                pixels = bags[features["index"][r]]["image"][:, y : y + side, x : x + side]
                tile = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((px, px))
                image.paste(tile, (x0 + left + k * step, top))
    draw.text((4, image.height - 20), NOTE, "black", font_size=13)
    return image
