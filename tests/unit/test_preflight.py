"""What the notebooks would load, and whether a Hub has it."""

import subprocess
import sys

import pytest
import transformers

from ofutils import UserError, hub, params, preflight, sources
from ofutils.studies.bert_outliers import tasks
from tests import stand_ins

BERT, PYTHIA, GLUE = "google-bert/bert-base-uncased", "EleutherAI/pythia-70m", "nyu-mll/glue"


@pytest.fixture
def complete(served, tmp_path, monkeypatch):
    """A Hub that has all that scale `paper` loads, by name; the packaged MiniLM is not here."""
    monkeypatch.setattr(hub, "find_minilm", lambda: None)
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (whole / file).write_text(file * 100_000)
    for name, revision, file in preflight.wanted("paper"):
        if file:
            table = tmp_path / "tables" / name / file
            table.parent.mkdir(parents=True)
            table.write_text(file)
            served.add(name, tmp_path / "tables" / name, revision, "datasets")
        else:
            served.add(name, whole, revision)
    return served


def printed(capsys, *arguments):
    """The lines of a preflight, and the last one if it fails."""
    failed = None
    try:
        preflight.main([*arguments])
    except UserError as error:
        failed = str(error)
        assert "\n" not in failed and "huggingface.co" not in failed
    return capsys.readouterr().out.splitlines(), failed


# --- what is wanted


def test_everything_of_scale_paper_is_wanted_once():
    wanted = [*preflight.wanted("paper")]
    models = [(name, revision) for name, revision, file in wanted if not file]
    steps = {f"step{step}" for step in (0, *(2**k for k in range(10)), *(1000 * 2**k for k in range(8)), 143000)}
    for size in ("70m", "160m", "410m"):
        assert {revision for name, revision in models if name == f"EleutherAI/pythia-{size}"} == steps
    others = {name for name, revision in models if revision == "main"}
    assert others == {
        *(BERT, "FacebookAI/roberta-base", hub.MINILM),
        *("openai-community/gpt2", "google/vit-base-patch16-224-in21k"),
        *("google/vit-base-patch16-224", "facebook/deit-small-patch16-224"),
    }
    tables = {(name, file) for name, _, file in wanted if file}
    of_tasks = {(task, split) for task, one in tasks.TASKS.items() for split in ("train", *one.splits)}
    of_glue = {(GLUE, f"{task}/{split}/0000.parquet") for task, split in of_tasks if task != "docstrings"}
    wikitext = {
        ("Salesforce/wikitext", f"wikitext-2-raw-v1/{split}/0000.parquet") for split in ("test", "validation")
    }
    assert tables == of_glue | wikitext and len(wanted) == len(models) + len(tables) == 60 + 7 + 17 + 2


def test_a_tokenizer_is_wanted_where_one_is_read():
    wanted = preflight.wanted("paper")
    assert [name for (name, _, _), tokenizer in wanted.items() if tokenizer] == [
        *(BERT, PYTHIA, "EleutherAI/pythia-160m", "EleutherAI/pythia-410m", "FacebookAI/roberta-base")
    ]
    assert wanted["FacebookAI/roberta-base", "main", ""] and not preflight.wanted("paper", "02_bert_outliers").get(
        ("FacebookAI/roberta-base", "main", "")
    )


def test_a_notebook_a_scale_and_a_model_choose():
    assert [*preflight.wanted("paper", "03_quant")] == [(BERT, "main", "")]
    assert [*preflight.wanted("small")] == [(hub.MINILM, "main", "")] and not preflight.wanted("tiny")
    assert {name for name, _, _ in preflight.wanted("paper", "01_pythia_kurtosis", "some/model")} == {
        *("some/model", "Salesforce/wikitext")
    }
    with pytest.raises(UserError, match="unknown notebook '03_quants' .did you mean '03_quant'"):
        preflight.wanted("paper", "03_quants")
    with pytest.raises(UserError, match="01_pythia_kurtosis at scale tiny loads no model, got 'some/model'"):
        sources.read("01_pythia_kurtosis", "tiny", "some/model")


def test_all_of_it_has_a_stand_in():
    for name, revision, file in preflight.wanted("paper"):
        if file:
            assert file.removesuffix("/0000.parquet") in stand_ins.DATASETS[name]()
        else:
            assert revision in dict(stand_ins.MODELS[name].seeds)


# --- against a Hub


def test_what_is_there_is_listed_without_being_fetched(complete, capsys, tmp_path):
    lines, failed = printed(capsys)
    assert failed is None and len(lines) == 87
    assert f"{BERT}, revision main: safetensors, 4.2 MB, not cached" in lines
    assert f"{PYTHIA}, revision step4: safetensors, 2.8 MB, not cached" in lines  # no tokenizer is read there
    assert lines[-1].startswith("86 of 86 are there, 0.19 GB, 0.00 GB of them cached")
    assert all(path.startswith("api/") for _, path, _ in complete.asked) and not (tmp_path / "home").exists()
    of_revisions = [path for _, path, _ in complete.asked if "/revision/" in path]
    assert len(of_revisions) == 60 + 7 + 2  # one each, whatever is read of it


def without(file, revision="main"):
    return lambda served, name: served.repositories["models", name][revision].pop(file)


