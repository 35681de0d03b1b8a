"""What may stand in the softmax's place: gamma by row, sink logits, sigmoid attention."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from ofutils import remedies
from ofutils.attention import AttentionConfig, clipped_softmax, softmax_off_by_one
from ofutils.probes import capture, measure
from ofutils.quant import QuantSettings, calibrate, quantized
from ofutils.records import differing
from ofutils.transformer import Transformer
from tests.configurations import SMALL

FORMS = {
    "row-aware clipped": {"alpha": 2.0, "row_aware": True},
    "sink logit": {"sink_logit": True},
    "sigmoid": {"sigmoid": True},
    "row-aware sigmoid": {"sigmoid": True, "row_aware": True},
}


def build(causal=True, **attention):
    model = Transformer(dataclasses.replace(SMALL, causal=causal, init_std=0.3, attention=attention)).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            if block.attention.sink is not None:
                block.attention.sink.copy_(torch.tensor([-1.0, 2.0]))
    return model


def seen_in(model, rows, mask=None):
    """Scores and probabilities of block 1, and the output."""
    with capture(model, ["blocks.1.scores", "blocks.1.probs"]) as seen, torch.no_grad():
        output = model(rows, mask)
    return seen["blocks.1.scores"], seen["blocks.1.probs"], output


def ids(length=16):
    return torch.randint(0, SMALL.vocab, (3, length))


def row_by_row(form, scores, sink):
    """One query at a time, over the keys that it sees: (t,) -> (t,)."""
    t, own = len(scores), AttentionConfig(**FORMS[form])
    if form == "row-aware clipped":
        return ((1 + 2 / t) * scores.softmax(0) - 2 / t).clamp(0, 1)
    if form == "sink logit":
        return scores.exp() / (math.exp(sink) + scores.exp().sum())
    return 1 / (1 + (t if own.row_aware else SMALL.context) * (-scores).exp())


@pytest.mark.parametrize("length", [16, 11])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_closed_forms_of_every_row(form, causal, length):
    scores, probs, _ = seen_in(build(causal, **FORMS[form]), ids(length))
    for row in range(length):
        keys = row + 1 if causal else length
        for head, sink in enumerate((-1.0, 2.0)):
            for one in range(3):
                expected = row_by_row(form, scores[one, head, row, :keys], sink)
                torch.testing.assert_close(probs[one, head, row, :keys], expected, rtol=1e-12, atol=1e-14)
        assert (probs[:, :, row, keys:] == 0).all()  # exactly: nothing leaks


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_keys_that_padding_hides_are_not_counted(form, causal):
    model, rows = build(causal, **FORMS[form]), ids()
    mask = (torch.arange(16) < 11).long().expand(3, -1)
    _, short, _ = seen_in(model, rows[:, :11])
    _, padded, _ = seen_in(model, rows, mask)
    torch.testing.assert_close(padded[:, :, :11, :11], short, rtol=1e-12, atol=1e-14)
    assert padded.isfinite().all() and (padded[:, :, :11, 11:] == 0).all()


def test_the_sums_of_rows_are_as_stated():
    sums = {form: seen_in(build(**FORMS[form]), ids())[1].sum(-1) for form in FORMS}
    assert sums["row-aware clipped"].max() <= 1 + 1e-12 and (sums["row-aware clipped"][:, :, 1:] < 1).all()
    torch.testing.assert_close(sums["row-aware clipped"][:, :, 0], torch.ones(3, 2).double())  # its only key
    assert sums["sink logit"].min() > 0 and sums["sink logit"].max() < 1
    assert sums["sigmoid"].min() > 0 and (sums["sigmoid"] < torch.arange(1, 17)).all()
    flat = Transformer(dataclasses.replace(SMALL, attention={"sigmoid": True})).double()
    torch.nn.init.zeros_(flat.blocks[1].attention.q.weight)  # all scores are 0
    torch.testing.assert_close(seen_in(flat, ids())[1].sum(-1)[0, 0], torch.arange(1, 17).double() / 17)


# ------------------------------------------------------------------------------------ what contains what


def test_gamma_by_row_is_the_usual_one_where_every_query_sees_the_whole_context():
    aware, usual = build(causal=False, alpha=2.0, row_aware=True), build(causal=False, alpha=2.0)
    usual.load_state_dict(aware.state_dict())
    rows = ids()
    assert torch.equal(seen_in(aware, rows)[1], seen_in(usual, rows)[1])
    assert not torch.allclose(seen_in(aware, rows[:, :11])[1], seen_in(usual, rows[:, :11])[1])


def test_gamma_by_row_asks_for_more_early_and_for_the_same_at_the_end():
    scores, aware, _ = seen_in(build(alpha=2.0, row_aware=True), ids())
    visible = torch.ones(16, 16).bool().tril()
    usual = clipped_softmax(scores.masked_fill(~visible, float("-inf")), -2 / 16)
    torch.testing.assert_close(aware[:, :, -1], usual[:, :, -1], rtol=0, atol=1e-15)
    assert ((aware == 0) & visible)[:, :, :8].sum() > 1.2 * ((usual == 0) & visible)[:, :, :8].sum() > 0


def test_a_sink_logit_of_zero_is_softmax_off_by_one():
    sink, off = build(sink_logit=True), build(off_by_one=True)
    with torch.no_grad():
        for block in sink.blocks:
            block.attention.sink.zero_()
    off.load_state_dict({name: t for name, t in sink.state_dict().items() if not name.endswith("sink")})
    rows = ids()
    assert torch.equal(sink(rows), off(rows))
    fresh = Transformer(dataclasses.replace(SMALL, attention={"sink_logit": True}))
    assert all(block.attention.sink.tolist() == [0.0, 0.0] for block in fresh.blocks)


def test_a_sink_logit_far_below_all_scores_is_the_softmax_and_one_far_above_idles():
    scores, low, high = torch.randn(2, 2, 5, 5), torch.tensor([-1e4, 0.0]), torch.tensor([1e4, 0.0])
    assert torch.equal(softmax_off_by_one(scores, low)[:, 0], scores[:, 0].softmax(-1))
    assert (softmax_off_by_one(scores, high)[:, 0] == 0).all()
    assert torch.equal(softmax_off_by_one(scores, high)[:, 1], softmax_off_by_one(scores)[:, 1])


def test_sink_logits_equal_those_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    theirs = SimpleNamespace(num_key_value_groups=1, sinks=sinks, training=False)
    mask = torch.zeros(6, 6).double().masked_fill(~torch.ones(6, 6).bool().tril(), float("-inf"))
    _, expected = eager_attention_forward(theirs, q, k, v, mask[None, None], 8**-0.5)
    found = softmax_off_by_one(q @ k.transpose(-1, -2) * 8**-0.5 + mask, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------ gradients, statistics, rounding


@pytest.mark.parametrize("size", [0.3, 30.0])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_also_of_saturated_scores(form, size):
    model = Transformer(dataclasses.replace(SMALL, init_std=size, attention=FORMS[form]))
    model(ids()).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if form == "sink logit" and size < 1:
        assert all((block.attention.sink.grad != 0).all() for block in model.blocks)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_probabilities_and_their_rounding(form):
    model, rows = build(**FORMS[form]).float(), [ids(), ids()]
    found = measure(model, rows, "probs").sites["blocks.1.probs"]
    probs = torch.cat([seen_in(model, one)[1] for one in rows]).double()
    assert found.summary()["sink"] == pytest.approx(float(probs[:, :, 8:, 0].mean()), rel=1e-5)
    entropy = -(probs * probs.clamp(min=1e-300).log()).sum(-1).mean()
    assert found.summary()["attention_entropy"] == pytest.approx(float(entropy), rel=1e-4)
    settings = QuantSettings(batches=2)
    ranges = calibrate(model, rows, settings)
    low, high = ranges["blocks.1.probs"]
    assert low == 0 and 0 < high <= 1 and not any("sink" in name for name in ranges)
    with quantized(model, settings, ranges):
        _, rounded, _ = seen_in(model, rows[0])
    step = float(high) / 255
    assert len(rounded.unique()) <= 256 and (rounded / step - (rounded / step).round()).abs().max() < 1e-2


def test_a_model_can_be_healed_into_one_with_sink_logits():
    plain = Transformer(SMALL).eval()
    healing = remedies.Healing(attention={"sink_logit": True}, steps=3, warmup=1)
    healed, log = remedies.heal(plain, [ids(), ids()], healing)
    assert len(log) == 3 and all((block.attention.sink != 0).all() for block in healed.blocks)


def test_the_names_of_older_configurations_stay():
    assert differing(AttentionConfig()) == {} and differing(AttentionConfig(alpha=4.0)) == {"alpha": 4.0}
    assert differing(AttentionConfig(off_by_one=True)) == {"off_by_one": True}
