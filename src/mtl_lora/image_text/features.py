"""Read the features of images, one vector per cell of a grid, from HDF5 files by image id."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from mtl_lora.errors import UserError

FEATURES = "features"  # the dataset in the group of an image id
# Attributes of the HDF5 files that ``mtl-lora features`` writes.
SETTINGS = "mtl_lora"  # the vision model, the size and a hash of the images
CONTENT = "features_sha256"  # a hash of all features in the file; files of earlier versions lack it
_MOST_NAMED = 5  # problems that an error lists
_SAMPLED = 64  # images whose features the fingerprint reads


class FeatureStore:
    """Maps an image id to its features (G, D) in float32, with G = grid * grid cells row by row and D = dim.

    paths: HDF5 files with a group for each image id, and folders of ``<id>.h5``, the layout of VL-Adapter
    (arXiv 2112.06825); in both the group has the dataset "features". Each process opens the files that it reads. Raises
    ``UserError`` for a path that is neither, an id that is in two paths, and features that are not a square grid of
    finite numbers.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._home: dict[str, Path] = {}  # the HDF5 file of each image id
        self._notes: dict[Path, dict] = {}  # by file, the attributes that ``mtl-lora features`` wrote
        self._opened = {}  # files by process id and path, as forks must not share a file position
        for path in map(Path, paths):
            images, self._notes[path] = _read(path)
            if both := self._home.keys() & images:
                image = min(both)
                where = f"{self._home[image]} and {images[image]}"
                raise UserError(f"the image {image!r} is in {where}; pass only one of them")
            self._home |= images
        if not self._home:
            raise UserError(f"{', '.join(map(str, paths)) or 'no file'} holds no features")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, image: object) -> bool:
        return image in self._home

    def __getitem__(self, image: str) -> torch.Tensor:
        found = self._dataset(image, lambda dataset: torch.from_numpy(dataset.astype("float32")[()]))
        if problem := _not_a_grid(tuple(found.shape)):
            raise UserError(f"the features of {image!r} in {self._home[image]} {problem}")
        if not found.isfinite().all():
            raise UserError(f"the features of {image!r} in {self._home[image]} are not all finite; extract them again")
        return found

    def _dataset(self, image: str, read: Callable):
        """Return ``read(dataset)`` for an image; a file with a single image is closed again, others stay open."""
        import h5py

        if image not in self._home:
            raise UserError(f"there are no features of the image {image!r}; extract them with mtl-lora features")
        path, key = self._home[image], (os.getpid(), self._home[image])
        try:
            if path.stem == image and key not in self._opened:
                with h5py.File(path, "r") as opened:
                    return read(opened[image][FEATURES])
            if key not in self._opened:
                self._opened[key] = h5py.File(path, "r")
            return read(self._opened[key][image][FEATURES])
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())
            raise UserError(f"the features of {image!r} in {path} cannot be read ({reason:.200})") from None

    @functools.cached_property
    def _shape(self) -> tuple[int, int]:
        """(G, D) of the first image."""
        return tuple(self[next(iter(self))].shape)

    @property
    def grid(self) -> int:
        """Number of cells per side of the grid: G = grid * grid."""
        return math.isqrt(self._shape[0])

    @property
    def dim(self) -> int:
        """D, the number of values per cell."""
        return self._shape[1]

    def check(self, images: Iterable[str]) -> None:
        """Raise ``UserError`` unless every image has features, all with the same grid and D.

        The error names the first images whose features are missing or differ, and the number of such images.
        """
        wanted = list(dict.fromkeys(images))
        problems = [f"{image!r} has none" for image in wanted if image not in self]
        for image in filter(self.__contains__, wanted):
            shape = self._dataset(image, lambda dataset: dataset.shape)
            if problem := _not_a_grid(shape):
                problems.append(f"those of {image!r} in {self._home[image]} {problem}")
            elif shape != self._shape:
                problems.append(f"those of {image!r} are {shape}, those of {next(iter(self))!r} {self._shape}")
        if problems:
            more = f" and so on, {len(problems):,} in all" if len(problems) > _MOST_NAMED else ""
            raise UserError(
                f"the features of {len(problems):,} of {len(wanted):,} images cannot be used: "
                f"{'; '.join(problems[:_MOST_NAMED])}{more}; extract them with mtl-lora features, or correct --features"
            )

    @functools.cached_property
    def source(self) -> str | None:
        """The vision model and image size that made the features; None if the files do not record them.

        Raises ``UserError`` for two files with different models or sizes.
        """
        found = {}
        for path, notes in self._notes.items():
            with contextlib.suppress(KeyError, ValueError, TypeError):
                made = json.loads(notes[SETTINGS])
                found[f"{made['fingerprint'][:12]} at {made['size']} pixels"] = path
        if len(found) > 1:
            raise UserError(
                f"the features in {' and '.join(map(str, found.values()))} are of different vision models or sizes"
            )
        return next(iter(found), None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all image ids, the features of 64 images, and the feature hashes that the files record.

        It changes if the features come from other images or another model.
        """
        images = sorted(self)
        digest = hashlib.sha256("\0".join(images).encode())
        for image in images[:: -(-len(images) // _SAMPLED)]:
            digest.update(self[image].numpy().tobytes())
        digest.update("".join(sorted(notes[CONTENT] for notes in self._notes.values() if CONTENT in notes)).encode())
        return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the HDF5 file of each image in a file or folder, and the texts that ``mtl-lora features`` added to a file.

    Raises ``UserError`` for unreadable files.
    """
    import h5py

    if path.is_dir():
        entries = sorted(path.glob("[!.]*.h5"))
        return {entry.stem: entry for entry in entries}, {}
    try:
        with h5py.File(path, "r") as opened:
            notes = {name: opened.attrs.get(name) for name in (SETTINGS, CONTENT)}
            return dict.fromkeys(opened, path), {name: text for name, text in notes.items() if isinstance(text, str)}
    except (OSError, RuntimeError) as error:  # h5py reports a damaged file as either
        reason = "there is no such file" if not path.exists() else " ".join(str(error).split())
        raise UserError(
            f"the features {path} cannot be read ({reason:.200}); pass an HDF5 file written by mtl-lora features, or a "
            "folder of <image id>.h5"
        ) from None


def _not_a_grid(shape: tuple[int, ...]) -> str:
    """Return what is wrong with the shape of an image's features; empty for a square grid."""
    if len(shape) == 2 and shape[0] > 0 and shape[1] > 0 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return ""
    return f"have the shape {tuple(shape)}; they must be (G, D) with G the cells of a square grid, such as 49"
