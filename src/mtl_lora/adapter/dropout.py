"""Elementwise dropout that is cheap on a CPU, where torch's own draws one random number per element."""

import math

import torch
import torch.nn.functional as F

from mtl_lora.adapter.routing import is_traced


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return ``x`` with each element set to 0 with probability ``p`` and divided by 1 - p otherwise; same shape, dtype.

    Elements are dropped independently, with torch's global generator. On a CPU the distances between dropped elements
    are drawn instead of the elements, so the cost is proportional to p. torch's own dropout is used on other devices,
    for p above 0.5, where drawing distances costs more, and in compiled or transformed code, which must know the number
    of draws beforehand. On one CPU thread this makes a whole training step 11 % faster (benchmark/LOG.md).
    """
    if x.device.type != "cpu" or not 0 < p <= 0.5 or torch.compiler.is_compiling() or is_traced():
        return F.dropout(x, p, training=True)
    return _Dropped.apply(x, dropped_positions(x.numel(), p), 1 / (1 - p))


def dropped_positions(count: int, p: float) -> torch.Tensor:
    """Draw which of ``count`` elements are dropped, each with probability ``p``, 0 < p < 1; indices in ascending order.

    The number of elements kept before the next dropped one is geometric: floor(log(u) / log(1 - p)), u uniform in
    [0, 1).
    """
    expected = count * p
    draws = math.ceil(expected + 6 * math.sqrt(expected) + 6)  # nearly always enough
    gaps = torch.rand(draws, dtype=torch.float64).log_().div_(math.log1p(-p)).floor_()
    # All gaps that reach beyond the end are equivalent, also the infinite one of u = 0.
    positions = gaps.clamp_(max=count).add_(1).cumsum(0).long().sub_(1)
    if (rest := count - 1 - int(positions[-1])) > 0:
        positions = torch.cat([positions, dropped_positions(rest, p).add_(count - rest)])
    return positions[: int(torch.searchsorted(positions, count))]


class _Dropped(torch.autograd.Function):
    """x * scale with zeros at ``positions`` of the flattened x; the backward pass keeps only the positions."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.scale = scale
        return _scaled_without(x, positions, scale)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return _scaled_without(gradient, positions, ctx.scale), None, None


def _scaled_without(x: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    scaled = x.contiguous() * scale
    scaled.view(-1).index_fill_(0, positions, 0)
    return scaled
