"""Two processes on gloo, each with half the heads and half the cache, against one."""

import os
import socket
import subprocess
import sys

import torch
from helpers.model_goldens import TINY, TOLERANCE, input_ids, relative, tiny_expected, tiny_model
from helpers.paths import ROOT, TESTS
from safetensors.torch import load_file


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        str(TESTS / "helpers" / "tensor_parallel_worker.py"),
        str(TINY),
        str(TINY / "expected.safetensors"),
        str(tmp_path / "out"),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"out.{rank}.safetensors") for rank in range(2)]
    assert [int(r["kv_heads"]) for r in ranks] == [1, 1]

    expected, model = tiny_expected(), tiny_model(ratio=4)
    out = model(input_ids(expected), pixel_values=expected["pixel_values"])
    for rank in ranks:
        assert relative(rank["logits"], out.logits) < TOLERANCE
        assert relative(rank["logits"][0], expected["video_logits"]) < TOLERANCE
        assert rank["new"].tolist() == expected["video_generated_ids"].tolist()
    for name, whole in zip(("keys", "values"), out.memory.keys_values(1), strict=True):
        assert relative(torch.cat([r[name] for r in ranks], dim=1), whole) < TOLERANCE
