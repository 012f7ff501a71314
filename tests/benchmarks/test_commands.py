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
    "of_h100",
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


def test_packed_samples_run_and_have_the_gradients_of_single_ones(tmp_path):
    file = tmp_path / "a.json"
    options = ["--case", "short", "--seconds", "0.1", "--json", str(file)]
    done = bench(*options, script="packing.py")
    assert done.returncode == 0, done.stderr
    packed, alone, padded = json.loads(file.read_text())
    assert [x["way"] for x in (packed, alone, padded)] == ["packed", "alone", "padded"]
    assert packed["rows"] == alone["rows"] < padded["rows"]


def test_ragged_calls_run_and_have_the_bits_of_single_ones(tmp_path):
    done = bench("--json", str(tmp_path / "a.json"), script="ragged.py")
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "a.json").read_text())
    assert {(r["case"], r["dtype"]) for r in records} == {
        (case, dtype) for case in ("forks", "step") for dtype in ("fp32", "bf16")
    }
    assert all(r["ms"] > 0 for r in records)
    assert [r["same_bits"] for r in records if r["what"] in ("together", "one launch")] == [
        True
    ] * 4


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


def test_small_run_of_the_decoders(tmp_path):
    pytest.importorskip("transformers")
    cases = ["--case", "prefill-1024", "--case", "decode-padded"]
    done = bench(
        "--dtype", "fp32", *cases, "--json", str(tmp_path / "a.json"), script="decoders.py"
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "a.json").read_text())
    assert [x["provider"] for x in lines] == 2 * ["sdpa", "vxl", "paged"]
    assert all(x["ok"] and x["tokens_per_s"] > 0 and x["repeats"] >= 3 for x in lines)
    assert all(0 < x["max_error"] < 1e-4 for x in lines if x["provider"] != "sdpa")


def test_decoders_whose_logits_differ_fail(monkeypatch, capsys):
    pytest.importorskip("transformers")
    from benchmarks import decoders

    real = decoders.Prompt.forward

    def shifted(self, cache, start, stop):
        logits = real(self, cache, start, stop)
        return logits.roll(1, -1) if isinstance(cache, decoders.PagedCache) else logits

    monkeypatch.setattr(decoders.Prompt, "forward", shifted)
    arguments = ["--small", "--dtype", "fp32", "--case", "prefill-1024", "--layers", "1"]
    assert decoders.main(arguments) == 1
    assert "differ from sdpa's: paged in prefill-1024, fp32" in capsys.readouterr().err


def test_interpreted_triton_is_checked_and_not_timed(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "a.json"
    done = bench("--interpret", "--case", "decode", "--json", str(path))
    assert done.returncode == 0, done.stderr
    records = json.loads(path.read_text())
    assert {r["provider"] for r in records} == {"triton"}
    assert all(r["ok"] and r["ms"] is None for r in records)
