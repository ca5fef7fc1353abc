"""Decodes single images, from files and from bytes; anything that is not an image is named, never ignored."""

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png")

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
_MOST_16_BITS = 65535

# Larger than any image file whose pixels Pillow would not refuse.
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
    """The contents of a folder, by name, after checking each of them."""
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
            raise ValueError(
                f"{entry}: expected an image, a file that ends in {', '.join(SUFFIXES)}; save it as one of these, or "
                "move what is no image out of the folder"
            )
    return entries


def decode_file(path: str | os.PathLike[str], *, size: int, mode: str) -> np.ndarray:
    """Reads an image file as `decode` does.

    Raises:
      ValueError: an unreadable image, or a file too large for one; the message names the file.
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

    The values fill the same range whatever the file's bit depth, palette or colour model; 16 bits are rounded to 8. An
    image that records how the camera was held is turned upright.

    Args:
      encoded: a JPEG or PNG.
      size: height and width; None for the image's own.
      mode: Pillow's "L" for grey or "RGB" for colour.

    Raises:
      ValueError: an unreadable image; a partly transparent one, since what lies behind is unknown; an animation; or one
        with so many pixels that Pillow treats it as an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow reads the number of pixels from the header, before it allocates any.
            with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as opened:
                picture = _plain(opened).convert(mode)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image of reasonable size, got one that Pillow refuses: {error}") from error
    except UnidentifiedImageError as error:
        # Pillow's own message would name the buffer.
        raise ValueError(f"expected a readable JPEG or PNG image, got {len(encoded)} bytes of another kind") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"expected a readable JPEG or PNG image, got {len(encoded)} bytes: {error}") from error
    if size is not None and picture.size != (size, size):
        smaller = size < min(picture.size)
        picture = picture.resize((size, size), Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32) / np.float32(255)


def _plain(opened: Image.Image) -> Image.Image:
    """The image upright, in a mode that Pillow converts to grey and colour without loss of meaning.

    Raises:
      ValueError: a transparent or animated image, a colour that the palette lacks, or an unknown mode.
    """
    # Further pictures in a JPEG are previews, depth maps or the other eye's view.
    frames = getattr(opened, "n_frames", 1) if opened.format == "PNG" else 1
    if frames > 1:
        raise ValueError(f"expected a single picture, got an animation of {frames}; save the one that is meant")
    turned: Image.Image = ImageOps.exif_transpose(opened)
    if turned.mode.startswith("I"):
        # Pillow would clip all values above 255.
        values = np.asarray(turned)
        if values.min() < 0 or values.max() > _MOST_16_BITS:
            raise ValueError(f"expected grey values of at most 16 bits, got up to {values.max()}")
        _check_opaque(values != opened.info.get("transparency", -1))
        return Image.fromarray(np.round(values / (_MOST_16_BITS // 255)).astype(np.uint8))
    if turned.mode == "P":
        there, highest = len(turned.getpalette() or ()) // 3, int(np.asarray(turned).max())
        if highest >= there:
            raise ValueError(f"expected pixels of the palette's {there} colours, got number {highest}")
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        _check_opaque(np.asarray(turned)[..., 3] == 255)
    if turned.mode not in _MODES:
        raise ValueError(f"expected an image of one of Pillow's modes {', '.join(_MODES)}, got {turned.mode}")
    return turned if turned.mode in ("1", "L") else turned.convert("RGB")


def _check_opaque(opaque: np.ndarray) -> None:
    if not opaque.all():
        raise ValueError(
            f"expected an image without transparency, got {np.mean(~opaque):.0%} of its pixels transparent; put it on "
            'a background first, as Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture) does'
        )
