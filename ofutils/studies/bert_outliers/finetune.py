"""Fine-tuning: a pre-trained encoder learns a task of sentences or sentence pairs, and is scored.

    finetune(config)                      the finished run of a configuration, trained where there is none yet
    finetune(config).load()               its best weights, with sites, for `dims.ablated` and `probes`
    score(model, tokenizer, task, split)  the task's metric on a split, e.g. while dimensions are switched off

Tasks are those of `tasks`. The recipe is that of puccetti2022's code: AdamW at 2e-5 with linear decay and no
warm-up, batches of 32, 4 epochs, weight decay 0.01, by transformers' `Trainer`, whose defaults are theirs in the
rest (gradients clipped at norm 1). Everything is in float32. After each epoch the model is scored on the
validation data, and the weights of the best epoch are kept.

A defect that is theirs and stays: the best epoch is chosen by the data on which its score is then reported,
which flatters it. The scores of all epochs are kept, so that best minus last can be shown.

Departures: a batch is padded to its longest row and not to 256 tokens (the mask hides padding, so that scores are the
same); the head and the order of rows have several seeds, theirs is 42 alone. Of several GPUs one trains.
"""

import os
import platform
import random
import shutil
import tempfile
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from ofutils import UserError, families, hub, params, probes
from ofutils.records import differing, digest, warn_of_other_corpus
from ofutils.studies.bert_outliers.tasks import METRICS, examples, find_folder, read_task, sha256
from ofutils.train import store


@params.settings
class FinetuneConfig:
    """All that decides the numbers of a run. Its name is the hash of what differs from the defaults."""

    model: str = "google-bert/bert-base-uncased"  # see hub.model
    task: str = "mnli"  # a name of TASKS, or the path of a folder, see `examples`
    rows: params.Natural = 0  # of training data, and at most as many of each scored split; 0: all
    seed: Annotated[int, "at least 0", "below 4294967296"] = 1  # of the new head, the order of the rows, and dropout
    lr: params.Positive = 2e-5
    batch: params.Count = 32
    epochs: params.Count = 4
    weight_decay: params.NotNegative = 0.01
    longest: params.Count = 256  # tokens of a row, special ones too; the longer text of a pair is cut first

    @property
    def key(self) -> dict:
        """What identifies the run: the fields that differ from their defaults, a folder by its absolute path."""
        folder = find_folder(self.task)
        return differing(self) | ({"task": str(folder)} if folder else {})

    @property
    def name(self) -> str:
        """The run's name, the same on every machine where the task is no folder."""
        return digest("finetune", self.key)

    def __str__(self) -> str:
        return f"{self.name}: {self.model} on {self.task}, seed {self.seed}"


def _encode(tokenizer, texts: list[tuple[str, ...]], longest: int) -> list[dict]:
    longest, frame = min(longest, tokenizer.model_max_length), tokenizer.num_special_tokens_to_add(len(texts[0]) == 2)
    params.require(longest > frame, f"longest must be above {frame}, the special tokens of a row, got {longest}")
    rows = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=longest)
    return [{name: values[i] for name, values in rows.items()} for i in range(len(texts))]


def score(model, tokenizer, task: str, split: str, rows: int = 0, longest: int = 256, batch: int = 64) -> float:
    """The task's metric on a split, with the model as it is now.

    Args:
        model: with sites, from `Finetuned.load`; its mode is restored.
        rows, longest: see `FinetuneConfig`; with the values of a run, the numbers of its `scores` come back.
        batch: rows in a forward pass; has no influence beyond rounding.

    Returns:
        Accuracy (0 to 1), or Matthews' or Pearson's correlation (-1 to 1). A row with a logit that is not finite
        counts as answered wrongly, with another class than its own; in regression one such row makes the score -1.

    Raises:
        UserError: what `examples` refuses; a model with another number of classes; `longest` without room for a text.
    """
    params.require(batch >= 1, f"batch must be at least 1, got {batch}")
    described, (texts, labels) = read_task(task), examples(task, split, rows)
    encoded, pad, logits = _encode(tokenizer, texts, longest), transformers.DataCollatorWithPadding(tokenizer), []
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]["input_ids"]))
    with probes.evaluating(model), hub.quiet():
        for start in range(0, len(order), batch):
            one = pad([encoded[i] for i in order[start : start + batch]])
            logits.append(probes.run(model, dict(one)).float().cpu())
    logits, true = torch.cat(logits), np.array(labels)[order]  # (rows, classes), (rows,)
    classes, finite = logits.shape[1], logits.isfinite().all(1).numpy()
    params.require(classes == described.labels, f"the model has {classes} classes, task {task} {described.labels}")
    if classes == 1:
        return METRICS[described.metric](logits[:, 0].numpy(), true) if finite.all() else -1.0
    return METRICS[described.metric](np.where(finite, logits.argmax(1).numpy(), (true + 1) % classes), true)


