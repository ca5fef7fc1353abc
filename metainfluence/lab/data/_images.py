"""Decoding of single images, from files and from bytes, so that what is no image is named and never swallowed."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png")

# More than any image takes whose pixels Pillow would not refuse.
_MOST_BYTES = 1 << 28


def image_files(root: Path) -> tuple[list[Path], list[str]]:
    """The images of a folder laid out as split/class/image, in the order of their names, and the splits.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a file of another kind, a link that leads out of the folder, or an empty folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder laid out as split/class/image.jpg, found none")
    home = root.resolve()
    splits = _inside(root, home)
    files = [
        image for split in splits for folder in _inside(split, home) for image in _inside(folder, home, folders=False)
    ]
    return files, [split.name for split in splits]


def _inside(folder: Path, home: Path, *, folders: bool = True) -> list[Path]:
    """What the folder holds, by name, after a look at each."""
    entries = sorted(folder.iterdir())
    if not entries:
        raise ValueError(f"{folder}: expected {'folders' if folders else 'images'}, got an empty folder")
    for entry in entries:
        try:
            target = entry.resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{entry}: expected a file inside of {home}, got a link that leads in a circle") from error
        if not target.is_relative_to(home):
            raise ValueError(f"{entry}: expected a file inside of {home}, got a link to {target}")
        if folders and not entry.is_dir():
            raise ValueError(f"{entry}: expected a folder, since images are laid out as split/class/image.jpg")
        if not folders and (entry.suffix.lower() not in SUFFIXES or not entry.is_file()):
            raise ValueError(f"{entry}: expected an image, a file that ends in {', '.join(SUFFIXES)}")
    return entries


def decode_file(path: str | os.PathLike[str], *, size: int, mode: str) -> np.ndarray:
    """Reads an image file as `decode` does.

    Raises:
      ValueError: no readable image, or a file too large for one; the message names the file.
    """
    try:
        size_of_file = os.stat(path).st_size
        if size_of_file > _MOST_BYTES:
            raise ValueError(f"expected an image of at most {_MOST_BYTES} bytes, got {size_of_file}")
        return decode(Path(path).read_bytes(), size=size, mode=mode)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def decode(encoded: bytes, *, size: int | None, mode: str) -> np.ndarray:
    """Decodes an image, float32 [size, size] or [size, size, 3] in [0, 1], averaged down or interpolated up.

    Args:
      encoded: a JPEG or PNG; a PNG of one bit, or with a palette, fills the same range as any other.
      size: height and width; None for the image's own.
      mode: Pillow's "L" for grey or "RGB" for colour.

    Raises:
      ValueError: no readable image, or one of so many pixels that Pillow takes it for an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow looks at the number of pixels in the header, before it allocates any.
            with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as opened:
                picture = opened.convert(mode)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image of reasonable size, got one that Pillow refuses: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"expected a readable JPEG or PNG image, got {len(encoded)} bytes: {error}") from error
    if size is not None and picture.size != (size, size):
        smaller = size < min(picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32) / np.float32(255)
