"""The benchmarks on a tiny geometry: they run, check, and write what they say."""

import json
import subprocess
import sys

import pytest
from helpers.paths import BENCHMARKS

KEYS = {
    "case",
    "provider",
    "dtype",
    "cache_len",
    "batch",
    "ms",
    "tflops",
    "of_ceiling",
    "speedup_vs_best_peer",
    "max_error",
    "ok",
    "gb_per_s",
    "spread",
    "repeats",
    "host_ms",
    "page_size",
    "chunks",
    "note",
    "machine",
    "versions",
}


def bench(*options, script="attn.py"):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--small", *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16", "--order", "interleaved"]])
def test_small_run(tmp_path, options):
    done = bench("--json", str(tmp_path / "a.json"), *options)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "a.json").read_text())
    assert all(set(r) == KEYS for r in records)
    ours = [r for r in records if r["provider"] == "vxl"]
    assert {r["case"] for r in ours} >= {"chunk", "tail", "decode"}
    assert all(r["ok"] and r["ms"] > 0 and r["max_error"] is not None for r in ours)
    assert {"published", "sdpa_bool"} <= {r["provider"] for r in records}
    assert all(r["spread"] is not None and r["repeats"] >= 3 for r in ours)
    assert all("torch" in r["versions"] for r in records)
    assert all(r["note"] for r in records if r["ms"] is None)  # why it did not run


def test_unknown_names_are_refused():
    done = bench("--provider", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "vxl" in done.stderr


def test_small_run_of_the_cache(tmp_path):
    done = bench("--json", str(tmp_path / "a.json"), script="cache.py")
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "a.json").read_text())
    assert len(lines) == 11
    assert all(set(r) == {"what", "value", "against", "ratio", "meaning"} for r in lines)


def test_interpreted_triton_is_checked_and_not_timed(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "a.json"
    done = bench("--interpret", "--case", "decode", "--json", str(path))
    assert done.returncode == 0, done.stderr
    records = json.loads(path.read_text())
    assert {r["provider"] for r in records} == {"triton"}
    assert all(r["ok"] and r["ms"] is None for r in records)
