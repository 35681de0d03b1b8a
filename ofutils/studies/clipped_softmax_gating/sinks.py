"""Where attention and outliers of trained models go: to separators, to ends of lines, to the start of a row.

python -m ofutils.studies.clipped_softmax_gating.sinks --scale small    looks at the models on text that have no
                                                                        record yet, and adds to figures/records;
                                                                        weights that are not here are trained
flags: --scale, --corpus, --workers
"""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from ofutils import data, metrics, params, pool, probes, sweep, train
from ofutils.batches import fixed_batches
from ofutils.records import differing
from ofutils.transformer import Transformer

#: What a token may be: an id of its own between texts or lines, the end of a line, the first of its row, another.
KINDS = ("separator", "line end", "first", "other")
#: The recipes whose models are looked at.
RECIPES = ("06_clipped_softmax_gating", "06_clipped_softmax_gating_bert")
_ROWS = 64


def kinds(ids: Tensor, tokens: data.Tokens) -> Tensor:
    """(B, T) int64, the place in KINDS of each token; a separator that is the first of its row is a separator.

    Args:
        ids: (B, T).
        tokens: of the run; its special ids are separators.
    """
    found = torch.full_like(ids, KINDS.index("other"))
    found[:, 0] = KINDS.index("first")
    ends = [
        one for one in range(tokens.tokenizer.get_vocab_size()) if "Ċ" in (tokens.tokenizer.id_to_token(one) or "")
    ]
    found[torch.isin(ids, torch.tensor(ends))] = KINDS.index("line end")
    found[torch.isin(ids, torch.tensor(tokens.special))] = KINDS.index("separator")
    return found


@torch.no_grad()
def look(model: Transformer, rows: Tensor, kind: Tensor) -> dict[str, dict[str, float]]:
    """Kind -> its share of the tokens, of the attention that a head gives, and of the outliers.

    Args:
        model: as trained.
        rows: (B, T) ids, as the model sees them.
        kind: (B, T), from `kinds`.

    Returns:
        For each of KINDS `tokens`, its share of all; `attention`, its share of what queries of the second half of a
        row give, in the head of all blocks where that is largest (what a head gives to nothing counts to no kind);
        and `outliers`, of the entries of `mlp_out` beyond six standard deviations (all blocks), NaN where there are
        none.

    Source: bondarenko2023, Figures 1 and 8.
    """
    with probes.capture(model, ("probs", "mlp_out")) as kept:
        model(rows)
    given = torch.stack([x for name, x in kept.items() if name.endswith("probs")])  # (L, B, H, T, T)
    given = given[..., rows.shape[1] // 2 :, :].mean(-2)  # (L, B, H, T): by key
    beyond = [metrics.six_sigma(x).sum(-1) for name, x in kept.items() if name.endswith("mlp_out")]  # (B, T) each
    outliers, found = torch.stack(beyond).sum(0).double(), {}
    for place, name in enumerate(KINDS):
        mine = (kind == place).double()
        attention = (given.double() * mine[:, None]).sum(-1).mean(1).max()
        found[name] = {"tokens": float(mine.mean()), "attention": float(attention)}
        found[name]["outliers"] = float((outliers * mine).sum() / outliers.sum())
    return found


def recall(job: sweep.Job) -> dict | None:
    """The record of a run, or None."""
    return train.store().find("sinks", {"run": differing(job.config)})


def perform(job: sweep.Job, report: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Look at the model of a run, and write the record; or recall it."""
    if known := recall(job):
        return known
    run = train.trained(job.config)
    tokens, context = train.load_tokens(job.config), job.config.model.context
    count = max(1, min(_ROWS, len(tokens.validation) // context))
    (plain,) = fixed_batches(tokens.validation, 1, count, context)
    (seen,) = fixed_batches(tokens.validation, 1, count, context, train.masks(job.config, tokens))
    model = run.load()
    rows = (seen if torch.is_tensor(seen) else seen["input_ids"]).to(next(model.parameters()).device)
    result = look(model, rows, kinds(plain, tokens).to(rows.device))
    report(1, 0.0)
    return train.store().write("sinks", {"run": differing(job.config)}, result, run.record["environment"])


def table(wanted: list[sweep.Job], scale: str, workers: int | None = 0) -> pd.DataFrame:
    """One row per run that did not diverge and kind; what has no record yet is looked at.

    Returns:
        objective; method; seed; `kind`; `tokens`, `attention`, `outliers`, see `look`.

    Raises:
        UserError: a record is missing at scale gpu or paper, where there is no GPU.
    """
    wanted = [job for job in wanted if not (run := train.find(job.config)) or not run.diverged]
    sweep.require_machine("06_clipped_softmax_gating", scale, wanted, recall)
    records = pool.finish(perform, wanted, [0 if recall(job) else 1 for job in wanted], workers)
    return pd.DataFrame(
        {"objective": job.config.objective, "method": job.method, "seed": job.config.seed, "kind": kind} | found
        for job, record in zip(wanted, records, strict=True)
        for kind, found in record["result"].items()
    )


@params.settings
class Command:
    """Flags of `python -m ofutils.studies.clipped_softmax_gating.sinks`."""

    scale: str = "auto"
    corpus: str = ""
    workers: int = -1  # -1: one per core


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    command = params.read(Command, arguments)
    scale, why = params.resolve_scale(command.scale)
    wanted = [job for name in RECIPES for job in sweep.read_recipe(name, scale, corpus=command.corpus).jobs]
    print(f"scale {scale} ({why}): {len(wanted)} runs")
    found = table(wanted, scale, None if command.workers < 0 else command.workers)
    shown = found.groupby(["objective", "method", "kind"], sort=False)[["tokens", "attention", "outliers"]]
    print(shown.mean().round(3).to_string())
    print("records written to", train.store().export([*filter(None, map(recall, wanted))], f"06_sinks.{scale}"))


if __name__ == "__main__":
    params.main_guard(main)
