"""Measure a trained run: zero-shot per magnification and merged, slides, retrieval, linear probe; and two pictures.

    python evaluate.py report    RUN                    # everything below -> RUN/results.json and the PNGs (train.py ends with it)
    python evaluate.py zeroshot  RUN [--data DIR]       # classes by prompts, at 5x, 10x, 20x, 40x and the four merged
    python evaluate.py slide     RUN                    # slide diagnosis by the best j patches
    python evaluate.py probe     RUN                    # logistic regression on frozen features
    python evaluate.py retrieval RUN                    # image <-> caption, recall at 1, 5, 10
    python evaluate.py heatmap   RUN SLIDE "signet ring cells" --out map.png

Shape letters: G bags, N = 85 nodes, C classes, d the shared space, M features, R rows of a task.

References: [1] MR-PLIP, CVPR 2025, section 4.  [2] Lu et al. 2023, MI-Zero (top-j pooling).  [3] Lu et al. 2024, CONCH (protocols).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import model as networks
import prompts
import text
from runs import read_checkpoint

FACTS = tuple(prompts.BUILT_IN)
LEVEL = np.array([data.level(n) for n in range(data.NODES)])  # [N] 0..3
MAG_NAMES = tuple(f"{m}x" for m in data.MAGS)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics, in NumPy, small enough to check by eye

def confusion(y, p, C):
    """Counts [C, C]: row = truth y [R], column = prediction p [R]."""
    return np.bincount(np.asarray(y) * C + np.asarray(p), minlength=C * C).reshape(C, C)


def scores(y, p, C):
    """dict: weighted F1 (per-class F1 averaged by support, [1]'s metric), balanced accuracy (mean recall over the classes
    present), accuracy, number of rows."""
    m = confusion(y, p, C).astype(float)
    hit, support, predicted = m.diagonal(), m.sum(1), m.sum(0)
    f1 = 2 * hit / np.maximum(support + predicted, 1)
    present = support > 0
    return {"f1": float((f1 * support).sum() / support.sum()), "balanced": float((hit[present] / support[present]).mean()),
            "accuracy": float(hit.sum() / support.sum()), "n": int(support.sum())}


# ----------------------------------------------------------------------------------------------------------------------
# Features

def load_run(run, device="cpu"):
    """Folder of a run -> (MRPLIP in eval mode, Tokenizer). ValueError when it holds no checkpoint."""
    run, (state, path) = Path(run), read_checkpoint(run)
    for name, there in (("ckpt.pt", state), ("tokenizer.json", (run / "tokenizer.json").exists())):
        if not there:
            raise ValueError(f"{run} holds no {name}: it is not a run folder, or nothing was saved yet; train with `torchrun train.py --out {run}`")
    size = state["config"]["size"]
    if size not in networks.SIZES:
        raise ValueError(f"{path} is of size {size!r}, which model.SIZES does not have: write it back there")
    tokenizer = text.Tokenizer.load(run / "tokenizer.json")
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **networks.SIZES[size])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise ValueError(f"{path} holds other networks than this code builds ({str(e).splitlines()[1].strip()}): use the commit that trained it (first line of {run}/log.jsonl)") from e
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def embed(model, bags, indices, device="cpu", at_once=8):
    """Every patch of the chosen bags: dict of v [G, N, d] (normalised), backbone [G, N, Dv] (class token, what a probe reads),
    valid [G, N], index [G]. Several processes share the work, and only the first gets the answer; the others None."""
    world, rank = networks.world_size(), networks.rank()
    mine, rows = list(indices)[rank::world], []
    for i in tqdm(range(0, len(mine), at_once), desc="embed", unit="batch", leave=False, disable=None if rank == 0 else True):
        items = [bags[j] for j in mine[i : i + at_once]]
        patches = data.pyramid(torch.stack([x["image"] for x in items]).to(device))                    # [g, N, 3, S, S]
        tokens = model.vision(patches.flatten(0, 1))
        rows.append([model.project(tokens).view(len(items), data.NODES, -1).cpu(), tokens[:, 0].float().view(len(items), data.NODES, -1).cpu().clone(),  # not a view: all patch tokens would stay with it
                     torch.stack([x["valid"] for x in items])])
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(rows, parts)
        if rank:
            return None
        rows = [row for part in parts for row in part]
    back = np.argsort([i for r in range(world) for i in range(r, len(indices), world)])
    return {name: torch.cat(x)[back] for name, x in zip(("v", "backbone", "valid"), zip(*rows))} | {"index": list(indices)}


@torch.no_grad()
def embed_texts(model, tokenizer, texts, at_once=256):
    """list of R texts -> unit vectors [R, d] on the CPU."""
    device, context, rows = next(model.parameters()).device, len(model.text.pos), []
    for i in range(0, len(texts), at_once):
        ids = text.trim(tokenizer.batch(texts[i : i + at_once], context), tokenizer.end)
        rows.append(model.encode_text(ids.to(device)).cpu())
    return torch.cat(rows)


def class_weights(model, tokenizer, names, ensemble=True):
    """One unit vector per class [C, d]: the mean of its prompts' embeddings, normalised again [3]. names: per class a tuple."""
    means = [embed_texts(model, tokenizer, prompts.class_prompts(alternatives, prompts.BUILT_IN_TEMPLATES, ensemble)).mean(0) for alternatives in names]
    return F.normalize(torch.stack(means), dim=-1)


