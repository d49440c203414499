"""Check that words are learned from captions alone, and the file that train.py --init reads.

pytest tests/test_words.py
"""

import shutil
import types

import numpy as np
import pytest
import torch
from conftest import script

import losses
import model as networks
import text
from prepare import words

PAIRS = ("gland acinus", "nest island", "cord trabecula", "papilla frond", "sheet diffuse")
PAIRS += ("spindle fascicle", "mucin vacuole", "fat adipose")


@pytest.fixture(scope="module")
def reading():
    """Eight slides of two bags, each slide with two words that never share a caption."""
    captions = {}
    for i, pair in enumerate(PAIRS):
        for bag in range(2):
            said = [f"the image shows {pair.split()[(n + bag) % 2]}" for n in range(85)]
            captions[f"{i}-0{bag}"] = said
    slides = [key.split("-")[0] for key in captions]
    valid = torch.ones(16, 85, dtype=torch.bool)
    bags = types.SimpleNamespace(slides=slides, keys=list(captions), valid=valid)
    tokenizer = text.Tokenizer.train(captions["0-00"] + captions["2-01"], 300)
    return bags, captions, tokenizer


def make_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    return networks.MRPLIP(tokenizer.size, tokenizer.end, **networks.SIZES["synthetic"])


@torch.no_grad()
def share_right(model, tokenizer):
    """How often the nearest of the second words is the one of the same slide."""
    sides = []
    for k in range(2):
        texts = [f"the image shows {pair.split()[k]}" for pair in PAIRS]
        sides.append(model.encode_text(tokenizer.batch(texts, 64)))
    nearest = (sides[0] @ sides[1].T).argmax(1)
    return (nearest == torch.arange(8)).float().mean().item()


def test_words_of_one_slide_come_to_mean_the_same(reading):
    bags, captions, tokenizer = reading
    model = make_model(tokenizer)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    assert share_right(model, tokenizer) < 0.5
    words.learn(model, bags, captions, tokenizer, steps=120)
    assert share_right(model, tokenizer) > 0.9
    # No gradient is left, and two processes end with the same weights.
    assert all(p.grad is None for p in model.parameters())
    after, twins = model.state_dict(), [make_model(tokenizer) for _ in range(2)]
    for twin in twins:
        words.learn(twin, bags, captions, tokenizer, steps=8)
    pairs = zip(*(twin.state_dict().values() for twin in twins), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    # Only the text tower, the fusion and the word head have changed.
    for name in after:
        changed = not torch.equal(after[name], fresh[name])
        assert changed == name.startswith(words.TRAINED), name


def test_weight_decay_spares_vectors_and_positions(reading, monkeypatch):
    bags, captions, tokenizer = reading
    kept = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **more):
            kept.extend(groups)
            super().__init__(groups, **more)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    model = make_model(tokenizer)
    words.learn(model, bags, captions, tokenizer, steps=1)
    decay = {id(p): group["weight_decay"] for group in kept for p in group["params"]}
    for name, p in model.named_parameters():
        if id(p) in decay:
            matrix = p.ndim == 2 and name != "text.positional_embedding"
            assert decay[id(p)] == (0.02 if matrix else 0.0), name


