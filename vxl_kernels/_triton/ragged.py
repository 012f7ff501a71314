"""Ragged calls: what their kernels know of sequences, and the plan that they follow.

Lengths and layouts are on the device only, and grids follow from shapes. So `plan_kernel` runs
first and writes, in integers,

    tiles     (tiles, 2)          for each tile of `prefill_ragged_kernel`: sequence (or -1), and
                                  which of its tiles
    starts    (sequences,)        where the parts of a sequence begin, of all rows x splits
    order     (splits, sequences) for each split: sequences in the order of their groups
    ranks, sizes, firsts          the same shape: a sequence's number in its group, how many are in
                                  it, and where the group begins in `order`

Texts of few rows split their keys, as `decode.py` explains. Sequences with the same number of rows
whose block tables name the same pages for a whole split are a group there: their rows are packed
together, so that the split's keys are read once for all of them. The instructions that compute a
row do not depend on the rows that share its tile, so its bits do not either.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import NEVER

__all__ = [
    "Sequence",
    "Splits",
    "plan_blocks",
    "plan_kernel",
    "plan_rows",
    "sequence_at",
    "sequence_of_row",
    "split_rows",
    "split_size",
]

_LENGTHS = ["sequences", "page_size", "max_pages", "splits", "tiles"]


class Sequence(NamedTuple):
    """A row (or rows) of `VarlenLayout.table`."""

    window: Any
    ratio: Any
    """`NEVER` for text."""
    chunks: Any
    raw: Any
    """First raw row."""
    vst: Any
    """First VST row."""


class Splits(NamedTuple):
    """Which sequences split their keys, and how far: see `configs.RaggedSplits`."""

    SIZE: Any
    ROWS: Any
    DOUBLINGS: Any
    LIMIT: Any


@triton.jit
def sequence_at(table_ptr, at, inside):
    """Sequences `at`; those that are not `inside` have no rows."""
    ptrs = table_ptr + at * 5
    ratio = tl.load(ptrs + 1, mask=inside, other=0)
    return Sequence(
        tl.load(ptrs, mask=inside, other=0),
        tl.where(ratio > 0, ratio, NEVER),
        tl.load(ptrs + 2, mask=inside, other=1),
        tl.load(ptrs + 3, mask=inside, other=0),
        tl.load(ptrs + 4, mask=inside, other=0),
    )


@triton.jit
def sequence_of_row(table_ptr, i_row, sequences, BLOCK: tl.constexpr):
    """(sequence of a row, whether it is a VST), -1 if no sequence has it."""
    found = tl.full([BLOCK], -1, tl.int32)
    vst = tl.full([BLOCK], 0, tl.int32)
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        each = sequence_at(table_ptr, at, at < sequences)
        raw_end = each.raw + each.chunks * each.window
        vst_end = each.vst + each.chunks * (each.window // each.ratio)
        is_raw = (at < sequences) & (i_row >= each.raw) & (i_row < raw_end)
        is_vst = (at < sequences) & (i_row >= each.vst) & (i_row < vst_end)
        found = tl.where(is_raw | is_vst, at, found)
        vst = tl.where(is_vst, 1, vst)
    return tl.max(found, 0), tl.max(vst, 0) == 1


@triton.jit
def split_rows(sequence, GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Rows of sequences that split their keys; 0 of the others, which have tiles of prefill."""
    few = (sequence.ratio == NEVER) & (sequence.window <= SPLITS.LIMIT // GROUP_SIZE)
    return tl.where(few, sequence.window, 0)


@triton.jit
def split_size(rows, GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Cache entries of a split, from the rows of a sequence alone."""
    size = tl.where(rows > 0, SPLITS.SIZE, SPLITS.SIZE)
    for i in tl.static_range(SPLITS.DOUBLINGS):
        size = tl.where(rows * GROUP_SIZE > (SPLITS.ROWS << i), SPLITS.SIZE << (i + 1), size)
    return size


@triton.jit
def _cached(cache_seqlens_ptr, at, inside, page_size, max_pages):
    cached = tl.maximum(tl.load(cache_seqlens_ptr + at, mask=inside, other=0), 0)
    return tl.minimum(cached, max_pages * page_size)


@triton.jit
def _find(i, found, within, base, count, at):
    """Looks up numbers `i` among things of which sequences `at` have `count`, after `base` of
    earlier ones: (their sequences or what `found` says, numbers within the sequence, the next
    base)."""
    ends = base + tl.cumsum(count, 0)
    begins = ends - count
    hit = (begins[None, :] <= i[:, None]) & (i[:, None] < ends[None, :])
    found += tl.sum(tl.where(hit, at[None, :] + 1, 0), 1)
    within += tl.sum(tl.where(hit, i[:, None] - begins[None, :], 0), 1)
    return found, within, base + tl.sum(count)


@triton.jit
def _store_found(ptr, i, found, within, length):
    tl.store(ptr + i * 2, found, mask=i < length)
    tl.store(ptr + i * 2 + 1, within, mask=i < length)


@triton.jit
def plan_rows(
    tiles_ptr, table_ptr, first, sequences, tiles,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr = None,
):  # fmt: skip
    """Writes tiles `first` to `first + BLOCK` of packed rows; of all sequences, or of those that
    do not split their keys."""
    i = first + tl.arange(0, BLOCK)
    base = 0
    found = tl.full([BLOCK], -1, tl.int32)
    within = tl.full([BLOCK], 0, tl.int32)
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        each = sequence_at(table_ptr, at, at < sequences)
        packed = (each.window + each.window // each.ratio) * GROUP_SIZE
        count = each.chunks * tl.cdiv(packed, BLOCK_M)
        if SPLITS is not None:
            count = tl.where(split_rows(each, GROUP_SIZE, SPLITS) > 0, 0, count)
        found, within, base = _find(i, found, within, base, count, at)
    _store_found(tiles_ptr, i, found, within, tiles)


@triton.jit
def plan_blocks(
    blocks_ptr, table_ptr, first, sequences, blocks, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes blocks `first` to `first + BLOCK` of new keys, raw tokens and VSTs."""
    i = first + tl.arange(0, BLOCK)
    base = 0
    found = tl.full([BLOCK], -1, tl.int32)
    within = tl.full([BLOCK], 0, tl.int32)
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        each = sequence_at(table_ptr, at, at < sequences)
        of_chunk = tl.cdiv(each.window, BLOCK_N) + tl.cdiv(each.window // each.ratio, BLOCK_N)
        found, within, base = _find(i, found, within, base, each.chunks * of_chunk, at)
    _store_found(blocks_ptr, i, found, within, blocks)


@triton.jit
def _plan_starts(
    starts_ptr, table_ptr, cache_seqlens_ptr, sequences, page_size, max_pages,
    HAS_CACHE: tl.constexpr, GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes where the parts of each sequence begin."""
    base = 0
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < sequences
        rows = split_rows(sequence_at(table_ptr, at, inside), GROUP_SIZE, SPLITS)
        parts = rows
        if HAS_CACHE:
            cached = _cached(cache_seqlens_ptr, at, inside, page_size, max_pages)
            parts += rows * tl.cdiv(cached, split_size(rows, GROUP_SIZE, SPLITS))
        tl.store(starts_ptr + at, base + tl.cumsum(parts, 0) - parts, mask=inside)
        base += tl.sum(parts)


@triton.jit
def _pages_of_split(at, rows, size, i_split, block_table_ptr, page_size, max_pages):
    """Entries of block tables that a split's keys are in: (pointers to the first, their number)."""
    first = (i_split - 1) * size // page_size
    last = (i_split * size - 1) // page_size
    return block_table_ptr + at.to(tl.int64) * max_pages + first, last - first + 1


@triton.jit
def _plan_hashes(
    hashes_ptr, table_ptr, block_table_ptr, cache_seqlens_ptr, i_split, sequences, page_size,
    max_pages, GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes, for sequences whose cache fills a split, a positive number that follows from their
    rows and from the pages of the split; 0 for the others."""
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < sequences
        rows = split_rows(sequence_at(table_ptr, at, inside), GROUP_SIZE, SPLITS)
        size = split_size(rows, GROUP_SIZE, SPLITS)
        cached = _cached(cache_seqlens_ptr, at, inside, page_size, max_pages)
        full = (tl.where(i_split > 0, rows, 0) > 0) & (i_split <= cached // size)
        ptrs, count = _pages_of_split(
            at, rows, size, i_split, block_table_ptr, page_size, max_pages
        )
        key = rows
        for i in tl.range(0, tl.max(tl.where(full, count, 0), 0)):
            page = tl.load(ptrs + i, mask=full & (i < count), other=0)
            key = ((key ^ page) * 0x2C1B3C6D) ^ (key >> 15)
        tl.store(hashes_ptr + at, tl.where(full, key & 0x3FFFFFFF | 0x40000000, 0), mask=inside)


@triton.jit
def _plan_leaders(
    hashes_ptr, leaders_ptr, table_ptr, block_table_ptr, i_split, sequences, page_size, max_pages,
    GROUP_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the first sequence of each one's group: the first with its hash, if rows and pages
    are the same, else itself."""
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < sequences
        key = tl.load(hashes_ptr + at, mask=inside, other=0)
        leader = at
        for other in tl.range(0, start + BLOCK, BLOCK):
            at_other = other + tl.arange(0, BLOCK)
            theirs = tl.load(hashes_ptr + at_other, mask=at_other < sequences, other=0)
            alike = (theirs[None, :] == key[:, None]) & (theirs > 0)[None, :]
            leader = tl.minimum(leader, tl.min(tl.where(alike, at_other[None, :], sequences), 1))
        rows = split_rows(sequence_at(table_ptr, at, inside), GROUP_SIZE, SPLITS)
        differs = rows != split_rows(sequence_at(table_ptr, leader, inside), GROUP_SIZE, SPLITS)
        size = split_size(rows, GROUP_SIZE, SPLITS)
        ours, count = _pages_of_split(
            at, rows, size, i_split, block_table_ptr, page_size, max_pages
        )
        theirs, _ = _pages_of_split(
            leader, rows, size, i_split, block_table_ptr, page_size, max_pages
        )
        shared = inside & (leader < at)
        for i in tl.range(0, tl.max(tl.where(shared, count, 0), 0)):
            mask = shared & (i < count)
            page = tl.load(ours + i, mask=mask, other=0)
            differs = differs | (page != tl.load(theirs + i, mask=mask, other=0))
        tl.store(leaders_ptr + at, tl.where(shared & differs, at, leader), mask=inside)


@triton.jit
def _plan_groups(
    leaders_ptr, order_ptr, ranks_ptr, sizes_ptr, firsts_ptr, sequences, BLOCK: tl.constexpr
):
    """Writes the groups that the leaders make."""
    for start in tl.range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < sequences
        leader = tl.load(leaders_ptr + at, mask=inside, other=-1)
        rank = tl.full([BLOCK], 0, tl.int32)
        size = tl.full([BLOCK], 0, tl.int32)
        first = tl.full([BLOCK], 0, tl.int32)
        for other in tl.range(0, sequences, BLOCK):
            at_other = other + tl.arange(0, BLOCK)
            is_other = at_other < sequences
            theirs = tl.load(leaders_ptr + at_other, mask=is_other, other=-2)
            same = theirs[None, :] == leader[:, None]
            rank += tl.sum((same & (at_other[None, :] < at[:, None])).to(tl.int32), 1)
            size += tl.sum(same.to(tl.int32), 1)
            before = is_other[None, :] & (theirs[None, :] < leader[:, None])
            first += tl.sum(before.to(tl.int32), 1)
        tl.store(ranks_ptr + at, rank, mask=inside)
        tl.store(sizes_ptr + at, size, mask=inside)
        tl.store(firsts_ptr + at, first, mask=inside)
        tl.store(order_ptr + first + rank, at, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def plan_kernel(
    table_ptr, block_table_ptr, cache_seqlens_ptr,
    tiles_ptr, starts_ptr, hashes_ptr, leaders_ptr, order_ptr, ranks_ptr, sizes_ptr, firsts_ptr,
    sequences, page_size, max_pages, splits, tiles,
    HAS_CACHE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SPLIT_ROWS: tl.constexpr, SPLIT_DOUBLINGS: tl.constexpr,
    SPLIT_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (splits + blocks of tiles + 1,): programs that group a split, then those that write
    tiles, then one for `starts`. BLOCK_M is that of prefill."""
    SPLITS: tl.constexpr = Splits(SPLIT_SIZE, SPLIT_ROWS, SPLIT_DOUBLINGS, SPLIT_LIMIT)
    pid = tl.program_id(0)
    if pid == tl.num_programs(0) - 1:
        _plan_starts(
            starts_ptr, table_ptr, cache_seqlens_ptr, sequences, page_size, max_pages,
            HAS_CACHE, GROUP_SIZE, SPLITS, BLOCK,
        )  # fmt: skip
        return
    if pid >= splits:
        first = (pid - splits) * BLOCK
        plan_rows(tiles_ptr, table_ptr, first, sequences, tiles, GROUP_SIZE, BLOCK_M, BLOCK, SPLITS)
        return
    at_split = pid.to(tl.int64) * sequences
    leaders_ptr += at_split
    if HAS_CACHE:
        hashes_ptr += at_split
        _plan_hashes(
            hashes_ptr, table_ptr, block_table_ptr, cache_seqlens_ptr, pid, sequences, page_size,
            max_pages, GROUP_SIZE, SPLITS, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()  # threads read what others have written
        _plan_leaders(
            hashes_ptr, leaders_ptr, table_ptr, block_table_ptr, pid, sequences, page_size,
            max_pages, GROUP_SIZE, SPLITS, BLOCK,
        )  # fmt: skip
    else:
        for start in tl.range(0, sequences, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(leaders_ptr + at, at, mask=at < sequences)
    tl.debug_barrier()
    _plan_groups(
        leaders_ptr, order_ptr + at_split, ranks_ptr + at_split, sizes_ptr + at_split,
        firsts_ptr + at_split, sequences, BLOCK,
    )  # fmt: skip
