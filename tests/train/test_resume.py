"""After kill -9 at any moment, losses and model are the same, and only the running step is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.training_place import QUICK, environment, make_place, settings

from vxl_kernels import _ext
from vxl_train.run import train
from vxl_train.trainer import last_checkpoint, read_log

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="no compiled extension")

STEPS = 8
# A process that ends in the middle of writing its third checkpoint.
KILL_WHILE_SAVING = """
import os, signal, sys
import torch
from vxl_train.cli import main
saves, save = 0, torch.save
def stop(value, path, *args, **kwargs):
    global saves
    if "optimizer" in str(path):
        saves += 1
        if saves == 3:
            open(path, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    return save(value, path, *args, **kwargs)
torch.save = stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("resume"))
    config = {
        **QUICK,
        "max_steps": STEPS,
        "max_text_tokens": 2000,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # Bad data in between does not change what follows.
    lines = [json.dumps(x) for x in json.loads((folder / "data.json").read_text())]
    long = {
        "id": "long",
        "conversations": [{"from": "human", "value": "Hi " * 4000}, {"from": "gpt", "value": "A"}],
    }
    (folder / "data.jsonl").write_text("\n".join([*lines, "{broken", json.dumps(long)]))
    return folder


def start(place, output, *more, program=("-m", "vxl_train")):
    command = [
        sys.executable,
        *program,
        "run",
        "--stage",
        "finetune",
        "--model",
        "model",
        "--data",
        "data.jsonl",
        "--config",
        "config.json",
        "--output",
        output,
        *more,
    ]
    return subprocess.Popen(
        command,
        cwd=place,
        env=environment(),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out, err


def state(folder):
    """The steps that were logged, and the step of the last finished checkpoint."""
    steps = [line["step"] for line in read_log(folder / "train_log.jsonl")]
    checkpoint = last_checkpoint(folder)
    return steps, int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def test_kill_9(place):
    whole, killed = place / "whole", place / "killed"
    undisturbed = start(place, "whole")

    first = start(place, "killed", program=("-c", KILL_WHILE_SAVING))
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    steps, checkpoint = state(killed)
    assert (steps, checkpoint) == ([1, 2, 3], 2)
    half = killed / ".writing" / "checkpoint-3" / "optimizer.pt"
    assert half.read_bytes() == b"half"  # there, and not taken for a checkpoint

    second = start(place, "killed", "--resume")
    until = time.monotonic() + 100
    while state(killed)[0][-1:] < [5] and time.monotonic() < until:
        assert second.poll() is None, second.communicate()[1]
        time.sleep(0.01)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    steps, checkpoint = state(killed)
    assert steps == list(range(1, len(steps) + 1))
    assert 5 <= len(steps) < STEPS
    assert checkpoint in (len(steps), len(steps) - 1)  # only the running step is lost

    _, err = finish(start(place, "killed", "--resume"))
    assert f"resumed from checkpoint-{checkpoint}" in err
    finish(undisturbed)
    a, b = (read_log(folder / "train_log.jsonl") for folder in (whole, killed))
    same = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")
    assert len(a) == STEPS
    for x, y in zip(a, b, strict=True):
        assert {k: x[k] for k in same} == {k: y[k] for k in same}  # to the bit
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    bad = [(folder / "bad_samples.jsonl").read_text() for folder in (whole, killed)]
    assert bad[0] == bad[1]
    assert [json.loads(x)["kind"] for x in bad[0].splitlines()] == ["broken line", "too long"]


# -- runs that are not resumed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of stage align, its checkpoints and its result."""
    folder = make_place(tmp_path_factory.mktemp("begun"))
    train(folder / "model", [folder / "data.json"], folder / "run", align())
    return folder


def align(**values):
    return settings(
        "align", **{"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **values}
    )


@pytest.fixture
def again(begun, tmp_path):
    """Resumes a copy of the run."""
    shutil.copytree(begun, tmp_path / "copy")

    def call(model="model", **values):
        folder = tmp_path / "copy"
        data = [folder / "data.json"]
        return train(folder / model, data, folder / "run", align(**values), resume=True)

    call.folder = tmp_path / "copy"
    return call


def test_several_gpus_in_one_process(begun, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs .* accelerate launch, or .*CUDA_VISIBLE_DEVICES"):
        train(begun / "model", [begun / "data.json"], begun / "many", align())
    assert not (begun / "many").exists()


def test_one_run_at_a_time(begun, again, tmp_path):
    """A second run in the folder stops with an error. A killed run leaves no lock."""
    hold = (
        "import sys, time; from pathlib import Path; from vxl_train.run_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    run = again.folder / "run"
    before = sorted(path.name for path in run.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run)],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=r"output: .*run is in use by another run"):
                again()
            assert sorted(path.name for path in run.iterdir()) == before
        finally:
            other.kill()
    assert again().steps == 2


def test_a_checkpoint_without_optimizer_state(begun, tmp_path):
    def run(resume, **values):
        chosen = align(save_only_model=True, max_steps=3, **values)
        data = [begun / "data.json"]
        return train(begun / "model", data, tmp_path / "run", chosen, resume=resume)

    run(False)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no optimizer state"):
        run(True)
    assert run(True, new_optimizer=True).resumed_from == 2


def test_a_result_without_checkpoints_is_not_replaced(again):
    run = again.folder / "run"
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    want = (run / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"resume: .*run holds model and no checkpoint"):
        again()
    assert (run / "model" / "model.safetensors").read_bytes() == want


@pytest.mark.parametrize("inside", ["run/model", "run/checkpoint-2", "link"])
def test_the_source_is_not_replaced(again, inside):
    (again.folder / "link").symlink_to(again.folder / "run" / "model")
    with pytest.raises(ValueError, match=rf"model: got .*{inside}, which the run in .*run would"):
        again(inside)
    assert (again.folder / "run" / "model" / "model.safetensors").is_file()


def test_other_samples_are_another_run(again):
    with pytest.raises(ValueError, match="resume: probe_files was True and is False"):
        again(probe_files=False)
    (again.folder / "one.png").rename(again.folder / "gone.png")  # the data file is the same
    with pytest.raises(ValueError, match=r"resume: samples was \[12, \d+\] and is \[7, \d+\]"):
        again()
    (again.folder / "gone.png").rename(again.folder / "one.png")
    assert again(on_bad_sample="stop").steps == 2  # the handling of bad samples changes no order


def test_runs_from_before_packing_go_on(again):
    record = again.folder / "run" / "run.json"
    settings = json.loads(record.read_text())["settings"]
    assert "packing" not in settings
    with pytest.raises(ValueError, match="resume: packing was None and is False"):
        again(packing=False)
    assert again().steps == 2


def test_another_base_is_another_run(again):
    """The checkpoint holds only the projector."""
    path = again.folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"resume: base_crc32 was \d+ and is \d+"):
        again()


def test_a_damaged_run_json_is_named(again):
    for text in ('{"settings"', "[]", "{}"):
        (again.folder / "run" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"resume: .*run\.json: damaged, or not written by"):
            again()


def test_a_damaged_state_is_named(again):
    *_, last = sorted((again.folder / "run").glob("checkpoint-*"))
    for text in ('{"global_step"', "[]", "{}", "[" * 100_000):
        (last / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match=r"resume: .*trainer_state\.json: damaged, or not"):
            again()


def test_run_json_is_written_beside_its_place(again, monkeypatch):
    before = (again.folder / "run" / "run.json").read_text()
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("run.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert (again.folder / "run" / "run.json").read_text() == before
