"""06_clipped_softmax_gating's study: where attention and outliers go, its one table, what a form costs."""

import math
from dataclasses import replace
from statistics import NormalDist

import pandas as pd
import pytest
import torch

from ofutils import UserError, data, probes, sweep, train
from ofutils.attention import AttentionConfig
from ofutils.studies.clipped_softmax_gating import costs, figures, runs, sinks
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import SMALL

SHAPE = TransformerConfig(vocab=40, layers=2, width=16, heads=2, context=8, causal=False)
KIND = torch.tensor([[2, 3, 3, 1, 0, 3, 3, 3], [0, 3, 1, 0, 3, 3, 3, 3]])  # first, other, .. line end, separator


@pytest.fixture
def even():
    """A model whose heads look everywhere alike."""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    for block in model.blocks:
        for one in (block.attention.q, block.attention.k):
            torch.nn.init.zeros_(one.weight)
            torch.nn.init.zeros_(one.bias)
    return model


def rows():
    return torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))


def test_a_head_that_looks_everywhere_gives_each_kind_its_share_of_tokens(even):
    found = sinks.look(even, rows(), KIND)
    assert {name: one["tokens"] for name, one in found.items()} == {
        "separator": 3 / 16,
        "line end": 2 / 16,
        "first": 1 / 16,
        "other": 10 / 16,
    }
    for one in found.values():
        assert one["attention"] == pytest.approx(one["tokens"], rel=1e-5)
        assert one["outliers"] != one["outliers"] or 0 <= one["outliers"] <= 1


def test_outliers_are_found_where_they_are_put(even):
    spikes = torch.zeros(2, 8, 16)
    spikes[..., 3] = 100.0 * (sinks.KINDS.index("separator") == KIND)
    with probes.edit(even, "blocks.1.mlp_out", lambda x: 1e-3 * x + spikes):
        found = sinks.look(even, rows(), KIND)
    assert found["separator"]["outliers"] == 1 and found["other"]["outliers"] == 0


def test_what_is_clipped_to_nothing_goes_to_no_kind(even):
    clipping = replace(SHAPE, attention=AttentionConfig(gamma=-0.5))  # 1.5 / 8 - 0.5 lies below 0
    model = Transformer(clipping)
    model.load_state_dict(even.state_dict())
    assert all(one["attention"] == 0 for one in sinks.look(model.eval(), rows(), KIND).values())


def test_kinds_of_tokens_on_real_text(out):
    config = train.TrainConfig(
        model=SMALL, characters=60_000, variant="many separators", bpe=SMALL.vocab - 2, batch=4, steps=2
    )
    tokens = train.load_tokens(config)
    assert isinstance(tokens, data.Tokens)
    ids = torch.from_numpy(tokens.train[: 4 * 32].astype("int64")).view(4, 32)
    found = sinks.kinds(ids, tokens)
    text = [
        [tokens.tokenizer.decode([one]) if one < tokens.tokenizer.get_vocab_size() else "" for one in r] for r in ids
    ]
    for row, words, kind in zip(ids.tolist(), text, found.tolist(), strict=True):
        for place, (one, word, its) in enumerate(zip(row, words, kind, strict=True)):
            if one in tokens.special:
                assert sinks.KINDS[its] == "separator"
            elif "\n" in word:
                assert sinks.KINDS[its] == "line end"
            else:
                assert sinks.KINDS[its] == ("other" if place else "first")
    assert {"separator", "line end"} <= {sinks.KINDS[one] for one in found.flatten().tolist()}


def test_records_are_written_once_and_missing_ones_need_the_machine(out, monkeypatch):
    config = train.TrainConfig(model=SMALL, characters=60_000, batch=4, steps=2, warmup=1, measure_every=2)
    job = sweep.Job("vanilla", config)
    found = sinks.table([job], "tiny")
    assert found["kind"].tolist() == [*sinks.KINDS] and found["tokens"].sum() == pytest.approx(1)
    monkeypatch.setattr(train, "train", None)
    pd.testing.assert_frame_equal(sinks.table([job], "tiny"), found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    other = sweep.Job("vanilla", train.TrainConfig(model=SMALL, characters=60_000, batch=4, steps=3, warmup=1))
    with pytest.raises(UserError, match="06_clipped_softmax_gating at scale gpu needs a GPU: 1 of 1 runs"):
        sinks.table([other], "gpu")


def test_the_one_table_pairs_each_run_with_vanilla_of_its_seed():
    methods = ["vanilla", "sigmoid"]
    opt = pd.DataFrame({"method": methods * 2, "seed": [1, 1, 2, 2], "loss": [2.0, 2.5, 3.0, 2.0]})
    opt = opt.assign(norm=[10.0, 5.0, 20.0, 4.0], W8A8=[0.4, 0.1, 0.2, 0.3])
    looked = pd.DataFrame({"objective": "clm", "method": ["vanilla", "sigmoid"] * 4, "seed": [1, 1, 2, 2] * 2})
    looked = looked.assign(kind=["first"] * 4 + ["line end"] * 4, attention=[0.5, 0.1, 0.2, 0.3, 0.1, 0.4, 0.6, 0.0])
    found = runs.one_table({"OPT, text": opt}, looked).set_index(["method", "seed"])
    assert found.loc["vanilla", ["above", "saved"]].eq(0).all(axis=None)
    assert found["sink"].tolist() == [0.5, 0.4, 0.6, 0.3]  # the kind that gets most
    assert found.loc["sigmoid", "above"].tolist() == [0.5, -1.0]
    assert found.loc["sigmoid", "saved"].tolist() == pytest.approx([0.75, -0.5])


def test_one_gamma_for_all_rows_leaves_short_ones_and_empties_long_ones():
    sums = figures.row_sums(alpha=12, context=512).pivot(index="keys", columns="form", values="kept")
    fixed, by_row = sums["gamma = -alpha / T"], sums["gamma = -alpha / t"]
    assert fixed[1] == by_row[1] == 1
    for keys in (64, 256):
        assert fixed[keys] == pytest.approx(expected(keys, 12 / 512), rel=0.2)
        assert by_row[keys] == pytest.approx(expected(keys, 12 / keys), abs=0.02)


def expected(keys, least):
    """Sum over many keys of the positive part of (1 + least) p - least, p a softmax of standard normal scores."""
    normal, ratio = NormalDist(), math.log((1 + least) / keys / least)
    return keys * ((1 + least) / keys * normal.cdf(ratio + 0.5) - least * normal.cdf(ratio - 0.5))


def test_a_plain_softmax_alone_keeps_no_probabilities_for_the_backward_pass():
    shape = TransformerConfig(vocab=50, layers=2, width=32, heads=4, context=64)
    found = costs.table(shape, batch=2, rounds=1)
    quadratic = 2 * 4 * 64 * 64 * 4  # bytes of one tensor (B, H, T, T) in float32
    ids = torch.randint(50, (2, 64))
    kept = {
        form: costs._kept(costs._model(shape, form), ids) for form in ("vanilla", "clipped softmax", "gate, linear")
    }
    assert kept["clipped softmax"] - kept["vanilla"] >= 2 * quadratic  # in both layers
    assert found["memory"]["clipped softmax"] == pytest.approx(kept["clipped softmax"] / kept["vanilla"])
    assert found["memory"]["vanilla"] == found["time"]["vanilla"] == 1
    assert found["parameters"]["gate, linear"] == 4 * (8 + 1) and found["parameters"]["sink logit"] == 4
