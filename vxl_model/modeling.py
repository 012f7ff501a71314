"""Video-XL: a Qwen2 that watches long videos through VSTs, on `vxl_kernels`.

Source: Video-XL (arXiv 2409.14485); numbers of the published code on small random weights are
in `tests/goldens`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import training_forward
from .checkpoint import CheckpointMixin
from .decoder.configuration import VideoXLConfig
from .decoder.layers import VideoXLModel, VideoXLPreTrainedModel
from .errors import fail
from .generation import VideoXLGenerationMixin, VideoXLOutput, given_cache
from .inputs.arguments import IMAGE_TOKEN, TextRow, VisualSource, text_rows, visual_sources
from .settings import ExecutionSettings
from .streaming.encoder import Encoder
from .streaming.memory import SLACK_TOKENS, VideoMemory
from .streaming.ratios import RatioPlan, WindowRatios, make_plan
from .streaming.stream import Stream
from .video.prefetch import prefetch

__all__ = ["VideoXLForConditionalGeneration", "VideoXLOutput"]

Ratio = int | Sequence[int] | WindowRatios | None


class VideoXLForConditionalGeneration(
    CheckpointMixin, VideoXLPreTrainedModel, VideoXLGenerationMixin
):
    """Video-XL with its language model head.

    Attributes:
        settings: how it computes (`ExecutionSettings`).
        ratio: ratios to use where a call names none; None for the configuration's.
    """

    accepts_loss_kwargs = True  # HF's Trainer passes num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: VideoXLConfig) -> None:
        super().__init__(config)
        self.model = VideoXLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.settings = ExecutionSettings()
        self.ratio: Ratio = None
        self._processor: Any = None
        self.post_init()

    # -- parts ---------------------------------------------------------------------------

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

    def encoder(self) -> Encoder:
        """Runs streams through the decoder as `settings` say."""
        devices = set(getattr(self, "hf_device_map", {}).values())
        if len(devices) > 1:
            fail("device_map", f"parts on {sorted(map(str, devices))}", "one device")
        return Encoder(self.model, self.settings)

    def encode_pixels(self, pixel_values: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Visual tokens `(tokens, hidden)` of frames `(frames, 3, size, size)`, some frames at a
        time."""
        from .decoder.vision_tower import encode_frames

        return encode_frames(pixel_values, self._tower, self.model.mm_projector)

    @property
    def _tower(self) -> Any:
        tower = getattr(self.model, "vision_tower", None)
        if tower is None:
            fail("pixels", "a model without a vision tower", "visual_features")
        return tower

    def make_plan(self, ratio: Ratio = None) -> RatioPlan:
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
        attention_mask: Tensor | None = None,
        past_key_values: VideoMemory | None = None,
        cache: VideoMemory | None = None,
        logits_to_keep: int | None = None,
        copies: int = 1,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> VideoXLOutput:
        """Logits of the text behind a video.

        Args:
            input_ids: `(batch, tokens)`, one -200 a row for the visual part.
            visual_features: `(batch, tokens, hidden)`, already projected; a list of `(tokens,
                hidden)` for videos of different lengths, None for a row without one.
            pixel_values: `(frames, 3, size, size)` of one video, or a list of such, likewise.
            image_sizes: `(width, height)` of an image in tiles, None for a video; for each row.
            labels: as input_ids, -100 where nothing is supervised. The first tail token is
                predicted by the last raw visual row.
            ratio: raw tokens per VST: an integer, a list to draw from, or `WindowRatios`; by
                default the configuration's. Draws restart with every sequence. In training also
                a list of one `WindowRatios` for each row.
            memory: a video watched before; input_ids then holds only what stands behind it.
                The memory stays as it is.
            attention_mask: 0 for padding at either end of a row.
            logits_to_keep: only so many of the last rows; by default all of the tail.
            past_key_values, cache: two names of one argument, the sequences that input_ids
                `(batch, 1)` go on; for HF's `generate`, as copies, use_cache and return_dict.
            loss_only: with labels, no logits: those of unsupervised tokens are never made.
            num_items_in_batch: for HF's `Trainer`: tokens that the loss is divided by, where
                this batch is a part of a larger one.

        With labels, in training mode, or for visual features that require a gradient, all rows
        go through each layer at once and the result is differentiable; otherwise nothing is.

        Raises:
            ValueError: an argument does not fit; nothing has been computed then.
        """
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            return self._decode(input_ids, cache)
        if isinstance(input_ids, Tensor):
            input_ids = input_ids.to(self.device)
        rows = text_rows(input_ids, attention_mask, self.config.vocab_size)
        assert input_ids is not None
        rows = rows[::copies]
        tower = getattr(self.model, "vision_tower", None)
        sources = visual_sources(
            visual_features,
            pixel_values,
            image_sizes,
            len(rows),
            self.config.hidden_size,
            tower.config.image_size if tower is not None else None,
        )
        self._refuse_mismatch(rows, sources, memory)
        features = [s.features for s in sources or () if s.features is not None]
        wants_grad = torch.is_grad_enabled() and (
            self.training or any(x.requires_grad for x in features)
        )
        if labels is not None or wants_grad:
            if memory is not None:
                fail("memory", "a memory together with labels or training", "the video itself")
            if loss_only and labels is None:
                fail("loss_only", "True without labels", "labels")
            return self._forward_training(
                input_ids, rows, sources, labels, ratio, loss_only, num_items_in_batch
            )
        ratio = cast("Ratio", ratio)
        with torch.no_grad():
            if memory is None:
                memory = self._encode(rows, sources, ratio)
            else:
                memory = memory._for_tail(len(rows))
            logits = self._tails(rows, memory, input_ids.shape[1], logits_to_keep)
            if copies > 1:
                memory = memory._select([i for i in range(len(rows)) for _ in range(copies)])
                logits = logits.repeat_interleave(copies, dim=0)
        return VideoXLOutput(logits=logits, memory=memory)

    def _refuse_mismatch(
        self,
        rows: list[TextRow],
        sources: list[VisualSource] | None,
        memory: VideoMemory | None,
    ) -> None:
        marked = [row.visual for row in rows]
        if memory is not None:
            if sources is not None:
                fail("memory", "visual input too", "one of the two")
            if any(marked):
                fail("input_ids", f"{IMAGE_TOKEN} and a memory", "the text behind the video only")
            if memory.model is not self:
                fail("memory", "the memory of another model", "one that this model made")
        elif sources is None and any(marked):
            fail("input_ids", f"{IMAGE_TOKEN}", "visual_features or pixel_values for it")
        for i, source in enumerate(sources or ()):
            if not source.empty and not marked[i]:
                fail("input_ids", f"no {IMAGE_TOKEN} in row {i}", "one a row")
            if source.empty and marked[i]:
                fail("input_ids", f"{IMAGE_TOKEN} in row {i}", "visual input for that row")

    def _features(self, source: VisualSource) -> Iterator[Tensor]:
        if source.features is not None:
            return iter([source.features])
        return self.encode_pixels(source.pixels) if source.pixels is not None else iter(())

    def _whole_features(self, source: VisualSource) -> Tensor | None:
        """All at once, for a pass over whole sequences; one piece is not copied."""
        pieces = list(self._features(source))
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return torch.cat(pieces)

    def _visual_tokens(self, source: VisualSource) -> int:
        if source.features is not None:
            return len(source.features)
        return len(source.pixels) * self.tokens_per_frame if source.pixels is not None else 0

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame: 144 in the released model."""
        return (self._tower.side // 2) ** 2

    def _encode(
        self, rows: list[TextRow], sources: list[VisualSource] | None, ratio: Ratio
    ) -> VideoMemory:
        """Prompts and videos, each as if it were alone."""
        encoder, plan = self.encoder(), self.make_plan(ratio)
        tokens = SLACK_TOKENS // 4
        for i, row in enumerate(rows):
            visual = self._visual_tokens(sources[i]) if sources else 0
            tokens += encoder.kept_tokens(plan, visual) + len(row.prompt) + len(row.tail)
            tokens += 2 * self.settings.page_size  # a page that is not full, and its copy
        pool = encoder.pool(tokens)
        streams = []
        for i, row in enumerate(rows):
            stream = Stream(pool.new(), plan.copy())
            encoder.prompt(stream, row.prompt)
            for features in self._features(sources[i]) if sources else ():
                encoder.feed(stream, features, more_follow=True)
            encoder.feed(stream, self._no_features())
            streams.append(encoder.seal(stream))
        return VideoMemory(self, streams)

    def _no_features(self) -> Tensor:
        return torch.empty(0, self.config.hidden_size, device=self.device, dtype=self.dtype)

    def _tails(
        self, rows: list[TextRow], memory: VideoMemory, columns: int, keep: int | None
    ) -> Tensor:
        """Logits `(batch, columns behind the first tail, vocabulary)`."""
        encoder = self.encoder()
        first = min(row.tail_start for row in rows)
        if keep:
            first = max(first, columns - keep)
        logits = None
        for i, row in enumerate(rows):
            wanted = row.tail_stop - max(row.tail_start, first)
            if wanted < 1:
                fail("attention_mask", f"padding at the end of row {i}", "padding at the start")
            hidden = encoder.tail([memory._streams[i]], row.tail[None], wanted)
            own = self.lm_head(hidden)[0]
            if logits is None:
                logits = own.new_zeros(len(rows), columns - first, own.shape[-1])
            logits[i, row.tail_stop - wanted - first : row.tail_stop - first] = own
        assert logits is not None
        return logits

    @torch.no_grad()
    def _decode(self, input_ids: Tensor | None, memory: VideoMemory) -> VideoXLOutput:
        """One more token of every sequence."""
        assert input_ids is not None
        hidden = self.encoder().tail(memory._streams, input_ids, None)
        parts = hidden.split(1) if self.settings.batch_invariant else (hidden,)
        logits = torch.cat([self.lm_head(x) for x in parts])
        return VideoXLOutput(logits=logits, memory=memory)

    def _forward_training(
        self,
        input_ids: Tensor,
        rows: list[TextRow],
        sources: list[VisualSource] | None,
        labels: Tensor | None,
        ratio: Ratio | Sequence[WindowRatios | None],
        loss_only: bool,
        tokens: Tensor | float | None,
    ) -> VideoXLOutput:
        if labels is not None:
            labels = labels.to(input_ids.device)
            training_forward.check_labels(labels, input_ids, self.config.vocab_size)
        # FSDP gathers each layer's weights around it; nothing gathers tensor parallelism's.
        if torch.is_grad_enabled() and not isinstance(self, FSDPModule):
            first_layer: Any = self.model.layers[0]  # tensor parallelism cuts them all
            if isinstance(first_layer.self_attn.q_proj.weight, DTensor):
                fail("training", "a tensor-parallel model", "inference, or the model in one piece")
        encoder, plans = self.encoder(), self._row_plans(ratio, len(rows))
        keep = not torch.is_grad_enabled()
        first = min(row.tail_start for row in rows)
        features = [self._whole_features(x) for x in sources or [VisualSource()] * len(rows)]
        by_row: dict[int, training_forward.SequencePass] = {}
        for members in training_forward.alike(rows, features, plans, self.settings):
            texts = [rows[i] for i in members]
            visual = [features[i] for i in members]
            plan = plans[members[0]].copy()
            passed = training_forward.train_pass(encoder, texts, visual, plan, keep)
            by_row.update(zip(members, passed, strict=True))
        passes = [by_row[i] for i in range(len(rows))]
        columns = []
        for one, row in zip(passes, rows, strict=True):
            if not loss_only:
                pad = (0, 0, row.tail_start - first, input_ids.shape[1] - row.tail_stop)
                columns.append(nn.functional.pad(self.lm_head(one.hidden[one.tail]), pad))
        loss = None
        if labels is not None:
            loss = training_forward.loss_of(passes, rows, labels, self.lm_head, tokens)
            if self.training and torch.is_grad_enabled():
                loss = loss + self._idle_vision(rows)
        memory = self._kept(encoder, passes, plans) if keep else None
        stacked = torch.stack(columns) if columns else None
        return VideoXLOutput(loss=loss, logits=stacked, memory=memory)

    def _idle_vision(self, rows: list[TextRow]) -> Tensor | float:
        """0, with a graph through vision tower and projector; see `train_pass`."""
        if all(row.visual for row in rows) or not hasattr(self.model, "mm_projector"):
            return 0.0
        size = self._tower.config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        return 0 * torch.cat(list(self.encode_pixels(blank))).sum()

    def _row_plans(
        self, ratio: Ratio | Sequence[WindowRatios | None], batch: int
    ) -> list[RatioPlan]:
        """A plan for each row."""
        each = list(ratio) if isinstance(ratio, Sequence) else []
        if not any(r is None or isinstance(r, WindowRatios) for r in each):
            return [self.make_plan(cast("Ratio", ratio))] * batch
        if len(each) != batch:
            fail("ratio", f"{len(each)} WindowRatios", f"{batch}, one for each row")
        return [self.make_plan(cast("Ratio", r)) for r in each]

    def _kept(
        self,
        encoder: Encoder,
        passes: list[training_forward.SequencePass],
        plans: list[RatioPlan],
    ) -> VideoMemory:
        """A memory of what a training pass has kept."""
        kept = [one.kept for one in passes]
        tokens = sum(x.shape[2] + 2 * self.settings.page_size for x in kept if x is not None)
        pool = encoder.pool(tokens + SLACK_TOKENS // 4)
        streams = []
        for one, plan in zip(passes, plans, strict=True):
            assert one.kept is not None
            stream = Stream(pool.restore(one.kept), plan.copy(), sizes=one.sizes, closed=True)
            streams.append(stream)
        return VideoMemory(self, streams)

    # -- watching -------------------------------------------------------------------------

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
        """Encodes prompt and video once; ask the memory as often as you like.

        Args:
            video: a file, or uint8 frames `(frames, height, width, 3)`, or batches of such.
            input_ids: ids before the video, with or without a final -200; by default the
                released model's prompt, for which the checkpoint needs a tokenizer.
            visual_features: `(tokens, hidden)`, already projected, or an iterable of such,
                which is read as it is needed; a list of nothing for a video still to come.
            pixel_values: `(frames, 3, size, size)`, normalised, or an iterable of such.
            image_sizes: `(width, height)` of an image in tiles.
            ratio: as `forward`'s.
            frames, fps: of a file, how many frames or how many a second; by default 1 a second
                up to 128, else 128 evenly spaced.
            tokens: visual tokens to make room for, where an iterable does not tell.
            progress: called with the frames (for features: tokens) done and in all, if known.

        Returns:
            The memory. Go on watching with its `append`.

        Raises:
            ValueError: not exactly one of video, visual_features and pixel_values, or as
                `forward`.
        """
        given = {"video": video, "visual_features": visual_features, "pixel_values": pixel_values}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            fail("watch", " and ".join(names) or "no video", f"one of {', '.join(given)}")
        encoder, plan = self.encoder(), self.make_plan(ratio)
        prompt = self._prompt_ids(input_ids)
        if video is not None:
            pieces, total, unit = self._frames_of(video, frames, fps)
        elif pixel_values is not None:
            pieces, total, unit = self._pixels_of(pixel_values, image_sizes)
        else:
            assert visual_features is not None
            pieces, total, unit = self._features_of(visual_features)
        if tokens is None:
            tokens = (total or 0) * unit
        room = encoder.kept_tokens(plan, tokens) + len(prompt) + SLACK_TOKENS
        stream = Stream(encoder.pool(room).new(), plan)
        encoder.prompt(stream, prompt)
        for features in pieces:
            encoder.feed(stream, features, more_follow=True)
            if progress is not None:
                progress(stream.visual_tokens // unit, total)
        encoder.feed(stream, self._no_features())
        encoder.seal(stream)
        return VideoMemory(self, [stream])

    def load_memory(self, path: str | os.PathLike[str]) -> VideoMemory:
        """A memory that `VideoMemory.save` wrote, for this model."""
        return VideoMemory.load(path, self)

    def _prompt_ids(self, input_ids: Any) -> Tensor:
        if input_ids is None:
            input_ids = self.processor.prefix_ids()
        ids = torch.as_tensor(input_ids, dtype=torch.long).reshape(-1)
        if len(ids) and ids[-1] == IMAGE_TOKEN:
            ids = ids[:-1]
        wrong = (ids < 0) | (ids >= self.config.vocab_size)
        if bool(wrong.any()):
            got = int(ids[wrong][0])
            if got == IMAGE_TOKEN:
                fail("input_ids", f"tokens behind {IMAGE_TOKEN}", "the ids before the video only")
            fail("input_ids", f"id {got}", f"0 to {self.config.vocab_size - 1}")
        return ids.to(self.device)

    def _frames_of(
        self, video: Any, frames: int | None, fps: float | None
    ) -> tuple[Iterator[Tensor], int | None, int]:
        """Features of a file or of uint8 frames, piece by piece; frames in all; tokens a
        frame. Decoding and preprocessing run in threads of their own."""
        if isinstance(video, str | os.PathLike):
            from .video.reader import open_video

            size = self._tower.config.image_size
            video = open_video(Path(video), frames=frames, fps=fps, size=size)
        elif frames is not None or fps is not None:
            fail("frames and fps", "frames in memory", "a file")
        elif hasattr(video, "ndim"):
            video = [video]
        total = getattr(video, "num_frames", None)
        if total is None and isinstance(video, list):
            total = sum(len(x) for x in video)
        pixels = prefetch(self._frame_pixels(batch) for batch in video)
        return self.encode_pixels(pixels), total, self.tokens_per_frame

    def _frame_pixels(self, frames: Any) -> Tensor:
        frames = torch.as_tensor(frames)
        if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
            got = f"shape {tuple(frames.shape)}, {frames.dtype}"
            fail("frames", got, "uint8 (frames, height, width, 3)")
        return self.processor.frames_to_pixels(frames)

    def _pixels_of(self, pixels: Any, image_sizes: Any) -> tuple[Iterator[Tensor], int | None, int]:
        if isinstance(pixels, Tensor):
            size = self._tower.config.image_size
            sources = visual_sources(None, pixels, image_sizes, 1, 0, size)
            assert sources is not None
            pixels = sources[0].pixels
            return self.encode_pixels(pixels), len(pixels), self.tokens_per_frame
        return self.encode_pixels(pixels), None, self.tokens_per_frame

    def _features_of(self, features: Any) -> tuple[Iterator[Tensor], int | None, int]:
        hidden = self.config.hidden_size

        def checked(x: Any) -> Tensor:
            sources = visual_sources(x, None, None, 1, hidden, None)
            assert sources is not None
            assert sources[0].features is not None
            return sources[0].features

        if isinstance(features, Tensor):
            one = checked(features)
            return iter([one]), len(one), 1
        return (checked(x) for x in features), None, 1

    @torch.no_grad()
    def _feed(
        self,
        stream: Stream,
        frames: Any,
        visual_features: Any,
        pixel_values: Any,
    ) -> None:
        """What `VideoMemory.append` was given, at the end of a stream."""
        given = {"frames": frames, "visual_features": visual_features, "pixel_values": pixel_values}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            fail("append", " and ".join(names) or "nothing", f"one of {', '.join(given)}")
        if frames is not None:
            pieces = self.encode_pixels(self._frame_pixels(frames))
        elif pixel_values is not None:
            pieces = self._pixels_of(pixel_values, None)[0]
        else:
            pieces = self._features_of(visual_features)[0]
        work = stream.fork()  # so that an error leaves the stream as it was
        for features in pieces:
            self.encoder().feed(work, features)
        vars(stream).update(vars(work))
