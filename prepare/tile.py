"""Tile slides: find tissue, choose 5x parents, write a tar of bags for each slide and its index.

    python -m prepare.tile SLIDES --out DIR

A call continues one that was stopped. Slides that cannot be used are listed in failures.jsonl.

References: [1] Otsu 1979, thresholds.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import data
from data import NODES, lock, mpp_of, square, write_whole
from prepare.slide import Slide, find_slides, mpp_table, read_column, slide_key, thumbnail

# ---------------------------------------------------------------- tissue and parents


def tissue_mask(slide, um=8.0):
    """Find tissue at about `um` microns a pixel -> (mask bool [h, w], scale in slide pixels)."""
    scale = max(1, round(um / slide.mpp))
    r, g, b = np.moveaxis(thumbnail(slide, scale).astype(np.int16), 2, 0)
    # Both stains absorb green most; glass, fat, dust and black pen absorb all colours alike.
    stain = (r + b) // 2 - g
    # Brown DAB absorbs blue most, and its pale blue counterstain red: more than the glass does.
    red, green, blue = (np.percentile(colour[::4, ::4], 95) for colour in (r, g, b))
    tint = 6 + max(0, int(blue - red), int(red - green))
    stain = np.maximum(stain, np.where(b < g, r - g, b - r) - tint).clip(0, 255)
    # Drop blue and green pen, whose red is below green, red pen, whose blue is far below red, and
    # violet pen, which is purer than haematoxylin.
    violet = (b >= r) & (b - g >= np.minimum(100, 0.64 * b))
    stain[((g > r) & (b - r > 75)) | (r - b > 100) | violet] = 0
    # Choose the threshold that maximises the variance between the classes [1, equation 18].
    count = np.bincount(stain.ravel(), minlength=256).astype(float)
    below = count.cumsum()
    total = (count * np.arange(256)).cumsum()
    between = (total[-1] * below - total * below[-1]) ** 2
    between /= np.maximum(below * (below[-1] - below), 1)
    # Keep it within 6-12 grey levels, for slides that are all tissue or all glass.
    stained = stain > np.clip(between.argmax(), 6, 12)
    # Let each 3 x 3 vote: specks and pinholes go, fat cells of 50-100 um stay holes.
    votes = np.pad(stained.astype(np.int8), 1, mode="edge")
    votes = votes[:-2] + votes[1:-1] + votes[2:]
    return votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:] > 4, scale


def tissue_fraction(mask, scale, x, y, side):
    """Measure the tissue share of squares (int arrays of one shape); outside is glass."""
    # Entry (i, j) of the table counts the mask above row i and left of column j.
    table = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = mask.shape

    def area(u, v):
        # Between entries the count is bilinear.
        u = np.clip(u / scale, 0, width)
        v = np.clip(v / scale, 0, height)
        j = np.minimum(u.astype(int), width - 1)
        i = np.minimum(v.astype(int), height - 1)
        upper = (1 - (u - j)) * table[i, j] + (u - j) * table[i, j + 1]
        lower = (1 - (u - j)) * table[i + 1, j] + (u - j) * table[i + 1, j + 1]
        return (1 - (v - i)) * upper + (v - i) * lower

    # Four corners give the count within a square.
    inside = area(x + side, y + side) - area(x, y + side) - area(x + side, y) + area(x, y)
    return inside * (scale / side) ** 2


def choose_parents(slide, fov_px=512, parents=20, min_tissue=0.5, seed=0):
    """Choose squares that do not overlap -> [(x, y, side, tissue [85])], in order."""
    # A parent is fov_px pixels of 5x wide, by the true mpp.
    # Four levels tile a multiple of 8 exactly.
    side = max(8, 8 * round(fov_px * mpp_of(5) / slide.mpp / 8))
    # At least four mask pixels lie across a 40x patch.
    mask, scale = tissue_mask(slide, um=min(8, fov_px / 16))

    def starts(axis, quarter):
        length = slide.size[axis]
        # A smaller slide gets one parent, padded with white.
        if length < side:
            return np.array([(length - side) // 2])
        first = (length % side // 2 + quarter * side // 4) % side
        # Start on a tile's edge, because a tile that two parents share is decoded twice.
        if slide.tile[axis] <= side // 4:
            first -= first % slide.tile[axis]
        return np.arange(first, length - side + 1, side)

    # Try 16 grids, a quarter parent apart, because a biopsy is narrower than a parent.
    grids = []
    enough = []
    for down, right in np.ndindex(4, 4):
        x, y = np.meshgrid(starts(0, right), starts(1, down))
        grids.append((x.reshape(-1, 1), y.reshape(-1, 1)))
        share = tissue_fraction(mask, scale, x, y, np.full_like(x, side))
        enough.append((share >= min_tissue).sum())
    # Take the one with most parents of enough tissue. The first of equals is the centred one.
    x, y = grids[int(np.argmax(enough))]
    # Measure all 85 nodes of each square.
    node_x, node_y, node_side = square(np.arange(NODES), x, y, side)
    tissue = tissue_fraction(mask, scale, node_x, node_y, np.broadcast_to(node_side, node_x.shape))
    # Draw among those with enough tissue. The draw depends on seed and name alone.
    rng = np.random.default_rng([seed, zlib.crc32(os.fsencode(slide.name))])
    drawn = rng.permutation(np.flatnonzero(tissue[:, 0] >= min_tissue))[:parents]
    return [(int(x[i, 0]), int(y[i, 0]), side, tissue[i]) for i in sorted(drawn)]


def remarks(slide, parents, fov_px, min_tissue):
    """Say what a user should know of a slide and its parents, in a line; "" if nothing."""
    said = [slide.doubt] if slide.doubt else []
    if not parents:
        best = max(tissue[0] for *_, tissue in choose_parents(slide, fov_px, 10**6, 0))
        found = f"no square has {min_tissue:g} of tissue, the best has {best:.2f}"
        said.append(f"{found}: look with prepare.preview, lower --min-tissue or --fov-px")
    return "; ".join(said)


# ---------------------------------------------------------------- slides -> shards


def write_bags(slide, squares, settings):
    """Make a shard of the squares [(x, y, side, tissue)] of a slide -> (its index, its bytes)."""
    import imagecodecs

    file = io.BytesIO()
    rows = []
    # Build the tar in memory: a slide's bags are some 60 MB.
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, (x, y, side, tissue) in enumerate(squares):
            pixels = slide.read(x, y, side, 8 * settings["patch_px"])
            # Keep half the colour (4:2:2): it tells nucleus from cytoplasm.
            jpg = imagecodecs.jpeg8_encode(pixels, settings["quality"], subsampling="422")
            row = dict(x=x, y=y, side=side, crc=zlib.crc32(jpg), mags=slide.mags)
            row["tissue"] = tissue.round(4).tolist()
            about = json.dumps(dict(slide=slide.name, mpp=slide.mpp, **row)).encode()
            key = f"{slide_key(slide.path)}-{i:02d}"
            for suffix, content in (("json", about), ("jpg", jpg)):
                # No time, no user: the same slide gives the same bytes.
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                # The content begins behind a head of 512 bytes.
                offset = tar.offset + 512
                tar.addfile(info, io.BytesIO(content))
            rows.append(dict(key=key, jpg=[offset, len(jpg)], **row))
    about = dict(slide=slide.name, patch_px=settings["patch_px"], settings=settings)
    return dict(about, mpp=slide.mpp, doubt=slide.doubt, bags=rows), file.getbuffer()


def _tile_slide(job, out, threads, settings):
    """Write shard and index of a slide -> (number of bags, or None if it failed; a remark)."""
    path, mpp = job
    # A call may do a slide again whose neighbour killed its process.
    count = _finished(path, mpp, out, settings)
    if count is not None:
        return count, ""
    wanted = {name: settings[name] for name in ("fov_px", "parents", "min_tissue", "seed")}
    try:
        with Slide(path, mpp, threads) as slide:
            squares = choose_parents(slide, **wanted)
            index, shard = write_bags(slide, squares, settings)
            remark = remarks(slide, squares, settings["fov_px"], settings["min_tissue"])
    except Exception as e:
        # One bad slide must not stop the others.
        return None, str(e) if isinstance(e, ValueError) else f"{path} cannot be tiled: {e!r}"
    # A slide without bags leaves an index and no shard.
    if squares:
        write_whole(out / f"bags-{slide_key(path)}.tar", shard)
    # The index comes last: a slide that has one is done.
    write_whole(out / f"bags-{slide_key(path)}.index.json", json.dumps(index))
    return len(squares), f"{path}: {remark}" if remark else ""


def _finished(path, mpp, out, settings):
    """Look whether a slide was tiled -> its number of bags, or None. Refuse other settings."""
    file = out / f"bags-{slide_key(path)}.index.json"
    if not file.exists():
        return None
    index = data.read_json(file)
    if index["slide"] != path.name:
        raise ValueError(f"{file} is of {index['slide']}, not of {path}: rename one of them")
    if index["settings"] != settings or mpp not in (None, index["mpp"]):
        made = f"{file} was made with {index['settings']}, mpp {index['mpp']}"
        raise ValueError(f"{made}: repeat those or choose another --out")
    # A shard that was lost is made again.
    lost = index["bags"] and not (out / f"bags-{slide_key(path)}.tar").exists()
    return None if lost else len(index["bags"])


def begin_worker(threads, parent):
    """Prepare a worker: it must end with its parent, else it would write into the next call's."""
    torch.set_num_threads(threads)
    data.end_with_parent(signal.SIGKILL)
    # The parent may have ended while this one began.
    if os.getppid() != parent:
        os._exit(1)


