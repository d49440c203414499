"""Kill a run again and again, and compare its end bit by bit with an undisturbed run.

    python -m dev.kills --rounds 200          # about ten minutes on a CPU

Each round starts the same train.py command and ends it at a random moment. One in four is a request
(SIGTERM, SIGUSR1, SIGINT), which train.py must grant with exit code 0. The others are SIGKILL, a
third of them while a checkpoint is being written. After each, the checkpoint must be readable and
not older than before. At the end, weights, optimiser and log must be equal in every bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# One thread: a process that has threads must not fork.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import train
from dev.curves import read_log
from prepare.world import make_world

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A tiny run that logs every step and saves every second one.
TINY = """--bags 4 --warmup 2 --log_every 1 --save_every 2 --workers 1 --eval_every 0
--device cpu""".split()


def start(argv):
    """Run train.main(argv) in a forked process -> its number. A fork need not import torch anew."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    # From here on this is the child. Its own group lets a kill reach its loader process too.
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        train.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    finally:
        os._exit(code if isinstance(code, int) else 1)


def wait(child):
    """Wait for a process -> its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def load(run):
    """Load the newest checkpoint of a run; step 0 if there is none."""
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        if (run / name).exists():
            return torch.load(run / name, map_location="cpu", weights_only=True)
    return {"step": 0}


def logged_step(run, start):
    """Return the last step that the log of a run holds after its first `start` bytes, 0 if none."""
    step = 0
    for line in (run / "log.jsonl").read_bytes()[start:].splitlines():
        # A kill may have cut the line off.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            step = row["step"] if "loss" in row else step
    return step


def log_size(run):
    """Return the bytes of the log of a run, 0 if there is none."""
    path = run / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def disturb(argv, run, rng):
    """Start the run and end it at a random moment -> (signal, exit code, step it had logged)."""
    before = log_size(run)
    until = time.time() + 20
    child = start(argv)
    # Every fifth time strike early, while the run still starts. Else wait for its first log line.
    early = rng.random() < 0.2
    while not early and log_size(run) == before and time.time() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0 if early else 0.3))
    # Every third time strike while a checkpoint is being written.
    if rng.random() < 0.33 and log_size(run) > before:
        # A kill leaves the temporary file of its process behind.
        old = set(run.glob(".ckpt*.tmp"))
        while set(run.glob(".ckpt*.tmp")) <= old and time.time() < until:
            time.sleep(0.0005)
    # Ask only a run that trains: before its loop there is nothing to save.
    trains = log_size(run) > before
    reached = logged_step(run, before) if trains else 0
    name = rng.choice(REQUESTS) if trains and rng.random() < 0.25 else signal.SIGKILL
    # Send it to the group and, if the child had not made one yet, to the child.
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(child, name)
    return name, wait(child), reached


def check_equal(a, b, where="checkpoint"):
    """Raise AssertionError unless two checkpoints are equal in every number but their settings."""
    if isinstance(a, dict | list):
        parts = a.keys() if isinstance(a, dict) else range(len(a))
        assert len(a) == len(b), f"{where} has other parts"
        for name in parts:
            if name != "config":
                check_equal(a[name], b[name], f"{where}, {name}")
    else:
        equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert equal, f"{where} differs"


def torment(folder, out, steps, rounds, seed=0):
    """Disturb a run at most `rounds` times, let it end, and compare it with out/whole.

    folder: a small data folder. Returns (kills, requests, steps that had to be done twice).
    """
    argv = ["--data", str(folder), "--steps", str(steps), *TINY]
    whole = Path(out) / "whole"
    run = Path(out) / "killed"
    rng = random.Random(seed)
    assert wait(start([*argv, "--out", str(whole)])) == 0, "the undisturbed run failed"
    argv += ["--out", str(run)]
    kills, requests, twice, at = 0, 0, 0, 0
    while kills + requests < rounds and at < steps:
        name, code, reached = disturb(argv, run, rng)
        now = load(run)["step"]
        assert now >= at, f"the checkpoint went back from step {at} to {now}"
        kills += name == signal.SIGKILL
        if name != signal.SIGKILL:
            requests += 1
            kept = code == 0 and now >= reached
            assert kept, f"{name.name}: exit code {code}, step {now} of {reached} kept"
        twice += max(0, reached - now)
        at = now
    assert wait(start(argv)) == 0, "the run could not be finished"
    check_equal(load(whole), load(run))
    assert read_log(whole)["loss"] == read_log(run)["loss"], "the logs differ"
    return kills, requests, twice


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_world(f"{folder}/world", train=6, test=2)
        kills, requests, twice = torment(f"{folder}/world", folder, args.steps, args.rounds)
    print(f"{kills} kills and {requests} requests; weights, optimiser and log equal those of the")
    print(f"undisturbed run bit by bit; {twice} steps were done twice")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
