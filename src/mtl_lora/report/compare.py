"""Comparison of two runs on the same questions: their difference by task and on average."""

import statistics
from collections.abc import Sequence

from mtl_lora.estimates import CONFIDENCE, LEVEL, RESAMPLES, SEED, Difference, mcnemar_p
from mtl_lora.metrics import METRICS, NOTHING, interval_text, p_text, scale_of, units_text, value_text
from mtl_lora.predictions import Prediction, differences, paired_answers, shared_tasks
from mtl_lora.report.table import AVERAGE
from mtl_lora.results import Results
from mtl_lora.text_table import Report, TextTable


def compare(a: Results, b: Results, seed: int = SEED, resamples: int = RESAMPLES, tasks: Sequence[str] = ()) -> Report:
    """Compare B with A by their predictions; intervals come from ``resamples`` seeded bootstrap resamples.

    tasks: the tasks to compare; empty: all that both scored. A note names the tasks that are left out.
    The report's value has ``tasks`` in column order and their ``average`` (None if they have no common unit). Each has:
    ``n`` questions, the ``metric`` (None for the average), ``value`` (``a``, ``b``, the ``difference`` B - A, its
    ``low`` and ``high``), the numbers ``only_a`` and ``only_b`` of questions that only one of them answered right with
    McNemar's ``p`` (None where answers are not right or wrong), and ``f1`` of free text, like ``value``, or None.
    Raises ``UserError`` naming the difference if the two are not comparable, and for broken predictions.
    """
    paired = paired_answers(a, b, shared_tasks(a, b, tasks))
    measured = {task: (each.metric, each.rows) for task, each in paired.items()}
    written = {task: ("f1", each.f1s) for task, each in paired.items() if each.f1s and each.metric != "f1"}
    values, f1s = (_changes(found, [*paired], seed, resamples) for found in (measured, written))
    rows, lines, records = {}, [], []
    for task, value in values.items():  # the last key, None, is the average; its counts pool the questions of all tasks
        pairs = paired[task].answers if task else [pair for each in paired.values() for pair in each.answers]
        row = {"n": len(pairs), "metric": paired[task].metric if task else None, "value": value}
        rows[task] = row = row | _one_sided(pairs) | {"f1": f1s.get(task)}
        metric = row["metric"] or next(iter(paired.values())).metric  # there is an average only if all have one unit
        title = a.task_set.title(task, metric) if task else AVERAGE
        counts = (
            [f"{row['only_a']:,}", f"{row['only_b']:,}", p_text(row["p"])] if row["p"] is not None else [NOTHING] * 3
        )
        f1_texts = _texts(row["f1"], "f1") if f1s else []
        lines.append([title, f"{len(pairs):,}", *_texts(value, metric), *counts, *f1_texts])
        record = {"task": task} | {key: row[key] for key in ("n", "metric", "only_a", "only_b", "p")}
        record |= {f"value {part}": number for part, number in value.items()}
        records.append(record | {f"f1 {part}": number for part, number in (row["f1"] or dict.fromkeys(value)).items()})
    header = ["Task", "Questions", "A", "B", "B - A", f"{LEVEL} interval", "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {LEVEL} interval"] if f1s else []
    notes = _notes(a, b, rows, seed, resamples)
    value = {
        side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
        for side, run in (("a", a), ("b", b))
    }
    value |= {"tasks": {name: rows[name] for name in paired}, "average": rows.get(None)}
    value |= {"confidence": CONFIDENCE, "resamples": resamples, "seed": seed, "notes": notes}
    return Report([TextTable("", header, lines)], records, notes, value)


def _one_sided(pairs: Sequence[tuple[Prediction, Prediction]]) -> dict:
    """The numbers of questions that only one answered right, and McNemar's p; None if no answer is right or wrong."""
    judged = [(a.correct, b.correct) for a, b in pairs if None not in (a.correct, b.correct)]
    if not judged:
        return {"only_a": None, "only_b": None, "p": None}
    only_a, only_b = judged.count((True, False)), judged.count((False, True))
    return {"only_a": only_a, "only_b": only_b, "p": mcnemar_p(only_a, only_b)}


def _changes(measured: dict[str, tuple], tasks: Sequence[str], seed: int, resamples: int) -> dict[str | None, dict]:
    """Return the values of A and B, their difference and its interval by task, and under None for the average.

    measured: by task, the metric and its rows of A and of B. There is an average only if it has all ``tasks``.
    """
    pairs = {task: (metric, [rows]) for task, (metric, rows) in measured.items()}
    found = differences(pairs, tasks, seed, resamples) or {"tasks": {}, "average": None}
    values = {task: [METRICS[metric].value_of(side) for side in rows] for task, (metric, rows) in measured.items()}
    if found["average"]:
        values[None] = [statistics.fmean(side) for side in zip(*values.values(), strict=True)]
    changes = found["tasks"] | {None: found["average"]}
    return {task: {"a": a, "b": b, **vars(changes[task])} for task, (a, b) in values.items()}


def _texts(change: dict | None, metric: str) -> list[str]:
    a, b, *difference = change.values() if change else [None] * 5
    found = [value_text(a, None, metric), value_text(b, None, metric), value_text(difference[0], None, metric, True)]
    return [*found, interval_text(Difference(*difference), metric, signed=True)]


def _notes(a: Results, b: Results, rows: dict[str | None, dict], seed: int, resamples: int) -> list[str]:
    """Say what the numbers are, and what else differs between the runs. rows: by task, and under None the average."""
    tasks, title = {task: row for task, row in rows.items() if task}, a.task_set.title
    metrics, judged = {row["metric"] for row in tasks.values()}, any(row["p"] for row in rows.values())
    points = ", or in the unit of the score where that is another" * any(scale_of(metric) != 100 for metric in metrics)
    pooled = "; p pools the questions of all tasks that are right or wrong" * judged
    no_f1 = [name for name, row in tasks.items() if row["f1"] is None and row["metric"] != "f1"]
    left_out = [title(name) for name in {**a.tasks, **b.tasks} if name not in tasks]
    equal = [title(name) for name, row in tasks.items() if row["value"]["low"] is None]
    (base_a, dtype_a), (base_b, dtype_b) = (map(run.settings.get, ("base_fingerprint", "dtype")) for run in (a, b))
    notes = {
        f"A: {a.name} ({a.path.parent}). B: {b.name} ({b.path.parent}). B - A in percentage points{points}.": True,
        f"Interval: {LEVEL} percentile interval of a paired bootstrap, {resamples:,} resamples of the "
        f"questions within each task, seed {seed}.": True,
        "p: exact two-sided McNemar test of the questions that only A answers right against those that only B "
        "answers right; not corrected for the number of tasks.": judged,
        f"Average: every task weighs the same in the scores{pooled}.": None in rows,
        f"The base models differ: A {a.base_model or 'unknown'}, B {b.base_model or 'unknown'}.": base_a != base_b,
        f"The dtypes differ: A {dtype_a}, B {dtype_b}.": dtype_a != dtype_b,
        f"Scores: {units_text(metrics).removesuffix('; ')}.": metrics != {"accuracy"},
        f"No F1 for {', '.join(no_f1)}, nor on average: not every prediction has one.": 0 < len(no_f1) < len(tasks),
        f"Left out: {', '.join(left_out)}.": left_out,
        **{f"{side}: {note}": True for side, each in (("A", a), ("B", b)) for note in each.untrained_notes},
        f"No interval for {', '.join(equal)}: all differences are equal, so resampling shows no spread.": equal,
    }
    return [note for note, holds in notes.items() if holds]
