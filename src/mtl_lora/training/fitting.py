"""What ``--batch_size auto`` does on a GPU: find how many rows of a micro-batch fit, by trying the longest."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from torch import nn

from mtl_lora.errors import UserError
from mtl_lora.language.collate import Collator
from mtl_lora.language.config import AUTO, AUTO_ROWS, TrainConfig
from mtl_lora.language.loss import token_losses
from mtl_lora.language.token_cache import row_columns

# Not a CPU: where its memory runs out, the process is ended and nothing can be learnt from it.
_TRIED = {"cuda"}
# What a trial may take of a GPU's memory: the optimiser's state and buckets of gradients come on top, both small.
_MEMORY_SHARE = 0.9


def tried_on(device: torch.device, config: TrainConfig) -> bool:
    """Whether a run with these settings has to find out what fits on its device."""
    return config.batch_size == AUTO and device.type in _TRIED


def fitted(
    config: TrainConfig, model: nn.Module, rows: datasets.Dataset, collator: Collator, device: torch.device
) -> TrainConfig:
    """The settings with the largest micro-batch that fits on the device of every process, and the same global batch.

    A device takes ``AUTO_ROWS * gradient_accumulation_steps`` rows a step whatever fits, so results do not depend on
    its memory. Raises ``UserError`` if a single row does not fit.
    """
    if any(parameter.device != device for parameter in model.parameters()):  # a quantised base is there, and stays
        model.to(device)
    model.train()
    longest = np.argsort(-row_columns(rows)["length"], kind="stable")

    def fits(count: int) -> bool:
        return one_pass_fits(model, collator([rows[int(row)] for row in np.resize(longest, count)]), device)

    rows_a_step = AUTO_ROWS * config.gradient_accumulation_steps
    with memory_left(device):
        found = least_of_all_processes(largest_that_fits(rows_a_step, fits), device)
    if not found:
        raise UserError(
            "--batch_size auto: a single row does not fit in the GPU's memory; pass --use_gradient_checkpointing True, "
            "or lower --cutoff_len"
        )
    return dataclasses.replace(config, batch_size=found, gradient_accumulation_steps=rows_a_step // found)


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two that divides ``rows`` and fits, found by doubling; 0 if not even 1 does."""
    found, size = 0, 1
    while rows % size == 0 and fits(size):
        found, size = size, 2 * size
    return found


def one_pass_fits(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> bool:
    """Whether a forward and a backward pass on a batch stay within the memory; leaves nothing behind."""
    fits = True
    try:
        losses, _ = token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
        losses.mean().backward()
    except torch.OutOfMemoryError:
        fits = False
        losses = None
    # Not while the error is handled, for its traceback holds the activations.
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fits


def least_of_all_processes(value: int, device: torch.device) -> int:
    """The smallest ``value`` of the processes of this run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    least = torch.tensor(value, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


@contextlib.contextmanager
def memory_left(device: torch.device) -> Iterator[None]:
    """A block in which a GPU counts as full before it is."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
