"""What the runs of 10_vit show: one row per run, what published models show, and the numbers behind the claims."""

from statistics import mean

import pandas as pd
import torch

from ofutils import families, hub, params, quant, reference, sweep, trajectories
from ofutils.probes import measure, run
from ofutils.studies.vit import sinks
from ofutils.transformer import Transformer

#: column of `table` -> what it is called in the figures
NUMBERS = {
    "accuracy": "accuracy",
    "W8A8 accuracy": "accuracy at W8A8",
    "inf norm": "max inf norm",
    "tensor kurtosis": "tensor kurtosis",
    "peak": "peak of neuron kurtosis - 1",
}
_METERS = ("neuron_kurtosis", "tensor_kurtosis", "inf_norm")


def table(outcomes: list[sweep.Outcome], found: list[dict]) -> pd.DataFrame:
    """One row per run.

    Args:
        outcomes: of the recipe, with one quantization setting.
        found: `sinks.examine` of them.

    Returns:
        method; seed; loss; `accuracy`; `W8A8 accuracy`; of `resid_post` at the end `inf norm`, the largest over
        blocks, and `tensor kurtosis`, their mean; `peak`, the largest neuron kurtosis less 1 over blocks (their
        inputs) and training; `outliers` in an image, the largest over blocks but the last; in that block their shares
        at the `class` token and at `plain` patches, with the share that is `plain patches`; `peak plain`,
        `attention`, `head attention` and `values` of `sinks.statistics`; `lost largest` and `lost random` of
        `sinks.carried`.
    """
    peaks = trajectories.peaks(outcomes, trajectories.layers(outcomes))["peak"]
    rows = []
    for outcome, sink, peak in zip(outcomes, found, peaks, strict=True):
        (rounded,) = outcome.accuracies.values()
        row = {"method": outcome.job.method, "seed": outcome.job.config.seed, "loss": outcome.measured["loss"]}
        row |= {"accuracy": outcome.measured["accuracy"], "W8A8 accuracy": rounded}
        row |= _sizes(outcome.measured["sites"]) | {"peak": peak} | _sunk(sink)
        lost = sink.get("lost", {})
        rows.append(row | {f"lost {one}": lost.get(one, float("nan")) for one in ("largest", "random")})
    return pd.DataFrame(rows)


def _sizes(sites: dict[str, dict]) -> dict[str, float]:
    found = [one for name, one in sites.items() if name.endswith(".resid_post")]
    kurtosis = mean(one["tensor_kurtosis"] for one in found)
    return {"inf norm": max(one["inf_norm"] for one in found), "tensor kurtosis": kurtosis}


def _sunk(sink: dict) -> dict[str, float]:
    blocks = sink["blocks"]
    counts = blocks["outliers"][:-1]
    where = counts.index(max(counts))
    found = {"outliers": counts[where], "class": blocks["class"][where], "plain": blocks["plain"][where]}
    found |= {"plain patches": sink["plain"], "peak plain": blocks["peak plain"][sink["block"]]}
    return found | {name: sink[name] for name in ("attention", "head attention", "values")}


def published(names: tuple[str, ...], source: str, count: int) -> tuple[pd.DataFrame, dict[str, tuple]]:
    """What published ViTs show on images that they were not made for, or on those of a file.

    Args:
        names: ids on the Hub.
        source: see `images.load`.
        count: how many images.

    Returns:
        A row per model: `inf norm`, `tensor kurtosis`, the columns of `sinks.statistics`, and `W8A8 agreement`, the
        share of images whose class stays; and by name statistics, pixels and how they are cut, for `figures.maps`.
    """
    rows, drawn = [], {}
    for name in names:
        model = families.from_hf(hub.model(name, head="image")).to(params.device())
        image, batches = model.config.image, sinks.pictures(source, model.config.image, count)
        sites = measure(model, batches, "resid_post", meters=_METERS).summary()["sites"]
        sink = sinks.statistics(model, batches, image)
        rows.append({"model": name, **_sizes(sites), **_sunk(sink), "W8A8 agreement": _agreement(model, batches)})
        drawn[name] = sink, batches[0]["pixel_values"], image
    columns = ["model", "inf norm", "tensor kurtosis", "outliers", "attention", "values", "W8A8 agreement"]
    return pd.DataFrame(rows, columns=None if rows else columns), drawn


def _agreement(model: Transformer, batches: list[dict]) -> float:
    """The share of images whose class W8A8 leaves, calibrated on the same images."""

    def classes():
        return torch.cat([run(model, batch).argmax(-1) for batch in batches])

    with torch.no_grad():
        exact, settings = classes(), quant.QuantSettings(weights="minmax")
        (rounded,) = quant.table(model, [settings], batches, classes)
    return float((exact == rounded).double().mean())


