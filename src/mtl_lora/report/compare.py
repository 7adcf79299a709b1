"""By how much two runs on the same questions differ: task by task, and on average."""

import collections
import dataclasses
import math
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.report.load import Prediction, read_predictions
from mtl_lora.report.study_model import CONFIDENCE
from mtl_lora.report.table import AVERAGE, NOTHING, Report, TextTable, interval_text, percent, require
from mtl_lora.results import Results

if TYPE_CHECKING:
    import numpy

NEEDED_SETTINGS = ("mode", "base_fingerprint", "template", "cutoff_len")
# What is compared, and what the answers do not depend on. Any other setting, a future one too, is protocol.
# (limit decides which questions are asked, and those are compared one by one; so are the definitions of tasks.)
FREE_SETTINGS = {"base_fingerprint", "adapter_sha256", "tasks_sha256", "dtype", "batch_size", "limit"}
CHANGE_KEYS = ("a", "b", "difference", "low", "high")
# Numbers drawn at a time: 32 MiB of counts, however many resamples and distinct differences there are.
_DRAWN_AT_ONCE = 2**22
Pairs = list[tuple[Prediction, Prediction]]


# ---- statistics ----


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947) from the counts of discordant pairs.

    min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n) with b = ``only_a``, c = ``only_b``, n = b + c. It is 1 without
    discordant pairs and never 0: the smallest float stands for all below it. Raises ``UserError`` without scipy.
    """
    require("scipy")
    from scipy.special import bdtr

    return min(1.0, max(2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)), math.ulp(0.0)))


def bootstrap_means(differences: Sequence[float], seed: Sequence[int], resamples: int) -> "numpy.ndarray":
    """Means (resamples,) of as many ``differences`` as there are, drawn from them with replacement.

    One difference a question, so a resample keeps the two answers to a question together.
    """
    import numpy

    # How often each distinct value comes up is multinomial: the same law as drawing question by question, in less
    # time. Values stand in the order of the questions, so that negated differences give negated means.
    counted = collections.Counter(differences)
    values = numpy.array(list(counted), dtype=numpy.float64)
    n = len(differences)
    proportions = numpy.array(list(counted.values())) / n
    generator = numpy.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return numpy.concatenate([generator.multinomial(n, proportions, size) @ values for size in sizes]) / n


def task_means(task: str, differences: Sequence[float], seed: int, resamples: int) -> "numpy.ndarray":
    """``bootstrap_means`` of one task's differences, from a stream of its own: other tasks do not change them."""
    return bootstrap_means(differences, [seed, *task.encode()], resamples)


