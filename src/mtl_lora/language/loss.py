"""The losses of a batch: cross entropy of every supervised token; no other position goes through the vocabulary."""

import functools
import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32
from mtl_lora.language.collate import IGNORED


def token_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of every supervised token, (N,), its weight, which is one, (N,), and its row's task id, (N,).

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
    return losses, torch.ones_like(losses), task_ids


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
