"""The task bigram-backcopy: its chain, its rows, its bound, and that training takes it like any corpus."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ofutils import UserError, backcopy, data, sweep, train
from ofutils.batches import fixed_batches
from ofutils.quant import QuantSettings
from ofutils.sweep import Evaluation, Job

TEXTS = ["The cat sat on the mat; that cat, the fat one!", "A rat ate the hat of the cat at the table"] * 3


@pytest.fixture(scope="module")
def chain():
    return backcopy.chain(backcopy.count(TEXTS), vocab=12, triggers=2)


@pytest.fixture(scope="module")
def real():
    """The chain of the standard library's text."""
    return data.backcopy_chain("backcopy", 28)


def test_counts_are_those_of_letters_and_single_spaces():
    counts = backcopy.count(["Aa, b\n\n1b"])
    assert counts.singles == {"a": 2, " ": 2, "b": 2}
    assert counts.pairs == {("a", "a"): 1, ("a", " "): 1, (" ", "b"): 2, ("b", " "): 1}


def test_triggers_are_the_most_frequent_and_what_follows_them_is_a_copy(chain):
    counts = backcopy.count(TEXTS).singles
    assert list(chain.characters) == sorted(chain.characters, key=counts.get, reverse=True)
    rows = chain.rows(500, 40, seed=3).astype(int)
    assert (rows[:, 0] == backcopy.START).all() and (rows[:, 1:] > 0).all() and rows.max() < 12
    assert (rows[:, 1] > 2).all()  # the first character is no trigger
    triggered = (rows[:, 2:-1] <= 2) & (rows[:, 2:-1] > 0)
    assert triggered.sum() > 1000
    assert (rows[:, 3:][triggered] == rows[:, 1:-2][triggered]).all()
    assert not (triggered[:, 1:] & triggered[:, :-1]).any()  # so none has a trigger before it


def test_free_characters_follow_the_bigrams(real):
    rows = real.rows(4000, 40, seed=1).astype(int)
    last, then = rows[:, 1:-1].ravel(), rows[:, 2:].ravel()
    for one in range(4, 28):
        n = (last == one).sum()
        found = np.bincount(then[last == one], minlength=28) / n
        assert n > 20 and np.abs(found - real.steps[one]).max() < 5 * 0.5 / n**0.5  # five standard errors at most


def test_frequencies_are_the_stationary_ones(real):
    """Of the pairs (before, last): a trigger swaps them, anything else is followed by a draw."""
    pairs, free = np.full((28, 28), 1.0), np.arange(28) > 3
    pairs[backcopy.START] = pairs[:, backcopy.START] = pairs[:, :4] = 0
    pairs /= pairs.sum()
    for _ in range(1000):
        pairs = np.where(free[:, None], pairs.sum(0)[:, None] * real.steps, pairs.T)
    rows = real.rows(4000, 200, seed=2)
    late = np.bincount(rows[:, 100:].ravel(), minlength=28) / rows[:, 100:].size
    spread = 5 * (pairs.sum(0) * 25 / rows[:, 100:].size) ** 0.5  # five errors, were every 25th draw independent
    assert (np.abs(late - pairs.sum(0)) < spread + 1e-4).all()


@pytest.mark.parametrize("triggers", [0, 2])
def test_the_bound_is_what_the_true_predictor_reaches(triggers):
    chain = backcopy.chain(backcopy.count(TEXTS), vocab=12, triggers=triggers)
    losses = [chain.loss(chain.rows(200, 33, seed=seed)) for seed in range(40)]
    error = np.std(losses) / len(losses) ** 0.5
    assert abs(np.mean(losses) - chain.bound(33)) < 4 * error
    rows = chain.rows(200, 33, seed=0)
    tempered = replace(chain, steps=chain.steps**0.5 / (chain.steps**0.5).sum(1, keepdims=True))
    assert tempered.loss(rows) > chain.loss(rows)
    assert replace(chain, triggers=0).loss(rows) > chain.loss(rows) or triggers == 0


def test_bad_shapes_are_one_line(out):
    counts = backcopy.count(TEXTS)
    with pytest.raises(UserError, match="too few for 30 ids"):
        backcopy.chain(counts, 30)
    with pytest.raises(UserError, match="10 triggers of 11 characters leave none to copy"):
        backcopy.chain(counts, 12, 10)
    with pytest.raises(UserError, match="backcopy of 10 characters has no row of 16"):
        data.tokens("backcopy", 10, 28, 16)
    with pytest.raises(UserError, match="'backcopy-x': no such file or folder"):
        data.tokens("backcopy-x", 0, 28, 16)


def test_the_task_is_a_corpus_like_any_other(out, config, monkeypatch):
    """Rows begin with `<s>`, runs resume, records name the corpus, quantization and metrics work."""
    tokens = data.tokens("backcopy", 4096, 28, 16)
    assert tokens.train.shape == (4096,) and not tokens.train.reshape(-1, 16)[:, 0].any()
    assert data.fingerprint("backcopy") == tokens.corpus != data.fingerprint("backcopy-2")
    again = data.tokens("backcopy", 4096, 28, 16)
    assert np.array_equal(again.train, tokens.train) and isinstance(again.train, np.memmap)
    config = replace(config, model=replace(config.model, vocab=28), corpus="backcopy", characters=4096)
    assert all((row[:, 0] == 0).all() for row in fixed_batches(tokens.validation, 2, 4, 16))
    job = Job("vanilla", config, (QuantSettings(batches=2),), Evaluation(("resid_post", "probs"), 2, 4))
    (outcome,) = sweep.run([job], workers=0)
    assert outcome.error is None and outcome.run.record["environment"]["corpus"] == tokens.corpus
    assert 0 < outcome.measured["sites"]["blocks.0.probs"]["sink"] < 1
    bound = data.backcopy_chain("backcopy", 28).bound(16)
    assert bound < outcome.measured["loss"] < np.log(28) + 0.5 and len(outcome.quantized) == 1
    sgd = replace(config, optimizer="sgd", lr=0.1)
    straight = train.train(sgd, report=lambda *_: None)

    def stop(step, loss):
        raise train.Stopped

    monkeypatch.setenv("OFUTILS_OUT", str(out / "again"))
    with pytest.raises(train.Stopped):
        train.train(sgd, report=stop)
    assert train.checkpoint(sgd).is_file()
    assert train.train(sgd, report=lambda *_: None).log == straight.log


def test_the_true_predictor_as_logits_has_the_bound_as_its_loss(chain):
    """`clm_loss` counts what `Chain.loss` counts."""
    from ofutils.transformer import clm_loss

    rows = chain.rows(300, 20, seed=4).astype(int)
    logits = np.full((300, 20, 12), -1e9)
    for place in range(19):
        last = rows[:, place]
        with np.errstate(divide="ignore"):
            logits[:, place] = np.log(np.broadcast_to(chain.first, (300, 12)) if place == 0 else chain.steps[last])
        copies = (last > 0) & (last <= 2)
        logits[copies, place] = np.where(np.arange(12) == rows[copies, place - 1, None], 0.0, -1e9)
    found = clm_loss(torch.from_numpy(np.nan_to_num(logits, neginf=-1e9)).float(), torch.from_numpy(rows))
    assert float(found) == pytest.approx(chain.loss(rows), rel=1e-5)
