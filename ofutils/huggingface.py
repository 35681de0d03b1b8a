"""The papers' attention on Hugging Face models: clipped softmax and its kin, gates, saved and read back with them.

    apply(model, attention)      the model with that attention, to be trained, saved or measured
    restore(model, source)       the same for what `from_pretrained` gave, with the gates that were saved

`save_pretrained` then writes the gates among the weights and the settings into `config.json`, which also names this
room as the attention implementation: `from_pretrained` fails where the room was not imported, and a model that was
not restored fails at its first batch, where otherwise transformers would drop the gates with a warning and take the
plain softmax. It still does where it is told to, by `from_pretrained(.., attn_implementation="eager")`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ofutils import UserError, params, records
from ofutils.attention import AttentionConfig, Gate, capped, probabilities
from ofutils.hub import CARRIED
from ofutils.layouts import SITES

#: transformers' name of this attention, as long as this room is imported
NAME = "ofutils.huggingface"
_LEAST = torch.finfo(torch.float16).min / 2  # of a mask: below it a key is not seen
_RESTORE = "`huggingface.restore(model, folder)`"


def apply(model, attention: AttentionConfig):
    """A Hugging Face model with the attention that is configured, in place.

    Logits are those of `Transformer` with the same weights and the same `attention`, also with padding and with
    cached keys and values; `families.from_hf` brings the one into the other. Gates are parameters of the attention
    modules, in their dtype and to be trained: `..gate.weight` and so on, with `sink_logit` also `..sink`. `alpha` is
    by the longest row that the model takes, in ViT by its rows; for another length set `gamma` to -alpha / length.

    Args:
        model: BERT, RoBERTa, OPT, GPT-2, GPT-NeoX, Llama, Qwen2, Qwen3 or ViT, with any head or none.
        attention: all but `qk_norm`, `value_skip`, `value_gain`, which transformers leaves no place for, and
            `linear_init`, since the model has begun.

    Returns:
        The model. Its `output_attentions` are `attention.probabilities`; at the sites of `families.with_sites` what
        is called `context` has passed the gate.

    Raises:
        UserError: another family, cross attention, those three, or a model that carries an attention already.

    Source: bondarenko2023, sections 4.1 and 4.2. Departure: its code loads weights with `strict=False`, so that a
        model that was not built with gates drops them in silence.
    """
    saved = getattr(model.config, CARRIED, None)
    params.require(saved is None, f"this model carries the attention {saved} already, which only {_RESTORE} reads")
    return _attach(model, attention, _parts(model, attention))


def restore(model, source: str | Path | Mapping[str, Tensor]):
    """A model of `from_pretrained` with the attention that it was saved with, to the bit, in place.

    Args:
        model: whose `config.json` was written after `apply`.
        source: the folder that it was loaded from, or a state (name -> tensor) that holds its gates.

    Returns:
        The model.

    Raises:
        UserError: a configuration that carries no attention, or another than that of the folder; a model that has it
            already; gates or sink logits that are not there, too many or of another shape; no safetensors.
    """
    saved = getattr(model.config, CARRIED, None)
    params.require(saved is not None, f"the configuration of this {type(model).__name__} carries no attention: apply")
    attention = AttentionConfig(**saved)
    parts, state = _parts(model, attention), source if isinstance(source, Mapping) else _read(Path(source), saved)
    state = {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in state.items()}
    for path, part in parts.items():
        names = (name for name in state if name.startswith((f"{path}.gate.", f"{path}.sink")))
        found = {name.removeprefix(f"{path}."): state[name] for name in names}
        shapes = [{name: tuple(one.shape) for name, one in own.items()} for own in (part.state_dict(), found)]
        params.require(shapes[0] == shapes[1], f"{path} of {saved} needs {shapes[0]}, but saved are {shapes[1]}")
        part.load_state_dict(found)
    return _attach(model, attention, parts)


def _read(folder: Path, saved: dict) -> dict[str, Tensor]:
    """The gates and sinks in the safetensors of a folder whose configuration carries the same attention."""
    files, config = sorted(folder.glob("*.safetensors")), folder / "config.json"
    params.require(files and config.is_file(), f"{folder} holds no config.json with safetensors")
    there = json.loads(config.read_text(encoding="utf-8")).get(CARRIED)
    params.require(there == saved, f"the model carries the attention {saved}, {folder} was saved with {there}")
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if ".gate." in name or name.endswith(".sink")]  # noqa: SIM118
            found |= {name: opened.get_tensor(name) for name in names}
    return found


def _parts(model, own: AttentionConfig) -> dict[str, nn.Module]:
    """Path of an attention module within the base model -> what it is to get: a gate, a sink, both or nothing."""
    config, kind = model.config, type(model).__name__
    params.require(config.model_type in SITES, f"no attention for {kind}; known: {', '.join(SITES)}")
    params.require(not getattr(config, "add_cross_attention", False), f"no attention for {kind} with cross attention")
    lacking = own.qk_norm != "none" or own.value_skip or own.value_gain != 1 or own.linear_init
    said = "qk_norm, value_skip, value_gain and linear_init have no place in a model of transformers"
    params.require(not lacking, said)
    path, heads, parts = SITES[config.model_type]["blocks.*.probs"][0], config.num_attention_heads, {}
    for layer in range(config.num_hidden_layers):
        part, place = nn.Module(), path.replace("*", str(layer))
        module = model.base_model.get_submodule(place)
        params.require(not hasattr(module, "attention_config"), f"{place} of this {kind} has its attention already")
        if own.gate != "none":
            part.gate = Gate(own.gate, heads, config.hidden_size // heads, own.gate_hidden, own.pi_init)
        if own.sink_logit:
            part.sink = nn.Parameter(torch.zeros(heads))
        parts[place] = part.to(next(module.parameters()))
    return parts


def _attach(model, own: AttentionConfig, parts: dict[str, nn.Module]):
    for path, part in parts.items():
        module = model.base_model.get_submodule(path)
        module.attention_config = own
        for name, one in (*part.named_children(), *part.named_parameters(recurse=False)):
            setattr(module, name, one)
        module.register_forward_pre_hook(_before, with_kwargs=True)
    setattr(model.config, CARRIED, records.differing(own))
    model.config.attn_implementation = model.config._attn_implementation = NAME  # the first of them is saved
    return model


def _before(module, args, named):
    """Keeps what the gate reads, and refuses an attention that would pass over the gate."""
    there = module.config._attn_implementation
    if there != NAME:
        lost = f"attn_implementation is {there!r}, which passes over the attention {getattr(module.config, CARRIED)}"
        raise UserError(f"{lost}: model.set_attn_implementation({NAME!r}) brings it back")
    module.read = args[0] if args else named["hidden_states"]  # (B, T, D)


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """(B, H, T, K) and a mask that is added -> (B, T, H, K) and what each query takes of each key (B, H, T, T)."""
    own, config = getattr(module, "attention_config", None), module.config
    if own is None:
        raise UserError(f"this model carries the attention {getattr(config, CARRIED, {})}, which {_RESTORE} reads")
    groups = query.shape[1] // key.shape[1]  # query heads that share a key head
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    with torch.autocast(query.device.type, enabled=False):  # scores in float32, as in `Transformer`
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(exact) * scaling @ key.to(exact).transpose(-1, -2)  # (B, H, T, T)
    scores = capped(scores, own.tanh_cap) if own.tanh_cap else scores
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # its positions before the first
    keys = getattr(config, "max_position_embeddings", scores.shape[-1] + offset) - offset
    if attention_mask is not None:
        scores = scores + attention_mask
    if own.row_aware:
        seen = torch.ones_like(scores) if attention_mask is None else attention_mask > _LEAST  # (B, 1 or H, T, T)
        keys = seen.sum(-1, keepdim=True).clamp(min=1).to(exact)  # a padding before every token sees nothing
    probs = probabilities(scores, own, keys, getattr(module, "sink", None)).to(value.dtype)
    context = (F.dropout(probs, dropout, module.training) @ value).transpose(1, 2)  # (B, T, H, K)
    read = module.__dict__.pop("read")
    gated = context if own.gate == "none" else context * module.gate(read)[..., None]
    return gated.contiguous(), probs


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
