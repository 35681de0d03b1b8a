"""Simulated post-training quantization of models: calibration, the context, and tables of many settings.

Grids are uniform: symmetric for weights, with one range per tensor, and asymmetric for activations: one static
range per tensor as in the papers (bondarenko2023, section 5, and he2024, Table 2), or, to see where the damage comes
from, one per channel or per token. The grids and ranges are those of `quantizers`. The head, the biases and the gates
stay in full precision, as in the authors' runs (`fp32_head`), and so do the residual gains and the sink logits.

What the papers do not have: a range for every output channel of a matrix (`weight_granularity`), and the mixed
decomposition of LLM.int8() (`outlier_threshold`; Dettmers et al. 2022): channels of an activation with an entry
beyond the threshold, found anew in every batch as in bitsandbytes, stay in full precision, and so do the columns of a
matrix that read them.

    table(model, settings, batches, score)     many settings of one model: calibrate, round and score each
    calibrate(model, batches, settings)        the range of every quantized tensor
    quantized(model, settings, ranges)         the model rounded, for as long as the context is open
    int8(model, settings, batches)             a copy that multiplies in int8 indeed, by torchao
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ofutils import UserError, params, quantizers
from ofutils.layers import RMSNorm
from ofutils.probes import Batch, evaluating, hooked, run
from ofutils.quantizers import Ends, RunningRange, beyond, make_grid, minmax_range, mse_range
from ofutils.transformer import Transformer

Calibration = Literal["quantized", "float"]
_NORMS = ("embed_norm", "patch_norm", "norm1", "norm2", "norm_final", "q_norm", "k_norm")
_ACTIVATIONS = frozenset(
    {"project_in", "embed_typed", "embed_sum", "q", "k", "v", "scores", "probs", "context", "gated", "attn_out"}
    | {"resid_mid", "mlp_act", "mlp_out", "resid_post", "project_out"}
)
_NO_CHANNELS = ("scores", "probs")  # their last axis is keys: per channel means per tensor there


@params.settings
class QuantSettings:
    """How a model is quantized. The defaults are the paper's OPT setting, without percentiles."""

    weight_bits: quantizers.Bits = 8
    activation_bits: quantizers.Bits = 8
    weights: quantizers.Estimator = "mse"  # range estimator of weights
    margin: params.NotNegative = 0.5  # of the mse grid; 0 is the corrected grid
    momentum: params.Fraction = 0.9  # of the running ranges of activations
    percentile: Annotated[float, "above 50", "at most 100"] = 100.0  # of activations; 100 is min-max
    batches: params.Count = 16  # calibration batches that a recipe draws; `calibrate` takes all that it is given
    draw: params.Natural = 0  # which draw of them
    # of activations: static but per token; of q_norm and k_norm `channel` means the K channels that heads share
    granularity: Literal["tensor", "channel", "token"] = "tensor"
    skip: tuple[str, ...] = ()  # activations left in full precision, such as the residual sums resid_mid, resid_post
    # of matrices and norm gains: one range, or one per output channel, which leaves gains as they are
    weight_granularity: Literal["tensor", "channel"] = "tensor"
    # channels with an entry beyond it stay in full precision, 6 in LLM.int8(); 0: none do; scores and probs have none
    outlier_threshold: params.NotNegative = 0.0

    def __post_init__(self):
        params.require(self.granularity == "tensor" or self.percentile == 100, "percentiles are per tensor only")
        whole = self.weight_granularity == "tensor" or self.weights == "minmax"
        params.require(whole, "weight_granularity channel is for weights minmax: mse ranges are searched per tensor")
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))
        for kind in self.skip:
            params.require_known("activation to skip", kind, sorted(_ACTIVATIONS | set(_NORMS)))

    @property
    def label(self) -> str:
        """`W8A8` and the like, with what is min-max of weights, not per tensor, left out, or a later draw."""
        fine = "" if self.weights == "mse" or self.weight_granularity != "tensor" else " min-max"
        fine += "" if self.granularity == "tensor" else f" per {self.granularity}"
        fine += "" if self.weight_granularity == "tensor" else f", weights per {self.weight_granularity}"
        fine += f", exact beyond {self.outlier_threshold:g}" if self.outlier_threshold else ""
        fine += f", draw {self.draw}" if self.draw else ""
        return f"W{self.weight_bits}A{self.activation_bits}{fine}" + "".join(f" -{kind}" for kind in self.skip)


Ranges = dict[str, Ends]


