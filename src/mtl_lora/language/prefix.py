"""The prompt prefix that a task's examples share runs once in a training step, with its gradient.

A micro-batch becomes one row of tokens in two blocks, so that every layer but attention takes it as it is:

    prefix 1 | padding | prefix 2 ...  (G, P), then  rest of row 1 | padding | rest of row 2 ...  (R, Q)

Attention is the one place where tokens meet. There, the prefixes attend to themselves, and each row's rest to its
own prefix and to itself. No cache is involved, and the model is called once, so gradient checkpointing, DDP and ZeRO
see an ordinary forward.

Shape legend: G groups of rows with one prefix, P tokens of the longest prefix, R rows, Q tokens of the longest rest,
T = G P + R Q tokens in all, N supervised tokens.
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

_LEAST = 4  # tokens of a prefix; fewer are not worth a block
_IMPLEMENTATIONS = ("eager", "sdpa")  # which take a mask of their caller's
_NAME = "shared_prefix_"  # before the implementation's: under this transformers knows ours
Size = tuple[int, int]  # rows and tokens of each


def task_prefixes(rows: datasets.Dataset) -> dict[int, list[int]]:
    """The tokens with which all prompts of a task begin, by task id; at least one token of each prompt is left over.

    rows: encoded examples, with input_ids, prompt_length and task_id. Tasks with a few such tokens alone are left out.
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
    """Two examples of these lengths and task ids, (N,), that share a prefix, perhaps one twice: the longest that has
    any, for some models treat distant tokens otherwise, behind the next of its task."""
    longest = max(np.flatnonzero(np.isin(task_ids, list(prefixes))), key=lengths.__getitem__)
    others = np.flatnonzero(task_ids == task_ids[longest])
    others = others[others != longest]
    return [int(max(others, key=lengths.__getitem__, default=longest)), int(longest)]


class Packer:
    """Makes the two blocks of a micro-batch.

    prefixes: tokens by task id. by_task: whether a prefix belongs to one task, as it does where the adapter routes by
    task; else rows of several tasks share an equal one.
    """

    def __init__(self, prefixes: Mapping[int, Sequence[int]], by_task: bool, pad_token_id: int):
        self.pad_token_id = pad_token_id
        self.prefixes = {task_id: np.asarray(prefix) for task_id, prefix in prefixes.items()}
        self.owner = {task_id: task_id for task_id in prefixes}  # the task under which a prefix goes
        for task_id, prefix in prefixes.items() if not by_task else ():
            self.owner[task_id] = next(other for other in prefixes if list(prefixes[other]) == list(prefix))

    def __call__(self, rows: Sequence[Mapping], length: int, supervised: torch.Tensor) -> dict | None:
        """Rows, and the supervised positions (N,) in them as padded to a length, as two blocks.

        input_ids, position_ids (1, T), task_ids (G + R,), supervised (N,), groups (R,): the prefix of each row,
        prefix_lengths (G,), sizes. None where that would be no fewer tokens than the padded rows have.
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
        # Padding takes the position of the last token before it, for a model may have no more.
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
        """The task under which the prefix goes that a row begins with; None for a row without one."""
        prefix = self.prefixes.get(int(row["task_id"]))
        if prefix is None or row["prompt_length"] <= len(prefix):
            return None
        begins = np.array_equal(np.asarray(row["input_ids"][: len(prefix)]), prefix)
        return self.owner[int(row["task_id"])] if begins else None


@dataclasses.dataclass(eq=False)
class Layout:
    """How attention finds the blocks in the one row of a micro-batch; the fields are the packer's."""

    groups: torch.Tensor
    prefix_lengths: torch.Tensor
    sizes: tuple[Size, Size]
    masks: dict = dataclasses.field(default_factory=dict)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads of all tokens, (1, H, T, D), as those of the prefixes (G, H, P, D) and of the rests (R, H, Q, D)."""
        first, last = self.sizes
        parts = x[0].split([first[0] * first[1], last[0] * last[1]], dim=1)
        return parts[0].unflatten(1, first).transpose(0, 1), parts[1].unflatten(1, last).transpose(0, 1)

    def masks_for(self, like: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to scores: of prefixes (1, 1, P, P), of rests (R, 1, Q, P + Q).

        window: the number of last positions, its own among them, that a token sees; None for all.
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
    """That of the model whose attention this class is, or derives from."""
    modules = (sys.modules[parent.__module__] for parent in attention.__mro__)
    return next(module.eager_attention_forward for module in modules if hasattr(module, "eager_attention_forward"))


def _attend(implementation: str, module, query, key, value, attention_mask, *arguments, prefix_layout=None, **options):
    """An attention of transformers, which (1, H, T, D) of a packed micro-batch goes through in two calls."""
    attend = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if attend is None:  # each model has an eager one of its own
        attend = _eager_attention(type(module))
    if prefix_layout is None:
        return attend(module, query, key, value, attention_mask, *arguments, **options)
    prefix_mask, rest_mask = prefix_layout.masks_for(query, options.get("sliding_window"))
    (query, rests), *of_prefixes = prefix_layout.split(query), prefix_layout.split(key), prefix_layout.split(value)
    prefixes = attend(module, query, *(heads for heads, _ in of_prefixes), prefix_mask, *arguments, **options)[0]
    # Rows of one group read one prefix, whose gradient is the sum of theirs.
    joined = [torch.cat([heads.index_select(0, prefix_layout.groups), own], dim=2) for heads, own in of_prefixes]
    rests = attend(module, rests, *joined, rest_mask, *arguments, **options)[0]
    return torch.cat([prefixes.flatten(0, 1), rests.flatten(0, 1)])[None], None


for _implementation in _IMPLEMENTATIONS:
    AttentionInterface.register(_NAME + _implementation, functools.partial(_attend, _implementation))
    AttentionMaskInterface.register(_NAME + _implementation, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])


def prefixes_to_share(
    mode: str, rows: datasets.Dataset, model: PreTrainedModel, dropout: float
) -> tuple[dict[int, list[int]], str]:
    """The prefixes that a training will share, by task id, perhaps none, and a line that says so and why.

    mode: always, never, or auto: where the losses stay as they are, that is, without any dropout, since rows that share
    a prefix share its dropout mask. model: may be without weights. dropout: of the adapter.
    """
    if mode == "never":
        return {}, "every row runs its whole prompt (--reuse_prefix never)"
    if not getattr(model, "_supports_attention_backend", False):
        return {}, f"every row runs its whole prompt: {type(model).__name__} does not take another attention"
    # Their few tokens may change losses by less than 16 bits round them, so comparing would not tell.
    if any(isinstance(module, torch.nn.Conv1d) for module in model.get_decoder().modules()):
        return {}, f"every row runs its whole prompt: {type(model).__name__} mixes tokens by convolutions too"
    own = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if mode == "auto" and any([dropout, *own, getattr(model.config, "attention_dropout", 0)]):
        how = "faster without (--lora_dropout 0), or with --reuse_prefix always, whose rows share a dropout mask"
        return {}, f"the common beginning of prompts is computed for every row anew, since dropout is on; {how}"
    prefixes = task_prefixes(rows)
    if not prefixes:
        return {}, "every row runs its whole prompt: the prompts of no task begin alike"
    lengths = sorted(map(len, prefixes.values()))
    return prefixes, f"shared prompt prefixes: {len(prefixes)} of {lengths[0]} to {lengths[-1]} tokens run once a batch"


def let_attention_share(model: PreTrainedModel) -> str:
    """Have the attention of a model understand packed micro-batches too; returns the implementation before."""
    used = model.config._attn_implementation
    model.set_attn_implementation(_NAME + (used if used in _IMPLEMENTATIONS else "sdpa"))
    return used


def forward_arguments(packed: Mapping) -> tuple[dict, Blocks]:
    """The arguments of a model's forward over a packed micro-batch, and the blocks of its task ids."""
    layout = Layout(packed["groups"], packed["prefix_lengths"], tuple(tuple(size) for size in packed["sizes"]))
    # A mask of four dimensions is handed on as it is; transformers would make one of (T, T), and this is never read.
    mask = torch.zeros(1, 1, 1, 1, device=packed["input_ids"].device)
    arguments = {name: packed[name] for name in ("input_ids", "position_ids")}
    return {**arguments, "attention_mask": mask, "prefix_layout": layout}, Blocks(packed["task_ids"], layout.sizes)
