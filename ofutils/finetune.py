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
same); the head and the order of rows have several seeds, theirs is 42 alone.
"""

import hashlib
import random
import shutil
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ofutils import UserError, families, hub, params, probes
from ofutils.records import differing, digest, warn_of_other_corpus
from ofutils.tasks import METRICS, TASKS, Task, examples, read_task  # noqa: F401 (TASKS and Task: for notebooks)
from ofutils.train import store


@dataclass(frozen=True)
class FinetuneConfig:
    """All that decides the numbers of a run. Its name is the hash of what differs from the defaults."""

    model: str = "google-bert/bert-base-uncased"  # see hub.model
    task: str = "mnli"  # a name of TASKS, or the path of a folder, see `examples`
    rows: int = 0  # of training data, and at most as many of each scored split; 0: all
    seed: int = 1  # of the new head, the order of the rows, and dropout
    lr: float = 2e-5
    batch: int = 32
    epochs: int = 4
    weight_decay: float = 0.01
    longest: int = 256  # tokens of a row; the longer text of a pair is cut first

    def __post_init__(self):
        for name in ("batch", "epochs", "longest"):
            params.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rows", "seed", "weight_decay"):
            params.require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        params.require(self.lr > 0, f"lr must be positive, got {self.lr}")

    @property
    def name(self) -> str:
        """The run's name, the same on every machine."""
        return digest("finetune", differing(self))


# ---------------------------------------------------------------------------------------------------
# scoring


def _encode(tokenizer, texts: list[tuple[str, ...]], longest: int) -> list[dict]:
    longest = min(longest, tokenizer.model_max_length)
    rows = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=longest)
    return [{name: values[i] for name, values in rows.items()} for i in range(len(texts))]


def score(
    model: nn.Module, tokenizer, task: str, split: str, rows: int = 0, longest: int = 256, batch: int = 64
) -> float:
    """The task's metric on a split, with the model as it is now.

    Args:
        model: with sites, from `Finetuned.load`; its mode is restored.
        rows, longest: see `FinetuneConfig`; with the values of a run, the numbers of its `scores` come back.
        batch: rows in a forward pass; has no influence beyond rounding.

    Returns:
        Accuracy (0 to 1), or Matthews' or Pearson's correlation (-1 to 1). A prediction that is not finite is wrong.

    Raises:
        UserError: what `examples` refuses; a model with another number of classes.
    """
    described, (texts, labels) = read_task(task), examples(task, split, rows)
    encoded, pad = _encode(tokenizer, texts, longest), DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]["input_ids"]))
    training, logits = model.training, []
    model.eval()
    try:
        with torch.no_grad(), hub.quiet():
            for start in range(0, len(order), batch):
                one = pad([encoded[i] for i in order[start : start + batch]])
                logits.append(probes.run(model, dict(one)).float().cpu())
    finally:
        model.train(training)
    logits = torch.cat(logits)  # (rows, classes)
    classes = logits.shape[1]
    params.require(classes == described.labels, f"the model has {classes} classes, task {task} {described.labels}")
    predicted = logits[:, 0] if classes == 1 else logits.argmax(1).where(logits.isfinite().all(1), -1)
    return METRICS[described.metric](predicted.numpy(), np.array(labels)[order])


# ---------------------------------------------------------------------------------------------------
# training


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
        name, folder = self.config.name, _folder(self.config)
        if not self.has_weights:
            lacking = "the record is here, its weights are not"
            raise UserError(f"{name}: {lacking}; finetune(config, again=True) trains them")
        try:
            with hub.quiet():
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the weights in {folder} are not readable; finetune(config, again=True)") from error
        return families.with_sites(model.to(params.device()).eval().requires_grad_(False)), tokenizer


def _folder(config: FinetuneConfig) -> Path:
    return params.out() / "runs" / config.name


