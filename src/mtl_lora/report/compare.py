"""By how much two runs on the same questions differ: task by task, and on average."""

import dataclasses
import math
from collections.abc import Sequence

from mtl_lora.language.tasks import Task
from mtl_lora.report.comparable import check_comparable, check_same_questions
from mtl_lora.report.paired import CONFIDENCE, bootstrap_means, mcnemar_p, percentile_interval
from mtl_lora.report.predictions import Prediction, read_predictions
from mtl_lora.report.results import Results


@dataclasses.dataclass(frozen=True)
class Change:
    """A mean score (a fraction) of A and of B, and the interval of B - A."""

    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """B - A, a fraction."""
        return self.b - self.a


@dataclasses.dataclass(frozen=True)
class Row:
    """One task, or all: n questions, of which ``only_a`` (``only_b``) are answered right by A (by B) alone."""

    task: Task | None
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
    rows: tuple[Row, ...]
    average: Row
    seed: int
    resamples: int
    notes: tuple[str, ...]


def compare(a: Results, b: Results, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples.

    Raises ``UserError`` saying what differs where the two are not comparable, and for broken predictions.
    """
    check_comparable(a, b)
    answers_a, answers_b = read_predictions(a), read_predictions(b)
    rows, accuracy_means, f1_means = [], [], []
    for name in (name for name in a.task_set.columns if name in a.tasks):
        check_same_questions(a, b, name, answers_a[name], answers_b[name])
        pairs = [(answer, answers_b[name][index]) for index, answer in sorted(answers_a[name].items())]
        row, of_accuracy, of_f1 = _compare_task(a.task_set[name], pairs, seed, resamples)
        rows.append(row)
        accuracy_means.append(of_accuracy)
        f1_means.append(of_f1)
    only_a, only_b = sum(row.only_a for row in rows), sum(row.only_b for row in rows)
    average = Row(
        task=None,
        n=sum(row.n for row in rows),
        accuracy=_average([row.accuracy for row in rows], accuracy_means),
        only_a=only_a,
        only_b=only_b,
        p=mcnemar_p(only_a, only_b),
        f1=_average([row.f1 for row in rows], f1_means) if all(row.f1 for row in rows) else None,
    )
    return Comparison(a, b, tuple(rows), average, seed, resamples, tuple(_notes(a, b, rows, seed, resamples)))


def _compare_task(task: Task, pairs: Sequence[tuple[Prediction, Prediction]], seed: int, resamples: int):
    """(row, bootstrap means of the accuracy's B - A, those of F1's or None) of one task's pairs of answers."""
    # A stream a task, so that a task's interval does not depend on which others are there.
    stream = [seed, *task.name.encode()]
    accuracy, accuracy_means = _change([(x.correct, y.correct) for x, y in pairs], stream, resamples)
    f1 = f1_means = None
    if all(answer.f1 is not None for pair in pairs for answer in pair):
        f1, f1_means = _change([(x.f1, y.f1) for x, y in pairs], stream, resamples)
    only_a = sum(x.correct and not y.correct for x, y in pairs)
    only_b = sum(y.correct and not x.correct for x, y in pairs)
    row = Row(task, len(pairs), accuracy, only_a, only_b, mcnemar_p(only_a, only_b), f1)
    return row, accuracy_means, f1_means


def _change(pairs: Sequence[tuple[float, float]], stream: Sequence[int], resamples: int):
    """(change of the mean score over pairs, bootstrap means of B - A)."""
    means = bootstrap_means([float(y) - float(x) for x, y in pairs], stream, resamples)
    a, b = (math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True))
    return Change(a, b, *percentile_interval(means)), means


def _average(changes: Sequence[Change], means: Sequence) -> Change:
    """The unweighted mean over tasks; questions were resampled within each task (a stratified bootstrap)."""
    count = len(changes)
    a, b = math.fsum(change.a for change in changes) / count, math.fsum(change.b for change in changes) / count
    return Change(a, b, *percentile_interval(sum(means) / count))


def _notes(a: Results, b: Results, rows: Sequence[Row], seed: int, resamples: int) -> list[str]:
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
    partly = [row.task.name for row in rows if row.f1 is None]
    if partly and len(partly) < len(rows):
        notes.append(f"No F1 for {', '.join(partly)}, nor on average: not every prediction has one.")
    if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes
