"""Healing: what it starts from, what the penalties measure, and that outliers go while the function stays.

Smoothing and rotation: that the function stays exactly as it is, in every form. LLM.int8()'s decomposition: what is
rounded and what is not.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ofutils import UserError, families, hub, metrics, probes, quant, remedies
from ofutils.quant import QuantSettings
from ofutils.quantizers import fake_quantize
from ofutils.records import differing
from ofutils.remedies import LLM_INT8, Healing, _penalty, _sizes, hadamard, heal, rotate, smooth
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import sentences

SHAPE = {"vocab": 40, "layers": 2, "width": 16, "heads": 2, "context": 12}


def planted(**changed):
    """A model that adds a large constant to one dimension of every token, and batches."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE | {"init_std": 0.1} | changed)).eval()
    with torch.no_grad():
        model.blocks[0].mlp_out.bias[3] = 3.0
    return model, [torch.randint(0, 40, (4, 12)) for _ in range(3)]


def test_the_penalties_are_what_they_say_and_know_no_scale():
    x = torch.zeros(5, 8)
    x[:, 2] = 3.0  # one of 8 entries holds everything: kurtosis 8, the largest over the root mean square sqrt(8)
    for scale in (1.0, 7.0):
        sizes = {"a": _sizes(scale * x), "b": _sizes(scale * x)}
        assert _penalty(sizes, "kurtosis").item() == pytest.approx(math.log(8))
        assert _penalty(sizes, "max").item() == pytest.approx(math.log(8) / 2)
        assert _penalty(sizes, "none") == 0.0
        assert sizes["a"]["max"].item() == pytest.approx(3 * scale)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
def test_gates_start_at_pi_init_for_every_input(gate):
    model, batches = planted()
    own = Healing(attention={"gate": gate, "pi_init": 0.9}, steps=1, lr=1e-12)
    healed, _ = heal(model, batches, own)
    with probes.capture(healed, "gate") as seen:
        healed(batches[0])
    assert not healed.training
    for gates in seen.values():
        torch.testing.assert_close(gates, torch.full_like(gates, 0.9))


def test_healing_starts_at_the_original():
    for head in ("tied", "none"):
        _, log = heal(*planted(head=head), Healing(steps=1))
        assert abs(log[0]["distance"]) < 1e-5


