"""The laboratory's trained models, without their outlier or with the way to `<s>` closed: does one need the other?

python -m ofutils.studies.attention_sinks.interventions    what no record is there of is measured, and added to
                                                           figures/records; weights that are not here are trained
"""

import pandas as pd
import torch
from torch import Tensor

from ofutils import laboratory, params, probes, sweep, train
from ofutils.batches import fixed_batches
from ofutils.records import differing
from ofutils.transformer import Transformer, clm_loss

#: The runs that are intervened in: recipe and method. In one layer nothing that a block writes reaches its attention.
RUNS = {
    "1 layer": ("laboratory", "vanilla"),
    "2 layers": ("laboratory_deep", "2 layers"),
    "3 layers": ("laboratory_deep", "3 layers"),
}
_STREAM = ("embed_sum", "resid_mid", "resid_post")


def table(runs: dict[str, tuple[str, str]] | None = None, make: bool = False) -> tuple[pd.DataFrame, list[dict]]:
    """What is left of sink, outlier and loss under each intervention.

    Args:
        runs: label -> recipe and method, at scale small; by default `RUNS`.
        make: whether what has no record is measured; else it is left out.

    Returns:
        One row per run and case (`nothing`, `outlier zeroed`, `median zeroed`, `<s> blocked`): `model`, `seed`,
        `case`, `loss` (nats), `sink` and `kurtosis` as `laboratory.table` has them. And the records.
    """
    rows, records = [], []
    for label, (recipe, method) in (runs or RUNS).items():
        for job in sweep.read_recipe(recipe, "small").jobs:
            if job.method == method and (record := recorded(job, make)):
                about = {"model": label, "seed": job.config.seed}
                rows += [about | {"case": case} | found for case, found in record["result"].items()]
                records.append(record)
    return pd.DataFrame(rows), records


def recorded(job: sweep.Job, make: bool) -> dict | None:
    """The record of the interventions in a run; measured where there is none and `make` is set."""
    key = {"run": differing(job.config)}
    if (found := train.store().find("interventions", key)) or not make:
        return found
    run = train.train(job.config)
    run = run if run.has_weights else train.train(job.config, again=True)
    tokens = train.load_tokens(job.config)
    rows = fixed_batches(tokens.validation, 8, 64, job.config.model.context)
    return train.store().write("interventions", key, measured(run.load(), rows), run.record["environment"])


def measured(model: Transformer, rows: list[Tensor]) -> dict[str, dict]:
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
    return {"loss": found["loss"]} | laboratory.sink_and_kurtosis(found["sites"])


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    params.require(not arguments, f"no arguments are known, got {' '.join(arguments)}")
    found, records = table(make=True)
    print(found.groupby(["model", "case"], sort=False)[["loss", "sink", "kurtosis"]].mean().round(3).to_string())
    print("records written to", train.store().export(records, "laboratory_interventions.small"))


if __name__ == "__main__":
    params.main_guard(main)
