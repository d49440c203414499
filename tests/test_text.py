"""pytest tests/test_text.py — keywords on sentences read by eye, byte-pair encoding against a brute-force one, round trips."""
import gzip
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

import synthetic
import text


@pytest.mark.parametrize("caption,expected", [
    ("The image shows tubular glands in a fibrous stroma, without necrosis.", ["tubular gland", "fibrous stroma"]),
    ("There is no evidence of malignancy. Lymphocytes are present.", ["lymphocyte"]),
    ("This photomicrograph shows atypical nuclei but no mitoses", ["atypical nucleus"]),
    ("The findings are consistent with hepatocellular carcinoma.", ["hepatocellular carcinoma"]),
    ("Glands and glands, and more glands.", ["gland"]),
    ("The image primarily showcases a region of interest.", ["interest"]),
    ("", []), (None, []),
])
def test_keywords(caption, expected):
    assert text.keywords(caption) == expected


def test_keyword_bag_counts_captions_and_keeps_owners():
    captions = ["solid nests. spindle cells.", "spindle cells.", None, "spindle cells, spindle cells. mature fat."]
    bag = text.keyword_bag(captions, 2)
    assert bag == ["spindle cell", "solid nest"]
    assert text.keyword_owners(captions, bag).tolist() == [[True, True], [True, False], [False, False], [True, False]]


def test_every_fact_of_the_built_in_world_survives_as_a_keyword():
    for name in (*synthetic.ARCHITECTURES, *synthetic.CYTOLOGIES, *synthetic.ALL_DIAGNOSES):
        for words in synthetic.WORDS.get(name, (name,)):
            assert text.keywords(f"The image primarily showcases {words}."), words


def test_prompts_cover_the_built_in_world():
    assert tuple(text.PROMPTS["architecture"]) == synthetic.ARCHITECTURES
    assert tuple(text.PROMPTS["cytology"]) == synthetic.CYTOLOGIES
    assert tuple(text.PROMPTS["diagnosis"]) == synthetic.ALL_DIAGNOSES
    assert len(text.class_prompts(("a", "b"))) == 2 * len(text.TEMPLATES) and text.class_prompts(("a", "b"), False) == ["a"]


def test_bpe_learns_the_most_frequent_pairs():
    """By hand: "low" x 5, "lowest" x 2: the pairs l-o (7) and o-w (5 as o-w</w>, 2 as o-w) give "lo" first."""
    t = text.Tokenizer.train(["low low low low low lowest lowest"], 512 + 3 + 3)
    assert t.merges[0] == ("l", "o") and t.merges[1] == ("lo", "w</w>") and len(t.merges) == 3
    assert len(t.encode("low")) == 1


def test_incremental_bpe_equals_brute_force():
    corpus = ["the gland and the glands of a glandular nest", "nests nest nested in the gland"]
    fast = text.Tokenizer.train(corpus, 512 + 15 + 3).merges
    byte = text._byte_symbols()
    words = Counter(w for line in corpus for w in text.SPLIT.findall(line))
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
        split = {w: text._merge(parts, best) for w, parts in split.items()}
    assert fast == slow


@pytest.mark.parametrize("line", ["papillary fronds, ca. 12 µm", "naïve “quotes” — 100%", "Größe 3×4", "日本 glands"])
def test_round_trip(line, tmp_path):
    t = text.Tokenizer.train([line, "papillary fronds and glands"] * 3, 600)
    t.save(tmp_path / "t.json")
    assert text.Tokenizer.load(tmp_path / "t.json").encode(line) == t.encode(line)
    assert t.decode(t.encode(line)).replace(" ", "") == line.lower().replace(" ", "").replace("“", '"').replace("”", '"')


def test_words_are_cut_as_open_clip_cuts_them():
    """clip_words.json holds odd strings and the words open_clip 3.3 makes of them (ftfy, unescaping and its pattern)."""
    for line, words in json.loads(Path(__file__).with_name("clip_words.json").read_text()):
        assert text.split_words(line) == words, line


