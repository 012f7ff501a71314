"""A server of a small model, in this process or in one of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from helpers.checkpoint import write_checkpoint
from helpers.clips import picture, write_clip
from helpers.paths import ROOT
from PIL import Image

from vxl_cli.common import Parser
from vxl_serve.cli import add_serve, application


def make_place(folder):
    """A folder with the tiny checkpoint, clips and a picture."""
    write_checkpoint(folder / "tiny")
    write_clip(folder / "clip.mp4", count=60, fps=10)
    write_clip(folder / "other.mp4", count=30, fps=10, shows=list(range(40, 70)))
    Image.fromarray(picture(5, 200, 120)).save(folder / "one.png")
    return folder


def options(place, *more):
    parser = Parser()
    add_serve(parser.add_subparsers())
    given = ["serve", "--model", place / "tiny", "--store", place / "store", "--cache", "32M"]
    return parser.parse_args([*map(str, given), *map(str, more)])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(place, *more):
    """Yields the URL and the application of a server in a thread."""
    app, port = application(options(place, *more)), free_port()
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join()


class Process:
    """A server in a process of its own, which a test may kill."""

    def __init__(self, place, *more):
        self.url = f"http://127.0.0.1:{free_port()}"
        given = ["--model", place / "tiny", "--store", place / "store", "--cache", "32M"]
        command = [sys.executable, "-c", _MAIN, "serve", *given, "--port", self.url[17:], *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [str(x) for x in command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return
            except httpx.HTTPError:
                assert self.process.poll() is None, "the server has ended"
                time.sleep(0.1)
        raise TimeoutError

    def kill(self):
        self.process.kill()
        self.process.wait()


_MAIN = """
import sys
from vxl_cli.common import Parser, run
from vxl_serve.cli import add_serve
parser = Parser()
add_serve(parser.add_subparsers())
sys.exit(run(parser))
"""