def labels_of(bags, indices, fact):
    """Ground truth [G, N]: class number, or -1 where the fact is not defined (no tumour) or no truth file is there."""
    names = {name: c for c, name in enumerate(prompts.BUILT_IN[fact])}
    y = np.full((len(indices), data.NODES), -1)
    for g, i in enumerate(indices):
        for n, row in enumerate(bags.truth(i) or []):
            if row and row.get(fact) is not None:
                y[g, n] = names[row[fact]]
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Zero-shot. Merging the four magnifications of a bag: a level whose captions never name a fact still prefers some class,
# always the same one, and plain averaging lets it vote. So each level's scores are centred on *training* bags (no labels
# needed) and then added; a level that cannot see the fact varies little, so it needs no weight. Chosen once, for all facts.

def level_scores(feats, W):
    """Class scores of each magnification of each bag: mean cosine over its valid nodes -> [G, 4, C], NaN where there are none."""
    s = (feats["v"] @ W.T).numpy()                                                                       # [G, N, C]
    ok = feats["valid"].numpy()
    out = np.full((len(s), 4, s.shape[2]), np.nan)
    for lev in range(4):
        m = ok[:, LEVEL == lev, None]
        count = m.sum(1)
        out[:, lev] = np.where(count > 0, (s[:, LEVEL == lev] * m).sum(1) / np.maximum(count, 1), np.nan)
    return out


def merged_scores(test, train):
    """Level scores [G, 4, C] of test and training bags -> merged [G, C]: the sum over levels of centred scores. Centring on
    the training bags removes a level's constant preference; its spread is left as it is, since a level that cannot
    see the fact varies little."""
    there = ~np.isnan(train)
    centre = np.where(there, train, 0).sum(0) / np.maximum(there.sum(0), 1)                              # [4, C]
    return np.nansum(test - centre, axis=1)


def zeroshot(model, tokenizer, bags, feats, train, modes=("ensemble", "single")):
    """Every fact, with the prompt ensemble and without: per patch at each magnification; per bag at each magnification and
    merged. A bag counts where its 5x parent has the fact. -> nested dict of `scores`."""
    out = {}
    for fact in FACTS:
        y = labels_of(bags, feats["index"], fact)
        if not (y >= 0).any():
            continue
        C = len(prompts.BUILT_IN[fact])
        for mode in modes:
            W = class_weights(model, tokenizer, prompts.BUILT_IN[fact].values(), mode == "ensemble")
            node = (feats["v"] @ W.T).argmax(-1).numpy()                                                 # [G, N]
            row = {"patch": {}, "bag": {}}
            for lev, mag in enumerate(MAG_NAMES):
                use = (y >= 0) & (LEVEL == lev) & feats["valid"].numpy()
                if use.any():
                    row["patch"][mag] = scores(y[use], node[use], C)
            mine, theirs = level_scores(feats, W), level_scores(train, W)
            use = y[:, 0] >= 0
            for lev, mag in enumerate(MAG_NAMES):
                there = use & ~np.isnan(mine[:, lev, 0])
                if there.any():
                    row["bag"][mag] = scores(y[there, 0], mine[there, lev].argmax(-1), C)
            row["bag"]["merged"] = scores(y[use, 0], merged_scores(mine, theirs)[use].argmax(-1), C)
            out.setdefault(fact, {})[mode] = row
    return out


def labelled(bags, feats):
    """Is there ground truth beside the shards that features were computed of?"""
    return bool(bags.truth(feats["index"][0]))


