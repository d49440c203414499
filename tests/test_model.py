"""Hold the networks to torch's own modules, the masks to their meaning, public weights to timm.

    pytest tests/test_model.py

weights.json holds what timm 1.0.31 and open_clip 3.3 compute from weights that anyone can write
down (`sines`).
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as networks
import text
import train
from protocols import peers

GOLDEN = json.loads(Path(__file__).with_name("weights.json").read_text())


def tiny(**other):
    """Build an MRPLIP of a few thousand parameters: start id 47, end 48, [mask] 49."""
    torch.manual_seed(0)
    sizes = dict(
        vision=dict(size=32, patch=16, width=32, depth=1, heads=2, stem="conv"),
        text=dict(context=16, width=24, depth=1, heads=2),
        fusion=dict(width=16, depth=2, heads=2, pool=2),
        embed=12,
        simsiam=(16, 8),
    )
    return networks.MRPLIP(50, 48, **(sizes | other)).eval()


# --------------------------------------------------------------------------------------------------
# Attention and block


@pytest.mark.parametrize("mask", ["none", "causal", "random"])
def test_attention_equals_torch(mask):
    torch.manual_seed(0)
    ours, theirs = networks.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, allow = torch.randn(2, 7, 24), torch.ones(7, 7).bool()
    if mask == "causal":
        allow = allow.tril()
    if mask == "random":
        allow = (torch.rand(7, 7) < 0.5) | torch.eye(7).bool()
    got = ours(x, allow if mask == "random" else None, causal=mask == "causal")
    expected, _ = theirs(x, x, x, attn_mask=~allow, need_weights=False)
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("quick", [False, True])
def test_block_equals_torch(quick):
    torch.manual_seed(0)
    ours = networks.Block(24, 3, quick=quick)
    gelu = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else "gelu"
    more = dict(batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, gelu, **more)
    names = {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
    }
    state = {}
    for key, value in ours.state_dict().items():
        for own, other in names.items():
            key = key.replace(own, other)
        state[key] = value
    theirs.load_state_dict(state)
    x, hidden = torch.randn(2, 7, 24), torch.ones(7, 7).triu(1).bool()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x, causal=True), theirs(x, src_mask=hidden), atol=1e-6)


def test_layer_scale_gates_both_branches():
    block, x = networks.Block(24, 3, layer_scale=0.5), torch.randn(2, 7, 24)
    nn.init.zeros_(block.ls2.gamma)
    assert torch.allclose(block(x), x + 0.5 * block.attn(block.norm1(x)), atol=1e-6)
    nn.init.zeros_(block.ls1.gamma)
    assert torch.equal(block(x), x)


def test_the_stem_does_not_copy_what_one_process_normalises(monkeypatch):
    monkeypatch.setattr(networks, "full", lambda x: pytest.fail("a copy in fp32 that nobody reads"))
    assert networks.StemNorm(4)(torch.rand(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_one_process_exchanges_nothing():
    x = torch.rand(3)
    assert networks.world_size() == 1 and networks.rank() == 0 and networks.all_sum(x) is x


def test_sums_over_processes_travel_contiguous(monkeypatch):
    """NCCL refuses a tensor with other strides, gloo does not."""
    sent = []
    monkeypatch.setattr(networks.dist, "all_reduce", sent.append)
    x = torch.rand(4, 3, requires_grad=True)
    networks.AllSum.apply(x.T).sum().backward()
    assert len(sent) == 2 and all(y.is_contiguous() for y in sent)


# --------------------------------------------------------------------------------------------------
# Towers


def test_the_conv_stem_does_not_see_the_stain():
    model, images = tiny(), 0.6 * torch.rand(2, 3, 32, 32)
    tinted = images + torch.tensor([0.3, 0.1, 0.2]).view(3, 1, 1)
    assert torch.allclose(model.vision(images), model.vision(tinted), atol=1e-5)
    assert not torch.allclose(model.vision(images), model.vision(images.flip(0)), atol=1e-3)


def test_text_tower_pools_at_the_first_end_and_ignores_padding():
    model = tiny()
    ids = torch.tensor([[47, 3, 4, 48, 0, 0, 0, 0], [47, 5, 48, 0, 0, 0, 0, 0]])
    # [mask] is larger than the end id, so pooling at the largest would take it.
    longer = F.pad(ids, (0, 8), value=49)
    assert torch.allclose(model.encode_text(ids), model.encode_text(longer), atol=1e-6)
    assert networks.real_tokens(ids, 48).sum(1).tolist() == [4, 3]
    # A second end id is padding as well.
    twice = torch.tensor([[47, 3, 48, 7, 48]])
    assert networks.real_tokens(twice, 48).tolist() == [[True, True, True, False, False]]
    with pytest.raises(ValueError, match="reads 16 ids, not 17: cut the texts"):
        model.text(torch.zeros(1, 17, dtype=torch.long))


def test_text_tower_is_causal():
    model, ids = tiny(), torch.tensor([[47, 1, 2, 3, 4, 48]])
    other = ids.clone()
    other[0, 3] = 9
    moved = (model.text(ids)[0] - model.text(other)[0]).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, False, True, True, True]


def test_embeddings_are_unit_vectors_of_images_of_the_right_size():
    model, images = tiny(), torch.rand(3, 3, 32, 32)
    v = model.encode_image(images)
    assert torch.allclose(v.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(v, model.to_shared(model.vision_tokens(images)), atol=1e-6)
    with pytest.raises(ValueError, match=r"reads 32 x 32 px, not \(64, 64\)"):
        model.encode_image(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="an image of 40 px with a patch stem has no patches"):
        networks.ViT(40, 16, 32, 1, 2)


def test_pooled_tokens_are_grid_means():
    big = dict(size=64, patch=16, width=32, depth=1, heads=2)
    for pool, side in ((1, 4), (2, 2)):
        model = tiny(vision=big, fusion=dict(width=16, depth=1, heads=2, pool=pool))
        images = torch.rand(3, 3, 64, 64)
        tokens, got = model.vision(images), model.vision_tokens(images)
        grid = tokens[:, 1:].view(3, 4, 4, 32)
        assert got.shape == (3, 1 + pool**2, 32) and torch.equal(got[:, 0], tokens[:, 0])
        first = grid[:, :side, :side].mean((1, 2))
        last = grid[:, -side:, -side:].mean((1, 2))
        assert torch.allclose(got[:, 1], first, atol=1e-6)
        assert torch.allclose(got[:, -1], last, atol=1e-6)
    model = tiny(vision=big, fusion=dict(width=16, depth=1, heads=2, pool=0))
    assert torch.equal(model.vision_tokens(images), model.vision(images))


def test_both_encoders_compile_whole():
    model = tiny()
    ids = torch.tensor([[47, 3, 4, 48, 0], [47, 5, 48, 0, 0]])
    for encode, x in ((model.encode_image, torch.rand(2, 3, 32, 32)), (model.encode_text, ids)):
        compiled = torch.compile(encode, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), encode(x), atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Fusion: one network, four masks


def test_fusion_ignores_padding_and_the_order_of_keywords():
    model, image, words = tiny(), torch.randn(2, 5, 16), torch.randn(2, 6, 24)
    real = torch.tensor([[True] * 4 + [False] * 2] * 2)
    changed = torch.where(real[..., None], words, 7.0)
    got = model.fuse_with_text(image, words, real)[:, :4]
    assert torch.allclose(got, model.fuse_with_text(image, changed, real)[:, :4], atol=1e-5)
    short = model.fuse_with_text(image, words[:, :4], real[:, :4])
    assert torch.allclose(got, short, atol=1e-5)
    # Keywords: a set of three, and one that is padding.
    w, valid = torch.randn(2, 4, 12), torch.tensor([[True, True, True, False]] * 2)
    order = torch.tensor([2, 3, 0, 1])
    z = model.fuse_with_keywords(image, w, valid)
    again = model.fuse_with_keywords(image, w[:, order], valid[:, order])
    assert torch.allclose(z, again, atol=1e-5)
    assert torch.allclose(z, model.fuse_with_keywords(image, w[:, :3], valid[:, :3]), atol=1e-5)
    assert not torch.allclose(z, model.fuse_with_keywords(image, w + 1, valid), atol=1e-3)


def test_without_a_prefix_every_word_sees_every_word():
    model, image, words = tiny(), torch.randn(1, 5, 16), torch.randn(1, 6, 24)
    real = torch.ones(1, 6, dtype=torch.bool)
    base = model.fuse_with_text(image, words, real)
    for position in range(6):
        other = words.clone()
        other[0, position] += 1
        moved = (model.fuse_with_text(image, other, real) - base).abs().amax(-1) > 1e-5
        assert moved.all()


def test_prefix_mask_hides_the_future_and_nothing_else():
    model, image, words = tiny(), torch.randn(1, 5, 16), torch.randn(1, 6, 24)
    real, prefix = torch.ones(1, 6, dtype=torch.bool), torch.tensor([3])
    base = model.fuse_with_text(image, words, real, prefix)
    for position in range(6):
        other = words.clone()
        other[0, position] += 1
        moved = (model.fuse_with_text(image, other, real, prefix) - base).abs().amax(-1) > 1e-5
        # A word of the prefix is seen everywhere; a later one only from itself on.
        assert moved[0].tolist() == [position < 3 or i >= position for i in range(6)]
    # The image is seen everywhere.
    moved = model.fuse_with_text(torch.randn(1, 5, 16), words, real, prefix) - base
    assert (moved.abs().amax(-1) > 1e-5).all()


def test_plm_cannot_see_the_token_it_predicts_through_the_whole_model():
    """Text tower and fusion together: token i + 1 must not change the logits at i."""
    model, image = tiny(), torch.randn(1, 5, 16)
    ids = torch.tensor([[47, 1, 2, 3, 4, 48]])
    other = ids.clone()
    other[0, 3] = 9
    logits = []
    for x in (ids, other):
        real, prefix = networks.real_tokens(x, 48), torch.tensor([2])
        logits.append(model.lm_logits(model.fuse_with_text(image, model.text(x)[0], real, prefix)))
    assert torch.allclose(logits[0][0, :3], logits[1][0, :3], atol=1e-5)
    assert not torch.allclose(logits[0][0, 3], logits[1][0, 3], atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Sizes, start, names


def count(*modules):
    """Count the parameters of modules."""
    return sum(sum(p.numel() for p in module.parameters()) for module in modules)


def test_sizes_are_those_of_the_papers():
    models = {}
    with torch.device("meta"):
        for name in networks.SIZES:
            models[name] = networks.MRPLIP(49409, 49407, **networks.SIZES[name])
    assert count(models["paper"].vision) == 303_350_784  # UNI
    for name in ("quiltnet", "plip"):
        clip = models[name]
        # CLIP ViT-B/32, without the embedding of [mask], with one temperature.
        total = count(clip.vision, clip.proj, clip.text) - 512 + 1
        assert total == 151_277_313
    assert count(models["synthetic"]) < 10e6


def test_weights_start_nearly_as_clips_do():
    torch.manual_seed(0)
    size = dict(networks.SIZES["synthetic"], text=dict(context=64, width=256, depth=3, heads=2))
    model = networks.MRPLIP(1500, 1498, **size)
    text_tower = model.text
    fc1, fc2 = text_tower.blocks[0].mlp.fc1, text_tower.blocks[0].mlp.fc2
    assert fc1.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert fc2.weight.std().item() == pytest.approx(1024**-0.5 / 6**0.5, rel=0.02)
    assert not fc1.bias.any()
    assert text_tower.positional_embedding.std().item() == pytest.approx(0.01, rel=0.03)
    # The word head starts as a copy of the embedding and learns alone.
    words, head = text_tower.token_embedding.weight, model.lm_head.weight
    assert torch.equal(words, head) and words is not head
    assert words.std().item() == pytest.approx(0.02, rel=0.02)
    logits = model.lm_logits(torch.randn(200, model.kind.shape[1]))
    assert logits.std().item() == pytest.approx(0.5, rel=0.1)
    for scale in (model.itc_scale, model.cvta_scale):
        assert (-scale).exp().item() == pytest.approx(0.07)


def test_full_is_fp32_at_least():
    for dtype, expected in ((torch.bfloat16, 32), (torch.float32, 32), (torch.float64, 64)):
        assert networks.full(torch.ones(1, dtype=dtype)).dtype == getattr(torch, f"float{expected}")


def test_fingerprints_tell_weights_apart():
    model = tiny()
    first = networks.fingerprint(model)
    assert len(first) == 12 and first == networks.fingerprint(tiny())
    assert first == networks.fingerprint(tiny().double())
    model.kind.data[0, 0] += 1e-6
    assert networks.fingerprint(model) != first
    # Cached features are named by the vision tower and the pooling, and by nothing else.
    name = networks.features_name(model)
    assert name == networks.features_name(tiny())
    model.vision.cls_token.data += 1
    other = tiny(fusion=dict(width=16, depth=2, heads=2, pool=1))
    quick = tiny()
    quick.vision.blocks[0].mlp.quick = True
    assert len({name, *map(networks.features_name, (model, other, quick))}) == 4


# --------------------------------------------------------------------------------------------------
# timm's vision towers


def timm_state(D=128, patch=16, grid=2):
    """Draw a random ViT of two layers: our names are timm's."""
    shapes = networks.ViT(grid * patch, patch, D, 2, 1, layer_scale=1.0).state_dict()
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(x.shape, generator=g) * 0.1 for name, x in shapes.items()}
    return {name: x for name, x in state.items() if name not in ("mean", "std")}


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [N, H, L, D/H]


