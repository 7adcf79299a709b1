"""Mean, standard deviation and 95 % t interval over seeds."""

import math
import statistics
from collections.abc import Sequence

from mtl_lora.report.paired import CONFIDENCE


def t_cdf(t: float, df: int) -> float:
    """P(-t < T < t) of Student's distribution with ``df`` degrees of freedom.

    The finite sums for whole df of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 if df % 2 else 0, df - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t for which ``t_cdf`` is ``confidence``, by bisection to the last digits of a float."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, df) < confidence else (low, middle)
    return high


def summarise(values: Sequence[float]) -> dict[str, float | None]:
    """``mean``; ``sd`` (n - 1) and the t interval of the mean, ``low`` to ``high``, None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(values)
    half = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}
