"""Quantizers and range estimators: a grid, the range that it covers, and x rounded to it.

Uniform grids over a range that holds zero, symmetric or asymmetric; ranges from extremes, percentiles, or the least
squared error. Values stay floating point: what is simulated is the rounding.
"""

from dataclasses import dataclass
from math import floor, isfinite
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from ofutils import params

Bits = Annotated[int, "at least 2", "at most 16"]
Scheme = Literal["symmetric", "asymmetric"]
Estimator = Literal["minmax", "mse"]
GRANULARITIES = ("tensor", "channel", "token")
Ends = Tensor  # (2, ...), low and high of a range: (2,), or of one per channel or token
_BLOCK = 256  # entries that are searched for extremes together
_AT_ONCE = 1 << 20  # levels of candidates that are judged together


@dataclass(frozen=True)
class Grid:
    """The multiples of `scale` from `low` to `high`: whole numbers, with the zero point taken off."""

    scale: Tensor
    low: Tensor | int
    high: Tensor | int

    def round(self, x: Tensor, own: bool = False) -> Tensor:
        """x rounded (half to even) and clipped to the grid, as floating point of the same dtype.

        Args:
            own: nobody else needs x: the result may take its memory, which is faster where a new one costs pages.
        """
        there = own and x.dtype == self.scale.dtype and not x.requires_grad
        multiples = x.div_(self.scale) if there else x.to(self.scale.dtype) / self.scale
        return multiples.round_().clamp_(self.low, self.high).mul_(self.scale).to(x.dtype)

    def plain(self) -> "Grid":
        """The same with `low` and `high` as plain numbers, where there is one of each: the quickest to round with.
        A GPU is waited for."""
        one = not self.scale.ndim and bool((self.scale + self.low).isfinite())  # of nan nothing but nan comes
        return Grid(self.scale, int(self.low), int(self.high)) if one else self


def make_grid(low, high, bits: int, scheme: Scheme, like: Tensor | None = None) -> Grid:
    """The grid that covers a range.

    The range is widened to hold zero. Asymmetric: scale = (high - low) / (2^b - 1) and a rounded zero
    point. Symmetric: zero point 0; a range with negative values takes [-2^(b-1), 2^(b-1) - 1] with
    scale = max(-low, high) / (2^(b-1) - 1), one without takes [0, 2^b - 1], unsigned.

    Args:
        low, high: numbers or tensors, in x's units: 0-d, or of a shape that broadcasts with x.
        bits: 2 to 16.
        scheme: `symmetric` or `asymmetric`.
        like: a tensor whose device and dtype the grid takes, but at least float32; without it float32 on the CPU.

    Source: bondarenko2023, Eq 1, with the released code's handling of edge cases.
    """
    params.coerce("scheme", scheme, Scheme)
    params.coerce("bits", bits, Bits)
    options = {"dtype": torch.float32}
    if like is not None:
        options = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    low = torch.as_tensor(low, **options).clamp(max=0.0)
    high = torch.as_tensor(high, **options).clamp(min=1e-8)
    if scheme == "asymmetric":
        top = 2**bits - 1
        step = (high - low) / top
        zero_point = torch.round(-low / step).clamp(0, top)
        grid = Grid(step.clamp(min=1e-8), -zero_point, top - zero_point)
    else:
        half, signed = 2 ** (bits - 1) - 1, low < 0
        top = torch.where(signed, half, 2 * half + 1).to(low.dtype)
        grid = Grid((torch.maximum(-low, high) / top).clamp(min=1e-8), torch.where(signed, -top - 1, 0.0), top)
    return grid.plain() if low.device.type == "cpu" else grid


# --- range estimators: each returns (low, high)


