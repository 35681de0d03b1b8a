"""Scale `paper` without its machine: every notebook runs with few steps on stand-ins of what it would use.

Checkpoints and data sets come from a cache of stand-ins (tests/stand_ins.py), trainings that need a GPU from
stand-in records; the notebook's own code is the real one. Beside it, one step of the real model is taken.
"""

import dataclasses
import math
import random
import re
from pathlib import Path

import papermill
import pytest
import torch
import transformers
from huggingface_hub import constants

from ofutils import hub, params, preflight, probes, sources, sweep, train
from ofutils.records import differing
from ofutils.studies.clipped_softmax_gating import sinks
from ofutils.studies.moment_updates import follow
from ofutils.studies.optimizers import mlp
from ofutils.studies.quant import finetuned
from ofutils.studies.vit import finetune as vit_finetune
from ofutils.studies.vit import sinks as vit_sinks
from ofutils.transformer import Transformer, clm_loss
from tests import stand_ins

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def no_records(corpus):
    """For a notebook whose scale `paper` trains nothing."""


def records_of_03_quant(corpus):
    for name in ("03_quant", "03_quant_tables", "03_quant_bert", "03_quant_larger"):
        write_records(sweep.read_recipe(name, "paper", steps=8, corpus=corpus))
    found = {"inf_norm": 5.0, "tensor_kurtosis": 9.0}
    sites = {f"blocks.{block}.{site}": found for block in range(24) for site in ("attn_out", "resid_post")}
    log = [{"step": step, "loss": 4.0 - 0.1 * step, "sites": sites} for step in range(1, 9)]
    for task in finetuned.tasks("paper", 8, 0, corpus):
        environment = params.environment() | {"corpus": train.load_tokens(task.config).corpus}
        train.store().write("train", differing(task.config), {"log": log, "diverged": None}, environment)


def records_of_06_clipped_softmax_gating(corpus):
    draw = random.Random(0)
    for name in sinks.RECIPES:
        recipe = sweep.read_recipe(name, "paper", steps=8, seeds=1, corpus=corpus)
        write_records(recipe)
        for job in recipe.jobs:
            found = {kind: {of: draw.random() for of in ("tokens", "attention", "outliers")} for kind in sinks.KINDS}
            train.store().write("sinks", {"run": differing(job.config)}, found, params.environment())


def records_of_07_op_block(corpus):
    for name in ("07_op_block", "07_op_block_rates", "07_op_block_own", "07_op_block_forms"):
        write_records(sweep.read_recipe(name, "paper", steps=8, seeds=1, corpus=corpus))


def records_of_08_optimizers(corpus):
    for name in ("08_optimizers", "08_optimizers_eps"):
        write_records(sweep.read_recipe(name, "paper", steps=8, seeds=2, corpus=corpus))
    for task in mlp.tasks("paper", seeds=2, steps=8):
        small = dataclasses.replace(task, width=16, batch=32)
        environment = params.environment() | {"corpus": mlp.load(task.images)[2]}
        train.store().write("mlp", differing(task), {"rows": mlp.fit(small)[1]}, environment)


def records_of_10_vit(corpus):
    """Trained as at scale tiny; the names and the size of the maps are those of `paper`."""
    tiny = sweep.read_recipe("10_vit", "tiny", steps=8)
    recipe = sweep.read_recipe("10_vit", "paper", steps=8, seeds=1, corpus="digits")
    for job, small in zip(recipe.jobs, tiny.jobs, strict=True):
        outcome, environment = sweep.perform(small), params.environment() | {"corpus": corpus}
        train.store().write("train", differing(job.config), outcome.run.record["result"], environment)
        for entry, own in zip(sweep._entries(job), sweep._entries(small), strict=True):
            train.store().write(*entry, train.store().find(*own)["result"], environment)
        result = vit_sinks.perform(small)["result"]
        maps = {kind: [(one * 12)[: job.config.model.context] for one in own] for kind, own in result["maps"].items()}
        train.store().write("vit", vit_sinks._key(job), result | {"maps": maps}, environment)
    outcome = sweep.perform(tiny.jobs[0])
    for job in sweep.read_recipe("10_vit_tables", "paper", steps=8, seeds=1, corpus="digits").jobs:
        train.store().write("train", differing(job.config), outcome.run.record["result"], environment)
        for entry, own in zip(sweep._entries(job), sweep._entries(tiny.jobs[0]), strict=True):
            train.store().write(*entry, train.store().find(*own)["result"], environment)
    (small,) = vit_finetune.tasks("tiny", "digits", steps=8)
    for task in vit_finetune.tasks("paper", "digits", 8, 1, "digits"):
        train.store().write("tuned", task.key, vit_finetune.perform(small)["result"], environment)


