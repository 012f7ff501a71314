"""What every decoder shares: errors, the path's check, samples and the interface."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class VideoError(ValueError):
    """A file that cannot be read as a video. The message names the file and the reason."""


class VideoWarning(UserWarning):
    """A video that could be read in part. The message names the file and what is missing."""


@dataclass(frozen=True)
class Samples:
    """Which frames of a video to decode, in ascending order.

    Attributes:
        seconds: when each is shown, counted from the first frame.
        indices: their numbers; None means the frames on show at `seconds`.
    """

    seconds: np.ndarray
    indices: np.ndarray | None


class Decoder(Protocol):
    """An opened video.

    Attributes:
        name: of the library that decodes.
        total: number of frames.
        duration: in seconds.
        height, width: of an upright frame.
    """

    name: str
    total: int
    duration: float
    height: int
    width: int

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, in seconds from the first one."""

    def frames(self, samples: Samples) -> Iterator[tuple[np.ndarray, bool]]:
        """The samples in order: uint8 `(height, width, 3)`, RGB, and whether the frame is damaged.

        A damaged frame is either decoded with errors or lost. In place of a lost frame comes the
        one before it. Raises VideoError.
        """


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any error of a library into a VideoError that names the file."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        raise VideoError(f"{os.fspath(path)}: reading it failed ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of an existing regular file; raises VideoError for anything else."""
    if not isinstance(path, (str, os.PathLike)):
        raise VideoError(f"video: got {type(path).__name__}, expected a path")
    text = os.fspath(path)
    if isinstance(text, bytes) or "\0" in text or not text:
        raise VideoError(f"video: got {text!r}, expected a path")
    file = Path(text)
    try:
        if not file.exists():
            # pathlib has made one slash of the two in "https://".
            url = re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE)
            raise VideoError(f"{text}: {'a URL; download it first' if url else 'no such file'}")
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
