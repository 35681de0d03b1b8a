"""Shared by the unit tests: the vectors, a small corpus, and small configurations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ofutils.train import TrainConfig
from ofutils.transformer import TransformerConfig

DATA = Path(__file__).parents[1] / "data"
SMALL = TransformerConfig(vocab=300, layers=2, width=16, heads=2, context=16)
METHODS = {
    "vanilla": {},
    "clipped": {"alpha": 2.0},
    "linear gate": {"gate": "linear", "pi_init": 0.25},
    "mlp gate": {"gate": "mlp"},
    "all heads gate": {"gate": "all_heads"},
    "OP layernorm": {"norm": "none", "qk_norm": "layernorm", "residual_gain": 0.2, "final_norm": False},
    "OP rmsnorm": {"norm": "none", "qk_norm": "rmsnorm", "residual_gain": 0.2, "final_norm": False},
    "post": {"norm_position": "post"},
    "narrow": {"embed_width": 8},
    "dropout": {"dropout": 0.1},
}


@pytest.fixture(scope="session")
def vectors():
    """name -> (tensors, description) of a file of tests/data."""

    def read(name):
        described = DATA / f"{name}.json"
        tensors = load_file(DATA / f"{name}.safetensors")
        return tensors, json.loads(described.read_text()) if described.is_file() else {}

    return read


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output folder of this test's own."""
    monkeypatch.setenv("OFUTILS_OUT", str(tmp_path))
    return tmp_path


@pytest.fixture
def corpus(tmp_path):
    """A folder of text: 40 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        text = " ".join(f"word{(index * 7 + k * k) % 50} of document {index}" for k in range(60))
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture
def config(corpus):
    """A run of a second."""
    return TrainConfig(
        model=SMALL, corpus=str(corpus), batch=4, steps=20, warmup=4, lr=1e-2, measure_every=5, eval_batches=2
    )
