"""The results table: one row a results file, one column a task, and the notes without which it can not be read."""

import dataclasses
from collections.abc import Sequence

from mtl_lora.errors import UserError
from mtl_lora.language.tasks import COMMONSENSE, Task
from mtl_lora.report.results import Results
from mtl_lora.report.rows import Row, difference_row, majority_row, published_rows, result_row

# Settings of an evaluation that rows must share to be compared, and what a note calls them.
_PROTOCOL = {
    "base_fingerprint": "the base model's files",
    "tasks_sha256": "the tasks' options and patterns",
    "template": "template",
    "cutoff_len": "cutoff_len",
    "dtype": "dtype",
    "max_new_tokens": "max_new_tokens",
    "num_beams": "num_beams",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """What the renderers show: columns in order, rows from top to bottom, groups of questions, notes below."""

    columns: tuple[Task, ...]
    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def group_rows(self) -> tuple[Row, ...]:
        """The rows that can have averages by group."""
        return tuple(row for row in self.rows if row.kind in ("result", "difference"))


def build_table(results: Sequence[Results], published: bool = False, difference: bool = False) -> Table:
    """Put results of one task set into one table.

    published: add the published figures of the commonsense tasks. difference: end with the last result minus the
    first, whose standard error sqrt(a^2 + b^2) treats the questions of the two rows as independent.
    Raises ``UserError`` if the task sets differ, or if an addition does not fit the results.
    """
    _check(results, published, difference)
    rows = [result_row(result) for result in results]
    groups = tuple(dict.fromkeys(group for row in rows for group in row.groups))
    majority = majority_row(results[0])
    others = published_rows() if published else []
    last = [difference_row(rows[0], rows[-1])] if difference else []
    return Table(
        columns=tuple(results[0].task_set[name] for name in results[0].task_set.columns),
        rows=(*([majority] if majority else []), *rows, *others, *last),
        groups=groups,
        notes=(
            *_question_notes(results),
            *_group_notes(results, groups),
            *_comparability_notes(results),
            *_row_notes(results, majority, others, difference),
        ),
    )


def _check(results: Sequence[Results], published: bool, difference: bool) -> None:
    if not results:
        raise UserError("a table needs at least one results file, and there is none")
    first = results[0]
    for other in results[1:]:
        if set(other.task_set.names) != set(first.task_set.names):
            raise UserError(
                f"{other.path} is about the tasks {', '.join(other.task_set.names)} and {first.path} about "
                f"{', '.join(first.task_set.names)}; one table needs results of one task set"
            )
    if published and set(first.task_set.names) != set(COMMONSENSE.names):
        raise UserError(
            f"--published has figures for the commonsense tasks alone, and {first.path} is about "
            f"{', '.join(first.task_set.names)}; leave the flag out"
        )
    if difference and len(results) < 2:
        raise UserError("--difference is the last results file minus the first and needs two, not 1")


def _question_notes(results: Sequence[Results]) -> list[str]:
    """How many questions stand behind the numbers, how they were answered, and what ± means."""
    counts = []
    for name in results[0].task_set.columns:
        seen = [str(result.tasks[name].n) for result in results if name in result.tasks]
        if seen:
            counts.append(f"{name} {' or '.join(dict.fromkeys(seen))}")
    notes = [f"Questions: {', '.join(counts)}.", "Accuracy in percent; ± is one standard error."]
    for word, field in (("Mode", "mode"), ("Base model", "base_model")):
        values = {getattr(result, field) for result in results}
        if len(values) == 1 and values != {None}:
            notes.append(f"{word}: {values.pop()}.")
    return notes


def _group_notes(results: Sequence[Results], groups: Sequence[str]) -> list[str]:
    """Which groups are no average over all tasks; two groups may then not be of the same tasks."""
    notes = []
    for group in groups:
        having = [
            name
            for name in results[0].task_set.columns
            if any(group in result.tasks[name].groups for result in results if name in result.tasks)
        ]
        if 0 < len(having) < len(results[0].task_set):
            notes.append(f"Group {group} is the average over {', '.join(having)} alone.")
    return notes


def _comparability_notes(results: Sequence[Results]) -> list[str]:
    """What keeps the rows from being compared, in as many sentences as there are reasons."""
    notes = []
    differing = [name for name in results[0].task_set.columns if _questions_differ(results, name)]
    if differing:
        notes.append(f"Rows are not on the same questions: {', '.join(differing)}.")
    for word, field in (("mode", "mode"), ("base model", "base_model")):
        values = [getattr(result, field) or "unknown" for result in results]
        if len(set(values)) > 1:
            pairs = (f"{result.name} {value}" for result, value in zip(results, values, strict=True))
            notes.append(f"Rows differ in {word}: {', '.join(pairs)}.")
    # Another base model has other files, which says nothing more.
    keys = [
        key for key in _PROTOCOL if key != "base_fingerprint" or len({result.base_model for result in results}) == 1
    ]
    return notes + [note for key in keys if (note := _setting_note(results, key))]


def _setting_note(results: Sequence[Results], key: str) -> str | None:
    """Which rows have which value of a setting, if those that have it do not agree; hashes are cut short."""
    shown = 12 if key in ("base_fingerprint", "tasks_sha256") else None
    having = [(result.name, str(result.settings[key])[:shown]) for result in results if key in result.settings]
    if len({value for _, value in having}) <= 1:
        return None
    return f"Rows differ in {_PROTOCOL[key]}: {', '.join(f'{name} {value}' for name, value in having)}."


def _questions_differ(results: Sequence[Results], name: str) -> bool:
    """Whether the rows that have a task differ in its number of questions or in the hash of its data."""
    having = [result for result in results if name in result.tasks]
    counts = {result.tasks[name].n for result in having}
    hashes = {result.data[name] for result in having if name in result.data}
    return len(counts) > 1 or len(hashes) > 1


def _row_notes(
    results: Sequence[Results], majority: Row | None, published: Sequence[Row], difference: bool
) -> list[str]:
    """What a reader must know about single rows."""
    notes = [
        f"No average for {result.name}, which has no score for {', '.join(result.missing)}."
        for result in results
        if result.missing
    ]
    if majority and any(_majority_differs(results, name) for name in results[0].tasks):
        notes.append(f'"{majority.label}" is on the questions of {results[0].name}.')
    if published:
        sources = " and ".join(dict.fromkeys(row.source for row in published))
        notes.append(
            f"Published rows are runs of others on the base model that each names, copied from {sources}, averages as "
            "printed there; MTL-LoRA's own published row is not among them."
        )
    if difference:
        notes.append(
            f"The difference is {results[-1].name} (the last results file) minus {results[0].name} (the first) in "
            "percentage points; its standard error treats the questions of the two rows as independent."
        )
    return notes


def _majority_differs(results: Sequence[Results], name: str) -> bool:
    return len({result.tasks[name].majority for result in results if name in result.tasks}) > 1
