"""Every verdict of 09_moment_updates, computed once more from the tables beside its figures."""

from pathlib import Path

import pandas as pd
import pytest

from tests.recomputed import require_the_same

FIGURES = Path(__file__).parents[2] / "figures" / "09_moment_updates"
SEEDS, LABORATORY_SEEDS = [1, 2, 3], [1, 2, 3, 4, 5, 6]
FOURTH = ["u41", "u42", "u43", "u44"]


def at_the_end(name, method, momentum=None):
    """The last row of each seed: terms summed over the training."""
    steps = pd.read_csv(FIGURES / f"{name}.csv")
    steps = steps if momentum is None else steps[steps["momentum"] == momentum]
    own = steps[(steps["method"] == method) & (steps["step"] == steps["step"].max())].sort_values("seed")
    assert own["seed"].tolist() == (LABORATORY_SEEDS if name == "laboratory" else SEEDS)
    return own


def expected(rules):
    """id -> (values, margin, whether they are ratios)."""
    plain, moved = at_the_end("no_momentum", "Pre-LN"), at_the_end("momentum", "Pre-LN")
    sizes, later = plain[FOURTH].abs(), moved[FOURTH].abs()
    found = {
        "quadratic": (sizes["u42"] / sizes.sum(axis=1), "dominates", False),
        "higher": (plain["u42"] / (sizes["u43"] + sizes["u44"]), "negligible", True),
        "momentum": (later["u41"] / later.sum(axis=1), "dominates", False),
    }
    for id, method in {
        "op": "OP",
        "eps": "Pre-LN, eps 1e-4",
        "rate": "Pre-LN, rate x 0.3",
        "soap": "Pre-LN, SOAP",
    }.items():
        other = at_the_end("no_momentum", method)["share of u42"].to_numpy()
        found[id] = (plain["share of u42"] / other, "higher", True)
    plain, moved = (at_the_end("laboratory", "Pre-LN", one) for one in (0.0, 0.9))
    sizes, later = plain[FOURTH].abs(), moved[FOURTH].abs()
    found |= {
        "lab-quadratic": (sizes["u42"] / sizes.sum(axis=1), "dominates", False),
        "lab-higher": (plain["u42"] / (sizes["u43"] + sizes["u44"]), "negligible", True),
        "lab-momentum": (later["u41"] / later.sum(axis=1), "dominates", False),
    }
    for id, method in {"op": "OP", "soap": "Pre-LN, SOAP"}.items():
        other = at_the_end("laboratory", method, 0.0)["share of u42"].to_numpy()
        found[f"lab-{id}"] = (plain["share of u42"] / other, "higher", True)
    names = {id: f"he2024-lab-moment-{id[4:]}" if id.startswith("lab-") else f"he2024-moment-{id}" for id in found}
    return {names[id]: (list(v), rules[rule], ratio) for id, (v, rule, ratio) in found.items()}


def test_every_verdict_follows_from_the_tables(committed, rules):
    require_the_same(committed, expected(rules))


def test_the_tables_agree_with_each_other():
    runs = pd.read_csv(FIGURES / "overview.csv")
    assert len(runs) == 6 * 2 * len(SEEDS)
    for name, momentum in (("no_momentum", 0.0), ("momentum", 0.9)):
        steps = pd.read_csv(FIGURES / f"{name}.csv")
        for (method, seed), own in steps.groupby(["method", "seed"]):
            row = runs[(runs[["method", "momentum", "seed"]] == [method, momentum, seed]).all(axis=1)].iloc[0]
            assert own["kurtosis"].max() == pytest.approx(row["peak"], rel=1e-4)
            assert own[FOURTH].iloc[-1].sum() == pytest.approx(own["m4"].iloc[-1] - own["m4"].iloc[0], rel=1e-3)
