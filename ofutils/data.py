"""Corpora, their tokenizer, and batches with a cursor. Nothing here needs a network.

A corpus is a list of documents, split by a fixed hash of each document's name into training and
validation; its sha256 names it in every record. The default is the Python standard library's own source.
"""

import ast
import hashlib
import os
import site
import sys
import sysconfig
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ofutils import NUMERICS, UserError, params
from ofutils.records import write_atomically

BUILT_IN = ("stdlib", "site-packages")
_ENDINGS = "txt md rst py tex html json csv c h js java go"
TEXT_SUFFIXES = {f".{ending}" for ending in _ENDINGS.split()}
_VALIDATION_SHARE = 20  # one document in 20
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split by name; `characters` caps the training text (0: all of it)."""

    source: str
    documents: tuple[tuple[str, str], ...]  # (name, text), sorted by name
    characters: int = 0

    @cached_property
    def sha256(self) -> str:
        """Of all names and texts, and of the cap."""
        digest = hashlib.sha256(str(self.characters).encode())
        for name, text in self.documents:
            digest.update(f"{name}\0{text}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Texts of `train` and `validation`: disjoint, both non-empty."""
        ranked = sorted(self.documents, key=_order)
        held = max(1, len(ranked) // _VALIDATION_SHARE)
        train, room = [], self.characters or sys.maxsize
        for _, text in ranked[held:]:
            if room <= 0:
                break
            train.append(text[:room])
            room -= len(text)
        validation = [text for _, text in ranked[:held]]
        if self.characters:
            validation = ["\n".join(validation)[: self.characters]]
        return {"train": train, "validation": validation}


def _read_folder(folder: Path, suffixes: set[str], skip: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    documents = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - skip)  # walk neither skips nor orders by itself
        for path in (Path(place, name) for name in sorted(names) if Path(name).suffix in suffixes):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # not text, whatever its name says, or a dangling link
            if text.strip():
                documents.append((path.relative_to(folder).as_posix(), text))
    return sorted(documents)


def _read_file(path: Path) -> list[tuple[str, str]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"corpus {path}: is not a readable parquet file") from error
        columns = [f.name for f in table.schema if str(f.type) in ("string", "large_string")]
        column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
        if column is None:
            raise UserError(
                f"corpus {path}: needs a string column named text; it has {', '.join(table.column_names)}"
            )
        texts = table[column].to_pylist()
    else:
        try:
            texts = path.read_text(encoding="utf-8").split("\n\n")  # paragraphs
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"corpus {path}: is neither readable UTF-8 text nor parquet") from error
    return [(f"{index:09d}", text) for index, text in enumerate(texts) if text and text.strip()]


@lru_cache(maxsize=4)
def load_corpus(source: str = "stdlib", characters: int = 0) -> Corpus:
    """The documents of a corpus.

    Args:
        source: `stdlib` (the interpreter's standard library without its tests), `site-packages`, or the
            path of a folder of text files, a text file (paragraphs are documents) or a parquet file
            (column `text`).
        characters: use at most so many characters of training text; 0 uses all.

    Raises:
        UserError: an unknown name, a missing path, a corpus with fewer than two documents.
    """
    if source == "stdlib":
        skip = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
        documents = _read_folder(Path(sysconfig.get_path("stdlib")), {".py"}, skip)
    elif source == "site-packages":
        documents = [item for place in site.getsitepackages() for item in _read_folder(Path(place), {".py"})]
    else:
        path = Path(source).expanduser()
        if not source or not path.exists():
            known = ", ".join(BUILT_IN)
            raise UserError(
                f"corpus {source!r}: no such file or folder{params.suggest(source, BUILT_IN)}; built in: {known}"
            )
        documents = _read_folder(path, TEXT_SUFFIXES) if path.is_dir() else _read_file(path)
    if len(documents) < 2:
        raise UserError(f"corpus {source!r} holds {len(documents)} documents of text; it needs two or more")
    return Corpus(source, tuple(documents), characters)


# ---------------------------------------------------------------------------------------------------
# tokens


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus: one long row of ids per split, documents joined by an end-of-text token."""

    corpus: str  # sha256 of the text
    vocab: int
    train: np.ndarray  # (N,) uint16 or int32
    validation: np.ndarray
    tokenizer_path: Path

    @cached_property
    def tokenizer(self):
        """The byte-level BPE (a `tokenizers.Tokenizer`)."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_path))


@lru_cache(maxsize=4)
def tokenize(corpus: Corpus, vocab: int) -> Tokens:
    """Train a byte-level BPE on the training split and encode both; cached on disk by content.

    The cache lies in `runs/tokens` and is named by the corpus' sha256, the vocabulary and `NUMERICS`.

    Args:
        vocab: number of ids, at least 257 (the bytes and the end-of-text token).
    """
    if vocab < 257:
        raise UserError(f"vocab must be at least 257 (256 bytes and {_END}), got {vocab}")
    folder = params.out() / "runs" / "tokens" / f"{corpus.sha256[:16]}-{vocab}-{NUMERICS}"
    paths = {split: folder / f"{split}.npy" for split in ("train", "validation")}
    tokenizer_path = folder / "tokenizer.json"
    if not all(path.is_file() for path in (*paths.values(), tokenizer_path)):
        tokenizer = _train_bpe(corpus.splits["train"], vocab)
        write_atomically(tokenizer_path, lambda path: path.write_text(tokenizer.to_str()))
        for split, path in paths.items():
            ids = _encode(tokenizer, corpus.splits[split], vocab)
            write_atomically(path, lambda temporary, ids=ids: _save(temporary, ids))
    try:
        loaded = {split: np.load(path, mmap_mode="r") for split, path in paths.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"the tokens in {folder} are not readable; delete that folder") from error
    params.require(max(int(ids.max()) for ids in loaded.values()) < vocab, f"{folder} holds other tokens; delete it")
    return Tokens(corpus.sha256, vocab, **loaded, tokenizer_path=tokenizer_path)


