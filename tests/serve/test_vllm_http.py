"""vLLM's own HTTP server with memories of videos: 20 questions over 5 videos at once get the greedy
answers of `memory.ask`. They are asked as ids, and as words through `vxl serve`."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("vllm", reason="make vllm-check installs it in an environment of its own")

import httpx
from helpers.clips import write_clip
from helpers.paths import CHECKPOINT, ROOT
from helpers.server import free_port, serving

from examples.demo_clip import byte_tokenizer
from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration
from vxl_serve.vllm import Prefix

START_SECONDS = 900  # three processes import vLLM, one after another, perhaps on a busy machine
SECONDS, NEW = (3, 5, 4, 8, 6), 12  # of the videos; tokens of an answer
QUESTIONS = ("What happens?", "Where is it?", "Who is there, and why?", "And then?")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint in the published layout, of a head size that vLLM has on a CPU, and clips.
    Its tokens are ASCII: broken characters are where decoders differ."""
    folder = tmp_path_factory.mktemp("vllm-http")
    shape = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.1}
    config = VideoXLConfig.from_pretrained(CHECKPOINT, **shape)
    torch.manual_seed(0)
    VideoXLForConditionalGeneration(config).save_pretrained(folder / "tiny")
    byte_tokenizer(config.vocab_size).save_pretrained(folder / "tiny")
    for i, seconds in enumerate(SECONDS):
        shown = list(range(40 * i, 40 * i + 10 * seconds))
        write_clip(folder / f"{i}.mp4", count=len(shown), fps=10, shows=shown)
    return folder


@pytest.fixture(scope="module")
def memories(place):
    model = VideoXLForConditionalGeneration.from_pretrained(place / "tiny")
    return [model.watch(place / f"{i}.mp4") for i in range(len(SECONDS))]


@pytest.fixture(scope="module")
def vllm(place):
    """The URL of vLLM's server."""
    url = f"http://127.0.0.1:{free_port()}"
    transfer = {"kv_connector": "VxlConnector", "kv_role": "kv_consumer"}
    options = {
        "--model": place / "tiny",
        "--dtype": "float32",
        "--max-model-len": 2048,
        "--max-num-batched-tokens": 64,  # less than any video
        "--kv-transfer-config": json.dumps(transfer),
        "--host": "127.0.0.1",
        "--port": url.rpartition(":")[2],
    }
    # `vllm serve` asks for a package named vllm, and the wheel for CPUs has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(x) for pair in options.items() for x in pair]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(START_SECONDS),
        # The scheduler never sleeps, so a worker that is bound to the same core crawls.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # engines of other tests set it
    log = place / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(url):
            assert process.poll() is None, f"vLLM has ended\n{log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"vLLM does not come up\n{log.read_text()[-4000:]}"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # none of its processes is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url):
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def served(place, vllm):
    """The URL of `vxl serve` in front of it, and the ids of the videos there."""
    options = ("--engine", "vllm", "--vllm-url", vllm, "--allow-folder", place)
    with serving(place, *options) as (url, _):
        ids = []
        for i in range(len(SECONDS)):
            reply = httpx.post(f"{url}/v1/memories", json={"url": f"{i}.mp4"}, timeout=60)
            ids.append(reply.raise_for_status().json()["id"])
            httpx.get(f"{url}/v1/memories/{ids[-1]}/events", timeout=300)
        yield url, ids


def all_at_once(requests):
    """Replies to (URL, body) pairs."""

    async def post():
        limits = httpx.Limits(max_connections=len(requests))
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            return await asyncio.gather(*(client.post(u, json=body) for u, body in requests))

    return [reply.raise_for_status().json() for reply in asyncio.run(post())]


def test_ids(place, memories, vllm, served):
    processor, requests, wanted = memories[0].model.processor, [], []
    more = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for memory, id in zip(memories, served[1], strict=True):
        prefix = Prefix.read(place / "store" / f"{id}.vxl")
        for question in QUESTIONS:
            ids = processor.suffix_ids(question)[0]
            wanted.append(memory.ask(ids, NEW, do_sample=False, eos_token_id=None).tolist())
            body = {"model": str(place / "tiny"), **prefix.completion(ids), **more}
            requests.append((f"{vllm}/v1/completions", body))
    assert len({tuple(ids) for ids in wanted}) == len(wanted) == 20  # none is another's answer
    got = [reply["choices"][0] for reply in all_at_once(requests)]
    assert [choice["token_ids"] for choice in got] == wanted


def test_words_through_vxl_serve(memories, served):
    url, videos = served
    requests, wanted = [], []
    for memory, id in zip(memories, videos, strict=True):
        for question in QUESTIONS:
            wanted.append(memory.ask(question, NEW, do_sample=False))
            body = {"question": question, "max_tokens": NEW, "temperature": 0}
            requests.append((f"{url}/v1/memories/{id}/ask", body))
    replies = all_at_once(requests)
    assert [r["choices"][0]["message"]["content"].strip() for r in replies] == wanted
    cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies]
    assert cached == [m.cached_tokens[0] for m in memories for _ in QUESTIONS]
