"""A decoder per task: four maps of the backbone to one of the image's size (the head of HRNet, arXiv 1908.07919)."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (18, 36, 72, 144)  # of the four maps, behind their projections
HIDDEN = 4 * sum(WIDTHS)


class Decoder(nn.Module):
    """A projection of each map, all at the size of the first, a hidden layer with batch norm, and the outputs.

    It computes in its own dtype, float32 or float64, whatever the backbone's is.
    """

    def __init__(self, channels: list[int], outputs: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(k, d, 1, bias=False) for k, d in zip(channels, WIDTHS, strict=True))
        self.hidden, self.norm = nn.Conv2d(sum(WIDTHS), HIDDEN, 1), nn.BatchNorm2d(HIDDEN, momentum=0.1)
        self.output = nn.Conv2d(HIDDEN, outputs, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Four maps (B, C, h, w) to (B, outputs, *size)."""
        dtype = self.output.weight.dtype
        found = [project(each.to(dtype)) for project, each in zip(self.projections, maps, strict=True)]
        joined = torch.cat([found[0], *(resized(each, found[0].shape[-2:]) for each in found[1:])], dim=1)
        return resized(self.output(F.relu(self.norm(self.hidden(joined)))), size)


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (B, C, h, w) at another size."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
