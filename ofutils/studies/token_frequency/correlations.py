"""How the size of each hidden dimension goes with the frequency of the token.

    correlate(model, batches, counts, kept)     |h| with frequency, all dimensions and sites in one pass

Three levels: over tokens, over types, and over tokens within positions (both sides centred at each position).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from ofutils import params
from ofutils.probes import Batch, evaluating, hooked, ids_and_mask, resolve, run

#: What `Correlations.r` computes.
MEASURES = ("raw", "log", "spearman")
#: Over what: each occurrence, each id once, each occurrence against others at the same position.
LEVELS = ("token", "type", "position")
_BINS = 256  # of |h|, for ranks
_SETTLE = 2048  # about so many tokens settle the bins, of rows all over the text
_PERCENTILES = {"p5": 0.05, "p25": 0.25, "p75": 0.75, "p95": 0.95, "p100": 1.0}


@dataclass
class Correlations:
    """Correlations of |h| with token frequency, for every dimension of every site; from `correlate`."""

    sites: list[str]
    kept: list[str]
    counts: list[str]
    followed: list[int]
    tables: Tensor = field(repr=False)  # (P, 4, U): in the set, raw, log, rank; P pairs of set and counts, U types
    places: Tensor = field(repr=False)  # (3, N): the type, the position and the row of each token
    sums: list[dict[str, Tensor]] = field(repr=False)  # per site

    def _pair(self, kept: str, counts: str) -> int:
        params.require_known("set of tokens", kept, self.kept)
        params.require_known("counts", counts, self.counts)
        return self.kept.index(kept) * len(self.counts) + self.counts.index(counts)

    def tokens(self, kept: str, counts: str, level: str = "token") -> int:
        """How many tokens (or types) a correlation rests on."""
        inside = self.tables[self._pair(kept, counts), 0]
        return int(inside.sum() if level == "type" else inside[self.places[0]].sum())

    def r(self, measure: str, kept: str, counts: str, level: str = "token") -> Tensor:
        """Correlation of |h| with frequency.

        Args:
            measure: `raw` (Pearson, with counts, as puccetti2022), `log` (Pearson, with log(1 + count)) or
                `spearman` (ranks; at the level of tokens |h| is sorted into 256 bins of about equal size).
            kept: name of a set of ids.
            counts: name of counts.
            level: `token` (each occurrence counts), `type` (the mean |h| of an id counts once) or `position`:
                of tokens, both sides less their means over all tokens at the same place of a row. That is the
                partial correlation given the position, whatever its influence; for raw and log.

        Returns:
            (sites, D) float64; nan where one side does not vary.
        """
        pair = self._pair(kept, counts)
        _check(measure, level)
        if level == "type":
            found = [self._over_types(one["types"], pair, measure) for one in self.sums]
        elif measure == "spearman":
            weight = self.tables[pair, 0, self.places[0]]
            ranks = weight * self.tables[pair, 3, self.places[0]]
            spread = ranks.square().sum() - weight.sum() * ((weight.sum() + 1) / 2) ** 2
            found = [_rank_correlation(one["n"][pair], one["ranks"][pair], spread) for one in self.sums]
        else:
            found = [self._over_tokens(one, pair, measure, level == "position") for one in self.sums]
        unknown = torch.stack([one["products"][pair, 2].isnan() for one in self.sums])  # ranks of nan are numbers
        return torch.stack(found).masked_fill(unknown, torch.nan)

    def interval(
        self, measure: str, kept: str, counts: str, level: str = "token", coverage: float = 0.9, draws: int = 500
    ) -> Tensor:
        """A bootstrap interval of `r` for the followed dimensions: rows (sentences) are drawn with replacement.

        The resampled r are centred at the r of all rows: a resample lacks about a third of the rows, and with
        them rare types, which moves r at the level of types.

        Args:
            measure, kept, counts, level: as for `r`. Ranks are exact here, without bins.
            coverage: between the two ends, as much left out below as above.

        Returns:
            (2, sites, F): lower and upper end, for each followed dimension. The same at every call.

        Raises:
            UserError: no dimensions were followed.
        """
        pair = self._pair(kept, counts)
        _check(measure, level)
        params.require(len(self.followed) > 0, "no dimension is followed: correlate(..., followed=[...])")
        fine = 0 < coverage < 1 and draws > 0
        params.require(fine, f"an interval has a coverage in (0, 1) and some draws, not {coverage} and {draws}")
        inside = self.tables[pair, 0, self.places[0]] > 0
        types, positions, rows = self.places[:, inside]
        x = self.tables[pair, 2 if measure == "log" else 1]  # (U,)
        h = torch.cat([one["followed"] for one in self.sums], 1)[inside]  # (N, S F)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(count := int(self.places[2].max()) + 1, (draws, count), generator=generator)
        plain = h
        if measure == "spearman" and level == "token":
            x, h = _codes(x[:, None])[:, 0], _codes(h)
        weights = [torch.bincount(one, minlength=count)[rows].double() for one in drawn]  # (N,) each
        found = [
            _resampled(x, h, types, positions, weight, measure, level)
            for weight in [torch.ones_like(weights[0]), *weights]
        ]
        whole, *found = torch.stack(found).masked_fill(plain.isnan().any(0), torch.nan)  # codes of nan are numbers
        found = torch.stack(found) - torch.stack(found).nanmean(0) + whole
        ends = torch.tensor([1 - coverage, 1 + coverage], dtype=torch.float64) / 2
        return found.nanquantile(ends, 0).view(2, len(self.sites), -1)

    def distances(self, kept: str, counts: str) -> Tensor:
        """How far the root mean square of a dimension over tokens lies from the mean over dimensions.

        Returns:
            (sites, D) in standard deviations over the dimensions of a site: outlier dimensions lie far above 0.
        """
        pair = self._pair(kept, counts)
        rms = torch.stack([one["products"][pair, 2] for one in self.sums]).sqrt()  # up to a factor
        return (rms - rms.mean(1, keepdim=True)) / rms.std(1, keepdim=True)

    def lines(
        self, chosen: Iterable[int], measure: str, kept: str, counts: str, level: str = "token"
    ) -> pd.DataFrame:
        """r of the chosen dimensions, and percentiles over all other dimensions, as a long table.

        Args:
            chosen: dimensions.
            measure, kept, counts, level: as for `r`.

        Returns:
            Columns block (the site's index), line (a dimension, or `p5` to `p95` and `p100`, the largest) and r,
            and what was asked for: measure, tokens, table, level.
        """
        r, chosen = self.r(measure, kept, counts, level), list(chosen)
        rest = r[:, [dim for dim in range(r.shape[1]) if dim not in chosen]]
        found = {str(dim): r[:, dim] for dim in chosen}
        found |= {name: rest.nanquantile(at, 1) for name, at in _PERCENTILES.items()}
        table = pd.DataFrame({name: values.numpy() for name, values in found.items()}).rename_axis("block")
        table = table.reset_index().melt("block", var_name="line", value_name="r")
        return table.assign(measure=measure, tokens=kept, table=counts, level=level)

    def against_others(self, chosen: Mapping[int, int], *asked: str) -> pd.DataFrame:
        """r of each chosen dimension at one site of its own, against all that are not chosen, at that site.

        Args:
            chosen: dimension -> index of the site.
            asked: as for `r`.

        Returns:
            Columns dimension, block, r; p95, the others' 95th percentile; above, r less that; rank and rank by
            size, 1 where no other dimension has a larger r, or |r|.
        """
        r, rows = self.r(*asked), []
        others = [dim for dim in range(r.shape[1]) if dim not in chosen]
        for dim, block in chosen.items():
            own, rest = r[block, dim], r[block, others]
            p95 = rest.nanquantile(0.95)
            ranks = [1 + int((some > one).sum()) for some, one in ((rest, own), (rest.abs(), own.abs()))]
            rows.append([dim, block, float(own), float(p95), float(own - p95), *ranks])
        return pd.DataFrame(rows, columns=["dimension", "block", "r", "p95", "above", "rank", "rank by size"])

    def _over_tokens(self, sums: dict[str, Tensor], pair: int, measure: str, within: bool) -> Tensor:
        """Pearson's r from sums over cells: each position is one, or all tokens are."""
        types, cells, _ = self.places
        which = 1 if measure == "raw" else 2
        h = sums["cells"][pair]  # (T, D)
        n, x = (torch.bincount(cells, self.tables[pair, index, types], len(h)) for index in (0, which))
        if not within:
            n, x, h = (one.sum(0, keepdim=True) for one in (n, x, h))
        n, xx, hh = n.clamp(min=1), self.tables[pair, which, types].square().sum(), sums["products"][pair, 2]
        spread_x, spread_h = xx - (x * x / n).sum(), hh - (h * h / n[:, None]).sum(0)
        flat = (spread_x <= 1e-12 * xx) | (spread_h <= 1e-12 * hh)  # constant but for rounding
        shared = sums["products"][pair, which - 1] - (x / n) @ h
        return (shared / (spread_x * spread_h).clamp(min=0).sqrt()).masked_fill(flat, torch.nan)

    def _over_types(self, types: Tensor, pair: int, measure: str) -> Tensor:
        inside = self.tables[pair, 0] > 0
        x = self.tables[pair, 1 if measure != "log" else 2, inside]
        h = types[inside] / torch.bincount(self.places[0])[inside, None]  # (U', D)
        if measure == "spearman":
            x, h = mid_ranks(x[:, None])[:, 0], mid_ranks(h)
        x, h = x - x.mean(), h - h.mean(0)
        return (x @ h) / (x.square().sum() * h.square().sum(0)).sqrt()


def correlate(
    model: nn.Module,
    batches: Iterable[Batch],
    counts: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    where: str | Iterable[str] = "norm2",
    followed: Iterable[int] = (),
) -> Correlations:
    """How |h| goes with token frequency, for every dimension of every site, in one pass over the model.

    For token t, dimension j and a frequency x:  r_j = corr_t(x(t), |h_{t,j}|). Only sums are kept, and the
    activations of the followed dimensions; padding counts nowhere. The result does not depend on how the rows
    are split into batches.

    Args:
        batches: mappings with `input_ids` (B, T) and `attention_mask`, or tensors of ids.
        counts: name -> (V,) counts; tokens whose count is nan are left out of that correlation.
        kept: name -> (V,) bool, which ids count, as `frequency.kinds` gives them.
        where: sites. In a post-norm BERT `norm2` is what puccetti2022 takes: the output of each block.
        followed: a few dimensions, for `Correlations.interval`.

    Raises:
        UserError: no batches, an id beyond the counts, an unknown site, a dimension out of range.

    Source: puccetti2022, released code, which takes `raw` for two dimensions and ten others at random, with
    counts mapped as in `counts.as_the_authors`. Departure: ids are counted by id.
    """
    batches, followed = list(batches), list(followed)
    split = [ids_and_mask(batch) for batch in batches]
    params.require(any(mask.any() for _, mask in split), "nothing to correlate: no batches, or no tokens in them")
    params.require(len(counts) > 0 and len(kept) > 0, "nothing to correlate with: name counts and a set of tokens")
    masks, ids = [mask for _, mask in split], torch.cat([one[mask] for one, mask in split])
    vocab, largest = min(map(len, [*counts.values(), *kept.values()])), int(ids.max())
    params.require(largest < vocab, f"token id {largest} lies beyond the counts, which have {vocab} ids")
    types, inverse, seen = ids.unique(return_inverse=True, return_counts=True)
    rows = torch.cat([mask.sum(1) for mask in masks])  # tokens of each
    positions = torch.cat([(mask.cumsum(1) - 1)[mask] for mask in masks])
    places = torch.stack([inverse, positions, torch.arange(len(rows)).repeat_interleave(rows)])
    parts = places.split([int(mask.sum()) for mask in masks], 1)
    tables = torch.stack([_table(c[types], k[types].bool(), seen) for k in kept.values() for c in counts.values()])
    meters = {name: _Meter(tables, int(rows.max()), followed) for name in resolve(model, where)}
    chosen = (torch.arange(len(rows)) % max(1, len(ids) // _SETTLE) == 0).split([len(mask) for mask in masks])
    few = [(_rows(b, c), m[c], None) for b, m, c in zip(batches, masks, chosen, strict=True) if c.any()]
    with evaluating(model):
        for batch, mask, part in [*few, *zip(batches, masks, parts, strict=True)]:
            reading = {n: lambda x, m=m: m.add(x, mask, part) for n, m in meters.items()}  # noqa: B023
            with hooked(model, reading):
                run(model, batch)
    sums = [meter.finish() for meter in meters.values()]
    return Correlations(list(meters), list(kept), list(counts), followed, tables, places, sums)


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    return batch[chosen] if torch.is_tensor(batch) else {name: value[chosen] for name, value in batch.items()}


def mid_ranks(x: Tensor) -> Tensor:
    """(n, D) -> ranks 1 to n along the first axis; equal values share the mean of their ranks."""
    return _ranks(_codes(x), torch.ones(len(x), dtype=torch.float64))


def _codes(x: Tensor) -> Tensor:
    """(n, D) -> int64: 0 for the smallest value of each column, 1 for the next one, and so on."""
    ordered, order = x.sort(0)
    steps = (ordered[1:] != ordered[:-1]).long().cumsum(0)
    return torch.zeros_like(order).scatter_(0, order[1:], steps)


def _ranks(codes: Tensor, weight: Tensor) -> Tensor:
    """Codes (n, D) -> ranks, each row counted `weight` (n,) times."""
    place = codes + len(codes) * torch.arange(codes.shape[1])
    size = torch.bincount(place.flatten(), weight[:, None].expand_as(codes).flatten(), codes.numel())
    size = size.double().view(codes.shape[1], -1)  # (D, n)
    return (size.cumsum(1) - size / 2 + 0.5).flatten()[place]


def _check(measure: str, level: str) -> None:
    params.require_known("measure", measure, MEASURES)
    params.require_known("level", level, LEVELS)
    params.require((measure, level) != ("spearman", "position"), "within positions r is raw or log, not spearman")


def _resampled(x: Tensor, h: Tensor, types: Tensor, positions: Tensor, weight: Tensor, measure: str, level: str):
    """r between x (U,), by type, and each column of h (n, K), each token counted `weight` (n,) times."""
    if level == "type":
        size = torch.bincount(types, weight, len(x))
        there = size > 0
        h = h.new_zeros(len(x), h.shape[1]).index_add_(0, types, h * weight[:, None])[there] / size[there, None]
        x, weight, codes = x[there], torch.ones(len(h), dtype=h.dtype), _codes
    else:
        x, codes = x[types], lambda codes: codes
    both = torch.cat([x[:, None], h], 1)  # (n, 1 + K)
    both = _ranks(codes(both), weight) if measure == "spearman" else both
    cells = positions if level == "position" else torch.zeros(len(both), dtype=torch.long)
    size = torch.bincount(cells, weight).clamp(min=1)
    sums = both.new_zeros(len(size), both.shape[1]).index_add_(0, cells, both * weight[:, None])
    both = both - (sums / size[:, None])[cells]
    x, h = both[:, 0], both[:, 1:]
    return (weight * x) @ h / ((weight @ x.square()) * (weight @ h.square())).sqrt()


def _table(counts: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    """(4, U): whether a type counts, its count over the largest, its log, its rank among the tokens of the text."""
    inside = kept & counts.isfinite()
    x = counts.double().masked_fill(~inside, 0)
    rank = torch.zeros_like(x)
    rank[inside] = _ranks(_codes(x[inside, None]), seen[inside].double())[:, 0]
    return torch.stack([inside.double(), x / x.max().clamp(min=1), x.log1p(), rank])


class _Meter:
    """The sums of one site. First come a few tokens that settle the bins for ranks, then all."""

    def __init__(self, tables: Tensor, longest: int, followed: list[int]):
        self.tables, self.longest, self.followed = tables, longest, followed
        self.few, self.edges, self.kept, self.sums = [], None, [], {}

    def add(self, x: Tensor, real: Tensor, places: Tensor | None) -> None:
        """Take in x (B, T, D); `real` (B, T) is false at padding, `places` (3, n) are of the others.

        Without places, x is of the few.
        """
        h = x.detach()[real.to(x.device)].abs().double()  # (n, D)
        if places is None:
            return self.few.append(h)
        width, (index, position, _) = h.shape[1], places.to(h.device)
        params.dimensions(self.followed, width)
        f = self.tables.to(h.device)[:, :, index]  # (P, 4, n)
        cells = [h.new_zeros(self.longest, width).index_add_(0, position, h * one[:, None]) for one in f[:, 0]]
        self._sum("cells", torch.stack(cells))  # (P, T, D)
        self._sum("products", torch.cat([f[:, 1:3] @ h, f[:, :1] @ h.square()], 1))  # (P, 3, D)
        self._sum("types", h.new_zeros(self.tables.shape[2], width).index_add_(0, index, h))
        self.kept.append(h[:, self.followed].cpu())
        self._rank(f, h)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _rank(self, f: Tensor, h: Tensor) -> None:
        """Sort tokens into bins that hold about equally many of the few, for each dimension."""
        if self.edges is None:
            ordered = torch.cat(self.few).sort(0).values.T  # (D, n)
            at = torch.linspace(0, ordered.shape[1] - 1, min(_BINS, ordered.shape[1])).round().long()[1:]
            self.edges = ordered[:, at.to(h.device)].contiguous()
        bins, width = self.edges.shape[1] + 1, len(self.edges)
        place = torch.searchsorted(self.edges, h.T.contiguous(), right=True)  # (D, n)
        place = (place + bins * torch.arange(width, device=h.device)[:, None]).flatten()
        for name, column in (("n", 0), ("ranks", 3)):
            sums = [torch.bincount(place, one[column].repeat(width), width * bins) for one in f]
            self._sum(name, torch.stack(sums).view(len(f), width, bins))

    def finish(self) -> dict[str, Tensor]:
        """The sums, on the CPU."""
        return {name: value.cpu() for name, value in self.sums.items()} | {"followed": torch.cat(self.kept)}


def _rank_correlation(n: Tensor, ranks: Tensor, spread: Tensor) -> Tensor:
    """Spearman's, from bins of |h|: (D, bins) tokens and the sum of their ranks by frequency -> (D,).

    `spread` is the sum of squares of those ranks about their mean.
    """
    own = n.cumsum(1) - n / 2 + 0.5  # (D, bins): the rank by |h| that the tokens of a bin share
    total, middle = n.sum(1), (n.sum(1) + 1) / 2
    size = (n * own.square()).sum(1) - total * middle.square()
    shared = (own * ranks).sum(1) - total * middle.square()
    return shared / torch.where(spread * size > 0, spread * size, torch.nan).sqrt()
