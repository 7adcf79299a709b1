"""Accuracy of every experiment, a panel a task: a point and its interval, and the most frequent answer as a line."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.report.figures.picture import DARK, GREY, LIGHT, Picture, look, new_figure, panels
from mtl_lora.report.study import OVER_QUESTIONS, OVER_SEEDS, Study, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Accuracy"
_BARS = {
    OVER_SEEDS: "thick bars: 95 % t interval of the mean over seeds",
    OVER_QUESTIONS: "thin bars: one standard error over the questions of a single run",
}


def accuracy(study: Study) -> list[Picture]:
    """The picture, if anything has a score."""
    if not study.scored:
        return []
    return [Picture("accuracy", TITLE, _caption(study), lambda: _draw(study))]


def _values(study: Study, task: str | None) -> list[Value | None]:
    """By experiment, of one task or of the average."""
    scores = [experiment.scores for experiment in study.experiments]
    return [score.average if task is None else score.tasks.get(task) for score in scores]


def _caption(study: Study) -> str:
    every = [value for task in (None, *study.scored) for value in _values(study, task) if value]
    bars = [text for kind, text in _BARS.items() if any(value.of == kind for value in every)]
    line = ["dashed line: always giving the most frequent answer"] if study.majority else []
    parts = ["accuracy in percent", *bars, *line, "each panel has its own scale"]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _draw(study: Study) -> "Figure":
    tasks: list[str | None] = list(study.scored)
    if len(tasks) > 1 and any(_values(study, None)):
        tasks.append(None)
    rows, columns = panels(len(tasks))
    labels = [experiment.name for experiment in study.experiments]
    width = 2.1 * columns + 0.4 + 0.075 * max(map(len, _wrapped(labels)))
    figure = new_figure(width, rows * (0.75 + 0.22 * len(labels)) + 0.6, TITLE, _caption(study))
    looks = _looks(study)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for task, panel in zip(tasks, axes, strict=False):
        _panel(panel, _values(study, task), looks, _majority(study, task))
        panel.set_title("Average" if task is None else study.title(task), fontweight="bold" if task is None else None)
    for panel in axes[len(tasks) :]:
        panel.set_axis_off()
    axes[0].set_yticks(range(len(labels)), _wrapped(labels))
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _looks(study: Study) -> list[dict]:
    """By experiment: the look that it has among the training losses of its group; grey for a model without training."""
    any_log = any(experiment.has_log for experiment in study.experiments)
    before: Counter[str] = Counter()
    looks = []
    for experiment in study.experiments:
        if experiment.has_log or not any_log:
            looks.append(look(before[experiment.group]))
            before[experiment.group] += 1
        else:
            looks.append({**look(0), "color": GREY})
    return looks


def _panel(panel: "Axes", values: Sequence[Value | None], looks: Sequence[dict], majority: float | None) -> None:
    for index, (value, style) in enumerate(zip(values, looks, strict=True)):
        if value is None:
            continue
        if value.low is not None and value.high is not None:
            low, high = 100 * max(value.low, 0), 100 * min(value.high, 1)
            thick = value.of == OVER_SEEDS
            panel.plot([low, high], [index, index], color=style["color"], linewidth=2.4 if thick else 0.9)
            panel.plot([low, high], [index, index], "|", color=style["color"], markersize=7 if thick else 5)
        panel.plot(
            100 * value.mean,
            index,
            style["marker"],
            color=style["color"],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    if majority is not None:
        panel.axvline(100 * majority, color=DARK, linestyle=(0, (4, 3)), linewidth=1)
    panel.grid(axis="x")
    panel.margins(x=0.08)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", color=LIGHT, labelcolor=GREY)


def _majority(study: Study, task: str | None) -> float | None:
    if task is not None:
        return study.majority.get(task)
    known = [study.majority.get(name) for name in study.tasks.columns]
    return None if None in known else math.fsum(known) / len(known)


def _wrapped(labels: list[str]) -> list[str]:
    return [label if len(label) <= 32 else f"{label[:31]}…" for label in labels]
