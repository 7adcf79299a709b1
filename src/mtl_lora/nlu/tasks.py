"""Tasks of an encoder as data: which labels a task has, or the range of its numbers."""

import dataclasses
import json
import typing
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.metrics import metrics_for

# What a tasks file may say to the other system that reads it.
_OF_LANGUAGE = ("question", "pattern", "answer_prefix")


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task: a classification by ``labels``, in the order of the head's outputs, or a regression to a range.

    regression: (low, high), the least and the largest target. metric: a name in ``metrics.METRICS``; empty: accuracy
    of labels, Pearson's correlation of numbers.
    """

    labels: tuple[str, ...] = ()
    regression: tuple[float, float] | None = None

    def __post_init__(self):
        self.require_texts("labels", "none for a regression")
        if self.regression is not None:
            self._check_range()
        if bool(self.labels) == bool(self.regression):
            raise UserError(f'task {self.name!r} needs either "labels": [...] or "regression": [low, high]')
        object.__setattr__(self, "metrics", metrics_for(self.labels, numbers=self.is_regression))
        super().__post_init__()

    def _check_range(self) -> None:
        ends = self.regression
        numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        if not numbers or not ends[0] < ends[1] or abs(ends[0]) + abs(ends[1]) == float("inf"):
            raise UserError(
                f"task {self.name!r} has regression {ends!r}; it must be [low, high], a number and a larger one"
            )
        object.__setattr__(self, "regression", (float(ends[0]), float(ends[1])))

    @classmethod
    def from_json(cls, entry: object, where: str) -> typing.Self:
        if isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if key not in _OF_LANGUAGE}
            if "options" in entry and "labels" not in entry:
                entry["labels"] = entry.pop("options")
        return super().from_json(entry, where)

    def to_json(self) -> dict:
        kept = ("name", "id", "title", "metric", "regression" if self.is_regression else "labels")
        return {key: value for key, value in super().to_json().items() if key in kept}

    @property
    def is_regression(self) -> bool:
        """Whether the task predicts a number."""
        return self.regression is not None

    @property
    def outputs(self) -> int:
        """Outputs of the task's head: one for each label, or one number."""
        return len(self.labels) or 1

    @property
    def metric_name(self) -> str:
        """The metric in effect."""
        return self.metric or ("pearson" if self.is_regression else "accuracy")

    @property
    def extraction_key(self) -> tuple:
        return self.labels, self.regression

    def scaled(self, value: float) -> float:
        """A number of the task's range as the head learns it, 0 to 1."""
        low, high = self.regression
        return (value - low) / (high - low)

    def unscaled(self, output: float) -> float:
        """What a head's output, about 0 to 1, means in the task's range."""
        low, high = self.regression
        return low + (high - low) * output


class TaskSet(tasks.TaskSet[Task]):
    """Tasks in id order (ids 0..T-1 without gaps); ``columns`` names them in the order of a results table."""

    task_class = Task


# Eight of GLUE's nine tasks (arXiv 1804.07461), with its metrics; WNLI is declared by the preparation that has it.
_GLUE = json.loads(Path(__file__).with_name("glue_tasks.json").read_text(encoding="utf-8"))["tasks"]
GLUE = TaskSet.from_json([task for task in _GLUE if task["name"] != "wnli"], "GLUE's tasks")
