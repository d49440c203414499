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
[7] Chen et al. 2024, UNI (ViT-L/16).      [8] Ikezogwo et al. 2023, QuiltNet.
"""
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable  # collectives that carry gradients
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # pixel statistics of UNI and timm

# Named sizes, as keyword arguments of the towers. `synthetic` learns within minutes on two CPU cores; `paper` is UNI [7]
# and QuiltNet's text tower [8] under a 6 x 768 fusion network.
SIZES = {
    "synthetic": dict(
        vision=dict(size=64, patch=16, width=128, depth=1, heads=4, stem="conv", layer_scale=0.1),
        text=dict(context=64, width=64, depth=1, heads=2),
        fusion=dict(width=64, depth=1, heads=2, pool=2),
        embed=128, simsiam=(128, 64)),
    "paper": dict(
        vision=dict(size=224, patch=16, width=1024, depth=24, heads=16, layer_scale=1e-5, **IMAGENET),
        text=dict(context=77, width=512, depth=12, heads=8),
        fusion=dict(width=768, depth=6, heads=12, pool=4),
        embed=512, simsiam=(2048, 512)),
}


class Attention(nn.Module):
    """Multi-head self-attention with fused q, k, v. x [N, L, D] -> [N, L, D].

    mask: None, "causal", or bool broadcastable to [N, H, L, L], True where a query (row) may see a key (column)."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x [N, L, D] -> [N, L, D]."""
        N, L, D = x.shape
        q, k, v = self.qkv(x).view(N, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each [N, H, L, D/H]
        causal = isinstance(mask, str)
        x = scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal)  # [N, H, L, D/H]
        return self.proj(x.transpose(1, 2).reshape(N, L, D))


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

    def forward(self, x, mask=None):
        """x [N, L, D] -> [N, L, D]."""
        x = x + self.ls1 * self.attn(self.ln1(x), mask)
        return x + self.ls2 * self.mlp(self.ln2(x))


