"""A study's numbers as the tables of a page: what a cell shows, and by what its column is sorted."""

import dataclasses
import math

from mtl_lora.report.render import NOTHING, percent, trainable_text
from mtl_lora.report.rows import MAJORITY_LABEL
from mtl_lora.report.study import OVER_QUESTIONS, OVER_SEEDS, Experiment, Scores, Study, Value

NO_BREAK = "\u00a0"  # a space at which no line is broken


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is shown, and the number or text that a column is sorted by; None stands last."""

    text: str
    key: float | str | None = None


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table of a page. name: its id. numbers: whether a column holds numbers, by column. notes: below it."""

    name: str
    title: str
    headings: tuple[str, ...]
    numbers: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def text_cell(text: object) -> Cell:
    """Shown and sorted as text; a dash for nothing."""
    return Cell(NOTHING) if text in (None, "") else Cell(str(text), str(text).lower())


def number_cell(number: float | None, text: str | None = None) -> Cell:
    """A number, shown as ``text`` or as it is; a dash for None."""
    return Cell(NOTHING) if number is None else Cell(f"{number:g}" if text is None else text, number)


def result_tables(study: Study) -> list[PageTable]:
    """Accuracy of all experiments by task, a table a group."""
    groups = [group for group in study.groups if any(e.scores.tasks for e in study.experiments if e.group == group)]
    return [_results(study, group, index, len(groups) > 1) for index, group in enumerate(groups)]


def _results(study: Study, group: str, index: int, named: bool) -> PageTable:
    experiments = [experiment for experiment in study.experiments if experiment.group == group]
    tasks = [name for name in study.scored if any(name in experiment.scores.tasks for experiment in experiments)]
    known = {
        "Trained weights, M (%)": lambda e: number_cell(
            e.trainable and e.trainable.adapter, trainable_text(e.trainable)
        ),
        "Rank": lambda e: number_cell(e.rank),
        "Learning rate": lambda e: number_cell(e.learning_rate),
    }
    columns = {name: cell for name, cell in known.items() if any(cell(e).key is not None for e in experiments)}
    kinds = {v.of for e in experiments for v in (*e.scores.tasks.values(), e.scores.average) if v}
    intervals = OVER_SEEDS in kinds
    headings = ["Experiment", *columns, *(study.title(task) for task in tasks), "Average"]
    headings += ["95 % interval of the average"] if intervals else []
    rows = [] if not study.majority else [_majority(study, tasks, len(columns), intervals)]
    for experiment in experiments:
        cells = [cell(experiment) for cell in columns.values()]
        values = [*(experiment.scores.tasks.get(task) for task in tasks), experiment.scores.average]
        scores = [accuracy_cell(value, intervals) for value in values]
        last = [_interval(experiment.scores.average)] if intervals else []
        rows.append((text_cell(experiment.name), *cells, *scores, *last))
    return PageTable(
        name="results" if index == 0 else f"results-{index + 1}",
        title=f"Accuracy, {group}" if named else "Accuracy",
        headings=tuple(headings),
        numbers=(False, *[True] * (len(headings) - 1)),
        rows=tuple(rows),
        notes=(_meaning(kinds),),
    )


def _meaning(kinds: set[str | None]) -> str:
    if OVER_SEEDS in kinds:
        return (
            "Accuracy in percent, mean ± standard deviation over seeds; a row without ± is a single run. Interval: "
            "95 % Student t interval of the mean over seeds."
        )
    return "Accuracy in percent" + ("; ± is one standard error over the questions." if OVER_QUESTIONS in kinds else ".")


def accuracy_cell(value: Value | None, seeds: bool) -> Cell:
    """``71.2 ± 0.8``: over seeds the standard deviation, else the questions' standard error where no row has seeds."""
    if value is None:
        return Cell(NOTHING)
    spread = value.sd if seeds else None
    if not seeds and value.of == OVER_QUESTIONS:
        spread = value.high - value.mean
    return Cell(with_error(value.mean, spread), value.mean)


def with_error(fraction: float, spread: float | None) -> str:
    """``71.2 ± 0.8``, in one piece where a line is broken; without the second part if there is none."""
    text = percent(fraction) + (f" ± {percent(spread)}" if spread is not None else "")
    return text.replace(" ", NO_BREAK)


def _interval(value: Value | None) -> Cell:
    if value is None or value.of != OVER_SEEDS:
        return Cell(NOTHING)
    return Cell(f"{percent(value.low)} to {percent(value.high)}", value.low)


def _majority(study: Study, tasks: list[str], empty: int, intervals: bool) -> tuple[Cell, ...]:
    values = [study.majority.get(task) for task in tasks]
    mean = None if None in values or len(values) < len(study.tasks) else math.fsum(values) / len(values)
    cells = [number_cell(value, None if value is None else percent(value)) for value in (*values, mean)]
    return (text_cell(MAJORITY_LABEL), *[Cell(NOTHING)] * empty, *cells, *[Cell(NOTHING)] * intervals)


def difference_tables(study: Study) -> list[PageTable]:
    """Every experiment against its baseline; and, where single tasks were trained, together minus alone."""
    found = []
    compared = [experiment for experiment in study.experiments if experiment.against]
    if compared:
        rows = [(_against_label(experiment), experiment.against) for experiment in compared]
        found.append(_differences(study, "against", "Differences from the baseline", rows))
    if study.transfer:
        rows = [(row.label if row.group in row.label else f"{row.group}: {row.label}", row) for row in study.transfer]
        found.append(_differences(study, "transfer", "Trained together, minus trained alone", rows))
    return found


def _against_label(experiment: Experiment) -> str:
    return f"{experiment.name} − {experiment.against.label}"


def _differences(study: Study, name: str, title: str, rows: list[tuple[str, Scores]]) -> PageTable:
    tasks = [task for task in study.tasks.columns if any(task in row.tasks for _, row in rows)]
    headings = ("Difference", *(study.title(task) for task in tasks), "Average")
    return PageTable(
        name=name,
        title=title,
        headings=headings,
        numbers=(False, *[True] * (len(headings) - 1)),
        rows=tuple(
            (text_cell(label), *(difference_cell(row.tasks.get(task)) for task in tasks), difference_cell(row.average))
            for label, row in rows
        ),
        notes=("Percentage points; in brackets the 95 % interval of the paired difference.",),
    )


def difference_cell(value: Value | None) -> Cell:
    """``+1.2 [-0.3, +2.7]``."""
    if value is None:
        return Cell(NOTHING)
    text = percent(value.mean, signed=True)
    if value.low is not None and value.high is not None:
        text += f" [{percent(value.low, signed=True)},{NO_BREAK}{percent(value.high, signed=True)}]"
    return Cell(text, value.mean)
