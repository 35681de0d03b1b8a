"""Training: one configuration, one plain loop, resume to the bit.

What a step does depends on the configuration and the step's number alone: the batch follows from seed and
cursor, the learning rate from the schedule, dropout from a generator seeded by both. So the state to keep
is the model, the optimizer and the log; a killed run that is started again ends in the same weights, to the
bit on a CPU with the same number of threads (a GPU's fused attention does not promise its last bit).

    python -m ofutils.train --steps 200 --model.layers 4     flags, or --config run.yaml, or both
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ofutils import UserError, data, hub, optim, params, variants
from ofutils.probes import measure, resolve
from ofutils.records import Store, differing, digest, warn_of_other_corpus
from ofutils.resume import State, log_spaced, restore, save, save_weights
from ofutils.transformer import Transformer, TransformerConfig, clm_loss

OBJECTIVES = ("clm", "mlm", "pair", "image")
_BUILT = ("clm",)
SAVE_EVERY = 100  # steps between checkpoints; has no influence on the numbers


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the numbers of a run. Its name is the hash of what differs from the defaults."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    objective: str = "clm"  # clm | mlm | pair | image
    start: str = ""  # name of the loaded model that training starts from; empty: a fresh one
    corpus: str = "stdlib"  # see data.load_corpus
    characters: int = 0  # cap on the training text; 0: all of it
    variant: str = "natural"  # of the text, see variants.VARIANTS
    bpe: int = 0  # ids of the tokenizer; 0: as many as the model has
    batch: int = 16  # rows of `model.context` tokens
    steps: int = 500
    warmup: int = 50  # steps of linear warm-up, then linear decay to 0
    lr: float = 3e-3
    optimizer: str = "adamw"  # adamw | soap
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norm: bool = False  # decay the gains of norms too
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "no"  # no | bf16 (mixed)
    seed: int = 0
    measure_every: int = 50  # steps between measurements; the last step is always measured
    eval_batches: int = 2
    sites: tuple[str, ...] = ("resid_post",)  # measured during training

    def __post_init__(self):
        choices = {"objective": OBJECTIVES, "optimizer": optim.OPTIMIZERS, "precision": ("no", "bf16")}
        for name, known in (choices | {"variant": variants.VARIANTS}).items():
            if (value := getattr(self, name)) not in known:
                near = params.suggest(value, known)
                raise UserError(f"unknown {name} {value!r}{near}; known: {', '.join(known)}")
        if self.objective not in _BUILT:
            raise UserError(f"objective {self.objective!r} is not built yet; built: {', '.join(_BUILT)}")
        for name in ("batch", "steps", "measure_every", "eval_batches"):
            params.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("characters", "warmup", "eps", "weight_decay", "seed"):
            params.require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            params.require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        params.require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas must be two numbers in [0, 1), got {self.betas}",
        )
        params.require(self.model.context >= 2, "a context of one token leaves nothing to predict")
        params.require(len(self.sites) > 0, "sites must name at least one site")
        params.require(self.bpe <= self.model.vocab, f"bpe {self.bpe} is more than model.vocab {self.model.vocab}")

    @property
    def name(self) -> str:
        """The run's name, the same on every machine."""
        return digest("train", differing(self))


def store() -> Store:
    """Where records are looked for and written."""
    return Store(params.out() / "runs", params.root() / "figures" / "records")


@dataclass(frozen=True)
class Run:
    """A finished run: its configuration and its record."""

    config: TrainConfig
    record: dict

    @property
    def log(self) -> list[dict]:
        """One entry per measurement: step, train_loss, lr, loss, sites -> metrics."""
        return self.record["result"]["log"]

    @property
    def diverged(self) -> int | None:
        """The step after which the loss was no longer finite, if there was one."""
        return self.record["result"]["diverged"]

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on this machine (a committed record comes without)."""
        return (_folder(self.config) / "model.safetensors").is_file()

    def load(self) -> Transformer:
        """The trained model, in evaluation mode, on this machine's device."""
        if not self.has_weights:
            raise UserError(f"{self.config.name}: the record is here, its weights are not")
        return _load(self.config, _folder(self.config) / "model.safetensors")


def _folder(config: TrainConfig) -> Path:
    return params.out() / "runs" / config.name


