"""What every notebook answers at once: one figure, and a line of verdicts that is that of its committed table."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from ofutils import report

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def screen(name):
    """The cells of the first screen: up to the answer's figure."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"][:6]
    assert "".join(cells[4]["source"]).startswith("## The answer\n")
    return cells


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_title_parameters_imports_answer(name):
    cells = screen(name)
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"] * 3
    title, *_ = "".join(cells[0]["source"]).splitlines()
    assert len(title) > 50, "the title is a claim"
    pictures = [output for output in cells[5]["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and re.search(r"plots\.save\(fig, session, \"\w+\"", "".join(cells[5]["source"]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_verdicts_are_those_of_the_committed_table(name):
    printed = "".join("".join(output.get("text", "")) for output in screen(name)[5]["outputs"])
    path = ROOT / "figures" / name / "verdicts.csv"
    if not path.is_file():
        assert report.summary(report.scoreboard()) in printed.replace(";\n", "; "), f"execute {name} again"
    elif report.answer(name) not in printed:  # the notebook's own words: counts of all, or each by itself
        table, scale = pd.read_csv(path), json.loads(path.with_suffix(".json").read_text())["scale"]
        kinds = table["verdict"].str.split(":").str[0]
        each = {
            f"{text} {ours:.2f}: {kind}"
            for text, ours, kind in zip(table["claim"], table["ours"], kinds, strict=True)
        }
        lines = re.findall(rf"scale {scale}: .*of (\d+) claims (.*)", printed)  # others may be judged further down
        own = [[f"{n}: {kind}" for kind, n in kinds.head(int(count)).value_counts().items()] for count, _ in lines]
        counts = [sorted(said.split(", ")) for _, said in lines]
        assert (counts and counts == [*map(sorted, own)]) or (printed and {*printed.splitlines()} <= each)
