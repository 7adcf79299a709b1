"""A comparison as markdown for people (percent, one decimal), as CSV or JSON for programs (fractions, every digit)."""

import csv
import io
import json
from collections.abc import Callable

from mtl_lora.report.compare import Change, Comparison, Row
from mtl_lora.report.paired import CONFIDENCE
from mtl_lora.report.render import MARKDOWN, NOTHING, markdown_table, percent

AVERAGE = "Average"
CHANGE_KEYS = ("a", "b", "difference", "low", "high")


def markdown(comparison: Comparison) -> str:
    """A padded pipe table, a line a task and one for their average, and the notes as a list."""
    rows = [*comparison.rows, comparison.average]
    with_f1 = any(row.f1 for row in rows)
    interval = f"{100 * CONFIDENCE:.0f} % interval"
    header = ["Task", "Questions", "A", "B", "B - A", interval, "Only A right", "Only B right", "p"]
    header += ["F1 A", "F1 B", "F1 B - A", f"F1 {interval}"] if with_f1 else []
    lines = []
    for row in rows:
        title = MARKDOWN.text(row.task.title if row.task else AVERAGE)
        line = [title, f"{row.n:,}", *_change_texts(row.accuracy), f"{row.only_a:,}", f"{row.only_b:,}", p_text(row.p)]
        lines.append([*line, *(_change_texts(row.f1) if with_f1 else [])])
    notes = "\n".join(f"- {MARKDOWN.text(note)}" for note in comparison.notes)
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
    """One line a task, then the average, whose task is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    accuracy, f1 = ([f"{score} {key}" for key in CHANGE_KEYS] for score in ("accuracy", "f1"))
    writer.writerow(["task", "n", *accuracy, "only_a", "only_b", "p", *f1])
    for row in (*comparison.rows, comparison.average):
        line = [row.task.name if row.task else "", row.n, *_change_values(row.accuracy)]
        writer.writerow([*line, row.only_a, row.only_b, row.p, *_change_values(row.f1)])
    return buffer.getvalue()


def json_text(comparison: Comparison) -> str:
    """One object: the two runs, a record a task, the average, and how the intervals were drawn."""
    value = {
        **{
            side: {"name": run.name, "results": str(run.path), "base_model": run.base_model, "settings": run.settings}
            for side, run in (("a", comparison.a), ("b", comparison.b))
        },
        "tasks": {row.task.name: _record(row) for row in comparison.rows},
        "average": _record(comparison.average),
        "confidence": CONFIDENCE,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "notes": list(comparison.notes),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _record(row: Row) -> dict:
    accuracy = dict(zip(CHANGE_KEYS, _change_values(row.accuracy), strict=True))
    f1 = dict(zip(CHANGE_KEYS, _change_values(row.f1), strict=True)) if row.f1 else None
    return {"n": row.n, "accuracy": accuracy, "only_a": row.only_a, "only_b": row.only_b, "p": row.p, "f1": f1}


def _change_values(change: Change | None) -> list[float | None]:
    """The values of ``CHANGE_KEYS``."""
    if change is None:
        return [None] * len(CHANGE_KEYS)
    return [change.a, change.b, change.difference, change.low, change.high]


RENDERERS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "csv": csv_text, "json": json_text}
