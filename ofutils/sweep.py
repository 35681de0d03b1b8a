"""Many runs: train, measure and quantize each, in this process or in local processes.

A recipe (`recipes/<notebook>.yaml`) says which runs a notebook needs at each scale; the notebook and this
command read the same one, so a machine without Jupyter can do the work and the notebook finds it done.

    python -m ofutils.sweep 03_quant --scale gpu             train and measure what is missing
    python -m ofutils.sweep 03_quant --scale small --grid    every method at every learning rate of its grid
    flags: --scale, --steps, --seeds, --corpus, --workers, --grid, --export (write to figures/records)
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from ofutils import UserError, data, params, train
from ofutils.probes import measure
from ofutils.quant import QuantSettings, calibrate, quantized
from ofutils.records import differing
from ofutils.train import Run, TrainConfig
from ofutils.transformer import clm_loss


@dataclass(frozen=True)
class Evaluation:
    """What is measured on a finished run."""

    sites: tuple[str, ...] = ("resid_pre", "norm1", "attn_out", "norm2", "mlp_out", "resid_post", "norm_final")
    batches: int = 16  # fixed validation batches, for the loss and the sites
    batch: int = 16  # rows of each, and of each calibration batch


@dataclass(frozen=True)
class Job:
    """One run and all that is asked of it."""

    method: str
    config: TrainConfig
    settings: tuple[QuantSettings, ...] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        labels = [one.label for one in self.settings]
        params.require(len(set(labels)) == len(labels), f"two quantization settings of a job are called {labels}")

    @property
    def label(self) -> str:
        """For progress and failures: method, learning rate, seed."""
        return f"{self.method}, lr {self.config.lr:g}, seed {self.config.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a run with its measurements, or an error."""

    job: Job
    run: Run | None = None
    measured: dict | None = None  # {"loss", "sites": {site: metrics}} in full precision
    quantized: dict[str, float] = field(default_factory=dict)  # label of the settings -> loss
    error: str | None = None


def _entries(job: Job) -> list[tuple[str, dict]]:
    """Kind and key of the records of a job: the measurement in full precision, then one per settings."""
    key = {"run": differing(job.config), "evaluation": differing(job.evaluation)}
    return [("measure", key), *(("quant", key | {"settings": differing(one)}) for one in job.settings)]


def recall(job: Job) -> Outcome | None:
    """The outcome of a job from its records alone, or None where one is missing."""
    run = train.find(job.config)
    if run is None:
        return None
    if run.diverged:
        return Outcome(job, run, error=f"diverged at step {run.diverged}")
    measured, *rounded = (train.store().find(kind, key) for kind, key in _entries(job))
    if measured is None or None in rounded:
        return None
    losses = {one.label: record["result"]["loss"] for one, record in zip(job.settings, rounded, strict=True)}
    return Outcome(job, run, measured["result"], losses)


def perform(job: Job, report: Callable[[int, float], None] | None = None) -> Outcome:
    """Train the run of a job, measure and quantize it, and write a record of each; or recall them.

    Calibration batches come from the training split, drawn by the run's seed in an order of their own.
    """
    if known := recall(job):
        return known
    run = train.train(job.config, report=report)
    if run.diverged:
        return Outcome(job, run, error=f"diverged at step {run.diverged}")
    tokens, context = train.load_tokens(job.config), job.config.model.context
    trained_on = run.record["environment"]["corpus"]
    params.require(trained_on == tokens.corpus, f"{run.config.name} was trained on another corpus than is here")
    model = (run if run.has_weights else train.train(job.config, report=report, again=True)).load()
    evaluation = data.fixed_batches(tokens.validation, job.evaluation.batches, job.evaluation.batch, context)
    store, environment = train.store(), params.environment() | {"corpus": tokens.corpus}
    first, *others = _entries(job)
    measured = measure(model, evaluation, job.evaluation.sites, clm_loss).summary()
    store.write(*first, measured, environment)
    losses = {}
    for settings, entry in zip(job.settings, others, strict=True):
        drawn = data.Batches(tokens.train, job.evaluation.batch, context, seed=10_000 + job.config.seed)
        ranges = calibrate(model, [drawn.draw() for _ in range(settings.batches)], settings)
        with quantized(model, settings, ranges):
            losses[settings.label] = measure(model, evaluation, loss=clm_loss).loss
        store.write(*entry, {"loss": losses[settings.label]}, environment)
    return Outcome(job, run, measured, losses)


