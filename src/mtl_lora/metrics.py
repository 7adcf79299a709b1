"""Metrics by name: pure functions of predictions and targets, with their standard errors. For any system.

A metric is the mean of a score that each question has, or a statistic of all questions together (a correlation). Both
resample: a standard error and the interval of a difference come from drawing questions with replacement.
numpy is imported where something is resampled.
"""

import collections
import dataclasses
import math
import operator
import re
import statistics
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from mtl_lora.errors import UserError
from mtl_lora.estimates import SEED, bootstrap_means, draws, proportion_error

if TYPE_CHECKING:
    import numpy

Answer = str | float  # a label or a free text; a number of a regression
ERROR_RESAMPLES = 1000  # for a standard error

# ---- free text ----

_KEPT = re.compile(
    r"(?<!\w)[-.]+(?=\d)"  # the sign or point before a number: -5, .5
    r"|(?<=\d)[.,:/^*-](?=\d)"  # the signs inside one: 1.5, 1/2, 12:30
    r"|(?<=\b[^\W\d_])[+#-]+(?!\w)"  # those behind a single letter: C++, F#, A-
    rf"|[^{re.escape(string.punctuation)}]"
)


def free_text_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD (1606.05250) compares answers, with three exceptions.

    Signs that belong to a number or to a single letter count (-1.5 is not 15, C++ is not C); ``a``, ``an`` and ``the``
    count at the end, where they are no article (vitamin A); and text of punctuation alone is compared as it is.
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower().replace("\N{MINUS SIGN}", "-"))
    words = "".join(_KEPT.findall(plain)).split()
    kept = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return kept or plain.split()


def same_text(text: str, target: str) -> bool:
    """Whether two free texts have the same words, see ``free_text_words``; an empty text equals nothing."""
    words = free_text_words(text)
    return bool(words) and words == free_text_words(target)


def text_f1(text: str, target: str) -> float:
    """2 P R / (P + R) of the words that two free texts share, each counted as often as it occurs in both (SQuAD)."""
    given, wanted = free_text_words(text), free_text_words(target)
    if not given or not wanted:
        return 0.0
    return 2 * sum((collections.Counter(given) & collections.Counter(wanted)).values()) / (len(given) + len(wanted))


# ---- what a metric is ----


@dataclasses.dataclass(frozen=True)
class Metric:
    """Called with n >= 1 predictions and their targets, and a task's labels: (value, standard error or None).

    Values are fractions up to 1, shown times 100. ``rows`` of predictions and targets is what the metric needs of each
    question, ``value_of`` of rows the value, and ``difference`` what B has more than A.
    title: of a table's column. needs: what a task must have, see ``metrics_for``. lowest: the smallest value.
    parts: names of the two metrics of which this is the mean. Of two labels the last is the positive class.
    """

    title: str
    needs: str
    lowest: int = dataclasses.field(default=0, kw_only=True)
    parts: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def value(self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()) -> float:
        """The value alone, which takes no resampling."""
        return self.value_of(self.rows(predictions, targets, labels))


