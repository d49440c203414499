"""Other people's models: safetensors, Hugging Face's names, and the calls that protocols use.

pytest tests/test_peers.py
"""

import argparse
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import script
from test_model import clip_state, is_golden, reference_vit, sines, timm_state, waves

import evaluate
import model as networks
import text
from protocols import peers


def huggingface_state(clip):
    """Write the CLIP of `clip_state` down in the names of transformers' CLIPModel."""
    out = {"logit_scale": clip["logit_scale"]}
    out["visual_projection.weight"] = clip["visual.proj"].T
    out["text_projection.weight"] = clip["text_projection"].T
    pairs = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    for kind in ("weight", "bias"):
        pairs[f"vision_model.pre_layrnorm.{kind}"] = f"visual.ln_pre.{kind}"
        pairs[f"vision_model.post_layernorm.{kind}"] = f"visual.ln_post.{kind}"
        pairs[f"text_model.final_layer_norm.{kind}"] = f"ln_final.{kind}"
        for theirs, ours in (("vision_model.", "visual."), ("text_model.", "")):
            for i in range(2):
                a, b = f"{theirs}encoder.layers.{i}.", f"{ours}transformer.resblocks.{i}."
                pairs[f"{a}layer_norm1.{kind}"] = f"{b}ln_1.{kind}"
                pairs[f"{a}layer_norm2.{kind}"] = f"{b}ln_2.{kind}"
                pairs[f"{a}mlp.fc1.{kind}"] = f"{b}mlp.c_fc.{kind}"
                pairs[f"{a}mlp.fc2.{kind}"] = f"{b}mlp.c_proj.{kind}"
                pairs[f"{a}self_attn.out_proj.{kind}"] = f"{b}attn.out_proj.{kind}"
                parts = clip[f"{b}attn.in_proj_{kind}"].chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    out[f"{a}self_attn.{letter}_proj.{kind}"] = part
    return out | {theirs: clip[ours] for theirs, ours in pairs.items()}


def arguments(*argv):
    """Parse the flags of a model as every protocol does."""
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


# --------------------------------------------------------------------------------------------------
# Hugging Face


def test_golden_huggingface():
    """What transformers 5.24 computes from weights that anyone can write down."""
    state = sines(huggingface_state(clip_state()))
    state["text_model.embeddings.position_ids"] = torch.arange(9)
    vit, tower = peers.load_clip(peers.from_huggingface(state))
    v = vit.eval()(waves(32))[1, 0] @ vit.proj.T
    assert is_golden(F.normalize(v, dim=-1), "hf image")
    ids = torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]])
    assert is_golden(F.normalize(tower(ids)[1][0], dim=-1), "hf text")


def test_a_part_of_a_huggingface_clip_is_one_sentence(tmp_path):
    state = huggingface_state(clip_state())
    for name in ("visual_projection.weight", "text_model.encoder.layers.1.self_attn.k_proj.bias"):
        torch.save({k: x for k, x in state.items() if k != name}, tmp_path / "x.bin")
        lacks = f"x.bin is no CLIP of Hugging Face: it lacks .*{name[-11:]}"
        with pytest.raises(ValueError, match=lacks):
            peers.read_state(tmp_path / "x.bin")


# --------------------------------------------------------------------------------------------------
# What configs beside a file tell

