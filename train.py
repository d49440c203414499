"""Train MR-PLIP: one column from settings to the last checkpoint.

    torchrun train.py                                # the built-in world, in minutes on a CPU
    torchrun train.py --out runs/no_cvta --cvta 0    # an ablation: weight 0 removes a loss
    torchrun --nproc_per_node=8 train.py --preset paper --data bags --out runs/paper \\
        --vision uni/pytorch_model.bin --text quiltnet/open_clip_pytorch_model.bin \\
        --tokenizer bpe_simple_vocab_16e6.txt.gz

Plain `python train.py` does the same on one process. The same command continues where the last one
stopped, also on another number of processes. --data DIR holds DIR/train and DIR/test, each with
shards (`python -m prepare.tile`) and captions (`python -m prepare.captions`).

Read main from top to bottom. data.Batches is what a step sees, losses.Objective is the method.

References: [1] MR-PLIP, CVPR 2025.
"""

import os

# Let idle threads sleep: spinning ones starve each other on a busy machine (dev/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import json
import math
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import evaluate
import losses
import model as networks
import text

# ---- Settings ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Hold all settings of a run. Every field is a flag; a preset changes several."""

    preset: str = "synthetic"  # synthetic | paper: a named set of the values below
    out: str = "runs/synthetic"  # folder of the run
    data: str = "data/synthetic"  # folder with train/ and test/; the default one makes itself
    init: str = ""  # file of prepare.words; DATA/words.pt if that is there; "none" for none
    seed: int = 0  # of weights and batches
    # data
    bags: int = 32  # bags a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step; saves memory, but negatives stay inside each
    children: int = 1  # of 4 children, those seen in a step: 1, 2, 4 -> 4, 15, 85 nodes a bag
    missing: float = 0.01  # share of the patches that may lack a caption
    pairs: float = 0.5  # patches per bag that ITM, MLM and PLM read
    keywords: int = 24  # keywords of a bag at most
    flips: bool = True  # turn and mirror the bags
    jitter: float = 0.2  # stain augmentation: most relative gain and most offset of each stain
    cache: bool = False  # train on features of prepare.features: no pixels, so no augmentation
    workers: int = 1  # loader processes of each process
    # objective: the weight of each loss, where 0 removes it and its cost; then its settings
    itc: float = 1.0  # image-text contrast
    itm: float = 1.0  # image-text matching
    mlm: float = 0.25  # masked language modelling; at 1 its noise drowns PLM in small batches
    plm: float = 1.0  # prefix language modelling
    cvta: float = 1.0  # patches against the keywords of their bag [1]
    mrtva: float = 1.0  # parents and children agree [1]
    k_o: int = 4  # keywords selected per patch
    own_captions: float = 0.8  # share of the steps in which keywords come from the own caption
    negatives: str = "batch"  # bag | batch: the keywords that CVTA contrasts with
    near: float = 0.95  # cosine above which two keywords are no negatives of each other
    kin: float = 0.1  # target mass of ITC on patches of the own bag
    balance: bool = True  # weigh a node by 1 / (nodes of its magnification), not by 1
    # optimiser
    steps: int = 640  # optimiser steps
    lr: float = 3e-3  # peak learning rate (AdamW)
    lr_vision: float = 2.0  # factor on it for the vision tower
    lr_text: float = 0.1  # factor on it for the text tower
    warmup: int = 40  # steps of linear warm-up, then a cosine to lr / 100
    weight_decay: float = 0.02  # not on biases, norms, temperatures, positions
    clip: float = 1.0  # gradient norm
    # networks
    size: str = "synthetic"  # a key of model.SIZES
    tokenizer: str = ""  # CLIP's merge list, needed with --text
    vision: str = ""  # weights of the vision tower (UNI's, or a CLIP's), or "random"
    text: str = ""  # weights of the text tower (a CLIP's)
    freeze_vision: bool = False  # keep the vision tower fixed, its matrices in bf16 on a GPU
    # running
    device: str = "auto"  # cuda if there is one, else cpu
    compile: bool = False  # torch.compile the objective: worth it on a GPU
    log_every: int = 20  # steps
    save_every: int = 100  # steps
    eval_every: int = 320  # steps; the run is also measured at its end; 0: never
    change: bool = False  # continue a checkpoint although settings differ
    wandb: str = ""  # project of Weights & Biases that gets the log


