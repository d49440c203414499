"""Paint H&E slides whose truth is known: procedural tissue as real pyramidal SVS files.

A tumour has two independent facts, and its diagnosis is their pair. No single magnification
shows both:

    architecture   how the tissue is arranged    needs a wide field:  5x, 10x, hardly 20x, 40x
    cytology       what one cell looks like      needs fine pixels:   20x, 40x, hardly 5x, 10x

Two devices keep it so (dev/leaks.py measures both with a small supervised network):

1. Architecture is how much of three tissues there is, and how they lie (ARRANGEMENTS). Both
   repeat every 256 level-0 pixels, the side of a 10x field. So every 10x field holds one whole
   unit, wherever it lies. A 20x field is a quarter of a unit and may hold anything.
2. Cells are hybrid images [1]. All cell types share the low spatial frequencies. They differ
   in shape and colour only above the resolution of 10x. Blending is linear and hardly ever
   clips, so averaging removes the difference. An uneven stain hides what is left of it at 10x.

All else (stain, blur, nuclei, stroma, lymphocytes, fat) varies per slide whatever the diagnosis. A
slide depends on (seed, index) alone. Lengths are level-0 pixels of 0.25 um (40x), images uint8
[H, W, 3]. prepare/world.py writes the files.

[1] Oliva, Torralba & Schyns, "Hybrid images", 2006.
"""

import io
import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

# ---- Facts: what is true of a slide --------------------------------------------------------------

ARCHITECTURES = ("glands", "nests", "trabeculae", "papillae", "sheets")
CYTOLOGIES = ("small round", "vesicular", "spindle", "signet ring")
STROMAS = ("fibrous", "myxoid")
LYMPHOCYTES = ("few", "many")

# The classes of the tissue map. A pixel of the map holds the position in this tuple.
TISSUES = ("tumour", "stroma", "fat", "glass")

# DIAGNOSES[architecture][cytology]. The terms are real so that a real tokenizer meets real words;
# the pairing is invented. No term repeats a word of its facts, which would give them away.
DIAGNOSES = (
    ("prostatic adenocarcinoma", "cholangiocarcinoma", "nephroblastoma", "Krukenberg tumour"),
    ("carcinoid", "paraganglioma", "melanoma", "chordoma"),
    ("insulinoma", "hepatocellular carcinoma", "schwannoma", "linitis plastica"),
    ("ependymoma", "serous carcinoma", "mesothelioma", "pseudomyxoma peritonei"),
    ("Ewing sarcoma", "seminoma", "leiomyosarcoma", "liposarcoma"),
)

# In pixels: a square of the tissue map, and a unit of an arrangement.
CELL = 16
UNIT = 256

# First the shares of epithelium, lumen and stroma in a unit: five points around (.50 .25 .25), as
# far apart as five can be. Then the habit: the height of each tissue on two crossed waves. Glands
# have lumen on the crests and stroma in the troughs, papillae the reverse. Trabeculae follow one
# of the waves. Sheets have no habit.
ARRANGEMENTS = {
    "glands": ((0.54, 0.33, 0.13), ((0, 0), (1, 1), (-1, -1))),
    "nests": ((0.54, 0.13, 0.33), ((1, 1), (0, 0), (-1, -1))),
    "trabeculae": ((0.40, 0.24, 0.36), ((1.4, 0), (0, 0), (-1.4, 0))),
    "papillae": ((0.40, 0.36, 0.24), ((0, 0), (-1, -1), (1, 1))),
    "sheets": ((0.62, 0.19, 0.19), ((0, 0), (0, 0), (0, 0))),
}
# The share of the habit in what is laid out. The rest is random.
HABIT = 0.5

# The detail of a cell: its rms contrast in grey levels, then the (haematoxylin, eosin) taken up
# where the detail is positive and where it is negative. Averaging to 10x removes all of it. Drawn
# are dark nuclei; pink nucleoli in blue nuclei; pink fibrils; clear vacuoles with dark crescents.
DETAIL = {
    "small round": (15, (1.5, 0.2), (0.3, 0.2)),
    "vesicular": (18, (0.2, 1.6), (1.3, 0.0)),
    "spindle": (20, (0.0, 1.9), (0.45, 0.1)),
    "signet ring": (25, (0.0, 0.0), (1.5, 0.2)),
}


