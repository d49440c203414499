"""What several test files share."""
import os
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


def script(name, *argv, timeout=60, check=False, before=lambda: None):
    """`python NAME ARGV` in the repository's root -> returncode, stdout, stderr. In a fork of this process, because importing torch anew takes
    longer than all else that most commands do."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child, until = os.fork(), time.time() + timeout
        if not child:
            _forked(name, list(map(str, argv)), (out, err), before)
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.time() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        for f in (out, err):
            f.seek(0)
        found = SimpleNamespace(returncode=os.waitstatus_to_exitcode(done[1]), stdout=out.read().decode(), stderr=err.read().decode())
    assert not check or found.returncode == 0, found.stdout + found.stderr
    return found
