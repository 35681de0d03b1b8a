"""The papers' numbers and claims, and verdicts on them.

The numbers lie in `papers/*.csv`, one line each, with source and a flag for whether it was verified;
an unverified number is never handed out as the paper's. The claims lie in `papers/claims.yaml`; a verdict
that carries a claim's id stands in the scoreboard (`ofutils.report`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import exp, isfinite, log, nan
from statistics import mean, stdev

import pandas as pd
import yaml

from ofutils import UserError, params

SEEDS_NEEDED = 3
#: What a verdict is about: models trained here on real text, somebody else's checkpoint, or the task `backcopy`.
SETTINGS = ("text", "checkpoint", "images", "laboratory")
# Student's t, 95% one-sided, by degrees of freedom; beyond 10 the last one, which is a little wide
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 10: 1.812}
_PAPERS = ("bondarenko2023", "he2024", "puccetti2022")
#: Columns of a notebook's table of verdicts.
TABLE = ["id", "claim", "ours", "low", "high", "margin", "n", "values", "ratio", "paper", "verdict"]
#: What stands for the paper's number where it gives none, or none that was verified.
NO_NUMBER = "no verified number"


def table(paper: str, item: str) -> pd.DataFrame:
    """The verified numbers of one table or figure.

    Args:
        paper: `bondarenko2023`, `he2024` or `puccetti2022`.
        item: e.g. `table 6 OPT-125m`. What comes from released code or notebooks alone, and not from the
            paper, says so in its source.

    Returns:
        Columns row, column, value (text: a number or a bound such as `<12`), spread, unit, site, source.

    Raises:
        UserError: an unknown paper or item.
    """
    params.require_known("paper", paper, _PAPERS)
    with resources.as_file(resources.files("ofutils") / "papers" / f"{paper}.csv") as path:
        numbers = pd.read_csv(path, dtype=str, keep_default_na=False)
    params.require_known(f"item of {paper}", item, sorted(numbers["item"].unique()))
    chosen = numbers[(numbers["item"] == item) & (numbers["verified"] == "yes")]
    return chosen.drop(columns=["item", "verified"]).reset_index(drop=True)


def value(paper: str, item: str, row: str, column: str) -> float:
    """One verified number. Raises UserError where the paper's is not known, not verified, or only a bound."""
    numbers = table(paper, item)
    found = numbers[(numbers["row"] == row) & (numbers["column"] == column)]
    if len(found) != 1 or found["value"].iloc[0][0] in "<>":
        raise UserError(f"{paper}, {item}: no verified {column} for {row!r}")
    return float(found["value"].iloc[0])


@dataclass(frozen=True)
class Claim:
    """A paper's claim that a notebook judges; the fields are explained in `papers/claims.yaml`."""

    id: str
    paper: str
    item: str
    statement: str
    rule: str
    tolerance: dict[str, float]
    notebook: str
    setting: str = "text"
    numbers: str = ""

    def __post_init__(self):
        params.require_known(f"setting of {self.id}", self.setting, SETTINGS)

    @property
    def margin(self) -> float:
        """The parameter's value; its negative where the rule says so."""
        ((parameter, value),) = self.tolerance.items()
        return -value if f"-{parameter}" in self.rule else value

    def rule_at(self, margin: float) -> str:
        """The rule in words, with this margin in the place of the parameter that holds it."""
        (parameter,) = self.tolerance
        return re.sub(rf"-?\b{parameter}\b", f"{margin:g}", self.rule)


@cache
def _all_claims() -> tuple[Claim, ...]:
    text = (resources.files("ofutils") / "papers" / "claims.yaml").read_text(encoding="utf-8")
    return tuple(Claim(**entry) for entry in yaml.safe_load(text))


def claims(notebook: str | None = None) -> tuple[Claim, ...]:
    """The papers' claims in the order of the scoreboard: all, or those that one notebook judges.

    Args:
        notebook: e.g. `03_quant`; one without claims has none.
    """
    return tuple(one for one in _all_claims() if notebook in (None, one.notebook))


