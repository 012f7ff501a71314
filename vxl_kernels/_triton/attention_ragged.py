"""Attention of a ragged call: sequences of any lengths and layouts, as `plan_kernel` has laid them
out. Loops and arithmetic are those of `prefill.py` and `decode.py`.

Chunks and long texts are cut into tiles, and each program of `prefill_ragged_kernel` reads in the
plan which tile it computes. Texts of few rows are cut into splits of their keys by
`decode_ragged_kernel`, and `merge_ragged_kernel` adds up the splits in order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .decode import attend_own, attend_split, merge_splits
from .keys import Keys, Table, cached_entries
from .prefill import attend_cache_end, attend_chunk, store_packed
from .primitives import Runs, assume_strides, load_packed, opaque_zero, packed_tile
from .ragged import Splits, sequence_at, sequence_of_row, split_rows, split_size
from .softmax import Arithmetic, attend_cache, softmax_start

__all__ = [
    "cache_of",
    "decode_ragged_kernel",
    "merge_ragged_kernel",
    "planned_tile",
    "prefill_ragged_kernel",
]

_LENGTHS = ["rows", "page_size", "max_pages", "sequences", "splits"]


@triton.jit
def planned_tile(
    tiles_ptr, table_ptr, zero,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(sequence or -1, chunk, its entries before the chunk, its runs, ratio, first packed row, last
    packed row) of a program of tiles. `zero` is 0, or an `opaque_zero` where all this is read
    again."""
    tile_ptr = tiles_ptr + (tl.program_id(0) // KV_HEADS + zero) * 2
    i_seq = tl.load(tile_ptr)
    i_tile = tl.load(tile_ptr + 1)
    sequence = sequence_at(table_ptr, i_seq, i_seq >= 0)
    kept = sequence.window // sequence.ratio
    i_chunk = i_tile % sequence.chunks
    packed = (sequence.window + kept) * GROUP_SIZE
    # Programs start in the order of their number: those of a sequence with the most keys first.
    first_m = (tl.cdiv(packed, BLOCK_M) - 1 - i_tile // sequence.chunks) * BLOCK_M
    last_m = tl.minimum(first_m + BLOCK_M, packed) - 1
    runs = Runs(sequence.raw + i_chunk * sequence.window, sequence.vst + i_chunk * kept)
    return i_seq, i_chunk * kept, runs, sequence.ratio, first_m, last_m


@triton.jit
def cache_of(i_seq, kept, block_table_ptr, cache_seqlens_ptr, page_size, max_pages):
    """(table of a sequence, its cache entries that a chunk sees after `kept` of the call)."""
    table = Table(block_table_ptr + i_seq.to(tl.int64) * max_pages, page_size, max_pages)
    cached = cached_entries(cache_seqlens_ptr, i_seq, page_size, max_pages)
    return table, tl.minimum(cached + kept, max_pages * page_size)


@triton.jit(do_not_specialize=_LENGTHS)
def prefill_ragged_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_desc, v_desc, k_cache_desc, v_cache_desc, table_ptr, tiles_ptr, out_ptr, lse_ptr, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head, rows, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr,
    ROW_SUM_SPLITS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * KV_HEADS,). Constants and strides as those of `prefill_kernel`. q (rows,
    heads, head_dim), k and v (rows, KV_HEADS, head_dim); out, as q, and the natural lse (heads,
    rows) are dense."""
    ARITHMETIC: tl.constexpr = Arithmetic(PRECISION, RESCALE_THRESHOLD, WARP_SKIP_ELEMENTS, ISA)
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_strides(k_row, v_row, kc_slot, vc_slot, HAS_CACHE, PAGE_MODE)
    i_seq, kept, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, 0, KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    if i_seq < 0:
        return
    i_head = tl.program_id(0) % KV_HEADS
    offs_head, offs_row, _ = packed_tile(first_m, last_m, i_head, runs, ratio, GROUP_SIZE, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    q = load_packed(q_ptr, offs_head, offs_row, q_row, q_head, rows, HEAD_DIM, BLOCK_D)
    state = softmax_start(BLOCK_M, BLOCK_D, ROW_SUM_SPLITS)

    if HAS_CACHE:
        table, cached = cache_of(
            i_seq, kept, block_table_ptr, cache_seqlens_ptr, page_size, max_pages
        )
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        state = attend_cache(
            q, state, cache, table, i_head, 0, cached // BLOCK_N * BLOCK_N, offs_n, scale,
            HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip

    # The tile is read again, see `opaque_zero`: kept through a loop, it would be spilled.
    zero = opaque_zero()
    i_seq, kept, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, zero, KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    if HAS_CACHE:
        offs_e = zero + tl.arange(0, MASKED_BLOCK_N)
        state = attend_cache_end(
            q, state, cache, table, cached // BLOCK_N * BLOCK_N, cached, offs_e, scale,
            HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip

    k_ptr += i_head.to(tl.int64) * k_head
    v_ptr += i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, k_desc, v_desc, 0, 0, k_row, v_row)
    state = attend_chunk(
        q, state, new, tl.cast(0, tl.int64), i_head, runs, ratio, first_m, last_m, offs_n, offs_e,
        scale, GROUP_SIZE, HEAD_DIM, TMA, ARITHMETIC,
    )  # fmt: skip
    _, _, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, opaque_zero(1), KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    store_packed(
        out_ptr, lse_ptr, state, tl.cast(0, tl.int64), rows, i_head, runs, ratio, first_m, last_m,
        KV_HEADS * GROUP_SIZE, GROUP_SIZE, HEAD_DIM,
    )  # fmt: skip


# -- texts of few rows -----------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What `plan_kernel` has written of groups."""

    table_ptr: Any
    order_ptr: Any
    ranks_ptr: Any
    sizes_ptr: Any
    firsts_ptr: Any


@triton.jit
def _split_program(
    zero, plan, sequences, splits,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(sequence, its rows, KV head, split, first sequence of the group in `order`, first packed row
    of the group, last packed row) of a program of decode. There is no work if the last is before
    the first.

    The packed rows of a group are those of its sequences, one after the other. Tile i of them falls
    to the program of the sequence of rank i, so that no sequence needs more programs in a group
    than by itself.
    """
    pid = tl.program_id(0) + zero
    i_seq = pid % sequences
    i_head = pid // sequences % KV_HEADS
    i_part = pid // sequences // KV_HEADS
    rows = split_rows(sequence_at(plan.table_ptr, i_seq, i_seq >= 0), GROUP_SIZE, SPLITS)
    tiles = tl.maximum(tl.cdiv(rows * GROUP_SIZE, BLOCK_M), 1)
    i_split = i_part // tiles
    at = tl.minimum(i_split, splits - 1).to(tl.int64) * sequences + i_seq
    i_tile = tl.load(plan.ranks_ptr + at) * tiles + i_part % tiles
    packed = tl.load(plan.sizes_ptr + at) * rows * GROUP_SIZE
    packed = tl.where(i_split < splits, packed, 0)
    last = tl.minimum((i_tile + 1) * BLOCK_M, packed) - 1
    order = at - i_seq + tl.load(plan.firsts_ptr + at)
    return i_seq, rows, i_head, i_split, order, i_tile * BLOCK_M, last


@triton.jit
def _group_rows(offs_m, rows, order, plan, GROUP_SIZE: tl.constexpr):
    """(sequence, row within it) of packed rows of a group."""
    each = rows * GROUP_SIZE
    at_seq = tl.load(plan.order_ptr + order + offs_m // each)
    return at_seq, offs_m % each // GROUP_SIZE


@triton.jit(do_not_specialize=_LENGTHS)
def decode_ragged_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_cache_desc, v_cache_desc, table_ptr, starts_ptr, order_ptr, ranks_ptr, sizes_ptr, firsts_ptr,
    partial_ptr, partial_lse_ptr, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    rows, page_size, max_pages, sequences, splits,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, SAME_STRIDES: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SPLIT_ROWS: tl.constexpr, SPLIT_DOUBLINGS: tl.constexpr,
    SPLIT_LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    RESCALE_THRESHOLD: tl.constexpr, WARP_SKIP_ELEMENTS: tl.constexpr,
    ROW_SUM_SPLITS: tl.constexpr, ISA: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences * KV_HEADS * parts,), parts: at least splits x tiles of any sequence.
    Programs of a split follow one another for all sequences, because groups read the same keys.

    partial (parts of all sequences, heads, head_dim) and partial_lse (parts of all sequences,
    heads), float32: a sequence begins at its entry of `starts`, then split by split its rows.
    """
    ARITHMETIC: tl.constexpr = Arithmetic(PRECISION, RESCALE_THRESHOLD, WARP_SKIP_ELEMENTS, ISA)
    SPLITS: tl.constexpr = Splits(SPLIT_SIZE, SPLIT_ROWS, SPLIT_DOUBLINGS, SPLIT_LIMIT)
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    assume_strides(k_row, v_row, kc_slot, vc_slot, HAS_CACHE, PAGE_MODE)
    plan = _Plan(table_ptr, order_ptr, ranks_ptr, sizes_ptr, firsts_ptr)
    i_seq, own_rows, i_head, i_split, order, first_m, last_m = _split_program(
        0, plan, sequences, splits, KV_HEADS, GROUP_SIZE, SPLITS, BLOCK_M
    )
    if last_m < first_m:
        return
    if HAS_CACHE:
        size = split_size(own_rows, GROUP_SIZE, SPLITS)
        cached = cached_entries(cache_seqlens_ptr, i_seq, page_size, max_pages)
        if i_split > tl.cdiv(cached, size):
            return
        # Split 0 has no cache entries and the others no new keys: those loops do not run.
        first = tl.maximum(i_split - 1, 0) * size
        end = tl.where(i_split == 0, 0, tl.minimum(first + size, cached))

    # Packed rows past the last repeat it and are not stored.
    offs_m = tl.minimum(first_m + tl.arange(0, BLOCK_M), last_m)
    at_seq, row = _group_rows(offs_m, own_rows, order, plan, GROUP_SIZE)
    offs_row = tl.load(table_ptr + at_seq * 5 + 3) + row
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    q = load_packed(q_ptr, offs_head, offs_row, q_row, q_head, rows, HEAD_DIM, BLOCK_D)
    state = softmax_start(BLOCK_M, BLOCK_D, ROW_SUM_SPLITS)

    if HAS_CACHE:
        table = Table(block_table_ptr + i_seq.to(tl.int64) * max_pages, page_size, max_pages)
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        state = attend_split(
            q, state, cache, table, i_head, first, end, scale,
            BLOCK_N, MASKED_BLOCK_N, HEAD_DIM, PAGE_MODE, TMA, ARITHMETIC,
        )  # fmt: skip

    # What follows from the program's number is read again, see `opaque_zero`.
    zero = opaque_zero()
    i_seq, own_rows, i_head, i_split, order, first_m, last_m = _split_program(
        zero, plan, sequences, splits, KV_HEADS, GROUP_SIZE, SPLITS, BLOCK_M
    )
    offs_m = tl.minimum(first_m + zero + tl.arange(0, BLOCK_M), last_m)
    bound = offs_m // GROUP_SIZE + 1
    new_end = tl.where(i_split == 0, last_m // GROUP_SIZE + 1, 0)
    first_row = tl.load(table_ptr + i_seq * 5 + 3)
    k_ptr += first_row.to(tl.int64) * k_row + i_head.to(tl.int64) * k_head
    v_ptr += first_row.to(tl.int64) * v_row + i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, None, None, 0, 0, k_row, v_row)
    offs_e = zero + tl.arange(0, MASKED_BLOCK_N)
    state = attend_own(q, state, new, 0, new_end, bound, offs_e, scale, HEAD_DIM, ARITHMETIC)

    zero = opaque_zero(2)
    i_seq, own_rows, i_head, i_split, order, first_m, last_m = _split_program(
        zero, plan, sequences, splits, KV_HEADS, GROUP_SIZE, SPLITS, BLOCK_M
    )
    offs_m = first_m + zero + tl.arange(0, BLOCK_M)
    stored = offs_m <= last_m
    offs_m = tl.minimum(offs_m, last_m)
    at_seq, row = _group_rows(offs_m, own_rows, order, plan, GROUP_SIZE)
    part = tl.load(starts_ptr + at_seq) + i_split * own_rows + row
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_partial = part.to(tl.int64) * (KV_HEADS * GROUP_SIZE) + offs_head
    row_sum = tl.sum(state.row_sum, 1)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = stored[:, None] & (offs_d < HEAD_DIM)
    partial_ptrs = partial_ptr + offs_partial[:, None] * HEAD_DIM + offs_d
    tl.store(partial_ptrs, state.acc * (1.0 / row_sum)[:, None], mask=mask)
    tl.store(partial_lse_ptr + offs_partial, state.row_ref + tl.log2(row_sum), mask=stored)


@triton.jit(do_not_specialize=_LENGTHS)
def merge_ragged_kernel(
    partial_ptr, partial_lse_ptr, cache_seqlens_ptr, table_ptr, starts_ptr, out_ptr, lse_ptr,
    rows, page_size, max_pages, sequences,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, SPLIT_SIZE: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    SPLIT_DOUBLINGS: tl.constexpr, SPLIT_LIMIT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (rows * HEADS,). Rows of sequences without splits are left as they are."""
    SPLITS: tl.constexpr = Splits(SPLIT_SIZE, SPLIT_ROWS, SPLIT_DOUBLINGS, SPLIT_LIMIT)
    i_row = tl.program_id(0) // HEADS
    i_head = tl.program_id(0) % HEADS
    i_seq, _ = sequence_of_row(table_ptr, i_row, sequences, 64)
    sequence = sequence_at(table_ptr, i_seq, i_seq >= 0)
    own_rows = split_rows(sequence, GROUP_SIZE, SPLITS)
    # Programs of other rows go on with no splits and store nothing. An early return would make the
    # compiler expect warps that part, for which sm_80 spills.
    used = tl.minimum(own_rows, 1)
    i_seq = tl.maximum(i_seq, 0)
    if HAS_CACHE:
        cached = cached_entries(cache_seqlens_ptr, i_seq, page_size, max_pages)
        used += used * tl.cdiv(cached, split_size(own_rows, GROUP_SIZE, SPLITS))
    part = tl.load(starts_ptr + i_seq) + i_row - sequence.raw
    out, lse = merge_splits(
        partial_ptr, partial_lse_ptr, part.to(tl.int64) * HEADS + i_head,
        own_rows.to(tl.int64) * HEADS, used, HEAD_DIM, BLOCK_D, BLOCK_S,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    out = out.to(out_ptr.dtype.element_ty)
    at = (i_row.to(tl.int64) * HEADS + i_head) * HEAD_DIM
    tl.store(out_ptr + at + offs_d, out, mask=offs_d < tl.where(used > 0, HEAD_DIM, 0))
    offs_one = tl.arange(0, 1)
    lse_ptrs = lse_ptr + i_head.to(tl.int64) * rows + i_row + offs_one
    tl.store(lse_ptrs, lse * 0.6931471805599453, mask=offs_one < used)
