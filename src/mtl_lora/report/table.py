"""Tables of results and of studies: numbers rounded for people (percent, one decimal), or CSV with every digit."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.estimates import Estimate
from mtl_lora.metrics import NOTHING, difference_text, interval_text, one_unit, title_of, units_text, value_text
from mtl_lora.predictions import first_answers
from mtl_lora.report.load import Differences, Experiment, Study, gain_over
from mtl_lora.results import Average, Results, TaskNames, TaskResult, Trainable, average_of, trainable_text
from mtl_lora.tasks import grouped
from mtl_lora.text_table import Report, TextTable, shortened, told_apart

PUBLISHED_FILE = Path(__file__).with_name("published_commonsense.json")
MAJORITY_LABEL, AVERAGE = "majority class", "Average"
OVER_QUESTIONS, OVER_SEEDS = f"{AVERAGE} (over questions)", f"{AVERAGE} (over seeds)"
TRAINABLE, DELTA_M = "Trainable parameters, M (%)", "Delta_m, %"
UNTRAINED = " (untrained)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: results by task name (``cells``, without the missing ones) and their average.

    kind: ``result``, ``majority``, ``published`` or ``difference``. source: where a published row was copied from.
    delta_m: see ``load.gain_over``; only for results that are compared with baselines.
    """

    name: str
    kind: str
    cells: dict[str, TaskResult]
    average: Average | None
    method: str | None = None
    base_model: str | None = None
    mode: str | None = None
    source: str | None = None
    trainable: Trainable | None = None
    delta_m: float | None = None

    def unparsed(self, tasks: Iterable[str]) -> float | None:
        """The mean proportion of generated texts without an answer; None unless every one of ``tasks`` has it."""
        found = [self.cells[name].measured.get("unparsed") if name in self.cells else None for name in tasks]
        return statistics.fmean(found) if found and all(isinstance(value, float | int) for value in found) else None

    @property
    def groups(self) -> dict[str, Average]:
        """The averages by group of questions; empty without an average."""
        return self.average.groups if self.average else {}

    def text(self, value: TaskResult | Average | None) -> str:
        """A cell or an average of this row as text."""
        metric = getattr(value, "metric", next((cell.metric for cell in self.cells.values()), "accuracy"))
        text = value_text(value and value.value, value and value.stderr, metric, self.kind == "difference")
        return text + UNTRAINED * getattr(value, "untrained", False)

    def record(self, metrics: dict[str, str], groups: Sequence[str]) -> dict:
        """Return the row as a CSV record: its description, then value, standard error and questions of each task, whose
        columns have two words (``boolq accuracy``), so that none collides with another. metrics: by task."""
        record = {key: getattr(self, key) for key in ("name", "kind", "method", "base_model", "mode", "source")}
        record["name"] = " ".join(self.name.split())
        record |= {f"trainable_{key}": getattr(self.trainable, key, None) for key in ("adapter", "total")}
        record["unparsed"] = self.unparsed(metrics)
        record |= {} if self.delta_m is None else {"delta_m": self.delta_m}
        found = []  # each result, then its columns
        for name, metric in metrics.items():
            found.append((self.cells.get(name), f"{name} {metric}", f"{name} stderr", f"{name} n"))
        found.append((self.average, "average", "average_stderr"))
        found += [(self.groups.get(name), f"average of {name}", f"average of {name} stderr") for name in groups]
        for result, *keys in found:
            columns = zip(keys, ("value", "stderr", "n"), strict=False)  # an average has no n
            record |= {key: getattr(result, field, None) for key, field in columns}
        return record


