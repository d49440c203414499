"""A caption becomes keywords, a bag's captions become a textual bag, a text becomes numbers.

CVTA (losses.py) aligns the patches of a bag with the keywords of its 85 captions, its textual bag
[1]. The paper does not define a keyword; its figure shows short noun phrases ("lymph node", "round
nuclei"), and `keywords` extracts such phrases. To try another extractor, replace that function.

    python text.py SHARDS          # print textual bags, to judge the keywords by eye

[1] MR-PLIP, CVPR 2025, 3.2. [2] Chapman et al. 2001 (NegEx). [3] Sennrich et al. 2016 (BPE).
[4] Radford et al. 2021 (CLIP).
"""

import argparse
import functools
import gzip
import html
import itertools
import json
import math
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

NODES = 85


# --- Keywords: runs of content words between stop words, without a tagger or a dictionary ---------
# Words that end a run, in the singular. A heading ends with a colon, so it equals no word.
STOP = """
grammar: a an the this that these those its it they them their there here which who what where when
while each every all any some most more less few several many much other another same own only both
either such we i you whole already even apparent typical and or but nor if then than so as also of
in on at by for from to into onto with within between among along across over under around about
through throughout near next against toward up down out off per via together due because like
beneath above below is are was were be been being has have had having do does can could may might
must should will would
hedges: no not without none hardly very rather somewhat mainly mostly primarily predominantly
largely overall generally typically often usually possibly probably likely potentially commonly
appear appearing appearance seem concern concerning suspicious suggest suggesting suggestive favour
favor reminiscent consistent compatible
pictures: image photomicrograph micrograph picture photo photograph field view slide section
specimen sample region area patch part site panel inset arrow arrowhead circle circled scale bar top
bottom left right upper lower middle magnification resolution histopathology histopathological
histology histologic histological microscopic microscopically microscopy h e haematoxylin
hematoxylin eosin stain stained staining
showing: show showing shown showcase showcasing display displaying displayed demonstrate
demonstrating reveal revealing depict illustrate exhibit exhibiting contain containing include
including feature featuring characterize characterized characteristic describe described see seen
observe observed observing note noted identify identified present presence visible evident evidence
notable found highlight highlighted indicate indicating indicative represent point prominently
arranging: arrange arranged arrangement composed comprise consist consisting made form forming
formed involve involving invade invading proliferate grow growing extend extending surround separate
separated line fill filling cause causing lead develop replace pattern
measures: micrometer millimeter centimeter one two three four time mm cm mm2 cm2 mm3 um µm μm nm
micron percent measure measured measuring
talk: important worth crucial noting mention diagnosis diagnostic finding impression case history
main key interest provide provided insight pathologist examine assess evaluate evaluation confirm
further used human quality analysis"""
STOP = frozenset(STOP.split())
# Words that are a finding only beside others: "irregular duct" is one, "irregular" is none.
LONE = """
sizes: large small medium sized size big high low thin thick deep superficial enlarged elongated
round oval shape higher increased decreased abundant scant scattered dense loose prominent extensive
focal diffuse multiple numerous single occasional minimal substantial strong limited rare scarce
infrequent total inconspicuous percentage index amount number rate distribution
degrees: mild moderate severe marked slightly highly partial poor well grade degree level
likeness: irregular regular uniform variable variability variation varying various different similar
normal abnormal intact positive classified classification type kind group
colours: pink purple blue brown dark pale light white red clear bright color colour background
figure cell tissue structure component population element
behaviour: shaped invasive infiltrate infiltrating proliferating proliferative aligned associated
located attached adjacent fused disrupted"""
LONE = frozenset(LONE.split())
# Measures and numbers: "40x", "pt2", "g3", "ii/iii", "n83-8950"; but "cd20" and "p53" are markers.
MEASURE = re.compile(r"x?\d.*|(?:p?[tnm]|g)\d[a-d]?|[ivx]+(?:/[ivx]+)*|[a-z]*\d+-\d+|[a-z]*\d{4,}")
# A word that is a verb behind a noun ("cells infiltrating") and an adjective before it.
VERBAL = re.compile(r"infiltrating|proliferating|\w{3,}(?<!e)(?<!differentiat)ed")
WORD = re.compile(r"in situ\b|[^\W_]+(?:[/-][^\W_]+)*")

