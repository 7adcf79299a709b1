"""Tasks of dense prediction as data: what a task's map holds, its loss weight and its metric."""

import dataclasses
import typing
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError

IGNORE = 255  # a pixel without a label, in maps of every kind


@dataclasses.dataclass(frozen=True)
class Kind:
    """What maps of one kind are. channels: of a decoder's output; 0: one for each class. weight: of its loss, as
    MTLoRA (arXiv 2403.20320) has it. metrics: those that a task may have, the first by default."""

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
    """One task: a map of the image.

    kind: a key of ``KINDS``. Maps are ``semantic`` and ``parts``: class indices from 0; ``saliency`` and ``edges``: 0
    and 1; ``normals``: unit vectors (x right, y down); ``depth``: from 0, in the unit of the data. classes: the number
    of classes, labels: their names, of a semantic or parts task. weight: of its loss in the sum over tasks.
    """

    kind: str = dataclasses.field(default="", kw_only=True)
    classes: int = dataclasses.field(default=0, kw_only=True)
    labels: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    weight: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"task {self.name!r} has kind {self.kind!r}; it must be one of {', '.join(KINDS)}")
        self.require_texts("labels", "none")
        if self.labels and not self.classes:
            object.__setattr__(self, "classes", len(self.labels))
        known = type(self.classes) is int and (2 <= self.classes < IGNORE if self.has_classes else self.classes == 0)
        if not known or (self.labels and len(self.labels) != self.classes):
            rule = f"2 to {IGNORE - 1} classes, and as many labels or none" if self.has_classes else "no classes"
            raise UserError(
                f"task {self.name!r} has {self.classes!r} classes and {len(self.labels)} labels; a task of kind "
                f"{self.kind} has {rule}"
            )
        if self.weight is None:
            object.__setattr__(self, "weight", KINDS[self.kind].weight)
        if type(self.weight) not in (int, float) or not 0 < self.weight < float("inf"):
            raise UserError(f"task {self.name!r} has weight {self.weight!r}; it must be a number above 0")
        super().__post_init__()

    def to_json(self) -> dict:
        return {key: value for key, value in super().to_json().items() if value or key == "id"}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that the task may have."""
        return KINDS[self.kind].metrics

    @property
    def has_classes(self) -> bool:
        """Whether a pixel's label is one of several classes."""
        return KINDS[self.kind].channels == 0

    @property
    def outputs(self) -> int:
        """Channels of the task's decoder."""
        return KINDS[self.kind].channels or self.classes

    @property
    def suffix(self) -> str:
        """How the file of a predicted map ends."""
        return ".npy" if self.kind in ("normals", "depth") else ".png"

    @property
    def metric_name(self) -> str:
        """The metric in effect."""
        return self.metric or self.metrics[0]

    @property
    def loss_weight(self) -> float:
        return self.weight

    @property
    def extraction_key(self) -> tuple:
        return self.kind, self.classes


class TaskSet(tasks.TaskSet[Task]):
    """Tasks in id order (ids 0..T-1 without gaps); ``columns`` names them in the order of a results table."""

    task_class = Task

    def only(self, names: typing.Sequence[str]) -> "TaskSet":
        """The set of these tasks alone, in their order here, with ids from 0; all of none. Raises ``UserError``."""
        chosen = {self[name].name for name in names} or {*self.names}
        kept = [task for task in self if task.name in chosen]
        return TaskSet(tuple(dataclasses.replace(task, id=index) for index, task in enumerate(kept)))


def shipped(name: str) -> TaskSet:
    """The tasks of a set that the project knows: ``pascal``, ``nyud``, ``scenes`` or ``coco128``."""
    return TaskSet.load(Path(__file__).with_name(f"{name}_tasks.json"))
