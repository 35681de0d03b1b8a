import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from conftest import METHODS, SMALL
from ofutils import UserError
from ofutils.attention import Gate, QKNorm, clipped_softmax
from ofutils.probes import capture, edit, measure, resolve
from ofutils.transformer import Block, Transformer, TransformerConfig, clm_loss


def build(method="vanilla", **more):
    return Transformer(dataclasses.replace(SMALL, **METHODS[method], **more)).eval()


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


# ------------------------------------------------------------------------------------ blocks


def test_op_block_equals_the_authors(vectors):
    tensors, _ = vectors("blocks_op")
    config = TransformerConfig(
        width=32, heads=4, mlp_width=128, norm="none", qk_norm="rmsnorm", residual_gain=0.2, final_norm=False
    )
    for index in range(3):
        read = {k.removeprefix(f"op.param.{index}."): t for k, t in tensors.items() if f"op.param.{index}." in k}
        block = Block(config).double()
        if index == 0:  # the release normalises the input of block 0's attention; the paper's block does not
            block.norm1 = nn.LayerNorm(32).double()
            block.norm1.load_state_dict({"weight": read["ln_1.weight"], "bias": read["ln_1.bias"]})
        q, k = read["attn.qk_attn.weight"].T.chunk(2)
        q_bias, k_bias = read["attn.qk_attn.bias"].chunk(2)
        state = {
            "attention.q.weight": q,
            "attention.q.bias": q_bias,
            "attention.k.weight": k,
            "attention.k.bias": k_bias,
            "attention.v.weight": read["attn.v_attn.weight"].T,
            "attention.v.bias": read["attn.v_attn.bias"],
            "attention.attn_out.weight": read["attn.c_proj.weight"].T,
            "attention.attn_out.bias": read["attn.c_proj.bias"],
            "attention.q_norm.weight": read["attn.q_norm.scale"],
            "attention.k_norm.weight": read["attn.k_norm.scale"],
            "mlp_fc.weight": read["mlp.c_fc.weight"].T,
            "mlp_fc.bias": read["mlp.c_fc.bias"],
            "mlp_out.weight": read["mlp.c_proj.weight"].T,
            "mlp_out.bias": read["mlp.c_proj.bias"],
            "attn_gain": (read["attn_block_resid_gain"]).squeeze(),
            "mlp_gain": read["mlp_block_resid_gain"].squeeze(),
        }
        result = block.load_state_dict(state, strict=False)
        assert not result.unexpected_keys and all("norm1" in key for key in result.missing_keys)
        per_head = read["attn.attn_mat_resid_gain"].flatten().repeat_interleave(8)  # on each head's output
        block.attention.attn_out.weight.data *= per_head
        x = tensors[f"op.stream.{index}"]
        # the release also has gains on the skip branches, 1 in the paper
        attn_skip, mlp_skip = read["attn_block_skip_gain"] - 1, read["mlp_block_skip_gain"] - 1
        middle = {}
        block.resid_mid.register_forward_hook(
            lambda _, __, y, x=x, s=attn_skip, kept=middle: kept.setdefault("x", y + s * x)
        )
        block.resid_post.register_forward_hook(lambda _, __, y, s=mlp_skip, kept=middle: y + s * kept["x"])
        with torch.no_grad():
            found = block(x)
        torch.testing.assert_close(found, tensors[f"op.stream.{index + 1}"], rtol=0, atol=1e-12)


def test_op_block_without_biases_is_one_homogeneous_and_pre_ln_is_not():
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for method, homogeneous in (("OP layernorm", True), ("vanilla", False)):
        block = Block(dataclasses.replace(SMALL, **METHODS[method])).double()
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, QKNorm):
                module.eps = 0.0
        assert torch.allclose(block(3 * x), 3 * block(x), rtol=1e-12, atol=0) is homogeneous