def reference_vit(s, x, heads, eps):
    """Compute timm's ViT with torch's functions, straight from the keys of its state dict."""

    def linear(y, name):
        return F.linear(y, s[name + ".weight"], s[name + ".bias"])

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], s[name + ".weight"], s[name + ".bias"], eps)

    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    for i in range(2):
        p = f"blocks.{i}."
        q, k, v = linear(norm(x, p + "norm1"), p + "attn.qkv").chunk(3, -1)
        q, k, v = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
        a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        a = a.transpose(1, 2).flatten(2)
        x = x + s[p + "ls1.gamma"] * linear(a, p + "attn.proj")
        y = F.gelu(linear(norm(x, p + "norm2"), p + "mlp.fc1"))
        x = x + s[p + "ls2.gamma"] * linear(y, p + "mlp.fc2")
    return norm(x, "norm")


def sines(state):
    """Fill the shapes of a state dict: the i-th by name is sin(i + 0.01 (i + 1) n) / 10."""
    out = {}
    for i, (name, x) in enumerate(sorted(state.items())):
        n = torch.arange(x.numel(), dtype=torch.float64)
        out[name] = (torch.sin(i + 0.01 * (i + 1) * n) / 10).float().view(x.shape)
    return out


def waves(side):
    """Draw two images of `side` px that anyone can write down."""
    n = torch.arange(2 * 3 * side * side, dtype=torch.float64)
    return (torch.sin(n * 0.37) / 2 + 0.5).float().view(2, 3, side, side)


