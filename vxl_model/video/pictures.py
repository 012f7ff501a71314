"""Picture files: opening them as a viewer shows them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["ImageError", "described", "open_image", "picture_files", "picture_size"]

SUFFIXES = {
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF, the last one of EXIF too


class ImageError(ValueError):
    """A file that cannot be read as a picture. The message names the file and the reason."""


def open_image(image: Any, animated: bool = True) -> Any:
    """Opens a picture upright, as an RGB PIL image.

    Args:
        image: a path, a PIL image, or uint8 `(height, width, 3)`, an array or a tensor.
        animated: show an animation's first picture; False raises ImageError for it.

    Raises:
        ImageError: what cannot be read, and greys whose white is not known.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (np.ndarray, Tensor)):
        return Image.fromarray(_checked_array(image))
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise ImageError(f"image: got {type(image).__name__}, expected a path, PIL image or array")
    name = "image" if isinstance(image, Image.Image) else os.fspath(image)
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        if not animated and getattr(image, "is_animated", False):
            raise ImageError(f"{name}: an animation, expected one picture")
        return ImageOps.exif_transpose(_eight_bits(image, name)).convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise errors of any kind at a broken file
        raise _unreadable(name, error) from None


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height by the file's header. Raises ImageError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(os.fspath(path), error) from None


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The picture files of a folder in order of their names, frame 2 before frame 10. Raises
    ImageError for a folder without any."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in SUFFIXES]
    if not files:
        raise ImageError(f"{os.fspath(folder)}: a folder without pictures")

    def by_number(file: Path) -> tuple[list[Any], str]:
        parts = re.split(r"([0-9]+)", file.stem)  # text and digits in turn
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name

    return sorted(files, key=by_number)


def described(value: Any) -> str:
    """What a message says of a wrong argument."""
    if hasattr(value, "shape"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _checked_array(image: np.ndarray | Tensor) -> np.ndarray:
    if (
        str(image.dtype).removeprefix("torch.") != "uint8"
        or image.ndim != 3
        or image.shape[2] != 3
        or 0 in image.shape
    ):
        raise ImageError(f"image: got {described(image)}, expected uint8 (height, width, 3)")
    return np.ascontiguousarray(image.cpu().numpy() if isinstance(image, Tensor) else image)


def _eight_bits(image: Any, name: str) -> Any:
    """The picture with greys of 8 bits. Pillow clips wider ones to 255 instead of scaling them."""
    from PIL import Image

    mode = image.mode
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    if mode == "F":
        if not (levels.min() >= 0 and levels.max() <= 1):
            got = f"floats from {levels.min():g} to {levels.max():g}"
            raise ImageError(f"{name}: got {got}, expected floats from 0 to 1")
        grey = np.rint(levels * 255)
    elif mode == "I" and image.format not in ("PNG", "PPM"):  # those two hold 16 bits
        raise ImageError(f"{name}: got 32-bit integers, expected greys of at most 16 bits")
    else:
        tags = getattr(image, "tag_v2", {})
        grey = levels >> (tags.get(BITS, (16,))[0] - 8)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            grey = 255 - grey
    made = Image.fromarray(grey.astype(np.uint8))
    made.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return made


def _unreadable(name: str, error: Exception) -> ImageError:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    what = " ".join(text.replace(repr(name), "the file").split())
    return ImageError(f"{name}: not a picture that can be read ({what})")
