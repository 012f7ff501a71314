"""What a task shows, as a memory of the model: a video, a folder of frames, pictures, nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import fail

if TYPE_CHECKING:
    from vxl_model import VideoMemory, VideoXLForConditionalGeneration

__all__ = ["Sampling", "Watcher", "is_path", "visual_identity"]

_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Sampling:
    """Which frames are shown, and how much is kept of them.

    Attributes:
        frames, fps: as `watch` takes them.
        ratio: visual tokens per cached token; a list to draw from; None for the model's own.
        repeat_frames: a video of fewer than `frames` frames is shown `frames` times all the same,
            with frames repeated, as the published evaluation does.
    """

    frames: int | None = None
    fps: float | None = None
    ratio: int | list[int] | None = None
    repeat_frames: bool = False

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            fail("frames", self.frames, "at least 1")
        if self.fps is not None and self.fps <= 0:
            fail("fps", self.fps, "more than 0")
        if self.repeat_frames and (self.frames is None or self.fps is not None):
            fail("repeat_frames", "True with other sampling", "frames, and no fps")


def is_path(visual: Any) -> bool:
    return isinstance(visual, (str, os.PathLike))


def visual_identity(visuals: Sequence[Any]) -> list[Any] | None:
    """What tells one visual input of files from another, as JSON takes it: path, bytes and time
    of change. None where it is not made of files alone."""
    if not all(is_path(visual) for visual in visuals):
        return None
    identity: list[Any] = []
    for visual in visuals:
        path = os.fspath(visual)
        found = os.stat(path) if os.path.exists(path) else None
        identity.append([path, found.st_size, found.st_mtime_ns] if found else [path])
    return identity


class Watcher:
    """Keeps the memory of the visual input that was asked for last, so that all questions about
    it in a row cost one `watch`.

    Attributes:
        watched: how often the model has watched something.
    """

    def __init__(self, model: VideoXLForConditionalGeneration, sampling: Sampling) -> None:
        self.model, self.sampling, self.watched = model, sampling, 0
        self._key: Hashable = None
        self._memory: VideoMemory | None = None

    def memory(self, key: Hashable, show: Callable[[], Sequence[Any]]) -> VideoMemory:
        """The memory of what `show` returns, which `key` names.

        `show` returns nothing for text alone; one path of a video, a folder of frames or a
        picture; one picture; several pictures, which are read like frames.
        """
        if self._memory is None or key != self._key:
            self._memory = None  # its cache is free before the next one is made
            self._memory, self._key = self._watch(list(show())), key
            self.watched += 1
        return self._memory

    def _watch(self, visuals: list[Any]) -> VideoMemory:
        sampling, processor = self.sampling, self.model.processor
        if not visuals:
            return self.model.watch(visual_features=[], ratio=sampling.ratio)
        for visual in visuals:
            if not is_path(visual) and not hasattr(visual, "size"):
                fail("visual", type(visual).__name__, "a path or a picture")
        if len(visuals) > 1:
            return self._watch_frames(visuals)
        visual = visuals[0]
        if is_path(visual):
            if os.path.isdir(visual):
                return self._watch_frames(visual)
            if not os.fspath(visual).lower().endswith(_PICTURES):
                return self._watch_frames(visual, sampling.fps)
        pixels = processor.image_to_pixels(visual)
        size = _picture_size(visual)
        return self.model.watch(pixel_values=pixels, image_sizes=size, ratio=sampling.ratio)

    def _watch_frames(self, video: Any, fps: float | None = None) -> VideoMemory:
        sampling = self.sampling
        if not sampling.repeat_frames:
            return self.model.watch(video, frames=sampling.frames, fps=fps, ratio=sampling.ratio)
        batches = self.model.processor.video_frames(video, sampling.frames)
        frames = np.concatenate([np.asarray(batch) for batch in batches])
        assert sampling.frames is not None
        if len(frames) < sampling.frames:
            frames = frames[np.linspace(0, len(frames) - 1, sampling.frames).astype(int)]
        return self.model.watch(frames, ratio=sampling.ratio)


def _picture_size(picture: Any) -> tuple[int, int]:
    from vxl_model.inputs.images import picture_size

    return picture_size(picture) if is_path(picture) else picture.size
