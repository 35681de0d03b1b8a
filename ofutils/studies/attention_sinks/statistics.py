"""How much attention each head gives to which tokens, what it finds there, and what goes with it.

    survey(model, batches, groups)     per block: `SinkStatistics`, in one pass
    table(survey)                      one row per head, for a data frame
    correlations(survey)               one row per dimension, for a data frame
    outliers(model, batches, vocab)    per block: `OutlierCounts`, six-sigma entries by token, position, dimension

Groups of tokens are those of `sentences.token_groups`. Padding counts nowhere, neither as a query nor as a key,
except in the one number that says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ofutils import params, probes
from ofutils.probes import Batch
from ofutils.sentences import GROUPS
from ofutils.transformer import Transformer

#: What `SinkStatistics.correlation` can be asked for.
CORRELATIONS = ("input", "words", "output")
#: Families of transformers whose attention sees the whole row.
ENCODERS = ("bert", "roberta", "vit")


@dataclass
class SinkStatistics:
    """Streaming statistics of the heads of one block. Sums only; statistics of parts merge into the whole's.

    With P the probabilities of a head in one row of n tokens, the attention that position t receives is
    a_t = mean over queries of P[query, t]. A vertical line in the map of P is a large a_t; the *sink* of a
    head in a row is the position with the largest one. *Special* tokens are start and separator.
    """

    sums: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def add(
        self,
        probs: Tensor,
        v: Tensor,
        context: Tensor,
        before: Tensor,
        after: Tensor,
        groups: Tensor,
        mask: Tensor | None = None,
        gated: Tensor | None = None,
        causal: bool = False,
    ) -> None:
        """Take in one batch.

        Args:
            probs: (B, H, T, T), rows are queries.
            v, context: (B, T, D): values, and their sums weighted by attention (before a gate).
            before, after: (B, T, D): the hidden states that enter and leave the block.
            groups: (B, T), indices into `GROUPS`.
            mask: (B, T), true where there is a token and not padding.
            gated: (B, T, D), the context behind a gate; None where there is no gate.
            causal: whether a query sees no later key; those keys are no zeros.
        """
        mask, gated = torch.ones_like(groups) if mask is None else mask, context if gated is None else gated
        mask, fed = mask.bool(), mask.sum(1) > 1  # a row of one token has nowhere else to look
        probs, v, context, gated, before, after, groups, mask = (
            x[fed] for x in (probs, v, context, gated, before, after, groups, mask)
        )
        heads, exact = probs.shape[1], torch.promote_types(probs.dtype, torch.float32)
        received, sink = self._add_attention(probs, groups, mask, causal)
        v, context, gated = (x.unflatten(-1, (heads, -1)).to(exact) for x in (v, context, gated))  # (B, T, H, K)
        to_tokens = probs.to(exact) * mask[:, None, None]
        rest = to_tokens * (groups > 1)[:, None, None]  # to special tokens nothing
        handed, left = (x.sum(-1, keepdim=True) for x in (to_tokens, rest))  # clipped rows need not sum to 1
        rest = rest * (handed / left.clamp(min=torch.finfo(exact).tiny))
        undrained = (rest @ v.transpose(1, 2)).transpose(1, 2)
        self._add_values(v, {"output": context, "passed": gated, "undrained": undrained}, groups, sink, mask)
        everywhere = probs.to(exact).mean(2).double()  # (B, H, T), of padding queries too
        self._add_products("input", received, before, mask, centred=True)
        self._add_products("words", received, before, mask & (groups > 1), centred=True)
        self._add_products("output", everywhere, after, mask, centred=False)

    @torch.no_grad()
    def add_attention(self, probs: Tensor, groups: Tensor, mask: Tensor | None = None, causal: bool = False) -> None:
        """Take in the probabilities of one batch and nothing else: there are no values and no correlations then."""
        mask = torch.ones_like(groups, dtype=torch.bool) if mask is None else mask.bool()
        fed = mask.sum(1) > 1
        self._add_attention(probs[fed], groups[fed], mask[fed], causal)

    def _add_attention(self, probs: Tensor, groups: Tensor, mask: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """a_t (B, H, T) and the sink of each row (B, H)."""
        counts, exact = mask.sum(1).double(), torch.promote_types(probs.dtype, torch.float32)  # n
        received = torch.einsum("bhqk,bq->bhk", probs.to(exact), mask.to(exact)).double() * mask[:, None]
        received /= counts[:, None, None]  # (B, H, T): a_t
        self._sum(rows=len(probs), queries=counts.sum())
        kinds = nn.functional.one_hot(groups, len(GROUPS)).double() * counts[:, None, None]  # (B, T, G)
        self._sum(mass=torch.einsum("bhk,bkg->hg", received, kinds))
        shares = received / received.sum(-1, keepdim=True).clamp(min=1e-300)
        self._sum(evenness=(torch.special.entr(shares).sum(-1) / counts.log()[:, None]).sum(0))
        largest, sink = shares.max(-1)  # (B, H)
        self._sum(largest=largest.sum(0))
        visible = mask[:, :, None] & mask[:, None, :]  # (B, T, T)
        visible = visible.tril() if causal else visible
        self._sum(pairs=visible.sum(), zeros=((probs == 0) & visible[:, None]).sum((0, 2, 3)))
        return received, sink

    def _add_values(self, v: Tensor, outputs: dict[str, Tensor], groups: Tensor, sink: Tensor, mask: Tensor) -> None:
        """v and outputs: (B, T, H, K); sink: (B, H)."""
        tiny = torch.finfo(torch.float32).tiny
        length = v.norm(dim=-1).double()  # (B, T, H)
        at = length.gather(1, sink[:, None])[:, 0]  # (B, H)
        others = length.masked_fill(~mask[..., None], torch.inf).scatter(1, sink[:, None], torch.inf)
        middle = ((mask.sum(1) - 2) // 2)[:, None, None].expand_as(sink[:, None])  # the lower median of n - 1
        median = others.sort(1).values.gather(1, middle)[:, 0].clamp(min=tiny)  # (B, H)
        self._sum(log_ratio=(at / median).clamp(min=tiny).log().sum(0))
        kinds = nn.functional.one_hot(groups, len(GROUPS)).double() * mask[..., None]  # (B, T, G)
        logs = (length / median[:, None]).clamp(min=tiny).log()  # (B, T, H)
        self._sum(log_values=torch.einsum("bth,btg->hg", logs, kinds), counts=kinds.sum((0, 1)))
        for name, x in outputs.items():
            mean = (x.norm(dim=-1).double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, H)
            self._sum(**{name: (mean / median).sum(0)})

    def _add_products(self, name: str, received: Tensor, hidden: Tensor, mask: Tensor, centred: bool) -> None:
        a, x = received.transpose(1, 2), hidden.abs().double()  # (B, T, H), (B, T, D)
        sizes = {"a size": a[mask].square().sum(0), "x size": x[mask].square().sum(0)}
        if centred:  # by row
            real, count = mask[..., None].double(), mask.sum(1).clamp(min=1)[:, None, None]
            a, x = (one - (one * real).sum(1, keepdim=True) / count for one in (a, x))
        a, x = a[mask], x[mask]  # (n, H), (n, D)
        parts = {"n": torch.tensor(len(a)), "a": a.sum(0), "aa": a.square().sum(0)} | sizes
        parts |= {"x": x.sum(0), "xx": x.square().sum(0), "ax": a.T @ x}
        self._sum(**{f"{name} {key}": part for key, part in parts.items()})

    def _sum(self, **parts) -> None:
        for name, part in parts.items():
            part = torch.as_tensor(part).double().cpu()
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def merge(self, other: "SinkStatistics") -> "SinkStatistics":
        """The statistics of both parts together."""
        whole = SinkStatistics(dict(self.sums))
        whole._sum(**other.sums)
        return whole

    @property
    def shares(self) -> Tensor:
        """(H, G) float64: of each head's attention, the share that goes to each group of tokens."""
        return self.sums["mass"] / self.sums["queries"]

    @property
    def numbers(self) -> dict[str, Tensor]:
        """What is said of each head in one number, (H,) float64 each; means are over rows.

        `evenness`: column entropy, entropy of a_t over log n: 1 all columns alike, 0 one has it all, or, behind a
        clipped softmax, the head hands out nothing. `largest`: of the attention that a head hands out in a row, the
        share of the sink (clipped probabilities need not sum to 1; of nothing the share is 0). `zeros`: of the
        probabilities of visible keys, the share that is exactly zero. `value_ratio`: |v| at the sink over the median
        |v| of the row's other tokens, geometric mean. `output`: mean |context| of a row's queries over the same
        median; near 0 the head does nothing, at 1 it hands on what one token holds. `undrained`: what `output` would
        be if the attention to special tokens went to the others, in proportion. `passed`: what a gate lets through
        of `output`; `output` where there is no gate. Without values (`add_attention`) the first three alone.
        """
        rows = self.sums["rows"]
        found = {"evenness": self.sums["evenness"] / rows, "largest": self.sums["largest"] / rows}
        found["zeros"] = self.sums["zeros"] / self.sums["pairs"]
        if "log_ratio" in self.sums:
            found["value_ratio"] = (self.sums["log_ratio"] / rows).exp()
            found |= {name: self.sums[name] / rows for name in ("output", "undrained", "passed")}
        return found

    @property
    def values(self) -> Tensor:
        """(H, G): |v| over the same median |v|, geometric mean over the tokens of each group; nan of none."""
        return (self.sums["log_values"] / self.sums["counts"]).exp()

    def correlation(self, hidden: str = "input") -> Tensor:
        """Pearson's r over tokens between |h_t[d]| and the attention that t receives, for every head and dimension.

        Args:
            hidden: `input`: h enters the block, so that attention can depend on it; both are taken as deviations
                from their mean in the row, since a_t is 1 / n on average and long rows would stand out;
                `words`: the same among tokens that are not special; `output`: h leaves the block, a_t averages
                over padding queries too, and no mean is taken off, as in the authors' code.

        Returns:
            (H, D) float64 in [-1, 1]; nan where either is constant.

        Source: puccetti2022, released code.
        """
        params.require(hidden in CORRELATIONS, f"unknown hidden state {hidden!r}; known: {', '.join(CORRELATIONS)}")
        n, a, aa, x, xx, ax = (self.sums[f"{hidden} {key}"] for key in ("n", "a", "aa", "x", "xx", "ax"))
        spread_a, spread_x = ((s2 / n - (s / n).square()).clamp(min=0) for s, s2 in ((a, aa), (x, xx)))
        sizes = (self.sums[f"{hidden} {part} size"] / n for part in "ax")
        flat_a, flat_x = (s2 <= 1e-12 * size for s2, size in zip((spread_a, spread_x), sizes, strict=True))
        r = (ax / n - torch.outer(a, x) / n**2) / torch.outer(spread_a.sqrt(), spread_x.sqrt())
        return r.masked_fill(flat_a[:, None] | flat_x, torch.nan).clamp(-1, 1)


