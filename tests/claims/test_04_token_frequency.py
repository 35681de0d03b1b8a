"""Every verdict of 04_token_frequency, computed once more from the points of its figures and tables."""

from pathlib import Path

import pandas as pd
import pytest

from tests.recomputed import judged, rules_of

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "04_token_frequency"


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False).set_index("claim")


@pytest.fixture(scope="module")
def rules():
    return rules_of("04_token_frequency")


def check(row, values, margin, ratio):
    ours = sorted(float(value) for value in row["values"].split())
    assert ours == pytest.approx(sorted(values), rel=1e-3, abs=1e-4)
    assert row["n"] == 3 and row["margin"] == margin
    assert row["verdict"].split(":")[0].startswith(judged(values, margin, ratio))


def by_draw():
    return [part for _, part in pd.read_csv(FIGURES / "largest.csv").groupby("draw")]


@pytest.mark.parametrize("measure", ["raw", "log", "spearman"])
def test_the_outliers_against_the_other_dimensions(committed, rules, measure):
    column, values = f"{measure}, counts", []
    for part in by_draw():
        rest = part.loc[~part["outlier"], column].sort_values().to_list()
        at = 0.95 * (len(rest) - 1)
        percentile = rest[int(at)] + (at - int(at)) * (rest[int(at) + 1] - rest[int(at)])
        values.append(part.loc[part["outlier"], column].mean() - percentile)
    claim = f"the outliers' largest r ({measure}, norm2) lies above the other dimensions' 95th percentile by"
    check(committed.loc[claim], values, rules["percentile_margin"], ratio=False)


def test_the_largest_r_are_those_of_the_figure(committed):
    drawn = pd.read_csv(FIGURES / "correlation.csv")
    for draw, part in enumerate(by_draw()):
        for _, line in part[part["outlier"]].iterrows():
            for measure in ("raw", "log", "spearman"):
                same = (drawn["line"] == str(line["dimension"])) & (drawn["measure"] == measure)
                largest = drawn.loc[same & (drawn["draw"] == draw), "r"].max()
                assert largest == pytest.approx(line[f"{measure}, counts"], rel=1e-4)


@pytest.mark.parametrize("measure", ["raw", "log"])
def test_the_mapping_mistake(committed, rules, measure):
    values = []
    for part in by_draw():
        own = part[part["outlier"]]
        values.append((own[f"{measure}, counts"] - own[f"{measure}, authors' mapping"]).mean())
    claim = f"the mapping mistake lowers the outliers' largest r ({measure}, norm2) by"
    check(committed.loc[claim], values, rules["mapping_margin"], ratio=False)


def test_one_text_against_another(committed, rules):
    peaks = pd.read_csv(FIGURES / "texts.csv").groupby(["text", "seed"])["kurtosis - 1"].max()
    start = "peak of kurtosis - 1 (residual stream) over training: "
    ratios = committed[[claim.startswith(start) for claim in committed.index]]
    assert len(ratios) == 6
    for claim, row in ratios.iterrows():
        one, other = claim.removeprefix(start).split(" divided by ")
        check(row, (peaks[one] / peaks[other]).to_list(), rules["factor"], ratio=True)


def test_the_claim_about_causes_is_of_natural_and_flattened_text(committed):
    (claim,) = committed.index[committed["id"] == "puccetti2022-frequency-drives"]
    assert claim.endswith("natural divided by flattened")
