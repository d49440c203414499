"""Protocols that need no labels to learn from: zero-shot by prompts, slides by their best patches, retrieval.

Everything is a cosine: of an image and a class text, of an image and a caption. What differs is what is averaged before the best is taken.

Outline: zero-shot and the merging of magnifications | slides (MI-Zero), heatmaps | retrieval, re-ranked by image-text matching.
Shape letters: G bags, N = 85 nodes, C classes, d the shared space, R rows of a task, P parents of a slide, J patches.

References: [1] MR-PLIP, CVPR 2025, section 4.  [2] Lu et al. 2023, MI-Zero (top-j pooling).  [3] Lu et al. 2024, CONCH (prompt ensembles).  [4] Li et
al. 2021, ALBEF (re-ranking).
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import metrics
import model as networks
import pictures
import prompts
import text
from metrics import scores
from pictures import LEVEL, MAG_NAMES
from subjects import by_slide, class_weights, embed_texts, fit, labelled, labels_of, reader

FACTS = tuple(prompts.BUILT_IN)
ALL_MAGS = (*MAG_NAMES, "merged")


# ----------------------------------------------------------------------------------------------------------------------
# Zero-shot. Merging the four magnifications of a bag: a level whose captions never name a fact still prefers some class,
# always the same one, and plain averaging lets it vote. So each level's scores are centred on *training* bags (no labels
# needed) and then added; a level that cannot see the fact varies little, so it needs no weight. Chosen once, for all facts.

def level_scores(feats, W):
    """Class scores of each magnification of each bag: mean cosine over its valid nodes -> [G, 4, C], NaN where there are none."""
    s = (feats["v"] @ W.T).numpy()                                                     # [G, N, C]
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
    centre = np.where(there, train, 0).sum(0) / np.maximum(there.sum(0), 1)            # [4, C]
    return np.nansum(test - centre, axis=1)


def softmax(s, scale=1.0):
    """Scores [..., C] -> probabilities."""
    e = np.exp(scale * (s - s.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def of_bags(model, tokenizer, bags, feats, train, modes=("ensemble", "single"), intervals=False):
    """Every fact, with the prompt ensemble and without: per patch at each magnification; per bag at each magnification and
    merged. A bag counts where its 5x parent has the fact. -> nested dict of `scores`, with intervals over slides if asked for."""
    out, scale = {}, float(model.itc_scale.detach().exp())
    slides = np.array([bags.slides[i] for i in feats["index"]])
    for fact in FACTS:
        y = labels_of(bags, feats["index"], fact)
        if not (y >= 0).any():
            continue
        C = len(prompts.BUILT_IN[fact])

        def score(truth, s, who):
            more = dict(groups=who, probability=softmax(s, scale)) if intervals else {}
            return scores(truth, s.argmax(-1), C, **more)
        for mode in modes:
            W = class_weights(model, tokenizer, prompts.BUILT_IN[fact].values(), mode == "ensemble")
            node = (feats["v"] @ W.T).numpy()                                          # [G, N, C]
            row = {"patch": {}, "bag": {}}
            for lev, mag in enumerate(MAG_NAMES):
                use = (y >= 0) & (LEVEL == lev) & feats["valid"].numpy()
                if use.any():
                    row["patch"][mag] = score(y[use], node[use], np.broadcast_to(slides[:, None], y.shape)[use])
            mine, theirs = level_scores(feats, W), level_scores(train, W)
            use = y[:, 0] >= 0
            for lev, mag in enumerate(MAG_NAMES):
                there = use & ~np.isnan(mine[:, lev, 0])
                if there.any():
                    row["bag"][mag] = score(y[there, 0], mine[there, lev], slides[there])
            row["bag"]["merged"] = score(y[use, 0], merged_scores(mine, theirs)[use], slides[use])
            out.setdefault(fact, {})[mode] = row
    return out


def of_pictures(model, tokenizer, x, y, names, templates, groups=None, train=None, there=None):
    """Labelled pictures: x [R, d], or [R, 4, d] for the four magnifications, whose merged scores are then given too: centred on the `train` features
    [R', 4, d] (else on x), of the magnifications that are truly `there` bool [4]. y [R]; names: per class a tuple -> {mode: {"all" or 5x ... merged:
    scores}} and the confusion matrix of the last with the ensemble."""
    out, C, scale, kept = {}, len(names), float(model.itc_scale.detach().exp()), None
    for mode in ("ensemble", "single"):
        W = class_weights(model, tokenizer, names, mode == "ensemble", templates).numpy()
        s = x @ W.T                                                                    # [R, C] or [R, 4, C]
        columns = {"all": s}
        if s.ndim == 3:
            base = (x if train is None or not len(train) else train) @ W.T
            columns = {mag: s[:, lev] for lev, mag in enumerate(MAG_NAMES)} | {"merged": merged_scores(s[:, there], base[:, there])}
        out[mode] = {name: scores(y, c.argmax(1), C, groups if groups is not None else np.arange(len(y)), softmax(c, scale)) for name, c in columns.items()}
        kept = kept if kept is not None else metrics.confusion(y, columns[list(columns)[-1]].argmax(1), C)
    return out, kept


def glance(model, tokenizer, bags, test, train):
    """The few numbers that training shows now and then: features of test and training bags -> {name: float}. Weighted F1 of the zero-shot
    protocol, per patch and merged, where the truth is known; else the mean recall of retrieval."""
    if labelled(bags, test):
        modes = {fact: row["ensemble"] for fact, row in of_bags(model, tokenizer, bags, test, train, ("ensemble",)).items()}
        return {f"{fact}_{mag}": s["f1"] for fact, row in modes.items() for mag, s in (*row["patch"].items(), ("merged", row["bag"]["merged"]))}
    return {f"retrieval_{mag}": row["mean"] for mag, row in retrieval(model, tokenizer, bags, test).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Slides

def top_j(s, js=(1, 5, 10, 50, 100)):
    """MI-Zero [2]: scores of a slide's patches [P, C] -> {j: [C], the mean of each class's j best} for every j, clipped to the patches there are."""
    ranked = np.sort(s, 0)[::-1]
    return {j: ranked[:j].mean(0) for j in js}


def pooled_levels(v, valid, W, centre, js):
    """v [G, N, d] of a slide, valid [G, N], class vectors W [C, d], centre [4, C] -> {mag: {j: [C]}} and "merged", the sum over magnifications of the
    centred ones."""
    s, out = v @ W.T, {}
    for lev, mag in enumerate(MAG_NAMES):
        part = s[:, LEVEL == lev][valid[:, LEVEL == lev]]                              # [patches, C]
        if len(part):
            out[mag] = top_j(part, js)
    out["merged"] = {j: sum(out[mag][j] - centre[MAG_NAMES.index(mag)] for mag in out) for j in js}
    return out


def centres(feats, W):
    """Mean score of each class at each magnification over patches -> [4, C]; 0 where a magnification has none."""
    s, ok = (feats["v"] @ W.T).numpy(), feats["valid"].numpy()
    return np.stack([s[:, LEVEL == lev][ok[:, LEVEL == lev]].mean(0) if ok[:, LEVEL == lev].any() else np.zeros(len(W)) for lev in range(4)])


def slide_truth(bags, feats, fact="diagnosis", table=None):
    """{slide: class name}: from `table` {slide: label}, else what the patches of a slide agree on most; slides without are left out."""
    names, y, out = list(prompts.BUILT_IN[fact]), None if table else labels_of(bags, feats["index"], fact), {}
    for slide, gs in by_slide(bags, feats).items():
        if table:
            if slide in table:
                out[slide] = table[slide]
        elif (y[gs] >= 0).any():
            out[slide] = names[np.bincount(y[gs][y[gs] >= 0]).argmax()]
    return out


def of_slides(model, tokenizer, bags, feats, train, names=None, templates=prompts.BUILT_IN_TEMPLATES, truth=None, patients=None, js=(1, 5, 10, 50, 100)):
    """MI-Zero over the bags of labelled slides, per magnification and for their centred sum, for every j. names: {class: tuple of names} (diagnosis
    of the built-in world); truth: {slide: class}; patients: {slide: patient}, whom intervals are over -> dict mag -> j -> `scores`."""
    names, truth = names or prompts.BUILT_IN["diagnosis"], truth or slide_truth(bags, feats)
    W = class_weights(model, tokenizer, names.values(), templates=templates)
    slides = {s: gs for s, gs in by_slide(bags, feats).items() if s in truth}
    centre, number = centres(train, W), {c: i for i, c in enumerate(names)}
    found = [pooled_levels(feats["v"][gs].numpy(), feats["valid"][gs].numpy(), W.numpy(), centre, js) for gs in slides.values()]
    y, who, out = np.array([number[truth[s]] for s in slides]), np.array([(patients or {}).get(s, s) for s in slides]), {}
    for mag in ALL_MAGS:
        there = np.array([mag in f for f in found], bool)
        for j in js if there.any() else ():
            p = np.stack([f[mag][j] for f in found if mag in f])
            out.setdefault(mag, {})[j] = scores(y[there], p.argmax(1), len(names), who[there])
    return out


def read_slide(model, path, device, mpp=None, fov_px=None, min_tissue=0.1, min_node=0.1):
    """A slide file -> (parents [(x, y, side)], features as `embed` gives them): every 5x parent with tissue, fov_px pixels of its magnification
    a patch (default: the side the tower reads)."""
    read, S = reader(model), model.vision.size
    with data.Slide(path, mpp) as slide:
        parents = data.choose_parents(slide, fov_px=fov_px or S, parents=10 ** 9, min_tissue=min_tissue)
        if not parents:
            raise ValueError(f"{path} has no 5x parent with tissue: look at it with `python data.py preview`, or read a smaller field with --fov-px")
        v, valid = [], []
        for x, y, side, tissue in tqdm(parents, desc=slide.name, unit="bag", leave=False):
            image = torch.from_numpy(slide.read(x, y, side, 8 * S)).permute(2, 0, 1)[None].to(device)
            v.append(read(data.pyramid(image)[0])["projected"].float().cpu())
            valid.append(torch.from_numpy(data.valid_nodes(np.array([m in slide.mags for m in data.MAGS]), tissue, min_node)))
    return [p[:3] for p in parents], {"v": torch.stack(v), "valid": torch.stack(valid)}


def outline_labels(s, valid, lev, share=0.1):
    """Which class a node is drawn as: scores s [P, N, C] -> int [P, N], -1 for none. Several classes: the best after each class's mean over the slide
    is taken off; one: the `share` of nodes that score highest."""
    use = valid & (LEVEL == lev)
    out = np.full(use.shape, -1)
    if use.any() and s.shape[2] > 1:
        out[use] = (s[use] - s[use].mean(0)).argmax(-1)
    elif use.any():
        out[use & (s[..., 0] >= np.quantile(s[use][:, 0], 1 - share))] = 0
    return out


def heatmap(model, tokenizer, slide_path, queries, out, mpp=None, fov_px=None, device="cpu"):
    """Where on a slide is the text? queries [(text, level 0..3)] -> the PNG `out`, thumbnail and a map per query, and beside it `out`.geojson: where
    each query of the first one's level is nearest (of a single one: its best tenth). Returns the number of outlines."""
    parents, feats = read_slide(model, slide_path, device, mpp, fov_px)
    s, valid = (feats["v"] @ embed_texts(model, tokenizer, [q for q, _ in queries]).T).numpy(), feats["valid"].numpy()
    with data.Slide(slide_path, mpp) as slide:
        pictures.heatmap(slide, parents, [(f'"{q}" at {MAG_NAMES[lev]}', lev, np.where(valid, s[..., i], np.nan)) for i, (q, lev) in enumerate(queries)], out)
    lev = queries[0][1]
    same = [i for i, (_, level) in enumerate(queries) if level == lev]
    return pictures.geojson(parents, outline_labels(s[..., same], valid, lev), lev, [queries[i][0] for i in same], Path(out).with_suffix(".geojson"))


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval

