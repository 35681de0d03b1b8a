"""The healing of a checkpoint: what is asked, recorded and read back."""

import pandas as pd
import pytest

from ofutils import UserError, hub
from ofutils.studies.quant import figures, healing


@pytest.fixture
def few(out, monkeypatch):
    """Two ways of one step each, on a stand-in."""
    ways = {way: healing.WAYS[way] for way in ("nothing", "penalty on kurtosis", "gates")}
    monkeypatch.setattr(healing, "WAYS", ways)
    return healing.tasks(hub.STAND_IN, seeds=1, steps=1, judged=4, text=16)


def test_a_healing_is_judged_recorded_and_read_back(few):
    judged, steps = healing.tables(few)
    assert list(judged["way"].unique()) == ["nothing", "penalty on kurtosis", "gates"]
    assert len(judged) == 3 * 3 * 3 and len(steps) == 2  # ways x kinds of ranges x draws; one step of each
    untouched = judged[judged["way"] == "nothing"]
    assert (untouched["own"] == untouched["original"]).all()
    exact = judged["ranges"] == "full precision"
    assert judged[exact]["own"].abs().max() < 1e-9 < judged[~exact]["own"].min()
    again = [healing.recall(task)["result"] for task in few]
    assert [row for one in again for row in one["rows"]] == judged.drop(columns=["way", "seed"]).to_dict("records")
    pd.testing.assert_frame_equal(healing.tables(few)[0], judged)
    assert [len(values) for _, values in healing.verdicts(judged)] == [1, 1]


def test_without_records_a_large_model_has_no_rows_and_an_empty_figure(out):
    found = healing.planned("no/such-model", "small")
    assert found == []
    judged, steps = healing.tables(found)
    assert judged.empty and steps.empty and healing.verdicts(judged) == []
    assert "nothing is recorded" in figures.healing(judged, steps, "x").get_suptitle()


def test_a_task_that_fails_is_named(few, monkeypatch):
    monkeypatch.setattr(healing, "heal", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="penalty on kurtosis of stand-in/.*: ZeroDivisionError"):
        healing.run(few, workers=0)
