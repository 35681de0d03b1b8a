"""Every verdict of 06_clipped_softmax_gating, computed once more from the tables beside its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import require_the_same

FIGURES = Path(__file__).parents[2] / "figures" / "06_clipped_softmax_gating"
BITS = "W8A8 min-max"


def of(name, method, column, seeds=3):
    rows = pd.read_csv(FIGURES / f"{name}.csv")
    rows = rows[rows["method"] == method].sort_values("seed")
    assert rows["seed"].tolist() == [*range(1, seeds + 1)], (name, method)
    return rows[column].to_numpy()


def smaller_over_larger(one, other):
    return np.minimum(one, other) / np.maximum(one, other)


def expected(rules):
    """id -> (values, margin, whether they are ratios)."""

    def saved(method, bits):
        return 1 - of("bert", method, bits) / of("bert", "vanilla", bits)

    def laboratory(method, column="norm"):
        return of("gamma_zeta", method, column, seeds=6)

    def least(pairs):
        norms = [laboratory(without) / laboratory(own) for own, without in pairs]
        losses = [laboratory(without, "loss") - laboratory(own, "loss") for own, without in pairs]
        return np.min(norms, axis=0), np.min(losses, axis=0)

    found = {}
    for short, method in {"clipped": "clipped softmax", "gated": "gated attention", "mlp": "gate, MLP"}.items():
        for column in ("norm", "kurtosis"):
            ratio = of("bert", "vanilla", column) / of("bert", method, column)
            found[f"bert-{short}-{column}"] = (ratio, rules["factor"], True)
        gain = of("bert", "vanilla", "loss") - of("bert", method, "loss")
        found[f"bert-{short}-fp"] = (gain, -rules["fp_cost"], False)
        found[f"bert-{short}-w8a8"] = (saved(method, BITS), rules["share_kept"], False)
    less = of("bert", "clipped softmax, alpha 0.64", "norm") / of("bert", "clipped softmax", "norm")
    found["bert-gamma"] = (less, rules["factor"], True)
    ranges = of("bert", "vanilla", "W6A8 min-max") / of("bert", "vanilla", "W6A8")
    found["bert-mse"] = (ranges, rules["higher"], True)
    found["bert-clipped-w6a6"] = (saved("clipped softmax", "W6A6"), rules["share_kept"], False)
    found["bert-gated-w6a6"] = (saved("gate, MLP", "W6A6"), rules["share_kept"], False)
    wide = of("opt", "vanilla", "norm") / of("opt", "gate, all heads", "norm")
    found["gate-all-heads-norm"] = (wide, rules["factor"], True)
    gain = of("opt", "vanilla", "loss") - of("opt", "gate, all heads", "loss")
    found["gate-all-heads-fp"] = (gain, -rules["fp_cost"], False)
    plain = laboratory("alpha 0, T 64")
    for id, method in {"zeta": "gamma 0, zeta 1.03", "gamma-small": "gamma -0.003, zeta 1"}.items():
        found[f"lab-{id}"] = (smaller_over_larger(plain, laboratory(method)), rules["alike"], True)
    found["lab-gamma"] = (plain / laboratory("gamma -0.03, zeta 1"), rules["factor"], True)
    alphas = [(f"alpha {a}, T {t}", f"alpha 0, T {t}") for a in (2, 4) for t in (32, 64)]
    gates = [(f"pi {pi}", "alpha 0, T 64") for pi in (0.25, 0.5, 0.9)]
    for id, pairs in {"alpha": alphas, "bias": gates}.items():
        norms, losses = least(pairs)
        found[f"lab-{id}-norm"] = (norms, rules["factor"], True)
        found[f"lab-{id}-fp"] = (losses, -rules["fp_cost"], False)
    return {f"bondarenko2023-{id}": values for id, values in found.items()}


def unjudged(rules):
    """The ids of claims on outliers that are not there, and on costs that are too small to be seen."""
    found = set()
    if of("bert", "vanilla", "kurtosis").mean() < rules["outlier_kurtosis"]:
        found |= {f"bert-{one}-{column}" for one in ("clipped", "gated", "mlp") for column in ("norm", "kurtosis")}
        found |= {"bert-gamma"}
    if of("opt", "vanilla", "kurtosis").mean() < rules["outlier_kurtosis"]:
        found |= {"gate-all-heads-norm"}
    costs = {BITS: [f"bert-{one}-w8a8" for one in ("clipped", "gated", "mlp")], "W6A8 min-max": ["bert-mse"]}
    costs["W6A6"] = ["bert-clipped-w6a6", "bert-gated-w6a6"]
    for bits, ids in costs.items():
        found |= set(ids) if of("bert", "vanilla", bits).mean() < rules["visible_cost"] else set()
    return frozenset(f"bondarenko2023-{id}" for id in found)


def test_every_verdict_follows_from_the_tables(committed, rules):
    require_the_same(committed, expected(rules), unjudged(rules))


def test_the_overview_is_of_the_same_runs():
    table = pd.read_csv(FIGURES / "overview.csv")
    for place, name, seeds in (("OPT, text", "opt", 3), ("BERT, text", "bert", 3), ("laboratory", "laboratory", 6)):
        own = table[(table["place"] == place) & (table["method"] == "clipped softmax")].sort_values("seed")
        assert own["norm"].to_numpy() == pytest.approx(of(name, "clipped softmax", "norm", seeds), rel=1e-4)
        above = of(name, "clipped softmax", "loss", seeds) - of(name, "vanilla", "loss", seeds)
        assert own["above"].to_numpy() == pytest.approx(above, abs=1e-4)
