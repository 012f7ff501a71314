"""Reads samples from JSON files; each is checked once, and bad ones are counted."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vxl_model.inputs.images import ImageError, picture_size
from vxl_model.inputs.processing import VideoXLProcessor
from vxl_model.streaming.ratios import RatioPlan
from vxl_model.video.decoders.base import VideoError
from vxl_model.video.decoders.choose import header_seconds

__all__ = [
    "KINDS",
    "SAMPLE_KINDS",
    "BadSample",
    "BadSampleError",
    "BadSamples",
    "Sample",
    "VisualShape",
    "check_record",
    "parse_json",
    "read_samples",
]

MARKERS = ("<image>", "<video>")
SAMPLE_KINDS = ("image", "images", "video", "text")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = {  # by a file's first bytes
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"\xfd7zXZ": "xz data",
    b"BZh": "bzip2 data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_CHARACTERS_A_TOKEN = 4  # of English text, roughly; only the order of lengths matters
_MAX = 1e12  # upper limit of a width, a number of frames, seconds

KINDS = (
    "broken line",
    "bad sample",
    "empty answer",
    "control token",
    "missing file",
    "unreadable image",
    "undecodable video",
    "unknown text",
    "too long",
)


class BadSample(NamedTuple):
    """Why a sample cannot be used: one of `KINDS`, its id, and one line more."""

    kind: str
    id: str
    message: str

    def __str__(self) -> str:
        return f"sample {self.id}: {self.kind}: {self.message}"


class BadSampleError(ValueError):
    """A sample that cannot be used."""

    def __init__(self, bad: BadSample) -> None:
        super().__init__(str(bad))
        self.bad = bad

    @classmethod
    def of(cls, kind: str, id: str, message: str) -> BadSampleError:
        return cls(BadSample(kind, id, message))


class BadSamples:
    """Bad samples, each once, in the order they were found."""

    def __init__(self, found: Iterable[BadSample] = ()) -> None:
        self._found: dict[tuple[str, str], BadSample] = {}
        for bad in found:
            self.add(bad)

    def add(self, bad: BadSample) -> bool:
        """Whether it is new."""
        return self._found.setdefault((bad.kind, bad.id), bad) is bad

    def __iter__(self) -> Iterator[BadSample]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def by_kind(self) -> dict[str, int]:
        counts = Counter(bad.kind for bad in self)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}


@dataclass(frozen=True)
class Sample:
    """A checked sample.

    Attributes:
        id: its "id", or the file's name and its place in it.
        kind: "image", "images", "video" or "text".
        files: its pictures or video.
        turns: (role, text), without markers.
        visual_turn: index of the turn that the visual part precedes.
        about: `width`, `height`, `frames`, `duration`, where given.
        length: estimated tokens.
    """

    id: str
    kind: str
    files: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    visual_turn: int | None
    about: tuple[tuple[str, float], ...] = ()
    length: int = 0


@dataclass(frozen=True)
class VisualShape:
    """How frames become tokens.

    Attributes:
        window: raw tokens of a window.
        tokens_per_frame: tokens of a frame or tile.
        ratios: raw tokens per VST; one is drawn for each window.
        frames: the most frames of a video or pictures of a sample; more are thinned out evenly.
        fps: frames a second of a video, unless that gives more than `frames`.
    """

    window: int
    tokens_per_frame: int
    ratios: tuple[int, ...]
    frames: int = 128
    fps: float = 1.0

    def check(self) -> None:
        """Raises ValueError if a window can occur that no ratio divides."""
        rests = {self.window}
        for n in range(1, self.frames + 1):
            rests.add(n * self.tokens_per_frame % self.window or self.window)
        for size in sorted(rests):
            RatioPlan(list(self.ratios)).next(size)


# -- reading ------------------------------------------------------------------------------------


def read_samples(
    paths: Sequence[str | os.PathLike[str]],
    processor: VideoXLProcessor,
    shape: VisualShape,
    root: str | os.PathLike[str] | None = None,
    probe: bool = True,
) -> tuple[list[Sample], BadSamples]:
    """All usable samples of some files, in order, and the bad ones.

    Args:
        root: what paths in the files are relative to; by default each file's folder.
        probe: check that files exist, and read their headers for the lengths of videos and sizes
            of pictures; no frame is decoded. If False, a missing file is found on first use, and
            videos count as `shape.frames` frames.

    Raises:
        ValueError, OSError: a data file cannot be read, or is a damaged list.
    """
    bad, samples = BadSamples(), []
    control = sorted(processor.control_tokens())
    seen: Counter[str] = Counter()
    files = [Path(path) for path in paths]
    names = Counter(path.name for path in files)

    def unique(name: str, place: str) -> str:
        seen[name] += 1  # some published files repeat an id
        return f"{name} ({place})" if seen[name] > 1 else name

    for path in files:
        base = Path(root) if root is not None else path.parent
        for number, record in _records(path):
            place = f"{path.name if names[path.name] == 1 else path}:{number}"
            try:
                sample = check_record(record, place, base, control)
                samples.append(replace(sample, id=unique(sample.id, place)))
            except BadSampleError as error:
                bad.add(error.bad._replace(id=unique(error.bad.id, place)))

    def measured(sample: Sample) -> Sample | BadSample:
        try:
            return replace(sample, length=_length(sample, processor, shape, probe))
        except BadSampleError as error:
            return error.bad

    with ThreadPoolExecutor(8) as pool:  # headers wait for disks
        results = list(pool.map(measured, samples, chunksize=64))
    for result in results:
        if isinstance(result, BadSample):
            bad.add(result)
    return [x for x in results if isinstance(x, Sample)], bad


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """`(number, record)` of a file: its index in a list or its line, counted from 1. A line that
    is not JSON in UTF-8 gives a ValueError as its record.

    Raises:
        ValueError: the file is compressed or UTF-16, or a list that is not JSON in UTF-8.
    """
    with path.open("rb") as file:
        head = file.read(64)
        for magic, name in _OTHER_FORMATS.items():
            if head.startswith(magic):
                raise ValueError(f"{path}: got {name}, expected JSON or JSONL in UTF-8")
        file.seek(0)
        if head.removeprefix(_BOM).lstrip().startswith(b"["):
            records = parse_json(file.read())
            if isinstance(records, ValueError):
                raise ValueError(f"{path}: {records}")
            yield from enumerate(records)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, parse_json(line)


def parse_json(data: bytes) -> Any:
    """The JSON value of some bytes, or a ValueError that says why there is none."""
    try:
        return json.loads(data.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {data[error.start]:#04x} at {error.start})")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    except RecursionError:
        return ValueError("not usable JSON (nested too deeply)")


def check_record(record: Any, place: str, root: Path, control: Sequence[str] = ()) -> Sample:
    """A record of a data file as a sample; no file is opened.

    Args:
        place: its id, where it has none of its own.
        root: what its paths are relative to.
        control: tokens that must not be in a text.

    Raises:
        BadSampleError: the record cannot be used.
    """

    def bad(kind: str, message: str) -> BadSampleError:
        return BadSampleError(BadSample(kind, name, message))

    name = place
    if isinstance(record, ValueError):
        raise bad("broken line", str(record))
    if not isinstance(record, dict):
        raise bad("bad sample", f"got a {type(record).__name__}, expected an object")
    if isinstance(record.get("id"), str | int):
        name = str(record["id"])
    kind, files = _files(record, root, bad)
    turns, visual_turn = _turns(record.get("conversations"), kind != "text", bad)
    for _, text in turns:
        for token in control:
            if token in text:
                raise bad("control token", f"{token!r} in its text")
        if not _encodable(text):
            raise bad("bad sample", f"got the text {text[:40]!a}, expected Unicode")
    about = []
    for key in ("width", "height", "frames", "duration"):
        value = record.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            if value > _MAX or (value < 1 and key != "duration"):  # JSON has Infinity, and 0.5
                least = 0 if key == "duration" else 1
                raise bad("bad sample", f"{key}: got {value}, expected {least} to {_MAX:.0e}")
            about.append((key, float(value)))
    return Sample(name, kind, files, turns, visual_turn, tuple(about))


def _encodable(text: str, errors: str = "strict") -> bool:
    """Whether a text has no lone surrogates: JSON allows them, tokenizers and file systems do
    not."""
    try:
        text.encode(errors=errors)
    except UnicodeEncodeError:
        return False
    return True


def _files(record: dict, root: Path, bad: Any) -> tuple[str, tuple[str, ...]]:
    given = [key for key in ("image", "video") if record.get(key)]
    if not given:
        return "text", ()
    if len(given) == 2:
        raise bad("bad sample", "got image and video, expected one of them")
    value = record[given[0]]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
        raise bad("bad sample", f"{given[0]}: got {value!r}, expected a path or a list of paths")
    for path in values:
        if "\0" in path or not _encodable(path, "surrogateescape"):
            raise bad("bad sample", f"{given[0]}: got {path!a}, expected a path")
    files = tuple(str(root / x) for x in values)
    if given[0] == "video":
        if len(files) > 1:
            raise bad("bad sample", f"video: got {len(files)} paths, expected one")
        return "video", files
    return ("image" if len(files) == 1 else "images"), files


def _turns(
    conversation: Any, visual: bool, bad: Any
) -> tuple[tuple[tuple[str, str], ...], int | None]:
    if not isinstance(conversation, list) or not conversation:
        raise bad("bad sample", "conversations: got none, expected a list of turns")
    turns: list[tuple[str, str]] = []
    marked: list[int] = []
    for turn in conversation:
        role = (
            _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        )
        text = turn.get("value", turn.get("content")) if role else None
        if role == "assistant" and (text is None or text == ""):
            text = ""
        if role is None or not isinstance(text, str):
            raise bad("bad sample", f'got the turn {turn!r}, expected "from" and "value"')
        if role == "user" and any(marker in text for marker in MARKERS):
            marked.append(len(turns))
            for marker in MARKERS:
                text = text.replace(marker, "")
        turns.append((role, text.strip()))
    spoken = turns[1:] if turns[0][0] == "system" else turns
    wanted = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if not spoken or len(spoken) % 2 or [role for role, _ in spoken] != wanted:
        shown = ", ".join(role for role, _ in turns[:6])
        raise bad("bad sample", f"turns: got {shown}, expected human and gpt in turns")
    if not all(text for role, text in spoken if role == "assistant"):
        raise bad("empty answer", "a gpt turn without text")
    if marked and not visual:
        raise bad("bad sample", f"a marker ({' or '.join(MARKERS)}) without image or video")
    first = len(turns) - len(spoken)
    return tuple(turns), (marked[0] if marked else first) if visual else None


def _length(sample: Sample, processor: VideoXLProcessor, shape: VisualShape, probe: bool) -> int:
    """Estimated tokens of a sample, VSTs included, from its own data and its files' headers."""
    about = dict(sample.about)
    for path in sample.files if probe else ():
        if not os.path.isfile(path):
            raise BadSampleError(BadSample("missing file", sample.id, path))
    frames = 0.0
    if sample.kind == "images":
        frames = min(len(sample.files), shape.frames)
    elif sample.kind == "image":
        frames = 1
        if processor.grid_pinpoints:
            if "width" in about and "height" in about:
                size = int(about["width"]), int(about["height"])
            else:
                size = _picture_size(sample) if probe else (processor.size, processor.size)
            width, height = processor.best_resolution(size)
            frames = (width // processor.size) * (height // processor.size)
    elif sample.kind == "video":
        frames = _video_frames(sample, about, shape, probe)
    characters = sum(len(text) for _, text in sample.turns)
    visual = frames * shape.tokens_per_frame * (1 + 1 / np.mean(shape.ratios))
    return int(visual) + characters // _CHARACTERS_A_TOKEN


def _picture_size(sample: Sample) -> tuple[int, int]:
    try:
        return picture_size(sample.files[0])
    except ImageError as error:
        raise BadSampleError(BadSample("unreadable image", sample.id, str(error))) from None


def _video_frames(
    sample: Sample, about: dict[str, float], shape: VisualShape, probe: bool
) -> float:
    if "frames" in about:
        return min(about["frames"], shape.frames)
    seconds = about.get("duration")
    if seconds is None and probe:
        try:
            seconds = header_seconds(sample.files[0])
        except VideoError as error:
            raise BadSampleError(BadSample("undecodable video", sample.id, str(error))) from None
    if seconds is None:
        return shape.frames
    return max(1, math.ceil(min(seconds * shape.fps, shape.frames)))  # a header can say inf
