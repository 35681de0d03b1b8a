"""The laboratory's tables, and what is taken out of its models."""

import pandas as pd
import pytest
import torch

from ofutils import laboratory
from ofutils.transformer import Transformer, TransformerConfig


def test_an_outlier_that_a_bias_makes_goes_with_its_dimension_and_not_with_the_start_token():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab=28, layers=2, width=16, heads=2, context=12, init_std=0.2)).eval()
    with torch.no_grad():
        model.blocks[0].mlp_out.bias[5] = 50.0
    found = laboratory.without(model, [torch.randint(0, 28, (4, 12)) for _ in range(2)])
    kurtosis = {case: one["kurtosis"] for case, one in found.items()}
    assert list(found) == ["nothing", "outlier zeroed", "median zeroed", "<s> blocked"]
    assert kurtosis["nothing"] > 12 and kurtosis["outlier zeroed"] < 4
    assert kurtosis["median zeroed"] > 12 and kurtosis["<s> blocked"] > 12
    assert found["<s> blocked"]["sink"] == 0 < found["nothing"]["sink"]


def test_halfway_is_the_first_step_at_half_of_the_end():
    way = pd.DataFrame({"seed": 1, "step": [0, 10, 20, 30], "sink": [0.1, 0.5, 0.4, 0.8], "kurtosis": [1, 1.5, 3, 5]})
    half = laboratory.halfway(pd.concat([way, way.assign(seed=2, sink=0.8)]))
    assert half.to_dict("index") == {1: {"sink": 10, "kurtosis": 20}, 2: {"sink": 0, "kurtosis": 20}}


@pytest.mark.parametrize(("costs", "said"), [((3.0, 1.0), ""), ((1.5, 1.0), "1.5 times")])
def test_outliers_are_to_blame_where_ranges_per_token_are_cheap(costs, said):
    runs = pd.DataFrame({"method": ["vanilla", "OP"], "W8A8": [costs[0], 9], "W8A8 per token": [costs[1], 9]})
    found = laboratory.innocent(runs, blame=2.0)
    assert said in found and bool(found) == bool(said)


def test_remedies_are_compared_with_vanilla_of_the_same_seed():
    methods = ("vanilla", *laboratory.REMEDIES)
    rows = [
        {"method": method, "seed": seed, "sink": seed / (1 + place), "kurtosis": 1 + seed, "above bound": 0.1 * place}
        | {"max inf norm": 4.0, "W8A8": seed * (1 + place)}
        for seed in (2, 1)
        for place, method in enumerate(methods)
    ]
    ids, texts, values = zip(*laboratory.against_vanilla(pd.DataFrame(rows), "sink"), strict=True)
    assert ids[:2] == ("bondarenko2023-lab-clipped-sink", "bondarenko2023-lab-gated-sink") and set(ids[2:]) == {""}
    assert texts[0] == "laboratory: clipped softmax divides vanilla's attention to <s> (probs) by"
    assert [list(one) for one in values] == [[2.0, 2.0], [3.0, 3.0], [4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]
    (_, _, saved), *_ = laboratory.against_vanilla(pd.DataFrame(rows), "W8A8")
    (_, _, gain), *_ = laboratory.against_vanilla(pd.DataFrame(rows), "fp")
    assert list(saved) == [-1.0, -1.0] and list(gain) == pytest.approx([-0.1, -0.1])
