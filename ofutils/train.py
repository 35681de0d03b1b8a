"""Training: one configuration, one plain loop, resume to the bit.

What a step does depends on the configuration and the step's number alone: the batch follows from the seed and
that number, the learning rate from the schedule, dropout from a generator seeded by both. So the state to keep
is the model, the optimizer and the log; a killed run that is started again ends in the same weights, to the
bit on a CPU with the same number of threads (a GPU's fused attention does not promise its last bit).

    python -m ofutils.train --steps 200 --model.layers 4     flags, or --config run.yaml, or both
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ofutils import UserError, data, hub, images, optim, params, sources, variants
from ofutils.batches import Ahead, Batches, Masks, fixed_batches, unpacked
from ofutils.devices import Every, seed_dropout, slowness_of_bf16
from ofutils.probes import Batch, measure, resolve
from ofutils.records import Store, differing, digest, warn_of_other_corpus
from ofutils.resume import State, log_spaced, restore, save, save_weights
from ofutils.streaming import STANDARD
from ofutils.transformer import Transformer, TransformerConfig, lm_loss

SAVE_AFTER = 20  # seconds between checkpoints; has no influence on the numbers
TELL_AFTER = 2  # seconds between reports on a GPU, where reading the loss waits for every step that is queued


class Stopped(Exception):
    """Raised by a `report` to stop a training, which saves its state first."""


@params.settings
class TrainConfig:
    """All that decides the numbers of a run. Its name is the hash of what differs from the defaults."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    objective: Literal["clm", "mlm", "image"] = "clm"  # causal or masked language modelling; classes of images
    start: str = ""  # name of the loaded model that training starts from; empty: a fresh one
    corpus: str = "stdlib"  # see data.tokens; of images see images.load
    characters: params.Natural = 0  # cap on the text of each split; 0: all of it
    variant: Literal[variants.VARIANTS] = "natural"  # of the text
    bpe: params.Natural = 0  # ids of the tokenizer; 0: as many as the model has for text, see `text_vocab`
    batch: params.Count = 16  # rows of `model.context` tokens
    steps: params.Count = 500
    warmup: params.Natural = 50  # steps of linear warm-up, then linear decay to 0
    decay: params.Share = 1.0  # the last share of the steps, over which the rate falls; 1: from the warm-up on
    lr: params.Positive = 3e-3
    optimizer: Literal[optim.OPTIMIZERS] = "adamw"
    betas: tuple[params.Fraction, params.Fraction] = (0.9, 0.95)
    eps: params.NotNegative = 1e-8
    weight_decay: params.NotNegative = 0.1
    decay_norm: bool = False  # decay the gains of norms too
    clip: params.Positive = 1.0  # largest norm of the gradient
    precision: Literal["no", "bf16"] = "no"  # bf16: mixed
    compile: bool = False  # on a GPU, torch.compile of model and loss: a minute at the start; for long runs
    rows_at_once: params.Natural = 0  # of a batch through the model, gradients added up, to save memory; 0: all
    seed: params.Natural = 0
    measure_every: params.Count = 50  # steps between measurements; the last step is always measured
    eval_batches: params.Count = 2
    sites: tuple[str, ...] = ("resid_post",)  # measured during training
    meters: tuple[str, ...] = STANDARD  # what is measured there

    def __post_init__(self):
        params.require(self.model.context >= 2, "a context of one token leaves nothing to predict")
        params.require(len(self.sites) > 0, "sites must name at least one site")
        causal, seen = self.objective == "clm", self.objective == "image"
        params.require(self.model.causal == causal, f"objective {self.objective} needs model.causal {causal}")
        needs = f"objective {self.objective} needs a model of {'images' if seen else 'text'}: see model.image.size"
        params.require(seen == (self.model.image.size > 0) and (not seen or self.model.head != "none"), needs)
        text = self.characters, self.variant, self.bpe
        params.require(
            not seen or text == (0, "natural", 0), "characters, variant and bpe are of text, not of images"
        )
        most = f"model.vocab {self.model.vocab} leaves for text, {self.text_vocab}"
        params.require(self.bpe <= self.text_vocab, f"bpe {self.bpe} is more than {most}")

    @property
    def text_vocab(self) -> int:
        """Ids that a text may have: the model's; with mlm all but the last, which is the mask token."""
        return self.model.vocab - (self.objective == "mlm")

    @property
    def row(self) -> int:
        """Ids that a row of a batch is cut from: the context; of images bytes."""
        return self.model.image.row if self.objective == "image" else self.model.context

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
        params.require(self.has_weights, f"{self.config.name}: the record is here, its weights are not")
        return _load(self.config, _folder(self.config) / "model.safetensors")


def _folder(config: TrainConfig) -> Path:
    return params.out() / "runs" / config.name


def checkpoint(config: TrainConfig) -> Path:
    """Where the state of a run lies while it is not finished."""
    return _folder(config) / "checkpoint.safetensors"


def _load(config: TrainConfig, path: Path) -> Transformer:
    model = Transformer(config.model)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"weights {path} are not readable; delete them to train the run again") from error
    return model.to(params.device()).eval()


@dataclass(frozen=True)
class Published:
    """Checkpoints that somebody else published: of a name on the Hub, at these steps, see `sources.place`."""

    name: str = ""
    steps: tuple[int, ...] = ()
    head: str | None = "lm"  # of `hub.model`


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
            yield step, hub.model(*sources.place(source.name, step), source.head)
        return
    for step in log_spaced(source.steps) if steps is None else steps:
        path = kept(source, step)
        params.require(path.is_file(), f"{source.name}: the weights after step {step} were not kept")
        yield step, _load(source, path)


def load_tokens(config: TrainConfig) -> data.Tokens | images.Images:
    """The tokenized corpus of a run, or its images."""
    if config.objective == "image":
        return images.load(config.corpus, config.model.image)
    vocab, context = config.text_vocab, config.model.context
    tokens = data.tokens(config.corpus, config.characters, config.bpe or vocab, context)
    return variants.transformed(tokens, config.variant, vocab, context)


def masks(config: TrainConfig, tokens: data.Tokens | images.Images) -> Masks | images.ImageConfig | None:
    """How the batches of a run are masked, or the form of its images, or None."""
    if config.objective == "image":
        return config.model.image
    return Masks(config.text_vocab, tokens.vocab, tokens.special) if config.objective == "mlm" else None


def find(config: TrainConfig) -> Run | None:
    """The finished run of a configuration, or None. A record of another corpus prints one line."""
    record = store().find("train", differing(config))
    if record is None:
        return None
    try:
        seen = config.objective == "image"
        here = load_tokens(config).corpus if seen else data.fingerprint(config.corpus, config.characters)
    except UserError:
        here = None  # the record speaks for itself
    warn_of_other_corpus(record, here)
    return Run(config, record)


@dataclass(frozen=True)
class Loop:
    """What a step needs, from `prepare`.

    The model as it is and as it is trained (wrapped), its loss, the optimizer, and this process' rows by the batch's
    number, see `Batches.at`.
    """

    config: TrainConfig
    accelerator: Accelerator
    model: Transformer
    trained: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rows: Callable[[int], Tensor]

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def precision(self) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def step(self, number: int) -> Tensor:
        """The step of that number, from 0 on; returns its loss, 0-d, on the device."""
        config, device = self.config, self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * optim.schedule(number, config.steps, config.warmup, config.decay)
        seed_dropout(device, (config.seed * 1_000_003 + number) * 1_009 + self.accelerator.process_index)
        batch, whole = self.rows(number), 0
        for part in batch.split(config.rows_at_once or len(batch)):
            with self.precision():
                loss = self.loss(self.trained, part) * (len(part) / len(batch))
            self.accelerator.backward(loss)
            whole = whole + loss.detach()
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return whole


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    asked = unpacked(batch)
    given = {} if torch.is_tensor(asked) else {name: one for name, one in asked.items() if name != "labels"}
    return lm_loss(model(**given) if given else model(asked), asked)


def prepare(
    config: TrainConfig, tokens: data.Tokens, accelerator: Accelerator, model: Transformer | None = None
) -> Loop:
    """Everything that a run needs before its first step.

    Args:
        model: where training starts; None: fresh weights that follow from the seed.

    Raises:
        UserError: an unknown site, a text shorter than a batch, a batch that does not split over the processes.
    """
    world = accelerator.num_processes
    params.require(config.batch % world == 0, f"a batch of {config.batch} does not split over {world} processes")
    batches = Batches(tokens.train, config.batch, config.row, config.seed, masks(config, tokens))
    part = slice(accelerator.process_index, None, world)
    ahead = accelerator.device.type == "cuda"
    rows = Ahead(batches, part, accelerator.device).at if ahead else lambda number: batches.at(number)[part]
    torch.manual_seed(config.seed)
    model = model or Transformer(config.model)
    resolve(model, config.sites)
    if config.precision == "bf16" and accelerator.device.type == "cpu" and (times := slowness_of_bf16()) > 1.1:
        print(f"precision bf16: a matrix product takes {times:.1f} times as long as in fp32 on this CPU")
    recipe = config.lr, config.betas, config.eps, config.weight_decay, config.decay_norm
    trained, optimizer = accelerator.prepare(model, optim.make(config.optimizer, model, *recipe))
    model.train()
    loss = torch.compile(_loss) if config.compile and accelerator.device.type == "cuda" else _loss
    return Loop(config, accelerator, model, trained, loss, optimizer, rows)


