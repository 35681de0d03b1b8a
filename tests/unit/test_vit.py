"""The study of 10_vit: plain patches, places of outliers, values there, two dimensions, the notebook's rows."""

import dataclasses

import pytest
import torch

from ofutils import dims, families, sweep
from ofutils.images import ImageConfig
from ofutils.probes import edit, measure
from ofutils.studies.vit import runs, sinks
from ofutils.transformer import Transformer, TransformerConfig, accuracy
from tests.toys import build

IMAGE = ImageConfig(size=16)
SEEING = TransformerConfig(
    vocab=10, layers=3, width=32, heads=2, context=17, causal=False, head="biased", image=IMAGE
)


@pytest.fixture
def batches():
    return sinks.pictures("scenes", IMAGE)[:2]


def spike(model, where, place, dimension=3, size=500.0):
    """Adds to one entry of the stream at one position of every image."""

    def function(x):
        x = x.clone()
        x[torch.arange(len(x)), place, dimension] += size
        return x

    return edit(model, where, function)


def test_plain_patches_of_scenes_are_those_without_the_digit(batches):
    pixels = batches[0]["pixel_values"]
    quiet = sinks.plain(pixels, IMAGE)
    assert quiet.shape == (64, 16) and (quiet.sum(1) >= 12).all() and not quiet.all(1).any()
    assert torch.equal(sinks.plain(3 * pixels + 1, IMAGE), quiet)  # contrast and brightness say nothing


@pytest.mark.parametrize("on_digit", [False, True])
def test_an_outlier_is_found_where_it_was_put(batches, on_digit):
    model, (batch, _) = Transformer(SEEING).eval(), batches
    quiet = sinks.plain(batch["pixel_values"], IMAGE)
    place = (~quiet if on_digit else quiet).int().argmax(1) + 1  # behind the class token
    with spike(model, "blocks.0.resid_post", place):
        found = sinks.statistics(model, [batch], IMAGE)
    assert found["block"] == 0 and found["blocks"]["outliers"][0] == 1
    assert found["blocks"]["class"][0] == 0 and found["blocks"]["plain"][0] == found["blocks"]["peak plain"][0]
    assert found["blocks"]["plain"][0] == (0.0 if on_digit else 1.0)
    assert found["plain"] == pytest.approx(float(quiet.float().mean()))
    largest = torch.tensor(found["maps"]["largest"])
    assert largest.shape == (sinks.SHOWN, 17) and torch.equal(largest.argmax(1), place[: sinks.SHOWN])


def test_an_outlier_at_the_class_token_is_no_patch(batches):
    model = Transformer(SEEING).eval()
    with spike(model, "blocks.1.resid_post", 0):
        found = sinks.statistics(model, batches, IMAGE)
    assert found["block"] == 1 and found["blocks"]["class"][1] == 1
    assert found["blocks"]["plain"][1] != found["blocks"]["plain"][1]  # none at patches: nan


def test_attention_and_values_are_those_of_the_next_block(batches):
    model = Transformer(SEEING).eval()

    def to_the_fifth(probs):
        probs = torch.zeros_like(probs)
        probs[:, 0, :, 5], probs[:, 1] = 1.0, 1 / 17
        return probs

    def ones_but_there(v):
        return torch.cat([torch.ones_like(v[:, :5]), torch.full_like(v[:, 5:6], 0.25), torch.ones_like(v[:, 6:])], 1)

    values = edit(model, "blocks.1.v", ones_but_there)
    with spike(model, "blocks.0.resid_post", 5), edit(model, "blocks.1.probs", to_the_fifth), values:
        found = sinks.statistics(model, batches, IMAGE)
    assert found["head"] == 0 and found["head attention"] == pytest.approx(1)
    assert found["attention"] == pytest.approx((1 + 1 / 17) / (1 / 17))
    assert found["values"] == pytest.approx(0.25)


def test_statistics_of_parts_are_those_of_the_whole(batches):
    model = Transformer(SEEING).eval()
    whole = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    parts, together = sinks.statistics(model, batches, IMAGE), sinks.statistics(model, [whole], IMAGE)
    for name in ("plain", "block", "head", "attention", "values"):
        assert parts[name] == pytest.approx(together[name], rel=1e-5)


def test_without_a_class_token_all_positions_are_patches(batches):
    image = dataclasses.replace(IMAGE, pool="mean")
    model = Transformer(dataclasses.replace(SEEING, image=image, context=16)).eval()
    with spike(model, "blocks.0.resid_post", 0):
        found = sinks.statistics(model, batches, image)
    assert found["blocks"]["class"][0] == 0 and len(found["maps"]["largest"][0]) == 16


def test_models_of_hugging_face_have_the_same_statistics_before_and_after_conversion():
    theirs = build("vit")
    image = families.from_hf(theirs).config.image
    batch = {"pixel_values": torch.randn(5, 3, 8, 8)}
    found = [sinks.statistics(one, [batch], image) for one in (families.from_hf(theirs), families.with_sites(theirs))]
    maps = [torch.tensor(one["maps"]["largest"]) for one in found]
    torch.testing.assert_close(*maps, rtol=0, atol=1e-3)
    assert found[0]["attention"] == pytest.approx(found[1]["attention"], rel=1e-4)


def test_two_dimensions_are_the_largest_and_cost_what_ablation_costs(batches):
    model = Transformer(SEEING).eval()
    with spike(model, "blocks.2.resid_post", 4, 7), spike(model, "blocks.1.resid_post", 2, 9):
        found = sinks.carried(model, batches)
        exact = measure(model, batches, loss=accuracy).loss
        with dims.ablated(model, [7, 9]):
            assert found["largest"] == pytest.approx(exact - measure(model, batches, loss=accuracy).loss)


def test_rows_and_claims_at_tiny(out):
    recipe = sweep.read_recipe("10_vit", "tiny", steps=4)
    chosen = [job for job in recipe.jobs if job.method in ("vanilla", "OP")]
    outcomes = sweep.run(chosen, workers=0)
    found = sinks.examine("10_vit", "tiny", outcomes)
    assert [one is not None for one in map(sinks.recall, chosen)] == [True, True]
    assert "lost" in found[0] and "lost" not in found[1]
    table = runs.table(outcomes, found)
    assert table["method"].tolist() == ["vanilla", "OP"] and table["lost largest"].isna().tolist() == [False, True]
    sites = outcomes[0].measured["sites"]
    assert table["inf norm"][0] == max(one["inf_norm"] for one in sites.values())
    assert table["accuracy"][0] == outcomes[0].measured["accuracy"]
