"""Every verdict of 03_quant, computed once more from the points of its figure."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.recomputed import T_95

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "03_quant"


@pytest.fixture(scope="module")
def runs():
    return pd.read_csv(FIGURES / "gain_and_cost.csv")


def ranks(values):
    """Ranks from 0; ties, which real values do not have, are an error."""
    assert len(set(values)) == len(values)
    return np.argsort(np.argsort(np.asarray(values)))


def spearman(first, second):
    n = len(first)
    return 1 - 6 * float(((ranks(first) - ranks(second)) ** 2).sum()) / (n * (n**2 - 1))


def judged(values, margin, ratio):
    """Mean, 90% interval and verdict of three values, or of six in the laboratory; of none nothing."""
    if not len(values):
        return math.nan, math.nan, math.nan, ""
    values = np.log(values) if ratio else np.asarray(values)
    reach = T_95[len(values)] * values.std(ddof=1) / math.sqrt(len(values))
    low, middle, high = ((np.exp if ratio else float)(values.mean() + sign * reach) for sign in (-1, 0, 1))
    if low > margin:
        return low, middle, high, "holds"
    if high < margin:
        return low, middle, high, "does not hold"
    return low, middle, high, "not testable at this scale: the margin lies inside the interval"


def ffn_share():
    """Per draw of sentences, what the FFN's output and sum cause of the damage of activations; and the model."""
    rows = pd.read_csv(FIGURES / "real_checkpoint.csv")
    cell = {(r["ranges"], r["left exact"], r["draw"]): r["damage"] for _, r in rows.iterrows()}
    shares = []
    for draw in range(3):
        whole, alone = cell["per tensor", "nothing", draw], cell["weights alone", "nothing", draw]
        shares.append((whole - cell["per tensor", "FFN", draw]) / (whole - alone))
    return np.array(shares), json.loads((FIGURES / "real_checkpoint.json").read_text())["model"]


def expected(runs, rules):
    """claim -> (one value per seed, margin, ratio, why it cannot be judged)."""
    seeds = sorted(runs["seed"].unique())
    methods = [method for method in runs["method"].unique() if method != "vanilla"]
    bits = [column for column in runs.columns if column[0] == "W"]

    def values(method, column):
        chosen = runs[runs["method"] == method].set_index("seed")[column]
        return np.array([chosen[seed] for seed in seeds])

    bits.remove("W8A8 per token")
    tail = values("vanilla", "tensor kurtosis").mean()
    none = (
        "" if tail >= rules["outlier_kurtosis"] else f"vanilla has no outliers to remove (tensor kurtosis {tail:.1f})"
    )
    found = {}
    for method in methods:
        norm = values("vanilla", "max inf norm") / values(method, "max inf norm")
        found[f"{method} divides vanilla's max inf norm (resid_post) by"] = norm, rules["factor"], True, none
        excess = (values("vanilla", "neuron kurtosis") - 1) / (values(method, "neuron kurtosis") - 1)
        claim = f"{method} divides vanilla's neuron kurtosis - 1 (resid_pre) by"
        found[claim] = excess, rules["factor"], True, none
        gain = values("vanilla", "loss") - values(method, "loss")
        found[f"{method} lowers the full-precision loss (nats) by"] = gain, -rules["fp_cost"], False, ""
        for width in bits:
            why = innocent(values("vanilla", "W8A8").mean() / values("vanilla", "W8A8 per token").mean(), rules)
            if values("vanilla", width).mean() < rules["visible_cost"]:
                why = f"vanilla loses less than {rules['visible_cost']:g} nats at {width}"
            share = 1 - values(method, width) / values("vanilla", width)
            found[f"share of vanilla's {width} cost that {method} saves:"] = share, rules["share_kept"], False, why
    share, model = ffn_share()
    claim = f"share of the W8A8 damage to {model} that the FFN's output and sum cause:"
    found[claim] = share, rules["share_ffn"], False, ""
    for measure in ("neuron kurtosis", "tensor kurtosis", "max inf norm"):
        for width in bits:
            of_seed = [runs[runs["seed"] == seed] for seed in seeds]
            order = [spearman(list(one[measure]), list(one[width])) for one in of_seed]
            claim = f"over methods, the rank correlation of {measure} and {width} cost is"
            found[claim] = order, rules["rank_margin"], False, ""
    return found | in_the_laboratory(rules) | healed(rules) | in_the_tables(rules) | fine_tuned(rules)


