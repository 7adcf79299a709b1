"""Training steps as CUDA graphs: recorded once for each shape of batch, then replayed as one launch.

A step of a small model takes a GPU as long as its thousands of kernels take to be queued one by one
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mtl_lora.errors import UserError

_MOST = 64  # graphs; batches of further shapes run as they are


def padded_length(length: int, lengths: Sequence[int]) -> int:
    """The first of ``lengths``, which ascend, that holds ``length``; itself where there is none."""
    return next((each for each in lengths if each >= length), length)


class GraphedSteps:
    """Runs forward and backward of a batch: as they are at the first batch of a shape, from then on by its graph.

    step: ``(batch, total) -> loss ()``, which adds to no gradient but sets those of the parameters, on the device
    alone: nothing in it may wait for the GPU, or depend in Python on the numbers of a batch or on chance. parameters:
    all that get gradients; they stay where they are in memory. Raises ``UserError`` for a step that cannot be recorded.
    """

    def __init__(self, step: Callable[[Mapping, torch.Tensor], torch.Tensor], parameters: list[nn.Parameter]):
        self.step, self.parameters = step, parameters
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple, _Recorded | None] = {}  # None: met once

    def __call__(self, batch: Mapping[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, which may lie in pinned memory; sets the gradients, which must be None before."""
        shape = tuple((name, value.shape, value.dtype) for name, value in sorted(batch.items()))
        if shape not in self.recorded:
            if len(self.recorded) < _MOST:
                self.recorded[shape] = None
            # On the stream of the recordings, so that what a first step sets up is there for them.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch, total)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.recorded[shape] is None:
            self.recorded[shape] = _Recorded(self, batch, total)
        return self.recorded[shape].replay(batch, total)


class _Recorded:
    """The graph of one shape of batch, with the tensors that it reads and writes."""

    def __init__(self, steps: GraphedSteps, batch: Mapping[str, torch.Tensor], total: torch.Tensor):
        self.graph, self.parameters = torch.cuda.CUDAGraph(), steps.parameters
        self.batch = {name: value.to(total.device, copy=True) for name, value in batch.items()}
        self.total = total.clone()
        # All graphs share the memory of what they free; what they keep, gradients and loss, is used up before the next
        # is replayed. Other threads, such as one that pins batches, may go on meanwhile.
        try:
            with torch.cuda.graph(self.graph, steps.pool, steps.stream, capture_error_mode="thread_local"):
                self.loss = steps.step(self.batch, self.total)
        except RuntimeError as error:  # some operation of the model waits for the GPU, or its memory is full
            # Ending a recording that has failed raises another error.
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({reason}); train without --cuda_graphs"
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, batch: Mapping[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
        for name, value in batch.items():
            self.batch[name].copy_(value, non_blocking=True)
        self.total.copy_(total)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()
