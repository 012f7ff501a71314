"""Jumping over the rescaling of an accumulator: what its PTX does to a warp, read here line by
line, and what becomes of it in machine code."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("PTX is of no use to the interpreter", allow_module_level=True)

from _sass_compile import compile_kernel
from _sass_model import measure

from vxl_kernels._triton import catalog
from vxl_kernels._triton.primitives import _skipping_multiply

LANES = 32


def run_warp(text: str, acc: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, bool]:
    """Runs the PTX for [n, 32] numbers and factors: the outputs, and whether it jumped."""
    n = len(acc)
    registers = {f"${n + i}": acc[i].view(np.uint32) for i in range(n)}
    registers |= {f"${2 * n + i}": factor[i].view(np.uint32) for i in range(n)}
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
        else:
            raise AssertionError(f"unknown instruction {line!r}")
    return np.stack([registers[f"${i}"] for i in range(n)]).view(np.float32), jumped


@pytest.mark.parametrize("n", [1, 8, 64])
def test_no_factor_is_overlooked(n):
    """Whatever lane and place holds the one factor below 1, also the largest below it."""
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


@pytest.mark.parametrize("arch", ["cuda:80", "cuda:90"])
def test_asking_costs_a_few_instructions(arch):
    """A warp asks about every factor; the registers behind them are few, and the compiler sees
    it: all of the question is a vote and a few logic instructions."""
    kernel = next(
        e for e in catalog.shipped(arch) if f"{e.kernel} {e.config}".startswith("prefill")
    )
    assert kernel.constexprs["SKIP"] == 64
    row = measure(kernel, arch, compile_kernel(kernel, arch))
    assert row.spill_bytes == 0
    assert row.share_of_peak > row.share_rescaling + 0.01, "no branch around the multiplications"
    assert row.counts["fma"] + row.counts["alu"] < 320  # with a question for each: 60 more
