"""Token counts, and correlations against what is planted and against direct formulas."""

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from ofutils import UserError, frequency, hub

VOCAB, WIDTH = 40, 6


class Model(nn.Module):
    """Its one site is what a table says of each (id, position)."""

    def __init__(self, table):
        super().__init__()
        self.table, self.site = nn.Parameter(table), nn.Identity()

    def sites(self):
        return {"site": self.site}

    def forward(self, input_ids, attention_mask=None):
        return self.site(self.table[input_ids, torch.arange(input_ids.shape[1])])


def text(rows=24, longest=9):
    """Rows of ids, frequent ones small, padded with an id that stands in the text too."""
    lengths = torch.randint(3, longest + 1, (rows,))
    ids = (VOCAB * torch.rand(rows, longest) ** 2).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def split(batch, size):
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, 24, size)]


@pytest.fixture
def given():
    model = Model(torch.randn(VOCAB, 9, WIDTH))
    counts = {"zipf": (1e6 / torch.arange(1.0, VOCAB + 1)).round(), "other": torch.rand(VOCAB) * 100}
    counts["other"][torch.tensor([3, 4])] = torch.nan
    kept = {"all": torch.ones(VOCAB, dtype=torch.bool), "odd": torch.arange(VOCAB) % 2 == 1}
    return model, text(), {n: c.double() for n, c in counts.items()}, kept


def flat(model, batch, counts, kept):
    """ids, x and |h| of the tokens that count, as data frames."""
    real = batch["attention_mask"].bool()
    ids, h = batch["input_ids"][real], model(**batch).detach()[real].abs().double()
    inside = kept[ids] & counts[ids].isfinite()
    return ids[inside], pd.Series(counts[ids][inside].numpy()), pd.DataFrame(h[inside].numpy())


@pytest.mark.parametrize("tokens", ["all", "odd"])
@pytest.mark.parametrize("name", ["zipf", "other"])
@pytest.mark.parametrize("level", ["token", "type"])
def test_it_equals_the_direct_formulas(given, tokens, name, level):
    model, batch, counts, kept = given
    found = frequency.correlate(model, split(batch, 5), counts, kept, "site")
    ids, x, h = flat(model, batch, counts[name], kept[tokens])
    if level == "type":
        x, h = x.groupby(ids.numpy()).mean(), h.groupby(ids.numpy()).mean()
    assert found.tokens(tokens, name, level) == len(x)
    expected = {
        "raw": h.corrwith(x),
        "log": h.corrwith(np.log1p(x)),
        "spearman": h.rank().corrwith(x.rank()),
    }
    for measure in frequency.MEASURES:
        assert found.r(measure, tokens, name, level)[0].tolist() == pytest.approx(
            expected[measure].tolist(), abs=1e-9
        )


def test_the_split_into_batches_changes_nothing(given, monkeypatch):
    model, batch, counts, kept = given
    for first in (4096, 50):  # all tokens settle the bins, and the first 50
        monkeypatch.setattr(frequency, "_FIRST", first)
        one, other = (frequency.correlate(model, split(batch, size), counts, kept, "site") for size in (24, 7))
        for measure in frequency.MEASURES:
            assert torch.allclose(one.r(measure, "odd", "other"), other.r(measure, "odd", "other"))
        assert torch.allclose(one.interval("raw", "all", "zipf"), other.interval("raw", "all", "zipf"))


def test_many_tokens_share_bins_and_the_rank_correlation_hardly_changes(given):
    model, _, counts, kept = given
    batches = [text() for _ in range(40)]
    ranks = frequency.correlate(model, batches, counts, kept, "site").r("spearman", "all", "zipf")[0]
    parts = [flat(model, batch, counts["zipf"], kept["all"])[1:] for batch in batches]
    x, h = pd.concat([x for x, _ in parts], ignore_index=True), pd.concat([h for _, h in parts], ignore_index=True)
    assert ranks.tolist() == pytest.approx(h.rank().corrwith(x.rank()).tolist(), abs=3e-3)