def rerank(similarity, score, k):
    """Put the k most similar answers of each query in the order of a finer score [4]: similarity [R, G], score(query, answers [k]) -> [k]
    -> similarity with those k lifted above all others."""
    out = similarity.copy()
    for q, best in enumerate(np.argsort(-similarity, axis=1, kind="stable")[:, :k]):
        fine = score(q, best)
        out[q, best] = similarity[q].max() + 1 + fine - fine.min()
    return out


@torch.no_grad()
def matcher(model, tokenizer, images, captions, at_once=64):
    """ITM: images [R, 3, S, S], R captions -> function (image numbers, caption numbers) -> log-odds that they match [n]."""
    device, context = next(model.parameters()).device, len(model.text.pos)
    ids = text.trim(tokenizer.batch(captions, context), tokenizer.end).to(device)
    visual = torch.cat([model.visual_tokens(model.see(part.to(device))) for part in images.split(at_once)])            # [R, V, D]
    words = torch.cat([model.text(part)[0] for part in ids.split(at_once)])            # [R, T, Dt]
    valid, end = networks.text_valid(ids, tokenizer.end), (ids == tokenizer.end).int().argmax(1)

    @torch.no_grad()
    def match(image, caption):
        out = []
        for i, c in zip(torch.as_tensor(image).split(at_once), torch.as_tensor(caption).split(at_once)):
            fused = model.fuse_with_text(visual[i], words[c], valid[c], at=end[c])
            out.append((model.itm_head(fused).float() @ torch.tensor([-1.0, 1.0], device=device)).cpu())
        return torch.cat(out).numpy()
    return match


