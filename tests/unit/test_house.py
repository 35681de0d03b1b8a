"""The house: floors, sizes, docstrings, style."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

import ofutils

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "ofutils").glob("*.py"))


def floors():
    found = {}
    for line in ofutils.__doc__.splitlines():
        parts = line.split()
        if len(parts) > 2 and parts[0].isdigit():
            found[parts[1]] = int(parts[0])
    return found


def test_every_module_has_a_floor_and_imports_from_lower_ones_only():
    floor = floors()
    assert set(floor) == {path.stem for path in MODULES if path.stem != "__init__"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ofutils"):
                below = node.module.removeprefix("ofutils").strip(".")
                names = [below] if below else [alias.name for alias in node.names]
            for name in set(names) & set(floor):
                assert floor[name] < floor[path.stem], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_rooms_are_small_and_their_public_names_documented(path):
    tree = ast.parse(path.read_text())
    lines = len(path.read_text().splitlines())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    assert lines <= 300
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
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip('ruff comes with the extra dev: pip install -e ".[dev]" -c constraints.txt')
    done = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
