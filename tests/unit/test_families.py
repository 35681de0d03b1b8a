"""Hugging Face models: converted, and read where they stand."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from torch import nn

from ofutils import UserError, layouts
from ofutils.families import bert_state, from_hf, opt_state, with_sites
from ofutils.probes import capture, edit, measure
from ofutils.transformer import Transformer, TransformerConfig
from tests.toys import BERT, CONVERTIBLE, MODELS, PAD, batch_for, build, close, ids, output, padded

# ------------------------------------------------------------------------------------ converted


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_from_hf_equals_the_original(name):
    theirs = build(name)
    ours = from_hf(theirs)
    assert not ours.training
    batch = {"input_ids": ids(24 - PAD - 1 if "roberta" in name else 24)}
    close(output(ours, batch), output(theirs, batch))
    long = {"input_ids": torch.cat([batch["input_ids"], ids(1)], 1)}
    with pytest.raises(UserError, match="does not fit the context"):
        ours(**long)


@pytest.mark.parametrize("name", ["vit", "vit without a head"])
def test_from_hf_of_a_vit_equals_the_original_at_the_logits_and_at_every_site(name):
    theirs, batch = build(name), batch_for(name)
    ours, sited = from_hf(theirs), with_sites(theirs)
    close(output(ours, batch), output(theirs, batch))
    common = sorted(ours.sites().keys() & sited.sites().keys())
    assert {"embed_tokens", "embed_sum", "blocks.1.probs", "blocks.1.v", "blocks.1.resid_post"} <= {*common}
    with torch.no_grad(), capture(ours, common) as here, capture(sited, common) as there:
        ours(**batch), sited(**batch)
    for site in common:
        close(here[site], there[site])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_from_hf_equals_the_original_at_every_token_of_a_padded_batch(name, side):
    theirs, batch = build(name), padded(side)
    ours, real = from_hf(theirs), batch["attention_mask"].bool()
    expected = output(theirs, batch)
    found = output(ours, batch)
    close(found[real], expected[real])
    assert found.isfinite().all()
    with torch.no_grad(), capture(ours, "probs") as seen:  # not fused
        close(ours(**batch)[real], expected[real])
    for probs in seen.values():
        assert probs.masked_select(~real[:, None, None, :] & real[:, None, :, None]).abs().max() == 0


@pytest.mark.parametrize("name", ["bert", "bert, gelu_new", "bert without a head"])
def test_from_hf_takes_token_types(name):
    theirs, batch = build(name), padded("right")
    types = torch.randint(0, theirs.config.type_vocab_size, (3, 20))
    expected = output(theirs, batch | {"token_type_ids": types})
    real = batch["attention_mask"].bool()
    close(output(from_hf(theirs), batch | {"token_type_ids": types})[real], expected[real])


def test_token_types_for_a_model_without_segments_are_an_error_unless_all_zero():
    ours = from_hf(build("gpt2"))
    zero = torch.zeros(3, 20, dtype=torch.long)
    batch = {"input_ids": ids()}
    assert torch.equal(output(ours, batch), output(ours, batch | {"token_type_ids": zero}))
    with pytest.raises(UserError, match="token types other than 0"):
        ours(**batch, token_type_ids=zero + 1)


def test_an_untied_head_is_copied():
    ours = from_hf(build("neox"))
    assert ours.config.head == "untied" and ours.config.parallel and ours.config.embedding.rotary_share == 0.25
    theirs = build("gpt2", tie_word_embeddings=False)
    assert from_hf(theirs).config.head == "untied"
    batch = {"input_ids": ids()}
    close(output(from_hf(theirs), batch), output(theirs, batch))


def test_half_precision_becomes_float32_and_the_original_stays():
    theirs = build("bert").half()
    assert {parameter.dtype for parameter in from_hf(theirs).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "special", "message"),
    [
        ("opt", {"activation_function": "silu"}, "OPTForCausalLM: it needs one of the activations relu, .*not silu"),
        ("opt", {"enable_bias": False}, "OPT: it needs biases"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scores scaled by the head width"),
        ("gpt2", {"scale_attn_weights": False}, "scores scaled by the head width"),
        ("gpt2", {"add_cross_attention": True}, "no cross attention"),
        ("neox", {"attention_bias": False}, "GPT-NeoX: it needs biases"),
        ("neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary"),
        ("bert", {"tie_word_embeddings": False}, "head that is tied"),
        ("bert", {"position_embedding_type": "relative_key"}, "absolute positions"),
        ("bert without a head", {"is_decoder": True}, "the form of an encoder"),
        ("roberta", {"hidden_act": "relu"}, "activation gelu, which its head has"),
        ("llama", {}, "no conversion for LlamaForCausalLM; known: OPTForCausalLM, "),
    ],
)
def test_from_hf_refuses_what_transformer_has_not(name, special, message):
    with pytest.raises(UserError, match=message) as caught:
        from_hf(build(name, **special))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["vanilla", "ga_lin"])
def test_bert_and_its_gates_equal_the_authors(vectors, form):
    tensors, _ = vectors("bert_quantized")
    gate = {"attention": {"gate": "linear", "pi_init": 0.25}} if form == "ga_lin" else {}
    model = Transformer(
        TransformerConfig(
            vocab=97, layers=2, width=32, heads=4, mlp_width=64, context=64, norm_eps=1e-12, norm_position="post",
            activation="gelu", causal=False, head="mlm",
            embedding={"norm": True, "segments": 2, "skip_padding": False}, **gate,
        )
    ).eval()  # fmt: skip
    prefix = f"bert.{form}.state."
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(bert_state(state))
    with torch.no_grad():
        found = model.double()(tensors["input_ids.0"])
    # exact to 1e-12 here, on every machine; the authors' own float32 is what differs
    torch.testing.assert_close(found.float(), tensors[f"bert.{form}.fp_logits"], rtol=0, atol=1e-5)


class TheirGates(nn.Module):
    """bondarenko2023's gates as they are described: each head maps its own slice of x, or one map reads all of it."""

    def __init__(self, kind, heads, width):
        super().__init__()
        slices, hidden = width // heads, {"mlp": width // heads // 4, "mlp2": width // heads}.get(kind)
        if kind == "all_heads":
            self.alpha = nn.Linear(width, heads)
        elif kind == "linear":
            self.alpha = nn.ModuleList([nn.Linear(slices, 1) for _ in range(heads)])
        else:
            layers = [(nn.Linear(slices, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(heads)]
            self.alpha = nn.ModuleList([nn.Sequential(*one) for one in layers])

    def forward(self, x):
        """(B, T, D) -> (B, T, H)."""
        if isinstance(self.alpha, nn.Linear):
            return torch.sigmoid(self.alpha(x))
        parts = x.chunk(len(self.alpha), -1)
        return torch.cat([torch.sigmoid(one(part)) for one, part in zip(self.alpha, parts, strict=True)], -1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "mlp2", "all_heads"])
@pytest.mark.parametrize("family", ["opt", "bert"])
def test_the_authors_gates_of_every_kind_load(family, kind):
    """12 heads of width 4: numbers of heads with two digits, and a hidden layer of one unit."""
    kind_of, settings = MODELS[family]
    wide = {"hidden_size": 48, "num_attention_heads": 12} | ({"word_embed_proj_dim": 48} if family == "opt" else {})
    cls = getattr(transformers, kind_of)
    theirs = cls(cls.config_class(**settings | wide, initializer_range=0.2)).double().eval()
    plain = from_hf(theirs)
    expected = []

    def gated(own, context):
        pi = own(own.read)
        expected.append(pi)
        return (context.unflatten(-1, (12, 4)) * pi[..., None]).flatten(2)

    for layer in theirs.model.decoder.layers if family == "opt" else theirs.bert.encoder.layer:
        own = TheirGates(kind, 12, 48).double()
        attention = layer.self_attn if family == "opt" else layer.attention.self
        attention.alpha = own.alpha
        attention.register_forward_pre_hook(
            lambda _, args, named, own=own: setattr(own, "read", args[0] if args else named["hidden_states"]),
            with_kwargs=True,
        )
        if family == "opt":
            attention.out_proj.register_forward_pre_hook(lambda _, args, own=own: gated(own, args[0]))
        else:
            attention.register_forward_hook(lambda _, __, out, own=own: (gated(own, out[0]), *out[1:]))
    state = {"opt": opt_state, "bert": bert_state}[family](theirs.state_dict())
    gate = {"gate": kind.rstrip("2"), "gate_hidden": 4 if kind == "mlp2" else 1}
    ours = Transformer(dataclasses.replace(plain.config, attention=gate)).double().eval()
    ours.load_state_dict(state)
    rows = ids()
    with capture(ours, "gate") as seen, torch.no_grad():
        logits, found = theirs(rows).logits, ours(rows)
    for one, other in zip(seen.values(), expected, strict=True):
        assert other.std() > 0.05
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)
    assert not torch.allclose(output(plain.double(), {"input_ids": rows}), logits, atol=1e-2)


