"""One transformer with named sites, by configuration: the OPT recipe, its remedies, the OP block and what lies
between it and pre-norm, and the forms of BERT, RoBERTa, GPT-2, GPT-NeoX and ViT."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import UserError, params
from ofutils.attention import AttentionConfig, Gate, capped, probabilities, rotated
from ofutils.images import ImageConfig, patches
from ofutils.layers import make_activation, make_gain, make_norm

PRE_NORMS = ("qk", "v", "mlp")  # what a pre-norm may stand before
QK_EPS = 1e-5  # of the norms of queries and keys


@params.settings
class EmbeddingConfig:
    """How tokens and their positions enter: OPT by default."""

    width: params.Natural = 0  # 0: the model's; OPT-350m embeds in fewer dimensions and projects in and out
    scale: float = 1.0  # fixed factor on the token embedding
    segments: params.Natural = 0  # token types
    norm: bool = False  # a LayerNorm on the sum of the embeddings
    positions: Literal["learned", "rotary"] = "learned"
    skip_padding: bool = True  # learned positions count tokens only (OPT, RoBERTa), not padding (BERT, GPT-2)
    rotary_share: params.Share = 1.0  # of each head's width, from its start
    rotary_base: params.Positive = 10000.0


@params.settings
class TransformerConfig:
    """A transformer: OPT by default (causal, pre-LN, ReLU, learned positions, tied head).

    OP block: `norm` none, `attention` with a `qk_norm`, `residual_gain` below 1, `final_norm` off. BERT: `causal`
    off, `norm_position` post, `activation` gelu, `head` mlm, `embedding` with a `norm`, two `segments` and no
    `skip_padding`. GPT-2: `activation` gelu_tanh, `embedding` with no `skip_padding`. GPT-NeoX: `parallel` on, `head`
    untied, `embedding` with rotary `positions`. ViT: `causal` off, `activation` gelu, `head` biased, `image` with a
    `size`; `vocab` are its classes and `context` is `image.tokens`.

    What he2024 compares: `norm` and `norm_position` (Figure 2); the norms one at a time on the way to the OP block,
    `pre_norms` and `attention.qk_norm` (Table 4), with none of `pre_norms` an OP block whose `final_norm` stays
    (Figure 10); another entropy regulation or none (`attention.tanh_cap`, Figure 42); downweighted residuals, which
    SkipInit and LayerScale train (`residual_gain`, `gain_kind`; Figures 5, 19 and 40) on both branches or on one
    (`gain_on`, Figures 22 and 24); `leaky_relu_slope` (Figure 22); Value-SkipInit (`attention.value_gain`,
    Figure 24); GELU with alpha (`mlp_alpha`, Eq 12).
    """

    vocab: params.Count = 2048
    layers: params.Count = 6
    width: params.Count = 128
    heads: params.Count = 4
    mlp_width: params.Natural = 0  # 0: 4 x width
    context: params.Count = 128  # the longest row
    causal: bool = True  # False: every position sees the whole row
    norm: Literal["layernorm", "rmsnorm", "srmsnorm", "none"] = "layernorm"  # of the blocks, and the final one
    norm_position: Literal["pre", "post"] = "pre"  # post: BERT, OPT-350m
    pre_norms: tuple[Literal[PRE_NORMS], ...] = PRE_NORMS  # which there are, by what they stand before
    norm_eps: params.Positive = 1e-5  # of every norm but those of qk_norm, which have QK_EPS
    rms_eps: Literal["outside", "inside"] = "outside"  # the root of every RMSNorm, see `layers.RMSNorm`
    final_norm: bool = True  # after the last block; never with norm_position post
    activation: Literal["relu", "gelu", "gelu_tanh"] = "relu"  # gelu is the exact one, gelu_tanh its approximation
    leaky_relu_slope: Annotated[float, "at least 0", "at most 1"] = 0.0  # s in max(x, s x); 0: ReLU
    mlp_alpha: params.NotNegative = 1.0  # factor on the MLP's input; 0: by depth, see `mlp_input_scale`
    parallel: bool = False  # attention and MLP both read the block's input, each through its own norm
    residual_gain: float = 1.0  # scalar on both branches, trained; 1 is a plain sum without a parameter
    gain_kind: Literal["skipinit", "layerscale", "fixed"] = "skipinit"  # trained scalar, trained vector, constant
    gain_on: Literal["both", "attention", "mlp"] = "both"  # the branches that have the residual_gain
    dropout: params.Fraction = 0.0  # on both branches, as in OPT; embeddings and attention probabilities have none
    init_std: params.Positive = 0.02  # of every matrix and embedding
    # biased: untied with a bias; mlm: dense, activation, norm, tied with a bias
    head: Literal["tied", "untied", "biased", "mlm", "none"] = "tied"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self):
        self._check_image()
        params.require(self.width % self.heads == 0, f"width {self.width} does not split into {self.heads} heads")
        params.require(not (self.parallel and self.norm_position == "post"), "parallel needs norm_position pre")
        turned = self.rotary_width
        pairs = self.embedding.positions == "learned" or (turned >= 2 and turned % 2 == 0)
        params.require(pairs, f"rotary positions turn pairs: rotary_share gives {turned} entries of a head")
        object.__setattr__(self, "pre_norms", tuple(one for one in PRE_NORMS if one in self.pre_norms))
        pre = self.norm != "none" and self.norm_position == "pre"
        params.require(pre or self.pre_norms == PRE_NORMS, "pre_norms chooses among norms with norm_position pre")
        leaks = self.activation == "relu" or not self.leaky_relu_slope
        params.require(leaks, f"leaky_relu_slope is of activation relu, not of {self.activation}")
        normed = self.norm != "none" and "mlp" in self.pre_norms
        params.require(self.mlp_alpha or not normed, "mlp_alpha 0 is for an MLP whose input has no norm")

    def _check_image(self) -> None:
        image = self.image
        if image.size:
            whole = image.size % image.patch == 0
            params.require(whole, f"images of {image.size} pixels do not split into patches of {image.patch}")
            params.require(self.context == image.tokens, f"these images need context {image.tokens}: {self.context}")
            plain = not self.causal and self.head != "mlm" and self.head != "tied"
            plain = plain and self.embedding == EmbeddingConfig(scale=self.embedding.scale)
            needs = "images need causal off, head untied, biased or none, and of embedding only a scale"
            params.require(plain, needs)

    @property
    def rotary_width(self) -> int:
        """How many of the K entries of a head turn with the position; 0 without rotary positions."""
        rotary = self.embedding.positions == "rotary"
        return int(self.embedding.rotary_share * (self.width // self.heads)) if rotary else 0

    def mlp_input_scale(self, block: int) -> float:
        """Factor on the input of the MLP of a block (0, 1, ...), alpha_MLP in he2024's Eq 12.

        With `mlp_alpha` 0 it is one over the standard deviation that the stream is predicted to have there at the
        start, where the embedding has variance 1 and a branch adds its gain squared: the rule of Brock et al. 2021,
        which the paper follows without writing it down.
        """
        if self.mlp_alpha:
            return self.mlp_alpha
        before = 2 * block + (not self.parallel)
        gained = {"both": before, "attention": before - block, "mlp": block}[self.gain_on]
        return (1 + gained * self.residual_gain**2 + before - gained) ** -0.5

    @property
    def embed_width(self) -> int:
        """Dimensions of the token embedding."""
        return self.embedding.width or self.width


class Attention(nn.Module):
    """Self-attention with every tensor of its computation as a site."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        head_width, own = config.width // config.heads, config.attention
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.attn_out = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = (make_norm(own.qk_norm, head_width, QK_EPS, config.rms_eps) for _ in range(2))
        self.gate = None
        if own.gate != "none":
            self.gate = Gate(own.gate, config.heads, head_width, own.gate_hidden, own.pi_init)
        self.sink = nn.Parameter(torch.zeros(config.heads)) if own.sink_logit else None
        self.scores, self.probs, self.context, self.gated = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor, visible: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            x: (B, T, D), what queries, keys and the gate read.
            visible: (B, 1, T, T), which keys a query sees; by default as configured.
            read: (B, T, D), what values read; by default x.
        """
        parts = self.q(x), self.k(x), self.v(x if read is None else read)
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if turned := self.config.rotary_width:
            q, k = (rotated(part, turned, self.config.embedding.rotary_base) for part in (q, k))
        context, own = self._mix(q, k, v, visible), self.config.attention
        if own.value_skip or own.value_gain != 1:
            context = own.value_skip * v + own.value_gain * context
        context = self.context(context.transpose(1, 2).flatten(2))  # (B, T, D)
        if self.gate is not None:
            context = (context.unflatten(-1, (self.config.heads, -1)) * self.gate(x)[..., None]).flatten(2)
        return self.attn_out(self.gated(context))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        watched = self.scores._forward_hooks or self.probs._forward_hooks
        plain_causal = self.config.causal and visible is None
        own = self.config.attention
        if not watched and own.plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=plain_causal)
        with torch.autocast(q.device.type, enabled=False):  # scores in float32, as in the fused path
            exact = torch.promote_types(q.dtype, torch.float32)
            scores = q.to(exact) * q.shape[-1] ** -0.5 @ k.to(exact).transpose(-1, -2)  # (B, H, T, T)
        scores = self.scores(scores)
        scores = capped(scores, own.tanh_cap) if own.tanh_cap else scores
        if plain_causal:
            visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()  # (T, T)
        if visible is not None:
            scores = scores + torch.zeros_like(visible, dtype=exact).masked_fill_(~visible, float("-inf"))
        keys = self.config.context
        if own.row_aware:
            keys = scores.shape[-1] if visible is None else visible.sum(-1, keepdim=True).to(exact)
        return self.probs(probabilities(scores, own, keys, self.sink)).to(v.dtype) @ v


class Block(nn.Module):
    """One transformer block, with its norms before (pre), after (post) or nowhere (OP).

    Where only queries and keys, or only values, have a pre-norm, `norm1` is that norm and the others read the stream.
    In the parallel form both branches read the block's input and are added to it at once. The sum without
    the MLP is then never formed: there is no site `resid_mid`.
    """

    def __init__(self, config: TransformerConfig, index: int = 0):
        super().__init__()
        self.post, self.parallel = config.norm_position == "post", config.parallel
        self.activation = make_activation(config.activation, config.leaky_relu_slope)
        self.alpha, before = config.mlp_input_scale(index), set(config.pre_norms)
        self.qk_apart, self.v_apart = before & {"qk", "v"} == {"v"}, before & {"qk", "v"} == {"qk"}
        hidden = config.mlp_width or 4 * config.width
        self.attention = Attention(config)
        self.norm1 = _norm(config) if before & {"qk", "v"} else nn.Identity()
        self.norm2 = _norm(config) if "mlp" in before else nn.Identity()
        self.mlp_fc = nn.Linear(config.width, hidden)
        self.mlp_out = nn.Linear(hidden, config.width)
        gain = config.gain_kind, config.residual_gain, config.width
        self.attn_gain = make_gain(*gain) if config.gain_on != "mlp" else None
        self.mlp_gain = make_gain(*gain) if config.gain_on != "attention" else None
        self.dropout = nn.Dropout(config.dropout)
        self.resid_pre, self.resid_mid, self.mlp_in, self.mlp_act, self.resid_post = (nn.Identity() for _ in range(5))

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D): the next block's `resid_pre`."""
        start = x = self.resid_pre(x)
        normed = x if self.post else self.norm1(x)
        branch = self.attention(x if self.qk_apart else normed, visible, x if self.v_apart else normed)
        x = x + self._scaled(branch, self.attn_gain)
        x = x if self.parallel else self.resid_mid(x)
        x = self.norm1(x) if self.post else x
        hidden = x if self.post else self.norm2(start if self.parallel else x)
        hidden = self.mlp_in(hidden if self.alpha == 1 else self.alpha * hidden)
        branch = self.mlp_out(self.mlp_act(self.activation(self.mlp_fc(hidden))))
        x = self.resid_post(x + self._scaled(branch, self.mlp_gain))
        return self.norm2(x) if self.post else x

    def _scaled(self, branch: Tensor, gain: Tensor | float | None) -> Tensor:
        branch = self.dropout(branch)
        return branch if gain is None else gain * branch

    def sites(self) -> dict[str, nn.Module]:
        """Site name -> module, in the order of computation (pre-norm)."""
        inner = ("q", "k", "v", "q_norm", "k_norm", "scores", "probs", "context", "gate", "gated", "attn_out")
        middle = () if self.parallel else ("resid_mid",)
        outer = (*middle, "norm2", "mlp_in", "mlp_act", "mlp_out", "resid_post")
        sites = {"resid_pre": self.resid_pre, "norm1": self.norm1}
        sites |= {name: getattr(self.attention, name) for name in inner}
        return sites | {name: getattr(self, name) for name in outer}


