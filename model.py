"""The networks: one attention, one block, and from them a vision tower, a text tower and a fusion.

                 images                          captions, keywords
                    |                                    |
                   ViT                   TextTower (causal: a prefix never sees what follows)
                 /     \\                           /          \\
      class token       class + pooled grid      text tokens     pooled at the end token
       to_shared              to_fusion               |               projection
           |                      |                   |                   |
           v [d]                  |                   |                 t, w [d]
     ITC, CVTA: with t, w         |                   |        ITC, CVTA: with v
                                  |                   |
          fusion: one transformer over [image tokens ; text tokens, or k_o keywords]
        full mask        image-text matching and masked language modelling
        prefix mask      prefix language modelling and captioning
        causal mask      next word without an image (prepare/words.py)
        keywords         in place of text: z, the text-guided representation that MRTVA aligns

Shape letters: N images or texts, S pixels a side, P patch tokens, V image tokens of the fusion
(1 + pool^2), T text tokens, K keywords, L tokens of a sequence, D width, H heads, d shared space.

[1] MR-PLIP, CVPR 2025, section 3. [2] Dosovitskiy et al. 2021, ViT. [3] Radford et al. 2021, CLIP.
[4] Touvron et al. 2021, LayerScale. [5] Xiao et al. 2021, conv stems. [6] Chen et al. 2024, UNI
(ViT-L/16). [7] Ikezogwo et al. 2023, QuiltNet (CLIP's ViT-B/32).
"""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# Mean and deviation of the pixels that a family of weights was trained on.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Named sizes, as arguments of MRPLIP. `synthetic` learns in minutes on two CPU cores; `paper` has
# UNI [6] and QuiltNet's text [7], `quiltnet` QuiltNet's image tower too; `plip` has OpenAI's GELU.
CLIP_B32 = dict(size=224, patch=32, width=768, depth=12, heads=12, clip=True, stats=CLIP_STATS)
CLIP_TEXT = dict(context=77, width=512, depth=12, heads=8)
UNI = dict(size=224, patch=16, width=1024, depth=24, heads=16, layer_scale=1e-5)
PAPER = dict(fusion=dict(width=768, depth=6, heads=12, pool=4), embed=512, simsiam=(2048, 512))
SMALL = dict(size=64, patch=16, width=128, depth=1, heads=4, layer_scale=0.1, stats=HALF)
SMALL_TEXT = dict(context=64, width=64, depth=1, heads=2)
SYNTHETIC = dict(fusion=dict(width=64, depth=1, heads=2, pool=2), embed=128, simsiam=(128, 64))
SIZES = {
    "synthetic": dict(vision=dict(SMALL, stem="conv"), text=SMALL_TEXT, **SYNTHETIC),
    "paper": dict(vision=UNI, text=CLIP_TEXT, **PAPER),
    "quiltnet": dict(vision=CLIP_B32, text=CLIP_TEXT, **PAPER),
    "plip": dict(vision=dict(CLIP_B32, quick=True), text=dict(CLIP_TEXT, quick=True), **PAPER),
}


# --------------------------------------------------------------------------------------------------
# Many processes. Each call is the identity where there is one process.


def world_size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


class AllSum(torch.autograd.Function):
    """Sum over processes. The sum enters every process's loss, so backward sums as well."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward


def all_sum(x):
    """Sum x over processes, with its gradient."""
    return AllSum.apply(x) if world_size() > 1 else x


def full(x):
    """Cast x to fp32 at least. Autocast makes networks answer in bf16; a test may ask for fp64."""
    return x if x.dtype == torch.float64 else x.float()


class Attention(nn.Module):
    """Multi-head self-attention with fused queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, causal=False):
        """Attend in x [N, L, D]; mask: bool [N or 1, 1, L or 1, L], True where a key is seen."""
        N, L, D = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, L, D/H]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(x.transpose(1, 2).flatten(2))  # [N, L, D]