def innocent(times, rules):
    """Why savings are not judged, by how many times as much one range per tensor costs vanilla as one per token."""
    said = f"outliers are not to blame: one range per tensor costs {times:.1f} times one per token"
    return "" if times >= rules["blame"] else said


DECAYED = ", gains decayed"
LARGER = ", larger"
ROWS = ["vanilla", "gated attention", "gate, pi 0.1", "gate, pi 0.5", "gate, all heads"]
ROWS += [f"{one}{DECAYED}" for one in (*ROWS, "clipped softmax")]
ROWS += [f"clipped softmax, alpha {alpha}{DECAYED}" for alpha in (1, 2, 8, 12)]
ROWS += [f"{one}{LARGER}" for one in ("vanilla", "gated attention")]


def in_the_tables(rules):
    rows = pd.read_csv(FIGURES / "tables.csv")
    seeds = sorted(rows[rows["method"] == "vanilla"]["seed"].unique())

    def cost(setting, method):
        own = rows[(rows["setting"] == setting) & (rows["method"] == method)]
        assert len(own) == 9 or len(seeds) != 3, "three calibrations of three seeds"
        return np.array([np.median(own[own["seed"] == seed]["cost"]) for seed in seeds])

    def of(column, method):
        own = rows[rows["method"] == method].drop_duplicates("seed").set_index("seed")[column]
        return np.array([own[seed] for seed in seeds])

    def none(method):
        tail = of("tensor kurtosis", method).mean()
        return (
            ""
            if tail >= rules["outlier_kurtosis"]
            else f"vanilla has no outliers to remove (tensor kurtosis {tail:.1f})"
        )

    def blamed(method):
        both = (cost(f"W8A8 min-max{kind}", method).mean() for kind in ("", " per token"))
        return innocent(next(both) / next(both), rules)

    found = {}
    for measure in ("tensor kurtosis", "max inf norm"):
        each = np.array([of(measure, method) for method in ROWS]), np.array([cost("W8A8", method) for method in ROWS])
        order = [spearman(*(list(one[:, place]) for one in each)) for place in range(len(seeds))]
        claim = f"over {len(ROWS)} rows of Tables 3 and 6, the rank correlation of {measure} and W8A8 cost is"
        found[claim] = order, rules["rank_margin"], False, ""
    first, second = "vanilla", f"vanilla{DECAYED}"
    clipped, gated = f"clipped softmax{DECAYED}", f"gated attention{DECAYED}"
    norm, kurtosis, higher = "max inf norm", "tensor kurtosis", rules["higher"]
    claim = "weight decay on norm gains divides vanilla's max inf norm (resid_post) by"
    found[claim] = of(norm, first) / of(norm, second), rules["factor"], True, none(first)
    claim = "weight decay on norm gains multiplies what W8A8 costs vanilla by"
    found[claim] = cost("W8A8", second) / cost("W8A8", first), higher, True, ""
    claim = "W8A8 costs clipped softmax, in multiples of vanilla's cost,"
    same = {claim: (cost("W8A8", clipped) / cost("W8A8", second), rules["share_left"], False, blamed(second))}
    claim = "clipped softmax multiplies vanilla's tensor kurtosis by"
    same[claim] = of(kurtosis, clipped) / of(kurtosis, second), higher, True, ""
    claim = "gated attention divides vanilla's tensor kurtosis by"
    same[claim] = of(kurtosis, second) / of(kurtosis, gated), rules["factor"], True, none(second)
    same["W8A8 lowers the loss of gated attention (nats) by"] = -cost("W8A8", gated), -rules["near"], False, ""
    claim = "W6A8 with min-max ranges of weights costs vanilla more than with MSE ranges, by a factor of"
    same[claim] = cost("W6A8 min-max", second) / cost("W6A8", second), higher, True, ""
    claim = "W6A6 costs vanilla more than W4A8, by a factor of"
    same[claim] = cost("W6A6", second) / cost("W4A8", second), higher, True, ""
    found |= {"norm gains decayed: " + claim: judged for claim, judged in same.items()}
    where = "norm gains decayed: "
    claim = f"{where}gated attention divides vanilla's max inf norm (resid_post) by"
    found[claim] = of(norm, second) / of(norm, gated), rules["factor"], True, none(second)
    for width in ("W8A8", "W6A6", "W4A8"):
        claim = f"{where}share of vanilla's {width} cost that gated attention saves:"
        found[claim] = 1 - cost(width, gated) / cost(width, second), rules["share_kept"], False, blamed(second)
    claim = f"{where}gated attention lowers the loss (nats) by"
    found[claim] = of("loss", second) - of("loss", gated), -rules["fp_cost"], False, ""
    first, gated = f"vanilla{LARGER}", f"gated attention{LARGER}"
    twice = "twice the width: gated attention"
    claim = f"{twice} divides vanilla's max inf norm (resid_post) by"
    found[claim] = of(norm, first) / of(norm, gated), rules["factor"], True, none(first)
    claim = "twice the width: share of vanilla's W8A8 cost that gated attention saves:"
    found[claim] = 1 - cost("W8A8", gated) / cost("W8A8", first), rules["share_kept"], False, blamed(first)
    claim = f"{twice} lowers the loss (nats) by"
    found[claim] = of("loss", first) - of("loss", gated), -rules["fp_cost"], False, ""
    return found


