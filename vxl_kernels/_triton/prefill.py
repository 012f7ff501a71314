"""Attention of many rows: chunks (and long texts) over `[cache | own chunk]`.

A program owns BLOCK_M rows of one KV head: consecutive positions of a chunk times the GROUP_SIZE
query heads that share the head, packed flat, so K and V are read once for all of them and no
row of a tile is wasted whatever the group is.

What a row sees is three runs of keys, each from its start up to a bound:

    cache entries     cache_seqlens + chunk * vsts_per_chunk       all rows of the chunk alike
    own raw tokens    by position
    own VSTs          by position

Bounds are computed from positions once per program. Blocks of keys below the smallest bound of
the tile need no mask: they run in loops of their own, which hold nothing but loads, products
and the softmax. Each run is contiguous in memory, so positions cost these loops nothing: in split
order by itself. Interleaved, the launcher hands over a chunk of raw tokens alone, in the order
of their positions; only `kept`, what a chunk adds to the cache, tells that it has VSTs.
"""

import triton
import triton.language as tl

from .primitives import (
    advance,
    assume_stride,
    cached_entries,
    chunk_row,
    key_ptrs,
    load_block,
    load_rows,
    locate,
    narrow,
    new_offset,
    opaque_zero,
    paged_offset,
    query_row,
    score_block,
    visible_new,
)

__all__ = ["prefill_kernel"]

# Data, not code: no length is compiled in. What strides tell of them: `launch_common.row_strides`.
_LENGTHS = ["window", "ratio", "kept", "chunks", "page_size", "max_pages"]


