"""pytest tests/test_weights.py — public weights: the layouts of timm, open_clip and Hugging Face, files of tensors, refusals by name."""
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as networks
import tokenizer
import train
import weights


def reference_vit(s, x, heads, eps):
    """timm's ViT written with torch's functions, straight from the keys of its state dict."""
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=s["patch_embed.proj.weight"].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    norm = lambda x, p: F.layer_norm(x, x.shape[-1:], s[p + ".weight"], s[p + ".bias"], eps)
    for i in range(2):
        p = f"blocks.{i}."
        y = norm(x, p + "norm1")
        q, k, v = F.linear(y, s[p + "attn.qkv.weight"], s[p + "attn.qkv.bias"]).chunk(3, -1)
        split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)
        a = (split(q) @ split(k).mT / math.sqrt(x.shape[-1] / heads)).softmax(-1) @ split(v)
        x = x + s[p + "ls1.gamma"] * F.linear(a.transpose(1, 2).flatten(2), s[p + "attn.proj.weight"], s[p + "attn.proj.bias"])
        y = F.gelu(F.linear(norm(x, p + "norm2"), s[p + "mlp.fc1.weight"], s[p + "mlp.fc1.bias"]))
        x = x + s[p + "ls2.gamma"] * F.linear(y, s[p + "mlp.fc2.weight"], s[p + "mlp.fc2.bias"])
    return norm(x, "norm")


def timm_state(D=128, patch=16, grid=2):
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + grid * grid, D), "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    for i in range(2):
        p = f"blocks.{i}."
        shapes |= {p + "norm1.weight": (D,), p + "norm1.bias": (D,), p + "norm2.weight": (D,), p + "norm2.bias": (D,), p + "attn.qkv.weight": (3 * D, D),
                   p + "attn.qkv.bias": (3 * D,), p + "attn.proj.weight": (D, D), p + "attn.proj.bias": (D,), p + "ls1.gamma": (D,), p + "ls2.gamma": (D,),
                   p + "mlp.fc1.weight": (4 * D, D), p + "mlp.fc1.bias": (4 * D,), p + "mlp.fc2.weight": (D, 4 * D), p + "mlp.fc2.bias": (D,)}
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(*v, generator=g) * 0.1 for k, v in shapes.items()}


