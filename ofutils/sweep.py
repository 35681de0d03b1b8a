"""Many runs: train, measure and quantize each, in this process or in local processes.

A recipe (`recipes/<notebook>.yaml`) says which runs a notebook needs at each scale; the notebook and this
command read the same one, so a machine without Jupyter can do the work and the notebook finds it done.

    python -m ofutils.sweep 03_quant --scale gpu             train and measure what is missing
    python -m ofutils.sweep 03_quant --scale small --grid    every method at every learning rate of its grid
    flags: --scale, --steps, --seeds, --corpus, --model, --workers, --grid, --export (write to figures/records)
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources

from tqdm import tqdm

from ofutils import UserError, batches, data, families, hub, params, pool, quant, sentences, sources, train
from ofutils.probes import measure
from ofutils.quant import QuantSettings
from ofutils.records import differing
from ofutils.resume import weights_digest
from ofutils.streaming import STANDARD
from ofutils.train import Published, Run, TrainConfig
from ofutils.transformer import accuracy, lm_loss

#: The text on which published checkpoints are measured, unless another is named: id, part and split of a data set.
(HELD_OUT,) = sources.read("01_pythia_kurtosis", "paper").texts

_FOLDER = resources.files("ofutils") / "recipes"


@params.settings
class Evaluation:
    """What is measured on a finished run, or on published checkpoints."""

    sites: tuple[str, ...] = ("resid_pre", "norm1", "attn_out", "norm2", "mlp_out", "resid_post", "norm_final")
    batches: params.Count = 16  # fixed validation batches, for the loss and the sites
    batch: params.Count = 16  # rows of each, and of each calibration batch
    meters: tuple[str, ...] = STANDARD
    over_training: bool = False  # measure at the checkpoints of `train.log_spaced` too; their weights are kept
    text: str = ""  # published checkpoints: a text or parquet file; empty: HELD_OUT
    context: params.Count = 512  # published checkpoints: tokens of a row


@dataclass(frozen=True)
class Job:
    """One run, or the checkpoints of somebody else's, and all that is asked of it."""

    method: str
    config: TrainConfig | Published
    settings: tuple[QuantSettings, ...] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        if self.published:
            params.require(not self.settings, "published checkpoints are measured, not quantized")
            params.require(len(self.config.steps) > 0, f"{self.config.name}: no checkpoints to measure")
        labels = [one.label for one in self.settings]
        params.require(len(set(labels)) == len(labels), f"two quantization settings of a job are called {labels}")
        same = len({one.batches for one in self.settings}) <= 1
        params.require(same, "the settings of a job calibrate on equally many batches")

    @property
    def published(self) -> bool:
        """Whether nothing is trained."""
        return isinstance(self.config, Published)

    @property
    def images(self) -> bool:
        """Whether its model sees images: what is measured then has an `accuracy` beside the loss."""
        return not self.published and self.config.objective == "image"

    @property
    def label(self) -> str:
        """For progress and failures: method, learning rate, seed."""
        if self.published:
            return f"{self.method}, {len(self.checkpoints)} checkpoints"
        return f"{self.method}, lr {self.config.lr:g}, seed {self.config.seed}"

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps at which it is measured over training."""
        if self.published:
            return self.config.steps
        return train.log_spaced(self.config.steps) if self.evaluation.over_training else ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a run with its measurements, or an error."""

    job: Job
    run: Run | None = None
    measured: dict | None = None  # {"loss", "sites": {site: metrics}} in full precision
    quantized: dict[str, float] = field(default_factory=dict)  # label of the settings -> loss
    accuracies: dict[str, float] = field(default_factory=dict)  # of images: label of the settings -> accuracy
    trajectory: tuple[dict, ...] = ()  # per checkpoint {"step", "weights" (a digest), "loss", "sites"}
    error: str | None = None


