"""Measure a run on its own data: zero-shot, retrieval and a linear probe, all with intervals.

    python evaluate.py RUN                  # on the run's own data -> RUN/results.json and tables
    python evaluate.py RUN --data SHARDS    # on other shards       -> RUN/NAME/results.json

SHARDS holds test/ and train/ with shards, or is itself a folder of shards. Two kinds of files say
what can be asked. A lab writes its own; prepare/world.py writes those of its world.

    SHARDS/classes.json   {"facts": {fact: {class: [names]}}, "templates": ["{}", "image of {}"]}
    bags-*.truth.jsonl    {"key": bag, "node": 0..84, fact: class or null}    beside each shard

References: [1] MR-PLIP, CVPR 2025, section 4. [2] MI-Zero, Lu et al. 2023: the top-j patches of a
slide. [3] CONCH, Lu et al. 2024: prompt ensembles, lambda = 100 / (width C) of a linear probe.
"""

import argparse
import hashlib
import json
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import model as networks
import text
from data import LEVEL

MAG_NAMES = tuple(f"{mag}x" for mag in data.MAGS)


# ---- A run --------------------------------------------------------------------------------------
def read_checkpoint(run, device="cpu"):
    """Load the newest checkpoint of a run that can be read -> (state, path), or (None, None)."""
    paths = [Path(run) / name for name in ("ckpt.pt", "ckpt_prev.pt")]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            kinds = {"model": dict, "tokenizer": list, "config": dict, "step": int}
            sound = all(isinstance(state.get(name), kind) for name, kind in kinds.items())
            # torch writes checksums, but does not look at them.
            if zipfile.ZipFile(path).testzip() or not sound or state["step"] < 0:
                raise ValueError("a checksum is wrong, or it is not of train.py")
            return state, path
        except Exception as e:  # a damaged file raises almost anything
            print(f"{path} cannot be read ({e!r})", file=sys.stderr)
    if paths:
        raise ValueError(f"{run} holds no checkpoint that can be read: move it away to start anew")
    return None, None


def load_run(run, device="cpu"):
    """Load a run folder -> (MRPLIP in eval mode, Tokenizer)."""
    state, path = read_checkpoint(run)
    if not state:
        raise ValueError(f"{run} holds no ckpt.pt: train with `torchrun train.py --out {run}`")
    tokenizer = text.Tokenizer(state["tokenizer"])
    # Weights fit only the networks that they were trained in.
    try:
        size = networks.SIZES[state["config"]["size"]]
        model = networks.MRPLIP(tokenizer.size, tokenizer.end, **size)
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        remedy = "load it with the code that trained it"
        raise ValueError(f"{path} is a checkpoint of another architecture: {remedy}") from None
    return model.to(device).eval(), tokenizer


