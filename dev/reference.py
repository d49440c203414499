"""Compare our towers with the packages they stand for, on random weights.

    pip install timm==1.0.31 open_clip_torch==3.3.0 transformers==5.24.0
    python -m dev.reference            # a few minutes, 6 GB
    python -m dev.reference --small    # without the networks of full size
    python -m dev.reference --golden   # write the rows of tests/weights.json that the tests load

Needs the three packages; the tests do not. Each row is the relative error of the features: the norm
of the difference over the norm. All should be below 1e-5. Results by date are in dev/LOG.md.
"""

import argparse
import json
import logging
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers

import data
import model as networks
from protocols import peers
from tests.test_model import clip_state, sines, timm_state, waves

# timm's names, the image sizes to read, and what timm needs beside the name. The third is UNI's.
VITS = [
    ("vit_tiny_patch16_224", (224, 256), {}),
    ("vit_base_patch32_224", (224,), {}),
    ("vit_large_patch16_224", (224, 256, 448), dict(init_values=1e-5)),
]
CLIPS = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14"]


def error(ours, theirs):
    """Return the norm of the difference over the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def shake(net):
    """Add noise where networks begin with zeros or ones, so that nothing agrees by chance."""
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if p.ndim < 2 or "cls" in name or "class" in name:
            p.data.add_(torch.randn_like(p) * 0.3)
    return net.eval()


def check_vit(name, sizes, more):
    """Load timm's weights and compare the class tokens."""
    theirs = shake(timm.create_model(name, num_classes=0, dynamic_img_size=True, **more))
    for size in sizes:
        images = torch.rand(2, 3, size, size)
        vit = peers.load_vit(theirs.state_dict(), size).eval()
        found = error(vit(images)[:, 0], theirs((images - vit.mean) / vit.std))
        print(f"load_vit   {name:24} {size} px  {found:.1e}", flush=True)


def check_clip(name, state, encode, size=224):
    """Load a CLIP and compare both embeddings; encode(images, ids) computes theirs."""
    quick = "quick" in name or "transformers" in name
    vit, tower = peers.load_clip(state, quick, size)
    images, ids = torch.rand(2, 3, size, size), open_clip.tokenize(["large nuclei", "glands"])
    theirs = encode((images - vit.mean) / vit.std, ids)
    image = error(F.normalize(vit.eval()(images)[:, 0] @ vit.proj.T, dim=-1), theirs[0])
    words = error(F.normalize(tower.eval()(ids)[1], dim=-1), theirs[1])
    print(f"load_clip  {name:24} image {image:.1e}  text {words:.1e}", flush=True)


def check_larger():
    """Compare the positions of a CLIP that reads larger images than it was trained on."""
    state = shake(open_clip.create_model("ViT-B-32")).state_dict()
    resized, larger = dict(state), open_clip.create_model("ViT-B-32", force_image_size=256).eval()
    open_clip.model.resize_pos_embed(resized, larger)
    larger.load_state_dict(resized)
    check_clip("ViT-B-32 made 256 px", state, larger, size=256)


def check_transformers():
    """Compare the CLIP of transformers at its default sizes."""
    net = shake(transformers.CLIPModel(transformers.CLIPConfig()))

    def encode(images, ids):
        out = net(pixel_values=images, input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.image_embeds, out.text_embeds

    check_clip("transformers' default", peers.from_huggingface(net.state_dict()), encode)


def golden():
    """Compute class tokens and embeddings by the packages, from weights anyone can write down."""
    # timm's ViT at its own image size and at another one.
    shape = dict(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    more = dict(init_values=1.0, dynamic_img_size=True)
    net = timm.models.vision_transformer.VisionTransformer(**shape, **more).eval()
    net.load_state_dict(sines(timm_state(64)))
    mean, std = torch.tensor(networks.IMAGENET).view(2, 3, 1, 1)
    found = {f"timm{side}": net((waves(side) - mean) / std)[1] for side in (32, 48)}

    # open_clip's CLIP, with each of the two GELUs.
    mean, std = torch.tensor(networks.CLIP_STATS).view(2, 3, 1, 1)
    images = (waves(32) - mean) / std
    ids = torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]])
    vision = dict(image_size=32, patch_size=16, width=64, layers=2, head_width=64)
    words = dict(context_length=9, vocab_size=40, width=64, heads=1, layers=2)
    for quick in (False, True):
        net = open_clip.CLIP(24, vision, words, quick_gelu=quick).eval()
        net.load_state_dict(sines(clip_state()))
        found[f"open_clip image {quick}"] = net.encode_image(images)[1]
        found[f"open_clip text {quick}"] = net.encode_text(ids)[0]

    # The CLIP of transformers.
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, hidden_act="gelu")
    tower |= dict(num_attention_heads=1, projection_dim=24)
    words = dict(vocab_size=40, max_position_embeddings=9, bos_token_id=38, eos_token_id=39)
    vision = dict(tower, image_size=32, patch_size=16)
    words = dict(tower, **words, pad_token_id=39)
    config = transformers.CLIPConfig(projection_dim=24, vision_config=vision, text_config=words)
    net = transformers.CLIPModel(config).eval()
    net.load_state_dict(sines(net.state_dict()))
    both = net(pixel_values=images, input_ids=ids)
    return found | {"hf image": both.image_embeds[1], "hf text": both.text_embeds[0]}


def write_golden():
    """Write these rows of tests/weights.json anew, one a line; its other rows stay."""
    path = Path(__file__).resolve().parent.parent / "tests" / "weights.json"
    rows = json.loads(path.read_text())
    for name, x in golden().items():
        rows[name] = [float(f"{value:.8g}") for value in x.tolist()]
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    data.write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--golden", action="store_true", help="write tests/weights.json")
    parser.add_argument("--small", action="store_true", help="leave out the full size")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    for package in (torch, timm, open_clip, transformers):
        print(package.__name__, package.__version__)
    if args.golden:
        write_golden()
        return
    for name, sizes, more in VITS[:1] if args.small else VITS:
        check_vit(name, sizes, more)
    for name in CLIPS[:2] if args.small else CLIPS:
        net = shake(open_clip.create_model(name))
        check_clip(name, net.state_dict(), net)
    check_larger()
    check_transformers()


if __name__ == "__main__":
    main()
