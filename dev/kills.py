"""Does a run survive anything? Train a tiny run, kill it again and again at random moments, start it again with the same command, and compare
the end with a run that nobody disturbed, bit by bit.

    python dev/kills.py --rounds 200          # about ten minutes; prints what was lost, which must be nothing

One kill in four is a request (SIGTERM, SIGUSR1 or SIGINT), which must be granted with exit code 0; the others are SIGKILL, a third of them as soon as
a checkpoint is being written. After each, the checkpoint must be readable and not older than the one before.
"""
import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads must not fork
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

import runs
import train


def start(argv, quiet=True):
    """train.main(argv) in a forked process -> its number. Forked, because importing torch anew would take longer than all else."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()  # the loader's process comes with it when it is killed
    code = 1
    try:
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    finally:
        os._exit(code if isinstance(code, int) else 1)


def torment(data, out, steps, rounds, seed=0):
    """Kill and restart a run `rounds` times, then let it end, beside one in `out`/whole that is left alone -> (kills, requests, steps lost)."""
    argv = ["--data", str(data), "--steps", str(steps), "--bags", "4", "--words", "2", "--warmup", "2", "--log_every", "1", "--save_every", "2", "--workers", "1",
            "--eval_every", "0", "--evaluate", "false", "--device", "cpu", "--alpha", "0.4", "--queue", "50"]
    whole, run, rng = Path(out) / "whole", Path(out) / "killed", random.Random(seed)
    assert os.waitstatus_to_exitcode(os.waitpid(start([*argv, "--out", str(whole)]), 0)[1]) == 0
    kills, requests, at, lost = 0, 0, 0, 0
    while kills + requests < rounds and at < steps:
        log, temp, until = run / "log.jsonl", run / "ckpt.pt.tmp", time.time() + 20
        before = log.stat().st_size if log.exists() else 0
        child, soft, early, writing = start([*argv, "--out", str(run)]), rng.random() < 0.25, rng.random() < 0.2, rng.random() < 0.33
        grown = lambda: log.exists() and log.stat().st_size > before
        while not early and not grown() and time.time() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0 if early else 0.3))
        while writing and grown() and not temp.exists() and time.time() < until:
            time.sleep(0.0005)
        soft = soft and grown()  # before the loop a request has nothing to save
        reached = max(runs.read_log(run).get("loss", ([0],))[0], default=0) if grown() else at
        name = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)) if soft else signal.SIGKILL
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):  # not yet a group of its own, or ended
                send(child, name)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        state, _ = runs.read_checkpoint(run) if run.exists() else (None, None)
        now = state["step"] if state else 0
        assert now >= at, f"the checkpoint went back from step {at} to {now}"
        assert not soft or code == 0 and now >= reached, f"{name.name}: exit code {code}, step {now} of {reached} kept"
        kills, requests, lost, at = kills + (not soft), requests + soft, lost + max(0, reached - now), now
    assert os.waitstatus_to_exitcode(os.waitpid(start([*argv, "--out", str(run)]), 0)[1]) == 0
    a, b = (runs.read_checkpoint(folder)[0] for folder in (whole, run))
    assert a["step"] == b["step"] == steps
    for part in ("model", "memory"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), f"{part} differs"
    assert all(torch.equal(x, b["optimizer"]["state"][i][k]) for i, s in a["optimizer"]["state"].items() for k, x in s.items()), "the optimiser differs"
    a, b = (runs.read_log(folder)["loss"] for folder in (whole, run))
    assert a == b, "the logs differ"
    return kills, requests, lost


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train.make_world(f"{folder}/world", train=6, test=2)
        kills, requests, lost = torment(f"{folder}/world", folder, args.steps, args.rounds)
    print(f"{kills} kills and {requests} requests; weights, momentum model, queues, optimiser and log equal those of the undisturbed run bit by bit; "
          f"{lost} steps were done twice (a kill costs at most save_every)")


if __name__ == "__main__":
    main()
