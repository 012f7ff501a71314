"""A decoding step as a CUDA graph: the host starts one graph in place of a thousand kernels.

A step reads tokens, block table and lengths from tensors at fixed addresses, so a captured one
follows whatever is copied there. One graph can run any sequences of its cache, up to a
fixed number, until the block table has to be wider. A row that a step does not need is an empty
sequence with a page of its own: it reads no cache, and weights are read once for all rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vxl_kernels import CacheBatch, PoolExhausted, VstCache

from ..errors import fail

__all__ = ["StepGraphs", "drop_graphs", "graph_rows", "step_graphs"]

_MOST = 64  # graphs of a cache
Body = Callable[[Tensor, Any], Tensor]
"""A step: ids `(batch, 1)` and a batch as `CacheContext` takes it, to logits."""


class FixedBatch:
    """What a `CacheContext` takes of a `CacheBatch`, at addresses that stay.

    Args:
        like: a batch of the cache.
        rows: sequences.
        width: of the block table, in pages.
    """

    def __init__(self, like: CacheBatch, rows: int, width: int) -> None:
        self._cache: VstCache | None = like.cache
        with torch.inference_mode(False):
            options: dict[str, Any] = {"device": like.block_table.device}
            self.ids = torch.zeros(rows, 1, dtype=torch.int64, **options)
            self.block_table = torch.zeros(rows, width, dtype=torch.int32, **options)
            self.cache_seqlens = torch.zeros(rows, dtype=torch.int32, **options)

    def fill(self, ids: Tensor, batch: CacheBatch, spare: Tensor) -> None:
        """A step's ids `(batch, 1)`, pages and lengths. Rows that are left get pages of `spare`,
        a block table of empty sequences. Nothing waits for the device."""
        n = len(batch)
        self.block_table[:n, : batch.block_table.shape[1]].copy_(batch.block_table)
        self.ids[:n].copy_(ids)
        self.cache_seqlens[:n].copy_(batch.cache_seqlens)
        if n < len(self.ids):
            self.block_table[n:, :1].copy_(spare[: len(self.ids) - n, :1])
            self.cache_seqlens[n:].zero_()

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self._cache is not None
        return self._cache.k_cache[i], self._cache.v_cache[i], self.block_table, self.cache_seqlens

    def release(self) -> None:
        """The graph has the addresses. The cache may end before it."""
        self._cache = None


@dataclass
class _Captured:
    fixed: FixedBatch
    graph: Any
    logits: Tensor


class _OfCache:
    """Graphs over a cache, and its empty sequences with a page each. Does not keep the cache."""

    def __init__(self) -> None:
        self.graphs: dict[tuple, _Captured] = {}
        self.spare: list[int] = []
        self.spare_table = torch.empty(0, 1, dtype=torch.int32)

    def has_spare(self, cache: VstCache, rows: int) -> bool:
        """Whether there are this many empty sequences. Makes those that are missing."""
        missing = rows - len(self.spare)
        if missing > 0:
            seqs = [cache.new() for _ in range(missing)]
            try:
                batch = cache.batch([*self.spare, *seqs])
                batch.reserve(1)
            except BaseException as error:
                for seq in seqs:
                    cache.free(seq)
                if isinstance(error, PoolExhausted):
                    return False
                raise
            # Together, as a step takes a row of the table for each of them.
            self.spare, self.spare_table = batch.seqs, batch.block_table
        return True


class StepGraphs:
    """The graphs of a model's decoding steps. They share memory, so one runs at a time: steps on
    other caches of the model wait, on the host and on the device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: Any = None  # an event after the last graph
        self._by_cache: WeakKeyDictionary[VstCache, _OfCache] = WeakKeyDictionary()
        self._addresses: tuple[int, ...] = ()
        self._last: tuple[ref[VstCache], list[int]] | None = None  # sequences count in each cache

    def __call__(
        self,
        body: Body,
        ids: Tensor,
        batch: CacheBatch,
        settings: Hashable,
        parameters: Callable[[], Iterable[Tensor]],
        invariant: bool,
    ) -> Tensor:
        """Logits `(batch, 1, vocabulary)` of one more token of every sequence.

        Args:
            body: the step. It reads no value of a tensor on the host.
            ids: `(batch, 1)`.
            batch: the sequences, with room for the token.
            settings: what else the step depends on.
            invariant: a row's bits do not depend on other rows. A graph is then used for
                several numbers of sequences.
            parameters: the model's weights. Their addresses are compared when other sequences
                come, and graphs over others are dropped.
        """
        with self._lock:
            now = (ref(batch.cache), list(batch.seqs))
            if now != self._last:
                addresses = tuple(p.data_ptr() for p in parameters())
                if addresses != self._addresses:
                    for of_cache in self._by_cache.values():
                        of_cache.graphs.clear()
                self._addresses, self._last = addresses, now
            return self._replay(body, ids, batch, settings, invariant)

    def _replay(
        self, body: Body, ids: Tensor, batch: CacheBatch, settings: Hashable, invariant: bool
    ) -> Tensor:
        of_cache = self._by_cache.setdefault(batch.cache, _OfCache())
        rows = graph_rows(len(batch)) if invariant else len(batch)
        if rows > len(batch) and not of_cache.has_spare(batch.cache, rows - len(batch)):
            rows = len(batch)
        key = (rows, _power_of_two(batch.block_table.shape[1]), settings)
        graphs = of_cache.graphs
        captured = graphs.pop(key, None)
        fixed = FixedBatch(batch, *key[:2]) if captured is None else captured.fixed
        stream = torch.cuda.current_stream(fixed.ids.device)
        if self._done is not None:  # it may run on the stream of another thread
            stream.wait_event(self._done)
        try:
            fixed.fill(ids, batch, of_cache.spare_table)
            if captured is None:
                captured = self._capture(body, fixed)
                if len(graphs) >= _MOST:
                    del graphs[next(iter(graphs))]  # the one that was used longest ago
            graphs[key] = captured
            captured.graph.replay()
            return captured.logits[: len(batch)].clone()
        finally:  # an error may leave work behind that is queued
            self._done = stream.record_event()

    def drop(self) -> None:
        """Frees the graphs, and the pages of rows that steps did not need."""
        with self._lock:
            for cache, of_cache in self._by_cache.items():
                for seq in of_cache.spare:
                    cache.free(seq)
            self._by_cache.clear()

    def _capture(self, body: Body, fixed: FixedBatch) -> _Captured:
        """The first step runs twice, uncaptured before: it compiles kernels and makes workspaces.
        Each run writes the same K and V to the same places."""
        device = fixed.ids.device
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            body(fixed.ids, fixed)
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # On a stream of the model's device: the default is one of the device that was current
        # first. Other threads go on meanwhile, such as one that page-locks frames of a video.
        how: dict[str, Any] = {"stream": side, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **how):
            logits = body(fixed.ids, fixed)
        fixed.release()
        return _Captured(fixed, graph, logits)


