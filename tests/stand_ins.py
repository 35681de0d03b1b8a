"""A Hugging Face cache of random stand-ins under real ids and revisions, to rehearse scale `paper` offline.

A stand-in has the real width, heads, vocabulary, names and dtype of its weights, and 2 layers. So that 60
revisions cost megabytes and not gigabytes, weight files are sparse: vectors (gains, biases) are random in
full, embeddings in the rows that the tokenizer can reach, other matrices in their first rows; the rest
is zeros that are never written. Shapes, loading, memory and arithmetic are those of the real thing; numbers are not.
Tokenizers are characters or bytes with the real special tokens, their ids below the model's vocabulary.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ofutils import UserError, hub
from ofutils.studies.bert_outliers import tasks

LAYERS = 2
ROWS = {"embedding": 512, "matrix": 8}  # rows of a matrix that are random, not zero
STEPS = [0, *(2**k for k in range(10)), *(1000 * 2**k for k in range(8)), 143000]


@dataclass(frozen=True)
class Model:
    """What a stand-in copies of the real model."""

    architecture: str  # the class whose weights the real file holds
    config: dict
    tokenizer: str  # a name of TOKENIZERS, or none
    dtype: torch.dtype = torch.float32
    form: str = "safetensors"  # or bin: a pickle, where the real one has nothing else
    seeds: tuple[tuple[str, int], ...] = (("main", 0),)  # revision -> seed; equal seeds are equal weights


def _pythia(width: int, heads: int) -> Model:
    """Revision step0 equals step1 and main equals step143000, as in the real ones."""
    config = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config |= {"vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25}
    config |= {"use_parallel_residual": True, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    seeds = {f"step{step}": max(step, 1) for step in STEPS} | {"main": STEPS[-1]}
    return Model("GPTNeoXForCausalLM", config, "neox", torch.float16, seeds=tuple(seeds.items()))


#: The ids of MultiBERTs' checkpoints -> seeds of their weights.
MULTIBERTS = {
    f"google/multiberts-seed_{seed}-step_{step}k": 10_000 * seed + step
    for seed in range(3)
    for step in (0, 20, 40, 80, 160, 400, 1000, 2000)
}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_OPT = {"hidden_size": 2048, "num_attention_heads": 32, "ffn_dim": 8192, "word_embed_proj_dim": 2048}
_TINY_BERT = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
_MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_DEIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_LABELS = {"num_labels": 1000}

MODELS = {
    "EleutherAI/pythia-14m": _pythia(128, 4),
    "EleutherAI/pythia-70m": _pythia(512, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 16),
    "google-bert/bert-base-uncased": Model("BertForMaskedLM", {}, "bert"),
    "google/bert_uncased_L-2_H-128_A-2": Model("BertForPreTraining", _TINY_BERT, "bert"),
    "FacebookAI/roberta-base": Model("RobertaForMaskedLM", _ROBERTA, "roberta"),
    "facebook/opt-125m": Model("OPTForCausalLM", {}, "opt", torch.float16, "bin"),
    "facebook/opt-1.3b": Model("OPTForCausalLM", _OPT, "opt", torch.float16, "bin"),
    "openai-community/gpt2": Model("GPT2LMHeadModel", {}, "gpt2"),
    "google/vit-base-patch16-224-in21k": Model("ViTModel", {}, ""),
    "google/vit-base-patch16-224": Model("ViTForImageClassification", _LABELS, ""),
    "facebook/deit-small-patch16-224": Model("ViTForImageClassification", _LABELS | _DEIT, ""),
    "facebook/wav2vec2-base": Model("Wav2Vec2ForPreTraining", {}, "", form="bin"),
    hub.MINILM: Model("BertModel", _MINILM, "bert"),
} | {name: Model("BertForPreTraining", {}, "bert", seeds=(("main", seed),)) for name, seed in MULTIBERTS.items()}
# configurations of checkpoints of kilobytes, for `saved`
BERT = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=80
)
OPT = transformers.OPTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=80, word_embed_proj_dim=32
)
# (special tokens by id, before the bytes; the token before and after a text; roles)
TOKENIZERS = {
    "neox": (["<|endoftext|>", "<|padding|>"], "", "", {"eos": "<|endoftext|>", "pad": "<|padding|>"}),
    "gpt2": (["<|endoftext|>"], "", "", {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    "opt": (["<s>", "<pad>", "</s>"], "</s>", "", {"bos": "</s>", "eos": "</s>", "pad": "<pad>"}),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "<s>",
        "</s>",
        {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    ),
}
WORDS = ["the", "a", "river", "stone", "light", "year", "of", "and", "in", "was", "made", "small", "it", "found"]


def _wikitext() -> dict[str, pyarrow.Table]:
    texts = [f"{text} {number} .\n" for number, text in enumerate(_texts(4))]
    texts = ["" if number % 5 == 0 else text for number, text in enumerate(texts)]  # the real one has empty rows
    return dict.fromkeys(("wikitext-2-raw-v1/test", "wikitext-2-raw-v1/validation"), pyarrow.table({"text": texts}))


def _glue() -> dict[str, pyarrow.Table]:
    """All classes of each task, in turn; STS-B has numbers from 0 to 5. Test splits are left out."""
    found = {}
    for name, task in tasks.TASKS.items():
        for seed, split in enumerate(("train", *task.splits) if name != "docstrings" else ()):
            columns = {key: _texts(24, 2 * seed + place, 6) for place, key in enumerate(task.keys)}
            labels = (
                [row % 11 / 2 for row in range(24)] if task.labels == 1 else [row % task.labels for row in range(24)]
            )
            found[f"{name}/{split}"] = pyarrow.table(columns | {"label": labels, "idx": list(range(24))})
    return found


def _texts(rows: int, seed: int = 0, words: int = 40) -> list[str]:
    pick = torch.randint(len(WORDS), (rows, words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[index] for index in row) for row in pick]


DATASETS = {"Salesforce/wikitext": _wikitext, tasks.GLUE: _glue}  # what gives the tables by config and split
KNOWN = (*MODELS, *DATASETS)


def build(home: Path, names=KNOWN) -> Path:
    """Write the stand-ins of these ids into `home`, to be used as `HF_HOME`; those there stay. Returns `home`."""
    for name in names:
        kind = "datasets" if name in DATASETS else "models"
        folder = home / "hub" / f"{kind}--{name.replace('/', '--')}"
        if folder.exists():
            continue
        if name in DATASETS:
            _build_dataset(folder, DATASETS[name]())
        else:
            _build_model(folder, MODELS[name])
    return home


def keep(home: Path, name: str, source: Path, revision: str = "main") -> Path:
    """Move the files of a folder into the cache in `home` as a revision of a model. Returns the snapshot."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    return _snapshot(folder, revision, {path.name: _blob(folder, path) for path in sorted(source.iterdir())})