def fine_tuned(rules):
    steps = pd.read_csv(FIGURES / "finetuned.csv")
    last = steps[steps["step"] == steps["step"].max()].sort_values("seed")
    last = dict(iter(last.groupby(["attention", "gates"])))

    def of(column, attention, gates):
        return last[attention, gates][column].to_numpy()

    start, anew, found = "fine-tuned from an attention drawn anew: gates", "drawn anew", {}
    for column, said in (("max inf norm", "max inf norm (resid_post)"), ("tensor kurtosis", "tensor kurtosis")):
        ratio = of(column, anew, False) / of(column, anew, True)
        found[f"{start} divide the {said} by"] = ratio, rules["higher"], True, ""
    gain = of("loss", anew, False) - of("loss", anew, True)
    found[f"{start} lower the full-precision loss (nats) by"] = gain, -rules["fp_cost"], False, ""
    for gates, said in ((False, "without gates"), (True, "with gates")):
        claim = f"fine-tuned {said}: an attention drawn anew ends above one that was kept (loss, nats) by"
        found[claim] = of("loss", anew, gates) - of("loss", "kept", gates), rules["reset_cost"], False, ""
    return found


def in_the_laboratory(rules):
    runs = pd.read_csv(FIGURES / "laboratory.csv").set_index(["method", "seed"]).sort_index()
    vanilla, found = runs.loc["vanilla"], {}
    why = innocent(vanilla["W8A8"].mean() / vanilla["W8A8 per token"].mean(), rules)
    methods = [method for method in dict.fromkeys(method for method, _ in runs.index) if method != "vanilla"]
    for method in methods:
        for width in ("W8A8", "W6A6"):
            share = 1 - runs.loc[method][width] / vanilla[width]
            claim = f"laboratory: share of vanilla's {width} cost that {method} saves:"
            found[claim] = list(share), rules["share_kept"], False, why
        gain = list(vanilla["above bound"] - runs.loc[method]["above bound"])
        found[f"laboratory: {method} lowers the full-precision loss (nats) by"] = gain, -rules["fp_cost"], False, ""
    of_seed = [rows for _, rows in runs.groupby("seed")]
    order = [spearman(list(one["kurtosis"]), list(one["W8A8"])) for one in of_seed]
    claim = "laboratory: over methods, the rank correlation of neuron kurtosis and W8A8 cost is"
    return found | {claim: (order, rules["rank_margin"], False, why)}


def healed(rules):
    """By way of healing, by how much W8A8 takes the checkpoint further from itself than it takes the healed one."""
    rows = pd.read_csv(FIGURES / "healing.csv")
    rows = rows[rows["ranges"] == "per tensor"]
    far = {way: [one["original"].mean() for _, one in own.groupby("seed")] for way, own in rows.groupby("way")}
    (before,) = far.pop("nothing")
    said = "healed ({}): W8A8 takes the model less far from the original in full precision, by a factor"
    return {
        said.format(way): ([before / x for x in after], rules["heal_factor"], True, "") for way, after in far.items()
    }


