"""Words: captions of patches, the keywords in them, and the files that hold both.

A patch has a caption; the captions of a bag's 85 patches give one *textual bag* of keywords, against which CVTA
(losses.py) aligns every patch. The paper does not say what a keyword is; its figure shows short noun phrases shared by
all four magnifications ("lymph node", "round nuclei"), and that is what `keywords` extracts.

Read in this order: keywords -> keyword_bag -> count_corpus -> caption files -> the command line.

    python text.py caption SHARDS --endpoint URL --model M # every patch described by a served model (captioner.py)
    python text.py import captions.jsonl --shards SHARDS   # captions per slide, bag or image -> a caption line for every node
    python text.py keywords SHARDS                         # count the corpus; print textual bags, to read with your own eyes

Beside it: tokenizer.py (text to numbers), prompts.py (the names of classes), captioner.py (the client of a served model).

References: [1] MR-PLIP, CVPR 2025, section 3.2 (textual bags).   [2] Chapman et al. 2001, "A simple algorithm for identifying
negated findings" (NegEx): denials are found by trigger phrases and reach to the end of their clause or list.
"""
import argparse
import csv
import functools
import html
import io
import json
import math
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import captioner
from data import read_jsonl, replace_file
from tokenizer import Tokenizer, trim  # noqa: F401  (the other scripts say text.Tokenizer)

# ----------------------------------------------------------------------------------------------------------------------
# Keywords [1]: runs of content words between stop words. No tagger and no dictionary of medicine: what is not known to say
# nothing may say something.

# Words that end a run: grammar, the captioner's own phrases ("The image primarily showcases ..."), hedges, verbs, measures.
STOP_WORDS = frozenset("""
a an the this that these those its it they them their there here which who whose what where when while as also and or but
nor if then than so such both either each every all any some most more less few several many much other another same own only
of in on at by for from to into onto with within between among amongst along across over under around about through
throughout near next against toward towards up down out off per via together due because
like beneath above below upward downward even once actually best time times apparent typical mid still already
is are was were be been being am has have had having do does did can could may might must shall should will would
no not without very quite rather somewhat mainly mostly primarily predominantly largely overall generally typically often
usually possibly probably likely potentially commonly approximately appear appears appearing appearance seem seems
we i you he she one two three four five six

image images photomicrograph photomicrographs micrograph micrographs picture photo photograph field fields view views
slide slides section sections specimen sample region regions area areas patch patches part parts histopathology histopathological
histology histologic histological microscopic microscopically microscopy magnification power resolution panel inset arrow arrows
arrowhead arrowheads circle circled scale bar top bottom left right upper lower middle corner
show shows showing shown showcase showcases showcasing display displays displaying displayed demonstrate demonstrates demonstrating
reveal reveals revealing depict depicts depicting illustrate illustrates exhibit exhibits exhibiting contain contains
containing include includes including feature features featuring characterize characterized characterise characterised
characteristic characteristics describe described see sees seen observe observed observing note noted identify identified present
presence visible evident evidence notable found highlight highlights highlighted indicate indicates indicating indicative
arrange arranged arrangement set composed comprise comprises consist consists consisting made form forms forming formed
involve involves involving invade invades invading proliferate proliferates grow grows growing extend extends
extending surround surrounds separate separates separated line lines fill fills filling cause causes causing lead leads constitute constitutes
equal least largest whole according develop develops developing replace replaces overlie overlies flank flanks dissolve dissolves appreciated site compare
suggest suggests suggesting suggestive reminiscent consistent compatible diagnosis diagnostic represent represents point points
finding findings impression favour favours favor favors case cases pattern patterns manner main key prominently interest
h e haematoxylin hematoxylin eosin stain stains stained staining

mm cm um µm μm nm mpp micron microns micrometer micrometers millimeter millimeters centimeter centimeters dimension hpf hpfs percent
measure measures measured measuring mm2 cm2 mm3

provide provides provided offer offers insight insights sure pathologist pathologists examine assess evaluate evaluation confirm further used
educational human quality analysis figure courtesy history suspicious concern concerning purposes none nothing hardly
""".split())

