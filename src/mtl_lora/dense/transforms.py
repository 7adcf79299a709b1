"""Resample an image and its label maps together: flip, rotation, scale and the model's size in one step."""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from mtl_lora.dense.tasks import IGNORE, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which the base models normalise images


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image. rotation: maximum angle in degrees, in either direction. scales: the scales
    to draw from, or the ends of a range if ``between``."""

    rotation: float = 0.0
    scales: tuple[float, ...] = (1.0,)
    between: bool = False

    def draw(self, seed: int, epoch: int, index: int) -> "Warp":
        """Return the augmentation of an image in an epoch: the same in every process, and after a resume."""
        flip, turn, size = np.random.default_rng([seed, epoch, index]).random(3)
        low, high = self.scales[0], self.scales[-1]
        scale = low + (high - low) * size if self.between else self.scales[int(size * len(self.scales))]
        return Warp(bool(flip < 0.5), (2 * turn - 1) * self.rotation, scale)


# ``pascal`` and ``nyud`` are MTLoRA's (arXiv 2403.20320); ``flip`` is for images that are made at the model's size.
AUGMENTATIONS = {
    "none": None,
    "flip": Augmentation(),
    "pascal": Augmentation(20.0, (0.75, 1.25), between=True),
    "nyud": Augmentation(scales=(1.0, 1.2, 1.5)),
}


@dataclasses.dataclass(frozen=True)
class Warp:
    """A horizontal flip, then a counter-clockwise rotation in degrees and a scaling about the centre."""

    flip: bool = False
    angle: float = 0.0
    scale: float = 1.0

    @property
    def rotation(self) -> tuple[float, float]:
        return math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))

    def grid(self, shape: tuple[int, int], size: int) -> torch.Tensor:
        """Return each output pixel's position (1, size, size, 2), -1 to 1, in an image of this height and width."""
        height, width = shape
        centres = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
        x, y = centres[None, :] * width / self.scale, centres[:, None] * height / self.scale
        cosine, sine = self.rotation
        x, y = (cosine * x - sine * y) / width, (sine * x + cosine * y) / height
        return torch.stack([-x if self.flip else x, y], dim=-1)[None].float()

    def turn(self, normals: torch.Tensor) -> torch.Tensor:
        """Return vectors (..., 3, H, W), x right and y down, flipped and rotated as the image."""
        x, y, z = normals.unbind(-3)
        x = -x if self.flip else x
        cosine, sine = self.rotation
        return torch.stack([cosine * x + sine * y, cosine * y - sine * x, z], dim=-3)


def image_tensor(image: np.ndarray, warp: Warp, size: int, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Return (3, size, size) from an RGB image (H, W, 3) of 0 to 255: resampled bicubically, black outside the image,
    and normalised by ImageNet's mean and standard deviation. shape: of the image before it was reduced."""
    pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    grid = warp.grid(shape or image.shape[:2], size)
    found = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 255)
    found = found * _inside(grid) / 255
    return ((found - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[0]


def label_tensor(label: np.ndarray, task: Task, warp: Warp, size: int) -> torch.Tensor:
    """Return a checked map (H, W) or (H, W, 3) at the model's size, with ``IGNORE`` outside it and without a label.

    Maps of classes become whole numbers (size, size), others float32 (channels, size, size). Classes, saliency, edges
    and depth are resampled from the nearest pixel, normals bicubically and then normalised. Depth is divided by the
    scale, because a larger image appears nearer.
    """
    grid = warp.grid(label.shape[:2], size)
    values = torch.from_numpy(np.ascontiguousarray(label)).float()
    values = values.permute(2, 0, 1)[None] if task.kind == "normals" else values[None, None]
    nearest = F.grid_sample(values, grid, mode="nearest", padding_mode="border", align_corners=False)[0]
    known = _inside(grid)
    if task.kind == "normals":
        known = known & (nearest != 0).any(dim=0)
        cubic = F.grid_sample(values, grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
        nearest = F.normalize(warp.turn(cubic), dim=0)
        known = known & (nearest.norm(dim=0) > 0.5)  # neighbours that cancel each other give no direction
    elif task.kind == "depth":
        known = known & (nearest != 0)
        nearest = nearest / warp.scale
    found = torch.where(known, nearest, IGNORE)
    return found[0].round().long() if task.has_classes else found


def _inside(grid: torch.Tensor) -> torch.Tensor:
    """Return the mask (size, size) of output pixels that lie in the image."""
    return (grid[0].abs() <= 1 + 1e-6).all(dim=-1)
