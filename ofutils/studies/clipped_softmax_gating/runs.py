"""What the runs of 06_clipped_softmax_gating show: tables, and the numbers by which claims are judged."""

from dataclasses import asdict, dataclass

import pandas as pd

from ofutils import laboratory, params, sweep
from ofutils.metrics import READ_AT

#: The columns of `one_table`, and what they are called.
QUANTITIES = {
    "sink": "does the sink go?\nlargest attention to one kind of token",
    "norm": "does the outlier go?\nmax inf norm",
    "above": "what does it cost?\nloss above vanilla's, nats",
    "saved": "what does it save?\nshare of vanilla's {} cost",
}
#: Where a run stands -> the bits at which it is asked what a method saves.
PLACES = {"laboratory": "W6A6", "OPT, text": "W8A8", "BERT, text": "W8A8 min-max"}


def table(outcomes: list[sweep.Outcome]) -> pd.DataFrame:
    """One row per run on text that did not diverge.

    Returns:
        method; seed; `loss` in full precision (nats); `norm`, the max inf norm, the largest over blocks, and
        `kurtosis`, the tensor kurtosis, the mean over sites, both at `metrics.READ_AT`; and for each setting of
        quantization its label, with what rounding adds to the loss.
    """
    rows = []
    for one in outcomes:
        if one.error:
            continue
        at, over = READ_AT[one.job.config.objective]
        sites, loss = one.measured["sites"], one.measured["loss"]
        of = {name: found for name, found in sites.items() if name.split(".")[-1] in over}
        row = {"method": one.job.method, "seed": one.job.config.seed, "loss": loss}
        row |= {"norm": max(found["inf_norm"] for name, found in of.items() if name.split(".")[-1] == at)}
        row |= {"kurtosis": sum(found["tensor_kurtosis"] for found in of.values()) / len(of)}
        rows.append(row | {label: rounded - loss for label, rounded in one.quantized.items()})
    return pd.DataFrame(rows)


def over_training(outcomes: list[sweep.Outcome]) -> pd.DataFrame:
    """One row per measurement during BERT-like runs.

    Returns:
        method; seed; step; `loss` (nats); `norm` and `kurtosis` (max inf norm and tensor kurtosis) of `mlp_out`, the
        largest over blocks.
    """
    rows = []
    for one in outcomes:
        for entry in one.run.log:
            found = [values for site, values in entry["sites"].items() if site.endswith("mlp_out")]
            row = {
                "method": one.job.method,
                "seed": one.job.config.seed,
                "step": entry["step"],
                "loss": entry["loss"],
            }
            row |= {"norm": max(values["inf_norm"] for values in found)}
            rows.append(row | {"kurtosis": max(values["tensor_kurtosis"] for values in found)})
    return pd.DataFrame(rows)


def in_the_laboratory(recipe: sweep.Recipe) -> pd.DataFrame:
    """The same of a recipe of the laboratory, whose `loss` is above that of the true predictor; and `sink`."""
    found = laboratory.table(recipe)
    params.require(len(found) > 0, f"no run is recorded: python -m ofutils.sweep {recipe.name} --scale small")
    return found.rename(columns={"above bound": "loss", "max inf norm": "norm"})


def grid(recipe: sweep.Recipe) -> pd.DataFrame:
    """`in_the_laboratory`, and what each method sets.

    Returns:
        More columns: `gamma`; `zeta`; `alpha`; `row_aware`; `context`; `pi`, NaN where there is no gate.
    """
    models = {job.method: job.config.model for job in recipe.jobs}
    rows = {method: asdict(one.attention) | {"context": one.context} for method, one in models.items()}
    own = pd.DataFrame.from_dict(rows, orient="index")
    own = own.assign(pi=own["pi_init"].where(own["gate"] != "none"))
    own = own[["gamma", "zeta", "alpha", "row_aware", "context", "pi"]]
    return in_the_laboratory(recipe).merge(own, left_on="method", right_index=True)


