"""Networks: one attention, one block; from them a vision tower, a text tower and one fusion network with four masks.

                      images                      captions, keywords
                        |                                |
                       ViT                           TextTower (causal, so a prefix never sees what follows)
                     /     \\                         /        \\
        class token ->      class + pooled grid     token       pooled at the end token
        projection v [d]    of patch tokens         features    projection w [d]
             \\________ ITC, CVTA ___ | ______________ | ___________/
                                      |                |
                                   Fusion: one transformer over [visual tokens ; text tokens]
                   full attention ------- image-text matching, masked language modelling
                   prefix mask ---------- prefix language modelling (and captioning)
                   [visual ; keywords] -- z, the text-guided representation MRTVA aligns across magnifications

Shape letters: N images or texts, B bags, S pixels per side, P patch tokens, V visual tokens of the fusion (1 + pool^2),
T text tokens, K keywords, L sequence length, D width, H heads, d the shared image-text space.

References
[1] MR-PLIP, CVPR 2025, section 3.         [2] Dosovitskiy et al. 2021, ViT.        [3] Radford et al. 2021, CLIP.
[4] Chen & He 2021, SimSiam (the heads).   [5] Touvron et al. 2021, LayerScale.     [6] Xiao et al. 2021 (the conv stem).
[7] Chen et al. 2024, UNI (ViT-L/16).      [8] Ikezogwo et al. 2023, QuiltNet.      [9] Holtzman et al. 2020, nucleus sampling.

    python model.py sizes                                     # parameters, FLOPs and memory of the named sizes, part by part
    python model.py caption RUN IMAGE ...                     # what a trained model says of pictures, and its keywords for them
    python model.py export RUN --to open_clip|huggingface     # both towers as a folder that those packages load
"""
import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # pixel statistics of UNI and most of timm
CLIP_STATS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))  # of CLIP, QuiltNet, PLIP

# Named sizes, as keyword arguments of the towers. `synthetic` learns within minutes on two CPU cores; `paper` is UNI [7]
# and QuiltNet's text tower [8] under a 6 x 768 fusion network. `quiltnet` has QuiltNet's image tower too (ViT-B/32, for those
# without UNI); `plip` is the same with the GELU of OpenAI's CLIP and of PLIP, which no weights file mentions.
CLIP_B32 = dict(size=224, patch=32, width=768, depth=12, heads=12, pre_norm=True, patch_bias=False, eps=1e-5, **CLIP_STATS)
CLIP_TEXT = dict(context=77, width=512, depth=12, heads=8)
FUSION = dict(width=768, depth=6, heads=12, pool=4)
SIZES = {
    "synthetic": dict(
        vision=dict(size=64, patch=16, width=128, depth=1, heads=4, stem="conv", layer_scale=0.1),
        text=dict(context=64, width=64, depth=1, heads=2),
        fusion=dict(width=64, depth=1, heads=2, pool=2),
        embed=128, simsiam=(128, 64)),
    "paper": dict(
        vision=dict(size=224, patch=16, width=1024, depth=24, heads=16, layer_scale=1e-5, **IMAGENET),
        text=CLIP_TEXT, fusion=FUSION, embed=512, simsiam=(2048, 512)),
    "quiltnet": dict(vision=CLIP_B32, text=CLIP_TEXT, fusion=FUSION, embed=512, simsiam=(2048, 512)),
    "plip": dict(vision=dict(CLIP_B32, quick=True), text=dict(CLIP_TEXT, quick=True), fusion=FUSION, embed=512, simsiam=(2048, 512)),
}


class Attention(nn.Module):
    """Multi-head self-attention with fused q, k, v. x [N, L, D] -> [N, L, D].

    mask: None, "causal", or bool broadcastable to [N, H, L, L], True where a query (row) may see a key (column).
    at [N]: the one position of each whose output is wanted: [N, 1, D], and the mask has that one row, [N, 1, 1, L]."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, at=None):
        """x [N, L, D] -> [N, L, D], or [N, 1, D] with at."""
        N, L, D = x.shape
        if at is None:
            q, k, v = self.qkv(x).view(N, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)      # each [N, H, L, D/H]
        else:  # keys and values of all, one query
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(pick(x, at), weight[:D], bias[:D]).view(N, 1, self.heads, -1).transpose(1, 2)                   # [N, H, 1, D/H]
            k, v = F.linear(x, weight[D:], bias[D:]).view(N, L, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        causal = isinstance(mask, str) and mask == "causal"
        x = scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal)  # [N, H, L or 1, D/H]
        return self.proj(x.transpose(1, 2).flatten(2))


def fingerprint(module):
    """Twelve digits of a hash of all weights of a network: the same whatever machine or precision it sits in."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(name.encode() + x.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def pick(x, at):
    """One token of each: x [N, L, D], at [N] -> [N, 1, D]."""
    return x[torch.arange(len(x), device=x.device), at][:, None]


