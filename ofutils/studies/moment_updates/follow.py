"""What a step of training does to the second and fourth moment of an activation, split by its order in the change.

he2024's Appendix F: one input before and after a step, X and X + D; kurtosis is m4 / m2^2 of X, and m2 and m4 move
by sums of terms of first to fourth order in D. Here the input is the same at every step, held-out text, so that the
changes of all steps add up to the change over the training.

    python -m ofutils.studies.moment_updates.follow --scale gpu     trains what has no record yet, at a scale of
                                                                    07_op_block; adds to figures/records
    python -m ofutils.studies.moment_updates.follow --laboratory    the same of the laboratory's models
    flags: --scale, --steps, --seeds, --corpus, --workers
"""

from dataclasses import dataclass, replace
from math import isfinite

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.func import functional_call

from ofutils import params, pool, probes, sweep, train
from ofutils.batches import fixed_batches
from ofutils.records import differing
from ofutils.transformer import clm_loss

#: What is followed: the stream that enters the second block's attention, as in the paper.
SITE = "blocks.1.resid_pre"
FOURTH = ("u41", "u42", "u43", "u44")
TERMS = ("u21", "u22", *FOURTH)
#: Method -> method of 07_op_block, and what of its training is another; `lr` is a factor.
METHODS = {
    "Pre-LN": ("Pre-LN", {}),
    "OP": ("OP", {}),
    "Pre-LN, eps 1e-4": ("Pre-LN", {"eps": 1e-4}),
    "Pre-LN, rate x 0.3": ("Pre-LN", {"lr": 0.3}),
    "Pre-LN, SOAP": ("Pre-LN", {"optimizer": "soap"}),
    "Pre-LN, SGD": ("Pre-LN", {"optimizer": "sgd"}),
}
#: The first of the betas (SGD: the momentum).
MOMENTA = (0.0, 0.9)
BETA2 = 0.95
EVERY = 10  # steps whose terms are summed into one entry of a record


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """m2 and m4 of X, whose neuron kurtosis is m4 / m2^2.

    With s_j^2 the mean square of neuron j over tokens: mean_j(s_j^2) and mean_j(s_j^4).

    Args:
        x: (..., D); all leading axes are tokens.

    Returns:
        Two 0-d float64, in the units of x squared and to the fourth.

    Source: he2024, Eq 1.
    """
    squares = x.double().flatten(0, -2).square().mean(0)  # (D,): s_j^2
    return squares.mean(), squares.square().mean()


def terms(x: Tensor, change: Tensor) -> dict[str, Tensor]:
    """The terms of what a change D does to m2 and m4 of X, by their order in D.

    Per neuron j, over the N tokens: A_j = sum X^2, B_j = sum X D, C_j = sum D^2. Then

        m2(X + D) - m2(X) = u21 + u22              u21 = sum_j 2 B_j / (N D), u22 = sum_j C_j / (N D)
        m4(X + D) - m4(X) = u41 + u42 + u43 + u44  u41 = sum_j 4 A_j B_j / (N^2 D), u42 = sum_j (2 A_j C_j + 4 B_j^2)
                                                   / (N^2 D), u43 = sum_j 4 B_j C_j / (N^2 D), u44 = sum_j C_j^2 / ...

    u22, u42 and u44 are at least 0. The order in D is the order in the learning rate as far as D is linear in it.

    Args:
        x, change: (..., D), X and D; all leading axes are tokens.

    Returns:
        `TERMS` -> 0-d float64, in the units of the moments.

    Source: he2024, Appendix F, which leaves the factors 1 / (N D) and 1 / (N^2 D) out; no code is released.
    """
    x, change = (one.double().flatten(0, -2) for one in (x, change))  # (N, D)
    a, b, c = (one.mean(0) for one in (x * x, x * change, change * change))  # (D,)
    orders = 2 * b, c, 4 * a * b, 2 * a * c + 4 * b * b, 4 * b * c, c * c
    return {name: order.mean() for name, order in zip(TERMS, orders, strict=True)}


@dataclass(frozen=True)
class Task:
    """One training to follow."""

    method: str
    momentum: float
    config: train.TrainConfig
    every: int = EVERY

    @property
    def label(self) -> str:
        """For failures."""
        return f"{self.method}, momentum {self.momentum:g}, seed {self.config.seed}"

    @property
    def key(self) -> dict:
        """What the record is filed under."""
        return {"run": differing(self.config), "site": SITE, "every": self.every}


def tasks(scale: str, steps: int = 0, seeds: int = 0, corpus: str = "") -> list[Task]:
    """Each method, without momentum and with it, seed after seed: the configurations of 07_op_block at a scale.

    The rates of SGD are those of the recipe 09_moment_updates_sgd.

    Raises:
        UserError: a scale that they do not have.
    """
    asked = scale, steps, seeds, corpus
    blocks, sgd = (sweep.read_recipe(name, *asked).settled() for name in ("07_op_block", "09_moment_updates_sgd"))
    found = {(job.method, job.config.seed): job.config for job in blocks.jobs}
    rates = {job.config.betas[0]: job.config.lr for job in sgd.jobs}
    wanted = []
    for seed in dict.fromkeys(seed for _, seed in found):
        for momentum in MOMENTA:
            for method, (block, own) in METHODS.items():
                config = found[block, seed]
                lr = rates[momentum] if own.get("optimizer") == "sgd" else config.lr * own.get("lr", 1.0)
                own = own | {"lr": lr, "betas": (momentum, BETA2)}
                wanted.append(Task(method, momentum, replace(config, **own)))
    return wanted