def test_every_verdict_follows_from_the_points_of_the_figure(runs, stated, rules):
    again = expected(runs, rules)
    assert set(again) == set(stated.index)
    for claim, (values, margin, ratio, why) in again.items():
        row = stated.loc[claim]
        assert [float(value) for value in row["values"].split()] == pytest.approx(list(values), rel=1e-3, abs=1e-4)
        *interval, verdict = judged(values, margin, ratio)
        found = [float(one or "nan") for one in row[["low", "ours", "high"]]]
        assert found == pytest.approx(interval, rel=2e-3, abs=1e-3, nan_ok=True), claim
        assert row["verdict"] == (f"not testable at this scale: {why}" if why else verdict), claim
        assert row["margin"] == margin and row["ratio"] == ratio and row["n"] == len(values)


SAME, TUNED, RANKS = (
    "norm gains decayed: ",
    "fine-tuned from an attention drawn anew: gates",
    f"over {len(ROWS)} rows of Tables 3 and 6",
)
TABLES = {  # id -> what it says
    "kurtosis-ranks-w8a8": f"{RANKS}, the rank correlation of tensor kurtosis and W8A8 cost is",
    "norm-ranks-w8a8": f"{RANKS}, the rank correlation of max inf norm and W8A8 cost is",
    "decay-norm": "weight decay on norm gains divides vanilla's max inf norm (resid_post) by",
    "decay-w8a8": "weight decay on norm gains multiplies what W8A8 costs vanilla by",
    "decay-clipped-w8a8": f"{SAME}W8A8 costs clipped softmax, in multiples of vanilla's cost,",
    "decay-clipped-kurtosis": f"{SAME}clipped softmax multiplies vanilla's tensor kurtosis by",
    "decay-gated-norm": f"{SAME}gated attention divides vanilla's max inf norm (resid_post) by",
    "decay-gated-kurtosis": f"{SAME}gated attention divides vanilla's tensor kurtosis by",
    "decay-gated-fp": f"{SAME}gated attention lowers the loss (nats) by",
    "gated-near-fp": f"{SAME}W8A8 lowers the loss of gated attention (nats) by",
    "mse-w6a8": f"{SAME}W6A8 with min-max ranges of weights costs vanilla more than with MSE ranges, by a factor of",
    "activations-before-weights": f"{SAME}W6A6 costs vanilla more than W4A8, by a factor of",
    "larger-gated-norm": "twice the width: gated attention divides vanilla's max inf norm (resid_post) by",
    "larger-gated-w8a8": "twice the width: share of vanilla's W8A8 cost that gated attention saves:",
    "larger-gated-fp": "twice the width: gated attention lowers the loss (nats) by",
    "finetuned-norm": f"{TUNED} divide the max inf norm (resid_post) by",
    "finetuned-kurtosis": f"{TUNED} divide the tensor kurtosis by",
    "finetuned-fp": f"{TUNED} lower the full-precision loss (nats) by",
}
TABLES |= {
    f"decay-gated-{bits.lower()}": f"{SAME}share of vanilla's {bits} cost that gated attention saves:"
    for bits in ("W8A8", "W6A6", "W4A8")
}


def test_each_paper_claim_is_about_what_its_id_says(stated):
    methods = {"clipped": "clipped softmax", "gated": "gated attention", "op": "OP"}
    methods |= {"soap": "vanilla + SOAP", "op-soap": "OP + SOAP"}
    texts = {
        "norm": "{} divides vanilla's max inf norm (resid_post) by",
        "kurtosis": "{} divides vanilla's neuron kurtosis - 1 (resid_pre) by",
        "w8a8": "share of vanilla's W8A8 cost that {} saves:",
        "fp": "{} lowers the full-precision loss (nats) by",
    }
    texts |= {f"lab-{quantity}": f"laboratory: {texts[quantity]}" for quantity in ("w8a8", "fp")}
    claims = {row.id: claim for claim, row in stated.iterrows() if row.id}
    assert claims.pop("bondarenko2023-ffn-output").startswith("share of the W8A8 damage to ")
    ranked = claims.pop("he2024-kurtosis-ranks-w8a8")
    assert ranked == "over methods, the rank correlation of neuron kurtosis and W8A8 cost is"
    ranked = claims.pop("he2024-lab-kurtosis-ranks-w8a8")
    assert ranked == "laboratory: over methods, the rank correlation of neuron kurtosis and W8A8 cost is"
    for id, text in TABLES.items():
        assert claims.pop(f"bondarenko2023-{id}") == text, id
    for id, claim in claims.items():
        method, _, quantity = id.partition("-")[2].rpartition("-")
        place = "lab-" if method.startswith("lab-") else ""
        assert claim == texts[place + quantity].format(methods[method.removeprefix("lab-")]), id