def is_golden(got, name):
    """Compare with what the other package computed, to 5 digits of the norm."""
    want = torch.tensor(GOLDEN[name])
    return (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("side", [32, 48])
def test_golden_timm_at_its_own_and_another_size(side):
    state = sines(timm_state(64)) | {"head.weight": torch.zeros(3, 64)}  # of classes: left out
    vit = peers.load_vit(state, side).eval()
    assert is_golden(vit(waves(side))[1, 0], f"timm{side}")


def test_a_vision_tower_comes_back_from_its_file(tmp_path):
    torch.manual_seed(1)
    shape = dict(size=32, patch=16, width=128, depth=3, heads=2, layer_scale=0.1)
    vit, images = networks.ViT(**shape).eval(), torch.rand(2, 3, 32, 32)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    again = peers.load_vit(networks.read_weights(tmp_path / "vit.pt")).eval()
    assert torch.equal(again(images), vit(images))
    assert networks.fingerprint(again) == networks.fingerprint(vit)


# --------------------------------------------------------------------------------------------------
# CLIP


def clip_state(D=64, vocab=40):
    """Draw a random CLIP of two layers a tower in the names of open_clip."""
    layer = {
        "attn.in_proj_weight": (3 * D, D),
        "attn.in_proj_bias": (3 * D,),
        "attn.out_proj.weight": (D, D),
        "attn.out_proj.bias": (D,),
        "mlp.c_fc.weight": (4 * D, D),
        "mlp.c_fc.bias": (4 * D,),
        "mlp.c_proj.weight": (D, 4 * D),
        "mlp.c_proj.bias": (D,),
    }
    shapes = {
        "visual.class_embedding": (D,),
        "visual.positional_embedding": (5, D),
        "visual.conv1.weight": (D, 3, 16, 16),
        "visual.proj": (D, 24),
        "token_embedding.weight": (vocab, D),
        "positional_embedding": (9, D),
        "text_projection": (D, 24),
        "logit_scale": (),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.", ""):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}."
            norms += [block + "ln_1", block + "ln_2"]
            for name, shape in layer.items():
                shapes[block + name] = shape
    for name in norms:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (D,)
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("quick", [False, True])
def test_golden_open_clip(quick):
    state = sines(clip_state())
    if quick:
        # open_clip writes text. before the names of some models.
        words = [name for name in state if not name.startswith(("visual.", "logit"))]
        state |= {f"text.{name}": state.pop(name) for name in words}
    vit, tower = peers.load_clip(state, quick)
    assert (vit.size, vit.patch, tower.context, tower.end) == (32, 16, 9, 39)
    ids = torch.tensor([[38, 7, 39, 0, 0, 0, 0, 0, 0]])
    assert is_golden(vit.eval()(waves(32))[1, 0] @ vit.proj.T, f"open_clip image {quick}")
    assert is_golden(tower(ids)[1][0], f"open_clip text {quick}")


# --------------------------------------------------------------------------------------------------
# Files that are something else


def save(state, path):
    """Save a state dict as training scripts do -> its path."""
    torch.save({"model_state": state, "epoch": 3}, path)
    return path


@pytest.mark.filterwarnings("ignore")  # torch warns of TorchScript
def test_a_file_that_is_no_weights_is_one_sentence(tmp_path):
    torch.save(timm_state(64), tmp_path / "whole.bin")
    path = tmp_path / "x.bin"
    for bad in (b"hello", b"", (tmp_path / "whole.bin").read_bytes()[:-400]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="x.bin holds no weights saved by torch .*peers"):
            networks.read_weights(path)
    # Code in a pickle is never run; a list and an empty dict are no networks.
    for content in ({"a": Path("x")}, [torch.zeros(1)], {}, {"a": 3}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="x.bin holds no weights saved by torch") as error:
            networks.read_weights(path)
        assert "\n" not in str(error.value)
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match=r"x.bin .*it is TorchScript.*README tells"):
        networks.read_weights(path)
    for name in ("nowhere.bin", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"{name} .*No such file .*: get it again"):
            peers.read_state(tmp_path / name)


STARTS = "module. model. _orig_mod. _orig_mod.module.model. base_model.model. module.backbone."


@pytest.mark.parametrize("start", STARTS.split())
def test_names_lose_what_training_put_before_them(start, tmp_path):
    for state in (timm_state(64), clip_state()):
        names = {name.replace("blocks.1.", "blocks.1._orig_mod."): x for name, x in state.items()}
        path = save({start + name: x for name, x in names.items()}, tmp_path / "x.pt")
        assert networks.read_weights(path).keys() == state.keys()


def test_names_that_are_not_known_are_told(tmp_path):
    state = {f"net.{name}": x for name, x in timm_state(64).items()} | {"loss.w": torch.ones(1)}
    path = save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt is not a plain ViT .*net.cls_token"):
        peers.load_vit(networks.read_weights(path), file=path)
    with pytest.raises(ValueError, match="x.pt holds another network .*net.cls_token"):
        networks.adopt_vision(mrplip(41, 39, TINY_VIT), path)
    lora = {f"base_model.model.{name}": x for name, x in clip_state().items()}
    lora["base_model.model.visual.proj.lora_A.default.weight"] = torch.zeros(4, 64)
    with pytest.raises(ValueError, match="x.pt holds LoRA adapters: merge them first"):
        networks.read_weights(save(lora, path))


def test_a_missing_tensor_is_named():
    state = timm_state()
    for name in [*state]:
        # Without the first gain the file looks like a ViT that has none, and the second is odd.
        with pytest.raises(ValueError, match="the state dict (is not a plain ViT|holds another)"):
            peers.load_vit({k: x for k, x in state.items() if k != name})
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match="Missing key.*blocks.1.mlp.fc2.bias"):
        peers.load_vit(state)
    clip = clip_state()
    for name in clip.keys() - {"logit_scale"}:
        with pytest.raises(ValueError, match="the state dict (is no CLIP|is not a|holds another)"):
            peers.load_clip({k: x for k, x in clip.items() if k != name})


