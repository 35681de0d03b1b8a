"""Images through the core: sets, patches, the model against a convolution, training, resume, rounding, records."""

import dataclasses
import hashlib
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from ofutils import UserError, images, optim, quant, sweep, train
from ofutils.batches import Batches, fixed_batches, unpacked
from ofutils.images import NOISE, ImageConfig, load, patches
from ofutils.probes import capture, measure
from ofutils.records import differing
from ofutils.train import TrainConfig
from ofutils.transformer import Transformer, TransformerConfig, accuracy, lm_loss

SMALL = ImageConfig(size=16)
SEEING = TransformerConfig(
    vocab=10, layers=2, width=16, heads=2, context=17, causal=False, head="biased", image=SMALL
)


@pytest.fixture
def seeing():
    """A run of a second on scenes."""
    quick = {"batch": 4, "steps": 30, "warmup": 4, "lr": 1e-2, "measure_every": 10, "eval_batches": 2}
    return TrainConfig(model=SEEING, objective="image", corpus="scenes", **quick)


def quiet(config, **more):
    return train.train(config, report=lambda *_: None, **more)


# ------------------------------------------------------------------------------------ sets of images


@pytest.mark.parametrize("config", [SMALL, ImageConfig(size=8, channels=3)])
def test_packed_images_come_back_with_classes_of_two_bytes(config):
    pixels = np.random.default_rng(0).integers(
        256, size=(6, config.channels, config.size, config.size), dtype=np.uint8
    )
    labels = np.array([0, 1, 255, 256, 999, 65535])
    found = fixed_batches(config.packed(pixels, labels), 2, 3, config.row, config)
    whole = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    assert whole["labels"].tolist() == labels.tolist()
    torch.testing.assert_close((whole["pixel_values"] + 1) * 127.5, torch.tensor(pixels).float(), atol=1e-4, rtol=0)


def test_scenes_hold_one_digit_on_the_grid_of_patches_and_splits_share_no_digit():
    found = load("scenes", SMALL)
    whole = Batches(found.validation, 256, SMALL.row, 0, SMALL).at(0)
    assert whole.dtype == torch.uint8
    ink = patches(whole[:, :, :-1].float(), SMALL).amax(2).view(-1, 4, 4) > NOISE  # (B, n, n)
    for picture in ink:
        down, right = torch.nonzero(picture).unbind(1)
        assert 0 < len(down) <= 4 and down.max() - down.min() <= 1 and right.max() - right.min() <= 1
    digits, labels, _ = images.read("digits")
    assert unpacked(whole)["labels"].bincount(minlength=10).min() > 5
    held = {one.tobytes() for one in digits[4::5]}
    assert not held & {one.tobytes() for place, one in enumerate(digits) if place % 5 != 4}
    assert load("scenes", SMALL).corpus == found.corpus != load("scenes", ImageConfig(size=24)).corpus


def test_digits_are_enlarged():
    digits, labels, _ = images.read("digits")
    found = unpacked(Batches(load("digits", SMALL).validation, 359, SMALL.row, 0, SMALL).at(0))
    assert found["labels"].bincount().tolist() == np.bincount(labels[4::5]).tolist()
    coloured = dataclasses.replace(SMALL, channels=3)
    (three,) = fixed_batches(load("digits", coloured).validation, 1, 359, coloured.row, coloured)
    assert all(torch.equal(three["pixel_values"][:, one], three["pixel_values"][:, 0]) for one in (1, 2))
    one = found["pixel_values"][0, 0]
    assert torch.equal(one[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1), one)


@pytest.mark.parametrize("names", [("img", "label"), ("img", "fine_label"), ("image", "label")])
def test_files_are_cut_to_squares_and_every_fifth_image_is_held_out(tmp_path, names):
    def png(value):
        stream = BytesIO()
        Image.fromarray(np.full((12, 20, 3), value, np.uint8)).save(stream, format="PNG")
        return {"bytes": stream.getvalue()}

    rows = pd.DataFrame({names[0]: [png(10 * n) for n in range(10)], names[1]: [300 * (n % 2) for n in range(10)]})
    for part in (0, 5):  # a folder of two files
        rows[part : part + 5].to_parquet(tmp_path / f"{part}.parquet")
    config = ImageConfig(size=8, channels=3)
    found = load(str(tmp_path), config)
    (held,) = fixed_batches(found.validation, 1, 2, config.row, config)
    assert held["labels"].tolist() == [0, 300] and len(found.train) == 8 * config.row
    assert ((held["pixel_values"] + 1) * 127.5).round().mean((1, 2, 3)).tolist() == [40, 90]


