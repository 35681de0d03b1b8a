"""What the papers do not have: remedies for a model that is trained already.

heal(model, batches, healing)    its outliers trained away, on its own outputs and any text
"""

from collections.abc import Callable, Iterable
from dataclasses import field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ofutils import optim, params
from ofutils.attention import AttentionConfig
from ofutils.probes import Batch, hooked, ids_and_mask, resolve, run
from ofutils.transformer import Transformer


@params.settings
class Healing:
    """How a model is healed. The defaults leave its architecture as it is and press on kurtosis."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)  # of the healed model
    penalty: Literal["none", "kurtosis", "max"] = "kurtosis"
    weight: params.NotNegative = 0.02  # of the penalty, beside the distance to the original
    sites: tuple[str, ...] = ("mlp_out", "resid_post")  # where the penalty is taken
    steps: params.Count = 300
    warmup: params.Natural = 30  # steps of linear warm-up, then linear decay to 0
    lr: params.Positive = 1e-3
    seed: params.Natural = 0  # of the order of the batches


def heal(
    model: Transformer,
    batches: Iterable[Batch],
    healing: Healing | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Transformer, list[dict]]:
    """A copy of a model without its outliers, trained on the model's own outputs.

    The loss is the distance to the original plus `weight` times the penalty. Distance: 1 - cosine to the original's
    last hidden states, or the KL divergence from its logits (nats) where it has a head; the mean over tokens.
    Penalty: at every site the logarithm of the outliers' size among all entries x of a batch's tokens, the mean over
    sites; for `kurtosis` log(mean(x^4) / mean(x^2)^2), for `max` log(max|x| / sqrt(mean(x^2))). Neither depends on
    the scale of x, so shrinking everything wins nothing. AdamW (betas 0.9 and 0.99, no weight decay, gradients
    of norm 1 at most) moves all but the token embedding.

    Gates start at `pi_init` for every input, whatever it is: near 1, the copy starts near the original. A clipped
    softmax starts as far from it as the clipping takes it.

    Args:
        model: from `families.from_hf`, or one of ours, with plain attention; it is left as it is.
        batches: ids or mappings, see `probes`; padding counts nowhere. Gone through in another order each time.
        healing: by default `Healing()`.
        report: called with (steps done, loss).

    Returns:
        The healed model in evaluation mode, on the model's device, and one entry per step: `step`, `distance`,
        `kurtosis` (mean(x^4) / mean(x^2)^2) and `max` (largest |x|), the largest over sites of that step's batch.

    Raises:
        UserError: no batches, a site that the model does not have, a model whose attention is not the plain one.
    """
    healing, batches = healing or Healing(), list(batches)
    params.require(len(batches) > 0, "nothing to heal on: no batches")
    plain = model.config.attention == AttentionConfig()
    params.require(plain, "this model's attention is not the plain one: heal a model as it was before")
    healed, log = _copy(model, healing.attention), []
    sites, kept = resolve(healed, healing.sites), {}
    moved = [parameter for parameter in healed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, healing.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator, order = torch.Generator().manual_seed(healing.seed), []
    with hooked(healed, {site: lambda x, own=site: kept.update({own: x}) for site in sites}):
        for step in range(healing.steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            batch = batches[order.pop()]
            optimizer.param_groups[0]["lr"] = healing.lr * optim.schedule(step, healing.steps, healing.warmup)
            real = ids_and_mask(batch)[1].to(healed.token_embedding.weight.device)
            distance = _distance(run(healed, batch)[real], _exact(model, batch)[real], model.config.head)
            sizes = {site: _sizes(x[real]) for site, x in kept.items()}
            loss = distance + healing.weight * _penalty(sizes, healing.penalty)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            largest = {name: max(one[name].item() for one in sizes.values()) for name in ("kurtosis", "max")}
            log.append({"step": step + 1, "distance": distance.item()} | largest)
            report(step + 1, loss.item())
    return healed.requires_grad_(False).eval(), log


def _copy(model: Transformer, attention: AttentionConfig) -> Transformer:
    """The model with another attention, to be trained: gates at their start for every input, embedding fixed."""
    copy = Transformer(replace(model.config, attention=attention))
    copy.load_state_dict(model.state_dict() | _gates(copy))
    copy.token_embedding.requires_grad_(False)
    return copy.to(next(model.parameters()).device).train()


def _gates(model: Transformer) -> dict[str, Tensor]:
    """The state of fresh gates that look at nothing."""
    state = {name: value for name, value in model.state_dict().items() if ".gate." in name}
    return {name: torch.zeros_like(value) if name.endswith(".weight") else value for name, value in state.items()}


@torch.no_grad()
def _exact(model: Transformer, batch: Batch) -> Tensor:
    return run(model, batch)


def _distance(ours: Tensor, exact: Tensor, head: str) -> Tensor:
    """(n, D) hidden states or (n, V) logits -> 0-d."""
    if head == "none":
        return (1 - F.cosine_similarity(ours, exact, dim=-1)).mean()
    return F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")


def _sizes(x: Tensor) -> dict[str, Tensor]:
    """Of (n, D) activations: kurtosis without centring, the largest entry, and that over the root mean square."""
    squares = x.square()
    energy, largest = squares.mean(), x.abs().amax()
    return {"kurtosis": squares.square().mean() / energy.square(), "max": largest, "ratio": largest / energy.sqrt()}


def _penalty(sizes: dict[str, dict[str, Tensor]], kind: str) -> Tensor | float:
    measure = {"kurtosis": "kurtosis", "max": "ratio"}.get(kind)
    return torch.stack([one[measure] for one in sizes.values()]).log().mean() if measure else 0.0