PRESETS = {
    "synthetic": {},
    # 400,000 bags x 50 epochs / 64. Where the paper's text is explicit, this does as it says.
    "paper": dict(
        out="runs/paper", data="data/paper", size="paper", freeze_vision=True, compile=True,
        bags=64, children=4, pairs=4.0, keywords=128, jitter=0.05, workers=8,
        mlm=1.0, k_o=8, own_captions=0.0, negatives="bag", near=1.0, kin=0.0, balance=False,
        steps=312_500, lr=1e-4, lr_vision=0.1, lr_text=0.1, warmup=2000,
        log_every=50, save_every=1000, eval_every=10_000,
    ),
}  # fmt: skip

# Settings that may change when a run continues: how and where it computes, and files that its
# checkpoint replaces. Data may grow.
MAY_CHANGE = """preset out data init vision text tokenizer device compile workers log_every
save_every eval_every change wandb""".split()

# Data that make themselves. The second is for --vision random, at the size that UNI reads.
WORLDS = {
    "data/synthetic": (),
    "data/synthetic-224": "--train 16 --test 16 --patch-px 224 --words 0".split(),
}


def boolean(word):
    """Parse true or false."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def parse(argv):
    """Turn a command line into a Config: defaults, then the preset, then the flags."""
    form = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    usage = "torchrun train.py [--flag value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, **form)
    # Take the help of a flag from the comment behind its field.
    source = {line.split(":")[0].strip(): line for line in inspect.getsource(Config).split("\n")}
    # Show the values of the preset that is asked for.
    shown = PRESETS.get(argv[argv.index("--preset") + 1], {}) if "--preset" in argv[:-1] else {}
    for f in dataclasses.fields(Config):
        flags = {f"--{f.name}", f"--{f.name.replace('_', '-')}"}
        kind, reason = boolean if f.type is bool else f.type, source[f.name].partition("#")[2]
        help_ = f"{reason} ({shown.get(f.name, f.default)})"
        parser.add_argument(*flags, type=kind, default=argparse.SUPPRESS, help=help_)
    given = parser.parse_args(argv)
    preset = getattr(given, "preset", "synthetic")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    values = PRESETS[preset] | {"preset": preset}
    if preset == "paper" and getattr(given, "vision", "") == "random":
        values["data"] = "data/synthetic-224"
    if not torch.cuda.is_available():
        values["compile"] = False
    return check(Config(**{**values, **vars(given)}))


def check(cfg):
    """Refuse settings that cannot work; return cfg."""
    counts = "steps bags accumulate k_o keywords log_every save_every".split()
    bare = cfg.preset == "paper" and cfg.vision != "random" and not (cfg.vision and cfg.text)
    files = "--vision FILE (MahmoodLab/UNI) and --text FILE (wisdomik/QuiltNet-B-32)"
    for wrong, sentence in (
        (min(getattr(cfg, k) for k in counts) < 1, f"{', '.join(counts)} are >= 1"),
        (cfg.seed < 0, "--seed is 0 or more"),
        (cfg.pairs <= 0, "--pairs is more than 0: patches of a bag that ITM, MLM and PLM read"),
        (cfg.size not in networks.SIZES, f"--size {cfg.size}: it is one of {[*networks.SIZES]}"),
        (cfg.children not in (1, 2, 4), f"--children is 1, 2 or 4, not {cfg.children}"),
        (cfg.negatives not in ("bag", "batch"), f"--negatives is bag or batch: {cfg.negatives}"),
        (not 0 <= cfg.missing <= 1, f"--missing is a share of the patches, not {cfg.missing}"),
        (bare, f"the paper preset needs {files}; --vision random tries it without"),
        (cfg.text and not cfg.tokenizer, "--text needs --tokenizer bpe_simple_vocab_16e6.txt.gz"),
        (cfg.cache and not cfg.freeze_vision, "--cache needs --freeze_vision true"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(sentence)
    return cfg


# ---- Model, optimiser, checkpoint ----------------------------------------------------------------


def choose_tokenizer(cfg, bags, captions, init):
    """Return the tokenizer of words.pt, that of CLIP, or one learnt from the captions."""
    if init:
        return text.Tokenizer(init["tokenizer"])
    if cfg.tokenizer:
        return text.Tokenizer.from_clip(cfg.tokenizer)
    some = (c for key in bags.keys[:5000] for c in captions[key] if c)
    return text.Tokenizer.train(some, 1500)


def read_words(cfg):
    """Read what prepare.words learned -> {"tokenizer", "model"}; None if there is no such file."""
    path = Path(cfg.init or Path(cfg.data) / "words.pt")
    if cfg.text or cfg.init == "none" or not (cfg.init or path.exists()):
        return None
    try:
        words = torch.load(path, map_location="cpu", weights_only=True)
        return {"tokenizer": words["tokenizer"], "model": words["model"]}
    except Exception as e:  # a wrong file raises almost anything
        raise ValueError(f"{path} is no file of prepare.words ({type(e).__name__})") from e


def build_model(cfg, tokenizer, init=None):
    """Build the MRPLIP of cfg.size, with public weights or those of prepare.words in it."""
    torch.manual_seed(cfg.seed)
    model = networks.MRPLIP(tokenizer.size, tokenizer.end, **networks.SIZES[cfg.size])
    if cfg.vision not in ("", "random"):
        networks.adopt_vision(model, cfg.vision)
    if cfg.text:
        networks.adopt_text(model, cfg.text)
    if init:
        try:
            model.load_state_dict(init["model"], strict=False)
        except RuntimeError as e:
            raise ValueError(f"words.pt is not of --size {cfg.size}: take --init none") from e
    return model


def freeze(vision, device):
    """Stop a tower from learning; on a GPU store its matrices in bf16, to cast them only once."""
    vision.requires_grad_(False).eval()
    for module in vision.modules():
        if device == "cuda" and isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)


def make_optimizer(objective, cfg):
    """Build AdamW: towers have their own rate; vectors, temperatures, positions no decay."""
    groups = {}
    for name, p in objective.named_parameters():
        factor, decay = 1.0, cfg.weight_decay
        if name.startswith("model.vision."):
            factor = cfg.lr_vision
        if name.startswith("model.text."):
            factor = cfg.lr_text
        if p.ndim < 2 or name.endswith(("pos_embed", "cls_token", "positional_embedding", "kind")):
            decay = 0.0
        if p.requires_grad:
            group = dict(params=[], factor=factor, weight_decay=decay)
            groups.setdefault((factor, decay), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=cfg.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(step, cfg):
    """Warm up linearly, then follow a cosine from lr to lr / 100 at the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(folder, objective, optimizer, tokenizer, step, cfg):
    """Write ckpt.pt whole or not at all, and keep the one before as ckpt_prev.pt."""
    new, old, fresh = (folder / f"ckpt{x}.pt" for x in ("", "_prev", "_new"))
    # Heads are what only training needs, also those of a loss of your own.
    heads = {k: x for k, x in objective.state_dict().items() if not k.startswith("model.")}
    state = {"model": objective.model.state_dict(), "heads": heads}
    state |= {"optimizer": optimizer.state_dict(), "step": step, "config": vars(cfg)}
    state["tokenizer"] = tokenizer.merges
    data.write_whole(fresh, lambda file: torch.save(state, file))
    if new.exists():
        os.replace(new, old)
    os.replace(fresh, new)


