"""By how much two runs on the same questions differ: task by task, and on average."""

import itertools
import statistics
from collections.abc import Sequence

from mtl_lora.errors import UserError
from mtl_lora.estimates import CONFIDENCE, LEVEL, RESAMPLES, SEED, Difference, intervals, mcnemar_p
from mtl_lora.predictions import Prediction, paired_answers
from mtl_lora.report.table import AVERAGE, NOTHING, Report, TextTable, interval_text, percent
from mtl_lora.results import Results

CHANGE_KEYS = ("a", "b", "difference", "low", "high")


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
        changes = {f"{key} {part}": (row[key] or {}).get(part) for key in ("accuracy", "f1") for part in CHANGE_KEYS}
        records.append({"task": task, **{key: row[key] for key in ("n", "only_a", "only_b", "p")}, **changes})
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
