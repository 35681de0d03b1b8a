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
        row, lost = _plain(outcome) | {"peak": peak} | _sunk(sink), sink.get("lost", {})
        rows.append(row | {f"lost {one}": lost.get(one, float("nan")) for one in ("largest", "random")})
    return pd.DataFrame(rows)


def _plain(outcome: sweep.Outcome) -> dict:
    (rounded,) = outcome.accuracies.values()
    row = {"method": outcome.job.method, "seed": outcome.job.config.seed, "loss": outcome.measured["loss"]}
    row |= {"accuracy": outcome.measured["accuracy"], "W8A8 accuracy": rounded}
    return row | _sizes(outcome.measured["sites"])


def beside(outcomes: list[sweep.Outcome]) -> pd.DataFrame:
    """The rows of bondarenko2023's Tables 7 and 8 in their order, the paper's and ours.

    Args:
        outcomes: of the recipe `10_vit_tables`, whose methods are those rows.

    Returns:
        table (7 or 8); row; `of` (`paper`, or a seed of ours); accuracy and W8A8 accuracy as shares; inf norm; tensor
        kurtosis, which Table 8 does not have. Rows that did not run have the paper's numbers alone.
    """
    ours = pd.DataFrame([_plain(one) for one in outcomes if not one.error]).sort_values("seed")
    ours["of"] = "seed " + ours["seed"].astype(str)
    parts = []
    for number in (7, 8):
        numbers = reference.table("bondarenko2023", f"table {number} ViT-S/16").astype({"value": float})
        numbers["value"] /= numbers["unit"].map({"percent": 100}).fillna(1)
        paper = numbers.pivot(index="row", columns="column", values="value").reindex(columns=_NUMBERS.values())
        for row in dict.fromkeys(numbers["row"]):
            theirs = pd.DataFrame([paper.loc[row].to_numpy()], columns=list(_NUMBERS)).assign(of="paper")
            both = pd.concat([theirs, ours[ours["method"] == _SAME.get(row, row)]])
            parts.append(both.assign(table=number, row=row)[["table", "row", "of", *_NUMBERS]])
    return pd.concat(parts, ignore_index=True)


_SAME = {"gamma -3e-3": "clipped softmax -0.003"}  # a row of Table 8 -> the method that it is


def _sizes(sites: dict[str, dict]) -> dict[str, float]:
    found = [one for name, one in sites.items() if name.endswith(".resid_post")]
    kurtosis = mean(one["tensor_kurtosis"] for one in found)
    return {"inf norm": max(one["inf_norm"] for one in found), "tensor kurtosis": kurtosis}


def _sunk(sink: dict) -> dict[str, float]:
    blocks, counts = sink["blocks"], sink["blocks"]["outliers"][:-1]
    where = counts.index(max(counts))
    found = {"outliers": counts[where], "class": blocks["class"][where], "plain": blocks["plain"][where]}
    found |= {"plain patches": sink["plain"], "peak plain": blocks["peak plain"][sink["block"]]}
    return found | {name: sink[name] for name in ("attention", "head attention", "values")}


def published(names: tuple[str, ...], source: str, count: int) -> tuple[pd.DataFrame, dict[str, tuple]]:
    """What published ViTs show on images that they were not made for, or on those of a file.

    Args:
        names: ids on the Hub; the last one, which is fine-tuned, has no classes of its own and is left out.
        source: see `images.load`.
        count: how many images.

    Returns:
        A row per model: `inf norm`, `tensor kurtosis`, the columns of `sinks.statistics`, and `W8A8 agreement`, the
        share of images whose class stays; and by name statistics, pixels and how they are cut, for `figures.maps`.
    """
    rows, drawn = [], {}
    for name in names[:-1]:
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


_RATIOS = "factor", "share", "higher"  # rules on quotients; others are on differences
_SITES = {"inf norm": "max_inf_norm", "tensor kurtosis": "tensor_kurtosis"}
_NUMBERS = {"accuracy": "fp_acc", "W8A8 accuracy": "w8a8_acc"} | _SITES  # our column -> the paper's


