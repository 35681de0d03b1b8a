"""What the runs of 07_op_block show: tables, and the numbers by which he2024's claims are judged."""

import pandas as pd
import torch

from ofutils import data, probes, sweep
from ofutils.batches import fixed_batches
from ofutils.transformer import Transformer

#: The norms of he2024's Figure 2, and the forms of the OP block.
NORMS = ("Pre-LN", "Pre-RMSNorm", "Pre-SRMSNorm", "Post-LN")
BLOCKS = ("OP", "OP, final LN", "OP, tanh cap", "OP, no entropy regulation")


def at_start(outcomes: list[sweep.Outcome], tokens: data.Tokens) -> pd.Series:
    """The largest kurtosis less 1 over the blocks' inputs before the first step, by method and seed.

    Args:
        outcomes: runs; those of one method and seed begin with the same weights, at whatever rate.
        tokens: of the corpus that the runs were trained on.
    """
    found = {}
    for one in {(one.job.method, one.job.config.seed): one for one in outcomes}.values():
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
        steps: their `trajectories.layers`.
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
        runs, steps: from `table` and `trajectories.layers`.
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


def form_claims(
    forms: pd.DataFrame, own: pd.DataFrame, toy: pd.DataFrame
) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged of forms between Pre-LN and OP, of each at its own rate, and in the laboratory; like `claims`.

    Args:
        forms: from `trajectories.peaks`, of the runs of 07_op_block_forms.
        own: likewise, of the runs of 07_op_block_own.
        toy: from `laboratory.table`, of the recipes laboratory and laboratory_optimizers.
    """
    peak, whole = forms.pivot(index="seed", columns="method", values="peak"), "norms before QK, V and MLP"
    found = [
        (
            f"he2024-{id}",
            f"{less}: its peak under that of {more}, by a factor of",
            peak[more] / peak[less],
            margin,
            True,
        )
        for id, more, less, margin in (
            ("positions-v", whole, "QK-norm, norm before V", "factor"),
            ("positions-qk", whole, "QK-norm, norm before QK", "factor"),
            ("positions-op", whole, "QK-norm alone (OP)", "factor"),
            ("fixed-gains", "gains fixed at 0.3", "gains fixed at 0.1", "higher"),
            ("leaky", "slope 0.2", "slope 0.8", "higher"),
            ("value-gain", "value gain 1", "value gain 0.1", "higher"),
        )
    ]
    best, here = own.pivot(index="seed", columns="method"), "each at its own rate"
    lower, saved = best["peak"]["Pre-LN"] / best["peak"]["OP"], best["loss"]["Pre-LN"] - best["loss"]["OP"]
    excess = toy.pivot(index="seed", columns="method", values="kurtosis") - 1
    free = excess["Pre-SRMSNorm"] / excess["vanilla"]
    return [
        *found,
        ("he2024-op-own-peak", f"Pre-LN's peak over OP's, {here}", lower, "factor", True),
        ("he2024-op-own-loss", f"OP's loss lies below Pre-LN's, {here}, by (nats)", saved, "-fp_cost", False),
        ("he2024-lab-gain-free", "laboratory: SRMSNorm's kurtosis - 1 over LayerNorm's", free, "share", True),
    ]
