"""
The built-in world: procedural H&E slides whose truth is known, written as real pyramidal SVS files.

A model that claims to read many magnifications needs a test that no single magnification can pass. In this world a tumour
has two independent facts, and its diagnosis is their pair:

    architecture   how the tissue is arranged      needs a wide field:  read at 5x and 10x, hardly at 20x and 40x
    cytology       what one cell looks like        needs fine pixels:   read at 20x and 40x, hardly at 5x and 10x

so a 5x patch alone knows the row of the table DIAGNOSES and a 40x patch alone knows the column. Two devices keep it so:

1. Architecture is how three tissues (epithelium, lumen, stroma) lie, and above all how much of each there is (ARRANGEMENTS). The
   arrangement is periodic and its period is the side of a 10x field, 256 level-0 px: wherever such a field lies, it holds exactly
   one unit, and the amounts of its architecture. A 20x field is a quarter of a unit: it may hold anything.
2. Cells are hybrid images (Oliva, Torralba & Schyns 2006). Every cell type has the same low spatial frequencies; only what
   lies above the resolution of 10x differs, in shape and in colour. Blending is linear and hardly ever clips, so that averaging
   removes just that, and what is left of it at 10x drowns in an uneven stain of about that scale.

dev/leaks.py measures both with a small supervised network (dev/LOG.md). Everything else (stain, brightness, blur, size and
spacing of nuclei, stroma, lymphocytes, fat) varies per slide, independently of the diagnosis. A slide depends on [seed, index]
alone.

    python synthetic.py data/slides --slides 40 --seed 0                make slides (resumes where it stopped)
    python synthetic.py data/slides --slides 0 --show world.png         draw one region per pair of facts, and its cells

Units: lengths are level-0 pixels of 0.25 um (40x) unless said otherwise; images are uint8 [H, W, 3].
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# facts: what is true of a slide

ARCHITECTURES = ("glands", "nests", "trabeculae", "papillae", "sheets")
CYTOLOGIES = ("small round", "vesicular", "spindle", "signet ring")
TISSUES = ("tumour", "stroma", "fat", "glass")  # the classes of the tissue map; the number is the position
STROMAS = ("fibrous", "myxoid")
LYMPHOCYTES = ("few", "many")

# DIAGNOSES[architecture][cytology]: real terms so that a real tokenizer meets real words, but the pairing is invented.
# No term repeats a word of its facts, otherwise its name alone would give the row or the column away.
DIAGNOSES = (
    ("prostatic adenocarcinoma", "cholangiocarcinoma", "nephroblastoma", "Krukenberg tumour"),
    ("carcinoid", "paraganglioma", "melanoma", "chordoma"),
    ("insulinoma", "hepatocellular carcinoma", "schwannoma", "linitis plastica"),
    ("ependymoma", "serous carcinoma", "mesothelioma", "pseudomyxoma peritonei"),
    ("Ewing sarcoma", "seminoma", "leiomyosarcoma", "liposarcoma"),
)

MPP = 0.25  # microns per pixel of level 0: 40x
CELL = 16  # level-0 pixels per cell of the tissue map
TILE = 256  # side of a JPEG tile in the file
UNIT = 256  # an arrangement repeats after so many pixels in both directions: the side of a 10x field
HABIT = 0.5  # how much of an arrangement is its architecture's habit; the rest is the slide's own
WOBBLE = 8  # how far its edges wander

# The shares of epithelium, lumen and stroma in a unit: five points around (.50 .25 .25), as far apart as five can be. And the habit,
# the height of each tissue on two crossed waves: glands have lumen on the crests and stroma in the troughs, papillae the
# other way round, trabeculae lie along one of the waves, and sheets have none.
ARRANGEMENTS = {
    "glands": ((0.54, 0.33, 0.13), ((0, 0), (1, 1), (-1, -1))),
    "nests": ((0.54, 0.13, 0.33), ((1, 1), (0, 0), (-1, -1))),
    "trabeculae": ((0.40, 0.24, 0.36), ((1.4, 0), (0, 0), (-1.4, 0))),
    "papillae": ((0.40, 0.36, 0.24), ((0, 0), (-1, -1), (1, 1))),
    "sheets": ((0.62, 0.19, 0.19), ((0, 0), (0, 0), (0, 0))),
}

# A cell's detail: its rms contrast in grey levels, and its colour, as (haematoxylin, eosin) taken up where it is positive and where
# it is negative. Colours and contrasts are as different as they can be; at 10x all of it is averaged away.
DETAIL = {
    "small round": (15, (1.5, 0.2), (0.3, 0.2)),  # dark nuclei
    "vesicular": (18, (0.2, 1.6), (1.3, 0.0)),  # a pink nucleolus in a blue nucleus
    "spindle": (20, (0.0, 1.9), (0.45, 0.1)),  # pink fibrils
    "signet ring": (25, (0.0, 0.0), (1.5, 0.2)),  # a clear vacuole, a dark crescent
}


def facts(seed, index):
    """What is true of slide `index`: names of architecture, cytology and diagnosis, and of two facts independent of them.

    Any 20 consecutive indices hold each diagnosis once, so every range of slides is balanced.
    """
    a, c = divmod(index % 20, 4)
    rng = np.random.default_rng([seed, index, 0])
    return {
        "architecture": ARCHITECTURES[a],
        "cytology": CYTOLOGIES[c],
        "diagnosis": DIAGNOSES[a][c],
        "stroma": STROMAS[rng.integers(2)],
        "lymphocytes": LYMPHOCYTES[rng.integers(2)],
    }


# ---------------------------------------------------------------------------------------------------------------------
# arrangement: where epithelium, lumen and stroma are


def enlarge(field, n):
    """A float field [h, w] resampled smoothly to [n, n]."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(field, np.float32)).resize((n, n), Image.BICUBIC))