_graphs: WeakKeyDictionary[Any, StepGraphs] = WeakKeyDictionary()
_making = threading.Lock()


def step_graphs(model: Any) -> StepGraphs:
    """The graphs of a model.

    Raises:
        ValueError: the model cannot be captured.
    """
    with _making:
        if model not in _graphs:
            refuse_model(model)
            _graphs[model] = StepGraphs()
        return _graphs[model]


def drop_graphs(model: Any) -> None:
    """Frees the graphs of a model."""
    with _making:
        graphs = _graphs.pop(model, None)
    if graphs is not None:
        graphs.drop()


def refuse_model(model: Any) -> None:
    """Refuses what a graph of one device cannot hold."""
    name, expected = "settings.decode_graphs", "a model on one CUDA device"
    if model.device.type != "cuda":
        fail(name, f"a model on {model.device}", expected)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        fail(name, "weights that tensor parallelism has cut", expected)
    if any(getattr(m, "_hf_hook", None) is not None for m in model.modules()):
        fail(name, "weights that accelerate moves", expected)


def graph_rows(sequences: int) -> int:
    """Rows of the graph for this number of sequences: 1, 2, 4, 8, 16, 24, 32 and so on."""
    return -(-sequences // 8) * 8 if sequences > 8 else _power_of_two(sequences)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
