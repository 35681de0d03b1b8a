"""Makes `int8.safetensors`: the logits of a toy model whose matrices torchao multiplies in int8.

pip install --no-deps --target /tmp/peer torchao==0.18.0
PYTHONPATH=.:/tmp/peer python tests/data/int8.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ofutils import quant, quantizers
from ofutils.quant import QuantSettings
from ofutils.transformer import Transformer, TransformerConfig

SHAPE = TransformerConfig(vocab=40, layers=2, width=16, heads=2, context=12, init_std=0.2)
SETTINGS = {
    "token, channel": QuantSettings(weights="minmax", granularity="token", weight_granularity="channel"),
    "token": QuantSettings(granularity="token", margin=0),
    "tensor, channel": QuantSettings(weights="minmax", weight_granularity="channel"),
    "tensor": QuantSettings(weights="minmax"),
}


def main() -> None:
    """Write the file: state, ids of three batches, and by setting the logits of the last batch."""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    for table in (model.token_embedding.weight, model.position_embedding.weight):
        table.data = quantizers.fake_quantize(table.data)  # on their grids, where the simulation rounds them
    ids = torch.randint(0, SHAPE.vocab, (3, 2, 12))
    found = {f"state.{name}": tensor for name, tensor in model.state_dict().items()} | {"ids": ids}
    with torch.no_grad():
        for name, settings in SETTINGS.items():
            found[name] = quant.int8(model, settings, ids)(ids[-1])
    save_file(found, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
