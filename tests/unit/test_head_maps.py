"""Single heads: their maps, gates, blind heads, and what is compared with random dimensions."""

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from ofutils import UserError, families, hub, probes
from ofutils.sentences import GROUPS, token_groups
from ofutils.studies.attention_sinks import figures, maps, statistics
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import ENCODER

GATED = TransformerConfig(vocab=40, layers=2, width=16, heads=2, context=8, attention={"gate": "linear"})


# --- maps


@pytest.mark.parametrize("config", [ENCODER, GATED], ids=["plain", "gated"])
def test_a_map_is_what_the_head_does(config):
    model, ids = Transformer(config).eval(), torch.randint(0, 40, (2, 6))
    found = maps.head_map(model, ids, 1, 1)
    with probes.capture(model, ["gated", "probs"]) as kept:
        probes.run(model, ids[:1])
    assert torch.allclose(found.probs, kept["blocks.1.probs"][0, 1], atol=1e-6)
    torch.testing.assert_close(found.product, found.probs @ found.values)
    behind = found.product if found.gate is None else found.gated
    torch.testing.assert_close(behind, kept["blocks.1.gated"][0].unflatten(-1, (config.heads, -1))[:, 1])
    assert (found.gate is None) == (config is ENCODER)


def test_no_such_block_or_head():
    model, ids = Transformer(ENCODER).eval(), torch.randint(0, 40, (1, 6))
    with pytest.raises(UserError, match="no block 3"):
        maps.head_map(model, ids, 3, 0)
    with pytest.raises(UserError, match="heads 0 to 3"):
        maps.head_map(model, ids, 0, 4)


def test_a_gallery_has_a_row_for_each_head_and_a_point_for_each_token():
    ids = torch.randint(0, 40, (1, 5))
    picks = [
        (c.attention.gate, maps.head_map(Transformer(c).eval(), ids, 0, 0), list("abcde")) for c in (ENCODER, GATED)
    ]
    fig, points = maps.gallery(picks, "two heads")
    assert isinstance(fig, Figure) and len(points) == 10 and fig.get_suptitle() == "two heads"
    assert points["gate"].isna().tolist() == [True] * 5 + [False] * 5
    assert points["received"].groupby(points["head"]).sum().tolist() == pytest.approx([1, 1])


# --- gates


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
def test_gates_are_what_the_context_is_multiplied_by(gate):
    config = TransformerConfig(vocab=40, layers=2, width=16, heads=2, context=8, attention={"gate": gate})
    model, ids = Transformer(config).eval(), torch.randint(0, 40, (3, 8))
    pi = maps.gates(model, [ids[:1], ids[1:]])
    with probes.capture(model, ["context", "gated"]) as kept:
        probes.run(model, ids)
    for block, one in enumerate(pi):
        context, gated = (kept[f"blocks.{block}.{site}"].flatten(0, 1) for site in ("context", "gated"))
        assert one.shape == (24, 2)
        torch.testing.assert_close(gated, (context.unflatten(-1, (2, 8)) * one[..., None]).flatten(1))
    assert not model.blocks[0].attention.gate._forward_hooks


def test_gates_leave_padding_out_and_need_gates():
    config = TransformerConfig(vocab=40, layers=1, width=16, heads=2, context=8, attention={"gate": "linear"})
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(0, 40, (2, 4)), "attention_mask": mask}
    assert maps.gates(Transformer(config).eval(), [batch])[0].shape == (5, 2)
    with pytest.raises(UserError, match="unknown site 'gate'"):
        maps.gates(Transformer(ENCODER), [])


