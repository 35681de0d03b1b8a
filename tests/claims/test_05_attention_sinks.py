"""Every verdict of 05_attention_sinks, computed once more from the points of its figures."""

import json
import math
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest

from ofutils import sweep
from ofutils.records import differing
from tests.recomputed import judged

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures" / "05_attention_sinks"
RULES = {"weights": "by weight", "activation": "by activation"}


def read(name):
    return pd.read_csv(FIGURES / f"{name}.csv")


def per_draw(table, column):
    return [group[column].tolist() for _, group in table.groupby("draw")]


def of_puccetti(rules):
    """id -> (values, margin, of logs)."""
    standing, ablation, controls = read("standing"), read("ablation"), read("controls")
    named = json.loads((FIGURES / "correlation.json").read_text())
    later = ablation[ablation["block"] > 0]
    special = {case: [mean(v) for v in per_draw(rows, "special")] for case, rows in later.groupby("case")}
    found = {}
    for short, rule in RULES.items():
        own, size = standing[(standing["rule"] == rule) & (standing["hidden"] == "input")], len(named[rule])
        excess = own.assign(excess=[r - max(level, 0) for r, level in zip(own["r"], own["random sets"], strict=True)])
        found[f"puccetti2022-vertical-{short}"] = (
            [mean(values) for values in per_draw(excess, "excess")],
            rules["vertical_margin"],
            False,
        )
        random = controls[controls["size"] == size].groupby("draw")["special"].quantile(0.05)
        matched = special[f"largest unnamed {size}"]
        rows = zip(random, matched, special[rule], special["none"], strict=True)
        lost = [(min(by_chance, unnamed) - without) / full for by_chance, unnamed, without, full in rows]
        found[f"puccetti2022-pattern-{short}"] = (lost, rules["pattern_loss"], False)
    return found


def of_bondarenko(rules):
    heads, groups = read("heads"), read("outlier_groups")
    depth = json.loads((FIGURES / "outliers.json").read_text())["depth"]
    there = groups[groups["block"].isin(depth)]
    shares = [1 - mean(values) for values in per_draw(there, "other")]
    values, products = [], []
    for _, draw in heads.groupby("draw"):
        own = draw[draw["start"] + draw["separator"] > rules["sink_share"]].to_dict("records")
        at = [one["value_start"] if one["start"] > one["separator"] else one["value_separator"] for one in own]
        values.append(math.exp(mean(-math.log(value) for value in at)))
        products.append(math.exp(mean(math.log(one["undrained"] / one["output"]) for one in own)))
    return {
        "bondarenko2023-outliers-at-separators": (shares, rules["separator_share"], False),
        "bondarenko2023-small-values": (values, rules["value_factor"], True),
        "bondarenko2023-small-products": (products, rules["output_factor"], True),
    }


REMEDIES = {"bondarenko2023-lab-clipped": "clipped softmax", "bondarenko2023-lab-gated": "gated attention"}
REMEDIES |= {"he2024-lab-op": "OP", "he2024-lab-soap": "vanilla + SOAP", "he2024-lab-op-soap": "OP + SOAP"}


def in_the_laboratory(rules):
    """id -> (values, margin, of logs), also of those that no paper claims."""
    runs = {key: rows.sort_values("seed") for key, rows in read("laboratory").groupby("method")}
    vanilla, found = runs["vanilla"], {}
    for start, method in REMEDIES.items():
        own = runs[method]
        assert own["seed"].tolist() == vanilla["seed"].tolist() == [1, 2, 3, 4, 5, 6]

        def over(column, less=0, own=own):
            return [(a - less) / (b - less) for a, b in zip(vanilla[column], own[column], strict=True)]

        found[f"{start}-sink"] = over("sink"), rules["lab_factor"], True
        found[f"{start}-kurtosis"] = over("kurtosis", 1), rules["lab_factor"], True
        found[f"{start}-norm"] = over("max inf norm"), rules["lab_factor"], True
    return found | {"bondarenko2023-lab-sink": (vanilla["sink"].tolist(), rules["sink_share"], False)}


def test_every_verdict_follows_from_the_points_of_the_figures(committed, rules):
    laboratory = {id: one for id, one in in_the_laboratory(rules).items() if id in committed.index}
    expected = of_puccetti(rules) | of_bondarenko(rules) | laboratory
    assert set(expected) == set(committed.index)
    for id, (values, margin, of_logs) in expected.items():
        row = committed.loc[id]
        assert [float(value) for value in row["values"].split()] == pytest.approx(values, rel=1e-3, abs=1e-4), id
        assert row["n"] == (6 if id in laboratory else 3) and row["margin"] == margin
        assert row["verdict"].split(":")[0] == judged(values, margin, of_logs), id


def test_what_interventions_leave_follows_from_their_table(stated, rules):
    rows = read("interventions").set_index(["model", "seed", "case"])
    for model, seeds in (("1 layer", 6), ("2 layers", 3)):
        said = {"attention to <s>": ("outlier zeroed", "sink", 0), "kurtosis - 1": ("<s> blocked", "kurtosis", 1)}
        for words, (case, column, less) in said.items():
            row = stated.loc[f"laboratory, {model}: share of the {words} that stays with the {case}:"]
            own = rows.loc[model][column] - less
            left = [own[seed, case] / own[seed, "nothing"] for seed in range(1, seeds + 1)]
            assert [float(value) for value in row["values"].split()] == pytest.approx(left, rel=1e-4)
            assert row["verdict"].split(":")[0] == judged(left, rules["lab_kept"], False)


