"""A table as markdown or LaTeX for people (percent, one decimal) or as CSV for programs (fractions, every digit)."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable

from mtl_lora.report.results import Trainable
from mtl_lora.report.rows import Cell, Row
from mtl_lora.report.table import Table

NOTHING = "–"
# The characters that end a cell or start markup; an underscore within a word is text.
MARKDOWN_SPECIAL = "\\|*`<"
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "±": r"$\pm$", "–": "--",
    "[": "{[}", "*": "{*}",  # after the line break of the row above, either would be read as its argument
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
    """How one format writes a text (escaped, on one line) and a score with its standard error."""

    escape: Callable[[str], str]
    score: str
    score_with_error: str

    def text(self, text: str) -> str:
        return self.escape(" ".join(text.split()))

    def cell(self, cell: Cell | None, signed: bool = False) -> str:
        if cell is None:
            return self.text(NOTHING)
        accuracy = percent(cell.accuracy, signed)
        if cell.stderr is None:
            return self.score.format(accuracy)
        return self.score_with_error.format(accuracy, percent(cell.stderr))


def _markdown_escape(text: str) -> str:
    return "".join("\\" + character if character in MARKDOWN_SPECIAL else character for character in text)


def _latex_escape(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in text)


MARKDOWN = Style(_markdown_escape, "{}", "{} ± {}")
LATEX = Style(_latex_escape, "${}$", r"${} \pm {}$")


def markdown(table: Table) -> str:
    """Padded pipe tables (results, then averages by group if there are any) and the notes as a list."""
    parts = [markdown_table(*_score_grid(table, MARKDOWN))]
    if table.groups:
        parts.append(markdown_table(*_group_grid(table, MARKDOWN)))
    parts.append("\n".join(f"- {MARKDOWN.text(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def latex(table: Table) -> str:
    """The same as booktabs tables."""
    parts = ["% needs \\usepackage{booktabs}"]
    parts.append(_latex_table(*_score_grid(table, LATEX), [row.kind for row in table.rows]))
    if table.groups:
        parts.append("\\par\\medskip")
        parts.append(_latex_table(*_group_grid(table, LATEX), [row.kind for row in table.group_rows]))
    notes = "\\\\\n".join(LATEX.text(note) for note in table.notes)
    parts.append(f"\\par\\medskip\n{{\\footnotesize\\raggedright\n{notes}\\par}}")
    return "\n".join(parts) + "\n"


def csv_text(table: Table) -> str:
    """One line a row: what it is, then accuracy, standard error and questions of each task, as fractions.

    A task's columns are two words (``boolq accuracy``), so that no task name collides with a column of the row.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["name", "kind", "method", "base_model", "mode", "source", "trainable_adapter", "trainable_total"]
    for task in table.columns:
        header += [f"{task.name} accuracy", f"{task.name} stderr", f"{task.name} n"]
    header += ["average", "average_stderr"]
    for group in table.groups:
        header += [f"average of {group}", f"average of {group} stderr"]
    writer.writerow(header)
    writer.writerows(_csv_line(table, row) for row in table.rows)
    return buffer.getvalue()


def _csv_line(table: Table, row: Row) -> list:
    counts = [row.trainable.adapter, row.trainable.total] if row.trainable else ["", ""]
    line = [row.label, row.kind, row.method, row.base_model, row.mode, row.source, *counts]
    for task in table.columns:
        cell = row.cells.get(task.name)
        line += [cell.accuracy, cell.stderr, cell.n] if cell else [None] * 3
    for cell in (row.average, *(row.groups.get(group) for group in table.groups)):
        line += [cell.accuracy, cell.stderr] if cell else [None] * 2
    return line


RENDERERS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "csv": csv_text, "latex": latex}


def _score_grid(table: Table, style: Style) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the main table, written in ``style``."""
    header = ["Method", "Trained weights, M (%)", *(task.title for task in table.columns), "Average"]
    lines = []
    for row in table.rows:
        cells = [*(row.cells.get(task.name) for task in table.columns), row.average]
        lines.append([style.text(row.label), style.text(trainable_text(row.trainable)), *_scores(cells, row, style)])
    return [style.text(heading) for heading in header], lines


def _group_grid(table: Table, style: Style) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of averages by group, written in ``style``."""
    header = ["Average by group", *table.groups]
    lines = [
        [style.text(row.label), *_scores([row.groups.get(group) for group in table.groups], row, style)]
        for row in table.group_rows
    ]
    return [style.text(heading) for heading in header], lines


def _scores(cells: list[Cell | None], row: Row, style: Style) -> list[str]:
    return [style.cell(cell, signed=row.kind == "difference") for cell in cells]


def trainable_text(trainable: Trainable | None) -> str:
    """``16.85 (0.25 %)``: millions of trained weights and their share of all; a dash where that is not known."""
    if trainable is None:
        return NOTHING
    return f"{_decimals(trainable.adapter / 1e6)} ({_decimals(100 * trainable.adapter / trainable.total)} %)"


def _decimals(number: float) -> str:
    """Two decimals, more where a small number would have fewer than two digits left."""
    places = max(2, 1 - math.floor(math.log10(number))) if number else 2
    return f"{number:.{places}f}"


def percent(fraction: float, signed: bool = False) -> str:
    """Percent with one decimal; a difference carries its sign, and zero is never negative."""
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}" if signed else f"{rounded:.1f}"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    # A ruler needs a dash beside its colon to make a table of the lines.
    widths = [max(2, *map(len, column)) for column in zip(header, *lines, strict=True)]
    ruler = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in (header, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], ruler, *padded[1:]])


def _latex_table(header: list[str], lines: list[list[str]], kinds: list[str]) -> str:
    """A tabular with a rule wherever the kind of row changes."""
    body = []
    for index, (line, kind) in enumerate(zip(lines, kinds, strict=True)):
        if index and kind != kinds[index - 1]:
            body.append("\\midrule")
        body.append(" & ".join(line) + " \\\\")
    return "\n".join(
        [
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            "\\toprule",
            " & ".join(header) + " \\\\",
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
        ]
    )
