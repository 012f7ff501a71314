"""Online softmax over blocks of keys, and the loops over a cache that prefill and decode share.

Everything is in powers of two: `scale` contains log2(e) and is positive, so a score costs one fused
multiply-add and one exp2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .keys import advance, cache_block, load_block, locate
from .primitives import load_rows, narrow

__all__ = [
    "Arithmetic",
    "Softmax",
    "attend_block",
    "attend_cache",
    "attend_cache_masked",
    "attend_masked_block",
    "softmax_start",
]


class Softmax(NamedTuple):
    """State of the online softmax of M packed rows, float32."""

    row_ref: Any
    """[M]: the reference of the exponentials, to base 2. It may be below the row's maximum."""
    row_sum: Any
    """[M, ROW_SUM_SPLITS]: sums of p."""
    acc: Any
    """[M, D]: sums of p x V."""


class Arithmetic(NamedTuple):
    """Compile-time constants of the arithmetic."""

    PRECISION: Any
    """`input_precision` of products."""
    RESCALE_THRESHOLD: Any
    """How far a row's maximum may rise above row_ref, in powers of two, before row_ref follows."""
    WARP_SKIP_ELEMENTS: Any
    """Numbers of the accumulator that a thread may skip at a time; 0 multiplies always."""
    ISA: Any
    """What an architecture has or lacks, "" for neither of these:
    "f32x2"        one instruction multiplies (and adds) two float32 numbers. The compiler uses it
                   for sums only (sm_100).
    "no_bf16_cvt"  no instruction rounds to bfloat16 (gfx942), see `narrow`.
    """


# -- arithmetic by hand where the compiler's is longer ---------------------------------------

_FMA_F32X2 = tl.constexpr("""{
.reg .b64 x, y, z;
mov.b64 x, {$2, $3};
mov.b64 y, {$4, $5};
mov.b64 z, {$6, $7};
fma.rn.f32x2 x, x, y, z;
mov.b64 {$0, $1}, x;
}""")


@triton.jit
def _multiply_add_pairs(a, b, c):
    """a * b + c, of tensors of one shape; a thread's numbers are even in number."""
    return tl.inline_asm_elementwise(
        _FMA_F32X2, "=f,=f,f,f,f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.constexpr_function
def _skipping_multiply(n):
    """PTX: n numbers times n factors of at most 1, skipped if all factors of the warp are 1.

    The branch tests all factors of the warp, so it does not depend on which thread holds which
    row. A thread holds few rows, so most of the n factors are one register, and `and` of a register
    with itself costs nothing. Of the numbers up to 1, only 1.0 has all the bits of 1.0.
    """
    lines = ["{", ".reg .pred moved;", f".reg .b32 t<{n}>;", f".reg .f32 x<{n}>;"]
    lines += [f"mov.b32 t{i}, ${2 * n + i};" for i in range(n)]
    half = n // 2
    while half:  # the second half of a tile's columns repeats the first
        lines += [f"and.b32 t{i}, t{i}, t{i + half};" for i in range(half)]
        half //= 2
    lines += ["setp.ne.b32 moved, t0, 0x3F800000;", "vote.sync.any.pred moved, moved, 0xFFFFFFFF;"]
    lines += [f"mov.b32 x{i}, ${n + i};" for i in range(n)]
    lines += ["@!moved bra KEPT;"]
    lines += [f"mul.f32 x{i}, x{i}, ${2 * n + i};" for i in range(n)]
    lines += ["KEPT:"] + [f"mov.b32 ${i}, x{i};" for i in range(n)] + ["}"]
    return "\n".join(lines)


@triton.constexpr_function
def _skipping_constraints(n):
    return ",".join(["=f"] * n + ["f"] * (2 * n))


@triton.jit
def _rescale(acc, row_scale, WARP_SKIP_ELEMENTS: tl.constexpr):
    if WARP_SKIP_ELEMENTS == 0:
        return acc * row_scale[:, None]
    else:
        return tl.inline_asm_elementwise(
            _skipping_multiply(WARP_SKIP_ELEMENTS), _skipping_constraints(WARP_SKIP_ELEMENTS),
            [acc, tl.broadcast_to(row_scale[:, None], acc.shape)],
            dtype=tl.float32, is_pure=True, pack=WARP_SKIP_ELEMENTS,
        )  # fmt: skip


# -- softmax -----------------------------------------------------------------------------------


@triton.jit
def softmax_start(M: tl.constexpr, BLOCK_D: tl.constexpr, ROW_SUM_SPLITS: tl.constexpr):
    """The state before the first block."""
    return Softmax(
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M, ROW_SUM_SPLITS], tl.float32),
        tl.zeros([M, BLOCK_D], tl.float32),
    )