def resume(state, path, objective, optimizer, cfg):
    """Load a checkpoint -> its step; refuse other settings than its own, unless cfg.change."""
    was, now = state["config"], vars(cfg)
    other = [k for k in now if k not in MAY_CHANGE and was.get(k) != now[k]]
    if other and not cfg.change:
        said = ", ".join(f"{k} {was.get(k)} -> {now[k]}" for k in other)
        remedy = "use them again, or another --out, or --change true to go on with the new ones"
        raise ValueError(f"{path} was trained with other settings ({said}): {remedy}")
    wanted = [(group["factor"], group["weight_decay"]) for group in optimizer.param_groups]
    try:
        model = {f"model.{k}": x for k, x in state["model"].items()}
        objective.load_state_dict(model | state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit these settings ({reason}): use another --out") from e
    for group, (factor, decay) in zip(optimizer.param_groups, wanted, strict=True):
        group["factor"], group["weight_decay"] = factor, decay
    return state["step"]


# ---- Small parts of the loop ---------------------------------------------------------------------


def nothing(*_):
    """Do nothing, in place of a call that only some processes make."""


def ask_system(cfg):
    """Ask the system for what a run needs; where it is no Linux, go without."""
    # Loaders hand over each tensor by a file handle.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A process whose torchrun is gone would train on as an orphan.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        data.end_with_parent(signal.SIGTERM)
    # Keep what large tensors leave: a CPU pays a tenth of a step for fresh pages.
    if cfg.device == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_loaders(batch, cfg):
    """Refuse loaders that the system gives too little: they would wait for ever."""
    ahead = 4 * cfg.workers  # batches
    # Each tensor that waits is an open file, and so are some other things.
    files, most = ahead * len(batch) + 64, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if ahead and 0 <= most < files:
        remedy = "raise it (ulimit -n), or lower --workers"
        raise ValueError(f"loaders need {files} open files, the system allows {most}: {remedy}")
    need = ahead * sum(x.nbytes for x in batch.values())
    need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if need > room:
        sizes = f"/dev/shm has room for {room / 1e6:.0f} MB, loaders need {need / 1e6:.0f}"
        raise ValueError(f"{sizes}: enlarge it (docker run --shm-size), or lower --workers")


def matmul_rate(device):
    """Measure the FLOP/s of a large matrix product here, which MFU compares a step with."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else nothing
    a, best = torch.rand(n, n, device=device, dtype=dtype), 0.0
    for _ in range(20 if device == "cuda" else 5):
        wait()
        before = time.perf_counter()
        a @ a
        wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - before))
    return best


def count_flops(objective, batch, autocast):
    """Count the FLOPs of a step, forward and backward, without changing the networks."""
    objective.eval()
    with FlopCounterMode(display=False) as counter:
        with autocast:
            parts, _ = objective(batch)
        if not parts:
            raise ValueError("all losses have weight 0: nothing is learned")
        sum(parts.values()).backward()
    objective.zero_grad(set_to_none=True)
    objective.train()
    return counter.get_total_flops()


@torch.no_grad()
def validate(objective, batches, device, autocast):
    """Average each loss over at most four held-out batches -> {name: float}.

    Keywords come from the own captions, so that the numbers compare over the whole run.
    """
    objective.eval()
    total, n = 0, min(4, max(1, len(batches.bags) // batches.cfg.bags))
    for i in range(n):
        batch = data.to_device(batches[i], batches.cfg, device)
        batch["free"] = ~batch["told"]
        with autocast:
            parts, _ = objective(batch)
        total = total + torch.stack([*parts.values()]) / n
    objective.train()
    return dict(zip(parts, losses.all_mean(total).tolist(), strict=True))


def open_log(run, cfg):
    """Open log.jsonl, and Weights & Biases if asked for -> functions (write a row, close)."""
    file, tracker = open(run / "log.jsonl", "a+", buffering=1), None
    file.seek(max(0, file.tell() - 1))
    file.write("\n" if file.read(1) not in ("", "\n") else "")  # end a line that a kill cut off
    if cfg.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs its package: pip install wandb") from None
        # The same run goes on there as here.
        if not (run / "wandb_id").exists():
            data.write_whole(run / "wandb_id", secrets.token_hex(8))
        more = dict(id=(run / "wandb_id").read_text(), resume="allow", config=vars(cfg))
        try:
            tracker = wandb.init(project=cfg.wandb, name=run.name, **more)
        except Exception as e:
            remedy = "log in by `wandb login`, or set WANDB_MODE=offline"
            raise ValueError(f"Weights & Biases does not start ({e!r}): {remedy}") from e

    def write(row):
        file.write(json.dumps(row) + "\n")
        if tracker:
            tracker.log(row, step=row["step"])

    return write, tracker.finish if tracker else nothing


def make_world(folder):
    """Let prepare.world make the built-in data, in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "prepare.world", folder, *WORLDS[folder]]
    if subprocess.run(command, env=env | {"PYTHONPATH": os.path.dirname(__file__)}).returncode:
        raise ValueError(f"{folder} was not made, see above: the same command continues")


# ---- The run -------------------------------------------------------------------------------------


def main(argv):
    """Settings -> processes -> data -> model -> loop -> checkpoint -> evaluation."""
    cfg = parse(argv)

    # Processes: torchrun numbers them. Without it this is the only one, and the same code runs.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    device, run, folder = cfg.device, Path(cfg.out), Path(cfg.data)
    share = cfg.bags / (cfg.accumulate * world)
    if share % 1 or (world > 1 and cfg.pairs * share % 1):
        parts = f"{world} processes x {cfg.accumulate} micro-batches"
        what = f"--bags {cfg.bags}" if share % 1 else f"--pairs {cfg.pairs} x --bags {cfg.bags}"
        raise ValueError(f"{what} cannot be split over {parts}: use a multiple")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 remains
    ask_system(cfg)
    if world > 1:
        # The time-out must outlast rank 0 making the data.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    barrier = dist.barrier if world > 1 else nothing
    say = tqdm.write if rank == 0 else nothing
    if rank == 0:
        held = data.lock(run)  # noqa: F841, until this process ends
        (run / "finished").unlink(missing_ok=True)
    changed = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default]
    say("settings: " + " ".join(f"--{name} {getattr(cfg, name)}" for name in changed))

    # Data. Rank 0 makes the built-in world while the others wait.
    if rank == 0 and cfg.data in WORLDS and not (folder / "classes.json").exists():
        make_world(cfg.data)
    barrier()
    bags, captions = data.Bags(folder / "train"), text.Captions(folder / "train")
    if rank == 0:
        data.count_keywords(bags, captions, cfg.missing)
    barrier()
    corpus = data.count_keywords(bags, captions, cfg.missing)
    if cfg.eval_every:  # look now, not after three days
        test, test_captions = data.Bags(folder / "test"), text.Captions(folder / "test")
        evaluate.checked_questions(test, evaluate.spread(test, 300), bags)

    # Model: from a checkpoint, else with what prepare.words or public files have learnt.
    state, path = evaluate.read_checkpoint(run, device)
    init = None if state else read_words(cfg)
    if rank == 0 and not state:
        tokenizer = choose_tokenizer(cfg, bags, captions, init)
        data.write_whole(run / "tokenizer.json", tokenizer.to_json())
    barrier()
    # A checkpoint holds its tokenizer, whatever became of the file.
    file = run / "tokenizer.json"
    tokenizer = text.Tokenizer(state["tokenizer"]) if state else text.Tokenizer.load(file)
    # A checkpoint holds the public weights: their files are not needed again, but to name a cache.
    source = dataclasses.replace(cfg, vision="", text="") if state and not cfg.cache else cfg
    model = build_model(source, tokenizer, init)
    if model.vision.size != bags.S:
        remedy = f"tile with --patch-px {model.vision.size}, which --size {cfg.size} reads"
        raise ValueError(f"{bags.folder} holds patches of {bags.S} px: {remedy}")
    objective, step = losses.Objective(model, cfg).to(device), 0
    name = networks.features_name(model) if cfg.cache else ""
    if cfg.freeze_vision:
        freeze(model.vision, device)
    optimizer = make_optimizer(objective, cfg)
    if state:
        step = resume(state, path, objective, optimizer, cfg)
        if rank == 0 and path.name == "ckpt_prev.pt" and (run / "ckpt.pt").exists():
            os.replace(run / "ckpt.pt", run / "ckpt_damaged.pt")  # or a save would keep this one
        state = None  # or it would stay on the device
        say(f"continuing {run} at step {step} of {cfg.steps}")

    # Loader: batch i is a function of i, so the sampler is just the numbers that are left.
    more = (tokenizer, corpus, cfg, model.text.context, rank, world)
    batches = data.Batches(bags, captions, *more)
    held_out = data.Batches(test, test_captions, *more) if cfg.eval_every else batches
    if cfg.cache:
        batches.features = data.open_features(bags, name)
        held_out.features = data.open_features(held_out.bags, name)
    left = range(step * cfg.accumulate, len(batches))
    loader = DataLoader(
        batches, batch_size=None, sampler=left, num_workers=cfg.workers, worker_init_fn=data.settle,
        pin_memory=device == "cuda", prefetch_factor=4 if cfg.workers else None,
        timeout=900 if cfg.workers else 0,
    )  # fmt: skip
    batch = batches[0]
    check_loaders(batch, cfg)
    loader = iter(loader)

    # Measure the work of a step; then compile it, and wrap it for many processes.
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    objective.train()
    flops = count_flops(objective, data.to_device(batch, cfg, device), autocast)
    flops, rate = flops * cfg.accumulate * world, matmul_rate(device) * world
    forward = torch.compile(objective, dynamic=False, fullgraph=True) if cfg.compile else objective
    if world > 1:
        torch._dynamo.config.optimize_ddp = False  # it would split the graph
        forward = DistributedDataParallel(
            forward, broadcast_buffers=False, gradient_as_bucket_view=True,
            static_graph=cfg.accumulate == 1, find_unused_parameters=cfg.accumulate > 1,
        )  # fmt: skip
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    say(f"{len(bags)} bags of 85 patches of {bags.S} px; {trained / 1e6:.1f}M parameters train")
    if corpus["untold"]:
        say(f"{corpus['untold']} of {corpus['valid']} patches have no caption")
    say(f"{world} x {device}, multiplying matrices at {rate / world / 1e12:.2f} TFLOP/s each")

    # A signal only raises a flag. The loop stops after the step, so nothing is half done.
    stop, signals = [], [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    # nohup ignores a closed terminal, but torchrun hands it on.
    if "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    usual = [signal.signal(name, lambda *_: stop.append(True)) for name in signals]
    if rank == 0:
        data.write_whole(run / "config.json", json.dumps(vars(cfg), indent=1))
        data.write_whole(run / "keywords.json", json.dumps(corpus["common"]))
        (log, close_log), warned = open_log(run, cfg), set()
        begun = {"started": time.strftime("%F %T"), "step": step, "world": world}
        here = shlex.quote(os.path.dirname(__file__))
        begun["commit"] = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>&-")
        log(begun | {"torch": torch.__version__, "config": vars(cfg)})
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=None if rank == 0 else True)
    sums, used, since, start, halt = 0, 0, time.time(), step, False
    while step < cfg.steps and not halt:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["factor"]

        # forward, backward, update
        values = 0
        for micro in range(cfg.accumulate):
            batch = data.to_device(next(loader), cfg, device)
            sync = micro == cfg.accumulate - 1 or world == 1
            with contextlib.nullcontext() if sync else forward.no_sync():
                with autocast:
                    parts, monitors = forward(batch)
                loss = sum(getattr(cfg, name) * part for name, part in parts.items())
                (loss / cfg.accumulate).backward()
            found = torch.stack([loss, *parts.values(), *monitors.values()]).detach()
            values = values + found / cfg.accumulate
        norm = nn.utils.clip_grad_norm_(objective.parameters(), cfg.clip)
        # Fused AdamW skips a step if found_inf is 1: no wait for the device, no bad weights.
        good = norm.isfinite()
        optimizer.found_inf = (~good).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for scale in (model.itc_scale, model.cvta_scale):
            scale.data.clamp_(-math.log(losses.TAU[1]), -math.log(losses.TAU[0]))
        sums, used = sums + torch.where(good, values, 0), used + good
        step += 1
        bar.update()

        # Stop together: all processes hear of a signal that one of them got.
        halt = networks.all_sum(torch.tensor(len(stop))).item() > 0

        # Log. Between logs the loop never waits for the device.
        if step % cfg.log_every == 0 or step == cfg.steps:
            mean = losses.all_mean(sums / used).tolist()
            mean = dict(zip(("loss", *parts, *monitors), mean, strict=True))
            speed = (step - start) / (time.time() - since)
            # A busy machine may have measured too low a limit.
            if speed * flops > rate:
                rate = max(matmul_rate(device) * world, speed * flops)
            row = {"step": step, **mean, "grad": norm.item(), "lr": learning_rate(step - 1, cfg)}
            row |= {"bags_per_s": speed * cfg.bags, "mfu": speed * flops / rate}
            row |= {"skipped": step - start - int(used)}
            each = " ".join(f"{name} {mean[name]:.2f}" for name in parts)
            each = each.replace(" 0.", " .").replace(" -0.", " -.")
            minutes = (cfg.steps - step) / speed / 60
            eta = f"{minutes:.0f}m" if minutes < 120 else f"{minutes / 60:.0f}h"
            rates = f"{row['bags_per_s']:.3g} bags/s MFU {row['mfu']:.0%} ETA {eta}"
            say(f"{step:5d} loss {mean['loss']:.1f} {each} | {rates}")
            if rank == 0:
                log(row)
                for fault in losses.find_faults(mean) if step > cfg.warmup else ():
                    if fault not in warned:
                        warned.add(fault)
                        say(f"warning at step {step}: {fault}")
            if not math.isfinite(mean["loss"]):
                remedy = f"continue with --change true and a lower --lr than {cfg.lr}"
                raise ValueError(f"no step up to {step} had a finite loss since {start}: {remedy}")
            sums, used, since, start = 0, 0, time.time(), step

        # Validate on held-out bags.
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            pause = time.time()
            found = validate(objective, held_out, device, autocast)
            found = {f"val_{name}": x for name, x in found.items()}
            if rank == 0:
                found |= evaluate.glance(model.eval(), tokenizer, test, bags, device)
                objective.train()
                log({"step": step, **found})
                some = {k: x for k, x in found.items() if "merged" in k or "retrieval" in k}
                say("held out: " + " ".join(f"{k} {x:.2f}" for k, x in some.items()))
            since += time.time() - pause

        if rank == 0 and (step % cfg.save_every == 0 or step == cfg.steps or halt):
            save_checkpoint(run, objective, optimizer, tokenizer, step, cfg)

    bar.close()
    for name, handler in zip(signals, usual, strict=True):
        signal.signal(name, handler)
    del loader, forward  # DDP holds on to the process group
    if halt:
        say(f"stopped at step {step} of {cfg.steps}; the same command continues")
    elif rank == 0:
        if cfg.eval_every:
            evaluate.measure(run, folder, device, learn=False)
            say(f"python evaluate.py {run} also fits a linear probe, if classes are known")
        data.write_whole(run / "finished", str(step))
    if rank == 0:
        close_log()
    barrier()  # a process that leaves early could hang the others
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    # Before and after the loop all files are whole, so a signal may end the process at once.
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda *_: os._exit(0))
    code = 1
    try:
        main(sys.argv[1:])
        code = 0
    except (ValueError, OSError) as e:
        # A loader's error carries its traceback before its own line.
        sentence = str(e).strip().splitlines()[-1].removeprefix("ValueError: ")
        print(f"error: {sentence}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        code = 0
    except Exception:
        traceback.print_exc()
    # Leave at once: a tidy end waits for loaders, and for processes that wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