OTHERS = """visual.attn_pool_contrast.query visual.layer1.0.conv1.weight mask_token
visual.trunk.stages.0.norm1.weight relative_position_bias_table fc_norm.weight attn_pool.latent
blocks.0.attn.logit_scale"""


@pytest.mark.parametrize("key", OTHERS.split())
def test_networks_that_are_something_else_are_refused(key):
    """Registers, CONCH, ResNets, BEiT, mean pooling: nothing in a file may be left over."""
    with pytest.raises(ValueError, match="the state dict holds another network .*Unexpected key"):
        peers.load_vit(timm_state() | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match="the state dict "):
        peers.load_clip(timm_state() | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match="the state dict holds another network .*Unexpected key"):
        peers.load_clip(clip_state() | {key: torch.zeros(1)})


def test_shapes_that_do_not_fit_are_refused():
    gated = timm_state()
    gated["blocks.0.mlp.fc1.weight"] = torch.zeros(512, 128)
    gated["blocks.0.mlp.fc2.weight"] = torch.zeros(128, 256)
    with pytest.raises(ValueError, match="size mismatch for blocks.0.mlp.fc2.weight"):
        peers.load_vit(gated)
    with pytest.raises(ValueError, match="an image of 40 px with a patch stem has no patches"):
        peers.load_vit(timm_state(), 40)
    # Five places for patches make no square.
    with pytest.raises(ValueError, match="the state dict holds another network"):
        peers.load_vit(timm_state() | {"pos_embed": torch.zeros(1, 6, 128)})
    with pytest.raises(ValueError, match="not a plain ViT .*: a CLIP takes --clip"):
        peers.load_vit(clip_state())
    with pytest.raises(ValueError, match="not a plain ViT .*registers"):
        peers.load_vit(timm_state() | {"reg_token": torch.zeros(1, 4, 128)})
    with pytest.raises(ValueError, match="no CLIP in the names of open_clip"):
        peers.load_clip({"weight": torch.zeros(2)})