def in_the_laboratory() -> list[Task]:
    """The same of the laboratory's models, of two layers, at the laboratory's second beta."""
    jobs = sweep.read_recipe("09_moment_updates_lab", "small").jobs
    configs = ((job.method, replace(job.config, betas=(one, job.config.betas[1]))) for job in jobs for one in MOMENTA)
    return [Task(method, config.betas[0], config, every=10 * EVERY) for method, config in configs]


def recall(task: Task) -> dict | None:
    """The record of a task, if it is there."""
    return train.store().find("moments", task.key)


def perform(task: Task, report=lambda step, loss: None) -> dict:
    """Train, and record what each step did; or recall it.

    Returns:
        A record whose result has `m2` and `m4` before every `task.every`-th step and after the last; and of the steps
        between two of these places: `TERMS`, their sums; `u41 / m4` ... `u44 / m4`, the sums of each step's term over
        the m4 that it met; `loss` of the batch (nats) and `bend`, of the first of them: |D - 2 D'| / |D|, where D' is
        the change of the activation by half of the step, 0 if D is linear in it. And `held_out`, the loss at the end
        (nats).
    """
    if known := recall(task):
        return known
    config, accelerator = task.config, Accelerator(cpu=params.device().type == "cpu")
    tokens = train.load_tokens(config)
    loop = train.prepare(config, tokens, accelerator)
    drawn = fixed_batches(tokens.validation, config.eval_batches, config.batch, config.model.context)
    rows = drawn[0].to(accelerator.device)
    summed = (*TERMS, *(f"{name} / m4" for name in FOURTH))
    result = {name: [] for name in ("m2", "m4", "loss", "bend", *summed)}
    torch.set_flush_denormal(True)  # as `train` does
    try:
        before = _activation(loop, rows)
        for step in range(config.steps):
            m2, m4 = moments(before)
            looks = step % task.every == 0
            old = {name: one.detach().clone() for name, one in loop.model.named_parameters()} if looks else {}
            loss = float(loop.step(step))
            params.require(isfinite(loss), f"the loss is not finite after step {step + 1}")
            change = _activation(loop, rows) - before
            if looks:
                half = {name: one.detach().lerp(old[name], 0.5) for name, one in loop.model.named_parameters()}
                bent = change - 2 * (_activation(loop, rows, half) - before)
                bend = bent.norm() / change.norm().clamp_min(torch.finfo(change.dtype).tiny)
                for name, value in {"m2": m2, "m4": m4, "loss": loss, "bend": bend}.items():
                    result[name].append(float(value))
                for name in summed:
                    result[name].append(0.0)
                report(step, loss)
            found = terms(before, change)
            for name, value in (found | {f"{name} / m4": found[name] / m4 for name in FOURTH}).items():
                result[name][-1] += float(value)
            before = before + change
    finally:
        torch.set_flush_denormal(False)
    for name, value in zip(("m2", "m4"), moments(before), strict=True):
        result[name].append(float(value))
    result["held_out"] = probes.measure(loop.model, drawn, loss=clm_loss).loss
    report(config.steps, result["held_out"])
    return train.store().write("moments", task.key, result, params.environment() | {"corpus": tokens.corpus})


def _activation(loop: train.Loop, rows: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """(B, T, D) in float64: the activation at `SITE`, of the model as it is or with other weights."""
    with torch.no_grad(), loop.precision(), probes.capture(loop.model, SITE) as kept:
        functional_call(loop.model, weights or {}, (rows,))
    return kept[SITE].double()


def run(scale: str, wanted: list[Task], workers: int | None = None) -> list[dict]:
    """The records of tasks of a scale, in order; what is missing is trained, see `pool.finish`.

    Raises:
        UserError: one is missing at scale gpu or paper, where there is no GPU.
    """
    sweep.require_machine("09_moment_updates", scale, wanted, recall)
    return pool.finish(perform, wanted, [0 if recall(one) else one.config.steps for one in wanted], workers)


@params.settings
class Command:
    """Flags of `python -m ofutils.studies.moment_updates.follow`."""

    scale: str = "auto"
    laboratory: bool = False
    steps: params.Natural = 0
    seeds: params.Natural = 0
    corpus: str = ""
    workers: int = -1  # -1: one per core; on a GPU one run after the other


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    command = params.read(Command, arguments)
    scale, why = params.resolve_scale(command.scale)
    own = command.steps, command.seeds, command.corpus
    params.require(not (command.laboratory and any(own)), "--laboratory takes no steps, seeds or corpus")
    wanted = in_the_laboratory() if command.laboratory else tasks(scale, *own)
    scale, name = ("small", "09_moment_updates_lab") if command.laboratory else (scale, "09_moment_updates")
    workers = None if command.workers < 0 else command.workers
    print(f"scale {scale} ({why}): {len(wanted)} runs")
    for task, record in zip(wanted, run(scale, wanted, workers), strict=True):
        print(f"{task.label}: loss {record['result']['held_out']:.4f}")
    print("records written to", train.store().export([*map(recall, wanted)], f"{name}.{scale}"))


if __name__ == "__main__":
    params.main_guard(main)
