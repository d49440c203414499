"""What each stage costs, beside its limit or beside a peer, measured in the same run and given as ratios.

    python bench.py                    # every stage, about a minute on two CPU cores
    python bench.py read step          # only these

    read    one bag from a slide, beside decoding the same JPEG tiles and nothing else       (limit)
    vision  the preset's ViT forward and backward, beside the machine's matrix-multiply rate  (limit)
    attn    our fused attention, beside torch.nn.MultiheadAttention                           (peer)
    step    a whole training step, split by loss: what an ablation saves

Rounds are interleaved and the median of per-round ratios is reported: absolute numbers on a busy machine mean little.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import data
import model as networks
import synthetic
import text
import train


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


def report(title, seconds, base, note=""):
    """One line a case: median time and the median ratio to `base` of the same round."""
    print(f"\n{title}")
    for name, s in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(s, seconds[base]))
        print(f"  {name:42} {1000 * statistics.median(s):9.1f} ms   {ratio:6.2f} x {base}{note if name != base else ''}")


def bench_read(folder):
    """A bag of 4096 level-0 pixels (the paper's parent on a 40x slide) read and averaged, one thread, against tile decoding."""
    path = Path(folder) / "bench.svs"
    synthetic.write_slide(path, 0, 0, size=4096)
    with data.Slide(path, threads=1) as slide:
        page = slide.pages[0]
        with open(path, "rb") as f:
            tiles = []
            for offset, count in zip(page.dataoffsets, page.databytecounts):
                f.seek(offset)
                tiles.append(f.read(count))

        def decode():
            for i, tile in enumerate(tiles):
                page.decode(tile, i, jpegtables=page.jpegtables)
        report("read: a 4096-px parent, one thread", interleaved({
            "decode its tiles, keep nothing": decode,
            "Slide.read -> 4096": lambda: slide.read(0, 0, 4096, 4096),
            "Slide.read -> 1792 (a bag of 224-px patches)": lambda: slide.read(0, 0, 4096, 1792)}), "decode its tiles, keep nothing")


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


def bench_step(folder, device):
    """A training step of the synthetic preset with all losses, and without each: what it costs."""
    train.make_world(Path(folder) / "world", train=20, test=1)
    bags = data.BagDataset(Path(folder) / "world" / "train")
    tokenizer = text.Tokenizer.train((c for captions in bags.captions for c in captions if c), 1500)
    cfg = train.Config()
    batches = train.Batches(bags, tokenizer, cfg, networks.SIZES["synthetic"]["text"]["context"])
    batch = {k: v.to(device) for k, v in batches[0].items()}
    augment = lambda: data.stain_jitter(data.turn(batch["pixels"], batch["turns"]))
    patches, model = augment(), train.build_model(cfg, tokenizer).to(device)

    def step(**off):
        objective = train.Objective(model, dataclasses.replace(cfg, **off))
        return lambda: sum(objective(patches, batch, True)[0].values()).backward()
    names = ("itm", "mlm", "plm", "cvta", "mrtva")
    cases = {"all six losses": step(), **{f"without {n}": step(**{n: 0.0}) for n in names}, "itc alone": step(**dict.fromkeys(names, 0.0)),
             "batch on the CPU (decode, cut, tokens)": lambda: batches[1], "turns, stain": augment}
    report(f"a step of {cfg.bags} bags x 4 patches, forward + backward", interleaved(cases), "all six losses")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="read, vision, attn, step (default: all)")
    stages = parser.parse_args().stages or ["read", "vision", "attn", "step"]
    if set(stages) - {"read", "vision", "attn", "step"}:
        raise ValueError(f"unknown stage {(set(stages) - {'read', 'vision', 'attn', 'step'}).pop()!r}; there are read, vision, attn and step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            {"read": lambda: bench_read(folder), "vision": lambda: bench_vision(device), "attn": lambda: bench_attention(device),
             "step": lambda: bench_step(folder, device)}[stage]()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
