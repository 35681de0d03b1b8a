import pytest
import torch
import transformers

from ofutils import UserError, dims, probes
from ofutils.families import from_hf, with_sites
from ofutils.transformer import Transformer
from tests.configurations import SMALL

BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def bert(kind=transformers.BertForMaskedLM):
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**BERT)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def plant(model, dim, layers, weight=2.0, bias=2.0):
    with torch.no_grad():
        for layer in layers:
            norm = model.base_model.encoder.layer[layer].output.LayerNorm
            norm.weight[dim] += weight
            norm.bias[dim] += bias
    return model


def batch():
    return torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", [with_sites, from_hf])
def test_a_planted_dimension_is_found_in_as_many_norms_as_it_was_planted_in(form):
    model = form(plant(plant(bert(), 5, range(6)), 9, range(4)))
    found = dims.counts(model)
    assert found["weight"][5] == 6 and found["bias"][5] == 6
    assert found["weight"][9] == 4 and found["bias"][9] == 4
    assert dims.by_weight(model) == [5, 9]
    assert dims.by_weight(model, layers=5) == [5]
    assert dims.by_weight(model, top=2) == [5]  # the two cards are the same dimension
    assert dims.by_weight(model, sigma=30) == []


def test_far_means_unbiased_standard_deviations_over_the_dimensions():
    model = with_sites(bert())
    norm = model.sites()["blocks.0.norm2"].module
    weight = norm.weight.detach().double()
    z = (weight - weight.mean()).abs() / weight.std()
    for sigma in (1.0, 1.5, 2.0):
        found = dims.counts(model, sigma, "blocks.0.norm2")["weight"]
        assert found.tolist() == (z > sigma).long().tolist()


def test_a_dimension_of_one_list_alone_is_dealt_while_both_lists_last():
    model = plant(plant(bert(), 5, range(6), bias=0.0), 9, range(4), weight=0.0)
    assert dims.by_weight(with_sites(model)) == [5, 9]
    model = plant(bert(), 5, range(6), bias=0.0)
    assert dims.by_weight(with_sites(model)) == []


def test_other_norms_are_asked_for_by_their_sites():
    model = with_sites(bert())
    assert list(dims.norms(model)) == [f"blocks.{layer}.norm2" for layer in range(6)]
    assert len(dims.norms(model, dims.ALL_NORMS)) == 13  # two in each block and that of the embedding
    assert len(dims.norms(with_sites(bert(transformers.BertModel)), dims.ALL_NORMS)) == 13
    vit = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    assert len(dims.norms(with_sites(transformers.ViTModel(vit)), dims.ALL_NORMS)) == 5
    llama = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = with_sites(transformers.LlamaModel(transformers.LlamaConfig(**llama, intermediate_size=48)))
    assert set(dims.counts(model, where=dims.ALL_NORMS)) == {"weight"}


def test_the_largest_activation_names_the_dimension():
    model = from_hf(plant(bert(), 11, [2], weight=0.0, bias=40.0))
    measured = probes.measure(model, [batch()], "norm2", meters=("max_abs",))
    assert dims.by_activation(measured, 1) == [11]


