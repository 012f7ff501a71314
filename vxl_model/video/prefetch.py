"""Making the next items of an iterable in a thread while the last one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")

# How long a consumer that leaves early waits for the item that is being made. A camera that is gone
# makes none, and Ctrl-C must not wait for it.
LEAVE_SECONDS = 2.0


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yields `items` in order and makes up to `ahead` of them in advance.

    An error of `items` is raised here. Leaving early ends the thread after the item it is making.
    """
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(entry: tuple[bool, object]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        source = iter(items)
        try:
            for item in source:
                if not put((True, item)):
                    break
            else:
                put((False, None))
        except BaseException as error:
            put((False, error))
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="vxl-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join(LEAVE_SECONDS)