@triton.jit(do_not_specialize=_LENGTHS)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_desc, v_desc, k_cache_desc, v_cache_desc, out_ptr, lse_ptr, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    window, ratio, kept, chunks, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr,
    ROW_SUM_SPLITS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * chunks * KV_HEADS, batch). `*_batch` etc. are strides in elements.

    PAGE_MODE: how blocks of keys meet pages, see `locate`. SAME_STRIDES: v and v_cache have the
    strides of k and k_cache. MASKED_BLOCK_N: keys in a block that needs a mask, a part of BLOCK_N:
    less is masked for nothing, and the masks take fewer registers. TMA: full blocks come by
    TMA, through the descriptors (batch or page, head, row, head_dim). RESCALE_THRESHOLD,
    WARP_SKIP_ELEMENTS: see `_softmax_step`. ROW_SUM_SPLITS: a row's sum is kept in this many parts,
    one for each of the threads that share the row, and added up after the loops. ISA: see
    `primitives`.
    """
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_stride(k_row)
    assume_stride(v_row)
    if HAS_CACHE and PAGE_MODE != "gather":
        assume_stride(kc_slot)
        assume_stride(vc_slot)
    length = window + window // ratio  # rows of a chunk
    rows = chunks * length
    pid = tl.program_id(0)
    i_head = pid % KV_HEADS
    i_chunk = pid // KV_HEADS % chunks
    # Programs start in the order of their number: those with the most keys first.
    i_tile = tl.cdiv(length * GROUP_SIZE, BLOCK_M) - 1 - pid // (KV_HEADS * chunks)
    i_batch = tl.program_id(1).to(tl.int64)

    # The tile's packed rows. Those past the last repeat it and are not stored.
    first_m = i_tile * BLOCK_M
    last_m = tl.minimum(first_m + BLOCK_M, length * GROUP_SIZE) - 1
    offs_m = tl.minimum(first_m + tl.arange(0, BLOCK_M), last_m)
    position = offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_row = query_row(position, i_chunk, window, ratio, chunks, True)
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    q_ptr += i_batch * q_batch
    q_ptrs = q_ptr + offs_row.to(tl.int64)[:, None] * q_row
    q_ptrs += offs_head.to(tl.int64)[:, None] * q_head
    q = load_rows(q_ptrs + offs_d, offs_row, rows, HEAD_DIM, False)

    row_ref = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M, ROW_SUM_SPLITS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # -- cache: the same bound for all rows --
    if HAS_CACHE:
        table_ptr = block_table_ptr + i_batch * max_pages
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        cached = tl.minimum(cached + i_chunk * kept, max_pages * page_size)
        full = cached // BLOCK_N * BLOCK_N
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        place = locate(table_ptr, 0, offs_n, page_size, max_pages, BLOCK_N, PAGE_MODE)
        for _start in tl.range(0, full, BLOCK_N):
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
            # TMA takes no registers: K and V are asked for at once. By threads V
            # waits until K is used (sm_80 would spill 640 bytes).
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
        # Blocks of MASKED_BLOCK_N keys meet pages in other ways, so each key is looked up by itself
        # ("gather") unless blocks lie in a page; its offset is counted as above. There are few
        # masked blocks, so nothing of theirs is worth a register in another loop.
        MASKED_PAGE_MODE: tl.constexpr = (
            "block_in_page" if PAGE_MODE == "block_in_page" else "gather"
        )
        offs_e += opaque_zero()
        for start in tl.range(full, cached, MASKED_BLOCK_N, num_stages=1, disable_licm=TMA):
            edge = locate(
                table_ptr, start, offs_e, page_size, max_pages, MASKED_BLOCK_N, MASKED_PAGE_MODE
            )
            k_ptrs = key_ptrs(
                k_cache_ptr, paged_offset(edge, offs_e, kc_page, kc_slot, PAGE_MODE), offs_d
            )
            v_ptrs = key_ptrs(
                v_cache_ptr, paged_offset(edge, offs_e, vc_page, vc_slot, PAGE_MODE), offs_d
            )
            k = load_rows(k_ptrs, start + offs_e, cached, HEAD_DIM, True)
            bound = tl.full([BLOCK_M], 0, tl.int32) + cached
            p, row_ref, row_sum, acc = score_block(
                q, k, start + offs_e, bound, scale, row_ref, row_sum, acc,
                True, PRECISION, RESCALE_THRESHOLD, 0, ISA,
            )  # fmt: skip
            v = load_rows(v_ptrs, start + offs_e, cached, HEAD_DIM, True)
            acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- own chunk: raw tokens, then VSTs --
    # Positions are computed again, see `opaque_zero`.
    offs_m = first_m + opaque_zero() + tl.arange(0, BLOCK_M)
    raw_bound, vst_bound = visible_new(tl.minimum(offs_m, last_m) // GROUP_SIZE, ratio)
    raw_min, vst_min = visible_new(first_m // GROUP_SIZE, ratio)
    raw_end, vst_end = visible_new(last_m // GROUP_SIZE, ratio)
    raw_full = raw_min // BLOCK_N
    vst_full = vst_min // BLOCK_N
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    for i in tl.range(0, raw_full + vst_full):
        is_vst = i >= raw_full
        start = tl.where(is_vst, i - raw_full, i) * BLOCK_N
        row = chunk_row(is_vst, start, i_chunk, window, ratio, chunks, True)
        k_ptrs = key_ptrs(k_ptr, new_offset(row, offs_n, k_row), offs_d)
        v_ptrs = key_ptrs(v_ptr, new_offset(row, offs_n, v_row), offs_d)
        k = load_block(k_desc, i_batch, i_head, row, k_ptrs, HEAD_DIM, TMA)
        if TMA:
            v = load_block(v_desc, i_batch, i_head, row, v_ptrs, HEAD_DIM, TMA)
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
            v = load_block(v_desc, i_batch, i_head, row, v_ptrs, HEAD_DIM, TMA)
        acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)
    raw_full *= BLOCK_N // MASKED_BLOCK_N
    vst_full *= BLOCK_N // MASKED_BLOCK_N
    raw_masked = tl.cdiv(raw_end, MASKED_BLOCK_N) - raw_full
    vst_masked = tl.cdiv(vst_end, MASKED_BLOCK_N) - vst_full
    for i in tl.range(0, raw_masked + vst_masked):
        is_vst = i >= raw_masked
        start = tl.where(is_vst, vst_full + i - raw_masked, raw_full + i) * MASKED_BLOCK_N
        row = chunk_row(is_vst, start, i_chunk, window, ratio, chunks, True)
        k_ptrs = key_ptrs(k_ptr, new_offset(row, offs_e, k_row), offs_d)
        v_ptrs = key_ptrs(v_ptr, new_offset(row, offs_e, v_row), offs_d)
        bound = tl.where(is_vst, vst_bound, raw_bound)
        end = tl.where(is_vst, vst_end, raw_end)
        k = load_rows(k_ptrs, start + offs_e, end, HEAD_DIM, True)
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
        v = load_rows(v_ptrs, start + offs_e, end, HEAD_DIM, True)
        acc = tl.dot(narrow(p, v.dtype, ISA), v, acc, input_precision=PRECISION)

    # -- result: out (batch, rows, heads, head_dim), lse (batch, heads, rows), both dense --
    # Packed rows are computed again, see `opaque_zero`: kept, they would be spilled.
    offs_m = first_m + opaque_zero() + tl.arange(0, BLOCK_M)
    stored = offs_m <= last_m
    offs_m = tl.minimum(offs_m, last_m)
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_row = query_row(offs_m // GROUP_SIZE, i_chunk, window, ratio, chunks, True)
    out_ptr += i_batch * rows * (KV_HEADS * GROUP_SIZE * HEAD_DIM)
    offs_out = (offs_row * (KV_HEADS * GROUP_SIZE) + offs_head).to(tl.int64)
    out_ptrs = out_ptr + offs_out[:, None] * HEAD_DIM + offs_d
    row_sum = tl.sum(row_sum, 1)
    out = (acc * (1.0 / row_sum)[:, None]).to(out_ptr.dtype.element_ty)
    in_dims = offs_d < HEAD_DIM
    tl.store(out_ptrs, out, mask=stored[:, None] & in_dims)
    lse_ptrs = lse_ptr + (i_batch * (KV_HEADS * GROUP_SIZE) + offs_head) * rows + offs_row
    tl.store(lse_ptrs, (row_ref + tl.log2(row_sum)) * 0.6931471805599453, mask=stored)
