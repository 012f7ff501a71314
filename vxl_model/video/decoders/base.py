"""What every decoder of video files shares: errors, limits, samples, the interface."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# A frame larger than this (16,384 x 8,192) is a broken or hostile header, not a video.
MAX_PIXELS = 1 << 27
# Demuxers that turn any text or binary file into pictures of characters.
TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})
# Decoding a few frames more is cheaper than a seek, which empties the decoder's threads.
SEEK_GAP = 8


class VideoError(ValueError):
    """A file that cannot be read as a video: names the file and says what was wrong."""


class VideoWarning(UserWarning):
    """A file that could be read in part: says which part."""


@dataclass(frozen=True)
class Samples:
    """Which frames of a video: by index where `indices` is set, else those on show at `seconds`
    (from the first frame on). Both ascend."""

    seconds: np.ndarray
    indices: np.ndarray | None


class Decoder(Protocol):
    """An opened video. `total` frames over `duration` seconds, `height` x `width` upright;
    `damaged`: samples replaced by the frame before them because they could not be decoded."""

    name: str
    total: int
    duration: float
    height: int
    width: int
    damaged: int

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, from the first one on."""

    def frames(self, samples: Samples) -> Iterator[np.ndarray]:
        """Each sample in turn, uint8 `(height, width, 3)`; raises VideoError."""


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of an existing regular file."""
    if not isinstance(path, (str, os.PathLike)):
        raise VideoError(f"video: got {type(path).__name__}, expected a path")
    text = os.fspath(path)
    if isinstance(text, bytes) or "\0" in text or not text:
        raise VideoError(f"video: got {text!r}, expected a path")
    file = Path(text)
    try:
        if not file.exists():
            what = "a URL; fetch it first, files only" if "://" in text else "no such file"
            raise VideoError(f"{text}: {what}")
        if file.is_dir():
            raise VideoError(f"{text}: a directory, expected a video file")
        if not file.is_file():
            raise VideoError(f"{text}: not a regular file")
        if file.stat().st_size == 0:
            raise VideoError(f"{text}: the file is empty")
        with file.open("rb"):
            pass
    except OSError as error:
        raise VideoError(f"{text}: {error.strerror or error}") from None
    return file


def _warn_if_short(path: Path, duration: float, declared: float) -> None:
    if duration < 0.9 * declared and declared - duration > 1:
        warnings.warn(
            f"{path}: ends after {duration:.1f} s of the {declared:.1f} s that its header "
            "promises; truncated?",
            VideoWarning,
            stacklevel=6,
        )


def _word(error: Exception) -> str:
    """The first line of what a library says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]
