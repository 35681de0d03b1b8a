"""Correlations against what is planted and against direct formulas."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ofutils import UserError
from ofutils.studies.token_frequency import correlations

VOCAB, WIDTH = 40, 6
ASKED = [
    (m, level)
    for m in correlations.MEASURES
    for level in correlations.LEVELS
    if (m, level) != ("spearman", "position")
]


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
    found = correlations.correlate(model, split(batch, 5), counts, kept, "site")
    ids, x, h = flat(model, batch, counts[name], kept[tokens])
    if level == "type":
        x, h = x.groupby(ids.numpy()).mean(), h.groupby(ids.numpy()).mean()
    assert found.tokens(tokens, name, level) == len(x)
    expected = {
        "raw": h.corrwith(x),
        "log": h.corrwith(np.log1p(x)),
        "spearman": h.rank().corrwith(x.rank()),
    }
    for measure in correlations.MEASURES:
        assert found.r(measure, tokens, name, level)[0].tolist() == pytest.approx(
            expected[measure].tolist(), abs=1e-9
        )


def test_the_split_into_batches_changes_nothing(given, monkeypatch):
    model, batch, counts, kept = given
    for first in (2048, 50):  # all tokens settle the bins, and the first 50
        monkeypatch.setattr(correlations, "_SETTLE", first)
        one, other = (
            correlations.correlate(model, split(batch, size), counts, kept, "site", [4, 1]) for size in (24, 7)
        )
        for measure in correlations.MEASURES:
            assert torch.allclose(one.r(measure, "odd", "other"), other.r(measure, "odd", "other"))
        for measure, level in ASKED:
            asked = (measure, "all", "zipf", level, 0.9, 20)
            assert torch.allclose(one.interval(*asked), other.interval(*asked))


def test_many_tokens_share_bins_and_the_rank_correlation_hardly_changes(given):
    model, _, counts, kept = given
    batches = [text() for _ in range(40)]
    ranks = correlations.correlate(model, batches, counts, kept, "site").r("spearman", "all", "zipf")[0]
    parts = [flat(model, batch, counts["zipf"], kept["all"])[1:] for batch in batches]
    x, h = pd.concat([x for x, _ in parts], ignore_index=True), pd.concat([h for _, h in parts], ignore_index=True)
    assert ranks.tolist() == pytest.approx(h.rank().corrwith(x.rank()).tolist(), abs=3e-3)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_rows_does_not_matter_to_ranks(order, given):
    """A text whose first half has other ids than its second, and |h| falls with frequency."""
    counts = {"ids": torch.arange(float(VOCAB)).double()}
    halves = [torch.randint(0, 8, (500, 9)), torch.randint(8, VOCAB, (700, 9))][::order]
    table = (1 + torch.arange(float(VOCAB)).flip(0))[:, None, None] + 0.1 * torch.rand(VOCAB, 9, 1)
    kept = {"all": torch.ones(VOCAB, dtype=torch.bool)}
    found = correlations.correlate(Model(table), list(torch.cat(halves).split(100)), counts, kept, "site")
    assert float(found.r("spearman", "all", "ids")) == pytest.approx(-1, abs=2e-3)


def test_nan_stays_nan_and_nothing_kept_is_nan(given):
    model, batch, counts, kept = given
    with torch.no_grad():
        model.table[:, :, 3] = torch.nan
    counts["none"], kept["none"] = torch.full((VOCAB,), torch.nan).double(), torch.zeros(VOCAB, dtype=torch.bool)
    found = correlations.correlate(model, [batch], counts, kept, "site", [3, 4])
    for measure, level in ASKED:
        r, ends = (f(measure, "all", "zipf", level) for f in (found.r, found.interval))
        assert r[0, 3].isnan() and ends[:, 0, 0].isnan().all()
        assert r[0, 4].isfinite() and ends[:, 0, 1].isfinite().all()
        assert found.r(measure, "none", "zipf", level).isnan().all()
        assert found.r(measure, "all", "none", level).isnan().all()


def test_a_planted_dimension_is_found_and_the_others_are_not(given):
    _, _, counts, kept = given
    table = torch.randn(VOCAB, 9, WIDTH)
    table[:, :, 2] = counts["zipf"].float()[:, None] * torch.where(torch.rand(VOCAB, 9) < 0.5, -1, 1)
    table[:, :, 4] = counts["zipf"].log1p().float()[:, None]
    table[:, :, 5] = 7.0
    found = correlations.correlate(Model(table), [text() for _ in range(20)], counts, kept, "site", range(WIDTH))
    raw, log, ranks = (found.r(measure, "all", "zipf")[0] for measure in correlations.MEASURES)
    assert raw[2] == pytest.approx(1, abs=1e-6) and log[4] == pytest.approx(1, abs=1e-6)
    assert ranks[2] == pytest.approx(1, abs=1e-3) and ranks[4] == pytest.approx(1, abs=1e-3)
    assert raw[[0, 1, 3]].abs().max() < 0.2
    assert raw[5].isnan() and ranks[5].isnan()
    low, high = found.interval("raw", "all", "zipf")[:, 0]
    assert (low[:5] <= raw[:5] + 1e-9).all() and (raw[:5] <= high[:5] + 1e-9).all()
    assert (high - low)[[0, 1, 3]].min() > 0.01


# --- within positions


def test_within_positions_it_equals_the_direct_formula(given):
    model, batch, counts, kept = given
    found = correlations.correlate(model, split(batch, 5), counts, kept, "site")
    real = batch["attention_mask"].bool()
    place = torch.arange(9).expand(24, 9)[real]
    for tokens, name in (("all", "zipf"), ("odd", "other")):
        ids, x, h = flat(model, batch, counts[name], kept[tokens])
        inside = (kept[tokens] & counts[name].isfinite())[batch["input_ids"][real]]
        x, h = (one - one.groupby(place[inside].numpy()).transform("mean") for one in (x, h))
        assert found.r("raw", tokens, name, "position")[0].tolist() == pytest.approx(h.corrwith(x).tolist(), abs=1e-9)


def test_a_dimension_of_the_position_alone_has_no_correlation_within_positions_and_a_planted_one_keeps_its():
    """Ids are the sum of a part that the position decides and a part of its own; log counts are the ids."""
    rows = 64
    own, place = torch.randint(0, 12, (rows, 9)), torch.arange(9).expand(rows, 9)
    batch = {"input_ids": own + 3 * place, "attention_mask": torch.ones(rows, 9, dtype=torch.long)}
    sign = torch.where(torch.rand(VOCAB, 9) < 0.5, -1.0, 1.0)
    table = torch.stack(
        [
            sign * (10 + place[0]).expand(VOCAB, 9),  # the position alone
            sign * (10.0 + torch.arange(VOCAB)[:, None]).expand(VOCAB, 9),  # the frequency
            10.0 + torch.arange(VOCAB)[:, None] - 3 * torch.arange(9.0),  # the part of its own
            10.0 + place[0] + 1e-3 * torch.rand(VOCAB, 9),  # the position and a trace of noise
        ],
        -1,
    )
    counts, kept = {"ids": torch.arange(float(VOCAB)).double().expm1()}, {"all": torch.ones(VOCAB, dtype=torch.bool)}
    found = correlations.correlate(Model(table), split(batch | {}, 8), counts, kept, "site", [1, 3])
    plain, within = found.r("log", "all", "ids")[0], found.r("log", "all", "ids", "position")[0]
    assert plain[0] > 0.8 and within[0].isnan()  # nothing is left of it
    assert plain[3] > 0.8 and within[3].abs() < 0.15
    assert plain[1] == pytest.approx(1) and within[1] == pytest.approx(1)
    assert plain[2] < 0.6 and within[2] == pytest.approx(1)
    low, high = found.interval("log", "all", "ids", "position")[:, 0]
    assert low[0] == pytest.approx(1) and low[1] < 0 < high[1]


# --- intervals


def brute_force(model, batch, x, rows, measure, level):
    """r over the tokens of these rows, a row as often as it is named, by pandas."""
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows].bool()
    h = pd.DataFrame(model(ids).detach()[mask].abs().double().numpy())
    place, ids = torch.arange(9).expand(len(rows), 9)[mask].numpy(), ids[mask]
    x = pd.Series((x[ids].log1p() if measure == "log" else x[ids]).numpy())
    if level == "type":
        x, h = (one.groupby(ids.numpy()).mean() for one in (x, h))
    if level == "position":
        x, h = (one - one.groupby(place).transform("mean") for one in (x, h))
    x, h = (x.rank(), h.rank()) if measure == "spearman" else (x, h)
    return h.corrwith(x).to_numpy()


@pytest.mark.parametrize(("measure", "level"), ASKED)
def test_an_interval_equals_a_bootstrap_by_brute_force(given, measure, level):
    model, batch, counts, kept = given
    found = correlations.correlate(model, split(batch, 5), counts, kept, "site", [4, 1])
    low, high = found.interval(measure, "all", "zipf", level, coverage=0.8, draws=40)[:, 0]
    drawn = torch.randint(24, (40, 24), generator=torch.Generator().manual_seed(0))
    values = np.stack([brute_force(model, batch, counts["zipf"], rows, measure, level)[[4, 1]] for rows in drawn])
    values += brute_force(model, batch, counts["zipf"], torch.arange(24), measure, level)[[4, 1]] - values.mean(0)
    assert low.tolist() == pytest.approx(np.quantile(values, 0.1, 0).tolist(), abs=1e-9)
    assert high.tolist() == pytest.approx(np.quantile(values, 0.9, 0).tolist(), abs=1e-9)


def test_intervals_of_a_constructed_model_cover_what_they_should(given):
    """|h| is frequency and noise of the row: the r of 20,000 tokens lies in about nine of ten intervals."""
    counts, kept = {"ids": torch.arange(float(VOCAB)).double()}, {"all": torch.ones(VOCAB, dtype=torch.bool)}

    class Noisy(Model):
        def forward(self, input_ids):
            row = torch.randn(len(input_ids), 1) * 8
            return self.site((input_ids + row + 4 * torch.randn(input_ids.shape) + 100)[..., None])

    def r(rows):
        return correlations.correlate(
            Noisy(torch.zeros(1)), [torch.randint(0, VOCAB, (rows, 5))], counts, kept, "site", [0]
        )

    true = float(r(4000).r("raw", "all", "ids"))
    ends = torch.stack([r(40).interval("raw", "all", "ids", draws=200).flatten() for _ in range(60)])
    inside = ((ends[:, 0] < true) & (true < ends[:, 1])).double().mean()
    assert 0.8 <= inside <= 0.98


def test_padding_counts_nowhere(given):
    model, batch, counts, kept = given
    model = Model(torch.cat([model.table.detach(), torch.full((VOCAB, 3, WIDTH), torch.nan)], 1))
    longer = {n: torch.cat([v, torch.zeros(24, 3, dtype=torch.long)], 1) for n, v in batch.items()}
    longer["input_ids"] = longer["input_ids"].masked_fill(longer["attention_mask"] == 0, 17)
    one, other = (correlations.correlate(model, [b], counts, kept, "site") for b in (batch, longer))
    for measure in correlations.MEASURES:
        assert torch.equal(one.r(measure, "all", "zipf"), other.r(measure, "all", "zipf"))
    floats = batch | {"attention_mask": batch["attention_mask"].float()}
    assert torch.equal(correlations.correlate(model, [floats], counts, kept, "site").places, one.places)


def test_bad_input_is_one_clear_line(given):
    model, batch, counts, kept = given
    padding = batch | {"attention_mask": 0 * batch["attention_mask"]}
    for nothing in ([], [padding]):
        with pytest.raises(UserError, match="no batches, or no tokens"):
            correlations.correlate(model, nothing, counts, kept, "site")
    for few in (({}, kept), (counts, {})):
        with pytest.raises(UserError, match="name counts and a set of tokens"):
            correlations.correlate(model, [batch], *few, "site")
    with pytest.raises(UserError, match="beyond the counts, which have 3 ids"):
        correlations.correlate(model, [batch], {"zipf": torch.ones(3)}, kept, "site")
    found = correlations.correlate(model, [batch], counts, kept, "site")
    with pytest.raises(UserError, match="did you mean 'zipf'"):
        found.r("raw", "all", "zpif")
    with pytest.raises(UserError, match="known: raw, log, spearman"):
        found.r("kendall", "all", "zipf")
    with pytest.raises(UserError, match="known: token, type, position"):
        found.r("raw", "all", "zipf", "types")
    with pytest.raises(UserError, match="within positions r is raw or log"):
        found.r("spearman", "all", "zipf", "position")
    with pytest.raises(UserError, match="no dimension is followed"):
        found.interval("spearman", "all", "zipf")
    followed = correlations.correlate(model, [batch], counts, kept, "site", [1])
    for wrong in ({"coverage": 1.5}, {"draws": 0}):
        with pytest.raises(UserError, match=r"coverage in \(0, 1\) and some draws"):
            followed.interval("raw", "all", "zipf", **wrong)
    with pytest.raises(UserError, match="dimension 6 is out of range: there are dimensions 0 to 5"):
        correlations.correlate(model, [batch], counts, kept, "site", [6])


def test_a_table_of_lines_holds_the_chosen_dimensions_and_the_percentiles_of_the_others(given):
    model, batch, counts, kept = given
    found, asked = correlations.correlate(model, [batch], counts, kept, "site"), ("log", "odd", "zipf", "position")
    table = found.lines([4, 1], *asked).set_index("line")
    r = found.r(*asked)[0]
    assert list(table.index) == ["4", "1", "p5", "p25", "p75", "p95", "p100"] and (table["block"] == 0).all()
    assert table.loc["4", "r"] == r[4] and table.loc["1", "r"] == r[1]
    assert table.loc["p75", "r"] == pytest.approx(np.quantile(r[[0, 2, 3, 5]], 0.75))
    assert table.loc["p100", "r"] == r[[0, 2, 3, 5]].max()


def test_against_others_ranks_a_dimension_among_those_that_are_not_chosen(given):
    model, batch, counts, kept = given
    found = correlations.correlate(model, [batch], counts, kept, "site")
    r = found.r("raw", "all", "zipf")[0]
    order = r.argsort(descending=True).tolist()
    first, last = order[0], order[-1]
    table = found.against_others({first: 0, last: 0}, "raw", "all", "zipf").set_index("dimension")
    assert table["rank"].to_dict() == {first: 1, last: WIDTH - 1}
    rest = r[order[1:-1]]
    assert table.loc[last, "rank by size"] == 1 + int((rest.abs() > r[last].abs()).sum())
    assert table["p95"].tolist() == pytest.approx([float(np.quantile(rest, 0.95))] * 2)
    assert table["above"].tolist() == pytest.approx((table["r"] - table["p95"]).tolist())


def test_distances_find_a_dimension_that_is_large_on_the_tokens_of_the_set_alone(given):
    _, _, counts, kept = given
    table = torch.randn(VOCAB, 9, 64)
    table[1::2, :, 5] *= 30
    found = correlations.correlate(
        Model(table), [text() for _ in range(20)], counts, kept | {"even": ~kept["odd"]}, "site"
    )
    h = Model(table)
    odd, even = (found.distances(name, "zipf")[0] for name in ("odd", "even"))
    assert int(odd.argmax()) == 5 and odd[5] > 7 and even[5] < 4
    batch = text()
    one = correlations.correlate(h, [batch], counts, kept, "site").distances("odd", "zipf")[0]
    inside = batch["attention_mask"].bool() & kept["odd"][batch["input_ids"]]
    rms = h(**batch)[inside].detach().double().square().mean(0).sqrt()
    assert one.tolist() == pytest.approx(((rms - rms.mean()) / rms.std()).tolist())
