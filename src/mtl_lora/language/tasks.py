"""Tasks as data: the only place that knows task names, ids, options, answer patterns and metrics.

The eight commonsense tasks are one table below; any other set is read from a JSON file with the same fields.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.metrics import METRICS

ANSWER_PREFIX = "the correct answer is "
OPTIONS_MARKER = "Answer format: "


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: what it is called, which answers it allows, and how an answer is found in generated text.

    name: key in files and flags. id: 0..T-1, the index of the task's adapter weights.
    options: every answer the task allows; empty for a free-text task.
    pattern: regular expression whose first match in generated text is the answer; empty: the options as whole words
        (for the commonsense tasks joined by ``|``, as LLM-Adapters does), or for a free-text task its first line.
    answer_prefix: the words before the answer in every ``output``. title: column heading in tables.
    metric: name in ``metrics.METRICS``; empty: accuracy of options, exact_match of free text.
    """

    name: str
    id: int
    options: tuple[str, ...] = ()
    pattern: str = ""
    answer_prefix: str = ANSWER_PREFIX
    title: str = ""
    metric: str = ""

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.\-]+", self.name):
            raise UserError(f"task name {self.name!r} must be letters, digits, '_', '-' or '.'")
        if type(self.id) is not int or self.id < 0:
            raise UserError(f"task {self.name!r} has id {self.id!r}; ids are whole numbers from 0")
        listed = isinstance(self.options, list | tuple)
        if not listed or not all(isinstance(option, str) and option.strip() for option in self.options):
            raise UserError(f"task {self.name!r} has options {self.options!r}; options are a list of non-empty strings")
        object.__setattr__(self, "options", tuple(self.options))
        if len({option.strip() for option in self.options}) != len(self.options) or len(self.options) == 1:
            raise UserError(f"task {self.name!r} needs at least two different options, or none for free text")
        for field in ("pattern", "answer_prefix", "title", "metric"):
            if not isinstance(getattr(self, field), str):
                raise UserError(f"task {self.name!r} has {field} {getattr(self, field)!r}; it must be a string")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"task {self.name!r} has a pattern that is not a regular expression: {error}") from None
        if self.metric and self.metric not in METRICS:
            raise UserError(
                f"task {self.name!r} has the metric {self.metric!r}; it must be one of {', '.join(METRICS)}"
            )
        if not self.title:
            object.__setattr__(self, "title", self.name)

    @property
    def answer_pattern(self) -> str:
        """The regular expression that finds an answer in generated text; empty for free text without a pattern."""
        # The first alternative that fits is taken, so an option that begins another one stands behind it.
        begins = {option: sum(other.startswith(option) for other in self.options) for option in self.options}
        return self.pattern or "|".join(re.escape(option) for option in sorted(self.options, key=begins.get))

    @property
    def is_matched_by_pattern(self) -> bool:
        """Whether ``answer_pattern`` finds the answer: the task's own pattern, or that of a task of LLM-Adapters."""
        original = {(task.name, task.options) for task in COMMONSENSE}
        return bool(self.pattern) or (self.name, self.options) in original

    @property
    def extraction(self) -> int:
        """The version of the rules that find an answer in generated text; 1 for those that never change."""
        return 2 if self.options and not self.is_matched_by_pattern else 1

    @property
    def metric_name(self) -> str:
        """The metric in effect."""
        return self.metric or ("accuracy" if self.options else "exact_match")

    @property
    def extraction_key(self) -> tuple:
        """What decides which answer is extracted from a text; id, title and metric do not."""
        return self.options, self.answer_pattern, self.answer_prefix

    def options_of(self, instruction: str) -> tuple[str, ...]:
        """The options of one question: those its ``Answer format: a/b`` ending lists, else all of the task's.

        A few ARC questions have three or five options instead of four, so the question decides where it lists them.
        """
        _, marker, listed = instruction.rpartition(OPTIONS_MARKER)
        options = tuple(listed.strip().split("/")) if marker else ()
        if len(options) > 1 and len(set(options)) == len(options) and set(options) <= set(self.options):
            return options
        return self.options


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Tasks in id order (ids 0..T-1 without gaps); ``columns`` names them in the order of a results table."""

    tasks: tuple[Task, ...]
    columns: tuple[str, ...] = ()

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
        """A hash of every task's name and ``Task.extraction_key``, in id order."""
        return files.sha256_of(json.dumps([(task.name, *task.extraction_key) for task in self.tasks]).encode())

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, key: str | int) -> Task:
        """A task by name or id; raises ``UserError`` that lists the tasks there are."""
        if type(key) is int and 0 <= key < len(self.tasks):
            return self.tasks[key]
        for task in self.tasks:
            if task.name == key:
                return task
        raise UserError(f"there is no task {key!r}; the tasks are {self.describe()}")

    def describe(self) -> str:
        """``boolq 0, piqa 1, ...``: for messages."""
        return ", ".join(f"{task.name} {task.id}" for task in self.tasks)

    def to_json(self) -> dict:
        """A JSON value that ``from_json`` reads back to an equal set; a metric by default is not written."""
        tasks = [dataclasses.asdict(task) | {"options": list(task.options)} for task in self.tasks]
        tasks = [{key: value for key, value in task.items() if key != "metric" or value} for task in tasks]
        return {"tasks": tasks, "columns": list(self.columns)}

    @classmethod
    def from_json(cls, value: object, source: str = "the task set") -> "TaskSet":
        """Build a set from ``{"tasks": [{"name", "id", ...}], "columns": [...]}`` or from the bare list of tasks.

        Raises ``UserError`` naming ``source`` and the entry that is wrong.
        """
        value = {"tasks": value} if isinstance(value, list) else value
        if not isinstance(value, dict) or not isinstance(value.get("tasks"), list) or set(value) - {"tasks", "columns"}:
            raise UserError(f"{source} must be a JSON list of tasks, or an object with 'tasks' and 'columns' alone")
        columns = [] if value.get("columns") is None else value["columns"]
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise UserError(f"{source}: the columns must be a list of task names, not {columns!r}")
        known = {field.name for field in dataclasses.fields(Task)}
        for index, entry in enumerate(value["tasks"]):
            if not isinstance(entry, dict) or not {"name", "id"} <= set(entry) <= known:
                raise UserError(f"{source}: task {index} needs 'name' and 'id' of {sorted(known)}, not {entry!r}")
        try:
            return cls(tuple(Task(**entry) for entry in value["tasks"]), tuple(columns))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def load_tasks_file(path: str | Path) -> TaskSet:
    """Read a task set from a JSON file; raises ``UserError`` naming the file and what is wrong with it."""
    return TaskSet.from_json(files.read_json(path, "the tasks file"), f"the tasks file {path}")


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


# Ids are those of the original's data; the patterns that follow from the options are LLM-Adapters'.
COMMONSENSE = TaskSet(
    tasks=(
        Task("boolq", 0, ("true", "false"), title="BoolQ"),
        Task("piqa", 1, _numbered("solution", 2), title="PIQA"),
        Task("social_i_qa", 2, _numbered("answer", 3), "answer1|answer2|answer3|answer4|answer5", title="SIQA"),
        Task("hellaswag", 3, _numbered("ending", 4), title="HellaSwag"),
        Task("winogrande", 4, _numbered("option", 2), title="WinoGrande"),
        Task("ARC-Challenge", 5, _numbered("answer", 5), title="ARC-c"),
        Task("ARC-Easy", 6, _numbered("answer", 5), title="ARC-e"),
        Task("openbookqa", 7, _numbered("answer", 4), "answer1|answer2|answer3|answer4|answer5", title="OBQA"),
    ),
    columns=("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"),
)