def _activation_sites(model: Transformer, settings: QuantSettings) -> list[str]:
    """Each tensor once: a norm that is not there adds no second rounding of the stream."""
    rounded, gated = {}, not model.config.causal  # the authors round BERT's context after the gate, OPT's before
    own = _ACTIVATIONS | ({"embed_tokens"} if model.config.image.size else set())  # of a matrix there, not read
    for name, module in model.sites().items():
        kind = name.split(".")[-1]
        there = kind in own or (kind in _NORMS and not isinstance(module, nn.Identity))
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
        norm = name.split(".")[-1] in _NORMS and isinstance(module, (nn.LayerNorm, RMSNorm))
        gain = norm and module.weight is not None  # SRMSNorm has none
        if (isinstance(module, nn.Linear) or gain) and not name.startswith("head."):
            chosen[f"{name}.weight"] = module.weight
    return chosen


def _embeddings(model: Transformer) -> dict[str, Tensor]:
    """Site -> the weight that is read there: rounding the one is rounding the other."""
    text = not model.config.image.size
    tables = {
        "embed_tokens": model.token_embedding.weight.data * model.config.embedding.scale if text else None,
        "embed_segments": model.segment_embedding and model.segment_embedding.weight.data,
        "embed_positions": model.position_embedding and model.position_embedding.weight.data,
    }
    return {site: table for site, table in tables.items() if table is not None}


def _weight_ranges(model: Transformer, settings: QuantSettings) -> Ranges:
    tensors = {name: weight.data for name, weight in _weights(model).items()} | _embeddings(model)
    if settings.weights == "minmax":
        own = _weights(model) if settings.weight_granularity == "channel" else {}
        return {name: _by_output(x) if name in own else minmax_range(x) for name, x in tensors.items()}
    return {name: mse_range(x, settings.weight_bits, "symmetric", settings.margin) for name, x in tensors.items()}


def _by_output(x: Tensor) -> Ends:
    """One range per output channel: of a matrix (out, in) (2, out, 1), of a gain (D,) (2, D), which is then exact."""
    return minmax_range(x, "token") if x.ndim == 2 else torch.stack([x, x])


@contextmanager
def _rounded_weights(model: Transformer, settings: QuantSettings, ranges: Ranges):
    """Weights rounded for as long as the context is open; the originals come back to the bit."""
    originals = {name: weight.data for name, weight in _weights(model).items()}

    def grid(name, like):
        return make_grid(*ranges[name], settings.weight_bits, "symmetric", like).plain()

    def exact(name):
        """Adds what rounding took from the columns that read a channel beyond the threshold."""

        def function(matrix, inputs, output):
            outliers = inputs[0].masked_fill(~beyond(inputs[0], settings.outlier_threshold), 0.0)
            return output + nn.functional.linear(outliers, originals[name] - matrix.weight)

        return function

    embeddings, handles = {site: grid(site, table).round for site, table in _embeddings(model).items()}, []
    try:
        for name, weight in _weights(model).items():
            weight.data = grid(name, weight.data).round(weight.data)
            if settings.outlier_threshold and weight.ndim == 2:
                matrix = model.get_submodule(name.removesuffix(".weight"))
                handles.append(matrix.register_forward_hook(exact(name)))
        with hooked(model, embeddings):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in _weights(model).items():
            weight.data = originals[name]


def _running(model: Transformer, settings: QuantSettings) -> dict[str, RunningRange]:
    """One for each rounded activation; none per token, whose ranges are not static."""
    if settings.granularity == "token":
        return {}
    kinds = dict.fromkeys(_activation_sites(model, settings), settings.granularity)
    kinds |= {site: "tensor" for site in kinds if site.split(".")[-1] in _NO_CHANNELS}
    shared = {"momentum": settings.momentum, "percentile": settings.percentile}
    return {
        site: RunningRange(**shared, granularity=kind, threshold=_threshold(site, settings))
        for site, kind in kinds.items()
    }


def _threshold(site: str, settings: QuantSettings) -> float:
    return 0.0 if site.split(".")[-1] in _NO_CHANNELS else settings.outlier_threshold


def _decomposed(rounding: Callable[[Tensor, bool], Tensor], threshold: float) -> Callable[[Tensor, bool], Tensor]:
    """Rounding of x but for the channels with an entry beyond the threshold; 0: of all of x."""

    def function(x, own):
        kept = beyond(x, threshold)
        return torch.where(kept, x, rounding(x.masked_fill(kept, 0.0), True))

    return function if threshold else rounding


@contextmanager
def _hooked(model: Transformer, functions: dict[str, Callable[[Tensor, bool], Tensor | None]], others: int):
    """`hooked` by functions of (x, own): own where no hook but ours can hold the memory of x, which may be reused.

    Args:
        others: how many hooks of ours are there already.
    """
    hooks = [found for module in model.modules() for found in (module._forward_hooks, module._forward_pre_hooks)]
    ours = len(functions) + others if sum(map(len, hooks)) == others else -1

    def told(function):
        return lambda x: function(x, sum(map(len, hooks)) == ours)

    with hooked(model, {site: told(function) for site, function in functions.items()}):
        yield


