"""Extract grid features of a folder of images with a transformers vision model, and write them to one HDF5 file.

    mtl-lora features --images DIR --output FILE.h5 --size 98             7 x 7 cells of the embedded dinov2-small
    mtl-lora features --images DIR --output FILE.h5 --model openai/clip-vit-base-patch32

The features are the model's last hidden state at each cell of its grid, row by row, without class and register tokens.
The file has a group for each image id (the image's file name without its extension) with the dataset "features" of
shape (G, D) in float32. Unfinished work is kept in FILE.h5.partial, from which the same command resumes.
"""

import concurrent.futures
import dataclasses
import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from mtl_lora import files
from mtl_lora.base_model import BaseModel, accepts_argument, device_for_this_process, hub_errors
from mtl_lora.cli import parse
from mtl_lora.config import REQUIRED, Config, flag
from mtl_lora.errors import UserError
from mtl_lora.image_text.features import CONTENT, FEATURES, SETTINGS
from mtl_lora.images import find_images, open_image

_BICUBIC = 3  # Pillow's constant; Pillow is imported only where it is used


@dataclasses.dataclass
class Extract(Config):
    """Which images, which model, and where the features go."""

    images: str = flag(REQUIRED, "folder of images, with its subfolders; an id is a file name without its extension")
    output: str = flag(REQUIRED, "HDF5 file to write")
    model: str = flag("dinov2-small", "vision model: embedded name, folder, or name on the Hugging Face hub")
    size: int = flag(224, "pixels per side to which every image is resized (bicubic), without cropping", min=1)
    batch_size: int = flag(32, "images per batch", min=1)
    device: str = flag("auto", "torch device, such as cuda:1 or cpu; auto: the GPU if there is one")
    overwrite: bool = flag(False, "replace features of another model, size or folder")
    trust_remote_code: bool = flag(False, "run code from the model's repository")


def main(arguments: Sequence[str]) -> None:
    """``mtl-lora features``."""
    run(parse(Extract, arguments, __doc__))


def run(config: Extract) -> None:
    """Extract the features that are missing, then write the file; raises ``UserError``."""
    images, output = find_images(Path(config.images), "--images"), Path(config.output)
    with files.claimed(output):
        base = BaseModel(config.model, config.trust_remote_code, "vision")
        settings = {"model": base.lasting_name, "fingerprint": base.fingerprint(), "size": config.size}
        settings["images"] = _contents(images)
        if output.exists() and not _may_replace(output, settings, config.overwrite):
            print(f"{output} already holds the features of these {len(images):,} images")
            return
        device = device_for_this_process() if config.device == "auto" else _device(config.device)
        torch.backends.cudnn.allow_tf32 = False  # by default cuDNN rounds float32 convolutions to TF32
        grid = GridFeatures(base, config.size, device)
        partial = output.with_name(f"{output.name}.partial")
        rows = _extract(grid, images, partial, settings, config.batch_size)
        if _contents(images) != settings["images"]:
            raise UserError(f"images in {config.images} were replaced while they were read; run the command again")
        _write(output, images, rows, settings)
        partial.unlink()
    print(f"{output}: {len(images):,} images, {rows.shape[1]} cells of {rows.shape[2]} numbers")


def _contents(images: dict[str, Path]) -> str:
    """Return a hash of the image ids and file contents."""
    return files.sha256_of(json.dumps([(image, files.sha256(path)) for image, path in images.items()]).encode())


def read_image(path: Path, size: int) -> torch.Tensor:
    """Return the image as a tensor (3, size, size) in 0..255; raises ``UserError``."""
    resized = open_image(path).resize((size, size), _BICUBIC)
    return torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)


