"""What attention heads are made of: softmax and its clipped form, the cap on its scores, gates, rotary positions."""

import math
from functools import partial
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
    """

    gamma: Annotated[float, "at most 0"] = 0.0  # clipped softmax; 0 with zeta 1 is the plain one
    alpha: params.NotNegative = 0.0  # clipped softmax, by gamma = -alpha / context
    zeta: Annotated[float, "at least 1"] = 1.0  # clipped softmax
    off_by_one: bool = False  # softmax with a one more in its denominator
    gate: Literal["none", "linear", "mlp", "all_heads"] = "none"
    gate_hidden: params.Count = 4  # width of the hidden layer of the mlp gate
    pi_init: Annotated[float, "above 0", "below 1"] = 0.5  # the gate's value at a zero input
    qk_norm: Literal["none", "layernorm", "rmsnorm"] = "none"
    tanh_cap: params.NotNegative = 0.0  # scores are capped at it (max_attn_val, 30 in Grok-1); 0: they are not
    value_skip: float = 0.0  # a in a v + b A v: how much of its own value each position keeps
    value_gain: float = 1.0  # b there, on what attention brings; neither is trained

    def __post_init__(self):
        params.require(not (self.alpha and self.gamma), "set gamma or alpha, not both")
        params.require(not (self.clips and self.off_by_one), "the softmax is clipped or off by one, not both")

    @property
    def clips(self) -> bool:
        """Whether the softmax is clipped."""
        return self.alpha > 0 or self.gamma < 0 or self.zeta > 1

    @property
    def plain(self) -> bool:
        """Whether the softmax is the usual one, of scores without a cap."""
        return not (self.clips or self.off_by_one or self.tanh_cap)


def clipped_softmax(scores: Tensor, gamma: float, zeta: float = 1.0) -> Tensor:
    """Softmax stretched to [gamma, zeta] and clipped to [0, 1]: exact zeros at finite scores.

    clip((zeta - gamma) softmax(scores) + gamma, 0, 1). A head can then do nothing without pushing its
    scores, and with them the activations below, to extremes. Rows no longer sum to one; clipped entries
    get no gradient; masked entries (-inf, or the dtype's minimum) of a row with others come out as exactly zero.

    Args:
        scores: (..., T, T), scaled and masked.
        gamma: at most 0; -0.025 for BERT, -12/512 for OPT in the paper. 0 with zeta 1 is the softmax.
        zeta: at least 1.

    Returns:
        (..., T, T) in [0, 1], in the dtype of `scores` (computed in float32 for half precision).

    Source: bondarenko2023, Eq 4.
    """
    probs = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if gamma == 0 and zeta == 1:
        return probs.to(scores.dtype)
    return ((zeta - gamma) * probs + gamma).clamp(0, 1).to(scores.dtype)


def softmax_off_by_one(scores: Tensor) -> Tensor:
    """exp(s_i) / (1 + sum of exp(s_j)): as if one more key had score 0 and nothing to say, so that a head can idle.

    Args:
        scores: (..., T, T), scaled and masked.

    Source: Miller 2023, *Attention is off by one*; none of the three papers has it.
    """
    return F.softmax(F.pad(scores, (0, 1)), dim=-1)[..., :-1]


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


def register_clipped_softmax(name: str, gamma: float, zeta: float = 1.0) -> None:
    """Make clipped softmax an attention implementation of transformers: `attn_implementation=name`.

    Works for Hugging Face models with the attention interface, without surgery on the model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, partial(_interface_forward, gamma=gamma, zeta=zeta))
    AttentionMaskInterface.register(name, eager_mask)


def _interface_forward(module, query, key, value, attention_mask, scaling, gamma, zeta, dropout=0.0, **_):
    groups = query.shape[1] // key.shape[1]  # query heads that share a key head
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, T)
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = F.dropout(clipped_softmax(scores, gamma, zeta), dropout, module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs  # (B, T, H, K)
