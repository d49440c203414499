"""python -m pytest tests/test_captions.py -q

A real HTTP server on 127.0.0.1 recognises the patch that it is shown, and has its moods.
"""

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
import tifffile
import torch
from conftest import Script, script
from PIL import Image

import data
import text
from prepare import captions, pathgen
from prepare.slide import Slide
from prepare.tile import tile

SMALL = """--bags 2 --steps 2 --log_every 1 --workers 0 --eval_every 0 --device cpu
--init none""".split()


def write_slide(path, side, mpp, seed=0):
    """Write a slide whose 16 x 16 cells have colours of their own, so each can be recognised."""
    rng = np.random.default_rng(seed)
    tints = rng.integers(90, 170, (16, 16, 3)) + np.array([40, -40, 20])
    image = np.kron(tints, np.ones((side // 16, side // 16, 1), int)).astype(np.uint8)
    about = f"Aperio Image Library\r\n{side}x{side}|MPP = {mpp}"
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), description=about)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two slides, 4 bags each, of 40x and of 20x: at most 4 * 85 + 4 * 21 patches of 16 pixels."""
    folder = tmp_path_factory.mktemp("captions")
    write_slide(folder / "a.svs", 1024, 0.25, seed=1)
    write_slide(folder / "b.svs", 512, 0.5, seed=2)
    tile(folder, folder / "bags", patch_px=16, fov_px=64)
    return folder / "bags"


@pytest.fixture
def fresh(shards, monkeypatch):
    """No captions yet, and short pauses."""
    for path in [*shards.glob("*.captions.*"), *shards.glob("*.failures.*")]:
        path.unlink()
    monkeypatch.setattr(captions, "PAUSES", (0.02, 0.05, 0.05))
    return shards


ANSWERS = {
    "busy": (429, "slow down"),
    "broken": (500, "oh"),
    "garbage": (200, None),
    "empty": (200, " \n"),
    "sorry": (200, "I'm sorry, but I cannot help."),
    "no": (400, "bad picture"),
    "odd": (200, ["no", "text"]),
    "lost": (404, "no such model"),
}


class Model:
    """A chat server that answers with key and node of the stored patch nearest to its picture.

    moods: {node: what to do first, instead of answering}; delay: seconds for each answer.
    """

    def __init__(self, shards, moods=None, delay=0.0):
        bags = data.Bags(shards)
        self.names = [(key, node) for key in bags.keys for node in range(85)]
        patches = [data.pyramid(bags[i]["image"][None])[0] for i in range(len(bags))]
        self.known = torch.cat(patches).flatten(1)
        self.moods = {node: list(todo) for node, todo in (moods or {}).items()}
        self.delay = delay
        self.answered = Counter()
        self.asked = Counter()
        self.wrong = []
        self.lock = threading.Lock()
        model = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(200, json.dumps({"data": [{"id": "m"}]}).encode())

            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, said = model.look(self.path, question)
                time.sleep(model.delay)
                if status == 200 and said is not None:
                    message = {"message": {"content": said}, "finish_reason": "stop"}
                    said = json.dumps({"choices": [message]})
                self.reply(status, (said or "{broken").encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def look(self, path, question):
        """Choose an answer -> status, text; note what is odd about the question."""
        image, said = question["messages"][0]["content"]
        raw = image["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(raw))))
        patch = torch.from_numpy(pixels).permute(2, 0, 1).flatten() / 255
        distance = (self.known - patch).abs().mean(1)
        name = self.names[int(distance.argmin())]
        form = (path, question["model"], question["temperature"], said["text"])
        with self.lock:
            expected = ("/v1/chat/completions", "m", 0, captions.PROMPT)
            if form != expected or distance.min() > 0.03:
                self.wrong.append((form, float(distance.min())))
            self.asked[name] += 1
            todo = self.moods.get(name[1])
            if todo:
                return ANSWERS[todo.pop(0)]
            self.answered[name] += 1
        return 200, f"{name[0]} {name[1]}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    """Start models, and stop them at the end."""
    models = []

    def start(*args, **kwargs):
        models.append(Model(*args, **kwargs))
        return models[-1]

    yield start
    for model in models:
        model.close()


def ask(shards, url, model="m", concurrency=8, **more):
    mags = more.pop("mags", data.MAGS)
    return captions.ask(shards, captions.Server(url, model, **more), mags, concurrency)


def total(shards):
    """Count the patches to caption."""
    return int(data.Bags(shards).valid.sum())


def rows(shards, suffix="jsonl", kind="captions"):
    lines = []
    for path in sorted(shards.glob(f"*.{kind}.{suffix}")):
        lines += [line for line in path.read_text().split("\n") if line.endswith("}")]
    return [json.loads(line) for line in lines]


def check_complete(shards, model):
    """Every valid node has one caption, its own, in order, and text.Captions reads them."""
    bags = data.Bags(shards)
    read = text.Captions(shards)
    lines = rows(shards)
    assert [(row["key"], row["node"]) for row in lines] == [
        (bags.keys[i], node) for i in range(len(bags)) for node in range(85) if bags.valid[i, node]
    ]
    for row in lines:
        assert row["caption"] == read[row["key"]][row["node"]] == f"{row['key']} {row['node']}"
        assert row["model"] == "m" and row["prompt"] == captions.PROMPT
    assert len(lines) > 300 and model.wrong == []
    assert not list(shards.glob("*.part"))


def test_every_patch_is_captioned_through_all_troubles(fresh, serve, capsys):
    moods = {0: ["busy"] * 3, 3: ["broken"], 9: ["garbage", "busy"], 17: ["empty"]}
    moods |= {18: ["sorry"], 40: ["no"], 41: ["odd"]}
    model = serve(fresh, moods)
    done = dict(captions=total(fresh) - 3, failed=3, elsewhere=0)
    assert ask(fresh, model.url).items() > done.items()
    told = capsys.readouterr().err
    for reason in ("1 x empty", "1 x refused: I'm sorry", "1 x 400 bad picture"):
        assert reason in told
    again = ask(fresh, model.url + "/chat/completions/")
    assert again == dict(captions=3, failed=0, elsewhere=0, total=total(fresh))
    check_complete(fresh, model)
    # Nobody was asked again after an answer.
    assert set(model.answered.values()) == {1}
    assert model.asked.total() == total(fresh) + sum(map(len, moods.values()))
    before = [path.read_bytes() for path in sorted(fresh.glob("*.captions.jsonl"))]
    assert ask(fresh, model.url) == dict(again, captions=0)
    assert before == [path.read_bytes() for path in sorted(fresh.glob("*.captions.jsonl"))]


def test_what_a_model_refuses_for_ever_does_not_block_the_road(fresh, serve, tmp_path):
    model = serve(fresh, {40: ["sorry"] * 99})
    command = ["prepare.captions", "ask", fresh, "--endpoint", model.url, "--model", "m"]
    done = script(*command)
    count = int(data.Bags(fresh).valid[:, 40].sum())
    assert done.returncode == 0, done.stderr
    allowed = (
        f"{count} of {total(fresh)} patches in {fresh} have no caption: `train.py --missing 0.01`"
    )
    assert allowed in done.stdout
    refused = rows(fresh, kind="failures")
    assert [row["node"] for row in refused] == [40] * count
    assert {row["reason"] for row in refused} == {"refused: I'm sorry, but I cannot help."}

    # A file fills the gaps and changes nothing.
    before = {(row["key"], row["node"]): row for row in rows(fresh)}
    (tmp_path / "x.jsonl").write_text(
        '{"key": "a-00", "caption": "fat"}\n{"key": "z", "caption": "x"}'
    )
    read = script("prepare.captions", "read", tmp_path / "x.jsonl", "--shards", fresh)
    assert read.returncode == 0, read.stderr
    assert f"1 captions filled in; {len(before)} were there" not in read.stdout
    assert "1 records of 1 names fit no bag of " in read.stderr
    assert (
        f"{count - 1} of {total(fresh)} patches in {fresh} have no caption: `train" in read.stdout
    )
    after = {(row["key"], row["node"]): row for row in rows(fresh)}
    assert before.items() < after.items()
    assert after["a-00", 40] == dict(key="a-00", node=40, caption="fat", source="bag")

    # The model is asked for the others alone; of more than one in a hundred it is told.
    model.moods[40] = []
    again = script(*command)
    assert again.returncode == 0 and f"{count - 1} new captions" in again.stdout
    assert not list(fresh.glob("*.failures.jsonl"))
    forget(fresh)
    model.moods[0] = ["sorry"] * 99
    many = script(*command, "--levels", "5")
    assert many.returncode == 1 and "failures.jsonl: repeat the command" in many.stderr


def test_refusals_in_a_row_do_not_stop_the_others(fresh, serve, monkeypatch):
    monkeypatch.setattr(captions, "MOST_FAILURES", 3)
    model = serve(fresh, {node: ["sorry", "empty"] for node in range(80)})
    assert ask(fresh, model.url, concurrency=1)["captions"] > 0
    model.look = lambda path, question: ANSWERS["no"]
    with pytest.raises(ValueError, match="3 questions in a row failed"):
        ask(fresh, model.url, concurrency=1)


def test_captions_of_some_magnifications_say_what_training_needs(fresh, serve):
    command = ["prepare.captions", "ask", fresh, "--endpoint", serve(fresh).url, "--model", "m"]
    done = script(*command, "--levels", "5,10")
    assert done.returncode == 0 and "have no caption: `train.py --missing 0.9" in done.stdout


def test_a_server_that_dies_and_comes_back(fresh, serve):
    model = Model(fresh, delay=0.01)
    threading.Timer(0.4, model.close).start()
    with pytest.raises(ValueError, match="questions in a row failed at .*the same command cont"):
        ask(fresh, model.url, concurrency=4)
    first = len(rows(fresh, "*"))
    assert 0 < first < total(fresh)
    with pytest.raises(ValueError, match="no server at"):
        ask(fresh, model.url)
    back = serve(fresh)
    ask(fresh, back.url, concurrency=4)
    check_complete(fresh, back)
    assert back.answered.total() == total(fresh) - first


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_killed_and_comes_back(fresh, serve, how):
    model = serve(fresh, delay=0.03)
    command = ["prepare.captions", "ask", fresh, "--endpoint", model.url, "--model", "m"]
    command += ["--concurrency", "4"]
    client = Script(
        *command, before=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    until = time.time() + 30
    while len(rows(fresh, "*")) < 60 and time.time() < until:
        time.sleep(0.01)
    os.kill(client.pid, how)
    done = client.wait()
    assert "Traceback" not in done.stderr
    first = len(rows(fresh, "*"))
    assert 60 <= first < total(fresh)
    if how == signal.SIGINT:
        # The questions in hand are answered first.
        assert done.returncode == 130 and "what is written is kept" in done.stderr
        assert model.answered.total() == first
    # The line that was being written.
    with open(sorted(fresh.glob("*.captions.part"))[0], "a") as file:
        file.write('{"key": "a-0')
    model.delay = 0
    again = script(*command)
    assert again.returncode == 0 and f"{total(fresh) - first} new captions" in again.stdout
    check_complete(fresh, model)
    assert model.answered.total() <= total(fresh) + 4


def test_two_processes_share_a_folder(fresh, serve):
    model = serve(fresh, delay=0.01)
    command = ["prepare.captions", "ask", fresh, "--endpoint", model.url, "--model", "m"]
    for client in [Script(*command, "--concurrency", "2") for _ in range(2)]:
        assert client.wait().returncode == 0
    # A shard that both passed over at the same moment, if any.
    ask(fresh, model.url)
    check_complete(fresh, model)
    assert set(model.answered.values()) == {1}


def test_what_is_wrong_with_a_server_is_said_in_one_sentence(fresh, serve, monkeypatch):
    model = serve(fresh)
    for endpoint, name, words in (
        ("localhost:8000", "m", "is no address"),
        ("http://", "m", "is no address"),
        ("http://127.0.0.1:9/v1", "m", "no server at .* answers"),
        ("http://127.0.0.1:x/v1", "m", "no server at .* answers"),
        (model.url, "other", "serves m, not --model other"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            ask(fresh, endpoint, name)
        assert "\n" not in str(e.value)
    ask(fresh, model.url, mags=[5])
    assert {row["node"] for row in rows(fresh)} == {0}
    with pytest.raises(ValueError, match="not 'm' and 'What is this.*move the file away"):
        ask(fresh, model.url, prompt="What is this?")
    with pytest.raises(ValueError, match="holds no bags"):
        ask(fresh / "nowhere", model.url)
    model.look = lambda path, question: ANSWERS["lost"]
    with pytest.raises(ValueError, match="refuses .404 no such model.: check --endpoint"):
        ask(fresh, model.url)
    for flags in (["--levels", "7"], ["--concurrency", "0"]):
        bad = script("prepare.captions", "ask", fresh, "--endpoint", "x", "--model", "m", *flags)
        assert bad.returncode == 1 and "error: --levels takes some of" in bad.stderr


@pytest.mark.parametrize(
    "key,login",
    [("sk-SECRET\n\r\n", ""), ("", "me:pa%24SECRET@"), ("sk-SECRET", "SECRET@")],
)
def test_a_key_is_sent_and_never_shown(key, login, fresh, serve, monkeypatch):
    """Not even if the server says it: of the headers, in an error or instead of a caption."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    model = serve(fresh)
    sent = []
    handler = model.server.RequestHandlerClass

    def echo(self):
        sent.append(self.headers["Authorization"])
        # Where what is shown ends, there is a key.
        start = "I cannot say \x1b[3m".ljust(183, ".")
        content = f"{start} {key.strip() or 'pa$SECRET'} {self.headers}"
        message = {"message": {"content": content}, "finish_reason": "content_filter"}
        said = content if status > 200 else json.dumps({"choices": [message]})
        self.reply(status, said.encode())

    handler.do_POST = echo
    endpoint = model.url.replace("://", f"://{login}")
    command = ["prepare.captions", "ask", fresh, "--endpoint", endpoint, "--model", "m"]
    hidden = base64.b64encode(b"me:pa$SECRET").decode()
    for status in (200, 400, 401):  # noqa: B007
        done = script(
            *command, "--levels", "5", before=lambda: os.environ.update(OPENAI_API_KEY=key)
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr and "***" in done.stderr
        for said in (done.stdout, done.stderr, *(p.read_text() for p in fresh.glob("*.jsonl"))):
            assert "SECR" not in said and hidden not in said and "\x1b" not in said
    assert set(sent) == {"Bearer sk-SECRET" if key else f"Basic {hidden}"}


def test_a_key_that_is_none_is_not_quoted(fresh, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nSECRET")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has a sign") as e:
        ask(fresh, "http://127.0.0.1:9/v1")
    assert "SECRET" not in str(e.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="is no address") as e:
        ask(fresh, "me:SECRET@127.0.0.1")
    assert "SECRET" not in str(e.value)


def test_a_key_does_not_follow_to_another_host(fresh, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET")
    model, other = serve(fresh), serve(fresh)
    sent = []

    def lead(self):
        self.send_response(302)
        self.send_header("Location", other.url)
        self.end_headers()

    def note(self):
        sent.append(self.headers["Authorization"])
        self.reply(200, b"{}")

    model.server.RequestHandlerClass.do_GET = lead
    model.server.RequestHandlerClass.do_POST = lead
    other.server.RequestHandlerClass.do_GET = note
    ask(fresh, model.url, mags=[5])
    assert sent and set(sent) == {None}


def test_a_server_that_does_not_end_is_left(fresh, serve, monkeypatch):
    monkeypatch.setattr(captions, "TIMEOUT", 0.5)
    monkeypatch.setattr(captions, "PAUSES", ())
    model = serve(fresh)
    handler = model.server.RequestHandlerClass
    sent = 0

    def send(self, piece, pause, status=200):
        nonlocal sent
        self.send_response(status)
        self.end_headers()
        sent = 0
        while sent < 2**26:
            self.wfile.write(piece)
            self.wfile.flush()
            sent += len(piece)
            time.sleep(pause)

    def start():
        server = captions.Server(model.url, "m")
        server.check()
        return server.ask(b"")

    # A byte now and then, in an answer or in an error; gigabytes; the same in the list of models.
    for status in (200, 500):
        handler.do_POST = lambda self, status=status: send(self, b" ", 0.1, status)
        began = time.monotonic()
        assert start() == (None, "no answer (ValueError('its answer does not end'))")
        assert time.monotonic() - began < 3
    monkeypatch.setattr(captions, "TIMEOUT", 60)
    handler.do_POST = handler.do_GET = lambda self: send(self, bytes(2**16), 0)
    assert "does not end" in start()[1]
    assert sent < 2**24


@pytest.mark.parametrize(
    "names,words",
    [
        ([7, "\x1b[31mred\n"], r"serves 7, \[31mred, not --model m"),
        ("[" * 100_000, "fell silent"),
        ({"a": 1}, "fell silent"),
    ],
)
def test_odd_lists_of_models_are_one_sentence(names, words, fresh, serve):
    model = serve(fresh)
    content = names
    if isinstance(names, list):
        content = json.dumps({"data": [{"id": name} for name in names]})
    handler = model.server.RequestHandlerClass
    handler.do_GET = lambda self: self.reply(200, str(content).encode())
    model.look = lambda path, question: (404, "fell silent")
    with pytest.raises(ValueError, match=words) as e:
        ask(fresh, model.url)
    assert str(e.value).isprintable()


def test_a_broken_letter_costs_nothing_and_a_key_is_no_caption(fresh, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    model = serve(fresh)
    model.look = lambda path, question: (200, "fat \ud800 and\nnests for sk-1")
    assert ask(fresh, model.url, mags=[5])["failed"] == 0
    assert {row["caption"] for row in rows(fresh)} == {"fat ? and nests for ***"}


# ---------------------------------------------------------------- captions made elsewhere


def forget(shards):
    for path in shards.glob("*.captions.*"):
        path.unlink()


def told(shards):
    return {(row["key"], row["node"]): (row["caption"], row["source"]) for row in rows(shards)}


def test_read_tells_nodes_of_image_bag_and_slide(fresh, tmp_path, capsys):
    source = tmp_path / "slides.jsonl"
    source.write_text('{"slide": "c.svs", "caption": "fat"}\n')
    with pytest.raises(ValueError, match="slides.jsonl has no caption for these bags"):
        captions.read(source, fresh)
    assert f"1 records of 1 names fit no bag of {fresh}, as c.svs" in capsys.readouterr().err
    assert not list(fresh.glob("*.captions.jsonl"))
    source.write_text('{"slide": "a.svs", "title_en": "Fat", "organ_en": "", "note": "a wall."}\n')
    captions.read(source, fresh)
    # All patches of tissue, and none of glass.
    valid = dict(zip(data.Bags(fresh).keys, data.Bags(fresh).valid.tolist(), strict=True))
    assert set(told(fresh)) == {
        (key, node) for key in valid for node in range(85) if valid[key][node] and key[0] == "a"
    }
    assert set(told(fresh).values()) == {("Fat. a wall", "slide")}

    # The nearest counts: the image's, the bag's, the slide's.
    forget(fresh)
    source = tmp_path / "more.csv"
    source.write_text(
        'image,caption,node\na-00_17.png,one node,\nsome/a-00.jpg,"a bag, all\nof it",\n'
        "a,a slide,\na-00,by number,20\na-00,too far,85\na.b,other,\na.b,other,\na.svs,new,\n",
        encoding="utf-8-sig",
    )
    captions.read(source, fresh)
    said = capsys.readouterr().err
    assert f"3 records of 2 names fit no bag of {fresh}, as a-00, a.b (a node" in said
    assert "1 second captions of one place are left out" in said
    found = told(fresh)
    assert found["a-01", 3] == ("a slide", "slide")
    special = {17: ("one node", "image"), 20: ("by number", "image")}
    for node in range(85):
        usual = ("a bag, all of it", "bag") if valid["a-00"][node] else None
        assert found.get(("a-00", node)) == special.get(node, usual)

    # A JSON file for each image, as the authors' release leaves them.
    release = tmp_path / "release"
    release.mkdir()
    for node in (0, 84):
        row = {"Image": f"/data/a-00_{node}.jpg", "Answer": f"The image {node}.", "model_id": "m"}
        (release / f"{node}.json").write_text(json.dumps(row))
    forget(fresh)
    captions.read(release, fresh)
    assert told(fresh) == {
        ("a-00", 0): ("The image 0", "image"),
        ("a-00", 84): ("The image 84", "image"),
    }
    assert text.Captions(fresh)["a-00"][84] == "The image 84"


def test_file_and_model_fill_what_the_other_left(fresh, serve, tmp_path):
    model = serve(fresh)
    ask(fresh, model.url, mags=[5])
    source = tmp_path / "slides.jsonl"
    source.write_text('{"slide": "a.tif", "caption": "fat"}')
    bags = data.Bags(fresh)
    n = int(bags.valid[[key[0] == "a" for key in bags.keys]].sum())
    assert captions.read(source, fresh) == dict(filled=n - 4, there=4)
    assert captions.read(source, fresh) == dict(filled=0, there=n)
    assert {row.get("model") for row in rows(fresh) if row["node"] == 0} == {"m"}
    ask(fresh, model.url)
    assert {row["caption"] for row in rows(fresh) if row["key"] == "a-00"} == {"a-00 0", "fat"}
    assert {row.get("model") for row in rows(fresh) if row["key"][0] == "b"} == {"m"}


@pytest.mark.parametrize(
    "name,content",
    [
        ("x.json", '\n[{"slide": "a", "caption": "fat"},\n{"key": "b-00", "caption": "fat"}]'),
        ("x.jsonl", '{"filename": "a.svs", "text": "fat"}\n{"image": "b-00", "Caption": "fat"}'),
        ("x.csv", "image_path,text\nquilt/a.jpeg,fat\nb-00.png,fat\n"),
        ("x.csv", "Image Name , Answer\na.mrxs,fat\nb-00,fat\n"),
    ],
)
def test_tables_in_their_usual_forms_are_read(name, content, fresh, tmp_path):
    (tmp_path / name).write_text(content)
    captions.read(tmp_path / name, fresh)
    read = text.Captions(fresh)
    assert [read[key][3] for key in ("a-00", "a-03", "b-00", "b-01")] == ["fat"] * 3 + [None]


@pytest.mark.parametrize(
    "content,words",
    [
        ('{"slide": "a.svs", "words": "fat"}', 'expected "key", "slide" .*not slide, words'),
        ('{"wsi_id": "a", "position": [1, 2], "caption": "x"}', "`pathgen` reads the list"),
        ('{"slide": ', "x.jsonl:1: not JSON"),
        ('{"slide": "a.svs", "caption": "x", "node": 1.7}', "x.jsonl:1: expected"),
        ('{"slide": "a.svs", "caption": "x", "node": Infinity}', "x.jsonl:1: expected"),
        ('{"slide": "a.svs", "caption": "x", "node": "\u00b2"}', "x.jsonl:1: expected"),
        ('{"slide": "a.svs", "caption": 7}', "x.jsonl:1: expected"),
        ('{"slide": 7, "caption": "x"}', "x.jsonl:1: expected"),
        ("[1]", "x.jsonl:1: expected"),
        ('{"slide": "a.svs", "caption": "x", "node": 5}', "has no caption for these bags"),
        ("", "has no caption for these bags"),
    ],
)
def test_captions_that_cannot_be_read_are_one_sentence(content, words, fresh, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        captions.read(tmp_path / "x.jsonl", fresh)
    assert not list(fresh.glob("*.captions.jsonl"))


def test_odd_but_whole_captions_are_read(fresh, tmp_path):
    source = tmp_path / "x.jsonl"
    # Half an emoji, an odd line end.
    source.write_text('{"slide": "a.svs", "caption": "fat \\ud83d\u2028nests"}')
    captions.read(source, fresh)
    assert text.Captions(fresh)["a-00"][0] == "fat ? nests"
    # A cell of two lines counts as an editor counts it.
    (tmp_path / "y.csv").write_text('slide,caption,node\na.svs,"two\nlines",\na.svs,fat,x\n')
    with pytest.raises(ValueError, match="y.csv:4: expected"):
        captions.read(tmp_path / "y.csv", fresh)
    (tmp_path / "x.csv").write_bytes(b"slide,caption\na.svs,\xff\n")
    with pytest.raises(ValueError, match="x.csv is no CSV in UTF-8"):
        captions.read(tmp_path / "x.csv", fresh)
    (tmp_path / "z.csv").write_text("slide,caption\na.svs,fat, and nests\n")
    with pytest.raises(ValueError, match="z.csv:2: .*quote commas"):
        captions.read(tmp_path / "z.csv", fresh)
    with pytest.raises(OSError, match="nowhere"):
        captions.read(tmp_path / "nowhere.jsonl", fresh)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no .*json"):
        captions.read(tmp_path / "empty", fresh)


# ---------------------------------------------------------------- PathGen


def test_place_bags_by_hand():
    """At 0.25 um/px and 672 pixels at 5x, a square is a 40x patch; a bag is 5376 pixels wide."""
    squares = [(4 * 672 + 100, 4 * 672, "one", "f"), (5 * 672 + 100, 3 * 672 + 50, "two", "f")]
    squares += [(4 * 672 + 150, 4 * 672, "worse", "f"), (20000, 0, "outside", "f")]
    bags, rows = pathgen.place_bags((9000, 9000), 0.25, squares, 672)
    assert bags == [(100, 0, 5376)]
    place = {node: data.square(node, *bags[0]) for _, node in rows}
    assert {rows[0, node]["caption"]: place[node] for node in place} == {
        "one": (4 * 672 + 100, 4 * 672, 672),
        "two": (5 * 672 + 100, 3 * 672, 672),
    }
    # At 0.5 um/px it is a 20x patch.
    bags, rows = pathgen.place_bags((9000, 9000), 0.5, squares[:1], 672)
    (node,) = (node for _, node in rows)
    assert data.LEVEL[node] == 2
    assert data.square(node, *bags[0]) == (4 * 672 + 100, 4 * 672, 672)


def test_pathgen_makes_bags_and_captions(tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "TCGA-1.A.svs", 6144, 0.25)
    squares = [
        {"wsi_id": "TCGA-1.A", "position": ["1000", "2000"], "caption": " Nests\nof. "},
        {"wsi_id": "TCGA-1.A.svs", "position": [1672, 2000], "caption": "Fat."},
        {"wsi_id": "TCGA-2", "position": [0, 0], "caption": "Glands."},
    ]
    source = tmp_path / "list.json"
    source.write_text(json.dumps(squares))
    command = ["prepare.captions", "pathgen", source, "--slides", tmp_path / "slides"]
    command += ["--out", tmp_path / "data/train", "--patch-px", "28"]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert "2 captions of 2 squares on 1 slides" in done.stdout
    assert "1 slides of the list are not there" in done.stdout
    bags = data.Bags(tmp_path / "data/train")
    assert len(bags) == 1 and bags[0]["image"].shape == (3, 224, 224)
    read = text.Captions(tmp_path / "data/train")[bags.keys[0]]
    where = {caption: node for node, caption in enumerate(read) if caption}
    about = bags.meta[0]
    for caption, x in (("Nests of.", 1000), ("Fat.", 1672)):
        spot = data.square(where[caption], about["x"], about["y"], about["side"])
        assert spot == (x, 2000, 672)
        assert bags.valid[0, where[caption]]
    # The stored patch is what the slide holds there.
    with Slide(tmp_path / "slides" / "TCGA-1.A.svs") as slide:
        truth = slide.read(1000, 2000, 672, 28)
    patch = data.pyramid(bags[0]["image"][None])[0, where["Nests of."]]
    off = patch.permute(1, 2, 0).numpy() * 255 - truth
    assert np.abs(off).mean() < 4
    assert "captions: `train.py" not in done.stdout and "have no caption: `train.py" in done.stdout
    # Lines of objects in another order are the same list; another caption is noticed.
    source.write_text("\n".join(map(json.dumps, squares[::-1])))
    again = script(*command)
    assert again.returncode == 0 and again.stdout == done.stdout
    source.write_text(json.dumps([squares[0], squares[1] | {"caption": "Bone."}]))
    other = script(*command)
    assert other.returncode == 1 and "or another list" in other.stderr
    source.write_text(json.dumps(squares))
    changed = script(*command, "--fov-px", "512")
    assert changed.returncode == 1 and "with other settings" in changed.stderr


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "{}",
        '[{"wsi_id": "a", "position": [Infinity, 1], "caption": "x"}]',
        '[{"wsi_id": "a"}]',
        '[{"wsi_id": "a", "position": [1], "caption": "x"}]',
    ],
)
def test_what_is_not_pathgens_list_is_one_sentence(content, tmp_path):
    (tmp_path / "list.json").write_text(content)
    write_slide(tmp_path / "b.svs", 512, 0.25)
    with pytest.raises(
        ValueError, match="list.json is not PathGen's list|--slides has none of the"
    ):
        pathgen.make_bags(tmp_path / "list.json", tmp_path, tmp_path / "out")


def test_pathgens_bags_can_be_trained_on(tmp_path):
    """Two squares of a slide are told, all other nodes are not."""
    slides = tmp_path / "slides"
    slides.mkdir()
    squares = []
    for i in range(3):
        write_slide(slides / f"T-{i}.svs", 6144, 0.25, seed=i)
        for k, tissue in enumerate(("Nests", "Fat")):
            caption = f"{tissue} of tumour {i}."
            squares.append({"wsi_id": f"T-{i}", "position": [900 * k, 900], "caption": caption})
    (tmp_path / "list.json").write_text(json.dumps(squares))
    pathgen.make_bags(tmp_path / "list.json", slides, tmp_path / "data/train", patch_px=64)
    argv = ["train.py", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL]
    refused = script(*argv)
    assert refused.returncode == 1 and "allow a share by --missing" in refused.stderr
    script(*argv, "--missing", "1", check=True)
    losses = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert losses and all(np.isfinite(row["loss"]) for row in losses if "loss" in row)
