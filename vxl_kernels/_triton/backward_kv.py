"""Gradients of attention: dK and dV by blocks of keys. `backward_q.py` has the formulas and dQ.

`dkv_kernel` owns a block of keys and walks the rows that see them, head by head. The last rows of
each run see all keys of the program. They come in whole blocks, without a mask. A masked loop takes
the rows before them. Rows of all later chunks follow one another, so a block of cache entries has
two such runs as well.

Forks may share pages. So the gradient of the cache is written for each sequence by itself, in
float32, and `sum_pages_kernel` adds up the gradients of a page, which it finds in the block tables.
Long calls are also cut into splits, ranges of chunks, as few cache entries would be few programs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward_q import LOG2E, scores_backward
from .keys import cached_entries, load_block
from .primitives import Runs, block_of_run, chunk_row, chunk_runs, load_rows, opaque_zero
from .ragged import sequence_at

__all__ = [
    "Call",
    "KeyBlock",
    "Queries",
    "Sums",
    "add_full_rows",
    "add_masked_rows",
    "cache_places",
    "cached_run",
    "dkv_kernel",
    "load_keys",
    "new_keys",
    "new_run",
    "store_keys",
    "sum_pages_kernel",
]

_LENGTHS = [
    "window", "ratio", "kept", "chunks", "page_size", "max_pages", "batch", "chunk_splits",
]  # fmt: skip


class Call(NamedTuple):
    """Lengths of a call. They are the same for all its programs."""

    cache_seqlens_ptr: Any
    window: Any
    ratio: Any
    kept: Any
    chunks: Any
    page_size: Any
    max_pages: Any
    chunk_splits: Any


class KeyRun(NamedTuple):
    """The keys of a program, from `start` on in a run of raw tokens, VSTs or cache entries that
    ends at `end`. cached: length of the cache before the call."""

    start: Any
    end: Any
    is_vst: Any
    cached: Any


class RowRun(NamedTuple):
    """Raw tokens or VSTs that see keys of a program, see `_split`. base: first row of the run."""

    base: Any
    first: Any
    split: Any
    full: Any


class Queries(NamedTuple):
    """The query rows of a sequence. Strides are in elements."""

    q_ptr: Any
    grad_ptr: Any
    log2_ptr: Any
    delta_ptr: Any
    q_desc: Any
    """TMA descriptor, or None."""
    grad_desc: Any
    i_batch: Any
    rows: Any
    q_row: Any
    q_head: Any
    grad_row: Any
    grad_head: Any


class KeyBlock(NamedTuple):
    """K and V of a program."""

    k: Any
    """[N, D]"""
    v: Any
    scale: Any
    log2_scale: Any


class Sums(NamedTuple):
    """dK and dV of a program, float32 [N, D]."""

    dk: Any
    dv: Any


@triton.jit
def new_keys(i, chunks, window, BLOCK_N: tl.constexpr):
    """Block i of the new keys: (chunk, whether it is one of VSTs, first index in the run)."""
    is_vst, start = block_of_run(i // chunks, tl.cdiv(window, BLOCK_N), 0, 0, BLOCK_N)
    return i % chunks, is_vst, start


@triton.jit
def _first_rows(key, is_vst, ratio):
    """First raw row and first VST of the chunk that see a new key. Raw token i is seen by raw rows
    from i on and VSTs from i // ratio on, VST j by raw rows from (j + 1) * ratio on and VSTs from
    j on."""
    return tl.where(is_vst, (key + 1) * ratio, key), tl.where(is_vst, key, key // ratio)


@triton.jit
def _chunks_of(i, chunks, chunk_splits):
    """The chunks [from, to) of split i."""
    return i * chunks // chunk_splits, (i + 1) * chunks // chunk_splits


@triton.jit
def _split(base, first, all_seen, end, BLOCK_M: tl.constexpr):
    """A run of rows that ends at `base + end`. Those from `base + first` on see some of the keys,
    and those from `base + all_seen` on see all. Counted from the end, there are `full` whole blocks
    of rows that see all keys. The first of them starts at row `split`. Rows from `first` to `split`
    need a mask."""
    first, all_seen, end = base + first, base + all_seen, base + end
    first = tl.minimum(first, end)
    full = (end - tl.minimum(tl.maximum(all_seen, first), end)) // BLOCK_M
    return RowRun(base, first, end - full * BLOCK_M, full)


@triton.jit
def cached_run(
    start, i_batch, call, runs, from_chunk, to_chunk, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Cache entries from `start` on: (the keys, raw rows and VST rows that see them) of the chunks
    [from_chunk, to_chunk). Rows of all chunks of a sequence follow one another from `runs` on."""
    window, vsts = call.window, call.window // call.ratio
    cached = cached_entries(call.cache_seqlens_ptr, i_batch, call.page_size, call.max_pages)
    end = tl.minimum(cached + (to_chunk - 1) * call.kept, call.max_pages * call.page_size)
    last = tl.minimum(start + BLOCK_N, end) - 1
    # Chunk c sees the entries before cached + c * kept.
    each = tl.maximum(call.kept, 1)
    any_chunk = tl.cdiv(tl.maximum(start + 1 - cached, 0), each)
    all_chunk = tl.cdiv(tl.maximum(last + 1 - cached, 0), each)
    any_chunk = tl.minimum(tl.maximum(any_chunk, from_chunk), to_chunk)
    all_chunk = tl.minimum(tl.maximum(all_chunk, from_chunk), to_chunk)
    keys = KeyRun(start, end, window < 0, cached)
    raw = _split(runs.raw, any_chunk * window, all_chunk * window, to_chunk * window, BLOCK_M)
    vst = _split(runs.vst, any_chunk * vsts, all_chunk * vsts, to_chunk * vsts, BLOCK_M)
    return keys, raw, vst


