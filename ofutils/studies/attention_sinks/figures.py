"""The larger figures of the notebook; each takes tables and a title, and returns the figure.

Colours belong to the rules by which outlier dimensions are found, and to groups of tokens.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ofutils import plots

#: Colour and marker of each rule, colour of each group of `sentences.GROUPS`.
RULES = {"by weight": ("#0072B2", "s"), "by activation": ("#D55E00", "D"), "authors' list": ("#009E73", "v")}
GROUPS = {"start": "#D55E00", "separator": "#E69F00", "punctuation": "#56B4E9", "other": "0.8"}
_DOT = {"ec": "white", "lw": 0.4}


def _titled(fig: Figure, title: str) -> Figure:
    fig.suptitle(title, x=0, ha="left")
    return fig


def heads(mean: pd.DataFrame, base: dict[str, float], names: dict[str, str], title: str) -> Figure:
    """Where each head looks: its share for a group of tokens over the group's share of the tokens; column entropy.

    Args:
        mean: indexed by block and head, as `statistics.table` has them.
        base: group -> share of the tokens.
        names: group -> what it is called.
    """
    layers = mean.index.get_level_values("block").nunique()
    fig, axs = plt.subplots(1, 4, figsize=(13, 1.7 + 0.32 * layers), sharey=True, width_ratios=[1, 1, 1.25, 1.25])
    for ax, group in zip(axs, ("start", "separator", "punctuation"), strict=False):
        ratio = np.log2((mean[group].unstack() / base[group]).clip(lower=2**-10))
        sns.heatmap(ratio, ax=ax, vmin=-4, vmax=4, cmap="RdBu_r", cbar=ax is axs[2], linewidths=0.5)
        ax.set_title(f"attention at {names[group]}")
    bar = axs[2].collections[0].colorbar
    bar.set_ticks([-4, -2, 0, 2, 4], labels=["1/16", "1/4", "1", "4", "16"])
    bar.ax.set_title("times its\nshare of\ntokens", fontsize=7)
    sns.heatmap(mean["evenness"].unstack(), ax=axs[3], vmin=0, vmax=1, cmap="rocket", linewidths=0.5)
    axs[3].set_title("column entropy / log n")
    for ax in axs:
        ax.set(xlabel="head", ylabel="block" if ax is axs[0] else "")
        ax.tick_params(left=False, bottom=False)
    return _titled(fig, title)


def values(mean: pd.DataFrame, sinks: float, special: str, title: str) -> Figure:
    """Each head a dot: |v| at the special token it looks at, and its output, against its share for special tokens.

    Args:
        mean: indexed by block and head; columns special, value, output.
        sinks: share above which a head sinks.
        special: names of the special tokens.
    """
    fig, axs = plt.subplots(1, 2, figsize=(11.5, 4.4), sharex=True)
    labels, blocks = ("|v| at special tokens", "|probabilities x values|"), mean.index.get_level_values("block")
    for ax, column, label in zip(axs, ("value", "output"), labels, strict=True):
        dots = ax.scatter(mean["special"], mean[column], c=blocks, cmap="viridis", s=36, **_DOT)
        ax.axvline(sinks, color="gray", lw=1, ls="--")
        ax.text(sinks + 0.01, 1, "sinks", color="gray", transform=ax.get_xaxis_transform(), va="top")
        ax.set(xlabel=f"share of attention at {special}", ylabel=f"{label} / median |v|", xlim=(0, 1))
    plots.log_scale(axs[0], "y")
    axs[1].plot([0, 1], [1, 0], color="gray", lw=1, ls=":", label="1 - share")
    axs[1].set_ylim(0, None)
    axs[1].legend()
    fig.colorbar(dots, ax=axs, label="block", ticks=sorted(set(blocks)) if len(set(blocks)) < 8 else None)
    return _titled(fig, title)


def correlations(r: pd.DataFrame, rules: dict[str, list[int]], titles: dict[str, str], title: str) -> Figure:
    """r of every dimension (grey) and of those that a rule names, by block; one panel for each hidden state.

    Args:
        r: rows of `statistics.correlations`.
        rules: rule -> dimensions; those of `by activation` are numbered.
        titles: hidden state -> title of its panel.
    """
    fig, axs = plt.subplots(1, len(titles), figsize=(4.5 * len(titles), 4.6), sharey=True)
    for ax, (variant, name) in zip(axs, titles.items(), strict=True):
        part = r[r["hidden"] == variant].set_index("dimension")
        rest = part[~part.index.isin({d for own in rules.values() for d in own})]
        spread = np.random.default_rng(0).uniform(-0.26, 0.26, len(rest))
        ax.scatter(rest["block"] + spread, rest["r"], s=4, color="0.75", lw=0, label="every other dimension")
        for place, (rule, own) in enumerate(rules.items()):
            chosen, (colour, marker) = part[part.index.isin(own)], RULES[rule]
            look = {"s": 44 - 16 * place, "color": colour, "marker": marker, "label": rule if own else None}
            ax.scatter(chosen["block"], chosen["r"], **look, **_DOT)
        for d in rules["by activation"]:
            top = part.loc[[d]].set_index("block")["r"]
            if top.notna().any():
                ax.annotate(str(d), (top.idxmax() + 0.2, top.max()), fontsize=9, va="center")
        ax.axhline(0, color="gray", lw=0.8)
        ax.set(title=name, xlabel="block", xticks=sorted(r["block"].unique()), ylim=(-1.05, 1.05))
    axs[0].set_ylabel("r of |h| and attention received")
    axs[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=1.2)
    return _titled(fig, title)


def ablation(
    by_block: pd.DataFrame, lines: dict[str, tuple], each: pd.DataFrame, rules, start: str, title: str
) -> Figure:
    """Attention at special tokens and |v| at the start, by block and case; what each dimension alone costs.

    Args:
        by_block: columns case, block, special, value.
        lines: case -> (label, colour, line style).
        each: columns dimension, largest, lost.
        rules: rule -> dimensions.
        start: name of the start token.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14.5, 4.2), width_ratios=[1, 1, 1.2])
    for case, (label, colour, dash) in lines.items():
        line = by_block[by_block["case"] == case].groupby("block")[["special", "value"]].mean()
        for ax, column in zip(axs, line, strict=False):
            ax.plot(line.index, line[column], color=colour, ls=dash, lw=2.2, label=label)
            ax.set(xlabel="block", xticks=line.index if len(line) else [])
    axs[0].set(title="share of attention at special tokens", ylim=(0, 1))
    axs[0].legend(fontsize=8, loc="upper right")
    axs[1].set_title(f"|v| at {start} / median |v| of other tokens")
    plots.log_scale(axs[1], "y")
    axs[2].scatter(each["largest"], each["lost"], s=10, color="0.7", lw=0, label="one dimension zeroed")
    for rule, own in rules.items():
        chosen, (colour, marker) = each[each["dimension"].isin(own)], RULES[rule]
        look = {"s": 34, "color": colour, "marker": marker, "label": rule if own else None, "ec": "white"}
        axs[2].scatter(chosen["largest"], chosen["lost"], **look)
    for _, one in each.nlargest(2, "largest").iterrows():
        place = {"xytext": (-7, 3), "textcoords": "offset points", "ha": "right"}
        axs[2].annotate(f"dimension {one['dimension']:.0f}", (one["largest"], one["lost"]), fontsize=9, **place)
    axs[2].set(title="share of that attention lost", xlabel="largest |x| of the dimension (resid_post)")
    plots.log_scale(axs[2], "x")
    axs[2].legend(fontsize=8, loc="upper left")
    return _titled(fig, title)


