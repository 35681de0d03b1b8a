"""Outlier dimensions where there are no tokens: a model that hears a waveform, by the rule for LayerNorm parameters.

puccetti2022's code has wav2vec2 on TIMIT, and no numbers. The weights alone decide what its rule finds; what the
dimensions do is measured on a waveform that is made here and holds no recording.
"""

import math

import pandas as pd
import torch
from torch import Tensor

from ofutils import dims, families, hub, params, probes

STAND_IN = "stand-in/wav2vec2"  # random, of 4 blocks and width 64
RATE = 16_000  # samples a second
_SITES = ("resid_post", "norm2")


def waveform(rows: int = 4, seconds: float = 1.0, seed: int = 0) -> Tensor:
    """Something like voiced speech: (rows, samples), float32, mean 0 and variance 1 in each row.

    Harmonics of a gliding pitch, each as loud as three resonances let it be, in syllables, and a little noise.
    """
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE  # (S,)
    found = []
    for _ in range(rows):
        low, glide, beat = torch.rand(3, generator=draw).tolist()
        pitch = 90 + 120 * low + 30 * torch.sin(2 * math.pi * (0.5 + glide) * time)  # Hz
        phase = 2 * math.pi * pitch.cumsum(0) / RATE
        formants = torch.tensor([500.0, 1500.0, 2500.0]) * (0.8 + 0.4 * torch.rand(3, generator=draw))
        tones = torch.arange(1, 31)[:, None]  # (30, 1)
        loud = torch.exp(-(((tones * pitch)[..., None] - formants) / 150).square()).sum(-1)  # (30, S)
        voiced = (loud * torch.sin(tones * phase)).sum(0) * (
            0.5 + 0.5 * torch.sin(2 * math.pi * (3 + 2 * beat) * time)
        )
        noisy = voiced + 0.02 * torch.randn(len(time), generator=draw)
        found.append((noisy - noisy.mean()) / noisy.std())
    return torch.stack(found)


def model(name: str):
    """A model that hears a waveform, on this machine's device; of the name `STAND_IN` a random one."""
    if name != STAND_IN:
        return hub.model(name)
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    convolutions = {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        found = Wav2Vec2Model(Wav2Vec2Config(**shape, **convolutions))
    return found.to(params.device()).eval().requires_grad_(False)


def row(name: str, sigma: float = 3.0, layers: int = 4) -> dict:
    """Of one model what the rule for LayerNorm parameters finds, and what stands out on the waveform.

    Args:
        name: of `model`.
        sigma, layers: of `dims.by_weight`, at the LayerNorm after each MLP, as with the authors.

    Returns:
        model; blocks; width; `far in weight`, `far in bias`: how many dimensions lie beyond sigma in so many norms;
        `by the rule`; of the waveform `neuron kurtosis - 1` and `max-median ratio` (each in the block where it is
        largest, `resid_post`) and `largest`, the two dimensions with the largest |x| there.
    """
    sited = families.with_sites(model(name))
    found = probes.measure(sited, [{"input_values": waveform()}], _SITES)
    sums = [one for site, one in found.sites.items() if site.endswith("resid_post")]
    counted = {f"far in {kind}": int((count >= layers).sum()) for kind, count in dims.counts(sited, sigma).items()}
    shape = {"model": name.split("/")[-1], "blocks": len(sums), "width": sited.model.config.hidden_size}
    largest = dims.by_activation(probes.Measurement(found.loss, dict(enumerate(sums))))
    return (
        shape
        | counted
        | {
            "by the rule": dims.by_weight(sited, sigma, layers),
            "neuron kurtosis - 1": max(one.summary()["neuron_kurtosis"] for one in sums) - 1,
            "max-median ratio": max(one.summary()["max_median_ratio"] for one in sums),
            "largest": largest,
        }
    )


def table(names: tuple[str, ...]) -> pd.DataFrame:
    """`row` of each model, indexed by model."""
    return pd.DataFrame([row(name) for name in names]).set_index("model")
