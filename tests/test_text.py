"""python -m pytest tests/test_text.py -q

Keywords of sentences that were read by eye, textual bags worked out by hand, byte-pair encoding
against a brute-force one, the words and ids of open_clip.
"""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import script

import text
from prepare import world

PATHGEN = Path(__file__).resolve().parents[2] / "shared/data/captions/pathgen_4000.json"


@pytest.mark.parametrize(
    "caption,expected",
    [
        (
            "The image shows tubular glands in a fibrous stroma, without necrosis.",
            ["tubular gland", "fibrous stroma"],
        ),
        ("There is no evidence of malignancy. Lymphocytes are present.", ["lymphocyte"]),
        ("This photomicrograph shows atypical nuclei but no mitoses", ["atypical nucleus"]),
        (
            "The findings are consistent with hepatocellular carcinoma.",
            ["hepatocellular carcinoma"],
        ),
        ("Glands and glands, and more glands.", ["gland"]),
        ("The image primarily showcases a region of interest.", []),
        (
            "There is evidence of necrosis. The main feature is a lymph node. These findings "
            "point to melanoma.",
            ["necrosis", "lymph node", "melanoma"],
        ),
        ("Tumour tissue of medium-sized and irregular ducts.", ["tumour tissue", "irregular duct"]),
        ("Ducts are large, and cells are highly variable in size.", ["duct"]),
        (
            "Malignant cells infiltrating the stroma; dense lymphocytic infiltrates.",
            ["malignant cell", "stroma", "dense lymphocytic infiltrate"],
        ),
        (
            "Ductal carcinoma in situ of the breast, Crohn\u2019s disease",
            ["ductal carcinoma in situ", "breast", "crohn disease"],
        ),
        (
            "A tumour of 3.5 cm, 12 \u00b5m nuclei at 40x, pT2 G3, grade II/III, 20% "
            "CD20-positive B cells, Ki-67",
            ["tumour", "nucleus", "cd20-positive b cell", "ki-67"],
        ),
        (
            "Clinical correlation is advised. It is important to consult a pathologist. "
            "Malignancy cannot be excluded.",
            [],
        ),
        (
            "It is important to note that the tumor shows necrosis and cribriform glands.",
            ["tumor", "necrosis", "cribriform gland"],
        ),
        (
            "Poorly differentiated non small cell lung carcinoma, clear cell renal cell carcinoma",
            ["non-small cell lung carcinoma", "renal cell carcinoma"],
        ),
        (
            "Sclerosed glomeruli, the pancreas, hyphae, keratoses",
            ["sclerosed glomerulus", "pancreas", "hypha", "keratosis"],
        ),
        (
            "<p>Dense <b>stroma</b> &amp; fat&nbsp;cells</p> https://example.org/a.html "
            "\ufb01brous bands of 2 mm\u00b2",
            ["dense stroma", "fat cell", "fibrous band"],
        ),
        ("", []),
        (None, []),
    ],
)
def test_keywords(caption, expected):
    assert text.keywords(caption) == expected


@pytest.mark.parametrize(
    "caption,expected",
    [
        (
            "No atypia, necrosis, and mitoses are seen. The stroma is loose myxoid.",
            ["stroma", "loose myxoid"],
        ),
        (
            "Glands without atypia, necrosis, or mitoses, and a fibrous stroma is present.",
            ["gland", "fibrous stroma"],
        ),
        ("There is no atypia, and the stroma shows fibrosis.", ["stroma", "fibrosis"]),
        (
            "Mitotic figures are not identified, necrosis is absent, invasion was never "
            "seen, and glands are seen.",
            ["gland"],
        ),
        (
            "No urothelium is identified, and non-dysplastic squamous epithelium is present.",
            ["non-dysplastic squamous epithelium"],
        ),
        (
            "Sheets without structure, dense fibrous stroma and fat.",
            ["sheet", "dense fibrous stroma", "fat"],
        ),
        ("Not only glands but also nests.", ["gland", "nest"]),
        ("Nests, which may suggest a reactive process.", ["nest"]),
        ("Nests rather than glands; her2-negative carcinoma.", ["nest", "her2-negative carcinoma"]),
        (
            "Mitoses aren't seen. Nests of cells, compared with a nest of basal cell carcinoma.",
            ["nest"],
        ),
        ("Neither necrosis nor mitoses are seen in the nests.", []),
        (
            "Absence of necrosis, mitoses, and atypia. Glands with no intervening stroma, "
            "with foamy macrophages.",
            ["gland", "foamy macrophage"],
        ),
        ("The image does not show any signs of necrosis, mitosis, or atypia.", []),
        (
            "Necrosis, hemorrhage, and vascular invasion are not identified. Atypia is "
            "entirely absent.",
            [],
        ),
        (
            "- **Necrosis:** None observed\n- Nuclei: vesicular nuclei\n2. Mitoses: 0\nCK20 "
            "(-), goblet cells",
            ["nucleus", "vesicular nucleus", "goblet cell"],
        ),
        (
            "Invasion not identified. Metastases have not been seen, melanoma was ruled out, "
            "mitoses do not appear. Fat.",
            ["fat"],
        ),
        (
            "None of the glands are dysplastic. It fails to show granulomas, w/o necrosis or "
            "mitoses; r/o lymphoma.",
            [],
        ),
        ("There is no evidence of\nnecrosis or E. coli infection.\n\nNests of cells.", ["nest"]),
        ("There is no necrosis and the glands are cribriform.", ["gland", "cribriform"]),
    ],
)
def test_denied_findings_are_no_keywords(caption, expected):
    assert text.keywords(caption) == expected


