"""Gradients of attention: dQ by tiles of query rows, dK and dV by blocks of keys.

With P recomputed from the LSE and `delta` = rowsum(dO * O) less the gradient of the LSE:

    dS = scale * P * (dO V^T - delta)      dQ = dS K      dK = dS^T Q      dV = P^T dO

dS is rounded to the inputs' dtype with `scale` in it, as `scale` holds it inside float16's range:
`delta_kernel` scales delta, so this is one multiply-add where a subtraction would be.

Every gradient has one program that owns it and adds in a fixed order: no atomics, nothing of
the size rows x keys in memory, a sequence's result is the same in every batch.

A chunk is two runs of rows, raw tokens and VSTs, each contiguous in memory: split order. Rows in
position order (interleaved, or plain text) are a chunk of raw tokens alone; only `kept`, what a
chunk adds to the cache, tells them apart from text. So there is one way through the kernels.

`dq_kernel` walks the keys as `prefill.py` does: packed rows are positions x query heads of a KV
head.
`dkv_kernel` owns keys and walks the rows that see them, head by head: of each run of rows the
last ones, in whole blocks, see all keys of the program and need no mask; those before them go
through a masked loop. Rows of all later chunks follow one another, so a block of cache entries
has two such runs as well.

Forks may share pages, so the cache's gradient is written for each sequence on its own, in float32,
and `sum_pages_kernel` adds up a page's: it looks for the page in the block tables. Long calls are
also cut into splits, ranges of chunks: few cache entries would be few programs.

Source: FlashAttention-2, section 3.1.2.
"""

import triton
import triton.language as tl

from .keys import cached_entries, load_block
from .primitives import (
    chunk_row,
    load_rows,
    opaque_zero,
    query_row,
    visible_new,
)

__all__ = ["delta_kernel", "dkv_kernel", "dq_kernel", "sum_pages_kernel"]

# Data, not code: no length is compiled in. What strides tell of them: `launch_common.row_strides`.
_LENGTHS = [
    "window", "ratio", "kept", "chunks", "page_size", "max_pages", "batch", "chunk_splits",
]  # fmt: skip
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, log2_ptr,
    grad_out_batch, grad_out_row, grad_out_head, out_batch, out_row, out_head, scale, rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta times scale, and the LSE in powers of two. Grid: (blocks of rows * HEADS, batch)."""
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
    log2 = tl.load(lse_ptr + at, mask=inside, other=0.0) * _LOG2E
    tl.store(delta_ptr + at, delta * scale, mask=inside)
    tl.store(log2_ptr + at, log2, mask=inside)


@triton.jit
def _scores_backward(
    x, y, dx, dy, log2, delta, scale, log2_scale, seen,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of a block: x y^T are the scores, dx dy^T the gradients of P. Lanes may be query
    rows (x = Q, y = K, dx = dO, dy = V) or keys (the other way round). delta holds `scale`."""
    scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * log2_scale - log2
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores)
    dp = tl.dot(dx, tl.trans(dy), input_precision=PRECISION)
    return p, p * (dp * scale - delta)


# -- dQ ----------------------------------------------------------------------------------------


