"""A trained checkpoint healed, by way and seed: what rounding costs it before and after.

python -m ofutils.studies.quant.healing    heals what no record is there of, and adds to figures/records
flags: --model, --steps, --seeds, --workers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch

from ofutils import data, families, hub, params, pool, probes, quant, train
from ofutils.records import differing, warn_of_other_corpus
from ofutils.remedies import Healing, heal
from ofutils.sentences import docstrings, sentence_batches

_GATES = {"gate": "linear", "pi_init": 0.98}  # nearly open: the model starts nearly as it was
_CLIPPED = {"gamma": -0.03}  # of bondarenko2023's BERT
#: What is done to the checkpoint.
WAYS = {
    "nothing": None,
    "penalty on kurtosis": Healing(),
    "gates": Healing(attention=_GATES, penalty="none"),
    "gates + penalty": Healing(attention=_GATES),
    "clipped softmax": Healing(attention=_CLIPPED, penalty="none"),
    "clipped softmax + penalty": Healing(attention=_CLIPPED),
}
_ROUNDED = {
    "per tensor": quant.QuantSettings(weights="minmax"),
    "per token": quant.QuantSettings(weights="minmax", granularity="token"),
}


@dataclass(frozen=True)
class Task:
    """One healing of a checkpoint."""

    model: str
    way: str
    healing: Healing | None  # None: the checkpoint as it is
    judged: int = 128  # sentences that it is judged on, in each of three draws
    text: int = 5000  # sentences that it is healed on, less those

    @property
    def label(self) -> str:
        """For failures."""
        return f"{self.way} of {self.model}"

    @property
    def key(self) -> dict:
        """What identifies its record."""
        healing = self.healing and differing(self.healing)
        return {"model": self.model, "healing": healing, "judged": self.judged, "text": self.text}


def tasks(model: str, seeds: int = 3, steps: int = 0, judged: int = 128, text: int = 5000) -> list[Task]:
    """The checkpoint as it is, then every way with every seed from 1 on; `steps` 0 takes what the ways say."""
    found = [Task(model, "nothing", None, judged, text)]
    for seed in range(1, seeds + 1):
        for way, healing in WAYS.items():
            if healing:
                healing = replace(healing, seed=seed, steps=steps or healing.steps)
                found.append(Task(model, way, healing, judged, text))
    return found


def planned(model: str, scale: str) -> list[Task]:
    """The tasks of a notebook at a scale: all of `tasks` at tiny's size or at that of `small`.

    What has no record is there only where it takes seconds, at `tiny`, or minutes, on a GPU.
    """
    wanted = tasks(model, seeds=1, steps=2, judged=4, text=32) if scale == "tiny" else tasks(model)
    quick = scale == "tiny" or params.device().type != "cpu"
    return [task for task in wanted if quick or recall(task)]


def recall(task: Task) -> dict | None:
    """The record of a task, or None."""
    record = train.store().find("heal", task.key)
    if record:
        warn_of_other_corpus(record, data.fingerprint("stdlib", 0))
    return record


def perform(task: Task, report: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Heal, round, judge and write the record; or recall it."""
    if known := recall(task):
        return known
    original, tokenizer = families.from_hf(hub.model(task.model)).to(params.device()), hub.tokenizer(task.model)
    corpus, log = data.load_corpus(), []
    judged = docstrings(corpus, 4 * task.judged)
    model = original
    if task.healing:
        rest = set(docstrings(corpus, task.text, each=task.text)) - set(judged)
        rest = sorted(rest, key=lambda sentence: (len(sentence), sentence))  # rows of a batch are about as long
        model, log = heal(original, sentence_batches(tokenizer, rest, batch=32), task.healing, report)
    draws = [sentence_batches(tokenizer, judged[draw::4][: task.judged]) for draw in range(3)]
    calibration = sentence_batches(tokenizer, judged[3::4][: max(1, task.judged // 2)])

    def embedded(one):
        return [probes.embed(one, batches) for batches in draws]

    exact, own = embedded(original), embedded(model)
    rounded = quant.table(model, [*_ROUNDED.values()], calibration, lambda: embedded(model))
    rows = []
    for ranges, found in {"full precision": own, **dict(zip(_ROUNDED, rounded, strict=True))}.items():
        for draw, (one, mine, true) in enumerate(zip(found, own, exact, strict=True)):
            rows.append({"ranges": ranges, "draw": draw, "own": _apart(one, mine), "original": _apart(one, true)})
    environment = params.environment() | {"corpus": corpus.sha256}
    return train.store().write("heal", task.key, {"rows": rows, "log": log}, environment)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cosine, the mean over rows."""
    return 1 - float(torch.cosine_similarity(a.double(), b.double()).mean())


def run(wanted: list[Task], workers: int | None = None) -> list[dict]:
    """The records of tasks, in order; what is missing is performed, see `pool.finish`."""
    steps = [task.healing.steps if task.healing and not recall(task) else 0 for task in wanted]
    return pool.finish(perform, wanted, steps, workers)


def tables(wanted: list[Task], workers: int | None = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What became of the checkpoint, and the way there; what is missing is performed, see `run`.

    Returns:
        One row per task, draw of sentences and kind of ranges (`full precision`: not rounded): `way`, `seed`, `draw`,
        `ranges`, and 1 - cosine to sentence embeddings in full precision, the model's `own` and the `original`'s. And
        one row per step: `way`, `seed`, `step`, `distance`, `kurtosis`, `max`, see `remedies.heal`.
    """
    judged, steps = [], []
    for task, record in zip(wanted, run(wanted, workers), strict=True):
        about = {"way": task.way, "seed": task.healing.seed if task.healing else 0}
        judged += [about | row for row in record["result"]["rows"]]
        steps += [about | row for row in record["result"]["log"]]
    judged = pd.DataFrame(judged, columns=["way", "seed", "ranges", "draw", "own", "original"])
    return judged, pd.DataFrame(steps, columns=["way", "seed", "step", "distance", "kurtosis", "max"])


def verdicts(judged: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """By what each way divides the distance to the original that W8A8 makes: a sentence, one value for each seed."""
    far = judged[judged["ranges"] == "per tensor"].groupby(["way", "seed"], sort=False)["original"].mean()
    said = "healed ({}): W8A8 takes the model less far from the original in full precision, by a factor"
    return [(said.format(way), far["nothing"].item() / far[way]) for way in WAYS if way in far and way != "nothing"]


@params.settings
class Command:
    """Flags of `python -m ofutils.studies.quant.healing`."""

    model: str = hub.MINILM
    steps: params.Natural = 0
    seeds: params.Count = 3
    workers: int = -1  # -1: one per core


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    command = params.read(Command, arguments)
    wanted = tasks(command.model, command.seeds, command.steps)
    judged, _ = tables(wanted, None if command.workers < 0 else command.workers)
    print(judged.groupby(["ranges", "way"], sort=False)[["own", "original"]].mean().round(4).to_string())
    print("records written to", train.store().export([*map(recall, wanted)], "healing.small"))


if __name__ == "__main__":
    params.main_guard(main)
