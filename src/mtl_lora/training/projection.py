"""Logits of only the positions that carry loss, so that no other position is projected to the vocabulary."""

import functools
import sys
import threading
from collections.abc import Mapping

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.saved import unwrap
from mtl_lora.adapter.targets import output_head


def logits_at(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    positions: torch.Tensor,
    task_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the logits (N, vocabulary) at ``positions`` (N,), indices into the flattened (B, L) of the hidden states.

    shape: (B, L). task_ids: (N,), the task of each position, which an adapter on the output head needs. Only these
    positions go through the head, within the model's own forward, so wrappers such as DDP and DeepSpeed see an ordinary
    call. (``logits_to_keep`` takes such positions only from transformers 5.23 on, and as a mask, whose true entries the
    GPU has to count.) A model whose head is not found, or gets other inputs, projects every position.
    """
    selected, thread = [], threading.get_ident()  # forwards of other threads are left alone

    def select(head: nn.Module, args: tuple) -> tuple | None:
        """Reduce the hidden states (B, L, k) to the ``positions``, as (1, N, k)."""
        if threading.get_ident() != thread or not args or args[0].shape[:-1] != tuple(shape):
            return None
        selected.append(True)
        routing.select_rows(task_ids[None])
        return (args[0].flatten(0, 1).index_select(0, positions)[None], *args[1:])

    head = output_head(unwrap(model))
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
    finally:
        if handle:
            handle.remove()
    if selected:
        return logits
    _say_that_all_is_projected(type(unwrap(model)))
    return logits.index_select(0, positions)


@functools.cache
def _say_that_all_is_projected(model_class: type[nn.Module]) -> None:
    """Print a line to stderr, once per model class."""
    print(
        f"{model_class.__name__} has no output head that gets all hidden states, so every position is projected to the "
        "vocabulary, which takes more time and memory",
        file=sys.stderr,
    )