def build_table(
    results: Sequence[Results], published: bool = False, difference: bool = False, baselines: Sequence[Results] = ()
) -> Report:
    """Put results of one task set into a table of values by task, and any averages by group into a second one.

    published: add rows of the published results of the commonsense tasks. difference: add a row of the last result
    minus the first; its standard error sqrt(a^2 + b^2) treats the questions of the two rows as independent. baselines:
    results of single-task models, which together have every task once, to compute Delta_m of each row.
    Raises ``UserError`` if the task sets differ, or if an addition does not fit the results.
    """
    TaskNames.require_one(results, "one table needs")
    TaskNames.require_one_measure((each.path, each.tasks) for each in [*results, *baselines])
    task_set, others = results[0].task_set, published_rows() if published else []
    for each in results if published else []:
        measures = {task.metric for task in each.tasks.values()}
        if (set(task_set.names), measures) != (set(others[0].cells), {"accuracy"}):
            names = f"{each.path} has {', '.join(sorted(measures))} of the tasks {', '.join(task_set.names)}"
            raise UserError(f"--published has accuracies of the commonsense tasks only, and {names}; leave it out")
    if difference and len(results) < 2:
        raise UserError("--difference is the last results file minus the first; pass at least two files, not 1")
    tasks = [name for name in task_set.columns if published or any(name in result.tasks for result in results)]
    folders = [each.path and each.path.parent for each in results]
    names = told_apart([each.name for each in results], [each.mode for each in results], folders)
    results = [dataclasses.replace(each, name=name) for each, name in zip(results, names, strict=True)]
    own = _result_rows(results, baselines, tasks)
    last = [_difference_row(own[0], own[-1])] if difference else []
    rows = [*_majority_rows(results[0], own[0]), *own, *others, *last]
    metrics = dict.fromkeys(tasks) | {name: cell.metric for row in rows for name, cell in row.cells.items()}
    groups = list(dict.fromkeys(group for row in own for group in row.groups))
    tables = [_results_table(rows, metrics, task_set, bool(baselines))]
    if groups:
        cells = [[row.name, *(row.text(row.groups.get(group)) for group in groups)] for row in (*own, *last)]
        tables.append(TextTable("Averages by group", ["Average by group", *groups], cells))
    notes = [*_question_notes(results, tasks), *Results.protocol_notes(results, baselines)]
    notes += [*_missing_notes(results, tasks, groups), *Results.notes(results)]
    notes += [*_row_notes(results, rows), *_baseline_notes(results, baselines)]
    return Report(tables, [row.record(metrics, groups) for row in rows], list(dict.fromkeys(notes)))


def _results_table(rows: Sequence[Row], metrics: dict[str, str], task_set: TaskNames, has_delta_m: bool) -> TextTable:
    """The table of all rows, made column by column. metrics: by task."""
    columns = [("Method", [row.name for row in rows]), (TRAINABLE, [trainable_text(row.trainable) for row in rows])]
    for name, metric in metrics.items():
        columns.append((task_set.title(name, metric), [row.text(row.cells.get(name)) for row in rows]))
    if one_unit(metrics.values()):
        columns.append((AVERAGE, [row.text(row.average) for row in rows]))
    # An unparsed answer is wrong in form, not in choice, so a gain of training may come from the format alone.
    if any(unparsed := [row.unparsed(metrics) for row in rows]):
        columns.append(("Unparsed", [value_text(value) for value in unparsed]))
    if has_delta_m:
        columns.append((DELTA_M, [value_text(row.delta_m, None, "delta_m", signed=True) for row in rows]))
    header, cells = zip(*columns, strict=True)
    return TextTable("Results", [*header], [[*row] for row in zip(*cells, strict=True)])


def _result_rows(results: Sequence[Results], baselines: Sequence[Results], tasks: Sequence[str]) -> list[Row]:
    """The row of each result, with an average only if it has every task."""
    gains, rows = _delta_m(results, baselines, tasks) if baselines else [None] * len(results), []
    for result, gain in zip(results, gains, strict=True):
        facts = {key: getattr(result, key) for key in ("method", "base_model", "mode", "trainable")}
        average = result.average if {*tasks} <= {*result.tasks} else None
        rows.append(Row(result.name, "result", result.tasks, average, **facts, delta_m=gain))
    return rows


def _majority_rows(first: Results, row: Row) -> list[Row]:
    """The majority class on the questions of ``first``, whose own row is ``row``; none without any classes."""
    known = {name: task for name, task in first.tasks.items() if task.majority is not None}
    cells = {name: TaskResult(task.metric, task.majority, None, task.n) for name, task in known.items()}
    average = average_of(cells.values()) if row.average and len(cells) == len(first.tasks) else None
    return [Row(MAJORITY_LABEL, "majority", cells, average)] if cells else []


def _delta_m(results: Sequence[Results], baselines: Sequence[Results], columns: Sequence[str]) -> list[float | None]:
    """Return Delta_m of each result, None where it lacks a task; raises ``UserError`` for baselines that do not fit."""
    alone = {}
    for each in baselines:
        if twice := [name for name in each.tasks if name in alone]:
            raise UserError(f"{each.path} has a result of {', '.join(twice)}, as another of --baselines; leave one out")
        alone |= each.tasks
    if lacking := [name for name in columns if name not in alone]:
        raise UserError(f"--baselines have no result of {', '.join(lacking)}; add their single-task results")
    if unknown := [f"{alone[name].metric} of {name}" for name in columns if not alone[name].has_known_metric]:
        raise UserError(
            f"Delta_m needs metrics that this version knows, not {', '.join(unknown)}; leave out --baselines"
        )
    for result in results:
        if not all(alone[name].value > 0 for name in columns if name in result.tasks):
            raise UserError(f"Delta_m of {result.path} needs baselines above 0; leave out --baselines")
    return [gain_over(alone, result.tasks, columns) for result in results]


def _difference_row(first: Row, last: Row) -> Row:
    """Last minus first where both have a value."""
    cells = {name: last.cells[name].minus(cell) for name, cell in first.cells.items() if name in last.cells}
    average = average_of(cells.values()) if first.average and last.average else None
    return Row("difference", "difference", cells, average)


def published_rows() -> list[Row]:
    """The published results that come with the package, as fractions, with the averages that their sources print."""
    published, found = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8")), []
    for row in published["rows"]:
        scores = zip(published["tasks"], row["scores"], strict=True)
        cells = {task: TaskResult("accuracy", score / 100, None, None) for task, score in scores}
        facts = {"method": row["method"], "base_model": row["model"], "source": row["source"]}
        found.append(Row(row["name"], "published", cells, Average(row["average"] / 100, None, len(cells)), **facts))
    return found


def _question_notes(results: Sequence[Results], tasks: Sequence[str]) -> Iterator[str]:
    counts, metrics = [], set()
    for name in tasks:
        if having := [each.tasks[name] for each in results if name in each.tasks]:
            numbers = dict.fromkeys(str(task.n) for task in having)
            counts.append(f"{name} {' or '.join(numbers)}")
            metrics |= {task.metric for task in having}
    yield f"Questions: {', '.join(counts)}."
    yield f"{units_text(metrics)}± is one standard error."
    if len(metrics) > 1 and one_unit(metrics):
        mean = "the plain mean over tasks with different metrics; a task with two metrics counts with their mean"
        yield f"Average: {mean}."
    if differing := [name for name in tasks if Results.differ_in_questions(results, name)]:
        yield f"Rows are not on the same questions: {', '.join(differing)}."


def _missing_notes(results: Sequence[Results], tasks: Sequence[str], groups: Sequence[str]) -> Iterator[str]:
    for group in groups:
        having = [{name for name, task in each.tasks.items() if group in task.groups} for each in results]
        names = [name for name in tasks if name in set().union(*having)]
        if len(names) < len(tasks):
            yield f"Group {group} is the average over {', '.join(names)} alone."
        if any(own and own < {*names} and {*tasks} <= {*each.tasks} for own, each in zip(having, results, strict=True)):
            yield f"Not every row has group {group} in the same tasks, so its averages are not of the same questions."
    if missing := [name for name in results[0].task_set.columns if name not in tasks]:
        yield f"Not evaluated: {', '.join(missing)}."
    for each in results:
        if missing := [name for name in tasks if name not in each.tasks]:
            yield f"No average for {each.name}, which has no score for {', '.join(missing)}."


def _row_notes(results: Sequence[Results], rows: Sequence[Row]) -> Iterator[str]:
    first, last, kinds = results[0], results[-1], {row.kind for row in rows}
    values = [{each.tasks[name].majority for each in results if name in each.tasks} for name in first.tasks]
    if "majority" in kinds and any(len(of_task) > 1 for of_task in values):
        yield f'"{MAJORITY_LABEL}" is on the questions of {first.name}.'
    if "published" in kinds:
        sources = " and ".join(dict.fromkeys(row.source for row in rows if row.source))
        yield (
            "Published rows are runs by others on the base model that each row names, with their own target modules, "
            f"schedules and beams, on whole test sets, copied from {sources}; MTL-LoRA's published row is not included."
        )
    if "difference" in kinds:
        yield (
            f"The difference is {last.name} (the last file) minus {first.name} (the first), in percentage points where "
            "values are in percent; its standard error treats the questions of the two rows as independent."
        )


