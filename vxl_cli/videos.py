"""The videos that a command is given: files, and folders that are searched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["find_videos"]

SUFFIXES = ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv"


def find_videos(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The given files, each once, and the video files of the given folders, sorted by name."""
    found: dict[str, None] = {}
    suffixes = SUFFIXES.split()
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(
                (
                    Path(folder) / name
                    for folder, _, names in os.walk(path)
                    for name in names
                    if Path(name).suffix.lower() in suffixes
                ),
                key=lambda file: file.as_posix(),
            )
            if not inside:
                raise ValueError(f"videos: {os.fspath(path)}: a folder without video files")
            found.update(dict.fromkeys(os.path.abspath(file) for file in inside))
        else:
            if "://" not in os.fspath(path) and not os.path.lexists(path):
                raise ValueError(f"videos: {os.fspath(path)}: no such file")
            # Not before: the model takes seconds to import, and a wrong name needs nothing of it.
            from vxl_model.video.decoders.base import VideoError, checked_path

            try:
                checked_path(path)
            except VideoError as error:
                if not os.path.isfile(path):  # an empty or locked one counts as a bad video
                    raise ValueError(f"videos: {error}") from None
            found[os.path.abspath(path)] = None
    if not found:
        raise ValueError("videos: got none, expected files or folders")
    return [Path(file) for file in found]
