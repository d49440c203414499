"""Other people's models behind the calls that our protocols use, and their files read.

    MODEL                                     a run folder, or the word `random` (no training)
    --clip FILE --tokenizer FILE              a CLIP [1]: open_clip's, OpenAI's or Hugging Face's
    --vit FILE                                a plain ViT of timm, so UNI [2]

    python -m protocols.peers FILE --out FILE     # such a file -> a torch file that train.py reads

config.json or open_clip_config.json beside FILE tells GELU, heads and pixels, or write FILE.json.

[1] Radford et al. 2021, CLIP; PLIP and QuiltNet are CLIPs.   [2] Chen et al. 2024, UNI.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import model as networks
from text import Tokenizer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Read a .safetensors file -> dict of tensors, which stay on disk until they are used.

    The file: 8 bytes with the length of a header, the header {name: {dtype, shape, data_offsets}}
    as JSON, the raw tensors.
    """
    state = {}
    try:
        raw = np.memmap(path, np.uint8, mode="c")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = (start + offset for offset in about["data_offsets"])
            if not start <= first <= last <= len(raw):
                raise ValueError("it is cut")
            part = torch.from_numpy(raw[first:last])
            state[name] = part.view(DTYPES[about["dtype"]]).view(about["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{path} is no whole safetensors file ({e}): get it again") from None
    return state


# Hugging Face's names of CLIP -> open_clip's, applied in order. Queries, keys and values are joined
# and the projections transposed besides.
HUGGINGFACE = """vision_model.>visual. text_model.> encoder.layers.>transformer.resblocks.
layer_norm1.>ln_1. layer_norm2.>ln_2. self_attn.>attn. mlp.fc1.>mlp.c_fc. mlp.fc2.>mlp.c_proj.
embeddings.patch_embedding.>conv1. embeddings.class_embedding>class_embedding
embeddings.position_embedding.weight>positional_embedding embeddings.token_embedding>token_embedding
pre_layrnorm.>ln_pre. post_layernorm.>ln_post. final_layer_norm.>ln_final."""


def from_huggingface(state):
    """Give a CLIP in Hugging Face's names those of open_clip: dict of tensors -> the same."""
    out = {}
    for name, x in state.items():
        for pair in HUGGINGFACE.split():
            name = name.replace(*pair.split(">"))
        out[name] = x
    # Join queries, keys and values.
    for name in [name for name in out if ".q_proj." in name]:
        parts = [out.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        out[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    # Transpose the projections: open_clip computes x @ proj.
    out["visual.proj"] = out.pop("visual_projection.weight").T
    out["text_projection"] = out.pop("text_projection.weight").T
    return {name: x for name, x in out.items() if not name.endswith("position_ids")}


def read_state(path):
    """Read weights of torch or safetensors -> dict of tensors; a CLIP's names are open_clip's."""
    safe = str(path).endswith(".safetensors")
    state = networks.read_weights(path, read_safetensors(path) if safe else None)
    try:
        hugging = any(name.startswith("vision_model.") for name in state)
        return from_huggingface(state) if hugging else state
    except KeyError as e:
        raise ValueError(f"{path} is no CLIP of Hugging Face: it lacks {e}") from None


def choose(state, file, side, width, quick=None):
    """Choose what no shape tells of a tower, as configs beside its file say -> its arguments."""
    said = networks.read_tower_config(file, side)
    heads = said.get("num_attention_heads") or said.get("num_heads") or said.get("heads")
    if "head_width" in said:
        heads = width // said["head_width"]
    if not heads and width % 64:
        remedy = f'write {{"num_heads": N}} into {Path(file).stem}.json beside it'
        raise ValueError(f"{file}: nothing tells the heads of {width} channels: {remedy}")
    # Usual are 64 channels a head, and 16 heads in the huge ones.
    told = {"heads": heads or (16 if width in (1280, 1408, 1664) else width // 64)}
    told["depth"] = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    act = said.get("hidden_act") or said.get("act_layer")
    told["quick"] = said.get("quick_gelu", act == "quick_gelu") if quick is None else quick
    if "layer_norm_eps" in said:
        told["eps"] = said["layer_norm_eps"]
    pixels = [said.get(f"image_{name}") or said.get(name) for name in ("mean", "std")]
    if side == "vision" and all(pixels):
        told["stats"] = pixels
    return told


def load_vit(state, size=None, file="the state dict", quick=None, **more):
    """Build timm's plain ViT, so UNI [2], from the shapes of its state dict -> ViT.

    size: side of the images it shall read; file: named in errors, and its config is beside it.
    """
    # A larger model around it (KEEP, BiomedCLIP) gives its names a prefix.
    for prefix in ("visual.trunk.", "visual."):
        if f"{prefix}patch_embed.proj.weight" in state:
            print(f"{file}: of this model only {prefix}* is read, the image tower")
            own = (name for name in state if name.startswith(prefix))
            state = {name.removeprefix(prefix): state[name] for name in own}
    state = {name: x for name, x in state.items() if not name.startswith("head.")}
    try:
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        size = size or math.isqrt(state["pos_embed"].shape[1] - 1) * patch
        if "reg_token" in state:
            raise KeyError("network without registers")
    except (KeyError, ValueError, IndexError) as e:
        first = f"there is no {e}, but {next(iter(state), '')}"
        state = f"{file} is not a plain ViT with a class token ({first})"
        raise ValueError(f"{state}: a CLIP takes --clip, any other model --features") from e
    more["layer_scale"] = 1e-5 if "blocks.0.ls1.gamma" in state else 0.0
    more |= choose(state, file, "vision", width, quick)
    vit = networks.fill(networks.ViT(size, patch, width, **more), state, file)
    networks.check_tower(vit, file)
    return vit


def load_clip(state, quick=None, size=None, file="the state dict"):
    """Build a CLIP [1] in open_clip's names -> (ViT with its projection .proj [d, Dv], TextTower).

    quick None: its config says which GELU; without one QuiltNet's, not OpenAI's and PLIP's.
    """
    vision, text = networks.split_clip(state, file)
    proj = vision.pop("proj.weight").float()
    vit = load_vit(vision, size, file, quick, clip=True, stats=networks.CLIP_STATS)
    vit.proj = nn.Parameter(proj.clone())
    vocab, width = text["token_embedding.weight"].shape
    # transformers' old configs say 2 and mean the largest.
    end = networks.read_tower_config(file, "text").get("eos_token_id", 2)
    end, context = vocab - 1 if end == 2 else end, len(text.get("positional_embedding", ()))
    told = choose(text, file, "text", width, quick)
    tower = networks.TextTower(vocab, end, context, width, embed=len(proj), **told)
    networks.check_tower(networks.fill(tower, text, file), file)
    return vit, tower


@dataclass
class Peer:
    """A model in eval mode, with what protocols need to know about it."""

    model: nn.Module
    tokenizer: object  # None if it reads no text
    name: str
    fingerprint: str
    keywords: list = ()  # most common keywords of a run's training captions
    k_o: int = 8


class Towers(nn.Module):
    """Public weights with the calls of MRPLIP: both towers of a CLIP, or a ViT alone (text None).

    A ViT alone has no shared space: its class token, normalised, stands for the embedding.
    """

    def __init__(self, vision, text=None):
        super().__init__()
        self.vision = vision
        self.text = text
        self.itc_scale = nn.Parameter(torch.tensor(math.log(100.0)))  # where most public CLIPs end

    def pool_tokens(self, tokens):
        """Return tokens [N, 1 + P, Dv] as they are: there is no fusion to pool them for."""
        return tokens

    def to_shared(self, tokens):
        """Project the class token of tokens [N, 1 + P, Dv] -> [N, d], L2-normalised."""
        x = networks.full(tokens[:, 0])
        return F.normalize(x @ self.vision.proj.T if hasattr(self.vision, "proj") else x, dim=-1)

    encode_text = networks.MRPLIP.encode_text


def add_arguments(parser):
    """Add the flags that name a model to an argument parser."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, or the word random")
    parser.add_argument("--clip", help="instead of MODEL: file with the weights of a CLIP")
    parser.add_argument("--tokenizer", help="of --clip: its list of merges, or its tokenizer.json")
    parser.add_argument("--quick-gelu", action="store_true", help="of --clip: OpenAI's, PLIP's")
    parser.add_argument("--vit", help="instead of MODEL: file with the weights of a plain ViT")
    for name in ("mean", "std"):
        about = f"of --vit and --clip: {name} of the pixels in red, green, blue, if no config tells"
        parser.add_argument(f"--{name}", nargs=3, type=float, metavar=("R", "G", "B"), help=about)


def load(args, device="cpu"):
    """Load the model that the command line names -> Peer."""
    if len([x for x in (args.model, args.clip, args.vit) if x]) != 1:
        raise ValueError("name one model: a run folder, the word random, --clip FILE or --vit FILE")
    file = args.clip or args.vit
    pixels = {name: getattr(args, name) for name in ("mean", "std") if getattr(args, name)}
    if pixels and (not file or not all(0 < x < 1 for x in sum(pixels.values(), []))):
        raise ValueError(
            "--mean and --std take shares of 1, as .485 .456 .406, of a --vit or --clip"
        )
    # A run brings its tokenizer, its keywords and how many of them guide an image.
    if args.model and args.model != "random":
        model, tokenizer = evaluate.load_run(args.model, device)
        listed = Path(args.model) / "keywords.json"
        keywords = data.read_json(listed) if listed.exists() else []
        k_o = data.read_json(Path(args.model) / "config.json")["k_o"]
        name = Path(args.model).resolve().name
        return Peer(model, tokenizer, name, networks.fingerprint(model), keywords, k_o)
    # Wrap public weights, or those of no training.
    tokenizer = read_tokenizer(args) if args.clip else None
    if args.clip:
        state = read_state(file)
        towers = Towers(*load_clip(state, args.quick_gelu or None, file=file))
        # Probabilities depend on the temperature that it has learned.
        scale = state.get("logit_scale", towers.itc_scale.data)
        towers.itc_scale.data = scale.float().view(())
    elif args.vit:
        towers = Towers(load_vit(read_state(file), file=file))
    else:
        torch.manual_seed(0)
        towers = Towers(networks.MRPLIP(300, 298, **networks.SIZES["synthetic"]).vision)
    if tokenizer and towers.text.end != tokenizer.end:
        raise ValueError(f"{file} belongs to another tokenizer than {args.tokenizer}")
    for name, values in pixels.items():
        print(f"{file}: its {name} is that of --{name}")
        getattr(towers.vision, name).copy_(torch.tensor(values).view(1, 3, 1, 1))
    # Where every model's file is called so, its folder names it.
    path = Path(file or "random").resolve()
    usual = ("pytorch_model", "model", "open_clip_pytorch_model", "open_clip_model")
    name = path.parent.name if path.stem in usual else path.stem
    return Peer(towers.to(device).eval(), tokenizer, name, networks.fingerprint(towers))


def read_tokenizer(args):
    """Read the tokenizer of --clip: one of ours, or CLIP's merges."""
    if not args.tokenizer:
        remedy = "bpe_simple_vocab_16e6.txt.gz of open_clip, or merges.txt of Hugging Face"
        raise ValueError(f"--clip {args.clip} needs --tokenizer FILE: {remedy}")
    try:
        return Tokenizer.load(args.tokenizer)
    except ValueError:
        return Tokenizer.from_clip(args.tokenizer)


def main():
    parser = argparse.ArgumentParser(description="Rewrite weights as a torch file")
    parser.add_argument("file", help="weights: .safetensors, .bin, .pt")
    parser.add_argument("--out", required=True, help="torch file to write")
    args = parser.parse_args()
    state = {name: x.clone() for name, x in read_state(args.file).items()}
    data.write_whole(args.out, lambda file: torch.save(state, file))
    # What its configs say goes along.
    sides = ("vision", "text")
    said = {f"{side}_cfg": networks.read_tower_config(args.file, side) for side in sides}
    if said["vision_cfg"]:
        data.write_whole(Path(args.out).with_suffix(".json"), json.dumps(said, indent=1))
    print(f"wrote {args.out}: {len(state)} tensors")


if __name__ == "__main__":
    data.run_script(main, "nothing was written")
