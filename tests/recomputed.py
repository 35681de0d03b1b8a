"""What the tests of claims share: a notebook's rules, and a verdict computed without the package."""

import ast
import json
import math
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
T_95_OF_3 = 0.9 / math.sqrt(2 * 0.95 * 0.05)  # Student's 95% quantile with two degrees of freedom, in closed form


def rules_of(notebook: str) -> dict:
    """Name -> value of the parameters cell."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["metadata"].get("tags") == ["parameters"]))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def judged(values, margin: float, of_logs: bool) -> str:
    """The verdict on three values, as it begins."""
    assert len(values) == 3
    values = [math.log(value) for value in values] if of_logs else values
    reach = T_95_OF_3 * stdev(values) / 3**0.5
    back = math.exp if of_logs else float
    low, high = back(mean(values) - reach), back(mean(values) + reach)
    return "holds" if low > margin else "does not hold" if high < margin else "not testable at this scale"
