"""Records of published files, one at a time: JSON lists, JSONL, CSV, Parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.samples import parse_json

__all__ = ["check_readable", "file_records"]

_CHUNK = 1 << 20  # characters read of a list at a time
_BETWEEN = " \t\r\n,"


def file_records(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The records of a file, by its ending. A record that cannot be read is a ValueError.

    Raises:
        ValueError: an unknown ending, a list that is damaged so that its rest cannot be read, or
            Parquet without pyarrow.
        OSError: the file cannot be read.
    """
    path = Path(path)
    check_readable(path)
    yield from _READERS[path.suffix.lower()](path)


def check_readable(path: Path) -> None:
    """Raises ValueError for an unknown ending, or for Parquet without pyarrow."""
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise ValueError(f"{path}: got {path.suffix!r}, expected {', '.join(_READERS)}")
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install pyarrow")


def _json(path: Path) -> Iterator[Any]:
    """The items of a list, of which no more than one and a chunk are held; or lines."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(_CHUNK)
        start = text.lstrip()
        if not start.startswith("["):
            yield from _lines(path)
            return
        text, at = start[1:], 0
        decoder = json.JSONDecoder()
        while True:
            while at < len(text) and text[at] in _BETWEEN:
                at += 1
            if at < len(text) and text[at] == "]":
                return
            try:
                record, end = decoder.raw_decode(text, at)
                whole = end < len(text)  # a number at the end of a chunk may go on
            except ValueError as error:
                record, end, whole = error, at, False
            except RecursionError:
                raise ValueError(f"{path}: a list with an item nested too deeply") from None
            if not whole:
                more = file.read(max(_CHUNK, len(text) - at))
                if more:
                    text, at = text[at:] + more, 0
                    continue
                if isinstance(record, ValueError):
                    raise ValueError(f"{path}: a damaged list ({record})")
            yield record
            at = end
            if at > _CHUNK:
                text, at = text[at:], 0


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield parse_json(line)


def _csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            if None in row or None in row.values():
                yield ValueError(f"got {len(row)} columns, not those of the head")
            else:
                yield row


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
