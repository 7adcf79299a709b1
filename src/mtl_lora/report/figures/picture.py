"""What a picture is, how all of them look, and how one becomes the bytes of a file: the same bytes every time."""

import contextlib
import dataclasses
import importlib.util
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
# Okabe and Ito's colours, told apart with any colour vision, without the yellow that is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
DARK, GREY, LIGHT = "#222222", "#666666", "#dddddd"
SEQUENTIAL, DIVERGING = "cividis", "RdBu"
_LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",  # letters as outlines: the same width everywhere
    "image.interpolation": "none",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_PIXELS_PER_INCH = 160
_NOTE_LINE, _LEGEND_ROW = 0.14, 0.22  # inches


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to be drawn. name: stem of its file. caption: what it shows, and what bars, bands and colours mean."""

    name: str
    title: str
    caption: str
    draw: Callable[[], "Figure"]

    @contextlib.contextmanager
    def drawn(self) -> Iterator["Figure"]:
        """A block with the figure, under the settings that it is saved with, whatever the user's own are."""
        require_matplotlib()
        import matplotlib.style

        # The salt makes ids of one picture differ from another's on the same page.
        with matplotlib.style.context(["default", {**_LOOK, "svg.hashsalt": self.name}]):
            yield self.draw()

    def render(self, style: str) -> bytes:
        """The picture as ``svg`` or ``png``; the same bytes every time, for nothing in it depends on the time."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": self.title} if style == "svg" else {"Software": None}
        with self.drawn() as figure:
            figure.savefig(buffer, format=style, metadata=metadata, dpi=_PIXELS_PER_INCH)
        return buffer.getvalue()


def require_matplotlib() -> None:
    """Raise ``UserError`` with the way out if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed; run pip install 'mtl-lora[report]'")


def new_figure(
    width: float, height: float, title: str, note: str, layout: str = "constrained", legend_rows: int = 0
) -> "Figure":
    """An empty figure (inches) with its title above and a note below; its height grows with what stands below."""
    from matplotlib.figure import Figure

    lines = _note_lines(width, note)
    # The layout keeps room for a legend or for a note, not for both: empty lines are the legend's room.
    room = math.ceil(legend_rows * _LEGEND_ROW / _NOTE_LINE)
    figure = Figure(figsize=(width, height + _NOTE_LINE * (len(lines) + room)), layout=layout)
    # Beside the left edge, wherever the panels begin.
    figure.suptitle(title, x=0.1 / width, ha="left", fontsize=11, fontweight="bold", color=DARK)
    figure.supxlabel("\n" * room + "\n".join(lines), x=0.1 / width, ha="left", fontsize=8, color=GREY)
    return figure


def legend_below(figure: "Figure", entries: dict, columns: int, note: str) -> None:
    """A legend of name to line in the room that ``new_figure`` was told to keep above the note."""
    width, height = figure.get_size_inches()
    above = (_NOTE_LINE * len(_note_lines(width, note)) + 0.05) / height
    legend = figure.legend(
        entries.values(),
        entries.keys(),
        loc="lower left",
        bbox_to_anchor=(0, above),
        ncols=columns,
        handlelength=3,
        labelspacing=0.3,
    )
    legend.set_in_layout(False)


def _note_lines(width: float, note: str) -> list[str]:
    """A note in lines that fit below a figure; letters of its size are about 1/15 inch wide."""
    return textwrap.wrap(note, int(15 * width))


def look(index: int) -> dict:
    """Colour, marker and line of the index-th thing compared: of seven, any one of the three tells it apart.

    Of more, which is seldom, colour and marker together do.
    """
    around = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + around) % len(MARKERS)],
        "linestyle": LINES[(index + around) % len(LINES)],
    }


def panels(count: int, choices: tuple[int, ...] = (4, 3)) -> tuple[int, int]:
    """(rows, columns) of a grid for so many panels: the number of columns that leaves the fewest places empty."""
    columns = min(count, min(choices, key=lambda columns: -count % columns))
    return -(-count // columns), columns


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "unnamed"


def with_different_names(pictures: list[Picture]) -> Iterator[Picture]:
    """The same pictures; a name that was there before gets a number."""
    seen: dict[str, int] = {}
    for picture in pictures:
        seen[picture.name] = seen.get(picture.name, 0) + 1
        number = seen[picture.name]
        yield picture if number == 1 else dataclasses.replace(picture, name=f"{picture.name}_{number}")
