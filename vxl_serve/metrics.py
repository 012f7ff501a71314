"""What Prometheus reads of a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .memories import Memories

__all__ = ["Metrics"]


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, memories: Memories) -> None:
        self._memories, self._registry = memories, CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "vxl_requests",
            "requests by route and status",
            ("route", "status"),
            registry=self._registry,
        )
        first = Histogram(
            "vxl_first_token_seconds",
            "from a question to its first token",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self._registry,
        )
        memories.engine.first_token = first.observe

    def collect(self) -> Iterator[Any]:
        """Read from the engine and the store when Prometheus asks."""
        engine, memories = self._memories.engine, self._memories
        pages = engine.cache.pages
        for name, text, value in (
            ("questions_waiting", "questions in the queue", engine.waiting),
            ("answers_running", "answers that are decoded", engine.running),
            ("cache_pages_free", "pages that nobody holds", pages.free_pages),
            ("cache_pages", "pages of the cache", pages.num_pages),
            ("memories", "memories of the store", len(memories)),
            ("memory_bytes", "bytes of their files", memories.bytes),
        ):
            yield GaugeMetricFamily(f"vxl_{name}", text, value)
        for name, text, value in (
            ("tokens", "tokens decoded", engine.tokens),
            ("answers", "answers completed", engine.answers),
            ("failures", "questions that failed", engine.errors),
            ("steps", "decoding steps", engine.steps),
            ("frames", "frames watched", memories.frames),
        ):
            yield CounterMetricFamily(f"vxl_{name}", text, value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
