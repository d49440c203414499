"""Compute the tokens of a frozen vision tower once, so that training reads them and not pixels.

    python -m prepare.features DATA --vision uni/pytorch_model.bin
    torchrun --nproc_per_node=8 -m prepare.features DATA --vision uni/pytorch_model.bin

One pass over all bags of DATA/train and DATA/test. Beside each shard appears
bags-SLIDEKEY.NAME.npy, float16 [bags, 85, V, Dv]: the class token and the pooled grid of each
patch, as MRPLIP.vision_tokens gives them; NAME is model.features_name. Finished shards are
skipped; processes share the others. Then train with train.py --freeze_vision true --cache true.
"""

import argparse
import contextlib
import functools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

import data
import model as networks


@torch.no_grad()
def cache_features(see, bags, name, device="cpu", workers=0, rank=0, world=1, at_once=128):
    """Write the features of every shard that is dealt to this process and has none.

    see: images [at_once, 3, S, S] in [0, 1] -> tokens [at_once, V, Dv]; workers: loader processes.
    """
    numbers = range(rank, len(bags.shards), world)
    todo = [i for i in numbers if not data.features_path(bags, i, name).exists()]
    order = np.flatnonzero(np.isin(bags.shard_of, todo)).tolist()
    on_gpu = device == "cuda"
    loading = dict(sampler=order, num_workers=workers, pin_memory=on_gpu)
    loader = DataLoader(bags, batch_size=None, **loading)
    left = np.bincount(bags.shard_of)
    waiting, rows = [], []

    def run(images):
        # Fill up the last batch of a shard: a compiled tower wants one size.
        padded = torch.cat([images, images.new_zeros(at_once - len(images), *images.shape[1:])])
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            rows.append(see(padded)[: len(images)].to(torch.float16))

    for item in data.progress(loader, "features", unit="bag", disable=rank > 0):
        image = item["image"][None].to(device, non_blocking=True)
        # Read valid patches alone, in full batches across the bags of a shard.
        waiting.append(data.pyramid(image)[0][item["valid"].to(device)])
        number = bags.shard_of[item["index"]]
        left[number] -= 1
        *full, last = torch.cat(waiting).split(at_once)
        waiting = [last]
        for images in full:
            run(images)
        # Fetch and write after the last bag of a shard, so that the GPU waits once a shard.
        if not left[number]:
            run(last)
            tokens = torch.cat(rows).cpu().numpy()  # [valid nodes of the shard, V, Dv]
            path = data.features_path(bags, number, name)
            data.write_whole(path, functools.partial(np.save, arr=tokens))
            waiting, rows = [], []


def load_tower(source, size):
    """Build an MRPLIP with the vision tower of a file: timm's, or CLIP's for a size of CLIP."""
    model = networks.MRPLIP(2, 1, **networks.SIZES[size])
    networks.adopt_vision(model, source)
    return model.eval()


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("data", metavar="DATA", help="folder with train/ and test/ shards")
    parser.add_argument("--vision", metavar="FILE", required=True, help="weights of the tower")
    parser.add_argument("--size", choices=networks.SIZES, default="paper", help="%(default)s")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (%(default)s)")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_tower(args.vision, args.size)
    name = networks.features_name(model)
    see = model.vision_tokens
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model.to(device)
        # Store the matrices in bf16, as train.py does, to cast them only once.
        for module in model.vision.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(torch.bfloat16)
        see = torch.compile(see)
    for split in ("train", "test"):
        bags = data.Bags(Path(args.data) / split)
        if bags.S != model.vision.size:
            sides = f"patches of {bags.S} px and {args.vision} reads {model.vision.size}"
            remedy = f"tile with --patch-px {model.vision.size}"
            raise ValueError(f"{bags.folder} holds {sides}: {remedy}")
        held = data.lock(bags.folder, ".features.lock") if rank == 0 else contextlib.nullcontext()
        with held:
            cache_features(see, bags, name, device, args.workers, rank, world)


if __name__ == "__main__":
    data.run_script(main, "finished shards are kept; the same command continues")
