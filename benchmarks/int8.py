"""What int8 costs on this CPU: matrices multiplied by torchao in int8, simulated, and in float32.

    python benchmarks/int8.py          a table of ratios within this one run

A forward pass of 2 layers of width 512 on 8 x 128 tokens, most of it matrix products; nothing is compiled. The last
two lines are a product alone. torchao is needed (`pip install -e ".[int8]" -c constraints.txt`); its own `quantize_`,
which takes symmetric activations, is the peer. There is no goal: torchao, not this project, multiplies.
"""

import copy
import importlib.util
from contextlib import ExitStack
from dataclasses import replace

import torch
from harness import THREADS, medians, timed
from torch import nn

from ofutils import quant
from ofutils.quant import QuantSettings
from ofutils.transformer import Transformer, TransformerConfig

ROUNDS = 7
TOKEN = QuantSettings(weights="minmax", granularity="token", weight_granularity="channel")
TENSOR = replace(TOKEN, granularity="tensor")


def main() -> None:
    """Time the contenders in turn and print the table."""
    if not importlib.util.find_spec("torchao"):
        raise SystemExit('torchao is not installed: pip install -e ".[int8]" -c constraints.txt')
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab=256, layers=2, width=512, heads=8, context=128)).eval()
    batches = torch.randint(0, 256, (3, 8, 128))
    theirs = copy.deepcopy(model)
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(theirs, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    models = {"forward": model, "  peer: torchao.quantize_": theirs}
    models |= {f"int8, per {one.granularity}": quant.int8(model, one, batches) for one in (TOKEN, TENSOR)}
    with torch.no_grad(), ExitStack() as stack:
        for one in (TOKEN, TENSOR):
            own = models[f"simulated, per {one.granularity}"] = copy.deepcopy(model)
            stack.enter_context(quant.quantized(own, one, quant.calibrate(own, batches, one)))
        contenders = {name: lambda own=own: own(batches[0]) for name, own in models.items()}
        rows, matrix = torch.randn(8 * 128, 1024), torch.randn(4096, 1024)
        narrow, few = (50 * rows).to(torch.int8), (50 * matrix).to(torch.int8)
        contenders["one product, float32"] = lambda: rows @ matrix.T
        contenders["one product, int8"] = lambda: torch._int_mm(narrow, few.T)
        medians(timed(contenders, ROUNDS), "forward")


if __name__ == "__main__":
    main()