def noise(rng, n, waves):
    """Smooth noise [n, n] of unit variance at its knots, about `waves` knots across."""
    k = max(2, round(waves)) + 1
    return enlarge(rng.standard_normal((k, k)), n)


def lattice(rng, y, x, pitch, jitter=0.1):
    """Distance of each point to the nearest centre of a jittered hexagonal lattice; y, x, pitch in one unit: [n, n] -> [n, n]."""
    top, left = np.floor(y.min() / pitch) - 2, np.floor(x.min() / pitch) - 2
    rows, cols = int((y.max() / pitch - top) / 0.866) + 4, int(x.max() / pitch - left) + 4
    cy, cx = np.mgrid[0:rows, 0:cols].astype(np.float32)
    cy, cx = (cy * 0.866 + top) * pitch, (cx + 0.5 * (cy % 2) + left) * pitch
    cy += rng.uniform(-jitter, jitter, cy.shape) * pitch
    cx += rng.uniform(-jitter, jitter, cx.shape) * pitch
    row = np.clip(np.rint((y / pitch - top) / 0.866).astype(np.int32), 1, rows - 2)
    best = np.full_like(y, np.inf)
    for r in (row - 1, row, row + 1):  # the nearest centre is among the 3 x 3 nearest sites
        col = np.clip(np.rint(x / pitch - left - 0.5 * (r % 2)).astype(np.int32), 1, cols - 2)
        for c in (col - 1, col, col + 1):
            best = np.minimum(best, (y - cy[r, c]) ** 2 + (x - cx[r, c]) ** 2)
    return np.sqrt(best)


def arrange(rng, name, size, step=8):
    """The layers of one architecture: two signed fields [size/step, size/step], roughly in level-0 pixels.

    epithelium where the first is positive; elsewhere lumen where the second is positive and stroma where it is not.
    """
    shares, habit = ARRANGEMENTS[name]
    # every tissue is a sum of waves with one period in a unit, and at each point the highest tissue is seen
    waves = rng.standard_normal((2, 3, 4)) * (1, 1, 0.5, 0.5)  # cosine or sine, tissue, direction
    waves = (1 - HABIT) * (waves - waves.mean(1, keepdims=True))
    waves[0, :, :2] += HABIT * np.array(habit)
    waves /= np.sqrt((waves**2).sum((0, 2)).mean())  # or the edges of some would be sharper than those of others

    def heights(u, v):  # of the epithelium above the others, and of the lumen above the stroma
        phases = np.stack([u, v, u + v, u - v])
        epithelium, lumen, stroma = np.tensordot(waves[0], np.cos(phases), 1) + np.tensordot(waves[1], np.sin(phases), 1)
        return epithelium - np.maximum(lumen, stroma), lumen - stroma

    # where to cut, so that one unit holds just the shares of the table
    phase = 2 * np.pi * np.arange(64) / 64
    wall, core = heights(*np.meshgrid(phase, phase))
    wall_cut = np.quantile(wall, 1 - shares[0])
    core_cut = np.quantile(core[wall <= wall_cut], shares[2] / (shares[1] + shares[2]))

    m = size // step
    y, x = np.mgrid[0:m, 0:m].astype(np.float32) * step
    y = y + 60 * noise(rng, m, size / 300)[0]  # columns slide along themselves: curves that leave each its period
    y, x = y + WOBBLE * noise(rng, m, size / 150), x + WOBBLE * noise(rng, m, size / 150)
    y, x = (y, x) if rng.random() < 0.5 else (y.T, x.T)
    u, v = (2 * np.pi * (axis / UNIT + rng.uniform()) for axis in (y, x))
    wall, core = heights(u, v)
    slope = UNIT / (2 * np.pi)  # a wave of height 1 then rises by about one a pixel
    return slope * (wall - wall_cut).astype(np.float32), slope * (core - core_cut).astype(np.float32)


