"""Scales, the check of parameters, seeds, device, provenance and paths.

Everything that a notebook or a command line needs before it starts, with nothing heavier than torch.
"""

import ast
import difflib
import math
import os
import platform
import sys
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
        if name == "auto":
            continue
        if name not in SCALES:
            raise UserError(
                f"unknown scale {name!r} ({why}){suggest(name, SCALES)}; known: auto, {', '.join(SCALES)}"
            )
        return name, why
    return ("gpu", "auto: CUDA answers") if torch.cuda.is_available() else ("small", "auto: no CUDA device answers")


def suggest(name: str, known) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


# ---------------------------------------------------------------------------------------------------
# values and types


def coerce(name: str, value, kind):
    """`value` as the declared type `kind`, or a UserError that names the parameter.

    Integral floats pass for int (papermill turns 1e3 into 1000.0), ints for float. The strings that a
    command line gives are read as numbers and booleans where the type asks for them.
    """
    origin = typing.get_origin(kind)
    if origin in (tuple, list):
        inner = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = _items(value)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"parameter {name}: expected a list of {inner.__name__}, got {value!r}")
        return origin(coerce(name, item, inner) for item in value)
    result = value
    if isinstance(value, str) and kind is not str:
        try:
            result = ast.literal_eval(value.strip().capitalize() if kind is bool else value.strip())
        except (ValueError, SyntaxError):
            result = value
    if kind is int and isinstance(result, float) and result.is_integer():
        result = int(result)
    if kind is float and type(result) is int:
        result = float(result)
    if type(result) is not kind or (kind is float and not math.isfinite(result)):
        raise UserError(f"parameter {name}: expected {kind.__name__}, got {value!r}")
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


def build(cls, values: dict, prefix: str = ""):
    """A dataclass from a mapping of plain values, such as YAML or command-line flags give.

    Nested dataclasses take nested mappings. Unknown names and wrong types raise a UserError.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name for field in fields(cls)}
    taken = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"unknown parameter {prefix + name!r}{suggest(name, known)}; known: {', '.join(sorted(known))}"
            )
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"parameter {prefix + name}: expected a mapping, got {value!r}")
            taken[name] = build(hints[name], value, f"{prefix}{name}.")
        else:
            taken[name] = coerce(prefix + name, value, hints[name])
    return cls(**taken)


def usage(cls, prefix: str = "") -> list[str]:
    """One line per field of a configuration: its flag and its default."""
    lines = []
    for field in fields(cls):
        default = field.default if field.default is not MISSING else field.default_factory()
        name = f"{prefix}{field.name}"
        lines += usage(type(default), f"{name}.") if is_dataclass(default) else [f"  --{name} {default!r}"]
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
        if not isinstance(base, dict):
            raise UserError(f"{path} holds no mapping of parameters")
        values = _merged(base, values)
    return build(cls, values)


def _merged(base: dict, over: dict) -> dict:
    both = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both


# ---------------------------------------------------------------------------------------------------
# notebooks


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
        if name not in declared:
            raise UserError(f"unknown parameter {name!r}{suggest(name, declared)}; known: {', '.join(declared)}")
    for name, kind in declared.items():
        try:
            namespace[name] = coerce(name, namespace[name], kind)
        except UserError as error:
            hint = " (lists and booleans go by papermill's -y)" if kind not in (int, float, str) else ""
            raise UserError(f"{error}{hint}") from None
        if kind is int and namespace[name] < 0:
            raise UserError(f"parameter {name}: expected 0 or more, got {namespace[name]}")
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


# ---------------------------------------------------------------------------------------------------
# provenance


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


def main_guard(command: typing.Callable[[list[str]], None]) -> None:
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
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"expected a flag such as --steps 100, got {flag!r}")
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
