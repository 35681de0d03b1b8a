import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from ofutils import UserError
from ofutils.attention import AttentionConfig, Gate, clipped_softmax, probabilities, softmax_off_by_one
from ofutils.probes import capture, edit, measure, resolve
from ofutils.transformer import Transformer, TransformerConfig, clm_loss, rotated
from tests.configurations import METHODS, SMALL

FORMS = METHODS | {
    "BERT": {
        "norm_position": "post", "causal": False, "activation": "gelu", "head": "mlm",
        "embedding": {"norm": True, "segments": 2},
    },
    "GPT-2": {"activation": "gelu_tanh", "embedding": {"skip_padding": False}},
    "GPT-NeoX": {
        "embedding": {"positions": "rotary", "rotary_share": 0.25}, "parallel": True, "head": "untied",
        "activation": "gelu",
    },
    "rotary, with QK norm": {"embedding": {"positions": "rotary"}, "attention": {"qk_norm": "layernorm"}},
    "parallel OP": {"parallel": True, "norm": "none", "residual_gain": 0.2},
    "encoder": {"causal": False, "head": "none"},
    "clipped encoder": {"causal": False, "attention": {"alpha": 0.5}},
    "row-aware encoder": {"causal": False, "attention": {"alpha": 0.5, "row_aware": True}},
    "sigmoid encoder": {"causal": False, "attention": {"sigmoid": True}},
    "gated encoder": {"causal": False, "attention": {"gate": "linear"}},
    "post-RMSNorm": {"norm": "rmsnorm", "norm_position": "post"},
    "pre-SRMSNorm": {"norm": "srmsnorm"},
    "norms before q, k and the MLP": {"pre_norms": ("qk", "mlp"), "residual_gain": 0.3, "gain_on": "attention"},
    "norms before v": {"norm": "rmsnorm", "pre_norms": ("v",), "attention": {"qk_norm": "rmsnorm"}},
    "OP with a cap": {
        "norm": "none", "final_norm": False, "attention": {"tanh_cap": 30.0}, "gain_kind": "layerscale",
        "residual_gain": 0.1, "activation": "gelu", "mlp_alpha": 0.0,
        "embedding": {"positions": "rotary", "scale": 50},
    },
    "Value-SkipInit": {"attention": {"value_skip": 1.0, "value_gain": 0.2}, "leaky_relu_slope": 0.5},
}  # fmt: skip


def build(method="vanilla", **more):
    """In float64, so that equal means equal to 1e-12 on every machine."""
    return Transformer(dataclasses.replace(SMALL, **FORMS[method], **more)).double().eval()


def ids(batch=3, length=16):
    return torch.randint(0, SMALL.vocab, (batch, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ attention


def test_clipped_softmax_with_gamma_zero_is_the_softmax():
    scores = torch.randn(2, 5, 5)
    torch.testing.assert_close(clipped_softmax(scores, 0.0), scores.softmax(-1), rtol=0, atol=0)


def test_clipped_softmax_has_exact_zeros_no_gradient_there_and_masked_entries_stay_zero():
    scores = torch.tensor([[3.0, 0.0, -3.0, float("-inf")]], requires_grad=True)
    probs = clipped_softmax(scores, gamma=-0.1)
    expected = (1.1 * scores.softmax(-1) - 0.1).clamp(0, 1)
    torch.testing.assert_close(probs, expected)
    assert probs[0, 1:].tolist() == [0.0, 0.0, 0.0]
    probs[0, 1:].sum().backward()
    assert scores.grad.abs().sum() == 0


def test_clipped_softmax_reaches_one_with_zeta():
    assert clipped_softmax(torch.tensor([[6.0, 0.0]]), 0.0, zeta=1.1)[0, 0] == 1


def test_softmax_off_by_one_is_the_softmax_with_a_key_of_score_zero():
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    scores[..., 3:] = float("-inf")
    found = softmax_off_by_one(scores)
    expected = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert (found[..., 3:] == 0).all() and (found.sum(-1) < 1).all()
    far = softmax_off_by_one(torch.full((2, 4), -50.0))
    assert far.max() < 1e-20  # nobody is attended to


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", 12 * (64 + 1)), ("mlp", 12 * (16 * (64 + 2) + 1)), ("all_heads", 12 * (768 + 1))],
)
def test_gates_have_the_papers_parameter_counts_and_start_at_pi_init(kind, expected):
    gate = Gate(kind, heads=12, head_width=64, hidden=16, pi_init=0.25)
    assert sum(parameter.numel() for parameter in gate.parameters()) == expected  # 780, 12 684, 9 228
    if kind == "mlp":
        nn.init.zeros_(gate.bias_in)
    torch.testing.assert_close(gate(torch.zeros(1, 1, 768)), torch.full((1, 1, 12), 0.25))


def test_gates_of_heads_look_at_their_own_slice_only():
    gate = Gate("linear", heads=2, head_width=4, hidden=0, pi_init=0.5)
    x = torch.randn(1, 3, 8)
    changed = x.clone()
    changed[..., 4:] += 1
    assert torch.equal(gate(x)[..., 0], gate(changed)[..., 0])
    assert not torch.equal(gate(x)[..., 1], gate(changed)[..., 1])


def test_a_closed_gate_removes_the_branch_and_an_open_one_changes_nothing():
    model = build("linear gate")
    plain = build()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".gate." not in n})
    with torch.no_grad():
        for block in model.blocks:
            block.attention.gate.bias.fill_(1e9)
        torch.testing.assert_close(model(ids()), plain(ids()), rtol=0, atol=0)
        for block in model.blocks:
            block.attention.gate.bias.fill_(-1e9)
        with capture(model, "gated") as seen:
            model(ids())
    assert all(x.abs().max() == 0 for x in seen.values())


