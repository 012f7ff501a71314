"""Videos and pictures that a request brings or names, as files on this machine.

A file is taken only if it begins as a container or a picture does. So playlists, which could name
other files and hosts, are never opened.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vxl_model.inputs.images import open_frames, open_image, picture_size

from .settings import RequestError, ServerSettings, refuse, told

__all__ = ["Source", "Sources"]

_HEAD = 400
_VIDEOS = (
    (4, b"ftyp"),  # MP4, MOV
    (4, b"moov"),
    (4, b"mdat"),
    (4, b"wide"),
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (8, b"AVI "),
    (0, b"FLV\x01"),
    (0, b"\x00\x00\x01\xba"),  # MPEG program and video streams
    (0, b"\x00\x00\x01\xb3"),
    (0, b"OggS"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # ASF
)
_PICTURES = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (8, b"WEBP"),
    (0, b"BM"),
    (8, b"avif"),
)
_PIECE = 2**20


@dataclass(frozen=True)
class Source:
    """A file with a video or a picture.

    Attributes:
        path: where it is. digest: SHA-256 of its content.
        kind: "video" or "image".
        name: to show to people.
        ours: it was written for this request and may be deleted.
    """

    path: Path
    digest: str
    kind: str
    name: str
    ours: bool = False

    def forget(self) -> None:
        """Deletes what was written for the request."""
        if self.ours:
            self.path.unlink(missing_ok=True)


class Sources:
    """Receives uploads and looks up what requests name, within a server's settings."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._folder = settings.store / "uploads"
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.iterdir():  # by a server that was killed
            left.unlink()

    async def receive(
        self, chunks: AsyncIterator[bytes], name: str, limit: int | None = None
    ) -> Source:
        """Writes an upload to a file.

        Raises:
            RequestError: 413 beyond the limit, 400 for what is neither a video nor a picture.
        """
        limit = self._settings.upload_bytes if limit is None else limit
        path = self._folder / secrets.token_hex(16)
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("xb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        raise refuse("file", f"more than {limit} bytes", "a smaller file", 413)
                    digest.update(chunk)
                    file.write(chunk)
            return Source(path, digest.hexdigest(), _kind(path, name), name, ours=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def named(self, url: str, param: str) -> Source:
        """What a URL names: `data:`, a file in an allowed folder, or http(s) of an allowed host.

        Raises:
            RequestError: it is not allowed, or there is nothing.
        """
        if url.startswith("data:"):
            return await self.receive(_data(url, param), f"{param} of a request")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise refuse(param, repr(url[:100]), "a URL") from None
        if parts.scheme in ("http", "https"):
            return await self._fetched(url, parts, param)
        if parts.scheme not in ("", "file") or parts.netloc:
            raise refuse(param, repr(url[:100]), "data:, memory:, a file, http: or https:")
        name = unquote(parts.path) if parts.scheme else url
        return await asyncio.to_thread(self._file, name, param)

    def _file(self, name: str, param: str) -> Source:
        if not self._settings.folders:
            raise refuse(param, "a file's name", "an upload: this server opens no folder", 403)
        if "\0" in name or len(name) > 4096:
            raise refuse(param, "a name with a zero byte or too long", "a file's name")
        for folder in self._settings.folders:
            root = os.path.realpath(folder)
            path = os.path.realpath(os.path.join(root, name))
            if path.startswith(os.path.join(root, "")) and os.path.isfile(path):
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
                kind = _kind(Path(path), name)
                return Source(Path(path), digest.hexdigest(), kind, os.path.basename(name))
        # The same words for what is missing and for what may not be seen.
        raise refuse(param, repr(name[:200]), "a file in an allowed folder", 404)

    async def _fetched(self, url: str, parts: Any, param: str) -> Source:
        import httpx

        try:
            names = {parts.hostname, f"{parts.hostname}:{parts.port}"}
        except ValueError:
            raise refuse(param, repr(url[:100]), "a URL") from None
        if parts.username is not None or not names & set(self._settings.hosts):
            raise refuse(param, f"host {parts.hostname!r}", "an upload or an allowed host", 403)
        try:
            # A redirect could lead to another host, so none is followed.
            async with (
                httpx.AsyncClient(timeout=30, follow_redirects=False, trust_env=False) as client,
                client.stream("GET", url) as response,
            ):
                if response.status_code != 200:
                    raise refuse(param, f"status {response.status_code}", "a file at this URL")
                return await self.receive(response.aiter_bytes(_PIECE), Path(parts.path).name)
        except httpx.HTTPError as error:
            raise RequestError(400, f"{param}: {type(error).__name__}: {error}", param) from None

    def open(self, sources: list[Source], options: dict[str, Any], processor: Any) -> tuple:
        """Arguments of `watch` for one video or for pictures, and their number of frames.

        Raises:
            RequestError: damaged, or larger than the settings allow.
        """
        most = self._settings.most_pixels
        with _refusals():
            if sources[0].kind == "video":
                frames, fps = options.get("frames"), options.get("fps")
                if fps is not None:  # then it is a bound
                    frames = min(frames or self._settings.most_frames, self._settings.most_frames)
                reader, total = open_frames(str(sources[0].path), processor.size, frames, fps)
                assert total is not None
                shape = reader.height, reader.width  # type: ignore[attr-defined]
                if shape[0] * shape[1] > most:
                    raise refuse("video", f"frames of {shape[1]} x {shape[0]}", f"{most} pixels")
                if total > self._settings.most_frames:
                    at_most = f"at most {self._settings.most_frames}"
                    raise refuse("frames", total, at_most)
                return {"video": reader}, total
            for source in sources:
                width, height = picture_size(source.path)
                if width * height > most:
                    raise refuse("image", f"{width} x {height}", f"at most {most} pixels")
            if len(sources) > 1:
                pixels = processor.images_to_pixels([source.path for source in sources])
                return {"pixel_values": pixels}, len(pixels)
            picture = open_image(str(sources[0].path))
            pixels = processor.image_to_pixels(picture)
            return {"pixel_values": pixels, "image_sizes": picture.size}, len(pixels)


@contextmanager
def _refusals() -> Iterator[None]:
    """Errors about a file, without the name that it has on this machine."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise RequestError(400, f"file: {told(error)}", "file") from None


def _kind(path: Path, name: str) -> str:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for kind, marks in (("video", _VIDEOS), ("image", _PICTURES)):
        if any(head[at : at + len(mark)] == mark for at, mark in marks):
            return kind
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:  # MPEG transport stream
        return "video"
    raise refuse("file", repr(name[:100]), "a video (MP4, Matroska, AVI, ...) or a picture", 415)


async def _data(url: str, param: str) -> AsyncIterator[bytes]:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise refuse(param, "a data: URL", "data:<type>;base64,<content>")
    try:
        yield base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise refuse(param, "a data: URL", "base64 in it") from None
