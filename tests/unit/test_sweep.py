import dataclasses
import os
import signal

import pytest
import torch

from ofutils import UserError, hub, records, sweep, train
from ofutils.quant import QuantSettings
from ofutils.sweep import Evaluation, Job
from ofutils.train import Published
from ofutils.transformer import Transformer, TransformerConfig

EVALUATION = Evaluation(sites=("resid_post",), batches=2, batch=4)
SETTINGS = (QuantSettings(batches=2), QuantSettings(weight_bits=4, activation_bits=4, batches=2))


def jobs(config, seeds=2):
    return [Job("vanilla", dataclasses.replace(config, seed=s), SETTINGS, EVALUATION) for s in range(seeds)]


def test_a_sweep_here_and_in_processes_give_the_same_numbers(out, config, monkeypatch):
    here = sweep.run(jobs(config), workers=0)
    monkeypatch.setenv("OFUTILS_OUT", str(out / "processes"))
    apart = sweep.run(jobs(config), workers=2)
    for a, b in zip(here, apart, strict=True):
        assert a.error is None and b.error is None
        assert set(a.quantized) == {"W8A8", "W4A4"}
        assert a.quantized["W4A4"] > a.measured["loss"]
        assert a.measured["loss"] == pytest.approx(b.measured["loss"], abs=1e-4)


def test_a_second_sweep_recalls_everything(out, config, monkeypatch):
    first = sweep.run(jobs(config), workers=0)
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    second = sweep.run(jobs(config), workers=0)
    assert [o.quantized for o in first] == [o.quantized for o in second]
    assert [o.measured for o in first] == [o.measured for o in second]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_run_is_reported_and_the_rest_is_finished(out, config, workers, capfd):
    bad = Job("broken", dataclasses.replace(config, corpus=str(out / "nowhere")), SETTINGS, EVALUATION)
    good = jobs(config)
    with pytest.raises(UserError, match="no such file or folder"):
        train.find(dataclasses.replace(bad.config)) or train.load_tokens(bad.config)
    outcomes = sweep.run([good[0], bad, good[1]], workers=workers)
    assert [o.error is None for o in outcomes] == [True, False, True]
    assert "failed: broken, lr 0.01, seed 0" in capfd.readouterr().out


