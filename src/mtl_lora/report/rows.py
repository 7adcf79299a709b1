"""Rows of a results table: from results files, from published figures, and the difference of two rows."""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.report.results import Results, Score, Trainable, mean_score

PUBLISHED_FILE = Path(__file__).with_name("published_commonsense.json")
MAJORITY_LABEL = "always the most frequent answer"
DIFFERENCE_LABEL = "difference"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table: a fraction, its standard error and the number of questions where they are known."""

    accuracy: float
    stderr: float | None = None
    n: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: cells by task name (a missing task has none), their average, and averages by group of questions.

    kind: ``result``, ``majority``, ``published`` or ``difference``. source: the file that a row was read from, for
    published rows alone.
    """

    label: str
    kind: str
    cells: dict[str, Cell]
    average: Cell | None
    groups: dict[str, Cell] = dataclasses.field(default_factory=dict)
    trainable: Trainable | None = None
    method: str = ""
    base_model: str = ""
    mode: str = ""
    source: str = ""


def result_row(results: Results) -> Row:
    """The row of one results file; without an average unless every task of the set has a score."""
    average, groups = None, {}
    if not results.missing:
        average = _cell(results.average or mean_score(list(results.tasks.values())))
        groups = _group_cells(results)
    return Row(
        label=results.name,
        kind="result",
        cells={name: _cell(score) for name, score in results.tasks.items()},
        average=average,
        groups=groups,
        trainable=results.trainable,
        method=results.method or "",
        base_model=results.base_model or "",
        mode=results.mode or "",
    )


def _group_cells(results: Results) -> dict[str, Cell]:
    """Average per group: the file's own, else the mean over the tasks that have the group."""
    by_group = collections.defaultdict(list)
    for name in results.task_set.columns:
        for group, score in results.tasks[name].groups.items():
            by_group[group].append(score)
    cells = {group: _cell(mean_score(scores)) for group, scores in by_group.items()}
    for group, score in (results.average.groups if results.average else {}).items():
        stderr = score.stderr
        if stderr is None and group in cells:
            stderr = cells[group].stderr
        cells[group] = Cell(score.accuracy, stderr)
    return cells


def majority_row(results: Results) -> Row | None:
    """What always giving a task's most frequent answer scores; None unless the file has it for all of its tasks."""
    if any(score.majority is None for score in results.tasks.values()):
        return None
    scores = {name: Score(score.majority, None, score.n) for name, score in results.tasks.items()}
    average = None if results.missing else _cell(mean_score(list(scores.values())))
    return Row(MAJORITY_LABEL, "majority", {name: _cell(score) for name, score in scores.items()}, average)


def difference_row(first: Row, last: Row) -> Row:
    """Last minus first, cell by cell where both have one; standard errors add as those of independent samples."""
    return Row(
        label=DIFFERENCE_LABEL,
        kind="difference",
        cells=_differences(first.cells, last.cells),
        average=_difference(first.average, last.average) if first.average and last.average else None,
        groups=_differences(first.groups, last.groups),
    )


def _differences(first: dict[str, Cell], last: dict[str, Cell]) -> dict[str, Cell]:
    return {key: _difference(cell, last[key]) for key, cell in first.items() if key in last}


def _difference(first: Cell, last: Cell) -> Cell:
    stderr = None
    if first.stderr is not None and last.stderr is not None:
        stderr = math.hypot(first.stderr, last.stderr)
    return Cell(last.accuracy - first.accuracy, stderr)


def published_rows() -> list[Row]:
    """The published figures that the package carries, as fractions, with averages as their sources print them."""
    published = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    labels = _published_labels(published["rows"])
    return [
        Row(
            label=label,
            kind="published",
            cells={task: Cell(score / 100) for task, score in zip(published["tasks"], row["scores"], strict=True)},
            average=Cell(row["average"] / 100),
            method=row["method"],
            base_model=row["model"],
            source=row["source"],
        )
        for label, row in zip(labels, published["rows"], strict=True)
    ]


def _published_labels(rows: Sequence[dict]) -> list[str]:
    """``LLaMA2-7B LoRA r 32 (published)``; the repository is named where two sources have the same row."""
    settings = [f"{row['model']} {row['method']} r {row['r']}" for row in rows]
    repeated = {setting for setting, count in collections.Counter(settings).items() if count > 1}
    labels = []
    for setting, row in zip(settings, rows, strict=True):
        repository = row["source"].split()[0]
        labels.append(f"{setting} (published, {repository})" if setting in repeated else f"{setting} (published)")
    return labels


def _cell(score: Score) -> Cell:
    return Cell(score.accuracy, score.stderr, score.n)
