"""Runs leave for open_clip and transformers: their names, the same embeddings, what cannot leave.

pytest tests/test_export.py
"""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import script
from test_model import GOLDEN, TINY_CLIP, clip_state, mrplip, waves
from test_peers import huggingface_state

import model as networks
import text
from protocols import peers
from protocols.export import export, write_card

MERGES = [("t", "h"), ("th", "e</w>")]
TIMM = dict(size=224, patch=16, width=192, depth=12, heads=3, layer_scale=1e-5)


def weights_of(folder):
    return peers.read_safetensors(next(folder.glob("*.safetensors")))


def hash_keys(state):
    """Hash names and shapes, as was done to files that the other packages had loaded."""
    keys = "\n".join(sorted(f"{name} {tuple(x.shape)}" for name, x in state.items()))
    return hashlib.sha256(keys.encode()).hexdigest()


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_loading_and_exporting_gives_the_file_back(to, tmp_path):
    clip = clip_state()
    model = mrplip(41, 39, TINY_CLIP)
    torch.save(clip, tmp_path / "clip.pt")
    networks.adopt_vision(model, tmp_path / "clip.pt")
    networks.adopt_text(model, tmp_path / "clip.pt")
    words = text.Tokenizer([])
    words.end = 39
    export(model, words, tmp_path / to, to)
    want = clip if to == "open_clip" else huggingface_state(clip)
    state = weights_of(tmp_path / to)
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], want[name]) for name in want if name != "logit_scale")
    assert state["logit_scale"] == model.itc_scale


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_what_is_written_computes_the_same(to, quick, tmp_path):
    words = text.Tokenizer(MERGES)
    model = mrplip(words.size, words.end, dict(TINY_CLIP, quick=quick))
    for block in model.text.blocks:
        block.mlp.quick = quick
    export(model, words, tmp_path, to)
    state = weights_of(tmp_path)
    # Names and shapes are those that the package loads.
    assert hash_keys(state) == GOLDEN[f"export {'quick' if quick else 'clip'} {to} keys"]
    path = next(tmp_path.glob("*.safetensors"))
    vit, tower = peers.load_clip(peers.read_state(path), file=path)
    ids = words.batch(["mucin", "the mucin"], 9)
    images = waves(32)
    v = F.normalize(vit.eval()(images)[:, 0] @ vit.proj.T, dim=-1)
    assert torch.allclose(v, model.encode_image(images), atol=1e-5)
    assert torch.allclose(F.normalize(tower(ids)[1], dim=-1), model.encode_text(ids), atol=1e-5)

    name = "config.json" if to == "huggingface" else "open_clip_config.json"
    config = json.loads((tmp_path / name).read_text())
    if to == "huggingface":
        acts = {config[f"{side}_config"]["hidden_act"] for side in ("vision", "text")}
        assert acts == {"quick_gelu" if quick else "gelu"}
        assert config["text_config"]["eos_token_id"] == words.end
    else:
        assert config["model_cfg"]["quick_gelu"] is quick
        assert config["model_cfg"]["text_cfg"]["vocab_size"] == words.end + 1 == 516
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert vocabulary["<|endoftext|>"] == words.end == 515
    # The ids of a text follow from the written vocabulary alone.
    assert ids[1, :3].tolist() == [words.start, vocabulary["the</w>"], vocabulary["m"]]
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\nt h\nth e</w>\n"
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_timm_tower_leaves_with_its_layer_scale_folded(tmp_path):
    words = text.Tokenizer(MERGES)
    model = mrplip(words.size, words.end, TIMM)
    # Its text has the other GELU, and the same word in the configuration.
    for block in model.text.blocks:
        block.mlp.quick = True
    for block in model.vision.blocks:
        block.ls1.gamma.data.uniform_(0.5, 1.5)
        block.ls2.gamma.data.uniform_(0.5, 1.5)
    export(model, words, tmp_path, "open_clip")
    state = weights_of(tmp_path)
    assert hash_keys(state) == GOLDEN["export trunk open_clip keys"]
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    assert config["vision_cfg"]["timm_model_name"] == "vit_tiny_patch16_224"
    trunk = {name: x for name, x in state.items() if name.startswith("visual.trunk.")}
    path = tmp_path / "trunk.pt"
    torch.save(trunk, path)
    vit = peers.load_vit(peers.read_state(path), file=path).eval()
    with torch.no_grad():
        tokens, images = vit(waves(224)), waves(224)
        v = F.normalize(tokens[:, 0] @ state["visual.head.proj.weight"].T, dim=-1)
        assert torch.allclose(v, model.encode_image(images), atol=1e-5)
        # A run may start from what left.
        other = mrplip(words.size, words.end, TIMM)
        networks.adopt_vision(other, path)
        assert torch.equal(other.vision.blocks[3].ls1.gamma, torch.ones(192))
        assert torch.allclose(other.vision(images), tokens, atol=1e-4)


