"""pytest tests/test_model.py — our networks against torch's own modules, and the masks."""
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from conftest import script

import subjects
import model as networks
import tokenizer


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


def test_the_stem_does_not_copy_what_one_process_normalises(monkeypatch):
    monkeypatch.setattr(networks, "full", lambda x: pytest.fail("a copy in fp32 that nothing reads"))
    assert networks.StemNorm(4)(torch.rand(2, 4, 3, 3)).shape == (2, 4, 3, 3)


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
    images = torch.rand(3, 3, 32, 32)
    tokens = m.vision(images)
    assert torch.allclose(m.see(images), torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-6)
    assert tiny(fusion=dict(width=16, depth=1, heads=2, pool=0)).see(images).shape == tokens.shape


def test_the_last_layer_may_compute_one_token_only():
    m = tiny()
    visual, w, ok = torch.randn(3, 5, 16), torch.randn(3, 4, 12), torch.rand(3, 4) < 0.7
    x = torch.cat([visual, m.fuse_keyword(w) + m.kind[2]], 1)
    assert torch.allclose(m.fuse_with_keywords(visual, w, ok), m.fuse(x, F.pad(ok, (5, 0), value=True)[:, None, None])[:, 0], atol=1e-6)
    text, real, at = torch.randn(3, 6, 24), torch.arange(6) < torch.tensor([[6], [3], [4]]), torch.tensor([5, 2, 1])
    for prefix in (None, torch.tensor([1, 2, 4])):
        whole, one = m.fuse_with_text(visual, text, real, prefix), m.fuse_with_text(visual, text, real, prefix, at)
        assert torch.allclose(one, whole[torch.arange(3), at], atol=1e-6)


class Words:
    """A stand-in for the tokenizer of `tiny`: a text is its ids in decimal."""
    start, end, mask = 47, 48, 49

    def encode(self, text):
        return [int(w) for w in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i < 47)


def chatty():
    m = tiny()
    m.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.1)
    for table in (m.text.embed, m.lm_head):
        table.weight.data.mul_(60)                        # so that captions differ between images and from word to word
    m.lm_head.bias.data[48] = 6.0
    return m


def test_greedy_captions_are_the_likeliest_words_and_end():
    m, images = chatty(), torch.rand(6, 3, 32, 32) * torch.arange(6).view(6, 1, 1, 1)
    images = images.clamp(max=1)
    got = m.caption(images, tokenizer=Words(), max_tokens=12)
    alone = [m.caption(image[None], tokenizer=Words(), max_tokens=12)[0] for image in images]
    assert got == alone and len(set(got)) > 1             # in company and alone: nothing after an end leaks into a caption
    ended = 0
    with torch.no_grad():
        for image, caption in zip(images, got):           # by hand: the whole sequence, no prefix argument but the mask it means
            ids = torch.tensor([[47, *Words().encode(caption)]])
            visual = m.visual_tokens(m.see(image[None]))
            x = torch.cat([visual, m.fuse_text(m.text(ids)[0]) + m.kind[1]], 1)
            L = x.shape[1]
            allowed = torch.ones(L, L).tril().bool()
            allowed[:, :6] = True                         # the five visual tokens and the start id see each other
            logits = m.lm_logits(m.fuse(x, allowed[None, None]))[0, 5:]
            logits[:, [47, 49]] = -torch.inf
            best = logits.argmax(-1).tolist()
            assert best[:-1] == ids[0, 1:].tolist()
            ended += best[-1] == 48
            assert best[-1] == 48 or ids.shape[1] == 13
    assert ended >= 2


def test_captions_go_on_from_a_prefix_and_are_drawn_on_request():
    m, images = chatty(), torch.rand(4, 3, 32, 32)
    assert all(c.startswith("5 6 7") for c in m.caption(images, "5 6 7", tokenizer=Words()))
    assert m.caption(images, tokenizer=Words(), top_p=1e-9) == m.caption(images, tokenizer=Words())     # the likeliest alone
    m.lm_head.bias.data[48] = 0
    draw = lambda seed: m.caption(images, tokenizer=Words(), top_p=0.95, generator=torch.Generator().manual_seed(seed), max_tokens=8)
    assert draw(0) == draw(0) != draw(1)
    assert all(len(Words().encode(c)) <= 15 for c in m.caption(images, tokenizer=Words(), max_tokens=99))   # the context is 16, start id included
    with pytest.raises(ValueError, match="the prefix has 15 tokens and the text tower reads 16"):
        m.caption(images, " ".join("1" * 15), tokenizer=Words())


