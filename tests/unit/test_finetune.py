"""Tasks and fine-tuning: metrics in closed form, data, a planted task that is learnt, what a finished run gives."""

import itertools
import math
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from huggingface_hub import constants
from pyarrow import parquet
from transformers import TrainingArguments
from transformers.utils import logging

from ofutils import UserError, dims, hub, probes, train
from ofutils.studies.bert_outliers import finetune, tasks
from ofutils.studies.bert_outliers.finetune import FinetuneConfig
from tests import stand_ins

GLUE_TASKS = [name for name in tasks.TASKS if name != "docstrings"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder whose label says which of two words a text has; rows sorted by label, one of them without any."""
    folder, draw = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    for split, count in (("train", 160), ("validation", 80)):
        lines = ["sentence\tlabel", 'a "quoted\t']
        for row in range(count):
            word, label = ("xx", "no") if row < count // 2 else ("yy", "yes")
            words = [word, *draw.choice(list("abcdefg"), draw.integers(1, 7))]
            lines.append(f"{' '.join(draw.permutation(words))}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write(folder, head, *rows, **others):
    """A folder with these lines as training and as validation data, which `validation=[...]` replaces."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(others.get(split, [head, *rows])) + "\n")
    return folder


def config_of(folder, **more):
    given = {"model": hub.STAND_IN, "task": str(folder), "lr": 5e-3, "batch": 8, "epochs": 2, "longest": 24}
    return FinetuneConfig(**given | more)


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    """A finished run, and where it lies."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OFUTILS_OUT", str(tmp_path_factory.mktemp("out")))
    yield finetune.finetune(config_of(planted))
    patch.undo()


@pytest.fixture
def glue(tmp_path_factory, monkeypatch):
    """GLUE's stand-ins in the cache, and no Hub."""
    home = tmp_path_factory.getbasetemp() / "glue"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(stand_ins.build(home, [tasks.GLUE]) / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._why_offline.cache_clear()
    yield
    hub._why_offline.cache_clear()


def one_line(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(run):
    model, _ = run.load()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# --- metrics


def test_matthews_is_the_formula_of_the_four_counts():
    matthews = tasks.METRICS["mcc"]
    tp, tn, fp, fn = 6, 3, 2, 1
    predicted, true = np.repeat([1, 0, 1, 0], [tp, tn, fp, fn]), np.repeat([1, 0, 0, 1], [tp, tn, fp, fn])
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predicted, true) == pytest.approx(expected)
    assert matthews(true, true) == pytest.approx(1) and matthews(1 - true, true) == pytest.approx(-1)
    assert matthews(np.ones(12), true) == 0 == matthews(true, np.zeros(12))
    assert tasks.accuracy(predicted, true) == 9 / 12


def test_pearson_ignores_scale_and_is_zero_where_it_is_not_defined():
    assert tasks.pearson(np.array([0, 1, 2]), np.array([0, 0, 3])) == pytest.approx(3 / math.sqrt(12))
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=50), draw.normal(size=50)
    assert tasks.pearson(3 * a - 7, b) == pytest.approx(tasks.pearson(a, b)) == pytest.approx(-tasks.pearson(-a, b))
    assert tasks.pearson(np.full(50, 0.1), b) == 0
    assert tasks.pearson(np.where(a > 0, a, np.nan), b) == 0 == tasks.pearson(np.where(a > 0, a, np.inf), b)


# --- data


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_glue_is_read_from_the_cache(name, glue):
    task = tasks.TASKS[name]
    for split in ("train", *task.splits):
        texts, labels = tasks.examples(name, split)
        assert len(texts) == len(labels) == 24 and {len(row) for row in texts} == {len(task.keys)}
        assert all(isinstance(text, str) and text for row in texts for text in row)
        some, few = tasks.examples(name, split, 6)
        there = list(zip(texts, labels, strict=True))
        assert len(some) == 6 and all(one in there for one in zip(some, few, strict=True))
        if task.labels > 1:
            assert set(labels) == set(range(task.labels))
        else:
            assert max(labels) == 5 and len(set(labels)) > 5
    assert "'test'; known: train, validation" in one_line(tasks.examples, name, "test")


def test_a_real_task_of_glue_that_is_not_in_the_cache_is_one_line(tmp_path, glue, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "file rte/train/0000.parquet is not in the cache" in one_line(tasks.examples, "rte", "train")


def test_docstrings_are_balanced_and_share_no_text_between_splits():
    train_texts, labels = tasks.examples("docstrings", "train", 400)
    assert sum(labels) == 200 and labels[:4] == [1, 0, 1, 0]
    true = [text for text, label in zip(train_texts, labels, strict=True) if label]
    false = [text for text, label in zip(train_texts, labels, strict=True) if not label]
    assert not set(true) & set(false) and [s for s, _ in true] == [s for s, _ in false]
    assert len({code for _, code in true}) == len({sentence for sentence, _ in true}) == 200
    held, held_labels = tasks.examples("docstrings", "validation")
    assert len(held) == 500 and sum(held_labels) == 250
    assert not {text for row in train_texts for text in row} & {text for row in held for text in row}
    assert tasks.examples("docstrings", "train", 2)[1] == [1, 0]
    assert tasks.examples("docstrings", "validation", 30) == (held[:30], held_labels[:30])


def test_a_folder_is_a_task(planted, tmp_path):
    task = tasks.read_task(str(planted))
    assert task == tasks.Task(("sentence",), 2, "accuracy", ("validation",))
    texts, labels = tasks.examples(str(planted), "train")
    assert len(texts) == 160 and labels == [0] * 80 + [1] * 80
    assert all(("yy" in text) == bool(label) for (text,), label in zip(texts, labels, strict=True))
    assert 5 < sum(tasks.examples(str(planted), "train", 20)[1]) < 15  # not the first 20
    pairs = {"question": ["why", "who"], "sentence": ["no", "42"], "label": [0.5, 3.0]}
    for split in ("train", "validation"):
        parquet.write_table(pyarrow.table(pairs), tmp_path / f"{split}.parquet")
    assert tasks.read_task(str(tmp_path)) == tasks.Task(("question", "sentence"), 1, "pearson")
    assert tasks.examples(str(tmp_path), "validation") == ([("why", "no"), ("who", "42")], [0.5, 3.0])


def test_numbers_and_commas_in_a_csv_stay_text(tmp_path):
    rows = 'sentence1,sentence2,label\n2020-01-01,"a, b",7\n17,"say ""no""",3\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(rows)
    assert tasks.examples(str(tmp_path), "train") == ([("2020-01-01", "a, b"), ("17", 'say "no"')], [1, 0])
    (tmp_path / "validation.csv").write_text(rows + "a,b,5\n")
    assert "has the label '5', which the training data lack" in one_line(tasks.examples, str(tmp_path), "validation")


def test_what_cannot_be_a_task_is_one_line(tmp_path, planted, out):
    assert "did you mean 'mnli'?" in one_line(tasks.examples, "mnil", "train")
    assert "unknown task ''" in one_line(finetune.finetune, FinetuneConfig(hub.STAND_IN, ""))
    assert "the folder has no train.parquet or train.tsv or train.csv" in one_line(tasks.read_task, str(tmp_path))
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,0\n")
    assert "it has text, label" in one_line(tasks.read_task, str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "is not readable as .parquet" in one_line(tasks.read_task, str(tmp_path))
    assert "did you mean 'validation'?" in one_line(tasks.examples, str(planted), "valid")
    assert "has 1 labelled rows" in one_line(tasks.examples, str(planted), "train", 1)
    many = ({"rows": -1}, {"batch": 0}, {"epochs": 0}, {"longest": 0}, {"seed": -1}, {"seed": 2**32})
    for bad in (*many, *({name: value} for name in ("lr", "weight_decay") for value in (math.inf, math.nan, -1.0))):
        assert next(iter(bad)) in one_line(FinetuneConfig, **bad)
    assert not list(out.rglob("runs/*"))


def test_training_data_of_one_class_are_refused(tmp_path, out):
    one = write(tmp_path / "one", "sentence,label", "a,7", "b,7", "c,")
    for refused in (lambda: tasks.read_task(str(one)), lambda: finetune.finetune(config_of(one))):
        assert "the training data have the label 7 alone" in one_line(refused)
    none = write(tmp_path / "none", "sentence,label", "a,", "b,")
    assert "the training data have no label" in one_line(tasks.read_task, str(none))
    rare = write(tmp_path / "rare", "sentence,label", *(f"a{row},{int(row == 0)}" for row in range(50)))
    assert "all 2 training rows have the label 0" in one_line(finetune.finetune, config_of(rare, rows=2))
    assert not (out / "runs").exists()


def test_minus_one_is_a_label_in_a_folder_and_none_in_glue(tmp_path, monkeypatch):
    folder = str(write(tmp_path, "sentence,label", "a,-1", "b,1", "c,", "d,0", "e,-1"))
    assert tasks.read_task(folder).labels == 3
    assert tasks.examples(folder, "train") == ([("a",), ("b",), ("d",), ("e",)], [0, 2, 1, 0])
    numbers = write(tmp_path / "numbers", "sentence,label", "a,-1.0", "b,0.5", "c,")
    assert tasks.examples(str(numbers), "train")[1] == [-1.0, 0.5]
    table = pyarrow.table({"sentence": ["a", "b", "c"], "label": [0, -1, 1]})
    monkeypatch.setattr(tasks, "_table", lambda *_: table)
    assert tasks.examples("sst2", "train") == ([("a",), ("c",)], [0, 1])


def test_labels_that_one_split_spells_as_numbers_are_the_same(tmp_path):
    validation = ["sentence,label", "a,1", "b,0"]
    folder = write(tmp_path, "sentence,label", "a,0", "b,1", "c,maybe", validation=validation)
    assert tasks.examples(str(folder), "train")[1] == [0, 1, 2]  # the column is text
    assert tasks.examples(str(folder), "validation")[1] == [1, 0]  # and here a number


@pytest.mark.parametrize(
    "train_lines, validation_lines, expected",
    [
        (["sentence,label"], ["sentence,label", "a,1", "b,0"], "the training data have no label"),
        (["sentence,label", "a,1", "b,0"], ["sentence,label"], "split validation has 0 labelled rows"),
        (["sentence,label,label", "a,1,1", "b,0,0"], None, "split train has the column label more than once"),
        (
            ["sentence,label", "a,1", "b,0"],
            ["sentence,sentence,label", "a,a,1", "b,b,0"],
            "split validation has the column sentence more than once",
        ),
        (["sentence,label", "a,1.5", "b,0.5"], ["sentence,label", "a,good", "b,bad"], "has the label 'good'"),
        (["sentence,label", "a,1.5", "b,0.5"], ["sentence,label", "a,inf", "b,1"], "has the label inf"),
        (
            ["sentence1,sentence2,label", "a,b,1", "c,d,0"],
            ["sentence,label", "a,1", "b,0"],
            "split validation needs the columns label and sentence1 and sentence2; it has sentence, label",
        ),
        (
            ["sentence,label", "a,1", "b,0"],
            ["sentence1,sentence2,label", "a,b,1", "c,d,0"],
            "split validation needs the columns label and sentence; it has sentence1, sentence2, label",
        ),
    ],
)
def test_bad_tables_are_one_line_before_any_training(train_lines, validation_lines, expected, tmp_path, out):
    folder = write(tmp_path, *train_lines, validation=validation_lines or train_lines)
    assert expected in one_line(finetune.finetune, config_of(folder))
    assert not (out / "runs").exists()


def test_a_missing_text_is_refused_with_its_row_and_not_read_as_none(tmp_path):
    for split in ("train", "validation"):
        rows = {"sentence": [None, "a", "b", None], "label": [None, 1, 0, 1]}
        parquet.write_table(pyarrow.table(rows), tmp_path / f"{split}.parquet")
    assert "row 4 of split train has a label and no text" in one_line(tasks.examples, str(tmp_path), "train")


def test_the_columns_of_the_training_data_are_those_of_all_splits(tmp_path):
    more = ["sentence1,sentence2,sentence,label", "a,b,c,1", "d,e,f,0"]
    folder = write(tmp_path, "sentence,label", "a,1", "b,0", validation=more)
    assert tasks.examples(str(folder), "validation")[0] == [("c",), ("f",)]


# --- fine-tuning


def test_a_planted_task_is_learnt_and_the_best_epoch_kept(finished):
    run, folder = finished, train.store().local / finished.config.name
    first = [one["validation"] for one in run.scores]
    assert len(first) == 2 and first[run.best] == max(first) > 0.9
    model, tokenizer = run.load()
    again = finetune.score(model, tokenizer, run.config.task, "validation", longest=run.config.longest)
    assert again == first[run.best]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}  # no pickle
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_the_weights_are_those_of_the_best_epoch_the_first_of_equals(planted, out, monkeypatch):
    states, given = [], iter([0.5, 0.7, 0.7, 0.1])

    def score(model, *_):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(given)

    monkeypatch.setattr(finetune, "score", score)
    run = finetune.finetune(config_of(planted, rows=16, epochs=4))
    kept = weights(run)
    assert run.best == 1 and [one["validation"] for one in run.scores] == [0.5, 0.7, 0.7, 0.1]
    assert [equal(kept, state) for state in states] == [False, True, False, False]


def test_the_seed_decides_the_weights_and_nothing_is_printed_but_one_line(planted, tmp_path, monkeypatch, capfd):
    runs, before = [], torch.get_rng_state()
    for place, seed in (("one", 1), ("two", 1), ("three", 2)):
        monkeypatch.setenv("OFUTILS_OUT", str(tmp_path / place))
        run = finetune.finetune(config_of(planted, seed=seed, rows=32, epochs=2))
        runs.append((weights(run), run.scores, run.config.name))
        printed = capfd.readouterr()
        assert printed.err == "" and printed.out.count("\n") == 1 and "32 rows, 2 epochs" in printed.out
        torch.rand(3) if place == "two" else None  # what happens outside has no influence
    assert equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert not equal(runs[0][0], runs[2][0]) and runs[0][2] != runs[2][2]
    torch.set_rng_state(before)
    finetune.finetune(config_of(planted, seed=2, rows=32, epochs=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr().out.endswith(": loaded\n")


def test_a_folder_has_one_run_however_its_path_is_spelled(finished, planted, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(planted)
    monkeypatch.chdir(planted.parent)
    spelled = [planted.name, f"./{planted.name}/", f"../{planted.parent.name}/{planted.name}", str(tmp_path / "link")]
    monkeypatch.setenv("HOME", str(planted.parent))
    for path in (*spelled, f"~/{planted.name}"):
        config = config_of(path)
        assert config.task == path and config.name == finished.config.name
        assert finetune.find(config).record == finished.record
    assert FinetuneConfig(task="cola").key == {"task": "cola"} and FinetuneConfig().key == {}


def test_data_that_have_changed_are_said_with_the_way_out(tmp_path, out, capsys):
    write(tmp_path / "own", "sentence,label", "a,1", "b,0")
    config = config_of(tmp_path / "own", epochs=1)
    finetune.finetune(config)
    assert finetune.find(config) and "other data" not in capsys.readouterr().out
    write(tmp_path / "own", "sentence,label", "a,1", "b,0", "c,1")
    assert finetune.finetune(config).scores
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and f"{tmp_path / 'own'} holds other data now" in lines[0]
    assert "finetune(config, again=True) trains anew" in lines[0]
    finetune.finetune(config, again=True)
    assert finetune.find(config) and "other data" not in capsys.readouterr().out


def test_a_finished_run_is_loaded_and_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(finetune, "_train", lambda *_: pytest.fail("trained again"))
    run = finetune.finetune(finished.config)
    assert run == finished and equal(weights(run), weights(finished))


def test_a_run_that_breaks_off_leaves_nothing_behind(planted, out, monkeypatch):
    def broken(config, model, tokenizer, rows, watch):
        watch.on_epoch_end(None, None, None)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "_train", broken)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(config_of(planted, rows=16))
    assert not list((out / "runs").iterdir())
    monkeypatch.setattr(finetune, "_train", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in one_line(finetune.finetune, config_of(planted, rows=16))
    assert not list((out / "runs").iterdir())


def test_a_tokenizer_that_cannot_be_written_is_one_line(planted, out, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(hub.tokenizer(hub.STAND_IN)), "save_pretrained", full)
    line = one_line(finetune.finetune, config_of(planted, rows=16, epochs=1))
    assert "cannot write into" in line and "No space left on device" in line
    assert not list((out / "runs").iterdir())


KILLED = """
import os, signal
from ofutils.studies.bert_outliers import finetune

def killed(config, model, tokenizer, rows, watch):
    watch.on_epoch_end(None, None, None)
    os.kill(os.getpid(), signal.SIGKILL)

finetune._train = killed
finetune.finetune(finetune.{config!r})
"""


def test_what_a_killed_process_left_goes_with_the_next_training_of_its_run(planted, out):
    config, runs = config_of(planted, rows=16, epochs=1), out / "runs"
    code = KILLED.format(config=config)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = runs.iterdir()
    gone = left.name.split(".")[-2]
    assert left.name.startswith(f".{config.name}.") and (left / "best" / "model.safetensors").is_file()
    assert finetune.find(config) is None
    here = platform.node()
    others = {
        f".{config.name}.{here}.{os.getpid()}.abc",  # a process that lives
        f".{config.name}.{here}-2.{gone}.abc",  # another machine's
        f".finetune-0123456789ab.{here}.{gone}.abc",  # another run's
    }
    for name in others:
        (runs / name).mkdir()
    run = finetune.finetune(config)
    assert {path.name for path in runs.iterdir()} == others | {config.name, "records"}
    assert weights(run)


def test_training_again_replaces_the_weights(planted, out):
    config = config_of(planted, rows=16, epochs=1)
    first, folder = finetune.finetune(config), out / "runs" / config.name
    kept = weights(first)
    (folder / "stray").write_text("not of this run")
    (folder / "model.safetensors").write_bytes(b"broken")
    again = finetune.finetune(config, again=True)
    assert equal(kept, weights(again)) and again.scores == first.scores
    assert not (folder / "stray").exists() and {path.name for path in folder.parent.iterdir()} == {
        config.name,
        "records",
    }


@pytest.mark.parametrize("theirs", [True, False])
def test_a_run_that_another_process_finishes_meanwhile_is_kept(theirs, planted, out, monkeypatch):
    config, rename = config_of(planted, rows=16, epochs=1), Path.rename
    first, folder = finetune.finetune(config), out / "runs" / config.name

    def slow(self, target):
        rename(self, target)
        if target.name == "old":  # between the two steps
            folder.mkdir()
            (folder / ("model.safetensors" if theirs else "something else")).write_text("theirs")

    monkeypatch.setattr(Path, "rename", slow)
    if theirs:
        assert finetune.finetune(config, again=True).scores == first.scores
        assert (folder / "model.safetensors").read_text() == "theirs"
    else:
        assert "cannot write into" in one_line(finetune.finetune, config, again=True)
    assert {path.name for path in folder.parent.iterdir()} == {config.name, "records"}


def test_a_download_shows_its_progress_and_the_training_does_not(planted, out, monkeypatch):
    seen, load, training = {}, hub.model, finetune._train

    def watched(name, function):
        def inner(*arguments):
            seen[name] = logging.is_progress_bar_enabled()
            return function(*arguments)

        return inner

    monkeypatch.setattr(hub, "model", watched("model", load))
    monkeypatch.setattr(finetune, "_train", watched("training", training))
    finetune.finetune(config_of(planted, rows=16, epochs=1))
    assert seen == {"model": True, "training": False}


def test_several_gpus_change_neither_loss_nor_batch(planted, tmp_path, monkeypatch):
    found, rows = [], []
    for gpus in (1, 2):
        monkeypatch.setenv("OFUTILS_OUT", str(tmp_path / str(gpus)))
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _, gpus=gpus: gpus))
        settings = finetune._OneDevice(str(tmp_path), per_device_train_batch_size=5, use_cpu=True)
        rows.append(settings.train_batch_size)
        found.append(weights(finetune.finetune(config_of(planted, rows=16, epochs=1, batch=5))))
    assert equal(*found) and rows == [5, 5]
    assert TrainingArguments(str(tmp_path), per_device_train_batch_size=5, use_cpu=True).train_batch_size == 10


def test_weights_that_are_not_here_or_broken_are_one_line(planted, out):
    run = finetune.finetune(config_of(planted, rows=16, epochs=1))
    path = out / "runs" / run.config.name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "are not readable" in one_line(run.load)
    path.unlink()
    assert "its weights are not" in one_line(finetune.finetune(run.config).load)
    kept = weights(finetune.finetune(run.config, again=True))
    assert path.is_file() and kept


def test_the_encoder_is_the_pretrained_one_and_the_head_is_new():
    pretrained, found = hub.model(hub.STAND_IN), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(finetune.with_new_head(hub.STAND_IN, 3))
    for model in found:
        assert equal(pretrained.state_dict(), model.bert.state_dict())
        assert model.classifier.weight.shape == (3, 32) and all(p.requires_grad for p in model.parameters())
    heads = [model.classifier.weight for model in found]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind, labels", [("regression", 3), ("single_label_classification", 1)])
def test_the_loss_is_that_of_the_new_head_and_not_the_checkpoints(kind, labels, monkeypatch):
    pretrained = hub.model(hub.STAND_IN)
    pretrained.config.problem_type = kind
    monkeypatch.setattr(hub, "model", lambda _: pretrained)
    model, given = finetune.with_new_head(hub.STAND_IN, labels).eval(), torch.tensor([0, 0])
    given = given.float() if labels == 1 else given
    out = model(torch.tensor([[2, 7, 3], [2, 9, 3]], device=model.device), labels=given.to(model.device))
    expected = out.logits.squeeze().square().mean() if labels == 1 else -out.logits.log_softmax(1)[:, 0].mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("task, frame", [("sst2", 2), ("rte", 3)])
def test_rows_are_cut_to_the_longest_or_refused(task, frame, glue, out):
    tokenizer, texts = hub.tokenizer(hub.STAND_IN), tasks.examples(task, "train")[0]
    for longest in (frame + 1, frame + 2):
        assert {len(row["input_ids"]) for row in finetune._encode(tokenizer, texts, longest)} == {longest}
    for longest in (1, frame):
        config = FinetuneConfig(hub.STAND_IN, task, longest=longest)
        assert f"longest must be above {frame}" in one_line(finetune.finetune, config)
    assert not (out / "runs").exists()


# --- scores


@pytest.fixture
def answering(monkeypatch):
    """Scores given logits as if a model had answered them, on given labels; all texts are equally long."""

    def scored(task, logits, labels, **options):
        rest, width = iter(torch.as_tensor(logits, dtype=torch.float32)), len(tasks.TASKS[task].keys)
        texts = [("a",) * width] * len(labels)
        monkeypatch.setattr(finetune, "examples", lambda *_: (texts, labels))
        monkeypatch.setattr(probes, "run", lambda _, batch: torch.stack([next(rest) for _ in batch["input_ids"]]))
        return finetune.score(torch.nn.Identity(), hub.tokenizer(hub.STAND_IN), task, "train", **options)

    return scored


def test_a_prediction_that_is_not_finite_is_the_wrong_class(answering):
    true, answers = [0, 0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1, 0, 1]
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 2).float()
    assert answering("cola", logits, true) == pytest.approx(tasks.METRICS["mcc"](np.array(answers), np.array(true)))
    for places in itertools.combinations(range(8), 2):
        broken, wrong = logits.clone(), np.array(answers)
        broken[places[0], 0], broken[places[1], 1] = math.nan, math.inf
        wrong[list(places)] = 1 - np.array(true)[list(places)]
        assert answering("cola", broken, true, batch=3) == pytest.approx(tasks.METRICS["mcc"](wrong, np.array(true)))
        assert answering("sst2", broken, true, batch=3) == np.mean(wrong == true)
    three = torch.eye(3)
    assert answering("mnli", three, [0, 1, 2]) == 1
    three[2, 2] = math.nan
    assert answering("mnli", three, [0, 1, 2]) == pytest.approx(2 / 3)
    numbers = torch.tensor([[1.0], [2.0], [4.0]])
    assert answering("stsb", numbers, [1.0, 2.0, 4.0]) == pytest.approx(1)
    numbers[1] = math.nan
    assert answering("stsb", numbers, [1.0, 2.0, 4.0]) == -1


@pytest.mark.parametrize(
    "task, labels", [("cola", [0, 1, 1, 0]), ("sst2", [0, 1, 1, 0]), ("stsb", [0.0, 1.0, 2.0, 5.0])]
)
def test_a_diverged_epoch_is_never_the_best(task, labels, answering, monkeypatch):
    classes = tasks.TASKS[task].labels
    worst = -torch.tensor(labels)[:, None] if classes == 1 else 1 - torch.nn.functional.one_hot(torch.tensor(labels))
    for finite in (worst, torch.zeros(4, classes)):
        scores = [answering(task, logits, labels) for logits in (finite, torch.full((4, classes), math.nan))]
        assert scores[1] == {"cola": -1, "sst2": 0, "stsb": -1}[task] <= scores[0] + 1e-12
        assert finetune._best([{"validation": round(one, 12)} for one in scores]) == 0


def test_padding_and_batches_do_not_change_scores(finished):
    model, tokenizer = finished.load()
    texts, _ = tasks.examples(finished.config.task, "validation")
    short, long = min(texts, key=lambda row: len(row[0])), max(texts, key=lambda row: len(row[0]))
    together = tokenizer([short[0], long[0]], padding=True, return_tensors="pt")
    alone = tokenizer([short[0]], return_tensors="pt")
    assert together["input_ids"].shape[1] > alone["input_ids"].shape[1]
    torch.testing.assert_close(probes.run(model, dict(together))[:1], probes.run(model, dict(alone)))
    asked = (model, tokenizer, finished.config.task, "validation")
    assert len({finetune.score(*asked, batch=batch) for batch in (1, 7, 80)}) == 1
    assert "batch must be at least 1, got 0" in one_line(finetune.score, *asked, batch=0)


def test_a_score_is_the_metric_of_the_models_own_answers(finished, monkeypatch):
    model, tokenizer = finished.load()
    texts, labels = tasks.examples(finished.config.task, "validation", 30)
    answers = [int(probes.run(model, dict(tokenizer([text], return_tensors="pt"))).argmax()) for (text,) in texts]
    expected = np.mean(np.array(answers) == labels)
    assert finetune.score(model, tokenizer, finished.config.task, "validation", 30) == expected
    with torch.no_grad():
        model.model.classifier.bias.fill_(float("nan"))
    assert finetune.score(model, tokenizer, finished.config.task, "validation", 30) == 0
    monkeypatch.setattr(finetune, "examples", lambda *_: ([("a", "b"), ("c", "d")], [0, 1]))
    assert "has 2 classes, task mnli 3" in one_line(finetune.score, model, tokenizer, "mnli", "train")


def test_ablation_zeroes_exactly_its_parameters_and_restores_to_the_bit(finished):
    model, tokenizer = finished.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = (model, tokenizer, finished.config.task, "validation")
    whole = finetune.score(*asked)
    with dims.ablated(model, [3, 7]) as count:
        changed = {name: tensor != before[name] for name, tensor in model.state_dict().items()}
        touched = {name for name, where in changed.items() if where.any()}
        assert count == 2 * 2 * 2 and touched <= {
            f"model.bert.encoder.layer.{layer}.output.LayerNorm.{kind}"
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
        assert all(set(changed[name].nonzero().flatten().tolist()) == {3, 7} for name in touched)
    with dims.ablated(model, range(32)):
        assert finetune.score(*asked) < whole  # every text looks the same
    assert equal(before, model.state_dict()) and finetune.score(*asked) == whole


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_tasks_of_glue_are_trained_and_scored_on_all_their_splits(name, glue, out):
    run = finetune.finetune(FinetuneConfig(hub.STAND_IN, name, rows=12, batch=4, epochs=1, lr=1e-3, longest=32))
    task = tasks.TASKS[name]
    assert run.best == 0 and tuple(run.scores[0]) == task.splits
    model, tokenizer = run.load()
    for split in task.splits:
        assert finetune.score(model, tokenizer, name, split, 12, 32) == run.scores[0][split]
    batch = tokenizer(*zip(*tasks.examples(name, "train", 2)[0], strict=True), padding=True, return_tensors="pt")
    assert probes.run(model, dict(batch)).shape == (2, task.labels)


def test_a_model_that_cannot_pad_is_refused(glue, out, monkeypatch):
    tokenizer = hub.tokenizer(hub.STAND_IN)
    tokenizer.pad_token = None
    monkeypatch.setattr(hub, "tokenizer", lambda _: tokenizer)
    assert "no token to pad with" in one_line(finetune.finetune, FinetuneConfig(hub.STAND_IN, "rte"))
