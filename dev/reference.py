"""Our networks beside the packages they stand for, on random weights: loading, and export back into them. Needs the packages, the tests do not.

    pip install timm==1.0.31 open_clip_torch==3.3.0 transformers==5.24.0
    python dev/reference.py            # small networks, then those of full size (a few minutes, 6 GB)
    python dev/reference.py --golden   # write tests/weights.json anew: what the packages compute from weights that anybody can write down
"""
import argparse
import hashlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import model as networks
import tokenizer
import weights
from test_weights import IDS, TEXTS, clip_states, export_cases, sines, timm_state, waves


def apart(ours, theirs):
    """Norm of the difference over the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def shake(net):
    """Random values also where networks begin with zeros, ones or LayerScale's 1e-5, so that nothing agrees by chance."""
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if p.ndim < 2 or "cls" in name or "class" in name:
            p.data.add_(torch.randn_like(p) * 0.3)
    return net.eval()


@torch.no_grad()
def loading(full):
    """Public weights into ours: relative error of the features."""
    for name, sides, more in ([("vit_tiny_patch16_224", (224, 256), {})] + [("vit_base_patch32_224", (224,), {}), ("vit_large_patch16_224", (224, 256, 448), dict(init_values=1e-5))] * full):
        theirs = shake(timm.create_model(name, num_classes=0, dynamic_img_size=True, **more))
        for side in sides:
            x, vit = torch.rand(2, 3, side, side), weights.load_vit(theirs.state_dict(), side).eval()
            print(f"load_vit   {name:24} {side} px  {apart(vit(x)[:, 0], theirs((x - vit.mean) / vit.std)):.1e}", flush=True)
    for name in ("ViT-B-32", "ViT-B-32-quickgelu") + ("ViT-B-16", "ViT-L-14", "ViT-H-14") * full:
        theirs = shake(open_clip.create_model(name))
        x, ids = torch.rand(2, 3, 224, 224), open_clip.tokenize(["large nuclei in sheets", "glands"])
        vit, text = weights.load_clip(theirs.state_dict(), "quick" in name)
        print(f"load_clip  {name:24} image {apart(vit.eval()(x)[:, 0] @ vit.proj.T, theirs.encode_image((x - vit.mean) / vit.std)):.1e}  text {apart(text(ids)[1], theirs.encode_text(ids)):.1e}", flush=True)
    small, larger = shake(open_clip.create_model("ViT-B-32")), open_clip.create_model("ViT-B-32", force_image_size=256).eval()
    state = dict(small.state_dict())
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    y, (vit, _) = torch.rand(2, 3, 256, 256), weights.load_clip(small.state_dict(), size=256)
    print(f"load_clip  ViT-B-32, made 256 px    image {apart(vit.eval()(y)[:, 0] @ vit.proj.T, larger.encode_image((y - vit.mean) / vit.std)):.1e}", flush=True)
    theirs = shake(transformers.CLIPModel(transformers.CLIPConfig()))
    vit, text = weights.load_clip(theirs.state_dict(), True)
    out = theirs(pixel_values=(x - vit.mean) / vit.std, input_ids=ids, attention_mask=torch.ones_like(ids))
    v, t = F.normalize(vit.eval()(x)[:, 0] @ vit.proj.T, dim=-1), F.normalize(text(ids)[1], dim=-1)
    print(f"load_clip  transformers' default    image {apart(v, out.image_embeds):.1e}  text {apart(t, out.text_embeds):.1e}", flush=True)


@torch.no_grad()
def foreign(model, tok, to, texts):
    """Export, load with the package -> its network, the token ids it makes, the pixel statistics it uses, and an encoder of (pixels, ids)."""
    with tempfile.TemporaryDirectory() as folder:
        weights.export(model, tok, folder, to)
        if to == "open_clip":
            net, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
            stats = next((t.mean, t.std) for t in prepare.transforms if hasattr(t, "mean"))
            return net.eval(), ids, stats, lambda x, i: (net.encode_image(x, normalize=True), net.encode_text(i, normalize=True))
        net, words = transformers.CLIPModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
        ids = words(texts, padding="max_length", max_length=len(model.text.pos), truncation=True, return_tensors="pt")["input_ids"]
        prepare = transformers.CLIPImageProcessor.from_pretrained(folder)

        def encode(x, i):
            out = net(pixel_values=x, input_ids=i)
            return out.image_embeds, out.text_embeds
        return net, ids, (prepare.image_mean, prepare.image_std), encode


