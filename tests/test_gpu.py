"""pytest tests/test_gpu.py — dev/gpu.py, tried on a CPU at small size and without imagecodecs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import script

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step", "vision", "trained", "cached", "loader", "profile", "all_tokens", "default")
WITHOUT = """
import runpy, sys
sys.modules["imagecodecs"] = sys.modules["tifffile"] = None
sys.argv = ["dev/gpu.py", *sys.argv[1:]]
sys.path.insert(0, "dev")
runpy.run_path("dev/gpu.py", run_name="__main__")
"""


def test_every_stage_tells_its_rows_without_the_packages_that_read_slides(world, tmp_path):
    file = tmp_path / "gpu.pt"
    sys.path.insert(0, str(ROOT / "dev"))
    script("dev/gpu.py", "prepare", "--tiny", "--out", file, check=True)
    command = [sys.executable, "-c", WITHOUT, *STAGES, "--tiny", "--file", file, "--data", world]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, done.stdout
    rows = {
        line.split(" | ")[0].strip(): line for line in done.stdout.splitlines() if " | " in line
    }
    assert "4 bags" in rows["step, compiled"] and "0 new graphs" in rows["several lengths"]
    told = {rows[f"losses, {how}"].split(" | ", 1)[1] for how in ("compiled", "eager", "CPU")}
    assert len(told) == 1
    names = "step, eager|ViT-L, forward|ViT-L, trained|features, once|step, cached features"
    names += "|waiting for data|matrix products|all tokens|default run"
    assert set(names.split("|")) <= set(rows)


def test_a_lack_of_memory_is_a_row_and_the_next_stage_starts(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "dev")
    import gpu

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.attempt("large", too_large)
    gpu.attempt("broken", lambda: 1 / 0)
    assert [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "out of memory",
        "failed: ZeroDivisionError: 'division by zero'",
    ]
