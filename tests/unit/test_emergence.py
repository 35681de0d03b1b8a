"""Dimensions followed through checkpoints: the three numbers, the standing among others, when it is reached."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from ofutils import hub, sources, train
from ofutils.sources import Sources
from ofutils.studies.pretraining_data import emergence, speech
from ofutils.transformer import Transformer, TransformerConfig

SHAPE = {"vocab": 40, "layers": 2, "width": 8, "heads": 2, "context": 16}
POST = {"norm_position": "post", "causal": False, "activation": "gelu", "head": "mlm", "embedding": {"norm": True}}
ALL = torch.ones(40, dtype=torch.bool)


def measured(model, ids, counts=None, kept=ALL):
    return emergence.dimensions(model.eval(), [ids], torch.arange(40.0) if counts is None else counts, kept)


@pytest.mark.parametrize("form", [{}, POST], ids=["pre-norm", "post-norm"])
def test_a_gain_moves_its_own_dimension_and_no_other(form):
    model, ids = Transformer(TransformerConfig(**SHAPE, **form)), torch.randint(40, (4, 16))
    assert measured(model, ids)["weight"].eq(0).all()  # all gains are 1, all biases 0
    norm = "norm2" if form else "norm1"
    for block in model.blocks:
        getattr(block, norm).weight.data[5] = 3.0
    found = measured(model, ids)
    assert found["weight"].argmax() == 5
    # one of D numbers differs: it lies (D - 1) / sqrt(D) unbiased standard deviations from the mean
    others = 1 if form else 5  # norms: two of norm2; two of norm1, two of norm2 and the last one
    share = 1 if form else 2 / others
    assert found["weight"][5] == pytest.approx(share * 7 / 8**0.5)
    if form:
        assert found["size"].argmax() == 5


def test_size_does_not_depend_on_the_scale_of_the_stream_and_finds_a_large_dimension():
    model, ids = Transformer(TransformerConfig(**SHAPE)), torch.randint(40, (4, 16))
    before = measured(model, ids)
    model.token_embedding.weight.data[:, 3] += 5
    found = measured(model, ids)
    assert found["size"].argmax() == 3 and found["size"][3] > 2 > before["size"].max() - 1
    assert (found["size"] <= 7 / 8**0.5 + 1e-9).all()


def test_frequency_is_of_the_tokens_that_are_kept():
    model, ids = Transformer(TransformerConfig(**SHAPE)), torch.randint(40, (8, 16))
    counts = torch.arange(40.0).square()
    model.token_embedding.weight.data[:, 3] = 0.1 * counts.sqrt()  # large at frequent ids
    model.position_embedding.weight.data.zero_()
    assert measured(model, ids, counts)["frequency"][3] > 0.9
    kept = ALL.clone()
    kept[20:] = False
    changed = counts.clone()
    changed[20:] = 1e9
    assert torch.equal(
        measured(model, ids, counts, kept)["frequency"], measured(model, ids, changed, kept)["frequency"]
    )
    assert measured(model, ids, torch.ones(40))["frequency"].eq(0).all()  # nothing to go with


def test_the_batches_do_not_matter():
    model, ids = Transformer(TransformerConfig(**SHAPE)).eval(), torch.randint(40, (8, 16))
    whole = emergence.dimensions(model, [ids], torch.arange(40.0), ALL)
    parts = emergence.dimensions(model, ids.split(3), torch.arange(40.0), ALL)
    for name in emergence.MEASURES:
        assert torch.allclose(whole[name], parts[name])


def rows(**numbers):
    """A training of two checkpoints, five dimensions."""
    steps = {0: dict.fromkeys(emergence.MEASURES, [1.0] * 5), 8: numbers}
    found = [
        pd.DataFrame(values).rename_axis("dimension").reset_index().assign(step=step)
        for step, values in steps.items()
    ]
    return pd.concat(found).assign(text="natural", seed=1)


def test_standing_is_one_for_the_same_dimensions_and_a_half_by_chance():
    size = [9.0, 8.0, 1.0, 2.0, 3.0]
    found = rows(size=size, weight=[5.0, 6.0, 0.0, 1.0, 2.0], frequency=[-1.0, 0.5, 0.0, 0.0, 0.0])
    assert emergence.largest(found, 2) == {("natural", 1): [0, 1]}
    standing = emergence.standings(found, 2).set_index("step")
    assert standing.loc[0, [*emergence.MEASURES]].tolist() == [0.5, 0.5, 0.5]
    assert standing.loc[8, [*emergence.MEASURES]].tolist() == [1.0, 1.0, 0.5]
    end = pd.DataFrame(
        {"text": ["a", "b", "c"], "seed": 1, "kurtosis - 1": [1.0, 2, 3], "correlation": [0.2, 0.1, 0.3]}
    )
    claims = {id: values for id, _, values, _, _ in emergence.claims(standing.reset_index(), end, "natural")}
    assert list(claims.pop("he2024-data-correlation")) == pytest.approx([0.5])
    assert {id.rpartition("-")[2]: list(values) for id, values in claims.items()} == {
        "weights": [1.0],
        "frequency": [0.5],
    }
    when = emergence.appear(standing.reset_index(), 0.9).loc[("natural", 1)]
    assert when["size"] == when["weight"] == 8 and np.isnan(when["frequency"])


def test_what_is_reached_and_lost_again_has_not_appeared():
    steps = pd.DataFrame(
        {"step": [0, 1, 2, 4], "size": [0.95, 0.5, 0.95, 1.0], "weight": 1.0, "frequency": [1, 1, 1, 0.5]}
    )
    when = emergence.appear(steps.assign(text="natural", seed=1), 0.9).loc[("natural", 1)]
    assert when["size"] == 2 and when["weight"] == 0 and np.isnan(when["frequency"])


def test_a_training_is_followed_once(out, config):
    subject = emergence.Subject("natural", config.seed, config)
    found = emergence.table([subject])
    assert sorted(found["step"].unique()) == list(train.log_spaced(config.steps))
    assert found["dimension"].nunique() == config.model.width and found[[*emergence.MEASURES]].notna().all().all()
    for path in out.rglob("*.safetensors"):
        path.unlink()
    assert emergence.known(subject) and emergence.table([subject]).equals(found)
    other = dataclasses.replace(subject, source=dataclasses.replace(config, seed=9))
    assert not emergence.known(other)


def test_published_checkpoints_come_by_an_id_each_or_by_a_revision():
    assert sources.place("a/b-step_{}k", 20) == ("a/b-step_20k", "main")
    assert sources.place("a/b", 20) == ("a/b", "step20") and sources.place("a/b") == ("a/b", "main")
    loads = Sources(models=("a/b-{}",), steps=(0, 20, 40), texts=(("t", "p", "s"),))
    assert loads.places == [("a/b-0", "main"), ("a/b-20", "main"), ("a/b-40", "main")]
    (subject,) = emergence.subjects(loads, (), last=20)
    assert subject.source.steps == (0, 20) and subject.key == {
        "published": {"name": "a/b-{}", "steps": (0, 20), "head": None}
    }
    assert emergence.known(subject)


def test_a_bert_is_followed_through_the_same_numbers(out, monkeypatch, tmp_path):
    """The stand-in for each checkpoint: its counts are those of the text, since its vocabulary is not shipped."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(
            f"paragraph {n} says, at great length, that {n} times {n} is {n * n}; so it is." for n in range(40)
        )
    )
    monkeypatch.setattr(hub, "text", lambda *_: text)
    loads = Sources(models=(hub.STAND_IN,), steps=(0,), texts=(("t", "p", "s"),))
    monkeypatch.setattr(sources, "place", lambda name, step=None: (name, "main"))
    found = emergence.table(emergence.subjects(loads, ()))
    assert found["text"].unique().tolist() == ["MultiBERTs"] and found["dimension"].nunique() == 32
    assert found["size"].max() > 1 and found["frequency"].abs().max() > 0.1 and found["weight"].eq(0).all()


