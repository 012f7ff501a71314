"""Gradients of attention: what both kernels need, and dQ by tiles of query rows.

With P recomputed from the LSE and `delta` = rowsum(dO * O) minus the gradient of the LSE:

    dS = scale * P * (dO V^T - delta)      dQ = dS K      dK = dS^T Q      dV = P^T dO

dS is rounded to the dtype of the inputs. It contains `scale`, which keeps it in float16's range.
`delta_kernel` multiplies delta by `scale`, so that dS takes one multiply-add instead of a
subtraction.

Each gradient belongs to one program, which adds in a fixed order. There are no atomics and nothing
of size rows x keys in memory, and a sequence's result is the same in every batch.

A chunk is two runs of rows, raw tokens and VSTs. In split order, each run is contiguous in memory.
Rows in position order (interleaved, or plain text) are passed as a chunk of raw tokens alone. Only
`kept`, the entries that a chunk adds to the cache, tells it from text. So both orders take the same
path through the kernels.

`dq_kernel` walks the keys as `prefill.py` does: packed rows are positions x query heads of a KV
head. `backward_kv.py` has dK and dV.

Source: FlashAttention-2, section 3.1.2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .keys import Keys, Table, advance, cache_block, cached_entries, load_block, locate, new_block
from .primitives import (
    block_of_run,
    chunk_runs,
    load_rows,
    opaque_zero,
    packed_tile,
    run_row,
    tile_of_program,
    visible_new,
)

__all__ = [
    "LOG2E",
    "add_cache",
    "add_new",
    "delta_kernel",
    "dq_kernel",
    "load_tile",
    "scores_backward",
    "store_tile",
]

# Lengths are data: none is compiled in. What strides tell of them: `launch_common.row_strides`.
_LENGTHS = ["window", "ratio", "kept", "chunks", "page_size", "max_pages"]
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, log2_ptr,
    grad_out_batch, grad_out_row, grad_out_head, out_batch, out_row, out_head, scale, rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta times scale, and the LSE to base 2. Grid: (blocks of rows * HEADS, batch)."""
    i_head = tl.program_id(0) % HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    offs_row = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    at_row = offs_row.to(tl.int64)[:, None]
    grad_out_ptr += i_batch * grad_out_batch + i_head.to(tl.int64) * grad_out_head
    out_ptr += i_batch * out_batch + i_head.to(tl.int64) * out_head
    grad = load_rows(grad_out_ptr + at_row * grad_out_row + offs_d, offs_row, rows, HEAD_DIM, True)
    out = load_rows(out_ptr + at_row * out_row + offs_d, offs_row, rows, HEAD_DIM, True)
    at = (i_batch * HEADS + i_head) * rows + offs_row
    inside = offs_row < rows
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    log2 = tl.load(lse_ptr + at, mask=inside, other=0.0) * LOG2E
    tl.store(delta_ptr + at, delta * scale, mask=inside)
    tl.store(log2_ptr + at, log2, mask=inside)


@triton.jit
def scores_backward(
    x, y, dx, dy, log2, delta, scale, log2_scale, seen,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of a block: x y^T are the scores, dx dy^T the gradients of P. Rows may be query
    rows (x = Q, y = K, dx = dO, dy = V) or keys (the other way round). delta contains `scale`."""
    scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * log2_scale - log2
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores)
    dp = tl.dot(dx, tl.trans(dy), input_precision=PRECISION)
    return p, p * (dp * scale - delta)


# -- dQ ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A tile of packed query rows."""

    q: Any
    """[M, D]"""
    grad: Any
    """[M, D]: gradients of the output."""
    log2: Any
    """[M, 1]: LSE to base 2."""
    delta: Any
    """[M, 1]: delta x scale."""
    scale: Any
    log2_scale: Any


@triton.jit
def load_tile(
    q_ptr, grad_ptr, log2_ptr, delta_ptr, i_batch, offs_head, offs_row, rows, scale,
    q_row, q_head, grad_row, grad_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The packed rows (offs_head, offs_row) of a sequence. log2 and delta (batch, heads, rows) are
    dense."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    at_row, at_head = offs_row.to(tl.int64)[:, None], offs_head.to(tl.int64)[:, None]
    q_ptrs = q_ptr + at_row * q_row + at_head * q_head
    q = load_rows(q_ptrs + offs_d, offs_row, rows, HEAD_DIM, False)
    grad_ptrs = grad_ptr + at_row * grad_row
    grad_ptrs += at_head * grad_head
    grad = load_rows(grad_ptrs + offs_d, offs_row, rows, HEAD_DIM, False)
    offs_lse = (i_batch * HEADS + offs_head) * rows + offs_row
    log2 = tl.load(log2_ptr + offs_lse)[:, None]
    delta = tl.load(delta_ptr + offs_lse)[:, None]
    return Rows(q, grad, log2, delta, scale, scale * LOG2E)


@triton.jit
def store_tile(
    dq_ptr, dq, i_head, runs, ratio, first_m, last_m,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Stores packed rows first_m to last_m of a chunk: dq (rows, heads, head_dim), dense."""
    # Packed rows are computed again, see `opaque_zero`.
    offs_head, offs_row, stored = packed_tile(
        first_m + opaque_zero(), last_m, i_head, runs, ratio, GROUP_SIZE, dq.shape[0]
    )
    offs_d = tl.arange(0, dq.shape[1])[None, :]
    offs_out = (offs_row * HEADS + offs_head).to(tl.int64)
    dq_ptrs = dq_ptr + offs_out[:, None] * HEAD_DIM + offs_d
    mask = stored[:, None] & (offs_d < HEAD_DIM)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_keys(dq, rows, k, v, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq [M, D] with the gradient through a block of keys added."""
    _, ds = scores_backward(
        rows.q, k, rows.grad, v, rows.log2, rows.delta, rows.scale, rows.log2_scale, seen,
        MASKED, PRECISION,
    )  # fmt: skip
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _add_block(
    dq, rows, keys, block, i_head,
    HEAD_DIM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq with a block of keys that all rows see."""
    k = load_block(keys.k_desc, block.at_batch, i_head, block.at_row, block.k_ptrs, HEAD_DIM, TMA)
    v = load_block(keys.v_desc, block.at_batch, i_head, block.at_row, block.v_ptrs, HEAD_DIM, TMA)
    return _add_keys(dq, rows, k, v, 0, False, PRECISION)


@triton.jit
def _add_masked_block(
    dq, rows, block, offs_key, end, seen, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """dq with a block of the keys offs_key, those before `end`, as far as `seen`."""
    k = load_rows(block.k_ptrs, offs_key, end, HEAD_DIM, True)
    v = load_rows(block.v_ptrs, offs_key, end, HEAD_DIM, True)
    return _add_keys(dq, rows, k, v, seen, True, PRECISION)


@triton.jit
def add_cache(
    dq, rows, cache, table, i_head, cached, offs_n, offs_e,
    HEAD_DIM: tl.constexpr, PAGE_MODE: tl.constexpr, ADVANCE: tl.constexpr, REMAKE: tl.constexpr,
    SUM_KEYS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """dq with the first `cached` entries of the cache, which all rows see: full blocks of the keys
    offs_n, then masked blocks of the keys offs_e."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    MASKED_BLOCK_N: tl.constexpr = offs_e.shape[0]
    full = cached // BLOCK_N * BLOCK_N
    offs_d = tl.arange(0, dq.shape[1])[None, :]
    place = locate(table, 0, offs_n, BLOCK_N, PAGE_MODE)
    for start in tl.range(0, full, BLOCK_N, disable_licm=not ALLOW_LICM):
        if not ADVANCE:
            place = locate(table, start, offs_n, BLOCK_N, PAGE_MODE)
        block = cache_block(cache, place, offs_n, offs_d, PAGE_MODE, SUM_KEYS)
        if ADVANCE:
            place = advance(table, place, BLOCK_N, PAGE_MODE)
        dq = _add_block(dq, rows, cache, block, i_head, HEAD_DIM, TMA, PRECISION)
    if REMAKE:
        offs_e += opaque_zero()
    PLACES: tl.constexpr = "block_in_page" if PAGE_MODE == "block_in_page" else "gather"
    for start in tl.range(full, cached, MASKED_BLOCK_N, num_stages=1, disable_licm=not ALLOW_LICM):
        masked_place = locate(table, start, offs_e, MASKED_BLOCK_N, PLACES)
        block = cache_block(cache, masked_place, offs_e, offs_d, PAGE_MODE, SUM_KEYS)
        offs_key = start + offs_e
        seen = (offs_key < cached)[None, :]
        dq = _add_masked_block(dq, rows, block, offs_key, cached, seen, HEAD_DIM, PRECISION)
    return dq


@triton.jit
def add_new(
    dq, rows, new, i_batch, i_head, runs, ratio, first_m, last_m, offs_n, offs_e,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """dq with the new keys, raw tokens and then VSTs: full blocks of the keys offs_n that packed
    rows first_m to last_m all see, then masked ones of offs_e."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    MASKED_BLOCK_N: tl.constexpr = offs_e.shape[0]
    offs_d = tl.arange(0, dq.shape[1])[None, :]
    raw_seen, vst_seen = visible_new(first_m // GROUP_SIZE, ratio)
    raw_end, vst_end = visible_new(last_m // GROUP_SIZE, ratio)
    raw_full, vst_full = raw_seen // BLOCK_N, vst_seen // BLOCK_N
    for i in tl.range(0, raw_full + vst_full, disable_licm=not ALLOW_LICM):
        is_vst, start = block_of_run(i, raw_full, 0, 0, BLOCK_N)
        block = new_block(new, i_batch, run_row(is_vst, start, runs), offs_n, offs_d)
        dq = _add_block(dq, rows, new, block, i_head, HEAD_DIM, TMA, PRECISION)
    # Positions are computed again, see `opaque_zero`.
    offs_m = first_m + opaque_zero() + tl.arange(0, dq.shape[0])
    raw_bound, vst_bound = visible_new(tl.minimum(offs_m, last_m) // GROUP_SIZE, ratio)
    raw_full *= BLOCK_N // MASKED_BLOCK_N
    vst_full *= BLOCK_N // MASKED_BLOCK_N
    raw_masked = tl.cdiv(raw_end, MASKED_BLOCK_N) - raw_full
    vst_masked = tl.cdiv(vst_end, MASKED_BLOCK_N) - vst_full
    for i in tl.range(0, raw_masked + vst_masked, num_stages=1, disable_licm=not ALLOW_LICM):
        is_vst, start = block_of_run(i, raw_masked, raw_full, vst_full, MASKED_BLOCK_N)
        bound = tl.where(is_vst, vst_bound, raw_bound)
        end = tl.where(is_vst, vst_end, raw_end)
        offs_key = start + offs_e
        block = new_block(new, i_batch, run_row(is_vst, start, runs), offs_e, offs_d)
        seen = offs_key[None, :] < bound[:, None]
        dq = _add_masked_block(dq, rows, block, offs_key, end, seen, HEAD_DIM, PRECISION)
    return dq


@triton.jit(do_not_specialize=_LENGTHS)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_desc, v_desc, k_cache_desc, v_cache_desc, grad_out_ptr, log2_ptr, delta_ptr, dq_ptr, scale,
    q_batch, q_row, q_head, grad_out_batch, grad_out_row, grad_out_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    window, ratio, kept, chunks, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr, ADVANCE: tl.constexpr, REMAKE: tl.constexpr,
    SUM_KEYS: tl.constexpr, SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * chunks * KV_HEADS, batch). Names as in `prefill_kernel`. dq (batch, rows,
    heads, head_dim) is dense. ALLOW_LICM: whether the compiler may hoist loop invariants.
    ADVANCE: whether a block's place in the cache is advanced from the one before or located by
    itself. REMAKE: whether the offsets of masked blocks are computed again, see `opaque_zero`.
    SUM_KEYS: see `key_ptrs`."""
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
    length = window + window // ratio  # rows of a chunk
    rows = chunks * length
    i_batch, i_head, i_chunk, first_m, last_m = tile_of_program(
        length, chunks, KV_HEADS, GROUP_SIZE, BLOCK_M
    )
    runs = chunk_runs(i_chunk, window, ratio, chunks)
    offs_head, offs_row, _ = packed_tile(first_m, last_m, i_head, runs, ratio, GROUP_SIZE, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    HEADS: tl.constexpr = KV_HEADS * GROUP_SIZE
    tile = load_tile(
        q_ptr + i_batch * q_batch, grad_out_ptr + i_batch * grad_out_batch, log2_ptr, delta_ptr,
        i_batch, offs_head, offs_row, rows, scale, q_row, q_head, grad_out_row, grad_out_head,
        HEADS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_CACHE:
        table = Table(block_table_ptr + i_batch * max_pages, page_size, max_pages)
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        cached = tl.minimum(cached + i_chunk * kept, max_pages * page_size)
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        cache = Keys(
            k_cache_ptr, v_cache_ptr, k_cache_desc, v_cache_desc, kc_page, vc_page, kc_slot, vc_slot
        )
        dq = add_cache(
            dq, tile, cache, table, i_head, cached, offs_n, offs_e,
            HEAD_DIM, PAGE_MODE, ADVANCE, REMAKE, SUM_KEYS, TMA, PRECISION, ALLOW_LICM,
        )  # fmt: skip
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    new = Keys(k_ptr, v_ptr, k_desc, v_desc, 0, 0, k_row, v_row)
    dq = add_new(
        dq, tile, new, i_batch, i_head, runs, ratio, first_m, last_m, offs_n, offs_e,
        GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip
    store_tile(
        dq_ptr + i_batch * rows * (HEADS * HEAD_DIM), dq, i_head, runs, ratio, first_m, last_m,
        HEADS, GROUP_SIZE, HEAD_DIM,
    )  # fmt: skip
