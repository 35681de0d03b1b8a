"""Healing: what it starts from, what the penalties measure, and that outliers go while the function stays."""

import math

import pytest
import torch

from ofutils import UserError, probes
from ofutils.remedies import Healing, _penalty, _sizes, heal
from ofutils.transformer import Transformer, TransformerConfig

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
