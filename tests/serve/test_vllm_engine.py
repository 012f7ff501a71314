"""`vxl serve --engine vllm`: what it asks of a vLLM server, here a stand-in that records requests.
With vLLM's own server, `tests/serve/test_vllm_http.py` shows that answers are `memory.ask`'s."""

import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from helpers.server import free_port, make_place, serving

from vxl_serve.vllm import Prefix


class StandIn:
    """`/v1/completions` of vLLM: two chunks, the second of two tokens."""

    def __init__(self):
        self.requests, self.refusal, self.finish = [], None, "stop"
        app, port = FastAPI(), free_port()

        @app.get("/v1/models")
        async def models():
            return {"data": [{"id": "served"}]}

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            self.requests.append(body)
            if self.refusal:
                return JSONResponse({"message": "no"}, self.refusal)

            def lines():
                for text, total, finish in (("Hel", 1, None), ("lo", 3, self.finish)):
                    choice = {"index": 0, "text": text, "finish_reason": finish}
                    chunk = {"choices": [choice], "usage": {"completion_tokens": total}}
                    yield f"data: {json.dumps(chunk)}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(lines(), media_type="text/event-stream")

        self.url = f"http://127.0.0.1:{port}"
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def vllm():
    made = StandIn()
    yield made
    made.close()


@pytest.fixture
def url(place, vllm, tmp_path):
    more = ("--store", tmp_path, "--allow-folder", place)
    with serving(place, "--engine", "vllm", "--vllm-url", vllm.url, *more) as (url, _):
        yield url


def ask(url, **more):
    parts = [
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "text", "text": "?!"},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_a_question_goes_to_vllm_with_the_memory(url, vllm, tmp_path):
    options = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 4, "stop": ["x"]}
    reply = ask(url, **options, logit_bias={"7": 2}).json()
    assert reply["choices"][0]["message"]["content"] == "Hello"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 3
    (body,) = vllm.requests
    (path,) = tmp_path.glob("*.vxl")
    prefix = Prefix.read(path)
    suffix = body["prompt"][prefix.tokens :]
    wanted = {**prefix.completion(suffix), **options, "model": "served", "stream": True}
    assert {name: body[name] for name in wanted} == wanted
    assert body["logit_bias"] == {"7": 2}
    assert body["stop_token_ids"]
    assert reply["usage"]["prompt_tokens"] == len(body["prompt"])


def test_streaming(url):
    lines = ask(url, stream=True).text.split("\n\n")
    chunks = [json.loads(x.removeprefix("data: ")) for x in lines if x and "[DONE]" not in x]
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "Hel", "lo"]


@pytest.mark.parametrize(("refusal", "finish"), [(400, "stop"), (None, "error")])
def test_what_vllm_refuses_is_told(url, vllm, refusal, finish):
    vllm.refusal, vllm.finish = refusal, finish
    reply = ask(url)
    assert reply.status_code == 502
    assert "vLLM" in reply.json()["error"]["message"]


def test_a_server_that_is_away_is_told(url, vllm):
    vllm.close()
    reply = ask(url)
    assert reply.status_code == 502
    assert "ConnectError" in reply.json()["error"]["message"]


def test_log_probabilities_are_refused(url):
    reply = ask(url, logprobs=True)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