def outliers(
    bars: pd.DataFrame, panels: dict[str, tuple[pd.Series, str]], kinds: list[str], names, title: str
) -> Figure:
    """Six-sigma outliers: stacked shares of the groups of tokens, then one panel each by token, position, dimension.

    Args:
        bars: one row per bar, a column for each group, the first row on top.
        panels: title -> (numbers, their axis' label); the second is drawn upright over its index.
        kinds: groups of the bars of the first panel in `panels`.
        names: group -> what it is called.
    """
    fig, axs = plt.subplots(1, 4, figsize=(15, 2 + 0.3 * max(7, len(bars))), width_ratios=[1.3, 0.8, 1, 0.8])
    bars[::-1].rename(columns=names).plot.barh(stacked=True, ax=axs[0], color=list(GROUPS.values()), width=0.8)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axs[0].legend(ncols=4, columnspacing=0.8, handlelength=1, fontsize=8, **below)
    axs[0].set(title="outliers by group of tokens", xlim=(0, 1), xlabel="share")
    colours = [GROUPS[kind] for kind in kinds], "#0072B2", "#009E73"
    for ax, colour, (name, (numbers, label)) in zip(axs[1:], colours, panels.items(), strict=True):
        if ax is axs[2]:
            ax.bar(numbers.index, numbers, color=colour, width=1)
        else:
            ax.barh(numbers.index.astype(str), numbers, color=colour, height=0.7)
            ax.invert_yaxis()
        ax.set(title=name, **{"ylabel" if ax is axs[2] else "xlabel": label})
    axs[2].set_xlabel("position")
    return _titled(fig, title)


def remedies(rows: pd.DataFrame, encoder: pd.DataFrame, sinks: float, name: str, title: str) -> Figure:
    """Largest column, exact zeros and gates of the language models; every head of theirs, and an encoder's.

    Args:
        rows: one per head; columns method, state, largest, zeros, pi, value_ratio.
        encoder: one row per head; columns largest, value_ratio.
        sinks: share of the largest column above which a head sinks.
        name: of the encoder.
    """
    fig, axs = plt.subplots(1, 4, figsize=(15, 4), width_ratios=[1.4, 0.7, 0.7, 1.6])
    style = {"hue": "state", "palette": ["0.65", "#D55E00"], "dodge": True, "jitter": 0.2, "size": 4}
    panels = {"largest": "share of the largest column", "zeros": "share of exact zeros", "pi": "mean of the gate"}
    for ax, (column, label) in zip(axs, panels.items(), strict=False):
        shown = rows[rows["method"].isin(rows.loc[rows[column].fillna(0) > 0, "method"])]
        sns.stripplot(shown, x="method", y=column, ax=ax, legend=ax is axs[0], **style)
        ax.set(title=label, xlabel="", ylabel="", ylim=(0, 1))
        ax.tick_params(axis="x", labelsize=8)
    axs[0].axhline(sinks, color="gray", lw=1, ls="--")
    axs[0].text(1, sinks, "sinks", color="gray", transform=axs[0].get_yaxis_transform(), ha="right", va="bottom")
    axs[0].legend(title="", loc="upper left")
    small = rows[rows["state"] == "trained"]
    for part, colour, label in ((small, "#0072B2", f"small models, {len(small)} heads"), (encoder, "#D55E00", name)):
        axs[3].scatter(part["largest"], part["value_ratio"], s=12, color=colour, lw=0, label=label)
    axs[3].axvline(sinks, color="gray", lw=1, ls="--")
    plots.log_scale(axs[3], "y")
    axs[3].set(title="all heads", xlabel="share of the largest column", ylabel="|v| there / median |v|", xlim=(0, 1))
    axs[3].legend(fontsize=8, loc="lower left")
    return _titled(fig, title)
