"""What attention heads are made of: softmax and what may stand in its place, gates, rotary positions."""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import params


@params.settings
class AttentionConfig:
    """What is done to attention; by default nothing.

    Clipped softmax: set `gamma`, or `alpha` for gamma = -alpha / context. OP block: `qk_norm`, or `tanh_cap` in its
    place, against the collapse of attention's entropy. Value-SkipInit: `value_skip` 1 and `value_gain` below 1.

    A causal query t sees t keys, so that one gamma for all is too weak for the first and too strong for the last:
    `row_aware` takes -alpha / t, a control for the clipped softmax's failure on OPT that none of the papers has.

    `linear_init` is what bondarenko2023's code does, not its paper: it puts its attention into a model after that was
    initialised, and of OPT replaces the output matrix too.
    """

    gamma: Annotated[float, "at most 0"] = 0.0  # clipped softmax; 0 with zeta 1 is the plain one
    alpha: params.NotNegative = 0.0  # clipped softmax, by gamma = -alpha / context
    zeta: Annotated[float, "at least 1"] = 1.0  # clipped softmax
    row_aware: bool = False  # alpha, or the sigmoid's bias, by the keys that a query sees, not by the context
    off_by_one: bool = False  # softmax with a one more in its denominator
    sink_logit: bool = False  # softmax over one more key, with a trained score per head and nothing to say
    sigmoid: bool = False  # sigmoid(score - log context) in place of the softmax
    gate: Literal["none", "linear", "mlp", "all_heads"] = "none"
    gate_hidden: params.Count = 4  # width of the hidden layer of the mlp gate
    pi_init: Annotated[float, "above 0", "below 1"] = 0.5  # the gate's value at a zero input
    linear_init: bool = False  # q, k, v and a causal model's attn_out start as nn.Linear does, biases too
    qk_norm: Literal["none", "layernorm", "rmsnorm"] = "none"
    tanh_cap: params.NotNegative = 0.0  # scores are capped at it (max_attn_val, 30 in Grok-1); 0: they are not
    value_skip: float = 0.0  # a in a v + b A v: how much of its own value each position keeps
    value_gain: float = 1.0  # b there, on what attention brings; neither is trained

    def __post_init__(self):
        params.require(not (self.alpha and self.gamma), "set gamma or alpha, not both")
        forms = (self.clips, self.off_by_one, self.sink_logit, self.sigmoid)
        params.require(
            sum(forms) <= 1, "the softmax is clipped, off_by_one, with a sink_logit or a sigmoid: choose one"
        )
        params.require(not self.row_aware or self.alpha or self.sigmoid, "row_aware is of alpha and of sigmoid")

    @property
    def clips(self) -> bool:
        """Whether the softmax is clipped."""
        return self.alpha > 0 or self.gamma < 0 or self.zeta > 1

    @property
    def plain(self) -> bool:
        """Whether the softmax is the usual one, of scores without a cap."""
        return not (self.clips or self.off_by_one or self.sink_logit or self.sigmoid or self.tanh_cap)


def probabilities(scores: Tensor, own: AttentionConfig, keys: float | Tensor, sink: Tensor | None = None) -> Tensor:
    """What each query takes of each key's value, in the form that is configured: the site `probs`.

    The sum of a row: 1 with the softmax; below 1 off by one and with a sink logit, where the rest is what the sink
    takes; at most 1 clipped (zeta 1), 0 where all is clipped; with `sigmoid` anything between 0 and the number t of
    keys, at scores of 0 t / (keys + 1).

    Args:
        scores: (B, H, T, T), scaled, capped, and -inf where a key is not seen.
        keys: the T in gamma = -alpha / T and in the sigmoid's bias -log T: the context, or (.., T, 1), how many keys
            each query sees.
        sink: (H,), the trained scores of `sink_logit`.

    Returns:
        (B, H, T, T) in [0, 1].

    Source: sigmoid: Ramapuram et al. 2024, *Theory, analysis, and best practices for sigmoid self-attention*, whose
        bias is -log of the row's length. Departure: here of the context, as with alpha, or with `row_aware` of the
        keys that are seen.
    """
    if own.sigmoid:
        return torch.sigmoid(scores - (keys.log() if torch.is_tensor(keys) else math.log(keys)))
    if own.off_by_one or own.sink_logit:
        return softmax_off_by_one(scores, sink)
    return clipped_softmax(scores, -own.alpha / keys if own.alpha else own.gamma, own.zeta)


