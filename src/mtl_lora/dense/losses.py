"""Losses of maps: for each task the mean over the labelled values (arXiv 2403.20320); every function returns a sum."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora.dense.tasks import IGNORE, TaskSet

_EDGES = 0.95  # the weight of edge pixels, which are few


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of class outputs (B, C, H, W) with labels (B, H, W), summed over pixels."""
    return F.cross_entropy(output, label, ignore_index=IGNORE, reduction="sum")


def balanced_entropy(output: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Return the binary cross-entropy summed over labels 0 and 1 (B, 1, H, W), weighted by 1 - weight and weight."""
    known, positive = label != IGNORE, (label == 1).to(output.dtype)
    entropy = F.binary_cross_entropy_with_logits(output, positive, reduction="none")
    return (entropy * (positive * weight + (1 - positive) * (1 - weight)) * known).sum()


def saliency(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return ``balanced_entropy`` with the batch's proportion of negative pixels as the weight of positive ones."""
    known = (label != IGNORE).sum().clamp(min=1)
    return balanced_entropy(output, label, ((label == 0).sum() / known).to(output.dtype))


def edges(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return ``balanced_entropy`` with a fixed weight."""
    return balanced_entropy(output, label, _EDGES)


def absolute(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the sum of |output - label| over labelled values."""
    known = label != IGNORE
    return ((output - torch.where(known, label, 0)).abs() * known).sum()


def normals(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return ``absolute`` of the output (B, 3, H, W) normalised to unit vectors."""
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
    """Return the number of labelled values per task (T,), three per pixel for normals, by which losses are divided."""
    return torch.stack([(batch[task.name] != IGNORE).sum() for task in tasks]).float()


def task_losses(tasks: TaskSet, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses (T,), weights (T,) and task ids (T,) of a batch.

    A task's loss is the mean over its labelled values in the batch, and its weight is the number of these values. Over
    a step the loss is therefore the mean over all values of the step, however it is split into batches, except for
    saliency, whose pixel weights depend on the batch.
    """
    outputs = model(batch["pixel_values"])
    weights = known_values(batch, tasks)
    sums = torch.stack([SUMS[task.kind](outputs[task.name], batch[task.name]) for task in tasks])
    return sums / weights.clamp(min=1), weights, torch.arange(len(tasks), device=weights.device)
