"""What is measured: a run of ours or public weights, behind the same two calls, and the features that protocols read.

A model here has `vision` (images -> tokens), `project` (tokens -> unit vectors), `encode_image` and, where it reads text, `text` and `encode_text`:
MRPLIP has them, Towers gives them to any CLIP or ViT, Pixels to no network at all. `reader` turns a model into one function, images -> features by
name; `embed_texts` is the same for texts.

Shape letters: G bags, N = 85 nodes or a number of images, C classes, K keywords, d the shared space, S pixels per side.
"""
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import datasets
import model as networks
import prompts
import text
import weights
from runs import read_checkpoint


@dataclass
class Subject:
    """What is measured: the model in eval mode, its tokenizer (None: it reads no text), its name, of a run the keywords of its corpus and k_o;
    fingerprint: a hash of all its weights, and what they do not tell (`extra`)."""
    model: nn.Module
    tokenizer: object
    name: str
    keywords: list = ()
    k_o: int = 8
    extra: str = ""
    fingerprint: str = field(init=False)

    def __post_init__(self):
        self.fingerprint = networks.fingerprint(self.model) + self.extra


class Towers(nn.Module):
    """Public weights with the calls of MRPLIP: the two towers of a CLIP, or a ViT alone (text None; its class token, normalised, is then what
    `project` gives)."""

    def __init__(self, vision, text=None):
        super().__init__()
        self.vision, self.text = vision, text
        self.itc_scale = nn.Parameter(torch.tensor(math.log(100)))                     # CLIP's own, at which all public ones end

    def project(self, tokens):
        """Vision tokens [N, 1 + P, Dv] -> [N, d], L2-normalised."""
        x = networks.full(tokens[:, 0])
        return F.normalize(x @ self.vision.proj.T if hasattr(self.vision, "proj") else x, dim=-1)

    def encode_image(self, images):
        """images [N, 3, S, S] in [0, 1] -> [N, d], L2-normalised."""
        return self.project(self.vision(images))

    def encode_text(self, ids):
        """ids [N, T] -> [N, d], L2-normalised."""
        return F.normalize(networks.full(self.text(ids)[1]), dim=-1)


class Pixels(nn.Module):
    """The baseline below all others: a picture of 64 x 64 is averaged to 16 x 16 and is its own feature."""

    size, width, text = 64, 768, None

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))                                    # where other models keep weights, so that one can ask on which device they are

    @property
    def vision(self):
        return self

    def forward(self, images):
        """images [N, 3, 64, 64] -> [N, 1, 768]."""
        return F.adaptive_avg_pool2d(images, 16).flatten(1)[:, None]

    def project(self, tokens):
        """[N, 1, 768] -> unit vectors [N, 768]."""
        return F.normalize(tokens[:, 0] - 0.5, dim=-1)


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


def called(path):
    """A name for a file of weights: its own, or its folder's where every model's file is called so."""
    path = Path(path).resolve()
    return path.parent.name if path.stem in ("pytorch_model", "model", "open_clip_pytorch_model", "open_clip_model") and path.parent.name else path.stem


def load_subject(run=None, clip=None, vit=None, quick_gelu=False, tokenizer=None, size="synthetic", device="cpu"):
    """What the command line names -> Subject: a run folder, "random" (untrained, of a key of model.SIZES), "pixels", a CLIP's file or a ViT's."""
    if clip:
        if tokenizer is None:
            raise ValueError(f"--clip {clip} needs --tokenizer FILE, which no weights file holds: bpe_simple_vocab_16e6.txt.gz of open_clip, or merges.txt or tokenizer.json of its Hugging Face page")
        vision, words = weights.load_clip(clip, quick_gelu)
        try:
            words_ids = text.Tokenizer.load(tokenizer)                                 # one of ours
        except ValueError:
            words_ids = text.Tokenizer.from_clip(tokenizer)
        if words_ids.end != words.end:
            raise ValueError(f"{tokenizer} has {words_ids.end + 1:,} ids and the text tower of {clip} {words.end + 1:,}: give the tokenizer it was trained with")
        return Subject(Towers(vision, words).to(device).eval(), words_ids, called(clip), extra="-quick-gelu" if quick_gelu else "")
    if vit:
        return Subject(Towers(weights.load_vit(vit)).to(device).eval(), None, called(vit))
    if run == "pixels":
        return Subject(Pixels().to(device).eval(), None, "pixels")
    if run == "random":
        torch.manual_seed(0)
        return Subject(Towers(networks.MRPLIP(300, 299, **networks.SIZES[size]).vision).to(device).eval(), None, f"random-{size}")
    model, words_ids = load_run(run, device)
    config, listed = read_config(run), Path(run) / "keywords.json"
    keywords = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    return Subject(model, words_ids, Path(run).resolve().name, keywords, config.get("k_o", 8))


