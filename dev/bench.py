"""Measure each stage of a training step beside its limit on this machine.

    python -m dev.bench [step|data|text ...]      # minutes; seconds with --tiny, small networks

    step   the paper preset, stage by stage, with random weights: 2 bags of 15 nodes on a CPU, 16
           bags of 85 on a GPU; then whole steps, and their wait for the loader
    data   a slide tiled, beside decoding its tiles
    text   what the captions of a batch cost the loader, beside decoding its pictures

The limit of a stage is what it does most: decoding JPEG, copying, or multiplying matrices (fp32 on
a CPU, bf16 on a GPU). Calls run in turn, and a share is the median over rounds of the ratio inside
a round, so that other users of the machine slow both. timm and openslide are peers if installed.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import imagecodecs
import numpy as np
import tifffile
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

import data
import losses
import text
from dev import gpu_parts as parts
from dev.gpu_parts import ARGS, COPY, DEVICE, GPU, PRODUCTS, autocast, count_flops, on_device
from prepare import paint
from prepare.slide import Slide
from prepare.tile import tile

try:
    from timm.models.vision_transformer import VisionTransformer
except (ImportError, RuntimeError):
    VisionTransformer = None
try:
    import openslide
except ImportError:
    openslide = None

JPEG, TILES = "decoding JPEG", "decoding tiles"


@dataclass
class Stage:
    """Hold a row: a call, its limit, and its work in the limit's unit."""

    name: str
    call: Callable
    limit: str
    work: float = 1


# ---- The table ----------------------------------------------------------------------------------


def print_stages(title, limits, stages, rounds=10 if GPU else 2):
    """Run limits and stages in turn; print a row for each."""
    calls = {name: call for name, (call, _) in limits.items()}
    calls |= {stage.name: stage.call for stage in stages}
    times = {name: np.array(x) for name, x in parts.interleave(calls, rounds).items()}
    print(f"\n{title}")
    # Print how fast the machine is, then what each stage makes of it.
    for name, (_, work) in limits.items():
        took = np.median(times[name])
        speed = f"{work / took / 1e9:9.0f} G a second" if work > 1 else ""
        print(f"  {'limit: ' + name:36} {1000 * took:9.1f} ms {speed}")
    for stage in stages:
        took, best = times[stage.name], times[stage.limit]
        # Divide inside each round, before the median.
        share = np.median(best * stage.work / limits[stage.limit][1] / took)
        said = f"{1000 * np.median(took):9.1f} ms "
        said += f"{stage.work / 1e9:9.1f} GFLOP" if stage.limit == PRODUCTS else " " * 15
        print(f"  {stage.name:36} {said} {share:7.2f} of {stage.limit}")


# ---- Data and text ------------------------------------------------------------------------------


def tile_decoder(path):
    """Return a function that decodes all tiles of the finest level and keeps nothing."""
    content = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        told = (page.photometric, page.planarconfig, page.extrasamples, page.is_jfif)
    inside, outside = tifffile.tifffile.jpeg_decode_colorspace(*told)[:2]
    more = dict(tables=page.jpegtables, colorspace=inside, outcolorspace=outside)

    def decode():
        for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            imagecodecs.jpeg8_decode(content[start : start + size], **more)

    return decode


def read_with_openslide(slide, side):
    """Read the 85 patches of a parent as the usual tools do: from the best level, then resized."""
    for n in range(data.NODES):
        x, y, width = data.square(n, 0, 0, side)
        level = slide.get_best_level_for_downsample(width / 512)
        size = round(width / slide.level_downsamples[level])
        slide.read_region((x, y), level, (size, size)).convert("RGB").resize((512, 512))


def bench_data(folder):
    """Measure a slide of one parent of 4,096 px, as the paper's at 40x."""
    path = Path(folder) / "slide.svs"
    path.write_bytes(paint.paint_slide(0, 0, 4096)[0])
    stages = [Stage("tile", lambda: tile([path], tempfile.mkdtemp(dir=folder)), TILES)]
    with Slide(path, threads=1) as slide:
        read = functools.partial(slide.read, 0, 0, 4096, 4096)
        stages.append(Stage("read a bag, one thread", read, TILES))
        if openslide:
            peer = functools.partial(read_with_openslide, openslide.OpenSlide(path), 4096)
            stages.append(Stage("... its 85 patches by OpenSlide", peer, TILES))
        limits = {TILES: (tile_decoder(path), 1)}
        print_stages("data: a slide of 4,096 x 4,096 px, decoded on one core", limits, stages)


def bench_text(folder):
    """Measure what a loader does with captions, beside decoding the pictures of as many bags."""
    batches, _ = parts.paper_batches(Path(folder) / "text", parts.settings("--bags", 2), 2)
    said = [batches.captions[key] for key in batches.bags.keys[:2]]
    captions = [caption or "" for row in said for caption in row]

    def collect():
        # Make the captions new again.
        text._keywords.cache_clear()
        return [text.keyword_bag(row, batches.cfg.keywords, batches.corpus) for row in said]

    ids = functools.partial(batches.tokenizer.batch, captions, batches.context)
    calls = {"keywords, textual bags": collect, "ids of captions": ids}
    calls["a whole batch of bags seen before"] = functools.partial(batches.__getitem__, 0)
    stages = [Stage(name, call, JPEG) for name, call in calls.items()]
    limits = {JPEG: (lambda: [batches.bags[i] for i in range(2)], 1)}
    print_stages("text: 2 bags of 85 captions", limits, stages)