def test_a_gate_that_transformer_has_not_is_named():
    """`unconditional_per_head`: one parameter a head."""
    with pytest.raises(UserError, match="no place for the parameter model.decoder.layers.0.self_attn.alpha in a opt"):
        opt_state({"model.decoder.layers.0.self_attn.alpha": torch.zeros(12)})


def test_a_parameter_without_a_place_is_named():
    with pytest.raises(UserError, match="no place for the parameter bert.encoder.layer.0.extra.weight"):
        bert_state({"bert.encoder.layer.0.extra.weight": torch.zeros(1)})


# ------------------------------------------------------------------------------------ read where they stand


@pytest.mark.parametrize("name", MODELS)
def test_every_site_fires_and_reading_leaves_no_trace(name):
    theirs = build(name)
    sited, batch = with_sites(theirs), batch_for(name)
    assert not sited.training
    before = output(theirs, batch)
    found = measure(sited, [batch], "*")
    assert set(found.sites) == set(sited.sites())
    assert all(statistics.rows >= 3 for statistics in found.sites.values())
    assert not theirs.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
    assert torch.equal(output(sited, batch), before) and torch.equal(output(theirs, batch), before)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_common_sites_hold_the_same_tensors_as_the_conversion(name, side):
    theirs, batch = build(name), padded(side)
    sited, ours, real = with_sites(theirs), from_hf(theirs), batch["attention_mask"].bool()
    common = sorted(set(sited.sites()) & set(ours.sites()))
    with capture(sited, common) as there, capture(ours, common) as here, torch.no_grad():
        sited(**batch)
        ours(**batch)
    assert set(sited.sites()) <= set(ours.sites())
    for site in common:
        if site.endswith("probs"):
            there[site], here[site] = (x.transpose(1, 2) for x in (there[site], here[site]))  # queries first
        close(there[site][real], here[site][real])