def test_qk_rmsnorm_has_its_eps_outside_the_root():
    norm = QKNorm("rmsnorm", 4, eps=0.5)
    torch.testing.assert_close(norm(torch.full((4,), 2.0)), torch.full((4,), 2 / 2.5))


@pytest.mark.parametrize("method", METHODS)
def test_no_position_sees_the_future(method):
    model, rows = build(method), ids()
    changed = rows.clone()
    changed[:, 9:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(rows)[:, :9], model(changed)[:, :9])
        assert not torch.allclose(model(rows)[:, 9:], model(changed)[:, 9:])


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method):
    model = build(method)
    clm_loss(model(ids()), ids()).backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not still


def test_alpha_is_gamma_over_the_context_and_both_at_once_is_an_error():
    config = TransformerConfig(alpha=4.0, context=128)
    assert config.clip_gamma == -4 / 128 and config.clipped
    assert not TransformerConfig().clipped
    with pytest.raises(UserError, match="gamma or alpha"):
        TransformerConfig(alpha=4.0, gamma=-0.1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 10, "heads": 4}, "does not split into 4 heads"),
        ({"gate": "linaer"}, "unknown gate 'linaer' .did you mean 'linear'"),
        ({"gamma": 0.1}, "gamma must be at most 0"),
        ({"pi_init": 1.0}, "pi_init must lie between"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_bad_configurations_are_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**bad)


def test_a_row_beyond_the_context_is_an_error():
    with pytest.raises(UserError, match="17 tokens does not fit the context of 16"):
        build()(ids(length=17))


# ------------------------------------------------------------------------------------ sites


@pytest.mark.parametrize("method", METHODS)
def test_watching_every_site_changes_nothing_and_each_site_fires(method):
    model = build(method)
    with torch.no_grad():
        plain = model(ids())
        with capture(model, "*") as seen:
            watched = model(ids())
    torch.testing.assert_close(watched, plain, rtol=0, atol=2e-6)  # fused against explicit attention
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
    torch.testing.assert_close(seen[b + "probs"].sum(-1), torch.ones(3, 2, 16))
    torch.testing.assert_close(seen["logits"], logits)


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


# ------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("form", ["125m", "350m"])
def test_from_hf_equals_opt(form):
    from transformers import OPTConfig, OPTForCausalLM

    from ofutils.families import from_hf

    special = (
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16} if form == "350m" else {"word_embed_proj_dim": 32}
    )
    config = OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, init_std=0.2, **special,
    )  # fmt: skip
    theirs = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        rows = torch.randint(0, 99, (2, 20))
        torch.testing.assert_close(from_hf(theirs)(rows), theirs(rows).logits, rtol=1e-5, atol=1e-5)


def test_from_hf_refuses_what_it_does_not_know():
    from transformers import GPT2Config, GPT2LMHeadModel

    from ofutils.families import from_hf

    with pytest.raises(UserError, match="no conversion for GPT2LMHeadModel; known: OPTForCausalLM"):
        from_hf(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)))


def test_clipped_softmax_registered_with_transformers_equals_ours():
    from transformers import OPTConfig, OPTForCausalLM

    from ofutils.attention import register_clipped_softmax
    from ofutils.families import from_hf

    config = OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    theirs = OPTForCausalLM(config).eval()
    plain = from_hf(theirs)
    ours = Transformer(dataclasses.replace(plain.config, gamma=-0.05)).eval()
    ours.load_state_dict(plain.state_dict())
    register_clipped_softmax("clipped_softmax_test", gamma=-0.05)
    theirs.set_attn_implementation("clipped_softmax_test")
    rows = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(rows), theirs(rows).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain(rows), ours(rows), atol=1e-3)


def test_training_needs_neither_jupyter_nor_papermill_nor_datasets_nor_transformers():
    blocked = ("IPython", "ipykernel", "jupyterlab", "papermill", "datasets", "transformers", "nbval")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nimport ofutils.sweep, ofutils.train"
    subprocess.run([sys.executable, "-c", code], check=True)
