"""pytest tests/test_model.py — our networks against torch's own modules, and the masks."""
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
