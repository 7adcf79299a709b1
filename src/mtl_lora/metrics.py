"""Metrics by name, for any system: pure functions of predictions and targets, with their standard errors.

A metric is either the mean of per-question scores or a statistic of all questions together, such as a correlation.
Intervals of differences, and standard errors of statistics, come from resampling questions with replacement. numpy is
imported only where it is needed.
"""

import collections
import dataclasses
import functools
import math
import operator
import re
import statistics
import string
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.estimates import SEED, Difference, Estimate, bootstrap_means, draws, proportion_error

if TYPE_CHECKING:
    import numpy

Answer = str | float  # a label or free text; a number for regression
ERROR_RESAMPLES = 1000  # resamples for a standard error
NOTHING = "–"  # a table cell without a value

# ---- free text ----

_KEPT = re.compile(
    r"(?<!\w)[-.]+(?=\d)"  # a sign or point before a number: -5, .5
    r"|[<>]=?(?=\s*[-.]?\d)"  # a comparison before a number: <5, >= 5, x<10
    r"|(?<=\d)[.,:/^*-](?=\d)"  # signs inside a number: 1.5, 1/2, 12:30
    r"|(?<=\de)[+-](?=\d)|(?<!\w)-(?=[$€£]\d|[^\W\d_]\b)"  # the sign of an exponent, amount or letter: 1e-5, -$5, -x
    r"|(?<!\w)-(?=[√∞]|(?:inf|infinity|pi|sqrt)\b)"  # a sign before a number that is a word: -pi
    r"|(?<=\b[^\W_])(?:[<>]=|[+*/^<>=])(?=[^\W_]\b)"  # an operator between single characters: x+1, a<b, a>=b
    r"|(?<=\b[^\W\d_])[+#-]+(?!\w)"  # signs after a single letter: C++, F#, A-
    r"|(?:(?<=\b[^\W\d_]{2})|(?<=[^\W\d_]\d))\+(?!\w)"  # the charge of an ion: Na+, Ca2+
    rf"|[^{re.escape(string.punctuation)}]"
)


