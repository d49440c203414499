"""Words: caption files, keyword bags, a byte-level BPE tokenizer and class prompts.

A patch has a caption; the captions of a bag's 85 patches give one *textual bag* of keywords, against which CVTA
(losses.py) aligns every patch. The paper does not say what a keyword is; its figure shows short noun phrases shared by
all four magnifications ("lymph node", "round nuclei"), and that is what `keywords` extracts.

Read in this order: keywords -> keyword_bag -> Tokenizer -> prompts -> the command line.

    python text.py caption SHARDS --endpoint URL --model M # every patch described by a served model (captioner.py)
    python text.py keywords SHARDS                         # the textual bag of the first bags, to read with your own eyes
    python text.py import captions.jsonl --shards SHARDS   # captions per slide, bag or image -> a caption line for every node

References
[1] MR-PLIP, CVPR 2025, section 3.2 (textual bags).  [2] Radford et al. 2021, CLIP (the tokenizer's pre-splitting).
[3] Sennrich et al. 2016 (byte-pair encoding).       [4] Lu et al. 2023, MI-Zero / CONCH (prompt ensembles).
"""
import argparse
import csv
import functools
import gzip
import html
import itertools
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import captioner

# ----------------------------------------------------------------------------------------------------------------------
# Keywords [1]: runs of content words. A word is dropped when it is grammar, when it is captioner's boilerplate
# ("The image primarily showcases ..."), or when it is a hedge or a judgement that no pixel shows.

STOP_WORDS = frozenset("""
a an the this that these those its it they them their there here which who whose what where when while as also and or but
nor if then than so such both either each every all any some most more less few several many much other another same own
of in on at by for from to into onto with within between among amongst along across over under around about through
throughout near next against toward towards up down out off per via
is are was were be been being am has have had having do does did can could may might must shall should will would
not no without
very quite rather somewhat mainly mostly primarily predominantly largely overall generally typically often usually
possibly probably likely appear appears appearing appearance seem seems
we i you he she one two three four five

image images photomicrograph photomicrographs micrograph micrographs picture photo photograph field fields view views
slide slides section sections specimen sample region regions area areas patch patches part parts histopathology histopathological
histology histologic histological microscopic microscopically microscopy magnification power
show shows showing shown showcase showcases showcasing display displays displaying demonstrate demonstrates demonstrating
reveal reveals revealing depict depicts depicting illustrate illustrates exhibit exhibits exhibiting contain contains
containing include includes including feature features featuring characterize characterized characterise characterised
see sees seen observe observed observing note noted identify identified present presence visible evident notable
arrange arranged arrangement set composed consist consists consisting made form forms forming formed
suggest suggests suggesting suggestive indicate indicates indicating indicative consistent compatible diagnosis diagnostic
finding findings impression favour favours favor favors case likely seem feature pattern patterns
h e he hematoxylin haematoxylin eosin stain stained staining
""".split())

# A finding that is denied must not become a keyword: the words from a negation to the end of its clause are dropped.
NEGATION = re.compile(r"\b(?:no|not|without|absence of|absent|negative for|lacks?|lacking|free of|neither|never)\b.*")
CLAUSE = re.compile(r"[.,;:!?()\[\]\n]|\bbut\b|\balthough\b|\bhowever\b|\bwhile\b|\bwhereas\b")
WORD = re.compile(r"[a-z][a-z\-']*[a-z]|[a-z]")

IRREGULAR = {"nuclei": "nucleus", "nucleoli": "nucleolus", "papillae": "papilla", "trabeculae": "trabecula", "lumina": "lumen",
             "lumens": "lumen", "septa": "septum", "mitoses": "mitosis", "metastases": "metastasis", "villi": "villus",
             "acini": "acinus", "alveoli": "alveolus", "bronchi": "bronchus", "carcinomata": "carcinoma", "stromata": "stroma",
             "foci": "focus", "calculi": "calculus", "thrombi": "thrombus", "bacilli": "bacillus", "fungi": "fungus"}


