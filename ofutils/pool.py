"""Many tasks, here or in local processes: what fails costs its own task, the rest is finished."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from ofutils import UserError


@dataclass(frozen=True)
class Result:
    """What a task gave, or the text of its error."""

    value: Any = None
    error: str | None = None


def run(function: Callable, tasks: list, workers: int | None, progress: Callable[..., None]) -> list[Result]:
    """`function(task, report)` for every task.

    Args:
        function: importable by name; it may call `report(...)` as often as it likes.
        tasks: picklable, worked on in order.
        workers: local processes with one torch thread each, which live on from task to task; 0 works in this
            process, None takes one per core (works in this process where there is a GPU).
        progress: called as `progress(index of the task, ...)` with what a task reports.

    Returns:
        One result per task, in order.
    """
    if workers is None:
        workers = 0 if torch.cuda.is_available() else os.cpu_count() or 1
    if workers == 0:
        return [_try(function, task, partial(progress, index)) for index, task in enumerate(tasks)]
    return _run_in_processes(function, tasks, min(workers, len(tasks)), progress)


def finish(function: Callable, tasks: list, steps: list[int], workers: int | None = None) -> list:
    """What `function(task, report)` gives for every task, in order, under one progress bar.

    Args:
        function: see `run`; it calls `report(steps done, loss)`.
        tasks: each with a `label`.
        steps: of each task; 0 where its record is there.
        workers: see `run`.

    Raises:
        UserError: a task that failed, when all others are done.
    """
    done: dict[int, int] = {}

    def progress(place, step, _):
        done[place] = min(step, steps[place])
        bar.update(sum(done.values()) - bar.n)

    with tqdm(total=sum(steps), unit="step", mininterval=5, leave=False, disable=not sum(steps)) as bar:
        results = run(function, tasks, workers if sum(steps) else 0, progress)
    for task, result in zip(tasks, results, strict=True):
        if result.error:
            reason = result.error.strip().splitlines()[-1].removeprefix("ofutils.UserError: ")
            raise UserError(f"{task.label}: {reason}")
    return [result.value for result in results]


def _try(function, task, report) -> Result:
    try:
        return Result(function(task, report))
    except (Exception, SystemExit):
        return Result(error=traceback.format_exc())


def _run_in_processes(function, tasks, workers, progress) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    waiting, busy, results = list(range(len(tasks))), {}, {}

    def hire():
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        assign(ours, process)

    def assign(pipe, process):
        if waiting:
            busy[pipe] = (process, waiting.pop(0))
            try:
                pipe.send(tasks[busy[pipe][1]])
            except BrokenPipeError:
                pass  # a dead worker shows at the end of its pipe
            except Exception:
                results[busy.pop(pipe)[1]] = Result(error=f"cannot be sent to a process: {traceback.format_exc()}")
                assign(pipe, process)
        else:
            pipe.close()  # the worker ends at the end of its pipe

    try:
        for _ in range(workers):
            hire()
        while busy:
            for pipe in wait(list(busy)):
                process, index = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    results[index] = Result(error=f"its process died (exit code {process.exitcode})")
                    del busy[pipe]
                    if waiting:
                        hire()
                    continue
                if isinstance(message, Result):
                    results[index] = message
                    del busy[pipe]
                    assign(pipe, process)
                else:
                    progress(index, *message)
    finally:
        for process, _ in busy.values():
            process.terminate()
    return [results[index] for index in range(len(tasks))]


def _work(function: Callable, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        while True:
            result = _try(function, pipe.recv(), lambda *values: pipe.send(values))
            try:
                pipe.send(result)
            except (TypeError, AttributeError, pickle.PicklingError) as error:
                pipe.send(Result(error=f"its result cannot be sent back: {error}"))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
