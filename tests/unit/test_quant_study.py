"""The tables of 03_quant, its claims and its fine-tunings, at the size of a test."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from ofutils import reference, sweep, train
from ofutils.metrics import READ_AT
from ofutils.quant import QuantSettings
from ofutils.studies.quant import finetuned, runs
from ofutils.train import TrainConfig
from ofutils.transformer import clm_loss
from tests.configurations import SMALL

BASE = TrainConfig(model=SMALL, characters=60_000, batch=4, steps=4, warmup=1, measure_every=4, eval_batches=1)


def test_draws_are_calibrated_apart_and_the_first_is_as_before(out):
    settings = tuple(QuantSettings(margin=0, batches=2, draw=draw, percentile=99.0) for draw in (0, 1))
    evaluation = sweep.Evaluation(sites=(), batches=2, batch=4)
    alone, both = (sweep.Job("vanilla", BASE, settings[:n], evaluation) for n in (1, 2))
    single, found = (sweep.perform(job, report=lambda *_: None).quantized for job in (alone, both))
    assert [*found] == ["W8A8", "W8A8, draw 1"]
    assert found["W8A8"] == single["W8A8"] and found["W8A8, draw 1"] != found["W8A8"]
    tokens = train.load_tokens(BASE)
    first, second = (torch.cat(sweep.calibration(both, tokens, draw)) for draw in (0, 1))
    assert torch.equal(first, torch.cat(sweep.calibration(alone, tokens))) and not torch.equal(first, second)


def rows():
    """Two seeds, three calibrations: every number follows from the place of its method."""
    found = []
    for place, method in enumerate(runs.ROWS, start=1):
        for seed in (1, 2):
            about = {"method": method, "seed": seed, "loss": 2.0 - 0.01 * place, "max inf norm": 10.0 * place}
            about |= {"tensor kurtosis": 100.0 / place, "neuron kurtosis": 2.0}
            for setting in ("W8A8", "W8A8 min-max", "W8A8 min-max per token", "W6A8", "W6A8 min-max", "W4A8", "W6A6"):
                cost = 0.1 * place * (0.1 if "token" in setting else 1)
                for draw, factor in enumerate((1.0, 1.5, 40.0)):  # the median is the second
                    found.append(about | {"setting": setting, "draw": draw, "cost": cost * factor})
    return pd.DataFrame(found)


def test_claims_on_tables_are_of_medians_over_calibrations_and_like_for_like():
    judged = {id.partition("-")[2]: one for id, *one in runs.of_tables(rows(), tail=30.0, blame=2.0)}
    values = {name: one[1].tolist() for name, one in judged.items()}
    assert values["decay-w8a8"] == pytest.approx([3.0, 3.0])  # the third row against the first
    assert values["decay-gated-w8a8"] == pytest.approx([1 - 5 / 3] * 2)
    assert values["decay-gated-norm"] == pytest.approx([3 / 5] * 2)
    assert values["larger-gated-fp"] == pytest.approx([0.01] * 2)
    assert values["norm-ranks-w8a8"] == pytest.approx([1.0] * 2)
    assert values["kurtosis-ranks-w8a8"] == pytest.approx([-1.0] * 2)
    assert judged["decay-gated-w8a8"][4] == "" and judged["larger-gated-norm"][4].startswith(
        "vanilla has no outliers"
    )
    assert judged["decay-gated-norm"][3] == "10.1 (bondarenko2023, table 6 OPT-125m)"  # 87.7 / 8.7
    assert judged["mse-w6a8"][3] == "13.3 (bondarenko2023, table 10 BERT-base)"  # log(598 / 4.49) / log(6.49 / 4.49)
    few = rows()[lambda t: ~t["method"].str.endswith("larger")]
    there = {id.partition("-")[2]: one for id, *one in runs.of_tables(few, tail=30.0, blame=2.0)}
    lacking = {
        name for name, one in there.items() if one[4] == "such a model is not trained here" and not len(one[1])
    }
    assert lacking == {"larger-gated-norm", "larger-gated-w8a8", "larger-gated-fp"} and {*there} == {*judged}
    quiet = rows().assign(cost=lambda t: t["cost"].where(~t["setting"].str.contains("token"), t["cost"] * 9))
    judged = {id.partition("-")[2]: one for id, *one in runs.of_tables(quiet, tail=30.0, blame=2.0)}
    assert judged["decay-gated-w8a8"][4].startswith("outliers are not to blame")


def test_every_claim_of_the_study_is_known_and_none_is_left_out():
    steps = [(g, a, s, 9, 2.0, 3.0, 4.0) for g in (False, True) for a in finetuned.ATTENTIONS for s in (1, 2)]
    columns = ["gates", "attention", "seed", "step", "loss", "max inf norm", "tensor kurtosis"]
    judged = runs.of_tables(rows(), 30.0, 2.0) + runs.of_tuned(pd.DataFrame(steps, columns=columns))
    ids = {one[0] for one in judged} - {""}
    of_tables = {
        one.id for one in reference.claims("03_quant") if one.item.startswith(("Table", "section", "abstract"))
    }
    theirs = {one for one in of_tables if one.startswith("bondarenko2023-") and "-lab-" not in one}
    methods = {f"bondarenko2023-{one}" for one in ("clipped", "gated")}
    theirs -= {f"{one}-{name}" for one in methods for name in ("norm", "w8a8", "fp")}
    assert ids == theirs
    for id, _, _, rule, *_ in judged:
        assert not id or rule.lstrip("-") in reference.claim(id).tolerance


@pytest.fixture
def base(out):
    """A trained model."""
    return train.train(BASE, report=lambda *_: None)


def task(base, gates, attention):
    kind = finetuned._GATES[gates]
    model = dataclasses.replace(SMALL, attention=type(SMALL.attention)(**kind))
    start = f"{base.config.name}, attention {attention}"
    config = dataclasses.replace(BASE, model=model, start=start, lr=1e-4, sites=READ_AT["clm"][1])
    return finetuned.Task(base.config, gates, attention, config)


def test_gates_near_one_leave_the_model_nearly_as_it_was_and_drawing_anew_does_not(base):
    ids = torch.randint(0, SMALL.vocab, (4, SMALL.context))
    with torch.no_grad():
        exact = clm_loss(base.load()(ids), ids)
        started = {a: finetuned.started(task(base, True, a)).eval() for a in finetuned.ATTENTIONS}
        plain = finetuned.started(task(base, False, "kept")).eval()
        assert torch.equal(plain(ids), base.load()(ids))
        assert float(clm_loss(started["kept"](ids), ids)) == pytest.approx(float(exact), abs=0.02)
    own, kept = started["drawn anew"].state_dict(), base.load().state_dict()
    changed = {name for name in kept if not torch.equal(own[name], kept[name])}
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in changed} == {
        f"attention.{one}" for one in ("q", "k", "v", "attn_out")
    }
    assert float(own["blocks.0.attention.q.weight"].abs().max()) <= SMALL.width**-0.5  # as nn.Linear draws


def test_fine_tuning_is_recorded_and_read_back_as_a_table(base, monkeypatch):
    tasks = [task(base, gates, a) for a in finetuned.ATTENTIONS for gates in (False, True)]
    found = finetuned.table(tasks)
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(finetuned.table(tasks), found)
    assert (
        found["step"].tolist() == [4] * 4 and np.isfinite(found.drop(columns=["attention"]).astype(float)).all().all()
    )
