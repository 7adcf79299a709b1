"""By how much two runs on the same questions differ: task by task, and on average."""

import itertools
import statistics
from collections.abc import Sequence

from mtl_lora.errors import UserError
from mtl_lora.estimates import CONFIDENCE, LEVEL, RESAMPLES, SEED, Difference, intervals, mcnemar_p
from mtl_lora.metrics import METRICS, Metric, scale_of
from mtl_lora.predictions import paired_answers
from mtl_lora.report.table import AVERAGE, NOTHING, Report, TextTable, interval_text, units_text, value_text
from mtl_lora.results import Results

CHANGE_KEYS = ("a", "b", "difference", "low", "high")


def compare(a: Results, b: Results, seed: int = SEED, resamples: int = RESAMPLES, tasks: Sequence[str] = ()) -> Report:
    """B against A, from their predictions; intervals are of ``resamples`` seeded resamples. tasks: empty for all that
    both scored; a note names the others.

    The report's value has ``tasks`` in column order, and their ``average`` (None where they have no unit in common): n
    questions, the ``metric`` (of the average None), ``value`` (of A and of B, ``difference`` B - A, its ``low`` and
    ``high``), the numbers ``only_a`` and ``only_b`` of questions that one alone answered right and p (None of numbers),
    and ``f1`` of free text or None.
    Raises ``UserError`` saying what differs where the two are not comparable, and for broken predictions.
    """
    common = [name for name in a.scored if name in b.tasks]
    if (lacking := [name for name in tasks if name not in common]) or not common:
        asked = f", and none of {', '.join(lacking)}" if lacking else ""
        raise UserError(f"{a.path} and {b.path} both have scores of {', '.join(common) or 'no task'}{asked}")
    paired = paired_answers(a, b, [name for name in common if not tasks or name in tasks])
    answers, metrics = ({task: getattr(each, key) for task, each in paired.items()} for key in ("answers", "metric"))
    measured = {task: (METRICS[each.metric], each.rows) for task, each in paired.items()}
    written = {
        task: (METRICS["f1"], [[each.f1 for each in side] for side in zip(*pairs, strict=True)])
        for task, pairs in answers.items()
        if metrics[task] != "f1" and all(each.f1 is not None for pair in pairs for each in pair)
    }
    shared = next(iter(metrics.values()))  # of the average, which is of one unit
    values, f1s = (_changes(found, list(answers), seed, resamples) for found in (measured, written))
    rows = {}
    for task in values:  # None, the last: the average, whose counts pool the questions of all tasks
        pairs = answers[task] if task else [*itertools.chain(*answers.values())]
        judged = [pair for pair in pairs if None not in (pair[0].correct, pair[1].correct)]
        only_a, only_b = (sum(pair[i].correct > pair[1 - i].correct for pair in judged) for i in (0, 1))
        counts = {"only_a": only_a, "only_b": only_b, "p": mcnemar_p(only_a, only_b)}
        counts = counts if judged else dict.fromkeys(counts)
        rows[task] = {"n": len(pairs), "metric": metrics.get(task), "value": values[task], **counts}
        rows[task]["f1"] = f1s.get(task)

    interval, lines, records = f"{LEVEL} interval", [], []
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if f1s else []
    for task, row in rows.items():
        title = a.task_set.title(task, metrics[task]) if task else AVERAGE
        counts = [f"{row['only_a']:,}", f"{row['only_b']:,}", p_text(row["p"])] if row["p"] else [NOTHING] * 3
        lines.append([title, f"{row['n']:,}", *_texts(row["value"], row["metric"] or shared), *counts])
        lines[-1] += _texts(row["f1"], "f1") if f1s else []
        changes = {f"{key} {part}": (row[key] or {}).get(part) for key in ("value", "f1") for part in CHANGE_KEYS}
        facts = {key: row[key] for key in ("n", "metric", "only_a", "only_b", "p")}
        records.append({"task": task, **facts, **changes})
    percentages, judged = (
        all(scale_of(metric) == 100 for metric in metrics.values()),
        any(row["p"] for row in rows.values()),
    )
    notes = _notes(a, b, seed, resamples, percentages, judged, None in rows)
    if {*metrics.values()} != {"accuracy"}:
        notes.append(f"Scores: {units_text(metrics.values()).removesuffix('; ')}.")
    if f1s and (without := [name for name in answers if name not in f1s]):
        notes.append(f"No F1 for {', '.join(without)}, nor on average: not every prediction has one.")
    if left_out := [a.task_set.title(name) for name in {**a.tasks, **b.tasks} if name not in answers]:
        notes.append(f"Left out: {', '.join(left_out)}.")
    if equal := [a.task_set.title(name) for name in answers if values[name]["low"] is None]:
        notes.append(f"No interval for {', '.join(equal)}: all differences are equal, so resampling shows no spread.")
    value = {
        side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
        for side, run in (("a", a), ("b", b))
    }
    value |= {"tasks": {name: rows[name] for name in answers}, "average": rows.get(None)}
    value |= {"confidence": CONFIDENCE, "resamples": resamples, "seed": seed, "notes": notes}
    return Report([TextTable("", header, lines)], records, notes, value)


