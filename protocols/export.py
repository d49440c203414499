"""Export the two towers of a run to open_clip or to transformers, in one folder.

    python -m protocols.export RUN --to open_clip       # open_clip.create_model("local-dir:FOLDER")
    python -m protocols.export RUN --to huggingface     # CLIPModel.from_pretrained("FOLDER")

The folder holds weights (safetensors), configuration, tokenizer and a model card. It is a CLIP
with the same embeddings. Fusion and captions have no place there. A run of the default size cannot
leave: no other package has its convolutional stem.
"""

import argparse
import datetime
import json
from pathlib import Path

import data
import evaluate
import model as networks
from protocols.page import cell, find_rows
from protocols.peers import HUGGINGFACE

# timm's plain ViTs, as vit_SIZE_patchPATCH_IMAGES, by width, depth and heads of the sizes.
SIZES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base"}
SIZES |= {(1024, 24, 16): "large", (1280, 32, 16): "huge"}
TIMM = """tiny_patch16_224 tiny_patch16_384 small_patch16_224 small_patch16_384 small_patch32_224
small_patch32_384 base_patch16_224 base_patch16_384 base_patch32_224 base_patch32_384
large_patch16_224 large_patch16_384 large_patch14_224 huge_patch14_224"""

# The model card. Hubs read its head.
CARD = """---
library_name: {library}
license: other
---
# {name}

The image and the text tower of a nanoMRPLIP run, an independent MR-PLIP (arXiv 2504.18856), trained
on {data}, exported on {date}. Its fusion network is not here.
{texts}
**Intended use**: research. It is no medical device, and not for clinical use. Stains, organs and
scanners that are not in its training data are untested.

**Licence**: that of the weights it began with (image: {vision}; text: {text}) and of the data.
UNI is gated and non-commercial, QuiltNet for research: look at their terms before you share this.

**Settings**: {settings}

**Numbers**, with the 95 % interval over slides or patients; f1 is weighted, mean is of recalls:

"""
# Its tokenizer does not clean texts as open_clip's and ours do.
TEXTS = """
**Texts** with HTML entities, curly quotes or ligatures get other ids here than in training. First
clean them as open_clip does: `html.unescape(html.unescape(ftfy.fix_text(text)))`.
"""


def plain(x):
    """Detach a tensor and move it to the CPU in fp32."""
    return x.detach().float().cpu().contiguous()


def read_tower(tower):
    """Read the weights of a tower -> dict, LayerScale folded into the layer before it.

    gamma (W x + b) = (gamma W) x + gamma b. Pixel statistics and projection are left out.
    """
    state = {name: plain(x) for name, x in tower.state_dict().items()}
    state = {name: x for name, x in state.items() if name not in ("mean", "std", "proj.weight")}
    # Other packages' CLIPs have no LayerScale.
    for name in [name for name in state if name.endswith(".gamma")]:
        gain = state.pop(name)
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{layer}.weight"] = gain[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gain * state[f"{layer}.bias"]
    return state


def to_open_clip(state, prefix, last):
    """Give the weights of a tower open_clip's names; `last`: that of its last norm."""
    out = {}
    for name, x in state.items():
        # The last norm has another name in each tower.
        if name.startswith("norm."):
            name = last + name.removeprefix("norm")
        for pair in networks.RENAME.split():
            theirs, ours = pair.split(">")
            name = name.replace(ours, theirs)
        name = prefix + name.replace("pos_embed", "positional_embedding")
        # open_clip keeps the class token and the positions without a dimension for the batch.
        out[name] = x.squeeze() if x.dim() == 3 else x
    return out


