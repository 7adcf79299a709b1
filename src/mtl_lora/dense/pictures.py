"""Write predicted maps as files, and as coloured pictures beside the image and its labels."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from mtl_lora import files
from mtl_lora.dense.backbones import resized
from mtl_lora.dense.data import MEAN, STD
from mtl_lora.dense.tasks import IGNORE, Task

Row = tuple[str, list[tuple[str, np.ndarray]]]  # the row's title, and its pictures, each with a title
_GAP, _TITLE = 4, 12  # pixels between pictures, and the height of a line of text


def map_of(task: Task, output: torch.Tensor, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Return the map that a decoder's output (channels, S, S) predicts. shape: its height and width; None: S and S.

    The map is (H, W) class indices for semantic and parts, (H, W) probabilities for saliency and edges, (H, W, 3) unit
    vectors for normals, and (H, W) for depth.
    """
    output = output.detach().float()
    shape = shape or output.shape[-2:]
    if task.has_classes:
        # One class at a time, because all classes at the size of a photograph would take gigabytes.
        best, found = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.uint8)
        for number, scores in enumerate(output.cpu()):
            scores = resized(scores[None, None], shape)[0, 0]
            found[scores > best] = number
            best = torch.maximum(best, scores)
        return found.numpy()
    output = resized(output[None], shape)[0]
    if task.kind == "normals":
        return F.normalize(output, dim=0).permute(1, 2, 0).cpu().numpy()
    return (output[0] if task.kind == "depth" else output[0].sigmoid()).cpu().numpy()


def write_map(found: np.ndarray, task: Task, path: Path) -> None:
    """Write a map: class indices, or probabilities times 255, as PNG; normals and depth as .npy."""
    with files.atomic_path(path) as temporary, temporary.open("wb") as opened:
        if task.suffix == ".npy":
            np.save(opened, found.astype(np.float32))
        else:
            found = found if task.has_classes else np.round(255 * found).astype(np.uint8)
            Image.fromarray(found).save(opened, format="png")


def picture_of(task: Task, found: np.ndarray, depths: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Return the colours (H, W, 3) of a map, or of a label of ``DenseDataset``, with black for pixels without a label.

    depths: the smallest depth, shown as white, and the largest, shown as dark grey.
    """
    if task.kind == "normals":
        known = (found != IGNORE).all(axis=-1, keepdims=True)
        return np.where(known, 127.5 + 127.5 * np.clip(found * [1, 1, -1], -1, 1), 0).astype(np.uint8)
    if task.has_classes:
        return np.where((found == IGNORE)[..., None], 0, palette(task.classes)[np.minimum(found, task.classes - 1)])
    low, high = depths if task.kind == "depth" else (1.0, 0.0)
    light = 40 + 215 * np.clip((high - found) / (high - low), 0, 1)
    return np.where((found == IGNORE)[..., None], 0, light[..., None].repeat(3, axis=-1)).astype(np.uint8)


def palette(classes: int) -> np.ndarray:
    """Return a colour per class (classes, 3): the first is dark grey, and successive classes have distant hues."""
    golden = 0.618034
    colours = [colorsys.hsv_to_rgb(index * golden % 1, 0.75, 0.95 - 0.35 * (index % 2)) for index in range(1, classes)]
    return np.array([(70, 70, 70), *(np.multiply(colour, 255) for colour in colours)]).astype(np.uint8)


def image_of(image: torch.Tensor) -> np.ndarray:
    """Return the colours (S, S, 3) of an image (3, S, S) as the model sees it."""
    plain = image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (255 * plain.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def rows_of(
    image: torch.Tensor,
    tasks: Sequence[Task],
    found: Mapping[str, np.ndarray],
    labels: Mapping[str, torch.Tensor] | None = None,
) -> list[Row]:
    """Return a row with the image and its maps, after a row with its labels if there are any.

    Both rows use the same shades for depth.
    """
    wanted = {}
    for task in tasks if labels else ():
        label = labels[task.name].numpy()
        wanted[task.name] = label if label.ndim == 2 else label[0] if len(label) == 1 else label.transpose(1, 2, 0)
    rows, first = [], ("image", image_of(image))
    for title, maps in (("labels", wanted), ("maps", found)):
        pictures = [first]
        for task in tasks if maps else ():
            depth = (wanted or maps)[task.name]
            known = depth[depth != IGNORE]
            depths = (float(known.min()), float(known.max()) + 1e-6) if task.kind == "depth" and known.size else (0, 1)
            pictures.append((task.title, picture_of(task, maps[task.name], depths)))
        rows += [(title, pictures)] if maps else []
    return rows


def write_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write all rows to one PNG, with one column per task."""
    height, width = rows[0][1][0][1].shape[:2]
    columns = max(len(pictures) for _, pictures in rows)
    tall = height + _TITLE + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(rows) * tall + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(rows):
        for column, (name, colours) in enumerate(pictures):
            x, y = _GAP + column * (width + _GAP), _GAP + number * tall
            draw.text((x, y - 1), f"{name}, {title}" if column == 0 else name, fill="black")
            sheet.paste(Image.fromarray(np.asarray(colours, np.uint8)), (x, y + _TITLE))
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, format="png")
