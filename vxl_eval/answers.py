"""Answers on disk, one a line, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Answers", "model_identity", "read_answers", "request_key"]


def model_identity(path: str | os.PathLike[str]) -> list[Any]:
    """What tells a checkpoint from another one: its name, and of a folder the bytes and times of
    its files."""
    folder = Path(path)
    if not folder.is_dir():
        return [os.fspath(path)]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def request_key(settings: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Names a request under settings. Both hold what JSON takes."""
    text = json.dumps([settings, request], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_answers(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every complete line of a folder's answers, each key once, in the order of files and lines."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(folder).glob("answers-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the line that a killed process was writing
            if isinstance(record, dict) and "key" in record:
                found.setdefault(record["key"], record)
    return list(found.values())


class Answers:
    """The answers of a folder. Several processes may share one. Each appends to a file of its
    own and reads all files once, at its start.

    Args:
        folder: None keeps nothing.
        rank: number of the process.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, rank: int = 0) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._file: Path | None = None
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._known = {record["key"]: record for record in read_answers(folder)}
        self._file = Path(folder) / f"answers-{rank}.jsonl"
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            with self._file.open("ab") as file:
                file.write(b"\n")

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keeps an answer. It survives the end of the process from here on."""
        self._known[key] = {"key": key, **record}
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._known[key]) + "\n")
