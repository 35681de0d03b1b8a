"""Every verdict of 10_vit, computed once more from the tables beside its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import judged

FIGURES = Path(__file__).parents[2] / "figures" / "10_vit"
SEEDS = [2, 3, 4]


def of(method, column):
    table = pd.read_csv(FIGURES / "methods.csv")
    rows = table[table["method"] == method].sort_values("seed")
    assert rows["seed"].tolist() == SEEDS, method
    return rows[column].to_numpy()


def expected(rules):
    """id -> (values, margin, whether they are ratios, whether there is nothing to judge)."""
    vanilla = {name: of("vanilla", name) for name in ("outliers", "tensor kurtosis", "accuracy", "inf norm", "peak")}
    few = vanilla["outliers"].mean() < rules["some"]
    light = vanilla["tensor kurtosis"].mean() < rules["heavy"]
    found = {
        "bondarenko2023-vit-background": (
            of("vanilla", "plain") - of("vanilla", "plain patches"),
            "more",
            False,
            few,
        ),
        "bondarenko2023-vit-attention": (of("vanilla", "attention"), "higher", True, few),
        "bondarenko2023-vit-values": (1 / of("vanilla", "values"), "higher", True, few),
        "bondarenko2023-vit-w8a8": (vanilla["accuracy"] - of("vanilla", "W8A8 accuracy"), "damage", False, False),
        "puccetti2022-vit-ablation": (
            of("vanilla", "lost largest") - of("vanilla", "lost random"),
            "damage",
            False,
            False,
        ),
        "he2024-vit-op-peak": (vanilla["peak"] / of("OP", "peak"), "factor", True, False),
    }
    for short, method in (("clipped", "clipped softmax"), ("gated", "gated attention")):
        for name, column in (("norm", "inf norm"), ("kurtosis", "tensor kurtosis")):
            values = vanilla[column] / of(method, column)
            found[f"bondarenko2023-vit-{short}-{name}"] = values, "factor", True, light
    for id, method in (
        ("bondarenko2023-vit-clipped", "clipped softmax"),
        ("bondarenko2023-vit-gated", "gated attention"),
    ):
        found[f"{id}-accuracy"] = of(method, "accuracy") - vanilla["accuracy"], "-cost", False, False
    found["he2024-vit-op-accuracy"] = of("OP", "accuracy") - vanilla["accuracy"], "-cost", False, False
    normed, zeta = of("vanilla, patch norm", "inf norm"), of("zeta 1.004", "inf norm")
    found["bondarenko2023-vit-patch-norm"] = vanilla["inf norm"] / normed, "factor", True, light
    found["bondarenko2023-vit-zeta"] = zeta / vanilla["inf norm"], "share", True, light
    margins = rules | {"-cost": -rules["cost"]}
    return {id: (values, margins[rule], ratio, none) for id, (values, rule, ratio, none) in found.items()}


def test_every_verdict_follows_from_the_table(committed, rules):
    again = expected(rules)
    assert set(again) == set(committed.index)
    for id, (values, margin, ratio, none) in again.items():
        row = committed.loc[id]
        stated = [float(value) for value in row["values"].split()]
        assert stated == pytest.approx(list(values), rel=2e-3, abs=2e-3, nan_ok=True), id
        said = "not testable at this scale" if none else judged(list(values), margin, ratio)
        assert row["verdict"].split(":")[0] == said, id
        assert row["margin"] == margin and row["ratio"] == ratio and row["n"] == len(SEEDS)


def test_peaks_are_those_of_the_curves_over_training():
    steps = pd.read_csv(FIGURES / "training.csv")
    inner = steps[steps["block"] != "out"]
    peaks = inner.groupby(["method", "seed"])["kurtosis"].max()
    for method in peaks.index.get_level_values(0).unique():
        assert peaks[method].to_numpy() == pytest.approx(of(method, "peak"), rel=1e-4)


def test_the_maps_are_of_the_patches_of_one_image():
    maps = pd.read_csv(FIGURES / "maps.csv")
    sizes = maps.groupby(["model", "map"])["patch"].agg(["min", "count"])
    assert (sizes["min"] == -1).all() and sizes["count"].nunique() == 1
    received = maps[maps["map"] == "attention received"].groupby("model")["value"].sum()
    assert received["vanilla"] == pytest.approx(1, abs=5e-3)  # a mean over queries of rows that sum to 1
    assert received["clipped softmax"] < 1 + 5e-3 and np.isfinite(maps["value"]).all()