@triton.jit
def _entry_offset(
    table_ptr,
    start,
    offs_n,
    page_stride,
    slot_stride,
    page_size,
    max_pages,
    BLOCK_IN_PAGE: tl.constexpr,
):
    """Elements from the cache's start to the entries `start + offs_n`, as (one number for all,
    one for each [N, 1]). BLOCK_IN_PAGE: a block lies within one page, where 32 bits are enough."""
    if BLOCK_IN_PAGE:
        entry = tl.minimum(start // page_size, max_pages - 1)
        page = tl.load(table_ptr + entry).to(tl.int64)
        slot = start - entry * page_size
        base = page * page_stride + slot.to(tl.int64) * slot_stride
        return base, (offs_n * slot_stride)[:, None]
    else:
        entry = (start + offs_n) // page_size
        page = tl.load(table_ptr + tl.minimum(entry, max_pages - 1)).to(tl.int64)
        slot = (start + offs_n - entry * page_size).to(tl.int64)
        return 0, (page * page_stride + slot * slot_stride)[:, None]


@triton.jit(do_not_specialize=_LENGTHS)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, cache_seqlens_ptr,
    k_desc, v_desc, k_cache_desc, v_cache_desc, grad_out_ptr, log2_ptr, delta_ptr, dq_ptr, scale,
    q_batch, q_row, q_head, grad_out_batch, grad_out_row, grad_out_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head,
    window, ratio, kept, chunks, page_size, max_pages,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CACHE: tl.constexpr, BLOCK_IN_PAGE: tl.constexpr, SAME_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * chunks * KV_HEADS, batch). Names as in `prefill_kernel`. ALLOW_LICM: whether
    the compiler may hoist loop invariants."""
    if SAME_STRIDES:  # the compiler then keeps one set of offsets for K and V
        v_row, vc_page, vc_slot = k_row, kc_page, kc_slot
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
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_row = query_row(offs_m // GROUP_SIZE, i_chunk, window, ratio, chunks, True)
    offs_n = tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, MASKED_BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    at_row, at_head = offs_row.to(tl.int64)[:, None], offs_head.to(tl.int64)[:, None]
    q_ptrs = q_ptr + i_batch * q_batch + at_row * q_row + at_head * q_head
    q = load_rows(q_ptrs + offs_d, offs_row, rows, HEAD_DIM, False)
    grad_ptrs = grad_out_ptr + i_batch * grad_out_batch + at_row * grad_out_row
    grad_ptrs += at_head * grad_out_head
    grad = load_rows(grad_ptrs + offs_d, offs_row, rows, HEAD_DIM, False)
    offs_lse = (i_batch * (KV_HEADS * GROUP_SIZE) + offs_head) * rows + offs_row
    log2 = tl.load(log2_ptr + offs_lse)[:, None]
    delta = tl.load(delta_ptr + offs_lse)[:, None]
    log2_scale = scale * _LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # -- cache: the same bound for all rows --
    if HAS_CACHE:
        table_ptr = block_table_ptr + i_batch * max_pages
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        cached = tl.minimum(cached + i_chunk * kept, max_pages * page_size)
        full = cached // BLOCK_N * BLOCK_N
        k_cache_ptr += i_head.to(tl.int64) * kc_head
        v_cache_ptr += i_head.to(tl.int64) * vc_head
        for start in tl.range(0, full, BLOCK_N, disable_licm=not ALLOW_LICM):
            if TMA:
                entry = start // page_size
                page = tl.load(table_ptr + entry)
                slot = start - entry * page_size
                k = k_cache_desc.load([page, i_head, slot, 0]).reshape(BLOCK_N, BLOCK_D)
                v = v_cache_desc.load([page, i_head, slot, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                base, each = _entry_offset(
                    table_ptr, start, offs_n, kc_page, kc_slot, page_size, max_pages, BLOCK_IN_PAGE
                )
                k = load_rows(k_cache_ptr + base + (each + offs_d), 0, 0, HEAD_DIM, False)
                base, each = _entry_offset(
                    table_ptr, start, offs_n, vc_page, vc_slot, page_size, max_pages, BLOCK_IN_PAGE
                )
                v = load_rows(v_cache_ptr + base + (each + offs_d), 0, 0, HEAD_DIM, False)
            _, ds = _scores_backward(
                q, k, grad, v, log2, delta, scale, log2_scale, 0, False, PRECISION
            )
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        for start in tl.range(
            full, cached, MASKED_BLOCK_N, num_stages=1, disable_licm=not ALLOW_LICM
        ):
            offs_key = start + offs_e
            base, each = _entry_offset(
                table_ptr, start, offs_e, kc_page, kc_slot, page_size, max_pages, BLOCK_IN_PAGE
            )
            k = load_rows(k_cache_ptr + base + (each + offs_d), offs_key, cached, HEAD_DIM, True)
            base, each = _entry_offset(
                table_ptr, start, offs_e, vc_page, vc_slot, page_size, max_pages, BLOCK_IN_PAGE
            )
            v = load_rows(v_cache_ptr + base + (each + offs_d), offs_key, cached, HEAD_DIM, True)
            seen = (offs_key < cached)[None, :]
            _, ds = _scores_backward(
                q, k, grad, v, log2, delta, scale, log2_scale, seen, True, PRECISION
            )
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    # -- own chunk: raw tokens, then VSTs --
    raw_min, vst_min = visible_new(first_m // GROUP_SIZE, ratio)
    raw_end, vst_end = visible_new(last_m // GROUP_SIZE, ratio)
    raw_full = raw_min // BLOCK_N
    vst_full = vst_min // BLOCK_N
    k_ptr += i_batch * k_batch + i_head.to(tl.int64) * k_head
    v_ptr += i_batch * v_batch + i_head.to(tl.int64) * v_head
    for i in tl.range(0, raw_full + vst_full, disable_licm=not ALLOW_LICM):
        is_vst = i >= raw_full
        start = tl.where(is_vst, i - raw_full, i) * BLOCK_N
        row = chunk_row(is_vst, start, i_chunk, window, ratio, chunks, True)
        at = row.to(tl.int64)
        k_ptrs = k_ptr + at * k_row + ((offs_n * k_row)[:, None] + offs_d)
        v_ptrs = v_ptr + at * v_row + ((offs_n * v_row)[:, None] + offs_d)
        k = load_block(k_desc, i_batch, i_head, row, k_ptrs, HEAD_DIM, TMA)
        v = load_block(v_desc, i_batch, i_head, row, v_ptrs, HEAD_DIM, TMA)
        _, ds = _scores_backward(q, k, grad, v, log2, delta, scale, log2_scale, 0, False, PRECISION)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    # Positions are computed again, see `opaque_zero`.
    offs_m = first_m + opaque_zero() + tl.arange(0, BLOCK_M)
    raw_bound, vst_bound = visible_new(tl.minimum(offs_m, last_m) // GROUP_SIZE, ratio)
    raw_full *= BLOCK_N // MASKED_BLOCK_N
    vst_full *= BLOCK_N // MASKED_BLOCK_N
    raw_masked = tl.cdiv(raw_end, MASKED_BLOCK_N) - raw_full
    vst_masked = tl.cdiv(vst_end, MASKED_BLOCK_N) - vst_full
    for i in tl.range(0, raw_masked + vst_masked, num_stages=1, disable_licm=not ALLOW_LICM):
        is_vst = i >= raw_masked
        start = tl.where(is_vst, vst_full + i - raw_masked, raw_full + i) * MASKED_BLOCK_N
        at = chunk_row(is_vst, start, i_chunk, window, ratio, chunks, True).to(tl.int64)
        bound = tl.where(is_vst, vst_bound, raw_bound)
        end = tl.where(is_vst, vst_end, raw_end)
        offs_key = start + offs_e
        k_ptrs = k_ptr + at * k_row + ((offs_e * k_row)[:, None] + offs_d)
        v_ptrs = v_ptr + at * v_row + ((offs_e * v_row)[:, None] + offs_d)
        k = load_rows(k_ptrs, offs_key, end, HEAD_DIM, True)
        v = load_rows(v_ptrs, offs_key, end, HEAD_DIM, True)
        seen = offs_key[None, :] < bound[:, None]
        _, ds = _scores_backward(
            q, k, grad, v, log2, delta, scale, log2_scale, seen, True, PRECISION
        )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    # -- result (batch, rows, heads, head_dim), dense --
    offs_m = first_m + opaque_zero() + tl.arange(0, BLOCK_M)
    stored = offs_m <= last_m
    offs_m = tl.minimum(offs_m, last_m)
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    offs_row = query_row(offs_m // GROUP_SIZE, i_chunk, window, ratio, chunks, True)
    dq_ptr += i_batch * rows * (KV_HEADS * GROUP_SIZE * HEAD_DIM)
    offs_out = (offs_row * (KV_HEADS * GROUP_SIZE) + offs_head).to(tl.int64)
    dq_ptrs = dq_ptr + offs_out[:, None] * HEAD_DIM + offs_d
    mask = stored[:, None] & (offs_d < HEAD_DIM)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


# -- dK, dV ------------------------------------------------------------------------------------


@triton.jit
def _new_keys(i, chunks, window, BLOCK_N: tl.constexpr):
    """Block i of the call's own keys: (chunk, whether it is of VSTs, first index in the run)."""
    block = i // chunks
    raw_blocks = tl.cdiv(window, BLOCK_N)
    is_vst = block >= raw_blocks
    return i % chunks, is_vst, tl.where(is_vst, block - raw_blocks, block) * BLOCK_N


