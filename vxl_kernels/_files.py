"""Writing a file so that a reader, or a kill, meets the old one or the new one, never half."""

import os
from pathlib import Path

__all__ = ["write_beside"]


def write_beside(path: Path, text: str) -> None:
    """Writes beside `path`, then renames. Not flushed to the disk: a power cut may lose it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
