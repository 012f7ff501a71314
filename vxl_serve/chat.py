"""Chat requests in OpenAI's form: what may be in them, their prompt, and the form of answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .questions import Event
from .sampling import Sampling
from .settings import RequestError, ServerSettings, refuse

__all__ = [
    "AskRequest",
    "ChatRequest",
    "Prompt",
    "Replies",
    "WatchRequest",
    "question_ids",
    "render",
    "sampling_of",
]

_MOST_BIASES = 1024  # each is added before every token


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Url(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _Url


class _Video(_Strict):
    type: Literal["video_url"]
    video_url: _Url


_Part = Annotated[_Text | _Image | _Video, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None
    refusal: None = None


class _ResponseFormat(_Strict):
    type: Literal["text"]


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Watching(_Strict):
    """How a video is watched."""

    frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0, le=240)
    ratio: int | None = Field(None, ge=1)

    def options(self) -> dict[str, Any]:
        return {"frames": self.frames, "fps": self.fps, "ratio": self.ratio}


class _Sampling(_Strict):
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = None
    response_format: _ResponseFormat | None = None


class ChatRequest(_Watching, _Sampling):
    """A request to `/v1/chat/completions`. `frames`, `fps` and `ratio` are not OpenAI's."""

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=1000)


class AskRequest(_Sampling):
    """A question about one memory."""

    question: str


