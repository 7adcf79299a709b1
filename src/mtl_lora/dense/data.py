"""The data set of dense prediction: images and label maps, checked, augmented and resized for the model."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mtl_lora import files
from mtl_lora.dense.layouts import Layout, layout_of, read_image
from mtl_lora.dense.tasks import IGNORE, Task, TaskSet
from mtl_lora.dense.transforms import AUGMENTATIONS, Warp, image_tensor, label_tensor
from mtl_lora.errors import UserError
from mtl_lora.images import is_turned, open_image

_MOST_NAMED = 10  # files that one error names
_PROBED = 16  # images whose maps are read and checked before any work starts


class DenseDataset(Dataset):
    """A data set whose items have ``image`` (3, S, S), ``labels`` by task name (see ``label_tensor``), and ``id``.

    data_dir: see ``layouts``. split: train or test. tasks: the tasks to read; None: all tasks of the folder. size: S,
    the height and width of the model's images. augmentation: a key of ``AUGMENTATIONS``, or ``auto`` for the layout's;
    it depends on ``seed``, ``epoch`` and the index only. missing_labels: allow an image without the file of a task,
    whose pixels are then all ``IGNORE``. limit: use the first n images; 0: all.

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
        limit: int = 0,
    ):
        self.layout: Layout = layout_of(data_dir)
        self.tasks = tasks or self.layout.tasks
        self.split, self.size, self.seed, self.epoch = split, size, seed, 0
        self.missing_labels = missing_labels
        self._hashes: dict[Path, str] = {}
        name = self.layout.augmentation if augmentation == "auto" else augmentation
        self.augmentation = AUGMENTATIONS[name]
        self.ids = self.layout.ids(split)[: limit or None]
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
        labels = {}
        for task in self.tasks:
            labels[task.name] = label_tensor(self.label(task, id, shape), task, warp, self.size)
        return {"image": image_tensor(pixels, warp, self.size, shape), "labels": labels, "id": id}

    def shape(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image file."""
        image = read_image(self.layout.image(self.ids[index]))
        return image.height, image.width

    def label(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        """Return the checked map of a task. shape: the height and width of the image.

        With ``missing_labels`` a missing map has no label at any pixel.
        """
        if self.missing_labels and not self._is_there(task, id):
            return np.full((*shape, 3) if task.kind == "normals" else shape, _unlabelled(task), np.float32)
        return checked(self.layout.read(task, id, shape), task, str(self.layout.paths(task, id)[0]), shape)

    def _is_there(self, task: Task, id: str) -> bool:
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
            if not (self.missing_labels and any(self._is_there(task, id) for id in self.ids)):
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
                if task.name in seen and self._is_there(task, id):
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
    image = open_image(image if isinstance(image, Image.Image) else Path(image))
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
