"""The larger figures of 06_clipped_softmax_gating; a colour belongs to a method in all of them."""

import pandas as pd
import seaborn as sns
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots
from ofutils.attention import AttentionConfig, probabilities
from ofutils.studies.clipped_softmax_gating.runs import PLACES, QUANTITIES
from ofutils.studies.clipped_softmax_gating.sinks import KINDS

#: Softmax dark, clipped orange, gates blue, the later ones green and pink.
COLORS = {
    "vanilla": "#000000",
    "clipped softmax": "#E69F00",
    "row-aware clipped softmax": "#D55E00",
    "clipped softmax, alpha 0.64": "#F5D78E",
    "clipped softmax, released start": "#B87C00",
    "vanilla, released start": "#7F7F7F",
    "gated attention": "#0072B2",
    "gate, MLP": "#56B4E9",
    "gate, all heads": "#004B78",
    "softmax off by one": "#009E73",
    "sink logit": "#66C2A5",
    "sigmoid": "#CC79A7",
}


def overview(table: pd.DataFrame, title: str) -> Figure:
    """What each method does to sink, outlier, loss and rounding: a row of panels a place; a dot is a run.

    Args:
        table: from `runs.one_table`.
    """
    places = [place for place in PLACES if place in set(table["place"])]
    methods = {place: _order(table[table["place"] == place]) for place in places}
    heights = [len(methods[place]) + 1 for place in places]
    size = (14, 1 + 0.27 * sum(heights))
    style = {"height_ratios": heights, "sharey": "row", "squeeze": False, "layout": "constrained"}
    fig, axs = plt.subplots(len(places), 4, figsize=size, **style)
    for place, row in zip(places, axs, strict=True):
        own = table[table["place"] == place]
        own = own.assign(saved=own["saved"].clip(lower=-1))
        for ax, (column, said) in zip(row, QUANTITIES.items(), strict=True):
            style = {"order": methods[place], "hue": "method", "palette": COLORS, "legend": False}
            sns.stripplot(own, x=column, y="method", jitter=False, size=5, ax=ax, **style)
            vanilla = own[own["method"] == "vanilla"][column].median()
            ax.axvline(vanilla, color="0.8", lw=0.8, zorder=0)
            ax.set(xlabel="", ylabel=place if ax is row[0] else "")
            if place == places[0] or column == "saved":
                ax.set_title(said.format(PLACES[place]), fontsize=10)
        row[0].set_xlim(-0.03, 1)
        plots.log_scale(row[1], "x")
    fig.suptitle(title, x=0, ha="left")
    return fig


def _order(table: pd.DataFrame) -> list[str]:
    return [method for method in COLORS if method in set(table["method"])]


def gammas(grids: pd.DataFrame, title: str) -> Figure:
    """The paper's Table 1: max inf norm, loss and cost of W6A6 by gamma and zeta; a dot is a seed.

    Args:
        grids: from `runs.grid`.
    """
    plain = grids[(grids["context"] == 64) & (grids["alpha"] == 0) & grids["pi"].isna()]
    own = plain.sort_values(["gamma", "zeta"], ascending=[False, True])
    own = own.assign(setting=own["gamma"].map("{:g}".format) + ", " + own["zeta"].map("{:g}".format))
    return _strips(own, "setting", "gamma, zeta", title)


def gates(grids: pd.DataFrame, title: str) -> Figure:
    """The paper's Figure 7: the same by the value at which gates start; at the top, without a gate."""
    own = grids[grids["pi"].notna() | (grids["method"] == "alpha 0, T 64")].sort_values("pi", na_position="first")
    return _strips(
        own.assign(setting=own["pi"].map("{:g}".format).replace("nan", "no gate")),
        "setting",
        "pi at the start",
        title,
    )


