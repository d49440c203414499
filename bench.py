"""What each stage costs, beside its limit or beside a peer, measured in the same run and given as ratios.

    python bench.py                    # every stage, about four minutes on two CPU cores
    python bench.py data losses        # only these
    python bench.py data --side 16384  # on a larger slide (8 GB of memory to paint it)

    data    a bag from a slide and from a shard, beside decoding the same JPEG bytes         (limit) and OpenSlide (peer)
    caption patches captioned through a server that answers after 50 ms                   (limit)
    model   ViT-B/16 and CLIP's text tower, beside timm and open_clip (peers) and the machine's matrix-multiply rate (limit)
    vision  the preset's ViT forward and backward, beside the machine's matrix-multiply rate  (limit)
    attn    our fused attention, beside torch.nn.MultiheadAttention                           (peer)
    losses  a training step, split by loss: what an ablation saves; and how each loss grows with bags, nodes and keywords

Rounds are interleaved and the median of per-round ratios is reported: absolute numbers on a busy machine mean little.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import captioner
import data
import losses
import model as networks
import synthetic
import text
import train
from objective import Objective

try:
    import openslide  # pip install openslide-python openslide-bin: a peer to compare with, not needed otherwise
except ImportError:
    openslide = None
try:
    import open_clip  # pip install timm open_clip_torch: likewise
    import timm
except (ImportError, RuntimeError):
    open_clip = timm = None


def interleaved(cases, rounds=5):
    """dict name -> function: run all in turn, `rounds` times after a warm-up -> dict name -> list of seconds."""
    seconds = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name, f in cases.items():
            start = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title, seconds, base, patches=0):
    """One line a case: median time, the rate when a call makes so many patches, and the median ratio to `base` of the same round."""
    print(f"\n{title}")
    for name, s in seconds.items():
        ratio, rate = statistics.median(a / b for a, b in zip(s, seconds[base])), patches / statistics.median(s)
        print(f"  {name:42} {1000 * statistics.median(s):9.1f} ms " + f"{rate:7.0f} patches/s" * (patches > 0) + f"   {ratio:6.2f} x {base}")


def bench_data(folder, side):
    """Bags from a slide of side x side pixels, and from a shard, beside decoding the same JPEG bytes and nothing else, and beside
    OpenSlide reading the same 85 patches one by one. One thread unless named; tiles of 256 px and, as older scanners write, 240."""
    torch.set_num_threads(1)
    corners = [(x, y) for y in range(0, side - 4095, 4096) for x in range(0, side - 4095, 4096)]   # 4096 px: the paper's parent at 40x

    def each(f):  # a case: every call takes the next corner
        at = itertools.cycle(corners)
        return lambda: f(*next(at))

    for tile in (256, 240):
        path = Path(folder) / f"bench-{tile}.svs"
        synthetic.write_slide(path, 0, 0, side, tile)
        with data.Slide(path, threads=1, keep=0) as one, data.Slide(path, threads=2, keep=0) as two, ThreadPoolExecutor(2) as pool:
            page = one.file.pages[0]
            stored = [one.pages[0].load(k) for k in range(len(page.dataoffsets))]
            colours = tifffile.tifffile.jpeg_decode_colorspace(page.photometric, page.planarconfig, page.extrasamples, page.is_jfif)

            def floor(x, y, go=map):
                def row(r):
                    for c in range(x // tile, -(-min(x + 4096, side) // tile)):
                        imagecodecs.jpeg8_decode(stored[r * -(-side // tile) + c], tables=page.jpegtables, colorspace=colours[0], outcolorspace=colours[1])
                list(go(row, range(y // tile, -(-min(y + 4096, side) // tile))))

            def patches(x, y):  # also the three coarser levels, each averaged from the one below; a patch is a view of its level
                level = one.read(x, y, 4096, 4096)
                for k in (8, 4, 2, 1):
                    level = data.resize(level, 512 * k)
                    level.reshape(k, 512, k, 512, 3).swapaxes(1, 2)
            cases = {"decode": each(floor), "decode, two threads": each(lambda x, y: floor(x, y, pool.map)), "bag of 512-px patches": each(lambda x, y: one.read(x, y, 4096, 4096)),
                     "... with two threads": each(lambda x, y: two.read(x, y, 4096, 4096)), "... and its 85 patches": each(patches),
                     "bag of 224-px patches": each(lambda x, y: one.read(x, y, 4096, 1792))}
            if openslide:
                peer = openslide.OpenSlide(path)
                cases["OpenSlide, the 85 patches of 512 px"] = each(lambda x, y: openslide_patches(peer, x, y))
            times = interleaved(cases)
            report(f"a bag from a slide, tiles of {tile} px (decode: its tiles, kept nowhere)", times, "decode", patches=85)
            ratio = lambda a, b: statistics.median(p / q for p, q in zip(times[a], times[b]))
            print(f"  two threads: {ratio('bag of 512-px patches', '... with two threads'):.2f} times faster, decoding alone "
                  f"{ratio('decode', 'decode, two threads'):.2f} times" + (". OpenSlide takes " + " and ".join(
                      f"{ratio('OpenSlide, the 85 patches of 512 px', case):.1f} times as long as the {name}"
                      for case, name in (("bag of 512-px patches", "bag"), ("... and its 85 patches", "85 patches"))) if openslide else ""))
    data.tile(path, Path(folder) / "bags", patch_px=224)
    bags = data.BagDataset(Path(folder) / "bags", captions=False)
    at = [itertools.cycle(range(len(bags))) for _ in range(3)]
    report("a bag of 224-px patches from a shard", interleaved({
        "decode": lambda: imagecodecs.jpeg8_decode(bags.jpeg(next(at[0]))), "dataset item": lambda: bags[next(at[1])],
        "... and its 85 patches, float32": lambda: data.pyramid(bags[next(at[2])]["image"][None])}), "decode", patches=85)


def openslide_patches(peer, x, y):
    """The 85 patches of a parent as the usual tools read them: from the best stored level, then resized to 512 px."""
    for n in range(data.NODES):
        u, v, side = data.square(n, x, y, 4096)
        level = peer.get_best_level_for_downsample(side / 512)
        size = round(side / peer.level_downsamples[level])
        patch = peer.read_region((u, v), level, (size, size)).convert("RGB")
        np.asarray(patch if size == 512 else patch.resize((512, 512), Image.BOX))


def _slow_server(say, seconds):
    """A chat server that answers any question after `seconds`, any number at a time; tells its port through `say`."""
    answer = json.dumps({"choices": [{"message": {"content": "a caption"}}]}).encode()

    async def serve(reader, writer):
        while not reader.at_eof():
            head = await reader.readuntil(b"\r\n\r\n")
            length = int((re.search(rb"content-length: *(\d+)", head, re.I) or [0, 0])[1])
            await reader.readexactly(length)
            await asyncio.sleep(seconds if length else 0)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2 ** 20)
        say.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    asyncio.run(run())


def bench_caption(folder, concurrency=32, seconds=0.05):
    """Patches captioned a second through a server that takes 50 ms a question, beside concurrency / seconds."""
    synthetic.write_slide(Path(folder) / "slide.svs", 0, 0, 8192)
    data.tile(Path(folder) / "slide.svs", Path(folder) / "captions", patch_px=224, fov_px=256)
    context = multiprocessing.get_context("spawn")
    say = context.Queue()
    server = context.Process(target=_slow_server, args=(say, seconds), daemon=True)
    server.start()
    endpoint, start = f"http://127.0.0.1:{say.get()}/v1", time.perf_counter()
    count = captioner.caption_folder(Path(folder) / "captions", endpoint, "any", concurrency=concurrency)
    rate, ideal = count["captions"] / (time.perf_counter() - start), concurrency / seconds
    print(f"\ncaptions, {concurrency} questions at a time, {1000 * seconds:.0f} ms each\n  {count['captions']} captions, {rate:.0f} a second, {rate / ideal:.2f} x ideal")
    server.terminate()


def bench_model(device):
    """ViT-B/16 and CLIP's text tower, forward and forward + backward, beside the same networks of timm and open_clip, and the rate of
    each as a share of what large matrix multiplications reach. fp32 on a CPU; on a GPU bf16 autocast, with and without torch.compile."""
    gpu = device == "cuda"
    batch, n = (64, 8192) if gpu else (4, 2048)
    m = networks.MRPLIP(49409, 49407, dict(size=224, patch=16, width=768, depth=12, heads=12), networks.CLIP_TEXT, dict(width=64, depth=1, heads=1, pool=4), 512, (64, 64)).to(device)
    x, ids = torch.rand(batch, 3, 224, 224, device=device), torch.randint(0, 49000, (batch, 77), device=device)
    ids[:, -1] = 49407
    a, flops = torch.rand(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32), m.flops()

    def once(run, backward):
        with torch.autocast(device, torch.bfloat16, enabled=gpu), contextlib.nullcontext() if backward else torch.no_grad():
            y = run()
        if backward:
            y.float().square().mean().backward()

    for name, part, ours, peer in (("ViT-B/16", "vision", lambda: m.vision(x), timm and timm.create_model("vit_base_patch16_224", num_classes=0).to(device)),
                                   ("text tower", "text", lambda: m.text(ids)[1], open_clip and open_clip.create_model("ViT-B-16").to(device))):
        theirs = peer and ((lambda: peer(x)) if part == "vision" else (lambda: peer.encode_text(ids)))
        for compiled in (False, True) if gpu else (False,):
            cases = {"matmul": lambda: a @ a}
            for who, forward in (("ours", ours), ("peer", theirs)):
                if forward:
                    run = torch.compile(forward) if compiled else forward
                    cases |= {f"{who} forward": functools.partial(once, run, False), f"{who} forward + backward": functools.partial(once, run, True)}
            s = interleaved(cases, 10 if gpu else 7)
            print(f"\n{name}, {batch} a batch, {'bf16' if gpu else 'fp32'}{', compiled' if compiled else ''}: {flops[part] / 1e9:.1f} GFLOP forward of one")
            for mode, times in (("forward", 1), ("forward + backward", 3)):
                share = statistics.median(times * batch * flops[part] / t / (2 * n ** 3 / p) for t, p in zip(s[f"ours {mode}"], s["matmul"]))
                print(f"  {mode:20} {1000 * statistics.median(s[f'ours {mode}']):8.1f} ms, {share:.2f} of the matmul rate" + (
                    f"; {'timm' if part == 'vision' else 'open_clip'} takes {statistics.median(q / t for q, t in zip(s[f'peer {mode}'], s[f'ours {mode}'])):.3f} times as long" if theirs else ""))


def bench_vision(device):
    """Forward + backward of the preset's vision tower against the time its FLOPs take in one large matrix multiplication."""
    vit = networks.ViT(**networks.SIZES["synthetic"]["vision"]).to(device)
    images = torch.rand(128, 3, 64, 64, device=device)
    step = lambda: vit(images).square().mean().backward()
    with FlopCounterMode(display=False) as counter:
        step()
    n = 2048
    a, flops = torch.rand(n, n, device=device), counter.get_total_flops()
    times = interleaved({f"its {flops / 1e9:.0f} GFLOP as {n} x {n} matmuls": lambda: [a @ a for _ in range(max(1, round(flops / (2 * n ** 3))))],
                         "ViT 128 x 64 px, forward + backward": step})
    report("vision tower of the synthetic preset", times, next(iter(times)))