class Head(nn.Module):
    """The last hidden state (B, T, D) -> logits (B, T, V), with the token embedding's matrix or its own.

    `mlm` is BERT's: dense, activation and norm come first, and each token has a bias, as it has with `biased`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, mlm = config.embed_width, config.head == "mlm"
        self.activation = make_activation(config.activation, config.leaky_relu_slope)
        self.dense = nn.Linear(width, width) if mlm else None
        self.norm = nn.LayerNorm(width, config.norm_eps) if mlm else None
        own, biased = config.head in ("untied", "biased"), config.head in ("biased", "mlm")
        self.weight = nn.Parameter(torch.empty(config.vocab, width)) if own else None
        self.bias = nn.Parameter(torch.zeros(config.vocab)) if biased else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, T, D) and (V, D) -> (B, T, V)."""
        if self.dense is not None:
            x = self.norm(self.activation(self.dense(x)))
        return F.linear(x, embedding if self.weight is None else self.weight, self.bias)


class Transformer(nn.Module):
    """Token ids (B, T) -> logits (B, T, V), or images (B, C, S, S) -> (B, V), with a module at every tensor that a
    paper names.

    Sites: `embed_tokens` (scaled; of images the patches (B, T, D), without the class token that later sites have),
    `patch_norm`, `project_in` (where the embedding is narrower), `embed_segments` (token
    types), `embed_typed` (tokens and token types), `embed_positions` ((T, D), or (B, T, D) where they depend
    on the padding), `embed_sum`, `embed_norm`; per block `resid_pre`, `norm1`, `q`, `k`, `v` (before scaling,
    norm and rotation), `q_norm`, `k_norm`, `scores` (scaled, before cap and mask), `probs` (after
    `attention.probabilities`), `context` (before the gate), `gate` (B, T, H), `gated`, `attn_out` (before the gain),
    `resid_mid`, `norm2`, `mlp_in` (after alpha), `mlp_act` (after the activation), `mlp_out`, `resid_post` (the sums;
    in post-LN they stand before the norms); then `norm_final`, `project_out`, `logits`.

    What a form does not compute is no site of it: `embed_segments`, `embed_typed`, `embed_norm`, `patch_norm` and
    `gate` unless configured, `embed_positions` with rotary positions, `resid_mid` with parallel branches, `logits`
    with `head` none, whose output is the last hidden state (B, T, D). A norm that is configured away passes its input
    on and keeps its site; so does `norm_final` in post-LN, where it is the last block's `norm2`.
    While neither `scores` nor `probs` is watched, plain attention takes the fused path.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        embed_width, segments = config.embed_width, config.embedding.segments
        narrow, learned = embed_width != config.width, config.embedding.positions == "learned"
        image, patch = config.image, config.image.channels * config.image.patch**2
        self.token_embedding = (
            nn.Linear(patch, embed_width) if image.size else nn.Embedding(config.vocab, embed_width)
        )
        self.patch_norm = nn.LayerNorm(config.width, config.norm_eps) if image.size and image.norm else None
        classed = image.size and image.pool == "class"
        self.class_token = nn.Parameter(torch.empty(config.width)) if classed else None
        self.position_embedding = nn.Embedding(config.context, config.width) if learned else None
        self.segment_embedding = nn.Embedding(segments, config.width) if segments else None
        self.project_in = nn.Linear(embed_width, config.width, bias=False) if narrow else None
        self.embed_norm = nn.LayerNorm(config.width, config.norm_eps) if config.embedding.norm else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm_final = _norm(config) if config.final_norm and config.norm_position == "pre" else nn.Identity()
        self.project_out = nn.Linear(config.width, embed_width, bias=False) if narrow else None
        self.head = Head(config) if config.head != "none" else None
        self.embed_tokens, self.embed_sum = nn.Identity(), nn.Identity()
        self.embed_segments, self.embed_typed = (nn.Identity() if segments else None for _ in range(2))
        self.embed_positions = nn.Identity() if learned else None
        self.logits = nn.Identity() if self.head is not None else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices and embeddings N(0, init_std), biases 0, norms 1; gates and what `linear_init` names stay."""
        own, keep = self.config.attention.linear_init, ("q", "k", "v") + self.config.causal * ("attn_out",)
        kept = {getattr(block.attention, name) for block in self.blocks for name in keep} if own else set()
        for module in (one for one in self.modules() if one not in kept):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if self.head is not None and self.head.weight is not None:
            self.head.weight.normal_(0, self.config.init_std)
        if self.class_token is not None:
            self.class_token.normal_(0, self.config.init_std)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """(B, T) int64, or images (B, C, S, S) -> (B, T, V), of images (B, V), or (B, T, D) without a head.

        Args:
            input_ids: (B, T); for a model of images, the images.
            attention_mask: (B, T), 1 where there is a token and 0 where there is padding. No token sees
                padding; a padding position sees itself too, so that its output, which means nothing, is finite.
            token_type_ids: (B, T), the segment of each token; 0 everywhere by default.
            pixel_values: the images, as Hugging Face calls them, in the place of `input_ids`.

        Raises:
            UserError: T exceeds the context, a mask of another shape, segments in a model without them, images of
                another shape.
        """
        input_ids = pixel_values if input_ids is None else input_ids
        if image := self.config.image.size and self.config.image:
            input_ids = patches(input_ids, image)  # (B, T, C P P)
        length, longest = input_ids.shape[1], self.config.context
        params.require(length <= longest, f"a row of {length} tokens does not fit the context of {longest}")
        fits = attention_mask is None or attention_mask.shape == input_ids.shape
        params.require(fits, f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}")
        x = self._embedded(input_ids, attention_mask, token_type_ids)  # (B, T, D)
        visible = None if attention_mask is None else self._visible(attention_mask.bool())
        for block in self.blocks:
            x = block(x, visible)
        x = self.norm_final(x)
        x = x if self.project_out is None else self.project_out(x)  # (B, T, embed_width)
        if self.head is None:
            return x
        if image:
            x = x.mean(1) if self.class_token is None else x[:, 0]  # (B, D)
        return self.logits(self.head(x, self.token_embedding.weight))

    def _embedded(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
        x = self.embed_tokens(self.token_embedding(ids) * self.config.embedding.scale)
        x = x if self.project_in is None else self.project_in(x)  # (B, T, D)
        x = x if self.patch_norm is None else self.patch_norm(x)
        x = x if self.class_token is None else torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        if self.segment_embedding is not None:
            segments = torch.zeros_like(ids) if segments is None else segments
            x = self.embed_typed(x + self.embed_segments(self.segment_embedding(segments)))
        elif segments is not None and segments.any():
            raise UserError("token types other than 0 for a model without segments: leave token_type_ids out")
        if self.position_embedding is not None:
            positions = self.position_embedding.weight[: x.shape[1]]  # (T, D)
            if mask is not None and self.config.embedding.skip_padding:
                positions = self.position_embedding((mask.long().cumsum(1) - 1).clamp(min=0))  # (B, T, D)
            x = x + self.embed_positions(positions)
        x = self.embed_sum(x)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _visible(self, mask: Tensor) -> Tensor:
        visible = mask[:, None, None, :]  # (B, 1, 1, T): keys
        if self.config.causal:
            visible = visible & mask.new_ones(mask.shape[1], mask.shape[1]).tril()
        return visible | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # (B, 1, T, T)

    def sites(self) -> dict[str, nn.Module]:
        """Site name -> the module whose output it is, in the order of computation."""
        first = ("embed_tokens", "patch_norm", "project_in", "embed_segments", "embed_typed", "embed_positions")
        blocks = {f"blocks.{i}.{n}": m for i, block in enumerate(self.blocks) for n, m in block.sites().items()}
        sites = {n: getattr(self, n) for n in (*first, "embed_sum", "embed_norm")} | blocks
        sites |= {n: getattr(self, n) for n in ("norm_final", "project_out", "logits")}
        return {name: module for name, module in sites.items() if module is not None}


def _norm(config: TransformerConfig) -> nn.Module:
    return make_norm(config.norm, config.width, config.norm_eps, config.rms_eps)


def clm_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of each token given those before it: position t predicts t + 1.

    Args:
        logits: (B, T, V).
        ids: (B, T).
    """
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # ignored; a slice of the logits would be copied, both ways
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def lm_loss(logits: Tensor, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The mean loss (nats) of what a batch asks for: `clm_loss` of a tensor, else the `labels` of a mapping.

    Args:
        logits: (B, T, V), or of images (B, V).
        batch: ids (B, T), or a mapping with `labels` (B, T): the true id where one is to be predicted, else -100; of
            images (B,).
    """
    if torch.is_tensor(batch):
        return clm_loss(logits, batch)
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())


def accuracy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The share of images whose class has the largest logit, 0-d; arguments as of `lm_loss`."""
    return (logits.argmax(-1) == batch["labels"]).float().mean()
