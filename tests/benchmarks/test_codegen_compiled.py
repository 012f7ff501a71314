"""The static analysis on kernels that Triton compiles here, and the baseline in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.paths import ROOT

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks import machine_code
from benchmarks.codegen.compile import compile_kernel, target_of
from benchmarks.codegen.model import Measured, measure
from benchmarks.codegen.plain_flash import sweep
from benchmarks.codegen.table import violations
from vxl_kernels._triton.catalog import Compilation

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter does not", allow_module_level=True)


@triton.jit
def _greedy(x_ptr, out_ptr, N: tl.constexpr):  # noqa: N803
    """Keeps N numbers per block alive across a reduction, too many for the registers."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(x_ptr + N + offs)
    z = tl.load(x_ptr + 2 * N + offs)
    total = tl.sum(x * y * z, 0)
    tl.store(out_ptr + offs, x * total + y / total - z)


def test_a_spilling_kernel_is_flagged() -> None:
    n = 32 * 128
    toy = Compilation(
        "toy",
        "spills",
        _greedy,
        {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "constexpr"},
        {"N": n},
        attrs={},
        num_warps=1,
        num_stages=1,
        options={},
        tile={},
        head_dim=128,
        dtype="fp32",
    )
    compiled = compile_kernel(toy, "cuda:80")
    assert compiled.spill_bytes > 0
    row = measure(toy, "cuda:80", compiled)
    (found,), _ = violations([row])
    assert "spills" in found


@pytest.mark.parametrize(
    ("arch", "kind", "load"),
    [
        ("cuda:80", "HMMA", "async load"),
        ("cuda:90", "HGMMA", "bulk load"),
        ("cuda:100", "UTCHMMA", "bulk load"),
        ("hip:gfx942", "MFMA", "plain load"),
    ],
)
def test_the_plain_kernel_is_read_on_every_target(arch: str, kind: str, load: str) -> None:
    """Its FLOPs and exponentials are known from its tile alone."""
    small = [k for k in sweep(arch) if k.tile["keys"] == 64 and k.tile["rows"] == 128]
    kernel = next(k for k in small if k.constexprs["TMA"] == (load == "bulk load"))
    row = measure(kernel, arch, compile_kernel(kernel, arch))
    assert set(row.matrix) == {kind}
    assert row.mma_flops == 4 * 128 * 64 * 128
    assert row.repeated == 1.0
    assert row.counts[load] > 0
    # one exponential per score and one per row, repeated by the threads that share a row
    assert row.counts["mufu"] * kernel.num_warps * target_of(arch).warp_size >= 128 * 65
    assert 0.2 < (row.share_of_peak or 0.0) < (row.share_overlapped or 0.0) <= 1.0


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target is 'cuda:1'"):
        target_of("cuda:1")
    with pytest.raises(ValueError, match="arch is 'cuda:1'"):
        sweep("cuda:1")


INTERPRET = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from benchmarks.codegen.plain_flash import plain_flash
torch.manual_seed(0)
for rows, dim, dtype, tma in [(96, 32, torch.float32, False), (77, 16, torch.float16, False),
                              (70, 32, torch.float32, True)]:
    q, k, v = (torch.randn(1, 2, rows, dim).to(dtype) for _ in range(3))
    got = plain_flash(q, k, v, rows=32, keys=16, tma=tma)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True)
    error = (got.double() - want).abs().max().item()
    assert error < (2e-3 if dtype == torch.float16 else 2e-6), (rows, dim, dtype, tma, error)
    wrong = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (got.double() - wrong).abs().max().item() > 0.1
"""


def test_the_plain_kernel_is_right() -> None:
    """Runs in a process of its own, as the interpreter is chosen when Triton is imported."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRET, str(ROOT)],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--strict"], ["--check", "--strict"]])
def test_a_check_takes_what_the_tests_have_compiled(arguments, monkeypatch, tmp_path) -> None:
    """It leaves the plain kernel out and fails on a spill, on a goal it does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = set()

    def run(job: machine_code.Job) -> Measured:
        source, arch, index, head_dim, dtype = job
        kernel = machine_code.kernels(source, arch, head_dim, dtype)[index]
        assert source == "shipped" or kernel.head_dim & (kernel.head_dim - 1) == 0
        seen.add((source, os.environ["TRITON_CACHE_DIR"] == str(tmp_path)))
        row = Measured(kernel.kernel, kernel.config, "sm_80", 1, 0, 0, 1, tile=dict(kernel.tile))
        return replace(row, spill_bytes=spilled, dots=1, matrix={"HMMA": 1}, repeated=repeated)

    monkeypatch.setattr(machine_code, "run", run)
    call = ["--target", "cuda:80", "--kernel", "decode", "--jobs", "1", *arguments]
    spilled, repeated = 0, 1.0
    assert machine_code.main(call) == 0
    faults_alone = arguments == ["--check"]
    assert seen == ({("shipped", True)} if faults_alone else {("shipped", False), ("plain", False)})
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    spilled = 8
    assert machine_code.main(call) == (1 if arguments else 0)
    spilled, repeated = 0, 2.0
    assert machine_code.main(call) == int("--strict" in arguments)
