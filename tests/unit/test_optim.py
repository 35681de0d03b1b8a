import copy
import re
from functools import partial

import pytest
import torch
from torch import nn

from ofutils import UserError, optim
from ofutils.optim import SOAP, Preconditioned
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


ROTATED = {second: partial(Preconditioned, second=second) for second in optim.SECOND}
STRAIGHT = {
    "adamw": torch.optim.AdamW,
    "adafactor": partial(Preconditioned, max_precondition_dim=0, second="rank1"),
    "adam, as Preconditioned": partial(Preconditioned, max_precondition_dim=0),
}


def path(make, grads, start=None):
    """The parameter after each step, from `start` (or zero) on."""
    weight, found = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone()), []
    optimizer = make([weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("name", [*ROTATED, *STRAIGHT])
def test_what_is_rotated_turns_with_the_gradients_and_nothing_else_does(name):
    """In the eigenbasis, orthogonal changes of both sides change the trajectory by the same turn."""
    make = partial((ROTATED | STRAIGHT)[name], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(2))
    grads, start = torch.randn(25, 6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    expected = left @ path(make, grads, start)[-1] @ right
    off = (path(make, left @ grads @ right, left @ start @ right)[-1] - expected).abs().max()
    assert off < 1e-8 if name in ROTATED else off > 0.1


def root(gram):
    """gram^(-1/2)."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


@pytest.mark.parametrize("rows", [6, 9])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("second", ["rank1", "eigenvalues"])
def test_rotated_adafactor_is_shampoo_scaled_by_the_trace(second, beta1, rows):
    """he2024's identity: with exact bases, sqrt(tr L) L^(-1/2) M R^(-1/2), where a side that is not rotated has the
    diagonal of L. The first gradient has the eigenvectors of all that follow for its singular vectors."""
    beta2, steps = 0.9, 15
    grads = torch.randn(steps, rows, 6, dtype=torch.float64)
    weights = (1 - beta2) * beta2 ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    left, right = (torch.einsum(f"t,{sides}->ij", weights, grads, grads) for sides in ("tik,tjk", "tki,tkj"))
    bases = [torch.linalg.eigh(gram).eigenvectors for gram in (left, right)]
    first = bases[0][:, :6] @ torch.diag(torch.arange(1.0, 7, dtype=torch.float64)) @ bases[1].T
    make = partial(Preconditioned, lr=1.0, betas=(beta1, beta2), eps=0.0, weight_decay=0.0, second=second)
    make = partial(make, precondition_frequency=100, max_precondition_dim=6)
    update = -path(make, [first, *grads]).diff(dim=0)[-1]

    average = sum((1 - beta1) * beta1 ** (steps - 1 - step) * grad for step, grad in enumerate(grads))
    if second == "eigenvalues":  # L and R count the first gradient too
        counted, share = steps + 1, (1 - beta2) * beta2**steps
        left, right = left + share * first @ first.T, right + share * first.T @ first
    else:
        counted = steps
    unbiased = (1 - beta2**counted) ** 0.5 / (1 - beta1**steps)
    left_root = root(left) if rows == 6 else torch.diag(left.diagonal() ** -0.5)
    expected = left.trace().sqrt() * left_root @ average @ root(right) * unbiased
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("second", ["rank1", "eigenvalues"])
def test_one_gradient_alone_has_its_singular_values_inverted(second):
    """U S V^T gives |S| U S^-1 V^T: the exponent -1/2 on both sides overshoots the orthogonal factor U V^T, which
    -1/4 gives. The basis stands, also where it is refreshed."""
    grad = torch.randn(6, 6, dtype=torch.float64)
    make = partial(Preconditioned, lr=1.0, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0, second=second)
    updates = -path(make, [grad] * 23).diff(dim=0)
    expected = grad.norm() * torch.linalg.inv(grad).T
    torch.testing.assert_close(updates, expected.expand_as(updates), rtol=1e-7, atol=1e-7)


def test_shampoo_reads_its_eigenvalues_anew_where_the_basis_turns():
    """So they are the diagonals of Q^T L Q and Q^T R Q at every step; rotated AdaFactor's only until the refresh."""
    off = {"rank1": [], "eigenvalues": []}
    for second, found in off.items():
        weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        optimizer = ROTATED[second](
            [weight], betas=(0.9, 0.1), precondition_frequency=20
        )  # forgets the first at once
        for grad in torch.randn(45, 6, 4, dtype=torch.float64):
            weight.grad = grad
            optimizer.step()
            state = optimizer.state[weight]
            bases, grams, sums = (
                [state[f"{what}_{s}"] for s in ("left", "right")] for what in ("basis", "gram", "sums")
            )
            read = [
                (basis.mT @ gram @ basis).diagonal(dim1=1, dim2=2) for basis, gram in zip(bases, grams, strict=True)
            ]
            found.append(max(float((x - y).abs().max()) for x, y in zip(read, sums, strict=True)))
    assert len(off["eigenvalues"]) == 45 and max(off["eigenvalues"]) < 1e-12
    assert max(off["rank1"][15:20]) < 1e-12 < 1e-2 < min(off["rank1"][20], off["rank1"][40])


def test_adafactor_is_adam_where_the_squares_have_rank_one():
    rows, columns = torch.rand(20, 7, 1, dtype=torch.float64) + 0.1, torch.rand(1, 5, dtype=torch.float64) + 0.1
    grads = (rows * columns).sqrt() * torch.randn(20, 7, 5, dtype=torch.float64).sign()
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 0.0, "weight_decay": 0.0}
    adam = path(partial(torch.optim.AdamW, **settings), grads)
    torch.testing.assert_close(path(partial(STRAIGHT["adafactor"], **settings), grads), adam, rtol=0, atol=1e-12)
    vectors = torch.randn(20, 9, dtype=torch.float64)  # no matrices: Adam
    adam = path(partial(torch.optim.AdamW, **settings), vectors)
    torch.testing.assert_close(path(partial(STRAIGHT["adafactor"], **settings), vectors), adam, rtol=0, atol=1e-12)


def test_adafactor_equals_torchs_with_its_clipping_and_relative_steps_off():
    """Theirs averages over all steps (decay -1): a moving average whose beta2 is close to 1."""
    grads, settings = torch.randn(10, 7, 5, dtype=torch.float64), {"betas": (0.0, 1 - 2**-20), "eps": 0.0}
    # torch's rate is lr times the parameter's root mean square, at least eps[1]
    theirs = partial(torch.optim.Adafactor, lr=1e-3, beta2_decay=-1.0, eps=(1e-30, 1e2), d=1e9)
    ours = partial(STRAIGHT["adafactor"], lr=0.1, weight_decay=0.0, **settings)
    torch.testing.assert_close(path(ours, grads), path(theirs, grads), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, tolerance, make",
    [
        ("adafactor", 2e-5, partial(STRAIGHT["adafactor"], betas=(0.0, 1 - 2**-20), eps=0.0)),
        ("soap", 1e-5, partial(SOAP, betas=(0.8, 0.9), precondition_frequency=4)),  # theirs finds bases in float32
        ("muon", 0.1, partial(torch.optim.Muon, momentum=0.9, adjust_lr_fn="match_rms_adamw")),  # bfloat16
    ],
)
def test_paths_equal_those_of_pytorch_optimizer(vectors, name, tolerance, make):
    tensors, _ = vectors("peers")
    found = path(partial(make, lr=1.0, weight_decay=0.0), tensors["gradients"])
    torch.testing.assert_close(found, tensors[name], rtol=0, atol=tolerance)
    assert tensors[name][-1].abs().max() > 20 * tolerance


def test_shampoo_equals_pytorch_optimizers_where_its_basis_is_exact(vectors):
    """At the last step of the file: with exponents -1/2, and without its factor, the root of the trace."""
    tensors, _ = vectors("peers")
    grads, theirs = tensors["gradients"], tensors["shampoo"].diff(dim=0)[-1]
    make = partial(Preconditioned, lr=1.0, betas=(0.0, 0.9), eps=0.0, weight_decay=0.0, second="eigenvalues")
    ours = path(partial(make, precondition_frequency=100), grads).diff(dim=0)[-1]
    weights = 0.9 ** torch.arange(len(grads) - 1, -1, -1, dtype=torch.float64)
    trace = (weights / weights.sum() * grads.square().sum((1, 2))).sum()
    torch.testing.assert_close(ours, trace.sqrt() * theirs * (1 - 0.9 ** len(grads)), rtol=0, atol=1e-10)


def test_muon_is_torchs_on_matrices_and_adamw_on_embeddings_head_and_vectors():
    model = Transformer(TransformerConfig(vocab=90, layers=2, width=16, heads=2, context=8, head="untied"))
    twin = copy.deepcopy(model)
    optimizer = optim.make("muon", model, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    inner = {name for name, one in twin.named_parameters() if one.ndim == 2} - {"head.weight"}
    inner = {name for name in inner if "embedding" not in name}
    assert len(inner) == 2 * 6
    named = dict(twin.named_parameters())
    parts = [{"params": [named[name] for name in named if name not in inner and named[name].ndim == 2]}]
    parts += [{"params": [one for one in named.values() if one.ndim < 2], "weight_decay": 0.0}]
    theirs = [
        torch.optim.Muon([named[n] for n in named if n in inner], 1e-2, 0.1, 0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(parts, 1e-2, (0.9, 0.95), 1e-8, 0.1, fused=True),
    ]
    for _ in range(5):
        ids = torch.randint(0, 90, (2, 8))
        for one in (model, twin):
            one.zero_grad()
            clm_loss(one(ids), ids).backward()
        for one in (optimizer, *theirs):
            one.step()
    assert all(torch.equal(one, named[name]) for name, one in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_muon_takes_every_parameter_once(method):
    model = Transformer(TransformerConfig(**{**SMALL.__dict__, **METHODS[method]}))
    optimizer = optim.make("muon", model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert all(parameter.ndim == 2 for parameter in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    """Of a text in which each token follows from the one before: from log 30 = 3.4 nats to below 2.4."""
    model = Transformer(TransformerConfig(vocab=30, layers=1, width=16, heads=2, context=8))
    optimizer = optim.make(name, model, 0.1 if name == "sgd" else 1e-2, (0.9, 0.95), 1e-8, 0.01)
    for _ in range(60):
        ids = [torch.randint(0, 30, (16, 1))]
        while len(ids) < 8:
            ids.append((7 * ids[-1] + 3) % 30)
        batch = torch.cat(ids, 1)
        loss = clm_loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.4
    assert all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("name", [name for name in optim.OPTIMIZERS if name not in ("adamw", "sgd", "muon")])
def test_zero_gradients_move_nothing(name):
    model = Transformer(SMALL)
    optimizer = optim.make(name, model, 1e-2, (0.9, 0.95), 1e-8, 0.0)
    before = [one.detach().clone() for one in model.parameters()]
    for _ in range(12):
        for one in model.parameters():
            one.grad = torch.zeros_like(one)
        optimizer.step()
    assert all(torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True))


def test_rank_one_moments_are_two_vectors_each():
    model = Transformer(SMALL)
    clm_loss(model(ids := torch.randint(0, SMALL.vocab, (2, 8))), ids).backward()
    for name, sides in {"adafactor": 0, "rotated_adafactor": 1, "shampoo": 1}.items():
        optimizer = optim.make(name, model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        optimizer.step()
        state = optimizer.state[model.token_embedding.weight]
        assert state["sums_left"].shape[1:] == (SMALL.vocab,) and state["sums_right"].shape[1:] == (SMALL.width,)
        assert "exp_avg_sq" not in state and sum("basis" in key for key in state) == sides


def test_soap_does_not_rotate_a_long_side_and_its_state_is_tensors():
    weight = nn.Parameter(torch.randn(30, 4))
    optimizer = SOAP([weight], max_precondition_dim=10)
    weight.grad = torch.randn(30, 4)
    optimizer.step()
    assert "basis_left" not in optimizer.state[weight] and "basis_right" in optimizer.state[weight]
    assert all(isinstance(entry, torch.Tensor) for entry in optimizer.state[weight].values())


def test_soap_refuses_bad_settings():
    with pytest.raises(UserError, match="SOAP: .*frequency 0"):
        SOAP([nn.Parameter(torch.zeros(2))], precondition_frequency=0)
    with pytest.raises(UserError, match="full, rank1, eigenvalues"):
        Preconditioned([nn.Parameter(torch.zeros(2))], second="rank2")


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


@pytest.mark.parametrize("second", optim.SECOND)
def test_stacks_give_what_each_parameter_gives_alone(second):
    shapes = [(6, 4), (6, 4), (4, 6), (5,), (6, 4), (3,)]
    starts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    grads = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(23)]
    ends = []
    for alone in (False, True):
        weights = [nn.Parameter(start.clone()) for start in starts]
        parts = [{"params": [weight]} for weight in weights] if alone else weights
        optimizer = Preconditioned(parts, lr=0.1, second=second)
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
    assert all(re.search("bias|norm|gain|sink", names[id(parameter)]) for parameter in plain)


def test_decay_norm_adds_the_gains_of_norms_and_nothing_else():
    model = Transformer(SMALL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without = {names[id(p)] for p in optim.groups(model, 0.1)[0]["params"]}
    with_gains = {names[id(p)] for p in optim.groups(model, 0.1, decay_norm=True)[0]["params"]}
    assert with_gains - without == {n for n in names.values() if "norm" in n and n.endswith("weight")}


@pytest.mark.parametrize("norm", ["rmsnorm", "srmsnorm"])
def test_layerscale_and_the_gains_of_rmsnorms_do_not_decay_unless_norms_do(norm):
    form = {"norm": norm, "gain_kind": "layerscale", "residual_gain": 0.1, "attention": {"qk_norm": "rmsnorm"}}
    model = Transformer(TransformerConfig(vocab=90, layers=1, width=16, heads=2, context=8, **form))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for p in optim.groups(model, 0.1)[1]["params"] if "bias" not in names[id(p)]}
    gains = {"blocks.0.attn_gain", "blocks.0.mlp_gain"}
    norms = {f"blocks.0.attention.{one}_norm.weight" for one in "qk"}
    if norm == "rmsnorm":
        norms |= {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm_final.weight"}
    assert plain == gains | norms
    kept = {names[id(p)] for p in optim.groups(model, 0.1, decay_norm=True)[1]["params"]}
    assert {name for name in kept if "bias" not in name} == gains


def test_schedule_warms_up_and_decays_to_zero():
    found = [optim.schedule(step, 10, 4) for step in range(11)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[-1] == 0 and all(a > b for a, b in zip(found[4:], found[5:], strict=False))


def test_the_rate_may_stay_until_the_last_steps():
    found = [optim.schedule(step, 20, 4, decay=0.25) for step in range(21)]
    assert found[3:16] == [1.0] * 13 and found[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert [optim.schedule(step, 20, 4, decay=1.0) for step in range(21)] == [
        optim.schedule(step, 20, 4) for step in range(21)
    ]


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