def saved(folder, build, config, form="safetensors"):
    """A random checkpoint without a tokenizer: safetensors, `bin` or `old` (before torch 1.6); or `bin sharded`."""
    torch.manual_seed(0)
    model = build(config).half()  # as OPT's are
    form, _, sharded = form.partition(" ")
    model.save_pretrained(folder, max_shard_size="20kB" if sharded else "1GB")
    if form == "safetensors":
        return folder
    state, old = model.state_dict(), {"_use_new_zipfile_serialization": form != "old"}  # both names of what is tied
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin", **old)
        return folder
    (folder / "model.safetensors.index.json").unlink()
    names = {key: f"pytorch_model-{place % 3 + 1:05d}-of-00003.bin" for place, key in enumerate(state)}
    for name in set(names.values()):
        torch.save({key: value for key, value in state.items() if names[key] == name}, folder / name, **old)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _build_model(folder: Path, model: Model) -> None:
    empty = _empty(model)
    small = folder / "shared"
    empty.config.architectures, empty.config.dtype = [model.architecture], model.dtype
    empty.config.save_pretrained(small)
    if model.tokenizer:
        _tokenizer(model.tokenizer).save_pretrained(small)
    files = {path.name: _blob(folder, path) for path in small.iterdir()}
    small.rmdir()
    weights = {}  # by seed
    for revision, seed in model.seeds:
        if seed not in weights:
            path = folder / "weights"
            _write_weights(path, empty, model.dtype, seed)
            if model.form == "bin":
                torch.save(load_file(path), folder / "pickled")
                path.unlink()
                path = folder / "pickled"
            weights[seed] = _blob(folder, path, f"{model.config} {seed}")
        name = "pytorch_model.bin" if model.form == "bin" else "model.safetensors"
        _snapshot(folder, revision, files | {name: weights[seed]})