def _changes(
    measured: dict[str, tuple[Metric, Sequence]], tasks: Sequence[str], seed: int, resamples: int
) -> dict[str | None, dict]:
    """By task, and of their average (None) where all ``tasks`` are measured: the value of A and of B, the difference
    and its interval. measured: by task the metric and its rows of A and of B."""
    differences = {
        task: metric.difference([rows], [seed, *task.encode()], resamples) for task, (metric, rows) in measured.items()
    }
    values = {task: [metric.value_of(side) for side in rows] for task, (metric, rows) in measured.items()}
    # One mean of all tasks takes one unit.
    units = {(metric.scale, metric.title * (metric.scale != 100)) for metric, _ in measured.values()}
    found = intervals(differences, tasks if len(units) == 1 else ()) or {"tasks": {}, "average": None}
    if found["average"]:
        values[None] = [statistics.fmean(side) for side in zip(*values.values(), strict=True)]
    changes = found["tasks"] | {None: found["average"]}
    return {task: {"a": a, "b": b, **vars(changes[task])} for task, (a, b) in values.items()}


def _texts(change: dict | None, metric: str) -> list[str]:
    if change is None:
        return [NOTHING] * 4
    a, b, *difference = change.values()
    found = [value_text(a, None, metric), value_text(b, None, metric), value_text(difference[0], None, metric, True)]
    return [*found, interval_text(Difference(*difference), metric, signed=True)]


def p_text(p: float) -> str:
    """Four decimals, or ``<0.0001``."""
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def _notes(
    a: Results, b: Results, seed: int, resamples: int, percentages: bool, judged: bool, averaged: bool
) -> list[str]:
    """What the numbers are, and what differs between the runs besides what is compared.

    percentages, judged, averaged: whether all scores are in percent, any has a p, and they have an average.
    """
    points = "percentage points" if percentages else "percentage points, of scores in another unit in that unit"
    notes = [
        f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in {points}.",
        f"Interval: {LEVEL} percentile interval of a paired bootstrap, {resamples:,} resamples of the "
        f"questions within each task, seed {seed}.",
    ]
    if judged:
        notes.append(
            "p: exact two-sided McNemar test of the questions that only A answers right against those that only B "
            "does; not corrected for the number of tasks."
        )
    if averaged:
        notes.append(
            "Average: every task weighs the same in the scores"
            + (", every question that is right or wrong in p, which pools those of all tasks." if judged else ".")
        )
    if a.settings.get("base_fingerprint") != b.settings.get("base_fingerprint"):
        notes.append(f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.")
    if a.settings.get("dtype") != b.settings.get("dtype"):
        notes.append(f"The dtypes differ: A {a.settings.get('dtype')}, B {b.settings.get('dtype')}.")
    return notes
