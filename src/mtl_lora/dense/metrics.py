"""Rows of sums of predicted maps, from which every metric of a kind is computed.

The metrics themselves are in ``mtl_lora.metrics``, as statistics of these rows, so that they can be resampled over
images. Edges have only their training loss as a metric: F at the best threshold of a data set needs a matching of
thinned edges, which is not implemented.
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

THRESHOLDS = [0.2 + 0.05 * step for step in range(15)]  # for saliency


def counts(task: Task, output: torch.Tensor, label: torch.Tensor) -> list[float]:
    """Return the row of one image. output: the decoder's (channels, H, W). label: ``DenseDataset``'s at the same size.

    Pixels without a label do not count; an image without any label gives zeros.
    """
    return _ROWS[task.metrics[0]](output.double(), label, task)


def _classes(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Return the true positives, false positives and false negatives of each class in pixels: 3 C whole numbers."""
    known, n = label != IGNORE, task.classes
    pairs = torch.bincount(label[known] * n + output.argmax(dim=0)[known], minlength=n * n).reshape(n, n)
    found = pairs.diagonal()
    return [*found.tolist(), *(pairs.sum(dim=0) - found).tolist(), *(pairs.sum(dim=1) - found).tolist()]


def _saliency(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Return intersection over union, precision and recall at each threshold, then 1; all zeros without any label.

    If neither label nor prediction has a positive pixel, intersection over union is 1 and the others are 0, as in the
    original.
    """
    known = label[0] != IGNORE
    if not known.any():
        return [0.0] * (3 * len(THRESHOLDS) + 1)
    target = label[0][known] == 1
    predicted = output[0][known].sigmoid() > torch.tensor(THRESHOLDS, device=output.device)[:, None]
    both = (predicted & target).sum(dim=1).double()
    positives, targets = predicted.sum(dim=1), target.sum().expand(len(THRESHOLDS))
    union = positives + targets - both
    overlap = torch.where(union > 0, both / union.clamp(min=1), 1.0)
    precision, recall = both / positives.clamp(min=1), both / targets.clamp(min=1)
    return [*overlap.tolist(), *precision.tolist(), *recall.tolist(), 1.0]


def _angles(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Return the sum of the angles in degrees, the sum of their squares, and the number of pixels."""
    known = label[0] != IGNORE
    given, target = F.normalize(output[:, known], dim=0), label[:, known].double()
    # With atan2 small angles are accurate, whose cosine alone would round to 1.
    angles = torch.rad2deg(
        torch.atan2(torch.linalg.cross(given, target, dim=0).norm(dim=0), (given * target).sum(dim=0))
    )
    angles = torch.where(given.any(dim=0), angles, 90.0)  # a zero vector has cosine 0
    return [angles.sum().item(), (angles**2).sum().item(), float(known.sum())]


def _depth(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Return the sum of squared errors, and the number of pixels."""
    known = label != IGNORE
    return [((output - label)[known] ** 2).sum().item(), float(known.sum())]


def _edges(output: torch.Tensor, label: torch.Tensor, task: Task) -> list[float]:
    """Return the summed balanced cross-entropy, and the number of pixels."""
    return [edges(output, label).item(), float((label != IGNORE).sum())]


_ROWS = {"miou": _classes, "saliency_miou": _saliency, "edge_loss": _edges, "mean_angle": _angles, "depth_rmse": _depth}
# The names that the original prints for our metrics: its "rmse" of normals is the mean angle.
_OFFICIAL = [("mIoU", "miou"), ("mIoU", "saliency_miou"), ("maxF", "max_f"), ("mean", "mean_angle")]
_OFFICIAL += [("rmse", "mean_angle"), ("rmse", "depth_rmse")]


def task_result(task: Task, lines: Sequence[Mapping], official: bool = False) -> TaskResult:
    """Return a task's result from one or more prediction lines with ``counts``: its metric, the other metrics of its
    kind, and ``unlabelled``, the number of images without a label, which do not count.

    official: also the values that the original (arXiv 2403.20320) prints, by its names. Raises ``UserError`` if no
    image has a label.
    """
    rows = [line["counts"] for line in lines]
    unlabelled = sum(not (sum(row) if task.has_classes else row[-1]) for row in rows)
    if unlabelled == len(rows):
        raise UserError(f"no pixel of the {len(rows)} images has a label of {task.name}; leave it out of --tasks")
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
    """Return the intersection over union of each class by label or index; None for a class neither labelled nor
    predicted."""
    found, wrong, missed = torch.tensor(rows, dtype=torch.float64).sum(dim=0).reshape(3, -1)
    union = found + wrong + missed
    names = task.labels or [str(index) for index in range(task.classes)]
    values = (found / union.clamp(min=1)).tolist()
    return {name: value if pixels else None for name, value, pixels in zip(names, values, union.tolist(), strict=True)}