@torch.no_grad()
def leaving(name, model, tok, texts):
    """An MRPLIP through each package that has such a network: same ids, embeddings, temperature and statistics?"""
    shake(model)
    for to in ("open_clip", "huggingface") if isinstance(model.vision.ln_pre, torch.nn.LayerNorm) else ("open_clip",):
        net, ids, stats, encode = foreign(model, tok, to, texts)
        x, own = torch.rand(2, 3, model.vision.size, model.vision.size), tok.batch(texts, len(model.text.pos))
        v, t = encode((x - model.vision.mean) / model.vision.std, ids)
        until = [int((row == tok.end).int().argmax()) + 1 for row in own]
        assert all(a[:n].tolist() == b[:n].tolist() for a, b, n in zip(own, ids, until)), "other ids"
        assert np.allclose(stats, [model.vision.mean.flatten(), model.vision.std.flatten()]) and torch.allclose(net.logit_scale, model.itc_scale)
        print(f"export     {name:24} {to:12} image {apart(model.encode_image(x), v):.1e}  text {apart(model.encode_text(own), t):.1e}", flush=True)


@torch.no_grad()
def golden():
    """What the packages compute from the weights of tests/test_weights.py, and the keys and shapes they ask for."""
    out, ids = {}, torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]])
    for side in (32, 48):
        vit = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0, init_values=1.0, dynamic_img_size=True).eval()
        vit.load_state_dict(sines({k: v.shape for k, v in timm_state(64).items()}))
        mean, std = (torch.tensor(networks.IMAGENET[k]).view(3, 1, 1) for k in ("mean", "std"))
        out[f"timm{side}"] = vit((waves(side) - mean) / std)[1]
    mean, std = (torch.tensor(networks.CLIP_STATS[k]).view(3, 1, 1) for k in ("mean", "std"))
    oc, hf = ({k: v.shape for k, v in states.items()} for states in clip_states())
    for quick in (False, True):
        net = open_clip.CLIP(24, dict(image_size=32, patch_size=16, width=64, layers=2, head_width=64), dict(context_length=9, vocab_size=40, width=64, heads=1, layers=2), quick_gelu=quick).eval()
        net.load_state_dict(sines(oc))
        out[f"open_clip image {quick}"], out[f"open_clip text {quick}"] = net.encode_image((waves(32) - mean) / std)[1], net.encode_text(ids)[0]
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu", projection_dim=24)
    config = transformers.CLIPConfig(projection_dim=24, vision_config=dict(tower, image_size=32, patch_size=16),
                                     text_config=dict(tower, vocab_size=40, max_position_embeddings=9, bos_token_id=38, eos_token_id=39, pad_token_id=39))
    net = transformers.CLIPModel(config).eval()
    net.load_state_dict(sines(hf))
    both = net(pixel_values=(waves(32) - mean) / std, input_ids=ids)
    out["hf image"], out["hf text"] = both.image_embeds[1], both.text_embeds[0]
    for name, (model, tok, ways) in export_cases().items():
        for to in ways:
            net, ids, _, encode = foreign(model, tok, to, TEXTS)
            out[f"export {name} {to} image"], out[f"export {name} {to} text"] = (x[-1] for x in encode((waves(model.vision.size) - model.vision.mean) / model.vision.std, ids))
            keys = "\n".join(sorted(f"{k} {tuple(v.shape)}" for k, v in net.state_dict().items()))
            out[f"export {name} {to} keys"] = hashlib.sha256(keys.encode()).hexdigest()
            assert ids[-1, : len(IDS)].tolist() == IDS
    lines = [f"{json.dumps(k)}: {json.dumps(v if isinstance(v, str) else [float(f'{x:.8g}') for x in v.tolist()])}" for k, v in out.items()]
    (ROOT / "tests" / "weights.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--small", action="store_true", help="leave out the networks of full size")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, open_clip {open_clip.__version__}, transformers {transformers.__version__}")
    if args.golden:
        return golden()
    loading(not args.small)
    for name, (model, tok, _) in export_cases().items():
        leaving(name, model, tok, TEXTS)
    if not args.small:
        clip = tokenizer.Tokenizer.from_clip(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
        for name in ("paper", "quiltnet", "plip"):
            leaving(name, networks.MRPLIP(clip.size, clip.end, **networks.SIZES[name]), clip, ["sheets of large nuclei", "no necrosis; mucin"])


if __name__ == "__main__":
    main()
