import pytest
import torch

from ofutils import UserError, heads, hub, metrics, probes
from ofutils.families import from_hf
from ofutils.studies.bert_outliers import damage
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import sentences

FORM = {"causal": False, "norm_position": "post", "activation": "gelu"}
FORM |= {"embedding": {"norm": True, "skip_padding": False}}


@pytest.fixture(scope="module")
def prepared():
    encoder, tokenizer = from_hf(hub.model(hub.STAND_IN)), hub.tokenizer(hub.STAND_IN)
    with torch.no_grad():
        for block in encoder.blocks:
            block.norm2.weight[5] = block.norm2.bias[5] = 0  # a dimension that is off already
            block.norm2.weight[9], block.norm2.bias[9] = 8.0, 30.0  # one on which everything hangs
    texts = sentences(60)
    train = damage.masked(tokenizer, damage.batches(tokenizer, texts[20:]), seed=100)
    head = heads.train_mlm_head(encoder, train, steps=4)
    return encoder, tokenizer, texts, damage.prepare(encoder, tokenizer, texts[:20], head)


def test_untouched_loses_nothing_and_neither_does_a_dimension_that_is_off_already(prepared):
    encoder, _, _, tests = prepared
    before = [parameter.clone() for parameter in encoder.parameters()]
    assert damage.damage(encoder, tests) == pytest.approx({"similarity": 0, "MLM": 0}, abs=1e-9)
    assert damage.damage(encoder, tests, [5]) == pytest.approx({"similarity": 0, "MLM": 0}, abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before, strict=True))


def test_a_dimension_on_which_everything_hangs_costs_more_also_in_one_block_alone(prepared):
    encoder, _, _, tests = prepared
    everywhere, usual = damage.damage(encoder, tests, [9]), damage.damage(encoder, tests, [12])
    first = damage.damage(encoder, tests, [9], "blocks.0.norm2")
    assert min(everywhere["similarity"], first["similarity"]) > 10 * usual["similarity"] > 0
    assert everywhere["MLM"] != first["MLM"] != 0


def test_damage_is_what_the_parts_say(prepared):
    encoder, _, _, tests = prepared
    other = from_hf(hub.model(hub.STAND_IN))
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for block in other.blocks:
            block.norm2.weight[9] = block.norm2.bias[9] = 0
    loss = heads.mlm_loss(other, tests.head, tests.masked) - heads.mlm_loss(encoder, tests.head, tests.masked)
    agreement = metrics.similarity_agreement(tests.whole, probes.embed(other, tests.batches))
    assert damage.damage(encoder, tests, [9]) == pytest.approx({"similarity": 1 - agreement, "MLM": loss})


def test_a_table_holds_every_set_on_every_draw(prepared):
    encoder, tokenizer, texts, tests = prepared
    other = damage.prepare(encoder, tokenizer, texts[:10], tests.head)
    rows = damage.table(encoder, [tests, other], {"nine": [9], "none": []}, "blocks.0.norm2")
    found = [(row["switched off"], row["draw"]) for row in rows]
    assert sorted(found) == [("nine", 0), ("nine", 1), ("none", 0), ("none", 1)]
    expected = damage.damage(encoder, other, [9], "blocks.0.norm2")
    assert rows[found.index(("nine", 1))] == {"switched off": "nine", "draw": 1} | expected


def test_dimensions_at_random_are_others_and_always_the_same():
    found = damage.at_random(8, 2, 50, but=[1, 5])
    assert found == damage.at_random(8, 2, 50, but=[1, 5]) and len(found) == 50
    assert {dim for pair in found for dim in pair} == {0, 2, 3, 4, 6, 7} and all(a < b for a, b in found)
    with pytest.raises(UserError, match="7 dimensions at random are asked for, 6 are left"):
        damage.at_random(8, 7, 1, but=[1, 5])


