"""The memories of a server: watched once, found again by content and settings, in the cache and on
a disk within limits.

A memory is a `.vxl` file and a `.json` file about it, which is written last and deleted first. So
a server that is killed finds whole memories when it starts again, and deletes what is not whole.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from vxl_kernels.files import atomic_write
from vxl_model import VideoMemory
from vxl_model.json_files import read_json_object
from vxl_model.streaming.fingerprint import model_fingerprint

from .engine import Engine
from .questions import FullError, TooLargeError
from .settings import RequestError, ServerSettings, refuse, told
from .sources import Source, Sources

__all__ = ["Entry", "Memories"]

log = logging.getLogger(__name__)


class _DeletedError(Exception):
    """Somebody deleted the memory while it was made."""


@dataclass
class Entry:
    """A memory and what is known of it.

    Attributes:
        owner: whose it is, by API key. prefix: the ids before the video.
        status: "queued", "watching", "live", "ready" or "failed". error: why it failed.
        done, total: frames watched, and of all; total is None if unknown.
        tokens: cached tokens. bytes: of the file.
        memory: where it is in the cache.
        finished: resolves when it is ready, or with the error.
    """

    id: str
    owner: str
    name: str
    kind: str
    options: dict[str, Any]
    prefix: list[int]
    status: str = "queued"
    done: int = 0
    total: int | None = None
    tokens: int = 0
    bytes: int = 0
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    begun: float = 0.0
    error: str = ""
    deleted: bool = False
    memory: VideoMemory | None = None
    finished: Future = field(default_factory=Future)

    def about(self) -> dict[str, Any]:
        """What clients see."""
        seconds = time.time() - self.begun
        rate = self.done / seconds if self.status == "watching" and self.done and seconds else None
        left = None if not rate or self.total is None else (self.total - self.done) / rate
        return {
            "id": self.id,
            "object": "memory",
            "name": self.name,
            "kind": self.kind,
            "status": self.status,
            "created": int(self.created),
            "frames": self.done,
            "total_frames": self.total,
            "frames_per_second": rate and round(rate, 2),
            "seconds_left": left and round(left, 1),
            "cached_tokens": self.tokens,
            "bytes": self.bytes,
            "error": self.error or None,
            "options": self.options,
        }


_SAVED = ("id", "owner", "name", "kind", "options", "prefix", "done", "total", "tokens", "created")


class Memories:
    """All memories of a server, its engine and its store.

    Args:
        make_engine: an engine, given what frees pages of its cache.
    """

    def __init__(
        self, settings: ServerSettings, make_engine: Callable[[Callable[[], bool]], Engine]
    ) -> None:
        self.settings, self._entries = settings, dict[str, Entry]()
        self._changes = threading.Lock()  # of entries, by the engine's thread and the event loop's
        self.frames = 0  # watched so far
        settings.store.mkdir(parents=True, exist_ok=True)
        self._lock = open(settings.store / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"store: got {settings.store}, which another server uses") from None
        self.sources = Sources(settings)
        self.engine = make_engine(self._evict)
        self.model = self.engine.model
        self._fingerprint = model_fingerprint(self.model.model)
        self._read()

    def close(self) -> None:
        self.engine.close()
        self._lock.close()

    # -- finding -------------------------------------------------------------------------

    def of(self, owner: str) -> list[Entry]:
        mine = [entry for entry in self._all() if entry.owner == owner]
        return sorted(mine, key=lambda entry: -entry.created)

    def get(self, id: str, owner: str) -> Entry:
        """Raises RequestError 404, also for a memory of somebody else."""
        entry = self._entries.get(id)
        if entry is None or entry.owner != owner:
            raise RequestError(404, f"memory: got {id[:80]!r}, which does not exist", "memory")
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of the saved ones."""
        return sum(entry.bytes for entry in self._all())

    # -- making --------------------------------------------------------------------------

    async def watch(
        self, owner: str, sources: list[Source], options: dict[str, Any], prefix: list[int]
    ) -> Entry:
        """The memory of a video or of pictures, which is watched unless there is one already.

        Raises:
            RequestError: the file cannot be read, is too large, or too many wait.
        """
        digests = [source.digest for source in sources]
        key = json.dumps([owner, digests, sources[0].kind, options, prefix, self._fingerprint])
        id = "mem-" + hashlib.sha256(key.encode()).hexdigest()[:32]
        known = self._entries.get(id)
        if known is not None and known.status != "failed":
            for source in sources:
                source.forget()
            return known
        try:
            waiting = sum(e.status in ("queued", "watching") for e in self._all())
            if waiting >= self.settings.most_watching:
                raise RequestError(429, f"{waiting} videos wait to be watched already")
            entry = Entry(id, owner, sources[0].name, sources[0].kind, options, prefix)
            self._entries[id] = entry  # the same video meanwhile finds this one
            try:
                given, total = await asyncio.to_thread(
                    self.sources.open, sources, options, self.model.processor
                )
                entry.total, entry.tokens = total, self._tokens(entry, total)
                self._start(entry, given, sources)
            except BaseException as error:
                entry.finished.set_exception(_reason(error))
                self.delete(entry)
                raise
        except BaseException:
            for source in sources:
                source.forget()
            raise
        return entry

    def _tokens(self, entry: Entry, frames: int) -> int:
        """Cached tokens of this number of frames, with room for a partly filled page."""
        try:
            plan = self.model.make_plan(entry.options.get("ratio"))
            tokens = frames * self.model.tokens_per_frame
            tokens = self.model.encoder().cached_tokens(plan, tokens) + len(entry.prefix)
        except ValueError as error:
            raise RequestError(400, str(error), "ratio") from None
        if self.engine.pages(tokens) > self.engine.cache.pages.num_pages:
            got = f"{frames} frames, {tokens} cached tokens"
            raise refuse("frames", got, "fewer, or a larger ratio: the cache is smaller", 413)
        return tokens

    def _start(self, entry: Entry, given: dict[str, Any], sources: list[Source]) -> None:
        def work() -> None:
            try:
                self._watch(entry, given)
            finally:
                for source in sources:
                    source.forget()

        def ended(future: Future) -> None:
            error = future.exception()
            if error is not None:
                entry.status, entry.error = "failed", told(error)
                error.__traceback__ = None
                if not entry.finished.done():
                    entry.finished.set_exception(_reason(error))

        self.engine.call(work, long=True).add_done_callback(ended)

    def _watch(self, entry: Entry, given: dict[str, Any]) -> None:
        """In the engine's thread. Questions have steps between the pieces of a video."""
        engine = self.engine
        if entry.deleted:
            raise _DeletedError("the memory was deleted")
        entry.status, entry.begun = "watching", time.time()
        piece = time.perf_counter()

        def progress(done: int, total: int | None) -> None:
            nonlocal piece
            self.frames += done - entry.done
            entry.done = done
            if entry.deleted:
                raise _DeletedError("the memory was deleted")
            left = 1 - done / total if total else 0.0
            engine.promised = engine.pages(int(entry.tokens * left))
            engine.share(time.perf_counter() - piece)
            piece = time.perf_counter()

        engine.promised = engine.pages(entry.tokens)
        try:
            if not engine.fits(engine.promised):
                raise TooLargeError("the cache is full of videos that are being asked")
            memory = self.model.watch(
                **given,
                input_ids=entry.prefix,
                ratio=entry.options.get("ratio"),
                progress=progress,
            )
        finally:
            engine.promised = 0
        self.keep(entry, memory)

    def keep(self, entry: Entry, memory: VideoMemory) -> None:
        """Saves a memory whose video has ended, in the engine's thread. It can be asked then."""
        whole = VideoMemory(self.model, memory.forks(1))
        path = self.path(entry)
        whole.save(path, final=True)
        with self._changes:
            if entry.deleted:
                self._unlink(entry)
                raise _DeletedError("the memory was deleted")
            entry.tokens, entry.bytes = whole.cached_tokens[0], path.stat().st_size
            about = json.dumps({name: getattr(entry, name) for name in _SAVED})
            atomic_write(path.with_suffix(".json"), about, durable=True)
            entry.memory, entry.used, entry.status = whole, time.time(), "ready"
        entry.finished.set_result(entry)
        self._within_disk()

    def live(self, owner: str, name: str, options: dict[str, Any], prefix: list[int]) -> Entry:
        """A memory for frames that are still to come."""
        entry = Entry(f"mem-{secrets.token_hex(16)}", owner, name, "live", options, prefix)
        entry.status, entry.begun = "live", time.time()
        self._entries[entry.id] = entry
        return entry

    # -- using ---------------------------------------------------------------------------

    async def ready(self, entry: Entry) -> None:
        """Waits until a memory can be asked. Raises what went wrong."""
        entry.used = time.time()
        if entry.status not in ("ready", "live"):
            await asyncio.shield(asyncio.wrap_future(entry.finished))

    def resident(self, entry: Entry) -> VideoMemory:
        """The memory in the cache, in the engine's thread. Loads it if it is not there."""
        entry.used = time.time()
        memory = entry.memory
        if memory is None and entry.status == "ready" and not entry.deleted:
            self.engine.fits(self.engine.pages(entry.tokens))
            try:
                memory = VideoMemory.load(self.path(entry), self.model)
                os.utime(self.path(entry))
            except (ValueError, OSError) as error:
                if not entry.deleted:
                    self.delete(entry)
                    log.error("a saved memory cannot be read: %s", error)
                    message = "memory: its file is damaged or missing; watch the video again"
                    raise RequestError(410, message, "memory") from None
        with self._changes:
            if memory is None or entry.deleted:
                raise RequestError(404, "memory: it was deleted", "memory")
            entry.memory = memory
        return memory

    def delete(self, entry: Entry) -> None:
        """Forgets a memory. A thread that is watching its video notices and stops."""
        with self._changes:
            entry.deleted, entry.memory = True, None
            if self._entries.get(entry.id) is entry:  # the name may belong to a later one
                del self._entries[entry.id]
                self._unlink(entry)

    def path(self, entry: Entry) -> Any:
        return self.settings.store / f"{entry.id}.vxl"

    # -- private -------------------------------------------------------------------------

    def _all(self) -> list[Entry]:
        """Those there are now. Other threads change them meanwhile."""
        return list(self._entries.values())

    def _unlink(self, entry: Entry) -> None:
        path = self.path(entry)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _evict(self) -> bool:
        """Drops the memory from the cache that was not used for the longest time."""
        held = [e for e in self._all() if e.memory and e.status == "ready"]
        if not held:
            return False
        min(held, key=lambda entry: entry.used).memory = None
        return True

    def _within_disk(self) -> None:
        kept = sorted((e for e in self._all() if e.status == "ready"), key=lambda e: e.used)
        total = sum(entry.bytes for entry in kept)
        for entry in kept[:-1]:
            if total <= self.settings.disk_bytes:
                return
            total -= entry.bytes
            self.delete(entry)

    def _read(self) -> None:
        """Finds the whole memories of an earlier server and deletes what is not whole."""
        store = self.settings.store
        for path in store.glob("mem-*.json"):
            try:
                fields = read_json_object(path)
                entry = Entry(**{name: fields[name] for name in _SAVED})
                stat = self.path(entry).stat()
            except (ValueError, KeyError, TypeError, OSError):
                path.unlink()
                continue
            entry.status, entry.bytes, entry.used = "ready", stat.st_size, stat.st_mtime
            entry.finished.set_result(entry)
            self._entries[entry.id] = entry
        known = {self.path(entry) for entry in self._all()}
        for path in (*store.glob("mem-*.vxl"), *store.glob(".vxl-*.part")):
            if path not in known:
                path.unlink()


def _reason(error: BaseException) -> BaseException:
    """An error for a client."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TooLargeError):
        return RequestError(413, str(error))
    if isinstance(error, _DeletedError):
        return RequestError(404, f"memory: {error}", "memory")
    if isinstance(error, FullError):
        return RequestError(503, str(error))
    if isinstance(error, (ValueError, torch.OutOfMemoryError, MemoryError)):
        return RequestError(400, f"video: {told(error)}", "video")
    return RequestError(500, f"{type(error).__name__} while watching")
