"""One transformer with named sites, by configuration: the OPT recipe, its remedies, and the OP block."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import UserError, params
from ofutils.attention import GATES, QK_NORMS, Gate, QKNorm, clipped_softmax


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer: OPT by default (pre-LN, ReLU, learned positions, tied head).

    Clipped softmax: set `gamma` (at most 0), or `alpha` for gamma = -alpha / context. OP block: `norm`
    none, `qk_norm` layernorm or rmsnorm, `residual_gain` below 1, `final_norm` off.
    """

    vocab: int = 2048
    layers: int = 6
    width: int = 128
    heads: int = 4
    mlp_width: int = 0  # 0: 4 x width
    context: int = 128  # the longest row
    embed_width: int = 0  # 0: width; OPT-350m embeds in fewer dimensions and projects in and out
    norm: str = "layernorm"  # layernorm | none
    norm_position: str = "pre"  # pre | post (OPT-350m)
    final_norm: bool = True  # after the last block; never with norm_position post
    gamma: float = 0.0  # clipped softmax
    alpha: float = 0.0  # clipped softmax, by gamma = -alpha / context
    zeta: float = 1.0  # clipped softmax
    gate: str = "none"  # none | linear | mlp | all_heads
    gate_hidden: int = 4  # width of the hidden layer of the mlp gate
    pi_init: float = 0.5  # the gate's value at a zero input
    qk_norm: str = "none"  # none | layernorm | rmsnorm
    residual_gain: float = 1.0  # scalar on both branches, trained; 1 is a plain sum without a parameter
    embed_scale: float = 1.0  # fixed factor on the token embedding
    dropout: float = 0.0  # on both branches, as in OPT; embeddings and attention probabilities have none
    init_std: float = 0.02  # of every matrix and embedding

    def __post_init__(self):
        _one_of("norm", self.norm, ("layernorm", "none"))
        _one_of("norm_position", self.norm_position, ("pre", "post"))
        _one_of("gate", self.gate, GATES)
        _one_of("qk_norm", self.qk_norm, QK_NORMS)
        for name in ("mlp_width", "embed_width"):
            params.require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        params.require(self.init_std > 0, f"init_std must be positive, got {self.init_std}")
        for name in ("vocab", "layers", "width", "heads", "context", "gate_hidden"):
            params.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        params.require(self.width % self.heads == 0, f"width {self.width} does not split into {self.heads} heads")
        params.require(self.gamma <= 0, f"gamma must be at most 0, got {self.gamma}")
        params.require(self.alpha >= 0, f"alpha must be at least 0, got {self.alpha}")
        params.require(not (self.alpha and self.gamma), "set gamma or alpha, not both")
        params.require(self.zeta >= 1, f"zeta must be at least 1, got {self.zeta}")
        params.require(0 < self.pi_init < 1, f"pi_init must lie between 0 and 1, got {self.pi_init}")
        params.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def clip_gamma(self) -> float:
        """gamma of the clipped softmax, however it was set. 0 with zeta 1: the plain softmax."""
        return -self.alpha / self.context if self.alpha else self.gamma

    @property
    def clipped(self) -> bool:
        """Whether attention clips its softmax."""
        return self.clip_gamma < 0 or self.zeta > 1


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    near = params.suggest(value, known)
    params.require(value in known, f"unknown {name} {value!r}{near}; known: {', '.join(known)}")