def test_nucleus_sampling_keeps_the_fewest_words_that_reach_p():
    m = tiny()
    m.lm_logits = lambda x: torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05] + [1e-9] * 46)).expand(len(x), 50).clone()
    drawn = {w for c in m.caption(torch.rand(40, 3, 32, 32), tokenizer=Words(), top_p=0.7, generator=torch.Generator().manual_seed(0), max_tokens=10) for w in c.split()}
    assert drawn == {"0", "1"}                             # 0.5 does not reach 0.7, 0.5 + 0.3 does


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("pool", [0, 2])
def test_flops_are_what_torch_counts(stem, pool):
    m = tiny(vision=dict(size=64, patch=16, width=32, depth=3, heads=2, stem=stem), fusion=dict(width=16, depth=3, heads=2, pool=pool))
    T, V = 11, 1 + (pool or 4) ** 2
    visual, ids, images = torch.randn(1, V, 16), torch.randint(0, 40, (1, T)), torch.rand(1, 3, 64, 64)
    tokens, text = m.vision(images), m.text(ids)[0]
    calls = {"pixels": lambda: (m.vision.stem[0] if stem == "conv" else m.vision.stem)(images), "vision": lambda: m.vision(images), "project": lambda: m.project(tokens), "visual_tokens": lambda: m.visual_tokens(torch.randn(1, V, 32)), "text": lambda: m.text(ids),
             "fuse_with_text": lambda: m.fuse_with_text(visual, text, torch.ones(1, T).bool()),
             "match": lambda: m.fuse_with_text(visual, text, torch.ones(1, T).bool(), at=torch.tensor([3])), "lm_logits": lambda: m.lm_logits(torch.randn(1, T, 16)),
             "fuse_with_keywords": lambda: m.fuse_with_keywords(visual, torch.randn(1, 5, 12), torch.ones(1, 5).bool()),
             "heads": lambda: m.heads(torch.randn(1, 16), torch.ones(1).bool())}
    flops = m.flops(tokens=T, k_o=5)
    assert flops.keys() == calls.keys()
    for part, call in calls.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel's products are not counted
            call()
        assert flops[part] == counter.get_total_flops(), part


def test_both_encoders_compile_whole():
    m = tiny()
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[47, 3, 4, 48, 0], [47, 5, 48, 0, 0]])
    for encode, x in ((m.encode_image, images), (m.encode_text, ids)):
        assert torch.allclose(torch.compile(encode, fullgraph=True, backend="aot_eager")(x), encode(x), atol=1e-6)


def test_embeddings_are_unit_vectors_of_images_of_the_right_size():
    m = tiny()
    assert torch.allclose(m.encode_image(torch.rand(3, 3, 32, 32)).norm(dim=-1), torch.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match="32 x 32"):
        m.encode_image(torch.rand(1, 3, 64, 64))


# ---------------------------------------------------------------- the command line

@pytest.fixture
def run(tmp_path):
    """A run folder as train.py leaves it, untrained."""
    words = tokenizer.Tokenizer.train(["the image shows sheets of large nuclei and mucin"] * 3, 560)
    torch.manual_seed(0)
    model = networks.MRPLIP(words.size, words.end, **networks.SIZES["synthetic"])
    words.save(tmp_path / "tokenizer.json")
    torch.save({"model": model.state_dict(), "config": {"size": "synthetic"}}, tmp_path / "ckpt.pt")
    (tmp_path / "keywords.json").write_text(json.dumps(["mucin", "large nucleus", "sheet"]))
    return tmp_path


