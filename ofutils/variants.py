"""Texts that keep or lose one property of natural text: its frequencies, its order, its separators.

`transformed` takes a tokenized corpus and a name of `VARIANTS`:

    natural           as it is
    flattened         each frequent id split into several, chosen by position: same text, frequent ids levelled
    evenly split      every id split into equally many, likewise: its control, natural frequencies on more ids
    shuffled          the same tokens in random order: frequencies kept, nothing to predict from
    uniform           every id equally likely, independent of all others
    one separator     an id of its own at the start of each row
    many separators   the same id after each line

The experiment that puccetti2022's code announces (`randomize_tokens`, `few_special_tokens`) and does not contain.
"""

from dataclasses import replace

import numpy as np

from ofutils import params

VARIANTS = ("natural", "flattened", "evenly split", "shuffled", "uniform", "one separator", "many separators")


def transformed(tokens, variant: str, vocab: int, context: int):
    """The same corpus as a variant; the same at every call.

    Args:
        tokens: a `data.Tokens`, both splits.
        vocab: ids of the model; `uniform` and the two that split use all, separators take the first one that the
            tokenizer does not have.
        context: tokens of a row.

    Returns:
        A `data.Tokens` with ids below `vocab`.

    Raises:
        UserError: a variant that needs ids beyond the tokenizer's, where the model has none to spare.
    """
    if variant == "natural":
        return tokens
    enough = vocab > tokens.vocab or variant in ("shuffled", "uniform")
    few = f"variant {variant!r} needs ids beyond the tokenizer's {tokens.vocab}: set bpe below model.vocab"
    params.require(enough, few)
    copies = np.full(tokens.vocab, vocab // tokens.vocab)
    if variant == "flattened":
        copies = split_sizes(np.bincount(tokens.train, minlength=tokens.vocab), vocab)
    ends = np.array(["Ċ" in (tokens.tokenizer.id_to_token(one) or "") for one in range(tokens.vocab)])

    def row(ids: np.ndarray, seed: int) -> np.ndarray:
        ids, generator = np.asarray(ids, np.int32), np.random.default_rng(seed)
        if variant in ("flattened", "evenly split"):
            return flattened(ids, copies)
        if variant == "shuffled":
            return generator.permutation(ids)
        if variant == "uniform":
            return generator.integers(vocab, size=len(ids), dtype=np.int32)
        at = np.arange(0, len(ids), context - 1) if variant == "one separator" else np.flatnonzero(ends[ids]) + 1
        return np.insert(ids, at, tokens.vocab)

    split = range(copies[0])  # the copies of the end-of-text token
    special = {"uniform": (), "flattened": split, "evenly split": split}.get(variant, (0, tokens.vocab))
    rows = {"train": row(tokens.train, 0), "validation": row(tokens.validation, 1)}
    return replace(tokens, vocab=vocab, special=tuple(special), **rows)


def split_sizes(counts: np.ndarray, vocab: int) -> np.ndarray:
    """Into how many ids each id is split: in proportion to its count, at least 1, at most `vocab` in all.

    Args:
        counts: (V,) occurrences.

    Returns:
        (V,) int64.

    Raises:
        UserError: fewer than V ids to split into, or nothing was counted.
    """
    params.require(vocab >= len(counts), f"{len(counts)} ids cannot be split into {vocab}")
    params.require(counts.sum() > 0, "nothing was counted: no id can be split in proportion")
    share = counts / counts.sum()
    low, high = 0.0, float(vocab)
    for _ in range(50):  # the largest scale that fits
        middle = (low + high) / 2
        fits = np.maximum(1, np.round(share * middle)).sum() <= vocab
        low, high = (middle, high) if fits else (low, middle)
    return np.maximum(1, np.round(share * low)).astype(np.int64)


def flattened(ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Each id replaced by one of its copies, which a hash of its position chooses.

    Args:
        ids: (N,), the tokens in order.
        copies: (V,), how many ids each id is split into; those of id v start at `copies[:v].sum()`.

    Returns:
        (N,) int32.
    """
    position = np.arange(len(ids), dtype=np.uint64)
    mixed = (position + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)  # after splitmix64
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31))) % copies[ids].astype(np.uint64)
    starts = np.concatenate([[0], copies.cumsum()[:-1]])
    return (starts[ids] + mixed.astype(np.int64)).astype(np.int32)