def facts(seed, index):
    """Return the facts of slide `index`. Any 20 consecutive slides hold each diagnosis once."""
    row, column = divmod(index % 20, 4)
    rng = np.random.default_rng([seed, index, 0])
    return {
        "architecture": ARCHITECTURES[row],
        "cytology": CYTOLOGIES[column],
        "diagnosis": DIAGNOSES[row][column],
        "stroma": STROMAS[rng.integers(2)],
        "lymphocytes": LYMPHOCYTES[rng.integers(2)],
    }


# ---- Layers: where each tissue lies --------------------------------------------------------------
def enlarge(field, n):
    """Resample a float field [h, w] smoothly to float32 [n, n]."""
    image = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(image.resize((n, n), Image.BICUBIC))


def noise(rng, n, waves):
    """Draw smooth noise [n, n] of unit variance at its knots, with about `waves` knots across."""
    knots = max(2, round(waves)) + 1
    return enlarge(rng.standard_normal((knots, knots)), n)


def lattice(rng, y, x, pitch):
    """Measure the distance of points y, x [n, n] to the nearest centre of a hexagonal lattice."""
    top = np.floor(y.min() / pitch) - 2
    left = np.floor(x.min() / pitch) - 2
    rows = int((y.max() / pitch - top) / 0.866) + 4
    cols = int(x.max() / pitch - left) + 4
    at_row, at_col = np.mgrid[0:rows, 0:cols].astype(np.float32)
    centre_y = (at_row * 0.866 + top) * pitch
    centre_x = (at_col + 0.5 * (at_row % 2) + left) * pitch
    centre_y += rng.uniform(-0.1, 0.1, centre_y.shape) * pitch
    centre_x += rng.uniform(-0.1, 0.1, centre_x.shape) * pitch
    best = np.full_like(y, np.inf)
    for v, u in zip(centre_y.flat, centre_x.flat, strict=True):
        best = np.minimum(best, (y - v) ** 2 + (x - u) ** 2)
    return np.sqrt(best)


def arrange(rng, name, size):
    """Lay out an architecture as two signed fields, float32 [2, size / 8, size / 8].

    Epithelium is where the first is positive. Elsewhere lumen is where the second is positive,
    and stroma where it is not. Both rise by about one a pixel.
    """
    # Sum waves with one period in a unit for each tissue: cosine or sine [2], tissue [3],
    # direction [4]. The highest tissue is seen.
    shares, habit = ARRANGEMENTS[name]
    waves = rng.standard_normal((2, 3, 4)) * (1, 1, 0.5, 0.5)
    waves = (1 - HABIT) * (waves - waves.mean(1, keepdims=True))
    waves[0, :, :2] += HABIT * np.array(habit)
    # Equal power gives all slides equally sharp edges.
    waves /= np.sqrt((waves**2).sum((0, 2)).mean())

    def heights(u, v):
        # Epithelium above the higher of the others, and lumen above stroma, at the phases u, v.
        phases = np.stack([u, v, u + v, u - v])
        cosines = np.tensordot(waves[0], np.cos(phases), 1)
        epithelium, lumen, stroma = cosines + np.tensordot(waves[1], np.sin(phases), 1)
        return epithelium - np.maximum(lumen, stroma), lumen - stroma

    # Choose the thresholds, so that one unit holds exactly the shares of the table.
    phase = 2 * np.pi * np.arange(64) / 64
    wall, core = heights(*np.meshgrid(phase, phase))
    wall_cut = np.quantile(wall, 1 - shares[0])
    core_cut = np.quantile(core[wall <= wall_cut], shares[2] / (shares[1] + shares[2]))
    # Bend the plane: slide whole columns along themselves, which keeps the period of each.
    m = size // 8
    y, x = np.mgrid[0:m, 0:m].astype(np.float32) * 8
    y = y + 60 * noise(rng, m, size / 300)[0]
    y = y + 8 * noise(rng, m, size / 150)
    x = x + 8 * noise(rng, m, size / 150)
    if rng.random() >= 0.5:
        y, x = y.T, x.T
    u = 2 * np.pi * (y / UNIT + rng.uniform())
    v = 2 * np.pi * (x / UNIT + rng.uniform())
    wall, core = heights(u, v)
    fields = np.stack([wall - wall_cut, core - core_cut])
    return UNIT / (2 * np.pi) * fields.astype(np.float32)


