"""Video-XL without its language model head: text and videos to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from . import training_forward as training
from .decoder.configuration import VideoXLConfig
from .decoder.layers import VideoXLDecoder, refuse_attentions
from .decoder.rows import check_positions
from .decoder.vision_tower import encode_frames
from .errors import fail
from .inputs.arguments import (
    TextRow,
    VisualSource,
    embedded_rows,
    joined_pixels,
    refuse_mismatch,
    text_rows,
    visual_sources,
)
from .inputs.sources import VisualEncoder
from .settings import ExecutionSettings
from .streaming.cache_pool import GrowingCache
from .streaming.encoder import StreamEncoder
from .streaming.ratios import Ratio, RatioPlan, WindowRatios, row_plans

__all__ = ["VideoXLModel"]


class VideoXLModel(VideoXLDecoder):
    """Decoder, vision tower and projector under their published names.

    Attributes:
        settings: how it computes (`ExecutionSettings`).
        ratio: ratios to use where a call gives none; None for the configuration's.
    """

    def __init__(self, config: VideoXLConfig) -> None:
        super().__init__(config)
        self.settings = ExecutionSettings()
        self.ratio: Ratio = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        visual_features: Tensor | list[Tensor] | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        pixel_values_videos: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        ratio: Ratio | Sequence[WindowRatios | None] = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor | tuple[Tensor, ...], ...]:
        """Whole sequences through the decoder, differentiable where gradients are enabled. A
        cache or a memory needs `VideoXLForConditionalGeneration`.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, visual_features, pixel_values,
                pixel_values_videos, image_sizes, ratio: as `VideoXLForConditionalGeneration`.
            use_cache: for callers of transformers. There is no cache.
            output_hidden_states: return also the embeddings, the output of each layer, and in
                place of the last layer's that of the norm: `(batch, tokens, hidden)` each.
            return_dict: False for a tuple.

        Returns:
            `last_hidden_state (batch, tokens, hidden)` in the columns of `input_ids`, 0 for
            padding. A column predicts the token of the next one. That of -200 is therefore the
            state of the last raw visual row.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or another argument
                that does not fit. It is raised before anything is computed.
        """
        refuse_attentions(output_attentions, self.config)
        rows, columns = self.text_rows(input_ids, inputs_embeds, attention_mask, position_ids)
        pixels = joined_pixels(pixel_values, pixel_values_videos)
        sources = self.visual_sources(visual_features, pixels, image_sizes, len(rows))
        refuse_mismatch(rows, sources, has_memory=False)
        wanted = output_hidden_states
        wanted = bool(self.config.output_hidden_states if wanted is None else wanted)
        passes, _ = self.sequence_passes(self.encoder(), rows, sources, ratio, False, wanted)
        hidden = training.padded_hidden(passes, rows, columns)
        if self.training and torch.is_grad_enabled():
            hidden = hidden + self.idle_vision(rows)
        states = training.padded_states(passes, rows, columns, True) if wanted else None
        out = BaseModelOutput(last_hidden_state=hidden, hidden_states=states)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    # -- arguments ------------------------------------------------------------------------

    def text_rows(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[list[TextRow], int]:
        """The rows of the one of ids and embeddings that was given, and its columns."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            fail("input_ids and inputs_embeds", got, "one of the two")
        if inputs_embeds is not None:
            if isinstance(inputs_embeds, Tensor):
                inputs_embeds = inputs_embeds.to(self.device)
            rows = embedded_rows(inputs_embeds, attention_mask, self.config.hidden_size)
        else:
            if isinstance(input_ids, Tensor):
                input_ids = input_ids.to(self.device)
            rows = text_rows(input_ids, attention_mask, self.config.vocab_size)
        columns = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        spans = [(row.suffix_start - len(row.prefix) - row.visual, row.suffix_stop) for row in rows]
        check_positions(position_ids, spans, columns)
        return rows, columns

    def visual_sources(
        self, visual_features: Any, pixel_values: Any, image_sizes: Any, batch: int
    ) -> list[VisualSource] | None:
        """One source for each row, or None if there is nothing visual."""
        size = self._tower.config.image_size if hasattr(self, "vision_tower") else None
        hidden = self.config.hidden_size
        return visual_sources(visual_features, pixel_values, image_sizes, batch, hidden, size)

    # -- parts ----------------------------------------------------------------------------

    def encoder(self, shared: GrowingCache | None = None) -> StreamEncoder:
        """Runs videos through the decoder as `settings` say, into caches of their own or into
        `shared`."""
        return StreamEncoder(self, self.settings, shared)

    def encode_pixels(self, pixel_values: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Visual tokens `(tokens, hidden)` of frames `(frames, 3, size, size)`, some frames at a
        time."""
        return encode_frames(pixel_values, self._tower, self.mm_projector)

    @property
    def _tower(self) -> Any:
        tower = getattr(self, "vision_tower", None)
        if tower is None:
            fail("pixels", "a model without a vision tower", "visual_features")
        return tower

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame: 144 in the released model."""
        return (self._tower.side // 2) ** 2

    def visual_encoder(self, preprocess: Callable[[Any], Tensor] | None = None) -> VisualEncoder:
        """How this model makes features of pixels, and of frames with `preprocess`."""
        has_tower = hasattr(self, "vision_tower")
        return VisualEncoder(
            hidden_size=self.config.hidden_size,
            image_size=self._tower.config.image_size if has_tower else None,
            tokens_per_frame=self.tokens_per_frame if has_tower else 0,
            encode=self.encode_pixels,
            preprocess=preprocess or _refuse_frames,
            prepare=lambda pixels: self._tower.prepare(pixels),
            upload=lambda pixels: self._tower.upload(pixels),
        )

    def sequence_passes(
        self,
        encoder: StreamEncoder,
        rows: list[TextRow],
        sources: list[VisualSource] | None,
        ratio: Ratio | Sequence[WindowRatios | None],
        keep: bool,
        hidden_states: bool,
    ) -> tuple[list[training.SequencePass], list[RatioPlan]]:
        """Whole sequences through the decoder, and the ratios of their windows."""
        if torch.is_grad_enabled():
            training.refuse_tensor_parallel(self, self.layers[0])
        visual = self.visual_encoder()
        plans = row_plans(self.config, ratio, self.ratio, len(rows))
        features = [visual.whole_features(x) for x in sources or [VisualSource()] * len(rows)]
        return training.run_sequences(encoder, rows, features, plans, keep, hidden_states), plans

    def idle_vision(self, rows: list[TextRow]) -> Tensor | float:
        """0, with a graph through vision tower and projector. `training_forward.py` says why."""
        if all(row.visual for row in rows) or not hasattr(self, "mm_projector"):
            return 0.0
        size = self._tower.config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        return 0 * torch.cat(list(self.encode_pixels(blank))).sum()


def _refuse_frames(frames: Any) -> NoReturn:
    fail("video", "frames", "pixel_values: only a model with a head has a processor")