def records_of_09_moment_updates(corpus):
    x, change = torch.randn(2, 8, 4)
    terms = {name: float(one) for name, one in follow.terms(x, change).items()}
    result = {name: [8 * value] for name, value in terms.items()} | {"loss": [4.0], "bend": [0.1], "held_out": 4.0}
    for order, start in zip("24", map(float, follow.moments(x)), strict=True):
        change_a_step = sum(value for name, value in terms.items() if name.startswith(f"u{order}"))
        result[f"m{order}"] = [start, start + 8 * change_a_step]
    result |= {f"{name} / m4": [8 * terms[name] / result["m4"][0]] for name in follow.FOURTH}
    for task in follow.tasks("paper", steps=8, seeds=1, corpus=corpus):
        train.store().write("moments", task.key, result, params.environment() | {"corpus": corpus})


def records_of_11_pretraining_data(corpus):
    write_records(sweep.read_recipe("11_pretraining_data", "paper", steps=20, seeds=1, corpus=corpus))


# notebook -> (stand-ins that it loads, its parameters besides scale; CORPUS is a text, what writes its records)
CORPUS = "{corpus}"
BERT = "google-bert/bert-base-uncased"
ROBERTA = "FacebookAI/roberta-base"
IN21K = "google/vit-base-patch16-224-in21k"
VITS = "google/vit-base-patch16-224", "facebook/deit-small-patch16-224", IN21K
PYTHIA = tuple(f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m"))
ENTRIES = {
    "00_start_here": ((BERT,), {"sentences": 6}, no_records),
    "01_pythia_kurtosis": ((*PYTHIA, "Salesforce/wikitext"), {"steps": 1}, no_records),
    "02_bert_outliers": (
        (BERT, ROBERTA, IN21K, "nyu-mll/glue"),  # no GPT-2: its row says so
        {"draws": 1, "sentences": 16, "single": 1, "top": 1, "tasks": "mnli", "seeds": 1, "rows": 4},
        no_records,
    ),
    "03_quant": ((BERT,), {"steps": 8, "sentences": 3, "corpus": CORPUS}, records_of_03_quant),
    "05_attention_sinks": (
        (BERT,),
        {"sentences": 3, "singles": 1, "sentence": "Who? Me.", "steps": 8, "seeds": 1, "corpus": CORPUS},
        no_records,
    ),
    "04_token_frequency": (
        (BERT, ROBERTA, "Salesforce/wikitext"),
        {"sentences": 6, "counts": "text"},
        no_records,
    ),
    "06_clipped_softmax_gating": (
        (),
        {"steps": 8, "seeds": 1, "timed": 1, "corpus": CORPUS},
        records_of_06_clipped_softmax_gating,
    ),
    "07_op_block": ((), {"steps": 8, "seeds": 1, "corpus": CORPUS}, records_of_07_op_block),
    "08_optimizers": ((), {"steps": 8, "seeds": 2, "corpus": CORPUS}, records_of_08_optimizers),
    "09_moment_updates": ((), {"steps": 8, "seeds": 1, "corpus": CORPUS}, records_of_09_moment_updates),
    "10_vit": (VITS, {"steps": 8, "seeds": 1, "corpus": "digits", "pictures": 4}, records_of_10_vit),
    "11_pretraining_data": (
        (*stand_ins.MULTIBERTS, "facebook/wav2vec2-base", "Salesforce/wikitext"),
        {"steps": 20, "seeds": 1, "corpus": CORPUS},  # checkpoints up to 20 thousand steps
        records_of_11_pretraining_data,
    ),
    "12_beyond": ((BERT,), {"sentences": 6}, no_records),
}
# notebook -> models that it is run with once more, by its parameter `model`
AGAIN = {"02_bert_outliers": (ROBERTA,), "05_attention_sinks": (ROBERTA,)}
RUNS = [pytest.param(name, "", id=name) for name in NOTEBOOKS if name in ENTRIES]
RUNS += [pytest.param(name, model, id=f"{name}, {model}") for name, models in AGAIN.items() for model in models]


# what 04_token_frequency asks of spaCy, which is no requirement
SPACY = """
class Token:
    def __init__(self, word): self.pos_ = "NOUN" if word.isalpha() else "NUM" if word.isdigit() else "PUNCT"
def load(name, exclude):
    pipeline = lambda words: [Token(word) for word in words]
    pipeline.vocab = None
    return pipeline
"""


def write_spacy(folder):
    """A package of that name, with as much of it as is used."""
    (folder / "spacy").mkdir(parents=True)
    (folder / "spacy" / "__init__.py").write_text(SPACY)
    (folder / "spacy" / "tokens.py").write_text("def Doc(vocab, words): return words\n")
    return folder


def write_records(recipe):
    """Plausible records of all runs of a recipe, as if they had been made elsewhere."""
    model = dataclasses.replace(recipe.jobs[0].config.model, vocab=300, width=48, context=16)
    one, rows = recipe.jobs[0].evaluation, [torch.randint(0, 300, (4, 16))]
    pattern = probes.measure(Transformer(model).eval(), rows, one.sites, meters=one.meters).summary()["sites"]
    environment = params.environment() | {"corpus": train.load_tokens(recipe.jobs[0].config).corpus}
    draw = random.Random(0)

    def around(value):
        return value * math.exp(draw.gauss(0, 0.1))

    def measured(sites):
        return {site: {metric: around(value) for metric, value in pattern[site].items()} for site in sites}

    for job in recipe.jobs:
        watched = [site for site in pattern if site.split(".")[-1] in job.config.sites]
        steps = range(1, job.config.steps + 1)
        log = [{"step": n, "lr": job.config.lr, "train_loss": around(4.0), "loss": around(4.0)} for n in steps]
        result = {"log": [entry | {"sites": measured(watched)} for entry in log], "diverged": None}
        train.store().write("train", differing(job.config), result, environment)
        loss = around(3.5)
        first, *others = sweep._entries(job)
        train.store().write(*first, {"loss": loss, "sites": measured(pattern)}, environment)
        for kind, key in others:
            result = {"loss": loss + around(0.05)}
            if kind == "checkpoint":
                result |= {"step": key["step"], "weights": "", "sites": measured(pattern)}
            train.store().write(kind, key, result, environment)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def corpus(tmp_path):
    """A text file of 3000 paragraphs, the corpus that scale `paper` asks the user to name."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Paragraph {n} says that {n} times {n} is {n * n}." for n in range(3000)))
    return str(path)


def test_every_notebook_is_rehearsed():
    assert set(NOTEBOOKS) <= set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_preflight_asks_for_what_the_notebook_loads(name):
    wanted = {one for one, _, _ in preflight.wanted("paper", name)}
    # one is not here on purpose, one is packaged, one is read where it is trained, on a GPU
    left_out = {"openai-community/gpt2", hub.MINILM, "facebook/opt-1.3b"}
    assert wanted - left_out == {*ENTRIES[name][0]} - left_out


@pytest.fixture
def offline(request, home, corpus, tmp_path, monkeypatch):
    """What the notebook of this test finds: stand-ins in the cache, records, no Hub."""
    given = request.node.callspec.params
    names, _, write = ENTRIES[given["name"]]
    names = (*names, given["model"]) if given["model"] else names
    find_only(names, home, tmp_path, monkeypatch)
    write(corpus)
    if given["name"] == "04_token_frequency":
        monkeypatch.setenv("PYTHONPATH", str(write_spacy(tmp_path / "packages")))


def find_only(names, home, tmp_path, monkeypatch):
    """What notebooks find: stand-ins of these names, no Hub, an output folder of their own."""
    monkeypatch.setenv("OFUTILS_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("HF_HOME", str(stand_ins.build(home, names)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for elsewhere in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(elsewhere, raising=False)


@pytest.mark.parametrize("name, model", RUNS)
def test_the_notebook_runs_at_scale_paper(name, model, offline, corpus, tmp_path):
    _, parameters, _ = ENTRIES[name]
    given = {
        key: value.replace(CORPUS, corpus) if isinstance(value, str) else value for key, value in parameters.items()
    }
    given |= {"model": model} if model else {}
    path, result = ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "out.ipynb"
    papermill.execute_notebook(path, result, {"scale": "paper"} | given, progress_bar=False, cwd=ROOT)
    assert "scale paper (asked for)" in result.read_text()
    if name == "04_token_frequency":  # not committed, since it needs spaCy
        assert (tmp_path / "out" / "figures" / name / "parts_of_speech.csv").is_file()
    own = tmp_path / "out" / "figures" / name / model.replace("/", "--")
    assert list(own.glob("*.png")), "a model by parameter has a folder of its own"


# --- the first run with the Hub

COMMANDS = (ROOT / "Makefile").read_text().replace("\\\n", " ")
# notebook -> the parameters that `make first-run` gives it
FIRST = {
    name: dict(re.findall(r"-p (\w+) (\S+)", given))
    for name, given in re.findall(r"notebooks/(\w+)\.ipynb out/first-run/\S+(.*)", COMMANDS)
}
# notebook -> parameters that make it shorter still
SHORT = {
    "01_pythia_kurtosis": {"steps": 1},
    "02_bert_outliers": {"scale": "tiny", "draws": 1, "sentences": 16, "single": 1, "top": 1, "seeds": 1, "rows": 16},
    "03_quant": {"sentences": 3},
}
READ = {  # notebook -> what it prints of its model
    "01_pythia_kurtosis": "1 of 1 models, 6 measurements",
    "02_bert_outliers": "google/bert_uncased_L-2_H-128_A-2: 2 layers, width 128",
    "03_quant": "facebook/opt-125m, revision main: no safetensors, so the tensors of pytorch_model.bin are taken",
}


@pytest.mark.parametrize("name", ["01_pythia_kurtosis", "02_bert_outliers", "03_quant"])
def test_the_first_run_runs(name, home, tmp_path, monkeypatch):
    given, result = FIRST[name], tmp_path / "out.ipynb"
    names = {one for one, _, _ in preflight.wanted(given["scale"], name, given["model"])}
    find_only(names, home, tmp_path, monkeypatch)
    path, parameters = ROOT / "notebooks" / f"{name}.ipynb", given | SHORT[name]
    papermill.execute_notebook(path, result, parameters, progress_bar=False, cwd=ROOT)
    assert f"scale {parameters['scale']} (asked for)" in result.read_text() and READ[name] in result.read_text()
    assert list((tmp_path / "out" / "figures" / name / given["model"].replace("/", "--")).glob("*.png"))


# --- what 03_quant trains at this scale


def test_the_model_of_03_quant_is_opt_125m(corpus):
    vanilla = sweep.read_recipe("03_quant", "paper", corpus=corpus).jobs[0].config.model
    with torch.device("meta"):
        original = transformers.OPTForCausalLM(transformers.OPTConfig())
        ours = Transformer(vanilla)
    count, positions = original.num_parameters(), original.model.decoder.embed_positions.weight.numel()
    assert count == 125_239_296
    assert sum(p.numel() for p in ours.parameters()) == count - positions + vanilla.context * vanilla.width


@pytest.mark.parametrize("method", ["vanilla", "clipped softmax", "gated attention", "OP"])
def test_a_step_of_03_quant_at_real_width_and_vocabulary(method, corpus):
    jobs = sweep.read_recipe("03_quant", "paper", corpus=corpus).jobs
    config = next(job.config.model for job in jobs if job.method == method)
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(config, layers=stand_ins.LAYERS))
    ids = torch.randint(0, config.vocab, (1, 32))
    loss = clm_loss(model(ids), ids)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_model_that_03_quant_fine_tunes_is_opt_1_3b():
    shape = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192}
    with torch.device("meta"):
        original = transformers.OPTForCausalLM(transformers.OPTConfig(**shape, word_embed_proj_dim=2048))
        ours = Transformer(finetuned.OPT)
    positions = original.model.decoder.embed_positions.weight.numel()
    rest = original.num_parameters() - positions
    assert sum(p.numel() for p in ours.parameters()) == rest + finetuned.OPT.context * finetuned.OPT.width


@pytest.mark.parametrize("attention", finetuned.ATTENTIONS)
def test_a_model_of_the_hub_is_fine_tuned_in_its_own_tokens(attention, home, corpus, tmp_path, monkeypatch):
    name = "facebook/opt-125m"  # a stand-in of it, for the larger one's place
    find_only((name,), home, tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shape = {"layers": stand_ins.LAYERS, "width": 768, "heads": 12, "context": 32, "dropout": 0.0}
    monkeypatch.setattr(finetuned, "OPT", dataclasses.replace(finetuned.OPT, **shape))
    monkeypatch.setattr(finetuned.sources, "read", lambda *_: sources.Sources(models=("", name)))
    asked = (one for one in finetuned.tasks("paper", 2, 1, corpus) if one.gates and one.attention == attention)
    task = next(asked)
    task = dataclasses.replace(task, config=dataclasses.replace(task.config, batch=2, eval_batches=1, precision="no"))
    original = hub.model(name, head="lm").state_dict()
    own = finetuned.started(task).state_dict()["blocks.1.attention.q.weight"]
    assert torch.equal(own, original["model.decoder.layers.1.self_attn.q_proj.weight"].float()) == (
        attention == "kept"
    )
    run = finetuned.perform(task)
    assert run.log[-1]["step"] == 2 and math.isfinite(run.log[-1]["loss"])
    ids = finetuned._tokens(name, task.config).train
    assert hub.tokenizer(name).decode(ids[:60]).startswith("Paragraph")