def _entries(job: Job) -> list[tuple[str, dict]]:
    """Kind and key of the records of a job: measurement (not of published ones), quantizations, checkpoints."""
    run = {"published": job.config.name} if job.published else differing(job.config)
    key = {"run": run, "evaluation": differing(job.evaluation)}
    own = [] if job.published else [("measure", key)]
    own += [("quant", key | {"settings": differing(one)}) for one in job.settings]
    return own + [("checkpoint", key | {"step": step}) for step in job.checkpoints]


def _read(job: Job, run: Run | None, results: list[dict]) -> Outcome:
    """The outcome from the results of all entries, in order."""
    cut = len(results) - len(job.checkpoints)
    own, trajectory = results[:cut], tuple(results[cut:])
    rounded = {one.label: found for one, found in zip(job.settings, own[1:], strict=True)}
    losses, accuracies = ({k: one[key] for k, one in rounded.items() if key in one} for key in ("loss", "accuracy"))
    return Outcome(job, run, own[0] if own else trajectory[-1], losses, accuracies, trajectory)


def recall(job: Job) -> Outcome | None:
    """The outcome of a job from its records alone, or None where one is missing."""
    run = None if job.published else train.find(job.config)
    if run and run.diverged:
        return Outcome(job, run, error=f"diverged at step {run.diverged}")
    found = [train.store().find(*entry) for entry in _entries(job)] if run or job.published else [None]
    if None in found or (job.published and not _of_one_text(job, found)):
        return None
    return _read(job, run, [record["result"] for record in found])


def _of_one_text(job: Job, records: list[dict]) -> bool:
    here = {data.load_corpus(job.evaluation.text).sha256} if job.evaluation.text else set()
    return len(here | {record["environment"]["corpus"] for record in records}) == 1


def perform(job: Job, report: Callable[[int, float], None] | None = None) -> Outcome:
    """Train the run of a job, measure and quantize it, and write a record of each; or recall them."""
    if known := recall(job):
        return known
    if job.published:
        evaluation, corpus = _held_out(job)
        return _read(job, None, _over_training(job, evaluation, {"corpus": corpus}, report))
    keep = job.evaluation.over_training
    run = train.train(job.config, report=report, keep=keep)
    if run.diverged:
        return Outcome(job, run, error=f"diverged at step {run.diverged}")
    tokens, shape = train.load_tokens(job.config), (job.evaluation.batch, job.config.row)
    masks = train.masks(job.config, tokens)
    trained_on = run.record["environment"]["corpus"]
    params.require(trained_on == tokens.corpus, f"{run.config.name} was trained on another corpus than is here")
    if not run.has_weights:
        run = train.train(job.config, report=report, again=True, keep=keep)
    model = run.load()
    evaluation = batches.fixed_batches(tokens.validation, job.evaluation.batches, *shape, masks)
    store, environment = train.store(), params.environment() | {"corpus": tokens.corpus}
    exact = _scored(model, evaluation, job) if job.images else {}
    results, rounded = [exact | _measured(model, evaluation, job.evaluation)], {}
    for draw in sorted({one.draw for one in job.settings}):
        settings = [one for one in job.settings if one.draw == draw]
        drawn = calibration(job, tokens, draw)
        found = quant.table(model, settings, drawn, lambda: _scored(model, evaluation, job))
        rounded |= dict(zip(settings, found, strict=True))
    results += [rounded[one] for one in job.settings]
    for entry, result in zip(_entries(job), results, strict=False):
        store.write(*entry, result, environment)
    return _read(job, run, results + _over_training(job, evaluation, {"corpus": tokens.corpus}))


def calibration(job: Job, tokens: data.Tokens, draw: int = 0) -> list:
    """Batches of the training split, drawn by the run's seed, each draw in an order of its own."""
    shape, seed = (job.evaluation.batch, job.config.row), 10_000 * (draw + 1) + job.config.seed
    drawn = batches.Batches(tokens.train, *shape, seed, train.masks(job.config, tokens))
    return [batches.unpacked(drawn.at(n)) for n in range(job.settings[0].batches if job.settings else 0)]


def _measured(model, rows: list, asked: Evaluation) -> dict:
    return measure(model, rows, asked.sites, lm_loss, asked.meters).summary()