# One notation for all captions: pairs of what is found and its replacement, in this order.
TIDY = [
    # HTML, links and Markdown: "<p>Fat</p><b>Nests</b>", "**Nests**".
    (r"</?(?:p|br|li|ul|ol|div|h\d)\b[^>]{0,200}>", ". "),
    (r"https?://\S+", ", "),
    (r"<[a-z/][^>]{0,200}>|[*`#]+", " "),
    # "Crohn's disease", "non small cell".
    (r"['\u2019]s\b", ""),
    (r"\bnon (?=\w)", "non-"),
    # A dot that ends no sentence: "E. coli", "e.g. fat".
    (r"\b([a-z])\. (?=[a-z])|\b(e\.g|i\.e|vs|cf|ca)\.", r"\1 "),
    # A form that says no: "Necrosis: absent.", "Atypia - none.", "Mitoses: 0", "CK20 (-)".
    (
        r"(?:^|(?<=[.;,()\n]))[^.;:,()\n]*(?:(?::|\s[-\u2013])\s*(?:no|none|nil|absent|negative"
        r"|not|0)\b[^.;\n]*|\(\s*(?:[-\u2013]|none|absent|negative)\s*\))",
        " ",
    ),
]
# A sentence ends, or turns: "no atypia, but nests", "there is no atypia and the glands are small".
SENTENCE = re.compile(
    r"[.;:!?\n](?!\d)|\b(?:but|although|though|however|while|whereas|except)\b"
    r"|\band (?=there (?:is|are)\b|the [\w -]{1,60}? (?:is|are|has|have|shows?|contains?)\b)"
)
# A sentence that is no description: "Clinical correlation is advised.", "Please consult ..."
REMARK = re.compile(
    r"\bclinical(?:ly)? correlat|\bcorrelat\w+ (?:is|are|with clinical)\b|\b(?:consult|please)\b"
    r"|\b(?:is|are) (?:advised|recommended)\b|\b(?:cannot|could not) be (?:excluded|ruled out)"
)
# A trigger [2] that denies what follows it: "no evidence of necrosis", "unlike a carcinoma".
DENIAL = re.compile(
    r"\b(?:no|none|nothing|not(?! only| just)|without|w/o|absence of|absent|negative for|lacks?|nor"
    r"|lack of|lacking|(?:free|void|devoid|clear) (?:of|from)|neither|never|unlike|rather than"
    r"|fail(?:s|ed)? to|instead of|compared? (?:this )?(?:with|to)|similar to|mimic(?:s|king)?"
    r"|differentiat\w+ (?:\w+ )?from|rul(?:es?|ing) out|r/o|exclud(?:es?|ing)|if"
    r"|possibl[ey]|probabl[ey]|(?:may|might|could) (?:suggest|indicate))\b"
)
# A trigger that denies what stands before it: "mitoses are not identified", "metastasis absent".
DENIED = re.compile(
    r"\b(?:is|are|was|were|be|been|can|could|has|have|had|do|does|did|appears?|seems?|remains?)\s?"
    r"(?:(?:\w+ly|also|to be|been)\s)*"
    r"(?:not(?! only| just)\b|absent\b|lacking\b|never\b|excluded\b|ruled out\b)"
    r"|n['\u2019]t\b|\bunlikely\b|\b(?:absent|negative|excluded|not \w+)\s*$"
)
# A clause ends here, but not at the commas of a list: "no atypia, necrosis, or mitoses".
CLAUSE = re.compile(r"[,()\[\]&]")
# A list runs from its first comma to its last "and" or "or". Its items hold none of these verbs.
LIST = re.compile(
    r"(?:,(?:(?!\b(?:is|are|was|were|has|have|shows?|appears?|seen|present|identified|observed"
    r"|noted|found|indicating|suggesting|or|nor)\b)[^,()\[\]&])+){1,12}?"
    r"(?:,\s*(?:and|or|nor)\b|\b(?:or|nor)\b)"
)
# Plurals by their ending, and those that are irregular.
ENDINGS = "oses:osis ae:a ies:y sses:ss ches:ch shes:sh xes:x s:"
ENDINGS = dict(pair.split(":") for pair in ENDINGS.split())
IRREGULAR = """
nuclei:nucleus nucleoli:nucleolus glomeruli:glomerulus nevi:nevus emboli:embolus lumina:lumen
septa:septum metastases:metastasis villi:villus acini:acinus alveoli:alveolus bronchi:bronchus
stromata:stroma foci:focus calculi:calculus thrombi:thrombus bacilli:bacillus fungi:fungus
ganglia:ganglion pancreas:pancreas lens:lens herpes:herpes diabetes:diabetes ascites:ascites
langerhans:langerhans species:species"""
IRREGULAR = dict(pair.split(":") for pair in IRREGULAR.split())


