"""Clients that come, hang up and come again. VXL_LOAD_SECONDS=600 makes it last."""

import asyncio
import contextlib
import gc
import os
import random
import time

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")

import httpx
from helpers.server import make_place, serving

SECONDS = float(os.environ.get("VXL_LOAD_SECONDS", "6"))
CLIENTS = 16
QUESTIONS = [f"Question {i} about what is shown?" for i in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("load"))


async def ready(client, place, **fields):
    with open(place / "clip.mp4", "rb") as file:
        reply = await client.post("/v1/memories", files={"file": file}, data=fields)
    id = reply.raise_for_status().json()["id"]
    await client.get(f"/v1/memories/{id}/events")
    return id


def body(question, **more):
    return {"question": question, "max_tokens": 24, "temperature": 0, **more}


async def visit(client, place, id, wanted, draw, counts):
    """One visit of a client that may leave at any moment."""
    question = draw.choice(QUESTIONS)
    what = draw.choice(("whole", "stream", "hang up", "leave", "watch"))
    counts[what] = counts.get(what, 0) + 1
    if what == "whole":
        reply = await client.post(f"/v1/memories/{id}/ask", json=body(question))
        reply.raise_for_status()
        assert reply.json()["choices"][0]["message"]["content"] == wanted[question]
    elif what in ("stream", "hang up"):
        given = body(question, stream=True)
        async with client.stream("POST", f"/v1/memories/{id}/ask", json=given) as reply:
            assert reply.status_code == 200
            lines = draw.randint(0, 8) if what == "hang up" else 10**9
            async for line in reply.aiter_lines():
                assert "error" not in line
                lines -= 1
                if lines < 0:
                    break
    elif what == "leave":
        given = body(question, max_tokens=200)
        with contextlib.suppress(httpx.ReadTimeout):
            leaves = httpx.Timeout(120, read=0.05)  # once it has been heard
            await client.post(f"/v1/memories/{id}/ask", json=given, timeout=leaves)
    else:
        own = await ready(client, place, frames=draw.randint(2, 9))
        await client.delete(f"/v1/memories/{own}")


async def load(url, place):
    loop, counts = asyncio.get_running_loop(), {}
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        id, wanted = await ready(client, place), {}
        for question in QUESTIONS:
            reply = (await client.post(f"/v1/memories/{id}/ask", json=body(question))).json()
            wanted[question] = reply["choices"][0]["message"]["content"]
        end = loop.time() + SECONDS

        async def come_again(seed):
            draw = random.Random(seed)
            while loop.time() < end:
                await visit(client, place, id, wanted, draw, counts)

        await asyncio.gather(*map(come_again, range(CLIENTS)))
        for entry in (await client.get("/v1/memories")).json()["data"]:
            await client.delete(f"/v1/memories/{entry['id']}")
    return counts


def test_clients_that_hang_up_leave_nothing(place):
    with serving(place) as (url, app):
        memories = app.state.memories
        engine, pages = memories.engine, memories.engine.cache.pages
        counts = asyncio.run(load(url, place))
        assert len(counts) == 5
        deadline = time.monotonic() + 20
        while (engine.running or engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        gc.collect()
        engine.call(lambda: None).result()
        assert (engine.running, engine.waiting, engine.errors) == (0, 0, 0)
        assert pages.free_pages == pages.num_pages
        assert pages.stats()["sequences"] == 0
        assert not list((memories.settings.store / "uploads").iterdir())