def _scored(model, rows: list, job: Job) -> dict:
    """The loss, and of images the accuracy."""
    asked = {"loss": lm_loss} | ({"accuracy": accuracy} if job.images else {})
    return {name: measure(model, rows, loss=one).loss for name, one in asked.items()}


def _held_out(job: Job) -> tuple[list, str]:
    """Batches of held-out text for published checkpoints, in the tokens of their model, and the text's sha256."""
    one = job.evaluation
    corpus = data.load_corpus(one.text or str(hub.text(*HELD_OUT)))
    ids = sentences.encode(hub.tokenizer(*sources.place(job.config.name, job.config.steps[0])), corpus)
    return batches.fixed_batches(ids, one.batches, one.batch, one.context), corpus.sha256


def _over_training(job: Job, rows: list, environment: dict, report=None) -> list[dict]:
    """Measure every checkpoint that has no record yet, and write one each."""
    store, results, entries = train.store(), [], _entries(job)
    for entry, step in zip(entries[len(entries) - len(job.checkpoints) :], job.checkpoints, strict=True):
        record = store.find(*entry)
        if record is None or record["environment"]["corpus"] != environment["corpus"]:
            ((_, model),) = train.checkpoints(job.config, (step,))
            found = _measured(families.with_sites(model), rows, job.evaluation)
            commit = {"commit": getattr(model.config, "commit", "")} if job.published else {}
            result = {"step": step, "weights": weights_digest(model), **found}
            record = store.write(*entry, result, params.environment() | environment | commit)
        results.append(record["result"])
        if report:
            report(len(results), record["result"]["loss"])
    return results


def run(jobs: list[Job], workers: int | None = None) -> list[Outcome]:
    """Perform jobs, each in its own good time; what fails is reported, the rest is finished.

    Args:
        jobs: performed or recalled in order.
        workers: local processes, see `pool.run`.

    Returns:
        One outcome per job, in order. Failed ones have `error` set.
    """
    recalled = {index: recall(job) for index, job in enumerate(jobs)}
    outcomes = {index: outcome for index, outcome in recalled.items() if outcome}
    todo = [index for index, outcome in recalled.items() if not outcome]
    for config in {jobs[index].config for index in todo if not jobs[index].published}:
        with suppress(UserError):  # its own run reports it
            train.load_tokens(config)  # cached on disk, before processes ask for them
    done: dict[int, int] = {}

    def progress(place, step, loss):
        done[place] = step
        bar.set_postfix_str(f"{jobs[todo[place]].label}: loss {loss:.3f}", refresh=False)
        bar.update(sum(done.values()) - bar.n)

    sizes = (len(jobs[i].checkpoints) if jobs[i].published else jobs[i].config.steps for i in todo)
    with tqdm(total=sum(sizes), unit="step", mininterval=5, leave=False, disable=not todo) as bar:
        results = pool.run(perform, [jobs[index] for index in todo], workers, progress)
    for index, result in zip(todo, results, strict=True):
        outcomes[index] = result.value or Outcome(jobs[index], error=result.error)
    for index in todo:
        if outcomes[index].error:
            reason = outcomes[index].error.strip().splitlines()[-1].removeprefix("ofutils.")
            print(f"failed: {jobs[index].label}: {reason}")
    return [outcomes[index] for index in range(len(jobs))]


def require_machine(name: str, scale: str, tasks: list, known: Callable) -> None:
    """Refuse, at scale gpu or paper without a GPU, tasks of which not all are `known(task)`; each has a `label`."""
    here = scale in ("tiny", "small") or params.device().type != "cpu"
    missing = [] if here else [task for task in tasks if not known(task)]
    of = f"{len(missing)} of {len(tasks)} runs have no record here, e.g. {missing[0].label if missing else None}"
    needs = f"{name} at scale {scale} needs a GPU: {of}; scales that work without: tiny, small"
    params.require(not missing, needs)