def run_jobs(work, jobs, workers, threads):
    """Do the jobs, in processes if there are several workers -> results in the order of jobs.

    A job whose process was killed, often for lack of memory, has the result None.
    """
    if workers < 2:
        yield from map(work, jobs)
        return
    # Spawn, because a fork of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    alone = 0
    while jobs:
        # After a death do the jobs that were in hand one by one: one of them kills its process.
        now = jobs[:1] if alone else jobs
        more = (spawn, begin_worker, (threads, os.getpid()))
        pool = ProcessPoolExecutor(1 if alone else workers, *more)
        done = 0
        try:
            # Workers inherit the ignored Ctrl-C, and finish the slide in hand.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            results = pool.map(work, now)
            signal.signal(signal.SIGINT, handler)
            for result in results:
                yield result
                done += 1
            alone = max(0, alone - 1)
        except BrokenExecutor:
            if alone:
                yield None
                done = 1
            alone = alone - 1 if alone else workers
        finally:
            pool.shutdown(cancel_futures=True)
        jobs = jobs[done:]


def tile(slides, out, patch_px=224, fov_px=512, parents=20, min_tissue=0.5,
         mpp=None, seed=0, workers=1, quality=90):  # fmt: skip
    """Tile slides into one shard each; a call continues one that was stopped.

    slides are files or folders, workers are processes; the others as in main(), below.
    Returns counts: dict(slides, done, bags, empty, failed).
    """
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is {min_tissue}, not 0 to 1: give a share, such as 0.5")
    if min(patch_px, fov_px, parents) < 1:
        raise ValueError("patch_px, fov_px or parents is below 1: choose another value")
    settings = dict(patch_px=patch_px, fov_px=fov_px, parents=parents)
    settings |= dict(min_tissue=min_tissue, seed=seed, quality=quality)
    out = Path(out)
    paths = find_slides(slides)
    mpps = mpp if isinstance(mpp, dict) else mpp_table(mpp, [path.name for path in paths])
    # Two commands in one folder would do the same slides.
    owned = lock(out)
    for left in out.glob(".bags-*.tmp"):
        left.unlink()

    # Skip what is done.
    found = {path: _finished(path, mpps[path.name], out, settings) for path in paths}
    jobs = [(path, mpps[path.name]) for path in paths if found[path] is None]
    counts = [count for count in found.values() if count is not None]

    # Do the rest. A slide that fails is noted, and tried again by the next call.
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    work = functools.partial(_tile_slide, out=out, threads=threads, settings=settings)
    bar = data.progress(desc="slides", total=len(paths), initial=len(counts), unit="slide")
    failures = open(out / "failures.jsonl", "w", buffering=1)
    results = contextlib.closing(run_jobs(work, jobs, workers, threads))
    with owned, bar, failures, results as results:
        for (path, _), result in zip(jobs, results, strict=True):
            # Memory is the usual reason.
            count, remark = result or (None, f"{path} kills its process: use fewer --workers")
            if remark:
                bar.clear()
                print(remark, file=sys.stderr)
            bar.update()
            if count is None:
                failures.write(json.dumps(dict(slide=path.name, reason=remark)) + "\n")
            else:
                counts.append(count)
    n = dict(slides=len(paths), done=len(counts), bags=sum(counts))
    return n | dict(empty=counts.count(0), failed=len(paths) - len(counts))