class WatchRequest(_Watching):
    """A video to watch that a URL names."""

    url: str
    name: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation, cut at its visual part. Without one `prefix` is empty.

    Attributes:
        prefix, suffix: ids before and after it.
        kind: "video" or "image"; "" without a visual part.
        urls: of the video or the pictures.
    """

    prefix: list[int]
    suffix: list[int]
    kind: str = ""
    urls: tuple[str, ...] = ()


def render(messages: Sequence[_Message], processor: Any, settings: ServerSettings) -> Prompt:
    """The prompt of a conversation by the model's chat template.

    Raises:
        RequestError: messages that the model has no prompt for.
    """
    _check_length(messages, settings)
    tokens = {"image": processor.image_token, "video": processor.video_token}
    forbidden = processor.control_tokens() | set(tokens.values())
    turns, urls = [], list[tuple[str, str]]()
    for i, message in enumerate(messages):
        param, content = f"messages[{i}]", list[dict[str, str]]()
        role = "system" if message.role == "developer" else message.role
        if role == "system" and i:
            raise refuse(f"{param}.role", message.role, "one system message, the first")
        parts = message.content
        for part in [_Text(type="text", text=parts)] if isinstance(parts, str) else parts:
            if isinstance(part, _Text):
                _check_text(part.text, f"{param}.content", forbidden)
                content.append({"type": "text", "text": part.text})
            else:
                kind, url = _visual(part)
                if role != "user":
                    raise refuse(f"{param}.content", f"{kind}_url", "it in a user's message")
                urls.append((kind, url))
                content.append({"type": kind})
        if not content or (role == "user" and not any(x.get("text", "").strip() for x in content)):
            raise refuse(f"{param}.content", "no text", "text")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "user":
        raise refuse("messages", f"a last message of role {turns[-1]['role']}", "one of a user")
    kinds = {kind for kind, _ in urls}
    if len(kinds) > 1 or (kinds == {"video"} and len(urls) > 1):
        raise refuse("messages", f"{len(urls)} videos and images", "one video, or images")
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not kinds:
        return Prompt([], _ids(processor, text))
    kind = kinds.pop()
    mark = tokens[kind] * len(urls)
    before, found, after = text.partition(mark)
    if not found:
        raise refuse("messages", "images in several messages", "all of them in one")
    named = tuple(url for _, url in urls)
    return Prompt(_ids(processor, before), _ids(processor, after), kind, named)


def question_ids(question: str, processor: Any, settings: ServerSettings) -> list[int]:
    """Ids of a question after a video.

    Raises:
        RequestError: it is too long, or has tokens that are not text.
    """
    if len(question) > settings.most_text:
        most = f"at most {settings.most_text} characters"
        raise refuse("question", len(question), most, 413)
    try:
        return processor.suffix_ids(question)[0].tolist()
    except ValueError as error:
        raise RequestError(400, f"question: {str(error)[:300]}", "question") from None


def _check_length(messages: Sequence[_Message], settings: ServerSettings) -> None:
    """Before anything is done with the text."""
    length = 0
    for message in messages:
        parts = message.content
        texts = [parts] if isinstance(parts, str) else [p.text for p in parts if p.type == "text"]
        length += sum(map(len, texts))
    if length > settings.most_text:
        raise refuse("messages", f"{length} characters", f"at most {settings.most_text}", 413)


def _visual(part: _Image | _Video) -> tuple[str, str]:
    if isinstance(part, _Video):
        return "video", part.video_url.url
    return "image", part.image_url.url


def _ids(processor: Any, text: str) -> list[int]:
    return processor.text_ids(text)[0].tolist()


def _check_text(text: str, param: str, forbidden: set[str]) -> None:
    for token in forbidden:
        if token in text:
            raise refuse(param, f"the control token {token!r}", "plain text")


def sampling_of(asked: _Sampling, model: Any, settings: ServerSettings) -> Sampling:
    """Sampling parameters of a request. What it leaves out is as the checkpoint's
    `generation_config` says, greedy where that says nothing.

    Raises:
        RequestError: a value that is out of range.
    """
    tokens = asked.max_completion_tokens or asked.max_tokens or min(256, settings.most_tokens)
    if tokens > settings.most_tokens:
        name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
        raise refuse(name, tokens, f"at most {settings.most_tokens}")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stop) > 4 or not all(0 < len(text) <= 200 for text in stop):
        raise refuse("stop", f"{len(stop)} texts", "at most 4, of 1 to 200 characters")
    if len(asked.logit_bias or {}) > _MOST_BIASES:
        raise refuse("logit_bias", f"{len(asked.logit_bias or {})} ids", f"at most {_MOST_BIASES}")
    vocabulary, bias = model.config.vocab_size, {}
    for token, value in (asked.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > 9 or int(token) >= vocabulary:
            raise refuse("logit_bias", f"id {token[:20]!r}", f"0 to {vocabulary - 1}")
        if not -100 <= value <= 100:
            raise refuse("logit_bias", value, "-100 to 100")
        bias[int(token)] = value
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refuse("top_logprobs", asked.top_logprobs, "logprobs: true")
    config = model.generation_config
    default = config.temperature if config.do_sample else 0.0
    return Sampling(
        max_tokens=tokens,
        temperature=_or(asked.temperature, _or(default, 1.0)),
        top_p=_or(asked.top_p, _or(config.top_p if config.do_sample else None, 1.0)),
        n=asked.n or 1,
        seed=asked.seed,
        stop=tuple(stop),
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logit_bias=bias,
        top_logprobs=min(asked.top_logprobs or 0, vocabulary) if asked.logprobs else None,
        stop_ids=tuple(model.processor.stop_ids),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class Replies:
    """Answers to one request in OpenAI's form.

    Args:
        cached: tokens of the memory. asked: tokens of text.
    """

    def __init__(self, id: str, model: str, processor: Any, n: int, cached: int, asked: int):
        self._about = {"id": id, "created": int(time.time()), "model": model}
        self._processor, self._cached, self._asked = processor, cached, asked
        self._texts, self._finish = [""] * n, ["length"] * n
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._tokens = 0

    def first(self) -> list[dict[str, Any]]:
        """Chunks that begin the answers."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, delta, None, None) for i in range(len(self._texts))]

    def add(self, event: Event) -> dict[str, Any]:
        """The chunk of an event, which is counted for `whole` and `usage` too."""
        self._tokens += event.count
        self._texts[event.index] += event.text
        told = self._told(event)
        self._logprobs[event.index] += told or []
        if event.finish:
            self._finish[event.index] = event.finish
        delta = {"content": event.text} if event.text else {}
        return self._chunk(event.index, delta, event.finish, told)

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "finish_reason": self._finish[i],
                "logprobs": {"content": self._logprobs[i]} if self._logprobs[i] else None,
            }
            for i, text in enumerate(self._texts)
        ]
        return {
            **self._about,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage(),
        }

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {
            **self._about,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        prompt = self._cached + self._asked
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def _chunk(self, index: int, delta: dict, finish: str | None, told: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        choice["logprobs"] = {"content": told} if told else None
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def _told(self, event: Event) -> list[dict[str, Any]] | None:
        chosen = event.chosen
        if chosen.logprob is None:
            return None
        top = [self._token(token, value) for token, value in chosen.top]
        return [{**self._token(chosen.token, chosen.logprob), "top_logprobs": top}]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._processor.tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
