"""A trained model fine-tuned with gates and without, its attention kept or drawn anew: bondarenko2023, Table 9.

The released run_clm.py puts attention modules of its own in the place of a pretrained model's and never copies the
weights into them, so its fine-tuning begins from an attention that is drawn anew. Steps and learning rate are the
paper's shares of a training: 4000 of 100 000 steps, 1e-5 to 4e-4. At scale `paper` it is OPT-1.3B, in its own tokens.

Departures: gates begin at 0.98 whatever they read, where the paper's begin at 2 sigmoid(0) and read a little at
once; no penalty on the FFN's output, whose weight the paper does not give and whose code is not released.

python -m ofutils.studies.quant.finetuned    fine-tunes what has no record yet, and adds to figures/records
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ofutils import data, families, hub, params, sources, sweep, train
from ofutils.attention import AttentionConfig
from ofutils.metrics import READ_AT
from ofutils.train import TrainConfig
from ofutils.transformer import Transformer, TransformerConfig

ATTENTIONS = ("kept", "drawn anew")
_GATES = ({}, {"gate": "linear", "pi_init": 0.98})  # without, with
_STEPS, _RATE, _WARMUP, _ROWS = 4000 / 100_000, 1e-5 / 4e-4, 400 / 4000, "position_embedding.weight"
#: OPT-1.3B on rows of 512 tokens, as the paper fine-tunes it.
OPT = TransformerConfig(vocab=50272, layers=24, width=2048, heads=32, context=512, dropout=0.1)


@dataclass(frozen=True)
class Task:
    """One fine-tuning of a run of ours, or of a model on the Hub."""

    base: TrainConfig | str
    gates: bool
    attention: str
    config: TrainConfig


def tasks(scale: str, steps: int = 0, seeds: int = 0, corpus: str = "") -> list[Task]:
    """Both attentions, with gates and without, of every vanilla run of 03_quant, or of the Hub's model at `paper`."""
    jobs = sweep.read_recipe("03_quant", scale, steps, seeds, corpus).jobs
    _, *published = sources.read("03_quant", scale).models
    found = []
    for config in (job.config for job in jobs if job.method == "vanilla"):
        base, model = (published[0], OPT) if published else (config, config.model)
        own = steps or (4000 if published else max(2, round(config.steps * _STEPS)))
        tuned = {"lr": config.lr * _RATE, "steps": own, "warmup": round(own * _WARMUP), "sites": READ_AT["clm"][1]}
        tuned |= {"measure_every": max(1, own // 12), "rows_at_once": 8 if published else 0}
        for attention in ATTENTIONS:
            start = f"{base if published else base.name}, attention {attention}"
            for gates, kind in enumerate(_GATES):
                made = replace(config, model=replace(model, attention=AttentionConfig(**kind)), start=start, **tuned)
                found.append(Task(base, bool(gates), attention, made))
    return found


def planned(scale: str, *asked) -> list[Task]:
    """Of `tasks` those that are recorded; all where they take seconds, at `tiny`, or on a GPU."""
    quick = scale == "tiny" or params.device().type != "cpu"
    return [task for task in tasks(scale, *asked) if quick or train.find(task.config)]


def perform(task: Task) -> train.Run:
    """Fine-tune, or recall the run."""
    if found := train.find(task.config):
        return found
    tokens = _tokens(task.base, task.config) if isinstance(task.base, str) else None
    return train.train(task.config, started(task), tokens=tokens)


def started(task: Task) -> Transformer:
    """The model that is fine-tuned, before its first step; on the CPU."""
    if isinstance(task.base, str):
        state = families.from_hf(hub.model(task.base, head="lm")).state_dict()
        state[_ROWS] = state[_ROWS][: task.config.model.context]
    else:
        state = train.trained(task.base).load().state_dict()
    torch.manual_seed(task.config.seed)
    model = Transformer(task.config.model)
    gates = {name: one for name, one in model.state_dict().items() if ".gate." in name}
    gates = {name: torch.zeros_like(one) if name.endswith("weight") else one for name, one in gates.items()}
    model.load_state_dict(state | gates)
    for block in model.blocks if task.attention == "drawn anew" else ():
        for name in ("q", "k", "v", "attn_out"):
            block.get_submodule(f"attention.{name}").reset_parameters()  # as nn.Linear draws, which is what they get
    return model.cpu()


def _tokens(name: str, config: TrainConfig) -> data.Tokens:
    """The text in the tokens of somebody else's model."""
    corpus, tokenizer = data.load_corpus(config.corpus, config.characters), hub.tokenizer(name)
    ids = {}
    for split in ("train", "validation"):
        rows = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in corpus.split(split))
        ids[split] = np.concatenate([np.array([*row, tokenizer.eos_token_id], np.int32) for row in rows])
    return data.Tokens(corpus.sha256, config.model.vocab, **ids, tokenizer_path=Path())


def table(wanted: list[Task]) -> pd.DataFrame:
    """One row per fine-tuning and measurement; what is missing is performed.

    Returns:
        Columns gates; attention; seed; step; loss (nats); max inf norm, the largest over blocks (`resid_post`);
        tensor kurtosis, the mean over sites, see `metrics.READ_AT`.
    """
    rows = []
    for task in wanted:
        for entry in perform(task).log:
            norms = [found["inf_norm"] for site, found in entry["sites"].items() if site.endswith("resid_post")]
            kurtosis = np.mean([found["tensor_kurtosis"] for found in entry["sites"].values()])
            about = {
                "gates": task.gates,
                "attention": task.attention,
                "seed": task.config.seed,
                "step": entry["step"],
            }
            rows.append(about | {"loss": entry["loss"], "max inf norm": max(norms), "tensor kurtosis": kurtosis})
    return pd.DataFrame(
        rows, columns=["gates", "attention", "seed", "step", "loss", "max inf norm", "tensor kurtosis"]
    )


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    wanted = tasks("small")
    print(table(wanted).groupby(["attention", "gates", "step"], sort=False).mean().round(4).to_string())
    print("records written to", train.store().export([perform(task).record for task in wanted], "finetuned.small"))


if __name__ == "__main__":
    params.main_guard(main)