# Words that say something only beside others: "medium-sized ducts" is a finding, "medium-sized" is none.
LONE_WORDS = frozenset("""
large small medium sized size big high low higher increased decreased abundant scant scattered dense loose mild moderate severe
marked prominent extensive focal diffuse multiple numerous single occasional minimal substantial strong limited irregular regular round
oval elongated enlarged uniform variable variability variation varying various different similar normal abnormal rare scarce infrequent inconspicuous intact positive
pink purple blue brown dark pale light white red clear bright thin thick ragged color colour background well poor highly slightly partial superficial deep
cell tissue structure shape shaped type kind group grade degree level amount number distribution rate component population element
invasive infiltrate infiltrating proliferating proliferative aligned associated located attached adjacent fused disrupted classified classification
total percentage index
""".split())

# A word that is a measure or a number and not a finding: "20", "40x", "pt2", "g3", "ii/iii", "n83-8950". A marker (cd20, p53, ki-67) is one.
MEASURE = re.compile(r"x?\d.*|(?:p?[tnm]|g)\d[a-d]?|[ivx]+(?:/[ivx]+)*|[a-z]*\d+-\d+|[a-z]*\d{4,}")
VERBAL = re.compile(r"infiltrating|proliferating|\w{3,}(?<!e)(?<!differentiat)ed")           # behind a noun a verb, before it an adjective
WORD = re.compile(r"in situ\b|[^\W_]+(?:[/-][^\W_]+)*")

# How captions are written, made one: (what is found, what stands for it), in this order.
TIDY = [(re.compile(found), put) for found, put in (
    (r"</?(?:p|br|li|ul|ol|div|h\d)\b[^>]{0,200}>", ". "), (r"https?://\S+", ", "), (r"<[a-z/][^>]{0,200}>|[*`#]+", " "),             # HTML, links, markdown
    (r"['\u2019]s\b", ""), (r"\bnon (?=\w)", "non-"), (r"\bw/o\b", "without"), (r"\bw/", "with "), (r"\br/o\b", "rule out"), (r"\bneg for\b", "negative for"),
    (r"\b(?:it is|it's) (?:important|worth|crucial) (?:to )?(?:note|noting|mention|mentioning)(?: that)?\b", " "),
    (r"\b([a-z])\. (?=[a-z])|\b(e\.g|i\.e|vs|cf|ca)\.", r"\1 "),                     # a dot that ends no sentence: "e. coli"
    # Necrosis: absent. Necrosis - none. CK20 (-). Mitoses: 0.
    (r"(?:^|(?<=[.;,()\n]))[^.;:,()\n]*(?:(?::|\s[-\u2013])\s*(?:no|none|nil|absent|negative|not|0)\b[^.;\n]*|\(\s*(?:[-\u2013]|none|absent|negative)\s*\))", " "))]

SENTENCE = re.compile(r"[.;:!?\n](?!\d)|\b(?:but|although|though|however|while|whereas|except)\b"
                      r"|\band (?=there (?:is|are)\b|the [\w -]{1,60}? (?:is|are|has|have|shows?|contains?)\b)")
SEGMENT = re.compile(r"[,()\[\]&]")

# What a captioner says about itself, not about the picture: such a sentence is passed over.
REMARK = re.compile(r"\bcorrelat\w+ (?:is|are|with clinical)\b|\bclinical(?:ly)? correlat|\b(?:is|are) (?:advised|recommended)\b|\bimportant to \w+|\bconsult\b"
                    r"|\b(?:cannot|can not|could not) be (?:excluded|ruled|determined)|\bplease\b|\bas an ai\b|\badditional (?:information|context)")

# Denials [2]: from here to the end of the clause nothing is seen ("no evidence of necrosis") ...
DENIAL = re.compile(r"\b(?:no|none|nothing|not(?! only| just)|without|absence of|absent|negative for|lack of|lacks?|lacking|(?:free|void|devoid|clear) (?:of|from)|neither|never|nor"
                    r"|hardly|little if|fail(?:s|ed)? to|rather than|instead of|in contrast to|compared? (?:this )?(?:with|to)|unlike|similar to|mimic(?:s|king)?"
                    r"|differentiat\w+ (?:\w+ )?from|rul(?:es?|ing) out|exclud(?:es?|ing)|if)\b")
# ... or the clause says that its subject is not ("mitoses are not identified").
DENIED = re.compile(r"\b(?:is|are|was|were|be|been|can|could|has|have|had|do|does|did|appears?|seems?|remains?)\s?(?:(?:\w+ly|also|to be|been)\s)*"
                    r"(?:not(?! only| just)\b|absent\b|lacking\b|never\b|excluded\b|ruled out\b)|n['\u2019]t\b|\bunlikely\b"
                    r"|(?:\babsent|\bnegative|\bexcluded|\bnot (?:identified|seen|present|found|detected|observed|noted))\s*$")
