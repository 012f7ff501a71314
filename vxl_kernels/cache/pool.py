"""The VST cache: K/V pages of all layers in one pool, and the sequences that share them.

A step of a model over a cache::

    batch = cache.batch([seq])
    batch.reserve(rows)                      # room for what the step appends
    for i, layer in enumerate(layers):
        q, k = rope_append(q, k, v, *batch.layer(i), layout, inv_freq)
        out = vst_attention(q, k, v, *batch.layer(i), layout)
    batch.commit(rows)                       # now they count

`PageManager` (C++, rules in `csrc/cache/page_manager.h`) decides which sequence holds which page.
This module owns the tensors and makes the copies that the manager asks for. Nothing here waits
for a GPU, except `save`, `load`, `HostSequence.wait` and a `restore` to a CPU.

Threads: calls of `VstCache` may run at the same time. A thread may read a sequence's committed
rows while other threads fork it, append to it or free their own sequences. Callers must not free
or truncate a sequence while another thread reads it. On a GPU, use one stream for a pool, or order
the streams yourself. A `CacheBatch` belongs to one thread.

Source: Video-XL, section 3.2. The upstream code concatenates Python lists of tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import _ext
from .._arguments import at_least, fail, sequence_id
from . import file_format
from .estimate import plan_memory
from .host import HostSequence, Piece

__all__ = ["CacheBatch", "HostSequence", "PoolExhausted", "VstCache"]

# A MemoryError with `pages_needed` and `pages_free`, raised by the extension.
PoolExhausted: type[MemoryError] = getattr(_ext.extension, "PoolExhausted", MemoryError)

Seqs = int | Iterable[int] | np.ndarray
Rows = int | Sequence[int] | np.ndarray  # of every sequence, or a number for each

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNFINISHED = -1  # in place of a number of releases: a refresh was interrupted
_MIN_WIDTH = 8  # pages that a batch's block table has room for at first


def _ids(seqs: Any) -> list[int] | np.ndarray:
    """One id of a sequence, or several."""
    if isinstance(seqs, np.ndarray) and seqs.dtype.kind == "i" and seqs.ndim == 1:
        return seqs
    several = isinstance(seqs, Iterable) and not isinstance(seqs, str | bytes)
    if several and getattr(seqs, "ndim", 1) > 0:
        return [sequence_id("seqs", seq) for seq in seqs]
    return [sequence_id("seqs", seqs)]


def _rows(rows: Any, n: int) -> np.ndarray:
    """Rows of each of n sequences, int64 `(n,)`."""
    several = isinstance(rows, Iterable) and not isinstance(rows, str | bytes)
    if not several or getattr(rows, "ndim", 1) == 0:
        return np.full(n, at_least("rows", rows, 0), dtype=np.int64)
    each = [at_least(f"rows[{i}]", x, 0) for i, x in enumerate(rows)]
    if len(each) != n:
        fail("rows", f"{len(each)} numbers", f"one for each of {n} sequences")
    return np.array(each, dtype=np.int64)


class VstCache:
    """Pages of K and V for every layer on one device, shared by any number of sequences.

    A sequence is what one video, or one question to it, has cached: prefix, VSTs, suffix. Forking
    copies nothing. A partly filled last page is copied when one of its holders appends.

    Args:
        num_layers, kv_heads, head_dim: geometry of the model.
        num_pages: pages of the pool, in every layer. `VstCache.memory_for` computes how many are
            needed.
        page_size: rows of a page, a power of two. 128 holds whole key blocks of the GPU kernels.
        dtype: float32, bfloat16 or float16.
        device: where the pages live.

    Attributes:
        k_cache, v_cache: `(num_layers, num_pages, page_size, kv_heads, head_dim)`, one
            allocation each. K is stored rotated at its final position.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the compiled extension, which holds the page manager, is missing.
        torch.OutOfMemoryError (GPU), RuntimeError (CPU): too little memory for the pages.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = 128,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if _ext.extension is None:
            raise RuntimeError(
                f"VstCache needs the compiled extension, which does not load: {_ext.reason_missing}"
            )
        sizes = {"num_layers": num_layers, "kv_heads": kv_heads, "head_dim": head_dim}
        self.num_layers, self.kv_heads, self.head_dim = (
            at_least(name, value, 1) for name, value in sizes.items()
        )
        if dtype not in _FLOATS:
            fail("dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")
        self._manager = _ext.extension.PageManager(
            at_least("num_pages", num_pages, 1), at_least("page_size", page_size, 1)
        )
        shape = (self.num_layers, self.num_pages, self.page_size, self.kv_heads, self.head_dim)
        with torch.inference_mode(False):  # tensors made in it could not be written outside
            self.k_cache, self.v_cache = (
                torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
            )
        self.dtype, self.device = dtype, self.k_cache.device
        # From a reserve() to the end of its page copies, nobody may read a block table: it already
        # names pages that are not filled yet.
        self._lock = threading.Lock()
        self._copies: list[np.ndarray] = []  # requested, not made yet
        self._releases = 0  # how often a sequence released pages

    # -- sizes ---------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self._manager.num_pages

    @property
    def page_size(self) -> int:
        return self._manager.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._manager.free_pages()

    @property
    def bytes(self) -> int:
        """Bytes of the pool, used or not."""
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V of all layers."""
        return self.bytes // self.num_pages

    def stats(self) -> dict[str, int]:
        """Current counts: free, used and shared pages, the most pages ever used, sequences, tokens
        (a shared row counts for each holder) and page copies so far."""
        return self._manager.stats()

    memory_for = staticmethod(plan_memory)
    read_metadata = staticmethod(file_format.read_metadata)
    read_tensors = staticmethod(file_format.read_tensors)
    reader = file_format.Reader

    def __repr__(self) -> str:
        return (
            f"VstCache({self.num_layers} layers, {self.kv_heads} KV heads of {self.head_dim}, "
            f"{self.num_pages} pages of {self.page_size} rows ({self.free_pages} free), "
            f"{self.dtype}, {self.device})"
        )

    # -- sequences -------------------------------------------------------------------

    def new(self) -> int:
        """An empty sequence. Ids are never used again."""
        return self._manager.new_sequence()

    def fork(self, seq: int) -> int:
        """A sequence with the committed rows of `seq`, whose pages it shares.

        Raises:
            KeyError: there is no such sequence. Every method that takes a sequence raises it.
        """
        with self._lock:
            self._make_copies()
            return self._manager.fork(sequence_id("seq", seq))

    def truncate(self, seq: int, length: int) -> None:
        """Keeps the first `length` rows. Later pages are released unless others hold them.

        Raises:
            ValueError: the sequence is shorter than that.
        """
        self._manager.truncate(sequence_id("seq", seq), at_least("length", length, 0))
        self._releases += 1

    def free(self, seq: int) -> None:
        """Ends a sequence. Its pages are released unless others hold them."""
        self._manager.free(sequence_id("seq", seq))
        self._releases += 1

    def length(self, seq: int) -> int:
        """Committed rows."""
        return self._manager.length(sequence_id("seq", seq))

    def reserve(self, seqs: Seqs, rows: Rows) -> None:
        """Makes room for `rows` rows after the committed ones, of one sequence or several.

        `rows` is a number for all sequences, or one for each. All sequences get it or none. Calling
        again with no more rows does nothing.

        Raises:
            PoolExhausted: too few free pages (`pages_needed`, `pages_free`); nothing changed.
            ValueError: a sequence is named twice, or `rows` is negative or of another length.
        """
        ids = _ids(seqs)
        each = _rows(rows, len(ids))
        with self._lock:
            self._make_copies()
            copies = self._manager.reserve_many(ids, each)
            if len(copies):
                self._copies.append(copies)
                self._make_copies()

    def commit(self, seqs: Seqs, rows: Rows) -> None:
        """Makes the first `rows` reserved rows, which have been written, part of the sequences.
        `rows` is a number for all, or one for each.

        Raises:
            ValueError: fewer rows are reserved; nothing changed.
        """
        ids = _ids(seqs)
        self._manager.commit_many(ids, _rows(rows, len(ids)))

    def batch(self, seqs: Seqs, max_tokens: int | None = None) -> CacheBatch:
        """Sequences that step together.

        Args:
            max_tokens: fixes the width of the block table for sequences of up to this many rows,
                and with it all addresses, for capture in a CUDA graph. By default it grows.
        """
        return CacheBatch(self, seqs, max_tokens)

    # -- contents --------------------------------------------------------------------

    def gather(self, seq: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous copies of a sequence's K and V in one layer, `(length, kv_heads,
        head_dim)` each."""
        layer = at_least("layer", layer, 0, self.num_layers - 1)
        with self._held(seq) as (table, length):
            k, v = (
                torch.ops.vxl.gather_rows(self._tensor(i), table, 0, length)[0]
                for i in (2 * layer, 2 * layer + 1)
            )
        return k, v

    def save(
        self,
        path: str | os.PathLike[str],
        seq: int,
        metadata: Mapping[str, str] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes a sequence to a safetensors file, layer by layer, by `files.atomic_write`.

        Tensors `key.N` and `value.N` are `(length, kv_heads, head_dim)`. The header holds
        geometry, dtype, length, a CRC-32 of each tensor and one of itself.

        Args:
            metadata: strings to keep in the file. `VstCache.read_metadata` returns them.
            tensors: further tensors to keep in the file, float32, bfloat16 or float16.
                `VstCache.read_tensors` returns them.

        Raises:
            ValueError: `path` is a device, or `metadata` or `tensors` cannot be kept.
            OSError: the file cannot be written. An existing file is unchanged.
        """
        for name, kept in (("metadata", metadata), ("tensors", tensors)):
            if kept is not None and not isinstance(kept, Mapping):
                fail(name, type(kept).__name__, "a mapping, or None")
        with self._held(seq) as (table, length):
            header = file_format.Header(
                self.num_layers, self.kv_heads, self.head_dim, self.dtype, length
            )

            def piece(tensor: int, first: int, rows: int) -> torch.Tensor:
                cache = self._tensor(tensor)
                return torch.ops.vxl.gather_rows(cache, table, first, rows).cpu()

            file_format.write(path, header, piece, dict(metadata or {}), dict(tensors or {}))

    def load(self, path: str | os.PathLike[str]) -> int:
        """A new sequence with the rows of a file that `save` wrote, on any device and with any
        page size.

        Raises:
            ValueError: the file has another geometry or dtype, is truncated or damaged.
            PoolExhausted: too few free pages.
            OSError: the file cannot be read. After any of these, the cache is unchanged.
        """
        with file_format.Reader(path) as file:
            file.header.refuse_unless(
                num_layers=self.num_layers,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            )
            # A piece's memory is filled again two pieces later.
            return self._filled(file.header.length, file.pieces(), non_blocking=False)

    def offload(self, seq: int) -> HostSequence:
        """Moves a sequence to host memory and frees its pages. `restore` brings it back.

        From a GPU, the copy goes to page-locked memory, and the call does not wait for it. The
        process keeps that memory for sequences that are offloaded later.
        """
        pinned = self.device.type == "cuda"
        with self._held(seq) as (table, length):
            shape = (2, self.num_layers, length, self.kv_heads, self.head_dim)
            host = HostSequence.empty(shape, self.dtype, pinned)
            for tensor, first, kept in host.pieces():
                cache = self._tensor(tensor)
                rows = torch.ops.vxl.gather_rows(cache, table, first, len(kept))[0]
                kept.copy_(rows, non_blocking=pinned)
        if pinned:
            host._event = torch.cuda.Event()
            host._event.record(torch.cuda.current_stream(self.device))
        self.free(seq)
        return host

    def restore(self, host: HostSequence) -> int:
        """A new sequence with the rows of an offloaded one. `host` stays valid.

        Raises:
            ValueError: `host` comes from a cache of another geometry or dtype.
            PoolExhausted: too few free pages; nothing changed.
        """
        if not isinstance(host, HostSequence):
            fail("host", type(host).__name__, "a HostSequence, as offload returns it")
        _, layers, length, *heads = host.shape
        got = (layers, *heads, host.dtype)
        want = (self.num_layers, self.kv_heads, self.head_dim, self.dtype)
        if got != want:
            fail("host", f"(layers, kv_heads, head_dim, dtype) {got}", want)
        if host._event is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(host._event)
        else:
            host.wait()
        return self._filled(length, host.pieces(), non_blocking=True)

    # -- private ---------------------------------------------------------------------

    @contextmanager
    def _held(self, seq: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Block table, on the device, and length of a sequence as it is now. A fork holds its pages
        until the end, whatever other threads do."""
        child = self.fork(seq)
        try:
            yield self._upload(self._manager.block_table(child)), self._manager.length(child)
        finally:
            self.free(child)

    def _make_copies(self) -> None:
        """Makes the requested copies, those that an earlier failure left undone first. The caller
        holds the lock."""
        while self._copies:
            copies = self._upload(self._copies[0])
            torch.ops.vxl.copy_pages_(self.k_cache, self.v_cache, copies)
            del self._copies[0]

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """An array on the device, without waiting for the copy."""
        host = torch.from_numpy(array)
        if self.device.type == "cuda":  # the allocator keeps page-locked memory until it is read
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)

    def _tensor(self, i: int) -> torch.Tensor:
        """K of layer i / 2 or V of layer (i - 1) / 2, `(1, pages, page_size, ...)`."""
        layer, side = divmod(i, 2)
        return (self.k_cache, self.v_cache)[side][layer : layer + 1]

    def _filled(self, length: int, pieces: Iterable[Piece], *, non_blocking: bool) -> int:
        """A new sequence of `length` rows. With `non_blocking` the host does not wait until a piece
        has been copied."""
        seq = self.new()
        try:
            self.reserve(seq, length)
            table = self._upload(self._manager.block_table(seq))
            for tensor, first, rows in pieces:
                on_device = rows.to(self.device, non_blocking=non_blocking)[None]
                torch.ops.vxl.scatter_rows_(self._tensor(tensor), table, first, on_device)
            self.commit(seq, length)
        except BaseException:
            self.free(seq)
            raise
        return seq