def find(config: FinetuneConfig) -> Finetuned | None:
    """The finished run of a configuration, or None. A record of other data prints one line."""
    record = store().find("finetune", differing(config))
    if record is None:
        return None
    try:
        here = _sha256(config)
    except UserError:
        here = None  # the record speaks for itself
    warn_of_other_corpus(record, here)
    return Finetuned(config, record)


def _sha256(config: FinetuneConfig) -> str:
    """Of all texts and labels of a run."""
    found = hashlib.sha256()
    for split in ("train", *read_task(config.task).splits):
        found.update(repr(examples(config.task, split, config.rows)).encode())
    return found.hexdigest()


def finetune(config: FinetuneConfig, again: bool = False) -> Finetuned:
    """Fine-tune, or load the finished run. One printed line says which.

    A run that is broken off leaves nothing behind and starts anew. On one machine the same configuration gives the
    same weights, to the bit on a CPU with the same number of threads. Chance outside is left as it was.

    Args:
        config: the run. The rows of a batch are split over the GPUs that there are.
        again: train even where there is a record, for the weights that are not here.

    Raises:
        UserError: what `examples` and `hub.model` refuse; training data of one class; a model that is no encoder or
            has no table of sites; a full disk.
    """
    if not again and (run := find(config)):
        print(f"{_line(config)}: loaded")
        return run
    described, (texts, labels) = read_task(config.task), examples(config.task, "train", config.rows)
    same = f"all {len(labels)} training rows have the label {labels[0]}"
    params.require(len(set(labels)) > 1, f"task {config.task}: {same}; raise rows or take other data")
    tokenizer, environment = hub.tokenizer(config.model), params.environment() | {"corpus": _sha256(config)}
    no_padding = f"{config.model} has no token to pad with; fine-tuning is for encoders such as BERT"
    params.require(tokenizer.pad_token is not None, no_padding)
    encoded = _encode(tokenizer, texts, config.longest)
    rows = [row | {"labels": label} for row, label in zip(encoded, labels, strict=True)]
    runs = params.out() / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{config.name}.", dir=runs, ignore_cleanup_errors=True) as work,
            _chance(config.seed),
            hub.quiet(),
        ):
            model = with_new_head(config.model, described.labels)
            watch = _Epochs(config, families.with_sites(model), tokenizer, Path(work) / "best")
            print(f"{_line(config)}: {len(rows)} rows, {config.epochs} epoch{'s' * (config.epochs > 1)}")
            _train(config, model, tokenizer, rows, watch)
            tokenizer.save_pretrained(watch.folder)
            shutil.rmtree(_folder(config), ignore_errors=True)
            watch.folder.rename(_folder(config))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write into {runs}: {getattr(error, 'strerror', None) or error}") from error
    environment |= {"commit": model.config.commit}
    result = {"scores": watch.scores, "best": _best(watch.scores)}
    return Finetuned(config, store().write("finetune", differing(config), result, environment))


def _line(config: FinetuneConfig) -> str:
    return f"{config.name}: {config.model} on {config.task}, seed {config.seed}"


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
    settings.num_labels = labels
    try:
        model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"{name}: transformers has no head for classification on it") from error
    missing = model.base_model.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
    lost = [key for key in missing if "pooler." not in key]
    params.require(not lost, f"{name}: weights are missing under its head for classification, e.g. {lost[:1]}")
    return model.to(params.device())


def _train(config: FinetuneConfig, model, tokenizer, rows: list[dict], watch: "_Epochs") -> None:
    cpu = params.device().type == "cpu"
    settings = TrainingArguments(
        output_dir=str(watch.folder.parent),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=-(-config.batch // max(1, torch.cuda.device_count())),
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
    )
    pad = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, settings, data_collator=pad, train_dataset=rows, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _best(scores: list[dict[str, float]]) -> int:
    """The first of the epochs with the highest score on the first split."""
    first = [next(iter(one.values())) for one in scores]
    return first.index(max(first))


class _Epochs(TrainerCallback):
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
