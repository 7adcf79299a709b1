"""Reading ``study.json``, checked key by key, with the training logs and analyses that it names."""

import math
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.tasks import TaskSet
from mtl_lora.report.record import Record, is_object
from mtl_lora.report.results import Trainable
from mtl_lora.report.study import OVER_QUESTIONS, OVER_SEEDS, Experiment, Run, Scores, Study, Value
from mtl_lora.report.training_records import read_analysis, read_log

FILE_NAME = "study.json"
SCHEMA = 1


def read_study(path: Path) -> Study:
    """Read ``study.json`` and the logs and analyses it names; raises ``UserError`` naming the file and the key."""
    value = read_json(path, "the study")
    if not isinstance(value, dict) or value.get("kind") != "study" or value.get("schema") != SCHEMA:
        raise UserError(f"{path} is no study of schema {SCHEMA}; write it with script/study.sh")
    root = Record(path, "", value)
    try:
        tasks = TaskSet.from_json(root.take("task_set", is_object, "an object"), f"{path}: task_set")
    except TypeError as error:
        raise UserError(f"{path}: task_set is no task set: {error}") from None
    experiments = tuple(_experiment(record) for record in root.records("experiments"))
    if not experiments:
        raise UserError(f"{path}: experiments is empty; run the study first")
    return Study(
        path=path,
        name=root.text("name"),
        tasks=tasks,
        experiments=experiments,
        transfer=tuple(_transfer(record) for record in root.records("transfer", optional=True)),
        majority=_majority(root),
        about=root.text("about", optional=True) or "",
        notes=tuple(root.take("notes", _are_texts, "a list of strings", optional=True) or ()),
        facts=value,
    )


def _experiment(record: Record) -> Experiment:
    runs = record.records("runs")
    name, group = record.text("name"), record.text("group", optional=True) or "main"
    trainable, against = record.child("trainable"), record.child("against")
    return Experiment(
        name=name,
        method=record.text("method", optional=True),
        group=group,
        scores=_scores(record, runs, name, group),
        runs=tuple(_run(run) for run in runs),
        trainable=trainable and Trainable(trainable.count("adapter", least=0), trainable.count("total")),
        rank=record.take("rank", lambda rank: type(rank) is int, "a whole number", optional=True),
        learning_rate=record.number("learning_rate", optional=True),
        against=against and _differences(against, against.text("baseline"), group),
    )


def _scores(record: Record, runs: list[Record], name: str, group: str) -> Scores:
    """The summary over seeds; the one run of an experiment without seeds gets its questions' standard error."""
    summary = record.child("summary")
    if summary is None:
        raise UserError(f"{record.path}: the key {record.place}summary is missing; it must be an object")
    errors = {task: score.stderr(optional=True) for task, score in runs[0].children("tasks").items()} if runs else {}
    errors = errors if len(runs) == 1 else {}
    tasks = {task: _value(entry, errors.get(task)) for task, entry in summary.children("tasks").items()}
    average = summary.child("average")
    known = [errors.get(task) for task in tasks]
    error = None if None in known or not known else math.hypot(*known) / len(known)
    return Scores(name, group, tasks, average and _value(average, error))


def _value(record: Record, stderr: float | None) -> Value:
    mean, low, high = record.fraction("mean"), *(record.number(key, optional=True) for key in ("low", "high"))
    if low is not None and high is not None:
        return Value(mean, low, high, record.number("sd", optional=True), OVER_SEEDS)
    if stderr is not None:
        return Value(mean, mean - stderr, mean + stderr, None, OVER_QUESTIONS)
    return Value(mean)


def _differences(record: Record, label: str, group: str) -> Scores:
    tasks = {name: _difference(entry) for name, entry in record.children("tasks").items()}
    average = record.child("average")
    return Scores(label, group, tasks, average and _difference(average))


def _difference(record: Record) -> Value:
    low, high = (record.number(key, optional=True) for key in ("low", "high"))
    return Value(record.number("difference"), low, high)


def _transfer(record: Record) -> Scores:
    return _differences(record, record.text("experiment", optional=True) or record.text("method"), record.text("group"))


def _run(record: Record) -> Run:
    """A run; the log of one whose tasks were trained apart is that of its parts."""
    parts = record.children("parts", optional=True)
    logs = [log for part in (record, *parts.values()) if (log := _beside(part, "log", read_log))]
    log = logs[0] if logs else None
    for other in logs[1:]:
        log = log.joined(other)
    seed = record.take("seed", lambda seed: type(seed) is int, "a whole number or null", optional=True)
    return Run(seed, log, _beside(record, "analysis", read_analysis), record.value)


def _beside(record: Record, key: str, read):
    """What stands in the file that ``key`` names, relative to the study's; None if it names none."""
    name = record.text(key, optional=True)
    if name is None:
        return None
    path = record.path.parent / name
    if not path.is_file():
        raise UserError(f"{record.path}: {record.place}{key} names {name}, which is not there; collect the study again")
    return read(path)


def _majority(root: Record) -> dict[str, float]:
    """By task, from the first run that was asked its questions."""
    found: dict[str, float] = {}
    for experiment in root.records("experiments"):
        for run in experiment.records("runs"):
            for name, score in run.children("tasks").items():
                majority = score.fraction("majority", optional=True)
                if majority is not None:
                    found.setdefault(name, majority)
    return found


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
