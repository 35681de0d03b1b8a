"""Remedies of training against what is folded into a trained model, at equal bits.

python -m ofutils.studies.beyond.folded    folds and rounds what has no record yet, and adds to figures/records;
                                           weights that are not here are trained
flags: --workers
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from ofutils import UserError, params, plots, pool, probes, quant, sweep, train
from ofutils.batches import fixed_batches
from ofutils.quant import QuantSettings
from ofutils.records import differing
from ofutils.remedies import LLM_INT8, rotate, smooth
from ofutils.transformer import clm_loss

#: What is done to a trained model, given rows to calibrate on and a seed.
FOLDS: dict[str, Callable[[nn.Module, list, int], nn.Module]] = {
    "as trained": lambda model, rows, seed: model,
    "SmoothQuant": lambda model, rows, seed: smooth(model, rows),
    "rotation": lambda model, rows, seed: rotate(model, seed),
    "both": lambda model, rows, seed: smooth(rotate(model, seed), rows),
}
_BITS = ((8, 8), (6, 6), (4, 4))
_FINE = {"weights": "minmax", "granularity": "token", "weight_granularity": "channel"}
#: How it is rounded: one range a tensor; one a token and output channel; and that with outliers in full precision.
SETTINGS = {
    "per tensor": tuple(QuantSettings(weight_bits=w, activation_bits=a, margin=0) for w, a in _BITS),
    "per token and channel": tuple(QuantSettings(weight_bits=w, activation_bits=a, **_FINE) for w, a in _BITS),
    "LLM.int8()": (LLM_INT8,),
}
COLORS = {"as trained": "#000000", "SmoothQuant": "#E69F00", "rotation": "#009E73", "both": "#56B4E9"}
#: Setting -> the recipe whose runs are folded, at scale small; and how many seeds of it. In the laboratory outliers
#: are what rounding costs, on text they are not.
RECIPES, SEEDS = {"laboratory": "laboratory_int8", "text": "03_quant"}, 3


@dataclass(frozen=True)
class Task:
    """A run, and what is folded into it."""

    fold: str
    job: sweep.Job

    @property
    def label(self) -> str:
        """For failures."""
        return f"{self.job.label}, {self.fold}"

    @property
    def key(self) -> dict:
        """What the record is filed under."""
        settings = [differing(one) for group in SETTINGS.values() for one in group]
        return {"run": differing(self.job.config), "fold": self.fold, "settings": settings}


def tasks(setting: str) -> list[Task]:
    """Every fold of every run of a setting, a key of RECIPES, seed after seed."""
    jobs = sweep.read_recipe(RECIPES[setting], "small", seeds=SEEDS).jobs
    return [Task(fold, job) for job in jobs for fold in FOLDS]


def recall(task: Task) -> dict | None:
    """The record of a task, or None."""
    return train.store().find("folded", task.key)


def perform(task: Task, report: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Fold, round, measure and write the record; or recall it.

    Returns:
        A record whose result has `loss` in full precision (nats), `kurtosis`, the largest neuron kurtosis over blocks
        of the stream (`resid_post`), and `rounded`, the loss under each of SETTINGS in order; or `refused`, why the
        model leaves no place for it.
    """
    if known := recall(task):
        return known
    job, config = task.job, task.job.config
    run = train.trained(config)
    tokens, model = train.load_tokens(config), run.load()
    rows = fixed_batches(tokens.validation, job.evaluation.batches, job.evaluation.batch, config.model.context)
    drawn = sweep.calibration(job, tokens)
    try:
        folded = FOLDS[task.fold](model, drawn, config.seed)
        exact = probes.measure(folded, rows, "resid_post", clm_loss, ("neuron_kurtosis",)).summary()
        kurtosis = max(site["neuron_kurtosis"] for site in exact["sites"].values())
        settings = [one for group in SETTINGS.values() for one in group]
        rounded = quant.table(folded, settings, drawn, lambda: probes.measure(folded, rows, loss=clm_loss).loss)
        result = {"loss": exact["loss"], "kurtosis": kurtosis, "rounded": rounded}
    except UserError as error:
        result = {"refused": str(error)}
    report(1, result.get("loss", 0.0))
    return train.store().write("folded", task.key, result, run.record["environment"])


def table(wanted: list[Task]) -> pd.DataFrame:
    """What rounding costs, of the tasks that are recorded and were not refused.

    Returns:
        One row per task and setting: method; seed; fold; `ranges`, a key of SETTINGS; `bits`, as W8A8;
        `loss` in full precision and `cost`, what rounding adds to it (nats); `kurtosis`.
    """
    rows = []
    for task, record in ((task, recall(task)) for task in wanted):
        if record is None or "refused" in record["result"]:
            continue
        found = record["result"]
        about = {"method": task.job.method, "seed": task.job.config.seed, "fold": task.fold}
        about |= {"loss": found["loss"], "kurtosis": found["kurtosis"]}
        labels = [(ranges, one) for ranges, group in SETTINGS.items() for one in group]
        for (ranges, one), loss in zip(labels, found["rounded"], strict=True):
            bits = f"W{one.weight_bits}A{one.activation_bits}"
            rows.append(about | {"ranges": ranges, "bits": bits, "cost": loss - found["loss"]})
    return pd.DataFrame(rows)