def singular(word):
    """Fold a plural: "glands" and "gland" are one keyword, never each other's negative."""
    if word in IRREGULAR or len(word) < 4 or word.endswith(("ss", "us", "is")):
        return IRREGULAR.get(word, word)
    for plural, ending in ENDINGS.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + ending
    return word


@functools.lru_cache(maxsize=200_000)
def same(keyword):
    """Give all spellings of a keyword one form: "signet-ring cell" -> "cell ring signet"."""
    keyword = keyword.replace("-", " ").replace("isation", "ization")
    # British letters: "haemorrhage", "oedema", "tumour", "fibre".
    keyword = re.sub("ae|oe", "e", keyword)
    keyword = re.sub(r"our(?=s?\b)", "or", keyword)
    keyword = re.sub(r"([bt])re\b", r"\1er", keyword)
    return " ".join(sorted(keyword.split()))


def _affirmed(sentence):
    """Yield the parts that a sentence affirms: a denial reaches to the end of its clause [2]."""
    joined = LIST.sub(lambda found: found[0].replace(",", "|"), sentence)
    for clause in CLAUSE.split(joined):
        if not DENIED.search(clause):
            yield from DENIAL.split(clause, maxsplit=1)[0].split("|")


def _phrase(run, longest):
    """Make a keyword of a run of content words; None if it is not a finding."""
    while run and VERBAL.fullmatch(run[-1]):
        run = run[:-1]
    # Keep the end of a long run: the head of an English noun phrase comes last.
    words = run[-longest:]
    if len(words) < len(run) and words[0] == "cell":
        words = words[1:]
    phrase = " ".join(words)
    # "clear cell" is a finding; "clear", "cell" and "clear structure" are none.
    words = re.split("[ -]", phrase)
    is_cell = len(words) > 1 and words[-1] == "cell"
    is_empty = all(word in LONE or word.endswith("ly") for word in words)
    return phrase if len(phrase) > 2 and (is_cell or not is_empty) else None


@functools.lru_cache(maxsize=200_000)
def _keywords(caption, longest):
    # Join wrapped lines, which go on in lower case.
    caption = unicodedata.normalize("NFKC", html.unescape(caption))
    caption = re.sub(r"\n(?=[a-z])", " ", caption).lower()
    for pattern, replacement in TIDY:
        caption = re.sub(pattern, replacement, caption)
    found = {}
    for sentence in SENTENCE.split(caption):
        if REMARK.search(sentence):
            continue
        for part in _affirmed(sentence):
            run = []
            # The empty word at the end closes the last run.
            for word in [*WORD.findall(part), ""]:
                one = singular(word)
                if word and not {word, one} & STOP and not MEASURE.fullmatch(word):
                    run.append(one)
                    continue
                phrase = _phrase(run, longest)
                if phrase:
                    found.setdefault(same(phrase), phrase)
                run = []
    return tuple(found.values())


def keywords(caption, longest=4):
    """Extract the keywords of a caption (str or None).

    "The image shows tubular glands in a stroma, without necrosis." -> ["tubular gland", "stroma"]:
    distinct phrases of 1 to `longest` words, in lower case and singular, in order of mention.
    """
    return list(_keywords(caption or "", longest))


