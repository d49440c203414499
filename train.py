"""Train MR-PLIP: one column from settings to the last checkpoint. Run it as it is and it makes its own data first.

    torchrun train.py                                              # the built-in world, two CPU cores, about nine minutes
    torchrun train.py --out runs/no_cvta --cvta 0                  # an ablation: a loss with weight 0 is not computed
    torchrun --nproc_per_node=8 train.py --preset paper --data bags --out runs/paper \\
        --vision_weights uni/pytorch_model.bin --clip_weights quiltnet/open_clip_pytorch_model.bin --tokenizer bpe_simple_vocab_16e6.txt.gz

Plain `python train.py` does the same on one process. The same command again continues where the last one stopped.
`--data DIR` holds DIR/train and DIR/test, each with bags-*.tar (data.py tile) and bags-*.captions.jsonl (text.py).

References: [1] MR-PLIP, CVPR 2025.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine (dev/LOG.md)

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import platform
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import losses
import model as networks
import synthetic
import text
import weights
from objective import Objective


# ----------------------------------------------------------------------------------------------------------------------
# Settings: one field a line, its unit or reason beside it. Every field is a flag; --help prints this table.

@dataclasses.dataclass
class Config:
    """All settings of a run. PRESETS below changes several at once; a flag on the command line wins over both."""

    preset: str = "synthetic"      # synthetic | paper: a named set of the values below
    out: str = "runs/synthetic"    # the run's folder: config, log, checkpoints, results
    data: str = "data/synthetic"   # folder with train/ and test/ shards; the default one is made when it is not there
    seed: int = 0                  # of weights, batches, masks; the built-in slides have their own (always 0)
    # data
    bags: int = 32                 # bags per optimiser step, over all processes and accumulation; more = more negatives
    accumulate: int = 1            # micro-batches per step; saves memory, but negatives stay within a micro-batch
    children: int = 1              # of the 4 children of each node, those seen in a step: 1, 2, 4 -> 4, 15, 85 nodes a bag
    pairs: float = 0.5             # (patch, caption) pairs per bag that ITM, MLM and PLM read, spread over magnifications
    keywords: int = 24             # at most this many keywords in a textual bag, those that tell it best from other bags
    jitter: float = 0.2            # stain augmentation: relative change of haematoxylin and eosin
    scale_jitter: float = 0.0      # enlarge a random square of the bag, its side 1 - this at least: magnifications between the four
    workers: int = 1               # loader processes
    # objective [1]: L = ITC + ITM + MLM + PLM + CVTA + MRTVA, each with weight 1 in the paper
    itc: float = 1.0               # weight of image-text contrast; 0 removes a loss and its cost
    itm: float = 1.0               # ... image-text matching
    mlm: float = 1.0               # ... masked language modelling
    plm: float = 1.0               # ... prefix language modelling
    cvta: float = 1.0              # ... cross-resolution visual-textual alignment
    mrtva: float = 1.0             # ... text-guided alignment of parents and children
    k_o: int = 4                   # keywords selected per patch (the paper's figure shows 8, of longer captions)
    cvta_select: str = "cosine"    # how a patch finds its keywords: cosine [1] | ema (cosine of the momentum model) | own (those of its caption)
    cvta_negatives: str = "batch"  # bag as in the paper | batch: all keywords of the batch
    warm: float = 0.8              # share of the steps in which all patches take keywords of their own captions, whatever cvta_select is
    hand: float = 0.1              # share of the steps after that over which a growing share of them passes to cvta_select
    mrtva_pairs: str = "edges"     # edges (parent and child) | ancestors | levels (whole magnifications) | random (the control)
    kin: float = 0.1               # ITC target mass on patches of the same bag
    # momentum model: ALBEF's soft targets and queue. Without both, and without cvta_select ema, it does not exist
    alpha: float = 0.0             # weight of its answers in the targets of ITC, MLM and PLM (ALBEF: 0.4), rising over the first epoch
    queue: int = 0                 # its features of so many earlier patches are negatives of ITC (ALBEF: 65536); any number
    half_life: float = 4400        # it forgets half of itself every so many bags (ALBEF's 0.995 a step: every 138 steps)
    # optimiser
    words: int = 300               # steps of the text tower alone before all others, where the paper has QuiltNet (not with --clip_weights)
    steps: int = 900               # optimiser steps
    lr: float = 2e-3               # peak learning rate (AdamW)
    lr_vision: float = 2.0         # factor on it for the vision tower
    lr_text: float = 0.1           # factor on it for the text tower
    warmup: int = 40               # steps of linear warm-up, then cosine to lr / 100
    weight_decay: float = 0.02     # not on biases, norms, temperatures, positions
    clip: float = 1.0              # gradient norm
    # networks
    size: str = "synthetic"        # a key of model.SIZES
    vocab: int = 1500              # ids of the tokenizer trained on the captions (without --tokenizer)
    tokenizer: str = ""            # CLIP's merge list, needed with --clip_weights
    vision_weights: str = ""       # timm or UNI weights for the vision tower; with --size quiltnet or plip a CLIP's
    clip_weights: str = ""         # open_clip, OpenAI or Hugging Face CLIP weights for the text tower
    freeze_vision: bool = False    # keep the vision tower fixed, its weights in bfloat16 on a GPU
    # running
    device: str = "auto"           # cuda when there is one, else cpu
    compile: bool = False          # torch.compile the step: worth it on a GPU, slower to start than it gains on a CPU
    log_every: int = 20            # steps
    save_every: int = 100          # steps
    evaluate: bool = True          # measure on data/test when training ends


LOSSES = ("itc", "itm", "mlm", "plm", "cvta", "mrtva")

PRESETS = {
    "synthetic": {},
    "paper": dict(out="runs/paper", data="data/paper", size="paper", freeze_vision=True, compile=True, bags=64, children=4, pairs=4.0,
                  k_o=8, keywords=128, cvta_negatives="bag", alpha=0.4, queue=65_536, half_life=8_900, jitter=0.05, workers=8, words=0, steps=312_500, lr=1e-4, lr_vision=0.1, lr_text=0.1, warmup=2000, log_every=50,
                  save_every=1000),  # 400,000 bags x 50 epochs / 64
}


def parse(argv):
    """Command line -> Config: defaults, then the preset, then the flags. Types come from the fields."""
    def boolean(word):
        if word.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
        return word.lower() in ("true", "1", "yes")

    reasons = {line.split(":")[0].strip(): line.split("#", 1)[1].strip() for line in inspect.getsource(Config).split("\n") if ":" in line and "#" in line}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fields = dataclasses.fields(Config)
    for f in fields:
        parser.add_argument(f"--{f.name}", type=boolean if f.type is bool else f.type, default=argparse.SUPPRESS, metavar=str(f.default) or "PATH",
                            help=reasons[f.name].replace("%", "%%"))
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], [f.name for f in fields], 1)
        raise ValueError(f"unknown flag {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; --help lists them all"))
    preset = getattr(flags, "preset", "synthetic")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    return check(Config(**{**PRESETS[preset], **vars(flags), "preset": preset}))


def check(cfg):
    """Refuse settings that cannot work, in one sentence each; returns cfg."""
    if not any(getattr(cfg, name) for name in LOSSES):
        raise ValueError(f"all of {', '.join(LOSSES)} have weight 0: nothing would be learned")
    if cfg.size not in networks.SIZES:
        raise ValueError(f"--size {cfg.size} is not one of {', '.join(networks.SIZES)}")
    if cfg.children not in (1, 2, 4):
        raise ValueError(f"--children is 1, 2 or 4 of the four children of a node, not {cfg.children}")
    for name, choices in (("cvta_negatives", ("bag", "batch")), ("cvta_select", ("cosine", "ema", "own")), ("mrtva_pairs", losses.PAIRS)):
        if getattr(cfg, name) not in choices:
            raise ValueError(f"--{name} is one of {', '.join(choices)}, not {getattr(cfg, name)!r}")
    if not 0 <= cfg.alpha < 1 or cfg.queue < 0 or cfg.half_life <= 0:
        raise ValueError(f"--alpha is a share below 1, --queue a number of patches, --half_life a positive number of bags, not {cfg.alpha}, {cfg.queue}, {cfg.half_life}")
    if cfg.clip_weights and not cfg.tokenizer:
        raise ValueError("--clip_weights needs --tokenizer bpe_simple_vocab_16e6.txt.gz: the weights know only CLIP's own ids")
    if cfg.freeze_vision and not cfg.vision_weights and networks.SIZES[cfg.size]["vision"].get("stem") != "conv":
        raise ValueError("--freeze_vision (the paper preset sets it) would keep random weights: it needs --vision_weights, or pass --freeze_vision false")
    if not 0 <= cfg.scale_jitter < 1:
        raise ValueError(f"--scale_jitter is a share of the side of a bag, at least 0 and less than 1, not {cfg.scale_jitter}")
    if min(cfg.steps, cfg.bags, cfg.accumulate, cfg.k_o, cfg.keywords, cfg.log_every, cfg.save_every) < 1:
        raise ValueError("--steps, --bags, --accumulate, --k_o, --keywords, --log_every and --save_every must be at least 1")
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# Data: the built-in world, then batches as a function of the step number

def make_world(folder, train=300, test=60, size=1024):
    """The built-in data through the real path: slides (synthetic.py) -> shards (data.py) -> captions. Every stage skips what
    is finished, so an interrupted run goes on where it stopped. Test slides follow the training slides: none is shared.
    Many small slides rather than few large ones: all patches of a slide share one stain and repeat one label."""
    for split, first, count in (("train", 0, train), ("test", train, test)):
        slides, shards = Path(folder) / "slides" / split, Path(folder) / split
        paths = synthetic.make_slides(slides, count, seed=0, first=first, size=size)
        data.tile(paths, shards, patch_px=64, fov_px=64, seed=0, workers=2)
        synthetic.describe(shards, slides, seed=0)


def cut(images, nodes, window):
    """Bags uint8 [B,3,8S,8S] -> the patches of `nodes` [B,N], in the `window` [B,3] of each bag or [B,0] for all of it: float [B,N,3,S,S]."""
    return data.pyramid(data.zoom(images, window) if window.shape[1] else images, nodes=nodes)


def number(word):
    """A keyword as an integer, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") >> 1


