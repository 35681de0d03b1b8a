"""Is everything there that the notebooks load from the Hub? Asked without downloading any of it.

    python -m ofutils.preflight                                 all notebooks at scale paper
    python -m ofutils.preflight --notebook 02_bert_outliers     one of them
    flags: --scale, --notebook, --model (an id in the place of the notebook's own)

A line for every revision of a model and every file of a data set: the form of its weights, what would be loaded in
megabytes, and whether that is in the cache. What is missing is named, and the exit code is 1.
"""

import re
from fnmatch import filter as matching
from functools import cache

from ofutils import UserError, hub, params, sources


@params.settings
class Command:
    """Flags of `python -m ofutils.preflight`."""

    scale: str = "paper"
    notebook: str = ""  # empty: all of them
    model: str = ""


def wanted(scale: str, notebook: str = "", model: str = "") -> dict[tuple[str, str, str], bool]:
    """What notebooks load at a scale, everything once.

    Returns:
        (id, revision, file of a data set or nothing) -> whether it is a model that is read with its tokenizer.

    Raises:
        UserError: what `sources.read` refuses.
    """
    found = {}
    for loads in [sources.read(one, scale, model) for one in ([notebook] if notebook else sources.NOTEBOOKS)]:
        first = {sources.place(name, *loads.steps[:1]) for name in loads.models}  # of these the tokenizer
        for name, revision in [*loads.places, *((name, "main") for name in loads.weights)]:
            found[name, revision, ""] = (name, revision) in first or found.get((name, revision, ""), False)
        found |= {(name, hub.CONVERTED, hub.table(part, split)): False for name, part, split in loads.texts}
    return {one: read for one, read in found.items() if not one[0].startswith("stand-in/")}


def chosen(files, tokenizer: bool = False) -> tuple[str, list[str], list[str]]:
    """The form of a model's weights among the files of its revision, which of them `hub` reads, and what it lacks."""
    if not (form := hub.form(files)):
        return "", [], ["weights as safetensors or pytorch_model.bin"]
    one, index, pattern = hub.FORMS[form]
    shards = [] if one in files else matching(files, pattern)
    total = max(map(int, re.findall(r"-of-(\d+)\.", " ".join(shards))), default=1)
    own = [file for file in hub.TOKENIZER_FILES if tokenizer and file in files]
    lacking = [] if "config.json" in files else ["config.json"]
    lacking += [f"{pattern} ({len(shards)} of {total})"] if one not in files and len(shards) < total else []
    lacking += ["tokenizer"] if tokenizer and not {*own} & {*hub.TOKENIZERS} else []
    return form, ["config.json", *([one] if one in files else [index, *shards]), *own], lacking


def main(arguments: list[str]) -> None:
    """The command line: a line for everything that is wanted; a UserError where some of it is missing."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    from huggingface_hub import constants

    command, listing, sizes, missing = params.read(Command, arguments), cache(hub.listing), [(0, 0)], []
    asked = wanted(params.resolve_scale(command.scale)[0], command.notebook, command.model)
    for (name, revision, file), tokenizer in asked.items():
        try:
            files = listing(name, revision, "dataset" if file else "model")
            form, used, lacking = (file, [file], [file]) if file else chosen(files, tokenizer)
            params.require(not lacking or file in files, f"{name}, revision {revision} has no {', '.join(lacking)}")
        except UserError as error:
            missing.append(str(error))
            if not constants.HF_HUB_OFFLINE:  # else one line says it all
                print(f"missing: {error}")
            continue
        size, here = (sum(files[one][0] for one in used if files[one][1] >= kept) for kept in (False, True))
        state = "cached" if here == size else f"{here / 1e6:,.1f} MB of them cached" if here else "not cached"
        print(f"{name}, revision {revision}: {form}, {size / 1e6:,.1f} MB, {state}")
        sizes.append((size, here))
    size, here = (sum(part) / 1e9 for part in zip(*sizes, strict=True))
    print(f"{len(asked) - len(missing)} of {len(asked)} are there, {size:,.2f} GB, {here:,.2f} GB of them cached")
    params.require(not missing, f"{len(missing)} of {len(asked)} are missing, e.g. {''.join(missing[:1])}")


if __name__ == "__main__":
    params.main_guard(main)
