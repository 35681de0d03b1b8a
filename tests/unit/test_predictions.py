"""Predictions of constructed models, diversity in closed form, and parts of speech by a tagger of three words."""

import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ofutils import UserError, dims, families, frequency, heads, hub
from ofutils.sentences import mask_tokens, sentence_batches
from ofutils.studies.token_frequency import predictions
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import sentences

SENTENCES = ["the cat sat on the mat", "a dog", "it is what it is, no less"]


@pytest.fixture(scope="module")
def stand_in():
    tokenizer = hub.tokenizer(hub.STAND_IN)
    encoder, head = heads.split(families.from_hf(hub.model(hub.STAND_IN, head="mlm")))
    return tokenizer, encoder, head, sentence_batches(tokenizer, SENTENCES, batch=2)


def test_an_encoder_and_its_head_joined_are_the_model_that_was_split(stand_in):
    _, encoder, head, batches = stand_in
    whole, again = families.from_hf(hub.model(hub.STAND_IN, head="mlm")), predictions.joined(encoder, head)
    with torch.no_grad():
        assert torch.equal(whole(**batches[0]), again(**batches[0]))
    with dims.ablated(again, [3], ("norm2", "head.norm")) as count, torch.no_grad():
        assert count == 2 * 3 and not torch.equal(whole(**batches[0]), again(**batches[0]))


def test_a_model_that_copies_predicts_what_it_sees_and_padding_is_left_out(stand_in):
    tokenizer, _, _, batches = stand_in
    shape = {"vocab": len(tokenizer), "layers": 1, "width": 64, "heads": 2, "context": 32, "head": "mlm"}
    model = Transformer(
        TransformerConfig(**shape, causal=False, norm_position="post", embedding={"norm": True})
    ).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.position_embedding.weight.zero_()
        model.token_embedding.weight.normal_()
        model.head.dense.weight.copy_(torch.eye(64))
        model.head.dense.bias.fill_(10)  # the activation passes on what is positive
    kept = frequency.kinds(tokenizer)["no specials"]
    rows = predictions.predict(model, batches)
    real = predictions.at([batch["input_ids"] for batch in batches], batches, kept)
    assert torch.equal(predictions.at(rows, batches, kept), real)
    assert len(real) == sum(len(sentence.replace(" ", "")) for sentence in SENTENCES)


def test_a_trained_head_repeats_what_it_sees_and_leaves_the_encoder_alone(stand_in):
    tokenizer, encoder, _, _ = stand_in
    batches = sentence_batches(tokenizer, sentences(48))
    kept = frequency.kinds(tokenizer)["no specials"]
    before = [parameter.clone() for parameter in encoder.parameters()]
    whole, again = (predictions.with_trained_head(encoder, tokenizer, batches[:2], kept, 300, 1) for _ in range(2))
    real = predictions.at([batch["input_ids"] for batch in batches[2:]], batches[2:], kept)
    rows = predictions.predict(whole, batches[2:])
    assert (predictions.at(rows, batches[2:], kept) == real).double().mean() > 0.5
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before, strict=True))


def test_predictions_without_dimensions_are_those_of_the_ablated_model(stand_in):
    _, encoder, head, batches = stand_in
    model = predictions.joined(encoder, head)
    sets = {"full": ((), "norm2"), "none left": (range(31), "norm2")}
    found = predictions.predict_without(model, batches, sets)
    with dims.ablated(model, range(31)):
        expected = predictions.predict(model, batches)
    for rows, others in ((found["none left"], expected), (found["full"], predictions.predict(model, batches))):
        assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))
    assert any((a != b).any() for a, b in zip(found["full"], expected, strict=True))


def test_a_model_without_a_head_is_one_clear_line(stand_in):
    with pytest.raises(UserError, match="no MLM head, but none"):
        predictions.predict(stand_in[1], stand_in[3])


def test_diversity_in_closed_form():
    counts = torch.tensor([0.0, 1.0, float("nan"), 3.0]).double()
    found = predictions.diversity(torch.tensor([0] * 4 + [1] * 2 + [2, 3]), counts)
    assert found["distinct types"] == 4 and found["entropy (bits)"] == pytest.approx(1.75)
    assert found["share of ten"] == 1
    assert found["mean log count"] == pytest.approx(
        (2 * torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(4.0))) / 7
    )
    even = predictions.diversity(torch.arange(40), torch.ones(40))
    assert even["share of ten"] == 0.25 and even["entropy (bits)"] == pytest.approx(torch.log2(torch.tensor(40.0)))
    few = predictions.diversity(torch.arange(40), torch.ones(4))  # ids beyond the counts
    assert few["mean log count"] == pytest.approx(even["mean log count"])
    assert predictions.diversity(torch.full((9,), 7), torch.ones(40))["entropy (bits)"] == 0


# --- parts of speech


def wordpiece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "run", "##s", "##ning", ",", "dog"]
    inner = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles, mask_token="[MASK]")


def bytewise():
    pieces = ["<s>", "Ġthe", "Ġrun", "ning", ",", "Ġcat", "cat", "Ġ"]
    inner = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def tag(spelled):
    """A word that is not in the list is a noun; `the` makes any word behind it one."""
    known = {"the": "DET", ",": "PUNCT", "runs": "VERB", "running": "VERB", "run": "VERB"}
    after = [False, *(word == "the" for word in spelled[:-1])]
    return ["NOUN" if noun else known.get(word, "NOUN") for word, noun in zip(spelled, after, strict=True)]


