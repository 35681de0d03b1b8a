"""Batches for trainings and evaluations, cut from one long row of ids, or of bytes where chunks are images; tokens
hidden that are to be predicted."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofutils import params

SHARE = 0.15  # of a row's tokens that masked-token prediction asks for


def hidden(ids: Tensor, asked: Tensor, draw: Tensor, other: Tensor, mask: int, share: float = 1.0):
    """Ids with tokens hidden that are to be predicted: 80% become the mask token, 10% another token, 10% stay.

    Args:
        ids: (B, T).
        asked: (B, T), true where the token is to be predicted.
        draw: (B, T), random numbers, uniform in [0, share) where it is.
        other: (B, T), random ids.
        mask: the id of the mask token.

    Returns:
        The ids with tokens hidden, and the labels: the true id where it is to be predicted, else -100; (B, T) both.

    Source: Devlin et al. 2019.
    """
    found = torch.where(asked & (draw < 0.8 * share), mask, ids)
    found = torch.where(asked & (draw >= 0.8 * share) & (draw < 0.9 * share), other, found)
    return found, torch.where(asked, ids, -100)


@dataclass(frozen=True)
class Masks:
    """Masked-token prediction: which tokens of a batch are to be predicted, and what the model sees of them.

    In every row 15% of the tokens, rounded, at least one: as many in each, so that the mean over parts of a batch, or
    over processes, is the mean over the batch. So does Devlin et al.'s release (15% of a sequence, rounded);
    bondarenko2023's code, after Hugging Face, draws each token by itself.
    """

    mask: int  # the id of the mask token, which no text has
    vocab: int  # random tokens are drawn from the ids below it
    special: tuple[int, ...]  # ids that are asked for only where a row has too few others

    def at(self, ids: Tensor, *number: int) -> Tensor:
        """(B, T) -> (B, 2, T): ids and labels of `hidden`, which the numbers alone decide."""
        random = np.random.default_rng(number)
        order, draw = random.random((2, *ids.shape))
        order[np.isin(ids, self.special)] += 1
        asked = order.argsort(1).argsort(1) < max(1, round(SHARE * ids.shape[1]))
        other = random.integers(self.vocab, size=ids.shape)
        return torch.stack(hidden(ids, *map(torch.from_numpy, (asked, draw, other)), self.mask), 1)


def unpacked(batch: Tensor) -> Tensor | dict[str, Tensor]:
    """What a model and `lm_loss` take: (B, T) as it is, the rest as a mapping with `labels`.

    (B, 2, T) becomes `input_ids` and `labels`; images as bytes (B, C, S + 1, S), see `images.ImageConfig`, become
    `pixel_values` (B, C, S, S) in [-1, 1] and `labels` (B,).
    """
    if batch.ndim == 4:
        high, low = batch[:, 0, -1, :2].long().unbind(1)
        return {"pixel_values": batch[:, :, :-1].float() / 127.5 - 1, "labels": 256 * high + low}
    return batch if batch.ndim == 2 else {"input_ids": batch[:, 0], "labels": batch[:, 1]}


@dataclass
class Batches:
    """Training batches in a shuffled order that only the seed and the batch's number decide.

    The row of ids is cut into chunks of `context` tokens; each epoch visits every chunk once in its own
    order. A run that goes on from a step sees the batches that it would have seen, to the bit, masks included. Of
    images `context` is `images.ImageConfig.row`, and `masks` an `ImageConfig`.

    Raises:
        UserError: ids shorter than one batch.
    """

    ids: np.ndarray  # (N,)
    batch: int
    context: int
    seed: int = 0
    masks: Masks | None = None  # or an `images.ImageConfig`

    def __post_init__(self):
        self.chunks, self._epoch, self._order = len(self.ids) // self.context, -1, np.empty(0, int)
        _require_a_batch(self.ids, "training", self.batch, self.context)

    def at(self, number: int) -> Tensor:
        """The batch of that number, int64: (batch, context), masked (batch, 2, context), see `Masks.at`; or images.

        The last, incomplete batch of an epoch is left out.
        """
        epoch, index = divmod(number, self.chunks // self.batch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.chunks)
        rows = _rows(self.ids, self._order[index * self.batch : (index + 1) * self.batch], self.context)
        return rows if self.masks is None else self.masks.at(rows, self.seed, number)


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


def fixed_batches(ids: np.ndarray, count: int, batch: int, context: int, masks=None) -> list:
    """The same `count` batches at every call: chunks spread evenly over `ids`, (batch, context) each, see `unpacked`.

    Raises:
        UserError: a split shorter than one batch. With fewer than `count` batches, all there are.
    """
    _require_a_batch(ids, "validation", batch, context)
    chunks = len(ids) // context
    chosen = np.linspace(0, chunks - 1, min(count, chunks // batch) * batch).astype(int)
    rows = _rows(ids, chosen, context).split(batch)
    return [one if masks is None else unpacked(masks.at(one, number)) for number, one in enumerate(rows)]


def _require_a_batch(ids: np.ndarray, split: str, batch: int, context: int) -> None:
    has = f"its {split} split has {len(ids)} tokens"
    needs = f"one batch of {batch} x {context} needs {batch * context}"
    params.require(len(ids) // context >= batch, f"the corpus is too short: {has}, {needs}")


def _rows(ids: np.ndarray, chunks: np.ndarray, context: int) -> Tensor:
    """The chunks of those numbers, (n, context): bytes as they are, ids as int64."""
    rows = ids[: len(ids) // context * context].reshape(-1, context)[chunks]
    return torch.from_numpy(rows if rows.dtype == np.uint8 else rows.astype(np.int64))
