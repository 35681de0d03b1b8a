"""The map of the papers' items: complete, and pointing at what exists."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from ofutils import UserError, reference, report
from ofutils.studies.start_here import items

ROOT = Path(__file__).parents[2]
ITEMS = {(one.paper, one.item): one for one in items.items()}

each_item = pytest.mark.parametrize("item", ITEMS.values(), ids=lambda one: f"{one.paper}, {one.item}")


def numbered(kind, last):
    return [f"{kind} {number}" for number in range(1, last + 1)]


def test_every_item_of_the_papers_has_a_row_and_only_one():
    expected = {
        "puccetti2022": [f"Item {letter}" for letter in "ABCDEFGHIJKL"],
        "bondarenko2023": numbered("Figure", 8) + ["Figures 9 and 10", "Figures 11 to 13"] + numbered("Table", 11),
        "he2024": numbered("Figure", 51) + numbered("Table", 4),
    }
    assert {paper: [one for of, one in ITEMS if of == paper] for paper in report.PAPERS} == expected
    assert len(items.items()) == sum(map(len, expected.values())) == 88


@each_item
def test_it_is_where_its_row_says_or_the_row_says_why_not(item):
    assert item.shows and not (item.untestable and item.unobtainable)
    assert bool(item.notebook) == bool(item.where)
    assert item.notebook or item.untestable or item.unobtainable
    assert not item.notebook or items.cell(item) > 0, f"{item.notebook} has no {item.where}"


@each_item
def test_its_claims_are_known(item):
    known = {claim.id: claim for claim in reference.claims()}
    assert set(item.claims) <= set(known) and len(set(item.claims)) == len(item.claims)
    assert {known[id].paper for id in item.claims} <= {item.paper}


@pytest.mark.parametrize("claim", reference.claims(), ids=lambda claim: claim.id)
def test_a_claim_stands_at_every_figure_and_table_that_it_names(claim):
    for kind, numbers in re.findall(r"(Figure|Table)s? (\d+(?:(?:, | and )\d+)*)", claim.item):
        for number in re.findall(r"\d+", numbers):
            assert claim.id in ITEMS[claim.paper, f"{kind} {number}"].claims, f"{kind} {number}"


def written(root, verdicts, cells):
    """A repository with one notebook, 07_op_block, of these cells, and with these verdicts of it."""
    folder = root / "figures" / "07_op_block"
    folder.mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "notebooks" / "07_op_block.ipynb").write_text(json.dumps({"cells": cells}))
    made = [reference.compare(id, values, 1.0, reference.NO_NUMBER, reason, id=id) for id, values, reason in verdicts]
    reference.verdict_table(made).to_csv(folder / "verdicts.csv", index=False)
    (folder / "verdicts.json").write_text('{"scale": "gpu"}')


CELLS = [
    {"cell_type": "markdown", "source": ["# Title\n", "## Data"]},
    {"cell_type": "code", "source": "x = 1"},
    {"cell_type": "markdown", "source": "Text about Verdicts\n\n### Verdicts\n\nmore"},
    {"cell_type": "code", "source": ["y = 2\n", 'plots.save(fig, session, "layers", points)']},
]
YES, NO, OPEN = [2.0, 2.1, 2.2], [0.1, 0.2, 0.3], [0.5, 1.5, 1.0]


def test_the_cell_is_the_one_that_jupyter_numbers(tmp_path):
    written(tmp_path, [], CELLS)
    for where, number in {"layers": 2, "Verdicts": 2, "Data": 1, "Title": 1, "layer": 0, "about": 0, "": 0}.items():
        assert items.cell(items.Item("he2024", "", "", "07_op_block", where), tmp_path) == number, where
    assert items.cell(items.Item("he2024", "", "", "10_vit", "layers"), tmp_path) == 0


@pytest.mark.parametrize(
    "claims, said, state, why",
    [
        ({"he2024-signal": (YES, "")}, "gpu", "replicated", "of 1 claim, 1 holds"),
        ({"he2024-signal": (NO, "")}, "gpu", "not replicated", "of 1 claim, 1 does not hold"),
        (
            {"he2024-signal": (YES, ""), "he2024-scale": (OPEN, "")},
            "gpu",
            "in part",
            "of 2 claims, 1 holds, 1 cannot be tested at the scale that ran",
        ),
        (
            {"he2024-signal": (OPEN, "too small"), "he2024-scale": (YES, "too small")},
            "gpu",
            "not testable here",
            "too small",
        ),
        (
            {"he2024-signal": (OPEN, ""), "he2024-lab-gain-free": (YES, "")},
            "gpu",
            "laboratory only",
            "of 1 claim, 1 cannot be tested at the scale that ran; in the laboratory of 1 claim, 1 holds",
        ),
        ({}, "", "not run yet", ""),
    ],
)
def test_the_state_follows_from_the_verdicts(tmp_path, monkeypatch, claims, said, state, why):
    written(tmp_path, [(id, *of) for id, of in claims.items()], CELLS)
    asked = tuple(claims) or ("he2024-signal",)
    one = items.Item("he2024", "Figure 2", "", "07_op_block", "layers", asked)
    monkeypatch.setattr(items, "items", lambda: (one,))
    (row,) = items.table(tmp_path).to_dict("records")
    assert (row["scale"], row["state"], row["why"]) == (said, state, why) and row["cell"] == 2
    assert state in items.STATES


def test_without_claims_it_is_shown_or_not_and_the_row_says_why(tmp_path, monkeypatch):
    written(tmp_path, [], CELLS)
    place = ("07_op_block", "layers")
    rows = [items.Item("he2024", "Figure 1", "", *place), items.Item("he2024", "Figure 2", "", "10_vit")]
    rows += [items.Item("he2024", "Figure 3", "", *place, untestable="big"), items.Item("he2024", "Figure 4", "")]
    rows += [items.Item("he2024", "Figure 5", "", unobtainable="lost")]
    monkeypatch.setattr(items, "items", lambda: rows)
    found = items.table(tmp_path)
    assert found["state"].tolist() == ["shown", "not run yet", "not testable here", "not run yet", "not obtainable"]
    assert found["why"].tolist() == ["", "", "big", "", "lost"] and found["scale"].tolist()[:2] == ["gpu", ""]
    text = items.render(found)
    assert "| [07_op_block](07_op_block.ipynb) [2]: layers | gpu | **not testable here**: big |" in text
    assert report.PAPERS["he2024"] in text and "| 10_vit |  | **not run yet** |" in text


def test_an_unknown_claim_is_refused(tmp_path, monkeypatch):
    one = items.Item("he2024", "Figure 2", "", "07_op_block", "layers", ("he2024-no-such",))
    monkeypatch.setattr(items, "items", lambda: (one,))
    with pytest.raises(UserError, match="claim of he2024 Figure 2.*he2024-no-such"):
        items.table(tmp_path)


def test_the_committed_map_is_not_stale():
    committed = pd.read_csv(ROOT / "figures" / "00_start_here" / "items.csv", keep_default_na=False)
    now = items.table().astype({"cell": int})
    pd.testing.assert_frame_equal(committed, now, check_dtype=False, obj="the map; execute 00_start_here again")
