"""A head on a frozen encoder: what it knows about masked tokens.

An encoder without a head of its own (a sentence embedder) gets one, trained here on its frozen hidden states,
so that damage inside the encoder can be read as a loss in nats.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ofutils import params, probes
from ofutils.transformer import Head, Transformer

Masked = tuple[dict[str, Tensor], Tensor]  # a batch and its labels, from sentences.mask_tokens


def split(model: Transformer) -> tuple[Transformer, Head]:
    """A model with an MLM head as encoder (`head` none, its output the last hidden state) and head.

    Raises:
        UserError: a model with another head.
    """
    params.require(model.config.head == "mlm", f"this model has no MLM head, but {model.config.head}")
    encoder = Transformer(replace(model.config, head="none"))
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    return encoder.to(next(model.parameters()).device).eval(), model.head


@torch.no_grad()
def _at_masks(encoder: Transformer, masked: list[Masked]) -> tuple[Tensor, Tensor]:
    """The last hidden state (n, D) at every position to be predicted, and the true ids (n,)."""
    states, ids = [], []
    for batch, labels in masked:
        hidden = probes.run(encoder, batch)  # (B, T, D)
        labels = labels.to(hidden.device)
        states.append(hidden[labels != -100])
        ids.append(labels[labels != -100])
    return torch.cat(states), torch.cat(ids)


def unigram(ids: Tensor, vocab: int) -> Tensor:
    """Log frequencies (V,) of token ids, a tenth added to each count: what can be known without context.

    Args:
        ids: tokens that may be masked: without special tokens and padding, see `maskable`.
    """
    counted = torch.bincount(ids.flatten(), minlength=vocab).float() + 0.1
    return (counted / counted.sum()).log()


def maskable(batches: list[dict[str, Tensor]], tokenizer) -> Tensor:
    """The ids (n,) of all tokens that `sentences.mask_tokens` may ask for: no special tokens, no padding."""
    special = torch.tensor(tokenizer.all_special_ids)
    real = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return real[~torch.isin(real, special)]


def train_mlm_head(encoder: Transformer, masked: list[Masked], steps: int, seed: int = 0, lr: float = 1e-3) -> Head:
    """BERT's MLM head for an encoder that has none: dense, activation, norm, and a decoder tied to the embedding.

    Dense, norm and the decoder's bias, which starts at the log frequencies of the training tokens, are trained by
    AdamW with a linear decay, 256 positions a step, on hidden states that are computed once; the encoder is
    left alone.

    Args:
        encoder: with `head` none.
        masked: training batches.
        seed: of the head's start and of the order.
    """
    states, ids = _at_masks(encoder, masked)
    generator = torch.Generator().manual_seed(seed)
    head = Head(replace(encoder.config, head="mlm"))
    with torch.no_grad():
        head.dense.weight.normal_(0, 0.02, generator=generator)
        head.dense.bias.zero_()
        head.bias.copy_(unigram(ids, encoder.config.vocab))
    head, embedding = head.to(states.device), encoder.token_embedding.weight.detach()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(ids), (256,), generator=generator).to(states.device)
        loss = F.cross_entropy(head(states[chosen], embedding), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)


@torch.no_grad()
def mlm_loss(encoder: Transformer, head: Head, masked: list[Masked]) -> float:
    """Mean cross-entropy (nats) over all positions to be predicted."""
    states, ids = _at_masks(encoder, masked)
    embedding, losses = encoder.token_embedding.weight, []
    for part, true in zip(states.split(1024), ids.split(1024), strict=True):
        losses.append(F.cross_entropy(head(part, embedding), true, reduction="none"))
    return float(torch.cat(losses).mean())
