"""What the rows of a pass through the decoder are, and what they attend to.

An attention layer projects rows and gives q, k and v to a context, which rotates, appends and
attends. `CacheContext`: rows of sequences in a paged cache, for inference. `TrainingContext`:
prefix, all windows and suffix of sequences at once, differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vxl_kernels import CacheBatch, ChunkLayout, rope_append, vst_attention

from ..settings import ExecutionSettings

__all__ = ["AttentionContext", "CacheContext", "Segment", "TrainingContext"]

QKV = tuple[Tensor, Tensor, Tensor]


class AttentionContext(Protocol):
    """What attention layers ask of a pass.

    Attributes:
        settings: how it computes.
        idle_vsts: no row is a VST, and the VSTs' projections take part with factor 0.
    """

    settings: ExecutionSettings
    idle_vsts: bool

    def parts(self, hidden: Tensor) -> list[Tensor]:
        """Slices of the batch. A dense product takes one of them at a time."""

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, ChunkLayout | None]]:
        """The rows of all parts, cut where the layout changes, each piece with its layout."""

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        """Rotates q and k, appends what the layer keeps, attends.

        Args:
            qkv: of each segment, `(batch, rows, heads, head_dim)`, not rotated.

        Returns:
            The result of each part, heads flattened: `(batch, rows, heads * head_dim)`.
        """


class CacheContext:
    """Rows of sequences in a cache, which has room for them.

    Args:
        batch: the sequences; `reserve` was called.
        layout: what the rows are; None for ordinary tokens.
        inv_freq: rotation per position.
    """

    idle_vsts = False

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

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, ChunkLayout | None]]:
        return [(x, self.layout) for x in parts]

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        backend = self.settings.backend
        q, k, v = qkv[0] if len(qkv) == 1 else (torch.cat(x) for x in zip(*qkv, strict=True))
        cache = self.batch.layer(layer_idx)
        q, k, v = (x.to(cache[0].dtype) for x in (q, k, v))  # autocast made them of another
        q, k = rope_append(
            q, k, v, *cache, self.layout, self.inv_freq, inplace=True, backend=backend
        )
        out = vst_attention(q, k, v, *cache, self.layout, backend=backend).flatten(2)
        return [out] if len(qkv) == 1 else list(out.split(1))

    def cached_rows(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """The rows of `(batch, rows, hidden)` whose K and V are kept, and whether they are VSTs."""
        layout = self.layout
        if layout is None:
            return hidden, False
        if layout.order == "split":
            return hidden[:, layout.chunks * layout.window :], True
        return hidden[:, layout.vst_rows(hidden.device)], True

    def append(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Keeps K, not rotated yet, and V of those rows, and computes nothing else."""
        # In the cache the VSTs of all chunks follow one another, and each is rotated to its
        # place there, exactly as ordinary tokens are. There is no q, so k is passed twice.
        cache = self.batch.layer(layer_idx)
        k, v = k.to(cache[0].dtype), v.to(cache[0].dtype)
        rope_append(k, k, v, *cache, None, self.inv_freq, backend=self.settings.backend)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a training pass: prefix, windows of one ratio, or suffix.

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


class TrainingContext:
    """All rows of sequences of one shape, `(batch, rows, hidden)`, segment after segment.

    In each layer every segment first appends what it keeps to its sequence's page, then all
    attend. So the backward pass never needs a cache that was written to after it was saved.

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
        self._segments = list(segments)
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

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, ChunkLayout | None]]:
        rows = parts[0].split([s.rows for s in self._segments], dim=1)
        return [(x, s.layout) for x, s in zip(rows, self._segments, strict=True)]

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        backend = self.settings.backend
        like = qkv[0][1]  # under autocast its dtype is not that of the rows
        shape = (len(like), self._capacity, *like.shape[2:])
        k_cache, v_cache = like.new_zeros(shape), like.new_zeros(shape)
        rotated = []
        for (q, k, v), segment, lens in zip(qkv, self._segments, self._lens, strict=True):
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
                q, k, v, k_cache, v_cache, self._table, lens, segment.layout, backend=backend
            )
            for (q, k, v), segment, lens in zip(rotated, self._segments, self._lens, strict=True)
        ]
        if self.kept is not None:
            self.kept[layer_idx] = (k_cache.detach(), v_cache.detach())
        return [torch.cat(out, dim=1).flatten(2)]
