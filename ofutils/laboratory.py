"""The laboratory: the task `backcopy`, on which a CPU grows sinks and outliers in minutes, and its recorded runs.

What holds in the laboratory is said of the laboratory. It stands beside what was seen on text, never in its place.

    python -m ofutils.laboratory    intervenes in the trained models where no record is there of it, and adds to
                                    figures/records; weights that are not here are trained
"""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ofutils import data, params, plots, probes, reference, sweep, train
from ofutils.batches import fixed_batches
from ofutils.records import differing
from ofutils.transformer import Transformer, clm_loss

#: The remedies, and how the ids of the papers' claims on them begin.
REMEDIES = {
    "clipped softmax": "bondarenko2023-lab-clipped",
    "gated attention": "bondarenko2023-lab-gated",
    "OP": "he2024-lab-op",
    "vanilla + SOAP": "he2024-lab-soap",
    "OP + SOAP": "he2024-lab-op-soap",
}
_QUANTITIES = {
    "sink": ("sink", "{} divides vanilla's attention to <s> (probs) by"),
    "kurtosis": ("excess", "{} divides vanilla's neuron kurtosis - 1 (resid_post) by"),
    "norm": ("max inf norm", "{} divides vanilla's max inf norm (resid_post) by"),
    "fp": ("above bound", "{} lowers the full-precision loss (nats) by"),
}
#: The runs that `interventions` looks at: recipe and method. In one layer no block's output reaches an attention.
RUNS = {"1 layer": ("laboratory", "vanilla"), "2 layers": ("laboratory_deep", "2 layers")}
_STREAM = ("embed_sum", "resid_mid", "resid_post")


def table(recipe: sweep.Recipe) -> pd.DataFrame:
    """One row per recorded run of a recipe on `backcopy`, of those that did not diverge.

    Returns:
        Columns method; seed; `above bound`, loss less that of the true predictor, nats; `sink`, the attention to
        `<s>` (site `probs`) in the block where it is largest; `kurtosis`, the neuron kurtosis (`resid_post`) in the
        block where it is largest; likewise `max-median ratio`, `tensor kurtosis` and `max inf norm` of `resid_post`;
        and for each setting of quantization its label, with what rounding adds to the loss.
    """
    return pd.DataFrame(map(_row, _finished(recipe)))


def over_training(recipe: sweep.Recipe) -> pd.DataFrame:
    """One row per measurement during those runs: method, seed, step, `sink` and `kurtosis` as in `table`."""
    return pd.DataFrame(
        {"method": outcome.job.method, "seed": outcome.job.config.seed, "step": entry["step"]}
        | sink_and_kurtosis(entry["sites"])
        for outcome in _finished(recipe)
        for entry in outcome.run.log
    )


def _finished(recipe: sweep.Recipe) -> list[sweep.Outcome]:
    return [outcome for outcome in map(sweep.recall, recipe.jobs) if outcome and not outcome.error]


def _largest(sites: dict[str, dict], site: str, metric: str) -> float:
    """Of a metric of a site, over the blocks."""
    return max(values[metric] for name, values in sites.items() if name.split(".")[-1] == site)


def sink_and_kurtosis(sites: dict[str, dict]) -> dict[str, float]:
    """Attention to `<s>` (`probs`) and neuron kurtosis (`resid_post`), each in the block where it is largest.

    Args:
        sites: site -> its metrics, as `probes.Measurement.summary` gives them.
    """
    return {"sink": _largest(sites, "probs", "sink"), "kurtosis": _largest(sites, "resid_post", "neuron_kurtosis")}


def _row(outcome: sweep.Outcome) -> dict:
    config, loss, sites = outcome.job.config, outcome.measured["loss"], outcome.measured["sites"]
    bound = data.backcopy_chain(config.corpus, config.model.vocab).bound(config.model.context)
    row = {"method": outcome.job.method, "seed": config.seed, "above bound": loss - bound}
    others = {
        "max-median ratio": "max_median_ratio",
        "tensor kurtosis": "tensor_kurtosis",
        "max inf norm": "inf_norm",
    }
    row |= sink_and_kurtosis(sites) | {said: _largest(sites, "resid_post", one) for said, one in others.items()}
    return row | {label: rounded - loss for label, rounded in outcome.quantized.items()}


