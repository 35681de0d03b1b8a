"""Every verdict of 04_token_frequency, computed once more from the points of its figures and tables."""

from pathlib import Path

import pandas as pd
import pytest

from tests.recomputed import judged

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "04_token_frequency"
MODEL = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def scored():
    return pd.read_csv(FIGURES / "scored.csv")


@pytest.fixture(scope="module")
def lines():
    """Of the figures of correlations: r by all that identifies it."""
    drawn = pd.concat(pd.read_csv(FIGURES / f"{name}.csv") for name in ("correlation", "positions", "mapping"))
    return drawn.drop_duplicates().set_index(["draw", "measure", "table", "level", "line", "block"])["r"].sort_index()


def check(row, values, margin, ratio):
    ours = sorted(float(value) for value in row["values"].split())
    assert ours == pytest.approx(sorted(values), rel=1e-3, abs=1e-4)
    assert row["n"] == 3 and row["margin"] == margin
    assert row["verdict"].split(":")[0].startswith(judged(values, margin, ratio))


def test_every_outlier_stands_out_in_the_block_where_it_is_judged(scored, rules):
    assert (scored["sigma"] > rules["sigma"]).all()
    assert len(scored["dimension"].unique()) > 1
    assert (scored.groupby("dimension")[["block", "sigma"]].nunique() == 1).all().all()


@pytest.mark.parametrize(
    ("measure", "level"),
    [("raw", "token"), ("log", "token"), ("spearman", "token"), ("raw", "position"), ("log", "position")],
)
def test_the_outliers_against_the_other_dimensions(stated, rules, scored, lines, measure, level):
    dims = scored.drop_duplicates("dimension").set_index("dimension")["block"]
    values = []
    for draw in range(3):
        at = lines.loc[draw, measure, "counts", level]
        values.append(sum(at[str(dim), block] - at["p95", block] for dim, block in dims.items()) / len(dims))
    claim = f"{MODEL}: r of the outliers ({measure}, {level}, norm2) above the others' 95th percentile by"
    check(stated.loc[claim], values, rules["percentile_margin"], ratio=False)
    assert (stated.loc[claim, "id"] != "") == ((measure, level) == ("raw", "token"))


def test_the_ranks_agree_with_the_percentiles(scored, lines):
    """Who lies above the 95th percentile of the 378 others has at most 18 of them above itself."""
    others = 384 - scored["dimension"].nunique()
    for one in scored[scored["table"] == "counts"].itertuples():
        assert (one.rank - 1 <= 0.05 * others) == (one.above > 0)
        largest = lines.loc[one.draw, one.measure, one.table, one.level, "p100", one.block]
        assert (one.rank == 1) == (one.r > largest)


@pytest.mark.parametrize("measure", ["raw", "log", "spearman"])
def test_the_mapping_mistake(stated, rules, scored, lines, measure):
    dims = scored.drop_duplicates("dimension").set_index("dimension")["block"]
    values = []
    for draw in range(3):
        own, mistaken = (lines.loc[draw, measure, table, "token"] for table in ("counts", "authors' mapping"))
        values.append(sum(own[str(dim), b] - mistaken[str(dim), b] for dim, b in dims.items()) / len(dims))
    claim = f"{MODEL}: the mapping mistake lowers r of the outliers ({measure}, norm2) by"
    check(stated.loc[claim], values, rules["mapping_margin"], ratio=False)


def test_diversity_is_counted_from_the_sorted_counts(stated, rules):
    drawn, tokens = (pd.read_csv(FIGURES / f"{name}.csv") for name in ("diversity", "tokens"))
    types = drawn.groupby(["said by", "draw"]).size()
    assert tokens.set_index(["said by", "draw"])["distinct types"].to_dict() == types.to_dict()
    words = drawn.groupby(["said by", "draw"])["count"].sum().unstack("said by")
    assert (words.nunique(axis=1) == 1).all()  # every variant names as many tokens as the text has
    for title in ("outliers off", "off in the head too", "random ones off"):
        claim = f"{MODEL}: distinct tokens that the full model names, divided by those with {title} (norm2):"
        ratios = (types["full model"] / types[title]).to_list()
        check(stated.loc[claim], ratios, rules["diversity_factor"], ratio=True)
        assert (stated.loc[claim, "id"] == "puccetti2022-diversity") == (title == "outliers off")
