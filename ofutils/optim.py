"""Optimizers, parameter groups and the learning-rate schedule."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from ofutils.params import require, require_known

OPTIMIZERS = ("adamw", "soap", "sgd")
_STRIP = 256  # rows of a Gram that are computed together, from the diagonal on


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step` (0-based): linear warm-up, then linear decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def groups(model: nn.Module, weight_decay: float, decay_norm: bool = False) -> list[dict]:
    """Parameters with and without weight decay.

    Matrices and embeddings decay; biases (gates' too) and residual gains do not; the gains of norms do
    only with `decay_norm` (bondarenko2023's `--wd_LN_gamma`, which changes OPT's outliers: its Table 6).
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        norm_gain = "norm" in module.rpartition(".")[2] and kind == "weight"
        matrix = parameter.ndim >= 2 and "bias" not in kind
        (decayed if matrix or (norm_gain and decay_norm) else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make(name: str, model: nn.Module, lr: float, betas, eps: float, weight_decay: float, decay_norm: bool = False):
    """AdamW or SGD from torch, or SOAP, over the groups of `model`.

    SGD takes the first of the betas for its momentum, no second one, and adds the weight decay to the gradient.
    SOAP does not rotate the vocabulary side of the token embedding and of a head of its own, as he2024's does not.
    """
    require_known("optimizer", name, OPTIMIZERS)
    parts = groups(model, weight_decay, decay_norm)
    if name == "adamw":
        return torch.optim.AdamW(parts, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parts, lr=lr, momentum=betas[0], fused=True)
    table, head = model.token_embedding.weight, getattr(getattr(model, "head", None), "weight", None)
    tables = [table] if head is None else [table, head]
    rest = [parameter for parameter in parts[0]["params"] if not any(parameter is one for one in tables)]
    own = {"params": tables, "weight_decay": weight_decay, "max_precondition_dim": table.shape[1]}
    return SOAP([own, {**parts[0], "params": rest}, parts[1]], lr, betas, eps)


class SOAP(torch.optim.Optimizer):
    """AdamW in the eigenbasis of Shampoo's two gradient statistics.

    For a matrix W with gradient G, L and R are moving averages of G G^T and G^T G; Adam runs on
    Q_L^T G Q_R, where Q_L, Q_R are their eigenvectors, refreshed every `precondition_frequency` steps by
    one power iteration. The first step only initialises: parameters stay. Other shapes get Adam.

    Matrices of one shape in one group are worked on as one stack, and so are all other parameters of a group, as
    one vector. The state of a stack is kept under the first of its parameters; it is tensors only, of the parameter's
    dtype: float32 or float64. What has no gradient at the first step is left alone, and must never get one.

    Args:
        params: parameters, or groups with settings of their own (`max_precondition_dim` too).
        lr: learning rate.
        betas: of the first moment, and of the second moment and L, R alike.
        eps: added to sqrt(V) before its bias correction, so early on it weighs more than in AdamW.
        weight_decay: decoupled, and applied after the update (torch's AdamW decays before).
        precondition_frequency: steps between refreshes of the eigenvectors.
        max_precondition_dim: a side longer than this is not rotated.

    Raises:
        UserError: a bad setting; at a step, a gradient that is new or missing, before any parameter moves.

    Source: he2024, section 6 and Appendix A.2, which runs the reference implementation of SOAP.
    """

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10_000,
    ):
        good = lr >= 0 and eps >= 0 and all(0 <= beta < 1 for beta in betas) and precondition_frequency >= 1
        require(good, f"SOAP: bad lr {lr}, eps {eps}, betas {betas} or frequency {precondition_frequency}")
        self.precondition_frequency = precondition_frequency
        usual = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, usual | {"max_precondition_dim": max_precondition_dim})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` re-evaluates the model, as in torch's optimizers."""
        with torch.enable_grad():
            loss = closure() if closure else None
        stacks = [(group, stack) for group in self.param_groups for stack in _stacks(group["params"])]
        for _, stack in stacks:
            there = torch.tensor([parameter.grad is not None for parameter in stack])
            state = self.state[stack[0]]
            state["stacked"] = state.get("stacked", there).to("cpu", torch.bool)  # from a checkpoint: as float
            changed = "SOAP: a parameter has a gradient that had none before, or lost its own"
            require(torch.equal(state["stacked"], there), changed)
        for group, stack in stacks:
            stack, state = [one for one in stack if one.grad is not None], self.state[stack[0]]
            if stack:
                self._move(group, stack, state)
        return loss

    def _move(self, group: dict, stack: list[Tensor], state: dict[str, Tensor]) -> None:
        """One step for one stack; the first one only initialises."""
        grads, matrices = [parameter.grad for parameter in stack], stack[0].ndim == 2
        grad = torch.stack(grads) if matrices else torch.cat([one.flatten() for one in grads])
        if "step" not in state:
            state.update(soap_init(grad, group["betas"][1], group["max_precondition_dim"]))
            return
        update = soap_update(grad, state, group["betas"], group["eps"], self.precondition_frequency)
        updates = update if matrices else update.split([one.numel() for one in stack])
        updates = [one.view_as(parameter) for parameter, one in zip(stack, updates, strict=True)]
        torch._foreach_sub_(stack, updates, alpha=group["lr"])
        torch._foreach_mul_(stack, 1 - group["lr"] * group["weight_decay"])


def _stacks(parameters: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters that are worked on together: matrices of one shape, and all that are no matrices."""
    stacks: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        shape = tuple(parameter.shape) if parameter.ndim == 2 else ()
        stacks.setdefault((shape, parameter.dtype, parameter.device), []).append(parameter)
    return stacks.values()


def soap_init(grad: Tensor, beta2: float, max_dim: int) -> dict[str, Tensor]:
    """The state of a stack after its first gradient: statistics and eigenvectors, no moments yet.

    Args:
        grad: (S, m, n), S matrices; or (n,), no matrices: Adam.

    Returns:
        `step`, `exp_avg`, `exp_avg_sq`; for a stack of matrices and each side of at most `max_dim`, `gram_left`
        (S, m, m) and `basis_left`, its eigenvectors by falling eigenvalue, `gram_right` and `basis_right` (S, n, n).
        Of a Gram only the upper triangle is kept up to date.
    """
    state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
    for side, x in _sides(grad).items():
        if x.shape[1] <= max_dim:
            gram = (1 - beta2) * x @ x.mT
            state |= {
                f"gram_{side}": gram,
                f"basis_{side}": torch.linalg.eigh(gram).eigenvectors.flip(-1).contiguous(),
            }
    return state


def soap_update(
    grad: Tensor, state: dict[str, Tensor], betas: tuple[float, float], eps: float, frequency: int
) -> Tensor:
    """One SOAP step for one stack: the update to subtract (times lr), and `state` moved on in place.

    Both moments live in the eigenbasis; the first one is turned with it.
    """
    beta1, beta2 = betas
    state["step"] += 1
    step = int(state["step"])
    turned = _rotate(grad, state)
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    direction = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(eps)
    update = _rotate(direction, state, back=True).mul_((1 - beta2**step) ** 0.5 / (1 - beta1**step))
    sides = {side: x for side, x in _sides(grad).items() if f"gram_{side}" in state}
    for side, x in sides.items():
        _add_gram(state[f"gram_{side}"], x, beta2)
    if step % frequency == 0 and sides:
        average = _rotate(state["exp_avg"], state, back=True)
        for side in sides:
            _refresh(state, side)
        state["exp_avg"] = _rotate(average, state)
    return update


def _sides(grad: Tensor) -> dict[str, Tensor]:
    """(S, m, n) -> x for each side, whose x x^T is the side's Gram; none of a vector."""
    return {"left": grad, "right": grad.mT} if grad.ndim == 3 else {}


def _rotate(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    left, right = state.get("basis_left"), state.get("basis_right")
    if left is not None:
        x = (left if back else left.mT) @ x
    if right is not None:
        x = x @ (right.mT if back else right)
    return x


def _add_gram(gram: Tensor, x: Tensor, beta2: float) -> None:
    """gram <- beta2 gram + (1 - beta2) x x^T, in its upper triangle: x (S, m, n), gram (S, m, m)."""
    for start in range(0, x.shape[1], _STRIP):
        rows = slice(start, start + _STRIP)
        gram[:, rows, start:].lerp_(x[:, rows] @ x[:, start:].mT, 1 - beta2)


def _refresh(state: dict[str, Tensor], side: str) -> None:
    """Order the eigenvectors by their current eigenvalues, then one power iteration with a QR."""
    gram, basis = state[f"gram_{side}"], state[f"basis_{side}"]
    for start in range(_STRIP, gram.shape[1], _STRIP):  # the lower triangle
        rows = slice(start, start + _STRIP)
        gram[:, rows, :start] = gram[:, :start, rows].mT
    image = gram @ basis
    order = (basis * image).sum(1).argsort(-1, descending=True)  # diag(Q^T G Q): (S, m)
    by_row = order[:, :, None] if side == "left" else order[:, None]
    state["exp_avg_sq"] = state["exp_avg_sq"].take_along_dim(by_row, 1 if side == "left" else 2)
    basis.copy_(_orthogonal(image.take_along_dim(order[:, None], 2)))


def _orthogonal(x: Tensor) -> Tensor:
    """(S, m, m) -> the Q of the QR of each, without its R, which nobody needs.

    One matrix leaves a GPU idle, and its solver takes the matrices of a stack one by one: they share some streams.
    """
    if not x.is_cuda:
        return torch.linalg.householder_product(*torch.geqrf(x))
    found, here, streams = torch.empty_like(x), torch.cuda.current_stream(), _streams(x.device)
    for stream in streams:
        stream.wait_stream(here)
    for number, matrix in enumerate(x):
        with torch.cuda.stream(streams[number % len(streams)]):
            found[number] = torch.linalg.householder_product(*torch.geqrf(matrix))
    for stream in streams:
        here.wait_stream(stream)
    return found


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(8)]
