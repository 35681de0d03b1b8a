"""What the modules of Hugging Face's families are called: data, read by `families`.

`SITES[family][site]` is (module path, side[, index]) within the base model (the one without a head): the
tensor is that module's first input, its output, or an entry of its output where that is a tuple. `*` stands
for the number of the block. `PARAMETERS[family][module path]` are the parameters that no site names.
"""

_BERT = {
    "embed_tokens": ("embeddings.word_embeddings", "output"),
    "embed_sum": ("embeddings.LayerNorm", "input"),
    "embed_norm": ("embeddings.LayerNorm", "output"),
    "blocks.*.resid_pre": ("encoder.layer.*", "input"),
    "blocks.*.q": ("encoder.layer.*.attention.self.query", "output"),
    "blocks.*.k": ("encoder.layer.*.attention.self.key", "output"),
    "blocks.*.v": ("encoder.layer.*.attention.self.value", "output"),
    "blocks.*.probs": ("encoder.layer.*.attention.self", "output", 1),
    "blocks.*.context": ("encoder.layer.*.attention.output.dense", "input"),
    "blocks.*.attn_out": ("encoder.layer.*.attention.output.dense", "output"),
    "blocks.*.resid_mid": ("encoder.layer.*.attention.output.LayerNorm", "input"),
    "blocks.*.norm1": ("encoder.layer.*.attention.output.LayerNorm", "output"),
    "blocks.*.mlp_in": ("encoder.layer.*.intermediate.dense", "input"),
    "blocks.*.mlp_act": ("encoder.layer.*.output.dense", "input"),
    "blocks.*.mlp_out": ("encoder.layer.*.output.dense", "output"),
    "blocks.*.resid_post": ("encoder.layer.*.output.LayerNorm", "input"),
    "blocks.*.norm2": ("encoder.layer.*.output.LayerNorm", "output"),
}

_OPT = {
    "embed_tokens": ("decoder.embed_tokens", "output"),
    "project_in": ("decoder.project_in", "output"),
    "embed_sum": ("decoder.layers.0", "input"),
    "blocks.*.resid_pre": ("decoder.layers.*", "input"),
    "blocks.*.norm1": ("decoder.layers.*.self_attn_layer_norm", "output"),
    "blocks.*.q": ("decoder.layers.*.self_attn.q_proj", "output"),
    "blocks.*.k": ("decoder.layers.*.self_attn.k_proj", "output"),
    "blocks.*.v": ("decoder.layers.*.self_attn.v_proj", "output"),
    "blocks.*.probs": ("decoder.layers.*.self_attn", "output", 1),
    "blocks.*.context": ("decoder.layers.*.self_attn.out_proj", "input"),
    "blocks.*.attn_out": ("decoder.layers.*.self_attn.out_proj", "output"),
    "blocks.*.resid_mid": ("decoder.layers.*.final_layer_norm", "input"),
    "blocks.*.norm2": ("decoder.layers.*.final_layer_norm", "output"),
    "blocks.*.mlp_in": ("decoder.layers.*.fc1", "input"),
    "blocks.*.mlp_act": ("decoder.layers.*.fc2", "input"),
    "blocks.*.mlp_out": ("decoder.layers.*.fc2", "output"),
    "blocks.*.resid_post": ("decoder.layers.*", "output"),
    "norm_final": ("decoder.final_layer_norm", "output"),
    "project_out": ("decoder.project_out", "output"),
}

_GPT2 = {
    "embed_tokens": ("wte", "output"),
    "embed_sum": ("h.0", "input"),
    "blocks.*.resid_pre": ("h.*", "input"),
    "blocks.*.norm1": ("h.*.ln_1", "output"),
    "blocks.*.probs": ("h.*.attn", "output", 1),
    "blocks.*.context": ("h.*.attn.c_proj", "input"),
    "blocks.*.attn_out": ("h.*.attn.c_proj", "output"),
    "blocks.*.resid_mid": ("h.*.ln_2", "input"),
    "blocks.*.norm2": ("h.*.ln_2", "output"),
    "blocks.*.mlp_in": ("h.*.mlp.c_fc", "input"),
    "blocks.*.mlp_act": ("h.*.mlp.c_proj", "input"),
    "blocks.*.mlp_out": ("h.*.mlp.c_proj", "output"),
    "blocks.*.resid_post": ("h.*", "output"),
    "norm_final": ("ln_f", "output"),
}

_NEOX = {
    "embed_tokens": ("embed_in", "output"),
    "embed_sum": ("layers.0", "input"),
    "blocks.*.resid_pre": ("layers.*", "input"),
    "blocks.*.norm1": ("layers.*.input_layernorm", "output"),
    "blocks.*.probs": ("layers.*.attention", "output", 1),
    "blocks.*.context": ("layers.*.attention.dense", "input"),
    "blocks.*.attn_out": ("layers.*.attention.dense", "output"),
    "blocks.*.resid_mid": ("layers.*.post_attention_layernorm", "input"),
    "blocks.*.norm2": ("layers.*.post_attention_layernorm", "output"),
    "blocks.*.mlp_in": ("layers.*.mlp.dense_h_to_4h", "input"),
    "blocks.*.mlp_act": ("layers.*.mlp.dense_4h_to_h", "input"),
    "blocks.*.mlp_out": ("layers.*.mlp.dense_4h_to_h", "output"),
    "blocks.*.resid_post": ("layers.*", "output"),
    "norm_final": ("final_layer_norm", "output"),
}

