"""What the runs of 08_optimizers show: tables, and the numbers by which he2024's claims are judged."""

import pandas as pd


def own_rates(runs: pd.DataFrame, slack: float) -> dict[str, float]:
    """Method -> the largest learning rate at which the first seed loses no more than `slack` nats against its best.

    Args:
        runs: from `trajectories.peaks`, the first seed among them.
    """
    first = runs[runs["seed"] == runs["seed"].min()]
    good = first[first["loss"] <= first.groupby("method")["loss"].transform("min") + slack]
    return good.groupby("method", sort=False)["rate"].max().to_dict()


def at_rates(runs: pd.DataFrame, rates: dict[str, float] | float) -> pd.DataFrame:
    """The judged seeds, all but the first one, at one rate for all or at each method's own; indexed by seed.

    Returns:
        A column (number, method) for each number of `runs`.
    """
    wanted = runs["method"].map(rates) if isinstance(rates, dict) else rates
    judged = runs[(runs["seed"] > runs["seed"].min()) & (runs["rate"] == wanted)]
    return judged.pivot(index="seed", columns="method")


def claims(
    runs: pd.DataFrame, steps: pd.DataFrame, eps: pd.DataFrame, rate: float, own: dict[str, float]
) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged: id of the claim, sentence, one value for each seed, the parameter that holds its margin, ratio.

    Args:
        runs, steps: from `trajectories`: its `peaks` and `layers`.
        eps: from `trajectories.peaks`, of the runs with larger eps.
        rate: the one at which all are compared.
        own: from `own_rates`.
    """
    same, best = at_rates(runs, rate), at_rates(runs, own)
    slower = max((one for one in runs["rate"].unique() if one < rate), default=rate)
    peak, here = same["peak"], f"at {rate:g}"
    found = [
        (id, f"{over}'s peak over {under}'s, {where}", values[over] / values[under], margin, True)
        for id, over, under, where, values, margin in (
            ("he2024-soap-peak", "AdamW", "SOAP", here, peak, "factor"),
            ("he2024-shampoo-peak", "AdamW", "Shampoo", here, peak, "factor"),
            ("he2024-rotation-peak", "AdaFactor", "rotated AdaFactor", here, peak, "factor"),
            ("he2024-adafactor-peak", "AdaFactor", "AdamW", here, peak, "share"),
            ("he2024-soap-own-peak", "AdamW", "SOAP", "each at its own rate", best["peak"], "factor"),
            ("", "AdamW", "Muon", here, peak, "factor"),
        )
    ]
    for id, slow, fast in (
        ("he2024-soap-faster", "AdamW", "SOAP"),
        ("he2024-rotation-faster", "AdaFactor", "rotated AdaFactor"),
        ("", "AdamW", "Muon"),
    ):
        text = f"{fast}'s loss lies below {slow}'s, each at its own rate, by (nats)"
        found.append((id, text, best["loss"][slow] - best["loss"][fast], "gain", False))
    falls = peak["AdamW"] / at_rates(runs, slower)["peak"]["AdamW"]
    text = f"AdamW's peak {here} over that at {slower:g}"
    found.append(("he2024-rate-presrmsnorm", text, falls, "factor", True))
    alike = same["rms correlation"]["SOAP"] / same["rms correlation"]["AdamW"]
    text = f"SOAP's largest input correlation (RMS) over AdamW's, {here}"
    found.append(("he2024-rotated-correlation", text, alike, "higher", True))
    inner = steps[(steps["seed"] > steps["seed"].min()) & (steps["rate"] == rate)]
    inner = inner[inner["method"].isin(["SOAP", "Shampoo"])]
    both = inner.groupby("seed")[["rms correlation", "feature correlation"]]
    ranks = both.apply(lambda t: t.corr(method="spearman").iloc[0, 1])
    text = f"SOAP and Shampoo: rank correlation of feature and input correlation, {here}"
    found.append(("he2024-rotated-features", text, ranks, "rank_high", False))
    return found + _eps_claims(eps)


def _eps_claims(eps: pd.DataFrame) -> list[tuple[str, str, pd.Series, str, bool]]:
    of = eps.pivot(index="seed", columns="method")
    peak, loss = of["peak"], of["loss"]
    falls, change = peak["eps 1e-6"] / peak["eps 3e-4"], peak["eps 1e-8"] / peak["eps 1e-6"]
    least = change.where(change < 1, 1 / change)
    saved = loss["eps 1e-8"] - loss["eps 1e-4"]
    return [
        ("he2024-eps", "Pre-LN's peak at eps 1e-6 over that at 3e-4", falls, "factor", True),
        (
            "he2024-eps-small",
            "Pre-LN's peaks at eps 1e-8 and 1e-6: the smaller over the larger",
            least,
            "share",
            True,
        ),
        ("he2024-eps-loss", "Pre-LN's loss at eps 1e-4 lies below that at 1e-8 by (nats)", saved, "-fp_cost", False),
    ]


def laboratory_claims(runs: pd.DataFrame) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged of the laboratory's runs, in the form of `claims`.

    Args:
        runs: from `laboratory.table`, of the recipes laboratory and laboratory_optimizers.
    """
    named = runs.assign(excess=runs["kurtosis"] - 1, method=runs["method"].replace("vanilla", "AdamW"))
    excess = named.pivot(index="seed", columns="method", values="excess")
    pairs = (
        ("he2024-lab-shampoo-peak", "AdamW", "Shampoo", "factor"),
        ("he2024-lab-rotation-peak", "AdaFactor", "rotated AdaFactor", "factor"),
        ("he2024-lab-adafactor-peak", "AdaFactor", "AdamW", "share"),
    )
    return [
        (id, f"laboratory: {over}'s kurtosis - 1 over {under}'s", excess[over] / excess[under], margin, True)
        for id, over, under, margin in pairs
    ]
