"""Tiny folders in the real layouts, with maps of which every value is known."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_png(path: Path, values, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path, **options)


def write_npy(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(values))


def write_mat(path: Path, **variables) -> None:
    import scipy.io

    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def struct(*entries: dict) -> np.ndarray:
    """A MATLAB struct array with the fields of its entries, in their order."""
    array = np.zeros((1, len(entries)), dtype=[(field, object) for field in entries[0]])
    for index, entry in enumerate(entries):
        array[0, index] = tuple(entry.values())
    return array


PERSON, HORSE, WALL, SKY = 284, 207, 440, 360  # of PASCAL-Context; of these the sky has no valid normals
LABELS = np.full((4, 6), SKY)
LABELS[:, :3] = PERSON


def make_pascal(root: Path, train: int = 2, test: int = 1) -> Path:
    """Images of 4 x 6 (``0``, ``1`` ...): the left half is a person with a head and a left foot, the rest sky."""
    names = [f"2008_{index:06d}" for index in range(train + test)]
    write_text(root / "ImageSets" / "Context" / "train.txt", *names[:train])
    write_text(root / "ImageSets" / "Context" / "val.txt", *names[train:])
    left = np.arange(6) < 3
    for index, name in enumerate(names):
        rows = np.arange(4)[:, None]
        write_png(root / "JPEGImages" / f"{name}.jpg", np.full((4, 6, 3), 40 * (index + 1)))
        write_mat(root / "pascal-context" / "trainval" / f"{name}.mat", LabelMap=LABELS)
        folder = "VOC12" if index == 0 else "pascal-context"
        write_png(root / "semseg" / folder / f"{name}.png", np.where(left, 15, 255) * np.ones((4, 1)))
        parts = struct(
            {"part_name": "head", "mask": ((rows == 0) & left).astype(np.uint8)},
            {"part_name": "lfoot", "mask": ((rows == 3) & left).astype(np.uint8)},
        )
        horse = {"class": "horse", "class_ind": 13, "mask": np.ones((4, 6), np.uint8), "parts": parts}
        person = {"class": "person", "class_ind": 15, "mask": left * np.ones((4, 1), np.uint8), "parts": parts}
        # Image 1 has a horse with parts and no person.
        objects = struct(horse) if index == 1 else struct(horse, person)
        write_mat(root / "human_parts" / f"{name}.mat", anno=struct({"imname": name, "objects": objects}))
        write_png(root / "normals_distill" / f"{name}.png", np.broadcast_to([255, 127, 51], (4, 6, 3)))
        write_png(root / "sal_distill" / f"{name}.png", np.where(left, 128, 127) * np.ones((4, 1)))
    return root


def make_nyud(root: Path, train: int = 2, test: int = 1) -> Path:
    """Images of 4 x 6: class 0 is not labelled in the first row, and the first column has no depth and no normal."""
    names = [str(index) for index in range(train + test)]
    write_text(root / "gt_sets" / "train.txt", *names[:train])
    write_text(root / "gt_sets" / "val.txt", *names[train:])
    for index, name in enumerate(names):
        classes = np.repeat([[0], [1], [40], [7]], 6, axis=1)
        depth = np.full((4, 6), 2.5, np.float32)
        normals = np.broadcast_to(np.array([0, -0.6, -0.8], np.float32), (4, 6, 3)).copy()
        depth[:, 0], normals[:, 0] = 0, 0
        write_png(root / "images" / f"{name}.jpg", np.full((4, 6, 3), 40 * (index + 1)))
        write_png(root / "segmentation" / f"{name}.png", classes)
        write_npy(root / "depth" / f"{name}.npy", depth)
        write_npy(root / "normals" / f"{name}.npy", normals)
        write_npy(root / "edge" / f"{name}.npy", (np.arange(6) == 2) * np.ones((4, 1)))
    return root


TASKS = [
    {"name": "things", "id": 0, "kind": "semantic", "classes": 3},
    {"name": "front", "id": 1, "kind": "saliency"},
    {"name": "far", "id": 2, "kind": "depth"},
    {"name": "normal", "id": 3, "kind": "normals"},
]


def make_folder(root: Path, count: int = 3, size: int = 8, tasks: list[dict] = TASKS) -> Path:
    """Images of this project's layout: a disc of class 2 in front of a plane of class 1, of which one moves by image.

    The first image is the test set.
    """
    write_text(root / "test.txt", "0")
    write_text(root / "train.txt", *map(str, range(1, count)))
    (root / "tasks.json").write_text(json.dumps(tasks))
    y, x = np.mgrid[:size, :size]
    for index in range(count):
        disc = (x - 2 - index % 4) ** 2 + (y - size / 2) ** 2 < size**2 / 8
        image = np.where(disc[..., None], [200, 40 * (index % 5), 60], [30, 120, 20 * x[0, 0] + 90])
        normals = np.where(disc[..., None], [0, 0, -1], [0, -0.8, -0.6]).astype(np.float32)
        write_png(root / "images" / f"{index}.png", image)
        write_png(root / "things" / f"{index}.png", np.where(disc, 2, 1))
        write_png(root / "front" / f"{index}.png", disc)
        write_npy(root / "far" / f"{index}.npy", np.where(disc, 1.0, 4.0).astype(np.float32))
        write_npy(root / "normal" / f"{index}.npy", normals)
    return root


def make_swin(folder: Path) -> None:
    """Write a tiny Swin of random weights."""
    import torch
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    SwinModel(SwinConfig(**sizes, window_size=2, drop_path_rate=0.0)).save_pretrained(folder)
