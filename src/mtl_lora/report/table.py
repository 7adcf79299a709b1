"""Tables of results and of studies: numbers as people read them (percent, one decimal), or CSV with every digit."""

import dataclasses
import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.report.study_model import Difference, Differences, Estimate, Experiment, Study
from mtl_lora.results import FRACTIONS, Average, Results, TaskResult, Trainable, average_of

PUBLISHED_FILE = Path(__file__).with_name("published_commonsense.json")
MAJORITY_LABEL, AVERAGE, NOTHING = "majority class", "Average", "–"
TRAINABLE = "Trainable parameters, M (%)"
# Settings of an evaluation that rows must share to be compared, and what a note calls them.
_PROTOCOL = {
    "base_fingerprint": "the base model's files",
    "tasks_sha256": "the tasks' options and patterns",
    **{key: key for key in ("template", "cutoff_len", "dtype", "max_new_tokens", "num_beams")},
}


# ---- numbers and texts ----


def percent(fraction: float, signed: bool = False) -> str:
    """Percent with one decimal; a difference carries its sign, and zero is never negative."""
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}" if signed else f"{rounded:.1f}"


def value_text(value: float | None, spread: float | None = None, metric: str = "accuracy", signed: bool = False) -> str:
    """``71.2 ± 0.8``: a fraction in percent, any other metric with three decimals; a dash for None."""
    if value is None:
        return NOTHING
    shown, error = (
        percent(number or 0, sign) if metric in FRACTIONS else f"{number or 0:{'+' if sign else ''}.3f}"
        for number, sign in ((value, signed), (spread, False))
    )
    return shown if spread is None else f"{shown} ± {error}"


def interval_text(value: Estimate | Difference | None, metric: str = "accuracy", signed: bool = False) -> str:
    """``70.1 to 72.3``, or a dash."""
    if value is None or value.low is None:
        return NOTHING
    return f"{value_text(value.low, None, metric, signed)} to {value_text(value.high, None, metric, signed)}"


def trainable_text(trainable: Trainable | None, adapters: int = 1) -> str:
    """``16.85 (0.25 %)``: millions of trainable parameters and their proportion of all; of each of ``adapters``."""
    if trainable is None:
        return NOTHING
    numbers = trainable.adapter / 1e6, 100 * trainable.adapter / trainable.total
    # Two decimals, more where a small number would have fewer than two digits left.
    millions, part = (f"{n:.{max(2, 1 - math.floor(math.log10(n))) if n else 2}f}" for n in numbers)
    return f"{adapters} x {millions} ({part} %)" if adapters > 1 else f"{millions} ({part} %)"


def markdown_text(text: str) -> str:
    """Text on one line, with the characters escaped that end a cell or start markup."""
    return re.sub(r"[\\|*`<]", r"\\\g<0>", " ".join(text.split()))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A padded pipe table of cells that are markdown, its first column flush left. (pandas needs a package for it.)"""
    # A ruler needs a dash beside its colon to make a table of the lines.
    widths = [max(2, *map(len, column)) for column in zip(header, *lines, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in (header, ruler, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def data_frame(*arguments, **options):
    """A pandas frame; raises ``UserError`` if a package is missing that frames are written with."""
    try:
        import jinja2  # noqa: F401 - pandas writes LaTeX with it
        import pandas
    except ImportError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed; run pip install 'mtl-lora[report]'"
        ) from None
    return pandas.DataFrame(*arguments, **options)


def csv_table(lines: Sequence[dict]) -> str:
    """Records with the same keys as CSV, a key a column; None is empty."""
    return data_frame(lines, dtype=object).to_csv(index=False, lineterminator="\n")


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of plain text, which is escaped where it is written."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """A pipe table without the title."""
        return markdown_table([*map(markdown_text, self.header)], [[*map(markdown_text, row)] for row in self.rows])

    def latex(self) -> str:
        """A booktabs tabular without the title."""
        columns = "l" + "r" * (len(self.header) - 1)
        rows = [[" ".join(cell.split()).replace("−", "-") for cell in row] for row in self.rows]
        text = data_frame(rows, columns=self.header).to_latex(index=False, escape=True, column_format=columns)
        text = text.translate({ord("<"): r"\textless{}", ord(">"): r"\textgreater{}", ord("|"): r"\textbar{}"})
        # After the line break of the row above, either would be read as its argument.
        return re.sub(r"(?<=\\\\\n)[\[*]", r"{\g<0>}", text)

    def html(self) -> str:
        """A table element with the title as its caption."""
        text = data_frame(self.rows, columns=self.header).to_html(index=False, border=0, justify="unset")
        return text.replace("<thead>", f"<caption>{html.escape(self.title)}</caption>\n  <thead>", 1)


# ---- results side by side ----


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: results by task name (a missing task has none) and their average, with its groups of questions.

    kind: ``result``, ``majority``, ``published`` or ``difference``. source: of published rows, where they were read.
    """

    name: str
    kind: str
    cells: dict[str, TaskResult]
    average: Average | None
    method: str | None = None
    base_model: str | None = None
    mode: str | None = None
    source: str | None = None
    trainable: Trainable | None = None

    def text(self, value: TaskResult | Average | None) -> str:
        """A cell or an average of this row, as people read it."""
        metric = getattr(value, "metric", next((cell.metric for cell in self.cells.values()), "accuracy"))
        return value_text(value and value.value, value and value.stderr, metric, self.kind == "difference")