def test_load_vit_computes_what_timm_does(tmp_path):
    state, images = timm_state(), torch.rand(2, 3, 32, 32)
    torch.save(state, tmp_path / "uni.bin")
    vit = weights.load_vit(tmp_path / "uni.bin").eval()
    normal = (images - vit.mean) / vit.std
    assert vit.size == 32 and torch.allclose(vit(images), reference_vit(state, normal, 2, 1e-6), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch warns of TorchScript
def test_a_wrong_weights_file_is_one_sentence(tmp_path):
    state = timm_state()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"1 keys missing \['blocks.1.mlp.fc2.bias'\]"):
        weights.load_vit(state)
    with pytest.raises(ValueError, match="not a timm vision transformer"):
        weights.load_vit({"weight": torch.zeros(2)})
    torch.save(state, tmp_path / "whole.bin")
    for bad in (b"hello", b"", (tmp_path / "whole.bin").read_bytes()[:-400]):
        (tmp_path / "x.bin").write_bytes(bad)
        with pytest.raises(ValueError, match=f"x.bin is not a file of tensors.*its {len(bad):,} bytes are a part of one"):
            weights.load_vit(tmp_path / "x.bin")
    torch.save({"a": Path("x")}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin holds more than tensors"):
        weights.load_vit(tmp_path / "x.bin")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin is a TorchScript archive"):
        weights.load_vit(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="nowhere.bin is not a file of tensors.*there is none"):
        weights.load_vit(tmp_path / "nowhere.bin")
    for dialect in clip_states():
        for key in dialect:
            if key != "logit_scale":
                with pytest.raises(ValueError, match="neither an open_clip nor|keys missing"):
                    weights.load_clip({k: v for k, v in dialect.items() if k != key})
    with pytest.raises(ValueError, match="is a timm ViT without a text tower"):
        weights.load_clip(timm_state())
    with pytest.raises(ValueError, match="is a CLIP with its text tower"):
        weights.load_vit(clip_states()[0])
    with pytest.raises(ValueError, match="neither an open_clip nor"):
        weights.load_clip({"weight": torch.zeros(2)})


def clip_states(D=64, V=40):
    """One random CLIP in both dialects: open_clip's and Hugging Face's names for the same tensors."""
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g) * 0.1
    oc, hf = {}, {}
    for side, o, h in (("v", "visual.", "vision_model."), ("t", "", "text_model.")):
        for i in range(2):
            a, b = f"{o}transformer.resblocks.{i}.", f"{h}encoder.layers.{i}."
            w, bias = r(3 * D, D), r(3 * D)
            oc |= {a + "attn.in_proj_weight": w, a + "attn.in_proj_bias": bias}
            for c, x, y in zip("qkv", w.chunk(3), bias.chunk(3)):
                hf |= {f"{b}self_attn.{c}_proj.weight": x, f"{b}self_attn.{c}_proj.bias": y}
            for p, q, shape in (("attn.out_proj", "self_attn.out_proj", (D, D)), ("ln_1", "layer_norm1", (D,)), ("ln_2", "layer_norm2", (D,)),
                                ("mlp.c_fc", "mlp.fc1", (4 * D, D)), ("mlp.c_proj", "mlp.fc2", (D, 4 * D))):
                for kind, s in (("weight", shape), ("bias", shape[:1])):
                    oc[f"{a}{p}.{kind}"] = hf[f"{b}{q}.{kind}"] = r(*s)
    pairs = [("visual.class_embedding", "vision_model.embeddings.class_embedding", (D,)), ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", (5, D)),
             ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", (D, 3, 16, 16)), ("token_embedding.weight", "text_model.embeddings.token_embedding.weight", (V, D)),
             ("positional_embedding", "text_model.embeddings.position_embedding.weight", (9, D))]
    for o, h in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"), ("ln_final", "text_model.final_layer_norm")):
        pairs += [(f"{o}.{k}", f"{h}.{k}", (D,)) for k in ("weight", "bias")]
    for o, h, s in pairs:
        oc[o] = hf[h] = r(*s)
    oc["visual.proj"], oc["text_projection"] = r(D, 24), r(D, 24)
    hf["visual_projection.weight"], hf["text_projection.weight"] = oc["visual.proj"].T, oc["text_projection"].T
    return oc | {"logit_scale": torch.zeros(())}, hf | {"logit_scale": torch.zeros(())}


