"""The loss of a batch: only answer positions go through the vocabulary, and tasks are told apart for the log."""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32
from mtl_lora.language.collate import IGNORED


def token_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every supervised token, (N,), and the task id of its row, (N,).

    batch: input_ids, attention_mask, labels (B, L) and task_ids (B,). The hidden state at position j predicts the
    token at j + 1. Only positions with a label are projected to the vocabulary, through the model's own forward
    (its ``logits_to_keep``), so that wrappers such as DDP and DeepSpeed see an ordinary call; a model without that
    argument projects every position.
    """
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    supervised = targets != IGNORED
    keep = keeps_logits(type(_unwrapped(model)))
    with route.use(batch["task_ids"]):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            **({"logits_to_keep": supervised} if keep else {}),
        ).logits
    logits = logits.view(-1, logits.shape[-1]) if keep else logits[supervised]
    losses = F.cross_entropy(at_least_float32(logits), targets[supervised], reduction="none")
    task_ids = batch["task_ids"][:, None].expand_as(targets)[supervised]
    return losses, task_ids


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


@functools.cache
def keeps_logits(model_class: type[nn.Module]) -> bool:
    """Whether a model's forward takes ``logits_to_keep``; for one that does not, a line on stderr says so, once."""
    keeps = accepts_argument(model_class, "logits_to_keep")
    if not keeps:
        print(
            f"{model_class.__name__} takes no logits_to_keep: the vocabulary is projected at every position, "
            "which takes more time and memory",
            file=sys.stderr,
        )
    return keeps


class TaskLosses:
    """Sums of token losses by task since the last reading, kept on the device: no synchronisation while training."""

    def __init__(self, tasks: int):
        self.tasks = tasks
        self.sums: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, task_ids: torch.Tensor) -> None:
        """Count token losses (N,) to their tasks (N,)."""
        if self.sums is None:
            self.sums = torch.zeros(2, self.tasks, dtype=torch.float64, device=losses.device)
        values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
        self.sums.index_add_(1, task_ids, values)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss sums, token counts), each (T,), over all processes; starts from zero again."""
        sums = torch.zeros(2, self.tasks, dtype=torch.float64) if self.sums is None else self.sums
        self.sums = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums[0].cpu(), sums[1].cpu()
