import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ofutils import UserError, quant, quantizers
from ofutils.families import bert_state, opt_state
from ofutils.probes import capture, edit, hooked
from ofutils.quant import QuantSettings, calibrate, quantized
from ofutils.quantizers import fake_quantize
from ofutils.transformer import Transformer, TransformerConfig, clm_loss
from tests.configurations import ENCODER, METHODS, SMALL


def test_quantizers_equal_the_authors_to_the_bit(vectors):
    tensors, cases = vectors("quantizers")
    data = {"x": tensors["x"], "absx": tensors["x"].abs(), "neg": -tensors["x"].abs()}
    assert len(cases) == 27
    for name, case in cases.items():
        scheme = case["scheme"].removesuffix("_uniform")
        x = data[case["data"]]
        found = fake_quantize(x, case["bits"], scheme, case["estimator"])
        assert torch.equal(found, tensors[name]), name
        if case["estimator"] == "mse":
            low, high = quantizers.mse_range(x, case["bits"], scheme)
            assert (float(low), float(high)) == pytest.approx((case["range_min"], case["range_max"]), rel=1e-6)


def test_running_ranges_equal_the_authors(vectors):
    tensors, expected = vectors("running_minmax")
    for column, running in (
        ("minmax", quantizers.RunningRange()),
        ("percentile_99_9", quantizers.RunningRange(percentile=99.9)),
    ):
        for index in range(5):
            ends = [float(end) for end in running.update(tensors[f"batch{index}"])]
            assert ends == expected[f"batch{index}"][column]


@pytest.mark.parametrize("percentile", [60.0, 95.0, 99.0, 99.9, 99.99, 99.999])
def test_percentiles_equal_numpys_to_the_bit(percentile):
    for size in (1, 2, 3, 255, 600, 5_000, 140_003):
        x = torch.randn(size) ** 3
        for values in (x, x.relu(), x.round()):  # with many equal entries too
            expected = np.percentile(values.numpy(), (100 - percentile, percentile))
            assert quantizers.percentile_range(values, percentile).tolist() == expected.astype(np.float64).tolist()
        assert quantizers.percentile_range(torch.cat([x, torch.tensor([torch.nan])]), percentile).isnan().all()


def searched(x, bits, margin):
    """The authors' search: every threshold tried on all of x, the first of the best is taken."""
    lowest, highest = float(x.min()), float(x.max())
    best = None
    for k in range(1, 101):
        top = k * (max(-lowest, highest) + margin) / 100
        ends = (-top if lowest < 0 else 0.0, top)
        error = float((quantizers.make_grid(*ends, bits, "symmetric", x).round(x) - x).double().square().sum())
        best = min(best or (error, ends), (error, ends), key=lambda found: found[0])
    return best[1]


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_the_quick_search_of_ranges_finds_what_trying_every_threshold_finds(bits):
    heavy = torch.randn(3_000)
    heavy[7] = 40.0
    several = [torch.randn(5_000) * 0.02, torch.randn(501).abs(), heavy, torch.ones(64), torch.full((33,), 0.37)]
    for x in [*several, torch.randn(900).double(), torch.rand(2), torch.zeros(5)]:
        for margin in (0.0, 0.5):
            assert tuple(quantizers.mse_range(x, bits, "symmetric", margin).tolist()) == searched(x, bits, margin)
    for half in (torch.randn(900).bfloat16(), torch.randn(10).half()):
        assert tuple(quantizers.mse_range(half, bits, "symmetric").tolist()) == searched(half.float(), bits, 0.5)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_what_is_not_finite_is_not_hidden(scheme, estimator):
    for bad in (torch.nan, torch.inf, -torch.inf):
        found = fake_quantize(torch.tensor([bad, 1.0, -1.0]), 8, scheme, estimator)
        assert not found.isfinite().all()