@pytest.mark.parametrize("head", ["tied", "none"])
@pytest.mark.parametrize("penalty", ["kurtosis", "max"])
def test_the_outlier_goes_and_the_original_stays_as_it_is(head, penalty):
    model, batches = planted(head=head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    healing = Healing(penalty=penalty, weight=0.3, steps=300, warmup=10, lr=1e-2, sites=("mlp_out",))
    healed, log = heal(model, batches, healing)
    assert [entry["step"] for entry in log] == list(range(1, 301))
    assert log[0]["kurtosis"] > 10 and log[-1]["kurtosis"] < log[0]["kurtosis"] / 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(healed.token_embedding.weight, model.token_embedding.weight)


def test_padding_counts_nowhere():
    model, _ = planted(head="none")
    ids, mask = torch.randint(0, 40, (3, 10)), torch.ones(3, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % 40)
    found = [heal(model, [{"input_ids": x, "attention_mask": mask}], Healing(steps=2))[1] for x in (ids, other)]
    assert found[0] == found[1]


def test_a_seed_is_an_order_of_the_batches_and_makes_all_of_the_run():
    model, batches = planted()
    first, again, other = (heal(model, batches, Healing(steps=4, seed=seed))[1] for seed in (1, 1, 2))
    assert first == again != other


def test_what_cannot_be_healed_says_so():
    model, batches = planted()
    with pytest.raises(UserError, match="nothing to heal on"):
        heal(model, [])
    with pytest.raises(UserError, match="unknown site 'mlp_uot'"):
        heal(model, batches, Healing(sites=("mlp_uot",)))
    with pytest.raises(UserError, match="not the plain one"):
        heal(planted(attention={"alpha": 4})[0], batches)


# --- folded into the weights


def rough(**changed):
    """A model in float64 with gains and biases that are not what they start from, and batches."""
    torch.manual_seed(0)
    shape = SHAPE | {"width": 24, "init_std": 0.2}
    model = Transformer(TransformerConfig(**shape | changed)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.3 * torch.randn_like(parameter)
    return model, [torch.randint(0, 40, (4, 12)) for _ in range(3)]


@torch.no_grad()
def assert_same_function(ours, model, batches):
    """To 1e-10 of the largest output, with padding too; and that the state fits the configuration."""
    mask = torch.ones_like(batches[0])
    mask[1, 7:] = 0
    for seen in (torch.ones_like(mask), mask):
        found, expected = (one(batches[0], seen)[seen.bool()] for one in (ours, model))
        assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    again = Transformer(ours.config).double().eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(batches[0]), ours(batches[0]))
    assert not ours.training and not any(one.requires_grad for one in ours.parameters())


NORMED = {  # pre-norm
    "layernorm": {},
    "rmsnorm": {"norm": "rmsnorm"},
    "srmsnorm": {"norm": "srmsnorm"},
    "a large eps": {"norm_eps": 0.3},
    "a large eps outside": {"norm": "rmsnorm", "norm_eps": 0.3},
    "a large eps inside": {"norm": "rmsnorm", "norm_eps": 0.3, "rms_eps": "inside"},
    "untied": {"head": "untied", "norm": "rmsnorm"},
    "untied layernorm": {"head": "untied", "activation": "gelu"},
    "biased": {"head": "biased"},
    "narrow": {"embedding": {"width": 8}},
    "narrow rmsnorm": {"norm": "rmsnorm", "embedding": {"width": 8}},
    "segments and scale": {"embedding": {"segments": 2, "scale": 3.0}},
    "GPT-NeoX": {"parallel": True, "head": "untied", "embedding": {"positions": "rotary", "rotary_share": 0.5}},
    "linear gate": {"attention": {"gate": "linear"}},
    "all heads gate": {"attention": {"gate": "all_heads"}},
    "qk layernorm": {"attention": {"qk_norm": "layernorm", "alpha": 2.0}},
    "qk rmsnorm": {"attention": {"qk_norm": "rmsnorm"}, "rms_eps": "inside"},
    "layerscale": {"residual_gain": 0.5, "gain_kind": "layerscale"},
    "fixed gain, alpha": {"residual_gain": 0.5, "gain_kind": "fixed", "gain_on": "mlp", "mlp_alpha": 0.7},
    "norm before qk": {"norm": "rmsnorm", "pre_norms": ("qk",), "mlp_alpha": 0, "attention": {"gate": "linear"}},
    "norm before v and mlp": {"norm": "rmsnorm", "pre_norms": ("v", "mlp"), "attention": {"gate": "linear"}},
    "no final norm": {"norm": "srmsnorm", "final_norm": False},
}
NORMLESS = {
    "OP": {"norm": "none", "attention": {"qk_norm": "layernorm"}, "residual_gain": 0.2, "final_norm": False},
    "OP, layerscale": {
        "norm": "none",
        "attention": {"qk_norm": "rmsnorm", "value_skip": 1.0, "value_gain": 0.3},
        "residual_gain": 0.2,
        "gain_kind": "layerscale",
        "gain_on": "attention",
        "mlp_alpha": 0,
    },
}


@pytest.mark.parametrize("form", NORMED | NORMLESS)
def test_rotating_leaves_the_function_and_the_original_as_they_are(form):
    model, batches = rough(**(NORMED | NORMLESS)[form])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotated = rotate(model, seed=3)
    assert_same_function(rotated, model, batches)
    assert_same_function(rotate(rotated, seed=4), model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    centred = model.config.norm == "layernorm"
    with probes.capture(model, "resid_post") as exact, probes.capture(rotated, "resid_post") as turned:
        model(batches[0]), rotated(batches[0])
    for site, x in exact.items():
        x = x - x.mean(-1, keepdim=True) if centred else x
        torch.testing.assert_close(turned[site], x @ hadamard(24, 3), rtol=0, atol=1e-10 * float(x.abs().max()))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", [*NORMED, "mlp gate"])
def test_smoothing_leaves_the_function_and_the_original_as_they_are(form, alpha):
    model, batches = rough(**NORMED.get(form, {"attention": {"gate": "mlp"}}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smoothed = smooth(model, batches, alpha)
    assert_same_function(smoothed, model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not all(
        torch.equal(value, before[name]) for name, value in smoothed.state_dict().items() if name in before
    )


@pytest.mark.parametrize("width", [1, 2, 3, 12, 37, 64])
def test_hadamards_are_orthogonal_and_flat(width):
    found = hadamard(width, seed=1)
    torch.testing.assert_close(found @ found.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found.abs().max()) <= (width & -width) ** -0.5 * (1 + 1e-12)
    assert torch.equal(found, hadamard(width, seed=1))
    if width == 64:
        torch.testing.assert_close(found.abs(), torch.full_like(found, 1 / 8), rtol=0, atol=1e-12)
        assert not torch.equal(found, hadamard(width, seed=2))


def test_a_rotation_by_the_identity_does_nothing():
    for form in ({"norm": "srmsnorm"}, NORMLESS["OP"]):
        model, _ = rough(**form)
        found = remedies._turned(model, torch.eye(24, dtype=torch.float64))
        assert found.config == model.config
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_heads_are_untied_where_a_gain_is_folded_into_them_and_get_a_bias_where_a_bias_is():
    heads = {name: rotate(rough(**form)[0]).config.head for name, form in (NORMED | NORMLESS).items()}
    assert heads["layernorm"] == heads["narrow"] == heads["biased"] == "biased"
    assert heads["rmsnorm"] == heads["untied"] == "untied"
    assert heads["srmsnorm"] == heads["no final norm"] == heads["narrow rmsnorm"] == heads["OP"] == "tied"


def test_a_rotation_spreads_one_huge_neuron_over_all_of_them():
    model, batches = planted(width=64, norm="rmsnorm")
    with torch.no_grad():
        model.blocks[0].mlp_out.bias[3] = 50.0
    for one, low, high in ((model, 0.9 * 64, 64), (rotate(model), 1, 1.1)):  # 1: all neurons are equally large
        with probes.capture(one, "resid_post") as kept, torch.no_grad():
            one(batches[0])
        x = kept["blocks.0.resid_post"]
        assert low < metrics.neuron_kurtosis(x.flatten(0, 1)) <= high
        assert (metrics.tensor_kurtosis(x).max() < 3.5) == (one is not model)  # that of a Gaussian is 3


def largest_of_channels(model, batches, site):
    return probes.measure(model, batches, site, meters=("max_abs",)).sites[site].maxima["largest"]


def test_smoothing_by_its_closed_forms():
    model, batches = rough(attention={"gate": "all_heads"})
    readers = {"norm1": ("attention.q", "attention.k", "attention.v"), "norm2": ("mlp_fc",)}
    for alpha in (0.0, 0.3, 1.0):
        smoothed = smooth(model, iter(batches), alpha)
        for site in ("blocks.0.norm1", "blocks.1.norm2"):
            block, norm = site.rsplit(".", 1)
            x, y = (largest_of_channels(one, batches, site) for one in (model, smoothed))
            matrices = [
                [one.get_submodule(f"{block}.{name}").weight for name in readers[norm]] for one in (model, smoothed)
            ]
            w, v = (torch.cat(one).abs().amax(0) for one in matrices)
            torch.testing.assert_close(y, (x * w) ** (1 - alpha))
            torch.testing.assert_close(v, (x * w) ** alpha)


def test_smoothing_looks_past_padding():
    model, _ = rough()
    ids, mask = torch.randint(0, 40, (3, 10)), torch.ones(3, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % 40)
    found = [smooth(model, [{"input_ids": x, "attention_mask": mask}]).state_dict() for x in (ids, other)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@torch.no_grad()
def cost(model, batches, settings, exact):
    """Mean squared change of the logits by rounding, over their mean square."""
    (found,) = quant.table(model, [settings], batches[1:], lambda: model(batches[0]))
    return float((found - exact).square().mean() / exact.square().mean())


def with_an_outlier(norm="layernorm"):
    """A model that computes what it did, with a neuron of the norms' outputs a hundred times as large."""
    model, batches = rough(norm=norm, width=64)
    with torch.no_grad():
        for block in model.blocks:
            for own, matrices in (
                (block.norm1, (block.attention.q, block.attention.k, block.attention.v)),
                (block.norm2, (block.mlp_fc,)),
            ):
                for parameter in own.parameters():
                    parameter[5] *= 100
                for matrix in matrices:
                    matrix.weight[:, 5] /= 100
        return model, batches, model(batches[0])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_an_outlier_that_costs_at_eight_bits_costs_nothing_with_either_remedy(norm):
    model, batches, exact = with_an_outlier(norm)
    settings = QuantSettings(weights="minmax")
    before = cost(model, batches, settings, exact)
    for remedied in (smooth(model, batches), rotate(model), smooth(rotate(model), batches)):
        assert cost(remedied, batches, settings, exact) < before / 30
    assert cost(model, batches, LLM_INT8, exact) < before / 30


def test_an_outlier_of_the_stream_goes_by_rotation_alone():
    model, batches = rough(norm="rmsnorm", width=64)
    with torch.no_grad():
        model.blocks[0].mlp_out.bias[3] = 1000.0
        exact = model(batches[0])
    settings = QuantSettings(weights="minmax")
    before = cost(model, batches, settings, exact)
    assert cost(rotate(model), batches, settings, exact) < before / 10
    assert cost(smooth(model, batches), batches, settings, exact) > before / 10


@pytest.mark.parametrize(
    ("remedy", "form", "said"),
    [
        (rotate, {"norm_position": "post"}, "rotate: in post-norm models the norms' gains stand in the residual"),
        (rotate, {"embedding": {"norm": True}}, "rotate: the gain of the norm on the embeddings stands"),
        (rotate, {"head": "mlm"}, "rotate: head mlm has no matrix of its own"),
        (rotate, {"head": "none"}, "rotate: head none has no matrix of its own"),
        (rotate, {"attention": {"gate": "mlp"}}, "rotate: a gate of kind mlp reads slices of the stream"),
        (rotate, {"pre_norms": ("qk", "mlp")}, "rotate: what reads the stream without a LayerNorm would miss"),
        (rotate, {"final_norm": False}, "rotate: what reads the stream without a LayerNorm would miss"),
        (rotate, {"attention": {"qk_norm": "rmsnorm"}}, "rotate: LayerNorms become norms with rms_eps inside"),
        (smooth, {"norm_position": "post"}, "smooth: in post-norm models the norms' outputs are the residual"),
        (smooth, {"norm": "none"}, "smooth: this model has no norm before a matrix"),
    ],
)
def test_what_cannot_be_folded_exactly_is_refused(remedy, form, said):
    model, batches = rough(**form)
    with pytest.raises(UserError, match=said) as error:
        remedy(model) if remedy is rotate else remedy(model, batches)
    assert "\n" not in str(error.value)


def test_smoothing_needs_batches_and_an_alpha_between_0_and_1():
    model, batches = rough()
    with pytest.raises(UserError, match="no batches"):
        smooth(model, [])
    with pytest.raises(UserError, match="alpha must be at least 0 and at most 1, got 2"):
        smooth(model, batches, 2)


# --- mixed decomposition


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_a_threshold_that_nothing_passes_is_plain_rounding_to_the_bit(granularity):
    model, batches = planted()
    plain = QuantSettings(granularity=granularity)
    with torch.no_grad():
        found = [
            quant.table(model, [replace(plain, outlier_threshold=own)], batches, lambda: model(batches[0]), kind)[0]
            for own in (0.0, 1e30)
            for kind in ("quantized", "float")
        ]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_a_threshold_that_everything_passes_leaves_activations_and_matrices_as_they_are(granularity):
    model, batches = rough(head="untied", attention={"qk_norm": "layernorm"})
    settings = replace(LLM_INT8, granularity=granularity, outlier_threshold=1e-300, skip=("scores", "probs"))
    expected = deepcopy(model)
    with torch.no_grad():
        for table in (expected.token_embedding.weight, expected.position_embedding.weight):
            table.copy_(fake_quantize(table, 8))
        (found,) = quant.table(model, [settings], batches, lambda: model(batches[0]))
        with probes.capture(expected, "scores") as kept:
            torch.testing.assert_close(found, expected(batches[0]), rtol=0, atol=1e-10)
    if granularity == "tensor":  # calibration sees that network too
        ranges = quant.calibrate(model, batches[:1], replace(settings, skip=("probs",)))
        ends = torch.stack(kept["blocks.0.scores"].aminmax())
        torch.testing.assert_close(ranges["blocks.0.scores"], ends, rtol=0, atol=1e-10)


def test_outliers_are_multiplied_in_full_precision_and_the_rest_on_the_grids_of_what_is_left():
    model, batches = rough()
    settings = replace(LLM_INT8, activation_bits=4, weight_bits=4, outlier_threshold=3.0)
    ranges, weight = quant.calibrate(model, batches, settings), model.blocks[0].mlp_fc.weight.clone()
    with torch.no_grad(), quant.quantized(model, settings, ranges), probes.capture(model, ["norm1", "norm2"]) as kept:
        rounded, outputs = model.blocks[0].mlp_fc.weight.clone(), []
        handle = model.blocks[0].mlp_fc.register_forward_hook(lambda *seen: outputs.append(seen[-1].clone()))
        model(batches[0])
        handle.remove()
    x = kept["blocks.0.norm2"]
    outliers = (x.abs() > 3).flatten(0, 1).any(0)
    assert 0 < int(outliers.sum()) < 24
    for token in x.flatten(0, 1)[:, ~outliers]:
        assert len(token.unique()) <= 16
    assert len(x[..., outliers].unique()) == x[..., outliers].numel()
    expected = x[..., outliers] @ weight[:, outliers].T + x[..., ~outliers] @ rounded[:, ~outliers].T
    torch.testing.assert_close(outputs[0], expected + model.blocks[0].mlp_fc.bias)
    assert not torch.equal(rounded, weight) and torch.equal(model.blocks[0].mlp_fc.weight, weight)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_by_channel_are_rows_rounded_one_by_one():
    model, batches = rough()
    settings = QuantSettings(weights="minmax", weight_granularity="channel", weight_bits=4)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with quant.quantized(model, settings, quant.calibrate(model, batches, settings)):
        for name in ("blocks.0.attention.q", "blocks.1.mlp_out"):
            rows = torch.stack([fake_quantize(row, 4) for row in own[f"{name}.weight"]])
            assert torch.equal(model.get_submodule(name).weight, rows)
        torch.testing.assert_close(model.norm_final.weight.data, own["norm_final.weight"])
    with pytest.raises(UserError, match="weight_granularity channel is for weights minmax"):
        QuantSettings(weight_granularity="channel")


def test_a_table_of_such_settings_equals_them_one_by_one():
    model, batches = planted()
    plain = QuantSettings(weights="minmax")
    several = [LLM_INT8, plain, replace(plain, weight_granularity="channel"), replace(plain, outlier_threshold=0.5)]
    with torch.no_grad():
        together = quant.table(model, several, batches, lambda: model(batches[0]))
        for settings, found in zip(several, together, strict=True):
            with quant.quantized(model, settings, quant.calibrate(model, batches, settings)):
                assert torch.equal(model(batches[0]), found)
        floats = quant.table(model, several, batches, lambda: model(batches[0]), "float")
    assert torch.equal(floats[0], together[0])  # per token there is nothing to calibrate
    _, whole, _, rest = (found.get("blocks.0.mlp_out") for found in quant._in_float(model, batches, several))
    assert whole[1] > 3 and rest.abs().max() <= 0.5  # the range of the rest


def test_settings_without_either_are_called_what_they_were():
    assert differing(QuantSettings()) == {} and QuantSettings().label == "W8A8"
    assert LLM_INT8.label == "W8A8 per token, weights per channel, exact beyond 6"
    assert differing(LLM_INT8) == {
        "weights": "minmax",
        "granularity": "token",
        "weight_granularity": "channel",
        "outlier_threshold": 6.0,
    }


@pytest.mark.skipif(not hub.find_minilm(), reason=f"the packaged MiniLM is not here: {hub.GET_MINILM}")
def test_a_trained_encoder_is_refused_by_what_folds_and_saved_by_decomposition():
    model, tokenizer = families.from_hf(hub.model(hub.MINILM)), hub.tokenizer(hub.MINILM)
    batches = [dict(tokenizer(sentences(24), padding=True, return_tensors="pt"))]
    with pytest.raises(UserError, match="post-norm"):
        rotate(model)
    with pytest.raises(UserError, match="post-norm"):
        smooth(model, batches)
    exact = probes.embed(model, batches)

    def far():
        return 1 - float(torch.cosine_similarity(probes.embed(model, batches), exact).mean())

    plain, decomposed = quant.table(model, [QuantSettings(weights="minmax"), LLM_INT8], batches, far)
    assert plain > 0.02 and decomposed < plain / 10
