"""How alike the tasks are to an adapter: cosines of their Lambda_t and of their updates."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mtl_lora.report.figures.heat_map import MOST_WRITTEN, colour_bar, heat_map
from mtl_lora.report.figures.picture import Picture, new_figure, panels, slug
from mtl_lora.report.study import Experiment, Study
from mtl_lora.report.training_records import SIMILARITIES, Analysis, Matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def similarity(study: Study) -> list[Picture]:
    """For each experiment whose adapters differ between tasks: one of all layers, one of its updates by module."""
    found = []
    for experiment in study.experiments:
        analyses = [run.analysis for run in experiment.runs if run.analysis]
        for kind, of, title in (
            ("similarity", lambda analysis: _in_words(analysis), "Similarity of tasks"),
            ("similarity_by_module", lambda analysis: analysis.by_module, "Similarity of tasks' updates by module"),
        ):
            having = [analysis for analysis in analyses if len(analysis.tasks) > 1 and of(analysis)]
            if having:
                found.append(_picture(study, experiment, having, kind, of, title))
    return found


def _in_words(analysis: Analysis) -> dict[str, Matrix]:
    return {SIMILARITIES[key]: matrix for key, matrix in analysis.similarities.items()}


def _picture(
    study: Study,
    experiment: Experiment,
    analyses: list[Analysis],
    kind: str,
    of: Callable[[Analysis], dict[str, Matrix]],
    title: str,
) -> Picture:
    title = f"{title}, {experiment.name}"
    means = f" and {len(analyses)} seeds" if len(analyses) > 1 else ""
    caption = f"Cosine under the Frobenius inner product, mean over layers{means}; empty where one of the two is zero."
    if len(analyses[0].tasks) > MOST_WRITTEN:
        caption += f" Numbers are written in for up to {MOST_WRITTEN} tasks."
    return Picture(
        f"{kind}_{slug(experiment.name)}", title, caption, lambda: _draw(study, analyses, of, title, caption)
    )


def _draw(
    study: Study, analyses: list[Analysis], of: Callable[[Analysis], dict[str, Matrix]], title: str, caption: str
) -> "Figure":
    tasks = analyses[0].tasks
    names = list(of(analyses[0]))
    rows, columns = panels(len(names), (3, 2))
    side = max(1.9, min(0.42, 6 / len(tasks)) * len(tasks))
    labels = [study.title(task) for task in tasks]
    label_size = min(9, 60 * side / len(tasks))  # points; 72 would fill a cell
    edge = 0.075 * max(map(len, labels))
    height = rows * (side + 0.35) + 0.7 * edge + 0.7
    figure = new_figure(columns * (side + 0.15) + edge + 1.1, height, title, caption, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for name, panel in zip(names, axes, strict=False):
        matrix = _mean([of(analysis)[name] for analysis in analyses if name in of(analysis)])
        written = len(tasks) <= MOST_WRITTEN
        mesh = heat_map(panel, matrix, labels, labels, 1.0, _text(matrix) if written else None, label_size=label_size)
        panel.set_title(name)
        panel.set_aspect("equal")
    # Shared axes were turned upside down once a panel.
    axes[0].set_ylim(len(tasks), 0)
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    colour_bar(figure, mesh, list(axes), "cosine")
    return figure


def _mean(matrices: list[Matrix]):
    """Mean over seeds of what is defined, NaN elsewhere."""
    import numpy as np

    stacked = np.array(matrices, dtype=float)
    counts = np.isfinite(stacked).sum(axis=0)
    sums = np.nansum(stacked, axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _text(matrix) -> Callable[[int, int], str]:
    def text(row: int, column: int) -> str:
        value = matrix[row, column]
        if value != value:
            return ""
        # A zero that rounding left has no sign.
        return f"{round(float(value), 2) + 0.0:.2f}".replace("-", "−")

    return text
