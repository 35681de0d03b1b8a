"""Weights and the state of a broken training: written whole, read back to the bit."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ofutils import UserError, params
from ofutils.records import write_atomically


@dataclass
class State:
    """Where a run stands, besides model and optimizer."""

    step: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    loss_count: int = 0
    log: list = field(default_factory=list)
    diverged: int | None = None

    def add(self, loss: Tensor) -> None:
        """Count one step, with its loss (0-d)."""
        self.step += 1
        self.loss_sum = self.loss_sum.to(loss.device) + loss
        self.loss_count += 1


def log_spaced(last: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ... and the last step."""
    return (0, *(1 << power for power in range(last.bit_length()) if 1 << power < last), last)


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits of the model's middle matrix: equal for checkpoints that are copies of each other."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    middle = matrices[len(matrices) // 2].detach().float().cpu().contiguous()
    return hashlib.sha256(middle.numpy().tobytes()).hexdigest()[:12]


def save_weights(path: Path, model: nn.Module) -> None:
    """The weights alone, as safetensors."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary))


def save(path: Path, model: nn.Module, optimizer, state: State, corpus: str) -> None:
    """Model, optimizer and state of a run on the corpus of that sha256, in one file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()}
    tensors["loss_sum"] = state.loss_sum
    rest = {"step": state.step, "loss_count": state.loss_count, "log": state.log, "corpus": corpus}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"state": json.dumps(rest)}))


def restore(path: Path, model: nn.Module, optimizer, corpus: str) -> State:
    """Read a file of `save` into model and optimizer; returns the state.

    Raises:
        UserError: a file that is not readable, or of another corpus.
    """
    try:
        with safe_open(path, "pt") as file:
            rest = json.loads(file.metadata()["state"])
        return _resumed(load_file(path), rest, path, model, optimizer, corpus)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} is not readable; delete it to start the run again") from error


def _resumed(tensors, rest, path: Path, model: nn.Module, optimizer, corpus: str) -> State:
    same = rest.pop("corpus") == corpus
    params.require(same, f"checkpoint {path} was made on another corpus; delete it to start the run again")
    model.load_state_dict(_under(tensors, "model."))
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return State(loss_sum=tensors["loss_sum"], **rest)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
