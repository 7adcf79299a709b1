"""Figures of studies and runs: everything they hold numbers for. The same numbers give the same bytes."""

import dataclasses
import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.errors import UserError
from mtl_lora.files import write_all
from mtl_lora.metrics import difference_text, range_of, scale_of, title_of, units_text
from mtl_lora.report.load import Study, analysis_of, load_studies, log_of
from mtl_lora.report.table import AVERAGE, MAJORITY_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
# Okabe and Ito's colours, distinct for any colour vision, without the yellow, which is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
GREY = "#666666"
MOST_WRITTEN = 12  # the most tasks for which numbers fit into the cells of a matrix
_AT_START = "Start's mixtures: the trained updates, mixed with the random weights that the seed drew."
_NO_START = "The random start was not kept, so how much of this was learned is unknown."
_BAR = {"shrink": 0.7, "aspect": 30}  # the colour bar beside a matrix
_SMOOTHED = 20  # the running mean of a loss spans 1/20 of the lines of its log


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure. name: stem of its file name. caption: says what it shows and what bars, bands and colours mean."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    def render(self, style: str) -> bytes:
        """Return the figure as ``svg`` or ``png``; the bytes do not depend on the time or on the user's settings."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": self.title} if style == "svg" else {"Software": None}
        with _style():
            self.figure.savefig(buffer, format=style, metadata=metadata)
        if style == "svg":
            return buffer.getvalue()
        import PIL.Image  # a dependency of matplotlib

        written = io.BytesIO()  # at most 256 colours, which halves the size
        PIL.Image.open(buffer).convert("RGB").quantize(256).save(written, "png", optimize=True)
        return written.getvalue()


def _style():
    """A context with the settings for drawing and saving figures, in place of the user's own."""
    import matplotlib.style

    return matplotlib.style.context(["default", Path(__file__).with_suffix(".mplstyle")])


def draw(study: Study, analyses: bool = True) -> list[Drawing]:
    """Draw every figure that a study or a run has numbers for, with unique names. analyses: with those of adapters."""
    with _style():
        kinds = [_accuracy, _transfer, _loss] + [_mixture, _similarity] * analyses
        found = [each for kind in kinds for each in kind(study)]
    names = _numbered([drawing.name for drawing in found])
    return [dataclasses.replace(drawing, name=name) for drawing, name in zip(found, names, strict=True)]


def write_figures(runs: Sequence[str], output: str | None, formats: Sequence[str] = FORMATS, **kinds) -> list[Path]:
    """Write every figure that ``draw`` makes of the folders into ``output`` (None: the folder's ``figures``); return
    the paths; raises ``UserError`` if there is nothing to draw, and for several folders without ``output``."""
    if output is None and len(runs) > 1:
        raise UserError("figures of several runs need a folder of their own; pass --output DIR")
    own = Path(runs[0]) if Path(runs[0]).is_dir() else Path(runs[0]).parent
    folder, studies, contents = Path(output) if output else own / "figures", load_studies(runs), {}
    names = _numbered([_slug(study.name) for study in studies])
    for study, name in zip(studies, names, strict=True):
        prefix = f"{name}_" if len(studies) > 1 else ""
        for drawing in draw(study, **kinds):
            contents |= {folder / f"{prefix}{drawing.name}.{style}": drawing.render(style) for style in formats}
    if not contents:
        raise UserError(f"there is nothing to draw in {', '.join(map(str, runs))}")
    write_all(contents)
    return list(contents)


# ---- shared by all figures ----


