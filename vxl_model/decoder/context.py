"""What the rows of a pass through the decoder attend to.

`CacheStep`: rows over sequences in a paged cache, for inference. `TrainingStep`: prompt, all
windows and tail of one sequence at once, differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vxl_kernels import CacheBatch, ChunkLayout, rope_append, vst_attention

from ..settings import ExecutionSettings
from .attention import VideoXLAttention

__all__ = ["CacheStep", "Segment", "Step", "TrainingStep"]


class Step(Protocol):
    def parts(self, hidden: Tensor) -> list[Tensor]:
        """Slices of the batch that go through dense products together."""

    def attention(self, attn: VideoXLAttention, normed: list[Tensor]) -> list[Tensor]:
        """Attention before `o_proj` of each part, heads flattened."""

    def kept_rows(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """The rows whose K and V are kept, and whether they are VSTs."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps K, not rotated yet, and V of those rows."""


class CacheStep:
    """Rows of sequences in a cache, which has room for them.

    Args:
        batch: the sequences; `reserve` was called.
        layout: what the rows are; None for ordinary tokens.
        inv_freq: rotation per position.
    """

    def __init__(
        self,
        batch: CacheBatch,
        layout: ChunkLayout | None,
        inv_freq: Tensor,
        settings: ExecutionSettings,
    ) -> None:
        self.batch, self.layout, self.inv_freq = batch, layout, inv_freq
        self.settings = settings

    def parts(self, hidden: Tensor) -> list[Tensor]:
        return list(hidden.split(1)) if self.settings.batch_invariant else [hidden]

    def attention(self, attn: VideoXLAttention, normed: list[Tensor]) -> list[Tensor]:
        backend = self.settings.backend
        projected = [attn.project(x, self.layout, backend) for x in normed]
        if len(projected) == 1:
            q, k, v = projected[0]
        else:
            q, k, v = (torch.cat(x) for x in zip(*projected, strict=True))
        cache = self.batch.layer(attn.layer_idx)
        q, k = rope_append(
            q, k, v, *cache, self.layout, self.inv_freq, inplace=True, backend=backend
        )
        out = vst_attention(q, k, v, *cache, self.layout, backend=backend).flatten(2)
        return [out] if len(normed) == 1 else list(out.split(1))

    def kept_rows(self, hidden: Tensor) -> tuple[Tensor, bool]:
        layout = self.layout
        if layout is None:
            return hidden, False
        if layout.order == "split":
            return hidden[:, layout.chunks * layout.window :], True
        return hidden[:, layout.vst_rows(hidden.device)], True

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        # The VSTs of all chunks follow one another in the cache, each rotated to its place
        # there: just what ordinary tokens do. There is no q; k stands in for it.
        cache = self.batch.layer(layer)
        rope_append(k, k, v, *cache, None, self.inv_freq, backend=self.settings.backend)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a training pass: prompt, windows of one ratio, or tail.

    Attributes:
        layout: what the rows are; None for ordinary tokens.
        rows: how many.
        cached: tokens kept before them.
    """

    layout: ChunkLayout | None
    rows: int
    cached: int

    @property
    def kept(self) -> int:
        if self.layout is None:
            return self.rows
        return self.layout.chunks * self.layout.vsts_per_chunk


class TrainingStep:
    """All rows of sequences of one shape, `(batch, rows, hidden)`, segment after segment.

    In each layer every segment first appends what it keeps to its sequence's page, then all
    attend. So no attention saves a cache for the backward pass that is written afterwards.

    Args:
        keep: remember each layer's K and V in `kept`.
        idle_vsts: no segment has VSTs, and their projections take part with factor 0.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        batch: int,
        inv_freq: Tensor,
        settings: ExecutionSettings,
        keep: bool = False,
        idle_vsts: bool = False,
    ) -> None:
        self.segments = list(segments)
        self.inv_freq, self.settings, self.idle_vsts = inv_freq, settings, idle_vsts
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        device = inv_freq.device
        self._capacity = max(s.cached + s.kept for s in segments)
        self._table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        lens = torch.tensor(
            [[s.cached] * batch for s in segments], dtype=torch.int32, device=device
        )
        self._lens = list(lens)

    def parts(self, hidden: Tensor) -> list[Tensor]:
        return [hidden]

    def attention(self, attn: VideoXLAttention, normed: list[Tensor]) -> list[Tensor]:
        backend = self.settings.backend
        rows = normed[0].split([s.rows for s in self.segments], dim=1)
        projected = [
            attn.project(x, s.layout, backend) for x, s in zip(rows, self.segments, strict=True)
        ]
        shape = (len(normed[0]), self._capacity, *projected[0][1].shape[2:])
        like = projected[0][1]  # under autocast not of the rows' dtype
        k_cache, v_cache = like.new_zeros(shape), like.new_zeros(shape)
        rotated = []
        for (q, k, v), segment, lens in zip(projected, self.segments, self._lens, strict=True):
            q, k = rope_append(
                q,
                k,
                v,
                k_cache,
                v_cache,
                self._table,
                lens,
                segment.layout,
                self.inv_freq,
                backend=backend,
            )
            rotated.append((q, k, v))
        out = [
            vst_attention(
                *qkv, k_cache, v_cache, self._table, lens, segment.layout, backend=backend
            )
            for qkv, segment, lens in zip(rotated, self.segments, self._lens, strict=True)
        ]
        if self.kept is not None:
            self.kept[attn.layer_idx] = (k_cache.detach(), v_cache.detach())
        attended = torch.cat(out, dim=1).flatten(2)
        return [attended + attn.idle_vsts() if self.idle_vsts else attended]

    def kept_rows(self, hidden: Tensor) -> tuple[Tensor, bool]:
        raise NotImplementedError("a training pass runs every layer in full")

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        raise NotImplementedError("a training pass runs every layer in full")