@dataclasses.dataclass(frozen=True)
class ResultsTable:
    """Column titles by task, rows from top to bottom, groups of questions, notes below."""

    columns: dict[str, str]
    rows: list[Row]
    groups: list[str]
    notes: list[str]

    @property
    def tables(self) -> list[TextTable]:
        """The results; then averages by group, if there are any."""
        lines = [
            [row.name, trainable_text(row.trainable), *map(row.text, (*map(row.cells.get, self.columns), row.average))]
            for row in self.rows
        ]
        tables = [TextTable("Results", ["Method", TRAINABLE, *self.columns.values(), AVERAGE], lines)]
        if self.groups:
            own = [row for row in self.rows if row.kind in ("result", "difference")]
            lines = [[row.name, *(row.text(_group(row, group)) for group in self.groups)] for row in own]
            tables.append(TextTable("Averages by group", ["Average by group", *self.groups], lines))
        return tables


def _group(row: Row, group: str) -> Average | None:
    return row.average.groups.get(group) if row.average else None


def build_table(results: Sequence[Results], published: bool = False, difference: bool = False) -> ResultsTable:
    """Put results of one task set into one table.

    published: add the published figures of the commonsense tasks. difference: end with the last result minus the
    first, whose standard error sqrt(a^2 + b^2) treats the questions of the two rows as independent.
    Raises ``UserError`` if the task sets differ, or if an addition does not fit the results.
    """
    others = published_rows() if published else []
    _check(results, others, difference)
    fields = ("method", "base_model", "mode", "trainable")
    rows = [
        Row(each.name, "result", each.tasks, each.whole_average, **{field: getattr(each, field) for field in fields})
        for each in results
    ]
    groups = list(dict.fromkeys(group for row in rows if row.average for group in row.average.groups))
    majority = _majority_rows(results[0])
    last = [_difference_row(rows[0], rows[-1])] if difference else []
    columns = {name: _column_title(results, name) for name in results[0].task_set.columns}
    notes = _notes(results, groups) + _comparability_notes(results) + _row_notes(results, majority, others, difference)
    return ResultsTable(columns, [*majority, *rows, *others, *last], groups, notes)


def _check(results: Sequence[Results], published: Sequence[Row], difference: bool) -> None:
    first = results[0]
    for other in results[1:]:
        if set(other.task_set.names) != set(first.task_set.names):
            raise UserError(
                f"{other.path} is about the tasks {', '.join(other.task_set.names)} and {first.path} about "
                f"{', '.join(first.task_set.names)}; one table needs results of one task set"
            )
    if published and set(first.task_set.names) != set(published[0].cells):
        raise UserError(
            f"--published has figures for the commonsense tasks alone, and {first.path} is about "
            f"{', '.join(first.task_set.names)}; leave the flag out"
        )
    if difference and len(results) < 2:
        raise UserError("--difference is the last results file minus the first and needs two, not 1")


