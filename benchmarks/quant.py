"""What quantization costs: a model of 4 layers and width 256 on batches of 16 x 128, in its forward passes.

    python benchmarks/quant.py          a table of ratios within this one run, goals met or missed

Peers are what a user would write, at the same sites: torch's own fake quantization, a plain divide, round, clamp,
multiply, percentiles by numpy, and the search of weight ranges as the papers' code does it. The released code of
bondarenko2023 itself does not run on today's transformers; its figures are quoted in benchmarks/README.md.
"""

import copy
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from harness import THREADS, judge, medians, timed

from ofutils import probes, quant, quantizers
from ofutils.quant import QuantSettings
from ofutils.transformer import Transformer, TransformerConfig

ROUNDS, TABLE_ROUNDS, EACH = 7, 3, 8  # batches of a contender in one round
CALIBRATION, EVALUATION = 16, 32
PERCENTILE = QuantSettings(margin=0, percentile=99.999)
SETTINGS = (
    QuantSettings(weights="minmax"),
    PERCENTILE,
    replace(PERCENTILE, weight_bits=6),
    replace(PERCENTILE, weight_bits=4),
    replace(PERCENTILE, weight_bits=6, activation_bits=6),
)
GOALS = {
    "quantized forward": 1.10,
    "calibration, percentile": 1.2,
    "mse ranges of the weights": 4,
    "five settings, papers' way": 270,
    "five settings, float": 200,
}


def rounding(model: Transformer, ranges: quant.Ranges, how: str) -> dict:
    """Functions that round activations at their sites, as a peer does it."""
    functions = {}
    for site in (site for site in model.sites() if site in ranges):
        grid = quantizers.make_grid(*ranges[site], 8, "asymmetric").plain()
        scale, low, high = float(grid.scale), grid.low, grid.high
        functions[site] = {
            "torch": lambda x, s=scale, lo=low: torch.fake_quantize_per_tensor_affine(x, s, -lo, 0, 255),
            "plain": lambda x, s=scale, lo=low, hi=high: (x / s).round_().clamp_(lo, hi).mul_(s),
        }[how]
    return functions


def numpy_percentiles(x: torch.Tensor) -> torch.Tensor:
    """A calibrating site with percentiles by numpy; rounds as `plain`."""
    low, high = map(float, np.percentile(x.numpy(), (0.001, 99.999)))
    scale = (max(high, 0) - min(low, 0)) / 255
    zero = round(-min(low, 0) / scale)
    return (x / scale).round_().clamp_(-zero, 255 - zero).mul_(scale)


def plain_search(model: Transformer) -> None:
    """100 thresholds for every weight, each tried on all of it, as the papers' code does."""
    tables = [model.token_embedding.weight, model.position_embedding.weight]
    for weight in [*quant._weights(model).values(), *tables]:
        largest = float(weight.abs().max())
        for k in range(1, 101):
            scale = k * largest / 100 / 127
            float(((weight / scale).round_().clamp_(-128, 127).mul_(scale) - weight).square().sum())


def main() -> None:
    """Time the contenders in turn and print the table."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab=4096, layers=4, width=256, heads=4, context=128)).eval()
    batches = torch.randint(0, 4096, (EVALUATION, 16, 128)).unbind()
    few = batches[:EACH]
    ranges = quant.calibrate(model, few, PERCENTILE)
    searched = [*quant._weights(model), *quant._embeddings(model)]
    weights = {name: ranges[name] for name in searched}
    sites = [site for site in model.sites() if site in ranges and site not in weights]

    def forward(one):
        for batch in few:
            one(batch)

    with torch.no_grad(), ExitStack() as stack:

        def hooked(functions):
            own = copy.deepcopy(model)
            stack.enter_context(probes.hooked(own, functions))
            return lambda: forward(own)

        ours = copy.deepcopy(model)
        stack.enter_context(quant.quantized(ours, PERCENTILE, ranges))
        contenders = {
            "forward": lambda: forward(model),
            "quantized forward": lambda: forward(ours),
            "  peer: torch.fake_quantize": hooked(rounding(model, ranges, "torch")),
            "  peer: plain": hooked(rounding(model, ranges, "plain")),
            "calibration, min-max": lambda: quant.calibrate(model, few, SETTINGS[0], weights),
            "calibration, percentile": lambda: quant.calibrate(model, few, PERCENTILE, weights),
            "  peer: numpy.percentile": hooked(dict.fromkeys(sites, numpy_percentiles)),
            "mse ranges of the weights": lambda: quant._weight_ranges(model, PERCENTILE),
            "  peer: each on all of it": lambda: plain_search(model),
        }
        times = timed(contenders, ROUNDS)
        for name in contenders:
            if "ranges" not in name and "each" not in name:
                times[name] = [seconds / EACH for seconds in times[name]]
        ratios = medians(times, "forward")

        def table(calibration):
            def score():
                for batch in batches:
                    model(batch)

            return lambda: quant.table(model, SETTINGS, batches[:CALIBRATION], score, calibration)

        tables = {"five settings, papers' way": "quantized", "five settings, float": "float"}
        times = timed(
            {"forward": lambda: forward(model)} | {n: table(how) for n, how in tables.items()}, TABLE_ROUNDS
        )
        times["forward"] = [seconds / EACH for seconds in times["forward"]]
        ratios |= {name: found for name, found in medians(times, "forward").items() if name in tables}
    judge(ratios, GOALS)


if __name__ == "__main__":
    main()
