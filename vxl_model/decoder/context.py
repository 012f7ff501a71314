"""What the rows of a pass through the decoder are, and what they attend to.

An attention layer projects rows and gives q, k and v to a context, which rotates, appends and
attends. `CacheContext`: rows of sequences in a paged cache, for inference. `PackedContext`:
prefix, all windows and suffix of sequences of any shapes at once, differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vxl_kernels import (
    CacheBatch,
    ChunkLayout,
    VarlenLayout,
    rope_append,
    rope_append_varlen,
    serves,
    vst_attention,
    vst_attention_varlen,
)

from ..settings import ExecutionSettings

__all__ = [
    "FEW_ROWS",
    "AttentionContext",
    "CacheContext",
    "PackedContext",
    "PagesOf",
    "RowLayout",
    "Segment",
]

QKV = tuple[Tensor, Tensor, Tensor]
RowLayout = ChunkLayout | VarlenLayout | None

# Most rows of a sequence in a ragged pass. For these, `invariant_linear` is not slower than the
# matrix library: 0.87 (float32) and 0.69 (bfloat16) of its time for 32 rows, 1.15 and 0.82 for 96,
# 2.07 and 1.12 for 256 (3584 to 18944, two cores with AMX).
FEW_ROWS = 64


class AttentionContext(Protocol):
    """What attention layers ask of a pass.

    Attributes:
        settings: how it computes.
        idle_vsts: no row is a VST, and the VSTs' projections take part with factor 0.
    """

    settings: ExecutionSettings
    idle_vsts: bool

    def parts(self, hidden: Tensor) -> list[Tensor]:
        """Slices of the rows. A dense product takes one of them at a time."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """All rows of their slices."""

    def apart(self, x: Tensor) -> list[Tensor]:
        """The rows of each sequence, `(1, rows, ...)`."""

    def last_rows(self, x: Tensor, rows: int) -> Tensor:
        """The last rows of each sequence: `(batch, rows, ...)`."""

    def is_few(self, hidden: Tensor) -> bool:
        """Whether these are few rows of each sequence and a sequence must not know the others:
        see `single_rows.py`."""

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, RowLayout]]:
        """The rows of all parts, cut where the layout changes, each piece with its layout."""

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        """Rotates q and k, appends what the layer keeps, attends.

        Args:
            qkv: of each segment, `(batch, rows, heads, head_dim)`, not rotated.

        Returns:
            The result of each part, heads flattened: `(batch, rows, heads * head_dim)`.
        """


class Pages(Protocol):
    """What a `CacheContext` takes of a `CacheBatch`."""

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class PagesOf:
    """Some sequences of a batch."""

    def __init__(self, batch: CacheBatch, rows: Sequence[int]) -> None:
        self._batch = batch
        at = torch.tensor(rows, device=batch.block_table.device)
        self._table, self._lens = batch.block_table[at], batch.cache_seqlens[at]

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k_cache, v_cache, *_ = self._batch.layer(i)
        return k_cache, v_cache, self._table, self._lens


class CacheContext:
    """Rows of sequences in a cache, which has room for them.

    Args:
        batch: the sequences; `reserve` was called.
        layout: what the rows are. None for ordinary tokens, `(batch, rows, hidden)`. A
            `VarlenLayout` for ordinary tokens of any number for each sequence, `(1, rows, hidden)`.
        inv_freq: rotation per position.
    """

    idle_vsts = False

    def __init__(
        self,
        batch: Pages,
        layout: RowLayout,
        inv_freq: Tensor,
        settings: ExecutionSettings,
    ) -> None:
        self.batch, self.layout, self.inv_freq = batch, layout, inv_freq
        self.settings = settings
        self._ragged = layout if isinstance(layout, VarlenLayout) else None
        rows = self._ragged.sequences if self._ragged is not None else ()
        self._sizes = [x for x in rows if isinstance(x, int)]

    def parts(self, hidden: Tensor) -> list[Tensor]:
        return self.apart(hidden) if self.settings.batch_invariant else [hidden]

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if self._ragged else 0)

    def apart(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self._sizes, dim=1) if self._is_flat(x) else x.split(1))

    def last_rows(self, x: Tensor, rows: int) -> Tensor:
        if not self._is_flat(x):
            return x[:, -rows:]
        return torch.cat([own[:, -rows:] for own in self.apart(x)])

    def is_few(self, hidden: Tensor) -> bool:
        if not self.settings.batch_invariant or isinstance(self.layout, ChunkLayout):
            return False
        return self._ragged is not None or hidden.shape[1] == 1

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, RowLayout]]:
        return [(x, None if self._ragged else self.layout) for x in parts]

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        backend = self.settings.backend
        q, k, v = (self.join(list(x)) for x in zip(*qkv, strict=True))
        cache = self.batch.layer(layer_idx)
        q, k, v = (x.to(cache[0].dtype) for x in (q, k, v))  # autocast made them of another
        how: dict[str, Any] = {"backend": backend}
        if self._ragged is not None:
            rows, (q, k, v) = self._ragged, (x[0] for x in (q, k, v))
            q, k = rope_append_varlen(q, k, v, *cache, rows, self.inv_freq, inplace=True, **how)
            out = vst_attention_varlen(q, k, v, *cache, rows, **how).flatten(1)[None]
        else:
            fixed: Any = self.layout
            q, k = rope_append(q, k, v, *cache, fixed, self.inv_freq, inplace=True, **how)
            out = vst_attention(q, k, v, *cache, fixed, **how).flatten(2)
        return [out] if len(qkv) == 1 else self.apart(out)

    def _is_flat(self, x: Tensor) -> bool:
        """Whether x has the rows of all sequences one after another."""
        return self._ragged is not None and len(x) == 1 and x.shape[1] == self._ragged.rows

    def cached_rows(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """The rows of `(batch, rows, hidden)` whose K and V are kept, and whether they are VSTs."""
        layout = self.layout
        if not isinstance(layout, ChunkLayout):
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
    """Neighbouring rows of one sequence of a packed pass: prefix, windows of one ratio, or suffix.

    Attributes:
        sequence: whose rows they are.
        rows: a layout of split order, or how many ordinary tokens.
        cached: tokens of the sequence that are kept before them.
        dropped: no later row sees them, and nothing of them is kept.
    """

    sequence: int
    rows: ChunkLayout | int
    cached: int
    dropped: bool = False


class PackedContext:
    """Whole sequences of any shapes at once, `(1, rows, hidden)` in the order of `layout`, and
    differentiable. Each segment is a sequence of the ragged calls.

    In each layer every segment first appends what it keeps to its sequence's pages, then all
    attend. So the backward pass never needs a cache that was written to after it was saved.

    Args:
        segments: of all sequences, those of one in order.
        keep: remember each layer's K and V in `kept`.
        idle_vsts: no segment has VSTs, and their projections take part with factor 0.

    Attributes:
        layout: what the rows are.
        kept: K and V of a layer, `(rows, kv_heads, head_dim)` each. `kept_rows` has those of a
            sequence.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        inv_freq: Tensor,
        settings: ExecutionSettings,
        keep: bool = False,
        idle_vsts: bool = False,
    ) -> None:
        self.inv_freq, self.settings, self.idle_vsts = inv_freq, settings, idle_vsts
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        device = inv_freq.device
        self.layout = VarlenLayout([s.rows for s in segments], device)
        self._segments, appended = list(segments), self.layout.appended()
        size, lengths = settings.page_size, [0] * (1 + max(s.sequence for s in segments))
        for s, rows in zip(segments, appended, strict=True):
            if not s.dropped:
                lengths[s.sequence] = max(lengths[s.sequence], s.cached + rows)
        pages = [-(-length // size) for length in lengths]
        first = [sum(pages[:i]) for i in range(len(pages))]
        self.kept_rows = [
            slice(page * size, page * size + length)
            for page, length in zip(first, lengths, strict=True)
        ]
        # A row that nothing is written to, and rows for what is dropped.
        spare = sum(pages) * size
        dropped = sum(rows for s, rows in zip(segments, appended, strict=True) if s.dropped)
        self._rows = -(-(spare + 1 + dropped) // size) * size
        lens = [s.cached for s in segments]
        self._lens = torch.tensor(lens, dtype=torch.int32, device=device)
        # Two segments of a sequence write to one page. No operator knows that their rows differ,
        # so for appending each row is a page, and a segment's table has no other's.
        tables = torch.zeros(len(segments), max(1, *pages), dtype=torch.int32, device="cpu")
        longest = max(s.cached + rows for s, rows in zip(segments, appended, strict=True))
        places = torch.full(
            (len(segments), max(longest, 1)), spare, dtype=torch.int32, device="cpu"
        )
        free = spare + 1
        for i, (s, rows) in enumerate(zip(segments, appended, strict=True)):
            page, count = first[s.sequence], pages[s.sequence]
            tables[i, :count] = torch.arange(page, page + count)
            start = free if s.dropped else page * size + s.cached
            places[i, s.cached : s.cached + rows] = torch.arange(start, start + rows)
            free += rows if s.dropped else 0
        self._table, self._places = tables.to(device), places.to(device)

    def parts(self, hidden: Tensor) -> list[Tensor]:
        return [hidden]

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0]

    def apart(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError("sequences of a packed pass may know one another")

    def last_rows(self, x: Tensor, rows: int) -> Tensor:
        raise NotImplementedError("all rows of a packed pass are wanted")

    def is_few(self, hidden: Tensor) -> bool:
        return False

    def segments(self, parts: list[Tensor]) -> list[tuple[Tensor, RowLayout]]:
        return [(parts[0], self.layout if self.layout.vst_rows else None)]

    def attend(self, layer_idx: int, qkv: list[QKV]) -> list[Tensor]:
        q, k, v = (x[0] for x in qkv[0])
        shape = (self._rows, 1, *k.shape[1:])  # under autocast their dtype is not that of the rows
        k_rows, v_rows = k.new_zeros(shape), k.new_zeros(shape)
        ragged = serves("vst_attention_varlen_backward", q, self.settings.backend)
        out = (self._together if ragged else self._apart)(q, k, v, k_rows, v_rows)
        if self.kept is not None:
            self.kept[layer_idx] = (k_rows[:, 0].detach(), v_rows[:, 0].detach())
        return [out.flatten(1)[None].clone()]  # no view: compilers make a graph for those

    def _together(self, q: Tensor, k: Tensor, v: Tensor, k_rows: Tensor, v_rows: Tensor) -> Tensor:
        layout, lens, backend = self.layout, self._lens, self.settings.backend
        places = (k_rows, v_rows, self._places, lens)
        q, k = rope_append_varlen(q, k, v, *places, layout, self.inv_freq, backend=backend)
        k_cache, v_cache = self._pages(k_rows, v_rows)
        cache = (k_cache, v_cache, self._table, lens)
        return vst_attention_varlen(q, k, v, *cache, layout, backend=backend)

    def _apart(self, q: Tensor, k: Tensor, v: Tensor, k_rows: Tensor, v_rows: Tensor) -> Tensor:
        """One segment after another, for a device that has no kernels of ragged calls."""
        backend, rotated = self.settings.backend, []
        order = [self.layout.rows_of(i, q.device) for i in range(len(self._segments))]
        each = [
            (s.rows if isinstance(s.rows, ChunkLayout) else None, rows, slice(i, i + 1))
            for i, (s, rows) in enumerate(zip(self._segments, order, strict=True))
        ]
        for layout, rows, i in each:
            mine = (q[rows][None], k[rows][None], v[rows][None])
            places = (k_rows, v_rows, self._places[i], self._lens[i])
            rotated.append(rope_append(*mine, *places, layout, self.inv_freq, backend=backend))
        k_cache, v_cache = self._pages(k_rows, v_rows)
        out = []
        for (q_rows, keys), (layout, rows, i) in zip(rotated, each, strict=True):
            mine = (q_rows, keys, v[rows][None])
            cache = (k_cache, v_cache, self._table[i], self._lens[i])
            out.append(vst_attention(*mine, *cache, layout, backend=backend)[0])
        return torch.cat(out)[torch.cat(order).argsort()]

    def _pages(self, k_rows: Tensor, v_rows: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, self.settings.page_size, *k_rows.shape[2:])
        return k_rows.view(shape), v_rows.view(shape)
