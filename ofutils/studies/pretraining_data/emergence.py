"""When do outlier dimensions appear, and are those that three rules find the same ones?

Every dimension is followed through the checkpoints of a training, by three numbers:

    size       how far its root mean square lies above that of the others, at the output of a block
    weight     how far its gain or bias lies from that of the others, in LayerNorms
    frequency  how its magnitude goes with the frequency of the token

    python -m ofutils.studies.pretraining_data.emergence    follows those of scale small, and adds to figures/records
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ofutils import (
    UserError,
    batches,
    data,
    dims,
    families,
    frequency,
    hub,
    params,
    pool,
    probes,
    sources,
    sweep,
    train,
)
from ofutils.records import differing
from ofutils.sentences import sentence_batches
from ofutils.train import Published, TrainConfig
from ofutils.transformer import Transformer

MEASURES = ("size", "weight", "frequency")
_ROWS, _BATCH = 8, 16  # batches of held-out text, and rows of each
_SENTENCES = 1200  # of the text on which published checkpoints are measured
_END = ("neuron_kurtosis", "input_correlation_rms")  # means over blocks, at the last checkpoint
KEYS = ["text", "seed"]


@dataclass(frozen=True)
class Subject:
    """The checkpoints of one training: of ours on a text, or somebody else's."""

    text: str
    seed: int
    source: TrainConfig | Published
    read: tuple[str, str, str] | None = None  # the text on which published ones are measured, see `hub.text`

    @property
    def label(self) -> str:
        """For failures."""
        return f"{self.text}, seed {self.seed}"

    @property
    def key(self) -> dict:
        """What its record is found by."""
        return (
            {"published": vars(self.source)}
            if isinstance(self.source, Published)
            else {"run": differing(self.source)}
        )


def subjects(loads: sources.Sources, jobs: Sequence, last: int = 0) -> list[Subject]:
    """The published checkpoints that a notebook loads, else the runs of `jobs` at the learning rate of the first.

    Args:
        last: of the published ones, those up to this step; 0: all.
    """
    steps = tuple(step for step in loads.steps if step <= (last or step))
    published = [
        Subject("MultiBERTs", seed, Published(name, steps, None), loads.texts[0])
        for seed, name in enumerate(loads.models)
    ]
    return published or [
        Subject(job.method, job.config.seed, job.config) for job in jobs if job.config.lr == jobs[0].config.lr
    ]


def output_of(model: Transformer) -> str:
    """The site of a block's output."""
    return "norm2" if _post(model) else "resid_post"


def _post(model: Transformer) -> bool:
    return model.config.norm_position == "post"


