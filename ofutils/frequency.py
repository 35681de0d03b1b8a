"""Token frequency, and how the size of each hidden dimension goes with it.

    count(tokenizer, texts)                     occurrences of every id in a text
    shipped(tokenizer)                          puccetti2022's counts of Wikipedia and BookCorpus, by id
    as_the_authors(tokenizer, counts)           the same, through the mapping of their code
    kinds(tokenizer)                            which ids count: all, no specials, no specials and no punctuation
    correlate(model, batches, counts, kept)     |h| with frequency, all dimensions and sites in one pass

Counts are (V,) float64, one per id; nan where the number is not known.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn

from ofutils import UserError, params
from ofutils.probes import Batch, hooked, resolve, run

#: What `Correlations.r` computes.
MEASURES = ("raw", "log", "spearman")
_VOCABULARIES = ("bert-base-uncased", "roberta-base")
# what decoding did to spaces in the authors' version of transformers, and no longer does for RoBERTa
_CLEANED = [(f" {end}", end) for end in (".", "?", "!", ",")] + [(" ' ", "'")]
_CLEANED += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]
_BINS = 256  # of |h|, for ranks
_FIRST = 4096  # tokens that settle the bins


def count(tokenizer, texts: Iterable[str], special: bool = True) -> Tensor:
    """How often each id occurs in texts.

    Args:
        tokenizer: of transformers.
        special: with the special tokens that the tokenizer puts around each text.

    Returns:
        (V,) float64.
    """
    rows = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"]
    ids = torch.tensor([one for row in rows for one in row], dtype=torch.long)
    return torch.bincount(ids, minlength=len(tokenizer)).double()


def shipped(tokenizer, shared: bool = False) -> dict[str, Tensor]:
    """The authors' counts for this tokenizer's vocabulary: `wikipedia`, `books`, and `both`, their sum.

    They were kept by decoded string, not by id. For BERT each string is one id. For RoBERTa 378 ids share 26
    strings, 9% of all tokens: the full stop with and without a space before it, the comma, every piece of a
    character. How their total was divided cannot be recovered: these ids are nan.

    Args:
        tokenizer: of transformers, with the vocabulary of bert-base-uncased (MiniLM has it too) or roberta-base.
        shared: give each of the ids that share a string the string's total, in the place of nan.

    Returns:
        (V,) float64 each; an id that was never counted has 0.

    Raises:
        UserError: another vocabulary.
    """
    import pyarrow.parquet

    for name in _VOCABULARIES:
        with resources.as_file(resources.files("ofutils") / "papers" / "counts" / f"{name}.parquet") as path:
            table = pyarrow.parquet.read_table(path)
        ids = table["id"].to_numpy()
        if len(tokenizer) <= ids.max():
            continue
        tokens = "\n".join(map(str, tokenizer.convert_ids_to_tokens(ids.tolist())))
        if hashlib.sha256(tokens.encode()).hexdigest() != table.schema.metadata[b"vocabulary"].decode():
            continue
        found = {}
        for part in ("wikipedia", "books"):
            values = np.zeros(len(tokenizer))
            values[ids] = np.where(table["shared"].to_numpy() & (not shared), np.nan, table[part].to_numpy())
            found[part] = torch.from_numpy(values)
        return found | {"both": found["wikipedia"] + found["books"]}
    known = " and ".join(_VOCABULARIES)
    raise UserError(
        f"no token counts for this tokenizer ({len(tokenizer)} tokens): they are shipped for the vocabularies of "
        f"{known}; frequency.count counts any text"
    )


def as_the_authors(tokenizer, counts: Tensor) -> Tensor:
    """Counts as puccetti2022's code assigns them to ids, with its mistake.

    It keeps counts by decoded string and tokenizes each string again: `ids = tokenizer(string).input_ids` and
    the count goes to `ids[1]`, most frequent string first. BERT's continuation piece `##ing` becomes `#`, `#`,
    `ing`: all continuation pieces end with no count, and `#` with that of the last of them. Strings lose the
    space before punctuation when they are decoded, so RoBERTa's full stop after a space has no count either.

    Args:
        counts: (V,), from `shipped(tokenizer, shared=True)`.

    Returns:
        (V,) float64.
    """
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    texts = tokenizer.batch_decode(order[:, None].tolist(), clean_up_tokenization_spaces=False)
    texts = [reduce(lambda text, pair: text.replace(*pair), _CLEANED, text) for text in texts]
    found = torch.zeros_like(counts)
    for ids, value in zip(tokenizer(texts)["input_ids"], counts[order].tolist(), strict=True):
        if len(ids) > 1:
            found[ids[1]] = value
    return found


def kinds(tokenizer) -> dict[str, Tensor]:
    """Sets of ids: `all`; `no specials`; `words`, without specials and punctuation (no letter and no digit in it).

    Returns:
        (V,) bool each.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    every = torch.ones(len(tokens), dtype=torch.bool)
    plain = every.clone()
    plain[list(tokenizer.all_special_ids)] = False
    spelled = torch.tensor([any(c.isalnum() for c in str(token).lstrip("Ġ")) for token in tokens])
    return {"all": every, "no specials": plain, "words": plain & spelled}