def regions(rng, size):
    """The tissue map of a slide, uint8 [size/16, size/16] of positions in TISSUES: mostly tumour, some of all others."""
    n = size // CELL
    edge = np.minimum(np.arange(n), np.arange(n)[::-1]) * CELL
    border = np.exp(-np.minimum.outer(edge, edge) / 30.0)  # sections end before the glass does
    glass = noise(rng, n, size / 800) + 2.5 * border
    other = noise(rng, n, size / 700)
    tissue = np.zeros((n, n), np.uint8)
    tissue[other > np.quantile(other, 1 - rng.uniform(0, 0.12))] = TISSUES.index("fat")
    tissue[other < np.quantile(other, rng.uniform(0, 0.12))] = TISSUES.index("stroma")
    tissue[glass > np.quantile(glass, 1 - rng.uniform(0, 0.10))] = TISSUES.index("glass")
    return tissue


# ---------------------------------------------------------------------------------------------------------------------
# cells: one small picture per cell, drawn so that a low resolution cannot tell the types apart


def hybrid(detail, common, cutoff=0.24):
    """The low spatial frequencies of `common` and the high ones of `detail`, at unit rms: [M, n, n], [M, n, n] -> float [M, n, n, 2].

    cutoff in cycles per level-0 pixel: 10x holds up to 0.125, and averaging 4 x 4 pixels, which makes it, leaves nothing of 0.25
    (Oliva, Torralba & Schyns, "Hybrid images", 2006)."""
    n = detail.shape[-1]
    low = 1 / (1 + (np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)) / cutoff) ** 16)
    through = lambda image, gain: np.fft.irfft2(np.fft.rfft2(image) * gain, (n, n))  # noqa: E731
    high = through(detail, 1 - low)
    return np.stack([through(common, low), high / np.sqrt(np.mean(high**2, (1, 2), keepdims=True))], -1)


def sprites(rng, kind, diameter, angles, blur):
    """Pictures of cells turned by angles [M], float32 [M, n, n, 2]: how much of each nuclear colour covers, and its detail, coloured by
    DETAIL."""
    n, M = 2 * int(1.6 * diameter) + 1, len(angles)
    angle, lot = np.asarray(angles)[:, None, None], rng.random((M, 3))[..., None, None]
    y, x = np.mgrid[0:n, 0:n][:, None] - n // 2 + lot[:, :2].swapaxes(0, 1) - 0.5  # [M, n, n] each
    p, q = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    d = diameter * (0.92 + 0.16 * lot[:, 2])

    def ellipse(long, short, at=0.0):  # 1 inside, 0 outside, a one-pixel slope between
        r = np.hypot((p - at) / long, q / short) * 2
        return np.clip((1 - r) * short / 2 + 0.5, 0, 1)

    if kind == "small round":
        cell = ellipse(0.55 * d, 0.52 * d)
    elif kind == "vesicular":
        body = ellipse(1.15 * d, 1.08 * d)
        rim = body - ellipse(1.15 * d - 4, 1.08 * d - 4)
        cell = ellipse(0.5 * d, 0.5 * d) - 0.5 * rim
    elif kind == "spindle":
        cell = ellipse(1.9 * d, 0.32 * d)
    elif kind == "signet ring":
        vacuole = ellipse(0.62 * d, 0.62 * d, at=0.25 * d)
        crescent = ellipse(1.1 * d, 1.1 * d) * (1 - ellipse(0.8 * d, 0.8 * d, at=0.25 * d)) * (p < 0.2 * d)
        cell = 1.2 * vacuole - 1.1 * crescent
    elif kind == "lymphocyte":
        cell = 1.1 * ellipse(0.6 * d, 0.6 * d)
    else:  # a fibroblast of the stroma
        cell = 0.7 * ellipse(1.5 * d, 0.3 * d)
    if kind in CYTOLOGIES:
        cell = hybrid(cell, 0.55 * np.exp(-(x * x + y * y) / (2 * (0.32 * diameter) ** 2)))
    else:
        cell = np.stack([cell, np.zeros_like(cell)], -1)
    if blur:
        mtf = np.exp(-2 * (np.pi * blur) ** 2 * (np.fft.fftfreq(n)[:, None] ** 2 + np.fft.rfftfreq(n) ** 2))
        cell = np.fft.irfft2(np.fft.rfft2(cell, axes=(1, 2)) * mtf[..., None], (n, n), axes=(1, 2))
    return cell.astype(np.float32)


