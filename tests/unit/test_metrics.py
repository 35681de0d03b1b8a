import pytest
import torch

from ofutils import metrics
from ofutils.metrics import Statistics


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


def test_six_sigma_finds_the_planted_outliers():
    x = activations(2, (4, 50, 50))
    assert metrics.six_sigma_count(x) == 0
    x[0, 3, 7] = x[2, 1, 1] = 40
    assert metrics.six_sigma_count(x) == 2


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_statistics_equal_the_definitions_however_the_batch_is_cut_or_merged(pieces):
    x = activations(3, (8, 6, 16))
    x[..., 5] *= 30
    parts = []
    for chunk in x.chunk(pieces):
        statistics = Statistics()
        for half in chunk.chunk(2):
            statistics.add(half)
        parts.append(statistics)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    found = whole.summary()
    assert found["neuron_kurtosis"] == pytest.approx(float(metrics.neuron_kurtosis(x)), rel=1e-12)
    assert found["max_median_ratio"] == pytest.approx(float(metrics.max_median_ratio(x)), rel=1e-12)
    assert found["tensor_kurtosis"] == pytest.approx(float(metrics.tensor_kurtosis(x).mean()), rel=1e-12)
    assert found["inf_norm"] == pytest.approx(float(metrics.max_inf_norm(x)), rel=1e-12)
    assert found["max_abs"] == float(x.abs().max())