@dataclasses.dataclass(frozen=True)
class Mean(Metric):
    """The mean of ``score(prediction, target)``, from 0 to 1. key: of a prediction line that holds the score."""

    score: Callable[[str, str], float]
    key: str

    def rows(self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()) -> list[float]:
        """The score of each question."""
        return [float(self.score(given, target)) for given, target in zip(predictions, targets, strict=True)]

    value_of: ClassVar = staticmethod(statistics.fmean)

    def __call__(self, predictions, targets, labels=()) -> tuple[float, float]:
        return mean(self.rows(predictions, targets, labels))

    def difference(
        self, pairs: Sequence[tuple[list, list]], stream: Sequence[int], resamples: int
    ) -> "tuple[float, numpy.ndarray]":
        """B minus A, the mean over ``pairs`` of the rows of A and of B; and the same of each resample (resamples,)."""
        each = zip(*([y - x for x, y in zip(a, b, strict=True)] for a, b in pairs), strict=True)
        values = [statistics.fmean(of_question) for of_question in each]
        return statistics.fmean(values), bootstrap_means(values, stream, resamples)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of n values from 0 to 1; of zeros and ones ``estimates.proportion_error``."""

    def error(values: Sequence[float]) -> float:
        center = sum(values) / len(values)
        return math.sqrt(sum((value - center) ** 2 for value in values)) / len(values)

    center = sum(values) / len(values)
    if {*values} <= {0, 1}:
        return center, proportion_error(center, len(values))
    return center, max(error(values), error([*values, 0, 0, 1, 1]))


@dataclasses.dataclass(frozen=True)
class Statistic(Metric):
    """A function of all questions: ``of_counts(rows (n, c), counts (R, n)) -> (R,)`` with each question counted.

    The standard error is the standard deviation over ``ERROR_RESAMPLES`` bootstrap resamples (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993), in which an undefined value (all predictions or all targets equal) is 0, as
    scikit-learn has it for Matthews. None where all resamples agree, as for one question, a constant predictor or
    a perfect one: they show no spread, which is no certainty.
    """

    columns: Callable[[Sequence[Answer], Sequence[Answer], Sequence[str]], Sequence]
    of_counts: "Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray]"
    key: ClassVar = "parsed"

    def rows(
        self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()
    ) -> "numpy.ndarray":
        """(n, c) numbers.

        Raises ``ValueError`` without the labels that the metric needs, and ``UserError`` for a number that is not
        finite, which would have a rank like any other.
        """
        import numpy

        if len(predictions) != len(targets):
            raise ValueError(f"{len(predictions)} predictions have {len(targets)} targets")
        if self.needs == "two labels" and len(labels) != 2:
            raise ValueError(f"{self.title} needs two labels, the last of which is the positive class, not {labels}")
        rows = numpy.array(self.columns(predictions, targets, labels), dtype=numpy.float64).T
        if broken := numpy.argwhere(~numpy.isfinite(rows)).tolist():
            (index, column), *_ = broken
            raise UserError(f"{self.title} needs finite numbers; answer {index} has {rows[index, column]}")
        return rows

    def value_of(self, rows: "numpy.ndarray") -> float:
        """The statistic of each question counted once."""
        import numpy

        return float(self.of_counts(rows, numpy.ones((1, len(rows))))[0])

    def __call__(self, predictions, targets, labels=()) -> tuple[float, float | None]:
        rows = self.rows(predictions, targets, labels)
        error = float(self._resampled([rows], [SEED], ERROR_RESAMPLES)[0].std(ddof=1))
        return self.value_of(rows), error if error > 1e-9 else None

    def difference(
        self, pairs: "Sequence[tuple[numpy.ndarray, numpy.ndarray]]", stream: Sequence[int], resamples: int
    ) -> "tuple[float, numpy.ndarray]":
        """As of a mean; every resample draws the same questions for all sides."""
        values = [self.value_of(b) - self.value_of(a) for a, b in pairs]
        found = self._resampled([side for pair in pairs for side in pair], stream, resamples)
        return statistics.fmean(values), (found[1::2] - found[::2]).mean(axis=0)

    def _resampled(self, sides: "Sequence[numpy.ndarray]", stream: Sequence[int], resamples: int) -> "numpy.ndarray":
        """(sides, resamples): the statistic of each side, of the same questions in each resample."""
        import numpy

        # Questions that are alike on all sides are drawn together, in the order of their first.
        _, first, counts = numpy.unique(numpy.hstack(sides), axis=0, return_index=True, return_counts=True)
        order = numpy.argsort(first)
        alike = [side[first[order]] for side in sides]
        found = [[self.of_counts(side, d) for side in alike] for d in draws(counts[order], stream, resamples)]
        return numpy.concatenate(found, axis=1)


# ---- statistics of rows (n, c) and counts (R, n) ----


def _ratio(part: "numpy.ndarray", whole: "numpy.ndarray") -> "numpy.ndarray":
    """part / whole, from -1 to 1 whatever the rounding; 0 where the whole is."""
    import numpy

    return numpy.divide(part, whole, out=numpy.zeros(len(whole)), where=whole > 0).clip(-1, 1)


def _matthews(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Of any number of classes (Gorodkin, Computational Biology and Chemistry 28, 2004); columns: given, wanted."""
    import numpy

    classes, n = numpy.unique(rows), counts.sum(axis=1)
    given, wanted = (counts @ (rows[:, [side]] == classes) for side in (0, 1))  # (R, classes)
    right = counts @ (rows[:, 0] == rows[:, 1])
    spread = [numpy.sqrt(n**2 - (side**2).sum(axis=1)) for side in (given, wanted)]
    return _ratio(right * n - (given * wanted).sum(axis=1), spread[0] * spread[1])


