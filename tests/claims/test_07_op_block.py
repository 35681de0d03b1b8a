"""Every verdict of 07_op_block, computed once more from the tables beside its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import require_the_same

FIGURES = Path(__file__).parents[2] / "figures" / "07_op_block"
SEEDS = [1, 2, 3]


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv").sort_values("seed")


def spearman(first, second):
    """Rank correlation with mean ranks for ties."""
    return float(np.corrcoef(pd.Series(list(first)).rank(), pd.Series(list(second)).rank())[0, 1])


def expected(rules):
    """id -> (values, margin, whether they are ratios)."""
    runs, steps, slow = read("overview"), read("layers"), read("rates")
    inner = steps[steps["block"] != "out"]

    def of(method, column, table=runs):
        own = table[table["method"] == method]
        assert own["seed"].tolist() == SEEDS
        return own[column].to_numpy()

    def peak(method):
        own = inner[inner["method"] == method].groupby("seed")["kurtosis"].max()
        assert own.to_numpy() == pytest.approx(of(method, "peak"), rel=1e-4)
        return own.to_numpy()

    pre, bare, gains = "Pre-LN", "OP, no entropy regulation", "Pre-LN, gains 0.1"
    found = {
        f"he2024-grows-{method.lower().replace('-', '')}": (peak(method) / of(method, "start"), "rise", True)
        for method in ("Pre-LN", "Pre-RMSNorm", "Pre-SRMSNorm", "Post-LN")
    }
    found |= {
        "he2024-gain-free": (peak("Pre-SRMSNorm") / peak(pre), "share", True),
        "he2024-op-peak": (peak(pre) / peak("OP"), "factor", True),
        "he2024-op-block-loss": (of(pre, "loss") - of("OP", "loss"), "-fp_cost", False),
        "he2024-early": (peak(pre) / of(pre, "end"), "falls", True),
        "he2024-slow": (of("OP", "peak at"), "late", False),
        "he2024-gains-kurtosis": (peak(pre) / peak(gains), "factor", True),
        "he2024-gains-correlation": (of(pre, "correlation") - of(gains, "correlation"), "correlation_fall", False),
        "he2024-gains-loss": (of(pre, "loss") - of(gains, "loss"), "-fp_cost", False),
        "he2024-final-norm": (of("OP, final LN", "out") / of("OP", "out"), "higher", True),
        "he2024-tanh-peak": (peak(pre) / peak("OP, tanh cap"), "higher", True),
        "he2024-tanh-loss": (of("OP, tanh cap", "loss") - of("OP", "loss"), "slower", False),
        "he2024-entropy": (of("OP", "entropy") - of(bare, "entropy"), "entropy_gap", False),
        "he2024-unregulated": (of(bare, "loss") - of("OP", "loss"), "slower", False),
        "he2024-rate": (peak(pre) / of(pre, "peak", slow), "factor", True),
    }
    seeds = dict(iter(inner.groupby("seed")))
    own = {seed: rows[rows["method"] == pre] for seed, rows in seeds.items()}
    found["he2024-signal"] = (
        [spearman(rows["kurtosis"], rows["rms correlation"]) for rows in own.values()],
        "rank_margin",
        False,
    )
    same = [spearman(rows["kurtosis"], rows["centred"]) for rows in seeds.values()]
    found["he2024-centring"] = same, "rank_high", False
    by_seed = [rows for _, rows in runs.groupby("seed")]
    found["he2024-mmr"] = [spearman(t["peak"], t["max-median ratio"]) for t in by_seed], "rank_margin", False
    found["he2024-scale"] = [0.5 - spearman(t["peak"], t["scale"]) for t in by_seed], "rank_margin", False
    forms, whole = read("forms"), "norms before QK, V and MLP"
    for id, more, less, rule in (
        ("positions-v", whole, "QK-norm, norm before V", "factor"),
        ("positions-qk", whole, "QK-norm, norm before QK", "factor"),
        ("positions-op", whole, "QK-norm alone (OP)", "factor"),
        ("fixed-gains", "gains fixed at 0.3", "gains fixed at 0.1", "higher"),
        ("leaky", "slope 0.2", "slope 0.8", "higher"),
        ("value-gain", "value gain 1", "value gain 0.1", "higher"),
    ):
        found[f"he2024-{id}"] = of(more, "peak", forms) / of(less, "peak", forms), rule, True
    own = read("own")
    found["he2024-op-own-peak"] = of(pre, "peak", own) / of("OP", "peak", own), "factor", True
    found["he2024-op-own-loss"] = of(pre, "loss", own) - of("OP", "loss", own), "-fp_cost", False
    toy = read("laboratory").pivot(index="seed", columns="method", values="kurtosis") - 1
    found["he2024-lab-gain-free"] = toy["Pre-SRMSNorm"] / toy["vanilla"], "share", True
    margins = rules | {"-fp_cost": -rules["fp_cost"]}
    return {id: (values, margins[rule], ratio) for id, (values, rule, ratio) in found.items()}


def test_every_verdict_follows_from_the_tables(committed, rules):
    require_the_same(committed, expected(rules))


def test_the_largest_correlation_and_the_least_entropy_are_those_of_the_layers():
    runs, steps = read("overview"), read("layers")
    for (method, seed), own in steps.groupby(["method", "seed"]):
        row = runs[(runs["method"] == method) & (runs["seed"] == seed)].iloc[0]
        assert own[own["block"] != "out"]["correlation"].max() == pytest.approx(row["correlation"], rel=1e-4)
        assert own[own["step"] == own["step"].max()]["entropy"].min() == pytest.approx(row["entropy"], rel=1e-4)


def test_the_peaks_of_the_forms_are_those_of_their_layers():
    forms, layers = read("forms"), read("path")
    own = layers[layers["block"] != "out"].groupby(["method", "seed"])["kurtosis"].max().reset_index()
    both = forms.merge(own, on=["method", "seed"])
    assert len(both) == 16 * 3 and both["kurtosis"].to_numpy() == pytest.approx(both["peak"].to_numpy(), rel=1e-4)