VERB = re.compile(r"\b(?:is|are|was|were|has|have|shows?|appears?|seen|present|identified|observed|noted|found)\b")
LAST = re.compile(r"^\s*and\b|\b(?:or|nor)\b")                                       # the last item of a list

IRREGULAR = {"nuclei": "nucleus", "nucleoli": "nucleolus", "glomeruli": "glomerulus", "nevi": "nevus", "emboli": "embolus", "lumina": "lumen",
             "lumens": "lumen", "septa": "septum", "mitoses": "mitosis", "metastases": "metastasis", "villi": "villus",
             "acini": "acinus", "alveoli": "alveolus", "bronchi": "bronchus", "carcinomata": "carcinoma", "stromata": "stroma",
             "foci": "focus", "calculi": "calculus", "thrombi": "thrombus", "bacilli": "bacillus", "fungi": "fungus", "ganglia": "ganglion",
             "sinuses": "sinus", "matrices": "matrix"} | {w: w for w in "pancreas lens pons herpes diabetes ascites langerhans series species facies".split()}


def singular(word):
    """Naive plural folding, so that "glands" and "gland" are one keyword: an identical meaning must not be both a
    positive and a negative of CVTA."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 6 and word.endswith("oses"):
        return word[:-2] + "is"
    if len(word) > 4 and word.endswith("ae"):
        return word[:-1]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@functools.lru_cache(maxsize=200_000)
def same(keyword):
    """What two spellings of one keyword have in common: words in any order, hyphens and British letters folded. Not to be read:
    "signet-ring cell" and "signet ring cell" -> "cell ring signet"; "tumour oedema" -> "edema tumor"."""
    keyword = re.sub(r"our(?=s?\b)", "or", keyword.replace("-", " ").replace("ae", "e").replace("oe", "e").replace("isation", "ization"))
    return " ".join(sorted(re.sub(r"([bt])re\b", r"\1er", keyword).split()))


def _opens(parts):
    """Does a denied list go on in these parts: does one begin with "and" or hold an "or" before one has a verb? -> "list" or ""."""
    last = next((p for p in parts if VERB.search(p) or LAST.search(p)), "")
    return "list" if LAST.search(last) and not VERB.search(last) else ""


def _affirmed(sentence):
    """The parts of a sentence, cut at commas and brackets, that its speaker affirms: list of str. A denial takes its list along, before it
    ("atypia, necrosis, and mitoses are absent") and behind it. Behind it there are two kinds: the "list" ends with its last item ("without
    atypia, necrosis, or mitoses, in a fibrous stroma"), and the "subject" of the sentence with its verb ("No atypia, necrosis, and mitoses are seen")."""
    parts, told, denied = SEGMENT.split(sentence), [], ""
    for i, part in enumerate(parts):
        if denied and not VERB.search(part):
            denied = "" if denied == "list" and LAST.search(part) else denied
            continue
        if denied == "subject":                           # here is its verb
            denied = ""
            continue
        denied, ahead = "", parts[i + 1 : i + 20]         # no longer list is looked for
        if found := DENIED.search(part):
            before = part[: found.start()]
            while told and not VERB.search(told[-1]) and (not before.strip() or re.search(r"\b(?:and|or)\b", before)):
                told.pop()
            denied = _opens(ahead)
        elif found := DENIAL.search(part):
            told.append(part[: found.start()])
            if not VERB.search(part[found.end() :]):
                denied = "subject" if not told[-1].strip() and found[0] in ("no", "neither", "none") else _opens(ahead)
        else:
            told.append(part)
    return told


@functools.lru_cache(maxsize=200_000)
def _keywords(caption, longest):
    caption = re.sub(r"\n(?=[a-z])", " ", unicodedata.normalize("NFKC", html.unescape(caption))).lower()                # a line only wrapped
    found = {}                                            # a dict keeps the order of first mention
    for pattern, put in TIDY:
        caption = pattern.sub(put, caption)
    for sentence in SENTENCE.split(caption):
        for part in () if REMARK.search(sentence) else _affirmed(sentence):
            run = []
            for word in [*WORD.findall(part), ""]:        # "" closes the last run
                if word and word not in STOP_WORDS and not MEASURE.fullmatch(word):
                    run.append(singular(word))
                    continue
                while run and VERBAL.fullmatch(run[-1]):
                    run.pop()
                cut = run[-longest:]                      # English puts the head of a noun phrase last
                phrase = " ".join(cut[1:] if len(cut) < len(run) and cut[0] == "cell" else cut)      # clear | cell renal cell carcinoma
                words = re.split("[ -]", phrase)          # "clear cell" says something, "clear" and "cell" and "clear structure" do not
                if len(phrase) > 2 and (words[1:] and words[-1] == "cell" or not all(w in LONE_WORDS or w.endswith("ly") for w in words)):
                    found.setdefault(same(phrase), phrase)
                run = []
    return tuple(found.values())


def keywords(caption, longest=4):
    """The noun-phrase-like keywords of one caption: list of distinct lower-case phrases of 1..`longest` words, in order
    of mention, plurals folded; denied findings, measures and remarks dropped.

    >>> keywords("The image shows tubular glands in a fibrous stroma, without necrosis.")
    ['tubular gland', 'fibrous stroma']
    """
    return list(_keywords(caption or "", longest))


def keyword_bag(captions, size=128, corpus=None):
    """The textual bag of one visual bag: captions (list of str or None, one per node) -> at most `size` keywords, of which no two
    are the `same`. Deterministic.

    Without a corpus the keywords that most captions name come first. With one (`count_corpus`), those that tell this bag from
    others: named by n captions where n' were to be expected, a keyword scores n ln(1 + n / n'). What every bag says of itself
    (a fold, a vessel, poor focus) then ranks behind what is said here. Ties in order of first mention."""
    count, first, told = Counter(), {}, 0
    for caption in captions:
        found = keywords(caption)
        told += caption is not None and caption != ""
        for k in found:
            first.setdefault(same(k), k)
        count.update(map(same, found))
    score = count
    if corpus:
        expect = told / max(1, corpus["captions"])        # a keyword the corpus no longer knows was named once
        score = {s: n * math.log1p(n / (expect * corpus["count"].get(s, 1))) for s, n in count.items()}
    return [first[s] for s in sorted(count, key=lambda s: -score[s])[:size]]


def keyword_owners(captions, bag):
    """Which node's own caption names which keyword: bool[len(captions), len(bag)]. The warm-up of CVTA trusts it."""
    column = {same(k): i for i, k in enumerate(bag)}
    own = np.zeros((len(captions), len(bag)), bool)
    for n, caption in enumerate(captions):
        own[n, [column[s] for s in map(same, keywords(caption)) if s in column]] = True
    return own


def _caption_lines(file):
    """Yield (key, caption or None) of bags-*.captions.jsonl."""
    for i, _, row in read_jsonl(file):
        try:
            key, caption = row["key"], row["caption"]
            if not isinstance(key, str) or not isinstance(caption, str | None):
                raise TypeError
        except (KeyError, TypeError):
            raise ValueError(f'{file}:{i}: expected {{"key": ..., "node": ..., "caption": "..."}}: mend or delete this line') from None
        yield key, caption


def count_corpus(folder, most=1_000_000):
    """How often each keyword is named in a folder of shards: {"captions": number of captions, "count": {same(keyword): captions that
    name it}, "common": the 4,096 most frequent as they were first written}. One pass over bags-*.captions.jsonl, kept as `keywords.json` beside them and made anew when a caption file or this file changed.

    Where there are more than `most` keywords, those named once are forgotten on the way. ValueError where there are no captions."""
    files, path = sorted(Path(folder).glob("bags-*.captions.jsonl")), Path(folder) / "keywords.json"
    if not files:
        raise ValueError(f"{folder} holds no bags-*.captions.jsonl: caption the shards first (`python text.py import ... --shards {folder}`)")
    stamp = [zlib.crc32(Path(__file__).read_bytes()), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]
    try:
        corpus = json.loads(path.read_text())
        if corpus["stamp"] == stamp:
            return corpus
    except (OSError, ValueError, KeyError, TypeError):    # none yet, or a damaged one
        pass
    corpus, count, first = {"stamp": stamp, "captions": 0, "count": {}, "common": []}, Counter(), {}
    for file in tqdm(files, desc="keywords", unit="shard", disable=None, leave=False):
        for _, caption in _caption_lines(file):
            corpus["captions"] += bool(caption)
            for k in keywords(caption):
                first.setdefault(s := same(k), k)
                count[s] += 1
        if len(count) > most:
            count = Counter({s: n for s, n in count.items() if n > 1})
            first = {s: first[s] for s in count}
    if not corpus["captions"]:
        raise ValueError(f"{folder}/bags-*.captions.jsonl hold no caption: make them again (`python text.py caption` or `import`)")
    corpus["count"], corpus["common"] = dict(sorted(count.items())), [first[s] for s, _ in count.most_common(4096)]
    try:
        replace_file(path, json.dumps(corpus, ensure_ascii=False))
    except OSError:                                       # a folder that is only to be read
        pass
    return corpus


# ----------------------------------------------------------------------------------------------------------------------

CAPTION_COLUMNS = ("caption", "Answer", "title_en", "organ_en", "note")                  # joined where there are several


def _read_captions(source):
    """Yield (name, node or None, caption) of a JSON-lines file, a CSV with a heading, or a folder of JSON files, one per image, as the
    authors' release writes them ({"Image", "Answer", ...}). ValueError names file and line."""
    def read(file):
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not text in UTF-8: save it so, or leave it out") from None

    def row(where, r):
        try:
            r = json.loads(r) if isinstance(r, str) else r
        except ValueError as e:
            raise ValueError(f"{where}: not JSON ({e}): mend or delete this line") from None
        try:
            if not any(k in r for k in CAPTION_COLUMNS):
                raise KeyError
            parts = [r.get(k) or "" for k in CAPTION_COLUMNS]
            name = next(r[k] for k in ("key", "slide", "Image", "image", "file") if r.get(k))
            node = r.get("node")
            if node not in (None, "") and type(node) is not int and not str(node).strip().isdigit():
                raise ValueError
            caption = ". ".join(p.strip().rstrip(".") for p in parts if p.strip())
            return Path(name).name, int(node) if node not in (None, "") else None, caption.encode("utf-8", "replace").decode()
        except (StopIteration, ValueError, KeyError, TypeError, AttributeError):
            there = f", not {', '.join(map(str, r))}" if isinstance(r, dict) else ""
            raise ValueError(f'{where}: expected "key", "slide" or "image", a "caption", and perhaps a "node"{there}') from None

    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ValueError(f"{path} holds no *.json, one per image: give such a folder, or a CSV or JSON-lines file")
        yield from (row(file, read(file)) for file in files)
    elif path.suffix.lower() == ".csv":
        yield from (row(f"{path}:{i}", r) for i, r in enumerate(csv.DictReader(io.StringIO(read(path), newline="")), 2))
    else:
        yield from (row(f"{path}:{i}", line) for i, line in enumerate(read(path).split("\n"), 1) if line.strip())


def import_captions(source, shards):
    """Captions made elsewhere -> bags-*.captions.jsonl beside the shards; returns how many shards.

    source: see `_read_captions`. A name is that of a bag (its key), of an image of one node (`KEY_NODE.png`), or of a slide. What is
    said of a node counts first, then what is said of its bag, then of its slide; the last two are told of every node and marked
    `"source": "bag"` or `"slide"`. ValueError where a bag has no caption at all; nothing is written then."""
    files = sorted(Path(shards).glob("bags-*.tar"))
    if not files:
        raise ValueError(f"{shards} holds no bags-*.tar: make them with `python data.py tile SLIDES --out {shards}`")
    bags = {f: [(key, meta["slide"]) for key, meta in captioner.bag_metas(f).items()] for f in files}
    keys = {key for pairs in bags.values() for key, _ in pairs}
    slides = {name: slide for pairs in bags.values() for _, slide in pairs for name in (Path(slide).stem, slide)}
    captions, strangers = {}, []
    for name, node, caption in _read_captions(source):
        image = re.fullmatch(r"(.+)_(\d+)", Path(name).stem)
        if image and image[1] in keys and node is None:
            name, node = image[1], int(image[2])
        said, name = name, name if name in keys else slides.get(name) or (Path(name).stem if Path(name).stem in keys else None)
        if name is None or node is not None and not (name in keys and 0 <= node < 85):
            strangers.append(said)
        elif caption:
            captions[name, node] = caption
    lacking = [slide for pairs in bags.values() for key, slide in pairs
               if not ((key, None) in captions or (slide, None) in captions or any((key, n) in captions for n in range(85)))]
    left_out = f"{len(strangers)} of its lines fit no bag, the first {strangers[0]!r} (a node, 0 to 84, goes with a bag)" if strangers else ""
    if lacking:
        raise ValueError(f"{source} has no caption for {len(lacking)} bags of {len(set(lacking))} slides ({', '.join(sorted(set(lacking))[:3])}): add a line for each"
                         + (f"; {left_out}" if left_out else ""))
    for out in (out for file in bags if (out := file.with_suffix(".captions.jsonl")).exists()):
        with open(out, encoding="utf-8") as f:
            if '"model"' in f.readline():
                raise ValueError(f"{out} holds captions that a model was asked for: move it away first, they were dear")
    if left_out:
        print(f"{source}: {left_out}", file=sys.stderr)
    for file, pairs in tqdm(bags.items(), desc="captions", unit="shard"):
        lines = []
        for key, slide in pairs:
            for n in range(85):
                named = [("image", (key, n)), ("bag", (key, None)), ("slide", (slide, None))]
                if kind := next((kind for kind, name in named if name in captions), None):
                    lines.append(json.dumps({"key": key, "node": n, "caption": captions[dict(named)[kind]], "source": kind}, ensure_ascii=False))
        replace_file(file.with_suffix(".captions.jsonl"), "\n".join(lines) + "\n")
    return len(files)


def print_keywords(shards, bags, size):
    """Count the corpus, then print the textual bag of the first `bags` bags: each keyword with the number of captions that name it."""
    corpus, shown = count_corpus(shards), 0
    print(f"{corpus['captions']:,} captions, {len(corpus['count']):,} keywords: {shards}/keywords.json")
    for file in sorted(Path(shards).glob("bags-*.captions.jsonl")):
        rows = defaultdict(list)
        for key, caption in _caption_lines(file):
            rows[key].append(caption)
        for key, captions in rows.items():
            if shown == bags:
                return
            words = keyword_bag(captions, size, corpus)
            own = keyword_owners(captions, words).sum(0)
            print(f"{key}: {sum(map(bool, captions))} captions, {len(words)} keywords\n  " + ", ".join(f"{w} ({n})" for w, n in zip(words, own)))
            shown += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    k = commands.add_parser("keywords", help="print the textual bags of a folder of shards")
    k.add_argument("shards")
    k.add_argument("--bags", type=int, default=3, help="how many (3)")
    k.add_argument("--size", type=int, default=128, help="keywords per bag at most (128)")
    c = commands.add_parser("caption", help="ask a served vision-language model about every patch (captioner.py)")
    c.add_argument("shards", help="folder of bags-*.tar")
    c.add_argument("--endpoint", required=True, metavar="URL", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    c.add_argument("--model", required=True, help="its name there")
    c.add_argument("--prompt", default=captioner.PROMPT, help="the question (%(default)r)")
    c.add_argument("--levels", default="5,10,20,40", help="magnifications to caption (%(default)s)")
    c.add_argument("--concurrency", type=int, default=32, help="questions at a time (%(default)s)")
    c.add_argument("--max-tokens", type=int, default=256, help="longest answer (%(default)s)")
    c.add_argument("--timeout", type=float, default=120, help="seconds to wait for an answer (%(default)s)")
    i = commands.add_parser("import", help="captions made elsewhere -> captions of all nodes")
    i.add_argument("source", help="JSON lines or CSV of key, slide or image, and caption; or a folder of JSON files, one per image")
    i.add_argument("--shards", required=True, help="folder of bags-*.tar")
    args = parser.parse_args()
    if args.command == "keywords":
        if min(args.bags, args.size) < 1:
            raise ValueError(f"--bags {args.bags} --size {args.size}: give at least 1 of each")
        print_keywords(args.shards, args.bags, args.size)
    elif args.command == "caption":
        levels = args.levels.split(",")
        if not set(levels) <= {"5", "10", "20", "40"} or args.concurrency < 1:
            raise ValueError(f"--levels {args.levels} --concurrency {args.concurrency}: give some of 5,10,20,40 and at least 1")
        n = captioner.caption_folder(args.shards, args.endpoint, args.model, args.prompt, tuple(map(int, levels)), args.concurrency,
                                     args.max_tokens, args.timeout)
        print(f"{n['captions']} captions for {n['shards']} shards in {args.shards}" + f"; {n['elsewhere']} are with another process" * (n["elsewhere"] > 0))
        if n["failed"]:
            raise ValueError(f"{n['failed']} patches got no caption, see {args.shards}/bags-*.failures.jsonl: the same command asks for them again")
    else:
        print(f"captions for {import_captions(args.source, args.shards)} shards in {args.shards}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped: what was answered is kept, and the same command continues")