class MLP(nn.Module):
    """Two layers with a GELU between, D -> 4D -> D. `quick` is OpenAI's x * sigmoid(1.702 x) instead of the exact GELU:
    weights trained with one give silently worse features under the other."""

    def __init__(self, width, quick=False):
        super().__init__()
        self.fc1, self.fc2, self.quick = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), quick

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block; `layer_scale`: LayerScale [5], a learned gain per channel on each branch that starts there."""

    def __init__(self, width, heads, eps=1e-5, layer_scale=0.0, quick=False):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads), MLP(width, quick)
        self.ls1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else 1.0
        self.ls2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else 1.0

    def forward(self, x, mask=None, at=None):
        """x [N, L, D] -> [N, L, D]; with at [N] only the token at that position of each: [N, 1, D]."""
        update = self.attn(self.ln1(x), mask, at)
        x = (x if at is None else pick(x, at)) + self.ls1 * update
        return x + self.ls2 * self.mlp(self.ln2(x))


class ViT(nn.Module):
    """Vision transformer [2]: images [N, 3, S, S] in [0, 1] -> tokens [N, 1 + P, D], class token first, after the final norm.

    stem "patch": one strided convolution, as timm, UNI and CLIP have it. `pre_norm`, no patch bias and `eps` are CLIP's dialect.
    The pixel statistics are buffers, saved with the weights: they belong to them, not to the data.
    stem "conv": five convolutions with batch norm, four of stride 2 [6], for training from scratch within minutes. Two more habits of
    small texture networks come with it: an image is centred on its own mean colour (a stain tells nothing), and the class
    token starts as the mean of the patch tokens, so that it is of use before attention is. dev/LOG.md has what each is worth."""

    def __init__(self, size=224, patch=16, width=768, depth=12, heads=12, stem="patch", layer_scale=0.0, pre_norm=False,
                 patch_bias=True, eps=1e-6, quick=False, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        if size % patch:
            raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
        self.size, self.patch, self.width, self.grid = size, patch, width, size // patch
        if stem not in ("patch", "conv"):
            raise ValueError(f'stem is "patch" or "conv", not {stem!r}')
        self.conv = stem == "conv"
        if not self.conv:
            self.stem = nn.Conv2d(3, width, patch, patch, bias=patch_bias)
        elif patch == 16:
            channels, strides = [3, width // 8, width // 4, width // 2, width // 2, width], (2, 2, 2, 1, 2)
            self.stem = nn.Sequential(*[m for i, o, stride in zip(channels, channels[1:], strides) for m in
                                        (nn.Conv2d(i, o, 3, stride, 1, bias=False), StemNorm(o), nn.ReLU())])
            self.stem.to(memory_format=torch.channels_last)                            # a fifth faster on a CPU
        else:
            raise ValueError(f'stem="conv" halves the image four times: patch must be 16, not {patch}')
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, eps, layer_scale, quick) for _ in range(depth))
        self.ln = nn.LayerNorm(width, eps)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        """images [N, 3, S, S] in [0, 1] -> tokens [N, 1 + P, D]."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            raise ValueError(f"this vision tower reads {self.size} x {self.size} images, not {tuple(images.shape[-2:])}")
        x = (images - (images.mean((2, 3), keepdim=True) if self.conv else self.mean)) / self.std
        if self.conv:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x.to(self.pos.dtype)).flatten(2).transpose(1, 2)                 # [N, D, g, g] -> [N, P, D]
        cls = self.cls + x.mean(1, keepdim=True) if self.conv else self.cls.expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1) + self.pos                                          # [N, 1 + P, D]
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.ln(x)


