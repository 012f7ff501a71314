"""Captions by an OpenAI-compatible server: vLLM, `vxl serve`, or another."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from .settings import PROMPT

__all__ = ["ServerCaptioner"]

_KEY = "OPENAI_API_KEY"


class ServerCaptioner:
    """Asks `/chat/completions` of a server with the pictures as JPEGs, greedily.

    A key comes from the variable OPENAI_API_KEY. A server that is full (429), not ready (503) or
    out of reach is asked again for a minute.

    Args:
        server: `URL#MODEL`, for instance "http://localhost:8000/v1#Qwen2-VL-7B".
        prompt: the question about the pictures.
        max_new_tokens: the longest caption.

    Raises:
        ValueError: `server` has another form.
    """

    def __init__(self, server: str, *, prompt: str = PROMPT, max_new_tokens: int = 64) -> None:
        url, _, model = server.partition("#")
        if not url.startswith(("http://", "https://")) or not model:
            raise ValueError(f"captioner: got {server!r}, expected URL#MODEL")
        if not prompt.strip():
            raise ValueError(f"prompt: got {prompt!r}, expected text")
        self.name, self.url, self.prompt = model, url.rstrip("/"), prompt
        self.max_new_tokens, self.patience = max_new_tokens, 60.0
        about = [self.url, model, prompt, max_new_tokens]
        self.identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def caption(self, pictures: Sequence[Any]) -> str:
        """As `Captioner.caption`. OSError where the server refuses or stays away."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data(picture)}} for picture in pictures
        ]
        content.append({"type": "text", "text": self.prompt})
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            return str(reply["choices"][0]["message"]["content"] or "").strip()
        except (LookupError, TypeError):
            raise OSError(f"captioner {self.url}: no answer in {str(reply)[:200]}") from None

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {os.environ[_KEY]}"
        wait, end = 0.5, time.monotonic() + self.patience
        while True:
            request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=600) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read()[:300].decode(errors='replace')}"
                if error.code not in (429, 503):
                    raise OSError(f"captioner {self.url}: {reason}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error))
            except (ValueError, RecursionError):
                raise OSError(f"captioner {self.url}: its answer is not JSON") from None
            if time.monotonic() + wait > end:
                raise OSError(f"captioner {self.url}: {reason}")
            time.sleep(wait)
            wait = min(2 * wait, 10.0)


def _data(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
