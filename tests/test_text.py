"""pytest tests/test_text.py — keywords on sentences read by eye, textual bags worked out by hand, captions imported."""
import io
import json
import math
import tarfile

import pytest
from conftest import script

import synthetic
import text


@pytest.mark.parametrize("caption,expected", [
    ("The image shows tubular glands in a fibrous stroma, without necrosis.", ["tubular gland", "fibrous stroma"]),
    ("There is no evidence of malignancy. Lymphocytes are present.", ["lymphocyte"]),
    ("This photomicrograph shows atypical nuclei but no mitoses", ["atypical nucleus"]),
    ("The findings are consistent with hepatocellular carcinoma.", ["hepatocellular carcinoma"]),
    ("Glands and glands, and more glands.", ["gland"]),
    ("The image primarily showcases a region of interest.", []),
    ("There is evidence of necrosis. The main feature is a lymph node. These findings point to melanoma.", ["necrosis", "lymph node", "melanoma"]),
    ("Tumour tissue of medium-sized and irregular ducts.", ["tumour tissue", "irregular duct"]),
    ("Ducts are large, and cells are highly variable in size.", ["duct"]),
    ("Malignant cells infiltrating the stroma; dense lymphocytic infiltrates.", ["malignant cell", "stroma", "dense lymphocytic infiltrate"]),
    ("Ductal carcinoma in situ of the breast, Crohn\u2019s disease", ["ductal carcinoma in situ", "breast", "crohn disease"]),
    ("A tumour of 3.5 cm, 12 \u00b5m nuclei at 40x, pT2 G3, grade II/III, 20% CD20-positive B cells, Ki-67", ["tumour", "nucleus", "cd20-positive b cell", "ki-67"]),
    ("Clinical correlation is advised. It is important to consult a pathologist. Malignancy cannot be excluded.", []),
    ("It is important to note that the tumor shows necrosis and cribriform glands.", ["tumor", "necrosis", "cribriform gland"]),
    ("Poorly differentiated non small cell lung carcinoma, clear cell renal cell carcinoma", ["non-small cell lung carcinoma", "renal cell carcinoma"]),
    ("Sclerosed glomeruli, the pancreas, hyphae, keratoses", ["sclerosed glomerulus", "pancreas", "hypha", "keratosis"]),
    ("<p>Dense <b>stroma</b> &amp; fat&nbsp;cells</p> https://example.org/a.html \ufb01brous bands of 2 mm\u00b2", ["dense stroma", "fat cell", "fibrous band"]),
    ("", []), (None, []),
])
def test_keywords(caption, expected):
    assert text.keywords(caption) == expected


@pytest.mark.parametrize("caption,expected", [
    ("No atypia, necrosis, and mitoses are seen. The stroma is loose myxoid.", ["stroma", "loose myxoid"]),
    ("Glands without atypia, necrosis, or mitoses, and a fibrous stroma is present.", ["gland", "fibrous stroma"]),
    ("There is no atypia, and the stroma shows fibrosis.", ["stroma", "fibrosis"]),
    ("Mitotic figures are not identified, necrosis is absent, invasion was never seen, and glands are seen.", ["gland"]),
    ("No urothelium is identified, and non-dysplastic squamous epithelium is present.", ["non-dysplastic squamous epithelium"]),
    ("Sheets without structure, dense fibrous stroma and fat.", ["sheet", "dense fibrous stroma", "fat"]),
    ("Not only glands but also nests.", ["gland", "nest"]),
    ("Nests rather than glands; her2-negative carcinoma.", ["nest", "her2-negative carcinoma"]),
    ("Mitoses aren't seen. Nests of cells, compared with a nest of basal cell carcinoma.", ["nest"]),
    ("Neither necrosis nor mitoses are seen in the nests.", []),
    ("Absence of necrosis, mitoses, and atypia. Glands with no intervening stroma, with foamy macrophages.", ["gland", "foamy macrophage"]),
    ("The image does not show any signs of necrosis, mitosis, or atypia.", []),
    ("Necrosis, hemorrhage, and vascular invasion are not identified. Atypia (mild) is entirely absent.", []),
    ("- **Necrosis:** None observed\n- Nuclei: vesicular nuclei\n2. Mitoses: 0\nCK20 (-), goblet cells", ["nucleus", "vesicular nucleus", "goblet cell"]),
    ("Invasion not identified. Metastases have not been seen, melanoma was ruled out, mitoses do not appear. Fat.", ["fat"]),
    ("None of the glands are dysplastic. It fails to show granulomas, w/o necrosis or mitoses; r/o lymphoma.", []),
    ("There is no evidence of\nnecrosis or E. coli infection.\n\nNests of cells.", ["nest"]),
    ("There is no necrosis and the glands are cribriform.", ["gland", "cribriform"]),
])
def test_denied_findings_are_no_keywords(caption, expected):
    assert text.keywords(caption) == expected


