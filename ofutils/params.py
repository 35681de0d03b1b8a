"""Scales, settings and the check of parameters, device, provenance and paths.

Everything that a notebook or a command line needs before it starts, with nothing heavier than torch.
"""

import ast
import difflib
import math
import operator
import os
import platform
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import torch

from ofutils import NUMERICS, UserError

SCALES = ("tiny", "small", "gpu", "paper")
_CHECKOUT = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The repository when `ofutils` is installed from a checkout, else the working directory."""
    return _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()


def out() -> Path:
    """Where figures, records and runs are written: `OFUTILS_OUT`, by default the repository."""
    return Path(os.environ.get("OFUTILS_OUT") or root()).expanduser().resolve()


def device() -> torch.device:
    """The device that trainings and measurements use: CUDA where it answers, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_scale(asked: str = "auto") -> tuple[str, str]:
    """Which scale runs, and why.

    Args:
        asked: a name of `SCALES`, or `auto`. A name wins over the environment variable
            `OFUTILS_SCALE`, which wins over `auto`; `auto` is `gpu` where CUDA answers, else `small`.

    Returns:
        The scale and the reason, for printing.

    Raises:
        UserError: an unknown scale, wherever it came from.
    """
    for name, why in ((asked, "asked for"), (os.environ.get("OFUTILS_SCALE") or "auto", "OFUTILS_SCALE")):
        if name != "auto":
            require_known(f"scale ({why})", name, ("auto", *SCALES))
            return name, why
    return ("gpu", "auto: CUDA answers") if torch.cuda.is_available() else ("small", "auto: no CUDA device answers")


def suggest(name: str, known) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


# --- settings: frozen dataclasses that state types, choices and limits where a field is declared


#: Limits of a number, as `Annotated` gives them: `Annotated[float, "above 0", "at most 1"]`.
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
Count = Annotated[int, "at least 1"]
Natural = Annotated[int, "at least 0"]
Positive = Annotated[float, "above 0"]
NotNegative = Annotated[float, "at least 0"]
Fraction = Annotated[float, "at least 0", "below 1"]
Share = Annotated[float, "above 0", "at most 1"]


@typing.dataclass_transform(frozen_default=True)
def settings(cls):
    """A frozen dataclass whose fields are checked whenever one is made: types, `Literal` choices, bounds.

    A `__post_init__` of its own comes after that, for what concerns several fields at once. A nested dataclass may
    be given as a mapping.

    Raises:
        UserError: one line that names the field, what it got and what it takes.
    """
    together = getattr(cls, "__post_init__", None)

    def __post_init__(self):
        for name, kind in _hints(cls).items():
            object.__setattr__(self, name, coerce(name, getattr(self, name), kind))
        if together:
            together(self)

    cls.__post_init__ = __post_init__
    return dataclass(frozen=True)(cls)


@cache
def _hints(cls) -> dict:
    return typing.get_type_hints(cls, include_extras=True)


def coerce(name: str, value, kind):
    """`value` as the declared type `kind`, or a UserError that names the parameter.

    Integral floats pass for int (papermill turns 1e3 into 1000.0), ints for float. The strings that a
    command line gives are read as numbers, booleans and lists where the type asks for them.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = coerce(name, value, parts[0])
        for words, limit in (bound.rsplit(" ", 1) for bound in parts[1:]):
            require(BOUNDS[words](value, float(limit)), f"{name} must be {' and '.join(parts[1:])}, got {value}")
        return value
    if origin is Literal:
        require_known(name, value, parts)
        return value
    if is_dataclass(kind):
        require(isinstance(value, (dict, kind)), f"parameter {name}: expected a mapping, got {value!r}")
        return value if isinstance(value, kind) else build(kind, value, f"{name}.")
    if origin in (tuple, list):
        items, fixed = _items(value) if isinstance(value, str) else value, origin is tuple and parts[-1] is not ...
        fits = isinstance(items, (list, tuple)) and (not fixed or len(items) == len(parts))
        asked = f"{len(parts)} values" if fixed else f"a list of {getattr(parts[0], '__name__', 'numbers')}"
        require(fits, f"parameter {name}: expected {asked}, got {value!r}")
        kinds = parts if fixed else parts[:1] * len(items)
        return origin(coerce(name, item, one) for item, one in zip(items, kinds, strict=True))
    result = value
    if isinstance(value, str) and kind is not str:
        with suppress(ValueError, SyntaxError):
            result = ast.literal_eval(value.strip().capitalize() if kind is bool else value.strip())
    if kind is int and isinstance(result, float) and result.is_integer():
        result = int(result)
    if kind is float and isinstance(result, (int, float)) and not isinstance(result, bool):
        result = float(result)
    fits = type(result) is kind and (kind is not float or math.isfinite(result))
    require(fits, f"parameter {name}: expected {kind.__name__}, got {value!r}")
    return result


def _items(text: str) -> list:
    """`[1, 2]`, `1, 2` and `['a', 'b']` as a list; a bare name is one item of text."""
    try:
        value = ast.literal_eval(text)
        return list(value) if isinstance(value, (list, tuple)) else [value]
    except (ValueError, SyntaxError):
        return [part.strip() for part in text.split(",") if part.strip()]


def require(condition: bool, message: str) -> None:
    """A UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_known(what: str, name, known: typing.Iterable) -> None:
    """A UserError that lists the known names, and the nearest one, unless the name is one of them."""
    known = list(known)
    require(name in known, f"unknown {what} {name!r}{suggest(name, known)}; known: {', '.join(map(str, known))}")


