"""Public weights into these networks and out again: UNI and other timm ViTs, CLIP in the dialects of open_clip, OpenAI and Hugging Face.

Three spellings of the same two networks. One table renames their keys to ours, sizes are read off the shapes, and loading is strict
both ways, so that a wrong file cannot half-load; networks that are something else are refused by name. Pickled code is never run.

Read in this order: read_weights -> load_vit -> load_clip -> adopt_vision, adopt_text; then export, which goes the other way.

References: [1] Chen et al. 2024, UNI (timm's ViT-L/16).  [2] Radford et al. 2021, CLIP.  [3] Ikezogwo et al. 2023, QuiltNet (open_clip's ViT-B/32).
"""
import json
import math
import mmap
import os
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import replace_file
from model import CLIP_STATS, IMAGENET, TextTower, ViT

RENAME = [  # (theirs, ours), applied in order to each key
    ("layer_norm1.", "ln1."), ("layer_norm2.", "ln2."), ("norm1.", "ln1."), ("norm2.", "ln2."), ("ln_1.", "ln1."), ("ln_2.", "ln2."),
    ("attn.in_proj_", "attn.qkv."), ("attn.out_proj.", "attn.proj."), ("self_attn.out_proj.", "attn.proj."), ("self_attn.", "attn."),
    ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2."), ("ls1.gamma", "ls1"), ("ls2.gamma", "ls2"),
    ("transformer.resblocks.", "blocks."), ("encoder.layers.", "blocks."),
    ("embeddings.token_embedding.weight", "embed.weight"), ("token_embedding.weight", "embed.weight"),
    ("embeddings.position_embedding.weight", "pos"), ("positional_embedding", "pos"), ("pos_embed", "pos"),
    ("embeddings.class_embedding", "cls"), ("class_embedding", "cls"), ("cls_token", "cls"),
    ("embeddings.patch_embedding.weight", "stem.weight"), ("patch_embed.proj.", "stem."), ("conv1.weight", "stem.weight"),
    ("pre_layrnorm.", "ln_pre."), ("ln_post.", "ln."), ("post_layernorm.", "ln."), ("final_layer_norm.", "ln."), ("ln_final.", "ln."),
    ("norm.weight", "ln.weight"), ("norm.bias", "ln.bias"),  # timm's last norm; the others were renamed above
]

# What a file holds that is another network, by a key it alone has: (part of a key, what it is and why it does not fit).
OTHERS = [
    ("reg_token", "a ViT with register tokens (UNI2-h, Virchow2, H-optimus, DINOv2 with registers)"),
    ("register_tokens", "a ViT with register tokens (DINOv2's own naming)"),
    ("mask_token", "a DINOv2 backbone in its own naming (timm converts it)"),
    ("relative_position", "a BEiT or Swin with relative positions"),
    ("fc_norm.", "a ViT that averages its patch tokens instead of reading a class token"),
    ("attn_pool_contrast", "CONCH, a CoCa with attentional poolers"),
    ("attn_pool.", "a ViT with attentional pooling (SigLIP, CoCa)"),
    ("visual.trunk.", "an open_clip model around a network that is no plain ViT"),
    ("visual.layer1.", "a CLIP with a ResNet image tower"),
    ("beit3", "MUSK, a BEiT-3"),
    ("norm_pre.", "CLIP's image tower as timm has it (load_clip reads open_clip's file of it)"),
    ("vision_model.head.", "a SigLIP"),
    ("lora_", "an adapter, not a network"),
]

