"""The residual MLP on images: whitening, the zero head, first steps by hand, records, bad files."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ofutils import UserError
from ofutils.studies.optimizers import mlp

TINY = mlp.tasks("tiny", seeds=1)


@pytest.fixture(scope="module")
def digits():
    return mlp.prepare("digits", True)


def write(path, pictures, labels, column="img"):
    """A parquet file of images like the Hub's conversion of CIFAR-10."""
    pd.DataFrame({column: [{"bytes": one, "path": None} for one in pictures], "label": labels}).to_parquet(path)
    return str(path)


def png(pixels):
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def test_whitened_inputs_have_the_identity_for_their_covariance_and_lack_constant_pixels(digits):
    inputs, labels, held, held_labels = digits
    assert inputs.shape == (1438, 61) and held.shape == (359, 61) and len(labels) + len(held_labels) == 1797
    torch.testing.assert_close(inputs.T.cov(correction=0), torch.eye(61), atol=2e-5, rtol=0)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(61), atol=1e-6, rtol=0)


def test_without_whitening_images_are_only_moved_and_scaled():
    inputs, *_ = mlp.prepare("digits", False)
    pixels = torch.tensor(mlp.load("digits")[0])[torch.arange(1797) % 5 != 4]
    assert inputs.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-5)
    moved = pixels - pixels.mean(0)
    torch.testing.assert_close(inputs.double() * moved.norm() / inputs.double().norm(), moved, atol=1e-5, rtol=1e-5)


def test_a_fresh_model_puts_out_zeros_and_loses_one_over_the_number_of_classes(digits):
    model = mlp.MLP(TINY[0], 61, 10)
    outputs = model(digits[0])
    assert not outputs.any() and len(model.streams(digits[0])) == TINY[0].layers + 1
    assert torch.nn.functional.mse_loss(outputs, digits[1]).item() == pytest.approx(0.1)


@pytest.mark.parametrize("norm", ["srmsnorm", "none"])
def test_the_stream_is_what_the_formula_says(digits, norm):
    model, x = mlp.MLP(mlp.Task(norm=norm, width=8, layers=2), 61, 10), digits[0][:5]
    stream = x @ model.first.weight.T
    for up, down in zip(model.up, model.down, strict=True):
        read = stream / stream.square().mean(1, keepdim=True).sqrt() if norm == "srmsnorm" else stream
        stream = stream + (read @ up.T).clamp(min=0) @ down.T
    torch.testing.assert_close(model.streams(x)[-1], stream, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_first_step_moves_the_head_alone_and_as_computed_by_hand(digits, optimizer):
    task = mlp.Task(optimizer=optimizer, width=16, layers=2, batch=1438, steps=1, warmup=1, lr=0.5, eps=1e-12)
    torch.manual_seed(task.seed)
    before = mlp.MLP(task, 61, 10)
    after, rows = mlp.fit(task)
    inputs, targets, *_ = digits
    slope = -2 / targets.numel() * targets.T @ before.streams(inputs)[-1] / 4  # of the head, where it is 0
    moved = -0.5 * slope if optimizer == "sgd" else -0.5 * slope.sign()
    torch.testing.assert_close(after.head.weight, moved, rtol=1e-3, atol=1e-6)
    for name, weight in before.named_parameters():
        assert name == "head.weight" or torch.equal(weight, after.get_parameter(name))
    assert [row["step"] for row in rows] == [0, 1]


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [mlp.schedule(step, 100, 10) for step in range(100)]
    assert rates[:2] == [0.1, 0.2] and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_learns_and_repeats_to_the_bit(optimizer):
    lr = {"sgd": 3.0, "adam": 1e-2}[optimizer]
    task = mlp.Task(optimizer=optimizer, width=32, layers=2, steps=60, warmup=6, lr=lr)
    model, rows = mlp.fit(task)
    again, same = mlp.fit(task)
    assert rows == same and torch.equal(model.head.weight, again.head.weight)
    assert rows[0]["loss"] == pytest.approx(0.1) and rows[-1]["loss"] < 0.03 and rows[-1]["held accuracy"] > 0.9


def test_a_run_that_diverges_keeps_what_was_finite():
    _, rows = mlp.fit(mlp.Task(optimizer="sgd", width=16, layers=2, steps=40, warmup=0, lr=1e6))
    assert rows[0]["step"] == 0 and rows[-1]["step"] < 40 and all(np.isfinite(row["loss"]) for row in rows)


def test_records_are_recalled_and_make_the_tables(out):
    record = mlp.perform(TINY[0])
    assert mlp.recall(TINY[0]) == record and mlp.recall(TINY[1]) is None
    assert record["environment"]["corpus"] == mlp.load("digits")[2]
    wanted = TINY[:2]
    steps = mlp.layers("small", wanted)
    assert (
        list(steps["layer"].unique()) == ["1", "2", "out"] and len(steps) == 2 * 5 * 3
    )  # runs, steps 0 to 4, layers
    runs = mlp.table(steps).set_index("method")
    first = steps[steps["method"] == "SGD, Pre-SRMSNorm"]
    inner = first[first["layer"] != "out"]
    assert runs.loc["SGD, Pre-SRMSNorm", "peak"] == inner["kurtosis"].max()
    assert runs.loc["SGD, Pre-SRMSNorm", "start"] == inner[inner["step"] == 0]["kurtosis"].max()
    assert runs.loc["SGD, Pre-SRMSNorm", "loss"] == record["result"]["rows"][-1]["loss"]
    pd.testing.assert_frame_equal(mlp.layers("small", wanted), steps)


def run(method, seed, peak, start=1.0, end=1.0, accuracy=1.0):
    return {"method": method, "seed": seed, "start": start, "peak": peak, "end": end, "accuracy": accuracy}


def test_claims_give_the_ratios_by_seed():
    methods = {task.method for task in mlp.tasks()}
    adam, sgd = "Adam, Pre-SRMSNorm", "SGD, Pre-SRMSNorm"
    peaks = dict.fromkeys(methods, 2.0) | {adam: 8.0, f"{adam}, eps 0.0001": 4.0}
    rows = [run(method, seed, peak * seed) for method, peak in peaks.items() for seed in (1, 2)]
    for row in rows:
        row["end"] = 0.5 if row["method"] == sgd else 1.0
        row["accuracy"] = 0.9 if row["method"] == f"{adam}, eps 0.001" else 1.0
    found = {id: (values, margin) for id, _, values, margin, ratio in mlp.claims(pd.DataFrame(rows)) if ratio}
    assert {id: list(values) for id, (values, _) in found.items()} == {
        "he2024-mlp-adam": [4, 4],
        "he2024-mlp-sgd-falls": [2, 2],
        "he2024-mlp-eps": [2, 2],  # 1e-3 does not train as well
        "he2024-mlp-whitening": [4, 4],
    }


def test_the_rates_are_what_the_recorded_grid_chooses():
    assert all(map(mlp.recall, mlp.grid_tasks()))
    assert mlp.choose(mlp.table(mlp.layers("small", mlp.grid_tasks()))) == mlp.RATES


def test_a_parquet_file_of_images_is_trained_on(out, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    path = write(tmp_path / "images.parquet", map(png, pixels), [row % 3 for row in range(20)])
    read, labels, _ = mlp.load(path)
    assert np.array_equal(read, pixels.reshape(20, 48)) and list(labels[:4]) == [0, 1, 2, 0]
    (row,) = mlp.table(mlp.layers("tiny", mlp.tasks("tiny", path, seeds=1)[:1])).to_dict("records")
    assert 0 < row["loss"] < 1


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda path: None, "FileNotFoundError"),
        (lambda path: path.write_text("no parquet"), "Parquet"),
        (lambda path: write(path, [png(np.zeros((2, 2), np.uint8))], [0], "picture"), "img"),
        (lambda path: write(path, [b"no image"], [0]), "cannot identify image"),
        (lambda path: write(path, [png(np.zeros((n, 2), np.uint8)) for n in (2, 3)], [0, 1]), "same shape"),
        (lambda path: write(path, [png(np.zeros((2, 2), np.uint8))], [-1]), "out of bounds"),
    ],
    ids=["missing", "text", "columns", "no image", "sizes", "label"],
)
def test_a_bad_file_costs_one_clear_line(tmp_path, make, why):
    make(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="bad.parquet': needs parquet of img") as error:
        mlp.load(str(tmp_path / "bad.parquet"))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_a_task_that_fails_is_named(out, monkeypatch):
    monkeypatch.setattr(mlp, "fit", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="SGD, Pre-SRMSNorm, seed 1: ZeroDivisionError"):
        mlp.run("tiny", TINY[:1], workers=0)


def test_the_command_line_trains_and_exports(out, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ofutils.params.root", lambda: tmp_path)
    monkeypatch.setitem(mlp._SIZES, "small", mlp._SIZES["tiny"])
    mlp.main(["--seeds", "1", "--steps", "2", "--workers", "0"])
    assert "SGD, Pre-SRMSNorm" in capsys.readouterr().out
    exported = (tmp_path / "figures" / "records" / "mlp.small.jsonl").read_text()
    assert len(exported.splitlines()) == len(TINY)
