"""Captions from a served captioner: every patch of every bag is shown to a vision-language model, and its answer is kept.

MR-PLIP [1, section 3.1] captions its 34 million patches with Quilt-LLaVA, one question per patch, greedily decoded. Any server that
speaks the OpenAI chat protocol with images can do it here (vLLM, SGLang, llama.cpp, LM Studio, ...):

    python text.py caption SHARDS --endpoint http://localhost:8000/v1 --model wisdomik/Quilt-Llava-v1.5-7b --concurrency 32

Answers are appended to `bags-000000.captions.jsonl` as they come, one line {"key", "node", "caption", "model", "prompt"} each, so the
command may be killed at any moment and asks only for what is missing when it is repeated. Several processes may share a folder: a
shard belongs to the one that has locked its file. A key in the environment variable OPENAI_API_KEY is sent and never written.

Outline: what is to be asked | one question | many questions at once | a folder.          [1] MR-PLIP, CVPR 2025 (arXiv 2504.18856)
"""
import base64, fcntl, http.client, json, os, queue, random, re, signal, tarfile, threading
from pathlib import Path
from urllib.parse import urlsplit

import imagecodecs
from tqdm import tqdm

from slide import LEVELS, MAGS, NODES, place, resize, valid_nodes

PROMPT = "describe the main features visible in this histopathology image"     # [1], its figure 2
# What a model says instead of describing; a caption never starts like that.
REFUSAL = re.compile(r"\W*(i['’]?m sorry|i am sorry|sorry|i cannot|i can['’]?t|i['’]?m unable|i am unable|unfortunately|as an ai)\b", re.I)
PAUSES = (0.5, 1, 2, 4, 8, 16, 30, 60)                   # seconds before asking again when a server is busy or away: two minutes in all

# ---------------------------------------------------------------- what is to be asked

