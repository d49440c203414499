"""Other people's models behind the calls that our protocols use, and their files read.

    MODEL                                     a run folder, or the word `random` (no training)
    --clip FILE --tokenizer FILE              a CLIP [1]: open_clip's, OpenAI's or Hugging Face's
    --vit FILE                                a plain ViT of timm, so UNI [2]

    python -m protocols.peers FILE --out FILE     # such a file -> a torch file that train.py reads

[1] Radford et al. 2021, CLIP; PLIP and QuiltNet are CLIPs.   [2] Chen et al. 2024, UNI.
"""

import argparse
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

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
        with open(path, "rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = about["data_offsets"]
            part = torch.empty(0, dtype=torch.uint8)
            # A cut file ends before the tensor does; torch says so.
            if last > first >= 0:
                place = dict(count=last - first, offset=start + first)
                part = torch.frombuffer(raw, dtype=torch.uint8, **place)
            state[name] = part.view(DTYPES[about["dtype"]]).view(about["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
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
    state = read_safetensors(path) if safe else networks.read_weights(path)
    try:
        hugging = any(name.startswith("vision_model.") for name in state)
        return from_huggingface(state) if hugging else state
    except KeyError as e:
        raise ValueError(f"{path} is no CLIP of Hugging Face: it lacks {e}") from None


@dataclass
class Peer:
    """A model in eval mode, with what protocols need to know about it."""

    model: nn.Module
    tokenizer: object  # None if it reads no text
    name: str
    fingerprint: str  # a hash of all weights, and what they do not tell
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
        self.itc_scale = nn.Parameter(torch.tensor(math.log(100.0)))  # where all public CLIPs end

    def pool_tokens(self, tokens):
        """Return tokens [N, 1 + P, Dv] as they are: there is no fusion to pool them for."""
        return tokens

    def to_shared(self, tokens):
        """Project the class token of tokens [N, 1 + P, Dv] -> [N, d], L2-normalised."""
        x = networks.full(tokens[:, 0])
        return F.normalize(x @ self.vision.proj.T if hasattr(self.vision, "proj") else x, dim=-1)

    def encode_text(self, ids):
        """Embed texts, ids [N, T] -> [N, d], L2-normalised."""
        return F.normalize(networks.full(self.text(ids)[1]), dim=-1)


def add_arguments(parser):
    """Add the flags that name a model to an argument parser."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, or the word random")
    parser.add_argument("--clip", help="instead of MODEL: file with the weights of a CLIP")
    parser.add_argument("--tokenizer", help="of --clip: its list of merges, or its tokenizer.json")
    parser.add_argument("--quick-gelu", action="store_true", help="of --clip: OpenAI's, PLIP's")
    parser.add_argument("--vit", help="instead of MODEL: file with the weights of a plain ViT")


def load(args, device="cpu"):
    """Load the model that the command line names -> Peer."""
    if len([x for x in (args.model, args.clip, args.vit) if x]) != 1:
        raise ValueError("name one model: a run folder, the word random, --clip FILE or --vit FILE")
    # A run brings its tokenizer, its keywords and how many of them guide an image.
    if args.model and args.model != "random":
        model, tokenizer = evaluate.load_run(args.model, device)
        listed = Path(args.model) / "keywords.json"
        keywords = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
        k_o = evaluate.read_config(args.model)["k_o"]
        name = Path(args.model).resolve().name
        return Peer(model, tokenizer, name, networks.fingerprint(model), keywords, k_o)
    # Wrap public weights, or those of no training.
    file = args.clip or args.vit
    tokenizer = read_tokenizer(args) if args.clip else None
    try:
        if args.clip:
            towers = Towers(*networks.load_clip(read_state(file), args.quick_gelu))
        elif args.vit:
            towers = Towers(networks.load_vit(read_state(file)))
        else:
            torch.manual_seed(0)
            towers = Towers(networks.MRPLIP(300, 298, **networks.SIZES["synthetic"]).vision)
    except ValueError as e:
        raise ValueError(str(e).replace("the state dict", file)) from None
    if tokenizer and towers.text.end != tokenizer.end:
        raise ValueError(f"{file} belongs to another tokenizer than {args.tokenizer}")
    # The weights do not tell which GELU they are used with.
    mark = networks.fingerprint(towers) + ("-quick-gelu" if args.clip and args.quick_gelu else "")
    # Where every model's file is called so, its folder names it.
    path = Path(file or "random").resolve()
    usual = ("pytorch_model", "model", "open_clip_pytorch_model", "open_clip_model")
    name = path.parent.name if path.stem in usual else path.stem
    return Peer(towers.to(device).eval(), tokenizer, name, mark)


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
    print(f"wrote {args.out}: {len(state)} tensors")


if __name__ == "__main__":
    data.run_script(main, "nothing was written")
