"""The map: every figure, table and item of the three papers, with its notebook, cell, scale and what became of it.

It is made of `papers/items.yaml` and, for what has been run, of the notebooks and their tables of verdicts; nothing
of it is typed by hand but where a thing is and why it is not.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pandas as pd
import yaml

from ofutils import params, report

#: What becomes of an item: of one with claims by their verdicts; `shown` has none, `in part` not all hold.
STATES = ("replicated", "in part", "not replicated", "laboratory only", "shown", "not testable here")
STATES += ("not obtainable", report.NOT_RUN)
_DECIDED = ["holds", "does not hold"]


@dataclass(frozen=True)
class Item:
    """One figure, table or item of a paper; the fields are explained in `papers/items.yaml`."""

    paper: str
    item: str
    shows: str
    notebook: str = ""
    where: str = ""
    claims: tuple[str, ...] = ()
    untestable: str = ""
    unobtainable: str = ""


def items() -> tuple[Item, ...]:
    """All of them, paper by paper in the order of the scoreboard."""
    text = (resources.files("ofutils") / "papers" / "items.yaml").read_text(encoding="utf-8")
    papers = yaml.safe_load(text)
    return tuple(Item(paper, name, **row) for paper in report.PAPERS for name, row in papers[paper].items())


def cell(item: Item, root: Path | None = None) -> int:
    """The number that Jupyter shows at the cell which makes the figure or table, or the first one under the heading.

    Args:
        item: with a notebook and where it is there.
        root: where `notebooks/` lies; by default the repository.

    Returns:
        From 1; 0 where there is no such notebook, figure, table or heading.
    """
    path = (root or params.root()) / "notebooks" / f"{item.notebook}.ipynb"
    if not path.is_file() or not item.where:
        return 0
    number, under = 0, False
    for one in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(one["source"])
        if one["cell_type"] == "code":
            number += 1
            if under or f'session, "{item.where}"' in source:
                return number
        under = under or any(line.lstrip("#") == f" {item.where}" for line in source.splitlines())
    return 0


def table(root: Path | None = None) -> pd.DataFrame:
    """One row per item: paper, item, shows, notebook, where, `cell`, scale, state (one of STATES), why.

    Args:
        root: where `notebooks/` and `figures/` lie; by default the repository.

    Raises:
        UserError: a table of verdicts that is not readable, or a claim that is not known.
    """
    board = report.scoreboard(root).set_index("id")
    return pd.DataFrame(_row(item, board, root or params.root()) for item in items())


def _row(item: Item, board: pd.DataFrame, root: Path) -> dict:
    for claim in item.claims:
        params.require_known(f"claim of {item.paper} {item.item}", claim, board.index)
    judged, number = board.loc[list(item.claims)], cell(item, root)
    saved = [root / "figures" / item.notebook / f"{name}.json" for name in (item.where, "verdicts")]
    shown = [json.loads(path.read_text(encoding="utf-8"))["scale"] for path in saved if number and path.is_file()]
    scales = [*judged["scale"]] or shown[:1]
    row = {name: getattr(item, name) for name in ("paper", "item", "shows", "notebook", "where")}
    row |= {"cell": number, "scale": ", ".join(dict.fromkeys(filter(None, scales)))}
    return row | dict(zip(("state", "why"), _state(item, judged, number), strict=True))


def _state(item: Item, judged: pd.DataFrame, number: int) -> tuple[str, str]:
    """What became of an item, and why, or by how many claims; the laboratory alone decides nothing of the paper's."""
    if why := item.unobtainable or item.untestable:
        return "not obtainable" if item.unobtainable else "not testable here", why
    if not item.claims:
        return ("shown" if number else report.NOT_RUN), ""
    said, toy = judged["verdict"].str.partition(": "), judged["setting"] == "laboratory"
    own, decided = said[~toy], said[0].isin(_DECIDED)
    places = (("", judged[~toy]), ("in the laboratory ", judged[toy]))
    why = "; ".join(f"{place}{report.counted(rows)}" for place, rows in places if len(rows))
    if (said[0] == report.NOT_RUN).all():
        return report.NOT_RUN, ""
    if not decided[~toy].any():
        reasons = "; ".join(dict.fromkeys(filter(None, own[2])))
        return ("laboratory only", why) if decided.any() else ("not testable here", reasons)
    kinds = set(own[0])
    return {("holds",): "replicated", ("does not hold",): "not replicated"}.get(tuple(kinds), "in part"), why


def render(found: pd.DataFrame) -> str:
    """The map as Markdown, a table for each paper, with links beside the notebooks.

    Args:
        found: from `table`.
    """
    parts = []
    for paper, rows in found.groupby("paper", sort=False):
        lines = [
            f"#### {report.PAPERS[paper]}",
            "",
            "| item | shows | where | scale | state |",
            "|---|---|---|---|---|",
        ]
        for row in rows.itertuples():
            place = f"[{row.notebook}]({row.notebook}.ipynb)" if row.cell else row.notebook
            place += f" [{row.cell}]: {row.where}" if row.cell else ""
            why = f": {row.why}" if row.why else ""
            lines.append(f"| {row.item} | {row.shows} | {place} | {row.scale} | **{row.state}**{why} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
