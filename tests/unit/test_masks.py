"""Masked-token prediction: what is hidden, its loss, and trainings with it."""

import dataclasses

import numpy as np
import pytest
import torch

from ofutils import UserError, batches, quant, sweep, train
from ofutils.batches import Masks, fixed_batches, unpacked
from ofutils.probes import measure
from ofutils.records import differing
from ofutils.transformer import Transformer, TransformerConfig, clm_loss, lm_loss
from tests.configurations import SMALL

ENCODER = dataclasses.replace(SMALL, causal=False, head="mlm")
MASKS = Masks(mask=299, vocab=299, special=(0, 7))


@pytest.fixture
def masked(config):
    """A run of a second that predicts masked tokens."""
    return dataclasses.replace(config, model=ENCODER, objective="mlm")


def quiet(config, **more):
    return train.train(config, report=lambda *_: None, **more)


# ------------------------------------------------------------------------------------ what is hidden


def test_15_percent_of_every_row_are_asked_for_none_of_them_special_and_80_10_10_become():
    ids = torch.randint(0, 299, (256, 128))
    seen, labels = MASKS.at(ids, 3, 5).unbind(1)
    asked = labels != -100
    assert (asked.sum(1) == 19).all()  # of 128
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(seen[~asked], ids[~asked])
    assert not np.isin(ids[asked], MASKS.special).any() and np.isin(ids, MASKS.special).sum() > 100
    share = (seen[asked] == 299).float().mean()
    kept = (seen[asked] == ids[asked]).float().mean()
    assert share == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.02)  # five sigma
    other = seen[asked & (seen != 299) & (seen != ids)]
    assert other.unique().numel() > 200 and other.max() < 299
    assert asked.float().mean(0).std() < 0.05  # at every place


def test_masks_depend_on_their_numbers_alone():
    ids = torch.randint(0, 299, (4, 16))
    assert torch.equal(MASKS.at(ids, 3, 5), MASKS.at(ids, 3, 5))
    labels = [MASKS.at(ids, *numbers)[:, 1] for numbers in ((3, 5), (3, 6), (4, 5), (5,))]
    assert len({tuple(one.flatten().tolist()) for one in labels}) == 4


def test_special_ids_are_asked_for_only_where_a_row_has_too_few_others():
    ids = torch.zeros(1, 40, dtype=torch.long)
    ids[0, [3, 20]] = 5
    labels = MASKS.at(ids, 0)[0, 1]
    assert (labels != -100).sum() == 6 and (labels == 5).sum() == 2
    assert (MASKS.at(torch.full((1, 2), 9), 0)[0, 1] != -100).sum() == 1  # one at least


def test_training_batches_are_the_plain_ones_with_tokens_hidden():
    ids = np.random.default_rng(0).integers(1, 299, 999)
    plain, hidden = batches.Batches(ids, 4, 16, 1), batches.Batches(ids, 4, 16, 1, MASKS)
    for number in (0, 3, 20):
        seen, labels = hidden.at(number).unbind(1)
        assert torch.equal(torch.where(labels == -100, seen, labels), plain.at(number))
    first, second = fixed_batches(ids, 3, 4, 16, MASKS), fixed_batches(ids, 3, 4, 16, MASKS)
    for one, other, whole in zip(first, second, fixed_batches(ids, 3, 4, 16), strict=True):
        assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(torch.where(one["labels"] == -100, one["input_ids"], one["labels"]), whole)


@pytest.mark.parametrize("variant", ["natural", "flattened", "one separator", "many separators", "uniform"])
def test_the_mask_is_an_id_of_its_own_and_separators_stay_visible(out, masked, variant):
    masked = dataclasses.replace(masked, bpe=280, variant=variant)
    tokens = train.load_tokens(masked)
    masks = train.masks(masked, tokens)
    assert masks.mask == 299 > max(tokens.train.max(), tokens.validation.max()) and masks.vocab == tokens.vocab <= 299
    natural = train.load_tokens(dataclasses.replace(masked, variant="natural"))
    end = natural.tokenizer.token_to_id("<|endoftext|>")
    ends = set(tokens.train[natural.train == end].tolist()) if variant in ("natural", "flattened") else {end, 280}
    assert set(masks.special) == (set() if variant == "uniform" else ends)
    assert train.masks(dataclasses.replace(masked, objective="clm", model=SMALL), tokens) is None


# ------------------------------------------------------------------------------------ the loss


def test_the_loss_is_the_mean_over_what_is_asked_for_in_closed_form():
    """A model that knows how often ids occur and nothing else: its loss is minus the log of their shares."""
    model = Transformer(ENCODER).double()
    shares = torch.rand(300, dtype=torch.float64).softmax(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.head.bias.copy_(shares.log())
    rows = fixed_batches(np.random.default_rng(0).integers(1, 299, 999), 3, 4, 16, MASKS)
    true = torch.cat([one["labels"][one["labels"] != -100] for one in rows])
    assert len(true) == 3 * 4 * 2
    assert measure(model, rows, loss=lm_loss).loss == pytest.approx(-float(shares.log()[true].mean()), rel=1e-6)


def test_a_batch_without_labels_has_the_causal_loss():
    logits, ids = torch.randn(2, 9, 5), torch.randint(0, 5, (2, 9))
    assert torch.equal(lm_loss(logits, ids), clm_loss(logits, ids))
    assert torch.equal(unpacked(ids), ids)


class Part:
    """One process of several, without the others."""

    device, is_main_process = torch.device("cpu"), True

    def __init__(self, processes, index):
        self.num_processes, self.process_index = processes, index

    def prepare(self, model, optimizer):
        return model, optimizer

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, largest):
        self.gradients = [parameter.grad.clone() for parameter in parameters]


