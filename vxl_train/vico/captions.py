"""The clips of a video, their pictures, and the file that stores their captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vxl_model.video.decoders.base import Decoder, Samples, reading

_FIRST = b'{"key": '  # how a file of captions begins


@dataclass(frozen=True)
class Clip:
    """Part `index` of a video, in seconds from its first frame."""

    index: int
    start: float
    end: float

    def times(self, pictures: int) -> np.ndarray:
        """When to look: the middles of `pictures` equal parts, so that none lies on an edge."""
        return self.start + (np.arange(pictures) + 0.5) * (self.end - self.start) / pictures


@dataclass(frozen=True)
class Caption:
    """The caption of a clip. `damaged`: number of its pictures that could not be decoded; such a
    clip is not captioned, because pictures of other clips would replace its own."""

    clip: Clip
    text: str
    damaged: int = 0


def cut(decoder: Decoder, seconds: float) -> list[Clip]:
    """Cuts a video into clips of `seconds`. The rest at the end is a clip if it has at least half
    the length. Stretches without a new frame (slides, gaps) make no clips."""
    times = decoder.seconds(np.arange(decoder.total))
    whole = int(decoder.duration / seconds + 0.5)
    indices = np.unique((times / seconds).astype(np.int64))
    return [
        Clip(i, round(i * seconds, 3), round(min((i + 1) * seconds, decoder.duration), 3))
        for i in indices.tolist()
        if i < whole
    ]


def read_clips(
    decoder: Decoder, path: str, clips: Sequence[Clip], pictures: int, edge: int
) -> Iterator[tuple[Clip, list[Any], int]]:
    """Every clip with its pictures (RGB PIL images, at most `edge` pixels long) and how many of
    them are damaged. One walk through the file, which seeks to each; raises VideoError."""
    from PIL import Image

    times = [clip.times(pictures) for clip in clips]
    if not times:
        return
    frames = decoder.frames(Samples(np.concatenate(times), None))
    with reading(path):
        for clip in clips:
            shown, lost = [], 0
            for frame, damaged in islice(frames, pictures):
                picture = Image.fromarray(frame)
                picture.thumbnail((edge, edge), Image.Resampling.BICUBIC)
                shown.append(picture)
                lost += damaged
            yield clip, shown, lost


class CaptionFile:
    """Captions on the disk, one JSON line each, appended and synchronised one by one.

    A killed run loses only the caption it was making. Unfinished or unreadable lines are dropped,
    and their clips are captioned again. One process at a time may write.

    Attributes:
        dropped: number of unreadable lines.
    """

    def __init__(self, path: Path) -> None:
        import fcntl  # not on Windows, where the other commands should still load

        self.path = path
        self.dropped = 0
        self._lines: dict[str, dict[int, Caption]] = {}
        self._clips: dict[str, dict[int, Clip]] = {}
        self._durations: dict[str, float] = {}
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"output: another run is writing {path}") from None
        self._read()

    def clips(self, key: str) -> list[Clip] | None:
        """The clips of a video that has been opened before."""
        clips = self._clips.get(key)
        return None if clips is None else list(clips.values())

    def duration(self, key: str) -> float:
        """Seconds of such a video."""
        return self._durations[key]

    def captions(self, key: str) -> dict[int, Caption]:
        """Captions of a video by the clip's index."""
        return self._lines.get(key, {})

    def add_video(self, key: str, name: str, duration: float, clips: list[Clip]) -> None:
        """Stores how a video is cut, so that a complete one is not opened again."""
        self._clips[key] = {clip.index: clip for clip in clips}
        self._durations[key] = round(duration, 3)
        self._append(
            {
                "key": key,
                "video": name,
                "duration": self._durations[key],
                "clips": [[c.index, c.start, c.end] for c in clips],
            }
        )

    def add(self, key: str, caption: Caption) -> None:
        """Stores a caption; it is on the disk when this returns."""
        self._lines.setdefault(key, {})[caption.clip.index] = caption
        entry = {"key": key, "clip": caption.clip.index, "caption": caption.text}
        self._append({**entry, "damaged": caption.damaged} if caption.damaged else entry)

    def _append(self, entry: dict[str, Any]) -> None:
        data = memoryview(json.dumps(entry).encode() + b"\n")
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        *lines, torn = content.split(b"\n")
        for line in lines:
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                self.dropped += 1
        if not self._clips and content[: len(_FIRST)] != _FIRST[: len(content)]:
            self._file.close()
            raise ValueError(f"output: got {self.path}, which does not hold captions")
        if torn:  # or the next line would be glued to it
            self.dropped += 1
            self._file.truncate(os.fstat(self._file.fileno()).st_size - len(torn))

    def _take(self, entry: dict[str, Any]) -> None:
        key = entry["key"]
        if "clips" in entry:
            self._durations[key] = float(entry["duration"])
            self._clips[key] = {i: Clip(int(i), float(a), float(b)) for i, a, b in entry["clips"]}
            return
        clip = self._clips[key][entry["clip"]]
        if not isinstance(entry["caption"], str):
            raise TypeError
        caption = Caption(clip, entry["caption"], int(entry.get("damaged", 0)))
        self._lines.setdefault(key, {})[clip.index] = caption

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
