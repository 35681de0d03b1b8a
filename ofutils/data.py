"""Corpora and their tokenizer. Nothing here needs a network.

A corpus is a list of documents, split by a fixed hash of each document's name into training and
validation; its sha256 names it in every record. The default is the Python standard library's own source.
"""

import hashlib
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from ofutils import NUMERICS, UserError, backcopy, params
from ofutils.records import save_rows, write_atomically

BUILT_IN = ("stdlib", "site-packages", "backcopy")
_ENDINGS = "txt md rst py tex html json csv c h js java go"
TEXT_SUFFIXES = {f".{ending}" for ending in _ENDINGS.split()}
_VALIDATION_SHARE = 20  # one document in 20
_END = "<|endoftext|>"
_BPE_CHARACTERS = 1 << 30  # of the training split, from which the tokenizer learns
_BACKCOPY = {"train": 1 << 24, "validation": 1 << 18}  # ids of the task's splits
_LOOK = 1 << 24  # ids of a split that are looked at when it is loaded


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split by name; `characters` caps the text of each split (0: all of it)."""

    source: str
    documents: Sequence[tuple[str, str]]  # (name, text), sorted by name
    characters: int = 0

    @cached_property
    def sha256(self) -> str:
        """Of all names and texts, and of the cap."""
        digest = hashlib.sha256(str(self.characters).encode())
        for name, text in self.documents:
            digest.update(f"{name}\0{text}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def _order(self) -> np.ndarray:
        """Places of the documents by the hash of their names."""
        hashes = (hashlib.sha256(name.encode()).digest()[:8] for name, _ in self.documents)
        return np.argsort(np.fromiter((int.from_bytes(one) for one in hashes), np.uint64), kind="stable")

    @property
    def ranked(self) -> Iterator[tuple[str, str]]:
        """The documents in an order that the hash of their names decides."""
        return (self.documents[place] for place in self._order)

    def split(self, name: Literal["train", "validation"]) -> Iterator[str]:
        """The texts of a split, one after the other: the two are disjoint, and neither is empty."""
        held = max(1, len(self.documents) // _VALIDATION_SHARE)
        if name == "validation":
            texts = (text for _, text in islice(self.ranked, held))
            yield from ["\n".join(texts)[: self.characters]] if self.characters else texts
            return
        room = self.characters or sys.maxsize
        for _, text in islice(self.ranked, held, None):
            if room <= 0:
                return
            yield text[:room]
            room -= len(text)


class Mapped(Sequence):
    """Documents of parquet files, in a memory map: a text is read when it is asked for.

    Their texts are copied once to `runs/text`, as an Arrow file, since parquet cannot be read document by document.

    Raises:
        UserError: files that are not readable, or hold no column of text.
    """

    def __init__(self, paths: list[Path]):
        import pyarrow

        seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        place = params.out() / "runs" / "text" / f"{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}.arrow"
        if not place.is_file():
            write_atomically(place, lambda temporary: _copy_texts(paths, temporary))
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(place))).read_all()
        self._numbers, self._texts = table["number"], table["text"]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: int) -> tuple[str, str]:
        return f"{self._numbers[int(place)].as_py():09d}", self._texts[int(place)].as_py()


def _copy_texts(paths: list[Path], target: Path) -> None:
    """The texts of parquet files that are not blank, with the numbers of their rows, as an Arrow file."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("number", pyarrow.int64()), ("text", pyarrow.large_string())])
    with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        number = 0
        for path in paths:
            try:
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
                columns = [one.name for one in file.schema_arrow if str(one.type) in ("string", "large_string")]
                column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
                has = f"it has {', '.join(file.schema_arrow.names)}"
                params.require(column is not None, f"corpus {path}: needs a string column named text; {has}")
                for batch in file.iter_batches(1024, columns=[column]):
                    texts = batch.column(0).to_pylist()
                    kept = [(number + row, text) for row, text in enumerate(texts) if text and text.strip()]
                    number += len(texts)
                    writer.write(
                        pyarrow.record_batch([*map(list, zip(*kept, strict=True))] or [[], []], schema=schema)
                    )
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise UserError(f"corpus {path}: is not a readable parquet file") from error


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


def _read_path(path: Path) -> Sequence[tuple[str, str]]:
    if tables := [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet")):
        return Mapped(tables)
    if path.is_dir():
        return tuple(_read_folder(path, TEXT_SUFFIXES))
    try:
        texts = path.read_text(encoding="utf-8").split("\n\n")  # paragraphs
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"corpus {path}: is neither readable UTF-8 text nor parquet") from error
    return tuple((f"{index:09d}", text) for index, text in enumerate(texts) if text.strip())


