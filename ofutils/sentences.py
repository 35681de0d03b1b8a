"""Sentences for encoders: out of a corpus, as batches of somebody else's tokens, masked, and by kind of token."""

import ast
import string
import warnings
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ofutils import UserError, params
from ofutils.batches import SHARE, hidden
from ofutils.data import Corpus

#: Kinds of tokens. Start and separator are BERT's [CLS] and [SEP], RoBERTa's <s> and </s>.
GROUPS = ("start", "separator", "punctuation", "other")


def docstrings(corpus: Corpus, count: int, each: int = 8, longest: int = 200) -> list[str]:
    """First sentences of docstrings in a corpus of Python source: plain English that every machine has.

    Args:
        count: how many; documents are visited in an order that the hash of their names decides.
        each: from one document, at most.
        longest: in characters; longer and very short ones (under five words) are left out.

    Returns:
        Each sentence once.

    Raises:
        UserError: a corpus that does not have so many.
    """
    found: dict[str, None] = {}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for _, text in corpus.ranked:
        own = [first_sentence(node) for node in documented(text, kinds)]
        found |= dict.fromkeys([one for one in own if len(one) <= longest and len(one.split()) >= 5][:each])
        if len(found) >= count:
            return list(found)[:count]
    raise UserError(f"corpus {corpus.source!r} has {len(found)} sentences in docstrings, {count} are asked for")


def documented(text: str, kinds: tuple) -> list:
    """The documented nodes of these kinds in Python source; none where it does not parse."""
    with suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source that is read
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
    return []


def first_sentence(node) -> str:
    """Of the docstring of a node."""
    return " ".join(ast.get_docstring(node).partition("\n\n")[0].split()).partition(". ")[0]


def mask_tokens(batch: dict[str, Tensor], tokenizer, seed: int, share: float = SHARE) -> tuple[dict, Tensor]:
    """A batch for masked-token prediction: of the tokens that are not special, a share is to be predicted.

    Of those, most become the mask token, see `batches.hidden`.

    Returns:
        The batch with other `input_ids`, and the labels (B, T): the true id where it is to be predicted, else -100.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draw = torch.rand(ids.shape, generator=generator)
    asked = (draw < share) & ~special & batch["attention_mask"].bool()
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    masked, labels = hidden(ids, asked, draw, other, tokenizer.mask_token_id, share)
    return batch | {"input_ids": masked}, labels


def sentence_batches(tokenizer, sentences: list[str], batch: int = 16, longest: int = 64) -> list[dict[str, Tensor]]:
    """Sentences as padded batches of somebody else's tokens, in order, for `probes.measure` and `probes.embed`.

    Args:
        tokenizer: of transformers. One without a padding token pads with its end of text, which the mask hides.
        longest: tokens of a row; the rest of a sentence is cut off.

    Returns:
        Mappings of (batch, T) tensors, `input_ids` and `attention_mask` among them.
    """
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    params.require(tokenizer.pad_token is not None, "this tokenizer has no token to pad with")
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return [dict(tokenizer(sentences[i : i + batch], **options)) for i in range(0, len(sentences), batch)]


def encode(tokenizer, corpus: Corpus) -> np.ndarray:
    """A corpus, both splits, in the tokens of somebody else's model: one row of ids, documents one after the other.

    Args:
        tokenizer: of transformers.

    Returns:
        (N,) int64. No special tokens are added.
    """
    texts = [text for _, text in corpus.documents]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.concatenate([np.array(row, np.int64) for row in rows])


def token_groups(tokenizer) -> Tensor:
    """The group of every id of a tokenizer of transformers.

    Punctuation: tokens of ASCII punctuation alone, whatever marks a word's start or middle (`##`, `Ġ`, `▁`)
    left aside. Special tokens other than the first and the separator are `other`.

    Returns:
        (V,) int64, indices into `GROUPS`.
    """
    marks = set(string.punctuation)
    pieces = (str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    bare = [piece.removeprefix("Ġ").removeprefix("▁") for piece in pieces]  # "##" alone is two signs, no mark
    bare = [piece.removeprefix("##") if len(piece) > 2 else piece for piece in bare]
    found = torch.tensor([2 if piece and set(piece) <= marks else 3 for piece in bare])
    found[[id for id in tokenizer.all_special_ids if id < len(found)]] = 3
    for group, names in ((1, ("sep_token_id", "eos_token_id")), (0, ("cls_token_id", "bos_token_id"))):
        ids = [id for name in names if (id := getattr(tokenizer, name, None)) is not None]
        found[ids[:1]] = group
    return found
