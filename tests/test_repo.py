"""Test what the project promises about itself: pytest tests/test_repo.py"""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import script

import train

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("prepare", "protocols", "dev")
CHAPTERS = {
    "text": set(),
    "data": {"text"},
    "model": set(),
    "losses": {"model"},
    "evaluate": {"data", "text", "model"},
    "train": {"data", "text", "model", "losses", "evaluate"},
}
CORE = set(CHAPTERS)
CARD = {"torch", "numpy", "PIL", "tifffile", "imagecodecs", "tqdm", "pytest"}
OPTIONAL = {"openslide", "wandb", "h5py"}
PEERS = {"timm", "open_clip", "transformers", "sklearn"}  # compared with in dev/ and tests/
FILES = [*ROOT.glob("*.py"), *(path for f in FOLDERS for path in (ROOT / f).glob("*.py"))]


def imports(path):
    """List the modules that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" if node.module in FOLDERS else node.module
                      for a in node.names]  # fmt: skip
    return found


def ours(path):
    """List the modules of this project that a file imports: data, prepare.world, ..."""
    return {name for name in imports(path) if name.split(".")[0] in CORE | set(FOLDERS)}


def test_six_chapters_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == CORE


# Each chapter is imported in a fork of a process that has torch.
LOADED = """
import importlib, json, os, sys, torch
for name in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(name)
        print(json.dumps([name, sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def modules():
    command = [sys.executable, "-c", LOADED, *CHAPTERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_imports_only_what_stands_below_it(name, modules):
    assert ours(ROOT / f"{name}.py") == CHAPTERS[name]
    loaded = set(modules[name])
    assert loaded & CORE <= CHAPTERS[name] | {name} | {"model"} & CHAPTERS[name]
    assert not {module for module in loaded if module.split(".")[0] in FOLDERS}


def test_arrows_of_the_folders_point_one_way():
    for path in FILES:
        found, folder = ours(path), path.parent.name
        if folder == "prepare":
            assert not found & {"train", "evaluate"}, path
            assert all(name.split(".")[0] in CORE | {"prepare"} for name in found), path
        if folder == "protocols":
            assert "train" not in found, path
            # A slide is opened after training as before it.
            others = {name for name in found if not name.startswith("protocols.")}
            assert others <= CORE | {"protocols", "prepare.slide", "prepare.tile"}, path
    # No circle: take away again and again what imports nothing that is left.
    arrows = {}
    for path in FILES:
        name = path.stem if path.parent == ROOT else f"{path.parent.name}.{path.stem}"
        arrows[name] = ours(path)
    while arrows:
        free = {name for name, needs in arrows.items() if not needs & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


def test_only_the_listed_packages_are_imported():
    own = {path.stem for path in ROOT.glob("tests/*.py")} | CORE | {*FOLDERS, "tests"}
    allowed = CARD | OPTIONAL | own | set(sys.stdlib_module_names)
    for path in [*FILES, *ROOT.glob("tests/*.py")]:
        more = PEERS if path.parent.name in ("dev", "tests") else set()
        strange = {name.split(".")[0] for name in imports(path)} - allowed - more
        assert not strange, f"{path} imports {strange}"


def test_public_functions_say_what_they_do():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and node.name != "main":
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_functions_fit_a_screen_and_lines_a_page():
    for path in [*FILES, *ROOT.glob("tests/*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (path.stem, node.name) != ("train", "main"):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


def test_the_chapters_are_plain():
    """No nested comprehension, no lambda with a name, no chained ternary."""
    loops = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for name in CORE:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        for node in ast.walk(tree):
            below = [child for child in ast.walk(node) if child is not node]
            where = f"{name}.py:{getattr(node, 'lineno', 0)}"
            if isinstance(node, loops):
                assert len(node.generators) <= 2, where
                inner = [child for child in below if isinstance(child, loops)]
                assert not inner, f"{where}: a comprehension in a comprehension"
            if isinstance(node, ast.IfExp):
                assert not [x for x in below if isinstance(x, ast.IfExp)], f"{where}: two ternaries"
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                raise AssertionError(f"{where}: a lambda with a name")


def test_the_readme_names_files_and_functions_that_are_there():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 180 and len(readme) <= 11_000
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).stat().st_size < 300_000
    places = re.findall(r"`(\w+\.py): (\w+)`", readme)
    assert len(places) > 10
    for file, name in places:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{file}: {name}"
    for module in re.findall(r"python -m ((?:prepare|protocols|dev)\.\w+)", readme):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for path in re.findall(r"\b((?:dev|prepare|protocols)/\w+\.\w+)", readme):
        assert (ROOT / path).exists(), path
    assert "<!-- test command -->\n```\npip install -r requirements.txt && pytest\n```" in readme


def commands():
    """List the commands of the README's code blocks, as pasted -> lists of words."""
    found = []
    for block in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] in (["python"], ["torchrun"]):
                found.append(words)
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_readme_takes_its_flags(words):
    """Run it where its files are missing: it must say so in one sentence, and know all flags."""
    if words[0] == "torchrun":
        argv = words[words.index("train.py") + 1 :]
        assert dataclasses.asdict(train.parse(argv))
        return
    name, argv = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    done = script(name, *argv)
    assert done.returncode == 1 and "error: " in done.stderr, done.stderr
    assert "usage:" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_torch_is_pinned():
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().splitlines()


def test_the_recipe_of_the_readme_pairs_every_ancestor():
    import torch

    import losses

    code = re.search(r"```python\n(def ancestors.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = {"torch": torch, "tree_edges": losses.tree_edges}
    exec(code[1], scope)
    pairs = scope["ancestors"](85, 4, "cpu")
    assert sum(map(len, pairs)) == 4 + 16 + 64 + 16 + 64 + 64  # of METHOD: 228 in all
    for group in pairs:
        for p, c in group.tolist():
            while c > p:
                c = (c - 1) // 4
            assert c == p
    h = torch.randn(2, 85, 8)
    valid = torch.ones(2, 85, dtype=torch.bool)
    assert losses.mrtva(h, h, valid, pairs).item() != losses.mrtva(h, h, valid).item()


def test_the_slurm_script_runs(world, tmp_path):
    """Run it as it is, but for the arguments of train.py, with stand-ins for srun and scontrol."""
    script = (ROOT / "dev" / "slurm.sh").read_text()
    run = tmp_path / "mine"
    more = f"--data {world} --out {run} --bags 4 --steps 2 --eval_every 0 --workers 0 --device cpu"
    script, n = re.subn(r"train\.py --preset[^']*'", f"train.py {more}'", script)
    assert n == 1
    script = script.replace("RUN=runs/mine", f"RUN={run}")
    srun = """shift
    for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids="$pids $!"; done
    for p in $pids; do wait $p || exit 1; done"""
    scontrol = (
        f"""if [ "$1" = show ]; then echo localhost; else echo "$@" > {tmp_path}/queued; fi"""
    )
    for name, code in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    env["OMP_NUM_THREADS"] = "1"
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = (run / "log.jsonl").read_text().split("\n")
    assert json.loads(next(filter(None, rows)))["world"] == 2
    # A finished run is not queued again, one that was stopped is.
    assert not (tmp_path / "queued").exists()
    (run / "finished").unlink()
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 0\n")
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=60)
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
@pytest.mark.parametrize("name", ["coattention", "momentum", "zoom"])
def test_the_diffs_apply_and_train_ten_steps(name, world, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    diff = str(ROOT / "dev" / f"{name}.diff")
    done = subprocess.run(["git", "apply", diff], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def before():
        # The fork reads the patched chapters.
        sys.path.insert(0, str(tmp_path))
        for chapter in CORE:
            sys.modules.pop(chapter, None)
        importlib.import_module("model").SIZES["synthetic"]["fusion"]["depth"] = 3

    argv = ["--data", world, "--out", tmp_path / "x", "--steps", 10, "--bags", 4, "--init", "none"]
    argv += ["--eval_every", 0, "--workers", 0, "--device", "cpu", "--log_every", 1, "--warmup", 2]
    argv += {"momentum": ["--alpha", 0.4, "--queue", 50], "zoom": ["--zoom", 0.3]}.get(name, [])
    script(str(tmp_path / "train.py"), *argv, before=before, check=True)
    rows = (tmp_path / "x" / "log.jsonl").read_text().split("\n")
    curve = [json.loads(row)["loss"] for row in rows if '"loss"' in row]
    assert len(curve) == 10 and curve[-1] < curve[0]
