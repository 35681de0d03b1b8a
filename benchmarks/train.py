"""What a training step costs: 6.9 M parameters on batches of 16 x 128 tokens, in float32.

    python benchmarks/train.py          a table of ratios within this one run, goals met or missed

The peers are what a user would write with Hugging Face: GPT-2 or OPT of the same size and function with its own loss,
torch's AdamW as it comes, the gradient clipped, the same warm-up. All see the same batches; our step is the one of
`train.train`, `Loop.step`, with GPT-2's activation and with OPT's.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from harness import THREADS, judge, medians, timed
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, get_linear_schedule_with_warmup

from ofutils import data, train
from ofutils.train import TrainConfig
from ofutils.transformer import TransformerConfig

ROUNDS, EACH = 15, 2  # steps of a contender in one round
GOALS = {"GPT-2 / ours": 1.25, "OPT / ours": 1.0}
SHAPE = TransformerConfig(vocab=8192, layers=6, width=256, heads=4, context=128)
CONFIG = TrainConfig(model=SHAPE, batch=16, steps=1000, warmup=50)


class Plain:
    """A plain loop over a model of Hugging Face."""

    def __init__(self, model: torch.nn.Module, rows: torch.Tensor):
        self.model, self.rows = model, rows
        recipe = {"betas": CONFIG.betas, "eps": CONFIG.eps, "weight_decay": CONFIG.weight_decay}
        self.optimizer = torch.optim.AdamW(model.parameters(), CONFIG.lr, **recipe)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, CONFIG.warmup, CONFIG.steps)

    def step(self, number: int) -> None:
        """The step of that number, from 0 on."""
        self.model(input_ids=self.rows[number], labels=self.rows[number]).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CONFIG.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 of our shape, without dropout."""
    size = {"vocab_size": SHAPE.vocab, "n_positions": SHAPE.context, "n_embd": SHAPE.width}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(n_layer=SHAPE.layers, n_head=SHAPE.heads, **size, **plain))


def opt() -> OPTForCausalLM:
    """OPT of our shape, without dropout."""
    size = {"vocab_size": SHAPE.vocab, "hidden_size": SHAPE.width, "ffn_dim": 4 * SHAPE.width}
    size |= {"num_hidden_layers": SHAPE.layers, "num_attention_heads": SHAPE.heads}
    plain = {"dropout": 0.0, "pad_token_id": None, "max_position_embeddings": SHAPE.context}
    return OPTForCausalLM(OPTConfig(**size, **plain))


def main() -> None:
    """Time the contenders in turn and print the table."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE.vocab, (100_000,)).to(torch.int32).numpy()
    tokens = data.Tokens("random", SHAPE.vocab, ids, ids, Path())
    configs = {
        "ours, as GPT-2": replace(CONFIG, model=replace(SHAPE, activation="gelu_tanh")),
        "ours, as OPT": CONFIG,
    }
    loops = {name: train.prepare(config, tokens, Accelerator(cpu=True)) for name, config in configs.items()}
    rows = torch.stack([loops["ours, as OPT"].rows(number) for number in range(EACH)])
    loops |= {"  peer: GPT-2": Plain(gpt2(), rows), "  peer: OPT": Plain(opt(), rows)}

    def steps(loop):
        return lambda: [loop.step(number) for number in range(EACH)]

    times = timed({name: steps(loop) for name, loop in loops.items()}, ROUNDS)
    found = medians(times, "ours, as OPT")
    ratios = {f"{peer} / ours": found[f"  peer: {peer}"] / found[f"ours, as {peer}"] for peer in ("GPT-2", "OPT")}
    judge(ratios, GOALS, at_least=tuple(GOALS))


if __name__ == "__main__":
    main()
