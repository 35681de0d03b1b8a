"""What SOAP costs: one step of 6.9 M parameters, in forward and backward passes of 16 x 128 tokens.

    python benchmarks/optim.py          a table of ratios within this one run, goals met or missed

Ten steps a round and optimizer: the refresh of the eigenvectors, every tenth step, is one of them; the first step of
all, which initialises, is not counted. The peer is pytorch-optimizer's SOAP where it is installed (`pip install -e
".[benchmarks]"`); the figure of the reference implementation is quoted in benchmarks/README.md.
"""

import importlib.util
import statistics
import time

import torch
from harness import THREADS, judge, medians, timed

from ofutils import optim
from ofutils.transformer import Transformer, TransformerConfig, clm_loss

ROUNDS, STEPS = 3, 10
GOALS = {"SOAP, mean of ten steps": 0.55, "SOAP, slowest step": 2.0, "SOAP / pytorch-optimizer": 1.0}
RATE, BETAS, EPS, DECAY = 1e-3, (0.95, 0.95), 1e-8, 0.1


class Contender:
    """A model of its own with an optimizer; what its steps cost is kept apart from forward and backward."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.model = Transformer(TransformerConfig(vocab=8192, layers=6, width=256, heads=4, context=128))
        self.optimizer, self.rows = make(self.model), torch.randint(0, 8192, (STEPS, 16, 128))
        self.passes, self.steps = [], []
        self.one(self.rows[0])  # the step that initialises
        self.passes, self.steps = [], []

    def one(self, batch: torch.Tensor) -> None:
        """Forward, backward and one step."""
        start = time.perf_counter()
        clm_loss(self.model(batch), batch).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.steps.append(time.perf_counter() - middle)
        self.passes.append(middle - start)
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        for batch in self.rows:
            self.one(batch)


def by_round(times: list[float]) -> list[list[float]]:
    """The times of each round; the first one, which warms up, is left out."""
    return [times[start : start + STEPS] for start in range(STEPS, len(times), STEPS)]


def theirs(model: Transformer) -> torch.optim.Optimizer:
    """pytorch-optimizer's SOAP, told to leave the vocabulary side alone as ours does."""
    from pytorch_optimizer import SOAP

    return SOAP(
        optim.groups(model, DECAY),
        lr=RATE,
        betas=BETAS,
        weight_decay=DECAY,
        precondition_frequency=10,
        max_precondition_dim=2048,
    )


def main() -> None:
    """Time the contenders in turn and print the table."""
    torch.set_num_threads(THREADS)
    makers = {name: lambda m, n=name: optim.make(n, m, RATE, BETAS, EPS, DECAY) for name in ("adamw", "soap")}
    if importlib.util.find_spec("pytorch_optimizer"):
        makers["pytorch-optimizer"] = theirs
    else:
        print("pytorch-optimizer is not installed: its figure is the one in benchmarks/README.md")
    contenders = {name: Contender(make) for name, make in makers.items()}
    times = timed(contenders, ROUNDS)
    passes = zip(*(by_round(one.passes) for one in contenders.values()), strict=True)
    times = {"canary": times["canary"], "forward and backward": [statistics.median(sum(p, [])) for p in passes]}
    for name, one in contenders.items():
        times[f"{name}, mean of ten steps"] = [statistics.mean(steps) for steps in by_round(one.steps)]
        times[f"{name}, slowest step"] = [max(steps) for steps in by_round(one.steps)]
    found = medians(times, "forward and backward")
    ratios = {f"SOAP, {what}": found[f"soap, {what}"] for what in ("mean of ten steps", "slowest step")}
    if "pytorch-optimizer" in contenders:
        both = (found[f"{name}, mean of ten steps"] for name in ("soap", "pytorch-optimizer"))
        ratios["SOAP / pytorch-optimizer"] = next(both) / next(both)
    judge(ratios, {name: goal for name, goal in GOALS.items() if name in ratios})


if __name__ == "__main__":
    main()
