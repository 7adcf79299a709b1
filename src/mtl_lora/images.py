"""Find the user's image files, check them before any work starts, and open them as an image viewer shows them."""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.data_files import text_of
from mtl_lora.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Not every format of Pillow: for PostScript it starts another program, whatever the file's ending.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_NAMED = 5  # broken images that an error lists


def _is_wide(image: "Image.Image") -> bool:
    """Return whether an image has more than 8 bits per channel, which Pillow would clip at 255."""
    return image.mode.startswith(("I", "F"))


def is_turned(path: Path) -> bool:
    """Return whether an image's EXIF data ask for a rotation or reflection; False for a file that cannot be opened."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # reported when the pixels are read
        return False


def find_images(
    folder: Path, passed_by: str, deep: bool = True, only: Collection[str] | None = None
) -> dict[str, Path]:
    """Return the images in a folder by id (file name without extension), sorted by id.

    passed_by: the flag that errors name. deep: also search subfolders. only: the ids to look for; the others are not
    opened. Raises ``UserError`` for a folder without images, for two images with one id, and as ``require_readable``
    does.
    """
    if not folder.is_dir():
        raise UserError(f"{passed_by} {folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        wanted = only is None or path.stem in only
        if wanted and path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            text_of(path.stem, f"the file name {os.fsencode(path.name)!r} in {folder}")
            if path.stem in found:
                raise UserError(f"two images have the id {path.stem!r}, {found[path.stem]} and {path}; rename one")
            found[path.stem] = path
    if not found and only is None:
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
                if _is_wide(opened):
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


def open_image(source: "str | Path | Image.Image") -> "Image.Image":
    """Return an image, or the one in a file, in RGB, rotated as its EXIF data say, with transparent parts on white.

    Raises ``UserError``.
    """
    from PIL import Image, ImageOps

    is_file = isinstance(source, str | Path)
    name = f"the image {source}" if is_file else "an image"
    try:
        with Image.open(source, formats=FORMATS) if is_file else contextlib.nullcontext(source) as opened:
            if not _is_wide(opened):
                image = ImageOps.exif_transpose(opened)
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return image.convert("RGB")
    except Exception as error:
        raise UserError(f"{name} is broken ({error}); save it again, or remove it") from None
    raise UserError(f"{name} has more than 8 bits per channel; save it again as 8-bit RGB")