@triton.jit
def new_run(is_vst, start, call, runs, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Raw tokens (or VSTs) of a chunk from `start` on: (the keys, its raw rows and its VST rows
    that see them). `runs` are those of the chunk."""
    window, ratio = call.window, call.ratio
    vsts = window // ratio
    end = tl.where(is_vst, vsts, window)
    last = tl.minimum(start + BLOCK_N, end) - 1
    keys = KeyRun(start, end, is_vst, window * 0)
    raw_first, vst_first = _first_rows(start, is_vst, ratio)
    raw_all, vst_all = _first_rows(last, is_vst, ratio)
    raw = _split(runs.raw, raw_first, raw_all, window, BLOCK_M)
    vst = _split(runs.vst, vst_first, vst_all, vsts, BLOCK_M)
    return keys, raw, vst


@triton.jit
def _walk(
    pid, i_batch, call,
    KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """What a program of `dkv_kernel` does: (its keys, its raw rows, its VST rows)."""
    window, ratio, chunks = call.window, call.ratio, call.chunks
    if CACHE:
        i_split = pid // KV_HEADS % call.chunk_splits
        start = pid // (KV_HEADS * call.chunk_splits) * BLOCK_N
        from_chunk, to_chunk = _chunks_of(i_split, chunks, call.chunk_splits)
        runs = Runs(window * 0, chunks * window)
        return cached_run(start, i_batch, call, runs, from_chunk, to_chunk, BLOCK_N, BLOCK_M)
    else:
        i_chunk, is_vst, start = new_keys(pid // KV_HEADS, chunks, window, BLOCK_N)
        runs = chunk_runs(i_chunk, window, ratio, chunks)
        return new_run(is_vst, start, call, runs, BLOCK_N, BLOCK_M)


@triton.jit
def _bounds(offs_row, row_is_vst, keys, raw, vst, call, CACHE: tl.constexpr):
    """How many keys of the run each row sees."""
    index = offs_row - tl.where(row_is_vst, vst.base, raw.base)
    if CACHE:
        each = tl.maximum(tl.where(row_is_vst, call.window // call.ratio, call.window), 1)
        return keys.cached + index // each * call.kept
    else:
        raw_bound = tl.where(row_is_vst, (index + 1) * call.ratio, index + 1)
        vst_bound = tl.where(row_is_vst, index + 1, index // call.ratio)
        return tl.where(keys.is_vst, vst_bound, raw_bound)


@triton.jit
def _query_ptrs(queries, head, first_row, offs_m, offs_d):
    """Pointers [M, D] to Q and dO of a block of rows."""
    at, at_head = first_row.to(tl.int64), head.to(tl.int64)
    q_ptrs = queries.q_ptr + at * queries.q_row + at_head * queries.q_head
    q_ptrs += (offs_m * queries.q_row)[:, None] + offs_d
    grad_ptrs = queries.grad_ptr + at * queries.grad_row + at_head * queries.grad_head
    grad_ptrs += (offs_m * queries.grad_row)[:, None] + offs_d
    return q_ptrs, grad_ptrs


@triton.jit
def _load_queries(
    queries, head, first_row, q_ptrs, grad_ptrs, HEAD_DIM: tl.constexpr, TMA: tl.constexpr
):
    """Q and dO [M, D] of a whole block of rows."""
    i_batch = queries.i_batch
    q = load_block(queries.q_desc, i_batch, head, first_row, q_ptrs, HEAD_DIM, TMA)
    grad = load_block(queries.grad_desc, i_batch, head, first_row, grad_ptrs, HEAD_DIM, TMA)
    return q, grad


@triton.jit
def _add_queries(
    sums, keys, q, grad, log2, delta, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """The sums with the gradients through a block of rows added."""
    p, ds = scores_backward(
        keys.k, q, keys.v, grad, log2, delta, keys.scale, keys.log2_scale, seen, MASKED, PRECISION
    )
    dv = tl.dot(p.to(grad.dtype), grad, sums.dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, sums.dk, input_precision=PRECISION)
    return Sums(dk, dv)


@triton.jit
def add_full_rows(
    sums, keys, queries, raw, vst, i_head, BLOCK_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """The sums with the rows of both runs that see all keys, head by head."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, keys.k.shape[1])[None, :]
    for i in tl.range(0, (raw.full + vst.full) * GROUP_SIZE, disable_licm=not ALLOW_LICM):
        head = i_head * GROUP_SIZE + i % GROUP_SIZE
        block = i // GROUP_SIZE
        first_row = tl.where(block >= raw.full, vst.split - raw.full * BLOCK_M, raw.split)
        first_row += block * BLOCK_M
        q_ptrs, grad_ptrs = _query_ptrs(queries, head, first_row, offs_m, offs_d)
        q, grad = _load_queries(queries, head, first_row, q_ptrs, grad_ptrs, HEAD_DIM, TMA)
        at_lse = head * queries.rows + first_row
        log2 = tl.load(queries.log2_ptr + at_lse + offs_m)[None, :]
        delta = tl.load(queries.delta_ptr + at_lse + offs_m)[None, :]
        sums = _add_queries(sums, keys, q, grad, log2, delta, 0, False, PRECISION)
    return sums


@triton.jit
def add_masked_rows(
    sums, keys, queries, key_run, raw, vst, call, i_head, offs_key,
    BLOCK_M: tl.constexpr, CACHE: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ALLOW_LICM: tl.constexpr,
):  # fmt: skip
    """The sums with the rows of both runs that see some of the keys, head by head."""
    raw_blocks = tl.cdiv(raw.split - raw.first, BLOCK_M)
    vst_blocks = tl.cdiv(vst.split - vst.first, BLOCK_M)
    offs_m = opaque_zero() + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, keys.k.shape[1])[None, :]
    for i in tl.range(
        0, (raw_blocks + vst_blocks) * GROUP_SIZE, num_stages=1, disable_licm=not ALLOW_LICM
    ):
        head = i_head * GROUP_SIZE + i % GROUP_SIZE
        block = i // GROUP_SIZE
        is_vst = block >= raw_blocks
        first_row = tl.where(is_vst, vst.first - raw_blocks * BLOCK_M, raw.first) + block * BLOCK_M
        end = tl.where(is_vst, vst.split, raw.split)
        offs_row = first_row + offs_m
        q_ptrs, grad_ptrs = _query_ptrs(queries, head, first_row, offs_m, offs_d)
        if TMA:  # past the end come other rows, or zeros
            q, grad = _load_queries(queries, head, first_row, q_ptrs, grad_ptrs, HEAD_DIM, TMA)
        else:
            q = load_rows(q_ptrs, offs_row, end, HEAD_DIM, True)
            grad = load_rows(grad_ptrs, offs_row, end, HEAD_DIM, True)
        at_lse = head * queries.rows + offs_row
        log2 = tl.load(queries.log2_ptr + at_lse, mask=offs_row < end, other=0.0)[None, :]
        delta = tl.load(queries.delta_ptr + at_lse, mask=offs_row < end, other=0.0)[None, :]
        bound = _bounds(offs_row, is_vst, key_run, raw, vst, call, CACHE)
        seen = offs_key[:, None] < tl.where(offs_row < end, bound, 0)[None, :]
        sums = _add_queries(sums, keys, q, grad, log2, delta, seen, True, PRECISION)
    return sums


