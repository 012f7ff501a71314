"""A progress bar on a terminal: frames a second and the time that is left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24
INTERVAL = 0.1  # seconds between two drawings


class Progress:
    """`progress(done, total)` draws; nothing is written where `stream` is no terminal."""

    def __init__(self, what: str, unit: str = "frames", stream: TextIO | None = None) -> None:
        self.what, self.unit = what, unit
        self.stream = sys.stderr if stream is None else stream
        self.shown = self.stream.isatty()
        self._begin = time.monotonic()
        self._drawn = 0.0
        self._length = 0

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if not self.shown or (now - self._drawn < INTERVAL and done != total):
            return
        self._drawn = now
        self._write(self.line(done, total, now - self._begin))

    def line(self, done: int, total: int | None, seconds: float) -> str:
        """The text of the bar after `seconds`."""
        rate = done / seconds if seconds > 0 else 0.0
        if not total:
            return f"{self.what} {done} {self.unit}, {rate:.1f} {self.unit}/s"
        full = WIDTH * min(done, total) // total
        left = f", {clock((total - done) / rate)} left" if rate and done < total else ""
        return (
            f"{self.what} [{'#' * full}{'.' * (WIDTH - full)}] {done}/{total} {self.unit}, "
            f"{rate:.1f} {self.unit}/s{left}"
        )

    def close(self) -> None:
        """Wipes the bar away."""
        if self._length:
            self._write("")
            self.stream.write("\r")
            self.stream.flush()

    def _write(self, text: str) -> None:
        self.stream.write("\r" + text.ljust(self._length))
        self.stream.flush()
        self._length = len(text)


def clock(seconds: float) -> str:
    """12 s, 3:05 min, 2:10 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