def test_sentences_keep_their_number_in_little_padding_and_masks_follow_the_seed(prepared):
    encoder, tokenizer, texts, tests = prepared
    assert sum(len(batch["input_ids"]) for batch in tests.batches) == len(tests.whole) == 20
    lengths = [batch["input_ids"].shape[1] for batch in damage.batches(tokenizer, texts)]
    assert lengths == sorted(lengths)
    again, other = (damage.prepare(encoder, tokenizer, texts[:20], tests.head, seed) for seed in (0, 7))
    same = [torch.equal(a[1], b[1]) for a, b in zip(tests.masked, again.masked, strict=True)]
    assert all(same) and not all(torch.equal(a[1], b[1]) for a, b in zip(tests.masked, other.masked, strict=True))
    with pytest.raises(UserError, match="three sentences or more to test on, got 2"):
        damage.prepare(encoder, tokenizer, texts[:2], tests.head)


def straight_through(width: int, constant: float) -> Transformer:
    """Blocks that add nothing; token n is the n-th unit vector, and dimension 0 holds a constant at all of them."""
    encoder = Transformer(TransformerConfig(vocab=8, layers=1, width=width, heads=2, context=8, **FORM, head="none"))
    encoder.embed_norm = torch.nn.Identity()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.token_embedding.weight[:, 1:9] = torch.eye(8)
        encoder.token_embedding.weight[:, 0] = constant
    return encoder.eval()


def test_a_constant_dimension_makes_tokens_alike_and_leaving_it_out_makes_them_orthogonal():
    encoder, c = straight_through(width=16, constant=2.0), 2.0
    ids = torch.tensor([[0, 1, 2, 7], [3, 4, 5, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    rows = damage.geometry(encoder, [{"input_ids": ids, "attention_mask": mask}], {"all": [], "rest": [0]})
    found = {(row["depth"], row["level"], row["cosine over"]): row["mean cosine"] for row in rows}
    assert found[0, "tokens", "all"] == pytest.approx(c**2 / (c**2 + 1))
    assert found[0, "sentences", "all"] == pytest.approx(c**2 / (c**2 + 1 / 3))
    assert found[0, "tokens", "rest"] == pytest.approx(0, abs=1e-9) == found[0, "sentences", "rest"]
    assert len(found) == 2 * 2 * 2


def test_geometry_over_batches_is_the_anisotropy_of_all_tokens(prepared):
    encoder, _, _, tests = prepared
    rows = damage.geometry(encoder, tests.batches, {"all": [], "rest": [9]})
    found = {row["cosine over"]: row["mean cosine"] for row in rows if (row["depth"], row["level"]) == (2, "tokens")}
    tokens = []
    for batch in tests.batches:
        with probes.capture(encoder, "blocks.1.norm2") as kept:
            probes.run(encoder, batch)
        tokens.append(kept["blocks.1.norm2"][batch["attention_mask"].bool()])
    tokens, rest = torch.cat(tokens), [dim for dim in range(encoder.config.width) if dim != 9]
    assert found["all"] == pytest.approx(float(metrics.anisotropy(tokens)), rel=1e-5)
    assert found["rest"] == pytest.approx(float(metrics.anisotropy(tokens[:, rest])), rel=1e-4)
    assert found["all"] > 0.9 > found["rest"]


def test_a_profile_says_at_which_tokens_and_with_which_sign():
    model = Transformer(TransformerConfig(vocab=60, layers=3, width=32, heads=2, context=8, **FORM)).eval()
    ids = torch.tensor([[1, 2, 3, 0], [1, 4, 2, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    groups = torch.full((60,), 1)
    groups[1] = 0  # id 1 starts every row
    row, other = damage.profile(
        model, [{"input_ids": ids, "attention_mask": mask}], [3, 8], groups, ("start", "other"), "blocks.2.norm2"
    )
    with probes.capture(model, "blocks.2.norm2") as kept, torch.no_grad():
        model(ids, attention_mask=mask)
    x = kept["blocks.2.norm2"][mask.bool()][:, 3]
    starts = torch.tensor([0, 3])
    assert row["dimension"] == 3 and other["dimension"] == 8
    assert row["largest |x| at start"] == pytest.approx(float(x[starts].abs().max()))
    assert row["largest |x| at other"] == pytest.approx(float(x[[1, 2, 4, 5, 6]].abs().max()))
    above = float((x > 0).double().mean())
    assert row["one sign"] == pytest.approx(max(above, 1 - above))
