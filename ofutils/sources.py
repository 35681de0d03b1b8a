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

    models: tuple[str, ...] = ()  # ids, with their tokenizers
    weights: tuple[str, ...] = ()  # ids without
    steps: tuple[int, ...] = ()  # checkpoints of the models; none: the revision main
    texts: tuple[tuple[str, str, str], ...] = ()  # data sets: id, part, split, as `hub.text` takes them

    @property
    def revisions(self) -> tuple[str, ...]:
        """The revisions of the models, in order."""
        return tuple(f"step{step}" for step in self.steps) or ("main",)


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
