"""Hugging Face models into `Transformer`: the same function, with named sites.

`from_hf` builds the model and copies the weights; logits equal the original's to 1e-5 (tested).
"""

import torch
from torch import Tensor

from ofutils import UserError
from ofutils.transformer import Transformer, TransformerConfig

_OPT_OFFSET = 2  # OPT's learned positions start at row 2


def from_hf(model) -> Transformer:
    """A Hugging Face model as a `Transformer` in evaluation mode, in float32.

    Args:
        model: an OPTForCausalLM (with its post-norm, projected 350m form). It is left as it is.

    Raises:
        UserError: another family, or a variant that `Transformer` does not have.
    """
    if getattr(model.config, "model_type", None) != "opt" or not hasattr(model, "lm_head"):
        raise UserError(f"no conversion for {type(model).__name__}; known: OPTForCausalLM")
    config = model.config
    if config.activation_function != "relu" or not config.enable_bias:
        raise UserError("no conversion for this OPT: it needs activation relu and biases")
    ours = Transformer(
        TransformerConfig(
            vocab=config.vocab_size,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            mlp_width=config.ffn_dim,
            context=config.max_position_embeddings,
            embed_width=config.word_embed_proj_dim,
            norm_position="pre" if config.do_layer_norm_before else "post",
            final_norm=model.model.decoder.final_layer_norm is not None,
        )
    )
    state = opt_state(model.state_dict())
    if not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight):
        raise UserError("no conversion for this OPT: its head is not tied to its embedding")
    ours.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return ours.eval()


def opt_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an OPT, under Hugging Face's names, renamed for `Transformer`.

    Gates in the form of bondarenko2023's code (`self_attn.alpha.<head>.{weight,bias}`, one linear map a
    head) are stacked over the heads.
    """
    renamed = {
        "self_attn_layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.attn_out",
        "fc1": "mlp_fc",
        "fc2": "mlp_out",
    }
    outer = {
        "embed_tokens.weight": "token_embedding.weight",
        "final_layer_norm.weight": "norm_final.weight",
        "final_layer_norm.bias": "norm_final.bias",
        "project_in.weight": "project_in.weight",
        "project_out.weight": "project_out.weight",
    }
    found: dict[str, Tensor] = {}
    gates: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        short = name.removeprefix("model.decoder.")
        if short == "embed_positions.weight":
            found["position_embedding.weight"] = tensor[_OPT_OFFSET:]
        elif short in outer:
            found[outer[short]] = tensor
        else:
            _, layer, rest = short.split(".", 2)  # layers.<layer>.<rest>
            module, kind = rest.rsplit(".", 1)
            if module.startswith("self_attn.alpha."):
                heads = gates.setdefault(f"blocks.{layer}.attention.gate.{kind}", {})
                heads[int(module.rsplit(".", 1)[1])] = tensor.squeeze(0)
            else:
                found[f"blocks.{layer}.{renamed[module]}.{kind}"] = tensor
    return found | {name: torch.stack([heads[i] for i in sorted(heads)]) for name, heads in gates.items()}