def glance(model, tokenizer, bags, test, train):
    """The few numbers that training shows now and then: features of test and training bags -> {name: float}. Weighted F1 of the zero-shot
    protocol, per patch and merged, where the truth is known; else the mean recall of retrieval."""
    if labelled(bags, test):
        modes = {fact: row["ensemble"] for fact, row in zeroshot(model, tokenizer, bags, test, train, ("ensemble",)).items()}
        return {f"{fact}_{mag}": s["f1"] for fact, row in modes.items() for mag, s in (*row["patch"].items(), ("merged", row["bag"]["merged"]))}
    return {f"retrieval_{mag}": row["mean"] for mag, row in retrieval(model, tokenizer, bags, test).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Slides, retrieval, probe

def slide_zeroshot(model, tokenizer, bags, feats, train, fact="diagnosis", js=(1, 5, 10, 50, 100)):
    """MI-Zero [2]: the score of a class on a slide is the mean of its j best patches; argmax over classes. Per magnification
    and for their centred sum, for every j (clipped to the patches there are). -> dict mag -> j -> `scores`.
    A slide's truth is the one its patches agree on most."""
    W, C = class_weights(model, tokenizer, prompts.BUILT_IN[fact].values()), len(prompts.BUILT_IN[fact])
    y = labels_of(bags, feats["index"], fact)
    slides = {}
    for g, i in enumerate(feats["index"]):
        slides.setdefault(bags.slides[i], []).append(g)
    slides = {s: gs for s, gs in slides.items() if (y[gs] >= 0).any()}
    if not slides:
        return {}
    truth = np.array([np.bincount(y[gs][y[gs] >= 0]).argmax() for gs in slides.values()])
    score, valid = (feats["v"] @ W.T).numpy(), feats["valid"].numpy()
    base = (train["v"] @ W.T).numpy()
    out = {}
    for j in js:
        total = np.zeros((len(slides), C))
        for lev, mag in enumerate(MAG_NAMES):
            centre = base[:, LEVEL == lev][train["valid"].numpy()[:, LEVEL == lev]].mean(0) if len(base) else 0.0
            pooled = np.full((len(slides), C), np.nan)
            for k, gs in enumerate(slides.values()):
                s = score[gs][:, LEVEL == lev][valid[gs][:, LEVEL == lev]]                                # [patches, C]
                if len(s):
                    pooled[k] = np.sort(s, 0)[-j:].mean(0)
            if np.isnan(pooled).all():
                continue
            total += np.nan_to_num(pooled - centre)
            out.setdefault(mag, {})[j] = scores(truth, np.nan_to_num(pooled, nan=-9).argmax(1), C)
        out.setdefault("merged", {})[j] = scores(truth, total.argmax(1), C)
    return out


@torch.no_grad()
def retrieval(model, tokenizer, bags, feats, most=300, seed=0):
    """Image -> caption and caption -> image among at most `most` patches of one magnification, recall at 1, 5, 10 in each
    direction and their mean. A caption that several patches share is a hit for each of them. Chance is K / candidates."""
    rng, out, texts = np.random.default_rng(seed), {}, [bags.captions(i) for i in feats["index"]]
    for lev, mag in enumerate(MAG_NAMES):
        spots = [(g, n) for g, n in np.argwhere(feats["valid"].numpy() & (LEVEL == lev)) if texts[g][n]]
        if len(spots) < 2:
            continue
        spots = [spots[k] for k in rng.permutation(len(spots))[:most]]
        captions = [texts[g][n] for g, n in spots]
        v = torch.stack([feats["v"][g, n] for g, n in spots])                                            # [R, d]
        t = embed_texts(model, tokenizer, captions)                                                      # [R, d]
        same = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
        hit = same[:, None] == same[None, :]                                                             # [R, R]
        row = {"n": len(spots)}
        for name, sim in (("image_to_text", v @ t.T), ("text_to_image", t @ v.T)):
            order = hit.gather(1, sim.argsort(1, descending=True))
            for k in (1, 5, 10):
                row[f"{name}_R@{k}"] = float(order[:, :k].any(1).float().mean())
        row["mean"] = float(np.mean([x for key, x in row.items() if "@" in key]))
        out[mag] = row
    return out


def slide_retrieval(bags, feats, gallery_bags, gallery):
    """Which slide does a held-out parent come from? Nearest gallery bag by the image feature of each magnification (mean over
    the valid nodes of a level) and of the four together -> dict mag -> accuracy, with chance."""
    def bag_vectors(f):
        ok = f["valid"].float()[..., None]
        per = [F.normalize((f["v"] * ok)[:, LEVEL == lev].sum(1), dim=-1) for lev in range(4)]           # 4 x [G, d]
        return per + [torch.cat(per, -1)]
    names = [gallery_bags.slides[i] for i in gallery["index"]]
    own = [bags.slides[i] for i in feats["index"]]
    out = {"n": len(own), "slides": len(set(names)), "chance": float(np.mean([names.count(s) / len(names) for s in own]))}
    for mag, a, b in zip((*MAG_NAMES, "merged"), bag_vectors(feats), bag_vectors(gallery)):
        out[mag] = float(np.mean([names[int(k)] == s for k, s in zip((a @ b.T).argmax(1), own)]))
    return out


def fit_probe(x, y, C, iterations=200):
    """Multinomial logistic regression by L-BFGS: x [R, M] float, y [R] -> (W [C, M], b [C]). Minimises the summed
    cross-entropy + lambda / 2 |W|^2 with lambda = 100 / (M C), the published setting [3]; features are standardised by the caller."""
    W, b = torch.zeros(C, x.shape[1], requires_grad=True), torch.zeros(C, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W.T + b, y, reduction="sum") + 50 / (x.shape[1] * C) * (W ** 2).sum()
        (loss / len(x)).backward()
        return loss / len(x)
    optimizer.step(closure)
    return W.detach(), b.detach()


def probe(bags, feats, train_bags, train, most=3000, seed=0):
    """Linear probe of the frozen class token, per fact and magnification: fitted on at most `most` patches of the training
    bags, tested on the others. -> dict fact -> mag -> `scores`."""
    rng, out = np.random.default_rng(seed), {}
    for fact in FACTS:
        y0, y1 = (torch.from_numpy(labels_of(b, f["index"], fact)) for b, f in ((train_bags, train), (bags, feats)))
        for lev, mag in enumerate(MAG_NAMES):
            use0, use1 = ((y >= 0) & f["valid"] & torch.from_numpy(LEVEL == lev) for y, f in ((y0, train), (y1, feats)))
            if not use0.any() or not use1.any():
                continue
            x, y = train["backbone"][use0], y0[use0]
            keep = torch.from_numpy(rng.permutation(len(x))[:most])
            mean, std = x[keep].mean(0), x[keep].std(0) + 1e-6
            W, b = fit_probe((x[keep] - mean) / std, y[keep], len(prompts.BUILT_IN[fact]))
            p = (((feats["backbone"][use1] - mean) / std) @ W.T + b).argmax(1)
            out.setdefault(fact, {})[mag] = scores(y1[use1].numpy(), p.numpy(), len(prompts.BUILT_IN[fact]))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

def colour(x):
    """Values in [0, 1] -> uint8 [..., 3]: dark blue over green to yellow, readable in grey too."""
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
    at = np.clip(x, 0, 1)[..., None] * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    return (stops[low[..., 0]] * (1 - at + low) + stops[low[..., 0] + 1] * (at - low)).astype(np.uint8)


@torch.no_grad()
def heatmap(model, tokenizer, slide_path, queries, out, mpp=None, fov_px=64, width=460):
    """Where on a slide is the text? The thumbnail and, beside it, one map per (query, level 0..3): cosine of every patch of
    every 5x parent with tissue, from the lowest (dark) to the highest (yellow) of the slide."""
    device = next(model.parameters()).device
    t = embed_texts(model, tokenizer, [q for q, _ in queries])
    with data.Slide(slide_path, mpp) as slide:
        parents = data.choose_parents(slide, fov_px=fov_px, parents=10 ** 9, min_tissue=0.1)
        if not parents:
            raise ValueError(f"{slide_path} has no 5x parent with tissue: look at it with `python data.py preview`")
        scale = max(1, round(max(slide.size) / width))
        thumb = Image.fromarray(data.thumbnail(slide, scale))
        maps = [np.full((thumb.height, thumb.width), np.nan) for _ in queries]
        S = model.vision.size
        for x, y, side, tissue in tqdm(parents, desc="heatmap", unit="bag", leave=False):
            image = torch.from_numpy(slide.read(x, y, side, 8 * S)).permute(2, 0, 1)[None].to(device)
            v = model.encode_image(data.pyramid(image)[0])                                               # [N, d]
            cos = (v.cpu() @ t.T).numpy()                                                                # [N, queries]
            for q, (_, lev) in enumerate(queries):
                for n in range(data.NODES)[data.LEVELS[lev]]:
                    if tissue[n] >= 0.1:
                        nx, ny, ns = data.square(n, x, y, side)
                        a, b, c = round(nx / scale), round(ny / scale), max(1, round(ns / scale))
                        maps[q][max(b, 0) : b + c, max(a, 0) : a + c] = cos[n, q]
        panels = [(thumb, Path(slide_path).name)]
        for (query, lev), m in zip(queries, maps):
            low, high = np.nanpercentile(m, [5, 95])
            tint = colour(np.nan_to_num((m - low) / max(high - low, 1e-6)))
            page = np.where(np.isnan(m)[..., None], np.asarray(thumb), (0.35 * np.asarray(thumb) + 0.65 * tint).astype(np.uint8))
            panels.append((Image.fromarray(page), f'"{query}" at {MAG_NAMES[lev]}'))
    page = Image.new("RGB", (sum(p.width + 8 for p, _ in panels), thumb.height + 22), "white")
    at = 0
    for panel, title in panels:
        page.paste(panel, (at, 22))
        ImageDraw.Draw(page).text((at + 2, 4), title, "black", font_size=13)
        at += panel.width + 8
    data.save_png(page, out)


@torch.no_grad()
def retrieval_sheet(model, tokenizer, bags, feats, queries, out, best=5, px=72):
    """For each query text (a block) the `best` patches of each magnification (a row), each from another slide if possible."""
    t = embed_texts(model, tokenizer, queries)
    valid, left = feats["valid"].numpy(), 40
    block_w, block_h = left + best * (px + 3) + 14, 4 * (px + 3) + 26
    columns = 3
    page = Image.new("RGB", (columns * block_w, -(-len(queries) // columns) * block_h), "white")
    draw = ImageDraw.Draw(page)
    for q, query in enumerate(queries):
        x0, y0 = q % columns * block_w, q // columns * block_h
        draw.text((x0 + 4, y0 + 4), query if len(query) < 56 else query[:53] + "...", "black", font_size=14)
        cos = (feats["v"] @ t[q]).numpy()                                                                # [G, N]
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
                page.paste(tile, (x0 + left + shown * (px + 3), y0 + 24 + lev * (px + 3)))
                shown += 1
                if shown == best:
                    break
    data.save_png(page, out)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and the command line

def print_zeroshot(result):
    """The table of the README: weighted F1 with the prompt ensemble; patches, then bags."""
    print(f"\nzero-shot, weighted F1 (prompt ensemble; without it in brackets)\n{'':24}" + "".join(f"{m:>14}" for m in (*MAG_NAMES, "merged")))
    for fact, modes in result.items():
        for unit in ("patch", "bag"):
            cells = []
            for mag in (*MAG_NAMES, "merged"):
                a, b = (modes[m][unit].get(mag) for m in ("ensemble", "single"))
                cells.append(f"{a['f1']:.3f} ({b['f1']:.3f})" if a else "")
            n = next(iter(modes["ensemble"][unit].values()))["n"] if unit == "patch" else modes["ensemble"]["bag"]["merged"]["n"]
            print(f"{fact + ' per ' + unit:24}" + "".join(f"{c:>14}" for c in cells) + (f"   n = {n}" if unit == "bag" else ""))


def write_results(run, results):
    """Merge into RUN/results.json, whole or not at all."""
    path = Path(run) / "results.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    data.replace_file(path, json.dumps({**old, **results}, indent=1))


def spread(n, most):
    """At most `most` of n bag numbers, evenly spread: every slide gives some."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def report(run, test, train, device="cpu", only=None, most=300):
    """Run the protocols in `only` (None = all) on folders of test and training shards; print, write results.json and pictures."""
    model, tokenizer = load_run(run, device)
    bags, train_bags = data.BagDataset(test), data.BagDataset(train)
    feats = embed(model, bags, spread(len(bags), most), device)
    base = embed(model, train_bags, spread(len(train_bags), most // 2), device)  # for centring and for the probe
    wanted, shared = lambda name: only is None or name == only, set(bags.slides) & set(train_bags.slides)
    # only where test bags are held-out parents of training slides
    gallery = embed(model, train_bags, range(len(train_bags)), device) if shared and wanted("retrieval") else None
    if feats is None:  # the first process goes on alone
        return None
    results = {}
    known = labelled(bags, feats)
    if known and wanted("zeroshot"):
        results["zeroshot"] = zeroshot(model, tokenizer, bags, feats, base)
        print_zeroshot(results["zeroshot"])
    if known and wanted("slide"):
        results["slide"] = slide_zeroshot(model, tokenizer, bags, feats, base)
        print("\nslide-level zero-shot diagnosis, weighted F1 by the best j patches")
        for mag, row in results["slide"].items():
            print(f"  {mag:>7}: " + "  ".join(f"j={j} {s['f1']:.3f}" for j, s in row.items()) + f"   n = {next(iter(row.values()))['n']} slides")
    if known and wanted("probe"):
        results["probe"] = probe(bags, feats, train_bags, base)
        print("\nlinear probe of the frozen class token, weighted F1")
        for fact, row in results["probe"].items():
            print(f"  {fact:13}" + "".join(f"  {mag} {s['f1']:.3f}" for mag, s in row.items()))
    if wanted("retrieval"):
        results["retrieval"] = retrieval(model, tokenizer, bags, feats)
        print("\nretrieval, recall at 1 / 5 / 10")
        for mag, r in results["retrieval"].items():
            print(f"  {mag:>4}: " + "   ".join(f"{name.replace('_', ' ')} " + " / ".join(f"{r[f'{name}_R@{k}']:.3f}" for k in (1, 5, 10))
                                              for name in ("image_to_text", "text_to_image")) + f"   ({r['n']} candidates, chance R@1 {1 / r['n']:.3f})")
    if gallery:
        results["slide_retrieval"] = slide_retrieval(bags, feats, train_bags, gallery)
        print("\nwhich slide does a held-out parent come from: " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in results["slide_retrieval"].items()))
    if only is None:
        slide = Path(test).parent / "slides" / Path(test).name / bags.slides[feats["index"][0]]  # the built-in world keeps its slides there
        if known and slide.exists():
            truth = {fact: next((r[fact] for r in bags.truth(feats["index"][0]) if r[fact]), None) for fact in FACTS}
            asked = [(prompts.BUILT_IN[fact][name][0], lev) for fact, lev in (("architecture", 0), ("cytology", 2)) if (name := truth[fact])]
            heatmap(model, tokenizer, slide, asked + [("stroma only", 2)], Path(run) / "heatmap.png", fov_px=bags.S)
            print(f"wrote {run}/heatmap.png")
        queries = [names[0] for fact in ("architecture", "cytology") for names in prompts.BUILT_IN[fact].values()] if known else \
            sorted({c for i in range(len(bags)) for c in bags.captions(i) if c})[:9]
        retrieval_sheet(model, tokenizer, bags, feats, queries, Path(run) / "retrieval.png")
        print(f"\nwrote {run}/results.json, {run}/retrieval.png")
    write_results(run, results)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("report", "zeroshot", "slide", "probe", "retrieval"):
        c = commands.add_parser(name)
        c.add_argument("run", help="folder that train.py wrote")
        c.add_argument("--data", help="folder with test/ and train/ shards (default: the run's)")
        c.add_argument("--bags", type=int, default=300, help="test bags at most; half as many training bags (300)")
    c = commands.add_parser("heatmap")
    c.add_argument("run")
    c.add_argument("slide")
    c.add_argument("query", nargs="+", help="texts, one map each")
    c.add_argument("--level", choices=MAG_NAMES, default="20x", help="magnification of the patches (20x)")
    c.add_argument("--mpp", type=float, help="level-0 microns per pixel where the slide does not say")
    c.add_argument("--fov-px", type=int, default=64, help="patch side in pixels at its magnification, as in tiling (64)")
    c.add_argument("--out", default="heatmap.png")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.command == "heatmap":
        model, tokenizer = load_run(args.run, device)
        heatmap(model, tokenizer, args.slide, [(q, MAG_NAMES.index(args.level)) for q in args.query], args.out, args.mpp, args.fov_px)
        print(f"wrote {args.out}")
    else:
        if not (Path(args.run) / "config.json").exists():
            raise ValueError(f"{args.run} holds no config.json: it is not a run folder of train.py")
        folder = Path(args.data or json.loads((Path(args.run) / "config.json").read_text())["data"])
        report(args.run, folder / "test", folder / "train", device, None if args.command == "report" else args.command, args.bags)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
