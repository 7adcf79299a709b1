"""Figures of studies and runs: whatever they hold numbers for. The same numbers give the same bytes."""

import dataclasses
import importlib.util
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.load import Matrix, analysis_of, load_studies, log_of
from mtl_lora.report.study_model import Study
from mtl_lora.report.table import AVERAGE, MAJORITY_LABEL, interval_text, value_text
from mtl_lora.results import FRACTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
# Okabe and Ito's colours, told apart with any colour vision, without the yellow that is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
DARK, GREY, LIGHT = "#222222", "#666666", "#dddddd"
MOST_WRITTEN = 12  # rows or columns up to which numbers fit into cells
_SMOOTHED = 20  # the running mean of a loss is over one in so many of the log's lines
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9.5,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.labelcolor"), GREY),
    **dict.fromkeys(("grid.color", "xtick.color", "ytick.color"), LIGHT),
    "ytick.labelcolor": DARK,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",  # letters as outlines: the same width everywhere
    "svg.hashsalt": "mtl-lora",
    "image.interpolation": "none",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure. name: stem of its file. caption: what it shows, and what bars, bands and colours mean."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    def render(self, style: str) -> bytes:
        """The figure as ``svg`` or ``png``; nothing in it depends on the time or on the user's settings."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": self.title} if style == "svg" else {"Software": None}
        with _style():
            self.figure.savefig(buffer, format=style, metadata=metadata)
        return buffer.getvalue()


def _style():
    """The settings that figures are made and saved with, whatever the user's own are."""
    import matplotlib.style

    return matplotlib.style.context(["default", _STYLE])


def draw(study: Study) -> list[Drawing]:
    """Everything that a study or a run has the numbers for, each under a name of its own.

    Raises ``UserError`` with the way out if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib, which is not installed; run pip install 'mtl-lora[report]'")
    found, names = [], Counter()
    with _style():
        for drawing in (each for kind in (_accuracy, _transfer, _loss, _mixture, _similarity) for each in kind(study)):
            names[drawing.name] += 1
            number = f"_{names[drawing.name]}" if names[drawing.name] > 1 else ""
            found.append(dataclasses.replace(drawing, name=drawing.name + number))
    return found


def write_figures(runs: Sequence[str], output: str | None, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw everything the folders hold numbers for into ``output`` (default: ``figures`` in the one folder).

    Raises ``UserError`` if there is nothing to draw, or several folders and no ``output``.
    """
    if output is None and len(runs) > 1:
        raise UserError("several runs are drawn together; pass --output DIR for their figures")
    own = Path(runs[0]) if Path(runs[0]).is_dir() else Path(runs[0]).parent
    folder, studies, contents = Path(output) if output else own / "figures", load_studies(runs), {}
    for study in studies:
        prefix = f"{_slug(study.name)}_" if len(studies) > 1 else ""
        for drawing in draw(study):
            contents |= {folder / f"{prefix}{drawing.name}.{style}": drawing.render(style) for style in formats}
    if not contents:
        raise UserError(f"there is nothing to draw in {', '.join(map(str, runs))}")
    write_all(contents)
    return list(contents)


# ---- what all figures share ----


