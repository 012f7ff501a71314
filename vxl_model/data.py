"""Instruction data in LLaVA's JSON: read, checked, counted, made ready for the model.

A file is a JSON list of samples, or JSONL with a sample a line::

    {"id": "7", "video": "clips/7.mp4",
     "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                       {"from": "gpt", "value": "A dog jumps."}]}

- `image` is a path or a list of paths, `video` a path; without either the sample is text alone.
  Paths are relative to the file's folder, or to the root that is given. One picture is cut into
  tiles, several are like a video of as many frames, as in the released model.
- `conversations` alternates "human" and "gpt" ("user" and "assistant" do too), behind one
  "system" turn or none. `<image>` and `<video>` are taken out wherever they stand in a human turn;
  the visual part, one for a sample, goes to the front of the first turn that has one, else of the
  first turn. Only the assistant's words and the `<|im_end|>` behind them are supervised.
- `width`, `height` (pictures), `frames` and `duration` (seconds, videos) are optional; they spare
  a look into the file when lengths are estimated.

A sample that cannot be used is a `BadSample` of one of `KINDS`; nothing else is lost with it.
"""

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
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ._decoders import VideoError, header_seconds
from .processing import IMAGE_TOKEN, ImageError, VideoXLProcessor, open_image
from .ratios import RatioPlan, WindowRatios
from .video import open_video

__all__ = [
    "KINDS",
    "BadSample",
    "BadSampleError",
    "BadSamples",
    "Sample",
    "TrainingData",
    "TrainingOrder",
    "VisualShape",
    "collate",
    "conversation_ids",
    "read_samples",
]

MARKERS = ("<image>", "<video>")
SYSTEM = "You are a helpful assistant."
IGNORED = -100
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_CHARACTERS_A_TOKEN = 4  # of English text, roughly; only lengths' order matters
_MOST = 1e12  # of a width, a number of frames, seconds
_MEGABATCH = 50  # batches whose samples are sorted by length together