def recall_both(v, t, hit, match=None, top=0, scale=1.0):
    """Image -> text and text -> image: v, t [R, d] numpy, hit bool [R, R] -> {"image_to_text_R@1" ...: share, "mean": of all six}. With `match` the
    best `top` are ordered anew by the sum of both log-odds, ITC's (scale times the cosine) and ITM's: an ITM that has learned nothing then changes
    nothing, where ITM alone, as in ALBEF, would put them in any order. (BLIP adds the plain cosine to ITM's logit.)"""
    row = {}
    for name, sim, right, pairs in (("image_to_text", v @ t.T, hit, lambda q, best: (np.full(len(best), q), best)),
                                    ("text_to_image", t @ v.T, hit.T, lambda q, best: (best, np.full(len(best), q)))):
        if top:
            sim = rerank(sim, lambda q, best, sim=sim, pairs=pairs: scale * sim[q, best] + match(*pairs(q, best)), min(top, len(sim)))
        row |= {f"{name}_{k}": x for k, x in metrics.recalls(sim, right).items()}
    return row | {"mean": float(np.mean(list(row.values())))}


def of_captions(model, tokenizer, v, captions, images, top=0):
    """Retrieval among R pictures, image features v [R, d] numpy, and their captions; one that several share is a hit for each of them. images:
    function without arguments -> [R, 3, S, S], called only where the best `top` are re-ranked. -> row of `recall_both`, with n and "reranked" in it."""
    t, same = embed_texts(model, tokenizer, captions).numpy(), np.unique(captions, return_inverse=True)[1]
    hit = same[:, None] == same[None, :]                                               # [R, R]
    row = {"n": len(v), **recall_both(v, t, hit)}
    if top:
        row["reranked"] = recall_both(v, t, hit, matcher(model, tokenizer, images(), captions), top, float(model.itc_scale.detach().exp()))
    return row