def percentile_interval(means: "numpy.ndarray") -> tuple[float, float]:
    """The middle ``CONFIDENCE`` of bootstrap means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""
    import numpy

    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


# ---- what can be compared ----


def check_comparable(a: Results, b: Results, tasks: Sequence[str]) -> None:
    """Raise ``UserError`` unless both scored ``tasks`` on the same data by one protocol."""
    for results in (a, b):
        for key in NEEDED_SETTINGS:
            if results.settings.get(key) is None:
                raise UserError(f"{results.path}: settings.{key} is missing, without which nothing can be compared")
        for name in tasks:
            if results.data.get(name) is None:
                raise UserError(f"{results.path}: data.{name} is missing; it must be the sha256 of the test data")
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if key not in FREE_SETTINGS]
    differing = [key for key in keys if a.settings.get(key) != b.settings.get(key)]
    if differing:
        values = (f"{key} ({_shown(a, key)} and {_shown(b, key)})" for key in differing)
        raise _not_comparable(a, b, f"they differ in {', '.join(values)}")
    redefined = [name for name in tasks if a.task_set.definition(name) != b.task_set.definition(name)]
    if redefined:
        raise _not_comparable(a, b, f"they declare other options, pattern or answer prefix of {', '.join(redefined)}")
    other_data = [name for name in tasks if a.data[name] != b.data[name]]
    if other_data:
        raise _not_comparable(a, b, f"their test data of {', '.join(other_data)} are not the same (sha256)")


def paired_answers(a: Results, b: Results, tasks: Sequence[str]) -> dict[str, Pairs]:
    """By task, the answers of A and of B to each question, in the order of their indices.

    Raises ``UserError`` unless both can be compared and answered the same questions, asked in the same words. (Another
    base model may have another tokenizer and so other prompt ids; only with one base must these agree.)
    """
    check_comparable(a, b, tasks)
    same_base = a.settings["base_fingerprint"] == b.settings["base_fingerprint"]
    found: dict[str, Pairs] = {}
    for task in tasks:
        of_a, of_b = read_predictions(a, task), read_predictions(b, task)
        alone = sorted(of_a.keys() - of_b.keys()) or sorted(of_b.keys() - of_a.keys())
        if alone:
            place = (of_a.get(alone[0]) or of_b[alone[0]]).place
            limits = f"limit {_shown(a, 'limit')} and {_shown(b, 'limit')}"
            raise _not_comparable(a, b, f"question {alone[0]} of {task} ({place}) is in one of them alone ({limits})")
        found[task] = [(of_a[index], of_b[index]) for index in sorted(of_a)]
        for first, last in found[task]:
            where = f"({first.place}; {last.place})"
            if first.answer != last.answer:
                reason = f"question {first.index} of {task} has another right answer in each {where}"
                raise _not_comparable(a, b, reason)
            if same_base and first.prompt_sha256 != last.prompt_sha256:
                reason = f"question {first.index} of {task} has another prompt in each, with one base model {where}"
                raise _not_comparable(a, b, reason)
    return found


def _shown(results: Results, key: str) -> str:
    return reprlib.repr(results.settings[key]) if key in results.settings else "none"


def _not_comparable(a: Results, b: Results, reason: str) -> UserError:
    return UserError(f"{a.path} and {b.path} are not comparable: {reason}")


# ---- the comparison ----


@dataclasses.dataclass(frozen=True)
class Change:
    """A mean score (a fraction) of A and of B, their ``difference`` B - A, and its interval."""

    a: float
    b: float
    difference: float
    low: float
    high: float

    @classmethod
    def of(cls, a: float, b: float, means: "numpy.ndarray") -> "Change":
        """means: of the bootstrap."""
        return cls(a, b, b - a, *percentile_interval(means))


@dataclasses.dataclass(frozen=True)
class Compared:
    """One task, or all: n questions, ``only_a`` of them answered right by A alone, ``only_b`` by B alone."""

    n: int
    accuracy: Change
    only_a: int
    only_b: int
    p: float
    f1: Change | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Tasks in column order, and their average, of B against A."""

    a: Results
    b: Results
    tasks: dict[str, Compared]
    average: Compared
    seed: int
    resamples: int

    def report(self) -> Report:
        """The table (percent, one decimal), fractions with every digit, and what the numbers are."""
        rows = [*self.tasks.items(), (None, self.average)]
        interval, with_f1 = f"{100 * CONFIDENCE:.0f} % interval", any(row.f1 for row in self.tasks.values())
        header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
        header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if with_f1 else []
        lines, records = [], []
        for name, row in rows:
            lines.append([self.a.task_set.title(name) if name else AVERAGE, f"{row.n:,}", *_texts(row.accuracy)])
            lines[-1] += [f"{row.only_a:,}", f"{row.only_b:,}", p_text(row.p), *(_texts(row.f1) if with_f1 else [])]
            records.append({"task": name})
            for key, value in vars(row).items():
                is_change = key in ("accuracy", "f1")
                parts = {f"{key} {part}": getattr(value, part, None) for part in CHANGE_KEYS}
                records[-1] |= parts if is_change else {key: value}
        notes = self._notes()
        value = {
            side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
            for side, run in (("a", self.a), ("b", self.b))
        }
        value |= {
            "tasks": {name: dataclasses.asdict(row) for name, row in self.tasks.items()},
            "average": dataclasses.asdict(self.average),
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "seed": self.seed,
            "notes": notes,
        }
        return Report([TextTable("", header, lines)], records, notes, value)

    def _notes(self) -> list[str]:
        """What the numbers are, and what differs between the runs besides what is compared."""
        a, b = self.a, self.b
        notes = [
            f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in percentage points.",
            f"Interval: {100 * CONFIDENCE:.0f} % percentile interval of a paired bootstrap, {self.resamples:,} "
            f"resamples of the questions within each task, seed {self.seed}.",
            "p: exact two-sided McNemar test of the questions that only A answers right against those that only B "
            "does; not corrected for the number of tasks.",
            "Average: every task weighs the same in the scores, every question in p, which pools the questions of all "
            "tasks.",
        ]
        without_f1 = [name for name, row in self.tasks.items() if row.f1 is None]
        if 0 < len(without_f1) < len(self.tasks):
            notes.append(f"No F1 for {', '.join(without_f1)}, nor on average: not every prediction has one.")
        if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
            notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
        if a.settings.get("dtype") != b.settings.get("dtype"):
            notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
        return notes


def compare(a: Results, b: Results, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples.

    Raises ``UserError`` saying what differs where the two are not comparable, and for broken predictions.
    """
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.tasks if name not in other.tasks]
        if alone:
            raise _not_comparable(a, b, f"there are scores of {', '.join(alone)} in {one.path} alone")
    tasks, means = {}, {"correct": [], "f1": []}

    def change(name: str, key: str, pairs: Pairs) -> Change | None:
        scores = [(getattr(first, key), getattr(last, key)) for first, last in pairs]
        if any(None in pair for pair in scores):
            return None
        means[key].append(task_means(name, [float(y) - float(x) for x, y in scores], seed, resamples))
        return Change.of(*(math.fsum(side) / len(pairs) for side in zip(*scores, strict=True)), means[key][-1])

    def average(changes: Sequence[Change | None], drawn: Sequence["numpy.ndarray"]) -> Change | None:
        """The unweighted mean over tasks; questions were resampled within each task (a stratified bootstrap)."""
        if None in changes:
            return None
        sides = (math.fsum(getattr(each, side) for each in changes) / len(changes) for side in "ab")
        return Change.of(*sides, sum(drawn) / len(changes))

    for name, pairs in paired_answers(a, b, a.scored).items():
        right = collections.Counter((first.correct, last.correct) for first, last in pairs)
        discordant = right[True, False], right[False, True]
        accuracy, f1 = (change(name, key, pairs) for key in means)
        tasks[name] = Compared(len(pairs), accuracy, *discordant, mcnemar_p(*discordant), f1)
    rows = list(tasks.values())
    n, *discordant = (sum(getattr(row, key) for row in rows) for key in ("n", "only_a", "only_b"))
    accuracy, f1 = average([r.accuracy for r in rows], means["correct"]), average([r.f1 for r in rows], means["f1"])
    return Comparison(a, b, tasks, Compared(n, accuracy, *discordant, mcnemar_p(*discordant), f1), seed, resamples)


def _texts(change: Change | None) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    difference = percent(change.difference, signed=True)
    return [percent(change.a), percent(change.b), difference, interval_text(change, signed=True)]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"
