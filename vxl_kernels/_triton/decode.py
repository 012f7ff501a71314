"""Attention of few rows (decode, short texts) over `[cache | rows]`, causal.

Few rows give too few tiles to fill a GPU, so the cache is cut into splits of SPLIT_KEYS entries.
A split knows nothing of its neighbours, of other sequences or of how long the sequence is: the
same keys meet in the same order in every batch. A second kernel merges the parts in order.
Split 0 is the call's own rows, split s > 0 are cache entries from (s - 1) * SPLIT_KEYS on.

The grid covers what the block table could hold; programs behind a sequence's end leave at once
and leave nothing behind, for the merge knows the length too. So nothing is read on the host.
"""

import triton
import triton.language as tl

from .primitives import (
    advance,
    cached_entries,
    key_ptrs,
    load_rows,
    locate,
    paged_offset,
    score_block,
)

__all__ = ["decode_kernel", "merge_kernel"]

_LENGTHS = ["rows", "page_size", "max_pages", "splits"]


@triton.jit(do_not_specialize=_LENGTHS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_lens_ptr,
    part_ptr, part_lse_ptr, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    rows, page_size, max_pages, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGES: tl.constexpr, SAME_STRIDES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, tiles * KV_HEADS, batch).

    part (batch, splits, rows, heads, head_dim) and part_lse (batch, splits, rows, heads), both
    float32 and dense: the normalised output of a split and its log-sum-exp to base 2.
    """
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    i_split = tl.program_id(0)
    i_head = tl.program_id(1) % KV_HEADS
    i_tile = tl.program_id(1) // KV_HEADS
    i_batch = tl.program_id(2).to(tl.int64)

    if HAS_CACHE:
        cached = cached_entries(cache_lens_ptr, i_batch, page_size, max_pages)
        if (i_split > 0) & ((i_split - 1) * SPLIT_KEYS >= cached):
            return

    # BLOCK_M lanes of rows times heads, packed flat; those behind the last repeat it.
    first_lane = i_tile * BLOCK_M
    last_lane = tl.minimum(first_lane + BLOCK_M, rows * GROUP) - 1
    offs_lane = tl.minimum(first_lane + tl.arange(0, BLOCK_M), last_lane)
    offs_row = offs_lane // GROUP
    offs_head = i_head * GROUP + offs_lane % GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = q_ptr + i_batch * q_batch + offs_d
    q_ptrs += offs_row.to(tl.int64)[:, None] * q_row
    q_ptrs += offs_head.to(tl.int64)[:, None] * q_head
    q = load_rows(q_ptrs, offs_row, rows, HEAD_DIM, False)

    pivot = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if i_split == 0:
        end = last_lane // GROUP + 1
        k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
        v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
        for start in tl.range(0, end, BLOCK_N, num_stages=1):
            offs_key = (start + offs_n).to(tl.int64)[:, None]
            k = load_rows(k_ptr + offs_key * k_row + offs_d, start + offs_n, end, HEAD_DIM, True)
            weights, pivot, total, acc = score_block(
                q,
                k,
                start + offs_n,
                offs_row + 1,
                scale,
                pivot,
                total,
                acc,
                True,
                PRECISION,
                0.0,
                0,
                "",
            )
            v = load_rows(v_ptr + offs_key * v_row + offs_d, start + offs_n, end, HEAD_DIM, True)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    elif HAS_CACHE:
        first = (i_split - 1) * SPLIT_KEYS
        end = tl.minimum(first + SPLIT_KEYS, cached)
        full = end // BLOCK_N * BLOCK_N
        table_ptr = block_table_ptr + i_batch * max_pages
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        place = locate(table_ptr, first, offs_n, page_size, max_pages, BLOCK_N, PAGES)
        for _start in tl.range(first, full, BLOCK_N):
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(place, offs_n, kc_page, kc_slot, PAGES), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(place, offs_n, vc_page, vc_slot, PAGES), offs_d
            )
            place = advance(table_ptr, place, page_size, max_pages, BLOCK_N, PAGES)
            k = load_rows(k_ptrs, offs_n, 0, HEAD_DIM, False)
            weights, pivot, total, acc = score_block(
                q, k, offs_n, 0, scale, pivot, total, acc, False, PRECISION, 0.0, 0, ""
            )
            v = load_rows(v_ptrs, offs_n, 0, HEAD_DIM, False)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        for start in tl.range(full, end, BLOCK_N, num_stages=1):  # at most once
            place = locate(table_ptr, start, offs_n, page_size, max_pages, BLOCK_N, PAGES)
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(place, offs_n, kc_page, kc_slot, PAGES), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(place, offs_n, vc_page, vc_slot, PAGES), offs_d
            )
            k = load_rows(k_ptrs, start + offs_n, end, HEAD_DIM, True)
            bound = tl.full([BLOCK_M], 0, tl.int32) + end
            weights, pivot, total, acc = score_block(
                q, k, start + offs_n, bound, scale, pivot, total, acc, True, PRECISION, 0.0, 0, ""
            )
            v = load_rows(v_ptrs, start + offs_n, end, HEAD_DIM, True)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    total = tl.sum(total, 1)
    stored = first_lane + tl.arange(0, BLOCK_M) <= last_lane
    in_dims = offs_d < HEAD_DIM
    offs_part = ((i_batch * splits + i_split) * rows + offs_row) * (KV_HEADS * GROUP) + offs_head
    part_ptrs = part_ptr + offs_part[:, None] * HEAD_DIM + offs_d
    tl.store(part_ptrs, acc * (1.0 / total)[:, None], mask=stored[:, None] & in_dims)
    tl.store(part_lse_ptr + offs_part, pivot + tl.log2(total), mask=stored)


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(
    part_ptr, part_lse_ptr, cache_lens_ptr, out_ptr, lse_ptr,
    rows, page_size, max_pages, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (rows * HEADS, batch). Sums the splits in order, BLOCK_S at a time."""
    i_row = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    used = 1
    if HAS_CACHE:
        cached = cached_entries(cache_lens_ptr, i_batch, page_size, max_pages)
        used += tl.cdiv(cached, SPLIT_KEYS)

    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    part = ((i_batch * splits) * rows + i_row) * HEADS + i_head  # of split 0
    each = rows.to(tl.int64) * HEADS  # from a split to the next
    pivot = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, used, BLOCK_S):
        in_used = start + offs_s < used
        at = part + (start + offs_s) * each
        lse = tl.load(part_lse_ptr + at, mask=in_used, other=float("-inf"))
        ptrs = part_ptr + at[:, None] * HEAD_DIM + offs_d[None, :]
        out = tl.load(ptrs, mask=in_used[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
        new_pivot = tl.maximum(pivot, tl.max(lse, 0))
        weights = tl.exp2(lse - new_pivot)
        shrink = tl.exp2(pivot - new_pivot)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(out * weights[:, None], 0)
        pivot = new_pivot

    row = (i_batch * rows + i_row) * HEADS + i_head
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out, mask=offs_d < HEAD_DIM)
    lse_ptrs = lse_ptr + (i_batch * HEADS + i_head) * rows + i_row + tl.arange(0, 1)
    tl.store(lse_ptrs, (pivot + tl.log2(total)) * 0.6931471805599453)
