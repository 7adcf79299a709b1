"""Tables of plain text with notes, as Markdown, LaTeX, HTML, CSV or JSON; pandas is imported only where needed."""

import dataclasses
import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import write_all

FORMATS = ("markdown", "csv", "latex", "html", "json")  # methods of ``Report``
SUFFIXES = {".csv": "csv", ".tex": "latex", ".json": "json", ".html": "html"}
SUFFIXES |= dict.fromkeys(("", ".md", ".markdown", ".txt"), "markdown")
_MOST_COLUMNS = 24
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def markdown_text(text: str) -> str:
    """Return the text on one line, with characters escaped that would end a cell or start code, a tag or a link."""
    return re.sub(r"[\\|*`<[]", r"\\\g<0>", " ".join(_CONTROL.sub(" ", text).split()))


def code_span(text: str) -> str:
    """Return the text on one line as code in Markdown, with its spaces, whatever it holds."""
    text = _CONTROL.sub(" ", text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def shortened(text: str, most: int) -> str:
    """Return the text on one line, cut to at most ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def told_apart(names: Sequence[str], *facts: Sequence[object]) -> list[str]:
    """Return the names; equal ones get a known fact in which they differ appended, ``name (fact)``.

    facts: sequences with a fact for each name, used in this order until the names differ.
    """
    for each in facts:
        pairs = [*zip(names, each, strict=True)]
        differ = {name for name in names if len({fact for other, fact in pairs if other == name}) > 1}
        names = [f"{name} ({fact})" if name in differ and fact else name for name, fact in pairs]
    return [*names]


def _no_formula(value: object) -> object:
    formula = r"\s*[=@＝＠＋－]|[\t\r]|\s*[+-](?![\d.]+(?:[eE][+-]?\d+)?$)"  # a number with a sign is not a formula
    return f"'{value}" if isinstance(value, str) and re.match(formula, value) else value


def _frame(rows: Sequence, columns: Sequence[str] | None = None):
    """Return a data frame that keeps the values unchanged (dtype object)."""
    import jinja2  # noqa: F401 - pandas needs it to write LaTeX
    import pandas

    return pandas.DataFrame(rows, columns=columns, dtype=object)


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of plain text, escaped when it is written. A table of very many columns is transposed."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __post_init__(self):
        if len(self.header) > _MOST_COLUMNS:
            header, *rows = map(list, zip(self.header, *self.rows, strict=True))
            self.__dict__.update(header=header, rows=rows)

    def markdown(self) -> str:
        """A padded pipe table without the title, with the first column left-aligned.

        (pandas would need another package for it.)
        """
        lines = [[markdown_text(cell) for cell in row] for row in (self.header, *self.rows)]
        # At least 2 wide, since Markdown requires a dash beside the colon in the delimiter row.
        widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)

    def latex(self) -> str:
        """A booktabs tabular without the title; the text of a single column is wrapped to the page."""
        columns = "l" + "r" * (len(self.header) - 1) if len(self.header) > 1 else r"@{}p{\linewidth}@{}"
        header, *rows = [
            [" ".join(cell.split()).replace("−", "-") for cell in row] for row in (self.header, *self.rows)
        ]
        text = _frame(rows, header).to_latex(index=False, escape=True, column_format=columns)
        text = text.translate({ord("<"): r"\textless{}", ord(">"): r"\textgreater{}", ord("|"): r"\textbar{}"})
        # At the start of a line, LaTeX would read either as an argument of the line break or rule before it.
        return re.sub(r"(?m)^[\[*]", r"{\g<0>}", text)

    def html(self) -> str:
        """A table element with the title as its caption."""
        text = _frame(self.rows, self.header).to_html(index=False, border=0, justify="unset")
        return text.replace("<thead>", f"<caption>{html.escape(self.title)}</caption>\n  <thead>", 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables of texts, records of the same numbers with every digit, and notes.

    value: the JSON object; None: an object of the records and the notes. titled: whether Markdown and LaTeX (in a
    comment) name each table.
    """

    tables: list[TextTable]
    records: list[dict]
    notes: list[str]
    value: dict | None = None
    titled: bool = False

    def write(self, output: str | None, style: str | None, inputs: Sequence[Path]) -> None:
        """Print the report, or write it to the file ``output``; notes go to stderr if the format has no place for them.

        style: one of ``FORMATS``; None: by the suffix of ``output``. Raises ``UserError`` for a suffix that names no
        format, and if ``output`` is one of ``inputs``.
        """
        path = Path(output or "")
        if output and path.resolve() in {each.resolve() for each in inputs}:
            raise UserError(f"--output {output} is one of the input files and would be lost; name another file")
        style = style or SUFFIXES.get(path.suffix.lower())
        if style is None:
            way_out = f"pass --format, one of {', '.join(FORMATS)}"
            raise UserError(f"--output {output} has a suffix that names no format; {way_out}")
        text = getattr(self, style)()
        if output:
            write_all({path: text.encode()})
        else:
            print(text, end="")
        if style == "csv":
            # A warning that rows are not comparable must not be lost.
            print("\n".join(self.notes), file=sys.stderr)

    def markdown(self) -> str:
        """Pipe tables, then the notes as a list."""
        tables = [f"## {markdown_text(each.title)}\n\n" * self.titled + each.markdown() for each in self.tables]
        notes = "\n".join(f"- {markdown_text(note)}" for note in self.notes)
        return "\n\n".join([*tables, notes]) + "\n"

    def latex(self) -> str:
        """Booktabs tables; the last one holds the notes."""
        tables = [
            f"% {' '.join(each.title.split()) or 'Notes'}\n" * self.titled + each.latex() for each in self._with_notes()
        ]
        return "% needs \\usepackage{booktabs}\n" + "\n".join(tables)

    def html(self) -> str:
        """Table elements; the last one holds the notes."""
        return "\n".join(table.html() for table in self._with_notes()) + "\n"

    def _with_notes(self) -> list[TextTable]:
        return [*self.tables, TextTable("", ["Notes"], [[note] for note in self.notes])]

    def csv(self) -> str:
        """The records, one column per key; None is empty."""
        # A spreadsheet would execute a text that begins like a formula.
        records = [{_no_formula(key): _no_formula(value) for key, value in record.items()} for record in self.records]
        return _frame(records).to_csv(index=False, lineterminator="\n")

    def json(self) -> str:
        """One JSON object."""
        value = self.value or {"rows": self.records, "notes": self.notes}
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