def to_huggingface(state):
    """Give a CLIP in open_clip's names those of Hugging Face: dict of tensors -> the same."""
    out = {}
    for name, x in state.items():
        if name in ("visual.proj", "text_projection"):
            out[name.replace(".proj", "_projection") + ".weight"] = x.T.contiguous()
            continue
        side = "vision_model." if name.startswith("visual.") else "text_model."
        name = name.removeprefix("visual.")
        for pair in HUGGINGFACE.split():
            theirs, ours = pair.split(">")
            if ours not in ("", "visual."):
                name = name.replace(ours, theirs)
        # Part queries, keys and values.
        if "in_proj_" in name:
            for letter, part in zip("qkv", x.chunk(3), strict=True):
                out[side + name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            out[side + name] = x
    return out


def open_clip_config(model, clip):
    """Describe the towers as open_clip's open_clip_config.json does -> str."""
    vision, text = model.vision, model.text
    width, depth, heads = vision.width, len(vision.blocks), vision.blocks[0].attn.heads
    quick, same = text.blocks[0].mlp.quick, vision.blocks[0].mlp.quick
    image = {"image_size": vision.size}
    if same != (clip and quick):
        raise ValueError("open_clip has one GELU for both towers, timm's ViT the exact: it stays")
    if clip:
        image |= {"patch_size": vision.patch, "width": width, "layers": depth}
        image |= {"head_width": width // heads}
    else:
        # open_clip builds a timm ViT by its name.
        name = f"{SIZES.get((width, depth, heads))}_patch{vision.patch}_{vision.size}"
        if name not in TIMM.split():
            shape = f"{depth} x {width} in {heads} heads, patches of {vision.patch}"
            raise ValueError(f"timm has no ViT of {shape}, images of {vision.size} px: it stays")
        image |= {"timm_model_name": f"vit_{name}", "timm_model_pretrained": False}
        image |= {"timm_pool": "token", "timm_proj": "linear"}
    words = {"context_length": text.context, "vocab_size": text.end + 1, "width": text.width}
    words |= {"heads": text.blocks[0].attn.heads, "layers": len(text.blocks)}
    if text.end + 1 != 49408:
        # Its own tokenizer knows CLIP's merges only; any name here makes it read the folder.
        words["hf_tokenizer_name"] = "in this folder"
    towers = {"embed_dim": len(model.proj.weight), "quick_gelu": quick}
    towers |= {"vision_cfg": image, "text_cfg": words}
    pixels = {"mean": vision.mean.flatten().tolist(), "std": vision.std.flatten().tolist()}
    pixels["interpolation"] = "bicubic"
    return json.dumps({"model_cfg": towers, "preprocess_cfg": pixels}, indent=1)


def huggingface_config(model):
    """Describe the towers and their pixels as transformers does -> {file: text}."""
    vision, text = model.vision, model.text
    towers = []
    for tower, kind in ((vision, "clip_vision_model"), (text, "clip_text_model")):
        block = tower.blocks[0]
        about = {"model_type": kind, "hidden_size": tower.width}
        about |= {"intermediate_size": 4 * tower.width, "num_hidden_layers": len(tower.blocks)}
        about |= {"layer_norm_eps": tower.norm.eps, "num_attention_heads": block.attn.heads}
        about |= {"hidden_act": "quick_gelu" if block.mlp.quick else "gelu"}
        towers.append(about | {"projection_dim": len(model.proj.weight)})
    towers[0] |= {"image_size": vision.size, "patch_size": vision.patch}
    towers[1] |= {"vocab_size": text.end + 1, "max_position_embeddings": text.context}
    towers[1] |= {"bos_token_id": text.end - 1, "eos_token_id": text.end, "pad_token_id": text.end}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": towers[0]}
    config |= {"projection_dim": len(model.proj.weight), "text_config": towers[1]}
    pixels = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "resample": 3}
    pixels |= {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
    pixels |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": vision.size}}
    pixels |= {"crop_size": {"height": vision.size, "width": vision.size}}
    pixels |= {"image_mean": vision.mean.flatten().tolist()}
    pixels |= {"image_std": vision.std.flatten().tolist()}
    files = {"preprocessor_config.json": pixels, "config.json": config}
    return {name: json.dumps(about, indent=1) for name, about in files.items()}


def tokenizer_files(tokenizer, context):
    """Describe a tokenizer as Hugging Face's CLIPTokenizer reads it -> {file: text}."""
    start = "<|startoftext|>"
    end = "<|endoftext|>"
    ids = {symbol: i for i, symbol in enumerate(tokenizer.symbol)}
    ids |= {start: tokenizer.start, end: tokenizer.end}
    merges = [" ".join(pair) for pair in tokenizer.merges]
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, "bos_token": start}
    about |= {"eos_token": end, "pad_token": end, "unk_token": end}
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(about, indent=1),
    }