class TextTower(nn.Module):
    """CLIP's causal text transformer [3]: ids [N, T] -> (token features [N, T, D], pooled [N, d]).

    Pooled at the first end id (not at the largest id, as CLIP does: added ids such as [mask] would win). Being causal it
    needs no padding mask, and one encoding serves ITC, ITM and prefix language modelling alike."""

    def __init__(self, vocab, end, context=77, width=512, depth=12, heads=8, embed=512, eps=1e-5, quick=False):
        super().__init__()
        self.end, self.width = end, width
        self.embed = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, eps, quick=quick) for _ in range(depth))
        self.ln = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, embed, bias=False)

    def forward(self, ids):
        """ids [N, T] -> (tokens [N, T, D], pooled [N, d], not normalised)."""
        if ids.shape[1] > len(self.pos):
            raise ValueError(f"this text tower reads {len(self.pos)} ids, not {ids.shape[1]}: tokenizer.batch(texts, {len(self.pos)})")
        x = self.embed(ids) + self.pos[: ids.shape[1]]                                 # [N, T, D]
        for block in self.blocks:
            x = block(x, "causal")
        x = self.ln(x)
        end = (ids == self.end).int().argmax(1)                                        # [N] position of the first end id
        return x, self.proj(x[torch.arange(len(x), device=x.device), end])


