"""A picture file as a video of one frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..pictures import open_image
from .base import Samples


class PictureDecoder:
    """A `Decoder` on Pillow, which knows how pictures are turned and what their greys mean.

    Raises ImageError for what Pillow does not read, and for animations.
    """

    name = "pillow"
    total = 1
    duration = 1 / 25  # FFmpeg's

    def __init__(self, path: Path) -> None:
        self._picture = np.asarray(open_image(path, animated=False))
        self.height, self.width = self._picture.shape[:2]

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, in seconds from the first one."""
        return indices * self.duration

    def frames(self, samples: Samples) -> Iterator[tuple[np.ndarray, bool]]:
        """The picture for each sample. It is never damaged."""
        for _ in samples.seconds:
            yield self._picture, False