def claims(runs: pd.DataFrame, some: float, heavy: float) -> list[tuple[str, str, pd.Series, str, bool, str, str]]:
    """What is judged: id, sentence, one value per seed, the margin's parameter, ratio, why not testable, the paper's.

    Args:
        runs: from `table`, of the judged seeds.
        some: with fewer outliers in an image vanilla has none whose place could be told.
        heavy: below this tensor kurtosis vanilla has no outliers that could be removed.
    """
    of, found, v, ls = runs.pivot(index="seed", columns="method"), [], "vanilla", "LayerScale"
    mine, accuracy = runs[runs["method"] == v].set_index("seed"), of["accuracy"]
    few = f"vanilla has {mine['outliers'].mean():.2g} outliers in an image" if mine["outliers"].mean() < some else ""
    light = _light(mine["tensor kurtosis"].mean(), heavy)

    def judge(id, text, values, rule, said=reference.NO_NUMBER, why=""):
        found.append((id, text, values, rule, rule in _RATIOS, why, said))

    def over(column, above, below):
        return of[column][above] / of[column][below]

    own, text = "bondarenko2023-vit-", "at the patch with the largest entry"
    background = mine["plain"] - mine["plain patches"]
    said = "vanilla: share of outliers at plain patches, less the share of such patches"
    judge(f"{own}background", said, background, "more", why=few)
    said = f"vanilla: attention received {text}, over that elsewhere"
    judge(f"{own}attention", said, mine["attention"], "higher", why=few)
    said = f"vanilla: values elsewhere over those {text}, in the head that looks there"
    judge(f"{own}values", said, 1 / mine["values"], "higher", why=few)
    remedies = ("clipped softmax", "clipped softmax -0.003"), ("gated attention", "gated linear 0.5")
    for method, row in remedies:
        short = f"{own}{method.split()[0]}"
        for column, theirs in _SITES.items():
            id, text = f"{short}-{column.split()[-1]}", f"vanilla's {column} over that with {method}"
            judge(id, text, over(column, v, method), "factor", _quotient(7, theirs, v, row), light)
        change, said = accuracy[method] - accuracy[v], _points(row, "fp_acc", v, "fp_acc")
        judge(f"{short}-accuracy", f"accuracy with {method} less vanilla's", change, "-cost", said)
    norm, said = over("inf norm", v, "vanilla, patch norm"), _quotient(7, "max_inf_norm", v, "vanilla; patch norm")
    judge(f"{own}patch-norm", "vanilla's inf norm over that with a norm on the patches", norm, "factor", said, light)
    norm, said = over("inf norm", "zeta 1.004", v), _quotient(8, "max_inf_norm", "zeta 1.004", v)
    judge(f"{own}zeta", "inf norm with zeta 1.004 over vanilla's", norm, "share", said, light)
    lost, said = mine["accuracy"] - mine["W8A8 accuracy"], _points(v, "fp_acc", v, "w8a8_acc")
    judge(f"{own}w8a8", "what W8A8 takes from vanilla's accuracy", lost, "damage", said)
    judge("he2024-vit-op-peak", "vanilla's peak of kurtosis - 1 over OP's", over("peak", v, "OP"), "factor")
    for id, one, other in ("op-accuracy", "OP", v), ("layerscale-accuracy", ls, v), ("op-layerscale", "OP", ls):
        said = f"{(_vit(one) - _vit(other)) / 100:.2g} (text)"
        judge(f"he2024-vit-{id}", f"{one}'s accuracy less {other}'s", accuracy[one] - accuracy[other], "-cost", said)
    for one, other in (ls, "OP"), (v, "vanilla + SOAP"):
        judge("", f"{one}'s peak of kurtosis - 1 over that of {other}", over("peak", one, other), "factor")
    lost = mine["lost largest"] - mine["lost random"]
    text = "vanilla: accuracy lost without the two largest dimensions, less that without two others"
    judge("puccetti2022-vit-ablation", text, lost, "damage")
    return found


