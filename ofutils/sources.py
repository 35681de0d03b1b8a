"""What each notebook loads from the Hub, or in place of it, at each scale: the tables of `sources.yaml`.

The notebooks take their ids from here, and `preflight` asks the Hub for the same ones.
"""

from importlib import resources

import yaml

from ofutils import params

_TABLES = yaml.safe_load((resources.files("ofutils") / "sources.yaml").read_text(encoding="utf-8"))
#: The notebooks that load anything.
NOTEBOOKS = tuple(_TABLES)


@params.settings
class Sources:
    """What a notebook loads at one scale."""

    models: tuple[str, ...] = ()  # ids, with their tokenizers; see `place`
    weights: tuple[str, ...] = ()  # ids without
    steps: tuple[int, ...] = ()  # checkpoints of the models; none: the revision main
    texts: tuple[tuple[str, str, str], ...] = ()  # data sets: id, part, split, as `hub.text` takes them

    @property
    def places(self) -> list[tuple[str, str]]:
        """Id and revision of every checkpoint of the models, in order."""
        return [place(name, step) for name in self.models for step in self.steps or (None,)]


def place(name: str, step: int | None = None) -> tuple[str, str]:
    """Where a checkpoint lies: id and revision.

    Args:
        name: an id whose revisions are step0, step1, ..., or one with `{}` where each checkpoint's step stands in an
            id of its own, such as `google/multiberts-seed_1-step_{}k`.
        step: None: the revision main.
    """
    if "{}" in name:
        return name.format(step), "main"
    return name, "main" if step is None else f"step{step}"


def read(notebook: str, scale: str, model: str = "") -> Sources:
    """What a notebook loads at a scale.

    Args:
        notebook: its name, e.g. `03_quant`.
        scale: a name of `params.SCALES`.
        model: an id in the place of the notebook's own models; empty leaves them.

    Raises:
        UserError: an unknown notebook or scale; a model where the notebook loads none of its own.
    """
    params.require_known("notebook", notebook, NOTEBOOKS)
    params.require_known("scale", scale, params.SCALES)
    table = _TABLES[notebook].get(scale, {})
    params.require(not model or "models" in table, f"{notebook} at scale {scale} loads no model, got {model!r}")
    return params.build(Sources, table | ({"models": [model]} if model else {}))