def _baseline_notes(results: Sequence[Results], baselines: Sequence[Results]) -> Iterator[str]:
    evaluated = {name for each in results for name in each.tasks}
    alone = {name: each for each in baselines for name in each.tasks if name in evaluated}
    if other := [name for name, each in alone.items() if Results.differ_in_questions([*results, each], name)]:
        yield f"Single-task results are not on the test data of every row: {', '.join(other)}."
    if alone:
        names = ", ".join(f"{name} {each.name}" for name, each in alone.items())
        yield (
            f"{DELTA_M}: by how much a row is better than the single-task results, on average over tasks, relative to "
            f"each (arXiv 1904.08918): {names}."
        )


def details(results: Results) -> TextTable:
    """One evaluation with a line per task: its value, the majority class, other measures, the answers given; without
    columns that are empty for every task."""
    tasks, last = results.tasks, "Answers given"
    rows, header, found = [], {}, [(results.task_set.title(name), tasks[name]) for name in results.scored]
    if len(tasks) > 1 and len(metrics := {task.metric for task in tasks.values()}) == 1:
        average, n = average_of(tasks.values()), sum(task.n for task in tasks.values())
        majority = [task.majority for task in tasks.values()]
        majority = None if None in majority else statistics.fmean(majority)
        measured = {"unparsed": Row("", "", tasks, average).unparsed(tasks)}
        found.append((AVERAGE, TaskResult(*metrics, average.value, average.stderr, n, majority, measured=measured)))
    for name, task in found:
        own = value_text(task.value, task.stderr, task.metric) + UNTRAINED * task.untrained
        measures = {"Task": name, "Questions": f"{task.n:,}", title_of(task.metric): own}
        rest = {"Majority class": value_text(task.majority, None, task.metric)}
        rest["Unparsed"] = value_text(task.measured.get("unparsed"))
        for key, other in task.others.items():
            if other.metric != task.metric:  # a part of a metric that is a mean
                measures[title_of(key)] = value_text(other.value, other.stderr, other.metric)
                continue
            words = {"strict": "Strict", "acc_norm": "Length-normalised"}.get(key, key)
            rest[words] = value_text(other.value, None, other.metric)
            rest[f"{words} - {task.metric}"] = value_text(other.value - task.value, None, task.metric, signed=True)
            if key == "strict":
                rest[f"{words} unparsed"] = value_text(other.measured.get("unparsed"))
        if "F1" not in measures:
            rest["F1"] = value_text(task.measured.get("f1"))
        rows.append(measures | rest | {last: _answers_given(task)})
        header |= dict.fromkeys(measures)
    header = [*(header | dict.fromkeys(key for row in rows for key in row if key != last)), last]
    header = [key for key in header if any(row.get(key, NOTHING) not in ("", NOTHING) for row in rows)]
    protocol = f" ({results.mode})" if results.mode else ""
    title = results.name.removesuffix(protocol) + protocol
    return TextTable(title, header, [[row.get(key, NOTHING) for key in header] for row in rows])


