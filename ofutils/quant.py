"""Simulated post-training quantization: quantizers, range estimators, calibration, and the context.

Uniform; symmetric weights, one range per tensor, and asymmetric activations: one static range per tensor as
in the papers (bondarenko2023, section 5, and he2024, Table 2), or, to see where the damage comes from, one
per channel or per token. Values stay floating point: what is simulated is the rounding. The head, the biases
and the gates stay in full precision, as in the authors' runs (`fp32_head`).
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ofutils import UserError, params
from ofutils.attention import QKNorm
from ofutils.probes import Batch, hooked, run
from ofutils.transformer import Transformer

SCHEMES = ("symmetric", "asymmetric")
ESTIMATORS = ("minmax", "mse")
GRANULARITIES = ("tensor", "channel", "token")
Ends = tuple[Tensor, Tensor]  # (low, high) of a range: 0-d, or one per channel or token


@dataclass(frozen=True)
class Grid:
    """Integers [low, high], with x ~ scale (integer - zero_point)."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def round(self, x: Tensor) -> Tensor:
        """x rounded (half to even) and clipped to the grid, as floating point of the same dtype."""
        integers = torch.round(x.to(self.scale.dtype) / self.scale) + self.zero_point
        integers = integers.clamp(self.low, self.high)
        return (self.scale * (integers - self.zero_point)).to(x.dtype)


def make_grid(low, high, bits: int, scheme: str, like: Tensor | None = None) -> Grid:
    """The grid that covers a range.

    The range is widened to hold zero. Asymmetric: scale = (high - low) / (2^b - 1) and a rounded zero
    point. Symmetric: zero point 0; a range with negative values takes [-2^(b-1), 2^(b-1) - 1] with
    scale = max(-low, high) / (2^(b-1) - 1), one without takes [0, 2^b - 1], unsigned.

    Args:
        low, high: numbers or tensors, in x's units: 0-d, or (asymmetric only) of a shape that broadcasts with x.
        bits: 2 to 16.
        scheme: `symmetric` or `asymmetric`.
        like: a tensor whose device and dtype the grid takes, float32 at least and otherwise.

    Source: bondarenko2023, Eq 1, with the released code's handling of edge cases.
    """
    if scheme not in SCHEMES:
        raise UserError(f"unknown scheme {scheme!r}{params.suggest(scheme, SCHEMES)}; known: {', '.join(SCHEMES)}")
    if not 2 <= bits <= 16:
        raise UserError(f"bits must lie between 2 and 16, got {bits}")
    options = {"dtype": torch.float32}
    if like is not None:
        options = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    low = torch.as_tensor(low, **options).clamp(max=0.0)
    high = torch.as_tensor(high, **options).clamp(min=1e-8)
    if scheme == "asymmetric":
        top = 2**bits - 1
        step = (high - low) / top
        zero_point = torch.clamp(torch.round(-low / step), 0, top)
        return Grid(step.clamp(min=1e-8), zero_point, 0, top)
    zero_point = torch.zeros_like(low)
    if low < 0:
        top = 2 ** (bits - 1) - 1
        return Grid((torch.maximum(-low, high) / top).clamp(min=1e-8), zero_point, -top - 1, top)
    top = 2**bits - 1
    return Grid((high / top).clamp(min=1e-8), zero_point, 0, top)


# ---------------------------------------------------------------------------------------------------
# range estimators: each returns (low, high)


def minmax_range(x: Tensor, granularity: str = "tensor") -> Ends:
    """The smallest and the largest entry, in the dtype of x.

    Args:
        granularity: of all of x (0-d), of each `channel`, an entry of the last axis (D,), or of each `token`
            (..., 1).
    """
    if granularity == "token":
        return torch.aminmax(x.detach(), dim=-1, keepdim=True)
    low, high = (
        torch.aminmax(x.detach()) if granularity == "tensor" else torch.aminmax(x.detach().flatten(0, -2), dim=0)
    )
    return low, high


def percentile_range(x: Tensor, percentile: float) -> Ends:
    """The (100 - p)-th and p-th percentile, interpolated linearly in float64; p in (50, 100]."""
    ends = np.percentile(x.detach().float().cpu().numpy(), (100 - percentile, percentile))
    low, high = torch.from_numpy(ends.astype(np.float64))
    return low, high


def mse_range(x: Tensor, bits: int, scheme: str, margin: float = 0.5) -> Ends:
    """The range, out of a grid of candidates, whose quantization has the least squared error.

    Symmetric: 100 thresholds c up to max|x| + margin, as [-c, c], or [0, c] without negative entries.
    Asymmetric: both ends on their own, 30 fractions each of [min - margin, max + margin].

    Args:
        margin: widens the search, in units of x. The authors' code has 0.5, which makes the grid coarse
            for small weights (16% excess error at 8 bits for a standard deviation of 0.006); 0 is the
            corrected grid.

    Source: bondarenko2023, Appendix C.4, as its released code searches; the asymmetric search is ours.
    """
    lowest, highest = map(float, minmax_range(x))
    if scheme == "symmetric":
        reach = max(-lowest, highest) + margin
        tops = [k * reach / 100 for k in range(1, 101)]
        candidates = [(-top if lowest < 0 else 0.0, top) for top in tops]
    else:
        parts = [k / 30 for k in range(1, 31)]
        lows = [part * (lowest - margin) for part in parts] if lowest < 0 else [0.0]
        highs = [part * (highest + margin) for part in parts] if highest > 0 else [0.0]
        candidates = [(low, high) for low in lows for high in highs]

    def error(ends: tuple[float, float]) -> float:
        return float((make_grid(*ends, bits, scheme, x).round(x) - x).double().square().sum())

    low, high = torch.tensor(min(candidates, key=error), dtype=torch.float64)
    return low, high


