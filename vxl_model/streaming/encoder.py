"""Prompt, windows and tail through the decoder into a cache, a bounded number of rows at a time.

Source: Video-XL section 3.2. Where the published code takes one window a pass and computes
logits for each of its rows, here several windows go together and nothing is computed that
nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vxl_kernels import ChunkLayout, VstCache

from ..decoder.configuration import VideoXLConfig
from ..decoder.context import CacheStep
from ..decoder.layers import VideoXLModel
from ..settings import ExecutionSettings
from .cache_pool import CachePool, PooledSequence
from .ratios import RatioPlan
from .stream import Stream

__all__ = ["Encoder", "default_chunks"]

_MAX_CHUNKS = 8
_CPU_ROWS = 1024
_SHARE_OF_MEMORY = 32  # activations of a step may take one part in so many of the device


def default_chunks(config: VideoXLConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Windows a step. On a CPU as few as give products of a thousand rows: one window of the
    released model does, and more only take memory. On a GPU as many as a small share of its
    memory holds the activations of, 8 at most."""
    if device.type == "cpu":
        return max(1, min(_MAX_CHUNKS, -(-_CPU_ROWS // config.beacon_window)))
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    # Residual, normed rows, q, k, v and the attention's result; three of the MLP.
    width = 6 * config.hidden_size + 3 * config.intermediate_size
    smallest = min(config.beacon_ratio if isinstance(config.beacon_ratio, list) else [2])
    rows = config.beacon_window + config.beacon_window // smallest
    chunks = total // _SHARE_OF_MEMORY // (rows * width * dtype.itemsize)
    return max(1, min(_MAX_CHUNKS, chunks))


class Encoder:
    """Runs streams through a decoder.

    Args:
        core: the decoder.
        settings: how.
    """

    def __init__(self, core: VideoXLModel, settings: ExecutionSettings) -> None:
        self.core, self.settings = core, settings
        self.window: int = core.config.beacon_window
        weight = core.beacon_embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def chunks(self) -> int:
        chunks = self.settings.chunks_per_step
        if chunks is None:
            return default_chunks(self.core.config, self.device, self.dtype)
        if not isinstance(chunks, int) or chunks < 1:
            raise ValueError(f"chunks_per_step: got {chunks!r}, expected at least 1, or None")
        return chunks

    def pool(self, tokens: int) -> CachePool:
        """An empty pool with room for so many rows."""
        config, page_size = self.core.config, self.settings.page_size

        def make(pages: int) -> VstCache:
            return VstCache(
                config.num_hidden_layers,
                self.core.kv_heads,
                config.head_width,
                num_pages=pages,
                page_size=page_size,
                dtype=self.dtype,
                device=self.device,
            )

        return CachePool(make, tokens, page_size)

    def kept_tokens(self, plan: RatioPlan, tokens: int) -> int:
        """VSTs that so many raw tokens will leave; changes nothing."""
        if len(plan.allowed) == 1:
            full, rest = divmod(tokens, self.window)
            ratio = plan.allowed[0]
            return full * (self.window // ratio) + rest // ratio
        plan, kept = plan.copy(), 0
        for start in range(0, tokens, self.window):
            size = min(self.window, tokens - start)
            kept += size // plan.next(size)
        return kept

    # -- passes ----------------------------------------------------------------------

    def run(
        self,
        sequences: Sequence[PooledSequence],
        hidden: Tensor,
        layout: ChunkLayout | None,
        keep_rows: int | None,
    ) -> Tensor | None:
        """Rows `(batch, rows, hidden)` through all layers; see `VideoXLModel.forward`. When it
        raises, the sequences are as before."""
        rows = hidden.shape[1]
        if layout is not None:
            rows = layout.chunks * layout.vsts_per_chunk
        if keep_rows == 0 and not self.settings.skip_last_layer_outputs:
            keep_rows = None
        batch = sequences[0].pool.batch(sequences, rows)
        step = CacheStep(batch, layout, self.core.inv_freq(), self.settings)
        out = self.core(hidden, step, keep_rows)
        batch.commit(rows)
        return out

    def prompt(self, stream: Stream, ids: Tensor) -> None:
        """Text before the video, ids `(tokens,)`: every token is kept, no output is read."""
        if len(ids):
            self.run([stream.sequence], self.core.embed_tokens(ids[None]), None, 0)
        stream.sizes.append(0)

    def tail(self, streams: Sequence[Stream], ids: Tensor, keep_rows: int | None) -> Tensor:
        """Text `(batch, tokens)` at the end of as many streams: normed hidden states of the
        last `keep_rows` rows, all for None."""
        sequences = [s.sequence for s in streams]
        hidden = self.run(sequences, self.core.embed_tokens(ids), None, keep_rows)
        assert hidden is not None
        for stream in streams:
            stream.sizes.append(0)
            stream.closed = True
        return hidden

    def feed(self, stream: Stream, features: Tensor, more_follow: bool = False) -> None:
        """Visual tokens `(tokens, hidden)` at the end of a stream. What fills no window waits;
        with `more_follow`, so does what fills no whole step."""
        stream.pending.append(features)
        stream.visual_tokens += len(features)
        stream.sealed = None
        chunks = self.chunks
        least = chunks * self.window if more_follow else self.window
        while stream.pending_tokens >= least:
            count = min(chunks, stream.pending_tokens // self.window)
            while len(stream.drawn) < count:
                stream.drawn.append(stream.plan.next(self.window))
            ratio = stream.drawn[0]
            same = next((i for i, r in enumerate(stream.drawn[:count]) if r != ratio), count)
            self._windows(stream, self.window, ratio, same)
            del stream.drawn[:same]

    def sizes_if_ended(self, stream: Stream) -> list[int]:
        """VSTs of every step if the video ended here; encodes nothing."""
        sizes, left = list(stream.sizes), stream.pending_tokens
        plan, drawn = stream.plan.copy(), list(stream.drawn)
        while left:
            tokens = min(self.window, left)
            sizes.append(tokens // (drawn.pop(0) if drawn else plan.next(tokens)))
            left -= tokens
        return sizes

    def seal(self, stream: Stream) -> Stream:
        """The stream as if the video ended here: a fork whose last, partial window is encoded
        too; the stream itself if there is none."""
        if not stream.pending_tokens:
            return stream
        if stream.sealed is None:
            sealed = stream.fork()
            while sealed.pending_tokens:
                tokens = min(self.window, sealed.pending_tokens)
                ratio = sealed.drawn.pop(0) if sealed.drawn else sealed.plan.next(tokens)
                self._windows(sealed, tokens, ratio, 1)
            stream.sealed = sealed
        return stream.sealed

    def _windows(self, stream: Stream, tokens: int, ratio: int, chunks: int) -> None:
        """The next `chunks` windows of `tokens` raw tokens each."""
        if ratio > tokens:  # no VST: nobody ever sees these tokens
            stream.take(tokens * chunks)
            stream.sizes += [0] * chunks
            return
        layout = ChunkLayout(tokens, ratio, chunks, self.settings.order)
        pending = list(stream.pending)
        try:
            features = stream.take(tokens * chunks)
            self.run([stream.sequence], self.chunk_rows(features[None], layout), layout, 0)
        except BaseException:
            stream.pending = pending
            raise
        stream.sizes += [layout.vsts_per_chunk] * chunks

    def chunk_rows(self, features: Tensor, layout: ChunkLayout) -> Tensor:
        """Input rows `(batch, rows, hidden)` of chunks: features `(batch, tokens, hidden)` and VST
        embeddings in the layout's order. Differentiable."""
        features = features.to(self.device, self.dtype)
        vst = self.core.beacon_embed_tokens.weight
        vsts = vst.expand(len(features), layout.chunks * layout.vsts_per_chunk, -1)
        rows = torch.cat([features, vsts], dim=1)
        if layout.order == "interleaved":
            rows = rows[:, layout.interleaved_to_split(self.device).argsort()]
        return rows
