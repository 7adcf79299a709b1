"""Statistics of two runs on the same questions: McNemar's exact test and the paired percentile bootstrap."""

import collections
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError

if TYPE_CHECKING:
    import numpy

CONFIDENCE = 0.95
# Numbers drawn at a time: 32 MiB of counts, however many resamples and distinct differences there are.
_DRAWN_AT_ONCE = 2**22


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947) from the counts of discordant pairs.

    p = min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n) with b = ``only_a``, c = ``only_b``, n = b + c: the binomial test
    of b against n / 2. It is 1 without discordant pairs and never 0: the smallest float stands for all below it.
    """
    n = only_a + only_b
    term = total = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        total += term
    # Whole numbers until this division, which Python rounds correctly whatever their size.
    return min(1.0, max(2 * total / 2**n, math.ulp(0.0)))


def bootstrap_means(differences: Sequence[float], seed: Sequence[int], resamples: int) -> "numpy.ndarray":
    """Means (resamples,) of as many ``differences`` as there are, drawn from them with replacement.

    One difference a question, so a resample keeps the two answers to a question together. Raises ``UserError``
    without numpy.
    """
    try:
        import numpy
    except ImportError:
        raise UserError("the bootstrap interval needs numpy; pip install numpy") from None
    # How often each distinct value comes up is multinomial: the same law as drawing question by question, in less
    # time. Values stand in the order of the questions, so that negated differences give negated means.
    counted = collections.Counter(differences)
    values = numpy.array(list(counted), dtype=numpy.float64)
    n = len(differences)
    shares = numpy.array(list(counted.values())) / n
    generator = numpy.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return numpy.concatenate([generator.multinomial(n, shares, size) @ values for size in sizes]) / n


def percentile_interval(means: "numpy.ndarray") -> tuple[float, float]:
    """The middle ``CONFIDENCE`` of bootstrap means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""
    import numpy

    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
