"""A cache that grows: sequences of a `VstCache` whose pool is replaced by a larger one when it is
full. Sizes are planned ahead where they are known, so that growing is the exception."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vxl_kernels import CacheBatch, HostSequence, VstCache

__all__ = ["CachePool", "PooledSequence"]


class PooledSequence:
    """A sequence of a pool; its pages go back when nobody holds this object any more."""

    def __init__(self, pool: CachePool, seq: int) -> None:
        self.pool, self.seq = pool, seq
        pool._live.add(self)

    @property
    def length(self) -> int:
        return self.pool.cache.length(self.seq)

    def fork(self) -> PooledSequence:
        return PooledSequence(self.pool, self.pool.cache.fork(self.seq))

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is not None:
            pool._freed(self.seq)


class CachePool:
    """Pages for sequences, more of them when they run out.

    Args:
        make: makes a cache of so many pages.
        tokens: rows to have room for at first.
        page_size: of the caches that `make` makes.
    """

    def __init__(self, make: Callable[[int], VstCache], tokens: int, page_size: int) -> None:
        self._make = make
        self._live: weakref.WeakSet[PooledSequence] = weakref.WeakSet()
        self._batch: CacheBatch | None = None
        self.cache = make(max(1, -(-tokens // page_size)))

    def new(self) -> PooledSequence:
        return PooledSequence(self, self.cache.new())

    def load(self, path: str | os.PathLike[str]) -> PooledSequence:
        """A sequence from a file; see `VstCache.load`."""
        return PooledSequence(self, self.cache.load(path))

    def restore(self, data: Tensor) -> PooledSequence:
        """A sequence with the rows of `data (2, layers, length, kv_heads, head_dim)`."""
        return PooledSequence(self, self.cache.restore(HostSequence(data, None)))

    def batch(self, sequences: Sequence[PooledSequence], rows: int) -> CacheBatch:
        """The sequences with room for `rows` more rows each."""
        try:
            self.cache.reserve([s.seq for s in sequences], rows)
        except MemoryError as error:
            needed = getattr(error, "pages_needed", None)  # PoolExhausted; else out of memory
            if needed is None:
                raise
            self._grow(needed - self.cache.free_pages)
        seqs = [s.seq for s in sequences]  # growing renames them
        if self._batch is None or self._batch.cache is not self.cache or self._batch.seqs != seqs:
            self._batch = self.cache.batch(seqs)
        self._batch.reserve(rows)
        return self._batch

    def _grow(self, missing: int) -> None:
        """Moves everything to a larger cache. What sequences share stays shared."""
        old, self._batch = self.cache, None
        new = self._make(old.num_pages + max(missing, old.num_pages // 4) + 1)
        sequences = sorted(self._live, key=lambda s: s.seq)
        seqs = [s.seq for s in sequences]
        tables = old.batch(seqs).block_table.tolist() if seqs else []
        placed: list[tuple[list[int], int, int]] = []  # pages and length before, id now
        for seq, table in zip(seqs, tables, strict=True):
            length = old.length(seq)
            pages = table[: -(-length // old.page_size)]
            best, parent = 0, None
            for other_pages, other_length, now in placed:
                shared = _common(pages, other_pages) * old.page_size
                shared = min(shared, length, other_length)
                if shared > best:
                    best, parent = shared, now
            child = new.new() if parent is None else new.fork(parent)
            if parent is not None:
                new.truncate(child, best)
            _copy_rows(old, seq, new, child, best, length)
            placed.append((pages, length, child))
        for sequence, (_, _, now) in zip(sequences, placed, strict=True):
            sequence.seq = now
        self.cache = new

    def _freed(self, seq: int) -> None:
        self.cache.free(seq)


def _common(first: Iterable[int], second: Iterable[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _copy_rows(
    old: VstCache, source: int, new: VstCache, target: int, start: int, stop: int
) -> None:
    """Rows start to stop of a sequence in one cache to the end of one in another."""
    new.reserve(target, stop - start)
    rows = torch.arange(start, stop, device=new.device)
    places = []
    for cache, seq in ((old, source), (new, target)):
        table = cache.batch([seq]).block_table[0].long()
        places.append((table[rows // cache.page_size], rows % cache.page_size))
    (old_page, old_row), (new_page, new_row) = places
    for before, after in ((old.k_cache, new.k_cache), (old.v_cache, new.v_cache)):
        for layer in range(old.num_layers):
            after[layer, new_page, new_row] = before[layer, old_page, old_row]
    new.commit(target, stop - start)