@dataclass(frozen=True)
class Finetuned:
    """A finished run: its configuration and its record."""

    config: FinetuneConfig
    record: dict

    @property
    def scores(self) -> list[dict[str, float]]:
        """One entry per epoch: split -> score."""
        return self.record["result"]["scores"]

    @property
    def best(self) -> int:
        """The index of the best epoch by the task's first split, the earliest of equals."""
        return self.record["result"]["best"]

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on this machine (a committed record comes without)."""
        return (_folder(self.config) / "model.safetensors").is_file()

    def load(self) -> tuple[families.Sited, object]:
        """The model with the weights of the best epoch, and its tokenizer.

        Returns:
            The model on this machine's device, frozen, in evaluation mode, with sites: `model(**batch)` are logits
            (B, classes). Its folder is one that transformers' `from_pretrained` reads.

        Raises:
            UserError: weights that are not here, or not readable.
        """
        folder, lacking = _folder(self.config), "the record is here, its weights are not"
        params.require(self.has_weights, f"{self.config.name}: {lacking}; finetune(config, again=True) trains them")
        build, local = transformers.AutoModelForSequenceClassification, {"local_files_only": True}
        try:
            with hub.quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
                model = build.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **local)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the weights in {folder} are not readable; finetune(config, again=True)") from error
        return families.with_sites(model.to(params.device()).eval().requires_grad_(False)), tokenizer


def _folder(config: FinetuneConfig) -> Path:
    return params.out() / "runs" / config.name


def find(config: FinetuneConfig) -> Finetuned | None:
    """The finished run of a configuration, or None. A record of other data prints one line."""
    record, here = store().find("finetune", config.key), None
    if record is None:
        return None
    with suppress(UserError):  # else the record speaks for itself
        here = sha256(config.task, config.rows)
    theirs = record["environment"].get("corpus")
    if here and find_folder(config.task) and theirs not in (None, here):
        other = f"{config.task} holds other data now (sha256 {theirs[:12]}, here {here[:12]})"
        print(f"{config.name}: {other}; finetune(config, again=True) trains anew")
    else:
        warn_of_other_corpus(record, here)
    return Finetuned(config, record)


def finetune(config: FinetuneConfig, again: bool = False) -> Finetuned:
    """Fine-tune, or load the finished run. One printed line says which.

    A run that is broken off starts anew and leaves nothing behind; what a killed process left goes when its run is
    started again. On one machine the same configuration gives the same weights, to the bit on a CPU with the same
    number of threads. Chance outside is left as it was.

    Args:
        config: the run. It takes one GPU, the first, however many there are; a CPU where there is none.
        again: train even where there is a record: for weights that are not here, or data that have changed.

    Raises:
        UserError: what `examples` and `hub.model` refuse; training data of one class; `longest` without room for a
            text; a tokenizer without a token to pad with; a model without a head for classification or without a
            table of sites; a full disk.
    """
    if not again and (run := find(config)):
        print(f"{config}: loaded")
        return run
    described, (texts, labels) = read_task(config.task), examples(config.task, "train", config.rows)
    same = f"all {len(labels)} training rows have the label {labels[0]}"
    params.require(len(set(labels)) > 1, f"task {config.task}: {same}; raise rows or take other data")
    tokenizer, corpus = hub.tokenizer(config.model), sha256(config.task, config.rows)
    no_padding = f"{config.model} has no token to pad with; fine-tuning is for encoders such as BERT"
    params.require(tokenizer.pad_token is not None, no_padding)
    encoded = _encode(tokenizer, texts, config.longest)
    rows = [row | {"labels": label} for row, label in zip(encoded, labels, strict=True)]
    scores, commit = _trained(config, described.labels, tokenizer, rows)
    result, environment = {"scores": scores, "best": _best(scores)}, {"corpus": corpus, "commit": commit}
    return Finetuned(config, store().write("finetune", config.key, result, params.environment() | environment))


def _trained(config: FinetuneConfig, labels: int, tokenizer, rows: list[dict]) -> tuple[list[dict[str, float]], str]:
    """The scores of a training whose best weights lie in the run's folder then, and the commit of its model."""
    runs = params.out() / "runs"
    start = f".{config.name}.{platform.node()}."  # then the process, see `_remove_abandoned`
    try:
        runs.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(runs, start)
        place = tempfile.TemporaryDirectory(prefix=f"{start}{os.getpid()}.", dir=runs, ignore_cleanup_errors=True)
        with place as work, _chance(config.seed):
            model = with_new_head(config.model, labels)  # not in quiet: a download shows its progress
            watch = _Epochs(config, families.with_sites(model), tokenizer, Path(work) / "best")
            print(f"{config}: {len(rows)} rows, {config.epochs} epoch{'s' * (config.epochs > 1)}")
            with hub.quiet():
                _train(config, model, tokenizer, rows, watch)
            _move_in(watch.folder, _folder(config), tokenizer)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write into {runs}: {getattr(error, 'strerror', None) or error}") from error
    return watch.scores, model.config.commit


