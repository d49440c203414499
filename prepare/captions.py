"""Captions for the patches of bags: from a served model, from a file, or from PathGen-1.6M.

    python -m prepare.captions ask SHARDS --endpoint http://localhost:8000/v1 --model NAME
    python -m prepare.captions read FILE --shards DIR
    python -m prepare.captions pathgen JSON --slides DIR --out DIR      # see prepare/pathgen.py

MR-PLIP [1] asks Quilt-LLaVA about each of its 34 million patches. `ask` does so with any server of
the OpenAI chat protocol (vLLM, SGLang, llama.cpp ...). A key in the environment variable
OPENAI_API_KEY is sent, never written. Patches without an answer stand in bags-SLIDE.failures.jsonl.

All three leave `bags-SLIDE.captions.jsonl` beside the shards, a line {"key", "node", "caption"} for
each node, which text.Captions reads. `ask` and `read` fill in what is missing and change nothing.

Reference: [1] MR-PLIP, CVPR 2025, section 3.1.
"""

import argparse
import base64
import csv
import http.client
import io
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image

import data
import text
from prepare import pathgen
from prepare.pathgen import clean_caption, write_lines
from prepare.slide import CAPTION, FILE, bare

# The question of [1], figure 2.
PROMPT = "describe the main features visible in this histopathology image"
# A model says this instead of describing; no caption starts like it.
REFUSALS = ("sorry", "i'm sorry", "i am sorry", "i cannot", "i can't", "i'm unable", "i am unable")
REFUSALS += ("unfortunately", "as an ai ", "as an ai,")
# Seconds before a busy or absent server is asked again.
PAUSES = (0.5, 1, 2, 4, 8, 16, 30, 60)
# So many failures in a row mean that the server is gone.
MOST_FAILURES = 50
# Seconds for a whole answer, and its bytes.
TIMEOUT = 300
MOST_BYTES = 2**20


# ---------------------------------------------------------------- a server
def read_body(answer):
    """Read what a server sends, unless it sends without end, or a byte now and then."""
    until = time.monotonic() + TIMEOUT
    content = b""
    while piece := answer.read1(2**16):
        content += piece
        if len(content) > MOST_BYTES or time.monotonic() > until:
            raise ValueError("its answer does not end")
    return content


def read_answer(answer):
    """Take the caption out of a server's answer -> (caption, ""), or ("", why it is none)."""
    choice = answer["choices"][0]
    caption = clean_caption(choice["message"]["content"] or "")
    if not caption:
        return "", "empty"
    start = caption.lower().replace("\u2019", "'")
    if start.startswith(REFUSALS) or choice.get("finish_reason") == "content_filter":
        return "", f"refused: {caption}"
    return caption, ""


