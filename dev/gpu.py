"""Measure the paper preset on one GPU, row by row.

    python -m dev.gpu prepare        # on any machine: write batches and the CPU's losses to gpu.pt
    python -m dev.gpu                # on the GPU: read them and run all stages in this order
    python -m dev.gpu step profile   # or only these

    step        a step, compiled and eager: speed, share of the rate of large matrix products (MFU),
                memory; 20 steps of several lengths; losses beside the CPU's
    vision      ViT-L/16 forward, MFU (goal .75)
    trained     ViT-L/16 forward, backward and AdamW, MFU (goal .60)
    cached      features once, then the step on them
    loader      the share of time that the step waits for loader processes
    profile     what takes above 3 % of a step and is no matrix product
    all_tokens  the step with all patch tokens in the fusion; 8 bags, since 16 need more than 80 GB
    tests       tests of losses, objective, networks
    default     the default run on --data

Precision is the loop's. A stage that fails is told as a row, and the next one starts. --tiny takes
small networks, to try this file on a CPU.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader

from dev import gpu_parts as parts
from dev.gpu_parts import (
    ARGS,
    DEVICE,
    FILE,
    GPU,
    ROOT,
    ROUNDS,
    Prepared,
    Step,
    autocast,
    compiled,
    count_flops,
    data,
    mfu,
    networks,
    read,
    row,
    seconds,
    train,
)

PRODUCTS = ("gemm", "cutlass", "xmma", "wgmma", "nvjet", "mm", "flash", "attention", "conv")


@functools.cache
def usual():
    """Return the compiled step that several stages use."""
    return Step("whole")


def step():
    """Measure a step, its graphs and its losses."""
    attempt("step, compiled", lambda: usual().measure("step, compiled", read("whole")[0]))
    attempt("step, eager", lambda: Step("whole", False).measure("step, eager", read("whole")[0]))
    # Count the graphs that batches of other lengths make: one should serve all.
    graphs = torch._dynamo.utils.counters["stats"]
    before, batches = graphs["unique_graphs"], read("whole")
    for i in range(ROUNDS):
        usual()(batches[i % len(batches)])
    new = graphs["unique_graphs"] - before
    row("several lengths", f"{ROUNDS} steps, {new} new graphs (goal 0)")
    # Train for three steps from the same weights, here and where `prepare` ran.
    for compile in (True, False):
        again = Step("curve", compile)
        told = [f"{again(batch).item():.3f}" for batch in read("curve")]
        row("losses, " + ("compiled" if compile else "eager"), *told)
    row("losses, CPU", *[f"{x:.3f}" for x in FILE["losses"]])


def vision(trained=False):
    """Measure the vision tower alone."""
    vit = Step("whole", False).model.vision
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

    flops = count_flops(lambda: once(vit))
    run, name = compiled(vit), "ViT-L, trained" if trained else "ViT-L, forward"
    row(name, f"{len(images)} images", mfu(flops, seconds(lambda: once(run))))


def cached():
    """Measure how features are computed, and the step on them."""
    one, batch = Step("whole"), read("whole")[0]
    see = compiled(one.model.vision_tokens)
    with torch.no_grad(), autocast():
        patches = data.pyramid(batch["pixels"], batch["nodes"])
        time_ = seconds(lambda: [see(x) for x in patches])
        tokens = torch.stack([see(x) for x in patches]).half()
    row("features, once", f"{len(patches) / time_:.2f} bags/s")
    batch = {k: x for k, x in batch.items() if k not in ("pixels", "flips", "stain")}
    one.measure("step, cached features", batch | {"tokens": tokens})


def loader():
    """Measure the wait for loader processes."""
    kept, workers = Prepared(FILE["whole"], 20 if GPU else 2), 8 if GPU else 1
    more = dict(num_workers=workers, pin_memory=GPU, prefetch_factor=4)
    share = parts.share_of_waiting(DataLoader(kept, batch_size=None, **more), usual())
    row("waiting for data", f"{share:.1%} of the time with {workers} loader processes")


def profile():
    """List what takes above 3 % of a step and is no matrix product."""
    usual()(read("whole")[0])
    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        usual()(read("whole")[0]).item()
    key = "self_device_time_total" if GPU else "self_cpu_time_total"
    times = {event.key: getattr(event, key) for event in found.key_averages()}
    total, products = sum(times.values()), 0.0
    for name in sorted(times, key=times.get, reverse=True):
        # Name what is no matrix product and takes more than 3 %.
        if any(word in name.lower() for word in PRODUCTS):
            products += times[name]
        elif times[name] > 0.03 * total:
            row("no matrix product", f"{times[name] / total:5.1%}", name[:120])
    row("matrix products", f"{products / total:5.1%}")


def all_tokens():
    """Measure the step without pooling of the patch tokens."""
    usual_size = networks.SIZES["paper"]
    networks.SIZES["paper"] = dict(usual_size, fusion=dict(usual_size["fusion"], pool=0))
    attempt("all tokens", lambda: Step("half").measure("all tokens", read("half")[0]))
    networks.SIZES["paper"] = usual_size


def tests():
    """Run the tests of the chapters that compute."""
    files = [f"tests/test_{x}.py" for x in ("losses", "objective", "model", "cuda")]
    command = [sys.executable, "-m", "pytest", "-q", *files[: 1 if ARGS.tiny else 4]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row("tests", (done.stdout + done.stderr).strip().splitlines()[-1])


def default():
    """Time the default run."""
    few = "--steps 2 --init none --bags 2 --eval_every 0".split() if ARGS.tiny else []
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        train.main(["--data", ARGS.data, "--out", out, "--workers", "4", *few])
        row("default run", f"{time.perf_counter() - start:.0f} s")


def attempt(name, call):
    """Call, and tell as a row what went wrong."""
    try:
        call()
    except torch.OutOfMemoryError:
        row(name, "out of memory")
    except Exception as e:
        row(name, f"failed: {type(e).__name__}: {str(e).strip()[:200]!r}")
    if GPU:
        torch.cuda.empty_cache()


STAGES = {
    "step": step,
    "vision": vision,
    "trained": lambda: vision(trained=True),
    "cached": cached,
    "loader": loader,
    "profile": profile,
    "all_tokens": all_tokens,
    "tests": tests,
    "default": default,
}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--file", "--out", default="gpu.pt", help="what prepare writes")
    parser.add_argument("--data", default="data/synthetic", help="shards of the default run")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try this file")
    parser.parse_args(namespace=ARGS)
    unknown = set(ARGS.stages) - {"prepare", *STAGES}
    if unknown:
        sys.exit(f"error: unknown stage {unknown.pop()}; there are prepare, {', '.join(STAGES)}")
    parts.begin()
    if ARGS.stages == ["prepare"]:
        parts.prepare()
        return
    FILE.update(torch.load(ARGS.file, weights_only=True))
    for name in ARGS.stages or STAGES:
        attempt(name, STAGES[name])


if __name__ == "__main__":
    main()
