"""The arguments of a call in one form, and every refusal of them.

Each error is one ValueError that names the argument, what came and what was expected. It is raised
before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder.rows import token_spans
from ..errors import fail

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "TextRow",
    "VisualSource",
    "embedded_rows",
    "encoded",
    "given_one",
    "joined_pixels",
    "prefix_row",
    "refuse_mismatch",
    "text_rows",
    "visual_sources",
]

IMAGE_TOKEN = -200  # the one id in input_ids that marks the visual part
IGNORE_INDEX = -100  # the label of a token that is not supervised


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of a text. ValueError where the tokenizer has none for a part of it."""
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # the tokenizers of Rust raise Exception itself
        reason = " ".join(str(error).split())
        fail(
            "text", f"{text[:60]!r}, for which the tokenizer has no ids ({reason})", "text it knows"
        )


def given_one(call: str, options: dict[str, Any]) -> None:
    """Refuses a call that does not give exactly one of these arguments."""
    names = [name for name, value in options.items() if value is not None]
    if len(names) != 1:
        fail(call, " and ".join(names) or "none", f"one of {', '.join(options)}")


@dataclass(frozen=True)
class TextRow:
    """One row of input_ids or inputs_embeds.

    Attributes:
        prefix, suffix: ids `(tokens,)` before and after the visual part, without padding, or
            their embeddings `(tokens, hidden)`. A row without a visual part has only a suffix.
        prefix_start: column of the prefix's first token.
        suffix_start, suffix_stop: columns of the suffix in input_ids.
        visual: the row has a visual part.
    """

    prefix: Tensor
    suffix: Tensor
    prefix_start: int
    suffix_start: int
    suffix_stop: int
    visual: bool


def text_rows(input_ids: Any, attention_mask: Tensor | None, vocabulary: int) -> list[TextRow]:
    """Cuts `input_ids (batch, tokens)` at -200 and drops what `attention_mask` masks."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = (
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        fail("input_ids", got, "integers (batch, tokens)")
    if 0 in input_ids.shape:
        fail("input_ids", f"shape {tuple(input_ids.shape)}", "at least one token")
    host = input_ids.detach().cpu()
    spans = token_spans(attention_mask, input_ids.shape)
    tokens = torch.zeros_like(host, dtype=torch.bool)
    for b, (start, stop) in enumerate(spans):
        tokens[b, start:stop] = True
    outside = (host != IMAGE_TOKEN) & ((host < 0) | (host >= vocabulary)) & tokens
    if outside.any():
        fail(
            "input_ids",
            f"id {int(host[outside][0])}",
            f"0 to {vocabulary - 1}, or {IMAGE_TOKEN} for the visual part",
        )
    rows = []
    for b, (start, stop) in enumerate(spans):
        places = (host[b, start:stop] == IMAGE_TOKEN).nonzero().flatten() + start
        if len(places) > 1:
            fail("input_ids", f"{len(places)} times {IMAGE_TOKEN} in row {b}", "one a row")
        at = int(places[0]) if len(places) else start - 1
        if at + 1 >= stop:
            fail("input_ids", f"no token after {IMAGE_TOKEN} in row {b}", "at least one")
        row = input_ids[b].long()
        rows.append(
            TextRow(
                row[start:at] if len(places) else row[:0],
                row[at + 1 : stop],
                start,
                at + 1,
                stop,
                bool(len(places)),
            )
        )
    return rows


def embedded_rows(inputs_embeds: Any, attention_mask: Tensor | None, hidden: int) -> list[TextRow]:
    """Rows of embedded text `(batch, tokens, hidden)`, which has no place for a video, without
    what `attention_mask` masks."""
    given = isinstance(inputs_embeds, Tensor)
    if not given or inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden:
        got = f"shape {tuple(inputs_embeds.shape)}" if given else type(inputs_embeds).__name__
        fail("inputs_embeds", got, f"(batch, tokens, {hidden})")
    if not inputs_embeds.is_floating_point():
        fail("inputs_embeds", inputs_embeds.dtype, "a float type")
    if 0 in inputs_embeds.shape:
        fail("inputs_embeds", f"shape {tuple(inputs_embeds.shape)}", "at least one token")
    spans = token_spans(attention_mask, inputs_embeds.shape[:2])
    return [
        TextRow(row[:0], row[start:stop], start, start, stop, False)
        for row, (start, stop) in zip(inputs_embeds, spans, strict=True)
    ]


def prefix_row(input_ids: Any, vocabulary: int) -> Tensor:
    """Ids `(tokens,)` before a video, given with or without a final -200."""
    ids = torch.as_tensor(input_ids, dtype=torch.long, device="cpu").reshape(-1)
    if len(ids) and ids[-1] == IMAGE_TOKEN:
        ids = ids[:-1]
    wrong = (ids < 0) | (ids >= vocabulary)
    if bool(wrong.any()):
        got = int(ids[wrong][0])
        if got == IMAGE_TOKEN:
            fail("input_ids", f"tokens after {IMAGE_TOKEN}", "the ids before the video only")
        fail("input_ids", f"id {got}", f"0 to {vocabulary - 1}")
    return ids


@dataclass(frozen=True)
class VisualSource:
    """The visual part of one row: `features (tokens, hidden)`, or `pixels (frames, 3, size,
    size)`, or neither for a row of text alone."""

    features: Tensor | None = None
    pixels: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self.features is None and self.pixels is None


def joined_pixels(pixel_values: Any, pixel_values_videos: Any) -> Any:
    """Pixels of images and of videos, a processor's two names, as one argument. Of a row that
    has neither both are None."""
    if pixel_values is None or pixel_values_videos is None:
        return pixel_values_videos if pixel_values is None else pixel_values
    images, videos = list(pixel_values), list(pixel_values_videos)
    if len(images) != len(videos):
        fail("pixel_values_videos", f"{len(videos)} rows", f"{len(images)} as pixel_values")
    for i, (image, video) in enumerate(zip(images, videos, strict=True)):
        if image is not None and video is not None:
            fail("pixel_values_videos", f"images and a video in row {i}", "one of the two")
    return [x if y is None else y for x, y in zip(images, videos, strict=True)]


def visual_sources(
    visual_features: Any,
    pixel_values: Any,
    image_sizes: Any,
    batch: int,
    hidden: int,
    image_size: int | None,
) -> list[VisualSource] | None:
    """One source for each row, or None if there is nothing visual."""
    if image_sizes is not None and pixel_values is None:
        fail("image_sizes", "sizes without pixel_values", "both or neither")
    if visual_features is not None and pixel_values is not None:
        fail("pixel_values", "visual_features too", "one of the two")
    if visual_features is not None:
        return [
            VisualSource(features=None if x is None else _features(x, hidden))
            for x in _per_row("visual_features", visual_features, batch, 2)
        ]
    if pixel_values is None:
        return None
    if image_size is None:
        fail("pixel_values", "a model without a vision tower", "visual_features")
    pixels = [
        None if x is None else _pixels(x, image_size)
        for x in _per_row("pixel_values", pixel_values, batch, 4)
    ]
    for i, size in enumerate(_image_sizes(image_sizes, batch)):
        # The first tile is the whole picture made small. It is used only if it is alone.
        given = pixels[i]
        if size is not None and given is not None and len(given) > 1:
            pixels[i] = given[1:]
    return [VisualSource(pixels=x) for x in pixels]


def refuse_mismatch(
    rows: Sequence[TextRow], sources: Sequence[VisualSource] | None, has_memory: bool
) -> None:
    """Refuses text that has no place for its video, a place without a video, and a memory
    together with either."""
    marked = [row.visual for row in rows]
    if has_memory:
        if sources is not None:
            fail("memory", "visual input too", "one of the two")
        if any(marked):
            fail("input_ids", f"{IMAGE_TOKEN} and a memory", "only the text after the video")
    elif sources is None and any(marked):
        fail("input_ids", f"{IMAGE_TOKEN}", "visual_features or pixel_values for it")
    for i, source in enumerate(sources or ()):
        if not source.empty and not marked[i]:
            fail("input_ids", f"no {IMAGE_TOKEN} in row {i}", "one a row")
        if source.empty and marked[i]:
            fail("input_ids", f"{IMAGE_TOKEN} in row {i}", "visual input for that row")


def _per_row(name: str, value: Any, batch: int, dims: int) -> list[Tensor | None]:
    if isinstance(value, Tensor):
        if value.dim() == dims + 1:
            value = list(value)
        elif value.dim() == dims:
            value = [value]
        else:
            fail(name, f"shape {tuple(value.shape)}", f"{dims} dimensions a video")
    if not isinstance(value, Sequence) or not all(
        x is None or isinstance(x, Tensor) for x in value
    ):
        fail(name, type(value).__name__, "a tensor, or a list of one tensor for each row")
    if len(value) != batch:
        fail(name, f"{len(value)} videos", f"{batch}, one for each row of input_ids")
    return list(value)


def _features(x: Tensor, hidden: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != hidden:
        fail("visual_features", f"shape {tuple(x.shape)} a video", f"(tokens, {hidden})")
    if not x.is_floating_point():
        fail("visual_features", x.dtype, "a float type")
    if not len(x):
        fail("visual_features", "no tokens", "at least one token a video")
    return x


def _pixels(x: Tensor, size: int) -> Tensor:
    if x.dim() != 4 or tuple(x.shape[1:]) != (3, size, size):
        fail("pixel_values", f"shape {tuple(x.shape)} a video", f"(frames, 3, {size}, {size})")
    if not x.is_floating_point():
        fail("pixel_values", x.dtype, "a float type (normalised pixels)")
    if not len(x):
        fail("pixel_values", "no frames", "at least one frame a video")
    return x


def _image_sizes(sizes: Any, batch: int) -> list[Any]:
    if sizes is None:
        return [None] * batch
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    sizes = list(sizes)
    if len(sizes) == 2 and all(isinstance(x, int) for x in sizes):
        sizes = [tuple(sizes)]
    if len(sizes) != batch:
        fail("image_sizes", f"{len(sizes)} entries", f"{batch}: (width, height), or None for video")
    return sizes
