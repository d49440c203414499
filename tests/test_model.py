"""pytest tests/test_model.py — our networks against torch's own modules, the masks, and loading public weights' layouts."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as networks


def tiny(**kw):
    torch.manual_seed(0)
    sizes = dict(vision=dict(size=32, patch=16, width=32, depth=1, heads=2, stem="conv"), text=dict(context=16, width=24, depth=1, heads=2),
                 fusion=dict(width=16, depth=2, heads=2, pool=2), embed=12, simsiam=(16, 8))
    return networks.MRPLIP(50, 48, **{**sizes, **kw}).eval()


@pytest.mark.parametrize("mask", [None, "causal", "random"])
def test_attention_equals_torch(mask):
    torch.manual_seed(0)
    ours, theirs, x = networks.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 7, 24)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    allow = {None: torch.ones(7, 7).bool(), "causal": torch.ones(7, 7).tril().bool(), "random": (torch.rand(7, 7) < 0.5) | torch.eye(7).bool()}[mask]
    got = ours(x, allow if mask == "random" else mask)
    assert torch.allclose(got, theirs(x, x, x, attn_mask=~allow, need_weights=False)[0], atol=1e-6)


def test_batch_norm_equals_torch_on_the_valid_rows():
    x, valid = torch.randn(20, 6), torch.rand(20) < 0.7
    ours, theirs = networks.BatchNorm(6), nn.BatchNorm1d(6)
    assert torch.allclose(ours(x, valid)[valid], theirs(x[valid]), atol=1e-5)
    wild = torch.where(valid[:, None], x, 1e3)
    assert torch.allclose(ours(wild, valid)[valid], ours(x, valid)[valid], atol=1e-5)


def test_text_tower_pools_at_the_first_end_and_ignores_padding():
    m = tiny()
    ids = torch.tensor([[47, 3, 4, 48, 0, 0, 0, 0], [47, 5, 48, 0, 0, 0, 0, 0]])
    longer = F.pad(ids, (0, 8), value=49)  # [mask] ids after the end, larger than the end id: argmax pooling would take them
    assert torch.allclose(m.encode_text(ids), m.encode_text(longer), atol=1e-6)
    assert networks.text_valid(ids, 48).sum(1).tolist() == [4, 3]


def test_fusion_ignores_padding_and_the_order_of_keywords():
    m = tiny()
    visual, words, real = torch.randn(2, 5, 16), torch.randn(2, 6, 24), torch.tensor([[True] * 4 + [False] * 2] * 2)
    changed = torch.where(real[..., None], words, 7.0)
    assert torch.allclose(m.fuse_with_text(visual, words, real)[:, :4], m.fuse_with_text(visual, changed, real)[:, :4], atol=1e-5)
    w, ok, order = torch.randn(2, 4, 12), torch.tensor([[True, True, True, False]] * 2), torch.tensor([2, 3, 0, 1])
    z = m.fuse_with_keywords(visual, w, ok)
    assert torch.allclose(z, m.fuse_with_keywords(visual, w[:, order], ok[:, order]), atol=1e-5)
    assert not torch.allclose(z, m.fuse_with_keywords(visual, w + 1, ok), atol=1e-3)


def test_prefix_mask_hides_the_future_and_nothing_else():
    m = tiny()
    visual, words, real = torch.randn(1, 5, 16), torch.randn(1, 6, 24), torch.ones(1, 6, dtype=torch.bool)
    base = m.fuse_with_text(visual, words, real, torch.tensor([3]))
    for position in range(6):
        other = words.clone()
        other[0, position] += 1
        moved = ((m.fuse_with_text(visual, other, real, torch.tensor([3])) - base).abs().amax(-1) > 1e-5)[0].tolist()
        # a word of the prefix is seen everywhere; a later one only from itself on
        assert moved == [position < 3 or i >= position for i in range(6)]


def test_plm_cannot_see_the_token_it_predicts_through_the_whole_model():
    """Text tower and fusion together: changing token i + 1 must not change the logits at i."""
    m = tiny()
    visual, ids = torch.randn(1, 5, 16), torch.tensor([[47, 1, 2, 3, 4, 48]])
    run = lambda ids: m.lm_logits(m.fuse_with_text(visual, m.text(ids)[0], networks.text_valid(ids, 48), torch.tensor([2])))
    other = ids.clone()
    other[0, 3] = 9
    assert torch.allclose(run(ids)[0, :3], run(other)[0, :3], atol=1e-5) and not torch.allclose(run(ids)[0, 3], run(other)[0, 3], atol=1e-4)


def test_pooled_visual_tokens_are_grid_means():
    m = tiny(fusion=dict(width=16, depth=1, heads=2, pool=1))
    tokens = torch.randn(3, 5, 32)
    expected = m.fuse_image(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1)) + m.kind[0]
    assert torch.allclose(m.visual_tokens(tokens), expected, atol=1e-6)


def test_embeddings_are_unit_vectors_and_captions_end():
    m = tiny()
    assert torch.allclose(m.encode_image(torch.rand(3, 3, 32, 32)).norm(dim=-1), torch.ones(3), atol=1e-5)
    ids = m.caption(torch.rand(2, 3, 32, 32), start=47, max_tokens=5)
    assert ids.shape[0] == 2 and ids.shape[1] <= 5
    with pytest.raises(ValueError, match="32 x 32"):
        m.encode_image(torch.rand(1, 3, 64, 64))


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
    vit = networks.load_vit(tmp_path / "uni.bin").eval()
    normal = (images - vit.mean) / vit.std
    assert vit.size == 32 and torch.allclose(vit(images), reference_vit(state, normal, 2, 1e-6), atol=1e-5)


def test_a_wrong_weights_file_is_one_sentence(tmp_path):
    state = timm_state()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"1 keys missing \['blocks.1.mlp.fc2.bias'\]"):
        networks.load_vit(state)
    with pytest.raises(ValueError, match="not a timm vision transformer"):
        networks.load_vit({"weight": torch.zeros(2)})
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(ValueError, match="x.bin is not a file of tensors"):
        networks.load_vit(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="neither an open_clip nor"):
        networks.load_clip({"weight": torch.zeros(2)})


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
    (v1, t1), (v2, t2) = networks.load_clip(oc), networks.load_clip(hf)
    assert torch.equal(v1(images), v2(images)) and torch.equal(t1(ids)[1], t2(ids)[1]) and torch.equal(v1.proj, v2.proj)
    prefixed = {(k if k.startswith(("visual.", "logit")) else "text." + k): x for k, x in oc.items()}
    assert torch.equal(networks.load_clip(prefixed)[1](ids)[1], t1(ids)[1])
    assert not torch.allclose(networks.load_clip(oc, quick_gelu=True)[1](ids)[1], t1(ids)[1], atol=1e-4)
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
