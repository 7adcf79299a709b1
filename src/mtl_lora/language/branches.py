"""All options of a question in one pass: its context once, and behind it a branch of tokens for each option.

    opening of the task | padding | context ... | 1 | 2 | 3 | 4 | padding
                                                 branches; each sees the context and itself, no other branch

A branch holds an option's tail without its last token, at the positions that follow the context; so the columns from
the context's last on predict every token of every tail. Next to a second pass on the cache this copies no keys and
values for the options.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtl_lora.base_model import accepts_argument, at_least_float32, positions_of

_ATTENTION = ("sdpa", "eager")  # implementations that take a mask of their caller's, (B, 1, Q, K)


def takes_branches(model: PreTrainedModel) -> bool:
    """Whether a model says that it can: it takes positions and a mask of ours, and no layer forgets tokens."""
    if model.config._attn_implementation not in _ATTENTION:
        return False
    if not accepts_argument(type(model), "position_ids") or not accepts_argument(type(model), "logits_to_keep"):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def branch_scores(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    tails: Sequence[Sequence[list[int]]],
    cache: DynamicCache | None,
    pad_token_id: int,
) -> list[list[float]]:
    """The summed log-probability of every tail of every row, in nats.

    input_ids, mask (B, L): contexts, padded so that all end in the last column. tails: of each row, its options' in
    tokens. cache: keys and values of the first columns, or None. To be called under the rows' route.
    """
    start = cache.get_seq_length() if cache else 0
    device = model.device
    branches = _Branches(tails, pad_token_id)
    whole = torch.cat([input_ids, branches.tokens], dim=1)[:, start:]
    positions = torch.cat([positions_of(mask), mask.sum(dim=1, keepdim=True) + branches.depths], dim=1)[:, start:]
    visible = _visible(mask, branches.numbers)[:, None, start:]
    hidden = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=whole.to(device),
        attention_mask=hidden.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=branches.tokens.shape[1] + 1,
    ).logits
    logits = at_least_float32(logits)
    log_total = logits.logsumexp(dim=-1)
    rows, columns, targets = (torch.tensor(values, device=device) for values in branches.predictions)
    logp = (logits[rows, columns, targets] - log_total[rows, columns]).double().cpu()
    sums = torch.zeros(branches.count, dtype=torch.float64).index_add_(0, torch.tensor(branches.owners), logp)
    return [part.tolist() for part in sums.split([len(row) for row in tails])]


class _Branches:
    """The branches of a batch as columns, and which column predicts which token of whose tail.

    tokens, depths, numbers: (B, E) ids, tokens before it in its branch, and the branch it belongs to (-1: padding).
    predictions: (rows, columns, targets), a tail's token each, where column 0 is the context's last and column j + 1
    is branch column j. owners: the tail of each, counted over the batch; count: how many tails there are.
    """

    def __init__(self, tails: Sequence[Sequence[list[int]]], pad_token_id: int):
        width = max(sum(len(tail) - 1 for tail in row) for row in tails)
        shape = len(tails), width
        self.tokens = torch.full(shape, pad_token_id)
        self.depths, self.numbers = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
        self.predictions, self.owners, self.count = ([], [], []), [], 0
        for row, options in enumerate(tails):
            column = 0
            for number, tail in enumerate(options):
                end = column + len(tail) - 1
                self.tokens[row, column:end] = torch.tensor(tail[:-1], dtype=torch.long)
                self.depths[row, column:end] = torch.arange(len(tail) - 1)
                self.numbers[row, column:end] = number
                self.predictions[0].extend([row] * len(tail))
                self.predictions[1].extend([0, *range(column + 1, end + 1)])
                self.predictions[2].extend(tail)
                self.owners.extend([self.count] * len(tail))
                self.count += 1
                column = end


def _visible(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Which key each query sees, (B, L + E, L + E): earlier real tokens of the context and of its own branch.

    Every token sees itself, padding too: a row of a softmax without any key is no number.
    """
    length, width = mask.shape[1], numbers.shape[1]
    owner = torch.cat([mask.long() - 2, numbers], dim=1)  # context -1, its padding -2
    real = torch.cat([mask.bool(), numbers >= 0], dim=1)
    same = owner[:, :, None] == owner[:, None, :]
    of_context = torch.zeros(length + width, dtype=torch.bool)
    of_context[:length] = True
    earlier = torch.ones(length + width, length + width, dtype=torch.bool).tril()
    return (earlier & (same | of_context) & real[:, None, :]) | torch.eye(length + width, dtype=torch.bool)