def read_config(run):
    """config.json of a run -> dict."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise ValueError(f"{run} holds no config.json: it is not a run folder of train.py")
    return json.loads(path.read_text())


def reads_text(subject, what):
    """Refuse a tower without text, in one sentence."""
    if subject.tokenizer is None:
        raise ValueError(f"{subject.name} has no text tower, and {what} compares images with texts: give a run or --clip FILE; probe and finetune need no text")


def nearest(v, w, k_o):
    """The k_o keywords closest to each image: v [N, d], w [K, d], normalised -> numbers [N, k_o]. In fp32 also under
    autocast: in bf16 many keywords would be equally near."""
    with torch.autocast(v.device.type, enabled=False):
        return (networks.full(v) @ networks.full(w).T).topk(min(k_o, len(w)), dim=1).indices


def reader(model, w=None, k_o=8):
    """-> function of images [N, 3, S, S] in [0, 1] to the features a protocol can ask for: backbone [N, Dv], the class token as it is; projected [N,
    d], normalised, what texts are compared with; and with keyword features w [K, d] text_guided [N, D], the paper's z: fusion reads the image and its
    k_o nearest keywords."""
    device = next(model.parameters()).device.type

    @torch.no_grad()
    def read(images):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            tokens = model.vision(images)
            out = {"backbone": networks.full(tokens[:, 0]), "projected": model.project(tokens)}
            if w is not None:
                near = nearest(out["projected"], w, k_o)                               # [N, k_o]
                z = model.fuse_with_keywords(model.visual_tokens(model.pooled(tokens)), w[near], torch.ones_like(near, dtype=torch.bool))
                out["text_guided"] = networks.full(z)
        return out
    return read


def reader_of(subject):
    """`reader` with the keywords of the subject's corpus, where it has any."""
    w = embed_texts(subject.model, subject.tokenizer, list(subject.keywords)).to(next(subject.model.parameters()).device) if subject.keywords else None
    return reader(subject.model, w, subject.k_o)


def reader_for(subject, features):
    """The function from images to features, with keywords only where they are asked for, since fusion costs."""
    return reader_of(subject) if "text_guided" in features else reader(subject.model)


def features_key(subject, features):
    """What else features depend on: whether they are guided, and then by which keywords."""
    if "text_guided" not in features:
        return ("plain",)
    return "guided", hashlib.sha256(repr((list(subject.keywords), subject.k_o)).encode()).hexdigest()[:6]


@torch.no_grad()
def embed_texts(model, tokenizer, texts, at_once=256):
    """list of R texts -> unit vectors [R, d] on the CPU."""
    device, context, rows = next(model.parameters()).device, len(model.text.pos), []
    for i in range(0, len(texts), at_once):
        ids = text.trim(tokenizer.batch(texts[i : i + at_once], context), tokenizer.end)
        rows.append(model.encode_text(ids.to(device)).cpu())
    return torch.cat(rows)


def class_weights(model, tokenizer, names, ensemble=True, templates=prompts.BUILT_IN_TEMPLATES):
    """One unit vector per class [C, d]: the mean of its prompts' embeddings, normalised again [3]. names: per class a tuple."""
    means = [embed_texts(model, tokenizer, prompts.class_prompts(alternatives, templates, ensemble)).mean(0) for alternatives in names]
    return F.normalize(torch.stack(means), dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Features of bags (of single pictures: datasets.features)

def fit(patches, S):
    """Patches [..., 3, s, s] -> [..., 3, S, S], resampled where the tower reads another size than was stored."""
    if patches.shape[-1] == S:
        return patches
    return F.interpolate(patches.flatten(0, -4), (S, S), mode="bicubic", antialias=True).clamp_(0, 1).view(*patches.shape[:-2], S, S)


def embed(model, bags, indices, device="cpu", at_once=8, read=None, folder=None):
    """Every patch of the chosen bags: dict of v [G, N, d] (normalised), backbone [G, N, Dv] (class token, what a probe reads), text_guided where
    `read` (see `reader`) gives it, valid [G, N], index [G]. Several processes share the work, and only the first gets the answer; the others None.
    folder: where pieces are kept."""
    read, indices = read or reader(model), list(indices)

    def work(rows):
        items = [bags[indices[r]] for r in rows]
        found = []
        for item in items:
            patches = data.pyramid(item["image"][None].to(device))[0]                  # [N, 3, S, S]
            found.append({name: x.float().cpu().numpy() for name, x in read(fit(patches, model.vision.size)).items()})
        return {name: np.stack([f[name] for f in found]) for name in found[0]} | {"valid": np.stack([item["valid"].numpy() for item in items])}
    found = datasets.in_pieces(len(indices), work, folder, at_once, "embed")
    return found and {{"projected": "v"}.get(name, name): torch.from_numpy(x) for name, x in found.items()} | {"index": indices}


def spread(n, most):
    """At most `most` of n bag numbers, evenly spread, since a slide's bags lie side by side."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def open_bags(folder):
    """Shards with what captions they have: a folder without any can be measured by all that needs none."""
    return data.BagDataset(folder, captions=all(s.with_suffix(".captions.jsonl").exists() for s in Path(folder).glob("bags-*.tar")))


def bags_hash(bags):
    """Twelve digits of the bags' names and valid nodes."""
    return hashlib.sha256("\n".join(bags.keys).encode() + bags.valid.numpy().tobytes()).hexdigest()[:12]


def stamp(bags):
    """Of these very shards, for what is kept of them: 12 digits of their names, sizes, times and bags."""
    files = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in bags.shards]
    return hashlib.sha256(repr((files, bags_hash(bags))).encode()).hexdigest()[:12]


def labels_of(bags, indices, fact):
    """Ground truth [G, N]: class number, or -1 where the fact is not defined (no tumour) or no truth file is there."""
    names = {name: c for c, name in enumerate(prompts.BUILT_IN[fact])}
    y = np.full((len(indices), data.NODES), -1)
    for g, i in enumerate(indices):
        for n, row in enumerate(bags.truth(i) or []):
            if row and row.get(fact) is not None:
                y[g, n] = names[row[fact]]
    return y


def labelled(bags, feats):
    """Is there ground truth beside the shards that features were computed of?"""
    return bool(bags.truth(feats["index"][0]))


def by_slide(bags, feats):
    """{slide: rows of its bags in feats}."""
    slides = {}
    for g, i in enumerate(feats["index"]):
        slides.setdefault(bags.slides[i], []).append(g)
    return slides
