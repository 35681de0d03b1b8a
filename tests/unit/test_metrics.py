import pytest
import torch

from ofutils import UserError, metrics, streaming
from ofutils.streaming import METERS, AttentionStatistics, Statistics


def activations(seed=0, shape=(4, 8, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neuron_kurtosis_of_one_hot_is_the_width_and_of_equal_neurons_one():
    one_hot = torch.zeros(3, 5, 16)
    one_hot[..., 7] = 2.5
    assert metrics.neuron_kurtosis(one_hot) == 16
    assert metrics.neuron_kurtosis(torch.ones(3, 5, 16)) == 1


def test_neuron_kurtosis_of_gaussian_noise_is_one_plus_two_over_n():
    found = torch.stack([metrics.neuron_kurtosis(activations(seed, (20, 4096))) for seed in range(20)]).mean()
    assert found == pytest.approx(1 + 2 / 20, rel=5e-3)


def test_neuron_kurtosis_is_not_centred():
    x = torch.ones(2, 3, 8)
    assert metrics.neuron_kurtosis(x + 5) == 1


def test_max_median_ratio_takes_the_lower_median_and_the_mean_over_tokens():
    x = torch.tensor([[1.0, -2.0, 3.0, 12.0], [1.0, 1.0, 1.0, -5.0]])
    assert metrics.max_median_ratio(x) == (12 / 2 + 5 / 1) / 2


def test_neuron_kurtosis_does_not_overflow_in_half_precision():
    x = torch.ones(4, 64, dtype=torch.float16)
    x[:, 0] = 6e4
    assert metrics.neuron_kurtosis(x).isfinite()


def test_tensor_kurtosis_equals_the_authors(vectors):
    tensors, _ = vectors("tensor_kurtosis")
    found = metrics.tensor_kurtosis(tensors["x"])
    torch.testing.assert_close(found, tensors["kurtosis"].double(), rtol=1e-5, atol=1e-5)


def test_tensor_kurtosis_of_gaussian_noise_is_three_per_row():
    found = metrics.tensor_kurtosis(activations(1, (5, 200, 500)))
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.full((5,), 3.0, dtype=torch.float64), rtol=0.05, atol=0)


def test_max_inf_norm_is_the_mean_over_rows_then_the_maximum_over_sites():
    a = torch.tensor([[[1.0, -4.0]], [[2.0, 0.0]]])  # rows 4 and 2
    b = torch.tensor([[[5.0, 0.0]], [[0.0, 0.0]]])  # rows 5 and 0
    assert metrics.max_inf_norm(a) == 3
    assert metrics.max_inf_norm({"a": a, "b": b}) == 3
    assert metrics.max_inf_norm([b]) == 2.5


def test_six_sigma_finds_the_planted_outliers_of_each_row():
    x = activations(2, (4, 50, 50))
    assert not metrics.six_sigma(x).any()
    x[0, 3, 7] = x[2, 1, 1] = 40
    assert metrics.six_sigma(x).nonzero().tolist() == [[0, 3, 7], [2, 1, 1]]


def test_the_logged_metrics_equal_the_authors(vectors):
    tensors, expected = vectors("he_metrics")
    assert len(tensors) == 3
    for name, x in tensors.items():
        plain, streamed = Statistics(tuple(METERS)), Statistics(tuple(METERS))
        plain.add(x)
        for part in metrics.centred(x).split(1):
            streamed.add(part)
        found, stream = streamed.summary(), expected[name]
        shrink = found["rms"] / (found["rms"] + 1e-8)  # the authors divide by the RMS plus 1e-8
        ours = {
            "x_rms": found["rms"] / shrink,
            "logged_kurtosis": plain.summary()["logged_kurtosis"] * shrink**4,
            "feat_corr_rms": found["feature_correlation_rms"] * shrink**2,
            "batch_corr_mean": found["input_correlation"] * shrink**2,
            "batch_corr_rms": found["input_correlation_rms"] * shrink**2,
            "max_median_ratio": found["max_median_ratio"],
        }
        assert ours == pytest.approx(stream, rel=1e-9)
        assert found["identity_error"] < 1e-12


def definitions(x):
    """Every metric of `Statistics` from its definition, on sequences (B, T, D)."""
    tokens = x.flatten(0, -2)
    mean, square = metrics.input_correlation(x)
    size = tokens.abs()
    return {
        "rms": metrics.rms(x),
        "neuron_kurtosis": metrics.neuron_kurtosis(x),
        "logged_kurtosis": metrics.logged_kurtosis(x),
        "inf_norm": metrics.max_inf_norm(x),
        "max_abs": x.abs().max(),
        "max_median_ratio": metrics.max_median_ratio(x),
        "largest_max_median_ratio": (size.amax(1) / size.median(1).values).max(),
        "tensor_kurtosis": metrics.tensor_kurtosis(x).mean(),
        "token_kurtosis": metrics.tensor_kurtosis(tokens).mean(),
        "outlier_share": metrics.six_sigma(x).double().mean(),
        "input_correlation": mean,
        "input_correlation_rms": square,
        "feature_correlation_rms": metrics.feature_correlation(x),
        "identity_error": 0.0,
        "anisotropy": metrics.anisotropy(x),
    }


def outlying(seed=3, shape=(8, 60, 16)):
    x = activations(seed, shape) + 0.3
    x[..., 5] *= 30
    x[1, 2, 9] = -500
    return x


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_statistics_equal_the_definitions_however_the_batch_is_cut_or_merged(pieces):
    x = outlying()
    parts = []
    for chunk in x.chunk(pieces):
        statistics = Statistics(tuple(METERS))
        for half in chunk.chunk(2):
            statistics.add(half)
        parts.append(statistics)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    expected = {name: float(value) for name, value in definitions(x).items()}
    assert whole.summary() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert whole.tokens == 480 and whole.rows == 8
    hits = metrics.six_sigma(x)
    assert whole.sums["outliers_by_dimension"].tolist() == hits.sum((0, 1)).tolist()


def test_chunks_of_a_long_batch_change_nothing(monkeypatch):
    x = outlying()
    whole, chunked = Statistics(tuple(METERS)), Statistics(tuple(METERS))
    whole.add(x)
    monkeypatch.setattr(streaming, "_CHUNK", 100)
    chunked.add(x)
    assert chunked.summary() == pytest.approx(whole.summary(), rel=1e-12, abs=1e-12)


def test_the_cheap_meters_compute_nothing_else():
    statistics = Statistics(("neuron_kurtosis", "inf_norm"))
    statistics.add(outlying())
    assert set(statistics.summary()) == {"neuron_kurtosis", "inf_norm"}
    assert not {"gram", "ratios", "row_kurtosis"} & statistics.sums.keys()


def test_padding_counts_nowhere():
    x, lengths = outlying(shape=(4, 10, 16)), [10, 7, 3, 0]
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    padded = x.masked_fill(~mask[..., None], float("nan"))
    statistics, expected = Statistics(tuple(METERS)), Statistics(tuple(METERS))
    statistics.add(padded, mask)
    for row, length in zip(x, lengths, strict=True):
        if length:
            expected.add(row[None, :length])
    assert statistics.rows == 3 and statistics.tokens == 20
    assert statistics.summary() == pytest.approx(expected.summary(), rel=1e-12, abs=1e-12)
    assert statistics.sums["outliers_by_dimension"].tolist() == expected.sums["outliers_by_dimension"].tolist()


def test_statistics_of_heads_and_of_pooled_rows_take_the_same_mask():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    heads, plain = Statistics(), Statistics()
    x = activations(4, (2, 5, 3, 8))  # B, H, T, K
    heads.add(x, mask)
    plain.add(x[0, :, :2].reshape(1, -1, 8))
    plain.add(x[1, :, :1].reshape(1, -1, 8))
    assert heads.summary() == pytest.approx(plain.summary())
    pooled = Statistics()
    pooled.add(activations(5, (2, 8)), mask)
    assert pooled.tokens == 2
    with pytest.raises(UserError, match="does not fit"):
        Statistics().add(activations(6, (2, 4, 8)), mask)


def test_outliers_of_batches_of_different_lengths_add_up():
    statistics = Statistics(("outlier_share",))
    for length in (30, 50, 20):
        x = activations(7, (1, length, 64))
        x[0, 10, 3] = 100
        statistics.add(x)
    found = statistics.sums["outliers_by_dimension"]
    assert found[3] == 3 and found.sum() == 3


def test_half_precision_is_summed_in_single():
    x = outlying(shape=(2, 600, 16)).to(torch.bfloat16)
    half, single = Statistics(tuple(METERS)), Statistics(tuple(METERS))
    half.add(x)
    single.add(x.double())
    assert half.summary() == pytest.approx(single.summary(), rel=1e-4, abs=1e-5)
    big = Statistics()
    big.add(torch.full((1, 4, 8), 6e4, dtype=torch.float16))
    assert big.summary()["neuron_kurtosis"] == 1


def test_an_unknown_meter_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown meter 'kurtosis'.*known: rms, neuron_kurtosis"):
        Statistics(("kurtosis",))


def test_the_identity_holds_against_the_whole_input_gram():
    x = outlying(shape=(2, 20, 16)).flatten(0, 1)
    x = x / metrics.rms(x)
    n, width = x.shape
    features = x.T @ x
    left = n**2 * width * metrics.neuron_kurtosis(x) + features.square().sum() - features.diagonal().square().sum()
    torch.testing.assert_close(left, (x @ x.T).square().sum())


def test_attention_entropy_of_uniform_and_of_one_hot_attention():
    uniform, one_hot = torch.full((2, 3, 4, 4), 0.25), torch.eye(4).expand(2, 3, 4, 4)
    assert metrics.attention_entropy(uniform) == pytest.approx(1.3862943611)
    assert metrics.attention_entropy(one_hot) == 0
    statistics = AttentionStatistics()
    statistics.add(uniform, torch.tensor([[True] * 4, [True] * 2 + [False] * 2]))
    other = AttentionStatistics()
    other.add(one_hot)
    whole = statistics.merge(other)
    assert whole.rows == 4
    assert whole.summary()["attention_entropy"] == pytest.approx(1.3862943611 * 6 / 14)
    assert statistics.head_entropy.tolist() == pytest.approx([1.3862943611] * 3)


def test_the_sink_is_the_attention_to_the_first_token_of_late_queries():
    uniform = torch.ones(2, 3, 8, 8).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    statistics = AttentionStatistics()
    statistics.add(uniform)
    assert statistics.summary()["sink"] == pytest.approx((1 / 5 + 1 / 6 + 1 / 7 + 1 / 8) / 4)
    sunk = torch.zeros(1, 3, 8, 8)
    sunk[:, 0, :, 0] = sunk[:, 1:, :, 3] = 1  # of three heads one sinks
    other = AttentionStatistics()
    other.add(sunk, torch.tensor([[True] * 6 + [False] * 2]))
    assert other.head_sink.tolist() == [1, 0, 0]
    late = 2 * (1 / 5 + 1 / 6 + 1 / 7 + 1 / 8)
    assert statistics.merge(other).head_sink.tolist() == pytest.approx([(late + 2) / 10, late / 10, late / 10])


def test_anisotropy_of_equal_and_of_opposite_tokens():
    token = torch.tensor([1.0, 2.0, 3.0])
    assert metrics.anisotropy(torch.stack([token, 5 * token])) == pytest.approx(1)
    assert metrics.anisotropy(torch.stack([token, -token])) == pytest.approx(-1)


def test_the_identity_error_sees_a_wrong_matrix():
    statistics = Statistics(tuple(METERS))
    statistics.add(outlying())
    assert statistics.summary()["identity_error"] < 1e-12
    statistics.sums["gram"][2, 7] *= 1.5
    assert statistics.summary()["identity_error"] > 1e-6


def test_a_token_that_outweighs_all_others_gives_nan_and_no_wrong_number():
    x = activations(8, (1, 512, 32)).float()
    x[0, 0] *= 1e5
    single, double = Statistics(("input_correlation_rms",)), Statistics(("input_correlation_rms",))
    single.add(x)
    double.add(x.double())
    assert single.summary()["input_correlation_rms"] != single.summary()["input_correlation_rms"]
    assert double.summary()["input_correlation_rms"] == pytest.approx(
        float(metrics.input_correlation(x)[1]), rel=1e-3
    )


def test_a_large_mean_over_the_width_does_not_spoil_the_logged_kurtosis():
    x = (activations(9, (4, 64, 96)) + 1e4).float()
    statistics = Statistics(("logged_kurtosis",))
    statistics.add(x)
    assert statistics.summary()["logged_kurtosis"] == pytest.approx(float(metrics.logged_kurtosis(x)), rel=1e-2)


def test_what_does_not_belong_together_is_not_added_or_merged():
    statistics = Statistics(("rms",))
    with pytest.raises(UserError, match="nothing was added"):
        statistics.summary()
    statistics.add(activations(shape=(2, 5, 8)))
    with pytest.raises(UserError, match="a site of width 8 now has width 16"):
        statistics.add(activations(shape=(2, 5, 16)))
    with pytest.raises(UserError, match="other meters"):
        statistics.merge(Statistics(("anisotropy",)))
    empty = AttentionStatistics()
    full = AttentionStatistics()
    full.add(torch.full((1, 2, 4, 4), 0.25), torch.ones(1, 4, dtype=torch.long))
    assert full.merge(empty).summary() == empty.merge(full).summary() == full.summary()
    with pytest.raises(UserError, match="does not fit"):
        full.add(torch.full((1, 2, 4, 4), 0.25), torch.ones(1, 5))


def test_autocast_around_it_changes_nothing():
    x = activations(10, (2, 40, 16)).float() + 3
    plain, inside = Statistics(tuple(METERS)), Statistics(tuple(METERS))
    plain.add(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(x)
    assert inside.summary() == plain.summary()
