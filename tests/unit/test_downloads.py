"""The way from a Hub into the cache: what is asked for, what breaks off, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants, file_download

from ofutils import hub
from tests import stand_ins
from tests.stand_ins import one_line

ID = "some/model"


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint in one of the forms of `stand_ins.saved`; returns its folder."""
    return lambda form="safetensors", name="made": stand_ins.saved(
        tmp_path / name, transformers.OPTForCausalLM, stand_ins.OPT, form
    )


@pytest.fixture
def cached(tmp_path):
    """What is in the cache: the names of files, by links that are whole."""
    return lambda: sorted(path.name for path in (tmp_path / "home").rglob("snapshots/*/*") if path.is_file())


def offline(monkeypatch):
    hub._why_offline.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


FORMS = {
    "safetensors": ["config.json", "model.safetensors"],
    "safetensors sharded": ["config.json", "model-0000N", "model.safetensors.index.json"],
    "bin": ["config.json", "pytorch_model.bin"],
    "bin sharded": ["config.json", "pytorch_model-0000N", "pytorch_model.bin.index.json"],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fetched_once_and_loads_again_without_the_hub(form, served, checkpoint, cached, monkeypatch):
    served.add(ID, checkpoint(form))
    model = hub.model(ID, head="lm")
    kept = cached()
    names = [one.partition("-of-")[0] for one in kept]
    assert sorted({name[:-1] + "N" if name[-1].isdigit() else name for name in names}) == FORMS[form]
    assert len(kept) > 3 or "sharded" not in form
    asked = len(served.asked)
    assert hub.model(ID, head="lm").config.commit == model.config.commit
    assert not [path for how, path, _ in served.asked[asked:] if how == "GET" and not path.startswith("api/")]
    offline(monkeypatch)
    asked = len(served.asked)
    again = hub.model(ID, head="lm")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(served.asked) == asked


def test_pickled_weights_are_not_fetched_where_there_are_others(served, checkpoint, cached):
    made = checkpoint()
    (made / "pytorch_model.bin").write_bytes((checkpoint("bin", "other") / "pytorch_model.bin").read_bytes())
    (made / "tf_model.h5").write_bytes(b"of another library")
    (made / "modeling.py").write_text("1 / 0")
    served.add(ID, made)
    hub.model(ID)
    assert cached() == ["config.json", "model.safetensors"]
    assert not served.given("pytorch_model.bin") and not served.given("modeling.py")


def test_a_tokenizer_is_fetched_without_weights(served, tmp_path, cached):
    served.add_cache(stand_ins.build(tmp_path / "stand-ins", ["openai-community/gpt2"]))
    assert hub.tokenizer("openai-community/gpt2")("a").input_ids
    assert "tokenizer.json" in cached() and "model.safetensors" not in cached()


def test_a_table_is_fetched_by_its_own(served, tmp_path, cached):
    served.add_cache(stand_ins.build(tmp_path / "stand-ins", ["Salesforce/wikitext"]))
    path = hub.text("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")
    assert path.is_file() and len([*(tmp_path / "home").rglob("*.parquet")]) == 1
    wanted = "file wikitext-2-raw-v1/train/0000.parquet: the Hub has this data set, but not the file"
    assert wanted in one_line(hub.text, "Salesforce/wikitext", "wikitext-2-raw-v1", "train")
    assert "the Hub has no such data set" in one_line(hub.text, "some/texts", "part")


def test_a_repository_without_weights_is_told_apart(served, checkpoint):
    made = checkpoint()
    (made / "model.safetensors").rename(made / "flax_model.msgpack")
    served.add(ID, made)
    assert f"{ID}, revision main has no weights as safetensors or pytorch_model.bin" in one_line(hub.model, ID)
    assert f"{ID}, revision main has no tokenizer" in one_line(hub.tokenizer, ID)


def test_what_the_hub_does_not_have_or_give_is_told_apart(served, checkpoint, cached):
    served.add(ID, checkpoint())
    assert f"{ID}: the Hub has this model, but no revision 'step3'" in one_line(hub.model, ID, "step3")
    assert "some/other, revision main: the Hub has no such model, or it is" in one_line(hub.model, "some/other")
    served.gated.add(ID)
    assert f"{ID}, revision main is gated: accept its terms on the Hub" in one_line(hub.model, ID)
    assert cached() == []
    served.wrong = (401, "GatedRepo")  # without a name and password
    assert f"{ID}, revision main is gated" in one_line(hub.model, ID)
    served.wrong = (500, None)
    assert f"{ID}, revision main is not in the cache" in one_line(hub.model, ID)
    assert "the Hub does not answer as it should" in one_line(hub.model, ID)


# --- what breaks off, and what is other than announced


@pytest.fixture
def impatient(monkeypatch):
    """Pieces of a kilobyte, and no time between two attempts."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


WEIGHTS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


@pytest.mark.parametrize("form", WEIGHTS)
def test_a_download_that_breaks_off_goes_on_where_it_was(form, served, checkpoint, impatient):
    served.add(ID, checkpoint(form))
    served.cuts[WEIGHTS[form]] = [20_500]
    model = hub.model(ID, head="lm")
    assert served.given(WEIGHTS[form]) == ["", "bytes=20000-"]
    served.add("the/same", checkpoint("safetensors", "again"))
    assert torch.equal(model.lm_head.weight, hub.model("the/same", head="lm").lm_head.weight)


@pytest.mark.parametrize("form", [*WEIGHTS, "safetensors sharded"])
def test_a_download_that_stops_leaves_nothing_and_succeeds_when_asked_again(
    form, served, checkpoint, impatient, tmp_path, cached, monkeypatch
):
    made = checkpoint(form)
    served.add(ID, made)
    file = WEIGHTS.get(form) or sorted(path.name for path in made.glob("model-*"))[1]
    served.cuts[file] = [3_500, *[0] * 20]
    assert f"{ID}, revision main cannot be fetched into" in one_line(hub.model, ID, head="lm")
    assert file not in cached()
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    whole = {path.name for path in (tmp_path / "home").rglob("blobs/*")}
    with monkeypatch.context() as alone:
        offline(alone)
        assert "not complete in" in one_line(hub.model, ID, head="lm")
    hub._why_offline.cache_clear()
    served.cuts.clear()
    asked = len(served.asked)
    assert hub.model(ID, head="lm").lm_head.weight.isfinite().all()
    again = {path.rpartition("/")[2] for how, path, _ in served.asked[asked:] if how == "GET"}
    assert not whole & again  # what was whole is not fetched a second time


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("change", ["shorter", "longer", "other"])
def test_a_file_that_is_not_what_was_announced_is_refused_until_it_is(
    change, form, served, checkpoint, impatient, cached
):
    made, file = checkpoint(form), WEIGHTS[form]
    content = (made / file).read_bytes()
    served.add(ID, made)
    other = content[:-300] + bytes([content[-300] ^ 1]) + content[-299:]
    served.served_instead[file] = {"shorter": content[:-400], "longer": content + b"more", "other": other}[change]
    for _ in range(2):
        text = one_line(hub.model, ID, head="lm")
        if change == "other":
            assert f"{file} is not what it should be: sha256" in text and "fetched again" in text
        else:
            assert "cannot be fetched into" in text and file not in cached()
    served.served_instead.clear()
    for path in Path(constants.HF_HUB_CACHE).rglob(file):  # as the line said
        path.resolve().unlink()
        path.unlink()
    assert hub.model(ID, head="lm").lm_head.weight.isfinite().all()


# --- as a process that is told of its Hub by the environment


def test_a_process_finds_its_hub_and_does_without_it(served, checkpoint, tmp_path, monkeypatch):
    served.add(ID, checkpoint("bin"))
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    code = f"from ofutils import hub; hub.model('{ID}', head='lm'); print(repr(hub._why_offline()))"

    def lines():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    taken = f"{ID}, revision main: no safetensors, so the tensors of pytorch_model.bin are taken"
    assert lines() == [taken, "''"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    offline = "the Hub does not answer: only what is in its cache can be loaded"
    assert lines() == [offline, taken, "'the Hub does not answer'"]
