"""Keys in memory: the block table of a paged cache, and blocks of K and V of the cache or the call.

The classes are bundles of values that kernels pass to their helpers. They leave no trace in the
compiled code.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import load_rows

__all__ = [
    "Block",
    "Keys",
    "Table",
    "advance",
    "cache_block",
    "cached_entries",
    "load_block",
    "locate",
    "new_block",
    "page_of",
]


# -- pages ---------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A sequence's row of the block table."""

    ptr: Any
    page_size: Any
    max_pages: Any


class Place(NamedTuple):
    """Where a block of N cache entries lies, see `locate`."""

    entry: Any
    """Entry of the block table that holds the page."""
    slot: Any
    """Entry of the page."""
    page: Any
    key_entry: Any
    """"pages_in_block": table entries from the block's first to each key's [N]; else 0."""
    entries: Any
    """"pages_in_block": table entries that a block spans; else 0."""


@triton.jit
def cached_entries(cache_seqlens_ptr, i_batch, page_size, max_pages):
    """Length of a sequence's cache, clamped to the capacity of its table."""
    return tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + i_batch), 0), max_pages * page_size)


@triton.jit
def page_of(table, entry):
    """Page at an entry of a sequence's table, int64. Out-of-range entries are clamped to the last
    one, so prefetching never reads past the table."""
    return tl.load(table.ptr + tl.minimum(entry, table.max_pages - 1).to(tl.uint32)).to(tl.int64)


@triton.jit
def locate(table, start, offs_n, N: tl.constexpr, PAGE_MODE: tl.constexpr):
    """Place of the N cache entries `start + offs_n`.

    PAGE_MODE tells how blocks of N keys, which start at multiples of N, meet pages:
    "block_in_page"   page_size is a multiple of N, or a sequence has one page. Entry, slot and page
                      are scalars, those of `start`. (With a single page, `advance` past its end
                      returns garbage that no caller reads.)
    "pages_in_block"  page_size divides N. `entry` is a scalar, the block's first. A key's slot and
                      its table entry after the first are the same in every block.
    "gather"          neither. Entry, slot and page are [N], and blocks may start anywhere.
    """
    if PAGE_MODE == "pages_in_block":
        entry = start // table.page_size
        key_entry = offs_n // table.page_size
        slot = offs_n - key_entry * table.page_size
        page = page_of(table, entry + key_entry).to(tl.int32)
        # Divided here: no compiler hoists a division out of a loop that may not run at all.
        return Place(entry, slot, page, key_entry, N // table.page_size)
    else:
        index = start if PAGE_MODE == "block_in_page" else start + offs_n
        entry = index // table.page_size
        page = page_of(table, entry)
        return Place(entry, index - entry * table.page_size, page, 0, 0)


@triton.jit
def advance(table, place, N: tl.constexpr, PAGE_MODE: tl.constexpr):
    """Place of the next N entries, as `locate` would return it. With "pages_in_block", a block that
    is not wholly inside the table is replaced by the last one that is."""
    entry, slot, page, key_entry, entries = place
    if PAGE_MODE == "pages_in_block":
        entry = tl.minimum(entry + entries, table.max_pages - entries)
        page = tl.load(table.ptr + (entry + key_entry))
    else:
        slot += N
        if PAGE_MODE == "block_in_page":
            # A comparison and two selections would be longer (555 -> 547 instructions on sm_80).
            stays = (slot - table.page_size) >> 31  # all ones within the page, else 0
            entry += 1 + stays
            slot &= stays
        else:
            pages = slot // table.page_size
            entry += pages
            slot -= pages * table.page_size
        page = page_of(table, entry)
    return Place(entry, slot, page, key_entry, entries)


# -- blocks of keys --------------------------------------------------------------------------------


class Keys(NamedTuple):
    """K and V of one KV head, of the cache or of the call. Strides are in elements."""

    k_ptr: Any
    v_ptr: Any
    k_desc: Any
    """TMA descriptor (batch or page, head, row, head_dim), or None."""
    v_desc: Any
    k_page: Any
    """Stride of pages. The call has none."""
    v_page: Any
    k_row: Any
    """Stride of keys."""
    v_row: Any


class Block(NamedTuple):
    """A block of N keys."""

    k_ptrs: Any
    """[N, D]"""
    v_ptrs: Any
    at_batch: Any
    """Batch or page of the block, for TMA."""
    at_row: Any
    """First row or slot of the block, for TMA."""


@triton.jit
def paged_offset(place, offs_n, page_stride, slot_stride, PAGE_MODE: tl.constexpr):
    """From the cache's start to each key of a block, in elements, for `key_ptrs`: (64-bit offset of
    the block, the keys' own [N])."""
    if PAGE_MODE == "gather":
        return 0, place.page * page_stride + place.slot.to(tl.int64) * slot_stride
    else:  # the launcher has checked that 32 bits count to the last group of eight elements
        eighths = place.page.to(tl.int32) * (page_stride // 8).to(tl.int32)
        eighths += place.slot * (slot_stride // 8)
        if PAGE_MODE == "block_in_page":
            return eighths.to(tl.uint32).to(tl.int64) * 8, offs_n * slot_stride
        else:
            return 0, eighths.to(tl.int64) * 8


@triton.jit
def key_ptrs(ptr, offset, offs_d, SUM_KEYS: tl.constexpr = False):
    """Pointers [N, D] to a block of keys. One address and a tile of 32-bit offsets, added last: a
    tile of 64-bit sums takes four more instructions for each load, and twice the registers.
    SUM_KEYS adds 64-bit offsets of keys in this order too."""
    block, keys = offset
    if keys.dtype == tl.int32 or SUM_KEYS:
        return ptr + block + (keys[:, None] + offs_d)
    else:
        return (ptr + block + offs_d) + keys[:, None]


@triton.jit
def cache_block(
    cache, place, offs_n, offs_d, PAGE_MODE: tl.constexpr, SUM_KEYS: tl.constexpr = False
):
    """The block of cached keys at `place`."""
    k_offset = paged_offset(place, offs_n, cache.k_page, cache.k_row, PAGE_MODE)
    k_ptrs = key_ptrs(cache.k_ptr, k_offset, offs_d, SUM_KEYS)
    v_offset = paged_offset(place, offs_n, cache.v_page, cache.v_row, PAGE_MODE)
    v_ptrs = key_ptrs(cache.v_ptr, v_offset, offs_d, SUM_KEYS)
    return Block(k_ptrs, v_ptrs, place.page, place.slot)


@triton.jit
def new_block(new, i_batch, row, offs_n, offs_d):
    """The block of new keys, those of the call, in the rows `row + offs_n`."""
    at = row.to(tl.int64)
    k_ptrs = key_ptrs(new.k_ptr, (at * new.k_row, offs_n * new.k_row), offs_d)
    v_ptrs = key_ptrs(new.v_ptr, (at * new.v_row, offs_n * new.v_row), offs_d)
    return Block(k_ptrs, v_ptrs, i_batch, row)


@triton.jit
def load_block(desc, at_batch, i_head, at_row, ptrs, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """A full block [N, D]: by TMA from a descriptor (batch or page, head, row, head_dim), else by
    the threads from pointers."""
    if TMA:
        N: tl.constexpr = ptrs.shape[0]
        BLOCK_D: tl.constexpr = ptrs.shape[1]
        return desc.load([at_batch.to(tl.int32), i_head, at_row, 0]).reshape(N, BLOCK_D)
    else:
        return load_rows(ptrs, 0, 0, HEAD_DIM, False)