class Batches(Dataset):
    """Batch number i of this process, built from (seed, i, rank) alone: resuming needs no saved loader state, and a batch
    does not depend on how many workers made it. Every epoch is a new permutation of all bags, dealt out by rank."""

    def __init__(self, bags, tokenizer, cfg, context, rank=0, world=1):
        self.bags, self.tokenizer, self.cfg, self.context, self.rank, self.world = bags, tokenizer, cfg, context, rank, world
        self.local = cfg.bags // (cfg.accumulate * world)
        self.corpus, self.textual_bag = text.count_corpus(bags.folder), {}             # bag index -> its keywords, the latest 4,096

    def __getitem__(self, i):
        cfg, B, step = self.cfg, self.local, i // self.cfg.accumulate
        g = torch.Generator().manual_seed(hash((cfg.seed, i, self.rank)) % 2 ** 63)
        first = (i * self.world + self.rank) * B
        items = [self.bags[self._at(first + j)] for j in range(B)]
        nodes = data.sample_nodes(B, cfg.children, g)                                  # [B, N]
        turns = torch.randint(0, 8, (B,), generator=g)
        valid = torch.stack([item["valid"] for item in items]).gather(1, nodes)        # [B, N]
        captions = [[c or "" for c in self.bags.captions(item["index"], row)] for item, row in zip(items, nodes.tolist())]
        words, own, w_valid = [], torch.zeros(B, nodes.shape[1], cfg.keywords, dtype=torch.bool), torch.zeros(B, cfg.keywords, dtype=torch.bool)
        for j, item in enumerate(items):
            key = item["index"]
            if key not in self.textual_bag:
                if len(self.textual_bag) == 4096:
                    self.textual_bag.clear()
                self.textual_bag[key] = text.keyword_bag(self.bags.captions(key), cfg.keywords, self.corpus)
            words.append(self.textual_bag[key])
            own[j, :, : len(words[j])] = torch.from_numpy(text.keyword_owners(captions[j], words[j]))
            w_valid[j, : len(words[j])] = True
        unique = sorted({k for bag in words for k in bag}) or [""]                     # each keyword is encoded once a batch
        at = {k: u for u, k in enumerate(unique)}
        bag_of = torch.tensor([[at[k] for k in bag] + [0] * (cfg.keywords - len(bag)) for bag in words])
        word = torch.tensor([number(k) for k in unique])[bag_of]                       # [B, K]
        unique += [""] * (-len(unique) % 64)                                           # few distinct shapes for the compiler
        encode = lambda texts: text.trim(self.tokenizer.batch(texts, self.context), self.tokenizer.end)
        window = torch.empty(B, 0)
        if cfg.scale_jitter:
            side = 1 - cfg.scale_jitter * torch.rand(B, 1, generator=g)
            window = torch.cat([side, (1 - side) * torch.rand(B, 2, generator=g)], 1)  # [B, 3]
        if cfg.device == "cuda":  # bytes travel, the GPU cuts
            pixels = torch.stack([item["image"] for item in items])                    # [B, 3, 8S, 8S]
        else:                     # on a CPU each image is cut while it is still in the cache
            pixels = torch.cat([cut(item["image"][None], n[None], w[None]) for item, n, w in zip(items, nodes, window)])     # [B, N, 3, S, S]
        return {"pixels": pixels, "turns": turns, "nodes": nodes, "window": window, "valid": valid,
                "ids": encode([c for row in captions for c in row]).view(B, nodes.shape[1], -1),
                "keywords": encode(unique), "bag_of": bag_of, "word": word, "w_valid": w_valid, "own": own, "pairs": self._pairs(valid, g),
                "bag": torch.tensor([item["index"] for item in items]),
                "free": torch.rand(valid.shape, generator=g) < self._passed(step),     # [B, N] no longer bound to the keywords of their own caption
                "alpha": torch.tensor(cfg.alpha * min(1, step * cfg.bags / len(self.bags)))}   # over the first epoch, as ALBEF

    def _passed(self, step):
        """Share of the nodes that select keywords by similarity at this optimiser step: 0 at first, 1 at the end."""
        cfg = self.cfg
        return 0 if cfg.cvta_select == "own" else min(1, max(0, (step / cfg.steps - cfg.warm) / max(cfg.hand, 1e-9)))

    def _at(self, position):
        epoch, offset = divmod(position, len(self.bags))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.bags))
        return int(self._order[offset])

    def _pairs(self, valid, g):
        """Which patches ITM, MLM and PLM read: [M] numbers into B * N. Bags in random order, magnifications in turn, inside one
        a valid node at random (where none is, an invalid one: the masks drop it)."""
        B, N = valid.shape
        sizes, rows = losses.level_sizes(N, self.cfg.children), []
        order = torch.randperm(B, generator=g).tolist()
        for r in range(max(1, round(self.cfg.pairs * B))):
            i, level = order[r % B], (r + r // B) % len(sizes)
            first = sum(sizes[:level])
            score = torch.rand(sizes[level], generator=g) + valid[i, first : first + sizes[level]].float()
            rows.append(i * N + first + int(score.argmax()))
        return torch.tensor(rows)

    def __len__(self):
        return self.cfg.steps * self.cfg.accumulate


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser, weights, checkpoints

def learning_rate(step, cfg):
    """Linear warm-up, then a cosine from lr to lr / 100 at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def mark_lengths(batch):
    """Tell the compiler which sizes of a batch vary: captions and keywords are as long as their longest, keywords as many as there are.
    All others are fixed, so that one graph serves every step."""
    for name, axis in (("ids", 2), ("keywords", 0), ("keywords", 1)):
        torch._dynamo.mark_dynamic(batch[name], axis)


def make_optimizer(model, cfg, device):
    """AdamW over four groups: towers have their own rate, and vectors, norms, temperatures and positions no decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = cfg.lr_vision if name.startswith("vision.") else cfg.lr_text if name.startswith("text.") else 1.0
            decay = cfg.weight_decay if p.ndim >= 2 and not name.endswith((".pos", ".cls", "kind")) else 0.0
            groups.setdefault((factor, decay), []).append(p)
    return torch.optim.AdamW([{"params": ps, "factor": f, "weight_decay": d} for (f, d), ps in groups.items()],
                             lr=cfg.lr, betas=(0.9, 0.98), fused=True)


def build_model(cfg, tokenizer):
    """MRPLIP of the configured size, with public weights in its towers where paths are given."""
    torch.manual_seed(cfg.seed)
    size = networks.SIZES[cfg.size]
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **size)
    if cfg.vision_weights:
        side, clip = size["vision"]["size"], size["vision"].get("pre_norm", False)
        weights.adopt_vision(model, weights.load_clip(cfg.vision_weights, size=side)[0] if clip else weights.load_vit(cfg.vision_weights, side))
    if cfg.clip_weights:
        weights.adopt_text(model, weights.load_clip(cfg.clip_weights)[1])
    return model