def test_the_laboratorys_recipe_is_the_one_that_the_rule_of_its_scan_names():
    jobs = {job.method: job.config for job in sweep.read_recipe("laboratory_scan", "small").jobs}
    task = jobs["the first"].corpus, jobs["the first"].model.context
    same = [method for method, one in jobs.items() if (one.corpus, one.model.context) == task]
    scan = read("laboratory_scan").set_index("method").loc[same]
    good = scan[scan["above bound"] <= scan["above bound"].min() + 0.01]
    named, vanilla = jobs[good["kurtosis"].idxmax()], sweep.read_recipe("laboratory", "small").jobs[0]
    assert vanilla.method == "vanilla"
    assert differing(vanilla.config) | {"seed": 0} == differing(named) | {"seed": 0}


def test_the_correlations_drawn_are_those_judged():
    """The pooled correlation of all draws lies among those of single draws, for each hidden state."""
    pooled, standing = read("correlation"), read("standing")
    named = json.loads((FIGURES / "correlation.json").read_text())
    for (rule, hidden, block), rows in standing.groupby(["rule", "hidden", "block"]):
        own = pooled[(pooled["hidden"] == hidden) & (pooled["block"] == block)]
        largest = own[own["dimension"].isin(named[rule])]["r"].max()
        assert rows["r"].min() - 0.05 < largest < rows["r"].max() + 0.05


def test_the_controls_have_the_sizes_of_the_rules_and_none_of_their_dimensions():
    controls, each = read("controls"), read("singles")
    named = json.loads((FIGURES / "correlation.json").read_text())
    of_rules = {d for rule in RULES.values() for d in named[rule]}
    assert set(controls["size"]) == {len(named[rule]) for rule in RULES.values()}
    for size, zeroed in zip(controls["size"], controls["zeroed"], strict=True):
        chosen = json.loads(zeroed)
        assert len(set(chosen)) == size and not of_rules & set(chosen)
    assert of_rules <= set(each["dimension"]) and each["dimension"].is_unique


def test_what_keys_alone_do_not_read_leaves_the_values_nearly_as_small():
    """The reading: zeroing fills the sink up, blind keys do not; both take its attention away."""
    ablation = read("ablation")
    later = ablation[ablation["block"] > 1].groupby("case")[["special", "value"]].mean()
    full, zeroed, blind = (later.loc[case] for case in ("none", "by activation", "keys only"))
    assert zeroed["special"] < full["special"] / 2 and blind["special"] < full["special"] / 2
    assert zeroed["value"] > 5 * blind["value"] > 0


def test_the_contrast_compares_heads_of_the_same_blocks(rules):
    table, heads = pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False), read("heads")
    (row,) = table[table["claim"].str.startswith("contrast")].to_dict("records")
    heads["sinks"] = heads["start"] + heads["separator"] > rules["sink_share"]
    inner = heads[heads["block"].isin(heads.loc[heads["sinks"], "block"])]
    ratios = []
    for _, draw in inner.groupby("draw"):
        at = draw["value_start"].where(draw["start"] > draw["separator"], draw["value_separator"]).map(math.log)
        ratios.append(math.exp(at[~draw["sinks"]].mean() - at[draw["sinks"]].mean()))
    assert [float(value) for value in row["values"].split()] == pytest.approx(ratios, rel=1e-3)
    assert row["verdict"].split(":")[0] == judged(ratios, rules["value_factor"], True)


def test_remedies_are_not_judged_where_no_vanilla_head_sinks(rules):
    table = pd.read_csv(FIGURES / "verdicts.csv", keep_default_na=False)
    rest, remedies = table[table["claim"].str.contains("less than vanilla's")], read("remedies")
    trained = remedies[remedies["state"] == "trained"]
    vanilla = trained[trained["method"] == "vanilla"]
    sinks = (vanilla["largest"] > rules["column_share"]).any()
    assert len(rest) == 2
    assert sinks or rest["verdict"].str.startswith("not testable at this scale: no head").all()
    untrained = remedies[remedies["state"] == "before training"]
    uniform = mean(1 / n for n in range(1, 65))  # of 64 keys, what the first gets from uniform causal attention
    for method in ("vanilla", "gated attention"):
        assert untrained[untrained["method"] == method]["largest"].mean() == pytest.approx(uniform, rel=0.05)


def test_the_maps_of_figure_8_are_of_the_heads_that_do_least():
    remedies, figure = read("remedies"), read("figure8")
    trained = remedies[remedies["state"] == "trained"]
    for method, rows in trained.groupby("method"):
        one = rows.loc[rows["passed"].idxmin()]
        (title,) = {name for name in figure["head"].unique() if name.startswith(f"{method}:")}
        assert f"block {one['block']}, head {one['head']}:" in title and f"output {one['passed']:.2f}" in title