TAKEN = {
    "weights": (BERT, without("model.safetensors"), "main has no weights as safetensors or pytorch_model.bin"),
    "a configuration": (BERT, without("config.json"), "main has no config.json"),
    "a tokenizer": (BERT, without("tokenizer.json"), "main has no tokenizer"),
    "a step's weights": (PYTHIA, without("model.safetensors", "step64"), "step64 has no weights"),
    "a revision": (
        PYTHIA,
        lambda served, name: served.repositories["models", name].pop("step4"),
        f"{PYTHIA}: the Hub has this model, but no revision 'step4'",
    ),
    "a model": (
        "openai-community/gpt2",
        lambda served, name: served.repositories.pop(("models", name)),
        "the Hub has no such model, or it is private",
    ),
    "a table": (
        GLUE,
        lambda served, name: served.repositories["datasets", name][hub.CONVERTED].pop("cola/train/0000.parquet"),
        "has no cola/train/0000.parquet",
    ),
    "a right": (
        "FacebookAI/roberta-base",
        lambda served, name: served.gated.add(name),
        "is gated: accept its terms on the Hub",
    ),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_what_was_taken_away_is_named(taken, complete, capsys):
    name, take, message = TAKEN[taken]
    take(complete, name)
    lines, failed = printed(capsys)
    (missing,) = [line for line in lines if line.startswith("missing: ")]
    assert name in missing and message in missing
    assert failed == f"1 of 86 are missing, e.g. {missing.removeprefix('missing: ')}"
    assert lines[-1].startswith("85 of 86 are there")


def test_a_data_set_that_is_gone_is_named_by_each_of_its_files(complete, capsys):
    complete.repositories.pop(("datasets", GLUE))
    lines, failed = printed(capsys, "--notebook", "02_bert_outliers")
    assert len([line for line in lines if line.startswith(f"missing: {GLUE}") and "no such data set" in line]) == 17
    assert failed.startswith("17 of 22 are missing")


def test_a_hub_that_fails_is_one_line_each(complete, capsys):
    complete.wrong = (500, None)
    lines, failed = printed(capsys, "--notebook", "03_quant")
    assert f"{BERT}, revision main cannot be fetched" in failed and "the Hub says 500" in failed


@pytest.mark.parametrize("form", ["safetensors", "safetensors sharded", "bin", "bin sharded"])
def test_form_size_and_what_is_cached_are_those_of_loading(form, served, tmp_path, capsys):
    made = stand_ins.saved(tmp_path / "made", transformers.OPTForCausalLM, stand_ins.OPT, form)
    (made / "tokenizer.json").write_text("{}" * 50_000)
    (made / "tf_model.h5").write_text("of another library" * 50_000)
    size = sum(
        path.stat().st_size for path in made.iterdir() if path.suffix != ".h5" and "generation" not in path.name
    )
    served.add("some/model", made)
    asked = ("--notebook", "03_quant", "--model", "some/model")
    line = f"some/model, revision main: {form.split()[0]}, {size / 1e6:,.1f} MB"
    assert printed(capsys, *asked)[0][0] == f"{line}, not cached"
    hub.model("some/model")
    capsys.readouterr()
    assert printed(capsys, *asked)[0][0] == f"{line}, {(size - 100_000) / 1e6:,.1f} MB of them cached"
    with pytest.raises(UserError, match="tokenizer"):
        hub.tokenizer("some/model")
    assert printed(capsys, *asked) == ([f"{line}, cached", "1 of 1 are there, 0.00 GB, 0.00 GB of them cached"], None)
    if "sharded" in form:
        shards = sorted(file for file in served.repositories["models", "some/model"]["main"] if "-of-" in file)
        served.repositories["models", "some/model"]["main"].pop(shards[1])
        assert f"({len(shards) - 1} of {len(shards)})" in printed(capsys, *asked)[1]


def test_the_command_exits_with_1_and_one_line(complete, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def run(endpoint, *arguments):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        command = [sys.executable, "-m", "ofutils.preflight", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=params.root())

    there = run(complete.endpoint, "--notebook", "01_pythia_kurtosis")
    assert there.returncode == 0 and not there.stderr and len(there.stdout.splitlines()) == 62
    away = run("http://127.0.0.1:9", "--notebook=01_pythia_kurtosis")  # where nothing answers
    assert away.returncode == 1
    assert away.stdout.splitlines() == [
        "the Hub does not answer: only what is in its cache can be loaded",
        "0 of 61 are there, 0.00 GB, 0.00 GB of them cached",
    ]
    assert away.stderr.startswith(f"error: 61 of 61 are missing, e.g. {PYTHIA}, revision step0 is not in the cache")
    assert away.stderr.count("\n") == 1 and "the Hub does not answer" in away.stderr


def test_offline_what_is_in_the_cache_is_listed(tmp_path, served, monkeypatch, capsys):
    from huggingface_hub import constants

    stand_ins.build(tmp_path / "home", [BERT])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lines, failed = printed(capsys, "--notebook", "03_quant")
    assert failed is None and lines[0].startswith(f"{BERT}, revision main: safetensors") and "MB, cached" in lines[0]
    (weights,) = (tmp_path / "home").rglob("model.safetensors")
    weights.unlink()
    assert "1 of 1 are missing" in printed(capsys, "--notebook", "03_quant")[1]
    assert not served.asked
