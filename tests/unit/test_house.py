"""The house: floors, sizes, docstrings, style."""

import ast
import re
import subprocess
import sys
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
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
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
