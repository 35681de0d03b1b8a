"""Attention sinks: known answers on constructed attention, padding, parts and wholes, and what cannot be."""

import math
import string

import pytest
import torch
import transformers

from ofutils import UserError, attention, dims, families, hub, metrics, probes
from ofutils.sentences import token_groups
from ofutils.streaming import Statistics
from ofutils.studies.attention_sinks import statistics
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import ENCODER


def tensors(rows=3, length=6, heads=2, width=8):
    """What `add` takes: random attention, values and hidden states; start first, separator last."""
    probs = torch.softmax(2 * torch.randn(rows, heads, length, length), -1)
    v = torch.randn(rows, length, width)
    context = (probs @ v.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    groups = torch.full((rows, length), 3)
    groups[:, 0], groups[:, 2], groups[:, -1] = 0, 2, 1
    return [probs, v, context, torch.randn(rows, length, width), torch.randn(rows, length, width), groups]


def survey(parts, mask=None, **options):
    found = statistics.SinkStatistics()
    found.add(*parts, mask, **options)
    return found


def assert_same(a, b, tolerance=1e-5, variants=statistics.CORRELATIONS):
    near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close([a.shares, a.values], [b.shares, b.values], **near)
    torch.testing.assert_close(a.numbers, b.numbers, **near)
    for variant in variants:
        torch.testing.assert_close(a.correlation(variant), b.correlation(variant), rtol=tolerance, atol=tolerance)


# --- known answers


def test_uniform_attention():
    parts = tensors(length=6)
    parts[0] = torch.full((3, 2, 6, 6), 1 / 6)
    found = survey(parts)
    expected = torch.tensor([1, 1, 1, 3], dtype=torch.float64) / 6
    assert torch.allclose(found.shares, expected.expand(2, 4), atol=1e-6)
    assert torch.allclose(found.numbers["evenness"], torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.numbers["largest"], torch.full((2,), 1 / 6, dtype=torch.float64), atol=1e-6)
    assert found.correlation().isnan().all() and found.numbers["zeros"].sum() == 0


def test_all_attention_on_one_column():
    parts = tensors(rows=1, length=5)
    parts[0] = torch.zeros(1, 2, 5, 5)
    parts[0][:, 0, :, 0] = 1  # the start
    parts[0][:, 1, :, 3] = 1  # a word
    lengths = torch.tensor([0.1, 1.0, 2.0, 4.0, 8.0])
    parts[1] = torch.zeros(1, 5, 8)
    parts[1][0, :, 0] = parts[1][0, :, 4] = lengths
    parts[2] = torch.cat([parts[1][:, :1, :4], parts[1][:, 3:4, 4:]], -1).expand(1, 5, 8)
    found = survey(parts)
    assert found.shares.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert found.numbers["evenness"].tolist() == [0, 0] and found.numbers["largest"].tolist() == [1, 1]
    assert found.numbers["zeros"].tolist() == [0.8, 0.8]
    # others of the start: 1 2 4 8, of position 3: 0.1 1 2 8; the lower median of four
    assert found.numbers["value_ratio"].tolist() == pytest.approx([0.1 / 2, 4 / 1])
    assert found.numbers["output"].tolist() == pytest.approx([0.1 / 2, 4 / 1])


def test_a_planted_correlation_is_found_in_its_dimension_and_variant():
    parts = tensors(rows=4, length=12)
    received = parts[0].mean(2)  # (rows, heads, keys)
    before, after = parts[3], parts[4]
    before[..., 5] = -3 * received[:, 0]  # |h| goes with head 0, whatever its sign
    after[..., 6] = 1 - received[:, 1]  # and against head 1 behind the block
    found = survey(parts)
    assert found.correlation("input")[0, 5] == pytest.approx(1, abs=1e-6)
    assert found.correlation("words")[0, 5] == pytest.approx(1, abs=1e-6)
    assert found.correlation("output")[1, 6] == pytest.approx(-1, abs=1e-6)
    assert found.correlation("input")[0].abs().argmax() == 5


def test_correlation_is_pearsons_r():
    parts = tensors(rows=5, length=9)
    found, (probs, _, _, before, after, groups) = survey(parts), parts
    words = groups > 1
    for variant, hidden, kept in (
        ("input", before, groups >= 0),
        ("words", before, words),
        ("output", after, groups >= 0),
    ):
        a, x = probs.mean(2).transpose(1, 2), hidden.abs()
        if variant != "output":  # deviations from the mean of each row
            means = [(one * kept[..., None]).sum(1, keepdim=True) / kept.sum(1)[:, None, None] for one in (a, x)]
            a, x = a - means[0], x - means[1]
        a, x = a[kept], x[kept]
        expected = torch.corrcoef(torch.cat([a, x], 1).double().T)[:2, 2:]
        torch.testing.assert_close(found.correlation(variant), expected, rtol=1e-6, atol=1e-6)


def test_what_is_constant_has_no_correlation():
    parts = tensors()
    parts[3][..., 1] = 0.7
    r = survey(parts).correlation()
    assert r[:, 1].isnan().all() and not r[:, 2].isnan().any()


def test_clipped_attention_does_not_upset_the_entropy():
    parts = tensors()
    parts[0] = attention.clipped_softmax(torch.randn(3, 2, 6, 6) * 4, -0.1)
    found = survey(parts)
    shares = parts[0].mean(2).double()
    shares /= shares.sum(-1, keepdim=True)
    expected = (torch.special.entr(shares).sum(-1) / math.log(6)).mean(0)
    assert torch.allclose(found.numbers["evenness"], expected, atol=1e-6)
    assert torch.allclose(found.numbers["zeros"], (parts[0] == 0).double().mean((0, 2, 3)))


def test_heads_that_attend_to_nothing_at_all_stay_finite():
    parts = tensors()
    parts[0] = torch.zeros_like(parts[0])
    found = survey(parts)
    assert (
        found.numbers["zeros"].tolist() == [1, 1]
        and found.numbers["evenness"].tolist() == [0, 0]
        and found.shares.sum() == 0
    )
    assert found.numbers["value_ratio"].isfinite().all()


def test_keys_that_a_causal_query_cannot_see_are_no_zeros():
    parts = tensors()
    parts[0] = torch.softmax(torch.randn(3, 2, 6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf), -1)
    assert survey(parts, causal=True).numbers["zeros"].tolist() == [0, 0]
    assert survey(parts).numbers["zeros"].tolist() == pytest.approx([15 / 36] * 2)


def test_hard_attention_to_the_first_token_is_not_taken_for_causal():
    parts = tensors()
    parts[0] = torch.zeros(3, 2, 6, 6)
    parts[0][..., 0] = 1
    assert survey(parts).numbers["zeros"].tolist() == pytest.approx([5 / 6] * 2)


def test_the_largest_column_is_a_share_of_what_is_handed_out():
    parts = tensors()
    whole = survey(parts)
    parts[0] = parts[0] * 0.3  # as if clipped
    assert torch.allclose(survey(parts).numbers["largest"], whole.numbers["largest"], atol=1e-6)


def test_a_head_undrained_hands_on_what_its_other_attention_finds():
    parts = tensors(rows=1, length=4, heads=1, width=2)
    parts[0] = torch.tensor([0.8, 0.15, 0.05, 0.0]).expand(1, 1, 4, 4)
    parts[1] = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    parts[2] = (parts[0] @ parts[1][:, None])[:, 0]
    parts[5] = torch.tensor([[0, 3, 3, 1]])
    found, median = survey(parts), 4.0  # of 2, 4 and 12.7: the sink, which is the start, is left out
    assert float(found.numbers["output"]) == pytest.approx(math.hypot(0.3, 0.2) / median)
    assert float(found.numbers["undrained"]) == pytest.approx(math.hypot(1.5, 1.0) / median)
    assert found.values[0, 3] == pytest.approx(math.sqrt(8) / median) and found.values[0, 2].isnan()
    assert found.values[0, 1] == pytest.approx(math.hypot(9, 9) / median)


def test_undrained_attention_hands_out_as_much_as_before():
    parts = tensors()
    parts[0], parts[5] = parts[0] * 0.25, torch.full((3, 6), 3)  # as if clipped; no special tokens
    parts[2] = (parts[0] @ parts[1].unflatten(-1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    found = survey(parts)
    assert torch.allclose(found.numbers["undrained"], found.numbers["output"], atol=1e-6)


def test_a_head_of_constant_attention_is_left_out_of_the_mean_over_heads():
    parts = tensors(rows=8)
    parts[0][:, 0] = 1 / 6
    found = survey(parts)
    r = found.correlation()
    assert r[0].isnan().all() and r[1].isfinite().all()
    assert all(torch.equal(part, r[1]) for part in statistics.over_heads(r))
    assert [row["r"] for row in statistics.correlations([found])] == r[1].tolist()
    assert statistics.over_heads(r[:1])[1].isnan().all()


def test_what_passes_a_gate():
    parts = tensors()
    assert torch.equal(survey(parts).numbers["passed"], survey(parts).numbers["output"])
    assert torch.allclose(survey(parts, gated=parts[2] / 4).numbers["passed"], survey(parts).numbers["output"] / 4)


def test_attention_alone_gives_the_same_numbers_of_attention():
    parts, mask = padded(tensors())
    alone = statistics.SinkStatistics()
    alone.add_attention(parts[0], parts[5], mask)
    whole = survey(parts, mask)
    assert torch.equal(alone.shares, whole.shares) and set(alone.numbers) == {"evenness", "largest", "zeros"}
    assert all(torch.equal(values, whole.numbers[name]) for name, values in alone.numbers.items())


def test_the_level_of_a_row_is_no_correlation():
    parts = tensors(rows=4, length=9)
    mask = torch.arange(9) < torch.tensor([3, 9, 4, 8])[:, None]
    parts[3] = parts[3].abs() + 1
    before = survey(parts, mask).correlation("input")
    parts[3] = parts[3] + torch.tensor([500.0, 1000.0, 0.0, 2000.0])[:, None, None]  # rows differ in level alone
    torch.testing.assert_close(survey(parts, mask).correlation("input"), before, rtol=1e-3, atol=1e-3)


# --- padding, parts, wholes


def padded(parts, more=4):
    """The same rows with padding that holds numbers of its own, and the mask."""
    rows, length = parts[5].shape
    mask = torch.arange(length + more).expand(rows, -1) < length
    probs = torch.rand(rows, parts[0].shape[1], length + more, length + more)
    probs[:, :, :length, :length], probs[:, :, :length, length:] = parts[0], 0.3  # also where a query sees padding
    others = [torch.cat([x, 50 * torch.randn(rows, more, x.shape[-1])], 1) for x in parts[1:5]]
    return [probs, *others, torch.cat([parts[5], torch.zeros(rows, more, dtype=torch.long)], 1)], mask


def test_padding_counts_nowhere_as_query_or_key():
    parts = tensors()
    assert_same(survey(*padded(parts)), survey(parts), variants=("input", "words"))


def test_padding_counts_where_the_authors_count_it():
    parts, mask = padded(tensors())
    a = parts[0].mean(2).transpose(1, 2)[mask]
    expected = torch.corrcoef(torch.cat([a, parts[4].abs()[mask]], 1).double().T)[:2, 2:]
    found = survey(parts, mask).correlation("output")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_batches_may_be_split_and_merged():
    parts = tensors(rows=5)
    halves = [survey([x[rows] for x in parts]) for rows in (slice(0, 2), slice(2, 5))]
    together = statistics.SinkStatistics()
    for rows in (slice(0, 1), slice(1, 5)):
        together.add(*(x[rows] for x in parts))
    assert_same(halves[0].merge(halves[1]), survey(parts), 1e-9)
    assert_same(together, survey(parts), 1e-9)


def test_a_row_of_one_token_is_left_out():
    parts = tensors(rows=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 1:] = False
    assert_same(survey(parts, mask), survey([x[:1] for x in parts]))


def test_an_unknown_hidden_state_is_an_error():
    with pytest.raises(UserError, match="known: input, words, output"):
        survey(tensors()).correlation("inputs")


# --- models


def test_pieces_of_roberta_and_of_sentencepiece_lose_their_marks():
    class Tokenizer:
        pieces = ("<s>", "</s>", "Ġ.", "Ġ...", '("', "▁,", "Ġa", "Ġ", "##,", "##", "#", "a.")
        all_special_ids, cls_token_id, sep_token_id = (0, 1), 0, 1

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[id] for id in ids]

    assert token_groups(Tokenizer()).tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 2, 2, 2, 3]


@pytest.fixture(scope="module")
def bert():
    model = hub.model(hub.STAND_IN, attn_implementation="eager")
    tokenizer = hub.tokenizer(hub.STAND_IN)
    texts = ["a dog, and a cat.", "who?", "one two three (four)."]
    return model, tokenizer, dict(tokenizer(texts, padding=True, return_tensors="pt"))


def test_groups_of_tokens(bert):
    _, tokenizer, _ = bert
    groups = token_groups(tokenizer)
    of = dict(zip(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), groups.tolist(), strict=True))
    assert of["[CLS]"] == 0 and of["[SEP]"] == 1
    assert {of[mark] for mark in string.punctuation} == {2}
    assert {of[other] for other in ("[PAD]", "[MASK]", "[UNK]", "a", "##a", "7")} == {3}
    assert len(groups) == len(tokenizer)


