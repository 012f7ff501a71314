"""What the kernels share: rows and positions, tiles of packed rows, loads, registers.

Names: `offs_` are vectors of indices, `_ptrs` tiles of pointers, UPPER CASE compile-time constants.
Sequence lengths are never constants. `layout.py` describes rows and positions. This is its
counterpart on the device, as `csrc/include/vxl/params.h` is for the CPU kernels. `layout=None` is
one chunk of plain rows: its ratio is so large that no position is a VST.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "MAX_STRIDE",
    "NEVER",
    "Runs",
    "assume_stride",
    "assume_strides",
    "block_of_run",
    "chunk_row",
    "chunk_runs",
    "load_packed",
    "load_rows",
    "narrow",
    "opaque_zero",
    "packed_rows",
    "packed_tile",
    "query_row",
    "run_row",
    "tile_of_program",
    "visible_new",
]


# -- rows and positions ----------------------------------------------------------------------

NEVER = tl.constexpr(1 << 30)  # a ratio that no position reaches: text is a chunk without VSTs


class Runs(NamedTuple):
    """First rows of a chunk's two runs in split order, in which rows grow by one with the index."""

    raw: Any
    vst: Any


@triton.jit
def chunk_runs(chunk, window, ratio, chunks):
    """Runs of a chunk of a sequence whose first row is 0."""
    return Runs(chunk * window, chunks * window + chunk * (window // ratio))


@triton.jit
def run_row(is_vst, index, runs):
    """Row that holds raw token (or VST) `index` of a chunk in split order."""
    return tl.where(is_vst, runs.vst, runs.raw) + index


@triton.jit
def chunk_row(is_vst, index, chunk, window, ratio, chunks, SPLIT: tl.constexpr):
    """Row that holds raw token (or VST) `index` of `chunk`. In interleaved order a VST follows
    every `ratio` raw tokens."""
    if SPLIT:
        return run_row(is_vst, index, chunk_runs(chunk, window, ratio, chunks))
    else:
        place = tl.where(is_vst, index * (ratio + 1) + ratio, index + index // ratio)
        return chunk * (window + window // ratio) + place


@triton.jit
def query_row(position, runs, ratio):
    """Row that holds the token at `position` of a chunk in split order."""
    vsts_before = position // (ratio + 1)
    is_vst = position % (ratio + 1) == ratio
    index = tl.where(is_vst, vsts_before, position - vsts_before)
    return run_row(is_vst, index, runs)


@triton.jit
def visible_new(position, ratio):
    """How many raw tokens and how many VSTs of its chunk the row at `position` sees, itself
    included. One bound for each, so both are runs of keys that start at 0, in either row order."""
    vst = (position + 1) // (ratio + 1)
    return position + 1 - vst, vst


# -- tiles of packed rows ------------------------------------------------------------------------


@triton.jit
def tile_of_program(
    length, chunks, KV_HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(sequence, KV head, chunk, first packed row, last packed row) of a program. Packed row i of a
    chunk of `length` rows is position i // GROUP_SIZE and query head i % GROUP_SIZE of the head."""
    pid = tl.program_id(0)
    i_head = pid % KV_HEADS
    i_chunk = pid // KV_HEADS % chunks
    # Programs start in the order of their number: those with the most keys first.
    i_tile = tl.cdiv(length * GROUP_SIZE, BLOCK_M) - 1 - pid // (KV_HEADS * chunks)
    i_batch = tl.program_id(1).to(tl.int64)
    first_m = i_tile * BLOCK_M
    last_m = tl.minimum(first_m + BLOCK_M, length * GROUP_SIZE) - 1
    return i_batch, i_head, i_chunk, first_m, last_m


@triton.jit
def packed_rows(offs_m, i_head, runs, ratio, GROUP_SIZE: tl.constexpr):
    """(query head, row of the call) of packed rows of a chunk in split order."""
    position = offs_m // GROUP_SIZE
    offs_head = i_head * GROUP_SIZE + offs_m % GROUP_SIZE
    return offs_head, query_row(position, runs, ratio)


@triton.jit
def packed_tile(
    first_m, last_m, i_head, runs, ratio, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """`packed_rows` of a tile, and which of them to store: those past last_m repeat it."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    stored = offs_m <= last_m
    offs_head, offs_row = packed_rows(tl.minimum(offs_m, last_m), i_head, runs, ratio, GROUP_SIZE)
    return offs_head, offs_row, stored


@triton.jit
def block_of_run(i, raw_blocks, first_raw, first_vst, BLOCK_N: tl.constexpr):
    """Block i of `raw_blocks` blocks of raw tokens and the blocks of VSTs that follow: (whether it
    is one of VSTs, its first index). The runs start at their blocks first_raw and first_vst."""
    is_vst = i >= raw_blocks
    return is_vst, tl.where(is_vst, first_vst + i - raw_blocks, first_raw + i) * BLOCK_N


# -- loads ---------------------------------------------------------------------------------------

# Elements from a key to the next, at most. Beyond it the launcher copies the tensor or takes 64-bit
# offsets. Within it a block of 128 keys spans at most 2 GiB.
MAX_STRIDE = tl.constexpr(2**20)


@triton.jit
def assume_stride(stride):
    """Tells the compiler the bounds that the launcher has checked. AMD's then loads a block from a
    scalar address and 32-bit offsets instead of a 64-bit address for each thread."""
    tl.assume(stride >= 0)
    tl.assume(stride <= MAX_STRIDE)


@triton.jit
def assume_strides(
    k_row, v_row, kc_slot, vc_slot, HAS_CACHE: tl.constexpr, PAGE_MODE: tl.constexpr
):
    """`assume_stride` of the strides of keys that 32-bit offsets are made of."""
    assume_stride(k_row)
    assume_stride(v_row)
    if HAS_CACHE and PAGE_MODE != "gather":
        assume_stride(kc_slot)
        assume_stride(vc_slot)


@triton.jit
def load_rows(ptrs, offs_row, rows, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A tile [R, D] in which dimensions from HEAD_DIM on and, if MASK_ROWS, rows from `rows` on are
    not read but 0."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    in_dims = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if MASK_ROWS:
        in_rows = offs_row[:, None] < rows
        if HEAD_DIM != BLOCK_D:
            return tl.load(ptrs, mask=in_rows & in_dims, other=0.0)
        return tl.load(ptrs, mask=in_rows, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=in_dims, other=0.0)
    return tl.load(ptrs)


@triton.jit
def load_packed(
    ptr, offs_head, offs_row, row_stride, head_stride, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Packed rows [M, D] of a tensor (rows, heads, head_dim). Strides are in elements."""
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * row_stride
    ptrs += offs_head.to(tl.int64)[:, None] * head_stride
    return load_rows(ptrs + tl.arange(0, BLOCK_D)[None, :], offs_row, rows, HEAD_DIM, False)


# -- registers -----------------------------------------------------------------------------------


@triton.jit
def opaque_zero(WHICH: tl.constexpr = 0):
    """0, though no compiler can tell: grids have one program along their third axis.

    Added to an index, it makes the compiler compute what follows from the index again instead of
    keeping the value from before a loop, which would take registers all through the loop or be
    spilled. Zeros of one WHICH (0, 1 or 2) are one value to the compiler, others are not.
    """
    if WHICH == 0:
        return tl.program_id(2)
    elif WHICH == 1:
        return 2 * tl.program_id(2)
    else:
        return tl.num_programs(2) - 1


# -- bfloat16 --------------------------------------------------------------------------------------


@triton.jit
def narrow(x, dtype: tl.constexpr, ISA: tl.constexpr):
    """float32 x in the dtype of keys.

    ISA "no_bf16_cvt" (gfx942): no instruction rounds to bfloat16, and LLVM's five-instruction
    sequence also handles NaN. We add half a unit in the last place and pack the upper halves: 1.5
    instructions per value, which round to nearest, ties away from zero. Infinities and the NaN that
    instructions produce (0x7FC00000) are kept.
    """
    if ISA == "no_bf16_cvt" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True) + 0x8000
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
