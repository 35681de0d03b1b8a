"""The larger figures of 07_op_block; a colour belongs to a method in all of them."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots, trajectories

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
#: Between Pre-LN and OP, norms one at a time.
PATH = {
    "norms before QK, V and MLP": "#000000",
    "the same and QK-norm": "#7A4E00",
    "QK-norm, norms before V and MLP": "#E69F00",
    "QK-norm, norm before V": "#56B4E9",
    "QK-norm, norm before QK": "#0072B2",
    "QK-norm alone (OP)": "#009E73",
}
#: Branches of Pre-LN, the weakest light.
WEAK = {
    "gains fixed at 0.3": "#000000",
    "gains fixed at 0.1": "#56B4E9",
    "LayerScale 0.1": "#D55E00",
    "slope 0 (ReLU)": "#E69F00",
    "slope 0.2": "#000000",
    "slope 0.5": "#0072B2",
    "slope 0.8": "#56B4E9",
    "value gain 1": "#000000",
    "value gain 0.3": "#0072B2",
    "value gain 0.1": "#56B4E9",
}


def forms(steps: pd.DataFrame, column: str, label: str, title: str) -> Figure:
    """A number over training, the largest over blocks: norms one at a time, and each way to weaken a branch.

    Args:
        steps: from `trajectories.layers`, with the methods of PATH and WEAK.
        column: of it; `scale` is drawn on a logarithmic axis.
        label: of the vertical axis.
    """
    kinds = dict.fromkeys(PATH, "norms one at a time") | {one: one.split()[0] for one in WEAK}
    kinds |= {"LayerScale 0.1": "gains"}
    inner = steps[(steps["block"] != "out") & steps["method"].isin(kinds)]
    most = inner.groupby(["method", "seed", "step"], sort=False)[column].max().reset_index()
    most["kind"] = most["method"].map(kinds)
    fig = trajectories.small_multiples(most, column, label, title, PATH | WEAK, column == "scale", "kind")
    fig.set_figheight(4.6)  # the legend is long
    return fig


def overview(runs: pd.DataFrame, steps: pd.DataFrame, forms: pd.DataFrame, title: str) -> Figure:
    """Norms one at a time, peaks and losses; loss against peak of the paper's blocks; their kurtosis over training.

    Args:
        runs, steps: from `runs.table` and `trajectories.layers`.
        forms: from `trajectories.peaks`, with the methods of PATH.
    """
    fig, axs = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained", width_ratios=(0.8, 1, 1.2))
    path = forms[forms["method"].isin(PATH)]
    style = {"x": "peak", "y": "method", "hue": "method", "palette": PATH, "order": [*PATH], "size": 7}
    sns.stripplot(path, jitter=False, legend=False, ax=axs[0], **style)
    for place, (_, own) in enumerate(path.groupby("method", sort=False)):
        axs[0].annotate(
            f"loss {own['loss'].mean():.2f}",
            (1, place - 0.25),
            xycoords=("axes fraction", "data"),
            ha="right",
            fontsize=8,
        )
    axs[0].set(xlabel="peak of neuron kurtosis - 1", ylabel="", title="one norm at a time")
    sns.scatterplot(runs, x="loss", y="peak", hue="method", palette=COLORS, s=55, ax=axs[1], legend=False)
    axs[1].set(
        xlabel="validation loss at the end, nats",
        ylabel="peak of neuron kurtosis - 1",
        title="the paper's blocks, a dot is a run",
    )
    inner = steps[steps["block"] != "out"]
    most = inner.groupby(["method", "seed", "step"], sort=False)["kurtosis"].max().reset_index()
    style = {"x": "step", "y": "kurtosis", "hue": "method", "palette": COLORS, "ax": axs[2]}
    sns.lineplot(most, units="seed", estimator=None, lw=0.6, alpha=0.4, legend=False, **style)
    sns.lineplot(most, estimator="median", errorbar=None, lw=2, **style)
    axs[2].set(ylabel="neuron kurtosis - 1, largest over blocks", title="over training, a thin line is a seed")
    for ax, which in zip(axs, "xyy", strict=True):
        plots.log_scale(ax, which)
    sns.move_legend(axs[2], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig
