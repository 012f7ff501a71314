"""Video in: which frames of a file, decoded ahead of the model and no more of them than in flight.

Sampling as published: one frame a second up to 128
frames, else 128 evenly spaced. An hour of 4K takes the memory of a minute: a frame is cut to
what the vision tower sees where it is decoded, and a bounded queue lets the decoder run only a
few batches ahead.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np

from .decoders.base import Decoder, Samples, VideoError, VideoWarning
from .decoders.choose import backends, open_decoder
from .resize import _resize, resize_crop

__all__ = ["VideoError", "VideoReader", "VideoWarning", "backends", "open_video", "sample"]

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
    backend: str | None = None,
) -> VideoReader:
    """Opens a video file for reading; nothing but its packets is read yet.

    Args:
        path: any container that FFmpeg reads. Rotation is applied; pixels that are not square
            are taken as they are, as in the published code.
        frames: at most so many frames, evenly spaced over the video. Alone it asks for exactly
            so many (all there are in a shorter video).
        fps: frames a second, the frame on show at each instant. With neither, 1 frame a second
            and at most 128; `fps` alone has no bound.
        size: frames come as `size` x `size`, resized and cropped as CLIP does; None keeps
            their own size.
        batch: frames in a batch.
        ahead: batches that may wait decoded.
        backend: "torchcodec" or "pyav"; None takes torchcodec where it loads.

    Returns:
        A `VideoReader`; iterating it yields uint8 arrays `(n, height, width, 3)`, RGB.

    Raises:
        VideoError: a ValueError that names the file and what is wrong with it.
    """
    for name, value in (("frames", frames), ("batch", batch), ("ahead", ahead), ("size", size)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        optional = name in ("frames", "size")
        if not (value is None and optional) and not (whole and value >= 1):  # type: ignore[operator]
            raise ValueError(f"{name}: got {value!r}, expected an integer from 1 on")
    if fps is not None and not (
        isinstance(fps, (int, float)) and not isinstance(fps, bool) and 0 < fps < math.inf
    ):
        raise ValueError(f"fps: got {fps!r}, expected a positive number")
    decoder = open_decoder(path, backend)
    return VideoReader(decoder, os.fspath(path), sample(decoder, frames, fps), size, batch, ahead)


def sample(decoder: Decoder, frames: int | None, fps: float | None) -> Samples:
    """The frames that `open_video` delivers; see there."""
    if frames is None or fps is not None:
        rate = DEFAULT_FPS if fps is None else fps
        most = frames if fps is not None else DEFAULT_FRAMES
        # The last instant lies before the end; the grace is for durations such as 9.9999 s.
        count = max(1, math.ceil(decoder.duration * rate - 1e-3))
        if most is None or count <= most:
            return Samples(np.arange(count) / rate, None)
        frames = most
    count = min(frames, decoder.total)
    indices = np.linspace(0, decoder.total - 1, count).astype(np.int64)
    return Samples(decoder.seconds(indices), indices)


class VideoReader:
    """The sampled frames of a video, decoded by a thread that runs a bounded way ahead.

    Attributes:
        num_frames: frames that will be delivered.
        timestamps: when each is on show, in seconds from the video's first frame.
        duration: of the video, in seconds.
        backend: "pyav" or "torchcodec".
        damaged: after a pass, frames that could not be decoded; the one before stands for them.
        decode_seconds: after a pass, what decoding and resizing took, waiting excluded.
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
        self.decode_seconds = 0.0

    @property
    def damaged(self) -> int:
        return self._decoder.damaged

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches uint8 `(n, size, size, 3)`, in order; every pass reads the file anew."""
        pending: queue.Queue = queue.Queue(maxsize=self.ahead)
        stop = threading.Event()
        worker = threading.Thread(
            target=self._work, args=(pending, stop), name="vxl-decode", daemon=True
        )
        worker.start()
        try:
            while (item := pending.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            worker.join()

    def _work(self, pending: queue.Queue, stop: threading.Event) -> None:
        def give(item: object) -> bool:
            while not stop.is_set():
                try:
                    pending.put(item, timeout=0.05)
                    return True
                except queue.Full:
                    continue
            return False

        end: BaseException | None = None
        try:
            for batch in self._batches(stop):
                if not give(batch):
                    return
        except Exception as error:
            # Whatever a library throws inside belongs to whoever reads the frames.
            end = error
            if not isinstance(error, (VideoError, MemoryError)):
                end = VideoError(f"{self.path}: reading it failed ({error})")
                end.__cause__ = error
        give(end)

    def _batches(self, stop: threading.Event) -> Iterator[np.ndarray]:
        self.decode_seconds = 0.0
        frames = self._decoder.frames(self._samples)
        left = self.num_frames
        while left:
            begin = time.perf_counter()
            rows: list[np.ndarray] = []
            while len(rows) < min(self.batch, left):
                if stop.is_set():
                    return
                rows.append(self._cut(next(frames)))
            left -= len(rows)
            batch = np.stack(rows)
            self.decode_seconds += time.perf_counter() - begin
            yield batch

    def _cut(self, frame: np.ndarray) -> np.ndarray:
        if self.size is not None:
            return resize_crop(frame, self.size)
        if frame.shape[:2] != (self.height, self.width):  # some streams change size on the way
            frame = _resize(frame, self.height, self.width)
        return frame