def ids(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


@pytest.mark.parametrize(
    ("tokenizer", "text", "spelled", "place"),
    [
        (wordpiece(), "the cat run ##s , run ##ning", ["the", "cat", "runs", ",", "running"], [0, 1, 2, 2, 3, 4, 4]),
        (wordpiece(), "##s the", ["s", "the"], [0, 1]),
        (bytewise(), "Ġthe Ġrun ning , cat", ["the", "running", ",", "cat"], [0, 1, 1, 2, 3]),
        (bytewise(), "cat Ġ Ġcat", ["cat", " ", "cat"], [0, 1, 2]),
    ],
)
def test_words_and_where_they_stand(tokenizer, text, spelled, place):
    assert predictions.words(tokenizer, ids(tokenizer, text)) == (spelled, place)
    assert predictions.words(tokenizer, []) == ([], [])
    assert predictions.words(tokenizer, [99])[1] == [0]  # an id that the tokenizer lacks


def masked(tokenizer, true, made, asked):
    """One row, with padding, as `mask_tokens` and `predict` give it."""
    true, made = (["[CLS]", *text.split(), "[SEP]", "[PAD]"] for text in (true, made))
    true, made = (torch.tensor([tokenizer.convert_tokens_to_ids(row)]) for row in (true, made))
    asked = torch.tensor([[i - 1 in asked for i in range(true.shape[1])]])
    batch = {"input_ids": true.masked_fill(asked, tokenizer.mask_token_id), "attention_mask": (true != 0).long()}
    return [(batch, torch.where(asked, true, -100))], [made]


def test_tags_are_those_of_the_word_in_its_sentence():
    given = masked(wordpiece(), "cat run ##s , the dog", "dog cat ##ning , dog cat", {1, 2, 4})
    pairs = predictions.parts_of_speech(wordpiece(), *given, tag)
    assert pairs == [("VERB", "NOUN"), ("VERB", "NOUN"), ("DET", "NOUN")]
    given = masked(wordpiece(), "cat run ##s the dog", "cat the dog run run", {1, 4})
    # `the ##s` is one word now; `the run` makes a noun of a verb
    assert predictions.parts_of_speech(wordpiece(), *given, tag) == [("VERB", "NOUN"), ("NOUN", "NOUN")]


def test_the_authors_way_tags_each_token_alone():
    given = masked(wordpiece(), "cat run ##s the dog", "cat the dog run run", {1, 4})
    found = predictions.parts_of_speech(wordpiece(), *given, tag, alone=True)
    assert found == [("VERB", "DET"), ("NOUN", "VERB")]


def test_positions_that_are_not_masked_do_not_count(stand_in):
    tokenizer, encoder, head, batches = stand_in
    given = [mask_tokens(batch, tokenizer, seed) for seed, batch in enumerate(batches)]
    rows = predictions.predict(predictions.joined(encoder, head), [batch for batch, _ in given])
    for alone in (False, True):
        pairs = predictions.parts_of_speech(tokenizer, given, rows, lambda words: ["X"] * len(words), alone)
        assert pairs == [("X", "X")] * sum(int((labels != -100).sum()) for _, labels in given)


def test_confusion_counts_in_closed_form():
    pairs = [("NOUN", "NOUN")] * 3 + [("NOUN", "VERB")] * 2 + [("DET", "NOUN")] * 4 + [("ADP", "X")]
    found = predictions.confusion(pairs)
    assert list(found.index) == list(found.columns) == ["NOUN", "DET", "ADP", "VERB", "X"]
    assert found.loc["NOUN"].tolist() == [3, 0, 0, 2, 0] and found.loc["DET"].tolist() == [4, 0, 0, 0, 0]
    assert found.loc["VERB"].sum() == 0 and found.to_numpy().sum() == len(pairs)


SPACY = """
class Token:
    def __init__(self, word): self.pos_ = word.upper()
def load(name, exclude):
    if name != "en_core_web_sm": raise OSError(name)
    pipeline = lambda doc: [Token(word) for word in doc]
    pipeline.vocab = None
    return pipeline
"""


@pytest.fixture
def spacy(tmp_path, monkeypatch):
    """A package of that name, as much of it as is used."""
    (tmp_path / "spacy").mkdir()
    (tmp_path / "spacy" / "__init__.py").write_text(SPACY)
    (tmp_path / "spacy" / "tokens.py").write_text("def Doc(vocab, words): return words\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "spacy"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in ("spacy", "spacy.tokens"):
        sys.modules.pop(name, None)


def test_spacy_tags_words_as_they_are_given(spacy, capsys):
    tagger = predictions.find_tagger()
    assert tagger(["a", "b"]) == ["A", "B"] == tagger(["a", "b"])
    assert capsys.readouterr().out == ""
    assert predictions.find_tagger("en_core_web_xl") is None
    assert "en_core_web_xl is missing" in capsys.readouterr().out


def test_without_spacy_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert predictions.find_tagger() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert 'pip install -e ".[pos]"' in line and "python -m spacy download en_core_web_sm" in line
