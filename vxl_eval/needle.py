"""A needle in a haystack of real video: a picture hidden at each depth of each length.

A video of length L is the first L - 1 frames of the haystack with the needle among them. So all
lengths share their frames, which go through the vision tower once. The decoder shares too: the
frames before a needle are read once for all lengths and needles, and a longer video with the needle
at the same place goes on from the shorter one. Nothing of this changes a result: appending to a
memory gives the bits of watching in one go.

Source: Video-XL section 4 (needle in a haystack); V-NIAH, which takes the first frames of one film.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import fail

if TYPE_CHECKING:
    from vxl_model import VideoMemory, VideoXLForConditionalGeneration

__all__ = [
    "Cell",
    "Haystack",
    "Needle",
    "accuracy",
    "contains",
    "encode_haystack",
    "hide",
    "needle_places",
    "run_alone",
    "run_grid",
]


@dataclass(frozen=True)
class Needle:
    """A picture and a question that it alone answers. The picture is a path or a PIL image."""

    picture: Any
    question: str
    answer: str


@dataclass(frozen=True)
class Cell:
    """One question about one video.

    Attributes:
        length: frames of the video, the needle among them.
        depth: of the needle, 0 to 1; None in a control.
        place: number of the frame that shows the needle; None where there is none.
        needle: index of the needle that is asked for.
        control: "", "no needle", or "needle outside" for a video with the next needle instead.
        found: the answer contains the right words.
    """

    length: int
    depth: float | None
    place: int | None
    needle: int
    control: str
    answer: str
    expected: str
    found: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Haystack:
    """Visual features of frames, `(frames, tokens, hidden)`, and how long they took."""

    features: Tensor
    seconds: float

    def __len__(self) -> int:
        return len(self.features)


@torch.no_grad()
def encode_haystack(
    model: VideoXLForConditionalGeneration,
    video: str | os.PathLike[str],
    frames: int,
    fps: float | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Haystack:
    """Runs the first `frames` sampled frames of a video through the vision tower.

    Args:
        fps: frames a second; by default the video is sampled evenly.

    Raises:
        ValueError: the video has fewer frames than that.
    """
    begin = time.perf_counter()
    processor = model.processor
    done: list[Tensor] = []
    count = 0
    pixels = processor.video_pixels(video, frames, fps, model.device, model.dtype)
    for piece in model.encode_pixels(pixels):
        one = piece.reshape(-1, model.tokens_per_frame, piece.shape[-1])
        done.append(one.to("cpu", copy=True))
        count += len(one)
        if progress is not None:
            progress(count, frames)
    if count < frames:
        fail("haystack", f"{count} frames of {os.fspath(video)}", f"{frames}, the longest video")
    return Haystack(torch.cat(done)[:frames], time.perf_counter() - begin)


@torch.no_grad()
def encode_needle(model: VideoXLForConditionalGeneration, needle: Needle) -> Tensor:
    """Features of a needle as a frame, `(tokens, hidden)`."""
    pixels = model.processor.images_to_pixels([needle.picture])
    return torch.cat(list(model.encode_pixels(pixels.to(model.device, model.dtype))))


def run_alone(
    model: VideoXLForConditionalGeneration,
    video: str | os.PathLike[str],
    frames: int,
    needle: Needle,
    cell: Cell,
    *,
    fps: float | None = None,
    ratio: Any = None,
    max_new_tokens: int = 16,
) -> str:
    """The answer of one cell from the file on, as if there were no other: decoded, encoded, read.

    Args:
        frames, fps: how the haystack was sampled, of which the video is the beginning.
    """
    processor = model.processor
    read, count = [], 0
    for batch in processor.video_frames(video, frames, fps):
        read.append(torch.as_tensor(batch))
        count += len(batch)
        if count >= cell.length:
            break
    shown = torch.cat(read)[: cell.length - (cell.place is not None)]
    if cell.place is not None:
        picture = torch.as_tensor(processor.images_to_frames([needle.picture]))
        shown = torch.cat((shown[: cell.place], picture, shown[cell.place :]))
    return _ask(model.watch(shown, ratio=ratio), needle, max_new_tokens)


def needle_places(length: int, depths: Sequence[float]) -> list[int]:
    """The frame of a video of `length` frames that shows the needle, for each depth."""
    return [round(depth * (length - 1)) for depth in depths]


def hide(haystack: Tensor, needle: Tensor, place: int, length: int) -> Tensor:
    """Features `(tokens, hidden)` of one video, the needle in frame `place`."""
    parts = [haystack[:place].flatten(0, 1), needle, haystack[place : length - 1].flatten(0, 1)]
    return torch.cat([part.to(needle) for part in parts])


def contains(answer: str, expected: str) -> bool:
    """Whether the words of `expected` come one after another in an answer, in any case."""

    def words(text: str) -> str:
        found = " ".join(re.findall(r"[^\W_]+", text.casefold()))
        return f" {found} "

    return words(expected) in words(answer)


def run_grid(
    model: VideoXLForConditionalGeneration,
    haystack: Tensor,
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    ratio: Any = None,
    max_new_tokens: int = 16,
    controls: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Cell]:
    """Asks for every needle at every depth of every length.

    Args:
        haystack: features `(frames, tokens, hidden)`, as many frames as the longest video.
        lengths: frames of the videos, the needle included.
        depths: from 0, the first frame, to 1, the last.
        controls: ask also without a needle, and with another needle in its place.

    Returns:
        The cells by length, depth and needle, then the controls.
    """
    _check(haystack, needles, lengths, depths)
    lengths = sorted(set(lengths))
    places = {length: needle_places(length, depths) for length in lengths}
    total = sum(len(set(where)) for where in places.values()) * len(needles)
    cells: list[Cell] = []
    features = [encode_needle(model, needle) for needle in needles]
    trunk = model.watch(visual_features=[], ratio=ratio)
    read = done = 0
    stops = sorted({place for where in places.values() for place in where} | {*lengths})
    for stop in stops:
        read = _read(trunk, haystack, read, stop)
        if controls and stop in lengths:
            for index, needle in enumerate(needles):
                answer = _ask(trunk, needle, max_new_tokens)
                cells.append(_cell(stop, None, None, index, "no needle", answer, needle))
        with_needle = [length for length in lengths if stop in places[length]]
        for index, shown in enumerate(features if with_needle else ()):
            memory, at = trunk.fork(), stop
            memory.append(visual_features=shown)
            for length in with_needle:
                at = _read(memory, haystack, at, length - 1)
                hidden = [
                    depth
                    for depth, place in zip(depths, places[length], strict=True)
                    if place == stop
                ]
                cells += _asked(memory, needles, index, length, hidden, stop, max_new_tokens)
                if controls and len(needles) > 1:
                    other = (index - 1) % len(needles)
                    answer = _ask(memory, needles[other], max_new_tokens)
                    kind = "needle outside"
                    cells.append(_cell(length, None, stop, other, kind, answer, needles[other]))
                done += 1
                if progress is not None:
                    progress(done, total)
    return sorted(cells, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    depth = -1.0 if cell.depth is None else cell.depth
    return cell.control, cell.length, depth, cell.place or 0, cell.needle


def _check(
    haystack: Tensor, needles: Sequence[Needle], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    if not needles:
        fail("needles", "none", "at least one")
    if not lengths or min(lengths) < 2:
        fail("lengths", list(lengths), "frames of each video, at least 2")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        fail("depths", list(depths), "numbers from 0 to 1")
    if haystack.dim() != 3 or len(haystack) < max(lengths):
        fail("haystack", f"shape {tuple(haystack.shape)}", f"({max(lengths)}, tokens, hidden)")


def _read(memory: VideoMemory, haystack: Tensor, begin: int, stop: int) -> int:
    """Appends the frames from `begin` on; returns the first one that was not read."""
    if stop > begin:
        memory.append(visual_features=haystack[begin:stop].flatten(0, 1).to(memory.model.device))
    return max(begin, stop)


def _ask(memory: VideoMemory, needle: Needle, max_new_tokens: int) -> str:
    return memory.ask(needle.question, max_new_tokens, do_sample=False)


def _asked(
    memory: VideoMemory,
    needles: Sequence[Needle],
    index: int,
    length: int,
    depths: Sequence[float],
    place: int,
    max_new_tokens: int,
) -> Iterator[Cell]:
    """The cells of one video. In a short one several depths are the same frame."""
    answer = _ask(memory, needles[index], max_new_tokens)
    for depth in depths:
        yield _cell(length, depth, place, index, "", answer, needles[index])


def _cell(
    length: int,
    depth: float | None,
    place: int | None,
    index: int,
    control: str,
    answer: str,
    needle: Needle,
) -> Cell:
    found = contains(answer, needle.answer)
    return Cell(length, depth, place, index, control, answer, needle.answer, found)


def accuracy(cells: Sequence[Cell], control: str = "") -> dict[tuple[int, float | None], float]:
    """The share of needles found, by length and depth."""
    groups: dict[tuple[int, float | None], list[bool]] = {}
    for cell in cells:
        if cell.control == control:
            groups.setdefault((cell.length, cell.depth), []).append(cell.found)
    return {key: sum(found) / len(found) for key, found in groups.items()}
