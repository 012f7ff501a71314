"""Pictures cut into tiles, and pictures as the frames of a video."""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import fail
from ..video.pictures import ImageError, described, open_image, picture_files, picture_size
from ..video.reader import VideoReader, even, open_video
from ..video.resize import resize_crop

__all__ = [
    "ImageError",
    "PictureReader",
    "bicubic",
    "described",
    "fit",
    "open_frames",
    "open_image",
    "picture_size",
    "pinpoints",
]


class PictureReader:
    """Pictures as a video, one a frame. They are opened as they are taken.

    Iterating it yields batches uint8 `(n, size, size, 3)`, each picture resized and cropped as CLIP
    does.

    Attributes:
        num_frames: number of pictures that will be delivered.
    """

    def __init__(
        self,
        pictures: str | os.PathLike[str] | Sequence[Any],
        size: int,
        frames: int | None = None,
        batch: int = 16,
    ) -> None:
        """`pictures`: a folder, or paths, PIL images or uint8 arrays `(height, width, 3)`.
        `frames`: the largest number of them, evenly spaced. Raises ImageError."""
        if isinstance(pictures, (str, os.PathLike)):
            name = os.fspath(pictures)
            self.pictures: Sequence[Any] = picture_files(pictures)
        else:
            name = "the list of pictures"
            self.pictures = pictures
        if not len(self.pictures):
            raise ImageError("images: got none, expected at least one picture")
        if frames is not None:
            self.pictures = [self.pictures[i] for i in even(len(self.pictures), frames, name)]
        self.size = size
        self.batch = batch
        self.num_frames = len(self.pictures)

    def __iter__(self) -> Iterator[np.ndarray]:
        for begin in range(0, self.num_frames, self.batch):
            opened = map(open_image, self.pictures[begin : begin + self.batch])
            yield np.stack([resize_crop(np.asarray(picture), self.size) for picture in opened])


def open_frames(
    video: Any, size: int, frames: int | None = None, fps: float | None = None
) -> tuple[Iterable[Any], int | None]:
    """Whatever a user calls a video, as batches of uint8 frames, and their number if it is known.

    Args:
        video: the path of a video file or of a folder of pictures; a list of pictures (paths, PIL
            images, uint8 arrays `(height, width, 3)`); uint8 frames `(n, height, width, 3)`, an
            array or a tensor; an iterable of such frames, for instance a `VideoReader`.
        size: edge that files and pictures are resized and cropped to.
        frames: how many frames of all but an iterable of batches, evenly spaced.
        fps: how many frames a second of a file.

    Raises:
        VideoError, ImageError: name the file that cannot be read.
        ValueError: names the argument that does not fit `video`.
    """
    alone = isinstance(video, (str, os.PathLike))
    if alone and not os.path.isdir(video):
        reader: VideoReader = open_video(video, frames, fps, size=size)
        return reader, reader.num_frames
    if fps is not None:
        fail("fps", fps, "None for what is not a video file")
    if not alone and (getattr(video, "ndim", 0) == 3 or not hasattr(video, "__iter__")):
        video = [video]  # one picture
    if alone or (isinstance(video, (list, tuple)) and getattr([*video, 0][0], "ndim", 3) != 4):
        pictures = PictureReader(video, size, frames)
        return pictures, pictures.num_frames
    if hasattr(video, "ndim"):
        video = [video if frames is None else video[even(len(video), frames, "video")]]
    elif frames is not None:
        fail("frames", frames, "None for batches of frames")
    total = getattr(video, "num_frames", None)
    return video, sum(map(len, video)) if isinstance(video, (list, tuple)) else total


def bicubic() -> Any:
    """Pillow's name for the interpolation."""
    from PIL import Image

    return Image.Resampling.BICUBIC


def fit(picture: Any, width: int, height: int) -> Any:
    """The picture as large as fits into `width` x `height`, in the middle of black."""
    from PIL import Image

    across, down = width / picture.width, height / picture.height
    if across < down:
        size = width, min(math.ceil(picture.height * across), height)
    else:
        size = min(math.ceil(picture.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    canvas.paste(picture.resize(size, bicubic()), corner)
    return canvas


def pinpoints(value: Sequence[Sequence[int]] | str, size: int) -> tuple[tuple[int, int], ...]:
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