def clipped_softmax(scores: Tensor, gamma: float | Tensor, zeta: float = 1.0) -> Tensor:
    """Softmax stretched to [gamma, zeta] and clipped to [0, 1]: exact zeros at finite scores.

    clip((zeta - gamma) softmax(scores) + gamma, 0, 1). A head can then do nothing without pushing its
    scores, and with them the activations below, to extremes. Rows no longer sum to one; clipped entries
    get no gradient; masked entries (-inf, or the dtype's minimum) of a row with others come out as exactly zero.

    Args:
        scores: (..., T, T), scaled and masked.
        gamma: at most 0; -0.025 for BERT, -12/512 for OPT in the paper. 0 with zeta 1 is the softmax. Or (.., T, 1),
            one for each query.
        zeta: at least 1.

    Returns:
        (..., T, T) in [0, 1], in the dtype of `scores` (computed in float32 for half precision).

    Source: bondarenko2023, Eq 4.
    """
    probs = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if not torch.is_tensor(gamma) and gamma == 0 and zeta == 1:
        return probs.to(scores.dtype)
    return ((zeta - gamma) * probs + gamma).clamp(0, 1).to(scores.dtype)


def softmax_off_by_one(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """exp(s_i) / (1 + sum of exp(s_j)): as if one more key had score 0 and nothing to say, so that a head can idle.

    Args:
        scores: (..., T, T), scaled and masked.
        sink: (H,), that key's score by head for scores (..., H, T, T); by default 0.

    Source: Miller 2023, *Attention is off by one*; with a trained score OpenAI's gpt-oss, 2025. None of the three
        papers has either.
    """
    last = scores.new_zeros(1) if sink is None else sink[:, None, None]
    return F.softmax(torch.cat([scores, last.expand(*scores.shape[:-1], 1)], -1), dim=-1)[..., :-1]


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap tanh(scores / cap): scores within (-cap, cap), close to themselves where they are small against it.

    The entropy of attention can then not collapse. The block is not 1-homogeneous, as it is with a norm on q and k.

    Args:
        scores: (..., T, T), scaled and before the mask.

    Source: he2024, Appendix E.2 (after Grok-1, whose cap is 30). Departure: the authors' code rounds scores to
        float32 first, in whatever precision the model is; here they keep theirs.
    """
    return cap * torch.tanh(scores / cap)


class Gate(nn.Module):
    """A sigmoid gate per head and token, from the input of the attention layer.

    pi = sigmoid(G(x)), multiplied onto the head's output before the heads are joined. `linear`: each
    head has its own K -> 1 map of its own slice of x; `mlp`: K -> hidden -> 1 with a ReLU; `all_heads`:
    one D -> H map of the whole x.

    Args:
        kind: `linear`, `mlp` or `all_heads`.
        heads, head_width: H and K.
        hidden: width of the hidden layer of `mlp`.
        pi_init: sigmoid of the last bias at the start, in (0, 1): the gate's value at a zero input, but for
            what the random hidden biases of `mlp` add.

    Source: bondarenko2023, Eq 5-7 and Table 4. Departure: the last bias starts at logit(pi_init) in
    every variant, as the paper says; the authors' code does so for `linear` only.
    """

    def __init__(self, kind: str, heads: int, head_width: int, hidden: int, pi_init: float):
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            self.weight_in = nn.Parameter(_linear_init(head_width, heads, hidden, head_width))
            self.bias_in = nn.Parameter(_linear_init(head_width, heads, hidden))
        width = {"linear": head_width, "mlp": hidden, "all_heads": heads * head_width}[kind]
        self.weight = nn.Parameter(_linear_init(width, heads, width))
        self.bias = nn.Parameter(torch.full((heads,), math.log(pi_init / (1 - pi_init))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> pi (B, T, H) in (0, 1)."""
        if self.kind == "all_heads":
            return torch.sigmoid(F.linear(x, self.weight, self.bias))
        x = x.unflatten(-1, (self.bias.numel(), -1))  # (B, T, H, K)
        if self.kind == "mlp":
            x = F.relu(torch.einsum("bthk,hik->bthi", x, self.weight_in) + self.bias_in)  # (B, T, H, hidden)
        return torch.sigmoid((x * self.weight).sum(-1) + self.bias)


def _linear_init(fan_in: int, *shape: int) -> Tensor:
    """Uniform within 1/sqrt(fan_in): what nn.Linear does, and the authors' gates with it."""
    return torch.empty(*shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)


def rotated(x: Tensor, width: int, base: float) -> Tensor:
    """Rotary positions: entries i and i + width / 2 of a head turn together by t base^(-2i / width).

    Args:
        x: (B, H, T, K), queries or keys; position t is the index along T.
        width: how many of the K entries turn; an even number. The others pass.

    Source: Su et al. 2021, with halves in place of neighbours, as GPT-NeoX has it.
    """
    exact = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    half = torch.arange(0, width, 2, **exact) / width  # (width / 2,)
    angle = torch.arange(x.shape[-2], **exact)[:, None] / base**half  # (T, width / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
