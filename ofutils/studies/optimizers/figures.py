"""The larger figures of 08_optimizers; a colour belongs to an optimizer in all of them."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ofutils import plots

#: Entry by entry dark, in Shampoo's eigenbasis bright.
COLORS = {
    "AdamW": "#000000",
    "AdaFactor": "#8C8C8C",
    "rotated AdaFactor": "#56B4E9",
    "Shampoo": "#0072B2",
    "SOAP": "#009E73",
    "Muon": "#D55E00",
}
#: What these optimizers are called among the methods of the laboratory.
LABORATORY = {"vanilla": "AdamW", "vanilla + SOAP": "SOAP"}
#: Of the residual MLP: SGD bright, Adam dark.
PAIR = {
    "Adam, Pre-SRMSNorm": "#000000",
    "Adam": "#8C8C8C",
    "SGD, Pre-SRMSNorm": "#D55E00",
    "SGD": "#E69F00",
}


def overview(runs: pd.DataFrame, steps: pd.DataFrame, rate: float, own: dict[str, float], title: str) -> Figure:
    """Optimizer against learning rate, colour the peak of kurtosis, text the loss; and kurtosis over training.

    Args:
        runs, steps: from `trajectories`, its `peaks` and `layers`; medians over all seeds but the first are drawn.
        rate: of the second panel.
        own: each optimizer's own rate, framed.
    """
    fig, axs = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=(1, 1.15))
    judged = runs[runs["seed"] > runs["seed"].min()]
    plane = judged.pivot_table(["peak", "loss"], "method", "rate", "median").reindex([*COLORS])
    peak, loss = plane["peak"], plane["loss"]
    said = loss.map("{:.2f}".format)
    bar = {"label": "peak of neuron kurtosis - 1", "ticks": LogLocator(subs=(1, 2, 5)), "format": "{x:g}"}
    style = {"fmt": "", "linewidths": 1, "cbar_kws": bar}
    sns.heatmap(peak, annot=said, norm=LogNorm(), cmap="rocket_r", ax=axs[0], **style)
    axs[0].collections[0].colorbar.ax.yaxis.set_minor_formatter(NullFormatter())
    for row, method in enumerate(peak.index):
        if own.get(method) in peak.columns:
            place = (peak.columns.get_loc(own[method]), row)
            axs[0].add_patch(plt.Rectangle(place, 1, 1, fill=False, ec="#0072B2", lw=2.5))
    axs[0].set(title="validation loss (nats); framed: its own rate", xlabel="learning rate", ylabel="")
    axs[0].set_xticklabels([f"{one:g}" for one in peak.columns])
    inner = steps[(steps["seed"] > steps["seed"].min()) & (steps["rate"] == rate) & (steps["block"] != "out")]
    most = inner.groupby(["method", "seed", "step"], sort=False)["kurtosis"].max().reset_index()
    style = {"x": "step", "y": "kurtosis", "hue": "method", "palette": COLORS, "ax": axs[1]}
    sns.lineplot(most, units="seed", estimator=None, lw=0.6, alpha=0.4, legend=False, **style)
    sns.lineplot(most, estimator="median", errorbar=None, lw=2, **style)
    axs[1].set(ylabel="neuron kurtosis - 1, largest over blocks", title=f"at {rate:g}; a thin line is a seed")
    plots.log_scale(axs[1], "y")
    sns.move_legend(axs[1], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig


def shades(names: list) -> dict:
    """A colour for each of an ordered row of names, light to dark."""
    return dict(zip(names, plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(names))), strict=True))


def in_the_laboratory(runs: pd.DataFrame, title: str) -> Figure:
    """Kurtosis against attention to the start, and against the loss; a dot is a run.

    Args:
        runs: from `laboratory.table`, with `excess`, the kurtosis less 1, and methods of `COLORS`.
    """
    fig, axs = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    style = {"y": "excess", "hue": "method", "palette": COLORS, "s": 55}
    sns.scatterplot(runs, x="sink", ax=axs[0], legend=False, **style)
    sns.scatterplot(runs, x="above bound", ax=axs[1], **style)
    axs[0].set(xlim=(0, 1), xlabel="attention to <s> (probs)", ylabel="neuron kurtosis - 1 (resid_post)")
    axs[1].set(xlabel="loss above that of the true predictor, nats")
    plots.log_scale(axs[0], "y")
    sns.move_legend(axs[1], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig
