"""Optimizers, parameter groups and the learning-rate schedule."""

import torch
from torch import Tensor, nn

from ofutils import UserError, params

OPTIMIZERS = ("adamw", "soap")


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


def make(
    name: str,
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_norm: bool = False,
) -> torch.optim.Optimizer:
    """AdamW from torch, or SOAP, over the groups of `model`.

    SOAP does not rotate the vocabulary side of the token embedding and of a head of its own, as he2024's does not.
    """
    parts = groups(model, weight_decay, decay_norm)
    if name == "adamw":
        return torch.optim.AdamW(parts, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "soap":
        table, head = model.token_embedding.weight, getattr(getattr(model, "head", None), "weight", None)
        tables = [table] if head is None else [table, head]
        rest = [parameter for parameter in parts[0]["params"] if not any(parameter is one for one in tables)]
        own = {"params": tables, "weight_decay": weight_decay, "max_precondition_dim": table.shape[1]}
        return SOAP([own, {**parts[0], "params": rest}, parts[1]], lr, betas, eps)
    raise UserError(f"unknown optimizer {name!r}{params.suggest(name, OPTIMIZERS)}; known: {', '.join(OPTIMIZERS)}")


class SOAP(torch.optim.Optimizer):
    """AdamW in the eigenbasis of Shampoo's two gradient statistics.

    For a matrix W with gradient G, L and R are moving averages of G G^T and G^T G; Adam runs on
    Q_L^T G Q_R, where Q_L, Q_R are their eigenvectors, refreshed every `precondition_frequency` steps by
    one power iteration. The first step only initialises: parameters stay. Other shapes get Adam. The
    state is tensors only, of the parameter's dtype: float32 or float64.

    Args:
        params: parameters, or groups with settings of their own (`max_precondition_dim` too).
        lr: learning rate.
        betas: of the first moment, and of the second moment and L, R alike.
        eps: added to sqrt(V) before its bias correction, so early on it weighs more than in AdamW.
        weight_decay: decoupled, and applied after the update (torch's AdamW decays before).
        precondition_frequency: steps between refreshes of the eigenvectors.
        max_precondition_dim: a side longer than this is not rotated.

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
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas) or precondition_frequency < 1:
            raise UserError(f"SOAP: bad lr {lr}, eps {eps}, betas {betas} or frequency {precondition_frequency}")
        self.precondition_frequency = precondition_frequency
        usual = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, usual | {"max_precondition_dim": max_precondition_dim})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` re-evaluates the model, as in torch's optimizers."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad
                if not state:
                    state.update(soap_init(grad, group["betas"][1], group["max_precondition_dim"]))
                    continue
                update = soap_update(grad, state, group["betas"], group["eps"], self.precondition_frequency)
                parameter.sub_(update, alpha=group["lr"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


def soap_init(grad: Tensor, beta2: float, max_dim: int) -> dict[str, Tensor]:
    """The state of one parameter after its first gradient: statistics and eigenvectors, no moments yet."""
    state = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
    }
    if grad.ndim == 2:
        for side, gram in (("left", grad @ grad.T), ("right", grad.T @ grad)):
            if len(gram) <= max_dim:
                state[f"gram_{side}"] = (1 - beta2) * gram
                state[f"basis_{side}"] = torch.linalg.eigh(state[f"gram_{side}"]).eigenvectors.flip(1).contiguous()
    return state


def soap_update(
    grad: Tensor, state: dict[str, Tensor], betas: tuple[float, float], eps: float, frequency: int
) -> Tensor:
    """One SOAP step for one parameter: the update to subtract (times lr), and `state` moved on in place.

    The first moment is kept unrotated, which equals keeping it rotated and turning it with each refresh.
    """
    beta1, beta2 = betas
    state["step"] += 1
    step = int(state["step"])
    rotated = _rotate(grad, state)
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].lerp_(rotated.square(), 1 - beta2)
    direction = _rotate(state["exp_avg"], state) / (state["exp_avg_sq"].sqrt() + eps)
    update = _rotate(direction, state, back=True) * ((1 - beta2**step) ** 0.5 / (1 - beta1**step))
    for side, gram in (("left", lambda: grad @ grad.T), ("right", lambda: grad.T @ grad)):
        if f"gram_{side}" in state:
            state[f"gram_{side}"].lerp_(gram(), 1 - beta2)
            if step % frequency == 0:
                _refresh(state, side)
    return update


def _rotate(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    left, right = state.get("basis_left"), state.get("basis_right")
    if left is not None:
        x = (left if back else left.T) @ x
    if right is not None:
        x = x @ (right.T if back else right)
    return x


def _refresh(state: dict[str, Tensor], side: str) -> None:
    """Order the eigenvectors by their current eigenvalues, then one power iteration with a QR."""
    gram, basis = state[f"gram_{side}"], state[f"basis_{side}"]
    order = (basis * (gram @ basis)).sum(0).argsort(descending=True)  # diag(Q^T G Q)
    state["exp_avg_sq"] = state["exp_avg_sq"].index_select(0 if side == "left" else 1, order)
    state[f"basis_{side}"] = torch.linalg.qr(gram @ basis[:, order]).Q.contiguous()
