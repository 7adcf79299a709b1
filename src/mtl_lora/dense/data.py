"""The data set of dense prediction: images and label maps, checked, augmented and resized for the model."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from mtl_lora import files
from mtl_lora.dense.layouts import Layout, layout_of, read_image
from mtl_lora.dense.tasks import IGNORE, Task, TaskSet
from mtl_lora.errors import UserError
from mtl_lora.images import is_turned, open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which the base models normalise images
_MOST_NAMED = 10  # files that one error names
_PROBED = 16  # images whose maps are read and checked before any work starts


class DenseDataset(Dataset):
    """A data set whose items have ``image`` (3, S, S), ``labels`` by task name (see ``label_tensor``), ``id``, and
    ``shape``, the height and width of the image file.

    data_dir: see ``layouts``. split: train or test. tasks: the tasks to read; None: all tasks of the folder. size: S,
    the height and width of the model's images. augmentation: a key of ``AUGMENTATIONS``, or ``auto`` for the layout's;
    it depends on ``seed``, ``epoch`` and the index only. missing_labels: allow an image without the file of a task,
    whose pixels are then all ``IGNORE``.

    Raises ``UserError`` naming the files that are missing, a malformed file, or a task without any label.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        tasks: TaskSet | None = None,
        size: int = 448,
        augmentation: str = "none",
        seed: int = 0,
        missing_labels: bool = False,
    ):
        self.layout: Layout = layout_of(data_dir)
        self.tasks = tasks or self.layout.tasks
        self.split, self.size, self.seed, self.epoch = split, size, seed, 0
        self.missing_labels = missing_labels
        self._hashes: dict[Path, str] = {}
        name = self.layout.augmentation if augmentation == "auto" else augmentation
        self.augmentation = AUGMENTATIONS[name]
        self.ids = self.layout.ids(split)
        self._check_files()
        self._check_tasks()
        self._probe()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return self.item(index, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the augmentation."""
        self.epoch = epoch

    def item(self, index: int, epoch: int = 0) -> dict:
        """Return an image with its labels, augmented as in ``epoch``."""
        id = self.ids[index]
        warp = self.augmentation.draw(self.seed, epoch, index) if self.augmentation else Warp()
        pixels, shape = pixels_of(self.layout.image(id), self.size)
        labels = {task.name: label_tensor(self.label(task, id, shape), task, warp, self.size) for task in self.tasks}
        image = image_tensor(pixels, warp, self.size, shape)
        return {"image": image, "labels": labels, "id": id, "shape": shape}

    def label(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        """Return the checked map of a task. shape: the height and width of the image.

        With ``missing_labels`` a missing map has no label at any pixel.
        """
        if self.missing_labels and not self.is_there(task, id):
            return np.full((*shape, 3) if task.kind == "normals" else shape, _unlabelled(task), np.float32)
        return checked(self.layout.read(task, id, shape), task, str(self.layout.paths(task, id)[0]), shape)

    def is_there(self, task: Task, id: str) -> bool:
        """Return whether an image has the files of a task's map."""
        return all(path.is_file() for path in self.layout.paths(task, id))

    # ---- checks before any work starts, and hashes ----

    def _check_tasks(self) -> None:
        """Raise ``UserError`` for a task that the folder declares with another kind or other classes."""
        declared = {task.name: task for task in self.layout.tasks}
        for task in self.tasks:
            there = declared.get(task.name, task)
            own, other = ([name.casefold() for name in each.labels] for each in (task, there))
            kinds, where = {task.kind, there.kind}, f"{self.layout.root} declares {task.name}"
            if len(kinds) > 1 and not (task.has_classes and there.has_classes):
                raise UserError(f"{where} as {there.kind}, not as {task.kind}; pass other data or tasks")
            if task.classes != there.classes:
                raise UserError(f"{where} with {there.classes} classes, not {task.classes}; pass other data or tasks")
            # A class may have another name there, but the same name at another index means another order.
            moved = [number for number, name in enumerate(own) if name in other and other[number] != name]
            if moved:
                number = moved[0]
                names = f"{number} is {there.labels[number]!r} there, not {task.labels[number]!r}"
                raise UserError(f"{where} with its classes in another order: {names}; correct one of them")

    def _check_files(self) -> None:
        """Raise ``UserError`` for missing files, and for an image that EXIF data rotate or mirror."""
        missing = [path for id in self.ids if not (path := self.layout.image(id)).is_file()]
        for task in self.tasks:
            if not (self.missing_labels and any(self.is_there(task, id) for id in self.ids)):
                paths = itertools.chain(*(self.layout.paths(task, id) for id in self.ids))
                missing += [path for path in paths if not path.is_file()]
        if missing := list(dict.fromkeys(missing)):
            named = ", ".join(str(path.relative_to(self.layout.root)) for path in missing[:_MOST_NAMED])
            more = f" and {len(missing) - _MOST_NAMED:,} more" if len(missing) > _MOST_NAMED else ""
            way_out = "" if self.missing_labels else "; --missing_labels allows images without the map of a task"
            raise UserError(f"{self.layout.root} lacks {named}{more} of {self.split}{way_out}")
        if turned := next((path for id in self.ids if is_turned(path := self.layout.image(id))), None):
            # The maps may have been drawn in a viewer, which applies the EXIF data to the stored pixels.
            raise UserError(f"{turned} has EXIF data that rotate or mirror it; save the image as it should be seen")

    def _probe(self) -> None:
        """Read and check the maps of the first images, and of further images for tasks that are still unclear.

        A task is unclear if no pixel so far has a label, or if a map that may hold 0 and 1 has held only 0 and 255.
        Raises ``UserError`` for a task without any label, and if all maps hold 0 and 255 only: 255 marks a pixel
        without a label, and was probably meant as 1.
        """
        binary = [task.name for task in self.tasks if _unlabelled(task) == IGNORE and (task.classes or 2) == 2]
        seen: dict[str, set] = {name: set() for name in binary}
        unlabelled = {task.name: task for task in self.tasks}
        for number, id in enumerate(self.ids):
            unclear = {*unlabelled, *(name for name, values in seen.items() if values == {0, IGNORE})}
            tasks = [task for task in self.tasks if number < _PROBED or task.name in unclear]
            if not tasks:
                break
            image = read_image(self.layout.image(id))
            for task in tasks:
                label = self.label(task, id, (image.height, image.width))
                if (label != _unlabelled(task)).any():
                    unlabelled.pop(task.name, None)
                if task.name in seen and self.is_there(task, id):
                    seen[task.name].update(np.unique(label).tolist())
        if unlabelled:
            raise UserError(
                f"no image of {self.split} in {self.layout.root} has a pixel with a label of "
                f"{', '.join(unlabelled)}; list only the other tasks in --tasks"
            )
        for name, values in seen.items():
            if values == {0, IGNORE}:
                raise UserError(
                    f"all maps of {name} in {self.layout.root} hold only 0 and 255, but 255 means a pixel without a "
                    "label; write 1 for a pixel that belongs to it"
                )

    def sha256(self, task: Task) -> str:
        """Return a hash of a task's ids, images and labels at this size, which identifies its evaluation data."""
        found = [(id, *hashes) for id, hashes in zip(self.ids, self.hashes(task), strict=True)]
        return files.sha256_of(f"{self.size} {task.extraction_key} {found}".encode())

    def hashes(self, task: Task) -> list[tuple[str, str]]:
        """Return for each image the hash of its file and the hashes of its label files, empty for a missing file."""
        return [
            (self._hash(self.layout.image(id)), " ".join(self._hash(path) for path in self.layout.paths(task, id)))
            for id in self.ids
        ]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = files.sha256(path) if path.is_file() else ""
        return self._hashes[path]


def pixels_of(image: str | Path | Image.Image, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the pixels (H, W, 3) of an image and its original height and width.

    An image that is much larger than ``size`` is reduced by a whole factor. Raises ``UserError`` for an image that is
    broken or has more than 8 bits per channel.
    """
    image = open_image(image)
    shape = image.height, image.width
    factor = min(shape) // size
    if factor > 1 and any(side % factor for side in shape):  # with ``reduce`` the last pixels would average fewer ones
        image = image.resize([side // factor for side in image.size], Image.Resampling.BOX)
    elif factor > 1:
        image = image.reduce(factor)
    return np.array(image), shape


def _unlabelled(task: Task) -> int:
    """Return the value of pixels without a label in a map that was read."""
    return 0 if task.kind in ("normals", "depth") else IGNORE


def checked(label: np.ndarray, task: Task, where: str, shape: tuple[int, int]) -> np.ndarray:
    """Return a task's map in the form that ``label_tensor`` takes; raises ``UserError`` naming ``where``."""
    expected = (*shape, 3) if task.kind == "normals" else shape
    if label.shape != expected:
        raise UserError(f"{where} has the shape {label.shape}; for its image, {task.name} needs {expected}")
    if label.dtype.kind not in "uif" or (label.dtype.kind == "f" and not np.isfinite(label).all()):
        raise UserError(f"{where} holds values that are not finite numbers")
    if task.kind == "normals":
        return _checked_normals(label.astype(np.float32), where)
    if task.kind == "depth":
        label = np.where(label == IGNORE, 0, label)
        if label.min() < 0 or label.max() >= IGNORE:
            raise UserError(
                f"{where} holds depths from {label.min():g} to {label.max():g}; they must be at least 0, which means "
                f"no label, and below {IGNORE}, as in metres"
            )
        return label.astype(np.float32)
    classes = task.classes or 2
    wrong = np.unique(label[(label != IGNORE) & ((label < 0) | (label >= classes) | (label % 1 != 0))])
    if len(wrong):
        raise UserError(
            f"{where} holds {', '.join(f'{value:g}' for value in wrong[:5].tolist())}; maps of {task.name} must hold 0 "
            f"to {classes - 1}, or {IGNORE} for a pixel without a label"
        )
    return label.astype(np.uint8)


def _checked_normals(normals: np.ndarray, where: str) -> np.ndarray:
    """Return normals as unit vectors; zero vectors, which have no label, stay zero."""
    normals = np.where((normals == IGNORE).all(axis=2, keepdims=True), 0, normals)
    lengths = np.linalg.norm(normals, axis=2, keepdims=True)
    known = lengths[lengths > 0]
    if len(known) and not 0.85 < np.median(known) < 1.25:  # normals stored as (n + 1) / 2 have 0.6 to 0.83
        raise UserError(
            f"{where} holds normals of length {np.median(known):g}; they must be unit vectors with components from -1 "
            "to 1, or zero for a pixel without a label"
        )
    return np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)


# ---- an image and its maps, resampled together: flip, rotation, scale and the model's size in one step ----


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
