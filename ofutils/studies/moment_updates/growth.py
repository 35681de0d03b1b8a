"""What drives the fourth moment: tables of the followed trainings, the papers' claims on them, the figures."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots
from ofutils.studies.moment_updates.follow import FOURTH, MOMENTA, TERMS, Task

#: A colour belongs to a method, and one to a term, in all figures.
COLORS = {
    "Pre-LN": "#000000",
    "OP": "#009E73",
    "Pre-LN, eps 1e-4": "#E69F00",
    "Pre-LN, rate x 0.3": "#56B4E9",
    "Pre-LN, SOAP": "#7F7F7F",
    "Pre-LN, SGD": "#CC79A7",
}
_ORDERS = dict(zip(FOURTH, ("first order", "second", "third", "fourth"), strict=True))
_ORDER_COLORS = dict(zip(_ORDERS.values(), ("#0072B2", "#D55E00", "#999999", "#56B4E9"), strict=True))


def over_training(tasks: list[Task], records: list[dict]) -> pd.DataFrame:
    """One row per run and `every` steps of its task.

    Returns:
        method; momentum; seed; `step`, how many were taken; `m2`, `m4`, `kurtosis` (less 1) then; the `TERMS` of all
        steps until then, summed; and `share of u41` ... `share of u44`, of m4: each step's term over the m4 that it
        met, summed. `bend` of the step that follows, see `follow.perform` (not at the end); `loss` of its batch.
    """
    rows = []
    for task, record in zip(tasks, records, strict=True):
        found = {name: np.array(values) for name, values in record["result"].items() if name != "held_out"}
        m2, m4, steps = found["m2"], found["m4"], task.config.steps
        own = {"step": [*range(0, steps, task.every), steps], "m2": m2, "m4": m4, "kurtosis": m4 / m2**2 - 1}
        own |= {name: _until(found[name]) for name in TERMS}
        own |= {f"share of {name}": _until(found[f"{name} / m4"]) for name in FOURTH}
        own |= {name: np.append(found[name], np.nan) for name in ("bend", "loss")}
        about = {"method": task.method, "momentum": task.momentum, "seed": task.config.seed}
        rows.append(pd.DataFrame(about | own))
    return pd.concat(rows, ignore_index=True)


def _until(values: np.ndarray) -> np.ndarray:
    """The sum of all values before each place."""
    return np.append(0.0, values.cumsum())


def residual(tasks: list[Task], records: list[dict]) -> float:
    """The most by which the terms, summed over a training, miss the measured change of m4, as a share of m4."""
    worst = []
    for record in records:
        m4 = np.array(record["result"]["m4"])
        steps = sum(np.array(record["result"][name]) for name in FOURTH)
        worst.append(abs(steps.sum() - (m4[-1] - m4[0])) / m4.max())
    return max(worst)


def table(steps: pd.DataFrame, tasks: list[Task], records: list[dict]) -> pd.DataFrame:
    """One row per run.

    Args:
        steps: from `over_training`.

    Returns:
        method; momentum; seed; `loss` on held-out text at the end (nats); `start`, `peak`, `end` of the kurtosis less
        1; `u41` ... `u44`, each summed over the training, over the sum of the four absolute values of these sums;
        `u41 / m4` ... `u44 / m4`: the same, each step's term over the m4 that it met; `higher`, u42 over
        |u43| + |u44|; `pushed`, u42 / m4 summed over the training; `bend`, the median.
    """
    rows = []
    for task, record in zip(tasks, records, strict=True):
        about = {"method": task.method, "momentum": task.momentum, "seed": task.config.seed}
        own = steps[(steps[[*about]] == [*about.values()]).all(axis=1)]
        last = own.iloc[-1]
        sizes = last[list(FOURTH)].abs()
        row = about | {"loss": record["result"]["held_out"], "start": own["kurtosis"].iloc[0]}
        row |= {"peak": own["kurtosis"].max(), "end": last["kurtosis"]} | dict(last[list(FOURTH)] / sizes.sum())
        over_m4 = last[[f"share of {name}" for name in FOURTH]].set_axis([f"{name} / m4" for name in FOURTH])
        row |= dict(over_m4 / over_m4.abs().sum())
        row |= {"higher": last["u42"] / sizes[["u43", "u44"]].sum(), "pushed": last["share of u42"]}
        rows.append(row | {"bend": own["bend"].median()})
    return pd.DataFrame(rows)


def claims(runs: pd.DataFrame, place: str = "") -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged: id of the claim, sentence, one value for each seed, the parameter that holds its margin, ratio.

    Args:
        runs: from `table`.
        place: "laboratory" for its models.
    """
    plain, with_momentum = (runs[runs["momentum"] == one].pivot(index="seed", columns="method") for one in MOMENTA)
    share = "Pre-LN, {} momentum: share of {} among the terms of the fourth moment, summed over training"
    found = [
        ("quadratic", share.format("no", "u42"), plain["u42"]["Pre-LN"].abs(), "dominates", False),
        ("higher", "Pre-LN, no momentum: u42 over |u43| + |u44|", plain["higher"]["Pre-LN"], "negligible", True),
        ("momentum", share.format("with", "u41"), with_momentum["u41"]["Pre-LN"].abs(), "dominates", False),
    ]
    short = {"OP": "op", "Pre-LN, eps 1e-4": "eps", "Pre-LN, rate x 0.3": "rate", "Pre-LN, SOAP": "soap"}
    for method in [one for one in dict.fromkeys(runs["method"]) if one != "Pre-LN"]:
        text = f"no momentum: u42 / m4 summed over training, Pre-LN's over that of {method}"
        found.append(
            (short.get(method, ""), text, plain["pushed"]["Pre-LN"] / plain["pushed"][method], "higher", True)
        )
    start, said = ("he2024-lab-moment-", f"{place}: ") if place else ("he2024-moment-", "")
    return [(f"{start}{id}" if id else "", f"{said}{text}", *rest) for id, text, *rest in found]