def gradients(config, accelerator):
    loop = train.prepare(config, train.load_tokens(config), accelerator)
    loop.model.double()
    loss = loop.step(3)
    return loss, accelerator.gradients


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_parts_of_a_batch_and_processes_add_up_to_the_whole(out, masked, rows):
    loss, whole = gradients(masked, Part(1, 0))
    config = dataclasses.replace(masked, rows_at_once=rows)
    parts = [gradients(config, Part(2, index)) for index in range(2)] if rows < 3 else [gradients(config, Part(1, 0))]
    bound = 8 * torch.finfo(torch.float32).eps  # the loss is taken in float32, all else here in float64
    torch.testing.assert_close(sum(one for one, _ in parts) / len(parts), loss, rtol=bound, atol=0)
    largest = max(one.abs().max() for one in whole)
    for expected, *found in zip(whole, *(one for _, one in parts), strict=True):
        assert (sum(found) / len(found) - expected).abs().max() <= bound * largest


def test_the_step_is_one_graph_for_the_compiler():
    model, found = Transformer(ENCODER), []
    batch = MASKS.at(torch.randint(0, 299, (3, 16)), 0)
    for loss in (train._loss, torch.compile(train._loss, backend="eager", fullgraph=True)):
        model.zero_grad()
        loss(model, batch).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ------------------------------------------------------------------------------------ trainings


@pytest.mark.parametrize("head", ["tied", "untied", "biased", "mlm"])
def test_a_broken_run_resumes_to_the_bit_with_any_head(out, masked, monkeypatch, head):
    masked = dataclasses.replace(masked, model=dataclasses.replace(ENCODER, head=head))
    straight = quiet(masked)
    weights = straight.load().state_dict()

    def stop(step, _):
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setenv("OFUTILS_OUT", str(out / "again"))
    with pytest.raises(KeyboardInterrupt):
        train.train(masked, report=stop, save_every=7)
    resumed = quiet(masked)
    assert resumed.log == straight.log
    assert all(torch.equal(one, weights[name]) for name, one in resumed.load().state_dict().items())


def test_training_learns_and_is_measured_on_the_same_masks_whatever_the_seed(out, masked):
    masked = dataclasses.replace(masked, steps=60)
    run = quiet(masked)
    assert run.log[-1]["loss"] < run.log[0]["loss"] - 0.3
    tokens = train.load_tokens(masked)
    rows = fixed_batches(tokens.validation, 2, 4, 16, train.masks(dataclasses.replace(masked, seed=9), tokens))
    assert measure(run.load(), rows, loss=lm_loss).loss == run.log[-1]["loss"]


def test_runs_are_measured_and_quantized_on_masked_tokens_here_and_in_processes_alike(out, masked, monkeypatch):
    settings = (quant.QuantSettings(batches=2), quant.QuantSettings(weight_bits=3, activation_bits=3, batches=2))
    evaluation = sweep.Evaluation(sites=("resid_post",), batches=2, batch=4)
    masked = dataclasses.replace(masked, steps=60)
    jobs = [sweep.Job("vanilla", dataclasses.replace(masked, seed=seed), settings, evaluation) for seed in range(2)]
    here = sweep.run(jobs, workers=0)
    monkeypatch.setenv("OFUTILS_OUT", str(out / "processes"))
    apart = sweep.run(jobs, workers=2)
    for one, other in zip(here, apart, strict=True):
        assert one.error is None and other.error is None
        assert one.quantized["W8A8"] == pytest.approx(one.measured["loss"], abs=1e-2)
        assert one.quantized["W3A3"] != one.quantized["W8A8"]
        assert one.measured["loss"] == one.run.log[-1]["loss"]
        assert other.measured["loss"] == pytest.approx(one.measured["loss"], abs=1e-4)
        assert other.quantized == pytest.approx(one.quantized, abs=1e-2)


def test_the_names_of_older_runs_stay(config, masked):
    assert "objective" not in differing(config) and differing(masked)["objective"] == "mlm"
    assert train.TrainConfig().name == "train-c20a57f8493a"
    model = TransformerConfig(layers=2, attention={"gate": "linear"})
    assert train.TrainConfig(model=model, seed=3, optimizer="soap").name == "train-8ecbae024e51"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"objective": "mlm"}, "objective mlm needs model.causal False"),
        ({"model": ENCODER}, "objective clm needs model.causal True"),
        (
            {"objective": "mlm", "model": ENCODER, "bpe": 300},
            "bpe 300 is more than model.vocab 300 leaves for text, 299",
        ),
    ],
)
def test_objectives_that_make_no_sense_are_one_clear_line(config, bad, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **bad)