def retrieval(model, tokenizer, bags, feats, most=300, seed=0, top=0):
    """Image -> caption and caption -> image among at most `most` patches of one magnification, recall at 1, 5, 10 in each
    direction and their mean. A caption that several patches share is a hit for each of them. top: how many candidates image-text matching
    re-ranks (0: none; for models with a fusion). -> {mag: row}, with "reranked" in it."""
    rng, out, texts = np.random.default_rng(seed), {}, [bags.captions(i) for i in feats["index"]]
    for lev, mag in enumerate(MAG_NAMES):
        spots = [(g, n) for g, n in np.argwhere(feats["valid"].numpy() & (LEVEL == lev)) if texts[g][n]]
        if len(spots) < 2:
            continue
        spots = [spots[k] for k in rng.permutation(len(spots))[:most]]
        patches = lambda: fit(torch.stack([data.pyramid(bags[feats["index"][g]]["image"][None])[0, n] for g, n in spots]), model.vision.size)
        out[mag] = of_captions(model, tokenizer, np.stack([feats["v"][g, n].numpy() for g, n in spots]), [texts[g][n] for g, n in spots], patches, top)
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
    for mag, a, b in zip(ALL_MAGS, bag_vectors(feats), bag_vectors(gallery)):
        out[mag] = float(np.mean([names[int(k)] == s for k, s in zip((a @ b.T).argmax(1), own)]))
    return out


def diagnosis_retrieval(bags, feats, truth, most=2000, seed=0):
    """Patch -> slides of its diagnosis: a patch asks for the nearest other slides (mean of a slide's patches at that magnification); right is one of
    the same class -> {mag: R@1, 5, 10, n, chance of R@1}. Queries whose class no other slide has are left out."""
    rng, out = np.random.default_rng(seed), {}
    slides = {s: gs for s, gs in by_slide(bags, feats).items() if s in truth}
    classes = np.array([truth[s] for s in slides])
    for lev, mag in enumerate(MAG_NAMES):
        ok = feats["valid"].numpy() & (LEVEL == lev)
        if not ok.any():
            continue
        v = feats["v"].numpy()
        vectors = np.stack([v[gs][ok[gs]].sum(0) for gs in slides.values()])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)   # [slides, d]
        asked = [(k, g, n) for k, gs in enumerate(slides.values()) if (classes == classes[k]).sum() > 1 for g, n in ((gs[a], b) for a, b in np.argwhere(ok[gs]))]
        asked = [asked[i] for i in rng.permutation(len(asked))[:most]]
        if not asked:
            continue
        own = np.array([k for k, _, _ in asked])
        sim = np.stack([v[g, n] for _, g, n in asked]) @ vectors.T                     # [R, slides]
        sim[np.arange(len(own)), own] = -np.inf
        hit = (classes[own][:, None] == classes) & (np.arange(len(classes)) != own[:, None])
        out[mag] = {**metrics.recalls(sim, hit), "n": len(own), "chance": float(hit.sum(1).mean() / (len(classes) - 1))}
    return out