def divide(paths, share, patients, out):
    """Divide slides by patient, the same way each time -> {OUT/train: paths, OUT/test: paths}."""
    names = [path.name for path in paths]
    # TCGA-XX-YYYY begins the names of a patient's slides. Others are patients of their own.
    owner = {name: re.sub(r"^(TCGA-..-....)-.*", r"\1", name, flags=re.I) for name in names}
    if patients:
        found = read_column(patients, names, r"[^,]+", str.strip)
        owner |= found
        if len(found) < len(names):
            first = min({*names} - {*found})
            told = f"{patients} lacks {len(names) - len(found)} of {len(names)} slides, as {first}"
            print(f"{told}: each is taken for a patient of its own", file=sys.stderr)
    # A checksum of the patient decides, so new slides move no old ones.
    parts = {out / "train": [], out / "test": []}
    for path in paths:
        in_test = zlib.crc32(owner[path.name].encode()) < share * 2**32
        part, other = ("test", "train") if in_test else ("train", "test")
        parts[out / part].append(path)
        # Another share, or other patients, would put a slide on both sides.
        if (out / other / f"bags-{slide_key(path)}.index.json").exists():
            state = f"{path.name} was tiled into {out / other}, and is now of {part}"
            raise ValueError(
                f"{state}: repeat --test-share and --patients, or choose another --out"
            )
    if not all(parts.values()):
        why = "a checksum deals out the patients, and leaves train or test empty"
        raise ValueError(f"--test-share {share}: {why}: choose another share")
    return parts


