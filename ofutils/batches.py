"""Batches for trainings and evaluations, cut from one long row of ids."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofutils import params


@dataclass
class Batches:
    """Training batches in a shuffled order that only the seed and the batch's number decide.

    The row of ids is cut into chunks of `context` tokens; each epoch visits every chunk once in its own
    order. A run that goes on from a step sees the batches that it would have seen, to the bit.

    Raises:
        UserError: ids shorter than one batch.
    """

    ids: np.ndarray  # (N,)
    batch: int
    context: int
    seed: int = 0

    def __post_init__(self):
        self.chunks, self._epoch, self._order = len(self.ids) // self.context, -1, np.empty(0, int)
        _require_a_batch(self.ids, "training", self.batch, self.context)

    def at(self, number: int) -> Tensor:
        """The batch of that number, (batch, context) int64. The last, incomplete batch of an epoch is left out."""
        epoch, index = divmod(number, self.chunks // self.batch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.chunks)
        return _rows(self.ids, self._order[index * self.batch : (index + 1) * self.batch], self.context)


class Ahead:
    """Batches of which the next is made in a thread, in pinned memory, while the device works on this one.

    Args:
        batches: what is read; nobody else may read it at the same time.
        rows: which rows of a batch are wanted.
        device: where they go.
    """

    def __init__(self, batches: Batches, rows: slice, device: torch.device):
        self.batches, self.rows, self.device = batches, rows, device
        self._thread, self._next = ThreadPoolExecutor(1), (-1, None)

    def at(self, number: int) -> Tensor:
        """The rows of the batch of that number, on the device; no matter in which order they are asked for."""
        known, made = self._next
        batch = (made if known == number else self._thread.submit(self._make, number)).result()
        self._next = number + 1, self._thread.submit(self._make, number + 1)
        return batch.to(self.device, non_blocking=True)

    def _make(self, number: int) -> Tensor:
        batch = self.batches.at(number)[self.rows]
        return batch.pin_memory() if self.device.type == "cuda" else batch


def fixed_batches(ids: np.ndarray, count: int, batch: int, context: int) -> list[Tensor]:
    """The same `count` batches at every call: chunks spread evenly over `ids`, (batch, context) each.

    Raises:
        UserError: a split shorter than one batch. With fewer than `count` batches, all there are.
    """
    _require_a_batch(ids, "validation", batch, context)
    chunks = len(ids) // context
    chosen = np.linspace(0, chunks - 1, min(count, chunks // batch) * batch).astype(int)
    return list(_rows(ids, chosen, context).split(batch))


def _require_a_batch(ids: np.ndarray, split: str, batch: int, context: int) -> None:
    has, needs = (
        f"its {split} split has {len(ids)} tokens",
        f"one batch of {batch} x {context} needs {batch * context}",
    )
    params.require(len(ids) // context >= batch, f"the corpus is too short: {has}, {needs}")


def _rows(ids: np.ndarray, chunks: np.ndarray, context: int) -> Tensor:
    """The chunks of those numbers, (n, context) int64."""
    return torch.from_numpy(ids[chunks[:, None] * context + np.arange(context)].astype(np.int64))