def test_a_planted_dimension_is_found_and_the_others_are_not(given):
    _, _, counts, kept = given
    table = torch.randn(VOCAB, 9, WIDTH)
    table[:, :, 2] = counts["zipf"].float()[:, None] * torch.where(torch.rand(VOCAB, 9) < 0.5, -1, 1)
    table[:, :, 4] = counts["zipf"].log1p().float()[:, None]
    table[:, :, 5] = 7.0
    found = frequency.correlate(Model(table), [text() for _ in range(20)], counts, kept, "site")
    raw, log, ranks = (found.r(measure, "all", "zipf")[0] for measure in frequency.MEASURES)
    assert raw[2] == pytest.approx(1, abs=1e-6) and log[4] == pytest.approx(1, abs=1e-6)
    assert ranks[2] == pytest.approx(1, abs=1e-3) and ranks[4] == pytest.approx(1, abs=1e-3)
    assert raw[[0, 1, 3]].abs().max() < 0.2
    assert raw[5].isnan() and ranks[5].isnan()
    low, high = found.interval("raw", "all", "zipf")[:, 0]
    assert (low[:5] <= raw[:5] + 1e-9).all() and (raw[:5] <= high[:5] + 1e-9).all()
    assert (high - low)[[0, 1, 3]].min() > 0.01


def test_padding_counts_nowhere(given):
    model, batch, counts, kept = given
    longer = {n: torch.cat([v, torch.zeros(24, 0, dtype=torch.long)], 1) for n, v in batch.items()}
    longer["input_ids"] = longer["input_ids"].masked_fill(longer["attention_mask"] == 0, 17)
    one, other = (frequency.correlate(model, [b], counts, kept, "site") for b in (batch, longer))
    for measure in frequency.MEASURES:
        assert torch.equal(one.r(measure, "all", "zipf"), other.r(measure, "all", "zipf"))


def test_bad_input_is_one_clear_line(given):
    model, batch, counts, kept = given
    with pytest.raises(UserError, match="no batches"):
        frequency.correlate(model, [], counts, kept, "site")
    with pytest.raises(UserError, match="beyond the counts, which have 3 ids"):
        frequency.correlate(model, [batch], {"zipf": torch.ones(3)}, kept, "site")
    found = frequency.correlate(model, [batch], counts, kept, "site")
    with pytest.raises(UserError, match="did you mean 'zipf'"):
        found.r("raw", "all", "zpif")
    with pytest.raises(UserError, match="known: raw, log, spearman"):
        found.r("kendall", "all", "zipf")
    with pytest.raises(UserError, match="intervals are of raw and log"):
        found.interval("spearman", "all", "zipf")


# --- counts


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
    counts = torch.zeros(len(tokenizer), dtype=torch.float64)
    for token, value in {"a": 50, "##a": 40, "##b": 30, "#": 35, ".": 10}.items():
        counts[ids[token]] = value
    found = frequency.as_the_authors(tokenizer, counts)
    assert {token: int(found[one]) for token, one in ids.items()} == {"a": 50, "##a": 0, "##b": 0, "#": 30, ".": 10}


def test_the_mapping_of_the_authors_loses_what_stands_after_a_space():
    """RoBERTa's full stop after a space decodes to the one without, which takes the count of both."""
    inner = Tokenizer(models.BPE({"<s>": 0, "Ġ": 1, ".": 2, "Ġ.": 3, "a": 4, "Ġa": 5}, [("Ġ", "."), ("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    counts = torch.tensor([0, 0, 90, 90, 20, 10], dtype=torch.float64)  # each full stop has the total of both
    assert frequency.as_the_authors(tokenizer, counts).tolist() == [0, 0, 90, 0, 20, 10]


@pytest.fixture(scope="module")
def berts():
    if not hub.find_minilm():
        pytest.skip(hub.GET_MINILM)
    return hub.tokenizer(hub.MINILM)


def test_the_shipped_counts_of_bert(berts):
    counts = frequency.shipped(berts)
    assert counts["both"].sum() == 4_236_308_253 and (counts["both"] > 0).sum() == 29_160
    the, cls, piece = berts.convert_tokens_to_ids(["the", "[CLS]", "##s"])
    assert counts["wikipedia"][the] == 149_611_994 and counts["books"][cls] == 68_645_476
    wrong = frequency.as_the_authors(berts, counts["both"])
    assert counts["both"][piece] > 1e6 and wrong[piece] == 0
    pieces = [i for token, i in berts.get_vocab().items() if token.startswith("##")]
    counted = counts["both"][pieces] > 0
    assert counted.sum() == 5465 and wrong[pieces].sum() == 0
    assert (wrong != counts["both"]).sum() == 5466


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