def full(x):
    """x in fp32 at least: under autocast networks answer in bf16, a test may ask for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def text_valid(ids, end):
    """Real positions, the end id included: ids [N, T] -> bool [N, T]."""
    return (ids == end).int().cumsum(1) - (ids == end).int() == 0


class BatchNorm(nn.Module):
    """Batch normalisation over valid rows only, its statistics shared by all processes [4]: x [M, D], valid [M] -> [M, D].

    SimSiam learns little without it. Per-process statistics of a few bags would describe their tissue, not the data, and
    masked (blank) nodes would drag the mean; torch's SyncBatchNorm knows neither masks nor the CPU. No running averages:
    the heads serve training only."""

    def __init__(self, width, affine=True, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x, valid):
        """x [M, D], valid bool [M] -> [M, D] (rows that are not valid are normalised too, but do not count)."""
        x = full(x)
        w = valid.to(x.dtype).unsqueeze(1)                                             # [M, 1]
        total = torch.cat([(x * w).sum(0), w.sum().view(1)])                           # [D + 1] sum, count
        total = _all_sum(total)
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        var = _all_sum(((x - mean) ** 2 * w).sum(0)) / count                           # two passes: no cancellation
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


class AllSum(torch.autograd.Function):
    """Sum over processes. x enters the loss of every process, so its gradient is the sum of theirs: backward is forward."""

    @staticmethod
    def forward(ctx, x):
        """x of any shape -> the same."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def world_size():
    """Number of processes; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process; 0 where nothing is distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def _all_sum(x):
    """Sum over processes with its gradient; x itself where there is one process."""
    return AllSum.apply(x) if world_size() > 1 else x


class StemNorm(nn.BatchNorm2d):
    """Batch norm of x [N, D, h, w] whose statistics are those of all processes' images, so that their number does not change what is
    learned. torch's SyncBatchNorm knows no CPU. Blank patches count here: the tower will meet them, too."""

    def forward(self, x):
        """x [N, D, h, w] -> the same."""
        world = world_size()
        if not self.training or world == 1:
            return super().forward(x)
        y = full(x)
        mean = _all_sum(y.mean((0, 2, 3))) / world                                     # [D]
        var = _all_sum((y - mean[:, None, None]).square().mean((0, 2, 3))) / world
        with torch.no_grad():
            n = world * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (y * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


class Heads(nn.Module):
    """SimSiam's projector (3 layers, batch norm after each, the last without affine) and predictor (bottleneck of 1/4) [4]."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in ((width, hidden), (hidden, hidden), (hidden, out)))
        self.norms = nn.ModuleList([BatchNorm(hidden), BatchNorm(hidden), BatchNorm(out, affine=False)])
        self.squeeze, self.norm, self.predict = nn.Linear(out, out // 4, bias=False), BatchNorm(out // 4), nn.Linear(out // 4, out)

    def forward(self, z, valid):
        """z [M, D], valid [M] -> (h [M, out] predicted, g [M, out] projected): MRTVA compares h of one node with g of its kin."""
        for i, (linear, norm) in enumerate(zip(self.project, self.norms)):
            z = norm(linear(z), valid)
            z = F.relu(z) if i < 2 else z
        return self.predict(F.relu(self.norm(self.squeeze(z), valid))), z


class MRPLIP(nn.Module):
    """The whole model [1]. `vision`, `text`, `fusion`: keyword arguments as in SIZES; `vocab`, `end` from the tokenizer.

    Everything that trains is here; what is optimised and how is in losses.py and train.py."""

    def __init__(self, vocab, end, vision, text, fusion, embed, simsiam):
        super().__init__()
        self.vision = ViT(**vision)
        self.text = TextTower(vocab, end, embed=embed, **text)
        self.proj = nn.Linear(self.vision.width, embed, bias=False)                    # class token -> v in the shared space
        self.pool, self.grid = fusion["pool"], self.vision.grid
        D = fusion["width"]
        self.fuse_image = nn.Linear(self.vision.width, D)
        self.fuse_text = nn.Linear(self.text.width, D)
        self.fuse_keyword = nn.Linear(embed, D)
        self.kind = nn.Parameter(torch.zeros(3, D))                                    # type embedding: image, text, keyword
        self.fusion = nn.ModuleList(Block(D, fusion["heads"]) for _ in range(fusion["depth"]))
        self.fusion_ln = nn.LayerNorm(D)
        self.itm_head = nn.Linear(D, 2)
        self.lm_dense, self.lm_ln = nn.Linear(D, self.text.width), nn.LayerNorm(self.text.width)
        self.lm_head = nn.Linear(self.text.width, vocab)                                # not tied to the text tower's embedding, see init_weights
        self.heads = Heads(D, *simsiam)
        # Temperatures live as log(1/tau), as CLIP's do: whatever the optimiser makes of it, tau stays positive.
        self.itc_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.cvta_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.init_weights()

    def init_weights(self):
        """All weights in one place, nearly CLIP's way [3]: linear layers normal with std = fan-in^-1/2, the two that end a residual
        branch smaller by (2 depth)^-1/2, embeddings 0.02, positions and types 0.01. Convolutions and the SimSiam heads
        keep torch's own, biases start at zero and norms as the identity, but for the one before the words."""
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear) and not name.startswith("heads."):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for tower in (self.vision.blocks, self.text.blocks, self.fusion):
            for block in tower:
                block.attn.proj.weight.data.div_(math.sqrt(2 * len(tower)))
                block.mlp.fc2.weight.data.div_(math.sqrt(2 * len(tower)))
        nn.init.normal_(self.text.embed.weight, std=0.02)
        # Words are told by vectors of their own that start as the tower's embedding. The tower learns slowly, so that what it has read is not
        # lost; captions have to learn fast. Tied, either the captions ignore the picture or zero-shot suffers (dev/LOG.md).
        self.lm_head.weight.data.copy_(self.text.embed.weight.data)
        nn.init.constant_(self.lm_ln.weight, 25 / math.sqrt(self.text.width))           # logits start with std 0.5 at any width
        for p in (self.vision.cls, self.vision.pos, self.text.pos, self.kind):
            nn.init.normal_(p, std=0.01)

    def project(self, tokens):
        """Vision tokens [N, 1 + P, Dv] -> v [N, d], L2-normalised."""
        return F.normalize(full(self.proj(tokens[:, 0].to(self.proj.weight.dtype))), dim=-1)

    def encode_image(self, images):
        """images [N, 3, S, S] in [0, 1] -> [N, d], L2-normalised: what zero-shot and retrieval compare."""
        return self.project(self.vision(images))

    def encode_text(self, ids):
        """ids [N, T] -> [N, d], L2-normalised."""
        return F.normalize(full(self.text(ids)[1]), dim=-1)

    def see(self, images):
        """What is kept of an image: [N, 3, S, S] in [0, 1] -> [N, V, Dv], the class token and the patch grid averaged to pool x pool (windows
        overlap where the grid is no multiple; pool = 0: all patch tokens). That makes fusion affordable and a feature cache small."""
        return self.pooled(self.vision(images))                                        # of [N, 1 + P, Dv]

    def pooled(self, tokens):
        """The same of the vision tower's tokens [N, 1 + P, Dv] -> [N, V, Dv]."""
        if self.pool:
            grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [N, Dv, g, g]
            grid = F.adaptive_avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)   # [N, pool^2, Dv]
            tokens = torch.cat([tokens[:, :1], grid], 1)
        return tokens

    def visual_tokens(self, tokens):
        """What the fusion reads of an image: tokens [N, V, Dv] of `see` -> [N, V, D]."""
        return self.fuse_image(tokens.to(self.fuse_image.weight.dtype)) + self.kind[0]

    def fuse(self, x, mask, at=None):
        """The one fusion transformer: x [N, L, D], mask bool [N, 1, 1 or L, L] -> [N, L, D]. at [N]: one position of each is all that
        is wanted, [N, 1, D]; the last layer then computes no other."""
        for block in self.fusion[:-1]:
            x = block(x, mask)
        if at is not None and mask.shape[2] > 1:
            mask = pick(mask[:, 0], at)[:, None]                                       # [N, 1, 1, L]
        return self.fusion_ln(self.fusion[-1](x, mask, at))

    def fuse_with_text(self, visual, text, valid, prefix=None, at=None):
        """Joint encoding of images and captions: visual [N, V, D], text tokens [N, T, Dt], valid [N, T] -> fused text [N, T, D], or
        with at [N] the text token at that position alone, [N, D].

        prefix None: every position sees every real one (ITM, MLM). prefix [N] (positions in the prefix, start id
        included): image and prefix see each other, what follows is causal, so position i may predict token i + 1 (PLM)."""
        N, V, _ = visual.shape
        T = text.shape[1]
        x = torch.cat([visual, self.fuse_text(text) + self.kind[1]], 1)                # [N, V + T, D]
        mask = F.pad(valid, (V, 0), value=True)[:, None, None, :]                      # [N, 1, 1, V + T]
        if prefix is not None:
            seq = torch.arange(V + T, device=x.device)
            causal = seq[None, :] <= seq[:, None]                                      # [L, L] key not after query
            known = seq[None, :] < V + prefix[:, None]                                 # [N, L] image and prefix
            mask = mask & (causal | known[:, None, :])[:, None]                        # [N, 1, L, L]
        return self.fuse(x, mask)[:, V:] if at is None else self.fuse(x, mask, V + at)[:, 0]

    def fuse_with_keywords(self, visual, w, valid):
        """Text-guided visual representation z (E_mm of [1]): visual [N, V, D], keyword features w [N, k_o, d], valid [N, k_o]
        -> z [N, D], read at the visual class token. Keywords carry no position: their order cannot matter."""
        x = torch.cat([visual, self.fuse_keyword(w.to(visual.dtype)) + self.kind[2]], 1)   # [N, V + k_o, D]
        mask = F.pad(valid, (visual.shape[1], 0), value=True)[:, None, None, :]            # [N, 1, 1, V + k_o]
        return self.fuse(x, mask, valid.new_zeros(len(x), dtype=torch.long))[:, 0]

    def lm_logits(self, x):
        """Fused text features [..., D] -> vocabulary logits [..., vocab] (MLM and PLM)."""
        return self.lm_head(self.lm_ln(F.gelu(self.lm_dense(x))))

    @torch.no_grad()
    def caption(self, images, prefix="", *, tokenizer, max_tokens=64, top_p=0.0, generator=None):
        """Captions through the prefix mask: images [N, 3, S, S] in [0, 1] -> list of N str, each beginning with `prefix`, all as
        the tokenizer spells it (lower case, marks set apart). Model in eval mode.

        top_p 0 takes the likeliest token each time; else one is drawn from the fewest that together have probability top_p [9].
        A caption ends at its end id, or after max_tokens or the tower's context. Nothing is cached: T short passes are cheap enough to
        read. ValueError where the prefix leaves no room."""
        ids = torch.tensor([[tokenizer.start, *tokenizer.encode(prefix)]] * len(images), device=images.device).view(len(images), -1)       # [N, T]
        known, context, end, fill = ids.shape[1], len(self.text.pos), self.text.end, ids.new_full
        if known >= context:
            raise ValueError(f"the prefix has {known - 1} tokens and the text tower reads {context}: shorten it")
        visual = self.visual_tokens(self.see(images))                                  # [N, V, D]
        while ids.shape[1] < min(context, known + max_tokens) and not (ids == end).any(1).all():
            fused = self.fuse_with_text(visual, self.text(ids)[0], text_valid(ids, end), fill((len(ids),), known), fill((len(ids),), ids.shape[1] - 1))
            logits = self.lm_logits(fused).float()                                     # [N, vocab]
            logits[:, [tokenizer.start, tokenizer.mask]] = -torch.inf                  # never asked of it in training
            word = logits.argmax(-1, keepdim=True)                                     # [N, 1]
            if top_p:
                p, order = logits.softmax(-1).sort(descending=True)
                word = order.gather(1, torch.multinomial(p * (p.cumsum(-1) - p < top_p), 1, generator=generator))
            ids = torch.cat([ids, torch.where((ids == end).any(1, keepdim=True), end, word)], 1)           # what has ended stays so
        return [tokenizer.decode(row) for row in ids.tolist()]

    def flops(self, tokens=None, k_o=8):
        """Matrix-multiplication FLOPs (a multiply-add is two) of one forward pass of each part, convolutions and attention included:
        dict of part -> int, for one image, one caption of `tokens` ids (None: the context), one pair of them (match: read at one position), one
        image with k_o keywords. pixels is the part of vision whose input no gradient reaches: the first convolution."""
        def block(D, L, Q=None):  # keys and values of L tokens; queries, attention, projection and MLP of Q
            Q = Q or L
            return 2 * (2 * L * D * D + 2 * Q * L * D + (1 + 1 + 8) * Q * D * D)
        vision, text, T = self.vision, self.text, tokens or len(self.text.pos)
        Dv, Dt, d, D, V, depth = vision.width, text.width, len(self.proj.weight), len(self.fusion_ln.weight), 1 + (self.pool or vision.grid) ** 2, len(self.fusion)
        side, stem, pixels = vision.size, 0, 0
        for conv in (m for m in vision.stem.modules() if isinstance(m, nn.Conv2d)):
            side //= conv.stride[0]
            stem += 2 * side * side * conv.weight.numel()
            pixels = pixels or stem
        return {"pixels": pixels, "vision": stem + len(vision.blocks) * block(Dv, 1 + vision.grid ** 2), "project": 2 * Dv * d, "visual_tokens": 2 * V * Dv * D,
                "text": len(text.blocks) * block(Dt, T) + 2 * Dt * d,
                "fuse_with_text": 2 * T * Dt * D + depth * block(D, V + T), "match": 2 * T * Dt * D + (depth - 1) * block(D, V + T) + block(D, V + T, 1), "lm_logits": 2 * T * (D * Dt + Dt * self.lm_head.out_features),
                "fuse_with_keywords": 2 * k_o * d * D + (depth - 1) * block(D, V + k_o) + block(D, V + k_o, 1),
                "heads": sum(2 * m.weight.numel() for m in self.heads.modules() if isinstance(m, nn.Linear))}


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def saved_bytes(model, f):
    """Bytes that autograd keeps for the backward pass of f(), the model's weights not counted."""
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}       # tensors that share memory count once
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        f()
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in weights)


