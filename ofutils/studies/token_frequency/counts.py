"""Token counts as this notebook compares them: the shipped ones, those with the authors' mistake, the text's own."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from ofutils import params
from ofutils.frequency import count, shipped

# what decoding did to spaces in the authors' version of transformers, and no longer does for RoBERTa
_CLEANED = [(f" {end}", end) for end in (".", "?", "!", ",")] + [(" ' ", "'")]
_CLEANED += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]


def token_counts(tokenizer, texts: Iterable[str], source: str = "shipped") -> dict[str, Tensor]:
    """Counts by name: `counts`, the same with the `authors' mapping`, and those of `this text` itself.

    Where `counts` is not known, the authors' is nan too, so that the two compare over the same tokens.

    Args:
        tokenizer: of transformers.
        texts: what is read.
        source: of `counts`: `shipped`, the authors' counts of Wikipedia and BookCorpus, or `text`.

    Returns:
        (V,) float64 each.

    Raises:
        UserError: another source, or no counts are shipped for this tokenizer.
    """
    params.require(source in ("shipped", "text"), f"counts must be shipped or text, got {source!r}")
    own = count(tokenizer, texts)
    mine, mistaken = (own, own) if source == "text" else (shipped(tokenizer, one)["both"] for one in (False, True))
    mistaken = as_the_authors(tokenizer, mistaken).masked_fill(mine.isnan(), torch.nan)
    return {"counts": mine, "authors' mapping": mistaken, "this text": own}


def as_the_authors(tokenizer, counts: Tensor) -> Tensor:
    """Counts as puccetti2022's code assigns them to ids, with its mistake.

    It keeps counts by decoded string and tokenizes each string again: `ids = tokenizer(string).input_ids` and
    the count goes to `ids[1]`, most frequent string first. BERT's continuation piece `##ing` becomes `#`, `#`,
    `ing`: all continuation pieces end with no count, and `#` with that of the last of them. Strings lose the
    space before punctuation when they are decoded, so RoBERTa's full stop after a space has no count either.

    Args:
        counts: (V,), from `frequency.shipped(tokenizer, shared=True)`.

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