# --- heads that do not read a dimension


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_blind_maps_read_as_if_the_dimension_were_zero(letter):
    model, ids = Transformer(ENCODER).eval(), torch.randint(0, 40, (2, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with maps.unread(model, [3, 5], letter), probes.capture(model, ["resid_pre", "q", "k", "v"]) as kept:
        probes.run(model, ids)
    attention = model.blocks[0].attention
    for name in ("q", "k", "v"):
        x = kept["blocks.0.resid_pre"].clone()
        if name == letter:
            x[..., [3, 5]] = 0
        torch.testing.assert_close(kept[f"blocks.0.{name}"], getattr(attention, name)(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_hugging_face_model_is_blinded_like_ours():
    model, tokenizer = hub.model(hub.STAND_IN, attn_implementation="eager"), hub.tokenizer(hub.STAND_IN)
    batch, found = dict(tokenizer(["a dog, and a cat."], return_tensors="pt")), []
    for network in (families.with_sites(model), families.from_hf(model)):
        with maps.unread(network, [2], "k"):
            found.append(statistics.survey(network, [batch], token_groups(tokenizer))[1].shares)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_only_dimensions_and_maps_that_there_are():
    model = Transformer(ENCODER).eval()
    with pytest.raises(UserError, match="dimension 16 is out of range"), maps.unread(model, [16]):
        pass
    with pytest.raises(UserError, match="q, k or v"), maps.unread(model, [1], "context"):
        pass


# --- against random dimensions


def test_what_does_not_vary_stands_nowhere():
    probs, hidden = torch.softmax(torch.randn(4, 2, 6, 6), -1), torch.randn(4, 6, 8)
    hidden[..., 2] = 1
    one = statistics.SinkStatistics()
    one.add(probs, hidden, hidden, hidden, hidden, torch.full((4, 6), 3))
    found = maps.standing([[one]], {"constant": [2], "with another": [2, 3]}, [4, 5, 6, 7]).groupby("rule")["r"]
    assert found.min().isna().tolist() == [True, False]


def test_standing_finds_a_planted_dimension_and_not_one_that_is_like_all_others():
    torch.manual_seed(0)
    probs = torch.softmax(3 * torch.randn(8, 2, 10, 10), -1)
    hidden, v = torch.randn(8, 10, 40), torch.randn(8, 10, 4)
    hidden[..., 7] = 5 * probs.mean((1, 2))
    one = statistics.SinkStatistics()
    one.add(probs, v, v, hidden, hidden, torch.full((8, 10), 3))
    others = [d for d in range(40) if d not in (7, 8)]
    rules = {"planted": [8, 7], "plain": [8], "empty": []}
    found = maps.standing([[one]], rules, others).set_index(["rule", "hidden"])
    assert found.loc[("planted", "input"), "r"] > 0.6 > found.loc[("plain", "input"), "r"]
    assert found.loc[("planted", "input"), "excess"] > 0.3
    # the largest of two is larger than the largest of one, for random sets too
    assert found.loc[("planted", "input"), "random sets"] >= found.loc[("plain", "input"), "random sets"]
    assert set(found.index.get_level_values("rule")) == {"planted", "plain"}


def test_language_heads_have_gates_where_there_are_any():
    ids = [torch.randint(0, 40, (2, 8))]
    model = Transformer(GATED).eval()
    rows = maps.language_heads(model, ids)
    pi = maps.gates(model, ids)
    assert [(row["block"], row["head"]) for row in rows] == [(b, h) for b in range(2) for h in range(2)]
    assert rows[2]["pi"] == pytest.approx(float(pi[1][:, 0].mean())) and rows[2]["passed"] < rows[2]["output"]
    plain = maps.language_heads(Transformer(ENCODER).eval(), ids)
    assert all(row["pi"] != row["pi"] and row["passed"] == row["output"] for row in plain)


def test_outliers_are_drawn_per_occurrence():
    x, ids = torch.zeros(3, 6, 50), torch.tensor([[2, 20, 3, 20, 20, 4]] * 3)
    x[:, 2, 4] = x[0, 5, 4] = x[0, 1, 9] = 100
    one = statistics.OutlierCounts(*statistics._count(x, ids, torch.ones(3, 6, dtype=torch.bool), 60, 6))
    tokenizer = hub.tokenizer(hub.STAND_IN)
    groups = token_groups(tokenizer)
    panels, kinds = maps.outlier_panels([one, one], [6] * 6, groups, tokenizer)
    rate, position, dimension = (panels[name][0] for name in panels)
    assert rate.tolist() == pytest.approx([1, 1 / 3, 1 / 9]) and kinds[0] == "separator"
    assert position.tolist() == pytest.approx([0, 1 / 3, 1, 0, 0, 1 / 3]) and dimension.to_dict() == {4: 8, 9: 2}
    bars = pd.DataFrame([[0.25] * 4] * 2, ["block 0", "all tokens"], GROUPS)
    fig = figures.outliers(bars, panels, kinds, dict(zip(GROUPS, GROUPS, strict=True)), "outliers")
    assert len(fig.axes[1].patches) == 3
