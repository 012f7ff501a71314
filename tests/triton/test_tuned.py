"""The file of tuned tiles: where it applies, what is refused, and what the tuner writes."""

import json
import os
import re
from dataclasses import astuple

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode

from vxl_kernels import ChunkLayout, ops
from vxl_kernels._triton import configs, launch, tune

NAME = configs.tuning_name(128, 2)
TILE = [64, 32, 32, 4, 3]
GPUS = ("GPU A", "GPU B")


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """cuda:0 is a GPU A, cuda:1 a GPU B; the path that VXL_TRITON_CONFIGS names."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPUS[device.index])
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("VXL_TRITON_CONFIGS", str(path))
    yield path
    configs._tuned.cache_clear()


def key(gpu=0):
    return configs.tuning_key(torch.device("cuda", gpu))


def rows_of_a_tile(device, **options):
    layout = ChunkLayout(1440, 8)
    q = torch.empty(1, layout.rows, 28, 128, dtype=torch.bfloat16, device=device)
    k = torch.empty(1, layout.rows, 4, 128, dtype=torch.bfloat16, device=device)
    args = (q, k, k, None, None, None, None, ops.layout_to_ints(layout), 0.1)
    return launch.plan_attention(*args, **options)[0][0].tile["rows"]


def test_tiles_hold_for_the_gpu_they_were_timed_on(two_gpus, monkeypatch):
    """Each of two GPUs of a process has its own tiles. A CPU, the interpreter and compiling ahead
    of time have none."""
    two_gpus.write_text(json.dumps({key(0): {NAME: TILE}}))
    monkeypatch.setattr(launch, "architecture", lambda device: "cuda:80")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert rows_of_a_tile("cuda:0") == 64
        assert rows_of_a_tile("cuda:1") == 128
        assert rows_of_a_tile("cuda:0") == 64
        assert rows_of_a_tile("cuda:0", arch="cuda:80") == 128
    for device in ("cpu", "meta"):
        assert rows_of_a_tile(device) == 128
    other = configs.prefill_config("cuda:80", 128, 4, torch.device("cuda", 0))
    assert other == configs.prefill_config("cuda:80", 128, 4)  # timed for 16 bits, not for 32


@pytest.mark.parametrize(
    "entry",
    [
        [64, 32, 64, 4, 3],  # keys would count twice
        [64, 48, 16, 4, 3],
        [64, 32, 8, 4, 3],
        [8, 32, 32, 4, 3],
        [256, 32, 32, 4, 3],
        [64, 256, 32, 4, 3],
        [64, 32, 32, 2, 3],
        [64, 32, 32, 4, 0],
        [64, 32, 32, 4],
        [64, 32, 32, 4, 3, 1],
        [64, 32, 32, 4, 2.0],
        [64, 32, 32, 4, True],
        ["64", "32", "32", "4", "3"],
        "64",
        {},
        None,
    ],
)
def test_tiles_that_would_be_wrong_are_refused(entry, two_gpus):
    two_gpus.write_text(json.dumps({key(): {NAME: entry}}))
    expected = (
        f"{two_gpus}, {key()!r}, {NAME!r}: got {entry}, expected [block_m, block_n, masked_block_n"
    )
    with pytest.raises(ValueError, match=re.escape(f"VXL_TRITON_CONFIGS {expected}")):
        configs.prefill_config("cuda:80", 128, 2, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "got JSONDecodeError: "),
        ("", "got JSONDecodeError: "),
        (b"\xff\xfe{}", "got UnicodeDecodeError: "),
        pytest.param("[" * 100_000, "got RecursionError: ", id="deep"),
        ("[]", "got list, expected an object of GPUs"),
        ("null", "got NoneType, expected an object of GPUs"),
        ('{"GPU A": [1]}', "'GPU A': got list, expected an object of tiles"),
        (None, "got FileNotFoundError: "),
    ],
)
def test_other_files_are_refused(text, got, two_gpus):
    if text is not None:
        two_gpus.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):  # as often as it is asked
        with pytest.raises(ValueError, match=re.escape(f"VXL_TRITON_CONFIGS {two_gpus}")) as e:
            configs.prefill_config("cuda:80", 128, 2, torch.device("cuda", 0))
        assert got in str(e.value)


def test_shipped_and_tried_tiles_are_accepted():
    tables = (configs._PREFILL_16, configs._PREFILL_32)
    shipped = [tile for table in tables for of_arch in table.values() for tile in of_arch.values()]
    tried = [
        tile for width in (64, 128, 256) for size in (2, 4) for tile in tune.candidates(width, size)
    ]
    assert all(configs._usable(list(astuple(tile))) for tile in shipped + tried)
    assert len(tune.candidates(128, 2)) > 10


# -- the tuner ---------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(two_gpus, monkeypatch):
    """The tuner finds a cuda:0, and TILE is the fastest. Returns what it was asked to time."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "architecture", lambda device: "cuda:80")
    monkeypatch.setattr(tune, "tune", lambda dtype, width: asked.append(width) or TILE)
    return asked


def test_a_written_file_is_read(a_gpu, two_gpus):
    """Also for head_dims between powers of two, which take the tiles of the next power."""
    two_gpus.write_text(json.dumps({"GPU C": {NAME: TILE}}))
    assert tune.main([str(two_gpus), "--head-dim", "32", "80"]) == 0
    assert a_gpu == [32, 32, 80, 80]
    for block_d in (16, 32, 64, 128):
        for size in (2, 4):
            found = configs.prefill_config("cuda:80", block_d, size, torch.device("cuda", 0))
            assert list(astuple(found)) == TILE
    known = json.loads(two_gpus.read_text())
    assert known["GPU C"] == {NAME: TILE}
    assert [p.name for p in two_gpus.parent.iterdir()] == [two_gpus.name]


@pytest.mark.parametrize(
    ("dims", "words"),
    [("8", "got 8, expected 16 to 256"), ("320", "got 320"), ("80 128", "got 80 and 128")],
)
def test_head_dims_that_are_refused(dims, words, a_gpu, two_gpus, capsys):
    with pytest.raises(SystemExit):
        tune.main([str(two_gpus), "--head-dim", *dims.split()])
    assert words in capsys.readouterr().err
    assert not a_gpu


def test_a_stop_while_writing_leaves_the_old_file(a_gpu, two_gpus, monkeypatch):
    two_gpus.write_text(old := json.dumps({"GPU C": {NAME: TILE}}))

    def stopped(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.main([str(two_gpus)])
    assert two_gpus.read_text() == old
    assert [p.name for p in two_gpus.parent.iterdir()] == [two_gpus.name]


def test_a_broken_file_is_not_overwritten(a_gpu, two_gpus, capsys):
    two_gpus.write_text("{")
    assert tune.main([str(two_gpus)]) == 1
    assert f"tune: VXL_TRITON_CONFIGS {two_gpus}: got JSONDecodeError" in capsys.readouterr().err
    assert two_gpus.read_text() == "{"


def test_the_tuner_needs_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([str(tmp_path / "a.json")]) == 1
    assert "no GPU" in capsys.readouterr().err
