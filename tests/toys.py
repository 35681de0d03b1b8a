"""Toy models of every Hugging Face family that is converted or read, and batches for them."""

import torch
import transformers

from ofutils.families import CONVERTED

VOCAB, PAD = 99, 1
BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": PAD,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "word_embed_proj_dim": 32,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
LLAMA = {**BERT, "num_key_value_heads": 2}
VIT = {key: value for key, value in BERT.items() if key != "max_position_embeddings"}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 3}
WAV2VEC2 = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
# name -> (class, its configuration)
MODELS = {
    "opt": ("OPTForCausalLM", OPT),
    "opt, narrow and post": (
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt without a head": ("OPTModel", OPT),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, inner width and relu": ("GPT2LMHeadModel", GPT2 | {"n_inner": 40, "activation_function": "relu"}),
    "gpt2 without a head": ("GPT2Model", GPT2),
    "neox": ("GPTNeoXForCausalLM", BERT),
    "neox, sequential and tied": (
        "GPTNeoXForCausalLM",
        BERT | {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 0.5},
    ),
    "neox without a head": ("GPTNeoXModel", BERT | {"rotary_pct": 1.0, "rotary_emb_base": 500}),
    "bert": ("BertForMaskedLM", BERT),
    "bert, gelu_new": ("BertForMaskedLM", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "bert without a head": ("BertModel", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "roberta without a head": ("RobertaModel", BERT),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama without a head": ("LlamaModel", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "vit": ("ViTForImageClassification", VIT),
    "vit without a head": ("ViTModel", VIT),
    "wav2vec2": ("Wav2Vec2ForCTC", WAV2VEC2),
    "wav2vec2 without a head": ("Wav2Vec2Model", WAV2VEC2),
    "bert classifier": ("BertForSequenceClassification", BERT),
}
CONVERTIBLE = [name for name, (kind, _) in MODELS.items() if kind in CONVERTED and "vit" not in name]  # of text


def build(name, attention="eager", **more):
    """The model, in evaluation mode, with every parameter off its start."""
    kind, settings = MODELS[name]
    cls = getattr(transformers, kind)
    config = cls.config_class(**settings, **more)
    config._attn_implementation = attention
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(length=20):
    return torch.randint(PAD + 1, VOCAB, (3, length))


def padded(side, length=20):
    """A batch with padding: 0, 5 and 13 positions of its rows."""
    batch = {"input_ids": ids(length), "attention_mask": torch.ones(3, length, dtype=torch.long)}
    for row, count in ((1, 5), (2, 13)):
        where = slice(length - count, None) if side == "right" else slice(0, count)
        batch["input_ids"][row, where], batch["attention_mask"][row, where] = PAD, 0
    return batch


def batch_for(name):
    if name.startswith("wav2vec2"):
        return {"input_values": torch.randn(3, 90)}
    return {"pixel_values": torch.randn(3, 3, 8, 8)} if name.startswith("vit") else {"input_ids": ids()}


def output(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found if torch.is_tensor(found) else getattr(found, "logits", found[0])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
