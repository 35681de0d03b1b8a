"""The blocks that he2024 compares: the authors' streams, closed forms, and what scales with its input."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ofutils import UserError
from ofutils.attention import capped
from ofutils.layers import RMSNorm, make_activation, make_gain, make_norm
from ofutils.probes import capture, edit
from ofutils.transformer import PRE_NORMS, Block, Transformer, TransformerConfig
from tests.configurations import SMALL

OP = {"norm": "none", "residual_gain": 0.2, "final_norm": False, "attention": {"qk_norm": "rmsnorm"}}


def block_of(**form):
    """In float64, with parameters off their start, no biases in its matrices and no eps: what the equations have."""
    block = Block(dataclasses.replace(SMALL, **form), 1).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, (nn.LayerNorm, RMSNorm)):
            module.eps = 0.0
    return block


def build(**form):
    return Transformer(dataclasses.replace(SMALL, **form)).double().eval()


def seen_in(model):
    with capture(model, "*") as seen, torch.no_grad():
        model(torch.arange(32).view(2, 16))
    return seen


# ------------------------------------------------------------------------------------ the authors' blocks


def authors_blocks(tensors, kind, config):
    """Their blocks' parameters in ours, and for each block what their gains on the skip branches add."""
    blocks, skips = [], []
    for index in range(3):
        read = {k.removeprefix(f"{kind}.param.{index}."): t for k, t in tensors.items() if f"param.{index}." in k}
        block = Block(config, index).double()
        state = {
            "attn_gain": read["attn_block_resid_gain"].squeeze(),
            "mlp_gain": read["mlp_block_resid_gain"].squeeze(),
        }
        state["attention.q.weight"], state["attention.k.weight"] = read["attn.qk_attn.weight"].T.chunk(2)
        state["attention.q.bias"], state["attention.k.bias"] = read["attn.qk_attn.bias"].chunk(2)
        ours = {"attention.v": "attn.v_attn", "attention.attn_out": "attn.c_proj", "mlp_fc": "mlp.c_fc"}
        for name, theirs in (ours | {"mlp_out": "mlp.c_proj"}).items():
            state[f"{name}.weight"], state[f"{name}.bias"] = read[f"{theirs}.weight"].T, read[f"{theirs}.bias"]
        per_head = read["attn.attn_mat_resid_gain"].flatten().repeat_interleave(8)  # on each head's output
        state["attention.attn_out.weight"] = state["attention.attn_out.weight"] * per_head
        for one in ("q_norm", "k_norm"):
            if f"attn.{one}.scale" in read:
                state[f"attention.{one}.weight"] = read[f"attn.{one}.scale"]
        for one, theirs in (("norm1", "ln_1"), ("norm2", "ln_2")):
            if f"{theirs}.weight" in read and kind != "post_ln":
                setattr(block, one, nn.LayerNorm(32).double())  # of the OP blocks, the first has one: see below
                state |= {f"{one}.{part}": read[f"{theirs}.{part}"] for part in ("weight", "bias")}
        if kind == "post_ln":  # each of their blocks starts with the norm that ends ours
            following = {k.partition(".ln_1.")[2]: t for k, t in tensors.items() if f"param.{index + 1}.ln_1" in k}
            state |= {f"norm1.{part}": read[f"ln_2.{part}"] for part in ("weight", "bias")}
            state |= {f"norm2.{part}": t for part, t in following.items()}
        left = block.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and set(left.missing_keys) <= {"norm2.weight", "norm2.bias"}
        blocks.append(block)
        skips.append([read[f"{one}_block_skip_gain"] - 1 for one in ("attn", "mlp")])
    return blocks, skips


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("op", OP),
        ("pre_ln", {"residual_gain": 0.5}),
        ("post_ln", {"residual_gain": 0.5, "norm_position": "post"}),
    ],
)
def test_blocks_equal_the_authors(vectors, kind, form):
    """Departures of the release: block 0 of its OP normalises what its attention reads, skip branches have gains."""
    tensors, _ = vectors(f"blocks_{kind}")
    blocks, skips = authors_blocks(tensors, kind, TransformerConfig(width=32, heads=4, **form))
    for index, (block, (attn_skip, mlp_skip)) in enumerate(zip(blocks, skips, strict=True)):
        x, streams = tensors[f"{kind}.stream.{index}"], {}
        if kind == "post_ln":
            norm = nn.LayerNorm(32).double()
            norm.load_state_dict({part: tensors[f"{kind}.param.{index}.ln_1.{part}"] for part in ("weight", "bias")})
            x = norm(x)
        block.resid_mid.register_forward_hook(lambda _, __, y, x=x, s=attn_skip: y + s * x)
        into = block.norm1 if kind == "post_ln" else block.resid_mid  # what the MLP's branch is added to
        into.register_forward_hook(lambda _, __, y, kept=streams: kept.update(x=y))
        block.resid_post.register_forward_hook(
            lambda _, __, y, s=mlp_skip, kept=streams: kept.update(out=y + s * kept["x"])
        )
        with torch.no_grad():
            block(x)
        torch.testing.assert_close(streams["out"], tensors[f"{kind}.stream.{index + 1}"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------ norms


def test_rmsnorm_inside_is_torchs_and_outside_adds_eps_to_the_root():
    x, gain = torch.randn(5, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    theirs, inside, outside = nn.RMSNorm(8, 0.1), RMSNorm(8, 0.1, "inside"), RMSNorm(8, 0.5)
    for norm in (theirs, inside, outside):
        norm.double().weight.data.copy_(gain)
    torch.testing.assert_close(inside(x), theirs(x), rtol=1e-14, atol=0)
    assert not torch.allclose(RMSNorm(8, 0.1).double()(x), nn.RMSNorm(8, 0.1).double()(x), rtol=1e-3)
    torch.testing.assert_close(outside(torch.full((8,), 2.0)), gain * 2 / 2.5)
    inside.eps = outside.eps = theirs.eps = 0.0
    torch.testing.assert_close(outside(x), theirs(x), rtol=1e-14, atol=0)
    torch.testing.assert_close(inside(x), theirs(x), rtol=1e-14, atol=0)


def test_srmsnorm_has_no_parameters_and_rows_of_root_mean_square_one():
    norm, x = make_norm("srmsnorm", 8, 1e-12, "outside"), torch.randn(5, 8, dtype=torch.float64)
    assert not list(norm.parameters())
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(5).double())
    torch.testing.assert_close(norm(x), RMSNorm(8, 1e-12).double()(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("norm", ["rmsnorm", "srmsnorm"])
def test_rms_norms_stand_where_layernorms_do(norm, position):
    model = build(norm=norm, norm_position=position, norm_eps=1e-9, rms_eps="inside")
    seen = seen_in(model)

    def normed(x):
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-9)

    before = {"norm1": "resid_pre", "norm2": "resid_mid"} if position == "pre" else {
        "norm1": "resid_mid", "norm2": "resid_post"
    }  # fmt: skip
    for site, source in before.items():
        torch.testing.assert_close(seen[f"blocks.1.{site}"], normed(seen[f"blocks.1.{source}"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen["norm_final"], normed(seen["blocks.1.resid_post"]), rtol=1e-12, atol=0)
    gains = [name for name, _ in model.named_parameters() if "norm" in name]
    assert len(gains) == (0 if norm == "srmsnorm" else 5 if position == "pre" else 4)


@pytest.mark.parametrize("chosen", [c for n in range(4) for c in itertools.combinations(PRE_NORMS, n)], ids="+".join)
def test_each_pre_norm_stands_before_what_it_is_named_after(chosen):
    model = build(pre_norms=chosen)
    seen, block = seen_in(model), model.blocks[1]
    stream = seen["blocks.1.resid_pre"]
    normed = nn.functional.layer_norm(stream, (16,))
    for part, name in ((block.attention.q, "qk"), (block.attention.k, "qk"), (block.attention.v, "v")):
        site = next(one for one, module in model.sites().items() if module is part)
        torch.testing.assert_close(seen[site], part(normed if name in chosen else stream), rtol=0, atol=1e-12)
    middle = seen["blocks.1.resid_mid"]
    expected = nn.functional.layer_norm(middle, (16,)) if "mlp" in chosen else middle
    torch.testing.assert_close(seen["blocks.1.mlp_in"], expected, rtol=0, atol=1e-12)
    present = {name.split(".")[2] for name, _ in model.named_parameters() if "blocks.1.norm" in name}
    assert ("norm1" in present, "norm2" in present) == (bool({"qk", "v"} & set(chosen)), "mlp" in chosen)


def test_without_pre_norms_a_block_is_the_op_block_and_the_final_norm_stays():
    bare, op = build(**OP), build(**OP | {"norm": "layernorm", "pre_norms": (), "final_norm": True})
    left = op.load_state_dict(bare.state_dict(), strict=False)
    assert left.missing_keys == ["norm_final.weight", "norm_final.bias"] and not left.unexpected_keys
    ours, theirs = seen_in(op), seen_in(bare)
    assert torch.equal(ours["blocks.1.resid_post"], theirs["blocks.1.resid_post"])
    torch.testing.assert_close(ours["norm_final"], nn.functional.layer_norm(theirs["norm_final"], (16,)))


@pytest.mark.parametrize("form", [{"norm": "none"}, {"pre_norms": ("mlp",)}], ids=str)
def test_a_norm_that_is_configured_away_keeps_its_site(form):
    model = build(**form)
    with edit(model, "norm1", torch.zeros_like):
        seen = seen_in(model)
    assert all(seen[f"blocks.0.{one}"].abs().max() == 0 for one in ("q", "k", "v"))


def test_pre_norms_have_one_name_in_any_order():
    assert TransformerConfig(pre_norms=["mlp", "qk"]) == TransformerConfig(pre_norms=("qk", "mlp", "qk"))
    assert TransformerConfig(pre_norms=["mlp", "v", "qk"]) == TransformerConfig()


# ------------------------------------------------------------------------------------ homogeneity


def scales(block, factor):
    """Whether what a block gives is multiplied by the factor when its input is."""
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        return torch.allclose(block(factor * x), factor * block(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("qk_norm", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("chosen", [c for n in range(4) for c in itertools.combinations(PRE_NORMS, n)], ids="+".join)
def test_the_rows_of_table_4_are_homogeneous_where_only_queries_and_keys_are_normed(chosen, qk_norm):
    block = block_of(pre_norms=chosen, residual_gain=0.3, attention={"qk_norm": qk_norm})
    regulated = "qk" in chosen or qk_norm != "none"
    assert scales(block, 3.0) is (regulated and not {"v", "mlp"} & set(chosen))


_HOMOGENEOUS = {
    "OP": {},
    "QK-LayerNorm": {"attention": {"qk_norm": "layernorm"}},
    "fixed gains": {"gain_kind": "fixed"},
    "LayerScale": {"gain_kind": "layerscale"},
    "LeakyReLU": {"leaky_relu_slope": 0.3},
    "alpha": {"mlp_alpha": 0.0},
    "Value-SkipInit": {"attention": {"qk_norm": "rmsnorm", "value_skip": 1.0, "value_gain": 0.2}},
    "rotary": {"embedding": {"positions": "rotary"}},
    "parallel": {"parallel": True},
}


@given(factor=st.floats(0.01, 100), seed=st.integers(0, 100))
@pytest.mark.parametrize("name", _HOMOGENEOUS)
def test_op_blocks_without_biases_are_one_homogeneous(name, factor, seed):
    torch.manual_seed(seed)
    assert scales(block_of(**OP | _HOMOGENEOUS[name]), factor)


@pytest.mark.parametrize(
    "form",
    [
        {"attention": {"qk_norm": "none"}},
        {"attention": {"tanh_cap": 1.0}},
        {"attention": {"qk_norm": "rmsnorm", "gate": "linear"}},
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_other_entropy_regulation_gates_and_gelu_are_not_homogeneous(form):
    assert not scales(block_of(**OP | form), 3.0)


# ------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_scores_are_capped_before_the_mask(cap):
    model = build(init_std=1.0, attention={"tanh_cap": cap})
    seen, visible = seen_in(model), torch.ones(16, 16).bool().tril()
    scores = seen["blocks.1.scores"]
    assert scores.abs().max() > cap  # the site is before the cap
    expected = (cap * (scores / cap).tanh()).masked_fill(~visible, float("-inf")).softmax(-1)
    torch.testing.assert_close(seen["blocks.1.probs"], expected, rtol=0, atol=1e-12)


def test_a_capped_score_is_itself_where_it_is_small_and_the_cap_where_it_is_large():
    x = torch.tensor([0.0, 1e-3, -1e4, 1e4], dtype=torch.float64)
    torch.testing.assert_close(capped(x, 30.0), x.clamp(-30, 30), rtol=1e-8, atol=0)


def test_value_skipinit_adds_each_positions_own_value():
    plain = build()
    skip = build(attention={"value_skip": 1.0, "value_gain": 0.25})
    alone = build(attention={"value_skip": 1.0, "value_gain": 0.0})
    for model in (skip, alone):
        model.load_state_dict(plain.state_dict())
    usual, mixed, own = (seen_in(model) for model in (plain, skip, alone))
    b = "blocks.0."  # later blocks read other streams
    torch.testing.assert_close(mixed[b + "context"], mixed[b + "v"] + 0.25 * usual[b + "context"], rtol=0, atol=1e-12)
    torch.testing.assert_close(own[b + "context"], own[b + "v"], rtol=0, atol=1e-15)
    assert torch.equal(mixed[b + "probs"], usual[b + "probs"])  # the site is the softmax, without the identity


# ------------------------------------------------------------------------------------ residual branches and MLP


def test_the_three_kinds_of_gain_start_alike_and_only_the_fixed_one_is_no_parameter():
    models = {kind: build(residual_gain=0.25, gain_kind=kind) for kind in ("skipinit", "layerscale", "fixed")}
    streams = []
    for model in models.values():
        model.load_state_dict(
            {n: t for n, t in models["fixed"].state_dict().items() if "gain" not in n}, strict=False
        )
        streams.append(seen_in(model)["blocks.1.resid_post"])
    for stream in streams[1:]:
        torch.testing.assert_close(stream, streams[0], rtol=0, atol=1e-15)
    shapes = {kind: {tuple(p.shape) for n, p in m.named_parameters() if "gain" in n} for kind, m in models.items()}
    assert shapes == {"skipinit": {()}, "layerscale": {(16,)}, "fixed": set()}
    assert make_gain("fixed", 1.0, 4) is make_gain("skipinit", 1.0, 4) is None
    assert make_gain("layerscale", 1.0, 4).tolist() == [1.0] * 4


@pytest.mark.parametrize(("on", "gains"), [("both", (0.5, 0.5)), ("attention", (0.5, 1)), ("mlp", (1, 0.5))])
@pytest.mark.parametrize("kind", ["skipinit", "layerscale", "fixed"])
def test_gains_are_on_the_branches_that_are_named(on, gains, kind):
    seen = seen_in(build(residual_gain=0.5, gain_on=on, gain_kind=kind))
    b = "blocks.1."
    expected = seen[b + "resid_pre"] + gains[0] * seen[b + "attn_out"]
    torch.testing.assert_close(seen[b + "resid_mid"], expected, rtol=0, atol=1e-12)
    expected = seen[b + "resid_mid"] + gains[1] * seen[b + "mlp_out"]
    torch.testing.assert_close(seen[b + "resid_post"], expected, rtol=0, atol=1e-12)


def test_leaky_relu_is_the_larger_of_x_and_its_multiple():
    x = torch.linspace(-2, 2, 9)
    for slope in (0.0, 0.25, 1.0):
        torch.testing.assert_close(make_activation("relu", slope)(x), torch.maximum(x, slope * x))
    seen = seen_in(build(leaky_relu_slope=0.25, init_std=0.5))
    assert seen["blocks.0.mlp_act"].min() < 0


def test_alpha_scales_what_the_mlp_reads():
    seen = seen_in(build(**OP | {"activation": "gelu", "mlp_alpha": 0.7}))
    torch.testing.assert_close(seen["blocks.1.mlp_in"], 0.7 * seen["blocks.1.resid_mid"])
    seen = seen_in(build(mlp_alpha=0.7))
    torch.testing.assert_close(seen["blocks.1.mlp_in"], 0.7 * seen["blocks.1.norm2"])


def test_alpha_by_depth_is_one_over_the_spread_of_a_sum_of_independent_branches():
    config = TransformerConfig(**OP | {"residual_gain": 0.1, "mlp_alpha": 0.0})
    assert [config.mlp_input_scale(block) ** -2 for block in (0, 1, 23)] == pytest.approx([1.01, 1.03, 1.47])
    mixed = dataclasses.replace(config, gain_on="attention")
    assert mixed.mlp_input_scale(2) ** -2 == pytest.approx(1 + 3 * 0.01 + 2)
    assert dataclasses.replace(config, gain_on="mlp").mlp_input_scale(2) ** -2 == pytest.approx(1 + 3 + 2 * 0.01)
    assert dataclasses.replace(config, parallel=True).mlp_input_scale(2) ** -2 == pytest.approx(1.04)
    assert TransformerConfig().mlp_input_scale(5) == 1
    deep = build(**OP | {"residual_gain": 0.1, "mlp_alpha": 0.0})
    assert [block.alpha for block in deep.blocks] == pytest.approx([1.01**-0.5, 1.03**-0.5])


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"norm": "rms"}, "unknown norm 'rms' .did you mean 'rmsnorm'"),
        ({"pre_norms": ["q"]}, "unknown pre_norms 'q'.*known: qk, v, mlp"),
        ({"norm": "none", "pre_norms": ["qk"]}, "pre_norms chooses among norms with norm_position pre"),
        ({"norm_position": "post", "pre_norms": []}, "pre_norms chooses among norms with norm_position pre"),
        ({"activation": "gelu", "leaky_relu_slope": 0.1}, "leaky_relu_slope is of activation relu, not of gelu"),
        ({"leaky_relu_slope": 1.5}, "leaky_relu_slope must be at least 0 and at most 1, got 1.5"),
        ({"mlp_alpha": 0.0}, "mlp_alpha 0 is for an MLP whose input has no norm"),
        ({"norm_position": "post", "mlp_alpha": 0.0}, "mlp_alpha 0 is for an MLP whose input has no norm"),
        ({"mlp_alpha": -1.0}, "mlp_alpha must be at least 0, got -1"),
        ({"gain_kind": "vector"}, "unknown gain_kind 'vector'"),
        ({"gain_on": "attn"}, "unknown gain_on 'attn'"),
        ({"rms_eps": "out"}, "unknown rms_eps 'out'"),
        ({"attention": {"tanh_cap": -30.0}}, "tanh_cap must be at least 0, got -30"),
    ],
)
def test_blocks_that_make_no_sense_are_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**bad)
