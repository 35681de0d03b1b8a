import pytest
import torch
from torch import nn

from ofutils import UserError, optim
from ofutils.optim import SOAP
from ofutils.transformer import Transformer, TransformerConfig, clm_loss
from tests.configurations import METHODS, SMALL


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_soap_equals_the_reference(vectors, dtype):
    """To what float32 leaves of it: LAPACK's eigenvectors of an n x n Gram are off by n eps / gap at most, where gap
    is the smallest distance of two eigenvalues over the largest (Davis and Kahan), and every update by as much of
    its length, twice where both sides of the comparison are in float32. The reference is; in float64 ours is not,
    so what is compared is then the same on every machine."""
    tensors, _ = vectors("soap")
    weight = nn.Parameter(tensors["frequency10.w0"].to(dtype, copy=True))
    optimizer = SOAP([weight], lr=1e-2, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10)
    grams, bound, sides = [torch.zeros(8, 8, dtype=torch.float64)] * 2, 0.0, 1 if dtype == torch.float64 else 2
    for step in range(40):
        weight.grad = tensors[f"frequency10.grad.{step}"].to(dtype)
        grad, before = weight.grad.double(), weight.data.clone()
        optimizer.step()
        grams = [0.95 * gram + 0.05 * new for gram, new in zip(grams, (grad @ grad.T, grad.T @ grad), strict=True)]
        spectra = [torch.linalg.eigvalsh(gram) for gram in grams]
        gap = min(float(values.diff().min() / values.max()) for values in spectra)
        bound += sides * 8 * torch.finfo(torch.float32).eps / gap * float((weight.data - before).norm())
        assert float((weight.data.double() - tensors[f"frequency10.w.{step}"]).norm()) <= bound
    assert bound < 5e-4 * float((weight.data - tensors["frequency10.w0"]).norm())  # it would see a wrong formula


def test_soap_on_a_vector_is_adam_with_its_own_eps():
    weight = nn.Parameter(torch.randn(6))
    start = weight.detach().clone()
    grads = torch.randn(5, 6)
    optimizer = SOAP([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    first, second = torch.zeros(6), torch.zeros(6)
    for step, grad in enumerate(grads[1:], start=1):  # the first step only initialises
        first = 0.9 * first + 0.1 * grad
        second = 0.99 * second + 0.01 * grad**2
        start -= 0.1 * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step) * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(weight.data, start)


def test_soap_turns_with_the_gradients():
    """In the eigenbasis, orthogonal changes of both sides change the trajectory by the same turn."""
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(2))
    grads = torch.randn(25, 6, 6, dtype=torch.float64)
    start = torch.randn(6, 6, dtype=torch.float64)
    ends = []
    for turn in (False, True):
        weight = nn.Parameter(left @ start @ right if turn else start.clone())
        optimizer = SOAP([weight], lr=0.1, weight_decay=0.1)
        for grad in grads:
            weight.grad = left @ grad @ right if turn else grad.clone()
            optimizer.step()
        ends.append(weight.data)
    torch.testing.assert_close(ends[1], left @ ends[0] @ right, rtol=0, atol=1e-8)


def test_soap_does_not_rotate_a_long_side_and_its_state_is_tensors():
    weight = nn.Parameter(torch.randn(30, 4))
    optimizer = SOAP([weight], max_precondition_dim=10)
    weight.grad = torch.randn(30, 4)
    optimizer.step()
    assert "basis_left" not in optimizer.state[weight] and "basis_right" in optimizer.state[weight]
    assert all(isinstance(entry, torch.Tensor) for entry in optimizer.state[weight].values())


def test_soap_refuses_bad_settings():
    with pytest.raises(UserError, match="frequency 0"):
        SOAP([nn.Parameter(torch.zeros(2))], precondition_frequency=0)


