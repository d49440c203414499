"""Make the built-in world: painted slides, bags, captions and truth, as a lab would bring them.

    python -m prepare.world                             # data/synthetic, in about a minute
    python -m prepare.world DIR --train 40 --test 20    # a smaller one
    python -m prepare.world DIR --masks                 # also tissue maps, for protocols.segment
    python -m prepare.world --show world.png            # only draw every pair of facts

    DIR/slides/         slide-0000.svs ... and their truth (prepare/paint.py)
    DIR/train/ test/    shards of different slides, captions and truth beside them
    DIR/classes.json    what evaluate.py asks for: the facts, the names of their classes, templates
    DIR/words.pt        a text tower that has read the captions (prepare/words.py)

A caption says what is visible at the magnification of its node, with gaps and errors, as an
automatic captioner does. Every stage skips finished files, so the same command continues.
"""

import argparse
import functools
import json
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import data
from prepare import paint
from prepare.paint import ARCHITECTURES, CELL, CYTOLOGIES, LYMPHOCYTES, STROMAS, TISSUES
from prepare.tile import run_jobs, tile
from prepare.words import write_words


def read_table(lines):
    """Read lines of `name: one | two | three` -> {name: (one, two, three)}."""
    table = {}
    for line in lines.strip().splitlines():
        name, options = line.split(": ")
        table[name] = tuple(option.strip() for option in options.split("|"))
    return table


# How captions word each fact.
WORDS = read_table("""
glands: well-formed glands | crowded glands | glands around open lumina
nests: solid nests | rounded nests | nests of cells
trabeculae: parallel trabeculae | branching trabeculae | trabeculae and long cords
papillae: papillary fronds | slender papillary projections | papillary structures with cores
sheets: diffuse sheets | solid sheets | sheets without structure
small round: small round dark nuclei | small round blue cells | uniform small round cells
vesicular: large vesicular nuclei | vesicular nuclei with prominent nucleoli \
    | pale vesicular chromatin
spindle: spindle cells | elongated spindle nuclei | slender spindle cells
signet ring: signet ring cells | signet ring cells with mucin vacuoles \
    | vacuolated signet ring cells
fibrous: dense fibrous stroma | collagenous stroma | pink fibrous tissue
myxoid: loose myxoid stroma | a pale myxoid background | oedematous myxoid tissue
few: few lymphocytes | little inflammation | sparse lymphocytes
many: many lymphocytes | a dense lymphocytic infiltrate | marked chronic inflammation
tumour: the edge of a tumour | the border of a lesion | the margin of a neoplasm
stroma: stroma only | connective tissue without tumour | benign stroma with scattered fibroblasts
fat: mature adipose tissue | fat cells with clear vacuoles | adipocytes with thin septa
glass: blank background | empty glass without tissue | a white background
surroundings: surrounding adipose tissue | adjacent fat | fat at the edge of the field
""")
SENTENCES = read_table("""
opener: The image primarily showcases {}. | This photomicrograph shows {}. | The image shows {}. \
    | There is evidence of {}. | The histopathology image displays {}. \
    | The section reveals {}. | In this field we see {}. | The main feature is {}.
guess: The findings are consistent with {}. | The features suggest {}. | This may represent {}. \
    | The appearance favours {}. | These findings point to {}.
remark: A tissue fold is noted. | The section is stained with hematoxylin and eosin. \
    | The focus is slightly uneven. | Clinical correlation is advised. \
    | A small vessel is seen. | No necrosis is identified.
template: {} | The image shows {}. | This photomicrograph shows {}. \
    | A histopathology image of {}. | Microscopy reveals {}. | The field displays {}. | {} is seen.
""")
ALL_DIAGNOSES = sum(paint.DIAGNOSES, ())
FAMILIES = {"architecture": ARCHITECTURES, "cytology": CYTOLOGIES}
FAMILIES |= {"stroma": STROMAS, "lymphocytes": LYMPHOCYTES}

