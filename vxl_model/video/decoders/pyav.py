"""Decoding with PyAV: every packet has a number, which tells the decoded frames apart."""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Generator, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from .base import Samples, VideoError, reading
from .container import open_container, video_stream
from .packets import NO_TIME, Packets, read_packets

# Decoding a few frames more is cheaper than a jump, which empties the decoder's threads.
JUMP_GAP = 8
# Where a stream is damaged, FFmpeg's HEVC decoder gives frames out up to two places late.
LATE = 4


class PyAvDecoder:
    """A `Decoder` on PyAV, whose wheel holds FFmpeg's libraries."""

    name = "pyav"

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_container(path) as container:
            self.format = container.format.name
            self.packets = read_packets(container, video_stream(container, path), path)
        self.total = self.packets.total
        self.duration = self.packets.duration
        with contextlib.closing(_Walk(path, self.packets)) as walk:
            _, first = walk.on_show(0)
            if re.search(r"f(16|32)(le|be)?$", first.format.name):
                raise VideoError(
                    f"{path}: pictures of floats ({first.format.name}), whose white is not known"
                )
            # Only one frame is asked for its matrix: PyAV ties a frame that was asked for side data
            # into a reference cycle. 128 frames of 4K then took 1.3 GB until Python collected it.
            self._matrix = _display_matrix(first)
            self.height, self.width = _upright(first, _reformatter(), self._matrix).shape[:2]

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, in seconds from the first one."""
        return self.packets.seconds[indices]

    def frames(self, samples: Samples) -> Iterator[tuple[np.ndarray, bool]]:
        """The samples in order, and whether each is damaged. Raises VideoError."""
        reformatter = _reformatter()
        last: tuple[int, np.ndarray] | None = None
        with reading(self.path), contextlib.closing(_Walk(self.path, self.packets)) as walk:
            for index in self._indices(samples).tolist():
                number, frame = walk.on_show(index)
                if last is None or last[0] != number:
                    last = number, _upright(frame, reformatter, self._matrix)
                repeats = self.packets.may_repeat[self.packets.of_frame[index]]
                lost = number != index and not repeats
                yield last[1], bool(lost or frame.is_corrupt)

    def _indices(self, samples: Samples) -> np.ndarray:
        if samples.indices is not None:
            return samples.indices
        times = samples.seconds + self.packets.grace
        return np.maximum(np.searchsorted(self.packets.seconds, times, side="right") - 1, 0)


class _MisplacedError(Exception):
    """A seek did not lead to the packet that was asked for."""


class _Walk:
    """Moves forward through a video and skips what need not be decoded."""

    def __init__(self, path: Path, packets: Packets) -> None:
        self.path = path
        self.packets = packets
        self._seekable = packets.seekable
        self._is_key = np.zeros(len(packets.pts), dtype=bool)
        self._is_key[packets.keys] = True
        self._now: tuple[int, Any] | None = None  # the last frame that was passed
        self._ahead: list[tuple[int, Any]] = []  # frames after it that are decoded already
        self._at = 0  # the frame that was asked for last
        self._begin = 0  # the packet at which decoding began
        self._open()

    def _open(self) -> None:
        self._container = open_container(self.path)
        self._stream = video_stream(self._container, self.path)
        self._fed = 0  # the packets before this one are decoded or skipped
        self._source = self._numbered(0)
        self._frames = self._decoded(0)

    def close(self) -> None:
        self._frames.close()
        self._source.close()
        self._container.close()

    def on_show(self, index: int) -> tuple[int, Any]:
        """The last frame up to `index` that can be decoded, and its number. Where there is none,
        the first one after `index`."""
        if self.packets.in_order and index - self._at > JUMP_GAP:
            self._jump(index)
        self._forward(index)
        self._at = index
        shown = self._now or next(iter(self._ahead), None)
        if shown is None:
            raise VideoError(f"{self.path}: none of its {self.packets.total} frames can be decoded")
        return shown

    def _forward(self, index: int) -> bool:
        """Decodes until the last frame up to `index` is known; False where there is none."""
        while self._now is None or self._now[0] < index:
            self._look_ahead(index)
            if not self._ahead or self._ahead[0][0] > index:
                break
            self._now = self._ahead.pop(0)
        return self._now is not None

    def _look_ahead(self, index: int) -> None:
        """Decodes the next frame, and a few more while frame `index` may still come."""
        while not self._ahead or (self._ahead[0][0] > index and len(self._ahead) < LATE):
            try:
                decoded = next(self._frames, None)
            except _MisplacedError:
                if not self._seekable:
                    raise VideoError(f"{self.path}: the file changed meanwhile") from None
                self._give_up_seeking()
                self._start(self._begin)
                continue
            if decoded is None:
                return
            bisect.insort(self._ahead, decoded, key=itemgetter(0))

    def _jump(self, index: int) -> None:
        """Skips to a keyframe before frame `index`, unless that one is decoded already."""
        starts = self.packets.starts(index)
        if starts[0] < self._fed:
            return
        for packet in starts:  # a keyframe that is damaged shows nothing
            self._start(packet)
            if self._forward(index):
                return

    def _start(self, packet: int) -> None:
        """Makes `packet` the next to be decoded, by a seek or by reading up to it."""
        self._now, self._ahead = None, []
        self._begin = packet
        if packet and self._seekable and self._seek(packet):
            self._source = self._numbered(None)
        elif packet < self._fed:
            self.close()
            self._open()
        self._stream.codec_context.flush_buffers()
        self._frames = self._decoded(packet)

    def _seek(self, packet: int) -> bool:
        import av

        time = self.packets.seek_times[np.searchsorted(self.packets.keys, packet)]
        try:
            self._container.seek(int(time), stream=self._stream)
        except av.error.FFmpegError:
            self._give_up_seeking()
        return self._seekable

    def _give_up_seeking(self) -> None:
        self._seekable = False
        self._fed = len(self.packets.pts) + 1  # so that reading begins anew

    def _numbered(self, number: int | None) -> Generator[tuple[int, Any]]:
        """The packets from here on with their numbers. None: a seek went before, and the first
        keyframe's time tells its number. Raises _MisplacedError if later times disagree."""
        import av

        pts = self.packets.pts
        sought = number is None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                return  # the rest of the file cannot be read
            if packet is None or packet.size == 0:
                return
            time = NO_TIME if packet.pts is None else packet.pts
            if number is None:
                found = np.flatnonzero((pts == time) & self._is_key)
                if not packet.is_keyframe or len(found) != 1:
                    continue
                number = int(found[0])
            elif sought and (number == len(pts) or pts[number] != time):
                raise _MisplacedError
            yield number, packet
            number += 1

    def _decoded(self, begin: int) -> Generator[tuple[int, Any]]:
        """Frames with their numbers, decoded from packet `begin` on."""
        context = self._stream.codec_context
        number = -1
        for frame in self._pictures(begin):
            known = number + 1 if frame.pts is None else int(self.packets.frame[frame.pts])
            if self.packets.in_order:
                number = known
            elif frame.pts is None or self._is_key[frame.pts] or not context.has_b_frames:
                # Frames come out in order of showing. Here the packets' order is the same, which
                # tells how many were lost.
                number = max(number + 1, known)
            else:
                number = min(number + 1, self.packets.total - 1)
            if number >= 0:
                yield number, frame

    def _pictures(self, begin: int) -> Iterator[Any]:
        """What the decoder makes of the packets from `begin` on. A frame's `pts` is the number of
        its packet. Frames that the decoder refuses are left out."""
        import av

        context, started = self._stream.codec_context, False
        for number, packet in self._source:
            self._fed = number + 1
            if number < begin:
                continue
            if number > begin and not started:
                raise _MisplacedError
            started = True
            packet.pts, packet.dts = number, None
            with contextlib.suppress(av.error.FFmpegError):
                yield from context.decode(packet)
        if begin and not started:
            raise _MisplacedError
        with contextlib.suppress(av.error.FFmpegError):
            yield from context.decode(None)


def _reformatter() -> Any:
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """How the container says frames are shown. The pixel (x, y) goes to (a x + c y, b x + d y), up
    to a shift; the result is (a, b, c, d)."""
    from av.sidedata.sidedata import Type

    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:
        # PyAV lists all side data and does not know every kind that its FFmpeg makes. What it tells
        # without the list lacks only mirroring.
        turned = {90: (0, -1, 1, 0), -90: (0, 1, -1, 0), -180: (-1, 0, 0, -1)}
        return turned.get(frame.rotation)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _upright(frame: Any, reformatter: Any, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """A decoded frame as RGB `(height, width, 3)`, turned and mirrored as the display matrix says
    (to the nearest quarter turn)."""
    rgb = reformatter.reformat(frame, format="rgb24", interpolation="BILINEAR").to_ndarray()
    if matrix is None:
        return rgb
    a, b, c, d = matrix
    if abs(b) > abs(a):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    if a < 0:
        rgb = rgb[:, ::-1]
    if d < 0:
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
