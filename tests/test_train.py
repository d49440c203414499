"""Test settings, schedule and the real script: pytest tests/test_train.py

Killed equals undisturbed, two processes equal one, cached equals online, mistakes get one sentence.
"""

import copy
import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSSES, Script, script
from torch._dynamo.testing import CompileCounterWithBackend

import data
import evaluate
import losses
import text
import train
from dev import curves, kills
from prepare import features

ROOT = Path(__file__).resolve().parent.parent
SMALL = """--bags 4 --log_every 1 --warmup 2 --workers 0 --eval_every 0 --device cpu
--init none""".split()


def launch(nproc):
    """Return how torchrun starts a script on so many processes."""
    where = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", *where]


def run(*argv, check=True):
    """Run train.py in a process of its own, from the repository's root."""
    return script("train.py", *argv, timeout=120, check=check)


def start_two(*argv, before=lambda: None):
    """Start train.py on two processes, after a call of before in each -> their Scripts."""
    # Forks start sooner than torchrun.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}

    def join(rank):
        os.environ.update(env, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank))
        before()

    return [Script("train.py", *argv, before=functools.partial(join, rank)) for rank in (0, 1)]


def run_two(*argv, before=lambda: None):
    """Run train.py on two processes -> what the first one printed."""
    done = [fork.wait(120) for fork in start_two(*argv, before=before)]
    assert all(one.returncode == 0 for one in done), done
    return done[0].stdout + done[0].stderr


def main(world, out, *argv):
    """Run train.main in this process on the tiny world."""
    train.main(["--data", str(world), "--out", str(out), *SMALL, *map(str, argv)])


def weights_of(folder):
    return evaluate.read_checkpoint(folder)[0]


def setup(world, *argv):
    """Build the batches and the objective of a tiny run."""
    cfg = train.parse(["--bags", "4", *argv])
    bags, captions = data.Bags(world / "train"), text.Captions(world / "train")
    corpus = data.count_keywords(bags, captions)
    tokenizer = train.choose_tokenizer(cfg, bags, captions, None)
    objective = losses.Objective(train.build_model(cfg, tokenizer), cfg)
    return data.Batches(bags, captions, tokenizer, corpus, cfg, 64), objective.train()


# ---- settings ------------------------------------------------------------------------------------