def test_the_vocabulary_is_not_rotated():
    model = Transformer(SMALL)
    optimizer = optim.make("soap", model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rotated = {
        tuple(state["exp_avg"].shape): {k for k in state if "basis" in k} for state in optimizer.state.values()
    }
    assert rotated.pop((1, *model.token_embedding.weight.shape)) == {"basis_right"}
    vectors = [shape for shape in rotated if len(shape) == 1]
    assert len(vectors) == 1 and rotated.pop(vectors[0]) == set()
    assert set(map(len, rotated.values())) == {2}
    square = (
        4 * SMALL.layers + 1,
        SMALL.width,
        SMALL.width,
    )  # q, k, v, attn_out of all blocks; positions, as wide here
    assert square in rotated


def test_stacks_give_what_each_parameter_gives_alone():
    shapes = [(6, 4), (6, 4), (4, 6), (5,), (6, 4), (3,)]
    starts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    grads = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(23)]
    ends = []
    for alone in (False, True):
        weights = [nn.Parameter(start.clone()) for start in starts]
        optimizer = SOAP([{"params": [weight]} for weight in weights] if alone else weights, lr=0.1)
        for step in grads:
            for weight, grad in zip(weights, step, strict=True):
                weight.grad = grad.clone()
            optimizer.step()
        ends.append(weights)
    assert len(optimizer.state) == len(shapes)
    for together, one in zip(*ends, strict=True):
        torch.testing.assert_close(together, one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 2), (3,)])
def test_soap_refuses_gradients_that_come_and_go_before_anything_moves(shape):
    weights = [nn.Parameter(torch.randn(5, 5))] + [nn.Parameter(torch.randn(shape)) for _ in range(4)]
    optimizer = SOAP(weights)

    def step(with_gradient):
        for index, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) if index in with_gradient else None
        optimizer.step()

    step({0, 2, 3})
    step({0, 2, 3})
    before = [weight.detach().clone() for weight in weights]
    for changed in ({0, 1, 2, 3}, {0, 2}, {0, 1, 2}, {0, 2, 4}, {0}, {2, 3}):
        with pytest.raises(UserError, match="has a gradient that had none before, or lost its own"):
            step(changed)
        assert all(torch.equal(weight, one) for weight, one in zip(weights, before, strict=True))
    step({0, 2, 3})
    assert [torch.equal(weight, one) for weight, one in zip(weights, before, strict=True)] == [
        False, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(method):
    model = Transformer(TransformerConfig(**{**SMALL.__dict__, **METHODS[method]}))
    decayed, plain = (group["params"] for group in optim.groups(model, 0.1))
    assert len(decayed) + len(plain) == len({id(p) for p in (*decayed, *plain)}) == len(list(model.parameters()))
    assert all(parameter.ndim >= 2 for parameter in decayed)
    assert not any(d is p for d in decayed for name, p in model.named_parameters() if "bias" in name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("bias" in n or "norm" in n or "gain" in n for n in (names[id(p)] for p in plain))


def test_decay_norm_adds_the_gains_of_norms_and_nothing_else():
    model = Transformer(SMALL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without = {names[id(p)] for p in optim.groups(model, 0.1)[0]["params"]}
    with_gains = {names[id(p)] for p in optim.groups(model, 0.1, decay_norm=True)[0]["params"]}
    assert with_gains - without == {n for n in names.values() if "norm" in n and n.endswith("weight")}


def test_schedule_warms_up_and_decays_to_zero():
    found = [optim.schedule(step, 10, 4) for step in range(11)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[-1] == 0 and all(a > b for a, b in zip(found[4:], found[5:], strict=False))


def test_an_unknown_optimizer_names_the_known_ones():
    with pytest.raises(UserError, match="known: adamw, soap, sgd, adafactor, rotated_adafactor, shampoo, muon"):
        optim.make("adam", Transformer(SMALL), 1e-3, (0.9, 0.95), 1e-8, 0.1)


def test_soap_leaves_the_vocabulary_side_of_an_untied_head_alone():
    model = Transformer(TransformerConfig(vocab=90, layers=1, width=16, heads=2, context=8, head="untied"))
    optimizer = optim.make("soap", model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    clm_loss(model(ids := torch.randint(0, 90, (2, 8))), ids).backward()
    optimizer.step()
    tables = optimizer.state[model.token_embedding.weight]  # both, in one stack
    assert tables["exp_avg"].shape == (2, 90, 16) and tables["basis_right"].shape == (2, 16, 16)
    assert "basis_left" not in tables and model.head.weight not in optimizer.state
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == len(list(model.parameters()))