def learn_words(model, bags, tokenizer, cfg, context):
    """Before any image: captions against captions (two of one slide and magnification attract, those of other slides repel), and
    of a third of them the next word, through fusion without an image.

    The paper starts from a text tower that has read a million captions. From nothing, text and images learn together badly:
    kinds the images cannot tell apart yet become one in the text too, and then no gradient is left to part them; and the
    captions stammer (dev/LOG.md). Every process does the same: no gradients are exchanged."""
    of_slide = {}
    for i, slide in enumerate(bags.slides):
        of_slide.setdefault(slide, []).append(i)
    rng, slides, levels = np.random.default_rng(cfg.seed), list(of_slide.values()), np.split(np.arange(85), [1, 5, 21])
    if len(slides) < 2:
        return
    schedule = dataclasses.replace(cfg, steps=cfg.words, warmup=cfg.words // 10)
    parameters = list(model.text.parameters())
    if cfg.plm:
        parameters += [p for part in (model.fuse_text, model.fusion, model.fusion_ln, model.lm_dense, model.lm_ln) for p in part.parameters()] + [model.lm_bias]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)
    for step in tqdm(range(cfg.words), desc="words", unit="step", disable=None if losses.rank_offset(1) == 0 else True, dynamic_ncols=True):
        pair = ([], [])                                                                # M = slides * 4 captions each
        for slide in rng.permutation(len(slides))[:32]:
            for nodes in levels:
                for side, i in zip(pair, rng.choice(slides[slide], 2)):
                    there = [n for n in nodes if bags.valid[i][n]] or [0]
                    side.append(bags.captions(i, [rng.choice(there)])[0] or "")
        ids = text.trim(tokenizer.batch(pair[0] + pair[1], context), tokenizer.end).to(model.proj.weight.device)
        tokens, pooled = model.text(ids)                                               # [2M, T, Dt], [2M, d]
        a, b = F.normalize(pooled.float(), dim=-1).chunk(2)                            # [M, d] each
        logits, own = a @ b.T / 0.07, torch.arange(len(a), device=a.device)            # [M, M]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        if cfg.plm:
            some, word = tokens[::3], ids[::3]  # 3 and not 4, or all were of one magnification
            real, prefix = networks.text_valid(word, model.text.end), torch.ones_like(word[:, 0])
            fused = model.fuse_with_text(some.new_zeros(len(some), 0, model.kind.shape[1]), some, real, prefix)
            loss = loss + losses.plm(model.lm_logits(fused), word, prefix, real, real[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, cfg.clip)
        optimizer.step()
    model.zero_grad()  # of all, for the next words reach more than they train


def save_checkpoint(folder, objective, optimizer, step, cfg):
    """ckpt.pt (and the one before it as ckpt_prev.pt): each appears whole or not at all."""
    new, old = Path(folder) / "ckpt.pt", Path(folder) / "ckpt_prev.pt"
    torch.save({"model": objective.model.state_dict(), "memory": objective.memory(), "optimizer": optimizer.state_dict(), "step": step, "config": dataclasses.asdict(cfg)}, f"{new}.tmp")
    if new.exists():
        os.replace(new, old)
    os.replace(f"{new}.tmp", new)


def load_checkpoint(folder, cfg, device):
    """The newest readable checkpoint of a run, or None. ValueError when it was made with other settings, naming them."""
    for path in (Path(folder) / "ckpt.pt", Path(folder) / "ckpt_prev.pt"):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as e:
            print(f"{path} cannot be read ({type(e).__name__}); trying the one before it", file=sys.stderr)
            continue
        free = ("device", "compile", "workers", "log_every", "save_every", "evaluate", "out", "data")  # do not change the run's result
        was, now = state["config"], dataclasses.asdict(cfg)
        other = [k for k in was | now if k not in free and was.get(k) != now.get(k)]
        if other:
            was = ", ".join(f"{k} {was.get(k)} -> {now.get(k)}" for k in other)
            raise ValueError(f"{path} was trained with other settings ({was}): use them again, or another --out")
        return state
    return None


def ignore_signals(_):
    """For the loader's processes: Ctrl-C and torchrun signal them too, but whether to stop is for the loop to say."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def versions():
    """What a log needs to be reproduced: library versions, machine, commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "machine": platform.machine(), "git": commit}


