"""The papers' attention on Hugging Face models: equal to ours, saved and restored, never dropped in silence."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from ofutils import UserError, hub, huggingface
from ofutils.attention import AttentionConfig
from ofutils.families import from_hf, with_sites
from ofutils.probes import capture
from tests import stand_ins
from tests.stand_ins import one_line
from tests.toys import CONVERTIBLE, MODELS, build, close, ids, output, padded

FORMS = {
    "gamma": {"gamma": -0.1, "zeta": 1.05},
    "alpha, gates": {"alpha": 2.0, "gate": "linear", "pi_init": 0.3},
    "alpha by row, gates": {"alpha": 0.5, "row_aware": True, "gate": "mlp", "gate_hidden": 3},
    "off by one, gates": {"off_by_one": True, "gate": "all_heads"},
    "sink": {"sink_logit": True},
    "sigmoid by row": {"sigmoid": True, "row_aware": True},
    "cap, sigmoid": {"tanh_cap": 0.5, "sigmoid": True},
}
REFUSED = {"qk_norm": "rmsnorm", "value_skip": 0.5, "value_gain": 0.5, "linear_init": True}
HEADED = [name for name in CONVERTIBLE if "without" not in name]


def made(name, form, attention="sdpa"):
    """A model with that attention, its gates and sinks off their start."""
    model = huggingface.apply(build(name, attention), AttentionConfig(**FORMS[form]))
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".gate." in n or n.endswith(".sink")):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def quiet():
    with hub.quiet():
        yield


# ------------------------------------------------------------------------------------ equal to ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HEADED)
def test_logits_equal_those_of_transformer(name, form):
    """1e-12 in double precision, but for GPT-NeoX, whose rotary angles are float32 in transformers."""
    theirs, plain = made(name, form), from_hf(build(name))
    ours = from_hf(theirs)
    assert ours.config == dataclasses.replace(plain.config, attention=FORMS[form])
    for exact in (False, True):
        if exact:
            theirs, ours = theirs.double(), ours.double()
        limit = (1e-6 if "neox" in name else 1e-12) if exact else 1e-5
        for rows in ({"input_ids": ids()}, padded("left"), padded("right")):
            real = rows.get("attention_mask", torch.ones(3, 20)).bool()
            found, expected = output(theirs, rows), output(ours, rows)
            torch.testing.assert_close(found[real], expected[real], rtol=limit, atol=limit)
            assert found.isfinite().all()
    own = {n: one for n, one in theirs.state_dict().items() if ".gate." not in n and not n.endswith(".sink")}
    without = build(name).double()
    without.load_state_dict(own)
    assert (output(without, rows) - expected)[real].abs().max() > 1e-3


@pytest.mark.parametrize("field", [one.name for one in dataclasses.fields(AttentionConfig)])
def test_every_setting_is_carried_or_refused(field):
    """Whatever `AttentionConfig` is given one day."""
    needs = {"gate_hidden": {"gate": "mlp"}, "pi_init": {"gate": "linear"}, "row_aware": {"alpha": 1.0}}
    values = {"gamma": -0.1, "alpha": 1.0, "zeta": 1.1, "gate": "linear", "gate_hidden": 7, "pi_init": 0.9}
    values |= {"tanh_cap": 0.1, **REFUSED}
    before, after = needs.get(field, {}), {**needs.get(field, {}), field: values.get(field, True)}
    model, rows = build("opt"), {"input_ids": ids()}
    if field in REFUSED:
        assert "have no place in a model" in one_line(huggingface.apply, model, AttentionConfig(**after))
        return
    found = []
    for own in (before, after):
        torch.manual_seed(0)
        found.append(output(huggingface.apply(copy.deepcopy(model), AttentionConfig(**own)), rows))
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "vit", "bert classifier"])
def test_families_that_are_not_converted(name):
    """The plain softmax as transformers has it; a gate that is constant halves; a clipped row has exact zeros."""
    theirs = build(name)
    batch = {"pixel_values": torch.randn(3, 3, 8, 8)} if name == "vit" else padded("left")
    with torch.no_grad():
        before = theirs(**batch, output_attentions=True)
        with capture(with_sites(theirs), "attn_out") as plain:
            theirs(**batch)
        same = huggingface.apply(copy.deepcopy(theirs), AttentionConfig())
        torch.testing.assert_close(output(same, batch), before.logits, rtol=0, atol=1e-5)
        gated = huggingface.apply(copy.deepcopy(theirs), AttentionConfig(gate="all_heads"))
        for own in (p for n, p in gated.named_parameters() if ".gate." in n):
            own.zero_()
        with capture(with_sites(gated), "blocks.0.attn_out") as halved:
            gated(**batch)
        module = with_sites(theirs).sites()["blocks.0.attn_out"].module
        bias = 0 if module.bias is None else module.bias
        expected = (plain["blocks.0.attn_out"] - bias) / 2 + bias
        torch.testing.assert_close(halved["blocks.0.attn_out"], expected, rtol=0, atol=1e-5)
        clipped = huggingface.apply(theirs, AttentionConfig(alpha=2.0))(**batch, output_attentions=True)
    length = before.attentions[0].shape[-1]
    gamma = -2.0 / (length if name == "vit" else 24)
    first = ((1 - gamma) * before.attentions[0] + gamma).clamp(0, 1)
    assert (first == 0).any() and (first > 0).any()
    torch.testing.assert_close(clipped.attentions[0], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "gpt2", "neox"])
def test_cached_keys_change_nothing(name):
    model, batch = made(name, "alpha by row, gates"), padded("left", 12)
    where = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        whole = model(**batch, **where).logits
        first = {key: value[:, :8] for key, value in (batch | where).items() if key != "attention_mask"}
        seen = model(**first, attention_mask=batch["attention_mask"][:, :8], use_cache=True)
        rest = {key: value[:, 8:] for key, value in (batch | where).items() if key != "attention_mask"}
        last = model(**rest, attention_mask=batch["attention_mask"], past_key_values=seen.past_key_values).logits
    torch.testing.assert_close(last[:2], whole[:2, 8:], rtol=1e-5, atol=1e-5)


def test_gates_start_at_pi_init_in_the_dtype_of_their_neighbours_and_are_trained():
    model = huggingface.apply(
        build("bert").requires_grad_(False).bfloat16(), AttentionConfig(gate="mlp", pi_init=0.2)
    )
    gates = {name: one for name, one in model.named_parameters() if ".gate." in name}
    start = "bert.encoder.layer.0.attention.self.gate."
    assert {f"{start}{one}" for one in ("weight", "bias", "weight_in", "bias_in")} < set(gates)
    assert {one.dtype for one in gates.values()} == {torch.bfloat16} and set(gates) < set(model.state_dict())
    torch.testing.assert_close(gates[f"{start}bias"].float(), torch.full((4,), math.log(0.25)), rtol=0, atol=1e-2)
    checkpoint(lambda rows: model.train()(rows).logits, ids(), use_reentrant=False).square().mean().backward()
    assert all(one.grad.abs().sum() > 0 for name, one in gates.items())
    assert {name for name, one in model.named_parameters() if one.requires_grad} == set(gates)


def test_a_copy_has_gates_of_its_own_and_probs_can_be_read():
    model, rows = made("roberta", "alpha, gates", "eager"), {"input_ids": ids()}
    other = copy.deepcopy(model)
    assert torch.equal(output(other, rows), output(model, rows))
    with torch.no_grad():
        other.roberta.encoder.layer[0].attention.self.gate.bias.add_(1)
    assert not torch.equal(output(other, rows), output(model, rows))
    ours = from_hf(model)
    with capture(with_sites(model), "probs") as there, capture(ours, "probs") as here, torch.no_grad():
        model(**rows)
        ours(**rows)
    assert (there["blocks.0.probs"] == 0).any()
    for site, probs in there.items():
        close(probs, here[site])


# ------------------------------------------------------------------------------------ saved and restored


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "roberta", "opt", "gpt2", "neox"])
def test_what_is_saved_comes_back_to_the_bit(name, form, tmp_path):
    model, batch = made(name, form), padded("left")
    model.save_pretrained(tmp_path, max_shard_size="20kB" if form == "alpha, gates" else "1GB")
    again = huggingface.restore(type(model).from_pretrained(tmp_path), tmp_path)
    assert torch.equal(output(again, batch), output(model, batch))
    again.save_pretrained(tmp_path / "twice")
    twice = huggingface.restore(type(model).from_pretrained(tmp_path / "twice"), model.state_dict())
    assert torch.equal(output(twice, batch), output(model, batch))
    assert all(torch.equal(one, twice.state_dict()[name]) for name, one in model.state_dict().items())


def test_gates_come_back_with_another_head_and_in_half_precision(tmp_path):
    model, rows = made("bert", "alpha, gates").half(), {"input_ids": ids()}
    model.save_pretrained(tmp_path / "headed")
    base = huggingface.restore(transformers.BertModel.from_pretrained(tmp_path / "headed"), tmp_path / "headed")
    assert {one.dtype for one in base.parameters()} == {torch.float16}
    with torch.no_grad():
        expected = model.bert(**rows).last_hidden_state
    assert torch.equal(output(base.eval(), rows), expected)
    base.save_pretrained(tmp_path / "base")
    kind = transformers.BertForSequenceClassification
    again = huggingface.restore(kind.from_pretrained(tmp_path / "base"), tmp_path / "base").eval()
    assert torch.equal(output(again.bert, rows), expected)


def test_without_the_call_gates_would_be_dropped_in_silence_and_here_are_not(tmp_path, monkeypatch):
    """First what transformers does with weights and settings that it does not know, then how each way is refused."""
    model, rows = made("opt", "alpha, gates"), {"input_ids": ids()}
    model.save_pretrained(tmp_path)
    expected, kind = output(model, rows), type(model)
    silent, report = kind.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert report["missing_keys"] == set() and (output(silent.eval(), rows) - expected).abs().max() > 0.1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ofutils_attention"] == FORMS["alpha, gates"] and config["attn_implementation"] == huggingface.NAME
    unmarked = {key: value for key, value in config.items() if key != "attn_implementation"}
    (tmp_path / "config.json").write_text(json.dumps(unmarked))
    close(output(kind.from_pretrained(tmp_path).eval(), rows), output(silent, rows))
    (tmp_path / "config.json").write_text(json.dumps(config))

    there = kind.from_pretrained(tmp_path).eval()
    assert "this model carries the attention {'alpha': 2.0, " in one_line(there, **rows)
    assert "it needs blocks.0.attention.gate.bias, which `huggingface.restore` reads" in one_line(from_hf, there)
    assert torch.equal(output(huggingface.restore(there, tmp_path), rows), expected)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, huggingface.NAME)
    with pytest.raises(ValueError, match='attn_implementation="ofutils.huggingface"` is not supported'):
        kind.from_pretrained(tmp_path)


def test_the_hub_does_not_load_what_it_would_not_restore(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_why_offline", lambda: "it is a test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made("bert", "gamma").save_pretrained(tmp_path / "made")
    stand_ins.keep(tmp_path, "its/clipped", tmp_path / "made")
    assert "its/clipped, revision main has an attention of `huggingface`" in one_line(hub.model, "its/clipped")


# ------------------------------------------------------------------------------------ refused


def test_an_implementation_that_is_set_afterwards_is_refused():
    model, rows = made("gpt2", "gamma"), {"input_ids": ids()}
    expected = output(model, rows)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        assert f"attn_implementation is '{other}', which passes over the attention" in one_line(model, **rows)
    model.set_attn_implementation(huggingface.NAME)
    assert torch.equal(output(model, rows), expected)


def test_an_attention_on_another_is_refused(tmp_path):
    model = made("bert", "gamma")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for one in (model, loaded):
        for own in (AttentionConfig(**FORMS["gamma"]), AttentionConfig(gamma=-0.2), AttentionConfig()):
            assert "carries the attention {'gamma': -0.1, 'zeta': 1.05} already" in one_line(
                huggingface.apply, one, own
            )
    assert "has its attention already" in one_line(huggingface.restore, model, tmp_path)
    assert "carries no attention" in one_line(huggingface.restore, build("bert"), tmp_path)


def test_gates_that_do_not_fit_are_refused_and_the_model_stays_unrestored(tmp_path):
    model, rows = made("opt", "alpha, gates"), {"input_ids": ids()}
    model.save_pretrained(tmp_path / "made")
    kind = type(model)

    def saved(change):
        state = load_file(tmp_path / "made" / "model.safetensors")
        return {name: one for name, one in change(state).items() if one is not None}

    one, sink = "model.decoder.layers.1.self_attn.gate.bias", "model.decoder.layers.1.self_attn.sink"
    for change in (
        lambda state: state | {one: None},
        lambda state: state | {one: torch.zeros(5)},
        lambda state: state | {sink: torch.zeros(4)},
        lambda state: {name: tensor for name, tensor in state.items() if ".gate." not in name},
    ):
        loaded = kind.from_pretrained(tmp_path / "made").eval()
        assert ".self_attn of {'alpha': 2.0, " in one_line(huggingface.restore, loaded, saved(change))
        assert "which `huggingface.restore(model, folder)` reads" in one_line(loaded, **rows)
    made("opt", "off by one, gates").save_pretrained(tmp_path / "other")
    assert "other was saved with {'gate': 'all_heads', 'off_by_one': True}" in one_line(
        huggingface.restore, loaded, tmp_path / "other"
    )
    save_file(load_file(tmp_path / "made" / "model.safetensors"), tmp_path / "model.safetensors")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "holds no config.json with safetensors" in one_line(huggingface.restore, loaded, folder)
    assert torch.equal(output(huggingface.restore(loaded, tmp_path / "made"), rows), output(model, rows))


def test_a_family_that_cannot_carry_it_is_refused():
    small = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}
    distil = transformers.DistilBertModel(transformers.DistilBertConfig(**small))
    assert "no attention for DistilBertModel; known: bert, " in one_line(huggingface.apply, distil, AttentionConfig())
    crossed = transformers.GPT2LMHeadModel(transformers.GPT2Config(**MODELS["gpt2"][1], add_cross_attention=True))
    with pytest.raises(UserError, match="with cross attention"):
        huggingface.apply(crossed, AttentionConfig())
