"""Rotates q and k, and appends the cached rows to their pages, in one pass.

Row r of chunk c is rotated to `cache_seqlens + c * vsts_per_chunk + position(r)`. The K of VST j is
rotated to `cache_seqlens + c * vsts_per_chunk + j`, its final position, and written to that entry
of the cache. Its V is copied. Plain rows (`layout=None`) are all cached, at the position that they
are rotated to.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .keys import Table, page_of
from .primitives import NEVER
from .ragged import sequence_at, sequence_of_row

__all__ = ["rope_append_kernel", "rope_append_ragged_kernel"]

_LENGTHS = ["rows", "window", "ratio", "chunks", "page_size", "max_pages", "sequences"]


@triton.jit
def _cos_sin(position, inv_freq):
    """Cosine and sine of the float32 angle, to float32 rounding for any angle.

    The angle is reduced in float64, which is exact enough for millions of radians. A row has few
    frequencies, so this costs little. Cephes' polynomials follow, within a quarter turn, with an
    absolute error of 6e-8. The GPU's own approximations have one of 5e-7, and its accurate versions
    put tables into local memory.
    """
    angle = (position.to(tl.float32) * inv_freq).to(tl.float64)
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)  # 2 / pi
    x = (angle - quarter * 1.5707963267948966).to(tl.float32)
    quarter = quarter.to(tl.int32) & 3
    xx = x * x
    sine = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 - xx * 1.9515295891e-4))
    cosine = 1 - 0.5 * xx + xx * xx * (
        4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5)
    )  # fmt: skip
    turned = (quarter & 1) == 1
    cos = tl.where(turned, sine, cosine)
    sin = tl.where(turned, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = tl.where(quarter >= 2, -sin, sin)
    return cos, sin


@triton.jit
def _rotate(first, second, cos, sin):
    """The halves [H, D / 2] of heads, rotated ("rotate_half" form), in float32."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _token(i_row, window, ratio, chunks, SPLIT: tl.constexpr):
    """Which token a row is: (position within the sequence, entry that it would have in the cache,
    both from the first of the call on, whether it is a VST). This inverts `chunk_row`."""
    vsts = window // ratio
    if SPLIT:
        is_vst = i_row >= chunks * window
        within = tl.where(is_vst, i_row - chunks * window, i_row)
        each = tl.where(is_vst, vsts, window)
        chunk = within // each
        index = within % each
        position = tl.where(is_vst, index * (ratio + 1) + ratio, index + index // ratio)
    else:
        chunk = i_row // (window + vsts)
        position = i_row % (window + vsts)
        is_vst = position % (ratio + 1) == ratio
        index = position // (ratio + 1)
    return position + chunk * vsts, chunk * vsts + index, is_vst


class Strides(NamedTuple):
    """From a head to the next, and those of the caches, in elements."""

    q: Any
    k: Any
    v: Any
    q_out: Any
    k_out: Any
    k_page: Any
    k_slot: Any
    k_cache: Any
    v_page: Any
    v_slot: Any
    v_cache: Any


@triton.jit
def _rotate_row(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, inv_freq_ptr,
    strides, table, position, slot, is_kept,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Rotates a row, which the pointers lead to, to `position`, and appends it to `slot` of the
    cache if it is kept."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    in_dims = offs_d < HEAD_DIM // 2
    inv_freq = tl.load(inv_freq_ptr + offs_d, mask=in_dims, other=0.0)
    cos, sin = _cos_sin(position, inv_freq)
    for start in tl.range(0, HEADS, BLOCK_H):
        offs_h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        inside = (offs_h < HEADS) & in_dims
        ptrs = q_ptr + offs_h * strides.q + offs_d
        first = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(ptrs + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)
        first, second = _rotate(first, second, cos, sin)
        ptrs = q_out_ptr + offs_h * strides.q_out + offs_d
        tl.store(ptrs, first.to(q_out_ptr.dtype.element_ty), mask=inside)
        tl.store(ptrs + HEAD_DIM // 2, second.to(q_out_ptr.dtype.element_ty), mask=inside)

    # K and V. Slots past the table's end are skipped: they would land in another sequence's page,
    # and the table may be empty.
    kept = is_kept & (slot >= 0) & (slot < table.max_pages * table.page_size)
    offs_h = tl.arange(0, BLOCK_KV).to(tl.int64)[:, None]
    inside = (offs_h < KV_HEADS) & in_dims
    dtype = k_out_ptr.dtype.element_ty
    ptrs = k_ptr + offs_h * strides.k + offs_d
    first = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(ptrs + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)
    rotated, rotated_2 = _rotate(first, second, cos, sin)
    ptrs = k_out_ptr + offs_h * strides.k_out + offs_d
    tl.store(ptrs, rotated.to(dtype), mask=inside)
    tl.store(ptrs + HEAD_DIM // 2, rotated_2.to(dtype), mask=inside)
    if kept:
        page = page_of(table, slot // table.page_size)
        in_page = (slot % table.page_size).to(tl.int64)
        cos, sin = _cos_sin(slot, inv_freq)
        rotated, rotated_2 = _rotate(first, second, cos, sin)
        k_cache_ptr += page * strides.k_page + in_page * strides.k_slot
        ptrs = k_cache_ptr + offs_h * strides.k_cache + offs_d
        tl.store(ptrs, rotated.to(dtype), mask=inside)
        tl.store(ptrs + HEAD_DIM // 2, rotated_2.to(dtype), mask=inside)
        ptrs = v_ptr + offs_h * strides.v + offs_d
        value = tl.load(ptrs, mask=inside, other=0.0)
        value_2 = tl.load(ptrs + HEAD_DIM // 2, mask=inside, other=0.0)
        v_cache_ptr += page * strides.v_page + in_page * strides.v_slot
        ptrs = v_cache_ptr + offs_h * strides.v_cache + offs_d
        tl.store(ptrs, value, mask=inside)
        tl.store(ptrs + HEAD_DIM // 2, value_2, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def rope_append_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr,
    block_table_ptr, cache_seqlens_ptr, inv_freq_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    qo_batch, qo_row, qo_head, ko_batch, ko_row, ko_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    rows, window, ratio, chunks, page_size, max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, KEEP_ALL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, batch). A program takes a row with all its heads, so cosines are computed once.
    BLOCK_D covers half a head. The outputs may be the inputs: each row is read, then written."""
    i_row = tl.program_id(0)
    i_batch = tl.program_id(1).to(tl.int64)
    cached = tl.maximum(tl.load(cache_seqlens_ptr + i_batch), 0)
    if KEEP_ALL:
        position = i_row
        slot = i_row
        is_kept = True
    else:
        position, slot, is_kept = _token(i_row, window, ratio, chunks, SPLIT)
    table = Table(block_table_ptr + i_batch * max_pages, page_size, max_pages)
    strides = Strides(
        q_head, k_head, v_head, qo_head, ko_head,
        kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    )  # fmt: skip
    row = i_row.to(tl.int64)
    _rotate_row(
        q_ptr + i_batch * q_batch + row * q_row, k_ptr + i_batch * k_batch + row * k_row,
        v_ptr + i_batch * v_batch + row * v_row, q_out_ptr + i_batch * qo_batch + row * qo_row,
        k_out_ptr + i_batch * ko_batch + row * ko_row, k_cache_ptr, v_cache_ptr, inv_freq_ptr,
        strides, table, cached + position, cached + slot, is_kept,
        HEADS, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_KV,
    )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def rope_append_ragged_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr,
    block_table_ptr, cache_seqlens_ptr, table_ptr, inv_freq_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, qo_row, qo_head, ko_row, ko_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head, sequences, page_size, max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,) of a ragged call; table: `VarlenLayout.table`."""
    i_row = tl.program_id(0)
    i_seq, is_vst = sequence_of_row(table_ptr, i_row, sequences, 64)
    sequence = sequence_at(table_ptr, i_seq, i_seq >= 0)
    window, ratio, chunks = sequence.window, sequence.ratio, sequence.chunks
    own_row = tl.where(is_vst, i_row - sequence.vst + chunks * window, i_row - sequence.raw)
    position, slot, _ = _token(own_row, tl.maximum(window, 1), ratio, chunks, True)
    is_kept = (i_seq >= 0) & (is_vst | (ratio == NEVER))
    i_seq = tl.maximum(i_seq, 0)
    cached = tl.maximum(tl.load(cache_seqlens_ptr + i_seq), 0)
    table = Table(block_table_ptr + i_seq.to(tl.int64) * max_pages, page_size, max_pages)
    strides = Strides(
        q_head, k_head, v_head, qo_head, ko_head,
        kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    )  # fmt: skip
    row = i_row.to(tl.int64)
    _rotate_row(
        q_ptr + row * q_row, k_ptr + row * k_row, v_ptr + row * v_row, q_out_ptr + row * qo_row,
        k_out_ptr + row * ko_row, k_cache_ptr, v_cache_ptr, inv_freq_ptr,
        strides, table, cached + position, cached + slot, is_kept,
        HEADS, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_KV,
    )  # fmt: skip
