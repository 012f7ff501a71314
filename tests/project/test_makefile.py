"""What the make targets install: one Triton, the one that fits the torch that pip chose."""

import re
import shutil
import subprocess

import pytest
from helpers.paths import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("cuda", [False, True])
def test_a_torch_with_cuda_keeps_its_own_triton(tmp_path, cuda):
    """Its requirement is exact, so another version beside it cannot be resolved. The environment's
    Python is played by a script that notes what it is told."""
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