def _column_title(results: Sequence[Results], name: str) -> str:
    """A task's title, with its metric where that is not accuracy."""
    metrics = {each.tasks[name].metric for each in results if name in each.tasks} - {"accuracy"}
    words = ", ".join(FRACTIONS.get(metric, metric) for metric in sorted(metrics))
    return results[0].task_set.title(name) + (f" ({words})" if words else "")


def _majority_rows(results: Results) -> list[Row]:
    """What always giving the majority class scores; nothing unless the file has it for all of its tasks."""
    if any(result.majority is None for result in results.tasks.values()):
        return []
    cells = {name: TaskResult(each.metric, each.majority, None, each.n) for name, each in results.tasks.items()}
    return [Row(MAJORITY_LABEL, "majority", cells, None if results.missing else average_of(cells.values()))]


def _difference_row(first: Row, last: Row) -> Row:
    """Last minus first where both have a value; standard errors add as those of independent samples."""

    def minus(a, b):
        stderr = None if None in (a.stderr, b.stderr) else math.hypot(a.stderr, b.stderr)
        groups = {name: minus(group, b.groups[name]) for name, group in a.groups.items() if name in b.groups}
        return dataclasses.replace(b, value=b.value - a.value, stderr=stderr, groups=groups)

    cells = {name: minus(cell, last.cells[name]) for name, cell in first.cells.items() if name in last.cells}
    average = minus(first.average, last.average) if first.average and last.average else None
    cells = {name: dataclasses.replace(cell, n=None) for name, cell in cells.items()}
    return Row("difference", "difference", cells, average)


def published_rows() -> list[Row]:
    """The published figures that the package carries, as fractions, with averages as their sources print them."""
    published = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    settings = [f"{row['model']} {row['method']} r {row['r']}" for row in published["rows"]]
    found = []
    for setting, row in zip(settings, published["rows"], strict=True):
        # The repository is named where two sources have the same row.
        source = f", {row['source'].split()[0]}" if settings.count(setting) > 1 else ""
        scores = zip(published["tasks"], row["scores"], strict=True)
        cells = {task: TaskResult("accuracy", score / 100, None, None) for task, score in scores}
        average = Average(row["average"] / 100, None, len(cells))
        facts = {"method": row["method"], "base_model": row["model"], "source": row["source"]}
        found.append(Row(f"{setting} (published{source})", "published", cells, average, **facts))
    return found


def _notes(results: Sequence[Results], groups: Sequence[str]) -> list[str]:
    """How many questions stand behind the numbers, how they were answered, what ± means, of what groups are."""
    columns = results[0].task_set.columns
    having = {name: [each.tasks[name] for each in results if name in each.tasks] for name in columns}
    counts = {name: " or ".join(dict.fromkeys(str(each.n) for each in found)) for name, found in having.items()}
    metrics = {each.metric for found in having.values() for each in found}
    titles = [title for metric, title in FRACTIONS.items() if metric in metrics]
    unit = f"{' and '.join(titles)} in percent; " if titles else ""
    notes = [f"Questions: {', '.join(f'{name} {count}' for name, count in counts.items() if count)}."]
    notes.append(f"{unit}± is one standard error.")
    for word, field in (("Mode", "mode"), ("Base model", "base_model")):
        values = {getattr(result, field) for result in results}
        notes += [f"{word}: {value}." for value in values if value is not None and len(values) == 1]
    for group in groups:
        names = [name for name, found in having.items() if any(group in each.groups for each in found)]
        if len(names) < len(columns):
            notes.append(f"Group {group} is the average over {', '.join(names)} alone.")
    return notes


def _comparability_notes(results: Sequence[Results]) -> list[str]:
    """What keeps the rows from being compared, in as many sentences as there are reasons."""
    notes, differing = [], []
    for name in results[0].task_set.columns:
        having = [each for each in results if name in each.tasks]
        questions = {each.tasks[name].n for each in having}, {each.data.get(name) for each in having} - {None}
        differing += [name] if max(map(len, questions)) > 1 else []
    if differing:
        notes.append(f"Rows are not on the same questions: {', '.join(differing)}.")
    values = {
        word: [(each.name, getattr(each, field) or "unknown") for each in results]
        for word, field in (("mode", "mode"), ("base model", "base_model"))
    }
    for key, word in _PROTOCOL.items():
        # Another base model has other files, which says nothing more; hashes are cut short.
        if key != "base_fingerprint" or len({each.base_model for each in results}) == 1:
            values[word] = [(each.name, str(each.settings[key])) for each in results if key in each.settings]
    for word, pairs in values.items():
        if len({value for _, value in pairs}) > 1:
            shown = (f"{name} {value[:12] if len(value) == 64 else value}" for name, value in pairs)
            notes.append(f"Rows differ in {word}: {', '.join(shown)}.")
    return notes