# ---- The step -----------------------------------------------------------------------------------


def fresh(x):
    """Cut a tensor off the graph that a step has used up."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def repeat(calls):
    """Run calls forward, and backward where they learn."""
    with autocast():
        out = tree_leaves([call() for call in calls])
    loss = sum(y.float().mean() for y in out if y.requires_grad)
    if torch.is_tensor(loss):
        loss.backward()


def network_calls(networks, batch):
    """Take a step and note the arguments of its calls -> {stage: repeat these calls}."""
    model, kept = networks.model, {}
    places = {
        "vision, frozen": [(model, "vision_tokens")],
        "text: captions and keywords": [(model.text, "forward")],
        "fusion": [(model, "fuse")],
        "heads of MRTVA": [(networks.objective.heads, "forward")],
        "logits of words": [(model, "lm_logits")],
        "ITC, ITM, PLM, CVTA, MRTVA": [(losses, x) for x in ("itc", "itm", "plm", "cvta", "mrtva")],
    }

    def watch(stage, owner, name):
        real = getattr(owner, name)

        def call(*args, **more):
            cut = tree_map(fresh, (args, more))
            kept.setdefault(stage, []).append(functools.partial(real, *cut[0], **cut[1]))
            return real(*args, **more)

        return mock.patch.object(owner, name, call)

    # Watch one real step, so that shapes, masks and padding are those of training.
    with contextlib.ExitStack() as stack:
        for stage, spots in places.items():
            for spot in spots:
                stack.enter_context(watch(stage, *spot))
        networks(batch)
    return {stage: functools.partial(repeat, kept[stage]) for stage in places}


def bench_step(folder):
    """Measure the stages, then whole steps, then the wait for the loader."""
    bags, children, workers, steps = (16, 4, 8, 60) if GPU else (2, 2, 1, 3)
    sizes = ["--bags", bags, "--children", children, "--workers", workers, "--steps", steps]
    cfg = parts.settings(*sizes, "--compile", "false")
    batches, words = parts.paper_batches(Path(folder) / "step", cfg, 8 if GPU else 2)
    networks, batch = parts.Networks(cfg, words), on_device(batches[0])
    model, patches = networks.model, data.augment(batch, cfg.jitter)
    start, size = batches.bags.jpg[0]
    jpeg = batches.bags.shards[0].read_bytes()[start : start + size]
    limits = parts.machine_limits() | {JPEG: (functools.partial(imagecodecs.jpeg8_decode, jpeg), 1)}

    cut, moved = functools.partial(data.augment, batch, cfg.jitter), batch["pixels"].nbytes
    stages = [Stage("a bag from its shard", lambda: batches.bags[0], JPEG)]
    stages += [Stage("pyramid, flips, stain", cut, COPY, moved + patches.nbytes)]
    calls = network_calls(networks, batch)
    if VisionTransformer:
        shape = (model.vision.size, model.vision.patch, 3, 0, "token", model.vision.width)
        depth, heads = len(model.vision.blocks), model.vision.blocks[0].attn.heads
        vit = VisionTransformer(*shape, depth, heads, init_values=1e-5).eval().to(DEVICE)
        peer = functools.partial(vit.requires_grad_(False), patches.flatten(0, 1))
        calls["vision, frozen, by timm"] = functools.partial(repeat, [peer])
    stages += [Stage(name, call, PRODUCTS, count_flops(call)) for name, call in calls.items()]
    # Adam reads weight, gradient and two moments, and writes all but the gradient.
    adam = 7 * sum(p.nbytes for p in networks.objective.parameters() if p.grad is not None)
    stages.append(Stage("optimiser", networks.optimizer.step, COPY, adam))
    print_stages(f"step: {bags} bags of {batch['valid'].shape[1]} nodes", limits, stages)

    # Whole steps, from pixels and from the tokens that prepare.features would keep.
    with torch.no_grad(), autocast():
        tokens = torch.stack([model.vision_tokens(bag) for bag in patches]).half()
    cached = {k: x for k, x in batch.items() if k not in ("pixels", "flips", "stain")}
    stages = []
    for name, given in (("pixels", batch), ("cached tokens", cached | {"tokens": tokens})):
        step = functools.partial(networks, given)
        stages.append(Stage(f"a whole step from {name}", step, PRODUCTS, count_flops(step)))
    print_stages("whole steps", {PRODUCTS: limits[PRODUCTS]}, stages)

    more = dict(num_workers=workers, pin_memory=GPU, prefetch_factor=4)
    waited = parts.share_of_waiting(DataLoader(batches, batch_size=None, **more), networks)
    print(f"  {waited:.1%} of the time of {steps} steps passed in waiting for {workers} loaders")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = {"step": bench_step, "data": bench_data, "text": bench_text}
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--tiny", action="store_true", help="small networks, to try this file")
    parser.parse_args(namespace=ARGS)
    unknown = set(ARGS.stages) - set(stages)
    if unknown:
        raise ValueError(f"unknown stage {unknown.pop()}; there are {', '.join(stages)}")
    parts.begin()
    with tempfile.TemporaryDirectory() as folder:
        for name in ARGS.stages or stages:
            stages[name](folder)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