@lru_cache(maxsize=4)
def load_corpus(source: str = "stdlib", characters: int = 0) -> Corpus:
    """The documents of a corpus.

    Args:
        source: `stdlib` (the interpreter's standard library without its tests), `site-packages`, or the
            path of a folder of text files, a text file (paragraphs are documents), a parquet file (column
            `text`) or a folder of them, of any size.
        characters: use at most so many characters of each split; 0 uses all.

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
        built_in = f"{params.suggest(source, BUILT_IN)}; built in: {', '.join(BUILT_IN)}"
        params.require(source and path.exists(), f"corpus {source!r}: no such file or folder{built_in}")
        documents = _read_path(path)
    few = f"corpus {source!r} holds {len(documents)} documents of text; it needs two or more"
    params.require(len(documents) >= 2, few)
    return Corpus(source, documents if isinstance(documents, Mapped) else tuple(documents), characters)


# --- tokens


def tokens(source: str, characters: int, bpe: int, context: int) -> "Tokens":
    """What a model of `bpe` ids reads of a corpus: see `load_corpus` and `tokenize`.

    `backcopy`, and `backcopy-N` with N triggers in place of 3, is the task of that name on the text of `stdlib`: rows
    of `context` ids, the same at every call, one after the other; `characters` caps the ids of each split.
    """
    if not _is_backcopy(source):
        return tokenize(load_corpus(source, characters), bpe)
    folder = _folder(f"{fingerprint(source)[:16]}-{bpe}-{context}" + f"-{characters}" * (characters > 0))
    for seed, (split, most) in enumerate(_BACKCOPY.items()):
        if not (path := folder / f"{split}.npy").is_file():
            count = min(most, characters or most) // context
            params.require(count > 0, f"{source} of {characters} characters has no row of {context}")
            rows = backcopy_chain(source, bpe).rows(count, context, seed)
            write_atomically(
                path, lambda temporary, rows=rows: save_rows(temporary, iter([rows.ravel()]), rows.dtype)
            )
    return _loaded(folder, fingerprint(source), bpe)


def _is_backcopy(source: str) -> bool:
    """Whether a corpus is the task `backcopy`."""
    return re.fullmatch(r"backcopy(-\d+)?", source) is not None


def backcopy_chain(source: str, vocab: int) -> backcopy.Chain:
    """The chain behind `backcopy` or `backcopy-N` with so many ids, for its bound and its characters."""
    return backcopy.chain(_counts(), vocab, int(source.partition("-")[2] or 3))


@lru_cache(maxsize=1)
def _counts() -> backcopy.Counts:
    return backcopy.count(load_corpus().split("train"))


def fingerprint(source: str, characters: int = 0) -> str:
    """The sha256 that names a corpus in records."""
    if not _is_backcopy(source):
        return load_corpus(source, characters).sha256
    return hashlib.sha256(f"{source} of {load_corpus().sha256}".encode()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus: one long row of ids per split, documents joined by an end-of-text token."""

    corpus: str  # sha256 of the text
    vocab: int
    train: np.ndarray  # (N,) uint16 or int32
    validation: np.ndarray
    tokenizer_path: Path
    special: tuple[int, ...] = (0,)  # ids that stand between texts: the end-of-text token; `<s>` of backcopy

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
    params.require(vocab >= 257, f"vocab must be at least 257 (256 bytes and {_END}), got {vocab}")
    folder = _folder(f"{corpus.sha256[:16]}-{vocab}")
    paths = {split: folder / f"{split}.npy" for split in ("train", "validation")}
    tokenizer_path = folder / "tokenizer.json"
    if not all(path.is_file() for path in (*paths.values(), tokenizer_path)):
        tokenizer = _train_bpe(_up_to(_BPE_CHARACTERS, corpus.split("train")), vocab)
        write_atomically(tokenizer_path, lambda path: path.write_text(tokenizer.to_str()))
        for split, path in paths.items():
            texts = corpus.split(split)
            rows, dtype = _encoded(tokenizer, texts), np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)
            write_atomically(path, lambda temporary, rows=rows, dtype=dtype: save_rows(temporary, rows, dtype))
    return _loaded(folder, corpus.sha256, vocab)


def _folder(name: str) -> Path:
    return params.out() / "runs" / "tokens" / f"{name}-{NUMERICS}"


def _loaded(folder: Path, sha256: str, vocab: int) -> Tokens:
    try:
        loaded = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "validation")}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the tokens in {folder} are not readable; delete that folder") from error
    largest = max(int(ids[:_LOOK].max()) for ids in loaded.values())
    params.require(largest < vocab, f"{folder} holds other tokens; delete it")
    return Tokens(sha256, vocab, **loaded, tokenizer_path=folder / "tokenizer.json")


def _up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """The first texts, until they hold so many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _train_bpe(texts: Iterable[str], vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = {"special_tokens": [_END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, **letters))
    return tokenizer


def _encoded(tokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
    end = tokenizer.token_to_id(_END)
    while some := list(islice(texts, 1024)):
        yield from ([*row.ids, end] for row in tokenizer.encode_batch(some))
