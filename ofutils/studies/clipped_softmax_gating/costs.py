"""What each form of attention costs: parameters, memory for the backward pass, time of a training step."""

import time
from contextlib import nullcontext
from dataclasses import replace
from statistics import median

import pandas as pd
import torch
from torch.autograd.graph import saved_tensors_hooks

from ofutils import params, probes
from ofutils.attention import AttentionConfig
from ofutils.transformer import Transformer, TransformerConfig, clm_loss

#: The paper's Table 4 and Table 11, and what came after.
FORMS = {
    "vanilla": {},
    "clipped softmax": {"alpha": 4},
    "row-aware clipped softmax": {"alpha": 4, "row_aware": True},
    "gate, linear": {"gate": "linear"},
    "gate, MLP of 4": {"gate": "mlp"},
    "gate, all heads": {"gate": "all_heads"},
    "softmax off by one": {"off_by_one": True},
    "sink logit": {"sink_logit": True},
    "sigmoid": {"sigmoid": True},
}

_UNFUSED = "vanilla, its probabilities written down"


def parameters(shape: TransformerConfig) -> pd.Series:
    """Form -> parameters that it adds to a block of a shape."""
    with torch.device("meta"):
        sizes = {form: sum(one.numel() for one in _model(shape, form).parameters()) for form in FORMS}
    return pd.Series({form: (size - sizes["vanilla"]) // shape.layers for form, size in sizes.items()})


def _model(shape: TransformerConfig, form: str) -> Transformer:
    return Transformer(replace(shape, attention=AttentionConfig(**FORMS.get(form, {}))))


def table(shape: TransformerConfig, batch: int, rounds: int = 7) -> pd.DataFrame:
    """Ratios to vanilla, of a forward and backward pass on random ids on this machine.

    Args:
        shape: of the models.
        batch: rows of `shape.context` tokens.
        rounds: the forms take turns so many times; medians count.

    Returns:
        One row per form: `parameters`, added to a block; `memory`, bytes kept for the backward pass over vanilla's;
        `time` over vanilla's, and over that of the vanilla model which writes its probabilities down too
        (`time, unfused`): the plain softmax alone has a fused kernel.

    Source: bondarenko2023, Tables 4 and 11, whose times are of a softmax that is not fused either.
    """
    torch.manual_seed(0)
    device = params.device()
    rows = torch.randint(shape.vocab, (batch, shape.context), device=device)
    models = {form: _model(shape, form).to(device) for form in (*FORMS, _UNFUSED)}
    times = {form: [] for form in models}
    for _ in range(rounds + 1):
        for form, model in models.items():
            with probes.edit(model, "probs", lambda x: x) if form == _UNFUSED else nullcontext():
                times[form].append(_seconds(model, rows))
    taken = pd.Series({form: median(all[1:]) for form, all in times.items()})  # the first round warms up
    kept = pd.Series({form: _kept(models[form], rows) for form in FORMS})
    found = pd.DataFrame({"parameters": parameters(shape), "memory": kept / kept["vanilla"]})
    found["time"], found["time, unfused"] = taken / taken["vanilla"], taken / taken[_UNFUSED]
    return found.loc[[*FORMS]]


def _seconds(model: Transformer, rows: torch.Tensor) -> float:
    start = time.perf_counter()
    clm_loss(model(rows), rows).backward()
    if rows.device.type == "cuda":
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - start


def _kept(model: Transformer, rows: torch.Tensor) -> int:
    """Bytes that autograd keeps, each storage once, the parameters left out."""
    own, sizes = {one.untyped_storage().data_ptr() for one in model.parameters()}, {}

    def note(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        loss = clm_loss(model(rows), rows)
    size = sum(size for place, size in sizes.items() if place not in own)
    del loss
    return size