def _answers_given(task: TaskResult) -> str:
    """The answers that were given most often, with their counts; a dash stands for texts without an answer."""
    counts = sorted((task.measured.get("predicted") or {}).items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{shortened(answer, 40) or NOTHING} {count}" for answer, count in counts[:6]]
    return ", ".join(shown + ["..."] * (len(counts) > 6))


def examples(results: Results) -> TextTable:
    """The first right and the first wrong answer of each task, in the model's words."""
    rows = [
        [results.task_set.title(task), str(index), "right" if right else "wrong", answer, said or NOTHING]
        for task, index, right, answer, said in first_answers(results)
    ]
    return TextTable(f"Answers of {results.name}", ["Task", "Question", "Is", "Right answer", "Said"], rows)


# ---- studies ----


def study_report(study: Study) -> Report:
    """The tables of a study with its notes, and as records the mean of every experiment by task and on average."""
    values = ((each.name, task, each.estimate(task)) for each in study.experiments for task in [*study.scored, None])
    records = [
        {"experiment": name, "task": task or "average", "metric": task and study.metric(task), **value.record()}
        for name, task, value in values
        if value
    ]
    return Report(study_tables(study), records, study.notes, titled=True)


def study_tables(study: Study) -> list[TextTable]:
    """The tables of a study: by group, scores and differences from the baseline; then transfer and the search."""
    tables, tasks = [], [study.task_set.title(task, study.metric(task)) for task in study.scored]
    titles = tasks + [AVERAGE] * study.has_average
    changes = [*tasks, OVER_QUESTIONS, OVER_SEEDS] if study.compared_over_seeds else titles
    changes = changes if study.has_average else [*tasks, DELTA_M]
    groups = grouped(study.experiments if study.scored else (), lambda experiment: experiment.group)
    for group, experiments in groups.items():
        of = f", {group}" if len(groups) > 1 else ""
        tables.append(_experiments(study, experiments, titles, f"Results{of}"))
        compared = [(each.name, each.against) for each in experiments if each.against]
        rows = [[f"{name} - {against.baseline}", *_differences(study, against, name)] for name, against in compared]
        if rows:
            tables.append(TextTable(f"Differences from the baseline{of}", ["Difference", *changes], rows))
    if study.transfer:
        rows = [[row.label, row.alone or NOTHING, *_differences(study, row, row.experiment)] for row in study.transfer]
        header = ["Trained together", "Trained alone", *changes]
        tables.append(TextTable("Transfer: trained together minus each task trained alone", header, rows))
    if study.search:
        # All values that were tried: the search tries more of them for some experiments.
        values = sorted({candidate.value for each in study.search.experiments for candidate in each.candidates})
        rows = []
        for each in study.search.experiments:
            cells = {c.value: value_text(c.dev) + " (chosen)" * (c.value == each.chosen) for c in each.candidates}
            rows.append([each.name, *(cells.get(value, NOTHING) for value in values)])
        header = ["Development average", *map(str, values)]
        tables.append(TextTable(f"Search of {study.search.flag} on the development set", header, rows))
    return tables


def _experiments(study: Study, experiments: Sequence[Experiment], titles: Sequence[str], title: str) -> TextTable:
    """One row per experiment: mean ± standard deviation over seeds, or ± standard error if none has several seeds."""
    metrics = {task: study.metric(task) for task in [*study.scored, *[None] * study.has_average]}
    has_interval = study.has_seeds and study.has_average
    header = ["Method", TRAINABLE, "Rank", "Learning rate", *titles] + ["95 % interval"] * has_interval
    rows = []
    if study.majority:
        values = [value_text(study.majority.get(task), None, metric) for task, metric in metrics.items()]
        rows.append([MAJORITY_LABEL, *[NOTHING] * 3, *values] + [NOTHING] * has_interval)
    for each in experiments:
        row = [each.name, trainable_text(each.trainable, each.adapters)]
        row += [NOTHING if value is None else f"{value:g}" for value in (each.rank, each.learning_rate)]
        for task, metric in metrics.items():
            found = each.estimate(task) or Estimate(None)
            error = None if found.low is None else found.mean - found.low
            text = value_text(found.mean, found.sd if study.has_seeds else error, metric)
            row.append(text + UNTRAINED * (task in each.untrained))
        if has_interval:
            row.append(interval_text(each.summary.average, metrics[None]))
        rows.append(row)
    return TextTable(title, header, rows)


def _differences(study: Study, found: Differences, name: str) -> list[str]:
    """The cells of a difference: by task, then the averages over questions and seeds; without average, Delta_m."""
    averages = [found.average, *[found.over_seeds and found.over_seeds.average] * study.compared_over_seeds]
    names = {name, found.baseline, getattr(found, "alone", "")}
    untrained = {task for each in study.experiments if each.name in names for task in each.untrained}
    texts = [difference_text(found.tasks.get(t), study.metric(t)) + UNTRAINED * (t in untrained) for t in study.scored]
    if not study.has_average:
        return [*texts, difference_text(found.delta_m, "delta_m")]
    return texts + [difference_text(average, study.metric(None)) for average in averages]
