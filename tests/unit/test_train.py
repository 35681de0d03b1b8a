import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ofutils import UserError, optim, params, resume, train
from ofutils.train import TrainConfig
from ofutils.transformer import Transformer
from tests.configurations import METHODS, SMALL


def quiet(config, **more):
    return train.train(config, report=lambda *_: None, **more)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Stop(Exception):
    pass


def stop_at(step):
    def report(done, loss):
        if done >= step:
            raise Stop

    return report


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
@pytest.mark.parametrize("method", ["vanilla", "OP layernorm", "mlp gate", "dropout"])
def test_a_broken_run_resumes_to_the_bit(out, config, monkeypatch, method, optimizer):
    """To the bit between runs on one machine with one number of threads; two machines differ in their last bits."""
    model = dataclasses.replace(SMALL, **METHODS[method])
    config = dataclasses.replace(config, model=model, optimizer=optimizer)
    straight = quiet(config)
    weights = straight.load()
    monkeypatch.setenv("OFUTILS_OUT", str(out / "again"))
    with pytest.raises(Stop):
        train.train(config, report=stop_at(20), save_every=7)  # killed at 20, last saved at 14
    resumed = quiet(config)
    assert same_weights(resumed.load(), weights)
    assert resumed.log == straight.log
    assert [entry["step"] for entry in resumed.log] == [5, 10, 15, 20]


