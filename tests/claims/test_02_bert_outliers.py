"""Every verdict of 02_bert_outliers, computed once more from the points of its figures and tables."""

import json
from pathlib import Path
from statistics import mean, median

import pandas as pd
import pytest

from tests.recomputed import judged

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "02_bert_outliers"


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv")


def starting(sets, text):
    """The values by draw or seed of the one set whose name starts so."""
    (found,) = [values for name, values in sets.items() if name.startswith(text)]
    return found


def by_set(table, index, column):
    """Name of the set -> one value per draw or seed, the mean over whatever else there is (tasks, splits)."""
    return {
        name: list(part.groupby(index)[column].mean().sort_index())
        for name, part in table.groupby("switched off", sort=False)
    }


def expected():
    """id -> (one value per draw or seed, name of the rule, whether it is a ratio)."""
    similarity, mlm = (by_set(read("ablation"), "draw", kind) for kind in ("similarity", "MLM"))
    largest, others = "largest activation: ", "worst others, "
    blocks = read("one_layer")
    blocks = blocks[blocks["switched off"].str.startswith("all of ")]
    over_blocks = [list(part["similarity"]) for _, part in blocks.groupby("draw")]
    tuned = read("finetuned")
    scores = by_set(tuned[tuned["block"] < 0], "seed", "score")
    cosines = read("geometry")
    last = cosines["depth"].max()  # the output, which is no stream that enters a block
    streams = cosines[(cosines["level"] == "tokens") & (cosines["depth"] < last)]
    whole, without = (streams[streams["cosine over"].str.startswith(one)] for one in ("all ", "without ["))
    judged_set = json.loads((FIGURES / "ablation.json").read_text())["largest"]
    without = without[without["cosine over"] == f"without {judged_set}"]
    fall = [
        mean(whole[whole["draw"] == draw]["mean cosine"]) - mean(without[without["draw"] == draw]["mean cosine"])
        for draw in sorted(whole["draw"].unique())
    ]

    def over(above, below):
        return [a / b for a, b in zip(above, below, strict=True)]

    pair, rule = starting(similarity, largest), starting(similarity, "weight rule: ")
    left = [a - b for a, b in zip(scores["none"], starting(scores, largest), strict=True)]
    return {
        "similarity": (over(pair, starting(similarity, f"{others}similarity")), "times_worst", True),
        "mlm": (over(starting(mlm, largest), starting(mlm, f"{others}MLM")), "times_worst", True),
        "finetuned": (left, "accuracy_lost", False),
        "weight-rule": (over(rule, pair), "share_found", True),
        "layers": ([max(one) / median(one) for one in over_blocks], "layer_factor", True),
        "geometry": (fall, "cosine_fall", False),
    }


def test_every_verdict_follows_from_the_points(committed, rules):
    again = expected()
    assert {f"puccetti2022-{name}" for name in again} == set(committed.index)
    for name, (values, rule, ratio) in again.items():
        row = committed.loc[f"puccetti2022-{name}"]
        assert [float(value) for value in row["values"].split()] == pytest.approx(values, rel=2e-3, abs=1e-4), name
        assert row["n"] == 3 and row["margin"] == rules[rule] and row["ratio"] == ratio
        assert row["verdict"].startswith(judged(values, rules[rule], ratio)), name


def test_the_worst_others_are_the_worst_of_the_single_dimensions():
    alone, sets = read("single_dimensions"), list(by_set(read("ablation"), "draw", "MLM"))
    (judged_names,) = [json.loads(name.partition(": ")[2]) for name in sets if name.startswith("largest")]
    (ruled,) = [json.loads(name.partition(": ")[2]) for name in sets if name.startswith("weight rule")]
    others = alone[~alone["dimension"].isin([*judged_names, *ruled])]
    for kind in ("similarity", "MLM"):
        (named,) = [json.loads(name.partition(": ")[2]) for name in sets if name.startswith(f"worst others, {kind}")]
        assert others.nlargest(len(named), kind)["dimension"].tolist() == named


def test_fine_tuned_seeds_are_others_than_those_looked_at_before():
    tuned = read("finetuned")
    assert set(tuned["seed"]) == {4, 5, 6} and tuned["score"].between(0, 1).all()
    assert sorted(set(tuned["block"])) == list(range(-1, 6))
