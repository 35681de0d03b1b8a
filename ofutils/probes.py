"""Reading and editing activations at named sites, through forward hooks.

A model names its sites by `model.sites()`: site name -> where that tensor is, a module whose output it is
or a `Place` inside a foreign model. Sites of a block are written `blocks.3.resid_post`; a pattern is such
a name, the bare name `resid_post` (in every block), or a glob such as `blocks.[01].*`.

    hooked(model, {site: function})    the mechanism: read, or return a tensor to put in its place
    capture(model, patterns)           a dictionary that fills with the tensors of the next forward pass
    edit(model, patterns, function)    replace the tensor at every matching site
    measure(model, batches, patterns)  the one evaluation loop: loss and statistics per site
    embed(model, batches)              one vector per row

A batch is a tensor, the model's first argument, or a mapping of its arguments such as a tokenizer gives;
`attention_mask` in it says which tokens are padding; `labels` are for the loss, the model does not get them.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofutils import UserError, params
from ofutils.streaming import STANDARD, AttentionStatistics, Statistics

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A tensor in a foreign model, to be read only: a module's first input, its output, or a part of that."""

    module: nn.Module
    side: str = "output"  # input | output
    index: int = 0  # where the output is a tuple

    def read(self, function: Callable[[Tensor], Tensor | None]):
        """Register a hook that calls the function on the tensor; returns its handle."""

        def reading(x):
            wrong = "a Hugging Face model can be read, not edited: convert it with families.from_hf"
            params.require(function(x) is None, wrong)

        if self.side == "input":
            return self.module.register_forward_pre_hook(
                lambda _, args, named: reading(args[0] if args else next(iter(named.values()))), with_kwargs=True
            )
        return self.module.register_forward_hook(
            lambda _, __, output: reading(output if torch.is_tensor(output) else output[self.index])
        )


def resolve(model: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    """The site names that the patterns stand for, in the model's order.

    Raises:
        UserError: a pattern that matches no site, with the nearest names.
    """
    sites, found = model.sites(), set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [name for name in sites if fnmatch.fnmatchcase(name, pattern) or name.split(".")[-1] == pattern]
        if not matches:
            params.require_known("site", pattern, sorted({name.split(".")[-1] for name in sites}))
        found.update(matches)
    return [name for name in sites if name in found]


@contextmanager
def hooked(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor | None]]):
    """Call a function on the tensor at each named site, for as long as the context is open.

    A function that returns a tensor replaces the site's; one that returns None only reads. The hooks are
    gone afterwards, also after an exception.
    """
    sites = model.sites()
    handles = []
    try:
        for name, function in functions.items():
            if isinstance(place := sites[name], Place):
                handles.append(place.read(function))
            else:
                handles.append(place.register_forward_hook(lambda _, __, output, f=function: f(output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, patterns: str | Iterable[str]):
    """A dictionary, site name -> tensor, that every forward pass inside the context fills anew."""
    kept: dict[str, Tensor] = {}
    keep = {name: lambda x, own=name: kept.update({own: x.detach()}) for name in resolve(model, patterns)}
    with hooked(model, keep):
        yield kept


@contextmanager
def edit(model: nn.Module, patterns: str | Iterable[str], function: Callable[[Tensor], Tensor]):
    """Put `function(x)` in the place of x at every matching site."""
    with hooked(model, dict.fromkeys(resolve(model, patterns), function)):
        yield


@dataclass
class Measurement:
    """What `measure` returns: the mean loss over batches (nats), and per site its statistics."""

    loss: float
    sites: dict[str, Statistics | AttentionStatistics]

    def summary(self) -> dict:
        """Plain numbers: {"loss": ..., "sites": {name: {metric: value}}}."""
        return {"loss": self.loss, "sites": {name: stats.summary() for name, stats in self.sites.items()}}


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode and without gradients, for as long as the context is open."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    patterns: str | Iterable[str] = (),
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
    meters: Iterable[str] = STANDARD,
) -> Measurement:
    """Run the model over batches in evaluation mode and collect loss and statistics per site.

    One pass, and no activation is kept. The model's mode is restored.

    Args:
        batches: (B, T) token ids each, or mappings; padding (`attention_mask` 0) counts nowhere,
            but in `embed_positions`, whose rows are positions.
        patterns: sites to watch; `probs` gets `AttentionStatistics`, every other site `Statistics`.
        loss: (model output, batch) -> 0-d loss; without it the loss is nan.
        meters: names out of `streaming.METERS`.

    Returns:
        The mean over batches of the loss, and the statistics of each site.

    Raises:
        UserError: no batches, an unknown site or meter, or a site whose hook never fired.
    """
    meters, real = tuple(meters), None
    statistics = {
        name: AttentionStatistics() if name.split(".")[-1] == "probs" else Statistics(meters)
        for name in resolve(model, patterns)
    }
    device, losses = next(model.parameters()).device, []
    watched = {name: lambda x, s=stats: s.add(x, real) for name, stats in statistics.items()}
    with evaluating(model), hooked(model, watched):
        for batch in batches:
            batch, real = _moved(batch, device)
            if real is not None and (keys := [name for name in statistics if name.split(".")[-1] == "scores"]):
                raise UserError(f"{keys[0]} holds scores of padding too: measure it on batches without padding")
            output = run(model, batch)
            losses.append(loss(output, batch) if loss else float("nan"))
    params.require(len(losses) > 0, "nothing to measure: no batches")
    silent = [name for name, stats in statistics.items() if not stats.rows]
    params.require(not silent, f"site {', '.join(silent)} was watched but never computed")
    return Measurement(sum(float(one) for one in losses) / len(losses), statistics)


def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """One vector per row: the mean over its tokens of the model's output in evaluation mode, padding left out.

    Args:
        model: without a head, so that its output is the last hidden state (B, T, D). Its mode is restored.

    Returns:
        (rows, D) float32 on the CPU; nan for a row of padding alone.

    Raises:
        UserError: no batches.
    """
    found = []
    with evaluating(model):
        for batch in batches:
            output = run(model, batch).double()
            mask = None if torch.is_tensor(batch) else batch.get("attention_mask")
            weight = torch.ones_like(output[..., 0]) if mask is None else mask.bool().to(output)  # (B, T)
            found.append(((output * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)).float().cpu())
    params.require(len(found) > 0, "nothing to embed: no batches")
    return torch.cat(found)


def ids_and_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """The ids of a batch and where they are tokens and not padding: (B, T) int64 and bool, where the batch is."""
    if torch.is_tensor(batch):
        return batch, torch.ones_like(batch, dtype=torch.bool)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output on a batch, which is moved to the model's device."""
    batch, _ = _moved(batch, next(model.parameters()).device)
    return model(batch) if torch.is_tensor(batch) else model(**{k: v for k, v in batch.items() if k != "labels"})


def _moved(batch: Batch, device) -> tuple[Batch, Tensor | None]:
    """The batch on the device, and its padding mask (B, T), if it has one."""
    if torch.is_tensor(batch):
        return batch.to(device), None
    batch = {name: value.to(device) for name, value in batch.items()}
    mask = batch.get("attention_mask")
    return batch, None if mask is None or bool(mask.all()) else mask.bool()
