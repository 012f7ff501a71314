"""Needles as samples for training, whose right answers `eval_answers` counts."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vxl_kernels.files import atomic_write

from .arguments import fail
from .needle import Needle, needle_places

if TYPE_CHECKING:
    from vxl_model.video.reader import VideoReader

__all__ = ["open_haystack", "write_samples"]

_SIZE = 336  # edge of the pictures, that of the released model's frames


def open_haystack(
    video: str | os.PathLike[str], frames: int, fps: float | None = None
) -> VideoReader:
    """The first `frames` sampled frames of a video file, none of which is decoded yet.

    Raises:
        ValueError: it is not a video, or has fewer frames.
    """
    from vxl_model.video.decoders.base import VideoWarning
    from vxl_model.video.reader import open_video

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # too few frames are an error here
        reader = open_video(video, frames, fps, size=_SIZE)
    if reader.num_frames < frames:
        got = f"{reader.num_frames} frames of {os.fspath(video)}"
        fail("--haystack", got, f"{frames}, the longest of --lengths")
    return reader


def write_samples(
    video: str | os.PathLike[str],
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float],
    folder: str | os.PathLike[str],
    fps: float | None = None,
) -> Path:
    """Writes the frames of a haystack and the needles as pictures, and `samples.json` with a
    sample for each length, depth and needle. Returns that file.

    A sample is a list of pictures, which is read like a video. Training shows at most `frames` of
    them, 128 by default.

    Raises:
        ValueError: the video has fewer frames than the longest length, or `folder` holds files.
    """
    from PIL import Image

    from vxl_model.inputs.images import open_image

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        fail("--samples", os.fspath(folder), "an empty folder, or none yet")
    batches = open_haystack(video, max(lengths), fps)
    folder.mkdir(parents=True, exist_ok=True)
    frames: list[str] = []
    try:
        for batch in batches:
            for frame in batch:
                frames.append(f"frame-{len(frames):06}.png")
                Image.fromarray(frame).save(folder / frames[-1])
        if len(frames) < max(lengths):  # damage that the packets do not show
            fail("--haystack", f"{len(frames)} frames of {os.fspath(video)}", f"{max(lengths)}")
    except ValueError:
        for name in frames:
            (folder / name).unlink()
        raise
    cards = [f"needle-{index}.png" for index in range(len(needles))]
    for name, needle in zip(cards, needles, strict=True):
        open_image(needle.picture).save(folder / name)
    samples = []
    for length in sorted(set(lengths)):
        for depth, place in zip(depths, needle_places(length, depths), strict=True):
            for index, needle in enumerate(needles):
                shown = [*frames[:place], cards[index], *frames[place : length - 1]]
                asked = {"from": "human", "value": f"<image>\n{needle.question}"}
                said = {"from": "gpt", "value": needle.answer}
                name = f"needle-{length}-{depth:g}-{index}"
                samples.append({"id": name, "image": shown, "conversations": [asked, said]})
    target = folder / "samples.json"
    atomic_write(target, json.dumps(samples, indent=0) + "\n", durable=False)
    return target
