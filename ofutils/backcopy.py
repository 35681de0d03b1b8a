"""Bigram-backcopy: rows of letters whose best predictor needs an attention head that mostly does nothing.

A row starts with `<s>`. Letters and spaces follow a Markov chain with the bigrams of real text; after a trigger, one
of the most frequent characters, comes a copy of the character before the trigger. So a head must look back one place
at triggers and do nothing elsewhere: small transformers send that attention to `<s>`, and grow outlier features.

Source: Guo et al. 2024, *Active-Dormant Attention Heads*, arXiv 2410.13835 (none of the three papers has the task).
Departures: the first character is no trigger, so that every trigger has a character before it to copy; punctuation is
left out, after which a space is so likely that copies of it would never end.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ofutils import params

START = 0  # the id of `<s>`; characters are 1, 2, ... by falling frequency, the triggers the first of them


@dataclass(frozen=True)
class Chain:
    """The task: V ids, `<s>` and V - 1 characters."""

    characters: str  # by falling frequency, id 1 first
    first: np.ndarray  # (V,): probabilities of the first character
    steps: np.ndarray  # (V, V): those of the next character, given the one before; of no use after a trigger
    triggers: int  # ids 1 to `triggers`

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        """So many rows, (count, length) uint16, each from `<s>` on."""
        draw, found = np.random.default_rng(seed), np.zeros((count, length), np.uint16)
        tables = [np.broadcast_to(self.first, self.steps.shape), *[self.steps] * (length - 2)]
        for place, table in enumerate(tables, 1):
            last = found[:, place - 1]
            ends = table.cumsum(1)
            chosen = (draw.random((count, 1)) * ends[last, -1:] >= ends[last]).sum(1)
            copies = self._triggered(last)
            found[:, place] = np.where(copies, found[:, place - 2], chosen)
        return found

    def _triggered(self, ids: np.ndarray) -> np.ndarray:
        return (ids > START) & (ids <= self.triggers)

    def loss(self, rows: np.ndarray) -> float:
        """The loss of the true predictor on rows (B, T), nats a character: 0 at copies, -log P elsewhere.

        The mean over rows and over the T - 1 characters after `<s>`.
        """
        last, then = rows[:, :-1].astype(int), rows[:, 1:].astype(int)
        chance = self.steps[last, then]
        chance[:, 0] = self.first[then[:, 0]]
        with np.errstate(divide="ignore"):  # what the chain does not do has an infinite loss
            return float(-np.log(np.where(self._triggered(last), 1.0, chance)).mean())

    def bound(self, length: int) -> float:
        """What `loss` is expected to be on rows of so many ids, exactly; no model is expected to have less."""
        entropy = -np.sum(self.steps * np.log(np.where(self.steps > 0, self.steps, 1)), 1)  # (V,)
        free = ~self._triggered(np.arange(len(entropy)))
        pairs = np.zeros_like(self.steps)  # P(the character before the last, the last)
        pairs[START] = self.first
        total = -np.sum(self.first * np.log(np.where(self.first > 0, self.first, 1)))
        for _ in range(length - 2):
            last = pairs.sum(0)
            total += (last * entropy)[free].sum()
            pairs = np.where(free[:, None], last[:, None] * self.steps, pairs.T)
        return float(total / (length - 1))


@dataclass(frozen=True)
class Counts:
    """How often each character, and each pair of neighbours, occurs in a text."""

    singles: Counter
    pairs: Counter


def count(texts: Iterable[str]) -> Counts:
    """The counts of the letters a to z of a text, in lower case, and of what stands between them as one space."""
    found = Counts(Counter(), Counter())
    for text in texts:
        plain = re.sub("[^a-z]+", " ", text.lower())
        found.singles.update(plain)
        found.pairs.update(zip(plain, plain[1:], strict=False))
    return found


def chain(counts: Counts, vocab: int, triggers: int = 3) -> Chain:
    """The chain with a text's bigrams, over its most frequent characters.

    Args:
        vocab: number of ids, `<s>` included.
        triggers: how many of the most frequent characters are triggers; 0: nothing is ever copied.

    Raises:
        UserError: more ids than characters, or no character left that is no trigger.
    """
    most = [character for character, _ in counts.singles.most_common(vocab - 1)]
    params.require(len(most) == vocab - 1, f"the text has {len(most)} characters, too few for {vocab} ids")
    params.require(0 <= triggers < vocab - 2, f"{triggers} triggers of {vocab - 1} characters leave none to copy")
    places = {character: number for number, character in enumerate(most, 1)}
    first, steps = np.zeros(vocab), np.zeros((vocab, vocab))
    for character, number in places.items():
        first[number] = counts.singles[character] * (number > triggers)
    for (one, other), times in counts.pairs.items():
        if one in places and other in places:
            steps[places[one], places[other]] = times
    steps[START] = first
    return Chain("".join(most), first / first.sum(), steps / steps.sum(1, keepdims=True), triggers)
