"""Where a ViT's outliers sit, what its heads do there, and what two dimensions carry (bondarenko2023, Figure 3).

A patch is plain where next to nothing is to be seen; heads that have nothing to do could turn there. For each block
but the last: entries of its output (`resid_post`) beyond six sigma of their image, by position, and the patch that
holds the largest entry; in the next block, how much attention that patch receives (`probs`) and how large its values
are.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ofutils import dims, metrics, params, pool, sweep, train
from ofutils.batches import fixed_batches
from ofutils.images import ImageConfig, load, patches
from ofutils.probes import capture, evaluating, measure, run
from ofutils.records import differing
from ofutils.transformer import accuracy

QUIET = 0.25  # a plain patch varies by less than this share of what the image's liveliest patch does
SHOWN, DRAWS = 3, 4  # images that are kept as maps, draws of random dimensions


def plain(pixels: Tensor, image: ImageConfig) -> Tensor:
    """(B, C, S, S) -> (B, n): the patches whose pixels have less than `QUIET` of the largest standard deviation."""
    spread = patches(pixels, image).std(-1)
    return spread < QUIET * spread.amax(1, keepdim=True)


def pictures(source: str, image: ImageConfig, count: int = 256) -> list[dict[str, Tensor]]:
    """Held-out images in whole batches, the same at every call: at most so many; see `images.load`."""
    held = load(source, image).validation
    rows = min(64, count, len(held) // image.row)
    return fixed_batches(held, count // rows, rows, image.row, image)


@torch.no_grad()
def statistics(model: nn.Module, batches: Iterable[dict[str, Tensor]], image: ImageConfig) -> dict:
    """Outliers, attention and values by position.

    Args:
        model: with sites, `resid_post`, `probs` and `v`; the class token, if there is one, comes first.
        batches: with `pixel_values`.
        image: how the model cuts them.

    Returns:
        `plain`, the share of patches that are; per block `outliers` (entries beyond six sigma in an image), and the
        shares of them at `class` and, of those at patches, at `plain` ones (nan without any); `peak plain`, the share
        of images whose largest entry among patches is at a plain one. Of the block with the largest entries against
        the median one (`block`): `attention`, what the patch with the largest entry receives in the next block over
        what the other patches do, mean over heads and queries; `head`, which turns there most, and what it gives
        (`head attention`, 0 to 1); `values`, the size of its values there over that of the others. `maps` of the
        first images: `largest` entry, that head's attention `received` (a mean over queries) and its `values`, (T,).
    """
    first, seen = int(image.pool == "class"), []
    for batch in batches:
        with evaluating(model), capture(model, ["resid_post", "probs", "v"]) as tensors:
            run(model, batch)
        streams, probs, values = ([x for name, x in tensors.items() if name.endswith(f".{kind}")] for kind in _KINDS)
        seen.append(_positions(streams, probs, values) | {"plain": plain(batch["pixel_values"], image)[None]})
    whole = {name: torch.cat([one[name].cpu() for one in seen], 1) for name in seen[0]}
    quiet, largest, hits = whole["plain"][0], whole["largest"], whole["outliers"]  # (N, n), (L, N, T) twice
    peaks = largest[:, :, first:].argmax(2)  # (L, N)
    at_patches, at_plain = hits[:, :, first:].sum((1, 2)), (hits[:, :, first:] * quiet).sum((1, 2))
    blocks = {
        "outliers": hits.sum(2).double().mean(1),
        "class": hits[:, :, :first].sum((1, 2)) / hits.sum((1, 2)),
        "plain": at_plain / at_patches,
        "peak plain": quiet.expand(len(peaks), *quiet.shape).gather(2, peaks[..., None]).double().mean((1, 2)),
    }
    block = int((largest.amax(2) / largest.median(2).values).mean(1)[:-1].argmax())
    spot = torch.zeros_like(quiet).scatter(1, peaks[block, :, None], 1).bool()  # (N, n)
    received, size = (whole[name][block + 1][..., first:].transpose(0, 1) for name in ("received", "values"))
    (mine, theirs), (value, usual) = ((x[:, spot], x[:, ~spot]) for x in (received, size))  # (H, N), (H, N (n - 1))
    head = int(mine.mean(1).argmax())
    maps = {"largest": largest[block], **{name: whole[name][block + 1, :, head] for name in ("received", "values")}}
    return {
        "plain": float(quiet.double().mean()),
        "blocks": {name: [float(x) for x in column] for name, column in blocks.items()},
        "block": block,
        "head": head,
        "attention": float(mine.mean() / theirs.mean()),
        "head attention": float(mine[head].mean()),
        "values": float(value[head].mean() / usual[head].mean()),
        "maps": {name: np.round(x[:SHOWN].double().numpy(), 4).tolist() for name, x in maps.items()},
    }


_KINDS = ("resid_post", "probs", "v")


def _positions(streams: list[Tensor], probs: list[Tensor], values: list[Tensor]) -> dict[str, Tensor]:
    """What is kept of a batch: (L, B, T) of the streams, (L, B, H, T) of the heads."""
    heads = probs[0].shape[1]
    split = torch.stack(values).unflatten(-1, (heads, -1))  # (L, B, T, H, K)
    return {
        "outliers": torch.stack([metrics.six_sigma(x).sum(2) for x in streams]),
        "largest": torch.stack(streams).abs().amax(3),
        "received": torch.stack(probs).mean(3),
        "values": split.norm(dim=4).transpose(2, 3),
    }


def carried(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """What the model loses of its accuracy without two dimensions of `norm2`: the largest, and as many others.

    The two largest are those of `resid_post` on the same images; of the others, `DRAWS` random pairs, the mean.

    Source: puccetti2022's code for ViT, which takes two of the dimensions that LayerNorm weights single out.
    """
    width = model.config.width
    largest = dims.by_activation(measure(model, batches, "resid_post", meters=("max_abs",)), 2)
    draw, rest = np.random.default_rng(0), [one for one in range(width) if one not in largest]
    pairs = [largest, *(draw.choice(rest, 2, replace=False).tolist() for _ in range(DRAWS))]
    exact, lost = measure(model, batches, loss=accuracy).loss, []
    for pair in pairs:
        with dims.ablated(model, pair):
            lost.append(exact - measure(model, batches, loss=accuracy).loss)
    return {"largest": lost[0], "random": float(np.mean(lost[1:]))}


# --- of finished runs


def _key(job: sweep.Job) -> dict:
    return {"run": differing(job.config)}


def recall(job: sweep.Job) -> dict | None:
    """The record of a run's statistics, or None."""
    return train.store().find("vit", _key(job))


def perform(job: sweep.Job, report: Callable[[int, float], None] | None = None) -> dict:
    """Train the run of a job and measure where its outliers sit, or recall that. Without norms nothing is ablated."""
    if record := recall(job):
        return record
    finished = train.trained(job.config, report)
    params.require(not finished.diverged, f"diverged at step {finished.diverged}")
    model, image = finished.load(), job.config.model.image
    batches = pictures(job.config.corpus, image)
    result = statistics(model, batches, image)
    if job.config.model.norm != "none":
        result["lost"] = carried(model, batches)
    corpus = {"corpus": load(job.config.corpus, image).corpus}
    return train.store().write("vit", _key(job), result, params.environment() | corpus)


def examine(name: str, scale: str, outcomes: list[sweep.Outcome], workers: int | None = 0) -> list[dict]:
    """The statistics behind outcomes, in order; what has no record is measured, see `pool.finish`."""
    jobs = [one.job for one in outcomes]
    sweep.require_machine(name, scale, jobs, recall)
    records = pool.finish(perform, jobs, [0 if recall(job) else job.config.steps for job in jobs], workers)
    return [record["result"] for record in records]
