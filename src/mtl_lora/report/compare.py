"""By how much two runs on the same questions differ: task by task, and on average."""

import collections
import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.report.load import Prediction, read_predictions
from mtl_lora.report.study_model import CONFIDENCE
from mtl_lora.report.table import AVERAGE, NOTHING, TextTable, csv_table, interval_text, markdown_text, percent
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

    The binomial test of ``only_a`` against half of the pairs. It is 1 without discordant pairs and never 0: the
    smallest float stands for all below it. Raises ``UserError`` without scipy.
    """
    if only_a == only_b:
        return 1.0
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise UserError("comparing needs scipy, which is not installed; run pip install 'mtl-lora[report]'") from None
    return max(float(binomtest(only_a, only_a + only_b).pvalue), math.ulp(0.0))


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
    """What the renderers show: tasks in column order, their average, and the notes below."""

    a: Results
    b: Results
    tasks: dict[str, Compared]
    average: Compared
    seed: int
    resamples: int
    notes: list[str]


def compare(a: Results, b: Results, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples.

    Raises ``UserError`` saying what differs where the two are not comparable, and for broken predictions.
    """
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.tasks if name not in other.tasks]
        if alone:
            raise _not_comparable(a, b, f"there are scores of {', '.join(alone)} in {one.path} alone")
    means: dict[str, list] = {"accuracy": [], "f1": []}

    def change(name: str, key: str, pairs: Sequence[tuple[float, float]]) -> Change:
        drawn = task_means(name, [float(y) - float(x) for x, y in pairs], seed, resamples)
        means[key].append(drawn)
        return _change(*(math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True)), drawn)

    tasks = {}
    for name, pairs in paired_answers(a, b, a.scored).items():
        right, scores = [(x.correct, y.correct) for x, y in pairs], [(x.f1, y.f1) for x, y in pairs]
        has_f1 = all(None not in pair for pair in scores)
        only_a, only_b = right.count((True, False)), right.count((False, True))
        accuracy, f1 = change(name, "accuracy", right), change(name, "f1", scores) if has_f1 else None
        tasks[name] = Compared(len(pairs), accuracy, only_a, only_b, mcnemar_p(only_a, only_b), f1)
    rows, count = list(tasks.values()), len(tasks)

    def average(key: str) -> Change:
        """The unweighted mean over tasks; questions were resampled within each task (a stratified bootstrap)."""
        sides = (math.fsum(getattr(getattr(row, key), side) for row in rows) / count for side in "ab")
        return _change(*sides, sum(means[key]) / count)

    n, only_a, only_b = (sum(getattr(row, key) for row in rows) for key in ("n", "only_a", "only_b"))
    f1 = average("f1") if all(row.f1 for row in rows) else None
    whole = Compared(n, average("accuracy"), only_a, only_b, mcnemar_p(only_a, only_b), f1)
    return Comparison(a, b, tasks, whole, seed, resamples, _notes(a, b, tasks, seed, resamples))


def _change(a: float, b: float, means: "numpy.ndarray") -> Change:
    return Change(a, b, b - a, *percentile_interval(means))


def _notes(a: Results, b: Results, tasks: dict[str, Compared], seed: int, resamples: int) -> list[str]:
    """What the numbers are, and what differs between the runs besides what is compared."""
    notes = [
        f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in percentage points.",
        f"Interval: {100 * CONFIDENCE:.0f} % percentile interval of a paired bootstrap, {resamples:,} resamples of the "
        f"questions within each task, seed {seed}.",
        "p: exact two-sided McNemar test of the questions that only A answers right against those that only B does; "
        "not corrected for the number of tasks.",
        "Average: every task weighs the same in the scores, every question in p, which pools the questions of all "
        "tasks.",
    ]
    without_f1 = [name for name, row in tasks.items() if row.f1 is None]
    if 0 < len(without_f1) < len(tasks):
        notes.append(f"No F1 for {', '.join(without_f1)}, nor on average: not every prediction has one.")
    if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes


def markdown(comparison: Comparison) -> str:
    """A padded pipe table (percent, one decimal), a line a task and one for their average, and the notes as a list."""
    rows = [(comparison.a.task_set.title(name), row) for name, row in comparison.tasks.items()]
    with_f1 = any(row.f1 for row in comparison.tasks.values())
    interval = f"{100 * CONFIDENCE:.0f} % interval"
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if with_f1 else []
    lines = []
    for title, row in [*rows, (AVERAGE, comparison.average)]:
        line = [title, f"{row.n:,}", *_change_texts(row.accuracy), f"{row.only_a:,}", f"{row.only_b:,}", p_text(row.p)]
        lines.append(line + (_change_texts(row.f1) if with_f1 else []))
    notes = "\n".join(f"- {markdown_text(note)}" for note in comparison.notes)
    return f"{TextTable('', header, lines).markdown()}\n\n{notes}\n"


def _change_texts(change: Change | None) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    return [
        percent(change.a),
        percent(change.b),
        percent(change.difference, signed=True),
        interval_text(change, signed=True),
    ]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def csv_text(comparison: Comparison) -> str:
    """Fractions with every digit: one line a task, then the average, whose task is empty."""
    lines = []
    for name, row in (*comparison.tasks.items(), (None, comparison.average)):
        lines.append({"task": name})
        for key, value in dataclasses.asdict(row).items():
            is_change = key in ("accuracy", "f1")
            lines[-1] |= {f"{key} {k}": (value or {}).get(k) for k in CHANGE_KEYS} if is_change else {key: value}
    return csv_table(lines)


def json_text(comparison: Comparison) -> str:
    """One object: the two runs, a record a task, the average, and how the intervals were drawn."""
    value = {
        **{
            side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
            for side, run in (("a", comparison.a), ("b", comparison.b))
        },
        "tasks": {name: dataclasses.asdict(row) for name, row in comparison.tasks.items()},
        "average": dataclasses.asdict(comparison.average),
        "confidence": CONFIDENCE,
        **{key: getattr(comparison, key) for key in ("resamples", "seed", "notes")},
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


RENDERERS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "csv": csv_text, "json": json_text}
