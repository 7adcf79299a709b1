"""With which weights each task mixes the up-projections or experts, layer by layer."""

import re
from typing import TYPE_CHECKING

from mtl_lora.report.figures.heat_map import colour_bar
from mtl_lora.report.figures.picture import GREY, SEQUENTIAL, Picture, new_figure, panels, slug
from mtl_lora.report.study import Experiment, Run, Study
from mtl_lora.report.training_records import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {"mtl_lora": "up-projections", "moelora": "experts"}
_MOST_LABELS = 24


def mixture(study: Study) -> list[Picture]:
    """A picture for each experiment that has mixtures, of its first run: the order of the parts is another a seed."""
    found = []
    for experiment in study.experiments:
        having = [run for run in experiment.runs if run.analysis and _any_number(run.analysis)]
        if having:
            found.append(_picture(study, experiment, having[0]))
    return found


def _any_number(analysis: Analysis) -> bool:
    """Whether there are mixtures, and not of a training that went to NaN alone."""
    return any(weight is not None for matrix in analysis.mixture.values() for row in matrix for weight in row)


def _picture(study: Study, experiment: Experiment, run: Run) -> Picture:
    seed = f", seed {run.seed}" if run.seed is not None else ""
    title = f"Mixture weights, {experiment.name}{seed}"
    count = len(next(iter(run.analysis.mixture.values()))[0])
    caption = (
        f"Each row a layer, from the first (above) to the last; within a task's columns its weights of the {count} "
        f"{_PARTS.get(run.analysis.method, 'parts')}, which sum to 1 (equal weights: {1 / count:.3g})."
    )
    return Picture(
        f"mixture_{slug(experiment.name)}", title, caption, lambda: _draw(study, run.analysis, title, caption)
    )


def _draw(study: Study, analysis: Analysis, title: str, caption: str) -> "Figure":
    import numpy as np

    def rows_of(layers):
        return np.array([np.ravel(np.array(analysis.mixture[layer], dtype=float)) for layer in layers])

    modules: dict[str, list[str]] = {}
    for layer in (layer for layer in analysis.layers if layer in analysis.mixture):
        modules.setdefault(layer.rpartition(".")[2], []).append(layer)
    weights = {name: rows_of(layers) for name, layers in modules.items()}
    width = next(iter(weights.values())).shape[1]
    rows, columns = panels(len(modules), (2,))
    tallest = max(map(len, modules.values()))
    labels = [study.title(task) for task in analysis.tasks]
    edge = 0.075 * max(map(len, labels))
    figure = new_figure(
        columns * min(max(2.6, 0.12 * width + 0.6), 5.5) + 1,
        rows * (min(max(1.0, 0.085 * tallest), 4) + 0.6 + 0.7 * edge) + 0.6,
        title,
        caption,
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    top = max(np.nanmax(matrix) for matrix in weights.values())
    for (name, layers), panel in zip(modules.items(), axes, strict=False):
        image = panel.imshow(weights[name], cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto")
        panel.set_title(name)
        _ticks(panel, layers, labels, width // len(labels))
    for panel in axes[len(modules) :]:
        panel.set_axis_off()
    colour_bar(figure, image, list(axes), "weight")
    return figure


def _ticks(panel, layers: list[str], labels: list[str], parts: int) -> None:
    """Names of tasks below their columns, white lines between them, numbers of layers beside every fifth row."""
    apart = -(-len(labels) // _MOST_LABELS)
    shown = range(0, len(labels), apart)
    centres = [index * parts + (parts - 1) / 2 for index in shown]
    names = [labels[index] for index in shown]
    panel.set_xticks(centres, names, rotation=40, ha="right", va="center", rotation_mode="anchor")
    for index in range(1, len(labels)):
        panel.axvline(index * parts - 0.5, color="white", linewidth=1.2 if apart == 1 else 0.4)
    every = max(1, -(-len(layers) // 7) if len(layers) > 10 else 1)
    numbered = range(0, len(layers), every)
    panel.set_yticks(numbered, [_place(layers[index]) for index in numbered])
    panel.tick_params(length=2, color=GREY)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _place(layer: str) -> str:
    """The number of a layer's block, or the layer's name where there is not exactly one number in it."""
    numbers = re.findall(r"\d+", layer)
    return numbers[0] if len(numbers) == 1 else layer
