"""Encoded examples to padded batches of tensors."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

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