class MLP(nn.Module):
    """Two layers with a GELU between them, D -> 4D -> D; quick: OpenAI's x * sigmoid(1.702 x)."""

    def __init__(self, width, quick=False):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.quick = quick

    def forward(self, x):
        """Map x [..., D] to [..., D]."""
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        return self.fc2(x)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch [4]."""

    def __init__(self, width, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x):
        """Scale x [..., D]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block in timm's names, so UNI loads as it is; layer_scale 0: without."""

    def __init__(self, width, heads, eps=1e-5, layer_scale=0.0, quick=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, quick)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x, mask=None, causal=False):
        """Map x [N, L, D] to [N, L, D]; mask and causal as in Attention."""
        x = x + self.ls1(self.attn(self.norm1(x), mask, causal))
        return x + self.ls2(self.mlp(self.norm2(x)))


class StemNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, so that their number changes nothing."""

    def forward(self, x):
        """Normalise x [N, D, h, w]."""
        world = world_size()
        if not self.training or world == 1:
            return super().forward(x)
        y = full(x)
        mean = all_sum(y.mean((0, 2, 3))) / world  # [D]
        var = all_sum((y - mean[:, None, None]).square().mean((0, 2, 3))) / world  # [D]
        with torch.no_grad():
            n = world * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (y * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class ViT(nn.Module):
    """Vision transformer [2]: images [N, 3, S, S] in [0, 1] -> tokens [N, 1 + P, D], class first.

    stem "patch": one strided convolution, as in timm, UNI and CLIP. dialect: clip=True for CLIP's
    norm before the blocks, its eps, and no bias; quick: OpenAI's GELU; eps; stats of the pixels.

    stem "conv": five convolutions with batch norm, four of them strided [5], to learn from scratch
    within minutes. It centres each image on its own mean colour, because the stain tells nothing,
    and adds the mean patch token to the class token, which is then of use before attention is.
    """

    def __init__(self, size, patch, width, depth, heads, stem="patch", layer_scale=0.0, **dialect):
        super().__init__()
        clip, quick = dialect.get("clip", False), dialect.get("quick", False)
        self.stats = dialect.get("stats", IMAGENET)
        eps = dialect.get("eps", 1e-5 if clip else 1e-6)
        if size % patch or stem == "conv" and patch != 16:
            raise ValueError(f"an image of {size} px with a {stem} stem has no patches of {patch}")
        self.size, self.patch, self.width, self.grid = size, patch, width, size // patch
        self.conv = stem == "conv"
        self.patch_embed = conv_stem(width) if self.conv else nn.Sequential()
        if not self.conv:
            self.patch_embed.proj = nn.Conv2d(3, width, patch, patch, bias=not clip)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        block = (width, heads, eps, layer_scale, quick)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        for name, x in zip(("mean", "std"), self.stats, strict=True):
            self.register_buffer(name, torch.tensor(x).view(1, 3, 1, 1))

    def forward(self, images):
        """Encode images [N, 3, S, S] in [0, 1] to tokens [N, 1 + P, D]."""
        if images.shape[-2:] != (self.size, self.size):
            shape = tuple(images.shape[-2:])
            raise ValueError(f"this vision tower reads {self.size} x {self.size} px, not {shape}")
        mean = images.mean((2, 3), keepdim=True) if self.conv else self.mean
        x = ((images - mean) / self.std).to(self.pos_embed.dtype)
        if self.conv:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # [N, D, g, g] -> [N, P, D]
        cls = self.cls_token.expand(len(x), -1, -1)
        if self.conv:
            cls = cls + x.mean(1, keepdim=True)
        x = self.norm_pre(torch.cat([cls, x], 1) + self.pos_embed)  # [N, 1 + P, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def conv_stem(width):
    """Build the convolutional stem [5]: [N, 3, S, S] -> [N, width, S / 16, S / 16]."""
    channels = [3, width // 8, width // 4, width // 2, width // 2, width]
    layers = []
    for i, stride in enumerate((2, 2, 2, 1, 2)):
        layers.append(nn.Conv2d(channels[i], channels[i + 1], 3, stride, 1, bias=False))
        layers.append(StemNorm(channels[i + 1]))
        layers.append(nn.ReLU())
    # A CPU convolves a fifth faster with the channels last in memory.
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class TextTower(nn.Module):
    """CLIP's causal text transformer [3]: ids [N, T] -> (tokens [N, T, D], embedding [N, d]).

    It pools at the first end id. (CLIP pools at the largest, but [mask] is larger.) Because it is
    causal it needs no padding mask, and one encoding serves ITC, ITM and prefix language modelling.
    """

    def __init__(self, vocab, end, context, width, depth, heads, embed, eps=1e-5, quick=False):
        super().__init__()
        self.end, self.context, self.width = end, context, width
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, eps, quick=quick) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, embed, bias=False)

    def forward(self, ids):
        """Encode ids [N, T] to text tokens [N, T, D] and pooled [N, d], not normalised."""
        T = ids.shape[1]
        if T > self.context:
            raise ValueError(f"this text tower reads {self.context} ids, not {T}: cut the texts")
        x = self.token_embedding(ids) + self.positional_embedding[:T]  # [N, T, D]
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.norm(x)
        end = (ids == self.end).int().argmax(1)  # [N] position of the first end id
        return x, self.proj(x[torch.arange(len(x), device=x.device), end])


def real_tokens(ids, end):
    """Mark the positions of ids [N, T] up to the first end id, which is included: bool [N, T]."""
    is_end = (ids == end).int()
    return is_end.cumsum(1) - is_end == 0


class MRPLIP(nn.Module):
    """All networks but MRTVA's heads [1]. vision, text, fusion: keyword arguments as in SIZES."""

    def __init__(self, vocab, end, vision, text, fusion, embed, simsiam):
        super().__init__()
        self.vision = ViT(**vision)
        self.text = TextTower(vocab, end, embed=embed, **text)
        self.proj = nn.Linear(self.vision.width, embed, bias=False)
        self.pool = fusion["pool"]
        D = fusion["width"]
        self.fuse_image = nn.Linear(self.vision.width, D)
        self.fuse_text = nn.Linear(self.text.width, D)
        self.fuse_keyword = nn.Linear(embed, D)
        self.kind = nn.Parameter(torch.zeros(3, D))  # type embedding: image, text, keyword
        blocks = [Block(D, fusion["heads"]) for _ in range(fusion["depth"])]
        self.fusion = nn.ModuleList(blocks)
        self.fusion_norm = nn.LayerNorm(D)
        self.itm_head = nn.Linear(D, 2)
        self.lm_dense = nn.Linear(D, self.text.width)
        self.lm_norm = nn.LayerNorm(self.text.width)
        self.lm_head = nn.Linear(self.text.width, vocab)
        self.simsiam = simsiam  # sizes of the heads that training adds (losses.Heads)
        # Store temperatures as log(1 / tau), as CLIP does: tau then stays positive.
        self.itc_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.cvta_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.init_weights()

    def init_weights(self):
        """Draw all weights, nearly as CLIP does [3]; convolutions keep what torch draws."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tower in (self.vision.blocks, self.text.blocks, self.fusion):
            for block in tower:
                block.attn.proj.weight.data.div_(math.sqrt(2 * len(tower)))
                block.mlp.fc2.weight.data.div_(math.sqrt(2 * len(tower)))
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        # Give the word head vectors of its own. The text tower must learn slowly and captions
        # fast: tied, captions ignore the image (dev/LOG.md).
        self.lm_head.weight.data.copy_(self.text.token_embedding.weight.data)
        # Let the logits of words start with std 0.5 at any width.
        nn.init.constant_(self.lm_norm.weight, 25 / math.sqrt(self.text.width))
        places = (self.vision.cls_token, self.vision.pos_embed, self.text.positional_embedding)
        for p in (*places, self.kind):
            nn.init.normal_(p, std=0.01)

    def pool_tokens(self, tokens):
        """Average the patch grid of tokens [N, 1 + P, Dv] to pool x pool, 0: none -> [N, V, Dv]."""
        if not self.pool:
            return tokens
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.vision.grid, -1))  # [N, Dv, g, g]
        grid = F.adaptive_avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], grid], 1)

    def vision_tokens(self, images):
        """Encode images [N, 3, S, S] in [0, 1] to pooled tokens [N, V, Dv]."""
        return self.pool_tokens(self.vision(images))

    def to_shared(self, tokens):
        """Project the class token of tokens [N, V, Dv] to v [N, d], L2-normalised."""
        return F.normalize(full(self.proj(tokens[:, 0].to(self.proj.weight.dtype))), dim=-1)

    def to_fusion(self, tokens):
        """Map tokens [N, V, Dv] to the image tokens of the fusion [N, V, D]."""
        return self.fuse_image(tokens.to(self.fuse_image.weight.dtype)) + self.kind[0]

    def encode_image(self, images):
        """Embed images [N, 3, S, S] in [0, 1] in the shared space: [N, d], L2-normalised."""
        return self.to_shared(self.vision(images))

    def encode_text(self, ids):
        """Embed texts, ids [N, T], in the shared space: [N, d], L2-normalised."""
        return F.normalize(full(self.text(ids)[1]), dim=-1)

    def fuse(self, x, mask):
        """Run the fusion over x [N, L, D]; mask bool [N, 1, L or 1, L]."""
        for block in self.fusion:
            x = block(x, mask)
        return self.fusion_norm(x)

    def fuse_with_text(self, image_tokens, text_tokens, real, prefix=None):
        """Read images and captions together -> fused text [N, T, D].

        image_tokens [N, V, D]; text_tokens [N, T, Dt]; real [N, T], False on padding.
        prefix None: every position sees every real one (ITM, MLM).
        prefix [N], a number of text positions: image and prefix see each other, and what follows is
        causal, so that position i may predict token i + 1 (PLM).
        """
        V, T = image_tokens.shape[1], text_tokens.shape[1]
        x = torch.cat([image_tokens, self.fuse_text(text_tokens) + self.kind[1]], 1)
        mask = F.pad(real, (V, 0), value=True)[:, None, None, :]  # [N, 1, 1, V + T]
        if prefix is not None:
            at = torch.arange(V + T, device=x.device)
            causal = at[None, :] <= at[:, None]  # [L, L] key not after query
            known = at[None, :] < V + prefix[:, None]  # [N, L] image and prefix
            mask = mask & (causal | known[:, None, :])[:, None]  # [N, 1, L, L]
        return self.fuse(x, mask)[:, V:]

    def fuse_with_keywords(self, image_tokens, w, chosen):
        """Compute z [N, D], the text-guided visual representation (E_mm of [1]).

        image_tokens [N, V, D]; keyword embeddings w [N, k_o, d]; chosen [N, k_o]. z is read at the
        image's class token. Keywords carry no position, so their order cannot matter.
        """
        words = self.fuse_keyword(w.to(image_tokens.dtype)) + self.kind[2]
        x = torch.cat([image_tokens, words], 1)  # [N, V + k_o, D]
        mask = F.pad(chosen, (image_tokens.shape[1], 0), value=True)[:, None, None, :]
        return self.fuse(x, mask)[:, 0]

    def lm_logits(self, x):
        """Map fused text [..., D] to vocabulary logits [..., vocab]."""
        return self.lm_head(self.lm_norm(F.gelu(self.lm_dense(x))))


# --------------------------------------------------------------------------------------------------
# Public weights


def fingerprint(module):
    """Hash weights, and what they do not tell, to 12 digits, on any machine, in any precision."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        values = x.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(name.encode() + values.tobytes())
    for part in module.modules():
        told = [getattr(part, name, "") for name in ("heads", "quick", "eps")]
        digest.update(str(told).encode())
    return digest.hexdigest()[:12]