@pytest.mark.parametrize(
    "one,other",
    [
        ("signet-ring cell", "signet ring cell"),
        ("tumour oedema", "tumor edema"),
        ("fibre", "fiber"),
        ("fibrous stroma", "stroma fibrous"),
        ("haemorrhage", "hemorrhage"),
        ("non-neoplastic", "nonneoplastic"),
    ],
)
def test_same(one, other):
    assert (text.same(one) == text.same(other)) == (one != "non-neoplastic")


def test_keyword_bag_counts_captions_and_keeps_owners():
    captions = [
        "solid nests. spindle cells.",
        "spindle-cells.",
        None,
        "spindle cells, spindle cells. mature fat.",
    ]
    bag = text.keyword_bag(captions, 2)
    assert bag == ["spindle cell", "solid nest"]
    assert text.keyword_owners(captions, bag).tolist() == [
        [True, True],
        [True, False],
        [False, False],
        [True, False],
    ]


def test_keyword_bag_ranks_by_what_is_special_to_the_bag():
    """By hand, a bag of 4 captions in a corpus of 40.

    Folds are named by 3 of 4 where 3 were to be expected, nests by 2 where 0.4 were.
    """
    captions = ["tissue fold. nests.", "tissue fold. nests.", "tissue fold. chordoma.", "glands."]
    corpus = {
        "captions": 40,
        "count": {"fold tissue": 30, "nest": 4, "gland": 20},
    }  # nobody counted the chordoma: as if named once
    assert text.keyword_bag(captions) == ["tissue fold", "nest", "chordoma", "gland"]
    score = {
        "nest": 2 * math.log(1 + 2 / 0.4),
        "chordoma": math.log(1 + 1 / 0.1),
        "tissue fold": 3 * math.log(2),
        "gland": math.log(1 + 1 / 2),
    }
    assert (
        text.keyword_bag(captions, 128, corpus)
        == sorted(score, key=score.get, reverse=True)
        == ["nest", "chordoma", "tissue fold", "gland"]
    )
    assert text.keyword_bag([None, ""], 5, corpus) == []


def test_a_long_caption_takes_no_time():
    for caption in ("a" * 200_000, "the " * 50_000, "glands, " * 20_000, "and the " * 20_000):
        text.keywords(caption)


def test_denied_lists_of_real_captions():
    """Sentences such as "No atypia, necrosis, or mitoses are seen." hold no finding."""
    if not PATHGEN.exists():
        pytest.skip("the captions are not here")
    denied = re.compile(
        r"No (?:[\w -]+, )+or [\w -]+ (?:is|are) (?:seen|evident|observed|present)\."
    )
    captions = " ".join(row["caption"] for row in json.loads(PATHGEN.read_text()))
    sentences = denied.findall(captions)
    assert len(sentences) > 20
    for sentence in sentences:
        assert text.keywords(sentence) == [], sentence


def test_count_corpus():
    corpus = text.count_corpus(["Tumour nests.", "No nests. A tumor nest.", "", None, "Glands."])
    assert corpus["captions"] == 3
    assert corpus["count"] == {"gland": 1, "nest tumor": 2}
    assert corpus["common"] == ["tumour nest", "gland"]
    # What is named once makes room.
    captions = iter(["Fat.", "Glands.", "Glands.", "Nests."])
    assert text.count_corpus(captions, most=2)["count"] == {"gland": 2}


def write_captions(folder, slide, captions):
    rows = [
        {"key": f"{slide}-{i // 85:02d}", "node": i % 85, "caption": caption}
        for i, caption in enumerate(captions)
    ]
    path = folder / f"bags-{slide}.captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_captions_are_read_by_key(tmp_path):
    path = write_captions(tmp_path, "a-b", ["fat", "", None] + ["nests"] * 85)
    with open(path, "a") as file:
        file.write('\n{"key": "a-b-00", "node": 0, "caption": "glands", "model": "m"}\n')
    captions = text.Captions(tmp_path)
    assert captions.files == [path]
    assert captions["a-b-00"][:4] == ["glands", None, None, "nests"]
    assert captions["a-b-01"] == ["nests"] * 3 + [None] * 82
    assert captions["a-b-77"] == captions["elsewhere-00"] == [None] * 85
    assert [key for key, bag in captions] == ["a-b-00", "a-b-01"]
    assert dict(captions)["a-b-01"] == captions["a-b-01"]


