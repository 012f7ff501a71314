"""Opening a file with PyAV and finding its video stream."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .base import VideoError, first_line

# A larger frame (16,384 x 8,192) means a broken or hostile header.
MAX_PIXELS = 1 << 27
# Demuxers that turn any text or binary file into pictures of characters.
TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})


def open_container(path: Path) -> Any:
    """The file as a PyAV container. It is a context manager. Raises VideoError."""
    try:
        import av
    except ImportError as error:
        raise VideoError(
            f"{path}: PyAV is missing, install it with: pip install 'vxl[video]' ({error})"
        ) from None
    options: dict[str, Any] = {}
    if hasattr(av.container.Container, "metadata_errors"):  # PyAV 19 never refuses tags
        options["metadata_errors"] = "replace"
    try:
        # "file:" keeps a colon in a name from being read as a protocol. The list keeps playlists
        # from opening network addresses.
        return av.open(
            f"file:{path.absolute()}",
            container_options={"protocol_whitelist": "file,crypto,data"},
            **options,
        )
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise VideoError(f"{path}: not a video that FFmpeg reads ({first_line(error)})") from None


def video_stream(container: Any, path: str | os.PathLike[str]) -> Any:
    """The stream that a player would show; raises VideoError where there is none."""
    if container.format.name in TEXT_ART:
        raise VideoError(f"{path}: a text or data file, not a video")
    import av

    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        others = sorted({s.type for s in container.streams if s.type != "video"})
        cover_art = " besides cover art" if container.streams.video else ""
        found = f"only {' and '.join(others)}" if others else "no streams"
        raise VideoError(f"{path}: no video stream{cover_art} ({found})")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: FFmpeg here has no decoder for its video stream")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            f"{path}: frames of {context.width} x {context.height}, more than {MAX_PIXELS} pixels"
        )
    stream.thread_type = "AUTO"
    return stream