def run(jobs: list[Job], workers: int | None = None) -> list[Outcome]:
    """Perform jobs, each in its own good time; what fails is reported, the rest is finished.

    Args:
        jobs: performed or recalled in order.
        workers: local processes with one thread each; 0 works in this process, None takes one per core
            (in this process where there is a GPU).

    Returns:
        One outcome per job, in order. Failed ones have `error` set.
    """
    recalled = {index: recall(job) for index, job in enumerate(jobs)}
    outcomes = {index: outcome for index, outcome in recalled.items() if outcome}
    todo = [index for index, outcome in recalled.items() if not outcome]
    if workers is None:
        workers = 0 if params.device().type == "cuda" else os.cpu_count() or 1
    total = sum(jobs[index].config.steps for index in todo)
    with tqdm(total=total, unit="step", mininterval=5, leave=False, disable=not todo) as bar:
        if workers == 0:
            _run_here(jobs, todo, outcomes, bar)
        else:
            configs = (jobs[index].config for index in todo)
            for config in {(c.corpus, c.characters, c.model.vocab): c for c in configs}.values():
                with suppress(UserError):  # its own run reports it
                    train.load_tokens(config)  # cached on disk, before the processes ask for it
            _run_in_processes(jobs, todo, outcomes, bar, min(workers, len(todo)))
    for index in todo:
        if outcomes[index].error:
            reason = outcomes[index].error.strip().splitlines()[-1].removeprefix("ofutils.")
            print(f"failed: {jobs[index].label}: {reason}")
    return [outcomes[index] for index in range(len(jobs))]


def _run_here(jobs, todo, outcomes, bar) -> None:
    for index in todo:
        done, job = bar.n, jobs[index]

        def report(step, loss, done=done, job=job):
            bar.set_postfix_str(f"{job.label}: loss {loss:.3f}", refresh=False)
            bar.update(done + step - bar.n)

        try:
            outcomes[index] = perform(job, report)
        except Exception:
            outcomes[index] = Outcome(job, error=traceback.format_exc())


def _run_in_processes(jobs, todo, outcomes, bar, workers) -> None:
    """Feed jobs to processes that live on from job to job; one that dies costs its job only."""
    context = multiprocessing.get_context("spawn")
    waiting, busy, steps = list(todo), {}, {}

    def hire():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        assign(ours, process)

    def assign(pipe, process):
        if waiting:
            busy[pipe] = (process, waiting.pop(0))
            with suppress(BrokenPipeError):  # a dead worker shows at the end of its pipe
                pipe.send(jobs[busy[pipe][1]])
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
                    outcomes[index] = Outcome(jobs[index], error=f"its process died (exit code {process.exitcode})")
                    del busy[pipe]
                    if waiting:
                        hire()
                    continue
                if isinstance(message, Outcome):
                    outcomes[index] = message
                    del busy[pipe]
                    assign(pipe, process)
                else:
                    steps[index], loss = message
                    bar.set_postfix_str(f"{jobs[index].label}: loss {loss:.3f}", refresh=False)
                    bar.update(sum(steps.values()) - bar.n)
    finally:
        for process, _ in busy.values():
            process.terminate()


