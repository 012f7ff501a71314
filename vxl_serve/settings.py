"""What a server allows, and the errors that it answers with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RequestError", "ServerSettings", "refuse", "told"]

_MIB = 2**20


class RequestError(Exception):
    """A request that is refused: an HTTP status, a message that says why, and the field."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def refuse(param: str, got: object, expected: object, status: int = 400) -> RequestError:
    """The error of a field, in the words of every error about an argument."""
    return RequestError(status, f"{param}: got {got}, expected {expected}", param)


def told(error: BaseException) -> str:
    """What an error says, in one line and without names of folders on this machine."""
    return " ".join(re.sub(r"/\S*/", "", str(error)).split()) or type(error).__name__


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Attributes:
        store: folder of memories and uploads. It belongs to one server, which deletes what is
            not whole in it. So it has to be new, empty, or of an earlier server.
        name: of the model, for clients.
        keys: API keys. A memory belongs to the key that it was made with. Without keys everybody
            may do everything.
        folders: a request may name files in these. None by default.
        hosts: a request may name URLs of these, as `host` or `host:port`. None by default.
        upload_bytes: of a video or a picture. body_bytes: of a request in JSON.
        disk_bytes: of all saved memories.
        most_frames: of a video that is watched. most_pixels: of a frame or a picture.
        most_tokens: the longest answer. most_text: characters of a conversation.
        most_watching: videos that wait to be watched.
    """

    store: Path
    name: str = "video-xl"
    keys: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()
    upload_bytes: int = 2048 * _MIB
    body_bytes: int = 64 * _MIB
    disk_bytes: int = 64 * 1024 * _MIB
    most_frames: int = 4096
    most_pixels: int = 8192 * 4320
    most_tokens: int = 4096
    most_text: int = 100_000
    most_watching: int = 16

    def __post_init__(self) -> None:
        if self.store.exists() and not self.store.is_dir():
            raise ValueError(f"store: got {self.store}, expected a folder")
        if self.store.is_dir() and not (self.store / ".lock").exists():  # a server makes it
            other = next(self.store.iterdir(), None)
            if other is not None:
                raise ValueError(
                    f"store: got {self.store}, which holds {other.name!r} and no server's "
                    "memories, expected a new or an empty folder"
                )
