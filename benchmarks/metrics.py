"""What measuring costs: every block of a 6-layer, width-768 model, in its forward passes.

    python benchmarks/metrics.py        a table of ratios within this one run, goals met or missed; and the memory

Seven residual streams of (8, 512, 768) are measured.

    cheap               neuron kurtosis and inf norm
    full                every meter
    peer: whole         every hidden state kept, the input Gram as an N x N matrix, as he2024's code computes it

Memory is the peak resident size beyond that of a forward pass, each in a process of its own.
"""

import resource
import subprocess
import sys

import torch
from harness import THREADS, judge, medians, timed

from ofutils import metrics, probes
from ofutils.streaming import METERS, Statistics
from ofutils.transformer import Transformer, TransformerConfig

ROUNDS = 7
SITES = ["resid_pre", "blocks.5.resid_post"]
CHEAP = ("neuron_kurtosis", "inf_norm")
GOALS = {"cheap": 0.015, "full": 0.17, "full / peer": 0.25}


def build() -> tuple[Transformer, torch.Tensor]:
    """The model and one batch of ids (8, 512)."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab=1000, layers=6, width=768, heads=12, context=512)).eval()
    return model, torch.randint(0, 1000, (8, 512))


def stream(streams: list[torch.Tensor], meters: tuple[str, ...]) -> list[dict]:
    """Every stream through `Statistics`."""
    found = []
    for x in streams:
        one = Statistics(meters)
        one.add(x)
        found.append(one.summary())
    return found


def whole(streams: list[torch.Tensor]) -> list[dict]:
    """The same metrics, each from the whole tensor in float32, without shared sums."""
    found = []
    for x in streams:
        tokens, rows = x.flatten(0, 1), x.flatten(1)
        squares = tokens.square().mean(0)
        scaled = tokens / squares.mean().sqrt()
        inputs, features = scaled @ scaled.T / x.shape[-1], scaled.T @ scaled / len(tokens)  # (N, N), (D, D)
        directions = torch.nn.functional.normalize(tokens, dim=-1)
        size = tokens.abs()
        ratios = size.amax(1) / size.median(1).values
        far = (rows - rows.mean(1, keepdim=True)).abs() > 6 * rows.std(1, keepdim=True)
        found.append(
            {
                "neuron kurtosis": squares.square().mean() / squares.mean().square(),
                "logged kurtosis": metrics.centred(scaled).square().mean(0).var(),
                "input correlation": (off_diagonal(inputs), off_diagonal(inputs.square()).sqrt()),
                "feature correlation": off_diagonal(features.square()).sqrt(),
                "anisotropy": off_diagonal(directions @ directions.T),
                "max-median ratio": (ratios.mean(), ratios.max()),
                "kurtosis": [(t - t.mean(1, keepdim=True)).pow(4).mean(1) / t.std(1) ** 4 for t in (rows, tokens)],
                "outliers": (far.view(x.shape).sum((0, 1)), far.view(x.shape).sum((0, 2))),
                "inf norm": rows.abs().amax(1).mean(),
            }
        )
    return found


def off_diagonal(gram: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of two different things."""
    return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))


def run_once(what: str) -> None:
    """One contender once, with the model's forward pass: what the memory is measured on."""
    model, ids = build()
    with torch.no_grad():
        if what == "forward":
            model(ids)
        elif what == "peer: whole":
            with probes.capture(model, SITES) as kept:
                model(ids)
            whole(list(kept.values()))
        else:
            batches = [ids] * (4 if what == "full, 4 batches" else 1)
            probes.measure(model, batches, SITES, meters=CHEAP if what == "cheap" else tuple(METERS))


def peak_memory(what: str) -> float:
    """Peak resident size of `run_once` in a process of its own, MB."""
    command = [sys.executable, __file__, "--once", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


@torch.no_grad()
def main() -> None:
    """Time the contenders in turn and print the table."""
    memory = {name: peak_memory(name) for name in ("forward", "cheap", "full", "full, 4 batches", "peer: whole")}
    model, ids = build()
    with probes.capture(model, SITES) as kept:
        model(ids)
    streams = list(kept.values())
    contenders = {
        "forward": lambda: model(ids),
        "cheap": lambda: stream(streams, CHEAP),
        "full": lambda: stream(streams, tuple(METERS)),
        "peer: whole": lambda: whole(streams),
    }
    found = medians(timed(contenders, ROUNDS), "forward")
    for name in list(memory)[1:]:
        print(f"{name:32} {memory[name] - memory['forward']:+9.0f} MB beside a forward pass")
    judge(found | {"full / peer": found["full"] / found["peer: whole"]}, GOALS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        torch.set_num_threads(THREADS)
        run_once(sys.argv[2])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KB on Linux
    else:
        main()
