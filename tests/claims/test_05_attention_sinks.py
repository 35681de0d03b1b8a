"""Every verdict of 05_attention_sinks, computed once more from the points of its figures."""

import json
import math
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest

from tests.recomputed import judged, rules_of

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "05_attention_sinks"
RULES = {"weights": "by weight", "activation": "by activation"}


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv")


@pytest.fixture(scope="module")
def committed():
    table = pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False)
    return table[table["id"] != ""].set_index("id")


@pytest.fixture(scope="module")
def rules():
    return rules_of("05_attention_sinks")


def per_draw(table, column):
    return [group[column].tolist() for _, group in table.groupby("draw")]


def of_the_paper(rules):
    """Of Puccetti: id -> (values, margin, of logs)."""
    standing, ablation = read("standing"), read("ablation")
    found = {}
    for short, rule in RULES.items():
        own = standing[standing["rule"] == rule].assign(excess=lambda t: t["r"] - t["95th percentile"])
        excess = [mean(values) for values in per_draw(own, "excess")]
        found[f"puccetti2022-vertical-{short}"] = (excess, rules["vertical_margin"], False)
        special = {case: [mean(v) for v in per_draw(rows, "special")] for case, rows in ablation.groupby("case")}
        triples = zip(special["random"], special[rule], special["none"], strict=True)
        lost = [(control - without) / full for control, without, full in triples]
        found[f"puccetti2022-pattern-{short}"] = (lost, rules["pattern_loss"], False)
    return found


def of_bondarenko(rules):
    heads, groups = read("heads"), read("outlier_groups")
    block = json.loads((FIGURES / "outliers.json").read_text())["block"]
    there = groups[groups["block"] == block].sort_values("draw")
    shares = (there["start"] + there["separator"] + there["punctuation"]).tolist()
    values, products = [], []
    for _, draw in heads.groupby("draw"):
        sinking = draw["start"] + draw["separator"] > rules["sink_share"]
        values.append(math.exp(mean(-math.log(ratio) for ratio in draw.loc[sinking, "value_ratio"])))
        products.append(draw.loc[~sinking, "output"].mean() / draw.loc[sinking, "output"].mean())
    return {
        "bondarenko2023-outliers-at-separators": (shares, rules["separator_share"], False),
        "bondarenko2023-small-values": (values, rules["value_factor"], True),
        "bondarenko2023-small-products": (products, rules["output_factor"], True),
    }


def test_every_verdict_follows_from_the_points_of_the_figures(committed, rules):
    expected = of_the_paper(rules) | of_bondarenko(rules)
    assert set(expected) == set(committed.index)
    for id, (values, margin, of_logs) in expected.items():
        row = committed.loc[id]
        assert [float(value) for value in row["values"].split()] == pytest.approx(values, rel=1e-3, abs=1e-4), id
        assert row["n"] == 3 and row["margin"] == margin
        assert row["verdict"].split(":")[0] == judged(values, margin, of_logs), id


def test_the_correlations_drawn_are_those_judged():
    """The pooled correlation of all draws lies among those of single draws."""
    pooled, standing = read("correlation"), read("standing")
    pooled = pooled[pooled["hidden"] == "input"]
    named = json.loads((FIGURES / "correlation.json").read_text())
    for rule in RULES.values():
        dims = named[rule.replace(" ", "_")]
        for block, rows in standing[standing["rule"] == rule].groupby("block"):
            largest = pooled[(pooled["block"] == block) & pooled["dimension"].isin(dims)]["r"].max()
            assert rows["r"].min() - 0.05 < largest < rows["r"].max() + 0.05


def test_remedies_are_not_judged_where_no_vanilla_head_sinks(rules):
    table = pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False)
    rest, remedies = table[table["id"] == ""], read("remedies")
    trained = remedies[remedies["state"] == "trained"]
    vanilla = trained[trained["method"] == "vanilla"]
    sinks = (vanilla["largest"] > rules["sink_share"]).any()
    assert len(rest) == 2
    assert sinks or rest["verdict"].str.startswith("not testable at this scale: no head").all()
    clipped = trained[trained["method"] == "clipped softmax"]
    assert clipped["zeros"].min() > 0.5 and vanilla["zeros"].max() < 0.01
