"""pytest tests/test_repo.py — what the project promises about itself: imports, the README's table and its test command."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARD = {"torch", "numpy", "PIL", "tifffile", "imagecodecs", "tqdm", "pytest"}
PEERS = {"openslide", "timm", "open_clip", "transformers"}  # what bench.py, dev/reference.py and a test compare with where it is installed


def test_only_the_listed_packages_are_imported():
    own = {p.stem for p in ROOT.glob("*.py")} | {p.stem for folder in ("dev", "tests") for p in (ROOT / folder).glob("*.py")}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("dev/*.py")]:
        allowed = CARD | own | set(sys.stdlib_module_names) | (PEERS if path.name in ("bench.py", "reference.py", "test_slide.py") else set())
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


def test_torch_is_pinned():
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().splitlines()
