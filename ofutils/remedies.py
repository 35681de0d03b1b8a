"""What the papers do not have: remedies for a model that is trained already.

heal(model, batches, healing)    its outliers trained away, on its own outputs and any text
smooth(model, batches, alpha)    SmoothQuant: outliers of the norms' outputs moved into the matrices that read them
rotate(model, seed)              QuaRot, SpinQuant: the residual stream in another basis, outliers spread over it
LLM_INT8                         settings for `quant`: LLM.int8(), outliers left in full precision

`smooth` and `rotate` fold into the weights what they do: in full precision the function stays the same, to rounding.
Where a form of the transformer leaves no place for that, they refuse.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import optim, params
from ofutils.attention import AttentionConfig
from ofutils.probes import Batch, hooked, ids_and_mask, measure, resolve, run
from ofutils.quant import QuantSettings
from ofutils.transformer import PRE_NORMS, Block, Transformer, TransformerConfig

#: A range for every token and every output channel, and what has an entry beyond 6 in full precision.
#: Source: Dettmers et al. 2022, *LLM.int8()*. Departure: there only the inputs of matrices are rounded, here all that
#: `quant` rounds, embeddings and the stream included, so that it compares with other settings.
LLM_INT8 = QuantSettings(weights="minmax", granularity="token", weight_granularity="channel", outlier_threshold=6.0)


@params.settings
class Healing:
    """How a model is healed. The defaults leave its architecture as it is and press on kurtosis."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)  # of the healed model
    penalty: Literal["none", "kurtosis", "max"] = "kurtosis"
    weight: params.NotNegative = 0.02  # of the penalty, beside the distance to the original
    sites: tuple[str, ...] = ("mlp_out", "resid_post")  # where the penalty is taken
    steps: params.Count = 300
    warmup: params.Natural = 30  # steps of linear warm-up, then linear decay to 0
    lr: params.Positive = 1e-3
    seed: params.Natural = 0  # of the order of the batches