def _worker(pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        while True:
            job = pipe.recv()
            try:
                outcome = perform(job, lambda step, loss: pipe.send((step, loss)))
            except Exception:
                outcome = Outcome(job, error=traceback.format_exc())
            pipe.send(outcome)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


@dataclass(frozen=True)
class Recipe:
    """The runs of a notebook at one scale. Seed 0 is for choosing (the grid, a search), seeds from 1 for judging."""

    name: str
    scale: str
    jobs: tuple[Job, ...]
    grid: tuple[Job, ...]  # one seed of every method at every learning rate of its grid
    workers: int | None

    def runnable(self, grid: bool = False) -> list[Job]:
        """The jobs, or those of the grid, if this machine can carry the scale or has every record.

        Raises:
            UserError: at scale gpu or paper without a GPU, when a record is missing.
        """
        jobs = list(self.grid if grid else self.jobs)
        params.require(len(jobs) > 0, f"{self.name} has no {'grid' if grid else 'runs'} at scale {self.scale}")
        here = self.scale in ("tiny", "small") or params.device().type != "cpu"
        if not here and (missing := [job for job in jobs if recall(job) is None]):
            raise UserError(
                f"{self.name} at scale {self.scale} needs a GPU: {len(missing)} of {len(jobs)} runs have "
                f"no record here, e.g. {missing[0].label}; scales that work without: tiny, small"
            )
        return jobs

    def run(self, grid: bool = False, workers: int | None = None) -> list[Outcome]:
        """Perform or recall the jobs, or those of the grid."""
        return run(self.runnable(grid), self.workers if workers is None else workers)


def _read_yaml(name: str) -> dict:
    import yaml

    folder = resources.files("ofutils") / "recipes"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    params.require(name in known, f"unknown recipe {name!r}{params.suggest(name, known)}; known: {', '.join(known)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def read_recipe(name: str, scale: str, steps: int = 0, seeds: int = 0, corpus: str = "") -> Recipe:
    """The recipe of a notebook at a scale; `steps`, `seeds` and `corpus` override it where they are set.

    Raises:
        UserError: an unknown recipe, or a scale that it does not have.
    """
    content = _read_yaml(name)
    methods, scales = content["methods"], content["scales"]
    params.require(scale in scales, f"{name} has no recipe for scale {scale!r}; it has: {', '.join(scales)}")
    chosen = scales[scale]
    if "like" in chosen:  # another recipe's base, evaluation and quant, so that the two cannot drift apart
        other = _read_yaml(chosen["like"])["scales"][scale]
        chosen = {**other, "lr": {}, "grid": [], **chosen, "base": other["base"] | chosen.get("base", {})}
    params.require(steps >= 0 and seeds >= 0, f"steps and seeds must be at least 0, got {steps} and {seeds}")
    override = ({"steps": steps} if steps else {}) | ({"corpus": corpus} if corpus else {})
    base = chosen["base"] | override
    params.require(base.get("corpus") != "", f"{name} at scale {scale} needs a text to train on: name it with corpus")
    settings = tuple(params.build(QuantSettings, one) for one in chosen["quant"])
    evaluation = params.build(Evaluation, chosen.get("evaluation", {}))

    def job(method: str, seed: int, **rate) -> Job:
        own = methods[method]
        values = base | own | override | {"seed": seed} | rate
        values["model"] = base["model"] | own.get("model", {})
        values["warmup"] = min(values["warmup"], values["steps"] // 4)
        return Job(method, params.build(TrainConfig, values), settings, evaluation)

    rates = {method: {"lr": lr} for method, lr in chosen.get("lr", {}).items()}
    start, count = chosen.get("first_seed", 1), seeds or chosen["seeds"]
    jobs = tuple(job(m, seed, **rates.get(m, {})) for seed in range(start, start + count) for m in methods)
    grid = [job(m, 0, lr=lr, measure_every=base["steps"]) for m in methods for lr in chosen.get("grid", [])]
    grid = tuple(replace(one, settings=(), evaluation=replace(evaluation, sites=())) for one in grid)
    return Recipe(name, scale, jobs, grid, chosen.get("workers"))


@dataclass(frozen=True)
class Command:
    """Flags of `python -m ofutils.sweep`."""

    scale: str = "auto"
    steps: int = 0
    seeds: int = 0
    corpus: str = ""
    workers: int = -1  # -1: what the recipe says
    grid: bool = False
    export: bool = False  # write the records to figures/records, to be committed


def main(arguments: list[str]) -> None:
    """The command line: a recipe by name; a line per run; exit code 1 when one failed."""
    if not arguments or {"-h", "--help"} & set(arguments):
        return print(__doc__)
    params.require(not arguments[0].startswith("-"), "name a recipe first, e.g. python -m ofutils.sweep 03_quant")
    command = params.read(Command, arguments[1:])
    scale, why = params.resolve_scale(command.scale)
    recipe = read_recipe(arguments[0], scale, command.steps, command.seeds, command.corpus)
    print(f"{recipe.name} at scale {scale} ({why}): {len(recipe.grid if command.grid else recipe.jobs)} runs")
    outcomes = recipe.run(command.grid, None if command.workers < 0 else command.workers)
    for outcome in outcomes:
        if not outcome.error:
            costs = "".join(f", {k} {v - outcome.measured['loss']:+.4f}" for k, v in outcome.quantized.items())
            print(f"{outcome.job.label}: loss {outcome.measured['loss']:.4f}{costs}")
    if command.export:
        print(f"records written to {export(outcomes, '.'.join([recipe.name, scale] + ['grid'] * command.grid))}")
    sys.exit(int(any(outcome.error for outcome in outcomes)))


def export(outcomes: list[Outcome], name: str):
    """Write the records behind outcomes as JSON lines under figures/records; returns the path."""
    store, records = train.store(), []
    for outcome in (outcome for outcome in outcomes if outcome.run):
        records += [outcome.run.record, *(store.find(*entry) for entry in _entries(outcome.job))]
    return store.export([record for record in records if record], name)


if __name__ == "__main__":
    params.main_guard(main)
