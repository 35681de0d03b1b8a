"""The runs of 03_quant as tables, and the papers' claims on them."""

from dataclasses import replace

import numpy as np
import pandas as pd

from ofutils import laboratory, reference
from ofutils.metrics import READ_AT
from ofutils.sweep import Outcome

_B, _T3, _T6 = "bondarenko2023", "table 3 OPT-350m", "table 6 OPT-125m"
_T9, _T10, _HE = "table 9 OPT-1.3B fine-tuned", "table 10 BERT-base", ("he2024", "table 2 OPT-125m")
#: A method of ours -> paper, item and row that are like it.
ROWS = {
    "vanilla": (_B, _T6, "vanilla; norm gain decay no"),
    "gated attention": (_B, _T6, "gated linear 0.25; norm gain decay no"),
    "vanilla, gains decayed": (_B, _T6, "vanilla; norm gain decay yes"),
    "clipped softmax, gains decayed": (_B, _T6, "clipped softmax alpha 4; norm gain decay yes"),
    "gated attention, gains decayed": (_B, _T6, "gated linear 0.25; norm gain decay yes"),
    "vanilla, larger": (_B, _T3, "vanilla"),
    "gated attention, larger": (_B, _T3, "gated attention"),
}
_VANILLA, _GATED, _DECAYED, _CLIPPED, _DECAYED_GATED, _LARGER, _LARGER_GATED = ROWS
_GATES = {"gate, pi 0.1": "linear 0.1", "gate, pi 0.5": "linear 0.5", "gate, all heads": "all heads"}
for _alpha in (1, 2, 8, 12):
    _row = f"clipped softmax alpha {_alpha}; norm gain decay yes"
    ROWS[f"clipped softmax, alpha {_alpha}, gains decayed"] = (_B, _T6, _row)
for _gate, _row in _GATES.items():
    ROWS[_gate] = (_B, _T6, f"gated {_row}; norm gain decay no")
    ROWS[f"{_gate}, gains decayed"] = (_B, _T6, f"gated {_row}; norm gain decay yes")
