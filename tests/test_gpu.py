"""Try dev/gpu.py on a CPU at small size and without imagecodecs: pytest tests/test_gpu.py"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import script

from dev import gpu

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step", "vision", "trained", "cached", "loader", "profile", "all_tokens", "default")
WITHOUT = """
import runpy, sys
sys.modules["imagecodecs"] = sys.modules["tifffile"] = None
runpy.run_module("dev.gpu", run_name="__main__", alter_sys=True)
"""


def test_every_stage_tells_its_rows_without_the_packages_that_read_slides(world, tmp_path):
    file = tmp_path / "gpu.pt"
    script("dev.gpu", "prepare", "--tiny", "--out", file, check=True)
    command = [sys.executable, "-c", WITHOUT, *STAGES, "--tiny", "--file", file, "--data", world]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([str(word) for word in command], **more)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, done.stdout
    rows = {}
    for line in done.stdout.splitlines():
        if " | " in line:
            rows[line.split(" | ")[0].strip()] = line
    assert "4 bags" in rows["step, compiled"] and "0 new graphs" in rows["several lengths"]
    told = {rows[f"losses, {how}"].split(" | ", 1)[1] for how in ("compiled", "eager", "CPU")}
    assert len(told) == 1
    names = "step, eager|ViT-L, forward|ViT-L, trained|features, once|step, cached features"
    names += "|waiting for data|matrix products|all tokens|default run"
    assert set(names.split("|")) <= set(rows)


def test_a_lack_of_memory_is_a_row_and_the_next_stage_starts(capsys):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.attempt("large", too_large)
    gpu.attempt("broken", lambda: 1 / 0)
    assert [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "out of memory",
        "failed: ZeroDivisionError: 'division by zero'",
    ]
