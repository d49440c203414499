"""What each stage costs, beside its limit or beside a peer, measured in the same run and given as ratios.

    python bench.py                    # one table: every stage of a step of the paper preset, about nine minutes on two CPU cores
    python dev/gpu.py                  # on one GPU instead: rows of their own, in the order in which they are wanted
    python bench.py data losses        # only these, in detail
    python bench.py data --side 16384  # on a larger slide (8 GB of memory to paint it)

    step    the table: tiling, shard, pyramid + augmentation, vision, text, fusion, losses, optimiser, whole step, waiting for data
    data    a bag from a slide and from a shard, beside decoding the same JPEG bytes         (limit) and OpenSlide (peer)
    caption patches captioned through a server that answers after 50 ms                   (limit)
    model   ViT-B/16 and CLIP's text tower, beside timm and open_clip (peers) and the machine's matrix-multiply rate (limit)
    losses  a training step of the synthetic preset, split by loss: what an ablation saves; and how each loss grows with bags, nodes and keywords

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

import batches as batches_
import captioner
import data
import losses
import model as networks
import runs
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


def stored_tiles(slide):
    """The JPEG bytes of all tiles of level 0, and what decodes one of them as slide.py does and keeps nothing."""
    page = slide.file.pages[0]
    colours = tifffile.tifffile.jpeg_decode_colorspace(page.photometric, page.planarconfig, page.extrasamples, page.is_jfif)
    return ([slide.pages[0].load(k) for k in range(len(page.dataoffsets))],
            functools.partial(imagecodecs.jpeg8_decode, tables=page.jpegtables, colorspace=colours[0], outcolorspace=colours[1]))


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
            tiles, decode = stored_tiles(one)

            def floor(x, y, go=map):
                def row(r):
                    for c in range(x // tile, -(-min(x + 4096, side) // tile)):
                        decode(tiles[r * -(-side // tile) + c])
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


def bench_step(folder, device, size="paper"):
    """One table: every stage of a training step of the paper preset (random weights; on a CPU 2 bags of 15 nodes a step, on a GPU 16 of 85), from
    the slide to the optimiser, each beside the limit of what it does most on this machine: decoding its JPEG bytes, copying its bytes, or
    multiplying matrices (fp32 on a CPU, bf16 on a GPU). And beside timm, open_clip and OpenSlide where they can be imported."""
    gpu = device == "cuda"
    cfg = train.parse(["--preset", "paper", "--vision", "random", "--bags", "16" if gpu else "2", "--children", "4" if gpu else "2", "--device", device, "--workers", "8" if gpu else "1",
                       "--steps", "60" if gpu else "4", "--size", size])
    patch_px = networks.SIZES[size]["vision"]["size"]
    batches_.make_world(Path(folder) / "step", train=8 if gpu else 2, test=1, patch_px=patch_px)
    bags = data.BagDataset(Path(folder) / "step" / "train")
    tokenizer = text.Tokenizer.train((c for i in range(len(bags)) for c in bags.captions(i) if c), 1500)
    batches = batches_.Batches(bags, tokenizer, cfg, networks.SIZES[size]["text"]["context"])
    batch, autocast = {k: x.to(device) for k, x in batches[0].items()}, torch.autocast(device, torch.bfloat16, enabled=gpu)

    def new(size):
        model = train.build_model(dataclasses.replace(cfg, size=size), tokenizer).to(device)
        train.freeze(model.vision, device)
        return Objective(model, cfg), train.make_optimizer(model, cfg, device)

    objective, optimizer = new(size)
    m, n, big = objective.model, 8192 if gpu else 1024, torch.rand(2 ** (28 if gpu else 25), device=device)
    twin = torch.empty_like(big)
    square = torch.rand(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    f, T, (B, N), M = m.flops(batch["ids"].shape[2], cfg.k_o), batch["ids"].shape[2], batch["valid"].shape, len(batch["pairs"])
    images, ids = torch.rand(4 * N if gpu else 4, 3, patch_px, patch_px, device=device), torch.nn.functional.pad(batch["ids"].flatten(0, 1)[: 340 if gpu else 16], (0, batches.context - T))
    whole = batches_.Batches(bags, tokenizer, dataclasses.replace(cfg, device="cuda"), batches.context)[0]      # as a GPU gets it: to be cut, turned and stained
    whole = {k: whole[k].to(device) for k in ("nodes", "turns", "stain", "pixels")}
    visual, words = torch.rand(M, 1 + m.pool ** 2, len(m.fusion_ln.weight), device=device), torch.rand(M, T, m.text.width, device=device)
    real = torch.ones(M, T, dtype=torch.bool, device=device)
    v, t, w = (losses.unit(torch.randn(*shape, len(m.proj.weight), device=device)).requires_grad_() for shape in ((B, N), (B, N), (B, cfg.keywords)))

    def forward(run):
        with torch.no_grad(), autocast:
            run()

    def both(run):
        with autocast:
            y = run()
        y.float().square().mean().backward()

    def contrast():
        bag, weight = batch["bag"].repeat_interleave(N), batch["valid"].flatten().float()
        sum((losses.itc(v.flatten(0, 1), t.flatten(0, 1), bag, 0.07, weight), losses.cvta(v, w, cfg.k_o, 0.07, weight.view(B, N), batch["w_valid"]),
             losses.mrtva(v, t.detach(), batch["valid"], cfg.children))).backward()

    def step(objective, optimizer, batch, compiled=False):
        run = torch.compile(objective, dynamic=False, fullgraph=True) if compiled else objective

        def once():
            with autocast:
                parts, _ = run(batch)
            sum(parts.values()).backward()
            nn.utils.clip_grad_norm_(objective.model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad()
            objective.follow()
        return once

    for p in m.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    slide = Path(folder) / "step.svs"
    synthetic.write_slide(slide, 0, 0, 4096)
    trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    # limits: kind -> call; rows: name -> (call, its FLOPs or the bytes it reads and writes, kind of its limit)
    with data.Slide(slide, threads=1, keep=0) as one:
        tiles, decode = stored_tiles(one)
        limits = {"tiles": lambda: [decode(x) for x in tiles],
                  "jpeg": lambda: imagecodecs.jpeg8_decode(bags.jpeg(0)), "matmul": lambda: square @ square, "copy": lambda: twin.copy_(big)}
        rows = {"tiling: a bag from its slide": (lambda: one.read(0, 0, 4096, 8 * patch_px), 0, "tiles"), "shard: a bag from its JPEG": (lambda: bags[0], 0, "jpeg"),
                f"pyramid, turns, stain: {B} bags": (lambda: batches_.augment(whole, cfg.jitter), B * (3 * (8 * patch_px) ** 2 + 12 * N * patch_px ** 2), "copy"),
                f"vision, frozen: {len(images)} patches": (lambda: forward(lambda: m.see(images)), len(images) * f["vision"], "matmul"),
                f"text: {len(ids)} captions of {batches.context} ids": (lambda: both(lambda: m.text(ids)[1]), 3 * len(ids) * m.flops()["text"], "matmul"),
                f"fusion: {M} patches with captions": (lambda: both(lambda: m.fuse_with_text(visual, words, real)), 3 * M * f["fuse_with_text"], "matmul"),
                f"losses: itc, cvta, mrtva of {B} x {N} nodes": (contrast, 6 * (2 * (B * N) ** 2 + B * N * cfg.keywords) * len(m.proj.weight), "matmul"),
                f"optimiser: {trained / 1e6:.0f} M parameters": (optimizer.step, 28 * trained, "copy")}
        peers = {}
        if timm:
            vit = timm.create_model("vit_large_patch16_224", num_classes=0).to(device, torch.bfloat16 if gpu else None).eval()
            peers[list(rows)[3]] = ("timm", lambda: forward(lambda: vit(images.to(next(vit.parameters()).dtype))))
            clip = open_clip.create_model("ViT-B-32").to(device)
            peers[list(rows)[4]] = ("open_clip", lambda: both(lambda: clip.encode_text(ids)))
        if openslide:
            peer = openslide.OpenSlide(slide)
            peers[list(rows)[0]] = ("OpenSlide, its 85 patches", lambda: openslide_patches(peer, 0, 0))
        seconds = interleaved({**limits, **{name: row[0] for name, row in rows.items()}, **{f"peer {name}": call for name, (_, call) in peers.items()}}, 10 if gpu else 3)
    rate = {"matmul": 2 * n ** 3, "copy": 2 * big.numel() * 4, "tiles": None, "jpeg": None}
    print(f"\na step of the paper preset, stage by stage, {cfg.bags} bags x {N} nodes, {'bf16' if gpu else 'fp32'}; here matrices multiply at {rate['matmul'] / statistics.median(seconds['matmul']) / 1e12:.2f} TFLOP/s, bytes copy at "
          f"{rate['copy'] / statistics.median(seconds['copy']) / 1e9:.0f} GB/s\n  {'':46} {'ms':>10} {'GFLOP':>9} {'of the limit':>22}")

    def show(name, times, work, kind, peer=""):
        share = statistics.median(l * (work / rate[kind] if rate[kind] else 1) / s for s, l in zip(times, seconds[kind]))
        print(f"  {name:46} {1000 * statistics.median(times):10.1f} {work / 1e9 if kind == 'matmul' else 0:9.1f} {share:8.2f} of {kind if rate[kind] else 'decode':10}{peer}")

    for name, (_, work, kind) in rows.items():
        peer = f"{peers[name][0]} takes {statistics.median(p / s for p, s in zip(seconds[f'peer {name}'], seconds[name])):.2f} times as long" if name in peers else ""
        show(name, seconds[name], work, kind, peer)

    # The whole step, as the loop has it
    cached = {k: x for k, x in batch.items() if k not in ("pixels", "turns", "stain")} | {"tokens": torch.rand(B, N, 1 + m.pool ** 2, m.vision.width, device=device, dtype=torch.float16)}
    cases = {"step": (size, batch, False), "step, cached features": (size, cached, False)}
    for name, (which, inputs, compiled) in cases.items():
        pair = (objective, optimizer) if which == size else new(which)
        run = step(*pair, inputs, compiled)
        times = interleaved({"matmul": limits["matmul"], name: run}, 8 if gpu else 2)
        seconds["matmul"] = times["matmul"]
        show(f"{name}, forward + backward + optimiser", times[name], pair[0].flops(inputs), "matmul", f"{B / statistics.median(times[name]):.2f} bags/s, {runs.memory(device):.1f} GB")

    # ... and how long it waits for data, with a loader of its own
    loader = batches_.ahead(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=cfg.workers, pin_memory=gpu, prefetch_factor=2), device)
    run, waits = step(objective, optimizer, batch, gpu), 0.0
    for i, _ in enumerate(loader):
        if i:
            waits += time.perf_counter() - asked
        else:  # the first is waited for in any case
            start = time.perf_counter()
        run()
        if gpu and i % 10 == 0:
            torch.cuda.synchronize()
        asked = time.perf_counter()
    print(f"  waiting for data with {cfg.workers} loader process{'es' * (cfg.workers > 1)}: {waits / (time.perf_counter() - start):.1%} of {len(batches)} steps")


def bench_losses(folder, device):
    """A training step of the synthetic preset and what each loss costs of it, networks included; what the momentum model and its queue add;
    then the arithmetic of each loss alone, and the power of bags, nodes and keywords that it grows with."""
    batches_.make_world(Path(folder) / "world", train=20, test=1)
    bags = data.BagDataset(Path(folder) / "world" / "train")
    tokenizer = text.Tokenizer.train((c for i in range(len(bags)) for c in bags.captions(i) if c), 1500)
    cfg = train.Config()
    batches = batches_.Batches(bags, tokenizer, cfg, networks.SIZES["synthetic"]["text"]["context"])
    batch = {k: v.to(device) for k, v in batches[0].items()}
    model = train.build_model(cfg, tokenizer).to(device)

    def step(**other):
        objective = Objective(model, dataclasses.replace(cfg, **other))

        def run():
            sum(objective(batch | {"alpha": torch.tensor(objective.cfg.alpha, device=device)})[0].values()).backward()
            objective.follow()
        return run
    seconds = interleaved({"all six losses": step(), **{f"without {n}": step(**{n: 0.0}) for n in train.LOSSES}, "itc alone": step(**dict.fromkeys(train.LOSSES[1:], 0.0)),
                           "all, with a queue of 4096": step(queue=4096), "all, with queue and alpha 0.4": step(queue=4096, alpha=0.4), "all, keywords selected by ema": step(cvta_select="ema"),
                           "batch on the CPU (bags in memory: cut, tokens)": lambda: batches[1], "turns, stain": lambda: batches_.augment(batch, cfg.jitter)}, 9)
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
                "itm, hard negatives": lambda: losses.hard_negatives(unit(v), unit(t), bag, 0.07, weight, torch.rand(M, 2, device=device)),
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
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="any of step (the default), data, caption, model, losses")
    parser.add_argument("--side", type=int, default=8192, help="pixels, of the slide that `data` reads")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = {"step": lambda: bench_step(folder, device), "data": lambda: bench_data(folder, args.side), "caption": lambda: bench_caption(folder), "model": lambda: bench_model(device),
              "losses": lambda: bench_losses(folder, device)}
    wanted = args.stages or ["step"]
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as the loop has it
    if unknown := set(wanted) - set(stages):
        raise ValueError(f"unknown stage {unknown.pop()!r}; there are {', '.join(stages)}")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for stage in wanted:
            stages[stage]()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