class _Done(Exception):
    """Everything that was to be seen of a forward pass has been seen."""


def _follow(model, batches, running: list[dict[str, RunningRange]], bits: int = 0) -> list[Ranges]:
    """Take the batches into running ranges by site, and return where these have come to.

    Args:
        bits: each site is rounded right after its range was updated; 0: nothing is rounded.

    A pass ends when all sites have been computed: the head, which stays in full precision, is left out.
    """
    watched: dict[str, list[RunningRange]] = {}
    for site, one in (item for ranges in running for item in ranges.items()):
        watched.setdefault(site, []).append(one)
    waiting: set[str] = set()

    def watch(site):
        def function(x, own):
            for one in watched[site]:
                ends = one.update(x)
            waiting.discard(site)
            if not waiting:
                raise _Done
            if bits:  # of one setting
                return _decomposed(make_grid(*ends, bits, "asymmetric", x).round, one.threshold)(x, own)

        return function

    embeddings = len(_embeddings(model)) if bits else 0  # rounded already
    with evaluating(model), _hooked(model, {site: watch(site) for site in watched}, embeddings):
        for batch in batches if watched else ():
            waiting.update(watched)
            with suppress(_Done):
                run(model, batch)
    seen = all(one.ends is not None for those in watched.values() for one in those)
    params.require(seen, "nothing to calibrate on: no batches")
    return [{site: one.ends for site, one in ranges.items()} for ranges in running]


@torch.no_grad()
def calibrate(model: Transformer, batches: Iterable[Batch], settings: QuantSettings, weights=None) -> Ranges:
    """The range of every quantized tensor: of weights by their estimator, of activations by running ranges.

    Batches run through the network as quantized so far: weights rounded, and every activation rounded
    with its range right after it was updated, as the authors' code does. A pass ends at the last of these: the head,
    which stays in full precision, is not computed.

    Args:
        batches: from the training split; all of them are used. Padding is calibrated on like the rest.
        weights: the ranges of weights, if they are known: those of another setting with the same estimator,
            granularity, margin and bits.

    Returns:
        Site or weight name -> (low, high); per token, whose ranges are not static, weights alone.
    """
    ranges = weights or _weight_ranges(model, settings)
    with _rounded_weights(model, settings, ranges):
        (found,) = _follow(model, batches, [_running(model, settings)], settings.activation_bits)
    return ranges | found


@torch.no_grad()
def table(model: Transformer, settings, batches, score: Callable, calibration: Calibration = "quantized") -> list:
    """Many settings of one model: what `score` gives while it is rounded by each of them.

    The model is not copied. Ranges of weights are searched once for each estimator and number of bits.

    Args:
        settings: a sequence of `QuantSettings`.
        batches: for calibration, see `calibrate`; all of them for every setting.
        score: called while the model is quantized, e.g. `lambda: measure(model, held_out, loss=clm_loss).loss`.
        calibration: `quantized`: each setting through the network as quantized so far, as the papers do; `float`:
            all in one pass through the network in full precision, which costs a pass less for each setting.

    Returns:
        One score for each of the settings, in their order.

    Raises:
        UserError: an unknown calibration, and what `calibrate` refuses.
    """
    params.coerce("calibration", calibration, Calibration)
    settings, batches, weights, scores = list(settings), list(batches), {}, []
    floats = _in_float(model, batches, settings) if calibration == "float" else [None] * len(settings)
    for one, found in zip(settings, floats, strict=True):
        searched = (one.margin, one.weight_bits) if one.weights == "mse" else one.weight_granularity
        if searched not in weights:
            weights[searched] = _weight_ranges(model, one)
        own = weights[searched]
        ranges = calibrate(model, batches, one, own) if found is None else own | found
        with quantized(model, one, ranges):
            scores.append(score())
    return scores


def _in_float(model: Transformer, batches: list[Batch], settings: Sequence[QuantSettings]) -> list[Ranges]:
    """The ranges of activations for each of the settings, in one pass of the model as it is."""
    kinds = [(one.momentum, one.percentile, one.granularity, one.skip, one.outlier_threshold) for one in settings]
    running = {kind: _running(model, one) for kind, one in zip(kinds, settings, strict=True)}
    found = dict(zip(running, _follow(model, batches, list(running.values())), strict=True))
    return [found[kind] for kind in kinds]


