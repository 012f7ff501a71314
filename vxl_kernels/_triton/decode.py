"""Attention of few rows (decode, short texts) over `[cache | new keys]`, causal.

Few rows give too few tiles to fill a GPU, so the cache is cut into splits of SPLIT_SIZE entries. A
split depends neither on its neighbours nor on other sequences nor on the sequence's length, so keys
are added in the same order in every batch. A second kernel merges the splits in order. Split 0 is
the call's new keys, split s > 0 the cache entries from (s - 1) * SPLIT_SIZE on.

The grid covers the capacity of the block table. Programs past the end of a sequence return without
writing, and the merge kernel skips their splits by the sequence's length. So no value is read on
the host.
"""

import triton
import triton.language as tl

from .keys import Keys, Table, cached_entries, new_block
from .primitives import assume_strides, load_rows, opaque_zero
from .softmax import (
    Arithmetic,
    attend_cache,
    attend_cache_masked,
    attend_masked_block,
    softmax_start,
)

__all__ = ["attend_own", "attend_split", "decode_kernel", "merge_kernel", "merge_splits"]

_LENGTHS = ["rows", "page_size", "max_pages", "splits"]


@triton.jit
def _program(zero, rows, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sequence, split, KV head, packed rows [BLOCK_M], last packed row) of this program. Packed
    row i is row i // GROUP_SIZE and query head i % GROUP_SIZE of the KV head; numbers past the last
    are not stored. Programs of a split's tiles and heads follow one another, because they read the
    same keys or pages. `zero` is 0, or an `opaque_zero` where all this is computed again.
    """
    pid = tl.program_id(0) + zero
    i_batch = (tl.program_id(1) + zero).to(tl.int64)
    tiles = tl.cdiv(rows * GROUP_SIZE, BLOCK_M)
    first = pid // KV_HEADS % tiles * BLOCK_M
    last = tl.minimum(first + BLOCK_M, rows * GROUP_SIZE) - 1
    return i_batch, pid // KV_HEADS // tiles, pid % KV_HEADS, first + tl.arange(0, BLOCK_M), last


@triton.jit
def attend_split(
    q, state, cache, table, i_head, start, end, scale,
    BLOCK_N: tl.constexpr, MASKED_BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_MODE: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the cache entries of a split, from `start` to `end`."""
    full = end // BLOCK_N * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    state = attend_cache(
        q, state, cache, table, i_head, start, full, offs_n, scale,
        HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
    )  # fmt: skip
    # Less than a block is left, in the sequence's last split. Blocks of MASKED_BLOCK_N keys may
    # meet pages in another way. V is loaded with K: nothing else hides its latency.
    SAME_BLOCKS: tl.constexpr = PAGE_MODE == "block_in_page" or MASKED_BLOCK_N == BLOCK_N
    MODE: tl.constexpr = PAGE_MODE if SAME_BLOCKS else "gather"
    offs_e = opaque_zero() + tl.arange(0, MASKED_BLOCK_N)
    return attend_cache_masked(
        q, state, cache, table, full, end, offs_e, scale,
        HEAD_DIM, MODE, MODE, True, True, ARITHMETIC,
    )  # fmt: skip