class Server:
    """A chat server. Its methods raise ValueError if it can answer no question at all."""

    def __init__(self, endpoint, model, prompt=PROMPT):
        found = re.fullmatch(r"(https?://)(?:(.*)@)?([^/:@][^@]*)", endpoint)
        if not found:
            raise ValueError("--endpoint is no address: give http://HOST:PORT/v1")
        self.endpoint = (found[1] + found[3]).rstrip("/").removesuffix("/chat/completions")
        self.model = model
        self.prompt = prompt
        # Send a key, or user:password of the address, but never show them.
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY has a sign that no key has: copy it again")
        login = urllib.parse.unquote(found[2] or "")
        basic = base64.b64encode(login.encode()).decode()
        self.secrets = [x for x in (key, basic, login, login.partition(":")[2]) if x]
        self.authorization = f"Bearer {key}" if key else f"Basic {basic}"
        # Set when nothing more is to be asked, so that no thread waits for another try.
        self.stop = threading.Event()

    def hide(self, said):
        """Take the secrets out of what a server says."""
        for secret in self.secrets:
            said = said.replace(secret, "***")
        return said

    def quote(self, said):
        """Make a short line of what a server says, without secrets and control characters."""
        return data.one_line(self.hide(said))[:200]

    def request(self, path, body=None):
        """Send a request -> what the server answers, from JSON."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.endpoint + path, body, headers)
        if self.secrets:
            # No other host gets it, whereto the server may redirect.
            request.add_unredirected_header("Authorization", self.authorization)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.loads(read_body(answer))
        except urllib.error.HTTPError as e:
            # Keep what the server says of it.
            e.msg = self.quote(read_body(e).decode(errors="replace"))
            raise

    def check(self):
        """Look whether the server is there, and has the model."""
        try:
            names = [str(row["id"]) for row in self.request("/models")["data"]]
        except (urllib.error.HTTPError, ValueError, KeyError, TypeError, RecursionError):
            # Not every server lists its models; the first question will tell.
            return
        except (OSError, http.client.HTTPException) as e:
            reason = self.quote(str(e))
            raise ValueError(f"no server at {self.endpoint} answers ({reason}): start it") from None
        if names and self.model not in names:
            served = f"{self.endpoint} serves {self.quote(', '.join(names))}"
            raise ValueError(f"{served}, not --model {self.model}: give one of those")

    def ask(self, jpeg):
        """Describe a JPEG -> (caption, ""), ("", why the model has none) or (None, a failure)."""
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}]
        content.append({"type": "text", "text": self.prompt})
        question = {"model": self.model, "temperature": 0, "max_tokens": 256}
        question["messages"] = [{"role": "user", "content": content}]
        body = json.dumps(question).encode()
        # Ask until there is an answer, or the last pause is over.
        for pause in (*PAUSES, None):
            try:
                caption, reason = read_answer(self.request("/chat/completions", body))
                return self.hide(caption), self.quote(reason)
            except urllib.error.HTTPError as e:
                reason = f"{e.code} {e.msg}"
                if e.code in (401, 403, 404):
                    hint = "check --endpoint, --model and OPENAI_API_KEY"
                    raise ValueError(f"{self.endpoint} refuses ({reason}): {hint}") from None
                # The same question would get the same answer, unless the server is busy.
                if e.code < 500 and e.code not in (408, 409, 425, 429):
                    break
            except Exception as e:
                # Whatever came instead of an answer, the next try may do better.
                reason = f"no answer ({self.quote(repr(e))})"
            # Spread the tries of many threads.
            if pause is None or self.stop.wait(pause * random.uniform(0.75, 1.25)):
                break
        return None, reason


# ---------------------------------------------------------------- asking
def answered(shard, server=None):
    """Read the captions of a shard, also of a call that was stopped -> {(key, node): row}."""
    part = shard.with_suffix(".captions.part")
    # Remove a last line that a kill cut off.
    if part.exists():
        os.truncate(part, part.read_bytes().rfind(b"\n") + 1)
    rows = {}
    for path in (shard.with_suffix(".captions.jsonl"), part):
        for row in text.read_captions(path) if path.exists() else ():
            # Beside captions of files, a mixture of models would be found only after training.
            asked = (row.get("model"), row.get("prompt"))
            if server and asked not in ((None, None), (server.model, server.prompt)):
                held = f"{path} holds captions of model {asked[0]!r} and prompt {asked[1]!r}"
                wanted = f"not {server.model!r} and {server.prompt!r}"
                raise ValueError(f"{held}, {wanted}: move the file away")
            if row["caption"]:
                rows[row["key"], row["node"]] = row
    return rows


def keep(shard, rows):
    """Sort the captions of a shard into a file that appears whole."""
    write_lines(shard.with_suffix(".captions.jsonl"), [rows[place] for place in sorted(rows)])
    shard.with_suffix(".captions.part").unlink(missing_ok=True)


def questions(bags, number, levels, rows, bar):
    """Yield (key, node, JPEG bytes) of the nodes of a shard that `rows` lacks."""
    for i in np.flatnonzero(bags.shard_of == number).tolist():
        key = bags.keys[i]
        nodes = np.flatnonzero(bags.valid[i].numpy() & np.isin(data.LEVEL, levels)).tolist()
        missing = [node for node in nodes if (key, node) not in rows]
        bar.update(len(nodes) - len(missing))
        if not missing:
            continue
        # Cut the missing patches out of the bag's image.
        patches = data.pyramid(bags[i]["image"][None])[0, missing]  # [nodes, 3, S, S]
        pixels = patches.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        for node, patch in zip(missing, pixels, strict=True):
            file = io.BytesIO()
            Image.fromarray(patch).save(file, "JPEG", quality=95, subsampling=0)
            yield key, node, file.getvalue()


def put(server, asked, rows, part, concurrency, bar):
    """Put questions to the server, add answers to rows and file -> [dict(key, node, reason)]."""
    turn = threading.Lock()
    failures, streak = [], 0

    def work():
        nonlocal streak
        while not server.stop.is_set():
            with turn:
                question = next(asked, None)
            if question is None:
                return
            key, node, jpeg = question
            caption, reason = server.ask(jpeg)
            with turn:
                bar.update()
                if caption:
                    row = dict(key=key, node=node, caption=caption)
                    rows[key, node] = row | dict(model=server.model, prompt=server.prompt)
                    # Write at once: what is answered is kept, however the command ends.
                    with open(part, "a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[key, node], ensure_ascii=False) + "\n")
                else:
                    failures.append(dict(key=key, node=node, reason=reason))
                # A model that refuses is there.
                streak = streak + 1 if caption is None else 0
                if streak >= MOST_FAILURES:
                    gone = f"{MOST_FAILURES} questions in a row failed at {server.endpoint}"
                    raise ValueError(f"{gone} ({reason}): the same command continues")

    server.stop.clear()
    # After an error or Ctrl-C, the pool waits for the questions in hand: their answers count.
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for thread in as_completed([pool.submit(work) for _ in range(concurrency)]):
                thread.result()
        finally:
            server.stop.set()
    return failures


def ask(folder, server, mags=data.MAGS, concurrency=32):
    """Caption the valid nodes of a folder of shards -> dict(captions, failed, elsewhere, total).

    `elsewhere` counts the shards that another process works on, `total` the nodes to caption.
    """
    levels = [data.MAGS.index(mag) for mag in mags]
    bags = data.Bags(folder)
    server.check()
    captions, elsewhere, reasons = 0, 0, Counter()
    total = int(bags.valid[:, np.isin(data.LEVEL, levels)].sum())
    bar = data.progress(total=total, desc="captions", unit="caption")
    for number, shard in enumerate(bags.shards):
        # Leave a shard to the process that has its lock.
        try:
            lock = data.lock(folder, f".{shard.stem}.lock")
        except ValueError:
            elsewhere += 1
            continue
        with lock:
            # Collect answers in a part. What an earlier call left is not asked again.
            part = shard.with_suffix(".captions.part")
            rows = answered(shard, server)
            before = len(rows)
            asked = questions(bags, number, levels, rows, bar)
            failures = put(server, asked, rows, part, concurrency, bar)
            captions += len(rows) - before
            if part.exists():
                keep(shard, rows)
            # List what has no caption; an older list is over.
            listed = shard.with_suffix(".failures.jsonl")
            listed.unlink(missing_ok=True)
            if failures:
                write_lines(listed, failures)
            reasons.update(row["reason"] for row in failures)
    bar.close()
    for reason, n in reasons.most_common(3):
        print(f"{n} x {reason}", file=sys.stderr)
    return dict(captions=captions, failed=reasons.total(), elsewhere=elsewhere, total=total)


def tell_missing(folder):
    """Print how many valid nodes have no caption, and what lets train.py go on without."""
    # What it counts is kept for train.py.
    corpus = data.count_keywords(data.Bags(folder), text.Captions(folder), missing=1)
    told = f"{corpus['untold']} of {corpus['valid']} patches in {folder} have no caption"
    # Round up, to a share that surely suffices.
    share = min(1, (100 * corpus["untold"] // corpus["valid"] + 1) / 100)
    print(f"{told}: `train.py --missing {share:g}` allows them" if corpus["untold"] else told)


# ---------------------------------------------------------------- captions made elsewhere

# Columns of a caption are joined; the first column of a name that is filled in counts.
CAPTIONS = (*CAPTION, "answer", "title_en", "organ_en", "note")
NAMES = ("key", "slide", *FILE)


def read_source(source):
    """Yield (place, record) of JSON lines, a JSON array, a CSV or a folder of JSON files.

    Such a folder holds one {"Image", "Answer", ...} for each image, as the authors' release does.
    """
    if source.is_dir():
        files = sorted(source.glob("*.json"))
        if not files:
            raise ValueError(f"{source} holds no *.json: give a folder with one for each image")
        for path in files:
            try:
                yield path, json.loads(path.read_bytes())
            except ValueError as e:
                raise ValueError(f"{path}: not JSON ({e}): correct or delete it") from None
    elif source.suffix.lower() == ".csv":
        try:
            with open(source, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    # A comma without quotes would end the caption.
                    place = f"{source}:{reader.line_num}"
                    if None in row:
                        raise ValueError(f"{place}: more cells than headings: quote commas")
                    yield place, row
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{source} is no CSV in UTF-8 ({e}): save it as one") from None
    else:
        for number, row in text.read_lines(source):
            yield f"{source}:{number}", row


def read_record(place, record):
    """Take a record apart -> (name, node or None, caption)."""
    try:
        cells = {str(column).strip().lower(): cell for column, cell in record.items()}
        name = next(cells[column] for column in NAMES if cells.get(column))
        parts = [cells[column] or "" for column in CAPTIONS if column in cells]
        if not parts:
            raise KeyError("caption")
        caption = ". ".join(part.strip().rstrip(".") for part in parts if part.strip())
        node = None if cells.get("node") in (None, "") else int(str(cells["node"]))
        return Path(name).name, node, clean_caption(caption)
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError):
        columns = '"key", "slide" or "image", a "caption", perhaps a "node"'
        found = ", ".join(map(str, record)) if isinstance(record, dict) else str(record)
        if "wsi_id" in found:
            columns += " (`pathgen` reads the list of PathGen-1.6M)"
        raise ValueError(f"{place}: expected {columns}, not {found[:100]}") from None


def match_captions(source, bags):
    """Match the records of a source with bags -> {(key or slide, node or None): caption}."""
    # A record may name a bag, or a slide with or without its suffix.
    keys = set(bags.keys)
    targets = {bare(slide): slide for slide in bags.slides}
    targets |= {name: name for name in [*bags.slides, *bags.keys]}
    captions = {}
    strangers = Counter()
    seconds = 0
    for place, record in data.progress(read_source(Path(source)), "records"):
        name, node, caption = read_record(place, record)
        target = targets.get(name) or targets.get(bare(name))
        # KEY_NODE.png is the image of a node.
        image = re.fullmatch(r"(.+)_(\d+)", Path(name).stem, re.ASCII)
        if node is None and image and image[1] in keys:
            target = image[1]
            node = int(image[2])
        # A record fits if its bag or slide is there; a slide has no nodes.
        if not target or node is not None and not (target in keys and 0 <= node < data.NODES):
            strangers[name] += 1
        elif caption:
            seconds += captions.setdefault((target, node), caption) != caption
    if strangers:
        shown = ", ".join(list(strangers)[:5])
        count = f"{strangers.total()} records of {len(strangers)} names"
        told = f"{source}: {count} fit no bag of {bags.folder}, as {shown}"
        print(f"{told} (a node, 0 to 84, goes with a bag)", file=sys.stderr)
    if seconds:
        print(f"{source}: {seconds} second captions of one place are left out", file=sys.stderr)
    if not captions:
        raise ValueError(f"{source} has no caption for these bags: name bag keys or slides")
    return captions


def read(source, folder):
    """Give nodes that have no caption that of a source -> dict(filled, there)."""
    bags = data.Bags(folder)
    captions = match_captions(source, bags)
    filled, there = 0, 0
    for number, shard in enumerate(data.progress(bags.shards, "captions", unit="shard")):
        with data.lock(folder, f".{shard.stem}.lock"):
            rows = answered(shard)
            before = len(rows)
            for i in np.flatnonzero(bags.shard_of == number):
                key = bags.keys[i]
                for node in range(data.NODES):
                    # The nearest caption counts: the node's, the bag's, the slide's. Where there is
                    # no tissue, only its own.
                    places = dict(image=(key, node))
                    if bags.valid[i, node]:
                        places |= dict(bag=(key, None), slide=(bags.slides[i], None))
                    kind = next((kind for kind, place in places.items() if place in captions), None)
                    if kind and (key, node) in rows:
                        there += 1
                    elif kind:
                        caption = captions[places[kind]]
                        rows[key, node] = dict(key=key, node=node, caption=caption, source=kind)
            if len(rows) > before:
                keep(shard, rows)
                filled += len(rows) - before
    return dict(filled=filled, there=there)


# ---------------------------------------------------------------- commands
def main():
    parser = argparse.ArgumentParser(description="Captions for the patches of bags.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("ask", help="ask a served model about every patch").add_argument
    add("shards", help="folder of bags-*.tar")
    add("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000/v1")
    add("--model", required=True, help="its name there")
    add("--prompt", default=PROMPT, help="the question (%(default)r)")
    add("--levels", default="5,10,20,40", help="magnifications to caption (%(default)s)")
    add("--concurrency", type=int, default=32, help="questions at a time (%(default)s)")
    add = commands.add_parser("read", help="take captions made elsewhere").add_argument
    add("source", metavar="FILE", help="JSON lines or array, CSV, or folder of JSON files")
    add("--shards", required=True, help="folder of bags-*.tar")
    add = commands.add_parser("pathgen", help="bags and captions of PathGen-1.6M").add_argument
    add("source", metavar="JSON", help="the list of squares and captions")
    add("--slides", required=True, nargs="+", help="files or folders")
    add("--out", required=True, help="folder of shards")
    add("--mpp", help="microns per pixel, or a CSV of slide,mpp lines")
    add("--fov-px", type=int, default=pathgen.SQUARE, help="pixels a side of a 5x parent")
    add("--patch-px", type=int, default=224, help="stored pixels a side (%(default)s)")
    args = parser.parse_args()

    if args.command == "ask":
        mags = args.levels.split(",")
        if not set(mags) <= set(map(str, data.MAGS)) or args.concurrency < 1:
            raise ValueError("--levels takes some of 5,10,20,40, --concurrency at least 1")
        server = Server(args.endpoint, args.model, args.prompt)
        n = ask(args.shards, server, [int(mag) for mag in mags], args.concurrency)
        print(f"{n['captions']} new captions in {args.shards}")
        if n["elsewhere"]:
            print(f"{n['elsewhere']} shards are with another process")
        tell_missing(args.shards)
        # A model may refuse a few for ever: train.py allows as many.
        if n["failed"] > 0.01 * n["total"]:
            failed = f"{n['failed']} of {n['total']} patches got no caption, see"
            raise ValueError(f"{failed} {args.shards}/*.failures.jsonl: repeat the command")
    elif args.command == "read":
        n = read(args.source, args.shards)
        print(f"{n['filled']} captions filled in; {n['there']} were there already and stay")
        tell_missing(args.shards)
    else:
        pathgen.make_bags(args.source, args.slides, args.out, args.mpp, args.fov_px, args.patch_px)
        tell_missing(args.out)


if __name__ == "__main__":
    data.run_script(main, "what is written is kept, the same command continues")