def test_open_clip_and_hugging_face_dialects_agree():
    oc, hf = clip_states()
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[38, 5, 6, 39, 0]])
    (v1, t1), (v2, t2) = weights.load_clip(oc), weights.load_clip(hf)
    assert torch.equal(v1(images), v2(images)) and torch.equal(t1(ids)[1], t2(ids)[1]) and torch.equal(v1.proj, v2.proj)
    prefixed = {(k if k.startswith(("visual.", "logit")) else "text." + k): x for k, x in oc.items()}
    assert torch.equal(weights.load_clip(prefixed)[1](ids)[1], t1(ids)[1])
    assert not torch.allclose(weights.load_clip(oc, quick_gelu=True)[1](ids)[1], t1(ids)[1], atol=1e-4)
    causal = nn.MultiheadAttention(64, 1, batch_first=True)  # an independent text tower from torch's modules
    x = oc["token_embedding.weight"][ids] + oc["positional_embedding"][:5]
    for i in range(2):
        s = {k.split(f"resblocks.{i}.")[1]: w for k, w in oc.items() if k.startswith(f"transformer.resblocks.{i}.")}
        causal.load_state_dict({k[5:]: w for k, w in s.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (64,), s["ln_1.weight"], s["ln_1.bias"])
        x = x + causal(y, y, y, attn_mask=torch.ones(5, 5).triu(1).bool(), need_weights=False)[0]
        y = F.layer_norm(x, (64,), s["ln_2.weight"], s["ln_2.bias"])
        x = x + F.linear(F.gelu(F.linear(y, s["mlp.c_fc.weight"], s["mlp.c_fc.bias"])), s["mlp.c_proj.weight"], s["mlp.c_proj.bias"])
    pooled = F.layer_norm(x, (64,), oc["ln_final.weight"], oc["ln_final.bias"])[0, 3] @ oc["text_projection"]
    assert torch.allclose(t1(ids)[1][0], pooled, atol=1e-5)


# weights.json holds what timm 1.0.31, open_clip 3.3 and transformers 5.24 compute from weights that anybody can write down.
GOLDEN = json.loads(Path(__file__).with_name("weights.json").read_text())


def sines(shapes):
    """The i-th tensor by name is sin(i + 0.01 (i + 1) n) / 10."""
    return {k: (torch.sin(i + 0.01 * (i + 1) * torch.arange(math.prod(s), dtype=torch.float64)) / 10).float().view(s) for i, (k, s) in enumerate(sorted(shapes.items()))}


def waves(side):
    return (torch.sin(torch.arange(2 * 3 * side * side, dtype=torch.float64) * 0.37) / 2 + 0.5).float().view(2, 3, side, side)


def close(got, name):
    want = torch.tensor(GOLDEN[name])
    return (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("side", [32, 48])
def test_golden_timm_at_its_own_and_another_size(side):
    vit = weights.load_vit(sines({k: v.shape for k, v in timm_state(64).items()}), side).eval()
    assert vit.size == side and close(vit(waves(side))[1, 0], f"timm{side}")


@pytest.mark.parametrize("quick", [False, True])
def test_golden_open_clip(quick):
    shapes = {k: v.shape for k, v in clip_states()[0].items()}
    vit, tower = weights.load_clip(sines(shapes), quick)
    assert close(vit.eval()(waves(32))[1, 0] @ vit.proj.T, f"open_clip image {quick}")
    assert close(tower(torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]]))[1][0], f"open_clip text {quick}")


def test_golden_hugging_face():
    vit, tower = weights.load_clip(sines({k: v.shape for k, v in clip_states()[1].items()}))
    assert close(F.normalize(vit.eval()(waves(32))[1, 0] @ vit.proj.T, dim=-1), "hf image")
    assert close(F.normalize(tower(torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]]))[1][0], dim=-1), "hf text")


def test_sizes_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match="images of 40 px cannot be cut into the patches of 16 px"):
        weights.load_vit(timm_state(), 40)
    state = timm_state() | {"pos_embed": torch.zeros(1, 6, 128)}
    with pytest.raises(ValueError, match="5 places for patches, which make no square"):
        weights.load_vit(state)


@pytest.mark.parametrize("key,words", [("reg_token", "register tokens"), ("visual.attn_pool_contrast.query", "CONCH"), ("visual.layer1.0.conv1.weight", "ResNet"),
                                       ("visual.trunk.stages.0.norm1.weight", "no plain ViT"), ("relative_position_bias_table", "BEiT"), ("fc_norm.weight", "averages"), ("mask_token", "DINOv2"), ("attn_pool.latent", "attentional pooling")])
def test_networks_that_are_something_else_are_refused_by_name(key, words):
    for load in (weights.load_vit, weights.load_clip):
        with pytest.raises(ValueError, match=f"the state dict cannot be used: it is .*{words}.*{key}"):
            load(timm_state() | {key: torch.zeros(1)})


def test_conch_is_refused_though_its_trunk_would_fit():
    conch = {f"visual.trunk.{k}": v for k, v in timm_state().items()} | {"visual.attn_pool_contrast.query": torch.zeros(1, 768)}
    for load in (weights.load_vit, weights.load_clip):
        with pytest.raises(ValueError, match="it is CONCH"):
            load(conch)


