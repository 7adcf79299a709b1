"""Read the features of images, one vector per cell of a grid, from HDF5 files by image id."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mtl_lora.errors import UserError

if TYPE_CHECKING:
    import h5py

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
        self._files = [path for path in map(Path, paths) if not path.is_dir()]
        self._opened: dict[tuple[int, Path], h5py.File] = {}  # by process id, as forks must not share a file position
        for path in map(Path, paths):
            for image, home in _images(path):
                if image in self._home:
                    raise UserError(f"the image {image!r} is in {self._home[image]} and {home}; pass only one of them")
                self._home[image] = home
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
        first = next(iter(self))
        shape = self._dataset(first, lambda dataset: dataset.shape)
        if problem := _not_a_grid(shape):
            raise UserError(f"the features of {first!r} in {self._home[first]} {problem}")
        return shape

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
        for path, text in self._said(SETTINGS):
            with contextlib.suppress(KeyError, ValueError, TypeError):
                made = json.loads(text)
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
        digest.update("".join(sorted(text for _, text in self._said(CONTENT))).encode())
        return digest.hexdigest()

    def _said(self, attribute: str) -> Iterator[tuple[Path, str]]:
        """Yield each file that ``mtl-lora features`` wrote, with the text of an attribute; other files have none."""
        import h5py

        for path in self._files:
            with contextlib.suppress(OSError, RuntimeError, KeyError), h5py.File(path, "r") as opened:
                text = opened.attrs.get(attribute)
                if isinstance(text, str):
                    yield path, text


def _images(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield (image id, its HDF5 file) for all images in a file or folder; raises ``UserError`` for unreadable files."""
    import h5py

    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if entry.suffix == ".h5" and not entry.name.startswith("."):
                yield entry.stem, entry
        return
    try:
        with h5py.File(path, "r") as opened:
            images = list(opened)
    except (OSError, RuntimeError) as error:  # h5py reports a damaged file as either
        reason = "there is no such file" if not path.exists() else " ".join(str(error).split())
        raise UserError(
            f"the features {path} cannot be read ({reason:.200}); pass an HDF5 file written by mtl-lora features, or a "
            "folder of <image id>.h5"
        ) from None
    yield from ((image, path) for image in images)


def _not_a_grid(shape: tuple[int, ...]) -> str:
    """Return what is wrong with the shape of an image's features; empty for a square grid."""
    if len(shape) == 2 and shape[0] > 0 and shape[1] > 0 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return ""
    return f"have the shape {tuple(shape)}; they must be (G, D) with G the cells of a square grid, such as 49"
