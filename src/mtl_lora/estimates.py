"""Statistics of samples: standard errors, intervals over seeds and over questions, exact tests.

Importing this needs the standard library only; numpy and scipy are imported by the intervals and tests that use them.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

CONFIDENCE = 0.95
LEVEL = f"{100 * CONFIDENCE:.0f} %"
RESAMPLES, SEED = 10_000, 0  # of the bootstrap
# Numbers drawn at a time: 2 MiB of counts, which fit in a cache for any number of resamples and questions.
_DRAWN_AT_ONCE = 2**18


def proportion_error(p: float, n: int) -> float:
    """The standard error of a proportion p of n.

    It is the larger of sqrt(p (1 - p) / n), which is 0 where none or all are right, and the same formula with two right
    and two wrong ones added to p and n (Agresti and Coull, The American Statistician 52, 1998).
    """
    added = (p * n + 2) / (n + 4)
    return math.sqrt(max(p * (1 - p) / n, added * (1 - added) / (n + 4)))


class Interval:
    """Base of values with an interval from ``low`` to ``high``.

    Both ends become None if one is missing, or if they are equal, since a sample does not give certainty.
    """

    def __post_init__(self):
        if None in (self.low, self.high) or self.high - self.low < 1e-9:
            self.__dict__.update(low=None, high=None)

    @property
    def center(self) -> float:
        """The value that the interval is about: the first field of the class."""
        return getattr(self, dataclasses.fields(self)[0].name)


@dataclasses.dataclass(frozen=True)
class Estimate(Interval):
    """A mean with its interval, where one is known.

    Over seeds, ``sd`` is the standard deviation, and ``low`` to ``high`` is the 95 % t interval of the mean. For a
    single run, ``sd`` is None, and the interval, if there is one, is the mean ± one standard error over the questions.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float | str | None]:
        """The fields, and what ``low`` to ``high`` is."""
        interval = f"{LEVEL} t interval over seeds" if self.sd is not None else "± one standard error over questions"
        return {**vars(self), "interval": interval if self.low is not None else None}

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> "Estimate":
        """Mean, standard deviation (n - 1) and Student t interval of the mean; for a single value only the mean."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean)
        from scipy.special import stdtrit  # the quantile function of Student's t distribution

        sd = statistics.stdev(values)
        half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(len(values))
        return cls(mean, sd, mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """One experiment minus another on the same questions, with the 95 % interval of the paired difference."""

    difference: float
    low: float | None = None
    high: float | None = None


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947) from the counts of discordant pairs.

    min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n) with b = ``only_a``, c = ``only_b``, n = b + c. It is 1 without
    discordant pairs, and never 0: the smallest positive float replaces anything below it.
    """
    from scipy.special import bdtr

    return min(1.0, max(2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)), math.ulp(0.0)))


def bootstrap_means(differences: Sequence[float], seed: Sequence[int], resamples: int) -> "numpy.ndarray":
    """Return the means (resamples,) of bootstrap resamples, each as large as ``differences``.

    Every question has one difference, so a resample keeps the two answers to a question together.
    """
    import numpy

    # The number of times that each distinct value is drawn is multinomial: the same distribution as drawing question by
    # question, but faster. Values are in the order of the questions, so that negated differences give negated means.
    counted = collections.Counter(differences)
    values = numpy.array(list(counted), dtype=numpy.float64)
    found = [drawn @ values for drawn in draws(list(counted.values()), seed, resamples)]
    return numpy.concatenate(found) / len(differences)


def draws(counts: Sequence[int], seed: Sequence[int], resamples: int) -> "Iterator[numpy.ndarray]":
    """Yield ``resamples`` rows in blocks; a row says how often each kind of question is drawn in a resample.

    counts: the number of questions of each kind.
    """
    import numpy

    generator, n = numpy.random.default_rng(seed), sum(counts)
    rows = max(1, _DRAWN_AT_ONCE // len(counts))
    for start in range(0, resamples, rows):
        yield generator.multinomial(n, numpy.array(counts) / n, min(rows, resamples - start)).astype(numpy.float64)


def percentile_interval(means: "numpy.ndarray") -> tuple[float, float]:
    """Return the percentile interval, the middle ``CONFIDENCE`` of bootstrap means (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993)."""
    import numpy

    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
