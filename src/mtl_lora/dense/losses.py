"""What a map costs, by its kind: of each task the mean over the pixels that have a label (arXiv 2403.20320).

``IGNORE`` marks a pixel without one, in maps of every kind.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.dense.tasks import IGNORE, TaskSet

_EDGES = 0.95  # the weight of a pixel on an edge, of which there are few


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of classes: output (B, C, H, W), label (B, H, W)."""
    return F.cross_entropy(output, label, ignore_index=IGNORE, reduction="sum")


def balanced_entropy(output: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Of labels 0 and 1 (B, 1, H, W), a positive one weighted by ``weight`` and a negative one by 1 - weight."""
    known, positive = label != IGNORE, (label == 1).to(output.dtype)
    entropy = F.binary_cross_entropy_with_logits(output, positive, reduction="none")
    return (entropy * (positive * weight + (1 - positive) * (1 - weight)) * known).sum()


def saliency(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The weight of a positive pixel is the proportion of negative ones in the batch."""
    known = (label != IGNORE).sum().clamp(min=1)
    return balanced_entropy(output, label, ((label == 0).sum() / known).to(output.dtype))


def edges(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return balanced_entropy(output, label, _EDGES)


def absolute(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The sum of |output - label| where there is a label."""
    known = label != IGNORE
    return ((output - torch.where(known, label, 0)).abs() * known).sum()


def normals(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of the output as unit vectors (B, 3, H, W)."""
    return absolute(F.normalize(output, dim=1), label)


SUMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "semantic": cross_entropy,
    "parts": cross_entropy,
    "saliency": saliency,
    "edges": edges,
    "normals": normals,
    "depth": absolute,
}


def known_values(batch: dict, tasks: TaskSet) -> torch.Tensor:
    """How many labelled values a batch has of each task (T,), three a pixel of normals: what losses are divided by."""
    return torch.stack([(batch[task.name] != IGNORE).sum() for task in tasks]).float()


class TaskLosses:
    """``(model, batch) -> losses (T,), weights (T,), task ids (T,)``: of each task the mean over its labelled pixels in
    the batch, weighted by how many these are. Thus the mean of a step is over all its pixels, however it is split; but
    for saliency, whose weights are those of the batch.
    """

    def __init__(self, tasks: TaskSet):
        self.tasks = tasks

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = model(batch["pixel_values"])
        weights = known_values(batch, self.tasks)
        sums = torch.stack([SUMS[task.kind](outputs[task.name], batch[task.name]) for task in self.tasks])
        return sums / weights.clamp(min=1), weights, torch.arange(len(self.tasks), device=weights.device)
