"""By how much two runs on the same questions differ: task by task, and on average."""

import collections
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.predictions import Prediction, paired_answers
from mtl_lora.report.load import CONFIDENCE, LEVEL, Difference
from mtl_lora.report.table import AVERAGE, NOTHING, Report, TextTable, interval_text, percent
from mtl_lora.results import Results

if TYPE_CHECKING:
    import numpy

RESAMPLES, SEED = 10_000, 0
CHANGE_KEYS = ("a", "b", "difference", "low", "high")
# Numbers drawn at a time: 32 MiB of counts, however many resamples and distinct differences there are.
_DRAWN_AT_ONCE = 2**22


# ---- statistics ----


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (Psychometrika 12, 1947) from the counts of discordant pairs.

    min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n) with b = ``only_a``, c = ``only_b``, n = b + c. It is 1 without
    discordant pairs and never 0: the smallest float stands for all below it.
    """
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


def percentile_interval(means: "numpy.ndarray") -> tuple[float, float]:
    """The middle ``CONFIDENCE`` of bootstrap means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""
    import numpy

    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def intervals(
    pairs: Sequence[dict[str, Sequence[float]]], scored: Sequence[str], seed: int = SEED, resamples: int = RESAMPLES
) -> dict | None:
    """Differences averaged over ``pairs`` of runs, each by task and question, with their percentile intervals.

    A bootstrap over the questions within each task (stratified; every task weighs the same), from a stream of the
    task's own: other tasks do not change it. Returns ``tasks`` and ``average``, which is None unless all of ``scored``
    are there; None if no task is in all pairs. Differences that are all equal have no interval: see ``Interval``.
    """
    tasks, means = {}, {}
    for name in [name for name in (pairs[0] if pairs else ()) if all(name in pair for pair in pairs)]:
        values = [statistics.fmean(each) for each in zip(*(pair[name] for pair in pairs), strict=True)]
        means[name] = bootstrap_means(values, [seed, *name.encode()], resamples)
        tasks[name] = Difference(statistics.fmean(values), *percentile_interval(means[name]))
    if not {*scored} <= {*tasks}:
        return {"tasks": tasks, "average": None} if tasks else None
    center = statistics.fmean(tasks[name].difference for name in scored)
    interval = percentile_interval(sum(means[name] for name in scored) / len(scored))
    return {"tasks": tasks, "average": Difference(center, *interval)}


# ---- the report ----


def compare(a: Results, b: Results, seed: int = SEED, resamples: int = RESAMPLES, tasks: Sequence[str] = ()) -> Report:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples. tasks: empty for all that
    both scored; a note names the others.

    The report's value has ``tasks`` in column order, and their ``average``: n questions, ``accuracy`` (mean score of A
    and of B, ``difference`` B - A, its ``low`` and ``high``), the numbers ``only_a`` and ``only_b`` of questions that
    one alone answered right, p, and ``f1`` or None. Raises ``UserError`` saying what differs where the two are not
    comparable, and for broken predictions.
    """
    common = [name for name in a.scored if name in b.tasks]
    if (lacking := [name for name in tasks if name not in common]) or not common:
        asked = f", and none of {', '.join(lacking)}" if lacking else ""
        raise UserError(f"{a.path} and {b.path} both have scores of {', '.join(common) or 'no task'}{asked}")
    answers = paired_answers(a, b, [name for name in common if not tasks or name in tasks])
    accuracies, f1s = (_changes(answers, key, seed, resamples) for key in ("correct", "f1"))
    rows = {}
    for task in (*answers, None):  # None: the average, whose counts pool the questions of all tasks
        pairs = answers[task] if task else [*itertools.chain(*answers.values())]
        only_a, only_b = (sum(pair[i].correct > pair[1 - i].correct for pair in pairs) for i in (0, 1))
        counts = {"only_a": only_a, "only_b": only_b, "p": mcnemar_p(only_a, only_b)}
        rows[task] = {"n": len(pairs), "accuracy": accuracies[task], **counts, "f1": f1s.get(task)}

    interval, lines, records = f"{LEVEL} interval", [], []
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if f1s else []
    for task, row in rows.items():
        title = a.task_set.title(task) if task else AVERAGE
        counts = [f"{row['only_a']:,}", f"{row['only_b']:,}", p_text(row["p"])]
        lines.append([title, f"{row['n']:,}", *_texts(row["accuracy"]), *counts, *(_texts(row["f1"]) if f1s else [])])
        records.append({"task": task})
        for key, value in row.items():
            is_change = key in ("accuracy", "f1")
            parts = {f"{key} {part}": (value or {}).get(part) for part in CHANGE_KEYS} if is_change else {key: value}
            records[-1] |= parts
    notes = _notes(a, b, len(answers), [name for name in answers if name not in f1s], seed, resamples)
    if left_out := [a.task_set.title(name) for name in {**a.tasks, **b.tasks} if name not in answers]:
        notes.append(f"Left out: {', '.join(left_out)}.")
    if equal := [a.task_set.title(name) for name in answers if accuracies[name]["low"] is None]:
        notes.append(f"No interval for {', '.join(equal)}: all differences are equal, so resampling shows no spread.")
    value = {
        side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
        for side, run in (("a", a), ("b", b))
    }
    value |= {"tasks": {name: rows[name] for name in answers}, "average": rows[None]}
    value |= {"confidence": CONFIDENCE, "resamples": resamples, "seed": seed, "notes": notes}
    return Report([TextTable("", header, lines)], records, notes, value)


def _changes(
    answers: dict[str, list[tuple[Prediction, Prediction]]], key: str, seed: int, resamples: int
) -> dict[str | None, dict]:
    """By task, and of their average (None): the mean score ``key`` of A and of B, the difference and its interval.

    A task of which an answer has no such score is left out, and the average with it.
    """
    scores = {
        task: [(float(getattr(first, key)), float(getattr(last, key))) for first, last in pairs]
        for task, pairs in answers.items()
        if all(getattr(each, key) is not None for pair in pairs for each in pair)
    }
    differences = {task: [y - x for x, y in pairs] for task, pairs in scores.items()}
    found = intervals([differences], list(answers), seed, resamples) or {"tasks": {}, "average": None}
    means = {task: [statistics.fmean(side) for side in zip(*pairs, strict=True)] for task, pairs in scores.items()}
    if found["average"]:
        means[None] = [statistics.fmean(side) for side in zip(*means.values(), strict=True)]
    changes = found["tasks"] | {None: found["average"]}
    return {task: {"a": a, "b": b, **vars(changes[task])} for task, (a, b) in means.items()}


def _texts(change: dict | None) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    a, b, *difference = change.values()
    signed = percent(difference[0], signed=True)
    return [percent(a), percent(b), signed, interval_text(Difference(*difference), signed=True)]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def _notes(a: Results, b: Results, compared: int, without_f1: Sequence[str], seed: int, resamples: int) -> list[str]:
    """What the numbers are, and what differs between the runs besides what is compared."""
    notes = [
        f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in percentage points.",
        f"Interval: {LEVEL} percentile interval of a paired bootstrap, {resamples:,} resamples of the "
        f"questions within each task, seed {seed}.",
        "p: exact two-sided McNemar test of the questions that only A answers right against those that only B does; "
        "not corrected for the number of tasks.",
        "Average: every task weighs the same in the scores, every question in p, which pools the questions of all "
        "tasks.",
    ]
    if 0 < len(without_f1) < compared:
        notes.append(f"No F1 for {', '.join(without_f1)}, nor on average: not every prediction has one.")
    if a.settings["base_fingerprint"] != b.settings["base_fingerprint"]:
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes
