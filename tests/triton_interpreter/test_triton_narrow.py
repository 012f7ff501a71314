"""Rounding to bfloat16 where no instruction does it, bit by bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vxl_kernels._triton.primitives import narrow

core = pytest.mark.core


@triton.jit
def narrow_kernel(x_ptr, out_ptr, N: tl.constexpr, ISA: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    y = narrow(tl.load(x_ptr + offs), tl.bfloat16, ISA)
    tl.store(out_ptr + offs, y.to(tl.uint16, bitcast=True).to(tl.int32))


def narrowed(bits, isa):
    n = 1 << 10
    padded = np.zeros(-(-len(bits) // n) * n, np.uint32)
    padded[: len(bits)] = bits
    x = torch.from_numpy(padded.view(np.float32))
    out = torch.empty(len(padded), dtype=torch.int32)
    narrow_kernel[(len(padded) // n,)](x, out, n, isa)
    return out.numpy()[: len(bits)].astype(np.uint32)


def patterns():
    """Numbers with every upper half and lower halves near half a unit in the last place, and random
    numbers."""
    upper = np.arange(0, 0x7F80, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    positive = (upper[:, None] | lower).ravel()
    drawn = np.random.default_rng(0).integers(0, 0x7F800000, 20_000, dtype=np.uint32)
    positive = np.concatenate([positive, drawn])
    return np.concatenate([positive, positive | np.uint32(0x80000000)])


def magnitude(bits):
    """The exact value. Infinity counts as the next number, 2^128."""
    unsigned = bits & np.uint32(0x7FFFFFFF)
    finite = unsigned.view(np.float32).astype(np.float64)
    return np.where(unsigned == 0x7F800000, 2.0**128, finite)


def nearest(bits):
    """The nearer of the two neighbours in bfloat16. Ties go away from zero."""
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    up = magnitude(above) - magnitude(bits) <= magnitude(bits) - magnitude(below)
    return np.where(up, above, below) >> np.uint32(16)


def test_every_number_goes_to_the_nearest():
    bits = patterns()
    np.testing.assert_array_equal(narrowed(bits, "no_bf16_cvt"), nearest(bits))


@core
def test_largest_numbers_infinities_and_nan():
    largest, last_finite = 0x7F7FFFFF, 0x7F7F7FFF
    bits = np.array([0, largest, last_finite, 0x7F800000, 0x7FC00000, 1, 0x7FFF, 0x8000], np.uint32)
    expected = np.array([0, 0x7F80, 0x7F7F, 0x7F80, 0x7FC0, 0, 0, 1], np.uint32)
    for sign in (0, 0x8000):
        signed = bits | np.uint32(sign << 16)
        np.testing.assert_array_equal(narrowed(signed, "no_bf16_cvt"), expected | np.uint32(sign))


def test_only_ties_differ_from_the_instruction():
    """PyTorch rounds ties to even."""
    bits = patterns()
    theirs = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.int16).numpy()
    theirs = theirs.view(np.uint16).astype(np.uint32)
    ties = bits & np.uint32(0xFFFF) == 0x8000
    differ = narrowed(bits, "no_bf16_cvt") != theirs
    assert not differ[~ties].any()
    even = bits >> np.uint32(16) & np.uint32(1) == 0
    np.testing.assert_array_equal(differ[ties], even[ties])