def test_a_survey_reads_a_hugging_face_bert_as_the_authors_do(bert):
    model, tokenizer, batch = bert
    found = statistics.survey(families.with_sites(model), [batch], token_groups(tokenizer))
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    for layer, one in enumerate(found):
        a = output.attentions[layer].mean(-2).transpose(1, 2)[mask]
        h = output.hidden_states[layer + 1].abs()[mask]
        expected = torch.corrcoef(torch.cat([a, h], 1).double().T)[: a.shape[1], a.shape[1] :]
        torch.testing.assert_close(one.correlation("output"), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(one.shares.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-5)


def test_the_converted_model_gives_the_same_but_at_padding(bert):
    model, tokenizer, batch = bert
    groups = token_groups(tokenizer)
    theirs = statistics.survey(families.with_sites(model), [batch], groups)
    ours = statistics.survey(families.from_hf(model), [batch], groups)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-3, variants=("input", "words"))


def test_a_survey_of_batches_does_not_depend_on_how_they_are_cut(bert):
    model, tokenizer, batch = bert
    groups, network = token_groups(tokenizer), families.from_hf(model)
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(3)]
    for a, b in zip(
        statistics.survey(network, rows, groups), statistics.survey(network, [batch], groups), strict=True
    ):
        assert_same(a, b, 1e-4, variants=("input", "words"))


