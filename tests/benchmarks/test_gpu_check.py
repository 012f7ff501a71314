"""benchmarks/gpu_check.py without a GPU and with a fake one: what it runs, keeps and reports."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
WRITES = """
import importlib.util, json, sys
assert importlib.util.find_spec("vxl_kernels")
print("ran", sys.argv[1], flush=True)
json.dump([{"case": sys.argv[1]}], open(sys.argv[sys.argv.index("--json") + 1], "w"))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def gpu_check(monkeypatch):
    """The module, on a machine with "GPU A"."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    from benchmarks import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "GPU A")
    return gpu_check


@pytest.fixture
def parts(gpu_check, monkeypatch, tmp_path):
    """Parts that only write their names. The tests and the gradients fail, with different
    statuses."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = tmp_path / "writes.py"
    script.write_text(WRITES)

    def part(name, status, missing=""):
        command = (str(script), name, str(status))
        return gpu_check.Part(name, command, lambda: missing)

    found = {
        "tests": gpu_check.Part("tests", ("-c", "exit(3)"), lambda: "", json=False),
        "attn": part("attn", 0),
        "backward": part("backward", 1),
        "prefill": part("prefill", 0, "no extension"),
    }
    monkeypatch.setattr(gpu_check, "PARTS", found)
    monkeypatch.setattr(gpu_check.this_machine, "git_state", lambda: "abc dirty")
    return found


def test_every_part_runs_and_the_worst_status_counts(gpu_check, parts, tmp_path, capfd):
    path = tmp_path / "folder" / "a.json"
    assert gpu_check.main(["--out", str(path)]) == 3
    report = json.loads(path.read_text())
    assert {n: p["status"] for n, p in report["parts"].items()} == {
        "tests": 3,
        "attn": 0,
        "backward": 1,
        "prefill": 0,
    }
    assert report["attn"] == [{"case": "attn"}]
    assert report["backward"] == [{"case": "backward"}]  # it failed, its numbers are kept
    assert report["parts"]["prefill"]["note"] == "no extension"
    assert "torch" in report["machine"]["versions"]
    assert list(path.parent.iterdir()) == [path]
    out = capfd.readouterr().out
    assert f"wrote {path}" in out
    assert "ran prefill" not in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tests"], ["tests"]),
        (["--bench"], ["attn", "backward", "prefill"]),
        (["--attn", "--tests"], ["tests", "attn"]),
    ],
)
def test_parts_alone(gpu_check, parts, tmp_path, options, expected):
    gpu_check.main([*options, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("gpu-a-abc-dirty.json")
    assert list(json.loads(path.read_text())["parts"]) == expected


def test_a_later_run_adds_to_an_earlier_one(gpu_check, parts, monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    assert gpu_check.main(["--backward", "--out", str(path)]) == 1
    assert gpu_check.main(["--attn", "--out", str(path)]) == 0  # of what it ran
    report = json.loads(path.read_text())
    assert report["backward"] == [{"case": "backward"}]
    assert report["attn"] == [{"case": "attn"}]
    assert list(report["parts"]) == ["backward", "attn"]
    silent = gpu_check.Part("attn", ("-c", "exit(4)"), lambda: "")
    monkeypatch.setitem(parts, "attn", silent)
    assert gpu_check.main(["--attn", "--out", str(path)]) == 4
    assert "attn" not in json.loads(path.read_text())  # the numbers were the last run's
    for gpu, state in (("GPU A", "abd"), ("GPU B", "abc dirty")):
        gpu_check.main(["--backward", "--out", str(path)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args, gpu=gpu: gpu)
        monkeypatch.setattr(gpu_check.this_machine, "git_state", lambda state=state: state)
        gpu_check.main(["--attn", "--out", str(path)])
        assert list(json.loads(path.read_text())["parts"]) == ["attn"]


def test_an_unreadable_report_is_replaced(gpu_check, parts, tmp_path):
    for text in ("[1]", "{", '{"machine": {}}'):
        path = tmp_path / "a.json"
        path.write_text(text)
        assert gpu_check.main(["--attn", "--out", str(path)]) == 0
        assert list(json.loads(path.read_text())["parts"]) == ["attn"]


def test_numbers_of_an_interrupted_run_are_not_reported(gpu_check, parts, monkeypatch, tmp_path):
    monkeypatch.setitem(parts, "attn", gpu_check.Part("attn", ("-c", "exit(4)"), lambda: ""))
    (tmp_path / "a-attn.json").write_text('[{"case": "stale"}]')
    assert gpu_check.main(["--attn", "--out", str(tmp_path / "a.json")]) == 4
    assert "attn" not in json.loads((tmp_path / "a.json").read_text())


def test_half_a_file_ends_only_its_part(gpu_check, parts, monkeypatch, tmp_path):
    half = "import sys; open(sys.argv[2], 'w').write('[{')"
    monkeypatch.setitem(parts, "attn", gpu_check.Part("attn", ("-c", half), lambda: ""))
    path = tmp_path / "a.json"
    assert gpu_check.main(["--attn", "--backward", "--out", str(path)]) == 1
    report = json.loads(path.read_text())
    assert "cannot be read" in report["parts"]["attn"]["note"]
    assert report["parts"]["attn"]["status"] == 1
    assert report["backward"] == [{"case": "backward"}]
    assert list(tmp_path.glob("a*")) == [path]


def test_a_part_that_takes_too_long(gpu_check, parts, monkeypatch, tmp_path):
    slow = gpu_check.Part("tests", ("-c", "import time; time.sleep(60)"), lambda: "", json=False)
    monkeypatch.setitem(parts, "tests", slow)
    assert gpu_check.main(["--tests", "--attn", "--limit", "3", "--out", str(tmp_path)]) == 124


def test_without_git(gpu_check, monkeypatch, tmp_path):
    def no_repository(command, **options):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(gpu_check.this_machine.subprocess, "run", no_repository)
    assert gpu_check.result_path(tmp_path) == tmp_path / "gpu-a-unknown.json"
    assert gpu_check.result_path(None).parent == ROOT / "benchmarks" / "results"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_straight_from_a_checkout(tmp_path):
    """From another folder, without the path of an installation."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "this machine has no GPU" in done.stderr


BLOCKED = """
import importlib.abc, sys


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hypothesis", "av", "torchcodec", "transformers") or (
            name == "vxl_kernels._C"
        ):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, Block())
"""


def test_the_tests_collect_with_torch_triton_and_pytest_alone(gpu_check, tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    done = subprocess.run(
        [sys.executable, *gpu_check.PARTS["tests"].command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout or torch.cuda.is_available()
    assert "error" not in done.stdout
