"""What optimizers cost: one step of 6.9 M parameters, in forward and backward passes of 16 x 128 tokens.

    python benchmarks/optim.py          a table of ratios within this one run, goals met or missed

Ten steps a round and optimizer: the refresh of the eigenvectors, every tenth step, is one of them; the first step of
all, which initialises, is not counted. The peers are pytorch-optimizer's, where it is installed (`pip install -e
".[benchmarks]"`). Its Shampoo, which has another exponent and sums, finds no eigenvectors here after some steps. The
figure of SOAP's reference implementation is quoted in benchmarks/README.md.
"""

import importlib.util
import statistics
import time

import torch
from harness import THREADS, judge, medians, timed

from ofutils import optim
from ofutils.transformer import Transformer, TransformerConfig, clm_loss

ROUNDS, STEPS = 3, 10
OURS = ("adamw", "soap", "adafactor", "rotated_adafactor", "shampoo", "muon")
PEERS = ("soap", "adafactor")
GOALS = {"soap, mean of ten steps": 0.55, "soap, slowest step": 2.0}
GOALS |= {f"{name} / pytorch-optimizer": 1.0 for name in PEERS}
GOALS |= {f"{name} / soap": 1.1 for name in ("rotated_adafactor", "shampoo")}
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


def theirs(name: str, model: Transformer) -> torch.optim.Optimizer:
    """pytorch-optimizer's, told to leave the vocabulary side alone and to refresh every tenth step, as ours do."""
    import pytorch_optimizer as peers

    parts = optim.groups(model, DECAY)
    if name == "soap":
        shared = {"betas": BETAS, "weight_decay": DECAY}
        return peers.SOAP(parts, RATE, precondition_frequency=10, max_precondition_dim=2048, **shared)
    plain = {"scale_parameter": False, "relative_step": False, "momentum_dtype": torch.float32}
    return peers.AdaFactor(parts, RATE, betas=BETAS, weight_decay=DECAY, **plain)


def main() -> None:
    """Time the contenders in turn and print the table."""
    torch.set_num_threads(THREADS)
    makers = {name: lambda m, n=name: optim.make(n, m, RATE, BETAS, EPS, DECAY) for name in OURS}
    if importlib.util.find_spec("pytorch_optimizer"):
        makers |= {f"pytorch-optimizer's {name}": lambda m, n=name: theirs(n, m) for name in PEERS}
    else:
        print("pytorch-optimizer is not installed: its figures are those in benchmarks/README.md")
    contenders = {name: Contender(make) for name, make in makers.items()}
    times = timed(contenders, ROUNDS)
    passes = zip(*(by_round(one.passes) for one in contenders.values()), strict=True)
    times = {"canary": times["canary"], "forward and backward": [statistics.median(sum(p, [])) for p in passes]}
    for name, one in contenders.items():
        times[f"{name}, mean of ten steps"] = [statistics.mean(steps) for steps in by_round(one.steps)]
        times[f"{name}, slowest step"] = [max(steps) for steps in by_round(one.steps)]
    found = medians(times, "forward and backward")
    ratios = {f"soap, {what}": found[f"soap, {what}"] for what in ("mean of ten steps", "slowest step")}
    mean = {name: found[f"{name}, mean of ten steps"] for name in contenders}
    ratios |= {f"{name} / soap": mean[name] / mean["soap"] for name in ("rotated_adafactor", "shampoo")}
    for name in PEERS:
        if (peer := f"pytorch-optimizer's {name}") in contenders:
            ratios[f"{name} / pytorch-optimizer"] = mean[name] / mean[peer]
    judge(ratios, {name: goal for name, goal in GOALS.items() if name in ratios})


if __name__ == "__main__":
    main()