def claim(id: str) -> Claim:
    """The claim of that id, e.g. `he2024-soap-w8a8`.

    Raises:
        UserError: an unknown id.
    """
    known = {one.id: one for one in _all_claims()}
    params.require_known("claim", id, known)
    return known[id]


@dataclass(frozen=True)
class Verdict:
    """What became of one claim. `text` is for printing; `verdict` one of three words (and a reason).

    `id` is empty where no paper makes the claim; an unknown one raises a UserError.
    """

    claim: str
    paper: str
    low: float
    mean: float
    high: float
    margin: float
    values: tuple[float, ...]
    verdict: str
    ratio: bool = False
    id: str = ""

    def __post_init__(self):
        if self.id:
            claim(self.id)

    @property
    def seeds(self) -> int:
        """How many values it rests on."""
        return len(self.values)

    @property
    def text(self) -> str:
        """Two lines: the claim with our number and its interval; verdict, rule, seeds and the paper's number."""
        interval = f" [90%: {self.low:.3g} to {self.high:.3g}]" if self.seeds > 1 else ""
        rule = f"rule: above {self.margin:g}, n = {self.seeds}; paper: {self.paper}"
        return f"{self.claim} {self.mean:.3g}{interval}\n    {self.verdict} ({rule})\n"


def compare(
    claim: str,
    ours: Sequence[float],
    margin: float,
    paper: str,
    untestable: str = "",
    ratio: bool = False,
    id: str = "",
) -> Verdict:
    """Judge a claim of the form "this quantity lies above a margin", one value per seed.

    It holds when the 95% lower bound of the mean over seeds (Student's t) lies above the margin, and does
    not hold when the 95% upper bound lies below it; together they are a 90% interval. In between, with
    fewer than three seeds, or for the reason given, it is not testable at this scale.

    Args:
        claim: a sentence that names quantity and site.
        ours: one value per seed, paired where two trainings are compared.
        margin: fixed before the run.
        paper: the paper's own value, with its source; or that it gives none.
        untestable: why the claim cannot be judged here, if so.
        ratio: the values are positive ratios: mean and interval are taken of their logarithms.
        id: of the paper's claim that is judged, from `papers/claims.yaml`; empty where no paper makes it.

    Returns:
        The verdict, with the margin that was used.

    Raises:
        UserError: an unknown id.
    """
    given = tuple(map(float, ours))
    values = [(log(x) if x > 0 else nan) for x in given] if ratio else given
    n, centre = len(values), mean(values) if values else nan
    whole = all(map(isfinite, values))
    reach = _T95[min(n - 1, 10)] * stdev(values) / n**0.5 if n > 1 and whole else float("inf")
    low, centre, high = (exp(x) if ratio else x for x in (centre - reach, centre, centre + reach))
    if untestable:
        verdict = f"not testable at this scale: {untestable}"
    elif not whole:
        verdict = "not testable at this scale: not every seed gave a number"
    elif n < SEEDS_NEEDED:
        verdict = f"not testable at this scale: {n} of {SEEDS_NEEDED} seeds"
    elif low > margin:
        verdict = "holds"
    elif high < margin:
        verdict = "does not hold"
    else:
        verdict = "not testable at this scale: the margin lies inside the interval"
    return Verdict(claim, paper, low, centre, high, margin, given, verdict, ratio, id)


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """All verdicts of a notebook, to be saved as `verdicts`; of a claim judged twice the later one counts.

    Args:
        verdicts: in the order of the table.

    Returns:
        Columns id, claim, ours, low, high, margin, n, values, ratio, paper, verdict. `values` holds one
        number per seed, separated by spaces, in full precision: every verdict can be computed again.
    """
    last = {one.claim: one for one in verdicts}.values()
    rows = [
        (one.id, one.claim, one.mean, one.low, one.high, one.margin, one.seeds)
        + (" ".join(map(repr, one.values)), one.ratio, one.paper, one.verdict)
        for one in last
    ]
    return pd.DataFrame(rows, columns=TABLE)
