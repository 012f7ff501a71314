"""The benchmarks on a tiny geometry: they run, check results and write files."""

import json
import subprocess
import sys

import pytest
from helpers.paths import BENCHMARKS

from benchmarks.common.report import Ratio, ratio_table

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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plot", "a.png", "--case", "decode"], "draws the case chunk"),
        (["--plot", "no/where.png"], "--plot: got no/where.png"),
        (["--json", "no/where.json"], "--json: got no/where.json"),
        (["--json", "a.png", "--plot", "./a.png"], "--plot: got a.png, which --json names too"),
        (["--plot", "a.xyz"], "--plot: got a.xyz, expected ."),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(options, words):
    done = bench(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_bars_that_are_missed_are_marked():
    lines = [
        Ratio("fast", "1", "2", "0.5", "of copy", ">= 0.4", True),
        Ratio("slow", "1", "2", "0.5", "of copy", ">= 0.6", False),
        Ratio("plain", "1", "2", "0.5", "of copy"),
    ]
    fast, slow, plain = ratio_table(lines, "cache").splitlines()[-3:]
    assert fast.endswith(">= 0.4 ✓")
    assert slow.endswith(">= 0.6 ✗ MISSED")
    assert plain.rstrip().endswith("of copy")


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
    assert all(
        set(r) == {"what", "value", "against", "ratio", "meaning", "bar", "met"} for r in lines
    )


def test_interpreted_triton_is_checked_and_not_timed(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "a.json"
    done = bench("--interpret", "--case", "decode", "--json", str(path))
    assert done.returncode == 0, done.stderr
    records = json.loads(path.read_text())
    assert {r["provider"] for r in records} == {"triton"}
    assert all(r["ok"] and r["ms"] is None for r in records)
