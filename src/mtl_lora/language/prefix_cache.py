"""Shared opening tokens: what all prompts of a task begin with goes through the model once, not once a question.

Under task routing keys and values depend on the task from the second layer on, so an opening belongs to one task.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, last_logits

_LEAST = 8  # tokens; below, the copies cost more than they save


def shared_opening(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, at least one short of the shortest; empty if they are few."""
    first, last = min(prompts), max(prompts)
    length = min(len(prompt) for prompt in prompts) - 1
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), length)
    return list(first[: min(same, length)]) if min(same, length) >= _LEAST else []


class OpeningCaches:
    """Keys and values of openings, by task and tokens.

    An opening stands before the padding of a left-padded row, so it is shared only where that changes nothing: the
    model takes positions, and its cache keeps every token (no sliding window).
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.usable = accepts_argument(type(model), "position_ids")
        self._caches: dict[tuple[int, tuple[int, ...]], DynamicCache] = {}

    @torch.inference_mode()
    def cache(self, task_id: int, opening: Sequence[int], rows: int) -> DynamicCache | None:
        """A cache that holds ``opening`` in each of ``rows`` rows, or None where the model cannot share one."""
        if not opening or not self.usable:
            return None
        key = task_id, tuple(opening)
        if key not in self._caches:
            ids = torch.tensor([opening], device=self.model.device)
            with route.use(torch.tensor([task_id])):
                found = self.model(input_ids=ids, use_cache=True, **last_logits(self.model)).past_key_values
            self.usable = type(found) is DynamicCache and all(type(layer) is DynamicLayer for layer in found.layers)
            if not self.usable:
                return None
            self._caches[key] = found
        cache = copy.deepcopy(self._caches[key])
        cache.batch_repeat_interleave(rows)
        return cache
