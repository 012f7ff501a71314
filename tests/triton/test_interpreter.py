"""Runs `tests/triton_interpreter` in processes of their own: see its conftest.py."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TESTS

pytestmark = pytest.mark.core

pytest.importorskip("triton")
FOLDER = TESTS / "triton_interpreter"
# Shares of about equal length, so that the processes of a suite can take one each.
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


@pytest.mark.parametrize("share", SHARES)
def test_under_the_interpreter(request, share):
    """Each share is a pytest of its own, with one thread and the marks of this one."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *(str(FOLDER / f) for f in SHARES[share]),
            *ONLY.get(share, []),
            "-m",
            request.config.option.markexpr,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
