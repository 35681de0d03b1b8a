"""What is folded into trained models, at the size of a test."""

import dataclasses

import pandas as pd
import pytest

from ofutils import sweep
from ofutils.studies.beyond import folded
from ofutils.train import TrainConfig
from tests.configurations import METHODS, SMALL

BASE = TrainConfig(model=SMALL, characters=60_000, batch=4, steps=4, warmup=1, measure_every=4, eval_batches=1)
EVALUATION = sweep.Evaluation(sites=("resid_post",), batches=2, batch=4, meters=("neuron_kurtosis",))
TWO = {"per tensor": folded.SETTINGS["per tensor"][:1], "LLM.int8()": folded.SETTINGS["LLM.int8()"]}


@pytest.fixture
def few(monkeypatch):
    """Two settings, on two batches."""
    two = {name: (dataclasses.replace(one, batches=2),) for name, (one,) in TWO.items()}
    monkeypatch.setattr(folded, "SETTINGS", two)


def task(method, fold):
    config = dataclasses.replace(BASE, model=dataclasses.replace(SMALL, **METHODS[method]))
    return folded.Task(fold, sweep.Job(method, config, folded.SETTINGS["per tensor"], EVALUATION))


def test_what_is_folded_changes_nothing_in_full_precision_and_is_recalled(out, few, monkeypatch):
    tasks = [task("vanilla", fold) for fold in folded.FOLDS]
    found = [folded.perform(one)["result"] for one in tasks]
    assert {round(one["loss"], 4) for one in found} == {round(found[0]["loss"], 4)}
    assert found[1]["kurtosis"] == pytest.approx(found[0]["kurtosis"], rel=1e-4)  # SmoothQuant leaves the stream
    assert found[2]["kurtosis"] != pytest.approx(found[0]["kurtosis"], rel=1e-2)
    assert all(len(one["rounded"]) == 2 for one in found)
    monkeypatch.setattr(sweep.train, "train", lambda *_, **__: pytest.fail("trained again"))
    assert [folded.perform(one)["result"] for one in tasks] == found


def test_the_unfolded_model_is_rounded_as_a_sweep_rounds_it(out, few):
    one = task("vanilla", "as trained")
    outcome = sweep.perform(one.job, report=lambda *_: None)
    assert folded.perform(one)["result"]["rounded"][0] == pytest.approx(outcome.quantized["W8A8"], rel=1e-6)


def test_a_refusal_is_recorded_with_its_reason(out, few):
    tasks = [task("OP layernorm", fold) for fold in ("as trained", "SmoothQuant", "rotation")]
    for one in tasks:
        folded.perform(one)
    assert folded.table(tasks)["fold"].unique().tolist() == ["as trained", "rotation"]
    (why,) = folded.refusals(tasks)
    assert why == "smooth: this model has no norm before a matrix"


def test_shares_are_of_the_same_seed_bits_and_ranges():
    at = {"ranges": "per tensor", "bits": "W6A6"}
    rows = [("vanilla", "as trained", 1, 0.8), ("vanilla", "rotation", 1, 0.2), ("OP", "as trained", 1, 0.4)]
    rows += [("vanilla", "as trained", 2, 0.1), ("vanilla", "rotation", 2, 0.2), ("OP", "as trained", 2, 0.1)]
    costs = pd.DataFrame([at | dict(zip(("method", "fold", "seed", "cost"), row, strict=True)) for row in rows])
    saved = folded.shares(costs).set_index(["method", "fold", "seed"])["saved"].sort_index()
    assert saved["vanilla", "rotation"].tolist() == pytest.approx([0.75, -1.0])
    assert saved["OP", "as trained"].tolist() == pytest.approx([0.5, 0.0])
    assert (saved["vanilla", "as trained"] == 0).all()


def test_settings_are_tasks_of_their_own_and_verdicts_name_theirs():
    text, laboratory = (folded.tasks(setting) for setting in ("text", "laboratory"))
    assert {one.job.config.corpus for one in text} == {"stdlib"} != {one.job.config.corpus for one in laboratory}
    assert len(text) == 6 * folded.SEEDS * len(folded.FOLDS)
    at = {"ranges": "per tensor", "bits": "W6A6"}
    methods = [(method, fold) for method in ("vanilla", "OP", "vanilla + SOAP") for fold in folded.FOLDS]
    rows = [at | {"method": m, "fold": f, "seed": 1, "saved": 0.1 * n} for n, (m, f) in enumerate(methods)]
    found = {text: values.tolist() for text, values, _ in folded.verdicts(pd.DataFrame(rows), "W6A6", "text")}
    assert found["text, W6A6: share of vanilla's cost that rotation folded into vanilla saves:"] == [0.2]
    assert found["text, W6A6: share of vanilla's cost that OP saves beyond rotation:"] == pytest.approx([0.2])
    assert found["text, W6A6: share of vanilla's cost that rotation saves on top of OP:"] == pytest.approx([0.2])
