"""The language model's own two ends of a training: examples to padded batches, and batches to token losses."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32

IGNORED = -100  # the label that torch's cross entropy skips


@dataclasses.dataclass
class Collator:
    """Pads training examples on the right: input_ids, attention_mask, labels (B, L), task_ids (B,) and loss_weight ().

    Labels are ``IGNORED`` at padding and, unless ``train_on_inputs``, at the prompt. loss_weight: the number of
    supervised tokens, float32; the first token of a row is predicted from nothing, so it never counts.
    """

    pad_token_id: int
    train_on_inputs: bool = False

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"])
            start = 0 if self.train_on_inputs else row["prompt_length"]
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, start : len(ids)] = ids[start:]
        task_ids = torch.tensor([int(row["task_id"]) for row in rows])
        weight = (labels[:, 1:] != IGNORED).sum().float()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {**batch, "task_ids": task_ids, "loss_weight": weight}


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, prefix: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different length to input_ids and attention_mask (B, L), padded on the left for generation.

    prefix: the number of tokens of a shared prompt prefix, which stay at the left edge with the padding behind them.
    """
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row)
        input_ids[index, :prefix] = ids[:prefix]
        attention_mask[index, :prefix] = 1
        input_ids[index, length - len(row) + prefix :] = ids[prefix:]
        attention_mask[index, length - len(row) + prefix :] = 1
    return input_ids, attention_mask


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
