"""The scores of options in two passes, for any model with a cache: what ``branches`` does in one.

One pass over prompt and opening fills the cache and gives the first token of every tail; the few tokens after it run
on that cache, all options of all questions in one batch.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache, PreTrainedModel

from mtl_lora import route
from mtl_lora.base_model import accepts_argument, at_least_float32, last_logits, positions_of


def cache_scores(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    tails: Sequence[Sequence[list[int]]],
    cache: DynamicCache | None,
    pad_token_id: int,
) -> list[list[float]]:
    """``branch_scores`` in two passes, for any model with a cache."""
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    start = cache.get_seq_length() if cache else 0
    output = model(
        input_ids=input_ids[:, start:],
        attention_mask=mask,
        **_positions(model, mask, start),
        past_key_values=cache,
        use_cache=True,
        **last_logits(model),
    )
    first = _log_probabilities(output.logits[:, -1])
    rows = [row for row, options in enumerate(tails) for _ in options]
    flat = [tail for options in tails for tail in options]
    scores = first[rows, [tail[0] for tail in flat]].double()
    later = [index for index, tail in enumerate(flat) if len(tail) > 1]
    if later:
        chosen = torch.tensor([rows[index] for index in later])
        cache = output.past_key_values
        cache.batch_select_indices(chosen.to(model.device))
        with route.use(route.current().task_ids[chosen]):
            scores[later] += _tail_scores(
                model, cache, mask[chosen.to(mask.device)], [flat[i] for i in later], pad_token_id
            )
    return [part.tolist() for part in torch.split(scores.cpu(), [len(options) for options in tails])]


def _tail_scores(model, cache, mask: torch.Tensor, tails: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """Summed log-probability of each tail after its first token, which is fed; cache and mask have a row a tail."""
    length = max(len(tail) for tail in tails) - 1
    device = mask.device
    fed = torch.tensor([(tail[:-1] + [pad_token_id] * length)[:length] for tail in tails], device=device)
    wanted = torch.tensor([(tail[1:] + [pad_token_id] * length)[:length] for tail in tails], device=device)
    real = torch.tensor([[1] * (len(tail) - 1) + [0] * (length - len(tail) + 1) for tail in tails], device=device)
    whole_mask = torch.cat([mask, real], dim=1)
    logits = model(
        input_ids=fed,
        attention_mask=whole_mask,
        **_positions(model, whole_mask, mask.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).logits
    logp = _log_probabilities(logits).gather(2, wanted[:, :, None])[:, :, 0]
    return (logp.double() * real).sum(dim=1)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the vocabulary, in float32 at least."""
    return log_softmax(at_least_float32(logits), dim=-1)


def _positions(model: PreTrainedModel, mask: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """position_ids of the columns from ``start``, for a model that takes them."""
    if not accepts_argument(type(model), "position_ids"):
        return {}
    return {"position_ids": positions_of(mask)[:, start:]}
