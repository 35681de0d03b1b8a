"""The larger figures of 10_vit."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from ofutils import plots
from ofutils.images import ImageConfig

#: Colours of methods; what has a norm on its patches has that of the method without.
COLORS = plots.COLORS | {"zeta 1.004": "#CC79A7", "LayerScale": "#56B4E9"}
_LAYERS = {"largest": "largest |entry|", "received": "attention received", "values": "size of values"}


def maps(shown: dict[str, tuple[dict, Tensor, ImageConfig]], place: int, title: str) -> tuple[Figure, pd.DataFrame]:
    """One image a model: the picture, and by patch the largest entry, the attention it receives and its values.

    Args:
        shown: name -> statistics of `sinks.statistics`, the pixels (B, C, S, S) of its first batch, and how it cuts.
        place: which of the images whose maps were kept.

    Returns:
        The figure, and its points: model, map, patch (from 0, line by line; -1 is the class token), value.
    """
    fig, axs = plt.subplots(len(shown), 4, figsize=(10, 0.6 + 2.4 * len(shown)), layout="constrained", squeeze=False)
    rows = []
    for line, (name, (found, pixels, image)) in zip(axs, shown.items(), strict=True):
        first, side = int(image.pool == "class"), image.size // image.patch
        line[0].imshow(pixels[place].permute(1, 2, 0).cpu() / 2 + 0.5, cmap="Greys", vmin=0, vmax=1)
        line[0].set_ylabel(name, fontweight="bold")
        where = f"block {found['block']}", f"block {found['block'] + 1}, head {found['head']}"
        for ax, (key, said), of in zip(line[1:], _LAYERS.items(), (where[0], where[1], where[1]), strict=True):
            values = np.array(found["maps"][key][place])
            grid = values[first:].reshape(side, side)
            drawn = ax.imshow(grid, cmap="rocket_r", vmin=0)
            fig.colorbar(drawn, ax=ax, shrink=0.8)
            ax.set_xlabel(of if not first else f"{of}; class token {values[0]:.2g}", fontsize=8)
            rows += [(name, said, patch, value) for patch, value in enumerate(values, -first)]
        for ax, said in zip(line, ("picture", *_LAYERS.values()), strict=True):
            ax.set(xticks=[], yticks=[])
            ax.set_title(said if name == next(iter(shown)) else "")
    fig.suptitle(title, x=0, ha="left")
    return fig, pd.DataFrame(rows, columns=["model", "map", "patch", "value"])


def by_method(runs: pd.DataFrame, numbers: dict[str, str], title: str) -> Figure:
    """A panel a number, a line a method; a dot is a seed, a bar the mean; hollow: with a norm on the patches.

    Args:
        runs: from `runs.table`.
        numbers: column -> what it is called; all but accuracies have a logarithmic axis.
    """
    fig, axs = plt.subplots(1, len(numbers), figsize=(13, 4.2), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(runs["method"]))
    for ax, (column, said) in zip(axs, numbers.items(), strict=True):
        for line, method in enumerate(methods):
            values, color = runs[runs["method"] == method][column], COLORS[method.removesuffix(", patch norm")]
            hollow = {"facecolor": "none" if "patch norm" in method else color, "edgecolor": color}
            ax.scatter(values, [line] * len(values), s=38, lw=1.5, **hollow)
            ax.plot([values.mean()] * 2, [line - 0.3, line + 0.3], color=color, lw=2)
        ax.set(xlabel=said)
        ax.grid(axis="y", lw=0.4)
        if "accuracy" not in column:
            plots.log_scale(ax, "x")
    axs[0].set_yticks(range(len(methods)), methods)
    axs[0].invert_yaxis()
    fig.suptitle(title, x=0, ha="left")
    return fig


def tables(rows: pd.DataFrame, numbers: dict[str, str], title: str) -> Figure:
    """Tables 7 and 8 as dots: a line a row, in the paper's order; ours by seed, the paper's above as diamonds.

    Args:
        rows: from `runs.beside`.
        numbers: column -> what it is called, as in `by_method`; hollow: `W8A8 accuracy`, beside the accuracy.
    """
    sizes = rows.groupby("table")["row"].nunique()
    how = {"sharey": "row", "sharex": "col", "height_ratios": sizes, "layout": "constrained"}
    fig, axs = plt.subplots(len(sizes), len(numbers), figsize=(13, 1.5 + 0.3 * sizes.sum()), **how)
    for line, (number, own) in zip(axs, rows.groupby("table"), strict=True):
        names = list(dict.fromkeys(own["row"]))
        for paper, part in own.groupby(own["of"] == "paper"):
            style = {"s": 34, "lw": 1.3, "marker": "D" if paper else "o"}
            color, places = "#D55E00" if paper else "#0072B2", part["row"].map(names.index) + (0.18 - 0.36 * paper)
            for ax, column in zip(line, numbers, strict=True):
                ax.scatter(part[column], places, color=color, label="the paper" if paper else "here", **style)
            line[0].scatter(part["W8A8 accuracy"], places, facecolor="none", edgecolor=color, **style)
        line[0].set_yticks(range(len(names)), names)
        line[0].set_title(f"Table {number}", loc="left")
        line[0].invert_yaxis()
        for ax, (column, said) in zip(line, numbers.items(), strict=True):
            ax.set(xlabel=said)
            ax.grid(axis="y", lw=0.4)
            if "accuracy" not in column:
                plots.log_scale(ax, "x")
    axs[-1, -1].legend(loc="upper right")
    fig.suptitle(title, x=0, ha="left")
    return fig


def over_training(steps: pd.DataFrame, title: str) -> Figure:
    """Kurtosis, the largest over blocks, and loss over training; a thin line is a seed, a thick one the median.

    Args:
        steps: from `trajectories.layers`.
    """
    inner = steps[steps["block"] != "out"].groupby(["method", "seed", "step"], sort=False)
    found = inner[["kurtosis", "loss"]].max().reset_index()
    fig, axs = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for ax, (column, said) in zip(
        axs, {"kurtosis": "neuron kurtosis - 1", "loss": "loss, nats"}.items(), strict=True
    ):
        style = {"x": "step", "y": column, "hue": "method", "palette": COLORS, "ax": ax}
        sns.lineplot(found, units="seed", estimator=None, lw=0.5, alpha=0.4, legend=False, **style)
        sns.lineplot(found, estimator="median", errorbar=None, lw=2, **style)
        ax.set(ylabel=said)
    plots.log_scale(axs[0], "y")
    axs[0].get_legend().remove()
    sns.move_legend(axs[1], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig


def scenes(pixels: Tensor, plain: Tensor, title: str) -> tuple[Figure, pd.DataFrame]:
    """Images (B, C, S, S), their plain patches (B, n, n) shaded; and the points: image, patch, plain."""
    fig, axs = plt.subplots(1, len(pixels), figsize=(12, 2.6), layout="constrained")
    size = pixels.shape[-1]
    for ax, picture, quiet in zip(axs, pixels.cpu(), plain.cpu(), strict=True):
        ax.imshow(picture.permute(1, 2, 0) / 2 + 0.5, cmap="Greys", vmin=0, vmax=1, extent=(0, size, size, 0))
        shade = np.where(quiet.numpy(), 1.0, np.nan)
        ax.imshow(shade, cmap="Blues", vmin=0, vmax=1.5, alpha=0.25, extent=(0, size, size, 0))
        ax.set(xticks=[], yticks=[])
    fig.suptitle(title, x=0, ha="left")
    flat = plain.flatten(1).int().cpu()
    rows = [(number, patch, int(one)) for number, line in enumerate(flat) for patch, one in enumerate(line)]
    return fig, pd.DataFrame(rows, columns=["image", "patch", "plain"])
