"""Measure the paper preset on one GPU, row by row.

    python -m dev.gpu prepare         # on any machine: make the data, to take along
    python -m dev.gpu                 # on the GPU: all stages in this order
    python -m dev.gpu step profile    # or only these
    python -m dev.gpu --tiny          # small networks, to try this file on a CPU

    prepare     --paper and --data, where they are missing: only this needs tifffile and imagecodecs
    step        a step, compiled and eager: speed, share of the rate of large matrix products (MFU),
                memory; steps of several lengths; losses beside those of the CPU
    vision      ViT-L/16 forward, MFU (goal .75)
    trained     ViT-L/16 forward, backward and AdamW, MFU (goal .60)
    cached      features once, then the step on them
    loader      the share of time that the step waits for loader processes
    profile     what takes above 3 % of a step and is no matrix product
    all_tokens  the step with all patch tokens in the fusion; 8 bags, since 16 need more than 80 GB
    tests       tests of losses, objective, networks
    default     the default run on --data

Precision is the loop's. A stage that fails is told as a row, and the next one starts.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import model as networks
import text
import train

GPU = torch.cuda.is_available()
DEVICE, ROUNDS = ("cuda", 20) if GPU else ("cpu", 2)
ARGS = argparse.Namespace(tiny=False)  # the command line
# Words in the names of kernels that multiply matrices.
KERNELS = ("gemm", "cutlass", "xmma", "wgmma", "nvjet", "mm", "flash", "attention", "conv")


# ---- Rows and clocks -----------------------------------------------------------------------------
def row(name, *told):
    """Print a row at once: a later stage may not come to its end."""
    print(f"{name:33}", *told, sep=" | ", flush=True)


def attempt(name, call):
    """Call, and tell as a row what went wrong."""
    try:
        call()
    except torch.OutOfMemoryError:
        row(name, "out of memory")
    except Exception as e:
        row(name, f"failed: {type(e).__name__}: {str(e).strip()[:200]!r}")
    torch.cuda.empty_cache()


def clock(call):
    """Return the seconds that a call takes, on the GPU too."""
    wait = torch.cuda.synchronize if GPU else train.nothing
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def products():
    """Return the FLOP/s of large matrix products, bf16 on a GPU."""
    return train.matmul_rate(DEVICE)


def measure(name, call, work, limit=products):
    """Time a call and its limit in turn, print a row -> median seconds of the call.

    limit: a function that measures what the machine does a second; work: of the call, in that unit.
    The share is the median of the ratio in each round: other users of the machine slow both.
    """
    call()
    times, shares = [], []
    for _ in range(1 if ARGS.tiny else ROUNDS):
        times.append(clock(call))
        shares.append(work / times[-1] / limit())
    took, share = statistics.median(times), statistics.median(shares)
    best = f"{limit.__name__.replace('_', ' ')}, {work / took / share:.3g} a second"
    row(name, f"{1000 * took:9.1f} ms", f"{share:.3f} of {best}")
    return took


def count_flops(call):
    """Count the FLOPs of a call. On a CPU the counter sees attention only as plain products."""
    plain = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain:
        call()
    return counter.get_total_flops()


# ---- Batches and a step of the paper preset ------------------------------------------------------
def prepare():
    """Make the built-in data that are missing."""
    for folder in {ARGS.paper, ARGS.data} & set(train.WORLDS):
        if not Path(folder, "classes.json").exists():
            train.make_world(folder)


def load(*flags):
    """Open --paper with flags of train.py -> data.Batches of the paper preset."""
    if not Path(ARGS.paper).exists():
        prepare()
    size = "synthetic" if ARGS.tiny else "paper"
    flags = ["--vision", "random", "--size", size, "--device", DEVICE, *map(str, flags)]
    cfg = train.parse(["--preset", "paper", *flags])
    bags, captions = data.Bags(f"{ARGS.paper}/train"), text.Captions(f"{ARGS.paper}/train")
    words = train.choose_tokenizer(cfg, bags, captions, None)
    corpus = data.count_keywords(bags, captions)
    context = networks.SIZES[size]["text"]["context"]
    batches = data.Batches(bags, captions, words, corpus, cfg, context)
    # Do as on a GPU and with many bags: augment on the device, decode each bag anew.
    batches.augments = batches.keep = False
    return batches


def on_device(batch):
    """Copy a batch to the device, as it leaves the loader."""
    return {name: x.to(DEVICE) for name, x in batch.items()}


def autocast(device=DEVICE):
    """Return the loop's autocast."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def compiled(module):
    """Compile as the loop does; at tiny size without code of its own, which takes a CPU minutes."""
    backend = "eager" if ARGS.tiny else "inductor"
    return torch.compile(module, backend=backend, dynamic=False, fullgraph=True)


class Step:
    """Hold the networks for some data.Batches, and their optimiser; called with a batch: a step."""

    def __init__(self, batches, compile=False, device=DEVICE):
        self.cfg = dataclasses.replace(batches.cfg, compile=compile, device=device)
        self.model = train.build_model(self.cfg, batches.tokenizer)
        self.objective = losses.Objective(self.model, self.cfg).to(device)
        train.freeze(self.model.vision, device)
        self.optimizer = train.make_optimizer(self.objective, self.cfg)
        self.run = compiled(self.objective) if compile else self.objective

    def __call__(self, batch):
        batch = data.to_device(batch, self.cfg, self.cfg.device)
        with autocast(self.cfg.device):
            parts, _ = self.run(batch)
        loss = sum(parts.values())
        # Backward and update, with the guard against steps that are not finite.
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.cfg.clip)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def measure(self, name, batch):
        """Print rows about steps on one batch."""
        work = train.count_flops(
            self.objective, data.to_device(batch, self.cfg, DEVICE), autocast()
        )
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        # Time the first step alone: it compiles.
        first, B = clock(lambda: self(batch)), len(batch["bag"])
        speed = B / measure(name, lambda: self(batch), work)
        memory = torch.cuda.max_memory_allocated() / 1e9
        row("", f"{B} bags, {speed:.2f} bags/s", f"{memory:.1f} GB", f"first step {first:.0f} s")

    def share_of_waiting(self, batches):
        """Print the share of the time that steps on batches of loader processes wait for them."""
        workers = 8 if GPU else 1
        more = dict(num_workers=workers, worker_init_fn=data.settle, pin_memory=GPU)
        coming = iter(DataLoader(batches, batch_size=None, prefetch_factor=4, **more))
        # Do not count the start of the processes.
        self(next(coming))
        waited = worked = 0.0
        for _ in range(len(batches) - 1):
            begin = time.perf_counter()
            batch = next(coming)
            waited += time.perf_counter() - begin
            worked += clock(functools.partial(self, batch))
        share = waited / (waited + worked)
        row("waiting for data", f"{share:.1%} of the time with {workers} loader processes")


# ---- Stages --------------------------------------------------------------------------------------
@functools.cache
def batches(share=1):
    """Return batches of 16 bags of 85 nodes, or of a share of these bags."""
    bags, children = (4, 2) if ARGS.tiny else (16, 4)
    steps = 60 if GPU else 3
    return load("--bags", int(share * bags), "--children", children, "--steps", steps)


@functools.cache
def some():
    """Return three batches, the second with captions as long as they can be."""
    found = [on_device(batches()[i]) for i in range(3)]
    T = found[1]["ids"].shape[2]
    found[1]["ids"] = F.pad(found[1]["ids"], (0, batches().context - T))
    return found


@functools.cache
def usual():
    """Return the compiled step that several stages use."""
    return Step(batches(), compile=True)


def step():
    """Measure a step, its graphs and its losses."""
    attempt("step, compiled", lambda: usual().measure("step, compiled", some()[0]))
    attempt("step, eager", lambda: Step(batches()).measure("step, eager", some()[0]))
    # Count the graphs that batches of other lengths make: one should serve all.
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for i in range(ROUNDS):
        usual()(some()[i % 3])
    new = graphs["unique_graphs"] - before
    row("several lengths", f"{ROUNDS} steps, {new} new graphs (goal 0)")
    # Train for three steps from the same weights.
    few = load("--bags", 2, "--children", 1)
    for how in ("compiled", "eager", "CPU"):
        again = Step(few, how == "compiled", "cpu" if how == "CPU" else DEVICE)
        row(f"losses, {how}", *[f"{again(few[i]).item():.3f}" for i in range(3)])