@dataclass
class Correlations:
    """Correlations of |h| with token frequency, for every dimension of every site; from `correlate`."""

    sites: list[str]
    kept: list[str]
    counts: list[str]
    tables: Tensor = field(repr=False)  # (P, 4, U): in the set, raw, log, rank; P pairs of set and counts, U types
    seen: Tensor = field(repr=False)  # (U,): occurrences
    sums: list[dict[str, Tensor]] = field(repr=False)  # per site

    def _pair(self, kept: str, counts: str) -> int:
        for what, name, known in (("set of tokens", kept, self.kept), ("counts", counts, self.counts)):
            params.require(
                name in known, f"no {what} {name!r}{params.suggest(name, known)}; known: {', '.join(known)}"
            )
        return self.kept.index(kept) * len(self.counts) + self.counts.index(counts)

    def tokens(self, kept: str, counts: str, level: str = "token") -> int:
        """How many tokens (or types) a correlation rests on."""
        inside = self.tables[self._pair(kept, counts), 0]
        return int((inside * (self.seen if level == "token" else 1)).sum())

    def r(self, measure: str, kept: str, counts: str, level: str = "token") -> Tensor:
        """Correlation of |h| with frequency.

        Args:
            measure: `raw` (Pearson, with counts, as puccetti2022), `log` (Pearson, with log(1 + count)) or
                `spearman` (ranks; at the level of tokens |h| is sorted into 256 bins).
            kept: name of a set of ids.
            counts: name of counts.
            level: `token` (each occurrence counts) or `type` (the mean |h| of an id counts once).

        Returns:
            (sites, D) float64; nan where one side does not vary.
        """
        pair = self._pair(kept, counts)
        params.require(measure in MEASURES, f"unknown measure {measure!r}; known: {', '.join(MEASURES)}")
        params.require(level in ("token", "type"), f"unknown level {level!r}; known: token, type")
        if level == "type":
            return torch.stack([self._over_types(one["types"], pair, measure) for one in self.sums])
        if measure == "spearman":
            weight = self.tables[pair, 0] * self.seen
            spread = weight @ self.tables[pair, 3].square() - weight.sum() * ((weight.sum() + 1) / 2) ** 2
            return torch.stack([_rank_correlation(one["n"][pair], one["ranks"][pair], spread) for one in self.sums])
        weights = torch.ones(1, self.sums[0]["groups"].shape[1], dtype=torch.float64)
        return torch.stack([self._weighted(one, pair, measure, weights)[0] for one in self.sums])

    def interval(self, measure: str, kept: str, counts: str, level: float = 0.9, draws: int = 500) -> Tensor:
        """A bootstrap interval of `r` over sentences, which were dealt to groups: groups are drawn with replacement.

        Args:
            measure: `raw` or `log`.
            level: its coverage.

        Returns:
            (2, sites, D): lower and upper end. The same at every call.
        """
        params.require(measure in ("raw", "log"), f"intervals are of raw and log, not of {measure!r}")
        pair, groups = self._pair(kept, counts), self.sums[0]["groups"].shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(groups, (draws, groups), generator=generator)
        weights = torch.nn.functional.one_hot(drawn, groups).sum(1).double()  # (draws, G)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        found = [self._weighted(one, pair, measure, weights).nanquantile(ends, 0) for one in self.sums]
        return torch.stack(found, 1)

    def _weighted(self, sums: dict[str, Tensor], pair: int, measure: str, weights: Tensor) -> Tensor:
        """(draws, G) -> (draws, D)"""
        which = 1 if measure == "raw" else 2
        own = weights @ sums["x"][pair]  # (draws, 5)
        n, x, xx = (own[:, index, None] for index in (0, which, which + 2))
        h, xh, hh = (weights @ sums["groups"][pair, :, index] for index in (0, which, 3))  # (draws, D)
        return _pearson(n, x, xx, h, hh, xh)

    def _over_types(self, types: Tensor, pair: int, measure: str) -> Tensor:
        inside = self.tables[pair, 0] > 0
        x = self.tables[pair, 1 if measure != "log" else 2, inside]
        h = types[inside] / self.seen[inside, None]  # (U', D)
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
    groups: int = 32,
) -> Correlations:
    """How |h| goes with token frequency, for every dimension of every site, in one pass over the model.

    For token t, dimension j and a frequency x:  r_j = corr_t(x(t), |h_{t,j}|). No activation is kept, only
    sums; padding counts nowhere. The result does not depend on how the rows are split into batches.

    Args:
        batches: mappings with `input_ids` (B, T) and `attention_mask`, or tensors of ids.
        counts: name -> (V,) counts; tokens whose count is nan are left out of that correlation.
        kept: name -> (V,) bool, which ids count, as `kinds` gives them.
        where: sites. In a post-norm BERT `norm2` is what puccetti2022 takes: the output of each block.
        groups: rows are dealt to so many groups, for `Correlations.interval`.

    Raises:
        UserError: no batches, an id beyond the counts, an unknown site.

    Source: puccetti2022, released code, which takes `raw` for two dimensions and ten others at random, with
    counts mapped as in `as_the_authors`. Departure: ids are counted by id.
    """
    batches = list(batches)
    params.require(len(batches) > 0, "nothing to correlate: no batches")
    split = [
        (b, torch.ones_like(b)) if torch.is_tensor(b) else (b["input_ids"], b["attention_mask"]) for b in batches
    ]
    ids = torch.cat([one[mask.bool()] for one, mask in split])
    vocab, largest = min(map(len, [*counts.values(), *kept.values()])), int(ids.max())
    params.require(largest < vocab, f"token id {largest} lies beyond the counts, which have {vocab} ids")
    types, inverse, seen = ids.unique(return_inverse=True, return_counts=True)
    tables = torch.stack([_table(c[types], k[types], seen) for k in kept.values() for c in counts.values()])
    names = resolve(model, where)
    meters = {name: _Meter(tables, _FIRST) for name in names}
    start, training = 0, model.training
    model.eval()
    try:
        for batch, (one, mask) in zip(batches, split, strict=True):
            index = torch.zeros_like(one)
            index[mask.bool()] = inverse[: int(mask.sum())]
            inverse = inverse[int(mask.sum()) :]
            group = (start + torch.arange(len(one))) % groups
            reading = {n: lambda x, m=m: m.add(x, index, mask, group, groups) for n, m in meters.items()}  # noqa: B023
            with torch.no_grad(), hooked(model, reading):
                run(model, batch)
            start += len(one)
    finally:
        model.train(training)
    sums = [meter.finish() for meter in meters.values()]
    return Correlations(names, list(kept), list(counts), tables, seen.double(), sums)


