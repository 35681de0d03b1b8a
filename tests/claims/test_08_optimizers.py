"""Every verdict of 08_optimizers, computed once more from the tables beside its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import require_the_same

FIGURES = Path(__file__).parents[2] / "figures" / "08_optimizers"
SEEDS = [1, 2, 3]
RATE = 1e-2


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv").sort_values("seed")


def spearman(first, second):
    """Rank correlation with mean ranks for ties."""
    return float(np.corrcoef(pd.Series(list(first)).rank(), pd.Series(list(second)).rank())[0, 1])


def own_rate(runs, method, slack):
    """The largest rate of seed 0 that costs little."""
    first = runs[(runs["method"] == method) & (runs["seed"] == 0)]
    return first[first["loss"] <= first["loss"].min() + slack]["rate"].max()


def expected(rules):
    """id -> (values, margin, whether they are ratios)."""
    runs, layers, eps, images = read("overview"), read("layers"), read("eps"), read("images_runs")

    def of(method, column, rate=RATE, table=runs):
        rows = table[(table["method"] == method) & (table["seed"] > 0)]
        rows = rows[np.isclose(rows["rate"], rate)] if "rate" in rows else rows
        assert rows["seed"].tolist() == SEEDS, method
        return rows[column].to_numpy()

    def at_own(method, column):
        return of(method, column, own_rate(runs, method, rules["slack"]))

    def with_eps(eps_of, column="peak"):
        return of(f"eps {eps_of}", column, RATE, eps)

    found = {
        "soap-peak": (of("AdamW", "peak") / of("SOAP", "peak"), "factor", True),
        "shampoo-peak": (of("AdamW", "peak") / of("Shampoo", "peak"), "factor", True),
        "rotation-peak": (of("AdaFactor", "peak") / of("rotated AdaFactor", "peak"), "factor", True),
        "adafactor-peak": (of("AdaFactor", "peak") / of("AdamW", "peak"), "share", True),
        "soap-own-peak": (at_own("AdamW", "peak") / at_own("SOAP", "peak"), "factor", True),
        "soap-faster": (at_own("AdamW", "loss") - at_own("SOAP", "loss"), "gain", False),
        "rotation-faster": (at_own("AdaFactor", "loss") - at_own("rotated AdaFactor", "loss"), "gain", False),
        "rate-presrmsnorm": (of("AdamW", "peak") / of("AdamW", "peak", 3e-3), "factor", True),
        "rotated-correlation": (of("SOAP", "rms correlation") / of("AdamW", "rms correlation"), "higher", True),
        "eps": (with_eps("1e-6") / with_eps("3e-4"), "factor", True),
        "eps-loss": (with_eps("1e-8", "loss") - with_eps("1e-4", "loss"), "-fp_cost", False),
    }
    both = np.stack([with_eps("1e-8"), with_eps("1e-6")])
    found["eps-small"] = (both.min(0) / both.max(0), "share", True)
    rotated = layers[
        layers["method"].isin(["SOAP", "Shampoo"]) & np.isclose(layers["rate"], RATE) & (layers["seed"] > 0)
    ]
    ranks = [spearman(rows["rms correlation"], rows["feature correlation"]) for _, rows in rotated.groupby("seed")]
    found["rotated-features"] = (np.array(ranks), "rank_high", False)
    adam, sgd = "Adam, Pre-SRMSNorm", "SGD, Pre-SRMSNorm"

    def image(method, column="peak"):
        return of(method, column, table=images)

    good = [adam]
    for eps_of in ("1e-06", "1e-05", "0.0001", "0.001"):
        name = f"{adam}, eps {eps_of}"
        good += [name] if image(name, "accuracy").mean() >= image(adam, "accuracy").mean() - 0.01 else []
    plain = f"{adam}, not whitened"
    found |= {
        "mlp-adam": (image(adam) / image(sgd), "factor", True),
        "mlp-sgd-falls": (image(sgd, "start") / image(sgd, "end"), "higher", True),
        "mlp-eps": (image(adam) / image(good[-1]), "higher", True),
        "mlp-whitening": (
            image(adam) / image(adam, "start") / (image(plain) / image(plain, "start")),
            "higher",
            True,
        ),
    }
    toy = read("laboratory").pivot(index="seed", columns="method", values="kurtosis") - 1
    assert toy.index.tolist() == [1, 2, 3, 4, 5, 6]
    found |= {
        "lab-shampoo-peak": (toy["AdamW"] / toy["Shampoo"], "factor", True),
        "lab-rotation-peak": (toy["AdaFactor"] / toy["rotated AdaFactor"], "factor", True),
        "lab-adafactor-peak": (toy["AdaFactor"] / toy["AdamW"], "share", True),
    }
    margins = rules | {"-fp_cost": -rules["fp_cost"]}
    return {f"he2024-{id}": (list(values), margins[rule], ratio) for id, (values, rule, ratio) in found.items()}


def test_every_verdict_follows_from_the_tables(committed, rules):
    require_the_same(committed, expected(rules))


def test_the_peaks_are_those_of_the_layers():
    runs, layers = read("overview"), read("layers")
    assert len(runs) == 4 * (2 * 5 + 4 * 4)
    own = layers.groupby(["method", "rate", "seed"])["kurtosis"].max().reset_index()
    both = runs.merge(own, on=["method", "rate", "seed"])
    assert len(both) == len(runs) and both["kurtosis"].to_numpy() == pytest.approx(both["peak"].to_numpy(), rel=1e-4)
