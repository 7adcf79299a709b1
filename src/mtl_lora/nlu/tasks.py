"""Declarations of encoder tasks: the labels of a classification, or the range of a regression."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.metrics import metrics_for

# Fields of a tasks file that only the system ``language`` reads, so that both systems can share a file.
_OF_LANGUAGE = ("question", "pattern", "answer_prefix")


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task: a classification into ``labels``, in the order of the head's outputs, or a regression to a range.

    regression: (low, high), the smallest and the largest target. metric: a name in ``metrics.METRICS``; empty: accuracy
    for a classification, Pearson correlation for a regression.
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
        if not (numbers and -sys.float_info.max / 2 <= ends[0] < ends[1] <= sys.float_info.max / 2):
            raise UserError(
                f"task {self.name!r} has regression {ends!r}; it must be [low, high], two numbers with low < high"
            )
        object.__setattr__(self, "regression", (float(ends[0]), float(ends[1])))

    @classmethod
    def from_json(cls, entry: object, where: str) -> typing.Self:
        if isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if key not in _OF_LANGUAGE}
            if "options" in entry and "labels" not in entry:
                entry["labels"] = entry.pop("options")
        return super().from_json(entry, where)

    @property
    def is_regression(self) -> bool:
        """Whether the task predicts a number."""
        return self.regression is not None

    @property
    def outputs(self) -> int:
        """Number of outputs of the task's head: one per label, or one for a regression."""
        return len(self.labels) or 1

    @property
    def extraction_key(self) -> tuple:
        return self.labels, self.regression

    def scaled(self, value: float) -> float:
        """Return a number in the task's range scaled to 0 to 1, as the head learns it."""
        low, high = self.regression
        return (value - low) / (high - low)

    def unscaled(self, output: float) -> float:
        """Return a head's output, about 0 to 1, as a number in the task's range; the inverse of ``scaled``."""
        low, high = self.regression
        return low + (high - low) * output


class TaskSet(tasks.TaskSet[Task]):
    task_class = Task


# Eight of the nine GLUE tasks (arXiv 1804.07461) with GLUE's metrics; only ``prepare glue --hub`` declares WNLI.
_GLUE = json.loads(Path(__file__).with_name("glue_tasks.json").read_text(encoding="utf-8"))["tasks"]
GLUE = TaskSet.from_json([task for task in _GLUE if task["name"] != "wnli"], "GLUE's tasks")
