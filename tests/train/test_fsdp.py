"""FSDP2 by the shipped configuration: two processes on gloo against one, and resuming."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.paths import TESTS
from helpers.training_place import QUICK, environment, make_place, settings

from vxl_kernels import _ext
from vxl_train.cli import CONFIGS
from vxl_train.run import train
from vxl_train.trainer import read_log

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="no compiled extension")

RATE, STEPS = 1e-3, 4


def launch(place, *more):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "fsdp.yaml"),
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        str(port),
        str(TESTS / "helpers" / "fsdp_worker.py"),
        "run",
        "--stage",
        "finetune",
        "--model",
        "model",
        "--data",
        "data.json",
        "--config",
        "two.json",
        "--output",
        "two",
        *more,
    ]
    done = subprocess.run(
        command,
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_are_one(tmp_path):
    """Batches hold videos of several lengths, pictures and text alone, so processes run different
    steps. Tolerances: float32 sums of a step are in another order, which costs 2 ** -23 relative
    each. If a gradient is near 0, Adam turns this into a part of its step. It never moves a weight
    by more than the learning rate."""
    place = make_place(tmp_path)
    two = {
        **QUICK,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": RATE,
        "train_vision_tower": True,
        "gradient_checkpointing": True,
    }
    (place / "two.json").write_text(json.dumps(two))
    one = settings(**{**two, "per_device_train_batch_size": 2, "save_strategy": "no"})
    train(place / "model", [place / "data.json"], place / "one", one)
    tokens = sum(x["tokens"] for x in read_log(place / "one" / "train_log.jsonl"))
    assert f"of 2 samples and {tokens / STEPS:.0f} tokens" in launch(place).stdout
    want, got = (read_log(place / name / "train_log.jsonl") for name in ("one", "two"))
    assert len(got) == STEPS
    for a, b in zip(want, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=16 * 2**-23)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=64 * 2**-23)
    want = load_file(place / "one" / "model" / "model.safetensors")
    found = load_file(place / "two" / "model" / "model.safetensors")
    assert found.keys() == want.keys()
    start = load_file(place / "model" / "model.safetensors")
    for name, weight in want.items():
        off = float((found[name] - weight).abs().max())
        assert off < 0.01 * RATE * STEPS, name
    moved = max(float((want[k] - start[k]).abs().max()) for k in want)
    assert moved > 0.5 * RATE * STEPS

    # As if killed after step 2. From there the run has the same bits.
    shutil.rmtree(place / "two" / f"checkpoint-{STEPS}")
    shutil.rmtree(place / "two" / "model")
    assert "resumed from checkpoint-2" in launch(place, "--resume").stderr
    again = read_log(place / "two" / "train_log.jsonl")
    assert [x["loss"] for x in again] == [x["loss"] for x in got]
    final = load_file(place / "two" / "model" / "model.safetensors")
    assert all(torch.equal(final[k], found[k]) for k in found)


def test_adapters_of_two_processes_are_those_of_one(tmp_path):
    """Checkpoints hold what learns, adapter and merged model are whole, and a resumed run is the
    same."""
    pytest.importorskip("peft")
    place = make_place(tmp_path)
    two = {
        **QUICK,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": RATE,
        "peft": {"r": 4},
    }
    (place / "two.json").write_text(json.dumps(two))
    one = settings(**{**two, "per_device_train_batch_size": 2, "save_strategy": "no"})
    train(place / "model", [place / "data.json"], place / "one", one)
    launch(place)
    want, got = (read_log(place / name / "train_log.jsonl") for name in ("one", "two"))
    for a, b in zip(want, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=16 * 2**-23)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        want, found = (load_file(place / name / file) for name in ("one", "two"))
        assert found.keys() == want.keys()
        assert all(float((found[k] - want[k]).abs().max()) < 0.02 * RATE * 2 for k in want)
    held = load_file(place / "two" / "checkpoint-1" / "model.safetensors")
    assert all("lora_" in name or "modules_to_save" in name for name in held)

    for gone in ("checkpoint-2", "model", "adapter"):
        shutil.rmtree(place / "two" / gone)
    assert "resumed from checkpoint-1" in launch(place, "--resume").stderr
    final = load_file(place / "two" / "model" / "model.safetensors")
    assert all(torch.equal(final[k], found[k]) for k in found)


ENDING = """
import atexit, os, threading, time
from vxl_train.cli import leave

class Witness:
    def __del__(self, write=os.write):
        write(2, b"taken down")

witness = Witness()
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("of a thread"))).start()
print("printed")
leave(3)
"""


@pytest.mark.parametrize("rank", [{}, {"RANK": "0"}])
def test_a_process_of_a_group_ends_without_taking_the_interpreter_down(rank):
    """A thread of gloo that asks for the interpreter's lock during the end would abort it."""
    given = {name: value for name, value in environment().items() if name != "RANK"}
    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(
        command, env={**given, **rank}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n") == ["printed", "of a thread", "at the end", ""]
    assert done.returncode == 3
    assert ("taken down" in done.stderr) == (not rank)