def singular(word):
    """Naive plural folding, so that "glands" and "gland" are one keyword: an identical meaning must not be both a
    positive and a negative of CVTA."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@functools.lru_cache(maxsize=200_000)
def _keywords(caption, longest):
    found = {}  # a dict keeps the order of first mention
    for clause in CLAUSE.split(caption.lower()):
        run = []
        for word in WORD.findall(NEGATION.sub("", clause)) + [""]:  # "" closes the last run
            if word and word not in STOP_WORDS:
                run.append(singular(word))
            elif run:
                found.setdefault(" ".join(run[-longest:]))  # English puts the head of a noun phrase last
                run = []
    return tuple(k for k in found if len(k) > 2)


def keywords(caption, longest=4):
    """The noun-phrase-like keywords of one caption: list of distinct lower-case phrases of 1..`longest` words, in order
    of mention, plurals folded, denied findings dropped.

    >>> keywords("The image shows tubular glands in a fibrous stroma, without necrosis.")
    ['tubular gland', 'fibrous stroma']
    """
    return list(_keywords(caption or "", longest))


def keyword_bag(captions, size=128):
    """The textual bag of one visual bag: captions (list of str or None, one per node) -> at most `size` keywords, most
    frequent first (number of captions naming it), ties in order of first mention. Deterministic."""
    count = Counter()
    for caption in captions:
        count.update(keywords(caption))
    return [k for k, _ in count.most_common(size)]


def keyword_owners(captions, bag):
    """Which node's own caption names which keyword: bool[len(captions), len(bag)]. The warm-up of CVTA trusts it."""
    column = {k: i for i, k in enumerate(bag)}
    own = np.zeros((len(captions), len(bag)), bool)
    for n, caption in enumerate(captions):
        own[n, [column[k] for k in keywords(caption) if k in column]] = True
    return own


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer [2, 3]. CLIP's layout, whether trained here or read from CLIP's file: 256 byte symbols, the same 256 ending a
# word ("</w>"), the merges, then start and end. `mask` is one id more, for masked language modelling: CLIP has none.

# CLIP's pre-splitting with the standard library's `re`: contractions, letters, single digits, runs of other marks. Its `\w` counts
# number signs such as a half or a Roman numeral among the letters; `split_words` parts them again.
SPLIT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)

# What open_clip's cleaning (the package ftfy) does to single characters: straight quotes, ligatures, full-width forms, control signs.
LIGATURES = [*range(0x132, 0x134), 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
CLEAN = {c: "'" for c in (0x2BC, *range(0x2018, 0x201C))} | {c: '"' for c in range(0x201C, 0x2020)}
CLEAN |= {c: unicodedata.normalize("NFKC", chr(c)) for c in (*LIGATURES, 0x3000, *range(0xFF01, 0xFFEF))} | {0x149: "'n", 0xFB05: "\u017ft"}
CLEAN |= dict.fromkeys((*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)))


def split_words(text):
    """A text as CLIP sees it [2], cut into words: HTML entities resolved, characters cleaned, lower-case. list of str.

    The same as open_clip's, but for one thing: text that was decoded wrongly ("mojibake") is not repaired."""
    if "&" in text and "<" not in text:                   # ftfy's guess whether it is markup
        text = html.unescape(text)
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", text.translate(CLEAN))
    if "&" in text:                                       # and open_clip's own, as often as captions are escaped twice
        text = html.unescape(html.unescape(text))
    words = SPLIT.findall(text.lower())
    return words if text.isascii() else [part for word in words for part in _parts(word)]


def _parts(word):                                         # one and a half, "x\u00bd" -> "x", "\u00bd"
    if word.isalpha() or not word[0].isalnum():
        return [word]
    runs = [(alpha, list(run)) for alpha, run in itertools.groupby(word, str.isalpha)]
    return [part for alpha, run in runs for part in (["".join(run)] if alpha else run)]


