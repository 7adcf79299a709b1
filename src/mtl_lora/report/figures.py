"""Figures of studies and runs: whatever they hold numbers for. The same numbers give the same bytes."""

import dataclasses
import importlib.util
import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.report.load import Matrix, analysis_of, load_studies, log_of
from mtl_lora.report.study_model import Difference, Estimate, Experiment, Study
from mtl_lora.report.table import AVERAGE, MAJORITY_LABEL
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
_CAPTION_LINE, _LEGEND_ROW, _LETTER = 0.14, 0.22, 0.075  # inches
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.axisbelow": True,
    "xtick.color": LIGHT,
    "ytick.color": LIGHT,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": DARK,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",  # letters as outlines: the same width everywhere
    "svg.hashsalt": "mtl-lora",
    "image.interpolation": "none",
    "figure.facecolor": "white",
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
        return buffer.getvalue() if style == "svg" else _with_palette(buffer)


def _with_palette(png: io.BytesIO) -> bytes:
    """An image of at most 256 colours, which takes half the bytes."""
    import PIL.Image  # matplotlib brings it

    written = io.BytesIO()
    PIL.Image.open(png).convert("RGB").quantize(256).save(written, "png", optimize=True)
    return written.getvalue()


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
    with _style():
        found = [drawing for kind in (_accuracy, _transfer, _loss, _mixture, _similarity) for drawing in kind(study)]
    names = Counter()
    for index, drawing in enumerate(found):
        names[drawing.name] += 1
        if names[drawing.name] > 1:
            found[index] = dataclasses.replace(drawing, name=f"{drawing.name}_{names[drawing.name]}")
    return found