def print_sizes():
    """Every named size, part by part: parameters, forward FLOPs, bytes of the weights, bytes of weights + gradients + Adam's moments,
    and bytes kept for the backward pass of one item; all in fp32."""
    for name, size in SIZES.items():
        m = MRPLIP(1500 if name == "synthetic" else 49409, 48, **size)
        S, T, V = m.vision.size, len(m.text.pos), 1 + (m.pool or m.vision.grid) ** 2
        visual, valid, seen = torch.zeros(1, V, len(m.fusion_ln.weight)), torch.ones(1, T, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
        words, pictures, ids, text = torch.zeros(1, 8, len(m.proj.weight)), torch.zeros(1, 3, S, S), torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T, m.text.width)
        flops, fusion = m.flops(), [m.fuse_image, m.fuse_text, m.fuse_keyword, m.fusion, m.fusion_ln]
        rows = [(f"vision, an image of {S} px", [m.vision, m.proj], flops["vision"] + flops["project"], lambda: m.encode_image(pictures)),
                (f"text, {T} ids", [m.text], flops["text"], lambda: m.encode_text(ids)),
                (f"fusion, an image with {T} ids", fusion, flops["visual_tokens"] + flops["fuse_with_text"], lambda: m.fuse_with_text(visual, text, valid)),
                ("... with 8 keywords", [], flops["fuse_with_keywords"], lambda: m.fuse_with_keywords(visual, words, seen)),
                (f"word head, {T} ids", [m.lm_dense, m.lm_ln, m.lm_head], flops["lm_logits"], lambda: m.lm_logits(text.new_zeros(1, T, visual.shape[2]))),
                ("SimSiam heads, a node", [m.heads], flops["heads"], lambda: m.heads(visual[:, 0], valid[0, :1])[0])]
        print(f"{name:32} {'parameters':>12} {'GFLOP':>9} {'weights':>10} {'to train':>10} {'kept for backward':>19}")
        for part, modules, f, run in rows:
            n = sum(p.numel() for module in modules for p in module.parameters())
            print(f"  {part:30} {f'{n / 1e6:.2f} M' if n else '':>12} {f / 1e9:9.4f} {f'{4 * n / 1e6:.1f} MB' if n else '':>10} "
                  f"{f'{16 * n / 1e6:.1f} MB' if n else '':>10} {saved_bytes(m, run) / 1e6:16.1f} MB")
        n = sum(p.numel() for p in m.parameters())
        print(f"  {'all':30} {n / 1e6:10.2f} M {'':9} {4 * n / 1e6:7.1f} MB {16 * n / 1e6:7.1f} MB\n")
    print("fp32, one item each, no activation checkpointing. Under bf16 autocast about half is kept for backward; a frozen vision tower keeps nothing, and 2 bytes a weight.")


