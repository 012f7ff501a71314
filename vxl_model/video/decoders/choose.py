"""Decoders of video files: PyAV and torchcodec behind one small interface.

A decoder opens a file, counts its frames by reading every packet (headers lie, and some hold
no count), and decodes the frames it is asked for, upright, as RGB. Nothing else of the package
knows either library.
"""

from __future__ import annotations

import os

from .base import Decoder, VideoError, checked_path
from .pyav import PyAvDecoder
from .torchcodec import TorchcodecDecoder, _indexed, _torchcodec_loads


def open_decoder(path: str | os.PathLike[str], backend: str | None = None) -> Decoder:
    """Opens `path` with the named backend, or with torchcodec where it loads and serves, else
    PyAV. Raises VideoError."""
    if backend not in (None, "pyav", "torchcodec"):
        raise ValueError(f"backend: got {backend!r}, expected 'pyav', 'torchcodec' or None")
    file = checked_path(path)
    missing = {name: reason for name, reason in backends().items() if reason}
    if backend in missing:
        raise ValueError(f"backend: {backend} cannot serve: {missing[backend]}")
    if len(missing) == 2:
        raise VideoError(
            f"{path}: nothing to decode with; pip install 'vxl[video]' "
            f"({'; '.join(f'{k}: {v}' for k, v in missing.items())})"
        )
    if backend is None and "pyav" not in missing and not _indexed(file):
        backend = "pyav"
    if backend == "torchcodec" or (backend is None and "torchcodec" not in missing):
        try:
            return TorchcodecDecoder(file)
        except VideoError:
            # PyAV has the better word for what is wrong, and reads some files with damage.
            if backend == "torchcodec" or "pyav" in missing:
                raise
    return PyAvDecoder(file)


def header_seconds(path: str | os.PathLike[str]) -> float | None:
    """How long a video is by its header, which may lie; None where it does not say, or without
    PyAV. Nothing is decoded. Raises VideoError for what is no video."""
    file = checked_path(path)
    if backends()["pyav"]:
        return None
    probe = PyAvDecoder.__new__(PyAvDecoder)
    probe.path = file
    with probe._open() as container:
        stream = probe._video_stream(container)
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return container.duration / 1e6 if container.duration else None


_reasons: dict[str, str] = {}


def backends() -> dict[str, str]:
    """Why each backend cannot serve; an empty text where it can."""
    if not _reasons:
        reasons = {}  # whole before another thread sees it
        for name, module in (("torchcodec", "torchcodec.decoders"), ("pyav", "av")):
            try:
                __import__(module)
                if name == "torchcodec":
                    _torchcodec_loads()
                reasons[name] = ""
            except Exception as error:
                # torchcodec without FFmpeg's libraries raises OSError or RuntimeError over pages.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reasons[name] = lines[0]
        _reasons.update(reasons)
    return dict(_reasons)