# --- speech


def test_the_waveform_is_loud_and_the_same_at_every_call():
    wave = speech.waveform(rows=2, seconds=0.5)
    assert wave.shape == (2, 8000) and torch.equal(wave, speech.waveform(rows=2, seconds=0.5))
    assert torch.allclose(wave.mean(1), torch.zeros(2), atol=1e-5) and torch.allclose(wave.std(1), torch.ones(2))
    spectrum = torch.fft.rfft(wave).abs().square()
    assert (spectrum[:, : 8000 // 4].sum(1) / spectrum.sum(1) > 0.95).all()  # below 4 kHz


def test_the_rule_finds_what_is_planted_in_a_model_that_hears(monkeypatch):
    planted = speech.model(speech.STAND_IN)
    for layer in planted.encoder.layers:
        layer.final_layer_norm.weight[7], layer.final_layer_norm.bias[7] = 9.0, 9.0
    monkeypatch.setattr(speech, "model", lambda name: planted)
    found = speech.row("somebody/wav2vec2")
    assert found["by the rule"] == [7] and found["far in weight"] == found["far in bias"] == 1
    assert 7 in found["largest"] and found["neuron kurtosis - 1"] > 5


def test_the_stand_in_has_no_outliers():
    found = speech.table((speech.STAND_IN,)).loc["wav2vec2"]
    assert found["by the rule"] == [] and found["neuron kurtosis - 1"] < 1 and found["blocks"] == 4