def regions(rng, size):
    """Draw the tissue map uint8 [size / 16, size / 16]: mostly tumour, some of all others."""
    n = size // CELL
    # Raise the glass towards the border, because a section ends before its slide does.
    edge = np.minimum(np.arange(n), np.arange(n)[::-1]) * CELL
    glass = noise(rng, n, size / 800) + 2.5 * np.exp(-np.minimum.outer(edge, edge) / 30.0)
    other = noise(rng, n, size / 700)
    tissue = np.zeros((n, n), np.uint8)
    tissue[other > np.quantile(other, 1 - rng.uniform(0, 0.12))] = TISSUES.index("fat")
    tissue[other < np.quantile(other, rng.uniform(0, 0.12))] = TISSUES.index("stroma")
    tissue[glass > np.quantile(glass, 1 - rng.uniform(0, 0.10))] = TISSUES.index("glass")
    return tissue


def lay(rng, architecture, tissue, size, n):
    """Turn a tissue map [size / 16, size / 16] and an architecture into soft masks [n, n].

    They are epithelium, stroma, fat, glass and empty, each in [0, 1].
    """

    def soft(field, width):
        return np.clip(enlarge(field, n) / width + 0.5, 0, 1)

    kinds = [TISSUES.index(name) for name in ("tumour", "fat", "glass")]
    tumour, fat, glass = (soft((tissue == kind) - 0.5, 0.3) for kind in kinds)
    epithelium, lumen = arrange(rng, architecture, size)
    epithelium = soft(epithelium, 4.0) * tumour
    lumen = soft(lumen, 4.0) * tumour * (1 - epithelium)
    # Fill fat with empty, thin-walled cells.
    m = size // 8
    y, x = np.mgrid[0:m, 0:m].astype(np.float32) * 8
    wobble = 10 * noise(rng, m, size / 80)
    vacuole = soft(33 - lattice(rng, y + wobble, x + wobble, 78.0), 5.0) * fat
    empty = np.maximum(np.maximum(lumen, vacuole), glass)
    stroma = np.clip(1 - epithelium - empty, 0, 1)
    return SimpleNamespace(epithelium=epithelium, stroma=stroma, fat=fat, glass=glass, empty=empty)


# ---- Ground: the colours under the nuclei --------------------------------------------------------
def draw_look(rng):
    """Draw how a slide was cut, stained and scanned, whatever it shows. Colours are [3]."""
    look = SimpleNamespace()
    look.haematoxylin = np.array([0.65, 0.70, 0.29]) + rng.normal(0, 0.03, 3)
    look.haematoxylin *= rng.uniform(1.0, 1.4)
    look.eosin = (np.array([0.10, 0.90, 0.20]) + rng.normal(0, 0.03, 3)).clip(0.02)
    look.eosin *= rng.uniform(0.7, 1.0)
    look.white = 244 * rng.uniform(0.94, 1.0, 3)
    look.diameter = rng.uniform(8.8, 10.6)
    look.pitch = rng.uniform(11.5, 14.0)
    look.blur = rng.uniform(0, 0.4)
    look.basophilia = rng.uniform(0.3, 0.5)
    look.mottle = rng.uniform(0.15, 0.3)
    return look