OPEN_CLIP = {"vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 1}}
SAYS = [
    ("config", {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}, 0),
    ("config", {"vision_config": {}, "text_config": {"eos_token_id": 2}}, 1),
    ("open_clip_config", {"model_cfg": OPEN_CLIP | {"quick_gelu": True}}, 1),
    ("open_clip_config", {"model_cfg": OPEN_CLIP | {"quick_gelu": False}}, 0),
    ("clip", {"quick_gelu": True}, 1),
    ("other", {"quick_gelu": True}, 0),  # of another file
]


@pytest.mark.parametrize("name, config, quick", SAYS)
def test_the_gelu_of_a_clip_is_that_of_its_config(name, config, quick, tmp_path, capsys):
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    torch.save(sines(clip_state()), tmp_path / "clip.pt")
    vit, tower = peers.load_clip(peers.read_state(tmp_path / "clip.pt"), file=tmp_path / "clip.pt")
    ids = torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]])
    assert is_golden(vit.eval()(waves(32))[1, 0] @ vit.proj.T, f"open_clip image {bool(quick)}")
    assert is_golden(tower(ids)[1][0], f"open_clip text {bool(quick)}")
    assert ("no config tells its vision tower" in capsys.readouterr().out) == (name == "other")
    if name != "other":
        with pytest.raises(ValueError, match="clip.pt: its config says (hidden_act|quick_gelu) "):
            peers.load_clip(clip_state(), not quick, file=tmp_path / "clip.pt")


