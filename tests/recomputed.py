"""A verdict computed without the package, for the tests of claims."""

import math
from statistics import mean, stdev

T_95_OF_3 = 0.9 / math.sqrt(2 * 0.95 * 0.05)  # Student's 95% quantile with two degrees of freedom, in closed form


def judged(values, margin: float, of_logs: bool) -> str:
    """The verdict on three values, as it begins."""
    assert len(values) == 3
    values = [math.log(value) for value in values] if of_logs else values
    reach = T_95_OF_3 * stdev(values) / 3**0.5
    back = math.exp if of_logs else float
    low, high = back(mean(values) - reach), back(mean(values) + reach)
    return "holds" if low > margin else "does not hold" if high < margin else "not testable at this scale"
