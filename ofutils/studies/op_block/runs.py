"""What the runs of 07_op_block show: tables, and the numbers by which he2024's claims are judged."""

import pandas as pd
import torch

from ofutils import data, probes, sweep
from ofutils.batches import fixed_batches
from ofutils.transformer import Transformer

#: The norms of he2024's Figure 2, and the forms of the OP block.
NORMS = ("Pre-LN", "Pre-RMSNorm", "Pre-SRMSNorm", "Post-LN")
BLOCKS = ("OP", "OP, final LN", "OP, tanh cap", "OP, no entropy regulation")
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
        method; seed; step; `block`, whose input (`resid_pre`) it is, or `out` for what leaves the last one
        (`resid_post`); COLUMNS, `kurtosis` less 1; `entropy`, of the block's attention (`probs`, nats; not of `out`).
    """
    rows = []
    for outcome in outcomes:
        for entry in outcome.run.log:
            entropy = {_block(site): one["attention_entropy"] for site, one in _of(entry, "probs")}
            for site, found in [*_of(entry, "resid_pre"), _of(entry, "resid_post")[-1]]:
                block = _block(site) if site.endswith("resid_pre") else "out"
                row = {"method": outcome.job.method, "seed": outcome.job.config.seed, "step": entry["step"]}
                row |= {"block": block} | {column: found[metric] for column, metric in COLUMNS.items()}
                rows.append(row | {"entropy": entropy.get(block, float("nan"))})
    return pd.DataFrame(rows).assign(kurtosis=lambda t: t["kurtosis"] - 1)


def _of(entry: dict, kind: str) -> list[tuple[str, dict]]:
    return [(site, found) for site, found in entry["sites"].items() if site.split(".")[-1] == kind]


def _block(site: str) -> str:
    return site.split(".")[1]


def at_start(outcomes: list[sweep.Outcome], tokens: data.Tokens) -> pd.Series:
    """The largest kurtosis less 1 over the blocks' inputs before the first step, by method and seed.

    Args:
        tokens: of the corpus that the runs were trained on.
    """
    found = {}
    for one in outcomes:
        config, context = one.job.config, one.job.config.model.context
        torch.manual_seed(config.seed)
        rows = fixed_batches(tokens.validation, 1, min(config.batch, len(tokens.validation) // context), context)
        sites = probes.measure(Transformer(config.model), rows, "resid_pre", meters=("neuron_kurtosis",)).sites
        found[one.job.method, config.seed] = max(s.summary()["neuron_kurtosis"] for s in sites.values()) - 1
    return pd.Series(found)


def table(outcomes: list[sweep.Outcome], steps: pd.DataFrame, start: pd.Series) -> pd.DataFrame:
    """One row per run.

    Args:
        outcomes: the runs.
        steps: their `layers`.
        start: from `at_start`.

    Returns:
        method; seed; `rate`; `loss` at the end (nats); `start`, `peak` and `end`: the largest kurtosis less 1 over
        blocks before training, over training and at its end; `peak at`, the share of the steps after which it peaks;
        `out`, the kurtosis less 1 of what leaves the last block at the end; the largest `correlation` and
        `max-median ratio` over blocks and training; `scale` of the block and step of the peak; and `entropy`, the
        least of a block's attention at the end (nats).
    """
    rows = []
    for one in outcomes:
        job = one.job
        own = steps[(steps["method"] == job.method) & (steps["seed"] == job.config.seed)]
        inner, last = own[own["block"] != "out"], own["step"].max()
        peak, end = inner.loc[inner["kurtosis"].idxmax()], own[own["step"] == last]
        row = {"method": job.method, "seed": job.config.seed, "rate": job.config.lr, "loss": one.measured["loss"]}
        row |= {"start": start[job.method, job.config.seed], "peak": peak["kurtosis"], "peak at": peak["step"] / last}
        row |= {
            "end": end[end["block"] != "out"]["kurtosis"].max(),
            "out": end[end["block"] == "out"]["kurtosis"].item(),
        }
        row |= {column: inner[column].max() for column in ("correlation", "max-median ratio")}
        rows.append(row | {"scale": peak["scale"], "entropy": end["entropy"].min()})
    return pd.DataFrame(rows)


def claims(
    runs: pd.DataFrame, steps: pd.DataFrame, slow: pd.DataFrame
) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged: id of the claim, sentence, one value for each seed, the parameter that holds its margin, ratio.

    Args:
        runs, steps: from `table` and `layers`.
        slow: from `table`, of the runs at the smaller learning rate.
    """
    of = runs.pivot(index="seed", columns="method")
    peak, loss, found = of["peak"], of["loss"], []

    def over(column, above, below):
        return of[column][above] / of[column][below]

    for method in NORMS:
        short = method.lower().replace("-", "")
        text = f"{method}: kurtosis - 1 (resid_pre) rises over training to its peak by a factor of"
        found.append((f"he2024-grows-{short}", text, peak[method] / of["start"][method], "rise", True))
    found += [
        (
            "he2024-gain-free",
            "Pre-SRMSNorm's peak over Pre-LN's",
            over("peak", "Pre-SRMSNorm", "Pre-LN"),
            "share",
            True,
        ),
        ("he2024-op-peak", "Pre-LN's peak over OP's", over("peak", "Pre-LN", "OP"), "factor", True),
        (
            "he2024-op-block-loss",
            "OP's loss lies below Pre-LN's by (nats)",
            loss["Pre-LN"] - loss["OP"],
            "-fp_cost",
            False,
        ),
        ("he2024-early", "Pre-LN's peak over its end", of["peak"]["Pre-LN"] / of["end"]["Pre-LN"], "falls", True),
        ("he2024-slow", "OP peaks after this share of the steps:", of["peak at"]["OP"], "late", False),
    ]
    gains = "Pre-LN, gains 0.1"
    fall = of["correlation"]["Pre-LN"] - of["correlation"][gains]
    cost = loss["Pre-LN"] - loss[gains]
    found += [
        (
            "he2024-gains-kurtosis",
            "Pre-LN's peak over that with gains of 0.1",
            over("peak", "Pre-LN", gains),
            "factor",
            True,
        ),
        (
            "he2024-gains-correlation",
            "gains of 0.1 lower the largest input correlation by",
            fall,
            "correlation_fall",
            False,
        ),
        ("he2024-gains-loss", "gains of 0.1: loss below Pre-LN's by (nats)", cost, "-fp_cost", False),
        (
            "he2024-final-norm",
            "kurtosis - 1 of what leaves the last block, OP with a final LN over OP",
            over("out", "OP, final LN", "OP"),
            "higher",
            True,
        ),
        (
            "he2024-tanh-peak",
            "Pre-LN's peak over that of OP with a tanh cap",
            over("peak", "Pre-LN", "OP, tanh cap"),
            "higher",
            True,
        ),
    ]
    rate = peak["Pre-LN"] / slow.pivot(index="seed", columns="method", values="peak")["Pre-LN"]
    found.append(("he2024-rate", "Pre-LN's peak over that at the smaller learning rate", rate, "factor", True))
    large = "Pre-LN, embedding x 50"
    text = "Pre-LN's peak over that with embeddings times 50"
    found.append(("", text, over("peak", "Pre-LN", large), "factor", True))
    bare, entropy = "OP, no entropy regulation", of["entropy"]
    found += [
        (
            "he2024-tanh-loss",
            "OP with a tanh cap loses against OP (nats)",
            loss["OP, tanh cap"] - loss["OP"],
            "slower",
            False,
        ),
        (
            "he2024-entropy",
            "attention entropy (probs) of OP less that without regulation (nats)",
            entropy["OP"] - entropy[bare],
            "entropy_gap",
            False,
        ),
        (
            "he2024-unregulated",
            "OP without entropy regulation loses against OP (nats)",
            loss[bare] - loss["OP"],
            "slower",
            False,
        ),
    ]
    inner = steps[steps["block"] != "out"]
    pre = inner[inner["method"] == "Pre-LN"].groupby("seed")[["kurtosis", "rms correlation"]]
    ranks = pre.apply(lambda t: t.corr(method="spearman").iloc[0, 1])
    found.append(
        (
            "he2024-signal",
            "Pre-LN: rank correlation of kurtosis and input correlation (RMS)",
            ranks,
            "rank_margin",
            False,
        )
    )
    same = inner.groupby("seed")[["kurtosis", "centred"]].apply(lambda t: t.corr(method="spearman").iloc[0, 1])
    found.append(
        ("he2024-centring", "rank correlation of kurtosis with and without centring", same, "rank_high", False)
    )
    for id, column, text, margin in (
        (
            "he2024-mmr",
            "max-median ratio",
            "over methods, rank correlation of peak and max-median ratio",
            "rank_margin",
        ),
        (
            "he2024-scale",
            "scale",
            "over methods, one half less the rank correlation of peak and activation scale",
            "rank_margin",
        ),
    ):
        order = runs.groupby("seed")[["peak", column]].apply(lambda t: t.corr(method="spearman").iloc[0, 1])
        found.append((id, text, 0.5 - order if column == "scale" else order, margin, False))
    return found
