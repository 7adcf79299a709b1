"""``results.json``: what an evaluation measured, and everything needed to trace, repeat and compare it.

Evaluation writes it through these classes (schema 2); tables, comparisons, figures and studies read it through them.
Schema 1, in which every metric was an accuracy, is read for ever. Nothing here knows a system or a benchmark.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from mtl_lora import artifacts, files, typed_json
from mtl_lora.errors import UserError

SCHEMA = 2
# Metrics that are fractions from 0 to 1 and shown in percent, with their titles; any other is shown as it is.
FRACTIONS = {
    "accuracy": "Accuracy",
    "acc_norm": "Accuracy (length-normalised)",
    "exact_match": "Exact match",
    "f1": "F1",
}
# A file may carry a rounded average, but not one that contradicts its own tasks in the digit that a table shows.
AVERAGE_TOLERANCE = 0.001
_SCHEMA_1_TITLES = {"lora": "LoRA", "dora": "DoRA", "multilora": "MultiLoRA", "moelora": "MoELoRA"}
_SCHEMA_1_TITLES |= {"mtl_lora": "MTL-LoRA"}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's ``metric`` over ``n`` examples: its value (a fraction where the metric is one), standard error.

    majority: the value of always giving the majority class. groups: the same metric of parts of the examples.
    others: other measures of the same answers, by name (``strict``, ``acc_norm``). measured: whatever else was, as
    JSON (``unparsed``, ``predicted``, ``correct``, ``f1``).
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    majority: float | None = None
    groups: dict[str, "TaskResult"] = dataclasses.field(default_factory=dict)
    others: dict[str, "TaskResult"] = dataclasses.field(default_factory=dict)
    measured: dict[str, object] = dataclasses.field(default_factory=dict)

    @classmethod
    def read_json(cls, reader: typed_json.Reader, value: object, place: str, metric: str | None = None) -> "TaskResult":
        """From JSON; groups and other measures have the ``metric`` of their task unless they name another."""
        entries, key = {"metric": metric, **reader.read(dict, value, place)}, "value"
        if reader.schema == 1:
            entries = {"acc_norm" if name == "normalised" else name: entry for name, entry in entries.items()}
            entries["metric"] = key = "accuracy"
        metric = reader.key(entries, "metric", typed_json.Text, place)
        number = typed_json.Fraction if metric in FRACTIONS else float
        groups = reader.read(dict, entries.pop("groups", None) or {}, f"{place}.groups")
        others = {
            name: cls.read_json(reader, entry, f"{place}.{name}", metric)
            for name, entry in entries.items()
            # ``predicted`` counts answers, which may have any name.
            if name != "predicted" and isinstance(entry, dict) and {key, "stderr", "n"} <= entry.keys()
        }
        known = {"metric", key, "stderr", "n", "majority", *others}
        return cls(
            metric,
            reader.key(entries, key, number, place),
            reader.key(entries, "stderr", typed_json.Error | None, place),
            reader.key(entries, "n", typed_json.Count, place),
            reader.read(number | None, entries.get("majority"), f"{place}.majority"),
            {name: cls.read_json(reader, group, f"{place}.groups.{name}", metric) for name, group in groups.items()},
            others,
            {name: entry for name, entry in entries.items() if name not in known},
        )

    def to_json(self, within: str | None = None) -> dict:
        """A JSON object; ``within``: the metric of the task that this is a part or another measure of."""
        value = {} if self.metric == within else {"metric": self.metric}
        value |= {"value": self.value, "stderr": self.stderr, "n": self.n}
        value |= {} if within and self.majority is None else {"majority": self.majority}
        value |= self.measured | {name: other.to_json(self.metric) for name, other in self.others.items()}
        groups = {name: group.to_json(self.metric) for name, group in self.groups.items()}
        return value | ({"groups": groups} if groups else {})


@dataclasses.dataclass(frozen=True)
class Average:
    """The unweighted mean over ``tasks`` tasks and its standard error; groups: over the tasks that have the group."""

    value: float
    stderr: float | None
    tasks: int
    groups: dict[str, "Average"] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return {key: typed_json.to_json(value) for key, value in vars(self).items() if key != "groups" or value}


def average_of(results: Iterable[TaskResult]) -> Average:
    """The plain mean of at least one result; its standard error is sqrt(sum of squared standard errors) / T."""
    results, groups = list(results), {}
    for name, group in (pair for result in results for pair in result.groups.items()):
        groups.setdefault(name, []).append(group)
    errors, count = [result.stderr for result in results], len(results)
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count
    mean = sum(result.value for result in results) / count
    return Average(mean, error, count, {name: average_of(parts) for name, parts in groups.items()})


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The number of trainable parameters (``adapter``) and of all parameters of the model (``total``)."""

    adapter: typed_json.Index
    total: typed_json.Count


@dataclasses.dataclass(frozen=True)
class _Task:
    name: typed_json.Name
    id: typed_json.Index
    title: typed_json.Text | None = None


