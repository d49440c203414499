"""What a step sees: bags of 85 patches, and batch i as a function of (seed, i).

A bag [1, section 3.1] is one tissue region at four magnifications: a patch at 5x, its 4 children
at 10x, 16 at 20x and 64 at 40x, 85 patches in all. Four ideas carry this file.

1. A bag is one square image; its 2 x 2 average pyramid holds the 85 patches.
2. The patches are a 4-ary heap: children of node n are 4n+1 .. 4n+4, top left to bottom right.
3. Magnification means microns per pixel (mpp), 10 / magnification, never a file's stored level.
4. Batch i is a function of data, settings, seed and i, and holds all random numbers of its step.
   So a killed run needs no saved loader, and two processes see together what one would.

`python -m prepare.tile SLIDES --out DIR` makes the bags. Letters: B bags, N nodes, S pixels a side.
References: [1] MR-PLIP, CVPR 2025. [2] Ruifrok & Johnston 2001, stains. [3] Tellez et al. 2018,
stain augmentation.
"""

import contextlib
import ctypes
import fcntl
import functools
import io
import json
import os
import platform
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import text
from text import NODES

MAGS = (5, 10, 20, 40)


# ---------------------------------------------------------------- the 85 nodes

# Place each node on the 2^level x 2^level grid of its level.
LEVEL = np.repeat(np.arange(4), [1, 4, 16, 64])
ROW = np.zeros(NODES, np.int64)
COL = np.zeros(NODES, np.int64)
for child in range(1, NODES):
    ROW[child] = 2 * ROW[(child - 1) // 4] + (child - 1) % 4 // 2
    COL[child] = 2 * COL[(child - 1) // 4] + (child - 1) % 2


def mpp_of(mag):
    """Return the microns per pixel of a magnification: 2.0 at 5x, 0.25 at 40x.

    They are those of the scanned field of a patch, before it is scaled to S pixels.
    """
    return 10 / mag


def square(n, x, y, side):
    """Place node n of the bag (x, y, side) -> its (x, y, side); exact if 8 divides side."""
    cells = 2 ** LEVEL[n]
    place = (x + COL[n] * side // cells, y + ROW[n] * side // cells, side // cells)
    # JSON takes no integers of numpy.
    return tuple(map(int, place)) if isinstance(n, int) else place


def valid_nodes(mags, tissue, min_node=0.1):
    """Mark nodes that have enough tissue [..., 85] at a magnification of the slide -> bool."""
    return (np.asarray(tissue) >= min_node) & np.isin(MAGS, mags)[LEVEL]


# ---------------------------------------------------------------- bags as a dataset


def decode_jpeg(content):
    """Decode a bag's JPEG -> uint8 [h, w, 3]."""
    try:
        import imagecodecs
    except ImportError:
        # Pillow gives the same pixels.
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return imagecodecs.jpeg8_decode(content)


class Bags(Dataset):
    """All bags of a folder of shards. ValueError names file and remedy.

    bags[i] -> dict(key, slide, index, image uint8 [3, 8S, 8S], valid bool [85])
    .keys [n], .slides [n] names, .shards paths, .shard_of [n] numbers into them, .S patch side,
    .marks a checksum for each shard, which tells it from one that took its place,
    .valid bool [n, 85] (valid_nodes), .meta [n] rows of the index: x, y, side, mags, tissue, ...
    """

    def __init__(self, folder, min_node=0.1):
        self.folder = Path(folder)
        self.keys, self.slides, self.shards, self.marks = [], [], [], []
        shard_of, jpg, crc, valid, sizes = [], [], [], [], set()
        for path in sorted(self.folder.glob("bags-*.index.json")):
            index = read_json(path)
            rows = index["bags"]
            if not rows:
                continue
            # The last bag must end within the shard.
            shard = path.with_name(path.name.replace(".index.json", ".tar"))
            if not shard.exists() or shard.stat().st_size < sum(rows[-1]["jpg"]):
                state = f"{shard} is missing or truncated"
                raise ValueError(f"{state}: delete it, tile its slide again")
            self.keys += [row["key"] for row in rows]
            self.slides += [index["slide"]] * len(rows)
            shard_of += [len(self.shards)] * len(rows)
            jpg += [row["jpg"] for row in rows]
            # Shards of older versions have no checksums.
            crc += [row.get("crc", -1) for row in rows]
            valid.append(valid_nodes(rows[0]["mags"], [row["tissue"] for row in rows], min_node))
            self.shards.append(shard)
            self.marks.append(zlib.crc32(path.read_bytes()))
            sizes.add(index["patch_px"])
        if len(sizes) != 1:
            found = f"patches of {sorted(sizes)} pixels" if sizes else "no bags"
            make = f"`python -m prepare.tile SLIDES --out {folder}`"
            raise ValueError(f"{folder} holds {found}: make those of one size with {make}")
        self.S = sizes.pop()
        # Arrays need less memory than lists, in every worker of a loader.
        self.shard_of = np.array(shard_of)
        self.jpg = np.array(jpg)
        self.crc = np.array(crc)
        self.valid = torch.from_numpy(np.concatenate(valid))

    @functools.cached_property
    def meta(self):
        # Read these rows only where they are asked for: a training run needs none.
        rows = []
        for shard in self.shards:
            rows += read_json(shard.with_suffix(".index.json"))["bags"]
        return rows

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        shard = self.shards[self.shard_of[i]]
        # Read the JPEG alone: its place is known.
        offset, size = self.jpg[i]
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            # Damage may still decode.
            if self.crc[i] not in (-1, zlib.crc32(content)):
                raise ValueError("its checksum differs")
            image = torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
        except (RuntimeError, ValueError, OSError) as e:
            damage = f"{shard}: bag {self.keys[i]} is damaged, or was exchanged just now ({e!r})"
            remedy = "start again, or delete this file and tile its slide again"
            raise ValueError(f"{damage}: {remedy}") from None
        about = dict(key=self.keys[i], slide=self.slides[i], index=i)
        return dict(about, image=image, valid=self.valid[i])


def read_classes(path):
    """Read classes.json -> {"facts": {fact: {class: [names]}}, "templates"}."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        for classes in found["facts"].values():
            assert all(isinstance(names, list) and names for names in classes.values())
        assert all("{}" in template for template in found["templates"])
    except (ValueError, KeyError, AttributeError, TypeError, AssertionError):
        shown = "the form that `evaluate.py -h` shows"
        raise ValueError(f"{path} is not in {shown}: mend it") from None
    return found


# ---------------------------------------------------------------- pyramid and augmentation


def sample_nodes(B, b, generator):
    """Draw b of the 4 children at every kept node -> [B, N], N = 1 + b + b^2 + b^3."""
    # A row is a b-ary heap, siblings in rising order: entry j's parent is entry (j - 1) // b.
    heap = [torch.zeros(B, 1, dtype=torch.long)]
    for _ in range(3):
        rand = torch.rand(*heap[-1].shape, 4, generator=generator)
        chosen = rand.argsort(-1)[..., :b].sort(-1).values  # [B, n, b]
        heap.append((4 * heap[-1][..., None] + 1 + chosen).flatten(1))
    return torch.cat(heap, 1)


def pyramid(images, nodes=None):
    """Cut bags uint8 [B, 3, 8S, 8S] into patches -> float32 [B, N, 3, S, S] in [0, 1].

    nodes [B, N] are from sample_nodes; default: all.
    """
    B, S, device = len(images), images.shape[-1] // 8, images.device
    if nodes is None:
        nodes = torch.arange(NODES, device=device).expand(B, NODES)
    N = nodes.shape[1]
    b = {4: 1, 15: 2, 40: 3, 85: 4}[N]

    # Sum 2 x 2 pixels three times: a parent is exactly the mean of its children. Sums of bytes are
    # exact, and 64 x 255 fits in 16 bits.
    sums = [images]
    for _ in range(3):
        rows = sums[0][..., 0::2, :].to(torch.int16) + sums[0][..., 1::2, :]
        sums.insert(0, rows[..., 0::2] + rows[..., 1::2])

    # Find the place of each node.
    bag = torch.arange(B, device=device)[:, None]
    row = torch.from_numpy(ROW).to(device, non_blocking=True)[nodes]  # [B, N]
    col = torch.from_numpy(COL).to(device, non_blocking=True)[nodes]  # [B, N]
    patches = torch.empty(B, N, 3, S, S, device=device)
    first = 0
    for level in range(4):
        # The nodes of a level follow each other.
        part = slice(first, first + b**level)
        first = part.stop
        # Take the cells of the nodes, and divide their sums once.
        cells = sums[level].unflatten(3, (-1, S)).unflatten(2, (-1, S))  # [B, 3, rows, S, cols, S]
        cells = cells[bag, :, row[:, part], :, col[:, part]]  # [B, b^level, 3, S, S]
        patches[:, part].copy_(cells).div_(255 * 4 ** (3 - level))
    return patches


def flip(patches, flips):
    """Turn or mirror all patches of a bag alike: [B, ..., S, S], flips [B] in 0..7 -> the same."""
    # It equals turning the whole bag and renaming its nodes; no loss uses the names.
    # Of a number's bits, 4 transposes, then 1 mirrors left-right and 2 up-down: 8 symmetries.
    flips = flips.view(-1, *[1] * (patches.dim() - 1))
    patches = torch.where(flips & 4 > 0, patches.transpose(-1, -2), patches)
    patches = torch.where(flips & 1 > 0, patches.flip(-1), patches)
    return torch.where(flips & 2 > 0, patches.flip(-2), patches)


# Optical density of haematoxylin, eosin and a residual in red, green and blue [2]. The inverse is
# taken here, because a GPU would wait for it.
HED = [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]
HED = F.normalize(torch.tensor(HED))
UNMIX = torch.linalg.inv(HED)


def stain_jitter(patches, strength, rand):
    """Vary the staining, alike for all patches of a bag [3]: [B, ..., 3, S, S] in [0, 1]."""
    # Light is absorbed exponentially, so stains add up in optical density. There each gets a gain
    # 1 +- strength and an offset +- strength, from rand [B, 2, 3] in [0, 1).
    hed = HED.to(patches.device, non_blocking=True)
    unmix = UNMIX.to(patches.device, non_blocking=True)
    gain, offset = ((rand * 2 - 1) * strength).unbind(1)  # [B, 3], [B, 3]
    # Density -> stains, times the gain -> density: one matrix a bag.
    matrix = hed.T @ ((1 + gain)[:, :, None] * unmix.T)  # [B, 3, 3]
    ones = [1] * (patches.dim() - 4)
    # The logarithm of light is minus the density.
    light = patches.clamp(1 / 255, 1).log_()
    light = (matrix.view(-1, *ones, 3, 3) @ light.flatten(-2)).view_as(patches)
    return light.sub_((offset @ hed).view(-1, *ones, 3, 1, 1)).exp_().clamp_(max=1)


def augment(batch, jitter):
    """Cut, turn and stain a batch on its device -> patches [B, N, 3, S, S] in [0, 1].

    batch: "pixels" uint8 [B, 3, 8S, 8S], "nodes" [B, N]; optional "flips" [B], "stain" [B, 2, 3].
    jitter: strength of the stain jitter.
    """
    pixels = batch["pixels"]
    # Colours need float32: bfloat16 is no finer than a byte.
    with torch.autocast(pixels.device.type, enabled=False):
        patches = pyramid(pixels, batch["nodes"])
        if "flips" in batch:
            patches = flip(patches, batch["flips"])
        if "stain" in batch:
            patches = stain_jitter(patches, jitter, batch["stain"])
    return patches


# ---------------------------------------------------------------- batches


class Batches(Dataset):
    """Build micro-batch i: B bags, this process's share of the G bags of all processes.

    pixels         [B, 3, 8S, 8S] uint8   the bags, with stain [B, 2, 3] and flips [B], of which
                                          augment makes the patches
    patches        [B, N, 3, S, S]        what the networks read: made here if there is no GPU, else
                                          by to_device
    tokens         [B, N, V, Dv] float16  in place of pixels: cached features
    bag            [B]                    number of the bag: its patches are kin
    nodes          [B, N]                 node numbers 0 .. 84
    valid          [B, N] bool            it holds tissue, and the slide has its magnification
    told           [B, N] bool            it is valid and has a caption, as ITC, ITM, MLM, PLM need
    weight         [B, N]                 1 / (nodes of its magnification, valid or not), or 1; 0 if
                                          not valid
    ids            [B, N, T]              caption of each node
    caption_rows   [M]                    nodes that ITM, MLM and PLM read: bag x N + n
    rand_mask      [M, 3, context + 1]    uniform draws for MLM (the last column is spare),
                                          rand_prefix [M] for PLM, rand_negative [M, 2] for ITM
    keywords       [U, T]                 every distinct keyword; keyword_real [U]: no padding
    bag_keywords   [B, K]                 which of them a bag has; w_valid [B, K]: no padding
    own            [B, N, K] bool         the node's own caption names the keyword
    free           [B, N] bool            the node may select any keyword, not only its own
    """

    def __init__(self, bags, captions, tokenizer, corpus, cfg, context, rank=0, world=1):
        self.bags, self.captions, self.tokenizer, self.corpus = bags, captions, tokenizer, corpus
        self.cfg, self.context, self.rank, self.world = cfg, context, rank, world
        self.B = cfg.bags // (cfg.accumulate * world)
        self.M = max(1, round(cfg.pairs * self.B))
        self.sizes = torch.tensor([cfg.children**k for k in range(4)])  # nodes a magnification
        self.features, self.textual_bags, self.pixels = None, {}, {}
        # Augment here if there is no GPU: the loop computes meanwhile.
        self.augments = cfg.device == "cpu"
        # Keep decoded bags in memory if all fit: a CPU decodes longer than it does all else.
        loaders = world * max(1, cfg.workers)
        self.keep = loaders * len(bags) * 3 * (8 * bags.S) ** 2 < 2e9

    def __len__(self):
        return self.cfg.steps * self.cfg.accumulate

    def __getitem__(self, i):
        cfg, B, G = self.cfg, self.B, self.B * self.world
        mine = slice(self.rank * B, self.rank * B + B)
        # Draw for all G bags: what a bag gets must not depend on the process that has it.
        g = torch.Generator().manual_seed(hash((cfg.seed, i)) % 2**63)
        listed = [self.bag_at(i * G + j) for j in range(G)]
        index = listed[mine]
        nodes = sample_nodes(G, cfg.children, g)[mine]  # [B, N]
        valid = self.bags.valid[index].gather(1, nodes)  # [B, N]
        # Read the captions of the nodes.
        spoken = []
        for j, row in zip(index, nodes.tolist(), strict=True):
            said = self.captions[self.bags.keys[j]]
            spoken.append([said[n] or "" for n in row])
        told = valid & torch.tensor([list(map(bool, row)) for row in spoken])
        batch = {"bag": torch.tensor(index), "nodes": nodes, "valid": valid, "told": told}
        batch |= self.draw_caption_rows(told, g)
        free = torch.rand(G, nodes.shape[1], generator=g)[mine] < self.free_share(i)
        # A node without a caption selects among all keywords of the bag.
        batch["free"] = free | ~told
        batch["weight"] = valid.float()
        if cfg.balance:
            batch["weight"] = valid / self.sizes.repeat_interleave(self.sizes)

        ids = self.tokenizer.batch([c for row in spoken for c in row], self.context)
        if self.world == 1:  # several processes exchange rows, so theirs keep one length
            ids = text.trim(ids, self.tokenizer.end)
        batch["ids"] = ids.view(*nodes.shape, -1)
        batch |= self.find_keywords(index, listed if cfg.negatives == "batch" else index, spoken)

        # Pixels, with the draws of their augmentation; or the features of a frozen tower.
        if self.features:
            read = [self.features(j, row) for j, row in zip(index, nodes, strict=True)]
            return batch | {"tokens": torch.stack(read)}
        if cfg.flips:
            batch["flips"] = torch.randint(0, 8, (G,), generator=g)[mine]
        if cfg.jitter:
            batch["stain"] = torch.rand(G, 2, 3, generator=g)[mine]
        batch["pixels"] = torch.stack([self.read_pixels(j) for j in index])
        if self.augments:
            batch["patches"] = augment(batch, cfg.jitter)
            del batch["pixels"]
        return batch

    def bag_at(self, position):
        """Return the bag at a position in the endless row of epochs, each a new permutation."""
        epoch, offset = divmod(position, len(self.bags))
        if getattr(self, "epoch", None) != epoch:
            rng = np.random.default_rng([self.cfg.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(self.bags))
        return int(self.order[offset])

    def read_pixels(self, i):
        """Read bag i, uint8 [3, 8S, 8S]."""
        if i in self.pixels:
            return self.pixels[i]
        image = self.bags[i]["image"]
        if self.keep:
            self.pixels[i] = image
        return image

    def free_share(self, i):
        """Return the share of nodes that may select any keyword: 0, then a ramp to 1."""
        done = i // self.cfg.accumulate / self.cfg.steps
        bound = self.cfg.own_captions
        return min(1.0, max(0.0, (done - bound) / 0.1)) if bound else 1.0

    def draw_caption_rows(self, told, g):
        """Draw the M nodes that the caption losses read, and the random numbers of these rows."""
        (B, N), M = told.shape, self.M
        level = torch.arange(4).repeat_interleave(self.sizes)  # [N]
        shift = int(torch.randint(0, 4, (), generator=g))
        score = torch.rand(B * self.world, N, generator=g)[self.rank * B : self.rank * B + B]
        rows = []
        for k in range(M):
            # Magnifications take turns. If no node of one has a caption, take any that has one, and
            # no node twice. In a bag without captions any node stands in, and the masks drop it.
            bag, turn = k * B // M, (k + self.rank * M + shift) % 4
            best = int((score[bag] + told[bag] * (1 + (level == turn))).argmax())
            score[bag, best] -= 3
            rows.append(bag * N + best)
        out = {"caption_rows": torch.tensor(rows)}
        mine, total = slice(self.rank * M, self.rank * M + M), M * self.world
        mask = torch.rand(total, 3, self.context, generator=g)[mine]
        # Keep one column more than any caption: a slice that is the whole tensor would make the
        # compiler fix the length of captions.
        out["rand_mask"] = F.pad(mask, (0, 1))
        out["rand_prefix"] = torch.rand(total, generator=g)[mine]
        out["rand_negative"] = torch.rand(total, 2, generator=g)[mine]
        return out

    def textual_bag(self, i):
        """Return the keywords of bag i, at most K."""
        if i not in self.textual_bags:
            if len(self.textual_bags) == 4096:
                self.textual_bags.clear()
            captions = self.captions[self.bags.keys[i]]
            self.textual_bags[i] = text.keyword_bag(captions, self.cfg.keywords, self.corpus)
        return self.textual_bags[i]

    def find_keywords(self, index, listed, spoken):
        """Build the keyword tensors of bags `index`; U counts the keywords of bags `listed`."""
        B, N, K = len(index), len(spoken[0]), self.cfg.keywords
        # Two spellings in one batch are one keyword: they must not be negatives of each other.
        form = text.same if self.cfg.negatives == "batch" else str
        spelt = {form(k): k for i in listed for k in self.textual_bag(i)}
        distinct = sorted(spelt.values()) or [""]
        number = {form(k): u for u, k in enumerate(distinct)}
        bag_keywords = torch.zeros(B, K, dtype=torch.long)
        w_valid = torch.zeros(B, K, dtype=torch.bool)
        own = torch.zeros(B, N, K, dtype=torch.bool)
        for j, i in enumerate(index):
            bag = self.textual_bag(i)
            bag_keywords[j, : len(bag)] = torch.tensor([number[form(k)] for k in bag]).long()
            w_valid[j, : len(bag)] = True
            own[j, :, : len(bag)] = torch.from_numpy(text.keyword_owners(spoken[j], bag))
        # Pad U to a multiple of 64, so that the compiler sees few shapes.
        padded = distinct + [""] * (-len(distinct) % 64)
        ids = text.trim(self.tokenizer.batch(padded, self.context), self.tokenizer.end)
        out = {"keywords": ids, "keyword_real": torch.arange(len(padded)) < len(distinct)}
        return out | {"bag_keywords": bag_keywords, "w_valid": w_valid, "own": own}


def count_keywords(bags, captions, missing=0.0):
    """Count the keywords of all captions -> dict of text.count_corpus, kept beside the shards.

    It also counts the "untold", valid nodes of no caption. ValueError if these are more than the
    share `missing` of "valid".
    """
    path = bags.folder / "keywords.json"
    valid, untold = int(bags.valid.sum()), []
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in captions.files]
    # Another extractor of keywords counts anew.
    stamp = [bags.marks, zlib.crc32(Path(text.__file__).read_bytes()), stamp]

    def read():
        for i, key in enumerate(progress(bags.keys, "keywords", unit="bag")):
            said = captions[key]
            nodes = bags.valid[i].nonzero()[:, 0].tolist()
            silent = [n for n in nodes if not said[n]]
            if silent:
                untold.append((len(silent), f"node {silent[0]} of {key}"))
            yield from said

    corpus = read_json(path) if path.exists() else {}
    if corpus.get("stamp") != stamp:
        corpus = text.count_corpus(read()) | {"stamp": stamp, "valid": valid}
        corpus["untold"] = sum(count for count, _ in untold)
        corpus["first"] = untold[0][1] if untold else ""
        # Where nothing may be written, count at each start. Runs that start together take turns.
        with contextlib.suppress(OSError), lock(bags.folder, ".keywords.lock", wait=True):
            write_whole(path, json.dumps(corpus, ensure_ascii=False))
    if corpus["untold"] > missing * valid:
        state = f"{bags.folder}: {corpus['first']} has no caption, as {corpus['untold']} of {valid}"
        remedy = "give them one with `python -m prepare.captions`, or allow a share by --missing"
        raise ValueError(f"{state}: {remedy}")
    return corpus


def features_path(bags, number, name):
    """Return where the features of a shard are: the valid nodes of its bags [n, V, Dv], float16."""
    # Features of a shard that was exchanged since have another name.
    return bags.shards[number].with_suffix(f".{name}-{bags.marks[number]:08x}.npy")


def open_features(bags, name):
    """Open the features of this name (prepare.features) -> function (bag, nodes [N]) to tokens."""
    first = np.searchsorted(bags.shard_of, np.arange(len(bags.shards)))

    def read(i, nodes):
        number = bags.shard_of[i]
        path = features_path(bags, number, name)
        # Count the valid nodes of the shard up to each node of this bag.
        row = bags.valid[first[number] : i + 1].flatten().cumsum(0)[-NODES:] - 1  # [85]
        there = bags.valid[i][nodes]
        try:
            saved = np.load(path, mmap_mode="r")
            tokens = torch.zeros(len(nodes), *saved.shape[1:], dtype=torch.float16)  # [N, V, Dv]
            tokens[there] = torch.from_numpy(saved[row[nodes[there]].numpy()])
            return tokens
        except (ValueError, IndexError, OSError, EOFError) as e:
            remedy = "run `python -m prepare.features` on these shards"
            raise ValueError(f"{path} is missing or damaged ({e}): delete it, {remedy}") from None

    return read


def settle(_):
    """Prepare a loader process: the loop decides when to stop, and comes first on a CPU."""
    end_with_parent(signal.SIGKILL)
    os.nice(10)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def to_device(batch, cfg, device):
    """Move a batch to the device and augment its pixels there."""
    batch = {k: x.to(device, non_blocking=True) for k, x in batch.items()}
    if "pixels" in batch:
        batch["patches"] = augment(batch, cfg.jitter)  # [B, N, 3, S, S]
    if cfg.compile:
        # Let one graph serve all lengths of captions and all numbers of keywords.
        for name, axis in (("ids", 2), ("keywords", 0), ("keywords", 1), ("keyword_real", 0)):
            torch._dynamo.mark_dynamic(batch[name], axis)
    return batch


# ---------------------------------------------------------------- files and scripts


def write_whole(path, content):
    """Write bytes, str, or what a function writes into an open file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target, then rename: within one folder a rename is atomic.
    temp = path.with_name(f".{path.name}.tmp")
    # What a kill left there, or somebody's link to another file, goes.
    temp.unlink(missing_ok=True)
    try:
        with open(temp, "wb") as file:
            if callable(content):
                content(file)
                # A checkpoint must outlive a power cut: content before name.
                file.flush()
                os.fsync(file.fileno())
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:
        # torch.save says with a RuntimeError of many lines that a disk is full.
        reason = getattr(e, "strerror", "") or "is the disk full?"
        raise OSError(f"{path} cannot be written ({reason}): make room there") from e
    finally:
        temp.unlink(missing_ok=True)


def read_json(path):
    """Read JSON that a command of ours wrote. ValueError names the file."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): delete it, and repeat what wrote it") from None


def lock(folder, name=".lock", wait=False):
    """Keep a folder for this process -> the lock; closing frees it. ValueError names its owner."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Follow no link: the file that it points to would be emptied.
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read() or "another process"
        raise ValueError(f"{folder} is in use by {owner}: wait for its end") from None
    except OSError:
        pass  # some network file systems have no locks: go without
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def end_with_parent(name):
    """Ask Linux to send this process a signal when its parent ends; elsewhere go without."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, name)  # PR_SET_PDEATHSIG


def one_line(words):
    """Put a text from anywhere on one line, without control characters, to print or to draw."""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())


class Lines(tqdm):
    """Print tqdm's progress line by line, as a log wants it."""

    def display(self, *_, **__):
        print(self, file=sys.stderr)


def progress(*args, **more):
    """Show tqdm's bar on a terminal; elsewhere, as in the log of a job, a line a minute."""
    if sys.stderr.isatty():
        return tqdm(*args, **more)
    line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
    more |= dict(delay=60, mininterval=60, maxinterval=60, bar_format=line, leave=False)
    return Lines(*args, **more)


def run_script(main, stopped="nothing was written"):
    """Run a script's main: a mistake ends in one sentence, Ctrl-C says what is kept."""
    try:
        main()
    except (ValueError, OSError, MemoryError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print(f"\nstopped: {stopped}", file=sys.stderr)
        sys.exit(130)