class ViT(nn.Module):
    """Vision transformer [2]: images [N, 3, S, S] in [0, 1] -> tokens [N, 1 + P, D], class token first, after the final norm.

    stem "patch": one strided convolution, as timm, UNI and CLIP have it. `pre_norm`, no patch bias and `eps` are CLIP's dialect.
    The pixel statistics are buffers: they belong to the weights, not to the data.
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
            sides, strides = [3, width // 8, width // 4, width // 2, width // 2, width], (2, 2, 2, 1, 2)
            self.stem = nn.Sequential(*[m for i, o, stride in zip(sides, sides[1:], strides) for m in
                                        (nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())])
            self.stem.to(memory_format=torch.channels_last)                            # a fifth faster on a CPU
        else:
            raise ValueError(f'stem="conv" halves the image four times: patch must be 16, not {patch}')
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, eps, layer_scale, quick) for _ in range(depth))
        self.ln = nn.LayerNorm(width, eps)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

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
        x = self.embed(ids) + self.pos[: ids.shape[1]]                                 # [N, T, D]
        for block in self.blocks:
            x = block(x, "causal")
        x = self.ln(x)
        end = (ids == self.end).int().argmax(1)                                        # [N] position of the first end id
        return x, self.proj(x[torch.arange(len(x), device=x.device), end])


def text_valid(ids, end):
    """Real positions, the end id included: ids [N, T] -> bool [N, T]."""
    return (ids == end).int().cumsum(1) - (ids == end).int() == 0


class BatchNorm(nn.Module):
    """Batch normalisation over valid rows only, its statistics shared by all processes [4]: x [M, D], valid [M] -> [M, D].

    SimSiam collapses without it. Per-process statistics of a few bags would describe their tissue, not the data, and
    masked (blank) nodes would drag the mean; torch's SyncBatchNorm knows neither masks nor the CPU. No running averages:
    the heads serve training only."""

    def __init__(self, width, affine=True, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x, valid):
        """x [M, D], valid bool [M] -> [M, D] (rows that are not valid are normalised too, but do not count)."""
        x = x.float()
        w = valid.float().unsqueeze(1)                                                 # [M, 1]
        total = torch.cat([(x * w).sum(0), w.sum().view(1)])                           # [D + 1] sum, count
        total = _all_sum(total)
        count = total[-1].clamp(min=1)
        mean = total[:-1] / count
        var = _all_sum(((x - mean) ** 2 * w).sum(0)) / count                           # two passes: no cancellation
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


def _all_sum(x):
    """Sum over processes with the gradient of a sum; x itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return differentiable.all_reduce(x)
    return x


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
        self.pool = fusion["pool"]
        D = fusion["width"]
        self.fuse_image = nn.Linear(self.vision.width, D)
        self.fuse_text = nn.Linear(self.text.width, D)
        self.fuse_keyword = nn.Linear(embed, D)
        self.kind = nn.Parameter(torch.zeros(3, D))                                    # type embedding: image, text, keyword
        self.fusion = nn.ModuleList(Block(D, fusion["heads"]) for _ in range(fusion["depth"]))
        self.fusion_ln = nn.LayerNorm(D)
        self.itm_head = nn.Linear(D, 2)
        self.lm_dense, self.lm_ln = nn.Linear(D, self.text.width), nn.LayerNorm(self.text.width)
        self.lm_bias = nn.Parameter(torch.zeros(vocab))
        self.heads = Heads(D, *simsiam)
        # Temperatures live as log(1/tau): multiplying logits is better conditioned than dividing, and 1/tau stays positive.
        self.itc_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.cvta_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.init_weights()

    def init_weights(self):
        """All weights in one place, CLIP's way [3]: linear layers normal with std = fan-in^-1/2, the two that end a residual
        branch smaller by (2 depth)^-1/2, embeddings 0.02, positions and types 0.01. Convolutions and the SimSiam heads
        keep torch's own, norms start as the identity and biases at zero."""
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
        for p in (self.vision.cls, self.vision.pos, self.text.pos, self.kind):
            nn.init.normal_(p, std=0.01)

    def project(self, tokens):
        """Vision tokens [N, 1 + P, Dv] -> v [N, d], L2-normalised."""
        return F.normalize(self.proj(tokens[:, 0].to(self.proj.weight.dtype)).float(), dim=-1)

    def encode_image(self, images):
        """images [N, 3, S, S] in [0, 1] -> [N, d], L2-normalised: what zero-shot and retrieval compare."""
        return self.project(self.vision(images))

    def encode_text(self, ids):
        """ids [N, T] -> [N, d], L2-normalised."""
        return F.normalize(self.text(ids)[1].float(), dim=-1)

    def visual_tokens(self, tokens):
        """What the fusion reads of an image: vision tokens [N, 1 + P, Dv] -> [N, 1 + pool^2, D] (pool = 0: all patch tokens).
        Averaging the patch grid to pool x pool makes fusion affordable and a feature cache of a frozen tower small."""
        N, _, D = tokens.shape
        if self.pool:
            g = self.vision.grid
            grid = tokens[:, 1:].transpose(1, 2).reshape(N, D, g, g)                   # [N, Dv, g, g]
            grid = F.adaptive_avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)   # [N, pool^2, Dv]
            tokens = torch.cat([tokens[:, :1], grid], 1)                               # [N, V, Dv]
        return self.fuse_image(tokens.to(self.fuse_image.weight.dtype)) + self.kind[0]

    def fuse(self, x, mask):
        """The one fusion transformer: x [N, L, D], mask bool [N, 1, 1 or L, L] -> [N, L, D]."""
        for block in self.fusion:
            x = block(x, mask)
        return self.fusion_ln(x)

    def fuse_with_text(self, visual, text, valid, prefix=None):
        """Joint encoding of images and captions: visual [N, V, D], text tokens [N, T, Dt], valid [N, T] -> fused text [N, T, D].

        prefix None: every position sees every real one (ITM, MLM). prefix [N] (positions in the prefix, start id
        included): image and prefix see each other, what follows is causal, so position i may predict token i + 1 (PLM)."""
        N, V, _ = visual.shape
        T = text.shape[1]
        x = torch.cat([visual, self.fuse_text(text) + self.kind[1]], 1)                # [N, V + T, D]
        mask = F.pad(valid, (V, 0), value=True)[:, None, None, :]                      # [N, 1, 1, V + T]
        if prefix is not None:
            at = torch.arange(V + T, device=x.device)
            causal = at[None, :] <= at[:, None]                                        # [L, L] key not after query
            known = at[None, :] < V + prefix[:, None]                                  # [N, L] image and prefix
            mask = mask & (causal | known[:, None, :])[:, None]                        # [N, 1, L, L]
        return self.fuse(x, mask)[:, V:]

    def fuse_with_keywords(self, visual, w, valid):
        """Text-guided visual representation z (E_mm of [1]): visual [N, V, D], keyword features w [N, k_o, d], valid [N, k_o]
        -> z [N, D], read at the visual class token. Keywords carry no position: their order cannot matter."""
        x = torch.cat([visual, self.fuse_keyword(w.to(visual.dtype)) + self.kind[2]], 1)   # [N, V + k_o, D]
        mask = F.pad(valid, (visual.shape[1], 0), value=True)[:, None, None, :]            # [N, 1, 1, V + k_o]
        return self.fuse(x, mask)[:, 0]

    def lm_logits(self, x):
        """Fused text features [M, D] -> vocabulary logits [M, vocab], tied to the text tower's embedding (MLM and PLM)."""
        return F.linear(self.lm_ln(F.gelu(self.lm_dense(x))), self.text.embed.weight, self.lm_bias)

    @torch.no_grad()
    def caption(self, images, start, max_tokens=40):
        """Greedy captions through the prefix mask: images [N, 3, S, S], id of the start token -> ids [N, T] (no start id; an
        end id closes each). The prefix is the start id alone; nothing is cached: T short passes are cheap enough to read."""
        visual = self.visual_tokens(self.vision(images))
        ids = torch.full((len(images), 1), start, device=images.device)
        prefix = torch.ones(len(images), dtype=torch.long, device=images.device)
        for _ in range(min(max_tokens, len(self.text.pos) - 1)):
            valid = text_valid(ids, self.text.end)
            fused = self.fuse_with_text(visual, self.text(ids)[0], valid, prefix)
            ids = torch.cat([ids, self.lm_logits(fused[:, -1]).argmax(-1, keepdim=True)], 1)
            if (ids == self.text.end).any(1).all():
                break
        return ids[:, 1:]