def vision(trained=False):
    """Measure the vision tower alone."""
    vit = Step(batches()).model.vision
    images = torch.rand(256 if GPU else 2, 3, vit.size, vit.size, device=DEVICE)
    if trained:
        vit.float().requires_grad_().train()
        optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-5, fused=True)

    def once(run):
        with autocast(), torch.set_grad_enabled(trained):
            y = run(images)
        if trained:
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    flops, run = count_flops(lambda: once(vit)), compiled(vit)
    name = f"ViT-L, {'trained' if trained else 'forward'}, {len(images)} images"
    measure(name, lambda: once(run), flops)


def cached():
    """Measure how features are computed, and the step on them."""
    one, batch = Step(batches(), compile=True), some()[0]
    see = compiled(one.model.vision_tokens)
    with torch.no_grad(), autocast():
        patches = data.pyramid(batch["pixels"], batch["nodes"])
        tokens = torch.stack([see(x) for x in patches]).half()
        time_ = statistics.median(clock(lambda: [see(x) for x in patches]) for _ in range(ROUNDS))
    row("features, once", f"{len(patches) / time_:.2f} bags/s")
    batch = {k: x for k, x in batch.items() if k not in ("pixels", "flips", "stain")}
    one.measure("step, cached features", batch | {"tokens": tokens})


def profile():
    """List what takes above 3 % of a step and is no matrix product."""
    usual()(some()[0])
    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        usual()(some()[0]).item()
    key = "self_device_time_total" if GPU else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in found.key_averages()}
    total, multiplied = sum(times.values()), 0.0
    for name in sorted(times, key=times.get, reverse=True):
        if any(word in name.lower() for word in KERNELS):
            multiplied += times[name]
        elif times[name] > 0.03 * total:
            row("no matrix product", f"{times[name] / total:5.1%}", name[:120])
    row("matrix products", f"{multiplied / total:5.1%}")


def all_tokens():
    """Measure the step without pooling of the patch tokens."""
    half = batches(0.5)
    with mock.patch.dict(networks.SIZES[half.cfg.size]["fusion"], pool=0):
        Step(half, compile=True).measure("all tokens", on_device(half[0]))


def tests():
    """Run the tests of the chapters that compute."""
    files = [f"tests/test_{x}.py" for x in ("losses", "objective", "model")]
    command = [sys.executable, "-m", "pytest", *files[: 1 if ARGS.tiny else 3]]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    row("tests", (done.stdout + done.stderr).strip().splitlines()[-1])


def default():
    """Time the default run."""
    few = "--steps 2 --init none --bags 2 --eval_every 0".split() if ARGS.tiny else []
    with tempfile.TemporaryDirectory() as out:
        argv = ["--data", ARGS.data, "--out", out, "--workers", "4", *few]
        row("default run", f"{clock(lambda: train.main(argv)):.0f} s")


def main(about, stages):
    """Run stages, {name: function}, that the command line asks for."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--paper", default="data/synthetic-224", help="bags for the paper preset")
    parser.add_argument("--data", default="data/synthetic", help="data of the default run")
    parser.add_argument("--tiny", action="store_true", help="small networks; bags of 64 px")
    parser.parse_args(namespace=ARGS)
    for name in set(ARGS.stages) - set(stages):
        sys.exit(f"error: unknown stage {name}; there are {', '.join(stages)}")
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name() if GPU else "cpu"
    row("machine", card, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads")
    for name in ARGS.stages or stages:
        attempt(name, stages[name])


STAGES = {
    "prepare": prepare,
    "step": step,
    "vision": vision,
    "trained": lambda: vision(trained=True),
    "cached": cached,
    "loader": lambda: usual().share_of_waiting(batches()),
    "profile": profile,
    "all_tokens": all_tokens,
    "tests": tests,
    "default": default,
}

if __name__ == "__main__":
    main(__doc__, STAGES)
