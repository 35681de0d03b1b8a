"""Shared by the unit tests: the vectors, a small corpus, a run of a second."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from ofutils import hub
from ofutils.train import TrainConfig
from tests import loopback
from tests.configurations import SMALL

DATA = Path(__file__).parents[1] / "data"


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


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not asked for the Hub yet."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._why_offline.cache_clear()
    yield
    hub._why_offline.cache_clear()


@pytest.fixture
def served(fresh, tmp_path, monkeypatch):
    """A Hub that answers, with nothing in it, and an empty cache in `tmp_path`."""
    with loopback.serve() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        address = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield found