def look(index: int) -> dict:
    """Colour, marker and line of the index-th thing compared: of seven, any one of the three tells it apart.

    Of more, which is seldom, colour and marker together do.
    """
    turned = (index + index // len(COLOURS)) % len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[turned], "linestyle": LINES[turned]}


def _looks(study: Study) -> list[dict]:
    """By experiment, its look in every figure: counted within its group; grey for a model without training."""
    before, looks = Counter(), []
    for experiment in study.experiments:
        trained = experiment.method is not None or experiment.has_log
        looks.append(look(before[experiment.group]) if trained else {**look(0), "color": GREY})
        before[experiment.group] += trained
    return looks


def _slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "unnamed"


def _width(labels: Collection[str]) -> float:
    """Inches that the longest label takes."""
    return 0.075 * max(map(len, labels))


def _new_figure(
    count: int, panel: tuple[float, float], margin: tuple[float, float], title: str, caption: str, *columns: int,
    layout: str = "constrained", **shared,
) -> "tuple[Figure, list[Axes]]":  # fmt: skip
    """A grid of ``count`` panels (inches) with its title above and its caption below.

    columns: of those, the number that leaves the fewest places empty.
    """
    from matplotlib.figure import Figure

    across = min(count, min(columns, key=lambda columns: -count % columns))
    down = -(-count // across)
    width = across * panel[0] + margin[0]
    lines = textwrap.wrap(caption, int(15 * width))  # letters of its size are about 1/15 inch wide
    figure = Figure(figsize=(width, down * panel[1] + margin[1] + 0.14 * len(lines)), layout=layout)
    # Beside the left edge, wherever the panels begin.
    figure.suptitle(title, x=0.1 / width, ha="left", fontsize=11, fontweight="bold", color=DARK)
    figure.supxlabel("\n".join(lines), x=0.1 / width, ha="left", fontsize=8, color=GREY)
    axes = figure.subplots(down, across, squeeze=False, **shared).flatten()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, list(axes[:count])


def _heat_map(
    panel: "Axes", matrix, rows: Sequence[str], columns: Sequence[str], limit: float, texts: Sequence[Sequence[str]],
    is_bold: Callable[[int, int], bool] = lambda row, column: False,
):  # fmt: skip
    """A matrix with NaN for no value, coloured from -limit to limit, and a text in each cell."""
    import numpy as np

    panel.set_facecolor("#f4f4f4")
    mesh = panel.pcolormesh(np.ma.masked_invalid(matrix), cmap="RdBu", vmin=-limit, vmax=limit, edgecolors="white")
    mesh.set_linewidth(0.8)
    for (row, column), text in np.ndenumerate(np.array(texts, dtype=object)):
        ink = "white" if abs(matrix[row][column]) > 0.6 * limit else "black"
        weight = "bold" if is_bold(row, column) else "normal"
        panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=7.5, color=ink, weight=weight)
    panel.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    panel.set_ylim(len(rows), 0)
    _name_columns(panel, [index + 0.5 for index in range(len(columns))], columns)
    return mesh


def _name_columns(panel: "Axes", places: Sequence[float], names: Sequence[str]) -> None:
    """Slanting names below the columns of a matrix, whose frame goes."""
    panel.set_xticks(places, names, rotation=40, ha="right", va="center", rotation_mode="anchor")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def _colour_bar(figure: "Figure", mesh, panels: Sequence["Axes"], label: str) -> None:
    bar = figure.colorbar(mesh, ax=panels, shrink=0.7, pad=0.02, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)


# ---- results ----


def _accuracy(study: Study) -> Iterator[Drawing]:
    """Every experiment, a panel a task: a point and its interval, and the majority class as a line."""
    tasks: list[str | None] = list(study.scored)
    if not tasks:
        return
    if len(tasks) > 1 and any(experiment.summary.average for experiment in study.experiments):
        tasks.append(None)
    metrics = {study.metric(task) for task in tasks}
    title = FRACTIONS.get(*metrics, "Results") if len(metrics) == 1 else "Results"
    caption = (
        f"{title}, fractions in percent; bars: 95 % t interval of the mean over seeds (thick), or one standard error "
        f"over the questions of a single run (thin); dashed line: {MAJORITY_LABEL}; each panel has its own scale."
    )
    labels = [e.name if len(e.name) <= 32 else f"{e.name[:31]}…" for e in study.experiments]
    panel, margin = (2.1, 0.75 + 0.22 * len(labels)), (0.4 + _width(labels), 0.6)
    figure, panels = _new_figure(len(tasks), panel, margin, title, caption, 4, 3, sharey=True)
    looks, majority = _looks(study), study.majority | {None: study.average_majority}
    for panel, task in zip(panels, tasks, strict=True):
        fraction = study.metric(task) in FRACTIONS
        scale = 100 if fraction else 1
        for index, (experiment, style) in enumerate(zip(study.experiments, looks, strict=True)):
            value = experiment.estimate(task)
            if value and value.low is not None:
                ends = (max(value.low, 0), min(value.high, 1)) if fraction else (value.low, value.high)
                thickness, cap = (2.4, 7) if value.sd is not None else (0.9, 5)
                for line, size in (("-", {"linewidth": thickness}), ("|", {"markersize": cap})):
                    panel.plot([scale * end for end in ends], [index, index], line, color=style["color"], **size)
            if value:
                edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
                colour = style["color"]
                panel.plot(scale * value.mean, index, style["marker"], color=colour, markersize=7, **edge)
        if majority.get(task) is not None:
            panel.axvline(scale * majority[task], color=DARK, linestyle=(0, (4, 3)), linewidth=1)
        panel.set_title(study.task_set.title(task) if task else AVERAGE, fontweight=None if task else "bold")
        panel.grid(axis="x")
        panel.margins(x=0.08)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    yield Drawing("accuracy", title, caption, figure)


def _transfer(study: Study) -> Iterator[Drawing]:
    """What training together does to each task: together minus alone, with intervals."""
    import numpy as np

    if not study.transfer:
        return
    title = "Trained together, minus trained alone"
    caption = (
        "Difference in percentage points, its 95 % interval below it, in bold where that leaves out 0. Red: worse "
        "together; blue: better."
    )
    cells = [[*(row.tasks.get(task) for task in study.scored), row.average] for row in study.transfer]
    matrix = np.array([[100 * cell.difference if cell else np.nan for cell in row] for row in cells])
    labels = ["\n".join(textwrap.wrap(row.label, 30)) for row in study.transfer]
    columns = [*(study.task_set.title(task) for task in study.scored), AVERAGE]
    edge = _width([line for label in labels for line in label.split("\n")])
    margin = (edge + 1.4, 1.6)
    size = (0.92 * len(columns), 0.46 * len(labels))
    figure, (panel,) = _new_figure(1, size, margin, title, caption, 1)
    texts = [[_difference_text(cell) for cell in row] for row in cells]

    def apart_from_zero(row: int, column: int) -> bool:
        cell = cells[row][column]
        return cell is not None and cell.low is not None and not cell.low <= 0 <= cell.high

    limit = max(1.0, float(np.nanmax(np.abs(matrix))))
    mesh = _heat_map(panel, matrix, labels, columns, limit, texts, apart_from_zero)
    panel.axvline(len(study.scored), color=DARK, linewidth=1.2)
    for index, (row, other) in enumerate(zip(study.transfer, study.transfer[1:], strict=False), start=1):
        if row.group != other.group:
            panel.axhline(index, color=DARK, linewidth=1.2)
    _colour_bar(figure, mesh, [panel], "percentage points")
    yield Drawing("transfer", title, caption, figure)


def _difference_text(cell) -> str:
    """``+1.2`` and its interval in a second line."""
    if cell is None:
        return ""
    interval = f"\n{interval_text(cell, signed=True)}" if cell.low is not None else ""
    return f"{value_text(cell.difference, signed=True)}{interval}".replace("-", "−")


# ---- trainings ----


def _loss(study: Study) -> Iterator[Drawing]:
    """Training loss by step, a panel a task and one over all: every experiment a line, its seeds as a band."""
    from matplotlib.ticker import MaxNLocator

    trained = [(e, style) for e, style in zip(study.experiments, _looks(study), strict=True) if e.has_log]
    groups = list(dict.fromkeys(experiment.group for experiment, _ in trained))
    for group in groups:
        logs = [
            (experiment.name, style, [log for run in experiment.runs if (log := log_of(study, run))])
            for experiment, style in trained
            if experiment.group == group
        ]
        title = f"Training loss, {group}" if len(groups) > 1 else "Training loss"
        caption = (
            f"Loss by training step, running mean over 1/{_SMOOTHED} of the log; over several seeds their mean, and a "
            "band from the lowest to the highest."
        )
        having = {task for _, _, of_runs in logs for log in of_runs for task in log}
        tasks = [task for task in study.task_set.columns if task in having]
        tasks += [""] if len(tasks) != 1 else []
        names = [name for name, _, _ in logs]
        margin = (0.4 + (_width(names) + 0.8 if len(names) > 1 else 0), 0.8)
        figure, panels = _new_figure(len(tasks), (2.5, 1.9), margin, title, caption, 4, 3, sharex=True)
        lines = {}
        for task, panel in zip(tasks, panels, strict=True):
            for index, (name, style, of_runs) in enumerate(logs):
                curves = [log[task] for log in of_runs if log.get(task)]
                if curves:
                    lines[name] = _line(panel, curves, style, index)
            panel.set_title(study.task_set.title(task) if task else "All tasks", fontweight=None if task else "bold")
            panel.set_ylim(bottom=0)
            # Few enough for any width: were there more once the layout is settled, the last could reach over the edge.
            panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
            panel.grid()
            panel.tick_params(labelbottom=True)
        if len(names) > 1:
            figure.legend(lines.values(), lines.keys(), loc="outside right upper", handlelength=3)
        yield Drawing(f"training_loss_{_slug(group)}" if len(groups) > 1 else "training_loss", title, caption, figure)


def _line(panel: "Axes", curves: Sequence[dict[int, float]], style: dict, index: int):
    """The mean over curves (one a seed) of their running means, with a band from the lowest to the highest."""
    import pandas

    means = [pandas.Series(c).rolling(max(1, len(c) // _SMOOTHED), min_periods=1).mean() for c in curves]
    # A line of the log lacks a task that no row of its steps was of.
    smooth = pandas.concat(means, axis=1).sort_index().interpolate(method="index", limit_direction="both")
    steps = smooth.index
    if len(curves) > 1:
        panel.fill_between(steps, smooth.min(axis=1), smooth.max(axis=1), color=style["color"], alpha=0.15, linewidth=0)
    # Lines that lie on each other are told apart by their markers, which therefore do not.
    apart = max(1, len(steps) // 8)
    marks = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.4}
    marks["markevery"] = (index * apart // len(COLOURS), apart)
    return panel.plot(steps, smooth.mean(axis=1), **style, linewidth=1.3, **marks)[0]


def _mixture(study: Study) -> Iterator[Drawing]:
    """With which weights each task mixes up-projections or experts, layer by layer.

    Of an experiment's first run: the order of the parts is another one with each seed.
    """
    import numpy as np

    for experiment in study.experiments:
        found = [(run, each) for run in experiment.runs if (each := analysis_of(study, run)) and each.mixture]
        if not found:
            continue
        run, analysis = found[0]
        modules: dict[str, list] = {}
        for layer in (layer for layer in analysis.layers if layer in analysis.mixture):
            row = np.ravel(np.array(analysis.mixture[layer], dtype=float))
            modules.setdefault(layer.rpartition(".")[2], []).append(row)
        if np.isnan(np.concatenate([row for rows in modules.values() for row in rows])).all():
            continue  # a training that went to NaN
        width, tallest = len(row), max(map(len, modules.values()))
        labels = [study.task_set.title(task) for task in analysis.tasks]
        parts = width // len(labels)
        title = f"Mixture weights, {experiment.name}" + (f", seed {run.seed}" if run.seed is not None else "")
        caption = (
            f"Each row a layer, from the first (above) to the last; within a task's columns its weights of the {parts} "
            f"up-projections or experts, which sum to 1 (equal weights: {1 / parts:.3g})."
        )
        panel = (min(max(2.6, 0.12 * width + 0.6), 5.5), min(max(1.0, 0.085 * tallest), 4) + 0.6 + 0.7 * _width(labels))
        figure, panels = _new_figure(len(modules), panel, (1, 0.6), title, caption, 2)
        apart = -(-len(labels) // 24)
        for panel, (name, rows) in zip(panels, modules.items(), strict=True):
            image = panel.imshow(rows, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            panel.set_title(name)
            panel.yaxis.get_major_locator().set_params(integer=True)
            centres = [index * parts + (parts - 1) / 2 for index in range(0, len(labels), apart)]
            _name_columns(panel, centres, labels[::apart])
            for index in range(1, len(labels)):
                panel.axvline(index * parts - 0.5, color="white", linewidth=1.2 if apart == 1 else 0.4)
        _colour_bar(figure, image, panels, "weight")
        yield Drawing(f"mixture_{_slug(experiment.name)}", title, caption, figure)


def _similarity(study: Study) -> Iterator[Drawing]:
    """How alike the tasks are to an adapter: cosines of Lambda_t and of updates; and of updates by module."""
    for experiment in study.experiments:
        analyses = [analysis for run in experiment.runs if (analysis := analysis_of(study, run))]
        analyses = [analysis for analysis in analyses if len(analysis.tasks) > 1]
        for name, of, matrices in (
            ("similarity", "tasks", [each.similarities for each in analyses]),
            ("similarity_by_module", "tasks' updates by module", [a.update_similarity_by_module for a in analyses]),
        ):
            matrices = [of_seed for of_seed in matrices if of_seed]
            if matrices:
                title = f"Similarity of {of}, {experiment.name}"
                figure, caption = _similarities(study, title, matrices, analyses[0].tasks)
                yield Drawing(f"{name}_{_slug(experiment.name)}", title, caption, figure)


def _similarities(study: Study, title: str, matrices: Sequence[dict[str, Matrix]], tasks: list[str]):
    """(figure, caption): a heat map a kind, each the mean over seeds."""
    import numpy as np

    seeds = f" and {len(matrices)} seeds" if len(matrices) > 1 else ""
    caption = f"Cosine under the Frobenius inner product, mean over layers{seeds}; empty where one of the two is zero."
    written = len(tasks) <= MOST_WRITTEN
    caption += "" if written else f" Numbers are written in for up to {MOST_WRITTEN} tasks."
    labels = [study.task_set.title(task) for task in tasks]
    side = max(1.9, (0.42 if written else 0.2) * len(tasks))
    panel, margin = (side + 0.15, side + 0.35), (_width(labels) + 1.1, 0.7 * _width(labels) + 0.7)
    shared = {"layout": "compressed", "sharex": True, "sharey": True}
    figure, panels = _new_figure(len(matrices[0]), panel, margin, title, caption, 3, 2, **shared)
    for kind, panel in zip(matrices[0], panels, strict=True):
        seeds = np.array([of_seed[kind] for of_seed in matrices if kind in of_seed], dtype=float)
        matrix = np.ma.masked_invalid(seeds).mean(axis=0).filled(np.nan)
        # A zero that rounding left has no sign.
        texts = [["" if v != v else f"{round(float(v), 2) + 0.0:.2f}".replace("-", "−") for v in row] for row in matrix]
        mesh = _heat_map(panel, matrix, labels, labels, 1.0, texts if written else [[]])
        panel.set_title(kind)
        panel.set_aspect("equal")
    _colour_bar(figure, mesh, panels, "cosine")
    return figure, caption