KINDS = (
    "broken line",
    "bad sample",
    "empty answer",
    "control token",
    "missing file",
    "unreadable image",
    "undecodable video",
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
    """A sample as its file has it, checked.

    Attributes:
        id: its "id", or the file's name and its place in it.
        kind: "image", "images", "video" or "text".
        files: what it shows.
        turns: (role, text) with markers taken out.
        visual_turn: which turn the visual part stands in front of.
        about: `width`, `height`, `frames`, `duration`, as far as given.
        length: tokens, estimated.
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
    """What a model makes of frames.

    Attributes:
        window: raw tokens of a window.
        tokens_per_frame: of a frame or tile.
        ratios: raw tokens per VST to draw from.
        frames: most frames of a video, or pictures of a sample; more are thinned out evenly.
        fps: frames a second of a video, as long as that gives no more than `frames`.
    """

    window: int
    tokens_per_frame: int
    ratios: tuple[int, ...]
    frames: int = 128
    fps: float = 1.0

    def check(self) -> None:
        """ValueError where a window can occur that no ratio divides."""
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
        probe: look for the files, and into their headers for the lengths of videos and sizes of
            pictures; no frame is decoded. Without, `missing file` is found when it is needed, and
            videos count as `shape.frames` frames.

    Raises:
        ValueError, OSError: a data file cannot be read, or is a list that is no JSON.
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
                sample = _parse(record, place, base, control)
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
    """(number, record) of a file: its place in a list or its line; a ValueError as the record of
    a line that is no JSON."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(64).lstrip("\ufeff \t\r\n")
        file.seek(0)
        if head.startswith("["):
            try:
                records = json.loads(file.read().lstrip("\ufeff"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON ({error})") from None
            yield from enumerate(records)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.lstrip("\ufeff"))
            except ValueError as error:
                record = error
            yield number, record


def _parse(record: Any, place: str, root: Path, control: Sequence[str]) -> Sample:
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
            if value > _MOST or (value < 1 and key != "duration"):  # JSON has Infinity, and 0.5
                least = 0 if key == "duration" else 1
                raise bad("bad sample", f"{key}: got {value}, expected {least} to {_MOST:.0e}")
            about.append((key, float(value)))
    return Sample(name, kind, files, turns, visual_turn, tuple(about))


def _encodable(text: str, errors: str = "strict") -> bool:
    """Without lone surrogates, which JSON can hold and no tokenizer or file system takes."""
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
    """Tokens of a sample, VSTs included, from what it says and its files' headers."""
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
    from PIL import Image

    try:
        with Image.open(sample.files[0]) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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


# -- words --------------------------------------------------------------------------------------


def conversation_ids(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """input_ids and labels of a sample, one -200 where the visual part stands; -100 where nothing
    is supervised.

    What is not supervised is tokenized in one piece from control token to answer, and an answer
    by itself: the ids are those that inference sees and writes.

    Source: the released model's prompt (`processing.PROMPT`).
    """
    ids: list[int] = []
    labels: list[int] = []
    open_text = ""

    def close(supervised: str = "") -> None:
        nonlocal open_text
        for text, learned in ((open_text, False), (supervised, True)):
            if text:
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids.extend(new)
                labels.extend(new if learned else [IGNORED] * len(new))
        open_text = ""

    if sample.turns[0][0] != "system":
        open_text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for i, (role, text) in enumerate(sample.turns):
        open_text += f"<|im_start|>{role}\n"
        if role == "assistant":
            close(f"{text}<|im_end|>")
            open_text = "\n"
            continue
        if i == sample.visual_turn:
            close()
            ids.append(IMAGE_TOKEN)
            labels.append(IGNORED)
            open_text = "\n"
        open_text += f"{text}<|im_end|>\n"
    return ids, labels


# -- the data set -------------------------------------------------------------------------------


class TrainingData(Dataset):
    """Samples as the model trains on them, decoded when they are asked for.

    Key `epoch * len(samples) + index` is a sample in an epoch: everything that is drawn depends
    on seed, epoch and index alone, so a resumed run sees what the first would have seen. A sample
    that cannot be decoded is replaced by the next one in order that can; that too depends on
    nothing else.

    Args:
        samples: from `read_samples`.
        processor: of the checkpoint, with a tokenizer.
        shape: what the model makes of frames.
        seed: of the ratios.
        max_text_tokens: longer texts are bad samples ("too long").
        stop: a bad sample ends the run.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: VideoXLProcessor,
        shape: VisualShape,
        *,
        seed: int = 42,
        max_text_tokens: int = 8192,
        stop: bool = False,
    ) -> None:
        self.samples, self.processor, self.shape = list(samples), processor, shape
        self.seed, self.max_text_tokens, self.stop = seed, max_text_tokens, stop
        self._bad: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists), `frames` uint8 `(n, size, size, 3)` or None,
        `image_size`, `ratio`, and `bad`, the samples this one stands for."""
        epoch, start = divmod(key, len(self.samples))
        bad: list[BadSample] = []
        for step in range(len(self.samples)):
            index = (start + step) % len(self.samples)
            if index not in self._bad:
                try:
                    return {**self._read(index, epoch), "bad": bad, "stop": False}
                except BadSampleError as error:
                    self._bad[index] = error.bad
            bad.append(self._bad[index])
            if self.stop:
                break
        return {"bad": bad, "stop": True}

    def _read(self, index: int, epoch: int) -> dict[str, Any]:
        sample = self.samples[index]
        ids, labels = conversation_ids(sample, self.processor.tokenizer)
        if len(ids) > self.max_text_tokens:
            text = f"{len(ids)} tokens of text, more than {self.max_text_tokens}"
            raise BadSampleError(BadSample("too long", sample.id, text))
        frames, image_size = self._frames(sample)
        ratio = None
        if frames is not None:
            shown = len(frames) - (1 if image_size is not None and len(frames) > 1 else 0)
            plan = RatioPlan(list(self.shape.ratios), [self.seed, epoch, index])
            ratio = plan.windows(shown * self.shape.tokens_per_frame, self.shape.window)
        return {
            "input_ids": ids,
            "labels": labels,
            "frames": frames,
            "image_size": image_size,
            "ratio": ratio,
        }

    def _frames(self, sample: Sample) -> tuple[Tensor | None, tuple[int, int] | None]:
        files, most = sample.files, self.shape.frames
        try:
            if sample.kind == "video":
                reader = open_video(
                    files[0], frames=most, fps=self.shape.fps, size=self.processor.size
                )
                return torch.from_numpy(np.concatenate(list(reader))), None
            if sample.kind == "images":
                if len(files) > most:
                    files = tuple(files[int(i)] for i in np.linspace(0, len(files) - 1, most))
                return torch.from_numpy(self.processor.images_to_frames(files)), None
            if sample.kind == "image":
                picture = open_image(files[0])
                return torch.from_numpy(self.processor.image_to_frames(picture)), picture.size
            return None, None
        except (VideoError, ImageError, OSError) as error:
            missing = [path for path in files if not os.path.isfile(path)]
            if missing:
                raise BadSampleError(BadSample("missing file", sample.id, missing[0])) from None
            kind = "undecodable video" if sample.kind == "video" else "unreadable image"
            raise BadSampleError(BadSample(kind, sample.id, str(error))) from None


class TrainingOrder(Sampler):
    """Keys of `TrainingData`, epoch by epoch.

    Args:
        lengths: of the samples, estimated.
        batch: samples of a step, over all processes.
        seed: the order depends on it and the epoch alone.
        by_length: steps hold samples of similar lengths, so that no process waits for another
            with a longer video and little is padding.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, by_length: bool) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch, self.seed, self.by_length = batch, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        if self.by_length:
            order = self._grouped(order, generator)
        offset = self.epoch * len(order)
        return iter([offset + int(i) for i in order])

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        size = self.batch * _MEGABATCH
        pieces = [order[i : i + size] for i in range(0, len(order), size)]
        order = np.concatenate([p[np.argsort(-self.lengths[p], kind="stable")] for p in pieces])
        full = len(order) // self.batch * self.batch
        steps = order[:full].reshape(-1, self.batch)
        steps = steps[generator.permutation(len(steps))]
        if len(steps):  # the longest first: if memory does not suffice, that is said at once
            longest = int(np.argmax(self.lengths[steps].max(axis=1)))
            steps = np.concatenate([steps[longest : longest + 1], np.delete(steps, longest, 0)])
        return np.concatenate([steps.reshape(-1), order[full:]])


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `TrainingData`'s items, padded at the end."""
    bad = [x for item in items for x in item["bad"]]
    if any(item["stop"] for item in items):  # HF counts labels before the Trainer can stop
        return {"bad": bad, "stop": True, "labels": torch.full((1, 1), IGNORED)}
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        ids[row, :length] = torch.tensor(item["input_ids"])
        labels[row, :length] = torch.tensor(item["labels"])
        mask[row, :length] = 1
    ratios: list[WindowRatios | None] = [item["ratio"] for item in items]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "ratio": ratios,
        "frames": [item["frames"] for item in items],
        "image_sizes": [item["image_size"] for item in items],
        "bad": bad,
        "stop": False,
    }
