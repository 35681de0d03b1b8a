"""What the modules of Hugging Face's families are called: the tables of `layouts.yaml`, for `families`."""

from importlib import resources

import yaml

_TABLES = yaml.safe_load((resources.files("ofutils") / "layouts.yaml").read_text(encoding="utf-8"))


def _place(words: str) -> tuple:
    path, side, *index = words.split()
    return path, side, *map(int, index)


#: family -> site -> where it stands: (module path, side[, index])
SITES = {
    family: {site: _place(words) for site, words in sites.items() if words}
    for family, sites in _TABLES["sites"].items()
}
#: family -> module path -> the module of `Transformer` (None: not converted), for parameters without a site
PARAMETERS: dict[str, dict[str, str | None]] = _TABLES["parameters"]
#: what the parameters of a site's module are called in `Transformer`, where not by the site's name
MODULES: dict[str, str] = _TABLES["modules"]