@triton.jit
def cache_places(block_table_ptr, i_batch, offs_key, end, page_size, max_pages):
    """(page, slot within it) [N, 1] of entries of a sequence's cache, of those before `end`."""
    entry = offs_key // page_size
    table_ptrs = block_table_ptr + i_batch.to(tl.int64) * max_pages + entry
    page = tl.load(table_ptrs, mask=offs_key < end, other=0).to(tl.int64)[:, None]
    return page, (offs_key - entry * page_size).to(tl.int64)[:, None]


@triton.jit
def load_keys(
    k_ptr, v_ptr, first, at_key, i_head, offs_key, end, offs_d, scale,
    k_batch, k_row, k_head, v_batch, v_row, v_head, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """K and V of a program. first: the keys' sequence or pages, at_key: their rows or slots."""
    k_ptrs = k_ptr + first * k_batch + at_key * k_row + i_head.to(tl.int64) * k_head
    v_ptrs = v_ptr + first * v_batch + at_key * v_row + i_head.to(tl.int64) * v_head
    k = load_rows(k_ptrs + offs_d, offs_key, end, HEAD_DIM, True)
    v = load_rows(v_ptrs + offs_d, offs_key, end, HEAD_DIM, True)
    return KeyBlock(k, v, scale, scale * LOG2E)


@triton.jit
def store_keys(dk_ptr, dv_ptr, sums, run, offs_n, places, HEAD_DIM: tl.constexpr):
    """Stores the sums of a program's keys, dense. places [N]: row x KV heads + head of the keys
    `run.start + offs_n`."""
    offs_d = tl.arange(0, sums.dk.shape[1])[None, :]
    offs_out = places[:, None] * HEAD_DIM + offs_d
    mask = (run.start + offs_n < run.end)[:, None] & (offs_d < HEAD_DIM)
    tl.store(dk_ptr + offs_out, sums.dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs_out, sums.dv.to(dv_ptr.dtype.element_ty), mask=mask)


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
    """BLOCK_N keys of a KV head against blocks of BLOCK_M rows, or of MASKED_BLOCK_M rows if
    masked.

    New keys: k, v, dk and dv are (batch, row, head). Grid: (blocks of both runs * chunks *
    KV_HEADS, batch).
    CACHE: k and v are (page, slot, head), dk and dv float32 (split, batch, entry, head). Entries
    that no row of the split sees stay unwritten. Grid: (blocks of entries * splits * KV_HEADS,
    batch).

    Before the masked loop and after it, indices are computed again, see `opaque_zero`.
    """
    rows = chunks * (window + window // ratio)
    pid = tl.program_id(0)
    i_head = pid % KV_HEADS
    i_batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    call = Call(cache_seqlens_ptr, window, ratio, kept, chunks, page_size, max_pages, chunk_splits)
    run, raw, vst = _walk(pid, i_batch, call, KV_HEADS, BLOCK_N, BLOCK_M, CACHE)
    offs_key = run.start + tl.arange(0, BLOCK_N)
    if CACHE:
        first, at_key = cache_places(
            block_table_ptr, i_batch, offs_key, run.end, page_size, max_pages
        )
    else:
        i_chunk = pid // KV_HEADS % chunks
        first = i_batch
        at_key = chunk_row(run.is_vst, offs_key, i_chunk, window, ratio, chunks, True)
        at_key = at_key.to(tl.int64)[:, None]
    keys = load_keys(
        k_ptr, v_ptr, first, at_key, i_head, offs_key, run.end, offs_d, scale,
        k_batch, k_row, k_head, v_batch, v_row, v_head, HEAD_DIM,
    )  # fmt: skip
    at_lse = i_batch * (KV_HEADS * GROUP_SIZE) * rows
    queries = Queries(
        q_ptr + i_batch * q_batch, grad_out_ptr + i_batch * grad_out_batch,
        log2_ptr + at_lse, delta_ptr + at_lse, q_desc, grad_out_desc, i_batch, rows,
        q_row, q_head, grad_out_row, grad_out_head,
    )  # fmt: skip
    zeros = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = Sums(zeros, zeros)

    sums = add_full_rows(
        sums, keys, queries, raw, vst, i_head,
        BLOCK_M, GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip
    pid = tl.program_id(0) + opaque_zero()
    run, raw, vst = _walk(pid, i_batch, call, KV_HEADS, BLOCK_N, BLOCK_M, CACHE)
    offs_key = run.start + opaque_zero() + tl.arange(0, BLOCK_N)
    sums = add_masked_rows(
        sums, keys, queries, run, raw, vst, call, pid % KV_HEADS, offs_key,
        MASKED_BLOCK_M, CACHE, GROUP_SIZE, HEAD_DIM, TMA, PRECISION, ALLOW_LICM,
    )  # fmt: skip

    pid = tl.program_id(0) + opaque_zero(1)
    run, _, _ = _walk(pid, i_batch, call, KV_HEADS, BLOCK_N, BLOCK_M, CACHE)
    if CACHE:
        i_split = pid // KV_HEADS % chunk_splits
        row = (i_split.to(tl.int64) * tl.num_programs(1) + i_batch) * (max_pages * page_size)
        row += run.start
    else:
        i_chunk = pid // KV_HEADS % chunks
        row = i_batch * rows
        row += chunk_row(run.is_vst, run.start, i_chunk, window, ratio, chunks, True)
    offs_n = opaque_zero() + tl.arange(0, BLOCK_N)
    places = (row + offs_n) * KV_HEADS + pid % KV_HEADS
    store_keys(dk_ptr, dv_ptr, sums, run, offs_n, places, HEAD_DIM)


# -- the cache's gradient ------------------------------------------------------------------------


@triton.jit
def _later(table_ptr, i_batch, kept, chunks):
    """Entries that earlier chunks add for the last one. table_ptr: a ragged call's, or None."""
    if table_ptr is None:
        return (chunks - 1) * kept
    else:
        sequence = sequence_at(table_ptr, i_batch, i_batch >= 0)
        return (sequence.chunks - 1) * (sequence.window // sequence.ratio)


@triton.jit
def _find_page(
    block_table_ptr, cache_seqlens_ptr, table_ptr, i_page, last, kept, chunks, page_size, max_pages,
    batch,
):  # fmt: skip
    """Where the block tables name a page: (the first place after `last`, or the number of places;
    how many places after `last`). Only entries that a row may see count, those before
    cache_seqlens + `_later`. So padding of a table, often page 0, costs nothing."""
    total = batch * max_pages
    found, count = total, total * 0
    for start in tl.range(0, total, 128):
        at = start + tl.arange(0, 128)
        inside = (at < total) & (at > last)
        i_batch = tl.minimum(at, total - 1) // max_pages
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        later = _later(table_ptr, i_batch, kept, chunks)
        inside = inside & (at % max_pages * page_size < cached + later)
        hit = inside & (tl.load(block_table_ptr + at, mask=inside, other=-1) == i_page)
        found = tl.minimum(found, tl.min(tl.where(hit, at, total)))
        count += tl.sum(hit.to(tl.int32))
    return found, count


@triton.jit(do_not_specialize=_LENGTHS)
def sum_pages_kernel(
    dk_partial_ptr, dv_partial_ptr, block_table_ptr, cache_seqlens_ptr, table_ptr, dk_ptr, dv_ptr,
    kept, chunks, page_size, max_pages, batch, chunk_splits,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of a page over splits and sequences, dense (page, slot, head, head_dim),
    WIDTH numbers per entry. Forks that share a page are added in the order of the tables. table: of
    a ragged call, which has one split, or None. Grid: (blocks of a page's numbers * pages,)."""
    blocks = tl.cdiv(page_size.to(tl.int64) * WIDTH, BLOCK)
    i_page = (tl.program_id(0) // blocks).to(tl.int32)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    slot = (offs // WIDTH).to(tl.int32)
    capacity = (max_pages * page_size).to(tl.int64)
    dk = tl.zeros([BLOCK], tl.float32)
    dv = tl.zeros([BLOCK], tl.float32)
    found, count = _find_page(
        block_table_ptr, cache_seqlens_ptr, table_ptr, i_page, -1, kept, chunks, page_size,
        max_pages, batch,
    )  # fmt: skip
    for _ in tl.range(0, count):
        i_batch = (found // max_pages).to(tl.int64)
        entry = found % max_pages * page_size
        cached = cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages)
        for i_split in tl.range(0, chunk_splits):
            _, to_chunk = _chunks_of(i_split, chunks, chunk_splits)
            seen = cached + _later(table_ptr, i_batch, kept, to_chunk)
            seen = entry + slot < tl.minimum(seen, max_pages * page_size)
            at = ((i_split * batch + i_batch) * capacity + entry) * WIDTH + offs
            inside = seen & (slot < page_size)
            dk += tl.load(dk_partial_ptr + at, mask=inside, other=0.0)
            dv += tl.load(dv_partial_ptr + at, mask=inside, other=0.0)
        found, _count = _find_page(
            block_table_ptr, cache_seqlens_ptr, table_ptr, i_page, found, kept, chunks, page_size,
            max_pages, batch,
        )  # fmt: skip
    at = i_page.to(tl.int64) * page_size * WIDTH + offs
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=slot < page_size)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=slot < page_size)
