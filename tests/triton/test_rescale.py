"""Arithmetic written in PTX: what it does to a warp, executed here line by line, and what machine
code it becomes. The main part is the jump over the rescaling of an accumulator."""

from __future__ import annotations

import os
import re
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("PTX is of no use to the interpreter", allow_module_level=True)

from benchmarks.codegen.compile import compile_kernel
from benchmarks.codegen.count import tensor_core_shapes
from benchmarks.codegen.limits import LIMITS
from benchmarks.codegen.loops import full_tile_loops
from benchmarks.codegen.model import measure
from vxl_kernels._triton import catalog, softmax
from vxl_kernels._triton.softmax import _skipping_multiply

LANES = 32


def _floats(x: np.ndarray) -> np.ndarray:
    """The two float32 numbers of 64 bits, lower first: [lanes, 2]."""
    return x.view(np.float32).reshape(LANES, 2)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounds once. Products of float32 are exact in float64, and the sums here nearly so."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def execute(text: str, registers: dict[str, np.ndarray]) -> bool:
    """Runs the PTX line by line on a warp's registers, [32] each. Returns whether it jumped."""
    lines = iter(text.splitlines())
    jumped = False
    for line in lines:
        words = re.findall(r"[\w.$@!]+", line)
        if not words or words[0] == ".reg" or line == "KEPT:":
            continue
        op, to, *sources = words
        a, *rest = (registers.get(s) for s in sources) if sources else (None,)
        if op == "mov.b32":
            registers[to] = a.copy()
        elif op == "mov.b64" and "{" in line.partition(",")[2]:  # the first is the lower half
            registers[to] = a.astype(np.uint64) | rest[0].astype(np.uint64) << np.uint64(32)
        elif op == "mov.b64":
            assert re.fullmatch(r"mov\.b64 \{\$\d+, \$\d+\}, \w+;", line)
            pair = registers[sources[1]]
            registers[to] = (pair & np.uint64(0xFFFFFFFF)).astype(np.uint32)
            registers[sources[0]] = (pair >> np.uint64(32)).astype(np.uint32)
        elif op == "and.b32":
            registers[to] = a & rest[0]
        elif op == "setp.ne.b32":
            registers[to] = a != int(sources[1], 16)
        elif op == "vote.sync.any.pred":
            assert sources[1] == "0xFFFFFFFF"
            registers[to] = np.full(LANES, a.any())
        elif op == "@!moved":
            assert len(set(registers["moved"])) == 1
            jumped = not registers["moved"][0]
            if jumped:
                next(x for x in lines if x == "KEPT:")
        elif op == "mul.f32":
            registers[to] = (a.view(np.float32) * rest[0].view(np.float32)).view(np.uint32)
        elif op == "fma.rn.f32x2":
            assert a.itemsize == 8
            done = _fma(_floats(a), *(_floats(x) for x in rest))
            registers[to] = done.view(a.dtype).reshape(LANES)
        else:
            raise AssertionError(f"unknown instruction {line!r}")
    return jumped


def run_warp(text: str, *operands: np.ndarray) -> tuple[np.ndarray, bool]:
    """Runs the PTX for operands of n numbers, [n, 32] each, as `inline_asm_elementwise` passes
    them: n outputs, then the numbers of each operand. Returns the outputs, and whether it
    jumped."""
    n = len(operands[0])
    numbers = [x.view(np.uint32) for operand in operands for x in operand]
    registers = {f"${n + i}": x for i, x in enumerate(numbers)}
    jumped = execute(text, registers)
    return np.stack([registers[f"${i}"] for i in range(n)]).view(np.float32), jumped