def write_pictures(folder, count, **columns):
    """Coloured pictures of several shapes in parquet files of seven rows, with classes of two bytes."""
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        stream = BytesIO()
        pixels = draw.integers(256, size=(10 + number % 3, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, format="PNG")
        rows.append({"image": {"bytes": stream.getvalue()}, "label": 29 * number} | columns)
    for part in range(0, count, 7):
        pd.DataFrame(rows[part : part + 7]).to_parquet(folder / f"{part:03d}.parquet", row_group_size=5)
    return rows


@pytest.mark.parametrize("channels", [1, 3])
def test_files_become_memory_maps_that_hold_what_one_piece_would(tmp_path, out, monkeypatch, channels):
    rows, config = write_pictures(tmp_path, 33), ImageConfig(size=8, channels=channels)
    opened = (Image.open(BytesIO(row["image"]["bytes"])).convert("L" if channels == 1 else "RGB") for row in rows)
    pixels = np.stack([np.asarray(ImageOps.fit(one, (8, 8))) for one in opened]).reshape(33, 8, 8, channels)
    labels, held = np.array([row["label"] for row in rows]), np.arange(33) % 5 == 4
    whole = [config.packed(pixels[own].transpose(0, 3, 1, 2), labels[own]) for own in (~held, held)]
    packed, sizes = ImageConfig.packed, []
    monkeypatch.setattr(
        ImageConfig, "packed", lambda self, one, *rest: sizes.append(len(one)) or packed(self, one, *rest)
    )
    monkeypatch.setattr(images, "_AT_ONCE", 4)
    found = load(str(tmp_path), config)
    assert max(sizes) <= 4 and sum(sizes) == 33  # in memory at a time; each decoded once
    assert all(isinstance(one, np.memmap) for one in (found.train, found.validation))
    assert [one.tobytes() for one in (found.train, found.validation)] == [one.tobytes() for one in whole]
    assert found.corpus == hashlib.sha256(b"".join(one.tobytes() for one in whole)).hexdigest()
    assert load(str(tmp_path), config).corpus == found.corpus and sum(sizes) == 33  # from the folder
    assert load(str(tmp_path), dataclasses.replace(config, size=16)).corpus != found.corpus and sum(sizes) == 66


def test_files_of_every_depth_are_read_in_order_and_too_few_images_are_refused(tmp_path, out):
    (tmp_path / "deep").mkdir()
    write_pictures(tmp_path / "deep", 4)
    config = ImageConfig(size=8, channels=3)
    with pytest.raises(UserError, match="too few"):
        load(str(tmp_path), config)
    write_pictures(tmp_path / "deep", 12)
    assert len(load(str(tmp_path), config).train) == 10 * config.row


def test_a_label_that_is_no_whole_number_is_refused(tmp_path, out):
    rows = pd.DataFrame(write_pictures(tmp_path, 6))
    rows.assign(label=rows["label"] + 0.5).to_parquet(tmp_path / "0.parquet")
    with pytest.raises(UserError, match="whole number"):
        load(str(tmp_path / "0.parquet"), ImageConfig(size=8, channels=3))


def test_nothing_half_written_is_read(tmp_path, out):
    write_pictures(tmp_path, 12)
    broken = pd.DataFrame([{"image": {"bytes": b"no picture"}, "label": 1}] * 5)
    broken.to_parquet(tmp_path / "last.parquet")
    config = ImageConfig(size=8, channels=3)
    with pytest.raises(UserError, match="last.parquet.*needs parquet of img") as error:
        load(str(tmp_path), config)
    assert "\n" not in str(error.value) and not [one for one in (out / "runs").rglob("*") if one.is_file()]
    (tmp_path / "last.parquet").unlink()
    assert len(load(str(tmp_path), config).train) == 10 * config.row


def test_a_changed_file_is_decoded_again_and_a_broken_map_says_what_to_delete(tmp_path, out):
    write_pictures(tmp_path, 7)
    config = ImageConfig(size=8, channels=3)
    first = load(str(tmp_path), config)
    write_pictures(tmp_path, 6)
    assert len(load(str(tmp_path), config).train) < len(first.train)
    for path in (out / "runs" / "images").rglob("train.npy"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not readable; delete that folder"):
        load(str(tmp_path), config)


@pytest.mark.parametrize(
    "source, config, why",
    [
        ("scene", SMALL, "did you mean 'scenes'"),
        ("scenes", ImageConfig(size=12), "a size that 8 divides"),
    ],
)
def test_bad_sources_cost_one_clear_line(source, config, why):
    with pytest.raises(UserError, match=why) as error:
        load(source, config)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ the model


def test_patches_are_those_of_a_convolution_line_by_line():
    config = ImageConfig(size=12, patch=4, channels=3)
    pixels, weight = torch.randn(2, 3, 12, 12), torch.randn(5, 3, 4, 4)
    expected = F.conv2d(pixels, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(pixels, config) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_head_reads_the_class_token_or_the_mean(pool, norm):
    image = dataclasses.replace(SMALL, pool=pool, norm=norm)
    model = Transformer(dataclasses.replace(SEEING, image=image, context=image.tokens)).eval()
    pixels = torch.randn(3, 1, 16, 16)
    with torch.no_grad(), capture(model, ["*"]) as seen:
        logits = model(pixels)
    last, first = seen["norm_final"], int(pool == "class")
    expected = last[:, 0] if first else last.mean(1)
    torch.testing.assert_close(logits, F.linear(expected, model.head.weight, model.head.bias))
    assert seen["embed_tokens"].shape == (3, 16, 16) and seen["embed_sum"].shape == (3, 16 + first, 16)
    assert ("patch_norm" in seen) == norm
    start = seen["patch_norm" if norm else "embed_tokens"]
    torch.testing.assert_close(seen["embed_sum"][:, first:], start + model.position_embedding.weight[first:])
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels), model(pixels))


def test_order_of_patches_matters_by_their_positions_alone():
    model = Transformer(SEEING).eval()
    torch.nn.init.zeros_(model.position_embedding.weight)
    pixels, order = torch.randn(2, 1, 16, 16), torch.randperm(4)
    with torch.no_grad():
        shuffled = model(pixels.unflatten(2, (4, 4))[:, :, order].flatten(2, 3))
        torch.testing.assert_close(shuffled, model(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"context": 16}, "need context 17"),
        ({"image": {"size": 18}}, "do not split into patches"),
        ({"causal": True}, "causal off"),
        ({"head": "tied"}, "head untied, biased or none"),
        ({"embedding": {"segments": 2}}, "of embedding only a scale"),
    ],
)
def test_forms_that_images_do_not_have_are_refused(change, why):
    with pytest.raises(UserError, match=why):
        dataclasses.replace(SEEING, **change)


def test_images_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"images must be \(1, 16, 16\), got \(3, 16, 16\)"):
        Transformer(SEEING)(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("change", [{"model": {"image": {}, "context": 16}}, {"bpe": 300}, {"objective": "mlm"}])
def test_objective_and_model_must_agree(seeing, change):
    with pytest.raises(UserError, match="objective|are of text"):
        dataclasses.replace(seeing, **(change | {"model": dataclasses.replace(SEEING, **change.get("model", {}))}))


def test_loss_and_accuracy_are_those_of_the_classes():
    logits, labels = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 9.0, 0], [0, 0, 9.0]]), torch.tensor([0, 1, 2, 2])
    assert float(accuracy(logits, {"labels": labels})) == 0.75
    expected = -logits.log_softmax(1)[range(4), labels].mean()
    torch.testing.assert_close(lm_loss(logits, {"labels": labels}), expected)


# ------------------------------------------------------------------------------------ trainings


def test_a_field_for_images_leaves_old_names_as_they_are(seeing):
    assert TrainConfig().name == "train-" + train.digest("train", {})[6:]
    assert "image" not in str(differing(TrainConfig(seed=3))) and differing(seeing)["model"]["image"] == {"size": 16}


@pytest.mark.parametrize("optimizer", ["adamw", "soap", "muon"])
def test_a_broken_run_resumes_to_the_bit(out, seeing, monkeypatch, optimizer):
    seeing = dataclasses.replace(seeing, optimizer=optimizer)
    straight = quiet(seeing)
    weights = straight.load().state_dict()

    def stop(step, _):
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setenv("OFUTILS_OUT", str(out / "again"))
    with pytest.raises(KeyboardInterrupt):
        train.train(seeing, report=stop, save_every=7)
    resumed = quiet(seeing)
    assert resumed.log == straight.log
    assert all(torch.equal(one, weights[name]) for name, one in resumed.load().state_dict().items())


def test_training_learns_which_digit_it_is(out, seeing):
    run = quiet(dataclasses.replace(seeing, corpus="digits", batch=64, steps=90))
    assert run.log[-1]["loss"] < run.log[0]["loss"] - 0.3
    assert train.find(run.config).record["environment"]["corpus"] == load("digits", SMALL).corpus


def test_the_step_is_one_graph_for_the_compiler():
    model, found = Transformer(SEEING), []
    batch = Batches(load("scenes", SMALL).train, 3, SMALL.row, 0, SMALL).at(0)
    for loss in (train._loss, torch.compile(train._loss, backend="eager", fullgraph=True)):
        model.zero_grad()
        loss(model, batch).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_soap_rotates_both_sides_of_the_patches_and_not_the_classes():
    model = Transformer(dataclasses.replace(SEEING, vocab=40))
    tables = optim.make("soap", model, 1e-2, (0.9, 0.95), 1e-8, 0.1).param_groups[0]
    assert len(tables["params"]) == 1 and tables["params"][0] is model.head.weight
    assert tables["max_precondition_dim"] == SEEING.width < 40


# ------------------------------------------------------------------------------------ measured and rounded


def test_a_job_is_measured_and_rounded_with_its_accuracy_and_recalled(out, seeing):
    settings = (quant.QuantSettings(weights="minmax", batches=2),)
    evaluation = sweep.Evaluation(sites=("resid_post",), batches=2, batch=16)
    job = sweep.Job("vanilla", seeing, settings, evaluation)
    found = sweep.perform(job)
    assert sweep.recall(job) == found and found.quantized.keys() == found.accuracies.keys() == {"W8A8 min-max"}
    (exact,) = fixed_batches(load("scenes", SMALL).validation, 1, 32, SMALL.row, SMALL)
    rows = fixed_batches(load("scenes", SMALL).validation, 2, 16, SMALL.row, SMALL)
    model = found.run.load()
    assert torch.equal(torch.cat([row["labels"] for row in rows]), exact["labels"])
    assert found.measured["accuracy"] == pytest.approx(measure(model, [exact], loss=accuracy).loss)
    ranges = quant.calibrate(model, sweep.calibration(job, train.load_tokens(seeing)), settings[0])
    with quant.quantized(model, settings[0], ranges):
        assert found.quantized["W8A8 min-max"] == measure(model, rows, loss=lm_loss).loss
        assert found.accuracies["W8A8 min-max"] == measure(model, rows, loss=accuracy).loss


def test_patches_and_their_norm_are_rounded_once():
    image = dataclasses.replace(SMALL, norm=True)
    model, settings = Transformer(dataclasses.replace(SEEING, image=image)).eval(), quant.QuantSettings(weight_bits=3)
    batches = [{"pixel_values": torch.randn(4, 1, 16, 16)}]
    ranges = quant.calibrate(model, batches, settings)
    assert {"embed_tokens", "patch_norm", "token_embedding.weight", "patch_norm.weight", "embed_positions"} <= set(
        ranges
    )
    exact = model.token_embedding.weight.clone()
    with quant.quantized(model, settings, ranges):
        assert 2 <= model.token_embedding.weight.unique().numel() <= 8
    assert torch.equal(model.token_embedding.weight, exact)