def overview(steps: pd.DataFrame, runs: pd.DataFrame, title: str) -> Figure:
    """Kurtosis over training without momentum; and the terms, summed over training in two ways, with and without.

    Args:
        steps, runs: from `over_training` and `table`.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1.3, 1, 1))
    plain = steps[steps["momentum"] == 0]
    style = {"x": "step", "y": "kurtosis", "hue": "method", "palette": COLORS, "ax": axs[0]}
    sns.lineplot(plain, units="seed", estimator=None, lw=0.6, alpha=0.4, legend=False, **style)
    sns.lineplot(plain, estimator="median", errorbar=None, lw=2, **style)
    axs[0].set(ylabel="neuron kurtosis - 1", title="without momentum, a thin line is a seed")
    plots.log_scale(axs[0], "y")
    sns.move_legend(axs[0], "best", title="", fontsize=8)
    own = runs[runs["method"] == "Pre-LN"]
    own = own.assign(momentum=own["momentum"].map({0.0: "no momentum", 0.9: "momentum 0.9"}))
    for ax, over, said in zip(axs[1:], ("", " / m4"), ("summed", "over m4, summed"), strict=True):
        shares = own.rename(columns={f"{name}{over}": order for name, order in _ORDERS.items()})
        shares = shares.melt(["momentum", "seed"], _ORDERS.values(), "term", "share")
        style = {"x": "share", "y": "momentum", "hue": "term", "ax": ax, "legend": False}
        sns.barplot(shares, palette=_ORDER_COLORS, errorbar=None, **style | {"legend": over == ""})
        sns.stripplot(shares, palette="dark:k", dodge=True, size=3, **style)
        ax.axvline(0, color="0.5", lw=0.8)
        ax.set(
            xlim=(-1, 1),
            xticks=(-1, -0.5, 0, 0.5, 1),
            xlabel="over the sum of absolute values",
            ylabel="",
            title=f"Pre-LN, terms of m4 {said}",
        )
    axs[2].set_yticklabels([])
    sns.move_legend(axs[1], "lower left", title="", fontsize=8)
    fig.suptitle(title, x=0, ha="left")
    return fig


def panels(steps: pd.DataFrame, momentum: float, title: str, per_step: bool = False) -> Figure:
    """A column a method: the terms of m4, relative to it; below, kurtosis. Medians over seeds, thin lines are seeds.

    Args:
        steps: from `over_training`.
        momentum: one of `MOMENTA`.
        per_step: the mean of the steps since the row before instead of the sum of all.
    """
    own = steps[steps["momentum"] == momentum]
    methods = list(dict.fromkeys(own["method"]))
    fig, axs = plt.subplots(2, len(methods), figsize=(14, 5), sharex=True, sharey="row", layout="constrained")
    for method, upper, lower in zip(methods, *axs, strict=True):
        rows = own[own["method"] == method]
        shares = rows.melt(["seed", "step"], [f"share of {name}" for name in FOURTH], "term", "share")
        shares["term"] = shares["term"].str.removeprefix("share of ").map(_ORDERS)
        if per_step:
            since = shares.groupby(["seed", "term"])[["share", "step"]].diff()
            shares["share"] = since["share"] / since["step"]
        style = {"x": "step", "hue": "term", "palette": _ORDER_COLORS, "ax": upper}
        sns.lineplot(shares, y="share", units="seed", estimator=None, lw=0.5, alpha=0.5, legend=False, **style)
        sns.lineplot(shares, y="share", estimator="median", errorbar=None, lw=1.8, **style)
        upper.get_legend().remove()
        upper.axhline(0, color="0.8", lw=0.8, zorder=0)
        upper.set(title=method, ylabel="term / m4" + (", a step" if per_step else ", summed"))
        upper.set_yscale("symlog", linthresh=0.01 if per_step else 1)
        sns.lineplot(rows, x="step", y="kurtosis", units="seed", estimator=None, lw=0.8, color="k", ax=lower)
        lower.set(ylabel="kurtosis - 1")
    for lower in axs[1]:
        plots.log_scale(lower, "y")
    handles, labels = axs[0, 0].get_legend_handles_labels()
    fig.legend(handles[-len(FOURTH) :], labels[-len(FOURTH) :], loc="outside lower left", ncols=4)
    fig.suptitle(title, x=0, ha="left")
    return fig