# ----------------------------------------------------------------------------------------------------------------------

def main(argv):
    """Settings -> processes -> data -> model -> loop -> checkpoint -> evaluation."""
    cfg = parse(argv)

    # Processes: torchrun sets RANK; without it this is the only one and the same code runs.
    distributed = "RANK" in os.environ
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = cfg.device
    if device == "cuda":
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if distributed:  # the time-out must outlast rank 0 making the data
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=3))
    say = tqdm.write if rank == 0 else lambda *_: None
    if cfg.bags % (cfg.accumulate * world):
        raise ValueError(f"--bags {cfg.bags} cannot be split over {world} processes x {cfg.accumulate} micro-batches: use a multiple of {world * cfg.accumulate}")

    # Data, made by the first process while the others wait.
    run, folder = Path(cfg.out), Path(cfg.data)
    if rank == 0:
        if cfg.data == Config.data:
            make_world(folder)
        run.mkdir(parents=True, exist_ok=True)
    if distributed:
        dist.barrier()
    bags = data.BagDataset(folder / "train")
    if rank == 0 and not ((run / "tokenizer.json").exists() and list(run.glob("ckpt*.pt"))):  # one left by a run that saved nothing may be of other settings
        if cfg.tokenizer:
            tokenizer = text.Tokenizer.from_clip(cfg.tokenizer)
        else:  # 5,000 bags of captions are plenty to learn merges from
            tokenizer = text.Tokenizer.train((c for i in range(min(5000, len(bags))) for c in bags.captions(i) if c), cfg.vocab)
        tokenizer.save(run / "tokenizer.json")
    if distributed:
        if rank == 0:
            text.count_corpus(folder / "train")  # kept beside the shards, where every process's batches find it
        dist.barrier()
    tokenizer = text.Tokenizer.load(run / "tokenizer.json")
    context = networks.SIZES[cfg.size]["text"]["context"]

    # Model, optimiser, checkpoint.
    model = build_model(cfg, tokenizer).to(device)
    if model.vision.size != bags.S:
        raise ValueError(f"{folder}/train holds patches of {bags.S} px and the vision tower of --size {cfg.size} reads {model.vision.size}: tile with --patch-px {model.vision.size}")
    if cfg.freeze_vision:
        model.vision.requires_grad_(False).eval()  # its batch norms, where it has any, keep their averages
        if device == "cuda":
            for p in model.vision.parameters():  # casting the weights at every call would cost half as much again; buffers keep their digits
                p.data = p.data.to(torch.bfloat16)
    if not (cfg.itm or cfg.mlm or cfg.plm or cfg.mrtva):  # parts no loss reaches must not wait for gradients
        for m in (model.fuse_image, model.fuse_text, model.fuse_keyword, model.fusion, model.fusion_ln):
            m.requires_grad_(False)
    optimizer = make_optimizer(model, cfg, device)
    state, step = load_checkpoint(run, cfg, device), 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        say(f"continuing {run} at step {step} of {cfg.steps}")
    else:
        if cfg.words and not cfg.clip_weights:
            learn_words(model, bags, tokenizer, cfg, context)
        if rank == 0:
            (run / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    objective = Objective(model, cfg)  # `model` keeps the clean names that checkpoints hold
    if state:
        objective.load_state_dict({f"model.{k}": x for k, x in state["model"].items()} | state["memory"])
        state = None  # or it would stay on the device
    forward = torch.compile(objective, dynamic=False, fullgraph=True) if cfg.compile else objective
    if world > 1:
        # No broadcast of buffers: every process computes the same queues and batch statistics.
        forward = DistributedDataParallel(forward, device_ids=[local] if device == "cuda" else None, broadcast_buffers=False,
                                          find_unused_parameters=not all(getattr(cfg, k) for k in LOSSES))
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")  # at the small size bf16 is slower on a CPU
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{len(bags)} bags x 85 patches of {bags.S} px; {trainable / 1e6:.1f}M trainable parameters; {world} x {device}; "
        f"{cfg.bags} bags a step = {cfg.bags * sum(cfg.children ** k for k in range(4))} patches")

    # Loader: batch i is a function of i, so the sampler is just the numbers that are left.
    batches = Batches(bags, tokenizer, cfg, context, rank, world)
    if cfg.itm and batches.local == 1:
        say("warning: with one bag at a time ITM finds no wrong image or caption, and is 0: raise --bags")
    if rank == 0:
        data.replace_file(run / "keywords.json", json.dumps(batches.corpus["common"], ensure_ascii=False))  # what `model.py caption` names pictures by
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(step * cfg.accumulate, len(batches)), num_workers=cfg.workers,
                             worker_init_fn=ignore_signals, pin_memory=device == "cuda", prefetch_factor=4 if cfg.workers else None))

    # A signal only raises a flag; the loop stops after the step, so nothing is half done. Several processes stop at a log step, where all learn of it.
    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(True))

    log = open(run / "log.jsonl", "a") if rank == 0 else None
    if rank == 0:
        log.write(json.dumps({"started": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "world": world, **versions(), "config": dataclasses.asdict(cfg)}) + "\n")
    bar = tqdm(total=cfg.steps, initial=step, desc="train", unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)
    sums, waited, since, start, warned = {}, 0.0, time.time(), step, set()
    while step < cfg.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["factor"]
        for micro in range(cfg.accumulate):
            wait = time.time()
            batch = next(loader)
            waited += time.time() - wait
            batch = {k: x.to(device, non_blocking=True) for k, x in batch.items()}
            if cfg.compile:
                mark_lengths(batch)
            torch.manual_seed(hash((cfg.seed, step, micro, rank)) % 2 ** 63)  # masks, negatives, stains: a function of the step
            pixels = batch["pixels"]
            patches = pixels if pixels.dim() == 5 else cut(pixels, batch["nodes"], batch["window"])     # [B, N, 3, S, S]
            patches = data.turn(patches, batch["turns"])
            if cfg.jitter:
                patches = data.stain_jitter(patches, cfg.jitter)
            last = micro == cfg.accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                with autocast:
                    parts, monitors = forward(patches, batch)
                loss = sum(getattr(cfg, name) * part for name, part in parts.items())
                (loss / cfg.accumulate).backward()
            for name, x in {"loss": loss, **parts, **monitors}.items():
                sums[name] = sums.get(name, 0) + x.detach() / cfg.accumulate
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for scale in (model.itc_scale, model.cvta_scale):
                scale.clamp_(-math.log(losses.TAU[1]), -math.log(losses.TAU[0]))
        objective.follow()
        step += 1
        bar.update()
        sums["grad"] = sums.get("grad", 0) + norm.detach()

        halt = bool(stop) and world == 1
        if step % cfg.log_every == 0 or step == cfg.steps:
            mean = torch.stack([*sums.values(), torch.tensor(float(bool(stop)), device=device)]) / (step - start)
            *mean, stopping = losses.all_mean(mean).tolist()
            mean, halt = dict(zip(sums, mean)), stopping > 0
            speed = (step - start) * cfg.bags / (time.time() - since)
            row = {"step": step, **mean, "lr": optimizer.param_groups[0]["lr"], "bags_per_s": speed, "wait": waited / (time.time() - since)}
            if not np.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']} at step {step}: restart from {run}/ckpt.pt with a lower --lr ({cfg.lr})")
            if rank == 0:
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix_str(f"{speed:.1f} bags/s")
                for name, warning in losses.warnings({**mean, "epoch": step * cfg.bags / len(bags)}).items():
                    if name not in warned and step > cfg.warmup:  # before that all is random
                        warned.add(name)
                        say(f"warning at step {step}: {warning}")
                say(f"step {step:5d} | loss {row['loss']:7.3f} | " + " ".join(f"{k} {mean[k]:.3f}" for k in parts)
                    + " | " + " ".join(f"{k} {mean[k]:.2f}" for k in monitors)
                    + f" | lr {row['lr']:.1e} | {speed:.1f} bags/s | wait {row['wait']:.0%} | ETA {timedelta(seconds=int((cfg.steps - step) * cfg.bags / speed))}")
            sums, waited, since, start = {}, 0.0, time.time(), step
        if rank == 0 and (step % cfg.save_every == 0 or step == cfg.steps or halt):
            save_checkpoint(run, objective, optimizer, step, cfg)
        if halt:
            bar.close()
            say(f"stopped at step {step} of {cfg.steps}; the same command continues from {run}/ckpt.pt")
            break
    bar.close()
    del loader, forward  # DDP holds on to the process group
    if distributed:
        dist.barrier()  # a process that leaves while another still tidies up can hang the other for good
        dist.destroy_process_group()
    if rank == 0 and step == cfg.steps and cfg.evaluate:
        import evaluate  # here, because the loop does not need it
        evaluate.report(run, folder / "test", train=folder / "train", device=device)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues where it stopped")