# ---- Features. A model here is anything with the calls of MRPLIP that are used below. -----------
@torch.no_grad()
def embed_images(model, images, w=None, k_o=8, at_once=128):
    """Embed images [N, 3, S, S] in [0, 1] -> dict on the CPU.

    image_embedding [N, d] are unit vectors, compared with texts; backbone [N, Dv] is the class
    token as it is, read by the probe. Keyword features w [K, d] add text_guided [N, D], the paper's
    z [1]: an image fused with its k_o nearest keywords.
    """
    device = next(model.parameters()).device
    S = model.vision.size
    rows = {}
    for batch in images.split(at_once):
        # Resize to what the tower reads.
        x = batch.to(device)
        if x.shape[-1] != S:
            x = F.interpolate(x, (S, S), mode="bicubic", antialias=True).clamp_(0, 1)
        # Run the tower once; all features follow from its tokens.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = model.vision(x)
            pooled = model.pool_tokens(tokens)
            row = {"image_embedding": model.to_shared(pooled), "backbone": tokens[:, 0]}
            if w is not None:
                w = w.to(device)
                # Choose in fp32: in bf16 a tenth of the keywords would be others.
                with torch.autocast(device.type, enabled=False):
                    near = (row["image_embedding"] @ w.T).topk(min(k_o, len(w))).indices
                there = torch.ones_like(near, dtype=torch.bool)
                z = model.fuse_with_keywords(model.to_fusion(pooled), w[near], there)
                row["text_guided"] = z
        # Collect the batches on the CPU in fp32.
        for name, x in row.items():
            rows.setdefault(name, []).append(x.float().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def embed(model, bags, indices, device="cpu", w=None, k_o=8):
    """Embed the valid patches of the chosen bags -> dict as of `embed_images`, each [R, N, ...].

    It also has "valid" bool [R, N]; "index" and "slides" [R], numbers and slide names of the bags.
    """
    indices, waiting, parts = list(indices), [], []
    for i in data.progress(indices, "embed", leave=False, unit="bag"):
        patches = data.pyramid(bags[i]["image"][None].to(device))[0]  # [N, 3, S, S]
        waiting.append(patches[bags.valid[i].to(device)])
        # Read many bags at once, so that few batches are not full.
        if sum(map(len, waiting)) >= 512 or i == indices[-1]:
            parts.append(embed_images(model, torch.cat(waiting), w, k_o))
            waiting = []
    valid = bags.valid[indices]
    features = {"valid": valid, "index": indices, "slides": np.array(bags.slides)[indices]}
    for name in parts[0]:
        rows = torch.cat([part[name] for part in parts])
        features[name] = rows.new_zeros(*valid.shape, *rows.shape[1:])
        features[name][valid] = rows
    return features


@torch.no_grad()
def embed_texts(model, tokenizer, texts, at_once=256):
    """Embed a list of R texts -> unit vectors [R, d] on the CPU."""
    device = next(model.parameters()).device
    rows = []
    for start in range(0, len(texts), at_once):
        ids = tokenizer.batch(texts[start : start + at_once], model.text.context)
        rows.append(model.encode_text(text.trim(ids, tokenizer.end).to(device)).float().cpu())
    return torch.cat(rows)


def class_vectors(model, tokenizer, names, templates, ensemble=True):
    """Embed classes by their prompts -> unit vectors [C, d]. names: per class a list of str.

    The ensemble averages all names in all templates [3]; without it the first name stands alone.
    """
    means = []
    for own in names:
        prompts = [template.format(name) for name in own for template in templates]
        means.append(embed_texts(model, tokenizer, prompts if ensemble else own[:1]).mean(0))
    return F.normalize(torch.stack(means), dim=-1)


# ---- Questions: the classes that the data name, and the truth -----------------------------------
def questions(bags, index):
    """Read what can be asked of the bags `index` -> (facts, templates, {fact: classes [R, N]})."""
    # classes.json lies beside the shards or one folder up.
    asked = {"facts": {}, "templates": []}
    for path in (bags.folder.parent / "classes.json", bags.folder / "classes.json"):
        if path.exists():
            asked = data.read_classes(path)
    truth = text.read_truth(bags.shards)
    facts = {}
    labels = {}
    for fact, classes in asked["facts"].items():
        # Number the classes in the order of the file; a node without truth is -1.
        number = {None: -1} | {name: c for c, name in enumerate(classes)}
        labels[fact] = np.full((len(index), data.NODES), -1)
        for r, i in enumerate(index):
            for n, node in enumerate(truth.get(bags.keys[i], ())):
                name = node.get(fact) if node else None
                if name not in number:
                    raise ValueError(f"classes.json lacks the {fact} {name!r} of {bags.keys[i]}")
                labels[fact][r, n] = number[name]
        # Leave out a fact without truth.
        if labels[fact].max() >= 0:
            facts[fact] = classes
    return facts, asked["templates"], labels


# ---- Scores, equal to scikit-learn's. A value that is not defined is NaN, never 0. --------------
def confusion(y, p, C):
    """Count true classes y [R] and predicted classes p [R] -> [C, C], truth by prediction."""
    # Bytes would overflow from 16 classes on.
    pairs = np.asarray(y, np.int64) * C + np.asarray(p)
    return np.bincount(pairs, minlength=C * C).reshape(C, C)


def rates(matrix):
    """Compute the rates of confusion matrices [..., C, C] -> dict of name -> [...]."""
    hit = np.diagonal(matrix, 0, -2, -1).astype(float)  # [..., C]
    true = np.sum(matrix, -1)
    guessed = np.sum(matrix, -2)
    n = true.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(true + guessed > 0, 2 * hit / (true + guessed), 0)
        recall = np.where(true > 0, hit / true, 0)
        # Average F1 by support (the paper's metric [1]), then over the classes that occur.
        found = {"f1": (f1 * true).sum(-1) / n, "accuracy": hit.sum(-1) / n}
        found["macro_f1"] = f1.sum(-1) / (true + guessed > 0).sum(-1)
        return found | {"balanced": recall.sum(-1) / (true > 0).sum(-1)}


def resamples(groups, times=1000):
    """Draw groups [R] with replacement -> (number of each row's group [R], counts [times, G])."""
    names, group = np.unique(groups, return_inverse=True)
    G = len(names)
    # Of very many groups fewer resamples do.
    times = min(times, max(100, 20_000_000 // G))
    drawn = np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), times).astype(float)
    # A single group says nothing about others.
    return group, drawn if G > 1 else drawn * np.nan


def interval(samples):
    """Return (low, high), the middle 95 % of the samples that are defined, or NaN."""
    samples = np.asarray(samples)[~np.isnan(samples)]
    return tuple(np.percentile(samples, [2.5, 97.5]).tolist()) if len(samples) else (np.nan, np.nan)


def scores(y, p, C, groups, times=1000):
    """Compare predictions p [R] with the truth y [R] -> `rates`, "n", "groups" and "interval".

    The interval {rate: (low, high)} is of a bootstrap over groups [R], slides or patients.
    """
    if not len(y):
        raise ValueError("there is nothing to measure: no row has both features and a class")
    # Count each group by itself: the patches of a slide are not independent.
    group, drawn = resamples(groups, times)
    tables = np.zeros((drawn.shape[1], C * C))
    np.add.at(tables, (group, np.asarray(y, np.int64) * C + np.asarray(p)), 1)
    # A resample adds up the tables of the groups that it drew.
    samples = rates((drawn @ tables).reshape(-1, C, C))
    limits = {name: interval(values) for name, values in samples.items()}
    found = {name: float(value) for name, value in rates(confusion(y, p, C)).items()}
    return found | {"n": len(y), "groups": len(tables), "interval": limits}


# ---- Zero-shot of patches, bags and slides ------------------------------------------------------
# A magnification that cannot see a fact still prefers some class, always the same one. To merge the
# magnifications of a bag, centre the scores of each on training bags, without labels, and add them.
def level_scores(features, vectors):
    """Average the cosines of a bag's valid nodes at each magnification -> [R, 4, C], or NaN."""
    cosine = (features["image_embedding"] @ vectors.T).numpy()  # [R, N, C]
    out = np.full((len(cosine), 4, len(vectors)), np.nan)
    for level in range(4):
        use = (features["valid"].numpy() & (LEVEL == level))[..., None]
        np.divide((cosine * use).sum(1), use.sum(1), out=out[:, level], where=use.any(1))
    return out


def merged_scores(test, train):
    """Sum scores [R, 4, C] of the magnifications, centred on training bags -> [R, C], or NaN."""
    known = ~np.isnan(train)
    centre = np.where(known, train, 0).sum(0) / np.maximum(known.sum(0), 1)  # [4, C]
    # A bag without a valid node has no class.
    return np.where(np.isnan(test).all(1), np.nan, np.nansum(test - centre, axis=1))


def top_j(patches, js=(1, 5, 10, 50, 100)):
    """Average the j best scores of each class over patches [R, C] -> {j: [C]} (MI-Zero [2])."""
    ranked = np.sort(patches, axis=0)[::-1]
    return {j: ranked[:j].mean(0) for j in js}


def slide_scores(cosine, valid, slides, y):
    """Pool the patches of each slide -> (slide names, their classes, {j: [slides, 4, C]})."""
    names = np.unique(slides)
    truth = np.full(len(names), -1)
    pooled = {j: np.full((len(names), 4, cosine.shape[2]), np.nan) for j in top_j(cosine[0])}
    for i, name in enumerate(names):
        own = slides == name
        # A slide has the class that most of its patches have.
        if (y[own] >= 0).any():
            truth[i] = np.bincount(y[own][y[own] >= 0]).argmax()
        # Pool the patches of each magnification; one that the slide lacks stays NaN.
        for level in range(4):
            patches = cosine[own][valid[own] & (LEVEL == level)]
            for j, best in top_j(patches).items() if len(patches) else ():
                pooled[j][i, level] = best
    return names, truth, pooled


def zeroshot(features, reference, vectors, y, times=1000):
    """Measure one fact by prompts -> {"patch", "bag", "top 1", ...: {magnification: scores}}.

    features, reference: of `embed`, test bags and the training bags to centre scores on;
    vectors [C, d]: of `class_vectors`; y [R, N]: true classes or -1.
    """
    cosine = (features["image_embedding"] @ vectors.T).numpy()  # [R, N, C]
    valid = features["valid"].numpy()
    slides = features["slides"]
    asked = []
    # Ask each patch by itself.
    for level, mag in enumerate(MAG_NAMES):
        use = valid & (LEVEL == level)
        asked.append(("patch", mag, y[use], cosine[use], np.repeat(slides, use.sum(1))))

    # A bag has the class of its 5x parent; a slide is scored by its j best patches.
    centre = level_scores(reference, vectors)
    units = [("bag", y[:, 0], level_scores(features, vectors), slides)]
    names, truth, tops = slide_scores(cosine, valid, slides, y)
    units += [(f"top {j}", truth, pooled, names) for j, pooled in tops.items()]
    # Ask both at each magnification and by all merged.
    for unit, true, s, who in units:
        for level, mag in enumerate(MAG_NAMES):
            asked.append((unit, mag, true, s[:, level], who))
        asked.append((unit, "merged", true, merged_scores(s, centre), who))

    # Compare the best class with the truth, wherever both are known.
    found = {}
    for unit, mag, true, s, who in asked:
        use = (true >= 0) & ~np.isnan(s[:, 0])
        if use.any():
            row = scores(true[use], s[use].argmax(1), len(vectors), who[use], times)
            found.setdefault(unit, {})[mag] = row
    return found


# ---- Retrieval ----------------------------------------------------------------------------------
def retrieval(v, t, captions, groups):
    """Rank captions for images and images for captions -> {"image_to_text_R@1": share, ...}.

    v, t [R, d]: unit vectors of R images and of their captions; groups [R], for the intervals. Also
    "mean" of all six, "chance_R@1", and "n".
    """
    # A caption that several images share is right for each.
    same = np.unique(captions, return_inverse=True)[1]
    hit = same[:, None] == same
    found = {}
    for way, similarity in (("image_to_text", v @ t.T), ("text_to_image", t @ v.T)):
        # Find the place of each query's best right answer.
        order = np.argsort(-similarity, axis=1, kind="stable")
        place = np.take_along_axis(hit, order, 1).argmax(1)
        found |= {f"{way}_R@{k}": place < k for k in (1, 5, 10)}
    found["mean"] = np.mean(list(found.values()), axis=0)
    found["chance_R@1"] = hit.mean(1)
    # Resample queries by group.
    group, drawn = resamples(groups)
    weights = drawn[:, group]  # [times, R]
    limits = {name: interval(weights @ hits / weights.sum(1)) for name, hits in found.items()}
    shares = {name: float(hits.mean()) for name, hits in found.items()}
    return shares | {"n": len(v), "interval": limits}


def bag_retrieval(model, tokenizer, bags, features, most=300):
    """Measure `retrieval` among at most `most` patches of each magnification -> {mag: row}."""
    captions = text.Captions(bags.folder)
    captions = np.array([captions[bags.keys[i]] for i in features["index"]], object)  # [R, N]
    rng = np.random.default_rng(0)
    found = {}
    for level, mag in enumerate(MAG_NAMES):
        # Choose patches that have a caption.
        use = features["valid"].numpy() & (LEVEL == level) & captions.astype(bool)
        r, n = rng.permutation(np.argwhere(use))[:most].T
        if len(r) > 1:
            own = captions[r, n].tolist()
            t = embed_texts(model, tokenizer, own).numpy()
            v = features["image_embedding"][r, n].numpy()
            found[mag] = retrieval(v, t, own, features["slides"][r])
    return found


# ---- Linear probe -------------------------------------------------------------------------------
def fit_logistic(x, y, C):
    """Fit a multinomial logistic regression by L-BFGS -> (weight [C, width], bias [C]), float64.

    x [R, width], features as they are; y [R], classes. Minimises the summed cross-entropy plus
    lambda / 2 |weight|^2 [3], which is scikit-learn's LogisticRegression(C=width * C / 100).
    """
    x = torch.as_tensor(x).double()
    y = torch.as_tensor(y)
    # The bias is free, so centred features have the same optimum. It is found in fewer steps.
    mean = x.mean(0)
    weight = torch.zeros(C, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(C, dtype=x.dtype, requires_grad=True)
    # Of two classes scikit-learn has one vector w, where a softmax has the pair (w / 2, -w / 2).
    penalty = 100 / (x.shape[1] * C) * (2 if C == 2 else 1)
    settings = dict(max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12)
    optimizer = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **settings)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy((x - mean) @ weight.T + bias, y, reduction="sum")
        loss = (loss + penalty / 2 * weight.square().sum()) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), (bias - weight @ mean).detach()


