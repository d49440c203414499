"""Measure a model: ours or any public CLIP or ViT, on our shards, on folders and tables of labelled pictures, on slide files.

    python evaluate.py report    RUN                                 # all that needs no training of a network -> results.json, PNGs, report.html
    python evaluate.py zeroshot  RUN --data NCT-CRC/ [--levels --mpp 0.5]      # classes by prompts; at 5x, 10x, 20x, 40x and merged
    python evaluate.py slide     RUN [SLIDE ... --classes nsclc]     # MI-Zero; from slide files heatmaps and outlines too; from shards also attention MIL
    python evaluate.py probe     RUN --data index.csv                # logistic regression, prototypes, 20 neighbours, few-shot on frozen features
    python evaluate.py finetune  RUN --data index.csv                # the whole tower
    python evaluate.py retrieval RUN                                 # image <-> caption, re-ranked by image-text matching; patch -> slides of its diagnosis
    python evaluate.py segment   RUN --data masks.csv --classes FILE # Dice of zero-shot windows, and of a linear decoder of patch tokens
    python evaluate.py heatmap   RUN SLIDE "signet ring cells" --out map.png   # and map.geojson for QuPath

RUN is a folder of train.py; instead of it: --clip FILE [--quick-gelu] --tokenizer FILE, or --vit FILE; or the words `random` (untrained weights) and
`pixels` (the picture itself), below which no number means anything. --data is by default the run's own. torchrun shares the reading of bags, pictures
and slides; what is computed from features, fine-tuning and segmentation, the first process does alone.

The protocols are functions of features and labels: zeroshot.py (no labels to learn from), supervised.py, segment.py, with metrics.py below them.
subjects.py has the models, datasets.py the pictures, report.py what becomes of the results. Here is what is measured on what.

Outline: shards | pictures | slide files, masks | the command line.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py
import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import datasets
import metrics
import model as networks
import pictures
import prompts
import segment
import supervised
import zeroshot
from pictures import LEVEL, MAG_NAMES
from report import json_ready, keep, print_table
from subjects import (Subject, bags_hash, class_weights, embed, embed_texts, features_key, fit, labelled, labels_of, load_run, load_subject, open_bags,
                      read_config, reader, reader_for, reads_text, spread, stamp)


def about(subject, data_name, data_hash, **more):
    """What every result says of itself."""
    return dict(model=subject.name, fingerprint=subject.fingerprint, data=str(data_name), data_hash=data_hash, **more)


# ----------------------------------------------------------------------------------------------------------------------
# Shards

def shards_in(path):
    """A folder of shards, or with test/ and perhaps train/ in it -> (test, train or None); None for what holds no shards."""
    path = Path(path)
    has = lambda p: p.is_dir() and any(p.glob("bags-*.tar"))
    return (path / "test", path / "train" if has(path / "train") else None) if has(path / "test") else (path, None) if has(path) else None


def split_names(shared, train):
    """What test and training shards are for what learns from labels: a split of their own, or ("", "") folds by slide, where there are no training
    shards or some slides are `shared` by both."""
    return ("test", "train") if train and not shared else ("", "")


def report(run, test, train, device="cpu"):
    """What train.py ends with: on the run's own shards all that takes seconds. The rest is `evaluate.py report RUN`."""
    args = arguments(["report", str(run), "--top", "0"])
    subject = Subject(*load_run(run, device), Path(run).resolve().name)
    measure_shards(subject, test, train, run, device, args, ("zeroshot", "slide", "retrieval"), mil=False, cached=False)