@torch.no_grad()
def dimensions(model: Transformer, rows: Iterable[probes.Batch], counts: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The three numbers of every dimension of a model.

    With s_j the root mean square of dimension j at the output of a block (`norm2` in post-norm, as in puccetti2022,
    else `resid_post`): `size` is the distance of s_j from the mean over dimensions, in standard deviations, in the
    block where it is largest; `frequency` is Pearson's r of |x_j| with the count of the token, in that block;
    `weight` the mean over norms of the absolute distance of the gain, or the bias, from the mean over dimensions, in
    standard deviations, whichever of the two is larger. The norms are those of the rule of puccetti2022 (`norm2`) in
    a post-norm model, else all.

    Args:
        model: in evaluation mode.
        rows: batches.
        counts: (V,), occurrences of each id.
        kept: (V,) bool, the ids whose tokens count.

    Returns:
        MEASURES, (D,) float64 each. A number that cannot be told, of equal weights or of a frequency that does not
        vary, is 0.
    """
    norms = dims.norms(model, "norm2" if _post(model) else dims.ALL_NORMS).values()
    sums: dict[str, dict[str, Tensor]] = {}
    for batch in rows:
        ids, mask = probes.ids_and_mask(batch)
        real = mask & kept[ids]  # (B, T)
        x = counts[ids[real]].double()  # (N,)
        with probes.capture(model, output_of(model)) as found:
            probes.run(model, batch)
        for site, h in found.items():
            h = h.cpu()[real].abs().double()  # (N, D)
            parts = {"n": torch.tensor(len(x)), "x": x.sum(), "xx": x.square().sum()}
            parts |= {"h": h.sum(0), "hh": h.square().sum(0), "xh": x @ h}
            before = sums.setdefault(site, dict.fromkeys(parts, 0))
            sums[site] = {name: before[name] + part for name, part in parts.items()}
    size, r = (torch.stack(both) for both in zip(*map(_read, sums.values()), strict=True))  # (blocks, D)
    block = size.argmax(0, keepdim=True)
    kinds = [[getattr(norm, kind).double().cpu() for norm in norms] for kind in ("weight", "bias")]
    weight = [_distances(torch.stack(kind)).nan_to_num(0.0).abs().mean(0) for kind in kinds]  # (D,) each
    found = {"size": size.gather(0, block)[0], "weight": torch.maximum(*weight), "frequency": r.gather(0, block)[0]}
    return {name: values.nan_to_num(0.0, 0.0, 0.0) for name, values in found.items()}


def _distances(values: Tensor) -> Tensor:
    """From the mean over the last axis, in its standard deviations; nan where all are equal."""
    return (values - values.mean(-1, keepdim=True)) / values.std(-1, keepdim=True)


def _read(sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How far each root mean square stands out, and Pearson's r, (D,) both, from the sums of a site."""
    n, x, h = sums["n"], sums["x"], sums["h"]
    spread = (n * sums["xx"] - x * x).clamp(min=0) * (n * sums["hh"] - h * h).clamp(min=0)
    return _distances((sums["hh"] / n).sqrt()), (n * sums["xh"] - x * h) / spread.sqrt()


def _held_out(config: TrainConfig) -> tuple[list, Tensor, Tensor, str]:
    """What `dimensions` takes beside a model of ours, and the sha256 of the corpus."""
    tokens = train.load_tokens(config)
    kept = torch.ones(config.model.vocab, dtype=torch.bool)
    kept[list(tokens.special)] = False
    counts = torch.from_numpy(np.bincount(tokens.train, minlength=config.model.vocab))
    rows = batches.fixed_batches(tokens.validation, _ROWS, _BATCH, config.model.context)
    return rows, counts, kept, tokens.corpus


def _sentences(subject: Subject) -> tuple[list, Tensor, Tensor, str]:
    """The same for published checkpoints: paragraphs of a text; the authors' counts, or those of the text itself."""
    corpus, source = data.load_corpus(str(hub.text(*subject.read))), subject.source
    texts = [one.strip() for _, one in corpus.documents if len(one) > 70][:_SENTENCES]  # as puccetti2022 chooses rows
    tokenizer = hub.tokenizer(*sources.place(source.name, source.steps[0]))
    try:
        counts = frequency.shipped(tokenizer)["both"]
    except UserError:
        counts = frequency.count(tokenizer, texts)
    kept = frequency.kinds(tokenizer)["no specials"]
    return sentence_batches(tokenizer, texts, longest=128), counts, kept, corpus.sha256


def perform(subject: Subject, report: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Follow the dimensions of a subject and write the record; or recall it. Weights not here are trained."""
    if known := recall(subject):
        return known
    ours, found = isinstance(subject.source, TrainConfig), []
    rows, counts, kept, corpus = _held_out(subject.source) if ours else _sentences(subject)
    if ours:
        train.train(subject.source, keep=True, report=report)
    for step, model in train.checkpoints(subject.source):
        model = model if ours else families.from_hf(model).to(params.device())
        numbers = dimensions(model, rows, counts, kept)
        found.append({"step": step} | {name: _short(values) for name, values in numbers.items()})
    end = probes.measure(model, rows, output_of(model), meters=(*_END,)).summary()["sites"].values()
    result = {"rows": found, "end": {name: mean(site[name] for site in end) for name in _END}}
    return train.store().write("emergence", subject.key, result, params.environment() | {"corpus": corpus})


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def recall(subject: Subject) -> dict | None:
    """The record of a subject, or None."""
    return train.store().find("emergence", subject.key)


def known(subject: Subject) -> bool:
    """Whether it can be had without a training: published, or recorded."""
    return isinstance(subject.source, Published) or recall(subject) is not None


def table(chosen: list[Subject], workers: int | None = 0) -> pd.DataFrame:
    """One row per subject, checkpoint and dimension; what is missing is measured, see `perform`.

    Args:
        workers: see `pool.run`.

    Returns:
        text; seed; step; dimension; MEASURES.
    """
    sizes = [0 if recall(one) else 1 for one in chosen]
    rows = []
    for one, record in zip(chosen, pool.finish(perform, chosen, sizes, workers), strict=True):
        for at in record["result"]["rows"]:
            about = {"text": one.text, "seed": one.seed, "step": at["step"]}
            rows.append(pd.DataFrame({name: at[name] for name in MEASURES}).rename_axis("dimension").assign(**about))
    return pd.concat(rows).reset_index()[[*KEYS, "step", "dimension", *MEASURES]]


def ends(chosen: list[Subject]) -> pd.DataFrame:
    """One row per subject that is recorded, of its last checkpoint.

    Returns:
        text; seed; at the output of the blocks, means over them, `kurtosis - 1` (neuron), `correlation` (input, RMS).
    """
    records = [(one, recall(one)["result"]["end"]) for one in chosen]
    rows = [(one.text, one.seed, end["neuron_kurtosis"] - 1, end["input_correlation_rms"]) for one, end in records]
    return pd.DataFrame(rows, columns=[*KEYS, "kurtosis - 1", "correlation"])


def largest(found: pd.DataFrame, top: int) -> dict[tuple[str, int], list[int]]:
    """(text, seed) -> the `top` dimensions that are largest at the last checkpoint, the largest first."""
    last = found[found["step"] == found.groupby(KEYS)["step"].transform("max")]
    return {key: one.nlargest(top, "size")["dimension"].tolist() for key, one in last.groupby(KEYS, sort=False)}


def standings(found: pd.DataFrame, top: int) -> pd.DataFrame:
    """How those that are largest in the end stand among the others, over training.

    Args:
        found: from `table`.
        top: how many dimensions of each run, see `largest`.

    Returns:
        One row per run and checkpoint: text, seed, step, and for each of MEASURES the share of pairs of one of the
        `top` dimensions and one of the others in which the first has the larger number (equal ones count a half): 1
        where they are the same as the rule would find, 0.5 by chance.
    """
    chosen, rows = largest(found, top), []
    for (text, seed, step), one in found.groupby([*KEYS, "step"], sort=False):
        inside = one["dimension"].isin(chosen[text, seed]).to_numpy()
        row = {"text": text, "seed": seed, "step": step}
        for measure in MEASURES:
            own, other = one[measure].to_numpy()[inside, None], one[measure].to_numpy()[~inside]
            row[measure] = ((own > other) + 0.5 * (own == other)).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def appear(standing: pd.DataFrame, same: float) -> pd.DataFrame:
    """The first step from which on each standing is above `same`, or nan; indexed by (text, seed)."""
    found = {}
    for key, one in standing.sort_values("step").groupby(KEYS, sort=False):
        steps = one["step"].to_numpy()
        last_low = {measure: steps[one[measure].to_numpy() <= same] for measure in MEASURES}
        later = {measure: steps[steps > max(low, default=-1)] for measure, low in last_low.items()}
        found[key] = {measure: float(min(ones)) if len(ones) else np.nan for measure, ones in later.items()}
    return pd.DataFrame(found).T.rename_axis(KEYS)


def claims(standing: pd.DataFrame, end: pd.DataFrame, text: str) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged of the trainings on a text and, by the last one, of all texts, in the form of `texts.claims`.

    Args:
        standing: from `standings`.
        end: from `ends`, of one learning rate.
    """
    own = standing[standing["text"] == text]
    last = own[own["step"] == own["step"].max()].set_index("seed")
    said = f"{text}: the dimensions that are largest in the end stand above this share of the others in"
    by_seed = end.groupby("seed")[["kurtosis - 1", "correlation"]]
    ranks = by_seed.apply(lambda one: one.corr(method="spearman").iloc[0, 1])
    over = (
        "over texts, kurtosis and input correlation (RMS, output of the blocks) at the end have a rank correlation of"
    )
    return [
        ("puccetti2022-emergence-weights", f"{said} LayerNorm parameters:", last["weight"], "same", False),
        ("puccetti2022-emergence-frequency", f"{said} r with frequency:", last["frequency"], "same", False),
        ("he2024-data-correlation", over, ranks, "rank_margin", False),
    ]


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    params.require(not arguments, f"no arguments are known, got {' '.join(arguments)}")
    name, scale = "11_pretraining_data", "small"
    chosen = subjects(sources.read(name, scale), sweep.read_recipe(name, scale).jobs)
    table(chosen, None)
    print("records written to", train.store().export([*map(recall, chosen)], f"emergence.{scale}"))


if __name__ == "__main__":
    params.main_guard(main)