@dataclass(frozen=True)
class Recipe:
    """The runs of a notebook at one scale. Seed 0 is for choosing (the grid, a search), seeds from 1 for judging."""

    name: str
    scale: str
    jobs: tuple[Job, ...]
    grid: tuple[Job, ...] = ()  # one seed of every method at every learning rate of its grid
    workers: int | None = None
    value: int = 0  # how many claims its first seed is evidence for; 0: it refines what others show
    unsettled: tuple[str, ...] = ()  # methods whose learning rate waits for runs of the grid
    overrides: tuple = ()  # what `read_recipe` got besides name and scale

    def runnable(self, grid: bool = False) -> list[Job]:
        """The jobs, or those of the grid, if this machine can carry the scale or has every record.

        Raises:
            UserError: at scale gpu or paper without a GPU, when a record is missing.
        """
        jobs = list(self.grid if grid else self.jobs)
        params.require(len(jobs) > 0, f"{self.name} has no {'grid' if grid else 'runs'} at scale {self.scale}")
        waits = "" if grid else ", ".join(self.unsettled)
        params.require(not waits, f"{self.name}: no learning rate for {waits}: not all of its grid is recorded")
        require_machine(self.name, self.scale, jobs, lambda job: job.published or recall(job))
        return jobs

    def settled(self) -> "Recipe":
        """This recipe at the learning rates that its grid decides; what is missing of the grid is trained first."""
        if not self.unsettled:
            return self
        self.run(grid=True)
        return read_recipe(self.name, self.scale, *self.overrides)

    def run(self, grid: bool = False, workers: int | None = None) -> list[Outcome]:
        """Perform or recall the jobs, or those of the grid."""
        recipe = self if grid else self.settled()
        return run(recipe.runnable(grid), self.workers if workers is None else workers)


def _read_yaml(name: str) -> dict:
    import yaml

    params.require_known("recipe", name, _names())
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())


def _names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml"))


def recipes(scale: str) -> list[str]:
    """The names of all recipes that have this scale."""
    return [name for name in _names() if scale in _read_yaml(name)["scales"]]


def _scale(name: str, scale: str) -> dict:
    """What a recipe says of a scale, together with what it takes over from another one."""
    content = _read_yaml(name)
    scales = content["scales"]
    params.require(scale in scales, f"{name} has no recipe for scale {scale!r}; it has: {', '.join(scales)}")
    chosen = {key: content[key] for key in ("methods",) if key in content} | scales[scale]
    if "like" in chosen:  # another recipe's base, evaluation, quant (and methods), so that the two cannot drift apart
        other = _scale(chosen["like"], scale)
        base = params.merged(other["base"], chosen.get("base", {}))
        chosen = other | {"lr": {}, "grid": []} | chosen | {"base": base}
    return chosen


