"""pytest tests/test_tokenizer.py — byte-pair encoding against a brute-force one, CLIP's words and layout, round trips."""
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

import tokenizer


def test_bpe_learns_the_most_frequent_pairs():
    """By hand: "low" x 5, "lowest" x 2: the pairs l-o (7) and o-w (5 as o-w</w>, 2 as o-w) give "lo" first."""
    t = tokenizer.Tokenizer.train(["low low low low low lowest lowest"], 512 + 3 + 3)
    assert t.merges[0] == ("l", "o") and t.merges[1] == ("lo", "w</w>") and len(t.merges) == 3
    assert len(t.encode("low")) == 1


def test_incremental_bpe_equals_brute_force():
    corpus = ["the gland and the glands of a glandular nest", "nests nest nested in the gland"]
    fast = tokenizer.Tokenizer.train(corpus, 512 + 15 + 3).merges
    byte = tokenizer._byte_symbols()
    words = Counter(w for line in corpus for w in tokenizer.SPLIT.findall(line))
    split = {w: [byte[b] for b in w.encode()][:-1] + [byte[w.encode()[-1]] + "</w>"] for w in words}
    slow = []
    while len(slow) < 15:
        count = Counter()
        for w, parts in split.items():
            for pair in zip(parts, parts[1:]):
                count[pair] += words[w]
        best = max(count, key=lambda p: (count[p], p))
        if count[best] < 2:
            break
        slow.append(best)
        split = {w: tokenizer._merge(parts, best) for w, parts in split.items()}
    assert fast == slow


@pytest.mark.parametrize("line", ["papillary fronds, ca. 12 µm", "naïve “quotes” — 100%", "Größe 3×4", "日本 glands"])
def test_round_trip(line, tmp_path):
    t = tokenizer.Tokenizer.train([line, "papillary fronds and glands"] * 3, 600)
    t.save(tmp_path / "t.json")
    assert tokenizer.Tokenizer.load(tmp_path / "t.json").encode(line) == t.encode(line)
    assert t.decode(t.encode(line)).replace(" ", "") == line.lower().replace(" ", "").replace("“", '"').replace("”", '"')


def test_words_are_cut_as_open_clip_cuts_them():
    """clip_words.json holds odd strings and the words open_clip 3.3 makes of them (ftfy, unescaping and its pattern)."""
    for line, words in json.loads(Path(__file__).with_name("clip_words.json").read_text()):
        assert tokenizer.split_words(line) == words, line


def test_batch_starts_ends_cuts_and_pads():
    t = tokenizer.Tokenizer([])
    ids = t.batch(["ab", "x" * 100, ""], 8)
    assert ids[0].tolist() == [t.start, *t.encode("ab"), t.end, 0, 0, 0, 0]
    assert ids[1, -1] == t.end and ids[2].tolist() == [t.start, t.end] + [0] * 6
    assert tokenizer.trim(t.batch(["ab"], 77), t.end).shape == (1, 8)


def test_clip_layout(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    merges = ["i n", "t h", "a n", "th e</w>"] + ["x y"] * 48890
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.write("\n".join(["#version", *merges, "not used"]))
    t = tokenizer.Tokenizer.from_clip(path)
    assert (t.start, t.end, t.mask, t.size) == (49406, 49407, 49408, 49409)
    assert t.encode("the in") == [512 + 3, t.id["i"], t.id["n</w>"]]  # "in" ends a word: "i n" does not apply
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": [m.split() for m in merges]}}))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
    for other in ("merges.txt", "tokenizer.json", "older/tokenizer.json"):
        assert tokenizer.Tokenizer.from_clip(tmp_path / other).merges == t.merges
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[:100]]))
    with pytest.raises(ValueError, match="merges.txt is not CLIP's merge list .100 merges"):
        tokenizer.Tokenizer.from_clip(tmp_path / "merges.txt")
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="bpe.txt.gz is not CLIP"):
        tokenizer.Tokenizer.from_clip(path)
