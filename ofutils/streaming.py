"""The metrics of `metrics` over any number of batches, from shared sums: add, merge, read.

One pass over the activations feeds every metric. Chunks are summed in the precision of the activations,
float32 at least, and added up in float64; what has been summed does not grow with the number of tokens.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ofutils import params

#: metric -> the group of shared sums that it is read from
METERS = {
    "rms": "squares",
    "neuron_kurtosis": "squares",
    "logged_kurtosis": "means",
    "inf_norm": "extremes",
    "max_abs": "extremes",
    "max_median_ratio": "medians",
    "largest_max_median_ratio": "medians",
    "tensor_kurtosis": "moments",
    "token_kurtosis": "moments",
    "outlier_share": "moments",
    "input_correlation": "gram",
    "input_correlation_rms": "gram",
    "feature_correlation_rms": "gram",
    "identity_error": "gram",
    "anisotropy": "gram",
}
STANDARD = ("neuron_kurtosis", "max_median_ratio", "tensor_kurtosis", "inf_norm", "max_abs")
_CHUNK = 1024  # tokens taken at a time: what they need fits a cache, and no copy of x is ever made
_CHUNK_GPU = 32 * _CHUNK  # and keeps a GPU busy


@dataclass
class Statistics:
    """Streaming statistics of one site, from which every metric of METERS is read.

    `add` takes batches; nothing of them is kept but sums and maxima, so the memory does not grow with the
    number of tokens. Statistics of parts merge into the statistics of the whole, in any order. Sequences
    are the entries of axis 0, tokens all leading axes. (In the authors' OPT code a row of `norm2` and
    `mlp_out` is a token: read `token_kurtosis` there.)

    Args:
        meters: names out of `METERS`; only what they need is computed. `gram` holds D x D float64.

    Raises:
        UserError: an unknown meter.
    """

    meters: tuple[str, ...] = STANDARD
    sums: dict[str, Tensor] = field(default_factory=dict, repr=False)
    maxima: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name in self.meters:
            params.require_known("meter", name, METERS)
        self._groups = {METERS[name] for name in self.meters}

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch of activations.

        Args:
            x: (B, ..., T, D), or (B, D).
            mask: (B, T), true where there is a token and not padding; padding counts nowhere.
        """
        tokens = x.detach()[:, None] if x.ndim == 2 else x.detach().flatten(1, -2)  # (B, T, D)
        mask = None if mask is None or x.ndim == 2 else _spread(mask, x)
        before = len(self.sums["squares"]) if "squares" in self.sums else x.shape[-1]
        params.require(x.shape[-1] == before, f"a site of width {before} now has width {x.shape[-1]}")
        chunk = _CHUNK if x.device.type == "cpu" else _CHUNK_GPU
        step = max(1, chunk // max(1, tokens.shape[1]))
        exact = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, len(tokens), step):
            part, real = tokens[start : start + step].to(exact), None
            if mask is not None:
                real = mask[start : start + step]
                filled = real.any(1)  # a row of padding alone is no row
                part, real = part[filled].masked_fill(~real[filled][..., None], 0), real[filled]
            if part.numel():
                with torch.autocast(x.device.type, enabled=False):  # products of matrices stay exact
                    self._take(part, real)

    def _take(self, x: Tensor, mask: Tensor | None) -> None:
        """One chunk, (b, T, D), zero where the mask (b, T) is false."""
        flat = x.flatten(0, 1) if mask is None else x[mask]  # (n, D)
        self._sum(tokens=len(flat), rows=len(x))
        squares = flat.square()
        norms = squares.sum(1)  # (n,)
        self._sum(squares=squares.sum(0))
        if self._groups & {"means", "moments"}:
            means = flat.mean(1)
        if "means" in self._groups:
            self._sum(centred_squares=(flat - means[:, None]).square_().sum(0))
        if self._groups & {"extremes", "medians"}:
            size = flat.abs()
            peaks = size.amax(1)  # (n,)
        if "extremes" in self._groups:
            self._max(largest=size.amax(0))
            self._sum(row_maxima=_back(peaks, mask, x).amax(1).double().sum())
        if "medians" in self._groups:
            ratios = peaks.double() / _lower_median(size)
            self._sum(ratios=ratios.sum())
            self._max(ratios=ratios.amax())
        if "moments" in self._groups:
            self._take_moments(x, mask, flat, means)
        if "gram" in self._groups:
            lengths = norms.sqrt().clamp(min=torch.finfo(norms.dtype).tiny)
            probe = flat @ _probe(flat)  # (n,)
            self._sum(gram=_upper_gram(flat), total=flat.sum(0), directions=lengths.reciprocal() @ flat)
            self._sum(unit_squares=(norms / lengths.square()).double().sum(), fourth=norms.double().square().sum())
            self._sum(probed=probe @ flat)
            self._max(eps=norms.new_tensor(torch.finfo(norms.dtype).eps))

    def _take_moments(self, x: Tensor, mask: Tensor | None, flat: Tensor, means: Tensor) -> None:
        deviations = flat - means[:, None]
        second = deviations.square()
        parts = [means, second.sum(1), (second * deviations).sum(1), second.square_().sum(1)]
        width = x.shape[-1]
        mean, m2, m3, m4 = (_back(part.double(), mask, x) for part in parts)  # (b, T) each, about the token's mean
        real = torch.ones_like(mean) if mask is None else mask.double()
        self._sum(token_kurtosis=(_standardised(m4, m2, width) * real).sum())
        # the moments of a row about its own mean, from those of its tokens
        row_mean = (mean * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        shift = (mean - row_mean) * real
        count = real.sum(1) * width
        row_m2 = (m2 + width * shift**2).sum(1)
        row_m4 = (m4 + 4 * shift * m3 + 6 * shift**2 * m2 + width * shift**4).sum(1)
        self._sum(row_kurtosis=_standardised(row_m4, row_m2, count).sum())
        limit = 6 * (row_m2 / (count - 1)).sqrt()
        hits = (x - row_mean.to(x.dtype)[..., None]).abs_() > limit.to(x.dtype)[:, None, None]  # (b, T, D)
        if mask is not None:
            hits &= mask[..., None]
        self._sum(outliers_by_dimension=hits.sum((0, 1)))

    def _sum(self, **parts: Tensor | int) -> None:
        for name, part in parts.items():
            part = torch.as_tensor(part)
            part = part if name.startswith("outliers") else part.double()
            before = self.sums.get(name)
            self.sums[name] = part if before is None else before + part

    def _max(self, **parts: Tensor) -> None:
        for name, part in parts.items():
            self.maxima[name] = torch.maximum(self.maxima[name], part) if name in self.maxima else part

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both parts together. Raises UserError where they are of other meters."""
        params.require(self._groups == other._groups, "statistics of other meters cannot be merged")
        whole = Statistics(self.meters, dict(self.sums), dict(self.maxima))
        whole._sum(**other.sums)
        whole._max(**other.maxima)
        return whole

    @property
    def rows(self) -> int:
        """Sequences taken in so far."""
        return int(self.sums.get("rows", 0))

    @property
    def tokens(self) -> int:
        """Tokens taken in so far, N."""
        return int(self.sums.get("tokens", 0))

    def summary(self) -> dict[str, float]:
        """The asked-for metrics as plain numbers.

        `tensor_kurtosis` is the mean over sequences and `token_kurtosis` over tokens; `inf_norm` the mean
        over sequences of max |x|, `max_abs` the largest entry seen; `outlier_share` the share of
        entries beyond six sigma of their sequence; `max_median_ratio` the mean over tokens and
        `largest_max_median_ratio` the maximum (he2024, Figure 17). `identity_error` says
        how far the D x D matrix behind the correlations is from sums taken another way: its diagonal from the
        squares, and its product with a fixed vector from that product taken token by token. Far below 1e-4, or
        the correlations cannot be trusted. (Both sides of he2024's Eq 5, N^2 D Kurt + sum of squared feature
        correlations = sum of squared input correlations, are read from that matrix.) `input_correlation_rms`
        is nan where one token outweighs all others so far that rounding hides the rest.

        Raises:
            UserError: nothing was added yet.
        """
        params.require(self.rows > 0, "no statistics: nothing was added")
        found = {name: value for group in self._groups for name, value in getattr(self, f"_read_{group}")().items()}
        return {name: float(found[name]) for name in self.meters}

    def _read_squares(self):
        squares = self.sums["squares"] / self.sums["tokens"]  # (D,): s_j^2
        return {"rms": squares.mean().sqrt(), "neuron_kurtosis": squares.square().mean() / squares.mean().square()}

    def _read_means(self):
        squares = self.sums["centred_squares"]  # (D,)
        kurtosis = squares.square().mean() / squares.mean().square()
        return {"logged_kurtosis": len(squares) * (kurtosis - 1) / max(1, len(squares) - 1)}

    def _read_extremes(self):
        return {"inf_norm": self.sums["row_maxima"] / self.sums["rows"], "max_abs": self.maxima["largest"].max()}

    def _read_medians(self):
        mean = self.sums["ratios"] / self.sums["tokens"]
        return {"max_median_ratio": mean, "largest_max_median_ratio": self.maxima["ratios"]}

    def _read_moments(self):
        s = self.sums
        return {
            "tensor_kurtosis": s["row_kurtosis"] / s["rows"],
            "token_kurtosis": s["token_kurtosis"] / s["tokens"],
            "outlier_share": s["outliers_by_dimension"].sum() / (s["tokens"] * len(s["squares"])),
        }

    def _read_gram(self):
        s, n, width = self.sums, self.sums["tokens"], len(self.sums["squares"])
        upper = s["gram"].triu()
        diagonal = upper.diagonal()
        energy = 2 * upper.square().sum() - diagonal.square().sum()  # |X^T X|^2 = |X X^T|^2
        others = energy - s["fourth"]  # the same without the pairs of a token with itself
        others = others if others > 10 * self.maxima["eps"] * energy else others * float("nan")
        probe = _probe(upper)
        probed = upper @ probe + upper.triu(1).T @ probe
        gaps = [(diagonal - s["squares"]).norm() / s["squares"].norm(), (probed - s["probed"]).norm() / probed.norm()]
        pairs, size = n * (n - 1), s["squares"].sum() / n  # size: D m_2
        return {
            "input_correlation": (s["total"].square().sum() - s["squares"].sum()) / pairs / size,
            "input_correlation_rms": (others / pairs).sqrt() / size,
            "feature_correlation_rms": ((energy - diagonal.square().sum()) / (width * (width - 1))).sqrt()
            / (n * size / width),
            "identity_error": max(gaps),
            "anisotropy": (s["directions"].square().sum() - s["unit_squares"]) / pairs,
        }


@dataclass
class AttentionStatistics:
    """Streaming statistics of attention probabilities: the site `probs`, as it is. Merges like `Statistics`.

    Rows that do not sum to 1 (see `attention.probabilities`) are taken as they are: their entropy is the sum of
    -p log p over the keys.
    """

    sums: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def add(self, probs: Tensor, mask: Tensor | None = None) -> None:
        """Take in (B, H, T, T), rows are queries; queries that the mask (B, T) calls padding do not count."""
        exact = torch.promote_types(probs.dtype, torch.float32)
        entropy = torch.special.entr(probs.to(exact)).sum(-1).double()  # (B, H, T)
        fits = mask is None or mask.shape == entropy[:, 0].shape
        params.require(fits, f"a mask of shape {getattr(mask, 'shape', None)} does not fit the probabilities")
        real = torch.ones_like(entropy[:, 0], dtype=torch.bool) if mask is None else mask.bool().to(probs.device)
        entropy = entropy.masked_fill(~real[:, None], 0).sum((0, 2))
        late = real[:, real.shape[1] // 2 :]  # the second half of a row
        first = probs[:, :, real.shape[1] // 2 :, 0].double().masked_fill(~late[:, None], 0).sum((0, 2))
        parts = {"queries": real.sum(), "entropy": entropy, "late_queries": late.sum(), "first": first}
        self._sum({"rows": torch.tensor(len(probs)), **parts})

    def _sum(self, parts: dict[str, Tensor]) -> None:
        self.sums = self.sums | {name: self.sums.get(name, 0) + part for name, part in parts.items()}

    def merge(self, other: "AttentionStatistics") -> "AttentionStatistics":
        """The statistics of both parts together."""
        whole = AttentionStatistics(self.sums)
        whole._sum(other.sums)
        return whole

    @property
    def rows(self) -> int:
        """Sequences taken in so far."""
        return int(self.sums.get("rows", 0))

    @property
    def head_entropy(self) -> Tensor:
        """(H,) float64: the mean entropy of each head's queries, nats."""
        return self.sums["entropy"] / self.sums["queries"]

    @property
    def head_sink(self) -> Tensor:
        """(H,) float64: each head's mean attention to the first token, of queries in the second half of a row."""
        return self.sums["first"] / self.sums["late_queries"]

    def summary(self) -> dict[str, float]:
        """`attention_entropy`, the mean over heads and queries; `sink`, the mean of `head_sink` over heads."""
        return {"attention_entropy": float(self.head_entropy.mean()), "sink": float(self.head_sink.mean())}


def _spread(mask: Tensor, x: Tensor) -> Tensor:
    """The (B, T) mask as (B, tokens of x): repeated over what stands between axis 0 and the tokens."""
    batch, length = x.shape[0], x.shape[-2]
    shapes = f"a mask of shape {tuple(mask.shape)} does not fit activations of shape {tuple(x.shape)}"
    params.require(mask.shape == (batch, length), shapes)
    between = x.shape[1:-2].numel()
    return mask.bool().to(x.device)[:, None].expand(batch, between, length).flatten(1)


def _back(values: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """One value per token, as (b, T), zero at padding."""
    if mask is None:
        return values.view(x.shape[:2])
    return values.new_zeros(x.shape[:2]).masked_scatter_(mask, values)


def _standardised(fourth: Tensor, second: Tensor, count) -> Tensor:
    return fourth / count / ((second / (count - 1)).square() + 1e-6)


def _lower_median(size: Tensor) -> Tensor:
    """(n, D) -> (n,) float64. On a CPU numpy's partition is several times faster than torch.median."""
    if size.device.type != "cpu":
        return size.median(1).values.double()
    rank = (size.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(size.numpy(), rank, axis=1)[:, rank].astype(np.float64))


def _upper_gram(flat: Tensor, strip: int = 256) -> Tensor:
    """(n, D) -> X^T X (D, D), of which only the upper triangle is filled in: half the work."""
    width = flat.shape[1]
    gram = flat.new_zeros(width, width)
    for start in range(0, width, strip):
        torch.mm(flat[:, start : start + strip].T, flat[:, start:], out=gram[start : start + strip, start:])
    return gram


def _probe(like: Tensor) -> Tensor:
    """A fixed vector (D,) without a pattern, of the dtype and on the device of `like` (..., D)."""
    place = torch.arange(1, like.shape[-1] + 1, dtype=torch.float64, device=like.device)
    return (place.square() * 0.7548776662).cos().to(like.dtype)
