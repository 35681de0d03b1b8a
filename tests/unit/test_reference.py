import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ofutils import UserError, params, plots, reference


def test_numbers_come_with_their_source_and_unverified_ones_stay_out():
    table = reference.table("he2024", "table 2 OPT-125m")
    assert reference.value("he2024", "table 2 OPT-125m", "OP + SOAP", "w8a8_ppl") == 14.87
    assert (table["source"] != "").all()
    with pytest.raises(UserError, match="no verified neuron_kurtosis for 'vanilla'"):
        reference.value("he2024", "table 2 OPT-125m", "vanilla", "neuron_kurtosis")


def test_bondarenko_table_6_is_whole():
    table = reference.table("bondarenko2023", "table 6 OPT-125m")
    assert len(table) == 15 * 4 and table["row"].nunique() == 15
    row = "gated linear 0.25; norm gain decay yes"
    assert reference.value("bondarenko2023", "table 6 OPT-125m", row, "max_inf_norm") == 8.7


def test_puccettis_numbers_are_those_of_the_released_code_and_say_so():
    assert reference.value("puccetti2022", "fine-tuned bert-base-uncased", "308 381", "stsb") == 0.2845
    table = reference.table("puccetti2022", "fine-tuned bert-base-uncased")
    assert len(table) == 4 * 5 and "mnli" not in set(table["column"])  # printed after a run on 2,000 rows only
    dimensions = reference.table("puccetti2022", "outlier dimensions")
    found = dimensions.groupby("row", sort=False)["value"].agg(lambda values: [int(value) for value in values])
    assert found["google-bert/bert-base-uncased"] == [308, 381] and found["FacebookAI/roberta-base"] == [77, 588]
    for source in (*table["source"], *dimensions["source"]):
        assert "released" in source and source.endswith("not the paper")


def test_unknown_papers_and_items_name_the_known_ones():
    with pytest.raises(UserError, match="unknown paper 'he2023' .did you mean 'he2024'"):
        reference.table("he2023", "table 2")
    with pytest.raises(UserError, match="known: figure 41 ViT-B, table 2 OPT-125m"):
        reference.table("he2024", "figure 99")


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([2.0, 2.1, 1.9], "holds"),
        ([0.1, 0.2, 0.15], "does not hold"),
        ([0.0, 1.0, 3.0], "not testable at this scale: the margin lies inside the interval"),
        ([2.0, 2.1], "not testable at this scale: 2 of 3 seeds"),
        ([], "not testable at this scale: 0 of 3 seeds"),
    ],
)
def test_verdicts_follow_the_interval(ours, verdict):
    assert reference.compare("x lies above 1", ours, 1.0, "none").verdict == verdict


def test_the_interval_is_students_and_the_text_names_everything():
    found = reference.compare("the norm falls by", [1.0, 2.0, 3.0], 0.0, "8.7 (Table 6)")
    assert found.low == pytest.approx(2 - 2.920 / 3**0.5, rel=1e-3)
    for part in ("the norm falls by 2 [90%: ", "n = 3", "8.7 (Table 6)", "above 0", "holds ("):
        assert part in found.text
    assert "no outliers" in reference.compare("c", [1, 1, 1.1], 0, "none", untestable="no outliers").verdict


def test_a_figure_is_saved_as_picture_points_and_provenance(out):
    plots.theme()
    fig, ax = plt.subplots()
    ax.plot([1, 2], [3, 4])
    path = plots.save(fig, params.Session("test", "tiny"), "lines", pd.DataFrame({"x": [1, 2]}), corpus="abc")
    assert path == out / "figures" / "test" / "lines.png" and path.stat().st_size > 1000
    assert pd.read_csv(path.with_suffix(".csv"))["x"].tolist() == [1, 2]
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["scale"] == "tiny" and described["corpus"] == "abc" and described["numerics"] >= 1
    plt.close(fig)


def test_a_seed_without_a_number_is_not_hidden():
    assert "not every seed gave a number" in reference.compare("c", [1.0, float("nan"), 2.0], 0, "none").verdict


def test_a_bound_is_not_a_number():
    with pytest.raises(UserError, match="no verified"):
        reference.value("he2024", "table 2 OPT-125m", "OP", "neuron_kurtosis")


def test_ratios_are_averaged_by_their_logarithms():
    found = reference.compare("divides by", [1.0, 2.0, 4.0], 0.5, "none", ratio=True)
    assert found.mean == pytest.approx(2.0) and found.low * found.high == pytest.approx(4.0)


def test_a_ratio_that_is_not_positive_is_no_number():
    assert "not every seed gave a number" in reference.compare("c", [1.0, 0.0, 2.0], 0.5, "none", ratio=True).verdict


def test_claims_are_found_by_notebook_and_by_id():
    every = reference.claims()
    mine = [one for one in every if one.notebook == "03_quant"]
    assert list(reference.claims("03_quant")) == mine != [] and reference.claims("99_nothing") == ()
    found = reference.claim("he2024-soap-w8a8")
    assert (found.paper, found.notebook, found.tolerance) == ("he2024", "03_quant", {"share_kept": 0.25})
    assert found.margin == 0.25 and reference.claim("he2024-op-fp").margin == -0.05
    assert found.rule_at(0.5) == "share of vanilla's W8A8 cost that it saves, above 0.5"
    assert reference.claim("he2024-op-fp").rule_at(0.1) == "nats that it lies below vanilla's loss, above 0.1"
    with pytest.raises(UserError, match="unknown claim 'he2024-soap-w8a' .did you mean 'he2024-soap-w8a8'"):
        reference.claim("he2024-soap-w8a")


def test_a_verdict_carries_the_id_of_a_known_claim_only():
    assert reference.compare("c", [1.0], 0, "none").id == ""
    assert reference.compare("c", [1.0], 0, "none", id="he2024-op-fp").id == "he2024-op-fp"
    with pytest.raises(UserError, match="unknown claim 'he2024-opfp' .did you mean 'he2024-op-fp'"):
        reference.compare("c", [1.0], 0, "none", id="he2024-opfp")


def test_the_table_of_verdicts_holds_all_that_they_follow_from(out):
    thirds = [1 / 3, 2 / 3, 4 / 3]
    made = [
        reference.compare("a falls by", [0.0], 9, "none"),
        reference.compare("b", thirds, 0.1, "7 (x)", ratio=True),
    ]
    made.append(reference.compare("a falls by", [1.0, 1.0], 0.5, "none", id="he2024-op-fp"))  # a cell run again
    table = reference.verdict_table(made)
    assert list(table.columns) == reference.TABLE and list(table["claim"]) == ["a falls by", "b"]
    assert table["id"].tolist() == ["he2024-op-fp", ""] and table["n"].tolist() == [2, 3]
    path = plots.save_table(params.Session("test", "tiny"), "verdicts", table)
    read = pd.read_csv(path, keep_default_na=False)
    assert [float(value) for value in read["values"][1].split()] == thirds
    assert read["ratio"].tolist() == [False, True] and read["paper"][1] == "7 (x)"
    assert reference.verdict_table([]).columns.tolist() == reference.TABLE
