"""benchmarks/prefill.py on a tiny geometry: it runs, compares and writes files. Peak memory does
not grow with the video."""

import json
import os
import subprocess
import sys

from helpers.paths import BENCHMARKS

from vxl_kernels import ChunkLayout

SCRIPT = BENCHMARKS / "prefill.py"


def bench(*options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--small", *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # nothing in it is large enough for two
    )


def test_small_run(tmp_path):
    done = bench(
        "--case",
        "encode",
        "--case",
        "questions",
        "--case",
        "pipeline",
        "--chunks",
        "3",
        "--questions",
        "3",
        "--frames",
        "6",
        "--vision-frames",
        "1",
        "--alpha",
        "4",
        "--json",
        str(tmp_path / "a.json"),
        "--plot",
        str(tmp_path / "a.png"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a.json").read_text())
    encode = results["encode"]
    assert encode["match"]
    assert max(encode["errors"].values()) < 1e-5
    assert set(encode["seconds"]) == {"vxl", "vxl, last layer in full", "published"}
    assert all(len(v) == 3 and min(v) > 0 for v in encode["seconds"].values())
    # 14 tokens of the prompt, a window of 144 and 36 VSTs. The last of 4 layers keeps only K and V.
    rows, hidden, kv, inner = 180, 64, 32, 96
    each = 2 * rows * hidden
    first = encode["flops"][0]
    last = 2 * 36 * hidden * 2 * kv
    assert first["projections"] == 3 * each * (2 * hidden + 2 * kv) + last
    assert first["MLP"] == 3 * 3 * each * inner
    assert first["attention"] == 3 * ChunkLayout(144, 4).flops(4, 16, 14)
    assert first["append"] == 0
    assert encode["product"] > 0
    assert "% product" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert results["questions"]["pages_after"] <= results["questions"]["pages_video"] + 2
    assert results["questions"]["same_answers"]
    assert results["questions"]["together_s"] > 0
    assert results["pipeline"]["vision"] > 0


def test_peak_memory_does_not_grow_with_the_video(tmp_path):
    done = bench(
        "--case", "memory", "--memory-frames", "64,384", "--json", str(tmp_path / "a.json")
    )
    assert done.returncode == 0, done.stderr
    short, long = json.loads((tmp_path / "a.json").read_text())["memory"]["rows"]
    assert long["kept_mib"] > 5 * short["kept_mib"]
    # With tiny models, a MiB more or less from the allocator is much.
    assert long["peak_mib"] < 1.1 * (short["peak_mib"] + long["kept_mib"]) + 4
