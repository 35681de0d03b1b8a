"""Outlier dimensions: found by the parameters of LayerNorms or by activation, and switched off.

Norms are named by their sites (`norm2` in every block, `blocks.3.norm2`, `embed_norm`, ...), in `Transformer`
and in any Hugging Face model that `families.with_sites` reads. In a post-norm BERT `norm2` is the output
LayerNorm of each block; the norm of an MLM head is called `head.norm` and is taken only when asked for.
"""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ofutils import params
from ofutils.probes import Measurement, Place, resolve

#: Every norm of the body of a model, wherever it has one.
ALL_NORMS = ("embed_norm", "norm1", "norm2", "norm_final")


def norms(model: nn.Module, where: str | Iterable[str] = "norm2") -> dict[str, nn.Module]:
    """The norms at these sites, by site name, in the model's order.

    Args:
        model: with sites: a `Transformer`, or what `families.with_sites` returns.
        where: site names or patterns, and `head.norm` for the norm of the MLM head of a `Transformer`. Of
            `ALL_NORMS` those that the model lacks are left out.

    Raises:
        UserError: a model without sites, or without a norm at these sites or on its head, or an unknown site.
    """
    patterns = [where] if isinstance(where, str) else list(where)
    params.require(hasattr(model, "sites"), f"{type(model).__name__} has no sites: take families.with_sites of it")
    params.require(len(patterns) > 0, "no site is named")
    wanted, sites = [pattern for pattern in patterns if pattern != "head.norm"], model.sites()
    if set(wanted) == set(ALL_NORMS):
        wanted = [pattern for pattern in wanted if pattern in {name.split(".")[-1] for name in sites}]
    found = {name: sites[name] for name in resolve(model, wanted)}
    found = {name: site.module if isinstance(site, Place) else site for name, site in found.items()}
    if "head.norm" in patterns:
        found["head.norm"] = getattr(getattr(model, "head", None), "norm", None)
        params.require(found["head.norm"] is not None, "no norm with parameters at head.norm")
    found = {name: norm for name, norm in found.items() if getattr(getattr(norm, "weight", None), "ndim", 0) == 1}
    params.require(len(found) > 0, f"no norm with parameters at {', '.join(patterns)}")
    return found


def counts(model: nn.Module, sigma: float = 3.0, where: str | Iterable[str] = "norm2") -> dict[str, Tensor]:
    """In how many norms the parameter of a dimension lies far from the mean of its norm.

    Far: more than `sigma` (unbiased) standard deviations of that parameter over the D dimensions, to either side.

    Returns:
        `weight` and `bias`: (D,) int64 each; no `bias` for norms without one (RMSNorm).

    Source: puccetti2022, released code (after Kovaleva et al. 2021), which looks at the output LayerNorms only.
    """
    chosen, found = norms(model, where).values(), {}
    for kind in ("weight", "bias"):
        rows = [getattr(norm, kind) for norm in chosen if getattr(norm, kind, None) is not None]
        if rows:
            values = torch.stack([row.detach().double().cpu() for row in rows])  # (norms, D)
            far = (values - values.mean(1, keepdim=True)).abs() > sigma * values.std(1, keepdim=True)
            found[kind] = far.sum(0)
    return found


def by_weight(
    model: nn.Module, sigma: float = 3.0, layers: int = 4, where: str | Iterable[str] = "norm2", top: int = 6
) -> list[int]:
    """Outlier dimensions by the rule of puccetti2022's code: far in weight, or in bias, of enough norms.

    Of each parameter, the dimensions that are far (see `counts`) in at least `layers` norms are sorted by
    that number, equal ones by their index. The two lists are dealt out in turn, weight first, as long as both
    have one left; of the first `top` cards each dimension counts once. A dimension may thus come from one list
    alone, and where one list is empty nothing is found. Norms without biases have one list, dealt as it is.

    Args:
        sigma: 3 in the library of the authors, 2.5 in their GLUE script.
        layers: 4 (of 12) with the authors.
        top: 6 in the library of the authors, 10 in their GLUE script.

    Returns:
        Dimensions in the order of the cards; at most `top`.

    Raises:
        UserError: a threshold that is not positive; what `norms` refuses.
    """
    params.require(sigma > 0, f"sigma must be positive, got {sigma}")
    params.require(layers >= 1, f"layers must be at least 1, got {layers}")
    lists = []
    for count in counts(model, sigma, where).values():
        order = count.sort(descending=True, stable=True).indices.tolist()
        lists.append([dim for dim in order if count[dim] >= layers])
    cards = [dim for pair in zip(*lists, strict=False) for dim in pair]
    return list(dict.fromkeys(cards[:top]))


def by_activation(measured: Measurement, top: int = 2) -> list[int]:
    """The dimensions with the largest |x| at any of the measured sites, largest first.

    Args:
        measured: from `probes.measure` with the meter `max_abs`, at sites of one width.
        top: 1 to D.

    Raises:
        UserError: more dimensions than there are, or sites of different widths.
    """
    rows = [found.maxima["largest"] for found in measured.sites.values()]
    params.require(len({len(row) for row in rows}) == 1, "the measured sites have different widths")
    params.require(1 <= top <= len(rows[0]), f"top must lie between 1 and {len(rows[0])}, got {top}")
    return torch.stack(rows).amax(0).topk(top).indices.tolist()


@contextmanager
def ablated(model: nn.Module, dims: Iterable[int], where: str | Iterable[str] = "norm2"):
    """Weight and bias of these dimensions set to zero in the named norms, for as long as the context is open.

    In a post-norm model this makes the dimension zero for every token after that norm. Afterwards, also
    after an exception, the parameters are what they were, to the bit. Nothing is trained in between. Contexts
    may be nested; one that is opened inside another is to be closed before it.

    Args:
        dims: dimensions, 0 to D - 1.
        where: as in `norms`; the default is the output LayerNorm of every block: 48 parameters of BERT-base for
            two dimensions. In pre-norm models (GPT-2, ViT, Llama) `norm2` is what the MLP reads, and the stream
            keeps the dimension.

    Yields:
        How many parameters were set to zero.

    Raises:
        UserError: what is no dimension, one out of range, or no such norm.

    Source: puccetti2022. The authors have two functions. One touches the blocks alone (fine-tuned models, MLM loss by
    layer), as here. The other (attention maps, token diversity, parts of speech) also hits the norm of an MLM head
    where BERT has one (the last two), 52 parameters for two dimensions: `where=("norm2", "head.norm")` here.
    """
    chosen = [parameter for norm in norms(model, where).values() for parameter in norm.parameters(recurse=False)]
    dims = params.dimensions(dims, min(parameter.numel() for parameter in chosen))
    kept = [parameter.data.clone() for parameter in chosen]
    try:
        for parameter in chosen:
            parameter.data[dims] = 0
        yield len(chosen) * len(set(dims))
    finally:
        for parameter, value in zip(chosen, kept, strict=True):
            parameter.data.copy_(value)