# ------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("method", [name for name, form in FORMS.items() if form.get("causal", True)])
def test_no_position_sees_the_future(method):
    model, rows = build(method), ids()
    changed = rows.clone()
    changed[:, 9:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(rows)[:, :9], model(changed)[:, :9])
        assert not torch.allclose(model(rows)[:, 9:], model(changed)[:, 9:])


@pytest.mark.parametrize("method", FORMS)
def test_every_parameter_gets_a_gradient(method):
    model = build(method)
    model(ids()).square().mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not still


@pytest.mark.parametrize("method", [name for name, form in FORMS.items() if not form.get("causal", True)])
def test_every_position_of_an_encoder_sees_the_future(method):
    model, rows = build(method), ids()
    changed = rows.clone()
    changed[:, 15] = (rows[:, 15] + 1) % SMALL.vocab
    with torch.no_grad():
        assert ((model(rows) - model(changed)).abs().amax(-1) > 0)[:, :15].all()


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(method, side):
    model = build(method)
    if side == "left" and not model.config.embedding.skip_padding:
        return  # its positions count the padding too
    short, blank = ids(2, 10), torch.full((2, 6), 7)
    rows = torch.cat([blank, short] if side == "left" else [short, blank], 1)
    mask = (torch.arange(16) >= 6 if side == "left" else torch.arange(16) < 10).long().expand(2, -1)
    with torch.no_grad():
        plain, padded = model(short), model(rows, mask)
        with capture(model, "probs") as seen:
            watched = model(rows, mask)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[mask.bool()].view_as(plain), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(watched, padded, rtol=0, atol=1e-12)
    for probs in seen.values():
        real = mask.bool()
        assert probs.masked_select(real[:, None, :, None] & ~real[:, None, None]).abs().max() == 0


def test_a_mask_without_padding_changes_nothing_and_one_of_another_shape_is_an_error():
    for method in ("vanilla", "BERT", "GPT-NeoX"):
        model = build(method)
        with torch.no_grad():
            torch.testing.assert_close(model(ids(), torch.ones(3, 16)), model(ids()), rtol=0, atol=1e-12)
        with pytest.raises(UserError, match="attention_mask must have the shape of input_ids, .3, 16."):
            model(ids(), torch.ones(3, 15))


def test_without_a_mask_attention_takes_the_fused_causal_path(monkeypatch):
    seen = []

    def fused(q, k, v, attn_mask=None, is_causal=False):
        seen.append((attn_mask is None, is_causal))
        return v

    monkeypatch.setattr("ofutils.transformer.F.scaled_dot_product_attention", fused)
    build(layers=1)(ids())
    build(layers=1)(ids(), torch.ones(3, 16))
    build("BERT", layers=1)(ids())
    assert seen == [(True, True), (False, False), (True, False)]