class CacheBatch:
    """Sequences that step together, with what the operators need of them on the device.

    Attributes:
        seqs: ids of the sequences.
        block_table: int32 `(batch, pages)`. Entries past a sequence's last page are 0.
        cache_seqlens: int32 `(batch,)`, tokens cached before the step.

    `cache_seqlens` stays at its address. So does `block_table` if `max_tokens` is given. A step can
    then be captured in a CUDA graph, with `reserve` before each replay and `commit` after it.
    Sequences may also be changed through the cache, as `reserve` reads them again.
    """

    def __init__(self, cache: VstCache, seqs: Seqs, max_tokens: int | None = None) -> None:
        self.cache, self.seqs = cache, [int(seq) for seq in _ids(seqs)]
        self._ids = np.array(self.seqs, dtype=np.int64)
        self._fixed = max_tokens is not None
        width = _MIN_WIDTH
        if max_tokens is not None:
            width = -(-at_least("max_tokens", max_tokens, 1) // cache.page_size)
        # The values of the two tensors, on the host.
        self._lengths = np.zeros(len(self), dtype=np.int32)
        self._table = np.zeros((len(self), width), dtype=np.int32)
        self._reserved, self._releases = np.zeros_like(self._lengths), _UNFINISHED
        with torch.inference_mode(False):
            self.cache_seqlens = torch.zeros(len(self), dtype=torch.int32, device=cache.device)
            self.block_table = torch.zeros(
                self._table.shape, dtype=torch.int32, device=cache.device
            )
        self._refresh()

    def reserve(self, rows: Rows) -> None:
        """Makes room for `rows` more rows in every sequence, or for a number of rows in each; see
        `VstCache.reserve`.

        Raises also:
            ValueError: `max_tokens` was given and does not cover them; nothing changed.
        """
        each = _rows(rows, len(self))
        if self._fixed and len(self):
            longest = max(
                self.cache.length(seq) + int(n) for seq, n in zip(self.seqs, each, strict=True)
            )
            self._refuse_beyond(longest)
        self.cache.reserve(self._ids, each)
        self._reserved = each.astype(np.int32)
        self._refresh()

    def commit(self, rows: Rows) -> None:
        """Commits the rows that the step has written, a number for all sequences or one for each;
        see `VstCache.commit`. Does not wait for the device."""
        each = _rows(rows, len(self)).astype(np.int32)
        same = len(self) > 0 and bool((each == each[0]).all())
        # The upload first: if it finds no memory, the rows do not count yet.
        added = int(each[0]) if same else self.cache._upload(each)
        self.cache.commit(self._ids, each)
        self.cache_seqlens += added
        self._lengths += each
        self._reserved = np.maximum(self._reserved - each, 0)

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A layer's `(k_cache, v_cache, block_table, cache_seqlens)`, as operators take them.

        Raises:
            KeyError: a sequence has been freed, so its pages may belong to another.
            ValueError: a sequence was truncated since `reserve`, or its pages were replaced.
        """
        if self._releases != self.cache._releases:
            self._refuse_released()
        i = at_least("i", i, 0, self.cache.num_layers - 1)
        return self.cache.k_cache[i], self.cache.v_cache[i], self.block_table, self.cache_seqlens

    def __len__(self) -> int:
        return len(self.seqs)

    def _refuse_beyond(self, tokens: int) -> None:
        capacity = self._table.shape[1] * self.cache.page_size
        if tokens > capacity:
            fail("rows", f"a sequence of {tokens} tokens", f"at most {capacity} (max_tokens)")

    def _refuse_released(self) -> None:
        """Refuses sequences that no longer hold the pages of the block table."""
        releases = self.cache._releases
        if self._releases == _UNFINISHED:
            fail("batch", "tensors that an interrupted reserve() left", "reserve() first")
        for i, seq in enumerate(self.seqs):
            pages, row = self.cache._manager.block_table(seq), self._table[i]
            rows = self._lengths[i] + self._reserved[i]
            held = np.array_equal(pages[: len(row)], row[: len(pages)])
            if not held or row[len(pages) :].any() or len(pages) * self.cache.page_size < rows:
                fail("batch", f"sequence {seq}, which changed since reserve()", "reserve() first")
        self._releases = releases

    def _refresh(self) -> None:
        """Brings the two tensors up to date. Uploads only what differs."""
        manager, releases = self.cache._manager, self.cache._releases
        self._releases = _UNFINISHED  # until the end
        width = manager.most_pages(self._ids)
        if width > self._table.shape[1]:
            if self._fixed:  # reserved through the cache, not through this batch
                self._refuse_beyond(width * self.cache.page_size)
            shape = (len(self.seqs), 2 * width)
            with torch.inference_mode(False):
                self.block_table = self.block_table.new_zeros(shape)
            self._table = np.zeros(shape, dtype=np.int32)
        table, lengths = np.empty_like(self._table), np.empty_like(self._lengths)
        with self.cache._lock:
            self.cache._make_copies()
            manager.fill_block_tables(self._ids, table)
            manager.fill_lengths(self._ids, lengths)
        # The arrays say what the device has. It may have no memory for an upload.
        if not np.array_equal(table, self._table):
            self.block_table.copy_(self.cache._upload(table), non_blocking=True)
            self._table = table
        if not np.array_equal(lengths, self._lengths):
            self.cache_seqlens.copy_(self.cache._upload(lengths), non_blocking=True)
            self._lengths = lengths
        self._releases = releases
