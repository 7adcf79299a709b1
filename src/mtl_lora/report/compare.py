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
from mtl_lora.report.table import NOTHING, csv_table, markdown_table, markdown_text, percent
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
    answers_a, answers_b = read_predictions(a, tasks), read_predictions(b, tasks)
    same_base = a.settings["base_fingerprint"] == b.settings["base_fingerprint"]
    found: dict[str, Pairs] = {}
    for task in tasks:
        of_a, of_b = answers_a[task], answers_b[task]
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
    """A mean score (a fraction) of A and of B, their difference B - A, and its interval."""

    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """B - A, a fraction."""
        return self.b - self.a


@dataclasses.dataclass(frozen=True)
class ComparedTask:
    """One task, or all (``task`` None): n questions, ``only_a`` of them answered right by A alone, ``only_b`` by B."""

    task: str | None
    n: int
    accuracy: Change
    only_a: int
    only_b: int
    p: float
    f1: Change | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the renderers show: a row a task in column order, their average, and the notes below."""

    a: Results
    b: Results
    rows: tuple[ComparedTask, ...]
    average: ComparedTask
    seed: int
    resamples: int
    notes: tuple[str, ...]


def compare(a: Results, b: Results, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples.

    Raises ``UserError`` saying what differs where the two are not comparable, and for broken predictions.
    """
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.tasks if name not in other.tasks]
        if alone:
            raise _not_comparable(a, b, f"there are scores of {', '.join(alone)} in {one.path} alone")
    rows, accuracy_means, f1_means = [], [], []
    for name, pairs in paired_answers(a, b, a.scored).items():
        accuracy, means = _change(name, [(x.correct, y.correct) for x, y in pairs], seed, resamples)
        f1 = None
        accuracy_means.append(means)
        if all(answer.f1 is not None for pair in pairs for answer in pair):
            f1, means = _change(name, [(x.f1, y.f1) for x, y in pairs], seed, resamples)
            f1_means.append(means)
        only_a = sum(x.correct and not y.correct for x, y in pairs)
        only_b = sum(y.correct and not x.correct for x, y in pairs)
        rows.append(ComparedTask(name, len(pairs), accuracy, only_a, only_b, mcnemar_p(only_a, only_b), f1))
    only_a, only_b = sum(row.only_a for row in rows), sum(row.only_b for row in rows)
    average = ComparedTask(
        task=None,
        n=sum(row.n for row in rows),
        accuracy=_average([row.accuracy for row in rows], accuracy_means),
        only_a=only_a,
        only_b=only_b,
        p=mcnemar_p(only_a, only_b),
        f1=_average([row.f1 for row in rows], f1_means) if all(row.f1 for row in rows) else None,
    )
    return Comparison(a, b, tuple(rows), average, seed, resamples, tuple(_notes(a, b, rows, seed, resamples)))


def _change(task: str, pairs: Sequence[tuple[float, float]], seed: int, resamples: int):
    """(change of the mean score over pairs, bootstrap means of B - A)."""
    means = task_means(task, [float(y) - float(x) for x, y in pairs], seed, resamples)
    a, b = (math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True))
    return Change(a, b, *percentile_interval(means)), means


def _average(changes: Sequence[Change], means: Sequence) -> Change:
    """The unweighted mean over tasks; questions were resampled within each task (a stratified bootstrap)."""
    count = len(changes)
    a, b = math.fsum(change.a for change in changes) / count, math.fsum(change.b for change in changes) / count
    return Change(a, b, *percentile_interval(sum(means) / count))


def _notes(a: Results, b: Results, rows: Sequence[ComparedTask], seed: int, resamples: int) -> list[str]:
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
    partly = [row.task for row in rows if row.f1 is None]
    if partly and len(partly) < len(rows):
        notes.append(f"No F1 for {', '.join(partly)}, nor on average: not every prediction has one.")
    if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes


# ---- as text ----


def markdown(comparison: Comparison) -> str:
    """A padded pipe table (percent, one decimal), a line a task and one for their average, and the notes as a list."""
    rows = [*comparison.rows, comparison.average]
    with_f1 = any(row.f1 for row in rows)
    interval = f"{100 * CONFIDENCE:.0f} % interval"
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if with_f1 else []
    lines = []
    for row in rows:
        title = markdown_text(comparison.a.task_set.title(row.task)) if row.task else "Average"
        line = [title, f"{row.n:,}", *_change_texts(row.accuracy), f"{row.only_a:,}", f"{row.only_b:,}", p_text(row.p)]
        lines.append([*line, *(_change_texts(row.f1) if with_f1 else [])])
    notes = "\n".join(f"- {markdown_text(note)}" for note in comparison.notes)
    return f"{markdown_table(header, lines)}\n\n{notes}\n"


def _change_texts(change: Change | None) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    interval = f"{percent(change.low, signed=True)} to {percent(change.high, signed=True)}"
    return [percent(change.a), percent(change.b), percent(change.difference, signed=True), interval]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def csv_text(comparison: Comparison) -> str:
    """Fractions with every digit: one line a task, then the average, whose task is empty."""
    lines = []
    for row in (*comparison.rows, comparison.average):
        line = {"task": row.task, "n": row.n, **{f"accuracy {key}": getattr(row.accuracy, key) for key in CHANGE_KEYS}}
        line |= {"only_a": row.only_a, "only_b": row.only_b, "p": row.p}
        lines.append(line | {f"f1 {key}": getattr(row.f1, key, None) for key in CHANGE_KEYS})
    return csv_table(lines)


def json_text(comparison: Comparison) -> str:
    """One object: the two runs, a record a task, the average, and how the intervals were drawn."""
    runs = {"a": comparison.a, "b": comparison.b}
    value = {
        side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
        for side, run in runs.items()
    } | {
        "tasks": {row.task: _record(row) for row in comparison.rows},
        "average": _record(comparison.average),
        "confidence": CONFIDENCE,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "notes": list(comparison.notes),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _record(row: ComparedTask) -> dict:
    scores = {
        name: change and {key: getattr(change, key) for key in CHANGE_KEYS}
        for name, change in (("accuracy", row.accuracy), ("f1", row.f1))
    }
    counts = {"only_a": row.only_a, "only_b": row.only_b, "p": row.p}
    return {"n": row.n, "accuracy": scores["accuracy"], **counts, "f1": scores["f1"]}


RENDERERS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "csv": csv_text, "json": json_text}
