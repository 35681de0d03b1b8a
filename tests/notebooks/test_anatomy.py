"""What every notebook promises: its parts, its size, clean outputs, nothing typed by hand that could be run."""

import ast
import json
import re
import statistics
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@notebooks
def test_parameters_are_typed_literals_that_papermill_understands(path):
    first = code(read(path))[0]
    assert first["metadata"].get("tags") == ["parameters"]
    declared = {}
    for node in ast.parse(first["source"]).body:
        assert isinstance(node, ast.AnnAssign), "only `name: type = literal  # help`"
        ast.literal_eval(node.value)
        declared[node.target.id] = node.annotation.id
    assert declared["scale"] == "str"
    for line in first["source"].splitlines():
        assert line.count("=") == 1 and "  # " in line, line
    inspected = papermill.inspect_notebook(str(path))
    assert {name: found["inferred_type_name"] for name, found in inspected.items()} == declared
    assert all(found["help"] for found in inspected.values())


@notebooks
def test_anatomy(path):
    notebook = read(path)
    cells, texts = code(notebook), [c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown"]
    assert notebook["cells"][0]["cell_type"] == "markdown" and texts[0].startswith(f"# {path.stem[:2]} · ")
    assert "params.start(globals(), " in cells[1]["source"] and path.stem in cells[1]["source"]
    assert "provenance" in cells[-1]["source"]
    assert 10 <= len(notebook["cells"]) <= 45
    assert len(texts) >= len(cells)
    lengths = [len([line for line in cell["source"].splitlines() if line.strip()]) for cell in cells]
    assert max(lengths) <= 30 and statistics.median(lengths) <= 12
    for cell in cells:
        for node in ast.walk(ast.parse(cell["source"])):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name
        assert not re.search(r"if\s+.*\bscale\s*==", cell["source"])


@notebooks
def test_what_is_loaded_stands_in_the_table_that_preflight_reads(path):
    for cell in code(read(path)):
        values = [node.value for node in ast.walk(ast.parse(cell["source"])) if isinstance(node, ast.Constant)]
        assert not [one for one in values if re.fullmatch(r"[\w.-]+/[\w.-]+", str(one))], "an id on the Hub"
        assert set(re.findall(r'sources\.read\("(\w+)"', cell["source"])) <= {path.stem}


@notebooks
def test_outputs_are_committed_from_a_clean_kernel_and_hold_no_traces(path):
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not {"papermill", "widgets"} & notebook["metadata"].keys()
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in notebook["cells"]:
        assert not {"papermill", "execution"} & cell["metadata"].keys()
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", cell["source"]
            assert not re.search(r'"/(home|root|tmp|work)/|/site-packages/', json.dumps(output))


@notebooks
def test_figures_are_committed_with_points_and_provenance(path):
    source = "".join(cell["source"] for cell in code(read(path)))
    figures = re.findall(r'plots\.save\(\w+, session, "(\w+)"', source)
    tables = re.findall(r'plots\.save_table\(session, "(\w+)"', source)
    assert figures
    expected = {f"{name}.png" for name in figures} | {
        f"{n}.{s}" for n in (*figures, *tables) for s in ("csv", "json")
    }
    assert {file.name for file in (ROOT / "figures" / path.stem).iterdir()} == expected