def stamp(canvas, rng, kind, points, angles, diameter, blur):
    """Add one cell of `kind` at each of points [N, 2] (y, x), turned by angles [N], to the canvas [H, W, 2] of `sprites`."""
    turns, variants = 16, 4
    bank = sprites(rng, kind, diameter, np.repeat(2 * np.pi * np.arange(turns) / turns, variants), blur)
    n = bank.shape[1]
    inside = ((points >= n) & (points < len(canvas) - n)).all(1)
    points, angles = points[inside], angles[inside]
    turn = np.rint(angles * turns / (2 * np.pi)).astype(int) % turns
    strength = rng.uniform(0.7, 1.3, len(points)).astype(np.float32)  # no two nuclei take the stain alike
    variant = rng.integers(0, variants, len(points))
    corner = np.rint(points).astype(int) - n // 2
    for (y, x), t, s in zip(corner.tolist(), (turn * variants + variant).tolist(), strength.tolist()):
        canvas[y : y + n, x : x + n] += s * bank[t]


def scatter(rng, size, pitch, jitter=0.25):
    """Points [N, 2] of a jittered hexagonal lattice over a square, in level-0 pixels."""
    y, x = np.mgrid[0 : int(size / pitch / 0.866) + 1, 0 : int(size / pitch) + 1]
    points = np.stack([0.866 * y.ravel(), (x + 0.5 * (y % 2)).ravel()], 1)
    return (points + rng.uniform(-jitter, jitter, points.shape)) * pitch


# ---------------------------------------------------------------------------------------------------------------------
# painting


