"""What is timed: the geometry, the cases, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vxl_kernels import ChunkLayout, reference

__all__ = ["DTYPES", "Case", "Geometry", "Inputs", "Paged"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model's attention and of the cases."""

    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 1440
    page_size: int = 64  # a GPU's: `VstCache`'s own 128, which TMA can follow
    caches: tuple[int, ...] = (0, 1620, 8100, 20250)
    cpu_caches: tuple[int, ...] = (0, 1620, 20250)  # a CPU needs half a minute for each long one
    tail_rows: int = 64
    decode_batches: tuple[int, ...] = (1, 4)

    @staticmethod
    def small() -> Geometry:
        """For smoke tests: everything runs, no number means anything."""
        return Geometry(
            14, 2, 32, 48, 16, caches=(0, 54, 130), cpu_caches=(0, 54, 130), tail_rows=8
        )


@dataclass(frozen=True)
class Case:
    """One call of one layer. `layout=None` are ordinary tokens (tail, decode). A name may end with
    a variant: "chunk_c4" is a "chunk"."""

    name: str
    geometry: Geometry
    cache_len: int
    batch: int
    dtype_name: str
    device: str
    layout: ChunkLayout | None = None
    plain_rows: int = 0

    @property
    def kind(self) -> str:
        first = self.name.partition("_")[0]
        return first if first in ("chunk", "tail") else self.name

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def rows(self) -> int:
        return self.plain_rows if self.layout is None else self.layout.rows

    @property
    def earlier_vsts(self) -> int:
        """VSTs of this call that its last chunk sees in the cache."""
        return 0 if self.layout is None else (self.layout.chunks - 1) * self.layout.vsts_per_chunk

    def each_chunk(self) -> list[tuple[torch.Tensor, int]]:
        """Rows of each chunk in the order of the sequence, and the cache entries they see."""
        kept = 0 if self.layout is None else self.layout.vsts_per_chunk
        return [(rows, self.cache_len + c * kept) for c, rows in enumerate(self.sequence_rows())]

    @property
    def is_decode(self) -> bool:
        return self.rows == 1

    @property
    def flops(self) -> int:
        """Useful FLOPs: only pairs that attend are counted. Gradients take five products, attention
        two."""
        g = self.geometry
        if self.layout is not None:
            forward = self.batch * self.layout.flops(g.heads, g.head_dim, self.cache_len)
            return forward * 5 // 2 if self.name == "backward" else forward
        pairs = self.rows * self.cache_len + self.rows * (self.rows + 1) // 2
        return self.batch * 4 * g.heads * g.head_dim * pairs

    @property
    def kv_bytes(self) -> int:
        """K and V that the call has to read at least once."""
        g = self.geometry
        keys = self.cache_len + self.earlier_vsts + self.rows
        return 2 * self.batch * keys * g.kv_heads * g.head_dim * self.dtype.itemsize

    @property
    def rope_bytes(self) -> int:
        """Bytes of one `rope_append`: q and k read and written, the kept K written, the
        kept V read and written."""
        g = self.geometry
        kept = self.rows if self.layout is None else self.layout.chunks * self.layout.vsts_per_chunk
        rotated = 2 * self.rows * (g.heads + g.kv_heads)
        return self.batch * (rotated + 3 * kept * g.kv_heads) * g.head_dim * self.dtype.itemsize

    def sequence_rows(self) -> torch.Tensor:
        """Rows in the order of the sequence, `(chunks, rows of a chunk)`, for peers without
        the split order."""
        if self.layout is None:
            return torch.arange(self.rows, device=self.device)[None]
        layout = self.layout
        place = layout.chunk_index() * layout.rows_per_chunk + layout.positions()
        return place.argsort().view(layout.chunks, layout.rows_per_chunk).to(self.device)

    def positions(self) -> torch.Tensor:
        """Position that RoPE rotates each row to."""
        if self.layout is None:
            return self.cache_len + torch.arange(self.rows, device=self.device)
        layout = self.layout
        earlier = layout.chunk_index(self.device) * layout.vsts_per_chunk
        return self.cache_len + earlier + layout.positions(self.device)

    def mask(self) -> torch.Tensor:
        """True where a row may attend; columns are `[cache, earlier VSTs | rows]`."""
        if self.layout is not None:
            return self.layout.materialize(self.cache_len, self.device)
        causal = torch.ones(self.rows, self.rows, dtype=torch.bool, device=self.device).tril()
        return torch.cat([causal.new_ones(self.rows, self.cache_len), causal], dim=1)

    def with_pages(self, page_size: int) -> Case:
        return replace(self, geometry=replace(self.geometry, page_size=page_size))

    def with_chunks(self, chunks: int) -> Case:
        assert self.layout is not None
        return replace(self, layout=replace(self.layout, chunks=chunks))