def _empty(model: Model):
    """The model on the meta device: names and shapes, no memory."""
    kind = getattr(transformers, model.architecture)
    depth = {"n_layer": LAYERS} if model.tokenizer == "gpt2" else {"num_hidden_layers": LAYERS}
    with torch.device("meta"):
        return kind(kind.config_class(**model.config, **depth))


def _write_weights(path: Path, empty, dtype: torch.dtype, seed: int) -> None:
    """A safetensors file written by hand, since only so it can be sparse."""
    generator = torch.Generator().manual_seed(seed)
    tied = set(empty.all_tied_weights_keys)
    shapes = {name: tuple(t.shape) for name, t in empty.state_dict().items() if name not in tied}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for name, shape in shapes.items():
            file.seek(start + header[name]["data_offsets"][0])
            file.write(_random(name, shape, generator).to(dtype).numpy().tobytes())
        file.truncate(start + end)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The leading part of a weight that is random: all of a vector, the first rows of a matrix."""
    kind = "embedding" if any(part in name for part in ("embed", "wte", "wpe", "lm_head")) else "matrix"
    rows = shape if len(shape) == 1 else (min(shape[0], ROWS[kind]), *shape[1:])
    values = torch.randn(rows, generator=generator)
    gain = len(shape) == 1 and name.endswith("weight")
    return 1 + 0.1 * values if gain else 0.05 * values


def _tokenizer(kind: str):
    if kind == "bert":
        return hub.tokenizer(hub.STAND_IN)
    specials, before, after, roles = TOKENIZERS[kind]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if before:
        used = [(token, specials.index(token)) for token in {before, after} - {""}]
        single, pair = f"{before} $A {after}".strip(), f"{before} $A {after} {before} $B {after}".replace("  ", " ")
        inner.post_processor = processors.TemplateProcessing(single=single, pair=pair.strip(), special_tokens=used)
    named = {f"{role}_token": token for role, token in roles.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def _build_dataset(folder: Path, tables: dict[str, pyarrow.Table]) -> None:
    """In the form of the Hub's own conversion to parquet."""
    folder.mkdir(parents=True)
    files = {}
    for place, table in tables.items():
        pyarrow.parquet.write_table(table, folder / "rows")
        files[f"{place}/0000.parquet"] = _blob(folder, folder / "rows")
    _snapshot(folder, "refs/convert/parquet", files)


def _blob(folder: Path, path: Path, identity: str = "") -> Path:
    """Move a file among the blobs, named by its sha256, or by a sha1 of what decides it: hashing zeros takes long."""
    digest = hashlib.sha1(identity.encode()) if identity else hashlib.sha256(path.read_bytes())
    blob = folder / "blobs" / digest.hexdigest()
    blob.parent.mkdir(exist_ok=True)
    return path.rename(blob)


def _snapshot(folder: Path, revision: str, files: dict[str, Path]) -> Path:
    """A revision: its commit under refs, its files as links into the blobs."""
    commit = hashlib.sha1(revision.encode()).hexdigest()
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    for name, blob in files.items():
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder / "snapshots" / commit


def one_line(function, *arguments, **options) -> str:
    """The error with which a call is refused: one line, without the host's name."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and "huggingface.co" not in text
    return text