def _strips(own: pd.DataFrame, column: str, said: str, title: str) -> Figure:
    fig, axs = plt.subplots(1, 4, figsize=(14, 3.4), sharey=True, layout="constrained")
    wanted = {
        "norm": "max inf norm (resid_post)",
        "sink": "attention to <s> (probs)",
        "loss": "loss above the true predictor's, nats",
        "W6A6": "what W6A6 adds, nats",
    }
    for ax, (quantity, words) in zip(axs, wanted.items(), strict=True):
        shown = own.assign(W6A6=own["W6A6"].clip(lower=1e-4))
        sns.stripplot(
            shown, x=quantity, y=column, hue=column, palette="viridis", jitter=False, size=5, ax=ax, legend=False
        )
        ax.locator_params(axis="x", nbins=4)
        ax.set(xlabel=words, ylabel=said)
    plots.log_scale(axs[0], "x")
    plots.log_scale(axs[3], "x")
    axs[1].set_xlim(-0.03, 1)
    fig.suptitle(title, x=0, ha="left")
    return fig


def alphas(grids: pd.DataFrame, title: str) -> Figure:
    """The paper's Figure 6: loss and max inf norm over alpha, a line a length of rows, thin lines are seeds.

    Args:
        grids: from `runs.grid`.
    """
    own = grids[grids["pi"].isna() & (grids["gamma"] == 0) & (grids["zeta"] == 1)]
    plain = own[own["alpha"] == 0].set_index(["context", "seed"])["loss"]
    at = pd.MultiIndex.from_frame(own[["context", "seed"]])
    lengths = own["context"].astype(str) + own["row_aware"].map({True: ", gamma = -alpha / t", False: ""})
    own = own.assign(change=own["loss"] - plain.reindex(at).to_numpy(), T=lengths)
    own = own.sort_values(["row_aware", "context"])
    fig, axs = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    wanted = {
        "change": "loss above vanilla's, nats",
        "norm": "max inf norm (resid_post)",
        "sink": "attention to <s> (probs)",
    }
    for ax, (column, said) in zip(axs, wanted.items(), strict=True):
        style = {"x": "alpha", "y": column, "hue": "T", "palette": "viridis", "ax": ax}
        sns.lineplot(own, units="seed", estimator=None, lw=0.6, alpha=0.5, legend=False, **style)
        sns.lineplot(own, estimator="median", errorbar=None, marker="o", lw=2, legend=ax is axs[2], **style)
        ax.set(ylabel=said, xlabel="alpha (gamma = -alpha / T); 0 is vanilla")
    plots.log_scale(axs[1], "y")
    axs[0].axhline(0, color="0.7", lw=0.8, ls="--")
    axs[0].set_yscale("symlog", linthresh=0.01)
    axs[0].set_ylim(top=2 * own["change"].max())
    sns.move_legend(axs[2], "center left", bbox_to_anchor=(1, 0.5), title="T, tokens of a row")
    fig.suptitle(title, x=0, ha="left")
    return fig


