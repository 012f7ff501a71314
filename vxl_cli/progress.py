"""Progress of a long command on stderr."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

from tqdm import tqdm

__all__ = ["Progress"]

_NARROW = "{desc}: {n_fmt}/{total_fmt}{unit}, {remaining}"  # tqdm cuts it at the last column
LOG_SECONDS = 30.0  # between two lines where stderr is not a terminal


class Progress:
    """`progress(done, total)` draws a bar on a terminal and wipes it away at the end. Elsewhere,
    as in a log file, it writes a line every `LOG_SECONDS`."""

    def __init__(self, what: str, unit: str = "frames", stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        terminal = stream.isatty()
        columns = shutil.get_terminal_size().columns if terminal else 80
        self._bar = tqdm(
            desc=what,
            unit=f" {unit}",
            file=stream if terminal else _Lines(stream),
            leave=False,
            ncols=None if terminal else columns,
            dynamic_ncols=terminal,
            bar_format=_NARROW if columns < 60 else None,
            ascii=not terminal,
            delay=0.5 if terminal else LOG_SECONDS,
            mininterval=0.1 if terminal else LOG_SECONDS,
            maxinterval=10.0 if terminal else LOG_SECONDS,
        )

    def __call__(self, done: int, total: int | None) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A stream whose redrawn lines become lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()