def features_name(model):
    """Name the cached features of a model's vision tower: other weights get other files."""
    return f"{fingerprint(model.vision)}-{model.vision.size}-pool{model.pool}"


def read_weights(file, state=None):
    """Read a state dict that torch saved, without training's prefixes; no code in it is run."""
    try:
        state = state or torch.load(file, map_location="cpu", weights_only=True)
        for name in ("state_dict", "model_state_dict", "model_state", "model", "teacher"):
            state = state[name] if isinstance(state.get(name), dict) else state
        assert state and all(isinstance(x, torch.Tensor) for x in state.values()), "not tensors"
    except Exception as e:  # a wrong file raises almost anything
        reason = str(e).strip().split("\n")[0][:120]
        remedy = "get it again, or let `python -m protocols.peers` rewrite safetensors"
        if "TorchScript" in str(e):
            reason, remedy = "it is TorchScript", "README tells how to save its state_dict()"
        raise ValueError(f"{file} holds no weights saved by torch ({reason}): {remedy}") from e
    if any("lora_" in name for name in state):
        raise ValueError(f"{file} holds LoRA adapters: merge them first (peft: merge_and_unload)")
    state = {name.replace("_orig_mod.", ""): x for name, x in state.items()}
    start = "".join(os.path.commonprefix([*state]).rpartition(".")[:2])
    return {name.removeprefix(start).removeprefix("backbone."): x for name, x in state.items()}