@dataclass
class RunningRange:
    """A range that follows its batches: the first sets it, later ones move it by 1 - momentum.

    With `percentile` below 100 the ends are percentiles instead of the extremes; with granularity `channel`
    every channel has its own. No bias correction: of 16 batches at momentum 0.9 the first weighs 0.9^15 = 0.21.

    Source: bondarenko2023, section 5 (running min-max of activations), as its released code does it.
    """

    momentum: float = 0.9
    percentile: float = 100.0
    granularity: str = "tensor"
    ends: Ends | None = None

    def update(self, x: Tensor) -> Ends:
        """Take in one batch; returns the range so far."""
        whole = self.percentile == 100
        new = minmax_range(x, self.granularity) if whole else percentile_range(x, self.percentile)
        if self.ends is not None:
            pairs = zip(new, self.ends, strict=True)
            new = tuple((1 - self.momentum) * now + self.momentum * before for now, before in pairs)
        self.ends = new
        return new


def fake_quantize(
    x: Tensor, bits: int = 8, scheme: str = "symmetric", estimator: str = "minmax", margin: float = 0.5
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
    if estimator not in ESTIMATORS:
        near = params.suggest(estimator, ESTIMATORS)
        raise UserError(f"unknown estimator {estimator!r}{near}; known: {', '.join(ESTIMATORS)}")
    low, high = minmax_range(x) if estimator == "minmax" else mse_range(x, bits, scheme, margin)
    return make_grid(low, high, bits, scheme, x).round(x)


# ---------------------------------------------------------------------------------------------------
# models


_NORMS = ("embed_norm", "norm1", "norm2", "norm_final", "q_norm", "k_norm")
_ACTIVATIONS = frozenset(
    {"project_in", "embed_typed", "embed_sum", "q", "k", "v", "scores", "probs", "context", "gated", "attn_out"}
    | {"resid_mid", "mlp_act", "mlp_out", "resid_post", "project_out"}
)
_NO_CHANNELS = ("scores", "probs")  # their last axis is keys: per channel means per tensor there


@dataclass(frozen=True)
class QuantSettings:
    """How a model is quantized. The defaults are the paper's OPT setting, without percentiles."""

    weight_bits: int = 8
    activation_bits: int = 8
    weights: str = "mse"  # range estimator of weights: minmax | mse
    margin: float = 0.5  # of the mse grid; 0 is the corrected grid
    momentum: float = 0.9  # of the running ranges of activations
    percentile: float = 100.0  # of activations; 100 is min-max
    batches: int = 16  # calibration batches
    # of activations: tensor | channel (both static; of q_norm and k_norm the K channels that heads share) | token
    granularity: str = "tensor"
    skip: tuple[str, ...] = ()  # activations left in full precision, such as the residual sums resid_mid, resid_post

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            near = params.suggest(self.granularity, GRANULARITIES)
            raise UserError(f"unknown granularity {self.granularity!r}{near}; known: {', '.join(GRANULARITIES)}")
        params.require(self.granularity == "tensor" or self.percentile == 100, "percentiles are per tensor only")
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))
        for kind in self.skip:
            if kind not in (known := sorted(_ACTIVATIONS | set(_NORMS))):
                raise UserError(
                    f"skip: no activation {kind!r}{params.suggest(kind, known)}; known: {', '.join(known)}"
                )
        if self.weights not in ESTIMATORS:
            raise UserError(f"unknown weights {self.weights!r}; known: {', '.join(ESTIMATORS)}")
        for bits in (self.weight_bits, self.activation_bits):
            params.require(2 <= bits <= 16, f"bits must lie between 2 and 16, got {bits}")
        params.require(self.margin >= 0, f"margin must be at least 0, got {self.margin}")
        if not 50 < self.percentile <= 100 or not 0 <= self.momentum < 1 or self.batches < 1:
            raise UserError(f"bad percentile {self.percentile}, momentum {self.momentum} or batches {self.batches}")

    @property
    def label(self) -> str:
        """`W8A8` and the like, with what is not per tensor or left out."""
        fine = "" if self.granularity == "tensor" else f" per {self.granularity}"
        return f"W{self.weight_bits}A{self.activation_bits}{fine}" + "".join(f" -{kind}" for kind in self.skip)


Ranges = dict[str, Ends]