_LLAMA = {
    "embed_tokens": ("embed_tokens", "output"),
    "embed_sum": ("layers.0", "input"),
    "blocks.*.resid_pre": ("layers.*", "input"),
    "blocks.*.norm1": ("layers.*.input_layernorm", "output"),
    "blocks.*.q": ("layers.*.self_attn.q_proj", "output"),
    "blocks.*.k": ("layers.*.self_attn.k_proj", "output"),
    "blocks.*.v": ("layers.*.self_attn.v_proj", "output"),
    "blocks.*.probs": ("layers.*.self_attn", "output", 1),
    "blocks.*.context": ("layers.*.self_attn.o_proj", "input"),
    "blocks.*.attn_out": ("layers.*.self_attn.o_proj", "output"),
    "blocks.*.resid_mid": ("layers.*.post_attention_layernorm", "input"),
    "blocks.*.norm2": ("layers.*.post_attention_layernorm", "output"),
    "blocks.*.mlp_in": ("layers.*.mlp", "input"),
    "blocks.*.mlp_act": ("layers.*.mlp.down_proj", "input"),
    "blocks.*.mlp_out": ("layers.*.mlp.down_proj", "output"),
    "blocks.*.resid_post": ("layers.*", "output"),
    "norm_final": ("norm", "output"),
}

_VIT = {
    "embed_tokens": ("embeddings.patch_embeddings", "output"),
    "embed_sum": ("layers.0", "input"),
    "blocks.*.resid_pre": ("layers.*", "input"),
    "blocks.*.norm1": ("layers.*.layernorm_before", "output"),
    "blocks.*.q": ("layers.*.attention.q_proj", "output"),
    "blocks.*.k": ("layers.*.attention.k_proj", "output"),
    "blocks.*.v": ("layers.*.attention.v_proj", "output"),
    "blocks.*.probs": ("layers.*.attention", "output", 1),
    "blocks.*.context": ("layers.*.attention.o_proj", "input"),
    "blocks.*.attn_out": ("layers.*.attention.o_proj", "output"),
    "blocks.*.resid_mid": ("layers.*.layernorm_after", "input"),
    "blocks.*.norm2": ("layers.*.layernorm_after", "output"),
    "blocks.*.mlp_in": ("layers.*.mlp.fc1", "input"),
    "blocks.*.mlp_act": ("layers.*.mlp.fc2", "input"),
    "blocks.*.mlp_out": ("layers.*.mlp.fc2", "output"),
    "blocks.*.resid_post": ("layers.*", "output"),
    "norm_final": ("layernorm", "output"),
}

#: family -> site -> where it stands
SITES = {
    "bert": _BERT,
    "roberta": _BERT,
    "opt": _OPT,
    "opt (post-norm)": _OPT
    | {
        "blocks.*.resid_mid": ("decoder.layers.*.self_attn_layer_norm", "input"),
        "blocks.*.resid_post": ("decoder.layers.*.final_layer_norm", "input"),
    },
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gpt_neox (parallel)": {site: where for site, where in _NEOX.items() if site != "blocks.*.resid_mid"},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "vit": _VIT,
}

_BERT_EMBEDDINGS = {
    "embeddings.position_embeddings": "position_embedding",
    "embeddings.token_type_embeddings": "segment_embedding",
    "pooler.dense": None,  # not converted
}

#: family -> module path -> the module of `Transformer`, for parameters without a site of their own
PARAMETERS = {
    "bert": _BERT_EMBEDDINGS
    | {
        "cls.predictions.transform.dense": "head.dense",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.predictions.decoder": "head",
        "cls.predictions": None,  # the decoder's bias once more
    },
    "roberta": _BERT_EMBEDDINGS
    | {
        "lm_head.dense": "head.dense",
        "lm_head.layer_norm": "head.norm",
        "lm_head.decoder": "head",
        "lm_head": None,
    },
    "opt": {"decoder.embed_positions": "position_embedding", "lm_head": "head"},
    "gpt2": {"wpe": "position_embedding", "h.*.attn.c_attn": "blocks.*.attention.qkv", "lm_head": "head"},
    "gpt_neox": {"layers.*.attention.query_key_value": "blocks.*.attention.qkv", "lm_head": "head"},
}

#: what the parameters of a site's module are called in `Transformer`, where not by the site's name
MODULES = {
    "embed_tokens": "token_embedding",
    "blocks.*.q": "blocks.*.attention.q",
    "blocks.*.k": "blocks.*.attention.k",
    "blocks.*.v": "blocks.*.attention.v",
    "blocks.*.attn_out": "blocks.*.attention.attn_out",
    "blocks.*.mlp_in": "blocks.*.mlp_fc",
}
