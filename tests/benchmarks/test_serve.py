"""benchmarks/serve.py on a tiny geometry: it runs, compares ids and writes a file."""

import json
import os
import subprocess
import sys

from helpers.paths import BENCHMARKS


def test_small_run(tmp_path):
    options = ["--clients", "5", "--alone", "5", "--layers", "2", "--visual-tokens", "96"]
    options += ["--new", "6", "--frames", "4", "--dtype", "fp32"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "serve.py", "--small", *options, "--json", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "a").read_text())
    assert results["clients"]["match"]
    assert 0 < results["second"]["share"] < 1
