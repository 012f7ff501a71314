"""The released model's prompt, and texts with places for pictures and videos.

Source: the published demonstration's prompt, Qwen2's chat format.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import fail
from .images import PictureReader
from .preprocessing import flat, video_list

__all__ = ["CHAT_TEMPLATE", "PROMPT", "STOP_TOKENS", "TURN", "CallOptions", "VisualRows"]

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "\n{question}<|im_end|>\n<|im_start|>assistant\n",
)
TURN = "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Pictures and videos come before the text of their message, as the model was trained.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- set visual = namespace(any=false) -%}
{%- for item in message['content'] -%}
{%- if item['type'] in ['image', 'image_url'] -%}
{%- set visual.any = true -%}{{- '<image>' -}}
{%- elif item['type'] == 'video' -%}
{%- set visual.any = true -%}{{- '<video>' -}}
{%- endif -%}
{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{%- if visual.any and loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- item['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass
class CallOptions:
    """The options of one call of a processor, by what they concern.

    Attributes:
        text: of tokenizing, padding and tensors.
        images, videos: of the image and the video processor.
    """

    text: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)

    # Names that a tokenizer knows. Every other one concerns pictures or videos.
    _TEXT = (
        "add_special_tokens",
        "max_length",
        "padding",
        "padding_side",
        "return_attention_mask",
        "return_tensors",
        "truncation",
    )
    _VIDEOS = ("do_sample_frames", "fps", "num_frames")
    _BOTH = ("return_metadata", "device", "return_mm_token_type_ids")  # without effect here

    @classmethod
    def of(cls, options: dict[str, Any]) -> CallOptions:
        """From keyword arguments: flat ones, `text_kwargs`, `images_kwargs`, `videos_kwargs` and
        `common_kwargs`.

        Raises:
            ValueError: an option that is not known here, or one that was given twice.
        """
        options = dict(options)
        nested = {name: dict(options.pop(f"{name}_kwargs", None) or {}) for name in _KINDS}
        common = dict(options.pop("common_kwargs", None) or {})
        made = cls()
        for name, value in {**common, **options}.items():
            if name in cls._TEXT:
                kinds: Sequence[str] = ("text",)
            elif name in cls._VIDEOS:
                kinds = ("videos",)
            elif name in cls._BOTH or value is None:
                continue
            elif name in _PREPROCESSING:
                kinds = ("images", "videos")
            else:
                fail(name, repr(value), f"one of {', '.join((*cls._TEXT, *cls._VIDEOS))}")
            for kind in kinds:
                if name in nested[kind]:
                    fail(f"{kind}_kwargs", f"{name}, which was passed two times", "it once")
                getattr(made, kind)[name] = value
        for kind in _KINDS:
            getattr(made, kind).update(nested[kind])
        return made

    def add_defaults(self, tokenizer: dict[str, Any]) -> None:
        """What a tokenizer was made with and a call does not say."""
        for name in ("max_length", "padding", "truncation"):
            if tokenizer.get(name) is not None:
                self.text.setdefault(name, tokenizer[name])

    @property
    def tokenizing(self) -> dict[str, Any]:
        return {"add_special_tokens": self.text.get("add_special_tokens", False)}

    def truncated(self, row: list[int], place: int) -> list[int]:
        """The first `max_length` ids, if `truncation` is asked for."""
        most = self.text.get("max_length")
        if not self.text.get("truncation") or most is None or len(row) <= most:
            return row
        if place in row[most:]:
            fail(
                "truncation", f"{most} ids, less than up to the visual part", "a longer max_length"
            )
        return row[:most]

    def padding_of(self, rows: list[list[int]]) -> dict[str, Any]:
        """A tokenizer's arguments for padding. The model reads a row to its last column, so
        padding goes to the left."""
        wanted = self.text.get("padding")
        if wanted is None:
            wanted = len({len(row) for row in rows}) > 1
        return {
            "padding": wanted,
            "padding_side": self.text.get("padding_side") or "left",
            "max_length": self.text.get("max_length"),
            "return_attention_mask": True,
        }

    def as_tensors(self, data: dict[str, Any]) -> dict[str, Any]:
        if self.text.get("return_attention_mask") is False:
            data = {"input_ids": data["input_ids"]}
        kind = self.text.get("return_tensors")
        if kind is None:
            return data
        makers: dict[Any, Any] = {"pt": torch.tensor, "np": np.array}
        make = makers.get(getattr(kind, "value", kind))
        if make is None:
            fail("return_tensors", kind, "'pt', 'np' or None")
        try:
            return {name: make(value) for name, value in data.items()}
        except ValueError:
            lengths = sorted({len(row) for row in data["input_ids"]})
            fail("padding", f"False and rows of {lengths} ids", "True, or texts of one length")


_KINDS = ("text", "images", "videos")
_PREPROCESSING = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_grid_pinpoints",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


class VisualRows:
    """Texts, cut at their visual parts.

    Attributes:
        parts: of each text, what is before and after its visual part; the text alone where there
            is none.
        counts: of each text, how many pictures and videos its visual part has.
    """

    def __init__(self, texts: Sequence[str], image_token: str, video_token: str) -> None:
        self.tokens = image_token, video_token
        places = re.compile("|".join(f"({re.escape(token)})" for token in self.tokens))
        self.parts: list[list[str]] = []
        self.counts: list[tuple[int, int]] = []
        for i, text in enumerate(texts):
            found = list(places.finditer(text))
            counts = tuple(sum(x.group(k) is not None for x in found) for k in (1, 2))
            self.counts.append((counts[0], counts[1]))
            if not found:
                self.parts.append([text])
                continue
            between = [text[a.end() : b.start()] for a, b in itertools.pairwise(found)]
            if counts[1] > 1 or all(counts) or any(x.strip() for x in between):
                got = f"{counts[0]} {image_token} and {counts[1]} {video_token} in text {i}"
                fail("text", got, "one video, one picture, or pictures next to each other")
            self.parts.append([text[: found[0].start()], text[found[-1].end() :]])

    def fill(
        self,
        images: Any,
        videos: Any,
        image_processor: Any,
        video_processor: Any,
        options: CallOptions,
    ) -> dict[str, Any]:
        """`pixel_values`, `image_sizes` and `pixel_values_videos`, one entry for each text.

        Raises:
            ValueError: not as many pictures or videos as there are places for.
        """
        given = ([] if images is None else flat(images), self._videos(videos))
        for k, name in enumerate(("images", "videos")):
            wanted = sum(count[k] for count in self.counts)
            if len(given[k]) != wanted:
                places = f"{wanted}, one for each {self.tokens[k]} in the text"
                fail(name, len(given[k]), places)
        pixels: list[Any] = [None] * len(self.counts)
        sizes, shown = list(pixels), list(pixels)
        for row, (pictures, films) in enumerate(self.counts):
            if pictures == 1:
                made = image_processor(given[0].pop(0), **options.images)
                pixels[row], sizes[row] = made["pixel_values"][0], made["image_sizes"][0]
            elif pictures:  # several are frames
                taken = [given[0].pop(0) for _ in range(pictures)]
                frames = np.concatenate(list(PictureReader(taken, image_processor.edge)))
                pixels[row] = image_processor.frames_to_pixels(frames)
            elif films:
                video = given[1].pop(0)
                made = video_processor([video], **options.videos)
                shown[row] = made["pixel_values_videos"][0]
        data = {"pixel_values": pixels, "image_sizes": sizes, "pixel_values_videos": shown}
        return {name: x for name, x in data.items() if any(item is not None for item in x)}

    def _videos(self, videos: Any) -> list[Any]:
        return [] if videos is None else video_list(videos)
