"""Folders of images with label maps: this project's layout, PASCAL-Context (PASCAL_MT) and NYUv2 (NYUD_MT).

A layout knows the files of an image and reads the map of a task. A pixel without a label is 255 in maps of class
indices and of 0 and 1, a zero vector in normals, and 0 in depth. ``data`` checks what is read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_lora import files
from mtl_lora.dense.tasks import IGNORE, Task, TaskSet, shipped
from mtl_lora.errors import UserError
from mtl_lora.images import FORMATS

# ---- files ----


def read_image(path: Path) -> Image.Image:
    """Return the image in a file; raises ``UserError`` for a broken file."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            opened.load()
            return opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); download or create it again") from None


def read_png(path: Path, channels: int = 1) -> np.ndarray:
    """Return a map (H, W) or (H, W, 3) of whole numbers; for an image with a palette the indices."""
    opened = read_image(path)
    array = np.asarray(opened)
    if array.ndim != (2 if channels == 1 else 3) or (channels > 1 and array.shape[2] != channels):
        raise UserError(f"{path} is an image of mode {opened.mode}; its map needs {channels} channel(s)")
    return _numbers(array)


def _numbers(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint8) if array.dtype == bool else array


def read_npy(path: Path) -> np.ndarray:
    """Return an array; a third axis of length 1 is dropped."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays")
    except Exception as error:  # NumPy raises errors of many kinds for a broken file
        raise UserError(f"{path} cannot be read as a NumPy array ({error}); download or create it again") from None
    return _numbers(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def read_mat(path: Path, key: str) -> np.ndarray:
    """Return a variable of a MATLAB file (older than version 7.3)."""
    import scipy.io

    try:
        return scipy.io.loadmat(path)[key]
    except KeyError:
        raise UserError(f"{path} has no variable {key}; download it again") from None
    except Exception as error:  # scipy raises errors of many kinds for a broken file
        raise UserError(f"{path} cannot be read as a MATLAB file ({error}); download it again") from None


# ---- layouts ----


class Layout:
    """A folder of images with label maps.

    mark: a path that exists only in this layout. images: the folder of the images. lists: the folder of the lists of
    ids. test: the list of the test set. augmentation: a key of ``AUGMENTATIONS``, for training images. task_set: a name
    for ``shipped``, all tasks of the layout.
    """

    name: str
    mark: str
    augmentation: str
    images: str
    lists: str
    test = "val"
    task_set: str

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @property
    def tasks(self) -> TaskSet:
        return shipped(self.task_set)

    def split_file(self, split: str) -> Path:
        """Return the text file with the ids of a split, ``train`` or ``test``."""
        return self.root / self.lists / f"{self.test if split == 'test' else split}.txt"

    def image(self, id: str) -> Path:
        return self.root / self.images / f"{id}.jpg"

    def paths(self, task: Task, id: str) -> list[Path]:
        """Return the files from which a task's map is read; raises ``UserError`` for a task that the layout lacks."""
        if task.kind not in (found := self.maps(id)):
            lacks = f"has the layout {self.name}, which has no {task.kind} map for task {task.name!r}"
            raise UserError(f"{self.root} {lacks}; leave it out")
        return found[task.kind]

    def maps(self, id: str) -> dict[str, list[Path]]:
        """Return the files of an image's maps by kind."""
        raise NotImplementedError

    def read(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        """Return the map of a task. shape: the height and width of the image."""
        raise NotImplementedError

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, in the order of its file; raises ``UserError``."""
        path = self.split_file(split)
        if not path.is_file():
            raise UserError(f"there is no {path}; it must list the ids of the images of {split}, one per line")
        found = [*filter(None, map(str.strip, files.read_utf8(path, "the list of ids").splitlines()))]
        if not found:
            raise UserError(f"{path} names no image")
        if outside := [id for id in found if id.startswith("/") or ".." in id.split("/")]:
            raise UserError(f"{path} names {outside[0]}, which is outside the data set; ids must be file names")
        if len(set(found)) < len(found):
            raise UserError(f"{path} names {next(id for id in found if found.count(id) > 1)} twice")
        return found


class Folder(Layout):
    """This project's layout: ``images/<id>.png`` or .jpg, ``<task>/<id>.png`` or .npy, ``train.txt``, ``test.txt`` and
    ``tasks.json``.

    Class indices, and maps of 0 and 1, are PNG or .npy with 255 for a pixel without a label. Depth is .npy. Normals are
    .npy, or PNG with values v for n = 2 v / 255 - 1.
    """

    mark, augmentation = "tasks.json", "flip"
    lists, test = ".", "test"

    @property
    def tasks(self) -> TaskSet:
        return TaskSet.load(self.root / "tasks.json")

    def image(self, id: str) -> Path:
        return self._existing(self.root / "images", id, (".png", ".jpg"))

    def paths(self, task: Task, id: str) -> list[Path]:
        return [self._existing(self.root / task.name, id, (".npy",) if task.kind == "depth" else (".png", ".npy"))]

    @staticmethod
    def _existing(folder: Path, id: str, suffixes: Sequence[str]) -> Path:
        named = [folder / f"{id}{suffix}" for suffix in suffixes]
        found = [path for path in named if path.is_file()] or named[:1]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1].name} are for the same image; delete one of them")
        return found[0]

    def read(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        (path,) = self.paths(task, id)
        if path.suffix == ".npy":
            return read_npy(path)
        if task.kind != "normals":
            return read_png(path)
        values = read_png(path, 3)
        normals = 2 * values.astype(np.float32) / 255 - 1
        blank = np.abs(normals).max(axis=2, keepdims=True) < 0.01
        for value in (0, IGNORE):  # black and white, which are far from unit vectors
            blank |= (values == value).all(axis=2, keepdims=True)
        return np.where(blank, 0, normals)  # 8-bit values cannot represent the zero vector exactly


# The classes of PASCAL-Context for which the distilled normals count: the classes that NYUv2, on which their network
# was trained, has under the same name, and tv monitors.
_NORMALS_CLASSES = """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 73 78
    83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165 172 174 181
    183 184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255
    260 261 263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329
    330 331 336 342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413
    414 417 419 421 423 427 429 430 432 440 441 442 443 444 446 454 457
"""
NORMALS_CLASSES = [int(number) for number in _NORMALS_CLASSES.split()]
PERSON = 15
PARTS = {
    1: "head hair lear rear lebrow rebrow leye reye mouth nose",
    2: "neck torso",
    3: "luarm ruarm",
    4: "llarm rlarm lhand rhand",
    5: "luleg ruleg",
    6: "llleg rlleg lfoot rfoot",
}
GROUP_OF_PART = {part: group for group, parts in PARTS.items() for part in parts.split()}


class PascalMT(Layout):
    """PASCAL-Context with five tasks, in the layout of the archive PASCAL_MT of ASTMT (arXiv 1904.08918)."""

    name, augmentation, task_set = "PASCAL_MT", "pascal", "pascal"
    images, lists = "JPEGImages", "ImageSets/Context"
    mark = lists

    def maps(self, id: str) -> dict[str, list[Path]]:
        context = self.root / "pascal-context" / "trainval" / f"{id}.mat"
        segmented = [self.root / "semseg" / folder / f"{id}.png" for folder in ("VOC12", "pascal-context")]
        return {
            "semantic": [next(filter(Path.is_file, segmented), segmented[0])],
            "parts": [self.root / "human_parts" / f"{id}.mat"],
            "saliency": [self.root / "sal_distill" / f"{id}.png"],
            "normals": [self.root / "normals_distill" / f"{id}.png", context],
            "edges": [context],
        }

    def read(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        path, *more = self.paths(task, id)
        if task.kind == "semantic":
            return read_png(path)
        if task.kind == "saliency":
            return (read_png(path) > 127).astype(np.uint8)  # v / 255 > 0.5
        if task.kind == "edges":
            return boundaries(read_mat(path, "LabelMap"))
        if task.kind == "parts":
            return human_parts(path, shape)
        normals, (context,) = 2 * read_png(path, 3).astype(np.float32) / 255 - 1, more
        classes = read_mat(context, "LabelMap")
        if classes.shape != normals.shape[:2]:
            raise UserError(
                f"{path} is {normals.shape[:2]} high and wide, but {context} is {classes.shape}; download both again"
            )
        return np.where(np.isin(classes, NORMALS_CLASSES)[..., None], normals, 0)


def human_parts(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return a map (H, W) of body part groups, 0 for none; all 255 if no part of a person is annotated."""
    found, annotation = np.zeros(shape, np.uint8), read_mat(path, "anno")
    try:
        # Fields by their order: of the annotation (name, objects), an object (class, number, mask, parts), a part
        # (name, mask).
        for entry in annotation[0][0][1][0]:
            for part in entry[3][0] if int(entry[1][0][0]) == PERSON and len(entry[3]) else ():
                found[part[1].astype(bool)] = GROUP_OF_PART[str(part[0][0])]
    except (IndexError, TypeError, KeyError, ValueError) as error:
        reason = f"the unknown part {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not laid out as PASCAL-Part for an image of {shape} ({reason})") from None
    return found if found.any() else np.full_like(found, IGNORE)


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Return a map (H, W) of 0 and 1: where the Laplacian of a label map is not zero, thinned."""
    import scipy.ndimage

    return thin(scipy.ndimage.laplace(labels.astype(np.int64), mode="mirror") != 0).astype(np.uint8)


def changes(labels: np.ndarray) -> np.ndarray:
    """Return a map (H, W) of 0 and 1: pixels whose right or lower neighbour has another label."""
    found = np.zeros(labels.shape, np.uint8)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def thin(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) thinned to lines one pixel wide (Guo and Hall, Communications of the ACM 32, 1989)."""
    mask, before = mask.astype(bool), None
    while before is None or (mask != before).any():
        before = mask
        for first in (0, 4):
            padded = np.pad(mask, 1)
            # The eight neighbours x1 to x8 counter-clockwise from the east, twice, so that x9 is x1.
            steps = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
            x = [padded[row : row + mask.shape[0], column : column + mask.shape[1]] for row, column in steps] * 2
            crossings = sum(~x[i] & (x[i + 1] | x[i + 2]) for i in (0, 2, 4, 6))
            ones = sum((x[i] | x[i + 1]).astype(int) for i in (0, 2, 4, 6))
            twos = sum((x[i + 1] | x[i + 2]).astype(int) for i in (0, 2, 4, 6))
            few = np.minimum(ones, twos)
            side = (x[first + 1] | x[first + 2] | ~x[first + 7]) & x[first]
            mask = mask & ~((crossings == 1) & (few >= 2) & (few <= 3) & ~side)
    return mask