def bench_attention(device):
    """Our attention against torch's module of the same size."""
    x = torch.rand(64, 77, 512, device=device)
    ours, theirs = networks.Attention(512, 8).to(device), nn.MultiheadAttention(512, 8, batch_first=True).to(device)
    report("attention, 64 x 77 x 512, forward + backward", interleaved({
        "torch.nn.MultiheadAttention": lambda: theirs(x, x, x, need_weights=False)[0].sum().backward(),
        "model.Attention": lambda: ours(x).sum().backward()}), "torch.nn.MultiheadAttention")


def bench_losses(folder, device):
    """A training step of the synthetic preset and what each loss costs of it, networks included; what the momentum model and its queue add;
    then the arithmetic of each loss alone, and the power of bags, nodes and keywords that it grows with."""
    train.make_world(Path(folder) / "world", train=20, test=1)
    bags = data.BagDataset(Path(folder) / "world" / "train")
    tokenizer = text.Tokenizer.train((c for i in range(len(bags)) for c in bags.captions(i) if c), 1500)
    cfg = train.Config()
    batches = train.Batches(bags, tokenizer, cfg, networks.SIZES["synthetic"]["text"]["context"])
    batch = {k: v.to(device) for k, v in batches[0].items()}
    augment = lambda: data.stain_jitter(data.turn(batch["pixels"], batch["turns"]))
    patches, model = augment(), train.build_model(cfg, tokenizer).to(device)

    def step(**other):
        objective = Objective(model, dataclasses.replace(cfg, **other))

        def run():
            sum(objective(patches, batch | {"alpha": torch.tensor(objective.cfg.alpha, device=device)})[0].values()).backward()
            objective.follow()
        return run
    seconds = interleaved({"all six losses": step(), **{f"without {n}": step(**{n: 0.0}) for n in train.LOSSES}, "itc alone": step(**dict.fromkeys(train.LOSSES[1:], 0.0)),
                           "all, with a queue of 4096": step(queue=4096), "all, with queue and alpha 0.4": step(queue=4096, alpha=0.4), "all, keywords selected by ema": step(cvta_select="ema"),
                           "batch on the CPU (decode, cut, tokens)": lambda: batches[1], "turns, stain": augment}, 9)
    report(f"a step of {cfg.bags} bags x 4 patches, forward + backward", seconds, "all six losses")
    print("  of the step: " + ", ".join(f"{n} {1 - statistics.median(t / a for t, a in zip(seconds[f'without {n}'], seconds['all six losses'])):.2f}" for n in train.LOSSES)
          + " (what leaving it out saves; without itc the towers still run)")

    def cases(B, N, K, d=128):
        M, pick = B * N, torch.Generator().manual_seed(0)
        v, w, t = (torch.randn(*n, d, generator=pick).to(device).requires_grad_() for n in ((B, N), (B, K), (B, N)))
        valid, w_valid, word = torch.ones(B, N, dtype=torch.bool, device=device), torch.ones(B, K, dtype=torch.bool, device=device), torch.arange(B * K, device=device).view(B, K)
        bag, weight, old = torch.arange(B, device=device).repeat_interleave(N), torch.ones(M, device=device), torch.zeros(4096, d, device=device)
        unit, children = (lambda x: losses.unit(x).flatten(0, 1)), {4: 1, 15: 2, 85: 4}[N]
        index, ok = losses.select_keywords(v, w, 4, w_valid)
        contrast = lambda **more: losses.itc(unit(v), unit(t), bag, 0.07, weight, **more).backward()
        return {"itc": contrast, "itc, slow, queue of 4096": lambda: contrast(slow=(unit(v), unit(t)), queue=(old, old, torch.zeros(4096, dtype=torch.long, device=device)), alpha=0.4),
                "itm, hard negatives": lambda: losses.hard_negatives(unit(v), unit(t), bag, 0.07, weight),
                "cvta, selection": lambda: losses.select_keywords(v, w, 4, w_valid),
                "cvta, bag": lambda: losses.cvta(v, w, 4, 0.07, weight.view(B, N), w_valid, (index, ok), near=losses.NEAR).backward(),
                "cvta, batch": lambda: losses.cvta(v, w, 4, 0.07, weight.view(B, N), w_valid, (index, ok), word, losses.NEAR).backward(),
                **{f"mrtva, {pairs}": lambda pairs=pairs: losses.mrtva(v, t.detach(), valid, children, pairs).backward() for pairs in ("edges", "ancestors", "levels")},
                "monitors": lambda: losses.monitors(v, valid, index, ok, torch.ones(B, N, K, dtype=torch.bool, device=device), w_valid)}

    timed = lambda *size: {name: statistics.median(s) for name, s in interleaved(cases(*size)).items()}
    axes = {"bags": [(16, 15, 24), (32, 15, 24), (64, 15, 24)], "nodes": [(16, 4, 24), (16, 15, 24), (16, 85, 24)], "keywords": [(16, 15, 24), (16, 15, 96), (16, 15, 384)]}
    runs = {axis: [timed(*size) for size in sizes] for axis, sizes in axes.items()}
    print("\nthe arithmetic of each loss, forward + backward, 64 bags x 15 nodes x 24 keywords; the power it grows with over the last step of an axis")
    for name in runs["bags"][0]:
        grows = {axis: math.log(run[2][name] / run[1][name]) / math.log(math.prod(axes[axis][2]) / math.prod(axes[axis][1])) for axis, run in runs.items()}
        print(f"  {name:42} {1000 * runs['bags'][2][name]:9.2f} ms   " + ", ".join(f"{axis} ^ {power:.1f}" for axis, power in grows.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="data, caption, model, vision, attn, losses (default: all)")
    parser.add_argument("--side", type=int, default=8192, help="pixels, of the slide that `data` reads")
    args = parser.parse_args()
    stages = {"data": lambda: bench_data(folder, args.side), "caption": lambda: bench_caption(folder), "model": lambda: bench_model(device), "vision": lambda: bench_vision(device), "attn": lambda: bench_attention(device),
              "losses": lambda: bench_losses(folder, device)}
    if unknown := set(args.stages) - set(stages):
        raise ValueError(f"unknown stage {unknown.pop()!r}; there are {', '.join(stages)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages or stages:
            stages[stage]()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