def test_a_process_that_dies_costs_its_own_run_only(out, config, monkeypatch):
    config = dataclasses.replace(config, steps=4000, measure_every=4000)
    short = dataclasses.replace(config, steps=20)
    planned = [
        Job("killed", config, (), EVALUATION),
        *[Job("fine", dataclasses.replace(short, seed=s), (), EVALUATION) for s in range(2)],
    ]
    killed = []

    class Bar(sweep.tqdm):
        def update(self, n=1):
            import multiprocessing

            for child in multiprocessing.active_children():
                if not killed and child.pid == first_child():
                    killed.append(child.pid)
                    os.kill(child.pid, signal.SIGKILL)
            return super().update(n)

    def first_child():
        import multiprocessing

        first = min(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
        return first.pid

    monkeypatch.setattr(sweep, "tqdm", Bar)
    outcomes = sweep.run(planned, workers=2)
    assert killed
    assert "its process died (exit code -9)" in outcomes[0].error
    assert [o.error for o in outcomes[1:]] == [None, None]


def test_a_diverged_run_is_an_outcome_with_an_error(out, config):
    job = Job("wild", dataclasses.replace(config, lr=1e30, clip=1e9, warmup=0), SETTINGS, EVALUATION)
    for _ in range(2):
        assert sweep.run([job], workers=0)[0].error == "diverged at step 5"


def test_records_exported_are_found_without_the_runs(out, config, monkeypatch, tmp_path):
    outcomes = sweep.run(jobs(config), workers=0)
    monkeypatch.setattr(train.params, "root", lambda: tmp_path / "checkout")
    path = sweep.export(outcomes, "test")
    assert path.parent == tmp_path / "checkout" / "figures" / "records"
    sweep.export(outcomes[:1], "test")  # adds, and takes nothing away
    assert sweep.export(outcomes, "again").read_text() == ""  # what another file holds
    monkeypatch.setenv("OFUTILS_OUT", str(tmp_path / "empty"))
    again = sweep.run(jobs(config), workers=0)
    assert [o.quantized for o in again] == [o.quantized for o in outcomes]
    assert not again[0].run.has_weights


def test_recipes_name_their_scales_and_take_overrides():
    recipe = sweep.read_recipe("03_quant", "tiny", steps=8, seeds=2)
    assert {job.config.seed for job in recipe.jobs} == {1, 2}
    assert {job.config.steps for job in recipe.jobs} == {8}
    with pytest.raises(UserError, match="unknown recipe '03_qaunt' .did you mean '03_quant'"):
        sweep.read_recipe("03_qaunt", "tiny")
    with pytest.raises(UserError, match="has no recipe for scale 'huge'"):
        sweep.read_recipe("03_quant", "huge")


@pytest.mark.parametrize("scale", ["tiny", "small", "gpu", "paper"])
def test_every_recipe_compares_methods_on_equal_terms(scale):
    recipe = sweep.read_recipe("03_quant", scale, corpus="stdlib" if scale == "paper" else "")
    first = recipe.jobs[0].config
    assert len({job.config.name for job in recipe.jobs}) == len(recipe.jobs)
    for job in recipe.jobs:
        config = job.config
        assert (config.steps, config.batch, config.corpus) == (first.steps, first.batch, first.corpus)
        assert (config.model.layers, config.model.width) == (first.model.layers, first.model.width)
    if scale != "tiny":
        assert len({job.config.seed for job in recipe.jobs}) >= 3


def test_a_scale_this_machine_cannot_carry_loads_records_or_says_so(out, monkeypatch):
    import torch

    monkeypatch.setattr(sweep.params, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sweep, "recall", lambda job: None)
    with pytest.raises(UserError, match="needs a GPU: .* have no record here"):
        sweep.read_recipe("03_quant", "gpu").run()


def test_rates_wait_for_the_grid_and_then_follow_from_it(out, corpus, monkeypatch):
    base = {"model": {"vocab": 300, "layers": 2, "width": 16, "heads": 2, "context": 16}, "corpus": str(corpus)}
    base |= {"batch": 4, "steps": 20, "warmup": 4, "measure_every": 5, "eval_batches": 2}
    scale = {"seeds": 1, "workers": 0, "lr": "rule", "grid": {"vanilla": [1e-2, 3e-2]}, "base": base}
    scale |= {
        "follows": {"half": ["vanilla", 0.5]},
        "evaluation": {"sites": ["resid_post"], "batches": 1, "batch": 4},
    }
    toy = {"methods": {"vanilla": {}, "half": {}, "fixed": {"lr": 7e-3}}, "scales": {"tiny": scale}}
    monkeypatch.setattr(sweep, "_read_yaml", lambda name: toy)
    monkeypatch.setattr(train.params, "root", lambda: out)
    recipe = sweep.read_recipe("toy", "tiny")
    assert recipe.unsettled == ("vanilla", "half")
    with pytest.raises(UserError, match="no learning rate for vanilla, half: not all of its grid is recorded"):
        recipe.runnable()
    outcomes = recipe.run()
    assert [job.method for job in recipe.grid] == ["vanilla"] * 2
    (chosen,) = sweep.largest_good_rates(recipe.grid).values()
    assert [outcome.job.config.lr for outcome in outcomes] == [chosen, chosen / 2, 7e-3]
    assert recipe.settled().unsettled == () and recipe.settled().jobs == tuple(o.job for o in outcomes)


def test_a_recipe_may_give_every_method_several_rates(monkeypatch):
    scale = {"seeds": 2, "first_seed": 0, "rates": [1e-3, 1e-2], "base": {"lr": 5.0, "steps": 20, "warmup": 4}}
    toy = {"methods": {"vanilla": {}, "soap": {"optimizer": "soap"}}, "scales": {"tiny": scale}}
    monkeypatch.setattr(sweep, "_read_yaml", lambda name: toy)
    jobs = sweep.read_recipe("toy", "tiny").jobs
    order = [(job.config.seed, job.method, job.config.lr) for job in jobs]
    assert order[:4] == [(0, "vanilla", 1e-3), (0, "vanilla", 1e-2), (0, "soap", 1e-3), (0, "soap", 1e-2)]
    assert len(order) == 8 and order[4][0] == 1
    scale["rates"] = {"soap": [1e-3]}
    assert [job.config.lr for job in sweep.read_recipe("toy", "tiny").jobs] == [5.0, 1e-3] * 2


def test_another_corpus_than_the_runs_is_refused_before_anything_is_measured(out, config, corpus):
    run = train.train(config, report=lambda *_: None)
    (corpus / "more.txt").write_text("one more document that changes the corpus")
    train.data.load_corpus.cache_clear()
    outcome = sweep.run([Job("vanilla", config, SETTINGS, EVALUATION)], workers=0)[0]
    assert f"{run.config.name} was trained on another corpus" in outcome.error
    assert not list((out / "runs" / "records").glob("measure-*"))


def test_a_record_without_its_weights_is_trained_again_where_they_are_needed(out, config):
    first = sweep.run(jobs(config, seeds=1), workers=0)[0]
    for path in (out / "runs" / "records").glob("quant-*"):
        path.unlink()
    (out / "runs" / config.name / "model.safetensors").unlink()
    assert sweep.run(jobs(config, seeds=1), workers=0)[0].quantized == first.quantized


def test_two_settings_of_one_name_are_refused(config):
    with pytest.raises(UserError, match="two quantization settings"):
        Job("vanilla", config, (QuantSettings(), QuantSettings(percentile=99.9)))


def test_paper_scale_needs_a_text():
    with pytest.raises(UserError, match="needs a text to train on: name it with corpus"):
        sweep.read_recipe("03_quant", "paper")


def test_the_rates_used_are_those_that_the_rule_chooses_from_the_committed_grid(out):
    recipe = sweep.read_recipe("03_quant", "small")
    losses = {}
    for outcome in map(sweep.recall, recipe.grid):
        losses.setdefault(outcome.job.method, {})[outcome.job.config.lr] = outcome.measured["loss"]
    assert {len(rates) for rates in losses.values()} == {4}
    used = {job.method: job.config.lr for job in recipe.jobs}
    for method, rates in losses.items():
        assert used[method] == max(rate for rate, loss in rates.items() if loss <= min(rates.values()) + 0.1)


def test_sweep_says_what_is_missing():
    with pytest.raises(UserError, match="name a recipe first"):
        sweep.main(["--scale", "tiny"])
    with pytest.raises(UserError, match="has no grid at scale tiny"):
        sweep.main(["03_quant", "--scale", "tiny", "--grid"])


OVER_TRAINING = Evaluation(
    sites=("blocks.0.resid_pre", "resid_post"), batches=2, batch=4, meters=("neuron_kurtosis",), over_training=True
)


def test_a_run_is_measured_at_every_checkpoint_and_recalled_from_records_alone(out, config, monkeypatch):
    job = Job("vanilla", config, (), OVER_TRAINING)
    (outcome,) = sweep.run([job], workers=0)
    assert outcome.error is None
    assert tuple(point["step"] for point in outcome.trajectory) == job.checkpoints == (0, 1, 2, 4, 8, 16, 20)
    assert set(outcome.trajectory[0]["sites"]) == {"blocks.0.resid_pre", "blocks.0.resid_post", "blocks.1.resid_post"}
    assert outcome.trajectory[-1]["loss"] == outcome.measured["loss"] < outcome.trajectory[0]["loss"]
    assert len({point["weights"] for point in outcome.trajectory}) == 7
    for path in (out / "runs").glob("train-*/*.safetensors"):
        path.unlink()
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained again"))
    assert sweep.run([job], workers=0)[0].trajectory == outcome.trajectory


def test_checkpoints_that_are_missing_are_made_by_training_again(out, config):
    sweep.run([Job("vanilla", config, (), EVALUATION)], workers=0)  # the run is finished, but nothing was kept
    (outcome,) = sweep.run([Job("vanilla", config, (), OVER_TRAINING)], workers=0)
    assert outcome.error is None and len(outcome.trajectory) == 7


def test_published_checkpoints_are_measured_once_and_go_on_where_they_stopped(out, corpus, monkeypatch):
    text = str(corpus / "1.txt")
    (corpus / "1.txt").write_text("\n\n".join(f"Paragraph {n} of many." for n in range(60)))
    loaded, characters = [], hub.tokenizer(hub.STAND_IN)

    def model(name, revision, head):
        loaded.append(revision)
        torch.manual_seed(int(revision.removeprefix("step")))
        return Transformer(TransformerConfig(vocab=200, layers=2, width=16, heads=2, context=16)).eval()

    monkeypatch.setattr(sweep.hub, "model", model)
    monkeypatch.setattr(sweep.hub, "tokenizer", lambda name, revision: characters)
    evaluation = dataclasses.replace(OVER_TRAINING, text=text, context=16)
    (half,) = sweep.run([Job("70m", Published("somebody/model", (0, 1)), (), evaluation)], workers=0)
    (whole,) = sweep.run([Job("70m", Published("somebody/model", (0, 1, 4)), (), evaluation)], workers=0)
    assert half.error is None and whole.error is None
    assert loaded == ["step0", "step1", "step4"]
    assert whole.trajectory[:2] == half.trajectory and whole.measured == whole.trajectory[-1]
    (corpus / "1.txt").write_text("\n\n".join(f"Another paragraph {n}." for n in range(60)))
    sweep.data.load_corpus.cache_clear()
    (other,) = sweep.run([Job("70m", Published("somebody/model", (0, 1)), (), evaluation)], workers=0)
    assert loaded == ["step0", "step1", "step4", "step0", "step1"]
    assert other.trajectory[0]["loss"] != half.trajectory[0]["loss"]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (Published("a/b", (0,)), SETTINGS, "published checkpoints are measured, not quantized"),
        (Published("a/b", ()), (), "a/b: no checkpoints to measure"),
    ],
)
def test_what_cannot_be_done_with_published_checkpoints_is_refused(source, settings, message):
    with pytest.raises(UserError, match=message):
        Job("70m", source, settings)


