import pytest
import torch

from ofutils import metrics, streaming

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


SCALE_FREE = [name for name in streaming.METERS if name not in ("rms", "inf_norm", "max_abs", "identity_error")]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1, 1e2), cut=st.integers(1, 3), outlier=st.floats(1, 1e3))
def test_streamed_metrics_do_not_see_order_scale_or_batches(seed, scale, cut, outlier):
    x = activations(seed)
    x[..., 3] *= outlier
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    whole, parts, changed = (streaming.Statistics(tuple(streaming.METERS)) for _ in range(3))
    whole.add(x)
    parts.add(x[:cut])
    parts.add(x[cut:])
    changed.add(scale * x[..., order])
    found = whole.summary()
    assert parts.summary() == pytest.approx(found, rel=1e-9, abs=1e-12)
    moved = changed.summary()
    assert {k: moved[k] for k in SCALE_FREE} == pytest.approx({k: found[k] for k in SCALE_FREE}, rel=1e-4, abs=1e-9)
    assert 1 - 1e-12 <= found["neuron_kurtosis"] <= 16 + 1e-9
    assert found["identity_error"] < 1e-10
    assert -1 / 31 - 1e-9 <= found["anisotropy"] <= 1 + 1e-9
    assert found["largest_max_median_ratio"] >= found["max_median_ratio"] >= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), neuron=st.integers(0, 15))
def test_one_neuron_alone_has_the_kurtosis_of_the_width_and_correlates_all_tokens(seed, neuron):
    x = torch.zeros(4, 8, 16, dtype=torch.float64)
    x[..., neuron] = activations(seed)[..., 0].abs() + 0.1
    statistics = streaming.Statistics(("neuron_kurtosis", "anisotropy"))
    statistics.add(x)
    assert statistics.summary() == pytest.approx({"neuron_kurtosis": 16, "anisotropy": 1})
