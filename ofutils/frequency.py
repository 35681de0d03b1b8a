"""Token frequency: how often each id of a vocabulary occurs.

    count(tokenizer, texts)                     occurrences of every id in a text
    shipped(tokenizer)                          puccetti2022's counts of Wikipedia and BookCorpus, by id
    kinds(tokenizer)                            which ids count: all, no specials, no specials and no punctuation

Counts are (V,) float64, one per id; nan where the number is not known.
"""

import hashlib
from collections.abc import Iterable
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from ofutils import UserError

_VOCABULARIES = ("bert-base-uncased", "roberta-base")


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