def heal(
    model: Transformer,
    batches: Iterable[Batch],
    healing: Healing | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Transformer, list[dict]]:
    """A copy of a model without its outliers, trained on the model's own outputs.

    The loss is the distance to the original plus `weight` times the penalty. Distance: 1 - cosine to the original's
    last hidden states, or the KL divergence from its logits (nats) where it has a head; the mean over tokens.
    Penalty: at every site the logarithm of the outliers' size among all entries x of a batch's tokens, the mean over
    sites; for `kurtosis` log(mean(x^4) / mean(x^2)^2), for `max` log(max|x| / sqrt(mean(x^2))). Neither depends on
    the scale of x, so shrinking everything wins nothing. AdamW (betas 0.9 and 0.99, no weight decay, gradients
    of norm 1 at most) moves all but the token embedding.

    Gates start at `pi_init` for every input, whatever it is: near 1, the copy starts near the original. Another
    softmax, clipped or with a sink logit, starts as far from it as that takes it.

    Args:
        model: from `families.from_hf`, or one of ours, with plain attention; it is left as it is.
        batches: ids or mappings, see `probes`; padding counts nowhere. Gone through in another order each time.
        healing: by default `Healing()`.
        report: called with (steps done, loss).

    Returns:
        The healed model in evaluation mode, on the model's device, and one entry per step: `step`, `distance`,
        `kurtosis` (mean(x^4) / mean(x^2)^2) and `max` (largest |x|), the largest over sites of that step's batch.

    Raises:
        UserError: no batches, a site that the model does not have, a model whose attention is not the plain one.
    """
    healing, batches = healing or Healing(), list(batches)
    params.require(len(batches) > 0, "nothing to heal on: no batches")
    plain = model.config.attention == AttentionConfig()
    params.require(plain, "this model's attention is not the plain one: heal a model as it was before")
    healed, log = _copy(model, healing.attention), []
    sites, kept = resolve(healed, healing.sites), {}
    moved = [parameter for parameter in healed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, healing.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator, order = torch.Generator().manual_seed(healing.seed), []
    with hooked(healed, {site: lambda x, own=site: kept.update({own: x}) for site in sites}):
        for step in range(healing.steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            batch = batches[order.pop()]
            optimizer.param_groups[0]["lr"] = healing.lr * optim.schedule(step, healing.steps, healing.warmup)
            real = ids_and_mask(batch)[1].to(healed.token_embedding.weight.device)
            distance = _distance(run(healed, batch)[real], _exact(model, batch)[real], model.config.head)
            sizes = {site: _sizes(x[real]) for site, x in kept.items()}
            loss = distance + healing.weight * _penalty(sizes, healing.penalty)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            largest = {name: max(one[name].item() for one in sizes.values()) for name in ("kurtosis", "max")}
            log.append({"step": step + 1, "distance": distance.item()} | largest)
            report(step + 1, loss.item())
    return healed.requires_grad_(False).eval(), log


def _copy(model: Transformer, attention: AttentionConfig) -> Transformer:
    """The model with another attention, to be trained: gates at their start for every input, embedding fixed."""
    copy = Transformer(replace(model.config, attention=attention))
    copy.load_state_dict(model.state_dict() | _gates(copy))
    copy.token_embedding.requires_grad_(False)
    return copy.to(next(model.parameters()).device).train()


def _gates(model: Transformer) -> dict[str, Tensor]:
    """The state of fresh gates that look at nothing, and of fresh sink logits."""
    state = {n: value for n, value in model.state_dict().items() if ".gate." in n or n.endswith(".attention.sink")}
    return {name: torch.zeros_like(value) if name.endswith(".weight") else value for name, value in state.items()}


@torch.no_grad()
def _exact(model: Transformer, batch: Batch) -> Tensor:
    return run(model, batch)


def _distance(ours: Tensor, exact: Tensor, head: str) -> Tensor:
    """(n, D) hidden states or (n, V) logits -> 0-d."""
    if head == "none":
        return (1 - F.cosine_similarity(ours, exact, dim=-1)).mean()
    return F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")


def _sizes(x: Tensor) -> dict[str, Tensor]:
    """Of (n, D) activations: kurtosis without centring, the largest entry, and that over the root mean square."""
    squares = x.square()
    energy, largest = squares.mean(), x.abs().amax()
    return {"kurtosis": squares.square().mean() / energy.square(), "max": largest, "ratio": largest / energy.sqrt()}


def _penalty(sizes: dict[str, dict[str, Tensor]], kind: str) -> Tensor | float:
    measure = {"kurtosis": "kurtosis", "max": "ratio"}.get(kind)
    return torch.stack([one[measure] for one in sizes.values()]).log().mean() if measure else 0.0


# --- folded into the weights


@torch.no_grad()
def smooth(model: Transformer, batches: Iterable[Batch], alpha: float = 0.5) -> Transformer:
    """A copy of a model with its norms' outputs X smoothed, and the matrices W behind them in return.

    Channel j of X is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), in the norm's gain and bias, and column
    j of what reads it is multiplied by s_j: behind `norm1` queries, keys and values together (and a gate, which is
    not rounded and has no say in s), behind `norm2` the MLP's first matrix. With alpha 1 the largest entry of every
    channel is 1 then, with alpha 0 that of every column.

    Args:
        model: pre-norm; SRMSNorms become RMSNorms, for a gain to fold into. It is left as it is.
        batches: that the largest entries of X are taken from, over all tokens but padding.
        alpha: 0 to 1, how much of the outliers goes into the weights.

    Returns:
        The smoothed model in evaluation mode, frozen, of the dtype and on the device of the original.

    Raises:
        UserError: no batches; post-norm; no norm before a matrix.

    Source: Xiao et al. 2023, *SmoothQuant*, Eq 4, with the released code's floor of 1e-5 under both maxima. As there,
    the inputs of the attention's and the MLP's last matrices are left alone, and so is the residual stream.
    """
    alpha, config = params.coerce("alpha", alpha, Annotated[float, "at least 0", "at most 1"]), model.config
    post = "in post-norm models the norms' outputs are the residual stream too, which no scale can be taken out of"
    params.require(config.norm_position == "pre", f"smooth: {post}")
    there = [site for site in resolve(model, ("norm1", "norm2")) if not isinstance(model.sites()[site], nn.Identity)]
    params.require(len(there) > 0, "smooth: this model has no norm before a matrix")
    config = replace(config, norm="rmsnorm") if config.norm == "srmsnorm" else config
    ones = {f"{site}.weight": torch.ones(config.width) for site in (*there, "norm_final")}
    smoothed = _built(config, ones | model.state_dict(), model)
    for site, seen in measure(model, batches, there, meters=("max_abs",)).sites.items():
        _, index, name = site.split(".")
        block = smoothed.blocks[int(index)]
        readers = _readers(block)[name]
        columns = torch.cat([one.weight for one in readers if isinstance(one, nn.Linear)]).abs().amax(0)  # (D,)
        largest = seen.maxima["largest"].to(columns)  # (D,)
        scale = largest.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)
        for parameter in getattr(block, name).parameters():
            parameter /= scale
        for reader in readers:
            _scale_columns(reader, scale)
    return smoothed


def _readers(block: Block) -> dict[str, list[nn.Module]]:
    """What reads the stream of a pre-norm block, matrices and a gate, by the norm between; `resid_pre`: none."""
    own = block.attention
    found = {"norm1": [], "norm2": [block.mlp_fc], "resid_pre": []}
    found["resid_pre" if block.qk_apart else "norm1"] += [own.q, own.k, *([] if own.gate is None else [own.gate])]
    found["resid_pre" if block.v_apart else "norm1"].append(own.v)
    return found


def _scale_columns(reader: nn.Module, scale: Tensor) -> None:
    """What a matrix or gate reads from channel j, times scale_j. A head's own gate reads a slice of the channels."""
    kind = getattr(reader, "kind", "all_heads")
    if kind == "mlp":
        reader.weight_in *= scale.view(len(reader.weight_in), 1, -1)  # (H, hidden, K)
    else:
        reader.weight *= scale.view_as(reader.weight) if kind == "linear" else scale  # (H, K), (out, D)


def _built(config: TransformerConfig, state: dict[str, Tensor], like: Transformer) -> Transformer:
    """A model with copies of what it needs out of a state, of the dtype and on the device of another; frozen."""
    with torch.device("meta"):
        model = Transformer(config)
    first = next(like.parameters())
    model.load_state_dict({name: state[name].to(first, copy=True) for name in model.state_dict()}, assign=True)
    return model.requires_grad_(False).eval()


def hadamard(width: int, seed: int = 0) -> Tensor:
    """A randomized Hadamard matrix: (D, D) float64, orthogonal, with entries +-1 / sqrt(D) where D is a power of two.

    The signs of its rows are random. A D of 2^k m with m odd gives the Kronecker product with a random orthogonal
    m x m matrix: no entry is larger than 2^(-k / 2).

    Source: Ashkboos et al. 2024, *QuaRot*. Departure: other D take a known Hadamard matrix there (of size 12, 20, 28,
        ...), in place of the random one.
    """
    generator, odd = torch.Generator().manual_seed(seed), width // (width & -width)
    matrix, upper = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    matrix = matrix * upper.diagonal().sign()  # uniform over all of them
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return (2.0 * torch.randint(0, 2, (width, 1), generator=generator) - 1) * matrix


def rotate(model: Transformer, seed: int = 0) -> Transformer:
    """A copy of a model whose residual stream is x Q where the original's is x, with a randomized Hadamard matrix Q.

    What writes to the stream (embeddings, `attn_out`, `mlp_out`) is turned, what reads it (queries, keys, values,
    gates, the MLP's first matrix, the head) turns it back. Gains and biases of the norms in between go into what
    reads them, and a LayerNorm becomes an SRMSNorm (eps inside the root) of a stream that its writers keep centred.
    LayerScale's vectors go into the matrices before them. Within heads and the MLP all is as it was.

    The head gets a matrix of its own where the final norm had a gain, and a bias where that had one (`head` biased);
    linear gates, each of which reads a slice of the stream, become one of `all_heads`.

    Args:
        model: pre-norm or without norms, with a head. It is left as it is.
        seed: of Q, see `hadamard`.

    Returns:
        The rotated model in evaluation mode, frozen, of the dtype and on the device of the original. What is folded
        is computed in float64.

    Raises:
        UserError: a form that cannot be rotated exactly, with the reason.

    Source: Ashkboos et al. 2024, *QuaRot*, section 4; R1 of Liu et al. 2025, *SpinQuant*, where it is trained.
    Departure: nothing is turned within heads or the MLP, where some of their rotations are computed at run time.
    """
    _require_rotatable(model.config)
    return _turned(model, hadamard(model.config.width, seed))


@torch.no_grad()
def _turned(model: Transformer, rotation: Tensor) -> Transformer:
    """`rotate` by an orthogonal matrix, (D, D) float64."""
    config, own = model.config, deepcopy(model).double()
    rotation = rotation.to(own.token_embedding.weight.device)
    writing = rotation - rotation.mean(0) if config.norm == "layernorm" else rotation  # centres, then turns
    head = _turned_head(own, rotation)
    for table in (own.position_embedding, own.segment_embedding, own.project_in or own.token_embedding):
        if table is not None:
            table.weight.data = writing.T @ table.weight if table is own.project_in else table.weight @ writing
    for block in own.blocks:
        for matrix, gain in ((block.attention.attn_out, block.attn_gain), (block.mlp_out, block.mlp_gain)):
            if gain is not None and config.gain_kind == "layerscale":
                matrix.weight *= gain[:, None]
                matrix.bias *= gain
                gain.fill_(1.0)
            matrix.weight.data, matrix.bias.data = writing.T @ matrix.weight, matrix.bias @ writing
        if config.attention.gate == "linear":
            block.attention.gate.weight.data = torch.block_diag(*block.attention.gate.weight)  # (H, K) -> (H, D)
        for name, readers in _readers(block).items():
            for reader in readers:
                reader.weight.data, shift = _behind(getattr(block, name), reader.weight, rotation)
                reader.bias += block.alpha * shift if name == "norm2" else shift
    return _built(_turned_config(config), own.state_dict() | head, model)


def _behind(norm: nn.Module, matrix: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, D) for what the norm gives without gain and bias, turned; and what it misses then, (out,)."""
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    shift = matrix.new_zeros(len(matrix)) if bias is None else matrix @ bias
    return (matrix if gain is None else matrix * gain) @ rotation, shift


def _turned_head(own: Transformer, rotation: Tensor) -> dict[str, Tensor]:
    """The state of what reads the stream at the end: a head's own matrix and bias, and `project_out`."""
    table = own.token_embedding.weight if own.head.weight is None else own.head.weight  # (V, embed_width)
    if own.project_out is None:
        table, bias = _behind(own.norm_final, table, rotation)
        found = {}
    else:
        matrix, shift = _behind(own.norm_final, own.project_out.weight, rotation)
        found, bias = {"project_out.weight": matrix}, table @ shift
    return found | {"head.weight": table, "head.bias": bias if own.head.bias is None else own.head.bias + bias}


def _turned_config(config: TransformerConfig) -> TransformerConfig:
    gate = "all_heads" if config.attention.gate == "linear" else config.attention.gate
    config = replace(config, attention=replace(config.attention, gate=gate))
    if config.norm == "layernorm":
        return replace(config, norm="srmsnorm", rms_eps="inside", head="biased")
    if config.norm == "rmsnorm":
        untied = config.head == "tied" and config.final_norm and config.embed_width == config.width
        return replace(config, norm="srmsnorm", head="untied" if untied else config.head)
    return config


def _require_rotatable(config: TransformerConfig) -> None:
    centred, whole = config.norm == "layernorm", config.final_norm and config.pre_norms == PRE_NORMS
    outside = config.attention.qk_norm == "rmsnorm" and config.rms_eps == "outside"
    for fits, why in (
        (config.norm_position == "pre", "in post-norm models the norms' gains stand in the residual stream"),
        (not config.embedding.norm, "the gain of the norm on the embeddings stands in the residual stream"),
        (config.head not in ("mlm", "none"), f"head {config.head} has no matrix of its own to turn the stream back"),
        (config.attention.gate != "mlp", "a gate of kind mlp reads slices of the stream, which a rotation mixes"),
        (whole or not centred, "what reads the stream without a LayerNorm would miss the mean that centring takes"),
        (not (centred and outside), "LayerNorms become norms with rms_eps inside, but those of qk_norm are outside"),
    ):
        params.require(fits, f"rotate: {why}")