def look(index: int) -> dict:
    """Colour, marker and line style of a study's index-th experiment; among seven, each of the three is unique."""
    turned = (index + index // len(COLOURS)) % len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[turned], "linestyle": LINES[turned]}


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the names, with ``_2`` and so on appended to repeated ones."""
    found: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        found.append(next(each for each in candidates if each not in found))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "unnamed"


def _width(labels: Collection[str]) -> float:
    """Width in inches of the longest label."""
    return 0.075 * max(map(len, labels))


def _drawing(
    words: tuple[str, str, str], count: int, panel: tuple[float, float], margin: tuple[float, float], *columns, **axes
) -> "tuple[Drawing, list[Axes]]":
    """Return a drawing with a grid of ``count`` panels, its title above and its caption below, and the panels.

    words: name, title, caption. panel: width and height of a panel in inches; margin: what the figure needs besides.
    columns: candidates for the number of columns; the one that leaves the fewest empty places is used.
    """
    from matplotlib.figure import Figure

    (_, title, caption), across = words, min(count, min(columns, key=lambda columns: -count % columns))
    down, width = -(-count // across), across * panel[0] + margin[0]
    lines = textwrap.wrap(caption, int(15 * width))  # letters of its size are about 1/15 inch wide
    size = (width, down * panel[1] + margin[1] + 0.14 * len(lines))
    figure, left = Figure(figsize=size, layout=axes.pop("layout", "constrained")), {"x": 0.1 / width, "ha": "left"}
    figure.suptitle(title, **left, fontsize=11, fontweight="bold")
    figure.supxlabel("\n".join(lines), **left, fontsize=8, color=GREY)
    panels = figure.subplots(down, across, squeeze=False, **axes).flatten()
    for empty in panels[count:]:
        empty.set_axis_off()
    return Drawing(*words, figure), list(panels[:count])


def _heat_map(panel: "Axes", matrix, rows: Sequence[str], columns: Sequence[str], limit: float, texts, bold=()):
    """Draw a matrix (NaN: no value) in colours from -limit to limit. texts: of the cells; bold: cells in bold."""
    import numpy as np

    panel.set_facecolor("#f4f4f4")
    mesh = panel.pcolormesh(np.ma.masked_invalid(matrix), cmap="RdBu", vmin=-limit, vmax=limit, edgecolors="white")
    for (row, column), text in np.ndenumerate(np.array(texts, dtype=object)):
        text = "" if text == "nan" else text
        ink = "white" if abs(matrix[row][column]) > 0.6 * limit else "black"
        weight = "bold" if (row, column) in bold else "normal"
        panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=7.5, color=ink, weight=weight)
    panel.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    panel.set_ylim(len(rows), 0)
    _name_columns(panel, [index + 0.5 for index in range(len(columns))], columns)
    return mesh


def _name_columns(panel: "Axes", places: Sequence[float], names: Sequence[str]) -> None:
    """Write slanted names below the columns of a matrix, and remove its frame."""
    panel.set_xticks(places, names, rotation=40, ha="right", va="center", rotation_mode="anchor")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


# ---- results ----


def _accuracy(study: Study) -> Iterator[Drawing]:
    """Scores: a panel per task with a point and its interval per experiment, and the majority class as a line."""
    tasks: list[str | None] = list(study.scored)
    if not tasks:
        return
    tasks += [None] if len(tasks) > 1 and any(each.summary.average for each in study.experiments) else []
    metrics = {study.metric(task) for task in tasks if task}
    title = title_of(*metrics) if len(metrics) == 1 else "Results"
    line = f"dashed line: {MAJORITY_LABEL}; " if study.majority else ""
    caption = f"{units_text(metrics)}bars: 95 % t interval of the mean over seeds (thick), or one standard error over "
    caption += f"the questions of a single run (thin), cut at a panel's edges; {line}each panel has its own scale. "
    caption += " ".join([*study.untrained_notes, *(study.notes if study.facts else ())])
    names = [experiment.name for experiment in study.experiments]
    labels = [name if len(name) <= 40 else f"{name[:12]} … {name[-25:]}" for name in names]
    labels = labels if len({*labels}) == len({*names}) else names
    size, margin = (2.1, 0.75 + 0.22 * len(labels)), (0.4 + _width(labels), 0.6)
    drawing, panels = _drawing(("accuracy", title, caption), len(tasks), size, margin, 4, 3, sharey=True)
    for panel, task in zip(panels, tasks, strict=True):
        scale = scale_of(study.metric(task))
        values = [(index, value) for index, each in enumerate(study.experiments) if (value := each.estimate(task))]
        for index, value in values:
            ends = value.low is not None and [[scale * (value.mean - value.low)], [scale * (value.high - value.mean)]]
            style = {"fmt": look(index)["marker"], "color": look(index)["color"], "capsize": 3}
            width = 0.9 if value.sd is None else 2.4
            panel.errorbar(scale * value.mean, index, xerr=ends or None, elinewidth=width, **style)
        points = [scale * value.mean for _, value in values]
        if task in study.majority:
            points.append(scale * study.majority[task])
            panel.axvline(points[-1], color="black", linestyle="--", linewidth=1)
        # The interval over two seeds can be many times wider than all differences, so it does not set the limits.
        widths = [scale * (value.high - value.low) for _, value in values if value.low is not None]
        room = max(max(points) - min(points), statistics.median(widths or [0])) or math.inf
        lowest, highest = range_of(study.metric(task))
        low = max(min(points) - room, min(lowest, *points))
        high = min(max(points) + room, max(highest, *points))
        panel.set_xlim(*(min(max(edge, low), high) for edge in panel.get_xlim()))
        named = [study.metric(task)] * (len(metrics) > 1)
        name = study.task_set.title(task, *named).replace(" (", "\n(") if task else AVERAGE
        panel.set_title(name, fontweight=None if task else "bold")
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    yield drawing


def _transfer(study: Study) -> Iterator[Drawing]:
    """Transfer: each task trained together minus trained alone, with intervals."""
    import numpy as np

    # Colours compare tasks, which needs one unit for all.
    if not study.transfer or not study.has_average or scale_of(study.metric(None)) != 100:
        return
    caption = "Difference in percentage points, its 95 % interval over the questions below; bold if that and the one "
    caption += f"over seeds leave out 0. Red: worse together; blue: better. {' '.join(study.untrained_notes)}"
    labels, tasks = [row.label for row in study.transfer], [*study.scored, None]
    columns, metrics = [study.task_set.title(task) if task else AVERAGE for task in tasks], [*map(study.metric, tasks)]
    texts = np.full((len(labels), len(tasks)), "", dtype=object)
    matrix, bold = np.full(texts.shape, np.nan), set()
    for place in np.ndindex(texts.shape):
        row, task, metric = study.transfer[place[0]], tasks[place[1]], metrics[place[1]]
        found = [side.tasks.get(task) if task else side.average for side in (row, row.over_seeds) if side]
        if cell := found[0]:
            matrix[place] = 100 * cell.difference
            texts[place] = difference_text(cell, metric).replace(" (", "\n").rstrip(")").replace("-", "−")
            if all(each.low is not None and not each.low <= 0 <= each.high for each in found if each):
                bold.add(place)
    size, margin = (0.92 * len(columns), 0.46 * len(labels)), (_width(labels) + 1.4, 1.6)
    drawing, panels = _drawing(("transfer", "Trained together, minus trained alone", caption), 1, size, margin, 1)
    mesh = _heat_map(panels[0], matrix, labels, columns, max(1.0, float(np.nanmax(np.abs(matrix)))), texts, bold)
    drawing.figure.colorbar(mesh, ax=panels, **_BAR, label="percentage points")
    yield drawing


# ---- trainings ----


def _loss(study: Study) -> Iterator[Drawing]:
    """Training loss by step: a panel for each task and one for all tasks; an experiment is a line, its seeds a band."""
    import pandas
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list] = {}
    for index, experiment in enumerate(study.experiments):
        if logs := [log for run in experiment.runs if (log := log_of(study, run))]:
            groups.setdefault(experiment.group, []).append((index, experiment.name, logs))
    for group, trained in groups.items():
        title = f"Training loss, {group}" if len(groups) > 1 else "Training loss"
        caption = f"Loss by training step, running mean over 1/{_SMOOTHED} of the log; of several seeds the mean, "
        caption += "and a band from the lowest to the highest."
        having = {task for _, _, logs in trained for log in logs for task in log}
        tasks = [task for task in study.task_set.columns if task in having]
        tasks += [""] if len(tasks) != 1 else []
        legend = _width([name for _, name, _ in trained]) + 0.8 if len(trained) > 1 else 0
        words, margin, lines = (_slug(title), title, caption), (0.4 + legend, 0.8), {}
        drawing, panels = _drawing(words, len(tasks), (2.5, 1.9), margin, 4, 3, sharex=True)
        for task, panel in zip(tasks, panels, strict=True):
            for index, label, logs in trained:
                curves = [pandas.Series(log[task]) for log in logs if log.get(task)]
                if not curves:
                    continue
                curves = [each.rolling(max(1, len(each) // _SMOOTHED), min_periods=1).mean() for each in curves]
                # A line of the log has no loss for a task without rows in its steps.
                frame = pandas.concat(curves, axis=1).sort_index().interpolate("index", limit_direction="both")
                low, high, style = frame.min(axis=1), frame.max(axis=1), look(index)
                panel.fill_between(frame.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
                marks = {"markersize": 4, "markevery": max(1, len(frame) // 8), "linewidth": 1.3}
                (lines[label],) = panel.plot(frame.index, frame.mean(axis=1), **style, **marks)
            panel.set_title(study.task_set.title(task) if task else "All tasks", fontweight=None if task else "bold")
            panel.set_ylim(bottom=0)
            # Few ticks at any width: more could appear after the layout is set, and the last would cross the edge.
            panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
            panel.grid()
            panel.tick_params(labelbottom=True)
        if legend:
            drawing.figure.legend(lines.values(), lines.keys(), loc="outside right upper", handlelength=3)
        yield drawing


def _mixture(study: Study) -> Iterator[Drawing]:
    """Mixture weights of each task over up-projections or experts by layer, and their change from the random start.

    The change matters because the random start alone already makes tasks differ. Only an experiment's first run is
    drawn, since the order of the up-projections or experts differs between seeds.
    """
    import numpy as np

    for experiment in study.experiments:
        mixing = ((run, each) for run in experiment.runs if (each := analysis_of(study, run)) and each.mixture)
        run, analysis = next(mixing, (None, None))
        modules, started = {}, {}  # by the module's name, a row of weights for each layer
        for layer in analysis.layers if run else ():
            for by_module, mixture in ((modules, analysis.mixture), (started, analysis.mixture_at_start)):
                if layer in (mixture or ()):
                    row = np.ravel(np.array(mixture[layer], dtype=float))
                    by_module.setdefault(layer.rpartition(".")[2], []).append(row)
        if all(np.isnan(row).all() or np.ptp(row) == 0 for rows in modules.values() for row in rows):
            continue  # no mixture, equal or single weights everywhere, or NaN after a training that diverged
        width, labels = len(next(iter(modules.values()))[0]), [study.task_set.title(task) for task in analysis.tasks]
        parts, apart = width // len(labels), -(-len(labels) // 24)
        title = f"Mixture weights, {experiment.name}" + (f", seed {run.seed}" if run.seed is not None else "")
        caption = "Each row is a layer, from the first (top) to the last. A task's columns are its weights of the "
        caption += f"{parts} up-projections or experts, which sum to 1 (equal weights: {1 / parts:.3g}). "
        pair = [np.concatenate([np.ravel(rows) for rows in each.values()]) for each in (modules, started) if each]
        if not started:
            caption += _NO_START
        elif min(map(np.ptp, pair)) > 1e-5:  # files hold six decimals
            caption += f"Correlation with the random start: {np.corrcoef(*pair)[0, 1]:.3f}."
        height = min(max(1.0, 0.085 * max(map(len, modules.values()))), 4) + 0.6 + 0.7 * _width(labels)
        size = (min(max(2.6, 0.12 * width + 0.6), 5.5), height)
        top = max(np.nanmax(rows) for rows in modules.values())
        shown, change = [], {"cmap": "RdBu", "vmin": -top, "vmax": top}
        for name, rows in modules.items():
            shown.append((name, rows, {"cmap": "cividis", "vmin": 0, "vmax": top}))
            if started:  # of the same layers
                shown.append((f"{name}, change from the start", np.subtract(rows, started[name]), change))
        words = f"mixture_{_slug(experiment.name)}", title, caption
        drawing, panels = _drawing(words, len(shown), size, (1.6, 0.6), 2)
        for panel, (name, rows, colours) in zip(panels, shown, strict=True):
            image = panel.imshow(rows, aspect="auto", **colours)
            panel.set_title(name)
            panel.yaxis.get_major_locator().set_params(integer=True)
            _name_columns(panel, np.arange(0, len(labels), apart) * parts + (parts - 1) / 2, labels[::apart])
            for index in range(1, len(labels)):
                panel.axvline(index * parts - 0.5, color="white", linewidth=1.2 / apart)
        for image in panels[0].images + panels[-1].images[: len(started)]:
            drawing.figure.colorbar(image, ax=panels, **_BAR, label="weight" if image in panels[0].images else "change")
        yield drawing


def _similarity(study: Study) -> Iterator[Drawing]:
    """Similarity of tasks in an adapter: heat maps of the cosines, mean over seeds, of Lambda_t, of updates, and of
    updates with the start's mixtures."""
    import numpy as np

    for experiment in study.experiments:
        analyses = [each for run in experiment.runs if (each := analysis_of(study, run)) and len(each.tasks) > 1]
        found = [each.similarities for each in analyses]
        if not any(found):
            continue
        labels = [study.task_set.title(task) for task in analyses[0].tasks]
        written = len(labels) <= MOST_WRITTEN
        caption = f"Cosine under the Frobenius inner product, mean over layers and seeds ({len(found)}); empty where "
        caption += f"one of the two is zero. {_AT_START if analyses[0].mixture_at_start else _NO_START}"
        caption += "" if written else f" Numbers are written for up to {MOST_WRITTEN} tasks."
        side = max(1.9, (0.42 if written else 0.2) * len(labels))
        size, margin = (side + 0.15, side + 0.35), (_width(labels) + 1.1, 0.7 * _width(labels) + 0.7)
        shared = {"layout": "compressed", "sharex": True, "sharey": True}
        words = f"similarity_{_slug(experiment.name)}", f"Similarity of tasks, {experiment.name}", caption
        drawing, panels = _drawing(words, len(found[0]), size, margin, 2, **shared)
        for kind, panel in zip(found[0], panels, strict=True):
            seeds = np.array([of_seed[kind] for of_seed in found if kind in of_seed], dtype=float)
            matrix = np.ma.masked_invalid(seeds).mean(axis=0).filled(np.nan)
            # A value that rounds to zero is shown without a sign.
            texts = [[f"{round(v, 2) + 0.0:.2f}".replace("-", "−") for v in row] for row in matrix]
            mesh = _heat_map(panel, matrix, labels, labels, 1.0, texts if written else [[]])
            panel.set(title=kind, aspect="equal")
        drawing.figure.colorbar(mesh, ax=panels, **_BAR, label="cosine")
        yield drawing