def test_sigkill_and_the_same_command_again_continue_to_the_bit(out, corpus, config):
    config = dataclasses.replace(config, steps=2000, measure_every=1000)
    (out / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    often = "import sys; from ofutils import train; train.SAVE_AFTER = 0.2; train.main(sys.argv[1:])"
    command = [sys.executable, "-c", often, "--config", str(out / "run.yaml"), "--steps", "900"]

    def run(folder, **more):
        return subprocess.Popen(command, env=os.environ | {"OFUTILS_OUT": str(folder)}, **more)

    assert run(out / "straight").wait() == 0
    killed = run(out / "killed")
    name = dataclasses.replace(config, steps=900).name
    checkpoint = out / "killed" / "runs" / name / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert checkpoint.exists() and not checkpoint.with_name("model.safetensors").exists()
    assert run(out / "killed").wait() == 0
    weights = [load_file(out / place / "runs" / name / "model.safetensors") for place in ("straight", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not checkpoint.exists()


def test_a_stop_saves_the_step_at_which_it_was_asked_for(out, config):
    def report(step, loss):
        if step == 10:
            raise train.Stopped

    with pytest.raises(train.Stopped):
        train.train(config, report=report)
    seen = []
    run = train.train(config, report=lambda step, loss: seen.append(step))
    assert seen == [20] and [entry["step"] for entry in run.log] == [5, 10, 15, 20]


class Gradients:
    """An optimizer that keeps the gradients and moves nothing."""

    param_groups = ()

    def __init__(self, model):
        self.model = model

    def step(self):
        self.found = [parameter.grad.clone() for parameter in self.model.parameters()]

    def zero_grad(self):
        self.model.zero_grad()


def gradients(config):
    loop = train.prepare(config, train.load_tokens(config), Accelerator(cpu=True))
    loop = dataclasses.replace(loop, optimizer=Gradients(loop.model.double()))
    return loop.step(3), loop.optimizer.found


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_at_once_change_nothing_but_the_order_of_sums(out, config, rows):
    loss, whole = gradients(config)
    again, parts = gradients(dataclasses.replace(config, rows_at_once=rows))
    bound = 8 * torch.finfo(torch.float32).eps  # the loss is taken in float32, all else here in float64
    torch.testing.assert_close(again, loss, rtol=bound, atol=0)
    largest = max(one.abs().max() for one in whole)
    assert max((one - other).abs().max() for one, other in zip(whole, parts, strict=True)) <= bound * largest


@pytest.mark.parametrize("method", ["vanilla", "clipped", "mlp gate", "OP layernorm", "post"])
def test_the_step_is_one_graph_for_the_compiler(method):
    """`compile` itself is for GPUs; that nothing in model and loss breaks the graph can be seen anywhere."""
    model = Transformer(dataclasses.replace(SMALL, **METHODS[method]))
    batch, found = torch.randint(0, SMALL.vocab, (3, SMALL.context)), []
    for loss in (train._loss, torch.compile(train._loss, backend="eager", fullgraph=True)):
        model.zero_grad()
        loss(model, batch).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_training_learns_and_a_finished_run_is_loaded_not_repeated(out, config, monkeypatch):
    config = dataclasses.replace(config, steps=60)
    run = quiet(config)
    assert run.log[-1]["loss"] < run.log[0]["loss"] - 0.3
    monkeypatch.setattr(train, "Accelerator", lambda **_: pytest.fail("trained again"))
    assert quiet(config).record == run.record


def test_denormal_numbers_are_zero_while_training_and_are_there_again_afterwards(out, config):
    def half_of_a_denormal():
        return torch.tensor([1e-40]).mul(0.5).item()

    seen = []
    train.train(config, report=lambda step, loss: seen.append(half_of_a_denormal()))
    assert seen and not any(seen) and half_of_a_denormal() > 0


def test_names_depend_on_what_makes_the_numbers_only(config):
    assert TrainConfig().name == TrainConfig(lr=3e-3).name
    assert len({config.name, dataclasses.replace(config, seed=1).name, TrainConfig().name}) == 3


def test_seeds_differ_and_the_same_seed_agrees(out, config, monkeypatch):
    first = quiet(config).load()
    assert not same_weights(first, quiet(dataclasses.replace(config, seed=1)).load())
    monkeypatch.setenv("OFUTILS_OUT", str(out / "again"))
    assert same_weights(first, quiet(config).load())


def test_a_start_from_a_loaded_model_has_a_name_of_its_own(out, config):
    first = quiet(config)
    second = dataclasses.replace(config, start=first.record["name"], lr=1e-3)
    model = first.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = quiet(second, model=model)
    assert run.log[0]["loss"] < first.log[0]["loss"]
    assert not all(torch.equal(t, before[n]) for n, t in run.load().state_dict().items())
    with pytest.raises(UserError, match="needs both the model and config.start"):
        quiet(dataclasses.replace(second, seed=1))
    with pytest.raises(UserError, match="needs both the model and config.start"):
        quiet(config, model=Transformer(SMALL))


def test_a_diverged_run_is_finished_and_says_so(out, config):
    # without a clip in the way, a rate of 1e30 overflows at once
    run = quiet(dataclasses.replace(config, lr=1e30, clip=1e9, warmup=0))
    assert run.diverged == 5 and run.log[-1]["step"] == 5


def test_a_checkpoint_of_another_corpus_is_refused_and_a_record_says_so(out, config, corpus, monkeypatch, capsys):
    with pytest.raises(Stop):
        train.train(config, report=stop_at(10), save_every=5)
    (corpus / "more.txt").write_text("one more document that changes the corpus")
    train.data.load_corpus.cache_clear()
    with pytest.raises(UserError, match="was made on another corpus"):
        quiet(config)
    (out / "runs" / config.name / "checkpoint.safetensors").unlink()
    quiet(config)
    (corpus / "yet.txt").write_text("and yet another one")
    train.data.load_corpus.cache_clear()
    assert train.find(config) is not None
    assert "made on another corpus" in capsys.readouterr().out
    shutil.rmtree(corpus)
    train.data.load_corpus.cache_clear()
    assert train.find(config) is not None
    assert "here none" in capsys.readouterr().out


def test_damaged_files_are_named(out, config):
    folder = out / "runs" / config.name
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match="checkpoint .* is not readable; delete it"):
        quiet(config)
    save_file({"a": torch.zeros(1)}, folder / "checkpoint.safetensors")
    with pytest.raises(UserError, match="checkpoint .* is not readable; delete it"):
        quiet(config)
    record = out / "runs" / "records" / f"{config.name}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text('{"name": "half a re')
    with pytest.raises(UserError, match="record .* is not readable; delete it"):
        train.find(config)
    record.write_text(json.dumps({"name": "train-0", "key": {}, "numerics": 1, "environment": {}, "result": {}}))
    with pytest.raises(UserError, match="does not hold what its name says"):
        train.find(config)


def test_a_run_without_its_weights_says_so(out, config):
    run = quiet(config)
    (out / "runs" / config.name / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its weights are not"):
        run.load()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(out, config, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        quiet(config)
    assert not any(path.suffix == ".tmp" for path in out.rglob("*"))
    assert train.find(config) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpes", "5"], "unknown parameter 'stpes' .did you mean 'steps'"),
        (["--steps", "hello"], "parameter steps: expected int, got 'hello'"),
        (["--model.layer", "2"], "unknown parameter 'model.layer' .did you mean 'model.layers'"),
        (["--model.gate", "linear"], "unknown parameter 'model.gate' .did you mean 'model.attention.gate'"),
        (["--objective", "mln"], "unknown objective 'mln' .did you mean 'mlm'.*; known: clm, mlm"),
        (["--optimizer", "adam"], "unknown optimizer 'adam' .did you mean 'adamw'"),
        (["steps=5"], "expected a flag such as --steps 100"),
        (["--steps"], "parameter steps: expected int, got True"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--model", "5", "--model.layers", "4"], "--model is a group of parameters"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--betas", "1.5,0.9"], "betas must be at least 0 and below 1, got 1.5"),
        (["--betas", "0.9"], "parameter betas: expected 2 values, got '0.9'"),
        (["--characters", "-5"], "characters must be at least 0"),
        (["--model.mlp_width", "-5"], "mlp_width must be at least 0"),
        (["--model.context", "1"], "leaves nothing to predict"),
        (["--sites", ""], "sites must name at least one"),
        (["--lr", "0"], "lr must be above 0, got 0.0"),
        (["--model.attention.gate", "liner"], "unknown model.attention.gate 'liner' .did you mean 'linear'"),
        (["--precision", "fp16"], "unknown precision 'fp16' .did you mean 'bf16'"),
    ],
)
def test_bad_flags_are_one_clear_line(arguments, message):
    with pytest.raises(UserError, match=message):
        params.read(TrainConfig, arguments)


def test_flags_and_yaml_give_the_same_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 1e2\nlr: 1e-3\nbetas: [0.9, 0.99]\nmodel: {layers: 3, attention: {gate: linear}}\n")
    flags = [
        "--steps",
        "100",
        "--lr",
        "1e-3",
        "--betas",
        "[0.9,0.99]",
        "--model.layers",
        "3",
        "--model.attention.gate",
        "linear",
    ]
    assert params.read(TrainConfig, ["--config", str(path)]) == params.read(TrainConfig, flags)
    assert params.read(TrainConfig, ["--config", str(path), "--model.layers", "5"]).model.layers == 5
    assert params.read(TrainConfig, ["--config", str(path), "--model.layers=5"]).model.attention.gate == "linear"


def test_sites_are_checked_before_the_training(out, config):
    with pytest.raises(UserError, match="unknown site 'resid_pots'"):
        quiet(dataclasses.replace(config, sites=("resid_pots",)))


def test_lists_of_names_come_with_or_without_brackets():
    for text in ("resid_pre,norm1", "resid_pre, norm1", "['resid_pre', 'norm1']"):
        assert params.read(TrainConfig, ["--sites", text]).sites == ("resid_pre", "norm1")
    assert params.read(TrainConfig, ["--sites", "blocks.[01].norm1"]).sites == ("blocks.[01].norm1",)


def test_log_spaced_steps_begin_with_0_double_and_end_with_the_last():
    assert train.log_spaced(20) == (0, 1, 2, 4, 8, 16, 20)
    assert train.log_spaced(16) == (0, 1, 2, 4, 8, 16)
    assert train.log_spaced(1) == (0, 1)


def test_kept_checkpoints_are_the_weights_at_their_steps_and_change_nothing(out, config):
    run = quiet(config, keep=True)
    steps, models = zip(*train.checkpoints(config), strict=True)
    assert steps == (0, 1, 2, 4, 8, 16, 20)
    assert len({resume.weights_digest(model) for model in models}) == 7
    torch.manual_seed(config.seed)
    start = Transformer(config.model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), start.parameters(), strict=True))
    last = run.load()
    assert all(torch.equal(a, b) for a, b in zip(models[-1].parameters(), last.parameters(), strict=True))
    ((_, fourth),) = train.checkpoints(config, (4,))
    assert resume.weights_digest(fourth) == resume.weights_digest(models[3])
    plain = quiet(config, again=True)
    assert plain.log == run.log


