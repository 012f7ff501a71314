"""Decoding with PyAV: frames found by their time stamps, corrupt packets counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .base import MAX_PIXELS, SEEK_GAP, TEXT_ART, Samples, VideoError, _warn_if_short, _word


class PyAvDecoder:
    """PyAV: FFmpeg with its own copy of the libraries in the wheel."""

    name = "pyav"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._errors = 0
        with self._open() as container:
            stream = self._video_stream(container)
            self._scan(container, stream)
        from av.video.reformatter import VideoReformatter

        with self._open() as container:
            first = next(self._decoded(container, self._video_stream(container)), None)
            if first is None:
                raise VideoError(f"{path}: none of its {self.total} video packets could be decoded")
            # Asked of one frame only: a frame whose side data were looked at is in a cycle, which
            # keeps it until Python's collector runs. 128 frames of 4K were 1.3 GB.
            self._matrix = _display_matrix(first[1])
            shown = _upright(first[1], VideoReformatter(), self._matrix)
            self.height, self.width = shown.shape[:2]

    def _open(self) -> Any:
        import av

        options: dict[str, Any] = {}
        if hasattr(av.container.Container, "metadata_errors"):  # from 19 on tags are never refused
            options["metadata_errors"] = "replace"
        try:
            # "file:" keeps a colon in a name from being read as a protocol, and the list keeps
            # playlists from reaching out to the network.
            return av.open(
                f"file:{self.path.absolute()}",
                container_options={"protocol_whitelist": "file,crypto,data"},
                **options,
            )
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise VideoError(
                f"{self.path}: not a video that FFmpeg reads ({_word(error)})"
            ) from None

    def _video_stream(self, container: Any) -> Any:
        if container.format.name in TEXT_ART:
            raise VideoError(f"{self.path}: a text or data file, not a video")
        import av

        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            others = sorted({s.type for s in container.streams if s.type != "video"})
            cover_art = " besides cover art" if container.streams.video else ""
            held = f"only {' and '.join(others)}" if others else "no streams"
            raise VideoError(f"{self.path}: no video stream{cover_art} ({held})")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{self.path}: FFmpeg here has no decoder for its video stream")
        context = stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise VideoError(
                f"{self.path}: frames of {context.width} x {context.height}, "
                f"more than {MAX_PIXELS} pixels"
            )
        stream.thread_type = "AUTO"
        return stream

    def _scan(self, container: Any, stream: Any) -> None:
        """Times of all frames, from the packets alone: no decoding, and one number a frame."""
        import av

        pts, dts, keys, last = [], [], [], 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                pts.append(packet.pts)
                dts.append(packet.dts)
                keys.append(packet.is_keyframe)
                last = packet.duration or last
        except av.error.FFmpegError:
            pass  # Damage ends what can be read; what came before it counts.
        if not pts:
            raise VideoError(f"{self.path}: its video stream has no frames")
        # AVI holds times of decoding alone (what FFmpeg calls pts there is in the same order),
        # bare streams none: then the n-th frame that comes out is the n-th shown.
        self._counted = container.format.name == "avi" or None in pts
        if self._counted and None in dts:
            self._base = 1 / float(stream.average_rate or stream.guessed_rate or 25)
            ticks, last = np.arange(len(pts)), 1
        else:
            self._base = float(stream.time_base)
            ticks = np.array(dts if self._counted else pts, dtype=np.int64)
        self._ticks = np.sort(ticks)
        keyed = np.flatnonzero(keys)
        keyed = keyed[np.argsort(ticks[keyed], kind="stable")]
        self._keys = ticks[keyed]
        # Containers seek by decoding time, which for a keyframe is never after its showing.
        decode = [ticks[i] if dts[i] is None else min(ticks[i], dts[i]) for i in keyed]
        self._seek_ticks = np.array(decode, dtype=np.int64)
        self.total = len(ticks)
        gaps = np.diff(self._ticks)
        shown = last * self._base or (float(np.median(gaps)) * self._base if len(gaps) else 0.0)
        if not shown and stream.average_rate:
            shown = 1 / float(stream.average_rate)
        self.duration = float((self._ticks[-1] - self._ticks[0]) * self._base) + shown
        declared = 0.0
        if stream.duration and not self._counted:
            declared = float(stream.duration * stream.time_base)
        elif container.duration and len(container.streams) == 1:
            declared = container.duration / 1e6
        _warn_if_short(self.path, self.duration, declared)

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        return (self._ticks[indices] - self._ticks[0]) * self._base

    def _indices(self, samples: Samples) -> np.ndarray:
        if samples.indices is not None:
            return samples.indices
        # Half a tick of grace for times that are no multiple of the clock's; less where a tick is
        # as long as a frame (AVI), half of which would be the next one.
        frame = float(np.median(np.diff(self._ticks))) if self.total > 1 else 1.0
        ticks = self._ticks[0] + np.floor(samples.seconds / self._base + min(0.5, 0.05 * frame))
        return np.maximum(np.searchsorted(self._ticks, ticks, side="right") - 1, 0)

    def frames(self, samples: Samples) -> Iterator[np.ndarray]:
        from av.video.reformatter import VideoReformatter

        walk, reformatter = _Walk(self), VideoReformatter()
        shown: tuple[int, np.ndarray] | None = None
        try:
            for index in self._indices(samples).tolist():
                tick, frame = walk.on_show(index)
                self.damaged = walk.damaged
                if shown is None or shown[0] != tick:
                    shown = (tick, _upright(frame, reformatter, self._matrix))
                yield shown[1]
        finally:
            walk.close()

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """`(tick, frame)` from where the container stands, damage skipped."""
        import av

        count = 0
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                packet = None  # The rest of the file cannot be read: give out what is decoded.
            try:
                decoded = stream.codec_context.decode(packet)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                self._errors += 1
                decoded = []
            for frame in decoded:
                if self._counted:
                    yield int(self._ticks[min(count, self.total - 1)]), frame
                elif frame.pts is not None:
                    yield frame.pts, frame
                count += 1
            if packet is None or packet.size == 0:
                return


class _Walk:
    """Moves forward through a video, seeking where that skips frames."""

    def __init__(self, decoder: PyAvDecoder) -> None:
        self.decoder = decoder
        self.damaged = 0
        self._at = -1  # index up to which frames have been passed
        self._now: tuple[int, Any] | None = None
        self._next: tuple[int, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self._container = self.decoder._open()
        self._stream = self.decoder._video_stream(self._container)
        self._frames = self.decoder._decoded(self._container, self._stream)

    def close(self) -> None:
        self._frames.close()  # type: ignore[attr-defined]
        self._container.close()

    def on_show(self, index: int) -> tuple[int, Any]:
        """The frame with the latest time at or before that of frame `index`; where damage left
        none, the first one after it."""
        ticks, keys = self.decoder._ticks, self.decoder._keys
        tick = int(ticks[index])
        if not self.decoder._counted and index - self._at > SEEK_GAP:
            key = int(np.searchsorted(keys, tick, side="right")) - 1
            if key > 0 and keys[key] > ticks[max(self._at, 0)]:
                # A keyframe that is damaged shows nothing at this time: try the one before it.
                for start in range(key, max(key - 2, 0), -1):
                    if self._seek(start) and self._forward(tick):
                        break
                else:
                    self._container.close()
                    self._now = self._next = None
                    self._begin()
        self._forward(tick)
        self._at = index
        shown = self._now or self._next
        if shown is None:
            raise VideoError(f"{self.decoder.path}: nothing could be decoded")
        self.damaged += self.decoder._errors > 0 and shown[0] != tick
        return shown

    def _forward(self, tick: int) -> bool:
        """Decodes until the frame at `tick` is known; false where all frames are later."""
        while self._now is None or self._now[0] < tick:
            if self._next is None:
                self._next = next(self._frames, None)
            if self._next is None or self._next[0] > tick:
                break
            self._now, self._next = self._next, None
        return self._now is not None

    def _seek(self, key: int) -> bool:
        import av

        try:
            self._container.seek(int(self.decoder._seek_ticks[key]), stream=self._stream)
        except av.error.FFmpegError:
            return False
        self._now = self._next = None
        self._frames = self.decoder._decoded(self._container, self._stream)
        return True


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """How the container says frames are shown: the pixel (x, y) at (a x + c y, b x + d y), up to
    a shift, as (a, b, c, d)."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _upright(frame: Any, reformatter: Any, matrix: tuple[int, ...] | None) -> np.ndarray:
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