def _load(config: TrainConfig, path: Path) -> Transformer:
    model = Transformer(config.model)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"weights {path} are not readable; delete them to train the run again") from error
    return model.to(params.device()).eval()


@dataclass(frozen=True)
class Published:
    """Checkpoints that somebody else published: the revisions step0, step1, ... of an id on the Hub."""

    name: str = ""
    steps: tuple[int, ...] = ()


def kept(config: TrainConfig, step: int) -> Path:
    """Where `train(keep=True)` keeps the weights after so many steps."""
    return _folder(config) / f"step-{step:08d}.safetensors"


def checkpoints(
    source: TrainConfig | Published, steps: tuple[int, ...] | None = None
) -> Iterator[tuple[int, nn.Module]]:
    """(step, model in evaluation mode) over a training, in order, each loaded when it is asked for.

    Args:
        source: a run of ours, trained with `keep`, at its `log_spaced` steps; or `Published`.
        steps: some of its checkpoints; None: all of them.

    Raises:
        UserError: a checkpoint that is not here; what `hub.model` refuses.
    """
    if isinstance(source, Published):
        for step in source.steps if steps is None else steps:
            yield step, hub.model(source.name, f"step{step}", "lm")
        return
    for step in log_spaced(source.steps) if steps is None else steps:
        path = kept(source, step)
        params.require(path.is_file(), f"{source.name}: the weights after step {step} were not kept")
        yield step, _load(source, path)


def load_tokens(config: TrainConfig) -> data.Tokens:
    """The tokenized corpus of a run."""
    tokens = data.tokenize(data.load_corpus(config.corpus, config.characters), config.bpe or config.model.vocab)
    return variants.transformed(tokens, config.variant, config.model.vocab, config.model.context)


def find(config: TrainConfig) -> Run | None:
    """The finished run of a configuration, or None. A record of another corpus prints one line."""
    record = store().find("train", differing(config))
    if record is None:
        return None
    try:
        here = data.load_corpus(config.corpus, config.characters).sha256
    except UserError:
        here = None  # the record speaks for itself
    warn_of_other_corpus(record, here)
    return Run(config, record)


