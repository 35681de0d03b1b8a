"""Small configurations and texts that several test files use, the same in every Python."""

from ofutils.transformer import TransformerConfig

_WORDS = "return the first of two open files that were not read before it is closed"

SMALL = TransformerConfig(vocab=300, layers=2, width=16, heads=2, context=16)
ENCODER = TransformerConfig(  # like BERT, without a head
    vocab=40,
    layers=3,
    width=16,
    heads=4,
    context=16,
    causal=False,
    norm_position="post",
    embedding={"norm": True},
    head="none",
)
METHODS = {
    "vanilla": {},
    "clipped": {"attention": {"alpha": 2.0}},
    "off by one": {"attention": {"off_by_one": True}},
    "sink logit": {"attention": {"sink_logit": True}},
    "row-aware clipped": {"attention": {"alpha": 0.5, "row_aware": True}},
    "sigmoid": {"attention": {"sigmoid": True}},
    "row-aware sigmoid": {"attention": {"sigmoid": True, "row_aware": True}},
    "linear gate": {"attention": {"gate": "linear", "pi_init": 0.25}},
    "mlp gate": {"attention": {"gate": "mlp"}},
    "all heads gate": {"attention": {"gate": "all_heads"}},
    "OP layernorm": {
        "norm": "none",
        "attention": {"qk_norm": "layernorm"},
        "residual_gain": 0.2,
        "final_norm": False,
    },
    "OP rmsnorm": {"norm": "none", "attention": {"qk_norm": "rmsnorm"}, "residual_gain": 0.2, "final_norm": False},
    "post": {"norm_position": "post"},
    "narrow": {"embedding": {"width": 8}},
    "dropout": {"dropout": 0.1},
}


def sentences(count):
    """So many different sentences."""
    words = _WORDS.split()
    rows = [" ".join(words[place * step % len(words)] for step in range(3, 12)) for place in range(1, count + 1)]
    return [f"{row} {place}." for place, row in enumerate(rows)]