@pytest.mark.parametrize("form", [{"alpha": 2.0}, {"sink_logit": True}, {"sigmoid": True}], ids=str)
def test_a_causal_model_and_plain_ids(form):
    config = TransformerConfig(vocab=40, layers=2, width=16, heads=2, context=12, attention=form)
    model, ids = Transformer(config).eval(), torch.randint(0, 40, (3, 12))
    found = statistics.survey(model, [ids], torch.full((40,), 3))
    with probes.capture(model, "probs") as kept:
        probes.run(model, ids)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = (kept["blocks.1.probs"][:, :, seen] == 0).double().mean((0, 2))
    assert torch.allclose(found[1].numbers["zeros"], expected) and bool(expected.min() > 0.1) is ("alpha" in form)
    torch.testing.assert_close(found[1].shares.sum(-1), kept["blocks.1.probs"].sum(-1).double().mean((0, 2)))
    assert ((found[1].numbers["evenness"] > 0) & (found[1].numbers["evenness"] <= 1)).all()
    assert not model._forward_hooks and not model.blocks[0].attention.probs._forward_hooks


def test_a_sink_that_hangs_on_one_dimension_goes_with_it():
    model = Transformer(ENCODER).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight.fill_(0.1)
            block.norm2.weight[3] = 20  # one dimension large at every token, by its own sign
            block.attention.q.weight.zero_()
            block.attention.q.bias.fill_(1)
            block.attention.k.weight.zero_()
            block.attention.k.weight[:, 3] = 1  # and keys read it alone
    ids, groups = torch.randint(0, 40, (8, 10)), torch.full((40,), 3)
    full = statistics.survey(model, [ids], groups)
    with dims.ablated(model, [3]):
        without = statistics.survey(model, [ids], groups)
    assert full[1].numbers["evenness"].max() < 0.9
    assert torch.allclose(without[1].numbers["evenness"], torch.ones(4, dtype=torch.float64), atol=1e-5)
    assert_same(without[0], full[0], variants=("input",))  # the first block stands before the first norm2