def test_checkpoints_that_were_not_kept_are_one_clear_line(out, config):
    quiet(config)
    with pytest.raises(UserError, match="the weights after step 0 were not kept"):
        next(train.checkpoints(config))


def test_keeping_after_the_fact_trains_again_and_old_checkpoints_never_stay(out, config, corpus):
    first = quiet(config)
    quiet(config, keep=True)  # finished, but nothing was kept
    digests = [resume.weights_digest(model) for _, model in train.checkpoints(config)]
    assert len(digests) == 7 and quiet(config, keep=True).log == first.log
    (corpus / "0.txt").write_text("another text " * 400)
    train.data.load_corpus.cache_clear()
    quiet(config, again=True)  # on another text, without keeping: the weights of the old one are gone
    with pytest.raises(UserError, match="were not kept"):
        next(train.checkpoints(config))


def test_a_run_begun_without_keeping_starts_over_when_it_shall_keep(out, config):
    with pytest.raises(Stop):
        train.train(config, report=stop_at(20), save_every=7)
    quiet(config, keep=True)
    straight = [resume.weights_digest(model) for _, model in train.checkpoints(config)]
    quiet(config, again=True, keep=True)
    assert straight == [resume.weights_digest(model) for _, model in train.checkpoints(config)]


def test_copies_of_weights_have_the_same_digest():
    torch.manual_seed(1)
    one, other = Transformer(SMALL), Transformer(SMALL)
    assert resume.weights_digest(one) != resume.weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert resume.weights_digest(one) == resume.weights_digest(other)


@pytest.mark.parametrize(("times", "said"), [(3.4, "takes 3.4 times as long as in fp32"), (0.3, "")])
def test_bf16_on_a_cpu_that_is_slow_at_it_says_so_in_one_line(out, config, monkeypatch, capsys, times, said):
    monkeypatch.setattr(train, "slowness_of_bf16", lambda: times)
    quiet(dataclasses.replace(config, steps=1, precision="bf16"))
    lines = capsys.readouterr().out.splitlines()
    assert [said in line for line in lines] == [True] * bool(said)


def test_how_slow_bf16_is_is_measured_without_drawing_random_numbers():
    state = torch.get_rng_state()
    assert train.slowness_of_bf16.__wrapped__() > 0
    assert torch.equal(torch.get_rng_state(), state)