def open_picture(path):
    """A picture file -> PIL image, RGB. ValueError names the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has {image.mode} pixels, not 8-bit ones")
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is a slide, not a patch: cut it with `python data.py tile`") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a picture ({e}): give patches as PNG, JPEG or TIFF") from None


def read_picture(path, size):
    """A picture file -> [3, size, size] in [0, 1]: its largest centred square, resampled. ValueError names the file."""
    image = open_picture(path)
    side, (W, H) = min(image.size), image.size
    left, top = (W - side) // 2, (H - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def print_captions(run, paths, prefix="", top_p=0.0, best=5, seed=0):
    """A caption and the keywords closest in the shared space for each picture file, as they come -> how many could not be read."""
    from subjects import embed_texts, load_run
    device, failed = "cuda" if torch.cuda.is_available() else "cpu", 0
    (model, tokenizer), generator = load_run(run, device), torch.Generator(device).manual_seed(seed)
    listed = Path(run) / "keywords.json"
    words = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    if words:
        w = embed_texts(model, tokenizer, words)                                       # [K, d]
    else:
        print(f"{listed} is not there (train.py writes it): captions only", file=sys.stderr)
    for path in paths:
        try:
            image = read_picture(path, model.vision.size)[None].to(device)
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            failed += 1
            continue
        caption = model.caption(image, prefix, tokenizer=tokenizer, top_p=top_p, generator=generator)[0]
        print(f"{path}\n  {' '.join(caption.split())}")
        if words:
            with torch.no_grad():
                cosine, which = (model.encode_image(image).cpu() @ w.T)[0].topk(min(best, len(words)))
            print("  " + ", ".join(f"{words[i]} {c:.2f}" for c, i in zip(cosine.tolist(), which.tolist())))
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sizes")
    c = commands.add_parser("caption")
    c.add_argument("run", help="folder that train.py wrote")
    c.add_argument("images", nargs="+", help="picture files, each one patch at a magnification the model was trained on")
    c.add_argument("--prefix", default="", help="words the caption begins with")
    c.add_argument("--top-p", type=float, default=0.0, help="draw from the likeliest words that together have this probability (0: always the likeliest)")
    c.add_argument("--best", type=int, default=5, help="keywords shown (5)")
    c.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    c = commands.add_parser("export")
    c.add_argument("run")
    c.add_argument("--to", choices=("open_clip", "huggingface"), required=True)
    c.add_argument("--out", help="folder to write (RUN/open_clip or RUN/huggingface)")
    args = parser.parse_args()
    if args.command == "sizes":
        print_sizes()
    elif args.command == "caption":
        if args.best < 0:
            raise ValueError(f"--best counts keywords, so not {args.best}")
        if not 0 <= args.top_p <= 1:
            raise ValueError(f"--top-p is a probability between 0 and 1, not {args.top_p}")
        sys.exit(min(print_captions(args.run, args.images, args.prefix, args.top_p, args.best, args.seed), 100))
    else:
        import weights
        from subjects import load_run
        folder = weights.export(*load_run(args.run), args.out or Path(args.run) / args.to, args.to)
        print(f"wrote {folder}: image and text tower (fusion, captions and SimSiam heads have no place there)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