def row_sums(alpha: float, context: int, seed: int = 0) -> pd.DataFrame:
    """How much of a query's attention is left after clipping, at random scores, by how many keys it sees.

    Returns:
        One row per query and form: `keys`, `form`, `kept`, the sum of its row, the mean over 64 heads.

    Source: bondarenko2023, Eq 4; the paper does not show it.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 64, context, context, generator=generator)
    seen = torch.ones(context, context).tril().bool()
    keys = torch.arange(1.0, context + 1)
    rows = []
    for form, row_aware in (("gamma = -alpha / T", False), ("gamma = -alpha / t", True)):
        own = AttentionConfig(alpha=alpha, row_aware=row_aware)
        probs = probabilities(scores.masked_fill(~seen, float("-inf")), own, keys[:, None] if row_aware else context)
        rows.append(pd.DataFrame({"keys": keys.int(), "form": form, "kept": probs.sum(-1).mean((0, 1))}))
    return pd.concat(rows, ignore_index=True)


def by_row(sums: pd.DataFrame, runs: pd.DataFrame, title: str) -> Figure:
    """What is left of a row at random scores; and what clipping by row does to trained models.

    Args:
        sums: from `row_sums`.
        runs: from `runs.one_table`.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained", width_ratios=(1.3, 1, 1))
    colors = dict(
        zip(sums["form"].unique(), (COLORS["clipped softmax"], COLORS["row-aware clipped softmax"]), strict=True)
    )
    sns.lineplot(sums, x="keys", y="kept", hue="form", palette=colors, ax=axs[0])
    axs[0].set(xlabel="t, keys that a query sees", ylabel="sum of its row", title="at random scores, not trained")
    axs[0].legend(title="")
    order = ["vanilla", "clipped softmax", "row-aware clipped softmax"]
    own = runs[runs["method"].isin(order)]
    for ax, place in zip(axs[1:], ("laboratory", "OPT, text"), strict=True):
        style = {"x": "above", "y": "norm", "hue": "method", "hue_order": order, "palette": COLORS, "s": 60, "ax": ax}
        sns.scatterplot(own[own["place"] == place], legend=ax is axs[2], **style)
        ax.set(title=place, xlabel="loss above vanilla's, nats", ylabel="max inf norm (resid_post)")
        plots.log_scale(ax, "y")
    sns.move_legend(axs[2], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig


def where(sinks: pd.DataFrame, objective: str, title: str) -> Figure:
    """Which tokens get the attention of the head that gives them most, and which hold the outliers; by method.

    Args:
        sinks: from `sinks.table`.
        objective: `clm` or `mlm`.
    """
    own = sinks[(sinks["objective"] == objective) & (sinks["kind"] != "other")]
    shown = [kind for kind in KINDS if own[own["kind"] == kind]["tokens"].sum() > 0]
    own = own[own["kind"].isin(shown)]
    fig, axs = plt.subplots(1, 2, figsize=(13, 1 + 0.4 * own["method"].nunique()), sharey=True, layout="constrained")
    said = {"attention": "largest share of a head's attention", "outliers": "share of outliers (mlp_out, six sigma)"}
    colors = dict(zip(shown, ("#D55E00", "#0072B2", "#999999"), strict=False))
    for ax, (column, words) in zip(axs, said.items(), strict=True):
        style = {"y": "method", "hue": "kind", "palette": colors, "order": _order(own), "hue_order": shown}
        sns.stripplot(own, x=column, dodge=True, jitter=False, size=5, ax=ax, **style)
        for kind in shown:
            ax.axvline(own[own["kind"] == kind]["tokens"].mean(), color=colors[kind], lw=0.8, ls=":", zorder=0)
        ax.set(xlim=(-0.03, 1.03), xlabel=words, ylabel="")
    axs[0].get_legend().remove()
    sns.move_legend(axs[1], "center left", bbox_to_anchor=(1, 0.5), title="dotted: their\nshare of tokens")
    fig.suptitle(title, x=0, ha="left")
    return fig


def over_training(steps: pd.DataFrame, title: str) -> Figure:
    """Outliers and loss over training, medians over seeds; thin lines are seeds.

    Args:
        steps: from `runs.over_training`.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    said = ("max inf norm (mlp_out)", "tensor kurtosis (mlp_out)", "loss, nats")
    for ax, column, words in zip(axs, ("norm", "kurtosis", "loss"), said, strict=True):
        style = {"x": "step", "y": column, "hue": "method", "hue_order": _order(steps), "palette": COLORS, "ax": ax}
        sns.lineplot(steps, units="seed", estimator=None, lw=0.5, alpha=0.4, legend=False, **style)
        sns.lineplot(steps, estimator="median", errorbar=None, lw=1.8, legend=ax is axs[2], **style)
        ax.set(ylabel=words)
    plots.log_scale(axs[0], "y")
    plots.log_scale(axs[1], "y")
    sns.move_legend(axs[2], "center left", bbox_to_anchor=(1, 0.5), title="")
    fig.suptitle(title, x=0, ha="left")
    return fig
