"""Tasks as data, for any system: names, ids and titles, in the order of the adapter's task weights.

Each system's ``Task`` subclass adds fields, such as the answers that the task allows.
"""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import closest
from mtl_lora.errors import UserError, within

_LARGEST_WEIGHT = 1e30  # float32 holds its product with a loss


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    name: key in files and flags. id: 0..T-1, the index of the task's adapter weights. title: column heading in tables.
    metric: one of ``metrics``; empty: the system's default. weight: the factor of the task's loss in training.
    """

    name: str
    id: int
    title: str = dataclasses.field(default="", kw_only=True)
    metric: str = dataclasses.field(default="", kw_only=True)
    weight: float = dataclasses.field(default=1.0, kw_only=True)

    metrics: typing.ClassVar[Sequence[str]] = ()  # the metrics that a task of the system may have, the default first
    also_known: typing.ClassVar[tuple[str, ...]] = ()  # other field names that a tasks file may use
    written: typing.ClassVar[tuple[str, ...]] = ()  # fields that ``to_json`` writes also where they have their default

    def __post_init__(self):
        if not isinstance(self.name, str) or not files.NAME.fullmatch(self.name):
            raise UserError(f"task name {self.name!r} must be letters, digits, '_', '-' or '.', and not only dots")
        if type(self.id) is not int or self.id < 0:
            raise UserError(f"task {self.name!r} has id {self.id!r}; ids are whole numbers from 0")
        for field in ("title", "metric"):
            self.require_text(field)
        if self.metric and self.metric not in self.metrics:
            raise UserError(
                f"task {self.name!r} has the metric {self.metric!r}; it must be one of {', '.join(self.metrics)}"
            )
        if type(self.weight) not in (int, float) or not 0 < self.weight <= _LARGEST_WEIGHT:
            way_out = f"it must be a number above 0, at most {_LARGEST_WEIGHT:g}"
            raise UserError(f"task {self.name!r} has weight {self.weight!r:.50}; {way_out}")
        object.__setattr__(self, "weight", float(self.weight))
        if not self.title.strip():
            object.__setattr__(self, "title", self.name)

    def require_text(self, field: str) -> None:
        """Raise ``UserError`` unless a field is a string."""
        if not isinstance(getattr(self, field), str):
            raise UserError(f"task {self.name!r} has {field} {getattr(self, field)!r}; it must be a string")

    def require_texts(self, field: str, least: str) -> None:
        """Store a field as a tuple; raises ``UserError`` unless it is empty or a list of two or more distinct strings.

        least: the alternative to two strings, named in the error.
        """
        values = getattr(self, field)
        if not isinstance(values, list | tuple) or not all(isinstance(each, str) and each.strip() for each in values):
            raise UserError(f"task {self.name!r} has {field} {values!r}; it must be a list of non-empty strings")
        object.__setattr__(self, field, tuple(values))
        if len({each.strip() for each in values}) != len(values) or len(values) == 1:
            raise UserError(f"task {self.name!r} needs at least two different {field}, or {least}")

    @classmethod
    def from_json(cls, entry: object, where: str) -> typing.Self:
        """Build a task from its entry in a tasks file; raises ``UserError`` naming ``where``, the file and entry."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or not {"name", "id"} <= entry.keys():
            raise UserError(f"{where} must be an object with 'name' and 'id', not {entry!r}")
        if unknown := [key for key in entry if key not in known]:
            also = closest(unknown[0], sorted(known | set(cls.also_known)))
            raise UserError(f"{where} has the unknown field {unknown[0]!r}{also}")
        return cls(**entry)

    def to_json(self) -> dict:
        """The entry of a tasks file that ``from_json`` reads back."""
        entry = {}
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) != field.default or field.name in self.written:
                entry[field.name] = list(value) if isinstance(value, tuple) else value
        return entry

    @property
    def metric_name(self) -> str:
        """The metric in effect."""
        return self.metric or self.metrics[0]

    @property
    def extraction_key(self) -> tuple:
        """Everything about the task that its answers depend on; not its id, title, metric or weight."""
        raise NotImplementedError


def grouped(entries: Iterable, key: Callable) -> dict[typing.Any, list]:
    """Return the entries by ``key(entry)``, each group and the groups in the entries' order."""
    found = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return found


Own = typing.TypeVar("Own", bound=Task)


@dataclasses.dataclass(frozen=True)
class TaskSet(typing.Generic[Own]):
    """Tasks in id order (ids 0..T-1 without gaps); ``columns`` lists their names in the order of results tables."""

    tasks: tuple[Own, ...]
    columns: tuple[str, ...] = ()

    task_class: typing.ClassVar[type[Task]] = Task

    def __post_init__(self):
        tasks = tuple(sorted(self.tasks, key=lambda task: task.id))
        object.__setattr__(self, "tasks", tasks)
        if not tasks:
            raise UserError("a task set needs at least one task")
        if [task.id for task in tasks] != list(range(len(tasks))):
            raise UserError(f"task ids must be 0 to {len(tasks) - 1}, each once, not {[task.id for task in tasks]}")
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            raise UserError(f"task names must differ, not {names}")
        object.__setattr__(self, "columns", tuple(self.columns) or tuple(names))
        if sorted(self.columns) != sorted(names):
            raise UserError(f"the columns {list(self.columns)} must name each task once: {names}")

    @property
    def names(self) -> list[str]:
        """Task names in id order."""
        return [task.name for task in self.tasks]

    @property
    def answers_sha256(self) -> str:
        """The sha256 of every task's name and ``Task.extraction_key``, in id order."""
        return files.sha256_of(json.dumps([(task.name, *task.extraction_key) for task in self.tasks]).encode())

    def __iter__(self) -> Iterator[Own]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, key: str | int) -> Own:
        """Return a task by name or id; raises a ``UserError`` that lists the tasks if there is none."""
        if type(key) is int and 0 <= key < len(self.tasks):
            return self.tasks[key]
        for task in self.tasks:
            if task.name == key:
                return task
        raise UserError(f"there is no task {key!r}; the tasks are {self.describe()}")

    def describe(self) -> str:
        """List names and ids for messages: ``boolq 0, piqa 1, ...``."""
        return ", ".join(f"{task.name} {task.id}" for task in self.tasks)

    def to_json(self) -> dict:
        """A JSON value from which ``from_json`` builds an equal set."""
        return {"tasks": [task.to_json() for task in self.tasks], "columns": list(self.columns)}

    @classmethod
    def from_json(cls, value: object, source: str = "the task set") -> typing.Self:
        """Build a set from ``{"tasks": [{"name", "id", ...}], "columns": [...]}`` or from the list of tasks alone.

        Raises ``UserError`` naming ``source`` and the invalid entry.
        """
        value = {"tasks": value} if isinstance(value, list) else value
        if not isinstance(value, dict) or not isinstance(value.get("tasks"), list) or set(value) - {"tasks", "columns"}:
            raise UserError(f"{source} must be a JSON list of tasks, or an object with only 'tasks' and 'columns'")
        columns = [] if value.get("columns") is None else value["columns"]
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise UserError(f"{source}: the columns must be a list of task names, not {columns!r}")
        with within(source):
            tasks = [cls.task_class.from_json(entry, f"task {index}") for index, entry in enumerate(value["tasks"])]
            return cls(tuple(tasks), tuple(columns))

    @classmethod
    def load(cls, path: str | Path) -> typing.Self:
        """Read a tasks file; raises ``UserError`` naming the file and the fault."""
        return cls.from_json(files.read_json(path, "the tasks file"), f"the tasks file {path}")
