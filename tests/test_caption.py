"""Captions follow the prefix mask word by word; pictures of any kind; the keywords shown.

pytest tests/test_caption.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from test_model import tiny
from test_slides import run as untrained  # noqa: F401, a fixture

import evaluate
from protocols.caption import describe, print_captions
from protocols.embed import Tiles


class Words:
    """A stand-in for the tokenizer of `tiny`: a text is its ids in decimal."""

    start, end, mask = 47, 48, 49

    def encode(self, words):
        return [int(word) for word in words.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i < 47)


def chatty():
    """Build a model whose captions differ between images and from word to word."""
    model = tiny()
    bias = model.lm_head.bias.data
    bias.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.1)
    model.text.token_embedding.weight.data.mul_(60)
    model.lm_head.weight.data.mul_(6)
    bias[48] = 6.0
    return model


# --------------------------------------------------------------------------------------------------
# Captions


@torch.no_grad()
def likeliest(model, image, ids):
    """Predict the word after each id by hand: image [1, 3, S, S], ids [1, T] -> list of T."""
    image_tokens = model.to_fusion(model.vision_tokens(image))
    words = model.fuse_text(model.text(ids)[0]) + model.kind[1]
    x = torch.cat([image_tokens, words], 1)
    allowed = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    # The five image tokens and the start id see each other.
    allowed[:, :6] = True
    logits = model.lm_logits(model.fuse(x, allowed[None, None]))[0, 5:]
    logits[:, [47, 49]] = -torch.inf
    return logits.argmax(-1).tolist()


def test_greedy_captions_are_the_likeliest_words_and_end():
    model = chatty()
    torch.manual_seed(0)
    images = torch.rand(6, 3, 32, 32) * torch.arange(6).view(6, 1, 1, 1)
    images = images.clamp(max=1)
    got = describe(model, Words(), images, max_tokens=12)
    # In company and alone: nothing after an end leaks into a caption.
    assert got == [describe(model, Words(), image[None], max_tokens=12)[0] for image in images]
    assert len(set(got)) > 1
    ended = 0
    for image, caption in zip(images, got, strict=True):
        ids = torch.tensor([[47, *Words().encode(caption)]])
        best = likeliest(model, image[None], ids)
        assert best[:-1] == ids[0, 1:].tolist()
        ended += best[-1] == 48
        assert best[-1] == 48 or ids.shape[1] == 13
    assert ended >= 2


def test_captions_go_on_from_a_prefix_and_are_drawn_on_request():
    model, images = chatty(), torch.rand(4, 3, 32, 32)
    words = Words()
    assert all(c.startswith("5 6 7") for c in describe(model, words, images, "5 6 7"))
    # Almost no probability leaves the likeliest alone.
    assert describe(model, words, images, top_p=1e-9) == describe(model, words, images)
    model.lm_head.bias.data[48] = 0

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return describe(model, words, images, max_tokens=8, top_p=0.95, generator=generator)

    assert draw(0) == draw(0) != draw(1)
    # The context is 16, with the start id.
    longest = describe(model, words, images, max_tokens=99)
    assert all(len(words.encode(caption)) <= 15 for caption in longest)
    assert describe(model, words, images, "5 6", max_tokens=0) == ["5 6"] * 4
    with pytest.raises(ValueError, match="the prefix has 15 tokens and the text tower reads 16"):
        describe(model, words, images, " ".join("1" * 15))


def test_nucleus_sampling_keeps_the_fewest_words_that_reach_p():
    model = tiny()
    p = torch.tensor([0.5, 0.3, 0.15, 0.05] + [1e-9] * 46)
    model.lm_logits = lambda x: p.log().expand(len(x), 50).clone()
    images = torch.rand(40, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    told = describe(model, Words(), images, max_tokens=10, top_p=0.7, generator=generator)
    # 0.5 does not reach 0.7, 0.5 + 0.3 does.
    assert set(" ".join(told).split()) == {"0", "1"}


# --------------------------------------------------------------------------------------------------
# The command

KEYWORDS = ["mucin", "large nucleus", "sheet"]


@pytest.fixture
def run(untrained, tmp_path):  # noqa: F811
    """Copy a run folder as train.py leaves it, untrained, and give it keywords."""
    folder = shutil.copytree(untrained, tmp_path / "run")
    (folder / "keywords.json").write_text(json.dumps(KEYWORDS))
    return folder


def test_pictures_of_any_kind_are_captioned_and_bad_ones_cost_themselves(run, capsys):
    tall = np.zeros((90, 40, 3), np.uint8)
    tall[25:65] = 255
    Image.fromarray(tall).save(run / "tall.png")
    # The centred square is white, the parts cut off are black.
    assert Tiles([run / "tall.png"], 64)[0][0][..., 2:-2, :].min() == 255
    Image.fromarray(np.full((300, 300, 4), 200, np.uint8)).save(run / "alpha.png")
    Image.fromarray(np.full((70, 64), 128, np.uint8)).save(run / "grey.jpg")
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(run / "deep.png")
    (run / "cut.png").write_bytes((run / "tall.png").read_bytes()[:-30])
    (run / "note.txt").write_text("no picture")
    names = ("tall.png", "cut.png", "deep.png", "alpha.png", "note.txt", "gone.png", "grey.jpg")
    assert print_captions(run, [run / name for name in names], "the image") == 4
    out, err = capsys.readouterr()
    lines = out.splitlines()
    read = ["tall.png", "alpha.png", "grey.jpg"]
    assert [line.split("/")[-1] for line in lines[::3]] == read
    assert all(line.startswith("  the image") for line in lines[1::3])
    for line in lines[2::3]:
        assert {part.rsplit(" ", 1)[0].strip() for part in line.split(",")} == set(KEYWORDS)
    for name in ("cut.png", "deep.png", "note.txt", "gone.png"):
        assert f"{name} cannot be read as a picture" in err


def test_keywords_shown_are_the_closest(run, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "a.png")
    print_captions(run, [run / "a.png"], best=2)
    shown = capsys.readouterr().out.splitlines()[2]
    model, words = evaluate.load_run(run)
    image = Tiles([run / "a.png"], 64)[0][0] / 255
    w = model.encode_text(words.batch(KEYWORDS, model.text.context))
    cosine = (model.encode_image(image) @ w.T)[0].tolist()
    best = sorted(range(3), key=lambda i: -cosine[i])[:2]
    assert shown == "  " + ", ".join(f"{KEYWORDS[i]} {cosine[i]:.2f}" for i in best)
    # Without keywords there is the caption alone.
    (run / "keywords.json").unlink()
    print_captions(run, [run / "a.png"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_mistakes_on_the_command_line_are_one_sentence(run, tmp_path):
    wrong = {
        (tmp_path / "nowhere", "x.png"): "holds no ckpt.pt",
        (run, "x.png", "--top-p", "3"): "between 0 and 1",
        (run, "x.png", "--prefix", "mucin " * 99): "x.png cannot be read",
        (run, run / "ok.png", "--prefix", "mucin " * 99): "the text tower reads 64: shorten it",
    }
    Image.new("RGB", (64, 64)).save(run / "ok.png")
    for argv, message in wrong.items():
        done = script("protocols.caption", *argv)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr
