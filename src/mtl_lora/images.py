"""Find the user's image files, check them before any work starts, and open them as an image viewer shows them."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.data_files import text_of
from mtl_lora.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Not every format of Pillow: for PostScript it starts another program, whatever the file's ending.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ORIENTATION = 0x0112  # an EXIF tag
_MOST_NAMED = 5  # broken images that an error lists


def is_wide(image: "Image.Image") -> bool:
    """Return whether an image has more than 8 bits per channel, which Pillow would clip at 255."""
    return image.mode.startswith(("I", "F"))


def is_turned(path: Path) -> bool:
    """Return whether an image's EXIF data ask for a rotation or reflection; False for a file that cannot be opened."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            return opened.getexif().get(_ORIENTATION) in range(2, 9)
    except Exception:  # reported when the pixels are read
        return False


def on_white(image: "Image.Image") -> "Image.Image":
    """Return an image in RGB, with transparent parts on a white background."""
    from PIL import Image

    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def find_images(folder: Path, passed_by: str, deep: bool = True) -> dict[str, Path]:
    """Return the images in a folder by id (file name without extension), sorted by id.

    passed_by: the flag that errors name. deep: also search subfolders. Raises ``UserError`` for a folder without
    images, for two images with one id, and as ``require_readable`` does.
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
    """Raise ``UserError`` naming images that cannot be opened, have too many pixels or more than 8 bits per channel.

    Only headers are read.
    """
    from PIL import Image, UnidentifiedImageError

    broken = []
    for path in paths:
        try:
            bombs = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
            with bombs, Image.open(path, formats=FORMATS) as opened:  # reads the header alone
                if is_wide(opened):
                    broken.append(f"{path} has more than 8 bits per channel")
        except UnidentifiedImageError:
            broken.append(f"{path} is not an image of {', '.join(FORMATS)}")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            broken.append(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        except Exception as error:  # Pillow may raise anything for a broken file
            broken.append(f"{path} cannot be read ({error})")
    if broken:
        more = f" and so on, {len(broken):,} in all" if len(broken) > _MOST_NAMED else ""
        raise UserError(
            f"{'; '.join(broken[:_MOST_NAMED])}{more}; save them again as 8-bit RGB with fewer pixels, or remove them"
        )


def open_image(path: Path) -> "Image.Image":
    """Return the image in RGB, rotated as its EXIF data say; raises ``UserError``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as opened:
            if not is_wide(opened):
                return on_white(ImageOps.exif_transpose(opened))
    except Exception as error:
        raise UserError(f"the image {path} is broken ({error}); save it again, or remove it") from None
    raise UserError(f"the image {path} has more than 8 bits per channel; save it again as 8-bit RGB")