def test_rotary_scores_depend_on_the_distance_alone_and_what_does_not_turn_passes():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    q, k = q.expand(1, 1, 12, 8), k.expand(1, 1, 12, 8)  # the same at every position
    scores = rotated(q, 6, 100.0) @ rotated(k, 6, 100.0).transpose(-1, -2)
    for distance in range(-11, 12):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0, 0, 0].std() > 0.01
    turned = rotated(q, 6, 100.0)
    assert torch.equal(turned[..., 6:], q[..., 6:]) and torch.equal(turned[:, :, 0], q[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


def test_token_types_shift_the_embedding():
    model, types = build("BERT"), torch.ones(3, 16, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(), None, 0 * types), model(ids()), rtol=0, atol=0)
        with capture(model, ["embed_*"]) as seen:
            model(ids(), token_type_ids=types)
    torch.testing.assert_close(seen["embed_segments"], model.segment_embedding.weight[1].expand(3, 16, -1))
    parts = seen["embed_tokens"] + seen["embed_segments"] + seen["embed_positions"]
    torch.testing.assert_close(seen["embed_sum"], parts)
    torch.testing.assert_close(seen["embed_norm"], model.embed_norm(parts))
    with pytest.raises(UserError, match="token types other than 0 for a model without segments"):
        build()(ids(), None, types)


def test_alpha_is_gamma_over_the_context_and_both_at_once_is_an_error():
    config = TransformerConfig(attention={"alpha": 4.0}, context=128)
    scores = torch.randn(2, 9, 9)
    clipped = clipped_softmax(scores, -4 / 128)
    assert torch.equal(probabilities(scores, config.attention, 128), clipped) and config.attention.clips
    assert not AttentionConfig().clips and AttentionConfig().plain
    assert not config.attention.plain and not AttentionConfig(off_by_one=True).plain
    for form in ("off_by_one", "sink_logit", "sigmoid"):
        assert not AttentionConfig(**{form: True}).plain
        with pytest.raises(UserError, match="clipped, off_by_one, with a sink_logit or a sigmoid: choose one"):
            AttentionConfig(alpha=4.0, **{form: True})
    with pytest.raises(UserError, match="row_aware is of alpha and of sigmoid"):
        AttentionConfig(gamma=-0.1, row_aware=True)
    with pytest.raises(UserError, match="gamma or alpha"):
        AttentionConfig(alpha=4.0, gamma=-0.1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 10, "heads": 4}, "does not split into 4 heads"),
        ({"attention": {"gate": "linaer"}}, "unknown attention.gate 'linaer' .did you mean 'linear'"),
        ({"attention": {"gamma": 0.1}}, "gamma must be at most 0, got 0.1"),
        ({"attention": {"pi_init": 1.0}}, "pi_init must be above 0 and below 1, got 1.0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"activation": "gleu"}, "unknown activation 'gleu' .did you mean 'gelu'"),
        ({"embedding": {"positions": "alibi"}}, "unknown embedding.positions 'alibi'"),
        ({"head": "lm"}, "unknown head 'lm'"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"embedding": {"rotary_share": 1.5}}, "rotary_share must be above 0 and at most 1, got 1.5"),
        ({"embedding": {"positions": "rotary", "rotary_share": 0.1}}, "rotary_share gives 3 entries of a head"),
        ({"parallel": True, "norm_position": "post"}, "parallel needs norm_position pre"),
        ({"layers": "many"}, "parameter layers: expected int, got 'many'"),
        ({"attention": 3}, "parameter attention: expected a mapping, got 3"),
        ({"attention": {"gat": "mlp"}}, "unknown parameter 'attention.gat' .did you mean 'attention.gate'"),
    ],
)
def test_bad_configurations_are_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**bad)


def test_a_row_beyond_the_context_is_an_error():
    with pytest.raises(UserError, match="17 tokens does not fit the context of 16"):
        build()(ids(length=17))


# ------------------------------------------------------------------------------------ sites


@pytest.mark.parametrize("method", FORMS)
def test_watching_every_site_changes_nothing_and_each_site_fires(method):
    model = build(method)
    with torch.no_grad():
        plain = model(ids())
        with capture(model, "*") as seen:
            watched = model(ids())
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-12)  # fused against explicit attention
    assert set(seen) == set(model.sites())