SETTINGS = {
    "w8a8_minmax": QuantSettings(weights="minmax"),
    "w8a8_mse_pct": QuantSettings(percentile=99.99),
    "w4a8_mse": QuantSettings(weight_bits=4),
}
SITE_OF = {  # the authors' name of a quantizer -> ours
    "self_attn.attn_scores_act_quantizer": "scores",
    "self_attn.attn_probs_act_quantizer": "probs",
    "self_attn.context_act_quantizer": "context",
    "self_attn_layer_norm": "norm1",
    "self_attn_res_act_quantizer": "resid_mid",
    "ffn_res_act_quantizer": "resid_post",
    "final_layer_norm": "norm2",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "attn_out",
    "fc1_act": "mlp_act",
    "fc2": "mlp_out",
}
OUTER = {
    "embed_tokens.weight_quantizer": "embed_tokens",
    "embed_positions.quant_embedding.weight_quantizer": "embed_positions",
    "embed_sum_act_quantizer.activation_quantizer": "embed_sum",
    "final_layer_norm.activation_quantizer": "norm_final",
    "final_layer_norm.weight_quantizer": "norm_final.weight",
}


def our_name(theirs):
    short = theirs.removeprefix("model.decoder.")
    if short in OUTER:
        return OUTER[short]
    _, layer, rest = short.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    site = SITE_OF[module]
    if kind == "activation_quantizer":
        return f"blocks.{layer}.{site}"
    module = {
        "q": "attention.q",
        "k": "attention.k",
        "v": "attention.v",
        "attn_out": "attention.attn_out",
    }.get(site, site)
    return f"blocks.{layer}.{'mlp_fc' if site == 'mlp_act' else module}.weight"


def calibrated(model, batches, settings):
    """Ranges of weights in float32, those of activations in float64, which the model is left in.

    Rounding a tensor is the same arithmetic on every machine, a matrix product is not: in float32 an entry on the
    border of two steps goes one way here and the other way there.
    """
    single = calibrate(model, batches, settings)
    double = calibrate(model.double(), batches, settings)
    tables = ("embed_tokens", "embed_positions", "embed_segments")
    return double | {name: ends for name, ends in single.items() if name.endswith(".weight") or name in tables}


def assert_ends_equal(ours, theirs, name):
    """Of weights to the last digit; of activations to three steps of an 8-bit grid: the authors' float32 may have
    rounded an entry the other way upstream, by one step there, and so may have the norm or softmax in between."""
    span = max(theirs["xmax"][0], 0) - min(theirs["xmin"][0], 0)
    near = span * (1e-6 if "weight_quantizer" in name else 3 / 255)
    assert [float(end) for end in ours] == pytest.approx([theirs["xmin"][0], theirs["xmax"][0]], abs=near), name


@pytest.mark.parametrize(
    "case", ["vanilla/w8a8_minmax", "vanilla/w8a8_mse_pct", "vanilla/w4a8_mse", "ga_lin/w8a8_minmax"]
)
def test_quantized_opt_equals_the_authors(vectors, case):
    tensors, cases = vectors("opt_quantized")
    name, kind = case.split("/")
    gate = {"attention": {"gate": "linear", "pi_init": 0.25}} if name == "ga_lin" else {}
    model = Transformer(TransformerConfig(vocab=97, layers=2, width=32, heads=4, mlp_width=64, context=64, **gate))
    prefix = f"opt.{name}.state."
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(opt_state(state))
    model.eval()
    batches = [tensors[f"input_ids.{index}"] for index in range(4)]
    expected = cases[f"opt/{case}"]
    ranges = calibrated(model, batches, SETTINGS[kind])
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).float(), tensors[f"opt.{name}.fp_logits"], rtol=0, atol=5e-6)
    assert set(ranges) == {our_name(theirs) for theirs in expected["ranges"]}
    for theirs, found in expected["ranges"].items():
        assert_ends_equal(ranges[our_name(theirs)], found, theirs)
    with quantized(model, SETTINGS[kind], ranges), torch.no_grad():
        loss = float(clm_loss(model(batches[0]), batches[0]))
    assert loss == pytest.approx(expected["q_loss"], abs=1e-2)
    assert loss != pytest.approx(expected["fp_loss"], abs=1e-5)


