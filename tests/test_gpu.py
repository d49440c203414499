"""Try dev/gpu.py on a CPU at small size and without imagecodecs: pytest tests/test_gpu.py"""

import importlib
import sys

import torch
from conftest import Script

from dev import gpu

OURS = "text data model losses evaluate train prepare protocols dev".split()
# All but the tests, which run here anyway.
STAGES = "prepare step vision trained cached loader profile all_tokens default".split()


def without_readers():
    """Import all of ours anew, without the packages that read slides."""
    for name in [*sys.modules]:
        if name.split(".")[0] in {*OURS, "imagecodecs", "tifffile"}:
            del sys.modules[name]
    sys.modules["imagecodecs"] = sys.modules["tifffile"] = None
    # As the tests do that the GPU runs.
    importlib.import_module("prepare.world")


def test_every_stage_tells_its_rows_without_the_packages_that_read_slides(world):
    # Two processes, for two cores.
    argv = ["--tiny", "--paper", world, "--data", world]
    halves = (STAGES[:2], STAGES[2:])
    forks = [Script("dev.gpu", *half, *argv, before=without_readers) for half in halves]
    parts = [fork.wait(300) for fork in forks]
    assert [part.returncode for part in parts] == [0, 0], parts
    said = "".join(part.stdout for part in parts)
    assert "failed" not in said, said
    rows = {}
    for line in said.splitlines():
        if " | " in line:
            rows[line.split(" | ")[0].strip()] = line
    assert "0 new graphs" in rows["several lengths"] and "4 bags" in said
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