def test_a_table_has_a_row_for_every_head():
    found = statistics.survey(Transformer(ENCODER).eval(), [torch.randint(0, 40, (2, 8))], torch.full((40,), 3))
    rows = statistics.table(found)
    assert [(row["block"], row["head"]) for row in rows] == [(b, h) for b in range(3) for h in range(4)]
    assert rows[5]["evenness"] == float(found[1].numbers["evenness"][1]) and rows[5]["other"] == pytest.approx(1)


def test_correlations_have_a_row_for_every_dimension():
    found = statistics.survey(Transformer(ENCODER).eval(), [torch.randint(0, 40, (4, 8))], torch.full((40,), 3))
    rows = statistics.correlations(found, "output")
    assert [(row["block"], row["dimension"]) for row in rows] == [(b, d) for b in range(3) for d in range(16)]
    r = found[1].correlation("output")[:, 5]
    assert rows[21]["r"] == pytest.approx(float(r.mean())) and rows[21]["low"] <= rows[21]["r"] <= rows[21]["high"]
    assert rows[21]["hidden"] == "output" and rows[21]["high"] == pytest.approx(float(r.max()))


def test_a_survey_of_attention_alone_is_the_same(bert):
    model, tokenizer, batch = bert
    groups, network = token_groups(tokenizer), families.with_sites(model)
    whole, alone = (statistics.survey(network, [batch], groups, only_attention=only) for only in (False, True))
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a.shares, b.shares) and torch.equal(a.numbers["evenness"], b.numbers["evenness"])


