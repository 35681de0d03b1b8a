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
    for id, one, other in (("layerscale-accuracy", "LayerScale", "vanilla"), ("op-layerscale", "OP", "LayerScale")):
        found[f"he2024-vit-{id}"] = of(one, "accuracy") - of(other, "accuracy"), "-cost", False, False
    found |= of_tables(rules, light)
    tuned = pd.read_csv(FIGURES / "finetuned.csv")
    left = tuned[tuned["model"].str.contains("every norm")].pivot(index="seed", columns="model", values="accuracy")
    lost = left["without two others, every norm"] - left["without two by weight, every norm"]
    few = tuned["sigma"].min() < 3
    found["puccetti2022-vit-finetuned"] = lost.to_numpy(), "damage", False, few
    margins = rules | {"-cost": -rules["cost"]}
    return {id: (values, margins[rule], ratio, none) for id, (values, rule, ratio, none) in found.items()}


def rows_of(number, column):
    """Row of a table of the paper -> what our seeds have."""
    table = pd.read_csv(FIGURES / "tables.csv")
    own = table[(table["table"] == number) & (table["of"] != "paper")].sort_values("of")
    return {row: part[column].to_numpy() for row, part in own.groupby("row")}


def of_tables(rules, light):
    """As `expected`, of the rows of Tables 7 and 8."""
    seven, eight = (
        {column: rows_of(number, column) for column in ("accuracy", "W8A8 accuracy", "inf norm", "tensor kurtosis")}
        for number in (7, 8)
    )
    exact, rounded, norm = seven["accuracy"], seven["W8A8 accuracy"], seven["inf norm"]
    whole = (exact["vanilla"] - rounded["vanilla"]).mean() < rules["damage"]
    beside = [row for row in exact if "patch norm" in row and "vanilla" not in row]
    assert len(beside) == 9 and {row: len(values) for row, values in exact.items()} == dict.fromkeys(
        exact, len(SEEDS)
    )
    n, found = "vanilla; patch norm", {}
    for id, row in (("clipped", "clipped softmax -0.003"), ("gated", "gated linear 0.5"), ("patch-norm", n)):
        found[f"{id}-w8a8"] = rounded[row] - rounded["vanilla"], "damage", False, whole
    found["gate-mlp-norm"] = norm["vanilla"] / norm["gated mlp n_hid 4"], "factor", True, light
    found["gate-mlp-accuracy"] = exact["gated mlp n_hid 4"] - exact["vanilla"], "-cost", False, False
    tails = seven["tensor kurtosis"]
    found["patch-norm-kurtosis"] = tails["vanilla"] / tails[n], "factor", True, light
    found["patch-norm-accuracy"] = exact[n] - exact["vanilla"], "-cost", False, False
    best = np.max([rounded[row] for row in beside], axis=0)
    found["like-for-like-w8a8"] = rounded[n] - best, "-cost", False, whole
    found["like-for-like-norm"] = np.min([norm[row] for row in beside], axis=0) / norm[n], "share", True, light
    for kind in ("clipped", "gated"):
        least = np.min([exact[row] for row in beside if row.startswith(kind)], axis=0)
        found[f"{kind}-normed-accuracy"] = least - exact[n], "-cost", False, False
    exact, rounded, norm = eight["accuracy"], eight["W8A8 accuracy"], eight["inf norm"]
    zetas = [f"zeta {one}" for one in ("1.001", "1.002", "1.004", "1.01")]
    best = np.max([rounded[row] for row in zetas], axis=0)
    found["zeta-w8a8"] = rounded["vanilla"] - best, "-cost", False, whole
    found["gamma-small"] = norm["gamma -1e-5"] / norm["vanilla"], "share", True, light
    others = [norm[f"gamma {one}"] for one in ("-1e-5", "-1e-4", "-1e-3", "-0.01", "-0.03")]
    found["gamma-best"] = np.min(others, axis=0) / norm["gamma -3e-3"], "higher", True, light
    dead = exact["gamma -0.03"].mean() < exact["vanilla"].mean() / 4
    found["gamma-large"] = exact["vanilla"] - exact["gamma -0.03"], "damage", False, dead
    found["gamma-zeta"] = norm["gamma -3e-3; zeta 1.003"] / norm["gamma -3e-3"], "share", True, light
    return {f"bondarenko2023-vit-{id}": rest for id, rest in found.items()}


def test_rows_that_the_notebook_has_too_are_the_same_runs():
    same = {"vanilla": "vanilla", "clipped softmax": "clipped softmax -0.003", "gated attention": "gated linear 0.5"}
    for column in ("accuracy", "W8A8 accuracy", "inf norm", "tensor kurtosis"):
        rows, other = rows_of(7, column), rows_of(8, column)
        for method, row in (same | {"vanilla, patch norm": "vanilla; patch norm"}).items():
            assert rows[row] == pytest.approx(of(method, column), rel=1e-4)
        assert other["zeta 1.004"] == pytest.approx(of("zeta 1.004", column), rel=1e-4)
        assert np.array_equal(other["gamma -3e-3"], rows["clipped softmax -0.003"])


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