@pytest.mark.parametrize("one,other", [("signet-ring cell", "signet ring cell"), ("tumour oedema", "tumor edema"), ("fibre", "fiber"),
                                       ("fibrous stroma", "stroma fibrous"), ("haemorrhage", "hemorrhage"), ("non-neoplastic", "nonneoplastic")])
def test_same(one, other):
    assert (text.same(one) == text.same(other)) == (one != "non-neoplastic")


def test_keyword_bag_counts_captions_and_keeps_owners():
    captions = ["solid nests. spindle cells.", "spindle-cells.", None, "spindle cells, spindle cells. mature fat."]
    bag = text.keyword_bag(captions, 2)
    assert bag == ["spindle cell", "solid nest"]
    assert text.keyword_owners(captions, bag).tolist() == [[True, True], [True, False], [False, False], [True, False]]


def test_keyword_bag_ranks_by_what_is_special_to_the_bag():
    """By hand, a bag of 4 captions in a corpus of 40: folds are named by 3 of 4 where 3 were to be expected, nests by 2 where 0.4 were."""
    captions = ["tissue fold. nests.", "tissue fold. nests.", "tissue fold. chordoma.", "glands."]
    corpus = {"captions": 40, "count": {"fold tissue": 30, "nest": 4, "gland": 20}}      # nobody counted the chordoma: as if named once
    assert text.keyword_bag(captions) == ["tissue fold", "nest", "chordoma", "gland"]
    score = {"nest": 2 * math.log(1 + 2 / 0.4), "chordoma": math.log(1 + 1 / 0.1), "tissue fold": 3 * math.log(2), "gland": math.log(1 + 1 / 2)}
    assert text.keyword_bag(captions, 128, corpus) == sorted(score, key=score.get, reverse=True) == ["nest", "chordoma", "tissue fold", "gland"]
    assert text.keyword_bag([None, ""], 5, corpus) == []


def test_a_long_caption_takes_no_time():
    for caption in ("a" * 200_000, "the " * 50_000, "glands, " * 20_000, "and the " * 20_000):
        text.keywords(caption)