def _byte_symbols():
    """One printable character per byte, so that merges can be written to a text file. Printable Latin-1 characters stand
    for themselves, the other 68 bytes for characters from U+0100 on: the table of GPT-2, which CLIP's file presumes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Tokenizer:
    """Byte-level BPE: any text encodes, no unknown token. `merges`: list of pairs of symbols, in order of priority.

    `.start`, `.end`, `.mask` are the special ids, `.size` the rows an embedding table needs (the mask id included)."""

    def __init__(self, merges):
        symbols = list(_byte_symbols().values())
        self.merges = [tuple(m) for m in merges]
        vocab = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in self.merges]
        self.id = {s: i for i, s in enumerate(vocab)}
        self.symbol = vocab
        self.rank = {m: i for i, m in enumerate(self.merges)}
        self.byte = _byte_symbols()
        self.start, self.end, self.mask = len(vocab), len(vocab) + 1, len(vocab) + 2
        self.size = len(vocab) + 3
        self._cache = {}

    @classmethod
    def train(cls, texts, size):
        """Learn merges from an iterable of texts until `size` ids are reached or no pair occurs twice [3].
        Each step joins the most frequent adjacent pair; only the words that hold it are touched, and pairs are kept by their
        count, so that the most frequent is found without a search."""
        byte = _byte_symbols()
        words = Counter(w for text in texts for w in split_words(text))
        split = [[byte[b] for b in w.encode()] for w in words]
        for parts in split:
            parts[-1] += "</w>"
        count, where = Counter(), defaultdict(set)  # pair -> its frequency, the words that hold it
        for i, (parts, n) in enumerate(zip(split, words.values())):
            for pair in zip(parts, parts[1:]):
                count[pair] += n
                where[pair].add(i)
        by_count = defaultdict(set)
        for pair, n in count.items():
            by_count[n].add(pair)
        frequency, merges, top = list(words.values()), [], max(by_count, default=0)
        while len(merges) < size - 512 - 3:
            while top > 1 and not by_count[top]:
                top -= 1
            if top < 2:
                break
            best = max(by_count[top])  # the pair itself breaks ties: the same corpus, the same merges
            merges.append(best)
            change = Counter()
            for i in list(where[best]):
                for pair in zip(split[i], split[i][1:]):
                    change[pair] -= frequency[i]
                    where[pair].discard(i)
                split[i] = _merge(split[i], best)
                for pair in zip(split[i], split[i][1:]):
                    change[pair] += frequency[i]
                    where[pair].add(i)
            for pair, n in change.items():
                by_count[count[pair]].discard(pair)
                count[pair] += n
                by_count[count[pair]].add(pair)
                top = max(top, count[pair])
        return cls(merges)

    @classmethod
    def from_clip(cls, path):
        """CLIP's own vocabulary (49,408 ids; start 49406, end 49407) from OpenAI's and open_clip's `bpe_simple_vocab_16e6.txt.gz`, or from
        the `merges.txt` or `tokenizer.json` of a Hugging Face CLIP. Gives open_clip's ids (dev/LOG.md)."""
        try:
            raw = gzip.open(path).read() if str(path).endswith(".gz") else Path(path).read_bytes()
            if str(path).endswith(".json"):
                merges = [m.split() if isinstance(m, str) else m for m in json.loads(raw)["model"]["merges"]]
            else:                                         # a heading, then a pair a line; CLIP uses only the first 48,894
                merges = [line.split() for line in raw.decode().split("\n")[1 : 49152 - 256 - 2 + 1]]
            if any(len(m) != 2 for m in merges) or len(merges) != 49152 - 256 - 2:
                raise ValueError(f"{len(merges):,} merges of two symbols instead of 48,894")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error) as e:
            raise ValueError(f"{path} is not CLIP's merge list ({e}): give bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json") from e
        return cls(merges)

    def save(self, path):
        """Write the merges as JSON; the file appears whole or not at all."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps({"merges": self.merges}, ensure_ascii=False))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. ValueError if the file is something else."""
        try:
            return cls(json.loads(Path(path).read_text())["merges"])
        except (KeyError, TypeError, json.JSONDecodeError) as e:
            raise ValueError(f"{path} is not a tokenizer saved by this project; train.py writes tokenizer.json into the run folder") from e

    def encode(self, text):
        """str -> list of ids, without start and end."""
        ids = []
        for word in split_words(text):
            if word not in self._cache:
                parts = [self.byte[b] for b in word.encode()]
                parts[-1] += "</w>"
                while len(parts) > 1:
                    best = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
                    if best not in self.rank:
                        break
                    parts = _merge(parts, best)
                self._cache[word] = [self.id[p] for p in parts]
            ids += self._cache[word]
        return ids

    def decode(self, ids):
        """ids -> text; special ids are skipped, words come back separated by single spaces."""
        symbols = "".join(self.symbol[i] for i in ids if i < self.start).replace("</w>", " ")
        back = {s: b for b, s in self.byte.items()} | {" ": ord(" ")}
        return bytes(back[c] for c in symbols).decode(errors="replace").strip()

    def batch(self, texts, context=77):
        """list of B texts -> LongTensor[B, context]: start, ids, end, then zeros. Over-long texts are cut so that the end
        id is kept: towers pool there, and everything after the first end id is padding (no pad id is needed)."""
        out = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(out, texts):
            ids = [self.start, *self.encode(text)[: context - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return out


def _merge(parts, pair):
    """Join every occurrence of `pair` in a list of symbols, left to right."""
    out, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            out.append(parts[i] + parts[i + 1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def trim(ids, end, multiple=8):
    """Cut right padding: ids[..., T] -> ids[..., T'] with T' the longest text rounded up to `multiple`, so that a batch
    pays for its own length and a compiled graph sees few shapes."""
    longest = int((ids == end).int().argmax(-1).max()) + 1
    return ids[..., : min(ids.shape[-1], -(-longest // multiple) * multiple)]


# ----------------------------------------------------------------------------------------------------------------------
# Class prompts [4]: several names x several templates, embedded each, averaged and normalised again (evaluate.py).

TEMPLATES = ("{}", "The image shows {}.", "This photomicrograph shows {}.", "A histopathology image of {}.",
             "Microscopy reveals {}.", "The field displays {}.", "{} is seen.")

# The built-in world's facts; the first names in the form of a keyword, as CVTA saw them. Without an ensemble the first alone is used.
PROMPTS = {
    "architecture": {
        "glands": ("well-formed gland", "crowded gland", "glands around open lumina"),
        "nests": ("solid nest", "rounded nest", "nests of cells"),
        "trabeculae": ("parallel trabecula", "branching trabecula", "trabeculae and cords"),
        "papillae": ("papillary frond", "slender papillary projection", "papillary structures"),
        "sheets": ("diffuse sheet", "solid sheet", "sheets without structure"),
    },
    "cytology": {
        "small round": ("small round dark nucleus", "small round blue cell", "uniform small round cells"),
        "vesicular": ("large vesicular nucleus", "vesicular nucleus", "vesicular chromatin"),
        "spindle": ("spindle cell", "elongated spindle nucleus", "slender spindle cells"),
        "signet ring": ("signet ring cell", "vacuolated signet ring cell", "signet ring cells with vacuoles"),
    },
    "diagnosis": {name: (name,) for name in (
        "prostatic adenocarcinoma", "cholangiocarcinoma", "nephroblastoma", "Krukenberg tumour", "carcinoid", "paraganglioma",
        "melanoma", "chordoma", "insulinoma", "hepatocellular carcinoma", "schwannoma", "linitis plastica", "ependymoma",
        "serous carcinoma", "mesothelioma", "pseudomyxoma peritonei", "Ewing sarcoma", "seminoma", "leiomyosarcoma", "liposarcoma")},
}


def class_prompts(names, ensemble=True):
    """Prompts of one class: its names x TEMPLATES, or only the first name in the first template."""
    return [t.format(n) for n in names for t in TEMPLATES] if ensemble else [TEMPLATES[0].format(names[0])]


# ----------------------------------------------------------------------------------------------------------------------

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
            parts = [r.get(k) or "" for k in ("caption", "Answer", "title_en", "organ_en", "note")]
            name = next(r[k] for k in ("key", "slide", "Image", "image", "file") if r.get(k))
            node = int(r["node"]) if r.get("node") not in (None, "") else None
            return Path(name).name, node, ". ".join(p.strip().rstrip(".") for p in parts if p.strip())
        except (StopIteration, ValueError, TypeError, AttributeError):
            raise ValueError(f'{where}: expected "key", "slide" or "image", a "caption", and perhaps a "node"') from None

    path = Path(source)
    if path.is_dir():
        yield from (row(file, read(file)) for file in sorted(path.glob("*.json")))
    elif path.suffix.lower() == ".csv":
        yield from (row(f"{path}:{i}", r) for i, r in enumerate(csv.DictReader(read(path).splitlines()), 2))
    else:
        yield from (row(f"{path}:{i}", line) for i, line in enumerate(read(path).splitlines(), 1) if line.strip())


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
        name = name if name in keys else slides.get(name) or (Path(name).stem if Path(name).stem in keys else None)
        if name is None or node is not None and not (name in keys and 0 <= node < 85):
            strangers.append(name)
        elif caption:
            captions[name, node] = caption
    lacking = [slide for pairs in bags.values() for key, slide in pairs
               if not ((key, None) in captions or (slide, None) in captions or any((key, n) in captions for n in range(85)))]
    if lacking:
        raise ValueError(f"{source} has no caption for {len(lacking)} bags of {len(set(lacking))} slides ({', '.join(sorted(set(lacking))[:3])}): add a line for each"
                         + f"; {len(strangers)} of its names fit no bag" * bool(strangers))
    for out in (out for file in bags if (out := file.with_suffix(".captions.jsonl")).exists()):
        with open(out, encoding="utf-8") as f:
            if '"model"' in f.readline():
                raise ValueError(f"{out} holds captions that a model was asked for: move it away first, they were dear")
    for file, pairs in tqdm(bags.items(), desc="captions", unit="shard"):
        lines = []
        for key, slide in pairs:
            for n in range(85):
                named = [("image", (key, n)), ("bag", (key, None)), ("slide", (slide, None))]
                if kind := next((kind for kind, name in named if name in captions), None):
                    lines.append(json.dumps({"key": key, "node": n, "caption": captions[dict(named)[kind]], "source": kind}, ensure_ascii=False))
        out = file.with_suffix(".captions.jsonl")
        temporary = Path(f"{out}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, out)
    return len(files)


def print_keywords(shards, bags, size):
    """Print the textual bag of the first `bags` bags of a folder, most frequent keyword first, with its count."""
    shown = 0
    for file in sorted(Path(shards).glob("bags-*.captions.jsonl")):
        rows = defaultdict(list)
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["key"]].append(row["caption"])
        for key, captions in rows.items():
            if shown == bags:
                return
            words = keyword_bag(captions, size)
            own = keyword_owners(captions, words).sum(0)
            print(f"{key}: {len(captions)} captions, {len(words)} keywords\n  " + ", ".join(f"{w} ({n})" for w, n in zip(words, own)))
            shown += 1
    if not shown:
        raise ValueError(f"{shards} holds no bags-*.captions.jsonl: caption the shards first (`python text.py import ... --shards {shards}`)")


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