def train(
    config: TrainConfig,
    model: Transformer | None = None,
    report: Callable[[int, float], None] | None = None,
    save_every: int = 0,
    again: bool = False,
    keep: bool = False,
    tokens: data.Tokens | None = None,
) -> Run:
    """Train, or load the finished run, or go on with the broken one.

    Args:
        config: the run.
        model: where training starts, with `config.start` as its name; it is trained in place.
        report: called with (steps done, loss) instead of the progress bar; it may raise `Stopped`.
        save_every: steps between checkpoints; 0: as many as take `SAVE_AFTER`.
        again: train even where there is a record, for the weights that are not here.
        keep: keep the weights at the `log_spaced` steps, for `checkpoints`.
        tokens: the text in the ids of the model that is given; None: `load_tokens`.

    Returns:
        The finished run. One whose loss stopped being finite is finished too, see `Run.diverged`.

    Raises:
        UserError: a bad corpus, a checkpoint of another corpus, a full disk, and what `prepare` refuses.
    """
    named = (model is None) != bool(config.start)
    params.require(named, "a run that starts from a loaded model needs both the model and config.start, its name")
    wanted = log_spaced(config.steps) if keep else ()
    whole = all(kept(config, step).is_file() for step in wanted)
    if not again and (run := find(config)) and (whole or run.diverged):
        return run
    accelerator = Accelerator(cpu=params.device().type == "cpu")
    with accelerator.main_process_first():
        tokens = tokens or load_tokens(config)
    loop = prepare(config, tokens, accelerator, model)
    shape = config.eval_batches, config.batch, config.row
    evaluation = fixed_batches(tokens.validation, *shape, masks(config, tokens))
    state = _begin(loop, wanted, tokens.corpus)
    report = report or _bar(config, state.step, shown=loop.writes)
    saves, tells = Every(SAVE_AFTER), Every(TELL_AFTER if accelerator.device.type == "cuda" else 0)
    torch.set_flush_denormal(True)  # a saturated softmax makes numbers below 1e-38: a CPU is five times slower then
    try:
        while state.step < config.steps and state.diverged is None:
            loss = loop.step(state.step)
            state.add(loss)
            last = state.step == config.steps
            if last or state.step % config.measure_every == 0:
                _measure(state, loop, evaluation)
            if loop.writes and state.step in wanted:
                save_weights(kept(config, state.step), loop.model)
            if last or (state.step % 10 == 0 and tells.due()):
                report(state.step, float(loss))
            if not last and (state.step % save_every == 0 if save_every else saves.due()):
                _save(loop, state, tokens.corpus)
    except Stopped:
        _save(loop, state, tokens.corpus)
        raise
    finally:
        torch.set_flush_denormal(False)
    return _finish(loop, state, tokens.corpus)


def trained(config: TrainConfig, report: Callable[[int, float], None] | None = None) -> Run:
    """The finished run with its weights on this machine: trained again where its record came without them."""
    run = train(config, report=report)
    return run if run.has_weights else train(config, report=report, again=True)


def _begin(loop: Loop, wanted: tuple[int, ...], corpus: str) -> State:
    """Where the run stands: at its checkpoint, or at its start, whose weights are kept if they are wanted."""
    config, path = loop.config, checkpoint(loop.config)
    if wanted and not kept(config, 0).is_file():
        path.unlink(missing_ok=True)  # begun without keeping: the early weights need a new start
    if path.is_file():
        return restore(path, loop.model, loop.optimizer, corpus)
    if loop.writes:
        for old in _folder(config).glob("step-*.safetensors"):
            old.unlink()
        if wanted:
            save_weights(kept(config, 0), loop.model)
    return State()


def _measure(state: State, loop: Loop, evaluation: list[Batch]) -> None:
    config = loop.config
    with loop.precision():
        found = measure(loop.model, evaluation, config.sites, lm_loss, config.meters).summary()
    train_loss = float(loop.accelerator.reduce(state.loss_sum, "mean")) / state.loss_count
    lr = config.lr * optim.schedule(state.step - 1, config.steps, config.warmup, config.decay)
    state.log.append({"step": state.step, "train_loss": train_loss, "lr": lr, **found})
    state.loss_sum, state.loss_count = torch.zeros_like(state.loss_sum), 0
    if not (math.isfinite(train_loss) and math.isfinite(found["loss"])):
        state.diverged = state.step


def _save(loop: Loop, state: State, corpus: str) -> None:
    if loop.writes and state.diverged is None:
        save(checkpoint(loop.config), loop.model, loop.optimizer, state, corpus)


def _finish(loop: Loop, state: State, corpus: str) -> Run:
    """Write weights and record, and take the checkpoint away."""
    config, result = loop.config, {"log": state.log, "diverged": state.diverged}
    record = {"name": config.name, "environment": {}, "result": result}
    loop.accelerator.wait_for_everyone()
    if loop.writes:
        save_weights(_folder(config) / "model.safetensors", loop.model)
        record = store().write("train", differing(config), result, params.environment() | {"corpus": corpus})
        checkpoint(config).unlink(missing_ok=True)
    loop.accelerator.wait_for_everyone()
    return Run(config, record)


def _bar(config: TrainConfig, done: int, shown: bool) -> Callable[[int, float], None]:
    tokens, look = config.batch * config.model.context, {"unit": " tokens", "unit_scale": True, "desc": config.name}
    total, initial = tokens * config.steps, tokens * done
    bar = tqdm(total=total, initial=initial, mininterval=2, leave=False, disable=not shown, **look)

    def report(step: int, loss: float) -> None:
        bar.set_postfix_str(f"step {step}, loss {loss:.3f}", refresh=False)
        bar.update(tokens * step - bar.n)
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
