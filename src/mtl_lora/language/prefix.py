"""Shared prompt prefixes in training: the prefix of a task's prompts runs once per micro-batch, with its gradient.

A micro-batch becomes one row of tokens in two blocks, so that every layer but attention processes it unchanged:

    prefix 1 | padding | prefix 2 ...  (G, P), then  rest of row 1 | padding | rest of row 2 ...  (R, Q)

Attention is the only place where tokens interact. There, each prefix attends to itself, and each row's rest attends to
its own prefix and to itself. There is no cache, and the model is called once, so gradient checkpointing, DDP and ZeRO
see an ordinary forward.

Shape legend: G groups of rows with the same prefix, P tokens of the longest prefix, R rows, Q tokens of the longest
rest, T = G P + R Q tokens in total, N supervised tokens.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtl_lora.adapter.routing import Blocks

_LEAST = 4  # tokens; a shorter prefix is not worth a block
_IMPLEMENTATIONS = ("eager", "sdpa")  # attention implementations that accept the caller's mask
_NAME = "shared_prefix_"  # before an implementation's name: ours, as registered in transformers
Size = tuple[int, int]  # (rows, tokens per row)


def task_prefixes(rows: datasets.Dataset) -> dict[int, list[int]]:
    """The common prefix of all prompts of a task, by task id, leaving at least one token of each prompt.

    rows: encoded examples, with input_ids, prompt_length and task_id. Tasks whose prefix is too short are left out.
    """
    table = rows.with_format("arrow", columns=["input_ids", "prompt_length", "task_id"])[:]
    lists = table.column("input_ids").combine_chunks()
    tokens, starts = lists.values.to_numpy(), lists.offsets.to_numpy()[:-1]
    task_ids, prompt_lengths = (table.column(name).to_numpy() for name in ("task_id", "prompt_length"))
    prefixes = {}
    for task_id in np.unique(task_ids):
        own = starts[task_ids == task_id]
        most = int(prompt_lengths[task_ids == task_id].min()) - 1
        length = next((at for at in range(most) if np.ptp(tokens[own + at])), most)
        if length >= _LEAST:
            prefixes[int(task_id)] = tokens[own[0] : own[0] + length].tolist()
    return prefixes


def longest_pair(lengths: np.ndarray, task_ids: np.ndarray, prefixes: Mapping[int, Sequence[int]]) -> list[int]:
    """The indices of two examples that share a prefix, given the lengths and task ids of all, (N,).

    The last is the longest example that has a prefix, because some models treat distant tokens differently; the first
    is the next longest of its task, or the same example if there is no other.
    """
    longest = max(np.flatnonzero(np.isin(task_ids, list(prefixes))), key=lengths.__getitem__)
    others = np.flatnonzero(task_ids == task_ids[longest])
    others = others[others != longest]
    return [int(max(others, key=lengths.__getitem__, default=longest)), int(longest)]


class Packer:
    """Packs a micro-batch into the two blocks.

    prefixes: tokens by task id. by_task: True if the adapter routes by task, so that each task needs a prefix of its
    own; otherwise tasks with equal prefixes share one.
    """

    def __init__(self, prefixes: Mapping[int, Sequence[int]], by_task: bool, pad_token_id: int):
        self.pad_token_id = pad_token_id
        self.prefixes = {task_id: np.asarray(prefix) for task_id, prefix in prefixes.items()}
        self.owner = {task_id: task_id for task_id in prefixes}  # the task whose prefix is used
        for task_id, prefix in prefixes.items() if not by_task else ():
            self.owner[task_id] = next(other for other in prefixes if list(prefixes[other]) == list(prefix))

    def __call__(self, rows: Sequence[Mapping], length: int, supervised: torch.Tensor) -> dict | None:
        """Pack rows; returns None if that does not save tokens over the padded rows.

        length: the length to which the rows would be padded. supervised: positions (N,) in these padded rows. Returns
        input_ids and position_ids (1, T), task_ids (G + R,), supervised (N,), groups (R,) with the index of each row's
        prefix, prefix_lengths (G,) and sizes.
        """
        owners = [self._owner(row) for row in rows]
        found = list(dict.fromkeys(owners))
        groups = torch.tensor([found.index(owner) for owner in owners])
        prefixes = [self.prefixes[owner] if owner is not None else np.array([], int) for owner in found]
        prefix_lengths = torch.tensor([len(prefix) for prefix in prefixes])
        before, lengths = prefix_lengths[groups], torch.tensor([len(row["input_ids"]) for row in rows])
        G, P, R, Q = len(found), int(prefix_lengths.max()), len(rows), int((lengths - before).max())
        if R * length <= G * P + R * Q:
            return None
        first, last = torch.full((G, P), self.pad_token_id), torch.full((R, Q), self.pad_token_id)
        for index, prefix in enumerate(prefixes):
            first[index, : len(prefix)] = torch.from_numpy(prefix)
        for index, (row, start) in enumerate(zip(rows, before.tolist(), strict=True)):
            rest = torch.as_tensor(row["input_ids"])[start:]
            last[index, : len(rest)] = rest
        # The padding of a rest repeats the row's last position, because the model may have no positions after it.
        positions = [torch.arange(P).expand(G, P), (before[:, None] + torch.arange(Q)).clamp(max=lengths[:, None] - 1)]
        row, column = supervised // length, supervised % length
        in_rest = G * P + row * Q + column - before[row]
        task_ids = torch.tensor([int(row["task_id"]) for row in rows])
        of_prefix = torch.zeros(G, dtype=torch.long).scatter_(0, groups, task_ids)
        return {
            "input_ids": torch.cat([first.flatten(), last.flatten()])[None],
            "position_ids": torch.cat([block.flatten() for block in positions])[None],
            "task_ids": torch.cat([of_prefix, task_ids]),
            "supervised": torch.where(column < before[row], groups[row] * P + column, in_rest),
            "groups": groups,
            "prefix_lengths": prefix_lengths,
            "sizes": ((G, P), (R, Q)),
        }

    def _owner(self, row: Mapping) -> int | None:
        """The task whose prefix a row begins with; None for a row without one."""
        prefix = self.prefixes.get(int(row["task_id"]))
        if prefix is None or row["prompt_length"] <= len(prefix):
            return None
        begins = np.array_equal(np.asarray(row["input_ids"][: len(prefix)]), prefix)
        return self.owner[int(row["task_id"])] if begins else None


@dataclasses.dataclass(eq=False)
class Layout:
    """Where the blocks lie in the one row of a packed micro-batch, for attention; the fields are ``Packer``'s."""

    groups: torch.Tensor
    prefix_lengths: torch.Tensor
    sizes: tuple[Size, Size]
    masks: dict = dataclasses.field(default_factory=dict)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the heads of all tokens (1, H, T, D) into those of prefixes (G, H, P, D) and of rests (R, H, Q, D)."""
        first, last = self.sizes
        parts = x[0].split([first[0] * first[1], last[0] * last[1]], dim=1)
        return parts[0].unflatten(1, first).transpose(0, 1), parts[1].unflatten(1, last).transpose(0, 1)

    def masks_for(self, like: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The additive attention masks of the prefixes (1, 1, P, P) and of the rests (R, 1, Q, P + Q).

        window: the number of most recent positions, its own included, that a token sees; None: all.
        """
        if (window, like.dtype) not in self.masks:
            (_, P), (R, Q) = self.sizes
            prefix, rest = torch.arange(P, device=like.device), torch.arange(Q, device=like.device)
            before = self.prefix_lengths.index_select(0, self.groups)[:, None, None]
            in_prefix, in_rest = prefix[:, None] - prefix, (rest[:, None] - rest).expand(R, Q, Q)
            to_prefix = (before + rest[:, None] - prefix).masked_fill(prefix >= before, -1)
            self.masks[window, like.dtype] = tuple(
                torch.zeros(far.shape, dtype=like.dtype, device=like.device)
                .masked_fill_((far < 0) | (far >= (window or P + Q)), torch.finfo(like.dtype).min)
                .unsqueeze(1)
                for far in (in_prefix[None], torch.cat([to_prefix, in_rest], dim=2))
            )
        return self.masks[window, like.dtype]


@functools.cache
def _eager_attention(attention: type) -> Callable:
    """The eager attention function of the model that defines this attention class or one of its bases."""
    modules = (sys.modules[parent.__module__] for parent in attention.__mro__)
    return next(module.eager_attention_forward for module in modules if hasattr(module, "eager_attention_forward"))


def _attend(implementation: str, module, query, key, value, attention_mask, *arguments, prefix_layout=None, **options):
    """A transformers attention, called twice for a packed micro-batch (1, H, T, D): for the prefixes and the rests."""
    attend = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if attend is None:  # eager attention, which each model defines itself
        attend = _eager_attention(type(module))
    if prefix_layout is None:
        return attend(module, query, key, value, attention_mask, *arguments, **options)
    prefix_mask, rest_mask = prefix_layout.masks_for(query, options.get("sliding_window"))
    (query, rests), *of_prefixes = prefix_layout.split(query), prefix_layout.split(key), prefix_layout.split(value)
    prefixes = attend(module, query, *(heads for heads, _ in of_prefixes), prefix_mask, *arguments, **options)[0]
    # The rows of a group read the same prefix, so its gradient is the sum over these rows.
    joined = [torch.cat([heads.index_select(0, prefix_layout.groups), own], dim=2) for heads, own in of_prefixes]
    rests = attend(module, rests, *joined, rest_mask, *arguments, **options)[0]
    return torch.cat([prefixes.flatten(0, 1), rests.flatten(0, 1)])[None], None