class GridFeatures:
    """A vision model that returns the features of each cell of its grid: images (B, 3, size, size) -> (B, G, D).

    Position embeddings are interpolated to the size if the model supports it. Raises ``UserError`` for a model that
    cannot take images of this size or whose cells are not a square grid.
    """

    def __init__(self, base: BaseModel, size: int, device: torch.device):
        from transformers import AutoImageProcessor

        self.base, self.size, self.device = base, size, device
        self._check_size()
        made = type(base.structure()).__init__
        unused = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(made).parameters else {}
        self.model = base.load("fp32", **unused).eval().to(device)
        with hub_errors(base.name, base.kind):
            processor = AutoImageProcessor.from_pretrained(base.path, trust_remote_code=base.trust_remote_code)
            scale = processor.rescale_factor if processor.do_rescale else 1.0
            mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
            # They mean BGR channels, a second division by the standard deviation, and an offset after rescaling.
            names = ("do_flip_channel_order", "include_top", "rescale_offset")
            if other := [name for name in names if getattr(processor, name, False)]:
                raise UserError(
                    f"the image processor of {base.name!r} has {other[0]}, which mtl-lora features does not support; "
                    "pass another --model"
                )
        # (scale * x - mean) / std
        self.factor = (scale / torch.tensor(std)).view(-1, 1, 1).to(device)
        self.offset = (torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1).to(device)
        try:
            self.shape = tuple(self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1:])
        except UserError:
            raise
        except Exception as error:  # the model's own code may raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"the model {base.name!r} cannot take images of {size} pixels ({reason:.200})") from None

    def _check_size(self) -> None:
        config = self.base.config()
        self.patch = getattr(config, "patch_size", None)
        if isinstance(self.patch, list | tuple):
            self.patch = self.patch[0]
        if self.patch and self.size % self.patch and self.size != getattr(config, "image_size", None):
            raise UserError(
                f"--size must be a multiple of {self.patch}, the patch size of {self.base.name!r}, not {self.size}"
            )

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, G, D) in float32 of images (B, 3, size, size) in 0..255."""
        options = {}
        if accepts_argument(type(self.model), "interpolate_pos_encoding"):
            options["interpolate_pos_encoding"] = True
        pixels = images.to(self.device).float() * self.factor - self.offset
        hidden = self.model(pixel_values=pixels, **options).last_hidden_state
        if hidden.dim() == 4:  # a convolutional network: (B, D, g, g)
            return hidden.flatten(2).transpose(1, 2)
        cells = (self.size // self.patch) ** 2 if self.patch else hidden.shape[1]
        extra = hidden.shape[1] - cells
        if extra in (0, 1, 1 + getattr(self.model.config, "num_register_tokens", 0)):  # class and register tokens
            return hidden[:, extra:]
        if extra < 0 and math.isqrt(hidden.shape[1]) ** 2 == hidden.shape[1]:  # merged patches, as in Swin
            return hidden
        raise UserError(
            f"the model {self.base.name!r} returns {hidden.shape[1]} vectors for an image of {cells} patches, which is "
            "not a square grid, with or without class and register tokens; pass another --model"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def _may_replace(output: Path, settings: dict, overwrite: bool) -> bool:
    """Return whether the file must be written, False if it already holds these features.

    Raises ``UserError`` for a file that is not one of ours, or that holds other features without ``overwrite``.
    """
    import h5py

    try:
        with h5py.File(output, "r") as opened:
            found = json.loads(opened.attrs[SETTINGS])
    except (OSError, RuntimeError, KeyError, ValueError):
        raise UserError(f"{output} was not written by mtl-lora features; pass another --output") from None
    if found == settings:
        return False
    if not overwrite:
        which = next(name for name in settings if found.get(name) != settings[name])
        words = {"images": "other images", "size": f"images of {found.get('size')} pixels"}
        raise UserError(
            f"{output} holds features of {words.get(which, 'another model, ' + str(found.get('model')))}; pass "
            "--overwrite to replace it, or another --output"
        )
    return True


def _extract(
    grid: GridFeatures, images: dict[str, Path], partial: Path, settings: dict, batch_size: int
) -> numpy.ndarray:
    """Return the features of all images (N, G, D), extracting those that are not yet in ``partial``.

    The partial file is a line of JSON that describes its content, followed by the features of the first images.
    """
    header = json.dumps({**settings, "shape": grid.shape}).encode() + b"\n"
    row = 4 * math.prod(grid.shape)
    paths = list(images.values())
    try:
        with partial.open("r+b" if partial.exists() else "w+b") as opened:
            done = 0
            if opened.read(len(header)) == header:
                # Keep complete batches only, so that every batch is computed as in an uninterrupted run.
                done = (partial.stat().st_size - len(header)) // row // batch_size * batch_size
                opened.truncate(len(header) + done * row)
                opened.seek(0, os.SEEK_END)
            else:
                if opened.seek(0, os.SEEK_END):
                    opened.seek(0)
                    if b'"shape"' not in opened.readline(10_000):
                        raise UserError(
                            f"{partial} was not written by this command; move it, or choose another --output"
                        )
                    print(f"{partial} is of another model, size or folder, and is replaced", file=sys.stderr)
                opened.seek(0)
                opened.truncate()
                opened.write(header)
            with (
                concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
                tqdm(total=len(paths), initial=done, unit=" images") as bar,
            ):
                for start in range(done, len(paths), batch_size):
                    batch = paths[start : start + batch_size]
                    pixels = list(pool.map(functools.partial(read_image, size=grid.size), batch))
                    features = grid(torch.stack(pixels)).cpu().numpy()
                    if not numpy.isfinite(features).all():
                        raise UserError(
                            f"the features from {batch[0].name} on are not all finite; pass another --model"
                        )
                    opened.write(features.astype("<f4").tobytes())
                    opened.flush()
                    os.fsync(opened.fileno())  # a power failure must not leave zeros in place of features
                    bar.update(len(batch))
    except OSError as error:
        raise UserError(
            f"{partial} cannot be written ({error.strerror}); fix that, then run the same command again"
        ) from None
    return numpy.memmap(partial, "<f4", "r", len(header), (len(paths), *grid.shape))


def _write(output: Path, images: dict[str, Path], rows: numpy.ndarray, settings: dict) -> None:
    """Write the HDF5 file atomically: it gets its name only when it is complete."""
    import h5py

    with files.atomic_path(output) as temporary:
        try:
            with h5py.File(temporary, "w") as opened:
                opened.attrs[SETTINGS] = json.dumps(settings)
                opened.attrs[CONTENT] = files.sha256_of(rows.data)
                for image, features in zip(images, rows, strict=True):
                    opened.create_dataset(f"{image}/{FEATURES}", data=features)
        except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
            reason = " ".join(str(error).split())
            raise UserError(
                f"{output} cannot be written ({reason:.200}); free some space, then run the same command again, which "
                "resumes"
            ) from None