@triton.jit
def attend_own(
    q, state, new, i_batch, end, bound, offs_n, scale,
    HEAD_DIM: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the new keys before `end`. Packed row i sees those below bound[i]."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    offs_d = tl.arange(0, q.shape[1])[None, :]
    for start in tl.range(0, end, BLOCK_N, num_stages=1):
        block = new_block(new, i_batch, tl.cast(start, tl.int64), offs_n, offs_d)
        state = attend_masked_block(
            q, state, block, start + offs_n, end, bound, scale, HEAD_DIM, True, ARITHMETIC
        )
    return state


@triton.jit
def _store_split(
    partial_ptr, partial_lse_ptr, state, first_row, i_head, offs_m, last_m,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Stores the packed rows up to last_m of a split, whose row 0 is row first_row of all."""
    offs_d = tl.arange(0, state.acc.shape[1])[None, :]
    stored = offs_m <= last_m
    offs_m = tl.minimum(offs_m, last_m)
    offs_row = first_row + offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    row_sum = tl.sum(state.row_sum, 1)
    offs_partial = offs_row * (KV_HEADS * GROUP_SIZE) + offs_head
    partial_ptrs = partial_ptr + offs_partial[:, None] * HEAD_DIM + offs_d
    mask = stored[:, None] & (offs_d < HEAD_DIM)
    tl.store(partial_ptrs, state.acc * (1.0 / row_sum)[:, None], mask=mask)
    tl.store(partial_lse_ptr + offs_partial, state.row_ref + tl.log2(row_sum), mask=stored)


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
    ARITHMETIC: tl.constexpr = Arithmetic(PRECISION, RESCALE_THRESHOLD, WARP_SKIP_ELEMENTS, ISA)
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_strides(k_row, v_row, kc_slot, vc_slot, HAS_CACHE, PAGE_MODE)
    i_batch, i_split, i_head, offs_m, last_m = _program(0, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        first = (i_split - 1) * SPLIT_SIZE
        if (i_split > 0) & (first >= cached):
            return
        # Split 0 has no cache entries and the others no new keys: those loops do not run.
        first = tl.maximum(first, 0)
        end = tl.where(i_split == 0, 0, tl.minimum(first + SPLIT_SIZE, cached))

    # Packed rows past the last repeat it and are not stored.
    offs_m = tl.minimum(offs_m, last_m)
    offs_row = offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    # Not `load_packed`: with its order of sums, sm_80 takes 514.0 instead of 513.1 instructions per
    # MFLOP for 128 packed rows.
    q_ptrs = q_ptr + i_batch * q_batch + tl.arange(0, BLOCK_D)[None, :]
    q_ptrs += offs_row.to(tl.int64)[:, None] * q_row
    q_ptrs += offs_head.to(tl.int64)[:, None] * q_head
    q = load_rows(q_ptrs, offs_row, rows, HEAD_DIM, False)
    state = softmax_start(BLOCK_M, BLOCK_D, ROW_SUM_SPLITS)

    if HAS_CACHE:
        table = Table(block_table_ptr + i_batch * max_pages, page_size, max_pages)
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        state = attend_split(
            q, state, cache, table, i_head, first, end, scale,
            BLOCK_N, MASKED_BLOCK_N, HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip

    # What follows from the program's number is computed again, see `opaque_zero`.
    zero = opaque_zero()
    offs_e = zero + tl.arange(0, MASKED_BLOCK_N)
    i_batch, i_split, i_head, offs_m, last_m = _program(zero, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    bound = tl.minimum(offs_m, last_m) // GROUP_SIZE + 1
    new_end = tl.where(i_split == 0, last_m // GROUP_SIZE + 1, 0)
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, None, None, 0, 0, k_row, v_row)
    state = attend_own(q, state, new, i_batch, new_end, bound, offs_e, scale, HEAD_DIM, ARITHMETIC)

    zero = opaque_zero(2)
    i_batch, i_split, i_head, offs_m, last_m = _program(zero, rows, KV_HEADS, GROUP_SIZE, BLOCK_M)
    first_row = (i_batch * splits + i_split) * rows
    _store_split(
        partial_ptr, partial_lse_ptr, state, first_row, i_head, offs_m, last_m,
        KV_HEADS, GROUP_SIZE, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def merge_splits(
    partial_ptr, partial_lse_ptr, part, each, used,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sums `used` splits in order, BLOCK_S at a time: (out [D], lse to base 2 [1]). `part` is split
    0 of a row and head, and `each` leads to the next split."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
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
    return acc / row_sum, row_max + tl.log2(row_sum)


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(
    partial_ptr, partial_lse_ptr, cache_seqlens_ptr, out_ptr, lse_ptr,
    rows, page_size, max_pages, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, SPLIT_SIZE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (rows * HEADS, batch)."""
    i_row = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    used = 1
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        used += tl.cdiv(cached, SPLIT_SIZE)
    part = ((i_batch * splits) * rows + i_row) * HEADS + i_head  # of split 0
    each = rows.to(tl.int64) * HEADS  # from a split to the next
    out, lse = merge_splits(
        partial_ptr, partial_lse_ptr, part, each, used, HEAD_DIM, BLOCK_D, BLOCK_S
    )
    offs_d = tl.arange(0, BLOCK_D)
    row = (i_batch * rows + i_row) * HEADS + i_head
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out, mask=offs_d < HEAD_DIM)
    lse_ptrs = lse_ptr + (i_batch * HEADS + i_head) * rows + i_row + tl.arange(0, 1)
    tl.store(lse_ptrs, lse * 0.6931471805599453)