def test_sites_hold_what_their_names_say():
    model = build()
    with capture(model, "*") as seen, torch.no_grad():
        logits = model(ids())
    b = "blocks.1."
    torch.testing.assert_close(seen[b + "resid_pre"], seen["blocks.0.resid_post"])
    torch.testing.assert_close(seen[b + "resid_mid"], seen[b + "resid_pre"] + seen[b + "attn_out"])
    torch.testing.assert_close(seen[b + "resid_post"], seen[b + "resid_mid"] + seen[b + "mlp_out"])
    torch.testing.assert_close(seen["embed_sum"], seen["embed_tokens"] + seen["embed_positions"])
    assert seen[b + "mlp_act"].min() == 0
    assert seen[b + "scores"].isfinite().all()  # before the mask
    torch.testing.assert_close(seen[b + "probs"].sum(-1), torch.ones(3, 2, 16).double())
    torch.testing.assert_close(seen["logits"], logits)


def test_parallel_branches_both_read_the_blocks_input():
    model = build("GPT-NeoX")
    with capture(model, "*") as seen, torch.no_grad():
        model(ids())
    for b in ("blocks.0.", "blocks.1."):
        parts = seen[b + "resid_pre"] + seen[b + "attn_out"] + seen[b + "mlp_out"]
        torch.testing.assert_close(seen[b + "resid_post"], parts)
        assert b + "resid_mid" not in seen
        block = model.get_submodule(b[:-1])
        torch.testing.assert_close(seen[b + "norm2"], block.norm2(seen[b + "resid_pre"]))


def test_sites_of_a_post_norm_encoder_and_of_its_head():
    model = build("BERT")
    with capture(model, "*") as seen, torch.no_grad():
        logits = model(ids())
    torch.testing.assert_close(seen["blocks.0.resid_pre"], seen["embed_norm"])
    torch.testing.assert_close(seen["blocks.1.resid_pre"], model.blocks[0].norm2(seen["blocks.0.resid_post"]))
    torch.testing.assert_close(seen["norm_final"], seen["blocks.1.norm2"])
    hidden = model.head.norm(nn.functional.gelu(model.head.dense(seen["norm_final"])))
    torch.testing.assert_close(logits, hidden @ model.token_embedding.weight.T + model.head.bias)


def test_without_a_head_the_output_is_the_last_hidden_state():
    model = build("encoder")
    assert "logits" not in model.sites()
    with capture(model, "norm_final") as seen, torch.no_grad():
        torch.testing.assert_close(model(ids()), seen["norm_final"], rtol=0, atol=0)


def test_edit_puts_a_tensor_in_the_sites_place_and_leaves_no_trace():
    model = build()
    with torch.no_grad():
        plain = model(ids())
        with edit(model, "attn_out", torch.zeros_like), edit(model, "mlp_out", torch.zeros_like):
            edited = model(ids())
        with capture(model, "embed_sum") as seen:
            assert torch.equal(model(ids()), plain)
        direct = model.norm_final(seen["embed_sum"]) @ model.token_embedding.weight.T
    torch.testing.assert_close(edited, direct)


def test_patterns_name_sites_and_an_unknown_one_lists_near_matches():
    model = build()
    assert resolve(model, "resid_post") == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert resolve(model, ["blocks.[1].*_out"]) == ["blocks.1.attn_out", "blocks.1.mlp_out"]
    with pytest.raises(UserError, match="unknown site 'resid_pots' .did you mean 'resid_post'"):
        resolve(model, "resid_pots")


def test_measure_gives_the_mean_loss_restores_the_mode_and_needs_batches():
    model = build("dropout").train()
    batches = [ids(2), ids(4)]
    found = measure(model, batches, "resid_post", clm_loss)
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = sum(float(clm_loss(model(batch), batch)) for batch in batches) / 2
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.sites["blocks.0.resid_post"].rows == 6
    with pytest.raises(UserError, match="no batches"):
        measure(model, [], "resid_post")


def test_a_site_that_is_never_computed_is_an_error():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(1, 1), nn.Identity()

        def forward(self, x):
            return self.used(x)

        def sites(self):
            return {"unused": self.unused}

    with pytest.raises(UserError, match="unused was watched but never computed"):
        measure(Silent(), [torch.zeros(2, 1)], "unused")


def test_training_needs_neither_jupyter_nor_papermill_nor_datasets_nor_transformers():
    blocked = ("IPython", "ipykernel", "jupyterlab", "papermill", "datasets", "transformers", "nbval")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nimport ofutils.sweep, ofutils.train"
    subprocess.run([sys.executable, "-c", code], check=True)