class Attention(nn.Module):
    """Causal self-attention with every tensor of its computation as a site."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        head_width = config.width // config.heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.attn_out = nn.Linear(config.width, config.width)
        normed = config.qk_norm != "none"
        self.q_norm = QKNorm(config.qk_norm, head_width) if normed else nn.Identity()
        self.k_norm = QKNorm(config.qk_norm, head_width) if normed else nn.Identity()
        self.gate = None
        if config.gate != "none":
            self.gate = Gate(config.gate, config.heads, head_width, config.gate_hidden, config.pi_init)
        self.scores, self.probs, self.context, self.gated = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (  # each (B, H, T, K)
            part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x))
        )
        context = self._mix(self.q_norm(q), self.k_norm(k), v)
        context = self.context(context.transpose(1, 2).flatten(2))  # (B, T, D)
        if self.gate is not None:
            context = (context.unflatten(-1, (self.config.heads, -1)) * self.gate(x)[..., None]).flatten(2)
        return self.attn_out(self.gated(context))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        watched = self.scores._forward_hooks or self.probs._forward_hooks
        if not watched and not self.config.clipped:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with torch.autocast(q.device.type, enabled=False):  # scores in float32, as in the fused path
            exact = torch.promote_types(q.dtype, torch.float32)
            scores = q.to(exact) * q.shape[-1] ** -0.5 @ k.to(exact).transpose(-1, -2)  # (B, H, T, T)
        scores = self.scores(scores)
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        return self.probs(clipped_softmax(scores, self.config.clip_gamma, self.config.zeta)).to(v.dtype) @ v


class Block(nn.Module):
    """One transformer block, with its norms before (pre), after (post) or nowhere (OP)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.post = config.norm_position == "post"
        hidden = config.mlp_width or 4 * config.width
        self.attention = Attention(config)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.mlp_fc = nn.Linear(config.width, hidden)
        self.mlp_out = nn.Linear(hidden, config.width)
        self.attn_gain = self.mlp_gain = None
        if config.residual_gain != 1:
            self.attn_gain = nn.Parameter(torch.tensor(config.residual_gain))
            self.mlp_gain = nn.Parameter(torch.tensor(config.residual_gain))
        self.dropout = nn.Dropout(config.dropout)
        self.resid_pre, self.resid_mid, self.mlp_in, self.mlp_act, self.resid_post = (nn.Identity() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D): the next block's `resid_pre`."""
        x = self.resid_pre(x)
        branch = self.attention(x if self.post else self.norm1(x))
        x = self.resid_mid(x + self._scaled(branch, self.attn_gain))
        x = self.norm1(x) if self.post else x
        hidden = self.mlp_in(x if self.post else self.norm2(x))
        branch = self.mlp_out(self.mlp_act(F.relu(self.mlp_fc(hidden))))
        x = self.resid_post(x + self._scaled(branch, self.mlp_gain))
        return self.norm2(x) if self.post else x

    def _scaled(self, branch: Tensor, gain: Tensor | None) -> Tensor:
        branch = self.dropout(branch)
        return branch if gain is None else gain * branch

    def sites(self) -> dict[str, nn.Module]:
        """Site name -> module, in the order of computation (pre-norm)."""
        inner = ("q", "k", "v", "q_norm", "k_norm", "scores", "probs", "context", "gated", "attn_out")
        outer = ("resid_mid", "norm2", "mlp_in", "mlp_act", "mlp_out", "resid_post")
        sites = {"resid_pre": self.resid_pre, "norm1": self.norm1}
        sites |= {name: getattr(self.attention, name) for name in inner}
        return sites | {name: getattr(self, name) for name in outer}


class Transformer(nn.Module):
    """Token ids (B, T) -> logits (B, T, V), with a module at every tensor that a paper names.

    Sites: `embed_tokens` (scaled), `embed_sum` (with positions); per block `resid_pre`, `norm1`, `q`,
    `k`, `v` (before scaling and norm), `q_norm`, `k_norm`, `scores` (scaled, before the mask), `probs`,
    `context` (before the gate), `gated`, `attn_out` (before the gain), `resid_mid`, `norm2`, `mlp_in`,
    `mlp_act` (after the ReLU), `mlp_out`, `resid_post` (the sums; in post-LN they stand before the
    norms); then `norm_final`, `logits`; `project_in` and `project_out` where the embedding is narrower.
    There is no `embed_norm`.
    While neither `scores` nor `probs` is watched, plain attention takes the fused path.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        embed_width = config.embed_width or config.width
        narrow = embed_width != config.width
        self.token_embedding = nn.Embedding(config.vocab, embed_width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.project_in = nn.Linear(embed_width, config.width, bias=False) if narrow else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        last = config.final_norm and config.norm_position == "pre"
        self.norm_final = _norm(config) if last else nn.Identity()
        self.project_out = nn.Linear(config.width, embed_width, bias=False) if narrow else nn.Identity()
        self.embed_tokens, self.embed_positions, self.embed_sum, self.logits = (nn.Identity() for _ in range(4))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices and embeddings N(0, init_std), biases 0, norms 1; gates keep their own start."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V). Raises UserError where T exceeds the context."""
        length = ids.shape[1]
        if length > self.config.context:
            raise UserError(f"a row of {length} tokens does not fit the context of {self.config.context}")
        tokens = self.embed_tokens(self.token_embedding(ids) * self.config.embed_scale)
        positions = self.embed_positions(self.position_embedding.weight[:length])
        x = self.embed_sum(self.project_in(tokens) + positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        x = self.project_out(self.norm_final(x))
        return self.logits(F.linear(x, self.token_embedding.weight))

    def sites(self) -> dict[str, nn.Module]:
        """Site name -> the module whose output it is, in the order of computation."""
        narrow = isinstance(self.project_in, nn.Linear)
        start = ["embed_tokens", *(["project_in"] if narrow else []), "embed_positions", "embed_sum"]
        end = ["norm_final", *(["project_out"] if narrow else []), "logits"]
        blocks = {f"blocks.{i}.{n}": m for i, block in enumerate(self.blocks) for n, m in block.sites().items()}
        return {n: getattr(self, n) for n in start} | blocks | {n: getattr(self, n) for n in end}


def _norm(config: TransformerConfig) -> nn.Module:
    return nn.LayerNorm(config.width) if config.norm == "layernorm" else nn.Identity()


def clm_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each token given those before it: position t predicts t + 1.

    Args:
        logits: (B, T, V).
        ids: (B, T).
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def perplexity(loss: float) -> float:
    """exp(loss); inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
