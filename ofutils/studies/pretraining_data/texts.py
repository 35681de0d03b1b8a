"""What trainings on texts with and without natural frequencies, order and separators measured over training."""

import numpy as np
import pandas as pd
import torch

from ofutils import heads, laboratory, sweep, train

#: What each kind of text (`ofutils.variants`) has of natural text.
PROPERTIES = {
    "natural": "all",
    "flattened": "order; frequent ids levelled",
    "evenly split": "order, frequencies; as many ids as flattened",
    "shuffled": "frequencies",
    "uniform": "nothing",
    "one separator": "all, and an id at the start of each row",
    "many separators": "all, and that id after each line",
}
LOWER = ", lower rate"  # how the methods at a third of the learning rate end


def described(jobs: list[sweep.Job]) -> pd.DataFrame:
    """One row per text, of the first seed.

    Returns:
        Indexed by method: learning rate; `has`, see PROPERTIES; of the training text `distinct ids`, `entropy`
        (bits), `share of ten`, how much of it are its ten most frequent ids; `unigram loss`; its first ids.
    """
    rows = {}
    for job in (job for job in jobs if job.config.seed == jobs[0].config.seed):
        tokens = train.load_tokens(job.config)
        counts = np.bincount(tokens.train, minlength=tokens.vocab)
        share = np.sort(counts[counts > 0])[::-1] / counts.sum()
        rows[job.method] = {
            "learning rate": job.config.lr,
            "has": PROPERTIES[job.config.variant],
            "distinct ids": len(share),
            "entropy (bits)": -(share * np.log2(share)).sum(),
            "share of ten": share[:10].sum(),
            "unigram loss": unigram_loss(job.config),
            "begins with": tokens.train[:6].tolist(),
        }
    return pd.DataFrame(rows).T.rename_axis("text").infer_objects()


def unigram_loss(config: train.TrainConfig) -> float:
    """The loss (nats) on held-out text of what knows the frequencies of the training text and nothing else."""
    tokens = train.load_tokens(config)
    known, held = (torch.from_numpy(part.astype(np.int64)) for part in (tokens.train, tokens.validation))
    return -float(heads.unigram(known, config.model.vocab)[held].mean())


def curves(outcomes: list[sweep.Outcome]) -> pd.DataFrame:
    """One row per run and checkpoint.

    Returns:
        text (the method), seed, rate, step, `loss` on held-out text of its own kind (nats); over the residual
        streams, the embedding's among them: `kurtosis - 1`, the mean of the neuron kurtosis less 1, and `highest
        kurtosis - 1`, the largest; `largest |x|`; and `beyond frequencies`, the loss less `unigram_loss`.
    """
    rows, known = [], {}
    for outcome in outcomes:
        config, method = outcome.job.config, outcome.job.method
        if config.variant not in known:
            known[config.variant] = unigram_loss(config)
        about = {"text": method, "seed": config.seed, "rate": config.lr}
        for at in outcome.trajectory:
            sites = pd.DataFrame(at["sites"]).T
            row = about | {
                "step": at["step"],
                "loss": at["loss"],
                "kurtosis - 1": sites["neuron_kurtosis"].mean() - 1,
            }
            row |= {"highest kurtosis - 1": sites["neuron_kurtosis"].max() - 1, "largest |x|": sites["max_abs"].max()}
            rows.append(row | {"beyond frequencies": at["loss"] - known[config.variant]})
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """One row per run: `peak` and `end` of the kurtosis - 1, `highest peak` and `highest end` of the highest one, and
    at the last checkpoint `largest` |x|, `loss` and `beyond` frequencies.

    Args:
        found: from `curves`.
    """
    runs = found.sort_values("step", kind="stable").groupby(["text", "seed", "rate"], sort=False)
    names = {"kurtosis - 1": "end", "highest kurtosis - 1": "highest end", "largest |x|": "largest"}
    last = runs.last().drop(columns="step").rename(columns=names | {"beyond frequencies": "beyond"})
    peaks = {"peak": runs["kurtosis - 1"].max(), "highest peak": runs["highest kurtosis - 1"].max()}
    return last.assign(**peaks).reset_index()


def laboratory_runs() -> pd.DataFrame:
    """The recorded runs of the laboratory's plain model, with triggers and without.

    Returns:
        text, seed, `highest peak` and `highest end`, of the kurtosis - 1 at `resid_post`, and `sink`, the attention
        to `<s>` at the end.
    """
    found = []
    for recipe, method, text in (
        ("laboratory_controls", "no trigger", "laboratory, no trigger"),
        ("laboratory", "vanilla", "laboratory"),
    ):
        runs = sweep.read_recipe(recipe, "small")
        ends, training = (
            one[one["method"] == method] for one in (laboratory.table(runs), laboratory.over_training(runs))
        )
        peak = training.groupby("seed")["kurtosis"].max() - 1
        own = ends.set_index("seed").assign(text=text, **{"highest peak": peak})
        own["highest end"] = own["kurtosis"] - 1
        found.append(own.reset_index()[["text", "seed", "highest peak", "highest end", "sink"]])
    return pd.concat(found, ignore_index=True)


def claims(runs: pd.DataFrame) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged: id of the claim, sentence, one value for each seed, the parameter that holds its margin, ratio.

    Args:
        runs: from `summary`.
    """
    peak = runs.pivot(index="seed", columns="text", values="peak")
    found = []
    for end in ("", LOWER):
        for one in ("evenly split", "natural"):
            text = f"peak of kurtosis - 1 (residual stream) over training: {one}{end} divided by flattened{end}"
            first = (one, end) == ("evenly split", "")
            id = "puccetti2022-frequency-drives" if first else ""
            found.append((id, text, peak[f"{one}{end}"] / peak[f"flattened{end}"], "factor", True))
    return found


#: Pairs of texts whose ratios are tabulated.
PAIRS = (
    ("evenly split", "flattened"),
    ("natural", "flattened"),
    (f"evenly split{LOWER}", f"flattened{LOWER}"),
    (f"natural{LOWER}", f"flattened{LOWER}"),
    ("evenly split", "natural"),
    (f"evenly split{LOWER}", f"natural{LOWER}"),
    ("shuffled", "natural"),
    ("uniform", "natural"),
    ("shuffled", "uniform"),
    ("one separator", "natural"),
    ("many separators", "natural"),
)
