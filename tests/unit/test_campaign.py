"""The queue of all runs: its order, its end in time, and that it goes on where it was left."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ofutils import UserError, campaign, sweep, train
from ofutils.campaign import Command, Task
from ofutils.sweep import Evaluation, Job, Recipe

QUICK = ["03_quant", "--scale", "tiny", "--steps", "12", "--workers", "0"]


@pytest.fixture
def checkout(out, monkeypatch):
    """A checkout without records."""
    monkeypatch.setattr(train.params, "root", lambda: out)
    return out


def recipe(config, name="toy", value=1, seeds=(1, 2), **more):
    evaluation = Evaluation(sites=("resid_post",), batches=1, batch=4)
    jobs = tuple(Job("vanilla", replace(config, seed=seed), (), evaluation) for seed in seeds)
    grid = tuple(Job("vanilla", replace(config, lr=lr), (), replace(evaluation, sites=())) for lr in (1e-2, 3e-2))
    return Recipe(name, "tiny", jobs, grid, value=value, **more)


def lines(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_grids_come_first_then_seeds_then_what_refines(checkout, config, monkeypatch):
    made = {
        "refines": recipe(replace(config, steps=6), "refines", value=0),
        "one": recipe(replace(config, steps=7), "one", value=1),
        "four": recipe(replace(config, steps=8), "four", value=4),
        "waits": recipe(replace(config, steps=9), "waits", value=9, unsettled=("vanilla",)),
    }
    monkeypatch.setattr(sweep, "read_recipe", lambda name, *_: made[name])
    order = [
        (task.recipe.name, "grid" if task.grid else task.job.config.seed) for task in campaign.queue(Command(), made)
    ]
    grids = [(name, "grid") for name in ("waits", "four", "one", "refines") for _ in range(2)]
    assert sorted(order[:8]) == sorted(grids) and order[:2] == grids[:2]
    assert order[8:] == [("four", 1), ("one", 1), ("four", 2), ("one", 2), ("refines", 1), ("refines", 2)]


def test_a_campaign_runs_to_its_end_and_then_does_nothing(checkout, capsys):
    for done in (6, 0):
        with pytest.raises(SystemExit) as end:
            campaign.main([*QUICK, "--minutes", "5"])
        assert end.value.code == 0
        assert f"{done} runs done, 0 to go" in capsys.readouterr().out
    made = sweep.read_recipe("03_quant", "tiny", steps=12)
    records = lines(checkout / "figures" / "records" / "03_quant.tiny.jsonl")
    assert {record["name"].split("-")[0] for record in records} == {"train", "measure", "quant"}
    assert all(sweep.recall(job) for job in made.jobs)


def test_a_killed_campaign_goes_on(out):
    code = "import sys; from pathlib import Path; from ofutils import campaign, params, train; "
    code += "train.SAVE_AFTER = 0.1; params.root = lambda: Path(sys.argv[1]); campaign.main(sys.argv[2:])"
    asked = ["03_quant", "--scale", "tiny", "--steps", "200", "--workers", "0", "--minutes", "5"]
    command = [sys.executable, "-c", code, str(out), *asked]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list((out / "runs").glob("train-*/checkpoint.safetensors")) or not list(out.glob("figures/records/*")):
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (out / "runs" / "records").glob("*.json")}
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert before and all(path.stat().st_mtime_ns == made for path, made in before.items())
    assert "0 to go" in again and "6 runs of" not in again
    assert len(lines(out / "figures" / "records" / "03_quant.tiny.jsonl")) == 6 * 7  # train, measure, five settings


def test_what_does_not_fit_is_set_aside_to_the_bit_and_ends_later(checkout, config, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "FIRST_STEPS", 0.0)
    config = replace(config, steps=600, measure_every=600)
    made = recipe(config)
    straight = train.train(made.jobs[0].config, report=lambda *_: None)
    monkeypatch.setenv("OFUTILS_OUT", str(checkout / "again"))
    task = Task(made, made.jobs[0], False, time.time() + campaign.MEASURING + 0.05)
    campaign.attempt(task, lambda *_: None)
    assert "set aside at step" in capsys.readouterr().out
    assert train.checkpoint(task.job.config).is_file() and sweep.recall(task.job) is None
    campaign.attempt(replace(task, until=time.time() - 1, last=True), lambda *_: None)
    assert "no time for it" in capsys.readouterr().out
    campaign.attempt(replace(task, until=time.time() + 1000, last=True), lambda *_: None)
    assert "loss " in capsys.readouterr().out
    assert sweep.recall(task.job).run.log == straight.log
    assert campaign.predicted(task) == (0.0, campaign.MEASURING)  # it was not timed whole
    monkeypatch.setattr(campaign, "FIRST_STEPS", 1e9)
    other = replace(task, job=made.jobs[1], until=time.time() + 1000)
    campaign.attempt(other, lambda *_: None)
    training, measuring = campaign.predicted(other)
    assert training > 0 and measuring > 0
    capsys.readouterr()
    third = Job("vanilla", replace(config, seed=3), (), made.jobs[0].evaluation)
    campaign.attempt(replace(task, job=third, until=time.time() + training / 2), lambda *_: None)
    assert "no time for it" in capsys.readouterr().out and not train.checkpoint(third.config).is_file()


def test_a_failed_run_costs_itself_only_and_the_exit_code(checkout, capsys, monkeypatch):
    train_ = train.train

    def failing(config, **more):
        if config.model.attention.clips:
            raise RuntimeError("no such kernel")
        return train_(config, **more)

    monkeypatch.setattr(train, "train", failing)
    with pytest.raises(SystemExit) as end:
        campaign.main([*QUICK, "--minutes", "5"])
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert said.count("no such kernel") == 1 and "5 runs done, 1 to go" in said


def test_bad_input_is_one_line(checkout):
    for arguments, message in (
        (["03_qaunt"], "unknown recipe '03_qaunt' .did you mean '03_quant'"),
        (["--scale", "gpus"], "unknown scale 'gpus' .did you mean 'gpu'"),
        (["--minutes", "0"], "minutes must be above 0"),
        (["--minuets", "3"], "unknown parameter 'minuets' .did you mean 'minutes'"),
    ):
        with pytest.raises(UserError, match=message):
            campaign.main(arguments)


def test_learning_rates_follow_from_the_grid(checkout, config, monkeypatch):
    rates = 3e-3, 1e-2, 3e-2, 1e9
    grid = tuple(Job("vanilla", replace(config, lr=lr, warmup=0, clip=1e9), (), Evaluation((), 1, 4)) for lr in rates)
    assert sweep.largest_good_rates(grid) == {}
    outcomes = sweep.run(list(grid), workers=0)
    assert "diverged" in outcomes[3].error
    losses = [outcome.measured["loss"] for outcome in outcomes[:3]]
    for slack in (0.0, 0.1, 10.0):
        best = max(lr for lr, loss in zip(rates, losses, strict=False) if loss <= min(losses) + slack)
        assert sweep.largest_good_rates(grid, slack) == {"vanilla": best}
    recall = sweep.recall
    monkeypatch.setattr(sweep, "recall", lambda job: None if job.config.lr == 1e-2 else recall(job))
    assert sweep.largest_good_rates(grid) == {}
