"""Declarations of dense prediction tasks: the kind of a task's map, its classes, loss weight and metric."""

import dataclasses
import typing
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError

IGNORE = 255  # a pixel without a label, in maps of every kind


@dataclasses.dataclass(frozen=True)
class Kind:
    """Properties of one kind of map. channels: of the decoder's output; 0: one per class. weight: the loss weight in
    MTLoRA (arXiv 2403.20320). metrics: the metrics that a task may have, the default first."""

    channels: int
    weight: float
    metrics: tuple[str, ...]


KINDS = {
    "semantic": Kind(0, 1.0, ("miou", "miou_present")),
    "parts": Kind(0, 2.0, ("miou", "miou_present")),
    "saliency": Kind(1, 5.0, ("saliency_miou", "max_f")),
    "edges": Kind(1, 50.0, ("edge_loss",)),
    "normals": Kind(3, 10.0, ("mean_angle", "rmse_angle")),
    "depth": Kind(1, 1.0, ("depth_rmse",)),
}


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task: predict a map of the image.

    kind: a key of ``KINDS``. Maps of ``semantic`` and ``parts`` hold class indices from 0, ``saliency`` and ``edges`` 0
    and 1, ``normals`` unit vectors (x right, y down), and ``depth`` numbers from 0 in the unit of the data. classes and
    labels: number and names of the classes of a semantic or parts task. weight: by default the kind's.
    """

    kind: str = dataclasses.field(default="", kw_only=True)
    classes: int = dataclasses.field(default=0, kw_only=True)
    labels: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    weight: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if self.kind not in [*KINDS]:  # a list, because the kind may be of any type
            raise UserError(f"task {self.name!r} has kind {self.kind!r}; it must be one of {', '.join(KINDS)}")
        self.require_texts("labels", "none")
        if self.labels and not self.classes:
            object.__setattr__(self, "classes", len(self.labels))
        valid = type(self.classes) is int and (2 <= self.classes < IGNORE if self.has_classes else self.classes == 0)
        if not valid or (self.labels and len(self.labels) != self.classes):
            rule = f"2 to {IGNORE - 1} classes, and as many labels or none" if self.has_classes else "no classes"
            raise UserError(
                f"task {self.name!r} has {self.classes!r} classes and {len(self.labels)} labels; a task of kind "
                f"{self.kind} must have {rule}"
            )
        if self.weight is None:
            object.__setattr__(self, "weight", KINDS[self.kind].weight)
        super().__post_init__()

    @property
    def metrics(self) -> tuple[str, ...]:
        return KINDS[self.kind].metrics

    @property
    def has_classes(self) -> bool:
        """Whether a pixel's label is one of several classes."""
        return KINDS[self.kind].channels == 0

    @property
    def outputs(self) -> int:
        """Number of output channels of the task's decoder."""
        return KINDS[self.kind].channels or self.classes

    @property
    def suffix(self) -> str:
        """The file name extension of a predicted map."""
        return ".npy" if self.kind in ("normals", "depth") else ".png"

    @property
    def extraction_key(self) -> tuple:
        return self.kind, self.classes


class TaskSet(tasks.TaskSet[Task]):
    task_class = Task

    def only(self, names: typing.Sequence[str]) -> "TaskSet":
        """Return the set of the named tasks, in the order of this set with ids from 0; no names: all tasks.

        Raises ``UserError`` for an unknown name.
        """
        chosen = {self[name].name for name in names} or {*self.names}
        kept = [task for task in self if task.name in chosen]
        return TaskSet(tuple(dataclasses.replace(task, id=index) for index, task in enumerate(kept)))


def shipped(name: str) -> TaskSet:
    """Return the tasks of a data set that the package declares: ``pascal``, ``nyud``, ``scenes`` or ``coco128``."""
    return TaskSet.load(Path(__file__).with_name(f"{name}_tasks.json"))
