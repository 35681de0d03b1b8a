"""The papers' own settings and the blocks in them, as configurations of `train`: the table of `presets.yaml`."""

from functools import cache
from importlib import resources

from ofutils import params
from ofutils.train import TrainConfig


def preset(setting: str, block: str, reading: str = "paper", **changes) -> TrainConfig:
    """A block in one of he2024's or bondarenko2023's settings.

    Args:
        setting: `CodeParrot`, `Languini-100M`, `-320M` or `-1.2B`, `FineWeb-1.2B` or `-7B`, `OPT-125m`;
            bondarenko2023's `OPT-125m`, `-350m` or `-1.3B`, `BERT-base`.
        block: `OP`, and what it is compared with there: `Pre-LN`, ...
        reading: `paper`; for CodeParrot and bondarenko2023's also `release`, what the authors' code does where
            that is another thing.
        changes: fields of `TrainConfig` by name, nested ones as mappings: `corpus="stdlib"`, `model={"layers": 2}`.
            The corpus is empty, and a training refuses that: the papers' are named in the table.

    Raises:
        UserError: an unknown setting, block or reading, and what `TrainConfig` refuses.

    Source: he2024, Appendix D and section 6; bondarenko2023, Appendix C. What they do not say, and what is
        not had here, stands in the table.
    """
    params.require_known("setting", setting, table())
    readings = table()[setting]
    params.require_known(f"reading of {setting}", reading, readings)
    own = params.merged(readings["paper"], readings[reading])
    params.require_known(f"block of {setting}", block, own["blocks"])
    return params.build(TrainConfig, params.merged(params.merged(own["base"], own["blocks"][block]), changes))


@cache
def table() -> dict:
    """Setting -> reading -> `base` and, by block, what differs from it."""
    import yaml

    return yaml.safe_load((resources.files("ofutils") / "presets.yaml").read_text(encoding="utf-8"))
