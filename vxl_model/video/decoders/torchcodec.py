"""Decoding with torchcodec, where it is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .base import Samples, VideoError, _warn_if_short, _word


def _indexed(file: Path) -> bool:
    """Whether torchcodec finds a frame by its number there: MP4, MOV, Matroska, WebM, FLV, GIF.
    Measured with 0.17: of an MPEG-TS it loses the first group of pictures, in AVI and MPEG-PS
    frames are up to 4 places off, bare streams it refuses."""
    with file.open("rb") as opened:
        head = opened.read(12)
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return head[4:8] in boxes or head.startswith((b"\x1aE\xdf\xa3", b"FLV", b"GIF8"))


def _torchcodec_loads() -> None:
    """Newer releases import without FFmpeg and fail at the first video."""
    from torchcodec.decoders import VideoDecoder

    try:
        VideoDecoder(b"not a video")
    except (ValueError, RuntimeError) as error:
        if "libtorchcodec" in str(error):
            raise


class TorchcodecDecoder:
    """torchcodec: FFmpeg's libraries as the system has them."""

    name = "torchcodec"

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder

        self.path = path
        self.damaged = 0
        try:
            self._decoder = VideoDecoder(
                f"file:{path.absolute()}",
                dimension_order="NHWC",
                seek_mode="exact",
                num_ffmpeg_threads=min(os.cpu_count() or 1, 8),
            )
            about = self._decoder.metadata
            self.total = about.num_frames or 0
            if self.total:
                self.height, self.width = self._at([0])[0].shape[:2]
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoError(
                f"{path}: not a video that torchcodec reads ({_word(error)})"
            ) from None
        if not self.total:
            raise VideoError(f"{path}: its video stream has no frames")
        if about.codec == "ansi" or (self.total == 1 and self._has_audio()):
            raise VideoError(f"{path}: no video stream (text, or sound with a picture)")
        self._start = about.begin_stream_seconds or 0.0
        self.duration = float(about.duration_seconds or self.total / (about.average_fps or 25))
        _warn_if_short(path, self.duration, about.duration_seconds_from_header or 0.0)

    def _has_audio(self) -> bool:
        from torchcodec.decoders import AudioDecoder

        try:
            AudioDecoder(f"file:{self.path.absolute()}")
        except (RuntimeError, ValueError):
            return False
        return True

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """Evenly spaced: torchcodec tells the time of a frame only with the frame."""
        return indices * (self.duration / self.total)

    def frames(self, samples: Samples) -> Iterator[np.ndarray]:
        by_time = samples.indices is None
        # The grace keeps a time that falls on a frame's start from rounding to the frame before.
        latest = self._start + self.duration - 1e-3
        wanted = (
            np.minimum(self._start + samples.seconds + 1e-4, latest)
            if samples.indices is None
            else samples.indices
        ).tolist()
        batch = max(1, min(8, (1 << 25) // (self.height * self.width * 3)))
        shown: np.ndarray | None = None
        waiting = 0
        for begin in range(0, len(wanted), batch):
            for frame in self._batch(wanted[begin : begin + batch], by_time):
                if frame is None:
                    self.damaged += 1
                shown = shown if frame is None else frame
                waiting += 1
                if shown is not None:
                    for _ in range(waiting):
                        yield shown
                    waiting = 0
        if shown is None:
            raise VideoError(f"{self.path}: nothing could be decoded")

    def _at(self, wanted: list, by_time: bool = False) -> np.ndarray:
        read = self._decoder.get_frames_played_at if by_time else self._decoder.get_frames_at
        return read(wanted).data.numpy()

    def _batch(self, wanted: list, by_time: bool) -> list[np.ndarray | None]:
        try:
            return list(self._at(wanted, by_time))
        except (RuntimeError, IndexError):
            if len(wanted) == 1:
                return [None]
        return [frame for one in wanted for frame in self._batch([one], by_time)]