# Names of the classes for evaluation, the first as the keywords of CVTA are written.
NAMES = read_table("""
glands: well-formed gland | crowded gland | glands around open lumina
nests: solid nest | rounded nest | nests of cells
trabeculae: parallel trabecula | branching trabecula | trabeculae and cords
papillae: papillary frond | slender papillary projection | papillary structures
sheets: diffuse sheet | solid sheet | sheets without structure
small round: small round dark nucleus | small round blue cell | uniform small round cells
vesicular: large vesicular nucleus | vesicular nucleus | vesicular chromatin
spindle: spindle cell | elongated spindle nucleus | slender spindle cells
signet ring: signet ring cell | vacuolated signet ring cell | signet ring cells with vacuoles
stroma: stroma only | connective tissue without tumour | benign stroma with scattered fibroblasts
fat: mature adipose tissue | fat cell with clear vacuole | adipocyte
glass: blank background | empty glass without tissue | white background
""")


# ---- Slides --------------------------------------------------------------------------------------
def read_slide_truth(path):
    """Read the truth beside a slide -> facts (dict), tissue uint8 [h, w], tumour bool [h, w]."""
    with np.load(Path(path).with_suffix(".truth.npz")) as file:
        return json.loads(str(file["facts"])), file["tissue"], file["tumour"]


def make_slides(folder, count, size=1024, workers=1):
    """Paint slides 0 .. count - 1 into a folder, finished ones skipped -> their paths.

    Each slide-0000.svs has a slide-0000.truth.npz, which is written first.
    """
    paths = [Path(folder) / f"slide-{i:04d}.svs" for i in range(count)]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    for path in paths:
        if path.exists() and read_slide_truth(path)[0]["size"] != size:
            raise ValueError(f"{path} is not of size {size}: choose another folder")
    painter = functools.partial(paint.paint_slide, 0, size=size)
    painted = run_jobs(painter, todo, workers, threads=1)
    bar = data.progress(painted, "slides", len(todo), unit="slide", disable=not todo)
    for i, (svs, truth) in zip(todo, bar, strict=True):
        data.write_whole(paths[i].with_suffix(".truth.npz"), truth)
        data.write_whole(paths[i], svs)
    return paths


