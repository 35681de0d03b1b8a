"""Matrices that multiply in int8, against the simulation.

torchao is no requirement: `tests/data/int8` holds what it computed, and in most tests a stand-in takes its place.
"""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ofutils import UserError, quant, quantizers
from ofutils.quant import QuantSettings
from ofutils.transformer import Transformer
from tests.data.int8 import SETTINGS, SHAPE

WORKFLOWS = ".quantization.quantize_.workflows"
FED = {"norm1", "norm2", "context", "mlp_act"}  # what matrices multiply; before a gate the context, as in the papers


class PerRow:
    """Stands for torchao's, as do those below."""


class PerTensor:
    pass


@dataclass
class Activations:
    granularity: object
    mapping_type: str


@pytest.fixture
def toy(vectors):
    """The model, its batches, and the logits that torchao computed by setting."""
    tensors, _ = vectors("int8")
    model = Transformer(SHAPE).eval()
    model.load_state_dict({n.removeprefix("state."): one for n, one in tensors.items() if n.startswith("state.")})
    return model, tensors["ids"], {name: tensors[name] for name in SETTINGS}


@pytest.fixture
def stand_in(monkeypatch):
    """In torchao's place as much of it as is used; returns what was asked of it for each matrix."""
    asked = []

    def from_hp(weight, granularity, scale, act_quant_kwargs, **static):
        assert scale.shape == (len(weight) if isinstance(granularity, PerRow) else 1, 1)
        assert act_quant_kwargs.mapping_type == "asymmetric"
        assert isinstance(act_quant_kwargs.granularity, PerTensor) == bool(static)
        asked.append(static)
        return (weight / scale).round().clamp(-128, 127) * scale

    torchao = SimpleNamespace(PerRow=PerRow, PerTensor=PerTensor, QuantizeTensorToInt8Kwargs=Activations)
    torchao.Int8Tensor = SimpleNamespace(from_hp=from_hp)
    torchao.MappingType = SimpleNamespace(ASYMMETRIC="asymmetric")
    for name in ("", ".quantization", ".quantization.quant_primitives", ".quantization.quantize_", WORKFLOWS):
        monkeypatch.setitem(sys.modules, f"torchao{name}", torchao)
    return asked


def simulated(model, settings, batches):
    """Logits of the last batch with matrices and what they multiply rounded, ranges from full precision."""
    rounded = {site.split(".")[-1] for site in quant._activation_sites(model, settings)}
    own, logits = replace(settings, skip=tuple(rounded - FED)), []
    with torch.no_grad():
        quant.table(model, [own], batches, lambda: logits.append(model(batches[-1])), "float")
    return logits[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_simulation_has_the_logits_that_int8_has(toy, name):
    model, batches, logits = toy
    settings = SETTINGS[name]
    found, exact = simulated(model, settings, batches), model(batches[-1]).detach()
    # an entry between two steps may go either way, and take the rest of its row with it
    assert (found - logits[name]).abs().median() < 1e-6
    assert (found - logits[name]).square().mean() < 0.05 * (found - exact).square().mean()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_asked_of_torchao(toy, name, stand_in):
    """With activations rounded by what it was told, the stand-in has torchao's logits."""
    model, batches, logits = toy
    before = {key: one.clone() for key, one in model.state_dict().items()}
    found = quant.int8(model, SETTINGS[name], batches)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in found.modules())
    matrices = [one for path, one in found.named_modules() if isinstance(one, nn.Linear)]
    assert len(matrices) == len(stand_in) == 12 and not any(one.weight.requires_grad for one in matrices)

    def rounded(x, static):
        if not static:
            return quantizers.make_grid(*quantizers.minmax_range(x, "token"), 8, "asymmetric").round(x)
        scale, zero = static["act_quant_scale"], static["act_quant_zero_point"]
        assert scale.shape == zero.shape == (1, 1, 1) and zero.dtype == torch.int8
        return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale

    for matrix, static in zip(matrices, stand_in, strict=True):
        matrix.register_forward_pre_hook(lambda _, inputs, static=static: rounded(inputs[0], static))
    with torch.no_grad():
        assert (found(batches[-1]) - logits[name]).abs().median() < 1e-6


def test_gates_heads_and_embeddings_stay_and_a_row_without_negative_weights_is_signed(stand_in):
    shape = replace(SHAPE, head="mlm", causal=False, norm_position="post", attention={"gate": "linear"})
    model = Transformer(replace(shape, embedding={"width": 8, "norm": True})).eval()
    with torch.no_grad():
        model.blocks[0].attention.q.weight[0].abs_()
    found = quant.int8(model, SETTINGS["tensor, channel"], torch.randint(0, 40, (2, 2, 12)))
    changed = {name for name, one in found.state_dict().items() if not torch.equal(one, model.state_dict()[name])}
    assert changed == {name for name, one in quant._weights(model).items() if one.ndim == 2} and len(stand_in) == 14
    top = model.blocks[0].attention.q.weight.abs().amax(1)
    torch.testing.assert_close(found.blocks[0].attention.q.weight.abs().amax(1), top)


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        (
            {"granularity": "channel"},
            1,
            "int8 is W8A8 with activations per tensor or per token, not W8A8 per channel",
        ),
        ({"weight_bits": 4}, 1, "not W4A8"),
        ({"activation_bits": 6}, 1, "not W8A6"),
        ({"outlier_threshold": 6.0, "granularity": "token"}, 1, "not W8A8 per token, exact beyond 6"),
        ({}, 0, "nothing to calibrate on: no batches"),
    ],
)
def test_what_int8_has_not_is_refused(toy, settings, batches, message, stand_in):
    model, rows, _ = toy
    with pytest.raises(UserError, match=message):
        quant.int8(model, QuantSettings(**settings), rows[:batches])


def test_without_torchao_one_line_says_how_to_get_it(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r'^int8 needs torchao: pip install -e "\.\[int8\]" -c constraints\.txt$'):
        quant.int8(toy[0], SETTINGS["token"])


def test_torchao_itself(toy):
    reason = 'torchao comes with the extra int8: pip install -e ".[int8]" -c constraints.txt'
    torchao = pytest.importorskip("torchao.quantization", reason=reason)
    model, batches, logits = toy
    for name, settings in SETTINGS.items():
        found = quant.int8(model, settings, batches)
        weight = found.blocks[1].mlp_out.weight
        assert isinstance(weight, torchao.Int8Tensor) and weight.qdata.dtype == torch.int8
        with torch.no_grad():
            assert (found(batches[-1]) - logits[name]).abs().median() < 1e-6
