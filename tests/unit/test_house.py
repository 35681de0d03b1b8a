"""The house: floors, sizes, docstrings, style."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ofutils
import ofutils.studies

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ofutils"
ROOMS = sorted(PACKAGE.glob("*.py"))
STUDIES = {path.name: sorted(path.glob("*.py")) for path in sorted((PACKAGE / "studies").iterdir()) if path.is_dir()}
STUDIES.pop("__pycache__", None)


def floors():
    found = {}
    for line in ofutils.__doc__.splitlines():
        parts = line.split()
        if len(parts) > 2 and parts[0].isdigit():
            found[parts[1]] = int(parts[0])
    return found


def imported(path):
    """The modules of the package that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ofutils":
            below = node.module.removeprefix("ofutils").strip(".")
            yield from [f"{below}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.removeprefix("ofutils.") for alias in node.names if "ofutils" in alias.name]


def lines(path):
    """How many there are, without docstrings and blank lines."""
    text, tree = path.read_text(), ast.parse(path.read_text())
    left = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            left -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(left)


def test_every_room_has_a_floor_and_imports_from_lower_ones_only():
    floor = floors()
    assert set(floor) == {path.stem for path in ROOMS if path.stem != "__init__"}
    for path in ROOMS:
        for name in imported(path):
            room = name.partition(".")[0]
            assert room != "studies", f"{path.name} imports a study"
            assert room not in floor or floor[room] < floor[path.stem], f"{path.name} imports {room}"


def test_no_study_imports_another_and_each_belongs_to_a_notebook():
    notebooks = {path.stem.partition("_")[2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(STUDIES) <= notebooks and {path.name for path in (PACKAGE / "studies").glob("*.py")} == {"__init__.py"}
    for study, paths in STUDIES.items():
        assert study in ofutils.studies.__doc__
        for path in paths:
            assert path.stem == "__init__" or path.stem in ast.get_docstring(ast.parse(paths[0].read_text()))
            for name in imported(path):
                assert not name.startswith("studies.") or name.split(".")[1] == study, f"{path} imports {name}"
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for study in re.findall(r"ofutils\.studies\.(\w+)", path.read_text()):
            assert path.stem.partition("_")[2] == study, f"{path.name} takes {study}, which is another notebook's"


def test_the_core_and_the_studies_stay_small():
    assert sum(map(lines, ROOMS)) <= 4750
    for study, paths in STUDIES.items():
        assert sum(map(lines, paths)) <= 450, study


@pytest.mark.parametrize("path", [*ROOMS, *itertools.chain(*STUDIES.values())], ids=lambda path: path.stem)
def test_rooms_are_small_and_their_public_names_documented(path):
    tree = ast.parse(path.read_text())
    assert lines(path) <= 300
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            nested = not any(
                node in ast.iter_child_nodes(owner)
                for owner in ast.walk(tree)
                if isinstance(owner, (ast.Module, ast.ClassDef))
            )
            assert nested or ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff", reason='ruff comes with the extra dev: pip install -e ".[dev]" -c constraints.txt')
    command = [sys.executable, "-m", "ruff", *command, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_python_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_readmes_commands_and_links_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    assert {command.split()[1] for command in commands if command.startswith("make")} <= set(targets)
    assert 'pip install -e ".[dev]" -c constraints.txt' in commands
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{path.name}" in text


def test_ci_is_make_test_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines[1:] if line.strip()] == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "make test",
    ]
