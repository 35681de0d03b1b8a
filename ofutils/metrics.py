"""Outlier metrics, each as a short definition on one tensor; `streaming` computes them over any number of batches.

Two kurtoses exist and have two names. `neuron_kurtosis` (he2024) asks how unevenly the root mean square
is spread over the neurons; `tensor_kurtosis` (bondarenko2023) is the fourth standardised moment of the
raw activations. Their values are not comparable. Everything is computed in float64.
"""

import torch
from torch import Tensor

#: Objective -> where bondarenko2023's code reads its max inf norm, and its tensor kurtosis, the mean over these sites
READ_AT = {
    "clm": ("resid_post", ("norm1", "attn_out", "norm2", "mlp_out", "resid_post", "norm_final")),
    "mlm": ("mlp_out", ("mlp_out", "norm2")),
}


def _tokens(x: Tensor) -> Tensor:
    return x.double().flatten(0, -2)  # (N, D)


def centred(x: Tensor) -> Tensor:
    """x less the mean over its width, token by token: what he2024's code does before every metric that it logs."""
    return x - x.mean(-1, keepdim=True)


def rms(x: Tensor) -> Tensor:
    """The root mean square of all entries, in the units of x: the scale of the activations.

    Source: he2024, Figure 16 (there as the Frobenius norm).
    """
    return _tokens(x).square().mean().sqrt()


def neuron_kurtosis(x: Tensor) -> Tensor:
    """How much of the activation energy sits in few neurons.

    With s_j the root mean square of neuron j over all tokens: mean_j(s_j^4) / mean_j(s_j^2)^2.
    1 when all neurons are equally large, D when one holds everything; 1 + 2/N for Gaussian noise.

    Args:
        x: (..., D), activations; all leading axes are tokens.

    Returns:
        0-d float64 in [1, D]; nan for a tensor of zeros.

    Source: he2024, Eq 1 (no centring). For what the authors' code logs see `logged_kurtosis`.
    """
    squares = _tokens(x).square().mean(0)  # (D,): s_j^2
    return squares.square().mean() / squares.mean().square()


def logged_kurtosis(x: Tensor) -> Tensor:
    """What he2024's code logs as kurtosis: D / (D - 1) (neuron_kurtosis(centred(x)) - 1), at least 0.

    Args:
        x: (..., D) with D of 2 or more.

    Source: he2024, released code; its figures with a logarithmic axis show this or a near relative. The
    authors add 1e-8 to the root mean square by which they divide; this does not.
    """
    return x.shape[-1] / (x.shape[-1] - 1) * (neuron_kurtosis(centred(x.double())) - 1)


def max_median_ratio(x: Tensor) -> Tensor:
    """How far the largest entry of a token stands above its median entry, averaged over the tokens.

    mean over tokens of max_j |x_j| / median_j |x_j|, with the lower median for even D.

    Args:
        x: (..., D), activations; all leading axes are tokens.

    Returns:
        0-d float64, at least 1; about 5 for Gaussian noise at D = 768; inf or nan where a median is 0 (after a ReLU).

    Source: he2024, Eq 2, with the mean over tokens (Figures 11 and 13). The authors' code centres x.
    """
    size = _tokens(x).abs()
    return (size.amax(-1) / size.median(-1).values).mean()


def tensor_kurtosis(x: Tensor) -> Tensor:
    """The fourth standardised moment of each row: how heavy the tail of the raw activations is.

    mean((x - mu)^4) / (std^4 + 1e-6), with the unbiased std; 3 for Gaussian noise (not the excess).

    Args:
        x: (R, ...), one row per entry of axis 0 (a sequence, or a token after `flatten(0, -2)`).

    Returns:
        (R,) float64.

    Source: bondarenko2023, the metric of its tables, as its released code computes it.
    """
    rows = x.double().flatten(1)  # (R, n)
    deviations = rows - rows.mean(1, keepdim=True)
    return deviations.pow(4).mean(1) / (rows.std(1).pow(4) + 1e-6)


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


def six_sigma(x: Tensor) -> Tensor:
    """Which entries lie more than six standard deviations from the mean of their row: the outliers.

    Args:
        x: (R, ...), one row per entry of axis 0, each its own tensor.

    Returns:
        Boolean, of x's shape.

    Source: bondarenko2023, footnote 1.
    """
    rows = x.double().flatten(1)
    deviations = (rows - rows.mean(1, keepdim=True)).abs()
    return (deviations > 6 * rows.std(1, keepdim=True)).view(x.shape)


def input_correlation(x: Tensor) -> tuple[Tensor, Tensor]:
    """How alike the tokens are: mean and root mean square of x_a . x_b / D over pairs of tokens, x scaled to RMS 1.

    A cosine only where all tokens are equally long; 1 when all tokens are the same (rank collapse).

    Args:
        x: (..., D) with two tokens or more, N in all.

    Returns:
        Two 0-d float64.

    Source: he2024, section 3 (signal propagation).
    """
    tokens = _tokens(x) / rms(x)
    gram = tokens @ tokens.T / x.shape[-1]  # (N, N)
    pairs = gram[~torch.eye(len(gram), dtype=torch.bool, device=x.device)]
    return pairs.mean(), pairs.square().mean().sqrt()


def feature_correlation(x: Tensor) -> Tensor:
    """How alike the neurons are: root mean square, over pairs of neurons, of mean_a x_ai x_aj, x scaled to RMS 1.

    Source: he2024, Figure 34.
    """
    tokens = _tokens(x) / rms(x)
    gram = tokens.T @ tokens / len(tokens)  # (D, D)
    return gram[~torch.eye(len(gram), dtype=torch.bool, device=x.device)].square().mean().sqrt()


def anisotropy(x: Tensor) -> Tensor:
    """The mean cosine between two different tokens, in [-1, 1]; 0 for directions without a preference.

    Source: puccetti2022, section on geometry (after Ethayarajh 2019).
    """
    directions = torch.nn.functional.normalize(_tokens(x), dim=-1)
    n = len(directions)
    return (directions.sum(0).square().sum() - directions.square().sum()) / (n * (n - 1))


def attention_entropy(probs: Tensor) -> Tensor:
    """Mean entropy (nats) of the attention of a query, in [0, log T]; 0 log 0 = 0.

    Args:
        probs: (..., T, T), rows are queries.

    Source: he2024, Eq 10.
    """
    return torch.special.entr(probs.double()).sum(-1).mean()


def similarity_agreement(a: Tensor, b: Tensor) -> float:
    """Whether two embeddings of the same sentences rank their pairs alike: Spearman's correlation of pair cosines.

    Args:
        a, b: (S, D) each, one row per sentence; three sentences or more.

    Returns:
        In [-1, 1]; 1 when every pair keeps its rank. Ties get their mean rank.
    """
    ranks = []
    for embeddings in (a, b):
        directions = torch.nn.functional.normalize(embeddings.double(), dim=-1)
        above = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).triu(1)
        _, place, count = (directions @ directions.T)[above].unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])  # (S (S - 1) / 2,)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