class NyudMT(Layout):
    """NYUv2 with four tasks, in the layout of the archive NYUD_MT of ASTMT; 40 classes without a background."""

    name, augmentation, task_set = "NYUD_MT", "nyud", "nyud"
    images, lists = "images", "gt_sets"
    mark = lists

    def maps(self, id: str) -> dict[str, list[Path]]:
        places = {"semantic": "segmentation/{}.png", "edges": "edge/{}.npy", "normals": "normals/{}.npy"}
        places["depth"] = "depth/{}.npy"
        return {kind: [self.root / place.format(id)] for kind, place in places.items()}

    def read(self, task: Task, id: str, shape: tuple[int, int]) -> np.ndarray:
        (path,) = self.paths(task, id)
        if task.kind != "semantic":
            return read_npy(path)
        return read_png(path) - np.uint8(1)  # 0, no label, becomes 255


def layout_of(folder: str | Path) -> Layout:
    """Return the layout of a folder, recognised by its files; raises ``UserError`` for a folder of no known layout."""
    folder = Path(folder)
    kinds = (Folder, PascalMT, NyudMT)
    for kind in kinds:
        if (folder / kind.mark).exists():
            return kind(folder)
    marks = ", ".join(kind.mark for kind in kinds)
    raise UserError(f"{folder} is not a folder of images with label maps: it has none of {marks}; pass one that has")