# a remedy of `of_methods` -> its row, and the vanilla row that is like it
_LIKE = {_GATED: (ROWS[_GATED], ROWS[_VANILLA]), "clipped softmax": (ROWS[_CLIPPED], ROWS[_DECAYED])}
_LIKE |= {"OP + SOAP": ((*_HE, "OP + SOAP"), (*_HE, "vanilla"))}
_IDS = {"clipped softmax": f"{_B}-clipped", _GATED: f"{_B}-gated"}
_IDS |= {"OP": "he2024-op", "vanilla + SOAP": "he2024-soap", "OP + SOAP": "he2024-op-soap"}
_COLUMNS = {"max inf norm": "max_inf_norm", "tensor kurtosis": "tensor_kurtosis", "loss": "fp_ppl"}
_COLUMNS |= {"excess": "neuron_kurtosis", "W8A8": "w8a8_ppl", "W6A8 min-max": "w6a8_minmax_ppl"}
_COLUMNS |= {bits: f"{bits.lower()}_mse_ppl" for bits in ("W6A8", "W4A8", "W6A6")}
_FORMULAS = {  # of a number and that which it is compared with
    "divide": lambda own, other: other / own,
    "multiply": lambda own, other: own / other,
    "save": lambda own, other: 1 - own / other,
    "lower": lambda own, other: other - own,
    "minus": lambda own, other: -own,
}
_SAME, _TWICE, _CUT = "norm gains decayed: ", "twice the width: ", "gated attention divides vanilla's"
_SHARE, _FP = "share of vanilla's {} cost that gated attention saves:", "gated attention lowers the loss (nats) by"
_D, _NORM, _KURTOSIS, _COSTS = _DECAYED, "max inf norm", "tensor kurtosis", "costs vanilla more than"
# id; sentence; formula; columns and methods of a number and of that which it is compared with; parameter; item
_SAID = [
    ("decay-norm", f"weight decay on norm gains divides vanilla's {_NORM} (resid_post) by", "divide")
    + (_NORM, _D, _NORM, _VANILLA, "factor", _T6),
    ("decay-w8a8", "weight decay on norm gains multiplies what W8A8 costs vanilla by", "multiply")
    + ("W8A8", _D, "W8A8", _VANILLA, "higher", _T6),
    ("decay-clipped-w8a8", f"{_SAME}W8A8 costs clipped softmax, in multiples of vanilla's cost,", "multiply")
    + ("W8A8", _CLIPPED, "W8A8", _D, "share_left", _T6),
    ("decay-clipped-kurtosis", f"{_SAME}clipped softmax multiplies vanilla's {_KURTOSIS} by", "multiply")
    + (_KURTOSIS, _CLIPPED, _KURTOSIS, _D, "higher", _T6),
    ("decay-gated-norm", f"{_SAME}{_CUT} {_NORM} (resid_post) by", "divide")
    + (_NORM, _DECAYED_GATED, _NORM, _D, "factor", _T6),
    ("decay-gated-kurtosis", f"{_SAME}{_CUT} {_KURTOSIS} by", "divide")
    + (_KURTOSIS, _DECAYED_GATED, _KURTOSIS, _D, "factor", _T6),
    ("decay-gated-fp", _SAME + _FP, "lower", "loss", _DECAYED_GATED, "loss", _D, "-fp_cost", _T6),
    ("gated-near-fp", f"{_SAME}W8A8 lowers the loss of gated attention (nats) by", "minus")
    + ("W8A8", _DECAYED_GATED, "W8A8", _D, "-near", _T6),
    ("mse-w6a8", f"{_SAME}W6A8 with min-max ranges of weights {_COSTS} with MSE ranges, by a factor of", "divide")
    + ("W6A8", _D, "W6A8 min-max", _D, "higher", _T10),
    ("activations-before-weights", f"{_SAME}W6A6 {_COSTS} W4A8, by a factor of", "multiply")
    + ("W6A6", _D, "W4A8", _D, "higher", _T10),
    ("larger-gated-norm", f"{_TWICE}{_CUT} {_NORM} (resid_post) by", "divide")
    + (_NORM, _LARGER_GATED, _NORM, _LARGER, "factor", _T3),
    ("larger-gated-w8a8", _TWICE + _SHARE.format("W8A8"), "save")
    + ("W8A8", _LARGER_GATED, "W8A8", _LARGER, "share_kept", _T3),
    ("larger-gated-fp", _TWICE + _FP, "lower", "loss", _LARGER_GATED, "loss", _LARGER, "-fp_cost", _T3),
]
for _bits, _item in (("W8A8", _T6), ("W6A6", _T10), ("W4A8", _T10)):
    _said = f"decay-gated-{_bits.lower()}", _SAME + _SHARE.format(_bits), "save"
    _SAID.append((*_said, _bits, _DECAYED_GATED, _bits, _D, "share_kept", _item))
#: id of a claim or nothing; sentence; a value for each seed; the parameter that holds the margin, with a minus where
#: a loss is allowed; the paper's number; why it cannot be judged, if so; whether the values are ratios.
Judged = tuple[str, str, pd.Series, str, str, str, bool]


def values(measured: dict, sites: tuple[str, ...], metric: str) -> list[float]:
    """A metric at every site of these kinds, of what `probes.measure` found (`sweep.Outcome.measured`)."""
    return [found[metric] for site, found in measured["sites"].items() if site.split(".")[-1] in sites]


def about(method: str, seed: int, measured: dict, objective: str = "clm") -> dict:
    """Of a model, from what was measured on it: method; seed; loss (nats); max inf norm, the largest over blocks,
    and tensor kurtosis, the mean over sites, both at `metrics.READ_AT`; neuron kurtosis, the mean over blocks
    (`resid_pre`; NaN where it was not measured)."""
    at, over = READ_AT[objective]
    return {
        "method": method,
        "seed": seed,
        "loss": measured["loss"],
        _NORM: max(values(measured, (at,), "inf_norm")),
        _KURTOSIS: np.mean(values(measured, over, "tensor_kurtosis")),
        "neuron kurtosis": np.mean(values(measured, ("resid_pre",), "neuron_kurtosis") or [np.nan]),
    }