def _binary_f1(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """2 TP / (2 TP + FP + FN); columns: whether the positive class was given, was wanted."""
    return _ratio(2 * counts @ (rows[:, 0] * rows[:, 1]), counts @ rows.sum(axis=1))


def _accuracy_and_f1(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Columns: right, and those of F1."""
    return (counts @ rows[:, 0] / counts.sum(axis=1) + _binary_f1(rows[:, 1:], counts)) / 2


def _pearson(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    import numpy

    apart = rows - numpy.median(rows, axis=0)
    # What varies by rounding alone is constant.
    x, y = numpy.where(numpy.abs(apart) > 1e-13 * numpy.abs(rows).max(axis=0), apart, 0).T
    means = counts @ numpy.stack([x, y, x * x, y * y, x * y], axis=1) / counts.sum(axis=1, keepdims=True)
    x, y, xx, yy, xy = means.T
    spread = [numpy.where(s - m * m > 1e-13 * s, numpy.sqrt(numpy.abs(s - m * m)), 0) for m, s in ((x, xx), (y, yy))]
    return _ratio(xy - x * y, spread[0] * spread[1])


def _spearman(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    import numpy

    x, y = (_ranks(column, counts) for column in rows.T)
    of_x = counts * x
    xx, xy, yy = (numpy.einsum("rn,rn->r", a, b) for a, b in ((of_x, x), (of_x, y), (counts * y, y)))
    return _ratio(xy, numpy.sqrt(xx) * numpy.sqrt(yy))


def _ranks(values: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Each question's rank within a resample (R, n), from the middle; equal values have the mean of their ranks."""
    import numpy

    distinct, place = numpy.unique(values, return_inverse=True)
    order = numpy.argsort(place, kind="stable")
    of_value = counts.take(order, axis=1)
    if len(distinct) < len(values):
        of_value = numpy.add.reduceat(of_value, numpy.searchsorted(place[order], range(len(distinct))), axis=1)
    ranks = numpy.cumsum(of_value, axis=1) - (of_value + counts.sum(axis=1, keepdims=True)) / 2
    return ranks.take(place, axis=1)


def _pearson_and_spearman(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    return (_pearson(rows, counts) + _spearman(rows, counts)) / 2


def _classes(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list[list[int]]:
    index = {label: number for number, label in enumerate(dict.fromkeys([*labels, *targets, *predictions]))}
    return [[index[answer] for answer in side] for side in (predictions, targets)]


def _positive(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list[list[bool]]:
    return [[answer == labels[-1] for answer in side] for side in (predictions, targets)]


def _right_and_positive(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list:
    return [list(map(operator.eq, predictions, targets)), *_positive(predictions, targets, labels)]


def _numbers(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> tuple:
    return predictions, targets


# ---- the table ----

METRICS: dict[str, Metric] = {
    "accuracy": Mean("Accuracy", "words", operator.eq, "correct"),
    "exact_match": Mean("Exact match", "words", same_text, "correct"),
    "f1": Mean("F1", "words", text_f1, "f1"),
    "matthews": Statistic("Matthews", "labels", _classes, _matthews, lowest=-1),
    "binary_f1": Statistic("Binary F1", "two labels", _positive, _binary_f1),
    "accuracy_and_f1": Statistic(
        "Accuracy and F1", "two labels", _right_and_positive, _accuracy_and_f1, parts=("accuracy", "binary_f1")
    ),
    "pearson": Statistic("Pearson", "numbers", _numbers, _pearson, lowest=-1),
    "spearman": Statistic("Spearman", "numbers", _numbers, _spearman, lowest=-1),
    "pearson_and_spearman": Statistic(
        "Pearson and Spearman",
        "numbers",
        _numbers,
        _pearson_and_spearman,
        parts=("pearson", "spearman"),
        lowest=-1,
    ),
}


def metrics_for(labels: Sequence[str] = (), numbers: bool = False) -> list[str]:
    """Names of the metrics of a task with these labels, of one of free text (no labels), or of one of ``numbers``."""
    having = {"words", *["labels"] * (len(labels) > 1), *["two labels"] * (len(labels) == 2)}
    return [name for name, metric in METRICS.items() if metric.needs in ({"numbers"} if numbers else having)]


def title_of(metric: str) -> str:
    """How tables name a metric; one of another's making by its own name."""
    return METRICS[metric].title if metric in METRICS else metric
