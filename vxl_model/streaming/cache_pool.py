"""A cache that grows: sequences of a `VstCache` that is replaced by a larger one when it is full.
Sizes are planned where they are known, so that growing is the exception.

Threads: one step runs at a time. Forks and growth wait for it, reading what has been committed
does not. Garbage collection may end a sequence in the middle of a step, so a handle that is gone
is noted first and freed when no step runs.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from vxl_kernels import CacheBatch, HostSequence, PoolExhausted, VstCache

__all__ = ["SLACK_TOKENS", "GrowingCache", "SequenceHandle"]

SLACK_TOKENS = 2048  # room for questions before a cache has to grow: 112 MiB of Qwen2-7B in bf16


class SequenceHandle:
    """A sequence of a `GrowingCache`. Its pages go back when the last reference to it is gone."""

    def __init__(self, cache: GrowingCache, key: int) -> None:
        self.cache, self._key = cache, key

    @property
    def place(self) -> tuple[VstCache, int]:
        """The cache that holds the sequence, and its id there. Committed rows can be read from
        there as long as this handle lives, even if another thread makes the cache grow."""
        return self.cache._places[self._key]

    @property
    def length(self) -> int:
        """Committed rows."""
        cache, seq = self.place
        return cache.length(seq)

    def fork(self) -> SequenceHandle:
        """A sequence with the same rows, independent from here on. Copies nothing."""
        return self.cache._fork(self)

    def __copy__(self) -> SequenceHandle:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceHandle:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a sequence of a cache cannot be pickled; VideoMemory.save writes a file")

    def __del__(self) -> None:
        self.cache._drop(self._key)


class GrowingCache:
    """Pages for sequences, more of them when they run out.

    Args:
        make: makes a cache of this many pages.
        tokens: rows to have room for at first.
        page_size: of the caches that `make` makes.
        fixed: never grow. A step that finds no room raises `PoolExhausted`, a MemoryError.

    Attributes:
        pages: the cache that holds the sequences now.
    """

    def __init__(
        self, make: Callable[[int], VstCache], tokens: int, page_size: int, fixed: bool = False
    ) -> None:
        self._make, self._fixed = make, fixed
        self._lock = threading.Lock()
        self._keys = itertools.count()
        self._places: dict[int, tuple[VstCache, int]] = {}  # by key of the handle
        self._dropped: deque[int] = deque()  # keys of handles that are gone, not freed yet
        self._batch: CacheBatch | None = None
        self.pages = make(max(1, -(-tokens // page_size)))

    def new(self) -> SequenceHandle:
        with self._exclusive():
            return self._handle(self.pages.new())

    def load(self, path: str | os.PathLike[str]) -> SequenceHandle:
        """A sequence from a file, as `VstCache.load`."""
        with self._exclusive():
            return self._handle(self.pages.load(path))

    def restore(self, data: Tensor) -> SequenceHandle:
        """A sequence with the rows of `data (2, layers, length, kv_heads, head_dim)`, in the dtype
        of the cache (under autocast theirs is another)."""
        with self._exclusive():
            host = HostSequence(data.to(self.pages.dtype), None)
            return self._handle(self.pages.restore(host))

    @contextmanager
    def step(
        self, sequences: Sequence[SequenceHandle], rows: int | list[int]
    ) -> Iterator[CacheBatch]:
        """The sequences with room for `rows` more rows each, or one number for each, which count
        when the block ends without an error. Other threads wait meanwhile."""
        with self._exclusive():
            batch = self._reserve(sequences, rows)
            yield batch
            batch.commit(rows)

    # -- private -----------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            self._free_dropped()
            try:
                yield
            finally:
                self._free_dropped()

    def _handle(self, seq: int) -> SequenceHandle:
        key = next(self._keys)
        self._places[key] = (self.pages, seq)
        return SequenceHandle(self, key)

    def _fork(self, handle: SequenceHandle) -> SequenceHandle:
        with self._exclusive():
            return self._handle(self.pages.fork(handle.place[1]))

    def _drop(self, key: int) -> None:
        """A handle is gone. Garbage collection calls this at any moment, even in a thread that
        holds the lock."""
        self._dropped.append(key)
        if self._lock.acquire(blocking=False):
            try:
                self._free_dropped()
            finally:
                self._lock.release()

    def _free_dropped(self) -> None:
        while self._dropped:
            cache, seq = self._places.pop(self._dropped.popleft())
            cache.free(seq)

    def _reserve(self, sequences: Sequence[SequenceHandle], rows: int | list[int]) -> CacheBatch:
        try:
            self.pages.reserve([s.place[1] for s in sequences], rows)
        except PoolExhausted as error:
            if self._fixed:
                raise
            self._grow(error.pages_needed - self.pages.free_pages)  # type: ignore[attr-defined]
        seqs = [s.place[1] for s in sequences]  # growing renames them
        if self._batch is None or self._batch.cache is not self.pages or self._batch.seqs != seqs:
            self._batch = self.pages.batch(seqs)
        self._batch.reserve(rows)
        return self._batch

    def _grow(self, missing: int) -> None:
        """Moves everything to a larger cache. What sequences share stays shared."""
        old, self._batch = self.pages, None
        new = self._make(old.num_pages + max(missing, old.num_pages // 4) + 1)
        keys = sorted(self._places, key=lambda key: self._places[key][1])
        seqs = [self._places[key][1] for key in keys]
        tables = old.batch(seqs).block_table.tolist() if seqs else []
        moved: list[tuple[list[int], int, int]] = []  # pages and length before, id now
        for seq, table in zip(seqs, tables, strict=True):
            length = old.length(seq)
            pages = table[: -(-length // old.page_size)]
            best, parent = 0, None
            for other_pages, other_length, now in moved:
                shared = _common(pages, other_pages) * old.page_size
                shared = min(shared, length, other_length)
                if shared > best:
                    best, parent = shared, now
            child = new.new() if parent is None else new.fork(parent)
            if parent is not None:
                new.truncate(child, best)
            _copy_rows(old, seq, new, child, best, length)
            moved.append((pages, length, child))
        for key, (_, _, now) in zip(keys, moved, strict=True):
            self._places[key] = (new, now)
        self.pages = new


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
