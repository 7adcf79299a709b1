"""Elementwise dropout that is cheap on a CPU, where torch draws a random number of its own for every element."""

import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """``x`` with each element set to 0 with probability ``p`` and the others divided by 1 - p; same shape and dtype.

    On a CPU the masks are still independent Bernoulli draws, one an element, from torch's global generator, but four
    are cut from each 64-bit number; so p is rounded to a multiple of 2^-16, and the rounded p is the one divided by.
    Elsewhere, and for a p below half of that step, this is torch's own dropout.
    """
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or not 0 < dropped < _LEVELS:
        return F.dropout(x, p, training=True)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    lanes = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    return _MaskedScale.apply(x, lanes < dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped))


class _MaskedScale(torch.autograd.Function):
    """x * scale where ``mask`` is False, 0 where it is True; backward alike. Only the mask is kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * scale).masked_fill_(mask, 0)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * ctx.scale).masked_fill_(mask, 0), None, None
