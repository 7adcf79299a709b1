"""Read and validate examples: a text or a pair of texts with a label or a number."""

import dataclasses
import functools
import math

from mtl_lora.data_files import examples_of, label_of, refuse_slips, task_id_of, text_of
from mtl_lora.errors import UserError
from mtl_lora.nlu.tasks import Task, TaskSet
from mtl_lora.samples import Records

FIELDS = ("text", "text_b", "label", "task", "task_id")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a data file.

    text_b: the second text of a pair, or None. label: one of the task's labels, or a number in its range; None for an
    example to predict. index: its position in the file. extra: any further fields (``kind`` groups results).
    """

    text: str
    text_b: str | None
    label: str | float | None
    task_id: int
    index: int
    extra: dict = dataclasses.field(default_factory=dict, compare=False)

    def record(self) -> dict:
        """Return the example as a JSON object that ``parse_example`` reads back."""
        fields = {"text": self.text, "text_b": self.text_b, "label": self.label, "task_id": self.task_id}
        return {key: value for key, value in fields.items() if value is not None} | self.extra


def parse_example(
    value: object,
    index: int,
    source: str,
    tasks: TaskSet,
    task: str | None = None,
    closed: bool = False,
    answered: bool = True,
) -> Example:
    """Return one example from its JSON value; raises ``UserError`` naming ``source``, the example and the field.

    task: the task of all examples; without it the example needs ``task`` or ``task_id``, unless there is only one task.
    closed: no effect here, where every example needs a label. answered: False for an example to predict, whose label is
    not needed and not kept.
    """
    where = f"{source}, example {index}"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with text, label and task, not {type(value).__name__}")
    if "text" not in value:
        raise UserError(f"{where} has no field 'text'")
    refuse_slips(value, where)
    text = text_of(value["text"], f"{where}: 'text'")
    if not text.strip():
        raise UserError(f"{where}: 'text' is empty")
    text_b = value.get("text_b")
    if text_b is not None:
        text_b = text_of(text_b, f"{where}: 'text_b'")
    task_id = task_id_of(value, where, tasks, task)
    label = _label(value, tasks[task_id], where) if answered else None
    extra = {key: entry for key, entry in value.items() if key not in FIELDS}
    return Example(text, text_b, label, task_id, index, extra)


def _label(value: dict, task: Task, where: str) -> str | float:
    """Return the example's label: one of the task's labels, given by name or index, or a number in the task's range."""
    label = value.get("label")
    if label is None or not task.is_regression:
        return label_of(value, task.labels, where, task.name)
    low, high = task.regression
    try:
        number = float(label) if isinstance(label, str | int | float) and type(label) is not bool else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise UserError(
            f"{where}: the label {label!r:.80} must be a number from {low:g} to {high:g}, the range of {task.name}"
        )
    return number


load_examples = functools.partial(examples_of, parse_example)
DATA = functools.partial(Records, load_examples)  # where a study draws its samples