def claims_of_tables(rows: pd.DataFrame, heavy: float, damage: float) -> list[tuple]:
    """What Tables 7 and 8 say row by row, as in `claims`; the paper's numbers are computed as ours are.

    Args:
        rows: from `beside`.
        heavy: as in `claims`.
        damage: where W8A8 takes less accuracy than this from vanilla there is nothing to keep.
    """
    wide = {column: rows.pivot(index="of", columns=["table", "row"], values=column) for column in _NUMBERS}
    (fp7, low7, norm7, tails), (fp8, low8, norm8, _) = ([one[table] for one in wide.values()] for table in (7, 8))
    v, n, cs, ga = "vanilla", "vanilla; patch norm", "clipped softmax -0.003", "gated linear 0.5"
    mlp, three, large, at = "gated mlp n_hid 4", "gamma -3e-3", fp8["gamma -0.03"], "accuracy at W8A8"
    taken, light = (fp7[v] - low7[v]).drop("paper").mean(), _light(tails[v].drop("paper").mean(), heavy)
    whole = f"W8A8 takes {taken:.2g} of vanilla's accuracy, there is nothing to keep" if taken < damage else ""
    small, both, zeta = norm8["gamma -1e-5"], norm8["gamma -3e-3; zeta 1.003"], low8.filter(regex="^zeta").max(axis=1)
    other = norm8.filter(regex="^gamma [^;]*$").drop(columns=three).min(axis=1)
    worst = {one: fp7.filter(regex=f"^{one}.*; patch norm").min(axis=1) - fp7[n] for one in "cg"}
    best, least = low7.filter(regex="^[cg].*norm").max(axis=1), norm7.filter(regex="^[cg].*norm").min(axis=1)
    norm, add, found = "with a patch norm", "a remedy beside a patch norm", []
    lost = large.drop("paper").mean() < fp8[v].drop("paper").mean() / 4  # asked after the runs had been seen
    dead = "nothing is learned with it" if lost else ""
    judged = {  # id -> sentence, values, rule, why not testable
        "clipped-w8a8": (f"{at} with clipped softmax less vanilla's", low7[cs] - low7[v], "damage", whole),
        "gated-w8a8": (f"{at} with gated attention less vanilla's", low7[ga] - low7[v], "damage", whole),
        "patch-norm-w8a8": (f"{at} {norm} less vanilla's", low7[n] - low7[v], "damage", whole),
        "gate-mlp-norm": ("vanilla's inf norm over that with MLP gates", norm7[v] / norm7[mlp], "factor", light),
        "gate-mlp-accuracy": ("accuracy with MLP gates less vanilla's", fp7[mlp] - fp7[v], "-cost", ""),
        "patch-norm-kurtosis": (f"vanilla's kurtosis over that {norm}", tails[v] / tails[n], "factor", light),
        "patch-norm-accuracy": (f"accuracy {norm} less vanilla's", fp7[n] - fp7[v], "-cost", ""),
        "like-for-like-w8a8": (f"{at} {norm} less the best of {add}", low7[n] - best, "-cost", whole),
        "like-for-like-norm": (f"least inf norm of {add} over that of none", least / norm7[n], "share", light),
        "clipped-normed-accuracy": (f"least accuracy, clipped, {norm}, less unclipped", worst["c"], "-cost", ""),
        "gated-normed-accuracy": (f"least accuracy, gated, {norm}, less ungated", worst["g"], "-cost", ""),
        "zeta-w8a8": (f"vanilla's {at} less the best with zeta alone", low8[v] - zeta, "-cost", whole),
        "gamma-small": ("inf norm with gamma -1e-5 over vanilla's", small / norm8[v], "share", light),
        "gamma-best": ("least inf norm of other gammas over -3e-3's", other / norm8[three], "higher", light),
        "gamma-large": ("vanilla's accuracy less that at gamma -0.03", fp8[v] - large, "damage", dead),
        "gamma-zeta": ("inf norm at gamma -3e-3, zeta over no zeta", both / norm8[three], "share", light),
    }
    for id, (text, values, rule, why) in judged.items():
        said = f"{values['paper']:.3g} (Table {8 if id.startswith(('zeta', 'gamma')) else 7})"
        found.append((f"bondarenko2023-vit-{id}", text, values.drop("paper"), rule, rule in _RATIOS, why, said))
    return found


def _light(kurtosis: float, heavy: float) -> str:
    return f"vanilla's tensor kurtosis is {kurtosis:.3g}, there is nothing to remove" if kurtosis < heavy else ""


def _paper(row: str, column: str, table: int = 7) -> float:
    return reference.value("bondarenko2023", f"table {table} ViT-S/16", row, column)


def _vit(row: str) -> float:
    return reference.value("he2024", "figure 41 ViT-B", row, "accuracy")


def _quotient(table: int, column: str, above: str, below: str) -> str:
    return f"{_paper(above, column, table) / _paper(below, column, table):.3g} (Table {table})"


def _points(row: str, column: str, other: str, theirs: str) -> str:
    return f"{(_paper(row, column) - _paper(other, theirs)) / 100:.3g} (Table 7)"
