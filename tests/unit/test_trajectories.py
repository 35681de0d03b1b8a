"""What runs measured while they trained, as a table; and what 08_optimizers makes of it."""

import dataclasses

import matplotlib
import pandas as pd
import pytest

from ofutils import probes, sweep, train, trajectories
from ofutils.batches import fixed_batches
from ofutils.studies.optimizers import runs
from ofutils.train import TrainConfig
from tests.configurations import SMALL

matplotlib.use("agg")

CONFIG = TrainConfig(model=SMALL, characters=60_000, batch=4, steps=4, warmup=1, measure_every=2, eval_batches=1)
EVALUATION = sweep.Evaluation(sites=("resid_pre",), batches=1, batch=4, meters=("neuron_kurtosis",))


def outcome(**settings):
    meters = ("neuron_kurtosis", "input_correlation_rms")
    config = dataclasses.replace(CONFIG, meters=meters, **settings)
    return sweep.perform(sweep.Job("vanilla", config, (), EVALUATION), report=lambda step, loss: None)


def test_a_row_is_what_the_log_says_of_a_block(out):
    one = outcome(sites=("resid_pre", "resid_post", "probs"))
    table = trajectories.layers([one])
    assert table["step"].unique().tolist() == [2, 4] and table["block"].unique().tolist() == ["0", "1", "out"]
    last = one.run.log[-1]["sites"]
    row = table.set_index(["step", "block"]).loc[4]
    assert row.loc["1", "kurtosis"] == last["blocks.1.resid_pre"]["neuron_kurtosis"] - 1
    assert row.loc["out", "kurtosis"] == last["blocks.1.resid_post"]["neuron_kurtosis"] - 1
    assert row.loc["0", "entropy"] == last["blocks.0.probs"]["attention_entropy"]
    assert row["scale"].isna().all() and pd.isna(row.loc["out", "entropy"])
    measured = probes.measure(
        one.run.load(),
        fixed_batches(train.load_tokens(one.run.config).validation, 1, 4, SMALL.context),
        "resid_pre",
        meters=("neuron_kurtosis",),
    ).summary()["sites"]
    assert row.loc["1", "kurtosis"] + 1 == pytest.approx(measured["blocks.1.resid_pre"]["neuron_kurtosis"])


def test_without_a_last_site_there_is_no_row_of_it(out):
    assert trajectories.layers([outcome(sites=("resid_pre",))])["block"].unique().tolist() == ["0", "1"]
    assert trajectories.layers([]).empty


def test_small_multiples_have_a_panel_for_each_block_that_was_measured(out):
    table = trajectories.layers([outcome(sites=("resid_pre", "probs"))])
    for column in ("kurtosis", "entropy"):
        fig = trajectories.small_multiples(table, column, column, "title", {"vanilla": "k"})
        titles = [ax.get_title() or ax.get_title("left") for ax in fig.axes if ax.get_visible()]
        assert titles == ["block 0", "block 1"]


def test_peaks_are_the_largest_over_blocks_and_training_but_for_what_leaves_the_last(out):
    one = outcome(sites=("resid_pre", "resid_post"))
    table = trajectories.layers([one])
    (row,) = trajectories.peaks([one], table).to_dict("records")
    inner = table[table["block"] != "out"]
    assert row["peak"] == inner["kurtosis"].max() and row["loss"] == one.measured["loss"]
    assert row["end"] == inner[inner["step"] == 4]["kurtosis"].max() and pd.isna(row["scale"])
    assert row["rms correlation"] == inner["rms correlation"].max() and row["rate"] == CONFIG.lr


@pytest.fixture
def plane():
    """A table of runs: the loss of seed 0 chooses, and seeds 1 and 2 have a peak of 10 x seed x rate."""
    losses = {("A", 1e-3): 5.0, ("A", 3e-3): 5.05, ("A", 1e-2): 5.2, ("B", 1e-3): 6.0, ("B", 1e-2): 4.0}
    return pd.DataFrame(
        {"method": m, "seed": seed, "rate": rate, "loss": loss - seed, "peak": 10 * seed * rate}
        for (m, rate), loss in losses.items()
        for seed in range(3)
    )


def test_the_first_seed_chooses_the_largest_good_rate(plane):
    assert runs.own_rates(plane, 0.1) == {"A": 3e-3, "B": 1e-2}
    assert runs.own_rates(plane, 0.0) == {"A": 1e-3, "B": 1e-2}
    plane.loc[plane["seed"] > 0, "loss"] = 0.0  # what is judged has no say
    assert runs.own_rates(plane, 0.1) == {"A": 3e-3, "B": 1e-2}


def test_the_other_seeds_are_judged(plane):
    same, own = runs.at_rates(plane, 1e-2), runs.at_rates(plane, runs.own_rates(plane, 0.1))
    assert same.index.tolist() == [1, 2]
    assert same["peak"]["A"].tolist() == pytest.approx([0.1, 0.2]) and own["peak"]["A"].tolist() == [0.03, 0.06]
    assert own["loss"]["B"].tolist() == [3.0, 2.0]
