"""Tasks of sentences and sentence pairs: what is read, what is asked, and how answers are scored.

    TASKS                        GLUE and `docstrings` by name: columns, classes, metric, splits
    read_task(task)              the same for a name or a folder
    examples(task, split, rows)  texts and labels
    sha256(task, rows)           what tells whether they are the same as before
    METRICS                      accuracy, Matthews' and Pearson's correlation

GLUE comes from the Hub as parquet. Its test splits have no labels and are not used. `docstrings` is made of the
standard library and on every machine; a folder is for data of one's own.
"""

import ast
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ofutils import UserError, data, hub, params, sources
from ofutils.sentences import documented, first_sentence

#: Where GLUE lies on the Hub.
GLUE = sources.read("02_bert_outliers", "paper").texts[0][0]
_SENTENCES = ("sentence1", "sentence2")
_ENDINGS = (".parquet", ".tsv", ".csv")
_HELD_OUT, _MOST = 250, 1200  # functions in `docstrings`: for validation, and for training at most
_APART = 8  # `pairs` takes no more from one file, so that the eighth before is from another


@dataclass(frozen=True)
class Task:
    """How a task is read and scored."""

    keys: tuple[str, ...]  # the columns of its one or two texts
    labels: int  # classes; 1 means regression
    metric: str = "accuracy"  # a name of METRICS
    splits: tuple[str, ...] = ("validation",)  # what it is scored on; the first decides the best epoch


#: GLUE without WNLI, with the metrics of puccetti2022's code, and `docstrings`: does this code do what that sentence
#: says? Each sentence stands in a true pair (1) and in a false one (0), with the code of a function of another file.
TASKS = {
    "cola": Task(("sentence",), 2, "mcc"),
    "mnli": Task(("premise", "hypothesis"), 3, splits=("validation_matched", "validation_mismatched")),
    "mrpc": Task(_SENTENCES, 2),
    "qnli": Task(("question", "sentence"), 2),
    "qqp": Task(("question1", "question2"), 2),
    "rte": Task(_SENTENCES, 2),
    "sst2": Task(("sentence",), 2),
    "stsb": Task(_SENTENCES, 1, "pearson"),
    "docstrings": Task(("docstring", "code"), 2),
}


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of equal entries."""
    return float(np.mean(np.asarray(predicted) == np.asarray(true)))


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson's correlation, -1 to 1; 0 where it is not defined: one side is constant or not finite."""
    sides = [np.asarray(side, np.float64) for side in (predicted, true)]
    defined = all(np.isfinite(side).all() and np.ptp(side) > 0 for side in sides)
    return float(np.corrcoef(*sides)[0, 1]) if defined else 0.0


#: What a task is scored by; higher is better. Matthews' correlation of two vectors of 0 and 1, that is
#: (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)), is Pearson's of the two.
METRICS = {"accuracy": accuracy, "mcc": pearson, "pearson": pearson}


def read_task(task: str) -> Task:
    """What a task is: an entry of `TASKS`, or read from the training data of a folder.

    Raises:
        UserError: neither a known name nor a folder, or a folder without usable training data of two labels or more.
    """
    if task in TASKS:
        return TASKS[task]
    if not find_folder(task):
        params.require_known("task", task, (*TASKS, "or the path of a folder"))
    keys, classes = _columns(task), _classes(task)
    return Task(keys, len(classes)) if classes else Task(keys, 1, "pearson")


def find_folder(task: str) -> Path | None:
    """The folder that a task is, as an absolute path; None for a name of `TASKS`, and where there is no folder."""
    if not task or task in TASKS:
        return None
    try:
        path = Path(task).expanduser().resolve()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, ~ of a stranger, a null byte
        return None


