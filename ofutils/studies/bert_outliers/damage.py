"""What breaks in an encoder when dimensions of its norms are switched off, what they do to its geometry, and at which
tokens they are large."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import dims, heads, metrics, params, probes
from ofutils.sentences import mask_tokens, sentence_batches
from ofutils.transformer import Head, Transformer


@dataclass(frozen=True)
class Tests:
    """Sentences to measure damage on, with what the untouched encoder makes of them."""

    batches: list[probes.Batch]
    masked: list[heads.Masked]  # the same, with masked tokens
    whole: Tensor  # (S, D), embeddings by the untouched encoder
    head: Head  # for masked tokens, trained on other text
    loss: float  # of that head on the untouched encoder, nats per masked token


def batches(tokenizer, sentences: list[str]) -> list[probes.Batch]:
    """`sentence_batches` of the sentences by length, so that a batch holds little padding."""
    return sentence_batches(tokenizer, sorted(sentences, key=len))


def masked(tokenizer, batches: list[probes.Batch], seed: int) -> list[heads.Masked]:
    """The batches with masked tokens, each under a seed of its own: `seed`, `seed` + 1 and so on."""
    return [mask_tokens(batch, tokenizer, number) for number, batch in enumerate(batches, start=seed)]


def prepare(encoder: Transformer, tokenizer, sentences: list[str], head: Head, seed: int = 0) -> Tests:
    """Tests for `damage`.

    Args:
        encoder: untouched, without a head of its own (see `heads.split`).
        sentences: three or more, that the head has not seen.
        seed: of the masks, see `masked`.

    Raises:
        UserError: fewer sentences.
    """
    params.require(len(sentences) >= 3, f"damage needs three sentences or more to test on, got {len(sentences)}")
    chosen = batches(tokenizer, sentences)
    asked = masked(tokenizer, chosen, seed)
    return Tests(chosen, asked, probes.embed(encoder, chosen), head, heads.mlm_loss(encoder, head, asked))


def damage(encoder: Transformer, tests: Tests, off: Iterable[int] = (), where: str | Iterable[str] = "norm2") -> dict:
    """What the encoder loses with these dimensions switched off (`dims.ablated`); 0 and 0 untouched.

    Returns:
        `similarity`: 1 less Spearman's correlation of all similarities between sentences with those of the
        untouched encoder (`metrics.similarity_agreement`), 0 to 2, 1 where nothing is left of them; `MLM`: nats
        by which the loss of the head for masked tokens rises, negative where it falls.
    """
    with dims.ablated(encoder, off, where):
        agreement = metrics.similarity_agreement(tests.whole, probes.embed(encoder, tests.batches))
        return {"similarity": 1 - agreement, "MLM": heads.mlm_loss(encoder, tests.head, tests.masked) - tests.loss}


def table(encoder, draws: Sequence[Tests], sets: Mapping[str, Sequence[int]], where="norm2") -> list[dict]:
    """`damage` of every set of dimensions on every draw: rows `switched off`, `draw`, `similarity`, `MLM`."""
    return [
        {"switched off": name, "draw": number, **damage(encoder, tests, off, where)}
        for number, tests in enumerate(draws)
        for name, off in sets.items()
    ]


def at_random(width: int, size: int, times: int, but: Iterable[int] = ()) -> list[list[int]]:
    """Sets of `size` dimensions out of `width` without those in `but`, the same ones at every call.

    Raises:
        UserError: fewer dimensions than that.
    """
    free = sorted({*range(width)} - {*but})
    params.require(size <= len(free), f"{size} dimensions at random are asked for, {len(free)} are left")
    chance = np.random.default_rng(0)
    return [sorted(chance.choice(free, size, replace=False).tolist()) for _ in range(times)]


@torch.no_grad()
def geometry(encoder, batches: Iterable[probes.Batch], left_out: Mapping[str, Sequence[int]]) -> list[dict]:
    """How alike tokens, and sentences, look at every depth: mean cosines, with some dimensions left out of them.

    Tokens are compared across sentences too; a sentence is the mean over its tokens. The encoder computes with
    all its dimensions.

    Args:
        encoder: post-norm, without a head.
        batches: padding counts nowhere.
        left_out: name -> dimensions that the cosine leaves out; none are all.

    Returns:
        Rows `depth`, blocks passed: from the stream that enters the first (`resid_pre`) to the output (`norm2` of
        the last); `level`, tokens or sentences; `cosine over`, a name; `mean cosine` (`metrics.anisotropy`).
    """
    last, width = encoder.config.layers - 1, encoder.config.width
    sites = [*(f"blocks.{block}.resid_pre" for block in range(last + 1)), f"blocks.{last}.norm2"]
    keep = {name: [dim for dim in range(width) if dim not in set(out)] for name, out in left_out.items()}
    sums = {(site, level, name): [0, 0] for site in sites for level in ("tokens", "sentences") for name in keep}
    for batch in batches:
        with probes.capture(encoder, sites) as kept:
            probes.run(encoder, batch)
        real = batch["attention_mask"].bool().cpu()
        for site, x in kept.items():
            x = x.cpu().double()  # (B, T, D)
            means = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            for level, rows in (("tokens", x[real]), ("sentences", means)):
                for name, dimensions in keep.items():
                    count, total = sums[site, level, name]
                    directions = F.normalize(rows[:, dimensions], dim=-1)
                    sums[site, level, name] = [count + len(rows), total + directions.sum(0)]
    return [
        {"depth": sites.index(site), "level": level, "cosine over": name, "mean cosine": _mean_cosine(count, total)}
        for (site, level, name), (count, total) in sums.items()
    ]


def _mean_cosine(count: int, total: Tensor) -> float:
    """Of unit vectors with this sum: all products but those of a vector with itself."""
    return float((total.square().sum() - count) / (count * (count - 1)))


@torch.no_grad()
def profile(
    model: nn.Module,
    batches: Iterable[probes.Batch],
    dims: Sequence[int],
    groups: Tensor,
    names: Sequence[str],
    where: str | Iterable[str] = "resid_post",
) -> list[dict]:
    """At which tokens a dimension is large, and whether it has one sign everywhere.

    Args:
        batches: mappings with `input_ids` and `attention_mask`; padding counts nowhere.
        dims: dimensions to look at.
        groups: (V,) the group of every id, as an index into `names`, e.g. from `sentences.token_groups`.
        where: sites.

    Returns:
        One row per dimension: `dimension`; `largest |x| at <name>` for each group, over all sites and tokens;
        `one sign`, 0.5 to 1: the share of tokens with the sign that most have, mean over sites.
    """
    sites, values, kinds = probes.resolve(model, where), [], []
    for batch in batches:
        with probes.capture(model, sites) as kept:
            probes.run(model, batch)
        real = batch["attention_mask"].bool().cpu()
        kinds.append(groups[batch["input_ids"].cpu()[real]])
        values.append(torch.stack([kept[site].cpu()[real][:, list(dims)] for site in sites]))
    kind, x = torch.cat(kinds), torch.cat(values, 1)  # (n,), (sites, n, dims)
    share = (x > 0).sum(1) / x.shape[1]
    columns = {"dimension": list(dims)}
    for index, name in enumerate(names):
        columns[f"largest |x| at {name}"] = (x * (kind == index)[:, None]).abs().amax((0, 1)).tolist()
    columns["one sign"] = torch.maximum(share, 1 - share).mean(0).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