def one_table(places: dict[str, pd.DataFrame], sinks: pd.DataFrame) -> pd.DataFrame:
    """What each method does to sink, outlier, loss and rounding, beside vanilla of the same seed.

    Args:
        places: key of PLACES -> from `table` or `in_the_laboratory`.
        sinks: from `sinks.table`, for text; the laboratory's tables bring their own.

    Returns:
        place; method; seed; the columns of QUANTITIES, `saved` at the bits of PLACES.
    """
    most = sinks[sinks["kind"] != "other"].groupby(["objective", "method", "seed"])["attention"].max()
    rows = []
    for place, runs in places.items():
        vanilla = runs[runs["method"] == "vanilla"].set_index("seed")
        for own in runs.to_dict("records"):
            other, bits = vanilla.loc[own["seed"]], PLACES[place]
            objective = "mlm" if place.startswith("BERT") else "clm"
            sink = own["sink"] if "sink" in own else most.get((objective, own["method"], own["seed"]))
            row = {"place": place, "method": own["method"], "seed": own["seed"], "sink": sink, "norm": own["norm"]}
            rows.append(row | {"above": own["loss"] - other["loss"], "saved": 1 - own[bits] / other[bits]})
    return pd.DataFrame(rows).astype(dict.fromkeys(QUANTITIES, float))


@dataclass(frozen=True)
class Asked:
    """What is judged: id of the claim (or nothing), sentence, one value a seed, the parameter with its margin."""

    id: str
    text: str
    values: pd.Series
    rule: str
    ratio: bool = False
    untestable: str = ""


def bert_claims(runs: pd.DataFrame, visible: float, outlier: float) -> list[Asked]:
    """Of the BERT-like models.

    Args:
        runs: from `table`.
        visible: the least cost of rounding vanilla, in nats, at which savings are judged.
        outlier: the least kurtosis of vanilla at which it is judged whether outliers go.
    """
    of, none, found = runs.pivot(index="seed", columns="method"), _none(runs, outlier), []

    def saves(id, method, bits):
        cost = of[bits]["vanilla"]
        why = "" if cost.mean() >= visible else f"vanilla loses less than {visible:g} nats at {bits}"
        text = f"BERT: share of vanilla's {bits} cost that {method} saves:"
        found.append(Asked(id, text, 1 - of[bits][method] / cost, "share_kept", untestable=why))

    for short, method in (("clipped", "clipped softmax"), ("gated", "gated attention"), ("mlp", "gate, MLP")):
        start = f"bondarenko2023-bert-{short}"
        for column, said in (("norm", "max inf norm (mlp_out)"), ("kurtosis", "kurtosis (mlp_out, norm2)")):
            text, ratio = f"BERT: {method} divides vanilla's {said} by", of[column]["vanilla"] / of[column][method]
            found.append(Asked(f"{start}-{column}", text, ratio, "factor", True, none))
        gain = of["loss"]["vanilla"] - of["loss"][method]
        found.append(Asked(f"{start}-fp", f"BERT: {method} lowers the loss (nats) by", gain, "-fp_cost"))
        saves(f"{start}-w8a8", method, PLACES["BERT, text"])
    less, text = (
        of["norm"]["clipped softmax, alpha 0.64"] / of["norm"]["clipped softmax"],
        "alpha 0.64 over that at 3.2",
    )
    found.append(Asked("bondarenko2023-bert-gamma", f"BERT: max inf norm at {text}", less, "factor", True, none))
    cost, ranges = of["W6A8 min-max"]["vanilla"], of["W6A8 min-max"]["vanilla"] / of["W6A8"]["vanilla"]
    why = "" if cost.mean() >= visible else f"vanilla loses less than {visible:g} nats at W6A8"
    text = "BERT: vanilla's W6A8 cost with min-max ranges of weights over that with MSE ranges"
    found.append(Asked("bondarenko2023-bert-mse", text, ranges, "higher", True, why))
    saves("bondarenko2023-bert-clipped-w6a6", "clipped softmax", "W6A6")
    saves("bondarenko2023-bert-gated-w6a6", "gate, MLP", "W6A6")
    return found