def count_corpus(captions, most=1_000_000):
    """Count how many captions name each keyword; captions: any iterable of str or None.

    Returns {"captions": their number, "count": {same(keyword): captions that name it}, "common":
    the 4,096 most frequent as first written}. Beyond `most` keywords, rare ones are forgotten.
    """
    told = 0
    count = Counter()
    first = {}
    room = most
    for caption in captions:
        told += bool(caption)
        for keyword in keywords(caption):
            form = same(keyword)
            first.setdefault(form, keyword)
            count[form] += 1
        if len(count) > room:
            count = Counter({form: n for form, n in count.items() if n > 1})
            first = {form: first[form] for form in count}
            room = max(most, 2 * len(count))
    common = [first[form] for form, _ in count.most_common(4096)]
    return {"captions": told, "count": dict(sorted(count.items())), "common": common}


def keyword_bag(captions, size=128, corpus=None):
    """Collect the textual bag of a visual bag: at most `size` keywords, no two of them the `same`.

    captions: list of str or None, one for each node. Without a corpus (of `count_corpus`), the
    number of captions that name a keyword ranks it. With one, it scores n ln(1 + n / n'): n
    captions of the bag name it, n' would if the bag were like the corpus. So what every bag says
    ("a tissue fold") ranks low. Ties stay in order of mention.
    """
    counts = count_corpus(captions)
    if corpus is None:
        return counts["common"][:size]
    share = counts["captions"] / max(1, corpus["captions"])

    def score(keyword):
        n = counts["count"][same(keyword)]
        # A keyword that the corpus does not list counts as named once.
        return n * math.log1p(n / (share * corpus["count"].get(same(keyword), 1)))

    return sorted(counts["common"], key=score, reverse=True)[:size]


def keyword_owners(captions, bag):
    """Tell which caption names which keyword of a textual bag -> bool [len(captions), len(bag)]."""
    column = {same(keyword): i for i, keyword in enumerate(bag)}
    owners = np.zeros((len(captions), len(bag)), bool)
    for row, caption in enumerate(captions):
        for keyword in keywords(caption):
            if same(keyword) in column:
                owners[row, column[same(keyword)]] = True
    return owners