@torch.no_grad()
def survey(
    model: nn.Module, batches: Iterable[Batch], groups: Tensor, only_attention: bool = False
) -> list[SinkStatistics]:
    """`SinkStatistics` of every block, in one pass.

    Args:
        model: with sites `probs`, `v`, `context`, `resid_pre`: a `Transformer`, or `families.with_sites` of a
            model with eager attention.
        batches: as for `probes.measure`.
        groups: (V,), from `token_groups`.
        only_attention: take in `probs` alone, see `SinkStatistics.add_attention`; for many looks at one model.

    Raises:
        UserError: no batches, or a site that the model lacks.
    """
    layers = sum(name.endswith(".probs") for name in model.sites())
    last = "norm_final" if "norm_final" in model.sites() else f"blocks.{layers - 1}.norm2"
    streams = [*(f"blocks.{layer}.resid_pre" for layer in range(layers)), last]
    found = [SinkStatistics() for _ in range(layers)]
    gated = ["gated"] if "blocks.0.gated" in model.sites() else []
    causal = model.config.causal if isinstance(model, Transformer) else model.model.config.model_type not in ENCODERS
    with probes.capture(model, ["probs"] if only_attention else ["probs", "v", "context", *gated, *streams]) as kept:
        for batch in batches:
            probes.run(model, batch)
            ids, mask = (x.to(kept["blocks.0.probs"].device) for x in probes.ids_and_mask(batch))
            of = groups.to(ids.device)[ids]
            for layer, statistics in enumerate(found):
                if only_attention:
                    statistics.add_attention(kept[f"blocks.{layer}.probs"], of, mask, causal)
                    continue
                own = [kept[f"blocks.{layer}.{site}"] for site in ("probs", "v", "context")]
                hidden = kept[streams[layer]], kept[streams[layer + 1]]
                statistics.add(*own, *hidden, of, mask, kept.get(f"blocks.{layer}.gated"), causal)
    params.require(bool(found and found[0].sums.get("rows")), "nothing to survey: no attention, no row of two tokens")
    return found