def test_gated_layers_are_refused_by_name():
    state = timm_state()
    state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"] = torch.zeros(512, 128), torch.zeros(128, 256)
    with pytest.raises(ValueError, match="SwiGLU.*blocks.0.mlp.fc1.weight"):
        weights.load_vit(state)


def write_safetensors(path, tensors, **change):
    """As the format's description says: 8 bytes of length, a JSON header, the raw tensors."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        payload = t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else t.view(1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [len(raw), len(raw) + len(payload)], **change}
        raw += payload
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw)


def test_safetensors(tmp_path):
    state = timm_state(64)
    write_safetensors(tmp_path / "uni.safetensors", state)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(weights.load_vit(tmp_path / "uni.safetensors").eval()(images), weights.load_vit(state).eval()(images))
    mixed = {"a": torch.arange(6.).view(2, 3).half(), "b": torch.tensor(3), "c": torch.arange(4.).bfloat16(), "d": torch.zeros(0, 5)}
    write_safetensors(tmp_path / "mixed.safetensors", mixed)
    got = weights.read_safetensors(tmp_path / "mixed.safetensors")
    assert got.keys() == mixed.keys() and all(torch.equal(got[k], mixed[k]) and got[k].dtype == mixed[k].dtype for k in mixed)


def test_damaged_safetensors_are_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, timm_state(64))
    whole = path.read_bytes()
    for damage, words in ((whole[:-10], "truncated or damaged: tensor"), (whole[:100], "its header should have"), (b"", "its header should have"),
                          (b"\xff" * 8 + whole[8:], "its header should have"), (whole[:8] + b"[" + whole[9:], "its header cannot be read")):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"x.safetensors is .*{words}"):
            weights.load_vit(path)
    for change in (dict(data_offsets=[-4, 0]), dict(data_offsets=[0, 10**12]), dict(shape=[3]), dict(shape=[-1, -2]), dict(dtype="F8"), dict(dtype=None)):
        write_safetensors(path, {"a": torch.zeros(2)}, **change)
        with pytest.raises(ValueError, match="x.safetensors is "):
            weights.read_safetensors(path)


def test_wrappings_of_training_scripts_are_taken_off(tmp_path):
    state = timm_state(64)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "a.pt")
    assert weights.read_weights(tmp_path / "a.pt").keys() == state.keys()


TINY_CLIP = dict(size=32, patch=16, width=64, depth=2, heads=1, pre_norm=True, patch_bias=False, eps=1e-5, **networks.CLIP_STATS)


def mrplip(vocab, end, vision=dict(size=32, patch=16, width=32, depth=1, heads=2, stem="conv")):
    torch.manual_seed(0)
    return networks.MRPLIP(vocab, end, vision, dict(context=9, width=64, depth=2, heads=1),
                           dict(width=16, depth=1, heads=2, pool=2), 24, (16, 8))


def test_adopting_a_text_tower_leaves_clips_function_alone():
    model, tower, ids = mrplip(41, 39), weights.load_clip(clip_states()[0])[1], torch.tensor([[38, 5, 6, 39, 0], [38, 40, 6, 39, 40]])
    before = tower(ids[:1])[1]
    weights.adopt_text(model, tower)
    assert torch.equal(model.text(ids[:1])[1], before) and model.text(ids)[1].isfinite().all()            # id 40, [mask], is new
    assert torch.equal(model.lm_head.weight, model.text.embed.weight) and model.lm_head.weight is not model.text.embed.weight
    with pytest.raises(ValueError, match=r"the text weights belong to another network.*embed.weight is \(41, 64\) in the file and \(50, 64\) in the model"):
        weights.adopt_text(mrplip(50, 48), weights.load_clip(clip_states()[0])[1])


# ---------------------------------------------------------------- and out again

TEXTS, IDS = ["mucin", "the mucin"], [514, 513, 76, 84, 66, 72, 333, 515]


def export_cases():
    """name -> (MRPLIP with weights that anybody can write down, its tokenizer, the packages it can leave for)."""
    words = tokenizer.Tokenizer([("t", "h"), ("th", "e</w>")])
    timm = dict(size=224, patch=16, width=192, depth=12, heads=3, layer_scale=1e-5, **networks.IMAGENET)
    out = {}
    for name, vision, quick, ways in (("clip", TINY_CLIP, False, ("open_clip", "huggingface")), ("quick", dict(TINY_CLIP, quick=True), True, ("open_clip", "huggingface")), ("trunk", timm, False, ("open_clip",))):
        m = networks.MRPLIP(words.size, words.end, vision, dict(context=9, width=64, depth=2, heads=1, quick=quick), dict(width=16, depth=1, heads=2, pool=2), 24, (16, 8)).eval()
        # the golden values were computed when the head of words had one tensor: its bias has no number among the sines
        m.load_state_dict({**m.state_dict(), **sines({k: v.shape for k, v in m.named_parameters() if k not in ("itc_scale", "lm_head.bias")})})
        out[name] = m, words, ways
    return out


@pytest.mark.parametrize("name", ["clip", "quick", "trunk"])
def test_golden_export(name, tmp_path):
    """The packages load what is written (its keys and shapes are theirs) and then compute the same."""
    m, words, ways = export_cases()[name]
    ids = words.batch(TEXTS, 9)
    assert ids[1, : len(IDS)].tolist() == IDS
    with torch.no_grad():
        v, t = m.encode_image(waves(m.vision.size))[1], m.encode_text(ids)[1]
    for to in ways:
        weights.export(m, words, tmp_path / to, to)
        state = weights.read_safetensors(next((tmp_path / to).glob("*.safetensors")))
        keys = "\n".join(sorted(f"{k} {tuple(x.shape)}" for k, x in state.items()))
        assert hashlib.sha256(keys.encode()).hexdigest() == GOLDEN[f"export {name} {to} keys"]
        assert close(v, f"export {name} {to} image") and close(t, f"export {name} {to} text")
        if name != "trunk":                                # read back, the file is the same function
            vit, tower = weights.load_clip(next((tmp_path / to).glob("*.safetensors")), name == "quick")
            assert close(F.normalize(vit.eval()(waves(32))[1, 0] @ vit.proj.T, dim=-1), f"export {name} {to} image")
        else:                                              # LayerScale is folded: a trunk without it, the same features
            assert not any("ls1" in k for k in state)
            vit, tower = weights.load_clip(state)
            assert close(F.normalize(vit.eval()(waves(224))[1, 0] @ vit.proj.T, dim=-1), f"export {name} {to} image")
            other = export_cases()["trunk"][0]             # and a run may start from it
            weights.adopt_vision(other, weights.load_vit(state))
            assert torch.equal(other.vision.blocks[3].ls1, torch.ones(192)) and torch.allclose(other.vision(waves(224)), vit(waves(224)), atol=1e-4)
        assert close(F.normalize(tower(ids)[1][1], dim=-1), f"export {name} {to} text") and state["logit_scale"] == m.itc_scale
        config = json.loads((tmp_path / to / ("config.json" if to == "huggingface" else "open_clip_config.json")).read_text())
        assert ("quick" in json.dumps(config).replace('"quick_gelu": false', "")) == (name == "quick")
        assert json.loads((tmp_path / to / "vocab.json").read_text())["<|endoftext|>"] == words.end == 515
        assert not list((tmp_path / to).glob("*.tmp"))


def test_loading_and_exporting_gives_the_file_back(tmp_path):
    for dialect, to in zip(clip_states(), ("open_clip", "huggingface")):
        m = mrplip(41, 39, TINY_CLIP)
        vit, tower = weights.load_clip(dialect)
        weights.adopt_vision(m, vit)
        weights.adopt_text(m, tower)
        weights.export(m, tokenizer.Tokenizer([]), tmp_path / to, to)
        state = weights.read_safetensors(next((tmp_path / to).glob("*.safetensors")))
        assert state.keys() == dialect.keys() and all(torch.equal(state[k], dialect[k]) for k in dialect if k != "logit_scale")


def test_what_cannot_leave_or_enter_is_one_sentence(tmp_path):
    words = tokenizer.Tokenizer([])
    with pytest.raises(ValueError, match="five convolutions.*--size paper"):
        weights.export(mrplip(41, 39), words, tmp_path / "x", "open_clip")
    plain = dict(size=32, patch=16, width=64, depth=2, heads=1)
    with pytest.raises(ValueError, match="use --to open_clip"):
        weights.export(mrplip(41, 39, plain), words, tmp_path / "x", "huggingface")
    with pytest.raises(ValueError, match="none has 2 layers 64 wide and patches of 16 px in images of 32"):
        weights.export(mrplip(41, 39, plain), words, tmp_path / "x", "open_clip")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"vision weights belong to another network than --size.*attn.proj.bias is \(128,\) in the file and \(64,\) in the model"):
        weights.adopt_vision(mrplip(41, 39, plain), weights.load_vit(timm_state()))


def test_pixel_statistics_travel_with_the_weights():
    assert weights.load_vit(timm_state(64), stats=dict(mean=(0.5,) * 3, std=(0.5,) * 3)).std.flatten().tolist() == [0.5] * 3
    size = dict(size=32, patch=16, width=64, depth=2, heads=2, layer_scale=1.0)
    m, other = mrplip(41, 39, dict(size, mean=(0.4,) * 3, std=(0.2,) * 3)), mrplip(41, 39, size)
    weights.adopt_vision(m, weights.load_vit(timm_state(64)))                          # what shapes do not tell stays as the size has it
    assert m.vision.blocks[0].attn.heads == 2 and m.vision.std[0, 0, 0, 0] == torch.tensor(0.2)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other.vision.std, m.vision.std)


def test_a_run_starts_from_one_clip_file_and_can_give_it_back(tmp_path, monkeypatch):
    clip = clip_states(V=514)[0]                           # 512 symbols, start, end
    torch.save(clip, tmp_path / "quiltnet.pt")
    small = dict(vision=TINY_CLIP,
                 text=dict(context=9, width=64, depth=2, heads=1), fusion=dict(width=16, depth=1, heads=2, pool=2), embed=24, simsiam=(16, 8))
    monkeypatch.setitem(networks.SIZES, "quiltnet", small)
    monkeypatch.setitem(networks.SIZES, "plip", {**small, "text": dict(small["text"], quick=True), "vision": dict(small["vision"], quick=True)})
    both, words = dict(vision=str(tmp_path / "quiltnet.pt"), text=str(tmp_path / "quiltnet.pt")), tokenizer.Tokenizer([])
    models = {size: train.build_model(train.Config(size=size, **both), words).eval() for size in ("quiltnet", "plip")}
    for size, model in models.items():
        vit, tower = weights.load_clip(clip, size == "plip")
        images, ids = torch.rand(2, 3, 32, 32), words.batch(TEXTS, 9)
        assert torch.allclose(model.encode_image(images), F.normalize(F.linear(vit.eval()(images)[:, 0], vit.proj), dim=-1), atol=1e-6)
        assert torch.equal(model.encode_text(ids), F.normalize(tower(ids)[1], dim=-1))
    assert not torch.allclose(models["quiltnet"].encode_text(ids), models["plip"].encode_text(ids), atol=1e-4)
    weights.export(models["plip"], words, tmp_path / "out", "open_clip")
    state = weights.read_safetensors(tmp_path / "out" / "open_clip_model.safetensors")
    assert all(torch.equal(state[k], clip[k]) for k in clip if k != "logit_scale")
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True