def stained_ground(rng, layers, look, stroma, size):
    """Stain the layers and shine light through -> uint8 [size, size, 3], no nuclei yet."""
    n = len(layers.epithelium)
    fibres = noise(rng, n, size / 14) * 0.6 + noise(rng, n, size / 40)
    grain = noise(rng, n, size / 8) + noise(rng, n, size / 16)
    # Add noise at the scale of 10x, which hides what averaging leaves of the cells.
    fine = rng.standard_normal((2, n, n), np.float32)
    fine = fine * rng.uniform(0.05, 0.35, (2, 1, 1)).astype(np.float32)
    # Mix the two stains: haematoxylin and eosin taken up at each point.
    h = look.basophilia * layers.epithelium * (1 + look.mottle * grain + fine[0])
    h = h + 0.07 * layers.stroma
    e = 0.45 * layers.epithelium * (1 + look.mottle * grain + fine[1])
    if stroma == "fibrous":
        e = e + layers.stroma * (0.80 + 0.14 * fibres)
    else:
        e = e + layers.stroma * (0.36 + 0.10 * fibres)
        h = h + 0.10 * layers.stroma
    h = np.maximum(h, 0)
    e = np.maximum(e, 0)
    # Absorb light, brighter on one side of the slide (Beer-Lambert).
    light = 1 - rng.uniform(0, 0.08) * np.linspace(-1, 1, n)[:, None] * rng.choice([-1, 1])
    ground = np.empty((n, n, 3), np.uint8)
    for c in range(3):
        absorbed = np.exp(-h * look.haematoxylin[c] - e * look.eosin[c])
        ground[..., c] = (look.white[c] * light * absorbed).clip(0, 255)
    return np.asarray(Image.fromarray(ground).resize((size, size), Image.BILINEAR))


# ---- Cells: small pictures that a low resolution cannot tell apart -------------------------------

# Cells that are one ellipse: how strongly they cover, their length and width in diameters.
PLAIN = {
    "small round": (1.0, 0.55, 0.52),
    "spindle": (1.0, 1.9, 0.32),
    "lymphocyte": (1.1, 0.6, 0.6),
    "fibroblast": (0.7, 1.5, 0.3),
}


def draw_cells(kind, p, q, d):
    """Draw cells of `kind`, d [M, 1, 1] pixels wide; p, q [M, n, n] lie along and across them."""

    def ellipse(long, short, at=0.0):
        # 1 inside, 0 outside, a slope of one pixel between.
        r = np.hypot((p - at) / long, q / short) * 2
        return np.clip((1 - r) * short / 2 + 0.5, 0, 1)

    if kind == "vesicular":
        rim = ellipse(1.15 * d, 1.08 * d) - ellipse(1.15 * d - 4, 1.08 * d - 4)
        return ellipse(0.5 * d, 0.5 * d) - 0.5 * rim
    if kind == "signet ring":
        vacuole = ellipse(0.62 * d, 0.62 * d, at=0.25 * d)
        hole = ellipse(0.8 * d, 0.8 * d, at=0.25 * d)
        crescent = ellipse(1.1 * d, 1.1 * d) * (1 - hole) * (p < 0.2 * d)
        return 1.2 * vacuole - 1.1 * crescent
    strength, long, short = PLAIN[kind]
    return strength * ellipse(long * d, short * d)


def sprites(rng, kind, diameter, angles, blur):
    """Picture cells turned by angles [M] -> float32 [M, n, n, 2].

    The first channel says how much of the nuclear colour covers, the second is the detail.
    """
    n = 2 * int(1.6 * diameter) + 1
    # Draw an offset of half a pixel and a size for each, so that no two are alike.
    angle = np.asarray(angles)[:, None, None]
    lot = rng.random((len(angles), 3))[..., None, None]
    y, x = np.mgrid[0:n, 0:n][:, None] - n // 2 + lot[:, :2].swapaxes(0, 1) - 0.5  # [M, n, n]
    p = x * np.cos(angle) + y * np.sin(angle)
    q = y * np.cos(angle) - x * np.sin(angle)
    cells = draw_cells(kind, p, q, diameter * (0.92 + 0.16 * lot[:, 2]))
    layers = [cells]
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    # Join low frequencies of one blob with the high ones of a tumour cell, at unit rms [1]. 10x
    # holds up to 0.125 cycles a pixel, and averaging 4 x 4 pixels leaves nothing of 0.25.
    if kind in CYTOLOGIES:
        blob = 0.55 * np.exp(-(x * x + y * y) / (2 * (0.32 * diameter) ** 2))
        gain = 1 / (1 + (frequency / 0.24) ** 16)
        low = np.fft.irfft2(np.fft.rfft2(blob) * gain, (n, n))
        high = np.fft.irfft2(np.fft.rfft2(cells) * (1 - gain), (n, n))
        layers = [low, high / np.sqrt(np.mean(high**2, (1, 2), keepdims=True))]
    pictures = np.zeros((*cells.shape, 2), np.float32)
    blurring = np.exp(-2 * (np.pi * blur * frequency) ** 2)
    for channel, layer in enumerate(layers):
        pictures[..., channel] = np.fft.irfft2(np.fft.rfft2(layer) * blurring, (n, n))
    return pictures


