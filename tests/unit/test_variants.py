"""Texts that lose one property: what each keeps, what it loses, and that names of old runs stay."""

import dataclasses

import numpy as np
import pytest

from ofutils import UserError, train, variants
from ofutils.records import differing


@pytest.fixture
def texts(out, config, corpus):
    """variant -> tokens, with a tokenizer of 280 ids and a model of 600, of a text with lines."""
    for path in corpus.iterdir():
        path.write_text(path.read_text().replace(" of ", "\n"))
    model = dataclasses.replace(config.model, vocab=600)
    base = dataclasses.replace(config, model=model, bpe=280)
    return {name: train.load_tokens(dataclasses.replace(base, variant=name)) for name in variants.VARIANTS}


def entropy(ids):
    share = np.bincount(ids) / len(ids)
    return -(share[share > 0] * np.log2(share[share > 0])).sum()


def test_every_variant_fits_the_model_and_is_the_same_at_every_call(out, texts, config):
    for name, tokens in texts.items():
        again = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=600), bpe=280, variant=name)
        assert np.array_equal(train.load_tokens(again).train, tokens.train)
        assert max(tokens.train.max(), tokens.validation.max()) < 600
        assert tokens.corpus == texts["natural"].corpus


def test_flattened_keeps_the_text_and_levels_its_frequencies(texts):
    natural, flat = texts["natural"], texts["flattened"]
    copies = variants.split_sizes(np.bincount(natural.train, minlength=280), 600)
    assert copies.min() == 1 and 590 <= copies.sum() <= 600
    back = np.repeat(np.arange(280), copies)
    for split in ("train", "validation"):
        assert np.array_equal(back[getattr(flat, split)], getattr(natural, split))
    assert entropy(flat.train) > entropy(natural.train) + 1
    before, after = (np.bincount(tokens.train).max() / len(tokens.train) for tokens in (natural, flat))
    assert after < before / 4
    common = natural.train == np.bincount(natural.train).argmax()
    assert np.bincount(flat.train[common])[flat.train[common].min() :].min() > 0  # every copy is used


def test_evenly_split_keeps_the_text_and_the_shape_of_its_frequencies(texts):
    natural, split = texts["natural"], texts["evenly split"]
    assert np.array_equal(split.train // 2, natural.train) and np.array_equal(
        split.validation // 2, natural.validation
    )
    assert entropy(split.train) == pytest.approx(entropy(natural.train) + 1, abs=0.05)
    counts = np.bincount(split.train, minlength=560).reshape(-1, 2)
    often = counts.sum(1) > 400
    assert often.any() and (np.abs(counts[often, 0] / counts[often].sum(1) - 0.5) < 0.1).all()


def test_what_cannot_be_split_is_one_clear_line():
    with pytest.raises(UserError, match="4 ids cannot be split into 3"):
        variants.split_sizes(np.ones(4), 3)
    with pytest.raises(UserError, match="nothing was counted"):
        variants.split_sizes(np.zeros(4), 8)


def test_shuffled_keeps_the_frequencies_and_uniform_neither(texts):
    natural, shuffled, uniform = (texts[name].train for name in ("natural", "shuffled", "uniform"))
    assert np.array_equal(np.bincount(natural), np.bincount(shuffled)) and not np.array_equal(natural, shuffled)
    assert len(uniform) == len(natural) and uniform.max() > 500
    assert entropy(uniform) > entropy(natural) + 1


def test_separators_stand_where_they_should_and_nowhere_else(texts, config):
    natural, one, many = (texts[name] for name in ("natural", "one separator", "many separators"))
    at = np.flatnonzero(one.train == 280)
    assert np.array_equal(at, np.arange(0, len(one.train), config.model.context))
    lines = [index for index in range(280) if "Ċ" in natural.tokenizer.id_to_token(index)]
    after = np.flatnonzero(many.train == 280)
    assert np.isin(many.train[after - 1], lines).all() and len(after) == np.isin(natural.train, lines).sum() > 0
    for tokens in (one, many):
        assert np.array_equal(tokens.train[tokens.train != 280], natural.train)


def test_a_variant_without_a_free_id_is_one_clear_line(out, config):
    with pytest.raises(UserError, match="'flattened' needs ids beyond the tokenizer's 300: set bpe below"):
        train.load_tokens(dataclasses.replace(config, variant="flattened"))
    with pytest.raises(UserError, match=r"unknown variant 'flatened' \(did you mean 'flattened'\?\)"):
        dataclasses.replace(config, variant="flatened")
    with pytest.raises(UserError, match="bpe 301 is more than model.vocab 300"):
        dataclasses.replace(config, bpe=301)


def test_the_names_of_older_runs_stay(config):
    assert not {"variant", "bpe"} & set(differing(config))


def test_a_variant_resumes_to_the_bit(out, config, monkeypatch):
    config = dataclasses.replace(config, variant="shuffled")
    whole = train.train(config, report=lambda *_: None)

    def stop(step, _):
        if step == 10:
            raise KeyboardInterrupt

    monkeypatch.setenv("OFUTILS_OUT", str(out / "other"))
    with pytest.raises(KeyboardInterrupt):
        train.train(config, report=stop, save_every=5)
    assert train.train(config, report=lambda *_: None).log == whole.log
