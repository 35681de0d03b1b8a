"""One shape for every benchmark: contenders in turn, a canary beside them, and goals in ratios of this one run."""

import statistics
import time
from collections.abc import Callable

import torch

THREADS = 2
_SIDE = 2048  # of the canary's matrices


def timed(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    The rounds interleave all of them, so that a busy machine slows them alike; a first round, not counted, warms
    up. `canary`, a matrix product, shows how even the machine was.
    """
    torch.set_num_threads(THREADS)
    square = torch.randn(_SIDE, _SIDE)
    everyone = {"canary": lambda: square @ square, **contenders}
    times = {name: [] for name in everyone}
    for _ in range(rounds + 1):
        for name, contender in everyone.items():
            start = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in times.items()}


def medians(times: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Print the median of every contender, also in medians of `unit`; returns the latter."""
    shares = {name: statistics.median(found) / statistics.median(times[unit]) for name, found in times.items()}
    rounds = len(times["canary"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds, in units of: {unit}")
    for name, found in times.items():
        middle, spread = 1e3 * statistics.median(found), max(found) / min(found)
        print(f"{name:32} {middle:9.1f} ms {shares[name]:8.3f}, slowest / fastest {spread:.2f}")
    return shares


def judge(ratios: dict[str, float], goals: dict[str, float], at_least: tuple[str, ...] = ()) -> None:
    """Print each goal with met or missed; a goal is a largest value, or a smallest one for those in `at_least`."""
    for name, goal in goals.items():
        more = name in at_least
        met = ratios[name] >= goal if more else ratios[name] <= goal
        asked, said = f"at {'least' if more else 'most'} {goal}", "met" if met else "MISSED"
        print(f"{name}: {ratios[name]:.3f}, goal {asked}: {said}")
