"""Attention of few rows (decode, short texts) over `[cache | rows]`, causal.

Few rows give too few tiles to fill a GPU, so the cache is cut into splits of SPLIT_SIZE entries.
A split knows nothing of its neighbours, of other sequences or of how long the sequence is: the
same keys meet in the same order in every batch. A second kernel merges the parts in order.
Split 0 is the call's own rows, split s > 0 are cache entries from (s - 1) * SPLIT_SIZE on.

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
    new_offset,
    opaque_zero,
    paged_offset,
    score_block,
)

__all__ = ["decode_kernel", "merge_kernel"]

_LENGTHS = ["rows", "page_size", "max_pages", "splits"]


@triton.jit
def _program(zero, rows, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """`(sequence, split, KV head, packed rows [BLOCK_M], last packed row)` of this program. Rows
    times GROUP_SIZE heads are packed flat; numbers past the last are not stored. Programs of a
    split's tiles and heads follow one another, because they read the same keys or pages.

    `zero` is 0, or an `opaque_zero` where all this is computed again.
    """
    pid = tl.program_id(0) + zero
    i_batch = (tl.program_id(1) + zero).to(tl.int64)
    tiles = tl.cdiv(rows * GROUP_SIZE, BLOCK_M)
    first = pid // KV_HEADS % tiles * BLOCK_M
    last = tl.minimum(first + BLOCK_M, rows * GROUP_SIZE) - 1
    return i_batch, pid // KV_HEADS // tiles, pid % KV_HEADS, first + tl.arange(0, BLOCK_M), last


@triton.jit(do_not_specialize=_LENGTHS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_cache_desc, v_cache_desc, partial_ptr, partial_lse_ptr, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    rows, page_size, max_pages, splits,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, SAME_STRIDES: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr,
    ROW_SUM_SPLITS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * KV_HEADS * splits, batch). Constants as those of `prefill_kernel`.

    partial (batch, splits, rows, heads, head_dim) and partial_lse (batch, splits, rows, heads),
    both float32 and dense: the normalised output of a split and its log-sum-exp to base 2.
    """
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_stride(k_row)
    assume_stride(v_row)
    if HAS_CACHE and PAGE_MODE != "gather":
        assume_stride(kc_slot)
        assume_stride(vc_slot)
    i_batch, i_split, i_head, offs_m, last_m = _program(0, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        first = (i_split - 1) * SPLIT_SIZE
        if (i_split > 0) & (first >= cached):
            return
        # Split 0 has no cache entries, the others no own rows: loops that do not run.
        first = tl.maximum(first, 0)
        end = tl.where(i_split == 0, 0, tl.minimum(first + SPLIT_SIZE, cached))
        full = end // BLOCK_N * BLOCK_N

    # Packed rows past the last repeat it and are not stored.
    offs_m = tl.minimum(offs_m, last_m)
    offs_row = offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = q_ptr + i_batch * q_batch + offs_d
    q_ptrs += offs_row.to(tl.int64)[:, None] * q_row
    q_ptrs += offs_head.to(tl.int64)[:, None] * q_head
    q = load_rows(q_ptrs, offs_row, rows, HEAD_DIM, False)

    row_ref = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M, ROW_SUM_SPLITS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # -- cache --
    if HAS_CACHE:
        table_ptr = block_table_ptr + i_batch * max_pages
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        place = locate(table_ptr, first, offs_n, page_size, max_pages, BLOCK_N, PAGE_MODE)
        for _start in tl.range(first, full, BLOCK_N):
            _, slot, page, _, _ = place
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(place, offs_n, kc_page, kc_slot, PAGE_MODE), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(place, offs_n, vc_page, vc_slot, PAGE_MODE), offs_d
            )
            # The next block's page is looked up while this block is computed.
            place = advance(table_ptr, place, page_size, max_pages, BLOCK_N, PAGE_MODE)
            k = load_block(k_cache_desc, page, i_head, slot, k_ptrs, HEAD_DIM, TMA)
            if TMA:
                v = load_block(v_cache_desc, page, i_head, slot, v_ptrs, HEAD_DIM, TMA)
            p, row_ref, row_sum, acc = score_block(
                q,
                k,
                offs_n,
                0,
                scale,
                row_ref,
                row_sum,
                acc,
                False,
                PRECISION,
                RESCALE_THRESHOLD,
                WARP_SKIP_ELEMENTS,
                ISA,
            )
            if not TMA:
                v = load_block(v_cache_desc, page, i_head, slot, v_ptrs, HEAD_DIM, TMA)
            acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)

        # Less than a block of the split's keys is left, if it is the last. Blocks of MASKED_BLOCK_N
        # keys may meet pages in another way. V is asked for with K: nothing else hides its latency.
        MASKED_PAGE_MODE: tl.constexpr = (
            PAGE_MODE if PAGE_MODE == "block_in_page" or MASKED_BLOCK_N == BLOCK_N else "gather"
        )
        offs_e = opaque_zero() + tl.arange(0, MASKED_BLOCK_N)
        for start in tl.range(full, end, MASKED_BLOCK_N, num_stages=1):
            edge = locate(
                table_ptr, start, offs_e, page_size, max_pages, MASKED_BLOCK_N, MASKED_PAGE_MODE
            )
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(edge, offs_e, kc_page, kc_slot, MASKED_PAGE_MODE), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(edge, offs_e, vc_page, vc_slot, MASKED_PAGE_MODE), offs_d
            )
            k = load_rows(k_ptrs, start + offs_e, end, HEAD_DIM, True)
            v = load_rows(v_ptrs, start + offs_e, end, HEAD_DIM, True)
            bound = tl.full([BLOCK_M], 0, tl.int32) + end
            p, row_ref, row_sum, acc = score_block(
                q, k, start + offs_e, bound, scale, row_ref, row_sum, acc,
                True, PRECISION, RESCALE_THRESHOLD, 0, ISA,
            )  # fmt: skip
            acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- new keys --
    zero = opaque_zero()
    offs_e = zero + tl.arange(0, MASKED_BLOCK_N)
    i_batch, i_split, i_head, offs_m, last_m = _program(zero, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    bound = tl.minimum(offs_m, last_m) // GROUP_SIZE + 1
    new_end = tl.where(i_split == 0, last_m // GROUP_SIZE + 1, 0)
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    for start in tl.range(0, new_end, MASKED_BLOCK_N, num_stages=1):
        row = tl.cast(start, tl.int64)
        k_ptrs = key_ptrs(k_ptr, new_offset(row, offs_e, k_row), offs_d)
        v_ptrs = key_ptrs(v_ptr, new_offset(row, offs_e, v_row), offs_d)
        k = load_rows(k_ptrs, start + offs_e, new_end, HEAD_DIM, True)
        v = load_rows(v_ptrs, start + offs_e, new_end, HEAD_DIM, True)
        p, row_ref, row_sum, acc = score_block(
            q,
            k,
            start + offs_e,
            bound,
            scale,
            row_ref,
            row_sum,
            acc,
            True,
            PRECISION,
            RESCALE_THRESHOLD,
            0,
            ISA,
        )
        acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- result --
    zero = opaque_zero(2)
    i_batch, i_split, i_head, offs_m, last_m = _program(zero, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    stored = offs_m <= last_m
    offs_m = tl.minimum(offs_m, last_m)
    offs_row = offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    row_sum = tl.sum(row_sum, 1)
    in_dims = offs_d < HEAD_DIM
    offs_partial = ((i_batch * splits + i_split) * rows + offs_row) * (
        KV_HEADS * GROUP_SIZE
    ) + offs_head
    partial_ptrs = partial_ptr + offs_partial[:, None] * HEAD_DIM + offs_d
    tl.store(partial_ptrs, acc * (1.0 / row_sum)[:, None], mask=stored[:, None] & in_dims)
    tl.store(partial_lse_ptr + offs_partial, row_ref + tl.log2(row_sum), mask=stored)


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(
    partial_ptr, partial_lse_ptr, cache_seqlens_ptr, out_ptr, lse_ptr,
    rows, page_size, max_pages, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, SPLIT_SIZE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (rows * HEADS, batch). Sums the splits in order, BLOCK_S at a time."""
    i_row = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    used = 1
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        used += tl.cdiv(cached, SPLIT_SIZE)

    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    part = ((i_batch * splits) * rows + i_row) * HEADS + i_head  # of split 0
    each = rows.to(tl.int64) * HEADS  # from a split to the next
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, used, BLOCK_S):
        in_used = start + offs_s < used
        at = part + (start + offs_s) * each
        lse = tl.load(partial_lse_ptr + at, mask=in_used, other=float("-inf"))
        ptrs = partial_ptr + at[:, None] * HEAD_DIM + offs_d[None, :]
        out = tl.load(ptrs, mask=in_used[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        weights = tl.exp2(lse - new_max)
        row_scale = tl.exp2(row_max - new_max)
        row_sum = row_sum * row_scale + tl.sum(weights, 0)
        acc = acc * row_scale + tl.sum(out * weights[:, None], 0)
        row_max = new_max

    row = (i_batch * rows + i_row) * HEADS + i_head
    out = (acc / row_sum).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out, mask=offs_d < HEAD_DIM)
    lse_ptrs = lse_ptr + (i_batch * HEADS + i_head) * rows + i_row + tl.arange(0, 1)
    tl.store(lse_ptrs, (row_max + tl.log2(row_sum)) * 0.6931471805599453)