def read_shards(subject, test, train, out, device, args, wanted, mil, cached):
    """Features of test shards and, where there are any, of training shards -> namespace of both, or None where another process goes on. `base`, half as
    many training bags as test bags, is what scores are centred on and probes learn from (a quarter where none do); `gallery` what held-out parents look
    among and MIL learns from."""
    bags, train_bags = open_bags(test), open_bags(train) if train else None
    read, most = reader_for(subject, args.features), args.bags or (len(bags) if wanted == ("slide",) else 300)
    if bags.S != subject.model.vision.size and networks.rank() == 0:
        print(f"patches of {bags.S} px are resampled to the {subject.model.vision.size} that {subject.name} reads")

    def embedded(which, count):
        key = (subject.fingerprint, stamp(which), count, *features_key(subject, args.features))
        return embed(subject.model, which, spread(len(which), count), device, read=read, folder=Path(out) / "features" / "-".join(map(str, key)) if cached else None)
    feats, base, gallery, shared = embedded(bags, most), None, None, set()
    if train:
        base = embedded(train_bags, max(1, most // (2 if "probe" in wanted else 4)))
        shared = set(bags.slides) & set(train_bags.slides)                             # only then are test bags held-out parents of training slides
        if shared and "retrieval" in wanted or mil and "slide" in wanted:
            gallery = embedded(train_bags, len(train_bags) if shared or not args.bags and wanted == ("slide",) else 2 * most)
    if feats is None:
        return None
    split = f"{len(base['index'])} training bags of {train}" if train else f"no training bags: centred on the test bags, {args.folds} folds by slide"
    if shared:                                                                         # labels are not learned on the slides that they are measured on
        split += f"; {len(shared)} slides are in both, so what learns from labels is measured in {args.folds} folds by slide"
        print(f"{len(shared)} slides are in {test} and in {train}: probes and MIL are measured in folds by slide")
    known, (labels, patients) = labelled(bags, feats), datasets.read_labels(args.labels) if args.labels else (None, None)
    names, templates = prompts.BUILT_IN["diagnosis"], prompts.BUILT_IN_TEMPLATES
    if labels:
        if not set(labels) & set(bags.slides):
            raise ValueError(f"{args.labels} names none of the slides of {test}, the first of which is {bags.slides[0]}: write their names as they are there")
        names, templates = prompts.find(args.classes, set(labels.values())) if subject.tokenizer else ({c: () for c in sorted(set(labels.values()))}, ())
    truth = zeroshot.slide_truth(bags, feats, table=labels) if known or labels else {}
    return SimpleNamespace(bags=bags, feats=feats, train_bags=train_bags, base=base or feats, gallery=gallery, shared=shared, splits=split_names(shared, train),
                           known=known, labels=labels, patients=patients, names=names, templates=templates, truth=truth,
                           about=about(subject, test, bags_hash(bags), split=f"{len(feats['index'])} test bags, {split}"),
                           prompts=dict(classes=names if labels else prompts.BUILT_IN, templates=templates))


def measure_shards(subject, test, train, out, device, args, wanted, mil=True, cached=True):
    """The protocols in `wanted` on folders of test and training shards (None: folds of the former)."""
    asked, out = len(wanted) == 1, Path(out)                                           # a report passes over what its data do not allow
    s = read_shards(subject, test, train, out, device, args, wanted, mil, cached)
    if s is None:
        return
    if asked and not s.known and (wanted[0] in ("zeroshot", "probe") or wanted[0] == "slide" and not s.labels):
        remedy = ": give --labels CSV (slide,label[,patient])" if wanted[0] == "slide" else ""
        raise ValueError(f"{test} has no bags-*.truth.jsonl beside its shards, which {wanted[0]} compares with{remedy}")
    if "zeroshot" in wanted and s.known and subject.tokenizer:
        shards_zeroshot(subject, s, out)
    if "slide" in wanted and s.truth:
        if subject.tokenizer:
            found = zeroshot.of_slides(subject.model, subject.tokenizer, s.bags, s.feats, s.base, s.names, s.templates, s.truth, s.patients)
            images = {} if asked or not s.known else built_in_heatmap(subject, s, test, out, device)
            keep(out, s.about | dict(prompts=s.prompts), {"slide": found}, images)
        if mil:
            parts = [(s.bags, s.feats, s.truth, s.splits[0])]
            if train:
                parts.append((s.train_bags, s.gallery, zeroshot.slide_truth(s.train_bags, s.gallery, table=s.labels), s.splits[1]))
                if not s.shared and s.patients and (both := {s.patients.get(x) for x in s.truth} & {s.patients.get(x) for x in parts[1][2]} - {None}):
                    print(f"{len(both)} patients have slides in both {test} and {train}: the numbers of MIL will flatter")
            keep(out, s.about, {"mil": supervised.mil_of_bags(parts, list(s.names), s.patients, k=args.folds)})
    if "probe" in wanted and s.known:
        parts = [(s.bags, s.feats, s.splits[0])] + [(s.train_bags, s.base, s.splits[1])] * bool(train)
        tasks = list(supervised.tasks_of_bags(parts, seed=args.seed))
        shown = next((t for t in tasks if t.name == "cytology 40x"), tasks[0])
        pictures.projection(shown.x[args.features[0]], shown.y, shown.classes, out / "projection.png", f"{shown.name}, {args.features[0]}")
        found = supervised.probe(tasks, args.features, args.folds, args.seed)
        keep(out, s.about | dict(regularisation="100 / (M C)"), found, {"projection.png": "Two first principal components of patches' features, coloured by class."})
    if "retrieval" in wanted:
        found, images = shards_retrieval(subject, s, out, args.top)
        if found:
            keep(out, s.about, found, images)
        elif asked:
            raise ValueError(f"{test} has neither captions, nor slides with training parents, nor labels of slides: retrieval has nothing to ask for")
    print(f"\nwrote {out}/results.json, report.html and pictures")


def shards_zeroshot(subject, s, out):
    """Zero-shot on patches and bags, with its bars and the confusion matrix of the merged diagnosis."""
    found = zeroshot.of_bags(subject.model, subject.tokenizer, s.bags, s.feats, s.base, intervals=True)
    table = {}
    for fact, modes in found.items():
        row = modes["ensemble"]["patch"] | {"merged": modes["ensemble"]["bag"]["merged"]}
        table[fact] = {mag: (r["f1"], *r["interval"]["f1"]) if (r := row.get(mag)) else (math.nan, None, None) for mag in zeroshot.ALL_MAGS}
    pictures.bars(table, out / "levels.png", "Zero-shot by magnification")
    names = prompts.BUILT_IN["diagnosis"]
    y, W = labels_of(s.bags, s.feats["index"], "diagnosis")[:, 0], class_weights(subject.model, subject.tokenizer, names.values())
    p = zeroshot.merged_scores(zeroshot.level_scores(s.feats, W), zeroshot.level_scores(s.base, W)).argmax(1)
    pictures.confusion(metrics.confusion(y[y >= 0], p[y >= 0], len(W)), list(names), out / "confusion.png", "Diagnosis per bag, four magnifications merged")
    keep(out, s.about | dict(prompts=dict(classes=prompts.BUILT_IN, templates=prompts.BUILT_IN_TEMPLATES)), {"zeroshot": found},
         {"levels.png": "Weighted F1 per patch at each magnification, per bag for the four merged; whiskers: 95 % over slides.", "confusion.png": "Zero-shot diagnosis, merged."})


def shards_retrieval(subject, s, out, top):
    """Image and caption, held-out parent and slide, patch and slides of its diagnosis: whichever the data allow; and a sheet to look at
    -> (results, {picture: caption})."""
    found, images = {}, {}
    captions = sorted({c for i in s.feats["index"] for c in s.bags.captions(i) if c})
    if subject.tokenizer and captions:
        found["retrieval"] = zeroshot.retrieval(subject.model, subject.tokenizer, s.bags, s.feats, top=top if hasattr(subject.model, "fusion") else 0)
        queries = captions[:: max(1, len(captions) // 9)][:9]
        if s.known:
            queries = [c[0] for fact in ("architecture", "cytology") for c in prompts.BUILT_IN[fact].values()]
        pictures.retrieval_sheet(s.bags, s.feats, queries, embed_texts(subject.model, subject.tokenizer, queries), out / "retrieval.png")
        images["retrieval.png"] = "Query texts and the patches closest to them, each from another slide, one row per magnification."
    if s.shared:
        found["slide_retrieval"] = zeroshot.slide_retrieval(s.bags, s.feats, s.train_bags, s.gallery)
    if s.truth and (rows := zeroshot.diagnosis_retrieval(s.bags, s.feats, s.truth)):  # none where each slide has a class of its own
        found["diagnosis_retrieval"] = rows
    return found, images


def built_in_heatmap(subject, s, test, out, device):
    """The first test slide of the built-in world, which keeps its slides beside the shards, with what is true of it and what is true beside the tumour
    -> {file: caption}, or nothing where the slide is not there."""
    first = s.feats["index"][0]
    slide = Path(test).parent / "slides" / s.bags.slides[first]
    if not slide.exists():
        return {}
    true = {fact: next((r[fact] for r in s.bags.truth(first) if r and r.get(fact)), None) for fact in ("architecture", "cytology")}
    queries = [(prompts.BUILT_IN[fact][name][0], lev) for (fact, name), lev in zip(true.items(), (0, 2)) if name] + [("stroma only", 2)]
    zeroshot.heatmap(subject.model, subject.tokenizer, slide, queries, out / "heatmap.png", fov_px=s.bags.S, device=device)
    return {"heatmap.png": f"Where on {slide.name} is the text? Yellow: nearest, on this slide."}


def tune_shards(subject, test, train, out, device, args, most=1500):
    """Full fine-tuning on the patches of one fact and magnification of shards, at most `most` of the test and of the training slides."""
    sets = [open_bags(folder) for folder in (test, train) if folder]
    names = split_names(set(sets[0].slides) & set(sets[-1].slides), train)
    parts = [(bags, {"valid": bags.valid, "index": list(range(len(bags)))}, name) for bags, name in zip(sets, names)]
    task = next(supervised.tasks_of_bags(parts, (args.fact,), (args.level,), most, args.seed), None)
    if task is None:
        raise ValueError(f"{test} has no truth of {args.fact} at {args.level}: finetune needs labels")

    S, of_bag = subject.model.vision.size, {}
    for row, (part, g, n) in enumerate(task.places):
        of_bag.setdefault((part, g), []).append((row, n))
    patches = torch.empty(len(task.y), 1, 3, S, S, dtype=torch.uint8)                  # cut once, a bag at a time
    for (part, g), rows in tqdm(of_bag.items(), desc="patches", unit="bag", leave=False):
        nodes = data.pyramid(sets[part][g]["image"][None])[0]                          # [N, 3, s, s]
        for row, n in rows:
            patches[row, 0] = (fit(nodes[n], S) * 255).round().to(torch.uint8)
    tiles = [(x, None) for x in patches]
    row = supervised.tune(subject.model.vision, tiles, task, device, args.folds, args.seed, epochs=args.epochs, lr=args.lr)
    split = f"at most {most} patches of each folder, " + ("the source's own" if names[0] else f"{args.folds} folds by slide") + "; a fifth of the training slides for early stopping"
    keep(out, about(subject, test, bags_hash(sets[0]), split=split), {"finetune": [row]})
    print(f"\nwrote {out}/results.json and report.html")


# ----------------------------------------------------------------------------------------------------------------------
# Labelled pictures

def measure_pictures(subject, pics, out, device, args, wanted):
    """The protocols in `wanted` on labelled pictures (datasets.Pictures)."""
    S, test = subject.model.vision.size, np.array(pics.split) == "test"
    if pics.labels is None and (lacking := sorted({"zeroshot", "probe", "finetune"} & set(wanted))):
        raise ValueError(f"{pics.name} has no labels, which {lacking[0]} needs: class folders, or a column `label` in the table")
    if pics.captions is None and "retrieval" in wanted:
        raise ValueError(f"{pics.name} has no captions: retrieval needs a column `caption` in the table")
    if args.levels and not args.mpp:
        raise ValueError("--levels resamples from the pictures' own scale, so it needs --mpp (microns per pixel, as in the data set's description)")
    if pics.labels and len(set(pics.labels)) < 2 and set(wanted) & {"probe", "finetune"}:
        raise ValueError(f"{pics.name} has one class, {pics.labels[0]}: there is nothing to tell apart")
    named, templates = prompts.find(args.classes, set(pics.labels)) if "zeroshot" in wanted else ({}, ())
    order = sorted(set(pics.labels or ()))
    groups = None if pics.groups is None else np.array(pics.groups)
    task = supervised.Task(pics.name, {}, pics.targets(order) if pics.labels else np.zeros(len(pics), int), order, groups, np.array(pics.split))
    own_split, said = test.any() and not test.all(), about(subject, pics.name, pics.hash, groups=pics.by or "none: every row its own")
    if networks.rank() == 0:
        if groups is None and not own_split and set(wanted) - {"zeroshot", "retrieval"}:
            known = ", ".join(datasets.COLUMNS["group"][:4])
            print(f"{pics.name} has no group column ({known} ...): rows are split one by one, and copies of a patient may lie on both sides")
        elif groups is not None and own_split and (both := set(groups[test]) & set(groups[~test])):
            print(f"{len(both)} of {len(set(groups))} groups ({pics.by}) lie in the training and the test rows of the source's own split: its numbers will flatter")
    split = "the source's own" if own_split else f"{args.folds} folds by {pics.by or 'row'}, every row predicted once"
    if set(wanted) - {"finetune"}:
        key = (subject.fingerprint, pics.stamp, S, f"mpp{args.mpp}" if args.levels else "whole", *features_key(subject, args.features))
        found = datasets.features(reader_for(subject, args.features), pics.files, S, device, args.mpp if args.levels else None, Path(out) / "features" / "-".join(map(str, key)))
    if networks.rank():
        return
    if set(wanted) - {"finetune"}:
        ok = found.pop("ok")
        use = ok & test if test.any() else ok                                          # the rows that need no learning are measured on
        if not use.any():
            raise ValueError(f"none of the {len(ok)} pictures of {pics.name} could be read, see above")
        if not ok.all():
            print(f"{(~ok).sum()} of {len(ok)} pictures could not be read and are left out")
            said["left_out"] = int((~ok).sum())
        keep_rows = lambda rows: supervised.Task(task.name, {n: x[rows] for n, x in found.items()}, task.y[rows], order,
                                                 None if groups is None else groups[rows], task.split[rows])
        which = "test rows" if test.any() else "all rows"
    if "zeroshot" in wanted:
        measured = keep_rows(use)                                                      # all classes that are named are candidates, also those that nobody has
        measured.y, measured.classes = pics.targets(list(named))[use], list(named)
        pictures_zeroshot(subject, measured, keep_rows(ok & ~test), out, args, said | dict(split=which, prompts=dict(classes=named, templates=templates)))
    if "probe" in wanted:
        everything = keep_rows(ok)
        pictures.projection(everything.x[args.features[0]], everything.y, order, Path(out) / "projection.png", f"{subject.name}, {args.features[0]}")
        keep(out, said | dict(split=split, regularisation="100 / (M C)"), supervised.probe([everything], args.features, args.folds, args.seed),
             {"projection.png": "Two first principal components of the features, coloured by class."})
    if "finetune" in wanted:
        row = supervised.tune(subject.model.vision, datasets.Tiles(pics.files, S), task, device, args.folds, args.seed, epochs=args.epochs, lr=args.lr)
        keep(out, said | dict(split=split + "; a fifth of the training groups for early stopping"), {"finetune": [row]})
    if "retrieval" in wanted:
        rows = np.flatnonzero(use)
        top = args.top if hasattr(subject.model, "fusion") else 0
        if top and len(rows) > 3000:
            print(f"{len(rows)} pictures are too many to keep for image-text matching: nothing is re-ranked")
            top = 0
        images = lambda: torch.stack([networks.read_picture(pics.files[i], S) for i in rows])
        result = zeroshot.of_captions(subject.model, subject.tokenizer, found["projected"][rows], [pics.captions[i] for i in rows], images, top)
        keep(out, said | dict(split=which), {"retrieval": {"all": result}})
    print(f"\nwrote {out}/results.json, report.html and pictures")


def pictures_zeroshot(subject, task, rest, out, args, said):
    """Zero-shot on pictures; with --levels at each magnification and merged, centred on the `rest` (training rows) where there are any."""
    there = np.array([args.mpp < 1.2 * data.mpp_of(m) for m in data.MAGS]) if args.levels else None      # not merely enlarged
    classes = said["prompts"]["classes"].values()
    found, matrix = zeroshot.of_pictures(subject.model, subject.tokenizer, task.x["projected"], task.y, classes, said["prompts"]["templates"],
                                         task.groups, rest.x["projected"], there)
    pictures.confusion(matrix, task.classes, Path(out) / "confusion.png", f"{subject.name} on {task.name}, zero-shot" + ", merged" * args.levels)
    images = {"confusion.png": "Confusion matrix with the prompt ensemble: rows are the truth."}
    if args.levels:
        listed = lambda which: " ".join(f"{m}x" for m, t in zip(data.MAGS, there) if t == which) or "none"
        centred = "the training rows" if len(rest.y) else "these rows themselves"
        said = said | dict(mpp=args.mpp, merged=f"of {listed(True)}, centred on {centred}", enlarged=listed(False))
        table = {mode: {mag: (s["f1"], *s["interval"]["f1"]) for mag, s in row.items()} for mode, row in found.items()}
        pictures.bars(table, Path(out) / "levels.png", f"{subject.name} on {task.name}")
        images["levels.png"] = "Weighted F1 at each magnification, resampled from the pictures' own, and merged."
    keep(out, said, {"zeroshot": found}, images)


# ----------------------------------------------------------------------------------------------------------------------
# Slide files, masks

def measure_slides(subject, paths, out, device, args, js=(1, 5, 10, 50, 100)):
    """Slide files: MI-Zero's class at each magnification and merged, printed; a heatmap of the merged class and outlines of all classes at --level
    -> OUT/SLIDE.png, OUT/SLIDE.geojson. Scores are centred on each slide's own patches for the outlines, and not at all for the pooled scores: there
    are no training slides to centre on. A slide that cannot be read is named and passed over; ValueError at the end where there was one."""
    if not args.classes:
        raise ValueError("slide files need --classes: a JSON file {class: [names]} or one of " + " ".join(prompts.DATASETS))
    names, templates = prompts.find(args.classes, ())
    W, lev = class_weights(subject.model, subject.tokenizer, names.values(), templates=templates).numpy(), MAG_NAMES.index(args.level)
    paths, failed, results = data.find_slides(paths), 0, {}
    rank, world = networks.rank(), networks.world_size()
    for path, scale in list(zip(paths, data.mpp_table(args.mpp, [p.name for p in paths]).values()))[rank::world]:
        try:
            parents, feats = zeroshot.read_slide(subject.model, path, device, scale, args.fov_px)
        except (ValueError, OSError) as e:
            print(f"left out: {e}", file=sys.stderr)
            failed += 1
            continue
        v, valid = feats["v"].numpy(), feats["valid"].numpy()
        pooled = zeroshot.pooled_levels(v, valid, W, np.zeros((4, len(W))), js)
        picked = {mag: {j: list(names)[int(s.argmax())] for j, s in row.items()} for mag, row in pooled.items()}
        results[path.name] = {"parents": len(parents), "class": picked, "scores": {mag: {j: s.tolist() for j, s in row.items()} for mag, row in pooled.items()}}
        best, s = list(names).index(picked["merged"][10]), v @ W.T                     # s [P, N, C]
        with data.Slide(path, scale) as slide:
            panels = [(f"{picked['merged'][10]} at {mag}", i, np.where(valid, s[..., best], np.nan)) for i, mag in enumerate(MAG_NAMES) if (valid & (LEVEL == i)).any()]
            pictures.heatmap(slide, parents, panels, Path(out) / f"{path.stem}.png", width=300)
        n = pictures.geojson(parents, zeroshot.outline_labels(s, valid, lev), lev, list(names), Path(out) / f"{path.stem}.geojson")
        print_table(f"{path.name}: {len(parents)} parents; {out}/{path.stem}.png, .geojson with {n} outlines at {args.level}",
                    ["", *(f"j = {j}" for j in js)], [[mag, *row.values()] for mag, row in picked.items()])
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (results, failed))
        results, failed = {name: r for part, _ in parts for name, r in part.items()}, sum(f for _, f in parts)
        if rank:
            return
    listed = hashlib.sha256(repr(sorted((p.name, p.stat().st_size) for p in paths)).encode()).hexdigest()[:12]
    said = about(subject, "slides", listed, split="all", n=len(results), mpp=args.mpp or "the slides' own", prompts=dict(classes=names, templates=templates))
    data.replace_file(Path(out) / "slides.json", json.dumps(json_ready({"about": said, "slides": results}), indent=1))
    if failed:
        raise ValueError(f"{failed} of {len(paths)} slides could not be read, see above" + (f"; the others are in {out}" if results else ""))


def measure_masks(subject, pics, out, device, args):
    """Pictures with masks: zero-shot at each magnification and merged, and the linear decoder at --level over folds by group."""
    if pics.masks is None:
        raise ValueError(f"{pics.name} has no masks: segment needs a table with columns file,mask (and perhaps group, split)")
    if not args.classes:
        raise ValueError("segment needs --classes: a JSON file {class: [names]} in the order of the masks' values, or one of " + " ".join(prompts.DATASETS))
    names, templates = prompts.find(args.classes, ())
    vision, C, both, split = subject.model.vision, len(names), list(zip(pics.files, pics.masks)), np.array(pics.split)
    test, rows, maps, parts = np.flatnonzero(split == "test") if (split == "test").any() else np.arange(len(both)), {}, {}, []
    segment.check_masks(both, C, args.mpp)                                              # a wrong one is told of now and not after hours
    groups = None if pics.groups is None else np.array(pics.groups)
    if subject.tokenizer:
        W, read = class_weights(subject.model, subject.tokenizer, names.values(), templates=templates), reader(subject.model)
        found, maps = segment.zeroshot(lambda x: read(x)["projected"].float(), W, [both[i] for i in test], vision.size, device, args.mpp)
        rows |= {f"zero-shot {name}": segment.summary(m, None if groups is None else groups[test]) for name, m in found.items()}
    if hasattr(vision, "blocks") and len(both) > 1:
        for train, held in supervised.splits(np.zeros(len(both), int), pics.groups, split, min(args.folds, len(both)), args.seed):
            m, last = segment.decoder(vision, [both[i] for i in train], [both[i] for i in held], C, device, int(args.level[:-1]), args.mpp, seed=args.seed)
            parts.append((held, m))
            maps = maps | {f"linear decoder at {args.level}": last} if held[-1] == test[-1] else maps
        held, m = (np.concatenate(part) for part in zip(*parts))
        rows[f"linear decoder at {args.level}"] = segment.summary(m, None if groups is None else groups[held])
    if not rows:
        raise ValueError(f"{subject.name} has no text tower, and a decoder needs patch tokens and two pictures or more: give a run, --clip, --vit or random")
    which = "test rows" if (split == "test").any() else f"all rows; the decoder over folds by {pics.by or 'row'}"
    said = about(subject, pics.name, pics.hash, split=which, mpp=args.mpp or "the files' own",
                 windows=f"75 % overlap, uniform mean; merged: centred on these pictures; Dice over the pixels of all pictures; interval over {pics.by or 'pictures'}", prompts=dict(classes=names, templates=templates))
    pictures.label_maps(both[test[-1]][0], maps, list(names), Path(out) / "segments.png")
    keep(out, said, {"segment": {"classes": list(names), "rows": rows}}, {"segments.png": f"{both[test[-1]][0].name}: truth and what was found."})
    print(f"\nwrote {out}/results.json, report.html and pictures")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

COMMANDS = "report zeroshot slide probe finetune retrieval segment heatmap"
FLAGS = (  # flag, type (None: a switch), default, the commands that know it, help
    ("--clip", str, None, COMMANDS, "weights of a CLIP: open_clip's, OpenAI's (state dict) or Hugging Face's"),
    ("--quick-gelu", None, False, COMMANDS, "of --clip: OpenAI's and PLIP's weights, not QuiltNet's"),
    ("--tokenizer", str, None, COMMANDS, "of --clip: bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json"),
    ("--vit", str, None, "report probe finetune retrieval segment slide", "weights of a timm ViT, UNI's too"),
    ("--size", str, "synthetic", COMMANDS, "of `random`: a key of model.SIZES"),
    ("--out", str, None, COMMANDS, "folder to write; for heatmap the PNG"),
    ("--data", str, None, "report zeroshot slide probe finetune retrieval segment", "shards, a folder of class folders, or a CSV (the run's shards)"),
    ("--train", str, None, "report zeroshot probe finetune retrieval segment", "a second folder or CSV, the training set of --data"),
    ("--group", str, None, "report zeroshot probe finetune retrieval segment", "column of the CSV to split by"),
    ("--classes", str, None, "report zeroshot slide segment", "JSON file {class: [names]}, or a data set of prompts.py"),
    ("--mpp", str, None, "zeroshot slide segment heatmap", "microns per pixel of the pictures or slides; of slides also a CSV of slide,mpp"),
    ("--levels", None, False, "zeroshot", "at 5x, 10x, 20x and 40x, resampled from --mpp, and merged"),
    ("--labels", str, None, "report slide", "of shards: CSV of slide,label[,patient]"),
    ("--features", str, "backbone", "report probe", "backbone, projected, text_guided: a list with commas"),
    ("--bags", int, None, "report zeroshot slide probe retrieval", "test bags at most, half as many training bags (300; for slide all)"),
    ("--folds", int, 5, "report slide probe finetune segment", "where the data have no split of their own"),
    ("--top", int, 16, "report retrieval", "candidates that image-text matching re-ranks; 0: none"),
    ("--fact", str, "architecture", "finetune", "of the built-in world"),
    ("--level", str, "20x", "finetune slide segment heatmap", "5x, 10x, 20x or 40x: of the patches, outlines, decoder, query"),
    ("--fov-px", int, None, "slide heatmap", "side of a patch at its magnification (what the tower reads)"),
    ("--epochs", int, 30, "finetune", "at most"),
    ("--lr", float, 1e-3, "finetune", "of the head; each layer below .65 of the one above"),
    ("--seed", int, 0, "report probe finetune segment", "of folds and draws"),
)


def arguments(line=None):
    """The command line -> Namespace. A command refuses flags that it does not know; of those it has not, it gets the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS.split():
        c = commands.add_parser(name, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        usage = {"slide": "RUN [SLIDE ...]", "heatmap": "RUN SLIDE QUERY ..."}.get(name, "RUN")
        c.add_argument("what", nargs="*", metavar=usage, help="a folder that train.py wrote; or random, pixels")
        for flag, kind, default, where, text in FLAGS:
            if name in where.split():
                c.add_argument(flag, default=default, help=text, **({"action": "store_true"} if kind is None else {"type": kind}))
            else:
                c.set_defaults(**{flag[2:].replace("-", "_"): default})
    args = parser.parse_args(line)
    args.features = tuple(args.features.split(","))
    if strange := set(args.features) - {"backbone", "projected", "text_guided"}:
        raise ValueError(f"--features {strange.pop()} is none of backbone, projected, text_guided")
    if args.level not in MAG_NAMES:
        raise ValueError(f"--level {args.level} is none of {' '.join(MAG_NAMES)}")
    if args.fact not in prompts.BUILT_IN:
        raise ValueError(f"--fact {args.fact} is none of {' '.join(prompts.BUILT_IN)}")
    for name in ("bags", "folds", "epochs", "fov_px"):
        if getattr(args, name) is not None and getattr(args, name) < 1 + (name == "folds"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too few")
    if args.mpp and args.command in ("zeroshot", "segment"):
        try:
            args.mpp = float(args.mpp)
        except ValueError:
            raise ValueError(f"--mpp {args.mpp} is no number: give microns per pixel, 0.5 for 20x") from None
        if not 0 < args.mpp < (1.2 * data.mpp_of(5) if args.levels else 100):
            raise ValueError(f"--mpp {args.mpp:g} " + ("is below 5x, so no magnification is in the pictures" if args.levels and args.mpp > 0 else "are no microns per pixel: 40x has 0.25, 20x 0.5"))
    return args


def main():
    args = arguments()
    device, more = "cuda" if torch.cuda.is_available() else "cpu", list(args.what)
    if not (args.clip or args.vit) and not more:
        raise ValueError(f"{args.command} what? Give a run folder, --clip FILE, --vit FILE, or the word random or pixels")
    run = None if args.clip or args.vit else more.pop(0)
    if more and args.command not in ("slide", "heatmap"):
        raise ValueError(f"{args.command} takes one model, and {more[0]} is left over: data go behind --data")
    if args.command == "heatmap" and len(more) < 2:
        raise ValueError("heatmap needs a slide and at least one text in quotes")
    if args.command == "heatmap" and args.out and not args.out.lower().endswith(".png"):
        raise ValueError(f"--out {args.out} is no NAME.png: heatmap writes a PNG, and beside it NAME.geojson")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")                                                # only rows of features and words travel
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    subject = load_subject(run, args.clip, args.vit, args.quick_gelu, args.tokenizer, args.size, device)
    if args.command in ("zeroshot", "heatmap") or args.command == "slide" and more:
        reads_text(subject, args.command)
    if args.command == "heatmap":
        out, scale = args.out or "heatmap.png", data.mpp_table(args.mpp, [Path(more[0]).name])[Path(more[0]).name]
        n = zeroshot.heatmap(subject.model, subject.tokenizer, more[0], [(q, MAG_NAMES.index(args.level)) for q in more[1:]], out, scale, args.fov_px, device)
        return print(f"wrote {out} and {Path(out).with_suffix('.geojson')} ({n} outlines)")
    own = run not in (None, "random", "pixels")
    source = args.data or (read_config(run)["data"] if own and not more else None)
    if not source and not more:
        raise ValueError(f"{args.command} of what? {subject.name} has no data of its own: give --data (shards, class folders, or a CSV)")
    shards = None if more else shards_in(source)
    name = "slides" if more else "" if shards and own and not args.data else datasets.name_of(source)
    out = Path(args.out or Path(run if own else Path("results") / subject.name) / name)
    if args.command == "finetune" and not hasattr(subject.model.vision, "blocks"):
        raise ValueError(f"{subject.name} has nothing to fine-tune: give a run, --vit FILE, --clip FILE or random")
    if more:
        return measure_slides(subject, more, out, device, args)
    if "text_guided" in args.features and not subject.keywords:
        raise ValueError(f"{subject.name} has no keywords.json, from which text_guided features take their keywords: only a run of train.py has one")
    if dist.is_initialized() and args.command in ("finetune", "segment"):
        rank = networks.rank()
        dist.destroy_process_group()                                                   # the first goes on alone: its networks must not wait for others
        if rank:
            return
    if args.command == "slide" and not shards:
        raise ValueError("slide measures shards or slide files: `evaluate.py slide RUN SLIDE ... --classes FILE`")
    if shards:
        if wrong := next((f"--{n}" for n in ("group", "levels", "mpp") if getattr(args, n)), None):
            raise ValueError(f"{wrong} is for pictures, and {source} are shards, which know their slides and magnifications")
        if args.train:
            if not shards_in(args.train):
                raise ValueError(f"--train {args.train} holds no shards, and {source} does: give shards")
            shards = shards[0], shards_in(args.train)[1] or shards_in(args.train)[0]
        if args.command == "segment":
            raise ValueError(f"{source} are shards, which have no masks: give --data CSV with columns file,mask (of the built-in world: python synthetic.py --masks)")
        if args.command == "finetune":
            return tune_shards(subject, *shards, out, device, args)
        return measure_shards(subject, *shards, out, device, args, ("zeroshot", "slide", "probe", "retrieval") if args.command == "report" else (args.command,))
    pics = datasets.read_pictures(source, args.train, args.group)
    if args.command == "segment":
        return measure_masks(subject, pics, out, device, args)
    everything = ["zeroshot"] * bool(subject.tokenizer and pics.labels) + ["probe"] * bool(pics.labels) + ["retrieval"] * bool(subject.tokenizer and pics.captions)
    if args.command == "retrieval":
        reads_text(subject, args.command)
    measure_pictures(subject, pics, out, device, args, everything if args.command == "report" else [args.command])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped: features that were read are kept, and the same command goes on behind them", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
