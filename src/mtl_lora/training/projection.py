"""Logits of the positions that carry loss alone: what a vocabulary costs is paid for these and no other."""

import functools
import sys
import threading
from collections.abc import Mapping

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.inject import output_head
from mtl_lora.adapter.saved import unwrap


def logits_at(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    positions: torch.Tensor,
    task_ids: torch.Tensor,
) -> torch.Tensor:
    """The logits (N, vocabulary) of ``positions`` (N,), counted through the rows of the last hidden states (B, L).

    shape: (B, L). task_ids: (N,), of the positions, which an adapter on the output head needs. Only these positions go
    through the head, in the model's own forward, so that wrappers such as DDP and DeepSpeed see an ordinary call.
    (``logits_to_keep`` takes such positions from transformers 5.23 on alone, and as a mask, whose trues a GPU must
    count.) A model whose head is not found, or sees something else, projects every position.
    """
    selection = _Selection(tuple(shape), positions, task_ids)
    head = output_head(unwrap(model))
    handle = head.register_forward_pre_hook(selection) if head is not None else None
    try:
        logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
    finally:
        if handle:
            handle.remove()
    if selection.selected:
        return logits
    _say_that_all_is_projected(type(unwrap(model)))
    return logits.index_select(0, positions)


class _Selection:
    """A hook before an output head: of hidden states (B, L, k) it hands on the ``positions`` alone, as (1, N, k)."""

    def __init__(self, shape: tuple[int, int], positions: torch.Tensor, task_ids: torch.Tensor):
        self.shape, self.positions, self.task_ids = shape, positions, task_ids
        self.selected, self.thread = False, threading.get_ident()  # another thread's forward is none of ours

    def __call__(self, head: nn.Module, inputs: tuple) -> tuple | None:
        if (
            self.thread != threading.get_ident()
            or not inputs
            or inputs[0].dim() != 3
            or inputs[0].shape[:2] != self.shape
        ):
            return None
        self.selected = True
        routing.select_rows(self.task_ids[None])
        return (inputs[0].flatten(0, 1).index_select(0, self.positions)[None], *inputs[1:])


@functools.cache
def _say_that_all_is_projected(model_class: type[nn.Module]) -> None:
    """A line on stderr, once for a class of models."""
    print(
        f"{model_class.__name__} has no output head that sees all hidden states: the vocabulary is projected at every "
        "position, which takes more time and memory",
        file=sys.stderr,
    )
