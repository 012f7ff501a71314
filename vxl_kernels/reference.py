"""The plain PyTorch truth of every operator: any device, any float type, differentiable.

Written to be read, not to be fast: dense masks from `ChunkLayout.materialize`, explicit
softmax, host loops over the batch. Arithmetic runs in float32, or float64 for float64
inputs. Shapes are documented in `api.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import checks
from .layout import ChunkLayout
from .varlen import VarlenLayout

__all__ = [
    "invariant_linear",
    "rope_append",
    "rope_append_",
    "rope_append_varlen",
    "rope_append_varlen_",
    "vst_attention",
    "vst_attention_backward",
    "vst_attention_varlen",
    "vst_attention_varlen_backward",
    "vst_linear",
]

_ROWS_AT_ONCE = 512  # bounds the dense score matrix


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible(
    layout: ChunkLayout | None, rows: int, cache_len: int, device: torch.device
) -> torch.Tensor:
    """The mask of a call, `ChunkLayout.materialize` or causal: bool `(rows, entries + rows)`."""
    if layout is not None:
        return layout.materialize(cache_len, device)
    causal = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    return torch.cat([causal.new_ones(rows, cache_len), causal], dim=1)


def _earlier_vsts(layout: ChunkLayout | None) -> int:
    return 0 if layout is None else (layout.chunks - 1) * layout.vsts_per_chunk


class _Round(torch.autograd.Function):
    """Rounds to a type. The gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _RoundGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded to a type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def vst_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    layout: ChunkLayout | None,
    scale: float | None = None,
    operands: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(batch, rows, heads, head_dim)` and natural-log LSE `(batch, heads, rows)`.

    operands: rounds the weights to this type before the second product and, in the backward pass,
    the gradients of the scores before theirs, as kernels with products of this type do."""
    batch, rows, heads, head_dim = q.shape
    group = heads // k.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    dtype = _compute_dtype(q)
    lens = [0] * batch if cache_seqlens is None else cache_seqlens.tolist()
    if k_cache is not None:
        assert block_table is not None
        assert cache_seqlens is not None
        checks.paging(
            block_table, cache_seqlens, k_cache.shape[0], k_cache.shape[1], _earlier_vsts(layout)
        )
    outs, lses = [], []
    for b in range(batch):
        keys, values = k[b], v[b]  # (rows, kv_heads, head_dim)
        if k_cache is not None:
            assert v_cache is not None
            assert block_table is not None
            seen = lens[b] + _earlier_vsts(layout)
            page_size = k_cache.shape[1]
            pages = block_table[b, : -(-seen // page_size)].long()
            keys = torch.cat([k_cache[pages].flatten(0, 1)[:seen], keys])
            values = torch.cat([v_cache[pages].flatten(0, 1)[:seen], values])
        keys = keys.to(dtype).repeat_interleave(group, dim=1)
        values = values.to(dtype).repeat_interleave(group, dim=1)
        mask = visible(layout, rows, lens[b], q.device)
        out_parts = [q.new_empty(0, heads, head_dim)]
        lse_parts = [q.new_empty(heads, 0, dtype=dtype)]
        for start in range(0, rows, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            scores = torch.einsum("rhd,khd->hrk", q[b, part].to(dtype), keys) * scale
            if operands is not None:
                scores = _RoundGradient.apply(scores, operands)
            scores = scores.masked_fill(~mask[part], -math.inf)
            lse_parts.append(torch.logsumexp(scores, dim=-1))
            weights = torch.softmax(scores, dim=-1)
            if operands is not None:
                weights = _Round.apply(weights, operands)
            out_parts.append(torch.einsum("hrk,khd->rhd", weights, values).to(q.dtype))
        outs.append(torch.cat(out_parts))
        lses.append(torch.cat(lse_parts, dim=1))
    if not outs:
        return torch.empty_like(q), q.new_empty(0, heads, rows, dtype=dtype)
    return torch.stack(outs), torch.stack(lses)


def vst_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: ChunkLayout | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and the caches (of no elements without one), from the attention
    computed again."""
    inputs = [q, k, v, k_cache, v_cache]
    rest = [block_table, cache_seqlens, layout, scale]
    return _gradients(vst_attention, inputs, rest, [grad_out, grad_lse])


def _gradients(
    attention: Callable[..., tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor | None],
    rest: list[Any],
    grad_outputs: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Gradients of `attention(*inputs, *rest)` in its inputs, whose first is q."""
    q = inputs[0]
    assert q is not None
    if q.numel() == 0:
        return tuple(q.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs)
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outputs = attention(*leaves, *rest)
    present = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad(outputs, present, grad_outputs, materialize_grads=True))
    return tuple(q.new_empty(0) if x is None else next(grads) for x in leaves)


def rotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split "rotate_half" form: x `(rows, heads, head_dim)` to positions
    `(rows,)`. Angles are rounded to float32 as in transformers (float64 for float64)."""
    dtype = _compute_dtype(x)
    angle = positions.to(dtype)[:, None] * inv_freq.to(dtype)[None, :]
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    layout: ChunkLayout | None,
    inv_freq: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k; writes the kept rows into k_cache and v_cache in place."""
    rows = q.shape[1]
    arange = torch.arange(rows, device=q.device)
    if layout is None:
        kept_rows, in_call = arange, arange
    else:
        kept_rows = layout.vst_rows(q.device)
        in_call = layout.positions(q.device) + layout.chunk_index(q.device) * layout.vsts_per_chunk
    kept = len(kept_rows)
    pages, page_size = k_cache.shape[:2]
    checks.paging(block_table, cache_seqlens, pages, page_size, kept, written=True)
    q_out, k_out = [], []
    for b, cached in enumerate(cache_seqlens.tolist()):
        slots = cached + torch.arange(kept, device=q.device)
        at = (block_table[b, slots // page_size].long(), slots % page_size)
        k_cache[at] = rotate(k[b, kept_rows], slots, inv_freq)
        v_cache[at] = v[b, kept_rows]
        q_out.append(rotate(q[b], cached + in_call, inv_freq))
        k_out.append(rotate(k[b], cached + in_call, inv_freq))
    if not q_out:
        return torch.empty_like(q), torch.empty_like(k)
    return torch.stack(q_out), torch.stack(k_out)


def rope_append_(q: torch.Tensor, k: torch.Tensor, *args) -> None:
    """The same with q and k rotated in place."""
    for x, rotated in zip((q, k), rope_append(q, k, *args), strict=True):
        x.copy_(rotated)


def vst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vst_weight: torch.Tensor | None,
    vst_bias: torch.Tensor | None,
    layout: ChunkLayout | VarlenLayout | None,
) -> torch.Tensor:
    """`(batch, rows, out_features)`, flat for a VarlenLayout: both weight sets over all rows, then
    a choice by row."""
    raw = torch.nn.functional.linear(x, weight, bias)
    if layout is None:
        return raw
    assert vst_weight is not None
    vst = torch.nn.functional.linear(x, vst_weight, vst_bias)
    if isinstance(layout, VarlenLayout):
        is_vst = torch.arange(layout.rows, device=x.device) >= layout.raw_rows
        return torch.where(is_vst[:, None], vst, raw)
    return torch.where(layout.is_vst(x.device)[None, :, None], vst, raw)


def invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`(..., out_features)`: a product of its own for every row, in float32 or float64."""
    dtype = _compute_dtype(x)
    wide, rows = weight.to(dtype), x.to(dtype).reshape(-1, x.shape[-1])
    offset = None if bias is None else bias.to(dtype)
    each = [torch.nn.functional.linear(row, wide, offset) for row in rows.split(1)]
    return torch.cat(each).to(x.dtype).reshape(*x.shape[:-1], len(weight))


# -- ragged calls: one sequence after the other -----------------------------------------------


def _table_layout(table: torch.Tensor) -> VarlenLayout:
    return VarlenLayout(
        [
            ChunkLayout(window, ratio, chunks) if ratio else window
            for window, ratio, chunks, _, _ in table.tolist()
        ],
        table.device,
    )


def vst_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    table: torch.Tensor,
    chunks: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(rows, heads, head_dim)` and natural-log LSE `(heads, rows)`."""
    layout = _table_layout(table)
    out = q.new_empty(0, *q.shape[1:])
    lse = q.new_empty(q.shape[1], 0, dtype=_compute_dtype(q))
    outs, lses = [out] * len(layout), [lse] * len(layout)
    for i, sequence in enumerate(layout.sequences):
        rows = layout.rows_of(i, q.device)
        if len(rows):
            own = sequence if isinstance(sequence, ChunkLayout) else None
            own_table, own_lens = (
                None if x is None else x[i : i + 1] for x in (block_table, cache_seqlens)
            )
            found = vst_attention(
                q[rows][None], k[rows][None], v[rows][None], k_cache, v_cache,
                own_table, own_lens, own, scale,
            )  # fmt: skip
            outs[i], lses[i] = found[0][0], found[1][0]
    if not outs:
        return out, lse
    order = torch.cat([layout.rows_of(i, q.device) for i in range(len(layout))]).argsort()
    return torch.cat(outs)[order], torch.cat(lses, dim=1)[:, order]


def vst_attention_varlen_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    chunks: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and the caches, as `vst_attention_backward`."""
    inputs = [q, k, v, k_cache, v_cache]
    rest = [block_table, cache_seqlens, table, chunks, scale]
    return _gradients(vst_attention_varlen, inputs, rest, [grad_out, grad_lse])


def rope_append_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    table: torch.Tensor,
    inv_freq: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q and k; writes the kept rows into k_cache and v_cache in place."""
    layout = _table_layout(table)
    pages, page_size = k_cache.shape[:2]
    checks.paging(block_table, cache_seqlens, pages, page_size, layout.appended(), written=True)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    for i, sequence in enumerate(layout.sequences):
        rows = layout.rows_of(i, q.device)
        if len(rows) == 0:
            continue
        own = sequence if isinstance(sequence, ChunkLayout) else None
        cache = k_cache, v_cache, block_table[i : i + 1], cache_seqlens[i : i + 1]
        q_row, k_row, v_row = (x[rows][None] for x in (q, k, v))
        q_part, k_part = rope_append(q_row, k_row, v_row, *cache, own, inv_freq)
        q_out = q_out.index_copy(0, rows, q_part[0])
        k_out = k_out.index_copy(0, rows, k_part[0])
    return q_out, k_out


def rope_append_varlen_(q: torch.Tensor, k: torch.Tensor, *args) -> None:
    """The same with q and k rotated in place."""
    for x, rotated in zip((q, k), rope_append_varlen(q, k, *args), strict=True):
        x.copy_(rotated)
