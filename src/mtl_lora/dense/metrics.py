"""What an evaluation keeps of a map: sums over the pixels of an image, from which every metric of its kind follows.

The metrics themselves are in ``mtl_lora.metrics``: statistics of these rows, so that they resample over images. Edges
have no more than their training loss: F at the best threshold of a data set takes a matching of
thinned edges that is not here.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mtl_lora.dense.losses import edges
from mtl_lora.dense.tasks import IGNORE, Task
from mtl_lora.errors import UserError
from mtl_lora.metrics import METRICS
from mtl_lora.results import TaskResult

THRESHOLDS = [0.2 + 0.05 * step for step in range(15)]  # of saliency


def counts(task: Task, output: torch.Tensor, label: torch.Tensor) -> list[float]:
    """The row of one image. output: of the decoder (channels, H, W); label: of ``DenseDataset`` at the same size.

    Pixels without a label do not count; an image without any gives zeros.
    """
    return _ROWS[task.metrics[0]](output.double(), label, task)


def _classes(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Pixels of each class that were found, that were taken for it, that were missed: 3 C whole numbers."""
    known, n = label != IGNORE, task.classes
    pairs = torch.bincount(label[known] * n + output.argmax(dim=0)[known], minlength=n * n).reshape(n, n)
    found = pairs.diagonal()
    return [*found.tolist(), *(pairs.sum(dim=0) - found).tolist(), *(pairs.sum(dim=1) - found).tolist()]


def _saliency(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Intersection over union, precision and recall at each threshold, then 1 for an image with a label, else zeros.

    Where neither the label nor the prediction has a pixel, the first is 1 and the others are 0, as in the original.
    """
    known = label[0] != IGNORE
    if not known.any():
        return [0.0] * (3 * len(THRESHOLDS) + 1)
    wanted = label[0][known] == 1
    taken = output[0][known].sigmoid() > torch.tensor(THRESHOLDS, device=output.device)[:, None]
    both = (taken & wanted).sum(dim=1).double()
    of_taken, of_wanted = taken.sum(dim=1), wanted.sum().expand(len(THRESHOLDS))
    union = of_taken + of_wanted - both
    overlap = torch.where(union > 0, both / union.clamp(min=1), 1.0)
    precision, recall = both / of_taken.clamp(min=1), both / of_wanted.clamp(min=1)
    return [*overlap.tolist(), *precision.tolist(), *recall.tolist(), 1.0]


def _angles(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Sums of the angles in degrees and of their squares, and the number of pixels."""
    known = label[0] != IGNORE
    given, wanted = F.normalize(output[:, known], dim=0), label[:, known].double()
    # Of a small angle the cosine has lost what the sine still has.
    angles = torch.rad2deg(
        torch.atan2(torch.linalg.cross(given, wanted, dim=0).norm(dim=0), (given * wanted).sum(dim=0))
    )
    angles = torch.where(given.any(dim=0), angles, 90.0)  # of no direction, as by its cosine
    return [angles.sum().item(), (angles**2).sum().item(), float(known.sum())]


def _depth(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """The sum of squared errors, and the number of pixels."""
    known = label != IGNORE
    return [((output - label)[known] ** 2).sum().item(), float(known.sum())]


def _edges(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """The sum of the balanced cross entropy, and the number of pixels."""
    return [edges(output, label).item(), float((label != IGNORE).sum())]


_ROWS = {
    "miou": _classes,
    "saliency_miou": _saliency,
    "edge_loss": _edges,
    "mean_angle": _angles,
    "depth_rmse": _depth,
}
# The names under which the original prints values: its "rmse" of normals is the mean angle.
_OFFICIAL = [("mIoU", "miou"), ("mIoU", "saliency_miou"), ("maxF", "max_f"), ("mean", "mean_angle")]
_OFFICIAL += [("rmse", "mean_angle"), ("rmse", "depth_rmse")]


def task_result(task: Task, lines: Sequence[Mapping], official: bool = False) -> TaskResult:
    """A task's result from at least one prediction line with its ``counts``: its metric, the others of its kind, and
    ``unlabelled``, the number of images without a label, which count for nothing. Raises ``UserError`` where all are.

    official: with the values that the original (arXiv 2403.20320) prints, by its names for them.
    """
    rows = [line["counts"] for line in lines]
    unlabelled = sum(not (sum(row) if task.has_classes else row[-1]) for row in rows)
    if unlabelled == len(rows):
        raise UserError(f"none of {len(rows)} images has a pixel with a label of {task.name}; leave it out of --tasks")
    found = {}
    for name in dict.fromkeys([task.metric_name, *task.metrics]):
        metric = METRICS[name]
        found[name] = TaskResult(name, *metric.estimate(metric.written(rows)), len(lines))
    measured = {"unlabelled": unlabelled}
    if task.has_classes:
        measured["iou"] = class_iou(task, rows)
    if official:
        measured["official"] = {key: found[name].value for key, name in _OFFICIAL if name in found}
    result = found.pop(task.metric_name)
    return dataclasses.replace(result, others=found, measured=measured)


def class_iou(task: Task, rows: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """The intersection over union of each class, by its label or number; None for a class that is nowhere."""
    found, taken, missed = torch.tensor(rows, dtype=torch.float64).sum(dim=0).reshape(3, -1)
    union = found + taken + missed
    names = task.labels or [str(index) for index in range(task.classes)]
    values = (found / union.clamp(min=1)).tolist()
    return {name: value if whole else None for name, value, whole in zip(names, values, union.tolist(), strict=True)}
