"""The papers' numbers, and verdicts on their claims.

The numbers lie in `papers/*.csv`, one line each, with source and a flag for whether it was verified;
an unverified number is never handed out as the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import mean, stdev

import pandas as pd

from ofutils import UserError, params

SEEDS_NEEDED = 3
# Student's t, 95% one-sided, by degrees of freedom; the normal value from 30 on
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 10: 1.812}
_PAPERS = ("bondarenko2023", "he2024")


def table(paper: str, item: str) -> pd.DataFrame:
    """The verified numbers of one table or figure.

    Args:
        paper: `bondarenko2023` or `he2024`.
        item: e.g. `table 6 OPT-125m`.

    Returns:
        Columns row, column, value (text: a number or a bound such as `<12`), spread, unit, site, source.

    Raises:
        UserError: an unknown paper or item.
    """
    if paper not in _PAPERS:
        raise UserError(f"unknown paper {paper!r}{params.suggest(paper, _PAPERS)}; known: {', '.join(_PAPERS)}")
    with resources.as_file(resources.files("ofutils") / "papers" / f"{paper}.csv") as path:
        numbers = pd.read_csv(path, dtype=str, keep_default_na=False)
    items = sorted(numbers["item"].unique())
    if item not in items:
        raise UserError(f"{paper} has no {item!r}{params.suggest(item, items)}; known: {', '.join(items)}")
    chosen = numbers[(numbers["item"] == item) & (numbers["verified"] == "yes")]
    return chosen.drop(columns=["item", "verified"]).reset_index(drop=True)


def value(paper: str, item: str, row: str, column: str) -> float:
    """One verified number. Raises UserError where the paper's is not known or not verified."""
    numbers = table(paper, item)
    found = numbers[(numbers["row"] == row) & (numbers["column"] == column)]
    if len(found) != 1:
        raise UserError(f"{paper}, {item}: no verified {column} for {row!r}")
    return float(found["value"].iloc[0].lstrip("<>"))


@dataclass(frozen=True)
class Verdict:
    """What became of one claim. `text` is for printing; `verdict` one of three words (and a reason)."""

    claim: str
    paper: str
    low: float
    mean: float
    high: float
    margin: float
    seeds: int
    verdict: str

    @property
    def text(self) -> str:
        """Claim, ours with its interval, the paper's, the rule, the verdict: four lines."""
        ours = f"{self.mean:.3g}"
        if self.seeds > 1:
            ours += f" [{self.low:.3g}, {self.high:.3g}]"
        return (
            f"{self.claim}\n  ours  {ours}, n = {self.seeds} seeds;  paper  {self.paper}\n"
            f"  rule  above {self.margin:g};  verdict  {self.verdict}\n"
        )


def compare(claim: str, ours: Sequence[float], margin: float, paper: str, untestable: str = "") -> Verdict:
    """Judge a claim of the form "this quantity lies above a margin", one value per seed.

    It holds when the 95% lower bound of the mean over seeds (Student's t) lies above the margin, and does
    not hold when the upper bound lies below it. In between, or with fewer than three seeds, or for the
    reason given, it is not testable at this scale.

    Args:
        claim: a sentence that names quantity and site.
        ours: one value per seed, paired where two trainings are compared.
        margin: fixed before the run.
        paper: the paper's own value, with its source; or that it gives none.
        untestable: why the claim cannot be judged here, if so.
    """
    values = [float(x) for x in ours]
    n, centre = len(values), mean(values) if values else float("nan")
    reach = _T95.get(n - 1, 1.645) * stdev(values) / n**0.5 if n > 1 else float("inf")
    low, high = centre - reach, centre + reach
    if untestable:
        verdict = f"not testable at this scale: {untestable}"
    elif n < SEEDS_NEEDED:
        verdict = f"not testable at this scale: {n} of {SEEDS_NEEDED} seeds"
    elif low > margin:
        verdict = "holds"
    elif high < margin:
        verdict = "does not hold"
    else:
        verdict = "not testable at this scale: the seeds differ too much"
    return Verdict(claim, paper, low, centre, high, margin, n, verdict)
