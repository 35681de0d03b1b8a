"""Makes `peers.safetensors`: what pytorch-optimizer's optimizers do with the gradients of `gradients`.

pip install --no-deps --target /tmp/peer pytorch-optimizer==4.1.0
PYTHONPATH=/tmp/peer python tests/data/peers.py
"""

from functools import partial
from pathlib import Path

import torch
from pytorch_optimizer import SOAP, AdaFactor, Muon, ScalableShampoo
from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting
from safetensors.torch import save_file

BETA2 = 1 - 2**-20  # AdaFactor's running mean over all steps, which is a moving average of endless memory


def gradients(steps: int = 12, beta2: float = 0.9) -> torch.Tensor:
    """Random 6 x 6 gradients after a first one whose singular vectors are the eigenvectors of what follows.

    So the bases found at the first step are those of L and R after the last one.
    """
    later = torch.randn(steps, 6, 6, dtype=torch.float64)
    weights = beta2 ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    left, right = (
        torch.linalg.eigh(torch.einsum(f"t,{f}->ij", weights, later, later))[1] for f in ("tik,tjk", "tki,tkj")
    )
    first = left @ torch.diag(torch.arange(1.0, 7, dtype=torch.float64)) @ right.T
    return torch.cat([first[None], later])


def path(make, grads: torch.Tensor) -> torch.Tensor:
    """(steps, 6, 6): the parameter after each step, from zero on."""
    weight, found = torch.nn.Parameter(torch.zeros_like(grads[0])), []
    optimizer = make([weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    grads = gradients()
    rank1 = {"betas": (None, BETA2), "decay_rate": -1.0, "clip_threshold": 1e9, "eps1": 0.0}
    plain = {"relative_step": False, "scale_parameter": False, "momentum_dtype": torch.float64}
    root = {"inverse_exponent_override": 2, "start_preconditioning_step": 1, "preconditioning_compute_steps": 1}
    exact = {
        "graft_type": LayerWiseGrafting.NONE,
        "matrix_eps": 0.0,
        "use_svd": True,
        "nesterov": False,
        "shape_interpretation": False,
    }
    muon = partial(Muon, lr=1.0, momentum=0.9, use_adjusted_lr=True)
    makers = {
        "adafactor": partial(AdaFactor, lr=1.0, **rank1, **plain),
        "shampoo": partial(ScalableShampoo, lr=1.0, betas=(0.0, 0.9), **root, **exact),
        "muon": lambda params: muon([{"params": params, "use_muon": True}]),
        "soap": partial(SOAP, lr=1.0, betas=(0.8, 0.9), weight_decay=0.0, precondition_frequency=4),
    }
    found = {name: path(make, grads) for name, make in makers.items()}
    save_file({"gradients": grads} | found, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
