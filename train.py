"""Train MR-PLIP: one column from settings to the last checkpoint. Run it as it is and it makes its own data first.

    torchrun train.py                                              # the built-in world, two CPU cores, about six minutes
    torchrun train.py --out runs/no_cvta --cvta 0                  # an ablation: a loss with weight 0 is not computed
    torchrun --nproc_per_node=8 train.py --preset paper --data bags --out runs/paper \\
        --vision uni/pytorch_model.bin --text quiltnet/open_clip_pytorch_model.bin --tokenizer bpe_simple_vocab_16e6.txt.gz

Plain `python train.py` does the same on one process. The same command again continues where the last one stopped, on as many processes
as you like. `--data DIR` holds DIR/train and DIR/test, each with bags-*.tar (data.py tile) and bags-*.captions.jsonl (text.py).

Read `main` for the loop, from the top to the bottom. What a step sees is in batches.py, what it computes in objective.py, what stays in runs.py.

References: [1] MR-PLIP, CVPR 2025.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine (dev/LOG.md)

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import inspect
import json
import math
import signal
import sys
import textwrap
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import losses
import model as networks
import runs
import subjects
import text
import weights
import zeroshot
from batches import Batches, Features, ahead, cache_features, features_name, make_world, number
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
    turns: bool = True             # turn and mirror the bags
    jitter: float = 0.2            # stain augmentation: relative change of haematoxylin and eosin
    scale_jitter: float = 0.0      # enlarge a random square of the bag, its side 1 - this at least: magnifications between the four
    cache: bool = False            # with a frozen tower: compute its features once, beside the shards, and train without pixels (no augmentation)
    workers: int = 1               # loader processes of each process
    ram: float = 2.0               # GB: decoded bags that each loader process keeps in memory; the built-in world needs 1.6
    # objective [1]: L = ITC + ITM + MLM + PLM + CVTA + MRTVA, each with weight 1 in the paper, and in --preset paper
    itc: float = 1.0               # weight of image-text contrast; 0 removes a loss and its cost
    itm: float = 1.0               # ... image-text matching
    mlm: float = 0.25              # ... masked language modelling; at 1 the noise of the 50 words it masks a step drowns what PLM says
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
    words: int = 100               # steps of the text tower alone before all others, where the paper has QuiltNet (not with weights in --text)
    steps: int = 640               # optimiser steps
    lr: float = 3e-3               # peak learning rate (AdamW)
    lr_vision: float = 2.0         # factor on it for the vision tower
    lr_text: float = 0.1           # factor on it for the text tower
    warmup: int = 40               # steps of linear warm-up, then cosine to lr / 100
    weight_decay: float = 0.02     # not on biases, norms, temperatures, positions
    clip: float = 1.0              # gradient norm
    # networks
    size: str = "synthetic"        # a key of model.SIZES
    vocab: int = 1500              # ids of the tokenizer trained on the captions (without --tokenizer)
    tokenizer: str = ""            # CLIP's merge list, needed with weights in --text
    vision: str = ""               # weights of the vision tower: a timm or UNI file; with --size quiltnet or plip a CLIP's; or "random"
    text: str = ""                 # weights of the text tower: an open_clip, OpenAI or Hugging Face CLIP file; or "random"
    freeze_vision: bool = False    # keep the vision tower fixed, its weights in bfloat16 on a GPU
    # running
    device: str = "auto"           # cuda when there is one, else cpu
    compile: bool = False          # torch.compile the step: worth it on a GPU, slower to start than it gains on a CPU
    log_every: int = 20            # steps
    save_every: int = 100          # steps
    eval_every: int = 320          # steps: validation loss and zero-shot (or retrieval) on data/test; 0 never
    evaluate: bool = True          # measure everything on data/test when training ends
    change: bool = False           # go on with a checkpoint although these settings are not those it was trained with
    wandb: str = ""                # project of Weights & Biases to send the log to (pip install wandb)


LOSSES = ("itc", "itm", "mlm", "plm", "cvta", "mrtva")

PRESETS = {
    "synthetic": {},
    "paper": dict(  # 400,000 bags x 50 epochs / 64
        out="runs/paper", data="data/paper", size="paper", freeze_vision=True, compile=True, bags=64, children=4, pairs=4.0, k_o=8, keywords=128, mlm=1.0,
        cvta_negatives="bag", alpha=0.4, queue=65_536, half_life=8_900, jitter=0.05, workers=8, ram=0, words=0, steps=312_500, lr=1e-4, lr_vision=0.1,
        lr_text=0.1, warmup=2000, log_every=50, save_every=1000, eval_every=10_000),
}

# Folders that are made when they are not there. The second is for --vision random: the same slides, enlarged to what UNI reads.
WORLDS = {"data/synthetic": {}, "data/synthetic-224": dict(train=16, test=16, patch_px=224)}

SOURCES = {
    "vision": "UNI's weights are pytorch_model.bin of huggingface.co/MahmoodLab/UNI, where access is asked for",
    "text": "QuiltNet's are open_clip_pytorch_model.bin of huggingface.co/wisdomik/QuiltNet-B-32",
    "tokenizer": "CLIP's merge list is clip/bpe_simple_vocab_16e6.txt.gz of github.com/openai/CLIP",
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
    more = {"data": "data/synthetic-224"} if preset == "paper" and getattr(flags, "vision", "") == "random" else {}
    if not torch.cuda.is_available():
        more["compile"] = False
    return check(Config(**{**PRESETS[preset], **more, **vars(flags), "preset": preset}))


def is_file(setting):
    """Does a setting of weights name a file, or is it nothing or "random"?"""
    return setting not in ("", "random")


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
    if cfg.preset == "paper" and not (cfg.vision and (cfg.text or cfg.vision == "random")):
        flag = "text" if cfg.vision else "vision"
        raise ValueError(f"the paper preset needs --{flag} FILE: {SOURCES[flag]}; --{flag} random tries the code at full size without it")
    if is_file(cfg.text) and not cfg.tokenizer:
        raise ValueError(f"--text {cfg.text} needs --tokenizer FILE, for the weights know only CLIP's own ids: {SOURCES['tokenizer']}")
    if cfg.freeze_vision and not cfg.vision and networks.SIZES[cfg.size]["vision"].get("stem") != "conv":
        raise ValueError("--freeze_vision would keep random weights: it needs --vision FILE (or random, to try the code)")
    if cfg.cache and (not cfg.freeze_vision or cfg.scale_jitter):
        raise ValueError("--cache keeps the features of a tower that does not learn, of the bags as they are: it needs --freeze_vision true and --scale_jitter 0")
    if not 0 <= cfg.scale_jitter < 1:
        raise ValueError(f"--scale_jitter is a share of the side of a bag, at least 0 and less than 1, not {cfg.scale_jitter}")
    if min(cfg.steps, cfg.bags, cfg.accumulate, cfg.k_o, cfg.keywords, cfg.log_every, cfg.save_every, cfg.eval_every + 1) < 1:
        raise ValueError("--steps, --bags, --accumulate, --k_o, --keywords, --log_every and --save_every must be at least 1, --eval_every at least 0")
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# Model and optimiser

def learning_rate(step, cfg):
    """Linear warm-up, then a cosine from lr to lr / 100 at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def decays(name, p):
    """Does weight decay pull at this parameter? At matrices, but not at norms, biases, temperatures, positions."""
    return p.ndim >= 2 and not name.endswith((".pos", ".cls", "kind"))


