"""Clocks, interleaved repeats, and the time budget."""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["Budget", "Clock", "interleave", "spread", "threads"]

Call = Callable[[], object]
_ENOUGH_SECONDS = 0.6
# A call of so many seconds lets what a first call pays once vanish, if it is about as fast as the
# next one.
_FIRST_COUNTS, _ABOUT = 0.25, 0.25
# A call of so many seconds needs no third reading, if two are as close as this.
_TWO_SUFFICE, _CLOSE = 1.0, 0.05
_FIRST_CYCLES, _MAX_CYCLES = 1 << 20, 1 << 26  # of a GPU that waits: 0.6 ms and 40 ms at 1.7 GHz


class Clock:
    """Times one call. `cold` calls start with none of their data in the last-level cache:
    on a CPU those that are bound by memory, on a GPU all.

    On a GPU only the GPU's time counts: it spins while the host prepares and queues the call, so no
    number contains Python's time. `host_seconds` has that of the last call. A call may wait for the
    GPU itself or launch more than the driver's queue holds. Such a call cannot be queued ahead;
    `queued_ahead` is then False and the time includes the host's.
    """

    def __init__(self, device: str, evict: torch.Tensor) -> None:
        self._cuda = device == "cuda"
        self._evict = evict
        self._cycles = _FIRST_CYCLES
        self._not_ahead: weakref.WeakSet[Call] = weakref.WeakSet()  # a call keeps its tensors alive
        self.host_seconds: float | None = None
        self.queued_ahead = True

    def seconds(self, call: Call, cold: bool = False) -> float:
        if self._cuda:
            return self._cuda_seconds(call)
        if cold:
            self._evict.sum()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _cuda_seconds(self, call: Call) -> float:
        known = call in self._not_ahead  # repeats start with the wait that sufficed
        cycles = _MAX_CYCLES if known else self._cycles
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._evict.sum()  # read, not written: dirty lines would be written back in the call
            torch.cuda._sleep(cycles)
            start.record()
            began = time.perf_counter()
            call()
            self.host_seconds = time.perf_counter() - began
            self.queued_ahead = not start.query()  # the GPU has not begun yet
            end.record()
            torch.cuda.synchronize()
            if self.queued_ahead and known:  # the host was delayed once
                self._not_ahead.discard(call)
            elif self.queued_ahead:
                self._cycles = cycles
            elif cycles >= _MAX_CYCLES:
                self._not_ahead.add(call)
            if self.queued_ahead or cycles >= _MAX_CYCLES:
                return start.elapsed_time(end) / 1e3
            cycles *= 4


def interleave(
    measure: dict[int, Callable[[], float]],
    seconds: float,
    least: int,
    most: int,
    first: Mapping[int, float] | None = None,
) -> dict[int, list[float]]:
    """Seconds of each competitor, repeated in turns, so drift of the machine affects all alike.

    All take part in the first `least` rounds; each round starts with another one. Later rounds
    continue with those that have used less than an even share of `seconds`, or have too few
    repeats for a reliable median. One with a negative name is not repeated alone after `least`.

    first: with it, fewer readings of long calls are enough. It has the seconds of an earlier call
    of a competitor, which counts if it took 0.25 seconds and at most a quarter more or less than
    the next. Of a call of a second, two readings within 5 % are enough.
    """
    times: dict[int, list[float]] = {name: [] for name in measure}
    used = dict.fromkeys(measure, 0.0)
    part = max(seconds / max(1, len(measure)), _ENOUGH_SECONDS)
    order = list(measure)

    def has_enough(name: int) -> bool:
        found = times[name]
        if first is not None and len(found) == 2 and min(found) >= _TWO_SUFFICE:
            return max(found) / min(found) <= 1 + _CLOSE
        return len(found) >= least

    for i in range(most):
        order = order[1:] + order[:1]
        running = [n for n in order if not has_enough(n) or used[n] + used[n] / i < part]
        if all(name < 0 and len(times[name]) >= least for name in running):
            break
        for name in running:
            start = time.perf_counter()
            value = measure[name]()
            used[name] += time.perf_counter() - start
            times[name].append(value)
            earlier = (first or {}).get(name, 0.0) if i == 0 else 0.0
            if earlier >= _FIRST_COUNTS and abs(earlier / value - 1) <= _ABOUT:
                times[name].append(earlier)
    return times


def spread(times: list[float]) -> float:
    """Half the interquartile range as a fraction of the median; with fewer than four repeats, half
    the full range."""
    middle = statistics.median(times)
    if len(times) < 4:
        return (max(times) - min(times)) / 2 / middle
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the number of CPU threads inside a `with` block; None keeps it."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Budget:
    """Divides the seconds of a run among its groups by weight, and reports progress."""

    def __init__(self, seconds: float, weights: list[float]) -> None:
        self._start = time.perf_counter()
        self._seconds = seconds
        self._weights = weights
        self._done = 0
        self._group_start = self._group_end = 0.0
        self._told = 0
        self._group_name = ""

    def next_group(self, name: str) -> None:
        now = self._group_start = self._now()
        left = sum(self._weights[self._done :])
        share = (self._seconds - now) * self._weights[self._done] / left
        self._group_end = now + max(0.0, share)
        self._group_name = name
        self._done += 1

    def group_left(self) -> float:
        """Seconds left to the group; repeats after the first `least` stop there."""
        return max(0.0, self._group_end - self._now())

    def tell(self, what: str) -> None:
        """Writes one line and overwrites it; where that is impossible, one line a group."""
        finished, left = self._done - 1, self._seconds
        if finished > 0:
            per_weight = self._group_start / sum(self._weights[:finished])
            left = per_weight * sum(self._weights[finished:])
            left = max(0.0, left - (self._now() - self._group_start))
        head = f"[{self._done}/{len(self._weights)}] {self._group_name}"
        tail = f"(about {left:.0f} s left)"
        if sys.stderr.isatty():
            print(f"\r\033[K{head}: {what} {tail}", end="", file=sys.stderr, flush=True)
        elif self._told != self._done:
            self._told = self._done
            print(f"{head} {tail}", file=sys.stderr, flush=True)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    @staticmethod
    def end() -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
