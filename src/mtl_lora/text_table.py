"""Tables of plain text with notes, as Markdown, LaTeX, HTML, CSV or JSON; pandas is imported where it is needed."""

import dataclasses
import html
import json
import re
from collections.abc import Sequence

FORMATS = ("markdown", "csv", "latex", "html", "json")  # methods of ``Report``
_MOST_COLUMNS = 24


def markdown_text(text: str) -> str:
    """Text on one line, with the characters escaped that end a cell or start markup."""
    return re.sub(r"[\\|*`<]", r"\\\g<0>", " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()))


def told_apart(names: Sequence[str], *facts: Sequence[object]) -> list[str]:
    """Names, of which equal ones say a fact by which they differ, as far as it is known; those left equal the next."""
    for each in facts:
        pairs = [*zip(names, each, strict=True)]
        differ = {name for name in names if len({fact for other, fact in pairs if other == name}) > 1}
        names = [f"{name} ({fact})" if name in differ and fact else name for name, fact in pairs]
    return [*names]


def _no_formula(value: object) -> object:
    formula = r"[=@\t\r]|[+-](?![\d.]+(?:[eE][+-]?\d+)?$)"  # a number with a sign is none
    return f"'{value}" if isinstance(value, str) and re.match(formula, value) else value


def _frame(rows: Sequence, columns: Sequence[str] | None = None):
    """A data frame of values as they are."""
    import jinja2  # noqa: F401 - pandas writes LaTeX with it
    import pandas

    return pandas.DataFrame(rows, columns=columns, dtype=object)


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of plain text, which is escaped where it is written; one of very many columns is turned on its side."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __post_init__(self):
        if len(self.header) > _MOST_COLUMNS:
            header, *rows = map(list, zip(self.header, *self.rows, strict=True))
            self.__dict__.update(header=header, rows=rows)

    def markdown(self) -> str:
        """A padded pipe table without the title, its first column flush left. (pandas needs a package for it.)"""
        lines = [[markdown_text(cell) for cell in row] for row in (self.header, *self.rows)]
        # A ruler needs a dash beside its colon to make a table of the lines.
        widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)

    def latex(self) -> str:
        """A booktabs tabular without the title."""
        columns = "l" + "r" * (len(self.header) - 1)
        rows = [[" ".join(cell.split()).replace("−", "-") for cell in row] for row in self.rows]
        text = _frame(rows, self.header).to_latex(index=False, escape=True, column_format=columns)
        text = text.translate({ord("<"): r"\textless{}", ord(">"): r"\textgreater{}", ord("|"): r"\textbar{}"})
        # After the line break or the rule above, either would be read as its argument.
        return re.sub(r"(?m)^[\[*]", r"{\g<0>}", text)

    def html(self) -> str:
        """A table element with the title as its caption."""
        text = _frame(self.rows, self.header).to_html(index=False, border=0, justify="unset")
        return text.replace("<thead>", f"<caption>{html.escape(self.title)}</caption>\n  <thead>", 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables of texts, the same numbers as records with every digit, and notes.

    value: the JSON object, where it is not the records and the notes.
    """

    tables: list[TextTable]
    records: list[dict]
    notes: list[str]
    value: dict | None = None

    def markdown(self) -> str:
        """Pipe tables, and the notes as a list."""
        notes = "\n".join(f"- {markdown_text(note)}" for note in self.notes)
        return "\n\n".join([*(table.markdown() for table in self.tables), notes]) + "\n"

    def latex(self) -> str:
        """Booktabs tables, the last one of the notes."""
        return "% needs \\usepackage{booktabs}\n" + "\n".join(table.latex() for table in self._with_notes())

    def html(self) -> str:
        """Table elements, the last one of the notes."""
        return "\n".join(table.html() for table in self._with_notes()) + "\n"

    def _with_notes(self) -> list[TextTable]:
        return [*self.tables, TextTable("", ["Notes"], [[note] for note in self.notes])]

    def csv(self) -> str:
        """The records, a key a column; None is empty."""
        # A spreadsheet would run what begins like a formula.
        records = [{key: _no_formula(value) for key, value in record.items()} for record in self.records]
        return _frame(records).to_csv(index=False, lineterminator="\n")

    def json(self) -> str:
        """One object."""
        value = self.value or {"rows": self.records, "notes": self.notes}
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
