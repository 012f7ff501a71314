"""Runs `tests/triton_interpreter` in processes of their own: see its conftest.py."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TESTS

pytestmark = pytest.mark.core

pytest.importorskip("triton")
FOLDER = TESTS / "triton_interpreter"
# Shares of about equal length: one for each core of a small machine.
SHARES = {
    "attention": ["test_triton_attention.py"],
    "backward": ["test_triton_backward.py"],
    "rest": [
        p.name
        for p in sorted(FOLDER.glob("test_*.py"))
        if p.name not in ("test_triton_attention.py", "test_triton_backward.py")
    ],
    "model": ["../model/test_parity.py"],
}
ONLY = {"model": ["-k", "triton"]}


@pytest.fixture(scope="module")
def shares(request):
    """Runs all shares at once, each a pytest with one thread and the given marks."""
    running = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                *(str(FOLDER / f) for f in files),
                *ONLY.get(name, []),
                "-m",
                request.config.option.markexpr,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        for name, files in SHARES.items()
    }
    return {name: (process, process.communicate()[0]) for name, process in running.items()}


@pytest.mark.parametrize("share", SHARES)
def test_under_the_interpreter(shares, share):
    process, output = shares[share]
    assert process.returncode == 0, output[-4000:]
    assert " passed" in output