def against_vanilla(runs: pd.DataFrame, quantity: str) -> list[tuple[str, str, pd.Series]]:
    """What each remedy does to one of vanilla's numbers, for `reference.compare`.

    Args:
        runs: from `table`, all methods with the same seeds.
        quantity: `sink`, `kurtosis`, `norm`: by what it divides them; `fp`: how many nats it lowers the loss; or the
            label of a setting of quantization: the share of its cost that it saves.

    Returns:
        (id of the paper's claim or nothing, sentence, one value for each seed).
    """
    column, said = _QUANTITIES.get(quantity, (quantity, f"share of vanilla's {quantity} cost that {{}} saves:"))
    wide = runs.assign(excess=runs["kurtosis"] - 1).pivot(index="seed", columns="method", values=column)
    known, found = {claim.id for claim in reference.claims()}, []
    for method, start in REMEDIES.items():
        id, vanilla, own = f"{start}-{quantity.lower()}", wide["vanilla"], wide[method]
        values = vanilla / own if quantity in _QUANTITIES else 1 - own / vanilla
        values = vanilla - own if quantity == "fp" else values
        found.append((id if id in known else "", f"laboratory: {said.format(method)}", values))
    return found


def innocent(runs: pd.DataFrame, blame: float) -> str:
    """Why savings of rounding cost are not judged, if so: outliers are not what rounding costs vanilla.

    They are to blame where W8A8 costs at least `blame` times as much with one range per tensor as with one per token.
    """
    costs = runs[runs["method"] == "vanilla"][["W8A8", "W8A8 per token"]].mean()
    times = costs["W8A8"] / costs["W8A8 per token"]
    said = f"outliers are not to blame: one range per tensor costs {times:.1f} times one per token"
    return "" if times >= blame else said


def halfway(training: pd.DataFrame) -> pd.DataFrame:
    """When sink and outlier have come half of their way.

    Args:
        training: from `over_training`, of one method.

    Returns:
        One row per seed: of `sink` and of `kurtosis` (less 1) the first measured step at which it reaches half of
        what it is at the end.
    """
    steps = training.assign(kurtosis=training["kurtosis"] - 1).set_index("step")
    return pd.DataFrame(
        {column: (one[column] >= one[column].iloc[-1] / 2).idxmax() for column in ("sink", "kurtosis")}
        | {"seed": seed}
        for seed, one in steps.groupby("seed")
    ).set_index("seed")


def figure(runs: pd.DataFrame, training: pd.DataFrame, scan: pd.DataFrame, title: str) -> Figure:
    """Three panels: sinks against outliers, a dot a run; the way there, medians over seeds; what grows an outlier.

    Args:
        runs: from `table`, of methods that `plots.COLORS` knows.
        training: from `over_training`, of the same.
        scan: from `table`, one run a row, `method` says what was changed.
        title: above all of it.
    """
    fig, axs = plt.subplots(1, 3, figsize=(14, 4.6), width_ratios=(1, 1, 0.9), layout="constrained")
    runs, training, scan = (one.assign(excess=one["kurtosis"] - 1) for one in (runs, training, scan))
    style = {"x": "sink", "y": "excess", "hue": "method", "palette": plots.COLORS}
    sns.scatterplot(runs, ax=axs[0], s=55, **style)
    way = training.groupby(["method", "step"], sort=False)[["sink", "excess"]].median().reset_index()
    sns.lineplot(way, ax=axs[1], sort=False, estimator=None, marker=".", legend=False, **style)
    for ax, said in zip(axs, ("a dot is a run", "over training, medians over seeds"), strict=False):
        plots.log_scale(ax, "y")
        ax.set(xlim=(0, 1), xlabel="attention to <s> (probs)", ylabel="neuron kurtosis - 1 (resid_post)", title=said)
    scan = scan.sort_values("excess")
    points = axs[2].scatter(scan["excess"], scan["method"], c=scan["sink"], cmap="viridis", vmin=0, vmax=1, s=45)
    plots.log_scale(axs[2], "x")
    axs[2].set(xlabel="neuron kurtosis - 1", title="vanilla: what was changed, one seed")
    axs[2].tick_params(axis="y", labelsize=8)
    fig.colorbar(points, ax=axs[2], label="attention to <s>")
    handles, labels = axs[0].get_legend_handles_labels()
    axs[0].get_legend().remove()
    fig.legend(handles, labels, loc="outside lower left", ncols=len(labels))
    fig.suptitle(title, x=0, ha="left")
    return fig


