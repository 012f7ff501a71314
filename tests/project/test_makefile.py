"""The make targets install one Triton, the one that fits the torch that pip chose."""

import os
import re
import shutil
import subprocess

import pytest
from helpers.paths import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("cuda", [False, True])
def test_a_torch_with_cuda_keeps_its_own_triton(tmp_path, cuda):
    """Its requirement is exact, so pip cannot install another version. A script takes the place of
    the environment's Python and records its arguments."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    log = tmp_path / "log"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$1 $2" in "-c import torch"*) exit {int(not cuda)};;'
        " esac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", f"VENV={tmp_path / 'venv'}", f"{tmp_path / 'venv'}/.installed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installs = [line.split() for line in log.read_text().splitlines() if " install " in line]
    assert "torch" in installs[0]
    names = [[re.split("[=<>]", word)[0] for word in words] for words in installs]
    assert ["triton" in words for words in names] == ([False] if cuda else [False, True])


def test_no_constraint_on_triton():
    names = re.findall(r"^[\w-]+", (ROOT / "constraints.txt").read_text(), re.M)
    assert "torch" in names
    assert "triton" not in names


def test_every_dependency_has_a_lower_bound():
    """`make test-oldest` installs the bounds. Without one, pip takes the newest release."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(requires|dependencies|gpu|model|video|bench) = \[(.*)\]$", text, re.M)
    assert len(lists) == 6
    for name, words in lists:
        assert re.fullmatch(r'("[a-z0-9-]+>=[0-9.]+"(, )?)+', words), (name, words)


def make_with(pyenv, folders, *arguments):
    """make, where Pythons are in these folders, in pyenv's and in the system's alone."""
    path = os.pathsep.join([*map(str, folders), "/usr/bin", "/bin"])
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": path, "PYENV_ROOT": str(pyenv)},
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_interpreter_that_does_not_start_is_passed_over(tmp_path):
    """pyenv puts names on the path for versions that it was not told to use."""
    shim, works = (tmp_path / name / "python3.10" for name in ("shims", "bin"))
    for python, status in ((shim, 127), (works, 0)):
        python.parent.mkdir()
        python.write_text(f"#!/bin/sh\nexit {status}\n")
        python.chmod(0o755)

    def found(*folders):
        echo = ["--no-print-directory", "--eval=found: ; @echo $(OLDEST_PYTHON)", "found"]
        done = make_with(tmp_path, folders, *echo)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert found(works.parent) == "python3.10"
    assert not found(shim.parent).endswith("python3.10")
    versions = tmp_path / "versions" / "3.10.7" / "bin" / "python"
    versions.parent.mkdir(parents=True)
    shutil.copy(works, versions)
    assert found(shim.parent) == str(versions)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_machine_without_a_python_for_an_environment(tmp_path):
    """CI asks before it runs one. The oldest numpy has no build for Python 3.13."""
    for version in ("3.10", "3.11", "3.12", "3.13"):  # the first on the path: others are not seen
        python = tmp_path / f"python{version}"
        python.write_text(f"#!/bin/sh\nexit {0 if version == '3.13' else 127}\n")
        python.chmod(0o755)
    assert make_with(tmp_path, [tmp_path], "-s", "has-newest-python").returncode == 0
    assert make_with(tmp_path, [tmp_path], "-s", "has-oldest-python").returncode == 2
    done = make_with(tmp_path, [tmp_path], "test-oldest")
    assert done.returncode == 2
    assert "make: test-oldest: no Python found; OLDEST_PYTHON names one" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("missing", ["ARM_CXX", "ARM_RUN"])
def test_a_machine_that_cannot_emulate_aarch64(missing):
    """CI goes on after one line. A command that does nothing takes the other tool's place."""
    tools = [
        f"{name}={'no-such-tool' if name == missing else 'true'}" for name in ("ARM_CXX", "ARM_RUN")
    ]
    done = subprocess.run(
        ["make", "-s", "aarch64-check", *tools],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("make: aarch64-check is skipped: no no-such-tool (Debian and Ubuntu: ")