def bag_metas(shard):
    """{key: json} of the bags of a shard. ValueError where it is not whole."""
    try:
        with tarfile.open(shard) as tar:
            metas = {m.name[:-5]: json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")}
        if not metas or not all(isinstance(meta["slide"], str) for meta in metas.values()):
            raise ValueError("it holds no bags with their slide")
        return metas
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{shard} is truncated or no shard of ours ({e}): delete it and run `python data.py tile` again") from None

def wanted_nodes(shard, levels):
    """All (key, node) of a shard that are to have a caption: BagDataset's `valid` at the magnifications `levels`."""
    asked = lambda meta: valid_nodes([mag in meta["levels"] and mag in levels for mag in MAGS], meta["tissue"])
    return {(key, n) for key, meta in bag_metas(shard).items() for n in asked(meta).nonzero()[0].tolist()}

def patches(shard, wanted):
    """Yield (key, node, JPEG bytes) for every (key, node) in the set `wanted`, in order; each bag is decoded once."""
    with tarfile.open(shard) as tar:
        for member in tar:
            nodes = [n for n in range(NODES) if (member.name[:-4], n) in wanted] if member.name.endswith(".jpg") else []
            bag = imagecodecs.jpeg8_decode(tar.extractfile(member).read()) if nodes else None
            for lev in range(4):
                of_level = [n for n in nodes if n in range(NODES)[LEVELS[lev]]]
                image = resize(bag, len(bag) // 8 * 2 ** lev) if of_level else None          # [2^lev S, 2^lev S, 3]
                for n in of_level:
                    (_, row, col), S = place(n), len(bag) // 8
                    patch = image[row * S:(row + 1) * S, col * S:(col + 1) * S].copy()
                    yield member.name[:-4], n, imagecodecs.jpeg8_encode(patch, 95, subsampling="444")

# ---------------------------------------------------------------- one question

class Refused(Exception):
    """The server will not answer any question like this one: a wrong address, model or key."""

class Server:
    """A chat endpoint, e.g. http://localhost:8000/v1. `ask(jpeg)` -> the caption, or raises: Refused, or ValueError with the reason
    why this one image has none. One connection per thread, kept open."""

    def __init__(self, endpoint, model, prompt=PROMPT, max_tokens=256, timeout=120):
        url = urlsplit(endpoint.rstrip("/").removesuffix("/chat/completions"))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"--endpoint {endpoint} is no address: give one such as http://localhost:8000/v1")
        self.url, self.endpoint, self.model, self.prompt, self.max_tokens, self.timeout = url, endpoint, model, prompt, max_tokens, timeout
        self.mine, self.stop = threading.local(), threading.Event()
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"

    def _request(self, method, path, body=None):         # -> status, headers, bytes
        if getattr(self.mine, "connection", None) is None:
            kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
            self.mine.connection = kind(self.url.hostname, self.url.port, timeout=self.timeout)
        try:
            self.mine.connection.request(method, self.url.path + path, body, self.headers)
            answer = self.mine.connection.getresponse()
            return answer.status, answer.headers, answer.read()
        except (OSError, http.client.HTTPException):
            self.mine.connection.close()
            self.mine.connection = None
            raise

    def check(self):
        """Is the server there, and does it know the model? ValueError in one sentence if not."""
        try:
            status, _, data = self._request("GET", "/models")
        except (OSError, http.client.HTTPException) as e:
            raise ValueError(f"no server answers at {self.endpoint} ({e}): start it, or mend --endpoint") from None
        if status in (401, 403):
            raise ValueError(f"{self.endpoint} wants a key ({status}): put it into the environment variable OPENAI_API_KEY")
        try:
            names = [m["id"] for m in json.loads(data)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            names = []
        if names and self.model not in names:            # a server without this list, or a wrong path: the first question will tell
            raise ValueError(f"{self.endpoint} does not serve --model {self.model}; it serves {', '.join(names)}")

    def ask(self, jpeg):
        """The caption of one picture. Busy servers, time-outs and garbage are tried again after PAUSES."""
        picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        body = json.dumps({"model": self.model, "temperature": 0, "max_tokens": self.max_tokens, "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": self.prompt}]}]})
        for pause in (*PAUSES, None):
            wait = pause
            try:
                status, headers, data = self._request("POST", "/chat/completions", body)
                if status == 200:
                    choice = json.loads(data)["choices"][0]
                    return self._caption(choice["message"]["content"], choice.get("finish_reason"))
                reason = f"{status} {' '.join(data.decode(errors='replace').split())[:200]}"
                if status in (401, 403, 404):
                    raise Refused(f"{self.endpoint} refuses ({reason}): mend --endpoint, --model or OPENAI_API_KEY")
                if status < 500 and status not in (408, 409, 425, 429):
                    raise ValueError(reason)             # this picture or these settings; the same question would get the same answer
                if pause and (after := headers.get("Retry-After", "")).isdigit():
                    wait = min(int(after), 300)
            except (OSError, http.client.HTTPException) as e:
                reason = f"no answer ({type(e).__name__}: {e})"
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as e:
                reason = f"garbage ({type(e).__name__})"
            if pause is None or self.stop.wait(wait * random.uniform(0.75, 1.25)):          # all threads must not come back at once
                raise ValueError(reason)

    @staticmethod
    def _caption(text, finish):
        text = " ".join((text or "").split())
        if not text or finish == "content_filter" or REFUSAL.match(text):
            raise ValueError(f"refused: {text[:100]}" if text else "empty")
        return text

# ---------------------------------------------------------------- many questions at once

def ask_all(server, questions, concurrency):
    """Put the questions (an iterator of (key, node, jpeg)) to the server, `concurrency` at a time -> yield (key, node, caption or
    None, reason), as answers come. Stops by itself, with a ValueError, when the server refuses or 50 questions in a row fail."""
    answers, asked, ahead = queue.SimpleQueue(), queue.SimpleQueue(), threading.Semaphore(4 * concurrency)

    def cut():                                           # pictures are cut a little ahead, while the server thinks
        try:
            for question in questions:
                while not ahead.acquire(timeout=0.1):
                    if server.stop.is_set():
                        return
                asked.put(question)
        except Exception as e:                           # a damaged shard
            answers.put(e)
        finally:
            for _ in range(concurrency):
                asked.put(None)

    def work():
        while (question := asked.get()) and not server.stop.is_set():
            ahead.release()
            key, node, jpeg = question
            try:
                answers.put((key, node, server.ask(jpeg), None))
            except ValueError as e:
                answers.put((key, node, None, str(e)))
            except Exception as e:
                answers.put(e)
                break
        answers.put(None)
    for f in (cut, *[work] * concurrency):
        threading.Thread(target=f, daemon=True).start()
    running, failed, fatal = concurrency, 0, None
    try:
        while running:
            answer = answers.get()
            if answer is None:
                running -= 1
            elif isinstance(answer, Exception):
                fatal = fatal or answer
                server.stop.set()
            else:
                failed = failed + 1 if answer[2] is None else 0
                if failed >= 50 and not fatal:
                    fatal = ValueError(f"50 questions in a row failed at {server.endpoint}, the last with: {answer[3]}; the same command continues")
                    server.stop.set()
                if not (server.stop.is_set() and answer[2] is None):       # a question cut short by stopping is not a failed one
                    yield answer
    finally:
        server.stop.set()
    if fatal:
        raise fatal if isinstance(fatal, ValueError) else ValueError(str(fatal))