def _row_notes(
    results: Sequence[Results], majority: Sequence[Row], published: Sequence[Row], difference: bool
) -> list[str]:
    """What a reader must know about single rows."""
    first, last = results[0], results[-1]
    notes = [
        f"No average for {each.name}, which has no score for {', '.join(each.missing)}."
        for each in results
        if each.missing
    ]
    if majority and any(len({r.tasks[name].majority for r in results if name in r.tasks}) > 1 for name in first.tasks):
        notes.append(f'"{MAJORITY_LABEL}" is on the questions of {first.name}.')
    if published:
        sources = " and ".join(dict.fromkeys(row.source for row in published))
        notes.append(
            f"Published rows are runs of others on the base model that each names, copied from {sources}, averages as "
            "printed there; MTL-LoRA's own published row is not among them."
        )
    if difference:
        notes.append(
            f"The difference is {last.name} (the last results file) minus {first.name} (the first) in percentage "
            "points; its standard error treats the questions of the two rows as independent."
        )
    return notes


def markdown(table: ResultsTable) -> str:
    """Pipe tables (results, then averages by group if there are any) and the notes as a list."""
    notes = "\n".join(f"- {markdown_text(note)}" for note in table.notes)
    return "\n\n".join([*(part.markdown() for part in table.tables), notes]) + "\n"


def latex(table: ResultsTable) -> str:
    """The same as booktabs tables."""
    notes = TextTable("", ["Notes"], [[note] for note in table.notes])
    return "% needs \\usepackage{booktabs}\n" + "\n".join(part.latex() for part in (*table.tables, notes))


def html_text(table: ResultsTable) -> str:
    """The same as table elements."""
    notes = TextTable("", ["Notes"], [[note] for note in table.notes])
    return "\n".join(part.html() for part in (*table.tables, notes)) + "\n"


def csv_text(table: ResultsTable) -> str:
    """One line a row: what it is, then value, standard error and questions of each task, with every digit.

    A task's columns are two words (``boolq accuracy``), so that no task name collides with a column of the row.
    """
    lines = []
    metrics = {name: cell.metric for row in table.rows for name, cell in row.cells.items()}
    for row in table.rows:
        line = {key: getattr(row, key) for key in ("name", "kind", "method", "base_model", "mode", "source")}
        line["name"] = " ".join(row.name.split())
        line |= {f"trainable_{key}": getattr(row.trainable, key, None) for key in ("adapter", "total")}
        for name in table.columns:
            for key, field in ((metrics.get(name, "accuracy"), "value"), ("stderr", "stderr"), ("n", "n")):
                line[f"{name} {key}"] = getattr(row.cells.get(name), field, None)
        averages = {"average": row.average} | {f"average of {group}": _group(row, group) for group in table.groups}
        for name, average in averages.items():
            line[name] = getattr(average, "value", None)
            line[f"{name}_stderr" if name == "average" else f"{name} stderr"] = getattr(average, "stderr", None)
        lines.append(line)
    return csv_table(lines)


RENDERERS: dict[str, Callable[[ResultsTable], str]] = {
    "markdown": markdown,
    "csv": csv_text,
    "latex": latex,
    "html": html_text,
}


