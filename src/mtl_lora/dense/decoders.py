"""A task's decoder: the backbone's four maps become one of the image's size (the head of HRNet, arXiv 1908.07919)."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (18, 36, 72, 144)  # channels of the four maps after their projections
HIDDEN = 4 * sum(WIDTHS)


class Decoder(nn.Module):
    """Projects each map, resizes all to the size of the first, and applies a hidden layer with batch norm and outputs.

    It computes in its own dtype, float32 or float64, whatever the backbone's dtype.
    """

    def __init__(self, channels: list[int], outputs: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(k, d, 1, bias=False) for k, d in zip(channels, WIDTHS, strict=True))
        self.hidden, self.norm = nn.Conv2d(sum(WIDTHS), HIDDEN, 1), nn.BatchNorm2d(HIDDEN, momentum=0.1)
        self.output = nn.Conv2d(HIDDEN, outputs, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Return the output (B, outputs, *size) of four maps (B, C, h, w)."""
        dtype = self.output.weight.dtype
        found = [project(each.to(dtype)) for project, each in zip(self.projections, maps, strict=True)]
        joined = torch.cat([found[0], *(resized(each, found[0].shape[-2:]) for each in found[1:])], dim=1)
        return resized(self.output(F.relu(self.norm(self.hidden(joined)))), size)


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return maps (B, C, h, w) resized bilinearly to ``size``."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
