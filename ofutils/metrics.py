"""Outlier metrics: each as a short definition on one tensor, and from streaming statistics.

Two kurtoses exist and have two names. `neuron_kurtosis` (he2024) asks how unevenly the root mean square
is spread over the neurons; `tensor_kurtosis` (bondarenko2023) is the fourth standardised moment of the
raw activations. Their values are not comparable. Everything is accumulated in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def neuron_kurtosis(x: Tensor) -> Tensor:
    """How much of the activation energy sits in few neurons.

    With s_j the root mean square of neuron j over all tokens: mean_j(s_j^4) / mean_j(s_j^2)^2.
    1 when all neurons are equally large, D when one holds everything; 1 + 2/N for Gaussian noise.

    Args:
        x: (..., D), activations; all leading axes are tokens.

    Returns:
        0-d float64 in [1, D]; nan for a tensor of zeros.

    Source: he2024, Eq 1 (no centring). The authors' code logs d/(d-1) (Kurt - 1) of centred tokens.
    """
    squares = x.double().flatten(0, -2).square().mean(0)  # (D,): s_j^2
    return squares.square().mean() / squares.mean().square()


def max_median_ratio(x: Tensor) -> Tensor:
    """How far the largest entry of a token stands above its median entry, averaged over the tokens.

    mean over tokens of max_j |x_j| / median_j |x_j|, with the lower median for even D.

    Args:
        x: (..., D), activations; all leading axes are tokens.

    Returns:
        0-d float64, at least 1; about 5 for Gaussian noise at D = 768; inf or nan where a median is 0 (after a ReLU).

    Source: he2024, Eq 2, with the mean over tokens (Figures 11 and 13). The authors' code centres x.
    """
    return _token_ratios(x).mean()


def _token_ratios(x: Tensor) -> Tensor:
    size = x.double().flatten(0, -2).abs()  # (N, D)
    return size.amax(-1) / size.median(-1).values


def tensor_kurtosis(x: Tensor) -> Tensor:
    """The fourth standardised moment of each row: how heavy the tail of the raw activations is.

    mean((x - mu)^4) / (std^4 + 1e-6), with the unbiased std; 3 for Gaussian noise (not the excess).

    Args:
        x: (R, ...), one row per entry of axis 0; the rest is flattened.

    Returns:
        (R,) float64.

    Source: bondarenko2023, the metric of its tables, as its released code computes it.
    """
    rows = x.double().flatten(1)  # (R, n)
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / (rows.std(1).pow(4) + 1e-6)


def max_inf_norm(sites) -> Tensor:
    """The largest activation: the mean over rows of max |x|, then the maximum over sites.

    Args:
        sites: a tensor (R, ...), or several of them (a mapping or an iterable), one per site.

    Returns:
        0-d float64.

    Source: bondarenko2023, as its released code aggregates ("max layer inf norm" for OPT).
    """
    if isinstance(sites, Tensor):
        sites = [sites]
    sites = sites.values() if hasattr(sites, "values") else sites
    return torch.stack([x.double().flatten(1).abs().amax(1).mean() for x in sites]).max()


def six_sigma_count(x: Tensor) -> int:
    """How many entries lie more than six standard deviations from the mean of their tensor.

    Source: bondarenko2023, footnote 1 (the definition of an outlier there).
    """
    values = x.double()
    return int(((values - values.mean()).abs() > 6 * values.std()).sum())


@dataclass
class Statistics:
    """Streaming statistics of one site, from which every metric above is read.

    `add` takes a batch of activations (B, ..., D); rows are the entries of axis 0, so sequences, tokens all
    leading axes. (In the authors' OPT code a row of `norm2` and `mlp_out` is a token.) Statistics of parts
    merge into the statistics of the whole, in any order.
    """

    rows: int = 0
    tokens: int = 0
    squares: Tensor | float = 0.0  # (D,): sum over tokens of x^2
    ratios: float = 0.0  # sum over tokens of max / median
    kurtosis: float = 0.0  # sum over rows
    norms: float = 0.0  # sum over rows of max |x|
    outliers: int = 0  # sum over batches of the six-sigma count
    largest: float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in one batch of activations, (B, ..., D)."""
        x = x.detach()
        row_norms = x.flatten(1).abs().amax(1).double()  # (B,)
        self.rows += x.shape[0]
        self.tokens += x.shape[:-1].numel()
        self.squares = self.squares + x.double().flatten(0, -2).square().sum(0)
        self.ratios += float(_token_ratios(x).sum())
        self.kurtosis += float(tensor_kurtosis(x).sum())
        self.norms += float(row_norms.sum())
        self.outliers += six_sigma_count(x)
        self.largest = max(self.largest, float(row_norms.max()))

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both parts together."""
        summed = ("rows", "tokens", "squares", "ratios", "kurtosis", "norms", "outliers")
        whole = {name: getattr(self, name) + getattr(other, name) for name in summed}
        return Statistics(**whole, largest=max(self.largest, other.largest))

    def summary(self) -> dict[str, float]:
        """Every metric as a plain number, under the names of the functions of this module.

        `tensor_kurtosis` is the mean over rows, `inf_norm` the mean over rows of max |x|, `max_abs` the
        largest entry seen, `six_sigma` the share of entries counted (per batch, as its own tensor).
        """
        squares = self.squares / self.tokens
        return {
            "neuron_kurtosis": float(squares.square().mean() / squares.mean().square()),
            "max_median_ratio": self.ratios / self.tokens,
            "tensor_kurtosis": self.kurtosis / self.rows,
            "inf_norm": self.norms / self.rows,
            "max_abs": self.largest,
            "six_sigma": self.outliers / (self.tokens * squares.numel()),
        }
