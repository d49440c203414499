"""pytest tests/test_repo.py — what the project promises about itself: imports, the README's table and its test command."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARD = {"torch", "numpy", "PIL", "tifffile", "imagecodecs", "tqdm", "pytest"}
PEERS = {"openslide", "timm", "open_clip", "transformers"}  # what bench.py, dev/reference.py and a test compare with where it is installed
TRACKER = {"wandb"}  # imported by train.py where --wandb asks for it


def test_only_the_listed_packages_are_imported():
    own = {p.stem for p in ROOT.glob("*.py")} | {p.stem for folder in ("dev", "tests") for p in (ROOT / folder).glob("*.py")}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("dev/*.py")]:
        allowed = CARD | own | set(sys.stdlib_module_names) | (PEERS if path.name in ("bench.py", "reference.py", "test_slide.py") else TRACKER if path.name == "train.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_public_functions_say_what_they_do():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_the_readme_counts_lines_and_names_files_that_are_there():
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", readme, re.M))
    assert set(table) == {p.name for p in ROOT.glob("*.py")}
    for name, lines in table.items():
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 15, f"{name}: the README says {lines} lines"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).stat().st_size < 300_000
    assert "<!-- test command -->\n```\npip install -r requirements.txt && pytest\n```" in readme


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_the_diffs_of_the_readme_apply(tmp_path):
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert diffs and "class CoBlock" in (tmp_path / "model.py").read_text()
    sizes = "model.SIZES['synthetic'] | dict(fusion=dict(width=16, depth=4, heads=2, pool=2))"
    code = f"import torch, model; m = model.MRPLIP(50, 48, **({sizes})); print(m.caption(torch.rand(1, 3, 64, 64), tokenizer=__import__('tokenizer').Tokenizer([]), max_tokens=0), " \
           "m.fuse_with_keywords(torch.randn(2, 5, 16), torch.randn(2, 3, 128), torch.tensor([[True] * 3, [False] * 3])).sum().backward() or 'learns')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "learns" in done.stdout, done.stderr


def test_the_slurm_script_of_the_readme_runs(world, tmp_path):
    """As pasted, but for the arguments of train.py; srun and scontrol are stand-ins that start two tasks and note a request to queue again."""
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    script, n = re.subn(r"train\.py \\\n[^']*'", f"train.py --data {world} --out {tmp_path}/runs/mine --bags 4 --words 2 --steps 2 --eval_every 0 --evaluate false --workers 0 --device cpu'", script)
    assert n == 1
    for name, code in (("srun", 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids="$pids $!"; done; for p in $pids; do wait $p || exit 1; done'),
                       ("scontrol", f'if [ "$1" = show ]; then echo localhost; echo other; else echo "$@" > {tmp_path}/queued; fi')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/mine/log.jsonl").read_text().splitlines()[0])["world"] == 2
    assert (tmp_path / "queued").read_text() == "requeue 7\n"                          # no results yet


def test_torch_is_pinned():
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().splitlines()