def table(outcomes: list[Outcome]) -> pd.DataFrame:
    """One row per run: `about` it, and for each label of settings what rounding adds to the loss (nats)."""
    return pd.DataFrame([_about(o) | {b: x - o.measured["loss"] for b, x in o.quantized.items()} for o in outcomes])


def _about(outcome: Outcome) -> dict:
    return about(outcome.job.method, outcome.job.config.seed, outcome.measured, outcome.job.config.objective)


def tidy(outcomes: list[Outcome]) -> pd.DataFrame:
    """One row per run, setting and calibration.

    Returns:
        `about` the run; `setting`, its label; `draw`, of the text that is calibrated on; `cost`, what rounding adds
        to the loss (nats).
    """
    return pd.DataFrame(
        _about(o) | {"setting": replace(one, draw=0).label, "draw": one.draw, "cost": rounded - o.measured["loss"]}
        for o in outcomes
        for one, rounded in zip(o.job.settings, o.quantized.values(), strict=True)
    )


def _number(column: str, paper: str, item: str, row: str) -> float:
    """A paper's number for a column of ours: of losses the logarithm, of costs that of a ratio."""
    name = "w8a8_minmax_ppl" if column == "W8A8" and item == _T10 else _COLUMNS[column]
    found = reference.value(paper, item, row, name)
    if column[0] == "W":
        return np.log(found / reference.value(paper, item, row, "fp_ppl"))
    return np.log(found) if column == "loss" else found - (column == "excess")


def of_methods(runs: pd.DataFrame, bits: list[str], tail: float, visible: float, blame: float) -> list[Judged]:
    """What each remedy does to vanilla of the same seed: norm, kurtosis, rounding cost, loss in full precision.

    Args:
        runs: from `table`.
        bits: labels of settings; the papers' number is that of W8A8.
        tail: below this tensor kurtosis vanilla has no outliers that could go.
        visible: below this cost, in nats, there is nothing to save.
        blame: see `laboratory.innocent`.
    """
    known, innocent, found = {one.id for one in reference.claims("03_quant")}, laboratory.innocent(runs, blame), []
    wide = runs.assign(excess=runs["neuron kurtosis"] - 1).pivot(index="seed", columns="method")
    none = _none(wide, _VANILLA, tail)
    asked = [
        (_NORM, "norm", "divide", f"{{}} divides vanilla's {_NORM} (resid_post) by", "factor", none),
        ("excess", "kurtosis", "divide", "{} divides vanilla's neuron kurtosis - 1 (resid_pre) by", "factor", none),
    ]
    for one in bits:
        small = f"vanilla loses less than {visible:g} nats at {one}" if wide[one][_VANILLA].mean() < visible else ""
        text = f"share of vanilla's {one} cost that {{}} saves:"
        asked.append((one, one.lower(), "save", text, "share_kept", small or innocent))
    asked.append(("loss", "fp", "lower", "{} lowers the full-precision loss (nats) by", "-fp_cost", ""))
    for column, name, formula, text, rule, why in asked:
        for method in (m for m in dict.fromkeys(runs["method"]) if m != _VANILLA):
            id, ours = f"{_IDS[method]}-{name}", _FORMULAS[formula](wide[column][method], wide[column][_VANILLA])
            try:
                theirs = (_number("W8A8" if formula == "save" else column, *row) for row in _LIKE[method])
                said = f"{_FORMULAS[formula](*theirs):.3g} ({', '.join(_LIKE[method][0][:2])})"
            except (KeyError, ValueError):
                said = reference.NO_NUMBER
            found.append((id if id in known else "", text.format(method), ours, rule, said, why, rule == "factor"))
    return found