def examples(task: str, split: str, rows: int = 0) -> tuple[list[tuple[str, ...]], list[float | int]]:
    """Texts and labels of a split.

    Rows without a label (an empty one, in GLUE also -1) are left out. `docstrings` has 500 rows for validation and up
    to 2,400 for training, from other files of the standard library; no sentence and no code is in both.

    Args:
        task: a name of `TASKS`, or a folder that holds `train` and `validation` as .parquet, .tsv (unquoted, like
            GLUE's own files) or .csv, with `label` and the text columns of one of GLUE's tasks, the same in both
            splits. The training data's labels are sorted and numbered, and those of the other split are found
            among them, by value or else as text; decimals in the training data mean regression.
        split: `train`, or one of the task's `splits`.
        rows: at most so many; 0 takes all. They are chosen at random, always the same ones. Of `docstrings` they
            are the pairs of the first functions in a fixed order. A false pair has the code of the eighth function
            before its own, and in training those of the first eight functions that of the last eight taken, so that
            the code of these eight pairs depends on the number.

    Returns:
        A tuple of one or two texts for each row, and its label: a class from 0, or a number in regression.

    Raises:
        UserError: an unknown task or split; a missing file, column or text; a label that the training data lack, or
            that is no number in regression; fewer than two rows; what `hub.text` refuses.
    """
    described = read_task(task)
    params.require_known(f"split of task {task}", split, ("train", *described.splits))
    params.require(rows >= 0, f"rows must be at least 0, got {rows}")
    texts, labels = _docstrings(split, rows) if task == "docstrings" else _rows(task, split, rows)
    few = f"split {split} has {len(texts)} labelled rows, two or more are needed"
    params.require(len(texts) >= 2, f"task {task}: {few}")
    return [tuple(str(text) for text in row) for row in texts], labels


def sha256(task: str, rows: int = 0) -> str:
    """Of all texts and labels that a run reads: those of `examples` for the training data and for every split."""
    found = hashlib.sha256()
    for split in ("train", *read_task(task).splits):
        found.update(repr(examples(task, split, rows)).encode())
    return found.hexdigest()


def _rows(task: str, split: str, rows: int) -> tuple[list, list]:
    """Texts and labels of the rows of a table that have a label."""
    from pyarrow import array, int64

    columns, table = _columns(task, split), _table(task, split)
    labels, empty = table["label"].to_pylist(), (-1, None, "") if task in TASKS else (None, "")
    chosen = [index for index, label in enumerate(labels) if label not in empty]
    if 0 < rows < len(chosen):
        chosen = [chosen[i] for i in sorted(np.random.default_rng(0).permutation(len(chosen))[:rows])]
    taken = table.take(array(chosen, int64()))
    texts = list(zip(*(taken[column].to_pylist() for column in columns), strict=True))
    if bare := [index for index, row in zip(chosen, texts, strict=True) if None in row]:
        raise UserError(f"task {task}: row {bare[0] + 1} of split {split} has a label and no text")
    return texts, _numbered(task, split, [labels[i] for i in chosen])


def _numbered(task: str, split: str, labels: list) -> list:
    """Labels as numbers: as they are (GLUE, regression), or the places of a folder's classes."""
    if task in TASKS:
        return labels
    if classes := _classes(task):
        places = {known: place for place, label in enumerate(classes) for known in (label, str(label))}
        found, why = [places.get(label, places.get(str(label))) for label in labels], "which the training data lack"
        wrong = sorted(str(label) for label, place in zip(labels, found, strict=True) if place is None)
    else:
        found, why = labels, "but the training data have decimals, and regression needs numbers"
        wrong = [label for label in labels if not isinstance(label, (int, float)) or not math.isfinite(label)]
    params.require(not wrong, f"task {task}: split {split} has the label {wrong[0] if wrong else None!r}, {why}")
    return found


def _classes(task: str) -> tuple:
    """The sorted labels of a folder's training data; none for regression."""
    _columns(task)
    labels = set(_table(task, "train")["label"].to_pylist()) - {None, ""}
    if len(labels) < 2:
        only = f"the label {labels.pop()!r} alone" if labels else "no label"
        raise UserError(f"task {task}: the training data have {only}; two or more are needed")
    return () if any(isinstance(label, float) for label in labels) else tuple(sorted(labels))