@contextmanager
def quantized(model: Transformer, settings: QuantSettings, ranges: Ranges):
    """The model with weights and activations rounded, for as long as the context is open.

    Afterwards, also after an exception, it is the model it was, to the bit. A site may be watched or edited at the
    same time: what is watched is the rounded tensor, provided that the watching starts inside. Grids are made
    when the context is opened, on the model's device: a forward pass waits for nothing (and makes none but those of
    tokens).

    Args:
        ranges: from `calibrate` on this model.
    """
    tokens, bits, like = settings.granularity == "token", settings.activation_bits, next(model.parameters())
    sites = _activation_sites(model, settings)
    needed = [*_weights(model), *_embeddings(model), *([] if tokens else sites)]
    if missing := [name for name in needed if name not in ranges]:
        raise UserError(f"no range for {missing[0]}: calibrate this model with these settings first")

    def by_token(x, own):
        return make_grid(*minmax_range(x, "token"), bits, "asymmetric", x).round(x, own)

    def rounding(site):
        whole = by_token if tokens else make_grid(*ranges[site], bits, "asymmetric", like).plain().round
        return _decomposed(whole, _threshold(site, settings))

    rounded, embeddings = {site: rounding(site) for site in sites}, len(_embeddings(model))
    with _rounded_weights(model, settings, ranges), _hooked(model, rounded, embeddings):
        yield model


@torch.no_grad()
def int8(model: Transformer, settings: QuantSettings, batches: Iterable[Batch] = ()) -> Transformer:
    """A copy whose matrices are int8 numbers and multiply such on the CPU, by torchao: no simulation.

    Of what `quantized` rounds, the matrices and what each of them multiplies, on the same grids; embeddings, gains,
    scores, sums and the head stay as they are, whatever `skip` says. Where `skip` names everything else, embeddings
    lie on their grids and ranges come from the network in full precision, `quantized` has the same logits to 1e-6, if
    norms come before (after, their outputs are the stream, which stays exact here). Per token activations are rounded
    as they come, per tensor by running ranges over the batches, in full precision.

    Args:
        settings: 8 bits each; activations per `tensor` or `token`; weights by any estimator.
        batches: to calibrate on, as in `calibrate`; none are needed per token.

    Returns:
        A `Transformer` in evaluation mode, to be read and measured like another; it cannot be trained.

    Raises:
        UserError: no torchao, other settings, or nothing to calibrate on.

    Departure: torchao's own `quantize_` takes max|w| / 127.5 for the step of a weight, where the papers and this take
        max|w| / 127, and by default symmetric grids for activations. What has no negative weight, which the papers
        round to 0..255, is rounded to 0..127.
    """
    try:
        from torchao.quantization import Int8Tensor, PerRow, PerTensor
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise UserError('int8 needs torchao: pip install -e ".[int8]" -c constraints.txt') from error
    eight = settings.weight_bits == settings.activation_bits == 8 and not settings.outlier_threshold
    fits = eight and settings.granularity != "channel"
    params.require(fits, f"int8 is W8A8 with activations per tensor or per token, not {settings.label}")
    by_token, copied, weights = settings.granularity == "token", copy.deepcopy(model).eval(), _weights(model)
    matrices = {
        name: copied.get_submodule(name.removesuffix(".weight")) for name in weights if weights[name].ndim == 2
    }
    ranges, inputs = _weight_ranges(model, settings), {} if by_token else _inputs(copied, matrices, batches, settings)
    activations = QuantizeTensorToInt8Kwargs(PerRow() if by_token else PerTensor(), MappingType.ASYMMETRIC)
    for name, matrix in matrices.items():
        top, static = ranges[name].abs().amax(0), {}
        step = make_grid(-top, top, 8, "symmetric", matrix.weight).scale.reshape(-1, 1)  # (out, 1) or (1, 1)
        if not by_token:
            grid = make_grid(*inputs[name], 8, "asymmetric", matrix.weight)
            zero = torch.as_tensor(-128 - grid.low, dtype=torch.int8, device=step.device)
            static = {"act_quant_scale": grid.scale.reshape(1, 1, 1), "act_quant_zero_point": zero.reshape(1, 1, 1)}
        rows = PerRow() if settings.weight_granularity == "channel" else PerTensor()
        whole = Int8Tensor.from_hp(matrix.weight.data, rows, scale=step, act_quant_kwargs=activations, **static)
        matrix.weight = nn.Parameter(whole, requires_grad=False)
    return copied


def _inputs(model: Transformer, matrices: dict[str, nn.Module], batches: Iterable[Batch], settings) -> Ranges:
    """The range of what each matrix multiplies, by running ranges, in full precision."""
    running = {name: RunningRange(settings.momentum, settings.percentile) for name in matrices}

    def watch(name):
        def function(_, inputs):
            running[name].update(inputs[0])

        return function

    handles = [matrix.register_forward_pre_hook(watch(name)) for name, matrix in matrices.items()]
    with evaluating(model):
        for batch in batches:
            run(model, batch)
    for handle in handles:
        handle.remove()
    seen = all(one.ends is not None for one in running.values())
    params.require(seen, "nothing to calibrate on: no batches")
    return {name: one.ends for name, one in running.items()}
