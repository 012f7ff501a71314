"""No kernel touches memory outside its tensors, not even to discard what it reads."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TESTS


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "helpers.triton_guarded", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, ROOT)))},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
@pytest.mark.parametrize("side", ["end", "start"])
def test_against_forbidden_pages(side):
    done = run(side)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
def test_the_guard_works():
    assert run("end", "broken").returncode == -signal.SIGSEGV
