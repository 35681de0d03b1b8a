"""The scoreboard: every claim of the papers, what was measured here, and what became of it.

It is made of `papers/claims.yaml` and of the tables of verdicts that the notebooks save
(`figures/<notebook>/verdicts.csv`, with the scale in the .json beside it), and stands in the README.

    python -m ofutils.report    write the scoreboard into README.md; says whether it changed
"""

import json
from math import isfinite, nan
from pathlib import Path

import pandas as pd

from ofutils import UserError, params, reference
from ofutils.records import write_atomically

#: The papers in the order of the scoreboard.
PAPERS = {
    "puccetti2022": "Puccetti et al. 2022, *Outlier Dimensions that Disrupt Transformers*",
    "bondarenko2023": "Bondarenko et al. 2023, *Quantizable Transformers*",
    "he2024": "He et al. 2024, *Understanding and Minimising Outlier Features*",
}
NOT_RUN = "not run yet"
BEGIN, END = "<!-- scoreboard -->", "<!-- /scoreboard -->"
_HEADER = "| claim | paper | rule | ours [90% interval] | verdict |\n|---|---|---|---|---|"


def scoreboard(root: Path | None = None) -> pd.DataFrame:
    """One row per claim, grouped by paper; a claim judged in the laboratory too stands above its like from there.

    Args:
        root: where `figures/` lies; by default the repository.

    Returns:
        Columns id, paper, item, claim, number (the paper's, if verified), rule (with the margin used), ours,
        low, high, n, scale, verdict, notebook, setting. Where the notebook has not run: no values (NaN, n = 0, empty
        scale) and the verdict "not run yet".

    Raises:
        UserError: a table of verdicts that is not readable.
    """
    root = root or params.root()
    known = reference.claims()
    judged = {name: _judged(root, name) for name in {claim.notebook for claim in known}}
    order = [(paper, one) for paper in PAPERS for one in dict.fromkeys(statement(claim.id) for claim in known)]
    rows = [_row(claim, judged[claim.notebook].get(claim.id)) for claim in known]
    return pd.DataFrame(sorted(rows, key=lambda row: order.index((row["paper"], statement(row["id"])))))


def statement(id: str) -> str:
    """What a claim says, whatever its setting: `he2024-lab-op-kurtosis` and `he2024-op-kurtosis` say the same."""
    return id.replace("-lab-", "-")


def _judged(root: Path, notebook: str) -> dict[str, dict]:
    """The verdicts of a notebook by the id of their claim, each with its scale; none where it has not run."""
    path = root / "figures" / notebook / "verdicts.csv"
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        scale = json.loads(path.with_suffix(".json").read_text())["scale"]
        missing = [column for column in reference.TABLE if column not in table]
        table = table.replace({one: {"": "nan"} for one in ("ours", "low", "high")})
        table = (
            table if missing else table.astype(dict.fromkeys(("ours", "low", "high", "margin"), float) | {"n": int})
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} or the .json beside it is not readable; execute {notebook} again") from error
    params.require(not missing, f"{path} has no column {', '.join(missing)}; execute {notebook} again")
    known = {claim.id for claim in reference.claims(notebook)}
    unknown = sorted(set(table["id"]) - known - {""})
    params.require(not unknown, f"{path} judges {', '.join(unknown)}, which no claim of {notebook} is called")
    return {row["id"]: row | {"scale": scale} for row in table.to_dict("records") if row["id"]}


def _row(claim: reference.Claim, found: dict | None) -> dict:
    unknown = {"ours": nan, "low": nan, "high": nan, "n": 0, "scale": "", "verdict": NOT_RUN}
    found = found or unknown | {"paper": reference.NO_NUMBER, "margin": claim.margin}
    number = claim.numbers if found["paper"] == reference.NO_NUMBER else found["paper"]
    row = {"id": claim.id, "paper": claim.paper, "item": claim.item, "claim": claim.statement, "number": number}
    row |= {"rule": claim.rule_at(found["margin"])} | {name: found[name] for name in unknown}
    return row | {"notebook": claim.notebook, "setting": claim.setting}


def summary(board: pd.DataFrame) -> str:
    """For each setting how many claims hold, do not, cannot be tested at the scale that ran, or wait.

    And how many statements are open in every setting, see `statement`.
    """
    where = {
        "text": "On models trained on text",
        "images": "on images",
        "checkpoint": "on a checkpoint",
        "laboratory": "in the laboratory",
    }
    parts = [(where[one], board[board["setting"] == one]) for one in where]
    waits = ~board["verdict"].str.split(":").str[0].isin(["holds", "does not hold"])
    everywhere = waits.groupby(board["id"].map(statement)).all()
    said = f"{everywhere.sum()} of {len(everywhere)} statements are open in every setting"
    return "; ".join([*(f"{place}: {counted(rows)}" for place, rows in parts if len(rows)), said]) + "."


