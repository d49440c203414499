"""Measure each stage of a training step beside its limit on this machine.

    python -m dev.bench [step|data|text ...]      # minutes; seconds with --tiny, small networks

    step  the paper preset with random weights: 2 bags of 15 nodes on a CPU, 16 bags of 85 on a GPU;
          stage by stage, then whole steps, then their wait for the loader
    data  a slide tiled, beside tifffile decoding its tiles
    text  what the captions of a batch cost the loader, beside decoding its pictures

The limit of a stage is what it does most: decoding JPEG, copying, or multiplying matrices (fp32 on
a CPU, bf16 on a GPU). Both run in turn. OpenSlide is a peer if it is installed.
"""

import contextlib
import functools
import tempfile
from pathlib import Path
from unittest import mock

import tifffile
import torch
from torch.utils._pytree import tree_leaves, tree_map

import data
import losses
import text
from dev.gpu import DEVICE, GPU, Step, autocast, clock, count_flops, load, main, measure, on_device
from prepare import paint
from prepare.slide import Slide
from prepare.tile import tile


# ---- Data and text -------------------------------------------------------------------------------
def decode_tiles(path):
    """Decode all tiles of the finest level on one core, and keep nothing."""
    with tifffile.TiffFile(path) as file:
        for _ in file.pages[0].segments(maxworkers=1):
            pass


def read_with_openslide(slide, side):
    """Read the 85 patches of a parent as the usual tools do: from the best level, then resized."""
    for n in range(data.NODES):
        x, y, width = data.square(n, 0, 0, side)
        level = slide.get_best_level_for_downsample(width / 512)
        size = round(width / slide.level_downsamples[level])
        slide.read_region((x, y), level, (size, size)).convert("RGB").resize((512, 512))


def bench_data():
    """Measure a slide of one parent of 4,096 px, as the paper's at 40x."""

    def decoding_tiles():
        return 1 / clock(lambda: decode_tiles(path))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.svs"
        path.write_bytes(paint.paint_slide(0, 0, 4096)[0])
        measure("tile", lambda: tile([path], tempfile.mkdtemp(dir=folder)), 1, decoding_tiles)
        with Slide(path, threads=1) as slide:
            call = functools.partial(slide.read, 0, 0, 4096, 4096)
            measure("read a bag, one thread", call, 1, decoding_tiles)
        with contextlib.suppress(ImportError):
            import openslide

            call = functools.partial(read_with_openslide, openslide.OpenSlide(path), 4096)
            measure("... its 85 patches by OpenSlide", call, 1, decoding_tiles)


def bench_text():
    """Measure what a loader does with the captions of two bags."""
    batches = load("--bags", 2)
    batches.keep = True  # else a batch would decode, too
    said = [batches.captions[key] for key in batches.bags.keys[:2]]
    captions = [caption or "" for row in said for caption in row]

    def decoding_jpeg():
        return 1 / clock(lambda: [batches.bags[i] for i in range(2)])

    def collect():
        # Make the captions new again.
        text._keywords.cache_clear()
        return [text.keyword_bag(row, batches.cfg.keywords, batches.corpus) for row in said]

    measure("keywords, textual bags", collect, 1, decoding_jpeg)
    ids = functools.partial(batches.tokenizer.batch, captions, batches.context)
    measure("ids of captions", ids, 1, decoding_jpeg)
    measure("a batch of bags seen before", lambda: batches[0], 1, decoding_jpeg)


# ---- The step ------------------------------------------------------------------------------------
def copying():
    """Return the bytes a second of a large copy, read and written."""
    source = torch.ones(2**28 if GPU else 2**25, device=DEVICE)
    target = source.clone()
    return 2 * source.nbytes / clock(lambda: target.copy_(source))


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


def network_calls(step, batch):
    """Take a step and note the arguments of its calls -> {stage: repeat these calls}.

    So shapes, masks and padding are those of training.
    """
    model = step.model
    places = {
        "vision, frozen": [(model, "vision_tokens")],
        "text: captions and keywords": [(model.text, "forward")],
        "fusion": [(model, "fuse")],
        "heads of MRTVA": [(step.objective.heads, "forward")],
        "logits of words": [(model, "lm_logits")],
        "ITC, ITM, PLM, CVTA, MRTVA": [(losses, x) for x in ("itc", "itm", "plm", "cvta", "mrtva")],
    }
    spies = []
    with contextlib.ExitStack() as stack:
        for stage, spots in places.items():
            for owner, name in spots:
                real = getattr(owner, name)
                spy = stack.enter_context(mock.patch.object(owner, name, wraps=real))
                spies.append((stage, real, spy))
        step(batch)
    calls = {stage: [] for stage in places}
    for stage, real, spy in spies:
        for call in spy.call_args_list:
            args, more = tree_map(fresh, (call.args, call.kwargs))
            calls[stage].append(functools.partial(real, *args, **more))
    return {stage: functools.partial(repeat, found) for stage, found in calls.items()}


def bench_step():
    """Measure the stages, then whole steps, then the wait for the loader."""
    bags, children, steps = (16, 4, 60) if GPU else (2, 2, 3)
    batches = load("--bags", bags, "--children", children, "--steps", steps)
    step, batch = Step(batches), on_device(batches[0])
    model, patches = step.model, data.augment(batch, step.cfg.jitter)
    start, size = batches.bags.jpg[0]
    jpeg = batches.bags.shards[0].read_bytes()[start : start + size]

    def decoding_jpeg():
        return 1 / clock(lambda: data.decode_jpeg(jpeg))

    measure("a bag from its shard", lambda: batches.bags[0], 1, decoding_jpeg)
    moved = batch["pixels"].nbytes + patches.nbytes
    cut = functools.partial(data.augment, batch, step.cfg.jitter)
    measure("pyramid, flips, stain", cut, moved, copying)
    for name, call in network_calls(step, batch).items():
        measure(name, call, count_flops(call))
    # Adam reads weight, gradient and two moments, and writes all but the gradient.
    adam = 7 * sum(p.nbytes for p in step.objective.parameters() if p.grad is not None)
    measure("optimiser", step.optimizer.step, adam, copying)

    # Take whole steps, from pixels and from the tokens that prepare.features would keep.
    with torch.no_grad(), autocast():
        tokens = torch.stack([model.vision_tokens(bag) for bag in patches]).half()
    cached = {k: x for k, x in batch.items() if k not in ("pixels", "flips", "stain")}
    for name, given in (("pixels", batch), ("cached tokens", cached | {"tokens": tokens})):
        whole = functools.partial(step, given)
        measure(f"a whole step from {name}", whole, count_flops(whole))
    step.share_of_waiting(batches)


if __name__ == "__main__":
    main(__doc__, {"step": bench_step, "data": bench_data, "text": bench_text})
