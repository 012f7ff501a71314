"""Prefix, windows and suffix through the decoder into a cache, a bounded number of rows at a time.

Source: Video-XL section 3.2. The published code takes one window a pass and computes logits for
each of its rows. Here several windows go together, and what is not read is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vxl_kernels import CacheBatch, ChunkLayout, VarlenLayout, VstCache, serves

from ..decoder.configuration import VideoXLConfig
from ..decoder.context import FEW_ROWS, CacheContext, PagesOf
from ..decoder.layers import VideoXLDecoder
from ..errors import fail
from ..settings import ExecutionSettings
from .cache_pool import GrowingCache, SequenceHandle
from .ratios import RatioPlan
from .state import VideoState

__all__ = ["StreamEncoder", "default_chunks"]

_MAX_CHUNKS = 8
_CPU_ROWS = 1024
_SHARE_OF_MEMORY = 32  # the activations of a step may take 1 / 32 of the device's memory


def default_chunks(config: VideoXLConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Windows per step. On a CPU the fewest that give products of about a thousand rows: one
    window of the released model does, and more only cost memory. On a GPU at most 8, and not more
    than a small share of its memory has room for the activations of."""
    if device.type == "cpu":
        return max(1, min(_MAX_CHUNKS, -(-_CPU_ROWS // config.beacon_window)))
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    # Residual, normed rows, q, k, v and the attention's result, and three tensors of the MLP.
    width = 6 * config.hidden_size + 3 * config.intermediate_size
    smallest = min(config.beacon_ratio if isinstance(config.beacon_ratio, list) else [2])
    rows = config.beacon_window + config.beacon_window // smallest
    chunks = total // _SHARE_OF_MEMORY // (rows * width * dtype.itemsize)
    return max(1, min(_MAX_CHUNKS, chunks))


class StreamEncoder:
    """Runs videos through a decoder.

    Args:
        decoder: the decoder.
        settings: how it computes.
        shared: the cache of all sequences; by default each memory has its own.
    """

    def __init__(
        self,
        decoder: VideoXLDecoder,
        settings: ExecutionSettings,
        shared: GrowingCache | None = None,
    ) -> None:
        self.decoder, self.settings, self.shared = decoder, settings, shared
        self.window: int = decoder.config.beacon_window
        self.device, self.dtype = decoder.device, decoder.beacon_embed_tokens.weight.dtype

    @property
    def chunks(self) -> int:
        chunks = self.settings.chunks_per_step
        if chunks is None:
            return default_chunks(self.decoder.config, self.device, self.dtype)
        if not isinstance(chunks, int) or chunks < 1:
            fail("chunks_per_step", repr(chunks), "at least 1, or None")
        return chunks

    def cache(self, tokens: int) -> GrowingCache:
        """The cache for a new memory: the shared one, or one with room for this many rows."""
        return self.new_cache(tokens) if self.shared is None else self.shared

    def new_cache(self, tokens: int, fixed: bool = False) -> GrowingCache:
        """An empty cache with room for this many rows, which grows unless it is `fixed`."""
        config, page_size = self.decoder.config, self.settings.page_size

        def make(pages: int) -> VstCache:
            return VstCache(
                config.num_hidden_layers,
                self.decoder.kv_heads,
                config.head_dim,
                num_pages=pages,
                page_size=page_size,
                dtype=self.dtype,
                device=self.device,
            )

        return GrowingCache(make, tokens, page_size, fixed)

    # -- what a video will leave ------------------------------------------------------

    def cached_tokens(self, plan: RatioPlan, tokens: int) -> int:
        """VSTs that this many raw tokens will leave. Changes nothing."""
        if len(plan.allowed) == 1:
            full, rest = divmod(tokens, self.window)
            ratio = plan.allowed[0]
            return full * (self.window // ratio) + rest // ratio
        plan, kept = plan.copy(), 0
        for start in range(0, tokens, self.window):
            size = min(self.window, tokens - start)
            kept += size // plan.next(size)
        return kept

    def final_vst_counts(self, state: VideoState) -> list[int]:
        """VSTs of every step if the video ended here. Encodes nothing."""
        counts, left = list(state.vst_counts), state.pending_tokens
        plan, drawn = state.plan.copy(), list(state.drawn_ratios)
        while left:
            tokens = min(self.window, left)
            counts.append(tokens // (drawn.pop(0) if drawn else plan.next(tokens)))
            left -= tokens
        return counts

    # -- passes ----------------------------------------------------------------------

    def append_prefix(self, state: VideoState, ids: Tensor) -> None:
        """Text before the video, ids `(tokens,)`. Every token is kept, and no output is read."""
        if len(ids):
            self._run([state.sequence], self.decoder.embed_tokens(ids[None]), None, 0)
        state.vst_counts.append(0)

    def append(self, state: VideoState, features: Tensor, more_follow: bool = False) -> None:
        """Visual tokens `(tokens, hidden)`. What does not fill a window waits. With `more_follow`
        so does what does not fill a whole step, until `complete`. The tensor itself is not kept:
        its owner may fill it again."""
        state.pending.append(features)
        state.visual_tokens += len(features)
        state.flushed = None
        self._full_windows(state, self.chunks if more_follow else 1)
        if len(features) and state.pending:
            state.pending[-1] = state.pending[-1].clone()

    def complete(self, state: VideoState) -> None:
        """Encodes the full windows that still wait for a whole step."""
        self._full_windows(state, 1)

    def flush(self, state: VideoState) -> VideoState:
        """The state as if the video ended here: a fork whose last, partial window is encoded too,
        or the state itself if nothing is pending."""
        if not state.pending_tokens:
            return state
        if state.flushed is None:
            flushed = state.fork()
            while flushed.pending_tokens:
                tokens = min(self.window, flushed.pending_tokens)
                drawn = flushed.drawn_ratios
                ratio = drawn.pop(0) if drawn else flushed.plan.next(tokens)
                self._windows(flushed, tokens, ratio, 1)
            state.flushed = flushed
        return state.flushed

    def append_suffix(
        self,
        states: Sequence[VideoState],
        text: Tensor,
        output_rows: int | None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Text, ids `(batch, tokens)` or embeddings `(batch, tokens, hidden)`, at the end of one
        state for each row: normed hidden states of the last `output_rows` rows, of all for None.
        `collect` receives what `VideoXLDecoder.run` collects."""
        sequences = [state.sequence for state in states]
        hidden = self._run(sequences, self.embed(text), None, output_rows, collect)
        assert hidden is not None
        _finish(states)
        return hidden

    def append_texts(self, states: Sequence[VideoState], texts: Sequence[Tensor]) -> Tensor:
        """Texts of any lengths, ids `(tokens,)` or embeddings `(tokens, hidden)`, at the end of one
        state each. Returns the normed hidden state of each last row, `(texts, hidden)`. If it
        raises, no text was appended. The result of a text is bitwise equal to that of a call with
        this text only: short texts go through the layers together. Longer ones, which fill a
        product by themselves, follow one after another, as by `append_suffix`. Without batch
        invariance all go together.
        """
        settings, device = self.settings, self.device
        inv_freq, decoder = self.decoder.inv_freq(), self.decoder
        sizes = [len(text) for text in texts]
        few = [i for i, n in enumerate(sizes) if n <= FEW_ROWS or not settings.batch_invariant]
        like = torch.empty(0, dtype=self.dtype, device=device)
        if not serves("vst_attention_varlen", like, settings.backend):
            few = []
        alone = [[i] for i in range(len(texts)) if i not in few]
        last: list[Tensor] = [like] * len(texts)

        def run(batch: CacheBatch) -> Tensor:
            for rows in [few, *alone] if few else alone:
                layout = VarlenLayout([sizes[i] for i in rows], device) if rows is few else None
                context = CacheContext(PagesOf(batch, rows), layout, inv_freq, settings)
                hidden = torch.cat([self.embed(texts[i]) for i in rows])[None]
                out = decoder.run(hidden, context, 1)
                assert out is not None
                for i, row in zip(rows, out[:, -1], strict=True):
                    last[i] = row
            return torch.stack(last)

        return self.step(states, sizes, run)

    def step(
        self,
        states: Sequence[VideoState],
        rows: int | list[int],
        run: Callable[[CacheBatch], Tensor],
    ) -> Tensor:
        """`rows` more tokens at the end of every state, or one number for each, by `run`, which is
        given the sequences with room for them. If it raises, they are as before."""
        sequences = [state.sequence for state in states]
        with sequences[0].cache.step(sequences, rows) as batch:
            out = run(batch)
        _finish(states)
        return out

    def text_context(self, batch: CacheBatch) -> CacheContext:
        """Of ordinary tokens."""
        return CacheContext(batch, None, self.decoder.inv_freq(), self.settings)

    def chunk_rows(self, features: Tensor, layout: ChunkLayout) -> Tensor:
        """Input rows `(batch, rows, hidden)` of chunks: features `(batch, tokens, hidden)` and VST
        embeddings in the layout's order. Differentiable."""
        features = features.to(self.device, self.dtype)
        vst = self.decoder.vst_embedding().to(self.dtype)
        vsts = vst.expand(len(features), layout.chunks * layout.vsts_per_chunk, -1)
        rows = torch.cat([features, vsts], dim=1)
        if layout.order == "interleaved":
            rows = rows[:, layout.interleaved_to_split(self.device).argsort()]
        return rows

    def embed(self, text: Tensor) -> Tensor:
        """Embeddings of ids. Embeddings are returned in the model's dtype."""
        if text.is_floating_point():
            return text.to(self.device, self.dtype)
        return self.decoder.embed_tokens(text)

    # -- private -----------------------------------------------------------------------

    def _full_windows(self, state: VideoState, least: int) -> None:
        """Encodes full windows as long as there are `least` of them."""
        chunks = self.chunks
        while state.pending_tokens >= least * self.window:
            count = min(chunks, state.pending_tokens // self.window)
            while len(state.drawn_ratios) < count:
                state.drawn_ratios.append(state.plan.next(self.window))
            drawn = state.drawn_ratios[:count]
            same = next((i for i, ratio in enumerate(drawn) if ratio != drawn[0]), count)
            self._windows(state, self.window, drawn[0], same)
            del state.drawn_ratios[:same]

    def _windows(self, state: VideoState, tokens: int, ratio: int, chunks: int) -> None:
        """The next `chunks` windows of `tokens` raw tokens each."""
        if ratio > tokens:  # there is no VST, so no later row sees these tokens
            state.take(tokens * chunks, self.device)
            state.vst_counts += [0] * chunks
            return
        layout = ChunkLayout(tokens, ratio, chunks, self.settings.order)
        pending = list(state.pending)
        try:
            features = state.take(tokens * chunks, self.device)
            self._run([state.sequence], self.chunk_rows(features[None], layout), layout, 0)
        except BaseException:
            state.pending = pending
            raise
        state.vst_counts += [layout.vsts_per_chunk] * chunks

    def _run(
        self,
        sequences: Sequence[SequenceHandle],
        hidden: Tensor,
        layout: ChunkLayout | None,
        output_rows: int | None,
        collect: list[Tensor] | None = None,
    ) -> Tensor | None:
        """Rows `(batch, rows, hidden)` through all layers, as `VideoXLDecoder.run`. If it raises,
        the sequences are as before."""
        rows = hidden.shape[1] if layout is None else layout.chunks * layout.vsts_per_chunk
        if output_rows == 0 and not self.settings.skip_last_layer_outputs:
            output_rows = None
        with sequences[0].cache.step(sequences, rows) as batch:
            context = CacheContext(batch, layout, self.decoder.inv_freq(), self.settings)
            return self.decoder.run(hidden, context, output_rows, collect)


def _finish(states: Sequence[VideoState]) -> None:
    """They have read text after their videos."""
    for state in states:
        state.vst_counts.append(0)
        state.finished = True