def paint(rng, truth, size, tissue=None):
    """Paint one slide from its facts -> image uint8 [size, size, 3] and two maps [size/16, size/16].

    The first map, uint8, is what is seen in each square of 16 x 16 pixels, as a position in TISSUES (lumen is glass); the
    second, bool, is where the slide is tumour, its own stroma and lumens included. `tissue` overrides the regions.
    """
    step = 4  # colours vary slowly: they are mixed on a grid 4 times coarser and enlarged; only nuclei need every pixel
    n = size // step
    tissue = regions(rng, size) if tissue is None else tissue

    # how this slide was cut, stained and scanned: independent of what it shows
    haematoxylin = (np.array([0.65, 0.70, 0.29]) + rng.normal(0, 0.03, 3)) * rng.uniform(1.0, 1.4)
    eosin = (np.array([0.10, 0.90, 0.20]) + rng.normal(0, 0.03, 3)).clip(0.02) * rng.uniform(0.7, 1.0)
    white = 244 * rng.uniform(0.94, 1.0, 3)
    diameter, pitch, blur = rng.uniform(8.8, 10.6), rng.uniform(11.5, 14.0), rng.uniform(0, 0.4)
    basophilia, mottle = rng.uniform(0.3, 0.5), rng.uniform(0.15, 0.3)

    # what lies where, as soft masks on the coarse grid
    soft = lambda field, width: np.clip(enlarge(field, n) / width + 0.5, 0, 1)  # noqa: E731
    is_a = lambda name: soft((tissue == TISSUES.index(name)) - 0.5, 0.3)  # noqa: E731
    tumour, fat, glass = is_a("tumour"), is_a("fat"), is_a("glass")
    epithelium, lumen = arrange(rng, truth["architecture"], size)
    epithelium = soft(epithelium, 4.0) * tumour
    lumen = soft(lumen, 4.0) * tumour * (1 - epithelium)
    g = size // 8
    y, x = np.mgrid[0:g, 0:g].astype(np.float32) * 8
    wobble = 10 * noise(rng, g, size / 80)
    vacuole = soft(33 - lattice(rng, y + wobble, x + wobble, 78.0), 5.0) * fat  # fat cells: empty, thin-walled
    empty = np.maximum(np.maximum(lumen, vacuole), glass)
    stroma = np.clip(1 - epithelium - empty, 0, 1)

    # stain taken up by each, and the uneven texture of each
    fibres = noise(rng, n, size / 14) * 0.6 + noise(rng, n, size / 40)
    grain = noise(rng, n, size / 8) + noise(rng, n, size / 16)
    fine = rng.standard_normal((2, n, n), np.float32) * rng.uniform(0.05, 0.35, (2, 1, 1)).astype(np.float32)  # at the scale of 10x
    h = basophilia * epithelium * (1 + mottle * grain + fine[0]) + 0.07 * stroma
    e = 0.45 * epithelium * (1 + mottle * grain + fine[1])
    if truth["stroma"] == "fibrous":
        e = e + stroma * (0.80 + 0.14 * fibres)
    else:
        e = e + stroma * (0.36 + 0.10 * fibres)
        h = h + 0.10 * stroma
    light = 1 - rng.uniform(0, 0.08) * np.linspace(-1, 1, n)[:, None] * rng.choice([-1, 1])
    ground = [white[c] * light * np.exp(-np.maximum(h, 0) * haematoxylin[c] - np.maximum(e, 0) * eosin[c]) for c in range(3)]
    ground = np.stack(ground, -1).clip(0, 255).astype(np.uint8)
    ground = np.asarray(Image.fromarray(ground).resize((size, size), Image.BILINEAR))

    # cells
    cells = np.zeros((size, size, 2), np.float32)
    at = lambda field, points: field[tuple((points.T / step).astype(int).clip(0, n - 1))]  # noqa: E731
    swirl = noise(rng, n, size / 300) * 1.5 + rng.uniform(0, np.pi)  # neighbouring cells lie alike
    points = scatter(rng, size, pitch)
    points = points[at(epithelium, points) > 0.85]
    angles = at(swirl, points) + rng.normal(0, 0.25, len(points))
    if truth["cytology"] != "spindle":
        angles = rng.uniform(0, 2 * np.pi, len(points))
    stamp(cells, rng, truth["cytology"], points, angles, diameter, blur)
    points = scatter(rng, size, 34.0)
    points = points[(at(stroma, points) > 0.6) & (rng.random(len(points)) < 0.6)]
    stamp(cells, rng, "fibroblast", points, at(swirl, points) + 0.5, diameter, blur)
    points = scatter(rng, size, 15.0, 0.5)  # lymphocytes, in crowds
    crowd = noise(rng, n, size / 120)
    keep = rng.random(len(points)) < (0.03 if truth["lymphocytes"] == "few" else 0.25)
    points = points[keep & (at(stroma, points) > 0.7) & (at(crowd, points) > 0)]
    stamp(cells, rng, "lymphocyte", points, np.zeros(len(points)), diameter, blur)

    # blend: linear in the cells, so that the average of a blend is the blend of the average
    colour = lambda h, e: white * np.exp(-h * haematoxylin - e * eosin)  # noqa: E731
    nucleus = colour(1.5, 0.25)
    contrast, plus, minus = DETAIL[truth["cytology"]]
    hue = colour(*plus) - colour(*minus)
    hue *= contrast / np.linalg.norm(hue)
    image = np.empty((size, size, 3), np.uint8)
    dust = rng.integers(-4, 5, (size, size), dtype=np.int8)
    for c in range(3):
        channel = ground[..., c].astype(np.float32)
        channel += cells[..., 0] * (np.float32(nucleus[c]) - channel) + cells[..., 1] * np.float32(hue[c])
        channel += dust
        image[..., c] = np.clip(channel, 0, 255, out=channel)

    k = CELL // step
    seen = np.stack([epithelium, stroma * (1 - fat), fat * (1 - glass), empty * (1 - fat)])
    seen = seen.reshape(4, n // k, k, n // k, k).mean((2, 4)).argmax(0).astype(np.uint8)
    return image, seen, tissue == TISSUES.index("tumour")


# ---------------------------------------------------------------------------------------------------------------------
# slides: real files


def write_slide(path, seed, index, size=2048, tile=TILE):
    """Paint slide `index` and write it as a pyramidal Aperio-style SVS, with `STEM.truth.npz` beside it.

    size: side in level-0 pixels, a multiple of 256. Levels are reduced 1, 4 and 16 times by area averaging. The truth
    holds `facts` (JSON) and the maps `tissue` and `tumour` of `paint`; it is in place before the slide is, so a slide that
    exists is complete.
    """
    path = Path(path)
    if size < 512 or size % TILE:
        raise ValueError(f"slide size {size} is not a multiple of {TILE} of at least 512")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must not be negative")
    truth = facts(seed, index)
    image, tissue, tumour = paint(np.random.default_rng([seed, index, 1]), truth, size)
    made = {"seed": seed, "index": index, "size": size, **truth}
    maps = {"tissue": tissue, "tumour": tumour}
    atomically(path.with_suffix(".truth.npz"), lambda f: np.savez_compressed(f, facts=json.dumps(made), **maps))
    atomically(path, lambda f: write_svs(f, image, tile))


def write_svs(file, image, tile=TILE):
    """Write image uint8 [H, W, 3] to an open file as Aperio does: baseline, stripped thumbnail, then the lower levels."""
    height, width = image.shape[:2]
    head = f"Aperio Image Library v12.0.0 \r\n{width}x{height} [0,0 {width}x{height}] ({tile}x{tile})"
    tail = "JPEG/RGB Q=85|AppMag = 40|MPP = 0.25"
    jpeg = dict(photometric="rgb", compression="jpeg", compressionargs={"level": 85}, metadata=None, maxworkers=1)
    tiles = dict(tile=(tile, tile), **jpeg)
    levels = [image] + [np.asarray(Image.fromarray(image).reduce(k)) for k in (4, 16)]
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(image, description=f"{head} {tail}", **tiles)
        small = levels[2]
        thumbnail = f"{head} -> {small.shape[1]}x{small.shape[0]} - |AppMag = 40|MPP = 0.25"
        tiff.write(small, description=thumbnail, rowsperstrip=16, **jpeg)
        for level in levels[1:]:
            tiff.write(level, description=f"{head} -> {level.shape[1]}x{level.shape[0]} {tail}", **tiles)


def atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_slides(out, count, seed, first=0, size=2048, workers=2):
    """Write slides first .. first + count - 1 to out/slide-0000.svs ..., skipping finished ones -> list of their paths.

    Different ranges give different slides: train on one range, test on another.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"slide-{i:04d}.svs" for i in range(first, first + count)]
    jobs = []
    for index, path in enumerate(paths, first):
        if not path.exists():
            jobs.append((path, seed, index, size))
        elif (made := read_truth(path)[0]) and (made["seed"], made["index"], made["size"]) != (seed, index, size):
            raise ValueError(f"{path} was made with seed {made['seed']} and size {made['size']}: choose another folder")
    bar = tqdm(total=count, initial=count - len(jobs), desc="slides", unit="slide", disable=not jobs)
    with bar:
        if workers <= 1 or len(jobs) <= 1:
            for job in jobs:
                write_slide(*job)
                bar.update()
        else:
            # spawn, not fork: the caller may already run torch threads
            context = multiprocessing.get_context("spawn")
            ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
            # leaving this block, by Ctrl-C too, ends the workers; what they had finished stays
            with context.Pool(min(workers, len(jobs)), signal.signal, ignore) as pool:
                for _ in pool.imap_unordered(_write_job, jobs):
                    bar.update()
    return paths


def _write_job(job):
    write_slide(*job)


def read_truth(path):
    """The facts (dict) of the slide at `path`, and its maps `tissue` uint8 [h, w] and `tumour` bool [h, w]."""
    with np.load(Path(path).with_suffix(".truth.npz")) as file:
        return json.loads(str(file["facts"])), file["tissue"], file["tumour"]


# ---------------------------------------------------------------------------------------------------------------------
# words: what a captioner would say

WORDS = {
    "glands": ("well-formed glands", "crowded glands", "glands around open lumina"),
    "nests": ("solid nests", "rounded nests", "nests of cells"),
    "trabeculae": ("parallel trabeculae", "branching trabeculae", "trabeculae and long cords"),
    "papillae": ("papillary fronds", "slender papillary projections", "papillary structures with cores"),
    "sheets": ("diffuse sheets", "solid sheets", "sheets without structure"),
    "small round": ("small round dark nuclei", "small round blue cells", "uniform small round cells"),
    "vesicular": ("large vesicular nuclei", "vesicular nuclei with prominent nucleoli", "pale vesicular chromatin"),
    "spindle": ("spindle cells", "elongated spindle nuclei", "slender spindle cells"),
    "signet ring": ("signet ring cells", "signet ring cells with mucin vacuoles", "vacuolated signet ring cells"),
    "fibrous": ("dense fibrous stroma", "collagenous stroma", "pink fibrous tissue"),
    "myxoid": ("loose myxoid stroma", "a pale myxoid background", "oedematous myxoid tissue"),
    "few": ("few lymphocytes", "little inflammation", "sparse lymphocytes"),
    "many": ("many lymphocytes", "a dense lymphocytic infiltrate", "marked chronic inflammation"),
    "tumour": ("the edge of a tumour", "the border of a lesion", "the margin of a neoplasm"),
    "stroma": ("stroma only", "connective tissue without tumour", "benign stroma with scattered fibroblasts"),
    "fat": ("mature adipose tissue", "fat cells with clear vacuoles", "adipocytes with thin septa"),
    "glass": ("blank background", "empty glass without tissue", "a white background"),
    "surroundings": ("surrounding adipose tissue", "adjacent fat", "fat at the edge of the field"),
}
OPENERS = ("The image primarily showcases {}.", "This photomicrograph shows {}.", "The image shows {}.", "There is evidence of {}.",
           "The histopathology image displays {}.", "The section reveals {}.", "In this field we see {}.", "The main feature is {}.")
GUESSES = ("The findings are consistent with {}.", "The features suggest {}.", "This may represent {}.", "The appearance favours {}.",
           "These findings point to {}.")
ASIDES = ("A tissue fold is noted.", "The section is stained with hematoxylin and eosin.", "The focus is slightly uneven.",
          "Clinical correlation is advised.", "A small vessel is seen.", "No necrosis is identified.")
FAMILIES = {name: family for family in (ARCHITECTURES, CYTOLOGIES, STROMAS, LYMPHOCYTES) for name in family}
ALL_DIAGNOSES = tuple(name for row in DIAGNOSES for name in row)


def caption(rng, level, truth, miss=0.3, wrong=0.1):
    """One noisy caption of a node, as an automatic captioner might write it: what is visible at that magnification.

    level: 0..3 for 5x, 10x, 20x, 40x. truth: `tissue` (dominating class), `fat` (fraction), the facts of the slide, with
    `architecture`, `cytology`, `diagnosis` None where the node is not mostly tumour. Each fact is left out with
    probability `miss` and, where told, another of its kind is told instead with probability `wrong`; with that
    probability an irrelevant remark is added too. Never empty.
    """
    pick = lambda options: options[int(rng.random() * len(options))]  # noqa: E731  (ten times faster than rng.choice)

    def told(name, family):
        return pick([other for other in family if other != name]) if rng.random() < wrong else name

    seen, guess = [], None
    if truth["diagnosis"] is None:
        seen.append(pick(WORDS[truth["tissue"]]))  # the one thing there is to say is always said
        visible = {"stroma": ("stroma", "lymphocytes")}.get(truth["tissue"], ())
    else:
        visible = ("architecture", "stroma") if level < 2 else ("cytology", "lymphocytes")
        if rng.random() >= miss:
            guess = told(truth["diagnosis"], ALL_DIAGNOSES)
        if level < 2 and truth["fat"] > 0.1 and rng.random() >= miss:
            seen.append(pick(WORDS["surroundings"]))
    for fact in visible:
        if rng.random() >= miss:
            seen.insert(0, pick(WORDS[told(truth[fact], FAMILIES[truth[fact]])]))
    sentences = []
    if seen:
        first = ", ".join(seen[:-1]) + " and " + seen[-1] if len(seen) > 1 else seen[0]
        sentences.append(pick(OPENERS).format(first))
    if guess:
        sentences.append(pick(GUESSES).format(guess))
    if not sentences or rng.random() < wrong:
        sentences.append(pick(ASIDES))
    return " ".join(sentences)


# rows and columns of the 85 nodes within their level; the children of node n are 4n+1 .. 4n+4, row by row
ROW, COL = np.zeros(85, int), np.zeros(85, int)
for _n in range(1, 85):
    ROW[_n], COL[_n] = 2 * ROW[(_n - 1) // 4] + (_n - 1) % 4 // 2, 2 * COL[(_n - 1) // 4] + (_n - 1) % 2
LEVEL = np.repeat([0, 1, 2, 3], [1, 4, 16, 64])


def node_tissues(tissue, tumour, x, y, side):
    """Truth of the 85 nodes of the bag at (x, y), in level-0 pixels -> tissue seen, float [85, 4], and tumour, float [85].

    Tumour is the fraction of the node that lies in the tumour, and none where hardly any tumour cell is in sight: in the
    middle of a large lumen nobody can tell.
    """
    at = (np.arange(64) + 0.5) * side / 64  # 64 x 64 samples of the maps: 8 x 8 in the smallest node
    rows, cols = ((y + at) // CELL).astype(int), ((x + at) // CELL).astype(int)
    inside = ((rows >= 0) & (rows < tissue.shape[0]))[:, None] & ((cols >= 0) & (cols < tissue.shape[1]))
    window = np.ix_(rows.clip(0, tissue.shape[0] - 1), cols.clip(0, tissue.shape[1] - 1))
    seen = np.where(inside, tissue[window], TISSUES.index("glass"))
    maps = np.dstack([seen[..., None] == np.arange(len(TISSUES)), inside & tumour[window]]).astype(float)
    nodes = []
    for level in range(4):
        k = 2**level
        means = maps.reshape(k, 64 // k, k, 64 // k, -1).mean((1, 3))
        nodes.append(means[ROW[LEVEL == level], COL[LEVEL == level]])
    nodes = np.concatenate(nodes)
    return nodes[:, :4], np.where(nodes[:, 0] >= 0.2, nodes[:, 4], 0.0)


def describe(shards_dir, slides_dir, seed, miss=0.3, wrong=0.1):
    """Write captions and truth for every node of every bag beside each shard `bags-*.tar`.

    `bags-000000.captions.jsonl` has one line {"key", "node", "caption"} per node, `bags-000000.truth.jsonl` one line
    {"key", "node", "slide", "tissue", "tumour", "architecture", "cytology", "diagnosis"}, the last three null where
    tumour covers less than three quarters of the node: a mixed field is only called an edge. Shards that have both are
    skipped. Captions depend on [seed, key] alone.
    """
    shards = sorted(Path(shards_dir).glob("bags-*.tar"))
    if not shards:
        raise ValueError(f"no bags-*.tar in {shards_dir}: cut slides into bags first")
    truths = {}
    for shard in tqdm(shards, desc="captions", unit="shard"):
        captions_path, truth_path = shard.with_suffix(".captions.jsonl"), shard.with_suffix(".truth.jsonl")
        if captions_path.exists() and truth_path.exists():
            continue
        captions, truth_lines = [], []
        with tarfile.open(shard) as tar:
            bags = [(m.name[:-5], json.load(tar.extractfile(m))) for m in tar if m.name.endswith(".json")]
        for key, bag in bags:
            slide = Path(bag["slide"]).stem
            if slide not in truths:
                truths[slide] = read_truth(Path(slides_dir) / f"{slide}.svs")
            known, tissue, tumour = truths[slide]
            seen, inside = node_tissues(tissue, tumour, bag["x"], bag["y"], bag["side"])
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            for node, (parts, share) in enumerate(zip(seen.tolist(), inside.tolist())):
                node_truth = {**known, "tissue": "tumour", "fat": parts[2]}
                if share < 0.75:
                    node_truth.update(architecture=None, cytology=None, diagnosis=None, tissue=TISSUES[parts.index(max(parts))])
                text = caption(rng, int(LEVEL[node]), node_truth, miss, wrong)
                captions.append(json.dumps({"key": key, "node": node, "caption": text}))
                line = {"key": key, "node": node, "slide": bag["slide"], "tissue": node_truth["tissue"], "tumour": round(share, 4)}
                line.update((name, node_truth[name]) for name in ("architecture", "cytology", "diagnosis"))
                truth_lines.append(json.dumps(line))
        atomically(truth_path, lambda f: f.write(("\n".join(truth_lines) + "\n").encode()))
        atomically(captions_path, lambda f: f.write(("\n".join(captions) + "\n").encode()))


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def show(path, seed):
    """Draw one 512-px region per architecture (row) and cytology (column), and one 40x patch of each on the right."""
    rows = []
    for a, architecture in enumerate(ARCHITECTURES):
        wide, close = [], []
        for c in range(4):
            index = 4 * a + c
            rng = np.random.default_rng([seed, index, 2])
            image, _, _ = paint(rng, facts(seed, index), 1024, np.zeros((64, 64), np.uint8))
            region = Image.fromarray(image[256:768, 256:768])
            wide.append(np.asarray(region.resize((256, 256), Image.BOX)))
            close.append(np.asarray(region.crop((192, 192, 320, 320)).resize((256, 256), Image.BICUBIC)))
        rows.append(np.concatenate(wide + close, 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def write_masks(folder):
    """For every finished slide of a folder STEM.mask.png, its tissue map (value = number in TISSUES), and masks.csv: what `evaluate.py segment` reads -> their number."""
    lines = ["file,mask"]
    for path in sorted(Path(folder).glob("*.svs")):
        tissue, mask = read_truth(path)[1], path.with_suffix(".mask.png")
        atomically(mask, lambda f: Image.fromarray(tissue).save(f, format="PNG"))
        lines.append(f"{path.name},{mask.name}")
    atomically(Path(folder) / "masks.csv", lambda f: f.write("\n".join([*lines, ""]).encode()))
    return len(lines) - 1


def main():
    parser = argparse.ArgumentParser(description="Make synthetic H&E slides (SVS) whose truth is known.")
    parser.add_argument("out", help="folder for the slides")
    parser.add_argument("--slides", type=int, default=8, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same slides")
    parser.add_argument("--first", type=int, default=0, help="index of the first slide")
    parser.add_argument("--size", type=int, default=2048, help="side in level-0 pixels")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--masks", action="store_true", help="write the tissue maps of all slides of the folder as PNGs, too, with a masks.csv")
    parser.add_argument("--show", metavar="PNG", help="draw every pair of facts")
    args = parser.parse_args()
    if args.show:
        show(args.show, args.seed)
    make_slides(args.out, args.slides, args.seed, args.first, args.size, args.workers)
    if args.masks:
        print(f"{write_masks(args.out)} masks, {args.out}/masks.csv")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command to go on")