@pytest.mark.parametrize("form", [with_sites, from_hf])
def test_ablation_zeroes_exactly_what_it_says_and_restores_it_to_the_bit(form):
    original = bert()
    model = form(original)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with probes.capture(model, "norm2") as kept, dims.ablated(model, [3, 8]) as count, torch.no_grad():
        changed = model(batch())
        zeroed = [int((parameter != before[name]).sum()) for name, parameter in model.named_parameters()]
        assert count == sum(zeroed) == 2 * 2 * 6
        assert all((x[..., [3, 8]] == 0).all() and (x[..., 4] != 0).all() for x in kept.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert not torch.allclose(model(batch()), changed)
    with pytest.raises(RuntimeError, match="inside"), dims.ablated(model, [3]):
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_one_block_alone_and_the_head_only_when_asked():
    model = from_hf(bert())
    with dims.ablated(model, [3], "blocks.4.norm2") as count:
        assert count == 2 and model.blocks[4].norm2.weight[3] == 0 and model.blocks[3].norm2.weight[3] != 0
    with dims.ablated(model, [3, 8]):
        assert (model.head.norm.weight[[3, 8]] != 0).all()
    with dims.ablated(model, [3, 8], ("norm2", "head.norm")) as count:
        assert count == 2 * 2 * 7 and (model.head.norm.weight[[3, 8]] == 0).all()


def test_48_parameters_of_bert_base_and_52_with_the_norm_of_its_head():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig())
        shape = {"vocab": 30522, "layers": 12, "width": 768, "heads": 12, "context": 512, "causal": False}
        form = {
            "activation": "gelu",
            "norm_position": "post",
            "embedding": {"norm": True, "segments": 2},
            "head": "mlm",
        }
        ours = Transformer(type(SMALL)(**shape, **form))
    assert model.num_parameters() == sum(p.numel() for p in ours.parameters()) == 109_514_298
    for one in (with_sites(model), ours):
        with dims.ablated(one, [308, 381]) as count:
            assert count == 48
    with dims.ablated(ours, [308, 381], ("norm2", "head.norm")) as count:
        assert count == 52


@pytest.mark.parametrize(
    ("dimensions", "where", "message"),
    [
        ([32], "norm2", "dimension 32 is out of range: there are dimensions 0 to 31"),
        ([-1], "norm2", "dimension -1 is out of range"),
        ([3], "norm3", "unknown site 'norm3' .did you mean 'norm"),
        ([3], "mlp_out", "no norm with parameters at mlp_out"),
        ([3], "head.norm", "no norm with parameters at head.norm"),
        ([3], ("norm2", "head.norm"), "no norm with parameters at head.norm"),
        ([3], (), "no site is named"),
        ("12", "norm2", "dimensions are whole numbers, got '12'"),
        ([3.9], "norm2", "dimensions are whole numbers"),
    ],
)
def test_bad_dimensions_and_norms_are_one_clear_line(dimensions, where, message):
    model = from_hf(bert(transformers.BertModel))
    with pytest.raises(UserError, match=message), dims.ablated(model, dimensions, where):
        pass


def test_the_head_of_a_model_that_is_only_read_is_never_left_out_in_silence():
    with pytest.raises(UserError, match="no norm with parameters at head.norm"):
        dims.norms(with_sites(bert()), ("norm2", "head.norm"))
    with pytest.raises(UserError, match="BertForMaskedLM has no sites: take families.with_sites"):
        dims.norms(bert())


def test_thresholds_and_counts_that_make_no_sense_are_one_clear_line():
    model = from_hf(bert())
    for wrong in ({"layers": 0}, {"sigma": 0.0}, {"sigma": float("nan")}):
        with pytest.raises(UserError, match="must be"):
            dims.by_weight(model, **wrong)
    measured = probes.measure(model, [batch()], ("norm2", "mlp_act"), meters=("max_abs",))
    with pytest.raises(UserError, match="different widths"):
        dims.by_activation(measured)
    measured = probes.measure(model, [batch()], "norm2", meters=("max_abs",))
    for top in (0, 33):
        with pytest.raises(UserError, match=f"top must lie between 1 and 32, got {top}"):
            dims.by_activation(measured, top)


def test_norms_without_biases_have_one_list():
    llama = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = with_sites(transformers.LlamaModel(transformers.LlamaConfig(**llama, intermediate_size=48)))
    for norm in dims.norms(model).values():
        norm.weight.data[7] = 9.0
    assert dims.by_weight(model) == [7]


def test_a_model_without_norms_is_one_clear_line():
    model = Transformer(type(SMALL)(vocab=60, layers=2, width=16, heads=2, context=8, norm="none", final_norm=False))
    with pytest.raises(UserError, match="no norm with parameters at norm2"):
        dims.by_weight(model)
