"""The study of 10_vit: plain patches, places of outliers, values there, two dimensions, the notebook's rows."""

import dataclasses

import pytest
import torch
import transformers

from ofutils import dims, families, reference, sweep, train
from ofutils.images import ImageConfig
from ofutils.probes import edit, measure
from ofutils.studies.vit import finetune, runs, sinks
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


# ------------------------------------------------------------------------------------ Tables 7 and 8


def test_each_method_of_the_tables_is_what_the_papers_row_says():
    methods = {job.method: job.config.model for job in sweep.read_recipe("10_vit_tables", "small").jobs}
    rows = [set(reference.table("bondarenko2023", f"table {number} ViT-S/16")["row"]) for number in (7, 8)]
    assert set(methods) <= (rows[0] | rows[1]) and {"vanilla", "vanilla; patch norm"} <= set(methods)
    for method, model in methods.items():
        own, parts, normed = model.attention, method.partition(";")[0].split(), "patch norm" in method
        assert model.image.norm == normed
        clipped = parts[0] in ("clipped", "gamma")
        assert own.alpha == pytest.approx(-200 * float(parts[-1]) if clipped else 0)
        assert own.zeta == (float(method.split()[-1]) if "zeta" in method else 1)
        assert own.gate == (parts[1] if parts[0] == "gated" else "none")
        assert own.pi_init == (float(parts[-1]) if own.gate == "linear" else 0.5) and own.gate_hidden == 4
    small = {job.config.name for job in sweep.read_recipe("10_vit", "small").jobs}
    assert len(small & {job.config.name for job in sweep.read_recipe("10_vit_tables", "small").jobs}) == 15


def test_rows_stand_beside_the_papers_and_claims_are_computed_alike(out):
    rows = runs.beside(sweep.read_recipe("10_vit_tables", "tiny", steps=4).run())
    paper = rows[rows["of"] == "paper"]
    assert list(paper["table"].value_counts(sort=False)) == [16, 13] and paper["row"].iloc[0] == "vanilla"
    assert paper["accuracy"].between(0.7, 0.82).all() and paper["tensor kurtosis"].notna().sum() == 16
    ours = rows[rows["of"] == "seed 1"]
    assert ours["row"].tolist() == ["vanilla", "vanilla; patch norm", "gated linear 0.5; patch norm", "vanilla"]
    found = {id.removeprefix("bondarenko2023-vit-"): rest for id, *rest in runs.claims_of_tables(rows, 6.0, 0.05)}
    said = {id: float(rest[-1].split()[0]) for id, rest in found.items()}
    by_hand = {"clipped-w8a8": 0.0947, "like-for-like-w8a8": -0.002, "like-for-like-norm": 70.6 / 81.1}
    by_hand |= {"clipped-normed-accuracy": -0.0019, "gated-normed-accuracy": -0.0006, "zeta-w8a8": -0.0104}
    by_hand |= {"gamma-best": 197 / 99, "gamma-large": 0.0854, "gamma-zeta": 119 / 99, "patch-norm-w8a8": 0.1038}
    assert {id: said[id] for id in by_hand} == pytest.approx(by_hand, rel=5e-3)
    norm = ours.set_index("row")["inf norm"].iloc[:3]
    (value,) = found["like-for-like-norm"][1]
    assert value == pytest.approx(norm["gated linear 0.5; patch norm"] / norm["vanilla; patch norm"])
    assert found["gamma-large"][1].isna().all()  # its row did not run


# ------------------------------------------------------------------------------------ fine-tuned


def test_a_run_goes_on_to_another_task_under_a_new_head_and_is_recalled(out):
    (task,) = finetune.tasks("tiny", "digits", steps=4)
    config = task.config
    assert (config.model.vocab, config.corpus, config.start) == (10, "digits", task.base.name)
    assert config.lr == pytest.approx(task.base.lr) and config.weight_decay == 0
    before, start = train.trained(task.base, lambda *_: None).load().state_dict(), finetune.started(task).state_dict()
    same = {name for name, one in start.items() if torch.equal(one, before[name])}
    assert {name for name in start if name not in same} == {"head.weight", "head.bias"}
    table = finetune.table("tiny", [task])
    assert finetune.recall(task)["result"]["whole"] == table["whole"][0] and len(table) == 2
    model = train.find(config).load()
    pair, rows = finetune.recall(task)["result"]["dims"], sinks.pictures("digits", config.model.image, 10_000)
    with dims.ablated(model, pair, dims.ALL_NORMS):
        assert table.set_index("where")["two"]["every norm"] == measure(model, rows, loss=accuracy).loss


def test_two_dimensions_that_the_weights_single_out_are_switched_off(batches):
    model = Transformer(SEEING).eval()
    with torch.no_grad():
        for norm in dims.norms(model).values():
            norm.weight += 0.01 * torch.randn(32)
            norm.bias += 0.01 * torch.randn(32)
            norm.weight[7], norm.bias[7], norm.weight[20], norm.bias[20] = 4.0, 3.0, -3.0, -3.0
    found = finetune.spared(model, batches)
    assert sorted(found["dims"]) == [7, 20] and found["sigma"] == 3.0
    with dims.ablated(model, [7, 20]):
        assert found["norm2"]["two"] == measure(model, batches, loss=accuracy).loss
    assert finetune.spared(Transformer(SEEING).eval(), batches)["sigma"] == 0  # as it starts nothing stands out


def test_the_hubs_model_is_vit_base_and_gets_as_many_classes_as_the_data_have():
    task = finetune.tasks("paper", "digits", corpus="digits")[0]
    assert task.base == task.config.start == "google/vit-base-patch16-224-in21k"
    assert (task.config.model.vocab, task.config.lr, task.config.batch) == (10, 2e-5, 256)
    with torch.device("meta"):
        ours = Transformer(task.config.model)
        theirs = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    body = sum(one.numel() for name, one in ours.named_parameters() if not name.startswith("head."))
    assert body == theirs.num_parameters() and task.config.model.norm_eps == theirs.config.layer_norm_eps


def test_a_model_of_the_hub_gets_a_new_head_and_is_fine_tuned(out, monkeypatch):
    theirs = build("vit without a head")
    body = families.from_hf(theirs)
    monkeypatch.setattr(finetune.hub, "model", lambda name: theirs)
    (small,) = finetune.tasks("tiny", "digits", steps=3)
    model = dataclasses.replace(body.config, vocab=10, head="biased")
    config = dataclasses.replace(small.config, model=model, start="theirs", steps=2, batch=4)
    start = finetune.started(finetune.Task("theirs", config))
    assert all(torch.equal(start.state_dict()[name], one) for name, one in body.state_dict().items())
    assert start.head.weight.shape == (10, model.width)
    found = finetune.perform(finetune.Task("theirs", config))["result"]
    assert 0 <= found["whole"] <= 1 and len(found["dims"]) == 2
