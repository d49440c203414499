"""Try dev/gpu.py on a CPU at small size and without imagecodecs: pytest tests/test_gpu.py"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from dev import gpu

ROOT = Path(__file__).resolve().parent.parent
# All but the tests, which run here anyway.
STAGES = "prepare step vision trained cached loader profile all_tokens default".split()
WITHOUT = """
import runpy, sys
sys.modules["imagecodecs"] = sys.modules["tifffile"] = None
import prepare.world  # as the tests do that the GPU runs
runpy.run_module("dev.gpu", run_name="__main__", alter_sys=True)
"""


def test_every_stage_tells_its_rows_without_the_packages_that_read_slides(world):
    command = [sys.executable, "-c", WITHOUT, *STAGES, "--tiny", "--paper", world, "--data", world]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([str(word) for word in command], **more)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, done.stdout
    rows = {}
    for line in done.stdout.splitlines():
        if " | " in line:
            rows[line.split(" | ")[0].strip()] = line
    assert "0 new graphs" in rows["several lengths"] and "4 bags" in done.stdout
    told = {rows[f"losses, {how}"].split(" | ", 1)[1] for how in ("compiled", "eager", "CPU")}
    assert len(told) == 1
    names = "step, compiled|step, eager|ViT-L, forward, 2 images|ViT-L, trained, 2 images"
    names += "|features, once|step, cached features|waiting for data|matrix products|all tokens"
    assert set(names.split("|")) <= set(rows) and "default run" in rows


def test_a_lack_of_memory_is_a_row_and_the_next_stage_starts(capsys):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.attempt("large", too_large)
    gpu.attempt("broken", lambda: 1 / 0)
    assert [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "out of memory",
        "failed: ZeroDivisionError: 'division by zero'",
    ]
