"""Attention head by head: maps as the papers draw them, gates, what a head does not read, and controls.

head_map(model, batch, block, head)     probabilities, values, their product, gate: `HeadMap`; `gallery` draws them
gates(model, batches)                   per block: what the gates of gated attention let through
unread(model, dimensions, by)           queries, keys or values that are blind to some dimensions
standing(surveys, rules, others)        correlations of named dimensions beside random sets of as many
language_heads(model, batches)          the same numbers of the heads of a language model, and its gates
outlier_panels(blocks, ..)              outliers by token, position and dimension, as `figures.outliers` draws them
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ofutils import params, probes
from ofutils.probes import Batch, Place
from ofutils.sentences import GROUPS
from ofutils.studies.attention_sinks import statistics
from ofutils.studies.attention_sinks.statistics import OutlierCounts, SinkStatistics
from ofutils.transformer import Transformer


@dataclass(frozen=True)
class HeadMap:
    """What one head does in one row of T tokens; all on the CPU."""

    probs: Tensor  # (T, T), rows are queries
    values: Tensor  # (T, K)
    product: Tensor  # (T, K), the sum of the values weighted by probs
    gate: Tensor | None = None  # (T,), what the gate lets through
    gated: Tensor | None = None  # (T, K), the product behind it


@torch.no_grad()
def head_map(model: nn.Module, batch: Batch, block: int, head: int) -> HeadMap:
    """The map of one head on the first row of a batch without padding.

    Args:
        model: with sites `probs`, `v`, `context`.

    Raises:
        UserError: a block or a head that the model does not have.
    """
    names = {site: f"blocks.{block}.{site}" for site in ("probs", "v", "context", "gate")}
    params.require(names["probs"] in model.sites(), f"no block {block} in this model, or no attention to look at")
    with probes.capture(model, [name for name in names.values() if name in model.sites()]) as kept:
        probes.run(model, batch)
    row = {site: kept[name][0].cpu() for site, name in names.items() if name in kept}
    heads = len(row["probs"])  # (H, T, T)
    params.require(0 <= head < heads, f"no head {head}: this model has heads 0 to {heads - 1}")
    values, product = (row[site].unflatten(-1, (heads, -1))[:, head] for site in ("v", "context"))  # (T, K)
    gate = row["gate"][:, head] if "gate" in row else None  # (T,)
    return HeadMap(row["probs"][head], values, product, gate, None if gate is None else product * gate[:, None])


def gallery(picks: list[tuple[str, HeadMap, list[str]]], title: str) -> tuple[Figure, pd.DataFrame]:
    """One row for each head: probabilities, values, product; with a gate, also the gate and what passes it.

    Values and products of a row share one colour scale, from blue over white to red; rows do not.

    Args:
        picks: title of the row, map, names of its T tokens.
        title: of the figure.

    Returns:
        The figure, and a row for each head and token: attention received, |v|, |product|, gate (nan without).
    """
    gated = any(found.gate is not None for _, found, _ in picks)
    widths, height = ([1.3, 1.1, 1.3, 0.12, 1.3] if gated else [1.3, 1.5, 1.7]), 1 + 0.1 * len(picks[0][2])
    shape = {"figsize": (15, height * len(picks) + 0.5), "width_ratios": widths, "squeeze": False}
    (fig, axs), rows = plt.subplots(len(picks), len(widths), **shape), []
    for axes, (name, found, names) in zip(axs, picks, strict=True):
        _draw(axes, found, names, name)
        sizes = [found.probs.mean(0), found.values.norm(dim=-1), found.product.norm(dim=-1)]
        sizes.append(torch.full((len(names),), torch.nan) if found.gate is None else found.gate)
        rows += [(name, token, *map(float, of)) for token, *of in zip(names, *sizes, strict=True)]
    fig.suptitle(title, x=0, ha="left")
    return fig, pd.DataFrame(rows, columns=["head", "token", "received", "value", "product", "gate"])


def _draw(axes, found: HeadMap, names: list[str], title: str) -> None:
    reach = max(float(found.values.abs().max()), 1e-12)
    signed = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
    level = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    images = [(found.probs, level), (found.values, signed), (found.product, signed)]
    images += [] if found.gate is None else [(found.gate[:, None], level), (found.gated, signed)]
    titles = [title, "values", "probabilities x values", "gate", "   gated"]
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    for ax, (image, colours), name in zip(axes, images, titles, strict=False):
        drawn = ax.imshow(image.numpy(), aspect="auto", interpolation="nearest", **colours)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name)
        ax.set_xlabel("dimension of the head" if image.shape[1] > 1 and ax is not axes[0] else "")
        if ax is axes[0] or ax is axes[2]:
            plt.colorbar(drawn, ax=ax, shrink=0.85)
    places = range(len(names))
    axes[0].set_yticks(places, names, fontsize=7)
    axes[0].set_xticks(places, names, fontsize=7, rotation=90)


@torch.no_grad()
def gates(model: Transformer, batches: Iterable[Batch]) -> list[Tensor]:
    """pi of every block: the gate's value for each token and head, (N, H) in (0, 1) on the CPU, padding left out.

    Raises:
        UserError: a model without gates.
    """
    parts: list[list[Tensor]] = []
    with probes.capture(model, "gate") as kept:
        for batch in batches:
            probes.run(model, batch)
            real = probes.ids_and_mask(batch)[1].cpu()
            parts.append([pi.cpu()[real] for pi in kept.values()])
    return [torch.cat(block) for block in zip(*parts, strict=True)]


@contextmanager
def unread(model: nn.Module, dimensions: Iterable[int], by: str = "k"):
    """The maps to queries (`q`), keys (`k`) or values (`v`) do not read these dimensions, in every block.

    The columns of their matrices are zero for as long as the context is open. No hidden state is edited, they
    change through attention alone: what `dims.ablated` does by rescaling in the next LayerNorm is left out.

    Args:
        model: a `Transformer`, or `families.with_sites` of a BERT or RoBERTa.

    Raises:
        UserError: anything else than q, k or v; a dimension out of range.
    """
    params.require(by in ("q", "k", "v"), f"by must be q, k or v, got {by!r}")
    sites = model.sites()
    places = [sites[name] for name in probes.resolve(model, by)]
    weights = [(place.module if isinstance(place, Place) else place).weight for place in places]
    chosen = params.dimensions(dimensions, weights[0].shape[1])
    kept = [weight.data.clone() for weight in weights]
    try:
        for weight in weights:
            weight.data[:, chosen] = 0
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)


def standing(surveys: list[list[SinkStatistics]], rules: dict[str, list[int]], others: list[int]) -> pd.DataFrame:
    """For every draw, block, rule and hidden state: the largest r (mean over heads) among a rule's dimensions.

    Args:
        surveys: one per draw.
        rules: rule -> dimensions; those without any have no row.
        others: what random sets are drawn from.

    Returns:
        Columns draw, block, rule, hidden, r; `random sets`, the 95th percentile of what 200 random sets of as many
        others reach; `excess`, r less that, or less 0 where that is negative. nan where nothing varies.
    """
    rows = []
    for draw, survey in enumerate(surveys):
        for block, one in enumerate(survey):
            for hidden in statistics.CORRELATIONS:
                r = statistics.over_heads(one.correlation(hidden))[1]
                for rule, own in rules.items():
                    rows += [(draw, block, rule, hidden, *_beyond(r, own, others))] if own else []
    found = pd.DataFrame(rows, columns=["draw", "block", "rule", "hidden", "r", "random sets"])
    return found.assign(excess=found["r"] - found["random sets"].clip(lower=0))


def _beyond(r: Tensor, dimensions: list[int], others: list[int], sets: int = 200) -> tuple[float, float]:
    """A dimension that is constant has no r and is no candidate; the random sets are the same at every call."""
    own, rest = (x[~x.isnan()] for x in (r[dimensions], r[others]))
    if not len(own) or not len(rest):
        return torch.nan, torch.nan
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(len(rest), generator=generator)[: len(dimensions)] for _ in range(sets)])
    return float(own.max()), float(rest[drawn].amax(1).quantile(0.95))


def language_heads(model: Transformer, batches: list[Tensor]) -> list[dict]:
    """`statistics.table` of a model without special tokens, less what concerns them; and `pi`, the mean of each gate.

    Returns:
        One row per head; `pi` is nan where there is no gate.
    """
    alike = torch.full((model.config.vocab,), GROUPS.index("other"))
    rows = pd.DataFrame(statistics.table(statistics.survey(model, batches, alike)))
    gated = "blocks.0.gate" in model.sites()
    pi = torch.stack([one.mean(0) for one in gates(model, batches)]).flatten().tolist() if gated else torch.nan
    unasked = [*GROUPS, *(f"value_{group}" for group in GROUPS), "undrained"]
    return rows.drop(columns=unasked).assign(pi=pi).to_dict("records")


def outlier_panels(blocks: list[OutlierCounts], lengths: list[int], groups: Tensor, tokenizer):
    """What `figures.outliers` draws of one block.

    Args:
        blocks: of that block, one for each draw.
        lengths: tokens of every row of all draws.
        groups: (V,), from `sentences.token_groups`.

    Returns:
        Panels by name: outliers per occurrence of the ten tokens that have most outliers, per token at each
        position (where a fiftieth of the rows reach), and in all of the six dimensions that have most, and more
        than a hundredth; and the group of each of these tokens.
    """
    by_token, seen = (sum(getattr(one, name) for one in blocks) for name in ("by_token", "tokens"))
    order = [token for token in by_token.topk(min(10, len(by_token))).indices.tolist() if by_token[token]]
    by_position = pd.concat([pd.Series(one.by_position.numpy()) for one in blocks]).groupby(level=0).sum()
    there = pd.Series({place: sum(length > place for length in lengths) for place in by_position.index})
    by_position = (by_position / there)[there > len(lengths) / 50]  # of fewer rows it says nothing
    rate = pd.Series((by_token / seen.clamp(min=1))[order].numpy(), tokenizer.convert_ids_to_tokens(order))
    counts = pd.Series(sum(one.by_dimension for one in blocks).numpy())
    counts = counts[counts > counts.sum() / 100].nlargest(6)
    rate = rate.sort_values(ascending=False)
    panels = {"by token": (rate, "outliers per occurrence")}
    panels |= {"by position": (by_position, "outliers per token"), "by dimension": (counts, "outliers")}
    return panels, [GROUPS[groups[token]] for token in tokenizer.convert_tokens_to_ids(list(rate.index))]
