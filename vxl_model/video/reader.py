"""The frames of a video file that a model is shown.

The default sampling is the published one: one frame a second up to 128 frames, else 128 evenly
spaced frames. An hour of 4K takes the memory of a minute, because each frame is cut to what the
vision tower sees where it is decoded, and the decoder runs only a few batches ahead.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator

import numpy as np

from .decoders.base import Decoder, Samples, VideoError, VideoWarning, reading
from .decoders.choose import open_decoder
from .prefetch import prefetch
from .resize import resize, resize_crop

__all__ = ["VideoError", "VideoReader", "VideoWarning", "even", "open_video", "sample"]

DEFAULT_FPS = 1.0
DEFAULT_FRAMES = 128


def open_video(
    path: str | os.PathLike[str],
    frames: int | None = None,
    fps: float | None = None,
    *,
    size: int | None = 336,
    batch: int = 16,
    ahead: int = 2,
) -> VideoReader:
    """Opens a video file and reads its packets. Nothing but the first frame is decoded yet.

    Args:
        path: a file in any container that FFmpeg reads. Rotation is applied. Pixels that are not
            square are taken as they are, as in the published code.
        frames: the largest number of frames, evenly spaced over the video. Without `fps` exactly
            this number, or all frames of a shorter video with a VideoWarning.
        fps: frames a second: the frame on show at each instant. With neither, 1 frame a second
            and at most 128; `fps` alone has no bound.
        size: frames come as `size` x `size`, resized and cropped as CLIP does. None keeps their
            own size.
        batch: frames in a batch.
        ahead: batches that may wait decoded.

    Returns:
        A `VideoReader`. Iterating it yields uint8 arrays `(n, height, width, 3)`, RGB.

    Raises:
        VideoError: a ValueError that names the file and the reason.
    """
    for name, value in (("frames", frames), ("batch", batch), ("ahead", ahead), ("size", size)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        optional = name in ("frames", "size")
        if not (value is None and optional) and not (whole and value >= 1):  # type: ignore[operator]
            raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    if fps is not None and not (
        isinstance(fps, (int, float)) and not isinstance(fps, bool) and 0 < fps < math.inf
    ):
        raise ValueError(f"fps: got {fps!r}, expected a positive number")
    decoder = open_decoder(path)
    name = os.fspath(path)
    return VideoReader(decoder, name, sample(decoder, frames, fps, name), size, batch, ahead)


def sample(decoder: Decoder, frames: int | None, fps: float | None, name: str) -> Samples:
    """The frames that `open_video` delivers, as its arguments say. `name`: of the file."""
    wanted = frames
    if frames is None or fps is not None:
        rate = DEFAULT_FPS if fps is None else fps
        most = frames if fps is not None else DEFAULT_FRAMES
        # The last instant lies before the end; the grace is for durations such as 9.9999 s.
        count = max(1, math.ceil(decoder.duration * rate - 1e-3))
        if most is None or count <= most:
            return Samples(np.arange(count) / rate, None)
        wanted = min(most, decoder.total)  # a bound, which nobody asks to be reached
    assert wanted is not None
    indices = even(decoder.total, wanted, name)
    return Samples(decoder.seconds(indices), indices)


def even(total: int, frames: int, name: str) -> np.ndarray:
    """`frames` of `total` numbers, evenly spaced and rounded down, as published. Where there are
    fewer, each comes once, with a warning that names the file."""
    if frames > total:
        warnings.warn(
            f"{name}: has {total} of the {frames} frames asked for", VideoWarning, stacklevel=4
        )
    return np.linspace(0, total - 1, min(frames, total)).astype(np.int64)


class VideoReader:
    """The sampled frames of a video. A thread decodes them a bounded way ahead.

    Attributes:
        num_frames: number of frames that will be delivered.
        timestamps: when each is on show, in seconds from the video's first frame.
        duration: of the video, in seconds.
        backend: the library that decodes.
        damaged_frames: after a pass, the delivered frames that were lost or decoded with errors, by
            their places. In place of a lost frame comes the one before it. A VideoWarning tells.
        decode_seconds: after a pass, the time that decoding and resizing took, without waiting.
    """

    def __init__(
        self,
        decoder: Decoder,
        path: str,
        samples: Samples,
        size: int | None,
        batch: int,
        ahead: int,
    ) -> None:
        self._decoder = decoder
        self._samples = samples
        self.path = path
        self.size = size
        self.batch = batch
        self.ahead = ahead
        self.num_frames = len(samples.seconds)
        self.timestamps: list[float] = samples.seconds.tolist()
        self.duration = decoder.duration
        self.backend = decoder.name
        self.height, self.width = decoder.height, decoder.width
        self.damaged_frames: list[int] = []
        self.decode_seconds = 0.0

    @property
    def damaged(self) -> int:
        """Number of damaged frames in the last pass."""
        return len(self.damaged_frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches uint8 `(n, size, size, 3)`, in order. Every pass reads the file anew."""
        yield from prefetch(self._batches(), self.ahead)
        if self.damaged:
            places = [f"{self.timestamps[i]:.2f}" for i in self.damaged_frames[:8]]
            more = " ..." if self.damaged > len(places) else ""
            warnings.warn(
                f"{self.path}: {self.damaged} of {self.num_frames} frames are damaged, "
                f"at {', '.join(places)}{more} s",
                VideoWarning,
                stacklevel=2,
            )

    def _batches(self) -> Iterator[np.ndarray]:
        self.damaged_frames, self.decode_seconds = [], 0.0
        with reading(self.path):
            frames = enumerate(self._decoder.frames(self._samples))
            for _ in range(0, self.num_frames, self.batch):
                begin = time.perf_counter()
                rows = []
                for i, (frame, damaged) in itertools.islice(frames, self.batch):
                    rows.append(self._cut(frame))
                    if damaged:
                        self.damaged_frames.append(i)
                self.decode_seconds += time.perf_counter() - begin
                yield np.stack(rows)

    def _cut(self, frame: np.ndarray) -> np.ndarray:
        if self.size is not None:
            return resize_crop(frame, self.size)
        return resize(frame, self.height, self.width)  # some streams change size on the way