for _implementation in _IMPLEMENTATIONS:
    AttentionInterface.register(_NAME + _implementation, functools.partial(_attend, _implementation))
    AttentionMaskInterface.register(_NAME + _implementation, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])


def prefixes_to_share(
    mode: str, rows: datasets.Dataset, model: PreTrainedModel, dropout: float
) -> tuple[dict[int, list[int]], str]:
    """(the prefixes that a training run shares, by task id, possibly none; a log line that says which, or why none).

    mode: always, never, or auto: share only without any dropout, because rows that share a prefix would share its
    dropout mask. model: may be without weights. dropout: the dropout of the adapter.
    """
    if mode == "never":
        return {}, "prompt prefixes are not shared (--reuse_prefix never)"
    if not getattr(model, "_supports_attention_backend", False):
        return {}, f"prompt prefixes are not shared: {type(model).__name__} does not support another attention"
    # A convolution mixes so few tokens, and a linear attention forgets so fast, that the change in losses may vanish in
    # 16-bit rounding, unseen by the check.
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if "linear_attention" in kinds or any(isinstance(each, torch.nn.Conv1d) for each in model.get_decoder().modules()):
        return {}, f"prompt prefixes are not shared: {type(model).__name__} mixes tokens by more than attention"
    own = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if mode == "auto" and any([dropout, *own, getattr(config, "attention_dropout", 0)]):
        how = "--lora_dropout 0 is faster, and so is --reuse_prefix always, with one dropout mask for all rows"
        return {}, f"prompt prefixes are not shared, because dropout is on ({how})"
    prefixes = task_prefixes(rows)
    if not prefixes:
        return {}, "prompt prefixes are not shared: no task's prompts have one"
    lengths = sorted(map(len, prefixes.values()))
    return prefixes, f"shared prompt prefixes: {len(prefixes)} of {lengths[0]} to {lengths[-1]} tokens run once a batch"


def let_attention_share(model: PreTrainedModel) -> str:
    """Make a model's attention support packed micro-batches too; returns the name of the previous implementation."""
    used = model.config._attn_implementation
    model.set_attn_implementation(_NAME + (used if used in _IMPLEMENTATIONS else "sdpa"))
    return used


def forward_arguments(packed: Mapping) -> tuple[dict, Blocks]:
    """(the arguments of a model's forward over a packed micro-batch, the blocks of its task ids)."""
    layout = Layout(packed["groups"], packed["prefix_lengths"], tuple(tuple(size) for size in packed["sizes"]))
    # Without a mask transformers would build one of (T, T). It passes a 4D mask on unchanged, and ours is never read.
    mask = torch.zeros(1, 1, 1, 1, device=packed["input_ids"].device)
    arguments = {name: packed[name] for name in ("input_ids", "position_ids")}
    return {**arguments, "attention_mask": mask, "prefix_layout": layout}, Blocks(packed["task_ids"], layout.sizes)