# ---------------------------------------------------------------- files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A .safetensors file -> dict of tensors that stay on disk until they are touched. The format: 8 bytes, the length of a JSON header
    {name: {dtype, shape, data_offsets}}; the header; the raw tensors. ValueError where a tensor would reach beyond the file."""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(0)
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no safetensors file, or a part of one: its header should have {length:,} bytes and the file has {size:,}")
        try:
            header = json.loads(f.read(length))
            tensors = {name: (DTYPES[t["dtype"]], [int(n) for n in t["shape"]], *map(int, t["data_offsets"]))
                       for name, t in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is no safetensors file: its header cannot be read ({type(e).__name__}: {e})") from None
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)                       # private: writing to a tensor leaves the file alone
    out = {}
    for name, (dtype, shape, start, end) in tensors.items():
        count = math.prod(shape)
        if not 0 <= start <= end <= size - 8 - length or end - start != count * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{path} is truncated or damaged: tensor {name} lies at bytes {start:,} to {end:,} of {size - 8 - length:,}")
        out[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start).view(shape) if count else torch.empty(shape, dtype=dtype)
    return out


def read_weights(source):
    """A state dict, or the path of one saved by torch or as safetensors -> dict of tensors. Never unpickles code."""
    if isinstance(source, dict):
        return source
    if str(source).endswith(".safetensors"):
        return read_safetensors(source)
    if not zipfile.is_zipfile(source):                                                 # what torch.save writes is a zip archive, its table of contents at the end
        raise ValueError(f"{source} is not a file of tensors saved by torch (.bin, .pt, .pth): " + ("there is none, or it is a folder" if not os.path.isfile(source) else
                         f"its {os.path.getsize(source):,} bytes are a part of one, or something else, or torch before 1.6 wrote it; download it again"))
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        kind = "is a TorchScript archive (as OpenAI's CLIP files are)" if "TorchScript" in str(e) else \
            "holds more than tensors, and nothing else is ever loaded" if "Weights only" in str(e) else f"cannot be read ({str(e).splitlines()[0]})"
        raise ValueError(f"{source} {kind}: save its state_dict() and use that") from e
    for name in ("state_dict", "model", "teacher"):                                    # where training scripts put it
        state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{source} does not hold a plain state dict of tensors")
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}


def _refuse_others(state, source):
    for part, what in OTHERS:
        if key := next((k for k in state if part in k), None):
            raise ValueError(f"{_name(source)} cannot be used: it is {what}, for it holds {key}")
    if gate := next((k for k in state if k.endswith("mlp.fc1.weight") and k.replace("fc1", "fc2") in state
                     and state[k].shape[0] == 2 * state[k.replace("fc1", "fc2")].shape[1]), None):
        raise ValueError(f"{_name(source)} cannot be used: it is a ViT with gated layers (SwiGLU: UNI2-h, Virchow, GigaPath), see {gate}")


def _rename(state):
    out = {}
    for key, value in state.items():
        for theirs, ours in RENAME:
            key = key.replace(theirs, ours)
        out[key] = value
    for key in [k for k in out if ".attn.q_proj." in k]:                               # Hugging Face keeps q, k, v apart
        parts = [key.replace("q_proj", f"{c}_proj") for c in "qkv"]
        if all(p in out for p in parts):
            out[key.replace("q_proj", "qkv")] = torch.cat([out.pop(p) for p in parts])
    return out


def _load(module, state, source):
    """Strict both ways, with the first offending key of each kind in the message."""
    own = module.state_dict()
    state = {**{k: own[k] for k in ("mean", "std") if k in own}, **state}             # no file holds them: they are the family's
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        raise ValueError(f"{_name(source)} does not fit: {len(missing)} keys missing {missing[:2]}, {len(extra)} unexpected {extra[:2]}, "
                         f"{len(shapes)} of another shape {shapes[:2]}; use the weights this network is made for")
    module.load_state_dict(state)
    return module


def _depth(state):
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)


def _heads(width):
    """Shapes do not tell the heads. 64 channels each in every tower of the field up to large, 16 heads in the huge ones."""
    return 16 if width in (1280, 1408, 1664) else width // 64


def _resample(pos, grid):
    """Positions [1, 1 + g g, D] of a g x g grid -> those of a grid x grid one, the class token's kept; bicubic and antialiased, as timm does."""
    g = math.isqrt(pos.shape[1] - 1)
    square = pos[:, 1:].float().view(1, g, g, -1).permute(0, 3, 1, 2)                  # [1, D, g, g]
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :1], square.flatten(2).transpose(1, 2).to(pos.dtype)], 1)


