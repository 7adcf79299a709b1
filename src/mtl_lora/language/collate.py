"""Encoded rows to a padded batch of tensors."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

IGNORED = -100  # the label that torch's cross entropy skips and that the Trainer does not count


@dataclasses.dataclass
class Collator:
    """Pads training rows on the right: input_ids, attention_mask, labels (B, L) and task_ids (B,).

    Labels are ``IGNORED`` at padding and, unless ``train_on_inputs``, at the prompt.
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
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "task_ids": task_ids}


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, opening: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different length to input_ids and attention_mask (B, L), padded on the left for generation.

    opening: so many tokens, the same in every row, stay at the left edge, with the padding behind them.
    """
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row)
        input_ids[index, :opening] = ids[:opening]
        attention_mask[index, :opening] = 1
        input_ids[index, length - len(row) + opening :] = ids[opening:]
        attention_mask[index, length - len(row) + opening :] = 1
    return input_ids, attention_mask
