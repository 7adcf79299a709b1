"""Shared prompt prefixes: the tokens with which all prompts of a task begin go through the model once.

Under task routing keys and values depend on the task from the second layer on, so a prefix belongs to one task.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, last_logits

_LEAST = 8  # tokens; below, the copies cost more than they save


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, at least one short of the shortest; empty if they are few."""
    first, last = min(prompts), max(prompts)
    length = min(len(prompt) for prompt in prompts) - 1
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), length)
    return list(first[: min(same, length)]) if min(same, length) >= _LEAST else []


class PrefixCaches:
    """Keys and values of each task's prompt prefix, computed when it is first needed.

    prefixes: tokens by task id. In a left-padded row the prefix stands before the padding, so it is reused only where
    that changes nothing: the model takes positions, and its cache keeps every token (no sliding window).
    """

    def __init__(self, model: PreTrainedModel, prefixes: Mapping[int, Sequence[int]]):
        self.model = model
        self.usable = accepts_argument(type(model), "position_ids")
        self.use(prefixes)

    def use(self, prefixes: Mapping[int, Sequence[int]]) -> None:
        """Reuse these prefixes in place of those before."""
        self.prefixes = prefixes
        self._caches: dict[int, DynamicCache] = {}

    @torch.inference_mode()
    def start(self, task_id: int, rows: int) -> tuple[DynamicCache | None, int]:
        """(a cache that holds the task's prefix in each of ``rows`` rows, its length); (None, 0) without one."""
        prefix = self.prefixes.get(task_id)
        if not prefix or not self.usable:
            return None, 0
        if task_id not in self._caches:
            ids = torch.tensor([prefix], device=self.model.device)
            with route.use(torch.tensor([task_id])):
                found = self.model(input_ids=ids, use_cache=True, **last_logits(self.model)).past_key_values
            self.usable = type(found) is DynamicCache and all(type(layer) is DynamicLayer for layer in found.layers)
            if not self.usable:
                return None, 0
            self._caches[task_id] = found
        cache = copy.deepcopy(self._caches[task_id])
        cache.batch_repeat_interleave(rows)
        return cache, len(prefix)