def test_nothing_to_survey_is_an_error():
    model = Transformer(ENCODER).eval()
    for batches in ([], [torch.zeros(2, 1, dtype=torch.long)]):
        with pytest.raises(UserError, match="no row of two tokens"):
            statistics.survey(model, batches, torch.zeros(40, dtype=torch.long))
    with pytest.raises(UserError, match="no batches"):
        statistics.outliers(model, [], 40)


def test_a_model_without_values_as_a_site_says_so():
    gpt2 = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = families.with_sites(transformers.GPT2Model(gpt2).eval())
    with pytest.raises(UserError, match="unknown site 'v'"):
        statistics.survey(model, [torch.randint(0, 40, (1, 8))], torch.full((40,), 3))


# --- outliers


def test_outliers_are_those_of_the_streaming_statistics():
    model = Transformer(ENCODER).eval()
    with torch.no_grad():
        model.blocks[1].mlp_out.bias[3] = 40
        model.token_embedding.weight[7] *= 30
    mask = torch.arange(12).expand(6, -1) < torch.tensor([12, 9, 12, 3, 7, 12])[:, None]
    batch = {"input_ids": torch.randint(0, 40, (6, 12)), "attention_mask": mask.long()}
    halves = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    for block, one in enumerate(statistics.outliers(model, halves, 40)):
        with probes.capture(model, f"blocks.{block}.mlp_out") as kept:
            probes.run(model, batch)
        expected = Statistics(("outlier_share",))
        expected.add(kept[f"blocks.{block}.mlp_out"], mask)
        assert one.by_dimension.tolist() == expected.sums["outliers_by_dimension"].tolist()
        rows = [metrics.six_sigma(x[None, :n])[0].sum(1) for x, n in zip(*kept.values(), mask.sum(1), strict=True)]
        assert one.by_position.tolist() == torch.nn.utils.rnn.pad_sequence(rows).sum(1).tolist()
        assert one.by_token.sum() == one.by_dimension.sum() and one.tokens.sum() == mask.sum()


def test_outliers_are_counted_by_the_token_they_sit_at(monkeypatch):
    x = torch.zeros(2, 6, 50)
    x[0, 1, 4] = x[0, 1, 9] = x[1, 3, 4] = 100
    ids = torch.tensor([[0, 5, 8, 8, 8, 1], [0, 8, 8, 6, 1, 2]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 5] = False
    one = statistics.OutlierCounts(*statistics._count(x, ids, mask, 10, 6))
    assert one.by_token.nonzero().flatten().tolist() == [5, 6] and one.by_token[[5, 6]].tolist() == [2, 1]
    assert one.by_dimension[[4, 9]].tolist() == [2, 1] and one.by_position.tolist() == [0, 2, 0, 1, 0, 0]
    groups = torch.tensor([0, 1, 3, 3, 3, 2, 3, 3, 3, 3])
    shares = one.by_group(groups)
    assert shares[0].tolist() == pytest.approx([0, 0, 2 / 3, 1 / 3])
    assert shares[1].tolist() == pytest.approx([2 / 11, 2 / 11, 1 / 11, 6 / 11])


def test_no_outliers_have_no_shares():
    one = statistics.OutlierCounts(
        *statistics._count(torch.randn(1, 4, 8), torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), 3, 4)
    )
    assert one.by_group(torch.zeros(3, dtype=torch.long))[0].isnan().all()