def minmax_range(x: Tensor, granularity: str = "tensor") -> Ends:
    """The smallest and the largest entry, in the dtype of x.

    Args:
        granularity: of all of x (0-d), of each `channel`, an entry of the last axis (D,), or of each `token`
            (..., 1).
    """
    x = x.detach()
    if granularity == "tensor":
        return torch.stack(torch.aminmax(x))
    x = x if granularity == "token" else x.flatten(0, -2)
    along = {"dim": -1, "keepdim": True} if granularity == "token" else {"dim": 0}
    return torch.stack([x.amin(**along), x.amax(**along)])


def percentile_range(x: Tensor, percentile: float) -> Ends:
    """The (100 - p)-th and p-th percentile, interpolated linearly in float64; p in (50, 100].

    Equal to numpy's to the bit, nan included, and exact without sorting x: the k largest entries lie in the k blocks
    with the largest maxima.
    """
    flat, last = x.detach().flatten().float(), x.numel() - 1
    low, high = ((q / 100) * last for q in (100 - percentile, percentile))
    below, above = floor(low), last - floor(high)  # entries below the one, above the other
    largest, smallest = _extremes(flat, min(max(below, above) + 2, last + 1))
    ends = -smallest[below], -smallest[min(below + 1, last)], largest[above], largest[max(above - 1, 0)]
    found = torch.stack([_between(*ends[:2], low % 1), _between(*ends[2:], high % 1)])
    return found.masked_fill(largest[0].isnan(), torch.nan)


def _extremes(flat: Tensor, count: int) -> Tensor:
    """The `count` largest entries of x and of -x, each in falling order: (n,) -> (2, count)."""
    blocks = len(flat) // _BLOCK
    if blocks <= 4 * count:
        return torch.stack([flat, -flat]).topk(count).values
    body, rest = flat[: blocks * _BLOCK].view(blocks, _BLOCK), flat[blocks * _BLOCK :]
    ends = torch.stack([body.amax(1), -body.amin(1)])  # (2, blocks)
    found = torch.cat([body[ends.topk(count).indices].flatten(1), rest.expand(2, -1)], 1)
    found[1].neg_()
    return found.topk(count).values


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From the first towards the second, as numpy interpolates."""
    step = (second - first).double()
    return first.double() + step * share if share < 0.5 else second.double() - step * (1 - share)


def mse_range(x: Tensor, bits: int, scheme: Scheme, margin: float = 0.5) -> Ends:
    """The range, out of a grid of candidates, whose quantization has the least squared error.

    Symmetric: 100 thresholds c up to max|x| + margin, as [-c, c], or [0, c] without negative entries.
    Asymmetric: both ends on their own, 30 fractions each of [min - margin, max + margin].

    Args:
        margin: widens the search, in units of x. The authors' code has 0.5, which makes the grid coarse
            for small weights (16% excess error at 8 bits for a standard deviation of 0.006); 0 is the
            corrected grid.

    Source: bondarenko2023, Appendix C.4, as its released code searches; the asymmetric search is ours. All
    candidates are judged from sums over the sorted x, the few that come near the best by rounding x, as the
    authors judge all: the result is theirs, of equals the first. Half precision is searched in float32. Of an x that
    is not finite, the range is its extremes.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    lowest, highest = map(float, minmax_range(x))
    if not isfinite(highest - lowest):
        return torch.tensor([lowest, highest], dtype=torch.float64)
    if scheme == "symmetric":
        highs = [k * (max(-lowest, highest) + margin) / 100 for k in range(1, 101)]
        candidates = [(-top if lowest < 0 else 0.0, top) for top in highs]
    else:
        parts = [k / 30 for k in range(1, 31)]
        lows = [part * (lowest - margin) for part in parts] if lowest < 0 else [0.0]
        highs = [part * (highest + margin) for part in parts] if highest > 0 else [0.0]
        candidates = [(low, high) for low in lows for high in highs]

    def error(place: int) -> float:
        return float((make_grid(*candidates[place], bits, scheme, x).round(x) - x).double().square().sum())

    grids = make_grid(*torch.tensor(candidates, dtype=torch.float64).T, bits, scheme, x)
    errors, eps = _rounding_errors(x, grids), torch.finfo(grids.scale.dtype).eps
    energy = float(x.double().square().sum())
    drift = x.numel() * torch.finfo(torch.float64).eps * energy  # of the sums
    noise = 4 * eps * energy**0.5  # of the distance between x and x rounded, whose square the error is
    near = (errors - drift).clamp(min=0).sqrt() <= (errors.min().clamp(min=0) + drift).sqrt() + noise
    near = near.nonzero().flatten().tolist()
    return torch.tensor(candidates[min(near, key=error) if len(near) > 1 else near[0]], dtype=torch.float64)


