"""What training together does to each task: together minus alone, in percentage points, with intervals."""

import textwrap
from typing import TYPE_CHECKING

from mtl_lora.report.figures.heat_map import colour_bar, heat_map
from mtl_lora.report.figures.picture import DARK, Picture, new_figure
from mtl_lora.report.study import Scores, Study, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Trained together, minus trained alone"
CAPTION = (
    "Difference of accuracy in percentage points, its 95 % interval below it, in bold where that leaves out 0. "
    "Red: worse together; blue: better."
)


def transfer(study: Study) -> list[Picture]:
    """The picture, if the study compares tasks trained together with tasks trained alone."""
    if not study.transfer:
        return []
    return [Picture("transfer", TITLE, CAPTION, lambda: _draw(study))]


def _draw(study: Study) -> "Figure":
    import numpy as np

    tasks = [name for name in study.tasks.columns if any(name in row.tasks for row in study.transfer)]
    cells = [[*(row.tasks.get(task) for task in tasks), row.average] for row in study.transfer]
    matrix = np.array([[100 * cell.mean if cell else np.nan for cell in row] for row in cells])
    limit = max(1.0, float(np.nanmax(np.abs(matrix))))
    labels = ["\n".join(textwrap.wrap(_label(row), 30)) for row in study.transfer]
    columns = [*(study.title(task) for task in tasks), "Average"]
    edge = 0.075 * max(len(line) for label in labels for line in label.split("\n"))
    figure = new_figure(0.92 * len(columns) + edge + 1.4, 0.46 * len(labels) + 1.6, TITLE, CAPTION)
    panel = figure.subplots()
    mesh = heat_map(
        panel, matrix, labels, columns, limit,
        text=lambda row, column: cell_text(cells[row][column]),
        bold=lambda row, column: _apart_from_zero(cells[row][column]),
    )  # fmt: skip
    panel.axvline(len(tasks), color=DARK, linewidth=1.2)
    for index in range(1, len(study.transfer)):
        if study.transfer[index].group != study.transfer[index - 1].group:
            panel.axhline(index, color=DARK, linewidth=1.2)
    colour_bar(figure, mesh, [panel], "percentage points")
    return figure


def cell_text(value: Value | None) -> str:
    """``+1.2`` and its interval in a second line, in percentage points."""
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return _points(value.mean)
    return f"{_points(value.mean)}\n{_points(value.low)} to {_points(value.high)}"


def _points(fraction: float) -> str:
    return f"{round(100 * fraction, 1) + 0.0:+.1f}".replace("-", "−")


def _apart_from_zero(value: Value | None) -> bool:
    return value is not None and None not in (value.low, value.high) and not value.low <= 0 <= value.high


def _label(row: Scores) -> str:
    return row.label if row.group in row.label else f"{row.group}: {row.label}"