def test_a_step_descends_on_the_loss_by_hand(reading):
    """One step on given captions is AdamW on contrast plus next words, computed here anew."""
    bags, captions, tokenizer = reading
    model = make_model(tokenizer)
    twin = make_model(tokenizer)
    words.learn(model, bags, captions, tokenizer, steps=1, seed=5)

    of_slide = [[2 * i, 2 * i + 1] for i in range(8)]
    first, second = words.draw_pairs(np.random.default_rng(5), of_slide, bags, captions)
    assert len(first) == len(second) == 8 * 4
    # Partners are of one slide: the same word or its twin.
    for a, b in zip(first, second, strict=True):
        assert any({a.split()[-1], b.split()[-1]} <= set(pair.split()) for pair in PAIRS)
    ids = text.trim(tokenizer.batch(first + second, 64), tokenizer.end)
    text_tokens, pooled = twin.text(ids)
    a, b = torch.nn.functional.normalize(pooled, dim=1).chunk(2)
    p = (a @ b.T / 0.07).softmax(1).diagonal()
    q = (a @ b.T / 0.07).softmax(0).diagonal()
    loss = -(p.log().mean() + q.log().mean()) / 2
    # Next words of every third caption, each read from what stands before it.
    some, real = ids[::3], networks.real_tokens(ids[::3], tokenizer.end)
    no_image = torch.zeros(len(some), 0, 64)
    start = torch.ones(len(some), dtype=torch.long)
    fused = twin.fuse_with_text(no_image, text_tokens[::3], real, start)
    log_p = twin.lm_logits(fused).log_softmax(-1)[:, :-1].gather(2, some[:, 1:, None])[..., 0]
    loss = loss - (log_p * real[:, 1:]).sum() / real[:, 1:].sum()
    loss.backward()
    named = twin.named_parameters()
    trained = [x for name, x in named if name.startswith(words.TRAINED)]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    # The first step of Adam is lr times the sign of the gradient, where that is not tiny.
    moved = dict(model.named_parameters())
    for name, x in twin.named_parameters():
        if name.startswith(words.TRAINED):
            clear = x.grad.abs() > 1e-5
            decay = 0.02 if x.ndim == 2 and "positional" not in name else 0.0
            expected = x * (1 - 3e-3 * decay) - 3e-3 * x.grad.sign()
            found = moved[name][clear]
            assert torch.allclose(found, expected[clear], atol=1e-5), name


def test_nodes_without_a_caption_are_never_drawn(reading):
    bags, captions, _ = reading
    few = {key: [said[0], *[None] * 40, *said[41:]] for key, said in captions.items()}
    few["3-00"] = few["3-01"] = [None] * 85
    of_slide = [[2 * i, 2 * i + 1] for i in range(8)]
    first, second = words.draw_pairs(np.random.default_rng(0), of_slide, bags, few)
    # Seven slides have captions, at 5x and at 40x.
    assert len(first) == len(second) == 7 * 2 and all(first + second)


def test_one_slide_is_not_enough(reading):
    bags, captions, tokenizer = reading
    alone = types.SimpleNamespace(slides=["0"] * 2, keys=bags.keys[:2], valid=bags.valid[:2])
    with pytest.raises(ValueError, match="at least 2 slides"):
        words.learn(make_model(tokenizer), alone, captions, tokenizer, steps=1)


def test_shards_without_captions_are_one_sentence(world, tmp_path):
    shutil.copytree(
        world / "train", tmp_path / "train", ignore=shutil.ignore_patterns("*.captions*")
    )
    with pytest.raises(ValueError, match="train holds no captions: make them"):
        words.write_words(tmp_path, tmp_path / "words.pt", steps=1)


def test_the_file_fits_a_new_model(world, tmp_path):
    out = tmp_path / "words.pt"
    script("prepare.words", world, "--out", out, "--steps", 2, check=True)
    assert out.read_bytes() == (world / "words.pt").read_bytes()
    stored = torch.load(out, weights_only=True)
    tokenizer = text.Tokenizer(stored["tokenizer"])
    caption = next(iter(text.Captions(world / "train")))[1][0]
    assert tokenizer.decode(tokenizer.encode(caption)).replace(" ", "") == (
        caption.lower().replace(" ", "")
    )
    # It replaces exactly the parameters that were trained, and the types they were trained with.
    other = make_model(tokenizer, seed=1)
    report = other.load_state_dict(stored["model"], strict=False)
    assert not report.unexpected_keys
    assert set(stored["model"]) >= {"kind", "text.proj.weight", "fusion_norm.weight"}
    parts = {name.split(".")[0] for name in stored["model"]}
    assert parts == set("text fuse_text kind fusion fusion_norm lm_dense lm_norm lm_head".split())
    # The loaded tower predicts words better than a new one.
    ids = tokenizer.batch([caption], 64)
    fresh = make_model(tokenizer, seed=1)
    with torch.no_grad():
        loss = [words.next_word_loss(m, m.text(ids)[0], ids) for m in (other, fresh)]
    assert loss[0] < loss[1]
    assert losses.unit(other.text(ids)[1]).shape == (1, 128)
    missing = script("prepare.words", tmp_path / "none", "--out", out)
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
