"""he2024's residual MLP on whitened images: SGD against Adam, with and without Pre-Norm (Figures 35 to 39).

python -m ofutils.studies.optimizers.mlp    trains what no record is there of, and adds to figures/records
flags: --images (a file, of CIFAR-10 say: at scale `paper`), --steps, --seeds, --workers, --grid (chose the rates)

Departures: below scale `paper`, scikit-learn's digits for CIFAR-10, a smaller model and batch, fewer steps, rates of
our own. What the paper leaves open: momentum 0.9, Adam's betas (0.9, 0.999), weights from N(0, 1 / fan-in), no
biases, no norm before the last layer, a loss that is the mean over classes too, every fifth image held out. Branches
are no wider than the stream: 15M parameters allow no more.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofutils import images, params, pool, sweep, train
from ofutils.layers import make_norm
from ofutils.records import differing, warn_of_other_corpus
from ofutils.resume import log_spaced
from ofutils.streaming import Statistics

EPS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
#: Learning rates that are tried at scale `small`, and what `choose` makes of them. he2024's are 3 and 3e-3.
GRID = {"sgd": (0.3, 1.0, 3.0, 10.0, 30.0), "adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
RATES = {("sgd", "srmsnorm"): 3.0, ("adam", "srmsnorm"): 3e-2, ("sgd", "none"): 1.0, ("adam", "none"): 3e-3}
_SIZES = {
    "tiny": {"width": 16, "layers": 2, "batch": 32, "steps": 4, "warmup": 1},
    "paper": {"width": 1024, "batch": 2048, "steps": 4900, "warmup": 200},
}
_METERS = {"kurtosis": "neuron_kurtosis", "rms correlation": "input_correlation_rms"}
_ADAM, _SGD = "Adam, Pre-SRMSNorm", "SGD, Pre-SRMSNorm"


@params.settings
class Task:
    """One training: all that decides its numbers."""

    images: str = "digits"  # scikit-learn's, or a parquet file like those of the Hub's uoft-cs/cifar10
    whiten: bool = True
    optimizer: Literal["sgd", "adam"] = "adam"
    norm: Literal["srmsnorm", "none"] = "srmsnorm"  # before every branch
    eps: params.NotNegative = 1e-8  # Adam's
    lr: params.Positive = 3e-3
    width: params.Count = 256
    layers: params.Count = 6
    batch: params.Count = 128
    steps: params.Count = 600
    warmup: params.Natural = 30  # steps of linear warm-up, then half a cosine to 0
    seed: params.Natural = 0

    @property
    def method(self) -> str:
        """What it shows, for tables."""
        name = {"sgd": "SGD", "adam": "Adam"}[self.optimizer] + {"srmsnorm": ", Pre-SRMSNorm", "none": ""}[self.norm]
        return name + (f", eps {self.eps:g}" if self.eps != 1e-8 else "") + ("" if self.whiten else ", not whitened")

    @property
    def label(self) -> str:
        """For failures."""
        return f"{self.method}, seed {self.seed}"


def tasks(scale: str = "small", images: str = "digits", seeds: int = 3, steps: int = 0) -> list[Task]:
    """SGD and Adam with and without norms; Adam with norms at other eps, and on images that are not whitened.

    Args:
        scale: `gpu` is `small`; `paper` has the paper's sizes, and its rates.
        images: see `Task`.
        seeds: 1 to so many.
        steps: 0: those of the scale.
    """
    base = Task(images, **_SIZES.get(scale, {}) | ({"steps": steps} if steps else {}))
    rates = {key: {"sgd": 3.0, "adam": 3e-3}[key[0]] if scale == "paper" else rate for key, rate in RATES.items()}
    wanted = [replace(base, optimizer=one, norm=norm, lr=lr) for (one, norm), lr in rates.items()]
    wanted += [*(replace(wanted[1], eps=eps) for eps in EPS[1:]), replace(wanted[1], whiten=False)]
    return [replace(task, seed=seed) for seed in range(1, seeds + 1) for task in wanted]


def grid_tasks() -> list[Task]:
    """The runs that `choose` looks at, of seeds that are not judged."""
    return [Task(optimizer=one, norm=norm, lr=r, seed=n) for one, norm in RATES for r in GRID[one] for n in (0, 4, 5)]


def choose(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The largest rate whose loss at the end, a geometric mean over seeds, is at most 1.5 times the least.

    By optimizer and norm. Adam with another eps or without whitening has the rate of Adam with norms: one change at a
    time. A run that diverged has its last finite loss, which is large.

    Args:
        runs: from `table`, of `grid_tasks`.
    """
    logs = runs.assign(loss=np.log(runs["loss"])).groupby(["optimizer", "norm", "lr"])["loss"].mean().reset_index()
    groups = logs.groupby(["optimizer", "norm"])
    return {one: float(own[own["loss"] <= own["loss"].min() + math.log(1.5)]["lr"].max()) for one, own in groups}


