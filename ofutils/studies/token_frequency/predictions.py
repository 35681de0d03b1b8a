"""What a model predicts, at tokens that it sees or that are masked: how diverse it is, and what it takes for what.

    joined(encoder, head)                       an encoder and an MLM head as one model
    with_trained_head(encoder, tokenizer, ...)  the same, with a head trained to name masked and visible tokens
    predict(model, batches)                     the most likely token at every position
    predict_without(model, batches, sets)       the same with dimensions switched off, for several sets of them
    at(rows, batches, kept)                     those that stand at tokens of a set
    diversity(ids, counts)                      distinct types, entropy, how frequent they are
    find_tagger()                               spaCy's parts of speech, if it is here
    parts_of_speech(tokenizer, masked, ...)     of the true and of the predicted token, at every masked position
    confusion(pairs)                            how often each part of speech becomes each other one

A tagger is any function from the words of a sentence to as many tags.
"""

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

import pandas as pd
import torch
from torch import Tensor

from ofutils import dims, heads, params, sentences
from ofutils.probes import run
from ofutils.transformer import Head, Transformer

Tagger = Callable[[list[str]], list[str]]
#: How to get spaCy and its English model.
GET_TAGGER = '`pip install -e ".[pos]"` and `python -m spacy download en_core_web_sm`'


def joined(encoder: Transformer, head: Head) -> Transformer:
    """A copy of the encoder with this MLM head on top: what `heads.split` takes apart.

    Args:
        encoder: with `head` none.
    """
    model = Transformer(replace(encoder.config, head="mlm"))
    model.load_state_dict(encoder.state_dict() | {f"head.{name}": value for name, value in head.state_dict().items()})
    return model.to(next(encoder.parameters()).device).eval().requires_grad_(False)


def with_trained_head(
    encoder: Transformer, tokenizer, batches: list[dict[str, Tensor]], kept: Tensor, steps: int, seed: int = 0
) -> Transformer:
    """The encoder with an MLM head that is trained on its frozen hidden states: on masked tokens and on visible ones.

    Of each batch there are two versions: one masked as BERT's, with its masked tokens to be named, and one as it
    is, with all tokens of a set to be named. So the head both repeats and fills in, as BERT's own does.

    Args:
        encoder: with `head` none.
        tokenizer: of transformers, with a mask token.
        kept: (V,) bool, which visible tokens are to be named, e.g. of `frequency.kinds`.
        steps: see `heads.train_mlm_head`; its rate is 1e-2 here.
        seed: of the head's start and order, and of the masks.
    """
    masked = [sentences.mask_tokens(batch, tokenizer, 100_000 * seed + index) for index, batch in enumerate(batches)]
    shown = [kept[batch["input_ids"]] & batch["attention_mask"].bool() for batch in batches]
    visible = [(b, torch.where(one, b["input_ids"], -100)) for b, one in zip(batches, shown, strict=True)]
    return joined(encoder, heads.train_mlm_head(encoder, masked + visible, steps, seed, lr=1e-2))


