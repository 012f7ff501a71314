"""Ragged calls whose sequences share pages."""

from __future__ import annotations

import torch

from vxl_kernels import ChunkLayout, VarlenLayout, rope_append_varlen, vst_attention_varlen
from vxl_kernels.testing import Inputs, inverse_frequencies, poisoned_memory

HEADS, KV_HEADS, DIM, PAGE = 14, 2, 32, 16


class Ragged:
    """A ragged call whose sequences share the first pages of those before them."""

    def __init__(
        self,
        sequences: list[ChunkLayout | int],
        lens: list[int],
        shared: int = 0,
        dtype: torch.dtype = torch.float32,
        page: int = PAGE,
        dim: int = DIM,
        heads: int = HEADS,
    ) -> None:
        """shared: tokens that all of them find in the same pages, as far as they are so long."""
        torch.manual_seed(0)
        self.layout = VarlenLayout(sequences)
        most = max(n + a for n, a in zip(lens, self.layout.appended(), strict=True))
        width, common = -(-most // page), shared // page
        own = torch.arange(common, common + len(lens) * width, dtype=torch.int32).view(-1, width)
        self.table = own.clone()
        self.table[:, :common] = torch.arange(common, dtype=torch.int32)
        pages = common + len(lens) * width
        # Entries past a sequence's last one are NaN, unless another sequence sees them.
        self.k_cache, self.v_cache = (
            torch.randn(pages, page, KV_HEADS, dim).to(dtype) for _ in range(2)
        )
        for b, length in enumerate(lens):
            x = sequences[b]
            vsts = (x.chunks - 1) * x.vsts_per_chunk if isinstance(x, ChunkLayout) else 0
            seen = length + vsts
            for entry in range(seen, width * page):
                if entry // page >= common or entry >= max(lens):
                    at = self.table[b, entry // page], entry % page
                    self.k_cache[at] = self.v_cache[at] = torch.nan
        rows = self.layout.rows
        self.q = torch.randn(rows, heads, dim).to(dtype)
        self.k, self.v = (torch.randn(rows, KV_HEADS, dim).to(dtype) for _ in range(2))
        self.lens = torch.tensor(lens, dtype=torch.int32)

    def cache(self) -> tuple[torch.Tensor, ...]:
        return self.k_cache, self.v_cache, self.table, self.lens

    def run(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_memory():
            return vst_attention_varlen(
                self.q, self.k, self.v, *self.cache(), self.layout, return_lse=True, **options
            )

    def alone(self, i: int) -> Inputs:
        """Sequence i as a call of its own."""
        q, k, v = (self.layout.unpack(x)[i][None] for x in (self.q, self.k, self.v))
        x = self.layout.sequences[i]
        at = slice(i, i + 1)
        own = x if isinstance(x, ChunkLayout) else None
        return Inputs(q, k, v, self.k_cache, self.v_cache, self.table[at], self.lens[at], own)


def gradients(call: Ragged, backend: str | None) -> list[torch.Tensor]:
    """Of q, k, v and the caches, through rotation, append and attention."""
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    caches = [x.nan_to_num(0).requires_grad_() for x in (call.k_cache, call.v_cache)]
    kept = [x * 1 for x in caches]
    paging = call.table, call.lens
    q, k = rope_append_varlen(
        *leaves, *kept, *paging, call.layout, inverse_frequencies(call.q.shape[2]), backend=backend
    )
    out, lse = vst_attention_varlen(
        q, k, leaves[2], *kept, *paging, call.layout, return_lse=True, backend=backend
    )
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape).to(x.dtype)).sum() for x in (out, lse))
    return list(torch.autograd.grad(loss, [*leaves, *caches]))
