"""What a block is made of besides its matrices and its attention: norms, activations, gains on residual branches."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Rows divided by their root mean square, times a trained gain of each dimension: no centring, no bias.

    he2024's Eq 3 with c = 0 and beta = 0; without the gain (gamma = 1) it is their SRMSNorm, which has no parameters.

    Args:
        width: D, or K for queries and keys, whose gain the heads of a block share.
        eps: what keeps a row of zeros finite.
        where: `outside`: x / (RMS(x) + eps), as in the authors' code; `inside`: x / sqrt(mean of x^2 + eps), as in
            torch.nn.RMSNorm. The paper has no eps: at 0 they agree.
        gain: False: SRMSNorm.
    """

    def __init__(self, width: int, eps: float = 1e-5, where: str = "outside", gain: bool = True):
        super().__init__()
        self.eps, self.inside = eps, where == "inside"
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        square = x.square().mean(-1, keepdim=True)
        rms = (square + self.eps).sqrt() if self.inside else square.sqrt() + self.eps
        return x / rms if self.weight is None else self.weight * x / rms


def make_norm(kind: str, width: int, eps: float, where: str) -> nn.Module:
    """A norm over the last dimension, or what passes its input on (`none`); `where` is of the two RMSNorms alone."""
    if kind == "layernorm":
        return nn.LayerNorm(width, eps)
    return nn.Identity() if kind == "none" else RMSNorm(width, eps, where, gain=kind == "rmsnorm")


def make_activation(kind: str, leaky_relu_slope: float = 0.0) -> Callable[[Tensor], Tensor]:
    """`gelu` is the exact one, `gelu_tanh` its approximation; a slope s turns ReLU into LeakyReLU, max(x, s x)."""
    if leaky_relu_slope:
        return partial(F.leaky_relu, negative_slope=leaky_relu_slope)
    return {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[kind]


def make_gain(kind: str, start: float, width: int) -> nn.Parameter | float | None:
    """What multiplies a residual branch: a trained scalar (`skipinit`), a trained vector (`layerscale`) or a number.

    Returns:
        None for a scalar of 1: the plain sum.

    Source: he2024, Eq 12 (beta) and Appendices C and D; De and Smith 2020; Touvron et al. 2021.
    """
    if kind == "layerscale":
        return nn.Parameter(torch.full((width,), start))
    if start == 1:
        return None
    return start if kind == "fixed" else nn.Parameter(torch.tensor(start))