def write_captions(folder, name, captions):
    rows = [{"key": f"{name}-{i // 85}", "node": i % 85, "caption": c} for i, c in enumerate(captions)]
    (folder / f"bags-{name}.captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_count_corpus_is_kept_and_made_anew(tmp_path):
    with pytest.raises(ValueError, match="holds no bags-.*captions.jsonl"):
        text.count_corpus(tmp_path)
    write_captions(tmp_path, "000000", ["Tumour nests.", "No nests. A tumor nest.", "", None])
    write_captions(tmp_path, "000001", ["Glands."] * 2)
    corpus = text.count_corpus(tmp_path)
    assert (corpus["captions"], corpus["count"]) == (4, {"gland": 2, "nest tumor": 2})
    assert text.count_corpus(tmp_path) == corpus == json.loads((tmp_path / "keywords.json").read_text())
    write_captions(tmp_path, "000001", ["Glands."] * 3 + ["Papillae."])
    assert text.count_corpus(tmp_path)["count"] == {"gland": 3, "nest tumor": 2, "papilla": 1}
    (tmp_path / "keywords.json").write_text("{damaged")
    assert text.count_corpus(tmp_path)["captions"] == 6
    (tmp_path / "keywords.json").unlink()
    assert text.count_corpus(tmp_path, most=1)["count"] == {"gland": 3, "nest tumor": 2}     # the singly named one made room


def test_keywords_command(tmp_path):
    write_captions(tmp_path, "000000", ["Spindle cells.", "Spindle cells. Fat."] + [""] * 83 + ["Glands."])
    command = ["text.py", "keywords", tmp_path, "--bags", "1"]
    out = script(*command, check=True).stdout
    assert "3 captions, 3 keywords" in out and "000000-0: 2 captions, 2 keywords\n  spindle cell (2), fat (1)" in out and "000000-1" not in out
    (tmp_path / "bags-000000.captions.jsonl").write_text("[1]\n")
    bad = script(*command)
    assert bad.returncode == 1 and "bags-000000.captions.jsonl:1: " in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.parametrize("payload,words", [
    ('{"slide": "a.tif", "words": "fat"}', 'expected "key", "slide" or "image".*not slide, words'), ('{"slide": ', "x.jsonl:1: not JSON"),
    ('{"slide": "a.tif", "caption": "x", "node": 1.7}', 'x.jsonl:1: expected'), ('{"slide": "a.tif", "caption": "x", "node": Infinity}', "x.jsonl:1: expected"),
    ("[1]", "x.jsonl:1: expected"), ('{"slide": "a.tif", "caption": "x", "node": 5}', "the first 'a.tif' .a node, 0 to 84, goes with a bag"), ("", "has no caption for 1 bags")])
def test_captions_that_cannot_be_imported_are_one_sentence(payload, words, tmp_path):
    one_bag(tmp_path)
    (tmp_path / "x.jsonl").write_text(payload)
    with pytest.raises(ValueError, match=words):
        text.import_captions(tmp_path / "x.jsonl", tmp_path)


def test_odd_but_whole_captions_are_imported(tmp_path):
    one_bag(tmp_path)
    (tmp_path / "x.csv").write_text('slide,caption\na.tif,"fat\nand nests"\n')
    text.import_captions(tmp_path / "x.csv", tmp_path)
    assert '"fat\\nand nests"' in (tmp_path / "bags-000000.captions.jsonl").read_text()
    (tmp_path / "x.jsonl").write_text('{"slide": "a.tif", "caption": "fat \\ud83d\u2028nests"}')           # half an emoji, an odd line end
    text.import_captions(tmp_path / "x.jsonl", tmp_path)
    assert "fat ?\u2028nests" in (tmp_path / "bags-000000.captions.jsonl").read_text(encoding="utf-8")
    (tmp_path / "bags-000000.tar").write_bytes((tmp_path / "bags-000000.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="bags-000000.tar is truncated or no shard"):
        text.import_captions(tmp_path / "x.jsonl", tmp_path)


def test_every_fact_of_the_built_in_world_survives_as_a_keyword():
    for name in (*synthetic.ARCHITECTURES, *synthetic.CYTOLOGIES, *synthetic.ALL_DIAGNOSES):
        for words in synthetic.WORDS.get(name, (name,)):
            assert text.keywords(f"The image primarily showcases {words}."), words


def test_boilerplate_of_the_built_in_world_does_not():
    for form in (*synthetic.OPENERS, *synthetic.GUESSES):
        assert text.keywords(form.format("chordoma")) == ["chordoma"], form


def one_bag(folder):
    with tarfile.open(folder / "bags-000000.tar", "w") as tar:
        for name, payload in (("k-0.jpg", b"x"), ("k-0.json", json.dumps({"slide": "a.tif"}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def test_import_one_caption_per_slide(tmp_path):
    one_bag(tmp_path)
    source = tmp_path / "slides.jsonl"
    source.write_text('{"slide": "b.tif", "caption": "fat"}\n')
    with pytest.raises(ValueError, match="slides.jsonl has no caption for 1 bags of 1 slides .a.tif.*; 1 of its lines fit no bag, the first 'b.tif'"):
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
