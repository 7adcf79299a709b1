"""Reading results files: the evaluation's ``results.json`` (schema 1), checked key by key.

Whoever builds a table can then rely on every value; whoever hands in a broken file reads one sentence that names
the file and the key.
"""

import dataclasses
import json
import math
import reprlib
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.tasks import TaskSet
from mtl_lora.report.record import Record, is_object, one_line

FILE_NAME = "results.json"
SCHEMA = 1
# A file may carry a rounded average, but not one that contradicts its own tasks in the digit that a table shows.
AVERAGE_TOLERANCE = 0.001


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy (a fraction) over n questions and its standard error; n is None for an average over tasks.

    majority: accuracy of always giving the most frequent answer. groups: scores of parts of the questions.
    """

    accuracy: float
    stderr: float | None
    n: int | None = None
    majority: float | None = None
    groups: dict[str, "Score"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trainable:
    """How many weights were trained (``adapter``) of all the model's weights (``total``)."""

    adapter: int
    total: int


@dataclasses.dataclass(frozen=True)
class Results:
    """One results file: scores by task name, and what is needed to tell whether two files are comparable."""

    path: Path
    name: str
    method: str | None
    base_model: str | None
    mode: str | None
    trainable: Trainable | None
    task_set: TaskSet
    tasks: dict[str, Score]
    average: Score | None
    data: dict[str, str]
    settings: dict[str, object]

    @property
    def missing(self) -> list[str]:
        """Tasks of the set without a score, in column order."""
        return [name for name in self.task_set.columns if name not in self.tasks]


def mean_score(scores: list[Score]) -> Score:
    """The unweighted mean over tasks; its standard error is sqrt(sum of squared standard errors) / T."""
    stderr = None
    if all(score.stderr is not None for score in scores):
        stderr = math.hypot(*(score.stderr for score in scores)) / len(scores)
    return Score(math.fsum(score.accuracy for score in scores) / len(scores), stderr)


def results_path(path: str | Path) -> Path:
    """The results file itself, given the file or the folder that contains it."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def read_results(path: str | Path) -> Results:
    """Read and check one results file or the one in a folder; raises ``UserError`` naming the file and the key."""
    path = results_path(path)
    if not path.is_file():
        raise UserError(f"there is no results file {path}; pass a {FILE_NAME} or a folder that has one")
    value = read_json(path, "the results file")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        # Half a surrogate pair can be read as JSON but never be written, so it would fail in the middle of a table.
        raise UserError(f"the results file {path} holds text that is not Unicode: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"the results file {path} holds {reprlib.repr(value)}; it must be an object")
    return _parse(path, value)


def _parse(path: Path, value: dict) -> Results:
    root = Record(path, "", value)
    root.take("schema", lambda schema: schema == SCHEMA and type(schema) is int, str(SCHEMA), optional=True)
    task_set = _parse_task_set(path, root)
    tasks = {key: _parse_score(record) for key, record in root.children("tasks").items()}
    for key in tasks:
        if key not in task_set.names:
            raise UserError(f"{path}: tasks.{key} is none of the tasks of its task_set: {task_set.describe()}")
    if not tasks:
        raise UserError(f"{path}: tasks is empty; it must hold the score of at least one task")
    return Results(
        path=path,
        name=root.text("name"),
        method=root.text("method", optional=True),
        base_model=root.text("base_model", optional=True),
        mode=root.text("mode", optional=True),
        trainable=_parse_trainable(root),
        task_set=task_set,
        tasks=tasks,
        average=_parse_average(root, tasks),
        data=_parse_data(root),
        settings=root.take("settings", is_object, "an object", optional=True) or {},
    )


def _parse_task_set(path: Path, root: Record) -> TaskSet:
    value = root.take("task_set", is_object, "an object with 'tasks' and 'columns'")
    try:
        return TaskSet.from_json(value, f"{path}: task_set")
    except TypeError as error:
        raise UserError(f"{path}: task_set is no task set: {error}") from None


def _parse_score(record: Record) -> Score:
    groups = {one_line(key): _parse_score(child) for key, child in record.children("groups", optional=True).items()}
    return Score(
        accuracy=record.fraction("accuracy"),
        stderr=record.stderr(),
        n=record.count("n"),
        majority=record.fraction("majority", optional=True),
        groups=groups,
    )


def _parse_average(root: Record, tasks: dict[str, Score]) -> Score | None:
    record = root.child("average")
    if record is None:
        return None
    mean = mean_score(list(tasks.values()))
    accuracy = record.fraction("accuracy")
    if abs(accuracy - mean.accuracy) > AVERAGE_TOLERANCE:
        raise UserError(
            f"{root.path}: average.accuracy is {accuracy} where the mean of its {len(tasks)} tasks is "
            f"{mean.accuracy:.4f}; evaluate again to write it anew"
        )
    stderr = record.stderr(optional=True)
    groups = {
        one_line(key): Score(child.fraction("accuracy"), child.stderr(optional=True))
        for key, child in record.children("groups", optional=True).items()
    }
    return Score(accuracy, mean.stderr if stderr is None else stderr, groups=groups)


def _parse_trainable(root: Record) -> Trainable | None:
    record = root.child("trainable")
    return None if record is None else Trainable(record.count("adapter", least=0), record.count("total"))


def _parse_data(root: Record) -> dict[str, str]:
    record = root.child("data")
    hashes = {key: record.text(key, optional=True) for key in record.value} if record else {}
    return {key: value for key, value in hashes.items() if value is not None}
