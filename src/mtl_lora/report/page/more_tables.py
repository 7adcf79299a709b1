"""Tables of what stands behind the scores: runs, the search for settings, the tasks of one run, its losses."""

import math

from mtl_lora.report.page.tables import Cell, PageTable, number_cell, text_cell, with_error
from mtl_lora.report.study import Study

_HASH = 12  # characters shown of a sha256 or commit


def run_tables(study: Study) -> list[PageTable]:
    """Every run of a study: its seed, steps, time, average and hashes."""
    columns = {
        "Steps": lambda facts: number_cell(facts.get("steps")),
        "Training, min": lambda facts: _minutes(facts, "train"),
        "Evaluation, min": lambda facts: _minutes(facts, "evaluate"),
        "Average": lambda facts: _fraction(facts.get("average")),
        "Adapter sha256": lambda facts: _hash(facts.get("adapter_sha256")),
        "Training data sha256": lambda facts: _hash(facts.get("train_data_sha256")),
        "Training commit": lambda facts: _hash(facts.get("train_commit")),
        "Evaluation commit": lambda facts: _hash(facts.get("commit")),
    }
    rows = [
        (text_cell(experiment.name), number_cell(run.seed), *(cell(run.facts) for cell in columns.values()))
        for experiment in study.experiments
        for run in experiment.runs
    ]
    numbers = (False, True, True, True, True, True, False, False, False, False)
    return [PageTable("runs", "Runs", ("Experiment", "Seed", *columns), numbers, tuple(rows))]


def search_tables(study: Study) -> list[PageTable]:
    """Every candidate of a search with its score on development data, if there was one."""
    search = study.facts.get("search")
    if not isinstance(search, dict) or not isinstance(search.get("experiments"), list):
        return []
    rows = [
        (
            text_cell(experiment.get("name")),
            _value(candidate.get("value")),
            _fraction(candidate.get("dev")),
            text_cell("chosen" if candidate.get("value") == experiment.get("chosen") else ""),
        )
        for experiment in search["experiments"]
        for candidate in experiment.get("candidates", [])
    ]
    flag = str(search.get("flag", "value"))
    note = f"Short trainings with each value of --{flag}, scored on development data: average accuracy in percent."
    headings = ("Experiment", flag, "Development average", "Choice")
    numbers = (False, all(isinstance(row[1].key, int | float) for row in rows), True, False)
    return [PageTable("search", "Search", headings, numbers, tuple(rows), (note,))]


def task_tables(study: Study) -> list[PageTable]:
    """One evaluation, a line a task."""
    scores = study.experiments[0].scores.tasks
    if not scores:
        return []
    figures = study.facts["tasks"]
    columns = {
        "Questions": lambda name: number_cell(figures[name].get("n")),
        "Accuracy": lambda name: _fraction(scores[name].mean, figures[name].get("stderr")),
        "Most frequent answer": lambda name: _fraction(study.majority.get(name)),
        "Unparsed": lambda name: _fraction(figures[name].get("unparsed")),
    }
    names = [name for name in study.scored if name in scores]
    columns = {title: cell for title, cell in columns.items() if any(cell(name).key is not None for name in names)}
    rows = [(text_cell(study.title(name)), *(cell(name) for cell in columns.values())) for name in names]
    note = "In percent; ± is one standard error over the questions."
    numbers = (False, *[True] * len(columns))
    return [PageTable("tasks", "Accuracy by task", ("Task", *columns), numbers, tuple(rows), (note,))]


def loss_tables(study: Study) -> list[PageTable]:
    """The training loss of one run at its beginning and its end, a line a task."""
    log = study.experiments[0].runs[0].log
    if log is None:
        return []
    rows = []
    for name in [*(name for name in study.tasks.columns if name in log.losses), ""]:
        losses = list(log.losses[name].values())
        if losses:
            last = losses[-max(1, len(losses) // 20) :]
            cells = [number_cell(value, f"{value:.3f}") for value in (losses[0], math.fsum(last) / len(last))]
            rows.append((text_cell(study.title(name) if name else "all tasks"), *cells))
    note = "Per answer token: the log's first value, and the mean of its last twentieth."
    return [PageTable("losses", "Training loss", ("Task", "First", "Last"), (False, True, True), tuple(rows), (note,))]


def _value(value: object) -> Cell:
    """A candidate: numbers sort as numbers, for all candidates of a flag are of one kind."""
    return number_cell(value) if type(value) in (int, float) else text_cell(value)


def _fraction(value: float | None, stderr: float | None = None) -> Cell:
    if value is None:
        return number_cell(None)
    return number_cell(value, with_error(value, stderr))


def _minutes(facts: dict, key: str) -> Cell:
    seconds = (facts.get("seconds") or {}).get(key)
    return number_cell(seconds, None if seconds is None else f"{seconds / 60:.1f}")


def _hash(value: str | None) -> Cell:
    return text_cell(value and value[:_HASH])