@dataclass(frozen=True)
class Paged:
    """The cache as `vst_attention` takes it."""

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k, self.v, self.block_table, self.cache_seqlens


class Inputs:
    """Tensors of a case, `(batch, rows, heads, head_dim)`, quantised to its dtype.

    `q, k, v` and `k_kept, v_kept` (the cache) are as projected: not rotated. `q_rotated,
    k_rotated` and `k_seen, v_seen` are what attention alone takes: the cache and the VSTs
    that earlier chunks of the call append, rotated at their final positions.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        g = case.geometry
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(rows: int, heads: int) -> torch.Tensor:
            shape = (case.batch, rows, heads, g.head_dim)
            x = torch.randn(shape, generator=generator, device=case.device)
            return x.to(case.dtype)

        self.q = normal(case.rows, g.heads)
        self.k, self.v = normal(case.rows, g.kv_heads), normal(case.rows, g.kv_heads)
        self.k_kept = normal(case.cache_len, g.kv_heads)
        self.v_kept = normal(case.cache_len, g.kv_heads)
        half = torch.arange(0, g.head_dim, 2, device=case.device)
        self.inv_freq = 1e6 ** (-half.float() / g.head_dim)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack([reference.rotate(one, positions, self.inv_freq) for one in x])

    @cached_property
    def q_rotated(self) -> torch.Tensor:
        return self._rotate(self.q, self.case.positions())

    @cached_property
    def k_rotated(self) -> torch.Tensor:
        return self._rotate(self.k, self.case.positions())

    @cached_property
    def k_seen(self) -> torch.Tensor:
        k = self.with_earlier_vsts(self.k_kept, self.k)
        return self._rotate(k, torch.arange(k.shape[1], device=k.device))

    @cached_property
    def v_seen(self) -> torch.Tensor:
        return self.with_earlier_vsts(self.v_kept, self.v)

    def with_earlier_vsts(self, kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        layout, count = self.case.layout, self.case.earlier_vsts
        if layout is None or count == 0:
            return kept
        return torch.cat([kept, rows[:, layout.vst_rows(rows.device)[:count]]], dim=1)

    def pages(self, k: torch.Tensor, v: torch.Tensor, room: int = 0) -> Paged:
        """K and V `(batch, tokens, kv_heads, head_dim)` in shuffled pages, with room for
        `room` tokens more. `cache_seqlens` is the case's."""
        batch, tokens, kv_heads, head_dim = k.shape
        size = self.case.geometry.page_size
        pages = max(1, -(-(tokens + room) // size))
        generator = torch.Generator().manual_seed(1)
        table = torch.randperm(batch * pages, generator=generator).view(batch, pages)
        table = table.to(k.device)

        def fill(x: torch.Tensor) -> torch.Tensor:
            padded = x.new_zeros(batch, pages * size, kv_heads, head_dim)
            padded[:, :tokens] = x
            out = torch.empty_like(padded).view(batch * pages, size, kv_heads, head_dim)
            out[table.flatten()] = padded.view(batch * pages, size, kv_heads, head_dim)
            return out

        lens = torch.full((batch,), self.case.cache_len, dtype=torch.int32, device=k.device)
        return Paged(fill(k), fill(v), table.int(), lens)