def _remove_abandoned(runs: Path, start: str) -> None:
    """Remove the work folders that begin like this and whose process, the next part of the name, is gone."""
    for folder in runs.glob(f"{start}*"):
        try:
            os.kill(int(folder.name.removeprefix(start).partition(".")[0]), 0)  # sends nothing
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            pass  # another machine's or another user's


def _move_in(new: Path, folder: Path, tokenizer) -> None:
    """The new folder, completed, in the place of the run's old one, which goes with the work folder."""
    try:
        tokenizer.save_pretrained(new)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OSError(str(error)) from error
    with suppress(FileNotFoundError):
        folder.rename(new.parent / "old")
    with suppress(OSError):  # another process may have finished the same run meanwhile
        new.rename(folder)
    if not (folder / "model.safetensors").is_file():
        raise OSError(f"{folder} is in the way")


@contextmanager
def _chance(seed: int):
    """Inside, all chance follows from the seed; afterwards it goes on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def with_new_head(name: str, labels: int):
    """A pre-trained encoder of `hub.model` under transformers' classification head, which is random, in float32.

    A pooler that the checkpoint does not have is random too, where the head has one. Chance is torch's.

    Args:
        name: see `hub.model`.
        labels: classes; 1 means regression.

    Raises:
        UserError: what `hub.model` refuses; a model that transformers has no such head for.
    """
    pretrained = hub.model(name)
    settings = deepcopy(pretrained.config)
    settings.num_labels, settings.problem_type = labels, None  # the labels decide on the loss, not the checkpoint
    try:
        model = transformers.AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"{name}: transformers has no head for classification on it") from error
    missing = model.base_model.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
    lost = [key for key in missing if "pooler." not in key]
    params.require(not lost, f"{name}: weights are missing under its head for classification, e.g. {lost[:1]}")
    return model.to(params.device())


class _OneDevice(transformers.TrainingArguments):
    """Settings with which a trainer splits no batch over the GPUs that it sees."""

    @property
    def n_gpu(self) -> int:
        """0 or 1."""
        return min(1, super().n_gpu)


def _train(config: FinetuneConfig, model, tokenizer, rows: list[dict], watch: "_Epochs") -> None:
    cpu = params.device().type == "cpu"
    recipe = {"learning_rate": config.lr, "weight_decay": config.weight_decay, "num_train_epochs": config.epochs}
    recipe |= {"per_device_train_batch_size": config.batch, "lr_scheduler_type": "linear", "seed": config.seed}
    recipe |= {"average_tokens_across_devices": False}  # true multiplies the loss by the number of devices
    silent = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    place = {"use_cpu": cpu, "dataloader_pin_memory": not cpu, "remove_unused_columns": False}
    settings = _OneDevice(str(watch.folder.parent), **recipe, **silent, **place)
    pad = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, settings, data_collator=pad, train_dataset=rows, callbacks=[watch])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def _best(scores: list[dict[str, float]]) -> int:
    """The first of the epochs with the highest score on the first split.

    A diverged epoch is never preferred to a finite one: its score is the lowest that the metric has (or all epochs'
    where the split has one class alone), and it comes later.
    """
    first = [next(iter(one.values())) for one in scores]
    return first.index(max(first))


class _Epochs(transformers.TrainerCallback):
    """Scores the model after each epoch, and keeps its weights in a folder where it is the best so far."""

    def __init__(self, config: FinetuneConfig, sited: families.Sited, tokenizer, folder: Path):
        self.config, self.sited, self.tokenizer, self.folder = config, sited, tokenizer, folder
        self.scores: list[dict[str, float]] = []

    def on_epoch_end(self, args, state, control, **_):
        """Called by the trainer."""
        one, splits = self.config, read_task(self.config.task).splits
        asked = (self.sited, self.tokenizer, one.task)
        self.scores.append({split: score(*asked, split, one.rows, one.longest) for split in splits})
        if _best(self.scores) == len(self.scores) - 1:
            self.sited.model.save_pretrained(self.folder)