def read_recipe(name: str, scale: str, steps: int = 0, seeds: int = 0, corpus: str = "", model: str = "") -> Recipe:
    """The recipe of a notebook at a scale; `steps`, `seeds`, `corpus` and `model` override it where they are set.

    Raises:
        UserError: an unknown recipe, or a scale that it does not have; a model where it trains its own.
    """
    chosen = _scale(name, scale)
    methods = chosen["methods"]
    if "published" in chosen:  # nothing is trained: checkpoints are measured, up to the step asked for
        evaluation = params.build(Evaluation, chosen["evaluation"] | ({"text": corpus} if corpus else {}))
        found = sources.read(name, scale, model)
        at = tuple(step for step in found.steps if step <= (steps or step))
        own = {one.rpartition("-")[2]: Published(one, at) for one in found.models}
        return Recipe(name, scale, tuple(Job(size, one, (), evaluation) for size, one in own.items()), workers=0)
    params.require(not model, f"{name} at scale {scale} trains its own models; model {model!r} needs scale paper")
    override = ({"steps": steps} if steps else {}) | ({"corpus": corpus} if corpus else {})
    base = chosen["base"] | override
    params.require(base.get("corpus") != "", f"{name} at scale {scale} needs a text to train on: name it with corpus")
    settings = tuple(params.build(QuantSettings, one) for one in chosen.get("quant", ()))
    settings = tuple(replace(one, draw=draw) for draw in range(chosen.get("draws", 1)) for one in settings)
    evaluation = params.build(Evaluation, chosen.get("evaluation", {}))

    def job(method: str, seed: int, **rate) -> Job:
        own = methods[method]
        values = params.merged(base, own) | override | {"seed": seed} | rate
        values["warmup"] = min(values["warmup"], values["steps"] // 4)
        return Job(method, params.build(TrainConfig, values), settings, evaluation)

    follows = chosen.get("follows", {})  # method -> another one, whose rate it takes, and a factor
    own = [method for method in methods if method not in follows]
    tried = chosen.get("grid", [])
    of = tried if isinstance(tried, dict) else dict.fromkeys(own, tried)
    grid = [job(m, 0, lr=lr, measure_every=base["steps"]) for m in own for lr in of.get(m, [])]
    plain = replace(evaluation, sites=(), over_training=False)
    grid = tuple(replace(one, settings=(), evaluation=plain) for one in grid)
    rates, unsettled = chosen.get("lr", {}), ()
    if rates == "rule":
        rates = largest_good_rates(grid)
        waiting = {one.method for one in grid} - rates.keys()
        unsettled = tuple(m for m in methods if follows.get(m, [m])[0] in waiting)
        rates |= {m: rates[other] * factor for m, (other, factor) in follows.items() if other in rates}
    start, count = chosen.get("first_seed", 1), seeds or chosen["seeds"]
    rates = chosen.get("rates", {}) or {method: [lr] for method, lr in rates.items()}  # one of its own, or several
    at = {m: [{"lr": lr} for lr in (rates if isinstance(rates, list) else rates.get(m, []))] or [{}] for m in methods}
    jobs = tuple(job(m, seed, **rate) for seed in range(start, start + count) for m in methods for rate in at[m])
    about = chosen.get("workers"), chosen.get("value", 0), unsettled, (steps, seeds, corpus)
    return Recipe(name, scale, jobs, grid, *about)


def largest_good_rates(grid: tuple[Job, ...], slack: float = 0.1) -> dict[str, float]:
    """Method -> the largest rate within `slack` nats of its best loss, where all its runs of a grid are recorded."""
    found = {(job.method, job.config.lr): recall(job) for job in grid}
    rates = {}
    for method in dict.fromkeys(job.method for job in grid):
        of = {lr: outcome for (name, lr), outcome in found.items() if name == method}
        losses = {lr: one.measured["loss"] for lr, one in of.items() if one and not one.error}
        if losses and None not in of.values():
            rates[method] = max(lr for lr, loss in losses.items() if loss <= min(losses.values()) + slack)
    return rates


@params.settings
class Command:
    """Flags of `python -m ofutils.sweep`."""

    scale: str = "auto"
    steps: params.Natural = 0
    seeds: params.Natural = 0
    corpus: str = ""
    model: str = ""  # checkpoints of another id, where published ones are measured
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
    recipe = read_recipe(arguments[0], scale, command.steps, command.seeds, command.corpus, command.model)
    print(f"{recipe.name} at scale {scale} ({why}): {len(recipe.grid if command.grid else recipe.jobs)} runs")
    outcomes = recipe.run(command.grid, None if command.workers < 0 else command.workers)
    for outcome in outcomes:
        if not outcome.error:
            costs = "".join(f", {k} {v - outcome.measured['loss']:+.4f}" for k, v in outcome.quantized.items())
            print(f"{outcome.job.label}: loss {outcome.measured['loss']:.4f}{costs}")
    if command.export:
        print("records written to", export(outcomes, f"{recipe.name}.{scale}" + ".grid" * command.grid))
    sys.exit(int(any(outcome.error for outcome in outcomes)))


def export(outcomes: list[Outcome], name: str):
    """Add the records behind outcomes to the JSON lines of that name under figures/records; returns the path."""
    store, records = train.store(), []
    for outcome in outcomes:
        records += [outcome.run and outcome.run.record, *(store.find(*entry) for entry in _entries(outcome.job))]
    return store.export([record for record in records if record], name)


if __name__ == "__main__":
    params.main_guard(main)