@triton.jit
def _softmax_step(scores, scale, state, MAY_SKIP: tl.constexpr, ARITHMETIC: tl.constexpr):
    """p = exp2(scores * scale - row_ref) of a block of scores [M, N], and the state without the
    block's p x V.

    row_ref is a lagging reference, not the row's maximum. It follows the maximum only where that is
    more than RESCALE_THRESHOLD above it. So p is at most 2^RESCALE_THRESHOLD, and most blocks leave
    the accumulator as it is. row_ref is finite after a row's first block: that block must hold a
    key that the row sees.
    """
    row_ref, row_sum, acc = state
    block_max = tl.max(scores, 1) * scale
    if ARITHMETIC.RESCALE_THRESHOLD == 0.0:
        new_ref = tl.maximum(row_ref, block_max)
    else:
        new_ref = tl.where(block_max > row_ref + ARITHMETIC.RESCALE_THRESHOLD, block_max, row_ref)
    if ARITHMETIC.ISA == "f32x2":
        factor = tl.full(scores.shape, 0.0, tl.float32) + scale
        offset = tl.broadcast_to(-new_ref[:, None], scores.shape)
        p = tl.exp2(_multiply_add_pairs(scores, factor, offset))
    else:
        p = tl.exp2(scores * scale - new_ref[:, None])
    row_scale = tl.exp2(row_ref - new_ref)
    SPLITS: tl.constexpr = row_sum.shape[1]
    splits = p.reshape(p.shape[0], p.shape[1] // SPLITS, SPLITS)
    row_sum = row_sum * row_scale[:, None] + tl.sum(splits, 1)
    SKIP: tl.constexpr = ARITHMETIC.WARP_SKIP_ELEMENTS if MAY_SKIP else 0
    acc = _rescale(acc, row_scale, SKIP)
    return p, Softmax(new_ref, row_sum, acc)


@triton.jit
def _add_values(p, v, state, ARITHMETIC: tl.constexpr):
    """The state with p x V added."""
    row_ref, row_sum, acc = state
    p = narrow(p, v.dtype, ARITHMETIC.ISA)
    acc = tl.dot(p, v, acc, input_precision=ARITHMETIC.PRECISION)
    return Softmax(row_ref, row_sum, acc)


@triton.jit
def attend_block(
    q, state, keys, block, i_head, scale,
    HEAD_DIM: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after a block of keys that all rows see."""
    k = load_block(keys.k_desc, block.at_batch, i_head, block.at_row, block.k_ptrs, HEAD_DIM, TMA)
    # TMA takes no registers, so K and V are loaded together. Threads load V after K is used: with
    # both in flight sm_80 would spill 640 bytes.
    if TMA:
        v = load_block(
            keys.v_desc, block.at_batch, i_head, block.at_row, block.v_ptrs, HEAD_DIM, TMA
        )
    scores = tl.dot(q, tl.trans(k), input_precision=ARITHMETIC.PRECISION)
    p, state = _softmax_step(scores, scale, state, True, ARITHMETIC)
    if not TMA:
        v = load_block(
            keys.v_desc, block.at_batch, i_head, block.at_row, block.v_ptrs, HEAD_DIM, TMA
        )
    return _add_values(p, v, state, ARITHMETIC)


@triton.jit
def attend_masked_block(
    q, state, block, offs_key, end, bound, scale,
    HEAD_DIM: tl.constexpr, V_WITH_K: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after a block of the keys `offs_key`. Keys from `end` on are not read, and packed
    row i sees those below bound[i]. V_WITH_K loads V before K is used."""
    k = load_rows(block.k_ptrs, offs_key, end, HEAD_DIM, True)
    if V_WITH_K:
        v = load_rows(block.v_ptrs, offs_key, end, HEAD_DIM, True)
    scores = tl.dot(q, tl.trans(k), input_precision=ARITHMETIC.PRECISION)
    scores = tl.where(offs_key[None, :] < bound[:, None], scores, float("-inf"))
    p, state = _softmax_step(scores, scale, state, False, ARITHMETIC)
    if not V_WITH_K:
        v = load_rows(block.v_ptrs, offs_key, end, HEAD_DIM, True)
    return _add_values(p, v, state, ARITHMETIC)


# -- the cache -----------------------------------------------------------------------------------


@triton.jit
def attend_cache(
    q, state, cache, table, i_head, start, end, offs_n, scale,
    HEAD_DIM: tl.constexpr, PAGE_MODE: tl.constexpr, TMA: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the cache entries from `start` to `end`, whole blocks of the keys offs_n that
    all rows see."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    offs_d = tl.arange(0, q.shape[1])[None, :]
    place = locate(table, start, offs_n, BLOCK_N, PAGE_MODE)
    for _start in tl.range(start, end, BLOCK_N):
        block = cache_block(cache, place, offs_n, offs_d, PAGE_MODE)
        # The next block's page is looked up while this block is computed.
        place = advance(table, place, BLOCK_N, PAGE_MODE)
        state = attend_block(q, state, cache, block, i_head, scale, HEAD_DIM, TMA, ARITHMETIC)
    return state


@triton.jit
def attend_cache_masked(
    q, state, cache, table, start, end, offs_n, scale,
    HEAD_DIM: tl.constexpr, PLACES: tl.constexpr, PAGE_MODE: tl.constexpr,
    ALLOW_LICM: tl.constexpr, V_WITH_K: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The state after the cache entries from `start` to `end`, which all rows see, in blocks of the
    keys offs_n. PLACES is the page mode by which blocks are located, PAGE_MODE that of offsets."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    offs_d = tl.arange(0, q.shape[1])[None, :]
    for first in tl.range(start, end, BLOCK_N, num_stages=1, disable_licm=not ALLOW_LICM):
        place = locate(table, first, offs_n, BLOCK_N, PLACES)
        block = cache_block(cache, place, offs_n, offs_d, PAGE_MODE)
        bound = tl.full([q.shape[0]], 0, tl.int32) + end
        state = attend_masked_block(
            q, state, block, first + offs_n, end, bound, scale, HEAD_DIM, V_WITH_K, ARITHMETIC
        )
    return state