def _activation_sites(model: Transformer, settings: QuantSettings) -> list[str]:
    """Each tensor once: a norm that is not there adds no second rounding of the stream."""
    rounded, gated = {}, not model.config.causal  # the authors round BERT's context after the gate, OPT's before
    for name, module in model.sites().items():
        kind = name.split(".")[-1]
        there = kind in _ACTIVATIONS or (kind in _NORMS and not isinstance(module, nn.Identity))
        if there and kind != ("context" if gated else "gated"):
            rounded[name] = kind
    for kind in set(settings.skip) - set(rounded.values()):
        raise UserError(
            f"skip: {kind} is not rounded in this model; rounded: {', '.join(sorted(set(rounded.values())))}"
        )
    return [name for name, kind in rounded.items() if kind not in settings.skip]


def _weights(model: Transformer) -> dict[str, nn.Parameter]:
    """Matrices and norm gains. Embeddings are rounded where they are read, since the head shares them."""
    chosen = {}
    for name, module in model.named_modules():
        gain = name.split(".")[-1] in _NORMS and isinstance(module, (nn.LayerNorm, QKNorm))
        if (isinstance(module, nn.Linear) or gain) and not name.startswith("head."):
            chosen[f"{name}.weight"] = module.weight
    return chosen


def _embeddings(model: Transformer) -> dict[str, Tensor]:
    """Site -> the weight that is read there: rounding the one is rounding the other."""
    tables = {
        "embed_tokens": _scaled(model.token_embedding.weight.data, model.config.embed_scale),
        "embed_segments": model.segment_embedding and model.segment_embedding.weight.data,
        "embed_positions": model.position_embedding and model.position_embedding.weight.data,
    }
    return {site: table for site, table in tables.items() if table is not None}


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _weight_ranges(model: Transformer, settings: QuantSettings) -> Ranges:
    tensors = {name: weight.data for name, weight in _weights(model).items()} | _embeddings(model)
    if settings.weights == "minmax":
        return {name: minmax_range(x) for name, x in tensors.items()}
    return {name: mse_range(x, settings.weight_bits, "symmetric", settings.margin) for name, x in tensors.items()}


@contextmanager
def _rounded_weights(model: Transformer, settings: QuantSettings, ranges: Ranges):
    """Weights rounded for as long as the context is open; the originals come back to the bit."""
    originals = {name: weight.data for name, weight in _weights(model).items()}
    embeddings = {}
    for site in _embeddings(model):
        embeddings[site] = lambda x, ends=ranges[site]: make_grid(*ends, settings.weight_bits, "symmetric", x).round(
            x
        )
    try:
        for name, weight in _weights(model).items():
            grid = make_grid(*ranges[name], settings.weight_bits, "symmetric", weight.data)
            weight.data = grid.round(weight.data)
        with hooked(model, embeddings):
            yield
    finally:
        for name, weight in _weights(model).items():
            weight.data = originals[name]


@torch.no_grad()
def calibrate(model: Transformer, batches: Iterable[Batch], settings: QuantSettings) -> Ranges:
    """The range of every quantized tensor: of weights by their estimator, of activations by running ranges.

    Batches run through the network as quantized so far: weights rounded, and every activation rounded
    with its range right after it was updated, as the authors' code does.

    Args:
        batches: from the training split; all of them are used. Padding is calibrated on like the rest.

    Returns:
        Site or weight name -> (low, high); per token, whose ranges are not static, weights alone.
    """
    ranges = _weight_ranges(model, settings)
    if settings.granularity == "token":
        return ranges
    running = {}
    for site in _activation_sites(model, settings):
        granularity = "tensor" if site.split(".")[-1] in _NO_CHANNELS else settings.granularity
        running[site] = RunningRange(settings.momentum, settings.percentile, granularity)

    def follow(site):
        return lambda x: make_grid(*running[site].update(x), settings.activation_bits, "asymmetric", x).round(x)

    training = model.training
    model.eval()
    try:
        with (
            _rounded_weights(model, settings, ranges),
            hooked(model, {site: follow(site) for site in running}),
        ):
            for batch in batches:
                run(model, batch)
    finally:
        model.train(training)
    if any(one.ends is None for one in running.values()):
        raise UserError("nothing to calibrate on: no batches")
    return ranges | {site: one.ends for site, one in running.items()}


@contextmanager
def quantized(model: Transformer, settings: QuantSettings, ranges: Ranges):
    """The model with weights and activations rounded, for as long as the context is open.

    Afterwards, also after an exception, it is the model it was, to the bit. A site may be watched at the
    same time: what is watched is the rounded tensor, provided that the watching starts inside.

    Args:
        ranges: from `calibrate` on this model.
    """
    own = settings.granularity == "token"

    def rounded(site):
        def function(x):
            ends = minmax_range(x, "token") if own else ranges[site]
            return make_grid(*ends, settings.activation_bits, "asymmetric", x).round(x)

        return function

    sites = _activation_sites(model, settings)
    needed = [*_weights(model), *_embeddings(model), *([] if own else sites)]
    if missing := [name for name in needed if name not in ranges]:
        raise UserError(f"no range for {missing[0]}: calibrate this model with these settings first")
    with _rounded_weights(model, settings, ranges), hooked(model, {site: rounded(site) for site in sites}):
        yield model
