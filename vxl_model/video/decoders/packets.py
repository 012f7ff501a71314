"""What a file's packets tell of its frames: how many there are, when and in which order."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .base import VideoError, VideoWarning
from .h264_fields import FieldPairs

NO_TIME = np.iinfo(np.int64).min
# A clock that goes back by BACK seconds, or ahead by AHEAD in containers that allow it, has started
# anew. ffmpeg has the same limits.
BACK, AHEAD = 0.1, 10.0
# An MPEG-4 packet that repeats the last picture has at most this size (FFmpeg's MAX_NVOP_SIZE).
REPEAT_BYTES = 19
SLICE_BYTES = 1 << 14  # enough to find where a packet's first slice begins


@dataclass(frozen=True)
class Packets:
    """The packets of a video stream in decoding order, and the frames they hold.

    Attributes:
        frame: the number of each packet's frame in order of showing, -1 for a packet without one.
            Both fields of a frame have the frame's number.
        of_frame: the packet of each frame, or the packet of its first field.
        pts: the container's times of the packets; `NO_TIME` where it has none.
        keys: packets at which decoding can start.
        seek_times: what to ask the container for to come to each of `keys`.
        may_repeat: packets that may repeat the frame before them instead of holding one.
        seconds: when each frame is shown, from the first one on.
        duration: in seconds.
        grace: seconds by which a time may miss a frame's because the container rounds.
        in_order: False where the container has no times of showing. Then the n-th frame out of the
            decoder is the n-th shown, and `frame` counts in decoding order.
        seekable: False where times do not tell the place in the file.
    """

    frame: np.ndarray
    of_frame: np.ndarray
    pts: np.ndarray
    keys: np.ndarray
    seek_times: np.ndarray
    may_repeat: np.ndarray
    seconds: np.ndarray
    duration: float
    grace: float
    in_order: bool
    seekable: bool

    @property
    def total(self) -> int:
        """Number of frames."""
        return len(self.of_frame)

    def starts(self, frame: int) -> list[int]:
        """Packets from which decoding may show `frame`: the two last keyframes, then the first
        packet."""
        keys = self.keys[: np.searchsorted(self.keys, self.of_frame[frame], side="right")]
        # A keyframe that is shown later than `frame` does not help: `frame` needs what precedes it.
        keys = keys[self.frame[keys] <= frame][-2:]
        return [*keys[::-1].tolist(), 0]


def read_packets(container: Any, stream: Any, path: Path) -> Packets:
    """Reads a file from front to back without decoding: headers lie about counts and times.

    Warns where the file ends before its header says. Raises VideoError where there are no frames.
    """
    columns = _read_columns(container, stream)
    if not any(columns.begins):
        raise VideoError(f"{path}: its video stream has no frames")
    pts, dts = (_times(values) for values in (columns.pts, columns.dts))
    begins = np.array(columns.begins)
    pictures = np.flatnonzero(begins)
    # What FFmpeg calls times of showing in an AVI are times of decoding.
    by_pts = container.format.name != "avi" and bool((pts[pictures] != NO_TIME).all())
    timed = by_pts or bool((dts[pictures] != NO_TIME).all())
    if timed:
        base = float(stream.time_base)
        ticks, restarts = _one_clock(
            pts if by_pts else dts, dts, base, np.array(columns.keys), _may_jump(container)
        )
    else:
        base = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        ticks, restarts = np.cumsum(begins) - 1, False
    # FFmpeg guesses times that an MPEG-PS leaves out. Two frames at one time show a wrong guess.
    in_order = by_pts and len(np.unique(ticks[pictures])) == len(pictures)
    order = np.argsort(ticks[pictures], kind="stable") if in_order else np.arange(len(pictures))
    frame = np.full(len(pts), -1)
    frame[pictures[order]] = np.arange(len(pictures))
    second = np.flatnonzero(columns.second)
    frame[second] = frame[second - 1]
    shown = np.sort(ticks[pictures])
    usual = float(np.median(np.diff(shown))) if len(shown) > 1 else 0.0
    even = np.linspace(shown[0], shown[-1], len(shown))
    if by_pts and not in_order and np.abs(shown - even).max() < 1.5 * usual:
        shown = even
    last = np.array(columns.durations)[frame == len(pictures) - 1].sum() if timed else 1
    length = last or usual
    if not length and stream.average_rate:
        length = 1 / float(stream.average_rate) / base
    keys = np.flatnonzero(columns.keys)
    packets = Packets(
        frame=frame,
        of_frame=pictures[order],
        pts=pts,
        keys=keys,
        # Containers seek by decoding time. It is never after the time of showing.
        seek_times=np.where(dts[keys] == NO_TIME, pts[keys], np.minimum(pts[keys], dts[keys])),
        may_repeat=np.array(columns.may_repeat),
        seconds=(shown - shown[0]) * base,
        duration=float((shown[-1] - shown[0] + length) * base),
        # Half a tick, but less where a tick is as long as a frame: half of it is the next frame's.
        grace=min(0.5, 0.05 * (usual or 1)) * base,
        in_order=in_order,
        seekable=in_order and not restarts,
    )
    if timed and not restarts:
        _warn_if_short(path, container, stream, packets.duration, columns.end)
    return packets


@dataclass
class _Columns:
    """The packets of a stream, a list for each property."""

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)  # holds a frame, or the first field of one
    second: list[bool] = field(default_factory=list)  # holds the second field of the last one
    may_repeat: list[bool] = field(default_factory=list)
    end: float = 0.0  # of the last packet of any stream, in seconds


def _read_columns(container: Any, stream: Any) -> _Columns:
    import av

    columns = _Columns()
    codec = stream.codec_context.codec.canonical_name
    pairs = FieldPairs(stream.codec_context.extradata) if codec == "h264" else None
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                columns.end = max(columns.end, end)
            if packet.stream_index != stream.index:
                continue
            head = memoryview(packet)[:SLICE_BYTES]
            second = pairs is not None and pairs.possible and pairs.is_second(bytes(head))
            hidden = codec == "vp8" and not head[0] & 16  # VP8's show_frame
            columns.pts.append(packet.pts)
            columns.dts.append(packet.dts)
            columns.durations.append(packet.duration or 0)
            columns.keys.append(packet.is_keyframe)
            columns.second.append(second)
            columns.begins.append(not (second or hidden or packet.is_discard))
            columns.may_repeat.append(codec == "mpeg4" and packet.size <= REPEAT_BYTES)
    except av.error.FFmpegError:
        pass  # Damage ends what can be read. What came before it counts.
    return columns


def _times(values: list[int | None]) -> np.ndarray:
    return np.array([NO_TIME if value is None else value for value in values], dtype=np.int64)


def _may_jump(container: Any) -> bool:
    """Whether the clock of this kind of container may jump ahead without a pause in the video."""
    from av.format import Flags

    return bool(container.format.flags & Flags.ts_discont.value)


def _one_clock(
    ticks: np.ndarray, dts: np.ndarray, base: float, keys: np.ndarray, may_jump: bool
) -> tuple[np.ndarray, bool]:
    """`ticks` of files put together (`cat a.ts b.ts`), each part after the one before it; and
    whether there were such parts."""
    known = dts != NO_TIME  # a time that is missing is the last known one
    clock = dts[np.maximum.accumulate(np.where(known, np.arange(len(dts)), known.argmax()))]
    gaps = np.diff(clock) * base
    # Where clocks may not jump, FFmpeg's times of decoding go back and forth in a second part.
    breaks = (gaps < -BACK) & (may_jump | keys[1:]) | (gaps > AHEAD) & may_jump
    if not breaks.any():
        return ticks, False
    ticks = ticks.copy()
    usual = int(np.median(np.diff(clock)[~breaks])) if not breaks.all() else 1
    parts = np.split(ticks, np.flatnonzero(breaks) + 1)  # views
    end = None
    for part in parts:
        times = part[part != NO_TIME]
        if end is not None and len(times):
            shift = end + usual - times.min()
            part[part != NO_TIME] += shift
            times = times + shift
        if len(times):
            end = times.max()
    return ticks, True


def _warn_if_short(path: Path, container: Any, stream: Any, duration: float, end: float) -> None:
    """Compares the `duration` of the frames and the `end` of all streams, in seconds, with the
    header."""
    # FFmpeg fills in the whole file's duration for a stream that has none.
    own = stream.duration if "mp4" in container.format.name else None
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "").strip())
    if own:
        promised, found = float(own * stream.time_base), duration
    elif tag:
        promised = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        found = duration
    elif container.duration:
        promised = container.duration / 1e6
        found = end - (container.start_time or 0) / 1e6
    else:
        return
    if found < 0.9 * promised and promised - found > 1:
        warnings.warn(
            f"{path}: ends after {found:.1f} s of the {promised:.1f} s in its header, "
            "it was cut off",
            VideoWarning,
            stacklevel=2,
        )
