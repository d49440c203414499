"""What several test files share."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of small matrices two threads make slow work
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

import batches

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six training and two test slides through the real path."""
    folder = tmp_path_factory.mktemp("world")
    batches.make_world(folder, train=6, test=2)
    return folder


def _forked(name, argv, streams, before):
    """The life of the child: run the script, say its errors, exit as Python would."""
    code = 1
    try:
        for number, f in enumerate(streams, 1):
            os.dup2(f.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(ROOT)
        before()
        torch.set_num_threads(1)                                                       # a fork has none of its parent's other threads
        sys.argv = [name, *argv]
        runpy.run_path(str(ROOT / name), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1 if e.code else 0
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Script:
    """`python NAME ARGV` in the repository's root, in a fork of this process, because importing torch anew takes longer than all else that most
    commands do. before: called in the child first."""

    def __init__(self, name, *argv, before=lambda: None):
        self.streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.pid = os.fork()
        if not self.pid:
            _forked(name, list(map(str, argv)), self.streams, before)

    def wait(self, timeout=60):
        """-> returncode, stdout, stderr."""
        until = time.time() + timeout
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.time() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        for f in self.streams:
            f.seek(0)
        return SimpleNamespace(returncode=os.waitstatus_to_exitcode(done[1]), stdout=self.streams[0].read().decode(), stderr=self.streams[1].read().decode())


def script(name, *argv, timeout=60, check=False, **more):
    """`Script`, waited for."""
    done = Script(name, *argv, **more).wait(timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