def _save(path: Path, ids: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, ids)


def _train_bpe(texts: list[str], vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer, texts: list[str], vocab: int) -> np.ndarray:
    dtype = np.uint16 if vocab <= 1 << 16 else np.int32
    end = tokenizer.token_to_id(_END)
    rows = [np.array([*row.ids, end], dtype) for row in tokenizer.encode_batch(texts)]
    return np.concatenate(rows)


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
    for _, text in sorted(corpus.documents, key=_order):
        own = [_sentence(node) for node in _nodes(text, kinds)]
        found |= dict.fromkeys([one for one in own if len(one) <= longest and len(one.split()) >= 5][:each])
        if len(found) >= count:
            return list(found)[:count]
    raise UserError(f"corpus {corpus.source!r} has {len(found)} sentences in docstrings, {count} are asked for")


def _order(document: tuple[str, str]) -> str:
    return hashlib.sha256(document[0].encode()).hexdigest()


def pairs(corpus: Corpus, count: int, longest: int = 2000) -> list[tuple[str, str]]:
    """Functions of a corpus of Python source, each as (first sentence of its docstring, its code without it).

    Args:
        count: how many; documents are visited as in `docstrings`, with at most 8 of each.
        longest: characters of code.

    Raises:
        UserError: a corpus that does not have so many.
    """
    found: dict[str, str] = {}
    for _, text in sorted(corpus.documents, key=_order):
        own = {}
        for node in _nodes(text, (ast.FunctionDef, ast.AsyncFunctionDef)):
            sentence = _sentence(node)
            node.body = node.body[1:] or [ast.Pass()]
            if len(sentence.split()) >= 5 and len(code := ast.unparse(node)) <= longest:
                own[sentence] = code
        found |= dict(list(own.items())[:8])
        if len(found) >= count:
            return list(found.items())[:count]
    raise UserError(f"corpus {corpus.source!r} has {len(found)} functions with docstrings, {count} are asked for")


def _nodes(text: str, kinds: tuple) -> list:
    """The documented nodes of these kinds in Python source; none where it does not parse."""
    with suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source that is read
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
    return []


def _sentence(node) -> str:
    return " ".join(ast.get_docstring(node).partition("\n\n")[0].split()).partition(". ")[0]


def mask_tokens(batch: dict[str, Tensor], tokenizer, seed: int, share: float = 0.15) -> tuple[dict, Tensor]:
    """A batch for masked-token prediction: of the tokens that are not special, a share is to be predicted.

    Of those, 80% become the mask token, 10% a random token, 10% stay (Devlin et al. 2019).

    Returns:
        The batch with other `input_ids`, and the labels (B, T): the true id where it is to be predicted, else -100.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draw = torch.rand(ids.shape, generator=generator)
    asked = (draw < share) & ~special & batch["attention_mask"].bool()
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    masked = torch.where(asked & (draw < 0.8 * share), tokenizer.mask_token_id, ids)
    masked = torch.where(asked & (draw >= 0.8 * share) & (draw < 0.9 * share), other, masked)
    return batch | {"input_ids": masked}, torch.where(asked, ids, -100)


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


# ---------------------------------------------------------------------------------------------------
# batches


@dataclass
class Batches:
    """Training batches in a shuffled order that only the seed and the cursor decide.

    The row of ids is cut into chunks of `context` tokens; each epoch visits every chunk once in its own
    order. `cursor` counts the batches drawn: set it to go on from there, to the bit.
    """

    ids: np.ndarray  # (N,)
    batch: int
    context: int
    seed: int = 0
    cursor: int = 0

    def __post_init__(self):
        self.chunks = len(self.ids) // self.context
        if self.chunks < self.batch:
            raise UserError(
                f"the corpus is too short: its training split has {len(self.ids)} tokens, "
                f"one batch of {self.batch} x {self.context} needs {self.batch * self.context}"
            )
        self._epoch, self._order = -1, np.empty(0, int)

    def draw(self) -> Tensor:
        """The next batch, (batch, context) int64. The last, incomplete batch of an epoch is left out."""
        epoch, index = divmod(self.cursor, self.chunks // self.batch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.chunks)
        chosen = self._order[index * self.batch : (index + 1) * self.batch]
        self.cursor += 1
        starts = chosen[:, None] * self.context + np.arange(self.context)  # (batch, context)
        return torch.from_numpy(self.ids[starts].astype(np.int64))


def fixed_batches(ids: np.ndarray, count: int, batch: int, context: int) -> list[Tensor]:
    """The same `count` batches at every call: chunks spread evenly over `ids`, (batch, context) each.

    Raises:
        UserError: a split shorter than one batch. With fewer than `count` batches, all there are.
    """
    chunks = len(ids) // context
    count = min(count, chunks // batch)
    if count < 1:
        raise UserError(
            f"the corpus is too short: its validation split has {len(ids)} tokens, "
            f"one batch of {batch} x {context} needs {batch * context}"
        )
    chosen = np.linspace(0, chunks - 1, count * batch).astype(int)
    starts = chosen[:, None] * context + np.arange(context)
    return list(torch.from_numpy(ids[starts].astype(np.int64)).split(batch))
