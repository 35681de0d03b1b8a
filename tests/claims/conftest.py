"""What the tests of claims share: what a notebook committed, and its rules."""

import ast
import json
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def notebook(request) -> str:
    """The notebook that a test module is named after."""
    return Path(request.module.__file__).stem.removeprefix("test_")


@pytest.fixture(scope="module")
def rules(notebook) -> dict:
    """Name -> value of the parameters cell."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["metadata"].get("tags") == ["parameters"]))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


@pytest.fixture(scope="module")
def stated(notebook) -> pd.DataFrame:
    """All verdicts, by what they say."""
    path = ROOT / "figures" / notebook / "verdicts.csv"
    return pd.read_csv(path, keep_default_na=False).set_index("claim", drop=False)


@pytest.fixture(scope="module")
def committed(stated) -> pd.DataFrame:
    """The verdicts on the papers' claims, by their ids."""
    return stated[stated["id"] != ""].set_index("id")