def test_heads_and_pixels_of_a_vit_are_those_of_its_config(tmp_path):
    path, images = tmp_path / "vit.pt", torch.rand(2, 3, 32, 32)
    about = {"num_heads": 3, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    with pytest.raises(ValueError, match='vit.pt: nothing tells the heads of 48 .*"num_heads": N'):
        peers.load_vit(timm_state(48), file=path)
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = reference_vit(timm_state(48), (images - mean) / std, 3, 1e-6)
    timm = {"architecture": "vit_x", "model_args": {"num_heads": 3}, "pretrained_cfg": about}
    pixels = {name: about[name] for name in ("mean", "std")}
    clip = {"vision_cfg": {"head_width": 16}, "preprocess_cfg": pixels, "layer_norm_eps": 1e-6}
    for name, config in (("config", timm), ("vit", about), ("open_clip_config", clip)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        vit = peers.load_vit(timm_state(48), file=path).eval()
        assert torch.allclose(vit(images), expected, atol=1e-5)
        (tmp_path / f"{name}.json").unlink()
    (tmp_path / "vit.json").write_text(json.dumps({"layer_norm_eps": 1e-3, "num_heads": 3}))
    assert peers.load_vit(timm_state(48), file=path).blocks[0].norm2.eps == 1e-3
    for odd in ({"act_layer": "silu"}, {"global_pool": "avg"}):
        (tmp_path / "vit.json").write_text(json.dumps({"num_heads": 3} | odd))
        with pytest.raises(ValueError, match=f"vit.pt: its config says {[*odd][0]}"):
            peers.load_vit(timm_state(48), file=path)


# --------------------------------------------------------------------------------------------------
# safetensors


def write_safetensors(path, tensors, **change):
    """Write what the format's description says: 8 bytes of length, a header, the raw tensors."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        part = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        place = [len(raw), len(raw) + len(part)]
        about = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": place}
        header[name] = about | change
        raw += part
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw)


def test_safetensors_of_every_kind_come_back(tmp_path):
    path = tmp_path / "mixed.safetensors"
    state = {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.tensor(3)}
    state |= {"c": torch.arange(4.0).bfloat16(), "d": torch.zeros(0, 5)}
    write_safetensors(path, state)
    found = peers.read_safetensors(path)
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype
    # Writing into a tensor leaves the file alone.
    found["a"] += 1
    assert torch.equal(peers.read_safetensors(path)["a"], state["a"])


def test_safetensors_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    state = timm_state(64)
    package.save_file(state, tmp_path / "uni.safetensors")
    found = peers.read_safetensors(tmp_path / "uni.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_damaged_safetensors_are_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, timm_state(64))
    whole = path.read_bytes()
    damaged = [whole[:-10], whole[:100], whole[:5], b"", b"\xff" * 8 + whole[8:]]
    damaged += [whole[:8] + b"[" + whole[9:], bytes(8) + whole[8:], b"hello world, no weights"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors is no whole safetensors file"):
            peers.read_state(path)
    changes = [{"data_offsets": [-4, 0]}, {"data_offsets": [0, 10**12]}, {"shape": [3]}]
    changes += [{"shape": [-1, -2]}, {"shape": None}, {"dtype": "F8"}, {"dtype": None}]
    changes += [{"data_offsets": [0]}, {"data_offsets": ["0", "8"]}]
    for change in changes:
        write_safetensors(path, {"a": torch.zeros(2)}, **change)
        with pytest.raises(ValueError, match="x.safetensors is no whole safetensors file"):
            peers.read_safetensors(path)


def test_the_command_rewrites_what_train_cannot_read(tmp_path):
    clip = clip_state()
    write_safetensors(tmp_path / "model.safetensors", huggingface_state(clip))
    config = {"vision_config": {}, "text_config": {"hidden_act": "quick_gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "sub/clip.pt"
    script("protocols.peers", tmp_path / "model.safetensors", "--out", out, check=True)
    # Its config comes along.
    assert all(tower.blocks[0].mlp.quick for tower in peers.load_clip(clip, file=out))
    state = networks.read_weights(out)
    assert state.keys() == clip.keys()
    assert all(torch.equal(state[name], clip[name]) for name in clip)
    done = script("protocols.peers", tmp_path / "none.bin", "--out", tmp_path / "x.pt")
    assert done.returncode == 1 and re.match("error: .*none.bin", done.stderr)
    assert "Traceback" not in done.stderr and not (tmp_path / "x.pt").exists()


# --------------------------------------------------------------------------------------------------
# Models


@pytest.fixture
def words(tmp_path):
    """Learn a small tokenizer and save it."""
    found = text.Tokenizer.train(["benign lung tissue", "lung adenocarcinoma"], 300)
    (tmp_path / "words.json").write_text(found.to_json())
    return found


def test_a_clip_has_the_calls_that_protocols_use(tmp_path, words):
    clip = clip_state(vocab=words.end + 1)
    write_safetensors(tmp_path / "plip.safetensors", huggingface_state(clip))
    torch.save(clip, tmp_path / "clip.bin")
    flags = ["--tokenizer", tmp_path / "words.json"]
    plain = peers.load(arguments("--clip", tmp_path / "clip.bin", *flags))
    other = peers.load(arguments("--clip", tmp_path / "plip.safetensors", *flags))
    assert plain.name == "clip" and other.name == "plip"
    assert plain.fingerprint == other.fingerprint
    # The same file with another GELU gives other features and says so.
    assert plain.model.itc_scale == clip["logit_scale"]  # probabilities depend on it
    quick = peers.load(arguments("--clip", tmp_path / "clip.bin", *flags, "--quick-gelu"))
    assert quick.fingerprint != plain.fingerprint
    ids = plain.tokenizer.batch(["lung tissue"], plain.model.text.context)
    assert not torch.allclose(plain.model.encode_text(ids), quick.model.encode_text(ids), atol=1e-4)

    images = torch.rand(2, 3, 48, 48)
    found = evaluate.embed_images(plain.model, images)
    assert torch.allclose(found["image_embedding"].norm(dim=1), torch.ones(2), atol=1e-5)
    assert found["backbone"].shape == (2, 64)
    x = torch.rand(2, 3, 32, 32)
    tokens = plain.model.vision(x)
    by_hand = F.normalize(tokens[:, 0] @ clip["visual.proj"], dim=-1)
    assert torch.allclose(plain.model.to_shared(tokens), by_hand, atol=1e-6)
    assert evaluate.embed_texts(plain.model, plain.tokenizer, ["lung", "tissue"]).shape == (2, 24)


def test_a_vit_alone_is_its_class_token(tmp_path, capsys):
    (tmp_path / "uni").mkdir()
    torch.save(timm_state(), tmp_path / "uni/pytorch_model.bin")
    peer = peers.load(arguments("--vit", tmp_path / "uni/pytorch_model.bin"))
    assert peer.name == "uni" and peer.tokenizer is None and peer.model.text is None
    x = torch.rand(2, 3, 32, 32)
    by_hand = F.normalize(peer.model.vision(x)[:, 0], dim=-1)
    assert torch.equal(peer.model.to_shared(peer.model.vision(x)), by_hand)
    # So is the tower of a larger model: KEEP's, or open_clip's around timm.
    for prefix in ("visual.", "visual.trunk."):
        whole = {f"{prefix}{name}": x for name, x in timm_state().items()}
        torch.save(whole | {"text.pooler.weight": torch.zeros(3, 3)}, tmp_path / "keep.bin")
        found = peers.load(arguments("--vit", tmp_path / "keep.bin"))
        assert found.fingerprint == peer.fingerprint
        assert f"only {prefix}* is read" in capsys.readouterr().out
    # Pixels that no config tells are told by flags, and then it is another model.
    flags = ["--vit", tmp_path / "uni/pytorch_model.bin", "--mean", ".5", ".4", ".3"]
    other = peers.load(arguments(*flags, "--std", ".2", ".2", ".1"))
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.2, 0.1]]).view(2, 3, 1, 1)
    ours = other.model.vision(x * std + mean)
    peer.model.vision.mean.zero_()
    peer.model.vision.std.fill_(1)
    assert torch.allclose(ours, peer.model.vision(x), atol=1e-5)
    assert other.fingerprint != peer.fingerprint


def test_random_is_the_same_each_time_and_a_run_brings_its_keywords(tmp_path, words):
    first, again = peers.load(arguments("random")), peers.load(arguments("random"))
    assert first.fingerprint == again.fingerprint and first.name == "random"
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(1)
    model = networks.MRPLIP(words.size, words.end, **networks.SIZES["synthetic"])
    saved = {"model": model.state_dict(), "tokenizer": words.merges, "step": 0}
    torch.save(saved | {"config": {"size": "synthetic"}}, run / "ckpt.pt")
    (run / "config.json").write_text(json.dumps({"size": "synthetic", "k_o": 3}))
    (run / "tokenizer.json").write_text(words.to_json())
    (run / "keywords.json").write_text(json.dumps(["mucin", "gland"]))
    peer = peers.load(arguments(run))
    assert (peer.name, peer.keywords, peer.k_o) == ("run", ["mucin", "gland"], 3)
    assert peer.fingerprint == networks.fingerprint(model) != first.fingerprint
    (run / "keywords.json").unlink()
    assert list(peers.load(arguments(run)).keywords) == []


def test_a_wrong_model_is_one_sentence(tmp_path, words):
    torch.save(timm_state(), tmp_path / "uni.bin")
    torch.save(clip_state(), tmp_path / "clip.bin")
    (tmp_path / "note.txt").write_text("hello")
    wrong = {
        (): "name one model",
        ("random", "--vit", tmp_path / "uni.bin"): "name one model",
        ("--clip", tmp_path / "clip.bin"): "clip.bin needs --tokenizer FILE",
        ("random", "--mean", ".5", ".5", ".5"): "of a --vit or --clip",
        ("--vit", tmp_path / "uni.bin", "--std", "58", "57", "57"): "shares of 1",
        ("--vit", tmp_path / "clip.bin"): "clip.bin is not a plain ViT",
        ("--vit", tmp_path / "note.txt"): "note.txt holds no weights",
        ("--vit", tmp_path / "none.bin"): "none.bin holds no weights",
        (tmp_path / "nowhere",): "nowhere holds no ckpt.pt",
    }
    flags = ("--tokenizer", tmp_path / "words.json")
    wrong[("--clip", tmp_path / "uni.bin", *flags)] = "uni.bin is no CLIP in the names of open_clip"
    wrong[("--clip", tmp_path / "clip.bin", *flags)] = "clip.bin belongs to another tokenizer"
    wrong[("--clip", tmp_path / "clip.bin", "--tokenizer", tmp_path / "note.txt")] = "merge list"
    for argv, message in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            peers.load(arguments(*argv))
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