def stamp(canvas, rng, kind, points, angles, look):
    """Add a cell of `kind` at each of points [N, 2] (y, x), turned by angles [N], to the canvas.

    canvas float32 [H, W, 2], the two channels of `sprites`. Cells at the border are left out.
    """
    # Draw 4 variants at 16 angles once; use the nearest angle for each cell.
    each = np.repeat(2 * np.pi * np.arange(16) / 16, 4)
    bank = sprites(rng, kind, look.diameter, each, look.blur)
    n = bank.shape[1]
    inside = ((points >= n) & (points < len(canvas) - n)).all(1)
    turn = np.rint(angles[inside] * 16 / (2 * np.pi)).astype(int) % 16
    corner = np.rint(points[inside]).astype(int) - n // 2
    # No two nuclei take the stain alike.
    strength = rng.uniform(0.7, 1.3, len(corner)).astype(np.float32)
    sprite = 4 * turn + rng.integers(0, 4, len(corner))
    for (y, x), k, s in zip(corner.tolist(), sprite.tolist(), strength.tolist(), strict=True):
        canvas[y : y + n, x : x + n] += s * bank[k]


def scatter(rng, size, pitch, jitter=0.25):
    """Draw points [N, 2] of a jittered hexagonal lattice over a square of `size` pixels."""
    y, x = np.mgrid[0 : int(size / pitch / 0.866) + 1, 0 : int(size / pitch) + 1]
    points = np.stack([0.866 * y.ravel(), (x + 0.5 * (y % 2)).ravel()], 1)
    return (points + rng.uniform(-jitter, jitter, points.shape)) * pitch


