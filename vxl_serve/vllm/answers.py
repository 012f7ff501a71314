"""Answers by a vLLM server, which reads the saved memory through the KV connector."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from ..questions import Event
from ..sampling import Chosen, Sampling
from ..settings import RequestError, refuse
from .prefix import Prefix

__all__ = ["VllmAnswers"]

_SAME = ("max_tokens", "temperature", "top_p", "n", "frequency_penalty", "presence_penalty")


class VllmAnswers:
    """Asks a vLLM server that was started with the connector.

    Args:
        url: of the server, without a path.
        model: its name there; None takes the first one that it lists.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(30, read=None))
        self._model = model

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self, path: Path | None, ids: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[Event]:
        """Events of the answers to ids after the memory at `path`; None for text alone.

        Raises:
            RequestError: vLLM refuses the request or cannot be reached.
        """
        if sampling.top_logprobs is not None:
            raise refuse("logprobs", True, "false: the vLLM engine does not pass them on")
        try:
            if self._model is None:
                listed = await self._client.get("/v1/models")
                self._model = listed.raise_for_status().json()["data"][0]["id"]
            body = {"model": self._model, "stream": True, **self._options(sampling)}
            body |= {"prompt": list(ids)} if path is None else Prefix.read(path).completion(ids)
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")[:500]
                    raise RequestError(502, f"vLLM: status {response.status_code}: {text}")
                async for event in self._events(response):
                    yield event
        except (httpx.HTTPError, ValueError, OSError, LookupError) as error:
            raise RequestError(502, f"vLLM: {type(error).__name__}: {error}") from None

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        options = {name: getattr(sampling, name) for name in _SAME}
        options |= {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_ids)}
        if sampling.seed is not None:
            options["seed"] = sampling.seed
        if sampling.logit_bias:
            options["logit_bias"] = {str(k): v for k, v in sampling.logit_bias.items()}
        return {
            **options,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    async def _events(self, response: httpx.Response) -> AsyncIterator[Event]:
        told = 0
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RequestError(502, f"vLLM: {chunk['error']}")
            total = (chunk.get("usage") or {}).get("completion_tokens", told)
            for choice in chunk["choices"]:
                finish = choice.get("finish_reason")
                if finish not in (None, "stop", "length"):
                    raise RequestError(502, f"vLLM: it ended the answer with {finish!r}")
                text = choice.get("text") or ""
                yield Event(choice["index"], Chosen(-1), text, finish, total - told)
                told = total
