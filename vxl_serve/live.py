"""Frames by WebSocket into a memory that can be asked meanwhile.

A client sends pictures (JPEG, PNG, WebP) as binary messages, one a frame, and `{"question": ...}`
as text. It gets `{"memory": id}` first, `{"frames": n}` for each frame that the memory holds, and
`{"answer": text, "done": bool}` for each piece of an answer. Anyone with the same key can ask
`memory:<id>` at the same time. The memory is saved when the connection ends.
"""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from vxl_model.inputs.images import open_image
from vxl_model.video.resize import resize_crop

from .chat import AskRequest, question_ids, sampling_of
from .memories import Entry
from .settings import RequestError, refuse, told

log = logging.getLogger(__name__)

__all__ = ["live"]

_MOST_BYTES = 16 * 2**20  # of a message


async def live(socket: WebSocket, server: Any, same_origin: bool) -> None:
    """One connection."""
    await socket.accept()
    try:
        if not same_origin:
            raise RequestError(403, "origin: another site's page")
        # A browser cannot set a header, so the key may be a parameter.
        key = socket.headers.get("authorization") or socket.query_params.get("key")
        owner = server.owner(key)
        ratio = socket.query_params.get("ratio")
        if ratio is not None and not (ratio.isdecimal() and len(ratio) < 10 and int(ratio) > 0):
            raise refuse("ratio", repr(ratio[:20]), "an integer >= 1")
        window = server.memories.model.config.beacon_window
        if ratio is not None and int(ratio) > window:
            raise refuse("ratio", ratio, f"at most the window of {window} tokens")
        options = {"frames": None, "fps": None, "ratio": ratio and int(ratio)}
        entry = server.memories.live(owner, "live", options, server.prefix)
    except RequestError as error:
        await socket.send_json({"error": error.message})
        await socket.close(1008)
        return
    connection = _Connection(socket, server, entry, owner)
    try:
        await connection.run()
    finally:
        await connection.end()


class _Connection:
    def __init__(self, socket: WebSocket, server: Any, entry: Entry, owner: str) -> None:
        self._socket, self._server, self._entry, self._owner = socket, server, entry, owner
        self._memories = server.memories
        self._asking: asyncio.Task | None = None

    async def run(self) -> None:
        try:
            await self._in_engine(self._begin)
            await self._socket.send_json({"memory": self._entry.id})
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    if (data := message.get("bytes")) is not None:
                        await self._frame(data)
                    else:
                        await self._question(message.get("text") or "")
                except RequestError as error:
                    await self._socket.send_json({"error": error.message})
        except RequestError as error:  # it could not begin
            await self._socket.send_json({"error": error.message})
            await self._socket.close(1011)
        except (WebSocketDisconnect, RuntimeError):
            return  # it hung up

    async def end(self) -> None:
        """Keeps what came, if anything did."""
        if self._asking is not None:
            self._asking.cancel()
        entry, memories = self._entry, self._memories

        def keep() -> None:
            if entry.memory is None or not entry.done or entry.deleted:
                memories.delete(entry)
            else:
                entry.total = entry.done
                memories.keep(entry, entry.memory)

        try:
            await self._in_engine(keep)
        except Exception as error:  # a live memory that stayed would hold its pages
            log.error("a live memory was not kept: %s", told(error))
            memories.delete(entry)

    async def _in_engine(self, work: Any) -> Any:
        try:
            return await asyncio.shield(asyncio.wrap_future(self._memories.engine.call(work)))
        except (ValueError, MemoryError) as error:
            raise RequestError(400, told(error)) from None

    def _begin(self) -> None:
        entry, model = self._entry, self._memories.model
        self._memories.engine.fits(self._memories.engine.pages(len(entry.prefix)))
        entry.memory = model.watch(
            visual_features=[], input_ids=entry.prefix, ratio=entry.options["ratio"]
        )
        entry.tokens = entry.memory.cached_tokens[0]

    async def _frame(self, data: bytes) -> None:
        settings, entry = self._memories.settings, self._entry
        if len(data) > _MOST_BYTES:
            raise refuse("frame", f"{len(data)} bytes", f"at most {_MOST_BYTES}", 413)
        if entry.done >= settings.most_frames:
            raise refuse("frame", f"frame {entry.done + 1}", f"at most {settings.most_frames}")
        size = self._memories.model.processor.size
        frame = await asyncio.to_thread(_decoded, data, size, settings.most_pixels)

        def append() -> None:
            if entry.deleted or entry.memory is None:
                raise RequestError(404, "memory: it was deleted", "memory")
            window = self._memories.model.config.beacon_window
            if not self._memories.engine.fits(2 * self._memories.engine.pages(window)):
                raise refuse("frame", "a full cache", "room for its tokens", 413)
            entry.memory.append(frame)
            entry.done += 1
            entry.tokens = entry.memory.cached_tokens[0]

        await self._in_engine(append)
        await self._socket.send_json({"frames": entry.done})

    async def _question(self, text: str) -> None:
        try:
            asked = AskRequest.model_validate_json(text[:_MOST_BYTES])
        except ValidationError as error:
            raise RequestError(400, f"question: {error.errors()[0]['msg']}") from None
        if self._asking is not None and not self._asking.done():
            raise RequestError(429, "question: the one before is not answered yet")
        if not self._entry.done:
            raise RequestError(400, "question: got one before the first frame")
        settings, processor = self._memories.settings, self._server.processor
        ids = await asyncio.to_thread(question_ids, asked.question, processor, settings)
        sampling = sampling_of(asked, self._memories.model, settings)
        self._asking = asyncio.create_task(self._answer(ids, sampling))

    async def _answer(self, ids: list[int], sampling: Any) -> None:
        """Beside the frames, which go on."""
        try:
            events = self._server.events(self._entry, ids, sampling, self._owner)
            async for event in events:
                done = event.finish is not None
                await self._socket.send_json({"answer": event.text, "done": done})
        except RequestError as error:
            await self._socket.send_json({"error": error.message})
        except (WebSocketDisconnect, RuntimeError):
            return
        except Exception as error:
            await self._socket.send_json({"error": told(error)})


def _decoded(data: bytes, size: int, most_pixels: int) -> np.ndarray:
    """uint8 `(1, size, size, 3)`, from a picture in a file's form."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
            if picture.width * picture.height > most_pixels:
                got = f"{picture.width} x {picture.height}"
                raise refuse("frame", got, f"at most {most_pixels} pixels")
            return resize_crop(np.asarray(open_image(picture)), size)[None]
    except RequestError:
        raise
    except Exception as error:  # Pillow raises errors of any kind
        raise RequestError(
            400, f"frame: not a JPEG, PNG or WebP ({type(error).__name__})"
        ) from None