def refusals(wanted: list[Task]) -> pd.Series:
    """Method and fold -> why there is no place for it."""
    found = {(task.job.method, task.fold): recall(task) for task in wanted}
    return pd.Series(
        {key: one["result"]["refused"] for key, one in found.items() if one and "refused" in one["result"]}
    )


def shares(costs: pd.DataFrame) -> pd.DataFrame:
    """What share of vanilla's cost, as trained, each method with each fold saves, seed by seed.

    Args:
        costs: from `table`.

    Returns:
        The rows of `costs` with `saved`: 1 is all of it, below 0 it costs more.
    """
    at = ["ranges", "bits", "seed"]
    vanilla = costs[(costs["method"] == "vanilla") & (costs["fold"] == "as trained")]
    both = costs.merge(vanilla[[*at, "cost"]], on=at, suffixes=("", " of vanilla"))
    return both.assign(saved=1 - both["cost"] / both["cost of vanilla"]).drop(columns="cost of vanilla")


def verdicts(saved: pd.DataFrame, bits: str, setting: str) -> list[tuple[str, pd.Series, str]]:
    """What is judged at per-tensor ranges: a sentence, one value for each seed, the parameter that holds its margin.

    Args:
        saved: from `shares`, of one setting.
        bits: such as W6A6.
        setting: a key of RECIPES.
    """
    own = saved[(saved["ranges"] == "per tensor") & (saved["bits"] == bits)]
    of = own.pivot(index="seed", columns=["method", "fold"], values="saved")
    said = f"{setting}, {bits}: share of vanilla's cost that {{}} saves"
    found = [
        (said.format(f"{fold} folded into vanilla") + ":", of["vanilla", fold], "share_kept")
        for fold in ("SmoothQuant", "rotation", "both")
    ]
    rotated = of["vanilla", "rotation"]
    for method in ("OP", "vanilla + SOAP"):
        found.append((said.format(f"{method}, as trained,") + ":", of[method, "as trained"], "share_kept"))
        found.append((said.format(method) + " beyond rotation:", of[method, "as trained"] - rotated, "more"))
        more = of[method, "rotation"] - of[method, "as trained"]
        found.append((said.format("rotation") + f" on top of {method}:", more, "more"))
    return found


def figure(costs: dict[str, pd.DataFrame], bits: tuple[str, ...], title: str) -> Figure:
    """What rounding costs with one range per tensor, by method and fold; a column a bit width, a row a setting.

    Args:
        costs: setting -> from `table`.
        bits: of its `bits`.
    """
    size = {"figsize": (13, 3.8 * len(costs) + 0.6), "squeeze": False}
    fig, axs = plt.subplots(len(costs), len(bits), sharey="row", layout="constrained", **size)
    for (setting, one), ax in zip(product(costs, bits), axs.flat, strict=True):
        own = costs[setting][costs[setting]["ranges"] == "per tensor"]
        own = own.assign(cost=own["cost"].clip(lower=1e-5))
        methods = list(dict.fromkeys(own["method"]))
        style = {"x": "cost", "y": "method", "hue": "fold", "palette": COLORS, "order": methods, "ax": ax}
        sns.stripplot(own[own["bits"] == one], dodge=True, jitter=False, size=5, **style)
        ax.set(title=f"{setting}, {one}", xlabel="what rounding adds, nats", ylabel="")
        plots.log_scale(ax, "x")
        for place in range(len(methods) - 1):
            ax.axhline(place + 0.5, color="0.9", lw=0.8, zorder=0)
        handles, labels = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    fig.legend(handles, labels, loc="outside lower left", ncols=len(labels))
    fig.suptitle(title, x=0, ha="left")
    return fig


@params.settings
class Command:
    """Flags of `python -m ofutils.studies.beyond.folded`."""

    workers: int = -1  # -1: one per core


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    command, wanted = params.read(Command, arguments), [task for setting in RECIPES for task in tasks(setting)]
    workers = None if command.workers < 0 else command.workers
    pool.finish(perform, wanted, [0 if recall(task) else 1 for task in wanted], workers)
    at = ["ranges", "bits", "method", "fold"]
    for setting in RECIPES:
        costs = table(tasks(setting)).groupby(at, sort=False)["cost"].mean()
        print(setting, costs.unstack().round(4).to_string(), sep="\n")
    print("records written to", train.store().export([*map(recall, wanted)], "folded.small"))


if __name__ == "__main__":
    params.main_guard(main)