@triton.jit
def _rows_seeing(start, last, is_vst, ratio, raw_base, vst_base, raw_end, vst_end):
    """Which rows of the chunk see own keys `start` to `last` of a run, for `_split`. Raw token i is
    seen by raw rows from i and VSTs from i // ratio on, VST j by raw rows from (j + 1) * ratio
    and VSTs from j on."""
    raw_first = tl.where(is_vst, (start + 1) * ratio, start)
    raw_all = tl.where(is_vst, (last + 1) * ratio, last)
    vst_first = tl.where(is_vst, start, start // ratio)
    vst_all = tl.where(is_vst, last, last // ratio)
    raw = raw_base + raw_first, raw_base + raw_all, raw_end
    vst = vst_base + vst_first, vst_base + vst_all, vst_end
    return raw, vst


@triton.jit
def _chunks_of(i, chunks, chunk_splits):
    """The chunks [from, to) of part i."""
    return i * chunks // chunk_splits, (i + 1) * chunks // chunk_splits


@triton.jit
def _split(rows, BLOCK_M: tl.constexpr):
    """Of a run of rows (first that sees any of the keys, first that sees them all, end): (first,
    where it is split, number of whole blocks behind the split). Counted from the end, whole
    blocks see all the keys; the rows before the split need a mask."""
    first, all_seen, end = rows
    first = tl.minimum(first, end)
    full = (end - tl.minimum(tl.maximum(all_seen, first), end)) // BLOCK_M
    return first, end - full * BLOCK_M, full


@triton.jit
def _walk(
    pid, i_batch, cache_seqlens_ptr, window, ratio, kept, chunks,
    page_size, max_pages, chunk_splits,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """What a program of `dkv_kernel` does: its keys (first, end, whether they are VSTs, length of
    the cache), the rows to walk (`_split` of the raw run, of the VST run), and where both runs
    start; positions in them count from there."""
    vsts = window // ratio
    if CACHE:
        i_split = pid // KV_HEADS % chunk_splits
        start = pid // (KV_HEADS * chunk_splits) * BLOCK_N
        from_chunk, to_chunk = _chunks_of(i_split, chunks, chunk_splits)
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        end = tl.minimum(cached + (to_chunk - 1) * kept, max_pages * page_size)
        last = tl.minimum(start + BLOCK_N, end) - 1
        # Chunk c sees the entries before cached + c * kept.
        each = tl.maximum(kept, 1)
        any_chunk = tl.cdiv(tl.maximum(start + 1 - cached, 0), each)
        all_chunk = tl.cdiv(tl.maximum(last + 1 - cached, 0), each)
        any_chunk = tl.minimum(tl.maximum(any_chunk, from_chunk), to_chunk)
        all_chunk = tl.minimum(tl.maximum(all_chunk, from_chunk), to_chunk)
        raw_base, vst_base, is_vst = window * 0, chunks * window, window < 0
        raw = any_chunk * window, all_chunk * window, to_chunk * window
        vst = vst_base + any_chunk * vsts, vst_base + all_chunk * vsts, vst_base + to_chunk * vsts
    else:
        i_chunk, is_vst, start = _new_keys(pid // KV_HEADS, chunks, window, BLOCK_N)
        end = tl.where(is_vst, vsts, window)
        last = tl.minimum(start + BLOCK_N, end) - 1
        cached = window * 0
        raw_base, vst_base = i_chunk * window, chunks * window + i_chunk * vsts
        raw, vst = _rows_seeing(
            start, last, is_vst, ratio, raw_base, vst_base, raw_base + window, vst_base + vsts
        )
    keys = start, end, is_vst, cached
    return keys, _split(raw, BLOCK_M), _split(vst, BLOCK_M), (raw_base, vst_base)


@triton.jit
def _bounds(offs_row, row_is_vst, keys, bases, window, ratio, kept, CACHE: tl.constexpr):
    """How many of the keys' run the rows see, counted from the run's start."""
    _, _, is_vst, cached = keys
    raw_base, vst_base = bases
    index = offs_row - tl.where(row_is_vst, vst_base, raw_base)
    if CACHE:
        each = tl.maximum(tl.where(row_is_vst, window // ratio, window), 1)
        return cached + index // each * kept
    else:
        raw = tl.where(row_is_vst, (index + 1) * ratio, index + 1)
        vst = tl.where(row_is_vst, index + 1, index // ratio)
        return tl.where(is_vst, vst, raw)


@triton.jit(do_not_specialize=_LENGTHS)
def dkv_kernel(
    q_ptr, grad_out_ptr, log2_ptr, delta_ptr, q_desc, grad_out_desc,
    k_ptr, v_ptr, block_table_ptr, cache_seqlens_ptr, dk_ptr, dv_ptr, scale,
    q_batch, q_row, q_head, grad_out_batch, grad_out_row, grad_out_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    window, ratio, kept, chunks, page_size, max_pages, chunk_splits,
    KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, MASKED_BLOCK_M: tl.constexpr,
    CACHE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of a KV head against blocks of BLOCK_M rows (MASKED_BLOCK_M where masked).

    Own keys: k, v, dk and dv are the call's (batch, row, head); grid (blocks of both runs *
    chunks * KV_HEADS, batch). CACHE: k and v are the cache (page, slot, head), dk and dv float32
    (part, batch, entry, head), entries that no row of the part sees unwritten; grid (blocks of
    entries * splits * KV_HEADS, batch).

    Before each loop and after them, indices are computed again, see `opaque_zero`.
    """
    rows = chunks * (window + window // ratio)
    pid = tl.program_id(0)
    i_head = pid % KV_HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    keys, raw, vst, bases = _walk(
        pid, i_batch, cache_seqlens_ptr, window, ratio, kept, chunks,
        page_size, max_pages, chunk_splits,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    start, end, is_vst, _ = keys
    offs_key = start + tl.arange(0, BLOCK_N)
    if CACHE:
        entry = offs_key // page_size
        table_ptrs = block_table_ptr + i_batch * max_pages + entry
        first = tl.load(table_ptrs, mask=offs_key < end, other=0).to(tl.int64)[:, None]
        at_key = (offs_key - entry * page_size).to(tl.int64)[:, None]
    else:
        i_chunk = pid // KV_HEADS % chunks
        first = i_batch
        at_key = chunk_row(is_vst, offs_key, i_chunk, window, ratio, chunks, True)
        at_key = at_key.to(tl.int64)[:, None]
    k_ptrs = k_ptr + first * k_batch + at_key * k_row + i_head.to(tl.int64) * k_head
    v_ptrs = v_ptr + first * v_batch + at_key * v_row + i_head.to(tl.int64) * v_head
    k = load_rows(k_ptrs + offs_d, offs_key, end, HEAD_DIM, True)
    v = load_rows(v_ptrs + offs_d, offs_key, end, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    log2_scale = scale * _LOG2E
    q_ptr += i_batch * q_batch
    grad_out_ptr += i_batch * grad_out_batch
    log2_ptr += i_batch * (KV_HEADS * GROUP_SIZE) * rows
    delta_ptr += i_batch * (KV_HEADS * GROUP_SIZE) * rows

    # -- rows that see all the keys --
    _, raw_split, raw_full = raw
    _, vst_split, vst_full = vst
    offs_m = tl.arange(0, BLOCK_M)
    for i in tl.range(0, (raw_full + vst_full) * GROUP_SIZE, disable_licm=not ALLOW_LICM):
        head = i_head * GROUP_SIZE + i % GROUP_SIZE
        block = i // GROUP_SIZE
        first_row = tl.where(block >= raw_full, vst_split - raw_full * BLOCK_M, raw_split)
        first_row += block * BLOCK_M
        at, at_head = first_row.to(tl.int64), head.to(tl.int64)
        q_ptrs = q_ptr + at * q_row + at_head * q_head + ((offs_m * q_row)[:, None] + offs_d)
        grad_ptrs = grad_out_ptr + at * grad_out_row + at_head * grad_out_head
        grad_ptrs += (offs_m * grad_out_row)[:, None] + offs_d
        q = load_block(q_desc, i_batch, head, first_row, q_ptrs, HEAD_DIM, TMA)
        grad = load_block(grad_out_desc, i_batch, head, first_row, grad_ptrs, HEAD_DIM, TMA)
        log2 = tl.load(log2_ptr + (head * rows + first_row) + offs_m)[None, :]
        delta = tl.load(delta_ptr + (head * rows + first_row) + offs_m)[None, :]
        p, ds = _scores_backward(k, q, v, grad, log2, delta, scale, log2_scale, 0, False, PRECISION)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    # -- rows that see some of them --
    pid = tl.program_id(0) + opaque_zero()
    i_head = pid % KV_HEADS
    keys, raw, vst, bases = _walk(
        pid, i_batch, cache_seqlens_ptr, window, ratio, kept, chunks,
        page_size, max_pages, chunk_splits,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    raw_first, raw_split, _ = raw
    vst_first, vst_split, _ = vst
    raw_masked = tl.cdiv(raw_split - raw_first, MASKED_BLOCK_M)
    vst_masked = tl.cdiv(vst_split - vst_first, MASKED_BLOCK_M)
    offs_e = opaque_zero() + tl.arange(0, MASKED_BLOCK_M)
    offs_key = keys[0] + opaque_zero() + tl.arange(0, BLOCK_N)
    for i in tl.range(
        0, (raw_masked + vst_masked) * GROUP_SIZE, num_stages=1, disable_licm=not ALLOW_LICM
    ):
        head = i_head * GROUP_SIZE + i % GROUP_SIZE
        block = i // GROUP_SIZE
        row_is_vst = block >= raw_masked
        first_row = (
            tl.where(row_is_vst, vst_first - raw_masked * MASKED_BLOCK_M, raw_first)
            + block * MASKED_BLOCK_M
        )
        end = tl.where(row_is_vst, vst_split, raw_split)
        offs_row = first_row + offs_e
        at, at_head = first_row.to(tl.int64), head.to(tl.int64)
        q_ptrs = q_ptr + at * q_row + at_head * q_head + ((offs_e * q_row)[:, None] + offs_d)
        grad_ptrs = grad_out_ptr + at * grad_out_row + at_head * grad_out_head
        grad_ptrs += (offs_e * grad_out_row)[:, None] + offs_d
        if TMA:  # behind the end come other rows, or zeros
            q = load_block(q_desc, i_batch, head, first_row, q_ptrs, HEAD_DIM, TMA)
            grad = load_block(grad_out_desc, i_batch, head, first_row, grad_ptrs, HEAD_DIM, TMA)
        else:
            q = load_rows(q_ptrs, offs_row, end, HEAD_DIM, True)
            grad = load_rows(grad_ptrs, offs_row, end, HEAD_DIM, True)
        at_lse = head * rows + offs_row
        log2 = tl.load(log2_ptr + at_lse, mask=offs_row < end, other=0.0)[None, :]
        delta = tl.load(delta_ptr + at_lse, mask=offs_row < end, other=0.0)[None, :]
        bound = _bounds(offs_row, row_is_vst, keys, bases, window, ratio, kept, CACHE)
        seen = offs_key[:, None] < tl.where(offs_row < end, bound, 0)[None, :]
        p, ds = _scores_backward(
            k, q, v, grad, log2, delta, scale, log2_scale, seen, True, PRECISION
        )
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    # -- result, dense --
    pid = tl.program_id(0) + opaque_zero(1)
    keys, _, _, _ = _walk(
        pid, i_batch, cache_seqlens_ptr, window, ratio, kept, chunks,
        page_size, max_pages, chunk_splits,
        KV_HEADS, BLOCK_N, BLOCK_M, CACHE,
    )  # fmt: skip
    start, end, is_vst, _ = keys
    if CACHE:
        i_split = pid // KV_HEADS % chunk_splits
        row = (i_split.to(tl.int64) * tl.num_programs(1) + i_batch) * (
            max_pages * page_size
        ) + start
    else:
        i_chunk = pid // KV_HEADS % chunks
        row = i_batch * rows + chunk_row(is_vst, start, i_chunk, window, ratio, chunks, True)
    offs_n = opaque_zero() + tl.arange(0, BLOCK_N)
    offs_out = ((row + offs_n) * KV_HEADS + pid % KV_HEADS)[:, None] * HEAD_DIM + offs_d
    mask = (start + offs_n < end)[:, None] & (offs_d < HEAD_DIM)
    tl.store(dk_ptr + offs_out, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs_out, dv.to(dv_ptr.dtype.element_ty), mask=mask)


# -- the cache's gradient ------------------------------------------------------------------------


@triton.jit
def _find_page(
    block_table_ptr, cache_seqlens_ptr, i_page, behind, later, page_size, max_pages, batch
):
    """Where the block tables name a page: (the first place behind `behind`, or the number of
    places; how many places behind it). Only entries that a row may see count, those before
    cache_seqlens + `later`: whatever pads a table, often page 0, is not looked at again."""
    total = batch * max_pages
    found, count = total, total * 0
    for start in tl.range(0, total, 128):
        at = start + tl.arange(0, 128)
        inside = (at < total) & (at > behind)
        i_batch = tl.minimum(at, total - 1) // max_pages
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        inside = inside & (at % max_pages * page_size < cached + later)
        hit = inside & (tl.load(block_table_ptr + at, mask=inside, other=-1) == i_page)
        found = tl.minimum(found, tl.min(tl.where(hit, at, total)))
        count += tl.sum(hit.to(tl.int32))
    return found, count


@triton.jit(do_not_specialize=_LENGTHS)
def sum_pages_kernel(
    dk_partial_ptr, dv_partial_ptr, block_table_ptr, cache_seqlens_ptr, dk_ptr, dv_ptr,
    kept, chunks, page_size, max_pages, batch, chunk_splits,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a page, dense (page, slot, head, head_dim), from those of each part and
    sequence: of WIDTH numbers an entry. Forks that share a page add up in the tables' order.
    Grid: (blocks of a page's numbers * pages,)."""
    blocks = tl.cdiv(page_size.to(tl.int64) * WIDTH, BLOCK)
    i_page = (tl.program_id(0) // blocks).to(tl.int32)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    slot = (offs // WIDTH).to(tl.int32)
    later = (chunks - 1) * kept  # entries that the call's chunks add for its last one
    capacity = (max_pages * page_size).to(tl.int64)
    dk = tl.zeros([BLOCK], tl.float32)
    dv = tl.zeros([BLOCK], tl.float32)
    found, count = _find_page(
        block_table_ptr, cache_seqlens_ptr, i_page, -1, later, page_size, max_pages, batch
    )
    for _ in tl.range(0, count):
        i_batch = (found // max_pages).to(tl.int64)
        entry = found % max_pages * page_size
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        for i_split in tl.range(0, chunk_splits):
            _, to_chunk = _chunks_of(i_split, chunks, chunk_splits)
            seen = entry + slot < tl.minimum(cached + (to_chunk - 1) * kept, max_pages * page_size)
            at = ((i_split * batch + i_batch) * capacity + entry) * WIDTH + offs
            inside = seen & (slot < page_size)
            dk += tl.load(dk_partial_ptr + at, mask=inside, other=0.0)
            dv += tl.load(dv_partial_ptr + at, mask=inside, other=0.0)
        found, _count = _find_page(
            block_table_ptr, cache_seqlens_ptr, i_page, found, later, page_size, max_pages, batch
        )
    at = i_page.to(tl.int64) * page_size * WIDTH + offs
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=slot < page_size)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=slot < page_size)
