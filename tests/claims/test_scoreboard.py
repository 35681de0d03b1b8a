"""The scoreboard says what the committed tables say, and these what their own values say."""

import ast
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from ofutils import reference, report

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "figures").glob("*/verdicts.csv"))
tables = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
each_claim = pytest.mark.parametrize("claim", reference.claims(), ids=lambda claim: claim.id)
REASONS = ("the margin lies inside the interval", "not every seed gave a number")  # what `compare` itself may say


def read(path):
    return pd.read_csv(path, keep_default_na=False, dtype={"id": str, "values": str})


def parameters(notebook):
    """The literals of a notebook's parameters cell; None where there is no such notebook."""
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        return None
    cells = json.loads(path.read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse("".join(cell["source"])).body}


def test_the_readmes_scoreboard_is_not_stale():
    readme = (ROOT / "README.md").read_text()
    board = report.render(report.scoreboard())
    assert report.insert(readme, board) == readme, "run: make report"


def test_there_are_tables():
    assert TABLES


def test_ids_are_unique():
    ids = [claim.id for claim in reference.claims()]
    assert len(set(ids)) == len(ids)


@each_claim
def test_a_claim_is_whole(claim):
    assert claim.id.startswith(f"{claim.paper}-") and claim.paper in report.PAPERS
    (parameter,) = claim.tolerance
    assert len(re.findall(rf"\b{parameter}\b", claim.rule)) == 1
    assert claim.rule_at(1.5).endswith("above 1.5")


@each_claim
def test_the_papers_numbers_in_words_are_verified_ones(claim):
    if not claim.numbers:
        return
    items = pd.read_csv(ROOT / "ofutils" / "papers" / f"{claim.paper}.csv", dtype=str)
    verified = set(items[items["verified"] == "yes"]["value"].str.removesuffix(".0"))
    sign = {"below ": "<", "above ": ">", "": ""}
    for bound, number in re.findall(r"(below |above |)(\d+(?:\.\d+)?)", claim.numbers):
        assert f"{sign[bound]}{number}" in verified, number


@each_claim
def test_the_tolerance_is_the_notebooks_parameter(claim):
    declared = parameters(claim.notebook)
    if declared is not None:
        ((parameter, value),) = claim.tolerance.items()
        assert declared[parameter] == value


@tables
def test_a_notebook_that_ran_judges_all_its_claims_and_only_known_ones(path):
    table, claims = read(path), {claim.id: claim for claim in reference.claims(path.parent.name)}
    judged = table[table["id"] != ""]
    assert sorted(judged["id"]) == sorted(claims)
    for row in judged.to_dict("records"):
        assert row["margin"] == claims[row["id"]].margin, row["id"]


@tables
def test_every_verdict_follows_from_its_values_margin_and_ratio(path):
    for row in read(path).to_dict("records"):
        values = [float(value) for value in row["values"].split()]
        assert len(values) == row["n"]
        reason = row["verdict"].partition("not testable at this scale: ")[2]
        own = reason in REASONS or re.fullmatch(r"\d of 3 seeds", reason)
        again = reference.compare(
            row["claim"], values, row["margin"], row["paper"], "" if own else reason, row["ratio"], row["id"]
        )
        assert again.verdict == row["verdict"], row["claim"]
        if row["n"] > 1 and reason != "not every seed gave a number" and "nan" not in row["values"].split():
            found = [float(row[name]) for name in ("low", "ours", "high")]
            assert [again.low, again.mean, again.high] == pytest.approx(found, rel=1e-4), row["claim"]
