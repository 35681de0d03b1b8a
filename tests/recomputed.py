"""A verdict computed without the package, for the tests of claims."""

import math
from statistics import mean, stdev

import pytest

# Student's 95% quantile, by the number of values: with two degrees of freedom in closed form, with five from a table
T_95 = {3: 0.9 / math.sqrt(2 * 0.95 * 0.05), 6: 2.015048}


def judged(values, margin: float, of_logs: bool) -> str:
    """The verdict on three or six values, as it begins."""
    values = [math.log(value) for value in values] if of_logs else values
    reach = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    back = math.exp if of_logs else float
    low, high = back(mean(values) - reach), back(mean(values) + reach)
    return "holds" if low > margin else "does not hold" if high < margin else "not testable at this scale"


def require_the_same(committed, again: dict, unjudged: frozenset = frozenset()) -> None:
    """The verdicts that a notebook committed are those that follow from its tables.

    Args:
        committed: its verdicts on the papers' claims, by id.
        again: id -> values, margin, whether they are ratios.
        unjudged: the ids that cannot be judged, whatever their values.
    """
    assert set(again) == set(committed.index)
    for id, (values, margin, ratio) in again.items():
        row, values = committed.loc[id], list(values)
        assert [float(value) for value in row["values"].split()] == pytest.approx(values, rel=2e-3, abs=2e-3), id
        said = "not testable at this scale" if id in unjudged else judged(values, margin, ratio)
        assert row["verdict"].split(":")[0] == said, id
        assert row["margin"] == margin and row["ratio"] == ratio and row["n"] == len(values)