def recorded(notebook: str, *names: str) -> list:
    """What a notebook's last committed execution saved, for the figure on its first screen.

    Args:
        notebook: e.g. `02_bert_outliers`.
        names: of its tables, `figures/<notebook>/<name>.csv`.

    Returns:
        The provenance of the first table (`scale` and what else was saved), then the tables, in this order.

    Raises:
        UserError: a table that is not there or not readable, or tables of more than one scale.
    """
    folder, tables = params.root() / "figures" / notebook, []
    try:
        about = [json.loads((folder / f"{name}.json").read_text()) for name in names]
        tables = [pd.read_csv(folder / f"{name}.csv", keep_default_na=name != "verdicts") for name in names]
    except (OSError, ValueError) as error:
        raise UserError(f"figures/{notebook}: {error}; execute {notebook} again") from error
    scales = sorted({one["scale"] for one in about})
    params.require(len(scales) == 1, f"figures/{notebook}: {', '.join(names)} are of scales {' and '.join(scales)}")
    return [about[0], *tables]


def answer(notebook: str) -> str:
    """One line: the verdicts of a notebook's last committed execution, counted, and the scale that it ran at."""
    about, table = recorded(notebook, "verdicts")
    claims, beside = table[table["id"] != ""], table[table["id"] == ""]
    more = f"; beside them {counted(beside, 'comparisons')}" if len(beside) else ""
    return f"Scale {about['scale']}: {counted(claims)}{more}."


def counted(board: pd.DataFrame, what: str = "claims") -> str:
    """In words, how many of these verdicts hold, do not, cannot be tested at the scale that ran, or wait."""
    kinds = board["verdict"].str.split(":").str[0]
    said = {
        "holds": ("holds", "hold"),
        "does not hold": ("does not hold", "do not hold"),
        "not testable at this scale": ("cannot be tested at the scale that ran",) * 2,
        NOT_RUN: ("has not been run yet", "have not been run yet"),
    }
    counts = [(int((kinds == kind).sum()), words) for kind, words in said.items()]
    parts = [f"{count} {words[count != 1]}" for count, words in counts if count]
    return f"of {len(board)} {what.removesuffix('s') if len(board) == 1 else what}, " + ", ".join(parts)


def render(board: pd.DataFrame, root: Path | None = None) -> str:
    """The scoreboard as Markdown: the summary, then a table for each paper.

    Args:
        board: from `scoreboard`.
        root: where `notebooks/` lies, which the verdicts link to; by default the repository.
    """
    root, parts = root or params.root(), [f"**{summary(board)}**"]
    for paper, rows in board.groupby("paper", sort=False):
        lines = [_line(row, root) for row in rows.to_dict("records")]
        parts.append("\n".join([f"### {PAPERS[paper]}\n\n{_HEADER}", *lines]))
    return "\n\n".join(parts)


def _line(row: dict, root: Path) -> str:
    ours = f"{row['ours']:.3g}" if row["n"] else ""
    if isfinite(row["low"]) and isfinite(row["high"]):
        ours += f" [{row['low']:.3g} to {row['high']:.3g}]"
    if row["n"]:
        ours += f"; {row['scale']}, {row['setting']}, n = {row['n']}"
    path = f"notebooks/{row['notebook']}.ipynb"
    kind, _, reason = row["verdict"].replace("not testable at this scale", "not testable").partition(": ")
    verdict = f"**{kind}**: {reason}" if reason else f"**{kind}**"
    verdict += f" ([{row['notebook']}]({path}))" if (root / path).is_file() else f" ({row['notebook']})"
    number = row["number"].partition(f" ({row['paper']}, ")[0]  # the item says where
    paper = f"{row['item']}: {number}" if number else row["item"]
    cells = (row["claim"], paper, row["rule"], ours, verdict)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def insert(text: str, board: str) -> str:
    """`text` with `board` between the two markers.

    Raises:
        UserError: not exactly one pair of markers, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    params.require(
        bool(begin and end) and text.count(BEGIN) == text.count(END) == 1,
        f"README.md needs the markers {BEGIN} and {END}, once each and in this order",
    )
    return f"{before}{BEGIN}\n\n{board}\n\n{END}{after}"


def main(arguments: list[str]) -> None:
    """The command line: write the scoreboard into README.md."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    params.require(not arguments, f"no arguments are known, got {' '.join(arguments)}")
    readme = params.root() / "README.md"
    try:
        old = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {readme}: {error.strerror}") from error
    board = scoreboard()
    new = insert(old, render(board))
    if new != old:
        write_atomically(readme, lambda path: path.write_text(new, encoding="utf-8"))
    print(f"README.md {'changed' if new != old else 'unchanged'}: {summary(board)}")


if __name__ == "__main__":
    params.main_guard(main)
