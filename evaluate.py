"""Measure a model: ours or any public CLIP or ViT, on our shards, on folders and tables of labelled pictures, on slide files.

    python evaluate.py report    RUN                                 # what suits the data, all of it -> results.json, PNGs, report.html (train.py ends with it)
    python evaluate.py zeroshot  RUN --data NCT-CRC/ [--levels --mpp 0.5]      # classes by prompts; at 5x, 10x, 20x, 40x and merged
    python evaluate.py slide     RUN [SLIDE ... --classes nsclc]     # MI-Zero; from slide files heatmaps and outlines too; from shards also attention MIL
    python evaluate.py probe     RUN --data index.csv                # logistic regression, prototypes, 20 neighbours, few-shot on frozen features
    python evaluate.py finetune  RUN --data index.csv                # the whole tower
    python evaluate.py retrieval RUN                                 # image <-> caption, re-ranked by image-text matching; patch -> slides of its diagnosis
    python evaluate.py segment   RUN --data masks.csv --mpp 0.25     # Dice of zero-shot windows, and of a linear decoder of patch tokens
    python evaluate.py heatmap   RUN SLIDE "signet ring cells" --out map.png   # and map.geojson for QuPath

RUN is a folder of train.py; instead of it: --clip FILE [--quick-gelu] --tokenizer FILE, or --vit FILE; or the words `random` (untrained weights) and `pixels`
(the picture itself), below which no number means anything. --data is by default the run's own. torchrun shares the reading of the pictures.

The protocols are functions of features and labels: zeroshot.py (no labels to learn from), supervised.py, segment.py, with metrics.py below them. subjects.py has the models,
datasets.py the pictures, report.py what becomes of the results. Here is what is measured on what. Shape letters: C classes, M features, R rows of a task.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py
import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import datasets
import metrics
import model as networks
import pictures
import prompts
import segment
import supervised
import zeroshot
from metrics import scores
from pictures import LEVEL, MAG_NAMES
from report import json_ready, keep, print_table
from subjects import Subject, class_weights, embed, embed_texts, fit, load_run, load_subject, read_config, reader, reader_of, reads_text, spread
from zeroshot import FACTS, labels_of


# ----------------------------------------------------------------------------------------------------------------------
# Probes of shards

def bag_rows(bags, feats, fact, lev):
    """The patches of one magnification that have a fact -> (their places [(row of feats, node)], class numbers [R], slides [R])."""
    y = labels_of(bags, feats["index"], fact)
    spots = np.argwhere((y >= 0) & feats["valid"].numpy() & (LEVEL == lev))
    return spots, y[tuple(spots.T)], np.array([bags.slides[feats["index"][g]] for g, _ in spots])


def bag_tasks(parts, facts=FACTS, mags=MAG_NAMES, most=3000, seed=0):
    """Tasks of shards: parts [(bags, feats, "train" or "test")] -> yields (name, {feature: [R, M]}, y, classes, groups, split, spots [(part, row of feats, node)]), at most `most` rows of a part."""
    rng = np.random.default_rng(seed)
    for fact in facts:
        for mag in mags:
            found = []
            for k, (bags, feats, split) in enumerate(parts):
                spots, y, slides = bag_rows(bags, feats, fact, MAG_NAMES.index(mag))
                use = rng.permutation(len(spots))[:most]
                found.append(({name: feats[name][tuple(spots[use].T)].numpy() for name in feats if name not in ("valid", "index")}, y[use], slides[use], [split] * len(use), [(k, *s) for s in spots[use].tolist()]))
            x, y, slides, split, spots = zip(*found)
            if all(map(len, y)):
                x = {{"v": "projected"}.get(name, name): np.concatenate([part[name] for part in x]) for name in x[0]}
                yield f"{fact} {mag}", x, np.concatenate(y), list(prompts.BUILT_IN[fact]), np.concatenate(slides), sum(split, []), sum(spots, [])


def probe(tasks, features=("backbone",), k=5, seed=0):
    """Every method of supervised.METHODS and few-shot on every feature of every task -> {"probe": [row], "few_shot": [row]}."""
    out = {"probe": [], "few_shot": []}
    for name, x, y, classes, groups, split, *_ in tasks:
        pairs = supervised.splits(y, groups, split, k, seed)
        for feature in (f for f in features if f in x):
            for method, call in supervised.METHODS.items():
                rows, p = supervised.cross(call, x[feature], y, len(classes), pairs)
                who = np.arange(len(y)) if groups is None else groups
                out["probe"].append({"task": name, "features": feature, "method": method, **scores(y[rows], p.argmax(1), len(classes), who[rows], p)})
            out["few_shot"].append({"task": name, "features": feature, "k": supervised.few_shot(x[feature], y, len(classes), pairs)})
    return out


def slide_mil(parts, classes, patients=None, feature="backbone", k=5):
    """Gated-attention MIL per magnification: parts [(bags, feats, {slide: class}, split)], classes, {slide: patient} or None -> {mag: scores}. Fitted on the training slides and measured on
    the test slides where both splits are there, else k-fold by patient."""
    out = {}
    for lev, mag in enumerate(MAG_NAMES):
        xs, y, who, split = [], [], [], []
        for bags, feats, truth, which in parts:
            for slide, gs in zeroshot.by_slide(bags, feats).items():
                use = feats["valid"][gs][:, LEVEL == lev]
                if slide in truth and use.any():
                    xs.append(feats[feature][gs][:, LEVEL == lev][use])
                    y.append(classes.index(truth[slide]))
                    who.append((patients or {}).get(slide, slide))
                    split.append(which)
        y = np.array(y)
        if len(set(y)) > 1:
            rows, p = supervised.mil(xs, y, len(classes), supervised.splits(y, who, split, k))
            out[mag] = scores(y[rows], p.argmax(1), len(classes), np.array(who)[rows], p)
    return out
# ----------------------------------------------------------------------------------------------------------------------
# The commands: shards, pictures, slide files

def shards_in(path):
    """A folder of shards, or with test/ and perhaps train/ in it -> (test, train or None); None for what holds no shards."""
    path = Path(path)
    has = lambda p: p.is_dir() and any(p.glob("bags-*.tar"))
    return (path / "test", path / "train" if has(path / "train") else None) if has(path / "test") else (path, None) if has(path) else None


def features_folder(out, *key):
    """Where the features of a model (fingerprint), data (hash) and way of reading are kept."""
    return Path(out) / "features" / "-".join(map(str, key))


def bags_hash(bags):
    """Twelve digits of the bags' names and valid nodes."""
    return hashlib.sha256("\n".join(bags.keys).encode() + bags.valid.numpy().tobytes()).hexdigest()[:12]


