"""Questions, their answers as events, and the queue of questions that wait.

An event loop asks and reads the answer. The engine's thread takes questions out of the queue and
writes the events.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .sampling import Chosen, Sampling

if TYPE_CHECKING:
    from vxl_model import VideoMemory

__all__ = ["Answer", "Event", "FullError", "Question", "TooLargeError", "Turns"]


class FullError(Exception):
    """The queue is full; the request may be repeated later."""


class TooLargeError(ValueError):
    """A request that would not fit into an empty cache."""


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        ids: everything after the video; without a memory the whole text.
        sampling: how to answer.
        memory: returns the memory, in the engine's thread; None for text alone.
        client: who asks. Clients take turns.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    memory: Callable[[], VideoMemory] | None = None
    client: str = ""


@dataclass(frozen=True)
class Event:
    """A token of answer `index`, with the text that it made certain. The last one has `finish`,
    "stop" or "length". `count`: tokens, where several come at once."""

    index: int
    chosen: Chosen
    text: str
    finish: str | None = None
    count: int = 1


class Answer:
    """The events of one question. Iterate over it in the event loop that made it, or `cancel`."""

    def __init__(self, question: Question, leave: Callable[[Answer], None]) -> None:
        self.question, self._leave = question, leave
        self.cancelled = False
        self.begun = time.perf_counter()
        self._open = question.sampling.n
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

    def cancel(self) -> None:
        """Nobody waits for the rest: it leaves the queue, or the next step leaves it out."""
        self.cancelled = True
        self._leave(self)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._open:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            self._open -= event.finish is not None
            yield event

    def put(self, event: Event | BaseException) -> None:
        """Called by the engine's thread."""
        if isinstance(event, BaseException):
            event.__traceback__ = None  # its frames hold pages
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, so nobody listens
            self.cancelled = True


class Turns:
    """Questions that wait. Clients take turns, and each one's questions keep their order."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Answer]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def add(self, answer: Answer) -> None:
        self._clients.setdefault(answer.question.client, deque()).append(answer)

    def first(self) -> Answer | None:
        """The next one, which stays first until it is removed."""
        return next((waiting[0] for waiting in self._clients.values()), None)

    def remove(self, answer: Answer, served: bool = False) -> None:
        """Takes one out, if it is there. `served`: its client moves to the end of the queue."""
        client = answer.question.client
        waiting = self._clients.get(client, deque())
        if answer not in waiting:
            return
        waiting.remove(answer)
        if served:
            self._clients.move_to_end(client)
        if not waiting:
            del self._clients[client]
