"""No kernel touches memory outside its tensors, not even to throw away what it reads."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "guarded.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
@pytest.mark.parametrize("side", ["end", "start"])
def test_against_forbidden_pages(side):
    done = run(side)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")
def test_the_guard_bites():
    assert run("end", "broken").returncode == -signal.SIGSEGV