# --------------------------------------------------------------------------------------------------
# Public weights in an MRPLIP

TINY_VIT = dict(size=32, patch=16, width=64, depth=2, heads=1, layer_scale=1.0)
TINY_CLIP = dict(size=32, patch=16, width=64, depth=2, heads=1, clip=True)
TINY_CLIP["stats"] = networks.CLIP_STATS


def mrplip(vocab, end, vision):
    """Build an MRPLIP around the text tower of `clip_state`."""
    torch.manual_seed(0)
    text_tower = dict(context=9, width=64, depth=2, heads=1)
    fusion = dict(width=16, depth=1, heads=2, pool=2)
    return networks.MRPLIP(vocab, end, vision, text_tower, fusion, 24, (16, 8)).eval()


def test_adopting_a_text_tower_leaves_clips_function_alone(tmp_path):
    path = save(clip_state(), tmp_path / "clip.pt")
    model, tower = mrplip(41, 39, TINY_CLIP), peers.load_clip(clip_state())[1]
    ids = torch.tensor([[38, 5, 6, 39, 0], [38, 40, 6, 39, 40]])
    networks.adopt_text(model, path)
    assert torch.equal(model.text(ids[:1])[1], tower(ids[:1])[1])
    # Id 40, [mask], is new: it starts as the mean word.
    words = model.text.token_embedding.weight
    assert torch.allclose(words[40], words[:40].mean(0), atol=1e-7)
    assert torch.equal(model.lm_head.weight, words) and model.lm_head.weight is not words
    with pytest.raises(ValueError, match="clip.pt holds .*token_embedding.weight"):
        networks.adopt_text(mrplip(50, 48, TINY_CLIP), path)