def plant_cells(rng, layers, look, truth, size):
    """Place tumour cells, fibroblasts and lymphocytes -> canvas float32 [size, size, 2]."""
    n = len(layers.epithelium)
    canvas = np.zeros((size, size, 2), np.float32)

    def at(field, points):
        place = (points.T / (size // n)).astype(int).clip(0, n - 1)
        return field[place[0], place[1]]

    # Turn neighbouring spindle cells alike, all other tumour cells at random.
    swirl = noise(rng, n, size / 300) * 1.5 + rng.uniform(0, np.pi)
    points = scatter(rng, size, look.pitch)
    points = points[at(layers.epithelium, points) > 0.85]
    angles = at(swirl, points) + rng.normal(0, 0.25, len(points))
    if truth["cytology"] != "spindle":
        angles = rng.uniform(0, 2 * np.pi, len(points))
    stamp(canvas, rng, truth["cytology"], points, angles, look)
    # Put fibroblasts into the stroma.
    points = scatter(rng, size, 34.0)
    points = points[(at(layers.stroma, points) > 0.6) & (rng.random(len(points)) < 0.6)]
    stamp(canvas, rng, "fibroblast", points, at(swirl, points) + 0.5, look)
    # Put lymphocytes there, too, in crowds.
    points = scatter(rng, size, 15.0, 0.5)
    crowd = noise(rng, n, size / 120)
    share = 0.03 if truth["lymphocytes"] == "few" else 0.25
    kept = rng.random(len(points)) < share
    points = points[kept & (at(layers.stroma, points) > 0.7) & (at(crowd, points) > 0)]
    stamp(canvas, rng, "lymphocyte", points, np.zeros(len(points)), look)
    return canvas


# ---- The slide -----------------------------------------------------------------------------------
def blend(rng, ground, cells, look, cytology):
    """Blend cells [H, W, 2] linearly into the ground, uint8 [H, W, 3] -> uint8 [H, W, 3]."""

    def colour(h, e):
        return look.white * np.exp(-h * look.haematoxylin - e * look.eosin)

    nucleus = colour(1.5, 0.25)
    contrast, plus, minus = DETAIL[cytology]
    hue = colour(*plus) - colour(*minus)
    hue *= contrast / np.linalg.norm(hue)
    image = np.empty_like(ground)
    cover, detail = np.moveaxis(cells, -1, 0)
    dust = rng.integers(-4, 5, ground.shape[:2], dtype=np.int8)
    for c in range(3):
        channel = ground[..., c].astype(np.float32)
        channel += cover * (np.float32(nucleus[c]) - channel) + detail * np.float32(hue[c])
        image[..., c] = np.clip(channel + dust, 0, 255)
    return image


def paint(rng, truth, size, tissue=None):
    """Paint one slide from its facts -> image uint8 [size, size, 3] and two maps.

    Both have a pixel for a square of 16 x 16. The first holds the tissue seen, a position in
    TISSUES (lumen is glass). The second is True in tumour, its own stroma and lumens included.
    `tissue` overrides the drawn regions.
    """
    # Mix colours on a grid 4 times coarser, because they vary slowly. Only nuclei need every pixel.
    n = size // 4
    if tissue is None:
        tissue = regions(rng, size)
    look = draw_look(rng)
    layers = lay(rng, truth["architecture"], tissue, size, n)
    ground = stained_ground(rng, layers, look, truth["stroma"], size)
    cells = plant_cells(rng, layers, look, truth, size)
    image = blend(rng, ground, cells, look, truth["cytology"])
    # Name each square after the layer that covers most of it.
    k = CELL * n // size
    stroma = layers.stroma * (1 - layers.fat)
    fat = layers.fat * (1 - layers.glass)
    empty = layers.empty * (1 - layers.fat)
    seen = np.stack([layers.epithelium, stroma, fat, empty])
    seen = seen.reshape(4, n // k, k, n // k, k).mean((2, 4)).argmax(0).astype(np.uint8)
    return image, seen, tissue == TISSUES.index("tumour")


def encode_svs(image):
    """Encode image uint8 [H, W, 3] as Aperio does -> bytes of a pyramidal TIFF."""
    import tifffile

    height, width = image.shape[:2]
    head = f"Aperio Image Library v12.0.0 \r\n{width}x{height} [0,0 {width}x{height}] (256x256)"
    quality = "JPEG/RGB Q=85"
    tail = "|AppMag = 40|MPP = 0.25"
    jpeg = dict(photometric="rgb", compression="jpeg", compressionargs={"level": 85})
    jpeg |= dict(metadata=None, maxworkers=1)
    tiles, strips = dict(tile=(256, 256)), dict(rowsperstrip=16)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(image, description=f"{head} {quality}{tail}", **tiles, **jpeg)
        # Aperio puts a stripped thumbnail before the levels that are reduced 4 and 16 times.
        for k, layout, kind in ((16, strips, "- "), (4, tiles, quality), (16, tiles, quality)):
            small = np.asarray(Image.fromarray(image).reduce(k))
            about = f"{head} -> {small.shape[1]}x{small.shape[0]} {kind}{tail}"
            tiff.write(small, description=about, **layout, **jpeg)
    return file.getvalue()


def paint_slide(seed, index, size):
    """Paint slide `index`, `size` pixels a side -> bytes of its SVS file and of its truth.

    The truth is an .npz file of `facts` (JSON) and the maps `tissue` and `tumour` of `paint`.
    """
    if size < 512 or size % 256:
        raise ValueError(f"slide size {size} is not a multiple of 256 of at least 512")
    truth = facts(seed, index)
    image, tissue, tumour = paint(np.random.default_rng([seed, index, 1]), truth, size)
    made = {"seed": seed, "index": index, "size": size, **truth}
    file = io.BytesIO()
    np.savez_compressed(file, facts=json.dumps(made), tissue=tissue, tumour=tumour)
    return encode_svs(image), file.getvalue()