BERT_SITES = {  # the authors' name of a quantizer in a layer of BERT -> ours: activation, and weight where it has one
    "attention.self.query": ("q", "attention.q"),
    "attention.self.key": ("k", "attention.k"),
    "attention.self.value": ("v", "attention.v"),
    "attention.self.attn_scores_act_quantizer": ("scores", None),
    "attention.self.attn_probs_act_quantizer": ("probs", None),
    "attention.self.context_act_quantizer": ("gated", None),
    "attention.output.dense": ("attn_out", "attention.attn_out"),
    "attention.output.res_act_quantizer": ("resid_mid", None),
    "attention.output.LayerNorm": ("norm1", "norm1"),
    "intermediate.0": ("mlp_act", "mlp_fc"),
    "output.dense": ("mlp_out", "mlp_out"),
    "output.res_act_quantizer": ("resid_post", None),
    "output.LayerNorm": ("norm2", "norm2"),
}
BERT_OUTER = {
    "word_embeddings.weight_quantizer": "embed_tokens",
    "position_embeddings.weight_quantizer": "embed_positions",
    "token_type_embeddings.weight_quantizer": "embed_segments",
    "sum_input_token_type_embd_act_quantizer.activation_quantizer": "embed_typed",
    "sum_pos_embd_act_quantizer.activation_quantizer": "embed_sum",
    "LayerNorm.activation_quantizer": "embed_norm",
    "LayerNorm.weight_quantizer": "embed_norm.weight",
}


