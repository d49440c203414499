"""What several test files share: a small world, and scripts run in forks."""

import os

# Small matrices are faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prepare.world import make_world

LOSSES = ("itc", "itm", "mlm", "plm", "cvta", "mrtva")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six training and two test slides through the real path. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, train=6, test=2, words=2)
    return folder


@pytest.fixture(autouse=True)
def handlers():
    """Give each test the usual signal handlers: train.main leaves its own if it raises."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    usual = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, usual, strict=True):
        signal.signal(name, handler)


def run_forked(name, argv, streams, before):
    """Run a script in this child process, print its errors, exit as Python would."""
    code = 1
    try:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.chdir(ROOT)
        before()
        # A fork has none of its parent's other threads.
        torch.set_num_threads(1)
        sys.argv = [name, *argv]
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            # A module that a test has imported would be run with a warning.
            sys.modules.pop(name, None)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Script:
    """`python NAME ARGV` or `python -m NAME ARGV` in the repository's root, in a fork.

    name: a path (train.py) or a module (prepare.world). A fork saves the import of torch, which
    takes longer than most commands. before: called in the child first.
    """

    def __init__(self, name, *argv, before=lambda: None):
        self.streams = (tempfile.TemporaryFile(), tempfile.TemporaryFile())
        self.pid = os.fork()
        if not self.pid:
            run_forked(name, [str(word) for word in argv], self.streams, before)

    def wait(self, timeout=60):
        """Wait for the end -> namespace of returncode, stdout and stderr."""
        until = time.time() + timeout
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        while not pid:
            if time.time() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        texts = []
        for stream in self.streams:
            stream.seek(0)
            texts.append(stream.read().decode())
        code = os.waitstatus_to_exitcode(status)
        return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def script(name, *argv, timeout=60, check=False, **more):
    """Run a Script and wait for it; with check a failure is an AssertionError."""
    done = Script(name, *argv, **more).wait(timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