def test_adopting_a_vision_tower(tmp_path):
    images, vit = torch.rand(2, 3, 32, 32), peers.load_clip(clip_state())[0].eval()
    model, path = mrplip(41, 39, TINY_CLIP), tmp_path / "x.pt"
    networks.adopt_vision(model, save(clip_state(), path))
    expected = F.normalize(vit(images)[:, 0] @ vit.proj.T, dim=-1)
    assert torch.allclose(model.encode_image(images), expected, atol=1e-6)
    # A tower whose LayerScale was folded in has gains of 1.
    folded = {k: x for k, x in timm_state(64).items() if not k.endswith("gamma")}
    model = mrplip(41, 39, dict(TINY_VIT, layer_scale=1e-5))
    networks.adopt_vision(model, save(folded, path))
    assert torch.equal(model.vision.blocks[1].ls2.gamma, torch.ones(64))
    assert torch.equal(model.vision(images), peers.load_vit(folded).eval()(images))
    # Another size of images resamples the positions.
    model = mrplip(41, 39, dict(TINY_VIT, size=48))
    networks.adopt_vision(model, save(timm_state(64), path))
    same = peers.load_vit(timm_state(64), 48).eval()
    assert torch.equal(model.vision(waves(48)), same(waves(48)))
    with pytest.raises(ValueError, match="x.pt holds another network"):
        networks.adopt_vision(model, save(timm_state(128), path))