@dataclasses.dataclass(frozen=True)
class TaskNames:
    """What a report knows of a task set: names in id order, columns in table order, titles by name.

    value: the whole set as its system writes it, ``{"tasks": [{"name", "id", "title", ...}], "columns": [...]}``.
    """

    value: dict
    names: list[str]
    columns: list[str]
    titles: dict[str, str]

    @classmethod
    def from_json(cls, value: object, source: str = "the task set") -> "TaskNames":
        """From a task set's JSON; raises ``UserError`` naming ``source`` and what is wrong."""
        return cls.read_json(typed_json.Reader(source), value, "task_set")

    @classmethod
    def read_json(cls, reader: typed_json.Reader, value: object, place: str) -> "TaskNames":
        tasks = reader.key(reader.read(dict, value, place), "tasks", list[_Task], place)
        tasks.sort(key=lambda task: task.id)
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise reader.wrong(f"{place}.tasks", names, "at least one task, with different names")
        columns = reader.read(list[str] | None, value.get("columns"), f"{place}.columns") or names
        if sorted(columns) != sorted(names):
            raise reader.wrong(f"{place}.columns", columns, f"each task once: {', '.join(names)}")
        return cls(value, names, columns, {task.name: task.title or task.name for task in tasks})

    def to_json(self) -> dict:
        return self.value

    def title(self, name: str) -> str:
        """A task's column heading; a name that the set does not have is its own."""
        return self.titles.get(name, name)

    def definition(self, name: str) -> dict:
        """What decides a task's examples and answers: all that its set says but name, id, title and empty values."""
        (task,) = (task for task in self.value["tasks"] if task["name"] == name)
        return {key: entry for key, entry in task.items() if key not in ("name", "id", "title") and entry}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation: results by task name, and what tells whether two evaluations are comparable.

    mode: the protocol. settings: everything that an answer depends on. data: sha256 of the test data by task.
    adapter: the checkpoint's own description. path: the file it was read from.
    """

    system: typed_json.Text = "language"
    name: typed_json.Text
    method: typed_json.Text | None = None
    method_title: typed_json.Text | None = None
    base_model: typed_json.Text | None = None
    mode: typed_json.Text | None = None
    trainable: Trainable | None = None
    tasks: dict[str, TaskResult]
    task_set: TaskNames
    settings: dict = dataclasses.field(default_factory=dict)
    data: dict[str, typed_json.Text | None] = dataclasses.field(default_factory=dict)
    adapter: dict | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    command: str | None = None
    device: str | None = None
    commit: str | None = None
    path: Path | None = dataclasses.field(default=None, compare=False, metadata=typed_json.UNWRITTEN)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read a results file, or the one in a folder; raises ``UserError`` naming the file and the key."""
        path = Path(path) / artifacts.RESULTS if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise UserError(f"there is no results file {path}; pass a {artifacts.RESULTS} or a folder that has one")
        return cls.from_json(typed_json.read_object(path, "the results file"), str(path), path)

    @classmethod
    def from_json(cls, value: dict, source: str = "the results", path: Path | None = None) -> "Results":
        """From a JSON object of schema 1 or 2; raises ``UserError`` naming ``source`` and the key."""
        schema = value.get("schema", 1)
        reader, key = typed_json.Reader(source, schema), "accuracy" if schema == 1 else "value"
        if type(schema) is not int or schema not in (1, SCHEMA):
            raise reader.wrong("schema", schema, f"1 or {SCHEMA}, which this version reads")
        found = cls(**reader.fields(cls, value), path=path)
        if schema == 1:
            titles = _SCHEMA_1_TITLES.get(found.method)
            found = dataclasses.replace(found, method_title=titles, settings={"protocol": 1, **found.settings})
        unknown = [name for name in found.tasks if name not in found.task_set.names]
        if unknown or not found.tasks:
            rule = f"of its task set: {', '.join(found.task_set.names)}"
            raise reader.wrong(".".join(["tasks", *unknown[:1]]), value["tasks"], rule)
        if value.get("average") is not None and (average := found.average) is not None:
            given = reader.key(reader.read(dict, value["average"], "average"), key, float, "average")
            if abs(given - average.value) > AVERAGE_TOLERANCE:
                rule = f"{average.value:.4f}, the mean of its {average.tasks} tasks; evaluate again to write it anew"
                raise reader.wrong(f"average.{key}", given, rule)
        return found

    def to_json(self) -> dict:
        """The content of ``results.json``, schema 2."""
        return {"schema": SCHEMA, **typed_json.object_of(self), "average": typed_json.to_json(self.average)}

    def save(self, path: str | Path) -> None:
        """Write the file whole, or not at all."""
        files.write_json(path, self.to_json())

    @property
    def scored(self) -> list[str]:
        """Tasks with a result, in column order."""
        return [name for name in self.task_set.columns if name in self.tasks]

    @property
    def missing(self) -> list[str]:
        """Tasks of the set without a result, in column order."""
        return [name for name in self.task_set.columns if name not in self.tasks]

    @property
    def average(self) -> Average | None:
        """Over the tasks with a result; None where their metrics have different units."""
        metrics = {result.metric for result in self.tasks.values()}
        one_unit = metrics <= FRACTIONS.keys() or len(metrics) == 1
        return average_of(self.tasks.values()) if one_unit else None

    @property
    def whole_average(self) -> Average | None:
        """The average, unless a task of the set has no result."""
        return None if self.missing else self.average