def free_text_words(text: str) -> list[str]:
    """Return the lower-case words without punctuation and articles, as SQuAD (1606.05250) compares answers.

    There are three exceptions. Signs that belong to a number, a single letter or an ion are kept (-1.5 is not 15, -pi
    not pi, x<5 not x>5, C++ not C, x+1 not x1, Ca2+ not Ca2). ``a``, ``an`` and ``the`` are kept as the last word,
    where they are not articles (vitamin A). Text that is only punctuation is kept as it is.
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower().replace("\N{MINUS SIGN}", "-"))
    words = "".join(_KEPT.findall(plain)).split()
    kept = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return kept or plain.split()


def same_text(text: str, target: str) -> bool:
    """Return whether two free texts have the same words (``free_text_words``); an empty text never matches."""
    words = free_text_words(text)
    return bool(words) and words == free_text_words(target)


def text_f1(text: str, target: str) -> float:
    """2 P R / (P + R) of the words that two free texts share; a word counts as often as both texts have it (SQuAD)."""
    given, wanted = free_text_words(text), free_text_words(target)
    if not given or not wanted:
        return 0.0
    return 2 * sum((collections.Counter(given) & collections.Counter(wanted)).values()) / (len(given) + len(wanted))


# ---- VQA: answers to questions about images ----

_NUMBER_WORDS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(max(number - 1, 0)) for number, word in enumerate(_NUMBER_WORDS)}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Spelling without one of its apostrophes -> contraction; the official table also turns somebody'd into somebodyd.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _without_punctuation(text: str) -> str:
    """Apply the official rule for punctuation.

    A sign is removed if one of its kind is next to a space, or if the text has a comma between digits; otherwise a
    space replaces it. A full stop is removed unless a digit follows.
    """
    found = text
    for sign in _VQA_PUNCTUATION:
        removed = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        found = found.replace(sign, "" if removed else " ")
    return re.sub(r"\.(?!\d)", "", found)


def vqa_normalised(text: str) -> str:
    """Normalise an answer as the official evaluation of VQA (1505.00468) normalises predictions.

    After ``_without_punctuation``: lower case, digits for none to ten, no articles, apostrophes in contractions.
    """
    plain = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _agreement(given: str, answers: Sequence[str]) -> float:
    """The mean over people of min(1, k / 3), where k of the other people gave this answer."""
    same, n = answers.count(given), len(answers)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


def vqa_accuracy(text: str, target: Mapping[str, float] | Sequence[str]) -> float:
    """The soft accuracy of VQA. target: the answers that people gave, or soft scores by answer.

    ``vqa_normalised`` is applied to both sides; a text that it leaves empty is compared in lower case instead. Of
    several soft scores that match, the highest counts.
    """

    def plain(text: str) -> str:
        return vqa_normalised(text) or text.strip().lower()

    given = plain(text)
    if isinstance(target, Mapping):
        return max((score for answer, score in target.items() if given and plain(answer) == given), default=0.0)
    return _agreement(given, [plain(answer) for answer in target]) if given else 0.0


def vqa_accuracy_official(text: str, target: Mapping[str, float] | Sequence[str]) -> float:
    """The soft accuracy of VQA as the evaluation used by VL-T5 and its successors computes it.

    It does not treat both sides alike: people's answers only lose punctuation, and only if they are not all the same;
    soft scores are looked up by the unchanged prediction.
    """
    if isinstance(target, Mapping):
        return target.get(text, 0.0)
    answers = [_without_punctuation(answer) for answer in target] if len({*target}) > 1 else list(target)
    return _agreement(vqa_normalised(text), answers)


# ---- what a metric is ----


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of n >= 1 predictions, their targets and the task's labels.

    ``rows(predictions, targets, labels)`` returns the per-question inputs of the metric, ``value_of(rows)`` its value,
    ``estimate(rows)`` the value and its standard error or None, and ``difference`` the value of B minus that of A.
    Tables show values times ``scale``, with ``digits`` decimals, in percent or in ``unit``. Of two labels the last is
    the positive class.

    title: column heading. needs: what a task must have, see ``metrics_for``. lowest, highest: range of values. parts:
    names of the two metrics whose mean this is. target: key of a prediction line with the target. key: key of a
    prediction line from which the metric is computed; for captions and maps it holds the row itself, because reports
    lack what computing it needs.
    """

    title: str
    needs: str
    _: dataclasses.KW_ONLY
    lowest: int = 0
    highest: float = 1
    scale: int = 100
    unit: str = ""
    digits: int = 1
    lower_is_better: bool = False
    parts: tuple[str, ...] = ()
    target: str = "answer"

    @property
    def has_written_rows(self) -> bool:
        """Whether the prediction lines hold the rows: for captions and maps."""
        return self.needs in ("references", "classes", "saliency", "edges", "angles", "depth")

    def of_lines(self, lines: Sequence[Mapping], labels: Sequence[str] = (), key: str = "parsed") -> Sequence:
        """Return the rows of prediction lines. key: the lines' key of the answers."""
        if self.has_written_rows:
            return self.written([line[self.key] for line in lines])
        return self.rows([line[key] for line in lines], [line[self.target] for line in lines], labels)

    def value(self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()) -> float:
        """Return the value without a standard error, so without resampling."""
        return self.value_of(self.rows(predictions, targets, labels))