def write_figures(runs: Sequence[str], output: str | None, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw everything the folders hold numbers for into ``output`` (default: ``figures`` in the one folder).

    Raises ``UserError`` if there is nothing to draw, or several folders and no ``output``.
    """
    if output is None and len(runs) > 1:
        raise UserError("several runs are drawn together; pass --output DIR for their figures")
    own = Path(runs[0]) if Path(runs[0]).is_dir() else Path(runs[0]).parent
    folder = Path(output) if output else own / "figures"
    studies = load_studies(runs)
    contents = {}
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


def _slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "unnamed"


def _width(labels: Sequence[str]) -> float:
    """Inches that the longest label takes."""
    return _LETTER * max(map(len, labels))


def _new_figure(
    count: int, panel: tuple[float, float], margin: tuple[float, float], title: str, caption: str,
    columns: tuple[int, ...] = (4, 3), legend_rows: int = 0, layout: str = "constrained", **shared,
) -> "tuple[Figure, list[Axes], int]":  # fmt: skip
    """(figure, ``count`` panels, columns): a grid of panels (inches) with its title above and its caption below.

    columns: of those, the number that leaves the fewest places empty. The height grows with what stands below.
    """
    from matplotlib.figure import Figure

    columns = min(count, min(columns, key=lambda columns: -count % columns))
    rows = -(-count // columns)
    width = columns * panel[0] + margin[0]
    lines = textwrap.wrap(caption, int(15 * width))  # letters of its size are about 1/15 inch wide
    # The layout keeps room for a legend or for a caption, not for both: empty lines are the legend's room.
    room = math.ceil(legend_rows * _LEGEND_ROW / _CAPTION_LINE)
    height = rows * panel[1] + margin[1] + _CAPTION_LINE * (len(lines) + room)
    figure = Figure(figsize=(width, height), layout=layout)
    # Beside the left edge, wherever the panels begin.
    figure.suptitle(title, x=0.1 / width, ha="left", fontsize=11, fontweight="bold", color=DARK)
    figure.supxlabel("\n" * room + "\n".join(lines), x=0.1 / width, ha="left", fontsize=8, color=GREY)
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, list(axes[:count]), columns


def _heat_map(
    panel: "Axes", matrix, rows: Sequence[str], columns: Sequence[str], limit: float, texts: Sequence[Sequence[str]],
    bold: Callable[[int, int], bool] = lambda row, column: False, label_size: float = 9,
):  # fmt: skip
    """A matrix with NaN for no value, coloured from -limit to limit, and a text in each cell."""
    import numpy as np

    panel.set_facecolor("#f4f4f4")
    mesh = panel.pcolormesh(np.ma.masked_invalid(matrix), cmap="RdBu", vmin=-limit, vmax=limit, edgecolors="white")
    mesh.set_linewidth(0.8)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            # White where a cell is dark, whatever its hue.
            dark = abs(matrix[row][column]) > 0.6 * limit
            weight = "bold" if bold(row, column) else "normal"
            place = (column + 0.5, row + 0.5)
            panel.text(
                *place,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black",
                fontweight=weight,
            )
    panel.set_xticks([index + 0.5 for index in range(len(columns))], columns)
    _turn_labels(panel, 40 if label_size > 8 else 90)
    panel.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    panel.set_ylim(len(rows), 0)
    panel.tick_params(length=0, labelsize=label_size)
    panel.spines[:].set_visible(False)
    return mesh


def _turn_labels(panel: "Axes", degrees: int) -> None:
    for label in panel.get_xticklabels():
        label.set(rotation=degrees, ha="right", va="center", rotation_mode="anchor")


def _colour_bar(figure: "Figure", mesh, panels: Sequence["Axes"], label: str) -> None:
    bar = figure.colorbar(mesh, ax=panels, shrink=0.7, pad=0.02, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=GREY)


# ---- results ----


def _accuracy(study: Study) -> Iterator[Drawing]:
    """Every experiment, a panel a task: a point and its interval, and the majority class as a line."""
    if not study.scored:
        return
    tasks: list[str | None] = list(study.scored)
    if len(tasks) > 1 and any(experiment.summary.average for experiment in study.experiments):
        tasks.append(None)
    found = {task: [experiment.estimate(task) for experiment in study.experiments] for task in tasks}
    metrics = {study.metric(task) for task in tasks}
    name = FRACTIONS.get(metrics.pop(), "Results") if len(metrics) == 1 else "Results"
    with_interval = [value for values in found.values() for value in values if value and value.low is not None]
    parts = [f"{name} in percent" if name != "Results" else "Values by task, fractions in percent"]
    if any(value.sd is not None for value in with_interval):
        parts.append("thick bars: 95 % t interval of the mean over seeds")
    if any(value.sd is None for value in with_interval):
        parts.append("thin bars: one standard error over the questions of a single run")
    parts += [f"dashed line: {MAJORITY_LABEL}"] if study.majority else []
    caption = "; ".join([*parts, "each panel has its own scale."])
    labels = [e.name if len(e.name) <= 32 else f"{e.name[:31]}…" for e in study.experiments]
    panel, margin = (2.1, 0.75 + 0.22 * len(labels)), (0.4 + _width(labels), 0.6)
    figure, panels, _ = _new_figure(len(tasks), panel, margin, name, caption, sharey=True)
    looks, majority = _looks(study), study.majority | {None: study.average_majority}
    for panel, (task, values) in zip(panels, found.items(), strict=True):
        scale = 100 if study.metric(task) in FRACTIONS else 1
        for index, (value, style) in enumerate(zip(values, looks, strict=True)):
            if value:
                _point(panel, value, index, style, scale)
        if majority.get(task) is not None:
            panel.axvline(scale * majority[task], color=DARK, linestyle=(0, (4, 3)), linewidth=1)
        panel.set_title(study.task_set.title(task) if task else AVERAGE, fontweight=None if task else "bold")
        panel.grid(axis="x")
        panel.margins(x=0.08)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    yield Drawing("accuracy", name, caption, figure)


def _point(panel: "Axes", value: Estimate, index: int, style: dict, scale: int) -> None:
    colour = style["color"]
    if value.low is not None:
        ends = [scale * value.low, scale * value.high]
        if scale == 100:
            ends = [max(ends[0], 0), min(ends[1], 100)]
        thick = value.sd is not None
        panel.plot(ends, [index, index], color=colour, linewidth=2.4 if thick else 0.9)
        panel.plot(ends, [index, index], "|", color=colour, markersize=7 if thick else 5)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
    panel.plot(scale * value.mean, index, style["marker"], color=colour, markersize=7, **edge)


def _looks(study: Study) -> list[dict]:
    """By experiment: the look that it has among the training losses of its group; grey for a model without training."""
    any_log, before, looks = any(experiment.has_log for experiment in study.experiments), Counter(), []
    for experiment in study.experiments:
        trained = experiment.has_log or not any_log
        looks.append(look(before[experiment.group]) if trained else {**look(0), "color": GREY})
        before[experiment.group] += trained
    return looks


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
    size = (0.92 * len(columns) + edge + 1.4, 0.46 * len(labels) + 1.6)
    figure, (panel,), _ = _new_figure(1, size, (0, 0), title, caption)
    limit = max(1.0, float(np.nanmax(np.abs(matrix))))
    texts = [[_difference_text(cell) for cell in row] for row in cells]

    def apart_from_zero(row: int, column: int) -> bool:
        cell = cells[row][column]
        return cell is not None and cell.low is not None and not cell.low <= 0 <= cell.high

    mesh = _heat_map(panel, matrix, labels, columns, limit, texts, apart_from_zero)
    panel.axvline(len(study.scored), color=DARK, linewidth=1.2)
    for index, (row, other) in enumerate(zip(study.transfer, study.transfer[1:], strict=False), start=1):
        if row.group != other.group:
            panel.axhline(index, color=DARK, linewidth=1.2)
    _colour_bar(figure, mesh, [panel], "percentage points")
    yield Drawing("transfer", title, caption, figure)


def _difference_text(cell: Difference | None) -> str:
    """``+1.2`` and its interval in a second line."""
    if cell is None:
        return ""
    value, *ends = (
        f"{round(100 * number, 1) + 0.0:+.1f}".replace("-", "−")
        for number in (cell.difference, cell.low, cell.high)
        if number is not None
    )
    return f"{value}\n{' to '.join(ends)}" if ends else value


# ---- trainings ----


def _loss(study: Study) -> Iterator[Drawing]:
    """Training loss by step, a panel a task and one over all: every experiment a line, its seeds as a band."""
    from matplotlib.ticker import MaxNLocator

    trained = [experiment for experiment in study.experiments if experiment.has_log]
    groups = list(dict.fromkeys(experiment.group for experiment in trained))
    for group in groups:
        logs = {e.name: [log_of(study, run) for run in e.runs] for e in trained if e.group == group}
        logs = {name: [log for log in of_runs if log] for name, of_runs in logs.items()}
        title = f"Training loss, {group}" if len(groups) > 1 else "Training loss"
        caption = f"Loss by training step, running mean over 1/{_SMOOTHED} of the log"
        if any(len(of_runs) > 1 for of_runs in logs.values()):
            caption += ", mean over seeds; bands from the lowest seed to the highest"
        caption += "; single values in grey." if len(logs) == 1 else "."
        having = {task for of_runs in logs.values() for log in of_runs for task in log.losses}
        tasks = [task for task in study.task_set.columns if task in having]
        tasks += [""] if len(tasks) != 1 else []
        legend_rows = -(-len(logs) // 4) if len(logs) > 1 else 0
        figure, panels, columns = _new_figure(
            len(tasks), (2.5, 1.9), (0.4, 0.8), title, caption, legend_rows=legend_rows, sharex=True
        )
        lines = {}
        for number, (task, panel) in enumerate(zip(tasks, panels, strict=True)):
            for index, (name, of_runs) in enumerate(logs.items()):
                curves = [curve for log in of_runs if (curve := log.losses.get(task))]
                if curves:
                    lines[name] = _line(panel, curves, index, raw=len(logs) == 1)
            panel.set_title(study.task_set.title(task) if task else "All tasks", fontweight=None if task else "bold")
            panel.set_ylim(bottom=0)
            # Few enough for any width: were there more once the layout is settled, the last could reach over the edge.
            panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
            panel.grid()
            panel.tick_params(labelbottom=True, labelcolor=GREY)
            panel.set_xlabel("step" if number + columns >= len(tasks) else "")
        if legend_rows:
            width, height = figure.get_size_inches()
            above = (_CAPTION_LINE * len(textwrap.wrap(caption, int(15 * width))) + 0.05) / height
            entries = [lines[name] for name in logs if name in lines], [name for name in logs if name in lines]
            place = {"loc": "lower left", "bbox_to_anchor": (0, above), "ncols": min(4, columns + 1)}
            figure.legend(*entries, **place, handlelength=3, labelspacing=0.3).set_in_layout(False)
        yield Drawing(f"training_loss_{_slug(group)}" if len(groups) > 1 else "training_loss", title, caption, figure)


def _line(panel: "Axes", curves: Sequence[dict[int, float]], index: int, raw: bool):
    """The mean over curves (one a seed) of their running means, with a band from the lowest to the highest."""
    import numpy as np

    def running_mean(losses: list[float]) -> list[float]:
        window = max(1, len(losses) // _SMOOTHED)
        return [np.mean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]

    steps = sorted({step for curve in curves for step in curve})
    style = look(index)
    if raw and len(curves) == 1:
        panel.plot(steps, [curves[0][step] for step in steps], color="#b8b8b8", linewidth=0.8)
    # A line of the log lacks a task that no row of its steps was of.
    smooth = np.array([np.interp(steps, list(curve), running_mean(list(curve.values()))) for curve in curves])
    if len(curves) > 1:
        panel.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    # Lines that lie on each other are told apart by their markers, which therefore do not.
    apart = max(1, len(steps) // 8)
    marks = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.4}
    marks["markevery"] = (index * apart // len(COLOURS), apart)
    return panel.plot(steps, smooth.mean(axis=0), **style, linewidth=1.3, **marks)[0]


def _mixture(study: Study) -> Iterator[Drawing]:
    """With which weights each task mixes up-projections or experts, layer by layer.

    Of an experiment's first run: the order of the parts is another one with each seed.
    """
    import numpy as np

    for experiment in study.experiments:
        found = [
            (run, analysis) for run in experiment.runs if (analysis := analysis_of(study, run)) and analysis.mixture
        ]
        if not found:
            continue
        run, analysis = found[0]
        modules: dict[str, list[str]] = {}
        for layer in (layer for layer in analysis.layers if layer in analysis.mixture):
            modules.setdefault(layer.rpartition(".")[2], []).append(layer)
        weights = {
            name: np.array([np.ravel(np.array(analysis.mixture[layer], dtype=float)) for layer in layers])
            for name, layers in modules.items()
        }
        if all(np.isnan(matrix).all() for matrix in weights.values()):
            continue  # a training that went to NaN
        width, tallest = next(iter(weights.values())).shape[1], max(map(len, modules.values()))
        labels = [study.task_set.title(task) for task in analysis.tasks]
        parts = width // len(labels)
        title = f"Mixture weights, {experiment.name}" + (f", seed {run.seed}" if run.seed is not None else "")
        caption = (
            f"Each row a layer, from the first (above) to the last; within a task's columns its weights of the {parts} "
            f"up-projections or experts, which sum to 1 (equal weights: {1 / parts:.3g})."
        )
        panel = (min(max(2.6, 0.12 * width + 0.6), 5.5), min(max(1.0, 0.085 * tallest), 4) + 0.6 + 0.7 * _width(labels))
        figure, panels, _ = _new_figure(len(modules), panel, (1, 0.6), title, caption, columns=(2,))
        top = max(np.nanmax(matrix) for matrix in weights.values())
        apart = -(-len(labels) // 24)
        for panel, (name, layers) in zip(panels, modules.items(), strict=True):
            image = panel.imshow(weights[name], cmap="cividis", vmin=0, vmax=top, aspect="auto")
            panel.set_title(name)
            centres = [index * parts + (parts - 1) / 2 for index in range(0, len(labels), apart)]
            panel.set_xticks(centres, labels[::apart])
            _turn_labels(panel, 40)
            for index in range(1, len(labels)):
                panel.axvline(index * parts - 0.5, color="white", linewidth=1.2 if apart == 1 else 0.4)
            numbered = range(0, len(layers), max(1, -(-len(layers) // 7)) if len(layers) > 10 else 1)
            panel.set_yticks(numbered, [_block(layers[index]) for index in numbered])
            panel.tick_params(length=2)
            panel.spines[:].set_visible(False)
        _colour_bar(figure, image, panels, "weight")
        yield Drawing(f"mixture_{_slug(experiment.name)}", title, caption, figure)


def _block(layer: str) -> str:
    """The number of a layer's block, or the layer's name where there is not exactly one number in it."""
    numbers = re.findall(r"\d+", layer)
    return numbers[0] if len(numbers) == 1 else layer


def _similarity(study: Study) -> Iterator[Drawing]:
    """How alike the tasks are to an adapter: cosines of Lambda_t and of updates; and of updates by module."""
    for experiment in study.experiments:
        analyses = [analysis for run in experiment.runs if (analysis := analysis_of(study, run))]
        analyses = [analysis for analysis in analyses if len(analysis.tasks) > 1]
        for name, title, matrices in (
            ("similarity", "Similarity of tasks", [a.similarities for a in analyses]),
            (
                "similarity_by_module",
                "Similarity of tasks' updates by module",
                [a.update_similarity_by_module for a in analyses],
            ),
        ):
            matrices = [of_seed for of_seed in matrices if of_seed]
            if matrices:
                yield _similarities(study, experiment, name, title, matrices, analyses[0].tasks)


def _similarities(
    study: Study, experiment: Experiment, name: str, title: str, matrices: Sequence[dict[str, Matrix]], tasks: list[str]
) -> Drawing:
    """A heat map a kind, each the mean over seeds."""
    import numpy as np

    title = f"{title}, {experiment.name}"
    seeds = f" and {len(matrices)} seeds" if len(matrices) > 1 else ""
    caption = f"Cosine under the Frobenius inner product, mean over layers{seeds}; empty where one of the two is zero."
    written = len(tasks) <= MOST_WRITTEN
    caption += "" if written else f" Numbers are written in for up to {MOST_WRITTEN} tasks."
    labels = [study.task_set.title(task) for task in tasks]
    side = max(1.9, min(0.42, 6 / len(tasks)) * len(tasks))
    label_size = min(9, 60 * side / len(tasks))  # points; 72 would fill a cell
    margin = (_width(labels) + 1.1, 0.7 * _width(labels) + 0.7)
    figure, panels, _ = _new_figure(
        len(matrices[0]), (side + 0.15, side + 0.35), margin, title, caption,
        columns=(3, 2), layout="compressed", sharex=True, sharey=True,
    )  # fmt: skip
    for kind, panel in zip(matrices[0], panels, strict=True):
        stacked = np.array([of_seed[kind] for of_seed in matrices if kind in of_seed], dtype=float)
        counts = np.isfinite(stacked).sum(axis=0)
        matrix = np.where(counts > 0, np.nansum(stacked, axis=0) / np.maximum(counts, 1), np.nan)
        # A zero that rounding left has no sign.
        texts = [["" if v != v else f"{round(float(v), 2) + 0.0:.2f}".replace("-", "−") for v in row] for row in matrix]
        mesh = _heat_map(panel, matrix, labels, labels, 1.0, texts if written else (), label_size=label_size)
        panel.set_title(kind)
        panel.set_aspect("equal")
    _colour_bar(figure, mesh, panels, "cosine")
    return Drawing(f"{name}_{_slug(experiment.name)}", title, caption, figure)
