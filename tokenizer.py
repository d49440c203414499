"""Byte-level BPE: text to numbers and back, with CLIP's vocabulary or one learnt from the captions.

Read in this order: split_words (what a word is) -> Tokenizer (train, from_clip, encode, batch) -> trim.

References
[1] Radford et al. 2021, CLIP (pre-splitting, layout of the ids).     [2] Sennrich et al. 2016 (byte-pair encoding).
"""
import gzip
import html
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import torch

# CLIP's pre-splitting with the standard library's `re`: contractions, letters, single digits, runs of other marks. Its `\w` counts
# number signs such as a half or a Roman numeral among the letters; `split_words` parts them again.
SPLIT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)

# What open_clip's cleaning (the package ftfy) does to single characters: straight quotes, ligatures, full-width forms, control signs.
LIGATURES = [*range(0x132, 0x134), 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
CLEAN = {c: "'" for c in (0x2BC, *range(0x2018, 0x201C))} | {c: '"' for c in range(0x201C, 0x2020)}
CLEAN |= {c: unicodedata.normalize("NFKC", chr(c)) for c in (*LIGATURES, 0x3000, *range(0xFF01, 0xFFEF))} | {0x149: "'n", 0xFB05: "\u017ft"}
CLEAN |= dict.fromkeys((*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)))


def split_words(text):
    """A text as CLIP sees it [1], cut into words: HTML entities resolved, characters cleaned, lower-case. list of str.

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
    """Byte-level BPE [2]: any text encodes, no unknown token. `merges`: list of pairs of symbols, in order of priority.

    The ids are CLIP's [1], learnt here or not: 256 byte symbols, the same 256 ending a word ("</w>"), the merges, start and end.
    `mask` is one id more, for masked language modelling, which CLIP does not do: it stands behind the end, so that towers which pool
    at the first end id never see it. `.start`, `.end`, `.mask` are the special ids, `.size` the rows an embedding table needs (the mask id included)."""

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
        """Learn merges from an iterable of texts until `size` ids are reached or no pair occurs twice [2].
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
        temporary.write_text(json.dumps({"merges": self.merges}, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. ValueError if the file is something else."""
        try:
            merges = json.loads(Path(path).read_text(encoding="utf-8"))["merges"]
            if not all(isinstance(m, list) and list(map(type, m)) == [str, str] for m in merges):
                raise TypeError("no pairs")
            return cls(merges)
        except (KeyError, TypeError, ValueError) as e:
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
    return ids[..., : min(ids.shape[-1], -(-longest // multiple) * multiple)].contiguous()
