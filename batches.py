"""What one training step sees: batches as a function of the step number, and the features of a frozen tower, computed once.

Three ideas carry this file:

1. Batch i is made from (seed, i) alone, for all processes together; each then takes its own rows. So a run that was killed needs no
   saved loader, two processes see what one would, and a run may go on with another number of them.
2. All chance is in the batch: which nodes, turns, stains, masks, prefixes, negatives. The networks and losses are functions of it,
   and no generator's state has to be saved.
3. Bytes travel, the device works: a bag crosses to the GPU as one uint8 picture, and is cut, turned and stained there (`augment`).

Shape letters: B bags of this process, G those of all processes, N nodes per bag, M patches that the caption losses read, U distinct
keywords, K keywords of a bag, S pixels per patch side, T text tokens, V visual tokens of the fusion, Dv the vision tower's width.

References: [1] MR-PLIP, CVPR 2025.
"""
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import losses
import model as networks
import synthetic
import text


def make_world(folder, train=300, test=60, size=1024, patch_px=64):
    """The built-in data through the real path: slides (synthetic.py) -> shards (data.py) -> captions. Every stage skips what
    is finished, so an interrupted run goes on where it stopped. Test slides follow the training slides: none is shared.
    Many small slides rather than few large ones: all patches of a slide share one stain and repeat one label."""
    slides = Path(folder) / "slides"
    paths = synthetic.make_slides(slides, train + test, seed=0, size=size)
    for shards, some in ((Path(folder) / "train", paths[:train]), (Path(folder) / "test", paths[train:])):
        data.tile(some, shards, patch_px=patch_px, fov_px=64, seed=0, workers=2 if len(some) > 100 else 1)   # a process starts longer than it tiles 60
        synthetic.describe(shards, slides, seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def number(word):
    """A keyword as an integer, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") >> 1


class Batches(Dataset):
    """Batch number i, the rows of this process: see the top of the file. What it holds is listed in `Objective.forward`.

    Every epoch is a new permutation of all bags, dealt out in order: each bag is seen once an epoch, whatever the number of processes.
    Draws are made for all G bags of a batch, so that those of a bag do not depend on which process has it."""

    def __init__(self, bags, tokenizer, cfg, context, rank=0, world=1, features=None, corpus=None):
        self.bags, self.tokenizer, self.cfg, self.context, self.rank, self.world, self.features = bags, tokenizer, cfg, context, rank, world, features
        self.local = cfg.bags // (cfg.accumulate * world)
        self.corpus, self.textual_bag = corpus or text.count_corpus(bags.folder), {}   # bag index -> its keywords, 4,096 at most
        self.kept, self.room = {}, cfg.ram * 1e9                                       # bag index -> its pixels, and the bytes left for more

    def __getitem__(self, i):
        cfg, B, G, step = self.cfg, self.local, self.local * self.world, i // self.cfg.accumulate
        g, mine = torch.Generator().manual_seed(hash((cfg.seed, i)) % 2 ** 63), slice(self.rank * B, self.rank * B + B)
        index = [self._at(i * G + self.rank * B + j) for j in range(B)]
        nodes = data.sample_nodes(G, cfg.children, g)[mine]                            # [B, N]
        valid = self.bags.valid[index].gather(1, nodes)                                # [B, N]
        pairs, lots = self._pairs(valid, g), self._lots(g)
        captions = [[c or "" for c in self.bags.captions(j, row)] for j, row in zip(index, nodes.tolist())]
        batch = {"bag": torch.tensor(index), "nodes": nodes, "valid": valid, "pairs": pairs, **lots, **self._words(index, captions),
                 "ids": self._encode([c for row in captions for c in row]).view(B, nodes.shape[1], -1),
                 "free": torch.rand(G, nodes.shape[1], generator=g)[mine] < self._passed(step),   # [B, N] no longer bound to the keywords of their own caption
                 "alpha": torch.tensor(cfg.alpha * min(1, step * cfg.bags / len(self.bags)))}     # over the first epoch, as ALBEF
        if self.features:
            batch["tokens"] = torch.stack([self.features.read(j, row) for j, row in zip(index, nodes)])  # [B, N, V, Dv]
            return batch
        if cfg.turns:
            batch["turns"] = torch.randint(0, 8, (G,), generator=g)[mine]
        if cfg.jitter:
            batch["stain"] = torch.rand(G, 2, 3, generator=g)[mine]
        window = [None] * B
        if cfg.scale_jitter:
            side = 1 - cfg.scale_jitter * torch.rand(G, 1, generator=g)
            window = torch.cat([side, (1 - side) * torch.rand(G, 2, generator=g)], 1)[mine].split(1)     # B of [1, 3]
        pixels = [self._pixels(j) for j in index]
        if cfg.device == "cuda":
            return batch | {"pixels": torch.cat(pixels)} | ({"window": torch.cat(window)} if cfg.scale_jitter else {})    # [B, 3, 8S, 8S], [B, 3]
        # on a CPU each bag is cut while it is in the cache
        return batch | {"pixels": torch.cat([cut(*one) for one in zip(pixels, nodes.split(1), window)])}                  # [B, N, 3, S, S]

    def _pixels(self, i):
        """Bag number i, uint8 [1, 3, 8S, 8S], or where this process will cut it as it is, its magnifications (data.levels). What was read once
        stays in memory, as far as `ram` reaches: decoding a bag and summing its levels takes a CPU longer than all else a batch needs."""
        if i in self.kept:
            return self.kept[i]
        found = self.bags[i]["image"][None]
        if not (self.cfg.device == "cuda" or self.cfg.scale_jitter):
            found = data.levels(found)
        size = sum(x.nbytes for x in found)
        if size <= self.room:
            self.kept[i], self.room = found, self.room - size
        return found

    def __len__(self):
        return self.cfg.steps * self.cfg.accumulate

    def _at(self, position):
        epoch, offset = divmod(position, len(self.bags))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.bags))
        return int(self._order[offset])

    def _passed(self, step):
        """Share of the nodes that select keywords by similarity at this optimiser step: 0 at first, 1 at the end."""
        cfg = self.cfg
        return 0 if cfg.cvta_select == "own" else min(1, max(0, (step / cfg.steps - cfg.warm) / max(cfg.hand, 1e-9)))

    def rows(self):
        """How many patches of this process ITM, MLM and PLM read: M."""
        return max(1, round(self.cfg.pairs * self.local))

    def _pairs(self, valid, g):
        """Which patches these are: [M] numbers into B * N. Bags in order, magnifications in turn, inside one a valid node at random
        (where none is, an invalid one: the masks drop it)."""
        (B, N), M = valid.shape, self.rows()
        sizes, shift = losses.level_sizes(N, self.cfg.children), int(torch.randint(0, 4, (), generator=g))
        score = valid + torch.rand(B * self.world, N, generator=g)[self.rank * B : self.rank * B + B]     # [B, N]
        best = [level.argmax(1) + sum(sizes[:k]) for k, level in enumerate(score.split(sizes, 1))]     # of each level, [B]
        k = torch.arange(M)
        bag, level = k * B // M, (k + self.rank * M + shift) % len(sizes)
        return bag * N + torch.stack(best, 1)[bag, level]

    def _lots(self, g):
        """Uniform numbers in [0, 1) for what is drawn per row: MLM's masks, PLM's prefix, ITM's negatives.

        The masks get a column more than any caption has ids. A slice of all columns would be the tensor itself,
        and the compiler would take its length for fixed."""
        M = self.rows()
        mine = slice(self.rank * M, self.rank * M + M)
        shapes = {"lot_mask": (3, self.context), "lot_prefix": (), "lot_negative": (2,)}
        lots = {name: torch.rand(M * self.world, *shape, generator=g)[mine] for name, shape in shapes.items()}
        return lots | {"lot_mask": torch.nn.functional.pad(lots["lot_mask"], (0, 1))}

    def _words(self, index, captions):
        """The textual bags: tensors about the keywords of each bag, and every distinct keyword once."""
        K, B, N = self.cfg.keywords, len(captions), len(captions[0])
        words, own, w_valid = [], torch.zeros(B, N, K, dtype=torch.bool), torch.zeros(B, K, dtype=torch.bool)
        for j, key in enumerate(index):
            if key not in self.textual_bag:
                if len(self.textual_bag) == 4096:
                    self.textual_bag.clear()
                self.textual_bag[key] = text.keyword_bag(self.bags.captions(key), K, self.corpus)
            words.append(self.textual_bag[key])
            own[j, :, : len(words[j])] = torch.from_numpy(text.keyword_owners(captions[j], words[j]))
            w_valid[j, : len(words[j])] = True
        unique = sorted({k for bag in words for k in bag}) or [""]                     # each keyword is encoded once a batch
        at = {k: u for u, k in enumerate(unique)}
        bag_of = torch.tensor([[at[k] for k in bag] + [0] * (K - len(bag)) for bag in words])
        word = torch.tensor([number(k) for k in unique])[bag_of]                       # [B, K]
        unique += [""] * (-len(unique) % 64)                                           # few distinct shapes for the compiler
        ids = text.trim(self.tokenizer.batch(unique, self.context), self.tokenizer.end)
        return {"keywords": ids, "bag_of": bag_of, "word": word, "w_valid": w_valid, "own": own}

    def _encode(self, captions):
        """Captions -> ids [B N, T], as long as the longest; with several processes as long as can be, for they exchange rows."""
        ids = self.tokenizer.batch(captions, self.context)
        return ids if self.world > 1 else text.trim(ids, self.tokenizer.end)


def cut(bags, nodes, window=None):
    """Bags, uint8 [B, 3, 8S, 8S] or the magnifications of data.levels -> patches of `nodes` [B, N], in the `window` [B, 3] of each: float [B, N, 3, S, S]."""
    if window is not None:
        bags = data.zoom(bags, window)
    return data.cut(bags if isinstance(bags, list) else data.levels(bags), nodes=nodes)


def augment(batch, jitter):
    """batch -> its patches [B, N, 3, S, S] in [0, 1], cut from the bags, turned, mirrored and stained, on whatever device they are.

    In fp32 also under autocast: colours and coordinates have more digits than bf16."""
    patches = batch["pixels"]
    with torch.autocast(patches.device.type, enabled=False):
        if patches.dim() == 4:
            patches = cut(patches, batch["nodes"], batch.get("window"))
        if "turns" in batch:
            patches = data.turn(patches, batch["turns"])
        return data.stain_jitter(patches, jitter, batch["stain"]) if "stain" in batch else patches


def ahead(loader, device):
    """Batches of a loader on the device. On a GPU the next one is copied, on a stream of its own, while this one is worked on."""
    if device != "cuda":
        yield from loader
        return
    stream, ready = torch.cuda.Stream(), None
    for batch in loader:
        with torch.cuda.stream(stream):
            coming = {k: x.to(device, non_blocking=True) for k, x in batch.items()}
        if ready is not None:
            yield ready
        torch.cuda.current_stream().wait_stream(stream)
        for x in coming.values():
            x.record_stream(torch.cuda.current_stream())  # or its memory might be given away while the step still reads it
        ready = coming
    if ready is not None:
        yield ready


# ----------------------------------------------------------------------------------------------------------------------
# The features of a frozen tower: UNI reads 34 million patches once and not once an epoch

class Features:
    """Vision tokens of all bags of a folder, computed before: `read(i, nodes [N])` -> float16 [N, V, Dv].

    One file a shard beside it, bags-000000.<name>.npy, float16 [bags, 85, V, Dv], read where it is asked for."""

    def __init__(self, bags, name):
        self.paths, self.shards, self.shard_of = [shard.with_suffix(f".{name}.npy") for shard in bags.shards], bags.shards, bags.shard_of
        self.first = np.searchsorted(bags.shard_of, np.arange(len(bags.shards) + 1)).tolist()  # shard number k holds bags first[k] .. first[k + 1] - 1

    def finished(self, k):
        """Are the features of shard number k there, and of this shard, not of one that was tiled anew since?"""
        return self.paths[k].exists() and self.paths[k].stat().st_mtime >= self.shards[k].stat().st_mtime

    def read(self, i, nodes):
        """Bag number i, node numbers nodes [N] -> float16 [N, V, Dv]."""
        shard = self.shard_of[i]
        return torch.from_numpy(np.load(self.paths[shard], mmap_mode="r")[i - self.first[shard], nodes.numpy()])


def features_name(model, size):
    """What the features of a model's vision tower are called: a hash of its size (a key of model.SIZES) and weights and of the tokens that are
    kept, and the pixels it reads."""
    digest = hashlib.sha256(f"{size} {model.pool} {networks.fingerprint(model.vision)}".encode())
    return f"{digest.hexdigest()[:12]}-{model.vision.size}"


@torch.no_grad()
def cache_features(see, bags, name, device, rank=0, world=1, workers=0):
    """One pass of the vision tower over all bags of a folder, shards dealt out to the processes; shards that are finished are skipped, so
    the same call continues. see: `model.see`, compiled or not; images [85, 3, S, S] -> tokens [85, V, Dv]."""
    features = Features(bags, name)
    todo = [k for k in range(rank, len(features.paths), world) if not features.finished(k)]    # dealt out by number: the others are at work meanwhile
    order = [i for k in todo for i in range(*features.first[k : k + 2])]
    loader = DataLoader(bags, batch_size=None, sampler=order, num_workers=workers, pin_memory=device == "cuda", prefetch_factor=4 if workers else None)
    rows, late = [], None

    def keep():
        """The tokens of the bag before; a GPU has this one to do meanwhile."""
        if late[1]:
            late[1].synchronize()
        rows.append(late[0].numpy())

    for item in tqdm(loader, desc="features", unit="bag", disable=None if rank == 0 else True, dynamic_ncols=True):
        image = item["image"][None].to(device, non_blocking=True)
        tokens, copied = see(data.pyramid(image)[0]).to(torch.float16), None           # [85, V, Dv]
        if device == "cuda":
            there, copied = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True), torch.cuda.Event()
            tokens = there.copy_(tokens, non_blocking=True)
            copied.record()
        if late:
            keep()
        late, shard = (tokens, copied), bags.shard_of[item["index"]]
        if item["index"] + 1 == features.first[shard + 1]:
            keep()
            content = io.BytesIO()
            np.save(content, np.stack(rows))
            data.replace_file(features.paths[shard], content.getbuffer())
            rows, late = [], None
