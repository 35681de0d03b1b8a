"""Every verdict of 11_pretraining_data, computed once more from the tables beside its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import judged, require_the_same

FIGURES = Path(__file__).parents[2] / "figures" / "11_pretraining_data"
SEEDS = [1, 2, 3]
TEXTS = ["natural", "flattened", "evenly split", "shuffled", "uniform", "one separator", "many separators"]


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv")


@pytest.fixture(scope="module")
def peaks():
    """By text, the peak over training of each seed's kurtosis - 1, from the points of the curves."""
    curves = read("trainings")
    return {text: one.groupby("seed")["kurtosis - 1"].max() for text, one in curves.groupby("text")}


def spearman(first, second):
    return float(np.corrcoef(pd.Series(list(first)).rank(), pd.Series(list(second)).rank())[0, 1])


def share(own, others):
    """Of pairs in which the first is larger, equal ones a half, one by one."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in others]
    return sum(wins) / len(wins)


def test_every_claim_follows_from_the_tables(committed, rules, peaks):
    ends = read("propagation")
    ranks = []
    for seed in SEEDS:
        own = ends[(ends["seed"] == seed) & ends["text"].isin(TEXTS)]
        assert sorted(own["text"]) == sorted(TEXTS)
        ranks.append(spearman(own["kurtosis - 1"], own["correlation"]))
    last = read("standing").query("text == 'natural'")
    last = last[last["step"] == last["step"].max()].sort_values("seed")
    assert last["seed"].tolist() == SEEDS
    require_the_same(
        committed,
        {
            "puccetti2022-frequency-drives": (peaks["evenly split"] / peaks["flattened"], rules["factor"], True),
            "puccetti2022-emergence-weights": (last["weight"], rules["same"], False),
            "puccetti2022-emergence-frequency": (last["frequency"], rules["same"], False),
            "he2024-data-correlation": (ranks, rules["rank_margin"], False),
        },
    )


def test_the_standing_is_that_of_the_dimensions(rules):
    found, standing = read("dimensions"), read("standing").query("text == 'natural' and seed == 1").set_index("step")
    last = found[found["step"] == found["step"].max()]
    chosen = last.sort_values("size", ascending=False)["dimension"].tolist()[: rules["top"]]
    for step, one in found.groupby("step"):
        inside = one["dimension"].isin(chosen)
        for measure in ("size", "weight", "frequency"):
            assert standing.loc[step, measure] == pytest.approx(
                share(one.loc[inside, measure], one.loc[~inside, measure])
            )


def test_one_text_against_another(stated, rules, peaks):
    start = "peak of kurtosis - 1 (residual stream) over training: "
    ratios = stated[[claim.startswith(start) for claim in stated.index]]
    assert len(ratios) == 4
    for claim, row in ratios.iterrows():
        one, other = claim.removeprefix(start).split(" divided by ")
        values = peaks[one] / peaks[other]
        assert [float(value) for value in row["values"].split()] == pytest.approx(values.tolist(), rel=1e-3)
        assert row["verdict"].split(":")[0] == judged(values, rules["factor"], True)
        assert (row["id"] != "") == ((one, other) == ("evenly split", "flattened"))


def test_what_appears_stays():
    standing, when = read("standing"), read("when").set_index(["text", "seed"])
    for key, one in standing.sort_values("step").groupby(["text", "seed"]):
        for measure in ("size", "weight", "frequency"):
            first = when.loc[key, measure]
            later = one[one["step"] >= first] if first == first else one.tail(1)
            assert (later[measure] > 0.9).all() if first == first else (later[measure] <= 0.9).all()
