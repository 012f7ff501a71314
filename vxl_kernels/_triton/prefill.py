"""Attention of many rows: chunks (and long texts) over `[cache | the call's own keys]`.

A program computes BLOCK_M packed rows of one KV head: consecutive positions of a chunk times the
GROUP_SIZE query heads that share the head. So K and V are read once for all of them, and no row of
a tile is wasted for any group size.

A row sees three runs of keys, each from its start up to a bound:

    cache entries     cache_seqlens + chunk * vsts_per_chunk       the same for all rows of a chunk
    new raw tokens    by position
    new VSTs          by position

Bounds are computed from positions once per program. Blocks of keys below the smallest bound of the
tile need no mask. They run in loops of their own, which contain only loads, products and the
softmax. Each run is contiguous in memory, so positions cost these loops nothing. In split order
that holds as it is. In interleaved order the launcher passes a chunk of raw tokens alone, in the
order of their positions, and only `kept`, the entries that a chunk adds to the cache, tells that it
has VSTs.
"""

import triton
import triton.language as tl

from .keys import Keys, Table, cached_entries, new_block
from .primitives import (
    assume_strides,
    block_of_run,
    chunk_runs,
    load_packed,
    opaque_zero,
    packed_tile,
    run_row,
    tile_of_program,
    visible_new,
)
from .softmax import (
    Arithmetic,
    attend_block,
    attend_cache,
    attend_cache_masked,
    attend_masked_block,
    softmax_start,
)

__all__ = ["attend_cache_end", "attend_chunk", "prefill_kernel", "store_packed"]

# Data, not code: no length is compiled in. For strides see `launch_common.row_strides`.
_LENGTHS = ["window", "ratio", "kept", "chunks", "page_size", "max_pages"]


