"""A library of videos on Ray: a worker that is killed loses nothing, and each memory has the bytes
that one process writes."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

ray = pytest.importorskip("ray", reason="make serve-check installs it in an environment of its own")

from helpers.clips import write_clip
from helpers.server import make_place

CLIPS = int(os.environ.get("VXL_RAY_CLIPS", "12"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("ray"))
    (folder / "videos").mkdir()
    for i in range(CLIPS):
        write_clip(folder / "videos" / f"{i}.mp4", count=20 + i, fps=10, shows=range(i, 20 + 2 * i))
    (folder / "videos" / "noise.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture
def cluster():
    ray.init(
        num_cpus=6, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False
    )
    yield
    ray.shutdown()


def watch(place, folder, *more):
    from vxl_cli.main import main

    given = ["--model", place / "tiny", "--videos", place / "videos", "--save", folder, *more]
    assert main(["watch", *map(str, given)]) == 0
    return {path.name: path.read_bytes() for path in folder.glob("*.vxl")}


def kill_a_worker(folder, killed):
    """Once some memories are there, the process of an actor ends."""
    while len(list(folder.glob("*.vxl"))) < 5:
        time.sleep(0.02)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            name = entry.read_bytes()
            if name.startswith(b"ray::") and b"MapWorker" in name:
                os.kill(int(entry.parent.name), signal.SIGKILL)
                killed.append(name)
                return


def test_a_killed_worker_loses_nothing(place, cluster, tmp_path):
    killed, folder = [], tmp_path / "ray"
    folder.mkdir()
    killer = threading.Thread(target=kill_a_worker, args=(folder, killed))
    killer.start()
    on_ray = watch(place, folder, "--ray", "--workers", 2)
    killer.join(10)
    assert killed
    assert len(on_ray) == CLIPS
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert sum("memory" in row for row in rows) == CLIPS
    assert [row["video"] for row in rows if "error" in row] == [str(place / "videos" / "noise.mp4")]
    # As many threads as each of the two workers has: products of PyTorch depend on their number.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        assert watch(place, tmp_path / "one") == on_ray
    finally:
        torch.set_num_threads(threads)
