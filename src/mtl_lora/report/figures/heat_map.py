"""A matrix as coloured cells with their numbers written in: what similarity and transfer have in common."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtl_lora.report.figures.picture import DIVERGING, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

MOST_WRITTEN = 12  # rows or columns up to which numbers fit into cells
_EMPTY = "#f4f4f4"


def heat_map(
    panel: "Axes",
    matrix,
    rows: Sequence[str],
    columns: Sequence[str],
    limit: float,
    text: Callable[[int, int], str] | None = None,
    bold: Callable[[int, int], bool] = lambda row, column: False,
    label_size: float = 9,
) -> "QuadMesh":
    """Draw a numpy matrix with NaN for no value, coloured from -limit to limit; ``text`` says what a cell holds."""
    import numpy as np

    panel.set_facecolor(_EMPTY)
    mesh = panel.pcolormesh(np.ma.masked_invalid(matrix), cmap=DIVERGING, vmin=-limit, vmax=limit, edgecolors="white")
    mesh.set_linewidth(0.8)
    for (row, column), value in np.ndenumerate(matrix) if text else ():
        panel.text(
            column + 0.5,
            row + 0.5,
            text(row, column),
            ha="center",
            va="center",
            fontsize=7.5,
            color=_ink(mesh.cmap(mesh.norm(value))) if np.isfinite(value) else "black",
            fontweight="bold" if bold(row, column) else "normal",
        )
    turned = 40 if label_size > 8 else 90
    places = [index + 0.5 for index in range(len(columns))]
    panel.set_xticks(places, columns, rotation=turned, ha="right", va="center", rotation_mode="anchor")
    panel.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    panel.invert_yaxis()
    panel.tick_params(length=0, labelsize=label_size)
    for spine in panel.spines.values():
        spine.set_visible(False)
    return mesh


def _ink(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more from a colour (relative luminance and contrast of WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def colour_bar(figure, mesh, panels, label: str):
    """The scale of colours beside the panels."""
    bar = figure.colorbar(mesh, ax=panels, shrink=0.7, pad=0.02, aspect=30)
    bar.set_label(label, color=GREY)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=GREY, labelcolor=GREY)
    return bar
