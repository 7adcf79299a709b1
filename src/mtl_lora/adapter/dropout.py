"""Elementwise dropout that is cheap on a CPU, where torch draws a random number of its own for every element."""

import math

import torch
import torch.nn.functional as F

from mtl_lora.adapter.routing import is_traced


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """``x`` with each element set to 0 with probability ``p`` and the others divided by 1 - p; same shape and dtype.

    Every element is an independent Bernoulli draw from torch's global generator. On a CPU not the elements are drawn
    but the distances between those that are dropped, so the cost goes with p; elsewhere, and for a p above a half,
    where that would cost more, and in code that is compiled or transformed, for which the number of draws would have to
    be known, this is torch's own dropout. On one CPU thread a whole training step gains 11 % (benchmark/LOG.md).
    """
    if x.device.type != "cpu" or not 0 < p <= 0.5 or torch.compiler.is_compiling() or is_traced():
        return F.dropout(x, p, training=True)
    return _Dropped.apply(x, dropped_positions(x.numel(), p), 1 / (1 - p))


def dropped_positions(count: int, p: float) -> torch.Tensor:
    """Which of ``count`` elements are dropped, in ascending order, if each is with probability ``p``, 0 < p < 1.

    How many are kept before the next one is dropped is geometric: floor(log(u) / log(1 - p)) with u uniform in [0, 1).
    """
    expected = count * p
    draws = math.ceil(expected + 6 * math.sqrt(expected) + 6)  # nearly always enough
    found, last = [], -1
    while last < count:
        gaps = torch.rand(draws, dtype=torch.float64).log_().div_(math.log1p(-p)).floor_()
        # A gap beyond the end (u = 0 gives an infinite one) says as much as any other beyond it.
        positions = gaps.clamp_(max=count).add_(1).cumsum(0).long().add_(last)
        found.append(positions)
        last = int(positions[-1])
    positions = torch.cat(found) if len(found) > 1 else found[0]
    return positions[: int(torch.searchsorted(positions, count))]


class _Dropped(torch.autograd.Function):
    """x * scale, but 0 at ``positions`` of the flattened x; backward alike. Only the positions are kept."""

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