def probe(facts, train, test, most=3000):
    """Learn each fact from patches of a magnification -> {fact: {magnification: scores}}.

    train, test: features and labels (of `questions`), of bags of different slides.
    """
    rng = np.random.default_rng(0)
    found = {fact: {} for fact in facts}
    for fact, (level, mag) in product(facts, enumerate(MAG_NAMES)):
        parts = []
        for features, labels in (test, train):
            use = (labels[fact] >= 0) & features["valid"].numpy() & (LEVEL == level)
            r, n = rng.permutation(np.argwhere(use))[:most].T
            parts.append((features["backbone"][r, n], labels[fact][r, n], features["slides"][r]))
        (x, y, who), (x_train, y_train, _) = parts
        if len(y) and len(y_train):
            C = len(facts[fact])
            weight, bias = fit_logistic(x_train, y_train, C)
            p = (x.double() @ weight.T + bias).argmax(1)
            found[fact][mag] = scores(y, p, C, who)
    return found


# ---- Results ------------------------------------------------------------------------------------
def save_results(folder, name, found, about):
    """Write the results of one protocol, and what they are about, into folder/results.json.

    The file is {name: found, ..., "about": {name: {"model", "fingerprint", "data", ...}, ...}}.
    """
    path = Path(folder) / "results.json"
    # Two protocols that end together must not lose each other.
    with data.lock(folder, ".results.lock", wait=True):
        try:
            results = json.loads(path.read_text()) if path.exists() else {"about": {}}
            # Results of other weights give way.
            for other, said in list(results["about"].items()):
                if said["fingerprint"] != about["fingerprint"]:
                    del results[other], results["about"][other]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged: move it away and measure again") from None
        before, now = results["about"].get(name, {}).get("n", 0), about.get("n", 0)
        if before > now:
            print(f"{path}: {name} of {now} replaces that of {before}", file=sys.stderr)
        results["about"][name] = about
        # JSON knows no NaN: write null.
        ready = json.dumps(results | {name: found})
        ready = json.loads(ready, parse_constant=lambda constant: None)
        data.write_whole(path, json.dumps(ready, indent=1))


