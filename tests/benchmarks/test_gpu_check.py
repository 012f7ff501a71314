"""benchmarks/gpu_check.py without a GPU and with a fake one: what it runs, keeps and reports."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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

    def part(name, status, missing="", **options):
        command = (str(script), name, str(status))
        return gpu_check.Part(command, lambda: missing, **options)

    found = {
        "attn": part("attn", 0, smoke=()),
        "tests": gpu_check.Part(("-c", "exit(3)"), lambda: "", json=False, small=()),
        "backward": part("backward", 1),
        "prefill": part("prefill", 0, "no extension"),
    }
    monkeypatch.setattr(gpu_check, "PARTS", found)
    monkeypatch.setattr(gpu_check, "SMOKE", ("attn",))
    monkeypatch.setattr(gpu_check.this_machine, "git_state", lambda: "abc dirty")
    return found


def last_line(capfd):
    return capfd.readouterr().out.strip().splitlines()[-1]


def test_every_part_runs_and_the_worst_status_counts(gpu_check, parts, tmp_path, capfd):
    path = tmp_path / "folder" / "a.json"
    assert gpu_check.main(["--out", str(path)]) == 3
    report = json.loads(path.read_text())
    assert {n: p["status"] for n, p in report["parts"].items()} == {
        "attn": 0,
        "tests": 3,
        "backward": 1,
        "prefill": 77,
    }
    assert report["attn"] == [{"case": "attn"}]
    assert report["backward"] == [{"case": "backward"}]  # it failed, its numbers are kept
    assert report["parts"]["prefill"]["note"] == "no extension"
    assert "torch" in report["machine"]["versions"]
    logs = {f"a-{name}.log" for name in ("attn", "backward", "tests")}
    assert {x.name for x in path.parent.iterdir()} == {"a.json"} | logs
    assert (path.parent / "a-attn.log").read_text() == "ran attn\n"
    out = capfd.readouterr().out
    assert f"wrote {path}" in out
    assert "ran prefill" not in out
    line = out.strip().splitlines()[-1]
    assert line.startswith("gpu-check: INCOMPLETE: failed: tests, backward; not run: prefill.")
    assert f"gpu_check.py tests backward prefill --out {path}" in line


def test_what_did_not_run_is_no_success(gpu_check, parts, tmp_path, capfd):
    out = ["--out", str(tmp_path)]
    assert gpu_check.main(["prefill", "attn", *out]) == 77
    assert "INCOMPLETE: not run: prefill. Again" in last_line(capfd)
    assert gpu_check.main(["attn", *out]) == 0
    assert last_line(capfd) == "gpu-check: complete: attn passed"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["tests"], ["tests"]),
        (["tests", "attn"], ["attn", "tests"]),
        (["--smoke"], ["attn"]),
    ],
)
def test_parts_alone(gpu_check, parts, tmp_path, options, expected):
    gpu_check.main([*options, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("gpu-a-abc-dirty.json")
    assert list(json.loads(path.read_text())["parts"]) == expected


def test_a_part_that_is_not_known(gpu_check, parts, capfd):
    with pytest.raises(SystemExit):
        gpu_check.main(["attention"])
    assert "got attention; valid are attn, tests, backward, prefill" in capfd.readouterr().err


def test_a_later_run_adds_to_an_earlier_one(gpu_check, parts, monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    assert gpu_check.main(["backward", "--out", str(path)]) == 1
    assert gpu_check.main(["attn", "--out", str(path)]) == 0  # of what it ran
    report = json.loads(path.read_text())
    assert report["backward"] == [{"case": "backward"}]
    assert report["attn"] == [{"case": "attn"}]
    assert list(report["parts"]) == ["backward", "attn"]
    silent = gpu_check.Part(("-c", "exit(4)"), lambda: "")
    monkeypatch.setitem(parts, "attn", silent)
    assert gpu_check.main(["attn", "--out", str(path)]) == 4
    assert "attn" not in json.loads(path.read_text())  # the numbers were the last run's
    for gpu, state in (("GPU A", "abd"), ("GPU B", "abc dirty")):
        gpu_check.main(["backward", "--out", str(path)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args, gpu=gpu: gpu)
        monkeypatch.setattr(gpu_check.this_machine, "git_state", lambda state=state: state)
        gpu_check.main(["attn", "--out", str(path)])
        assert list(json.loads(path.read_text())["parts"]) == ["attn"]


def test_a_run_is_resumed(gpu_check, parts, monkeypatch, tmp_path, capfd):
    path = tmp_path / "a.json"
    gpu_check.main(["--out", str(path)])
    capfd.readouterr()
    monkeypatch.setitem(parts, "tests", gpu_check.Part(("-c", ""), lambda: "", json=False))
    assert gpu_check.main(["--resume", "--out", str(path)]) == 1  # the gradients
    out = capfd.readouterr().out
    assert "ran attn" not in out
    assert "ran backward" in out
    assert "attn      ok: passed in an earlier run" in out
    # A part that passed once keeps its numbers if it cannot run now.
    monkeypatch.setitem(parts, "attn", gpu_check.Part((), lambda: "gone"))
    assert gpu_check.main(["attn", "--out", str(path)]) == 77
    assert json.loads(path.read_text())["attn"] == [{"case": "attn"}]


def test_an_unreadable_report_is_replaced(gpu_check, parts, tmp_path):
    for text in ("[1]", "{", '{"machine": {}}'):
        path = tmp_path / "a.json"
        path.write_text(text)
        assert gpu_check.main(["attn", "--out", str(path)]) == 0
        assert list(json.loads(path.read_text())["parts"]) == ["attn"]


def test_numbers_of_another_run_are_not_reported(gpu_check, parts, monkeypatch, tmp_path):
    monkeypatch.setitem(parts, "attn", gpu_check.Part(("-c", "exit(4)"), lambda: ""))
    (tmp_path / "a-attn.json").write_text('[{"case": "stale"}]')
    assert gpu_check.main(["attn", "--out", str(tmp_path / "a.json")]) == 4
    assert "attn" not in json.loads((tmp_path / "a.json").read_text())


def test_half_a_file_ends_only_its_part(gpu_check, parts, monkeypatch, tmp_path):
    half = "import sys; open(sys.argv[2], 'w').write('[{')"
    monkeypatch.setitem(parts, "attn", gpu_check.Part(("-c", half), lambda: ""))
    path = tmp_path / "a.json"
    assert gpu_check.main(["attn", "backward", "--out", str(path)]) == 1
    report = json.loads(path.read_text())
    assert "cannot be read" in report["parts"]["attn"]["note"]
    assert report["parts"]["attn"]["status"] == 1
    assert report["backward"] == [{"case": "backward"}]
    assert list(tmp_path.glob("a*.json")) == [path]


SLOW = """
import json, subprocess, sys, time
json.dump([{"case": "first"}], open(sys.argv[sys.argv.index("--json") + 1], "w"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_part_that_takes_too_long(gpu_check, parts, monkeypatch, tmp_path, capfd):
    """It is ended with what it started. Its numbers so far are kept."""
    monkeypatch.setitem(parts, "attn", gpu_check.Part(("-c", SLOW), lambda: ""))
    path = tmp_path / "a.json"
    assert gpu_check.main(["attn", "--limit", "8", "--out", str(path)]) == 124
    assert json.loads(path.read_text())["attn"] == [{"case": "first"}]
    child = (tmp_path / "a-attn.log").read_text().strip()
    wait_until(lambda: not alive(child))  # it would sleep for a minute


def test_the_whole_command_ends_in_time(gpu_check, parts, monkeypatch, tmp_path, capfd):
    slow = gpu_check.Part(("-c", "import time; time.sleep(60)"), lambda: "", json=False, small=())
    monkeypatch.setitem(parts, "attn", slow)
    assert gpu_check.main(["--within", "1", "--out", str(tmp_path / "a.json")]) == 124
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["parts"]["attn"]["seconds"] < 10
    for name in ("tests", "backward", "prefill"):
        assert report["parts"][name]["note"] == "no time left of 1 s"
    assert "failed: attn; not run: tests, backward, prefill" in last_line(capfd)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(gpu_check, parts, tmp_path, capfd, by):
    """Parts before it, and its own numbers so far, are there. The next run goes on."""
    (tmp_path / "slow.py").write_text(SLOW)
    path = tmp_path / "a.json"
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: True; "
        "torch.cuda.get_device_name = lambda *a: 'GPU A'; "
        "from benchmarks import gpu_check as g; "
        "g.this_machine.git_state = lambda: 'abc dirty'; "
        f"one, two = {str(tmp_path / 'writes.py')!r}, {str(tmp_path / 'slow.py')!r}; "
        "g.PARTS = {'attn': g.Part((one, 'attn', '0'), lambda: ''), "
        "'backward': g.Part((two,), lambda: '')}; "
        f"g.main(['--out', {str(path)!r}])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    log = tmp_path / "a-backward.log"
    try:
        wait_until(lambda: log.exists() and log.read_text().strip().isdigit())
        assert json.loads(path.read_text())["parts"]["backward"]["status"] is None
    finally:
        run.send_signal(by)
        run.wait()
    report = json.loads(path.read_text())
    assert report["attn"] == [{"case": "attn"}]
    if by == signal.SIGTERM:
        wait_until(lambda: not alive(log.read_text().strip()))
    else:
        os.kill(int(log.read_text()), signal.SIGKILL)  # the part has ended, its own child has not
    capfd.readouterr()
    assert gpu_check.main(["attn", "--resume", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["backward"] == [{"case": "first"}]
    assert report["parts"]["backward"]["note"] == "was killed"
    assert "ran attn" not in capfd.readouterr().out
    assert gpu_check.main(["--resume", "--out", str(path)]) == 3


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_tests_run_in_parallel_where_they_can(gpu_check, tmp_path, monkeypatch):
    check = gpu_check.Check(gpu_check.parse(["-k", "abc"]), tmp_path / "a.json")
    monkeypatch.setattr(gpu_check, "needs", lambda *modules: "")
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 16)
    assert check.command("tests")[-4:] == ["-n", "8", "-k", "abc"]
    monkeypatch.setattr(gpu_check, "needs", lambda *modules: f"not installed: {modules}")
    assert "-n" not in check.command("tests")


def test_a_missing_extension_is_built_or_named(gpu_check, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu_check._ext, "extension", None)
    monkeypatch.setattr(gpu_check, "_built", lambda: False)
    monkeypatch.setattr(gpu_check.this_machine, "git_state", lambda: "abc")
    path = tmp_path / "a.json"
    assert gpu_check.main(["extension", "prefill", "--no-build", "--out", str(path)]) == 77
    out = capfd.readouterr().out
    assert "extension: not run: it is not built here (python setup.py build_ext --inplace)" in out
    assert "prefill: not run: the page cache needs the extension" in out
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert gpu_check.main(["extension", "--out", str(path)]) == 77
    assert "there is no C++ compiler" in capfd.readouterr().out
    built = []
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(gpu_check, "run", lambda command, *rest: built.append(command) or (0, ""))
    monkeypatch.setattr(gpu_check, "needs", lambda *modules: "")
    assert gpu_check.main(["extension", "--out", str(path)]) == 0
    assert built == [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]


def test_parts_end_well_under_ten_minutes(gpu_check):
    assert gpu_check.parse([]).limit <= 500
    assert gpu_check.parse(["--smoke"]).within <= 120


# -- the real parts, to their end, over a played GPU ----------------------------------------------

PLAY = """
import os, sys

os.environ["TRITON_INTERPRET"] = "1"
if "ahead.py" in " ".join(sys.orig_argv):  # the interpreter compiles nothing
    del os.environ["TRITON_INTERPRET"]
if any(name in " ".join(sys.orig_argv) for name in ("benchmarks/", "pytest")):
    from helpers import fake_cuda

    fake_cuda.play()
if "first_day" in " ".join(sys.orig_argv):
    from helpers.played_graph import playing
    from vxl_model.streaming import step_graph

    graphs = playing()
    graphs.__enter__()
    step_graph.refuse_model = lambda model: None
"""


@pytest.fixture
def played(tmp_path):
    """Runs gpu_check.py in a process, over a played GPU and on no network."""
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(PLAY)

    def run(*arguments, **env):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments, "--small", "--out", str(tmp_path / "a.json")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests"))),
                "OMP_NUM_THREADS": "1",
                "TRITON_CACHE_DIR": str(tmp_path / "cache"),
                "http_proxy": "http://127.0.0.1:9",
                "https_proxy": "http://127.0.0.1:9",
                "HF_HUB_OFFLINE": "1",
                "TRITON_LIBCUDA_PATH": str(tmp_path),  # where a real one would be looked for
                **env,
            },
        )

    return run


@pytest.mark.parametrize(
    "part", ["extension", "compile", "day", "tests", "attn", "backward", "parity", "prefill"]
)
def test_each_part_to_its_end(played, tmp_path, part):
    done = played(part, "-k", "1-16-dtype0-64")
    report = json.loads((tmp_path / "a.json").read_text())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.strip().endswith(f"gpu-check: complete: {part} passed")
    assert report["parts"][part]["status"] == 0
    if part == "day":
        assert {n["step"] for n in report["day"]} >= {"chunk", "rows", "offload", "token", "window"}
        assert all(n["ok"] is not False for n in report["day"])
        timed = ("chunk", "offload", "token", "window")
        assert all(n["ms"] for n in report["day"] if n["step"] in timed)


def test_without_git(gpu_check, monkeypatch, tmp_path):
    def no_repository(command, **options):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(gpu_check.this_machine.subprocess, "run", no_repository)
    path = gpu_check.result_path(tmp_path)
    assert path.parent == tmp_path
    assert re.fullmatch(r"gpu-a-unknown-[0-9a-f]{8}\.json", path.name)
    assert gpu_check.result_path(None).parent == ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("git", [False, True])
def test_results_of_other_code_are_not_merged(gpu_check, monkeypatch, tmp_path, git):
    """No commit names the code: there is no git, or the tree is not the commit's."""
    empty = gpu_check.Part(("-c", ""), lambda: "", json=False, small=())
    monkeypatch.setattr(gpu_check, "PARTS", {"attn": empty, "backward": empty})
    tree, path = tmp_path / "tree", tmp_path / "a.json"

    def in_the_tree(command, **options):
        if not git:
            raise FileNotFoundError("git")
        return SimpleNamespace(stdout="abc" if "rev-parse" in command else " M a.py")

    monkeypatch.setattr(gpu_check.this_machine.subprocess, "run", in_the_tree)
    monkeypatch.setattr(gpu_check.this_machine, "_ROOT", tree)
    (tree / "vxl_kernels").mkdir(parents=True)
    kept = []
    for code, part in (("a = 1", "attn"), ("a = 1", "backward"), ("a = 2", "attn")):
        (tree / "vxl_kernels" / "a.py").write_text(code)
        gpu_check.main([part, "--out", str(path)])
        kept.append(list(json.loads(path.read_text())["parts"]))
    assert kept == [["attn"], ["attn", "backward"], ["attn"]]


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


def test_a_bare_copy_of_the_tree(tmp_path):
    """Without extension, without git, without network: what can run does, the rest is named."""
    pytest.importorskip("triton")
    tree = tmp_path / "tree"
    for name in ("benchmarks", "vxl_kernels", "vxl_model"):
        ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "results")
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    # An editable installation of the tests' own tree would find its extension.
    blocked = BLOCKED.replace('("hypothesis", "av", "torchcodec", "transformers")', "()")
    assert blocked != BLOCKED
    (tmp_path / "sitecustomize.py").write_text(blocked + PLAY)
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/gpu_check.py", "extension", "compile", "parity"),
            *("--small", "--no-build", "--out", str(tmp_path)),
        ],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, tree, ROOT / "tests"))),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "GIT_CEILING_DIRECTORIES": str(tmp_path),
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert done.returncode == 77, done.stdout + done.stderr
    (path,) = tmp_path.glob("played-gpu-unknown-*.json")
    report = json.loads(path.read_text())
    assert {n: p["status"] for n, p in report["parts"].items()} == {
        "extension": 77,
        "compile": 0,
        "parity": 77,
    }
    assert "not built here" in report["parts"]["parity"]["note"]
    assert "INCOMPLETE: not run: extension, parity. Again: python" in done.stdout.splitlines()[-1]


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
