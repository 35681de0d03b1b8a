"""The larger figures of 07_op_block; a colour belongs to a method in all of them."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots

#: Norms dark, gains grey, forms of the OP block bright.
COLORS = {
    "Pre-LN": "#000000",
    "Pre-RMSNorm": "#7A4E00",
    "Pre-SRMSNorm": "#E69F00",
    "Post-LN": "#0072B2",
    "Pre-LN, gains 0.1": "#8C8C8C",
    "Pre-LN, embedding x 50": "#56B4E9",
    "OP": "#009E73",
    "OP, final LN": "#66C2A5",
    "OP, tanh cap": "#CC79A7",
    "OP, no entropy regulation": "#D55E00",
}


def overview(runs: pd.DataFrame, steps: pd.DataFrame, title: str) -> Figure:
    """Loss against the peak of kurtosis, a dot a run; and kurtosis over training, the largest over blocks.

    Args:
        runs, steps: from `runs.table` and `runs.layers`.
    """
    fig, axs = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=(1, 1.3))
    sns.scatterplot(runs, x="loss", y="peak", hue="method", palette=COLORS, s=55, ax=axs[0], legend=False)
    axs[0].set(
        xlabel="validation loss at the end, nats", ylabel="peak of neuron kurtosis - 1", title="a dot is a run"
    )
    inner = steps[steps["block"] != "out"]
    most = inner.groupby(["method", "seed", "step"], sort=False)["kurtosis"].max().reset_index()
    style = {"x": "step", "y": "kurtosis", "hue": "method", "palette": COLORS, "ax": axs[1]}
    sns.lineplot(most, units="seed", estimator=None, lw=0.6, alpha=0.4, legend=False, **style)
    sns.lineplot(most, estimator="median", errorbar=None, lw=2, **style)
    axs[1].set(ylabel="neuron kurtosis - 1, largest over blocks", title="over training, a thin line is a seed")
    for ax in axs:
        plots.log_scale(ax, "y")
    sns.move_legend(axs[1], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig


def small_multiples(steps: pd.DataFrame, column: str, label: str, title: str, log: bool = False) -> Figure:
    """A number over training, a panel a block, medians over seeds.

    Args:
        steps: from `runs.layers`.
        column: of it.
        label: of the vertical axis.
    """
    blocks = [one for one in dict.fromkeys(steps["block"]) if steps[steps["block"] == one][column].notna().any()]
    columns = min(4, len(blocks))
    rows = -(-len(blocks) // columns)
    fig, axs = plt.subplots(
        rows, columns, figsize=(13, 0.6 + 2.5 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax, block in zip(axs.flat, blocks, strict=False):
        own = steps[steps["block"] == block]
        style = {"x": "step", "y": column, "hue": "method", "palette": COLORS, "estimator": "median"}
        sns.lineplot(own, errorbar=None, lw=1.5, ax=ax, **style)
        ax.set(title="behind the last block" if block == "out" else f"block {block}", ylabel=label)
        if log:
            plots.log_scale(ax, "y")
    handles, labels = axs[0, 0].get_legend_handles_labels()
    for ax, block in zip(axs.flat, [*blocks, *[None] * (axs.size - len(blocks))], strict=True):
        ax.get_legend().remove() if block else ax.set_visible(False)
    fig.legend(handles, labels, loc="outside lower left", ncols=5)
    fig.suptitle(title, x=0, ha="left")
    return fig
