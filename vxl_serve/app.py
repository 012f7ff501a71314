"""The HTTP server: OpenAI's chat completions about videos, and the videos' memories."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from .chat import (
    AskRequest,
    ChatRequest,
    Replies,
    WatchRequest,
    question_ids,
    render,
    sampling_of,
)
from .live import live
from .memories import Entry, Memories
from .metrics import Metrics
from .questions import Event, FullError, Question, TooLargeError
from .sampling import Sampling
from .settings import RequestError, refuse
from .sources import Source

__all__ = ["make_app"]

Model = TypeVar("Model", bound=BaseModel)
_PAGE = Path(__file__).with_name("page.html")
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_FORM_BYTES = 2**16  # of a form beside its file


class Server:
    """Requests in, answers out.

    Args:
        memories: the store and its engine.
        vllm: answers instead of the engine (`vxl_serve.vllm.answers.VllmAnswers`); None.
    """

    def __init__(self, memories: Memories, vllm: Any = None) -> None:
        self.memories, self.vllm, self.settings = memories, vllm, memories.settings
        self.processor = memories.model.processor
        self.prefix: list[int] = self.processor.prefix_ids()[0].tolist()
        self._owners = {key: hashlib.sha256(key.encode()).hexdigest() for key in self.settings.keys}

    # -- who and what --------------------------------------------------------------------

    def owner(self, authorization: str | None) -> str:
        """Whose memories a request may see, by its API key."""
        if not self._owners:
            return ""
        given = (authorization or "").removeprefix("Bearer ").encode()
        found = [o for key, o in self._owners.items() if hmac.compare_digest(key.encode(), given)]
        if not found:
            raise RequestError(401, "authorization: got no valid key, expected Bearer and a key")
        return found[0]

    def owner_of(self, request: Request) -> str:
        return self.owner(request.headers.get("authorization"))

    def options(self, watching: Any) -> dict[str, Any]:
        """How to watch, checked before anything is received."""
        options = watching.options()
        if options["frames"] and options["frames"] > self.settings.most_frames:
            raise refuse("frames", options["frames"], f"at most {self.settings.most_frames}")
        if options["ratio"] and options["ratio"] > self.memories.model.config.beacon_window:
            most = self.memories.model.config.beacon_window
            raise refuse("ratio", options["ratio"], f"at most the window of {most} tokens")
        return options

    async def entry_of(
        self, owner: str, urls: tuple[str, ...], kind: str, options: dict, prefix: list[int]
    ) -> Entry:
        """The memory that a request names, or that of the video that it brings."""
        param = f"{kind}_url"
        if any(url.startswith("memory:") for url in urls):
            if len(urls) > 1:
                raise refuse(param, f"a memory among {len(urls)} pictures", "it alone")
            entry = self.memories.get(urls[0].removeprefix("memory:"), owner)
            if entry.prefix != prefix:
                got = "another beginning than the memory was watched with"
                raise refuse("messages", got, "the video in the first message, no system message")
            given = {name: value for name, value in options.items() if value is not None}
            if any(entry.options.get(name) != value for name, value in given.items()):
                raise refuse(next(iter(given)), next(iter(given.values())), "none with a memory")
            return entry
        sources = list[Source]()
        try:
            for url in urls:
                sources.append(await self.memories.sources.named(url, param))
                if sources[-1].kind != kind:
                    raise refuse(param, f"{sources[-1].kind} data", f"{kind} data")
            if kind == "image" and (options["frames"] or options["fps"]):
                raise refuse("frames", "a picture", "a video")
        except BaseException:
            for source in sources:
                source.forget()
            raise
        return await self.memories.watch(owner, sources, options, prefix)

    # -- answers -------------------------------------------------------------------------

    async def events(
        self, entry: Entry | None, ids: list[int], sampling: Sampling, owner: str
    ) -> AsyncGenerator[Event, None]:
        """Tokens of the answers. Closing the iterator cancels the question."""
        memories = self.memories
        if entry is not None:
            await memories.ready(entry)
        if self.vllm is not None:
            if entry is not None and entry.status == "live":
                raise RequestError(400, "memory: a live memory is not asked through vLLM", "memory")
            path = None if entry is None else memories.path(entry)
            async for event in self.vllm.ask(path, ids, sampling):
                yield event
            return
        memory = None if entry is None else (lambda: memories.resident(entry))
        answer = memories.engine.ask(Question(ids, sampling, memory, owner))
        try:
            async for event in answer:
                yield event
        finally:
            answer.cancel()

    async def reply(
        self, request: Request, asked: Any, entry: Entry | None, ids: list[int], owner: str
    ) -> Response:
        """The answer to a question, whole or as server-sent events."""
        sampling = sampling_of(asked, self.memories.model, self.settings)
        if asked.stream_options is not None and not asked.stream:
            raise refuse("stream_options", "options without stream", "stream: true")
        events = self.events(entry, ids, sampling, owner)
        # The first token is waited for, so that what is refused gets its status.
        first = await _unless_gone(request, anext(events))
        if first is None:
            await events.aclose()
            return Response(status_code=499)
        cached = 0 if entry is None else entry.tokens
        id = f"chatcmpl-{secrets.token_hex(12)}"
        replies = Replies(id, self.settings.name, self.processor, sampling.n, cached, len(ids))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _sse(_chunks(events, first, replies, usage))
        replies.add(first)

        async def rest() -> bool:
            async for event in events:
                replies.add(event)
            return True

        if await _unless_gone(request, rest()) is None:
            await events.aclose()
            return Response(status_code=499)
        return JSONResponse(replies.whole())


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result, or None if the client hangs up before."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)

    task, watcher = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for one in (task, watcher):
            if not one.done():
                one.cancel()
                with suppress(BaseException):
                    await one


async def _chunks(
    events: AsyncGenerator[Event, None], first: Event, replies: Replies, usage: bool
) -> AsyncGenerator[Any, None]:
    try:
        for chunk in replies.first():
            yield chunk
        yield replies.add(first)
        async for event in events:
            yield replies.add(event)
        if usage:
            yield replies.last()
        yield "[DONE]"
    finally:
        await events.aclose()


def _sse(items: AsyncGenerator[Any, None]) -> StreamingResponse:
    """Items as server-sent events. An error is the last of them."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for item in items:
                yield f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(_error(_as_refusal(error)))}\n\n"
        finally:
            await items.aclose()

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _body(request: Request, model: type[Model], limit: int) -> Model:
    """A request's JSON. RequestError where it is too large, no JSON, or does not fit."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise refuse("body", f"more than {limit} bytes", "a smaller request", 413)
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _field_error(error) from None


def _field_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(map(str, first["loc"])) or "body"
    return RequestError(400, f"{param[:200]}: {first['msg'][:300]}", param[:200])


def _as_refusal(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, FullError):
        return RequestError(429, f"the server is full: {error}")
    if isinstance(error, TooLargeError):
        return RequestError(413, str(error))
    return RequestError(500, f"{type(error).__name__} while answering")


def _error(refusal: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    code = _CODES.get(refusal.status)
    about = {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}
    return {"error": about}


def _refused(request: Request, error: Exception) -> JSONResponse:
    refusal = _as_refusal(error)
    headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
    return JSONResponse(_error(refusal), refusal.status, headers=headers)


class _Guard:
    """Refuses other sites' pages and counts requests. Plain ASGI, so that a request sees that its
    client has hung up."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        if same_origin(Request(scope).headers):
            return await self._app(scope, receive, counted)
        refused = _refused(Request(scope), RequestError(403, "origin: another site's page"))
        return await refused(scope, receive, counted)


def make_app(memories: Memories, vllm: Any = None) -> FastAPI:
    """The server as an ASGI application, which closes the engine when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if vllm is not None:
            await vllm.close()
        await asyncio.to_thread(memories.close)

    app = FastAPI(title="vxl", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.memories = memories
    server, metrics = Server(memories, vllm), Metrics(memories)
    for kind in (RequestError, FullError, TooLargeError, Exception):
        app.add_exception_handler(kind, _refused)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        return _refused(request, RequestError(error.status_code, f"path: {error.detail}"))

    app.add_middleware(_Guard, metrics=metrics)
    _add_answers(app, server)
    _add_memories(app, server)
    _add_others(app, server, metrics)
    return app


def same_origin(headers: Any) -> bool:
    """Whether a request comes from no page, or from this server's own: other sites' pages may not
    use a server that happens to run on the visitor's machine."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def _add_answers(app: FastAPI, server: Server) -> None:
    """OpenAI's routes, and questions about a memory."""
    memories, settings = server.memories, server.settings

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        owner = server.owner_of(request)
        asked = await _body(request, ChatRequest, settings.body_bytes)
        if asked.model != settings.name:
            raise RequestError(
                404, f"model: got {asked.model[:80]!r}, expected {settings.name!r}", "model"
            )
        options = server.options(asked)
        prompt = await asyncio.to_thread(render, asked.messages, server.processor, settings)
        sampling_of(asked, memories.model, settings)  # refused before a video is watched
        entry = None
        if prompt.urls:
            entry = await server.entry_of(owner, prompt.urls, prompt.kind, options, prompt.prefix)
        return await server.reply(request, asked, entry, prompt.suffix, owner)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.owner_of(request)
        about = {"id": settings.name, "object": "model", "created": 0, "owned_by": "vxl"}
        return {"object": "list", "data": [about]}

    @app.post("/v1/memories/{id}/ask")
    async def ask(request: Request, id: str) -> Response:
        owner = server.owner_of(request)
        entry = memories.get(id, owner)
        asked = await _body(request, AskRequest, settings.body_bytes)
        ids = await asyncio.to_thread(question_ids, asked.question, server.processor, settings)
        return await server.reply(request, asked, entry, ids, owner)


def _add_memories(app: FastAPI, server: Server) -> None:
    """Videos: watched, listed, forgotten, live."""
    memories, settings = server.memories, server.settings

    @app.post("/v1/memories")
    async def watch(request: Request) -> Response:
        owner = server.owner_of(request)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            entry = await _upload(request, server, owner)
        else:
            asked = await _body(request, WatchRequest, settings.body_bytes)
            options = server.options(asked)
            source = await memories.sources.named(asked.url, "url")
            source = replace(source, name=(asked.name or source.name)[:200])
            entry = await memories.watch(owner, [source], options, server.prefix)
        return JSONResponse(entry.about(), 200 if entry.status == "ready" else 202)

    @app.get("/v1/memories")
    async def listed(request: Request) -> dict[str, Any]:
        data = [entry.about() for entry in memories.of(server.owner_of(request))]
        return {"object": "list", "data": data}

    @app.get("/v1/memories/{id}")
    async def told(request: Request, id: str) -> dict[str, Any]:
        return memories.get(id, server.owner_of(request)).about()

    @app.get("/v1/memories/{id}/events")
    async def progress(request: Request, id: str) -> Response:
        return _sse(_progress(memories.get(id, server.owner_of(request))))

    @app.delete("/v1/memories/{id}")
    async def delete(request: Request, id: str) -> dict[str, Any]:
        memories.delete(memories.get(id, server.owner_of(request)))
        return {"id": id, "object": "memory", "deleted": True}

    @app.websocket("/v1/live")
    async def frames(socket: WebSocket) -> None:
        await live(socket, server, same_origin(socket.headers))


def _add_others(app: FastAPI, server: Server, metrics: Metrics) -> None:
    """What needs no key: the page, and what watches over the server."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        await asyncio.wrap_future(server.memories.engine.call(lambda: None))
        return {"status": "ok"}

    @app.get("/metrics")
    async def counts() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "connect-src 'self' ws: wss:; img-src 'self' data: blob:; media-src blob:"
        return FileResponse(_PAGE, headers={"Content-Security-Policy": policy})


async def _upload(request: Request, server: Server, owner: str) -> Entry:
    """A form with `file` and perhaps `name`, `frames`, `fps` and `ratio`."""
    settings = server.settings
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise refuse("content-length", "none", "the length of an upload", 411)
    if int(length) > settings.upload_bytes + _FORM_BYTES:
        most = f"at most {settings.upload_bytes} bytes"
        raise refuse("file", f"{length[:30]} bytes", most, 413)
    try:
        received = await request.form(max_files=1, max_fields=8, max_part_size=_FORM_BYTES)
    except HTTPException as error:
        raise RequestError(400, f"form: {error.detail}", "form") from None
    try:
        fields = dict(received)
        file = fields.pop("file", None)
        if file is None or isinstance(file, str):
            raise refuse("file", "none", "a file in the form")
        try:
            asked = WatchRequest.model_validate_strings({"url": "", **fields})
        except ValidationError as error:
            raise _field_error(error) from None
        options = server.options(asked)

        async def chunks() -> AsyncIterator[bytes]:
            while piece := await file.read(2**20):
                yield piece

        name = (asked.name or file.filename or "video")[:200]
        source = await server.memories.sources.receive(chunks(), name)
    finally:
        await received.close()
    if source.kind == "image" and (options["frames"] or options["fps"]):
        source.forget()
        raise refuse("frames", "a picture", "a video")
    return await server.memories.watch(owner, [source], options, server.prefix)


async def _progress(entry: Entry) -> AsyncGenerator[dict[str, Any], None]:
    """The state of a memory whenever it changes, until it is ready or failed."""
    last = None
    while True:
        about = entry.about()
        if about != last:
            yield about
        last = about
        if entry.deleted or entry.status in ("ready", "failed"):
            return
        await asyncio.sleep(0.2)