def write_safetensors(path, state):
    """Write fp32 tensors as a .safetensors file (its form: peers.read_safetensors)."""
    # Place the tensors one behind the other.
    header = {"__metadata__": {"format": "pt"}}
    last = 0
    for name, x in state.items():
        place = [last, last + 4 * x.numel()]
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": place}
        last = place[1]
    head = json.dumps(header).encode()
    # Readers expect aligned tensors.
    head += b" " * (-len(head) % 8)

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for x in state.values():
            file.write(x.numpy().tobytes())

    data.write_whole(path, write)


def export(model, tokenizer, folder, to):
    """Write the towers of an MRPLIP as a folder for `to`, open_clip or huggingface -> its path."""
    if model.vision.conv:
        raise ValueError("no other package has a convolutional stem: export a run of --size paper")
    clip = hasattr(model.vision.norm_pre, "weight")
    if not clip and to == "huggingface":
        raise ValueError("transformers' CLIP has another image tower than timm: use --to open_clip")
    # Rename the text tower, without the embedding of [mask], which CLIP has not.
    text = read_tower(model.text)
    text["token_embedding.weight"] = text["token_embedding.weight"][: tokenizer.end + 1]
    state = to_open_clip(text, "", "ln_final")
    state["text_projection"] = plain(model.text.proj.weight.T)
    # Rename the image tower, or keep timm's names, which are ours.
    if clip:
        state |= to_open_clip(read_tower(model.vision), "visual.", "ln_post")
        state["visual.proj"] = plain(model.proj.weight.T)
    else:
        state |= {f"visual.trunk.{name}": x for name, x in read_tower(model.vision).items()}
        state["visual.head.proj.weight"] = plain(model.proj.weight)
    # Describe both before anything is written: this may refuse.
    files = tokenizer_files(tokenizer, model.text.context)
    if to == "open_clip":
        weights = "open_clip_model.safetensors"
        files["open_clip_config.json"] = open_clip_config(model, clip)
    else:
        weights = "model.safetensors"
        state = to_huggingface(state)
        files |= huggingface_config(model)
    # Write what names the network last.
    folder = Path(folder)
    write_safetensors(folder / weights, state | {"logit_scale": plain(model.itc_scale)})
    for name, content in files.items():
        data.write_whole(folder / name, content)
    return folder


def write_card(run, model, to):
    """Describe the towers of a run as a model card -> str, with the numbers that were measured."""
    # Of a path tell the end: the rest is about a machine.
    said = data.read_json(Path(run) / "config.json").items()
    said = {k: "/".join(Path(x).parts[-2:]) if isinstance(x, str) else x for k, x in said}
    told = dict(said, name=Path(run).resolve().name, date=datetime.date.today())
    hugging = to == "huggingface"
    told |= {"library": "transformers" if hugging else to, "texts": TEXTS if hugging else ""}
    told["settings"] = ", ".join(f"{k} {x}" for k, x in said.items() if x != "")
    told |= {side: said[side] or "no other" for side in ("vision", "text")}
    # Leave out numbers of other weights, and of prompts and pools that are seldom quoted.
    file = Path(run) / "results.json"
    results = data.read_json(file) if file.exists() else {"about": {}}
    lines, mine = [], networks.fingerprint(model)
    for name, about in results["about"].items():
        for path, row in find_rows(results[name]) if about["fingerprint"] == mine else ():
            cells = [f"{k} {cell(x, m)}" for k, x in row.items() for m in ("f1", "mean") if m in x]
            if cells and not any(part == "single" or part.startswith("top ") for part in path):
                about_what = ", ".join([name, *path, f"{about['n']} of {about['data']}"])
                lines.append(f"- {about_what}: {'; '.join(cells)}")
    return CARD.format(**told) + "\n".join(lines or ["none was measured"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Export a run to open_clip or transformers")
    parser.add_argument("run", metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--to", choices=("open_clip", "huggingface"), required=True)
    parser.add_argument("--out", help="folder to write (RUN/open_clip or RUN/huggingface)")
    args = parser.parse_args()
    model, tokenizer = evaluate.load_run(args.run)
    folder = export(model, tokenizer, args.out or Path(args.run) / args.to, args.to)
    data.write_whole(folder / "README.md", write_card(args.run, model, args.to))
    print(f"wrote {folder}")


if __name__ == "__main__":
    data.run_script(main, "files that are there are whole")
