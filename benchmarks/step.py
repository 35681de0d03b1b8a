"""What each option of a training step costs or saves, on this CPU or on the GPU that is here.

    python benchmarks/step.py          a table of ratios within this one run; on a GPU also goals met or missed

On a CPU 6.9 M parameters on 16 x 128 tokens in float32, on a GPU 110 M on 128 x 512 in bf16. Each line changes one
thing of the first. SOAP's share counts its steps, refreshes included, against compiled steps of 4096 x 128 tokens;
measuring counts the loss and the metrics of every block on two batches against a hundred compiled steps; model FLOPs
are 6 per token and parameter of a matrix, and 12 L D T for attention.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from harness import judge, medians, timed

from ofutils import data, optim, params, probes, train
from ofutils.batches import Batches
from ofutils.train import TrainConfig
from ofutils.transformer import TransformerConfig, clm_loss

EACH = 10  # steps of a contender in one round, one of them a refresh of SOAP's
PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, by its datasheet
TOKENS = 4096 * 128  # of the step in which SOAP's share is counted
GOALS = {"SOAP's share": 0.15, "measuring every 100 steps": 0.03, "model FLOPs utilisation": 0.40}
CUDA = params.device().type == "cuda"
SMALL = TransformerConfig(vocab=8192, layers=6, width=256, heads=4, context=128)
LARGE = TransformerConfig(vocab=32768, layers=12, width=768, heads=12, context=512)
CONFIG = TrainConfig(model=LARGE, batch=128, precision="bf16") if CUDA else TrainConfig(model=SMALL, batch=16)


def contenders(tokens: data.Tokens) -> dict[str, train.Loop]:
    """The step as it is, and with one thing changed each."""

    def prepared(**more) -> train.Loop:
        return train.prepare(replace(CONFIG, **more), tokens, Accelerator(cpu=not CUDA))

    base = prepared()
    loops = {"as it is": base, "in float32" if CUDA else "in bf16": prepared(precision="no" if CUDA else "bf16")}
    loops["compiled"] = replace(prepared(), loss=torch.compile(train._loss))
    loops["a quarter of the rows at once"] = prepared(rows_at_once=CONFIG.batch // 4)
    plain, device = Batches(tokens.train, CONFIG.batch, CONFIG.model.context), base.accelerator.device
    loops["batches not made ahead"] = replace(prepared(), rows=lambda number: plain.at(number).to(device))
    unfused = prepared()
    groups = optim.groups(unfused.model, CONFIG.weight_decay)
    loops["AdamW not fused"] = replace(unfused, optimizer=torch.optim.AdamW(groups, CONFIG.lr, fused=False))
    return loops | {"SOAP": prepared(optimizer="soap")}


def main() -> None:
    """Time the contenders in turn and print the table."""
    torch.manual_seed(0)
    shape = CONFIG.model
    ids = torch.randint(0, shape.vocab, (2_000_000,)).to(torch.int32).numpy()
    tokens = data.Tokens("random", shape.vocab, ids, ids, Path())
    loops, evaluation = contenders(tokens), [torch.randint(0, shape.vocab, (CONFIG.batch, shape.context))] * 2

    def steps(loop):
        def run():
            for number in range(EACH):
                loop.step(number)
            torch.cuda.synchronize() if CUDA else None

        return run

    def measure():
        with loops["as it is"].precision():
            probes.measure(loops["as it is"].model, evaluation, CONFIG.sites, clm_loss).summary()

    times = timed({name: steps(loop) for name, loop in loops.items()} | {"measuring": measure}, 5)
    found = medians(times, "as it is")
    if CUDA:
        seconds = sorted(times["compiled"])[2] / EACH
        drawn = CONFIG.batch * shape.context
        matrices = sum(
            p.numel() for n, p in loops["SOAP"].model.named_parameters() if p.ndim == 2 and "position" not in n
        )
        flops = (6 * matrices + 12 * shape.layers * shape.width * shape.context) * drawn
        ratios = {
            "SOAP's share": (found["SOAP"] - found["as it is"]) / found["compiled"] * drawn / TOKENS,
            "measuring every 100 steps": found["measuring"] / found["compiled"] * EACH / 100,
            "model FLOPs utilisation": flops / seconds / PEAK,
        }
        print(f"{torch.cuda.get_device_name()}: {drawn / seconds:,.0f} tokens a second, compiled")
        judge(ratios, GOALS, at_least=("model FLOPs utilisation",))


if __name__ == "__main__":
    main()
