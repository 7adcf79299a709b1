"""An image and its label maps, resampled together: flip, rotation, scale and the size of the model, in one step."""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from mtl_lora.dense.tasks import IGNORE, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, by which the base models' are scaled


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn for a training image. rotation: at most, in degrees to either side. scales: of which one is drawn,
    or the ends of a range where ``between``."""

    rotation: float = 0.0
    scales: tuple[float, ...] = (1.0,)
    between: bool = False

    def draw(self, seed: int, epoch: int, index: int) -> "Warp":
        """That of an image in an epoch: the same in every process, and after a resume."""
        flip, turn, size = np.random.default_rng([seed, epoch, index]).random(3)
        low, high = self.scales[0], self.scales[-1]
        scale = low + (high - low) * size if self.between else self.scales[int(size * len(self.scales))]
        return Warp(bool(flip < 0.5), (2 * turn - 1) * self.rotation, scale)


# Those of MTLoRA (arXiv 2403.20320) for its two data sets, and less for images that are made at the model's size.
AUGMENTATIONS = {
    "none": None,
    "flip": Augmentation(),
    "pascal": Augmentation(20.0, (0.75, 1.25), between=True),
    "nyud": Augmentation(scales=(1.0, 1.2, 1.5)),
}


@dataclasses.dataclass(frozen=True)
class Warp:
    """A flip from left to right, then a rotation against the clock in degrees and a scale about the centre."""

    flip: bool = False
    angle: float = 0.0
    scale: float = 1.0

    @property
    def rotation(self) -> tuple[float, float]:
        return math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))

    def grid(self, shape: tuple[int, int], size: int) -> torch.Tensor:
        """(1, size, size, 2): where each pixel of the result lies in an image of this height and width, -1 to 1."""
        height, width = shape
        centres = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
        x, y = centres[None, :] * width / self.scale, centres[:, None] * height / self.scale
        cosine, sine = self.rotation
        x, y = (cosine * x - sine * y) / width, (sine * x + cosine * y) / height
        return torch.stack([-x if self.flip else x, y], dim=-1)[None].float()

    def turn(self, normals: torch.Tensor) -> torch.Tensor:
        """Vectors (..., 3, H, W), x right and y down, as they point after the flip and the rotation."""
        x, y, z = normals.unbind(-3)
        x = -x if self.flip else x
        cosine, sine = self.rotation
        return torch.stack([cosine * x + sine * y, cosine * y - sine * x, z], dim=-3)


def image_tensor(image: np.ndarray, warp: Warp, size: int, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """(3, size, size): an RGB image (H, W, 3) of 0 to 255, cubic, black outside of it; scaled by ImageNet's mean and
    deviation. shape: of the image before it was reduced."""
    pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    grid = warp.grid(shape or image.shape[:2], size)
    found = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 255)
    found = found * _inside(grid) / 255
    return ((found - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[0]


def label_tensor(label: np.ndarray, task: Task, warp: Warp, size: int) -> torch.Tensor:
    """A checked map (H, W) or (H, W, 3) at the model's size, ``IGNORE`` where nothing is known and outside of it.

    Of classes (size, size) whole numbers; else (channels, size, size), float32. Classes, saliency, edges and depth are
    those of the nearest pixel, normals are cubic and made unit vectors; what comes nearer by the scale has less depth.
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
        known = known & (nearest.norm(dim=0) > 0.5)  # where neighbours cancel each other there is no direction
    elif task.kind == "depth":
        known = known & (nearest != 0)
        nearest = nearest / warp.scale
    found = torch.where(known, nearest, IGNORE)
    return found[0].round().long() if task.has_classes else found


def _inside(grid: torch.Tensor) -> torch.Tensor:
    """(size, size): which pixels of the result lie in the image."""
    return (grid[0].abs() <= 1 + 1e-6).all(dim=-1)
