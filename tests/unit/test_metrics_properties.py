import pytest
import torch

from ofutils import metrics

pytest.importorskip(
    "hypothesis", reason='hypothesis comes with the extra dev: pip install -e ".[dev]" -c constraints.txt'
)
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def activations(seed):
    return torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), outlier=st.floats(1, 1e4))
def test_kurtosis_and_ratio_ranges_and_invariances(seed, scale, outlier):
    x = activations(seed)
    x[..., 3] *= outlier
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    for metric in (metrics.neuron_kurtosis, metrics.max_median_ratio):
        value = metric(x)
        assert value.shape == () and value.dtype == torch.float64
        assert value >= 1
        torch.testing.assert_close(metric(scale * x), value, rtol=1e-9, atol=0)
        torch.testing.assert_close(metric(x[..., order]), value, rtol=1e-9, atol=0)
    assert metrics.neuron_kurtosis(x) <= 16 + 1e-9