def test_what_cannot_leave_is_one_sentence(tmp_path):
    words = text.Tokenizer([])
    conv = dict(size=32, patch=16, width=32, depth=1, heads=2, stem="conv")
    plain = dict(size=32, patch=16, width=64, depth=2, heads=1)
    out = tmp_path / "x"
    with pytest.raises(ValueError, match="convolutional stem: export a run of --size paper"):
        export(mrplip(41, 39, conv), words, out, "open_clip")
    with pytest.raises(ValueError, match="use --to open_clip"):
        export(mrplip(41, 39, plain), words, out, "huggingface")
    with pytest.raises(
        ValueError, match="no ViT of 2 x 64 in 1 heads, patches of 16, images of 32 px"
    ):
        export(mrplip(41, 39, plain), words, out, "open_clip")
    # timm's tiny has three heads.
    with pytest.raises(ValueError, match="no ViT of 12 x 192 in 4 heads"):
        export(mrplip(41, 39, dict(TIMM, heads=4)), words, out, "open_clip")
    for shape in (TINY_CLIP, TIMM):
        with pytest.raises(ValueError, match="one GELU for both towers"):
            export(mrplip(41, 39, dict(shape, quick=True)), words, out, "open_clip")
    assert not out.exists()


def test_a_model_card_goes_along(tmp_path):
    words = text.Tokenizer(MERGES)
    model = mrplip(words.size, words.end, TINY_CLIP)
    run = tmp_path / "mine"
    run.mkdir()
    config = {"data": "/home/me/bags", "vision": "", "text": "/home/me/quiltnet/w.bin", "k_o": 8}
    (run / "config.json").write_text(json.dumps(config))
    card = write_card(run, model, "huggingface")
    assert card.startswith("---\nlibrary_name: transformers\nlicense: other\n---\n# mine\n")
    assert "trained\non me/bags, exported on 20" in card and "/home" not in card
    assert "not for clinical use" in card and "UNI is gated and non-commercial" in card
    assert "(image: no other; text: quiltnet/w.bin)" in card and "k_o 8" in card
    assert card.endswith("\n\nnone was measured\n")
    # Its tokenizer cleans nothing; open_clip's does.
    assert "here.\n\n**Texts** with HTML entities" in card and "ftfy.fix_text(text)" in card
    # Tell numbers of these weights only.
    row = {"5x": {"f1": 0.8125, "interval": {"f1": [0.7, 0.9]}}}
    found = {"organ": {"ensemble": {"patch": row, "top 10": row}, "single": {"patch": row}}}
    for mark, told in ((networks.fingerprint(model), 1), ("other", 0)):
        about = {"fingerprint": mark, "n": 60, "data": "bags/test"}
        results = {"about": {"zeroshot": about}, "zeroshot": found}
        (run / "results.json").write_text(json.dumps(results))
        card = write_card(run, model, "open_clip")
        assert "here.\n\n**Intended use**" in card
        line = "- zeroshot, organ, ensemble, patch, 60 of bags/test: 5x 0.81 (0.70-0.90)\n"
        assert card.count("0.81 (") == card.count(line) == told


def test_the_command(tmp_path):
    words = text.Tokenizer([])
    model = networks.MRPLIP(words.size, words.end, **networks.SIZES["synthetic"])
    torch.save(
        {"model": model.state_dict(), "tokenizer": words.merges, "step": 0}
        | {"config": {"size": "synthetic"}},
        tmp_path / "ckpt.pt",
    )
    (tmp_path / "tokenizer.json").write_text(words.to_json())
    done = script("protocols.export", tmp_path, "--to", "open_clip")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no other package has a convolutional stem")
    done = script("protocols.export", tmp_path / "nowhere", "--to", "huggingface")
    assert done.returncode == 1 and "holds no ckpt.pt" in done.stderr


def test_the_packages_load_what_is_written(tmp_path):
    words = text.Tokenizer(MERGES)
    model = mrplip(words.size, words.end, TINY_CLIP)
    ids, images = words.batch(["mucin", "the mucin"], 9), torch.rand(2, 3, 32, 32)
    pixels = (images - model.vision.mean) / model.vision.std
    transformers = pytest.importorskip("transformers")
    export(model, words, tmp_path / "hf", "huggingface")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
        assert torch.allclose(out.image_embeds, model.encode_image(images), atol=1e-5)
        assert torch.allclose(out.text_embeds, model.encode_text(ids), atol=1e-5)
    open_clip = pytest.importorskip("open_clip")
    export(model, words, tmp_path / "oc", "open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'oc'}").eval()
    with torch.no_grad():
        v = theirs.encode_image(pixels, normalize=True)
        assert torch.allclose(v, model.encode_image(images), atol=1e-5)
        assert torch.allclose(theirs.encode_text(ids, True), model.encode_text(ids), atol=1e-5)