def table(survey: list[SinkStatistics]) -> list[dict]:
    """One row per head: block, head, its share for each group, |v| at each group, and its numbers."""
    rows = []
    for block, one in enumerate(survey):
        columns = dict(zip(GROUPS, one.shares.T.tolist(), strict=True))
        columns |= {f"value_{name}": column for name, column in zip(GROUPS, one.values.T.tolist(), strict=True)}
        columns |= {name: values.tolist() for name, values in one.numbers.items()}
        for head in range(len(one.shares)):
            rows.append({"block": block, "head": head} | {name: values[head] for name, values in columns.items()})
    return rows


def over_heads(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, D) of `SinkStatistics.correlation` -> smallest, mean and largest over heads, (D,) each.

    A head whose attention is constant has no r and is left out; of no head at all they are nan.
    """
    live = r[~r.isnan().all(1)]
    live = live if len(live) else r
    return live.amin(0), live.mean(0), live.amax(0)


def correlations(survey: list[SinkStatistics], hidden: str = "input") -> list[dict]:
    """One row per block and dimension: the smallest, the mean and the largest r over heads (`low`, `r`, `high`).

    Args:
        hidden: as for `SinkStatistics.correlation`.
    """
    rows = []
    for block, one in enumerate(survey):
        parts = (part.tolist() for part in over_heads(one.correlation(hidden)))
        for dimension, (low, mean, high) in enumerate(zip(*parts, strict=True)):
            where = {"hidden": hidden, "block": block, "dimension": dimension}
            rows.append(where | {"low": low, "r": mean, "high": high})
    return rows


@dataclass
class OutlierCounts:
    """How many entries lie more than six standard deviations from the mean of their row, and where.

    Rows are sequences, as in `streaming.Statistics`, whose counts by position and dimension these equal.
    """

    by_token: Tensor  # (V,) int64: by the id of the token
    by_dimension: Tensor  # (D,)
    by_position: Tensor  # (longest row,)
    tokens: Tensor  # (V,): how often each id was there

    def by_group(self, groups: Tensor) -> Tensor:
        """(2, G) float64: of the outliers, and of the tokens, the share that each group has; nan of nothing."""
        sums = torch.zeros(2, len(GROUPS), dtype=torch.float64)
        for row, counts in enumerate((self.by_token, self.tokens)):
            sums[row].index_add_(0, groups, counts[: len(groups)].double())
        return sums / sums.sum(1, keepdim=True)


@torch.no_grad()
def outliers(model: nn.Module, batches: Iterable[Batch], vocab: int, site: str = "mlp_out") -> list[OutlierCounts]:
    """Six-sigma outliers of every block at one site: by token, by dimension, by position.

    Args:
        vocab: V, the number of ids.
        site: a bare name, by default the output of the FFN.

    Source: bondarenko2023, footnote 1 and Figure 1 (after Bondarenko et al. 2021).
    """
    names = [name for name in probes.resolve(model, site) if name.startswith("blocks.")]
    split = [(batch, *probes.ids_and_mask(batch)) for batch in batches]
    params.require(bool(names and split), f"nothing to count: no batches, or no block has {site}")
    longest, sums = max(ids.shape[1] for _, ids, _ in split), {}
    with probes.capture(model, names) as kept:
        for batch, ids, mask in split:
            probes.run(model, batch)
            for name in names:
                counts = _count(kept[name].cpu(), ids.cpu(), mask.cpu(), vocab, longest)
                sums[name] = [a + b for a, b in zip(sums[name], counts, strict=True)] if name in sums else counts
    return [OutlierCounts(*sums[name]) for name in names]


def _count(x: Tensor, ids: Tensor, mask: Tensor, vocab: int, longest: int) -> list[Tensor]:
    """By token, by dimension, by position, and the tokens; x is (B, T, D)."""
    real = x.double().masked_fill(~mask[..., None], torch.nan)
    deviation = (real - real.nanmean((1, 2), keepdim=True)).abs()
    entries = mask.sum(1)[:, None, None] * x.shape[-1]  # (B, 1, 1)
    limit = 6 * (deviation.square().nansum((1, 2), keepdim=True) / (entries - 1)).sqrt()
    row, position, dimension = (deviation > limit).nonzero(as_tuple=True)  # padding is nan
    places = ((ids[row, position], vocab), (dimension, x.shape[-1]), (position, longest), (ids[mask], vocab))
    return [torch.bincount(place, minlength=size) for place, size in places]