def details(results: Results) -> TextTable:
    """One evaluation, a line a task: its value, the majority class, other measures, the answers given."""
    rows, last = [], "Answers given"
    for name in results.scored:
        task = results.tasks[name]
        row = {
            "Task": results.task_set.title(name),
            "Questions": f"{task.n:,}",
            FRACTIONS.get(task.metric, task.metric): value_text(task.value, task.stderr, task.metric),
            "Majority class": value_text(task.majority, None, task.metric),
            "Unparsed": value_text(task.measured.get("unparsed")),
        }
        for key, other in task.others.items():
            title = {"strict": "Strict", "acc_norm": "Length-normalised"}.get(key, key)
            row[title] = value_text(other.value, None, other.metric)
            row[f"{title} - {task.metric}"] = value_text(other.value - task.value, None, task.metric, signed=True)
            if key == "strict":
                row[f"{title} unparsed"] = value_text(other.measured.get("unparsed"))
        if "f1" in task.measured:
            row["F1"] = value_text(task.measured["f1"])
        # The most frequent first; no answer is a dash.
        counts = sorted((task.measured.get("predicted") or {}).items(), key=lambda pair: (-pair[1], pair[0]))
        shown = [f"{answer or NOTHING} {count}" for answer, count in counts[:6]] + ["..."] * (len(counts) > 6)
        rows.append(row | {last: ", ".join(shown)})
    header = [*dict.fromkeys(key for row in rows for key in row if key != last), last]
    return TextTable(
        f"{results.name} ({results.mode})", header, [[r.get(key, NOTHING) for key in header] for r in rows]
    )


# ---- studies ----


def study_tables(study: Study) -> list[TextTable]:
    """By group, the experiments by task and their differences from the baseline; transfer; the search."""
    tables, titles = [], [*(study.task_set.title(task) for task in study.scored), AVERAGE]
    for group in study.groups if study.scored else ():
        of = f", {group}" if len(study.groups) > 1 else ""
        experiments = [experiment for experiment in study.experiments if experiment.group == group]
        tables.append(_experiments(study, experiments, titles, f"Results{of}"))
        compared = [each for each in experiments if each.against]
        rows = [[f"{e.name} - {e.against.baseline}", *_differences(study, e.against)] for e in compared]
        tables += [TextTable(f"Differences from the baseline{of}", ["Difference", *titles], rows)] if rows else []
    if study.transfer:
        rows = [[row.label, row.group, row.alone or NOTHING, *_differences(study, row)] for row in study.transfer]
        header = ["Trained together", "Group", "Trained alone", *titles]
        tables.append(TextTable("Transfer: trained together minus each task trained alone", header, rows))
    if study.search:
        outcomes = study.search.experiments
        rows = [
            [each.name, *(f"{percent(c.dev)}{' (chosen)' if c.value == each.chosen else ''}" for c in each.candidates)]
            for each in outcomes
        ]
        header = ["Development average", *(str(candidate.value) for candidate in outcomes[0].candidates)]
        tables.append(TextTable(f"Search of {study.search.flag} on the development set", header, rows))
    return tables


def _experiments(study: Study, experiments: Sequence[Experiment], titles: Sequence[str], title: str) -> TextTable:
    """A row an experiment: mean ± standard deviation over seeds, or ± standard error where no experiment has seeds."""
    header = ["Method", TRAINABLE, "Rank", "Learning rate", *titles]
    metrics = {task: study.metric(task) for task in [*study.scored, None]}
    majority = study.majority | {None: study.average_majority}
    rows = [[MAJORITY_LABEL, *[NOTHING] * 3, *(value_text(majority.get(t), None, m) for t, m in metrics.items())]]
    for each in experiments:
        settings = [NOTHING if value is None else f"{value:g}" for value in (each.rank, each.learning_rate)]
        rows.append([each.name, trainable_text(each.trainable, each.adapters), *settings])
        for task, metric in metrics.items():
            found = each.estimate(task) or Estimate(None)
            error = None if found.low is None else found.mean - found.low
            rows[-1].append(value_text(found.mean, found.sd if study.has_seeds else error, metric))
    if study.has_seeds:
        header.append("95 % interval")
        rows[0].append(NOTHING)
        for row, each in zip(rows[1:], experiments, strict=True):
            row.append(interval_text(each.summary.average, metrics[None]))
    return TextTable(title, header, rows if study.majority else rows[1:])


def _differences(study: Study, found: Differences) -> list[str]:
    """``+1.2 (-0.3 to +2.7)`` by task and on average."""
    texts = []
    for task in [*study.scored, None]:
        value, metric = found.tasks.get(task) if task else found.average, study.metric(task)
        interval = f" ({interval_text(value, metric, signed=True)})" if value and value.low is not None else ""
        texts.append(value_text(value and value.difference, None, metric, signed=True) + interval)
    return texts