def train(
    config: TrainConfig,
    model: Transformer | None = None,
    report: Callable[[int, float], None] | None = None,
    save_every: int = SAVE_EVERY,
    again: bool = False,
    keep: bool = False,
) -> Run:
    """Train, or load the finished run, or go on with the broken one.

    Args:
        config: the run.
        model: where training starts, with `config.start` as its name; it is trained in place.
        report: called with (steps done, loss) instead of the progress bar.
        save_every: steps between checkpoints.
        again: train even where there is a record, for the weights that are not here.
        keep: keep the weights at the `log_spaced` steps, for `checkpoints`.

    Returns:
        The finished run. One whose loss stopped being finite is finished too, see `Run.diverged`.

    Raises:
        UserError: a bad corpus, a checkpoint of another corpus, a full disk.
    """
    if (model is None) == bool(config.start):
        raise UserError("a run that starts from a loaded model needs both the model and config.start, its name")
    wanted = log_spaced(config.steps) if keep else ()
    whole = all(kept(config, step).is_file() for step in wanted)
    if not again and (run := find(config)) and (whole or run.diverged):
        return run
    accelerator = Accelerator(cpu=params.device().type == "cpu")
    with accelerator.main_process_first():
        tokens = load_tokens(config)
    batches = data.Batches(tokens.train, config.batch, config.model.context, config.seed)
    evaluation = data.fixed_batches(tokens.validation, config.eval_batches, config.batch, config.model.context)
    world, rank = accelerator.num_processes, accelerator.process_index
    if config.batch % world:
        raise UserError(f"a batch of {config.batch} does not split over {world} processes")
    torch.manual_seed(config.seed)
    model = model or Transformer(config.model)
    optimizer = optim.make(
        config.optimizer, model, config.lr, config.betas, config.eps, config.weight_decay, config.decay_norm
    )
    trained, stepper = accelerator.prepare(model, optimizer)
    checkpoint = _folder(config) / "checkpoint.safetensors"
    if keep and not kept(config, 0).is_file():
        checkpoint.unlink(missing_ok=True)  # begun without keeping: the early weights need a new start
    state = restore(checkpoint, model, optimizer, tokens.corpus) if checkpoint.is_file() else State()
    state.loss_sum = state.loss_sum.to(accelerator.device)
    if report is None:
        report = _bar(config, state.step, shown=accelerator.is_main_process)

    resolve(model, config.sites)  # an unknown site is an error before the training, not after
    place = accelerator.device.type
    mixed = torch.autocast(place, torch.bfloat16, enabled=config.precision == "bf16")
    generators = torch.cuda.default_generators if place == "cuda" else [torch.default_generator]
    dropout_generator = generators[torch.cuda.current_device() if place == "cuda" else 0]
    model.train()
    if state.step == 0 and accelerator.is_main_process:
        for old in _folder(config).glob("step-*.safetensors"):
            old.unlink()
    wanted = wanted if accelerator.is_main_process else ()
    if 0 in wanted and state.step == 0:
        save_weights(kept(config, 0), model)
    while state.step < config.steps and state.diverged is None:
        dropout_generator.manual_seed((config.seed * 1_000_003 + state.step) * 1_009 + rank)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * optim.schedule(state.step, config.steps, config.warmup)
        batches.cursor = state.step
        batch = batches.draw()[rank::world].to(accelerator.device)
        with mixed:
            loss = clm_loss(trained(batch), batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        stepper.step()
        stepper.zero_grad()
        state.step += 1
        state.loss_sum += loss.detach()
        state.loss_count += 1
        if state.step % config.measure_every == 0 or state.step == config.steps:
            state.loss_sum = accelerator.reduce(state.loss_sum, "mean")
            _measure(state, config, model, evaluation)
        if state.step in wanted:
            save_weights(kept(config, state.step), model)
        if state.step % 10 == 0 or state.step == config.steps:
            report(state.step, float(loss.detach()))
        going_on = state.step < config.steps and state.diverged is None
        if state.step % save_every == 0 and going_on and accelerator.is_main_process:
            save(checkpoint, model, optimizer, state, tokens.corpus)

    accelerator.wait_for_everyone()
    result = {"log": state.log, "diverged": state.diverged}
    if accelerator.is_main_process:
        save_weights(checkpoint.with_name("model.safetensors"), model)
        environment = params.environment() | {"corpus": tokens.corpus}
        record = store().write("train", differing(config), result, environment)
        checkpoint.unlink(missing_ok=True)
    else:
        record = {"name": config.name, "environment": {}, "result": result}
    accelerator.wait_for_everyone()
    return Run(config, record)


def _measure(state: State, config: TrainConfig, model: Transformer, evaluation: list[Tensor]) -> None:
    train_loss = float(state.loss_sum) / state.loss_count
    state.loss_sum.zero_()
    state.loss_count = 0
    found = measure(model, evaluation, config.sites, clm_loss).summary()
    lr = config.lr * optim.schedule(state.step - 1, config.steps, config.warmup)
    state.log.append({"step": state.step, "train_loss": train_loss, "lr": lr, **found})
    if not (abs(train_loss) < float("inf") and abs(found["loss"]) < float("inf")):
        state.diverged = state.step


def _bar(config: TrainConfig, done: int, shown: bool) -> Callable[[int, float], None]:
    bar = tqdm(
        total=config.steps,
        initial=done,
        desc=config.name,
        unit="step",
        mininterval=2,
        leave=False,
        disable=not shown,
    )
    tokens, began = config.batch * config.model.context, time.monotonic()

    def report(step: int, loss: float) -> None:
        rate = tokens * (step - done) / max(1e-9, time.monotonic() - began)
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update(step - bar.n)
        if step == config.steps:
            bar.close()

    return report


def main(arguments: list[str]) -> None:
    """The command line: train one run and print where it went and what came out."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__, *params.usage(TrainConfig), sep="\n")
        return
    run = train(params.read(TrainConfig, arguments))
    last = run.log[-1]
    kurtosis = max(site["neuron_kurtosis"] for site in last["sites"].values())
    norm = max(site["inf_norm"] for site in last["sites"].values())
    print(f"{run.config.name}: step {last['step']}, validation loss {last['loss']:.4f} nats")
    print(f"at {', '.join(run.config.sites)}: largest neuron kurtosis {kurtosis:.2f}, max inf norm {norm:.2f}")
    if run.diverged:
        sys.exit(f"diverged at step {run.diverged}")


if __name__ == "__main__":
    params.main_guard(main)
