"""A server that is killed finds whole memories when it starts again, and nothing else."""

import json
import os
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")

import httpx
from helpers.server import Process, make_place

from vxl_kernels import VstCache


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("killed"))


def upload(server, place, frames):
    """In a thread, because the reply may never come."""

    def post():
        try:
            with open(place / "clip.mp4", "rb") as file:
                fields = {"frames": frames}
                httpx.post(f"{server.url}/v1/memories", files={"file": file}, data=fields)
        except httpx.HTTPError:
            pass

    threading.Thread(target=post, daemon=True).start()


def listed(server):
    return httpx.get(f"{server.url}/v1/memories").json()["data"]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def check(server, store, frames):
    """Memories of this many frames, whole, and no file of another."""
    assert sorted(entry["frames"] for entry in listed(server)) == frames
    names = {entry["id"] for entry in listed(server)}
    assert {path.stem for path in store.glob("*.*") if not path.name.startswith(".lock")} == names
    assert not list((store / "uploads").iterdir())
    for entry in listed(server):
        body = {"question": "What?", "max_tokens": 2}
        reply = httpx.post(f"{server.url}/v1/memories/{entry['id']}/ask", json=body)
        assert reply.status_code == 200


def test_kill_while_watching_and_while_saving(place):
    store = place / "store"
    server = Process(place)
    upload(server, place, 6)
    wait_for(lambda: [e["status"] for e in listed(server)] == ["ready"])
    upload(server, place, 50)
    wait_for(lambda: "watching" in [e["status"] for e in listed(server)])
    server.kill()

    server = Process(place)
    check(server, store, [6])
    upload(server, place, 40)
    files = set(os.listdir(store))
    # The first file of a memory appears, under its temporary name or its own.
    wait_for(lambda: set(os.listdir(store)) - files)
    server.kill()
    left = [path for path in store.glob("mem-*.json") if json.loads(path.read_text())]

    server = Process(place)
    check(server, store, sorted(json.loads(path.read_text())["done"] for path in left))
    upload(server, place, 40)
    wait_for(lambda: 40 in [e["frames"] for e in listed(server) if e["status"] == "ready"])
    for entry in listed(server):
        VstCache.reader(store / f"{entry['id']}.vxl").__exit__(None, None, None)
    server.kill()
