"""Token counts: of a text, as shipped, and through the authors' mapping."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ofutils import UserError, frequency, hub
from ofutils.studies.token_frequency import counts


def test_count_equals_counting_by_hand():
    tokenizer = hub.tokenizer(hub.STAND_IN)
    found = frequency.count(tokenizer, ["ab a", "b"])
    named = {tokenizer.convert_ids_to_tokens(i): int(found[i]) for i in found.nonzero().flatten().tolist()}
    assert named == {"[CLS]": 2, "[SEP]": 2, "a": 2, "##b": 1, "b": 1}
    assert frequency.count(tokenizer, ["ab a", "b"], special=False).sum() == 4


def test_kinds_leave_out_what_they_say():
    tokenizer = hub.tokenizer(hub.STAND_IN)
    found = frequency.kinds(tokenizer)
    left = {
        name: set(tokenizer.convert_ids_to_tokens(ids.nonzero().flatten().tolist())) for name, ids in found.items()
    }
    assert left["all"] - left["no specials"] == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert {".", ",", "#"} <= left["no specials"] - left["words"]
    assert {"a", "##a", "7"} <= left["words"]


def test_a_tokenizer_without_shipped_counts_is_one_clear_line():
    with pytest.raises(UserError, match=r"no token counts for this tokenizer \(\d+ tokens\): .*bert-base-uncased"):
        frequency.shipped(hub.tokenizer(hub.STAND_IN))


def test_the_mapping_of_the_authors_loses_every_continuation_piece():
    tokenizer = hub.tokenizer(hub.STAND_IN)
    tokens = ["a", "##a", "##b", "#", "."]
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    given = torch.zeros(len(tokenizer), dtype=torch.float64)
    for token, value in {"a": 50, "##a": 40, "##b": 30, "#": 35, ".": 10}.items():
        given[ids[token]] = value
    found = counts.as_the_authors(tokenizer, given)
    assert {token: int(found[one]) for token, one in ids.items()} == {"a": 50, "##a": 0, "##b": 0, "#": 30, ".": 10}


def test_the_mapping_of_the_authors_loses_what_stands_after_a_space():
    """RoBERTa's full stop after a space decodes to the one without, which takes the count of both."""
    inner = Tokenizer(models.BPE({"<s>": 0, "Ġ": 1, ".": 2, "Ġ.": 3, "a": 4, "Ġa": 5}, [("Ġ", "."), ("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    given = torch.tensor([0, 0, 90, 90, 20, 10], dtype=torch.float64)  # each full stop has the total of both
    assert counts.as_the_authors(tokenizer, given).tolist() == [0, 0, 90, 0, 20, 10]


@pytest.fixture(scope="module")
def berts():
    if not hub.find_minilm():
        pytest.skip(hub.GET_MINILM)
    return hub.tokenizer(hub.MINILM)


def test_the_shipped_counts_of_bert(berts):
    found = frequency.shipped(berts)
    assert found["both"].sum() == 4_236_308_253 and (found["both"] > 0).sum() == 29_160
    the, cls, piece = berts.convert_tokens_to_ids(["the", "[CLS]", "##s"])
    assert found["wikipedia"][the] == 149_611_994 and found["books"][cls] == 68_645_476
    wrong = counts.as_the_authors(berts, found["both"])
    assert found["both"][piece] > 1e6 and wrong[piece] == 0
    pieces = [i for token, i in berts.get_vocab().items() if token.startswith("##")]
    counted = found["both"][pieces] > 0
    assert counted.sum() == 5465 and wrong[pieces].sum() == 0
    assert (wrong != found["both"]).sum() == 5466


def test_the_shipped_counts_of_roberta_say_what_cannot_be_recovered():
    """Without the tokenizer, from the file alone."""
    import pyarrow.parquet

    path = frequency.resources.files("ofutils") / "papers" / "counts" / "roberta-base.parquet"
    table = pyarrow.parquet.read_table(path).to_pandas()
    shared = table[table["shared"]]
    strings = shared[["wikipedia", "books"]].drop_duplicates()
    assert len(shared) == 378 and len(strings) <= 26
    own = table[~table["shared"]][["wikipedia", "books"]].to_numpy().sum()
    assert own == 4_390_094_768 - 392_376_479


def test_tables_are_the_counts_by_name():
    tokenizer, texts = hub.tokenizer(hub.STAND_IN), ["ab a", "b"]
    found, own = counts.token_counts(tokenizer, texts, "text"), frequency.count(tokenizer, texts)
    assert torch.equal(found["counts"], own) and torch.equal(found["this text"], own)
    assert torch.equal(found["authors' mapping"], counts.as_the_authors(tokenizer, own))
    with pytest.raises(UserError, match="counts must be shipped or text, got 'own'"):
        counts.token_counts(tokenizer, texts, "own")


def test_tables_of_shipped_counts(berts):
    found = counts.token_counts(berts, ["the cat"])
    the, piece = berts.convert_tokens_to_ids(["the", "##s"])
    assert found["counts"][piece] == 13_768_496 and found["authors' mapping"][piece] == 0
    assert found["this text"][the] == 1 and found["counts"][the] == found["authors' mapping"][the] == 189_002_637