def _side(state, size, source):
    """Patch size and image side of a renamed vision state; where another `size` is wanted, its positions are resampled in place."""
    patch, places = state["stem.weight"].shape[-1], state["pos"].shape[1] - 1
    own = math.isqrt(places) * patch
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"{_name(source)} has {places} places for patches, which make no square: it is not a ViT with one class token")
    if size and size % patch:
        raise ValueError(f"images of {size} px cannot be cut into the patches of {patch} px that {_name(source)} reads")
    if size and size != own:
        state["pos"] = _resample(state["pos"], size // patch)
    return patch, size or own


def load_vit(source, size=None, stats=IMAGENET):
    """timm's plain ViT, so UNI's `pytorch_model.bin` [1] too, alone or as the trunk of an open_clip file: path or state dict -> ViT. Sizes come from the shapes alone; `size`: side of the
    images it shall read where that is not the one it was trained on; `stats`: mean and std of its pixels (0.5 and 0.5 for Google's own ViTs,
    "augreg"). ValueError names the keys when the file is another network."""
    raw = read_weights(source)
    if any(k.startswith("visual.trunk.cls_token") for k in raw):                       # open_clip around it, as `export` writes
        _refuse_others({k: v for k, v in raw.items() if not k.startswith("visual.trunk.")}, source)
        raw = {k.removeprefix("visual.trunk."): v for k, v in raw.items() if k.startswith("visual.trunk.")}
    _refuse_others(raw, source)
    if clip := next((k for k in raw if "token_embedding" in k), None):
        raise ValueError(f"{_name(source)} is a CLIP with its text tower ({clip}): load_clip reads it, and train.py with --size quiltnet or plip")
    state = {k: v for k, v in _rename(raw).items() if not k.startswith("head.")}       # a classifier is not needed
    if "stem.weight" not in state or "cls" not in state or "pos" not in state:
        raise ValueError(f"{_name(source)} is not a timm vision transformer with a class token (no patch_embed, cls_token or pos_embed)")
    patch, side = _side(state, size, source)
    width = len(state["stem.weight"])
    vit = ViT(side, patch, width, _depth(state), _heads(width), layer_scale=1e-5 * ("blocks.0.ls1" in state), **stats)
    return _load(vit, state, source)


def load_clip(source, quick_gelu=False, size=None):
    """open_clip's (plain or `text.`-prefixed), OpenAI's or Hugging Face's CLIP [2]: path or state dict -> (ViT, TextTower); the image
    projection is `vit.proj` [d, D]; the temperature stays in the file. No file says which GELU it was trained with: QuiltNet's hub configuration
    means quick_gelu=False [3], OpenAI's and PLIP's True. Of an open_clip file around a timm ViT, as `export` writes it, the ViT is load_vit's."""
    state = dict(read_weights(source))
    trunk = {k: state[k] for k in state if k.startswith(("visual.trunk.", "visual.head."))} if {"visual.trunk.cls_token", "visual.head.proj.weight"} <= state.keys() else {}
    _refuse_others({k: v for k, v in state.items() if k not in trunk}, source)
    if "patch_embed.proj.weight" in state:
        raise ValueError(f"{_name(source)} is a timm ViT without a text tower (patch_embed.proj.weight): load_vit reads it, and train.py with --size paper")
    hf = any(k.startswith("vision_model.") for k in state)
    drop = ("logit_scale", "logit_bias", "attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")
    state = {k: v for k, v in state.items() if not k.endswith(drop)}
    sides = ("vision_model.", "text_model.") if hf else ("visual.", "text.")
    own = ("visual_projection.weight", "text_projection.weight", "text_projection", "text.text_projection")
    vision = _rename({k.removeprefix(sides[0]): v for k, v in state.items() if k.startswith(sides[0]) and k not in trunk})
    text = _rename({k.removeprefix(sides[1]): v for k, v in state.items() if not k.startswith(sides[0]) and k not in own})
    try:
        text["proj.weight"] = state["text_projection.weight"] if hf else state.get("text_projection", state.get("text.text_projection")).T
        if trunk:
            proj = trunk["visual.head.proj.weight"]
        else:
            proj, width = state["visual_projection.weight"] if hf else vision.pop("proj").T, len(vision["stem.weight"])
            vision["cls"], vision["pos"] = vision["cls"].view(1, 1, width), vision["pos"].view(1, -1, width)
        vocab, text_width = text["embed.weight"].shape
        context = len(text["pos"])
    except (KeyError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{_name(source)} is neither an open_clip nor a Hugging Face CLIP state dict (missing {e})") from e
    if trunk:
        vit = load_vit(trunk, size)
    else:
        patch, side = _side(vision, size, source)
        vit = _load(ViT(side, patch, width, _depth(vision), _heads(width), pre_norm=True, patch_bias=False, eps=1e-5, quick=quick_gelu, **CLIP_STATS), vision, source)
    vit.proj = nn.Parameter(proj.float().clone())
    tower = TextTower(vocab, vocab - 1, context, text_width, _depth(text), text_width // 64, len(text["proj.weight"]), quick=quick_gelu)
    return vit, _load(tower, text, source)


def _name(source):
    return "the state dict" if isinstance(source, dict) else str(Path(source))


def adopt_vision(model, vit):
    """Copy a loaded vision tower into an MRPLIP, CLIP's projection with it. What shapes do not tell (heads, GELU, epsilon, pixel statistics)
    stays as the MRPLIP was built. ValueError names what differs."""
    state = {k: v for k, v in vit.state_dict().items() if k not in ("mean", "std", "proj")}
    own = model.vision.state_dict()
    state |= {k: torch.ones_like(v) for k, v in own.items() if k.endswith((".ls1", ".ls2")) and k not in state}       # LayerScale was folded, or never there
    _adopt(model.vision, state | {k: own[k] for k in ("mean", "std")}, "vision")
    if hasattr(vit, "proj"):
        _adopt(model.proj, {"weight": vit.proj.detach()}, "projection")


def adopt_text(model, tower):
    """Copy CLIP's text tower into an MRPLIP, its embedding table grown by the [mask] id (the mean of all rows), CLIP's own function untouched. The
    words that MLM and PLM answer with start as the same table."""
    state = dict(tower.state_dict())
    state["embed.weight"] = torch.cat([state["embed.weight"], state["embed.weight"].mean(0, keepdim=True)])           # [V + 1, D]
    _adopt(model.text, state, "text")
    model.lm_head.weight.data.copy_(state["embed.weight"])


def _adopt(module, state, what):
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    new = {k: tuple(v.shape) for k, v in state.items()}
    if key := next((k for k in sorted(own | new) if own.get(k) != new.get(k)), None):
        raise ValueError(f"the {what} weights belong to another network than --size and --tokenizer ask for: {key} is {new.get(key, 'not there')} in the file and "
                         f"{own.get(key, 'not there')} in the model; choose the ones they belong to, or write a size of your own into model.SIZES")
    module.load_state_dict(state)


# ---------------------------------------------------------------- and out again

THEIRS = {  # (ours, theirs), applied in order to each key: RENAME the other way. Names without a dot are whole keys.
    "timm": [("ln1.", "norm1."), ("ln2.", "norm2."), ("stem.", "patch_embed.proj."), ("cls", "cls_token"), ("pos", "pos_embed")],
    "open_clip": [("ln1.", "ln_1."), ("ln2.", "ln_2."), ("attn.qkv.", "attn.in_proj_"), ("attn.proj.", "attn.out_proj."), ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
                  ("blocks.", "transformer.resblocks."), ("embed.weight", "token_embedding.weight"), ("stem.", "conv1."), ("cls", "class_embedding"), ("pos", "positional_embedding")],
    "huggingface": [("ln1.", "layer_norm1."), ("ln2.", "layer_norm2."), ("attn.", "self_attn."), ("self_attn.proj.", "self_attn.out_proj."), ("blocks.", "encoder.layers."),
                    ("ln_pre.", "pre_layrnorm."), ("embed.weight", "embeddings.token_embedding.weight"), ("stem.", "embeddings.patch_embedding."),
                    ("cls", "embeddings.class_embedding"), ("pos", "embeddings.position_embedding.weight")],
}

TIMM = {(16, 192, 12): "vit_tiny_patch16", (16, 384, 12): "vit_small_patch16", (32, 384, 12): "vit_small_patch32", (16, 768, 12): "vit_base_patch16",
        (32, 768, 12): "vit_base_patch32", (14, 1024, 24): "vit_large_patch14", (16, 1024, 24): "vit_large_patch16", (14, 1280, 32): "vit_huge_patch14"}


def _plain(tensor):
    return tensor.detach().float().cpu()


def _spell(tower, dialect, last, prefix=""):
    """A tower's weights by another dialect's names, `last` being that of the last norm; projection and pixel statistics are left out.
    LayerScale is folded into the layer before it: ls * (W x + b) = (ls W) x + ls b."""
    state = {k: _plain(v) for k, v in tower.state_dict().items() if k not in ("mean", "std", "proj.weight")}
    for key in [k for k in state if k.endswith((".ls1", ".ls2"))]:
        layer, gain = key.replace("ls1", "attn.proj").replace("ls2", "mlp.fc2"), state.pop(key)
        state[f"{layer}.weight"] = gain[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gain * state[f"{layer}.bias"]
    if "embed.weight" in state:
        state["embed.weight"] = state["embed.weight"][: tower.end + 1]                 # without [mask], which CLIP has not
    out = {}
    for key, value in state.items():
        key = last + key.removeprefix("ln.") if key.startswith("ln.") else key
        for ours, theirs in THEIRS[dialect]:
            key = key.replace(ours, theirs) if "." in ours else theirs if key == ours else key
        value = value.squeeze() if value.dim() == 3 and dialect != "timm" else value   # class token, positions: timm keeps a batch dimension
        parts = {key.replace("qkv", f"{c}_proj"): part for c, part in zip("qkv", value.chunk(3))} if dialect == "huggingface" and ".qkv." in key else {key: value}
        out |= {prefix + k: v for k, v in parts.items()}
    return out


def _to_open_clip(model, clip):
    vision, text = model.vision, model.text
    state = _spell(text, "open_clip", "ln_final.") | {"text_projection": _plain(text.proj.weight).T}
    if clip:
        state |= _spell(vision, "open_clip", "ln_post.", "visual.") | {"visual.proj": _plain(model.proj.weight).T}
        image = dict(image_size=vision.size, patch_size=vision.patch, width=vision.width, layers=len(vision.blocks), head_width=vision.width // vision.blocks[0].attn.heads)
    else:
        state |= _spell(vision, "timm", "norm.", "visual.trunk.") | {"visual.head.proj.weight": _plain(model.proj.weight)}
        name = f"{TIMM.get((vision.patch, vision.width, len(vision.blocks)), 'none')}_{vision.size}"
        if name.startswith("none") or vision.size not in ((224,) if vision.patch == 14 else (224, 384)):
            raise ValueError(f"open_clip reads a timm ViT by its name, and none has {len(vision.blocks)} layers {vision.width} wide and patches of {vision.patch} px in images of {vision.size}")
        image = dict(image_size=vision.size, timm_model_name=name, timm_model_pretrained=False, timm_pool="token", timm_proj="linear")
    words = dict(context_length=len(text.pos), vocab_size=text.end + 1, width=text.width, heads=text.blocks[0].attn.heads, layers=len(text.blocks))
    if text.end + 1 != 49408:                                                          # its built-in tokenizer knows CLIP's merges only
        words["hf_tokenizer_name"] = "in this folder"                                  # any text here makes open_clip read the folder's own
    return "open_clip_model.safetensors", state, {"open_clip_config.json": {
        "model_cfg": {"embed_dim": len(model.proj.weight), "quick_gelu": text.blocks[0].mlp.quick, "vision_cfg": image, "text_cfg": words},
        "preprocess_cfg": {"mean": vision.mean.flatten().tolist(), "std": vision.std.flatten().tolist(), "interpolation": "bicubic"}}}


def _to_huggingface(model, clip):
    vision, text = model.vision, model.text
    if not clip:
        raise ValueError("transformers' CLIPModel has a norm before its blocks and no patch bias, other than UNI and timm's ViTs: use --to open_clip")
    state = _spell(text, "huggingface", "final_layer_norm.", "text_model.") | {"text_projection.weight": _plain(text.proj.weight)}
    state |= _spell(vision, "huggingface", "post_layernorm.", "vision_model.") | {"visual_projection.weight": _plain(model.proj.weight)}
    tower = lambda t, kind, **more: dict(
        model_type=kind, hidden_size=t.width, intermediate_size=4 * t.width, num_hidden_layers=len(t.blocks), num_attention_heads=t.blocks[0].attn.heads, layer_norm_eps=t.ln.eps,
        hidden_act="quick_gelu" if t.blocks[0].mlp.quick else "gelu", projection_dim=len(model.proj.weight), **more)
    return "model.safetensors", state, {
        "preprocessor_config.json": dict(image_processor_type="CLIPImageProcessor", do_resize=True, size={"shortest_edge": vision.size}, resample=3, do_center_crop=True,
                                         crop_size={"height": vision.size, "width": vision.size}, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
                                         image_mean=vision.mean.flatten().tolist(), image_std=vision.std.flatten().tolist(), do_convert_rgb=True),
        "config.json": dict(model_type="clip", architectures=["CLIPModel"], projection_dim=len(model.proj.weight),
                            text_config=tower(text, "clip_text_model", vocab_size=text.end + 1, max_position_embeddings=len(text.pos),
                                              bos_token_id=text.end - 1, eos_token_id=text.end, pad_token_id=text.end),
                            vision_config=tower(vision, "clip_vision_model", image_size=vision.size, patch_size=vision.patch))}


def export(model, tokenizer, folder, to):
    """The two towers of an MRPLIP as a folder of weights, configuration and tokenizer -> its path. `to`: "open_clip", for
    `open_clip.create_model_and_transforms("local-dir:FOLDER")`, or "huggingface", for `transformers.CLIPModel.from_pretrained("FOLDER")`.

    What they hold is a CLIP with the same embeddings to the last few bits; fusion, captions and the SimSiam heads stay behind.
    ValueError where the package has no such network."""
    if model.vision.conv:
        raise ValueError("no other package has this image tower, whose stem is five convolutions: an exported model starts from public weights (--size paper, quiltnet or plip)")
    clip = isinstance(model.vision.ln_pre, nn.LayerNorm)
    name, state, files = {"open_clip": _to_open_clip, "huggingface": _to_huggingface}[to](model, clip)
    special = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), ("<|startoftext|>", *["<|endoftext|>"] * 3)))
    texts = {"vocab.json": json.dumps(tokenizer.id | {special["bos_token"]: tokenizer.start, special["eos_token"]: tokenizer.end}, ensure_ascii=False),
             "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges), ""]),
             "tokenizer_config.json": json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=len(model.text.pos), **special), indent=1)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / name, state | {"logit_scale": _plain(model.itc_scale)})
    for file, text in (texts | {file: json.dumps(content, indent=1) for file, content in files.items()}).items():  # what names the network comes last
        replace_file(folder / file, text)
    return folder


def write_safetensors(path, tensors):
    """dict of float32 tensors -> a .safetensors file (see read_safetensors), which appears whole or not at all."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at := at + 4 * t.numel()]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                                    # readers expect aligned data
    with open(f"{path}.tmp", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            f.write(t.contiguous().numpy())
    os.replace(f"{path}.tmp", path)