def of_tables(rows: pd.DataFrame, tail: float, blame: float) -> list[Judged]:
    """What bondarenko2023 says of its Tables 2, 3, 6 and 10, like for like: norm gains decayed in both or in neither.

    Args:
        rows: from `tidy`. Of calibrations the median counts. Of methods that are not there nothing has values.
        tail, blame: as in `of_methods`.
    """
    costs = rows.pivot_table("cost", "seed", ["setting", "method"], "median", dropna=False)
    wide, found = rows.drop_duplicates(["method", "seed"]).pivot(index="seed", columns="method"), []
    there = [one for one in ROWS if one in {*rows["method"]}]
    for name, column in (("kurtosis", _KURTOSIS), ("norm", _NORM)):
        both = [(wide[column].loc[seed, there], costs["W8A8"].loc[seed, there]) for seed in wide.index]
        ours = pd.Series([a.corr(b, "spearman") for a, b in both], wide.index)
        theirs = pd.DataFrame([[_number(one, *ROWS[method]) for one in (column, "W8A8")] for method in there])
        said = f"{theirs.corr('spearman').iloc[0, 1]:.3g} ({_B}, the same rows)"
        text = f"over {len(there)} rows of Tables 3 and 6, the rank correlation of {column} and W8A8 cost is"
        found.append((f"{_B}-{name}-ranks-w8a8", text, ours, "rank_margin", said, "", False))
    for name, text, formula, one, method, other, vanilla, rule, item in _SAID:
        pairs = (one, method), (other, vanilla)
        like = [
            (_B, item, of.partition(",")[0]) if item == _T10 else ROWS[of] for _, of in pairs
        ]  # Table 10 is BERT's
        theirs = [_number(column, *row) for (column, _), row in zip(pairs, like, strict=True)]
        said = f"{_FORMULAS[formula](*theirs):.3g} ({_B}, {item})"
        judged, why = pd.Series(dtype=float), "such a model is not trained here"
        if {method, vanilla} <= {*there}:
            judged = _FORMULAS[formula](*((costs if column[0] == "W" else wide)[column][of] for column, of in pairs))
            why = _none(wide, vanilla, tail) if rule == "factor" else ""
            why = _innocent(costs, vanilla, blame) if rule.startswith("share") else why
        found.append((f"{_B}-{name}", text, judged, rule, said, why, rule in ("factor", "higher")))
    return found


def _none(wide: pd.DataFrame, method: str, tail: float) -> str:
    there = wide[_KURTOSIS][method].mean()
    return "" if there >= tail else f"vanilla has no outliers to remove (tensor kurtosis {there:.1f})"


def _innocent(costs: pd.DataFrame, method: str, blame: float) -> str:
    both = {"W8A8": costs["W8A8 min-max"][method], "W8A8 per token": costs["W8A8 min-max per token"][method]}
    return laboratory.innocent(pd.DataFrame(both).assign(method=_VANILLA), blame)


def of_tuned(tuned: pd.DataFrame) -> list[Judged]:
    """What bondarenko2023 says of its Table 9, and what drawing the attention anew costs.

    Args:
        tuned: from `finetuned.table`.
    """
    last = tuned[tuned["step"] == tuned["step"].max()]
    of, found = last.pivot(index="seed", columns=["attention", "gates"]), []
    for name, column, formula, said in (
        ("norm", _NORM, "divide", f"divide the {_NORM} (resid_post) by"),
        ("kurtosis", _KURTOSIS, "divide", f"divide the {_KURTOSIS} by"),
        ("fp", "loss", "lower", "lower the full-precision loss (nats) by"),
    ):
        ours = _FORMULAS[formula](*(of[column]["drawn anew"][gates] for gates in (True, False)))
        theirs = _FORMULAS[formula](*(_number(column, _B, _T9, row) for row in (_GATED, _VANILLA)))
        text, rule = (
            f"fine-tuned from an attention drawn anew: gates {said}",
            "-fp_cost" if name == "fp" else "higher",
        )
        found.append((f"{_B}-finetuned-{name}", text, ours, rule, f"{theirs:.3g} ({_B}, {_T9})", "", name != "fp"))
    for gates, said in ((False, "without gates"), (True, "with gates")):
        ours = of["loss"]["drawn anew"][gates] - of["loss"]["kept"][gates]
        text = f"fine-tuned {said}: an attention drawn anew ends above one that was kept (loss, nats) by"
        found.append(("", text, ours, "reset_cost", reference.NO_NUMBER, "", False))
    return found
