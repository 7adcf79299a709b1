"""Image files that a user names: found, checked before anything begins, and opened as a viewer shows them."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.data_files import text_of
from mtl_lora.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ORIENTATION = 0x0112  # an EXIF tag
_MOST_NAMED = 5  # broken images that an error lists


def is_wide(image: "Image.Image") -> bool:
    """Whether it has more than 8 bits a channel, which Pillow would cut off at 255."""
    return image.mode.startswith(("I", "F"))


def is_turned(path: Path) -> bool:
    """Whether its EXIF data say that an image is to be turned or mirrored; False for one that cannot be opened."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.getexif().get(_ORIENTATION) in range(2, 9)
    except Exception:  # said by whoever reads its pixels
        return False


def on_white(image: "Image.Image") -> "Image.Image":
    """An image in RGB, what is transparent of it in front of white."""
    from PIL import Image

    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def find_images(folder: Path, passed_by: str, deep: bool = True) -> dict[str, Path]:
    """The images in a folder by id, in order of their ids, each of which can be opened and is not too large.

    passed_by: the flag that errors name. deep: those in the folders below it too. Raises ``UserError``
    that names the files that are at fault.
    """
    if not folder.is_dir():
        raise UserError(f"{passed_by} {folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            text_of(path.stem, f"the file name {os.fsencode(path.name)!r} in {folder}")
            if path.stem in found:
                raise UserError(f"two images have the id {path.stem!r}, {found[path.stem]} and {path}; rename one")
            found[path.stem] = path
    if not found:
        raise UserError(f"{passed_by} {folder} holds no image ({', '.join(ENDINGS)})")
    require_readable(found.values())
    return dict(sorted(found.items()))


def require_readable(paths: Iterable[Path]) -> None:
    """Raise ``UserError`` naming the images that cannot be opened, by their headers, or are too large."""
    from PIL import Image, UnidentifiedImageError

    broken = []
    for path in paths:
        try:
            bombs = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
            with bombs, Image.open(path) as opened:  # reads the header alone
                if is_wide(opened):
                    broken.append(f"{path} has more than 8 bits a channel")
        except UnidentifiedImageError:
            broken.append(f"{path} is not an image")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            broken.append(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        except Exception as error:  # a file is input, of which Pillow raises whatever it likes
            broken.append(f"{path} cannot be read ({error})")
    if broken:
        more = f" and so on, {len(broken):,} in all" if len(broken) > _MOST_NAMED else ""
        raise UserError(
            f"{'; '.join(broken[:_MOST_NAMED])}{more}; save them anew as 8-bit RGB of fewer pixels, or take them away"
        )


def open_image(path: Path) -> "Image.Image":
    """The image in RGB, turned as its EXIF data says; raises ``UserError``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if not is_wide(opened):
                return on_white(ImageOps.exif_transpose(opened))
    except Exception as error:
        raise UserError(f"the image {path} is broken ({error}); save it anew, or take it away") from None
    raise UserError(f"the image {path} has more than 8 bits a channel; save it anew as 8-bit RGB")