def read_tower_config(file, side):
    """Read what configs beside a file say of its "vision" or "text" tower -> dict, in their words:
    config.json (transformers, timm), open_clip_config.json and, for this file alone, FILE.json."""
    said = {}
    for name in ("preprocessor_config", "config", "open_clip_config", Path(file).stem):
        path = Path(file).with_name(f"{name}.json")
        try:
            text = path.read_bytes() if path.exists() else "{}"
            said |= json.loads(text, parse_float=lambda x: round(float(x), 6))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path} is no config ({e}): get it again, or move it away") from e
    parts = f"model_cfg preprocess_cfg pretrained_cfg model_args {side}_cfg {side}_config"
    for part in parts.split():
        said |= said.get(part) or {}
    # What a config leaves out is its package's default.
    if f"{side}_config" in said:
        said.setdefault("hidden_act", "quick_gelu")
    elif f"{side}_cfg" in said:
        said["quick_gelu"] = said.get("quick_gelu", False) and "timm_model_name" not in said
    return said


def check_tower(tower, file):
    """Refuse a tower that a config beside its file contradicts; print the choice if none tells."""
    # Shapes tell neither heads nor GELU, and the wrong ones give silently worse features.
    heads, quick = tower.blocks[0].attn.heads, tower.blocks[0].mlp.quick
    side, pool = ("vision", "tok") if isinstance(tower, ViT) else ("text", "argmax")
    act = "quick_gelu" if quick else "gelu"
    ours = dict(hidden_act=act, act_layer=act, quick_gelu=quick, layer_norm_eps=tower.norm.eps)
    ours |= dict.fromkeys(("num_attention_heads", "num_heads", "heads"), heads)
    ours |= dict(head_width=tower.width // heads, pool_type=pool, no_causal_mask=False)
    ours |= dict(global_pool="token", timm_pool="token", norm_kwargs={}, act_kwargs={})
    for name, x in zip(("mean", "std"), getattr(tower, "stats", ()), strict=False):
        ours[name] = ours[f"image_{name}"] = [round(v, 6) for v in x]
    said = read_tower_config(file, side)
    for key, value in said.items():
        if value not in ("", None, ours.get(key, value)):
            wrong = f"{key} {value}, not {ours[key]}"
            raise ValueError(f"{file}: its config says {wrong}: take another --size or flag")
    if not said.keys() & ours.keys() and rank() == 0:
        pixels = f", mean {tower.stats[0]}" if side == "vision" else ""
        print(f"{file}: no config tells its {side} tower, so {heads} heads, {act}{pixels}")


# Parameter names of open_clip and OpenAI -> ours, applied in order.
RENAME = """transformer.resblocks.>blocks. ln_1.>norm1. ln_2.>norm2. attn.in_proj_>attn.qkv.
attn.out_proj.>attn.proj. mlp.c_fc.>mlp.fc1. mlp.c_proj.>mlp.fc2. class_embedding>cls_token
conv1.>patch_embed.proj. ln_pre.>norm_pre. ln_post.>norm. ln_final.>norm."""
UNUSED = "logit_scale logit_bias attn_mask input_resolution context_length vocab_size"


def split_clip(state, file):
    """Part a CLIP [3] in open_clip's names -> state dicts of its image and text tower in ours."""
    vision, text = {}, {}
    for name, x in state.items():
        tower = vision if name.startswith("visual.") else text
        name = name.removeprefix("visual.").removeprefix("text.")
        for pair in RENAME.split():
            name = name.replace(*pair.split(">"))
        tower[name] = x
    text = {name: x for name, x in text.items() if name not in UNUSED.split()}
    try:
        vision["proj.weight"] = vision.pop("proj").T
        text["proj.weight"] = text.pop("text_projection").T
        vision["cls_token"] = vision["cls_token"].view(1, 1, -1)
        text["token_embedding.weight"] = text["token_embedding.weight"].float()
        vision["pos_embed"] = vision.pop("positional_embedding")[None]
    except KeyError as e:
        remedy = "a ViT takes --vit or --size paper, any other model --features"
        said = f"{file} is no CLIP in the names of open_clip ({e} is missing)"
        raise ValueError(f"{said}: {remedy}") from e
    return vision, text


def fill(module, state, file):
    """Load a state dict into module; ValueError names the first keys that do not fit."""
    own = module.state_dict()
    state = {k: own[k] for k in ("mean", "std") if k in own} | state  # no file holds them
    if not any(k.endswith(".gamma") for k in state):
        # LayerScale was folded or never there.
        state |= {k: torch.ones_like(x) for k, x in own.items() if k.endswith(".gamma")}
    pos, grid = state.get("pos_embed"), getattr(module, "grid", 0)  # [1, 1 + P, D]
    try:
        if grid and pos is not None and math.isqrt(pos.shape[1]) != grid:
            # Resample the grid of positions as timm does; keep the class token's.
            square = pos[:, 1:].mT.float().unflatten(2, (math.isqrt(pos.shape[1]), -1))
            square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True)
            state["pos_embed"] = torch.cat([pos[:, :1], square.flatten(2).mT.to(pos.dtype)], 1)
        module.load_state_dict(state)
    except (RuntimeError, IndexError) as e:
        reasons = " ".join(line[:150] for line in str(e).split("\n\t")[1:3]) or e
        remedy = "take another --size, or measure its features by --features"
        raise ValueError(f"{file} holds another network than this one ({reasons}): {remedy}") from e
    return module


def adopt_vision(model, file):
    """Load an image tower into an MRPLIP: timm's plain ViT (UNI [6]), or CLIP's for its sizes."""
    state = read_weights(file)
    if isinstance(model.vision.norm_pre, nn.LayerNorm):
        state, _ = split_clip(state, file)
        fill(model.proj, {"weight": state.pop("proj.weight")}, file)
    fill(model.vision, {k: x for k, x in state.items() if not k.startswith("head.")}, file)
    check_tower(model.vision, file)


def adopt_text(model, file):
    """Load CLIP's text tower into an MRPLIP; the [mask] id gets the mean of all embeddings."""
    _, state = split_clip(read_weights(file), file)
    words = state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.cat([words, words.mean(0, keepdim=True)])  # [vocab, D]
    fill(model.text, state, file)
    check_tower(model.text, file)
    model.lm_head.weight.data.copy_(model.text.token_embedding.weight.data)