def print_table(title, columns, rows):
    """Print a Markdown table: a title, the names of the columns, rows of cells (str)."""
    rows = [list(map(data.one_line, row)) for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    print(f"\n{data.one_line(title)}\n")
    for row in rows:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")


def print_scores(title, rows):
    """Print metrics by magnification: rows [(label, {magnification: scores}, metric)]."""
    columns = (*MAG_NAMES, "merged")
    table = []
    for label, found, metric in rows:
        cells = dict.fromkeys(columns, "")
        for mag, row in found.items():
            low, high = row["interval"][metric]
            cell = f"{row[metric]:.2f} ({low:.2f}-{high:.2f})"
            # Six columns fit a line of 100 without leading zeros.
            cells[mag] = cell.replace("0.", ".").replace("1.00", "1.0")
        table.append([label, *cells.values()])
    print_table(f"{title} (95 % over slides)", ["", *columns], table)


# ---- A run on its own data ----------------------------------------------------------------------
def spread(bags, most):
    """Choose at most `most` bags, evenly spread, since the bags of a slide lie side by side."""
    count = max(1, min(len(bags), most))
    return np.unique(np.linspace(0, len(bags) - 1, count).astype(int)).tolist()


def glance(model, tokenizer, test, train, device="cpu"):
    """Measure a few numbers while training, on data.Bags test and train -> dict.

    They are F1 by prompts: {"FACT_5x": per patch, ..., "FACT_merged": per bag}; without truth the
    mean recalls {"retrieval_5x": ...}. The model is in eval mode.
    """
    features = embed(model, test, spread(test, 60), device)
    reference = embed(model, train, spread(train, 30), device)
    facts, templates, labels = questions(test, features["index"])
    out = {}
    for fact, classes in facts.items():
        vectors = class_vectors(model, tokenizer, classes.values(), templates)
        units = zeroshot(features, reference, vectors, labels[fact], times=1)
        for unit, mag in (*product(["patch"], MAG_NAMES), ("bag", "merged")):
            if mag in units.get(unit, ()):
                out[f"{fact}_{mag}"] = units[unit][mag]["f1"]
    if not out:
        for mag, row in bag_retrieval(model, tokenizer, test, features).items():
            out[f"retrieval_{mag}"] = row["mean"]
    return out


def checked_questions(test, index, train=None):
    """Read `questions` of data.Bags test; refuse bags of none, and slides that train holds too."""
    seen = {*test.slides} & {*train.slides} if train else ()
    if seen:
        state = f"{min(seen)} is in {train.folder} and in {test.folder}"
        raise ValueError(f"{state}, as {len(seen)} slides are: take them out of one")
    asked = questions(test, index)
    if not asked[0] and not text.Captions(test.folder).files:
        state = f"{test.folder} has neither captions nor a classes.json with truth"
        raise ValueError(f"{state}: give one of the two, or nothing can be measured")
    return asked


def measure(run, folder=None, device="cpu", most=300, learn=True):
    """Measure a run on shards (its own) -> results.json in the run folder, tables on the screen.

    most: test bags that are read; learn: also fit the probe, which takes longer than all else.
    """
    model, tokenizer = load_run(run, device)
    # On other data its results lie in a folder of their own.
    own = Path(data.read_json(Path(run) / "config.json")["data"])
    folder = Path(folder or own)
    out = Path(run) if folder.resolve() == own.resolve() else Path(run) / folder.resolve().name

    # Look what can be asked before hours are spent on features.
    inside = (folder / "test").is_dir()
    test = data.Bags(folder / "test" if inside else folder)
    train = data.Bags(folder / "train") if inside and (folder / "train").is_dir() else None
    index = spread(test, most)
    facts, templates, labels = checked_questions(test, index, train)
    if not facts:
        print(f"{folder} has no classes.json with truth of its bags: only retrieval is measured")

    # Embed test bags, and half as many training bags to centre scores on and to learn from.
    features = embed(model, test, index, device)
    reference = embed(model, train, spread(train, most // 2), device) if train else features

    # Say what the numbers are about.
    digest = hashlib.sha256("\n".join(test.keys).encode() + test.valid.numpy().tobytes())
    about = dict(model=Path(run).resolve().name, fingerprint=networks.fingerprint(model))
    about |= dict(data=str(test.folder), data_hash=digest.hexdigest()[:12], n=len(index))
    about["centred_on"] = len(reference["index"])
    about["split"] = f"centred on {about['centred_on']} {'training' if train else 'test'} bags"

    # Ask by prompts. Tables show the ensemble, results.json the other prompts too.
    found = {fact: {} for fact in facts}
    for fact, mode in product(facts, ("single", "ensemble")):
        names = facts[fact].values()
        vectors = class_vectors(model, tokenizer, names, templates, mode == "ensemble")
        found[fact][mode] = zeroshot(features, reference, vectors, labels[fact])
    for fact in facts:
        units = found[fact]["ensemble"]
        rows = [(unit, units[unit], "f1") for unit in ("patch", "bag", "top 10") if unit in units]
        print_scores(f"{fact} by prompts: weighted F1", rows)
    if facts:
        prompts = {"facts": facts, "templates": templates}
        save_results(out, "zeroshot", found, about | {"prompts": prompts})

    # Ask for the classes by a probe.
    if facts and learn and train:
        known = questions(train, reference["index"])[2]
        found = probe(facts, (reference, known), (features, labels))
        print_scores("linear probe: weighted F1", [(fact, found[fact], "f1") for fact in facts])
        save_results(out, "probe", found, about | {"split": "learned on training bags"})
    elif facts and not train:
        print(f"{folder} has no train/: the probe is left out")

    # Ask for the captions.
    found = bag_retrieval(model, tokenizer, test, features)
    if found:
        names = ("image_to_text_R@1", "text_to_image_R@1", "chance_R@1", "mean")
        print_scores("retrieval among at most 300 patches", [(name, found, name) for name in names])
        save_results(out, "retrieval", found, about)
    else:
        print(f"{test.folder} has no captions: retrieval is left out")
    print(f"\nwrote {out}/results.json")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("run", help="a folder that train.py wrote")
    parser.add_argument("--data", help="a folder of shards (the run's own)")
    parser.add_argument("--bags", type=int, default=300, help="test bags to read at most")
    args = parser.parse_args()
    measure(args.run, args.data, "cuda" if torch.cuda.is_available() else "cpu", args.bags)


if __name__ == "__main__":
    data.run_script(main, "results.json keeps what was measured before")
