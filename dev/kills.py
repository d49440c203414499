"""Kill a run again and again, and compare its end bit by bit with an undisturbed run.

    python -m dev.kills --rounds 200          # about fifteen minutes on a CPU

Each round starts the same train.py command and ends it at a random moment. One in four is a request
(SIGTERM, SIGUSR1, SIGINT, SIGHUP), which train.py must grant with code 0. The others are SIGKILL, a
third of them while a checkpoint is being written. One round in five runs under torchrun and signals
torchrun alone: whatever becomes of it, its process must save and leave. After each, the checkpoint
must be readable and not older than before. At the end, weights, optimiser and log must be equal in
every bit. Then the evaluation is killed, once for ten rounds, and must end with the same results.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# One thread: a process that has threads must not fork.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import data
from dev.curves import read_log
from prepare.world import make_world
from tests.conftest import Script, script

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# A tiny run that logs every step and saves every second one.
TINY = """--bags 4 --warmup 2 --log_every 1 --save_every 2 --workers 1 --eval_every 0
--device cpu""".split()


def load(run):
    """Load the newest checkpoint of a run; step 0 if there is none."""
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        if (run / name).exists():
            return torch.load(run / name, map_location="cpu", weights_only=True)
    return {"step": 0}


def logged_step(run, start):
    """Return the last step that the log of a run holds after its first `start` bytes, 0 if none."""
    path, step = run / "log.jsonl", 0
    for line in path.read_bytes()[start:].splitlines() if path.exists() else ():
        # A kill may have cut the line off.
        with contextlib.suppress(json.JSONDecodeError):
            step = json.loads(line)["step"]
    return step


def is_writing(run, since):
    """Tell whether a checkpoint is being written; an earlier kill may have left an older file."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime > since for path in run.glob(".ckpt*.tmp"))
    return False


def disturb(argv, run, rng):
    """Start the run and end it at a random moment -> (signal, exit code, step it had logged)."""
    log, until = run / "log.jsonl", time.time() + 20
    before = log.stat().st_size if log.exists() else 0
    # A group of its own lets a kill reach its loader process, too.
    process = Script("train.py", *argv, before=os.setsid)
    # Every fifth time strike early, while the run still starts. Else wait for its first line.
    early = rng.random() < 0.2
    while not early and not logged_step(run, before) and time.time() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0 if early else 0.3))
    # Every third time strike while a checkpoint is being written.
    if rng.random() < 0.33 and logged_step(run, before):
        now = time.time()
        while not is_writing(run, now) and time.time() < until:
            time.sleep(0.0005)
    # Ask only a run that trains: before its loop there is nothing to save.
    reached = logged_step(run, before)
    name = rng.choice(REQUESTS) if reached and rng.random() < 0.25 else signal.SIGKILL
    # Send it to the group and, if the child had not made one yet, to the child.
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, name)
    return name, process.wait().returncode, reached


def disturb_torchrun(argv, run, rng):
    """Start the run under torchrun and signal torchrun alone -> (signal, 0, step it had logged)."""
    before = (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
    where = "--rdzv_backend=c10d --rdzv_endpoint=localhost:0 train.py".split()
    command = [sys.executable, "-m", "torch.distributed.run", *where, *map(str, argv)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **quiet)
    until = time.time() + 60
    while not logged_step(run, before) and time.time() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    name, reached = rng.choice((signal.SIGKILL, *REQUESTS)), logged_step(run, before)
    process.send_signal(name)
    process.wait()
    # The process of torchrun holds the folder until it has left.
    while time.time() < until:
        with contextlib.suppress(ValueError):
            data.lock(run).close()
            break
        time.sleep(0.01)
    return name, 0, reached


def torment_evaluation(run, rounds, rng):
    """Kill evaluate.py at random moments; its results must be whole, and equal at last."""
    path = run / "results.json"
    start = time.time()
    script("evaluate.py", run, timeout=3600, check=True)
    expected, took = path.read_text(), time.time() - start
    path.unlink()
    for _ in range(rounds):
        process = Script("evaluate.py", run)
        time.sleep(rng.uniform(0, took))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not path.exists() or json.loads(path.read_text())
    script("evaluate.py", run, timeout=3600, check=True)
    assert path.read_text() == expected, "the results differ"


def torment(folder, out, steps, rounds, seed=0, torchrun=0.0):
    """Disturb a run at most `rounds` times, let it end, and compare it with out/whole.

    folder: a small data folder; torchrun: share of the rounds that are run under it.
    Returns (kills, requests, steps that had to be done twice).
    """
    argv = ["--data", folder, "--steps", steps, *TINY]
    whole, run, rng = Path(out) / "whole", Path(out) / "killed", random.Random(seed)
    script("train.py", *argv, "--out", whole, timeout=3600, check=True)
    argv += ["--out", run]
    kills, requests, twice, at = 0, 0, 0, 0
    while kills + requests < rounds and at < steps:
        under = rng.random() < torchrun
        name, code, reached = (disturb_torchrun if under else disturb)(argv, run, rng)
        now = load(run)["step"]
        assert now >= at, f"the checkpoint went back from step {at} to {now}"
        kills += name == signal.SIGKILL
        requests += name != signal.SIGKILL
        if under or name != signal.SIGKILL:
            kept = code == 0 and now >= reached
            assert kept, f"{name.name}: exit code {code}, step {now} of {reached} kept"
        twice += max(0, reached - now)
        at = now
    script("train.py", *argv, timeout=3600, check=True)
    for part in ("step", "model", "heads", "optimizer"):
        torch.testing.assert_close(load(run)[part], load(whole)[part], rtol=0, atol=0)
    assert read_log(whole)["loss"] == read_log(run)["loss"], "the logs differ"
    if rounds >= 10:
        torment_evaluation(run, rounds // 10, rng)
    return kills, requests, twice


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_world(f"{folder}/world", train=6, test=2)
        world = f"{folder}/world"
        kills, requests, twice = torment(world, folder, args.steps, args.rounds, torchrun=0.2)
    print(f"{kills} kills, {requests} requests, {twice} steps done twice: the end is bit-equal")


if __name__ == "__main__":
    main()