# ---- Captions ------------------------------------------------------------------------------------
def pick(rng, options):
    """Draw one of the options, ten times faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def told(rng, name, family, wrong):
    """Return a name, or with probability `wrong` another of its family."""
    if rng.random() < wrong:
        return pick(rng, [other for other in family if other != name])
    return name


def say(rng, level, truth, miss=0.3, wrong=0.1):
    """Write one noisy caption of a node at level 0..3 (5x .. 40x), as a captioner might.

    truth: the facts of the slide, `tissue` (the dominating class) and `fat` (its fraction), with
    `diagnosis` None where the node is not mostly tumour. A fact is left out with probability
    `miss`. With probability `wrong` another of its kind is told instead.
    """
    seen, guess, visible = [], None, ()
    if truth["diagnosis"] is None:
        # Always name the tissue, because there is little else to say.
        seen.append(pick(rng, WORDS[truth["tissue"]]))
        if truth["tissue"] == "stroma":
            visible = ("stroma", "lymphocytes")
    else:
        visible = ("architecture", "stroma") if level < 2 else ("cytology", "lymphocytes")
        if rng.random() >= miss:
            guess = told(rng, truth["diagnosis"], ALL_DIAGNOSES, wrong)
        if level < 2 and truth["fat"] > 0.1 and rng.random() >= miss:
            seen.append(pick(rng, WORDS["surroundings"]))
    for fact in visible:
        if rng.random() >= miss:
            name = told(rng, truth[fact], FAMILIES[fact], wrong)
            seen.insert(0, pick(rng, WORDS[name]))

    sentences = []
    if seen:
        listed = " and ".join([", ".join(seen[:-1]), seen[-1]]) if len(seen) > 1 else seen[0]
        sentences.append(pick(rng, SENTENCES["opener"]).format(listed))
    if guess:
        sentences.append(pick(rng, SENTENCES["guess"]).format(guess))
    if not sentences or rng.random() < wrong:
        sentences.append(pick(rng, SENTENCES["remark"]))
    return " ".join(sentences)


def node_tissues(tissue, tumour, x, y, side):
    """Measure the 85 nodes of the bag at x, y, side (level-0 pixels) in the maps of its slide.

    Returns the fractions of the TISSUES seen [85, 4] and of the tumour [85]. A node with hardly
    any tumour cell in sight, inside a large lumen say, gets 0: nobody can tell there.
    """
    # Sample both maps at 64 x 64 points, 8 x 8 in the smallest node. Outside a slide is glass.
    margin = int(side // CELL) + 1
    at = (np.arange(64) + 0.5) * side / 64
    points = np.ix_(*(((start + at) // CELL).astype(int) + margin for start in (y, x)))
    tissue = np.pad(tissue, margin, constant_values=TISSUES.index("glass"))[points]
    tumour = np.pad(tumour, margin)[points]
    maps = np.dstack([tissue[..., None] == np.arange(len(TISSUES)), tumour]).astype(float)
    # Average the samples of each node.
    nodes = np.empty((data.NODES, maps.shape[2]))
    for level in range(4):
        k = 2**level
        means = maps.reshape(k, 64 // k, k, 64 // k, -1).mean((1, 3))
        here = data.LEVEL == level
        nodes[here] = means[data.ROW[here], data.COL[here]]
    return nodes[:, :4], np.where(nodes[:, 0] >= 0.2, nodes[:, 4], 0.0)


def describe_bag(key, slide, spot, known):
    """Write captions and truth of the 85 nodes of a bag -> two lists of JSON lines.

    spot: x, y and side of the bag; known: what read_slide_truth returns.
    """
    facts, tissue, tumour = known
    seen, inside = node_tissues(tissue, tumour, spot["x"], spot["y"], spot["side"])
    # A caption depends on its bag's key alone.
    rng = np.random.default_rng([0, zlib.crc32(key.encode())])
    captions, truths = [], []
    for node, (parts, share) in enumerate(zip(seen.tolist(), inside.tolist(), strict=True)):
        truth = {**facts, "tissue": "tumour", "fat": parts[TISSUES.index("fat")]}
        # A mixed field has no diagnosis: it is only called an edge.
        if share < 0.75:
            truth["tissue"] = TISSUES[parts.index(max(parts))]
            truth.update(architecture=None, cytology=None, diagnosis=None)
        caption = say(rng, int(data.LEVEL[node]), truth)
        captions.append(json.dumps({"key": key, "node": node, "caption": caption}))
        line = {"key": key, "node": node, "slide": slide, "tissue": truth["tissue"]}
        line["tumour"] = round(share, 4)
        line |= {name: truth[name] for name in ("architecture", "cytology", "diagnosis")}
        truths.append(json.dumps(line))
    return captions, truths


def describe(folder, slides):
    """Write bags-*.captions.jsonl and bags-*.truth.jsonl beside each shard of a folder.

    slides: their folder. Shards that have both files are skipped.
    """
    bags = data.Bags(folder)
    for number, shard in enumerate(data.progress(bags.shards, "captions", unit="shard")):
        paths = (shard.with_suffix(".captions.jsonl"), shard.with_suffix(".truth.jsonl"))
        if all(path.exists() for path in paths):
            continue
        # All bags of a shard come from one slide.
        inside = np.flatnonzero(bags.shard_of == number)
        slide = bags.slides[inside[0]]
        known = read_slide_truth(Path(slides) / slide)
        found = [describe_bag(bags.keys[i], slide, bags.meta[i], known) for i in inside]
        for path, parts in zip(paths, zip(*found, strict=True), strict=True):
            data.write_whole(path, "\n".join([*sum(parts, []), ""]))


# ---- The folder ----------------------------------------------------------------------------------
def make_world(folder, train=300, test=60, size=1024, patch_px=64, words=200):
    """Make the whole world in a folder; what is finished is skipped.

    train, test: numbers of slides, many and small, because all patches of a slide share one stain
    and one diagnosis. size, patch_px: pixels a side of a slide, of a patch. words: steps of
    prepare.words for the model size `synthetic`, 0 for none.
    """
    folder = Path(folder)
    # To start a process takes as long as to paint 20 of these slides, or to tile 150.
    cores = min(8, os.cpu_count() or 1)
    workers = min(cores, 1 + (train + test) // 20)
    slides = make_slides(folder / "slides", train + test, size=size, workers=workers)
    for split, paths in (("train", slides[:train]), ("test", slides[train:])):
        workers = min(cores, 1 + len(paths) // 150)
        tile(paths, folder / split, patch_px=patch_px, fov_px=64, seed=0, workers=workers)
        describe(folder / split, folder / "slides")
    facts = {
        "architecture": {name: NAMES[name] for name in ARCHITECTURES},
        "cytology": {name: NAMES[name] for name in CYTOLOGIES},
        "diagnosis": {name: (name,) for name in ALL_DIAGNOSES},
    }
    classes = {"facts": facts, "templates": SENTENCES["template"]}
    data.write_whole(folder / "classes.json", json.dumps(classes, indent=1))
    if words and not (folder / "words.pt").exists():
        write_words(folder, folder / "words.pt", steps=words)


def write_masks(folder):
    """Write the tissue map of each slide as PNG, a masks.csv and a tissue.json, all in its folder.

    They are what `python -m protocols.segment MODEL --data masks.csv --classes tissue.json` reads.
    """
    lines = ["file,mask"]
    for path in data.progress(sorted(folder.glob("*.svs")), "masks", unit="slide"):
        _, tissue, _ = read_slide_truth(path)
        mask = path.with_suffix(".mask.png")
        data.write_whole(mask, functools.partial(Image.fromarray(tissue).save, format="PNG"))
        lines.append(f"{path.name},{mask.name}")
    data.write_whole(folder / "masks.csv", "\n".join([*lines, ""]))
    tumour = [NAMES[name][0] for name in (*ARCHITECTURES, *CYTOLOGIES)]
    names = {"tumour": tumour, **{name: NAMES[name] for name in TISSUES[1:]}}
    data.write_whole(folder / "tissue.json", json.dumps(names, indent=1))
    print(f"{len(lines) - 1} masks: {folder}/masks.csv and tissue.json")


def draw_facts(path):
    """Draw a region of each architecture (rows) and cytology (columns), and on the right a cell."""
    blank = np.zeros((1024 // CELL, 1024 // CELL), np.uint8)
    picture = Image.new("RGB", (8 * 256, 5 * 256))
    for index in range(20):
        row, column = divmod(index, 4)
        rng = np.random.default_rng([0, index, 2])
        image, _, _ = paint.paint(rng, paint.facts(0, index), 1024, blank)
        region = Image.fromarray(image[256:768, 256:768])
        cells = region.crop((192, 192, 320, 320)).resize((256, 256), Image.BICUBIC)
        picture.paste(region.resize((256, 256), Image.BOX), (256 * column, 256 * row))
        picture.paste(cells, (256 * (column + 4), 256 * row))
    data.write_whole(Path(path), functools.partial(picture.save, format="PNG"))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", nargs="?", default="data/synthetic", help="%(default)s")
    parser.add_argument("--train", type=int, default=300, help="slides to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=60, help="slides to test on (%(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="side of a slide (%(default)s px)")
    parser.add_argument("--patch-px", type=int, default=64, help="of a patch (%(default)s px)")
    parser.add_argument("--words", type=int, default=200, help="steps of words.pt; 0: no such file")
    parser.add_argument("--masks", action="store_true", help="write tissue maps beside the slides")
    parser.add_argument("--show", metavar="PNG", help="draw every pair of facts, and no more")
    args = parser.parse_args()
    if args.show:
        draw_facts(args.show)
        return
    # A second command waits: it finds all files finished.
    _held = data.lock(args.folder, wait=True)
    make_world(args.folder, args.train, args.test, args.size, args.patch_px, args.words)
    if args.masks:
        write_masks(Path(args.folder) / "slides")


if __name__ == "__main__":
    data.run_script(main, "finished files are kept; the same command continues")