def mid_ranks(x: Tensor) -> Tensor:
    """(n, D) -> ranks 1 to n along the first axis; equal values share the mean of their ranks."""
    ordered = x.T.contiguous().sort(1).values
    low = torch.searchsorted(ordered, x.T.contiguous())
    high = torch.searchsorted(ordered, x.T.contiguous(), right=True)
    return ((low + high + 1) / 2).double().T


def _table(counts: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    """(4, U): whether a type counts, its count over the largest, its log, its rank among the tokens of the text."""
    inside = kept & counts.isfinite()
    x = counts.double().masked_fill(~inside, 0)
    order = x.masked_fill(~inside, float("inf")).argsort()
    weight = (seen * inside).double()
    _, tie = x[order].unique_consecutive(return_inverse=True)
    size = torch.zeros(int(tie.max()) + 1, dtype=torch.float64).index_add_(0, tie, weight[order])
    rank = torch.empty_like(x)
    rank[order] = (size.cumsum(0) - size / 2 + 0.5)[tie]
    return torch.stack([inside.double(), x / x.max().clamp(min=1), x.log1p(), rank * inside])


class _Meter:
    """The sums of one site. Ranks need bins, which the first tokens settle: until then they wait."""

    def __init__(self, tables: Tensor, first: int):
        self.tables, self.first, self.waiting, self.sums = tables, first, [], {}

    def add(self, x: Tensor, index: Tensor, mask: Tensor, group: Tensor, groups: int) -> None:
        """Take in (B, T, D)."""
        h = x.detach().abs().double()
        place, real = h.device, mask.bool()
        f = (self.tables[:, :, index] * mask).to(place)  # (P, 4, B, T)
        rows = torch.einsum("pkbt,btd->pbkd", f[:, :3], h)
        rows = torch.cat([rows, torch.einsum("pbt,btd->pbd", f[:, 0], h.square())[:, :, None]], 2)  # (P, B, 4, D)
        own = torch.cat([f[:, :3].sum(-1), f[:, 1:3].square().sum(-1)], 1).transpose(1, 2)  # (P, B, 5)
        group = group.to(place)
        self._sum("groups", rows.new_zeros(len(rows), groups, *rows.shape[2:]).index_add_(1, group, rows))
        self._sum("x", own.new_zeros(len(own), groups, 5).index_add_(1, group, own))
        index, h = index[real], h[real.to(place)]
        types = h.new_zeros(self.tables.shape[2], h.shape[1]).index_add_(0, index.to(place), h)
        self._sum("types", types)
        self._rank(index, h)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _rank(self, index: Tensor, h: Tensor) -> None:
        """Sort tokens into bins; they wait until there are enough to settle these."""
        if "edges" not in self.sums:
            self.waiting.append((index, h))
            if sum(len(one) for one, _ in self.waiting) >= self.first:
                self._settle()
            return
        edges = self.sums["edges"]
        bins, width = edges.shape[1] + 1, len(edges)
        place = torch.searchsorted(edges, h.T.contiguous(), right=True)  # (D, n)
        place = (place + bins * torch.arange(width, device=h.device)[:, None]).flatten()
        f = self.tables[:, :, index].to(h.device)
        for name, column in (("n", 0), ("ranks", 3)):
            sums = [torch.bincount(place, one[column].repeat(width), width * bins) for one in f]
            self._sum(name, torch.stack(sums).view(len(f), width, bins))

    def _settle(self) -> None:
        """Bins that hold equally many of the first tokens, for each dimension; then all that wait are sorted."""
        index, h = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        ordered = h[: self.first].sort(0).values.T  # (D, n)
        at = torch.linspace(0, ordered.shape[1] - 1, min(_BINS, ordered.shape[1])).round().long()[1:]
        self.sums["edges"] = ordered[:, at.to(h.device)].contiguous()
        self._rank(index, h)

    def finish(self) -> dict[str, Tensor]:
        """The sums, on the CPU."""
        if self.waiting:
            self._settle()
        return {name: value.cpu() for name, value in self.sums.items() if name != "edges"}


def _pearson(n, x, xx, h, hh, xh) -> Tensor:
    """From sums; what does not vary gives nan."""
    spread = (xx - x * x / n) * (hh - h * h / n)
    return (xh - x * h / n) / torch.where(spread > 1e-20 * xx * hh, spread, torch.nan).sqrt()


def _rank_correlation(n: Tensor, ranks: Tensor, spread: Tensor) -> Tensor:
    """Spearman's, from bins of |h|: (D, bins) tokens and the sum of their ranks by frequency -> (D,).

    `spread` is the sum of squares of those ranks about their mean.
    """
    own = n.cumsum(1) - n / 2 + 0.5  # (D, bins): the rank by |h| that the tokens of a bin share
    total, middle = n.sum(1), (n.sum(1) + 1) / 2
    size = (n * own.square()).sum(1) - total * middle.square()
    shared = (own * ranks).sum(1) - total * middle.square()
    return shared / torch.where(spread * size > 0, spread * size, torch.nan).sqrt()