def test_captions_keep_the_last_bags_only(tmp_path):
    for slide in ("a", "b"):
        rows = [{"key": f"{slide}-{i}", "node": 84, "caption": f"{slide}{i}"} for i in range(2000)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"bags-{slide}.captions.jsonl").write_text(lines)
    captions = text.Captions(tmp_path)
    for key in ("a-0", "b-7", "a-1999", "a-3"):
        assert captions[key][84] == key.replace("-", "")
        assert key in captions.kept and len(captions.kept) <= 2048


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[1]",
        '{"key": "a-00", "caption": "x"}',
        '{"key": "a-00", "node": 85, "caption": "x"}',
        '{"key": "a-00", "node": -1, "caption": "x"}',
        '{"key": "a-00", "node": 1.0, "caption": "x"}',
        '{"key": "a-00", "node": 1, "caption": ["x"]}',
        '{"key": 7, "node": 1, "caption": "x"}',
        '{"key": "b-00", "node": 1, "caption": "x"}',
        '{"key": "a-00", "node": 1}',
        '"\\ud800',
    ],
)
def test_a_broken_line_is_named(line, tmp_path):
    path = write_captions(tmp_path, "a", ["fat"])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bags-a.captions.jsonl:3: .*correct or delete this line"):
        text.Captions(tmp_path)["a-00"]
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"jsonl:1: not JSON"):
        text.Captions(tmp_path)["a-00"]


def test_the_command_prints_textual_bags(tmp_path):
    write_captions(
        tmp_path, "a", ["Spindle cells.", "Spindle cells. Fat."] + [""] * 83 + ["Glands."]
    )
    out = script("text.py", tmp_path, "--bags", "1", check=True).stdout
    assert "3 captions, 3 keywords" in out
    assert "a-00: 2 captions, 2 keywords\n  spindle cell (2), fat (1)" in out
    assert "a-01" not in out
    (tmp_path / "bags-a.captions.jsonl").write_text("[1]\n")
    for folder in (tmp_path, tmp_path / "nowhere"):
        bad = script("text.py", folder)
        assert bad.returncode == 1
        assert bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


def test_every_fact_of_the_built_in_world_survives_as_a_keyword():
    for name in (*world.FAMILIES, *world.ALL_DIAGNOSES):
        for words in world.WORDS.get(name, (name,)):
            assert text.keywords(f"The image primarily showcases {words}."), words


def test_boilerplate_of_the_built_in_world_does_not():
    for form in (*world.SENTENCES["opener"], *world.SENTENCES["guess"]):
        assert text.keywords(form.format("chordoma")) == ["chordoma"], form


def test_bpe_learns_the_most_frequent_pairs():
    """By hand: "low" x 5, "lowest" x 2 hold the pair l-o 7 times, o-w</w> only 5 times."""
    t = text.Tokenizer.train(["low low low low low lowest lowest"], 512 + 3 + 3)
    assert t.merges[0] == ("l", "o") and t.merges[1] == ("lo", "w</w>") and len(t.merges) == 3
    assert len(t.encode("low")) == 1


def test_incremental_bpe_equals_brute_force():
    corpus = ["the gland and the glands of a glandular nest", "nests nest nested in the gland aaaa"]
    fast = text.Tokenizer.train(corpus, 512 + 15 + 3).merges
    byte = text.BYTE
    words = Counter(w for line in corpus for w in text.SPLIT.findall(line))
    split = {w: [byte[b] for b in w.encode()][:-1] + [byte[w.encode()[-1]] + "</w>"] for w in words}
    slow = []
    while len(slow) < 15:
        count = Counter()
        for w, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                count[pair] += words[w]
        best = max(count, key=lambda p: (count[p], p))
        if count[best] < 2:
            break
        slow.append(best)
        split = {w: text._merge(parts, best) for w, parts in split.items()}
    assert fast == slow


@pytest.mark.parametrize(
    "line", ["papillary fronds, ca. 12 µm", "naïve “quotes” — 100%", "Größe 3×4", "日本 glands"]
)
def test_round_trip(line, tmp_path):
    t = text.Tokenizer.train([line, "papillary fronds and glands"] * 3, 600)
    (tmp_path / "t.json").write_text(t.to_json(), encoding="utf-8")
    assert text.Tokenizer.load(tmp_path / "t.json").encode(line) == t.encode(line)
    assert t.decode(t.encode(line)).replace(" ", "") == line.lower().replace(" ", "").replace(
        "“", '"'
    ).replace("”", '"')


def test_words_are_cut_as_open_clip_cuts_them():
    """clip_words.json holds odd strings and the words that open_clip 3.3 makes of them."""
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
    assert t.encode("the in") == [
        512 + 3,
        t.id["i"],
        t.id["n</w>"],
    ]  # "in" ends a word: "i n" does not apply
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "merges": [m.split() for m in merges]}})
    )
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


@pytest.mark.parametrize(
    "content", ["{broken", "[]", '{"merges": 1}', '{"merges": [["a"]]}', '{"merges": [["a", 1]]}']
)
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="t.json is no tokenizer of ours: give"):
        text.Tokenizer.load(tmp_path / "t.json")