def our_bert_name(theirs):
    if theirs.startswith("bert.embeddings."):
        return BERT_OUTER[theirs.removeprefix("bert.embeddings.")]
    layer, rest = theirs.removeprefix("bert.encoder.layer.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    activation, weight = BERT_SITES[module]
    return f"blocks.{layer}.{activation}" if kind == "activation_quantizer" else f"blocks.{layer}.{weight}.weight"


@pytest.mark.parametrize("name", ["vanilla", "ga_lin"])
def test_a_quantized_bert_equals_the_authors(vectors, name):
    tensors, cases = vectors("bert_quantized")
    prefix = f"bert.{name}.state."
    state = bert_state({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    gate = {"attention": {"gate": "linear", "pi_init": 0.25}} if name == "ga_lin" else {}
    form = {"causal": False, "activation": "gelu", "norm_eps": 1e-12, "norm_position": "post"}
    form |= {"embedding": {"norm": True, "segments": 2, "skip_padding": False}}
    shape = {"vocab": 97, "layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "context": 64}
    model = Transformer(TransformerConfig(**shape, **form, head="mlm", **gate))
    model.load_state_dict(state)
    model.eval()
    batches = [tensors[f"input_ids.{index}"] for index in range(4)]
    expected = cases[f"bert/{name}/w8a8_minmax"]
    settings = QuantSettings(weights="minmax")
    ranges = calibrated(model, batches, settings)
    assert set(ranges) == {our_bert_name(theirs) for theirs in expected["ranges"]}
    for theirs, found in expected["ranges"].items():
        assert_ends_equal(ranges[our_bert_name(theirs)], found, theirs)
    theirs = tensors[f"bert.{name}.w8a8_minmax.q_logits"]
    with torch.no_grad():
        plain = model(batches[0])
        with quantized(model, settings, ranges):
            found = model(batches[0])
    ours, authors = found - plain, theirs - plain  # what rounding does; single entries go either way
    assert torch.corrcoef(torch.stack([ours.flatten(), authors.flatten()]))[0, 1] > 0.5
    assert 0.8 < ours.std() / authors.std() < 1.25


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantize_has_few_values_keeps_zero_and_stays_within_half_a_step(scheme, bits):
    x = torch.randn(64, 64)
    x[0, 0] = 0.0
    before = x.clone()
    found = fake_quantize(x, bits, scheme)
    assert torch.equal(x, before)
    assert len(found.unique()) <= 2**bits
    assert found[0, 0] == 0
    # the zero point is rounded, so an asymmetric end may be cut by another half step
    steps = 1.0 if scheme == "asymmetric" else 0.5
    scale = (
        float(x.max() - x.min()) / (2**bits - 1)
        if scheme == "asymmetric"
        else float(x.abs().max()) / (2 ** (bits - 1) - 1)
    )
    assert float((found - x).abs().max()) <= steps * scale * (1 + 1e-5)


def test_rounding_is_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 127.0])
    assert fake_quantize(torch.cat([x, -x]), 8)[:3].tolist() == [0.0, 2.0, 2.0]


def test_asymmetric_mse_is_as_good_as_brute_force():
    x = torch.cat([torch.randn(400), torch.tensor([9.0, -4.0])])
    found = float((fake_quantize(x, 4, "asymmetric", "mse", margin=0.0) - x).square().sum())
    errors = []
    for low in torch.linspace(-4, 0, 81):
        for high in torch.linspace(0.1, 9, 90):
            errors.append(float((quantizers.make_grid(low, high, 4, "asymmetric").round(x) - x).square().sum()))
    assert found <= 1.03 * min(errors)
    assert found < 0.8 * float((fake_quantize(x, 4, "asymmetric") - x).square().sum())


def test_the_corrected_mse_grid_is_better_for_small_weights():
    x = torch.randn(20_000) * 0.006
    error = [float((fake_quantize(x, 8, "symmetric", "mse", margin) - x).square().sum()) for margin in (0.0, 0.5)]
    assert error[0] < 0.95 * error[1]


@pytest.mark.parametrize("method", METHODS)
def test_quantized_changes_the_model_and_restores_it_to_the_bit(method):
    model = Transformer(TransformerConfig(**{**SMALL.__dict__, **METHODS[method]})).eval()
    ids = torch.randint(0, SMALL.vocab, (4, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = QuantSettings(weight_bits=4, activation_bits=4)
    with torch.no_grad():
        plain = model(ids)
        ranges = calibrate(model, [ids], settings)
        with quantized(model, settings, ranges):
            assert not torch.equal(model(ids), plain)
        assert torch.equal(model(ids), plain)
        with pytest.raises(RuntimeError, match="planted"), quantized(model, settings, ranges):
            raise RuntimeError("planted")
        assert torch.equal(model(ids), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


SEVERAL = (
    QuantSettings(weights="minmax"),
    QuantSettings(percentile=99.0, margin=0),
    QuantSettings(weight_bits=4, margin=0),
    QuantSettings(weight_bits=6, activation_bits=6, granularity="channel"),
    QuantSettings(activation_bits=4, granularity="token", skip=("resid_post",)),
)


@pytest.mark.parametrize("method", ["vanilla", "post", "linear gate"])
def test_a_table_equals_its_settings_one_by_one(method):
    model = Transformer(TransformerConfig(**{**SMALL.__dict__, **METHODS[method]})).eval()
    held, batches = torch.randint(0, 300, (4, 16)), list(torch.randint(0, 300, (3, 4, 16)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def score():
        with torch.no_grad():
            return float(clm_loss(model(held), held))

    expected = []
    for settings in SEVERAL:
        with quantized(model, settings, calibrate(model, batches, settings)):
            expected.append(score())
    assert quant.table(model, SEVERAL, batches, score) == expected
    floats = quant.table(model, SEVERAL, batches, score, calibration="float")
    assert floats[-1] == expected[-1] and floats != expected  # per token there is nothing to calibrate
    assert floats == pytest.approx(expected, abs=0.5 * (max(expected) - min(expected)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_table_in_float_has_the_ranges_of_the_exact_network():
    model, batches = Transformer(SMALL).eval(), list(torch.randint(0, 300, (3, 4, 16)))
    found = quant._in_float(model, batches, SEVERAL)
    expected = {}
    for batch in batches:
        with capture(model, ["resid_post", "probs"]) as kept, torch.no_grad():
            model(batch)
        for site, x in kept.items():
            now = torch.stack([x.min(), x.max()])
            expected[site] = 0.1 * now + 0.9 * expected[site] if site in expected else now
    for site, ends in expected.items():
        torch.testing.assert_close(found[0][site], ends)
        assert found[1][site][1] < ends[1] and site in found[2]


def test_a_table_searches_weights_once_for_each_number_of_bits(monkeypatch):
    calls, real = [], quant._weight_ranges
    monkeypatch.setattr(quant, "_weight_ranges", lambda model, one: calls.append(one) or real(model, one))
    model, eight = Transformer(SMALL).eval(), QuantSettings()
    settings = [eight, dataclasses.replace(eight, activation_bits=6), dataclasses.replace(eight, weight_bits=4)]
    settings += [QuantSettings(weights="minmax", weight_bits=bits) for bits in (4, 8)]
    quant.table(model, settings, [torch.randint(0, 300, (2, 16))], lambda: None)
    assert [(one.weights, one.weight_bits) for one in calls] == [("mse", 8), ("mse", 4), ("minmax", 4)]
    with pytest.raises(UserError, match="unknown calibration 'floats' .did you mean 'float'"):
        quant.table(model, settings, [], lambda: None, "floats")


def test_rounding_takes_the_memory_of_no_tensor_that_somebody_else_can_hold():
    model, batch, settings = Transformer(SMALL).eval(), torch.randint(0, 300, (4, 16)), QuantSettings()
    ranges = calibrate(model, [batch], settings)
    saved = torch.randn(4, 16, 16)
    kept = saved.clone()
    first = edit(model, "blocks.0.mlp_out", lambda x: saved)
    with torch.no_grad(), first, edit(model, "blocks.1.mlp_out", lambda x: x.mean(1, keepdim=True).expand_as(x)):
        calibrate(model, [batch], settings)
        with quantized(model, settings, ranges):
            model(batch)
    assert torch.equal(saved, kept)
    with torch.no_grad(), quantized(model, settings, ranges):  # watched from the inside: to the bit what is computed
        alone = model(batch)
        with capture(model, ["resid_mid", "norm2"]):
            assert torch.equal(model(batch), alone)
        assert torch.equal(model(batch), alone)
    with torch.no_grad(), capture(model, "resid_post") as outside, quantized(model, settings, ranges):
        model(batch)
    assert all(len(x.unique()) > 256 for x in outside.values())  # watched from the outside: what goes in


def test_a_site_that_is_not_rounded_is_watched_as_it_is():
    model, batch, settings = (
        Transformer(ENCODER).eval(),
        torch.randint(0, 40, (4, 16)),
        QuantSettings(activation_bits=4),
    )
    ranges = calibrate(model, [batch], settings)
    with torch.no_grad(), quantized(model, settings, ranges), capture(model, ["context", "gated"]) as kept:
        model(batch)
    assert len(kept["blocks.0.gated"].unique()) <= 16 < len(kept["blocks.0.context"].unique())


class Counted(TorchDispatchMode):
    """Counts the operations that are run inside."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.__name__.split(".")[0]] += 1
        return function(*args, **kwargs or {})


def test_a_quantized_forward_makes_no_grid_and_waits_for_nothing():
    model, batch, settings = Transformer(SMALL).eval(), torch.randint(0, 300, (4, 16)), QuantSettings()
    ranges = calibrate(model, [batch], settings)
    sites = [site for site in model.sites() if site in ranges]
    with torch.no_grad(), hooked(model, {"blocks.0.scores": lambda x: None, "blocks.1.scores": lambda x: None}):
        with Counted() as plain:
            model(batch)
        with quantized(model, settings, ranges), Counted() as rounded:
            model(batch)
    added = rounded.seen - plain.seen
    assert added.pop("div", 0) + added.pop("div_", 0) == len(sites)
    assert {name: count for name, count in added.items() if name not in ("detach", "alias")} == {
        name: len(sites) for name in ("round_", "clamp_", "mul_")
    }


def test_calibration_leaves_out_the_head(monkeypatch):
    model = Transformer(SMALL).eval()
    monkeypatch.setattr(model.head, "forward", lambda *_: pytest.fail("the head was computed"))
    calibrate(model, [torch.randint(0, 300, (2, 16))] * 2, QuantSettings())


@pytest.mark.parametrize("norm", ["rmsnorm", "srmsnorm", "none"])
@pytest.mark.parametrize("pre_norms", [("qk", "v", "mlp"), ("v",)], ids="+".join)
def test_what_an_rmsnorm_gives_is_rounded_and_its_gain_where_it_has_one(norm, pre_norms):
    form = {"attention": {"qk_norm": "rmsnorm"}, "residual_gain": 0.5, "gain_kind": "layerscale", "norm": norm}
    model = Transformer(dataclasses.replace(SMALL, **form, **({} if norm == "none" else {"pre_norms": pre_norms})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "gain" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    gains = {name: p.clone() for name, p in model.named_parameters() if "norm" in name or "gain" in name}
    ids, settings = torch.randint(0, SMALL.vocab, (4, 16)), QuantSettings(weight_bits=3, activation_bits=3)
    ranges = calibrate(model, [ids], settings)
    there = {"q_norm", "k_norm"}
    if norm != "none":
        there |= {"norm1", "norm_final"} | ({"norm2"} if "mlp" in pre_norms else set())
    assert {site.split(".")[-1] for site in ranges if site in model.sites() and "norm" in site} == there
    with quantized(model, settings, ranges), capture(model, "*") as seen, torch.no_grad():
        model(ids)
        rounded = {name for name, p in model.named_parameters() if name in gains and not torch.equal(p, gains[name])}
        assert all(len(dict(model.named_parameters())[name].unique()) <= 2**3 for name in rounded)
    assert rounded == {name for name in gains if "gain" not in name}
    for site in (site for site in seen if site.split(".")[-1] in there):
        assert len(seen[site].unique()) <= 2**3, site


def test_every_named_activation_is_on_its_grid():
    model = Transformer(SMALL).eval()
    ids = torch.randint(0, SMALL.vocab, (4, 16))
    settings = QuantSettings(weight_bits=8, activation_bits=3)
    ranges = calibrate(model, [ids], settings)
    sites = [site for site in model.sites() if site in ranges]
    with quantized(model, settings, ranges), capture(model, sites) as seen, torch.no_grad():
        model(ids)
    for site in sites:
        levels = 2**8 if site.startswith("embed_tokens") or site == "embed_positions" else 2**3
        assert len(seen[site].unique()) <= levels, site


def test_sixteen_bits_cost_next_to_nothing():
    model = Transformer(SMALL).eval()
    ids = torch.randint(0, SMALL.vocab, (4, 16))
    settings = QuantSettings(weight_bits=16, activation_bits=16, weights="minmax")
    with torch.no_grad():
        plain = model(ids)
        with quantized(model, settings, calibrate(model, [ids], settings)):
            torch.testing.assert_close(model(ids), plain, rtol=0, atol=1e-3)


def test_bad_input_is_one_clear_line():
    x = torch.randn(4)
    with pytest.raises(UserError, match="unknown scheme 'symetric' .did you mean 'symmetric'"):
        fake_quantize(x, scheme="symetric")
    with pytest.raises(UserError, match="unknown estimator"):
        fake_quantize(x, estimator="max")
    with pytest.raises(UserError, match="bits must be at least 2 and at most 16, got 1"):
        fake_quantize(x, bits=1)
    with pytest.raises(UserError, match="no batches"):
        calibrate(Transformer(SMALL), [], QuantSettings())
    with (
        pytest.raises(UserError, match="calibrate this model with these settings first"),
        quantized(Transformer(SMALL), QuantSettings(), {}),
    ):
        pass


@pytest.mark.parametrize("granularity", quantizers.GRANULARITIES)
def test_each_channel_or_token_can_have_a_range_of_its_own(granularity):
    x = torch.randn(3, 5, 8)
    x[..., 2] *= 100  # an outlier dimension
    x[1, 4] *= 30  # and a large token
    low, high = quantizers.minmax_range(x, granularity)
    assert low.shape == {"tensor": (), "channel": (8,), "token": (3, 5, 1)}[granularity]
    rounded = quantizers.make_grid(low, high, 8, "asymmetric", x).round(x)
    steps = ((high - low) / 255).expand(x.shape) if low.ndim != 1 else ((high - low) / 255).expand_as(x)
    assert ((rounded - x).abs() <= steps * (1 + 1e-4)).all()
    error = (rounded - x)[:, :4][..., torch.arange(8) != 2].abs().mean()
    others = quantizers.make_grid(*quantizers.minmax_range(x), 8, "asymmetric", x).round(x) - x
    whole = others[:, :4][..., torch.arange(8) != 2].abs().mean()
    assert error == whole if granularity == "tensor" else error < 0.1 * whole


def outlying_model():
    """A model whose residual stream has one dimension far larger than the rest, which its norms ignore."""
    torch.manual_seed(3)
    model = Transformer(SMALL).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp_out.bias[5] = 300.0
        for norm in (model.blocks[1].norm1, model.blocks[1].norm2, model.norm_final):
            norm.weight.fill_(1000)[5] = 0
    return model


def test_finer_ranges_or_unrounded_residual_sums_repair_what_an_outlier_dimension_breaks():
    model, batches = outlying_model(), [torch.randint(0, 300, (4, 16)) for _ in range(3)]
    with torch.no_grad():
        exact = model(batches[0])

    def error(**options):
        settings = QuantSettings(weights="minmax", **options)
        with quantized(model, settings, calibrate(model, batches, settings)), torch.no_grad():
            return float((model(batches[0]) - exact).square().mean())

    coarse = error()
    assert error(granularity="channel") < 0.2 * coarse
    assert error(skip=("mlp_out", "resid_mid", "resid_post")) < 0.2 * coarse
    with torch.no_grad():
        assert torch.equal(model(batches[0]), exact)


def test_a_range_per_token_needs_no_calibration():
    settings = QuantSettings(granularity="token")
    model, batch = Transformer(SMALL).double().eval(), torch.randint(0, 300, (4, 16))
    ranges = calibrate(model, [], settings)
    assert not any(site in ranges for site in model.sites() if "blocks" in site)
    with quantized(model, settings, ranges), torch.no_grad():
        both, one = model(batch), model(batch[:1])
    torch.testing.assert_close(both[:1], one)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"granularity": "tokens"}, "unknown granularity 'tokens' .did you mean 'token'"),
        ({"granularity": "channel", "percentile": 99.0}, "percentiles are per tensor only"),
        ({"skip": ("resid",)}, "unknown activation to skip 'resid' .did you mean 'resid_"),
    ],
)
def test_bad_granularities_and_sites_to_skip_are_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message):
        QuantSettings(**bad)


def test_labels_name_what_is_not_the_papers_setting():
    assert QuantSettings().label == "W8A8"
    assert QuantSettings(granularity="token", skip=("resid_mid",)).label == "W8A8 per token -resid_mid"
    assert QuantSettings(weights="minmax", weight_bits=6, draw=2).label == "W6A8 min-max, draw 2"
    assert QuantSettings(weights="minmax", weight_granularity="channel").label == "W8A8, weights per channel"


def test_skipping_what_is_not_rounded_is_an_error_and_order_does_not_matter():
    model = Transformer(SMALL).eval()
    with pytest.raises(UserError, match="skip: gated is not rounded in this model; rounded: attn_out, context"):
        calibrate(model, [torch.randint(0, 300, (2, 8))], QuantSettings(skip=("gated",)))
    assert QuantSettings(skip=("resid_post", "resid_mid")) == QuantSettings(skip=("resid_mid", "resid_post"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16])
def test_half_precision_is_rounded_in_single(dtype, bits):
    x = torch.randn(64).to(dtype)
    found = fake_quantize(x, bits)
    assert found.dtype == dtype
    torch.testing.assert_close(found, fake_quantize(x.float(), bits).to(dtype), rtol=0, atol=0)
    assert torch.equal(fake_quantize(torch.zeros(4, dtype=dtype)), torch.zeros(4, dtype=dtype))
