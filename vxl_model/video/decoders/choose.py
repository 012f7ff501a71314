"""Opening a video with the decoder that suits it."""

from __future__ import annotations

import contextlib
import os

from ..pictures import ImageError
from .base import Decoder, checked_path, reading
from .container import open_container, video_stream
from .picture import PictureDecoder
from .pyav import PyAvDecoder


def open_decoder(path: str | os.PathLike[str]) -> Decoder:
    """Opens a video, or a picture as a video of one frame. Raises VideoError."""
    file = checked_path(path)
    with reading(file):
        decoder = PyAvDecoder(file)
    if decoder.total == 1 and (decoder.format == "image2" or decoder.format.endswith("_pipe")):
        with contextlib.suppress(ImageError, ImportError):
            return PictureDecoder(file)
    return decoder


def header_seconds(path: str | os.PathLike[str]) -> float | None:
    """How long a video is by its header, which may be wrong. None where it does not say, or
    without PyAV. Nothing is decoded. Raises VideoError for what is not a video."""
    file = checked_path(path)
    try:
        import av  # noqa: F401
    except ImportError:
        return None
    with reading(file), open_container(file) as container:
        stream = video_stream(container, file)
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return container.duration / 1e6 if container.duration else None
