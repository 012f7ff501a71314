"""Gradients of a ragged call: the loops of `backward_q.py` and `backward_kv.py` over sequences of
any lengths and layouts.

Every sequence has tiles here, texts of few rows too. `plan_backward_kernel` writes which, as
`ragged.plan_kernel` does for `prefill_ragged_kernel`: tiles of query rows for dQ, and blocks of new
keys for dK and dV. Blocks of the cache need no plan, as each sequence has as many as its table can
hold.
"""

import triton
import triton.language as tl

from .attention_ragged import cache_of, planned_tile
from .backward_kv import (
    Call,
    Queries,
    Sums,
    add_full_rows,
    add_masked_rows,
    cache_places,
    cached_run,
    load_keys,
    new_keys,
    new_run,
    store_keys,
)
from .backward_q import add_cache, add_new, load_tile, store_tile
from .keys import Keys
from .primitives import Runs, opaque_zero, packed_tile, run_row
from .ragged import plan_blocks, plan_rows, sequence_at

__all__ = ["dkv_ragged_kernel", "dq_ragged_kernel", "plan_backward_kernel"]

_LENGTHS = ["rows", "page_size", "max_pages", "sequences", "tiles", "blocks"]


@triton.jit(do_not_specialize=_LENGTHS)
def plan_backward_kernel(
    table_ptr, tiles_ptr, blocks_ptr, sequences, tiles, blocks,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (BLOCKs of tiles + BLOCKs of blocks,). BLOCK_M is that of dQ, BLOCK_N that of the new
    keys' dK and dV. tiles (tiles, 2) and blocks (blocks, 2): a sequence (or -1), and which of its
    own."""
    pid = tl.program_id(0)
    of_tiles = tl.cdiv(tiles, BLOCK)
    if pid < of_tiles:
        plan_rows(tiles_ptr, table_ptr, pid * BLOCK, sequences, tiles, GROUP_SIZE, BLOCK_M, BLOCK)
    else:
        first = (pid - of_tiles) * BLOCK
        plan_blocks(blocks_ptr, table_ptr, first, sequences, blocks, BLOCK_N, BLOCK)


@triton.jit(do_not_specialize=_LENGTHS)
def dq_ragged_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_desc, v_desc, k_cache_desc, v_cache_desc, table_ptr, tiles_ptr,
    grad_out_ptr, log2_ptr, delta_ptr, dq_ptr, scale,
    q_row, q_head, grad_out_row, grad_out_head, k_row, k_head, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head, rows, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, ADVANCE: tl.constexpr, REMAKE: tl.constexpr,
    SUM_KEYS: tl.constexpr, SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * KV_HEADS,). Constants as those of `dq_kernel`, tensors as those of
    `prefill_ragged_kernel`."""
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    i_seq, kept, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, 0, KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    if i_seq < 0:
        return
    i_head = tl.program_id(0) % KV_HEADS
    i_batch = tl.cast(0, tl.int64)
    offs_head, offs_row, _ = packed_tile(first_m, last_m, i_head, runs, ratio, GROUP_SIZE, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    tile = load_tile(
        q_ptr, grad_out_ptr, log2_ptr, delta_ptr, i_batch, offs_head, offs_row, rows, scale,
        q_row, q_head, grad_out_row, grad_out_head, HEADS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_CACHE:
        table, cached = cache_of(
            i_seq, kept, block_table_ptr, cache_seqlens_ptr, page_size, max_pages
        )
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        dq = add_cache(
            dq, tile, cache, table, i_head, cached, offs_n, offs_e,
            HEAD_DIM, PAGE_MODE, ADVANCE, REMAKE, SUM_KEYS, TMA, PRECISION, ALLOW_LICM,
        )  # fmt: skip
    # The tile is read again, see `opaque_zero`: kept through a loop, it would be spilled.
    _, _, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, opaque_zero(), KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    k_ptr += i_head.to(tl.int64) * k_head
    v_ptr += i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, k_desc, v_desc, 0, 0, k_row, v_row)
    dq = add_new(
        dq, tile, new, i_batch, i_head, runs, ratio, first_m, last_m, offs_n, offs_e,
        GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip
    _, _, runs, ratio, first_m, last_m = planned_tile(
        tiles_ptr, table_ptr, opaque_zero(1), KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    store_tile(
        dq_ptr, dq, i_head, runs, ratio, first_m, last_m, HEADS, GROUP_SIZE, HEAD_DIM
    )  # fmt: skip


@triton.jit
def _walk(
    zero, table_ptr, blocks_ptr, cache_seqlens_ptr, page_size, max_pages,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """What a program of `dkv_ragged_kernel` does: (sequence or -1, what its table says of it, its
    keys, its raw rows, its VST rows). `zero` is 0, or an `opaque_zero` where all this is computed
    again."""
    block = tl.program_id(0) // KV_HEADS + zero
    if CACHE:
        each = tl.cdiv(page_size * max_pages, BLOCK_N)
        i_seq, i_block = block // each, block % each
    else:
        i_seq = tl.load(blocks_ptr + block * 2)
        i_block = tl.load(blocks_ptr + block * 2 + 1)
    s = sequence_at(table_ptr, i_seq, i_seq >= 0)
    kept = s.window // s.ratio
    call = Call(
        cache_seqlens_ptr, s.window, s.ratio, kept, s.chunks, page_size, max_pages, s.chunks * 0 + 1
    )
    if CACHE:
        keys, raw, vst = cached_run(
            i_block * BLOCK_N, i_seq, call, Runs(s.raw, s.vst), 0, s.chunks, BLOCK_N, BLOCK_M
        )
    else:
        i_chunk, is_vst, start = new_keys(i_block, s.chunks, s.window, BLOCK_N)
        runs = Runs(s.raw + i_chunk * s.window, s.vst + i_chunk * kept)
        keys, raw, vst = new_run(is_vst, start, call, runs, BLOCK_N, BLOCK_M)
    # Not `call`: Triton 3.6 cannot return a tuple that holds a pointer which is None.
    return i_seq, s, keys, raw, vst


@triton.jit(do_not_specialize=_LENGTHS)
def dkv_ragged_kernel(
    q_ptr, grad_out_ptr, log2_ptr, delta_ptr, q_desc, grad_out_desc,
    k_ptr, v_ptr, block_table_ptr, cache_seqlens_ptr, table_ptr, blocks_ptr, dk_ptr, dv_ptr, scale,
    q_row, q_head, grad_out_row, grad_out_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head, rows, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, MASKED_BLOCK_M: tl.constexpr,
    CACHE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """As `dkv_kernel`.

    New keys: k, v, dk and dv are (row, head). Grid: (blocks * KV_HEADS,).
    CACHE: k and v are (page, slot, head), dk and dv float32 (sequence, entry, head). Grid: (blocks
    of a table's entries * sequences * KV_HEADS,).
    """
    i_head = tl.program_id(0) % KV_HEADS
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    i_seq, _, run, raw, vst = _walk(
        0, table_ptr, blocks_ptr, cache_seqlens_ptr, page_size, max_pages,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    if i_seq < 0:
        return
    offs_key = run.start + tl.arange(0, BLOCK_N)
    if CACHE:
        first, at_key = cache_places(
            block_table_ptr, i_seq, offs_key, run.end, page_size, max_pages
        )
    else:
        first = tl.cast(0, tl.int64)
        at_key = run_row(run.is_vst, offs_key, Runs(raw.base, vst.base)).to(tl.int64)[:, None]
    keys = load_keys(
        k_ptr, v_ptr, first, at_key, i_head, offs_key, run.end, offs_d, scale,
        k_batch, k_row, k_head, v_batch, v_row, v_head, HEAD_DIM,
    )  # fmt: skip
    queries = Queries(
        q_ptr, grad_out_ptr, log2_ptr, delta_ptr, q_desc, grad_out_desc,
        tl.cast(0, tl.int64), rows, q_row, q_head, grad_out_row, grad_out_head,
    )  # fmt: skip
    zeros = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = Sums(zeros, zeros)

    sums = add_full_rows(
        sums, keys, queries, raw, vst, i_head,
        BLOCK_M, GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip
    # What follows from the plan is computed again, see `opaque_zero`.
    zero = opaque_zero()
    _, s, run, raw, vst = _walk(
        zero, table_ptr, blocks_ptr, cache_seqlens_ptr, page_size, max_pages,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    kept = s.window // s.ratio
    call = Call(
        cache_seqlens_ptr, s.window, s.ratio, kept, s.chunks, page_size, max_pages, s.chunks * 0 + 1
    )
    offs_key = run.start + zero + tl.arange(0, BLOCK_N)
    i_head = (tl.program_id(0) + zero) % KV_HEADS
    sums = add_masked_rows(
        sums, keys, queries, run, raw, vst, call, i_head, offs_key,
        MASKED_BLOCK_M, CACHE, GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip

    zero = opaque_zero(1)
    i_head = (tl.program_id(0) + zero) % KV_HEADS
    i_seq, _, run, raw, vst = _walk(
        zero, table_ptr, blocks_ptr, cache_seqlens_ptr, page_size, max_pages,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    if CACHE:
        row = i_seq.to(tl.int64) * (max_pages * page_size) + run.start
    else:
        row = run_row(run.is_vst, run.start, Runs(raw.base, vst.base)).to(tl.int64)
    offs_n = opaque_zero() + tl.arange(0, BLOCK_N)
    places = (row + offs_n) * KV_HEADS + i_head
    store_keys(dk_ptr, dv_ptr, sums, run, offs_n, places, HEAD_DIM)
