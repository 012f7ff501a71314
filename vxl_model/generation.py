"""What HF's `generate` needs to know: greedy, sampling, beams, streamers and stopping criteria are
all its own. Its cache is a `VideoMemory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .errors import fail
from .inputs.arguments import IMAGE_TOKEN
from .streaming.memory import VideoMemory

__all__ = ["VideoXLGenerationMixin", "VideoXLOutput", "given_cache"]

_ONLY_FIRST = ("visual_features", "pixel_values", "image_sizes", "ratio", "memory", "copies")
# What HF calls a model's cache: the first up to 5.23, the second since.
_CACHE_NAMES = ("past_key_values", "cache")


def given_cache(past_key_values: Any, cache: Any) -> VideoMemory | None:
    """The cache that was given by either of its names.

    Raises:
        ValueError: both names with different objects, or no `VideoMemory`.
    """
    given = dict(zip(_CACHE_NAMES, (past_key_values, cache), strict=True))
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, VideoMemory):
            fail(name, type(value).__name__, "VideoMemory")
    if len({id(value) for value in given.values()}) > 1:
        fail(" and ".join(given), "two different memories", "one of the two names")
    return next(iter(given.values()), None)


@dataclass
class VideoXLOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: mean cross entropy over supervised tokens, if labels were given.
        logits: `(batch, tail, vocabulary)`: the last `tail` columns of input_ids, `tail` being
            the longest tail of the batch; 0 in columns that are no tail of their row.
        memory: the sequences with their tails; None after a pass with gradients. HF's names for
            it, `past_key_values` and `cache`, work as attributes and as keys.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: VideoMemory | None = None

    @property
    def past_key_values(self) -> VideoMemory | None:
        return self.memory

    @property
    def cache(self) -> VideoMemory | None:
        return self.memory

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._field(key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._field(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._field(key), default)

    @staticmethod
    def _field(key: Any) -> Any:
        return "memory" if key in _CACHE_NAMES else key


class _KnownIds:
    """Replaces -200 by an id that stands in the same row already: processors look ids up."""

    @staticmethod
    def of(input_ids: Tensor) -> Tensor:
        image = input_ids == IMAGE_TOKEN
        known = input_ids.masked_fill(image, 0).amax(dim=1, keepdim=True)
        return torch.where(image, known, input_ids)


class _Processors(LogitsProcessorList):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(_KnownIds.of(input_ids), scores, **kwargs)


class _Streamer(BaseStreamer):
    """A streamer that is not shown the -200."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        if bool((value == IMAGE_TOKEN).any()):
            if value.dim() == 2 and len(value) != 1:
                raise ValueError(f"streamer: got a batch of {len(value)}, expected one row")
            flat = value.reshape(-1)
            value = flat[flat != IMAGE_TOKEN][None]
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class VideoXLGenerationMixin(GenerationMixin):
    """Hooks of `generate` for a model whose cache is a `VideoMemory`."""

    @torch.no_grad()
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """HF's `generate` on `input_ids (batch, tokens)` with `visual_features`, `pixel_values`
        and `image_sizes` as `forward` takes them, or with the `memory` of a video that was
        watched and `input_ids` of what stands behind it.

        Returns:
            The given ids followed by the new ones.
        """
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"])
        for name in _CACHE_NAMES:
            if kwargs.get(name) is not None:
                fail(name, type(kwargs[name]).__name__, "memory=")
        if kwargs.get("inputs_embeds") is not None:
            fail("inputs_embeds", "a tensor", "input_ids")
        return super().generate(inputs, *args, **kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode not in (
            GenerationMode.GREEDY_SEARCH,
            GenerationMode.SAMPLE,
            GenerationMode.BEAM_SEARCH,
            GenerationMode.BEAM_SAMPLE,
        ):
            fail("generate", f"mode {generation_mode.value!r}", "greedy search, sampling or beams")
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return _Processors(super()._get_logits_processor(*args, **kwargs))

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The first pass makes the cache."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams repeat the ids only: the video is encoded once, then forked."""
        assert input_ids is not None
        if expand_size > 1:
            model_kwargs["copies"] = expand_size
            input_ids = input_ids.repeat_interleave(expand_size, dim=0)
            mask = model_kwargs.get("attention_mask")
            if mask is not None:
                model_kwargs["attention_mask"] = mask.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: VideoMemory | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
        cache: VideoMemory | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        device = self.device
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            return {"input_ids": input_ids[:, -1:].to(device), "cache": cache}
        first = {name: kwargs[name] for name in _ONLY_FIRST if kwargs.get(name) is not None}
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
            **first,
        }

    def _reorder_cache(self, cache: VideoMemory, beam_idx: Tensor) -> VideoMemory:
        return cache._select(beam_idx.tolist())