def _rounding_errors(x: Tensor, grids: Grid) -> Tensor:
    """The squared error of x on each of C grids, (C,) float64, from prefix sums of the sorted x."""
    flat = x.detach().flatten().to(grids.scale.dtype)
    ordered = torch.from_numpy(np.sort(flat.numpy())) if flat.device.type == "cpu" else flat.sort().values
    ordered = ordered.double()
    sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))  # (n + 1,)
    multiples = torch.arange(int((grids.high - grids.low).max()) + 1, device=x.device, dtype=torch.float64)
    found, each = [], max(1, _AT_ONCE // len(multiples))
    for scale, low in zip(grids.scale.double().split(each), grids.low.double().split(each), strict=True):
        levels = scale[:, None] * (low[:, None] + multiples)  # (c, levels)
        ends = torch.searchsorted(ordered, (levels[:, 1:] + levels[:, :-1]) / 2)
        first = ends.new_zeros(len(ends), 1)
        ends = torch.cat([first, ends, first + len(ordered)], 1)
        count, total = ends.diff(), sums[ends].diff()  # of the entries that go to each level
        found.append((levels * (levels * count - 2 * total)).sum(1))
    return torch.cat(found) + ordered.square().sum()


def beyond(x: Tensor, threshold: float) -> Tensor:
    """Which channels have an entry with |x| above the threshold: (..., D) -> (D,) bool."""
    return (x.abs() > threshold).flatten(0, -2).any(0)


@dataclass
class RunningRange:
    """A range that follows its batches: the first sets it, later ones move it by 1 - momentum.

    With `percentile` below 100 the ends are percentiles instead of the extremes; with granularity `channel`
    every channel has its own; with a `threshold` the channels `beyond` it in a batch count as zeros there. No bias
    correction: of 16 batches at momentum 0.9 the first weighs 0.9^15 = 0.21.

    Source: bondarenko2023, section 5 (running min-max of activations), as its released code does it.
    """

    momentum: float = 0.9
    percentile: float = 100.0
    granularity: str = "tensor"
    ends: Ends | None = None
    threshold: float = 0.0

    def update(self, x: Tensor) -> Ends:
        """Take in one batch; returns the range so far."""
        x = x.masked_fill(beyond(x, self.threshold), 0.0) if self.threshold else x
        whole = self.percentile == 100
        new = minmax_range(x, self.granularity) if whole else percentile_range(x, self.percentile)
        self.ends = new if self.ends is None else (1 - self.momentum) * new + self.momentum * self.ends
        return self.ends


def fake_quantize(
    x: Tensor, bits: int = 8, scheme: Scheme = "symmetric", estimator: Estimator = "minmax", margin: float = 0.5
) -> Tensor:
    """x rounded to a b-bit grid over its own range, per tensor; x itself is left alone.

    Args:
        x: any shape, floating point.
        bits: 2 to 16.
        scheme: `symmetric` (weights) or `asymmetric` (activations).
        estimator: `minmax` or `mse`; `margin` belongs to `mse`.

    Returns:
        A tensor of the same shape and dtype with at most 2^bits values.

    Source: bondarenko2023, Eq 1.
    """
    params.coerce("estimator", estimator, Estimator)
    low, high = minmax_range(x) if estimator == "minmax" else mse_range(x, bits, scheme, margin)
    return make_grid(low, high, bits, scheme, x).round(x)
