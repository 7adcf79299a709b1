"""Training loss by step, a panel a task and one over all: every experiment a line, its seeds as a band."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.report.figures.picture import COLOURS, GREY, LIGHT, Picture, legend_below, look, new_figure, panels, slug
from mtl_lora.report.study import Experiment, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Training loss"
_ALL = ""  # the key of the loss over all tasks
_MARKS = 8  # markers on a line
_RAW = "#b8b8b8"
_SMOOTHED = 20  # a mean over one in so many of the log's lines


def training_loss(study: Study) -> list[Picture]:
    """A picture for each group of experiments of which there is a log."""
    trained = [experiment for experiment in study.experiments if experiment.has_log]
    groups = list(dict.fromkeys(experiment.group for experiment in trained))
    return [
        _picture(study, [experiment for experiment in trained if experiment.group == group], group, len(groups) > 1)
        for group in groups
    ]


def _picture(study: Study, experiments: list[Experiment], group: str, named: bool) -> Picture:
    title = f"{TITLE}, {group}" if named else TITLE
    name = f"training_loss_{slug(group)}" if named else "training_loss"
    seeds = any(len(experiment.runs) > 1 for experiment in experiments)
    caption = f"Loss per answer token by training step, running mean over 1/{_SMOOTHED} of the log"
    if seeds:
        caption += ", mean over seeds; bands from the lowest seed to the highest"
    elif len(experiments) == 1:
        caption += "; single values in grey"
    caption += "."
    return Picture(name, title, caption, lambda: _draw(study, experiments, title, caption))


def _draw(study: Study, experiments: list[Experiment], title: str, caption: str) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    having = {key for experiment in experiments for run in experiment.runs if run.log for key in run.log.losses}
    tasks = [name for name in study.tasks.columns if name in having]
    keys = [*tasks, _ALL] if len(tasks) != 1 else tasks
    rows, columns = panels(len(keys))
    legend_rows = -(-len(experiments) // (columns + 1)) if len(experiments) > 1 else 0
    figure = new_figure(2.5 * columns + 0.4, 1.9 * rows + 0.8, title, caption, legend_rows=legend_rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for key, panel in zip(keys, axes, strict=False):
        for index, experiment in enumerate(experiments):
            curves = [curve for run in experiment.runs if run.log and (curve := run.log.losses.get(key))]
            if curves:
                _line(panel, curves, index, experiment.name, raw=len(experiments) == 1)
        panel.set_title(study.title(key) if key else "All tasks", fontweight=None if key else "bold")
        panel.set_ylim(bottom=0)
        # Few enough for any width: were there more once the layout is settled, the last could reach over the edge.
        panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
        panel.grid()
        panel.tick_params(color=LIGHT, labelcolor=GREY, labelbottom=True)
    for panel in axes[len(keys) :]:
        panel.set_axis_off()
    for index, panel in enumerate(axes[: len(keys)]):
        if index + columns >= len(keys):
            panel.set_xlabel("step", color=GREY)
    if legend_rows:
        legend_below(figure, _entries(figure, experiments), columns + 1, caption)
    return figure


def _line(panel: "Axes", curves: Sequence[dict[int, float]], index: int, name: str, raw: bool) -> None:
    import numpy as np

    steps = sorted({step for curve in curves for step in curve})
    if raw and len(curves) == 1:
        panel.plot(steps, [curves[0][step] for step in steps], color=_RAW, linewidth=0.8)
    # A line of the log lacks a task that no row of its steps was of.
    smooth = np.array([np.interp(steps, list(curve), _running_mean(list(curve.values()))) for curve in curves])
    style = look(index)
    if len(curves) > 1:
        panel.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    # Lines that lie on each other are told apart by their markers, which therefore do not.
    apart = max(1, len(steps) // _MARKS)
    panel.plot(
        steps,
        smooth.mean(axis=0),
        **style,
        linewidth=1.3,
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.4,
        markevery=(index * apart // len(COLOURS), apart),
        label=name,
    )


def _running_mean(losses: list[float]) -> list[float]:
    """The mean of each value and those before it, over one twentieth of the log; shorter at its beginning."""
    import numpy as np

    window = max(1, len(losses) // _SMOOTHED)
    return [np.mean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def _entries(figure: "Figure", experiments: list[Experiment]) -> dict:
    """Name to line, in the experiments' order; a panel may lack one."""
    entries: dict = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    return {experiment.name: entries[experiment.name] for experiment in experiments if experiment.name in entries}