@triton.jit
def attend_cache_end(
    q, state, cache, table, full, cached, offs_e, scale,
    HEAD_DIM: tl.constexpr, PAGE_MODE: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the cache entries from `full` to `cached`, less than a full block, in blocks
    of the keys offs_e."""
    # These blocks meet pages in other ways, so unless they lie in a page, each key is looked up by
    # itself.
    PLACES: tl.constexpr = "block_in_page" if PAGE_MODE == "block_in_page" else "gather"
    return attend_cache_masked(
        q, state, cache, table, full, cached, offs_e, scale,
        HEAD_DIM, PLACES, PAGE_MODE, not TMA, False, ARITHMETIC,
    )  # fmt: skip


@triton.jit
def _attend_new(
    q, state, new, i_batch, i_head, runs, raw_blocks, vst_blocks, offs_n, scale,
    HEAD_DIM: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the first blocks of both runs of new keys, which all rows see."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    offs_d = tl.arange(0, q.shape[1])[None, :]
    for i in tl.range(0, raw_blocks + vst_blocks):
        is_vst, start = block_of_run(i, raw_blocks, 0, 0, BLOCK_N)
        block = new_block(new, i_batch, run_row(is_vst, start, runs), offs_n, offs_d)
        state = attend_block(q, state, new, block, i_head, scale, HEAD_DIM, TMA, ARITHMETIC)
    return state


@triton.jit
def _attend_new_masked(
    q, state, new, i_batch, runs, bounds, ends, first_raw, first_vst, offs_n, scale,
    HEAD_DIM: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the other blocks of both runs, from blocks first_raw and first_vst on."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    raw_bound, vst_bound = bounds
    raw_end, vst_end = ends
    raw_blocks = tl.cdiv(raw_end, BLOCK_N) - first_raw
    vst_blocks = tl.cdiv(vst_end, BLOCK_N) - first_vst
    offs_d = tl.arange(0, q.shape[1])[None, :]
    for i in tl.range(0, raw_blocks + vst_blocks):
        is_vst, start = block_of_run(i, raw_blocks, first_raw, first_vst, BLOCK_N)
        block = new_block(new, i_batch, run_row(is_vst, start, runs), offs_n, offs_d)
        bound = tl.where(is_vst, vst_bound, raw_bound)
        end = tl.where(is_vst, vst_end, raw_end)
        state = attend_masked_block(
            q, state, block, start + offs_n, end, bound, scale, HEAD_DIM, False, ARITHMETIC
        )
    return state


@triton.jit
def attend_chunk(
    q, state, new, i_batch, i_head, runs, ratio, first_m, last_m, offs_n, offs_e, scale,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the new keys, raw tokens and then VSTs, that packed rows first_m to last_m
    see: full blocks of the keys offs_n, then masked blocks of the keys offs_e."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    MASKED_BLOCKS: tl.constexpr = BLOCK_N // offs_e.shape[0]
    raw_seen, vst_seen = visible_new(first_m // GROUP_SIZE, ratio)
    raw_full, vst_full = raw_seen // BLOCK_N, vst_seen // BLOCK_N
    state = _attend_new(
        q, state, new, i_batch, i_head, runs, raw_full, vst_full, offs_n, scale,
        HEAD_DIM, TMA, ARITHMETIC,
    )  # fmt: skip
    offs_m = tl.minimum(first_m + opaque_zero() + tl.arange(0, q.shape[0]), last_m)
    bounds = visible_new(offs_m // GROUP_SIZE, ratio)
    ends = visible_new(last_m // GROUP_SIZE, ratio)
    return _attend_new_masked(
        q, state, new, i_batch, runs, bounds, ends,
        raw_full * MASKED_BLOCKS, vst_full * MASKED_BLOCKS, offs_e, scale, HEAD_DIM, ARITHMETIC,
    )  # fmt: skip


@triton.jit
def store_packed(
    out_ptr, lse_ptr, state, i_batch, rows, i_head, runs, ratio, first_m, last_m,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Stores packed rows first_m to last_m of a chunk: out (batch, rows, heads, head_dim) and the
    natural lse (batch, heads, rows), dense."""
    # Packed rows are computed again, see `opaque_zero`: kept, they would be spilled.
    offs_head, offs_row, stored = packed_tile(
        first_m + opaque_zero(), last_m, i_head, runs, ratio, GROUP_SIZE, state.acc.shape[0]
    )
    offs_d = tl.arange(0, state.acc.shape[1])[None, :]
    out_ptr += i_batch * rows * (HEADS * HEAD_DIM)
    offs_out = (offs_row * HEADS + offs_head).to(tl.int64)
    out_ptrs = out_ptr + offs_out[:, None] * HEAD_DIM + offs_d
    row_sum = tl.sum(state.row_sum, 1)
    out = (state.acc * (1.0 / row_sum)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=stored[:, None] & (offs_d < HEAD_DIM))
    lse_ptrs = lse_ptr + (i_batch * HEADS + offs_head) * rows + offs_row
    tl.store(lse_ptrs, (state.row_ref + tl.log2(row_sum)) * 0.6931471805599453, mask=stored)


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

    out (batch, rows, heads, head_dim) and the natural lse (batch, heads, rows) are dense.
    PAGE_MODE: how blocks of keys meet pages, see `locate`. SAME_STRIDES: v and v_cache have the
    strides of k and k_cache. MASKED_BLOCK_N: keys in a block that needs a mask, which divides
    BLOCK_N: small blocks waste less and take fewer registers. TMA: full blocks are loaded by TMA,
    through the descriptors (batch or page, head, row, head_dim). ROW_SUM_SPLITS: a row's sum is
    kept in this many parts, one for each of the threads that share the row, and added up after the
    loops. The other constants: see `softmax.Arithmetic`.
    """
    ARITHMETIC: tl.constexpr = Arithmetic(PRECISION, RESCALE_THRESHOLD, WARP_SKIP_ELEMENTS, ISA)
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_strides(k_row, v_row, kc_slot, vc_slot, HAS_CACHE, PAGE_MODE)
    length = window + window // ratio  # rows of a chunk
    rows = chunks * length
    i_batch, i_head, i_chunk, first_m, last_m = tile_of_program(
        length, chunks, KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    runs = chunk_runs(i_chunk, window, ratio, chunks)
    offs_head, offs_row, _ = packed_tile(first_m, last_m, i_head, runs, ratio, GROUP_SIZE, BLOCK_M)
    # Keys of a full and of a masked block. Made before the loops: if offs_e is made after the
    # cache's loop, sm_80 takes 523.6 instead of 521.7 instructions per MFLOP.
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    q_ptr += i_batch * q_batch
    q = load_packed(q_ptr, offs_head, offs_row, q_row, q_head, rows, HEAD_DIM, BLOCK_D)
    state = softmax_start(BLOCK_M, BLOCK_D, ROW_SUM_SPLITS)

    if HAS_CACHE:
        table = Table(block_table_ptr + i_batch * max_pages, page_size, max_pages)
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        cached = tl.minimum(cached + i_chunk * kept, max_pages * page_size)
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        full = cached // BLOCK_N * BLOCK_N
        state = attend_cache(
            q, state, cache, table, i_head, 0, full, offs_n, scale,
            HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip
        offs_e += opaque_zero()
        state = attend_cache_end(
            q, state, cache, table, full, cached, offs_e, scale,
            HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip

    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, k_desc, v_desc, 0, 0, k_row, v_row)
    state = attend_chunk(
        q, state, new, i_batch, i_head, runs, ratio, first_m, last_m, offs_n, offs_e, scale,
        GROUP_SIZE, HEAD_DIM, TMA, ARITHMETIC,
    )  # fmt: skip
    store_packed(
        out_ptr, lse_ptr, state, i_batch, rows, i_head, runs, ratio, first_m, last_m,
        KV_HEADS * GROUP_SIZE, GROUP_SIZE, HEAD_DIM,
    )  # fmt: skip
