"""The terms of the moments against their definitions, and a followed training against a plain one."""

import dataclasses

import pytest
import torch

from ofutils import UserError, metrics, train
from ofutils.studies.moment_updates import follow, growth
from ofutils.train import TrainConfig
from tests.configurations import SMALL

CONFIG = TrainConfig(
    model=SMALL, characters=60_000, batch=4, steps=12, warmup=2, lr=1e-2, betas=(0.9, 0.95), measure_every=1
)


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)  # X and D, of (3, 7) tokens


def test_terms_are_the_double_sums_of_the_appendix(stream):
    x, change = (one.flatten(0, 1) for one in stream)
    (n, d), expected = x.shape, dict.fromkeys(follow.TERMS, 0.0)
    for j in range(d):
        for a in range(n):
            expected["u21"] += 2 * x[a, j] * change[a, j] / (n * d)
            expected["u22"] += change[a, j] ** 2 / (n * d)
            for b in range(n):
                first, second, p, q = x[a, j], x[b, j], change[a, j], change[b, j]
                expected["u41"] += (2 * first**2 * second * q + 2 * first * p * second**2) / (n**2 * d)
                quadratic = first**2 * q**2 + p**2 * second**2 + 4 * first * p * second * q
                expected["u42"] += quadratic / (n**2 * d)
                expected["u43"] += (2 * first * p * q**2 + 2 * p**2 * second * q) / (n**2 * d)
                expected["u44"] += p**2 * q**2 / (n**2 * d)
    found = follow.terms(*stream)
    assert {name: float(one) for name, one in found.items()} == pytest.approx(
        {name: float(one) for name, one in expected.items()}, rel=1e-10
    )


def test_terms_sum_to_the_change_and_the_even_ones_are_not_negative(stream):
    x, change = stream
    (m2, m4), (later2, later4), found = follow.moments(x), follow.moments(x + change), follow.terms(x, change)
    assert float(m4 / m2**2) == pytest.approx(float(metrics.neuron_kurtosis(x)), rel=1e-12)
    assert float(found["u21"] + found["u22"]) == pytest.approx(float(later2 - m2), rel=1e-10)
    assert float(sum(found[one] for one in growth.FOURTH)) == pytest.approx(float(later4 - m4), rel=1e-10)
    assert min(found["u22"], found["u42"], found["u44"]) >= 0
    opposite, double = follow.terms(x, -change), follow.terms(x, 2 * change)
    for name in follow.TERMS:
        order = int(name[2])
        assert float(opposite[name]) == pytest.approx((-1) ** order * float(found[name]), rel=1e-12)
        assert float(double[name]) == pytest.approx(2**order * float(found[name]), rel=1e-12)


@pytest.fixture
def followed(out):
    task = follow.Task("Pre-LN", 0.9, CONFIG)
    return task, follow.perform(task)


def test_following_changes_nothing_in_the_training(followed):
    task, record = followed
    log = train.train(CONFIG).log
    assert record["result"]["loss"] == [log[step]["train_loss"] for step in (0, 10)]
    assert record["result"]["held_out"] == log[-1]["loss"]


def test_the_terms_of_all_steps_sum_to_the_change_over_the_training(followed):
    task, record = followed
    result = record["result"]
    assert len(result["m4"]) == 3 == len(result["u41"]) + 1
    assert growth.residual([task], [record]) < 1e-12
    steps = growth.over_training([task], [record])
    assert steps["step"].tolist() == [0, 10, 12]
    total = steps[list(growth.FOURTH)].iloc[-1].sum()
    assert total == pytest.approx(result["m4"][-1] - result["m4"][0], rel=1e-9)
    shares = growth.table(steps, [task], [record])[list(growth.FOURTH)]
    assert float(shares.abs().sum(axis=1).iloc[0]) == pytest.approx(1)


def test_a_record_is_recalled(followed, monkeypatch):
    task, record = followed
    monkeypatch.setattr(train, "prepare", None)
    assert follow.perform(task) == record == follow.recall(task)


def test_a_change_that_is_linear_in_the_step_does_not_bend(out, monkeypatch):
    monkeypatch.setattr(follow, "SITE", "embed_sum")  # token and position embeddings: linear in the weights
    task = follow.Task("Pre-LN", 0.9, dataclasses.replace(CONFIG, steps=1, warmup=0))
    assert follow.perform(task)["result"]["bend"] == [pytest.approx(0, abs=1e-5)]


def test_a_training_that_diverges_says_so(out):
    wild = dataclasses.replace(CONFIG, optimizer="sgd", lr=1e30, clip=1e9, warmup=0)
    with pytest.raises(UserError, match="Pre-LN, momentum 0, seed 0: the loss is not finite after step"):
        follow.run("tiny", [follow.Task("Pre-LN", 0.0, wild)], workers=0)


def test_scale_gpu_without_a_gpu_names_what_is_missing(out, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="09_moment_updates at scale gpu needs a GPU: 1 of 1 runs have no record"):
        follow.run("gpu", [follow.Task("Pre-LN", 0.0, CONFIG)])


def test_methods_differ_in_what_they_say(out):
    of = {(task.method, task.momentum): task.config for task in follow.tasks("tiny")}
    plain = of["Pre-LN", 0.0]
    assert len(of) == len(follow.METHODS) * len(follow.MOMENTA) and plain.betas == (0.0, follow.BETA2)
    assert of["Pre-LN, rate x 0.3", 0.0].lr == pytest.approx(0.3 * plain.lr)
    assert of["Pre-LN, eps 1e-4", 0.9] == dataclasses.replace(plain, eps=1e-4, betas=(0.9, follow.BETA2))
    assert of["Pre-LN, SGD", 0.9].optimizer == "sgd" and of["Pre-LN, SGD", 0.9].lr == 0.1
    assert of["OP", 0.0].model.norm == "none"
