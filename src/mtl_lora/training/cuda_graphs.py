"""Training steps as CUDA graphs: recorded once for each batch shape, then replayed with a single launch.

The step time of a small model on a GPU is dominated by launching its thousands of kernels one by one
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mtl_lora.errors import UserError

_MOST_GRAPHS = 64  # batches of further shapes run eagerly


def padded_length(length: int, lengths: Sequence[int]) -> int:
    """Return the smallest of the ascending ``lengths`` that is at least ``length``, or ``length`` if there is none."""
    return next((each for each in lengths if each >= length), length)


class GraphedSteps:
    """Runs the forward and backward pass of a batch: eagerly for the first batch of a shape, then by replaying a graph.

    step: ``(batch, total) -> loss ()``, which sets the gradients of the parameters (it does not accumulate into them).
    It must run on the device alone: nothing in it may wait for the GPU, and its Python code may not depend on a batch's
    values or on random numbers. parameters: all parameters that get gradients; they must stay where they are in
    memory. Raises ``UserError`` for a step that cannot be recorded.
    """

    def __init__(self, step: Callable[[Mapping, torch.Tensor], torch.Tensor], parameters: list[nn.Parameter]):
        self.step, self.parameters = step, parameters
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple, _Recorded | None] = {}  # None: the shape was seen once

    def __call__(self, batch: Mapping[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, which may be in pinned memory; sets the gradients, which must be None before."""
        shape = tuple((name, value.shape, value.dtype) for name, value in sorted(batch.items()))
        if shape not in self.recorded:
            if len(self.recorded) < _MOST_GRAPHS:
                self.recorded[shape] = None
            # Run on the stream of the recordings, so that they find whatever a first step sets up.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch, total)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.recorded[shape] is None:
            self.recorded[shape] = _Recorded(self, batch, total)
        return self.recorded[shape].replay(batch, total)


class _Recorded:
    """The graph of one batch shape, with the tensors that it reads and writes."""

    def __init__(self, steps: GraphedSteps, batch: Mapping[str, torch.Tensor], total: torch.Tensor):
        self.graph, self.parameters = torch.cuda.CUDAGraph(), steps.parameters
        self.batch = {name: value.to(total.device, copy=True) for name, value in batch.items()}
        self.total = total.clone()
        # All graphs share one memory pool; the outputs of a graph, gradients and loss, are consumed before the next
        # graph is replayed. "thread_local" lets other threads, such as the one that pins batches, keep running.
        try:
            with torch.cuda.graph(self.graph, steps.pool, steps.stream, capture_error_mode="thread_local"):
                self.loss = steps.step(self.batch, self.total)
        except RuntimeError as error:  # an operation of the model waits for the GPU, or its memory is full
            # Ending a failed recording raises another error; the cause is its context.
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