def interventions() -> pd.DataFrame:
    """What is left of sink, outlier and loss under each intervention that is recorded.

    Returns:
        One row per run of `RUNS` and case (`nothing`, `outlier zeroed`, `median zeroed`, `<s> blocked`): `model`,
        `seed`, `case`, `loss` (nats), `sink` and `kurtosis` as `table` has them.
    """
    records = ((model, job.config.seed, train.store().find(*_entry(job))) for model, job in _looked_at())
    return pd.DataFrame(
        {"model": model, "seed": seed, "case": case} | found
        for model, seed, record in records
        if record
        for case, found in record["result"].items()
    )


def stays(found: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """What share of the sink stays without the outlier, and of kurtosis - 1 without `<s>`, for `reference.compare`.

    Args:
        found: from `interventions`.

    Returns:
        (sentence, one value for each seed), for each of `RUNS`.
    """
    asked = (("outlier zeroed", "sink", "attention to <s>"), ("<s> blocked", "kurtosis", "kurtosis - 1"))
    judged = []
    for model, rows in found.groupby("model", sort=False):
        for case, column, words in asked:
            own = rows.pivot(index="seed", columns="case", values=column) - (column == "kurtosis")
            text = f"laboratory, {model}: share of the {words} that stays with the {case}:"
            judged.append((text, own[case] / own["nothing"]))
    return judged


def _looked_at() -> list[tuple[str, sweep.Job]]:
    recipes = {model: (sweep.read_recipe(recipe, "small").jobs, method) for model, (recipe, method) in RUNS.items()}
    return [(model, job) for model, (jobs, method) in recipes.items() for job in jobs if job.method == method]


def _entry(job: sweep.Job) -> tuple[str, dict]:
    """Kind and key of the record of the interventions in a run."""
    return "interventions", {"run": differing(job.config)}


def _intervened(job: sweep.Job) -> dict:
    """The record of the interventions in a run; they are made where there is none."""
    if found := train.store().find(*_entry(job)):
        return found
    run = train.trained(job.config)
    tokens = train.load_tokens(job.config)
    rows = fixed_batches(tokens.validation, 8, 64, job.config.model.context)
    return train.store().write(*_entry(job), without(run.load(), rows), run.record["environment"])


def without(model: Transformer, rows: list[Tensor]) -> dict[str, dict]:
    """Case -> loss, sink and kurtosis.

    Zeroed is a dimension of the stream, from the embedding on (`embed_sum`, `resid_mid`, `resid_post`): the one with
    the largest root mean square where kurtosis is largest, or, as a control, the median one. Blocked is the key
    `<s>`, for all queries but its own: their scores are minus infinity, and the softmax goes to the other keys.
    """
    with probes.capture(model, "resid_post") as kept, torch.no_grad():
        model(rows[0])
    sizes = max((x.square().mean((0, 1)) for x in kept.values()), key=lambda s: s.square().mean() / s.mean().square())
    order = sizes.argsort().tolist()

    def zeroed(dimension):
        keep = (torch.arange(len(order)) != dimension).to(sizes)
        return {"patterns": _STREAM, "function": lambda x: x * keep}

    def blocked(scores):
        first = torch.zeros_like(scores[0, 0], dtype=torch.bool)  # (T, T)
        first[1:, 0] = True
        return scores.masked_fill(first, float("-inf"))

    edits = {"outlier zeroed": zeroed(order[-1]), "median zeroed": zeroed(order[len(order) // 2])}
    edits |= {"<s> blocked": {"patterns": "scores", "function": blocked}}
    found = {"nothing": _look(model, rows)}
    for case, one in edits.items():
        with probes.edit(model, **one):
            found[case] = _look(model, rows)
    return found


def _look(model: Transformer, rows: list[Tensor]) -> dict[str, float]:
    found = probes.measure(model, rows, ("resid_post", "probs"), clm_loss).summary()
    return {"loss": found["loss"]} | sink_and_kurtosis(found["sites"])


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    params.require(not arguments, f"no arguments are known, got {' '.join(arguments)}")
    records = [_intervened(job) for _, job in _looked_at()]
    shown = interventions().groupby(["model", "case"], sort=False)[["loss", "sink", "kurtosis"]].mean()
    print(shown.round(3).to_string())
    print("records written to", train.store().export(records, "laboratory_interventions.small"))


if __name__ == "__main__":
    params.main_guard(main)
