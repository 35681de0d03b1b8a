"""The larger figures of 03_quant."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ofutils import plots
from ofutils.laboratory import REMEDIES

_RANGES = {"full precision": "0.6", "per tensor": "#D55E00", "per token": "#0072B2"}


def laboratory(scan: pd.DataFrame, runs: pd.DataFrame, bits: tuple[str, ...], title: str) -> Figure:
    """What rounding costs in the laboratory, with one range per tensor and one per token.

    Args:
        scan: from `laboratory.table`, one run a row, `method` says what was changed.
        runs: from `laboratory.table`, of vanilla and the remedies.
        bits: labels of settings per tensor, which have their like per token: a panel each of the runs; that of the
            scan shows the first.
    """
    fig, axs = plt.subplots(1, 1 + len(bits), figsize=(13, 3.8), layout="constrained", width_ratios=(1.2, 1, 1))
    orders = [scan.sort_values(bits[0])["method"].tolist(), *[["vanilla", *REMEDIES]] * len(bits)]
    for ax, table, label, order in zip(axs, (scan, *[runs] * len(bits)), (bits[0], *bits), orders, strict=True):
        for kind in ("per tensor", "per token"):
            column = label + " per token" * (kind == "per token")
            cost = table.assign(cost=table[column].clip(lower=1e-5))
            style = {"color": _RANGES[kind], "marker": "o" if kind == "per tensor" else "D", "size": 5}
            sns.stripplot(cost, x="cost", y="method", order=order, jitter=False, ax=ax, **style)
        plots.log_scale(ax, "x")
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.set(xlabel=f"what {label} adds to the loss, nats", ylabel="", title=f"{label}, every method")
    axs[0].set_title(f"vanilla, {bits[0]}: what was changed, one seed")
    handles = [
        plt.Line2D([], [], color=_RANGES[k], marker=m, ls="") for k, m in (("per tensor", "o"), ("per token", "D"))
    ]
    fig.legend(handles, ["one range per tensor", "one range per token"], loc="outside lower left", ncols=2)
    fig.suptitle(title, x=0, ha="left")
    return fig


def tables(parts: dict[str, pd.DataFrame], title: str) -> Figure:
    """What rounding costs, a dot a seed and a draw: left by model, right, one below the other, by bits.

    Args:
        parts: title -> from `runs.tidy`; the first one stands left.
    """
    first, *others = parts
    fig = plt.figure(figsize=(13, 1 + 0.27 * parts[first]["method"].nunique()), layout="constrained")
    axs = fig.subplot_mosaic([[first, other] for other in others], width_ratios=(1.1, 1))
    for name, ax in axs.items():
        y, hue = ("method", "setting") if name == first else ("setting", "method")
        style = {"dodge": True, "jitter": False, "size": 4, "palette": "colorblind"}
        sns.stripplot(parts[name], x="cost", y=y, hue=hue, ax=ax, **style)
        plots.log_scale(ax, "x")
        ax.set(xlabel="what rounding adds, nats", ylabel="", title=name)
        ax.legend(
            title="", loc="upper left", bbox_to_anchor=(0, -0.1 if name == first else -0.2), ncols=2, fontsize=8
        )
    fig.suptitle(title, x=0, ha="left")
    return fig


def healing(judged: pd.DataFrame, steps: pd.DataFrame, title: str) -> Figure:
    """A checkpoint before and after: how far from the original, rounded and not; and the way there.

    Args:
        judged, steps: from `healing.tables`; where they are empty, so is the figure.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.3, 1, 1))
    fig.suptitle(title if len(judged) else f"{title}: nothing is recorded here", x=0, ha="left")
    if judged.empty:
        return fig
    ways = judged["way"].unique().tolist()
    colors = dict(zip(ways, ["black", *sns.color_palette("colorblind", len(ways) - 1)], strict=True))
    each = judged.groupby(["way", "seed", "ranges"], sort=False)["original"].mean().reset_index()
    style = {"order": ways, "hue": "ranges", "palette": _RANGES, "dodge": True, "jitter": False, "size": 5}
    sns.stripplot(each[each["original"] > 1e-6], x="original", y="way", ax=axs[0], **style)
    axs[0].set(xlabel="1 - cosine to the original's embedding", ylabel="", title="W8A8, a dot is a seed")
    axs[0].legend(title="", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=3)
    titles = {"max": "largest |x| (mlp_out, resid_post)", "distance": "distance to the original's tokens"}
    smooth = steps.groupby(["way", "seed"])[[*titles]].transform(lambda one: one.rolling(10, min_periods=1).median())
    for ax, (column, said) in zip(axs[1:], titles.items(), strict=True):
        of = steps.assign(**smooth)
        sns.lineplot(of, x="step", y=column, hue="way", palette=colors, errorbar=None, lw=1.2, ax=ax)
        ax.set(ylabel="", title=said)
    for ax in axs:
        plots.log_scale(ax, "x" if ax is axs[0] else "y")
    axs[0].set_ylabel("")
    axs[2].set_ylim(bottom=1e-3)  # it begins at zero
    axs[1].get_legend().remove()
    sns.move_legend(axs[2], "center left", bbox_to_anchor=(1, 0.5), title="")
    return fig
