"""The larger figures of 11_pretraining_data; a colour belongs to a text in all of them."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots
from ofutils.studies.pretraining_data.emergence import MEASURES, largest
from ofutils.studies.pretraining_data.texts import LOWER

#: Natural text black; with its order bright, without it red; with separators grey.
COLORS = {
    "natural": "#000000",
    "flattened": "#0072B2",
    "evenly split": "#56B4E9",
    "shuffled": "#E69F00",
    "uniform": "#D55E00",
    "one separator": "#8C8C8C",
    "many separators": "#BFBFBF",
}
#: What `emergence.MEASURES` are called in figures.
SAID = {
    "size": "size (RMS at the output of a block)",
    "weight": "LayerNorm parameters (gain or bias)",
    "frequency": "correlation with token frequency (r)",
}


def overview(curves: pd.DataFrame, runs: pd.DataFrame, toy: pd.DataFrame, title: str) -> Figure:
    """Kurtosis over training by text, and its peak and end in every run, down to the laboratory.

    Args:
        curves, runs: from `texts`: its `curves` and `summary`.
        toy: from `texts.laboratory_runs`.
    """
    fig, axs = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=(1, 1.1))
    own = curves[~curves["text"].str.endswith(LOWER) & (curves["step"] > 0)]
    lines(axs[0], own, "kurtosis - 1")
    axs[0].set(ylabel="neuron kurtosis - 1, mean over streams", title="over training; a thin line is a seed")
    sns.move_legend(axs[0], "upper left", title="", fontsize="small")
    dots = pd.concat([runs[~runs["text"].str.endswith(LOWER)], toy])
    order = [*COLORS, *dict.fromkeys(toy["text"])]
    palette = COLORS | dict.fromkeys(toy["text"], "#CC79A7")
    for column, marker in (("peak", "o"), ("end", "D")):
        places = dots["text"].map(order.index) + (0.14 if column == "end" else -0.14)
        style = {"c": dots["text"].map(palette), "marker": marker, "s": 42, "alpha": 0.8}
        axs[1].scatter(dots[f"highest {column}"], places, **style, edgecolors="none")
        axs[1].scatter([], [], color="grey", marker=marker, label=f"{column} of a run")
    axs[1].set(yticks=range(len(order)), yticklabels=order, xlabel="neuron kurtosis - 1, largest over streams")
    axs[1].invert_yaxis()
    axs[1].axhline(len(COLORS) - 0.5, color="black", lw=0.6)
    axs[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    plots.log_scale(axs[1], "x")
    fig.suptitle(title, x=0, ha="left")
    return fig


def lines(ax, table: pd.DataFrame, column: str, log: bool = True) -> None:
    """A number of `texts.curves` over training: bold the median over seeds, thin a seed."""
    style = {"x": "step", "y": column, "hue": "text", "palette": COLORS, "ax": ax}
    sns.lineplot(table, units="seed", estimator=None, lw=0.6, alpha=0.35, legend=False, **style)
    sns.lineplot(table, estimator="median", errorbar=None, lw=2, **style)
    for axis in "xy" if log else "x":
        plots.log_scale(ax, axis)


def trainings(curves: pd.DataFrame, title: str) -> Figure:
    """Kurtosis, the largest entry and the loss beyond frequencies over training, in three groups of texts."""
    lower = curves["text"].str.endswith(LOWER)
    separators = ["natural", "one separator", "many separators"]
    groups = {
        "frequencies and order": curves[~lower & ~curves["text"].isin(separators[1:])],
        "separators": curves[curves["text"].isin(separators)],
        "a third of the learning rate": curves[lower].assign(text=curves["text"].str.removesuffix(LOWER)),
    }
    fig, axs = plt.subplots(3, 3, figsize=(13, 8.5), sharex=True, sharey="row", layout="constrained")
    for column, (words, part) in zip(axs.T, groups.items(), strict=True):
        for ax, quantity in zip(column, ("kurtosis - 1", "largest |x|", "beyond frequencies"), strict=True):
            lines(ax, part[part["step"] > 0], quantity, log=quantity != "beyond frequencies")
            ax.get_legend().remove() if ax is not column[1] else sns.move_legend(ax, "upper left", title="")
        column[0].set(title=words)
    axs[2, 0].set(ylabel="loss beyond frequencies, nats")
    fig.suptitle(title, x=0, ha="left")
    return fig


def dimensions(found: pd.DataFrame, text: str, seed: int, top: int, title: str, shown: int = 20) -> Figure:
    """One training: its largest dimensions (rows, the largest in the end first) through the checkpoints.

    Args:
        found: from `emergence.table`.
        top: how many of them are above the line.
    """
    own = found[(found["text"] == text) & (found["seed"] == seed)]
    order = largest(own, shown)[text, seed]
    fig, axs = plt.subplots(1, 3, figsize=(13, 5), sharey=True, layout="constrained")
    for ax, measure in zip(axs, MEASURES, strict=True):
        plane = own.pivot(index="dimension", columns="step", values=measure)
        reach = float(np.nanmax(plane.abs().to_numpy())) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if measure == "frequency" else {"cmap": "rocket_r"}
        sns.heatmap(plane.loc[order], ax=ax, yticklabels=True, xticklabels=2, linewidths=0.3, **style)
        ax.axhline(min(top, len(order)), color="black", lw=1.2)
        ax.set(title=SAID[measure], xlabel="step", ylabel="dimension" if ax is axs[0] else "")
        ax.tick_params(axis="y", rotation=0, length=0)
        ax.tick_params(axis="x", rotation=0)
    fig.suptitle(title, x=0, ha="left")
    return fig


def standing(found: pd.DataFrame, same: float, title: str) -> Figure:
    """Where the dimensions that are largest in the end stand among the others, by each measure, over training.

    Args:
        found: from `emergence.standings`.
        same: the rule's threshold.
    """
    fig, axs = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    palette = COLORS | dict.fromkeys(set(found["text"]) - {*COLORS}, "#000000")
    for ax, measure in zip(axs, MEASURES, strict=True):
        style = {"x": "step", "y": measure, "hue": "text", "palette": palette, "ax": ax}
        sns.lineplot(found, units="seed", estimator=None, lw=0.6, alpha=0.35, legend=False, **style)
        sns.lineplot(found, estimator="median", errorbar=None, lw=2, **style)
        ax.axhline(0.5, color="grey", lw=0.8, ls=":")
        ax.axhline(same, color="grey", lw=0.8)
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=SAID[measure], ylabel="share of the others that lie below", ylim=(-0.02, 1.02), xlim=(0, None))
        ax.get_legend().remove() if ax is not axs[2] else sns.move_legend(
            ax, "center left", bbox_to_anchor=(1, 0.5), title=""
        )
    fig.suptitle(title, x=0, ha="left")
    return fig


def propagation(runs: pd.DataFrame, title: str) -> Figure:
    """Kurtosis against input correlation at the end of training, a dot a run.

    Args:
        runs: from `emergence.ends`.
    """
    fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    palette = COLORS | dict.fromkeys(set(runs["text"]) - {*COLORS}, "#000000")
    sns.scatterplot(runs, x="correlation", y="kurtosis - 1", hue="text", palette=palette, s=70, ax=ax)
    plots.log_scale(ax, "y")
    ax.set(xlabel="input correlation (RMS), mean over blocks", ylabel="neuron kurtosis - 1, mean over blocks")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig
