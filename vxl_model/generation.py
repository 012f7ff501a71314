"""What HF's `generate` asks of a model. Greedy search, sampling, beams, streamers and stopping
criteria are all its own. The cache that it carries is a `StreamBatch`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .decoder.layers import refuse_attentions
from .errors import fail
from .inputs.arguments import IMAGE_TOKEN
from .streaming.batch import StreamBatch
from .streaming.memory import VideoMemory

__all__ = ["VideoXLGenerationMixin", "VideoXLOutput", "given_cache", "live_rows"]

_PREFILL_ONLY = (
    "position_ids",
    "visual_features",
    "pixel_values",
    "pixel_values_videos",
    "image_sizes",
    "ratio",
    "memory",
    "expand_size",
)
# What HF calls a model's cache: by the first name up to 5.23, by the second since.
_CACHE_NAMES = ("past_key_values", "cache")


def given_cache(past_key_values: Any, cache: Any) -> StreamBatch | None:
    """The cache that was given by either of its names.

    Raises:
        ValueError: two objects, or one that is not a `StreamBatch`.
    """
    given = dict(zip(_CACHE_NAMES, (past_key_values, cache), strict=True))
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, VideoMemory):
            fail(name, "a VideoMemory", f"the {name} of an output; a VideoMemory goes to memory=")
        if not isinstance(value, StreamBatch):
            fail(name, type(value).__name__, f"the {name} of an output")
    if len({id(value) for value in given.values()}) > 1:
        fail(" and ".join(given), "two different objects", "one of the two names")
    return next(iter(given.values()), None)


@dataclass
class VideoXLOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: mean cross entropy over supervised tokens, if labels were given.
        logits: `(batch, columns, vocabulary)` of the last columns of input_ids: from the first
            suffix of the batch on, all of them for text alone and with `num_items_in_batch`. 0
            for padding, and where a row's logits were not computed.
        memory: the sequences with their suffixes, None after a pass with gradients. HF's
            `past_key_values` and `cache`, as attributes and as keys, are its `batch`.
        hidden_states: of the embeddings, each layer but the last, and the last norm, `(batch,
            columns, hidden)` each, in the columns of the logits. Only if they were asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: VideoMemory | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def cache(self) -> StreamBatch | None:
        return None if self.memory is None else self.memory.batch

    past_key_values = cache

    def __contains__(self, key: Any) -> bool:
        return super().__contains__("memory" if key in _CACHE_NAMES else key)

    def __getitem__(self, key: Any) -> Any:
        return self.cache if key in _CACHE_NAMES and key in self else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in _CACHE_NAMES:
            return default if self.memory is None else self.cache
        return super().get(key, default)


def _known_ids(input_ids: Tensor) -> Tensor:
    """The ids with another id of the same row in place of -200, since processors look ids up."""
    if not input_ids.shape[1]:
        return input_ids
    image = input_ids == IMAGE_TOKEN  # asking whether there is one would wait for a GPU
    known = input_ids.masked_fill(image, 0).amax(dim=1, keepdim=True)
    return torch.where(image, known, input_ids)


# Criteria that look no id up but the last.
_COUNTING = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


class _Processors(LogitsProcessorList):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(_known_ids(input_ids), scores, **kwargs)


class _Rows:
    """Rows of a `generate`: `ended (batch,)`, once there is one, says which have reached their end.

    Attributes:
        leave: whether such a row leaves the batch. With beams it may be replaced by another.
    """

    def __init__(self) -> None:
        self.leave = False
        self.ended: Tensor | None = None

    def end(self, rows: Tensor) -> None:
        self.ended = rows if self.ended is None else self.ended | rows


# The `generate` that runs in this thread.
_generating: ContextVar[_Rows | None] = ContextVar("vxl_generating", default=None)


def live_rows(batch: int) -> list[int] | None:
    """The rows of a step of `generate` that go on; None for all of them."""
    rows = _generating.get()
    if rows is None or not rows.leave or rows.ended is None or len(rows.ended) != batch:
        return None
    live = (~rows.ended).nonzero().flatten().tolist()
    return live if 0 < len(live) < batch else None


class _Criteria(StoppingCriteriaList):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if any(type(one) not in _COUNTING for one in self):
            input_ids = _known_ids(input_ids)
        ended = super().__call__(input_ids, scores, **kwargs)
        rows = _generating.get()
        if rows is not None and len(ended) > 1:
            rows.end(ended)
        return ended


class _Streamer(BaseStreamer):
    """Passes everything on to a streamer but -200."""

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
    """Hooks of `generate` for a model whose cache is a `StreamBatch`."""

    @torch.no_grad()
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """HF's `generate` on `input_ids (batch, tokens)` with `visual_features`, `pixel_values`
        and `image_sizes` as `forward` takes them, or with the `memory` of a video that was
        watched and the `input_ids` of what comes after it. `inputs_embeds` may take the place
        of text alone and of text after a memory.

        A row that reaches its end leaves the batch: its cache ends there, and its logits of later
        steps, which nothing reads, are 0. (Beams stay.)

        Returns:
            The given ids followed by the new ones. After `inputs_embeds` the new ids only.
        """
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"])
        for name in _CACHE_NAMES:
            if kwargs.get(name) is not None:
                fail(name, f"a {type(kwargs[name]).__name__}", "memory=")
        if kwargs.get("inputs_embeds") is not None:
            for name in ("visual_features", "pixel_values", "pixel_values_videos"):
                if kwargs.get(name) is not None:
                    fail("inputs_embeds", f"{name} too", f"input_ids with {IMAGE_TOKEN}")
        given = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        wanted = kwargs.get("output_attentions", getattr(given, "output_attentions", None))
        refuse_attentions(wanted, self.config)
        token = _generating.set(_Rows())
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            _generating.reset(token)

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
        rows = _generating.get()
        if rows is not None:
            rows.leave = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return _Processors(super()._get_logits_processor(*args, **kwargs))

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        return _Criteria(super()._get_stopping_criteria(*args, **kwargs))

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first pass makes the cache."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams repeat only the ids. The video is encoded once and then forked."""
        assert input_ids is not None
        if expand_size > 1:
            model_kwargs["expand_size"] = expand_size
            input_ids = input_ids.repeat_interleave(expand_size, dim=0)
            for name in ("attention_mask", "position_ids", "inputs_embeds"):
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = model_kwargs[name].repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Positions are checked with the prompt and not counted on after it."""
        model_kwargs.pop("position_ids", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: StreamBatch | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
        cache: StreamBatch | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        device = self.device
        cache = given_cache(past_key_values, cache)
        more = {} if output_hidden_states is None else {"output_hidden_states": True}
        if cache is not None:
            return {"input_ids": input_ids[:, -1:].to(device), "cache": cache, **more}
        first = {name: kwargs[name] for name in _PREFILL_ONLY if kwargs.get(name) is not None}
        text = {"input_ids": input_ids.to(device)}
        if inputs_embeds is not None:
            text = {"inputs_embeds": inputs_embeds.to(device)}
        return {
            **text,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
            **first,
            **more,
        }