def test_pictures_of_any_kind_are_captioned_and_bad_ones_cost_themselves(run, capsys):
    tall = np.zeros((90, 40, 3), np.uint8)
    tall[25:65] = 255                                     # the centred square is white, what is cut off black
    Image.fromarray(tall).save(run / "tall.png")
    assert networks.read_picture(run / "tall.png", 64).min() == 1
    Image.fromarray(np.full((300, 300, 4), 200, np.uint8)).save(run / "alpha.png")
    Image.fromarray(np.full((70, 64), 128, np.uint8)).save(run / "grey.jpg")
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(run / "deep.png")
    (run / "cut.png").write_bytes((run / "tall.png").read_bytes()[:-30])
    (run / "note.txt").write_text("no picture")
    failed = networks.print_captions(run, [run / n for n in ("tall.png", "cut.png", "deep.png", "alpha.png", "note.txt", "gone.png", "grey.jpg")], "the image")
    out, err = capsys.readouterr()
    assert failed == 4 and [line.split("/")[-1] for line in out.splitlines()[::3]] == ["tall.png", "alpha.png", "grey.jpg"]
    assert all(line.startswith("  the image") for line in out.splitlines()[1::3])
    assert all({w.rsplit(" ", 1)[0].strip() for w in line.split(",")} == {"mucin", "large nucleus", "sheet"} for line in out.splitlines()[2::3])
    for name in ("cut.png", "deep.png", "note.txt", "gone.png"):
        assert f"{name} cannot be read as a picture" in err


def test_keywords_shown_are_the_closest(run, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(run / "a.png")
    networks.print_captions(run, [run / "a.png"], best=2)
    shown = capsys.readouterr().out.splitlines()[2]
    model, words = subjects.load_run(run)
    cosine = (model.encode_image(networks.read_picture(run / "a.png", 64)[None]) @ subjects.embed_texts(model, words, ["mucin", "large nucleus", "sheet"]).T)[0]
    first, second = cosine.topk(2).indices.tolist()
    assert shown == "  " + ", ".join(f"{['mucin', 'large nucleus', 'sheet'][i]} {cosine[i]:.2f}" for i in (first, second))


def test_mistakes_on_the_command_line_are_one_sentence(run, tmp_path):
    done = script("model.py", "export", run, "--to", "open_clip")
    assert done.returncode == 1 and done.stderr.startswith("error: no other package has this image tower") and done.stderr.count("\n") == 1
    done = script("model.py", "caption", tmp_path / "nowhere", "x.png")
    assert done.returncode == 1 and "holds no ckpt.pt" in done.stderr and "Traceback" not in done.stderr
    assert "between 0 and 1" in script("model.py", "caption", run, "x.png", "--top-p", "3").stderr


def test_a_checkpoint_of_other_networks_is_one_sentence(run):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save({**state, "config": {"size": "gone"}}, run / "ckpt.pt")
    with pytest.raises(ValueError, match="is of size 'gone', which model.SIZES does not have"):
        subjects.load_run(run)
    (run / "ckpt.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="ckpt.pt cannot be read"):
        subjects.load_run(run)
    del state["model"]["lm_head.bias"]
    torch.save(state, run / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt holds other networks than this code builds .*lm_head.bias"):
        subjects.load_run(run)


def test_sizes_are_those_of_the_papers(capsys, monkeypatch):
    monkeypatch.setattr(networks, "SIZES", {"synthetic": networks.SIZES["synthetic"]})
    networks.print_sizes()
    model = networks.MRPLIP(1500, 48, **networks.SIZES["synthetic"])
    table = capsys.readouterr().out
    for part, n in (("vision", sum(p.numel() for p in [*model.vision.parameters(), *model.proj.parameters()])), ("all", sum(p.numel() for p in model.parameters()))):
        row = next(line for line in table.splitlines() if line.split()[0].rstrip(",") == part)
        assert f"{n / 1e6:.2f} M" in row and f"{4 * n / 1e6:.1f} MB" in row and f"{16 * n / 1e6:.1f} MB" in row
    with torch.device("meta"):
        paper, clip = (networks.MRPLIP(49409, 49407, **dict(zip(("vision", "text", "fusion", "embed", "simsiam"), v))) for v in
                       [(dict(size=224, patch=16, width=1024, depth=24, heads=16, layer_scale=1e-5), networks.CLIP_TEXT, networks.FUSION, 512, (2048, 512)),
                        (networks.CLIP_B32, networks.CLIP_TEXT, networks.FUSION, 512, (2048, 512))])
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(paper.vision) == 303_350_784             # UNI
    assert count(clip.vision) + count(clip.proj) + count(clip.text) - 512 + 1 == 151_277_313  # CLIP ViT-B/32, without [mask], with its temperature
