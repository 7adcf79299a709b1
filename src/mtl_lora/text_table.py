"""A table of plain text as Markdown, LaTeX or HTML; pandas is imported where it is needed."""

import dataclasses
import html
import re
from collections.abc import Sequence

_MOST_COLUMNS = 24


def markdown_text(text: str) -> str:
    """Text on one line, with the characters escaped that end a cell or start markup."""
    return re.sub(r"[\\|*`<]", r"\\\g<0>", " ".join(text.split()))


def frame(rows: Sequence, columns: Sequence[str] | None = None):
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
        text = frame(rows, self.header).to_latex(index=False, escape=True, column_format=columns)
        text = text.translate({ord("<"): r"\textless{}", ord(">"): r"\textgreater{}", ord("|"): r"\textbar{}"})
        # After the line break of the row above, either would be read as its argument.
        return re.sub(r"(?<=\\\\\n)[\[*]", r"{\g<0>}", text)

    def html(self) -> str:
        """A table element with the title as its caption."""
        text = frame(self.rows, self.header).to_html(index=False, border=0, justify="unset")
        return text.replace("<thead>", f"<caption>{html.escape(self.title)}</caption>\n  <thead>", 1)
