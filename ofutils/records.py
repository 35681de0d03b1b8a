"""Content-addressed records: what was run, what came out, and whether it may be used again.

A record is named by what makes its numbers: the fields of a configuration that differ from their
defaults, and `NUMERICS`. The same configuration has the same name on every machine; a field added later
with a default leaves old names as they are.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ofutils import NUMERICS, UserError


def differing(config) -> dict:
    """The fields of a dataclass (nested ones too) that differ from their defaults, as plain values."""
    default, found = type(config)(), {}
    for field in fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if is_dataclass(value):
            if inner := differing(value):
                found[field.name] = inner
        elif value != usual:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def digest(kind: str, key: dict, numerics: int = NUMERICS) -> str:
    """The name of a record: its kind and twelve hexadecimal digits of what identifies it."""
    text = json.dumps({"kind": kind, "key": key, "numerics": numerics}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: the file is whole or it is not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_rows(path: Path, rows: Iterable, dtype) -> None:
    """Write rows of numbers one after the other as one .npy array, of which a few are in memory at a time."""
    about, count = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}, 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about | {"shape": (0,)})
        for row in rows:
            file.write(np.asarray(row, dtype).tobytes())
            count += len(row)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, about | {"shape": (count,)})  # as long as the first one


@dataclass(frozen=True)
class Store:
    """Where records lie: one JSON file each under `local`, JSON lines of finished ones under `committed`.

    A record is a mapping with `name`, `key` (what identifies it), `numerics`, `environment` (Python,
    torch, device, the corpus' sha256) and `result`.
    """

    local: Path
    committed: Path

    def path(self, kind: str, key: dict) -> Path:
        """The file of a local record."""
        return self.local / "records" / f"{digest(kind, key)}.json"

    def write(self, kind: str, key: dict, result: dict, environment: dict) -> dict:
        """Write a record, whole or not at all, and return it."""
        record = {"name": digest(kind, key), "key": key, "numerics": NUMERICS}
        record |= {"environment": environment, "result": result}
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(self.path(kind, key), lambda path: path.write_text(text))
        return record

    def find(self, kind: str, key: dict) -> dict | None:
        """The record of that name, a local one before a committed one; None where there is none.

        Raises:
            UserError: a record that is not readable, or whose content belongs to another name.
        """
        path = self.path(kind, key)
        if path.is_file():
            return _parse(path.read_bytes(), path, digest(kind, key))
        return self._committed().get(digest(kind, key))

    def _committed(self) -> dict[str, dict]:
        found = {}
        for path in sorted(self.committed.glob("*.jsonl")):
            found |= _read_lines(path, path.stat().st_mtime_ns)
        return found

    def export(self, records: list[dict], name: str) -> Path:
        """Add finished records to JSON lines that are committed and found on other machines; returns their path.

        What is there already stays, but for records of older `NUMERICS`. What another file holds is left out.
        """
        path = self.committed / f"{name}.jsonl"
        others = [other for other in self.committed.glob("*.jsonl") if other != path]
        held = {one for other in others for one in _read_lines(other, other.stat().st_mtime_ns)}
        there = _read_lines(path, path.stat().st_mtime_ns) if path.is_file() else {}
        whole = {one: record for one, record in there.items() if record["numerics"] == NUMERICS}
        whole |= {record["name"]: record for record in records}
        text = "".join(json.dumps(whole[one]) + "\n" for one in sorted(whole.keys() - held))
        write_atomically(path, lambda temporary: temporary.write_text(text))
        return path


@lru_cache(maxsize=128)  # well above the number of files, or each look reads all of them again
def _read_lines(path: Path, _changed: int) -> dict[str, dict]:
    records = [_parse(line, path) for line in path.read_bytes().splitlines() if line.strip()]
    return {record["name"]: record for record in records}


def _parse(text: bytes, path: Path, name: str | None = None) -> dict:
    try:
        record = json.loads(text)
        kind = record["name"].rpartition("-")[0]
        true_name = digest(kind, record["key"], record["numerics"])
        whole = {"environment", "result"} <= record.keys() and bool(record["result"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"record {path} is not readable; {_advice(name)}") from error
    if not whole or true_name != record["name"] or name not in (None, true_name):
        raise UserError(f"record {path} does not hold what its name says; {_advice(name)}")
    return record


def _advice(name: str | None) -> str:
    return "delete it to repeat its run" if name else "restore it from version control"


def warn_of_other_corpus(record: dict, sha256: str | None) -> None:
    """One line where a record was made on another corpus than the one that is here (None: it is not here)."""
    theirs = record["environment"].get("corpus")
    if theirs and theirs != sha256:
        _say_once(f"records made on another corpus are used: sha256 {theirs[:12]}, here {(sha256 or 'none')[:12]}")


@cache
def _say_once(line: str) -> None:
    print(line)
