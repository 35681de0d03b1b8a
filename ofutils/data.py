"""Corpora and their tokenizer. Nothing here needs a network.

A corpus is a list of documents, split by a fixed hash of each document's name into training and
validation; its sha256 names it in every record. The default is the Python standard library's own source.
"""

import hashlib
import os
import site
import sys
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ofutils import NUMERICS, UserError, params
from ofutils.records import write_atomically

BUILT_IN = ("stdlib", "site-packages")
_ENDINGS = "txt md rst py tex html json csv c h js java go"
TEXT_SUFFIXES = {f".{ending}" for ending in _ENDINGS.split()}
_VALIDATION_SHARE = 20  # one document in 20
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split by name; `characters` caps the text of each split (0: all of it)."""

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
    def ranked(self) -> list[tuple[str, str]]:
        """The documents in an order that the hash of their names decides."""
        return sorted(self.documents, key=lambda document: hashlib.sha256(document[0].encode()).hexdigest())

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Texts of `train` and `validation`: disjoint, both non-empty."""
        held = max(1, len(self.ranked) // _VALIDATION_SHARE)
        train, room = [], self.characters or sys.maxsize
        for _, text in self.ranked[held:]:
            if room <= 0:
                break
            train.append(text[:room])
            room -= len(text)
        validation = [text for _, text in self.ranked[:held]]
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
        has = f"it has {', '.join(table.column_names)}"
        params.require(column is not None, f"corpus {path}: needs a string column named text; {has}")
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
        documents = _read_folder(path, TEXT_SUFFIXES) if path.is_dir() else _read_file(path)
    few = f"corpus {source!r} holds {len(documents)} documents of text; it needs two or more"
    params.require(len(documents) >= 2, few)
    return Corpus(source, tuple(documents), characters)


# --- tokens


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
    params.require(vocab >= 257, f"vocab must be at least 257 (256 bytes and {_END}), got {vocab}")
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
    letters = {"special_tokens": [_END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, **letters))
    return tokenizer


def _encode(tokenizer, texts: list[str], vocab: int) -> np.ndarray:
    dtype = np.uint16 if vocab <= 1 << 16 else np.int32
    end = tokenizer.token_to_id(_END)
    rows = [np.array([*row.ids, end], dtype) for row in tokenizer.encode_batch(texts)]
    return np.concatenate(rows)
