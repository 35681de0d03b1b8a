"""What runs measured while they trained, block by block: as a table, and as small multiples."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ofutils import plots, sweep

#: column of `layers` -> metric of `streaming.METERS`
COLUMNS = {
    "kurtosis": "neuron_kurtosis",
    "centred": "logged_kurtosis",
    "max-median ratio": "max_median_ratio",
    "correlation": "input_correlation",
    "rms correlation": "input_correlation_rms",
    "feature correlation": "feature_correlation_rms",
    "scale": "rms",
}


def layers(outcomes: list[sweep.Outcome]) -> pd.DataFrame:
    """One row per run, measurement during training and block.

    Returns:
        method; seed; `rate`; step; `loss` on validation text (nats); `block`, whose input (`resid_pre`) it is, or
        `out` for what leaves the last one (`resid_post`); COLUMNS, `kurtosis` less 1; `entropy`, of the block's
        attention (`probs`, nats; not of `out`).
        NaN is what the runs did not measure.
    """
    rows = []
    for outcome in outcomes:
        config = outcome.job.config
        about = {"method": outcome.job.method, "seed": config.seed, "rate": config.lr}
        for entry in outcome.run.log:
            entropy = {_block(site): one["attention_entropy"] for site, one in _of(entry, "probs")}
            for site, found in [*_of(entry, "resid_pre"), *_of(entry, "resid_post")[-1:]]:
                block = _block(site) if site.endswith("resid_pre") else "out"
                row = about | {"step": entry["step"], "loss": entry["loss"], "block": block}
                row |= {"entropy": entropy.get(block)}
                rows.append(row | {column: found.get(metric) for column, metric in COLUMNS.items()})
    table = pd.DataFrame(rows, columns=["method", "seed", "rate", "step", "loss", "block", *COLUMNS, "entropy"])
    numbers = dict.fromkeys((*COLUMNS, "entropy"), float)
    return table.astype(numbers).assign(kurtosis=lambda t: t["kurtosis"] - 1)


def peaks(outcomes: list[sweep.Outcome], steps: pd.DataFrame) -> pd.DataFrame:
    """One row per run that did not diverge: the largest numbers over blocks and training.

    Args:
        outcomes: the runs.
        steps: their `layers`.

    Returns:
        method; seed; rate; `loss` at the end (nats); `peak` of the kurtosis less 1, and `end`, the one at the end;
        the largest `rms correlation` and `scale` where they were measured. What leaves the last block is left out.
    """
    about, inner = ["method", "seed", "rate"], steps[steps["block"] != "out"]
    losses = [(o.job.method, o.job.config.seed, o.job.config.lr, o.measured["loss"]) for o in outcomes if not o.error]
    last = inner[inner["step"] == inner["step"].max()]
    found = inner.groupby(about, sort=False)[["kurtosis", "rms correlation", "scale"]].max()
    found = found.rename(columns={"kurtosis": "peak"}).assign(end=last.groupby(about)["kurtosis"].max())
    return pd.DataFrame(losses, columns=[*about, "loss"]).merge(found.reset_index(), on=about)


def _of(entry: dict, kind: str) -> list[tuple[str, dict]]:
    return [(site, found) for site, found in entry["sites"].items() if site.split(".")[-1] == kind]


def _block(site: str) -> str:
    return site.split(".")[1]


def small_multiples(
    steps: pd.DataFrame,
    column: str,
    label: str,
    title: str,
    colors: dict[str, str],
    log: bool = False,
    panel: str = "block",
    hue: str = "method",
) -> Figure:
    """A number over training, a panel a block; bold lines are medians over seeds, thin ones seeds.

    Args:
        steps: from `layers`.
        column: of it.
        label: of the vertical axis.
        colors: of the values of `hue`.
        panel, hue: columns of `steps`.
    """
    found = steps[steps[column].notna()]
    own, columns = dict(iter(found.groupby(panel, sort=False))), min(4, found[panel].nunique())
    rows = -(-len(own) // columns)
    fig, axs = plt.subplots(
        rows, columns, figsize=(13, 0.6 + 2.5 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax, (name, one) in zip(axs.flat, own.items(), strict=False):
        style = {"x": "step", "y": column, "hue": hue, "palette": colors, "ax": ax}
        sns.lineplot(one, units="seed", estimator=None, lw=0.5, alpha=0.4, legend=False, **style)
        sns.lineplot(one, estimator="median", errorbar=None, lw=1.5, **style)
        said = {"out": "behind the last block"}.get(name, f"block {name}" if panel == "block" else name)
        ax.set(title=said, ylabel=label)
        if log:
            plots.log_scale(ax, "y")
    handles = {}
    for number, ax in enumerate(axs.flat):
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.get_legend().remove() if number < len(own) else ax.set_visible(False)
        if number >= len(own) - columns:  # nothing is below it
            ax.xaxis.set_tick_params(labelbottom=True)
            ax.xaxis.label.set_visible(True)
    fig.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=5)
    fig.suptitle(title, x=0, ha="left")
    return fig