# What configs beside a file may say, and towers of TINY_CLIP and TINY_VIT do not do.
HALF = [0.5, 0.5, 0.5]
CONTRADICTIONS = [
    ("quick_gelu", "open_clip_config", {"model_cfg": {"quick_gelu": True, "vision_cfg": {}}}),
    ("hidden_act", "config", {"vision_config": {}}),  # transformers' default is quick_gelu
    ("pool_type", "open_clip_config", {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}),
    ("act_kwargs", "open_clip_config", {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}),
    ("head_width", "open_clip_config", {"vision_cfg": {"head_width": 32}}),
    ("mean", "open_clip_config", {"preprocess_cfg": {"mean": HALF}}),
    ("image_std", "preprocessor_config", {"image_std": HALF}),
    ("num_heads", "config", {"architecture": "vit", "model_args": {"num_heads": 2}}),
    ("global_pool", "config", {"global_pool": "avg"}),
    ("act_layer", "x", {"act_layer": "silu"}),
]


@pytest.mark.parametrize("key, name, config", CONTRADICTIONS)
def test_a_config_that_contradicts_the_size_is_named(key, name, config, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    for shape, state in ((TINY_CLIP, clip_state()), (TINY_VIT, timm_state(64))):
        path = save(state, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: its config says {key} .*, not "):
            networks.adopt_vision(mrplip(41, 39, shape), path)


def test_a_text_tower_is_as_its_config_says(tmp_path, capsys):
    path, model = save(clip_state(), tmp_path / "x.pt"), mrplip(41, 39, TINY_CLIP)
    networks.adopt_text(model, path)
    assert capsys.readouterr().out.endswith("no config tells its text tower, so 1 heads, gelu\n")
    beside = tmp_path / "open_clip_config.json"
    for change in ({}, {"heads": 2}, {"no_causal_mask": True}, {"pool_type": "last"}):
        beside.write_text(json.dumps({"vision_cfg": {}, "text_cfg": {"heads": 1} | change}))
        if change:
            with pytest.raises(ValueError, match=f"x.pt: its config says {[*change][0]}"):
                networks.adopt_text(model, path)
        else:
            networks.adopt_text(model, path)
            model.text.blocks[0].mlp.quick = True
            with pytest.raises(ValueError, match="its config says quick_gelu False, not True"):
                networks.adopt_text(model, path)
            model.text.blocks[0].mlp.quick = False
    assert capsys.readouterr().out == ""
    beside.write_text("[1]")
    with pytest.raises(ValueError, match="open_clip_config.json is no config"):
        networks.adopt_text(model, path)


def test_what_no_config_tells_stays_with_the_size(tmp_path):
    model = mrplip(41, 39, dict(TINY_VIT, heads=2, stats=(HALF, HALF)))
    networks.adopt_vision(model, save(timm_state(64), tmp_path / "x.pt"))
    assert model.vision.blocks[0].attn.heads == 2 and model.vision.std.flatten()[0] == 0.5


def test_a_run_starts_from_one_clip_file(tmp_path, monkeypatch):
    words = text.Tokenizer([])
    clip = clip_state(vocab=words.size - 1)  # all but [mask]
    file, images = str(save(clip, tmp_path / "clip.pt")), torch.rand(2, 3, 32, 32)
    tower = dict(context=9, width=64, depth=2, heads=1)
    rest = dict(fusion=dict(width=16, depth=1, heads=2, pool=2), embed=24, simsiam=(16, 8))
    small = dict(vision=TINY_CLIP, text=tower, **rest)
    quick = dict(vision=dict(TINY_CLIP, quick=True), text=dict(tower, quick=True), **rest)
    monkeypatch.setattr(networks, "SIZES", {"quiltnet": small, "plip": quick})
    ids, embedded = words.batch(["mucin", "the mucin"], 9), []
    for size in ("quiltnet", "plip"):
        cfg = train.Config(size=size, vision=file, text=file, tokenizer="not read here")
        model = train.build_model(cfg, words).eval()
        vit, tower = peers.load_clip(clip, size == "plip")
        expected = F.normalize(vit.eval()(images)[:, 0] @ vit.proj.T, dim=-1)
        assert torch.allclose(model.encode_image(images), expected, atol=1e-6)
        assert torch.equal(model.encode_text(ids), F.normalize(tower(ids)[1], dim=-1))
        embedded.append(model.encode_text(ids))
    assert not torch.allclose(*embedded, atol=1e-4)