def test_flags_parse_by_type_and_mistakes_are_named():
    cfg = train.parse("--lr 1 --compile false --steps=7 --out a=b --own-captions .5".split())
    found = (cfg.lr, cfg.compile, cfg.steps, cfg.out, cfg.own_captions)
    assert found == (1.0, False, 7, "a=b", 0.5)
    paper = train.parse("--preset paper --k_o 3 --vision random".split())
    assert (paper.k_o, paper.size, paper.data) == (3, "paper", "data/synthetic-224")
    for argv, message in (
        (["--preset", "x"], "unknown preset"),
        (["--children", "3"], "1, 2 or 4"),
        (["--text", "x"], "needs --tokenizer"),
        (["--preset", "paper"], "needs --vision FILE .*UNI"),
        (["--preset", "paper", "--vision", "x"], "--text FILE .*QuiltNet"),
        (["--cache", "true"], "needs --freeze_vision"),
        (["--bags", "0"], ">= 1"),
        (["--negatives", "x"], "bag or batch"),
        (["--missing", "nan"], "share of the patches"),
        (["--save_every", "0"], ">= 1"),
        (["--pairs", "0"], "pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            train.parse(argv)


def test_the_paper_preset_does_what_the_text_says():
    cfg = train.parse("--preset paper --vision random".split())
    assert all(getattr(cfg, name) == 1 for name in LOSSES)
    said = (cfg.own_captions, cfg.negatives, cfg.near, cfg.kin, cfg.balance, cfg.children)
    assert said == (0.0, "bag", 1.0, 0.0, False, 4)


def test_schedule_by_hand():
    cfg = train.Config(lr=1.0, warmup=10, steps=110)
    rates = [train.learning_rate(step, cfg) for step in range(111)]
    assert rates[0] == 0.1 and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.505) and rates[110] == pytest.approx(0.01)
    # A NumPy scalar would not load with weights_only.
    assert all(type(rate) is float for rate in rates)


def test_weight_zero_removes_a_loss_and_every_parameter_learns(world):
    batches, objective = setup(world, "--cvta", "0")
    batch = data.to_device(batches[0], objective.cfg, "cpu")
    assert set(objective(batch)[0]) == {"itc", "itm", "mlm", "plm", "mrtva"}
    batches, objective = setup(world)
    parts, _ = objective(batch)
    sum(parts.values()).backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    # An untrained model stands at chance: ln M, and ln(vocabulary). ITC's logits vary with
    # variance 1 / (d tau^2), of which half is added.
    rows = int(batch["valid"].sum())
    chance = torch.tensor(float(rows)).log().item() + 0.5 / (128 * 0.07**2)
    assert parts["itc"].item() == pytest.approx(chance, abs=0.6)
    vocab = torch.tensor(float(batches.tokenizer.size)).log().item()
    assert parts["plm"].item() == pytest.approx(vocab, abs=0.5)


def test_the_optimiser_has_four_kinds_of_groups(world):
    _, objective = setup(world)
    groups = train.make_optimizer(objective, objective.cfg).param_groups
    kinds = {(group["factor"], group["weight_decay"]) for group in groups}
    assert kinds == {(f, d) for f in (1.0, 2.0, 0.1) for d in (0.0, 0.02)}
    model = objective.model
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for p in (model.vision.pos_embed, model.text.positional_embedding, model.kind, model.itc_scale):
        assert id(p) in spared
    assert id(model.text.token_embedding.weight) not in spared


def test_a_frozen_tower_enters_neither_optimiser_nor_checkpoint_changes(world, tmp_path):
    main(world, tmp_path / "run", "--freeze_vision", "true", "--steps", 2)
    after = weights_of(tmp_path / "run")["model"]
    cfg = train.parse(["--freeze_vision", "true"])
    tokenizer = text.Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    model = train.build_model(cfg, tokenizer)
    before = model.state_dict()
    same = {k for k in after if torch.equal(after[k], before[k])}
    # The averages of batch norms stay, too.
    assert same == {k for k in after if k.startswith("vision.")}
    objective = losses.Objective(model, cfg)
    train.freeze(model.vision, "cpu")
    groups = train.make_optimizer(objective, cfg).param_groups
    held = {id(p) for group in groups for p in group["params"]}
    frozen = {id(p) for p in model.vision.parameters()}
    assert not held & frozen and len(held) > 50


def test_mistakes_get_one_sentence(world, tmp_path):
    done = run("--stesp", "3", check=False)
    assert done.returncode == 2 and "unrecognized arguments: --stesp 3" in done.stderr
    (tmp_path / "empty" / "train").mkdir(parents=True)
    nothing = [word for name in LOSSES for word in (f"--{name}", 0)]
    paper = ["--preset", "paper", "--text", "q", "--tokenizer", "b", "--vision", "uni.bin"]
    for argv, message in (
        (["--data", tmp_path / "empty"], "holds no"),
        (["--data", world, "--bags", 5, "--accumulate", 2], "cannot be split"),
        (["--data", world, *paper], "b is not CLIP's merge list"),
        (["--data", world, "--vision", "uni.bin"], "uni.bin holds no weights saved by torch"),
        (["--data", world, *nothing], "nothing is learned"),
        (["--data", world, "--init", "no.pt"], "no.pt is no file of prepare.words"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train.main([*SMALL, *map(str, argv), "--out", str(tmp_path / "x")])


# ---- compiling -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiling(world, tmp_path_factory):
    """Start a compiled run of one bag a process and micro-batch, which takes a while -> Scripts."""

    def without_code():
        torch.compile = functools.partial(torch.compile, backend="aot_eager")

    out = tmp_path_factory.mktemp("compiled")
    argv = ["--data", world, "--out", out, *SMALL, "--steps", 4, "--compile", "true"]
    argv += ["--eval_every", 2, "--accumulate", 2, "--pairs", 1]
    return start_two(*argv, before=without_code), out


def test_the_objective_compiles_whole_and_once(world, compiling):
    """Hold one graph for captions shorter than the context, as long as it, and shorter again."""
    argv = "--steps 8 --own_captions 0.4 --compile true".split()
    batches, objective = setup(world, *argv)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, dynamic=False, fullgraph=True, backend=counted)
    lengths = set()
    for i in range(8):
        batch = batches[i]
        if i in (3, 4):
            spare = batches.context - batch["ids"].shape[2]
            batch["ids"] = torch.nn.functional.pad(batch["ids"], (0, spare))
        lengths.add(batch["ids"].shape[2])
        batch = data.to_device(batch, objective.cfg, "cpu")
        twin = copy.deepcopy(objective)
        parts, _ = compiled(batch)
        sum(parts.values()).backward()
        # Compare on both sides of the hand-over.
        if i in (0, 7):
            expected, _ = twin(batch)
            assert set(parts) == set(LOSSES)
            assert all(torch.allclose(parts[k], expected[k], atol=1e-5) for k in parts)
    assert batches.context in lengths and len(lengths) > 1 and counted.frame_count == 1


def test_two_processes_train_compiled(compiling):
    forks, out = compiling
    assert [fork.wait(120).returncode for fork in forks] == [0, 0]
    assert curves.read_log(out)["loss"][0] == [1, 2, 3, 4]


# ---- never lose work -----------------------------------------------------------------------------


def test_a_run_survives_kills_at_random_moments(world, tmp_path):
    """Three of them; `python -m dev.kills` does as many as you like."""
    rounds = kills.torment(world, tmp_path, 20, 3, seed=1)
    assert sum(rounds[:2]) == 3
    assert (tmp_path / "killed" / "ckpt_prev.pt").exists()


def test_a_request_is_granted_and_the_next_process_goes_on(world, tmp_path):
    """SIGTERM to the whole group, as torchrun and a terminal send it: two processes, one, two."""
    more = [*SMALL, "--accumulate", "2", "--pairs", "1"]
    parts = tmp_path / "parts"
    run("--data", world, "--out", tmp_path / "whole", "--steps", 9, *more)

    def until(step, name, nproc):
        argv = ["train.py", "--data", str(world), "--out", str(parts), "--steps", "9", *more]
        argv += ["--workers", "1"]
        with open(tmp_path / "said", "w+") as said:
            if nproc:
                more_ = dict(cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
                first = subprocess.Popen([*launch(nproc), *argv], **more_)
            else:
                first = Script(*argv, before=os.setsid)
            patience = time.time() + 60
            while time.time() < patience:
                if (parts / "log.jsonl").exists():
                    steps = curves.read_log(parts).get("loss", ([0], []))[0]
                    if max(steps) >= step:
                        break
                time.sleep(0.02)
            os.killpg(first.pid, name)
            done = first.wait(timeout=60)
            out = (tmp_path / "said").read_text() if nproc else done.stdout + done.stderr
        assert "stopped at step" in out and (nproc or done.returncode == 0), out
        return weights_of(parts)["step"]

    one = until(1, signal.SIGTERM, 2)
    two = until(one + 1, signal.SIGTERM, 0)
    assert 1 <= one < two <= 9
    again = run_two("--data", world, "--out", parts, "--steps", 9, *more)
    assert f"at step {two} of 9" in again
    rows = [json.loads(line) for line in open(parts / "log.jsonl")]
    assert [row["world"] for row in rows if "world" in row] == [2, 1, 2]
    a, b = curves.read_log(tmp_path / "whole")["loss"], curves.read_log(parts)["loss"]
    # Nine steps of Adam on rounding.
    assert b[0] == list(range(1, 10)) and b[1] == pytest.approx(a[1], rel=0.01)


def test_other_settings_are_refused_and_a_broken_checkpoint_falls_back(
    world, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "r"
    main(world, folder, "--steps", 2, "--save_every", 1, "--lr", 0.002)
    with pytest.raises(ValueError, match=r"ckpt.pt was trained with .* \(lr 0.002 -> 0.5\)"):
        main(world, folder, "--steps", 2, "--lr", 0.5)
    with monkeypatch.context() as other:
        other.setitem(train.networks.SIZES["synthetic"], "simsiam", (64, 32))
        with pytest.raises(ValueError, match="does not fit these settings"):
            main(world, folder, "--steps", 2, "--lr", 0.002)
    more = ["--change", "true", "--lr_vision", 5, "--lr", 0.002]
    main(world, folder, "--steps", 3, "--save_every", 1, *more)
    state = weights_of(folder)
    factors = {group["factor"] for group in state["optimizer"]["param_groups"]}
    assert state["step"] == 3 and factors == {5.0, 0.1, 1.0}
    (folder / "ckpt.pt").write_bytes(b"cut off")
    assert weights_of(folder)["step"] == 2
    assert "ckpt.pt cannot be read" in capsys.readouterr().err
    (folder / "ckpt_prev.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        weights_of(folder)


def test_what_is_not_finite_is_left_out_and_never_learned(world, tmp_path, monkeypatch):
    calls, itm = [], losses.itm

    def spoil(bad):
        calls.clear()

        def broken(*x):
            calls.append(1)
            return itm(*x) * (float("nan") if len(calls) in bad else 1.0)

        monkeypatch.setattr(losses, "itm", broken)

    # The first call counts FLOPs, so call 6 is step 5.
    spoil({6})
    main(world, tmp_path / "a", "--steps", 6, "--save_every", 1, "--log_every", 2)
    rows = curves.read_log(tmp_path / "a")
    assert rows["skipped"][1] == [0, 0, 1]
    assert all(x == x for x in rows["loss"][1]) and weights_of(tmp_path / "a")["step"] == 6
    spoil(set(range(4, 99)))
    with pytest.raises(ValueError, match="no step up to 4 had a finite loss"):
        main(world, tmp_path / "b", "--steps", 8, "--save_every", 1, "--log_every", 2)
    state = weights_of(tmp_path / "b")
    assert all(x.isfinite().all() for x in state["model"].values())
    spoil(set())
    main(world, tmp_path / "b", "--steps", 8, "--save_every", 1, "--log_every", 2)
    assert weights_of(tmp_path / "b")["step"] == 8


# ---- many processes ------------------------------------------------------------------------------


def in_double_precision():
    torch.set_default_dtype(torch.float64)
    data.HED, data.UNMIX = data.HED.double(), data.UNMIX.double()
    augment = data.augment
    data.augment = lambda batch, jitter: augment(batch, jitter).double()


def test_two_processes_have_the_loss_curve_of_one(world, tmp_path):
    """Twenty steps with the hand-over, in double precision: what differs is not rounding."""
    argv = ["--data", world, "--steps", 20, *SMALL, "--pairs", 1]
    script("train.py", *argv, "--out", tmp_path / "one", before=in_double_precision, check=True)
    run_two(*argv, "--out", tmp_path / "two", before=in_double_precision)
    a, b = curves.read_log(tmp_path / "one"), curves.read_log(tmp_path / "two")
    for name in ("loss", *LOSSES, "grad"):
        assert len(a[name][1]) == 20
        assert b[name][1] == pytest.approx(a[name][1], rel=1e-6, abs=1e-9), name


def test_one_dying_process_ends_the_others_and_says_why(world, tmp_path):
    broken = shutil.copytree(world, tmp_path / "broken")
    bags = data.Bags(broken / "train")
    cfg = train.parse(SMALL)
    # Overwrite the first bag of the second process.
    index = data.Batches(bags, None, None, None, cfg, 64, 1, 2).bag_at(2)
    offset, size = bags.meta[index]["jpg"]
    with open(bags.shards[bags.shard_of[index]], "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    argv = ["--data", broken, "--out", tmp_path / "x", "--steps", 20, *SMALL, "--workers", 1]
    command = [*launch(2), "train.py", *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search(rf"error: .*tar.*{bags.keys[index]}.* damaged", done.stderr), done.stderr


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP", "SIGKILL"])
def test_a_signal_to_torchrun_loses_nothing_and_leaves_no_orphan(world, tmp_path, name):
    """torchrun hands SIGHUP on and dies of the others: its process saves and leaves."""
    out = tmp_path / "x"
    argv = ["--data", world, "--out", out, "--steps", 100000, *SMALL, "--save_every", 100000]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch(1), "train.py", *map(str, argv)]
    pipe = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe)
    try:
        wait_for(
            lambda: (out / "log.jsonl").exists() and '"step": 2,' in (out / "log.jsonl").read_text()
        )
        process.send_signal(getattr(signal, name))
        process.wait(timeout=60)
        # The lock is free once the training process has gone.
        wait_for(lambda: is_free(out))
    finally:
        process.kill()
    saved, path = evaluate.read_checkpoint(out)
    assert path.name == "ckpt.pt" and saved["step"] == curves.read_log(out)["loss"][0][-1] >= 2
    assert not (out / "finished").exists()


def wait_for(condition, seconds=60):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.05)


def is_free(folder):
    try:
        return data.lock(folder)
    except ValueError:
        return None


def test_a_second_run_in_a_folder_is_refused(world, tmp_path):
    held = data.lock(tmp_path / "x")
    argv = ("--data", world, "--out", tmp_path / "x", "--steps", 1, *SMALL)
    done = run(*argv, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*x is in use by process \d+ on .*\n", done.stderr)
    held.close()
    assert run(*argv).returncode == 0 and (tmp_path / "x" / "finished").read_text() == "1"
    # A link in the place of the lock is not followed.
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x" / ".lock").unlink()
    (tmp_path / "x" / ".lock").symlink_to(tmp_path / "precious")
    assert run(*argv, check=False).returncode == 1
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_full_disk_costs_no_checkpoint(world, tmp_path):
    """No file may grow beyond 4 MB: the same error, at the same place, as a full disk."""
    out = tmp_path / "x"
    main(world, out, "--steps", 1)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    argv = ("--data", world, "--out", out, "--steps", 2, *SMALL, "--change", "true")
    done = script("train.py", *argv, before=limit)
    assert done.returncode == 1 and re.fullmatch(
        r"error: .*ckpt_new.pt cannot be written \(.*\): make room there\n", done.stderr
    )
    assert weights_of(out)["step"] == 1 and not list(out.glob("*new*")) + list(out.glob(".*.tmp"))
    # A longer run is not finished because a shorter one was.
    assert not (out / "finished").exists()
    run(*argv)
    assert weights_of(out)["step"] == 2 and (out / "finished").read_text() == "2"


def test_loaders_that_would_wait_for_ever_are_refused(monkeypatch):
    cfg = train.parse(["--workers", "8"])
    batch = {"pixels": torch.zeros(1000, dtype=torch.uint8)}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=31_999))
    with pytest.raises(ValueError, match="--shm-size.*--workers"):
        train.check_loaders(batch, cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=32_000))
    train.check_loaders(batch, cfg)
    # Handles of files: 4 batches a loader.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (95, most[1]))
        with pytest.raises(ValueError, match="need 96 open files, the system allows 95: raise it"):
            train.check_loaders(batch, cfg)
        train.check_loaders(batch, dataclasses.replace(cfg, workers=0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_a_lost_tokenizer_and_a_flipped_bit_are_no_loss(world, tmp_path, capsys):
    out = tmp_path / "x"
    main(world, out, "--steps", 2, "--save_every", 1)
    words = evaluate.load_run(out)[1].merges
    (out / "tokenizer.json").write_text('{"merges": []}')
    assert evaluate.load_run(out)[1].merges == words
    # Flip a bit inside a tensor: torch would load it.
    content = bytearray((out / "ckpt.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "ckpt.pt").write_bytes(content)
    main(world, out, "--steps", 3, "--change", "true")
    told = capsys.readouterr()
    assert "checksum" in told.err and "at step 1 of 3" in told.out + told.err


# ---- features of a frozen tower ------------------------------------------------------------------


def test_cached_training_equals_online(world, tmp_path):
    folder = shutil.copytree(world, tmp_path / "world")
    fixed = ["--freeze_vision", "true", "--steps", 4, "--lr", 1e-4]
    main(folder, tmp_path / "online", *fixed, "--flips", "false", "--jitter", 0)
    # A frozen tower is at the end what it was at the start.
    model, _ = evaluate.load_run(tmp_path / "online")
    for part in ("train", "test"):
        bags, name = data.Bags(folder / part), train.networks.features_name(model)
        features.cache_features(model.vision_tokens, bags, name)
    main(folder, tmp_path / "cached", *fixed, "--cache", "true")
    curve = {}
    for name in ("online", "cached"):
        curve[name] = curves.read_log(tmp_path / name)["loss"][1]
    # The features are float16.
    assert curve["cached"] == pytest.approx(curve["online"], rel=2e-3)
    for path in (folder / "train").glob("*.npy"):
        path.unlink()
    with pytest.raises(ValueError, match="run `python -m prepare.features`"):
        main(folder, tmp_path / "none", *fixed, "--cache", "true")


def test_words_of_prepare_are_taken_over(world, tmp_path):
    words = torch.load(world / "words.pt", weights_only=True)
    train.main(
        ["--data", str(world), "--out", str(tmp_path / "r"), *SMALL[:-2], "--steps", "1"]
        + ["--lr", "0"]
    )
    tokenizer = text.Tokenizer.load(tmp_path / "r" / "tokenizer.json")
    assert [list(m) for m in tokenizer.merges] == [list(m) for m in words["tokenizer"]]
    state = weights_of(tmp_path / "r")["model"]
    assert words["model"] and all(torch.equal(state[k], x) for k, x in words["model"].items())


def test_the_default_world_is_made_by_a_process_of_its_own(tmp_path, monkeypatch):
    made = {}

    def note(command, env):
        made.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(train.subprocess, "run", note)
    monkeypatch.setenv("RANK", "0")
    train.make_world("data/synthetic")
    assert made["command"][1:] == ["-m", "prepare.world", "data/synthetic"]
    assert "RANK" not in made["env"]


def test_a_run_goes_on_without_some_captions(world, tmp_path):
    folder = shutil.copytree(world, tmp_path / "data")
    path = sorted((folder / "train").glob("*.captions.jsonl"))[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[3:]))
    argv = ("--data", folder, "--out", tmp_path / "x", "--steps", 2, *SMALL)
    assert "3 of 1990 patches have no caption" in run(*argv).stdout
    refused = run(*argv, "--missing", 0, "--out", tmp_path / "y", check=False)
    assert refused.returncode == 1 and "allow a share by --missing" in refused.stderr


def test_a_log_line_fits_the_screen(world, tmp_path):
    done = run("--data", world, "--out", tmp_path / "x", "--steps", 2, *SMALL)
    lines = [line for line in (done.stdout + done.stderr).split("\n") if "bags/s MFU" in line]
    assert len(lines) >= 2 and all(len(line.split("\r")[-1]) <= 100 for line in lines)


def test_faults_are_told():
    healthy = {"std": 1.0, "own": 0.5, "chance": 0.2, "tau": 0.07}
    assert losses.find_faults(healthy) == []
    for ill, word in (
        ({"std": 0.1}, "collapse"),
        ({"own": 0.2}, "chance"),
        ({"tau": 0.01}, "limit"),
    ):
        assert [word in said for said in losses.find_faults(healthy | ill)] == [True]


def test_config_of_a_run_is_kept(world, tmp_path):
    main(world, tmp_path / "r", "--steps", 1)
    kept = json.loads((tmp_path / "r" / "config.json").read_text())
    assert set(kept) == {f.name for f in dataclasses.fields(train.Config)} and kept["bags"] == 4


def test_a_line_that_a_kill_cut_off_is_ended_first(tmp_path):
    log = tmp_path / "log.jsonl"
    for before, after in (("", ""), ('{"step": 1}\n', '{"step": 1}\n'), ('{"st', '{"st\n')):
        log.write_text(before)
        write, _ = train.open_log(tmp_path, train.Config())
        write({"step": 2})
        assert log.read_text() == after + '{"step": 2}\n'


def test_a_run_keeps_its_name_at_weights_and_biases(world, tmp_path, monkeypatch):
    """A stand-in takes the place of the package: no test opens a run."""
    begun, ids, rows = [], [], []

    def init(**more):
        begun.append(more)
        ids.append(more["id"])
        assert more["project"] == "mine" and more["resume"] == "allow"
        return SimpleNamespace(log=lambda row, step: rows.append(step), finish=begun[-1].clear)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    out = tmp_path / "x"
    for steps in (1, 2):
        main(world, out, "--steps", steps, "--change", "true", "--wandb", "mine")
    assert rows == [0, 1, 1, 2]
    assert ids == [(out / "wandb_id").read_text()] * 2 and begun == [{}, {}]
    other = train.parse(["--wandb", "mine"])
    (tmp_path / "y").mkdir()
    train.open_log(tmp_path / "y", other)
    assert ids[2] != ids[1]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(ValueError, match="wandb login.*WANDB_MODE=offline"):
        train.open_log(tmp_path / "y", other)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train.open_log(tmp_path / "y", other)


def test_what_a_loss_of_your_own_learns_is_kept(tmp_path):
    cfg = train.parse(["--out", str(tmp_path), "--init", "none"])
    words = text.Tokenizer([])
    saved, loaded = [], []
    for seed, kept in ((0, saved), (1, loaded)):
        objective = losses.Objective(train.build_model(cfg, words), cfg)
        torch.manual_seed(seed)
        objective.mine = torch.nn.Linear(3, 3)
        kept += [objective, train.make_optimizer(objective, cfg)]
    train.save_checkpoint(tmp_path, *saved, words, 7, cfg)
    state, path = evaluate.read_checkpoint(tmp_path)
    assert train.resume(state, path, *loaded, cfg) == 7
    assert torch.equal(loaded[0].mine.weight, saved[0].mine.weight)
    assert "mine.weight" in state["heads"] and "mine.weight" not in state["model"]


def test_words_of_another_size_are_refused(world, tmp_path, monkeypatch):
    wide = dict(width=32, depth=1, heads=2, pool=2)
    monkeypatch.setitem(train.networks.SIZES["synthetic"], "fusion", wide)
    argv = ["--data", str(world), "--out", str(tmp_path / "r"), *SMALL[:-2], "--steps", "1"]
    with pytest.raises(ValueError, match="not of --size synthetic: take --init none"):
        train.main(argv)