@dataclasses.dataclass(frozen=True)
class Mean(Metric):
    """The mean of ``score(prediction, target)``, from 0 to ``highest``. key: a prediction line's key of the score."""

    score: Callable[[str, typing.Any], float] | None  # None where the prediction lines hold the rows
    key: str

    def rows(self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()) -> list[float]:
        """Return the score of each question."""
        score = operator.eq if labels and self.score is same_text else self.score  # labels are not free text
        return [float(score(given, target)) for given, target in zip(predictions, targets, strict=True)]

    @staticmethod
    def written(values: Sequence[float]) -> list[float]:
        """Return the rows that prediction lines hold."""
        return list(map(float, values))

    @staticmethod
    def value_of(rows: Sequence[float]) -> float:
        return statistics.fmean(rows)

    @staticmethod
    def estimate(rows: Sequence[float]) -> tuple[float, float]:
        """Return the value and its standard error.

        For zeros and ones the error is ``estimates.proportion_error``. For others it is the larger of the error of the
        values and the error with 0, 0, 1, 1 added, for the same reason.
        """

        def error(values: Sequence[float]) -> float:
            center = statistics.fmean(values)
            return math.sqrt(math.fsum((value - center) ** 2 for value in values)) / len(values)

        value = statistics.fmean(rows)  # sum rounds in another way from Python 3.12 on
        if {*rows} <= {0, 1}:
            return value, proportion_error(value, len(rows))
        return value, max(error(rows), error([*rows, 0, 0, 1, 1]))

    def difference(
        self, pairs: Sequence[tuple[list, list]], stream: Sequence[int], resamples: int
    ) -> "tuple[float, numpy.ndarray]":
        """Return B minus A, averaged over ``pairs`` of (rows of A, rows of B), and its values (resamples,)."""
        each = zip(*([y - x for x, y in zip(a, b, strict=True)] for a, b in pairs), strict=True)
        values = [statistics.fmean(of_question) for of_question in each]
        return statistics.fmean(values), bootstrap_means(values, stream, resamples)


@dataclasses.dataclass(frozen=True)
class Statistic(Metric):
    """A function of all questions: ``of_counts(rows (n, c), counts (R, n)) -> (R,)``.

    ``counts`` says how often each question occurs in each of R resamples. The standard error is the standard deviation
    over ``ERROR_RESAMPLES`` bootstrap resamples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), in
    which an undefined value (all predictions or all targets equal) is 0, as in scikit-learn for Matthews. It is None
    where all resamples agree, as for one question, a constant predictor or a perfect one: resampling then shows no
    spread, but the value is not certain.
    """

    columns: Callable[..., Sequence] | None  # as ``rows`` but (c, n); None where the prediction lines hold the rows
    of_counts: "Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray]"
    key: str = "parsed"

    def rows(
        self, predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str] = ()
    ) -> "numpy.ndarray":
        """Return the rows, (n, c) numbers.

        Raises ``UserError`` unless the task has the labels that the metric needs, and for a number that is not finite,
        since it would be ranked like any other.
        """
        import numpy

        if len(predictions) != len(targets):
            raise ValueError(f"there are {len(predictions)} predictions but {len(targets)} targets")
        if self.needs == "two labels" and len(labels) != 2:
            raise UserError(f"{self.title} needs two labels, the last of which is the positive class, not {labels}")
        rows = numpy.array(self.columns(predictions, targets, labels), dtype=numpy.float64).T
        if broken := numpy.argwhere(~numpy.isfinite(rows)).tolist():
            (index, column), *_ = broken
            raise UserError(f"{self.title} needs finite numbers; answer {index} has {rows[index, column]}")
        return rows

    def value_of(self, rows: "numpy.ndarray") -> float:
        """Return the statistic with each question counted once."""
        import numpy

        return float(self.of_counts(rows, numpy.ones((1, len(rows))))[0])

    @staticmethod
    def written(values: Sequence) -> "numpy.ndarray":
        """Return the rows (n, c) that prediction lines hold."""
        import numpy

        return numpy.array(values, dtype=numpy.float64)

    def estimate(self, rows: "numpy.ndarray") -> tuple[float, float | None]:
        """Return the value and its standard error."""
        error = float(self._resampled([rows], [SEED], ERROR_RESAMPLES)[0].std(ddof=1))
        return self.value_of(rows), error if error > 1e-9 else None

    def difference(
        self, pairs: "Sequence[tuple[numpy.ndarray, numpy.ndarray]]", stream: Sequence[int], resamples: int
    ) -> "tuple[float, numpy.ndarray]":
        """As ``Mean.difference``; every resample draws the same questions for all sides."""
        values = [self.value_of(b) - self.value_of(a) for a, b in pairs]
        found = self._resampled([side for pair in pairs for side in pair], stream, resamples)
        return statistics.fmean(values), (found[1::2] - found[::2]).mean(axis=0)

    def _resampled(self, sides: "Sequence[numpy.ndarray]", stream: Sequence[int], resamples: int) -> "numpy.ndarray":
        """Return the statistic of each side in each resample, (sides, resamples), on the same questions."""
        import numpy

        # Questions with equal rows on all sides are drawn together, in the order of their first occurrence.
        _, first, counts = numpy.unique(numpy.hstack(sides), axis=0, return_index=True, return_counts=True)
        order = numpy.argsort(first)
        alike = [side[first[order]] for side in sides]
        found = [[self.of_counts(side, d) for side in alike] for d in draws(counts[order], stream, resamples)]
        return numpy.concatenate(found, axis=1)