def load(source: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixels (N, P), labels (N,) and the sha256 of both; see `images.read`."""
    pixels, labels, sha256 = images.read(source)
    return pixels.reshape(len(pixels), -1), labels, sha256


@lru_cache(maxsize=2)
def prepare(images: str, whiten: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (N, I) and one-hot labels (N, C) to train on, then those of every fifth image; on the device.

    Args:
        images: see `Task`.
        whiten: whether rotated to the principal components of what is trained on, each divided by its standard
            deviation, those without any left out; else centred and divided by one number: mean variance 1.
    """
    pixels, labels = map(torch.tensor, load(images)[:2])
    held = torch.arange(len(labels)) % 5 == 4
    pixels = pixels.double() - pixels[~held].double().mean(0)
    variances, axes = torch.linalg.eigh(pixels[~held].T.cov(correction=0))  # (P,), (P, P)
    real = variances > 1e-9 * variances.max()
    inputs = pixels @ (axes[:, real] / variances[real].sqrt()) if whiten else pixels / variances.mean().sqrt()
    inputs, labels = inputs.float().to(params.device()), F.one_hot(labels.long()).float().to(params.device())
    return inputs[~held], labels[~held], inputs[held], labels[held]


class MLP(nn.Module):
    """x_0 = W x, then x_l = x_(l-1) + V_l relu(U_l norm(x_(l-1))); put out is H x_L / sqrt(D), H from zeros.

    W (D, I) for I inputs; U_l, V_l (D, D); H (C, D) for C classes. Source: he2024, its appendix on CIFAR-10.
    """

    def __init__(self, task: Task, inputs: int, classes: int):
        super().__init__()
        self.norm = make_norm(task.norm, task.width, 1e-5, "outside")
        self.first, self.head = nn.Linear(inputs, task.width, bias=False), nn.Linear(task.width, classes, bias=False)
        self.up, self.down = (nn.Parameter(torch.empty(task.layers, task.width, task.width)) for _ in "UV")
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def streams(self, x: Tensor) -> list[Tensor]:
        """(N, I) -> (N, D) each: what enters the layers, and at last the head."""
        found = [self.first(x)]
        for up, down in zip(self.up, self.down, strict=True):
            found.append(found[-1] + F.relu(self.norm(found[-1]) @ up.T) @ down.T)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, C)."""
        return self.head(self.streams(x)[-1]) / self.head.in_features**0.5


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step` (0-based): linear warm-up, then half a cosine to 0."""
    return (
        (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
    )


def fit(task: Task, report: Callable[[int, float], None] = lambda step, loss: None) -> tuple[MLP, list[dict]]:
    """Train from fresh weights, which follow from the seed like the order of images.

    Returns:
        The model, and a row for each of about 25 steps with a finite loss: `step`; `loss` and `accuracy` on the first
        2048 images that it trains on; `held accuracy`; `kurtosis` (neuron) and `rms correlation` (input) of
        what enters each layer and the head.
    """
    data = inputs, labels, *_ = prepare(task.images, task.whiten)
    torch.manual_seed(task.seed)
    model = MLP(task, inputs.shape[1], labels.shape[1]).to(params.device())
    sgd = torch.optim.SGD(model.parameters(), task.lr, momentum=0.9, fused=True)
    adam = torch.optim.Adam(model.parameters(), task.lr, eps=task.eps, fused=True)
    optimizer = {"sgd": sgd, "adam": adam}[task.optimizer]
    epochs = -(-task.steps * task.batch // len(labels))
    order = torch.cat([torch.randperm(len(labels)) for _ in range(epochs)]).to(labels.device).split(task.batch)
    measured = {*log_spaced(task.steps), *(task.steps * part // 16 for part in range(17))}
    rows = [_measure(model, data, 0)]
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = task.lr * schedule(step, task.steps, task.warmup)
        optimizer.zero_grad()
        F.mse_loss(model(inputs[order[step]]), labels[order[step]]).backward()
        optimizer.step()
        if step + 1 in measured:
            rows.append(_measure(model, data, step + 1))
            report(step + 1, rows[-1]["loss"])
    return model, [row for row in rows if math.isfinite(row["loss"])]


@torch.no_grad()
def _measure(model: MLP, data: tuple[Tensor, ...], step: int) -> dict:
    inputs, labels, held, held_labels = (part[:2048] for part in data)
    outputs = model(inputs)
    row = {"step": step, "loss": float(F.mse_loss(outputs, labels))}
    row["accuracy"] = float((outputs.argmax(1) == labels.argmax(1)).double().mean())
    row["held accuracy"] = float((model(held).argmax(1) == held_labels.argmax(1)).double().mean())
    sites = []
    for stream in model.streams(inputs):
        sites.append(Statistics((*_METERS.values(),)))
        sites[-1].add(stream)
    return row | {column: [site.summary()[meter] for site in sites] for column, meter in _METERS.items()}


def recall(task: Task) -> dict | None:
    """The record of a task, or None."""
    if record := train.store().find("mlp", differing(task)):
        warn_of_other_corpus(record, load(task.images)[2])
    return record


def perform(task: Task, report: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Train, measure and write the record; or recall it."""
    environment = params.environment() | {"corpus": load(task.images)[2]}
    return recall(task) or train.store().write("mlp", differing(task), {"rows": fit(task, report)[1]}, environment)


def run(scale: str, wanted: list[Task], workers: int | None = None) -> list[dict]:
    """The records of tasks of a scale, in order; what is missing is performed, see `pool.finish`.

    Raises:
        UserError: one is missing at scale paper, where there is no GPU.
    """
    here = scale if scale == "paper" else "small"  # at every other scale they are small
    sweep.require_machine("08_optimizers", here, wanted, recall)
    return pool.finish(perform, wanted, [0 if recall(one) else one.steps for one in wanted], workers)


def layers(scale: str, wanted: list[Task], workers: int | None = 0) -> pd.DataFrame:
    """One row per task, measurement and layer; what is missing is performed, see `run`.

    Returns:
        method; the fields of `Task`; step; `layer`, from 1 on, whose input it is, or `out` for what enters the head;
        `kurtosis` (neuron, less 1) and `rms correlation` (input) there; `loss`, `accuracy` and `held accuracy` of
        the model, see `fit`.
    """
    rows = []
    for task, record in zip(wanted, run(scale, wanted, workers), strict=True):
        about = {"method": task.method} | vars(task) | {"layer": [*map(str, range(1, task.layers + 1)), "out"]}
        rows += [about | entry for entry in record["result"]["rows"]]
    found = pd.DataFrame(rows).explode(["layer", *_METERS], ignore_index=True)
    return found.astype(dict.fromkeys(_METERS, float)).assign(kurtosis=lambda t: t["kurtosis"] - 1)


def table(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per run.

    Args:
        steps: from `layers`.

    Returns:
        method; optimizer; norm; lr; seed; `start`, `peak` and `end`: the largest kurtosis less 1 over the layers'
        inputs before training, over training and at its end; the largest `rms correlation` there over training; the
        last `step` with a finite loss, and `loss`, `accuracy` and `held accuracy` then.
    """
    about, model = ["method", "optimizer", "norm", "lr", "seed"], ["step", "loss", "accuracy", "held accuracy"]
    inner = steps[steps["layer"] != "out"].groupby([*about, *model], sort=False)[["kurtosis", "rms correlation"]]
    runs = inner.max().reset_index().groupby(about, sort=False)
    found = runs["kurtosis"].agg(start="first", peak="max", end="last")
    return found.join([runs["rms correlation"].max(), runs[model].last()]).reset_index()


def claims(runs: pd.DataFrame) -> list[tuple[str, str, pd.Series, str, bool]]:
    """What is judged: id of the claim, sentence, one value for each seed, the parameter that holds its margin, ratio.

    Of eps, the largest counts whose accuracy at the end, the mean over seeds, is at most 0.01 below that at 1e-8.

    Args:
        runs: from `table`, of `tasks`.
    """
    of = runs.pivot(index="seed", columns="method")
    peak, accuracy = of["peak"], of["accuracy"].mean()
    by_eps = [_ADAM, *map(f"{_ADAM}, eps {{:g}}".format, EPS[1:])]
    high = [one for one in by_eps if accuracy[one] >= accuracy[_ADAM] - 0.01][-1]
    growth, plain = peak / of["start"], f"{_ADAM}, not whitened"
    text = f"{_ADAM}: kurtosis - 1 rises to its peak by more with whitened images, by a factor of"
    return [
        ("he2024-mlp-adam", "Pre-SRMSNorm: Adam's peak over SGD's", peak[_ADAM] / peak[_SGD], "factor", True),
        ("he2024-mlp-sgd-falls", f"{_SGD}: start over end", of["start"][_SGD] / of["end"][_SGD], "higher", True),
        ("he2024-mlp-eps", f"{_ADAM}: its peak over that of {high}", peak[_ADAM] / peak[high], "higher", True),
        ("he2024-mlp-whitening", text, growth[_ADAM] / growth[plain], "higher", True),
    ]


@params.settings
class Command:
    """Flags of `python -m ofutils.studies.optimizers.mlp`."""

    images: str = "digits"
    steps: params.Natural = 0
    seeds: params.Count = 3
    workers: int = -1  # -1: one per core
    grid: bool = False


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    command = params.read(Command, arguments)
    scale = "small" if command.images == "digits" else "paper"
    wanted = grid_tasks() if command.grid else tasks(scale, command.images, command.seeds, command.steps)
    runs = table(layers(scale, wanted, None if command.workers < 0 else command.workers))
    print(runs.drop(columns=["optimizer", "norm"]).to_string(index=False, float_format="{:.3g}".format))
    print("records written to", train.store().export([*map(recall, wanted)], f"mlp.{scale}" + ".grid" * command.grid))


if __name__ == "__main__":
    params.main_guard(main)
