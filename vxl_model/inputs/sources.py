"""A video in any form, a file, frames, pixels or features, as an iterator of visual features.

Nothing here knows a model. What turns pictures into features comes with a `VisualEncoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import fail
from ..video.prefetch import prefetch
from .arguments import VisualSource, visual_sources
from .images import open_frames

__all__ = ["FeatureStream", "VisualEncoder", "open_source"]


@dataclass(frozen=True)
class VisualEncoder:
    """How one model makes features of pictures.

    Attributes:
        hidden_size: width of a feature.
        image_size: edge of a frame in pixels; None for a model without a vision tower.
        tokens_per_frame: features of a frame; 0 without a tower.
        encode: pixels `(frames, 3, size, size)`, or an iterable of such, to features `(tokens,
            hidden)`, some frames at a time.
        preprocess: uint8 frames `(frames, height, width, 3)`, arrays or tensors, to pixels.
        prepare: pixels as they are uploaded, in any thread.
        upload: prepared pixels to where `encode` computes.
    """

    hidden_size: int
    image_size: int | None
    tokens_per_frame: int
    encode: Callable[[Tensor | Iterable[Tensor]], Iterator[Tensor]]
    preprocess: Callable[[Any], Tensor]
    prepare: Callable[[Tensor], Tensor]
    upload: Callable[[Tensor], Tensor]

    def features(self, source: VisualSource) -> Iterator[Tensor]:
        """Features of one row's visual part, some frames at a time."""
        if source.features is not None:
            return iter([source.features])
        return self.encode(source.pixels) if source.pixels is not None else iter(())

    def whole_features(self, source: VisualSource) -> Tensor | None:
        """All of them in one tensor, None if there are none."""
        pieces = list(self.features(source))
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return torch.cat(pieces)

    def count(self, source: VisualSource) -> int:
        """How many features one row's visual part has."""
        if source.features is not None:
            return len(source.features)
        return len(source.pixels) * self.tokens_per_frame if source.pixels is not None else 0


@dataclass(frozen=True)
class FeatureStream:
    """Visual features of one video, piece by piece.

    Attributes:
        pieces: `(tokens, hidden)` each, made when they are asked for.
        total: frames in all (tokens, where features were given), None if unknown.
        unit: tokens of one of those.
    """

    pieces: Iterator[Tensor]
    total: int | None
    unit: int


def open_source(
    encoder: VisualEncoder,
    *,
    video: Any = None,
    visual_features: Any = None,
    pixel_values: Any = None,
    image_sizes: Any = None,
    frames: int | None = None,
    fps: float | None = None,
) -> FeatureStream:
    """Features of the one of `video`, `visual_features` and `pixel_values` that is not None. The
    arguments are those of `VideoXLForConditionalGeneration.watch`. A file is decoded and
    preprocessed in threads of their own, ahead of what is asked for."""
    if video is not None:
        return _from_video(encoder, video, frames, fps)
    if pixel_values is not None:
        return _from_pixels(encoder, pixel_values, image_sizes)
    return _from_features(encoder, visual_features)


def _from_video(
    encoder: VisualEncoder, video: Any, frames: int | None, fps: float | None
) -> FeatureStream:
    if encoder.image_size is None:
        _refuse_pixels()
    batches, total = open_frames(video, encoder.image_size, frames, fps)
    pixels = prefetch(_prepared(encoder, batches, _current_stream()))
    uploaded = (encoder.upload(batch) for batch in pixels)
    return FeatureStream(encoder.encode(uploaded), total, encoder.tokens_per_frame)


def _current_stream() -> Any:
    """Of the GPU that is current; None as long as the process uses none."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _prepared(encoder: VisualEncoder, batches: Iterable[Any], stream: Any) -> Iterator[Tensor]:
    """Prepared pixels. All is queued on the caller's `stream`. The stream of this thread would not
    wait for what the caller has queued, which may still write the frames."""
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        for batch in batches:
            yield encoder.prepare(encoder.preprocess(batch))


def _from_pixels(encoder: VisualEncoder, pixels: Any, image_sizes: Any) -> FeatureStream:
    if encoder.image_size is None:
        _refuse_pixels()
    total = None
    if isinstance(pixels, Tensor):
        sources = visual_sources(None, pixels, image_sizes, 1, 0, encoder.image_size)
        assert sources is not None
        pixels = sources[0].pixels
        total = len(pixels)
    return FeatureStream(encoder.encode(pixels), total, encoder.tokens_per_frame)


def _from_features(encoder: VisualEncoder, features: Any) -> FeatureStream:
    def checked(x: Any) -> Tensor:
        sources = visual_sources(x, None, None, 1, encoder.hidden_size, None)
        assert sources is not None
        assert sources[0].features is not None
        return sources[0].features

    if isinstance(features, Tensor):
        one = checked(features)
        return FeatureStream(iter([one]), len(one), 1)
    return FeatureStream((checked(x) for x in features), None, 1)


def _refuse_pixels() -> NoReturn:
    fail("pixels", "a model without a vision tower", "visual_features")