def test_pairs_are_computed_each_by_itself():
    """As NumPy computes them one by one, extremes included. Outputs are in the order of inputs."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((3, 200, 2, LANES))
    drawn = (drawn * 10.0 ** rng.integers(-18, 18, drawn.shape)).astype(np.float32)
    odd = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 2.0**-149, 2.0**-126, 3.4e38, -3.4e38]
    drawn[:, :50] = rng.choice(np.array(odd, np.float32), drawn[:, :50].shape)
    with np.errstate(all="ignore"):
        for each in drawn.swapaxes(0, 1):
            out, _ = run_warp(softmax._FMA_F32X2.value, *each)
            expected = _fma(*each)
            np.testing.assert_array_equal(out, expected)
            numbers = ~np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(out[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("n", [1, 8, 64])
def test_no_factor_is_overlooked(n):
    """In any lane and place, one factor below 1 is found, also the largest such number."""
    text = _skipping_multiply.fn(n) if hasattr(_skipping_multiply, "fn") else _skipping_multiply(n)
    rng = np.random.default_rng(0)
    acc = rng.standard_normal((n, LANES)).astype(np.float32)
    ones = np.ones((n, LANES), np.float32)
    out, jumped = run_warp(text, acc, ones)
    assert jumped
    np.testing.assert_array_equal(out, acc)
    below = [0.0, 2.0**-126, 2.0**-9, 0.5, 0.75, np.nextafter(np.float32(1), np.float32(0))]
    for i in range(n):
        factor = ones.copy()
        factor[i, rng.integers(LANES)] = below[i % len(below)]
        out, jumped = run_warp(text, acc, factor)
        assert not jumped
        np.testing.assert_array_equal(out, acc * factor)
    many = np.where(rng.random((n, LANES)) < 0.5, rng.random((n, LANES)), 1).astype(np.float32)
    out, _ = run_warp(text, acc, many)
    np.testing.assert_array_equal(out, acc * many)


@pytest.mark.parametrize("arch", ["cuda:80", "cuda:90", "cuda:100"])
def test_asking_costs_a_few_instructions(arch):
    """A warp tests every factor. They are in few registers, which the compiler sees: the test is
    one vote and a few logic instructions."""
    kernel = next(
        e for e in catalog.shipped(arch) if f"{e.kernel} {e.config}".startswith("prefill")
    )
    assert kernel.constexprs["WARP_SKIP_ELEMENTS"] == 64
    row = measure(kernel, arch, compile_kernel(kernel, arch))
    assert row.spill_bytes == 0
    assert row.share_of_peak > row.share_rescaling + 0.01, "no branch around the multiplications"
    assert row.counts["fma"] + row.counts["alu"] < 320  # a test for each factor would be 60 more


def loops_of(arch: str) -> tuple[catalog.Compilation, list[Counter[str]]]:
    """Prefill's main configuration, and the instructions of its loops over full tiles."""
    entries = catalog.shipped(arch)
    kernel = next(e for e in entries if f"{e.kernel} {e.config}".startswith("prefill bf16 d128"))
    compiled = compile_kernel(kernel, arch)
    loops = full_tile_loops(
        compiled.function,
        kernel.tile,
        warp=LIMITS[arch].warp,
        warps=compiled.warps,
        shapes=tensor_core_shapes(compiled.ptx) if compiled.ptx else [],
    )
    blocks = [compiled.function.instructions(loop.loop.blocks) for loop in loops]
    return kernel, [Counter(i.base for i in each) for each in blocks]


def test_sm_100_takes_two_numbers_an_instruction():
    """Scores are scaled in pairs."""
    kernel, loops = loops_of("cuda:100")
    threads = 32 * kernel.num_warps
    scores = kernel.tile["rows"] * kernel.tile["keys"] // threads
    assert loops
    for found in loops:
        assert found["FFMA2"] >= scores // 2
        assert found["FFMA"] < 8  # of rows


def test_gfx942_rounds_without_asking():
    """The compiler's own conversion to bfloat16 tests each number for NaN."""
    _, loops = loops_of("hip:gfx942")
    assert loops
    for found in loops:
        asked = {name for name in found if re.match(r"v_cmp_(o|u)_f32|v_cndmask", name)}
        assert not asked
        assert any(name.startswith("v_mfma") for name in found)
