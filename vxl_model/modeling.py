"""Video-XL: a language model that watches long videos through VSTs, on `vxl_kernels`.

Source: Video-XL (arXiv 2409.14485); numbers of the published code on small random weights are
in `tests/goldens`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import training_forward as training
from .base_model import VideoXLModel
from .checkpoint import CheckpointMixin
from .decoder.configuration import VideoXLConfig
from .decoder.layers import VideoXLPreTrainedModel, refuse_attentions
from .errors import fail
from .generation import VideoXLGenerationMixin, VideoXLOutput, given_cache, live_rows
from .inputs.arguments import (
    IMAGE_TOKEN,
    TextRow,
    VisualSource,
    given_one,
    joined_pixels,
    prefix_row,
    refuse_mismatch,
)
from .inputs.sources import VisualEncoder, open_source
from .settings import ExecutionSettings
from .steps import StepMixin
from .streaming.batch import StreamBatch
from .streaming.cache_pool import SLACK_TOKENS, GrowingCache
from .streaming.encoder import StreamEncoder
from .streaming.memory import VideoMemory
from .streaming.ratios import Ratio, RatioPlan, WindowRatios, make_plan
from .streaming.state import VideoState

__all__ = ["VideoXLForConditionalGeneration", "VideoXLOutput"]


class VideoXLForConditionalGeneration(
    CheckpointMixin, StepMixin, VideoXLPreTrainedModel, VideoXLGenerationMixin
):
    """Video-XL with its language model head.

    Attributes:
        settings: how it computes (`ExecutionSettings`).
        ratio: ratios to use where a call gives none; None for the configuration's.
    """

    accepts_loss_kwargs = True  # HF's Trainer passes num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VideoXLConfig) -> None:
        super().__init__(config)
        self.model = VideoXLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._processor: Any = None
        self._shared_cache: GrowingCache | None = None
        self.post_init()

    # -- parts ---------------------------------------------------------------------------

    @property
    def settings(self) -> ExecutionSettings:
        return self.model.settings

    @settings.setter
    def settings(self, value: ExecutionSettings) -> None:
        self.model.settings = value

    @property
    def ratio(self) -> Ratio:
        return self.model.ratio

    @ratio.setter
    def ratio(self, value: Ratio) -> None:
        self.model.ratio = value

    @property
    def processor(self) -> Any:
        """The checkpoint's processor: frames to pixels, text to ids and back.

        Raises:
            ValueError: the model was made without a checkpoint.
        """
        if self._processor is None:
            if not self.config.name_or_path:
                fail("processor", "a model without a checkpoint", "model.processor = ... first")
            from .inputs.processing import VideoXLProcessor

            self._processor = VideoXLProcessor.from_pretrained(self.config.name_or_path)
        return self._processor

    @processor.setter
    def processor(self, value: Any) -> None:
        self._processor = value

    def encoder(self) -> StreamEncoder:
        """Runs videos through the decoder as `settings` say."""
        # Parts that are offloaded to the CPU or a disk compute where the rest does.
        devices = set(getattr(self, "hf_device_map", {}).values()) - {"cpu", "disk"}
        if len(devices) > 1:
            fail("device_map", f"parts on {sorted(map(str, devices))}", "one device")
        return self.model.encoder(self._shared_cache)

    def share_cache(self, tokens: int) -> GrowingCache:
        """One cache for all memories from now on, so that questions about several of them can be
        decoded in one step.

        Args:
            tokens: cached tokens to have room for. It does not grow: watching, loading and
                answering raise `vxl_kernels.PoolExhausted`, a MemoryError, when it is full, and
                change nothing.

        Returns:
            The cache. Its `pages` is the `VstCache`.
        """
        if not isinstance(tokens, int) or tokens < 1:
            fail("tokens", repr(tokens), "at least 1")
        self._shared_cache = self.encoder().new_cache(tokens, fixed=True)
        return self._shared_cache

    def encode_pixels(self, pixel_values: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Visual tokens `(tokens, hidden)` of frames `(frames, 3, size, size)`, some frames at a
        time."""
        return self.model.encode_pixels(pixel_values)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame: 144 in the released model."""
        return self.model.tokens_per_frame

    def _visual_encoder(self) -> VisualEncoder:
        return self.model.visual_encoder(lambda frames: self.processor.frames_to_pixels(frames))

    def make_plan(self, ratio: Ratio = None) -> RatioPlan:
        """The ratios of one sequence's windows."""
        return make_plan(self.config, self.ratio if ratio is None else ratio)

    # -- forward --------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        visual_features: Tensor | list[Tensor] | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        labels: Tensor | None = None,
        ratio: Ratio | Sequence[WindowRatios | None] = None,
        memory: VideoMemory | None = None,
        *,
        pixel_values_videos: Tensor | list[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StreamBatch | None = None,
        cache: StreamBatch | None = None,
        logits_to_keep: int | None = None,
        expand_size: int = 1,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> VideoXLOutput | tuple[Any, ...]:
        """Logits of the text after a video.

        Args:
            input_ids: `(batch, tokens)`, one -200 a row for the visual part. What comes before it
                is the row's prefix, what comes after it the suffix.
            visual_features: `(batch, tokens, hidden)`, already projected; a list of `(tokens,
                hidden)` for videos of different lengths, None for a row without one.
            pixel_values: `(frames, 3, size, size)` of one video, or a list of one such tensor for
                each row, None for a row without a video.
            pixel_values_videos: another name of `pixel_values`, that of a processor's videos. A
                row has the one or the other.
            image_sizes: `(width, height)` of an image in tiles, None for a video; for each row.
            labels: as input_ids, -100 where nothing is supervised. The first suffix token is
                predicted by the last raw visual row.
            ratio: raw tokens per VST: an integer, a list to draw from, or `WindowRatios`; by
                default the configuration's. Draws restart with every sequence. In training also
                a list of one `WindowRatios` for each row.
            memory: a video watched before; input_ids then holds only what comes after it. The
                memory stays as it is.
            attention_mask: 0 for padding at either end of a row.
            position_ids: only checked: they have to count up by one through each row.
            inputs_embeds: `(batch, tokens, hidden)` in place of `input_ids`, for text alone or
                after a `memory`.
            logits_to_keep: how many of the last rows to return logits of; by default all of the
                suffix.
            past_key_values, cache: two names of one argument, the sequences that input_ids
                `(batch, 1)` continue. For HF's `generate`, as are expand_size and use_cache.
            output_hidden_states: return also the hidden states of every layer, in the columns
                that the logits have: those of the text rows.
            return_dict: False for a tuple of what is not None.
            loss_only: with labels, no logits: those of unsupervised tokens are never made.
            num_items_in_batch: for HF's `Trainer`: tokens that the loss is divided by, where
                this batch is a part of a larger one. The logits are then those of all columns of
                input_ids, where the logits of a column predict the token of the next one: those
                of the -200 come from the last raw visual row.

        With labels, in training mode, or for features or embeddings that require a gradient,
        all rows go through each layer at once and the result is differentiable. Otherwise
        nothing is. `num_items_in_batch` without labels is such a pass too, for a loss that the
        caller computes.

        Raises:
            ValueError: an argument does not fit. It is raised before anything is computed.
        """
        refuse_attentions(output_attentions, self.config)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        wanted = output_hidden_states
        wanted = bool(self.config.output_hidden_states if wanted is None else wanted)
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            text = input_ids if inputs_embeds is None else inputs_embeds
            out = self.decode_step(cast("Tensor", text), cache, wanted, live_rows(len(cache)))
            return out if as_dict else out.to_tuple()
        rows, columns = self.model.text_rows(input_ids, inputs_embeds, attention_mask, position_ids)
        rows = rows[::expand_size]
        pixel_values = joined_pixels(pixel_values, pixel_values_videos)
        sources = self.model.visual_sources(visual_features, pixel_values, image_sizes, len(rows))
        if inputs_embeds is not None and sources is not None:
            fail("inputs_embeds", "visual input too", f"input_ids with {IMAGE_TOKEN}")
        refuse_mismatch(rows, sources, memory is not None)
        if memory is not None and memory.model is not self:
            fail("memory", "the memory of another model", "one that this model made")
        of_caller = num_items_in_batch is not None and memory is None
        if labels is None and not of_caller and not self._wants_gradient(rows, sources):
            out = self.prefill(
                rows, sources, memory, ratio, columns, logits_to_keep, expand_size, wanted
            )
            return out if as_dict else out.to_tuple()
        if memory is not None:
            fail("memory", "a memory together with labels or training", "the video itself")
        if loss_only and labels is None:
            fail("loss_only", "True without labels", "labels")
        if labels is not None:
            given = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
            labels = labels.to(given.device)
            training.check_labels(labels, given, self.config.vocab_size)
        out = self.training_forward(
            rows, columns, sources, labels, ratio, loss_only, num_items_in_batch, wanted
        )
        if logits_to_keep and out.logits is not None:
            out.logits = out.logits[:, -logits_to_keep:]
        return out if as_dict else out.to_tuple()

    def _wants_gradient(self, rows: list[TextRow], sources: list[VisualSource] | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        given = [source.features for source in sources or () if source.features is not None]
        given += [row.suffix for row in rows]
        return self.training or any(tensor.requires_grad for tensor in given)

    @torch.no_grad()
    def prefill(
        self,
        rows: list[TextRow],
        sources: list[VisualSource] | None,
        memory: VideoMemory | None,
        ratio: Any,
        columns: int,
        logits_to_keep: int | None,
        expand_size: int,
        hidden_states: bool = False,
    ) -> VideoXLOutput:
        """Videos, or a memory of them, and the suffixes after them: logits `(batch, columns,
        vocabulary)` from the first suffix after a video on, for text alone from the first column
        on. Each row comes `expand_size` times."""
        first = min(row.suffix_start if row.visual else 0 for row in rows)
        if logits_to_keep:
            first = max(first, columns - logits_to_keep)
        wanted = [row.suffix_stop - max(row.suffix_start, first) for row in rows]
        if min(wanted) < 1:
            got = f"padding at the end of row {wanted.index(min(wanted))}"
            fail("attention_mask", got, "padding at the start")
        encoder = self.encoder()
        batch = self._watch(rows, sources, ratio) if memory is None else memory.forks(len(rows))
        logits: list[Tensor] = []
        collected: list[list[Tensor]] = []
        for row, state, count in zip(rows, batch.states, wanted, strict=True):
            states: list[Tensor] | None = [] if hidden_states else None
            hidden = encoder.append_suffix([state], row.suffix[None], count, states)
            pad = (0, 0, row.suffix_stop - count - first, columns - row.suffix_stop)
            logits.append(nn.functional.pad(self.lm_head(hidden)[0], pad))
            if states is not None:
                collected.append([nn.functional.pad(x[0, -count:], pad) for x in states])
        if expand_size > 1:
            batch = batch.select([i for i in range(len(rows)) for _ in range(expand_size)])
            logits = [x for x in logits for _ in range(expand_size)]
            collected = [x for x in collected for _ in range(expand_size)]
        layers = tuple(torch.stack(x) for x in zip(*collected, strict=True))
        return VideoXLOutput(
            logits=torch.stack(logits),
            memory=VideoMemory(self, batch),
            hidden_states=layers if hidden_states else None,
        )

    def training_forward(
        self,
        rows: list[TextRow],
        columns: int,
        sources: list[VisualSource] | None,
        labels: Tensor | None,
        ratio: Ratio | Sequence[WindowRatios | None],
        loss_only: bool,
        num_items_in_batch: Tensor | float | None,
        hidden_states: bool = False,
    ) -> VideoXLOutput:
        """Whole sequences in one pass a layer, differentiable where gradients are enabled:
        logits of all columns where the caller computes a loss (`num_items_in_batch`) and for
        text alone, else of the columns from the first suffix on."""
        keep = not torch.is_grad_enabled()
        encoder = self.encoder()
        passes, plans = self.model.sequence_passes(
            encoder, rows, sources, ratio, keep, hidden_states
        )
        every = num_items_in_batch is not None
        loss = logits = states = memory = None
        if labels is not None:
            loss = training.token_loss(passes, rows, labels, self.lm_head, num_items_in_batch)
            if self.training and not keep:
                loss = loss + self.model.idle_vision(rows)
        if not loss_only:
            logits = training.padded_logits(passes, rows, columns, self.lm_head, every)
        if hidden_states:
            states = training.padded_states(passes, rows, columns, every)
        if keep:
            batch = StreamBatch(training.kept_states(encoder, passes, plans))
            memory = VideoMemory(self, batch)
        return VideoXLOutput(loss, logits, memory, states)

    # -- watching -------------------------------------------------------------------------

    def _watch(
        self, rows: list[TextRow], sources: list[VisualSource] | None, ratio: Ratio
    ) -> StreamBatch:
        """Prefixes and videos of a batch, each as if it were alone."""
        encoder, visual, plan = self.encoder(), self._visual_encoder(), self.make_plan(ratio)
        given = sources or [VisualSource()] * len(rows)
        tokens = SLACK_TOKENS // 4
        for row, source in zip(rows, given, strict=True):
            tokens += encoder.cached_tokens(plan, visual.count(source))
            tokens += len(row.prefix) + len(row.suffix)
            tokens += 2 * self.settings.page_size  # a page that is not full, and its copy
        cache = encoder.cache(tokens)
        states = []
        for row, source in zip(rows, given, strict=True):
            state = VideoState(cache.new(), plan.copy())
            encoder.append_prefix(state, row.prefix)
            for features in visual.features(source):
                encoder.append(state, features, more_follow=True)
            encoder.complete(state)
            states.append(encoder.flush(state))
        return StreamBatch(states)

    @torch.no_grad()
    def watch(
        self,
        video: str | os.PathLike[str] | Iterable[Any] | None = None,
        *,
        input_ids: Tensor | Sequence[int] | None = None,
        visual_features: Tensor | Iterable[Tensor] | None = None,
        pixel_values: Tensor | Iterable[Tensor] | None = None,
        image_sizes: Any = None,
        ratio: Ratio = None,
        frames: int | None = None,
        fps: float | None = None,
        tokens: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> VideoMemory:
        """Encodes prefix and video once. The memory can be asked any number of times.

        Args:
            video: a file, a folder of pictures, a list of pictures, or uint8 frames `(frames,
                height, width, 3)`, or batches of such.
            input_ids: ids before the video, with or without a final -200. By default the start
                of the released model's prompt, for which the checkpoint needs a tokenizer.
            visual_features: `(tokens, hidden)`, already projected, or an iterable of such tensors,
                which is read as it is needed. An empty list for a video still to come.
            pixel_values: `(frames, 3, size, size)`, normalised, or an iterable of such tensors.
            image_sizes: `(width, height)` of an image in tiles.
            ratio: as `forward`'s.
            frames, fps: of a file, how many frames or how many per second. By default 1 per
                second, and of a video longer than 128 s 128 frames, evenly spaced.
            tokens: visual tokens to make room for, where an iterable does not tell.
            progress: called with how many frames (for features: tokens) are done, and how many
                there are, None if unknown.

        Returns:
            The memory. Go on watching with its `append`.

        Raises:
            ValueError: not exactly one of video, visual_features and pixel_values, or an argument
                that `forward` refuses, too.
        """
        given = {"video": video, "visual_features": visual_features, "pixel_values": pixel_values}
        given_one("watch", given)
        encoder, plan = self.encoder(), self.make_plan(ratio)
        ids = self.processor.prefix_ids() if input_ids is None else input_ids
        prefix = prefix_row(ids, self.config.vocab_size).to(self.device)
        source = open_source(
            self._visual_encoder(), **given, image_sizes=image_sizes, frames=frames, fps=fps
        )
        if tokens is None:
            tokens = (source.total or 0) * source.unit
        room = encoder.cached_tokens(plan, tokens) + len(prefix) + SLACK_TOKENS
        state = VideoState(encoder.cache(room).new(), plan)
        encoder.append_prefix(state, prefix)
        for features in source.pieces:
            encoder.append(state, features, more_follow=True)
            if progress is not None:
                progress(state.visual_tokens // source.unit, source.total)
        encoder.complete(state)
        encoder.flush(state)
        return VideoMemory(self, StreamBatch([state]))

    @torch.no_grad()
    def append_video(
        self, state: VideoState, frames: Any, visual_features: Any, pixel_values: Any
    ) -> None:
        """What `VideoMemory.append` was given, at the end of a state."""
        given = {"frames": frames, "visual_features": visual_features, "pixel_values": pixel_values}
        given_one("append", given)
        visual = self._visual_encoder()
        if frames is not None:
            pixel_values = visual.preprocess(frames)
        source = open_source(visual, visual_features=visual_features, pixel_values=pixel_values)
        encoder = self.encoder()
        for features in source.pieces:
            encoder.append(state, features)

    def load_memory(self, path: str | os.PathLike[str]) -> VideoMemory:
        """A memory that `VideoMemory.save` wrote, for this model."""
        return VideoMemory.load(path, self)
