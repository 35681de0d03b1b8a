"""Every verdict of 01_pythia_kurtosis, computed once more from the points of its figures."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest

from tests.recomputed import judged

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "01_pythia_kurtosis"


def ends(name, column):
    """(size, seed) -> the means over streams at step 0 and at the last step."""
    found = defaultdict(lambda: defaultdict(list))
    for _, row in pd.read_csv(FIGURES / f"{name}.csv").iterrows():
        found[row["size"], row["seed"]][row["step"]].append(row[column])
    return {model: (mean(steps[0]), mean(steps[max(steps)])) for model, steps in found.items()}


def by_size(values):
    """The mean over the seeds of each size, of values by (size, seed)."""
    sizes = defaultdict(list)
    for (size, _), value in values.items():
        sizes[size].append(value)
    return [mean(of_size) for of_size in sizes.values()]


def growth(name, column):
    found = ends(name, column)
    return [math.exp(one) for one in by_size({m: math.log(last / first) for m, (first, last) in found.items()})]


def rank_correlations():
    points = pd.read_csv(FIGURES / "kurtosis_and_correlation.csv")
    found = {}
    for key, model in points.groupby(["size", "seed"], sort=False):
        ranks = model[["kurtosis - 1", "input_correlation_rms"]].rank()
        found[key] = ranks.corr().iloc[0, 1]
    return by_size(found)


def test_every_verdict_follows_from_the_points_of_the_figures(committed, rules):
    rise = by_size({m: last - first for m, (first, last) in ends("input_correlation", "input_correlation").items()})
    expected = {
        "he2024-pythia-kurtosis": (growth("kurtosis", "kurtosis - 1"), rules["factor"], True),
        "he2024-pythia-mmr": (growth("max_median_ratio", "max_median_ratio"), rules["ratio_factor"], True),
        "he2024-pythia-correlation": (rise, rules["correlation_rise"], False),
        "he2024-pythia-signal": (rank_correlations(), rules["rank_margin"], False),
    }
    assert set(expected) == set(committed.index)
    for id, (values, margin, of_logs) in expected.items():
        row = committed.loc[id]
        ours = sorted(float(value) for value in row["values"].split())
        assert ours == pytest.approx(sorted(values), rel=1e-3, abs=1e-4), id
        assert row["n"] == 3 and row["margin"] == margin
        assert row["verdict"].split(":")[0].startswith(judged(values, margin, of_logs)), id