@pytest.mark.parametrize("name", MODELS)
def test_sites_agree_with_the_hidden_states(name):
    theirs = build(name)
    sited, batch = with_sites(theirs), batch_for(name)
    with capture(sited, "*") as seen, torch.no_grad():
        sited(**batch)
        hidden = theirs(**batch, output_hidden_states=True).hidden_states
    for layer in range(2):
        block = f"blocks.{layer}."
        close(seen[block + "resid_pre"], hidden[layer])
        stream = seen[block + "resid_pre"] + seen[block + "attn_out"]
        if block + "resid_mid" in seen:
            close(seen[block + "resid_mid"], stream)
        post = block + "norm2" == next(reversed([site for site in seen if site.startswith(block)]))
        stream = seen[block + "norm1"] if post else stream
        close(seen[block + "resid_post"], stream + seen[block + "mlp_out"])
        if not post and layer == 0:
            close(seen["blocks.1.resid_pre"], seen["blocks.0.resid_post"])
    if "norm_final" in seen and theirs.config.model_type != "vit":
        assert not torch.allclose(seen["blocks.1.resid_post"], hidden[-1], atol=1e-2)
        close(seen["norm_final"], hidden[-1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_probs_need_eager_attention_and_say_so(attention):
    sited = with_sites(build("bert", attention))
    if attention == "eager":
        assert measure(sited, [ids()], "probs").sites["blocks.1.probs"].rows
    else:
        assert measure(sited, [ids()], "resid_post").sites
        with pytest.raises(UserError, match='attn_implementation="eager"'):
            measure(sited, [ids()], "probs")


@pytest.mark.parametrize("name", ["opt", "bert", "vit"])
def test_a_foreign_model_is_not_edited(name):
    sited = with_sites(build(name))
    with pytest.raises(UserError, match="can be read, not edited"), edit(sited, "resid_post", torch.zeros_like):
        output(sited, batch_for(name))


def test_padding_counts_nowhere_also_where_opt_flattens_its_rows():
    theirs, batch = build("opt"), padded("right")
    sited = with_sites(theirs)
    found = measure(sited, [batch], ["mlp_out", "resid_mid"]).sites
    rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    alone = measure(sited, [row[None] for row in rows], ["mlp_out", "resid_mid"]).sites
    for site, statistics in found.items():
        assert statistics.tokens == 60 - 5 - 13
        assert statistics.summary() == pytest.approx(alone[site].summary(), rel=1e-4)


def test_what_a_family_lacks_is_no_site():
    def lacks(name, *sites):
        there = {site.split(".")[-1] for site in with_sites(build(name)).sites()}
        return not there & set(sites)

    assert lacks("gpt2", "q", "k", "v") and lacks("neox", "q", "k", "v", "resid_mid")
    assert not lacks("neox, sequential and tied", "resid_mid")
    assert lacks("bert", "norm_final") and not lacks("bert", "embed_norm")
    assert lacks("opt", "project_in", "project_out") and not lacks("opt, narrow and post", "project_in")
    assert lacks("bert without a head", "logits") and not lacks("bert classifier", "logits")


def test_the_tables_and_their_tests_cover_the_same_families():
    tables = {name.split(" ")[0] for name in layouts.SITES}
    assert {getattr(transformers, kind).config_class.model_type for kind, _ in MODELS.values()} == tables
    plain = {site for site in itertools.chain(*layouts.SITES.values()) if "*" in site}
    ours = from_hf(build("opt")).sites()
    assert {site.replace("*", "0") for site in plain} <= set(ours)


def test_unknown_models_are_one_clear_line():
    known = "known: bert, roberta, opt, .*vit"
    with pytest.raises(UserError, match=f"no table of sites for T5Model; {known}"):
        config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        with_sites(transformers.T5Model(config))
    with pytest.raises(UserError, match="no table of sites for Wav2Vec2Model"):
        with_sites(build("wav2vec2 without a head", do_stable_layer_norm=True))
    ours = from_hf(build("opt"))
    assert with_sites(ours) is ours
    model = build("vit")
    del model.vit.layernorm
    with pytest.raises(UserError, match="this ViTModel has no module layernorm: upgrade transformers"):
        with_sites(model)
    with pytest.raises(UserError, match="returns no logits"):
        config = transformers.BertConfig(**BERT)
        with_sites(transformers.BertForQuestionAnswering(config))(ids())