def report(run, test, train, device="cpu"):
    """What train.py ends with: on the run's own shards all that takes seconds. The probes are for the command line."""
    model, tokenizer = load_run(run, device)
    measure_bags(Subject(model, tokenizer, Path(run).resolve().name), test, train, run, device, ("zeroshot", "slide", "retrieval"), pages=True)


def measure_bags(subject, test, train, out, device, wanted, pages=False, most=300, features=("backbone",), top=0, labels=None, classes=None, k=5, cached=False, facts=FACTS, mags=MAG_NAMES, mil=False):
    """The protocols in `wanted` on folders of test and training shards (None: folds of the former)."""
    model, tokenizer = subject.model, subject.tokenizer
    bags, train_bags = data.BagDataset(test), data.BagDataset(train) if train else None
    read = reader_of(subject) if "text_guided" in features else reader(model)
    if bags.S != model.vision.size and networks.rank() == 0:
        print(f"patches of {bags.S} px are resampled to the {model.vision.size} that {subject.name} reads")

    def embedded(which, count):
        folder = features_folder(out, subject.fingerprint, bags_hash(which), count, *features) if cached else None
        return embed(model, which, spread(len(which), count), device, read=read, folder=folder)
    feats = embedded(bags, most)
    base = embedded(train_bags, most // 2) if train else feats                         # for centring and for the probe
    shared = train and set(bags.slides) & set(train_bags.slides)                       # only then are test bags held-out parents of training slides
    gallery = embedded(train_bags, len(train_bags) if shared else 2 * most) if train and (shared and "retrieval" in wanted or mil) else None
    if feats is None:                                                                  # the first process goes on alone
        return
    about = dict(model=subject.name, fingerprint=subject.fingerprint, data=str(test), data_hash=bags_hash(bags), split=f"{len(feats['index'])} test bags" + (f", {len(base['index'])} training bags of {train}" if train else
                 f", no training bags: centred on the test bags, {k} folds by slide"), prompts=dict(classes=prompts.BUILT_IN, templates=prompts.BUILT_IN_TEMPLATES))
    known, parts = zeroshot.labelled(bags, feats), [(bags, feats, "test")] + [(train_bags, base, "train")] * bool(train)
    names, templates = prompts.find(classes, set(labels[0].values())) if labels else (prompts.BUILT_IN["diagnosis"], prompts.BUILT_IN_TEMPLATES)
    truth = zeroshot.slide_truth(bags, feats, table=labels and labels[0]) if known or labels else {}
    if not known and (missing := [w for w in wanted if w in ("zeroshot", "probe") or w == "slide" and not labels]) and not pages:
        raise ValueError(f"{test} has no bags-*.truth.jsonl beside its shards, which {missing[0]} compares with" + ": give --labels CSV (slide,label[,patient])" * (missing[0] == "slide"))
    if "zeroshot" in wanted and known:
        found = zeroshot.of_bags(model, tokenizer, bags, feats, base, intervals=True)
        bar = lambda modes, mag: ((s := (modes["ensemble"]["patch"] | {"merged": modes["ensemble"]["bag"]["merged"]}).get(mag)) and (s["f1"], *s["interval"]["f1"])) or (math.nan, None, None)
        pictures.bars({fact: {mag: bar(modes, mag) for mag in zeroshot.ALL_MAGS} for fact, modes in found.items()}, Path(out) / "levels.png", "Zero-shot by magnification")
        y, W = labels_of(bags, feats["index"], "diagnosis")[:, 0], class_weights(model, tokenizer, prompts.BUILT_IN["diagnosis"].values())
        p = zeroshot.merged_scores(zeroshot.level_scores(feats, W), zeroshot.level_scores(base, W)).argmax(1)
        pictures.confusion(metrics.confusion(y[y >= 0], p[y >= 0], len(W)), list(prompts.BUILT_IN["diagnosis"]), Path(out) / "confusion.png", "Diagnosis per bag, four magnifications merged")
        keep(out, about, {"zeroshot": found}, {"levels.png": "Weighted F1 per patch at each magnification, per bag for the four merged; whiskers: 95 % over slides.", "confusion.png": "Zero-shot diagnosis, merged."})
    if "slide" in wanted and truth:
        about_slides = about | dict(prompts=dict(classes=names, templates=templates))
        if tokenizer:
            keep(out, about_slides, {"slide": zeroshot.of_slides(model, tokenizer, bags, feats, base, names, templates, truth)})
        if mil:
            more = [(train_bags, gallery, zeroshot.slide_truth(train_bags, gallery, table=labels and labels[0]), "train")] if train else []
            keep(out, about, {"mil": slide_mil([(bags, feats, truth, "test" if train else "")] + more, list(names), labels and labels[1], k=k)})
    if "probe" in wanted and known:
        parts = parts if train else [(bags, feats, "")]
        found = probe(bag_tasks(parts, facts, mags), features, k)
        x, y, classes_, _ = max(((x, y, c, name) for name, x, y, c, *_ in bag_tasks(parts[:1], ("cytology",), ("40x",))), key=lambda t: len(t[1]))
        pictures.projection(x[features[0]], y, classes_, Path(out) / "projection.png", f"Cytology at 40x, {features[0]}")
        keep(out, about | dict(regularisation="100 / (M C)"), found, {"projection.png": "Two first principal components of held-out patches' features."})
    if "retrieval" in wanted:
        found = {"retrieval": zeroshot.retrieval(model, tokenizer, bags, feats, top=top if hasattr(model, "fusion") else 0)} if tokenizer else {}
        if shared:
            found["slide_retrieval"] = zeroshot.slide_retrieval(bags, feats, train_bags, gallery)
        if truth:
            found["diagnosis_retrieval"] = zeroshot.diagnosis_retrieval(bags, feats, truth)
        images = {}
        if tokenizer:
            queries = [c[0] for fact in ("architecture", "cytology") for c in prompts.BUILT_IN[fact].values()] if known else sorted({c for i in range(len(bags)) for c in bags.captions(i) if c})[:9]
            pictures.retrieval_sheet(bags, feats, queries, embed_texts(model, tokenizer, queries), Path(out) / "retrieval.png")
            images = {"retrieval.png": "Query texts and the patches closest to them, each from another slide, one row per magnification."}
        keep(out, about, found, images)
    if pages and known and tokenizer and (slide := Path(test).parent / "slides" / Path(test).name / bags.slides[feats["index"][0]]).exists():      # the built-in world keeps its slides there
        facts_there = {fact: next((r[fact] for r in bags.truth(feats["index"][0]) if r and r.get(fact)), None) for fact in FACTS}
        asked = [(prompts.BUILT_IN[fact][name][0], lev) for fact, lev in (("architecture", 0), ("cytology", 2)) if (name := facts_there[fact])] + [("stroma only", 2)]
        zeroshot.heatmap(model, tokenizer, slide, asked, Path(out) / "heatmap.png", fov_px=bags.S, device=device)
    if networks.rank() == 0:
        print(f"\nwrote {out}/results.json, report.html and pictures")


def measure_pictures(subject, pics, out, device, wanted, classes=None, mpp=None, levels=False, features=("backbone",), k=5, top=0, seed=0, epochs=30, lr=1e-3):
    """The protocols in `wanted` on labelled pictures (datasets.Pictures)."""
    model, tokenizer, S = subject.model, subject.tokenizer, subject.model.vision.size
    if pics.labels is None and set(wanted) & {"zeroshot", "probe", "finetune"}:
        raise ValueError(f"{pics.name} has no labels, which {sorted(set(wanted) & {'zeroshot', 'probe', 'finetune'})[0]} needs: class folders, or a column `label` in the table")
    if levels and not mpp:
        raise ValueError("--levels resamples from the pictures' own scale, so it needs --mpp (microns per pixel, as in the data set's description)")
    if pics.groups is None and networks.rank() == 0 and not any(pics.split):
        print(f"{pics.name} has no group column ({', '.join(datasets.COLUMNS['group'][:4])} ...): rows are split one by one, and copies of a patient may lie on both sides")
    about = dict(model=subject.name, fingerprint=subject.fingerprint, data=pics.name, data_hash=pics.hash, groups=pics.by or "none: every row its own")
    groups = None if pics.groups is None else np.array(pics.groups)
    split = np.array(pics.split)
    named, templates = prompts.find(classes, set(pics.labels or ())) if "zeroshot" in wanted else ({}, ())
    order = [c for c in named if c in set(pics.labels)] if named else sorted(set(pics.labels or ()))
    y = pics.targets(order) if pics.labels else None
    if set(wanted) & {"zeroshot", "probe", "retrieval"}:
        read = reader_of(subject) if "text_guided" in features else reader(model)
        if "text_guided" in features and not subject.keywords:
            raise ValueError(f"{subject.name} has no keywords.json, from which text_guided features take their keywords: only a run of train.py has one")
        folder = features_folder(out, subject.fingerprint, pics.stamp, S, f"mpp{mpp}" if levels else "whole", "guided" if "text_guided" in features else "plain")
        found = datasets.features(read, pics.files, S, device, mpp if levels else None, folder)
        if found is None:
            return
        ok = found.pop("ok")
        if (~ok).any():
            print(f"{(~ok).sum()} of {len(ok)} pictures could not be read and are left out")
            about["left_out"] = int((~ok).sum())
        test = ok & ((split == "test") if (split == "test").any() else True)
    if networks.rank():
        return
    if "zeroshot" in wanted:
        x = found["projected"]
        there = np.array([mpp < 1.2 * data.mpp_of(m) for m in data.MAGS]) if levels else None
        result, matrix = zeroshot.of_pictures(model, tokenizer, x[test], y[test], [named[c] for c in order], templates, groups[test] if groups is not None else None, x[ok & ~test] if levels else None, there)
        said = about | dict(split="test rows" if (split == "test").any() else "all rows", prompts=dict(classes={c: named[c] for c in order}, templates=templates))
        if levels:
            said |= dict(mpp=mpp, merged="of " + " ".join(f"{m}x" for m, t in zip(data.MAGS, there) if t), enlarged=" ".join(f"{m}x" for m, t in zip(data.MAGS, there) if not t) or "none")
        pictures.confusion(matrix, order, Path(out) / "confusion.png", f"{subject.name} on {pics.name}, zero-shot" + ", merged" * levels)
        images = {"confusion.png": "Confusion matrix with the prompt ensemble: rows are the truth."}
        if levels:
            pictures.bars({mode: {mag: (s["f1"], *s["interval"]["f1"]) for mag, s in row.items()} for mode, row in result.items()}, Path(out) / "levels.png", f"{subject.name} on {pics.name}")
            images["levels.png"] = "Weighted F1 at each magnification, resampled from the pictures' own, and merged."
        keep(out, said, {"zeroshot": result}, images)
    fold_text = "the source's own" if (split == "test").any() and (split != "test").any() else f"{k} folds by {pics.by or 'row'}, every row predicted once"
    if "probe" in wanted:
        task = (pics.name, {name: x[ok] if x.ndim == 2 else x[ok].mean(1) for name, x in found.items()}, y[ok], order, None if groups is None else groups[ok], split[ok])
        pictures.projection(task[1][features[0]], task[2], order, Path(out) / "projection.png", f"{subject.name}, {features[0]}")
        keep(out, about | dict(split=fold_text, regularisation="100 / (M C)"), probe([task], features, k, seed), {"projection.png": "Two first principal components of the features, coloured by class."})
    if "finetune" in wanted:
        row = tune(subject, datasets.Tiles(pics.files, S), y, order, groups, pics.split, pics.name, device, k, epochs, lr, seed)
        keep(out, about | dict(split=fold_text + "; a fifth of the training groups for early stopping"), {"finetune": [row]})
    if "retrieval" in wanted:
        if pics.captions is None:
            raise ValueError(f"{pics.name} has no captions: retrieval needs a column `caption` in the table")
        rows = np.flatnonzero(test)
        captions = [pics.captions[i] for i in rows]
        same = np.unique(captions, return_inverse=True)[1]
        hit, v, t = same[:, None] == same[None, :], found["projected"][rows], embed_texts(model, tokenizer, captions).numpy()
        result = {"n": len(rows), **zeroshot.recall_both(v, t, hit)}
        if top and hasattr(model, "fusion"):
            images = torch.stack([networks.read_picture(pics.files[i], S) for i in rows])
            result["reranked"] = zeroshot.recall_both(v, t, hit, zeroshot.matcher(model, tokenizer, images, captions), top)
        keep(out, about, {"retrieval": {"all": result}})
    print(f"\nwrote {out}/results.json, report.html and pictures")


def tune(subject, tiles, y, classes, groups, split, name, device, k, epochs, lr, seed):
    """Full fine-tuning over `splits`, each with a fifth of its training groups (or the source's own validation rows) to stop by -> a row of scores."""
    if not hasattr(subject.model.vision, "blocks"):
        raise ValueError(f"{subject.name} has nothing to fine-tune: give a run, --vit FILE, --clip FILE or random")
    rows, p, best, who = [], [], [], np.arange(len(y)) if groups is None else np.asarray(groups)
    for train, test in supervised.splits(y, groups, split, k, seed):
        val = np.array([split[i] == "val" for i in train])
        val = val if val.any() else datasets.folds(y[train], who[train], 5, seed) == 0
        predict, epoch = supervised.fine_tune(subject.model.vision, tiles, y, len(classes), train[~val], train[val], device, epochs=epochs, lr=lr, seed=seed)
        found = predict(test)
        rows, p, best = [*rows, *test[found.sum(1) > 0]], [*p, *found[found.sum(1) > 0]], [*best, epoch]
    rows, p = np.array(rows), np.stack(p)
    return {"task": name, "method": f"fine-tuned, best epochs {' '.join(map(str, best))}", **scores(y[rows], p.argmax(1), len(classes), who[rows], p)}


def tune_bags(subject, test, train, out, device, fact, mag, most=1500, epochs=30, lr=1e-3, k=5, seed=0):
    """Full fine-tuning on the patches of one fact and magnification of shards."""
    parts, sets = [], []
    for folder, split in ((test, "test" if train else ""), (train, "train")):
        if folder:
            bags = data.BagDataset(folder)
            parts.append((bags, {"valid": bags.valid, "index": list(range(len(bags)))}, split))
            sets.append(bags)
    _, _, y, classes, slides, split, spots = next(bag_tasks(parts, (fact,), (mag,), most, seed), (None,) * 7)
    if y is None:
        raise ValueError(f"{test} has no truth of {fact} at {mag}: finetune needs labels")

    class Patches:
        def __getitem__(self, i):
            part, g, n = spots[i]
            x = fit(data.pyramid(sets[part][g]["image"][None])[0, n], subject.model.vision.size)
            return (x * 255).round().to(torch.uint8)[None], None
    row = tune(subject, Patches(), y, classes, slides, split, f"{fact} {mag}", device, k, epochs, lr, seed)
    about = dict(model=subject.name, fingerprint=subject.fingerprint, data=str(test), data_hash=bags_hash(sets[0]), split=f"at most {most} patches of training and of test slides; a fifth of the training slides for early stopping")
    keep(out, about, {"finetune": [row]})


def measure_slides(subject, paths, out, device, classes, mpp=None, fov_px=None, level="10x", js=(1, 5, 10, 50, 100)):
    """Slide files: MI-Zero's class at each magnification and merged, printed; a heatmap of the merged class and outlines of all classes at `level` -> OUT/SLIDE.png, OUT/SLIDE.geojson. Scores are centred
    on each slide's own patches for the outlines, and not at all for the pooled scores: there are no training slides to centre on."""
    model, tokenizer = subject.model, subject.tokenizer
    if not classes:
        raise ValueError("slide files need --classes: a JSON file {class: [names]} or one of " + " ".join(prompts.DATASETS))
    names, templates = prompts.find(classes, ())
    W, lev = class_weights(model, tokenizer, names.values(), templates=templates).numpy(), MAG_NAMES.index(level)
    paths, failed, results = data.find_slides(paths), 0, {}
    for path, scale in zip(paths, data.mpp_table(mpp, [p.name for p in paths]).values()):
        try:
            parents, feats = zeroshot.read_slide(model, path, device, scale, fov_px)
        except (ValueError, OSError) as e:
            print(f"left out: {e}", file=sys.stderr)
            failed += 1
            continue
        v, valid = feats["v"].numpy(), feats["valid"].numpy()
        pooled = zeroshot.pooled_levels(v, valid, W, np.zeros((4, len(W))), js)
        picked = {mag: {j: list(names)[int(s.argmax())] for j, s in row.items()} for mag, row in pooled.items()}
        results[path.name] = {"parents": len(parents), "class": picked, "scores": {mag: {j: s.tolist() for j, s in row.items()} for mag, row in pooled.items()}}
        best, s = list(names).index(picked["merged"][10]), v @ W.T
        with data.Slide(path, scale) as slide:
            panels = [(f"{picked['merged'][10]} at {mag}", i, np.where(valid, s[..., best], np.nan)) for i, mag in enumerate(MAG_NAMES) if (valid & (LEVEL == i)).any()]
            pictures.heatmap(slide, parents, panels, Path(out) / f"{path.stem}.png", width=300)
        n = pictures.geojson(parents, zeroshot.outline_labels(s, valid, lev), lev, list(names), Path(out) / f"{path.stem}.geojson")
        print_table(f"{path.name}: {len(parents)} parents; {out}/{path.stem}.png, .geojson with {n} outlines at {level}", ["", *(f"j = {j}" for j in js)], [[mag, *row.values()] for mag, row in picked.items()])
    file = Path(out) / "slides.json"
    about = dict(model=subject.name, fingerprint=subject.fingerprint, prompts=dict(classes=names, templates=templates), mpp=str(mpp) if mpp else "the slides' own", n=len(results))
    data.replace_file(file, json.dumps(json_ready({"about": about, "slides": results}), indent=1))
    if failed:
        raise ValueError(f"{failed} of {len(paths)} slides could not be read, see above; the others are in {out}")


def measure_masks(subject, pics, out, device, classes, mpp, level="20x", k=5, seed=0):
    """Pictures with masks: zero-shot at each magnification and merged, and the linear decoder at `level` over folds by group."""
    if pics.masks is None:
        raise ValueError(f"{pics.name} has no masks: segment needs a table with columns file,mask (and perhaps group, split)")
    if not classes:
        raise ValueError("segment needs --classes: a JSON file {class: [names]} in the order of the masks' values, or one of " + " ".join(prompts.DATASETS))
    names, templates = prompts.find(classes, ())
    model, C, rows, both = subject.model, len(names), {}, list(zip(pics.files, pics.masks))
    split, maps = np.array(pics.split), {}
    test = np.flatnonzero(split == "test") if (split == "test").any() else np.arange(len(both))
    read = reader(model)
    if subject.tokenizer:
        W = class_weights(model, subject.tokenizer, names.values(), templates=templates)
        found, maps = segment.zeroshot(lambda x: read(x)["projected"].float(), W, [both[i] for i in test], model.vision.size, device, mpp)
        rows |= {f"zero-shot {name}": segment.summary(m) for name, m in found.items()}
    if hasattr(model.vision, "blocks"):
        parts = []
        for train, held in supervised.splits(np.zeros(len(both), int), pics.groups, split, min(k, len(both)), seed) if len(both) > 1 else ():
            m, last = segment.decoder(model.vision, [both[i] for i in train], [both[i] for i in held], C, device, int(level[:-1]), mpp, seed=seed)
            parts.append(m)
            maps = maps | {f"linear decoder at {level}": last} if held[-1] == test[-1] else maps
        if parts:
            rows[f"linear decoder at {level}"] = segment.summary(np.concatenate(parts))
    if not rows:
        raise ValueError(f"{subject.name} has neither a text tower nor patch tokens: give a run, --clip FILE, --vit FILE or random")
    about = dict(model=subject.name, fingerprint=subject.fingerprint, data=pics.name, data_hash=pics.hash, split="test rows" if (split == "test").any() else f"all rows; the decoder over folds by {pics.by or 'row'}",
                 mpp=mpp or "the files' own", windows="75 % overlap, uniform mean; Dice over the pixels of all pictures; interval over pictures", prompts=dict(classes=names, templates=templates))
    if maps:
        pictures.label_maps(both[test[-1]][0], maps, list(names), Path(out) / "segments.png")
    keep(out, about, {"segment": {"classes": list(names), "rows": rows}}, {"segments.png": f"{both[test[-1]][0].name}: truth and what was found."} if maps else {})
    print(f"\nwrote {out}/results.json, report.html and pictures")


def arguments():
    """The command line -> Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("report", "zeroshot", "slide", "probe", "finetune", "retrieval", "segment", "heatmap"):
        c = commands.add_parser(name, allow_abbrev=False)
        c.add_argument("what", nargs="*", metavar="RUN" + {"slide": " [SLIDE ...]", "heatmap": " SLIDE QUERY ..."}.get(name, ""), help="a folder that train.py wrote (or --clip, --vit; or random, pixels)")
        for flag, kind, text_ in (("--clip", str, "a CLIP's weights: open_clip, OpenAI (state dict) or Hugging Face"), ("--vit", str, "a timm ViT's weights, UNI's too"), ("--tokenizer", str, "of --clip: bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json"),
                                  ("--size", str, "of `random`: a key of model.SIZES (synthetic)"), ("--out", str, "folder to write; for heatmap the PNG"), ("--data", str, "shards, a folder of class folders, or a CSV (the run's shards)"),
                                  ("--train", str, "a second folder or CSV: the training set of --data"), ("--group", str, "column of the CSV to split by"), ("--classes", str, "JSON {class: [names]}, or a data set of prompts.py"),
                                  ("--mpp", str, "microns per pixel of the pictures or slides"), ("--labels", str, "slide: CSV of slide,label[,patient] for shards"), ("--features", str, "backbone, projected, text_guided (a list with commas; backbone)"),
                                  ("--fact", str, "of the built-in world, for finetune (architecture)"), ("--level", str, "5x, 10x, 20x or 40x, for finetune, heatmap, outlines, decoder"), ("--fov-px", int, "slide files: patch side at its magnification (what the tower reads)"),
                                  ("--bags", int, "test bags at most; half as many training bags (300)"), ("--folds", int, "where the data has no split of its own (5)"), ("--top", int, "candidates that image-text matching re-ranks (16; 0: none)"),
                                  ("--epochs", int, "finetune, at most (30)"), ("--lr", float, "finetune (1e-3)"), ("--seed", int, "of folds and draws (0)")):
            c.add_argument(flag, type=kind, help=text_)
        c.add_argument("--quick-gelu", action="store_true", help="of --clip: OpenAI's and PLIP's weights, not QuiltNet's")
        c.add_argument("--levels", action="store_true", help="zeroshot: at 5x, 10x, 20x and 40x, resampled from --mpp, and merged")
    return parser.parse_args()


def main():
    args = arguments()
    device, more = "cuda" if torch.cuda.is_available() else "cpu", list(args.what)
    if args.clip or args.vit:
        run = None
    elif not more:
        raise ValueError(f"{args.command} what? Give a run folder, --clip FILE, --vit FILE, or the word random or pixels")
    else:
        run = more.pop(0)
    if more and args.command not in ("slide", "heatmap"):
        raise ValueError(f"{args.command} takes one model, and {more[0]} is left over: data go behind --data")
    if args.level and args.level not in MAG_NAMES:
        raise ValueError(f"--level {args.level} is none of {' '.join(MAG_NAMES)}")
    features = tuple((args.features or "backbone").split(","))
    if strange := set(features) - {"backbone", "projected", "text_guided"}:
        raise ValueError(f"--features {strange.pop()} is none of backbone, projected, text_guided")
    mpp = args.mpp
    if mpp and args.command not in ("slide", "heatmap"):
        try:
            mpp = float(mpp)
        except ValueError:
            raise ValueError(f"--mpp {mpp} is no number: give microns per pixel, 0.5 for 20x") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    subject = load_subject(run, args.clip, args.vit, args.quick_gelu, args.tokenizer, args.size or "synthetic", device)
    if args.command in ("zeroshot", "heatmap", "slide") and (args.command != "slide" or more):
        reads_text(subject, args.command)
    if args.command == "heatmap":
        if len(more) < 2:
            raise ValueError("heatmap needs a slide and at least one text in quotes")
        out, lev = args.out or "heatmap.png", MAG_NAMES.index(args.level or "20x")
        scale = data.mpp_table(mpp, [Path(more[0]).name])[Path(more[0]).name]
        n = zeroshot.heatmap(subject.model, subject.tokenizer, more[0], [(q, lev) for q in more[1:]], out, scale, args.fov_px, device)
        return print(f"wrote {out} and {Path(out).with_suffix('.geojson')} ({n} outlines)")
    own = run not in (None, "random", "pixels")
    source = args.data or (None if more else own and read_config(run)["data"])
    if not source and not more:
        raise ValueError(f"{args.command} of what? {subject.name} has no data of its own: give --data (shards, class folders, or a CSV)")
    shards = not more and shards_in(source)
    name = "slides" if more else None if shards and own and not args.data else datasets.name_of(source)
    out = Path(args.out) if args.out else Path(run if own else Path("results") / subject.name) / (name or "")
    out.mkdir(parents=True, exist_ok=True)
    shared = dict(features=features, k=args.folds or 5, top=16 if args.top is None else args.top)
    if more:
        measure_slides(subject, more, out, device, args.classes, mpp, args.fov_px, args.level or "10x")
    elif shards and args.command == "finetune":
        tune_bags(subject, *shards, out, device, args.fact or "architecture", args.level or "10x", epochs=args.epochs or 30, lr=args.lr or 1e-3, k=shared["k"], seed=args.seed or 0)
    elif shards and args.command != "segment":
        wanted = ("zeroshot", "slide", "probe", "retrieval") if args.command == "report" else (args.command,)
        if subject.tokenizer is None:
            wanted = [w for w in wanted if w != "zeroshot"]
        measure_bags(subject, *shards, out, device, wanted, pages=args.command == "report", most=args.bags or 300, cached=True, mil=args.command in ("slide", "report"), classes=args.classes,
                     labels=datasets.read_labels(args.labels) if args.labels else None, **shared)
    elif shards:
        raise ValueError(f"{source} are shards, which have no masks: give --data CSV with columns file,mask (of the built-in world: python synthetic.py masks)")
    else:
        pics = datasets.read_pictures(source, args.train, args.group)
        if args.command == "segment":
            return measure_masks(subject, pics, out, device, args.classes, mpp, args.level or "20x", shared["k"], args.seed or 0)
        if args.command == "slide":
            raise ValueError("slide measures shards or slide files: `evaluate.py slide RUN SLIDE ... --classes FILE`")
        wanted = [args.command]
        if args.command == "report":
            wanted = ["zeroshot"] * bool(subject.tokenizer and pics.labels) + ["probe"] * bool(pics.labels) + ["retrieval"] * bool(subject.tokenizer and pics.captions)
        measure_pictures(subject, pics, out, device, wanted, args.classes, mpp, args.levels, seed=args.seed or 0, epochs=args.epochs or 30, lr=args.lr or 1e-3, **shared)


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
