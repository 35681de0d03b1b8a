"""All runs of all recipes at one scale, within a time limit: one queue that goes on where it was left.

    python -m ofutils.campaign --minutes 9                          every recipe at scale gpu, as far as it gets
    python -m ofutils.campaign 03_quant --minutes 20 --workers 4    one recipe, four runs sharing the GPU
    flags: --minutes, --scale, --steps, --seeds, --corpus, --workers

First the grids, which settle learning rates; then seed after seed, recipes with more claims first; last what refines.
A run is begun where it is predicted to end in time: by one like it before, else by its own first steps. What does
not fit is set aside with its state saved, and gets what time is left at the end. After each run the records of its
recipe are written to figures/records. The same command goes on, and does nothing once everything is recorded.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ofutils import params, pool, sweep, train
from ofutils.records import write_atomically

FIRST_STEPS = 5.0  # seconds of a run after which its end is predicted
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # a small run leaves half of a GPU idle and keeps two cores busy
MEASURING = 15.0  # seconds that measuring a trained run is thought to take before one has been seen


@params.settings
class Command:
    """Flags of `python -m ofutils.campaign`."""

    minutes: params.Positive = 9.0
    scale: str = "gpu"
    steps: params.Natural = 0
    seeds: params.Natural = 0
    corpus: str = ""
    workers: int = -1  # processes that share the GPU; 0: one run after the other, in this one; -1: as `WORKERS`


@dataclass(frozen=True)
class Task:
    """A job of the queue, and until when it may take."""

    recipe: sweep.Recipe
    job: sweep.Job
    grid: bool
    until: float = 0.0  # seconds since the epoch
    last: bool = False  # take what time is left, whether or not it is enough

    @property
    def rank(self) -> tuple:
        """Its place in the queue, the smallest first."""
        return not self.grid, self.recipe.value == 0, self.job.config.seed, -self.recipe.value

    @property
    def name(self) -> str:
        """That of its recipe's records."""
        return f"{self.recipe.name}.{self.recipe.scale}" + ".grid" * self.grid

    @property
    def kind(self) -> str:
        """What tasks that take equally long have in common."""
        return f"{self.name}: {self.job.method}, {self.job.config.steps} steps"


def queue(command: Command, names: list[str]) -> list[Task]:
    """What has no record yet, in order. Runs whose learning rate is not settled are left out."""
    asked, tasks = (command.scale, command.steps, command.seeds, command.corpus), []
    for name in names or sweep.recipes(command.scale):
        recipe = sweep.read_recipe(name, *asked)
        settled = [job for job in recipe.jobs if not job.published and job.method not in recipe.unsettled]
        tasks += [Task(recipe, job, True) for job in recipe.grid] + [Task(recipe, job, False) for job in settled]
    return sorted((task for task in tasks if sweep.recall(task.job) is None), key=lambda task: task.rank)


def attempt(task: Task, report) -> None:
    """Perform a task, or set it aside; prints which. `report` gets (steps done, loss)."""
    said = _attempt(task, report)
    left = max(0.0, task.until - time.time())
    print(f"{left:4.0f} s left: {task.name}, {task.job.label}: {said}", flush=True)


def _attempt(task: Task, report) -> str:
    begun, config, (training, measuring) = time.time(), task.job.config, predicted(task)
    if begun + (0.0 if task.last else training + measuring) > task.until:
        return "no time for it"
    first: list[tuple[float, int]] = []  # when the first report came, after how many steps

    def watched(step: int, loss: float) -> None:
        report(step, loss)
        first.append((now := time.time(), step))
        passed, ends = now - first[0][0], now
        if passed > FIRST_STEPS and not task.last:
            ends += passed * (config.steps - step) / (step - first[0][1]) + measuring
        if step < config.steps and ends > task.until:
            raise train.Stopped

    whole = train.find(config) is None and not train.checkpoint(config).is_file()
    try:
        train.train(config, report=watched, keep=task.job.evaluation.over_training)
    except train.Stopped:
        return f"set aside at step {first[-1][1]} of {config.steps}"
    trained = time.time()
    if trained + measuring > task.until:
        return "trained, no time to measure it"
    outcome = sweep.perform(task.job)
    if whole:
        _remember(task.kind, trained - begun, time.time() - trained)
    jobs = task.recipe.grid if task.grid else task.recipe.jobs
    sweep.export([one for one in map(sweep.recall, jobs) if one], task.name)
    return outcome.error or f"loss {outcome.measured['loss']:.4f}, took {time.time() - begun:.0f} s"


def predicted(task: Task) -> tuple[float, float]:
    """Seconds of training (0 where nothing is known) and of measuring that a task is thought to take."""
    known = _times()
    of_recipe = [measuring for kind, (_, measuring) in known.items() if kind.startswith(f"{task.name}:")]
    return tuple(known.get(task.kind, (0.0, max(of_recipe, default=MEASURING))))


def _times_path() -> Path:
    return params.out() / "runs" / "campaign.json"


def _times() -> dict[str, list[float]]:
    """Kind of a task -> seconds that its training and its measuring took here."""
    try:
        return json.loads(_times_path().read_text())
    except (OSError, ValueError):
        return {}


def _remember(kind: str, training: float, measuring: float) -> None:
    text = json.dumps(_times() | {kind: [training, measuring]}, indent=1)
    write_atomically(_times_path(), lambda path: path.write_text(text))


def run(command: Command, names: list[str]) -> list[str]:
    """Work on the queue until it is empty or the time is up; returns a line for everything that failed."""
    until, failed = time.time() + 60 * command.minutes, {}
    for last in (False, True):
        seen: set[str] = set(failed)
        while time.time() < until:
            tasks = [task for task in queue(command, names) if task.job.config.name not in seen]
            tasks = [task for task in tasks if task.grid] or tasks  # the grids settle the rates of the others
            if not tasks:
                break
            for config in dict.fromkeys(task.job.config for task in tasks):
                train.load_tokens(config)  # cached on disk, before processes ask for them
            tasks = [replace(task, until=until, last=last) for task in tasks]
            results = pool.run(attempt, tasks, _workers(command), lambda *_: None)
            seen |= {task.job.config.name for task in tasks}
            for task, result in zip(tasks, results, strict=True):
                if result.error:
                    failed[task.job.config.name] = f"{task.kind}: {result.error.strip().splitlines()[-1]}"
    return list(failed.values())


def _workers(command: Command) -> int:
    return WORKERS if command.workers < 0 else command.workers


def main(arguments: list[str]) -> None:
    """The command line: names of recipes, or none for all; a line per run; exit code 1 when one failed."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    flags = next((place for place, one in enumerate(arguments) if one.startswith("-")), len(arguments))
    command, names = params.read(Command, arguments[flags:]), arguments[:flags]
    params.require_known("scale", command.scale, params.SCALES)
    before = len(queue(command, names))
    print(f"{before} runs of scale {command.scale} have no record; {command.minutes:g} minutes for them", flush=True)
    failed, rest = run(command, names), queue(command, names)
    print(*(f"failed: {line}" for line in failed), f"{before - len(rest)} runs done, {len(rest)} to go", sep="\n")
    known = [sum(_times()[task.kind]) for task in rest if task.kind in _times()]
    if rest:
        minutes = sum(known) / 60 / max(1, _workers(command))
        takes = f"{len(known)} of them will take about {minutes:.0f} minutes; " if known else ""
        print(f"{takes}the same command goes on")
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    params.main_guard(main)
