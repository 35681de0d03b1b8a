"""Every verdict of 02_bert_outliers, computed once more from the points of its figures and tables."""

from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import judged, rules_of

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "02_bert_outliers"


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False).set_index("id")


@pytest.fixture(scope="module")
def rules():
    return rules_of("02_bert_outliers")


def expected():
    """id -> (one value per draw, name of the rule, whether it is a ratio)."""
    ablation = pd.read_csv(FIGURES / "ablation.csv").groupby("switched off", sort=False)
    rows = {name: list(part.sort_values("draw").to_dict("records")) for name, part in ablation}
    off = rows[next(name for name in rows if name.startswith("largest activation, all"))]
    rule = rows[next(name for name in rows if name.startswith("weight rule, all"))]
    alone = pd.read_csv(FIGURES / "single_dimensions.csv")
    usual = {column: float(np.quantile(alone[column], 0.95)) for column in ("similarity damage", "MLM damage")}
    pairs = list(zip(rows["none"], off, rule, strict=True))
    layers = pd.read_csv(FIGURES / "one_layer.csv")
    layers = layers[layers["switched off"] == "both"]
    worst = [part["similarity damage"] for _, part in layers.groupby("draw")]
    cosines = pd.read_csv(FIGURES / "geometry.csv")
    fall = []
    for _, part in cosines[cosines["level"] == "tokens"].groupby("draw"):
        everything = part["cosine over"] == "all dimensions"
        fall.append(part[everything]["mean cosine"].mean() - part[~everything]["mean cosine"].mean())
    return {
        "similarity": ([(1 - o["agreement"]) / usual["similarity damage"] for _, o, _ in pairs], "times_usual", True),
        "mlm": ([(o["MLM loss"] - w["MLM loss"]) / usual["MLM damage"] for w, o, _ in pairs], "times_usual", False),
        "task": ([w["pair accuracy"] - o["pair accuracy"] for w, o, _ in pairs], "accuracy_lost", False),
        "weight-rule": ([(1 - r["agreement"]) / (1 - o["agreement"]) for _, o, r in pairs], "share_found", True),
        "layers": ([max(one) / median(one) for one in worst], "layer_factor", True),
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