@torch.no_grad()
def predict(model: Transformer, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """The most likely id at every position, (B, T) on the CPU for each batch; at padding it means nothing.

    Args:
        model: with an MLM head. Batches without masks are predicted as they are: the model says again what it sees.

    Source: puccetti2022, released code, which masks nothing either.
    """
    params.require(model.config.head == "mlm", f"this model has no MLM head, but {model.config.head}")
    return [run(model, batch).argmax(-1).cpu() for batch in batches]


def predict_without(
    model: Transformer, batches: list[dict[str, Tensor]], sets: Mapping[str, tuple[Iterable[int], str | tuple]]
) -> dict[str, list[Tensor]]:
    """`predict` with dimensions switched off in norms: what `dims.ablated` takes, for each name of a set.

    Args:
        sets: name -> (dimensions, where), e.g. `{"full model": ((), "norm2")}`.
    """
    found = {}
    for name, (chosen, where) in sets.items():
        with dims.ablated(model, chosen, where):
            found[name] = predict(model, batches)
    return found


def at(rows: Iterable[Tensor], batches: Iterable[dict[str, Tensor]], kept: Tensor) -> Tensor:
    """What stands in rows (B, T) wherever the batch has a token of a set and no padding: (n,)."""
    pairs = zip(rows, batches, strict=True)
    return torch.cat([row[kept[batch["input_ids"]] & batch["attention_mask"].bool()] for row, batch in pairs])


def diversity(ids: Tensor, counts: Tensor) -> dict[str, float]:
    """How diverse a text is, and how frequent its tokens are elsewhere.

    Args:
        ids: (n,).
        counts: (V,), nan where not known.

    Returns:
        `distinct types`; `entropy (bits)` of their shares, 0 to log2 of the types; `share of ten`, which the ten
        most frequent types have; `mean log count`, of log(1 + count) over tokens whose count is known.

    Source: puccetti2022, released code, which draws the sorted counts and takes no number of them.
    """
    seen = torch.bincount(ids).double()
    share = seen[seen > 0].sort(descending=True).values / len(ids)
    known = counts[ids[ids < len(counts)]]  # a model may have ids that its tokenizer lacks
    known = known[known.isfinite()]
    return {
        "distinct types": len(share),
        "entropy (bits)": float(-(share * share.log2()).sum()),
        "share of ten": float(share[:10].sum()),
        "mean log count": float(known.log1p().mean()),
    }


# --- parts of speech


def find_tagger(name: str = "en_core_web_sm") -> Tagger | None:
    """spaCy's tagger of universal parts of speech; None, after a line that says how to get it, where it is missing.

    It takes words as they are given and splits none of them. What was tagged once is remembered.

    Args:
        name: a model of spaCy.
    """
    try:
        import spacy
        from spacy.tokens import Doc

        pipeline = spacy.load(name, exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        print(f"parts of speech are left out: spaCy or its model {name} is missing; {GET_TAGGER}")
        return None

    @lru_cache(maxsize=100_000)
    def tagged(words: tuple[str, ...]) -> list[str]:
        return [token.pos_ for token in pipeline(Doc(pipeline.vocab, words=list(words)))]

    return lambda words: tagged(tuple(words))


def words(tokenizer, ids: list[int]) -> tuple[list[str], list[int]]:
    """The words that a row of ids spells, and for each id the index of its word.

    A piece goes on with the word before it if it says so (`##ing`), or, in a tokenizer of bytes, if it has no
    space before it (`Ġ`) and no punctuation stands between the two.

    Args:
        tokenizer: of transformers, of BERT's or RoBERTa's kind.
    """
    wordpiece, groups, place = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece", [], []
    for piece in (piece or str(tokenizer.unk_token) for piece in tokenizer.convert_ids_to_tokens(ids)):
        free = piece.startswith("Ġ") or not groups or {groups[-1][-1][-1], piece[0]} & set(string.punctuation)
        if not groups or (not piece.startswith("##") if wordpiece else free):
            groups.append([])
        groups[-1].append(piece)
        place.append(len(groups) - 1)
    spelled = [tokenizer.convert_tokens_to_string(group).strip().removeprefix("##") for group in groups]
    return [word or " " for word in spelled], place


def parts_of_speech(
    tokenizer, masked: list[tuple[dict, Tensor]], predicted: list[Tensor], tagger: Tagger, alone: bool = False
) -> list[tuple[str, str]]:
    """The part of speech of the true and of the predicted token, at each masked position.

    The true sentence and the sentence with every prediction filled in are tagged as wholes; a sub-word has the
    tag of its word. A prediction can thus change what its neighbours are, and with which of them it is one word.

    Args:
        tokenizer: of transformers.
        masked: batches and labels, from `sentences.mask_tokens`.
        predicted: (B, T) each, from `predict`.
        alone: tag each token on its own, as the authors do.

    Source: puccetti2022, released code. Departure: there each token, also a piece of a word, is decoded and tagged
    without its sentence.
    """
    pairs, special = [], torch.tensor(tokenizer.all_special_ids)
    for (batch, labels), rows in zip(masked, predicted, strict=True):
        true = torch.where(labels == -100, batch["input_ids"], labels)  # (B, T)
        made, plain = (
            torch.where(labels == -100, true, rows),
            batch["attention_mask"].bool() & ~torch.isin(true, special),
        )
        for asked, inside, *both in zip(labels != -100, plain, true, made, strict=True):
            where = asked[inside].nonzero().flatten().tolist()
            sides = (_tags(tokenizer, row[inside].tolist(), where, tagger, alone) for row in both)
            pairs += zip(*sides, strict=True)
    return pairs


def _tags(tokenizer, ids: list[int], where: list[int], tagger: Tagger, alone: bool) -> list[str]:
    if alone:
        return [tagger([tokenizer.decode([ids[index]]).strip() or " "])[0] for index in where]
    spelled, place = words(tokenizer, ids)
    found = tagger(spelled) if where else []
    return [found[place[index]] for index in where]


def confusion(pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """How often each part of speech (row) becomes each other one (column); the most frequent true ones come first.

    Returns:
        Square, int64; a row divided by its sum are shares.
    """
    table = pd.DataFrame(list(pairs), columns=["true", "predicted"])
    found = pd.crosstab(table["true"], table["predicted"])
    order = found.sum(axis=1).sort_values(ascending=False, kind="stable").index
    order = [*order, *(tag for tag in found.columns if tag not in order)]
    return found.reindex(index=order, columns=order, fill_value=0)