def test_batch_starts_ends_cuts_and_pads():
    t = text.Tokenizer([])
    ids = t.batch(["ab", "x" * 100, ""], 8)
    assert ids[0].tolist() == [t.start, *t.encode("ab"), t.end, 0, 0, 0, 0]
    assert ids[1, -1] == t.end and ids[2].tolist() == [t.start, t.end] + [0] * 6
    assert text.trim(t.batch(["ab"], 77), t.end).shape == (1, 8)


def test_clip_layout(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    merges = ["i n", "t h", "a n", "th e</w>"] + ["x y"] * 48890
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.write("\n".join(["#version", *merges, "not used"]))
    t = text.Tokenizer.from_clip(path)
    assert (t.start, t.end, t.mask, t.size) == (49406, 49407, 49408, 49409)
    assert t.encode("the in") == [512 + 3, t.id["i"], t.id["n</w>"]]  # "in" ends a word: "i n" does not apply
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": [m.split() for m in merges]}}))
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
    for other in ("merges.txt", "tokenizer.json", "older/tokenizer.json"):
        assert text.Tokenizer.from_clip(tmp_path / other).merges == t.merges
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[:100]]))
    with pytest.raises(ValueError, match="merges.txt is not CLIP's merge list .100 merges"):
        text.Tokenizer.from_clip(tmp_path / "merges.txt")
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="bpe.txt.gz is not CLIP"):
        text.Tokenizer.from_clip(path)


def test_import_one_caption_per_slide(tmp_path):
    with tarfile.open(tmp_path / "bags-000000.tar", "w") as tar:
        for name, payload in (("k-0.jpg", b"x"), ("k-0.json", json.dumps({"slide": "a.tif"}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            import io
            tar.addfile(info, io.BytesIO(payload))
    source = tmp_path / "slides.jsonl"
    source.write_text('{"slide": "b.tif", "caption": "fat"}\n')
    with pytest.raises(ValueError, match="slides.jsonl has no caption for 1 bags of 1 slides .a.tif.*; 1 of its names fit no bag"):
        text.import_captions(source, tmp_path)
    assert not list(tmp_path.glob("*.captions.jsonl"))
    source.write_text('{"slide": "a.tif", "title_en": "Endometriosis", "organ_en": "", "note": "in the wall."}\n')
    text.import_captions(source, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "bags-000000.captions.jsonl").read_text().splitlines()]
    assert len(rows) == 85 and rows[84] == {"key": "k-0", "node": 84, "caption": "Endometriosis. in the wall", "source": "slide"}
    more = tmp_path / "more.csv"                          # the nearest counts: the image's, the bag's, the slide's
    more.write_text("image,caption,node\nk-0_17.png,one node,\nsome/k-0.jpg,\"a bag, all of it\",\na.tif,a slide,\nk-0,by number,20\n", encoding="utf-8-sig")
    text.import_captions(more, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "bags-000000.captions.jsonl").read_text().splitlines()]
    assert {r["node"]: (r["caption"], r["source"]) for r in rows} == {n: ("a bag, all of it", "bag") for n in range(85)} | {
        17: ("one node", "image"), 20: ("by number", "image")}
    release = tmp_path / "release"                        # a JSON file per image, as the authors' script leaves them
    release.mkdir()
    for n in (0, 84):
        (release / f"{n}.json").write_text(json.dumps({"Image": f"/data/k-0_{n}.jpg", "prompt": "p", "Answer": f"The image {n}.", "model_id": "m"}))
    text.import_captions(release, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "bags-000000.captions.jsonl").read_text().splitlines()]
    assert [(r["node"], r["caption"]) for r in rows] == [(0, "The image 0"), (84, "The image 84")]
    (tmp_path / "bags-000000.captions.jsonl").write_text('{"key": "k-0", "node": 0, "caption": "x", "model": "m", "prompt": "p"}\n')
    with pytest.raises(ValueError, match="holds captions that a model was asked for"):
        text.import_captions(more, tmp_path)
    (tmp_path / "bags-000000.captions.jsonl").unlink()
    source.write_text("{broken")
    with pytest.raises(ValueError, match="slides.jsonl:1"):
        text.import_captions(source, tmp_path)