def test_the_recipe_of_published_checkpoints_takes_steps_and_text():
    recipe = sweep.read_recipe("01_pythia_kurtosis", "paper", steps=4, corpus="held_out.txt")
    assert [job.config.name for job in recipe.jobs] == [
        f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m")
    ]
    assert all(job.config.steps == (0, 1, 2, 4) and job.evaluation.text == "held_out.txt" for job in recipe.jobs)


def test_the_recipe_of_published_checkpoints_takes_another_model():
    (job,) = sweep.read_recipe("01_pythia_kurtosis", "paper", model="EleutherAI/pythia-14m").jobs
    assert (job.method, job.config.name, len(job.checkpoints)) == ("14m", "EleutherAI/pythia-14m", 20)
    for name, scale in (("01_pythia_kurtosis", "small"), ("03_quant", "tiny")):
        with pytest.raises(UserError, match=f"{name} at scale {scale} trains its own models; .* needs scale paper"):
            sweep.read_recipe(name, scale, model="EleutherAI/pythia-14m")


@pytest.mark.parametrize("scale", ["tiny", "small", "gpu"])
def test_a_scale_can_have_sizes_of_its_own(scale):
    recipe = sweep.read_recipe("01_pythia_kurtosis", scale)
    sizes = [sum(p.numel() for p in Transformer(job.config.model).parameters()) for job in recipe.jobs[:3]]
    assert [job.method for job in recipe.jobs[:3]] == ["S", "M", "L"] and sizes == sorted(sizes)
    assert all(job.config.model.parallel and job.checkpoints[-1] == job.config.steps for job in recipe.jobs)


def test_committed_files_are_read_once_however_many_there_are(tmp_path, monkeypatch):
    store, read = records.Store(tmp_path / "runs", tmp_path / "committed"), []
    (tmp_path / "committed").mkdir()
    for number in range(40):
        one = store.write("kind", {"n": number}, {"x": number}, {})
        store.export([one], f"file-{number}")
        store.path("kind", {"n": number}).unlink()
    records._read_lines.cache_clear()
    parse = records._parse
    monkeypatch.setattr(records, "_parse", lambda *given: read.append(given) or parse(*given))
    assert [store.find("kind", {"n": number})["result"]["x"] for number in (0, 39, 7)] == [0, 39, 7]
    assert len(read) == 40