def dimensions(chosen: typing.Iterable[int], width: int) -> list[int]:
    """The chosen dimensions as a list, or a UserError that names one that is no whole number from 0 to width - 1."""
    try:
        chosen = [operator.index(one) for one in chosen]
    except TypeError:
        raise UserError(f"dimensions are whole numbers, got {chosen!r}") from None
    bad = [one for one in chosen if not 0 <= one < width]
    require(not bad, f"dimension {min(bad, default=0)} is out of range: there are dimensions 0 to {width - 1}")
    return chosen


def build(cls, values: dict, prefix: str = ""):
    """Settings from a mapping of plain values, such as YAML or command-line flags give.

    Nested dataclasses take nested mappings. Unknown names and wrong types raise a UserError.
    """
    hints = _hints(cls)
    for name in (name for name in values if name not in hints):
        flags = [line.split()[0].removeprefix("--") for line in usage(cls, prefix)]
        deeper = [flag for flag in flags if flag.endswith(f".{name}")]  # in a group, where it belongs
        near = suggest(full := f"{prefix}{name}", deeper or [prefix + hint for hint in hints])
        raise UserError(f"unknown parameter {full!r}{near}; known: {', '.join(sorted(hints))}")
    return cls(**{name: coerce(prefix + name, value, hints[name]) for name, value in values.items()})


def usage(cls, prefix: str = "") -> list[str]:
    """One line per field of a configuration: its flag and its default."""
    lines, usual = [], cls()
    for name in (field.name for field in fields(cls)):
        inner = is_dataclass(default := getattr(usual, name))
        lines += usage(type(default), f"{prefix}{name}.") if inner else [f"  --{prefix}{name} {default!r}"]
    return lines


def read(cls, arguments: list[str]):
    """A configuration from flags (`--steps 100 --model.layers 4`) over an optional YAML file (`--config FILE`).

    Raises:
        UserError: a file that is not there or holds no mapping, and all that `build` refuses.
    """
    import yaml

    values = flags(arguments)
    if (path := values.pop("config", None)) is not None:
        require(isinstance(path, str), "--config needs the path of a YAML file")
        try:
            base = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        require(isinstance(base, dict), f"{path} holds no mapping of parameters")
        values = merged(base, values)
    return build(cls, values)


def merged(base: dict, over: dict) -> dict:
    """The two together; where both have a mapping, these are merged likewise, else `over` counts."""
    both = {k: merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both


# --- notebooks


@dataclass(frozen=True)
class Session:
    """What a notebook knows about its own run: its name, the scale, and the model that was asked for, if any."""

    notebook: str
    scale: str
    model: str = ""

    @property
    def folder(self) -> Path:
        """Where its figures go: `figures/<notebook>`, and a folder of its own in there for a model asked for."""
        return out() / "figures" / self.notebook / self.model.replace("/", "--")

    def provenance(self, **more) -> dict:
        """What the numbers of this run depend on, for the last cell and beside every figure."""
        return {"notebook": self.notebook, "scale": self.scale, **environment(), **more}


def start(namespace: dict, notebook: str, paper: str) -> Session:
    """Check the parameters of a notebook, settle its scale and say so.

    Declared are the annotated names of the parameters cell, injected those of papermill's own cell; the
    two are compared, so that re-running the cell in JupyterLab is harmless.

    Args:
        namespace: the notebook's `globals()`.
        notebook: its name, e.g. `03_quant`.
        paper: what scale `paper` costs, printed with the line that asks for it.

    Returns:
        The session. A parameter called `model` that is not empty keeps the figures of this run apart.

    Raises:
        UserError: an unknown parameter, a wrong type, a negative integer, an unknown scale.
    """
    declared = dict(namespace.get("__annotations__", {}))
    for name in _injected(namespace.get("In", [])):
        require_known("parameter", name, declared)
    for name, kind in declared.items():
        try:
            namespace[name] = coerce(name, namespace[name], Natural if kind is int else kind)
        except UserError as error:
            hint = " (lists and booleans go by papermill's -y)" if kind not in (int, float, str) else ""
            raise UserError(f"{error}{hint}") from None
    scale, why = resolve_scale(namespace["scale"])
    if scale == "tiny":
        torch.set_num_threads(1)  # more threads only wait for each other at this size
    others = " | ".join(name for name in SCALES if name != scale)
    print(f"scale {scale} ({why}); others: -p scale {others}\n-p scale paper: {paper}")
    return Session(notebook, scale, namespace.get("model", ""))


def _injected(history) -> list[str]:
    """Names that the latest cell injected by papermill assigns; none without papermill."""
    for cell in reversed(list(history)):
        if cell.startswith("# Parameters"):
            targets = [node.targets[0] for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


# --- provenance


def environment() -> dict:
    """Versions, device and threads: what a number may depend on besides its configuration."""
    found = {"numerics": NUMERICS, "python": platform.python_version(), "platform": platform.machine()}
    for package in ("torch", "transformers", "accelerate", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    place = device()
    found["device"] = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    found["threads"] = torch.get_num_threads()
    return found


def main_guard(command: Callable[[list[str]], None]) -> None:
    """Run a command line: a UserError becomes one line on stderr and exit code 1."""
    try:
        command(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to continue", file=sys.stderr)
        sys.exit(130)


def flags(arguments: list[str]) -> dict:
    """`--a.b 1 --c=2 --d` as nested mappings of strings, and True for a flag alone; for `build`."""
    values: dict = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        require(flag.startswith("--") and flag != "--", f"expected a flag such as --steps 100, got {flag!r}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        *path, last = name.replace("-", "_").split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
            require(isinstance(place, dict), f"--{part} is a group of parameters: give --{part}.NAME VALUE")
        place[last] = value
    return values