def _none(runs: pd.DataFrame, outlier: float) -> str:
    kurtosis = runs[runs["method"] == "vanilla"]["kurtosis"].mean()
    return "" if kurtosis >= outlier else f"vanilla has no outliers, its kurtosis is {kurtosis:.0f}"


def opt_claims(runs: pd.DataFrame, outlier: float) -> list[Asked]:
    """Of the OPT-like models on text: gates that read all heads, and whether clipping by row mends clipping.

    Args:
        runs: from `table`.
        outlier: as in `bert_claims`.
    """
    of, start, wide = runs.pivot(index="seed", columns="method"), "bondarenko2023-gate-all-heads", "gate, all heads"
    loss, less, text = of["loss"], of["norm"]["vanilla"] / of["norm"][wide], f"OPT: {wide}, "
    rows, none = loss["clipped softmax"] - loss["row-aware clipped softmax"], _none(runs, outlier)
    return [
        Asked(f"{start}-norm", f"{text}divides vanilla's max inf norm (resid_post) by", less, "factor", True, none),
        Asked(f"{start}-fp", f"{text}lowers the loss (nats) by", loss["vanilla"] - loss[wide], "-fp_cost"),
        Asked("", "OPT: clipping by row lowers the loss of clipped softmax (nats) by", rows, "gain"),
    ]


def laboratory_claims(runs: pd.DataFrame, grids: pd.DataFrame) -> list[Asked]:
    """Of the laboratory: what ranges of gamma, zeta, alpha and pi do; and what the later ways to idle do.

    Args:
        runs: from `in_the_laboratory`, of `laboratory` and `laboratory_idle`.
        grids: from `grid`, of `laboratory_clipping`.
    """
    of, start = grids.pivot(index="seed", columns="method"), "bondarenko2023-lab"
    norm, loss = of["norm"], of["loss"]
    less = {
        id: norm["alpha 0, T 64"] / norm[method]
        for id, method in (
            ("zeta", "gamma 0, zeta 1.03"),
            ("gamma-small", "gamma -0.003, zeta 1"),
            ("gamma", "gamma -0.03, zeta 1"),
        )
    }
    text, found = "laboratory: the smaller over the larger max inf norm of vanilla and of", []
    for id, said in (("zeta", "zeta 1.03"), ("gamma-small", "gamma -0.003")):
        alike = less[id].where(less[id] < 1, 1 / less[id])
        found.append(Asked(f"{start}-{id}", f"{text} {said}:", alike, "alike", True))
    text = "laboratory: gamma -0.03 divides vanilla's max inf norm by"
    found.append(Asked(f"{start}-gamma", text, less["gamma"], "factor", True))
    lengths = sorted(grids["context"].unique())
    alphas = [(f"alpha {alpha}, T {length}", f"alpha 0, T {length}") for alpha in (2, 4) for length in lengths]
    gates = [(f"pi {pi}", "alpha 0, T 64") for pi in (0.25, 0.5, 0.9)]
    for id, pairs, words in (
        ("alpha", alphas, "alpha 2 to 4, the least over lengths of rows,"),
        ("bias", gates, "gates, the least over pi 0.25 to 0.9,"),
    ):
        norms = pd.concat([norm[without] / norm[own] for own, without in pairs], axis=1).min(axis=1)
        gains = pd.concat([loss[without] - loss[own] for own, without in pairs], axis=1).min(axis=1)
        text = f"laboratory: {words}"
        found.append(Asked(f"{start}-{id}-norm", f"{text} divides vanilla's max inf norm by", norms, "factor", True))
        found.append(Asked(f"{start}-{id}-fp", f"{text} lowers the loss (nats) by", gains, "-fp_cost"))
    later = runs.pivot(index="seed", columns="method")
    for method in ("row-aware clipped softmax", "softmax off by one", "sink logit", "sigmoid"):
        for column, words in (("sink", "attention to <s>"), ("norm", "max inf norm")):
            text, own = f"laboratory: {method} divides vanilla's {words} by", later[column]
            found.append(Asked("", text, (own["vanilla"] / own[method]).dropna(), "factor", True))
    return found
