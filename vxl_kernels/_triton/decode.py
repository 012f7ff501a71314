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
    assume_stride,
    cached_entries,
    key_ptrs,
    load_block,
    load_rows,
    locate,
    narrow,
    own_offset,
    paged_offset,
    score_block,
)

__all__ = ["decode_kernel", "merge_kernel"]

_LENGTHS = ["rows", "page_size", "max_pages", "splits"]


@triton.jit
def _program(zero, rows, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """`(sequence, split, KV head, lanes, last lane)` of this program. Lanes are BLOCK_M of the rows
    times GROUP heads, packed flat; numbers behind the last are none. Programs of a split's tiles
    and heads follow one another, for they read the same keys or the same pages.

    `zero` is one that the compiler does not know to be 0. So what is worked out once more, behind
    a loop, takes no registers in it: kept from the start it would be spilled.
    """
    pid = tl.program_id(0) + zero
    i_batch = (tl.program_id(1) + zero).to(tl.int64)
    tiles = tl.cdiv(rows * GROUP, BLOCK_M)
    first = pid // KV_HEADS % tiles * BLOCK_M
    last = tl.minimum(first + BLOCK_M, rows * GROUP) - 1
    return i_batch, pid // KV_HEADS // tiles, pid % KV_HEADS, first + tl.arange(0, BLOCK_M), last


@triton.jit(do_not_specialize=_LENGTHS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_cache_desc, v_cache_desc, part_ptr, part_lse_ptr, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    rows, page_size, max_pages, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGES: tl.constexpr, SAME_STRIDES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SLACK: tl.constexpr, SKIP: tl.constexpr, PARTS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * KV_HEADS * splits, batch). Constants as those of `prefill_kernel`.

    part (batch, splits, rows, heads, head_dim) and part_lse (batch, splits, rows, heads), both
    float32 and dense: the normalised output of a split and its log-sum-exp to base 2.
    """
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_stride(k_row)
    assume_stride(v_row)
    if HAS_CACHE and PAGES != "any":
        assume_stride(kc_slot)
        assume_stride(vc_slot)
    i_batch, i_split, i_head, offs_lane, last_lane = _program(0, rows, KV_HEADS, GROUP, BLOCK_M)
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        first = (i_split - 1) * SPLIT_KEYS
        if (i_split > 0) & (first >= cached):
            return
        # Split 0 has no cache entries, the others no own rows: loops that do not run.
        first = tl.maximum(first, 0)
        end = tl.where(i_split == 0, 0, tl.minimum(first + SPLIT_KEYS, cached))
        full = end // BLOCK_N * BLOCK_N

    # Those behind the last lane repeat it and are not stored.
    offs_lane = tl.minimum(offs_lane, last_lane)
    offs_row = offs_lane // GROUP
    offs_head = i_head * GROUP + offs_lane % GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = q_ptr + i_batch * q_batch + offs_d
    q_ptrs += offs_row.to(tl.int64)[:, None] * q_row
    q_ptrs += offs_head.to(tl.int64)[:, None] * q_head
    q = load_rows(q_ptrs, offs_row, rows, HEAD_DIM, False)

    pivot = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, PARTS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # -- cache --
    if HAS_CACHE:
        table_ptr = block_table_ptr + i_batch * max_pages
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        place = locate(table_ptr, first, offs_n, page_size, max_pages, BLOCK_N, PAGES)
        for _start in tl.range(first, full, BLOCK_N):
            _, slot, page, _, _ = place
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(place, offs_n, kc_page, kc_slot, PAGES), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(place, offs_n, vc_page, vc_slot, PAGES), offs_d
            )
            # The next block's page is looked up while this block is computed.
            place = advance(table_ptr, place, page_size, max_pages, BLOCK_N, PAGES)
            k = load_block(k_cache_desc, page, i_head, slot, k_ptrs, HEAD_DIM, TMA)
            if TMA:
                v = load_block(v_cache_desc, page, i_head, slot, v_ptrs, HEAD_DIM, TMA)
            weights, pivot, total, acc = score_block(
                q, k, offs_n, 0, scale, pivot, total, acc, False, PRECISION, SLACK, SKIP, ISA
            )
            if not TMA:
                v = load_block(v_cache_desc, page, i_head, slot, v_ptrs, HEAD_DIM, TMA)
            acc = tl.dot(narrow(weights, v.dtype, ISA), v, acc, input_precision=PRECISION)

        # Less than a block of the split's keys is left, if it is the last. Blocks of EDGE_N keys
        # may meet pages in another way. V is asked for with K: nothing else hides its latency.
        ANY: tl.constexpr = PAGES if PAGES == "whole" or EDGE_N == BLOCK_N else "any"
        offs_e = tl.program_id(2) + tl.arange(0, EDGE_N)
        for start in tl.range(full, end, EDGE_N, num_stages=1):
            edge = locate(table_ptr, start, offs_e, page_size, max_pages, EDGE_N, ANY)
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(edge, offs_e, kc_page, kc_slot, ANY), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(edge, offs_e, vc_page, vc_slot, ANY), offs_d
            )
            k = load_rows(k_ptrs, start + offs_e, end, HEAD_DIM, True)
            v = load_rows(v_ptrs, start + offs_e, end, HEAD_DIM, True)
            bound = tl.full([BLOCK_M], 0, tl.int32) + end
            weights, pivot, total, acc = score_block(
                q, k, start + offs_e, bound, scale, pivot, total, acc,
                True, PRECISION, SLACK, 0, ISA,
            )  # fmt: skip
            acc = tl.dot(narrow(weights, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- own rows --
    zero = tl.program_id(2)
    offs_e = zero + tl.arange(0, EDGE_N)
    i_batch, i_split, i_head, offs_lane, last_lane = _program(zero, rows, KV_HEADS, GROUP, BLOCK_M)
    bound = tl.minimum(offs_lane, last_lane) // GROUP + 1
    own_end = tl.where(i_split == 0, last_lane // GROUP + 1, 0)
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    for start in tl.range(0, own_end, EDGE_N, num_stages=1):
        row = tl.cast(start, tl.int64)
        k_ptrs = key_ptrs(k_ptr, own_offset(row, offs_e, k_row), offs_d)
        v_ptrs = key_ptrs(v_ptr, own_offset(row, offs_e, v_row), offs_d)
        k = load_rows(k_ptrs, start + offs_e, own_end, HEAD_DIM, True)
        v = load_rows(v_ptrs, start + offs_e, own_end, HEAD_DIM, True)
        weights, pivot, total, acc = score_block(
            q, k, start + offs_e, bound, scale, pivot, total, acc, True, PRECISION, SLACK, 0, ISA
        )
        acc = tl.dot(narrow(weights, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- result --
    zero = tl.num_programs(2) - 1  # not the same as above, or it would be worked out there
    i_batch, i_split, i_head, offs_lane, last_lane = _program(zero, rows, KV_HEADS, GROUP, BLOCK_M)
    stored = offs_lane <= last_lane
    offs_lane = tl.minimum(offs_lane, last_lane)
    offs_row = offs_lane // GROUP
    offs_head = i_head * GROUP + offs_lane % GROUP
    total = tl.sum(total, 1)
    in_dims = offs_d < HEAD_DIM
    offs_part = ((i_batch * splits + i_split) * rows + offs_row) * (KV_HEADS * GROUP) + offs_head
    part_ptrs = part_ptr + offs_part[:, None] * HEAD_DIM + offs_d
    tl.store(part_ptrs, acc * (1.0 / total)[:, None], mask=stored[:, None] & in_dims)
    tl.store(part_lse_ptr + offs_part, pivot + tl.log2(total), mask=stored)


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(
    part_ptr, part_lse_ptr, cache_seqlens_ptr, out_ptr, lse_ptr,
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
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
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