# ---- statistics: rows (n, c), counts (R, n) -> (R,) ----


def _quotient(part: "numpy.ndarray", whole: "numpy.ndarray") -> "numpy.ndarray":
    """part / whole; 0 where the whole is 0."""
    import numpy

    return numpy.divide(part, whole, out=numpy.zeros(part.shape), where=whole > 0)


def _ratio(part: "numpy.ndarray", whole: "numpy.ndarray") -> "numpy.ndarray":
    """``_quotient`` clipped to -1..1 against rounding errors."""
    return _quotient(part, whole).clip(-1, 1)


def _matthews(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Matthews correlation of any number of classes (Gorodkin, Computational Biology and Chemistry 28, 2004).

    Columns: the class given, the class wanted.
    """
    import numpy

    classes, n = numpy.unique(rows), counts.sum(axis=1)
    given, wanted = (counts @ (rows[:, [side]] == classes) for side in (0, 1))  # (R, classes)
    right = counts @ (rows[:, 0] == rows[:, 1])
    spread = [numpy.sqrt(n**2 - (side**2).sum(axis=1)) for side in (given, wanted)]
    return _ratio(right * n - (given * wanted).sum(axis=1), spread[0] * spread[1])


def _binary_f1(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """2 TP / (2 TP + FP + FN). Columns: whether the positive class was given, whether it was wanted."""
    return _ratio(2 * counts @ (rows[:, 0] * rows[:, 1]), counts @ rows.sum(axis=1))


def _accuracy_and_f1(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """The mean of accuracy and F1. Columns: whether the answer is right, then the columns of ``_binary_f1``."""
    return (counts @ rows[:, 0] / counts.sum(axis=1) + _binary_f1(rows[:, 1:], counts)) / 2


def _pearson(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    import numpy

    largest = numpy.abs(rows).max(axis=0)
    rows = rows / numpy.where(largest > 0, largest, 1)
    apart = rows - numpy.median(rows, axis=0)
    x, y = numpy.where(numpy.abs(apart) > 1e-13, apart, 0).T  # a column that varies by rounding only is constant
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
    """Return each question's rank in each resample (R, n), relative to the middle rank; ties share their mean rank."""
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


def _bleu4(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Corpus BLEU-4 (Papineni et al., ACL 2002), with the smoothing constants of coco-caption's scorer.

    Columns: matching n-grams for n = 1 to 4, n-grams of the prediction for n = 1 to 4, length of the prediction, length
    of the closest reference.
    """
    import numpy

    sums = counts @ rows
    precision = (sums[:, :4] + 1e-15) / (sums[:, 4:8] + 1e-9)
    ratio = (sums[:, 8] + 1e-15) / (sums[:, 9] + 1e-9)
    return precision.prod(axis=1) ** 0.25 * numpy.exp(numpy.minimum(1 - 1 / ratio, 0))


# ---- statistics of maps: a row is sums over the pixels of an image ----


def _miou(rows: "numpy.ndarray", counts: "numpy.ndarray", present: bool = False) -> "numpy.ndarray":
    """The mean over classes of the intersection over union in all images together; 0 for a class without any pixel.

    Columns: by class, the pixels that are true positives, then false positives, then false negatives. present: average
    only over the classes that some label in these images has.
    """
    found, taken, missed = (counts @ rows).reshape(len(counts), 3, -1).swapaxes(0, 1)
    union = found + taken + missed
    each = _quotient(found, union)
    if not present:
        return each.mean(axis=1)
    return _quotient((each * (found + missed > 0)).sum(axis=1), (found + missed > 0).sum(axis=1))


def _by_threshold(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """Return the means over images of intersection over union, precision and recall, (3, R, thresholds).

    Columns: the three measures at each threshold, then whether the image has a label.
    """
    sums = counts @ rows
    means = _quotient(sums[:, :-1], sums[:, -1:] + 0 * sums[:, :-1])
    return means.reshape(len(counts), 3, -1).swapaxes(0, 1)


def _saliency_miou(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    return _by_threshold(rows, counts)[0].max(axis=1)


def _max_f(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    _, precision, recall = _by_threshold(rows, counts)
    return _quotient(2 * precision * recall, precision + recall).max(axis=1)


def _mean_of_sums(rows: "numpy.ndarray", counts: "numpy.ndarray", column: int = 0) -> "numpy.ndarray":
    """The mean over all pixels. Columns: sums over an image's pixels (see ``column``), the number of pixels last."""
    sums = counts @ rows
    return _quotient(sums[:, column], sums[:, -1])


def _root_of_squares(rows: "numpy.ndarray", counts: "numpy.ndarray") -> "numpy.ndarray":
    """The root mean square. Columns: the sum of squares last but one, the number of pixels last."""
    return _mean_of_sums(rows, counts, -2) ** 0.5


def _classes(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list[list[int]]:
    index = {label: number for number, label in enumerate(dict.fromkeys([*labels, *targets, *predictions]))}
    return [[index[answer] for answer in side] for side in (predictions, targets)]


def _positive(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list[list[bool]]:
    return [[answer == labels[-1] for answer in side] for side in (predictions, targets)]


def _right_and_positive(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> list:
    return [list(map(operator.eq, predictions, targets)), *_positive(predictions, targets, labels)]


def _numbers(predictions: Sequence[Answer], targets: Sequence[Answer], labels: Sequence[str]) -> tuple:
    return predictions, targets


# ---- the metrics by name ----

_ERROR = {"scale": 1, "lower_is_better": True, "digits": 3}
METRICS: dict[str, Metric] = {
    "accuracy": Mean("Accuracy", "words", operator.eq, "correct"),
    "exact_match": Mean("Exact match", "words", same_text, "correct"),
    "f1": Mean("F1", "free text", text_f1, "f1"),
    "matthews": Statistic("Matthews", "labels", _classes, _matthews, lowest=-1),
    "binary_f1": Statistic("Binary F1", "two labels", _positive, _binary_f1),
    "accuracy_and_f1": Statistic(
        "Accuracy and F1", "two labels", _right_and_positive, _accuracy_and_f1, parts=("accuracy", "binary_f1")
    ),
    "pearson": Statistic("Pearson", "numbers", _numbers, _pearson, lowest=-1),
    "spearman": Statistic("Spearman", "numbers", _numbers, _spearman, lowest=-1),
    "pearson_and_spearman": Statistic(
        "Pearson and Spearman", "numbers", _numbers, _pearson_and_spearman, parts=("pearson", "spearman"), lowest=-1
    ),
    "vqa_accuracy": Mean("VQA accuracy", "answers", vqa_accuracy, "score", target="answers"),
    "vqa_accuracy_official": Mean("Official VQA accuracy", "answers", vqa_accuracy_official, "score", target="answers"),
    "cider": Mean("CIDEr", "references", None, "cider", highest=10, unit="times 100"),
    "bleu4": Statistic("BLEU-4", "references", None, _bleu4, "bleu4"),
    "miou": Statistic("mIoU", "classes", None, _miou, "counts"),
    "miou_present": Statistic(
        "mIoU of present classes", "classes", None, functools.partial(_miou, present=True), "counts"
    ),
    "saliency_miou": Statistic("Saliency mIoU", "saliency", None, _saliency_miou, "counts"),
    "max_f": Statistic("maxF", "saliency", None, _max_f, "counts"),
    "mean_angle": Statistic(
        "Mean angle", "angles", None, _mean_of_sums, "counts", highest=180, **_ERROR, unit="in degrees"
    ),
    "rmse_angle": Statistic(
        "RMS angle", "angles", None, _root_of_squares, "counts", highest=180, **_ERROR, unit="in degrees"
    ),
    "depth_rmse": Statistic(
        "Depth RMSE", "depth", None, _root_of_squares, "counts", highest=math.inf, **_ERROR, unit="in the data's unit"
    ),
    "edge_loss": Statistic(
        "Edge loss", "edges", None, _mean_of_sums, "counts", highest=math.inf, **_ERROR | {"digits": 5}, unit="in nats"
    ),
}


def metrics_for(labels: Sequence[str] = (), numbers: bool = False) -> list[str]:
    """Names of the metrics for a task with these labels, for free text (no labels), or for ``numbers`` (regression)."""
    # Not F1 over words for labels: it would be taken for the F1 of a class.
    having = {"words", "labels" if labels else "free text", *["two labels"] * (len(labels) == 2)}
    return metrics_needing(*({"numbers"} if numbers else having))


def metrics_needing(*needs: str) -> list[str]:
    """Names of the metrics whose ``needs`` is one of these."""
    return [name for name, metric in METRICS.items() if metric.needs in needs]


def title_of(metric: str) -> str:
    """The name of a metric in tables; a metric that is not in ``METRICS`` keeps its own name."""
    return METRICS[metric].title if metric in METRICS else metric


def scale_of(metric: str) -> int:
    """The factor by which tables multiply a metric's values."""
    return METRICS[metric].scale if metric in METRICS else 1


def range_of(metric: str) -> tuple[float, float]:
    """The lowest and the highest value of a metric as figures show it, with a little room for a marker there."""
    if metric not in METRICS:
        return -math.inf, math.inf
    low, high, scale = METRICS[metric].lowest, METRICS[metric].highest, METRICS[metric].scale
    room = 0.02 * min(high - low, 1)
    return (low - room) * scale, (high + room) * scale


def _decimals(number: float, digits: int, signed: bool) -> str:
    """A number with ``digits`` decimals.

    A ``signed`` number, which is a difference or a bound of one, keeps the sign from before rounding: -0.0 and +0.0 are
    on either side of zero. Zero itself has no sign.
    """
    if signed and round(number, 12):  # sums that cancel leave a smaller remainder than that
        return f"{number:+.{digits}f}"
    return f"{round(number, digits) + 0.0:.{digits}f}"


def value_text(value: float | None, spread: float | None = None, metric: str = "accuracy", signed: bool = False) -> str:
    """``71.2 ± 0.8``, with the metric's scale and digits; a dash for None."""
    if value is None:
        return NOTHING
    scale, digits = scale_of(metric), METRICS[metric].digits if metric in METRICS else 2 if metric == "delta_m" else 3
    shown = _decimals(scale * value, digits, signed)
    return shown if spread is None else f"{shown} ± {_decimals(scale * spread, digits, False)}"


def units_text(metrics: Collection[str]) -> str:
    """``Accuracy in percent; Matthews times 100; ``: the units in a table of ``metrics``."""
    found: dict[str, list[str]] = {}
    for metric in [each for name, each in METRICS.items() if name in metrics]:
        unit = metric.unit or ("times 100" if metric.lowest else "in percent")
        found.setdefault(unit + ", lower is better" * metric.lower_is_better, []).append(metric.title)
    return "".join(f"{', '.join(titles)} {unit}; " for unit, titles in found.items())


def interval_text(value: Estimate | Difference | None, metric: str = "accuracy", signed: bool = False) -> str:
    """``70.1 to 72.3``, or a dash."""
    if value is None or value.low is None:
        return NOTHING
    return f"{value_text(value.low, None, metric, signed)} to {value_text(value.high, None, metric, signed)}"


def difference_text(value: Estimate | Difference | None, metric: str = "accuracy") -> str:
    """``+1.2 (-0.3 to +2.7)``, or a dash."""
    interval = f" ({interval_text(value, metric, signed=True)})" if value and value.low is not None else ""
    return value_text(value and value.center, None, metric, signed=True) + interval


def p_text(p: float) -> str:
    """A p value with four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def one_unit(metrics: Iterable[str]) -> bool:
    """Return whether values of these metrics can be averaged: all are shown times 100, or there is only one metric."""
    metrics = {*metrics}
    return len(metrics) == 1 or all(scale_of(metric) == 100 for metric in metrics)
