"""Hugging Face models: converted into `Transformer`, or read where they stand.

`from_hf` builds a `Transformer` and copies the weights; the output equals the original's to 1e-5 (tested).
Use it where something is edited: ablation at sites, quantization. `with_sites` puts a table of sites around
a model as it is, to be read only.
"""

import re
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor, nn

from ofutils import UserError, params
from ofutils.hub import CARRIED
from ofutils.layouts import MODULES, PARAMETERS, SITES
from ofutils.probes import Place
from ofutils.transformer import Transformer, TransformerConfig

_CLASSES = {  # with a head, and without
    "opt": ("OPTForCausalLM", "OPTModel"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXModel"),
    "bert": ("BertForMaskedLM", "BertModel"),
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "vit": ("ViTForImageClassification", "ViTModel"),
}
#: what `from_hf` converts: class -> (family, whether it has a head)
CONVERTED = {one: (family, one == own[0]) for family, own in _CLASSES.items() for one in own}
_PREFIXES = {one: f"{one}." for one in _CLASSES} | {"opt": "model.", "gpt2": "transformer."}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_OPT_OFFSET = 2  # OPT's learned positions start at row 2


def from_hf(model) -> Transformer:
    """A Hugging Face model as a `Transformer` in evaluation mode, in float32, on the CPU.

    Logits, or the last hidden state of a model without a head, equal the original's at every token; at
    padding they mean nothing in either. Poolers of BERT and ViT are left behind. An attention of `huggingface` comes
    along.

    Positions: OPT and RoBERTa count tokens, so padding on the left shifts nothing; BERT, GPT-2 and GPT-NeoX
    count padding too, unless `position_ids` say otherwise, which `Transformer` does not take. RoBERTa's
    original tells padding by the pad token's id and not by `attention_mask`: here the mask must say it, and
    a mask that hides more than the padding gives other positions than there.

    Args:
        model: an instance of a class in `CONVERTED`. It is left as it is.

    Raises:
        UserError: another class, or a variant that `Transformer` does not have.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    params.require(kind in CONVERTED, f"no conversion for {kind}; known: {', '.join(CONVERTED)}")
    family, headed = CONVERTED[kind]
    settings, state = _SETTINGS[family](config), _renamed(model.state_dict(), family, config.num_attention_heads)
    if family == "roberta":
        state["position_embedding.weight"] = state["position_embedding.weight"][config.pad_token_id + 1 :]
        _need(kind, not headed or config.hidden_act == "gelu", "activation gelu, which its head has")
    head = "untied" if "head.weight" in state else "tied"
    if family in ("bert", "roberta"):
        _need(kind, head == "tied", "a head that is tied to its embedding")
        head = "mlm"
    head = "biased" if family == "vit" else head
    activation, learned = _first(config, "hidden_act", "activation_function"), state.get("position_embedding.weight")
    _need(kind, activation in _ACTIVATIONS, f"one of the activations {', '.join(_ACTIVATIONS)}, not {activation}")
    shape = TransformerConfig(
        vocab=config.num_labels if family == "vit" else config.vocab_size,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp_width=_first(config, "intermediate_size", "ffn_dim", "n_inner") or 0,
        context=config.max_position_embeddings if learned is None else len(learned),
        norm_eps=_first(config, "layer_norm_eps", "layer_norm_epsilon") or 1e-5,
        activation=_ACTIVATIONS[activation],
        head=head if headed else "none",
        attention=getattr(config, CARRIED, None) or {},
        **settings,
    )
    ours = Transformer(shape)
    lacking = sorted(ours.state_dict().keys() - state.keys())
    _need(kind, not lacking, f"{', '.join(lacking[:1])}, which `huggingface.restore` reads")
    ours.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return ours.eval()


def opt_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an OPT, under Hugging Face's names, renamed for `Transformer`.

    Gates in the forms of bondarenko2023's code become those of `attention.Gate`: `linear` from
    `self_attn.alpha.<head>`, `mlp` from `self_attn.alpha.<head>.0` and `.2` (`gate_hidden` is K / 4 with their
    `attn_gate_mlp`, K with `attn_gate_mlp2`), `all_heads` from `self_attn.alpha`, each with a weight and a bias.
    A head equal to the embedding is left out: it is tied.

    What such a state does not tell: whether gates were averaged over tokens (`conditional_per_head`) or multiplied
    by 1 / pi_init (`fine_tuning`), neither of which `Transformer` has, and how the softmax was clipped.

    Raises:
        UserError: a parameter that has no place in `Transformer`.
    """
    return _renamed(state, "opt")


def bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a BERT, likewise (gates: `attention.self.alpha`)."""
    return _renamed(state, "bert")


def _first(config, *names: str):
    """The first of these attributes that the configuration has."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _need(kind: str, there: bool, what: str) -> None:
    params.require(there, f"no conversion for this {kind}: it needs {what}")


def _opt(config) -> dict:
    _need("OPT", config.enable_bias and config.layer_norm_elementwise_affine, "biases, and gains in its norms")
    pre = config.do_layer_norm_before
    norms = {"norm_position": "pre" if pre else "post", "final_norm": pre and not config._remove_final_layer_norm}
    return norms | {"embedding": {"width": config.word_embed_proj_dim}}


def _gpt2(config) -> dict:
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    _need("GPT-2", plain, "scores scaled by the head width alone")
    _need("GPT-2", not config.add_cross_attention, "no cross attention")
    return {"embedding": {"skip_padding": False}}


def _gpt_neox(config) -> dict:
    rotary = config.rope_parameters
    _need("GPT-NeoX", rotary["rope_type"] == "default", "plain rotary positions")
    _need("GPT-NeoX", config.attention_bias, "biases")
    turned = {"rotary_share": rotary.get("partial_rotary_factor", 1.0), "rotary_base": rotary["rope_theta"]}
    return {"parallel": config.use_parallel_residual, "embedding": {"positions": "rotary", **turned}}


def _bert(config) -> dict:
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    _need("BERT", absolute, "absolute positions")
    _need("BERT", not config.is_decoder and not config.add_cross_attention, "the form of an encoder")
    roberta = config.model_type == "roberta"
    embedding = {"norm": True, "segments": config.type_vocab_size, "skip_padding": roberta}
    return {"norm_position": "post", "causal": False, "embedding": embedding}


def _vit(config) -> dict:
    _need("ViT", config.qkv_bias, "biases of queries, keys and values")
    image = {"size": config.image_size, "patch": config.patch_size, "channels": config.num_channels}
    return {"causal": False, "image": image}


_SETTINGS = {"opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "bert": _bert, "roberta": _bert, "vit": _vit}


def _renamed(state: dict[str, Tensor], family: str, heads: int = 0) -> dict[str, Tensor]:
    """The state under the names of `Transformer`; fused matrices come apart, a tied head is left out."""
    names = {
        where[0]: MODULES.get(site, site)
        for site, where in SITES[family].items()
        if where[1:] == ("output",) or site == "blocks.*.mlp_in"
    } | PARAMETERS[family]
    attention = SITES[family]["blocks.*.probs"][0]
    names[f"{attention}.gate"] = "blocks.*.attention.gate"  # of `huggingface`, as a sink is
    found: dict[str, Tensor] = {}
    gates: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        module, kind = name.removeprefix(_PREFIXES[family]).rsplit(".", 1)
        layer = "".join(re.findall(r"\.(\d+)(?:\.|$)", module)[:1])
        place = re.sub(r"\.\d+\.", ".*.", module, count=1)
        if f"{module}.{kind}" in names:  # a parameter of its own: ViT's class token and positions
            found[names[f"{module}.{kind}"]] = tensor.squeeze((0, 1))
            continue
        tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # ViT's patches: (D, C, P, P)
        ours = names.get(place, "blocks.*.attention" if (place, kind) == (attention, "sink") else "")
        if gate := re.search(r"\.alpha(?:\.(\d+)(?:\.([02]))?)?$", module):
            head, inner = gate[1], gate[2] == "0"
            own = enumerate(tensor) if head is None else [(int(head), tensor if inner else tensor.squeeze(0))]
            gates.setdefault(f"blocks.{layer}.attention.gate.{kind}" + "_in" * inner, {}).update(own)
        elif ours == "":
            raise UserError(f"no place for the parameter {name} in a {family} model")
        elif ours is not None:
            ours = f"{ours.replace('*', layer)}.{kind}"
            if family == "gpt2" and ours.startswith("blocks.") and tensor.ndim == 2 and ".gate." not in ours:
                tensor = tensor.T  # its matrices are (in, out)
            found |= _split(ours, tensor, family, heads)
    if family == "opt":
        found["position_embedding.weight"] = found["position_embedding.weight"][_OPT_OFFSET:]
    if "head.weight" in found and torch.equal(found["head.weight"], found["token_embedding.weight"]):
        del found["head.weight"]
    return found | {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in gates.items()}


def _split(name: str, tensor: Tensor, family: str, heads: int) -> dict[str, Tensor]:
    """q, k and v out of a fused matrix (3 D, D) or bias (3 D,): one after another, or head by head (GPT-NeoX)."""
    if ".qkv." not in name:
        return {name: tensor}
    if family == "gpt_neox":
        tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)  # (H, 3, K, ..) -> (3 D, ..)
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {name.replace(".qkv.", f".{letter}."): part for letter, part in parts}


# --- reading


def with_sites(model) -> nn.Module:
    """A Hugging Face model with its sites, to be read with `probes`. Nothing of it is converted or copied.

    Args:
        model: BERT, RoBERTa, OPT, GPT-2, GPT-NeoX, Llama, Qwen2, Qwen3, ViT or wav2vec2 (in its post-norm form),
            with any head or none; a model that has sites already is returned as it is.

    Raises:
        UserError: another family, or a release of transformers that names its modules otherwise.
    """
    if hasattr(model, "sites"):
        return model
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family == "opt" and not config.do_layer_norm_before:
        family = "opt (post-norm)"
    if family == "gpt_neox" and config.use_parallel_residual:
        family = "gpt_neox (parallel)"
    if family == "wav2vec2" and config.do_stable_layer_norm:
        family = "wav2vec2 (pre-norm)"  # of which there is no table
    params.require(family in SITES, f"no table of sites for {type(model).__name__}; known: {', '.join(SITES)}")
    return Sited(model, SITES[family])


class Sited(nn.Module):
    """What `with_sites` returns: arguments go on to the model, and its logits or last hidden state come back.

    Sites have the names and the meaning they have in `Transformer`. All families have `embed_tokens`,
    `embed_sum`, per block `resid_pre`, `norm1`, `probs`, `context`, `attn_out`, `norm2`, `mlp_in`, `mlp_act`
    (what enters the last matrix: in Llama and Qwen the gated product), `mlp_out`, `resid_post`, and `logits`
    if there is a head. `resid_post` of the last block stands before `norm_final`; Hugging Face's last hidden
    state stands after it. In post-norm models `resid_post` stands before `norm2`.

    What a family lacks: all, `scores`, `gated`, `embed_positions`, `embed_segments`, `embed_typed`, `q_norm`,
    `k_norm`; GPT-2 and GPT-NeoX, whose queries, keys and values come from one matrix, `q`, `k`, `v`; GPT-NeoX with
    parallel branches, `resid_mid`; all but BERT, RoBERTa and wav2vec2, `embed_norm`; these three and
    post-norm OPT, `norm_final`; all but an OPT with a narrow embedding, `project_in` and `project_out`. In ViT
    `embed_tokens` are the patches, without the class token that the later sites have; in wav2vec2 they are the
    projected frames of the waveform, of which there are no tokens.

    `probs` exist under `attn_implementation="eager"` (or another implementation that returns them); reading
    them under any other is an error that says so. Every site is (B, T, D), `probs` (B, H, T, T): what OPT
    flattens to (B T, D) is given back its rows.
    """

    def __init__(self, model, table: dict):
        super().__init__()
        self.model, self.table, self.training = model, table, model.training
        self.logits = nn.Identity() if model.base_model is not model else None
        self.rows = 0
        self.sites()  # a module that is not there fails here

    def forward(self, *args, **named) -> Tensor:
        """Logits (B, T, V), or as the head has it; (B, T, D) without a head."""
        self.rows = len(next(x for x in (*args, *named.values()) if torch.is_tensor(x)))  # B
        output = self.model(*args, **named)
        if self.logits is None:
            return output.last_hidden_state
        there = getattr(output, "logits", None) is not None
        params.require(there, f"{type(self.model).__name__} returns no logits: take its base model")
        return self.logits(output.logits)

    def sites(self) -> dict[str, Place]:
        """Site name -> where it stands, in the order of computation. A module that is None is no site."""
        found = {}
        for repeated, names in groupby(self.table, lambda name: "*" in name):
            names = list(names)
            for layer in range(self.model.config.num_hidden_layers if repeated else 1):
                for name in names:
                    path, *where = self.table[name]
                    module = _module(self.model.base_model, path.replace("*", str(layer)))
                    if module is not None:
                        found[name.replace("*", str(layer))] = _Reading(module, *where, owner=self)
        return found if self.logits is None else found | {"logits": Place(self.logits)}


@dataclass(frozen=True)
class _Reading(Place):
    """A place whose tensor comes with its rows, and that says what is wrong where there is none."""

    owner: Sited | None = None

    def read(self, function):
        """As `Place.read`."""

        def checked(x):
            params.require(x is not None, 'no probs: load the model with attn_implementation="eager"')
            return function(x.unflatten(0, (self.owner.rows, -1)) if x.ndim == 2 else x)  # (B T, D) -> (B, T, D)

        return super().read(checked)


def _module(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return reduce(getattr, path.split("."), base)
    except AttributeError:
        raise UserError(f"this {type(base).__name__} has no module {path}: upgrade transformers") from None