def claims(runs: pd.DataFrame, some: float, heavy: float) -> list[tuple[str, str, pd.Series, str, bool, str, str]]:
    """What is judged: id, sentence, one value per seed, the margin's parameter, ratio, why not testable, the paper's.

    Args:
        runs: from `table`, of the judged seeds.
        some: with fewer outliers in an image vanilla has none whose place could be told.
        heavy: below this tensor kurtosis vanilla has no outliers that could be removed.
    """
    of = runs.pivot(index="seed", columns="method")
    mine, accuracy = runs[runs["method"] == "vanilla"].set_index("seed"), of["accuracy"]
    few, tail = f"vanilla has {mine['outliers'].mean():.2g} outliers in an image", mine["tensor kurtosis"].mean()
    few = few if mine["outliers"].mean() < some else ""
    light = f"vanilla's tensor kurtosis is {tail:.3g}, there is nothing to remove" if tail < heavy else ""

    def over(column, above, below):
        return of[column][above] / of[column][below]

    background = mine["plain"] - mine["plain patches"]
    text = "at the patch with the largest entry"
    found = [
        ("vit-background", "vanilla: share of outliers at plain patches, less the share of such patches", background)
        + ("more", False, few, reference.NO_NUMBER),
        ("vit-attention", f"vanilla: attention received {text}, over that elsewhere", mine["attention"])
        + ("higher", True, few, reference.NO_NUMBER),
        (
            "vit-values",
            f"vanilla: values elsewhere over those {text}, in the head that looks there",
            1 / mine["values"],
        )
        + ("higher", True, few, reference.NO_NUMBER),
    ]
    for short, method, row in (
        ("clipped", "clipped softmax", "clipped softmax -0.003"),
        ("gated", "gated attention", "gated linear 0.5"),
    ):
        for name, column in (("norm", "inf norm"), ("kurtosis", "tensor kurtosis")):
            said = _quotient(7, _COLUMNS[column], "vanilla", row)
            text = f"vanilla's {column} over that with {method}"
            found.append((f"vit-{short}-{name}", text, over(column, "vanilla", method), "factor", True, light, said))
        change, said = accuracy[method] - accuracy["vanilla"], _points(row, "fp_acc", "vanilla", "fp_acc")
        found.append(
            (f"vit-{short}-accuracy", f"accuracy with {method} less vanilla's", change, "-cost", False, "", said)
        )
    plain, normed, zeta = "vanilla", "vanilla, patch norm", "zeta 1.004"
    damage, said = mine["accuracy"] - mine["W8A8 accuracy"], _points("vanilla", "fp_acc", "vanilla", "w8a8_acc")
    found += [
        ("vit-patch-norm", "vanilla's inf norm over that with a norm on the patches", over("inf norm", plain, normed))
        + ("factor", True, light, _quotient(7, "max_inf_norm", plain, "vanilla; patch norm")),
        ("vit-zeta", "inf norm with zeta 1.004 over vanilla's", over("inf norm", zeta, plain))
        + ("share", True, light, _quotient(8, "max_inf_norm", zeta, plain)),
        ("vit-w8a8", "what W8A8 takes from vanilla's accuracy", damage, "damage", False, "", said),
    ]
    lost, change = mine["lost largest"] - mine["lost random"], accuracy["OP"] - accuracy["vanilla"]
    text = "vanilla: accuracy lost without the two largest dimensions, less that without two others"
    none = reference.NO_NUMBER
    return [(f"bondarenko2023-{id}", *rest) for id, *rest in found] + [
        ("he2024-vit-op-peak", "vanilla's peak of kurtosis - 1 over OP's", over("peak", plain, "OP"))
        + ("factor", True, "", none),
        ("he2024-vit-op-accuracy", "OP's accuracy less vanilla's", change, "-cost", False, "", none),
        ("", "vanilla's peak of kurtosis - 1 over that with SOAP", over("peak", plain, "vanilla + SOAP"))
        + ("factor", True, "", none),
        ("puccetti2022-vit-ablation", text, lost, "damage", False, "", none),
    ]


_COLUMNS = {"inf norm": "max_inf_norm", "tensor kurtosis": "tensor_kurtosis"}


def _paper(row: str, column: str, table: int = 7) -> float:
    return reference.value("bondarenko2023", f"table {table} ViT-S/16", row, column)


def _quotient(table: int, column: str, above: str, below: str) -> str:
    return f"{_paper(above, column, table) / _paper(below, column, table):.3g} (Table {table})"


def _points(row: str, column: str, other: str, theirs: str) -> str:
    return f"{(_paper(row, column) - _paper(other, theirs)) / 100:.3g} (Table 7)"