def make_optimizer(model, cfg, device):
    """AdamW over groups: towers have their own rate, and vectors, norms, temperatures and positions no decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = cfg.lr_vision if name.startswith("vision.") else cfg.lr_text if name.startswith("text.") else 1.0
            groups.setdefault((factor, cfg.weight_decay * decays(name, p)), []).append(p)
    return torch.optim.AdamW([{"params": ps, "factor": f, "weight_decay": d} for (f, d), ps in groups.items()],
                             lr=cfg.lr, betas=(0.9, 0.98), fused=True)


def build_model(cfg, tokenizer, pretrained=True):
    """MRPLIP of the configured size, with public weights in its towers where paths are given (not where a checkpoint will fill them)."""
    torch.manual_seed(cfg.seed)
    size = networks.SIZES[cfg.size]
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **size)
    if pretrained and is_file(cfg.vision):
        side, clip = size["vision"]["size"], size["vision"].get("pre_norm", False)
        weights.adopt_vision(model, weights.load_clip(cfg.vision, size=side)[0] if clip else weights.load_vit(cfg.vision, side))
    if pretrained and is_file(cfg.text):
        weights.adopt_text(model, weights.load_clip(cfg.text)[1])
    return model


def freeze(vision, device):
    """Stop a tower from learning; on a GPU the weights of its products go to bf16, for casting them at every call would cost half as much again.

    Positions, class token, norms and LayerScale stay in fp32: with them the sum that runs through the blocks does, too."""
    vision.requires_grad_(False).eval()
    if device == "cuda":
        for layer in vision.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                for p in layer.parameters():
                    p.data = p.data.to(torch.bfloat16)


def learn_words(model, bags, tokenizer, cfg, context):
    """Before any image: captions against captions (two of one slide and magnification attract, all others repel: those of
    other slides and those of other magnifications of the same slide), and of a third of them the next word, through fusion without an image.

    The paper starts from a text tower that has read a million captions. From nothing, text and images learn together badly:
    kinds the images cannot tell apart yet become one in the text too, and then no gradient is left to part them; and the
    captions stammer (dev/LOG.md). Every process does the same: no gradients are exchanged."""
    of_slide = {}
    for i, slide in enumerate(bags.slides):
        of_slide.setdefault(slide, []).append(i)
    rng, slides, levels = np.random.default_rng(cfg.seed), list(of_slide.values()), np.split(np.arange(85), [1, 5, 21])
    if len(slides) < 2:
        return
    valid, said = np.asarray(bags.valid), functools.lru_cache(4096)(lambda i: bags.captions(i, range(85)))
    schedule = dataclasses.replace(cfg, steps=cfg.words, warmup=cfg.words // 10)
    speech = [model.fuse_text, model.fusion, model.fusion_ln, model.lm_dense, model.lm_ln, model.lm_head] if cfg.plm else []
    groups = {True: [], False: []}
    for name, p in nn.ModuleList([model.text, *speech]).named_parameters():
        groups[decays(name, p)].append(p)
    parameters = groups[True] + groups[False]
    optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": cfg.weight_decay * decay} for decay, ps in groups.items()],
                                  lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    for step in tqdm(range(cfg.words), desc="words", unit="step", disable=None if networks.rank() == 0 else True, dynamic_ncols=True):
        pair = ([], [])                                                                # M = slides * 4 captions each
        for slide in rng.permutation(len(slides))[:32]:
            for nodes in levels:
                for side, i in zip(pair, rng.choice(slides[slide], 2)):
                    there = nodes[valid[i, nodes]]
                    side.append(said(i)[rng.choice(there)] if len(there) else "")
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


# ----------------------------------------------------------------------------------------------------------------------
# Small parts of the loop

def mark_lengths(batch):
    """Tell the compiler which sizes of a batch vary: captions and keywords are as long as their longest, keywords as many as there are.
    All others are fixed, so that one graph serves every step."""
    for name, axis in (("ids", 2), ("keywords", 0), ("keywords", 1)):
        torch._dynamo.mark_dynamic(batch[name], axis)


@torch.no_grad()
def validate(objective, batches, device, autocast, most=4):
    """Mean of each loss over the first batches of held-out bags, the same ones every time, on all processes -> {name: float}.

    The objective is in eval mode: nothing is enqueued, and batch norms of the tower use their averages. CVTA and
    MRTVA take keywords of the own captions, and no target is softened. Held-out bags get numbers of their own, or those
    of the training bags in the queue would pass for kin. So the numbers can be compared over the whole run; ITC's
    only once the queue is full, for each slot is a negative more."""
    total, n = 0, min(most, max(1, len(batches.bags) // (batches.local * batches.world)))
    for i in range(n):
        batch = {k: x.to(device) for k, x in batches[i].items()}
        batch["alpha"], batch["free"] = torch.zeros_like(batch["alpha"]), torch.zeros_like(batch["free"])
        batch["bag"] = batch["bag"] + 2 ** 40
        with autocast:
            parts, _ = objective(batch)
        total = total + torch.stack([*parts.values()])
    mean = dict(zip(parts, losses.all_mean(total / n).tolist()))
    return {"val_loss": sum(getattr(objective.cfg, k) * x for k, x in mean.items()), **{f"val_{k}": x for k, x in mean.items()}}


def settle(_):
    """For the loader's processes: Ctrl-C and torchrun signal them too, but whether to stop is for the loop to say. And on a CPU they work while
    the loop leaves a core free, not instead of it: each of its operations waits for its slowest thread."""
    os.nice(10)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


def keep_memory():
    """Let glibc keep what large tensors leave. It would give each back to the system and pay for fresh pages at the next: a tenth of a step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2 ** 30), mallopt(-1, 2 ** 31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


# ----------------------------------------------------------------------------------------------------------------------

def main(argv):
    """Settings -> processes -> data -> model -> loop -> checkpoint -> evaluation."""
    cfg = parse(argv)

    # Processes: torchrun (or SLURM's script in the README) sets RANK; without it this is the only one and the same code runs.
    distributed = "RANK" in os.environ
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    device, run, folder = cfg.device, Path(cfg.out), Path(cfg.data)
    if device == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 remains
    else:
        keep_memory()
    if cfg.bags % (cfg.accumulate * world):
        raise ValueError(f"--bags {cfg.bags} cannot be split over {world} processes x {cfg.accumulate} micro-batches: use a multiple of {world * cfg.accumulate}")
    begun = bool(list(run.glob("ckpt*.pt")))
    for flag, source in SOURCES.items():
        path = getattr(cfg, flag)
        if not begun and is_file(path) and not Path(path).exists():
            raise ValueError(f"--{flag} {path} does not exist: {source}" + "; --vision random tries the code at full size without it" * (flag == "vision"))
    if cfg.wandb:
        try:
            import wandb  # only here: not needed otherwise
        except ImportError:
            raise ValueError("--wandb needs its package: pip install wandb") from None
    warnings.filterwarnings("ignore", "(?s).*(all_gather_into_tensor|broadcast_buffers).* is deprecated")  # torch 2.11 does not know their new names
    if distributed:  # the time-out must outlast rank 0 making the data
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=3))
    say = tqdm.write if rank == 0 else lambda *_: None
    say("settings: " + textwrap.fill("  ".join(f"{k} {v}" for k, v in dataclasses.asdict(cfg).items() if v != ""), 160, subsequent_indent="          ", break_on_hyphens=False))

    # Data, made by the first process while the others wait.
    if rank == 0:
        if cfg.data in WORLDS:
            make_world(folder, **WORLDS[cfg.data])
        run.mkdir(parents=True, exist_ok=True)
    if distributed:
        dist.barrier()
    bags = data.BagDataset(folder / "train")
    test = data.BagDataset(folder / "test") if cfg.eval_every or cfg.evaluate else None  # now, not after three days
    if rank == 0 and not (begun and (run / "tokenizer.json").exists()):  # one left by a run that saved nothing may be of other settings
        if cfg.tokenizer:
            tokenizer = text.Tokenizer.from_clip(cfg.tokenizer)
        else:  # 5,000 bags of captions are plenty to learn merges from
            tokenizer = text.Tokenizer.train((c for i in range(min(5000, len(bags))) for c in bags.captions(i) if c), cfg.vocab)
        tokenizer.save(run / "tokenizer.json")
    if distributed:
        if rank == 0:
            text.count_corpus(bags.folder)  # kept beside the shards, where every process's batches find it
        dist.barrier()
    tokenizer = text.Tokenizer.load(run / "tokenizer.json")
    context = networks.SIZES[cfg.size]["text"]["context"]

    # Model, optimiser, checkpoint.
    state, path = runs.read_checkpoint(run, device)
    if state and (changed := runs.check_settings(state, path, cfg)):
        say(changed)
    if rank == 0 and path and path.name != "ckpt.pt" and (run / "ckpt.pt").exists():
        os.replace(run / "ckpt.pt", run / "ckpt_damaged.pt")  # or the next save would put it in the place of the good one
    model = build_model(cfg, tokenizer, pretrained=not state).to(device)
    if model.vision.size != bags.S:
        raise ValueError(f"{folder}/train holds patches of {bags.S} px and the vision tower of --size {cfg.size} reads {model.vision.size}: tile with --patch-px {model.vision.size}")
    if cfg.freeze_vision:
        freeze(model.vision, device)
    if not (cfg.itm or cfg.mlm or cfg.plm or cfg.mrtva):  # parts no loss reaches must not wait for gradients
        for m in (model.fuse_image, model.fuse_text, model.fuse_keyword, model.fusion, model.fusion_ln):
            m.requires_grad_(False)
    optimizer, step, skipped = make_optimizer(model, cfg, device), 0, 0
    if not state and cfg.words and not is_file(cfg.text):
        learn_words(model, bags, tokenizer, cfg, context)
    objective = Objective(model, cfg)  # `model` keeps the clean names that checkpoints hold
    if state:
        try:
            objective.load_state_dict({f"model.{k}": x for k, x in state["model"].items()} | state["memory"])
            ours = [(group["factor"], group["weight_decay"]) for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, (factor, decay) in zip(optimizer.param_groups, ours):  # of the settings, which --change may have changed
                group["factor"], group["weight_decay"] = factor, decay
        except (RuntimeError, ValueError) as e:
            raise ValueError(f"{path} does not fit these settings ({str(e).strip().splitlines()[-1].strip()}): use those it was trained with, or another --out") from None
        step, skipped = state["step"], state.get("skipped", 0)
        say(f"continuing {run} at step {step} of {cfg.steps}")
    elif rank == 0 and cfg.words:
        runs.save_checkpoint(run, objective, optimizer, 0, cfg)  # the words are learnt
    state = None  # or it would stay on the device
    if rank == 0:
        data.replace_file(run / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))

    # The features of a frozen tower, once.
    features, autocast = {}, torch.autocast(device, torch.bfloat16, enabled=device == "cuda")  # at the small size bf16 is slower on a CPU
    if cfg.cache:
        name, see = features_name(model, cfg.size), torch.compile(model.see) if cfg.compile else model.see
        for split in (bags, test) if test else (bags,):
            with autocast:
                cache_features(see, split, name, device, rank, world, cfg.workers)
            features[split.folder] = Features(split, name)
        if distributed:
            dist.barrier()

    # One graph a step: networks, losses and, on a GPU, the augmentation.
    torch._dynamo.config.optimize_ddp = False  # it would split the graph, and older versions cannot where gradients cross processes
    forward = torch.compile(objective, dynamic=False, fullgraph=True) if cfg.compile else objective
    if world > 1:
        # No broadcast of buffers: every process computes the same queues and batch statistics. Static graph: which parameters get gradients
        # does not change from step to step (torch 2.13 cannot have it together with no_sync, which accumulation needs).
        forward = DistributedDataParallel(forward, device_ids=[local] if device == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True,
                                          static_graph=cfg.accumulate == 1, find_unused_parameters=cfg.accumulate > 1 and not all(getattr(cfg, k) for k in LOSSES))
    nodes, rate = sum(cfg.children ** k for k in range(4)), runs.matmul_rate(device)
    say(f"{len(bags)} bags x 85 patches of {bags.S} px; {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M trainable parameters; "
        f"{world} x {device}, which multiplies matrices at {rate / 1e12:.2f} TFLOP/s; {cfg.bags} bags a step = {cfg.bags * nodes} patches" + ", from cached features" * cfg.cache)

    # Loader: batch i is a function of i, so the sampler is just the numbers that are left.
    batches = Batches(bags, tokenizer, cfg, context, rank, world, features.get(bags.folder))
    held_out = Batches(test, tokenizer, dataclasses.replace(cfg, ram=0), context, rank, world, features.get(test.folder), batches.corpus) if cfg.eval_every else None
    if cfg.itm and cfg.bags == cfg.accumulate:
        say("warning: with one bag at a time ITM finds no wrong image or caption, and is 0: raise --bags")
    if world > 1 and cfg.pairs * batches.local % 1:
        say(f"warning: --pairs {cfg.pairs} x {batches.local} bags a process is rounded to {batches.rows()} patches, so the number of processes changes what is learned")
    if rank == 0:
        data.replace_file(run / "keywords.json", json.dumps(batches.corpus["common"], ensure_ascii=False))  # what `model.py caption` names pictures by
    loader = ahead(DataLoader(batches, batch_size=None, sampler=range(step * cfg.accumulate, len(batches)), num_workers=cfg.workers,
                              worker_init_fn=settle, pin_memory=device == "cuda", prefetch_factor=4 if cfg.workers else None), device)

    # A signal only raises a flag; the loop stops after the step, so nothing is half done. Several processes vote, one step late, on the CPU,
    # so that no one waits for a GPU.
    stop, vote, votes = [], None, torch.zeros(1)
    usual = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    log = tracker = None
    if rank == 0:
        log = runs.open_log(run)
        log.write(json.dumps({"started": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "world": world, "matmul_tflops": rate / 1e12, **runs.versions(), "config": dataclasses.asdict(cfg)}) + "\n")
        if cfg.wandb:
            tracker = wandb.init(project=cfg.wandb, name=run.name, id=f"{number(str(run.resolve())):x}", resume="allow", config=dataclasses.asdict(cfg))

    def record(row):
        """A line of the log, and its like elsewhere."""
        log.write(json.dumps(row) + "\n")
        log.flush()
        if tracker:
            tracker.log({k: x for k, x in row.items() if k != "step"}, step=row["step"])

    running = list(model.buffers())                                                    # averages of batch norms
    bad = torch.tensor([0.0, skipped], device=device)                                  # steps left out: in a row up to now, and in all
    bar = tqdm(total=cfg.steps, initial=step, desc="train", unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)
    sums, waited, flops, since, start, warned, halt = 0, 0.0, 0, time.time(), step, set(), False
    while step < cfg.steps and not halt:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["factor"]
        values, before = 0, [b.clone() for b in running]
        for micro in range(cfg.accumulate):
            wait = time.time()
            batch = next(loader)
            waited += time.time() - wait
            flops += objective.flops(batch)
            if cfg.compile:
                mark_lengths(batch)
            torch.manual_seed(hash((cfg.seed, step, micro, rank)) % 2 ** 63)           # for --mrtva_pairs random: all other chance is in the batch
            with contextlib.nullcontext() if micro == cfg.accumulate - 1 or world == 1 else forward.no_sync():
                with autocast:
                    parts, monitors = forward(batch)
                loss = sum(getattr(cfg, name) * part for name, part in parts.items())
                (loss / cfg.accumulate).backward()
            values = values + torch.stack([loss, *parts.values(), *monitors.values()]).detach() / cfg.accumulate
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)

        # A step whose loss or gradient is not finite is left out, by all processes alike and without asking the device.
        good = norm.isfinite() & losses.all_mean(values[0]).isfinite()
        optimizer.found_inf = (~good).float()                                          # fused AdamW then does nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, old in zip(running, before):
                buffer.copy_(torch.where(good, buffer, old))
            for scale in (model.itc_scale, model.cvta_scale):
                scale.clamp_(-math.log(losses.TAU[1]), -math.log(losses.TAU[0]))
            bad = torch.stack([(bad[0] + 1) * ~good, bad[1] + ~good])
            sums = sums + torch.where(good, torch.cat([values, norm[None]]), 0)
        objective.follow()
        step += 1
        bar.update()

        # Who was asked to stop? With several processes this is the answer to the step before.
        if world > 1:
            if vote:
                vote.wait()
            halt = votes.item() > 0
            votes = torch.tensor([float(bool(stop))])
            vote = None if halt else dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        else:
            halt = bool(stop)

        if step % cfg.log_every == 0 or step == cfg.steps:                             # the only place where the loop waits for the device
            *mean, in_a_row, total = losses.all_mean(torch.cat([sums, bad])).tolist()
            count, seconds, used = step - start, time.time() - since, step - start - (total - skipped)
            mean = {name: x / used if used else math.nan for name, x in zip(("loss", *parts, *monitors, "grad"), mean)}
            speed, skipped = count * cfg.bags / seconds, int(total)
            row = {"step": step, **mean, "lr": optimizer.param_groups[0]["lr"], "bags_per_s": speed, "patches_per_s": speed * nodes, "wait": waited / seconds,
                   "mfu": flops / seconds / rate, "memory_gb": runs.memory(device), "skipped": skipped}
            if rank == 0:
                record(row)
                bar.set_postfix_str(f"{speed:.1f} bags/s")
                for name, warning in losses.warnings({**mean, "epoch": step * cfg.bags / len(bags)}).items():
                    if name not in warned and step > cfg.warmup:  # before that all is random
                        warned.add(name)
                        say(f"warning at step {step}: {warning}")
                say(f"step {step:5d} | loss {row['loss']:7.3f} | " + " ".join(f"{k} {mean[k]:.3f}" for k in parts)
                    + " | " + " ".join(f"{k} {mean[k]:.2f}" for k in monitors) + f" | grad {mean['grad']:.2f} lr {row['lr']:.1e}" + f" skipped {skipped}" * (skipped > 0)
                    + f" | {speed:.1f} bags/s {speed * nodes:.0f} patches/s wait {row['wait']:.0%} MFU {row['mfu']:.0%} {row['memory_gb']:.1f} GB"
                    + f" | ETA {timedelta(seconds=int((cfg.steps - step) * seconds / count))}")
            sums, waited, flops, since, start = 0, 0.0, 0, time.time(), step
            if in_a_row >= 10:  # the weights are those before the first of them
                if rank == 0:
                    runs.save_checkpoint(run, objective, optimizer, step, cfg, skipped)
                if distributed:
                    dist.barrier()
                raise ValueError(f"{in_a_row:.0f} steps in a row up to step {step} had a loss or gradient that is not finite; they were left out, and {run}/ckpt.pt holds the weights before them. "
                                 f"The same command goes on behind them, with --change true under a lower --lr ({cfg.lr})")
        if cfg.eval_every and step % cfg.eval_every == 0 and (step < cfg.steps or not cfg.evaluate):
            pause = time.time()
            objective.eval()
            found = validate(objective, held_out, device, autocast)
            some = [subjects.embed(model, b, subjects.spread(len(b), n), device) for b, n in ((test, 60), (bags, 30))]
            if rank == 0:
                found.update(zeroshot.glance(model, tokenizer, test, *some))
                record({"step": step, **found})
                say(f"step {step:5d} | held out: " + " ".join(f"{k.removeprefix('val_')} {x:.3f}" for k, x in found.items()))
                runs.draw_curves([run], run / "curves.png")
            objective.train()
            since += time.time() - pause
        if rank == 0 and (step % cfg.save_every == 0 or step == cfg.steps or halt):
            runs.save_checkpoint(run, objective, optimizer, step, cfg, int(bad[1]))
    bar.close()
    if halt:
        say(f"stopped at step {step} of {cfg.steps}; the same command continues from {run}/ckpt.pt")
    for number_, handler in usual.items():
        signal.signal(number_, handler)
    del loader, forward  # DDP holds on to the process group
    if rank == 0:
        runs.draw_curves([run], run / "curves.png")
    if distributed:
        dist.barrier()
    if step == cfg.steps and cfg.evaluate and not halt:
        evaluate.report(run, folder / "test", train=folder / "train", device=device)
    if distributed:
        dist.barrier()  # a process that leaves while another still tidies up can hang the other for good
        dist.destroy_process_group()


if __name__ == "__main__":
    for number_ in (signal.SIGTERM, signal.SIGUSR1):  # before and after the loop all files are whole and there is nothing to save: just go
        signal.signal(number_, lambda *_: os._exit(0))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:  # one that a loader's process raised carries that process's traceback before its own line
        which = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error{which}: {str(e).strip().splitlines()[-1].removeprefix('ValueError: ')}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr, flush=True)
        os._exit(0)
    except Exception:
        traceback.print_exc()
    else:
        sys.exit()
    os._exit(1)  # at once: a tidy end would wait for loaders that ignore signals, and for processes that wait for this one