def _columns(task: str, split: str = "train") -> tuple[str, ...]:
    """The text columns of a split: the task's, or those of the task of GLUE that the folder's data are like."""
    there = _table(task, split).column_names
    known = [TASKS[task].keys] if task in TASKS else sorted({one.keys for one in TASKS.values()}, key=len)[::-1]
    if task not in TASKS and split != "train":
        known = [_columns(task)]
    found = [keys for keys in known if {*keys, "label"} <= set(there)]
    needs = f"needs the columns label and {' or '.join(' and '.join(keys) for keys in known)}"
    params.require(len(found) > 0, f"task {task}: split {split} {needs}; it has {', '.join(there)}")
    if twice := [column for column in (*found[0], "label") if there.count(column) > 1]:
        raise UserError(f"task {task}: split {split} has the column {twice[0]} more than once")
    return found[0]


def _table(task: str, split: str):
    """A split as a table of pyarrow."""
    names = [f"{split}{ending}" for ending in _ENDINGS]
    paths = [hub.text(GLUE, task, split)] if task in TASKS else [find_folder(task) / name for name in names]
    path = next((path for path in paths if path.is_file()), None)
    params.require(path is not None, f"task {task}: the folder has no {' or '.join(names)}")
    return _read_table(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_table(path: Path, _changed: int):
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        form = {"delimiter": "\t", "quote_char": False} if path.suffix == ".tsv" else {"newlines_in_values": True}
        texts = {key: pyarrow.string() for one in TASKS.values() for key in one.keys}
        types = csv.ConvertOptions(column_types=texts)
        return csv.read_csv(path, parse_options=csv.ParseOptions(**form), convert_options=types)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not readable as {path.suffix}: {str(error).splitlines()[0]}") from error


def _docstrings(split: str, rows: int) -> tuple[list, list]:
    """True and false pairs in turn."""
    count = min(_MOST, max(2 * _APART, -(-rows // 2)) if rows else _MOST)
    found = _functions(split, count if split == "train" else _HELD_OUT)
    false = [(sentence, found[place - _APART][1]) for place, (sentence, _) in enumerate(found)]
    texts = [text for both in zip(found, false, strict=True) for text in both]
    return texts[: rows or None], ([1, 0] * len(found))[: rows or None]


@lru_cache(maxsize=8)
def _functions(split: str, count: int) -> list[tuple[str, str]]:
    """(sentence, code) of functions; one file in five is for validation, and no text is twice or in both splits."""
    corpus = data.load_corpus()
    seen = set() if split != "train" else {text for pair in _functions("validation", _HELD_OUT) for text in pair}
    mine = [one for one in corpus.documents if _is_held_out(one[0]) == (split != "train")]
    found, spare = [], count // 10 + _APART  # for those that are left out
    for pair in pairs(data.Corpus(corpus.source, tuple(mine)), count + spare):
        if not seen & set(pair):
            seen |= set(pair)
            found.append(pair)
    return found[:count]


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def pairs(corpus: data.Corpus, count: int, longest: int = 2000) -> list[tuple[str, str]]:
    """Functions of a corpus of Python source, each as (first sentence of its docstring, its code without it).

    Args:
        count: how many; documents are visited as in `sentences.docstrings`, with at most 8 of each.
        longest: characters of code.

    Raises:
        UserError: a corpus that does not have so many.
    """
    found: dict[str, str] = {}
    for _, text in corpus.ranked:
        own = {}
        for node in documented(text, (ast.FunctionDef, ast.AsyncFunctionDef)):
            sentence = first_sentence(node)
            node.body = node.body[1:] or [ast.Pass()]
            if len(sentence.split()) >= 5 and len(code := ast.unparse(node)) <= longest:
                own[sentence] = code
        found |= dict(list(own.items())[:8])
        if len(found) >= count:
            return list(found.items())[:count]
    raise UserError(f"corpus {corpus.source!r} has {len(found)} functions with docstrings, {count} are asked for")