# ---------------------------------------------------------------- a folder

def caption_shard(shard, server, levels, concurrency, bar):
    """Ask for what is missing in one shard -> (captions added, questions failed), or None where another process has it."""
    path, failures = shard.with_suffix(".captions.jsonl"), shard.with_suffix(".failures.jsonl")
    with open(path, "a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        missing = wanted_nodes(shard, levels) - _answered(path, out, server)
        failures.unlink(missing_ok=True)                 # they are asked again now
        added, failed = 0, 0
        for key, node, caption, reason in ask_all(server, patches(shard, missing), concurrency) if missing else ():
            if caption is None:
                failed += 1
                with open(failures, "a") as f:
                    f.write(json.dumps({"key": key, "node": node, "reason": reason}) + "\n")
            else:
                added += 1
                row = {"key": key, "node": node, "caption": caption, "model": server.model, "prompt": server.prompt}
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                out.flush()
            bar.update()
    return added, failed

def _answered(path, out, server):
    """{(key, node)} of the lines in a locked caption file; a last line that a kill cut off is cut away. ValueError where the
    captions there were asked for in another way: mixing them would be found out only after training."""
    out.seek(0)
    rows, end = set(), 0
    for i, line in enumerate(out, 1):
        if not line.endswith(b"\n"):
            out.truncate(end)
            break
        end += len(line)
        try:
            row = json.loads(line)
            rows.add((row["key"], row["node"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{i}: not a caption line: mend or delete it") from None
        for name in ("model", "prompt"):
            if row.get(name) != getattr(server, name):
                raise ValueError(f"{path} holds captions of another {name} ({row.get(name)!r}, now {getattr(server, name)!r}): "
                                 "repeat that one, or move the file away")
    out.seek(0, os.SEEK_END)
    return rows

def caption_folder(folder, endpoint, model, prompt=PROMPT, levels=MAGS, concurrency=32, max_tokens=256, timeout=120):
    """Caption every valid node of every bag of a folder of shards -> dict(shards, captions, failed, elsewhere), this run's counts.
    ValueError, in one sentence, when the server is not there or gives up; what was answered is kept."""
    shards = sorted(Path(folder).glob("bags-*.tar"))
    if not shards:
        raise ValueError(f"{folder} holds no bags-*.tar: make them with `python data.py tile SLIDES --out {folder}`")
    server, count = Server(endpoint, model, prompt, max_tokens, timeout), dict(shards=0, captions=0, failed=0, elsewhere=0)
    server.check()
    interrupted = []
    if threading.current_thread() is threading.main_thread():              # a first Ctrl-C lets the questions in hand be answered
        usual = signal.signal(signal.SIGINT, lambda *_: (interrupted.append(1), server.stop.set(), signal.signal(signal.SIGINT, usual)))
    total = sum(len(wanted_nodes(shard, levels)) for shard in tqdm(shards, desc="shards", disable=None, leave=False))
    there = sum(f.read_bytes().count(b"\n") for shard in shards if (f := shard.with_suffix(".captions.jsonl")).exists())
    with tqdm(total=total, initial=min(there, total), unit="caption", desc="captions", disable=None, smoothing=0.05) as bar:
        for shard in shards:
            if interrupted:
                break
            result = caption_shard(shard, server, levels, concurrency, bar)
            if interrupted:
                break
            server.stop.clear()
            count["elsewhere" if result is None else "shards"] += 1
            for name, n in zip(("captions", "failed"), result or (0, 0)):
                count[name] += n
    if interrupted:
        raise KeyboardInterrupt
    return count
