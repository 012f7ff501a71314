"""Inputs, tolerances and poison for testing these operators, ours and other backends'.

`make_inputs` builds a paged call whose unused cache entries are NaN, so that a kernel that
reads where it must not shows it. `check_attention` holds a result to what its precision
allows, measured on the same inputs, not to a guessed constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch

from . import reference
from .layout import ChunkLayout

__all__ = ["Inputs", "check_attention", "inverse_frequencies", "make_inputs", "poisoned_memory"]


def inverse_frequencies(head_dim: int, theta: float = 1e6) -> torch.Tensor:
    """RoPE's `theta ** (-2 i / head_dim)`: float32 `(head_dim / 2,)`, as Qwen2's."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@dataclass(frozen=True, repr=False)
class Inputs:
    """One call's tensors (shapes as in `vxl_kernels.api`) and its layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    cache_lens: torch.Tensor
    layout: ChunkLayout | None

    def __repr__(self) -> str:
        return (
            f"Inputs(q {tuple(self.q.shape)} {self.q.dtype}, kv_heads {self.k.shape[2]}, "
            f"pages {tuple(self.k_cache.shape[:2])}, cache_lens {self.cache_lens.tolist()}, "
            f"{self.layout})"
        )

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis would print every tensor
        printer.text(repr(self))

    def args(self) -> tuple:
        """Positional arguments of `vst_attention`; of `rope_append` with inv_freq behind."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def clone(self) -> Inputs:
        return replace(
            self,
            **{f.name: getattr(self, f.name).clone() for f in fields(self) if f.name != "layout"},
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        names = ("q", "k", "v", "k_cache", "v_cache")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def appended(self) -> int:
        """Tokens that `rope_append` adds to each sequence."""
        if self.layout is None:
            return self.q.shape[1]
        return self.layout.chunks * self.layout.vsts_per_chunk


def make_inputs(
    cache_lens: Sequence[int] = (0,),
    layout: ChunkLayout | None = None,
    rows: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> Inputs:
    """A random call. Pages are shuffled; every cache entry that no row may see yet is NaN.

    With a layout of several chunks, the entries that earlier chunks of the call append hold
    numbers too, as after `rope_append`. `spread` scales q, for sharp softmaxes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = rows if layout is None else layout.rows
    batch = len(cache_lens)
    appended = rows if layout is None else layout.chunks * layout.vsts_per_chunk
    seen = 0 if layout is None else (layout.chunks - 1) * layout.vsts_per_chunk
    pages_each = max(-(-(n + appended) // page_size) for n in cache_lens) if batch else 0
    pages = batch * pages_each + 2
    order = torch.randperm(pages, generator=generator)[: batch * pages_each]
    block_table = order.reshape(batch, pages_each).to(torch.int32)
    caches = []
    for _ in range(2):
        cache = torch.full((pages, page_size, kv_heads, head_dim), torch.nan)
        for b, length in enumerate(cache_lens):
            slots = torch.arange(length + seen)
            cache[block_table[b, slots // page_size].long(), slots % page_size] = normal(
                length + seen, kv_heads, head_dim
            )
        caches.append(cache)
    return Inputs(
        q=normal(batch, rows, heads, head_dim) * spread,
        k=normal(batch, rows, kv_heads, head_dim),
        v=normal(batch, rows, kv_heads, head_dim),
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=block_table,
        cache_lens=torch.tensor(cache_lens, dtype=torch.int32),
        layout=layout,
    ).to(dtype)


def _error(x: torch.Tensor, truth: torch.Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    error = (x.double() - truth).abs()
    return float("inf") if error.isnan().any() else float(error.max())


def check_attention(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Raises AssertionError unless out (and lse) are as near to the float64 truth of the same
    inputs as their precision allows: twice the error of the plain reference in that precision,
    and a floor for where that error is lucky. The floor is what summing in float32 may cost,
    a few rounding units of `sum p |v|`, and the last rounding to the output's own type."""
    exact = inputs.to(torch.float64)
    truth, truth_lse = reference.vst_attention(*exact.args())
    absolute = replace(exact, v=exact.v.abs(), v_cache=exact.v_cache.abs())
    mass, _ = reference.vst_attention(*absolute.args())
    plain, plain_lse = reference.vst_attention(*inputs.args())
    allowed = 2 * _error(plain, truth)
    if truth.numel():
        allowed += 4 * torch.finfo(torch.float32).eps * float(mass.max())
        allowed += torch.finfo(out.dtype).eps * float(truth.abs().max())
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    error = _error(out, truth)
    assert error <= allowed, f"output error {error:.3e}, allowed {allowed:.3e}"
    if lse is not None:
        assert lse.shape == truth_lse.shape
        largest = max(float(truth_lse.abs().max()), 1.0) if truth_lse.numel() else 1.0
        allowed = 2 * _error(plain_lse, truth_lse) + 8 * torch.finfo(lse.dtype).eps * largest
        error = _error(lse, truth_lse)
        assert error <= allowed, f"LSE error {error:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN inside: an output element that no one writes shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills, unless someone has switched that off
    try:
        assert torch.empty(4).isnan().all(), "torch.utils.deterministic does not fill memory"
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