# ---------------------------------------------------------------- the command line


def main():
    parser = argparse.ArgumentParser(description="Slides -> bags.", allow_abbrev=False)
    add = parser.add_argument
    add("slides", nargs="+", help="files or folders")
    add("--out", required=True, help="folder of shards")
    add("--patch-px", type=int, default=224, help="stored pixels a side of a patch, S")
    add("--fov-px", type=int, default=512, help="pixels a side of a parent at 5x: field of view")
    add("--parents", type=int, default=20, help="most 5x parents of a slide")
    add("--min-tissue", type=float, default=0.5, help="least tissue share of a parent")
    add("--mpp", help="microns per pixel, or a CSV of slide,mpp lines")
    add("--seed", type=int, default=0, help="which parents are drawn")
    # A slide that kills its process costs only itself, where it is not the only process.
    add("--workers", type=int, default=2, help="processes, a slide each (%(default)s)")
    add("--quality", type=int, default=90, help="quality of the JPEGs")
    add("--test-share", type=float, default=0, help="share of the patients for OUT/test")
    add("--patients", help="a CSV of slide,patient lines; TCGA's names say theirs")
    args = vars(parser.parse_args())
    share, patients, out = args.pop("test_share"), args.pop("patients"), Path(args["out"])
    parts = {out: args["slides"]}
    if patients and not share:
        raise ValueError("--patients divides slides for --test-share: give both")
    if share:
        paths = find_slides(args["slides"])
        args["mpp"] = mpp_table(args["mpp"], [path.name for path in paths])
        parts = divide(paths, share, patients, out)
    total = Counter()
    for out, slides in parts.items():
        n = tile(**args | dict(slides=slides, out=out))
        print(f"{n['bags']} bags from {n['done'] - n['empty']} of {n['slides']} slides in {out}")
        total.update(n)
    if total["failed"]:
        failed = f"{total['failed']} of {total['slides']} slides cannot be used"
        sys.exit(f"error: {failed}, see failures.jsonl in {', '.join(map(str, parts))}")
    if not total["bags"]:
        sys.exit("error: no slide has a square with enough tissue: lower --min-tissue or --fov-px")


if __name__ == "__main__":
    data.run_script(main, "finished slides are kept, the same command continues")