def read_lines(path):
    """Yield (number, record) of JSON lines or of one JSON array. ValueError names a broken line."""
    with open(path, "rb") as file:
        array = file.read(99).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
        file.seek(0)
        for number, line in enumerate([file.read()] if array else file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                hint = "correct or delete this line"
                raise ValueError(f"{path}:{number}: not JSON ({e}): {hint}") from None
            yield from enumerate(record, 1) if array else [(number, record)]


def read_captions(path):
    """Yield the lines {"key", "node", "caption", ...} of a file beside a shard."""
    slide = path.name.removeprefix("bags-").split(".captions.")[0]
    form = f'{{"key": "{slide}-...", "node": 0 to 84, "caption": "..."}}'
    for number, row in read_lines(path):
        match row:
            case {"key": str(key), "node": int(node), "caption": str() | None} if (
                0 <= node < NODES and key.rsplit("-", 1)[0] == slide
            ):
                yield row
            case _:
                raise ValueError(f"{path}:{number}: expected {form}: correct or delete this line")


class Captions:
    """Read the captions of a folder of shards: lines {"key", "node", "caption", ...}.

    captions[key] -> list of 85 (str, or None where a node has no caption). If a node has several
    lines, the last one counts. The last 2,048 bags are kept. Iterating yields (key, list of 85).
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("bags-*.captions.jsonl"))
        self.kept = {}

    def __getitem__(self, key):
        if key not in self.kept:
            path = self.folder / f"bags-{key.rsplit('-', 1)[0]}.captions.jsonl"
            bags = self._read(path) if path.exists() else {}
            # Put this bag last, and drop the first ones.
            bags[key] = bags.pop(key, [None] * NODES)
            self.kept |= bags
            for other in list(self.kept)[:-2048]:
                del self.kept[other]
        return self.kept[key]

    def __iter__(self):
        for path in self.files:
            yield from self._read(path).items()

    def _read(self, path):
        bags = {}
        for row in read_captions(path):
            caption = (row["caption"] or "").strip() or None
            bags.setdefault(row["key"], [None] * NODES)[row["node"]] = caption
        return bags


def read_truth(shards):
    """Read bags-*.truth.jsonl beside shards -> {key: list of 85 (dict or None)}."""
    truth = {}
    for path in (shard.with_suffix(".truth.jsonl") for shard in shards):
        for _, row in read_lines(path) if path.exists() else ():
            truth.setdefault(row["key"], [None] * NODES)[row["node"]] = row
    return truth


# --- Text to numbers, with CLIP's vocabulary or one that is learned from the captions -------------
# CLIP's words [4]: contractions, letters, single digits, runs of other marks.
SPLIT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)
# open_clip's cleaning: quotes become straight, ligatures and full-width forms become letters, and
# control characters go.
JOINED = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
CLEAN = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
CLEAN |= dict.fromkeys(range(0x201C, 0x2020), '"')
for code in (0x3000, *JOINED, *range(0xFF01, 0xFFEF)):
    CLEAN[code] = unicodedata.normalize("NFKC", chr(code))
CLEAN |= {0x149: "'n", 0xFB05: "\u017ft"}
CLEAN |= dict.fromkeys([*range(9), 0xB, *range(0xE, 0x20), 0x7F, 0xFEFF])
# A printable character for each byte, the table of GPT-2 and CLIP.
BYTE = {byte: chr(byte) for byte in range(33, 256) if chr(byte).isprintable()}
BYTE |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(BYTE)))}


def split_words(text):
    """Cut a text into lower-case words as open_clip does [4] -> list of str."""
    # ftfy resolves HTML entities unless the text looks like markup ...
    if "&" in text and "<" not in text:
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text.translate(CLEAN))
    # ... and open_clip does so twice, because captions are often escaped twice.
    text = html.unescape(html.unescape(text)).lower()
    # Part number signs such as a half from the letters, which Python's \w does not.
    if not text.isascii():
        text = "".join(f" {c} " if c.isalnum() and not c.isalpha() else c for c in text)
    return SPLIT.findall(text)


def _symbols(word):
    """Spell a word in byte symbols, the last one marked by "</w>" -> list of str."""
    symbols = [BYTE[byte] for byte in word.encode(errors="replace")]
    symbols[-1] += "</w>"
    return symbols


def _merge(parts, pair):
    """Join every occurrence of `pair` in a list of symbols, from left to right."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


class Tokenizer:
    """Byte-level BPE [3]: any text has ids, there is no unknown token.

    merges: list of pairs of symbols, in the order in which they were learned. The ids are CLIP's
    [4]: 256 byte symbols, the same at the end of a word, the merges, .start, .end. CLIP lacks the
    last one, .mask, which masked language modelling needs. An embedding table needs .size rows.
    """

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.symbol = [*BYTE.values(), *(symbol + "</w>" for symbol in BYTE.values())]
        self.symbol += ["".join(pair) for pair in self.merges]
        self.id = {symbol: i for i, symbol in enumerate(self.symbol)}
        self.start = len(self.symbol)
        self.end = self.start + 1
        self.mask = self.start + 2
        self.size = self.start + 3
        self.known = {}

    @classmethod
    def train(cls, texts, size):
        """Learn merges from an iterable of texts, until there are `size` ids or no pair is left."""
        words = Counter()
        for text in texts:
            words.update(split_words(text))
        split = {word: _symbols(word) for word in words}
        # The count of each pair, and the words that may hold it: only they change in a step.
        count = Counter()
        where = defaultdict(set)

        def tally(word, times):
            for pair in zip(split[word], split[word][1:], strict=False):
                count[pair] += times
                where[pair].add(word)

        for word in words:
            tally(word, words[word])

        merges = []
        while count and len(merges) < size - 512 - 3:
            # Join the most frequent pair [3]; among equals the greater one, to be reproducible.
            best = max(count, key=lambda pair: (count[pair], pair))
            if count[best] < 2:
                break
            merges.append(best)
            for word in where.pop(best):
                tally(word, -words[word])
                split[word] = _merge(split[word], best)
                tally(word, words[word])
            del count[best]
        return cls(merges)

    @classmethod
    def from_clip(cls, path):
        """Read CLIP's own vocabulary: 49,408 ids, the same as open_clip's. path: the file
        bpe_simple_vocab_16e6.txt.gz, or merges.txt or tokenizer.json of a CLIP on Hugging Face."""
        try:
            # A file that unpacks to gigabytes is another.
            unpack = gzip.open if str(path).endswith(".gz") else open
            raw = unpack(path, "rb").read(2**24)
            if str(path).endswith(".json"):
                merges = json.loads(raw)["model"]["merges"]
            else:
                # A heading, then a pair a line. CLIP uses only the first ones.
                merges = raw.decode().split("\n")[1:48895]
            merges = [pair.split() if isinstance(pair, str) else pair for pair in merges]
            if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
                raise ValueError(f"{len(merges):,} merges instead of 48,894 pairs")
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as e:
            remedy = "give bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json"
            raise ValueError(f"{path} is not CLIP's merge list ({e}): {remedy}") from e
        return cls(merges)

    @classmethod
    def load(cls, path):
        """Read the tokenizer.json of a run folder, which holds `to_json()`."""
        try:
            merges = json.loads(Path(path).read_text(encoding="utf-8"))["merges"]
            return cls([(left + "", right + "") for left, right in merges])
        except (ValueError, KeyError, TypeError) as e:
            remedy = "give the tokenizer.json of a run folder"
            raise ValueError(f"{path} is no tokenizer of ours: {remedy}") from e

    def to_json(self):
        return json.dumps({"merges": self.merges}, ensure_ascii=False)

    def encode(self, text):
        """Turn a text into ids -> list of int, without start and end."""
        ids = []
        for word in split_words(text):
            if word not in self.known:
                self.known[word] = self._encode_word(word)
            ids += self.known[word]
        return ids

    def _encode_word(self, word):
        parts = _symbols(word)
        # Join the pair that was learned first, until none is left.
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in self.rank]:
            parts = _merge(parts, min(pairs, key=self.rank.get))
        return [self.id[part] for part in parts]

    def decode(self, ids):
        """Turn ids into a text; special ids are skipped, single spaces stand between words."""
        symbols = "".join(self.symbol[i] for i in ids if i < self.start).replace("</w>", " ")
        byte = {symbol: code for code, symbol in BYTE.items()} | {" ": ord(" ")}
        return bytes(byte[symbol] for symbol in symbols).decode(errors="replace").strip()

    def batch(self, texts, context=77):
        """Turn B texts into int64 [B, context]: start, ids (cut where too many), end, zeros."""
        out = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.encode(text)[: context - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return out


def trim(ids, end, multiple=8):
    """Cut the padding that all texts share: ids [..., T] -> [..., T'], T' rounded up."""
    longest = int((ids == end).int().argmax(-1).max()) + 1
    return ids[..., : -(-longest // multiple) * multiple].contiguous()


def main():
    parser = argparse.ArgumentParser(description="Print textual bags, with counts of captions.")
    parser.add_argument("shards", help="folder of bags-*.captions.jsonl")
    parser.add_argument("--bags", type=int, default=3, help="bags to print (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="most keywords a bag (%(default)s)")
    args = parser.parse_args()

    captions = Captions(args.shards)
    if not captions.files:
        raise ValueError(f"{args.shards} holds no captions: make them with prepare/captions.py")
    corpus = count_corpus(itertools.chain.from_iterable(bag for _, bag in captions))
    print(f"{corpus['captions']:,} captions, {len(corpus['count']):,} keywords in {args.shards}")
    for key, bag in itertools.islice(captions, max(0, args.bags)):
        words = keyword_bag(bag, max(1, args.size), corpus)
        owners = keyword_owners(bag, words).sum(0)
        print(f"{key}: {sum(map(bool, bag))} captions, {len(words)} keywords")
        print("  " + ", ".join(f"{word} ({n})" for word, n in zip(words, owners, strict=True)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
