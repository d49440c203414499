"""python -m pytest tests/test_captioner.py -q        (a real HTTP server on loopback that recognises the patch it is shown)"""
import base64
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import Script, script

import captioner
import data
from test_data import picture, write


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two slides, 4 bags each, of 40x and of 20x: 4 * 85 + 4 * 21 patches of 16 px."""
    folder = tmp_path_factory.mktemp("captioner")
    rng = np.random.default_rng(0)
    for name, mpp in (("a", 0.25), ("b", 0.5)):
        side = int(1024 * 0.25 / mpp)                     # every patch of its own colour, so that it can be recognised
        tints = np.kron(rng.integers(-40, 40, (16, 16, 3)), np.ones((side // 16, side // 16, 1), int))
        write(folder / f"{name}.svs", (picture(side, side) + tints).clip(0, 255).astype(np.uint8), mpp=mpp)
    data.tile(folder, folder / "bags", patch_px=16, fov_px=64)
    return folder / "bags"


class Model:
    """A chat server. `moods`: {node: list of what to do first, instead of answering}; `delay` in seconds. It answers with the
    key and node of the stored patch that is nearest to the picture it was sent."""

    def __init__(self, shards, moods={}, delay=0.0, port=0):
        bags = data.BagDataset(shards, captions=False)
        self.names = [(bags.keys[i], n) for i in range(len(bags)) for n in range(85)]
        self.known = torch.cat([data.pyramid(bags[i]["image"][None])[0] for i in range(len(bags))]).flatten(1)
        self.moods, self.delay, self.answered, self.asked, self.wrong = {k: list(v) for k, v in moods.items()}, delay, Counter(), Counter(), []
        self.lock, model = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, status, body, **headers):
                self.send_response(status)
                for k, v in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(k.replace("_", "-"), v)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(200, json.dumps({"data": [{"id": "m"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name, status, text = model.look(self.path, body)
                time.sleep(model.delay)
                if status == 200 and text is not None:
                    text = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
                self.reply(status, (text or "{broken").encode(), Retry_After="0")

            def log_message(self, *_):
                pass
        ThreadingHTTPServer.daemon_threads = True
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def look(self, path, body):
        """What to answer -> name, status, text; whatever is odd about the question goes to .wrong."""
        image, text = body["messages"][0]["content"]
        raw = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        patch = torch.from_numpy(np.array(Image.open(io.BytesIO(raw)))).permute(2, 0, 1).flatten() / 255
        distance = (self.known - patch).abs().mean(1)
        name = self.names[int(distance.argmin())]
        with self.lock:
            if (path, body["model"], body["temperature"], text["text"]) != ("/v1/chat/completions", "m", 0, captioner.PROMPT) or distance.min() > 0.03:
                self.wrong.append((path, body["model"], text, float(distance.min())))
            self.asked[name] += 1
            mood = self.moods[name[1]].pop(0) if self.moods.get(name[1]) else "answer"
            self.answered[name] += mood == "answer"
        return name, *{"answer": (200, f"{name[0]} {name[1]}"), "busy": (429, "slow down"), "broken": (500, "oh"), "garbage": (200, None),
                       "empty": (200, " \n"), "sorry": (200, "I'm sorry, but I cannot help."), "no": (400, "bad picture"),
                       "odd": (200, ["no", "text"])}[mood]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fresh(shards, monkeypatch):
    """No captions yet, and short pauses."""
    for path in [*shards.glob("*.captions.jsonl"), *shards.glob("*.failures.jsonl")]:
        path.unlink()
    monkeypatch.setattr(captioner, "PAUSES", (0.02, 0.05, 0.05))
    return shards


def rows(shards, kind="captions"):
    return [json.loads(line) for f in sorted(shards.glob(f"*.{kind}.jsonl")) for line in f.read_text().splitlines()]


def check_complete(shards, model):
    """Every valid node has one caption, its own, and the data set takes them."""
    lines, bags = rows(shards), data.BagDataset(shards)
    assert all(r["caption"] == f"{r['key']} {r['node']}" and r["model"] == "m" and r["prompt"] == captioner.PROMPT for r in lines)
    assert Counter((r["key"], r["node"]) for r in lines) == Counter(
        (bags.keys[i], n) for i in range(len(bags)) for n in range(85) if bags.valid[i, n]) and len(lines) == int(bags.valid.sum())
    assert model.wrong == []


def test_every_patch_is_captioned_through_all_troubles(fresh):
    moods = {0: ["busy"] * 3, 3: ["broken"], 9: ["garbage", "busy"], 17: ["empty"], 18: ["sorry"], 40: ["no"], 41: ["odd"]}     # of the node's first askings
    model = Model(fresh, moods, delay=0.002)
    count = captioner.caption_folder(fresh, model.url, "m", concurrency=8)
    failed = {r["node"]: r["reason"] for r in rows(fresh, "failures")}
    assert count["failed"] == 3 and failed == {17: "empty", 18: "refused: I'm sorry, but I cannot help.", 40: "400 bad picture"}
    again = captioner.caption_folder(fresh, model.url + "/chat/completions", "m", concurrency=8)
    assert again == dict(shards=2, captions=3, failed=0, elsewhere=0) and rows(fresh, "failures") == []
    check_complete(fresh, model)
    assert set(model.answered.values()) == {1}            # nobody was asked after an answer
    assert sum(model.asked.values()) == len(model.answered) + sum(map(len, moods.values()))
    assert captioner.caption_folder(fresh, model.url, "m")["captions"] == 0
    model.close()


def test_a_server_that_dies_and_comes_back(fresh):
    model = Model(fresh, delay=0.005)
    threading.Thread(target=lambda: (time.sleep(0.4), model.close()), daemon=True).start()
    with pytest.raises(ValueError, match="questions in a row failed at .*the same command continues"):
        captioner.caption_folder(fresh, model.url, "m", concurrency=4)
    first = len(rows(fresh))
    assert 0 < first < 424
    with pytest.raises(ValueError, match="no server answers at"):
        captioner.caption_folder(fresh, model.url, "m")
    back = Model(fresh)
    captioner.caption_folder(fresh, back.url, "m", concurrency=4)
    check_complete(fresh, back)
    assert sum(back.answered.values()) == 424 - first     # what had been answered was not asked again
    back.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_killed_and_comes_back(fresh, how):
    model = Model(fresh, delay=0.03)
    args = ["text.py", "caption", fresh, "--endpoint", model.url, "--model", "m", "--concurrency", "4"]
    p = Script(*args, before=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.time() + 30
    while len(rows_so_far(fresh)) < 60 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(p.pid, how)
    p = p.wait()
    assert "Traceback" not in p.stderr and (how == signal.SIGKILL or (p.returncode == 1 and "stopped: what was answered is kept" in p.stderr))
    first = len(rows_so_far(fresh))
    assert 60 <= first < 424 and (how == signal.SIGKILL or model.answered.total() == first)  # Ctrl-C waits for what is asked
    with open(sorted(fresh.glob("*.captions.jsonl"))[0], "a") as f:
        f.write('{"key": "a-0')                           # the line that was being written
    model.delay = 0
    r = script(*args)
    assert r.returncode == 0 and f"{424 - first} captions for 2 shards" in r.stdout
    check_complete(fresh, model)
    assert model.answered.total() <= 424 + 4
    model.close()


def rows_so_far(shards):
    return [line for f in shards.glob("*.captions.jsonl") for line in f.read_text().splitlines() if line.endswith("}")]


def test_two_processes_share_a_folder(fresh):
    model = Model(fresh, delay=0.01)
    args = ["text.py", "caption", fresh, "--endpoint", model.url, "--model", "m", "--concurrency", "2"]
    for p in [Script(*args) for _ in range(2)]:
        assert p.wait().returncode == 0
    captioner.caption_folder(fresh, model.url, "m")       # a shard both passed over at the same moment, if any
    check_complete(fresh, model)
    assert set(model.answered.values()) == {1}
    model.close()


def test_what_is_wrong_is_said_in_one_sentence(fresh, monkeypatch):
    model = Model(fresh)
    for endpoint, name, words in (("localhost:8000", "m", "is no address"), ("http://127.0.0.1:9/v1", "m", "no server answers"),
                                  (model.url, "other", "does not serve --model other; it serves m")):
        with pytest.raises(ValueError, match=words) as e:
            captioner.caption_folder(fresh, endpoint, name)
        assert "\n" not in str(e.value)
    captioner.caption_folder(fresh, model.url, "m", levels=(5,))
    assert {r["node"] for r in rows(fresh)} == {0}
    with pytest.raises(ValueError, match="holds captions of another prompt .*now 'What is this"):
        captioner.caption_folder(fresh, model.url, "m", prompt="What is this?")
    with pytest.raises(ValueError, match="holds no bags"):
        captioner.caption_folder(fresh / "nowhere", model.url, "m")
    model.look = lambda path, body: (None, 404, "no such model")
    with pytest.raises(ValueError, match="refuses .404 no such model.: mend --endpoint, --model"):
        captioner.caption_folder(fresh, model.url, "m")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert captioner.Server(model.url, "m").headers["Authorization"] == "Bearer secret"
    model.close()
