"""Pictures: opening, tiles, resizing."""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


class ImageError(ValueError):
    """A file that cannot be read as a picture: names the file and says what was wrong."""


def open_image(image: Any) -> Any:
    """A path, PIL image or uint8 array `(height, width, 3)` as an upright RGB PIL image.
    Raises ImageError."""
    from PIL import Image, ImageOps

    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image"
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ImageError(f"image: got {_described(image)}, expected uint8 (height, width, 3)")
        return Image.fromarray(image)
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise ImageError(f"image: got {type(image).__name__}, expected a path, PIL image or array")
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        if image.mode.startswith("I;16"):  # PIL would clip 16-bit greys instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = getattr(error, "strerror", None) or str(error).replace(repr(name), "the file")
        raise ImageError(f"{name}: not a picture that can be read ({what})") from None


def _bicubic() -> Any:
    from PIL import Image

    return Image.Resampling.BICUBIC


def _fit(picture: Any, width: int, height: int) -> Any:
    """The picture as large as fits into `width` x `height`, in the middle of black."""
    from PIL import Image

    across, down = width / picture.width, height / picture.height
    if across < down:
        size = width, min(math.ceil(picture.height * across), height)
    else:
        size = min(math.ceil(picture.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    canvas.paste(picture.resize(size, _bicubic()), corner)
    return canvas


def _pinpoints(value: Sequence[Sequence[int]] | str, size: int) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints` of a config: a list, its text, or "(1x1),...,(6x6)", a range of
    grids of tiles."""
    if isinstance(value, str):
        grids = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", value)]
        if grids:
            first, last = grids[0], grids[-1]
            value = [
                (i * size, j * size)
                for i in range(first[0], last[0] + 1)
                for j in range(first[1], last[1] + 1)
            ]
        else:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise ValueError(f"image_grid_pinpoints: got {value!r}, expected pairs") from None
    pairs = []
    for pair in value:
        edges = tuple(int(edge) for edge in pair)
        if len(edges) != 2 or min(edges) < 1 or any(edge % size for edge in edges):
            raise ValueError(f"image_grid_pinpoints: got {pair}, expected 2 multiples of {size}")
        pairs.append((edges[0], edges[1]))
    return tuple(pairs)


def _described(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
